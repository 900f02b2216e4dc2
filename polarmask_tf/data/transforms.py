"""Augmentation: one scale-and-shift of the image and of the vertices; masks are never touched.

Cropping is exact without clipping polygons: the vertices keep their places outside, geometry.clip gives area, center and
box of the visible part, and geometry.ray_lengths cuts rays at the window.
"""

from __future__ import annotations

import tensorflow as tf

from polarmask_tf.ops import geometry
from polarmask_tf.ops.placement import factors


def sample(height, width, size, canvas, *, fit: str = "letterbox", flip: str, scale: tuple[float, float], seed) -> dict:
    """A random placement of an image on the canvas, a pure function of `seed` (int [2]).

    The image is scaled by the `factors` of size (height, width) and fit, times a uniform number from `scale`. What then
    does not fit the `canvas` (height, width; numbers, or int [2]) is cropped at a random place; what does is put top-left,
    as at inference.

    Returns:
      {"flip": bool [2] (upside down, left to right), "offset": int32 [2], "crop": int32 [2] (the part of the source image
      that is used: its first row and column, its height and width), "window": int32 [2] (height and width of that part on
      the canvas)}.
    """
    canvas = tf.cast(canvas, tf.float32)
    source = tf.cast(tf.stack([height, width]), tf.float32)
    noise = tf.random.stateless_uniform([5], seed)
    factor = factors(source, size, fit) * (scale[0] + noise[0] * (scale[1] - scale[0]))
    window = tf.clip_by_value(tf.round(source * factor), 1.0, canvas)
    # Whole source pixels, so that cropping is a slice; the vertices follow the scale that results.
    crop = tf.where(source * factor > canvas, tf.clip_by_value(tf.round(canvas / factor), 1.0, source), source)
    offset = tf.floor(noise[3:] * (source - crop + 1))
    integers = {"offset": offset, "crop": crop, "window": window}
    placement = {name: tf.cast(value, tf.int32) for name, value in integers.items()}
    allowed = [flip == "both", flip in ("horizontal", "both")]
    return {"flip": (noise[1:3] < 0.5) & allowed, **placement}


def place_image(image: tf.Tensor, placement: dict, size, recolor=None) -> tf.Tensor:
    """uint8 [h, w, 3] to uint8 [*size, 3]: bilinear, zeros outside the image. `size` is two numbers, or int [2].

    `recolor` maps the resized image, float32 in 0..255, to another one; what is outside the image stays zero.

    Antialiasing, which inference always has, costs four times the resizing itself and is left out down to half size.
    """
    window, crop, offset = placement["window"], placement["crop"], placement["offset"]
    image = image[offset[0] : offset[0] + crop[0], offset[1] : offset[1] + crop[1]]
    image = tf.cond(
        tf.reduce_any(2 * window < crop),
        lambda: tf.image.resize(image, window, antialias=True),
        lambda: tf.image.resize(image, window),
    )
    image = recolor(image) if recolor else image
    image = tf.cast(image + 0.5, tf.uint8)  # bilinear values stay within 0..255
    image = tf.reverse(image, tf.where(placement["flip"])[:, 0])
    image = tf.pad(image, [[0, size[0] - window[0]], [0, size[1] - window[1]], [0, 0]])
    return tf.ensure_shape(image, [*(size if isinstance(size, tuple) else (None, None)), 3])


def jitter_color(image: tf.Tensor, strength: float, seed) -> tf.Tensor:
    """float32 [h, w, 3] in 0..255 to the same, a pure function of `seed` (int [2]).

    Brightness, contrast (about the mean gray) and saturation (about each pixel's gray), in this order, are each multiplied by a
    uniform number from 1 - strength to 1 + strength.
    """
    seed = tf.random.experimental.stateless_fold_in(seed, 1)  # other numbers than those of `sample`
    brightness, contrast, saturation = tf.unstack(1.0 + strength * tf.random.stateless_uniform([3], seed, -1.0, 1.0))
    image = image * brightness
    gray = tf.reduce_sum(image * [0.299, 0.587, 0.114], axis=-1, keepdims=True)
    mean = tf.reduce_mean(gray)
    image, gray = mean + contrast * (image - mean), mean + contrast * (gray - mean)
    return tf.clip_by_value(gray + saturation * (image - gray), 0.0, 255.0)


def place_points(xy: tf.Tensor, placement: dict) -> tf.Tensor:
    """The same for points, float32 [..., 2] as x, y in pixels; points outside the canvas stay where they fall."""
    window, crop, offset = (tf.cast(placement[name][::-1], tf.float32) for name in ("window", "crop", "offset"))
    xy = (xy - offset) * (window / crop)
    return tf.where(placement["flip"][::-1], window - xy, xy)


def ring_edges(xy: tf.Tensor, ring_lengths: tf.Tensor) -> tf.Tensor:
    """Edges [V, 4] of closed rings whose vertices [V, 2] follow one another; edge i starts at vertex i."""
    ends = tf.cumsum(ring_lengths)
    is_last = tf.scatter_nd((ends - 1)[:, tf.newaxis], tf.ones_like(ends), tf.shape(xy)[:1]) > 0
    first = tf.repeat(ends - ring_lengths, ring_lengths)
    following = tf.where(is_last, first, tf.range(tf.shape(xy)[0]) + 1)
    return tf.concat([xy, tf.gather(xy, following)], axis=-1)


def _group(edges, groups, count, max_edges):
    """Edges [V, 4] with ascending group numbers [V] to [count, max_edges, 4], padded with zeros."""
    ragged = tf.RaggedTensor.from_value_rowids(edges, groups, nrows=tf.cast(count, groups.dtype), validate=False)
    return ragged.to_tensor(shape=[None, max_edges, 4])


def instances(
    record: dict, xy: tf.Tensor, window, points: tf.Tensor, *, max_edges: int, max_instances: int, parts: str, center: str
) -> dict:
    """Padded instances of one placed image: what targets.INSTANCES has, without a batch dimension.

    Args:
      record: what data.records.parse returns.
      xy: float32 [V, 2], its vertices after place_points.
      window: int32 [2], height and width of the visible part.
      points: float32 [L, 2], the locations of the canvas.
      max_edges: E, at least the most edges of one instance (DatasetInfo.max_edges).
      max_instances: N; an image with more keeps those with the largest visible area.
      parts, center: see TargetConfig.

    Instances of crowds, without polygon, or with a visible area of at most one pixel are left out. Locations in a crowd, and
    in the boxes of instances beyond the N largest, are to be ignored: they are neither background nor anything else.
    """
    count = tf.shape(record["labels"])[0]
    edges = ring_edges(xy, record["ring_lengths"])
    of_ring = record["ring_instance"]
    rings = tf.shape(of_ring)[0]
    vertex_ring = tf.repeat(tf.range(rings), record["ring_lengths"])
    by_ring = _group(edges, vertex_ring, rings, max_edges)
    cut, ring_boxes = geometry.clip(by_ring, window[1], window[0])
    ring_area, ring_center = geometry.area_and_centroid(cut)
    seen = tf.reduce_all(ring_boxes[:, 2:] > ring_boxes[:, :2], axis=-1)  # out of sight, rounding leaves some area
    big = tf.float32.max
    low = tf.math.unsorted_segment_min(tf.where(seen[:, tf.newaxis], ring_boxes[:, :2], big), of_ring, count)
    high = tf.math.unsorted_segment_max(tf.where(seen[:, tf.newaxis], ring_boxes[:, 2:], -big), of_ring, count)
    if parts == "largest":
        best_area = tf.math.unsorted_segment_max(ring_area, of_ring, count)
        is_best = ring_area >= tf.gather(best_area, of_ring)
        chosen = tf.math.unsorted_segment_min(tf.where(is_best, tf.range(rings), rings), of_ring, count)
        has_ring = chosen < rings
        chosen = tf.where(has_ring, chosen, 0)
        # A row of zeros stands in where there is no ring at all to gather from.
        pick = lambda values: tf.gather(tf.pad(values, [[0, 1]] + [[0, 0]] * (values.shape.rank - 1)), chosen)  # noqa: E731
        polygon, area, middle = pick(by_ring), tf.where(has_ring, pick(ring_area), 0.0), pick(ring_center)
    else:
        polygon = _group(edges, tf.repeat(of_ring, record["ring_lengths"]), count, max_edges)
        area, middle = geometry.area_and_centroid(geometry.clip(polygon, window[1], window[0])[0])
    boxes = tf.concat([low, high], axis=-1)
    if center == "box":
        middle = (low + high) / 2
    keep = (area > 1.0) & ~record["is_crowd"]
    order = tf.argsort(tf.where(keep, area, -1.0), direction="DESCENDING", stable=True)
    order = order[: tf.reduce_sum(tf.cast(keep, tf.int32))]
    order, surplus = order[:max_instances], order[max_instances:]

    def pad(values, fill=0):
        values = tf.gather(values, order)
        rest = max_instances - tf.shape(order)[0]
        padded = tf.pad(values, [[0, rest]] + [[0, 0]] * (values.shape.rank - 1), constant_values=fill)
        return tf.ensure_shape(padded, [max_instances, *values.shape[1:]])

    return {
        "boxes": pad(boxes),
        "centers": pad(middle),
        "classes": pad(record["labels"], -1),
        "edges": pad(polygon),
        "window": tf.cast(window[::-1], tf.float32),
        "ignore": crowd_locations(record, xy, points, max_edges) | _in_boxes(tf.gather(boxes, surplus), points),
    }


def _in_boxes(boxes, points):
    """Which locations [L, 2] lie inside of any box [K, 4], where a center sample could: bool [L]."""
    x, y = points[:, 0], points[:, 1]
    left, top, right, bottom = (boxes[:, i : i + 1] for i in range(4))
    return tf.cond(
        tf.size(boxes) > 0,
        lambda: tf.reduce_any((x > left) & (x < right) & (y > top) & (y < bottom), axis=0),
        lambda: tf.zeros_like(x, tf.bool),
    )


def crowd_locations(record: dict, xy: tf.Tensor, points: tf.Tensor, max_edges: int) -> tf.Tensor:
    """Which of the locations [L, 2] lie in a crowd region: bool [L]."""

    def search():
        groups = tf.repeat(record["ring_instance"], record["ring_lengths"])
        polygons = _group(ring_edges(xy, record["ring_lengths"]), groups, tf.shape(record["labels"])[0], max_edges)
        return tf.reduce_any(geometry.contains(tf.boolean_mask(polygons, record["is_crowd"]), points), axis=0)

    return tf.cond(tf.reduce_any(record["is_crowd"]), search, lambda: tf.zeros_like(points[:, 0], tf.bool))
