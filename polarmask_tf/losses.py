"""The paper's losses. Each returns a float32 sum or vector; what to divide by is the caller's, who knows all replicas."""

from __future__ import annotations

import tensorflow as tf

from polarmask_tf.targets import IGNORED


def focal(logits: tf.Tensor, labels: tf.Tensor, *, gamma: float = 2.0, alpha: float = 0.25) -> tf.Tensor:
    """Sum of the sigmoid focal loss over locations and classes.

    Args:
      logits: [..., C].
      labels: int32 [...]: class, -1 for background, targets.IGNORED for locations that do not count.

    Source: Lin et al., "Focal Loss for Dense Object Detection", equation 5 (the paper's section 3.2, "Center Samples").
    """
    logits = tf.cast(logits, tf.float32)
    hot = tf.one_hot(labels, logits.shape[-1])  # negative labels: all zeros
    # Signed so that a large margin is right: p_t = sigmoid(margin), -log p_t = softplus(-margin).
    margin = (2 * hot - 1) * logits
    surprise = tf.nn.softplus(-margin)
    # (1 - p_t)^gamma; as a power it would have no gradient at p_t = 1 if gamma < 1. -log(1 - p_t) = margin + surprise.
    loss = tf.exp(-gamma * (margin + surprise)) * surprise * (1 - alpha + hot * (2 * alpha - 1))
    counts = tf.cast(labels != IGNORED, tf.float32)
    return tf.reduce_sum(tf.reduce_sum(loss, axis=-1) * counts)


def polar_iou(predicted: tf.Tensor, target: tf.Tensor) -> tf.Tensor:
    """log(sum max / sum min) over rays, [..., n] and [..., n] positive lengths to [...] (equations 7 and 8)."""
    longer = tf.reduce_sum(tf.maximum(predicted, target), axis=-1)
    shorter = tf.reduce_sum(tf.minimum(predicted, target), axis=-1)
    return tf.math.log(longer) - tf.math.log(shorter)


def centerness(logits: tf.Tensor, target: tf.Tensor) -> tf.Tensor:
    """Binary cross entropy of centerness logits [P] with polar centerness [P], elementwise (section 3.3)."""
    return tf.nn.sigmoid_cross_entropy_with_logits(labels=target, logits=tf.cast(logits, tf.float32))
