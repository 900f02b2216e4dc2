"""Records to batches that the training step takes."""

from __future__ import annotations

import tensorflow as tf

from polarmask_tf import geometry
from polarmask_tf.config import Config, canvas
from polarmask_tf.data import records, transforms


def prepare(record: dict, config: Config, info: records.DatasetInfo, seed) -> tuple[tf.Tensor, dict]:
    """One training example: decode, place image and vertices on the canvas, list the instances.

    Returns:
      uint8 [H, W, 3] and the instances, see targets.encode. A pure function of the record and `seed` (int [2]). With
      data.fit: short_side the canvas stands if the image does; then H and W are known when the graph runs, not before.
    """
    data = config.data
    size = data.crop or canvas(data)
    points = _locations(size, config.model.fpn.levels)
    if data.fit == "short_side":
        standing = record["height"] > record["width"]
        points = tf.where(standing, _locations(size[::-1], config.model.fpn.levels), points)  # as many, level by level
        size = tf.where(standing, size[::-1], size)
    image = tf.io.decode_image(record["image/encoded"], channels=3, expand_animations=False)
    image = tf.ensure_shape(image, [None, None, 3])
    placement = transforms.sample(
        record["height"], record["width"], data.size, size, fit=data.fit, flip=data.flip, scale=data.scale, seed=seed
    )
    xy = transforms.place_points(record["xy"], placement)
    instances = transforms.instances(
        record, xy, placement["window"], max_edges=info.max_edges,
        max_instances=max(1, min(data.max_instances, info.max_instances)),
        parts=config.targets.parts, center=config.targets.center,
    )
    instances["ignore"] = transforms.crowd_locations(record, xy, points, info.max_edges)
    return transforms.place_image(image, placement, size), instances


def _locations(size, levels):
    return tf.concat([geometry.locations(*size, 2**level) for level in levels], axis=0)


def _by_orientation(serialized: tf.Tensor, batch: int, key: tf.Tensor) -> tf.Tensor:
    """Serialized records [n] in an order in which every `batch` of them all lie or all stand; batches are shuffled by key.

    So that no record is lost the last batch of either kind is filled with some of that kind a second time.
    """
    sides = {side: tf.io.FixedLenFeature([], tf.int64) for side in ("image/height", "image/width")}
    sides = tf.io.parse_example(serialized, sides)
    standing = sides["image/height"] > sides["image/width"]
    batches = []
    for chosen in (~standing, standing):
        group = tf.boolean_mask(serialized, chosen)
        count = tf.size(group)
        filled = tf.range(-(-count // batch) * batch) % tf.maximum(count, 1)
        batches.append(tf.reshape(tf.gather(group, filled), [-1, batch]))
    batches = tf.random.experimental.stateless_shuffle(tf.concat(batches, axis=0), key)
    return tf.reshape(batches, [-1])


def training_batches(info: records.DatasetInfo, config: Config, *, seed: int = 0, start_step: int = 0) -> tf.data.Dataset:
    """Endless batches (images uint8 [B, H, W, 3], instances), shuffled and augmented.

    Batch k is a function of seed and k alone: every epoch has its own permutation and every example its own random
    numbers. Starting at a later step skips serialized records, before anything is decoded. With data.fit: short_side a
    batch holds images of one orientation, and H and W are None in the element spec.
    """
    data = config.data
    paths = [str(path) for path in info.shard_paths]

    def shuffled(values, *key):
        return tf.random.experimental.stateless_shuffle(values, tf.stack(key))

    def shuffled_block(serialized, key, block):
        serialized = shuffled(serialized, key, block)
        if data.fit == "short_side":
            serialized = _by_orientation(serialized, data.batch, tf.stack([key, -2 - block]))
        return tf.data.Dataset.from_tensor_slices(serialized)

    def epoch(number):
        # Not Dataset.shuffle: its order hangs on the global seed and on how often it was iterated before.
        key = tf.constant(seed, tf.int64) * 1_000_003 + number
        shards = tf.data.Dataset.from_tensor_slices(shuffled(paths, key, tf.constant(-1, tf.int64)))
        blocks = shards.interleave(tf.data.TFRecordDataset, cycle_length=4).batch(data.shuffle).enumerate()
        return blocks.flat_map(lambda block, serialized: shuffled_block(serialized, key, block))

    examples = tf.data.Dataset.range(2**40).flat_map(epoch).enumerate().skip(start_step * data.batch)
    examples = examples.map(
        lambda index, serialized: prepare(
            records.parse(serialized), config, info, tf.stack([tf.constant(seed, tf.int64), index])
        ),
        num_parallel_calls=tf.data.AUTOTUNE, deterministic=True,
    )
    return examples.batch(data.batch, drop_remainder=True).prefetch(tf.data.AUTOTUNE)
