"""Polygon voting: what locations beside a kept detection say about the same object makes its polygon better.

Box voting (Gidaris & Komodakis, ICCV 2015, section 5) for polygons. A location's polygon comes from its own features alone;
those that NMS suppresses are as many more opinions of the same outline, from other points of it.
"""

from __future__ import annotations

import numpy as np
import tensorflow as tf

from polarmask_tf.ops import geometry

VOTERS = 4  # at most, a detection, itself included: with a hundred the AP of nuclei was no higher by .001
STEPS = 2  # of Newton's method, from a polygon that overlaps closely


def vote(centers: tf.Tensor, rays: tf.Tensor, boxes: tf.Tensor, scores: tf.Tensor, chosen: tf.Tensor, iou_threshold: float):
    """Rays of kept detections, averaged with those of candidates that overlap them, by score.

    Args:
      centers, rays: float32 [K, 2] and [K, n] of all candidates, pixels.
      boxes: float32 [K, 4] as x1, y1, x2, y2; those of different classes must not overlap.
      scores: float32 [K].
      chosen: int32 [N], which of them NMS keeps.
      iou_threshold: of two boxes that overlap more the other has a vote; the VOTERS with the highest scores do.

    Returns:
      float32 [N, n] from the same centers. Every operation has a TFLite builtin.
    """
    voters, weights = _voters(boxes, scores, tf.gather(boxes, chosen), iou_threshold)
    own = tf.gather(rays, chosen)
    lengths = _lengths_to(tf.gather(centers, chosen), own, tf.gather(centers, voters), voters, rays)
    return tf.reduce_sum(lengths * tf.expand_dims(weights, 2), axis=1) + own * (
        1 - tf.reduce_sum(weights, axis=1, keepdims=True)
    )


def _voters(boxes, scores, kept, iou_threshold):
    """Candidates [N, V] that overlap the kept boxes [N, 4], and what each counts, [N, V]: 0 where there are fewer."""
    x1, y1, x2, y2 = tf.unstack(boxes, axis=1)
    left, top, right, bottom = tf.split(kept, 4, axis=1)
    width = tf.maximum(tf.minimum(right, x2) - tf.maximum(left, x1), 0.0)
    height = tf.minimum(bottom, y2) - tf.maximum(top, y1)
    # IoU > t of areas A and B is common > (A + B) t / (1 + t): no division by what may be 0. [N, K] is large: few operations.
    part = iou_threshold / (1 + iou_threshold)
    least = (x2 - x1) * (y2 - y1) * part + (right - left) * (bottom - top) * part
    counts = tf.where(width * height > least, scores, 0.0)
    most = tf.minimum(VOTERS, tf.shape(boxes)[0]) if boxes.shape[0] is None else min(VOTERS, boxes.shape[0])
    best, voters = tf.math.top_k(counts, most)
    return voters, best / tf.maximum(tf.reduce_sum(best, axis=1, keepdims=True), 1e-12)


def _lengths_to(centers, own, others, voters, rays):
    """How far rays from `centers` [N, 2] reach in the voters' polygons, which are about `others` [N, V, 2]: float32 [N, V, n].

    Newton's method from the `own` lengths [N, n]: which side of the other polygon the ray's end lies towards, and where the ray
    meets that side's line. Where it meets none ahead, the last length stays.
    """
    n = rays.shape[-1]
    way_x, way_y = geometry.ray_directions(n).T
    # The sides of all polygons, about their centers, a row each: one gather a step instead of six.
    x, y = tf.expand_dims(rays * way_x, 2), tf.expand_dims(rays * way_y, 2)
    ends = [tf.concat([each[:, 1:], each[:, :1]], axis=1) for each in (x, y)]
    sides = tf.reshape(tf.concat([x, y, *ends], axis=2), [-1, 4])
    shift_x, shift_y = tf.split(tf.expand_dims(centers, 1) - others, 2, axis=-1)  # [N, V, 1]
    row = tf.expand_dims(voters * n, 2)
    length = tf.expand_dims(own, 1) + tf.zeros_like(shift_x)
    for _ in range(STEPS):
        angle = tf.atan2(shift_y + length * way_y, shift_x + length * way_x) * (n / (2 * np.pi))
        side = (tf.cast(tf.floor(angle), tf.int32) + n) % n
        x1, y1, x2, y2 = tf.unstack(tf.gather(sides, row + side), axis=-1)
        along_x, along_y = x2 - x1, y2 - y1
        across = way_x * along_y - way_y * along_x
        meets = ((x1 - shift_x) * along_y - (y1 - shift_y) * along_x) / tf.where(tf.abs(across) > 1e-6, across, 1e-6)
        length = tf.where((meets > 0.5 * length) & (meets < 2.0 * length), meets, length)
    return length
