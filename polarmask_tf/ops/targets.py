"""From the instances of a batch to what every location should predict.

Positives are found first and from the instances' side (each has at most a handful of locations near its center), so the
cost grows with instances, not with instances times locations, and rays are computed for positives alone.
"""

from __future__ import annotations

import itertools
import math
import typing

import numpy as np
import tensorflow as tf

from polarmask_tf.errors import InputError
from polarmask_tf.ops import geometry, overlap

BACKGROUND, IGNORED = -1, -2
CHOSEN = 9  # locations that learn an instance, of those that could, where they are chosen by cost
MOST_CROSSINGS = 8  # of a direction with a contour, that IoUs see


# The instances of a batch: what `fit`, `evaluate` and `encode` take beside images. B images, N places for instances in each,
# E places for edges in each of these, L locations over all levels (row by row, the lowest level first). Coordinates are
# pixels of the image that the network sees, x to the right, y down, the pixel (0, 0) covers [0, 1) x [0, 1).
INSTANCES = {
    "boxes": (tf.float32, "[B, N, 4]"),  # x1, y1, x2, y2
    "centers": (tf.float32, "[B, N, 2]"),  # x, y that center samples lie around
    "classes": (tf.int32, "[B, N]"),  # index of the class; -1: this place is empty
    "edges": (tf.float32, "[B, N, E, 4]"),  # x1, y1, x2, y2 of a polygon's sides; those without length are empty places
    "window": (tf.float32, "[B, 2]"),  # width and height of the part, top left, that holds the picture and not padding
    "ignore": (tf.bool, "[B, L]"),  # locations that are neither object nor background, as in crowds
}


def check_batch(data, levels):
    """(images, instances) of a batch, or of its tensor specs; InputError in one line for what `fit` cannot take."""
    if isinstance(data, (tuple, list)) and len(data) == 3:
        raise InputError("the data have sample weights, (images, instances, weights): give (images, instances)")
    if not isinstance(data, (tuple, list)) or len(data) != 2 or not isinstance(data[1], typing.Mapping):
        raise InputError("the data must be (images, instances), instances a dict; polarmask_tf.training_data makes them")
    images, instances = data
    wanted = f"instances need {', '.join(f'{k} {d.name} {s}' for k, (d, s) in INSTANCES.items())} (ops/targets.py)"
    for name, (dtype, shape) in INSTANCES.items():
        value = instances.get(name)
        if value is None:
            raise InputError(f"instances without {name!r}: {wanted}; polarmask_tf.make_instances makes them")
        if value.dtype != dtype or (value.shape.rank is not None and value.shape.rank != shape.count(",") + 1):
            raise InputError(f"instances: {name!r} is {value.dtype.name} {value.shape}, not {dtype.name} {shape}: {wanted}")
    (height, width), given = images.shape[1:3], instances["ignore"].shape[-1]
    if None not in (height, width, given):
        locations = sum(-(-height // 2**level) * -(-width // 2**level) for level in levels)
        if given != locations:
            raise InputError(
                f"instances: 'ignore' has {given} locations, images of {height} x {width} have {locations} at levels "
                f"{list(levels)}"
            )
    return images, instances


class Targets(typing.NamedTuple):
    """What the losses compare with; L locations over all levels, P positives in the batch, n rays."""

    labels: tf.Tensor  # int32 [B, L]: class, BACKGROUND, or IGNORED (crowd regions)
    positives: tf.Tensor  # int32 [P, 2]: image, location
    rays: tf.Tensor  # float32 [P, n], pixels
    centerness: tf.Tensor  # float32 [P]
    ltrb: tf.Tensor  # float32 [P, 4]: l, t, r, b to the sides of the instance's box, pixels
    crossings: tf.Tensor  # float32 [P, A, K]: see geometry.signed_distances; without mask IoU in the losses K is 0
    border: tf.Tensor  # float32 [P, A]: distance to the picture's border in these directions, pixels
    instance: tf.Tensor  # int32 [P]: which instance of the batch, image * N + its place
    otherwise: tf.Tensor  # int32 [P]: the label if the location is not chosen, see `choose`


def level_ranges(levels: typing.Sequence[int], size: tuple[int, int], bounds: typing.Sequence[float] = ()) -> list:
    """(low, high) of max(l, t, r, b) in pixels for each level, inclusive at both ends as released.

    Without `bounds` they are the published 64, 128, 256, 512 between P3 to P7, scaled by the shorter input side / 800:
    the size that they were published for.
    """
    edges = [-1.0, *(bounds or scaled_bounds(levels, size)), 1e8]
    return list(itertools.pairwise(edges))


def scaled_bounds(levels: typing.Sequence[int], size: tuple[int, int]) -> list[float]:
    """The published bounds between levels for inputs of this height and width, pixels."""
    return [2.0 ** (level + 3) * min(size) / 800 for level in levels[:-1]]


def unreachable_levels(levels, size, bounds=()) -> list[int]:
    """Levels to which no box inside an image of this size can be assigned: max(l, t, r, b) is at most the longer side."""
    ranges = level_ranges(levels, size, bounds)
    return [level for level, (low, _) in zip(levels, ranges, strict=True) if low >= max(size)]


def assign(boxes, centers, valid, *, levels, size, radius=1.5, ranges=(), pixel=0.0) -> tf.Tensor:
    """The instance that each location is a center sample of.

    A location is a candidate of an instance if it lies strictly inside the square of `radius` strides around the
    instance's center, clipped to its box, and max(l, t, r, b) from the location to the box is in its level's range; of
    several instances the one with the smallest box wins, of equals the first.

    Args:
      boxes: float32 [B, N, 4] as x1, y1, x2, y2 in pixels of the padded image.
      centers: float32 [B, N, 2].
      valid: bool [B, N]; False rows are padding.
      levels: pyramid levels, level l with stride 2**l.
      size: height and width of the padded image, ints or tensors.
      radius, ranges: see TargetConfig; ranges=None: every level takes every size.
      pixel: added to both sides of a box for its area: 1.0 where boxes end at their last pixel.

    Returns:
      int32 [B, L]: index of the instance, or -1.

    Source: "Center Samples" in section 3.2; FCOS for levels and ambiguity.
    """
    batch, instances = tf.unstack(tf.shape(boxes)[:2])
    low, high = boxes[..., tf.newaxis, :2], boxes[..., tf.newaxis, 2:]
    reach = math.ceil(2 * radius) + 1  # one more than can lie strictly inside: rounding then loses none
    steps = tf.range(reach, dtype=tf.float32)
    grid = tf.reshape(tf.stack(tf.meshgrid(steps, steps), -1), [-1, 2])
    indices, first = [], 0
    limits = [(-1.0, 1e8)] * len(levels) if ranges is None else level_ranges(levels, size, ranges)
    for level, (smallest, largest) in zip(levels, limits, strict=True):
        stride = 2**level
        rows, columns = -(-size[0] // stride), -(-size[1] // stride)
        cells = tf.floor(centers / stride - radius - 0.5)[..., tf.newaxis, :] + grid  # [B, N, K, 2]
        points = (cells + 0.5) * stride
        around = centers[..., tf.newaxis, :]
        ok = points > tf.maximum(around - radius * stride, low)
        ok &= points < tf.minimum(around + radius * stride, high)
        ok &= (cells >= 0) & (cells < tf.cast(tf.stack([columns, rows]), tf.float32))
        distance = tf.reduce_max(tf.concat([points - low, high - points], -1), -1)
        ok = tf.reduce_all(ok, -1) & (distance >= smallest) & (distance <= largest) & valid[..., tf.newaxis]
        cells = tf.cast(cells, tf.int32)
        indices.append(tf.where(ok, first + cells[..., 1] * columns + cells[..., 0], -1))
        first += rows * columns
    location = tf.concat(indices, axis=-1)  # [B, N, levels * K]
    area = tf.reduce_prod(boxes[..., 2:] - boxes[..., :2] + pixel, axis=-1)
    order = tf.argsort(area, axis=-1, stable=True)  # smallest first
    rank = tf.argsort(order, axis=-1)
    image = tf.range(batch)[:, tf.newaxis, tf.newaxis]
    winner = tf.math.unsorted_segment_min(
        tf.broadcast_to(rank[..., tf.newaxis], tf.shape(location)),
        tf.where(location >= 0, location + image * first, -1),
        batch * first,
    )
    winner = tf.reshape(winner, [batch, first])
    taken = winner < instances
    return tf.where(taken, tf.gather(order, tf.where(taken, winner, 0), batch_dims=1), -1)


def encode(
    instances: dict,
    *,
    rays: int,
    levels,
    size,
    radius=1.5,
    ranges=(),
    centerness="polar",
    whole_pixels=False,
    mask_iou=False,
    match="static",
) -> Targets:
    """Targets of a batch.

    Args:
      instances: see INSTANCES.
      rays: number of rays; 4 measure how far the box reaches (FCOS) and not where the contour is.
      levels, size, radius, ranges: see `assign`.
      centerness: "polar", of the rays, or "cartesian", of the box; "iou" is only known with the network's outputs: 1 here.
      whole_pixels: the released code's coordinates, see `_whole_pixels`.
      mask_iou: whether losses need overlap.areas: what that takes comes as `crossings` and `border`.
      match: "static", or "cost": positives are then candidates on every level, for `choose` to choose from.
    """
    window = tf.concat([0 * instances["window"], instances["window"]], axis=-1)
    boxes, centers, edges = instances["boxes"], instances["centers"], instances["edges"]
    if whole_pixels:
        boxes, centers, edges, window = _whole_pixels(boxes, centers, edges, window)
    owner = assign(
        boxes,
        centers,
        instances["classes"] >= 0,
        levels=levels,
        size=size,
        radius=radius,
        ranges=None if match == "cost" else ranges,
        pixel=float(whole_pixels),
    )
    positives = tf.cast(tf.where(owner >= 0), tf.int32)
    image, location = positives[:, 0], positives[:, 1]
    points = tf.gather(tf.concat([geometry.locations(size[0], size[1], 2**level) for level in levels], axis=0), location)
    chosen = tf.stack([image, tf.gather_nd(owner, positives)], axis=-1)
    distances = geometry.box_distances(points, tf.gather_nd(boxes, chosen))
    per_ray = overlap.directions_per_ray(rays) if mask_iou else 1
    directions = geometry.ray_directions(rays * per_ray)
    border = geometry.distance_to_border(points, tf.gather(window, image), directions)
    count = tf.shape(points)[0]
    distances_by_ray = tf.zeros([count, len(directions), 0])
    if rays == 4:
        lengths = geometry.box_rays(points, tf.gather_nd(boxes, chosen))
    else:
        crossings = geometry.crossings(points, tf.gather_nd(edges, chosen), directions)
        lengths = geometry.farthest(crossings, count, len(directions), border)[:, ::per_ray]
        if mask_iou:
            distances_by_ray = geometry.signed_distances(crossings, count, len(directions), MOST_CROSSINGS)
    labels = tf.gather(instances["classes"], tf.maximum(owner, 0), batch_dims=1)
    otherwise = tf.where(instances["ignore"], IGNORED, BACKGROUND)
    labels = tf.where(owner >= 0, labels, otherwise)
    quality = {
        "polar": lambda: geometry.polar_centerness(lengths),
        "cartesian": lambda: geometry.cartesian_centerness(distances),
        "iou": lambda: tf.ones_like(lengths[:, 0]),
    }[centerness]()
    # A location that sees nothing of its instance would have polar centerness 1 and teach the most.
    sees = tf.reduce_max(lengths, axis=-1) > geometry.EPSILON
    quality = tf.where(sees, quality, 0.0)
    return Targets(
        labels,
        positives,
        lengths,
        quality,
        distances,
        distances_by_ray,
        border,
        image * tf.shape(boxes)[1] + chosen[:, 1],
        tf.gather_nd(otherwise, positives),
    )


def choose(targets: Targets, cost: tf.Tensor) -> Targets:
    """The CHOSEN positives of each instance with the least cost [P]; the others get centerness -1, as padding has."""
    real = targets.centerness >= 0
    by_cost = tf.argsort(tf.where(real, cost, np.inf), stable=True)
    by_instance = tf.gather(by_cost, tf.argsort(tf.gather(targets.instance, by_cost), stable=True))
    instance = tf.gather(targets.instance, by_instance)
    place = tf.range(tf.size(instance))
    first = tf.searchsorted(instance, instance, side="left")
    taken = tf.scatter_nd(by_instance[:, tf.newaxis], place - first, tf.shape(place)) < CHOSEN
    # Added and not set: several rows of padding name one location.
    labels = tf.gather_nd(targets.labels, targets.positives)
    change = tf.where(real & ~taken, targets.otherwise - labels, 0)
    labels = tf.tensor_scatter_nd_add(targets.labels, targets.positives, change)
    return targets._replace(labels=labels, centerness=tf.where(taken, targets.centerness, -1.0))


def count_chosen(targets: Targets) -> tf.Tensor:
    """How many `choose` leaves, int32 []; before there is a cost."""
    _, _, sizes = tf.unique_with_counts(targets.instance)
    return tf.reduce_sum(tf.minimum(sizes, CHOSEN))


def select_images(targets: Targets, first, count: int) -> Targets:
    """The targets of `count` images of a batch from the image `first` on; images are numbered from 0 again."""
    image = targets.positives[:, 0] - first
    mine = (image >= 0) & (image < count)
    positives, *others = (tf.boolean_mask(value, mine) for value in targets[1:])
    labels = tf.ensure_shape(targets.labels[first : first + count], [count, targets.labels.shape[1]])
    return Targets(labels, positives - [first, 0], *others)


def pad_positives(targets: Targets, rows: int | None) -> Targets:
    """The same with exactly so many rows of positives; those added have centerness -1. None: as it is."""
    if rows is None:
        return targets

    def pad(values, fill):
        values = tf.pad(values, [[0, rows - tf.shape(values)[0]]] + [[0, 0]] * (values.shape.rank - 1), constant_values=fill)
        return tf.ensure_shape(values, [rows, *values.shape[1:]])

    fills = {"rays": 1.0, "centerness": -1.0, "ltrb": 1.0, "border": 1.0, "instance": -1}
    rest = targets._asdict()
    labels = rest.pop("labels")
    return Targets(labels, **{name: pad(values, fills.get(name, 0)) for name, values in rest.items()})


def _whole_pixels(boxes, centers, edges, window):
    """The same instances as the released code sees them: the origin is the middle of the first pixel, a box ends in the
    middle of its last one, and a center is cut to integers. (Its contours also run through the middles of the outermost
    pixels, half a pixel inside of ours; rays cannot be shortened by that without the mask, and are not.)"""
    return boxes - [0.0, 0.0, 1.0, 1.0], tf.floor(centers - 0.5), edges - 0.5, window - 0.5
