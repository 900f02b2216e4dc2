import dataclasses
import json
import os
import shutil
import sys
import types

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from helpers.exports import CLASSES, HEIGHT, RADIUS, WIDTH, damaged_images, hexagon_around_brightest, make_exports, spot
from polarmask_tf import config as configs
from polarmask_tf import files, lite
from polarmask_tf.errors import InputError
from polarmask_tf.inference import predict, predictor
from polarmask_tf.inference.predictor import Detections, Predictor, load_predictor, read_image


@pytest.fixture(scope="session")
def exports(tmp_path_factory):
    return make_exports(tmp_path_factory.mktemp("exports"))


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run directory whose load_model gives the hexagon model, and the overrides that its detect is called with."""
    calls = []

    def detect(images, **overrides):
        calls.append(overrides)
        return hexagon_around_brightest(images)

    config = configs.Config()
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, size=(HEIGHT, WIDTH)))
    model = types.SimpleNamespace(classes=CLASSES, config=config, detect=detect)
    monkeypatch.setitem(sys.modules, "polarmask_tf.weights.runs", types.SimpleNamespace(load_model=lambda path: model))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("")
    return tmp_path / "run", model, calls


IMAGES = [spot(64, 96, 60, 20, 2), spot(32, 48, 10, 11, 1), spot(64, 96, 4, 50, 2)]


def assert_same(one, other):
    for a, b in zip(one, other, strict=True):
        for field in ("scores", "classes", "boxes", "polygons"):
            np.testing.assert_allclose(getattr(a, field), getattr(b, field), atol=1e-3)


def test_a_tflite_file_is_lite(exports):
    predictor = load_predictor(exports["tflite"])
    assert (predictor.kind, predictor.classes, predictor.input_size) == ("tflite", CLASSES, (HEIGHT, WIDTH))
    model = lite.PolarMaskLite(exports["tflite"])
    assert_same(predictor(IMAGES), [Detections(**model(image)) for image in IMAGES])


def test_a_run_sees_letterboxed_images_and_gives_pixels(run, exports):
    predictor = load_predictor(run[0])
    assert (predictor.kind, predictor.classes, predictor.input_size) == ("run", CLASSES, (HEIGHT, WIDTH))
    assert_same(predictor(IMAGES), load_predictor(exports["tflite"])(IMAGES))
    assert predictor([]) == []


def test_a_saved_model_takes_images_of_several_sizes_in_one_call(exports):
    predictor = load_predictor(exports["saved_model"])
    assert (predictor.kind, predictor.classes, predictor.input_size) == ("saved_model", CLASSES, (HEIGHT, WIDTH))
    found = predictor(IMAGES)
    centers = [(60, 20), (10, 11), (4, 50)]  # this test model marks the first brightest pixel of the image itself
    for detections, center in zip(found, centers, strict=True):
        assert detections.scores == pytest.approx([0.9, 0.4])
        assert detections.polygons[0, 0] == pytest.approx((center[0] + 0.5 + RADIUS, center[1] + 0.5), abs=1e-3)
        left, right = max(0, center[0] + 0.5 - RADIUS), center[0] + 0.5 + RADIUS
        assert detections.boxes[0, [0, 2]] == pytest.approx([left, right], abs=1e-3)


@pytest.mark.parametrize("kind", ["tflite", "saved_model"])
def test_overrides_filter_what_an_export_gives(exports, kind):
    assert load_predictor(exports[kind], score_threshold=0.5)(IMAGES)[0].scores == pytest.approx([0.9])
    assert load_predictor(exports[kind], max_detections=1)(IMAGES)[1].polygons.shape == (1, 6, 2)
    assert load_predictor(exports[kind], score_threshold=0.95)(IMAGES)[2].boxes.shape == (0, 4)
    with pytest.raises(InputError, match="at most 3 detections, not 4"):
        load_predictor(exports[kind], max_detections=4)


def test_overrides_go_to_a_run_and_to_a_model(run):
    path, model, calls = run
    given = {"score_threshold": 0.25, "max_detections": 1000}
    for source in (path, str(path), model):
        load_predictor(source)(IMAGES[0])
        load_predictor(source, **given)(IMAGES[0])
    assert calls == [{}, given] * 3
    with pytest.raises(InputError, match="max_detections is 1000000000, must be 1 to"):
        load_predictor(path, max_detections=10**9)
    for source in (path, model):
        with pytest.raises(InputError, match=r"postprocess.max_detections is 50000: a number from 1 to 10000"):
            load_predictor(source, max_detections=50000)
        for value in (-1, 2, float("nan")):
            with pytest.raises(InputError, match=r"score_threshold is .*, must be 0 to 1"):
                load_predictor(source, score_threshold=value)


def test_what_is_no_model_is_refused(tmp_path, exports):
    (tmp_path / "text.tflite").write_text("no model")
    (tmp_path / "notes.txt").write_text("no model")
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken" / "assets.extra").mkdir(parents=True)
    (tmp_path / "broken" / "saved_model.pb").write_bytes(b"garbage")
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "saved_model.pb").write_bytes((exports["saved_model"] / "saved_model.pb").read_bytes())
    metadata = (exports["saved_model"] / "assets.extra" / "metadata.json").read_text()
    (tmp_path / "broken" / "assets.extra" / "metadata.json").write_text(metadata)
    expected = {
        "text.tflite": "no .tflite file with metadata.json",
        "notes.txt": "is none of these: a run directory",
        "empty": "is none of these",
        "missing": "does not exist",
        "bare": "assets.extra/metadata.json: missing",
        "broken": "TensorFlow cannot load it",
    }
    for name, text in expected.items():
        with pytest.raises(InputError, match=text) as error:
            load_predictor(tmp_path / name)
        assert name in str(error.value) and "\n" not in str(error.value)


def test_a_damaged_saved_model_is_found_when_it_is_loaded(exports, tmp_path):
    folder = shutil.copytree(exports["saved_model"], tmp_path / "model")
    file = folder / "assets.extra" / "metadata.json"
    document = json.loads(file.read_text())
    for change, expected in (
        ({"classes": CLASSES[:1]}, "a class beyond the 1"),
        ({"rays": 5}, "expected [1, 3, 5, 2]"),
        ({"max_detections": 2}, "more detections than there may be"),
        ({"input": {"height": -1, "width": 5}}, "height is -1"),
        ({"classes": 3}, "missing or broken"),
    ):
        file.write_text(json.dumps({**document, **change}))
        with pytest.raises(InputError) as error:
            load_predictor(folder)
        assert expected in str(error.value) and "\n" not in str(error.value)
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(InputError, match="not a regular file"):
        load_predictor(folder)


def test_a_predictor_refuses_what_is_no_image(exports):
    with pytest.raises(InputError, match="uint8 array"):
        load_predictor(exports["tflite"])([np.zeros((4, 4))])


def test_read_image_raises_input_errors(tmp_path):
    for path in damaged_images(tmp_path):
        with pytest.raises(InputError) as error:
            read_image(path)
        assert str(path) in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(InputError, match=r"the image is None, which cv2\.imread gives"):
        read_image(None)


@pytest.fixture
def folder(tmp_path):
    source = tmp_path / "images"
    source.mkdir()
    Image.fromarray(spot(64, 96, 60, 20, 2)).save(source / "12.png")
    Image.fromarray(spot(40, 40, 20, 20, 2)).save(source / "moon.png")
    Image.fromarray(spot(96, 64, 20, 20, 2)).save(source / "known.png")
    (source / "notes.txt").write_text("no image")
    return source


def truth_of(path):
    square = [20, 20, 22, 20, 22, 22, 20, 22]
    whole = coco_mask.encode(np.asfortranarray(np.ones((96, 64), np.uint8)))
    stripes = {"size": [96, 64], "counts": [64, 96, 96 * 64 - 160]}
    content = {
        "images": [{"id": 5, "file_name": "deep/known.png", "height": 96, "width": 64}],
        "annotations": [
            {"id": 1, "image_id": 5, "category_id": 3, "segmentation": [square], "area": 4, "iscrowd": 0},
            {"id": 2, "image_id": 5, "category_id": 7, "segmentation": stripes, "area": 96, "iscrowd": 0},
            {"id": 3, "image_id": 5, "category_id": 7, "segmentation": stripes, "area": 96, "iscrowd": 1},
            {
                "id": 4,
                "image_id": 5,
                "category_id": 7,
                "segmentation": {"size": [96, 64], "counts": whole["counts"].decode()},
                "area": 96 * 64,
            },
        ],
        "categories": [{"id": 3, "name": "moon"}, {"id": 7, "name": "sun"}],
    }
    path.write_text(json.dumps(content))
    return content


def test_predict_writes_overlays_and_coco_results(exports, folder, tmp_path, capsys):
    out = tmp_path / "deep" / "out"
    done = predict.predict(load_predictor(exports["tflite"]), folder, out, score_threshold=0.0, progress=False)
    assert (done["images"], done["detections"], list(done["skipped"])) == (3, 6, ["notes.txt"])
    assert "notes.txt" in done["skipped"]["notes.txt"]
    assert "skipped 1 of 4 files: notes.txt" in capsys.readouterr().err
    names = ["12.png", "known.png", "moon.png", "overlays", "results.json", "sheet.png"]
    assert sorted(path.name for path in out.rglob("*")) == names
    results = json.loads(done["results"].read_text())
    assert {result["image_id"] for result in results} == {12, "moon.png", "known.png"}
    assert Image.open(out / "overlays" / "12.png").size == (96 * 6, 64 * 6)

    coco = COCO()  # the results load as pycocotools wants them, and the masks are where the model saw the spot
    coco.dataset = {"images": [{"id": i} for i in (12, "moon.png", "known.png")], "categories": [], "annotations": []}
    coco.createIndex()
    loaded = coco.loadRes(str(done["results"]))
    first = loaded.imgToAnns[12][0]
    assert first["category_id"] == 3 and first["score"] == pytest.approx(0.9)
    assert first["bbox"] == pytest.approx([61 - 8, 21 - 4 * np.sqrt(3), 16, 8 * np.sqrt(3)], abs=0.01)
    mask = coco_mask.decode(first["segmentation"])
    assert mask.shape == (64, 96) and mask[21, 61] and not mask[21, 75]
    assert mask.sum() == pytest.approx(3 * np.sqrt(3) / 2 * 8**2, rel=0.05)


def test_predict_with_truth_takes_its_ids_and_draws_a_sheet(exports, folder, tmp_path):
    truth_of(tmp_path / "truth.json")
    predictor, out = load_predictor(exports["tflite"]), tmp_path / "out"
    done = predict.predict(predictor, folder, out, score_threshold=0.5, truth=tmp_path / "truth.json", progress=False)
    results = json.loads(done["results"].read_text())
    assert {result["image_id"] for result in results} == {12, "moon.png", 5}
    assert done["detections"] == len(results) == 3
    sheet = np.asarray(Image.open(done["sheet"]))
    assert sheet.shape[1] > 2 * 384 and len(np.unique(sheet.reshape(-1, 3), axis=0)) > 50


def truth_in_folders(path, *names):
    images = [{"id": 10 + i, "file_name": name, "height": 64, "width": 96} for i, name in enumerate(names)]
    path.write_text(json.dumps({"images": images, "categories": [{"id": 3, "name": "moon"}, {"id": 7, "name": "sun"}]}))
    return path


def ids_of(exports, source, truth, out, **options):
    predictor = load_predictor(exports["tflite"], max_detections=1)
    done = predict.predict(predictor, source, out, truth=truth, results_only=False, progress=False, **options)
    return [result["image_id"] for result in json.loads(done["results"].read_text())]


def test_equal_names_in_several_folders_are_told_apart_by_their_paths(exports, tmp_path, monkeypatch, capsys):
    for folder in ("cam1", "cam2", "elsewhere"):
        (tmp_path / "images" / folder).mkdir(parents=True)
        for name in ("0001.png", "0002.png"):
            Image.fromarray(IMAGES[0]).save(tmp_path / "images" / folder / name)
    names = ("cam1/0001.png", "cam1/0002.png", "cam2/0001.png", "cam2/0002.png")
    truth = truth_in_folders(tmp_path / "truth.json", *names)
    assert ids_of(exports, tmp_path / "images/cam1", truth, tmp_path / "a") == [10, 11]
    assert ids_of(exports, tmp_path / "images/cam2", truth, tmp_path / "b") == [12, 13]
    assert ids_of(exports, tmp_path / "images/cam2/0001.png", truth, tmp_path / "c") == [12]
    monkeypatch.chdir(tmp_path / "images/cam2")
    assert ids_of(exports, ".", truth, tmp_path / "d") == [12, 13]
    deeper = truth_in_folders(tmp_path / "deeper.json", *(f"val/{name}" for name in names), "0001.png")
    assert ids_of(exports, tmp_path / "images/cam2", deeper, tmp_path / "e") == [14, 13]  # a whole name before a part of one
    assert "truth" not in capsys.readouterr().err
    # Nothing tells which of two images it is: then it is none of them.
    assert ids_of(exports, tmp_path / "images/elsewhere", truth, tmp_path / "f") == [1, 2]
    assert "2 files could be any of several images of the truth" in capsys.readouterr().err


def test_a_number_in_a_name_is_not_taken_for_another_image_of_the_truth(exports, folder, tmp_path):
    truth = truth_in_folders(tmp_path / "truth.json", "moon.png", "known.png", "there.png")  # 10, 11 and 12
    assert set(ids_of(exports, folder, truth, tmp_path / "out")) == {"12.png", 10, 11}


def test_images_of_one_id_in_the_truth_are_left_out(exports, folder, tmp_path, capsys):
    truth = truth_in_folders(tmp_path / "truth.json", "moon.png", "known.png", "there.png")
    document = json.loads(truth.read_text())
    document["images"][2]["id"] = 10
    truth.write_text(json.dumps(document))
    assert set(ids_of(exports, folder, truth, tmp_path / "out")) == {12, "moon.png", 11}
    assert "skipped 2 of 3 images" in capsys.readouterr().err


def test_what_is_no_regular_file_is_named(exports, folder, tmp_path, capsys):
    os.mkfifo(folder / "pipe.png")
    (folder / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (folder / "more").mkdir()
    done = predict.predict(load_predictor(exports["tflite"]), folder, tmp_path / "out", progress=False)
    assert done["images"] == 3 and set(done["skipped"]) == {"pipe.png", "gone.png", "notes.txt"}
    assert "pipe.png: cannot read the image: not a regular file" in capsys.readouterr().err
    with pytest.raises(InputError, match="not a regular file"):
        predict.predict(load_predictor(exports["tflite"]), folder / "pipe.png", tmp_path / "out", progress=False)


def test_images_are_turned_on_request_and_what_is_ignored_is_counted(exports, tmp_path, capsys):
    source = tmp_path / "images"
    source.mkdir()
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.fromarray(IMAGES[0]).save(source / "1.png", exif=exif)  # its spot is at (60, 20) of 96 x 64
    Image.fromarray(IMAGES[0][..., 0].astype(np.uint16) * 16).save(source / "2.png")
    boxes = {}
    for name, options in (("plain", {}), ("turned", {"exif": "apply", "bit_depth": 12})):
        predictor, out = load_predictor(exports["tflite"], max_detections=1), tmp_path / name
        predict.predict(predictor, source, out, progress=False, **options)
        boxes[name] = {r["image_id"]: r["bbox"] for r in json.loads((out / "results.json").read_text())}
        notes = capsys.readouterr().err
        assert ("note: 1 of 2 images: EXIF orientation ignored" in notes) == (not options)
        assert ("note: 1 of 2 images: gray of at most 12 bits" in notes) == (not options)
    deep = dataclasses.replace(load_predictor(exports["tflite"], max_detections=1), bit_depth=12)  # as metadata.json may say
    predict.predict(deep, source, tmp_path / "deep", exif="apply", progress=False)
    assert (tmp_path / "deep/results.json").read_text() == (tmp_path / "turned/results.json").read_text()
    np.testing.assert_array_equal(deep(source / "2.png").polygons, deep(IMAGES[0]).polygons)
    center = {name: [box[1][0] + box[1][2] / 2, box[1][1] + box[1][3] / 2] for name, box in boxes.items()}
    np.testing.assert_allclose(center["plain"], (61, 21), atol=1.1)
    np.testing.assert_allclose(center["turned"], (96 - 61, 64 - 21), atol=1.1)


def test_one_prediction_at_a_time_into_a_directory(exports, folder, tmp_path):
    predictor, refused = load_predictor(exports["tflite"]), []

    def meanwhile(image):
        with pytest.raises(InputError) as error:
            predict.predict(predictor, folder, tmp_path / "out", progress=False)
        refused.append(str(error.value))
        return predictor(image)

    meanwhile.bit_depth, meanwhile.classes = None, CLASSES
    done = predict.predict(meanwhile, folder, tmp_path / "out", score_threshold=0.0, progress=False)
    assert done["detections"] == 6 == len(json.loads((tmp_path / "out/results.json").read_text()))
    assert refused and all(f"in use by polarmask predict (process {os.getpid()} on" in line for line in refused)
    assert not [path for path in (tmp_path / "out").rglob("*") if path.name.startswith(".")]


def test_predict_takes_one_file_and_draws_only_what_is_sure(exports, folder, tmp_path):
    done = predict.predict(load_predictor(exports["tflite"]), folder / "12.png", tmp_path, score_threshold=0.5, progress=False)
    assert (done["images"], done["detections"]) == (1, 1)
    drawn = np.asarray(Image.open(tmp_path / "overlays" / "12.png")).astype(int)
    assert np.ptp(drawn[21 * 6, 53 * 6 - 3 : 53 * 6 + 4]) > 50  # the outline's left corner, at (53, 21)


def test_files_that_share_a_stem_keep_apart(exports, tmp_path):
    for name in ("1.png", "1.bmp", "01.png"):
        Image.fromarray(IMAGES[0]).save(tmp_path / name)
    done = predict.predict(load_predictor(exports["tflite"]), tmp_path, tmp_path / "out", progress=False)
    assert {result["image_id"] for result in json.loads(done["results"].read_text())} == {"1.png", "1.bmp", "01.png"}
    names = sorted(path.name for path in (tmp_path / "out" / "overlays").iterdir())
    assert names == ["01.png", "1.bmp.png", "1.png.png"]


def test_nothing_readable_is_an_error(exports, tmp_path):
    predictor = load_predictor(exports["tflite"])
    (tmp_path / "text.jpg").write_text("no image")
    (tmp_path / "empty").mkdir()
    for source, text in (("text.jpg", "no image to predict on"), ("empty", "no files"), ("missing", "no such file")):
        with pytest.raises(InputError, match=text):
            predict.predict(predictor, tmp_path / source, tmp_path / "out", progress=False)
    assert not (tmp_path / "out" / "results.json").exists()


def test_an_output_that_cannot_be_written_is_an_error(exports, folder, tmp_path, monkeypatch):
    predictor = load_predictor(exports["tflite"])
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match="file: cannot be written"):
        predict.predict(predictor, folder, tmp_path / "file", progress=False)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "replace", full)
    with pytest.raises(InputError, match="No space left"):
        predict.predict(predictor, folder, tmp_path / "out", progress=False)
    assert list((tmp_path / "out" / "overlays").iterdir()) == []


@pytest.mark.parametrize(
    "text, expected",
    [
        ("no json", "not valid JSON"),
        ("[]", "holds a list"),
        ('{"images": 3, "annotations": []}', "no key 'categories'|'images' is a int"),
        ('{"images": [], "categories": []}', "names no images"),
        ('{"images": [3, {"id": "x", "file_name": "y"}]}', "names no images"),
        ('{"images": [], "annotations": [{}], "categories": [{"id": 1}]}', r"categories\[0\] needs"),
    ],
)
def test_a_wrong_truth_is_an_error(exports, folder, tmp_path, text, expected):
    (tmp_path / "truth.json").write_text(text)
    predictor = load_predictor(exports["tflite"])
    with pytest.raises(InputError, match=expected):
        predict.predict(predictor, folder, tmp_path / "out", truth=tmp_path / "truth.json", progress=False)


def test_the_sheet_takes_a_dozen_spread_over_all(tmp_path, monkeypatch):
    images = [{"id": i, "file_name": f"{i:02}.png", "height": 8, "width": 8} for i in range(30)]
    square = {"id": 1, "image_id": 3, "category_id": 1, "segmentation": [[1, 1, 5, 1, 5, 5, 1, 5]], "area": 16, "iscrowd": 0}
    for image in images:
        Image.new("RGB", (8, 8)).save(tmp_path / image["file_name"])
        (tmp_path / image["file_name"]).with_suffix(".json").write_text("{}")  # of labelme: none of them takes a place
    truth = tmp_path / "truth" / "truth.json"
    truth.parent.mkdir()
    truth.write_text(json.dumps({"images": images, "annotations": [square], "categories": [{"id": 1, "name": "a"}]}))
    nothing = {"scores": np.zeros(0), "classes": np.zeros(0, int), "boxes": np.zeros((0, 4)), "polygons": np.zeros((0, 4, 2))}
    predictor = Predictor("run", [{"name": "a", "category_id": 1}], (8, 8), 1, lambda images: [nothing for _ in images])
    captions = []
    draw_sheet = predict.visualize.sheet
    monkeypatch.setattr(
        predict.visualize, "sheet", lambda pairs, **kw: captions.extend(c for *_, c in pairs) or draw_sheet(pairs, **kw)
    )
    predict.predict(predictor, tmp_path, tmp_path / "out", truth=truth, progress=False)
    assert len(captions) == 12 and captions[0].startswith("00.png: 0 true, 0 found") and captions[-1].startswith("29.png")
    captions.clear()
    predict.predict(predictor, tmp_path, tmp_path / "out", progress=False)
    assert len(captions) == 12 and captions[0].startswith("00.png: 0 found") and captions[-1].startswith("29.png")


@pytest.mark.parametrize(("side", "object_side", "is_said"), [(64, 24, True), (64, 40, False), (24, 8, False)])
def test_objects_that_the_network_hardly_sees_are_said_to_need_tiles(tmp_path, capsys, side, object_side, is_said):
    Image.new("RGB", (side, side)).save(tmp_path / "a.png")
    box = np.float32([[0, 0, object_side, object_side]])
    rows = {
        "scores": np.ones(1),
        "classes": np.zeros(1, int),
        "boxes": box,
        "polygons": box[:, [[0, 1], [2, 1], [2, 3], [0, 3]]],
    }
    predictor = Predictor("run", [{"name": "a", "category_id": 1}], (16, 16), 1, lambda images: [rows for _ in images])
    predict.predict(predictor, tmp_path / "a.png", tmp_path / "out", progress=False)
    said = "1 of 1 images: a quarter of the objects is under 8 pixels once the image is shrunk to the network's input; --tile N"
    assert (said in capsys.readouterr().err) == is_said


def test_truth_that_cannot_be_drawn_is_named_and_left_out(exports, folder, tmp_path, capsys):
    content = truth_of(tmp_path / "truth.json")
    content["annotations"][0]["segmentation"] = [[1, 1, 2, 2]]
    (tmp_path / "truth.json").write_text(json.dumps(content))
    predictor = load_predictor(exports["tflite"])
    done = predict.predict(predictor, folder, tmp_path / "out", truth=tmp_path / "truth.json", progress=False)
    assert done["sheet"].exists()
    assert "not drawn: annotation 1 of image 5: polygon with fewer than 3 points" in capsys.readouterr().err


# ---- for an evaluation server


def image_info(path, *names, **more):
    """What COCO gives for its test images: no annotations."""
    images = [{"id": 100 + i, "file_name": name, "height": 9, "width": 9} for i, name in enumerate(names)]
    path.write_text(json.dumps({"images": images, "categories": [{"id": 3, "name": "moon"}], **more}))
    return path


@pytest.mark.parametrize("more", [{}, {"annotations": []}])
def test_results_only_writes_one_file_for_the_images_of_a_json(exports, folder, tmp_path, capsys, more):
    truth = image_info(tmp_path / "info.json", "known.png", "gone.png", "moon.png", "lost.png", **more)
    predictor, out = load_predictor(exports["tflite"]), tmp_path / "out"
    done = predict.predict(predictor, folder, out, truth=truth, results_only=True, progress=False)
    assert [path.name for path in out.rglob("*")] == ["results.json"] and done["sheet"] is None
    assert (done["images"], done["missing"], done["skipped"]) == (2, ["gone.png", "lost.png"], {})
    assert "missing 2 of 4 images" in (error := capsys.readouterr().err) and "gone.png, lost.png" in error
    results = json.loads(done["results"].read_text())
    # Also the weak detections, which COCO's average precision counts, and the ids of the JSON.
    assert sorted((r["image_id"], round(r["score"], 1)) for r in results) == [(100, 0.4), (100, 0.9), (102, 0.4), (102, 0.9)]
    assert done["detections"] == 4
    for result in results:
        assert set(result) == {"image_id", "category_id", "score", "segmentation", "bbox"}
        assert isinstance(result["segmentation"]["counts"], str)
        side = {100: [96, 64], 102: [40, 40]}[result["image_id"]]
        assert result["segmentation"]["size"] == side and coco_mask.decode(result["segmentation"]).shape == tuple(side)


def test_results_only_and_with_pictures_agree(exports, folder, tmp_path):
    predictor = load_predictor(exports["tflite"])
    one = predict.predict(predictor, folder, tmp_path / "one", results_only=True, progress=False)
    other = predict.predict(predictor, folder, tmp_path / "other", score_threshold=0.0, progress=False)
    assert one["results"].read_text() == other["results"].read_text()
    assert one["images"] == 3 and list(one["skipped"]) == ["notes.txt"]
    sure = predict.predict(predictor, folder, tmp_path / "sure", results_only=True, score_threshold=0.5, progress=False)
    assert sure["detections"] == 3


def test_limit_counts_images_of_the_json(exports, folder, tmp_path):
    truth = image_info(tmp_path / "info.json", "moon.png", "known.png")
    predictor = load_predictor(exports["tflite"])
    done = predict.predict(predictor, folder, tmp_path / "out", truth=truth, limit=1, results_only=True, progress=False)
    assert done["images"] == 1 and {r["image_id"] for r in json.loads(done["results"].read_text())} == {101}  # known.png


def test_a_json_of_other_images_is_an_error(exports, folder, tmp_path):
    truth = image_info(tmp_path / "info.json", "a.png", "b.png")
    with pytest.raises(InputError, match=r"holds none of the 2 images of .*, like a\.png"):
        predict.predict(load_predictor(exports["tflite"]), folder, tmp_path / "out", truth=truth, results_only=True)
    assert not (tmp_path / "out").exists()


def test_entries_of_the_json_that_cannot_be_used_are_counted(exports, folder, tmp_path, capsys):
    truth = image_info(tmp_path / "info.json", "moon.png")
    document = json.loads(truth.read_text())
    document["images"] += [{"id": 5}, 7]
    truth.write_text(json.dumps(document))
    predict.predict(load_predictor(exports["tflite"]), folder, tmp_path / "out", truth=truth, results_only=True, progress=False)
    assert f"skipped 2 of 3 images of {truth}" in capsys.readouterr().err


def test_nothing_found_is_an_empty_list(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "1.png")
    nothing = {"scores": np.zeros(0), "classes": np.zeros(0, int), "boxes": np.zeros((0, 4)), "polygons": np.zeros((0, 4, 2))}
    predictor = Predictor("run", [{"name": "a", "category_id": 1}], (8, 8), 1, lambda images: [nothing for _ in images])
    done = predict.predict(predictor, tmp_path / "1.png", tmp_path / "out", results_only=True, progress=False)
    assert done["detections"] == 0 and json.loads(done["results"].read_text()) == []


def test_a_failure_halfway_leaves_no_results(folder, tmp_path):
    """An older results.json stays, and no half-written one is beside it, but what --resume goes on from."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "results.json").write_text("older")

    def run(images):
        if images[0].shape[0] == 96:
            raise RuntimeError("out of memory")
        return [{"scores": np.ones(1), "classes": np.zeros(1, int), "boxes": np.ones((1, 4)), "polygons": np.ones((1, 4, 2))}]

    predictor = Predictor("run", [{"name": "a", "category_id": 1}], (8, 8), 1, run)
    with pytest.raises(RuntimeError):
        predict.predict(predictor, folder, tmp_path / "out", results_only=True, progress=False)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["results.json", "unfinished.jsonl"]
    assert (tmp_path / "out" / "results.json").read_text() == "older"


# ---- sheets without ground truth


def drawn_sheet(monkeypatch):
    """The cells and heads that visualize.sheet is given, as it is called."""
    calls = []
    draw = predict.visualize.sheet
    monkeypatch.setattr(predict.visualize, "sheet", lambda cells, **kw: calls.append((cells, kw["heads"])) or draw(cells, **kw))
    return calls


def test_the_sheet_without_truth_shows_predictions_alone(exports, folder, tmp_path, monkeypatch):
    calls = drawn_sheet(monkeypatch)
    done = predict.predict(load_predictor(exports["tflite"]), folder, tmp_path / "out", score_threshold=0.5, progress=False)
    ((cells, heads),) = calls
    assert heads == () and [len(cell) for cell in cells] == [2, 2, 2]
    assert [cell[-1] for cell in cells] == ["12.png: 1 found", "known.png: 1 found", "moon.png: 1 found"]
    assert Image.open(done["sheet"]).width > 384


def test_a_model_whose_class_no_file_can_name_is_refused_when_it_is_loaded(tmp_path, monkeypatch):
    """Not after a folder of 100,000 pictures, when the table is written."""
    (tmp_path / "model.tflite").write_bytes(b"x")
    metadata = {"classes": [{"name": "\ud800", "category_id": 1}], "input": {"height": 32, "width": 32}}
    monkeypatch.setattr(predictor, "_tflite", lambda path, accelerator: (metadata, None, ""))
    with pytest.raises(InputError, match=r"model\.tflite: what it knows about itself is damaged"):
        load_predictor(tmp_path / "model.tflite")
