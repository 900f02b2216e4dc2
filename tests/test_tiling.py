"""Tiles of a picture to polygons of the picture: with a predictor that sees exactly what lies in each tile."""

import dataclasses

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from polarmask_tf.data import tiles, windows
from polarmask_tf.errors import InputError
from polarmask_tf.inference.predictor import Predictor
from polarmask_tf.inference.tiling import merge, tiled

RAYS = 48
CLASSES = [{"name": "a", "category_id": 1}, {"name": "b", "category_id": 2}]


def with_vertices(ring, count):
    """The same outline with more vertices."""
    ring = list(map(np.asarray, ring))
    while len(ring) < count:
        lengths = [np.hypot(*(ring[(i + 1) % len(ring)] - p)) for i, p in enumerate(ring)]
        i = int(np.argmax(lengths))
        ring.insert(i + 1, (ring[i] + ring[(i + 1) % len(ring)]) / 2)
    assert len(ring) == count
    return np.array(ring, np.float32)


def in_tiles(shapes, classes, size, tile, overlap, wobble=0.0, rng=None):
    """What a predictor that knows the shapes finds in each tile: every piece, exactly cut, or moved by up to `wobble`."""
    rows, columns = tiles.grid(*size, tile, overlap)
    parts = []
    for y in rows:
        for x in columns:
            found = []
            for shape, label in zip(shapes, classes, strict=True):
                for ring in tiles.clip(shape - (x, y), min(tile, size[0]), min(tile, size[1])):
                    if len(ring) > 2 and np.ptp(ring, axis=0).min() > 1:
                        ring = with_vertices(ring, RAYS)
                        if wobble:
                            ring = np.clip(ring + rng.normal(0, wobble, 2), 0, tile).astype(np.float32)
                        found.append((ring, label))
            parts.append(
                {
                    "scores": np.linspace(0.9, 0.5, len(found), dtype=np.float32),
                    "classes": np.array([label for _, label in found], np.int32),
                    "polygons": np.array([ring for ring, _ in found], np.float32).reshape(-1, RAYS, 2),
                }
            )
    return parts, rows, columns


def iou_matrix(ones, others, size, scale=8):
    one, two = (
        coco_mask.frPyObjects([(np.float64(p) * scale).ravel() for p in polygons], size[0] * scale, size[1] * scale)
        for polygons in (ones, others)
    )
    return np.asarray(coco_mask.iou(one, two, [0] * len(others)))


def assert_each_once(shapes, classes, found, size, least=0.95):
    assert len(found["scores"]) == len(shapes)
    assert found["polygons"].dtype == np.float32 and found["polygons"].shape[1:] == (RAYS, 2)
    if not len(shapes):
        return
    ious = iou_matrix(found["polygons"], shapes, size)
    of = ious.argmax(axis=1)
    assert sorted(of.tolist()) == list(range(len(shapes)))
    assert ious.max(axis=1).min() >= least
    assert (found["classes"] == np.asarray(classes)[of]).all()
    assert (np.diff(found["scores"]) <= 0).all()
    np.testing.assert_array_equal(found["boxes"][:, :2], found["polygons"].min(axis=1))
    np.testing.assert_array_equal(found["boxes"][:, 2:], found["polygons"].max(axis=1))


@st.composite
def scenes(draw):
    """Discs, ellipses and stars that do not touch, anywhere in a picture, also beyond its border; of any size up to two tiles."""
    tile = draw(st.sampled_from([64, 80, 100]))
    overlap = draw(st.integers(8, tile * 3 // 4))
    size = draw(st.tuples(st.integers(40, 260), st.integers(40, 260)))
    shapes, classes, taken = [], [], []
    for _ in range(draw(st.integers(0, 7))):
        radius = draw(st.sampled_from([6, 12, 25, 60, 100]))
        # Often on a seam or on a corner of tiles.
        rows, columns = tiles.grid(*size, tile, overlap)
        places = [
            draw(st.one_of(st.floats(0, side), st.sampled_from([*starts, *(start + tile for start in starts)])))
            for side, starts in zip(size[::-1], (columns, rows), strict=True)
        ]
        center = np.clip(places, 0, size[::-1])
        if any(np.hypot(*(center - other)) < radius + reach + 4 for other, reach in taken):
            continue
        angle = 2 * np.pi * np.arange(24) / 24
        radii = np.full(24, float(radius))
        kind = draw(st.sampled_from(["disc", "ellipse", "star"]))
        if kind == "star":
            radii[::2] *= draw(st.floats(0.55, 0.8))
        shape = np.stack([np.cos(angle), np.sin(angle)], 1) * radii[:, None]
        if kind == "ellipse":
            shape[:, 1] *= draw(st.floats(0.4, 1))
        shape = tiles.clip(center + shape, *size)
        # Not what hardly reaches into the picture, nor what the border cuts in two.
        if len(shape) != 1 or np.ptp(shape[0], axis=0).min() < 4:
            continue
        taken.append((center, radius))
        shapes.append(shape[0])
        classes.append(draw(st.integers(0, 1)))
    return tile, overlap, size, shapes, classes


@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
@given(scenes())
def test_every_object_is_found_once_and_whole(scene):
    tile, overlap, size, shapes, classes = scene
    parts, rows, columns = in_tiles(shapes, classes, size, tile, overlap)
    assert_each_once(shapes, classes, merge(parts, rows, columns, tile, size), size)
