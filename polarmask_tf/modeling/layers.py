"""Convolution and norm as this package uses them."""

from __future__ import annotations

import tf_keras


class Conv(tf_keras.layers.Layer):
    """k x k convolution padded symmetrically by k // 2, whatever the stride, as the released models are.

    TensorFlow's own SAME padding puts the odd pixel of a strided convolution on the other side.
    """

    def __init__(
        self, filters: int, kernel: int, stride: int = 1, bias: bool = False, init="he_normal", bias_init="zeros", **kwargs
    ):
        super().__init__(**kwargs)
        pad = stride > 1 and kernel > 1
        self.pad = tf_keras.layers.ZeroPadding2D(kernel // 2) if pad else None
        self.conv = tf_keras.layers.Conv2D(
            filters, kernel, stride, "valid" if pad else "same", use_bias=bias,
            kernel_initializer=init, bias_initializer=bias_init, name="conv",
        )

    def call(self, x):
        return self.conv(x if self.pad is None else self.pad(x))


def norm(kind: str, channels: int, name: str | None = None) -> tf_keras.layers.Layer:
    """BatchNorm or GroupNorm ("batch", "group") with epsilon 1e-5, or nothing ("none").

    Groups hold at least 8 channels, as the 32 groups of the paper's 256 channels do.
    """
    if kind == "batch":
        return tf_keras.layers.BatchNormalization(epsilon=1e-5, momentum=0.97, name=name)
    if kind == "group":
        groups = max(g for g in range(1, max(1, min(32, channels // 8)) + 1) if channels % g == 0)
        return tf_keras.layers.GroupNormalization(groups, epsilon=1e-5, name=name)
    return tf_keras.layers.Activation("linear", name=name)
