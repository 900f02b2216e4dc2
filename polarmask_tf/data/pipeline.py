"""Records to batches that the training step takes."""

from __future__ import annotations

import tensorflow as tf

from polarmask_tf import geometry
from polarmask_tf.config import Config
from polarmask_tf.data import records, transforms


def prepare(record: dict, config: Config, info: records.DatasetInfo, seed) -> tuple[tf.Tensor, dict]:
    """One training example: decode, place image and vertices on the canvas, list the instances.

    Returns:
      uint8 [H, W, 3] and the instances, see targets.encode. A pure function of the record and `seed` (int [2]).
    """
    data = config.data
    canvas = data.crop or data.size
    image = tf.io.decode_image(record["image/encoded"], channels=3, expand_animations=False)
    image = tf.ensure_shape(image, [None, None, 3])
    placement = transforms.sample(
        record["height"], record["width"], data.size, canvas, flip=data.flip, scale=data.scale, seed=seed
    )
    xy = transforms.place_points(record["xy"], placement)
    instances = transforms.instances(
        record, xy, placement["window"], max_edges=info.max_edges,
        max_instances=max(1, min(data.max_instances, info.max_instances)),
        parts=config.targets.parts, center=config.targets.center,
    )
    points = tf.concat([geometry.locations(*canvas, 2**level) for level in config.model.fpn.levels], axis=0)
    instances["ignore"] = transforms.crowd_locations(record, xy, points, info.max_edges)
    return transforms.place_image(image, placement, canvas), instances


def training_batches(info: records.DatasetInfo, config: Config, *, seed: int = 0, start_step: int = 0) -> tf.data.Dataset:
    """Endless batches (images uint8 [B, H, W, 3], instances), shuffled and augmented.

    Batch k is a function of seed and k alone: every epoch has its own permutation and every example its own random
    numbers. Starting at a later step skips serialized records, before anything is decoded.
    """
    data = config.data
    paths = [str(path) for path in info.shard_paths]

    def shuffled(values, *key):
        return tf.data.Dataset.from_tensor_slices(tf.random.experimental.stateless_shuffle(values, tf.stack(key)))

    def epoch(number):
        # Not Dataset.shuffle: its order hangs on the global seed and on how often it was iterated before.
        key = tf.constant(seed, tf.int64) * 1_000_003 + number
        examples = shuffled(paths, key, tf.constant(-1, tf.int64)).interleave(tf.data.TFRecordDataset, cycle_length=4)
        blocks = examples.batch(data.shuffle).enumerate()
        return blocks.flat_map(lambda block, serialized: shuffled(serialized, key, block))

    examples = tf.data.Dataset.range(2**40).flat_map(epoch).enumerate().skip(start_step * data.batch)
    examples = examples.map(
        lambda index, serialized: prepare(
            records.parse(serialized), config, info, tf.stack([tf.constant(seed, tf.int64), index])
        ),
        num_parallel_calls=tf.data.AUTOTUNE, deterministic=True,
    )
    return examples.batch(data.batch, drop_remainder=True).prefetch(tf.data.AUTOTUNE)
