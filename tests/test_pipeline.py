"""data/pipeline.py: batches of one orientation for data.fit: short_side; the other fits as they always were."""

import dataclasses
import io
import itertools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from PIL import Image

from helpers.shards import SHORT, SIZES, config_of, converted, ids, take, traced_once, write  # noqa: F401
from polarmask_tf import config as configs
from polarmask_tf.data import dataset, pipeline, records
from polarmask_tf.errors import InputError
from polarmask_tf.ops import geometry

STANDING = [1, 4, 7, 10]
LYING = [i for i in range(len(SIZES)) if i not in STANDING]


@pytest.fixture(scope="module")
def info(tmp_path_factory):
    return write(tmp_path_factory.mktemp("data"), SIZES)


# Printed by the version that knew no fit but the letterbox, for batches 1 to 6 of seed 5 by `shuffle`; these must stay.
ORDER = {
    2048: [[3, 6, 5, 9], [10, 0, 4, 6], [4, 2, 0, 3], [7, 8, 9, 10], [1, 5, 6, 10], [8, 9, 5, 4]],
    4: [[7, 4, 5, 6], [8, 10, 9, 2], [1, 0, 5, 6], [8, 3, 4, 9], [7, 10, 1, 0], [2, 5, 3, 7]],
}
WINDOWS = {2048: [[58, 19], [80, 64], [92, 61], [62, 44]], 4: [[27, 39], [27, 64], [92, 61], [44, 44]]}
CENTERS = {2048: [27.07, 42.67, 42.93, 33.07], 4: [12.60, 14.40, 42.93, 23.47]}  # x of the triangles in the first of them


@pytest.mark.parametrize("block", ORDER)
def test_letterboxed_batches_are_what_they_were(info, block):
    batches = take(info, 6, batch=4, start_step=1, shuffle=block, scale=(0.6, 1.3), flip="both")
    assert [ids(images) for images, _ in batches] == ORDER[block]
    first = batches[0][1]
    np.testing.assert_array_equal(first["window"], WINDOWS[block])
    np.testing.assert_allclose(first["centers"][:, 0, 0], CENTERS[block], atol=0.01)


@pytest.mark.parametrize("block", ORDER)
def test_stretched_batches_come_in_the_same_order_and_are_filled(info, block):
    batches = take(info, 6, batch=4, start_step=1, shuffle=block, fit="stretch")
    assert [ids(images) for images, _ in batches] == ORDER[block]
    for images, instances in batches:
        assert images.min() > 0  # no padding
        np.testing.assert_array_equal(instances["window"], [[96, 64]] * 4)
        sides = np.ptp(instances["boxes"][:, 0].reshape(-1, 2, 2), axis=1)
        np.testing.assert_allclose(sides, [[0.6 * 96, 0.7 * 64]] * 4, atol=0.01)  # the triangle's, of any image


def test_batches_hold_one_orientation_and_lose_no_image(info):
    for block in (2048, 6):
        batches = take(info, 60, shuffle=block, **SHORT)
        for images, instances in batches:
            standing = {number in STANDING for number in ids(images)}
            assert len(standing) == 1
            assert images.shape == ((3, 96, 64, 3) if standing == {True} else (3, 64, 96, 3))
            assert (instances["window"] <= images.shape[2:0:-1]).all()
        seen = np.bincount(np.concatenate([ids(images) for images, _ in batches]), minlength=11)
        assert seen.min() > 0
        if block == 2048:
            # 7 landscape images in 3 batches, 4 portrait ones in 2: 12 epochs of 5 batches, each image once or twice in each.
            for first in range(0, 60, 5):
                epoch = [ids(images) for images, _ in batches[first : first + 5]]
                counts = np.bincount(np.concatenate(epoch), minlength=11)
                assert counts.min() == 1 and counts.max() == 2 and counts.sum() == 15
                assert sum(batch[0] in STANDING for batch in epoch) == 2
    kinds = [images.shape[1] > images.shape[2] for images, _ in take(info, 60, **SHORT)]
    assert len({tuple(kinds[first : first + 5]) for first in range(0, 60, 5)}) > 2  # not all of one kind first


def test_such_batches_are_a_function_of_seed_and_step(info):
    options = {"flip": "both", "scale": (0.8, 1.0), "shuffle": 6, **SHORT}
    batches = take(info, 12, **options)
    tf.random.set_seed(99)
    for start in (0, 5):
        again = take(info, 12 - start, start_step=start, **options)
        for one, other in zip(batches[start:], again, strict=True):
            tf.nest.map_structure(np.testing.assert_array_equal, one, other)
    other = take(info, 12, seed=6, **options)
    assert [ids(images) for images, _ in batches] != [ids(images) for images, _ in other]


def test_a_group_smaller_than_a_batch_is_repeated(tmp_path):
    info = write(tmp_path, [(40, 60), (60, 40), (40, 60), (40, 60)], shards=1)
    batches = take(info, 4, batch=3, **SHORT)
    for epoch in (batches[:2], batches[2:]):
        assert sorted(sorted(ids(images)) for images, _ in epoch) == [[0, 2, 3], [1, 1, 1]]
    only = write(tmp_path, [(40, 60)] * 3, shards=1)  # nothing stands
    assert [sorted(ids(images)) for images, _ in take(only, 2, batch=3, **SHORT)] == [[0, 1, 2]] * 2


def test_skipped_steps_decode_nothing(tmp_path):
    """An image that no decoder takes does no harm as long as its batch is skipped."""
    broken = write(tmp_path, [(40, 60), (60, 40)], shards=1)
    path = broken.shard_paths[0]
    examples = [tf.train.Example.FromString(r.numpy()) for r in tf.data.TFRecordDataset(str(path))]
    examples[0].features.feature["image/encoded"].bytes_list.value[0] = b"no image"
    with open(path, "wb") as file:
        for example in examples:
            records.write_record(file, example.SerializeToString())
    fine = []  # batches of one image: every second one is broken
    for step in range(4):
        try:
            take(broken, 1, batch=1, start_step=step, **SHORT)
            fine.append(step)
        except tf.errors.InvalidArgumentError:
            pass
    assert len(fine) == 2 and len({step // 2 for step in fine}) == 2 and max(fine) > 1


def test_the_placed_triangle_is_where_the_picture_is(tmp_path):
    """Box and window of the only instance by hand, portrait and landscape, and the locations of its orientation."""
    info = write(tmp_path, [(24, 60), (60, 24)], shards=1)
    for images, instances in take(info, 2, batch=1, flip="none", **SHORT):
        height, width = images.shape[1:3]
        filled = (90, 36) if width > height else (36, 90)  # 1.5 times: the longer side reaches 90 first
        np.testing.assert_array_equal(instances["window"][0], filled)
        assert (images[0, : filled[1], : filled[0]] > 0).all()
        assert not images[0, filled[1] :].any() and not images[0, :, filled[0] :].any()
        corners = np.array([0.2, 0.2, 0.8, 0.9]) * np.tile(filled, 2)
        np.testing.assert_allclose(instances["boxes"][0, 0], corners, atol=0.01)
        points = np.concatenate([geometry.locations(height, width, stride) for stride in (8, 16, 32)])
        assert instances["ignore"].shape == (1, len(points))


def test_crowds_are_ignored_at_the_locations_of_the_images_own_orientation(tmp_path):
    info = write(tmp_path, [(40, 60), (60, 40)], shards=1)
    path = info.shard_paths[0]
    examples = [tf.train.Example.FromString(r.numpy()) for r in tf.data.TFRecordDataset(str(path))]
    with open(path, "wb") as file:
        for example in examples:
            example.features.feature["image/object/is_crowd"].int64_list.value[0] = 1
            records.write_record(file, example.SerializeToString())
    for images, instances in take(info, 2, batch=1, flip="none", **SHORT):
        height, width = images.shape[1:3]
        x, y = np.concatenate([geometry.locations(height, width, stride) for stride in (8, 16, 32)]).T
        wide, high = instances["window"][0]
        # The triangle (0.2, 0.2), (0.8, 0.3), (0.6, 0.9) of the window, its edges' inner sides by cross products.
        corners = np.array([[0.2, 0.2], [0.8, 0.3], [0.6, 0.9]]) * [wide, high]
        inside, edge = np.ones(len(x), bool), np.zeros(len(x), bool)
        for (x0, y0), (x1, y1) in zip(corners, np.roll(corners, -1, axis=0), strict=True):
            side = (x1 - x0) * (y - y0) - (y1 - y0) * (x - x0)
            inside &= side > 0
            edge |= np.abs(side) < 1e-2
        np.testing.assert_array_equal(instances["ignore"][0][~edge], inside[~edge])
        assert inside.sum() > 10 and edge.sum() < 5


def test_element_specs(info):
    def spec(**data):
        return pipeline.training_batches(info, config_of(**data)).element_spec

    assert spec()[0].shape == spec(fit="stretch")[0].shape == (3, 64, 96, 3)
    images, instances = spec(**SHORT)
    assert images.shape.as_list() == [3, None, None, 3] and images.dtype == tf.uint8
    # Both orientations have as many locations, level by level, so all else has the shapes that it always had.
    assert {k: v.shape for k, v in instances.items()} == {k: v.shape for k, v in spec()[1].items()}


def test_a_model_trains_on_both_orientations_with_one_graph(info):
    from polarmask_tf.modeling.polarmask import PolarMask

    config = config_of(**SHORT)
    tiny = dataclasses.replace(
        config.model,
        rays=8,
        backbone=dataclasses.replace(config.model.backbone, stem="3x3", width=8),
        fpn=configs.FPNConfig(channels=16, levels=(3, 4, 5)),
        head=dataclasses.replace(config.model.head, channels=16, convs=1),
    )
    config = dataclasses.replace(config, model=tiny)
    model = PolarMask(config, 1)
    model.build((None, *configs.input_size(config.data), 3))
    model.compile(optimizer=tf_keras.optimizers.SGD(1e-3))
    model.optimizer.build(model.trainable_variables)
    batches = pipeline.training_batches(info, config, seed=5)
    kinds = {images.shape[1:3] for images, _ in batches.take(10).as_numpy_iterator()}
    assert kinds == {(64, 96), (96, 64)}
    history = model.fit(batches, steps_per_epoch=10, epochs=1, verbose=0).history
    assert np.isfinite(history["loss"]).all() and history["ray"][0] > 0
    assert model.train_function.experimental_get_tracing_count() == 1


def test_more_instances_than_fit_are_ignored_in_batches(tmp_path):
    info = write(tmp_path, [(64, 96)], shards=1)
    ring = np.array([[8.0, 8], [24, 8], [24, 24], [8, 24]])
    rings = [ring, np.add(ring, [32, 0]), np.add(ring, [64, 4])]
    encoded = next(iter(records.iter_images(converted(tmp_path, [(64, 96)]).directory)))[1]
    instances = [records.Instance(i, 0, "blob", False, 1.0, (*r.min(0), *r.max(0)), [r], b"") for i, r in enumerate(rings)]
    with open(info.shard_paths[0], "wb") as file:
        records.write_record(
            file,
            records.encode_example(
                encoded=encoded, format="png", file_name="x", image_id=0, height=64, width=96, instances=instances
            ),
        )
    info = dataclasses.replace(info, max_instances=3, max_edges=4, shard_paths=info.shard_paths[:1])
    ((_, batch),) = pipeline.training_batches(info, config_of(batch=1, flip="none", max_instances=2)).take(1)
    points = pipeline.locations((64, 96), (3, 4, 5)).numpy()
    assert batch["classes"].numpy().tolist() == [[0, 0]]
    left_out = ((points > rings[2].min(0)) & (points < rings[2].max(0))).all(axis=1)
    np.testing.assert_array_equal(batch["ignore"][0], left_out)
    assert left_out.sum() == 3


# ---- cost


def test_an_example_ships_less_than_half_a_megabyte_besides_its_pixels():
    info = records.DatasetInfo(Path("x"), "train", 1, 100, 0, [{"name": "blob", "category_id": 1}], 100, 96, [Path("x/y")], {})
    config = config_of(fit="short_side", size=(800, 1333))
    config = dataclasses.replace(
        config, model=dataclasses.replace(config.model, fpn=configs.FPNConfig(channels=64, levels=(3, 4, 5, 6, 7)))
    )
    file = io.BytesIO()
    Image.new("RGB", (640, 480)).save(file, "PNG")
    ring = np.random.default_rng(0).uniform(0, 480, (96, 2))
    instance = records.Instance(1, 0, "blob", False, 1.0, (0, 0, 480, 480), [ring], b"")
    record = records.parse(
        records.encode_example(
            encoded=file.getvalue(), format="png", file_name="x", image_id=1, height=480, width=640, instances=[instance] * 100
        )
    )
    image, instances = pipeline.prepare(record, config, info, tf.constant([0, 0]))
    assert image.shape == (800, 1344, 3)
    assert (instances["classes"].numpy() >= 0).sum() == 100 and instances["edges"].shape == (100, 96, 4)
    shipped = sum(value.numpy().nbytes for value in instances.values())
    assert 100 * 96 * 4 * 4 < shipped <= 0.5e6


DETERMINISTIC = """
import hashlib, os, sys
import tensorflow as tf
sys.path.insert(0, sys.argv[1])
from helpers.shards import SIZES, config_of, write
from polarmask_tf.data import pipeline
from pathlib import Path

def busy():
    stats = {t: Path(f"/proc/self/task/{t}/stat").read_text() for t in os.listdir("/proc/self/task")}
    return {t: int(stat.rsplit(")", 1)[1].split()[11]) for t, stat in stats.items()}

info = write(Path(sys.argv[2]), SIZES)
tf.config.experimental.enable_op_determinism()
digests = set()
for _ in range(2):
    config = config_of(size=(640, 640), sizes=((640, 640), (608, 640)), scale=(0.6, 1.3), damaged="skip")
    stream = pipeline.training_batches(info, config, seed=5).as_numpy_iterator()
    digest, before = hashlib.sha256(), busy()
    for _ in range(12):
        for value in tf.nest.flatten(next(stream)):
            digest.update(value.tobytes())
    digests.add(digest.hexdigest())
    times = sorted(now - before.get(thread, 0) for thread, now in busy().items() if int(thread) != os.getpid())
print(len(digests), times[-2] / times[-1])
"""


def test_deterministic_mode_is_deterministic_and_parallel(tmp_path):
    """Two runs with the same batches; the second busiest thread is not idle."""
    run = subprocess.run(
        [sys.executable, "-c", DETERMINISTIC, str(Path(__file__).parent), str(tmp_path)], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-2000:]
    digests, ratio = run.stdout.split()
    assert digests == "1"
    if len(os.sched_getaffinity(0)) > 1:
        assert float(ratio) > 0.3


# ---- for model.fit


def numbered(data):
    """Ids of the images of each batch."""
    return [ids(images) for images, _ in data.as_numpy_iterator()]


@pytest.mark.usefixtures("traced_once")
@pytest.mark.parametrize("options", [{"batch": 4, "shuffle": 3}, {"batch": 30}, {"batch": 3, **SHORT}])
def test_epochs_of_training_data_are_the_batches_of_the_endless_order(tmp_path, options):
    info = converted(tmp_path)
    config = config_of(flip="both", scale=(0.6, 1.3), **options)
    data = pipeline.training_data(info.directory, config, seed=5)
    steps = max(1, (15 if options.get("fit") else 11) // options["batch"])
    assert len(data) == steps
    iter(data)  # as Keras does: made and dropped
    epochs = [list(data.as_numpy_iterator()) for _ in range(3)]
    assert [len(epoch) for epoch in epochs] == [steps] * 3
    straight = pipeline.training_batches(info, config, seed=5).take(3 * steps).as_numpy_iterator()
    for one, other in zip(itertools.chain(*epochs), straight, strict=True):
        tf.nest.map_structure(np.testing.assert_array_equal, one, other)


@pytest.mark.usefixtures("traced_once")
def test_every_epoch_of_training_data_has_an_order_of_its_own(tmp_path):
    data = pipeline.training_data(converted(tmp_path).directory, config_of(batch=11), seed=5)
    epochs = [numbered(data)[0] for _ in range(4)]
    assert all(sorted(epoch) == list(range(11)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    by_config = [numbered(pipeline.training_data(tmp_path, config_of(batch=11)))[0] for _ in range(2)]
    assert by_config[0] == by_config[1] != epochs[0]  # train.seed; a data set of its own begins with the first epoch


@pytest.mark.usefixtures("traced_once")
def test_keras_takes_the_epochs_one_after_the_other(tmp_path):
    """Of three epochs of `fit` and two more, every batch once, whatever iterators Keras makes."""
    info, config = converted(tmp_path), config_of(batch=4)
    data = pipeline.training_data(info.directory, config, seed=5)
    seen = []

    def note(images):
        seen.append(ids(images))
        return np.zeros((len(images), 1), np.float32)

    x = data.map(lambda images, _: tf.ensure_shape(tf.numpy_function(note, [images], tf.float32), [None, 1]))
    model = tf_keras.Sequential([tf_keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    for epochs in (3, 2):
        model.fit(x.map(lambda x: (x, x)), epochs=epochs, verbose=0)
    straight = pipeline.training_batches(info, config, seed=5).take(5 * len(data))
    assert seen == [ids(images) for images, _ in straight.as_numpy_iterator()]


def test_validation_data_are_every_image_once_as_stored(tmp_path):
    info = converted(tmp_path)
    config = config_of(batch=4, flip="both", scale=(0.5, 2.0), crop=(32, 32), color_jitter=0.5, damaged="skip")
    first, again = (list(pipeline.validation_data(info.directory, config).as_numpy_iterator()) for _ in range(2))
    assert [ids(images) for images, _ in first] == [[0, 3, 6, 9], [1, 4, 7, 10], [2, 5, 8]]  # shard by shard
    assert len(pipeline.validation_data(info.directory, config_of(batch=4))) == 3
    for one, other in zip(first, again, strict=True):
        tf.nest.map_structure(np.testing.assert_array_equal, one, other)
    for images, instances in first:
        assert images.shape[1:] == (64, 96, 3)
        for number, (width, height) in zip(ids(images), instances["window"], strict=True):
            factor = min(64 / SIZES[number][0], 96 / SIZES[number][1])
            np.testing.assert_allclose([height, width], np.multiply(SIZES[number], factor), atol=0.51)


def test_validation_data_of_both_orientations(tmp_path):
    info = converted(tmp_path)
    data = pipeline.validation_data(info.directory, config_of(batch=4, **SHORT))
    assert len(data) == 3
    seen = [(ids(images), images.shape[1:3]) for images, _ in data.as_numpy_iterator()]
    assert [shape for _, shape in seen] == [(64, 96), (64, 96), (96, 64)]
    assert sorted(n for numbers, _ in seen for n in numbers) == list(range(11))
    assert set(seen[-1][0]) == set(STANDING)


def test_data_without_objects_are_not_trained_on(tmp_path):
    info = dataclasses.replace(write(tmp_path, SIZES), num_crowd=len(SIZES))
    (tmp_path / "dataset.json").write_text(dataset.dump(info))
    with pytest.raises(InputError, match="only crowd regions"):
        pipeline.training_data(tmp_path, config_of())
    assert len(numbered(pipeline.validation_data(tmp_path, config_of()))) == 4
    with pytest.raises(InputError, match="no such directory"):
        pipeline.validation_data(tmp_path / "none", config_of())
