"""Convolution and norm as this package uses them."""

from __future__ import annotations

import tensorflow as tf
import tf_keras

PACKAGE = "polarmask_tf"  # under which Keras' own files know our layers and models


@tf_keras.saving.register_keras_serializable(PACKAGE)
class Conv(tf_keras.layers.Layer):
    """k x k convolution padded symmetrically by k // 2, whatever the stride, as the released models are.

    TensorFlow's own SAME padding puts the odd pixel of a strided convolution on the other side. An even k is padded by half of
    what it exceeds an even stride by, so that it looks as far to either side of its stride x stride pixels. With `groups`,
    output channels are in as many equal runs, each of which sees its run of the input channels alone; the kernel is
    [k, k, input channels / groups, filters].
    """

    def __init__(
        self,
        filters: int,
        kernel: int,
        stride: int = 1,
        bias: bool = False,
        init="he_normal",
        bias_init="zeros",
        groups: int = 1,
        **kwargs,
    ):
        super().__init__(**kwargs)
        pad = stride > 1 and kernel > 1
        self.stride = stride
        around = kernel // 2 if kernel % 2 else (kernel - stride) // 2
        self.pad = tf_keras.layers.ZeroPadding2D(around) if pad else None
        make = tf_keras.layers.Conv2D if groups == 1 else GroupedConv2D
        self.conv = make(
            filters,
            kernel,
            stride if pad else 1,
            "valid" if pad else "same",
            use_bias=bias,
            kernel_initializer=init,
            bias_initializer=bias_init,
            groups=groups,
            dtype=self.dtype_policy,
            name="conv",
        )

    def call(self, x):
        if self.pad is not None:
            x = self.pad(x)
        elif self.stride > 1:
            x = every(x, self.stride)
        return self.conv(x)

    def get_config(self):
        conv = self.conv
        return {
            **super().get_config(),
            "filters": conv.filters,
            "kernel": conv.kernel_size[0],
            "stride": self.stride,
            "bias": conv.use_bias,
            "init": tf_keras.initializers.serialize(conv.kernel_initializer),
            "bias_init": tf_keras.initializers.serialize(conv.bias_initializer),
            "groups": conv.groups,
        }


def every(x: tf.Tensor, stride: int) -> tf.Tensor:
    """x[:, ::stride, ::stride] of [B, H, W, C]: what a 1x1 convolution of that stride sees.

    Chosen before a convolution of stride 1, since strided ones are wrong in places: oneDNN's gradient of one with fewer than
    16 channels writes outside its memory (TensorFlow 2.20, AVX-512, batch 1, several threads), and LiteRT's GPU delegate
    ignores the stride in 8 bits.
    """
    _, height, width, channels = x.shape
    if None in (height, width) or height % stride or width % stride:
        return x[:, ::stride, ::stride]
    # Whole runs of channels are copied so, where LiteRT would copy number by number.
    blocks = tf.reshape(x, [-1, stride, width // stride, stride * channels])
    chosen = tf.slice(blocks, [0, 0, 0, 0], [-1, 1, width // stride, channels])
    return tf.reshape(chosen, [-1, height // stride, width // stride, channels])


@tf_keras.saving.register_keras_serializable(PACKAGE)
class SeparableConv(tf_keras.layers.Layer):
    """A k x k convolution of each channel by itself, then a 1x1 convolution over the channels; padded as Conv is."""

    def __init__(self, filters: int, kernel: int, stride: int = 1, bias: bool = False, init="he_normal", **kwargs):
        super().__init__(**kwargs)
        self.pad = tf_keras.layers.ZeroPadding2D(kernel // 2) if stride > 1 else None
        self.depthwise = tf_keras.layers.DepthwiseConv2D(
            kernel,
            stride,
            "valid" if stride > 1 else "same",
            use_bias=False,
            depthwise_initializer="he_normal",
            dtype=self.dtype_policy,
            name="depthwise",
        )
        self.pointwise = tf_keras.layers.Conv2D(
            filters, 1, use_bias=bias, kernel_initializer=init, dtype=self.dtype_policy, name="pointwise"
        )

    def call(self, x):
        return self.pointwise(self.depthwise(x if self.pad is None else self.pad(x)))

    def get_config(self):
        deep, point = self.depthwise, self.pointwise
        return {
            **super().get_config(),
            "filters": point.filters,
            "kernel": deep.kernel_size[0],
            "stride": deep.strides[0],
            "bias": point.use_bias,
            "init": tf_keras.initializers.serialize(point.kernel_initializer),
        }


CONVS = {"dense": Conv, "separable": SeparableConv}


@tf_keras.saving.register_keras_serializable(PACKAGE)
class GroupedConv2D(tf_keras.layers.Conv2D):
    """Conv2D(groups=...) that trains on a CPU too, in a time that is bearable.

    TensorFlow 2.20 on CPU has grouped convolution, but neither its gradient nor its fusion with the BatchNorm that
    follows. Conv2D's own way round is XLA, whose gradient takes 17 CPU seconds for 512 channels in 64 groups at 2 x 32 x
    40; `grouped_conv2d` takes 0.05. One op a convolution is also what TFLite's CONV_2D and cuDNN take as it is.
    """

    def call(self, x):
        y = grouped_conv2d(x, tf.convert_to_tensor(self.kernel), self.strides, self.padding.upper())
        return tf.nn.bias_add(y, self.bias) if self.use_bias else y


def grouped_conv2d(x: tf.Tensor, kernel: tf.Tensor, strides, padding: str) -> tf.Tensor:
    """x [B, H, W, c], kernel [k, k, c / groups, filters], "SAME" or "VALID" padding: [B, h, w, filters]."""

    def forward(x, kernel):
        y = tf.nn.conv2d(x, kernel, strides, padding)
        # Does nothing, but between convolution and BatchNorm it keeps the graph optimiser from fusing the two, which
        # ends in "Fused conv implementation does not support grouped convolutions".
        return tf.ensure_shape(y, y.shape)

    if tf.config.list_logical_devices("GPU") and "CPU" not in x.device:
        return forward(x, kernel)  # which has a gradient there

    @tf.custom_gradient
    def on_cpu(x, kernel):
        return forward(x, kernel), lambda dy: _gradients_by_group(x, kernel, dy, strides, padding)

    return on_cpu(x, kernel)


def _gradients_by_group(x, kernel, dy, strides, padding):
    """Gradients of every group as an ordinary convolution.

    CPU time, measured for 64 groups at the sizes of C2 to C5 of a 256 x 320 image: as fast as dense convolutions of 2 to 8
    groups with zeros between them, but in C2; 4 times as fast as matrix products batched over groups.
    """
    groups = x.shape[-1] // kernel.shape[2]
    dxs, dkernels = [], []
    parts = (tf.split(value, groups, axis=3) for value in (x, kernel, dy))
    strides = [1, *strides, 1]
    for x_part, kernel_part, dy_part in zip(*parts, strict=True):
        dxs.append(
            tf.raw_ops.Conv2DBackpropInput(
                input_sizes=tf.shape(x_part), filter=kernel_part, out_backprop=dy_part, strides=strides, padding=padding
            )
        )
        dkernels.append(
            tf.raw_ops.Conv2DBackpropFilter(
                input=x_part, filter_sizes=tf.shape(kernel_part), out_backprop=dy_part, strides=strides, padding=padding
            )
        )
    return tf.concat(dxs, 3), tf.concat(dkernels, 3)


@tf_keras.saving.register_keras_serializable(PACKAGE)
class GroupNormalization(tf_keras.layers.GroupNormalization):
    """tf_keras' own, with the same variables and numbers, for [B, H, W, C], in float32 within.

    No tensor has more than four dimensions, which is all that LiteRT's GPU and NPU delegates take. Sums and products, since its
    8-bit kernels are slow at means and squares.
    """

    def call(self, x, training=None):
        values = tf.cast(x, tf.float32)
        # In training by rows: a GPU sums [B, H, W, C] over H and W at once with as few threads as there are sums, also in the
        # gradient of what is broadcast.
        zeros = tf.zeros([1, tf.shape(x)[1], 1, 1])

        def by_rows(each):
            return each + zeros if training else each

        centered = values - by_rows(self._group_mean(values, training))
        variance = self._group_mean(centered * centered, training)
        factor = by_rows(tf.cast(self.gamma, tf.float32) * tf.math.rsqrt(variance + self.epsilon))
        return tf.cast(centered * factor + tf.cast(self.beta, tf.float32), x.dtype)

    def _group_mean(self, values, by_rows):
        """[B, H, W, C] to [B, 1, 1, C]: of each channel its group's mean."""
        _, height, width, channels = values.shape
        size = tf.shape(values)
        count = (height or size[1]) * (width or size[2]) * (channels // self.groups)
        if by_rows:
            values = tf.reduce_sum(values, 2, keepdims=True)
        sums = tf.reshape(tf.reduce_sum(values, [1, 2], keepdims=True), [-1, 1, self.groups, channels // self.groups])
        means = tf.reduce_sum(sums, axis=3, keepdims=True) * (1.0 / tf.cast(count, tf.float32))
        return tf.reshape(tf.tile(means, [1, 1, 1, channels // self.groups]), [-1, 1, 1, channels])


def norm(kind: str, channels: int, **kwargs) -> tf_keras.layers.Layer:
    """A norm with epsilon 1e-5, or nothing ("none"); `kwargs` (name, dtype) go to the layer.

    "batch" has the statistics of a replica's own images, "sync" of all replicas' images; "frozen" is BatchNorm that stays
    as it was loaded, also in training; "group" is GroupNorm, whose groups hold at least 8 channels, as the 32 groups of
    the paper's 256 channels do.
    """
    if kind in ("batch", "sync", "frozen"):
        # A BatchNormalization that is not trainable uses its moving statistics, whatever it is told of training.
        return tf_keras.layers.BatchNormalization(
            epsilon=1e-5, momentum=0.97, synchronized=kind == "sync", trainable=kind != "frozen", **kwargs
        )
    if kind == "group":
        groups = max(g for g in range(1, max(1, min(32, channels // 8)) + 1) if channels % g == 0)
        return GroupNormalization(groups, epsilon=1e-5, **kwargs)
    return tf_keras.layers.Activation("linear", **kwargs)
