"""Words of a command in the wrong order, mistyped, or refused: one line that says the right one, before anything else."""

import json
import shlex
import shutil

import numpy as np
import pytest
from PIL import Image

from polarmask_tf import cli, swapped

RING = [5.0, 5.0, 25.0, 6.0, 24.0, 22.0, 6.0, 20.0]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """set/ with COCO annotations and pictures; in labels/ and pictures/ the same, apart, of labelme; run/ and model.tflite."""
    monkeypatch.chdir(tmp_path)
    for name in ("set", "pictures", "labels", "run", "empty"):
        (tmp_path / name).mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)
    for name in ("set/a.png", "pictures/a.png", "one picture.png"):
        Image.fromarray(pixels).save(name)
    image = {"id": 1, "file_name": "a.png", "height": 30, "width": 40}
    annotation = {"id": 1, "image_id": 1, "category_id": 1, "segmentation": [RING]}
    document = {"images": [image], "annotations": [annotation], "categories": [{"id": 1, "name": "cat"}]}
    (tmp_path / "set/ann.json").write_text(json.dumps(document))
    shape = {"label": "cat", "points": np.reshape(RING, (-1, 2)).tolist(), "shape_type": "polygon"}
    (tmp_path / "labels/a.json").write_text(json.dumps({"shapes": [shape], "imagePath": "a.png"}))
    for name in ("run/config.yaml", "model.tflite"):
        (tmp_path / name).write_text("")
    return tmp_path


def run(line, capsys):
    code = cli.main(shlex.split(line))
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def refused(line, capsys):
    """What is said of a command that is refused in one line, with nothing else printed."""
    try:
        code, out, error = run(line, capsys)
    except SystemExit as stop:
        code, (out, error) = stop.code, capsys.readouterr()
    assert code == 2 and out == "" and len(error.splitlines()) == 1 and error.startswith("polarmask"), (out, error)
    return error


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("convert out set", "convert set out"),
        ("convert empty set", "convert set empty"),
        ("convert out set/ann.json", "convert set/ann.json out"),
        ("convert set set/ann.json out", "convert set/ann.json set out"),
        ("convert pictures labels out", "convert labels pictures out"),
        ("convert out set/ann.json set", "convert set/ann.json set out"),
        ("convert out set set/ann.json", "convert set/ann.json set out"),
        ("convert set/ann.json out set", "convert set/ann.json set out"),
    ],
)
def test_convert_tells_the_right_order(folder, capsys, wrong, right):
    assert refused(wrong, capsys).strip().endswith(f"write: polarmask {right}")
    assert not (folder / "out").exists()
    assert run(right + " --processes 1", capsys)[0] == 0  # which is right


def test_a_converted_set_in_the_place_of_the_source(folder, capsys):
    assert run("convert set data --processes 1", capsys)[0] == 0
    assert "write: polarmask convert set data" in refused("convert data set", capsys)


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("predict pictures run --out found", "predict run pictures"),
        ("predict 'one picture.png' model.tflite --out found", "predict model.tflite 'one picture.png'"),
        ("predict set/a.png pictures/a.png nuclei --out found", "predict nuclei set/a.png pictures/a.png"),
        ("evaluate set --data run", "evaluate run --data set"),
        ("export found --out run", "export run --out found"),
        ("check set set/ann.json", "check set/ann.json set"),
    ],
)
def test_a_model_is_told_from_data(folder, capsys, wrong, right):
    assert refused(wrong, capsys).strip().endswith(f"write: polarmask {right}")
    assert not (folder / "found").exists()


def test_data_alone_is_no_model(folder, capsys):
    assert run("convert set data --processes 1", capsys)[0] == 0
    assert "write polarmask evaluate MODEL --data data" in refused("evaluate data", capsys)


def test_what_is_in_order_is_left_alone(folder):
    """Also where nothing is a model, or several are: what is wrong then is said by those who look closer."""
    (folder / "data").mkdir()
    (folder / "data/dataset.json").write_text("{}")
    for source, images, out in (
        ("set", None, "out"),
        ("set/ann.json", None, "data"),  # over what was converted
        ("set/ann.json", "set", "out"),
        ("labels", "pictures", "out"),
        ("set", "set", "empty"),
        ("nowhere", None, "out"),
    ):
        swapped.check_convert(folder / source, images and folder / images, folder / out)
    swapped.check_predict("run", ["pictures", "model.tflite"])
    swapped.check_predict("nowhere", ["pictures"])
    swapped.check_one("evaluate", "http://localhost:1/v1/models/x", "--data", "run")
    swapped.check_check(folder / "labels", folder / "pictures")


# ---- mistyped


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("trian", "there is no command 'trian'; did you mean 'train'?"),
        ("covnert a b", "did you mean 'convert'?"),
        ("zzzzzz", "there are shapes, convert, "),
        ("--verson", "did you mean '--version'?"),
        (
            "train --confg shapes --data d --out x",
            "train: error: there is no option --confg; did you mean '--config'?",
        ),
        ("train --data d --ot x", "did you mean '--out'?"),
        ("train --data d -out x", "there is no option -out; did you mean '--out'?"),
        ("convert a b --fromat=coco", "there is no option --fromat=coco; did you mean '--format'?"),
        ("convert a b --format coc", "invalid choice: 'coc'"),
        ("convert a b --classes -cat", "--classes -cat: a value that begins with a dash is written --classes=-cat"),
        ("train d --out x", "unrecognized arguments: d; did you mean --data d?"),
        ("train --data d --out x y", "unrecognized arguments: y; see polarmask train --help"),
        ("predict nuclei --out x", "required: INPUT"),
        ("", "required: COMMAND"),
    ],
)
def test_a_mistyped_word_is_told(capsys, line, said):
    assert said in refused(line, capsys)


def test_what_is_typed_right_is_taken():
    words = "convert a --classes=-dirt,old=new b --form coco --min-area -0 --add=-x"
    args = cli.parser().parse_args(shlex.split(words))
    assert args.classes == ["-dirt,old=new"] and args.format == "coco" and str(args.add[0]) == "-x" and str(args.out) == "b"
    assert cli.parser().parse_args(["predict", "nuclei", "--out", "x", "--", "-odd.png"]).images == ["-odd.png"]
    assert cli.parser().parse_args(["predict", "nuclei", "-", "--out", "x"]).images == ["-"]


def test_a_mistyped_key_is_told_before_pictures_are_read(folder, capsys, monkeypatch):
    assert "did you mean data.size?" in refused("check set --set data.siz=3", capsys)
    shutil.copytree("set", "data")
    assert "did you mean train.steps?" in refused("train --data data --out x --set train.stps=1", capsys)
    assert "no config file 'shaps'; did you mean 'shapes'?" in refused("check set --config shaps", capsys)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--save pdf", "--save 'pdf': of overlays,"),
        ("--classes Nucleos", "no class 'Nucleos'; this model's are: nucleus; did you mean 'nucleus'?"),
        ("--truth nowhere.json", "nowhere.json"),
        ("--resume --save coco", "no interrupted run to resume"),
    ],
)
def test_predict_is_refused_before_it_says_anything(folder, capsys, options, said):
    (folder / "found").mkdir()
    (folder / "found/results.json").write_text("[]")
    assert said in refused(f"predict nuclei pictures --out found {options}", capsys)
    assert [path.name for path in (folder / "found").iterdir()] == ["results.json"]


def test_the_threshold_is_said_when_it_starts(folder, capsys):
    code, _, error = run("predict nuclei pictures --out found --save coco", capsys)
    assert code == 0 and "showing detections from the model's own score" in error
