"""The whole network with its losses: what `fit` trains and what the exporter closes over."""

from __future__ import annotations

import tensorflow as tf
import tf_keras

from polarmask_tf import geometry, losses, postprocess, targets
from polarmask_tf.config import CONVENTIONS, Config
from polarmask_tf.modeling import garden
from polarmask_tf.modeling.fpn import FPN
from polarmask_tf.modeling.head import PolarHead
from polarmask_tf.modeling.resnet import ResNet

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

    def call(self, images, training=False):
        """Head outputs {level: {"classes", "centerness", "rays"}}, float32 logits; see PolarHead."""
        x = tf.cast(self._normalize(tf.cast(images, tf.float32)), self.compute_dtype)
        return self.head(self.fpn(self.backbone(x, training=training)), training=training)

    def _normalize(self, images):
        config = self.config.model
        if config.normalization == "fixed":
            return (images - list(config.mean)) / list(config.std)
        # Over the whole canvas, padding included: a .tflite file does not know where the padding is.
        mean = tf.reduce_mean(images, axis=[1, 2, 3], keepdims=True)
        variance = tf.reduce_mean(tf.square(images - mean), axis=[1, 2, 3], keepdims=True)
        return (images - mean) / tf.sqrt(variance + 1.0)

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None):
        """Sum of the weighted losses of this replica's images, divided by counts over all replicas.

        `y` holds the instances, see targets.encode. `fit` adds the gradients of the replicas, so the total is that of one
        device with the whole batch: focal loss / positives, centerness loss / positives, ray loss and box loss weighted
        by the centerness targets / their sum.
        """
        config = self.config
        encoded = targets.encode(
            y, rays=config.model.rays, levels=config.model.fpn.levels, size=_size(x), radius=config.targets.radius,
            ranges=self.ranges, centerness=config.targets.centerness, whole_pixels=self.conventions.whole_pixels,
        )
        images = tf.cast(tf.shape(x)[0], tf.float32) if self.conventions.count_images else 0.0
        sums, counts = self._local_losses(y_pred, encoded, images)
        counts = _sum_over_replicas(counts)
        # Without positives on any replica the sums over positives are zero too; their counts only must not be.
        least = (1.0, 1e-3, 1.0, 1e-3)
        values = [part / tf.maximum(count, low) for part, count, low in zip(sums, counts, least, strict=False)]
        weights = [getattr(config.loss, f"{part}_weight") for part in self.parts]
        loss = tf.add_n([weight * value for weight, value in zip(weights, values, strict=True)])
        replicas = tf.distribute.get_strategy().num_replicas_in_sync
        for name, value in zip(("loss", *self.parts), (loss, *values), strict=True):
            # Mean metrics average over replicas, and each replica holds only its share of the sum.
            self.trackers[name].update_state(value * replicas)
        return loss

    def _local_losses(self, outputs, encoded, images):
        """Sums of self.parts over this replica, and what each is to be divided by."""
        config = self.config.loss
        class_loss = losses.focal(
            _flat(outputs, "classes"), encoded.labels, gamma=config.focal_gamma, alpha=config.focal_alpha
        )
        at = encoded.positives
        units = [tf.fill([tf.reduce_prod(tf.shape(outputs[n]["rays"])[1:3])], self.ray_units[n]) for n in sorted(outputs)]
        units = tf.gather(tf.concat(units, 0), at[:, 1])[:, tf.newaxis]

        def lengths(name):
            return geometry.rays_from_logits(tf.gather_nd(_flat(outputs, name), at), units)

        ray_loss = tf.reduce_sum(losses.RAYS[config.ray](lengths("rays"), encoded.rays) * encoded.centerness)
        predicted = tf.gather_nd(_flat(outputs, "centerness"), at)[:, 0]
        centerness_loss = tf.reduce_sum(losses.centerness(predicted, encoded.centerness))
        positives, weight = tf.cast(tf.shape(at)[0], tf.float32), tf.reduce_sum(encoded.centerness)
        sums, counts = [class_loss, ray_loss, centerness_loss], [positives + images, weight, positives]
        if "box" in self.parts:
            each = losses.box_iou(lengths("boxes"), encoded.boxes, pixel=float(self.conventions.whole_pixels))
            sums.append(tf.reduce_sum(each * encoded.centerness))
            counts.append(weight)
        return sums, counts

    def compute_metrics(self, x, y, y_pred, sample_weight):
        return self.get_metrics_result()

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
            detections = one(tf.nest.map_structure(lambda t: t[0], outputs))
            return {name: value[tf.newaxis] for name, value in detections.items()}
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
