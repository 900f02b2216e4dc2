"""ops/placement.py finds the sides that lite.py finds, for pictures of every size, and fills the canvas as lite.py does."""

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from polarmask_tf import lite
from polarmask_tf.config import DataConfig
from polarmask_tf.inference.predictor import network_input
from polarmask_tf.ops import placement

FITS = ("letterbox", "stretch", "short_side")
SIZES = ((128, 128), (320, 320), (96, 160), (448, 608), (768, 1280))
SHORT_SIZES = ((400, 666), (600, 1000), (800, 1333), (48, 90), (33, 33))
sides = st.integers(1, 20_000)


def by_lite(height, width, size, fit, monkeypatch):
    """(scaled, canvas) as lite.py and the predictor have them, without the resizing."""
    with monkeypatch.context() as patch:
        patch.setattr(lite, "place", lambda image, filled, canvas: (filled, canvas))
        image = np.broadcast_to(np.uint8(0), (height, width, 3))
        return network_input(image, DataConfig(size=size, fit=fit))


@pytest.mark.parametrize("fit", FITS)
def test_sides_are_those_of_lite(fit, monkeypatch):
    @tf.function(input_signature=[tf.TensorSpec([2], tf.int32), tf.TensorSpec([2], tf.int32)])
    def fitted(source, size):
        return placement.fitted(source, size, fit)

    @settings(max_examples=400, deadline=None)
    @given(sides, sides, st.sampled_from(SHORT_SIZES if fit == "short_side" else SIZES))
    def check(height, width, size):
        scaled, canvas = (tuple(map(int, value)) for value in fitted([height, width], size))
        assert (scaled, canvas) == by_lite(height, width, size, fit, monkeypatch)

    check()
    for height in range(1, 400):  # halves, which rounding decides
        for width in (height, 2 * height - 1, 400 - height):
            size = (400, 666) if fit == "short_side" else (96, 160)
            scaled, canvas = (tuple(map(int, value)) for value in fitted([height, width], size))
            assert (scaled, canvas) == by_lite(height, width, size, fit, monkeypatch)


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("source", [(37, 61), (61, 37), (200, 90), (64, 64)])
def test_pixels_are_those_of_lite(fit, source):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (*source, 3), np.uint8)
    size = (48, 90) if fit == "short_side" else (96, 64)
    expected, (back_x, back_y) = network_input(image, DataConfig(size=size, fit=fit))
    canvas, filled = placement.resize(tf.constant(image[np.newaxis]), size, fit)
    assert canvas.shape[1:] == expected.shape and canvas.dtype == tf.uint8
    assert np.abs(canvas[0].numpy().astype(int) - expected).max() <= 1
    np.testing.assert_allclose(
        filled.numpy() * (expected.shape[1] * back_x, expected.shape[0] * back_y), source[::-1], rtol=1e-6
    )
