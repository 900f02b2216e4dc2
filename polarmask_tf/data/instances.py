"""The objects of one image in a user's own words to the instances that `fit` takes: for a tf.data pipeline of one's own."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import tensorflow as tf

from polarmask_tf.config import Config, input_size
from polarmask_tf.data import pipeline, segmentation, transforms
from polarmask_tf.errors import InputError
from polarmask_tf.ops import targets


def make_instances(
    objects: Mapping, image_size: tuple[int, int], config: Config, *, max_instances: int | None = None, max_edges: int = 96
) -> dict[str, np.ndarray]:
    """The instances of ONE image: targets.INSTANCES without the batch dimension, numpy arrays of fixed shapes.

    Coordinates are pixels of the image that the network sees, x to the right, y down, the pixel (0, 0) covers [0, 1) x
    [0, 1). The image lies top left in the network's input (config's input_size, or data.crop), zeros beside and below it.

    Args:
      objects: {"classes": int [n], index of the class; and "masks": bool [n, h, w], or "polygons": for each object a ring
        (float [V, 2], or x, y, x, y, ...) or a list of rings; "boxes": float [n, 4] as x1, y1, x2, y2, in place of the
        outlines' own}. Boxes alone are enough where config.model.rays is 4.
      image_size: (height, width) of the image in the network's input.
      max_instances: N, config.data.max_instances if None. Of more objects the smallest are left out, and "ignore" is set
        where they are, so that they are not taught to be background.
      max_edges: E; outlines with more edges are simplified at equal area.

    Objects with a visible area of at most one pixel are left out, as in training on converted data. Raises InputError for
    wrong shapes, negative classes, numbers that are not finite, or what is missing.
    """
    canvas = config.data.crop or input_size(config.data)
    height, width = _numbers(image_size, "image_size", (2,)).astype(int).tolist()
    if not (0 < height <= canvas[0] and 0 < width <= canvas[1]):
        raise InputError(f"make_instances: image_size is {[height, width]}, the network's input {list(canvas)} (height, width)")
    if max_edges < 8 or (max_instances is not None and max_instances < 1):
        given = f"max_instances is {max_instances}, max_edges {max_edges}"
        raise InputError(f"make_instances: {given}: at least 1 and 8 are needed")
    if not isinstance(objects, Mapping) or "classes" not in objects:
        raise InputError('make_instances: objects must be {"classes", and "masks", "polygons" or "boxes"}')
    classes = np.asarray(objects["classes"])
    if classes.ndim != 1 or (classes.size and (classes.dtype.kind not in "iu" or classes.min() < 0)):
        raise InputError("make_instances: 'classes' must be whole numbers from 0 up, one for each object")
    boxes = objects.get("boxes")
    if boxes is not None:
        boxes = _numbers(boxes, "boxes", (len(classes), 4))
        if (boxes[:, 2:] <= boxes[:, :2]).any():
            raise InputError("make_instances: 'boxes' must be x1, y1, x2, y2 with x1 < x2 and y1 < y2")
    record = record_of(_outlines(objects, boxes, len(classes), (height, width), config.model.rays, max_edges))
    with tf.device("CPU"):
        instances = transforms.instances(
            record,
            record["xy"],
            tf.constant([height, width]),
            pipeline.locations(canvas, config.model.fpn.levels),
            max_edges=max_edges,
            max_instances=config.data.max_instances if max_instances is None else max_instances,
            parts=config.targets.parts,
            center=config.targets.center,
        )
    instances = {name: value.numpy() for name, value in instances.items()}
    number = instances["classes"]  # record_of numbers the objects
    kept = number >= 0
    number = number[kept]
    instances["classes"][kept] = classes[number]
    if boxes is not None:
        instances["boxes"][kept] = np.clip(boxes[number], 0, [width, height, width, height])
        if config.targets.center == "box":
            instances["centers"][kept] = instances["boxes"][kept].reshape(-1, 2, 2).mean(axis=1)
    return instances


def instances_spec(config: Config, max_instances: int | None = None, max_edges: int = 96) -> dict[str, tf.TensorSpec]:
    """Shapes and dtypes of what make_instances gives, for tf.data.Dataset.from_generator."""
    canvas = config.data.crop or input_size(config.data)
    n = config.data.max_instances if max_instances is None else max_instances
    shapes = {
        "boxes": [n, 4],
        "centers": [n, 2],
        "classes": [n],
        "edges": [n, max_edges, 4],
        "window": [2],
        "ignore": [sum(-(-canvas[0] // 2**level) * -(-canvas[1] // 2**level) for level in config.model.fpn.levels)],
    }
    return {name: tf.TensorSpec(shapes[name], dtype, name) for name, (dtype, _) in targets.INSTANCES.items()}


def record_of(outlines: list[list[np.ndarray]]) -> dict:
    """What transforms.instances reads of a record, for objects that are their outlines, labelled 0, 1, 2, ...

    `outlines` has the rings [V, 2] of each object.
    """
    rings = [(index, ring) for index, rings in enumerate(outlines) for ring in rings]
    return {
        "labels": tf.range(len(outlines)),
        "is_crowd": tf.zeros([len(outlines)], tf.bool),
        "xy": tf.constant(np.concatenate([np.zeros((0, 2)), *(ring for _, ring in rings)]), tf.float32),
        "ring_lengths": tf.constant([len(ring) for _, ring in rings], tf.int32),
        "ring_instance": tf.constant([index for index, _ in rings], tf.int32),
    }


def _outlines(objects, boxes, count, size, rays, max_edges):
    """The rings of each object, of at most max_edges in all."""
    if objects.get("masks") is not None:
        masks = np.asarray(objects["masks"])
        if masks.shape != (count, *size) or masks.dtype != bool:
            given = f"{masks.dtype} {list(masks.shape)}"
            raise InputError(f"make_instances: 'masks' are {given}, not bool [n, h, w], {[count, *size]}")
        return [segmentation.outline(mask, max_edges)[0] if mask.any() else [] for mask in masks]
    if objects.get("polygons") is not None:
        polygons = objects["polygons"]
        if not isinstance(polygons, (list, tuple, np.ndarray)) or len(polygons) != count:
            raise InputError(f"make_instances: 'polygons' must be a list, one for each of {count} 'classes'")
        rings = [_rings(polygon, index) for index, polygon in enumerate(polygons)]
        return [segmentation.simplified(some, max_edges)[0] for some in rings]
    if boxes is None or rays != 4:
        raise InputError("make_instances: 'masks' or 'polygons' are needed; boxes alone are enough for model.rays: 4 only")
    return list(boxes[:, [0, 1, 2, 1, 2, 3, 0, 3]].reshape(-1, 1, 4, 2))


def _rings(polygon, index):
    """The rings that enclose something of one object's polygon, in any of the forms that make_instances takes."""
    try:
        one = len(polygon) and (np.ndim(polygon[0]) == 0 or all(np.shape(point) == (2,) for point in polygon))
        rings = [np.asarray(ring, np.float64) for ring in ([polygon] if one else polygon)]
        usable = [ring.size >= 6 and (ring.ndim == 1 or ring.shape[1:] == (2,)) and np.isfinite(ring).all() for ring in rings]
        if not all(usable):
            raise ValueError
        rings = [segmentation.oriented(ring.reshape(-1, 2)) for ring in rings]
    except (TypeError, ValueError, LookupError, ArithmeticError):
        a_ring = "a ring (finite [V, 2] with V >= 3, or x, y, x, y, ...)"
        raise InputError(f"make_instances: 'polygons[{index}]' is neither {a_ring} nor a list of rings") from None
    return [ring for ring in rings if ring is not None]


def _numbers(value, name, shape):
    try:
        numbers = np.asarray(value, np.float64)
    except (TypeError, ValueError, ArithmeticError):
        raise InputError(f"make_instances: '{name}' is not an array of numbers") from None
    if numbers.shape != shape and not (shape[0] == 0 and numbers.size == 0):
        raise InputError(f"make_instances: '{name}' has the shape {list(numbers.shape)}, not {list(shape)}")
    if not np.isfinite(numbers).all():
        raise InputError(f"make_instances: '{name}' has numbers that are not finite")
    return numbers.reshape(shape)
