"""Every format that `convert` reads: recognised, the same objects as in COCO, and what is wrong in it counted and named."""

import base64
import hashlib
import io
import json
import math
import random

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from helpers import formats
from polarmask_tf.data import convert, records
from polarmask_tf.data.report import Report, Unusable
from polarmask_tf.data.sources import FORMATS, id_image, labelstudio, outlines, recognise
from polarmask_tf.data.sources.folder import Folder
from polarmask_tf.errors import InputError

SIZES = {"a.png": (60, 80), "sub/b ö.jpg": (50, 70), "empty.png": (30, 40)}
TRIANGLE, SQUARE = [10.0, 10.25, 30.5, 12.0, 20.0, 33.25], [40.0, 10.0, 60.25, 10.0, 60.25, 30.0, 40.0, 30.0]
PARTS = [[2.0, 35.0, 12.0, 35.0, 12.0, 44.0], [20.0, 36.0, 30.0, 36.0, 30.0, 45.0, 20.0, 45.0]]


def blob(height, width):
    mask = np.zeros((height, width), np.uint8)
    mask[36:46, 42:60] = 1
    mask[40:43, 48:52] = 0  # a hole
    return {"size": [height, width], "counts": coco_mask.encode(np.asfortranarray(mask))["counts"].decode()}


def picture(path, height, width, seed=0, **save):
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse = np.random.default_rng(seed).integers(0, 255, (4, 5, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(path, **save)


def make(folder, parts=True, rle=True):
    """(COCO document, folder of its pictures): two pictures with objects, one without."""
    for seed, (name, size) in enumerate(SIZES.items()):
        picture(folder / name, *size, seed)
    images = [{"id": 10 + n, "file_name": name, "height": h, "width": w} for n, (name, (h, w)) in enumerate(SIZES.items())]
    shapes = [(10, 7, [TRIANGLE]), (10, 3, [SQUARE]), (11, 7, [SQUARE]), *[(10, 3, PARTS)] * parts]
    if rle:
        shapes += [(10, 7, blob(60, 80)), (11, 3, blob(50, 70))]
    annotations = [
        {"id": n, "image_id": image, "category_id": category, "iscrowd": 0, "segmentation": shape}
        for n, (image, category, shape) in enumerate(shapes, 1)
    ]
    return {"images": images, "annotations": annotations, "categories": [{"id": 3, "name": "dog"}, {"id": 7, "name": "cat"}]}


def run(source, out, **options):
    return convert.convert_dataset(source, out, **({"progress": False, "processes": 1} | options))


def only(source, out, **options):
    (info,) = run(source, out, **options).values()
    return info


def objects(truth, of_class=None):
    """{stem of the picture: sorted [(class, bytes of the mask)]} of a COCO document with RLEs."""
    names = {c["id"]: c["name"] for c in truth["categories"]}
    found = {image["file_name"].split("/")[-1].rpartition(".")[0]: [] for image in truth["images"]}
    for image in truth["images"]:
        for a in truth["annotations"]:
            if a["image_id"] == image["id"]:
                mask = formats.bitmap(a["segmentation"], image)
                key = image["file_name"].split("/")[-1].rpartition(".")[0]
                found[key].append((of_class or names[a["category_id"]], mask.tobytes()))
    return {key: sorted(value) for key, value in found.items()}


def tree(folder):
    return {p: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*") if p.is_file()}


# ---- the same objects in every format

HOLES = ("labelme", "cvat", "labelstudio")  # that have masks of pixels
IDS = ("masks", "cellpose", "bowl", "voc")


@pytest.mark.parametrize("name", ["labelme", "cvat", "labelstudio", "yolo", "via", *IDS])
def test_every_format_has_the_objects_of_coco(tmp_path, name):
    grouped, of_masks = name in ("labelme", "cvat", *IDS), name in (*HOLES, *IDS)
    document = make(tmp_path / "pictures", parts=grouped, rle=of_masks)
    source = tmp_path / name
    source.mkdir()
    getattr(formats, name)(document, tmp_path / "pictures", source)
    before = tree(source)
    info = only(source, tmp_path / "out")
    one_class = "object" if name in ("masks", "cellpose", "bowl") else None
    expected = objects(document, one_class)
    if name == "bowl":  # names its pictures with their folders
        expected["sub_b ö"] = expected.pop("b ö")
        del expected["empty"]  # a picture without masks is not labelled yet
    assert objects(records.read_ground_truth(tmp_path / "out")) == expected
    assert {c["name"] for c in info.classes} == ({one_class} if one_class else {"cat", "dog"})
    assert info.num_instances == len(document["annotations"])
    assert info.skipped == ({"picture without a mask: not labelled yet?": 1} if name == "bowl" else {})
    assert tree(source) == before
    (found,) = recognise.read(source, Report())
    assert found.format == (name if name in FORMATS else "masks")
    # The same by its name, and with the folder of pictures given.
    again = only(source, tmp_path / "again", format=found.format, images=source)
    assert (again.num_instances, again.num_images) == (info.num_instances, info.num_images)


def test_voc_knows_its_classes_and_leaves_the_border_out(tmp_path):
    picture(tmp_path / "s/JPEGImages/2007_1.jpg", 20, 30)
    number, kind = np.zeros((20, 30), np.uint8), np.zeros((20, 30), np.uint8)
    number[2:8, 2:8], number[10:18, 10:20], number[8, :] = 1, 2, 255
    kind[2:8, 2:8], kind[10:18, 10:20] = 15, 12  # person, dog
    for folder, array in (("SegmentationObject", number), ("SegmentationClass", kind)):
        (tmp_path / "s" / folder).mkdir()
        file = Image.fromarray(array, "P")
        file.putpalette(np.random.default_rng(0).integers(0, 255, 768).tolist())
        file.save(tmp_path / "s" / folder / "2007_1.png")
    only(tmp_path / "s", tmp_path / "o")
    assert not (tmp_path / "o/report.json").read_text().count("as PASCAL VOC names")
    found = objects(records.read_ground_truth(tmp_path / "o"))["2007_1"]
    assert found == sorted([("person", (number == 1).tobytes()), ("dog", (number == 2).tobytes())])


def voc_set(folder, kind, map=None):
    picture(folder / "JPEGImages/1.jpg", 20, 30)
    number = np.zeros((20, 30), np.uint8)
    number[2:8, 2:8] = 1
    for name, array in (("SegmentationObject", number), ("SegmentationClass", kind)):
        (folder / name).mkdir()
        Image.fromarray(array).save(folder / name / "1.png")
    if map:
        (folder / "labelmap.txt").write_text(map)


def test_classes_that_a_mask_of_classes_does_not_name_are_told(tmp_path):
    kind = np.full((20, 30), 2, np.uint8)
    voc_set(tmp_path / "s", kind)  # gray: the numbers may be anybody's
    info = only(tmp_path / "s", tmp_path / "o")
    assert [c["name"] for c in info.classes] == ["bicycle"]
    assert [n for text, n in info.notes.items() if "as PASCAL VOC names its number" in text] == [1]
    voc_set(tmp_path / "t", np.dstack([kind, kind, kind * 3]), "background:0,0,0::\ncell:9,9,9::\n")
    info = only(tmp_path / "t", tmp_path / "p")
    assert [text for text in info.notes if "labelmap.txt does not name" in text]
    assert [c["name"] for c in info.classes] == ["cell", "object"]
    voc_set(tmp_path / "u", np.zeros((20, 31), np.uint8) + 2)
    info = only(tmp_path / "u", tmp_path / "q")
    assert [text for text in info.notes if "mask of classes of another size" in text]


@pytest.mark.parametrize("kind", ["8", "16", "32", "palette", "color", "bit"])
def test_masks_of_all_depths(tmp_path, kind):
    picture(tmp_path / "s/images/x.png", 20, 30)
    truth = np.zeros((20, 30), np.int64)
    truth[1:9, 1:9], truth[10:19, 5:25] = 1, 200
    if kind == "bit":
        truth[1:9, 1:9] = 0
    array = {"8": truth.astype(np.uint8), "16": (truth * 300).astype(np.uint16), "32": (truth * 70000).astype(np.int32)}.get(
        kind
    )
    if kind == "palette":
        file = Image.fromarray(truth.astype(np.uint8), "P")
        file.putpalette([7] * 768)  # of one color all: it is the index that counts
    elif kind == "color":
        file = Image.fromarray(np.stack([truth, truth * 0, (truth > 100) * 9], 2).astype(np.uint8))
    else:
        file = Image.fromarray(truth > 0) if kind == "bit" else Image.fromarray(array)
    (tmp_path / "s/masks").mkdir()
    file.save(tmp_path / "s/masks/x.tif" if kind == "32" else tmp_path / "s/masks/x_mask.png")
    only(tmp_path / "s", tmp_path / "o")
    expected = sorted(("object", (truth == n).tobytes()) for n in np.unique(truth) if n)
    assert objects(records.read_ground_truth(tmp_path / "o"))["x"] == expected


def test_split_ids_equals_a_loop():
    rng = np.random.default_rng(0)
    for _ in range(30):
        ids = rng.integers(0, rng.choice([2, 5, 300]), rng.integers(1, 12, 2)).astype(np.uint16)
        found = id_image.split_ids(ids)
        assert list(found) == [n for n in np.unique(ids) if n]
        for number, rle in found.items():
            assert rle["counts"].encode() == coco_mask.encode(np.asfortranarray(ids == number, np.uint8))["counts"]


def test_a_mask_of_too_many_numbers_is_no_mask(monkeypatch):
    monkeypatch.setattr(id_image, "MAX_OBJECTS", 50)
    with pytest.raises(Unusable, match="more than 50 numbers"):
        id_image.split_ids(np.arange(100).reshape(10, 10))


def test_a_photo_is_no_mask(tmp_path):
    noise = np.random.default_rng(0).integers(0, 60000, (300, 300)).astype(np.uint16)
    with pytest.raises(Unusable, match="scattered"):
        id_image.split_ids(noise)
    corners = np.zeros((300, 300), np.uint16)  # few pixels, and boxes as large as the picture
    corners[0, :], corners[-1, :] = (np.arange(300) + 1,) * 2
    corners[2:6, 3], corners[200, 250:260] = 301, 301
    assert len(id_image.split_ids(corners)) == 301  # of each a column, of one nearly all
    boxes = [np.ptp(v) + 1 for v in np.nonzero(corners == 301)]
    starts, ends = np.array([3 * 300 + 2, *(300 * x + 200 for x in range(250, 260))]), None
    ends = np.array([starts[0] + 4, *(starts[1:] + 1)])
    assert id_image._box_areas(starts, ends, np.array([0]), 300) == np.prod(boxes)
    picture(tmp_path / "s/images/a.png", 300, 300)
    (tmp_path / "s/masks").mkdir()
    Image.fromarray(noise).save(tmp_path / "s/masks/a.png")
    with pytest.raises(InputError, match=r"empty data set.*skipped 1 x mask whose numbers.*scattered"):
        run(tmp_path / "s", tmp_path / "o")


def test_a_brush_mask_comes_back():
    mask = np.random.default_rng(0).integers(0, 2, (20, 31)).astype(np.uint8)
    assert np.array_equal(labelstudio.brush_mask(formats.brush_rle(mask), 20, 31), mask)
    for broken in ([], [1, 2, 3], formats.brush_rle(mask)[:40]):
        with pytest.raises(Unusable, match=r"cut short|wrong size"):
            labelstudio.brush_mask(broken, 20, 31)
    with pytest.raises(Unusable, match="wrong size"):
        labelstudio.brush_mask(formats.brush_rle(mask), 31, 21)


# ---- circles, ellipses, rectangles, lines


def ellipse_by_pixels(x, y, rx, ry, degrees, height=60, width=80):
    yy, xx = (np.mgrid[0 : height * 8, 0 : width * 8] + 0.5) / 8
    t = math.radians(degrees)
    u, v = (xx - x) * math.cos(t) + (yy - y) * math.sin(t), (yy - y) * math.cos(t) - (xx - x) * math.sin(t)
    return (u / rx) ** 2 + (v / ry) ** 2 <= 1


def iou_by_pixels(polygon, truth):
    """IoU with a raster of eight times the size, in which what pycocotools draws is exact enough."""
    drawn = coco_mask.decode(coco_mask.frPyObjects([[v * 8 for v in polygon]], *truth.shape)[0]) > 0
    return (drawn & truth).sum() / (drawn | truth).sum()


def test_ellipses_have_their_place_and_area():
    polygon = outlines.ellipse(40, 30, 25, 10, 30)
    assert len(polygon) == 2 * outlines.VERTICES
    assert iou_by_pixels(polygon, ellipse_by_pixels(40, 30, 25, 10, 30)) > 0.99
    x, y = np.reshape(polygon, (-1, 2)).T
    assert abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2 == pytest.approx(math.pi * 250, rel=1e-9)


def test_rectangles_turn_clockwise():
    assert outlines.rectangle(1, 2, 4, 6) == [1, 2, 5, 2, 5, 8, 1, 8]
    # A quarter about the center, and about the top left corner: y points down.
    assert np.allclose(outlines.rectangle(1, 2, 4, 6, 90), [6, 3, 6, 7, 0, 7, 0, 3])
    assert np.allclose(outlines.rectangle(1, 2, 4, 6, 90, about=(1, 2)), [1, 2, 1, 6, -5, 6, -5, 2])


def shapes_in(kind, folder):
    """A file of a format with a turned ellipse, a rectangle, a point and a line."""
    picture(folder / "p.png", 60, 80)
    if kind == "via":
        shapes = [
            {"name": "ellipse", "cx": 40, "cy": 30, "rx": 25, "ry": 10, "theta": math.radians(30)},
            {"name": "rect", "x": 10, "y": 20, "width": 30, "height": 15},
            {"name": "point", "cx": 4, "cy": 4},
            {"name": "polyline", "all_points_x": [1, 2, 9], "all_points_y": [1, 5, 9]},
        ]
        regions = {str(n): {"shape_attributes": shape, "region_attributes": {"class": "x"}} for n, shape in enumerate(shapes)}
        (folder / "via.json").write_text(json.dumps({"p.png9": {"filename": "p.png", "size": 9, "regions": regions}}))
    elif kind == "cvat":
        (folder / "annotations.xml").write_text(
            '<annotations><image id="0" name="p.png" width="80" height="60">'
            '<ellipse label="x" cx="40" cy="30" rx="25" ry="10" rotation="30"/>'
            '<box label="x" xtl="10" ytl="20" xbr="40" ybr="35"/>'
            '<points label="x" points="4,4"/><polyline label="x" points="1,1;2,5"/></image></annotations>'
        )
    else:
        size = {"original_width": 80, "original_height": 60}
        shapes = [
            ("ellipse", {"x": 50, "y": 50, "radiusX": 31.25, "radiusY": 100 / 6, "rotation": 30}),
            ("rectangle", {"x": 12.5, "y": 100 / 3, "width": 37.5, "height": 25, "rotation": 0}),
            ("keypoint", {"x": 5, "y": 5, "width": 1}),
            ("polygon", {"points": [[1, 1], [2, 5], [8, 9]], "closed": False}),
        ]
        results = [{"type": f"{k}labels", "value": {**v, f"{k}labels": ["x"]}, **size} for k, v in shapes]
        task = {"id": 1, "data": {"img": "https://somewhere.org/p.png?token=1"}, "annotations": [{"result": results}]}
        (folder / "export.json").write_text(json.dumps([task]))


@pytest.mark.parametrize("kind", ["via", "cvat", "labelstudio"])
def test_shapes_become_polygons_and_lines_are_skipped(tmp_path, kind):
    shapes_in(kind, tmp_path / "s")
    report = Report()
    (source,) = recognise.read(tmp_path / "s", report)
    assert source.format == kind
    (image,) = source.images
    ellipse, rectangle = (annotation["segmentation"][0] for annotation in image["annotations"])
    assert iou_by_pixels(ellipse, ellipse_by_pixels(40, 30, 25, 10, 30)) > 0.99
    assert np.allclose(rectangle, [10, 20, 40, 20, 40, 35, 10, 35])
    assert report.skipped["point or line, which has no outline"][0] == 2
    assert report.notes["rectangle taken as the outline of its object"][0] == 1


# ---- COCO, where it is not strict


def coco(folder, images, annotations=(), categories=({"id": 1, "name": "x"},), name="annotations.json"):
    folder.mkdir(parents=True, exist_ok=True)
    document = {"images": images, "annotations": list(annotations), "categories": list(categories)}
    (folder / name).write_text(json.dumps(document))
    return folder / name


def annotation(number, image, category=1, shape=SQUARE, **more):
    return {"id": number, "image_id": image, "category_id": category, "segmentation": [shape], "area": 405, **more}


def test_coco_ids_of_text_sizes_from_pictures_and_names_of_elsewhere(tmp_path):
    home = tmp_path / "s"
    for name in ("one.png", "two words.png", "c/three.png", "up.png"):
        picture(home / "images" / name, 60, 80)
    images = [
        {"id": "img-1", "file_name": "C:\\data\\images\\one.png"},
        {"id": "5", "file_name": "https://host/x/two%20words.png?size=big", "height": 60, "width": None},
        {"id": "img-3", "file_name": "c\\three.png", "height": 0, "width": 0},
        {"id": 1, "file_name": "/home/me/up.png", "height": 60, "width": 80},
    ]
    annotations = [annotation(f"a{n}", image["id"], "k") for n, image in enumerate(images)]
    coco(home / "ann", images, annotations, [{"id": "k", "name": "x"}])
    info = only(home / "ann/annotations.json", tmp_path / "o")
    truth = records.read_ground_truth(tmp_path / "o")
    assert {i["id"]: i["file_name"] for i in truth["images"]} == {
        2: "one.png",
        5: "two words.png",
        3: "c/three.png",
        1: "up.png",
    }
    assert sorted(a["image_id"] for a in truth["annotations"]) == [1, 2, 3, 5] and not info.skipped
    assert info.notes["image without a size, which was read from its file"] == 3
    assert info.notes["file name that was understood as that of a file here"] == 4


def test_a_name_never_leads_into_another_folder_than_its_own(tmp_path):
    folder = tmp_path / "s"
    for name in ("cam2/1.png", "cam2/2.png", "cam3/2.png", "3.png"):
        picture(folder / name, 60, 80)
    found = Folder(folder)
    assert (
        found.find("./cam2/1.png") == "cam2/1.png" and found.find("x/3.png") == "3.png" and found.find("1.png") == "cam2/1.png"
    )
    (tmp_path / "outside.png").write_bytes((folder / "3.png").read_bytes())
    for name in ("cam1/1.png", "../outside.png", str(tmp_path / "outside.png"), "", "a\0b", None, 5, "."):
        with pytest.raises(Unusable, match=r"missing image|no file name|outside the images directory"):
            found.find(name)
    with pytest.raises(Unusable, match="fits several files"):
        found.find("2.png")


def test_roboflow_folders_become_sets(tmp_path):
    categories = [{"id": 0, "name": "cells", "supercategory": "none"}, {"id": 1, "name": "x", "supercategory": "cells"}]
    for number, split in enumerate(("train", "valid", "test"), 1):
        for n in range(number):
            picture(tmp_path / "s" / split / f"{n}.jpg", 60, 80, 10 * number + n)
        images = [{"id": n, "file_name": f"{n}.jpg", "height": 60, "width": 80} for n in range(number)]
        coco(tmp_path / "s" / split, images, [annotation(n, n) for n in range(number)], categories, "_annotations.coco.json")
    (tmp_path / "s/README.txt").write_text("exported")
    infos = run(tmp_path / "s", tmp_path / "o")
    assert {name: info.num_images for name, info in infos.items()} == {"train": 1, "val": 2, "test": 3}
    assert all(info.classes == [{"name": "x", "category_id": 1}] for info in infos.values())
    report = json.loads((tmp_path / "o/report.json").read_text())
    assert [part["name"] for part in report["sets"]] == ["train", "val", "test"]
    assert "Roboflow" in " ".join(note["reason"] for note in report["notes"])


def test_annotation_files_named_like_splits_become_sets(tmp_path):
    for split in ("train2017", "val2017"):
        picture(tmp_path / "s" / split / "1.jpg", 60, 80)
        images = [{"id": 1, "file_name": "1.jpg", "height": 60, "width": 80}]
        coco(tmp_path / "s/annotations", images, [annotation(1, 1)], name=f"instances_{split}.json")
        (tmp_path / f"s/annotations/captions_{split}.json").write_text('{"images": [], "annotations": []}')
    infos = run(tmp_path / "s", tmp_path / "o")
    assert {name: info.num_images for name, info in infos.items()} == {"train": 1, "val": 1}
    assert only(tmp_path / "s/annotations/instances_val2017.json", tmp_path / "one").num_images == 1
    coco(tmp_path / "s/annotations", images, name="instances_more.json")
    with pytest.raises(InputError, match=r"holds 3 files of annotations \(instances_more.json.*--add"):
        run(tmp_path / "s", tmp_path / "o")


def test_pictures_that_lie_nowhere_are_one_line(tmp_path):
    coco(tmp_path / "s", [{"id": 1, "file_name": "1.jpg", "height": 60, "width": 80}], [annotation(1, 1)])
    with pytest.raises(InputError, match=r"none of its pictures \(like '1.jpg'\) lies in .*convert SOURCE IMAGES OUT"):
        run(tmp_path / "s/annotations.json", tmp_path / "o")


# ---- labelme


def labelme_file(path, *shapes, **more):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"shapes": list(shapes), **more}))


def labelme_shape(points, kind="polygon", label="x", **more):
    return {"label": label, "points": points, "shape_type": kind, **more}


def test_labelme_where_it_is_odd(tmp_path):
    home = tmp_path / "s"
    for name in ("1.png", "2.png", "3.png", "images/4.png", "5.png"):
        picture(home / name, 60, 80)
    square = formats.pairs(SQUARE)
    labelme_file(home / "1.json", labelme_shape(square), labelme_shape([[1, 1], [5, 5]], "line"), imagePath="1.png")
    labelme_file(home / "2.json", labelme_shape([[20, 20], [20, 30]], "circle", label=5), imagePath="old name.png")
    (home / "3.json").write_text('{"shapes": [')
    labelme_file(home / "labels/4.json", labelme_shape([[30, 20], [10, 5]], "rectangle"), imagePath="..\\images\\4.png")
    labelme_file(home / "6.json", labelme_shape(square), labelme_shape(square), imagePath="6.png")
    bad = [labelme_shape(s) for s in ([[1, "a"]], 5, None, [[1, 2, 3]])]
    bad += [labelme_shape([], "circle"), labelme_shape(square, "mask", mask="?"), labelme_shape(square, "sphere")]
    bad += [labelme_shape(square, label=name) for name in (None, "", "\ud800", [])]
    labelme_file(home / "5.json", labelme_shape([[math.nan, 1], [5, 5], [9, 1]]), None, "x", *bad, imagePath="5.png")
    (home / "settings.json").write_text("{}")
    info = only(home, tmp_path / "o")
    truth = records.read_ground_truth(tmp_path / "o")
    assert {i["file_name"] for i in truth["images"]} == {"1.png", "2.png", "images/4.png", "5.png"}
    areas = {a["image_id"]: a["area"] for a in truth["annotations"]}
    assert sorted(areas.values()) == pytest.approx([300, math.pi * 100, 405], rel=0.03)
    assert {c["name"] for c in info.classes} == {"x", "5"}
    assert info.skipped == {
        "point or line, which has no outline": 1,
        "file that is no JSON, or cannot be read": 1,
        "missing image": 1,
        "annotation of a skipped image": 2,
        "malformed annotation": 7,
        "mask that is no PNG": 1,
        "shape of a kind that is not known here": 1,
        "annotation without a class": 3,
        "malformed class name": 1,
        "polygon with NaN or infinite coordinates": 1,
    }
    assert info.notes["picture without a labelme file, left out: not labelled yet?"] == 1
    assert info.notes["JSON file that is not labelme's, left out"] == 1


@pytest.mark.parametrize("name", ["labelme", "via"])
def test_a_picture_that_lies_outside_is_not_called_missing(tmp_path, name):
    picture(tmp_path / "pictures/a.png", 60, 80)
    picture(tmp_path / "s/b.png", 60, 80)
    square = [[10, 10], [30, 10], [30, 30]]
    if name == "labelme":
        shape = {"label": "x", "points": square, "shape_type": "polygon"}
        for given in ("../pictures/a.png", "b.png", "../pictures/gone.png"):
            document = {"imagePath": given, "imageHeight": 60, "imageWidth": 80, "shapes": [shape]}
            (tmp_path / f"s/{given.split('/')[-1]}.json").write_text(json.dumps(document))
    else:
        polygon = region("x", np.ravel(square).tolist())
        via_set(tmp_path / "s", *((given, [polygon]) for given in (str(tmp_path / "pictures/a.png"), "b.png", "/gone.png")))
    outside = "image outside the images directory (--allow-outside takes such)"
    info = only(tmp_path / "s", tmp_path / "o")
    assert info.num_images == 1 and info.skipped == {outside: 1, "missing image": 1, "annotation of a skipped image": 2}
    info = only(tmp_path / "s", tmp_path / "p", allow_outside=True)
    assert info.num_images == 2 and info.skipped == {"missing image": 1, "annotation of a skipped image": 1}


def test_labelme_masks_stay_in_their_picture(tmp_path):
    picture(tmp_path / "s/1.png", 60, 80)
    file = io.BytesIO()
    Image.new("L", (30, 20), 255).save(file, "PNG")
    text = base64.b64encode(file.getvalue()).decode()
    shapes = [labelme_shape([[left, top], [0, 0]], "mask", mask=text) for left, top in ((50, 40), (51, 40), (60, 0), (-1, 0))]
    labelme_file(tmp_path / "s/1.json", *shapes, imagePath="1.png", imageWidth=80, imageHeight=60)
    info = only(tmp_path / "s", tmp_path / "o")
    assert info.skipped == {"mask beyond its image": 2}
    assert [a["area"] for a in records.read_ground_truth(tmp_path / "o")["annotations"]] == [600, 580]


# ---- YOLO


def yolo_set(folder, labels, yaml="names: [cat, dog]\ntrain: images\n"):
    for n, (name, text) in enumerate(labels.items()):
        picture(folder / "images" / f"{name}.png", 60, 80, n)
        if text is not None:
            (folder / "labels" / f"{name}.txt").parent.mkdir(parents=True, exist_ok=True)
            (folder / "labels" / f"{name}.txt").write_text(text)
    if yaml:
        (folder / "data.yaml").write_text(yaml)


QUARTER = ".25 .25 .75 .25 .75 .75 .25 .75"


def test_yolo_where_it_is_odd(tmp_path):
    home = tmp_path / "s"
    lines = ["0 .5 .5 .2 .2", f"2 {QUARTER}", f"-1 {QUARTER}", f"0.5 {QUARTER}", "0 .1 .2 .3 .4 .5 .6 .7", "cat .1 .2 .3", "0"]
    lines += [f"1 nan {QUARTER[4:]}", f"1 inf {QUARTER[4:]}", f"1 40 {QUARTER[4:]}", f"1 {QUARTER}", "", "1 .1 .1 .1 .1 .1 .1"]
    yolo_set(home, {"a": "\n".join(lines), "none": None, "empty": ""})
    picture(home / "images/a.jpg", 60, 80)
    (home / "labels/alone.txt").write_text(f"0 {QUARTER}")
    picture(home / "images/latin.png", 60, 80)
    (home / "labels/latin.txt").write_bytes(b"\xff\xfe\x00")
    info = only(home, tmp_path / "o")
    truth = records.read_ground_truth(tmp_path / "o")
    assert {i["file_name"] for i in truth["images"]} == {"images/a.jpg", "images/none.png", "images/empty.png"}
    (found,) = truth["annotations"]
    assert found["area"] == 1200 and truth["categories"][1] == {"id": 1, "name": "dog"}
    assert info.skipped == {
        "annotation without segmentation": 1,
        "class number that the data set does not name": 3,
        "line with an odd number of coordinates": 1,
        "line that is not a class and numbers": 1,
        "coordinates that are not fractions of width and height": 2,
        "polygon with NaN or infinite coordinates": 1,
        "polygon of zero area": 1,
        "empty polygon": 1,
        "label file without a picture": 1,
        "picture with the stem of another, whose label file is the same": 1,
        "label file that cannot be read, and its picture": 1,
    }
    assert info.notes["picture without a label file: background"] == 1


def test_yolo_boxes_alone_are_refused_with_the_way_out(tmp_path):
    yolo_set(tmp_path / "s", {"a": "0 .5 .5 .2 .2"})
    with pytest.raises(InputError, match=r"no usable object: annotations are boxes without.*annotate polygons or masks"):
        run(tmp_path / "s", tmp_path / "o")


def test_yolo_without_names_and_without_an_outline_says_what_is_wrong(tmp_path):
    picture(tmp_path / "s/images/a.png", 60, 80)
    (tmp_path / "s/labels").mkdir()
    (tmp_path / "s/labels/a.txt").write_text("0 .5 .5 .2 .2")
    with pytest.raises(InputError, match="no usable object: annotations are boxes"):
        only(tmp_path / "s", tmp_path / "o")
    (tmp_path / "s/labels/a.txt").write_text("")
    info = only(tmp_path / "s", tmp_path / "o", format="yolo")
    assert [c["name"] for c in info.classes] == ["object"] and info.num_instances == 0


def test_yolo_splits_by_yaml_lists_and_folders(tmp_path):
    home = tmp_path / "s"
    yolo_set(home, {"train/a": f"0 {QUARTER}", "train/b": "", "val/c": f"1 {QUARTER}"}, None)
    for text, said in (
        ("path: .\ntrain: images/train\nval: images/val\ntest:\nnames: {0: cat, 1: dog}", "cat"),
        ("train: ../images/train\nval: ../images/val\ntest: ../test/images\nnc: 2\nnames: ['cat', 'dog']", "cat"),
        ("path: ../nowhere\ntrain: [images/train]\nval: list.txt\nnames: [cat, dog]", "cat"),
        (None, "0"),
    ):
        (home / "list.txt").write_text("./images/val/c.png\n/elsewhere/images/val/gone.png\n")
        (home / "data.yaml").write_text(text) if text else (home / "data.yaml").unlink()
        infos = run(home, tmp_path / f"o{hash(text)}")
        assert {name: (i.num_images, i.num_instances) for name, i in infos.items()} == {"train": (2, 1), "val": (1, 1)}
        assert infos["val"].classes[0]["name"] == said


@pytest.mark.parametrize(
    "text, said",
    [
        ("names: [a]\ntrain: nowhere", "'train: nowhere' leads to no file or folder"),
        ("names: [a]\ntrain: /etc", "'train: /etc' leads to no file or folder"),
        ("names: [a]\ntrain: ../../../../../../etc", "leads to no file or folder"),
        ("names: [a]\ntrain: {a: b}", "'train' must be a path"),
        ("names: 5\ntrain: images", "'names' must be a list"),
        ("names: {x: a}\ntrain: images", "'names' has a number or a name that is none"),
        ("names: [a, null]\ntrain: images", "'names' has a number or a name that is none"),
        ("names: [a\ntrain: images", "not valid YAML"),
        ("[" * 1000, "not valid YAML"),
        ("names: [a]\nval: ''", "names no 'train' or 'val' pictures"),
    ],
)
def test_a_bad_yaml_is_one_line(tmp_path, text, said):
    yolo_set(tmp_path / "s", {"a": f"0 {QUARTER}"}, text)
    with pytest.raises(InputError, match=said) as error:
        run(tmp_path / "s/data.yaml", tmp_path / "o")
    assert "data.yaml" in str(error.value) and not (tmp_path / "o").exists()


# ---- VIA


def region(label=None, shape=SQUARE, **more):
    outline = {"name": "polygon", "all_points_x": shape[0::2], "all_points_y": shape[1::2]}
    return {"shape_attributes": outline | more, "region_attributes": {} if label is None else {"kind": label}}


def via_set(folder, *entries):
    folder.mkdir(parents=True, exist_ok=True)
    files = {f"{n}": {"filename": name, "size": 1, "regions": regions} for n, (name, regions) in enumerate(entries)}
    (folder / "via.json").write_text(json.dumps(files))


def test_via_where_it_is_odd(tmp_path):
    home = tmp_path / "s"
    for name in ("1.png", "2.png", "3.png"):
        picture(home / name, 60, 80)
    bad = [region("x", all_points_x=[1]), region("x", name="cloud"), {"shape_attributes": {}}, 5, region(), region("")]
    via_set(home, ("1.png", [region({"x": True, "y": False}), region("y")]), ("https://h/2.png", bad), ("3.png", []))
    info = only(home, tmp_path / "o")
    assert (info.num_images, info.num_instances) == (3, 2) and [c["name"] for c in info.classes] == ["x", "y"]
    assert info.skipped == {
        "malformed annotation": 2,
        "shape of a kind that is not known here": 1,
        "annotation without a class": 3,
    }
    assert info.notes["picture without a region: background"] == 1
    via_set(home, ("1.png", [region()]), ("gone.png", [region(), region()]))
    info = only(home, tmp_path / "o")  # as in the set of balloons, which names no class
    assert [c["name"] for c in info.classes] == ["object"] and info.num_instances == 1
    assert info.skipped == {"missing image": 1, "annotation of a skipped image": 2}


def test_a_turned_photo_is_annotated_as_viewers_show_it(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(tmp_path / "s/1.jpg", 60, 80, exif=exif)
    via_set(tmp_path / "s", ("1.jpg", [region("x", [10, 50, 30, 50, 30, 70, 10, 70])]))  # below the picture as stored
    info = only(tmp_path / "s", tmp_path / "o")
    (image,) = records.read_ground_truth(tmp_path / "o")["images"]
    assert (image["height"], image["width"], info.num_instances) == (80, 60, 1)
    info = only(tmp_path / "s", tmp_path / "p", exif="ignore")
    assert records.read_ground_truth(tmp_path / "p")["images"][0]["height"] == 60


@pytest.mark.parametrize("tile", [None, 32])
@pytest.mark.parametrize("name", ["labelme", "cvat", "labelstudio", "yolo", "via", "coco"])
def test_a_photo_turned_by_a_half_is_annotated_as_viewers_show_it(tmp_path, name, tile):
    """Its size tells nothing; every one of these programs shows it turned. A COCO file without sizes has them of the file."""
    exif = Image.Exif()
    exif[0x0112] = 3
    picture(tmp_path / "pictures/1.png", 40, 48, exif=exif)
    document = {"images": [{"id": 1, "file_name": "1.png", "height": 40, "width": 48}]}
    document["categories"] = [{"id": 1, "name": "x"}]
    document["annotations"] = [{"id": 1, "image_id": 1, "category_id": 1, "segmentation": [[2.0, 2.0, 30.0, 2.0, 30.0, 20.0]]}]
    (tmp_path / "s").mkdir()
    if name == "coco":
        del document["images"][0]["height"], document["images"][0]["width"]
        (tmp_path / "s/coco.json").write_text(json.dumps(document))
        (tmp_path / "s/1.png").write_bytes((tmp_path / "pictures/1.png").read_bytes())
    else:
        getattr(formats, name)(document, tmp_path / "pictures", tmp_path / "s")
    upright = np.asarray(Image.open(tmp_path / "pictures/1.png").convert("RGB"))[::-1, ::-1]
    info = only(tmp_path / "s", tmp_path / "o", tile=tile, overlap=tile and 0)
    assert [n for text, n in info.notes.items() if text.startswith("image turned by its EXIF orientation")] and not info.skipped
    _, encoded = next(iter(records.iter_images(tmp_path / "o")))
    pixels = np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB"))
    assert np.array_equal(pixels, upright[: tile or 40, : tile or 48])
    info = only(tmp_path / "s", tmp_path / "p", exif="ignore")
    assert not [text for text in info.notes if text.startswith("image turned")]


# ---- CVAT

CVAT = (
    '<annotations><image id="0" name="a.png" width="80" height="60">'
    '<polygon label="x" points="10,10;30,10;30,30"/></image></annotations>'
)


@pytest.mark.parametrize(
    "text, said",
    [
        (f'<!DOCTYPE a [<!ENTITY b "cc">]>{CVAT}', "has a DOCTYPE"),
        ('<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]><annotations>&x;</annotations>', "has a DOCTYPE"),
        (CVAT[:60], "not valid XML"),
        ("", "not valid XML"),
        ("<annotation><object/></annotation>", "is XML of PASCAL VOC, which holds boxes alone"),
        ("<svg/>", "is XML of another kind"),
        ("<annotations><track id='0'/></annotations>", "CVAT for video"),
        ("<annotations>" + "<a>" * 100, "nested more than 50"),
        ("<annotations/>", "empty data set"),
        ("<?xml version='1.0' encoding='klingon'?><annotations/>", "not valid XML"),
    ],
)
def test_a_bad_xml_is_one_line(tmp_path, text, said):
    picture(tmp_path / "s/a.png", 60, 80)
    (tmp_path / "s/annotations.xml").write_text(text)
    with pytest.raises(InputError, match=said) as error:
        run(tmp_path / "s", tmp_path / "o")
    assert "annotations.xml" in str(error.value) and not (tmp_path / "o").exists()


def test_cvat_where_it_is_odd(tmp_path):
    picture(tmp_path / "s/images/a.png", 60, 80)
    place = 'left="10" top="10" width="4" height="2"'
    shapes = [
        '<polygon label="x" points="10,10;30,10;30,30"/>',
        '<polygon label="x" points="10,10;30"/>',
        '<polygon points="10,10;30,10;30,30"/>',
        '<polygon label="x" points="nan,10;30,10;30,30"/>',
        f'<mask label="x" rle="1, 2, 5" {place}/>',
        f'<mask label="x" rle="1, 200" {place}/>',
        f'<mask label="x" rle="{"9" * 300}" {place}/>',
        f'<mask label="x" rle="1, 2, 5" {place.replace("10", "78")}/>',
        '<cuboid label="x"/>',
        '<box label="x" xtl="1" ytl="1" xbr="1" ybr="9"/>',
        '<tag label="x"/>',
    ]
    images = f'<image id="0" name="a.png" width="80" height="60">{"".join(shapes)}</image>'
    images += f'<image id="1" name="gone.png" width="80" height="60">{shapes[0]}</image><image id="2" width="8" height="6"/>'
    label = "<label><name>unused</name></label><label><name>x</name></label>"
    (tmp_path / "s/annotations.xml").write_text(
        f"<annotations><meta><task><labels>{label}</labels></task></meta>{images}</annotations>"
    )
    info = only(tmp_path / "s", tmp_path / "o")
    assert [c["name"] for c in info.classes] == ["unused", "x"]
    assert sorted(a["area"] for a in records.read_ground_truth(tmp_path / "o")["annotations"]) == pytest.approx(
        [2, 200], rel=0.1
    )
    assert info.skipped == {
        "malformed annotation": 2,
        "annotation without a class": 1,
        "polygon with NaN or infinite coordinates": 1,
        "RLE of the wrong size": 1,
        "mask beyond its image": 1,
        "shape of a kind that is not known here": 1,
        "polygon of zero area": 1,
        "tag, which has no outline": 1,
        "missing image": 1,
        "annotation of a skipped image": 1,
        "malformed image entry (no file name)": 1,
    }


# ---- Label Studio


def test_label_studio_where_it_is_odd(tmp_path):
    for name in ("1.png", "2.png", "3.png", "4.png"):
        picture(tmp_path / "s/images" / name, 60, 80)
    size = {"original_width": 80, "original_height": 60}
    points = {"points": [[10, 10], [50, 10], [50, 50]], "closed": True}
    apart = [
        {"id": "r", "type": "polygon", "value": points, **size},
        {"id": "r", "type": "labels", "value": {**points, "labels": ["x"]}, **size},
        {"id": "q", "type": "choices", "value": {"choices": ["good"]}},
        {"type": "brushlabels", "value": {"format": "rle", "rle": [1, 2, 3], "brushlabels": ["x"]}, **size},
        {"type": "polygonlabels", "value": {"points": [[1]], "polygonlabels": ["x"]}},
        {"type": "polygonlabels", "value": points},
        7,
    ]
    tasks = [
        {"id": 1, "data": {"image": "/data/local-files/?d=set%2Fimages%2F1.png"}, "annotations": [{"result": apart[1:]}]},
        {"id": 2, "data": {"image": "s3://bucket/2.png"}, "annotations": []},
        {
            "id": 3,
            "data": {"image": "/data/upload/1/0a1b2c3d-3.png"},
            "annotations": [{"was_cancelled": True, "result": apart}],
        },
        {"id": 4, "data": {"text": 5}, "annotations": [{"result": []}]},
        {"id": 5, "data": {"image": "4.png"}, "annotations": [{"result": []}, {"result": apart}]},
        "task",
    ]
    (tmp_path / "s/export.json").write_text(json.dumps(tasks))
    info = only(tmp_path / "s", tmp_path / "o")
    assert (info.num_images, info.num_instances) == (2, 1)
    assert info.skipped == {
        "task without an annotation: not labelled yet?": 2,
        "task without a picture": 1,
        "malformed task": 1,
        "brush mask that is cut short": 1,
        "malformed annotation": 2,
        "annotation without a class": 1,
    }
    assert info.notes["task with several annotations, of which the first is taken"] == 1


def test_label_studios_small_export(tmp_path):
    picture(tmp_path / "s/1.png", 60, 80)
    polygon = {"points": [[10, 10], [50, 10], [50, 50]], "polygonlabels": ["x"], "original_width": 80, "original_height": 60}
    task = {"image": "/data/upload/1.png", "id": 1, "label": [polygon], "annotator": 1, "annotation_id": 3}
    (tmp_path / "s/export.json").write_text(json.dumps([task]))
    only(tmp_path / "s", tmp_path / "o")
    (found,) = records.read_ground_truth(tmp_path / "o")["annotations"]
    assert found["area"] == pytest.approx(0.08 * 4800, rel=0.1)


# ---- masks


def test_masks_where_they_are_odd(tmp_path):
    home = tmp_path / "s"
    good = np.zeros((60, 80), np.uint16)
    good[5:20, 5:20] = 3
    (home / "masks").mkdir(parents=True)
    for name in ("good", "small", "alone", "lossy", "broken", "blank", "binary"):
        picture(home / "images" / f"{name}.png", 60, 80)
    picture(home / "images/good.jpg", 60, 80)
    Image.fromarray(good).save(home / "masks/good.tif")
    Image.fromarray(good[:50]).save(home / "masks/small.png")
    Image.fromarray(good.astype(np.uint8)).save(home / "masks/lossy.jpg")
    (home / "masks/broken.png").write_bytes(b"no picture")
    Image.fromarray(good * 0).save(home / "masks/blank.png")
    Image.fromarray(good * 0).save(home / "masks/nobody.png")
    two = (good > 0).astype(np.uint8) * 255
    two[40:50, 40:50] = 255
    Image.fromarray(two).save(home / "masks/binary.png")
    info = only(home, tmp_path / "o")
    assert (info.num_images, info.num_instances) == (3, 2)
    assert info.skipped == {
        "picture with the stem of another": 1,
        "mask of another size than its image": 1,
        "picture without a mask: not labelled yet?": 1,
        "mask in a lossy format, which blurs the numbers: save it as PNG or TIFF": 1,
        "corrupt or truncated mask, or not an image": 1,
        "mask without a picture": 1,
    }
    assert info.notes["mask without an object: background"] == 1
    assert any("binary mask" in note for note in info.notes)


# ---- all of them


def test_what_is_not_recognised_is_told(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"no annotations recognised: the folder is empty; give --format \(coco"):
        run(tmp_path / "empty", tmp_path / "o")
    picture(tmp_path / "s/1.png", 60, 80)
    (tmp_path / "s/notes.json").write_text("[]")
    with pytest.raises(InputError, match=r"saw 1 \.(json|png), 1 \.(json|png); give --format"):
        run(tmp_path / "s", tmp_path / "o")
    (tmp_path / "set.zip").write_bytes(b"PK")
    with pytest.raises(InputError, match="is an archive; unpack it, and give the folder"):
        run(tmp_path / "set.zip", tmp_path / "o")
    with pytest.raises(InputError, match="is a picture; give the file, or the folder, with the annotations"):
        run(tmp_path / "s/1.png", tmp_path / "o")
    with pytest.raises(InputError, match="no such file or folder"):
        run(tmp_path / "gone", tmp_path / "o")
    with pytest.raises(InputError, match="holds a list; expected a COCO file"):
        run(tmp_path / "s/notes.json", tmp_path / "o")
    with pytest.raises(InputError, match="nothing is written into a source"):
        run(tmp_path / "s", tmp_path / "s/out")
    with pytest.raises(InputError, match="format is 'voc'; it must be one of coco"):
        run(tmp_path / "s", tmp_path / "o", format="voc")
    with pytest.raises(InputError, match="no such directory; give the one that holds the image files"):
        run(tmp_path / "s", tmp_path / "o", images=tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("ds/ann/1.png.json", '{"objects": []}', "of a Supervisely project: export it there as COCO"),
        ("1_seg.npy", "x", "1_seg.npy: of Cellpose, .* save the masks there as PNG"),
        ("1.geojson", "{}", "QuPath, say: export label images there"),
        ("via_export_csv.csv", "filename", "of the VGG Image Annotator: .*as json"),
        (
            "project.json",
            '{"project": {}, "view": {}, "metadata": {}}',
            "project.json: is a project of VIA 3: export it as COCO",
        ),
        ("export.zip", "PK", "export.zip: is an archive; unpack it, and give the folder"),
        (
            "labels/1.tif",
            None,
            "2 pictures and no annotations: .*put them in masks/ beside images/, or call them NAME_masks.png",
        ),
    ],
)
def test_folders_of_other_programs_are_told_what_to_export(tmp_path, name, content, said):
    picture(tmp_path / "s/1.png", 60, 80)
    if content is None:
        picture(tmp_path / "s" / name, 60, 80)
    else:
        (tmp_path / "s" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "s" / name).write_text(content)
    with pytest.raises(InputError, match=said):
        run(tmp_path / "s", tmp_path / "o")


def test_masks_of_classes_are_told_from_masks_of_objects(tmp_path):
    square = np.zeros((60, 80), np.uint8)
    square[5:15, 5:15], square[30:42, 30:42] = 1, 1
    square[5:15, 40:52], square[45:55, 60:72] = 2, 2
    apart = np.zeros((60, 80), np.uint8)  # four objects, of which one is in two parts
    for number, (y, x) in enumerate([(5, 5), (30, 30), (5, 40), (45, 60)], 1):
        apart[y : y + 10, x : x + 10] = number
    apart[20:28, 5:13], apart[58, 78] = 1, 2  # and a stray pixel, which is no part
    for name, mask in (("classes", square), ("objects", apart)):
        picture(tmp_path / name / "images/1.png", 60, 80)
        (tmp_path / name / "masks").mkdir()
        Image.fromarray(mask).save(tmp_path / name / "masks/1.png")
        info = only(tmp_path / name, tmp_path / f"o_{name}")
        assert any("are they classes?" in note for note in info.notes) == (name == "classes"), info.notes


def test_pictures_in_a_folder_of_their_own(tmp_path):
    document = make(tmp_path / "pictures")
    formats.labelme(document, tmp_path / "pictures", tmp_path / "s")
    for name in SIZES:
        (tmp_path / "s" / name).unlink()
    info = only(tmp_path / "s", tmp_path / "o", images=tmp_path / "pictures")
    assert info.num_instances == len(document["annotations"]) and not info.skipped
    yolo_set(tmp_path / "y", {"a": f"0 {QUARTER}"})
    with pytest.raises(InputError, match="the folder that holds pictures and annotations is SOURCE itself; leave IMAGES out"):
        run(tmp_path / "y", tmp_path / "p", images=tmp_path / "y/images")


def test_yolo_without_any_label_file_is_refused(tmp_path):
    yolo_set(tmp_path / "y", {"a": None, "b": None})
    with pytest.raises(InputError, match=r"data.yaml: none of its 2 pictures has a label file; expected are labels/"):
        run(tmp_path / "y", tmp_path / "o")


def test_xml_of_boxes_is_told_and_does_not_hide_masks(tmp_path):
    document = make(tmp_path / "pictures", parts=False, rle=False)
    formats.voc(document, tmp_path / "pictures", tmp_path / "s")
    (tmp_path / "s/Annotations").mkdir()
    for name in ("a", "b"):
        (tmp_path / f"s/Annotations/{name}.xml").write_text("<annotation><object><bndbox/></object></annotation>")
    assert only(tmp_path / "s", tmp_path / "o").num_instances == 3
    (tmp_path / "s/SegmentationObject").rename(tmp_path / "s/elsewhere")
    with pytest.raises(InputError, match=r"Annotations/a.xml: is XML of PASCAL VOC, which holds boxes alone"):
        run(tmp_path / "s", tmp_path / "o")


def test_cellposes_own_names_of_pictures(tmp_path):
    mask = np.zeros((60, 80), np.uint16)
    mask[5:20, 5:20] = 3
    for n in range(2):
        picture(tmp_path / f"s/00{n}_img.png", 60, 80, n)
        Image.fromarray(mask).save(tmp_path / f"s/00{n}_masks.png")
    picture(tmp_path / "s/002.png", 60, 80, 3)
    Image.fromarray(mask).save(tmp_path / "s/002_cp_masks.tif")
    Image.fromarray(mask).save(tmp_path / "s/003_masks.tif")
    picture(tmp_path / "s/004.png", 60, 80, 4)
    info = only(tmp_path / "s", tmp_path / "o")
    assert (info.num_images, info.num_instances) == (3, 3)
    assert info.skipped == {"mask without a picture": 1, "picture without a mask: not labelled yet?": 1}


def test_a_folder_without_json_at_its_top_may_hold_labelmes_below(tmp_path):
    document = make(tmp_path / "pictures")
    formats.labelme(document, tmp_path / "pictures", tmp_path / "s/all/of/them")
    assert only(tmp_path / "s", tmp_path / "o").num_instances == len(document["annotations"])
    for split in ("train", "val"):
        formats.labelme(document, tmp_path / "pictures", tmp_path / "t" / split)
    assert {name: info.num_images for name, info in run(tmp_path / "t", tmp_path / "p").items()} == {"train": 3, "val": 3}


ODD = [None, True, -1, 0, 10**400, 0.5, math.nan, 1e308, "", "x", "\ud800", [], [[]], {}, [None], {"a": 1}, "1" * 300]


def mutated(value, rng):
    """A JSON value with one of its nodes replaced or left out."""
    if isinstance(value, (dict, list)) and value and rng.random() < 0.9:
        value = value.copy()
        key = rng.choice(list(value) if isinstance(value, dict) else range(len(value)))
        if rng.random() < 0.1:
            del value[key]
        else:
            value[key] = mutated(value[key], rng)
        return value
    return rng.choice(ODD)


@pytest.mark.parametrize("name", ["labelme", "via", "labelstudio", "cvat", "yolo"])
def test_fuzz(tmp_path, name):
    """Whatever stands in a file: a set, or an InputError of one line."""
    document = make(tmp_path / "pictures", parts=False, rle=name in HOLES)
    source = tmp_path / "s"
    source.mkdir()
    getattr(formats, name)(document, tmp_path / "pictures", source)
    file = next(f for f in sorted(source.rglob("*")) if f.suffix in (".json", ".xml", ".txt") and f.stat().st_size)
    valid, done = file.read_text(), 0
    for seed in range(120):
        rng = random.Random(f"{name} {seed}")
        if file.suffix == ".json" and seed % 3:
            text = json.dumps(mutated(json.loads(valid), rng))
        else:
            start = rng.randrange(len(valid))
            text = (
                valid[:start] + rng.choice(["", '"', "<", "9" * 400, "\0", "é", " ", "-"]) + valid[start + rng.randrange(9) :]
            )
        file.write_text(text)
        try:
            run(source, tmp_path / "o")
            done += 1
        except InputError as error:
            assert "\n" not in str(error), seed
    assert done > 20
