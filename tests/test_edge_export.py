"""`polarmask export` of files for phones and boards: what it writes and measures, the gate on AP, and what it refuses."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import tensorflow as tf

from helpers.edge import images, make_model
from polarmask_tf import cli, lite
from polarmask_tf.errors import InputError
from polarmask_tf.export import tflite
from polarmask_tf.export.export import export_model
from polarmask_tf.files import lock
from polarmask_tf.inference import evaluate
from polarmask_tf.inference.predictor import load_predictor, run_predictor
from polarmask_tf.modeling.polarmask import PolarMask
from polarmask_tf.weights import runs


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def run_and_data(model, tmp_path_factory):
    """The model of chance as a run, and data whose truth is what it finds itself: its AP there is 1 or nearly so."""
    folder = tmp_path_factory.mktemp("gate")
    assert cli.main(["shapes", str(folder / "shapes"), "--train", "2", "--val", "12", "--size", "64"]) == 0
    file = folder / "shapes" / "val" / "annotations.json"
    truth = json.loads(file.read_text())
    truth["categories"] = [{"id": entry["category_id"], "name": entry["name"]} for entry in model.classes]
    truth["annotations"] = []
    keras = run_predictor(model)
    for image in truth["images"]:
        (found,) = keras([lite.read_image(folder / "shapes" / "val" / "images" / image["file_name"])])
        for polygon, label in list(zip(found.polygons, found.classes, strict=True))[:6]:
            low, high = polygon.min(0), polygon.max(0)
            truth["annotations"].append(
                {
                    "id": len(truth["annotations"]) + 1,
                    "image_id": image["id"],
                    "category_id": int(label) + 1,
                    "iscrowd": 0,
                    "segmentation": [polygon.ravel().tolist()],
                    "area": 1.0,
                    "bbox": [*low.tolist(), *(high - low).tolist()],
                }
            )
    file.write_text(json.dumps(truth))
    words = ["convert", file, folder / "shapes" / "val" / "images", folder / "val", "--processes", "1"]
    assert cli.main([str(word) for word in words]) == 0
    config = dataclasses.replace(model.config, data=dataclasses.replace(model.config.data, train=str(folder / "val")))
    runs.write_run(folder / "run", config, {"classes": model.classes, "name": "x", "num_images": 0})
    runs.save(model, folder / "run", 1, weights_only=True)
    return folder / "run", folder / "val"


@pytest.mark.slow
def test_the_command_writes_all_and_measures_them(run_and_data, tmp_path, capsys):
    run, data = run_and_data
    words = ["export", run, "--out", tmp_path, "--precision", "fp32,int8", "--raw", "--data", data, "--max-ap-drop", "0.5"]
    assert cli.main([str(word) for word in words]) == 0
    names = {"model.tflite", "model_raw.tflite", "model_int8.tflite", "model_int8_raw.tflite", "saved_model", "lite.py"}
    assert {path.name for path in tmp_path.iterdir()} == names
    lines = capsys.readouterr().out.splitlines()
    head = next(i for i, line in enumerate(lines) if line.startswith("against Keras"))
    table = {line.split()[0]: line.split() for line in lines[head + 1 : head + 6]}
    assert set(table) == names - {"lite.py"}
    expected = evaluate.evaluate(load_predictor(run), data).values["AP"]
    assert expected > 0.5
    for name, row in table.items():
        assert float(row[-1]) == pytest.approx(expected, abs=1e-4)
        assert abs(float(row[-2]) - expected) < (0.3 if "int8" in name else 0.02), name
    measured = evaluate.evaluate(load_predictor(tmp_path / "model_int8.tflite"), data).values["AP"]
    assert float(table["model_int8.tflite"][-2]) == pytest.approx(measured, abs=1e-4)

    assert cli.main(["inspect", str(tmp_path / "model_int8_raw.tflite")]) == 0
    told = capsys.readouterr().out
    assert "input   images: uint8 [1, 64, 96, 3]" in told and "output  P4_rays: float32 [1, 4, 6, 12]" in told
    assert '"precision": "int8"' in told and "3 classes: kind 0, kind 1, kind 2" in told
    assert cli.main(["inspect", str(tmp_path / "saved_model")]) == 0 and "kind 2" in capsys.readouterr().out


def test_the_gate_closes(run_and_data, tmp_path, capsys, monkeypatch):
    run, data = run_and_data
    worse = tflite.export_tflite

    def blind(model, *args, **kwargs):
        changed = dataclasses.replace(model.config.postprocess, max_detections=1)
        model.config, kept = dataclasses.replace(model.config, postprocess=changed), model.config
        try:
            return worse(model, *args, **kwargs)
        finally:
            model.config = kept

    monkeypatch.setattr(tflite, "export_tflite", blind)
    assert cli.main(["export", str(run), "--out", str(tmp_path), "--data", str(data)]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("polarmask: error: model.tflite: mask AP 0.") and "--max-ap-drop 0.01" in error


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--precision", "int4"], "precision int4: choose of fp32, fp16, dynamic, int8"),
        (["--data", "nowhere"], "nowhere: not a directory of converted data"),
    ],
)
def test_bad_arguments_are_one_line(run_and_data, tmp_path, capsys, words, message):
    assert cli.main(["export", str(run_and_data[0]), "--out", str(tmp_path / "out"), *words]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_8_bits_need_images(run_and_data, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(run_and_data[0], run)
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace(str(run_and_data[1]), str(tmp_path / "gone")))
    assert cli.main(["export", str(run), "--out", str(tmp_path / "out"), "--precision", "int8"]) == 2
    assert "give --images DATA" in capsys.readouterr().err


def never(*_, **__):
    raise AssertionError("something was converted")


def listing(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--out", "out[1]"], "out[1]/saved_model: TensorFlow loads no SavedModel from a path with [ or \\ in it"),
        (["--out", "a\\b"], "TensorFlow loads no SavedModel"),
        (["--out", "out[1]", "--serving"], "TensorFlow loads no SavedModel"),
        (["--out", "a_file"], "a_file: cannot be written: "),
        (["--out", "taken"], "taken/saved_model: in the way, and no SavedModel that could be replaced"),
        (["--out", "out", "--data", "empty"], "empty"),
        (["--out", "out", "--images", "empty"], "empty"),
        (["--out", "locked"], "locked: in use by polarmask export"),
    ],
)
def test_what_can_be_known_is_found_before_anything_is_converted(run_and_data, tmp_path, capsys, monkeypatch, words, message):
    (tmp_path / "a_file").write_text("mine")
    (tmp_path / "taken" / "saved_model").mkdir(parents=True)
    (tmp_path / "taken" / "saved_model" / "notes.txt").write_text("mine")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tf.saved_model, "save", never)
    with lock(tmp_path / "locked", "export"):
        before = listing(tmp_path)
        assert cli.main(["export", str(run_and_data[0]), *words]) == 2
        assert listing(tmp_path) == before
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_directory_with_spaces(run_and_data, tmp_path):
    out = tmp_path / "with some spaces"
    assert cli.main(["export", str(run_and_data[0]), "--out", str(out)]) == 0
    image = next(images(1, 64, 96))
    one, other = (load_predictor(out / name)(image) for name in ("saved_model", "model.tflite"))
    np.testing.assert_allclose(one.scores, other.scores, atol=1e-5)


@pytest.mark.slow
def test_what_tensorflow_cannot_convert_is_one_line(run_and_data, tmp_path, capsys, monkeypatch):
    run, _ = run_and_data
    assert cli.main(["export", str(run), "--out", str(tmp_path)]) == 0
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    detect = PolarMask.detect

    def strange(model, images_, **options):  # TensorFlow Lite has no such function
        found = detect(model, images_, **options)
        text = tf.strings.as_string(found["detection_scores"])
        return {**found, "detection_scores": tf.strings.to_number(text)}

    monkeypatch.setattr(PolarMask, "detect", strange)
    capsys.readouterr()
    assert cli.main(["export", str(run), "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert (
        error.startswith(f"polarmask: error: {tmp_path}/model.tflite: TensorFlow cannot make it: ") and error.count("\n") == 1
    )
    assert (tmp_path / "model.tflite").read_bytes() == before[tmp_path / "model.tflite"]
    monkeypatch.undo()

    def full_disk(*_, **__):
        raise tf.errors.ResourceExhaustedError(None, None, "{{node SaveV2}} x/y; No space left on device")

    monkeypatch.setattr(tf.saved_model, "save", full_disk)
    (tmp_path / "saved_model" / "mine").write_text("still the older one")
    assert cli.main(["export", str(run), "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"polarmask: error: {tmp_path}: cannot be written: No space left on device\n"
    assert (tmp_path / "saved_model" / "mine").read_text() and not [n for n in listing(tmp_path) if n.startswith(".export-")]


def test_a_model_is_exported_as_its_run_is(model, run_and_data, tmp_path):
    rows = export_model(model, str(tmp_path), images=str(run_and_data[1]), precisions=["int8"])
    assert set(rows) == {"saved_model", "model_int8.tflite"} and rows["saved_model"]["detections"] > 10
    with pytest.raises(InputError, match=r"^max_detections: of a model, set it in config\.postprocess"):
        export_model(model, tmp_path, max_detections=7)
    with pytest.raises(InputError, match="--max-ap-drop nan"):
        export_model(model, tmp_path, max_ap_drop=float("nan"))
