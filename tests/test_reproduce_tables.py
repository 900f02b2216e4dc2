"""scripts/reproduce_tables: what its reduced rows set, and two of them from drawn shapes to Markdown and CSV."""

import argparse
import csv
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from polarmask_tf import config as configs
from polarmask_tf.inference.predictor import Predictor

SCRIPT = Path(__file__).resolve().parents[1] / "scripts/reproduce_tables.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("reproduce_tables", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("small", [True, False])
def test_rows_differ_in_their_options_alone(script, tmp_path, small):
    args = argparse.Namespace(small=small, set=["train.steps=7"], out=tmp_path)
    found = {row[0]: script._config(args, row[0], row[3]) for rows in script.TABLES.values() for row in rows}
    assert all(config.train.steps == 7 for config in found.values())
    widths = {config.model.backbone.width for config in found.values()}
    assert widths == ({24} if small else {64})
    assert found["table1a_rays36"] == found["table1b_polar_iou"] == found["table1c_cartesian"] == found["table1d_with_box"]
    assert [found[f"table1a_rays{n}"].model.rays for n in (18, 24, 36, 72)] == [18, 24, 36, 72]
    assert found["table1b_smooth_l1_005"].loss.ray == "smooth_l1" and found["table1b_smooth_l1_005"].loss.ray_weight == 0.05
    assert found["table1c_polar"].targets.centerness == "polar" != found["table1c_cartesian"].targets.centerness
    assert found["table1d_with_box"].model.head.box and not found["table1d_without_box"].model.head.box
    assert len({found[f"table1e_{n}"].model.backbone for n in ("r50", "r101", "x101")}) == 3
    assert len({found[f"table1f_{n}"].data.size for n in (400, 600, 800)}) == 3
    if small:
        assert found["table1a_rays36"].train.optimizer == configs.load("reduced").train.optimizer == "adamw"
    else:
        expected = configs.load("table1b_smooth_l1_030", ["train.steps=7"])
        assert found["table1b_smooth_l1_030"] == expected


def test_every_published_number_is_in_its_config(script):
    for rows in script.TABLES.values():
        for name, _, published, _ in rows:
            assert f"mask AP {published}" in configs.find(name).read_text(), name


def test_figure_6_shows_the_same_images_for_every_model(script, tmp_path):
    (tmp_path / "images").mkdir()
    for name in "abcd":
        Image.new("RGB", (60, 40), (90, 90, 90)).save(tmp_path / "images" / f"{name}.png")
    seen = []

    def predictor(name):
        def run(images):
            seen.append(name)
            box = np.float32([[5, 5, 30, 30]])
            triangle = np.float32([[(5, 5), (30, 5), (5, 30)]])
            return [{"scores": np.float32([0.9]), "classes": np.int32([0]), "boxes": box, "polygons": triangle} for _ in images]

        return Predictor("run", [{"name": "triangle", "category_id": 1}], (64, 64), 8, run)

    models = {name: predictor(name) for name in ("Smooth-L1", "Polar IoU")}
    script.compare(models, tmp_path / "images", tmp_path / "f.png", score_threshold=0.3, images=3)
    assert seen == ["Smooth-L1", "Polar IoU"] * 3
    assert Image.open(tmp_path / "f.png").width > 2 * 384


def run(*arguments):
    return subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, arguments)], capture_output=True, text=True, timeout=600, check=False
    )


@pytest.mark.slow
def test_two_rows_from_nothing_to_a_table(tmp_path):
    steps = ["--set", "train.steps=2", "--set", "train.checkpoint_every=2", "--set", "data.size=[64,64]"]
    done = run("1d", "--small", "--out", tmp_path, *steps)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = list(csv.DictReader((tmp_path / "tables.csv").open()))
    assert [(row["table"], row["row"], row["seed"]) for row in rows] == [
        ("1d", "with box branch", "0"),
        ("1d", "without box branch", "0"),
    ]
    for row, name in zip(rows, ("with", "without"), strict=True):
        measured = json.loads((tmp_path / f"runs/table1d_{name}_box_seed0/metrics.json").read_text())["values"]
        assert float(row["AP"]) == pytest.approx(measured["AP"], abs=1e-4)
    text = (tmp_path / "tables.md").read_text()
    assert "| with box branch | 27.7 |" in text and "not the paper's" in text
    # A second run finds all that it needs and trains nothing.
    again = run("1d", "--small", "--out", tmp_path, *steps)
    assert again.returncode == 0 and "trained model" not in again.stdout


def test_bad_arguments_are_one_line(tmp_path):
    for arguments, message in ((["9z"], "no table 9z"), (["1a"], "give --data and --val")):
        done = run(*arguments, "--out", tmp_path / "out")
        assert done.returncode == 2 and message in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()
