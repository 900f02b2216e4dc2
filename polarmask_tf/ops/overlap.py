"""How well predicted polygons cover the true ones: in closed form, with a gradient, without drawing a mask.

A predicted polygon is star-shaped around its location, the true one is any polygon. Along one direction the true one is
entered and left at known distances s_j. The part of it within a radius r covers, of the sector,

    integral from 0 to r of occupied(s) s ds  =  1/2 sum_j sign_j min(s_j, r)^2,    sign_j = +1 leaving, -1 entering,

whose derivative is r * occupied(r). Areas are the sums over equally spaced directions; against pycocotools IoUs are
within .014 on jagged outlines at 72 of them. The idea to train with the mask's IoU is PolarNeXt's (CVPR 2025); the closed
form replaces its rasteriser.
"""

from __future__ import annotations

import math
import typing

import tensorflow as tf

DIRECTIONS = 72  # at least


class Areas(typing.NamedTuple):
    """Square pixels [P]."""

    shared: tf.Tensor
    predicted: tf.Tensor
    true: tf.Tensor


def directions_per_ray(rays: int) -> int:
    """How many directions a ray are summed over."""
    return max(2, -(-DIRECTIONS // rays))  # one, at the ends of the rays, where a polygon is widest, would not do


def areas(lengths: tf.Tensor, crossings: tf.Tensor, border: tf.Tensor) -> Areas:
    """Areas of the polygons of ray lengths [P, n], of the true ones, and of what they share, inside of the picture.

    Args:
      lengths: float32 [P, n], n > 4, pixels.
      crossings: float32 [P, A, K], A a multiple of n: see geometry.signed_distances.
      border: float32 [P, A], distance to the picture's border, at which both polygons are cut.
    """
    radius = tf.minimum(_at_directions(lengths, border.shape[-1] // lengths.shape[-1]), border)
    sector = 2 * math.pi / border.shape[-1]
    return Areas(
        sector * tf.reduce_sum(_covered(radius, crossings), axis=-1),
        sector * tf.reduce_sum(0.5 * tf.square(radius), axis=-1),
        sector * tf.reduce_sum(_covered(border, crossings), axis=-1),
    )


def box_areas(lengths: tf.Tensor, true: tf.Tensor) -> Areas:
    """The same of boxes around one point, by four rays each [P, 4] (right, down, left, up), pixels."""
    shared, *own = ((x[:, 0] + x[:, 2]) * (x[:, 1] + x[:, 3]) for x in (tf.minimum(lengths, true), lengths, true))
    return Areas(shared, *own)


def iou(areas: Areas) -> tf.Tensor:
    """Intersection over union [P], in [0, 1]; 0 where there is no true area."""
    union = areas.predicted + areas.true - areas.shared
    return tf.clip_by_value(tf.math.divide_no_nan(areas.shared, union), 0.0, 1.0)


def dice_loss(areas: Areas) -> tf.Tensor:
    """1 - 2 shared / (predicted + true), [P]."""
    return 1.0 - 2.0 * tf.math.divide_no_nan(areas.shared, areas.predicted + areas.true)


def _covered(radius, crossings):
    """Half the integral of the true occupancy times 2 s ds from 0 to the radius [P, A]."""
    within = tf.minimum(tf.abs(crossings), radius[..., tf.newaxis])
    return 0.5 * tf.reduce_sum(tf.sign(crossings) * tf.square(within), axis=-1)


def _at_directions(lengths, per_ray):
    """[P, n] to [P, n * per_ray]: how far the straight sides between the rays' ends are."""
    after, angle = tf.roll(lengths, -1, axis=-1), 2 * math.pi / lengths.shape[-1]
    parts = [lengths]
    for k in range(1, per_ray):
        to_ray, to_next = angle * k / per_ray, angle * (per_ray - k) / per_ray
        parts.append(lengths * after * math.sin(angle) / (lengths * math.sin(to_ray) + after * math.sin(to_next)))
    return tf.reshape(tf.stack(parts, axis=-1), [-1, lengths.shape[-1] * per_ray])
