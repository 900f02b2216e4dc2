"""Which locations of a network learn the objects of an image: ops.targets without what they are to learn."""

from __future__ import annotations

import typing

import numpy as np
import tensorflow as tf

from polarmask_tf import lite
from polarmask_tf.config import Config
from polarmask_tf.data import transforms
from polarmask_tf.data.instances import record_of
from polarmask_tf.ops import targets

_ALONE = 256  # objects of an image that are looked at alone; what is beyond counts as too small


class Place(typing.NamedTuple):
    """Which locations learn the K objects of an image, placed whole into the network's input as at inference."""

    learned: np.ndarray  # bool [K]
    alone: np.ndarray  # bool [K], whether some would if there were no other object
    points: np.ndarray  # float32 [P, 2], x, y of the locations that learn one, pixels of the image
    owners: np.ndarray  # int [P], which
    levels: np.ndarray  # int [P]


def locator(config: Config, max_edges: int, max_instances: int) -> typing.Callable[[dict], Place]:
    """A function from an image as ceiling.read gives it."""
    data, levels = config.data, config.model.fpn.levels
    ranges = config.targets.ranges or tuple(targets.scaled_bounds(levels, data.size))
    options = {"levels": levels, "radius": config.targets.radius, "ranges": None if config.targets.match == "cost" else ranges}
    specs = {name: tf.TensorSpec([None], tf.int32) for name in ("labels", "ring_lengths", "ring_instance")}
    specs |= {"is_crowd": tf.TensorSpec([None], tf.bool), "xy": tf.TensorSpec([None, 2])}
    vector = tf.TensorSpec([2], tf.int32)

    @tf.function(input_signature=[specs, vector, vector, vector], autograph=False)
    def assign(record, source, window, canvas):
        placement = {"flip": [False, False], "offset": [0, 0], "crop": source, "window": window}
        found = transforms.instances(
            record,
            transforms.place_points(record["xy"], placement),
            window,
            tf.zeros([0, 2]),
            max_edges=max_edges,
            max_instances=max_instances,
            parts=config.targets.parts,
            center=config.targets.center,
        )
        boxes, centers, numbers = (found[name] for name in ("boxes", "centers", "classes"))
        size = tuple(tf.unstack(canvas))
        owner = targets.assign(boxes[tf.newaxis], centers[tf.newaxis], numbers[tf.newaxis] >= 0, size=size, **options)[0]
        kept = tf.reduce_sum(tf.cast(numbers >= 0, tf.int32))
        lost = tf.sets.difference(tf.range(kept)[tf.newaxis], tf.unique(owner)[0][tf.newaxis]).values[:_ALONE]
        one, middle = tf.gather(boxes, lost)[:, tf.newaxis], tf.gather(centers, lost)[:, tf.newaxis]
        alone = targets.assign(one, middle, tf.ones_like(one[..., 0], tf.bool), size=size, **options)
        return numbers, owner, tf.boolean_mask(lost, tf.reduce_any(alone >= 0, axis=-1))

    def locate(image) -> Place:
        count, source = len(image["annotations"]), (image["height"], image["width"])
        window, canvas = lite.fit_sizes(*source, data.size, data.fit)
        record = record_of([annotation["rings"] for annotation in image["annotations"]])
        order, owner, hidden = (x.numpy() for x in assign(record, np.int32(source), np.int32(window), np.int32(canvas)))
        grids = [_grid(canvas, level) for level in levels]
        at = np.flatnonzero(owner >= 0)
        learned, alone = np.zeros(count, bool), np.zeros(count, bool)
        learned[order[owner[at]]] = True
        alone[order[hidden]] = True
        points = np.concatenate(grids)[at] * (np.float32(source[::-1]) / np.float32(window[::-1]))
        level = np.repeat(levels, [len(grid) for grid in grids])[at]
        return Place(learned, alone | learned, points, order[owner[at]], level)

    return locate


def _grid(canvas, level) -> np.ndarray:
    """geometry.locations of a level, in NumPy."""
    rows, columns = (-(-side // 2**level) for side in canvas)
    y, x = np.mgrid[:rows, :columns]
    return (np.stack([x, y], -1).reshape(-1, 2).astype(np.float32) + 0.5) * 2**level
