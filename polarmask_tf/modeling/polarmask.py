"""The whole network with its losses: what `fit` trains and what the exporter closes over."""

from __future__ import annotations

import math

import numpy as np
import tensorflow as tf
import tf_keras

from polarmask_tf import geometry, losses, postprocess, targets
from polarmask_tf.config import CONVENTIONS, Config
from polarmask_tf.modeling import garden
from polarmask_tf.modeling.fpn import FPN
from polarmask_tf.modeling.head import PolarHead
from polarmask_tf.modeling.resnet import ResNet

# Nothing in the network and its losses branches on tensors, and AutoGraph would take seconds to find that out.
_as_it_stands = tf.autograph.experimental.do_not_convert
PARTS = ("class", "ray", "centerness")
BOX_PARTS = (*PARTS, "box")


class PolarMask(tf_keras.Model):
    """PolarMask for one config and a number of classes.

    Images are uint8 or float RGB [B, H, W, 3] in 0..255, H and W multiples of 32; normalisation is part of the network.
    Compile it with an optimizer alone: the losses are computed from instances, see `compute_loss`.
    """

    def __init__(self, config: Config, num_classes: int, **kwargs):
        super().__init__(**kwargs)
        model = config.model
        self.config = config
        self.num_classes = num_classes
        self.backbone = (ResNet if model.backbone.type == "resnet" else garden.build)(model.backbone, name="backbone")
        self.fpn = FPN(model.fpn, name="fpn")
        self.head = PolarHead(model.head, model.fpn.levels, num_classes, model.rays, name="head")
        strided = model.head.ray_unit == "stride"
        self.ray_units = {level: float(2**level if strided else 1) for level in model.fpn.levels}
        # By the size of whole images, also where training sees crops of them.
        self.ranges = config.targets.ranges or targets.scaled_bounds(model.fpn.levels, config.data.size)
        self.conventions = CONVENTIONS[config.conventions]
        self.parts = BOX_PARTS if model.head.box else PARTS
        self.trackers = {name: tf_keras.metrics.Mean(name=name) for name in ("loss", *self.parts)}
        # They are means over all replicas already; Keras would add up those of the workers.
        self.distribute_reduction_method = "first"

    def call(self, images, training=False):
        """Head outputs {level: {"classes", "centerness", "rays"}}, float32 logits; see PolarHead."""
        x = tf.cast(self._normalize(tf.cast(images, tf.float32)), self.compute_dtype)
        return self.head(self.fpn(self.backbone(x, training=training)), training=training)

    def _normalize(self, images):
        config = self.config.model
        if config.normalization == "fixed":
            mean, std = np.float32(config.mean), np.float32(config.std)
            _, height, width, _ = images.shape
            if None in (height, width):
                return (images - mean) / std
            # Whole rows at once: along a last dimension of 3, LiteRT takes ten times as long.
            rows = tf.reshape(images, [-1, height, 3 * width])
            return tf.reshape((rows - np.tile(mean, width)) / np.tile(std, width), [-1, height, width, 3])
        # Over the whole canvas, padding included: a .tflite file does not know where the padding is.
        mean = tf.reduce_mean(images, axis=[1, 2, 3], keepdims=True)
        variance = tf.reduce_mean(tf.square(images - mean), axis=[1, 2, 3], keepdims=True)
        return (images - mean) / tf.sqrt(variance + 1.0)

    @_as_it_stands
    def train_step(self, data):
        """One step of `fit`, like Keras' own, but in train.accumulate parts and, with train.jit_compile, by XLA.

        What the losses are divided by follows from the instances alone and is known before the network runs. So the
        gradients of the parts add up to the gradient of the whole batch (but for BatchNorm's statistics, which are a
        part's), and no replica waits for another one between the network and its gradient.
        """
        images, instances = data
        train = self.config.train
        encoded = self._encode(images, instances)
        counts = _sum_over_replicas(self._counts(images, encoded))
        part_size = images.shape[0] // train.accumulate if train.accumulate > 1 else None
        variables = self.trainable_variables
        # XLA compiles for every shape: the positives, whose number differs from step to step, are padded to the most there are.
        rows = self._most_positives(part_size or images.shape[0], instances) if train.jit_compile else None
        function = tf.function(self._part_gradients, jit_compile=True) if train.jit_compile else self._part_gradients

        def part(index):
            if part_size is None:
                return function(images, targets.padded(encoded, rows), counts)
            within = slice(index * part_size, (index + 1) * part_size)
            mine = targets.of_images(encoded, index * part_size, part_size)
            x = tf.ensure_shape(images[within], [part_size, *images.shape[1:]])
            return function(x, targets.padded(mine, rows), counts)

        if part_size is None:
            gradients, values = part(0)
        else:
            start = [tf.zeros(v.shape, v.dtype) for v in variables], [tf.constant(0.0) for _ in self.parts]
            _, (gradients, values) = tf.while_loop(
                lambda index, _: index < train.accumulate,
                lambda index, sums: (index + 1, tf.nest.map_structure(tf.add, sums, part(index))),
                (0, start), parallel_iterations=1,  # more would hold several parts in memory
            )
        if hasattr(self.optimizer, "get_unscaled_gradients"):
            gradients = self.optimizer.get_unscaled_gradients(gradients)
        self.optimizer.apply_gradients(zip(gradients, variables, strict=True))
        self._track(values)
        return self.get_metrics_result()

    def _part_gradients(self, images, encoded, counts):
        """Gradients of the weighted loss of some of a step's images, and their share of the values of self.parts."""
        with tf.GradientTape() as tape:
            values = self._values(self(images, training=True), encoded, counts)
            loss = self._total(values)
            if hasattr(self.optimizer, "get_scaled_loss"):
                loss = self.optimizer.get_scaled_loss(loss)
        gradients = tape.gradient(loss, self.trainable_variables, unconnected_gradients="zero")
        return gradients, values

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None):
        """Sum of the weighted losses of this replica's images, divided by counts over all replicas.

        `y` holds the instances, see targets.encode. The optimizer adds the gradients of the replicas, so the total is that
        of one device with the whole batch: focal loss / positives, centerness loss / positives, ray loss and box loss
        weighted by the centerness targets / their sum.
        """
        encoded = self._encode(x, y)
        values = self._values(y_pred, encoded, _sum_over_replicas(self._counts(x, encoded)))
        self._track(values)
        return self._total(values)

    def _encode(self, images, instances):
        config = self.config
        return targets.encode(
            instances, rays=config.model.rays, levels=config.model.fpn.levels, size=_size(images),
            radius=config.targets.radius, ranges=self.ranges, centerness=config.targets.centerness,
            whole_pixels=self.conventions.whole_pixels,
        )

    def _most_positives(self, images: int, instances) -> int:
        """The most positives that so many images can have: every instance has ceil(2 radius)^2 a level at most."""
        return images * instances["classes"].shape[1] * len(self.ray_units) * math.ceil(2 * self.config.targets.radius) ** 2

    def _total(self, values):
        return tf.add_n([getattr(self.config.loss, f"{p}_weight") * v for p, v in zip(self.parts, values, strict=True)])

    def _track(self, values):
        replicas = tf.distribute.get_strategy().num_replicas_in_sync
        for name, value in zip(("loss", *self.parts), (self._total(values), *values), strict=True):
            # Mean metrics average over replicas, and each replica holds only its share of the sum.
            self.trackers[name].update_state(value * replicas)

    def _counts(self, images, encoded):
        """What each of self.parts is to be divided by, of this replica."""
        positives, weight = tf.cast(tf.shape(encoded.positives)[0], tf.float32), tf.reduce_sum(encoded.centerness)
        seen = tf.cast(tf.shape(images)[0], tf.float32) if self.conventions.count_images else 0.0
        return [positives + seen, weight, positives, *([weight] if "box" in self.parts else [])]

    def _values(self, outputs, encoded, counts):
        """The losses of self.parts: sums over this replica's (part's) images, divided by counts over all replicas.

        Rows of `encoded` with a negative centerness are padding.
        """
        config = self.config.loss
        class_loss = losses.focal(
            _flat(outputs, "classes"), encoded.labels, gamma=config.focal_gamma, alpha=config.focal_alpha
        )
        at = encoded.positives
        units = [tf.fill([tf.reduce_prod(tf.shape(outputs[n]["rays"])[1:3])], self.ray_units[n]) for n in sorted(outputs)]
        units = tf.gather(tf.concat(units, 0), at[:, 1])[:, tf.newaxis]

        def lengths(name):
            return geometry.rays_from_logits(tf.gather_nd(_flat(outputs, name), at), units)

        weight = tf.maximum(encoded.centerness, 0.0)
        ray_loss = tf.reduce_sum(losses.RAYS[config.ray](lengths("rays"), encoded.rays) * weight)
        predicted = tf.gather_nd(_flat(outputs, "centerness"), at)[:, 0]
        real = tf.cast(encoded.centerness >= 0, tf.float32)
        centerness_loss = tf.reduce_sum(losses.centerness(predicted, weight) * real)
        sums = [class_loss, ray_loss, centerness_loss]
        if "box" in self.parts:
            each = losses.box_iou(lengths("boxes"), encoded.boxes, pixel=float(self.conventions.whole_pixels))
            sums.append(tf.reduce_sum(each * weight))
        # Without positives on any replica the sums over positives are zero too; their counts only must not be.
        least = (1.0, 1e-3, 1.0, 1e-3)
        return [part / tf.maximum(count, low) for part, count, low in zip(sums, counts, least, strict=False)]

    def compute_metrics(self, x, y, y_pred, sample_weight):
        return self.get_metrics_result()

    @_as_it_stands
    def detect(self, images, **overrides) -> dict:
        """Detections of a batch of equally sized images, with a batch dimension before what postprocess.detect returns.

        `overrides` replace values of config.postprocess, like score_threshold=0.3.
        """
        outputs = self(images, training=False)
        conventions = {k: v for k, v in vars(self.conventions).items() if k != "count_images"}
        options = {**vars(self.config.postprocess), **conventions, **overrides}
        size = _size(images)

        def one(maps):
            return postprocess.detect(maps, size, self.ray_units, **options)

        if images.shape[0] == 1:  # no loop in the graph of the .tflite
            # Squeezed and expanded: t[0] and t[tf.newaxis] would be slices in that file, and take longer than all the rest.
            detections = one(tf.nest.map_structure(lambda t: tf.squeeze(t, 0), outputs))
            return {name: tf.expand_dims(value, 0) for name, value in detections.items()}
        floats = {"detection_scores", "detection_boxes", "detection_polygons"}
        names = ("num_detections", "detection_classes", *sorted(floats))
        return tf.map_fn(one, outputs, fn_output_signature={n: tf.float32 if n in floats else tf.int32 for n in names})


def _size(images) -> tuple:
    """Height and width, as numbers where they are known."""
    dynamic = tf.shape(images)
    return images.shape[1] or dynamic[1], images.shape[2] or dynamic[2]


def _flat(outputs: dict, name: str) -> tf.Tensor:
    """One output of all levels as [B, L, channels], in the order of targets.assign."""
    maps = [outputs[level][name] for level in sorted(outputs)]
    return tf.concat([tf.reshape(m, [tf.shape(m)[0], -1, m.shape[3]]) for m in maps], axis=1)


def _sum_over_replicas(values):
    context = tf.distribute.get_replica_context()
    if context is None or context.num_replicas_in_sync == 1:
        return values
    return context.all_reduce(tf.distribute.ReduceOp.SUM, list(values))
