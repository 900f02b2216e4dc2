"""Which example comes when: shuffling, sharing out among workers, batches of one orientation, and going on in the middle.

All of it is a function of seed and step, so nothing has to be kept to go on after an interruption.
"""

from __future__ import annotations

import random
import sys

import tensorflow as tf
from tqdm import tqdm

from polarmask_tf.config import Config
from polarmask_tf.data import records
from polarmask_tf.data.dataset import DatasetInfo
from polarmask_tf.errors import InputError
from polarmask_tf.files import io_error_text

# Nothing here branches on tensors, and AutoGraph would take seconds of every start to find that out.
no_autograph = tf.autograph.experimental.do_not_convert
TOO_FEW = "too few records for an epoch"  # by these words in an error it is known


def examples(info: DatasetInfo, config: Config, seed: int, start_step=0, worker: int = 0, workers: int = 1) -> tf.data.Dataset:
    """Endless (index int64, serialized record) of one worker, from start_step (int or tensor) on.

    `index` counts the examples of all steps. Every epoch is the same number of examples, even if a shard lost some of its
    records: so the arithmetic of a late start needs no reading of earlier epochs. An epoch's records are shuffled in blocks of
    data.shuffle. Raises InputError where data.sharding: file leaves a worker without records.
    """
    data, share = config.data, config.data.batch // workers
    if data.sharding == "file":
        paths, batch = _own_shards(info, seed, worker, workers), share
        count = _count(paths, data.damaged)
    else:
        paths, batch, count = info.shard_paths, data.batch, info.num_images
    if not count:
        raise InputError(f"{info.directory}: no records for worker {worker}; run `polarmask convert` again")
    paths = [str(path) for path in paths]
    read = reader(data.damaged)

    block_length, epoch_length = _lengths(config.data, count, batch)
    start = start_step * batch
    seed = tf.constant(seed, tf.int64)

    @no_autograph
    def epoch(number):
        # Not Dataset.shuffle: its order depends on the global seed and on how often it was iterated before.
        shards = tf.data.Dataset.from_tensor_slices(_shuffled(paths, seed * 1_000_003 + number, tf.constant(-1, tf.int64)))
        found = shards.interleave(read, cycle_length=4)
        if data.damaged == "skip":
            found = found.repeat()  # what is lost is made up for
        found = found.concatenate(_no_more(info)).take(count)
        return found.batch(data.shuffle).enumerate().map(lambda block, serialized: (number, block, serialized))

    @no_autograph
    def ordered(number, block, serialized):
        """The block with the places in it that this worker's examples come from, and their indices."""
        key = seed * 1_000_003 + number
        order = _shuffled(tf.range(tf.size(serialized)), key, block)
        if data.fit == "short_side":
            order = _by_orientation(serialized, order, batch, tf.stack([key, -2 - block]))
        index = number * epoch_length + block * block_length + tf.range(tf.size(order, tf.int64))
        if data.sharding == "file":
            mine = index >= start
            index = index // share * data.batch + worker * share + index % share
        else:
            mine = (index >= start) & (index % data.batch // share == worker)
        return serialized, index[mine], order[mine]

    @no_autograph
    def one_by_one(serialized, indices, places):
        each = tf.data.Dataset.from_tensor_slices((indices, places))
        return each.map(lambda index, place: (index, serialized[place]))

    blocks = tf.data.Dataset.range(start // epoch_length, 2**40).flat_map(epoch)
    return blocks.map(ordered).prefetch(1).flat_map(one_by_one)  # the next block is read while this one is used


def epoch_steps(info: DatasetInfo, config: Config) -> int:
    """Whole steps that one epoch of the order is good for, at least one."""
    return max(1, _lengths(config.data, info.num_images, config.data.batch)[1] // config.data.batch)


def _lengths(data, count, batch):
    """Examples of a whole block of records, and of an epoch of `count` records."""

    def length(block):
        # The batches of n records in two groups, the last of each group filled, are (n - 2) // batch + 2 at most.
        return ((block - 2) // batch + 2) * batch if data.fit == "short_side" and block else block

    return length(data.shuffle), count // data.shuffle * length(data.shuffle) + length(count % data.shuffle)


def _shuffled(values, *key):
    return tf.random.experimental.stateless_shuffle(values, tf.stack(key))


def _by_orientation(serialized: tf.Tensor, order: tf.Tensor, batch: int, key: tf.Tensor) -> tf.Tensor:
    """`order`, places of the serialized records [n], so that every `batch` is landscape or portrait; these shuffled by key.

    So that no record is lost the last batch of either kind is filled with some of that kind a second time. So that the
    length, ((n - 2) // batch + 2) * batch, depends on n alone, some batches may come a second time, at the end.
    """
    sides = {side: tf.io.FixedLenFeature([], tf.int64) for side in ("image/height", "image/width")}
    sides = tf.io.parse_example(serialized, sides)
    portrait = tf.gather(sides["image/height"] > sides["image/width"], order)
    batches = []
    for chosen in (~portrait, portrait):
        group = tf.boolean_mask(order, chosen)
        count = tf.size(group)
        filled = tf.range(-(-count // batch) * batch) % tf.maximum(count, 1)
        batches.append(tf.reshape(tf.gather(group, filled), [-1, batch]))
    batches = tf.random.experimental.stateless_shuffle(tf.concat(batches, axis=0), key)
    rows = tf.range((tf.size(order) - 2) // batch + 2) % tf.shape(batches)[0]
    return tf.reshape(tf.gather(batches, rows), [-1])


def _own_shards(info, seed, worker, workers):
    paths = info.shard_paths
    if len(paths) < workers:
        few = f"{len(paths)} shards for {workers} workers, too few for data.sharding: file"
        advice = f"run `polarmask convert --shards N` with N of {workers} or more, or set data.sharding=data"
        raise InputError(f"{info.directory}: {few}; {advice}")
    own = random.Random(seed).sample(range(len(paths)), len(paths))[worker::workers]
    return [paths[number] for number in sorted(own)]


def _count(paths, damaged):
    count = 0
    for path in paths:
        try:
            count += records.count_records(path)
        except OSError as error:
            if damaged == "fail":
                raise InputError(f"{path}: cannot be read ({io_error_text(error)}); {records.REPAIR_HINT}") from None
    return count


def reader(damaged):
    """A function from a shard's path to the dataset of its records; see DataConfig.damaged."""
    if damaged == "fail":
        return tf.data.TFRecordDataset
    told = set()

    def readable(path):
        path = path.decode()
        try:
            yield from records.read_shard(path)
        except records.DamagedShard as error:
            if path not in told:
                told.add(path)
                tqdm.write(f"warning: {error}; its rest is left out (data.damaged: skip)", file=sys.stderr)

    one = tf.TensorSpec([], tf.string)
    return lambda path: tf.data.Dataset.from_generator(readable, args=(path,), output_signature=one)


def _no_more(info) -> tf.data.Dataset:
    """Fails when an element is asked for."""

    def fail(text):
        with tf.control_dependencies([tf.debugging.Assert(False, [text])]):
            return tf.identity(text)

    return tf.data.Dataset.from_tensors(f"{info.directory}: {TOO_FEW}").map(fail)
