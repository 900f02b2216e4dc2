"""Data as other systems and tools write it: encodings, letters with marks, kinds of pictures; right, or said in one line."""

import codecs
import json
import struct
import unicodedata
import zlib

import numpy as np
import pytest
import tifffile
from PIL import Image, ImageChops
from pycocotools import mask as coco_mask

from helpers import formats
from helpers.detections import star_predictor
from polarmask_tf.data import convert, pictures, records
from polarmask_tf.data.report import Report
from polarmask_tf.data.sources import recognise
from polarmask_tf.data.sources.folder import Folder
from polarmask_tf.errors import InputError
from polarmask_tf.inference import results, truth, visualize
from polarmask_tf.inference.inputs import Input
from polarmask_tf.inference.predict import predict

RING = [6.0, 6.0, 24.0, 6.0, 24.0, 21.0, 6.0, 21.0]
COMPOSED = "Äpfel"
TAKEN_APART = unicodedata.normalize("NFD", COMPOSED)


def pixels():
    image = np.full((30, 40, 3), 30, np.uint8)
    image[6:21, 6:24] = (200, 40, 90)
    return image


def document(names, category="cat", segmentation=None):
    images = [{"id": n, "file_name": name, "height": 30, "width": 40} for n, name in enumerate(names, 1)]
    annotations = [
        {"id": n, "image_id": n, "category_id": 1, "iscrowd": 0, "area": 270, "segmentation": segmentation or [RING]}
        for n in range(1, len(names) + 1)
    ]
    return {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": category}]}


def converted(source, out, **options):
    (info,) = convert.convert_dataset(source, out, progress=False, processes=1, **options).values()
    return info


def masks(data):
    found = records.read_ground_truth(data)
    return [coco_mask.decode(annotation["segmentation"]) for annotation in found["annotations"]]


# ---- encodings

ENCODINGS = {
    "utf-8": "utf-8",
    "BOM": "utf-8-sig",
    "Notepad": "utf-16",
    "big-endian": "utf-16-be",
    "utf-32": "utf-32",
}


def encode(text, encoding):
    marks = {"utf-16-be": codecs.BOM_UTF16_BE}
    return marks.get(encoding, b"") + text.replace("\n", "\r\n").encode(encoding)


@pytest.mark.parametrize("encoding", ENCODINGS.values(), ids=ENCODINGS)
@pytest.mark.parametrize("name", ["coco", "labelme", "yolo", "via", "cvat", "labelstudio", "voc"])
def test_every_encoding_of_every_format(tmp_path, name, encoding):
    """With Windows' line ends; XML says in its first line what it is in."""
    (tmp_path / "pictures").mkdir()
    Image.fromarray(pixels()).save(tmp_path / "pictures/a.png")
    content = document(["a.png"], COMPOSED)
    source = tmp_path / "source"
    source.mkdir()
    if name == "coco":
        (source / "ann.json").write_text(json.dumps(content, ensure_ascii=False))
        formats.copy_pictures(content, tmp_path / "pictures", source)
    else:
        getattr(formats, name)(content, tmp_path / "pictures", source)
    for file in source.rglob("*"):
        if file.suffix in (".json", ".txt", ".yaml", ".xml"):
            text, of = file.read_text(), encoding
            if file.suffix == ".xml":
                of = encoding.replace("32", "16")  # no parser reads XML in UTF-32
                text = text.replace("encoding='utf-8'", f"encoding='{of.removesuffix('-sig').removesuffix('-be')}'")
            file.write_bytes(encode(text, of))
    info = converted(source, tmp_path / "out")
    assert [c["name"] for c in info.classes] == [COMPOSED] and not info.skipped
    (mask,) = masks(tmp_path / "out")
    assert mask.sum() == 15 * 18 and mask[6:21, 6:24].all()


def test_text_in_no_encoding_is_named(tmp_path):
    formats.yolo(document(["a.png"]), save(tmp_path, "a.png"), tmp_path / "s")
    (tmp_path / "s/data.yaml").unlink()
    (tmp_path / "s/labels/a.txt").write_bytes(b"0 0.1 0.1 0.5 0.1 0.5 0.5\n" + "ä".encode("latin-1"))
    Image.fromarray(pixels()).save(tmp_path / "s/images/b.png")
    (tmp_path / "s/labels/b.txt").write_text("0 0.1 0.1 0.5 0.1 0.5 0.5\n")
    report = Report()
    recognise.read(tmp_path / "s", report)
    assert report.skipped["label file that cannot be read, and its picture"][1].endswith("no text in UTF-8 or UTF-16")


def save(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels()).save(folder / name)
    return folder


# ---- YOLO's label files


def test_decimal_commas_are_read_and_noted(tmp_path):
    source = formats.yolo(document(["a.png", "b.png"]), save(tmp_path, "a.png", "b.png"), tmp_path / "s")
    (source / "data.yaml").unlink()  # recognised by them, too
    text = (source / "labels/a.txt").read_text()
    for name in ("a", "b"):
        (source / f"labels/{name}.txt").write_text(text.replace(".", ","))
    info = converted(source, tmp_path / "out")
    assert info.notes["line with decimal commas, taken for points"] == 2 and not info.skipped
    assert all(mask.sum() == 15 * 18 for mask in masks(tmp_path / "out"))
    (source / "labels/b.txt").write_text("0,0.1,0.1,0.5,0.1,0.5,0.5\n0 0,1 0.1 0,5 0,1 0,5 0,5\n")  # columns, and both
    assert converted(source, tmp_path / "both").skipped == {"line that is not a class and numbers": 2}


def test_an_empty_label_file_is_background_and_a_missing_one_is_told_apart(tmp_path):
    source = formats.yolo(document(["a.png", "b.png", "c.png"]), save(tmp_path, "a.png", "b.png", "c.png"), tmp_path / "s")
    (source / "labels/b.txt").write_text("\n")
    (source / "labels/c.txt").unlink()
    info = converted(source, tmp_path / "out")
    assert info.num_images == 3 and info.instances_per_image == {0: 2, 1: 1}
    assert info.notes["picture with an empty label file: background"] == 1
    assert info.notes["picture without a label file: background"] == 1
    listed = json.loads((tmp_path / "out/report.json").read_text())["notes"]
    assert {entry["reason"]: entry["first"] for entry in listed}[
        "picture with an empty label file: background"
    ] == "images/b.png"


# ---- letters with marks, which macOS stores as two characters


@pytest.mark.parametrize("on_disk", [COMPOSED, TAKEN_APART])
@pytest.mark.parametrize("name", ["coco", "labelme", "yolo", "via", "cvat", "labelstudio", "masks", "cellpose", "bowl", "voc"])
def test_names_are_matched_however_they_are_spelled(tmp_path, name, on_disk):
    """The annotations have the other spelling, of the picture and of the class."""
    inside = TAKEN_APART if on_disk == COMPOSED else COMPOSED
    save(tmp_path / "pictures", f"{on_disk}.png", f"{inside}.png")
    content = document([f"{inside}.png"], inside)
    source = tmp_path / "source"
    source.mkdir()
    if name == "coco":
        (source / "ann.json").write_text(json.dumps(content))
        formats.copy_pictures(content, tmp_path / "pictures", source)
    else:
        getattr(formats, name)(content, tmp_path / "pictures", source)
    for file in [path for path in source.rglob("*") if path.name == f"{inside}.png" and path.parent.name not in AS_MASKS]:
        file.rename(file.with_name(f"{on_disk}.png"))
    info = converted(source, tmp_path / "out")
    assert info.num_images == info.num_instances == 1 and not info.skipped
    one_class = name in ("masks", "cellpose", "bowl")
    assert [c["name"] for c in info.classes] == (["object"] if one_class else [COMPOSED])
    if not one_class:  # a name typed on either system
        assert converted(source, tmp_path / "renamed", classes=[f"{TAKEN_APART}=apple"]).classes[0]["name"] == "apple"


AS_MASKS = ("masks", "SegmentationObject", "SegmentationClass")


def test_the_truth_of_a_picture_is_found_however_it_is_spelled(tmp_path):
    save(tmp_path, f"{TAKEN_APART}.png")
    entry = Input(tmp_path / f"{TAKEN_APART}.png", f"{TAKEN_APART}.png", TAKEN_APART)
    there = document([f"{COMPOSED}.png"])
    assert truth.entries([entry], there) == {entry: there["images"][0]}


def test_a_class_is_found_however_it_is_spelled():
    classes = [{"name": TAKEN_APART, "category_id": 1}, {"name": "pear", "category_id": 2}]
    assert results.class_indices(classes, [COMPOSED]) == results.class_indices(classes, [TAKEN_APART]) == [0]


def test_labels_are_drawn_with_their_marks():
    image = np.zeros((400, 400, 3), np.uint8)
    ring = np.array([[50.0, 100], [350, 100], [350, 350]])
    drawn = [visualize.draw(image, [ring], [label]) for label in (COMPOSED, TAKEN_APART, "Apfel")]
    assert ImageChops.difference(drawn[0], drawn[1]).getbbox() is None
    assert ImageChops.difference(drawn[0], drawn[2]).getbbox() is not None
    sheets = [visualize.sheet([(drawn[0], label)], heads=()) for label in (COMPOSED, TAKEN_APART)]
    assert ImageChops.difference(*sheets).getbbox() is None


# ---- kinds of pictures

FRAMES, ALPHA = "several frames or pages, of which the first is taken", "transparency left out"


def odd_pictures(folder):
    """{name: what is said of it} of pictures that all show `pixels`, in RGB or gray."""
    color = Image.fromarray(pixels())
    other = ImageChops.invert(color)
    holes = Image.fromarray(np.uint8(255 * (np.arange(40) < 20)[None].repeat(30, 0)))
    transparent, palette, more = color.copy(), color.quantize(8), {"save_all": True, "append_images": [other, other]}
    transparent.putalpha(holes)
    gray = transparent.convert("LA")
    gray.putalpha(holes)
    said = {
        "rgba.png": (transparent, {}, [ALPHA]),
        "rgba.tif": (transparent, {}, [ALPHA]),
        "la.png": (gray, {}, [ALPHA]),
        "palette.png": (palette, {}, []),
        "palette alpha.png": (palette, {"transparency": 0}, [ALPHA]),
        "cmyk.jpg": (color.convert("CMYK"), {"quality": 100, "subsampling": 0}, []),
        "cmyk.tif": (color.convert("CMYK"), {}, []),
        "bit.png": (color.convert("L").point(lambda v: 255 * (v > 60)).convert("1"), {}, []),
        "bit.tif": (color.convert("L").point(lambda v: 255 * (v > 60)).convert("1"), {"compression": "group4"}, []),
        "lab.tif": (color.convert("LAB"), {}, []),
        "moving.gif": (palette, {**more, "append_images": [other.quantize(8)]}, [FRAMES]),
        "moving.webp": (color, {**more, "lossless": True}, [FRAMES]),
        "moving.png": (color, more, [FRAMES]),
        "pages.tif": (color, more, [FRAMES]),
        "UPPER.PNG": (color, {}, []),
    }
    folder.mkdir()
    for name, (image, options, _) in said.items():
        image.save(folder / name, **options)
    return {name: notes for name, (_, _, notes) in said.items()}


def test_odd_pictures_are_read_right_or_told(tmp_path):
    """convert, and predict, which must see the same."""
    said = odd_pictures(tmp_path / "s")
    (tmp_path / "s/ann.json").write_text(json.dumps(document(sorted(said))))
    info = converted(tmp_path / "s", tmp_path / "out")
    assert info.num_images == len(said) and not info.skipped
    for image, features in records.iter_records(info):
        name, notes = image["file_name"], []
        shown = results.read_image(features["image/encoded"].bytes_list.value[0])
        seen = results.read_image(tmp_path / "s" / name, notes=notes)
        assert (seen == shown).all(), name
        gray = seen.astype(int).mean(axis=2)
        assert gray[8:19, 8:22].min() > gray[:4].max() + 40, name  # the object, also where it is transparent
        assert [note.partition(":")[0] for note in notes] == said[name], name
    for note in (ALPHA, FRAMES):
        (count,) = (count for reason, count in info.notes.items() if reason.startswith(note))
        assert count == sum(note in notes for notes in said.values())


def test_predict_tells_of_frames_and_transparency(tmp_path, capsys):
    odd_pictures(tmp_path / "s")
    done = predict(star_predictor(), tmp_path / "s", tmp_path / "out", save=["coco"], progress=False)
    assert done["images"] == 15 and not done["skipped"]
    printed = capsys.readouterr().err
    assert f"note: 4 of 15 images: {FRAMES}" in printed and f"note: 4 of 15 images: {ALPHA}: such pixels" in printed


def test_left_out_asks_little_of_what_is_broken():
    for data in (b"", b"GIF89a", b"\x89PNG\r\n\x1a\n" + b"\xff" * 50, b"II*\0" + b"\xff" * 8):
        assert pictures.left_out(data) == []


def test_floats_are_not_called_corrupt(tmp_path):
    (tmp_path / "s").mkdir()
    Image.fromarray(pixels()[..., 0].astype(np.float32)).save(tmp_path / "s/f.tif")
    save(tmp_path / "s", "a.png")
    (tmp_path / "s/ann.json").write_text(json.dumps(document(["f.tif", "a.png"])))
    info = converted(tmp_path / "s", tmp_path / "out")
    assert info.skipped["pixels whose values no picture of 8 or 16 bits has (see --bit-depth)"] == 1
    assert converted(tmp_path / "s", tmp_path / "deep", bit_depth=8).num_images == 2


# ---- COCO's segmentations, good and bad ones


def test_segmentations_of_every_kind_are_read_or_counted(tmp_path):
    mask = np.zeros((30, 40), np.uint8)
    mask[6:21, 6:24] = 1
    packed = coco_mask.encode(np.asfortranarray(mask))["counts"].decode()
    flat = mask.ravel(order="F")
    runs = np.diff([0, *(np.flatnonzero(np.diff(flat)) + 1), flat.size]).tolist()
    kinds = {
        "": ([RING], {"size": [30, 40], "counts": packed}, {"size": [30, 40], "counts": runs}, [RING, []]),
        "empty polygon": ([], [[]]),
        "polygon with fewer than 3 points": ([[6, 6, 24, 6]], [[6, 6], [8, 8, 9, 9]]),
        "annotation without segmentation": (None,),
        "empty mask": ({"size": [30, 40], "counts": [1200]},),
        "RLE of the wrong size": ({"size": [40, 30], "counts": runs}, {"size": [30, 40], "counts": runs[:-1]}),
        "malformed segmentation": ("text", 3),
        "malformed RLE (no 'size' of two integers)": ({}, {"counts": packed}),
        "malformed RLE (no 'counts')": ({"size": [30, 40]},),
        "malformed polygon (not lists of x, y, x, y, ...)": ([["6", "6", "9", "9", "6", "9"]], [[6, 6, 9, 9, 6]], [{}]),
        "polygon of zero area": ([[6, 6, 9, 9, 12, 12]],),
    }
    content = document(["a.png"])
    shapes = [shape for found in kinds.values() for shape in found]
    content["annotations"] = [
        {"id": n, "image_id": 1, "category_id": 1, "iscrowd": 0, "area": 270, "bbox": [6, 6, 18, 15], "segmentation": shape}
        for n, shape in enumerate(shapes, 1)
    ]
    for shape in content["annotations"][-2:]:
        shape.pop("area")
    save(tmp_path / "s", "a.png")
    (tmp_path / "s/ann.json").write_text(json.dumps(content))
    info = converted(tmp_path / "s", tmp_path / "out")
    assert info.skipped == {reason: len(found) for reason, found in kinds.items() if reason}
    assert len(masks(tmp_path / "out")) == 4 and all((found == mask).all() for found in masks(tmp_path / "out"))


def test_strict_stops_at_the_first(tmp_path):
    save(tmp_path / "s", "a.png")
    content = document(["a.png"])
    content["annotations"][0]["segmentation"] = []
    (tmp_path / "s/ann.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match="empty polygon; mend it, or leave out --strict"):
        converted(tmp_path / "s", tmp_path / "out", strict=True)


def test_a_category_by_its_name_is_understood(tmp_path):
    save(tmp_path / "s", "a.png")
    content = document(["a.png"], COMPOSED)
    (first,) = content["annotations"]
    content["annotations"] += [{**first, "id": 2, "category_id": TAKEN_APART}, {**first, "id": 3, "category_id": "x"}]
    (tmp_path / "s/ann.json").write_text(json.dumps(content))
    info = converted(tmp_path / "s", tmp_path / "out")
    assert info.num_instances == 2 and info.skipped == {"malformed annotation (no integer 'category_id')": 1}
    assert info.notes["annotation whose category is given by its name"] == 1


# ---- what a person has in a folder


def labelled(folder, name="a.png", **changes):
    """A labelme file with its picture."""
    save(folder, name)
    shape = {"label": "cat", "points": np.reshape(RING, (-1, 2)).tolist(), "shape_type": "polygon"}
    content = {"shapes": [shape], "imagePath": name, "imageWidth": 40, "imageHeight": 30, **changes}
    (folder / name).with_suffix(".json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("name", ["coco", "via", "cvat", "labelstudio"])
def test_names_in_upper_and_lower_case(tmp_path, name):
    """From Windows, whose file systems do not tell them apart: the annotations say a.png."""
    source, content = tmp_path / "s", document(["sub/a.png"])
    source.mkdir()
    save(tmp_path / "pictures", "sub/a.png")
    if name == "coco":
        (source / "ann.json").write_text(json.dumps(content))
        formats.copy_pictures(content, tmp_path / "pictures", source)
    else:
        getattr(formats, name)(content, tmp_path / "pictures", source)
    (picture,) = source.rglob("a.png")
    picture.rename(picture.with_name("A.PNG"))
    assert converted(source, tmp_path / "out").num_instances == 1
    Image.fromarray(pixels()).save(picture.with_name("A.png"))  # and which of the two is it?
    with pytest.raises(InputError, match=r"none of its pictures|fits several files"):
        converted(source, tmp_path / "two")
    Image.fromarray(pixels()).save(picture)
    assert converted(source, tmp_path / "three").num_instances == 1


def test_label_files_in_upper_case(tmp_path):
    source = formats.yolo(document(["a.png", "b.png"]), save(tmp_path, "a.png", "b.png"), tmp_path / "s")
    (source / "labels/a.txt").rename(source / "labels/A.TXT")
    info = converted(source, tmp_path / "out")
    assert info.num_instances == 2 and not info.skipped and "picture without a label file: background" not in info.notes


def test_poses_and_boxes_of_yolo_are_no_outlines(tmp_path):
    source = formats.yolo(document(["a.png"]), save(tmp_path, "a.png"), tmp_path / "s")
    (source / "labels/a.txt").write_text(
        "0 .2 .2 .5 .2 .5 .6 .2 .6\n0 .5 .2 .75 .366667 .625 .7 .375 .533333\n0 .2 .2 .5 .2 .6 .6 .2 .6\n"
    )
    assert converted(source, tmp_path / "out").notes["rectangle taken as the outline of its object"] == 2
    text = (source / "data.yaml").read_text()
    (source / "data.yaml").write_text(text + "kpt_shape: [2, 3]\n")
    with pytest.raises(InputError, match="is a set of poses"):
        converted(source, tmp_path / "pose")


def test_annotations_of_a_format_that_is_not_read_are_told(tmp_path):
    source = formats.yolo(document(["a.png"]), save(tmp_path, "a.png"), tmp_path / "s")
    labelled(source, "b.png")
    notes = converted(source, tmp_path / "out").notes
    assert notes["annotations of another format in the same folder, not read (--format labelme reads them instead)"] == 1
    (source / "data.yaml").unlink()
    notes = converted(source, tmp_path / "labelme").notes
    assert notes["annotations of another format in the same folder, not read (--format yolo reads them instead)"] == 1
    alone = converted(labelled(tmp_path / "alone"), tmp_path / "one")
    assert not alone.notes


def test_an_outline_far_beyond_its_image_is_told(tmp_path):
    save(tmp_path / "s", "a.png")
    content = document(["a.png"])
    shapes = ([10, 10, 90, 10, 90, 80, 10, 80], [-3, 2, 20, 2, 20, 20, -3, 20], [2, -4, 20, 2, 20, 20])
    content["annotations"] = [
        {"id": n, "image_id": 1, "category_id": 1, "segmentation": [shape]} for n, shape in enumerate(shapes, 1)
    ]
    (tmp_path / "s/ann.json").write_text(json.dumps(content))
    notes = converted(tmp_path / "s", tmp_path / "out").notes
    assert [number for reason, number in notes.items() if reason.startswith("outline that reaches more than a tenth")] == [2]


def test_a_labelme_file_that_has_the_picture_itself_says_how_to_get_it_out(tmp_path):
    source = labelled(tmp_path / "s", imageData="iVBORw0KGgo=")
    labelled(source, "b.png")
    (source / "a.png").unlink()
    assert any("labelme_export_json" in reason for reason in converted(source, tmp_path / "out").skipped)


def test_labels_without_a_single_picture(tmp_path):
    (tmp_path / "s").mkdir()
    (tmp_path / "s/a.txt").write_text("0 .1 .1 .5 .1 .5 .5\n")
    with pytest.raises(InputError, match=r"holds no pictures \(saw 1 \.txt\)"):
        converted(tmp_path / "s", tmp_path / "out")


# ---- sizes beyond what Pillow opens


def claims(path, width, height):
    """A small PNG that says that it is large."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    parts = (b"IHDR", header), (b"IDAT", zlib.compress(bytes(10))), (b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts))


def test_pictures_of_too_many_pixels_are_not_called_corrupt(tmp_path):
    """With a size in the annotations, and where it has to be read from the picture."""
    for name, drop in (("coco", False), ("nosize", True)):
        content = document(["large.png", "a.png"])
        save(tmp_path / name, "a.png")
        claims(tmp_path / name / "large.png", 20_000, 10_000)
        for image in content["images"] if drop else ():
            del image["width"], image["height"]
        (tmp_path / name / "ann.json").write_text(json.dumps(content))
        assert converted(tmp_path / name, tmp_path / f"{name} out").skipped["image of more than 120 megapixels"] == 1


def test_a_large_tiff_without_a_size_in_the_annotations_is_cut_into_tiles(tmp_path):
    """VIA gives none; Pillow opens no file of so many pixels."""
    side = 14_336
    (tmp_path / "s").mkdir()
    tile = np.full((1024, 1024), 9, np.uint8)
    options = {"shape": (side, side), "dtype": "uint8", "tile": tile.shape, "compression": "zlib"}
    tifffile.imwrite(tmp_path / "s/large.tif", (tile for _ in range(14**2)), **options)
    attributes = {"name": "polygon", "all_points_x": [9000, 9100, 9100], "all_points_y": [9000, 9000, 9100]}
    entry = {"filename": "large.tif", "regions": [{"shape_attributes": attributes, "region_attributes": {"label": "cat"}}]}
    (tmp_path / "s/via.json").write_text(json.dumps({"large.tif1": entry}))
    assert Folder(tmp_path / "s", most_pixels=side**2).size("large.tif") == (side, side)
    with pytest.raises(InputError, match="image of more than 120 megapixels"):
        converted(tmp_path / "s", tmp_path / "whole")
    info = converted(tmp_path / "s", tmp_path / "out", tile=512, overlap=0)
    assert info.num_instances == 1 and not info.skipped


@pytest.mark.parametrize("name", ["labelme", "yolo", "via", "cvat", "labelstudio", "masks", "cellpose", "bowl", "voc"])
def test_every_format_is_cut_into_tiles(tmp_path, name):
    (tmp_path / "source").mkdir()
    source = getattr(formats, name)(document(["a.png"]), save(tmp_path / "pictures", "a.png"), tmp_path / "source")
    info = converted(source, tmp_path / "out", tile=25, overlap=5)
    assert not info.skipped and sum(mask.sum() for mask in masks(tmp_path / "out")) >= 15 * 18
