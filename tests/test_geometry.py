"""geometry.py against float64 loops, rasters of pycocotools, closed forms and the released decoder.

Random polygons come from seeded generators, so that no ray meets a vertex exactly; that is tested on its own.
"""

from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.polygons import HOLE, MAX_EDGES, SQUARE, edges_of, hits, inside, iou, raster, raster_moments, star, unit_vectors
from polarmask_tf.ops import geometry

GOLDEN = Path(__file__).parent / "golden"
SEEDS = st.integers(0, 2**32 - 1)
few = settings(max_examples=20, deadline=None)

# Teeth upwards from a bar at y 40..50: x 10..20, 30..40, 50..60, 70..80.
COMB = [
    [10, 50],
    [10, 10],
    [20, 10],
    [20, 40],
    [30, 40],
    [30, 10],
    [40, 10],
    [40, 40],
    [50, 40],
    [50, 10],
    [60, 10],
    [60, 40],
    [70, 40],
    [70, 10],
    [80, 10],
    [80, 50],
]


def one_or_two_stars(rng, centers, radii):
    """Edges of one or two deeply concave rings."""
    count = rng.integers(1, 3)
    return edges_of(
        *(star(rng, rng.uniform(*centers, 2), rng.uniform(*radii), int(rng.integers(3, 20)), 0.9) for _ in range(count))
    )


def cut_half_plane(ring, axis, limit, keep_below):
    """One step of Sutherland-Hodgman, float64."""
    out = []
    for a, b in zip(ring, np.roll(ring, -1, axis=0), strict=True):
        a_in, b_in = (v[axis] <= limit if keep_below else v[axis] >= limit for v in (a, b))
        if a_in:
            out.append(a)
        if a_in != b_in:
            out.append(a + (b - a) * (limit - a[axis]) / (b[axis] - a[axis]))
    return np.array(out).reshape(-1, 2)


def sutherland_hodgman(ring, width, height):
    for axis, limit, below in ((0, 0, False), (0, width, True), (1, 0, False), (1, height, True)):
        ring = cut_half_plane(ring, axis, limit, below) if len(ring) else ring
    return ring


def shoelace(ring):
    """Signed area and mass center in float64."""
    a, b = ring, np.roll(ring, -1, axis=0)
    cross = a[:, 0] * b[:, 1] - a[:, 1] * b[:, 0]
    return cross.sum() / 2, ((a + b) * cross[:, None]).sum(0) / (3 * cross.sum())


def rays(points, edges, n=36, window=None):
    points = np.atleast_2d(np.asarray(points, np.float32))
    edges = np.broadcast_to(edges, (len(points), *np.shape(edges)[-2:]))
    if window is not None:
        window = np.broadcast_to(np.float32(window), (len(points), 4))
    return geometry.ray_lengths(tf.constant(points), tf.constant(edges), n, window).numpy()


# ---- directions and locations


def test_ray_directions_turn_from_plus_x_towards_plus_y():
    np.testing.assert_array_equal(geometry.ray_directions(4), [[1, 0], [0, 1], [-1, 0], [0, -1]])
    np.testing.assert_allclose(geometry.ray_directions(36), unit_vectors(36), atol=1e-7)
    assert geometry.ray_directions(36).dtype == np.float32


@pytest.mark.parametrize(("height", "width", "stride"), [(64, 96, 8), (65, 97, 16), (1, 1, 32), (100, 30, 128), (33, 8, 8)])
def test_locations_are_cell_centers_and_cover_sizes_that_are_no_multiple(height, width, stride):
    rows, columns = int(np.ceil(height / stride)), int(np.ceil(width / stride))
    expected = [[j * stride + stride / 2, i * stride + stride / 2] for i in range(rows) for j in range(columns)]
    np.testing.assert_array_equal(geometry.locations(height, width, stride), expected)
    np.testing.assert_array_equal(geometry.locations(tf.constant(height), tf.constant(width), stride), expected)


# ---- ray_lengths


@few
@given(SEEDS, st.sampled_from([4, 7, 24, 36]))
def test_rays_equal_a_float64_loop(seed, n):
    """Concave polygons of one or two rings; points inside, outside and far away."""
    rng = np.random.default_rng(seed)
    edges = one_or_two_stars(rng, (30, 70), (5, 40))
    points = rng.uniform(-20, 120, (4, 2)).astype(np.float32)
    expected = [[max([*hits(p, edges, d), 1e-6]) for d in unit_vectors(n)] for p in points]
    np.testing.assert_allclose(rays(points, edges, n), expected, rtol=1e-4, atol=1e-3)


@few
@given(SEEDS)
def test_dense_rays_of_a_star_shaped_polygon_rebuild_its_raster(seed):
    rng = np.random.default_rng(seed)
    center = rng.uniform(38, 42, 2).astype(np.float32)
    ring = star(rng, center, rng.uniform(15, 38), int(rng.integers(5, 24)))
    lengths = rays(center, edges_of(ring), 360)
    rebuilt = geometry.assemble(tf.constant(center[None]), tf.constant(lengths))[0].numpy()
    assert iou(raster([rebuilt], 80, 80), raster([ring], 80, 80)) > 0.97


@few
@given(SEEDS)
def test_a_ray_ends_at_the_farthest_pixel_of_a_raster(seed):
    """Concave polygon, point anywhere: walk along each ray over an 8x raster and keep the last pixel that is set."""
    rng = np.random.default_rng(seed)
    ring = star(rng, (40, 40), 36, int(rng.integers(6, 16)), 0.8)
    mask = np.pad(raster([ring], 80, 80), 8 * 80)
    point = rng.uniform(20, 60, 2).astype(np.float32)
    steps = np.arange(0, 79, 1 / 32)
    expected = []
    for d in unit_vectors(36):
        x, y = ((point[:, None] + np.outer(d, steps) + 80) * 8).astype(int)
        on = steps[mask[y, x]]
        expected.append(on.max() if len(on) else 0)
    difference = np.abs(rays(point, edges_of(ring))[0] - expected)
    # A ray that grazes a corner may miss the raster by a lot, but not many can.
    assert np.median(difference) < 0.15 and (difference < 0.5).mean() > 0.85


def test_corner_cases_of_section_3_2():
    # Several intersections: the longest. From (15, 45) to the right the bar ends at 80; at 45 degrees up: tooth 2 (x 30..40).
    comb = edges_of(COMB)
    assert rays([15, 45], comb, 4)[0] == pytest.approx([65, 5, 5, 35])
    assert rays([15, 25], comb, 4)[0] == pytest.approx([65, 25, 5, 15])  # crosses all four teeth
    # Outside: epsilon where no intersection is, the far side of the contour where one is.
    assert rays([0, 20], edges_of(SQUARE), 4)[0] == pytest.approx([30, 1e-6, 1e-6, 1e-6])
    # Sub-pixel intersections are exact.
    triangle = edges_of([[0, 0], [30, 0], [0, 10]])
    assert rays([6, 5], triangle, 4)[0] == pytest.approx([9, 3, 6, 5], rel=1e-6)


def test_holes_and_parts_count_like_any_contour():
    ring = edges_of(SQUARE, HOLE)
    assert rays([20, 20], ring, 4)[0] == pytest.approx([10] * 4)  # from within the hole: the outer contour is farther
    assert rays([12, 20], ring, 4)[0] == pytest.approx([18, 10, 2, 10])
    parts = edges_of(SQUARE, np.add(SQUARE, [40, 0]))
    assert rays([20, 20], parts, 4)[0] == pytest.approx([50, 10, 10, 10])


def test_padding_changes_nothing():
    rng = np.random.default_rng(0)
    ring = star(rng, (40, 40), 30, 12)
    points = rng.uniform(0, 80, (5, 2)).astype(np.float32)
    bare, padded = edges_of(ring, pad=12), edges_of(ring, pad=60)
    elsewhere = np.concatenate([bare, np.tile(np.float32([500, 300, 500, 300]), (4, 1))])  # zero length, not at the origin
    for window in (None, (0, 0, 60, 50)):
        inside_points = np.minimum(points, 49) if window else points
        expected = rays(inside_points, bare, window=window)
        np.testing.assert_array_equal(rays(inside_points, padded, window=window), expected)
        np.testing.assert_array_equal(rays(inside_points, elsewhere, window=window), expected)
    np.testing.assert_array_equal(rays(points, np.zeros((7, 4), np.float32)), np.full((5, 36), 1e-6, np.float32))


@few
@given(SEEDS)
def test_a_window_cuts_rays_where_clipping_would(seed):
    """Concave polygons that leave the window and come back, some with a second ring, points anywhere in the window."""
    rng = np.random.default_rng(seed)
    width, height = rng.uniform(30, 90, 2)
    edges = one_or_two_stars(rng, (0, 90), (20, 80))
    points = (rng.uniform(0.02, 0.98, (4, 2)) * (width, height)).astype(np.float32)
    expected = np.empty((4, 24))
    for row, p in zip(expected, points, strict=True):
        for k, d in enumerate(unit_vectors(24)):
            # Leaving distance: the first of the window's four lines.
            lines = ((0, 0), (0, width), (1, 0), (1, height))
            leave = min((limit - p[axis]) / d[axis] for axis, limit in lines if (limit - p[axis]) * d[axis] > 1e-9)
            at_border = inside(p + np.multiply(d, leave - 1e-5), edges)
            row[k] = leave if at_border else max([*(t for t in hits(p, edges, d) if t <= leave), 1e-6])
    found = rays(points, edges, 24, window=(0, 0, width, height))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=2e-3)


def test_a_window_works_like_sutherland_hodgman_on_a_polygon_that_leaves_and_re_enters():
    window = (0, 0, 65, 30)  # cuts the comb's bar away: three and a half teeth are left
    comb = edges_of(COMB)
    assert rays([35, 20], comb, 4, window)[0] == pytest.approx([25, 10, 25, 10])
    assert rays([55, 20], comb, 4, window)[0] == pytest.approx([5, 10, 45, 10])
    assert rays([25, 20], comb, 4, window)[0] == pytest.approx([35, 1e-6, 15, 1e-6])  # between teeth, bar out of sight
    assert rays([25, 20], comb, 4, (0, 0, 55, 30))[0][0] == pytest.approx(30)  # the border cuts the third tooth
    around = edges_of([[-50, -50], [200, -50], [200, 200], [-50, 200]])
    assert rays([35, 20], around, 4, window)[0] == pytest.approx([30, 10, 35, 20])
    on_border = edges_of([[0, 0], [65, 0], [65, 30], [0, 30]])
    np.testing.assert_allclose(rays([35, 20], on_border, 36, window), rays([35, 20], around, 36, window), rtol=1e-6)


def test_edges_almost_along_a_ray_give_numbers_and_end_on_the_edge():
    """Triangles with one side along a ray from the point, up to float32 rounding: ahead, behind and across the point."""
    rng = np.random.default_rng(0)
    count = 4000
    for n in (8, 36, 72):
        for case in range(3):
            k = rng.integers(0, n, count)
            d = np.array(unit_vectors(n))[k]
            p = ((rng.integers(0, 30, (count, 2)) + 0.5) * 8).astype(np.float32)
            near = rng.uniform(-60, 60, (count, 1))
            far = (rng.uniform(-60, 60, (count, 1)), near + 10 ** rng.uniform(-7, -1, (count, 1)), 2 * near)[case]
            third = p + np.stack([-d[:, 1], d[:, 0]], axis=1) * rng.uniform(1, 30, (count, 1)) * rng.choice([-1, 1], (count, 1))
            ring = [(p + near * d).astype(np.float32), (p + far * d).astype(np.float32), third.astype(np.float32)]
            edges = np.stack([np.concatenate([ring[i], ring[(i + 1) % 3]], axis=1) for i in range(3)], axis=1)
            low, high = np.minimum(near, far)[:, 0], np.maximum(near, far)[:, 0]
            for window in (None, (0, 0, 240, 240)):
                lengths = rays(p, edges, n, window)
                assert np.isfinite(lengths).all() and (lengths >= np.float32(1e-6)).all()
                along = lengths[np.arange(count), k]
                assert (along <= np.maximum(high, 0) + 1e-3).all()
                if window is None:
                    assert ((along >= low - 1e-3) | (along < 1e-3)).all()


def test_float32_keeps_its_digits_far_from_the_origin():
    rng = np.random.default_rng(1)
    ring = star(rng, (3990, 2990), 20, 20).astype(np.float32)
    points = rng.uniform([3980, 2980], [4000, 3000], (10, 2)).astype(np.float32)
    edges = edges_of(ring)
    expected = [[max([*hits(p, edges, d), 1e-6]) for d in unit_vectors(36)] for p in points]
    np.testing.assert_allclose(rays(points, edges), expected, atol=2e-3)


# ---- area, mass center, clip, contains


def test_area_and_centroid_of_closed_forms():
    angles = 2 * np.pi * np.arange(40) / 40
    circle = np.stack([50 + 20 * np.cos(angles), 60 + 20 * np.sin(angles)], axis=1)
    concave = [[0, 0], [10, 0], [10, 4], [4, 4], [4, 10], [0, 10]]  # an L: 40 + 24, by hand
    shapes = [
        ([circle], 40 / 2 * 20**2 * np.sin(2 * np.pi / 40), (50, 60)),
        ([[[0, 0], [30, 0], [0, 12]]], 180, (10, 4)),
        ([concave], 64, ((40 * 5 + 24 * 2) / 64, (40 * 2 + 24 * 7) / 64)),
        ([SQUARE, HOLE], 300, (20, 20)),
        ([SQUARE, [[12, 12], [12, 16], [16, 16], [16, 12]]], 384, ((400 * 20 - 16 * 14) / 384,) * 2),
        ([[[5, 5], [25, 15]]], 0, (15, 10)),  # a line, there and back
        ([[[3, 4], [3, 4]]], 0, (0, 0)),  # nothing but padding
        ([circle[::-1]], 40 / 2 * 20**2 * np.sin(2 * np.pi / 40), (50, 60)),  # direction does not matter
    ]
    area, center = geometry.area_and_centroid(tf.constant(np.stack([edges_of(*rings, pad=48) for rings, _, _ in shapes])))
    np.testing.assert_allclose(area, [a for _, a, _ in shapes], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(center, [c for _, _, c in shapes], rtol=1e-5)


@few
@given(SEEDS)
def test_area_and_centroid_equal_a_raster(seed):
    rng = np.random.default_rng(seed)
    rings = [star(rng, (40, 40), 38, int(rng.integers(8, 20)), 0.4), 40 + 0.3 * (star(rng, (0, 0), 38, 6, 0.3)[::-1])]
    area, center = geometry.area_and_centroid(tf.constant(edges_of(*rings)))
    expected_area, expected_center, _ = raster_moments(raster(rings, 80, 80))
    assert area.numpy() == pytest.approx(expected_area, rel=0.01)
    np.testing.assert_allclose(center, expected_center, atol=0.1)


def test_area_keeps_its_digits_far_from_the_origin():
    area, center = geometry.area_and_centroid(tf.constant(edges_of(np.add(SQUARE, [8000, 6000]))))
    assert area.numpy() == pytest.approx(400, rel=1e-5)
    np.testing.assert_allclose(center, [8020, 6020], atol=1e-2)


def clipped(rings, width, height):
    edges, boxes = geometry.clip(tf.constant(edges_of(*rings)[None]), width, height)
    area, center = geometry.area_and_centroid(edges)
    assert edges.shape == (1, 5 * MAX_EDGES, 4)
    assert (edges.numpy() >= 0).all() and (edges.numpy() <= np.tile([width, height], 2)).all()
    return area.numpy()[0], center.numpy()[0], boxes.numpy()[0]


@few
@given(SEEDS)
def test_clip_equals_sutherland_hodgman_and_a_raster(seed):
    rng = np.random.default_rng(seed)
    width, height = (int(v) for v in rng.integers(20, 60, 2))
    ring = star(rng, rng.uniform([0, 0], [width, height]), rng.uniform(10, 60), int(rng.integers(4, 20)), 0.9)
    mask = raster([ring], 180, 180, origin=(-60, -60))[480 : 480 + 8 * height, 480 : 480 + 8 * width]
    area, center, box = clipped([ring], width, height)
    exact_area, exact_center = shoelace(sutherland_hodgman(ring, width, height))
    assert area == pytest.approx(exact_area, rel=1e-4, abs=1e-2)
    if exact_area > 1:
        np.testing.assert_allclose(center, exact_center, atol=1e-2)
        raster_area, raster_center, raster_box = raster_moments(mask)
        assert area == pytest.approx(raster_area, rel=0.03, abs=1)
        np.testing.assert_allclose(center, raster_center, atol=0.3)
        # The raster loses tips that are thinner than its pixels: the box may be larger than it, seldom by much.
        assert (box[:2] <= raster_box[:2] + 0.2).all() and (box[2:] >= raster_box[2:] - 0.2).all()
        assert (np.abs(box - raster_box) < 0.3).sum() >= 2


@few
@given(SEEDS)
def test_boxes_of_clipped_convex_polygons_are_exact(seed):
    """Sutherland-Hodgman adds nothing at the border to a convex polygon, so its vertices bound what is visible."""
    rng = np.random.default_rng(seed)
    angles = np.sort(rng.uniform(0, 2 * np.pi, 12))
    ellipse = np.stack([np.cos(angles), rng.uniform(0.3, 1) * np.sin(angles)], axis=1)
    ring = rng.uniform(-20, 80, 2) + rng.uniform(5, 60) * ellipse
    cut = sutherland_hodgman(ring, 60, 50)
    _, _, box = clipped([ring], 60, 50)
    expected = [*cut.min(0), *cut.max(0)] if len(cut) else [0] * 4
    np.testing.assert_allclose(box, expected, atol=2e-3)


def test_clip_at_its_corners():
    big = [[-100, -100], [200, -100], [200, 200], [-100, 200]]
    area, center, box = clipped([big], 60, 40)
    assert (area, *center, *box) == pytest.approx((2400, 30, 20, 0, 0, 60, 40))
    # Around the window's corner without touching it, and beside each of its sides.
    around = [[-5, 20], [-5, -5], [30, -5], [30, -2], [-2, -2], [-2, 20]]
    diagonal = [[-30, 10], [20, -40], [-30, -40]]
    beside = [np.add(SQUARE, shift) for shift in ([-50, 0], [60, 0], [0, -50], [0, 60])]
    for outside in (around, diagonal, *beside):
        area, _, box = clipped([outside], 60, 40)
        assert area == pytest.approx(0, abs=1e-4)
        np.testing.assert_array_equal(box, 0)
    # Within the window nothing is cut.
    area, center, box = clipped([SQUARE, HOLE], 60, 40)
    assert (area, *center, *box) == pytest.approx((300, 20, 20, 10, 10, 30, 30))
    # On the window's border: all of it.
    area, center, box = clipped([[[0, 0], [60, 0], [60, 40], [0, 40]]], 60, 40)
    assert (area, *center, *box) == pytest.approx((2400, 30, 20, 0, 0, 60, 40))
    # The comb without its bar, cut in its last tooth: a box from the first to the cut tooth.
    area, center, box = clipped([COMB], 75, 30)
    assert (area, *center, *box) == pytest.approx((700, (15 + 35 + 55 + 72.5 / 2) * 200 / 700, 20, 10, 10, 75, 30))
    # A window within the hole of a ring sees nothing of it.
    area, _, box = clipped([big, [[-50, -50], [-50, 90], [110, 90], [110, -50]]], 60, 40)
    assert area == pytest.approx(0, abs=1e-3)
    np.testing.assert_array_equal(box, 0)


def test_clip_takes_many_polygons_and_no_edges():
    edges, boxes = geometry.clip(tf.zeros([0, 7, 4]), 60, 40)
    assert edges.shape == (0, 35, 4) and boxes.shape == (0, 4)
    edges, boxes = geometry.clip(tf.zeros([2, 7, 4]), 60, 40)
    area, _ = geometry.area_and_centroid(edges)
    np.testing.assert_array_equal(area, [0, 0])
    np.testing.assert_array_equal(boxes, np.zeros((2, 4)))


@few
@given(SEEDS)
def test_contains_is_the_even_odd_rule(seed):
    rng = np.random.default_rng(seed)
    polygons = np.stack(
        [
            edges_of(*(star(rng, rng.uniform(20, 60, 2), rng.uniform(10, 40), int(rng.integers(3, 20)), 0.9) for _ in range(2)))
            for _ in range(3)
        ]
    )
    points = rng.uniform(0, 80, (20, 2)).astype(np.float32)
    expected = [[inside(p, edges) for p in points] for edges in polygons]
    np.testing.assert_array_equal(geometry.contains(tf.constant(polygons), tf.constant(points)), expected)


def test_contains_knows_holes_and_padding():
    polygons = tf.constant(np.stack([edges_of(SQUARE, HOLE), np.zeros((MAX_EDGES, 4), np.float32)]))
    points = tf.constant([[12.0, 12], [20, 20], [0, 0], [40, 20]])
    np.testing.assert_array_equal(geometry.contains(polygons, points), [[True, False, False, False], [False] * 4])


# ---- polygons


def test_assemble_is_equations_1_and_2():
    lengths = tf.constant([[1.0, 1, 2, 1, 3, 1, 4, 1]])
    polygon = geometry.assemble(tf.constant([[10.0, 20.0]]), lengths)[:, ::2]
    np.testing.assert_allclose(polygon, [[[11, 20], [10, 22], [7, 20], [10, 16]]], atol=1e-6)
    # n = 8, ray 1 at 45 degrees: 3 cos 45 to the right and down.
    lengths = tf.constant([0, 3.0, 0, 0, 0, 0, 0, 0])
    np.testing.assert_allclose(geometry.assemble(tf.constant([0.0, 0.0]), lengths)[1], [3 / np.sqrt(2)] * 2, rtol=1e-6)


def test_four_rays_are_a_box():
    points, boxes = tf.constant([[10.0, 20.0], [3.0, 3.0]]), tf.constant([[7.0, 16.0, 11.0, 22.0], [0.0, 1.0, 9.0, 7.0]])
    distances = geometry.box_distances(points, boxes)
    np.testing.assert_array_equal(distances, [[3, 4, 1, 2], [3, 2, 6, 4]])  # l, t, r, b
    polygons = geometry.assemble(points, tf.gather(distances, [2, 3, 0, 1], axis=1))  # right, down, left, up
    np.testing.assert_array_equal(geometry.polygon_boxes(polygons), boxes)
    np.testing.assert_array_equal(polygons[0], [[11, 22], [7, 22], [7, 16], [11, 16]])
    np.testing.assert_allclose(geometry.cartesian_centerness(distances), np.sqrt([1 / 3 * 2 / 4, 3 / 6 * 2 / 4]), rtol=1e-6)


def test_assemble_agrees_with_the_released_decoder():
    golden = np.load(GOLDEN / "decode.npz")
    height, width = golden["max_shape"]
    ours = golden["rays"][:, (9 - np.arange(36)) % 36]  # its ray i is our ray (9 - i) mod 36, and the other way round
    polygons = geometry.assemble(tf.constant(golden["points"]), tf.constant(ours)).numpy()
    polygons = polygons[:, (9 - np.arange(36)) % 36].clip(0, [width - 1, height - 1])
    np.testing.assert_allclose(polygons, golden["contour"].transpose(0, 2, 1), atol=1e-3)


def test_polygon_boxes_and_polar_centerness():
    polygons = tf.constant([[[1.0, 5.0], [4.0, -2.0], [-3.0, 3.0]], [[0.0, 0.0], [0.0, 0.0], [7.0, 1.0]]])
    np.testing.assert_array_equal(geometry.polygon_boxes(polygons), [[-3, -2, 4, 5], [0, 0, 7, 1]])
    lengths = tf.constant([[4.0, 4, 4], [1, 4, 2], [9, 25, 16], [1e-6, 1e-6, 1e-6], [1e-6, 1, 1]])
    np.testing.assert_allclose(geometry.polar_centerness(lengths), [1, 0.5, 0.6, 1, 1e-3], rtol=1e-6)


def test_rays_from_logits_are_positive_and_finite_whatever_the_logits():
    logits = tf.constant([0.0, 1.0, -1.0, 10.0, 88.0, 1e30, np.inf, -88.0, -1e30, -np.inf])
    for unit in (1.0, 128.0):
        lengths = geometry.rays_from_logits(logits, unit).numpy()
        assert np.isfinite(lengths).all() and (lengths > 0).all()
        np.testing.assert_allclose(lengths[:4], unit * np.exp([0, 1, -1, 10]), rtol=1e-6)
        np.testing.assert_array_equal(lengths[4:7], lengths[3])
        np.testing.assert_array_equal(lengths[7:], lengths[9])
    half = geometry.rays_from_logits(tf.constant([9.0, np.inf], tf.float16), 8.0)
    assert half.dtype == tf.float32  # exp(10) overflows float16
    np.testing.assert_allclose(half, 8 * np.exp([9, 10]), rtol=1e-6)
    # NaN stays NaN: it means that the network diverged, and hiding that would help nobody.
    assert np.isnan(geometry.rays_from_logits(tf.constant([np.nan]), 1.0)).all()
