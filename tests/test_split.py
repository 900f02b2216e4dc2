"""Splits, groups, duplicates, classes and several sources of one conversion; and what it says of them."""

import hashlib
import json
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from polarmask_tf import arguments, cli
from polarmask_tf.data import combine, convert, dataset, records, report_file, split
from polarmask_tf.data.report import Report
from polarmask_tf.errors import InputError

SQUARE = [4.0, 4, 12, 4, 12, 12, 4, 12]
BIG = [0.0, 0, 24, 0, 24, 15, 0, 15]


def source(folder, names, classes=("x",), first_id=1, seed=0, shapes=(SQUARE,), ids=None):
    """A COCO set with one object of each class in every picture, or of each shape, of the first class."""
    folder.mkdir(parents=True, exist_ok=True)
    images, annotations = [], []
    for n, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng([seed, n]).integers(0, 255, (16, 24, 3), dtype=np.uint8)).save(folder / name)
        images.append({"id": first_id + n, "file_name": name, "height": 16, "width": 24})
        for label in range(len(classes)):
            for shape in shapes:
                entry = {
                    "id": first_id + len(annotations),
                    "image_id": first_id + n,
                    "category_id": (ids or range(1, 99))[label],
                }
                annotations.append(entry | {"segmentation": [shape], "area": 64 if shape is SQUARE else 360})
    categories = [{"id": (ids or range(1, 99))[label], "name": name} for label, name in enumerate(classes)]
    document = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "annotations.json").write_text(json.dumps(document))
    return folder


def run(*sources, out, **options):
    first, *more = sources
    return convert.convert_dataset(first, out, **({"progress": False, "processes": 1, "add": more} | options))


def names_in(info):
    return sorted(image["file_name"] for image in records.read_ground_truth(info.directory)["images"])


def entries(names, contents=None, source=0, own=""):
    images = [{"file_name": name, "source": source, "split": own} for name in names]
    for index, content in (contents or {}).items():
        images[index]["content"] = content
    return images


# ---- splits


def test_fractions_go_to_val_and_test_by_seed(tmp_path):
    folder = source(tmp_path / "s", [f"{n}.png" for n in range(20)])
    infos = run(folder, out=tmp_path / "o", split=[0.2, 0.1])
    assert {name: info.num_images for name, info in infos.items()} == {"train": 14, "val": 4, "test": 2}
    assert sorted(name for info in infos.values() for name in names_in(info)) == sorted(f"{n}.png" for n in range(20))
    for name, info in infos.items():
        assert dataset.load(tmp_path / "o" / name) == info and info.classes == infos["train"].classes
    # Each set is a data set of its own: a training must not take its validation data for what it learns from.
    assert len({info.id for info in infos.values()}) == 3
    for info in infos.values():
        stored = [features["image/dataset_id"].bytes_list.value[0].decode() for _, features in records.iter_records(info)]
        assert {*stored} == {info.id}
    again = run(folder, out=tmp_path / "again", split=[0.2, 0.1])
    other = run(folder, out=tmp_path / "other", split=[0.2, 0.1], seed=1)
    assert names_in(again["val"]) == names_in(infos["val"]) != names_in(other["val"])


@given(
    count=st.integers(4, 60),
    fractions=st.lists(st.floats(0.02, 0.45), min_size=1, max_size=2),
    seed=st.integers(0, 5),
    groups=st.integers(1, 12),
)
@settings(max_examples=150, deadline=None)
def test_a_split_is_a_partition_that_keeps_groups_and_duplicates(count, fractions, seed, groups):
    names = [f"{n % groups}_{n}.png" for n in range(count)]
    alike = {0: "c", count // 2: "c", count - 1: "c"}
    for group in (None, "^([0-9]+)_"):
        images = entries(names, alike)
        try:
            sets = split.sets_of(images, fractions, seed, group, Report())
        except InputError as error:
            # Duplicates join their groups.
            joined = len({n % groups for n in range(count)}) - len({0, (count // 2) % groups, (count - 1) % groups}) + 1
            assert (joined if group else count - 2) <= len(fractions), error
            continue
        assert sorted(i["file_name"] for members in sets.values() for i in members) == sorted(names)
        assert all(sets.values()) and list(sets) == list(split.NAMES[: len(fractions) + 1])
        where = {i["file_name"]: name for name, members in sets.items() for i in members}
        assert len({where[names[index]] for index in alike}) == 1
        if group:
            for n in range(min(groups, count)):
                assert len({where[name] for name in names if name.startswith(f"{n}_")}) == 1
        elif count >= 20:
            for name, fraction in zip(split.NAMES[1:], fractions, strict=False):
                assert abs(len(sets[name]) - fraction * count) <= 2


def test_a_picture_keeps_its_place_when_others_come():
    """With the same seed: a val set that grows does not swap its pictures with train's."""
    few, many = (entries([f"{n}.png" for n in range(count)]) for count in (40, 44))
    one, two = (split.sets_of(images, [0.25], 0, None, Report()) for images in (few, many))
    before, after = ({i["file_name"] for i in sets["val"]} for sets in (one, two))
    assert len(before) == 10 and len(after) == 11 and len(before & after) >= 8


def test_groups_by_folder_and_by_expression(tmp_path):
    names = [f"p{p}/{n}.png" for p in range(5) for n in range(3)]
    folder = source(tmp_path / "s", names)
    for group in ("folder", r"^(p\d)/"):
        infos = run(folder, out=tmp_path / group[:2], split=[0.2], group=group)
        val = names_in(infos["val"])
        assert len(val) == 3 and len({name[:2] for name in val}) == 1
    report = Report()
    split.sets_of(entries(["p1_a", "p1_b", "q"]), [0.3], 0, "^(p[0-9])_", report)
    assert report.notes["image whose name --group does not match, a group for itself"] == [1, "q"]


@pytest.mark.parametrize(
    "options, said",
    [
        ({"split": [0.1], "group": "("}, "neither 'folder' nor a regular expression"),
        ({"split": [0.1], "group": "p"}, "has no group in parentheses"),
        ({"split": [0.1], "group": "(.*)"}, None),
        ({"split": [0.1], "group": "^(p)"}, "--split: 1 group cannot be split into 2 sets; choose another --group"),
        ({"split": [0.5, 0.5]}, "--split 0.5,0.5: give the fraction of val"),
        ({"split": [0.0]}, "give the fraction of val"),
        ({"split": [0.1, 0.1, 0.1]}, "give the fraction of val"),
        ({"group": "folder"}, "--group says what --split keeps together; give --split too"),
        ({"min_area": -1}, "min_area is -1"),
        ({"min_area": float("nan")}, "min_area is nan"),
    ],
)
def test_nonsense_is_refused_before_anything_is_written(tmp_path, options, said):
    folder = source(tmp_path / "s", ["p1.png", "p2.png", "p3.png"])
    if said is None:
        run(folder, out=tmp_path / "o", **options)
        return
    with pytest.raises(InputError) as error:
        run(folder, out=tmp_path / "o", **options)
    assert said in str(error.value) and not (tmp_path / "o").exists()


def test_groups_that_share_a_picture_are_said_to_be_one():
    images = [{**entry, "content": content} for entry, content in zip(entries(["a/1", "a/2", "b/1"]), "xyx", strict=True)]
    with pytest.raises(InputError, match=r"1 group \(of 2, those with a picture of equal bytes being one\).*or remove copies"):
        split.sets_of(images, [0.3], 0, "folder", Report())


def test_sets_of_before_are_not_left_lying_beside_new_ones(tmp_path):
    folder = source(tmp_path / "s", [f"{n}.png" for n in range(6)])
    run(folder, out=tmp_path / "o")
    with pytest.raises(InputError, match=r"from an earlier conversion would stay beside train and val: remove it"):
        run(folder, out=tmp_path / "o", split=[0.3])
    assert dataset.load(tmp_path / "o").num_images == 6
    run(folder, out=tmp_path / "p", split=[0.3, 0.3])
    with pytest.raises(InputError, match="p/test from an earlier conversion would stay beside"):
        run(folder, out=tmp_path / "p", split=[0.3])
    assert run(folder, out=tmp_path / "p", split=[0.2, 0.2])["train"].num_images == 4
    with pytest.raises(InputError, match="nothing is written into a source"):
        run(folder, out=folder)


def test_a_split_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    folder = source(tmp_path / "s", [f"{n}.png" for n in range(6)])
    run(folder, out=tmp_path / "o", split=[0.3])
    before = {path: path.read_bytes() for path in (tmp_path / "o").rglob("*") if path.is_file()}
    write = convert._write_shard

    def failing(task, after_image):
        if task.partial.parent.name == "val":
            raise InputError("no")
        return write(task, after_image)

    monkeypatch.setattr(convert, "_write_shard", failing)
    with pytest.raises(InputError, match=r"^no$"):
        run(folder, out=tmp_path / "o", split=[0.3], seed=5)
    assert {path: path.read_bytes() for path in (tmp_path / "o").rglob("*") if path.is_file()} == before


# ---- several sources


def test_sources_are_united_by_names_of_classes(tmp_path):
    one = source(tmp_path / "1", ["a.png", "b.png"], ("cat", "dog"), ids=(5, 2))
    two = source(tmp_path / "2", ["a.png"], ("dog", "owl", "Cat"), seed=1, ids=(5, 9, 1))
    info = run(one, two, out=tmp_path / "o")[""]
    # dog is 2 and cat 5 as in the first; of the second 9 and 1 are free.
    assert {c["name"]: c["category_id"] for c in info.classes} == {"Cat": 1, "dog": 2, "cat": 5, "owl": 9}
    truth = records.read_ground_truth(tmp_path / "o")
    names = {c["id"]: c["name"] for c in truth["categories"]}
    assert sorted(names[a["category_id"]] for a in truth["annotations"]) == sorted(["cat", "dog"] * 2 + ["dog", "owl", "Cat"])
    assert len({i["id"] for i in truth["images"]}) == 3 and len({a["id"] for a in truth["annotations"]}) == 7
    notes = " ".join(info.notes)
    assert "numbered anew" in notes and "case or spaces" in notes and "another category id" in notes


def test_names_that_differ_in_case_alone_are_told_of_one_source_too(tmp_path):
    one = source(tmp_path / "1", ["a.png", "b.png"], ("Car", "car", "van"))
    assert [text for text in run(one, out=tmp_path / "o")[""].notes if "case or spaces" in text]
    run(one, out=tmp_path / "p", split=[0.5])
    (note,) = json.loads((tmp_path / "p/report.json").read_text())["notes"]
    assert "case or spaces" in note["reason"] and note["first"] == "'Car' and 'car'"
    assert not any("case or spaces" in text for text in run(one, out=tmp_path / "q", classes=["Car=car"])[""].notes)


def test_ids_stay_where_none_is_twice(tmp_path):
    one = source(tmp_path / "1", ["a.png"], first_id=7)
    two = source(tmp_path / "2", ["b.png"], first_id=70, seed=1)
    run(one, two, out=tmp_path / "o")
    assert [i["id"] for i in records.read_ground_truth(tmp_path / "o")["images"]] == [7, 70]


def test_a_source_with_splits_and_one_without(tmp_path):
    for part, seed in (("train", 0), ("val", 1)):
        source(tmp_path / "1" / part, ["a.png"], seed=seed)
    two = source(tmp_path / "2", ["c.png"], seed=2)
    infos = run(tmp_path / "1", two, out=tmp_path / "o")
    assert {name: names_in(info) for name, info in infos.items()} == {"train": ["a.png", "c.png"], "val": ["a.png"]}
    report = json.loads((tmp_path / "o/report.json").read_text())
    assert "image of a source without splits, taken to train" in [note["reason"] for note in report["notes"]]
    pooled = run(tmp_path / "1", two, out=tmp_path / "p", split=[0.3])
    assert sum(info.num_images for info in pooled.values()) == 3


# ---- duplicates


def test_duplicates_are_named_and_stay_together(tmp_path):
    folder = source(tmp_path / "s", [f"{n}.png" for n in range(8)])
    for n in (3, 5, 6):
        (folder / f"{n}.png").write_bytes((folder / "0.png").read_bytes())
    (folder / "7.png").write_bytes((folder / "1.png").read_bytes() + b"\0")  # one byte more
    for seed in range(4):
        infos = run(folder, out=tmp_path / f"o{seed}", split=[0.4], seed=seed)
        sets = {name: {*names_in(info)} for name, info in infos.items()}
        assert any({"0.png", "3.png", "5.png", "6.png"} <= members for members in sets.values())
    report = json.loads((tmp_path / "o0/report.json").read_text())
    assert {"reason": "picture with the same bytes as another", "count": 3, "first": "3.png is 0.png"} in report["notes"]
    assert not any("several splits" in note["reason"] for note in report["notes"])


def test_duplicates_across_splits_are_told(tmp_path):
    for part in ("train", "val"):
        source(tmp_path / "s" / part, ["a.png", f"{part}.png"], seed=0)
    (tmp_path / "s/val/val.png").write_bytes((tmp_path / "s/train/a.png").read_bytes())
    run(tmp_path / "s", out=tmp_path / "o")
    notes = json.loads((tmp_path / "o/report.json").read_text())["notes"]
    (found,) = [note for note in notes if "picture that is in several splits" in note["reason"]]
    assert found["count"] == 1 and found["first"] == "a.png (train) and a.png (val)"


# ---- classes, sizes, the report


def test_classes_are_renamed_united_and_dropped(tmp_path):
    folder = source(tmp_path / "s", ["a.png", "b.png"], ("cat", "dog", "cow", "-odd"))
    info = run(folder, out=tmp_path / "o", classes=["cat=pet", "dog=pet", "-cow", "-odd=odd"])[""]
    assert info.classes == [{"name": "pet", "category_id": 1}, {"name": "odd", "category_id": 4}]
    assert info.num_instances == 6 and info.notes["annotation of class 'cow', dropped as asked"] == 2
    assert info.skipped == {}
    info = run(folder, out=tmp_path / "o", classes=["cat=dog"], strict=True)[""]
    assert [c["name"] for c in info.classes] == ["dog", "cow", "-odd"]
    # Named classes stay, others go; one that an edit names stays too.
    info = run(folder, out=tmp_path / "o", classes=["-odd", "cat=pet"])[""]
    assert info.classes == [{"name": "pet", "category_id": 1}, {"name": "-odd", "category_id": 4}]
    assert info.num_instances == 4 and info.notes["annotation of class 'dog', dropped as asked"] == 2


@pytest.mark.parametrize(
    "edits, said",
    [
        (["-cats"], "there is no class 'cats'; did you mean 'cat'?"),
        (["zebra=x"], "there is no class 'zebra'; there are 'cat', 'dog'"),
        (["cats"], "there is no class 'cats'; did you mean 'cat'?"),
        (["cat", "cat=x"], "given twice"),
        (["cat="], "the new name is empty"),
        (["cat=x", "-cat"], "given twice"),
        (["-cat", "-dog"], "drops every class"),
    ],
)
def test_class_edits_that_cannot_be(tmp_path, edits, said):
    folder = source(tmp_path / "s", ["a.png"], ("cat", "dog"))
    with pytest.raises(InputError) as error:
        run(folder, out=tmp_path / "o", classes=edits)
    assert said in str(error.value) and not (tmp_path / "o").exists()


def test_classes_of_one_name_stay_apart_unless_united():
    classes = [{"name": "a", "category_id": 1}, {"name": "a", "category_id": 2}, {"name": "b", "category_id": 3}]
    assert combine.edit_classes([], classes, [], Report()) == classes
    assert [c["category_id"] for c in combine.edit_classes([], classes, ["b=a"], Report())] == [1]
    assert combine.edit_classes([], classes, ["a"], Report()) == classes[:2]


def test_small_objects_are_left_out_as_asked(tmp_path):
    folder = source(tmp_path / "s", ["a.png"], shapes=(SQUARE, BIG))
    info = run(folder, out=tmp_path / "o", min_area=65, strict=True)[""]
    assert info.num_instances == 1 and info.notes == {"object smaller than --min-area 65, left out as asked": 1}
    assert run(folder, out=tmp_path / "o", min_area=64)[""].num_instances == 2


def test_the_report_is_the_same_on_the_terminal_and_in_the_file(tmp_path, capsys):
    folder = source(tmp_path / "s", [f"{n}.png" for n in range(4)], ("x", "y"), shapes=(SQUARE, BIG))
    document = json.loads((folder / "annotations.json").read_text())
    document["annotations"][0]["segmentation"] = [[1, 2]]
    (folder / "annotations.json").write_text(json.dumps(document))
    before = {path: hashlib.sha256(path.read_bytes()).digest() for path in folder.iterdir()}
    arguments_ = ["convert", str(folder / "annotations.json"), str(tmp_path / "o"), "--split", "0.25", "--processes", "1"]
    assert cli.main(arguments_) == 0
    assert {path: hashlib.sha256(path.read_bytes()).digest() for path in folder.iterdir()} == before
    report, output = json.loads((tmp_path / "o/report.json").read_text()), capsys.readouterr().out
    assert report["format"] == report_file.FORMAT
    (given,) = report["sources"]
    assert (given["format"], given["images"], given["annotations"]) == ("coco", 4, 16)
    sets = {each["name"]: each for each in report["sets"]}
    assert (sets["train"]["images"], sets["val"]["images"]) == (3, 1)
    assert sum(each["instances"] for each in sets.values()) == 15
    assert sum(each["instances_per_class"]["x"] for each in sets.values()) == 7
    assert sum(each["sizes"]["8-16"] for each in sets.values()) == 7  # 8 pixels a side
    assert sum(each["sizes"]["16-32"] for each in sets.values()) == 8  # 19
    assert report["skipped"] == [
        {"reason": "polygon with fewer than 3 points", "count": 1, "first": "image 1, 0.png, annotation 1"}
    ]
    assert "skipped 1 x polygon with fewer than 3 points (first: image 1, 0.png, annotation 1)" in output
    for name, each in sets.items():
        images = "1 image" if each["images"] == 1 else f"{each['images']} images"
        line = f"{tmp_path / 'o' / name}: {images}, {each['instances']} instances (0 crowd), 2 classes"
        assert line in output
    assert "  sizes (square root of the area, in pixels): 8-16: " in output


def test_classes_of_sizes():
    assert [report_file.side_of(side * side) for side in (0, 1, 7.9, 8, 31, 32, 511, 512, 9000)] == [
        0,
        0,
        0,
        8,
        16,
        32,
        256,
        512,
        512,
    ]


@pytest.mark.parametrize(
    "words, source, images, out",
    [
        ("a out", "a", None, "out"),
        ("a b out", "a", "b", "out"),
        ("a b --masks out", "a", "b", "out"),
        ("a --add c --add d out --split .1,.2", "a", None, "out"),
        ("--format via a --add c b out", "a", "b", "out"),
    ],
)
def test_the_command_line_takes_two_or_three_paths(words, source, images, out):
    args = arguments.parser().parse_args(["convert", *words.split()])
    assert (str(args.source), args.images and str(args.images), str(args.out)) == (source, images, out)


def test_annotations_images_out_is_what_it_was(tmp_path):
    """The command line's three paths and pm.convert_coco make the same records."""
    folder = source(tmp_path / "s", ["a.png", "b.png"], ("cat", "dog"), first_id=5)
    paths = [str(folder / "annotations.json"), str(folder)]
    assert cli.main(["convert", *paths, str(tmp_path / "one/set"), "--processes", "1"]) == 0
    convert.convert(*paths, tmp_path / "two/set", progress=False)
    assert records.read_ground_truth(tmp_path / "one/set") == records.read_ground_truth(tmp_path / "two/set")
    one, two = (dataset.load(tmp_path / name / "set") for name in ("one", "two"))
    assert (one.classes, one.notes, one.num_instances) == (two.classes, two.notes, two.num_instances)


@pytest.mark.parametrize("words", ["a", "a b c d", "a b --split x", "a b --format voc"])
def test_the_command_line_refuses_others(words, capsys):
    with pytest.raises(SystemExit) as exit_:
        arguments.parser().parse_args(["convert", *words.split()])
    assert exit_.value.code == 2


def test_dropped_classes_begin_with_a_dash_on_the_command_line(tmp_path):
    folder = source(tmp_path / "s", ["a.png"], ("cat", "dog"))
    assert cli.main(["convert", str(folder), str(tmp_path / "o"), "--classes=-dog,cat=pet", "--min-area", "3"]) == 0
    assert [c["name"] for c in dataset.load(tmp_path / "o").classes] == ["pet"]


def test_a_forgotten_out_does_not_fill_the_pictures(tmp_path, capsys):
    (tmp_path / "images").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "images" / "a.png")
    (tmp_path / "a.json").write_text(json.dumps({"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}]}))
    assert cli.main(["convert", str(tmp_path / "a.json"), str(tmp_path / "images")]) == 2
    assert "was OUT forgotten?" in capsys.readouterr().err and os.listdir(tmp_path / "images") == ["a.png"]
    assert cli.main(["convert", str(tmp_path / "images"), str(tmp_path / "out")]) == 2
    assert "1 pictures and no annotations" in capsys.readouterr().err and not (tmp_path / "out").exists()
