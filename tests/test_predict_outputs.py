"""The files that `predict --save` writes, each against what the results say."""

import csv
import dataclasses
import json
import os

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from helpers.detections import STARS, star_predictor
from polarmask_tf import cli
from polarmask_tf.errors import InputError
from polarmask_tf.inference import outputs, predictor
from polarmask_tf.inference.formats import COLUMNS
from polarmask_tf.inference.predict import predict


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "in put"
    (folder / "deep").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in ("1.png", "deep/b.jpg"):
        Image.fromarray(rng.integers(0, 256, (60, 80, 3), np.uint8)).save(folder / name)
    return folder


def run(source, out, *save, count=4, **options):
    return predict(star_predictor(count), source, out, save=save, progress=False, **{"score_threshold": 0.0, **options})


def results_of(out):
    found = {}
    for result in json.loads((out / "results.json").read_text()):
        found.setdefault(result["image_id"], []).append(result)
    return found


def listing(out):
    return sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())


def test_every_kind_of_file(source, tmp_path):
    out = tmp_path / "out"
    done = run(source, out, "overlays", "overlays:jpg", "coco", "labelme", "geojson", "ids", "ids:tif", "csv", "gallery")
    pictures = ["overlays/*.png", "overlays/*.jpg", "labelme/*.json", "geojson/*.geojson", "ids/*.png", "ids/*.tif"]
    pictures += ["gallery/*.jpg", "gallery/*.js"]
    expected = [name.replace("*", stem) for name in pictures for stem in ("1", "deep/b")]
    tables = ["results.json", "measurements.csv", "gallery.html", "sheet.png"]
    assert listing(out) == sorted([*expected, *tables])
    assert done["written"] == [out / n for n in ("overlays", "labelme", "geojson", "ids", *tables)]
    for stem in ("1", "deep/b"):
        png, jpg = (Image.open(out / "overlays" / f"{stem}{suffix}") for suffix in (".png", ".jpg"))
        assert (png.format, jpg.format, png.size) == ("PNG", "JPEG", jpg.size)
        assert np.abs(np.asarray(png, float) - np.asarray(jpg, float)).mean() < 20


def test_only_what_is_asked_for_is_written(source, tmp_path):
    for kind in outputs.KINDS:
        done = run(source, tmp_path / kind, kind)
        folder = {path.split("/")[0] for path in listing(tmp_path / kind)} - {"sheet.png"}
        names = {"coco": {"results.json"}, "csv": {"measurements.csv"}, "gallery": {"gallery", "gallery.html"}}
        assert folder == names.get(kind, {kind.split(":")[0]})
        assert (done["results"] is None) == (kind != "coco") and (done["sheet"] is None) == ("overlays" not in kind)


def test_labelme_leads_to_the_picture(source, tmp_path, monkeypatch):
    """Also through links, and from a relative --out."""
    (tmp_path / "real" / "far" / "away").mkdir(parents=True)
    (tmp_path / "linked").symlink_to(tmp_path / "real" / "far" / "away")
    monkeypatch.chdir(tmp_path)
    for out in (tmp_path / "out", tmp_path / "linked", source):
        run("in put", os.path.relpath(out), "labelme", "coco")
        for stem, key in (("1", 1), ("deep/b", "deep/b.jpg")):
            path = out / "labelme" / f"{stem}.json"
            document = json.loads(path.read_text())
            assert not os.path.isabs(document["imagePath"])
            pixels = Image.open(os.path.join(os.path.dirname(path), document["imagePath"]))  # as labelme does it
            assert pixels.size == (80, 60) and pixels.filename.endswith(os.path.basename(document["imagePath"]))
            assert os.path.samefile(pixels.filename, source / ("1.png" if key == 1 else key))
            assert len(document["shapes"]) == len(results_of(out)[key])


def test_labelme_gets_a_picture_where_it_would_turn_the_own_one(tmp_path):
    """It applies the EXIF orientation; `predict` does so with --exif apply alone."""
    exif = Image.Exif()
    exif[0x0112] = 6
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (60, 80, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "1.png", exif=exif)
    run(tmp_path / "1.png", tmp_path / "ignored", "labelme")
    document = json.loads((tmp_path / "ignored/labelme/1.json").read_text())
    shown = Image.open(tmp_path / "ignored/labelme" / document["imagePath"])
    np.testing.assert_array_equal(np.asarray(shown), pixels)
    assert (document["imageHeight"], document["imageWidth"]) == (60, 80) and 0x0112 not in shown.getexif()
    run(tmp_path / "1.png", tmp_path / "applied", "labelme", exif="apply")
    document = json.loads((tmp_path / "applied/labelme/1.json").read_text())
    assert os.path.samefile(tmp_path / "applied/labelme" / document["imagePath"], tmp_path / "1.png")
    assert (document["imageHeight"], document["imageWidth"]) == (80, 60)


@pytest.mark.parametrize("kind, suffix, mode", [("ids", "png", "I;16"), ("ids:tif", "tif", "I;16"), ("ids:tif32", "tif", "I")])
def test_ids_are_those_of_the_results(source, tmp_path, kind, suffix, mode):
    out = tmp_path / "out"
    run(source, out, kind, "coco", "csv")
    with open(out / "measurements.csv") as file:
        rows = list(csv.DictReader(file))
    for stem, key, name in (("1", 1, "1.png"), ("deep/b", "deep/b.jpg", "deep/b.jpg")):
        picture = Image.open(out / "ids" / f"{stem}.{suffix}")
        ids = np.asarray(picture)
        assert picture.mode == mode and ids.shape == (60, 80)
        expected = np.zeros((60, 80), int)
        for number, result in reversed([*enumerate(results_of(out)[key], 1)]):
            expected[coco_mask.decode(result["segmentation"]).astype(bool)] = number
        np.testing.assert_array_equal(ids, expected)
        assert [int(row["index"]) for row in rows if row["file"] == name] == [1, 2, 3, 4]


def test_more_objects_than_16_bits_number_are_refused(source, tmp_path, monkeypatch):
    tiny = np.zeros((65_536, 3, 2), np.float32)
    tiny[:, :, 0], tiny[:, :, 1] = (0, 2, 0), (0, 0, 2)
    rows = {"scores": np.full(65_536, 0.5, np.float32), "classes": np.zeros(65_536, np.int32)}
    rows |= {"polygons": tiny, "boxes": np.zeros((65_536, 4), np.float32)}
    many = predictor.Predictor("run", STARS, (32, 32), 1, lambda images: [rows for _ in images])
    with pytest.raises(InputError, match=r"1\.png: 65,536 objects, and 16 bits number 65,535; take --save ids:tif32"):
        predict(many, source / "1.png", tmp_path / "out", save=["ids"], progress=False)


def test_measurements_are_a_row_an_object(source, tmp_path):
    name = os.fsencode(source) + b'/odd "\xff,\n.png'
    with open(name, "wb") as file:
        file.write((source / "1.png").read_bytes())
    run(source, tmp_path / "out", "csv", "coco")
    with open(tmp_path / "out/measurements.csv", encoding="utf-8", errors="surrogateescape", newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["file", *COLUMNS] and len(rows) == 12
    assert {row[0] for row in rows} == {"1.png", "deep/b.jpg", os.fsdecode(os.path.basename(name))}
    for row, result in zip(
        (dict(zip(header, row, strict=True)) for row in rows[:4]), results_of(tmp_path / "out")[1], strict=True
    ):
        assert float(row["score"]) == pytest.approx(result["score"], abs=1e-4)
        assert [float(row[key]) for key in ("xmin", "ymin", "width", "height")] == pytest.approx(result["bbox"], abs=0.011)
        assert float(row["area"]) == pytest.approx(float(coco_mask.area(result["segmentation"])), rel=0.1)


def test_polygons_in_coco_results(source, tmp_path):
    run(source, tmp_path / "rle", "coco")
    run(source, tmp_path / "polygon", "coco", segmentation="polygon")
    rles, polygons = results_of(tmp_path / "rle")[1], results_of(tmp_path / "polygon")[1]
    for rle, polygon in zip(rles, polygons, strict=True):
        assert polygon["bbox"] == rle["bbox"] and len(polygon["segmentation"][0]) == 24
    coco = COCO()  # and pycocotools loads them
    coco.dataset = {"images": [{"id": 1}, {"id": "deep/b.jpg"}], "categories": [], "annotations": []}
    coco.createIndex()
    assert len(coco.loadRes(str(tmp_path / "polygon/results.json")).anns) == 8


def test_filters_hold_for_every_output(source, tmp_path):
    out = tmp_path / "out"
    done = run(source, out, "coco", "csv", "labelme", "geojson", "ids", classes=["star", "moon"], score_threshold=0.4)
    expected = [r for r in star_predictor()(source / "1.png").to_coco(1) if r["category_id"] in (3, 12) and r["score"] >= 0.4]
    assert results_of(out)[1] == expected and len(expected) == 2 and done["detections"] == 4
    assert {shape["label"] for shape in json.loads((out / "labelme/1.json").read_text())["shapes"]} == {"star", "moon"}
    assert len(json.loads((out / "geojson/1.geojson").read_text())["features"]) == 2
    assert (
        np.asarray(Image.open(out / "ids/1.png")).max() == 2 and len((out / "measurements.csv").read_text().splitlines()) == 5
    )


def test_nothing_found(source, tmp_path):
    run(source, tmp_path / "out", *outputs.KINDS[:6], "csv", "coco", "gallery", count=0, segmentation="polygon")
    assert json.loads((tmp_path / "out/results.json").read_text()) == []
    assert (tmp_path / "out/measurements.csv").read_text().count("\n") == 1
    assert json.loads((tmp_path / "out/labelme/1.json").read_text())["shapes"] == []
    assert not np.asarray(Image.open(tmp_path / "out/ids/1.png")).any()


@pytest.mark.parametrize(
    "options, text",
    [
        ({"save": ["masks", "coco"]}, "--save 'masks': of overlays, overlays:jpg, labelme, .* one or several"),
        ({"save": ["ids:tif", "ids:tif32"]}, "files of one name"),
        ({"save": [""]}, "--save ''"),
        ({"save": []}, "nothing to write"),
        ({"every": 0}, "every is 0, must be at least 1"),
        ({"classes": ["cat"]}, "no class 'cat'; this model's are: circle, star, moon"),
        ({"segmentation": "mask"}, "must be 'rle' or 'polygon'"),
        ({"save": ["coco"], "results_only": True}, "leave --save out"),
    ],
)
def test_wrong_options_are_said_before_anything_is_written(source, tmp_path, options, text):
    with pytest.raises(InputError, match=text):
        predict(star_predictor(), source, tmp_path / "out", progress=False, **options)
    assert not (tmp_path / "out").exists()


def test_on_the_command_line(source, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(predictor, "load_predictor", lambda model, accelerator: star_predictor())
    (tmp_path / "model.tflite").write_bytes(b"weights")
    words = ["predict", str(tmp_path / "model.tflite"), str(source / "1.png"), str(source / "*" / "*.jpg")]
    out = tmp_path / "out"
    options = ["--save", "labelme, csv,coco", "--classes", "star,moon", "--segmentation", "polygon", "--every", "2"]
    assert cli.main([*words, "--out", str(out), *options]) == 0
    said = capsys.readouterr().out
    assert said == f"4 detections in 2 images; written: {out}/labelme, {out}/measurements.csv, {out}/results.json\n"
    assert cli.main([*words, "--out", str(out), *options, "--resume"]) == 2
    assert "no interrupted run to resume" in capsys.readouterr().err
    assert cli.main([*words, "--out", str(out), "--classes", "dog"]) == 2
    assert "no class 'dog'" in capsys.readouterr().err


def test_labelme_files_that_were_corrected_are_not_replaced(source, tmp_path):
    out = tmp_path / "out"
    run(source, out, "labelme")
    run(source, out, "labelme")  # as they were written: replaced
    corrected = out / "labelme" / "deep" / "b.json"
    text = json.dumps(json.loads(corrected.read_text()), indent=2)  # as labelme saves
    corrected.write_text(text)
    with pytest.raises(InputError, match=r"b\.json: is not as `predict` wrote it .*move .*labelme away"):
        run(source, out, "coco", "labelme")
    assert corrected.read_text() == text and not (out / "results.json").exists()
    run(source, out, "coco")  # which does not touch them
    assert corrected.read_text() == text


def test_the_truth_is_not_replaced(source, tmp_path):
    truth = tmp_path / "results.json"
    image = {"id": 1, "file_name": "1.png", "width": 80, "height": 60}
    text = json.dumps({"images": [image], "annotations": [], "categories": []})
    truth.write_text(text)
    with pytest.raises(InputError, match="would be replaced by what is written"):
        run(source, tmp_path, "coco", truth=truth)
    assert truth.read_text() == text


def test_dim_pictures_can_be_seen_and_the_network_sees_them_as_they_are(tmp_path):
    """12 bits of gray in 16, of which few levels are left, with a pixel of the camera that is always lit."""
    gray = np.full((400, 400), 300, np.uint16)
    gray[100:200, 100:200] = 3800
    gray[300, 40] = 65535
    Image.fromarray(gray).save(tmp_path / "dim.tif")
    seen, (run_on, stars) = [], (star_predictor(0), star_predictor(0).run)
    run_on = dataclasses.replace(run_on, run=lambda images: seen.extend(images) or stars(images))
    predict(run_on, tmp_path / "dim.tif", tmp_path / "out", save=["overlays", "gallery", "labelme"], progress=False)
    assert (seen[0][..., 0] == gray >> 8).all()
    for shown in ("overlays/dim.png", "gallery/dim.jpg"):
        pixels = np.asarray(Image.open(tmp_path / "out" / shown).convert("L"))
        assert pixels[120:180, 120:180].min() > 200 and pixels[220:280, 220:280].max() < 15
    page = np.asarray(Image.open(tmp_path / "out" / "sheet.png").convert("L"))
    corner = np.argwhere(page < 15).min(axis=0)  # of the picture: the paper is bright
    assert page[corner[0] + 120, corner[1] + 120] > 200
