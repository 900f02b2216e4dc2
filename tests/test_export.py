"""The exports' letterbox, and the comparison that `polarmask export` prints."""

import types

import numpy as np
import pytest

from polarmask_tf import lite
from polarmask_tf.export import parity, saved_model
from polarmask_tf.predict import Detections


@pytest.mark.parametrize("size", [(50, 120), (200, 90), (64, 96), (480, 640), (1, 1), (3, 2000), (33, 47)])
def test_the_graphs_letterbox_is_pillows(size):
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    canvas, filled = saved_model.letterbox(image[None], (64, 96))
    expected, (back_x, back_y) = lite.letterbox(image, 64, 96)
    assert np.abs(canvas[0].numpy().astype(int) - expected).max() <= 1
    np.testing.assert_allclose(filled, [size[1] / back_x / 96, size[0] / back_y / 64], rtol=1e-6)


def detections(*rows):
    """Squares of side 20 as (score, class, left)."""
    corners = np.array([[0, 0], [20, 0], [20, 20], [0, 20]], np.float32)
    polygons = np.array([corners + np.float32([left, 10]) for _, _, left in rows], np.float32).reshape(-1, 4, 2)
    boxes = np.concatenate([polygons.min(1), polygons.max(1)], 1) if rows else np.zeros((0, 4), np.float32)
    return Detections(np.float32([r[0] for r in rows]), np.int32([r[1] for r in rows]), boxes, polygons)


def test_compare_matches_by_class_and_overlap():
    image = np.zeros((50, 100, 3), np.uint8)
    a = detections((0.9, 0, 0), (0.8, 1, 50), (0.7, 0, 30))
    b = detections((0.85, 0, 3), (0.8, 0, 50), (0.7, 0, 30))
    row = parity.compare(lambda images: [a], lambda images: [b], [image])
    assert (row["detections"], row["matched"]) == (3, 2)
    assert row["score"] == pytest.approx(0.05, abs=1e-6) and row["pixels"] == pytest.approx(3)
    nothing = parity.compare(lambda images: [a], lambda images: [detections()], [image])
    assert (nothing["detections"], nothing["matched"]) == (3, 0)
    assert "saved_model" in parity.format_table({"saved_model": row})


def test_metadata_says_what_a_user_needs():
    from polarmask_tf import __version__, config

    model = types.SimpleNamespace(config=config.load("shapes"))
    found = saved_model.metadata(model, [{"name": "cat", "category_id": 17}])
    assert found["version"] == __version__ and found["classes"] == [{"name": "cat", "category_id": 17}]
    assert (found["input"]["height"], found["input"]["width"], found["rays"]) == (128, 128, 36)
