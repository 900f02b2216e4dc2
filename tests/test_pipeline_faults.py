"""data/pipeline.py, where shards are damaged, change, or hold what does not fit: one line that names them."""

import dataclasses
import itertools
import re
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from helpers.shards import SHORT, SIZES, config_of, converted, ids, take, traced_once, write  # noqa: F401
from polarmask_tf.data import dataset, pipeline, records
from polarmask_tf.errors import InputError


@pytest.fixture(scope="module")
def info(tmp_path_factory):
    return write(tmp_path_factory.mktemp("data"), SIZES)


def cut(path):
    path.write_bytes(path.read_bytes()[:-7])


def flip(place):
    def damage(path):
        content = bytearray(path.read_bytes())
        content[place] ^= 1
        path.write_bytes(content)

    return damage


# What is done to the second of three shards, which holds the images 1, 4, 7 and 10: how many of them can still be read.
DAMAGE = {
    "cut": (cut, 3),
    "data": (flip(-30), 3),
    "first data": (flip(40), 0),
    "length": (flip(2), 0),
    "gone": (Path.unlink, 0),
}


@pytest.mark.usefixtures("traced_once")
@pytest.mark.parametrize("kind", DAMAGE)
def test_the_rest_of_a_damaged_shard_is_left_out_and_told_once(tmp_path, capfd, kind):
    damage, readable = DAMAGE[kind]
    info = write(tmp_path, SIZES)
    damage(info.shard_paths[1])
    lost = {1, 4, 7, 10} - set([1, 4, 7, 10][:readable])
    for worker in range(2):
        stream = pipeline.training_batches(
            info, config_of(batch=2, damaged="skip"), seed=5, worker=worker, workers=2, replicas=2
        )
        seen = [n for images, _ in stream.take(60).as_numpy_iterator() for n in ids(images)]
        assert set(seen) == set(range(11)) - lost
        lines = [line for line in capfd.readouterr().err.splitlines() if "tfrecord" in line]
        assert len(lines) == 1
        assert lines[0].startswith(f"warning: {info.shard_paths[1]}: ") and f"after {readable} records" in lines[0]
        assert "its rest is left out" in lines[0]


@pytest.mark.usefixtures("traced_once")
def test_a_shard_that_vanishes_in_mid_epoch_is_missed_from_the_next_one_on(tmp_path, capfd):
    info = write(tmp_path, SIZES)
    batches = pipeline.training_batches(info, config_of(batch=1, damaged="skip", shuffle=2), seed=5).as_numpy_iterator()
    next(batches)
    info.shard_paths[0].unlink()
    later = [n for images, _ in itertools.islice(batches, 99) for n in ids(images)][30:]
    assert set(later) == set(range(11)) - {0, 3, 6, 9}
    assert capfd.readouterr().err.count("cannot be read") == 1


@pytest.mark.usefixtures("traced_once")
def test_nothing_is_lost_from_whole_shards(info, capfd):
    for one, other in zip(take(info, 6, damaged="skip", **SHORT), take(info, 6, **SHORT), strict=True):
        tf.nest.map_structure(np.testing.assert_array_equal, one, other)
    assert "warning" not in capfd.readouterr().err


def failure(info, *, batches=40, step=0, **data):
    """What `explain` makes of the error that the batches end with."""
    config = config_of(batch=2, **data)
    with pytest.raises(tf.errors.OpError) as caught:
        for _ in pipeline.training_batches(info, config, seed=5).take(batches):
            step += 1
    found = pipeline.explain(caught.value, info, config, seed=5, step=step)
    assert isinstance(found, InputError) and "\n" not in str(found)
    return str(found)


@pytest.mark.usefixtures("traced_once")
@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_shard_stops_the_training_with_its_name(tmp_path, kind):
    damage, readable = DAMAGE[kind]
    info = write(tmp_path, SIZES)
    damage(info.shard_paths[1])
    message = failure(info)
    assert message.startswith(f"{info.shard_paths[1]}: ") and f"after {readable} records" in message
    assert "polarmask convert" in message and "data.damaged=skip" in message


@pytest.mark.usefixtures("traced_once")
def test_an_image_that_cannot_be_decoded_is_named(tmp_path):
    info = write(tmp_path, SIZES)
    path = info.shard_paths[1]
    examples = [tf.train.Example.FromString(data) for data in records.read_shard(path)]
    examples[2].features.feature["image/encoded"].bytes_list.value[0] = b"\xff\xd8\xff no image"
    with open(path, "wb") as file:
        for example in examples:
            records.write_record(file, example.SerializeToString())
    for damaged in ("fail", "skip"):
        message = failure(info, damaged=damaged)
        assert f"{info.directory}: image 7 (7.png) cannot be decoded" in message and "convert --verify" in message


@pytest.mark.usefixtures("traced_once")
def test_records_of_others_are_named(tmp_path):
    info = write(tmp_path, SIZES)
    with open(info.shard_paths[1], "wb") as file:
        for _ in range(4):
            records.write_record(file, tf.train.Example().SerializeToString())
    assert "did not write" in failure(info)


@pytest.mark.usefixtures("traced_once")
@pytest.mark.parametrize("damaged", ["fail", "skip"])
def test_data_without_records_end_with_a_line(tmp_path, damaged):
    info = write(tmp_path, SIZES)
    for path in info.shard_paths:
        path.write_bytes(b"" if damaged == "fail" else b"\0" * 40)
    message = failure(info, damaged=damaged)
    assert {"fail": "fewer records", "skip": "no record"}[damaged] in message and "polarmask convert" in message
    info.shard_paths[0].unlink()
    with pytest.raises(InputError, match="no records for worker 0" if damaged == "skip" else "cannot be read"):
        pipeline.training_batches(info, config_of(damaged=damaged, sharding="file"))


def test_what_a_cut_shard_lacks_is_said_before_keras_is_given_the_data(tmp_path):
    info = converted(tmp_path)
    cut(info.shard_paths[1])
    for make in (pipeline.training_data, pipeline.validation_data):
        with pytest.raises(InputError, match=r"\d+ whole records, dataset.json says 11; run `polarmask convert` again"):
            make(tmp_path, config_of())
        make(tmp_path, config_of(damaged="skip"))


def test_other_errors_are_not_explained(info):
    for error in (tf.errors.ResourceExhaustedError, tf.errors.InvalidArgumentError, tf.errors.DataLossError):
        assert pipeline.explain(error(None, None, "of something else"), info, config_of(), seed=5, step=3) is None


# ---- data that change or do not fit


def rewrite(path, change, records_of_shard=99):
    """Changes the features of the first records of a shard, with right checksums."""
    examples = [tf.train.Example.FromString(data) for data in records.read_shard(path)]
    for example in examples[:records_of_shard]:
        change(example.features.feature)
    with open(path, "wb") as file:
        for example in examples:
            records.write_record(file, example.SerializeToString())


def set_values(key, kind, *values):
    def change(features):
        getattr(features[key], kind).value[:] = values

    return change


FAULTS = {
    "a label outside the 1 classes of dataset.json": set_values("image/object/class/label", "int64_list", 2),
    "a label outside the 1 classes of dataset.json ": set_values("image/object/class/label", "int64_list", 0),
    "an image of another size than the record says": set_values("image/height", "int64_list", 61),
    "polygons that do not fit its objects": set_values("image/object/polygon/ring_lengths", "int64_list", 4),
    "polygons that do not fit its objects ": set_values("image/object/polygon/ring_instance", "int64_list", 1),
    "polygons that do not fit its objects  ": set_values("image/object/polygon/ring_instance", "int64_list", -1),
    "polygons that do not fit its objects   ": set_values("image/object/polygon/xy", "float_list", *[1.0] * 5, float("nan")),
    "polygons that do not fit its objects    ": set_values("image/object/polygon/ring_lengths", "int64_list", 5, -2),
    "polygons that do not fit its objects     ": set_values("image/object/is_crowd", "int64_list"),
}


@pytest.mark.usefixtures("traced_once")
@pytest.mark.parametrize("fault", FAULTS)
def test_a_record_that_does_not_fit_is_named(tmp_path, fault):
    info = write(tmp_path, SIZES)
    rewrite(info.shard_paths[1], FAULTS[fault], records_of_shard=1)
    message = failure(info)
    assert message.startswith(f"{info.directory}: image 1 (1.png): {fault.strip()}") and "polarmask convert" in message


def test_data_that_are_converted_again_stop_the_training_with_one_line(tmp_path):
    """The shards of the new conversion have the old names, the worst case."""
    info = dataclasses.replace(converted(tmp_path), id="before")
    batches = pipeline.training_batches(info, config_of(batch=2, shuffle=2), seed=5).as_numpy_iterator()
    next(batches)
    for path in info.shard_paths:
        rewrite(path, set_values("image/dataset_id", "bytes_list", b"after"))
    with pytest.raises(tf.errors.InvalidArgumentError) as caught:
        for _ in range(60):
            next(batches)
    for id, said in (
        ("before", "image .*: a record of another conversion than dataset"),
        ("after", "was converted again while"),
    ):
        (tmp_path / "dataset.json").write_text(dataset.dump(dataclasses.replace(info, id=id)))
        found = pipeline.explain(caught.value, info, config_of(batch=2, shuffle=2), seed=5, step=1)
        assert isinstance(found, InputError) and re.match(f"{re.escape(str(tmp_path))}: {said}", str(found))
    for path in info.shard_paths:  # or the old ones are gone
        path.rename(path.with_name(f"new-{path.name}"))
    renamed = [path.with_name(f"new-{path.name}") for path in info.shard_paths]
    (tmp_path / "dataset.json").write_text(dataset.dump(dataclasses.replace(info, id="after", shard_paths=renamed)))
    assert "was converted again" in failure(info)


@pytest.mark.usefixtures("traced_once")
def test_bytes_that_tensorflow_quotes_are_explained_too(tmp_path):
    """Its message then is no text, and Python's error is another one."""
    info = write(tmp_path, SIZES)
    path = info.shard_paths[1]
    with open(path, "wb") as file:
        for _ in range(4):
            records.write_record(file, b"\x0a\x05\x0a\x03\x0a\x01\xa6")  # a feature of the name A6
    with pytest.raises((tf.errors.InvalidArgumentError, UnicodeDecodeError)) as caught:
        list(pipeline.training_batches(info, config_of(batch=2), seed=5).take(9))
    found = pipeline.explain(caught.value, info, config_of(batch=2), seed=5, step=0)
    assert "holds a record that `polarmask convert` did not write" in str(found)
    error = UnicodeDecodeError("utf-8", b"\xa6", 0, 1, "invalid start byte")
    assert "did not write" in str(pipeline.explain(error, info, config_of(batch=2), seed=5, step=0))
