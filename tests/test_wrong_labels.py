"""Labels that look like labels and are wrong: noted, in every format; and no set passes of which no object is left."""

import json
import os

import numpy as np
import pytest
from PIL import Image

from polarmask_tf.data import convert
from polarmask_tf.errors import InputError

WIDTH, HEIGHT = 200, 100
RING = [20, 10, 60, 10, 60, 30, 20, 30]
LINE = "0 0.1 0.1 0.5 0.1 0.5 0.5 0.1 0.45\n"  # of YOLO


def picture(path, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (HEIGHT, WIDTH, 3), np.uint8)).save(path, "PNG")


def coco(home, *annotations, names=("cat",), file_name="a.png"):
    picture(home / "a.png")
    own = [
        {"id": n, "image_id": 1, "category_id": 1, "iscrowd": 0, "segmentation": [RING], "bbox": [20, 10, 40, 20]} | annotation
        for n, annotation in enumerate(annotations, 1)
    ]
    document = {
        "images": [{"id": 1, "file_name": file_name, "width": WIDTH, "height": HEIGHT}],
        "annotations": own,
        "categories": [{"id": n, "name": name} for n, name in enumerate(names, 1)],
    }
    (home / "coco.json").write_text(json.dumps(document))
    return home / "coco.json"


def yolo(home, text=LINE, yaml=None, name="a"):
    picture(home / "images" / f"{name}.png")
    (home / "labels").mkdir(exist_ok=True)
    (home / "labels" / f"{name}.txt").write_text(text)
    if yaml is not None:
        (home / "data.yaml").write_text(yaml)
    return home


def labelme(home, *shapes, **fields):
    picture(home / "a.png")
    whole = {"points": [[20, 10], [60, 10], [60, 30]], "shape_type": "polygon", "group_id": None, "label": "x"}
    document = {"shapes": [whole | shape for shape in shapes], "imagePath": "a.png", "imageWidth": WIDTH, "imageHeight": HEIGHT}
    (home / "a.json").write_text(json.dumps(document | fields))
    return home


def via(home, files):
    picture(home / "a.png")
    (home / "via.json").write_text(json.dumps(files))
    return home


def region(attributes):
    shape = {"name": "polygon", "all_points_x": [20, 60, 60], "all_points_y": [10, 10, 30]}
    return {"shape_attributes": shape, "region_attributes": attributes}


def cvat(home, *shapes, name="a.png"):
    picture(home / "a.png")
    image = f'<image id="0" name="{name}" width="{WIDTH}" height="{HEIGHT}">{"".join(shapes)}</image>'
    (home / "annotations.xml").write_text(f"<annotations>{image}</annotations>")
    return home


def masks(home, numbers):
    picture(home / "images" / "a.png")
    (home / "masks").mkdir()
    Image.fromarray(numbers.astype(np.uint8)).save(home / "masks" / "a.png")
    return home


def converted(source, out, **options):
    (info,) = convert.convert_dataset(source, out, progress=False, **{"processes": 1, **options}).values()
    return info


def note_of(info, words):
    """How often the notes with these words were made."""
    return sum(count for text, count in info.notes.items() if words in text)


# ---- objects


def test_a_box_that_is_not_the_outlines_is_told(tmp_path):
    turned = [RING[k ^ 1] for k in range(8)]  # y, x, y, x, ...
    half = [value / 2 for value in RING]
    source = coco(tmp_path, {}, {"segmentation": [turned]}, {"segmentation": [half]}, {"bbox": [21, 9, 39, 22]}, {"bbox": "?"})
    assert note_of(converted(source, tmp_path / "out"), "'bbox' (x, y, width, height) far from the outline's") == 2


def test_a_box_that_ends_with_the_image_is_that_of_an_outline_beyond_it(tmp_path):
    beyond = [20, 10, 215, 10, 215, 30, 20, 30]
    source = coco(tmp_path, {"segmentation": [beyond], "bbox": [20, 10, 180, 20]})
    assert not note_of(converted(source, tmp_path / "out"), "'bbox'")


def test_an_object_that_is_annotated_twice_is_told(tmp_path):
    shift = [value + 3 for value in RING]
    source = coco(tmp_path, {}, {}, {"segmentation": [shift]}, {"category_id": 2}, names=("cat", "dog"))
    assert note_of(converted(source, tmp_path / "out"), "object that is annotated twice") == 1


def test_objects_without_a_pixel_are_told_and_alone_are_nothing_to_learn(tmp_path):
    thin = [value / WIDTH if k % 2 == 0 else value for k, value in enumerate(RING)]  # x as a fraction of the width
    info = converted(coco(tmp_path, {}, {"segmentation": [thin]}), tmp_path / "out")
    assert info.num_instances == 2 and note_of(info, "object whose mask has no pixel") == 1
    with pytest.raises(InputError, match=r"no usable object.*1 x object whose mask has no pixel"):
        converted(coco(tmp_path, {"segmentation": [thin]}), tmp_path / "out")


@pytest.mark.parametrize(
    "make",
    [
        lambda home: yolo(home, "1" + LINE[1:], "train: images\nnames: [cat]\n"),  # classes from 1 on
        lambda home: yolo(home, "0 20 10 60 10 60 30\n"),  # pixels
        lambda home: labelme(home, {"shape_type": "mask", "mask": "AAAA"}),
        lambda home: cvat(home, '<mask label="x" rle="5,5" left="0" top="0" width="9" height="9"/>'),
        lambda home: via(home, {"a": {"filename": "a.png", "regions": [{"shape_attributes": {"name": "point"}}]}}),
    ],
)
def test_annotations_of_which_none_is_left_are_no_background(make, tmp_path):
    with pytest.raises(InputError, match="no usable object") as raised:
        converted(make(tmp_path / "source"), tmp_path / "out")
    assert "--classes" not in str(raised.value)
    assert not (tmp_path / "out").exists()


# ---- classes


@pytest.mark.parametrize(
    "make",
    [
        lambda home: coco(home, {}, {"category_id": 2}, names=("cat", "Cat ")),
        lambda home: labelme(home, {}, {"label": "X"}),
        lambda home: cvat(home, *(f'<polygon label="{n}" points="20,10;60,10;60,30"/>' for n in ("cat", "CAT"))),
        lambda home: yolo(home, LINE, "train: images\nnames: [cat, Cat]\n"),
        lambda home: via(home, {"a": {"filename": "a.png", "regions": [region({"class": n}) for n in ("cat", "c at")]}}),
    ],
)
def test_classes_that_are_spelled_alike_in_one_source_are_told(make, tmp_path):
    assert note_of(converted(make(tmp_path / "source"), tmp_path / "out"), "names differ in case or spaces alone") == 1


def test_classes_of_one_name_and_of_no_objects_are_told_in_every_format(tmp_path):
    info = converted(yolo(tmp_path / "y", LINE, "train: images\nnames: [cat, cat]\n"), tmp_path / "a")
    assert note_of(info, "categories of one name") == 1
    info = converted(labelme(tmp_path / "l", {"label": "_background_"}, {"label": "__ignore__"}, {}), tmp_path / "b")
    assert note_of(info, "named like the background") == 2


def test_many_classes_of_one_name_or_of_different_ones_in_two_sources(tmp_path):
    info = converted(coco(tmp_path, {}, names=[f"class {n // 2}" for n in range(3000)] + ["bg"] * 2000), tmp_path / "one")
    assert note_of(info, "categories of one name") == 1501 and note_of(info, "background") == 2000
    other = coco(tmp_path / "other", {}, names=[f"other {n}" for n in range(4000)])
    two = converted(tmp_path / "coco.json", tmp_path / "two", add=[other])
    assert sorted(entry["category_id"] for entry in two.classes) == list(range(1, 9001))


def test_a_data_yaml_that_cannot_be_read_is_not_passed_over(tmp_path):
    with pytest.raises(InputError, match=r"data\.yaml: not valid YAML"):
        converted(yolo(tmp_path / "y", LINE, "train: images\nnames: [cat\n"), tmp_path / "out")


def test_via_tells_of_what_it_cannot_take(tmp_path):
    several = region({"class": {"cat": True, "dog": True}})
    files = {"a": {"filename": "a.png", "regions": [several]}, "b": None, "c": {"filename": "c.png", "regions": "none"}}
    info = converted(via(tmp_path / "v", files), tmp_path / "out")
    assert note_of(info, "region with several labels") == 1 and info.skipped == {"malformed image entry": 2}


# ---- masks


def test_masks_whose_background_is_a_number_are_told(tmp_path):
    numbers = np.full((HEIGHT, WIDTH), 255)
    numbers[10:30, 20:60] = 0
    assert note_of(converted(masks(tmp_path / "a", numbers), tmp_path / "out"), "four corners have one number") == 1
    numbers[0, 0] = 7
    assert not note_of(converted(masks(tmp_path / "b", numbers), tmp_path / "out"), "four corners have one number")


def test_masks_with_blurred_edges_are_told(tmp_path):
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    numbers = np.zeros((HEIGHT, WIDTH))
    for k in range(40):  # that are sharp
        numbers[(x - 12 - 40 * (k % 5)) ** 2 + (y - 6 - 12 * (k // 5)) ** 2 < 25] = k + 1
    assert not note_of(converted(masks(tmp_path / "a", numbers), tmp_path / "out"), "blurred")
    blurred = np.array(Image.fromarray((6 * numbers).astype(np.uint8)).rotate(7, Image.Resampling.BICUBIC))
    assert note_of(converted(masks(tmp_path / "b", blurred), tmp_path / "out"), "is it blurred?") == 1


# ---- names


@pytest.mark.parametrize("name", ["http://[x/a.png", "http://a\u2100b/a.png"])
def test_addresses_that_are_none_are_missing_images(name, tmp_path):
    regions = {"a": {"filename": name, "regions": [region({"class": "x"})]}}
    sources = [coco(tmp_path / "c", {}, file_name=name), via(tmp_path / "v", regions), cvat(tmp_path / "x", name=name)]
    for source in sources:
        try:
            converted(source, tmp_path / "out")  # the file may end like it
        except InputError as error:
            assert "missing image" in str(error) or "none of its pictures" in str(error)


def test_pictures_whose_names_are_not_utf8_are_named(tmp_path):
    source = yolo(tmp_path / "y")
    for folder, suffix in (("images", b".png"), ("labels", b".txt")):
        os.rename(source / folder / f"a{suffix.decode()}", os.fsencode(source / folder) + b"/\xff" + suffix)
    yolo(source, name="good")
    info = converted(source, tmp_path / "out")
    assert info.num_images == 1 and info.skipped["image whose file name is not UTF-8: rename it"] == 1


# ---- cost


def test_cvat_files_have_bounds(tmp_path, monkeypatch):
    points = ";".join(["20,10", "60,10", "60,30"] * 34_000)
    shapes = [f'<polygon label="x" points="{points}"/>', '<polygon label="x" points="20,10;60,10;60,30"/>']
    info = converted(cvat(tmp_path / "a", *shapes), tmp_path / "out")
    assert info.skipped == {"polygon of more than 100,000 vertices or 10,000 parts": 1}
    monkeypatch.setattr("polarmask_tf.data.segmentation.MAX_RUNS", 100)
    mask = f'<mask label="x" left="0" top="0" width="60" height="60" rle="{",".join(["1"] * 3600)}"/>'
    info = converted(cvat(tmp_path / "b", mask, shapes[1]), tmp_path / "out")
    assert info.skipped == {"RLE of more than 5,000,000 runs": 1}
    monkeypatch.setattr("polarmask_tf.data.sources.cvat._MOST_ELEMENT", 2**21)
    with pytest.raises(InputError, match="an element, or a comment, of more than 2,097,152 bytes"):
        converted(cvat(tmp_path / "c", f'<polygon label="{"x" * 2**22}" points=""/>'), tmp_path / "out")
    many = f'<polygon label="{"x" * 1000}" points="20,10;60,10;60,30"/>' * 4000
    assert converted(cvat(tmp_path / "d", many), tmp_path / "out").num_instances == 4000


# ---- from Python

WRONG = [("shards", v) for v in ("3", 1.5, True)] + [("processes", "2"), ("bit_depth", 9.5), ("max_edges", None)]
WRONG += [("min_area", v) for v in ("1", None)] + [("tile", v) for v in ("64", 64.5)] + [("overlap", "1"), ("group", 5)]
WRONG += [("split", v) for v in ("0.1", ["a"], 5)] + [("classes", v) for v in ("cat", [5], [None], 5)]


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_options_of_the_wrong_type_are_one_line(name, value, tmp_path):
    with pytest.raises(InputError, match=f"^{name} is "):
        converted(coco(tmp_path / "source", {}), tmp_path / "out", **{name: value})
    assert not (tmp_path / "out").exists()


def test_options_may_be_numbers_of_numpy(tmp_path):
    source = coco(tmp_path / "source", {})
    converted(source, tmp_path / "out", shards=np.int64(1), max_edges=np.int32(20), min_area=np.float32(2))
