"""The single losses of a batch: what the head gives, against the targets."""

from __future__ import annotations

import tensorflow as tf

from polarmask_tf.ops import geometry, losses, overlap, targets


def losses_of(model, outputs: dict, encoded: targets.Targets, normalizers: list) -> list[tf.Tensor]:
    """Scalars, those of model.loss_names: sums over this replica's (part's) images, divided by counts over all replicas.

    Rows of `encoded` with a negative centerness are padding. With model.refiner ray and mask losses are those of the polygons
    before and after it, added, and the IoU is that of those after.
    """
    config, at = model.config.loss, encoded.positives
    focal = {"gamma": config.focal_gamma, "alpha": config.focal_alpha}
    units = [
        tf.fill([tf.reduce_prod(tf.shape(maps["ray_logits"])[1:3])], model.ray_units[level])
        for level, maps in sorted(outputs.items(), key=lambda item: int(item[0]))
    ]
    units = tf.gather(tf.concat(units, 0), at[:, 1])[:, tf.newaxis]

    def lengths(name):
        return geometry.rays_from_logits(tf.gather_nd(_flat(outputs, name), at), units)

    class_logits, polygons = _flat(outputs, "class_logits"), [lengths("ray_logits")]
    if model.refiner is not None:
        features = outputs[min(outputs, key=int)]["contour_features"]
        polygons.append(model.refiner.refine(features, at[:, 0], tf.gather(_locations(outputs), at[:, 1]), polygons[0]))
    ray_losses = [losses.RAY_LOSSES[config.ray](rays, encoded.rays) for rays in polygons]
    if model.needs_mask_iou:
        boxes = polygons[0].shape[1] == 4
        areas = [
            overlap.box_areas(rays, encoded.rays) if boxes else overlap.areas(rays, encoded.crossings, encoded.border)
            for rays in polygons
        ]
        mask_losses = [overlap.dice_loss(each) for each in areas]
        classes = tf.maximum(tf.gather_nd(encoded.labels, at), 0)[:, tf.newaxis]  # 0: of padding
        of_class = tf.gather_nd(class_logits, tf.concat([at, classes], axis=1))
    if model.config.targets.match == "cost":
        cost = losses.focal_cost(of_class, **focal) + ray_losses[0] + mask_losses[0]
        encoded = targets.choose(encoded, tf.stop_gradient(cost))
    real = tf.cast(encoded.centerness >= 0, tf.float32)
    centerness = weight = tf.maximum(encoded.centerness, 0.0)
    if model.needs_mask_iou:
        iou = tf.stop_gradient(overlap.iou(areas[-1])) * real
        centerness = centerness * iou if model.config.targets.centerness == "iou" else centerness
        weight = iou if config.weight_by == "iou" else centerness
    sums = {"class": losses.focal_loss(class_logits, encoded.labels, **focal)}
    sums["ray"] = tf.reduce_sum(tf.add_n(ray_losses) * weight)
    if model.config.targets.classification == "iou":
        change = losses.quality_focal_loss(of_class, iou, **focal) - losses.positive_focal_loss(of_class, **focal)
        sums["class"] += tf.reduce_sum(change * real)
    predicted = tf.gather_nd(_flat(outputs, "centerness_logits"), at)[:, 0]
    sums["centerness"] = tf.reduce_sum(losses.centerness_loss(predicted, centerness) * real)
    if "box" in model.loss_names:
        each = losses.iou_loss(lengths("ltrb_logits"), encoded.ltrb, pixel=float(model.conventions.whole_pixels))
        sums["box"] = tf.reduce_sum(each * weight)
    if "mask" in model.loss_names:
        sums["mask"] = tf.reduce_sum(tf.add_n(mask_losses) * weight)
    # Without positives on any replica the sums over positives are zero too; their counts only must not be.
    least = {"class": 1.0, "centerness": 1.0}
    return [
        sums[name] / tf.maximum(count, least.get(name, 1e-3)) for name, count in zip(model.loss_names, normalizers, strict=True)
    ]


def _locations(outputs: dict) -> tf.Tensor:
    """Centers of the cells of all levels, float32 [L, 2] as x, y in pixels, in the same order."""
    strides = {level: 2 ** int(level) for level in sorted(outputs, key=int)}
    sizes = {level: tf.shape(outputs[level]["ray_logits"])[1:3] * stride for level, stride in strides.items()}
    return tf.concat([geometry.locations(*tf.unstack(sizes[level]), stride) for level, stride in strides.items()], axis=0)


def _flat(outputs: dict, name: str) -> tf.Tensor:
    """One output of all levels as [B, L, channels], in the order of targets.assign."""
    maps = [outputs[level][name] for level in sorted(outputs, key=int)]
    return tf.concat([tf.reshape(m, [tf.shape(m)[0], -1, m.shape[3]]) for m in maps], axis=1)
