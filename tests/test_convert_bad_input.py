"""Whatever the annotation file or the images are like: success with a count of what was skipped, or one InputError."""

import copy
import errno
import io
import json
import os
import random
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps
from pycocotools import mask as coco_mask

from polarmask_tf import lite
from polarmask_tf.data import convert, dataset, publish, records
from polarmask_tf.errors import InputError

SQUARE = [4.0, 4, 12, 4, 12, 12, 4, 12]
RLE = {"size": [16, 24], "counts": coco_mask.encode(np.asfortranarray(np.eye(16, 24, dtype=np.uint8)))["counts"].decode()}


@pytest.fixture
def case(tmp_path):
    """A valid set of two images and three annotations; tests spoil the document or the files, then call run()."""
    folder = tmp_path / "images"
    folder.mkdir()
    noise = np.random.default_rng(0).integers(0, 255, (16, 24, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "good.jpg")
    Image.fromarray(noise).save(folder / "bad.jpg")
    Image.fromarray(noise).save(folder / "bad.png")
    document = {
        "images": [
            {"id": 1, "file_name": "good.jpg", "height": 16, "width": 24},
            {"id": 2, "file_name": "bad.jpg", "height": 16, "width": 24},
            {"id": 3, "file_name": "bad.png", "height": 16, "width": 24},
        ],
        "annotations": [
            {"id": i, "image_id": i, "category_id": 5, "iscrowd": 0, "area": 64.0, "bbox": [4, 4, 8, 8], "segmentation": s}
            for i, s in ((1, [SQUARE]), (2, [SQUARE]), (3, RLE))
        ],
        "categories": [{"id": 5, "name": "thing"}],
    }
    return Case(tmp_path, folder, document)


class Case:
    def __init__(self, base, folder, document):
        self.base, self.folder, self.document = base, folder, document
        self.out = base / "out"

    def run(self, text=None, **options):
        file = self.base / "annotations.json"
        if text is None:
            text = json.dumps(self.document)
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
        return convert.convert(file, self.folder, self.out, **({"progress": False, "processes": 1} | options))

    def assert_skips(self, reason, where, capsys, images=3, instances=2, count=1, **options):
        """Counted, named, kept out of the records; fatal under strict."""
        info = self.run(progress=True, **options)
        assert info.skipped[reason] == count
        assert (info.num_images, info.num_instances) == (images, instances)
        truth = records.read_ground_truth(self.out)
        assert (len(truth["images"]), len(truth["annotations"])) == (images, instances)
        (line,) = [line for line in capsys.readouterr().out.splitlines() if f"skipped {count} x {reason} (" in line]
        assert where in line
        with pytest.raises(InputError, match="leave out --strict") as error:
            self.run(strict=True, **options)
        assert where in str(error.value) and reason in str(error.value)
        assert "\n" not in str(error.value)


def spoil_annotation(**changes):
    return lambda document: document["annotations"][1].update(changes)


HUGE = 10**400
BAD_ANNOTATIONS = {
    "polygon with fewer than 3 points": [spoil_annotation(segmentation=[[1, 2, 3, 4]])],
    "empty polygon": [spoil_annotation(segmentation=[]), spoil_annotation(segmentation=[[]])],
    "polygon of zero area": [
        spoil_annotation(segmentation=[[1, 1, 5, 5, 9, 9]]),
        spoil_annotation(segmentation=[[3, 3] * 4]),
        spoil_annotation(segmentation=[[3, 3, 8, 3, 3, 3, 8, 3]]),
    ],
    "polygon with NaN or infinite coordinates": [
        spoil_annotation(segmentation=[[*SQUARE[:-1], value]]) for value in (float("nan"), float("inf"), -float("inf"))
    ],
    "polygon outside the image": [spoil_annotation(segmentation=[[v + shift for v in SQUARE]]) for shift in (-12, 24, 500)],
    "polygon with an outline longer than the image can hold": [
        spoil_annotation(segmentation=[[1000 * (-1) ** i if axis else i % 24 for i in range(20) for axis in (0, 1)]]),
    ],
    "polygon of more than 100,000 vertices or 10,000 parts": [
        spoil_annotation(segmentation=[[1, 2] * 100_001]),
        spoil_annotation(segmentation=[SQUARE] * 10_001),
    ],
    "polygon within the first pixel (are its coordinates fractions of width and height?)": [
        spoil_annotation(segmentation=[[0.1, 0.2, 0.5, 0.2, 0.5, 1.0]])
    ],
    "polygon with absurd coordinates (beyond ten times the image)": [
        spoil_annotation(segmentation=[[4, 4, 1e9, 4, 4, 12]]),
        spoil_annotation(segmentation=[[-1e300, 4, 12, 4, 4, 12]]),
    ],
    "malformed polygon (not lists of x, y, x, y, ...)": [
        spoil_annotation(segmentation=s)
        for s in (SQUARE[:-1], [SQUARE[:-1]], [[*SQUARE[:-1], "a"]], [[*SQUARE[:-1], HUGE]], [None], [{}], [[[1, 2]] * 4])
    ],
    "malformed segmentation": [spoil_annotation(segmentation="abc"), spoil_annotation(segmentation=5)],
    "annotation without segmentation": [
        spoil_annotation(segmentation=None),
        lambda document: document["annotations"][1].pop("segmentation"),
    ],
    "empty mask": [spoil_annotation(segmentation={"size": [16, 24], "counts": [384]})],
    "RLE of the wrong size": [
        spoil_annotation(segmentation=RLE | {"size": [24, 16]}),
        spoil_annotation(segmentation={"size": [16, 24], "counts": [100, 200]}),
        spoil_annotation(segmentation={"size": [16, 24], "counts": [100, HUGE]}),
        spoil_annotation(segmentation=RLE | {"counts": RLE["counts"] + "1"}),
    ],
    "RLE of more than 5,000,000 runs": [
        spoil_annotation(segmentation={"size": [16, 24], "counts": [384] + [0] * 5_000_000}),
        spoil_annotation(segmentation=RLE | {"counts": "0" * 5_000_001}),
    ],
    "malformed RLE (broken 'counts')": [
        spoil_annotation(segmentation=RLE | {"counts": text})
        for text in ("", "ö", "\ud800", RLE["counts"] + "o", "ooooooooooooooo1", "abc\0", " ", "1N")
    ],
    "malformed RLE ('counts' are not integers >= 0)": [
        spoil_annotation(segmentation={"size": [16, 24], "counts": counts}) for counts in ([-1, 385], [1.5, 382.5], ["384"], [])
    ],
    "malformed RLE (no 'counts')": [spoil_annotation(segmentation={"size": [16, 24]})],
    "malformed RLE (no 'size' of two integers)": [
        spoil_annotation(segmentation=RLE | {"size": size}) for size in (None, [16], "16", [16.0, 24.0])
    ],
    "annotation of an unknown image": [spoil_annotation(image_id=77)],
    "annotation of an unknown category": [spoil_annotation(category_id=6)],
    "duplicate annotation id": [spoil_annotation(id=1)],
    "malformed annotation (not an object)": [lambda document: document["annotations"].__setitem__(1, [1, 2])],
    "malformed annotation (no integer 'id')": [spoil_annotation(id=value) for value in (None, [], 1.5, True, HUGE)],
    "malformed annotation (no integer 'image_id')": [lambda document: document["annotations"][1].pop("image_id")],
    "malformed annotation (no integer 'category_id')": [spoil_annotation(category_id=[5])],
    "malformed annotation ('iscrowd' is neither 0 nor 1)": [spoil_annotation(iscrowd=v) for v in ("no", 2, [], None)],
    "malformed annotation ('area' is not a number >= 0)": [
        spoil_annotation(area=value) for value in (float("nan"), float("inf"), -1, "64", [64], HUGE, True)
    ],
}


@pytest.mark.parametrize("reason, spoil", [(reason, spoil) for reason, spoils in BAD_ANNOTATIONS.items() for spoil in spoils])
def test_an_unusable_annotation_is_skipped_and_named(case, capsys, reason, spoil):
    spoil(case.document)
    in_shard = any(word in reason for word in ("olygon", "RLE", "mask", "segmentation"))
    case.assert_skips(reason, "annotation 2" if in_shard else "annotations.json, annotations[1]", capsys)


def test_an_rle_of_an_overlong_number_is_refused_not_wrapped(case):
    case.document["annotations"][1]["segmentation"] = RLE | {"counts": "P" * 7 + "1"}
    assert case.run().skipped == {"malformed RLE (broken 'counts')": 1}


def spoil_image(**changes):
    return lambda document: document["images"][1].update(changes)


BAD_IMAGES = {
    "malformed image entry (not an object)": lambda document: document["images"].__setitem__(1, "bad.jpg"),
    "malformed image entry (no integer 'id')": spoil_image(id=2.5),
    "malformed image entry (no 'file_name')": spoil_image(file_name=None),
    "malformed image entry (no positive integer 'height')": spoil_image(height=-16),
    "malformed image entry (no positive integer 'width')": spoil_image(width="24"),
    "image that is listed twice": spoil_image(id=1, file_name="good.jpg"),
    "image of more than 120 megapixels": spoil_image(height=100_000, width=100_000),
}


@pytest.mark.parametrize("reason", BAD_IMAGES)
def test_an_unusable_image_entry_is_skipped_and_named(case, capsys, reason):
    BAD_IMAGES[reason](case.document)
    case.assert_skips(reason, "annotations.json, images[1]", capsys, images=2)


@pytest.mark.parametrize("name", ["a\0b", "", "\ud800.jpg"])
def test_impossible_file_names_are_malformed(case, name):
    case.document["images"][1]["file_name"] = name
    assert case.run().skipped["malformed image entry (no 'file_name')"] == 1


def corrupt(data):
    return b"this is not a picture" * 20


CORRUPT = "corrupt or truncated image, or not an image"
BAD_FILES = {
    "garbage": (corrupt, CORRUPT),
    "empty": (lambda data: b"", CORRUPT),
    "half": (lambda data: data[: len(data) // 2], CORRUPT),
    "end cut": (lambda data: data[:-20], CORRUPT),
    "header only": (lambda data: data[:30], CORRUPT),
}


@pytest.mark.parametrize("name", ["bad.jpg", "bad.png"])
@pytest.mark.parametrize("kind", BAD_FILES)
def test_a_broken_file_is_skipped_and_named(case, capsys, name, kind):
    change, reason = BAD_FILES[kind]
    path = case.folder / name
    path.write_bytes(change(path.read_bytes()))
    case.assert_skips(reason, name, capsys, images=2)
    assert case.run().skipped["annotation of a skipped image"] == 1


def test_missing_files_directories_and_pipes_are_missing_images(case, capsys):
    (case.folder / "bad.jpg").unlink()
    case.assert_skips("missing image", "image 2, bad.jpg", capsys, images=2)
    (case.folder / "bad.jpg").mkdir()
    assert case.run().skipped["missing image"] == 1
    (case.folder / "bad.jpg").rmdir()
    os.mkfifo(case.folder / "bad.jpg")  # would wait for a writer for ever
    assert case.run().skipped["missing image"] == 1
    case.document["images"][1]["file_name"] = "x" * 5000
    assert case.run().skipped["unreadable image file"] == 1


def test_images_of_one_id_are_all_left_out(case, capsys):
    """Nobody can tell whose the annotations are."""
    case.document["images"][1]["id"] = 1
    case.assert_skips(
        "duplicate image id", "annotations.json, images[0]: id 1, good.jpg and bad.jpg", capsys, images=1, instances=1, count=2
    )
    assert case.run().skipped["annotation of a skipped image"] == 1
    case.document["images"].append(dict(case.document["images"][2], id=1, file_name="third.png"))
    assert case.run().skipped["duplicate image id"] == 3


def test_size_mismatch(case, capsys):
    case.document["images"][1] |= {"height": 17}
    case.assert_skips("size mismatch", "image 2, bad.jpg", capsys, images=2)
    case.document["images"][1] |= {"height": 24, "width": 16}
    assert case.run().skipped["size mismatch"] == 1


def turned(case, orientation, name="bad.jpg"):
    """Gives image 2 this EXIF orientation."""
    exif = Image.Exif()
    exif[274] = orientation
    with Image.open(case.folder / "good.jpg") as image:
        image.save(case.folder / name, exif=exif)
    case.document["images"][1]["file_name"] = name
    with Image.open(case.folder / name) as image:
        return np.asarray(image.convert("RGB")), np.asarray(ImageOps.exif_transpose(image).convert("RGB"))


def pixels_of(case, number):
    (encoded,) = [encoded for image_id, encoded in records.iter_images(case.out) if image_id == number]
    return np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB"))


@pytest.mark.parametrize("name", ["bad.jpg", "other.png", "bad.webp"])
@pytest.mark.parametrize("orientation", range(2, 9))
def test_exif_orientation_is_applied_where_only_the_turned_size_is_right(case, orientation, name):
    stored, upright = turned(case, orientation, name)
    size = {"height": upright.shape[0], "width": upright.shape[1]}
    case.document["images"][1] |= size
    info = case.run()
    assert info.skipped == {} and info.exif == "auto"
    if orientation > 4:
        assert [n for text, n in info.notes.items() if "turned by its EXIF" in text] == [1]
        assert np.array_equal(pixels_of(case, 2), upright)
    else:
        assert [n for text, n in info.notes.items() if "does not tell" in text and "--exif apply" in text] == [1]
        assert np.array_equal(pixels_of(case, 2), stored)
    info = case.run(exif="apply")
    assert info.skipped == {} and info.exif == "apply" and np.array_equal(pixels_of(case, 2), upright)
    info = case.run(exif="ignore")
    if orientation > 4:
        assert info.skipped["size mismatch (EXIF orientation)"] == 1
    else:
        assert info.skipped == {} and np.array_equal(pixels_of(case, 2), stored)


def test_where_others_are_turned_by_exif_what_the_size_does_not_tell_is_told_more_loudly(case):
    _, upright = turned(case, 6)
    case.document["images"][1] |= {"height": upright.shape[0], "width": upright.shape[1]}
    exif = Image.Exif()
    exif[274] = 3
    with Image.open(case.folder / "good.jpg") as image:
        image.save(case.folder / "good.jpg", exif=exif)
    case.run()
    notes = [note["reason"] for note in json.loads((case.out / "report.json").read_text())["notes"]]
    assert [text for text in notes if "does not tell" in text and text.endswith("others are turned, so it is likely wrong")]


def test_an_exif_rotated_image_annotated_as_decoded_is_kept_unrotated(case):
    turned(case, 6)
    info = case.run()
    assert info.skipped == {} and info.notes["EXIF orientation ignored: annotations fit the image as stored"] == 1
    assert (2, (case.folder / "bad.jpg").read_bytes()) in list(records.iter_images(case.out))
    assert case.run(exif="apply").skipped["size mismatch (EXIF orientation)"] == 1


@pytest.mark.parametrize("orientation", [3, 6, 8])
def test_a_tiff_follows_the_rule_of_exif_too(case, orientation):
    """Pillow turns one as it reads it, and says its size as turned."""
    _, upright = turned(case, orientation, "bad.tif")
    with Image.open(case.folder / "good.jpg") as image:
        stored = np.asarray(image)
    note = "does not tell" if orientation == 3 else "annotations fit the image as stored"
    assert any(note in text for text in case.run().notes) and np.array_equal(pixels_of(case, 2), stored)
    case.document["images"][1] |= {"height": upright.shape[0], "width": upright.shape[1]}
    info = case.run(exif="apply")
    assert info.skipped == {} and np.array_equal(pixels_of(case, 2), upright)
    if orientation > 4:
        assert case.run().skipped == {} and np.array_equal(pixels_of(case, 2), upright)
        assert case.run(exif="ignore").skipped["size mismatch (EXIF orientation)"] == 1


def deep_colors(most):
    """A PNG of 24 x 16 pixels of 16 bits a channel, up to a value."""
    rows = b"".join(b"\0" + np.linspace(0, most, 72).astype(">u2").tobytes() for _ in range(16))
    parts = ((b"IHDR", struct.pack(">IIBBBBB", 24, 16, 16, 2, 0, 0, 0)), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    chunks = (struct.pack(">I", len(c)) + n + c + struct.pack(">I", zlib.crc32(n + c)) for n, c in parts)
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def test_deep_colors_are_read_as_predict_reads_them(case):
    (case.folder / "bad.png").write_bytes(deep_colors(65535))
    case.document["images"][1:] = [{**case.document["images"][1], "file_name": "bad.png"}]
    assert not any("bits" in text for text in case.run().notes)
    assert np.array_equal(pixels_of(case, 2), lite.read_image(case.folder / "bad.png"))
    assert any("--bit-depth" in text for text in case.run(bit_depth=12).skipped)
    (case.folder / "bad.png").write_bytes(deep_colors(4095))
    assert any("16-bit colors of at most 12 bits" in text for text in case.run().notes)


def test_a_square_photo_turned_by_a_quarter_is_ambiguous(case):
    with Image.open(case.folder / "good.jpg") as image:
        image.resize((20, 20)).save(case.folder / "good.jpg")
    _, upright = turned(case, 6)
    for image in case.document["images"][:2]:
        image |= {"height": 20, "width": 20}
    assert any("--exif apply" in text for text in case.run().notes)
    assert case.run(exif="apply").skipped == {} and np.array_equal(pixels_of(case, 2), upright)


def test_files_outside_the_images_directory_are_left_out_unless_asked_for(case, capsys):
    secret = case.base / "secret"
    secret.mkdir()
    (case.folder / "bad.jpg").rename(secret / "bad.jpg")
    (case.folder / "link.jpg").symlink_to(secret / "bad.jpg")
    (case.folder / "loop.jpg").symlink_to("loop.jpg")
    (case.folder / "inside.jpg").symlink_to("good.jpg")
    reason = "image outside the images directory (--allow-outside takes such)"
    for name in ("../secret/bad.jpg", str(secret / "bad.jpg"), "link.jpg", "sub/../../secret/bad.jpg", "/etc/hostname"):
        case.document["images"][1]["file_name"] = name
        info = case.run()
        assert info.skipped == {reason: 1, "annotation of a skipped image": 1}
        if "hostname" not in name:
            assert case.run(allow_outside=True).skipped == {}
    case.assert_skips(reason, "image 2, /etc/hostname", capsys, images=2)
    case.document["images"][1]["file_name"] = "loop.jpg"
    assert case.run().num_images == 2
    for name in ("inside.jpg", "./inside.jpg", "../images/inside.jpg"):
        case.document["images"][1]["file_name"] = name
        assert case.run().skipped == {}
    (case.base / "linked").symlink_to(case.folder)  # the directory itself may be a link
    case.folder = case.base / "linked"
    assert case.run().skipped == {}


def test_devices_and_endless_files_are_no_json(case):
    os.mkfifo(case.base / "pipe.json")
    for path in (case.base / "pipe.json", Path("/dev/zero")):
        with pytest.raises(InputError, match="cannot be read: not a regular file"):
            convert.convert(path, case.folder, case.out)
    assert not case.out.exists()


def test_only_verify_finds_damage_in_the_middle(case, capsys):
    path = case.folder / "bad.png"
    data = path.read_bytes()
    middle = data.index(b"IDAT") + 100
    path.write_bytes(data[:middle] + bytes([data[middle] ^ 255]) + data[middle + 1 :])
    assert case.run().skipped == {}
    case.assert_skips(CORRUPT, "bad.png", capsys, images=2, verify=True)


@pytest.mark.parametrize("tail", [b"\0" * 5000, b"some maker's preview " * 50])
def test_bytes_behind_the_end_of_an_image_do_no_harm(case, tail):
    for name in ("bad.jpg", "bad.png"):
        (case.folder / name).write_bytes((case.folder / name).read_bytes() + tail)
    assert case.run().skipped == {}


def test_what_is_odd_but_usable_is_kept(case, capsys):
    annotations = case.document["annotations"]
    annotations[0]["segmentation"] = [[4, 4, 12, 12, 12, 4, 4, 10]]  # crosses itself
    annotations[1]["segmentation"] = [SQUARE, [1, 2, 3, 4], [5, 5, 6, 6, 7, 7], []]  # with degenerate parts
    annotations[1]["segmentation"][0] += SQUARE[:2]  # closed by a repeated point
    del annotations[2]["area"], annotations[2]["iscrowd"], annotations[2]["bbox"]
    info = case.run(progress=True)
    assert (info.num_instances, info.skipped) == (3, {})
    output = capsys.readouterr().out
    assert "note: 1 x degenerate part of a polygon left out (first: image 2, bad.jpg, annotation 2)" in output
    assert "note: 1 x annotation without 'area'" in output
    truth = {a["id"]: a for a in records.read_ground_truth(case.out)["annotations"]}
    assert truth[3]["area"] == 16
    whole = coco_mask.merge(coco_mask.frPyObjects([SQUARE], 16, 24))
    assert truth[2]["segmentation"]["counts"] == whole["counts"]


def test_a_file_name_of_several_lines_stays_one_line_of_report(case, capsys):
    case.document["images"][1]["file_name"] = "two\nlines" + "x" * 1000
    case.run(progress=True)
    lines = [line for line in capsys.readouterr().out.splitlines() if "note" not in line]
    assert len(lines) == 5 and "two lines" in lines[3] and all(len(line) < 400 for line in lines)
    with pytest.raises(InputError) as error:
        case.run(strict=True)
    assert "\n" not in str(error.value)


def test_an_output_name_with_wildcards_is_only_a_name(case):
    case.out = case.base / "se[t]*"
    case.run(shards=3)
    (case.out / "se[t]*-00000-of-00001.tfrecord.tmp").write_text("old")
    case.run(shards=1)
    assert sorted(path.name for path in case.out.iterdir()) == [
        "dataset.json",
        "report.json",
        "se[t]*-00000-of-00001.tfrecord",
    ]


def note_of(info, words):
    """How often the note with these words was made."""
    (count,) = [count for text, count in info.notes.items() if words in text]
    return count


def test_areas_that_are_not_the_masks_are_told(case, capsys):
    annotations = case.document["annotations"]
    annotations[0]["area"], annotations[1]["area"], annotations[2]["area"] = 0, 58, 17  # of 64, 64, 16
    info = case.run(progress=True)
    assert note_of(info, "'area' more than 10 % off") == 1
    said = "APS, APM, APL and the like go by it (first: image 1, good.jpg, annotation 1: 0, the mask has 64)"
    assert said in capsys.readouterr().out
    assert records.read_ground_truth(case.out)["annotations"][0]["area"] == 0  # kept as it is


def test_odd_classes_are_told(case, capsys):
    case.document["categories"] += [{"id": 0, "name": "_background_"}, {"id": 9, "name": "thing"}]
    info = case.run(progress=True)
    assert len(info.classes) == 3
    assert note_of(info, "a class named like the background, one of 3 classes") == 1
    assert note_of(info, "categories of one name") == 1
    output = capsys.readouterr().out
    assert "'_background_' has 0 annotations" in output and "'thing' has the ids 5, 9" in output


def without_objects(change):
    def spoil(document):
        for annotation in document["annotations"]:
            change(annotation)

    return spoil


def as_via(annotation):
    annotation["image_id"] = str(annotation["image_id"])
    del annotation["category_id"]
    annotation["segmentation"] = SQUARE


def via_of_two_classes(document):
    document["categories"].append({"id": 6, "name": "other"})
    without_objects(as_via)(document)


NOTHING_USABLE = {
    "crowds": (without_objects(lambda a: a.update(iscrowd=1)), "3 annotations are iscrowd: 1.*add --crowd-as-instances"),
    "boxes": (without_objects(lambda a: a.pop("segmentation")), "boxes without 'segmentation'.*annotate polygons or masks"),
    "empty": (without_objects(lambda a: a.update(segmentation=[])), "boxes without 'segmentation'"),
    "fractions": (
        without_objects(lambda a: a.update(segmentation=[[0.1, 0.1, 0.6, 0.1, 0.6, 0.7]])),
        "between 0 and 1: multiply x by the image's width",
    ),
    "via": (via_of_two_classes, r"VGG Image Annotator \(VIA\).*list of lists"),
    "others": (without_objects(lambda a: a.update(category_id=77)), "see the reasons.*unknown category"),
}


@pytest.mark.parametrize("kind", NOTHING_USABLE)
def test_annotations_without_a_usable_object_are_refused_with_the_way_out(case, kind):
    spoil, said = NOTHING_USABLE[kind]
    before = case.run()
    spoil(case.document)
    with pytest.raises(InputError, match=rf"annotations\.json: no usable object: .*{said}") as error:
        case.run()
    assert "\n" not in str(error.value)
    assert dataset.load(case.out) == before
    if kind == "crowds":
        assert case.run(crowd_as_instances=True).num_crowd == 0


def test_a_set_of_background_alone_is_taken_and_told(case, capsys):
    case.document["annotations"] = []
    info = case.run(progress=True)
    assert (info.num_images, info.num_instances, info.max_instances) == (3, 0, 0)
    assert "images of background alone, which `polarmask train` refuses" in capsys.readouterr().out
    with pytest.raises(InputError, match="3 images with no object at all: nothing to train on"):
        dataset.require_objects(info)


def test_files_of_other_formats_are_called_by_their_name(case):
    region = {"shape_attributes": {"name": "polygon", "all_points_x": [1], "all_points_y": [1]}}
    annotations = [{"image_id": 1, "file_name": "a.png", "segments_info": [{"id": 1}]}]
    panoptic = {"images": [], "categories": [{"id": 1, "name": "a"}], "annotations": annotations}
    for document, said in (
        (
            {"_via_settings": {}, "_via_img_metadata": {}},
            r"project of the VGG Image Annotator \(VIA\): `polarmask convert SOURCE OUT`",
        ),
        ({"a.jpg123": {"filename": "a.jpg", "regions": [region]}}, r"annotations of the VGG Image Annotator \(VIA\)"),
        ({"version": "5", "shapes": [], "imagePath": "a.jpg"}, "is a labelme file"),
        (panoptic, r"panoptic COCO file \(segments_info\).*panoptic2detection"),
        ([{"image_id": 1, "score": 0.5}], "results of a detector"),
    ):
        with pytest.raises(InputError, match=said):
            case.run(json.dumps(document))


FATAL = {
    b"": "not valid JSON",
    b"{": "not valid JSON",
    b"\xff\xfe{}": "not valid JSON",
    b"[" * 200000: "not valid JSON",
    b"[]": "holds a list; expected a COCO file",
    b"3": "holds a int; expected a COCO file",
    b'{"images": [], "annotations": [{"id": 1}], "categories": [], "annotations": []}': "key 'annotations' stands twice",
    b'{"images": [{"id": 1, "file_name": "a.jpg", "file_name": "b.jpg"}]}': "not valid JSON.*'file_name' stands twice",
    b"{}": "has no key 'images'; expected a COCO file",
    b'{"images": [], "annotations": []}': "has no key 'categories'",
    b'{"images": {}, "annotations": [], "categories": []}': "'images' is a dict; expected",
    b'{"images": [], "annotations": [], "categories": []}': "'categories' is empty",
    b'{"images": [], "annotations": [], "categories": [{"id": 1}]}': r"categories\[0\] needs an integer 'id'",
    b'{"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]}': "given twice",
    b'{"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}]}': "empty data set",
}


@pytest.mark.parametrize("text", FATAL, ids=lambda text: text[:40].decode(errors="replace"))
def test_an_unusable_annotation_file_is_fatal(case, text):
    with pytest.raises(InputError, match=FATAL[text]) as error:
        case.run(text)
    assert "annotations.json" in str(error.value) and "\n" not in str(error.value)
    assert not case.out.exists()


def test_more_classes_than_a_model_may_have_are_fatal(case):
    case.document["categories"] = [{"id": number, "name": str(number)} for number in range(lite.MAX_CLASSES + 1)]
    with pytest.raises(InputError, match="100,001 classes, and the limit is 100,000; keep some with --classes"):
        case.run()
    assert not case.out.exists()


def test_missing_files_are_fatal(case):
    with pytest.raises(InputError, match="no such file"):
        convert.convert(case.base / "none.json", case.folder, case.out)
    with pytest.raises(InputError, match="is a directory; give the COCO JSON file"):
        convert.convert(case.folder, case.folder, case.out)
    with pytest.raises(InputError, match="no such directory; give the one that holds the image files"):
        convert.convert(case.base / "none.json", case.base / "nowhere", case.out)
    assert not case.out.exists()


def test_a_set_without_usable_images_is_fatal_and_leaves_the_old_one(case):
    before = case.run()
    kept = {path.name: path.read_bytes() for path in case.out.iterdir()}
    case.folder = case.base / "elsewhere"
    case.folder.mkdir()
    with pytest.raises(InputError, match=r"empty data set.*skipped 3 x missing image \(first: image 1, good.jpg\)"):
        case.run()
    assert {path.name: path.read_bytes() for path in case.out.iterdir()} == kept
    assert dataset.load(case.out) == before


@pytest.mark.parametrize("processes", [1, 2])
def test_an_output_that_cannot_be_written_is_fatal(case, processes):
    case.out.write_text("a file")
    with pytest.raises(InputError, match="out: cannot be written: File exists; choose another --out"):
        case.run(processes=processes, shards=2)
    assert case.out.read_text() == "a file"


def test_no_space_left_is_one_line_and_leaves_the_old_set(case, monkeypatch):
    case.run()
    kept = {path.name: path.read_bytes() for path in case.out.iterdir()}

    def full(file, data):
        file.write(data[:10])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(records, "write_record", full)
    with pytest.raises(InputError, match="No space left on device; free some space"):
        case.run(shards=2)
    assert {path.name: path.read_bytes() for path in case.out.iterdir()} == kept
    case.out = case.base / "new"
    with pytest.raises(InputError, match="No space left"):
        case.run()
    assert not case.out.exists()


def test_no_space_left_in_a_worker_is_the_same_line(case, monkeypatch):
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full")
    case.out.mkdir()
    # The second shard's temporary name leads to a device that is always full.
    (case.out / "out-00001-of-00002.tfrecord.tmp").symlink_to("/dev/full")
    remove, calls = publish.remove_partial, []
    # The link has to survive the cleaning at the start.
    monkeypatch.setattr(publish, "remove_partial", lambda out: calls.append(out) if not calls else remove(out))
    with pytest.raises(InputError, match="No space left on device; free some space"):
        case.run(processes=2, shards=2)
    assert list(case.out.iterdir()) == []


def test_strict_in_a_worker_is_an_input_error(case):
    (case.folder / "bad.jpg").unlink()
    with pytest.raises(InputError, match=r"image 2, bad\.jpg: missing image"):
        case.run(processes=2, shards=2, strict=True)
    assert not case.out.exists()


ODD_VALUES = [None, True, -1, 0, 1, 2**31, 2**63, HUGE, 0.5, -0.0, float("nan"), float("inf"), 1e308, "", "x", "\ud800"]
ODD_VALUES += [[], [[]], {}, [None], {"size": [16, 24]}, {"counts": "0"}, [1, 2], [[1, 2, 3, 4]], b"".hex(), "5", "1" * 300]


def mutate_structure(document, rng):
    """Replaces, removes, doubles or moves some nodes of the JSON tree."""
    document = copy.deepcopy(document)
    for _ in range(rng.choice([1, 1, 2, 5])):
        node = document
        while True:
            keys = list(node) if isinstance(node, dict) else list(range(len(node)))
            if not keys:
                break
            key = rng.choice(keys)
            child = node[key]
            if isinstance(child, (dict, list)) and child and rng.random() < 0.85:
                node = child
                continue
            action = rng.randrange(4)
            if action == 0:
                node[key] = copy.deepcopy(rng.choice(ODD_VALUES))
            elif action == 1:
                del node[key]
            elif action == 2 and isinstance(node, list):
                node.insert(rng.randrange(len(node) + 1), copy.deepcopy(child))
            elif isinstance(child, (int, float)) and not isinstance(child, bool):
                node[key] = child * rng.choice([-1, 2, 10**6, 10**30] + [0.5, 1e6, 1e30] * (abs(child) < 1e200))
            elif isinstance(child, str):
                position = rng.randrange(len(child) + 1)
                node[key] = child[:position] + chr(rng.randrange(1, 0x2000)) + child[position + 1 :]
            break
    return document


def mutate_bytes(data, rng):
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 3, 20])):
        if not data:
            break
        start = rng.randrange(len(data))
        action = rng.randrange(4)
        if action == 0:
            data[start] = rng.randrange(256)
        elif action == 1:
            del data[start : start + rng.randrange(1, 50)]
        elif action == 2:
            data[start:start] = data[start : start + rng.randrange(1, 50)]
        elif rng.random() < 0.2:
            del data[start:]
        else:
            data[start] ^= 1 << rng.randrange(8)
    return bytes(data)


@pytest.mark.parametrize("kind, rounds", [("structure", 900), ("bytes", 500), ("jpeg", 600)])
def test_fuzz(case, kind, rounds):
    """2,000 mutations: a data set that reads back, or an InputError of one line, and nothing else."""
    valid = json.dumps(case.document).encode()
    pictures = {name: (case.folder / name).read_bytes() for name in ("bad.jpg", "bad.png")}
    converted = 0
    for seed in range(rounds):
        rng = random.Random(f"{kind} {seed}")
        text = valid
        if kind == "structure":
            text = json.dumps(mutate_structure(case.document, rng)).encode()
        elif kind == "bytes":
            text = mutate_bytes(valid, rng)
        else:
            for name, data in pictures.items():
                (case.folder / name).write_bytes(mutate_bytes(data, rng))
        try:
            info = case.run(text, masks=seed % 3 == 0, verify=seed % 2 == 0)
        except InputError as error:
            assert "\n" not in str(error), seed
            continue
        converted += 1
        if seed % 10 == 0:
            truth = records.read_ground_truth(case.out)
            assert len(truth["annotations"]) == info.num_instances
            for annotation in truth["annotations"]:
                assert coco_mask.decode(annotation["segmentation"]).shape == (16, 24)
            for _, encoded in records.iter_images(case.out):
                Image.open(io.BytesIO(encoded))
    assert converted > rounds / 20
