"""From the head's outputs to detections: the same graph in evaluation, in the SavedModel and in the .tflite."""

from __future__ import annotations

import tensorflow as tf

from polarmask_tf import geometry


def detect(
    outputs: dict,
    size: tuple[int, int],
    ray_units: dict,
    *,
    score_threshold: float = 0.05,
    candidates: int = 1000,
    nms_iou: float = 0.5,
    max_detections: int = 100,
    multi_label: bool = True,
) -> dict:
    """Detections of ONE image ("Mask Assembling" in section 3.2).

    Only the highest scoring candidates of each level are decoded; every operation has a TFLite builtin and, with static
    input shapes, a static output shape.

    Args:
      outputs: {level: {"classes": [h, w, C], "centerness": [h, w, 1], "rays": [h, w, n]}}, logits; level l has stride
        2**l.
      size: height and width of the image, pixels; polygons are cut at its border.
      ray_units: {level: pixels}, see geometry.rays_from_logits.
      score_threshold: of class score times centerness; detections at or below it are dropped.
      candidates: a level, before NMS.
      nms_iou: boxes (of polygons) of one class that overlap more are suppressed.
      max_detections: N.
      multi_label: candidates are (location, class) pairs; False: locations with their best class, which is cheaper.

    Returns:
      num_detections int32 []; detection_scores float32 [N], descending; detection_classes int32 [N];
      detection_boxes float32 [N, 4] as ymin, xmin, ymax, xmax; detection_polygons float32 [N, n, 2] as x, y; boxes and
      polygons relative to `size`, in [0, 1]. Rows past num_detections are zeros.
    """
    height, width = size
    limit = tf.constant([width, height], tf.float32)
    decoded = []
    for level, maps in sorted(outputs.items()):
        scores, classes, where = _best(maps, candidates, multi_label)
        rays = tf.gather(tf.reshape(maps["rays"], [-1, maps["rays"].shape[-1]]), where)
        centers = tf.gather(geometry.locations(height, width, 2**level), where)
        polygons = geometry.assemble(centers, geometry.rays_from_logits(rays, ray_units[level]))
        decoded.append((scores, classes, tf.clip_by_value(polygons, 0.0, limit)))
    scores, classes, polygons = (tf.concat(parts, axis=0) for parts in zip(*decoded, strict=True))
    boxes = geometry.polygon_boxes(polygons)
    # Class-aware NMS in one call: boxes of different classes are moved where they cannot overlap.
    apart = boxes + tf.cast(classes, tf.float32)[:, tf.newaxis] * float(max(size) + 1)
    # This form of NMS converts to a TFLite builtin with static shapes.
    chosen, valid = tf.raw_ops.NonMaxSuppressionV4(
        boxes=apart, scores=scores, max_output_size=max_detections, iou_threshold=nms_iou,
        score_threshold=score_threshold, pad_to_max_output_size=True,
    )
    keep = tf.cast(tf.range(max_detections) < valid, tf.float32)
    boxes = tf.gather(boxes, chosen) / tf.concat([limit, limit], 0) * keep[:, tf.newaxis]
    return {
        "num_detections": valid,
        "detection_scores": tf.gather(scores, chosen) * keep,
        "detection_classes": tf.gather(classes, chosen) * tf.cast(keep, tf.int32),
        "detection_boxes": tf.gather(boxes, [1, 0, 3, 2], axis=1),
        "detection_polygons": tf.gather(polygons, chosen) / limit * keep[:, tf.newaxis, tf.newaxis],
    }


def _best(maps: dict, candidates: int, multi_label: bool):
    """Scores [K], classes [K] and location indices [K] of a level's highest scoring candidates."""
    num_classes = maps["classes"].shape[-1]
    logits = tf.reshape(tf.cast(maps["classes"], tf.float32), [-1, num_classes])
    centerness = tf.sigmoid(tf.reshape(tf.cast(maps["centerness"], tf.float32), [-1]))
    if not multi_label:
        # The largest logit has the largest score: one sigmoid a location.
        best = tf.argmax(logits, axis=-1, output_type=tf.int32)
        scores = tf.sigmoid(tf.reduce_max(logits, axis=-1)) * centerness
        scores, where = tf.math.top_k(scores, _at_most(candidates, scores))
        return scores, tf.gather(best, where), where
    scores = tf.reshape(tf.sigmoid(logits) * centerness[:, tf.newaxis], [-1])
    scores, index = tf.math.top_k(scores, _at_most(candidates, scores))
    return scores, index % num_classes, index // num_classes


def _at_most(k: int, x: tf.Tensor):
    return min(k, x.shape[0]) if x.shape[0] is not None else tf.minimum(k, tf.shape(x)[0])
