"""Feature pyramid: backbone features in, one feature map of equal depth a level out."""

from __future__ import annotations

import tensorflow as tf
import tf_keras

from polarmask_tf.config import FPNConfig, from_dict, to_dict
from polarmask_tf.errors import InputError
from polarmask_tf.modeling.layers import CONVS, PACKAGE, Conv


@tf_keras.saving.register_keras_serializable(PACKAGE)
class FPN(tf_keras.layers.Layer):
    """{level: C_level} to {level: P_level [B, h, w, channels]} for config.levels; levels are text, "3" of stride 8.

    Levels up to the backbone's last come from 1x1 laterals, nearest x2 top-down addition and 3x3 outputs; each level above
    is a 3x3 convolution of stride 2 on the one below it, with a ReLU between, as in FCOS. With config.conv: separable all
    3x3 convolutions are. Raises InputError where `backbone_levels` lack a level that is needed.
    """

    def __init__(self, config: FPNConfig, backbone_levels=(2, 3, 4, 5), **kwargs):
        super().__init__(**kwargs)
        last = max(backbone_levels)
        self.config, self.backbone_levels = config, tuple(backbone_levels)
        # Laterals reach down from the backbone's last level even where P5 itself is not asked for.
        merged = list(range(config.levels[0], last + 1))
        if not merged or not set(merged) <= set(backbone_levels):
            raise InputError(
                f"model.fpn.levels begin at {config.levels[0]}, and the backbone gives {sorted(backbone_levels)}: all levels "
                "from the first of the pyramid to the last of the backbone are needed"
            )
        conv, options = CONVS[config.conv], {"bias": True, "init": "glorot_uniform", "dtype": self.dtype_policy}
        outputs = [n for n in merged if n in config.levels or (n == last and config.levels[-1] > last)]
        extras = range(last + 1, config.levels[-1] + 1)
        self.laterals = {str(n): Conv(config.channels, 1, name=f"lateral{n}", **options) for n in merged}
        self.outputs = {str(n): conv(config.channels, 3, name=f"output{n}", **options) for n in outputs}
        self.extras = {str(n): conv(config.channels, 3, 2, name=f"extra{n}", **options) for n in extras}

    def call(self, features):
        features = {str(level): feature for level, feature in features.items()}
        top, pyramid = None, {}
        for level in reversed(self.laterals):
            lateral = self.laterals[level](features[level])
            top = lateral if top is None else lateral + _double(top)
            if level in self.outputs:
                pyramid[level] = self.outputs[level](top)
        x = pyramid.get(next(reversed(self.laterals)))
        for number, level in enumerate(self.extras):
            x = pyramid[level] = self.extras[level](tf.nn.relu(x) if number else x)
        return {str(level): pyramid[str(level)] for level in self.config.levels}

    def get_config(self):
        return {**super().get_config(), "config": to_dict(self.config), "backbone_levels": list(self.backbone_levels)}

    @classmethod
    def from_config(cls, config):
        return cls(from_dict(FPNConfig, config.pop("config")), **config)


def _double(x: tf.Tensor) -> tf.Tensor:
    """Nearest x2 by writing pixels and then rows twice.

    Unlike tf.image.resize to a dynamic size it has a gradient under XLA, and TFLite has builtins for all of it.
    """
    _, height, width, channels = x.shape
    batch, dynamic_height, dynamic_width, _ = tf.unstack(tf.shape(x))
    height, width = height or dynamic_height, width or dynamic_width
    x = tf.reshape(tf.concat([x, x], axis=3), [batch, height, 2 * width, channels])
    return tf.reshape(tf.concat([x, x], axis=2), [batch, 2 * height, 2 * width, channels])
