"""Outputs as tf-models-official's Mask R-CNN gives them when it is served, for its clients and its evaluator.

Conventions: official/vision/serving/detection.py and official/vision/evaluation/coco_evaluator.py of tf-models-official 2.20.
"""

from __future__ import annotations

import tensorflow as tf

SUB_ROWS = 4  # lines a cell at which a polygon is cut: how finely a mask's values are graded along y


def outputs(found: dict, sizes: tf.Tensor, filled: tf.Tensor, canvas: tf.Tensor, mask_size: int, box_branch: bool) -> dict:
    """Model Garden's outputs from ours (exports/README.md).

    Args:
      found: ours, relative to the images.
      sizes: float32 [B, 2], heights and widths of the images.
      filled: float32 [B, 2], of the images as they were resized for the network.
      canvas: int32 [B, 2], heights and widths of the network's inputs.
      mask_size: m, cells a side of a mask.
      box_branch: detection_boxes are not those of the polygons.

    Returns:
      detection_boxes float32 [B, N, 4], ymin, xmin, ymax, xmax in pixels of the resized images; image_info float32
      [B, 4, 2]: the images' sizes, the network's input size, the factors of resizing, zeros (offsets), each as y, x;
      detection_classes int32 [B, N] from 1; detection_scores float32 [B, N]; num_detections int32 [B]; detection_masks
      float32 [B, N, m, m], the part of each cell of the box that the polygon covers; with box_branch detection_outer_boxes
      like detection_boxes, the boxes of the polygons, which the masks then fill. Rows past num_detections are zeros.
    """
    rows = tf.sequence_mask(found["num_detections"], tf.shape(found["detection_scores"])[1], tf.int32)
    factors = filled / sizes
    pixels = tf.tile(filled, [1, 2])[:, tf.newaxis]
    converted = {
        "num_detections": found["num_detections"],
        "detection_scores": found["detection_scores"],
        "detection_classes": found["detection_classes"] + rows,
        "detection_boxes": found["detection_boxes"] * pixels,
        "image_info": tf.stack([sizes, tf.cast(canvas, tf.float32), factors, tf.zeros_like(sizes)], axis=1),
    }
    polygons, boxes = found["detection_polygons"], found["detection_boxes"]
    if box_branch:
        boxes = tf.concat([tf.reduce_min(polygons, axis=2), tf.reduce_max(polygons, axis=2)], axis=-1)
        boxes = tf.gather(boxes, [1, 0, 3, 2], axis=-1)
        converted["detection_outer_boxes"] = boxes * pixels
    shape = tf.shape(boxes)
    masks = rasterise(tf.reshape(polygons, [-1, *polygons.shape[2:]]), tf.reshape(boxes, [-1, 4]), mask_size)
    return {**converted, "detection_masks": tf.reshape(masks, [shape[0], shape[1], mask_size, mask_size])}


def rasterise(polygons: tf.Tensor, boxes: tf.Tensor, size: int) -> tf.Tensor:
    """The part of each cell of each box that a polygon covers, float32 [M, size, size] in [0, 1].

    Exact along x, sampled on SUB_ROWS lines a cell along y. Half a cell's cover is 0.5, so the line where values
    interpolated between the cells' centers cross 0.5 is the polygon's outline.

    Args:
      polygons: float32 [M, n, 2] as x, y, clockwise (x right, y down) and without self-intersections, as polygons of rays
        are; their vertices may have been moved to the border of a box.
      boxes: float32 [M, 4] as ymin, xmin, ymax, xmax.
    """
    low, high = boxes[:, tf.newaxis, 1::-1], boxes[:, tf.newaxis, :1:-1]
    points = tf.math.divide_no_nan(polygons - low, high - low) * size  # in cells
    follow = tf.roll(points, -1, axis=1)
    lines = (tf.range(size * SUB_ROWS, dtype=tf.float32) + 0.5) / SUB_ROWS
    above = points[:, tf.newaxis, :, 1] <= lines[:, tf.newaxis]  # [M, lines, n]
    # Only the edges that cross a line are looked at further: two a line of a convex polygon.
    where = tf.where(above != tf.roll(above, -1, axis=2))
    start, end = (tf.gather_nd(ends, tf.gather(where, [0, 2], axis=1)) for ends in (points, follow))
    line = tf.cast(where[:, 1], tf.int32)
    x = start[:, 0] + (tf.gather(lines, line) - start[:, 1]) / (end[:, 1] - start[:, 1]) * (end[:, 0] - start[:, 0])
    x = tf.clip_by_value(x, 0.0, float(size))
    # An edge that goes up has the polygon on its right, one that goes down has it on its left: from its crossing on, cover
    # begins, or ends. Cumulated, what an edge adds to the cell it crosses and to the next one gives the cover of all.
    sign = tf.where(end[:, 1] < start[:, 1], 1.0, -1.0) / SUB_ROWS
    cell = tf.floor(x)
    row = (tf.cast(where[:, 0], tf.int32) * size + line // SUB_ROWS) * (size + 2) + tf.cast(cell, tf.int32)
    changes = tf.math.unsorted_segment_sum(
        tf.concat([sign * (1 - (x - cell)), sign * (x - cell)], 0),
        tf.concat([row, row + 1], 0),
        tf.shape(boxes)[0] * size * (size + 2),
    )
    cover = tf.cumsum(tf.reshape(changes, [-1, size, size + 2]), axis=2)[:, :, :size]
    return tf.clip_by_value(cover, 0.0, 1.0)
