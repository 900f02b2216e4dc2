"""Records to batches that the training step takes."""

from __future__ import annotations

import dataclasses
import functools
import itertools

import tensorflow as tf

from polarmask_tf.config import Config, input_size
from polarmask_tf.data import dataset, order, records, transforms
from polarmask_tf.data.dataset import DatasetInfo
from polarmask_tf.data.order import no_autograph
from polarmask_tf.errors import InputError
from polarmask_tf.files import check_text
from polarmask_tf.ops import geometry

_UNREADABLE = (
    tf.errors.DataLossError,
    tf.errors.NotFoundError,
    tf.errors.PermissionDeniedError,
    tf.errors.UnknownError,
    tf.errors.FailedPreconditionError,
)
_UNUSABLE = (tf.errors.InvalidArgumentError, UnicodeDecodeError)  # the latter of TensorFlow's own message, which quotes bytes


def training_batches(
    info: DatasetInfo,
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

    The examples of step k are a function of seed and k alone, whatever the layout (with data.sharding: file they depend on
    `workers` too): every epoch has its own permutation and every example its own random numbers. Only serialized records
    are read of what belongs to other workers, or to steps of this epoch before `start_step`; nothing of it is decoded.

    With data.fit: short_side a step holds images of one orientation (data.sharding: file: one on each worker). With it,
    or with data.sizes, H and W are None in the element spec.

    Raises InputError if the batch cannot be divided, or data.sharding: file leaves a worker without records.
    """
    if config.data.batch % replicas:
        raise InputError(f"data.batch is {config.data.batch}: not divisible by {replicas} replicas; choose a multiple of that")
    examples = order.examples(info, config, seed, start_step, worker, workers)
    return _batches(examples, info, config, seed, config.data.batch // replicas)


def training_data(directory, config: Config, *, seed: int | None = None) -> tf.data.Dataset:
    """Finite batches (images uint8 [B, H, W, 3], instances) of converted data for `model.fit(data, epochs=...)`.

    Each time it is iterated, as Keras does for every epoch, it goes on in the endless order of `training_batches`: the
    batches of its epochs are those that `polarmask train` takes, every image comes before one comes again, and what an epoch
    leaves over begins the next. Its length is the number of whole batches of all images, at least one. Its `classes` are
    those of the data, as PolarMask takes them. `seed`: config.train.seed if None. Raises InputError for data that are not
    usable or hold no object.
    """
    info = _load_whole(directory, config)
    dataset.require_objects(info)
    seed = config.train.seed if seed is None else seed
    steps, iterations = order.epoch_steps(info, config), itertools.count()
    # The generator starts when a first batch is asked for: iterators that Keras makes and drops do not count.
    number = tf.data.Dataset.from_generator(lambda: [next(iterations)], output_signature=tf.TensorSpec([], tf.int64))

    @no_autograph
    def epoch(number):
        return order.examples(info, config, seed, number * steps).take(steps * config.data.batch)

    batches = _batches(number.flat_map(epoch), info, config, seed, config.data.batch)
    return _explained(batches.apply(tf.data.experimental.assert_cardinality(steps)), info, config, seed)


def validation_data(directory, config: Config) -> tf.data.Dataset:
    """Finite batches (images, instances) of converted data as they are stored, for `model.evaluate` and `validation_data`.

    No augmentation, the same each time, every image once; the last batch may be smaller. With data.fit: short_side, for
    which all records are looked at here, landscape images come first, so that batches are of one orientation. Raises
    InputError for data that are not usable.
    """
    info = _load_whole(directory, config)
    data = dataclasses.replace(config.data, flip="none", scale=(1.0, 1.0), color_jitter=0.0, crop=(), sizes=())
    config = dataclasses.replace(config, data=data)
    check_text(info.directory)
    stored = tf.data.Dataset.from_tensor_slices([str(path) for path in info.shard_paths]).flat_map(order.reader(data.damaged))

    @no_autograph
    def example(record):
        return prepare(record, config, info, [0, 0])

    def batches(parsed):
        return parsed.map(example, num_parallel_calls=tf.data.AUTOTUNE).batch(data.batch)

    parsed = stored.map(records.parse)
    groups = [parsed]
    if data.fit == "short_side":
        landscape, portrait = (lambda record: record["height"] <= record["width"]), (lambda r: r["height"] > r["width"])
        groups = [parsed.filter(no_autograph(landscape)), parsed.filter(no_autograph(portrait))]
    found = functools.reduce(tf.data.Dataset.concatenate, map(batches, groups)).prefetch(tf.data.AUTOTUNE)
    if data.damaged == "skip":
        return _explained(found, info, config)  # nobody knows how many there are
    counts = [info.num_images]
    if data.fit == "short_side":  # their sizes have to be looked at
        upright = sum(image["height"] > image["width"] for image, _ in records.iter_records(info))
        counts = [info.num_images - upright, upright]
    steps = sum(-(-count // data.batch) for count in counts)
    return _explained(found.apply(tf.data.experimental.assert_cardinality(steps)), info, config)


def _explained(batches: tf.data.Dataset, info: DatasetInfo, config: Config, seed: int = 0) -> tf.data.Dataset:
    """The same batches, which tell PolarMask.fit their classes and bit depth, and what of the data an error came from."""
    batches.classes, batches.bit_depth = info.classes, info.bit_depth
    batches.explain = functools.partial(explain, info=info, config=config, seed=seed)
    return batches


def _load_whole(directory, config):
    info = dataset.load(directory)
    if config.data.damaged == "fail":
        records.check_complete(info)
    return info


def _batches(examples, info, config, seed, size) -> tf.data.Dataset:
    """(index, serialized record) to batches of `size`; an example is a function of seed and index."""
    data = config.data
    sizes = tf.constant(data.sizes) if data.sizes else None

    @no_autograph
    def example(index, serialized):
        size = None
        if sizes is not None:
            # The same for the whole step; below zero no example has its seed.
            key = tf.stack([tf.constant(seed, tf.int64), -1 - index // data.batch])
            size = sizes[tf.random.stateless_uniform([], key, 0, len(data.sizes), tf.int32)]
        return prepare(records.parse(serialized), config, info, tf.stack([tf.constant(seed, tf.int64), index]), size)

    examples = examples.map(example, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
    return examples.batch(size, drop_remainder=True).prefetch(tf.data.AUTOTUNE)


def prepare(record: dict, config: Config, info: DatasetInfo, seed, size=None) -> tuple[tf.Tensor, dict]:
    """One training example: decode, place image and vertices on the canvas, list the instances.

    Returns:
      uint8 [H, W, 3] and the instances, see targets.INSTANCES. A pure function of the record, `seed` (int [2]) and `size`
      (int [2], in place of data.size). With data.fit: short_side the canvas stands if the image does; then, and with a
      `size`, H and W are known when the graph runs, not before.
    """
    data, levels = config.data, config.model.fpn.levels
    if size is not None:
        data = dataclasses.replace(data, size=tuple(tf.unstack(size)))
    canvas = data.crop or input_size(data)
    points = locations(canvas, levels)
    if data.fit == "short_side":
        portrait = record["height"] > record["width"]
        points = tf.where(portrait, locations(canvas[::-1], levels), points)  # as many, level by level
        canvas = tf.where(portrait, canvas[::-1], canvas)
    elif size is not None:
        canvas = size
    image = tf.io.decode_image(record["image/encoded"], channels=3, expand_animations=False)
    image = tf.ensure_shape(image, [None, None, 3])
    fault = records.fault(record, info, image)
    with tf.control_dependencies([tf.debugging.Assert(tf.equal(fault, ""), [fault, record["source_id"]])]):
        record = tf.nest.map_structure(tf.identity, record)
    placement = transforms.sample(
        record["height"], record["width"], data.size, canvas, fit=data.fit, flip=data.flip, scale=data.scale, seed=seed
    )
    instances = transforms.instances(
        record,
        transforms.place_points(record["xy"], placement),
        placement["window"],
        points,
        max_edges=info.max_edges,
        max_instances=max(1, min(data.max_instances, info.max_instances)),
        parts=config.targets.parts,
        center=config.targets.center,
    )
    recolor = functools.partial(transforms.jitter_color, strength=data.color_jitter, seed=seed) if data.color_jitter else None
    return transforms.place_image(image, placement, canvas, recolor), instances


def locations(size, levels) -> tf.Tensor:
    """Of all levels, float32 [L, 2], the lowest level first; see geometry.locations."""

    def make():
        return tf.concat([geometry.locations(*size, 2**level) for level in levels], axis=0)

    if not all(isinstance(side, int) for side in size):
        return make()
    with tf.init_scope(), tf.device("CPU"):  # made here and now, not once an example
        points = make().numpy()
    return tf.constant(points)


def explain(
    error: Exception,
    info: DatasetInfo,
    config: Config,
    *,
    seed: int,
    step: int,
    worker: int = 0,
    workers: int = 1,
) -> InputError | None:
    """What in the data made the batches fail with `error` at `step`, as one line; None if it was something else.

    `error` is a tf.errors.OpError, or the UnicodeDecodeError that TensorFlow makes of one whose text quotes bytes of a record.
    A damaged shard is found by reading shards until one fails, a record that cannot be used by looking at those of the 32
    steps from `step` on. The other arguments are those of training_batches.
    """
    found = None
    if order.TOO_FEW in str(error):
        reason = (
            "no record can be read" if config.data.damaged == "skip" else "shards hold fewer records than dataset.json says"
        )
        found = f"{info.directory}: {reason} ({info.num_images}); run `polarmask convert` again"
    elif isinstance(error, _UNUSABLE):
        found = _find_unusable(info, config, seed, step, worker, workers)
    elif isinstance(error, _UNREADABLE):
        found = _find_damaged(info)
    return InputError(dataset.converted_again(info) or found) if found else None


def _find_damaged(info):
    for path in info.shard_paths:
        try:
            for _ in records.read_shard(path):
                pass
        except records.DamagedShard as damage:
            return f"{damage}; {records.REPAIR_HINT}"
    return None


def _find_unusable(info, config, seed, step, worker, workers):
    examples = order.examples(info, config, seed, step, worker, workers).take(32 * config.data.batch // workers)
    try:
        for _, serialized in examples:
            try:
                record = records.parse(serialized)
            except _UNUSABLE:
                return f"{info.directory}: holds a record that `polarmask convert` did not write; convert again"
            number, name = (record[key].numpy().decode(errors="replace") for key in ("source_id", "filename"))
            where = f"{info.directory}: image {number} ({name})"
            try:
                image = tf.io.decode_image(record["image/encoded"], channels=3, expand_animations=False)
            except _UNUSABLE:
                return f"{where} cannot be decoded; run `polarmask convert --verify` again, which leaves such images out"
            if fault := records.fault(record, info, image).numpy().decode():
                return f"{where}: {fault}; run `polarmask convert` again"
    except tf.errors.OpError:  # a damaged shard, which will stop the training when it gets there
        return None
    return None
