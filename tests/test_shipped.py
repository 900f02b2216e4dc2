"""Models that come with the package."""

import os
import shutil

import numpy as np
import pytest
from PIL import Image

import polarmask_tf as pm
from polarmask_tf import cli
from polarmask_tf.errors import InputError
from polarmask_tf.weights import runs, shipped


def polarmask(*args):
    return cli.main([str(arg) for arg in args])


def cells(side=128):
    """Bright discs on a dark ground, uint8 RGB."""
    y, x = np.mgrid[:side, :side] + 0.5
    discs = [(30, 30, 12), (80, 40, 14), (50, 95, 11), (100, 100, 13)]
    inside = np.any([(x - a) ** 2 + (y - b) ** 2 < r**2 for a, b, r in discs], axis=0)
    gray = np.where(inside, 90, 8) + np.random.default_rng(0).integers(0, 6, (side, side))
    return np.repeat(gray.astype(np.uint8)[..., None], 3, axis=2), discs


@pytest.mark.parametrize("name", shipped.names())
def test_each_is_small_and_has_a_card(name):
    folder = shipped.resolve(name)
    assert sum(path.stat().st_size for path in folder.iterdir()) < 5e6
    card = (folder / "README.md").read_text()
    assert all(word in card for word in ("Data", "AP", "Licence", "Not for"))
    config, classes = runs.read_run(folder)
    assert not config.data.train and not config.data.val and classes


@pytest.mark.slow
def test_nuclei_finds_cells_and_starts_a_training_and_is_exported(tmp_path, capsys):
    picture, discs = cells()
    predictor = pm.load_predictor("nuclei")
    found = predictor(picture).above(0.5)
    assert len(found) == len(discs)
    for x, y, radius in discs:
        polygon = found.polygons[np.argmin(np.hypot(*(found.polygons.mean(axis=1) - (x, y)).T))]
        assert np.hypot(*(polygon - (x, y)).T) == pytest.approx(radius, abs=3)
    model = pm.load_model("nuclei", max_detections=7)
    assert model.config.postprocess.max_detections == 7
    assert polarmask("export", "nuclei", "--out", tmp_path / "exported") == 0
    exported = pm.load_predictor(tmp_path / "exported" / "model.tflite")(picture).above(0.5)
    np.testing.assert_allclose(exported.polygons, found.polygons, atol=0.05)
    pm.draw_shapes(tmp_path / "drawn", train=4, val=0, size=64, kinds=("circle",), progress=False)
    train = tmp_path / "drawn" / "train"
    pm.convert_coco(train / "annotations.json", train / "images", tmp_path / "data", progress=False)
    few = [word for setting in ("train.steps=1", "data.batch=2", "data.crop=[64,64]") for word in ("--set", setting)]
    words = ("--config", "nuclei", "--data", tmp_path / "data", "--start", "nuclei", "--out", tmp_path / "run", *few)
    assert polarmask("train", *words) == 0
    assert "models/nuclei: " in (said := capsys.readouterr().out) and "anew" not in said
    Image.fromarray(picture).save(tmp_path / "cells.png")
    assert polarmask("predict", "nuclei", tmp_path / "cells.png", "--out", tmp_path / "out") == 0
    assert (tmp_path / "out" / "overlays" / "cells.png").is_file()


def test_a_path_of_the_name_wins_and_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    os.mkdir("nuclei")
    assert polarmask("predict", "nuclei", tmp_path, "--out", tmp_path / "out") == 2
    err = capsys.readouterr().err
    assert err.count("not the model that comes with polarmask_tf") == 1 and "is none of these" in err
    monkeypatch.chdir(shutil.copytree(shipped._FOLDER, tmp_path / "models"))
    runs.read_run(shipped.resolve("nuclei"))  # which resolves it again
    assert capsys.readouterr().err.count("not the model that comes with polarmask_tf") == 1


def test_an_unknown_name_is_refused_with_the_known_ones(tmp_path, capsys):
    assert polarmask("predict", "nuclie", tmp_path, "--out", tmp_path / "out") == 2
    assert "comes with polarmask_tf (nuclei)" in capsys.readouterr().err


def test_float16_round_trip_and_damage(tmp_path):
    model = pm.load_model("nuclei")
    variables = runs.named_weights(model)
    file = tmp_path / "weights.npz"
    shipped.write_weights(file, variables)
    before = {name: value.numpy() for name, value in variables.items()}
    for value in variables.values():
        value.assign(tensor := np.ones(value.shape, np.float32) * 3)
        assert (value.numpy() == tensor).all()
    shipped.assign_weights(file, variables)
    assert all((before[name] == value.numpy()).all() for name, value in variables.items())  # they were float16 already
    some = dict(list(variables.items())[1:])
    with pytest.raises(InputError, match="another model"):
        shipped.assign_weights(file, some)
    with pytest.raises(InputError, match="beyond what float16 holds"):
        shipped.write_weights(tmp_path / "large.npz", {"a": np.array([1e6], np.float32)})
    content = file.read_bytes()
    middles = [content[:at] + bytes(range(100)) + content[at + 100 :] for at in range(2000, 50_000, 7919)]  # of zlib
    for damaged in (content[:1000], b"", content[:5000] + b"\0" * 100 + content[5100:], *middles):
        file.write_bytes(damaged)
        with pytest.raises(InputError, match="damaged"):
            shipped.assign_weights(file, variables)


def test_a_copy_of_it_is_a_run_directory(tmp_path):
    copy = shutil.copytree(shipped.resolve("nuclei"), tmp_path / "run")
    assert runs.load_run(copy).classes[0]["name"] == "nucleus"
