"""Polygon voting against crossings of a ray and a polygon computed one by one, and its place in `detect` and in files."""

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from polarmask_tf.config import load
from polarmask_tf.errors import InputError
from polarmask_tf.ops import geometry, postprocess, voting
from tests.helpers.polygons import hits
from tests.test_postprocess import DEFAULTS, random_outputs

RAYS = 36
WAYS = geometry.ray_directions(RAYS)


def ellipse(center, point, radii, turn=0.3, rays=RAYS):
    """Lengths of rays from `point` to an ellipse's border, by the quadratic formula."""
    angles = 2 * np.pi * np.arange(rays) / rays
    rotate = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]]) / np.reshape(radii, (2, 1))
    way, start = rotate @ [np.cos(angles), np.sin(angles)], rotate @ np.subtract(point, center)
    a, b, c = (way**2).sum(0), start @ way, start @ start - 1
    return (-b + np.sqrt(b * b - a * c)) / a


def vote(centers, rays, scores, chosen, threshold=0.5):
    centers, rays = np.float32(centers), np.float32(rays)
    boxes = geometry.ray_boxes(tf.constant(centers), tf.constant(rays))
    return voting.vote(centers, tf.constant(rays), boxes, np.float32(scores), np.int32(chosen), threshold).numpy()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_the_length_to_another_polygon_is_that_of_the_farthest_crossing(seed):
    rng = np.random.default_rng(seed)
    centers = np.float32([[50, 50], 50 + rng.uniform(-6, 6, 2)])
    radii = rng.uniform(15, 25, 2)
    rays = np.float32([ellipse((51, 49), center, radii) for center in centers] * rng.uniform(0.97, 1.03, (2, RAYS)))
    found = voting._lengths_to(centers[:1], rays[:1], centers[None, 1:], np.int32([[1]]), tf.constant(rays))[0, 0].numpy()
    polygon = centers[1] + rays[1][:, None] * WAYS
    edges = np.concatenate([polygon, np.roll(polygon, -1, 0)], 1)
    expected = [max(hits(centers[0], edges, way)) for way in WAYS.astype(np.float64)]
    np.testing.assert_allclose(found, expected, rtol=2e-3)


def test_opinions_that_agree_change_nothing_and_ones_that_err_each_another_way_get_better():
    rng, points = np.random.default_rng(0), np.float32([[60, 60], [68, 60], [60, 68], [52, 60]])
    true = np.float32([ellipse((61, 61), point, (30, 24)) for point in points])
    same = vote(points, true, [0.9, 0.8, 0.7, 0.6], [0])[0]
    np.testing.assert_allclose(same, true[0], rtol=0.01)  # chords of other polygons of the same ellipse
    noisy = true * rng.uniform(0.9, 1.1, true.shape)
    error = [np.abs(rays / true[0] - 1).mean() for rays in (noisy[0], vote(points, noisy, [0.9, 0.8, 0.7, 0.6], [0])[0])]
    assert error[1] < 0.7 * error[0]


def test_votes_count_by_score_and_only_the_best_four_of_those_that_overlap_have_one():
    circles = np.float32([10, 12, 11, 11, 11, 40])[:, None] * np.ones((1, RAYS), np.float32)
    centers = [[50, 50]] * 6  # the first and the second: an IoU of their boxes of 100 / 144
    found = vote(centers, circles, [0.9, 0.3, 0.1, 0.1, 0.05, 0.8], [0], 0.6)
    np.testing.assert_allclose(found[0], (0.9 * 10 + 0.3 * 12 + 0.1 * 11 + 0.1 * 11) / 1.4, rtol=1e-5)
    np.testing.assert_allclose(vote(centers, circles, [0.9, 0.3, 0.1, 0.1, 0.05, 0.8], [0], 0.7)[0], 11.75 / 1.15, rtol=1e-5)
    np.testing.assert_allclose(vote(centers, circles, [0.9, 0.3, 0.1, 0.1, 0.05, 0.8], [5])[0], 40, rtol=1e-6)
    assert np.isfinite(vote(centers, circles * 0, np.zeros(6), [0, 1])).all()


def detect(outputs, **options):
    maps = tf.nest.map_structure(tf.constant, outputs)
    return postprocess.detect(maps, (40, 56), {3: 8.0, 4: 16.0}, **DEFAULTS | options)


@pytest.mark.parametrize("multi_label", [True, False])
def test_scores_classes_and_their_order_stay_and_boxes_are_of_the_new_polygons(multi_label):
    outputs = random_outputs(np.random.default_rng(3))
    plain, voted = (detect(outputs, multi_label=multi_label, voting_iou_threshold=each) for each in (0.0, 0.3))
    for name in ("num_detections", "detection_scores", "detection_classes"):
        np.testing.assert_array_equal(plain[name], voted[name])
    polygons = voted["detection_polygons"].numpy()
    assert np.abs(polygons - plain["detection_polygons"]).max() > 0.01
    low, high = polygons.min(1), polygons.max(1)
    np.testing.assert_allclose(voted["detection_boxes"], np.concatenate([low[:, ::-1], high[:, ::-1]], 1), atol=1e-6)
    assert (polygons >= 0).all() and (polygons <= 1).all()


def test_a_detection_without_neighbours_keeps_its_polygon():
    outputs = random_outputs(np.random.default_rng(3))
    plain, voted = (detect(outputs, voting_iou_threshold=each) for each in (0.0, 1.0))
    for name, expected in plain.items():
        np.testing.assert_allclose(voted[name], expected, atol=2e-6)


@pytest.mark.parametrize("name, other", [("released_r50_1x", []), ("shapes", ["model.refine_channels=0", "model.rays=4"])])
def test_where_it_makes_no_sense_it_is_refused(name, other):
    with pytest.raises(InputError, match="voting_iou_threshold goes with"):
        load(name, [*other, "postprocess.voting_iou_threshold=0.7"])
