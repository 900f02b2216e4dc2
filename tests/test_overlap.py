"""Areas and IoUs of polygons against pycocotools' rasters; gradients against differences."""

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.polygons import HOLE, SQUARE, edges_of, iou, polar_star, raster, star
from polarmask_tf.ops import geometry, overlap, targets

SIZE = 64


def areas(lengths, rings, point, window=(SIZE, SIZE)):
    """overlap.areas of one polygon of ray lengths [n] around a point, against rings."""
    lengths, points = np.float32([lengths]), np.float32([point])
    directions = geometry.ray_directions(lengths.shape[1] * overlap.directions_per_ray(lengths.shape[1]))
    crossings = distances(points, edges_of(*rings, pad=80)[np.newaxis], directions)
    border = geometry.distance_to_border(points, np.float32([[0, 0, *window]]), directions)
    return overlap.areas(tf.constant(lengths), crossings, border)


def distances(points, edges, directions):
    crossings = geometry.crossings(points, edges, directions)
    return geometry.signed_distances(crossings, len(points), len(directions), targets.MOST_CROSSINGS)


def polygon(lengths, point):
    return np.asarray(geometry.assemble(np.float32(point), np.float32(lengths)), np.float64)


def masks(lengths, rings, point):
    return raster([polygon(lengths, point)], SIZE, SIZE), raster(rings, SIZE, SIZE)


def assert_equals_rasters(lengths, rings, point, tolerance):
    found = areas(lengths, rings, point)
    predicted, true = masks(lengths, rings, point)
    assert float(overlap.iou(found)[0]) == pytest.approx(iou(predicted, true), abs=tolerance)
    dice = 2 * (predicted & true).sum() / (predicted.sum() + true.sum())
    assert float(overlap.dice_loss(found)[0]) == pytest.approx(1 - dice, abs=tolerance)
    expected = [(predicted & true).sum() / 64, predicted.sum() / 64, true.sum() / 64]
    np.testing.assert_allclose([float(area[0]) for area in found], expected, rtol=0.05, atol=2)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**31), st.sampled_from([8, 18, 24, 36, 72]), st.floats(0.1, 0.8))
def test_equals_rasters_of_any_star(seed, rays, roughness):
    rng = np.random.default_rng(seed)
    point = rng.uniform(28, 36, 2)
    rings = [star(rng, rng.uniform(26, 38, 2), 22, 30, roughness)]
    lengths = rng.uniform(0.6, 1, rays) * 24
    assert_equals_rasters(lengths, rings, point, 0.025 if rays > 8 else 0.04)


@pytest.mark.parametrize("turn", [1, -1])
def test_holes_parts_and_orientation(turn):
    """From a point in the hole, and between two parts: rays enter and leave several times."""
    lengths = np.full(36, 12.0)
    for rings, point in (
        ([SQUARE, HOLE], (20, 20)),
        ([SQUARE, HOLE], (12, 12)),
        ([SQUARE, np.add(SQUARE, [24, 0])], (32, 20)),
        ([SQUARE, np.add(SQUARE, [24, 26])], (31, 31)),
    ):
        assert_equals_rasters(lengths, [np.asarray(ring)[::turn] for ring in rings], point, 0.02)


def test_by_hand():
    """A square of side 20 around its middle against one of side 10: 100 square pixels shared, IoU 1/4."""
    directions = geometry.ray_directions(360)
    small = 5 / np.abs(directions).max(axis=1)
    found = areas(small, [SQUARE], (20, 20))
    np.testing.assert_allclose([float(area[0]) for area in found], [100, 100, 400], rtol=1e-3)
    assert float(overlap.iou(found)[0]) == pytest.approx(0.25, abs=1e-3)
    assert float(overlap.dice_loss(found)[0]) == pytest.approx(1 - 200 / 500, abs=1e-3)
    twice = areas(4 * small, [SQUARE], (20, 20))
    assert float(twice.shared[0]) == pytest.approx(400, rel=1e-3)


def test_both_are_cut_at_the_pictures_border():
    """Around (50, 50) in a picture of 64 x 64, polygons that reach far beyond it on two sides."""
    directions = geometry.ray_directions(360)
    lengths = 30 / np.abs(directions).max(axis=1)  # a square from 20 to 80
    found = areas(lengths, [np.multiply(SQUARE, 3)], (50, 50))  # and one from 30 to 90
    np.testing.assert_allclose([float(area[0]) for area in found], [34**2, 44**2, 34**2], rtol=2e-3)


def test_what_is_not_seen_counts_nothing():
    found = areas(np.full(36, 5.0), [SQUARE], (50, 50))
    assert float(overlap.iou(found)[0]) == 0 and float(overlap.dice_loss(found)[0]) == 1
    empty = overlap.areas(tf.ones([2, 36]), tf.zeros([2, 72, 0]), tf.ones([2, 72]))
    np.testing.assert_array_equal(overlap.iou(empty), [0, 0])


@pytest.mark.parametrize("rays", [12, 36, 72])
def test_gradient_equals_differences(rays):
    rng = np.random.default_rng(3)
    rings, point = [SQUARE, HOLE, star(rng, (46, 44), 14, 12)], (32.0, 31.0)
    lengths = rng.uniform(6, 20, rays).astype(np.float32)
    x = tf.constant(lengths)

    def loss(values):
        return overlap.dice_loss(areas_of(values))[0]

    directions = geometry.ray_directions(rays * overlap.directions_per_ray(rays))
    crossings = distances(np.float32([point]), edges_of(*rings)[np.newaxis], directions)
    border = geometry.distance_to_border(np.float32([point]), np.float32([[0, 0, SIZE, SIZE]]), directions)

    def areas_of(values):
        return overlap.areas(values[tf.newaxis], crossings, border)

    with tf.GradientTape() as tape:
        tape.watch(x)
        value = loss(x)
    gradient = tape.gradient(value, x).numpy()
    assert np.isfinite(gradient).all() and np.abs(gradient).max() > 1e-4
    step = 0.02
    differences = [float(loss(x + step * unit) - loss(x - step * unit)) / (2 * step) for unit in np.eye(rays, dtype=np.float32)]
    np.testing.assert_allclose(gradient, differences, atol=2e-4)


def test_a_larger_fit_has_a_smaller_loss():
    """Descent by the gradient alone turns a random polygon into the true one."""
    rng = np.random.default_rng(0)
    ring = polar_star(rng, 32, 32, 24)
    directions = geometry.ray_directions(72)
    crossings = distances(np.float32([[32, 32]]), edges_of(ring)[np.newaxis], directions)
    border = tf.fill([1, 72], 32.0)
    logits = tf.Variable(tf.fill([1, 36], 2.0))
    for _ in range(300):
        with tf.GradientTape() as tape:
            found = overlap.areas(tf.exp(logits), crossings, border)
            loss = tf.reduce_sum(overlap.dice_loss(found))
        logits.assign_sub(2.0 * tape.gradient(loss, logits))
    predicted, true = masks(tf.exp(logits)[0].numpy(), [ring], (32, 32))
    assert iou(predicted, true) > 0.93


def test_eight_crossings_a_ray_are_enough():
    rng = np.random.default_rng(1)
    rings = [star(rng, (32, 32), 28, 30, 0.8)]
    points = np.float32(rng.uniform(24, 40, (20, 2)))
    directions = geometry.ray_directions(72)
    crossings = geometry.crossings(points, np.repeat(edges_of(*rings, pad=80)[np.newaxis], 20, 0), directions)
    border = geometry.distance_to_border(points, np.tile(np.float32([0, 0, SIZE, SIZE]), (20, 1)), directions)
    lengths = tf.constant(rng.uniform(5, 25, (20, 36)), tf.float32)
    whole, eight = (geometry.signed_distances(crossings, 20, 72, most) for most in (30, targets.MOST_CROSSINGS))
    assert eight.shape == (20, 72, 8) and np.count_nonzero(whole, axis=2).max() >= 5
    whole, eight = (overlap.iou(overlap.areas(lengths, kept, border)) for kept in (whole, eight))
    np.testing.assert_allclose(eight, whole, atol=1e-3)


def test_boxes_by_hand():
    """10 x 10 around (5, 5) against 10 x 20 that begins at the same corner."""
    found = overlap.box_areas(tf.constant([[5.0, 5.0, 5.0, 5.0]]), tf.constant([[5.0, 15.0, 5.0, 5.0]]))
    assert [float(area[0]) for area in found] == [100, 100, 200]
    assert float(overlap.iou(found)[0]) == 0.5
