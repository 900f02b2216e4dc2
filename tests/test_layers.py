"""modeling/layers.py: strided 1x1 convolutions, whose gradient in oneDNN writes outside its memory with few channels."""

import os
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf

from polarmask_tf.modeling.layers import Conv


@pytest.mark.parametrize("channels", (1, 4, 12, 15, 16, 20))
@pytest.mark.parametrize("size", [(16, 16), (7, 10)])
def test_a_strided_1x1_convolution_takes_every_other_pixel(channels, size):
    """Numbers and gradients against matrix products of every other pixel; numbers against TensorFlow's own operation too."""
    rng = np.random.default_rng(channels)
    layer, x = Conv(8, 1, 2), tf.constant(rng.normal(size=(2, *size, channels)), tf.float32)
    layer.build(x.shape)
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = layer(x)
        loss = tf.reduce_sum(tf.sin(y))
    found = tape.gradient(loss, [x, layer.conv.kernel])
    picked, kernel = x.numpy()[:, ::2, ::2].astype(np.float64), layer.conv.kernel.numpy()[0, 0].astype(np.float64)
    slope = np.cos(picked @ kernel)
    back = np.zeros(x.shape)
    back[:, ::2, ::2] = slope @ kernel.T
    np.testing.assert_allclose(y, picked @ kernel, atol=1e-5)
    np.testing.assert_allclose(y, tf.nn.conv2d(x, layer.conv.kernel, 2, "SAME"), atol=1e-5)
    np.testing.assert_allclose(found[0], back, atol=1e-5)
    np.testing.assert_allclose(found[1][0, 0], np.einsum("bijc,bijf->cf", picked, slope), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("kernel", "stride", "around"), [(6, 4, 1), (4, 2, 1), (8, 4, 2), (7, 2, 3), (3, 2, 1), (4, 4, 0)])
def test_how_a_strided_convolution_is_padded(kernel, stride, around):
    """By a loop over its windows: an even one reaches as far to the left of its stride x stride pixels as to the right."""
    rng = np.random.default_rng(kernel)
    layer, x = Conv(2, kernel, stride), rng.normal(size=(1, 16, 24, 3))
    y = layer(tf.constant(x, tf.float32)).numpy()
    if kernel % 2 == 0:
        assert stride - (kernel - around) == -around and y.shape == (1, 16 // stride, 24 // stride, 2)
    weights, padded = layer.conv.kernel.numpy(), np.pad(x, [(0, 0), (around, around), (around, around), (0, 0)])
    for row, column in np.ndindex(*y.shape[1:3]):
        window = padded[0, row * stride :, column * stride :][:kernel, :kernel]
        np.testing.assert_allclose(y[0, row, column], np.einsum("ijc,ijcf->f", window, weights), atol=1e-5)


MANY = """
import tensorflow as tf
from polarmask_tf.modeling.layers import Conv
for channels, filters, size in ((4, 8, 16), (12, 24, 16), (8, 8, 32)):
    layer, x = Conv(filters, 1, 2), tf.random.normal([1, size, size, channels])
    for _ in range(40):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x)
        gradients = tape.gradient(y, [x, *layer.trainable_variables])
        assert all(bool(tf.reduce_all(tf.math.is_finite(gradient))) for gradient in gradients)
"""


def test_a_batch_of_one_on_two_threads_ends_no_process():
    """TensorFlow's strided operation, trained on these shapes, ends in an abort on processors with AVX-512."""
    environment = {**os.environ, "TF_NUM_INTRAOP_THREADS": "2", "TF_ENABLE_ONEDNN_OPTS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", MANY], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("channels", (4, 16))
@pytest.mark.parametrize("size", [(16, 16), (7, 10), (None, None)])
def test_no_graph_has_a_strided_1x1_convolution(channels, size):
    layer = Conv(8, 1, 2)
    layer.build((None, *size, channels))
    graph = tf.function(layer).get_concrete_function(tf.TensorSpec((1, *size, channels))).graph
    [strides] = [list(op.get_attr("strides")) for op in graph.get_operations() if op.type == "Conv2D"]
    assert strides == [1, 1, 1, 1]
