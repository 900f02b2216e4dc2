"""Rays, locations and polygons: tensors in, tensors out.

Coordinates are continuous pixels: x to the right, y down, the pixel (0, 0) covers [0, 1) x [0, 1), as in COCO polygons.
Ray k of n points at the angle 2 pi k / n, from +x towards +y. A polygon (several parts and holes are one polygon) is its
edges, float32 [..., E, 4] as x1, y1, x2, y2; edges of zero length are padding and change nothing. Insides are even-odd.
"""

from __future__ import annotations

import typing

import numpy as np
import tensorflow as tf

EPSILON = 1e-6  # length of a ray that meets no contour (section 3.2)
MAX_RAY_LOGIT = 10.0  # exp(10) = 22,026 units: no ray is longer, and no polygon has an infinite coordinate


def ray_directions(n: int) -> np.ndarray:
    """Unit vectors (cos, sin) of n uniformly spaced rays, float32 [n, 2] (equations 1 and 2)."""
    angles = 2 * np.pi * np.arange(n) / n
    # Rounded so that the rays along the axes are exactly along them.
    return np.stack([np.cos(angles), np.sin(angles)], axis=-1).round(12).astype(np.float32)


def locations(height, width, stride: int) -> tf.Tensor:
    """Centers of the cells of a feature map over a height x width image, float32 [h * w, 2] as x, y, row by row.

    There are h = ceil(height / stride) rows and w = ceil(width / stride) columns; sizes may be ints or tensors.
    """
    rows, columns = -(-height // stride), -(-width // stride)
    y = (tf.cast(tf.range(rows), tf.float32) + 0.5) * stride
    x = (tf.cast(tf.range(columns), tf.float32) + 0.5) * stride
    return tf.reshape(tf.stack(tf.meshgrid(x, y), axis=-1), [-1, 2])


def ray_lengths(points: tf.Tensor, edges: tf.Tensor, rays: int, window: tf.Tensor | None = None) -> tf.Tensor:
    """Distance from each point to the farthest intersection of each ray with the contour of the point's polygon.

    Args:
      points: float32 [P, 2].
      edges: float32 [P, E, 4], the polygon that each point belongs to.
      rays: number of rays n.
      window: float32 [P, 4] as x1, y1, x2, y2, or None. With it, the polygons are cut by this box, which must contain
        the points, without being clipped: where a ray leaves the window inside the polygon, the contour is there.

    Returns:
      float32 [P, n]; 1e-6 where a ray meets nothing. A ray that runs exactly along an edge may stop at either end of it.

    Source: "Distance Regression" in section 3.2, intersections computed exactly.
    """
    directions = ray_directions(rays)
    border = None if window is None else distance_to_border(points, window, directions)
    return farthest(crossings(points, edges, directions), tf.shape(points)[0], rays, border)


class Crossings(typing.NamedTuple):
    """Where A rays from each of P points cross the sides of the point's polygon: H crossings in all."""

    ray: tf.Tensor  # int32 [H]: point * A + direction
    distance: tf.Tensor  # float32 [H] from the point, pixels
    leaves: tf.Tensor  # bool [H]: the ray leaves the polygon there, else it enters
    number: tf.Tensor  # int32 [H]: which of its ray's crossings it is, from 0 up, in the order of the edges


def crossings(points: tf.Tensor, edges: tf.Tensor, directions: np.ndarray) -> Crossings:
    """The crossings of rays from points [P, 2] in `directions` [A, 2] with polygons [P, E, 4]; see Crossings.

    Rings of one polygon must turn the same way (but for holes), as data.segmentation turns them.
    """
    rays = len(directions)
    # Of an even number of rays one half continues the other backwards: lines instead of rays, at half the cost.
    lines = directions if rays % 2 else directions[: rays // 2]
    normals = np.stack([-lines[:, 1], lines[:, 0]])  # [2, L]
    start = edges[..., :2] - points[:, tf.newaxis]
    end = edges[..., 2:] - points[:, tf.newaxis]
    # In the line's frame (point = origin) an edge's ends lie `side` beside the line and `along` it. Where the signs of the
    # sides differ, the edge crosses the line; interpolating between its ends keeps the crossing on the edge, however
    # close to parallel the two are, and the divisor is never zero there.
    start_side, end_side = tf.tensordot(start, normals, 1), tf.tensordot(end, normals, 1)  # [P, E, L]
    crosses = tf.not_equal(start_side > 0, end_side > 0)  # the ray's way; an end on the line is on its left
    if not rays % 2:
        crosses |= tf.not_equal(start_side < 0, end_side < 0)  # backwards
    # Few do: from here on these alone, by line and then by edge.
    point, line, edge = tf.unstack(tf.cast(tf.where(tf.transpose(crosses, [0, 2, 1])), tf.int32), axis=1)
    ends, at_edge = tf.stack([point, edge, line], axis=1), tf.stack([point, edge], axis=1)
    start_side, end_side = tf.gather_nd(start_side, ends), tf.gather_nd(end_side, ends)
    way, first, second = tf.gather(lines, line), tf.gather_nd(start, at_edge), tf.gather_nd(end, at_edge)
    change = tf.reduce_sum((second - first) * way, axis=1) * (start_side / (start_side - end_side))
    along = tf.reduce_sum(first * way, axis=1) + change
    behind = along < 0
    turn = tf.where(behind, -1.0, 1.0)
    is_left = end_side * turn > 0
    twice_area = tf.reduce_sum(start[..., 0] * end[..., 1] - start[..., 1] * end[..., 0], axis=-1)
    leaves = tf.equal(is_left, tf.gather(twice_area, point) >= 0)
    kept = tf.not_equal(start_side * turn > 0, is_left)
    if rays % 2:
        kept &= ~behind
    point, line, along, behind, leaves = (tf.boolean_mask(each, kept) for each in (point, line, along, behind, leaves))
    # Of a line the two rays' crossings are counted apart.
    group = point * len(lines) + line
    begin = tf.searchsorted(group, group)
    before = [tf.cumsum(tf.cast(each, tf.int32), exclusive=True) for each in (~behind, behind)]
    ahead, back = (each - tf.gather(each, begin) for each in before)
    ray = point * rays + tf.where(behind, line + rays // 2, line)
    return Crossings(ray, tf.abs(along), leaves, tf.where(behind, back, ahead))


def farthest(crossings: Crossings, points, rays: int, border: tf.Tensor | None = None) -> tf.Tensor:
    """Ray lengths [P, A] to the farthest crossings; with `border` [P, A], not beyond it; at least 1e-6."""

    def of_rays(reduce, values):
        return tf.reshape(reduce(values, crossings.ray, points * rays), [-1, rays])

    if border is None:
        return tf.maximum(of_rays(tf.math.unsorted_segment_max, crossings.distance), EPSILON)
    beyond = crossings.distance > tf.gather(tf.reshape(border, [-1]), crossings.ray)
    number = of_rays(tf.math.unsorted_segment_sum, tf.cast(beyond, tf.int32))
    longest = of_rays(tf.math.unsorted_segment_max, tf.where(beyond, 0.0, crossings.distance))
    return tf.maximum(tf.where(number % 2 == 1, border, longest), EPSILON)


def signed_distances(crossings: Crossings, points, rays: int, most: int) -> tf.Tensor:
    """Crossings by ray, float32 [P, A, most]: the distance where it leaves, minus it where it enters, 0 where none is left.

    Of a ray with more than `most` crossings the last ones, in the order of the edges, are left out.
    """
    fits = crossings.number < most
    at = tf.boolean_mask(tf.stack([crossings.ray, crossings.number], axis=1), fits)
    signed = tf.boolean_mask(tf.where(crossings.leaves, crossings.distance, -crossings.distance), fits)
    return tf.reshape(tf.scatter_nd(at, signed, [points * rays, most]), [-1, rays, most])


def distance_to_border(points: tf.Tensor, boxes: tf.Tensor, directions: np.ndarray) -> tf.Tensor:
    """Distance [P, n] from points [P, 2] inside boxes [P, 4] to the box's border in each direction [n, 2]."""
    to_low, to_high = boxes[:, tf.newaxis, :2] - points[:, tf.newaxis], boxes[:, tf.newaxis, 2:] - points[:, tf.newaxis]
    safe = np.where(directions == 0, 1, directions)
    distance = tf.where(directions > 0, to_high / safe, tf.where(directions < 0, to_low / safe, np.float32(np.inf)))
    return tf.maximum(tf.reduce_min(distance, axis=-1), 0.0)


def area_and_centroid(edges: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Area [...] and mass center [..., 2] of polygons [..., E, 4] by the shoelace formula; holes turn the other way.

    A polygon without area gets the mean of its edges' middles, weighted by their lengths, as mass center.
    """
    start, end = edges[..., :2], edges[..., 2:]
    length = tf.norm(end - start, axis=-1)[..., tf.newaxis]
    # Relative to a point on the contour: squares of image coordinates would cost float32 its digits.
    origin = tf.math.divide_no_nan(tf.reduce_sum(length * (start + end), -2), 2 * tf.reduce_sum(length, -2))
    start, end = start - origin[..., tf.newaxis, :], end - origin[..., tf.newaxis, :]
    cross = start[..., 0] * end[..., 1] - start[..., 1] * end[..., 0]
    area = tf.reduce_sum(cross, axis=-1) / 2
    moment = tf.reduce_sum(cross[..., tf.newaxis] * (start + end), axis=-2) / 6
    flat = tf.abs(area) < 1e-6
    offset = tf.where(flat[..., tf.newaxis], 0.0, moment / tf.where(flat, 1.0, area)[..., tf.newaxis])
    return tf.abs(area), origin + offset


def clip(edges: tf.Tensor, width, height) -> tuple[tf.Tensor, tf.Tensor]:
    """Polygons cut by the window [0, width] x [0, height], for their area, mass center and box.

    Every edge is split where it meets the lines of the window's sides, and the pieces outside are pressed onto the
    window's border, where they enclose no area; so area_and_centroid of the result is exact.

    Args:
      edges: float32 [N, E, 4].
      width, height: scalars.

    Returns:
      The cut edges, float32 [N, 5 E, 4], and the tight boxes of what is visible, float32 [N, 4] as x1, y1, x2, y2
      (zeros where nothing is).
    """
    limit = tf.stack([tf.cast(width, tf.float32), tf.cast(height, tf.float32)])
    start, along = edges[..., :2], edges[..., 2:] - edges[..., :2]
    cuts = tf.concat([tf.math.divide_no_nan(-start, along), tf.math.divide_no_nan(limit - start, along)], -1)
    cuts = tf.sort(tf.clip_by_value(cuts, 0.0, 1.0), axis=-1)  # [N, E, 4]
    ones = tf.ones_like(cuts[..., :1])
    t = tf.concat([0 * ones, cuts, ones], axis=-1)[..., tf.newaxis]  # [N, E, 6, 1]
    nodes = start[..., tf.newaxis, :] + t * along[..., tf.newaxis, :]
    middle = (nodes[..., 1:, :] + nodes[..., :-1, :]) / 2
    inside = tf.reduce_all((middle >= 0) & (middle <= limit), axis=-1, keepdims=True)
    inside &= (t[..., 1:, :] > t[..., :-1, :]) & tf.reduce_any(along != 0, axis=-1)[..., tf.newaxis, tf.newaxis]
    pressed = tf.clip_by_value(nodes, 0.0, limit)
    pieces = tf.concat([pressed[..., :-1, :], pressed[..., 1:, :]], axis=-1)  # [N, E, 5, 4]
    shape = tf.shape(edges)
    # The visible part's extreme points are ends of visible pieces, or corners of the window inside the polygon.
    corners = limit * tf.constant([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    corner_inside = contains(edges, corners)[..., tf.newaxis]  # [N, 4, 1]
    big = tf.float32.max

    def extreme(reduce, fill):
        ends = tf.where(inside, reduce(tf.stack([pieces[..., :2], pieces[..., 2:]]), 0), fill)
        return reduce(tf.concat([tf.reshape(ends, [shape[0], -1, 2]), tf.where(corner_inside, corners, fill)], 1), 1)

    low, high = extreme(tf.reduce_min, big), extreme(tf.reduce_max, -big)
    boxes = tf.where(tf.reduce_any(low > high, -1, keepdims=True), 0.0, tf.concat([low, high], -1))
    return tf.reshape(pieces, [shape[0], shape[1] * 5, 4]), boxes


def contains(edges: tf.Tensor, points: tf.Tensor) -> tf.Tensor:
    """Whether polygons [N, E, 4] contain points [P, 2], by even-odd crossings: bool [N, P]."""
    start, end = edges[:, :, tf.newaxis, :2], edges[:, :, tf.newaxis, 2:]
    x, y = points[:, 0], points[:, 1]
    crosses = tf.not_equal(start[..., 1] > y, end[..., 1] > y)
    slope = tf.math.divide_no_nan(end[..., 0] - start[..., 0], end[..., 1] - start[..., 1])
    right = start[..., 0] + (y - start[..., 1]) * slope > x
    return tf.reduce_sum(tf.cast(crosses & right, tf.int32), axis=1) % 2 == 1


def rays_from_logits(logits: tf.Tensor, unit: float) -> tf.Tensor:
    """Ray lengths in pixels, unit * exp(logits), float32; logits are clamped so that every ray is positive and finite."""
    return unit * tf.exp(tf.clip_by_value(tf.cast(logits, tf.float32), -MAX_RAY_LOGIT, MAX_RAY_LOGIT))


def assemble(centers: tf.Tensor, rays: tf.Tensor) -> tf.Tensor:
    """Polygon [..., n, 2] from a center [..., 2] and ray lengths [..., n] (equations 1 and 2)."""
    return tf.stack(vertices(centers, rays), axis=-1)


def vertices(centers: tf.Tensor, rays: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """x and y [..., n] of the same: LiteRT is slow at broadcasting along a last dimension of 2.

    Four rays are FCOS, the special case: they measure how far the box reaches, and the polygon is the box.
    """
    if rays.shape[-1] == 4:
        right, bottom, left, top = tf.unstack(rays, axis=-1)
        x, y = tf.stack([right, -left, -left, right], -1), tf.stack([bottom, bottom, -top, -top], -1)
    else:
        x, y = (rays * side for side in ray_directions(rays.shape[-1]).T)
    return centers[..., :1] + x, centers[..., 1:] + y


def ray_boxes(centers: tf.Tensor, rays: tf.Tensor) -> tf.Tensor:
    """Box [K, 4] (x1, y1, x2, y2) around the polygon of a center [K, 2] and ray lengths [K, n], without assembling it."""
    if rays.shape[-1] == 4:
        right, bottom, left, top = tf.unstack(rays, axis=-1)
        return tf.concat([centers - tf.stack([left, top], -1), centers + tf.stack([right, bottom], -1)], axis=-1)
    x, y = vertices(centers, rays)
    return tf.stack([tf.reduce_min(x, -1), tf.reduce_min(y, -1), tf.reduce_max(x, -1), tf.reduce_max(y, -1)], axis=-1)


def polygon_boxes(polygons: tf.Tensor) -> tf.Tensor:
    """Smallest boxes [..., 4] as x1, y1, x2, y2 around polygons given by their vertices [..., n, 2]."""
    return tf.concat([tf.reduce_min(polygons, axis=-2), tf.reduce_max(polygons, axis=-2)], axis=-1)


def polar_centerness(rays: tf.Tensor) -> tf.Tensor:
    """sqrt(min / max) over the rays [..., n] of a location (equation 3): [...], in (0, 1]."""
    return tf.sqrt(tf.reduce_min(rays, axis=-1) / tf.reduce_max(rays, axis=-1))


def box_distances(points: tf.Tensor, boxes: tf.Tensor) -> tf.Tensor:
    """l, t, r, b [..., 4] from points [..., 2] to the sides of boxes [..., 4] as x1, y1, x2, y2."""
    return tf.concat([points - boxes[..., :2], boxes[..., 2:] - points], axis=-1)


def box_rays(points: tf.Tensor, boxes: tf.Tensor) -> tf.Tensor:
    """The same in the order of four rays (right, down, left, up), which measure boxes and not contours; see assemble."""
    return tf.gather(box_distances(points, boxes), [2, 3, 0, 1], axis=-1)


def cartesian_centerness(distances: tf.Tensor) -> tf.Tensor:
    """sqrt(min(l, r) / max(l, r) * min(t, b) / max(t, b)) of distances [..., 4]: [...] (FCOS, equation 3)."""
    low, high = distances[..., :2], distances[..., 2:]
    return tf.sqrt(tf.reduce_prod(tf.minimum(low, high) / tf.maximum(low, high), axis=-1))
