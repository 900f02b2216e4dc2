"""postprocess.detect against a plain NumPy implementation in float64."""

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from polarmask_tf.config import PostprocessConfig
from polarmask_tf.ops import postprocess

SIZE = (40, 56)
LEVELS = {3: (5, 7), 4: (3, 4)}
UNITS = {3: 8.0, 4: 16.0}
CLASSES, RAYS = 3, 8
DEFAULTS = vars(PostprocessConfig())


def sigmoid(x):
    return 1 / (1 + np.exp(-np.clip(np.asarray(x, np.float64), -700, 700)))


def random_outputs(rng, scale=2.0):
    return {
        level: {
            "class_logits": rng.normal(-1, scale, (*shape, CLASSES)).astype(np.float32),
            "centerness_logits": rng.normal(1, scale, (*shape, 1)).astype(np.float32),
            "ray_logits": rng.normal(0, 0.5, (*shape, RAYS)).astype(np.float32),
        }
        for level, shape in LEVELS.items()
    }


def slow_detect(
    outputs, *, score_threshold=0.05, pre_nms_top_k=1000, nms_iou_threshold=0.5, max_detections=100, multi_label=True
):
    """List of (score, class, polygon in pixels), and how near any decision was to going the other way."""
    found, margin = [], 1.0
    for level in sorted(outputs):
        classes, centerness, rays = (outputs[level][name] for name in ("class_logits", "centerness_logits", "ray_logits"))
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
        found += of_level[:pre_nms_top_k]
    found = sorted((d for d in found if d[0] > score_threshold), key=lambda d: -d[0])
    scores = np.array([d[0] for d in found])
    margin = min([margin, *np.abs(scores - score_threshold), *np.abs(np.diff(scores)) * 100])
    kept = []
    for detection in found:
        overlaps = [box_iou(detection[2], other[2]) for other in kept if other[1] == detection[1]]
        margin = min([margin, *(abs(o - nms_iou_threshold) for o in overlaps)])
        if len(kept) < max_detections and all(o <= nms_iou_threshold for o in overlaps):
            kept.append(detection)
    return kept, margin


def box_iou(a, b):
    low, high = np.maximum(a.min(0), b.min(0)), np.minimum(a.max(0), b.max(0))
    shared = np.prod(np.maximum(high - low, 0))
    areas = np.prod(np.ptp(a, axis=0)), np.prod(np.ptp(b, axis=0))
    return shared / (sum(areas) - shared) if min(areas) > 0 else 0.0


def detect(outputs, **options):
    tensors = tf.nest.map_structure(tf.constant, outputs)
    return {name: value.numpy() for name, value in postprocess.detect(tensors, SIZE, UNITS, **DEFAULTS | options).items()}


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
    st.integers(0, 2**32 - 1),
    st.booleans(),
    st.sampled_from([3, 10, 1000]),
    st.sampled_from([0.05, 0.3]),
    st.sampled_from([0.2, 0.5]),
    st.sampled_from([4, 60]),
)
def test_detect_equals_numpy(seed, multi_label, candidates, threshold, nms_iou, rows):
    outputs = random_outputs(np.random.default_rng(seed))
    options = {
        "score_threshold": threshold,
        "pre_nms_top_k": candidates,
        "nms_iou_threshold": nms_iou,
        "max_detections": rows,
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
            "class_logits": np.full((*shape, classes), -9, np.float32),
            "centerness_logits": np.full((*shape, 1), 9, np.float32),
            "ray_logits": np.zeros((*shape, RAYS), np.float32),
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
    outputs[3]["class_logits"][2, 3] = [2.0, -9, 3.0]
    found = detect(outputs)
    assert found["num_detections"] == 2  # the same polygon: NMS is per class
    assert found["detection_classes"][:2].tolist() == [2, 0]
    found = detect(outputs, multi_label=False)
    assert found["num_detections"] == 1 and found["detection_classes"][0] == 2
    check_contract(found, 100)


def test_overlapping_detections_of_one_class_are_suppressed_and_the_best_stays():
    outputs = quiet()
    outputs[3]["class_logits"][2, 3, 1], outputs[3]["class_logits"][2, 4, 1] = 2.0, 3.0  # radius 8, 8 apart: box IoU 1 / 3
    assert detect(outputs)["num_detections"] == 2
    found = detect(outputs, nms_iou_threshold=0.3)
    assert found["num_detections"] == 1
    assert found["detection_scores"][0] == pytest.approx(sigmoid(3) * sigmoid(9), rel=1e-5)
    # Center (36, 20), radius 8, as ymin, xmin, ymax, xmax of 40 x 56.
    np.testing.assert_allclose(found["detection_boxes"][0], [12 / 40, 28 / 56, 28 / 40, 44 / 56], rtol=1e-5)


def test_candidates_are_counted_per_level():
    outputs = quiet()
    outputs[3]["class_logits"][...] = np.random.default_rng(0).uniform(2, 3, outputs[3]["class_logits"].shape)
    outputs[4]["class_logits"][0, 0, 0] = 0.0
    for maps in outputs.values():
        maps["ray_logits"][...] = -3.0  # small: nothing overlaps
    found = detect(outputs, pre_nms_top_k=2)
    assert found["num_detections"] == 3  # two of level 3, and level 4's although many of level 3 score higher
    assert found["detection_scores"][2] == pytest.approx(0.5, rel=1e-3)


def test_a_threshold_score_itself_is_dropped():
    outputs = quiet()
    outputs[3]["class_logits"][0, 0, 0], outputs[3]["centerness_logits"][0, 0] = 0.0, 200.0
    assert detect(outputs, score_threshold=0.5)["num_detections"] == 0
    assert detect(outputs, score_threshold=0.4999)["num_detections"] == 1


def test_many_classes_do_not_meet_in_nms():
    """80 detections of 80 classes with one and the same box, on an image large enough to cost the offsets their digits."""
    maps = {
        7: {
            "class_logits": np.full((8, 11, 80), -9, np.float32),
            "centerness_logits": np.full((8, 11, 1), 9, np.float32),
            "ray_logits": np.zeros((8, 11, 36), np.float32),
        }
    }
    maps[7]["class_logits"][4, 5] = np.linspace(3, 4, 80)
    maps[7]["class_logits"][4, 6] = np.linspace(1, 2, 80)  # box IoU 1 / 3 with it
    found = postprocess.detect(
        tf.nest.map_structure(tf.constant, maps), (1024, 1333), {7: 128.0}, **DEFAULTS | {"max_detections": 200}
    )
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
    graph = tf.function(lambda maps: postprocess.detect(maps, SIZE, UNITS, **DEFAULTS | {"max_detections": 7}))
    structure = tf.nest.map_structure(lambda v: tf.TensorSpec(v.shape, tf.float32), quiet())
    shapes = {name: tuple(v.shape) for name, v in graph.get_concrete_function(structure).structured_outputs.items()}
    assert shapes == {
        "num_detections": (),
        "detection_scores": (7,),
        "detection_classes": (7,),
        "detection_boxes": (7, 4),
        "detection_polygons": (7, RAYS, 2),
    }


# ---- the box branch, and the released code's way


def test_rays_are_cut_at_the_box():
    """One detection of 8 rays of 10 pixels; its box reaches 4 left, 100 up, 6 right and 5 down."""
    outputs = quiet()
    outputs[3]["class_logits"][2, 3, 1] = 5.0
    outputs[3]["ray_logits"][2, 3] = np.log(10 / 8)
    for level, maps in outputs.items():
        maps["ltrb_logits"] = np.zeros((*LEVELS[level], 4), np.float32)
    outputs[3]["ltrb_logits"][2, 3] = np.log(np.float32([4, 100, 6, 5]) / 8)
    found = detect(outputs, max_detections=1)
    # The diagonal ones, 7.07 in x and y, keep their direction: both shrink to where the nearer side is met.
    expected = np.add([28, 20], [[6, 0], [5, 5], [0, 5], [-4, 4], [-4, 0], [-4, -4], [0, -10], [6, -6]])
    np.testing.assert_allclose(found["detection_polygons"][0] * SIZE[::-1], expected, atol=1e-4)
    check_contract(found, 1)


def released_detect(outputs, threshold, candidates, iou, rows, box_nms):
    """The released rules, one class at a time: [(score, class, polygon, box)], and how near a decision was to the other."""
    pairs, margin = [], 1.0
    for level in sorted(outputs):
        maps = outputs[level]
        scores, centerness = sigmoid(maps["class_logits"]), sigmoid(maps["centerness_logits"])[..., 0]
        best = (scores.max(-1) * centerness).ravel()
        order = np.argsort(-best, kind="stable")
        if len(order) > candidates:
            margin = min(margin, best[order[candidates - 1]] - best[order[candidates]])
        for index in order[:candidates]:
            i, j = np.unravel_index(index, centerness.shape)
            center = np.array([(j + 0.5) * 2**level, (i + 0.5) * 2**level])
            angles = 2 * np.pi * np.arange(RAYS) / RAYS
            lengths = UNITS[level] * np.exp(maps["ray_logits"][i, j].astype(np.float64))
            last = np.array([SIZE[1] - 1, SIZE[0] - 1])
            polygon = (center + lengths[:, None] * np.stack([np.cos(angles), np.sin(angles)], 1)).clip(0, last)
            left, top, right, bottom = UNITS[level] * np.exp(maps["ltrb_logits"][i, j].astype(np.float64))
            box = np.array([center - (left, top), np.add(center, (right, bottom))]).clip(0, last)
            box = box if box_nms else np.array([polygon.min(0), polygon.max(0)])
            for c in range(CLASSES):
                margin = min(margin, abs(scores[i, j, c] - threshold))
                if scores[i, j, c] > threshold:
                    pairs.append((scores[i, j, c] * (centerness[i, j] + 0.5), c, polygon, box))
    kept = []
    for c in range(CLASSES):
        rest = sorted((p for p in pairs if p[1] == c), key=lambda p: -p[0])
        while rest:
            kept.append(rest.pop(0))
            overlaps = [box_iou(kept[-1][3] + [[0, 0], [1, 1]], p[3] + [[0, 0], [1, 1]]) for p in rest]
            margin = min([margin, *(abs(o - iou) for o in overlaps)])
            rest = [p for p, overlap in zip(rest, overlaps, strict=True) if overlap < iou]
    kept.sort(key=lambda p: -p[0])
    margin = min([margin, *np.abs(np.diff([p[0] for p in kept])) * 100])
    return kept[:rows], margin


@settings(max_examples=30, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.booleans(),
    st.sampled_from([5, 1000]),
    st.sampled_from([0.05, 0.3]),
    st.sampled_from([4, 80]),
)
def test_the_released_way_equals_numpy(seed, box_nms, candidates, threshold, rows):
    rng = np.random.default_rng(seed)
    outputs = random_outputs(rng, scale=1.5)
    for level, maps in outputs.items():
        maps["ltrb_logits"] = rng.normal(0, 0.5, (*LEVELS[level], 4)).astype(np.float32)
    expected, margin = released_detect(outputs, threshold, candidates, 0.5, rows, box_nms)
    assume(margin > 1e-4)
    if not box_nms:
        for maps in outputs.values():
            del maps["ltrb_logits"]
    found = detect(
        outputs,
        score_threshold=threshold,
        pre_nms_top_k=candidates,
        max_detections=rows,
        centerness_offset=0.5,
        class_threshold=True,
        box_nms=box_nms,
        suppress_equal=True,
        whole_pixels=True,
    )
    n = len(expected)
    assert found["num_detections"] == n
    np.testing.assert_allclose(found["detection_scores"][:n], [d[0] for d in expected], rtol=1e-5)
    np.testing.assert_array_equal(found["detection_classes"][:n], [d[1] for d in expected])
    polygons, boxes = (np.reshape([d[i] for d in expected], (-1, k, 2)) for i, k in ((2, RAYS), (3, 2)))
    np.testing.assert_allclose(found["detection_polygons"][:n] * SIZE[::-1], polygons, atol=1e-3)
    np.testing.assert_allclose(found["detection_boxes"][:n, [1, 0, 3, 2]] * (SIZE[::-1] * 2), boxes.reshape(-1, 4), atol=1e-3)


def test_suppression_at_the_threshold_itself():
    """Two boxes with an IoU of exactly 1 / 2: 6 x 8 and 12 x 8, within each other."""
    outputs = quiet()
    for level, maps in outputs.items():
        maps["ltrb_logits"] = np.full((*LEVELS[level], 4), -9, np.float32)
    for column, score, sides in ((2, 3.0, [0, 4, 6, 4]), (3, 2.0, [8, 4, 4, 4])):
        outputs[3]["class_logits"][2, column, 0] = score
        outputs[3]["ltrb_logits"][2, column] = np.log(np.maximum(np.float32(sides), 1e-3) / 8)
    outputs[3]["ltrb_logits"][2, 2, 0] = -10.0
    shared = {"class_threshold": True, "box_nms": True}
    boxes = detect(outputs, **shared)["detection_boxes"][:2, [1, 0, 3, 2]] * (SIZE[::-1] * 2)
    np.testing.assert_allclose(boxes, [[20, 16, 26, 24], [20, 16, 32, 24]], atol=1e-2)
    assert detect(outputs, **shared, nms_iou_threshold=0.51)["num_detections"] == 2
    assert detect(outputs, **shared, nms_iou_threshold=0.49)["num_detections"] == 1


POST_VARIANTS = [(nms, equal) for nms in ("box", "mask") for equal in ("ge", "gt")]


@pytest.mark.parametrize(("nms", "equal"), POST_VARIANTS)
def test_detect_equals_the_released_post_processing(shared, nms, equal):
    golden = np.load(shared / "reference/golden/post_a_256x320.npz", allow_pickle=False)
    turn = (9 - np.arange(36)) % 36
    outputs = {}
    for index in range(5):
        maps = {name: golden[f"in/{name}{index}"][0].transpose(1, 2, 0) for name in ("cls", "ctr", "rays", "bbox")}
        outputs[3 + index] = {
            "class_logits": maps["cls"],
            "centerness_logits": maps["ctr"],
            "ray_logits": np.log(maps["rays"])[..., turn],
        }
        if nms == "box":
            outputs[3 + index]["ltrb_logits"] = np.log(maps["bbox"])
    found = postprocess.detect(
        tf.nest.map_structure(tf.constant, outputs),
        (256, 320),
        dict.fromkeys(outputs, 1.0),
        **DEFAULTS,
        centerness_offset=0.5,
        class_threshold=True,
        box_nms=nms == "box",
        suppress_equal=equal == "ge",
        whole_pixels=True,
    )
    found = {name: value.numpy() for name, value in found.items()}
    height, width = golden["ori_shape"]
    boxes, labels, masks = (golden[f"{nms}nms_{equal}/{name}"] for name in ("bboxes", "labels", "masks"))
    assert found["num_detections"] == len(labels) == 100
    np.testing.assert_array_equal(found["detection_classes"], labels)
    np.testing.assert_allclose(found["detection_scores"], boxes[:, 4], atol=1e-5)
    corners = found["detection_boxes"][:, [1, 0, 3, 2]] * [width, height, width, height]
    np.testing.assert_allclose(corners, boxes[:, :4], atol=1e-3)
    polygons = masks.transpose(0, 2, 1)[:, turn]
    np.testing.assert_allclose(found["detection_polygons"] * [width, height], polygons, atol=1e-3)
