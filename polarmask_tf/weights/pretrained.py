"""Backbones that start from weights made elsewhere. Every tensor is accounted for; a file that does not fit is refused."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import tensorflow as tf
import tf_keras

from polarmask_tf.config import ModelConfig
from polarmask_tf.errors import InputError
from polarmask_tf.files import check_regular, readable_by_tensorflow
from polarmask_tf.modeling.backbones.resnet import ResNet
from polarmask_tf.weights import imagenet
from polarmask_tf.weights.state_dict import read_tensors, summarize

# What a config needs for weights of torchvision, and of Model Garden: RGB means of 0..255 pixels, and what is divided by.
TORCHVISION_NEEDS = {
    "model.normalization": "fixed",
    "model.mean": (123.675, 116.28, 103.53),
    "model.std": (58.395, 57.12, 57.375),
}


def initialize(backbone: tf_keras.Model, config: ModelConfig) -> None:
    """Loads config.backbone.weights into a backbone of that config.

    A ResNet takes "imagenet" (tf_keras.applications' weights, downloaded), such a .h5 file without top, or a .pth or .npz
    file with torchvision's names; EfficientNetLite0 "imagenet" (of an installed package) or a file of the same names;
    tf-models-official's backbones one of its checkpoints, by prefix or directory. Raises InputError, and assigns nothing,
    for a file that is missing, damaged, foreign or of another network, and for a config that needs other settings for these
    weights, all of which are named at once.
    """
    weights, kind = config.backbone.weights, config.backbone.type
    suffix = Path(weights).suffix
    if suffix in (".h5", ".pth", ".pt", ".npz") and not Path(weights).exists():
        raise InputError(f"model.backbone.weights: {weights}: no such file")
    if weights.endswith(".weights.h5"):  # Keras' own name for them; else a ResNet's settings would be asked for
        raise InputError(
            f"{weights}: weights of save_weights, which do not say of what model: load_weights takes them, into one like it; "
            "--start takes its run directory, or the .keras file that model.save writes"
        )
    if kind == "EfficientNetLite0":
        require(config, weights, imagenet.LITE0_NEEDS)
        path = imagenet.lite0_file() if weights == "imagenet" else weights
        assign(imagenet.lite0_variables(backbone), imagenet.lite0_tensors(path), str(path))
    elif kind != "resnet":
        if weights == "imagenet":
            raise InputError(
                f"model.backbone.weights is imagenet: {kind} has nothing to download; give the path of a checkpoint of "
                "tf-models-official, or set model.backbone.type=EfficientNetLite0"
            )
        require(config, weights, TORCHVISION_NEEDS)
        _load_garden(backbone, weights, kind)
    elif weights == "imagenet" or suffix == ".h5":
        known = config.backbone.blocks in imagenet.APPLICATIONS
        require(
            config,
            weights,
            {**imagenet.RESNET_NEEDS, **({} if known else {"model.backbone.blocks": (3, 4, 6, 3)})},
            "" if known else " (ResNet-50; 101 has blocks [3,4,23,3], 152 [3,8,36,3])",
        )
        assign(variables(backbone), imagenet.resnet_tensors(config.backbone), weights)
    elif suffix in (".pth", ".pt", ".npz"):
        tensors = torchvision_tensors(weights)
        require(config, weights, {**shape_of_resnet(tensors), **TORCHVISION_NEEDS})
        assign(variables(backbone), tensors, weights)
    else:
        raise InputError(
            f"model.backbone.weights is {weights!r}: imagenet, a .h5 file of tf_keras.applications, or a .pth or .npz file "
            "with torchvision's names is expected"
        )


def require(config: ModelConfig, source: str, needs: dict, remark: str = "", tolerance: float = 0.01) -> None:
    """InputError unless a config has the settings that weights need; it names all that are to be changed, ready to paste."""
    changes = {key: value for key, value in needs.items() if not _agrees(_setting(config, key), value, tolerance)}
    if config.backbone.norm == "group":
        changes["model.backbone.norm"] = "frozen"  # there are none with GroupNorm
    if changes:
        text = {
            key: value if isinstance(value, str) else json.dumps(value, separators=(",", ":")) for key, value in changes.items()
        }
        pasted = shlex.join(word for key, value in text.items() for word in ("--set", f"{key}={value}"))
        raise InputError(f"{source}: these weights need other settings than the config's: {pasted}{remark}")


def _setting(config: ModelConfig, key: str):
    value = config
    for name in key.split(".")[1:]:
        value = getattr(value, name)
    return value


def _agrees(given, wanted, tolerance: float) -> bool:
    if isinstance(wanted, tuple) and any(isinstance(value, float) for value in wanted):
        return np.allclose(given, wanted, rtol=0, atol=tolerance)
    return given == wanted


def variables(backbone: ResNet) -> dict[str, tf.Variable]:
    """A built ResNet's variables by torchvision's names: conv1.weight, bn1.running_mean, layer1.0.downsample.0.weight, ..."""
    if backbone.config.stem != "7x7" or backbone.config.norm == "group":
        raise InputError("known weights of a ResNet have model.backbone.stem: 7x7 and BatchNorm")
    pairs = [("conv1", "bn1", backbone.stem, backbone.stem_norm)]
    for stage, blocks in enumerate(backbone.stages, 1):
        for number, block in enumerate(blocks):
            at = f"layer{stage}.{number}."
            for i, (conv, norm) in enumerate(zip(block.convs, block.norms, strict=True), 1):
                pairs.append((f"{at}conv{i}", f"{at}bn{i}", conv, norm))
            if block.shortcut is not None:
                pairs.append((f"{at}downsample.0", f"{at}downsample.1", block.shortcut, block.shortcut_norm))
    named = {}
    for conv_name, norm_name, conv, norm in pairs:
        named[f"{conv_name}.weight"] = conv.conv.kernel
        named[f"{norm_name}.weight"], named[f"{norm_name}.bias"] = norm.gamma, norm.beta
        named[f"{norm_name}.running_mean"], named[f"{norm_name}.running_var"] = norm.moving_mean, norm.moving_variance
    return named


def assign(named: dict[str, tf.Variable], tensors: dict[str, np.ndarray], source: str) -> None:
    """Assigns tensors (kernels as TensorFlow has them) of the same names and shapes; all of them, or InputError and none."""
    check(named, tensors, source)
    for name, variable in named.items():
        variable.assign(tensors[name])


def check(named: dict[str, tf.Variable], tensors: dict[str, np.ndarray], source: str) -> None:
    """InputError, naming the first few, unless names and shapes are the same."""
    missing = [name for name in named if name not in tensors]
    unexpected = [name for name in tensors if name not in named]
    wrong = [
        f"{name} ({_shape(tensors[name])} instead of {_shape(variable)})"
        for name, variable in named.items()
        if name in tensors and tuple(tensors[name].shape) != tuple(variable.shape)
    ]
    problems = [
        f"{len(names)} {what} ({summarize(names)})"
        for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", wrong))
        if names
    ]
    if problems:
        raise InputError(f"{source}: weights of another network than the config's: tensors " + "; ".join(problems))


def torchvision_tensors(path: str) -> dict[str, np.ndarray]:
    """Tensors of a file of a ResNet with torchvision's names, kernels transposed to [k, k, in / groups, out].

    Of a detector, the tensors under `backbone.`. What counts batches or classifies is left out.
    """
    tensors = read_tensors(path)
    inside = {name.removeprefix("backbone."): value for name, value in tensors.items() if name.startswith("backbone.")}
    if inside and len(inside) < len(tensors):
        others = [name for name in tensors if not name.startswith("backbone.")]
        print(f"{path}: {len(others)} tensors outside backbone. are not used ({summarize(others)})", file=sys.stderr)
    return {
        name: value.transpose(2, 3, 1, 0) if value.ndim == 4 else value
        for name, value in (inside or tensors).items()
        if not name.startswith("fc.") and not name.endswith(".num_batches_tracked")
    }


def shape_of_resnet(tensors: dict[str, np.ndarray]) -> dict:
    """The settings of the ResNet that these are of, as far as it shows; as torchvision_tensors has them."""
    blocks = tuple(
        len({match[1] for name in tensors if (match := re.match(rf"layer{stage}\.(\d+)\.", name))}) for stage in (1, 2, 3, 4)
    )
    if "conv1.weight" not in tensors or 0 in blocks:
        return {}  # of something else, which is said by the names of what is missing
    bottleneck = any(name.startswith("layer1.0.conv3.") for name in tensors)
    shape = {"stem": "7x7", "stem_width": 0, "block": "bottleneck" if bottleneck else "basic", "blocks": blocks}
    shape |= {"width": int(tensors["conv1.weight"].shape[-1]), "widths": ()}
    grouped = tensors.get("layer1.0.conv2.weight")
    if bottleneck and grouped is not None and grouped.ndim == 4 and grouped.shape[2]:
        _, _, each, out = grouped.shape  # input channels of a group, output channels of all
        shape |= {"stride_in": "3x3", "groups": out // each, **({"group_width": each} if out > each else {})}
    return {f"model.backbone.{name}": value for name, value in shape.items()}


def _load_garden(backbone: tf_keras.Model, path: str, kind: str) -> None:
    is_folder = Path(path).is_dir()
    with readable_by_tensorflow(Path(path) / "checkpoint" if is_folder else path.removesuffix(".index")) as prefix:
        if is_folder:
            check_regular(Path(path).iterdir())
            prefix = tf.train.latest_checkpoint(Path(prefix).parent)
        if not prefix or not Path(f"{prefix}.index").is_file():
            raise InputError(
                f"{path}: no checkpoint of tf-models-official (a directory with one, or a prefix: FILE.index exists)"
            )
        # What its trainer saves has the backbone under this name, beside model, optimizer and global_step.
        checkpoint = tf.train.Checkpoint(backbone=backbone)
        try:
            checkpoint.read(prefix).assert_existing_objects_matched().expect_partial()
        except (tf.errors.OpError, AssertionError, ValueError, IndexError) as e:  # the reader raises all of these
            reason = " ".join(str(e).split())[:200]
            raise InputError(f"{path}: damaged, or without the backbone of a {kind} of this multiplier ({reason})") from None


def _shape(value) -> str:
    return "x".join(map(str, value.shape))
