"""Where an image lies in the network's input: the twin of lite.letterbox and lite.place, tensors in, tensors out.

An image is scaled as DataConfig.fit says, rounded to whole pixels, and put top left onto a canvas of zeros.
"""

from __future__ import annotations

import tensorflow as tf


def factors(source: tf.Tensor, size, fit: str) -> tf.Tensor:
    """What an image of `source` pixels (height, width; float [2]) is scaled by to meet `size`: one number, or one an axis.

    For `size` (two numbers, or int [2]) and `fit` see DataConfig. Source: short_side, "Training Details" of section 4;
    stretch, the released code.
    """
    size = tf.cast(size, source.dtype)
    ratios = size / source
    if fit == "stretch":
        return ratios
    if fit == "letterbox":
        return tf.reduce_min(ratios)
    return tf.minimum(size[0] / tf.reduce_min(source), size[1] / tf.reduce_max(source))


def fitted(source_hw, size, fit: str) -> tuple[tf.Tensor, tf.Tensor]:
    """Height and width that an image of `source_hw` pixels is scaled to, and those of the canvas: float64 [2] each, whole.

    The canvas is `size`; with short_side it is what the scaled image fills of multiples of 32. In double precision these are
    the numbers that lite.letterbox finds: one rounded otherwise is another picture.
    """
    source = tf.cast(source_hw, tf.float64)
    scaled = tf.maximum(tf.round(source * factors(source, size, fit)), 1.0)
    return scaled, tf.math.ceil(scaled / 32) * 32 if fit == "short_side" else tf.cast(size, tf.float64)


def resize(images: tf.Tensor, size: tuple[int, int], fit: str) -> tuple[tf.Tensor, tf.Tensor]:
    """uint8 [B, h, w, 3] to what the network takes, uint8 [B, H, W, 3], with Pillow's antialiased bilinear filter.

    H and W are `size`, or with short_side known when the graph runs. Returns the canvas, and the part of its width and
    height that the images fill, float32 [2], in (0, 1].
    """
    source = tf.cast(tf.shape(images)[1:3], tf.float64)
    scaled, canvas = fitted(source, size, fit)
    placed = tf.raw_ops.ScaleAndTranslate(
        images=images,
        size=tf.cast(canvas, tf.int32),
        scale=tf.cast(scaled / source, tf.float32),
        translation=tf.zeros(2),
        kernel_type="triangle",
        antialias=True,
    )
    placed = tf.ensure_shape(placed, [None, *((None, None) if fit == "short_side" else size), 3])
    return tf.cast(tf.clip_by_value(tf.round(placed), 0.0, 255.0), tf.uint8), tf.cast((scaled / canvas)[::-1], tf.float32)
