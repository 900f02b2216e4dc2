"""data/dataset.py: dataset.json is written as it is read, and what does not fit its schema is one line."""

import json
import os
import random
import shutil

import pytest

from polarmask_tf.data import dataset
from polarmask_tf.errors import InputError

CONTENT = {
    "format": "polarmask_tf/1",
    "name": "toy",
    "num_images": 3,
    "num_instances": 3,
    "num_crowd": 0,
    "classes": [{"name": "one", "category_id": 3}, {"name": "zwei ö", "category_id": 11}],
    "max_instances": 2,
    "max_edges": 4,
    "shards": ["toy-00000-of-00002.tfrecord", "toy-00001-of-00002.tfrecord"],
    "skipped": {"missing image": 2},
}
NEW = {
    "notes": {"odd": 1},
    "id": "0123",
    "instances_per_image": {"0": 1, "1": 1, "2": 1},
    "exif": "apply",
    "bit_depth": 12,
}


@pytest.fixture(params=["as before", "as now"])
def folder(request, tmp_path):
    """A directory with dataset.json, as an earlier version or this one writes it, and empty shards."""
    content = CONTENT if request.param == "as before" else CONTENT | NEW
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    for name in CONTENT["shards"]:
        (tmp_path / name).touch()
    return tmp_path


def test_what_it_says(folder):
    info = dataset.load(folder)
    assert (info.name, info.num_images, info.num_instances, info.max_instances, info.max_edges) == ("toy", 3, 3, 2, 4)
    assert info.classes == CONTENT["classes"]
    assert info.shard_paths == [folder / name for name in CONTENT["shards"]]
    assert info.skipped == {"missing image": 2}
    if "notes" in json.loads((folder / "dataset.json").read_text()):
        assert (info.id, info.exif, info.bit_depth, info.notes) == ("0123", "apply", 12, {"odd": 1})
        assert info.instances_per_image == {0: 1, 1: 1, 2: 1}
    else:
        assert (info.id, info.exif, info.bit_depth, info.notes, info.instances_per_image) == ("", "auto", None, {}, {})


def test_it_is_written_as_it_is_read(folder):
    before = dataset.load(folder)
    (folder / "dataset.json").write_text(dataset.dump(before))
    assert dataset.load(folder) == before


BAD = {
    "num_images": (None, -1, 1.0, "3", True, [], 10**30),
    "max_edges": (10**6,),
    "max_instances": (10**7,),
    "name": (None, 5),
    "classes": (
        None,
        [],
        {},
        ["one"],
        [{"name": "one"}],
        [{"name": 1, "category_id": 1}],
        [{"name": "one", "category_id": "1"}],
        [{"name": "one", "category_id": 2**64}],
        [{"name": "one", "category_id": 1}, {"name": "two", "category_id": 1}],
        [{"name": "\ud800", "category_id": 1}],
    ),
    "shards": (None, [], [""], ["a/b"], ["../toy"], [5], "toy", ["/etc/passwd"]),
    "skipped": (None, [], {"a": -1}, {"a": "1"}),
    "notes": ([], {"a": None}),
    "id": (5, None),
    "instances_per_image": ([], {"x": 3}, {"-1": 3}, {"1": 2}, {"1": 1.0}),
    "exif": (1,),
    "bit_depth": ("12", 33, -1),
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in BAD.items() for value in values])
def test_what_does_not_fit_the_schema_is_refused(folder, key, value):
    (folder / "dataset.json").write_text(json.dumps(json.loads((folder / "dataset.json").read_text()) | {key: value}))
    with pytest.raises(InputError, match=rf"dataset\.json: broken \(.*class|dataset\.json: broken \('{key}'|codec") as error:
        dataset.load(folder)
    assert str(error.value).isprintable()


@pytest.mark.parametrize("key", CONTENT)
def test_what_is_missing_is_refused(folder, key):
    content = json.loads((folder / "dataset.json").read_text())
    del content[key]
    (folder / "dataset.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=key):
        dataset.load(folder)


def test_of_a_split_conversion_it_names_the_sets(folder, tmp_path_factory):
    data = tmp_path_factory.mktemp("data")
    for name in ("train", "val"):
        shutil.copytree(folder, data / name)
    with pytest.raises(InputError) as caught:
        dataset.load(str(data))
    assert str(caught.value) == f"{data}: is not one converted set, but holds {data}/train, {data}/val; name one"


def test_it_names_what_is_wrong_with_the_directory(folder):
    with pytest.raises(InputError, match="no such directory"):
        dataset.load(folder / "nowhere")
    file = folder / "dataset.json"
    good = file.read_text()
    for bad, message in (
        (good[:50], "broken"),
        ("", "broken"),
        ("[]", "broken.*a list, not an object"),
        (good.replace("polarmask_tf/1", "polarmask_tf/9"), "format 'polarmask_tf/9', this version reads"),
        ('{"format": ' + "[" * 100000, "broken"),
        ("9" * 5000, "broken"),
    ):
        file.write_text(bad)
        with pytest.raises(InputError, match=message):
            dataset.load(folder)
    file.write_text(good)
    (folder / "toy-00001-of-00002.tfrecord").unlink()
    os.mkfifo(folder / "toy-00001-of-00002.tfrecord")  # reading it would never end
    with pytest.raises(InputError, match="1 of 2 shards missing, first toy-00001"):
        dataset.load(folder)
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(InputError, match=r"no dataset\.json"):
        dataset.load(folder)


def test_fuzzed_files_are_read_or_refused(folder):
    good = (folder / "dataset.json").read_bytes()
    odd = [b"null", b"-1", b"1e999", b"NaN", b'"\\ud800"', b"[]", b"{}", b"[[[[", b"\xff", b"true", b"9" * 400]
    for seed in range(1000):
        rng = random.Random(seed)
        bad = bytearray(good)
        for _ in range(rng.choice([1, 1, 3, 8])):
            start = rng.randrange(len(bad))
            bad[start : start + rng.randrange(12)] = rng.choice([*odd, bytes([rng.randrange(256)])])
        (folder / "dataset.json").write_bytes(bad)
        try:
            dataset.load(folder)
        except InputError as error:
            assert str(error).isprintable(), seed


def info_of(**changes):
    values = CONTENT | {"directory": "x", "shard_paths": [], **changes}
    return dataset.DatasetInfo(**{key: value for key, value in values.items() if key not in ("format", "shards")})


def test_a_set_without_an_object_is_nothing_to_train_on():
    dataset.require_objects(info_of(num_instances=3, num_crowd=2))
    with pytest.raises(InputError, match=r"3 images with only crowd regions.*--crowd-as-instances"):
        dataset.require_objects(info_of(num_instances=3, num_crowd=3))
    with pytest.raises(InputError, match="3 images with no object at all"):
        dataset.require_objects(info_of(num_instances=0))


def test_the_surplus_is_counted():
    info = info_of(instances_per_image={0: 5, 3: 2, 7: 4, 10: 1}, max_instances=10)
    for most in (1, 3, 6, 7, 9, 10, 11):
        each = [number for number, images in info.instances_per_image.items() for _ in range(images) if number > most]
        assert dataset.surplus(info, most) == (len(each), sum(each) - most * len(each))
    assert dataset.surplus(info_of(max_instances=10), 4) == (1, 6)  # of an earlier version: what is known
    assert dataset.surplus(info_of(max_instances=10), 10) == (0, 0)
