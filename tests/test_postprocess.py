"""postprocess.detect against a plain NumPy implementation in float64."""

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from polarmask_tf import postprocess

SIZE = (40, 56)
LEVELS = {3: (5, 7), 4: (3, 4)}
UNITS = {3: 8.0, 4: 16.0}
CLASSES, RAYS = 3, 8


def sigmoid(x):
    return 1 / (1 + np.exp(-np.clip(np.asarray(x, np.float64), -700, 700)))


def random_outputs(rng, scale=2.0):
    return {
        level: {
            "classes": rng.normal(-1, scale, (*shape, CLASSES)).astype(np.float32),
            "centerness": rng.normal(1, scale, (*shape, 1)).astype(np.float32),
            "rays": rng.normal(0, 0.5, (*shape, RAYS)).astype(np.float32),
        }
        for level, shape in LEVELS.items()
    }


def slow_detect(outputs, *, score_threshold=0.05, candidates=1000, nms_iou=0.5, max_detections=100, multi_label=True):
    """List of (score, class, polygon in pixels), and how near any decision was to going the other way."""
    found, margin = [], 1.0
    for level in sorted(outputs):
        classes, centerness, rays = (outputs[level][name] for name in ("classes", "centerness", "rays"))
        of_level = []
        for i, j in np.ndindex(classes.shape[:2]):
            scores = sigmoid(classes[i, j]) * sigmoid(centerness[i, j])
            angles = 2 * np.pi * np.arange(RAYS) / RAYS
            lengths = UNITS[level] * np.exp(np.clip(rays[i, j].astype(np.float64), -10, 10))
            center = np.array([(j + 0.5) * 2**level, (i + 0.5) * 2**level])
            polygon = (center + lengths[:, None] * np.stack([np.cos(angles), np.sin(angles)], 1)).clip(0, [SIZE[1], SIZE[0]])
            for c in range(CLASSES) if multi_label else [int(np.argmax(classes[i, j]))]:
                of_level.append((scores[c], c, polygon))
        of_level.sort(key=lambda d: -d[0])
        found += of_level[:candidates]
    found = sorted((d for d in found if d[0] > score_threshold), key=lambda d: -d[0])
    scores = np.array([d[0] for d in found])
    margin = min([margin, *np.abs(scores - score_threshold), *np.abs(np.diff(scores)) * 100])
    kept = []
    for detection in found:
        overlaps = [box_iou(detection[2], other[2]) for other in kept if other[1] == detection[1]]
        margin = min([margin, *(abs(o - nms_iou) for o in overlaps)])
        if len(kept) < max_detections and all(o <= nms_iou for o in overlaps):
            kept.append(detection)
    return kept, margin


def box_iou(a, b):
    low, high = np.maximum(a.min(0), b.min(0)), np.minimum(a.max(0), b.max(0))
    shared = np.prod(np.maximum(high - low, 0))
    areas = np.prod(np.ptp(a, axis=0)), np.prod(np.ptp(b, axis=0))
    return shared / (sum(areas) - shared) if min(areas) > 0 else 0.0


def detect(outputs, **options):
    tensors = tf.nest.map_structure(tf.constant, outputs)
    return {name: value.numpy() for name, value in postprocess.detect(tensors, SIZE, UNITS, **options).items()}


def check_contract(found, rows, threshold=0.05, num_classes=CLASSES):
    """The output contract, whatever went in."""
    n = found["num_detections"]
    assert n.shape == () and n.dtype == np.int32 and 0 <= n <= rows
    scores, classes, boxes, polygons = (found[f"detection_{k}"] for k in ("scores", "classes", "boxes", "polygons"))
    assert (scores.shape, classes.shape, boxes.shape) == ((rows,), (rows,), (rows, 4))
    assert polygons.shape[0] == rows and polygons.shape[2] == 2
    assert (scores.dtype, classes.dtype, boxes.dtype, polygons.dtype) == (np.float32, np.int32, np.float32, np.float32)
    assert (np.diff(scores) <= 0).all() and (scores[:n] > threshold).all() and (scores <= 1).all()
    assert (classes[:n] >= 0).all() and (classes[:n] < num_classes).all()
    for values in (scores, boxes, polygons):
        assert np.isfinite(values).all() and (values >= 0).all() and (values <= 1).all()
        assert (values[n:] == 0).all()
    assert (classes[n:] == 0).all()
    low, high = polygons.min(axis=1)[:, ::-1], polygons.max(axis=1)[:, ::-1]
    np.testing.assert_allclose(boxes, np.concatenate([low, high], axis=1), atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(
    st.integers(0, 2**32 - 1), st.booleans(), st.sampled_from([3, 10, 1000]), st.sampled_from([0.05, 0.3]),
    st.sampled_from([0.2, 0.5]), st.sampled_from([4, 60]),
)
def test_detect_equals_numpy(seed, multi_label, candidates, threshold, nms_iou, rows):
    outputs = random_outputs(np.random.default_rng(seed))
    options = {
        "score_threshold": threshold, "candidates": candidates, "nms_iou": nms_iou, "max_detections": rows,
        "multi_label": multi_label,
    }
    expected, margin = slow_detect(outputs, **options)
    assume(margin > 1e-4)  # otherwise float32 may decide differently
    found = detect(outputs, **options)
    check_contract(found, rows, threshold)
    n = len(expected)
    assert found["num_detections"] == n
    np.testing.assert_allclose(found["detection_scores"][:n], [d[0] for d in expected], rtol=1e-5)
    np.testing.assert_array_equal(found["detection_classes"][:n], [d[1] for d in expected])
    polygons = np.reshape([d[2] for d in expected], (-1, RAYS, 2)) / (SIZE[1], SIZE[0])
    np.testing.assert_allclose(found["detection_polygons"][:n], polygons, atol=1e-5)


def quiet(classes=CLASSES):
    """Outputs in which nothing scores."""
    return {
        level: {
            "classes": np.full((*shape, classes), -9, np.float32),
            "centerness": np.full((*shape, 1), 9, np.float32),
            "rays": np.zeros((*shape, RAYS), np.float32),
        }
        for level, shape in LEVELS.items()
    }


def test_nothing_above_the_threshold():
    for multi_label in (True, False):
        found = detect(quiet(), multi_label=multi_label)
        check_contract(found, 100)
        assert found["num_detections"] == 0


def test_several_labels_at_one_location():
    outputs = quiet()
    outputs[3]["classes"][2, 3] = [2.0, -9, 3.0]
    found = detect(outputs)
    assert found["num_detections"] == 2  # the same polygon: NMS is per class
    assert found["detection_classes"][:2].tolist() == [2, 0]
    found = detect(outputs, multi_label=False)
    assert found["num_detections"] == 1 and found["detection_classes"][0] == 2
    check_contract(found, 100)


def test_overlapping_detections_of_one_class_are_suppressed_and_the_best_stays():
    outputs = quiet()
    outputs[3]["classes"][2, 3, 1], outputs[3]["classes"][2, 4, 1] = 2.0, 3.0  # radius 8, 8 apart: box IoU 1 / 3
    assert detect(outputs)["num_detections"] == 2
    found = detect(outputs, nms_iou=0.3)
    assert found["num_detections"] == 1
    assert found["detection_scores"][0] == pytest.approx(sigmoid(3) * sigmoid(9), rel=1e-5)
    # Center (36, 20), radius 8, as ymin, xmin, ymax, xmax of 40 x 56.
    np.testing.assert_allclose(found["detection_boxes"][0], [12 / 40, 28 / 56, 28 / 40, 44 / 56], rtol=1e-5)


def test_candidates_are_counted_per_level():
    outputs = quiet()
    outputs[3]["classes"][...] = np.random.default_rng(0).uniform(2, 3, outputs[3]["classes"].shape)
    outputs[4]["classes"][0, 0, 0] = 0.0
    for maps in outputs.values():
        maps["rays"][...] = -3.0  # small: nothing overlaps
    found = detect(outputs, candidates=2)
    assert found["num_detections"] == 3  # two of level 3, and level 4's although many of level 3 score higher
    assert found["detection_scores"][2] == pytest.approx(0.5, rel=1e-3)


def test_a_threshold_score_itself_is_dropped():
    outputs = quiet()
    outputs[3]["classes"][0, 0, 0], outputs[3]["centerness"][0, 0] = 0.0, 200.0
    assert detect(outputs, score_threshold=0.5)["num_detections"] == 0
    assert detect(outputs, score_threshold=0.4999)["num_detections"] == 1


def test_many_classes_do_not_meet_in_nms():
    """80 detections of 80 classes with one and the same box, on an image large enough to cost the offsets their digits."""
    maps = {7: {
        "classes": np.full((8, 11, 80), -9, np.float32),
        "centerness": np.full((8, 11, 1), 9, np.float32),
        "rays": np.zeros((8, 11, 36), np.float32),
    }}
    maps[7]["classes"][4, 5] = np.linspace(3, 4, 80)
    maps[7]["classes"][4, 6] = np.linspace(1, 2, 80)  # box IoU 1 / 3 with it
    found = postprocess.detect(tf.nest.map_structure(tf.constant, maps), (1024, 1333), {7: 128.0}, max_detections=200)
    found = {name: value.numpy() for name, value in found.items()}
    check_contract(found, 200, num_classes=80)
    assert found["num_detections"] == 160
    assert sorted(found["detection_classes"][:80].tolist()) == list(range(80))


wild = st.one_of(st.floats(-5, 5, width=32), st.sampled_from([np.inf, -np.inf, 1e30, -1e30, 1e4, -1e4, 88.0, 3e38]))


@settings(max_examples=40, deadline=None)
@given(st.lists(wild, min_size=12, max_size=12), st.integers(0, 2**32 - 1), st.booleans())
def test_extreme_and_infinite_logits_give_finite_polygons(values, seed, multi_label):
    rng = np.random.default_rng(seed)
    outputs = random_outputs(rng)
    for maps in outputs.values():
        for logits in maps.values():
            logits[...] = np.where(rng.random(logits.shape) < 0.3, rng.choice(np.float32(values), logits.shape), logits)
    check_contract(detect(outputs, multi_label=multi_label, max_detections=20), 20)


def test_detect_has_static_shapes_in_a_graph():
    """What a .tflite needs."""
    graph = tf.function(lambda maps: postprocess.detect(maps, SIZE, UNITS, max_detections=7))
    structure = tf.nest.map_structure(lambda v: tf.TensorSpec(v.shape, tf.float32), quiet())
    shapes = {name: tuple(v.shape) for name, v in graph.get_concrete_function(structure).structured_outputs.items()}
    assert shapes == {
        "num_detections": (), "detection_scores": (7,), "detection_classes": (7,), "detection_boxes": (7, 4),
        "detection_polygons": (7, RAYS, 2),
    }
