import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from pycocotools import mask as coco_mask

from polarmask_tf.data import contours

masks = hnp.arrays(bool, st.tuples(st.integers(1, 12), st.integers(1, 12)))


def inside(rings, points):
    """Even-odd rule, by brute force: bool [N]."""
    result = np.zeros(len(points), bool)
    for ring in rings:
        for (x1, y1), (x2, y2) in zip(ring, np.roll(ring, -1, axis=0), strict=True):
            if y1 != y2:
                between = (y1 <= points[:, 1]) != (y2 <= points[:, 1])
                result ^= between & (points[:, 0] < x1 + (points[:, 1] - y1) * (x2 - x1) / (y2 - y1))
    return result


def grid(height, width, cells):
    """Points in the middle of cells x cells parts of each pixel."""
    y, x = np.mgrid[0 : height * cells, 0 : width * cells]
    return (np.stack([x.ravel(), y.ravel()], axis=1) + 0.5) / cells


def mask_iou(rings, mask, cells=8):
    """IoU of rings with a bitmap, from cells x cells points a pixel: nothing shared with contours.iou."""
    mask = np.pad(mask, 6)  # rings may bulge out
    one = inside([ring + 6 for ring in rings], grid(*mask.shape, cells)).reshape(mask.shape[0] * cells, -1)
    two = np.kron(mask, np.ones((cells, cells), bool))
    return (one & two).sum() / (one | two).sum()


def disc(radius, x=0.0, y=0.0):
    size = int(2 * radius + 6)
    yy, xx = np.mgrid[0:size, 0:size] + 0.5
    return (xx - size / 2 - x) ** 2 + (yy - size / 2 - y) ** 2 < radius**2


@given(masks)
def test_trace_encloses_exactly_the_pixels(mask):
    rings = contours.trace(mask)
    assert sum(map(contours.shoelace, rings)) == mask.sum()
    assert sum(map(len, rings)) == contours.corners(mask)
    assert np.array_equal(inside(rings, grid(*mask.shape, 1)).reshape(mask.shape), mask)


@given(masks)
def test_trace_gives_corners_on_pixel_edges_only(mask):
    for ring in contours.trace(mask):
        steps = np.roll(ring, -1, axis=0) - ring
        assert ((steps != 0).sum(axis=1) == 1).all()  # axis-parallel, no repeated vertex
        horizontal = steps[:, 0] != 0
        assert (horizontal != np.roll(horizontal, 1)).all()  # a turn at each vertex
        assert np.array_equal(ring, np.rint(ring)) and ring.min() >= 0 and (ring.max(axis=0) <= mask.shape[::-1]).all()


def test_trace_of_one_pixel_turns_the_positive_way():
    (ring,) = contours.trace(np.array([[0, 0], [0, 1]]))
    assert sorted(map(tuple, ring)) == [(1, 1), (1, 2), (2, 1), (2, 2)]
    assert contours.shoelace(ring) == 1


def test_trace_gives_holes_a_negative_area():
    mask = np.ones((5, 6), bool)
    mask[2, 2:4] = False
    assert sorted(map(contours.shoelace, contours.trace(mask))) == [-2, 30]


def test_trace_joins_pixels_that_touch_diagonally():
    assert len(contours.trace(np.eye(4, dtype=bool))) == 1
    assert len(contours.trace(np.eye(4, dtype=bool)[::-1])) == 1
    assert len(contours.trace(np.array([[1, 0, 1]]))) == 2


def pixels_at(*places):
    mask = np.zeros((4, 12), bool)
    mask[tuple(zip(*places, strict=True))] = True
    return mask


def test_trace_of_nothing_is_empty():
    assert contours.trace(np.zeros((3, 4))) == []


@settings(deadline=None)
@given(masks.filter(np.any), st.integers(12, 60), st.sampled_from([0.0, 0.25, 1.0]))
@example(pixels_at((0, 0), (2, 7), (2, 9), (3, 8)), 12, 0.0)  # two edges on one line but for the last bit
def test_simplify_keeps_the_edge_count_and_never_overstates_the_iou(mask, max_edges, tolerance):
    rings = contours.trace(mask)
    simple, iou = contours.simplify(rings, max_edges, tolerance=tolerance)
    assert simple and sum(map(len, simple)) <= max_edges
    assert all(len(ring) >= 3 for ring in simple)
    if iou >= 0.99:  # a bound then; measured otherwise
        assert mask_iou(simple, mask) >= iou - 0.004  # what 64 points a pixel can tell apart on such a small mask
        assert sum(map(contours.shoelace, simple)) == pytest.approx(mask.sum(), rel=1e-6)
    else:
        assert mask_iou(simple, mask) == pytest.approx(iou, abs=0.06)  # overlaps: union there, parity here


@pytest.mark.parametrize("radius", [7.5, 9, 10.3, 12.5, 20, 40])
@pytest.mark.parametrize("shift", [0.0, 0.37])
def test_simplified_discs_keep_area_and_iou(radius, shift):
    mask = disc(radius, shift, shift / 2)
    rings = contours.trace(mask)
    simple, iou = contours.simplify(rings, 96, tolerance=0.35)
    assert sum(map(contours.shoelace, simple)) == pytest.approx(mask.sum(), rel=1e-6)
    assert iou >= 0.99 and mask_iou(simple, mask) >= 0.989
    assert sum(map(len, simple)) < sum(map(len, rings))


@pytest.mark.parametrize("slope", [1.0, 0.4, 2.3, -0.7])
def test_a_staircase_becomes_the_line_through_its_middle(slope):
    size = 200
    yy, xx = np.mgrid[0:size, 0:size] + 0.5
    rings = contours.trace(yy - size / 2 > slope * (xx - size / 2))
    simple, _ = contours.simplify(rings, 96, tolerance=0.35)

    # Points at known distances from the true line, away from the image border: is the boundary where the line is?
    along, across = np.meshgrid(np.linspace(-60, 60, 601), np.linspace(-1.5, 1.5, 61))
    normal = np.array([-slope, 1]) / np.hypot(1, slope)
    points = size / 2 + along.ravel()[:, None] * [normal[1], -normal[0]] + across.ravel()[:, None] * normal

    def position(rings):
        """Mean and mean absolute distance of the boundary from the middle of the staircase."""
        distance = across.shape[0] / 20 / 2 - inside(rings, points).reshape(across.shape).sum(axis=0) / 20
        return distance.mean(), np.abs(distance - middle).mean()

    middle = 0.0
    middle, _ = position(rings)
    bias, deviation = position(simple)
    assert len(simple[0]) < 30 < 100 < len(rings[0])
    assert abs(bias - middle) < 0.05
    assert deviation < position(rings)[1]


def test_polygons_lose_only_as_many_vertices_as_they_must():
    angles = np.linspace(0, 2 * np.pi, 300, endpoint=False)
    radii = 50 + 6 * np.cos(7 * angles)
    ring = np.stack([80 + radii * np.cos(angles), 70 + radii * np.sin(angles)], axis=1)
    (simple,), iou = contours.simplify([ring], 96)
    assert len(simple) == 96
    assert 0.998 < iou <= contours.iou([simple], [ring]) + 1e-3
    assert contours.shoelace(simple) == pytest.approx(contours.shoelace(ring))
    (same,), iou = contours.simplify([ring[::4]], 96)
    assert iou == 1 and np.array_equal(same, ring[::4])


def test_tiny_rings_go_only_where_triangles_would_be_too_many():
    rings = contours.trace(np.kron(np.eye(8, dtype=bool), np.pad(np.ones((3, 3), bool), 1)))
    rings += contours.trace(np.pad(np.ones((20, 20), bool), 60))
    assert len(rings) == 9
    assert len(contours.simplify(rings, 28)[0]) == 9
    few, iou = contours.simplify(rings, 12)
    assert len(few) == 4 and sum(map(len, few)) <= 12
    assert max(map(contours.shoelace, few)) > 390 and iou < 0.95


def test_iou_agrees_with_exact_areas():
    square = np.array([[0.0, 0], [10, 0], [10, 10], [0, 10]])
    hole = np.array([[4.0, 4], [4, 6], [6, 6], [6, 4]])
    assert contours.iou([square], [square]) == 1
    assert contours.iou([square], [square + np.array([5, 0])]) == pytest.approx(1 / 3, abs=0.003)
    assert contours.iou([square, hole], [square]) == pytest.approx(0.96, abs=0.003)
    assert contours.iou([square], [square + np.array([20, 0])]) == 0


def test_real_nuclei_and_crowds_stay_close(shared):
    import json

    truth = json.loads((shared / "data/nuclei/val/annotations/instances_val.json").read_text())
    worst = 1.0
    for annotation in truth["annotations"][::10]:
        x, y, w, h = map(int, coco_mask.toBbox(annotation["segmentation"]))
        mask = coco_mask.decode(annotation["segmentation"])[y : y + h, x : x + w]
        rings = contours.trace(mask)
        assert sum(map(contours.shoelace, rings)) == mask.sum()
        simple, _ = contours.simplify(rings, 96, tolerance=0.35)
        worst = min(worst, mask_iou(simple, mask))
    assert worst >= 0.985
