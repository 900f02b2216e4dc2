"""Settings that fit the data: `polarmask init`, and `train` without --config."""

import contextlib
import csv
import dataclasses
import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import types
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
import yaml
from PIL import Image

from polarmask_tf import cli, config
from polarmask_tf.data import dataset, records
from polarmask_tf.errors import InputError
from polarmask_tf.tools import doctor, init_config, upper_bound
from polarmask_tf.tools.init_config import PRETRAINED, SCRATCH, Survey
from polarmask_tf.training import checks, directory, log
from polarmask_tf.weights import imagenet

TINY = ("model.backbone.width=8", "model.fpn.channels=16", "model.head.channels=16", "train.steps=4", "data.batch=4")


def polarmask(*args):
    return cli.main([str(arg) for arg in args])


def make(folder, *, images=4, size=(400, 300), side=40, color=True, classes=1, bar=None):
    """Converted data of noise pictures, width x height, with two square objects of `side` pixels each, or bars."""
    wide, high = bar or (side, side)
    (folder / "images").mkdir(parents=True)
    random = np.random.default_rng(0)
    entries, annotations = [], []
    for i in range(images):
        shape = (size[1], size[0], 3 if color else 1)
        pixels = np.broadcast_to(random.integers(0, 256, shape, np.uint8), (*shape[:2], 3))
        Image.fromarray(pixels).save(folder / "images" / f"{i}.png")
        entries.append({"id": i, "file_name": f"{i}.png", "width": size[0], "height": size[1]})
        for left in (10, 20 + wide):
            box = [left, 5, left + wide, 5, left + wide, 5 + high, left, 5 + high]
            entry = {
                "id": len(annotations) + 1,
                "image_id": i,
                "category_id": 1 + i % classes,
                "iscrowd": 0,
                "area": wide * high,
            }
            annotations.append({**entry, "segmentation": [box], "bbox": [left, 5, wide, high]})
    categories = [{"id": 1 + k, "name": f"kind {k}"} for k in range(classes)]
    document = {"images": entries, "annotations": annotations, "categories": categories}
    (folder / "coco.json").write_text(json.dumps(document))
    assert polarmask("convert", folder / "coco.json", folder / "images", folder / "data", "--processes", 1) == 0
    return folder / "data"


def fitted(data, *overrides):
    text = init_config.fit(data)
    return config.loads(text, "init", overrides), text


def test_the_survey_measures_what_was_drawn(tmp_path):
    seen = init_config.survey(dataset.load(make(tmp_path)))
    assert (seen.longer, seen.gray, seen.same_way, seen.dark) == (400, False, True, False)
    assert seen.aspect == pytest.approx(400 / 300)
    np.testing.assert_allclose(seen.sizes, [40 / 400] * 8, rtol=1e-5)
    np.testing.assert_allclose(seen.extents, [40 / 400] * 8, rtol=1e-5)
    assert init_config.survey(dataset.load(make(tmp_path / "gray", color=False))).gray


def test_data_with_a_broken_picture_or_box_is_refused_in_one_line(tmp_path):
    data = make(tmp_path, images=1)
    (shard,) = data.glob("*.tfrecord")
    (example,) = map(tf.train.Example.FromString, records.read_shard(shard))
    features = example.features.feature
    for change, said in (
        (lambda: features["image/object/bbox/ymax"].float_list.value.pop(), "objects without .* box"),
        (lambda: features["image/object/bbox/ymax"].float_list.value.append(float("nan")), "objects without .* box"),
        (lambda: features["image/object/bbox/ymax"].float_list.value.__setitem__(1, -0.5), "objects without .* box"),
        (lambda: features["image/object/bbox/ymax"].float_list.value.__setitem__(1, 0.5), "0.png: the image: cannot read"),
    ):
        features["image/encoded"].bytes_list.value[0] = features["image/encoded"].bytes_list.value[0][:5000]
        change()
        with open(shard, "wb") as file:
            records.write_record(file, example.SerializeToString())
        with pytest.raises(InputError, match=said):
            init_config.fit(data)


def test_settings_follow_the_data(tmp_path, monkeypatch):
    monkeypatch.setattr(init_config, "has_imagenet_weights", lambda: True)
    photos, text = fitted(make(tmp_path / "photos", classes=3))
    assert photos.model.backbone.type == "EfficientNetLite0" and photos.loss.mask_weight == 0
    assert photos.data.size == (256, 320) and photos.data.crop == () and photos.data.max_instances == 10
    numbers = [line for line in text.splitlines() if line.startswith("  ") and "train:" not in line and "every" not in line]
    assert len(numbers) > 6 and all("#" in line for line in numbers)
    # Small gray objects: 10 of 400 pixels are 16 at 640, of which training sees crops.
    cells, _ = fitted(make(tmp_path / "cells", color=False, side=10, size=(400, 400)))
    assert cells.model.backbone.type == "resnet" and cells.model.normalization == "image" and cells.data.flip == "both"
    assert cells.data.size == (640, 640) and cells.data.crop == (256, 256) and cells.targets.match == "cost"
    tiny, text = fitted(make(tmp_path / "tiny", size=(128, 128), classes=2))
    assert tiny.data.size == (128, 128) and tiny.data.batch == 8 and "128 pixels" in text and tiny.targets.match == "static"
    # In pixels of the input: the default, for images of 800 pixels, puts all of a small image on its coarsest level.
    assert tiny.targets.ranges == (64.0,) and photos.targets.ranges == () == cells.targets.ranges


def test_long_thin_objects_get_more_rays(tmp_path):
    square, text = fitted(make(tmp_path / "squares"))
    assert square.model.rays == 36 and "rays reach a mean IoU of 0.9" in text
    # A bar of 200 x 8 pixels: rays 10 degrees apart miss its corners by far.
    long, text = fitted(make(tmp_path / "bars", images=2, size=(640, 300), bar=(200, 8)))
    assert long.model.rays == 72, text


def test_class_scores_of_objects_that_polygons_fit_learn_the_iou(tmp_path, monkeypatch):
    data = make(tmp_path, color=False)
    seen = init_config.survey(dataset.load(data))
    monkeypatch.setattr(init_config, "survey", lambda info: seen._replace(ceilings=(0.98, 0.99)))
    settings, text = fitted(data)
    assert settings.targets.classification == "iou" == settings.targets.centerness and "polygons fit well" in text
    monkeypatch.setattr(init_config, "survey", lambda info: seen._replace(ceilings=(0.94, 0.96)))
    assert fitted(data)[0].targets.classification == "label"
    monkeypatch.setattr(init_config, "survey", lambda info: seen._replace(ceilings=(0.98, 0.99), gray=False))
    monkeypatch.setattr(init_config, "has_imagenet_weights", lambda: True)
    assert fitted(data)[0].targets.classification == "label"  # not measured from a pretrained start


def test_the_ceilings_of_the_survey_are_those_of_upper_bound(tmp_path):
    data = make(tmp_path, images=3, bar=(60, 10))
    measured = upper_bound.upper_bound(data, (36, 72), ("mass",), progress=False).ious[:, 0].mean(axis=0)
    np.testing.assert_allclose(init_config.survey(dataset.load(data)).ceilings, measured, rtol=1e-5)


def test_without_the_weights_it_starts_from_scratch_and_says_how_to_get_them(tmp_path, monkeypatch):
    monkeypatch.setattr(init_config, "has_imagenet_weights", lambda: False)
    settings, text = fitted(make(tmp_path))
    assert settings.model.backbone.type == "resnet" and "pip install 'polarmask_tf[imagenet]'" in text


@pytest.mark.parametrize("longer", [64, 128, 333, 1000, 12000])
@pytest.mark.parametrize("size", [0.002, 0.05, 0.9])
@pytest.mark.parametrize("aspect", [0.1, 0.7, 1.0, 1.9, 20.0])
@pytest.mark.parametrize("images", [1, 50, 100_000])
def test_whatever_the_data_the_config_is_valid(longer, size, aspect, images, monkeypatch):
    info = dataset.DatasetInfo(Path("d"), "d", images, 10**4, 0, [{"name": "a", "category_id": 1}], 10**4, 4, [], {})
    for gray in (False, True):
        seen = Survey(longer, aspect, True, np.full(9, size), np.full(9, size * 1.1), gray, True)
        monkeypatch.setattr(init_config, "survey", lambda info, seen=seen: seen)
        monkeypatch.setattr(init_config.dataset, "load", lambda path: info)
        loaded, _ = fitted(Path("d"))  # which checks bounds and contradictions
        height, width = loaded.data.size
        assert max(height, width) <= max(1024, 2 * longer) and loaded.train.steps * loaded.data.batch >= 10 * images
        assert all(crop <= side for crop, side in zip(loaded.data.crop, (height, width), strict=False))


def test_the_package_of_the_weights_is_the_one_that_is_read():
    assert init_config._LITE0_PACKAGE == imagenet.LITE0_PACKAGE and imagenet.LITE0_PACKAGE in doctor._EXTRAS


def test_the_bases_are_shipped():
    assert {PRETRAINED, SCRATCH} <= {path.name for path in config.configs_dir().glob("*.yaml")}


@pytest.mark.parametrize("name", ['a: b # "c"', "päth with blank", "[x]"])
def test_names_survive_the_yaml(tmp_path, name):
    loaded, text = fitted(make(tmp_path / name))
    assert loaded.data.train == str(tmp_path / name / "data") and yaml.safe_load(text)["data"]["train"] == loaded.data.train


def test_init_writes_a_file_that_train_takes_and_replaces_none(tmp_path, capsys):
    data, out = make(tmp_path), tmp_path / "mine.yaml"
    assert polarmask("init", data, "--out", out) == 0
    assert f"polarmask train --config {out}" in capsys.readouterr().out
    assert config.load(out).data.train == str(data)
    before = out.read_bytes()
    assert polarmask("init", data, "--out", out) == 2 and out.read_bytes() == before
    assert polarmask("init", tmp_path, "--out", tmp_path / "x.yaml") == 2 and not (tmp_path / "x.yaml").exists()


def test_places_are_right_from_another_working_directory(tmp_path, monkeypatch, capsys):
    make(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert polarmask("init", "data", "--val", "./data", "--out", "my own.yaml") == 0
    settings = config.load("my own.yaml")
    assert settings.data.train == settings.data.val == str(tmp_path / "data")
    assert capsys.readouterr().out.endswith("next: polarmask train --config 'my own.yaml' --out 'runs/my own'\n")


def _check_place(run, train, val):
    settings = config.load_saved(run / "config.yaml", [f"data.train={train}", f"data.val={val}"])
    directory.check(settings, dataset.load(train), run, restart=False)


@pytest.mark.slow
def test_train_fits_the_settings_itself_and_goes_on_without_any(tmp_path, capsys, monkeypatch):
    make(tmp_path / "a", size=(64, 64), side=20), make(tmp_path / "b", size=(64, 64), side=20)
    (tmp_path / "both").mkdir()
    (tmp_path / "a" / "data").rename(tmp_path / "both" / "train")
    (tmp_path / "b" / "data").rename(tmp_path / "both" / "val")
    run = tmp_path / "run"
    assert polarmask("train", "--out", run) == 2 and "no data" in capsys.readouterr().err and not run.exists()
    sets = [word for setting in TINY for word in ("--set", setting)]
    assert polarmask("train", "--data", tmp_path / "both", "--out", run, *sets) == 0
    out, err = capsys.readouterr()
    assert "polarmask init" in out and "4 images, 8 objects, 1 class; " in out and "4 steps of 4 images on 1 device" in out
    assert "step 4/4: loss" in err and "AP" in out  # measured at the end, on both/val
    assert "what the training learns from" not in err
    assert polarmask("train", "--data", run, "--out", tmp_path / "other") == 2
    assert "is the run directory of a training" in capsys.readouterr().err and not (tmp_path / "other").exists()
    settings = config.load_saved(run / "config.yaml")
    assert settings.data.val == str(tmp_path / "both" / "val") and settings.model.backbone.width == 8
    monkeypatch.chdir(tmp_path)
    same = ("--set", "data.train=both/train", "--set", "data.val=./both/val")  # the same folders, by other names
    assert polarmask("train", "--out", run, *same, "--set", "train.steps=6") == 0  # without repeating the others
    (tmp_path / "both").rename(tmp_path / "moved")
    _check_place(run, "moved/train", "moved/val")
    with pytest.raises(InputError, match=r"holds a training with data\.train="):
        _check_place(run, "moved/val", "moved/val")  # other data, which are like it
    (tmp_path / "moved").rename(tmp_path / "both")
    with pytest.raises(InputError, match=r"holds a training with data\.val="):  # where it was, it still is
        _check_place(run, "both/train", "both/train")
    rows = [row for row in csv.DictReader((run / "metrics.csv").read_text().splitlines()) if row["AP"]]
    assert [row["step"] for row in rows] == ["4", "6"]
    words = ("--data", tmp_path / "both" / "val", "--set", f"data.val={tmp_path / 'both' / 'val'}", *sets)
    assert polarmask("train", *words, "--out", tmp_path / "flattered") == 0
    assert "is what the training learns from" in capsys.readouterr().err


@pytest.mark.slow
def test_the_bar_fits_80_columns(tmp_path):
    data = make(tmp_path, size=(64, 64), side=20)
    sets = [word for setting in (*TINY[:3], "data.batch=1", "train.steps=120") for word in ("--set", setting)]
    command = [sys.executable, "-m", "polarmask_tf", "train", "--data", str(data), "--out", str(tmp_path / "run"), *sets]
    outer, inner = pty.openpty()
    fcntl.ioctl(inner, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    text = b""
    with subprocess.Popen(command, stderr=inner, stdout=inner, env=environment) as process:
        os.close(inner)
        with contextlib.suppress(OSError):  # the end of a terminal
            while chunk := os.read(outer, 65536):
                text += chunk
    os.close(outer)
    assert re.search(r"\rends about \d\d:\d\d, evaluations aside *\r", text.decode()), text[-2000:]
    bar = [line for line in text.decode().replace("\n", "\r").split("\r") if line.startswith("train ")]
    assert process.returncode == 0 and any("loss" in line for line in bar)
    assert max(map(len, bar)) <= 80


def test_a_line_tells_of_the_steps_since_the_line_before(tmp_path, capsys):
    seen: list[float] = []
    settings = config.load("shapes")
    optimizer = types.SimpleNamespace(lr=types.SimpleNamespace(numpy=lambda: 0.1))
    model = types.SimpleNamespace(config=settings, loss_names=(), optimizer=optimizer, reset_metrics=seen.clear)
    written = log.Log(tmp_path, 0, 60, True)
    written.set_model(model)
    written.on_train_begin()
    for step in range(1, 61):
        seen.append(float(step))  # the loss of the step; Keras gives the mean since it was last reset
        written.on_step(step, {"loss": np.mean(seen)})
    written.close()
    assert [(row["step"], row["loss"]) for row in written.rows] == [(20, 10.5), (40, 30.5), (60, 50.5)]
    said = capsys.readouterr().err
    assert re.search(r"^step 20/60: loss 10.500, .* min left, ends about \d\d:\d\d$", said, re.M)
    assert re.search(r"^step 60/60: loss 50.500, .* min left$", said, re.M)


def test_a_file_that_cannot_be_written_is_told_before_the_data_are_looked_at(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(init_config, "fit", lambda *_: pytest.fail("looked at"))
    assert cli.main(["init", str(tmp_path), "--out", str(tmp_path / "missing" / "my.yaml")]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_data_whose_name_is_no_utf8_are_refused(tmp_path):
    with pytest.raises(InputError, match="no name in UTF-8"):
        init_config.fit(tmp_path / os.fsdecode(b"d\xff"))
    settings = config.load("small", [])
    data = dataclasses.replace(settings.data, train=os.fsdecode(b"d\xff"))
    with pytest.raises(InputError, match="no name in UTF-8"):
        checks.check_data(dataclasses.replace(settings, data=data))
