"""Feature pyramid: backbone features in, one feature map of equal depth a level out."""

from __future__ import annotations

import tensorflow as tf
import tf_keras

from polarmask_tf.config import FPNConfig
from polarmask_tf.modeling.layers import CONVS, Conv


class FPN(tf_keras.layers.Layer):
    """{level: C_level} to {level: P_level [B, h, w, channels]} for config.levels.

    Levels up to the backbone's last come from 1x1 laterals, nearest x2 top-down addition and 3x3 outputs; each level above
    is a 3x3 convolution of stride 2 on the one below it, with a ReLU between, as in FCOS. With config.conv: separable all
    3x3 convolutions are.
    """

    def __init__(self, config: FPNConfig, backbone_levels=(2, 3, 4, 5), **kwargs):
        super().__init__(**kwargs)
        init = "glorot_uniform"
        last = max(backbone_levels)
        conv = CONVS[config.conv]
        self.levels = config.levels
        # Laterals reach down from the backbone's last level even where P5 itself is not asked for.
        self.merged = [level for level in range(config.levels[0], last + 1)]
        self.laterals = {str(n): Conv(config.channels, 1, bias=True, init=init, name=f"lateral{n}") for n in self.merged}
        self.outputs = {
            str(n): conv(config.channels, 3, bias=True, init=init, name=f"output{n}")
            for n in self.merged if n in self.levels or (n == last and self.levels[-1] > last)
        }
        self.extras = {
            str(n): conv(config.channels, 3, 2, bias=True, init=init, name=f"extra{n}")
            for n in range(last + 1, self.levels[-1] + 1)
        }

    def call(self, features):
        top, pyramid = None, {}
        for level in reversed(self.merged):
            lateral = self.laterals[str(level)](features[level])
            top = lateral if top is None else lateral + _double(top)
            if str(level) in self.outputs:
                pyramid[level] = self.outputs[str(level)](top)
        x = pyramid.get(self.merged[-1])
        for level in self.extras:
            x = pyramid[int(level)] = self.extras[level](x if int(level) == self.merged[-1] + 1 else tf.nn.relu(x))
        return {level: pyramid[level] for level in self.levels}


def _double(x: tf.Tensor) -> tf.Tensor:
    """Nearest x2 by writing pixels and then rows twice.

    Unlike tf.image.resize to a dynamic size it has a gradient under XLA, and TFLite has builtins for all of it.
    """
    _, height, width, channels = x.shape
    batch, dynamic_height, dynamic_width, _ = tf.unstack(tf.shape(x))
    height, width = height or dynamic_height, width or dynamic_width
    x = tf.reshape(tf.concat([x, x], axis=3), [batch, height, 2 * width, channels])
    return tf.reshape(tf.concat([x, x], axis=2), [batch, 2 * height, 2 * width, channels])
