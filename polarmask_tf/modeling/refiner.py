"""Contour refinement: rays are corrected by the features at their ends.

A location says how long its rays are from the features around itself, and corners lie cells away from there: their
polygons are rounded. Here every ray of a polygon looks where it ends, and convolutions along the contour say by how much it
is too long or too short. Only kept detections, and in training the positives, are refined.
"""

from __future__ import annotations

import numpy as np
import tensorflow as tf
import tf_keras

from polarmask_tf.modeling.layers import PACKAGE, Conv
from polarmask_tf.ops import geometry

FEATURES = 4  # channels that are looked up: with 8 and 16 polygons are as exact
SAMPLES = 5  # along each ray, about its end
APART, APART_PER_PIXEL = 1.5, 0.03  # pixels between two of them, and what each pixel of the ray's length adds
KERNELS = (5, 3, 3, 3)  # rays that each convolution along the contour sees
CHANGE = 0.1  # of a ray's logarithm, by an output of 1 of the last one
SCOPE = "polarmask/refiner/"  # `refine` is no part of the model's call, and its operations are to be named like the rest


@tf_keras.saving.register_keras_serializable(PACKAGE)
class Refiner(tf_keras.layers.Layer):
    """Features [B, h, w, c] of this stride to those that `refine` looks up, float32 [B, h, w, FEATURES].

    Convolutions along the closed contour are Deep Snake's (Peng et al., CVPR 2020, section 3.1); there vertices move freely,
    here along their rays, and the polygon stays n lengths about its location.
    """

    def __init__(self, channels: int, stride: int, **kwargs):
        super().__init__(**kwargs)
        self.channels, self.stride = channels, stride
        options = {"dtype": self.dtype_policy}
        self.project = Conv(FEATURES, 1, bias=True, init="glorot_uniform", name="project", **options)
        filters = [channels] * (len(KERNELS) - 1) + [1]
        self.convs = [
            tf_keras.layers.Conv2D(
                count,
                (1, kernel),
                # Unrefined polygons are what training begins with.
                kernel_initializer="zeros" if count == 1 else "he_normal",
                name=f"conv{number}",
                **options,
            )
            for number, (count, kernel) in enumerate(zip(filters, KERNELS, strict=True), 1)
        ]

    def build(self, shape):
        inputs = SAMPLES * (FEATURES + 2)
        for conv in self.convs:  # which `call` does not meet
            with tf.name_scope(conv.name):
                conv.build([None, 1, None, inputs])
            inputs = self.channels
        super().build(shape)

    def call(self, features):
        return tf.cast(self.project(features), tf.float32)

    def refine(self, features: tf.Tensor, image: tf.Tensor, points: tf.Tensor, lengths: tf.Tensor) -> tf.Tensor:
        """Corrected ray lengths, float32 [P, n], pixels.

        Args:
          features: float32 [B, h, w, FEATURES], what the layer gives.
          image: int32 [P], which of the B images each polygon is in.
          points: float32 [P, 2], the locations, x and y in pixels.
          lengths: float32 [P, n], pixels; the gradient stops at them.
        """
        with tf.name_scope(SCOPE):
            lengths, n = tf.stop_gradient(lengths), lengths.shape[1]
            z = tf.concat(self._look_up(features, image, points, lengths), axis=2)
            z = tf.reshape(z, [-1, 1, n, SAMPLES * (FEATURES + 2)])
            for number, conv in enumerate(self.convs):
                around = KERNELS[number] // 2
                y = conv(tf.concat([z[:, :, n - around :], z, z[:, :, :around]], axis=2))
                last = number == len(self.convs) - 1
                z = y if last else tf.nn.relu(y) + (z if number else 0.0)
            change = tf.reshape(tf.cast(z, tf.float32), [-1, n])
            return lengths * tf.exp(tf.clip_by_value(CHANGE * change, -1.0, 1.0))

    def _look_up(self, features, image, points, lengths):
        """Of every sample the features of its cell [P, n, SAMPLES * FEATURES], and where in the cell it is, x and y, -.5 to .5
        of the cell [P, n, SAMPLES]: one look-up where bilinear interpolation takes four, and as good."""
        n = lengths.shape[1]
        steps = np.arange(SAMPLES, dtype=np.float32) - SAMPLES // 2
        distance = tf.expand_dims(lengths, 2) * (1 + APART_PER_PIXEL * steps) + APART * steps  # [P, n, SAMPLES]
        size = features.shape if None not in features.shape[1:3] else tf.shape(features)
        cells, within = [], []
        for axis, way in enumerate(geometry.ray_directions(n).T):
            place = (tf.reshape(points[:, axis], [-1, 1, 1]) + distance * way[:, np.newaxis]) / self.stride
            most = tf.cast(size[2 - axis], tf.float32)
            place = tf.clip_by_value(place, 0.5, most - 0.5)  # what is outside sees the border's cells
            cell = tf.minimum(tf.floor(place), most - 1)
            within.append(place - cell - 0.5)
            # Once more as integers: a length that is no number has a cell too, and the loss, not the look-up, tells of it.
            cells.append(tf.clip_by_value(tf.cast(cell, tf.int32), 0, size[2 - axis] - 1))
        height, width = size[1], size[2]
        row = (tf.reshape(image, [-1, 1, 1]) * height + cells[1]) * width + cells[0]
        found = tf.gather(tf.reshape(features, [-1, FEATURES]), row)  # [P, n, SAMPLES, FEATURES]
        return [tf.reshape(found, [-1, n, SAMPLES * FEATURES]), *within]

    def get_config(self):
        return {**super().get_config(), "channels": self.channels, "stride": self.stride}
