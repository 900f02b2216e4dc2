"""Backbones that start from weights made elsewhere. Every tensor is accounted for; a file that does not fit is refused."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import tensorflow as tf
import tf_keras

from polarmask_tf.config import BackboneConfig, ModelConfig
from polarmask_tf.errors import InputError
from polarmask_tf.files import readable_by_tensorflow
from polarmask_tf.modeling.backbones.resnet import ResNet
from polarmask_tf.weights.state_dict import read_tensors, summarize

# What images were when the weights were made: RGB mean and standard deviation.
CAFFE = ((123.68, 116.779, 103.939), (1.0, 1.0, 1.0))
TORCHVISION = ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))  # also Model Garden's

APPLICATIONS = {
    (3, 4, 6, 3): tf_keras.applications.ResNet50,
    (3, 4, 23, 3): tf_keras.applications.ResNet101,
    (3, 8, 36, 3): tf_keras.applications.ResNet152,
}


def initialize(backbone: tf_keras.Model, config: ModelConfig) -> None:
    """Loads config.backbone.weights into a backbone of that config.

    A ResNet takes "imagenet" (tf_keras.applications' weights, downloaded), such a .h5 file without top, or a .pth or .npz
    file with torchvision's names; tf-models-official's backbones take one of its checkpoints, by prefix or directory.
    Raises InputError for a file that is missing, damaged, foreign or of another network, and where config's
    normalisation or stride placement is not that of the weights.
    """
    weights = config.backbone.weights
    if config.backbone.type != "resnet":
        if weights == "imagenet":
            raise InputError(
                f"model.backbone.weights is imagenet: {config.backbone.type} has nothing to download; "
                "give the path of a checkpoint of tf-models-official"
            )
        _check_normalization(config, TORCHVISION)
        _load_garden(backbone, weights, config.backbone.type)
        return
    if config.backbone.norm == "group":
        raise InputError("model.backbone.weights: there are none with GroupNorm; set model.backbone.norm, or weights to ''")
    suffix = Path(weights).suffix
    if weights == "imagenet" or suffix == ".h5":
        _check_stride(config.backbone, "1x1")
        _check_normalization(config, CAFFE)
        tensors = _from_applications(config.backbone)
    elif suffix in (".pth", ".pt", ".npz"):
        _check_stride(config.backbone, "3x3")
        _check_normalization(config, TORCHVISION)
        tensors = torchvision_tensors(weights)
    else:
        raise InputError(
            f"model.backbone.weights is {weights!r}: imagenet, a .h5 file of tf_keras.applications, or a .pth or .npz file "
            "with torchvision's names is expected"
        )
    assign(variables(backbone), tensors, weights)


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


def _from_applications(config: BackboneConfig) -> dict[str, np.ndarray]:
    make = APPLICATIONS.get(config.blocks)
    shape = (config.stem, config.block, config.width, config.groups)
    if make is None or shape != ("7x7", "bottleneck", 64, 1):
        raise InputError(
            f"model.backbone.weights: {config.weights} is for ResNet-50, 101 and 152: stem 7x7, block bottleneck, width 64, "
            "groups 1, blocks [3, 4, 6, 3], [3, 4, 23, 3] or [3, 8, 36, 3]"
        )
    options = {"include_top": False, "input_shape": (None, None, 3)}
    if config.weights == "imagenet":
        try:
            network = make(weights="imagenet", **options)
        except Exception as e:  # what get_file raises for whatever went wrong
            name = f"{make.__name__.lower()}_weights_tf_dim_ordering_tf_kernels_notop.h5"
            raise InputError(
                f"ImageNet weights could not be downloaded ({' '.join(str(e).split())[:250]}); get {name} (Keras applications) "
                "where there is a network, and give its path: model.backbone.weights=FILE"
            ) from None
        return applications_tensors(network)
    if not Path(config.weights).is_file():
        raise InputError(f"{config.weights}: no such file")
    network = make(weights=None, **options)
    try:
        network.load_weights(config.weights)
    except OSError:
        raise InputError(f"{config.weights}: truncated, or not an HDF5 file") from None
    except Exception as e:  # ValueError, KeyError, AttributeError: HDF5, but not these layers
        reason = " ".join(str(e).split())[:150]
        raise InputError(f"{config.weights}: not the weights of {make.__name__} without top ({reason})") from None
    return applications_tensors(network)


def applications_tensors(network: tf_keras.Model) -> dict[str, np.ndarray]:
    """Tensors with torchvision's names that give our ResNet the features of a tf_keras.applications ResNet.

    Its images are BGR, ours RGB: the stem's kernel is turned round. Its convolutions have biases before BatchNorm, which
    take part of the moving mean here; its epsilon is 1.001e-5, ours 1e-5: the variances take the difference.
    """
    epsilon = 1e-5
    tensors = {}
    for layer in network.layers:
        if not layer.weights:
            continue
        # conv1_conv, conv1_bn; conv2_block1_0_conv is the shortcut of layer1.0, conv2_block1_1_conv its conv1.
        *place, kind = layer.name.split("_")
        if len(place) == 1:
            at, conv_name, norm_name = "", "conv1", "bn1"
        else:
            stage, block, number = int(place[0][4:]), int(place[1][5:]), place[2]
            at = f"layer{stage - 1}.{block - 1}."
            conv_name, norm_name = (f"conv{number}", f"bn{number}") if number != "0" else ("downsample.0", "downsample.1")
        values = [w.numpy().astype(np.float64) for w in layer.weights]
        if kind == "conv":
            kernel, bias = values
            tensors[f"{at}{conv_name}.weight"] = kernel[:, :, ::-1] if not at else kernel
            mean_shift = -bias
        else:
            gamma, beta, mean, variance = values
            tensors |= {f"{at}{norm_name}.weight": gamma, f"{at}{norm_name}.bias": beta}
            mean_shift = mean
            tensors[f"{at}{norm_name}.running_var"] = variance + (layer.epsilon - epsilon)
        name = f"{at}{norm_name}.running_mean"
        tensors[name] = tensors.get(name, 0.0) + mean_shift
    bad = [name for name, value in tensors.items() if not np.isfinite(value).all()]
    if bad:
        raise InputError(f"weights of {network.name}: values that are not finite in {summarize(bad)}")
    return {name: value.astype(np.float32) for name, value in tensors.items()}


def _load_garden(backbone: tf_keras.Model, path: str, kind: str) -> None:
    is_folder = Path(path).is_dir()
    with readable_by_tensorflow(Path(path) / "checkpoint" if is_folder else path.removesuffix(".index")) as prefix:
        prefix = tf.train.latest_checkpoint(Path(prefix).parent) if is_folder else prefix
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


def _check_stride(config: BackboneConfig, wanted: str) -> None:
    if config.block == "bottleneck" and config.stride_in != wanted:
        raise InputError(
            f"{config.weights}: weights of a network with its strides elsewhere: set model.backbone.stride_in: {wanted}"
        )


def _check_normalization(config: ModelConfig, wanted: tuple) -> None:
    given = (config.mean, config.std)
    if config.normalization != "fixed" or not np.allclose(given, wanted, rtol=0, atol=0.01):
        mean, std = (list(values) for values in wanted)
        raise InputError(
            f"{config.backbone.weights}: weights for images normalised otherwise: "
            f"set model.normalization: fixed, model.mean: {mean}, model.std: {std}"
        )


def _shape(value) -> str:
    return "x".join(map(str, value.shape))
