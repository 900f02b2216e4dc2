"""Records to batches that the training step takes."""

from __future__ import annotations

import dataclasses
import random
import sys

import tensorflow as tf
from tqdm import tqdm

from polarmask_tf.config import Config, input_size
from polarmask_tf.data import records, transforms
from polarmask_tf.errors import InputError
from polarmask_tf.ops import geometry

# Nothing here branches on tensors, and AutoGraph would take seconds of every start to find that out.
_no_autograph = tf.autograph.experimental.do_not_convert
_TOO_FEW = "too few records for an epoch"  # by these words in an error `explain` knows what it is


def training_batches(
    info: records.DatasetInfo,
    config: Config,
    *,
    seed: int = 0,
    start_step: int = 0,
    worker: int = 0,
    workers: int = 1,
    replicas: int = 1,
) -> tf.data.Dataset:
    """Endless batches (images uint8 [b, H, W, 3], instances), shuffled and augmented, for the replicas of one worker.

    A step takes data.batch = B examples over all `replicas`, of which each `worker` of `workers` has equally many. What
    comes out are the batches of this worker's replicas, one after the other, each of b = B / replicas examples; those of
    the next step follow. Replica r has the examples [r * b, (r + 1) * b) of the step.

    The examples of step k are a function of seed and k alone, whatever the layout (with data.sharding: file they hang on
    `workers` too): every epoch has its own permutation and every example its own random numbers. Only serialized records
    are read of what belongs to other workers, or to steps of this epoch before `start_step`; nothing of it is decoded.

    With data.fit: short_side a step holds images of one orientation (data.sharding: file: one on each worker). With it,
    or with data.sizes, H and W are None in the element spec.

    Raises InputError if the batch cannot be divided, or data.sharding: file leaves a worker without records.
    """
    data = config.data
    if data.batch % replicas:
        raise InputError(f"data.batch is {data.batch}: not divisible by {replicas} replicas; choose a multiple of that")
    sizes = tf.constant(data.sizes) if data.sizes else None

    @_no_autograph
    def example(index, serialized):
        size = None
        if sizes is not None:
            # The same for the whole step; below zero no example has its seed.
            key = tf.stack([tf.constant(seed, tf.int64), -1 - index // data.batch])
            size = sizes[tf.random.stateless_uniform([], key, 0, len(data.sizes), tf.int32)]
        return prepare(records.parse(serialized), config, info, tf.stack([tf.constant(seed, tf.int64), index]), size)

    examples = _examples(info, config, seed, start_step, worker, workers)
    examples = examples.map(example, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
    return examples.batch(data.batch // replicas, drop_remainder=True).prefetch(tf.data.AUTOTUNE)


def prepare(record: dict, config: Config, info: records.DatasetInfo, seed, size=None) -> tuple[tf.Tensor, dict]:
    """One training example: decode, place image and vertices on the canvas, list the instances.

    Returns:
      uint8 [H, W, 3] and the instances, see targets.encode. A pure function of the record, `seed` (int [2]) and `size`
      (int [2], in place of data.size). With data.fit: short_side the canvas stands if the image does; then, and with a
      `size`, H and W are known when the graph runs, not before.
    """
    data, levels = config.data, config.model.fpn.levels
    if size is not None:
        data = dataclasses.replace(data, size=tuple(tf.unstack(size)))
    whole = data.crop or input_size(data)
    points = _locations(whole, levels)
    if data.fit == "short_side":
        standing = record["height"] > record["width"]
        points = tf.where(standing, _locations(whole[::-1], levels), points)  # as many, level by level
        whole = tf.where(standing, whole[::-1], whole)
    elif size is not None:
        whole = size
    image = tf.io.decode_image(record["image/encoded"], channels=3, expand_animations=False)
    image = tf.ensure_shape(image, [None, None, 3])
    placement = transforms.sample(
        record["height"], record["width"], data.size, whole, fit=data.fit, flip=data.flip, scale=data.scale, seed=seed
    )
    xy = transforms.place_points(record["xy"], placement)
    instances = transforms.instances(
        record,
        xy,
        placement["window"],
        max_edges=info.max_edges,
        max_instances=max(1, min(data.max_instances, info.max_instances)),
        parts=config.targets.parts,
        center=config.targets.center,
    )
    instances["ignore"] = transforms.crowd_locations(record, xy, points, info.max_edges)
    return transforms.place_image(image, placement, whole), instances


def _locations(size, levels):
    def make():
        return tf.concat([geometry.locations(*size, 2**level) for level in levels], axis=0)

    if not all(isinstance(side, int) for side in size):
        return make()
    with tf.init_scope(), tf.device("CPU"):  # made here and now, not once an example
        points = make().numpy()
    return tf.constant(points)


def _examples(info, config, seed, start_step, worker, workers) -> tf.data.Dataset:
    """Endless (index int64, serialized record) of one worker, from start_step on. `index` counts the examples of all steps.

    Every epoch is the same number of examples, even if a shard lost some of its records: so the arithmetic of a late
    start needs no reading of earlier epochs. An epoch's records are shuffled in blocks of data.shuffle.
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
    read = _reader(data.damaged)

    def length(block):  # in examples, of a block of so many records
        # The batches of n records in two groups, the last of each group filled, are (n - 2) // batch + 2 at most.
        return ((block - 2) // batch + 2) * batch if data.fit == "short_side" and block else block

    epoch_length = count // data.shuffle * length(data.shuffle) + length(count % data.shuffle)
    start = start_step * batch
    seed = tf.constant(seed, tf.int64)

    @_no_autograph
    def epoch(number):
        # Not Dataset.shuffle: its order hangs on the global seed and on how often it was iterated before.
        shards = tf.data.Dataset.from_tensor_slices(_shuffled(paths, seed * 1_000_003 + number, tf.constant(-1, tf.int64)))
        found = shards.interleave(read, cycle_length=4)
        if data.damaged == "skip":
            found = found.repeat()  # what is lost is made up for
        found = found.concatenate(_no_more(info)).take(count)
        return found.batch(data.shuffle).enumerate().map(lambda block, serialized: (number, block, serialized))

    @_no_autograph
    def ordered(number, block, serialized):
        """The block with the places in it that this worker's examples come from, and their indices."""
        key = seed * 1_000_003 + number
        order = _shuffled(tf.range(tf.size(serialized)), key, block)
        if data.fit == "short_side":
            order = _by_orientation(serialized, order, batch, tf.stack([key, -2 - block]))
        index = number * epoch_length + block * length(data.shuffle) + tf.range(tf.size(order, tf.int64))
        if data.sharding == "file":
            mine = index >= start
            index = index // share * data.batch + worker * share + index % share
        else:
            mine = (index >= start) & (index % data.batch // share == worker)
        return serialized, index[mine], order[mine]

    @_no_autograph
    def one_by_one(serialized, indices, places):
        each = tf.data.Dataset.from_tensor_slices((indices, places))
        return each.map(lambda index, place: (index, serialized[place]))

    blocks = tf.data.Dataset.range(start // epoch_length, 2**40).flat_map(epoch)
    return blocks.map(ordered).prefetch(1).flat_map(one_by_one)  # the next block is read while this one is used


def _shuffled(values, *key):
    return tf.random.experimental.stateless_shuffle(values, tf.stack(key))


def _by_orientation(serialized: tf.Tensor, order: tf.Tensor, batch: int, key: tf.Tensor) -> tf.Tensor:
    """`order`, places of the serialized records [n], so that every `batch` all lie or all stand; batches shuffled by key.

    So that no record is lost the last batch of either kind is filled with some of that kind a second time. So that the
    length, ((n - 2) // batch + 2) * batch, hangs on n alone, some batches may come a second time, at the end.
    """
    sides = {side: tf.io.FixedLenFeature([], tf.int64) for side in ("image/height", "image/width")}
    sides = tf.io.parse_example(serialized, sides)
    standing = tf.gather(sides["image/height"] > sides["image/width"], order)
    batches = []
    for chosen in (~standing, standing):
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
        raise InputError(
            f"{info.directory}: {len(paths)} shards for {workers} workers, too few for data.sharding: file; "
            f"run `polarmask convert --shards N` with N of {workers} or more, or set data.sharding=data"
        )
    own = random.Random(seed).sample(range(len(paths)), len(paths))[worker::workers]
    return [paths[number] for number in sorted(own)]


def _count(paths, damaged):
    count = 0
    for path in paths:
        try:
            count += records.count_records(path)
        except OSError as error:
            if damaged == "fail":
                raise InputError(f"{path}: cannot be read ({error.strerror}); {records.REPAIR_HINT}") from None
    return count


def _reader(damaged):
    """A function from a path to the dataset of its records."""
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

    return tf.data.Dataset.from_tensors(f"{info.directory}: {_TOO_FEW}").map(fail)


def explain(
    error: tf.errors.OpError,
    info: records.DatasetInfo,
    config: Config,
    *,
    seed: int,
    step: int,
    worker: int = 0,
    workers: int = 1,
) -> InputError | None:
    """What in the data made the batches fail with `error` at `step`, as one line; None if it was something else.

    A damaged shard is found by reading shards until one fails, an image that cannot be decoded by decoding those of the
    32 steps from `step` on. The other arguments are those of training_batches.
    """
    if _TOO_FEW in error.message:
        found = "no record can be read" if config.data.damaged == "skip" else "shards hold fewer records than dataset.json says"
        return InputError(f"{info.directory}: {found} ({info.num_images}); run `polarmask convert` again")
    if isinstance(error, tf.errors.InvalidArgumentError):
        return _find_undecodable(info, config, seed, step, worker, workers)
    if isinstance(
        error,
        (
            tf.errors.DataLossError,
            tf.errors.NotFoundError,
            tf.errors.PermissionDeniedError,
            tf.errors.UnknownError,
            tf.errors.FailedPreconditionError,
        ),
    ):
        for path in info.shard_paths:
            try:
                for _ in records.read_shard(path):
                    pass
            except records.DamagedShard as damage:
                return InputError(f"{damage}; {records.REPAIR_HINT}")
    return None


def _find_undecodable(info, config, seed, step, worker, workers):
    examples = _examples(info, config, seed, step, worker, workers).take(32 * config.data.batch // workers)
    try:
        for _, serialized in examples:
            try:
                record = records.parse(serialized)
            except tf.errors.InvalidArgumentError:
                return InputError(f"{info.directory}: holds a record that `polarmask convert` did not write; convert again")
            try:
                tf.io.decode_image(record["image/encoded"], channels=3, expand_animations=False)
            except tf.errors.InvalidArgumentError:
                name = tf.train.Example.FromString(serialized.numpy()).features.feature["image/filename"].bytes_list.value
                number, name = record["source_id"].numpy().decode(), b"".join(name).decode(errors="replace")
                return InputError(
                    f"{info.directory}: image {number} ({name}) cannot be decoded; "
                    "run `polarmask convert --verify` again, which leaves such images out"
                )
    except tf.errors.OpError:  # a damaged shard, which will stop the training when it gets there
        return None
    return None
