"""data/cache.py: shards of decoded images give the same batches, and are made whatever happens in between."""

import dataclasses
import errno
import io
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image
from test_pipeline import take

from polarmask_tf.data import cache, records
from polarmask_tf.errors import InputError


def picture(number, mode="RGB", format="PNG", size=(41, 30)):
    """Random pixels of a shape of their own, as a file."""
    rng = np.random.default_rng(number)
    channels = {"RGB": (3,), "L": (), "RGBA": (4,)}[mode]
    file = io.BytesIO()
    width, height = size[0] + number, size[1]
    Image.fromarray(rng.integers(0, 256, (height, width, *channels), np.uint8), mode).save(file, format)
    return file.getvalue(), format.lower(), height, width


PICTURES = [picture(0), picture(1, format="JPEG"), picture(2, "L"), picture(3, "RGBA"), picture(4, "L", "JPEG"), picture(5),
            picture(6, format="JPEG", size=(20, 50))]


def write(folder, pictures=PICTURES, shards=3):
    folder.mkdir(exist_ok=True)
    paths = [folder / f"train-{shard:05}-of-{shards:05}.tfrecord" for shard in range(shards)]
    for shard, path in enumerate(paths):
        with open(path, "wb") as out:
            for i in range(shard, len(pictures), shards):
                encoded, format, height, width = pictures[i]
                ring = np.array([[2.0, 2], [18, 3], [12, 25]])
                instance = records.Instance(i, 0, "blob", False, 1.0, (2, 2, 18, 25), [ring], b"rle")
                records.write_record(out, records.encode_example(
                    encoded=encoded, format=format, file_name=f"{i}.{format}", image_id=i, height=height, width=width,
                    instances=[instance],
                ))
    count, classes = len(pictures), [{"name": "blob", "category_id": 1}]
    info = records.DatasetInfo(folder, "train", count, count, 0, classes, 1, 3, paths, {"missing image": 2})
    (folder / "dataset.json").write_text(records.dump_dataset_info(info))
    return records.load_dataset_info(folder)


@pytest.fixture
def info(tmp_path):
    return write(tmp_path / "train")


def images(info):
    """(source id, format, decoded pixels) of every record in the order of the shards."""
    for path in info.shard_paths:
        for data in tf.data.TFRecordDataset(str(path)).as_numpy_iterator():
            feature = tf.train.Example.FromString(data).features.feature
            keys = ("image/encoded", "image/format", "image/source_id")
            encoded, format, number = (feature[key].bytes_list.value[0] for key in keys)
            yield number, format, tf.io.decode_image(encoded, 3, expand_animations=False).numpy()


def build(info, folder, **options):
    return cache.cached(info, folder, progress=False, **options)


def test_batches_are_bit_identical(info, tmp_path):
    made = build(info, tmp_path / "cache")
    assert made.directory.parent == tmp_path / "cache"
    assert dataclasses.replace(made, directory=info.directory, shard_paths=info.shard_paths) == info
    assert [path.name for path in made.shard_paths] == [path.name for path in info.shard_paths]
    options = {"flip": "both", "scale": (0.5, 1.5)}
    tf.nest.map_structure(np.testing.assert_array_equal, take(made, 6, **options), take(info, 6, **options))
    for (number, _, before), (other, format, after) in zip(images(info), images(made), strict=True):
        assert number == other and format == b"bmp"
        np.testing.assert_array_equal(before, after)
    for one, other in zip(records._iter_features(info), records._iter_features(made), strict=True):  # all else is kept
        changed = {key for key in one if one[key] != other[key]}
        assert one.keys() == other.keys() and changed == {"image/encoded", "image/format"}


@pytest.mark.parametrize("height, width", [(1, 1), (3, 2), (2, 3), (5, 4), (7, 9)])
def test_a_bmp_is_read_by_others_too(height, width):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(cache.bmp(pixels)))), pixels)


def test_it_is_made_once(info, tmp_path, monkeypatch):
    first = build(info, tmp_path / "cache")
    stamps = [path.stat().st_mtime_ns for path in first.shard_paths]
    monkeypatch.setattr(cache, "_decode", None)
    assert build(info, tmp_path / "cache") == first
    assert [path.stat().st_mtime_ns for path in first.shard_paths] == stamps


def test_a_changed_source_gets_a_cache_of_its_own(info, tmp_path, capsys):
    first = build(info, tmp_path / "cache")
    assert capsys.readouterr().err == ""
    changed = write(info.directory, PICTURES[::-1])
    second = build(changed, tmp_path / "cache")
    assert second.directory != first.directory
    assert [n for n, _, _ in images(second)] == [n for n, _, _ in images(changed)]
    assert f"{first.directory}: made from another state of {info.directory}" in capsys.readouterr().err


def test_it_goes_on_after_an_error_where_it_was(info, tmp_path, monkeypatch):
    decode, calls = cache._decode, []

    def third_fails(data, path):
        calls.append(path)
        if len({*calls}) == 3:
            raise KeyboardInterrupt
        return decode(data, path)

    monkeypatch.setattr(cache, "_decode", third_fails)
    with pytest.raises(KeyboardInterrupt):
        build(info, tmp_path / "cache")
    out, = (tmp_path / "cache").iterdir()
    there = {path.name: path.stat().st_mtime_ns for path in out.glob("*.tfrecord")}
    assert len(there) == 2 and not list(out.glob("*.tmp")) and not (out / "dataset.json").exists()
    monkeypatch.setattr(cache, "_decode", decode)
    made = build(info, tmp_path / "cache")
    assert {name: (out / name).stat().st_mtime_ns for name in there} == there
    assert sorted(n for n, _, _ in images(made)) == sorted(n for n, _, _ in images(info))


SLOW = """
import sys, time
from polarmask_tf.data import cache, records
bmp = cache.bmp
cache.bmp = lambda image: (time.sleep(0.2), bmp(image))[1]
cache.os.cpu_count = lambda: 1
cache.cached(records.load_dataset_info(sys.argv[1]), sys.argv[2], progress=False)
"""


def test_a_killed_build_leaves_nothing_that_could_be_taken_for_a_shard(tmp_path):
    info = write(tmp_path / "train", PICTURES * 3, shards=6)
    process = subprocess.Popen([sys.executable, "-c", SLOW, str(info.directory), str(tmp_path / "cache")])
    try:
        until = time.monotonic() + 120
        while not list((tmp_path / "cache").glob("*/*.tfrecord")):
            assert process.poll() is None and time.monotonic() < until
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    out, = (tmp_path / "cache").iterdir()
    assert 1 <= len(list(out.glob("*.tfrecord"))) < 6 and not (out / "dataset.json").exists()
    for left in out.glob("*.tmp"):
        os.utime(left, (0, 0))  # long ago
    made = build(info, tmp_path / "cache")
    for (number, _, before), (other, _, after) in zip(images(info), images(made), strict=True):
        assert number == other
        np.testing.assert_array_equal(before, after)
    assert not list(out.glob("*.tmp"))


def test_several_may_build_at_once(info, tmp_path):
    made = []
    threads = [threading.Thread(target=lambda: made.append(build(info, tmp_path / "cache"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 4 and all(one == made[0] for one in made)
    assert [n for n, _, _ in images(made[0])] == [n for n, _, _ in images(info)]
    assert not list(made[0].directory.glob("*.tmp"))


def test_the_room_needed_is_known_before(info, tmp_path, monkeypatch):
    sizes = sum(path.stat().st_size for path in build(info, tmp_path / "one").shard_paths)
    assert cache._room(info.shard_paths) == pytest.approx(sizes, rel=0.01)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda path: usage._replace(free=sizes // 2))
    with pytest.raises(InputError, match=r"data\.cache: .* take .* GB, .* GB are free; make room"):
        build(info, tmp_path / "two")


def test_a_disk_that_fills_up_is_one_line(info, tmp_path, monkeypatch):
    def full(file, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(cache.records, "write_record", full)
    with pytest.raises(InputError, match=r"No space left on device; .* GB more are needed"):
        build(info, tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*/*.tmp"))
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"data\.cache: .*file.*choose another"):
        build(info, tmp_path / "file")


def test_what_cannot_be_decoded_or_read_is_named(tmp_path):
    info = write(tmp_path / "one", [*PICTURES[:4], (b"no image", "jpeg", 30, 40)])
    with pytest.raises(InputError, match=r"train-00001-of-00003\.tfrecord: image 4 \(4\.jpeg\) cannot be decoded; .*--verify"):
        build(info, tmp_path / "cache")
    info = write(tmp_path / "two")
    shard = info.shard_paths[1]
    shard.write_bytes(shard.read_bytes()[:-5])
    with pytest.raises(InputError, match=r"train-00001-of-00003\.tfrecord: damaged or cut short after 1 records.*data.damaged"):
        build(info, tmp_path / "cache")
    shard.unlink()
    with pytest.raises(InputError, match=r"train-00001-of-00003\.tfrecord: cannot be read \(No such file"):
        build(info, tmp_path / "cache")


def test_damaged_shards_can_be_skipped(info, tmp_path, capsys):
    shard = info.shard_paths[1]
    shard.write_bytes(shard.read_bytes()[:-5])
    for _ in range(2):  # the second time it is there already
        made = build(info, tmp_path / "cache", damaged="skip")
        assert f"without 1 images, in damaged shards of {info.directory}" in capsys.readouterr().err
    assert len(list(images(made))) == 6 == len(PICTURES) - 1
    assert len(take(made, 12, damaged="skip")) == 12
