"""EfficientNet-Lite0: EfficientNet-B0 without squeeze-and-excitation and with ReLU6 for swish, which 8 bits keep.

Source: Tan and Le, "EfficientNet" (2019), table 1, and the notes to Google's EfficientNet-Lite (2020): the stem and the last
stage are not scaled. Layers have the names that the published weights give their tensors, see weights/pretrained.py.
"""

from __future__ import annotations

import tf_keras

from polarmask_tf.config import BackboneConfig
from polarmask_tf.errors import InputError

STEM = 32  # channels after the first convolution
# Of each stage: blocks, kernel of their depthwise convolution, stride of the first one, expansion, channels.
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
LEVEL_AFTER = {1: "2", 2: "3", 4: "4", 6: "5"}  # stage: the level that it is the last one of
EPSILON = 1e-3  # of BatchNorm, as it was trained with: with 1e-5 C5 is off by a fifth


def build(config: BackboneConfig, dtype=None, name: str = "backbone") -> tf_keras.Model:
    """Images [B, H, W, 3] to features {"2": C2, ..., "5": C5}, as resnet.ResNet; H and W multiples of 32.

    Features have 24, 40, 112 and 320 channels. Of config, norm (batch, sync, frozen) and freeze_at apply; `dtype` is a policy
    or its name. Padding is TensorFlow's SAME: after the image more than before it, where the stride is 2. Raises InputError
    for GroupNorm, and for a multiplier, which this one size has not.
    """
    if config.norm == "group":
        raise InputError(f"model.backbone.norm is group: {config.type} has BatchNorm; give batch, sync or frozen")
    if config.multiplier != 1:
        raise InputError(f"model.backbone.multiplier is {config.multiplier}: {config.type} has one size, of multiplier 1")
    layers = _Layers(config, dtype)
    images = tf_keras.Input((None, None, 3))
    x = stem = layers.norm(layers.conv(images, STEM, 3, 2, "conv_stem"), "bn0")
    features, number, channels = {}, 0, STEM
    for stage, (blocks, kernel, first_stride, expansion, out) in enumerate(STAGES):
        for block in range(blocks):
            stride = 1 if block else first_stride
            y = layers.block(x, f"blocks.{number}.", kernel, stride, channels * expansion, out)
            is_residual = stride == 1 and channels == out
            x = tf_keras.layers.Add(dtype=dtype, name=f"blocks.{number}.add")([x, y]) if is_residual else y
            number, channels = number + 1, out
        if stage in LEVEL_AFTER:
            features[LEVEL_AFTER[stage]] = x
    backbone = tf_keras.Model(images, features, name=name)
    if config.freeze_at:
        for layer in tf_keras.Model(images, stem if config.freeze_at == 1 else features[str(config.freeze_at)]).layers:
            layer.trainable = False
    return backbone


def _initializer():
    """As the original starts: by the number of a filter's outputs, of which a depthwise one has one."""
    return tf_keras.initializers.VarianceScaling(2.0, "fan_out", "untruncated_normal")


class _Layers:
    """The layers of one network, by its config."""

    def __init__(self, config: BackboneConfig, dtype):
        self.config, self.dtype = config, dtype

    def conv(self, x, filters: int, kernel: int, stride: int, name: str):
        return tf_keras.layers.Conv2D(
            filters, kernel, stride, "same", use_bias=False, kernel_initializer=_initializer(), dtype=self.dtype, name=name
        )(x)

    def depthwise(self, x, kernel: int, stride: int, name: str):
        return tf_keras.layers.DepthwiseConv2D(
            kernel, stride, "same", use_bias=False, depthwise_initializer=_initializer(), dtype=self.dtype, name=name
        )(x)

    def norm(self, x, name: str, relu: bool = True):
        kind = self.config.norm
        x = tf_keras.layers.BatchNormalization(
            epsilon=EPSILON,
            momentum=0.97,
            synchronized=kind == "sync",
            trainable=kind != "frozen",
            dtype=self.dtype,
            name=name,
        )(x)
        return tf_keras.layers.ReLU(6.0, dtype=self.dtype, name=f"{name}_relu6")(x) if relu else x

    def block(self, x, at: str, kernel: int, stride: int, inner: int, out: int):
        """1x1 to `inner` channels (unless these are there), depthwise, 1x1 to `out` channels without activation."""
        if inner != x.shape[-1]:
            x = self.norm(self.conv(x, inner, 1, 1, f"{at}expand_conv"), f"{at}bn0")
        x = self.norm(self.depthwise(x, kernel, stride, f"{at}depthwise_conv"), f"{at}bn1")
        return self.norm(self.conv(x, out, 1, 1, f"{at}project_conv"), f"{at}bn2", relu=False)
