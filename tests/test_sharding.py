"""data/pipeline.py over workers and replicas: the same batches whatever the layout, and after any interruption."""

import numpy as np
import pytest
import tensorflow as tf

from helpers.shards import SHORT, SIZES, config_of, ids, take, traced_once, write  # noqa: F401
from polarmask_tf.data import order, pipeline, records
from polarmask_tf.errors import InputError

pytestmark = pytest.mark.usefixtures("traced_once")

SMALL = {"size": (32, 64), "flip": "both", "scale": (0.6, 1.3)}
OPTIONS = {
    "letterbox": {**SMALL, "shuffle": 4},
    "stretch, sizes": {**SMALL, "fit": "stretch", "sizes": ((32, 64), (64, 64), (64, 32)), "shuffle": 5},
    "short_side, sizes": {**SHORT, "flip": "both", "sizes": ((20, 40), (40, 70), (48, 90)), "shuffle": 6},
}


@pytest.fixture(scope="module")
def info(tmp_path_factory):
    return write(tmp_path_factory.mktemp("data"), SIZES)


def assert_same(one, other):
    tf.nest.map_structure(np.testing.assert_array_equal, one, other)


def joined(info, steps, workers, replicas, *, seed=5, start_step=0, **data):
    """The steps' batches, put together from the batches of all replicas of all workers; the parts' sizes are checked."""
    config = config_of(**data)
    streams = [
        pipeline.training_batches(
            info, config, seed=seed, start_step=start_step, worker=worker, workers=workers, replicas=replicas
        ).as_numpy_iterator()
        for worker in range(workers)
    ]
    batches = []
    for _ in range(steps):
        parts = [next(stream) for stream in streams for _ in range(replicas // workers)]
        assert {len(images) for images, _ in parts} == {config.data.batch // replicas}
        batches.append(tf.nest.map_structure(lambda *values: np.concatenate(values), *parts))
    return batches


def drawn(info, count, *, seed=5, start_step=0, worker=0, workers=1, **data):
    """(index, image number) of a worker's next examples, which depend on nothing else: the cheap half of a pipeline."""
    examples = order.examples(info, config_of(**data), seed, start_step, worker, workers).take(count)
    features = [(index, tf.train.Example.FromString(data).features.feature) for index, data in examples.as_numpy_iterator()]
    return [(int(index), int(feature["image/source_id"].bytes_list.value[0])) for index, feature in features]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_layout_gives_the_same_batches(info, options):
    """Steps 2 to 7 of 4 examples each: with 11 images, over an epoch's border or two."""
    options = {"batch": 4, **options}
    whole = take(info, 6, start_step=2, **options)
    for workers, replicas in ((1, 2), (2, 2), (2, 4)) if options == OPTIONS["letterbox"] else ((2, 4),):
        assert_same(joined(info, 6, workers, replicas, start_step=2, **options), whole)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_resumed_stream_is_the_straight_one(info, options):
    straight = take(info, 12, batch=3, **options)
    assert_same(take(info, 5, batch=3, start_step=7, **options), straight[7:])  # an epoch is 11/3 or 6 steps


@pytest.mark.parametrize("fit", [{}, SHORT], ids=["letterbox", "short_side"])
@pytest.mark.parametrize("sharding", ["data", "file"])
def test_examples_are_resumed_at_any_step(info, fit, sharding):
    options = {**fit, "batch": 4, "shuffle": 4, "sharding": sharding, "worker": 1, "workers": 2}
    straight = drawn(info, 28, **options)
    assert [index for index, _ in straight] == [k for k in range(56) if k % 4 >= 2]
    for start in (2, 6, 13):
        assert drawn(info, 28 - 2 * start, start_step=start, **options) == straight[2 * start :]
    far = drawn(info, 4, start_step=10**9, **options)  # by arithmetic: reading would take weeks
    assert far[0][0] == 4 * 10**9 + 2
    assert drawn(info, 2, start_step=10**9 + 1, **options) == far[2:]


def test_an_image_that_is_skipped_is_not_decoded(tmp_path):
    """One undecodable image in the first step: later steps, and workers that do not have it, never meet it."""
    info = write(tmp_path, SIZES, shards=2)
    options = {"batch": 4, "shuffle": 3}
    steps = [ids(images) for images, _ in take(info, 6, **options)]
    broken = steps[0][3]  # in the second worker's half
    seen_again = next(step for step in range(2, 6) if broken in steps[step])
    path = info.shard_paths[broken % 2]
    examples = [tf.train.Example.FromString(data) for data in records.read_shard(path)]
    examples[broken // 2].features.feature["image/encoded"].bytes_list.value[0] = b"no image"
    with open(path, "wb") as file:
        for example in examples:
            records.write_record(file, example.SerializeToString())
    assert [ids(images) for images, _ in take(info, seen_again - 1, start_step=1, **options)] == steps[1:seen_again]
    config = config_of(**options)
    first = pipeline.training_batches(info, config, seed=5, worker=0, workers=2, replicas=2)
    assert ids(next(iter(first))[0].numpy()) == steps[0][:2]
    with pytest.raises(tf.errors.InvalidArgumentError):
        next(iter(pipeline.training_batches(info, config, seed=5, worker=1, workers=2, replicas=2)))


def test_an_epoch_over_two_workers_holds_every_record_once(info):
    parts = [drawn(info, 22, batch=4, shuffle=4, worker=worker, workers=2) for worker in range(2)]
    examples = [number for _, number in sorted(parts[0] + parts[1])]
    for first in range(0, 44, 11):
        assert sorted(examples[first : first + 11]) == list(range(11))


@pytest.mark.parametrize("count, batch", [(1, 1), (1, 4), (2, 3), (5, 1), (5, 2), (8, 3), (9, 4), (10, 20)])
def test_blocks_of_either_orientation_have_a_length_of_their_own(count, batch):
    """As many batches for any mix of landscape and portrait images as the worst mix needs, and no image is lost."""
    most = max(-(-landscape // batch) + -(-(count - landscape) // batch) for landscape in range(count + 1))
    for landscape in range(count + 1):
        serialized = []
        for i in range(count):
            features = {"image/height": [1 if i < landscape else 2], "image/width": [1]}
            serialized.append(records._serialize(features))
        places = tf.random.experimental.stateless_shuffle(tf.range(count), [1, landscape])
        filled = order._by_orientation(tf.constant(serialized), places, batch, tf.constant([2, 3])).numpy()
        assert filled.shape == (most * batch,)
        assert set(filled) == set(range(count))
        assert all(len(set(rows < landscape)) == 1 for rows in filled.reshape(-1, batch))


def test_short_sided_epochs_are_of_one_length_and_lose_no_image(info):
    """Blocks of 6 and 5 records in batches of 2: ((6 - 2) // 2 + 2) + ((5 - 2) // 2 + 2) steps."""
    examples = [number for _, number in drawn(info, 4 * 14, batch=2, shuffle=6, **SHORT)]
    for first in range(0, 4 * 14, 14):
        assert set(examples[first : first + 14]) == set(range(11))


# ---- multi-scale


def test_sizes_change_from_step_to_step_and_not_within(info):
    sizes = ((32, 32), (64, 32), (64, 96))
    batches = pipeline.training_batches(info, config_of(sizes=sizes, batch=2), seed=5)
    shapes = [images.shape[1:3] for images, _ in batches.take(40).as_numpy_iterator()]
    assert min(shapes.count(size) for size in sizes) >= 5
    assert shapes != [images.shape[1:3] for images, _ in take(info, 40, batch=2, sizes=sizes, seed=6)]
    images, instances = batches.element_spec
    assert images.shape.as_list() == [2, None, None, 3] and instances["ignore"].shape.as_list() == [2, None]


@pytest.mark.parametrize("fit, size", [("letterbox", (64, 32)), ("short_side", (40, 70))])
def test_a_single_size_is_what_that_size_alone_gives(info, fit, size):
    expected = take(info, 4, fit=fit, **{**SMALL, "size": size})
    assert_same(take(info, 4, fit=fit, **{**SMALL, "size": (32, 128), "sizes": (size,)}), expected)


# ---- data.sharding: file


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    return write(tmp_path_factory.mktemp("many"), SIZES, shards=5)


def test_workers_read_files_of_their_own(many):
    """Each worker's epochs hold its own records once each; together they hold all. Seeds deal the files differently."""
    deals = set()
    for seed in range(3):
        owned = []
        for worker in range(2):
            examples = [n for _, n in drawn(many, 30, seed=seed, worker=worker, workers=2, batch=2, sharding="file")]
            mine = sorted(set(examples))
            assert all(sorted(examples[first : first + len(mine)]) == mine for first in range(0, 31 - len(mine), len(mine)))
            owned.append(mine)
        assert sorted(owned[0] + owned[1]) == list(range(11))
        deals.add(tuple(owned[0]))
    assert len(deals) > 1


def test_batches_by_file_have_one_size_a_step_and_the_replicas_of_a_worker_one_orientation(many):
    options = {**OPTIONS["short_side, sizes"], "batch": 4, "sharding": "file"}
    streams = [
        list(
            pipeline.training_batches(many, config_of(**options), seed=5, worker=worker, workers=2, replicas=4)
            .take(16)
            .as_numpy_iterator()
        )
        for worker in range(2)
    ]
    shapes = [[images.shape[1:3] for images, _ in stream] for stream in streams]
    for worker in shapes:
        assert worker[::2] == worker[1::2]
    assert [sorted(shape) for shape in shapes[0]] == [sorted(shape) for shape in shapes[1]]
    assert len(set(shapes[0] + shapes[1])) > 2


def test_one_worker_gets_by_file_what_it_gets_by_data(many):
    assert drawn(many, 50, sharding="file") == drawn(many, 50)


# ---- what cannot be divided


def test_a_batch_that_cannot_be_divided_is_refused(info):
    with pytest.raises(InputError, match=r"data\.batch is 16: not divisible by 3 replicas; choose a multiple"):
        pipeline.training_batches(info, config_of(batch=16), replicas=3)


def test_fewer_shards_than_workers_are_refused(info):
    with pytest.raises(InputError, match=r"3 shards for 4 workers.*polarmask convert --shards N.*4 or more"):
        pipeline.training_batches(info, config_of(batch=4, sharding="file"), workers=4, replicas=4)
