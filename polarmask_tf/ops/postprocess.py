"""From the head's outputs to detections: the same graph in evaluation, in the SavedModel and in the .tflite."""

from __future__ import annotations

import numpy as np
import tensorflow as tf

from polarmask_tf.ops import geometry, voting

LEAST_SCORE = 1e-6  # that a calibrated score is of


def detect(
    outputs: dict,
    size,
    ray_units: dict,
    *,
    refine=None,
    score_threshold: float,
    pre_nms_top_k: int,
    nms_iou_threshold: float,
    max_detections: int,
    multi_label: bool,
    temperature: float = 1.0,
    score_bias: float = 0.0,
    voting_iou_threshold: float = 0.0,
    centerness_offset: float = 0.0,
    class_threshold: bool = False,
    box_nms: bool = False,
    suppress_equal: bool = False,
    whole_pixels: bool = False,
) -> dict:
    """Detections of ONE image ("Mask Assembling" in section 3.2).

    Only the highest scoring candidates of each level are decoded; every operation has a TFLite builtin and, with static
    input shapes, a static output shape.

    Args:
      outputs: {level: {"class_logits": [h, w, C], "centerness_logits": [h, w, 1], "ray_logits": [h, w, n]}}; level l has stride
        2**l. With "ltrb_logits": [h, w, 4] rays are cut at the box ("Box Branch" in section 4.1).
      size: height and width of the image, pixels, ints or tensors; polygons are cut at its border.
      ray_units: {level: pixels}, see geometry.rays_from_logits.
      refine: from points [N, 2] and lengths [N, n] of kept detections to corrected lengths, see Refiner.refine; or None.
      score_threshold: of the score, class score times centerness, calibrated; detections at or below it are dropped.
      pre_nms_top_k: a level, before NMS.
      nms_iou_threshold: boxes (of polygons) of one class that overlap more are suppressed.
      max_detections: N.
      multi_label: candidates are (location, class) pairs; False: locations with their best class, which is cheaper.
      temperature, score_bias: see `calibrated`.
      voting_iou_threshold: of boxes that overlap a detection's more the polygons are averaged with its own, see voting.vote;
        0: none are. Its box is then that of the averaged polygon.
      centerness_offset, class_threshold, box_nms, suppress_equal, whole_pixels: see config.Conventions.

    Returns:
      num_detections int32 []; detection_scores float32 [N], descending; detection_classes int32 [N];
      detection_boxes float32 [N, 4] as ymin, xmin, ymax, xmax; detection_polygons float32 [N, n, 2] as x, y; boxes and
      polygons relative to `size`, in [0, 1]. Rows past num_detections are zeros.
    """
    height, width = size
    limit = tf.cast(tf.stack([width, height]), tf.float32)
    pixel = float(whole_pixels)
    score_threshold = uncalibrated(score_threshold, temperature, score_bias)
    levels = []
    for level, maps in sorted(outputs.items(), key=lambda item: int(item[0])):  # levels are text or numbers
        if class_threshold:
            scores, classes, where = _above(maps, pre_nms_top_k, score_threshold, centerness_offset)
        else:
            scores, classes, where = _best(maps, pre_nms_top_k, multi_label, centerness_offset)
        # Lengths before the levels are joined: LiteRT's GPU delegate takes a column of constants, of units, for its first row.
        lengths = [
            geometry.rays_from_logits(tf.gather(tf.reshape(maps[name], [-1, maps[name].shape[-1]]), where), ray_units[level])
            for name in ("ray_logits", "ltrb_logits")
            if name in maps
        ]
        centers = tf.gather(geometry.locations(height, width, 2 ** int(level)), where)
        levels.append((scores, classes, centers, *lengths))
    # All levels at once: in a .tflite file the number of operations is what small ones cost.
    scores, classes, centers, *lengths = (tf.concat(parts, axis=0) for parts in zip(*levels, strict=True))
    rays, boxes = _decode(centers, lengths, box_nms)
    boxes = tf.clip_by_value(boxes, 0.0, tf.tile(limit, [2]) - pixel)
    # Class-aware NMS in one call: boxes of different classes are moved where they cannot overlap.
    apart = boxes + tf.expand_dims(tf.cast(classes, tf.float32) * (tf.reduce_max(limit) + 1.0), 1)
    # This form of NMS converts to a TFLite builtin with static shapes.
    chosen, valid = tf.raw_ops.NonMaxSuppressionV4(
        boxes=apart + tf.constant([0.0, 0.0, pixel, pixel]),
        scores=scores,
        max_output_size=max_detections,
        iou_threshold=np.nextafter(np.float32(nms_iou_threshold), np.float32(0)) if suppress_equal else nms_iou_threshold,
        score_threshold=0.0 if class_threshold else score_threshold,
        pad_to_max_output_size=True,
    )
    keep = tf.cast(tf.range(max_detections) < valid, tf.float32)
    kept = tf.expand_dims(keep, 1)  # not tf.newaxis, which a .tflite file holds as a slice
    # Only what is left needs a polygon.
    points, lengths, boxes = tf.gather(centers, chosen), tf.gather(rays, chosen), tf.gather(boxes, chosen)
    if voting_iou_threshold:
        lengths = voting.vote(centers, rays, apart, scores, chosen, voting_iou_threshold)
    if refine is not None:
        lengths = refine(points, lengths)
    if voting_iou_threshold or refine is not None:
        boxes = tf.clip_by_value(geometry.ray_boxes(points, lengths), 0.0, tf.tile(limit, [2]) - pixel)
    boxes = boxes / tf.tile(limit, [2]) * kept
    sides = zip(geometry.vertices(points, lengths), tf.unstack(limit), strict=True)
    polygons = tf.stack([tf.clip_by_value(values, 0.0, most - pixel) / most * kept for values, most in sides], axis=-1)
    return {
        "num_detections": valid,
        "detection_scores": calibrated(tf.gather(scores, chosen), temperature, score_bias) * keep,
        "detection_classes": tf.gather(classes, chosen) * tf.cast(keep, tf.int32),
        "detection_boxes": tf.gather(boxes, [1, 0, 3, 2], axis=1),
        "detection_polygons": polygons,
    }


def calibrated(scores: tf.Tensor, temperature: float, bias: float = 0.0) -> tf.Tensor:
    """sigmoid(logit(scores) / temperature + bias), of scores in [0, 1]: in the same order (Platt, 1999)."""
    if (temperature, bias) == (1, 0):
        return scores
    scores = tf.clip_by_value(scores, LEAST_SCORE, 1 - LEAST_SCORE)
    return tf.sigmoid((tf.math.log(scores) - tf.math.log(1.0 - scores)) * (1 / temperature) + bias)


def uncalibrated(scores, temperature: float, bias: float = 0.0):
    """The scores (number or array) that `calibrated` makes these of; not float32's, since thresholds are tiny."""
    if (temperature, bias) == (1, 0):
        return scores
    scores = np.clip(np.asarray(scores, np.float64), 1e-300, 1 - 1e-16)
    odds = np.log(scores) - np.log1p(-scores)
    with np.errstate(over="ignore"):  # 1 / inf is 0
        result = 1 / (1 + np.exp(-temperature * (odds - bias)))
    return float(result) if result.ndim == 0 else result


def recalibrated(scores, then: tuple[float, float] = (1.0, 0.0), now: tuple[float, float] = (1.0, 0.0)):
    """Scores (number or array) of one (temperature, bias) as those of another: `calibrated` in NumPy, of any to any."""
    temperature, bias = now
    return uncalibrated(uncalibrated(scores, *then), 1 / temperature, -bias * temperature)


def _decode(centers: tf.Tensor, lengths: list, box_nms: bool):
    """Rays [K, n] of the polygons at centers [K, 2], and the boxes [K, 4] that stand for them in NMS; pixels.

    `lengths` are the rays', and where there is a box branch l, t, r, b.
    """
    rays, *distances = lengths
    if not distances:
        return rays, geometry.ray_boxes(centers, rays)
    boxes = tf.concat([centers - distances[0][:, :2], centers + distances[0][:, 2:]], axis=-1)
    if box_nms:
        return rays, boxes
    rays = tf.minimum(rays, geometry.distance_to_border(centers, boxes, geometry.ray_directions(rays.shape[-1])))
    return rays, geometry.ray_boxes(centers, rays)


def _best(maps: dict, top_k: int, multi_label: bool, offset: float):
    """Scores [K], classes [K] and location indices [K] of a level's highest scoring candidates."""
    logits, centerness = _flat(maps, offset)
    if not multi_label:
        # The largest logit has the largest score: one sigmoid a location. Which class it is, only the best need to know.
        count = logits.shape[-1]
        logits = _by_fours(logits)
        scores = tf.sigmoid(tf.reduce_max(logits, axis=-1)) * centerness
        scores, where = _top(scores, top_k)
        return scores, tf.argmax(tf.gather(logits, where), axis=-1, output_type=tf.int32) % count, where
    scores = tf.reshape(tf.sigmoid(logits) * tf.expand_dims(centerness, 1), [-1])
    scores, index = _top(scores, top_k)
    num_classes = logits.shape[-1]
    return scores, index % num_classes, index // num_classes


def _by_fours(logits: tf.Tensor) -> tf.Tensor:
    """[L, C] with some columns a second time, so that 4 divides their number: where it does not, LiteRT's GPU delegate looks
    for the largest among zeros, too."""
    count = logits.shape[-1]
    if count < 3:
        return tf.tile(logits, [1, 4 // count])
    return tf.concat([logits, tf.slice(logits, [0, 0], [-1, -count % 4])], axis=1) if count % 4 else logits


def _above(maps: dict, top_k: int, threshold: float, offset: float):
    """The same as the released code chooses them: all classes above the threshold at the best locations, however many."""
    logits, centerness = _flat(maps, offset)
    best = tf.sigmoid(tf.reduce_max(logits, axis=-1)) * (centerness - offset)
    _, locations = tf.math.top_k(best, _at_most(top_k, best))
    scores = tf.sigmoid(tf.gather(logits, locations))
    row, classes = tf.unstack(tf.cast(tf.where(scores > threshold), tf.int32), axis=1)
    where = tf.gather(locations, row)
    return tf.gather_nd(scores, tf.stack([row, classes], axis=1)) * tf.gather(centerness, where), classes, where


def _flat(maps: dict, offset: float):
    """Class logits [L, C] and centerness + offset [L] of a level."""
    logits = tf.reshape(tf.cast(maps["class_logits"], tf.float32), [-1, maps["class_logits"].shape[-1]])
    return logits, tf.sigmoid(tf.reshape(tf.cast(maps["centerness_logits"], tf.float32), [-1])) + offset


def _top(scores: tf.Tensor, k: int):
    """The k highest scores and their indices, or all of them if there are fewer.

    Sorted even then: indices that are constants would make columns of constants of the centers, which see `detect`.
    """
    highest, count = _at_most(k, scores), scores.shape[0]
    if count is not None and count % 4:  # LiteRT's GPU delegate sorts wrongly where the number is no multiple of 4
        scores = tf.concat([scores, -tf.ones([-count % 4])], axis=0)
    return tf.math.top_k(scores, highest)


def _at_most(k: int, x: tf.Tensor):
    return min(k, x.shape[0]) if x.shape[0] is not None else tf.minimum(k, tf.shape(x)[0])
