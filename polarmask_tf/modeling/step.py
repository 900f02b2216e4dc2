"""The gradients of one training step: in several parts, and by XLA, with the same result.

What the losses are divided by follows from the instances alone and is known before the network runs. So the gradients of
the parts add up to the gradient of the whole batch (but for BatchNorm's statistics, which are a part's), and no replica
waits for another one between the network and its gradient.
"""

from __future__ import annotations

import math

import tensorflow as tf

from polarmask_tf.ops import targets


class Prepared:
    """What compute_loss compares outputs with, and where it leaves the single losses."""

    def __init__(self, encoded: targets.Targets, normalizers: list, share: float = 1.0):
        self.targets, self.normalizers = encoded, normalizers
        self.share = share  # of the step's images, in this part
        self.losses: list = []


def prepare(model, images, instances) -> Prepared:
    """The targets of a batch, and what each of the losses is to be divided by, over all replicas."""
    encoded = _encode(model, images, instances)
    return Prepared(encoded, _sum_over_replicas(_normalizers(model, images, encoded)))


def gradients(model, images, instances) -> tuple[list, list]:
    """Gradients of model.compute_loss by model.trainable_variables, and the losses of model.loss_names.

    Of this replica's images uint8 [b, H, W, 3] in config.train.accumulate parts, one after the other.
    """
    prepared = prepare(model, images, instances)
    parts = model.config.train.accumulate
    size = images.shape[0] // parts if parts > 1 else None
    # XLA compiles for every shape: the positives, whose number differs from step to step, are padded to the most there are.
    rows = most_positives(model, size or images.shape[0], instances) if model.xla else None

    def of_part(images, encoded, normalizers):
        return part_gradients(model, images, Prepared(encoded, normalizers, 1 / parts))

    function = tf.function(of_part, jit_compile=True) if model.xla else of_part

    def part(index):
        if size is None:
            return function(images, targets.pad_positives(prepared.targets, rows), prepared.normalizers)
        mine = targets.select_images(prepared.targets, index * size, size)
        x = tf.ensure_shape(images[index * size : (index + 1) * size], [size, *images.shape[1:]])
        return function(x, targets.pad_positives(mine, rows), prepared.normalizers)

    if size is None:
        found, losses = part(0)
    else:
        zeros = [tf.zeros(v.shape, v.dtype) for v in model.trainable_variables], [tf.constant(0.0) for _ in model.loss_names]
        _, (found, losses) = tf.while_loop(
            lambda index, _: index < parts,
            lambda index, sums: (index + 1, tf.nest.map_structure(tf.add, sums, part(index))),
            (0, zeros),
            parallel_iterations=1,  # more would hold several parts in memory
        )
    if hasattr(model.optimizer, "get_unscaled_gradients"):
        found = model.optimizer.get_unscaled_gradients(found)
    return found, losses


def part_gradients(model, images, prepared: Prepared) -> tuple[list, list]:
    """Gradients (scaled, in float16) and losses of some of a step's images."""
    with tf.GradientTape() as tape:
        loss = model.compute_loss(images, prepared, model(images, training=True))
        if hasattr(model.optimizer, "get_scaled_loss"):
            loss = model.optimizer.get_scaled_loss(loss)
    return tape.gradient(loss, model.trainable_variables, unconnected_gradients="zero"), prepared.losses


def size_of(images) -> tuple:
    """Height and width, as numbers where they are known."""
    dynamic = tf.shape(images)
    return images.shape[1] or dynamic[1], images.shape[2] or dynamic[2]


def _encode(model, images, instances) -> targets.Targets:
    config = model.config
    return targets.encode(
        instances,
        rays=config.model.rays,
        levels=config.model.fpn.levels,
        size=size_of(images),
        radius=config.targets.radius,
        ranges=model.ranges,
        centerness=config.targets.centerness,
        whole_pixels=model.conventions.whole_pixels,
        mask_iou=model.needs_mask_iou,
        match=config.targets.match,
    )


def _normalizers(model, images, encoded) -> list:
    """What each of model.loss_names is to be divided by, of this replica."""
    chosen = model.config.targets.match == "cost"
    positives = tf.cast(targets.count_chosen(encoded) if chosen else tf.shape(encoded.positives)[0], tf.float32)
    # IoUs are known only behind the network; by their sum all replicas would have to wait for one another.
    by_iou = model.config.loss.weight_by == "iou" or chosen
    weight = positives if by_iou else tf.reduce_sum(encoded.centerness)
    seen = tf.cast(tf.shape(images)[0], tf.float32) if model.conventions.count_images else 0.0
    counts = {"class": positives + seen, "centerness": positives}
    return [counts.get(name, weight) for name in model.loss_names]


def most_positives(model, images: int, instances) -> int:
    """The most positives that so many images can have: every instance has ceil(2 radius)^2 a level at most."""
    each = math.ceil(2 * model.config.targets.radius) ** 2
    return images * instances["classes"].shape[1] * len(model.ray_units) * each


def _sum_over_replicas(values):
    context = tf.distribute.get_replica_context()
    if context is None or context.num_replicas_in_sync == 1:
        return values
    return context.all_reduce(tf.distribute.ReduceOp.SUM, list(values))
