"""The paper's losses. Each returns a float32 sum or vector; what to divide by is the caller's, who knows all replicas."""

from __future__ import annotations

import tensorflow as tf

from polarmask_tf.ops.targets import IGNORED


def focal_loss(logits: tf.Tensor, labels: tf.Tensor, *, gamma: float = 2.0, alpha: float = 0.25) -> tf.Tensor:
    """Sum of the sigmoid focal loss over locations and classes.

    Args:
      logits: [..., C].
      labels: int32 [...]: class, -1 for background, targets.IGNORED for locations that do not count.

    Source: Lin et al., "Focal Loss for Dense Object Detection", equation 5 (the paper's section 3.2, "Center Samples").
    """
    logits = tf.cast(logits, tf.float32)
    one_hot = tf.one_hot(labels, logits.shape[-1])  # negative labels: all zeros
    # Signed so that a large margin is right: p_t = sigmoid(margin), -log p_t = softplus(-margin).
    margin = (2 * one_hot - 1) * logits
    cross_entropy = tf.nn.softplus(-margin)
    # (1 - p_t)^gamma; as a power it would have no gradient at p_t = 1 if gamma < 1. -log(1 - p_t) = margin + cross_entropy.
    loss = tf.exp(-gamma * (margin + cross_entropy)) * cross_entropy * (1 - alpha + one_hot * (2 * alpha - 1))
    counts = tf.cast(labels != IGNORED, tf.float32)
    return tf.reduce_sum(tf.reduce_sum(loss, axis=-1) * counts)


def positive_focal_loss(logits: tf.Tensor, *, gamma: float = 2.0, alpha: float = 0.25) -> tf.Tensor:
    """What focal_loss counts for locations of these logits [P] of their own class, elementwise."""
    logits = tf.cast(logits, tf.float32)
    return alpha * tf.exp(-gamma * tf.nn.softplus(logits)) * tf.nn.softplus(-logits)


def focal_cost(logits: tf.Tensor, *, gamma: float = 2.0, alpha: float = 0.25) -> tf.Tensor:
    """How much focal loss [P] a location of these logits [P] of its class costs more as a positive than as background."""
    background = positive_focal_loss(-logits, gamma=gamma, alpha=1 - alpha)
    return positive_focal_loss(logits, gamma=gamma, alpha=alpha) - background


def quality_focal_loss(logits: tf.Tensor, quality: tf.Tensor, *, gamma: float = 2.0, alpha: float = 0.25) -> tf.Tensor:
    """In place of positive_focal_loss where a score is to be a quality [P] in 0..1: (1 - alpha) |q - p|^gamma times the cross
    entropy of p with q, which is focal_loss' background at q = 0.

    Source: Li et al., "Generalized Focal Loss", equation 2, in the weight that background has.
    """
    logits = tf.cast(logits, tf.float32)
    cross_entropy = tf.nn.sigmoid_cross_entropy_with_logits(labels=quality, logits=logits)
    error = tf.maximum(tf.abs(quality - tf.sigmoid(logits)), 1e-6)  # a power of 0 has no gradient where gamma < 1
    return (1 - alpha) * error**gamma * cross_entropy


def polar_iou_loss(predicted: tf.Tensor, target: tf.Tensor) -> tf.Tensor:
    """log(sum max / sum min) over rays, [..., n] and [..., n] positive lengths to [...] (equations 7 and 8)."""
    longer = tf.reduce_sum(tf.maximum(predicted, target), axis=-1)
    shorter = tf.reduce_sum(tf.minimum(predicted, target), axis=-1)
    return tf.math.log(longer) - tf.math.log(shorter)


def polar_iou_squared_loss(predicted: tf.Tensor, target: tf.Tensor) -> tf.Tensor:
    """log(sum max^2 / sum min^2) over rays: Polar IoU before its simplification (equation 6, discretised)."""
    return polar_iou_loss(tf.square(predicted), tf.square(target))


def smooth_l1_loss(predicted: tf.Tensor, target: tf.Tensor) -> tf.Tensor:
    """Mean smooth L1 distance (quadratic below one pixel) over rays, [..., n] and [..., n] pixels to [...] (table 1b)."""
    error = tf.abs(predicted - target)
    return tf.reduce_mean(tf.where(error < 1, 0.5 * tf.square(error), error - 0.5), axis=-1)


RAY_LOSSES = {"polar_iou": polar_iou_loss, "polar_iou_squared": polar_iou_squared_loss, "smooth_l1": smooth_l1_loss}


def iou_loss(predicted: tf.Tensor, target: tf.Tensor, *, pixel: float = 0.0) -> tf.Tensor:
    """-log IoU of boxes given as l, t, r, b [..., 4] from one point, in pixels: [...]; at most -log 1e-6.

    `pixel` is added to both sides of all boxes and to their overlap: 1.0 where boxes end at their last pixel.
    Source: UnitBox; "Box Branch" in section 4.1.
    """

    def area(box):
        return tf.reduce_prod(tf.maximum(box[..., :2] + box[..., 2:] + pixel, 0.0), axis=-1)

    shared = area(tf.minimum(predicted, target))
    return -tf.math.log(tf.maximum(shared / (area(predicted) + area(target) - shared), 1e-6))


def centerness_loss(logits: tf.Tensor, target: tf.Tensor) -> tf.Tensor:
    """Binary cross entropy of centerness logits [P] with centerness targets [P], elementwise (section 3.3)."""
    return tf.nn.sigmoid_cross_entropy_with_logits(labels=target, logits=tf.cast(logits, tf.float32))
