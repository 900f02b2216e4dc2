"""targets.py against a loop over all locations and instances, and against the released implementation's targets."""

from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.polygons import edges_of, hits, inside, star, unit_vectors
from polarmask_tf.data import contours
from polarmask_tf.ops import geometry, targets
from polarmask_tf.ops.targets import BACKGROUND, IGNORED

GOLDEN = Path(__file__).parent / "golden"
PUBLISHED = (64, 128, 256, 512)
LEVELS = (3, 4, 5, 6, 7)
TO_OURS = (9 - np.arange(36)) % 36  # our ray k is the released ray TO_OURS[k]
few = settings(max_examples=25, deadline=None)


def slow_locations(levels, size):
    """[(x, y, level)] row by row, level by level."""
    return [
        ((j + 0.5) * 2**level, (i + 0.5) * 2**level, level)
        for level in levels
        for i in range(int(np.ceil(size[0] / 2**level)))
        for j in range(int(np.ceil(size[1] / 2**level)))
    ]


def slow_owners(boxes, centers, valid, levels, size, radius, bounds):
    """Rules 1 to 3 of the released targets, one location and one instance at a time: a list of indices or -1."""
    bounds = [-1, *bounds, 1e8]
    owners = []
    for x, y, level in slow_locations(levels, size):
        candidates = []
        for index, ((x1, y1, x2, y2), (cx, cy)) in enumerate(zip(boxes, centers, strict=True)):
            reach = radius * 2**level
            in_square = max(cx - reach, x1) < x < min(cx + reach, x2) and max(cy - reach, y1) < y < min(cy + reach, y2)
            low, high = bounds[levels.index(level)], bounds[levels.index(level) + 1]
            if valid[index] and in_square and low <= max(x - x1, y - y1, x2 - x, y2 - y) <= high:
                candidates.append(((x2 - x1) * (y2 - y1), index))
        owners.append(min(candidates)[1] if candidates else -1)
    return owners


def owners_of(boxes, centers, valid=None, *, levels=LEVELS, size=(256, 384), radius=1.5, ranges=PUBLISHED):
    boxes, centers = np.float32(boxes), np.float32(centers)
    valid = np.ones(len(boxes), bool) if valid is None else np.array(valid)
    found = targets.assign(
        tf.constant(boxes[None]),
        tf.constant(centers[None]),
        tf.constant(valid[None]),
        levels=levels,
        size=size,
        radius=radius,
        ranges=ranges,
    )
    assert found.dtype == tf.int32
    return found.numpy()[0].tolist()


def instances_of(scenes, size, locations, rows=4, max_edges=24, ignore=None):
    """What the pipeline gives, from scenes [[(box, center, class, edges), ...], ...]."""
    batch = {
        "boxes": np.zeros((len(scenes), rows, 4), np.float32),
        "centers": np.zeros((len(scenes), rows, 2), np.float32),
        "classes": np.full((len(scenes), rows), -1, np.int32),
        "edges": np.zeros((len(scenes), rows, max_edges, 4), np.float32),
        "window": np.tile(np.float32(size[::-1]), (len(scenes), 1)),
        "ignore": np.zeros((len(scenes), locations), bool) if ignore is None else ignore,
    }
    for i, scene in enumerate(scenes):
        for j, values in enumerate(scene):
            for name, value in zip(("boxes", "centers", "classes", "edges"), values, strict=True):
                batch[name][i, j] = value
    return {name: tf.constant(value) for name, value in batch.items()}


# ---- which level


def test_level_ranges_by_hand():
    # The published bounds belong to 800 pixels on the shorter side; half of that halves them.
    assert targets.level_ranges(LEVELS, (800, 1333)) == [(-1, 64), (64, 128), (128, 256), (256, 512), (512, 1e8)]
    assert targets.level_ranges((3, 4, 5), (400, 600)) == [(-1, 32), (32, 64), (64, 1e8)]
    assert targets.level_ranges((2, 3), (1600, 800)) == [(-1, 32), (32, 1e8)]
    assert targets.level_ranges((3, 4, 5), (128, 128), (10, 20)) == [(-1, 10), (10, 20), (20, 1e8)]
    assert targets.level_ranges((5,), (128, 128)) == [(-1, 1e8)]


def test_unreachable_levels_by_hand():
    # No side of a box within 256 x 384 is longer than 384: P7 starts at 512, P6 at 256.
    assert targets.unreachable_levels(LEVELS, (256, 384), PUBLISHED) == [7]
    assert targets.unreachable_levels(LEVELS, (128, 128), PUBLISHED) == [5, 6, 7]
    assert targets.unreachable_levels(LEVELS, (128, 128)) == []  # scaled by default: 10, 20, 41, 82
    assert targets.unreachable_levels((3, 4), (64, 64), (63,)) == []


# ---- assign


@few
@given(st.integers(0, 2**32 - 1), st.sampled_from([(3, 4, 5), (2, 3), LEVELS]), st.sampled_from([0.4, 1.0, 1.5, 2.5]))
def test_assign_equals_a_loop(seed, levels, radius):
    """Coordinates in quarters: centers on cell borders, distances at the limits of ranges, equal areas all occur."""
    rng = np.random.default_rng(seed)
    size = (96, 130)
    corners = np.round(rng.uniform(-10, 140, (6, 2, 2)) * 4) / 4
    boxes = np.concatenate([corners.min(1), corners.max(1) + 1], axis=1)
    if rng.random() < 0.5:
        boxes[3] = boxes[2]  # a tie
    centers = np.round(rng.uniform(boxes[:, :2] - 4, boxes[:, 2:] + 4) * 4) / 4  # some outside their box
    valid = rng.random(6) < 0.8
    bounds = [8.0 * 2**i for i in range(1, len(levels))]
    expected = slow_owners(boxes, centers, valid, levels, size, radius, bounds)
    assert owners_of(boxes, centers, valid, levels=levels, size=size, radius=radius, ranges=bounds) == expected


def test_assign_keeps_the_images_of_a_batch_apart():
    rng = np.random.default_rng(0)
    low = rng.uniform(0, 40, (3, 5, 2))
    boxes = np.concatenate([low, low + rng.uniform(10, 50, (3, 5, 2))], axis=-1).astype(np.float32)
    centers = ((boxes[..., :2] + boxes[..., 2:]) / 2).astype(np.float32)
    valid = rng.random((3, 5)) < 0.7
    found = targets.assign(boxes, centers, valid, levels=(3, 4), size=(96, 96), ranges=(30,)).numpy()
    expected = [slow_owners(boxes[i], centers[i], valid[i], (3, 4), (96, 96), 1.5, (30,)) for i in range(3)]
    np.testing.assert_array_equal(found, expected)


def test_assign_by_hand():
    def cells(owners, columns):
        return [(i // columns, i % columns) for i, owner in enumerate(owners) if owner >= 0]

    options = {"levels": (3,), "size": (64, 64), "ranges": ()}
    # A center on a location: strictly within 12 pixels are 3 x 3 locations; 12 pixels off: 4 columns would need >=.
    assert len(cells(owners_of([[0, 0, 64, 64]], [[28, 28]], **options), 8)) == 9
    assert cells(owners_of([[0, 0, 64, 64]], [[32, 28]], **options), 8) == [(i, j) for i in (2, 3, 4) for j in (3, 4)]
    # Clipped to the box, strictly; a center outside its box reaches in as far as the square does.
    assert cells(owners_of([[20, 20, 28, 40]], [[24, 28]], **options), 8) == []
    assert cells(owners_of([[19, 20, 29, 40]], [[24, 28]], **options), 8) == [(3, 2), (3, 3), (4, 2), (4, 3)]
    assert cells(owners_of([[30, 30, 50, 50]], [[26, 40]], **options), 8) == [(4, 4), (5, 4)]
    # The smallest box wins; of equals the first; padding never does.
    boxes, centers = [[0, 0, 64, 64], [8, 8, 56, 56], [8, 8, 56, 56]], [[28, 28]] * 3
    assert set(owners_of(boxes, centers, **options)) == {-1, 1}
    assert set(owners_of(boxes, centers, [True, False, True], **options)) == {-1, 2}
    assert set(owners_of(boxes, centers, [False] * 3, **options)) == {-1}


@pytest.mark.parametrize(
    ("box", "center", "bound", "location"),
    [
        ([4, 4, 32, 32], [12, 12], 20, 5),  # P3's location (12, 12): the far side is 20 away
        ([0, 0, 16, 16], [8, 8], 8, 16),  # P4's location (8, 8): all sides are 8 away
    ],
)
def test_range_limits_are_inclusive(box, center, bound, location):
    def positives(bound):
        owners = owners_of([box], [center], levels=(3, 4), size=(32, 32), radius=0.4, ranges=(bound,))
        return [i for i, owner in enumerate(owners) if owner == 0]

    outside = bound - 0.5 if location < 16 else bound + 0.5
    assert location in positives(bound) and location not in positives(outside)


# ---- encode


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_encode_equals_a_loop(seed):
    rng = np.random.default_rng(seed)
    size, levels, bounds, n = (64, 96), (3, 4), (30,), 8
    everywhere = slow_locations(levels, size)
    scenes = []
    for _ in range(3):
        rings = [star(rng, rng.uniform(15, 60, 2), rng.uniform(8, 40), 12) for _ in range(rng.integers(0, 5))]
        scenes.append(
            [(box_of(ring, size), ring.mean(0).clip(0, [96, 64]), rng.integers(0, 5), edges_of(ring, pad=24)) for ring in rings]
        )
    ignore = rng.random((3, len(everywhere))) < 0.3
    found = targets.encode(
        instances_of(scenes, size, len(everywhere), ignore=ignore), rays=n, levels=levels, size=size, ranges=bounds
    )
    positives, lengths = [], []
    for image, scene in enumerate(scenes):
        boxes, centers = np.float32([s[0] for s in scene]), np.float32([s[1] for s in scene])
        owners = slow_owners(boxes, centers, [True] * len(scene), levels, size, 1.5, bounds)
        elsewhere = np.where(ignore[image], IGNORED, BACKGROUND)
        labels = [scene[owner][2] if owner >= 0 else other for owner, other in zip(owners, elsewhere, strict=True)]
        np.testing.assert_array_equal(found.labels[image], labels)
        for location, owner in enumerate(owners):
            if owner >= 0:
                positives.append((image, location))
                lengths.append(windowed_rays(everywhere[location][:2], scene[owner][3], n, size))
    np.testing.assert_array_equal(found.positives, np.reshape(positives, (-1, 2)))
    lengths = np.reshape(lengths, (-1, n))
    np.testing.assert_allclose(found.rays, lengths, rtol=1e-4, atol=2e-3)
    np.testing.assert_allclose(found.centerness, np.sqrt(lengths.min(1, initial=1e9) / lengths.max(1, initial=1e-9)), atol=1e-3)


def box_of(ring, size):
    return np.clip([*ring.min(0), *ring.max(0)], 0, [size[1], size[0]] * 2)


def windowed_rays(point, edges, n, size):
    """The farthest visible contour in each direction, float64."""
    found = []
    for d in unit_vectors(n):
        lines = ((0, 0), (0, size[1]), (1, 0), (1, size[0]))
        leave = min((limit - point[axis]) / d[axis] for axis, limit in lines if (limit - point[axis]) * d[axis] > 1e-9)
        within = inside(np.add(point, np.multiply(d, leave - 1e-5)), edges)
        found.append(leave if within else max([*(t for t in hits(point, edges, d) if t <= leave), 1e-6]))
    return found


def test_encode_without_any_instance():
    locations = len(slow_locations(LEVELS, (64, 64)))
    ignore = np.zeros((2, locations), bool)
    ignore[1, 5] = True
    found = targets.encode(instances_of([[], []], (64, 64), locations, ignore=ignore), rays=36, levels=LEVELS, size=(64, 64))
    assert found.positives.shape == (0, 2) and found.rays.shape == (0, 36) and found.centerness.shape == (0,)
    expected = np.full((2, locations), BACKGROUND)
    expected[1, 5] = IGNORED
    np.testing.assert_array_equal(found.labels, expected)


def test_positives_within_a_crowd_stay_positive():
    ring = np.array([[10, 10], [50, 10], [50, 50], [10, 50]])
    scene = [([10, 10, 50, 50], [30, 30], 2, edges_of(ring, pad=24))]
    found = targets.encode(
        instances_of([scene], (64, 64), 64, ignore=np.ones((1, 64), bool)), rays=4, levels=(3,), size=(64, 64), ranges=()
    )
    assert sorted(set(found.labels.numpy()[0])) == [IGNORED, 2]
    assert (found.labels.numpy() == 2).sum() == len(found.positives)


# ---- the released implementation


def check_golden(boxes, centers, classes, golden_labels, golden_positives, points):
    """Labels and positives must be equal. Their area is (w + 1)(h + 1) of boxes that end on the last pixel: as theirs end
    there too, only the order of areas matters, and adding a pixel to both sides keeps it in these scenes."""
    np.testing.assert_array_equal(np.concatenate([geometry.locations(256, 384, 2**level) for level in LEVELS]), points)
    owners = np.array(owners_of(boxes, centers))
    np.testing.assert_array_equal(np.flatnonzero(owners >= 0), golden_positives)
    np.testing.assert_array_equal(np.where(owners >= 0, np.array(classes)[owners], 0), golden_labels)


SHAPES = np.load(GOLDEN / "targets_shapes.npz", allow_pickle=False)
CONVEX = ["circle", "rectangle", "thin_ellipse", "small_r5", "corner", "full_image"]


@pytest.mark.parametrize("name", SHAPES["names"].tolist())
def test_labels_and_positives_equal_the_released_ones(name):
    labels = SHAPES[f"{name}/labels"]
    box, center, positives = (SHAPES[f"{name}/{key}"] for key in ("box", "center", "pos_inds"))
    check_golden([box], [center], [labels.max()], labels, positives, SHAPES["points"])


def test_labels_and_positives_of_a_scene_equal_the_released_ones():
    golden = np.load(GOLDEN / "targets_mixed.npz", allow_pickle=False)
    check_golden(
        golden["boxes"], golden["centers"], golden["gt_labels"], golden["labels"], golden["pos_inds"], golden["points"]
    )


def released_degrees(contour, point):
    """Whole degrees of contour pixels from a point, as the released code cuts them."""
    dx, dy = (contour - point).T.astype(np.float64)
    return (np.degrees(np.arctan2(dx, dy)) % 360).astype(int)


@pytest.mark.parametrize("name", CONVEX)
def test_exact_rays_of_convex_shapes_are_the_released_ones_to_a_pixel(name):
    """A released ray is the farthest contour pixel whose angle, cut to a degree, is the ray's: so it lies between the
    exact rays of that degree. Rays with no pixel in their degree are looked up beside it there, or are 1e-6."""
    contour, positives = SHAPES[f"{name}/contour"], SHAPES[f"{name}/pos_inds"]
    edges = np.concatenate([contour, np.roll(contour, -1, axis=0)], axis=1).astype(np.float32)
    compared = close = 0
    for point, golden in zip(SHAPES["points"][positives], SHAPES[f"{name}/ray_targets_pos"], strict=True):
        # Every half degree; released degree a = ours 90 - a.
        exact = geometry.ray_lengths(tf.constant(point[None]), tf.constant(edges[None]), 720)[0].numpy()
        degrees = set(released_degrees(contour, point))
        for a, length in zip(range(0, 360, 10), golden, strict=True):
            if a in degrees:
                within = exact[[(2 * (90 - a) - half) % 720 for half in range(3)]]
                assert within.min() - 1.5 <= length <= within.max() + 1.5, (point, a)
                compared += 1
                close += abs(within[0] - length) <= 1.5
            elif length == np.float32(1e-6):
                assert not degrees & {(a + d) % 360 for d in ((0, 1, 2, 3) if a == 0 else range(-3, 4))}
    assert compared > 5
    # Far walls seen at a slant change by more than 1.5 pixels a degree.
    assert close / compared > (0.8 if name in ("full_image", "thin_ellipse") else 0.95)


# ---- the paper's other options


def one_instance(box, center, edges, size=(256, 384)):
    locations = sum(-(-size[0] // 2**level) * -(-size[1] // 2**level) for level in LEVELS)
    return instances_of([[(box, center, 0, edges)]], size, locations, rows=1, max_edges=len(edges))


def test_four_rays_reach_the_box_and_cartesian_centerness_is_of_the_box():
    triangle = edges_of(np.float32([[40, 40], [80, 50], [50, 100]]), pad=3)
    instances = one_instance((40, 40, 80, 100), (56, 63), triangle)
    found = targets.encode(instances, rays=4, levels=LEVELS, size=(256, 384), ranges=PUBLISHED, centerness="cartesian")
    points = slow_locations(LEVELS, (256, 384))
    assert len(found.positives) > 3
    for (_, location), rays, box, quality in zip(*(t.numpy() for t in found[1:3]), found.ltrb, found.centerness, strict=True):
        x, y, _ = points[location]
        left, top, right, bottom = x - 40, y - 40, 80 - x, 100 - y
        np.testing.assert_allclose(box, [left, top, right, bottom])
        np.testing.assert_allclose(rays, [right, bottom, left, top])
        expected = min(left, right) / max(left, right) * min(top, bottom) / max(top, bottom)
        np.testing.assert_allclose(quality, np.sqrt(expected), rtol=1e-5)
    polar = targets.encode(instances, rays=36, levels=LEVELS, size=(256, 384), ranges=PUBLISHED)
    np.testing.assert_array_equal(polar.positives, found.positives)
    assert np.abs(polar.centerness - found.centerness).max() > 0.05


def test_sizes_may_be_tensors():
    triangle = edges_of(np.float32([[40, 40], [80, 50], [50, 100]]), pad=3)
    instances = one_instance((40, 40, 80, 100), (56, 63), triangle)
    options = {"rays": 8, "levels": LEVELS, "ranges": PUBLISHED}
    graph = tf.function(lambda height, width: targets.encode(instances, size=(height, width), **options))
    for mine, fixed in zip(graph(256, 384), targets.encode(instances, size=(256, 384), **options), strict=True):
        np.testing.assert_allclose(mine, fixed, rtol=1e-6)  # a graph multiplies by reciprocals


def released_instance(mask):
    """From a mask by way of our polygons, as `convert` and the pipeline do it: box, center and edges in our coordinates."""
    ring = max(contours.trace(mask), key=contours.shoelace)
    edges = np.concatenate([ring, np.roll(ring, -1, axis=0)], axis=1).astype(np.float32)
    ys, xs = np.nonzero(mask)
    box = np.float32([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])
    return box, geometry.area_and_centroid(tf.constant(edges))[1].numpy(), edges


# Where our centers, cut to integers, are not the released ones, and why: rounding puts the released sum just below an
# integer that it is exactly; its contour runs half a pixel inside of ours; of equal parts it takes the other.
ROUNDED = {"circle", "c_shape_center_outside", "donut", "small_r5"}
HALF_A_PIXEL_INSIDE = {"corner", "comb_multi_hit"}
OTHER_PART = {"two_equal_components"}


@pytest.mark.parametrize("name", SHAPES["names"].tolist())
def test_boxes_centers_and_positives_from_masks_are_the_released_ones(name):
    mask = np.unpackbits(SHAPES[f"{name}/mask_packed"]).reshape(256, 384)
    box, center, edges = released_instance(mask)
    golden = SHAPES[f"{name}/center"]
    boxes, centers, _, _ = targets._whole_pixels(box, center, edges, np.float32([0, 0, 384, 256]))
    np.testing.assert_array_equal(boxes, SHAPES[f"{name}/box"])
    if name in OTHER_PART:
        return  # two parts of one size: there is no right one
    off = np.array(golden - centers)
    if name in ROUNDED:
        exact = center - 0.5
        assert ((off == 0) | ((off == -1) & (np.abs(exact - np.round(exact)) < 1e-3))).all()
    elif name in HALF_A_PIXEL_INSIDE:
        assert (np.abs(off) <= 1).all() and np.abs(golden + 0.5 - (center - 0.5)).max() < 1.1
    else:
        np.testing.assert_array_equal(centers, golden)
    # With the released center, all the rest is equal from the mask on.
    instances = one_instance(box, golden + np.float32(0.5), edges)
    found = targets.encode(instances, rays=36, levels=LEVELS, size=(256, 384), ranges=PUBLISHED, whole_pixels=True)
    positives = SHAPES[f"{name}/pos_inds"]
    np.testing.assert_array_equal(found.positives[:, 1], positives)
    np.testing.assert_array_equal(found.labels.numpy()[0] >= 0, SHAPES[f"{name}/labels"] > 0)
    x1, y1, x2, y2 = SHAPES[f"{name}/box"]
    x, y = SHAPES["points"][positives].T
    np.testing.assert_allclose(found.ltrb, np.stack([x - x1, y - y1, x2 - x, y2 - y], axis=1))
    np.testing.assert_allclose(found.ltrb, SHAPES[f"{name}/bbox_targets_pos"])


def test_released_centers_are_cut_sums_over_contour_pixels():
    """What the seven exceptions above rest on: the released sum in float64, over its own contour, gives all its centers."""
    for name in SHAPES["names"].tolist():
        contour = SHAPES[f"{name}/contour"].astype(np.float64)
        x, y = contour.T
        before_x, before_y = np.roll(x, 1), np.roll(y, 1)
        cross = (x * before_y - y * before_x) / 2
        area = sum(cross.tolist())
        middle = (
            contour.mean(axis=0)
            if area == 0
            else np.array([sum((cross * (values + np.roll(values, 1)) / 3).tolist()) / area for values in (x, y)])
        )
        near = np.abs(middle - SHAPES[f"{name}/center"] - 0.5) <= 0.5 + 1e-9
        assert near.all(), name


def test_a_scene_from_its_masks_has_the_released_targets():
    golden = np.load(GOLDEN / "targets_mixed.npz", allow_pickle=False)
    masks = np.unpackbits(golden["masks_packed"])[: np.prod(golden["masks_shape"])].reshape(golden["masks_shape"])
    rows = [released_instance(mask) for mask in masks]
    most = max(len(edges) for _, _, edges in rows)
    scene = [
        (box, center + np.float32(0.5), int(label) - 1, np.pad(edges, [(0, most - len(edges)), (0, 0)]))
        for (box, _, edges), center, label in zip(rows, golden["centers"], golden["gt_labels"], strict=True)
    ]
    instances = instances_of([scene], (256, 384), len(golden["points"]), rows=6, max_edges=most)
    found = targets.encode(instances, rays=36, levels=LEVELS, size=(256, 384), ranges=PUBLISHED, whole_pixels=True)
    np.testing.assert_array_equal(found.labels.numpy()[0] + 1, golden["labels"])
    np.testing.assert_array_equal(found.positives[:, 1], golden["pos_inds"])
    np.testing.assert_allclose(found.ltrb, golden["bbox_targets_pos"])


# ---- chosen by cost


def test_choose_equals_a_loop():
    """The cheapest of each instance stay, of equals the first; the others are what they would be without it."""
    rng = np.random.default_rng(0)
    instances = {
        "boxes": np.float32(
            [[[0, 0, 60, 60], [10, 10, 40, 40], [0, 0, 0, 0]], [[90, 20, 120, 60], [0, 0, 0, 0], [0, 0, 0, 0]]]
        ),
        "centers": np.float32([[[30, 30], [25, 26], [0, 0]], [[104, 40], [0, 0], [0, 0]]]),
        "classes": np.int32([[1, 0, -1], [2, -1, -1]]),
        "edges": np.zeros([2, 3, 4, 4], np.float32),
        "window": np.float32([[128, 64], [128, 64]]),
        "ignore": rng.random((2, 8 * 16 + 4 * 8 + 2 * 4)) < 0.3,
    }
    options = {"rays": 36, "levels": (3, 4, 5), "size": (64, 128), "radius": 2.5, "mask_iou": True, "match": "cost"}
    found = targets.encode(instances, **options)
    labels, positives = found.labels.numpy(), found.positives.numpy()
    assert len(set(map(tuple, positives.tolist()))) == len(positives)  # a location is a candidate of one instance
    assert {0, 1, 3} == set(found.instance.numpy())
    levels = [location < 128 or 2 * (location >= 160) + 3 for _, location in positives]
    assert len(set(levels)) > 1  # of an instance of any size on every level
    cost = rng.integers(0, 6, len(positives)).astype(np.float32)
    expected = labels.copy()
    kept = 0
    for instance in (0, 1, 3):
        mine = [i for i in range(len(cost)) if found.instance[i] == instance]
        ranked = sorted(mine, key=lambda i: cost[i])
        kept += min(len(mine), targets.CHOSEN)
        assert len(mine) > targets.CHOSEN
        for i in ranked[targets.CHOSEN :]:
            image, location = positives[i]
            expected[image, location] = targets.IGNORED if instances["ignore"][image, location] else targets.BACKGROUND
    assert int(targets.count_chosen(found)) == kept == 27
    for rows in (None, len(cost) + 5):  # padding is never chosen
        padded = targets.pad_positives(found, rows)
        chosen = targets.choose(padded, np.pad(cost, (0, len(padded.positives) - len(cost))))
        np.testing.assert_array_equal(chosen.labels, expected)
        assert np.count_nonzero(chosen.centerness >= 0) == kept
