import contextlib
import dataclasses
import json
import random
import re
import struct

import google_crc32c
import numpy as np
import pytest
from pycocotools import mask as coco_mask

from polarmask_tf.data import dataset, records, tfrecord
from polarmask_tf.errors import InputError

RLE = coco_mask.encode(np.asfortranarray(np.eye(10, 20, dtype=np.uint8)))["counts"]


def instance(**changes):
    square = np.array([[1.0, 2], [9, 2], [9, 6.5], [1, 6.5]])
    values = dict(annotation_id=7, label=1, name="größe", is_crowd=False, area=36.0, box=(1, 2, 9, 6.5), rings=[square])
    return records.Instance(**(values | {"rle": RLE} | changes))


def encode(instances, **changes):
    values = dict(encoded=b"picture", format="png", file_name="a/b.png", image_id=5, height=10, width=20)
    return records.encode_example(**(values | changes), instances=instances)


@pytest.fixture
def data(tmp_path):
    """A data set written by hand: two shards, three images."""
    folder = tmp_path / "toy"
    folder.mkdir()
    images = [[encode([instance()]), encode([], image_id=6)], [encode([instance(), instance(annotation_id=-2)], image_id=8)]]
    names = []
    for number, shard in enumerate(images):
        names.append(f"toy-{number:05d}-of-00002.tfrecord")
        with open(folder / names[-1], "wb") as file:
            for data in shard:
                records.write_record(file, data)
    content = {
        "format": "polarmask_tf/1",
        "name": "toy",
        "num_images": 3,
        "num_instances": 3,
        "num_crowd": 0,
        "classes": [{"name": "one", "category_id": 3}, {"name": "two", "category_id": 11}],
        "max_instances": 2,
        "max_edges": 4,
        "shards": names,
        "skipped": {"missing image": 2},
    }
    (folder / "dataset.json").write_text(json.dumps(content))
    return folder


def test_tensorflow_reads_the_example_as_it_was_meant():
    import tensorflow as tf

    hole = np.array([[3.0, 3], [3, 4], [4, 4]])
    two = instance(annotation_id=-(2**40), rings=[instance().rings[0], hole], is_crowd=True, mask_png=b"m2")
    features = tf.train.Example.FromString(encode([instance(mask_png=b"m1"), two])).features.feature
    ints = {key: list(f.int64_list.value) for key, f in features.items() if f.HasField("int64_list")}
    assert ints == {
        "image/height": [10],
        "image/width": [20],
        "image/object/class/label": [2, 2],
        "image/object/is_crowd": [0, 1],
        "image/object/annotation_id": [7, -(2**40)],
        "image/object/polygon/ring_lengths": [4, 4, 3],
        "image/object/polygon/ring_instance": [0, 1, 1],
    }
    texts = {key: list(f.bytes_list.value) for key, f in features.items() if f.HasField("bytes_list")}
    assert texts == {
        "image/encoded": [b"picture"],
        "image/format": [b"png"],
        "image/filename": [b"a/b.png"],
        "image/source_id": [b"5"],
        "image/object/class/text": ["größe".encode()] * 2,
        "image/object/rle": [RLE, RLE],
        "image/object/mask": [b"m1", b"m2"],
    }
    floats = {key: list(f.float_list.value) for key, f in features.items() if f.HasField("float_list")}
    assert floats["image/object/bbox/xmax"] == pytest.approx([0.45, 0.45])
    assert floats["image/object/bbox/ymin"] == pytest.approx([0.2, 0.2])
    assert floats["image/object/area"] == [36, 36]
    assert floats["image/object/polygon/xy"][-6:] == [3, 3, 3, 4, 4, 4]


def test_parse_gives_pixels_and_zero_based_labels():
    hole = np.array([[3.0, 3], [3, 4], [4, 4]])
    parsed = records.parse(encode([instance(), instance(rings=[hole], label=0, is_crowd=True)]))
    dtypes = {key: (value.dtype.name, value.shape.as_list()) for key, value in parsed.items()}
    assert dtypes == {
        "image/encoded": ("string", []),
        "height": ("int32", []),
        "width": ("int32", []),
        "source_id": ("string", []),
        "filename": ("string", []),
        "dataset_id": ("string", []),
        "boxes": ("float32", [2, 4]),
        "labels": ("int32", [2]),
        "is_crowd": ("bool", [2]),
        "area": ("float32", [2]),
        "xy": ("float32", [7, 2]),
        "ring_lengths": ("int32", [2]),
        "ring_instance": ("int32", [2]),
    }
    assert np.allclose(parsed["boxes"][0], [1, 2, 9, 6.5], atol=1e-5)
    assert parsed["labels"].numpy().tolist() == [1, 0]
    assert parsed["is_crowd"].numpy().tolist() == [False, True]
    assert np.array_equal(parsed["xy"], np.concatenate([instance().rings[0], hole]))


def test_parse_of_an_image_without_annotations_keeps_the_ranks():
    parsed = records.parse(encode([]))
    shapes = {key: parsed[key].shape.as_list() for key in ("boxes", "labels", "xy", "ring_lengths")}
    assert shapes == {"boxes": [0, 4], "labels": [0], "xy": [0, 2], "ring_lengths": [0]}


def test_ground_truth_and_images_come_back(data):
    truth = records.read_ground_truth(data)
    assert [(i["id"], i["height"], i["width"], i["file_name"]) for i in truth["images"]] == [
        (number, 10, 20, "a/b.png") for number in (5, 6, 8)
    ]
    assert [(a["id"], a["image_id"], a["category_id"], a["area"], a["iscrowd"]) for a in truth["annotations"]] == [
        (7, 5, 11, 36, 0),
        (7, 8, 11, 36, 0),
        (-2, 8, 11, 36, 0),
    ]
    assert truth["annotations"][0]["bbox"] == pytest.approx([1, 2, 8, 4.5], abs=1e-5)
    assert truth["annotations"][0]["segmentation"] == {"size": [10, 20], "counts": RLE}
    assert truth["categories"] == [{"id": 3, "name": "one"}, {"id": 11, "name": "two"}]
    assert list(records.iter_images(data)) == [(5, b"picture"), (6, b"picture"), (8, b"picture")]


@pytest.mark.parametrize("cut", [1, 4, 13, 200])
def test_a_shard_that_was_cut_short_is_named(data, cut):
    shard = data / "toy-00001-of-00002.tfrecord"
    shard.write_bytes(shard.read_bytes()[:-cut])
    with pytest.raises(InputError, match=r"toy-00001-of-00002\.tfrecord: damaged or cut short.*polarmask convert"):
        records.read_ground_truth(data)


def test_flipped_bits_missing_records_and_foreign_files_are_named(data):
    shard = data / "toy-00001-of-00002.tfrecord"
    good = shard.read_bytes()
    shard.write_bytes(good[:40] + bytes([good[40] ^ 1]) + good[41:])
    with pytest.raises(InputError, match=r"toy-00001-of-00002\.tfrecord: damaged"):
        list(records.iter_images(data))
    shard.write_bytes(b"")
    with pytest.raises(InputError, match=r"2 records, dataset\.json says 3"):
        list(records.iter_images(data))
    for content, message in ((b"\xff" * 9, "something else than"), (b"", "not written by")):
        with open(shard, "wb") as file:
            length = struct.pack("<Q", len(content))
            records.write_record(file, content) if content else file.write(
                length + struct.pack("<I", tfrecord._masked(google_crc32c.value(length))) + struct.pack("<I", 0xA282EAD8)
            )
        with pytest.raises(InputError, match=f"toy-00001-of-00002.tfrecord: .*{message}"):
            list(records.iter_images(data))


def records_of(path):
    """What can be read, and the error then."""
    found = []
    try:
        for data in records.read_shard(path):
            found.append(data)
    except InputError as error:
        return found, str(error)
    return found, None


def test_shards_are_read_as_tensorflow_reads_them(tmp_path):
    import tensorflow as tf

    contents = [b"", b"a", b"\xff" * 1000, bytes(range(256))]
    with tf.io.TFRecordWriter(str(tmp_path / "theirs")) as writer:
        for data in contents:
            writer.write(data)
    assert records_of(tmp_path / "theirs") == (contents, None)
    assert records.count_records(tmp_path / "theirs") == 4
    (tmp_path / "empty").write_bytes(b"")
    assert records_of(tmp_path / "empty") == ([], None) and records.count_records(tmp_path / "empty") == 0


def test_every_flipped_byte_and_every_cut_is_found(tmp_path):
    """Three records of 3 bytes, 19 bytes each in the file: what precedes the damage is read, nothing after it."""
    path, bad = tmp_path / "good", tmp_path / "bad"
    with open(path, "wb") as file:
        for data in (b"abc", b"def", b"ghi"):
            records.write_record(file, data)
    good = path.read_bytes()
    assert len(good) == 57
    for place in range(57):
        bad.write_bytes(good[:place] + bytes([good[place] ^ 0x10]) + good[place + 1 :])
        whole = place // 19
        found, error = records_of(bad)
        assert found == [b"abc", b"def", b"ghi"][:whole]
        assert records.count_records(bad) == (whole if place % 19 < 12 else 3)
        assert error.startswith(f"{bad}: damaged or cut short after {whole} record{'s' * (whole != 1)} (the checksum of a ")
        bad.write_bytes(good[:place])
        found, error = records_of(bad)
        assert found == [b"abc", b"def", b"ghi"][:whole] and records.count_records(bad) == whole
        assert (error is None) == (place % 19 == 0) and (error is None or "ends within a record" in error)


def test_a_shard_that_cannot_be_opened_is_named(tmp_path):
    gone = tmp_path / "gone"
    assert records_of(gone) == ([], f"{gone}: cannot be read after 0 records (No such file or directory)")
    assert "Is a directory" in records_of(tmp_path)[1]
    with pytest.raises(FileNotFoundError):
        records.count_records(gone)


def rewrite(path, change):
    """Changes the features of the first record of a shard, with right checksums."""
    import tensorflow as tf

    first, *others = [tf.train.Example.FromString(data) for data in records.read_shard(path)]
    change(first.features.feature)
    with open(path, "wb") as file:
        for example in (first, *others):
            records.write_record(file, example.SerializeToString())


def set_values(key, kind, *values):
    def change(features):
        getattr(features[key], kind).value[:] = values

    return change


BAD_RECORDS = {
    "image 5, annotation 7: label 3, dataset.json has 2 classes": set_values("image/object/class/label", "int64_list", 3),
    "image 5, annotation 7: label 0, ": set_values("image/object/class/label", "int64_list", 0),
    "image 5, annotation 7: RLE of the wrong size": set_values("image/height", "int64_list", 11),
    r"image 5, annotation 7: malformed RLE \(broken": set_values("image/object/rle", "bytes_list", b"ooo"),
    "image 5: objects without label, area, mask or box": set_values("image/object/area", "float_list"),
    "image 5: objects without label, area, mask or box ": set_values("image/object/bbox/xmin", "float_list", 0.1, 0.2),
    "record 1 was not written by": set_values("image/source_id", "bytes_list", b"five"),
    "record 1 was not written by ": set_values("image/filename", "bytes_list"),
    "record 1 was not written by `polarmask": set_values("image/width", "int64_list", -20),
    "record 1 was not written by `polarmask ": set_values("image/width", "int64_list", 10**12),
    "record 1 was not written by `polarmask c": lambda features: features.pop("image/encoded"),
    "record of another conversion": set_values("image/dataset_id", "bytes_list", b"elsewhere"),
}


@pytest.mark.parametrize("said", BAD_RECORDS)
def test_a_record_that_does_not_fit_is_named(data, said):
    content = json.loads((data / "dataset.json").read_text())
    (data / "dataset.json").write_text(json.dumps(content | {"id": "this"}))
    records.read_ground_truth(data)  # records of earlier versions have no id
    rewrite(data / "toy-00000-of-00002.tfrecord", BAD_RECORDS[said])
    with pytest.raises(InputError, match=said.strip()) as error:
        records.read_ground_truth(data)
    assert "polarmask convert" in str(error.value) and "\n" not in str(error.value)


def test_fuzzed_records_are_read_or_refused(data):
    """600 mutations with right checksums, read both ways: values, or an InputError of one line, and nothing else."""
    import tensorflow as tf

    info, shard = dataset.load(data), data / "toy-00000-of-00002.tfrecord"
    good = list(records.read_shard(shard))
    pixels = tf.zeros([10, 20, 3], tf.uint8)
    read = refused = 0
    for seed in range(600):
        rng = random.Random(seed)
        bad = bytearray(good[0])
        for _ in range(rng.choice([1, 1, 2, 5])):
            place = rng.randrange(len(bad))
            if rng.random() < 0.7:
                bad[place] = rng.randrange(256)
            else:
                del bad[place : place + rng.randrange(1, 9)]
        with open(shard, "wb") as file:
            for content in (bytes(bad), good[1]):
                records.write_record(file, content)
        try:
            truth = records.read_ground_truth(data)
            for annotation in truth["annotations"]:
                coco_mask.decode(annotation["segmentation"])
            read += 1
        except InputError as error:
            assert "\n" not in str(error), seed
            refused += 1
        # Both of these are what pipeline.explain explains.
        with contextlib.suppress(tf.errors.InvalidArgumentError, UnicodeDecodeError):
            records.fault(records.parse(bytes(bad)), info, pixels).numpy().decode()
    assert read > 20 and refused > 50


def test_a_shard_of_another_conversion_is_found_before_a_training_begins(tmp_path, data):
    info = dataclasses.replace(dataset.load(data), id="this")
    for path in info.shard_paths:
        rewrite(path, set_values("image/dataset_id", "bytes_list", b"this"))
    records.check_complete(info)
    rewrite(info.shard_paths[-1], set_values("image/dataset_id", "bytes_list", b"another"))
    with pytest.raises(InputError, match=f"{re.escape(info.shard_paths[-1].name)}: a record of another conversion"):
        records.check_complete(info)
    records.check_complete(dataclasses.replace(info, id=""))  # of an earlier version
