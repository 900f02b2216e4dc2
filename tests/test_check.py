"""`polarmask check`: which locations learn what by hand and by ops.targets, faults that are put into a set, its pictures."""

import dataclasses
import json
import zlib

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from helpers import formats
from helpers.pages import check_page
from polarmask_tf import cli, config
from polarmask_tf.data import dataset, pipeline
from polarmask_tf.data.convert import convert
from polarmask_tf.inference import ceiling
from polarmask_tf.ops import targets
from polarmask_tf.tools import check
from polarmask_tf.tools.check_findings import warnings_of
from polarmask_tf.tools.check_locations import locator


def square(x, y, side):
    return [x, y, x + side, y, x + side, y + side, x, y + side]


def image_of(*squares, size=64):
    """An image as ceiling.read gives it."""
    rings = [np.float64(square(*one)).reshape(-1, 2) for one in squares]
    annotations = [{"id": k, "label": 0, "rings": [ring]} for k, ring in enumerate(rings)]
    return {"id": 1, "height": size, "width": size, "annotations": annotations}


def test_locations_by_hand():
    """P3 has its locations at 4, 12, 20, ...; a square has those strictly inside, at most 12 pixels from its center."""
    settings = config.load("shapes", ["data.size=[64,64]", "model.fpn.levels=[3]", "targets.ranges=[]"])
    locate = locator(settings, 8, 10)
    place = locate(image_of((0, 0, 24), (33, 33, 2.5), (40, 8, 8), (41, 9, 6), (37, 37, 6)))
    # The fourth lies in the third and takes its only location; the second and the last see none.
    assert place.learned.tolist() == [True, False, False, True, False]
    assert place.alone.tolist() == [True, False, True, True, False]
    got = sorted((owner, *point) for owner, point in zip(place.owners.tolist(), place.points.tolist(), strict=True))
    assert got == [*((0, x, y) for x in (4, 12, 20) for y in (4, 12, 20)), (3, 44, 12)]
    assert set(place.levels.tolist()) == {3}
    # Half as large an image is blown up: points are those of the image.
    half = locate(image_of((0, 0, 12), (20, 4, 4), size=32))
    assert half.learned.all() and sorted(half.points[half.owners == 1].tolist()) == [[22, 6]]
    assert sorted({x for x, _ in half.points[half.owners == 0].tolist()}) == [2, 6, 10]
    # A coarser level takes what is longer than its bound, from its own location.
    both = locator(config.load("shapes", ["data.size=[64,64]", "model.fpn.levels=[3,4]", "targets.ranges=[16]"]), 8, 10)
    place = both(image_of((0, 0, 40), (48, 48, 8)))
    assert {(o, level) for o, level in zip(place.owners.tolist(), place.levels.tolist(), strict=True)} == {(0, 4), (1, 3)}
    assert not locate(image_of()).points.size


def faulty(folder, rng=0):
    """A set with one of each: images a to f, of which c is d again, e has nothing; two classes of three are rare."""
    images, annotations = [], []
    (folder / "images").mkdir(parents=True)

    def add(name, squares, seed, category=1):
        pixels = np.random.default_rng(seed).integers(0, 255, (64, 96, 3), np.uint8)
        Image.fromarray(pixels).save(folder / "images" / name, compress_level=1 + len(images))
        images.append({"id": len(images) + 1, "file_name": name, "height": 64, "width": 96})
        for one in squares:
            entry = {"image_id": len(images), "category_id": category, "iscrowd": 0, "segmentation": [square(*one)]}
            annotations.append({"id": len(annotations) + 1, "area": float(one[2] ** 2), **entry})

    many = [(2 + 15 * k, 2 + 15 * j, 12) for k in range(6) for j in range(3)]
    add("a.png", many, 1)
    add("b.png", [(10, 10, 30), (10.2, 10, 30)], 2)
    add("c.png", [(10, 10, 30)], 3)
    add("d.png", [(40, 10, 30)], 3, category=2)
    add("e.png", [], 4)
    add("<i>f.png", [(x, 50, 3) for x in (5, 29, 53)], 5)
    categories = [{"id": 1, "name": "thing"}, {"id": 2, "name": "other"}, {"id": 3, "name": "<b>none</b>"}]
    (folder / "a.json").write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    convert(folder / "a.json", folder / "images", folder / "set", processes=1, progress=False)
    return folder / "set"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return faulty(tmp_path_factory.mktemp("faulty"))


SET = ["data.size=[64,96]", "model.fpn.levels=[3]", "data.max_instances=10", "targets.ranges=[]"]
OPTIONS = ["--config", "shapes", *(word for one in SET for word in ("--set", one))]


def test_each_fault_is_named(data, tmp_path, capsys):
    pages = ["--preview", "3", "--html", "--out", str(tmp_path / "out"), "--val", str(data)]
    assert cli.main(["check", str(data), *OPTIONS, *pages]) == 0
    out = capsys.readouterr().out
    for expected in (
        "6 images, 25 objects to learn, 3 classes",
        "1 of 6 images have no object and teach background alone: e.png",
        "images that are there twice, 1: c.png = d.png",
        "objects that are there twice, with masks of an IoU above 0.9, 1: b.png, annotations 19 and 20",
        "12 % of the objects (3) are under 8 px, the stride of P3, at data.size [64, 96]: they are as small in the images",
        "no location learns at this size, since they are too small, 3: <i>f.png, annotation 23",
        "no location learns at this size, since they are hidden by smaller ones, 1: b.png, annotation 20",
        "objects beyond it, which are ignored, 8: data.max_instances is 10, --set data.max_instances=18",
        "no object of <b>none</b>",
        "fewer than 20 objects of other",
        "validation images that are training images too, 6: a.png = a.png",
        "next: polarmask train --data",
    ):
        assert expected in out, out
    assert out.count("warning: ") == 10
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["check.html", "check.png"]
    with Image.open(tmp_path / "out" / "check.png") as sheet:
        assert sheet.width > 4 * 384
    text = (tmp_path / "out" / "check.html").read_text()
    tags = check_page(text)
    assert tags.seen.count("section") == 6 and tags.seen.count("img") == 24 and "i" not in tags.seen and "b" not in tags.seen
    assert '<a href="#p5">&lt;i&gt;f.png: 3 objects, 3 learned by no location</a>' in text
    assert "image 3 of" not in text and "warning" not in text and text.count("class=bad") == 10


def test_a_page_draws_the_locations_where_they_are(data):
    """A white-ringed dot of the object's color at each, in the fourth picture; the first is the image as it is."""
    from polarmask_tf.tools.check_page import Pages

    info, settings = dataset.load(data), config.load("shapes", SET)
    pages = Pages(settings, info, 6, False, None)
    assert [n for n in range(6) if pages.wants(n)] == [*range(6)]
    assert sorted(Pages(settings, info, 2, True, 4).in_sheet) == [0, 3]
    images = [image for image, _ in zip(ceiling.read(data)[2], range(2), strict=False)]
    place = locator(settings, info.max_edges, info.max_instances)(images[1])
    pages.wants(1)
    pages.add("b", np.zeros((64, 96, 3), np.uint8), images[1], np.zeros((0, 36, 2)), place, 0)
    plain, mask, _, dots, caption = pages.cells[0]
    assert not np.asarray(plain).any() and caption == "b: 2 objects"
    scale = plain.width / 96
    white = (np.asarray(dots) == 255).all(-1)
    assert len(place.points) == 9
    for x, y in place.points * scale:
        assert white[int(y) - 4 : int(y) + 5, int(x) - 4 : int(x) + 5].any()
    inside = np.asarray(mask)[int(25 * scale), int(25 * scale)]
    assert inside.any() and not np.asarray(mask)[int(5 * scale), int(80 * scale)].any()


@pytest.mark.parametrize(
    "overrides", [SET, ["data.size=[96,160]", "targets.match=cost", "loss.weight_by=iou", "targets.ranges=[]"]]
)
def test_what_is_learned_is_what_training_is_taught(data, overrides):
    settings = config.load("shapes", [*overrides, "data.max_instances=50", "data.batch=1"])
    info = dataset.load(data)
    locate = locator(settings, info.max_edges, info.max_instances)
    ranges = settings.targets.ranges or tuple(targets.scaled_bounds(settings.model.fpn.levels, settings.data.size))
    some = 0
    for image, (_, instances) in zip(ceiling.read(data)[2], pipeline.validation_data(data, settings), strict=True):
        options = {"rays": 36, "levels": settings.model.fpn.levels, "size": config.input_size(settings.data), "ranges": ranges}
        made = targets.encode(instances, match=settings.targets.match, radius=settings.targets.radius, **options)
        place = locate(image)
        assert len(made.positives) == len(place.points)
        assert len(tf.unique(made.instance)[0]) == place.learned.sum()
        some += len(place.points)
    assert some > 50


def test_sizes_that_help_are_found():
    found = check.Findings(None, config.load("shapes", ["data.size=[320,320]"]), images=1)
    found.info = dataclasses.replace(dataset_info(), classes=[{"name": "a", "category_id": 1}])
    found.shorter, found.longest, found.labels = [6.0] * 38 + [40.0] * 62, [480] * 100, [0] * 100
    found.scaled = [4.0] * 38 + [27.0] * 62
    (line,) = warnings_of(found)
    size = "38 % of the objects (38) are under 8 px, the stride of P3, at data.size [320, 320]: --set 'data.size=[640,640]'"
    assert line.startswith(size) and line.endswith("or --set 'model.fpn.levels=[2,3]'")
    found.shorter = [1.0] * 38 + [40.0] * 62
    found.scaled = [0.7] * 38 + [27.0] * 62
    assert "they are as small in the images" in warnings_of(found)[0]
    found.longest = [2000] * 100
    assert "cut the images into tiles" in warnings_of(found)[0]
    found.scaled, found.ceilings = [27.0] * 100, [(0, 0.3)] * 10 + [(0, 0.9)] * 90
    assert "10 % of the objects cannot be found at IoU 0.5 even by perfect rays" in warnings_of(found)[0]
    found.ceilings, found.labels = [], [0] * 99 + [0]
    assert warnings_of(found) == []


def dataset_info():
    return dataset.DatasetInfo(None, "a", 1, 100, 0, [], 100, 4, [], {})


def test_a_coco_file_is_converted_for_the_time(data, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = data.parent
    assert cli.main(["check", str(source / "a.json"), str(source / "images"), *OPTIONS, "--limit", "2"]) == 0
    out = capsys.readouterr().out
    assert "2 images, 20 objects" in out and f"next: polarmask convert {source / 'a.json'} {source / 'images'}" in out
    assert not list(tmp_path.iterdir())


def test_without_a_config_it_is_the_one_that_training_would_fit(data, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["check", str(data), "--limit", "1"]) == 0
    out = capsys.readouterr().out
    side = max(config.input_size(config.loads(check.init_config.fit(data), "x", []).data))
    assert f"\n{side} (config) " in out and "beyond it" not in out  # the fitted one has room for all
    assert "next: polarmask train --data" in out and "--config" not in out


def test_a_folder_of_annotations_is_converted_for_the_time(tmp_path, capsys):
    (tmp_path / "images").mkdir()
    Image.new("RGB", (64, 64), (9, 200, 9)).save(tmp_path / "images" / "a.png")
    entry = {"id": 1, "image_id": 1, "category_id": 1, "iscrowd": 0, "segmentation": [square(8, 8, 40)], "area": 1600.0}
    image = {"id": 1, "file_name": "a.png", "height": 64, "width": 64}
    document = {"images": [image], "annotations": [entry], "categories": [{"id": 1, "name": "a"}]}
    formats.labelme(document, tmp_path / "images", tmp_path / "pictures")
    before = {path: path.read_bytes() for path in (tmp_path / "pictures").iterdir()}
    assert cli.main(["check", str(tmp_path / "pictures"), *OPTIONS]) == 0
    assert f"next: polarmask convert {tmp_path / 'pictures'} data --split 0.1" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in (tmp_path / "pictures").iterdir()} == before


def broken_png(folder):
    """A set in which one image has a whole header and end, and nonsense between."""
    folder.mkdir()
    (folder / "images").mkdir()
    Image.new("RGB", (32, 32)).save(folder / "images" / "a.png")
    content = (folder / "images" / "a.png").read_bytes()
    at = content.index(b"IDAT")
    length = int.from_bytes(content[at - 4 : at], "big")
    junk = b"IDAT" + bytes(length)
    broken = content[:at] + junk + zlib.crc32(junk).to_bytes(4, "big") + content[at + 8 + length :]
    (folder / "images" / "a.png").write_bytes(broken)
    entry = {"id": 1, "image_id": 1, "category_id": 1, "iscrowd": 0, "segmentation": [square(4, 4, 20)], "area": 400.0}
    image = {"id": 1, "file_name": "a.png", "height": 32, "width": 32}
    return {"images": [image], "annotations": [entry], "categories": [{"id": 1, "name": "a"}]}


def test_what_training_would_refuse_is_exit_code_2(data, tmp_path, capsys):
    truth = broken_png(tmp_path / "b")
    (tmp_path / "b.json").write_text(json.dumps(truth))
    convert(tmp_path / "b.json", tmp_path / "b" / "images", tmp_path / "broken", processes=1, progress=False)
    (tmp_path / "none.json").write_text(json.dumps({**truth, "annotations": []}))
    convert(tmp_path / "none.json", tmp_path / "b" / "images", tmp_path / "none", processes=1, progress=False)
    cut = tmp_path / "cut"
    cut.mkdir()
    for path in data.iterdir():
        content = path.read_bytes()
        (cut / path.name).write_bytes(content if path.suffix == ".json" else content[:-100])
    (tmp_path / "empty").mkdir()
    for arguments, expected in (
        ([tmp_path / "broken"], "images that training would stop at, 1: a.png"),
        ([tmp_path / "none"], "nothing to train on"),
        ([cut], "5 whole records, dataset.json says 6"),
        ([data, "--val", tmp_path / "broken"], "has not the classes of"),
        ([tmp_path / "nowhere"], "no such file or folder"),
        ([tmp_path / "empty"], "no annotations recognised"),
    ):
        assert cli.main(["check", *map(str, arguments), *OPTIONS, "--preview", "--out", str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("polarmask: error: ") and expected in error
    names = [path.name for path in (tmp_path / "out").glob("*")] if (tmp_path / "out").exists() else []
    assert not names
