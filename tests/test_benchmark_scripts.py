"""scripts/benchmarks: each starts, and what growth.py and steps.py are made of runs; the numbers belong to no test."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from benchmarks import growth, steps

from helpers import training
from polarmask_tf.data import dataset, pipeline
from polarmask_tf.tools import benchmark, benchmark_train

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts" / "benchmarks"


@pytest.mark.parametrize("script", sorted(path.name for path in SCRIPTS.glob("*.py") if not path.name.startswith("fuzz_")))
def test_every_script_starts(script):
    command = [sys.executable, str(SCRIPTS / script), "--help"]
    environment = {**os.environ, "PYTHONPATH": str(SCRIPTS.parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=SCRIPTS, timeout=120)
    assert done.returncode == 0 and done.stdout.startswith("usage: "), done.stderr


@pytest.mark.parametrize(
    ("part", "arguments", "units"),
    [
        (steps.target_steps, (1,), ["ms", "ms"]),
        (steps.pipeline_steps, (1,), ["images/s/core", "images/s/core", "ms"]),
        (steps.convert_steps, (6,), ["images/s/core", "images/s/core"]),
        (steps.rle_steps, (1,), ["ms"]),
        (steps.evaluation_steps, (4, 3), ["times"]),
    ],
)
def test_every_part_gives_rows(part, arguments, units):
    rows = part(*arguments)
    assert [row["unit"] for row in rows] == units
    assert all(row["value"] > 0 and row["what"] for row in rows)


def test_the_scene_has_about_as_many_positives_as_the_released_codes():
    assert "111 positives" in steps.target_steps(1)[0]["what"]  # 108 there


# ---- growth


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    from polarmask_tf.data.convert import convert

    folder = tmp_path_factory.mktemp("data")
    return convert(
        benchmark_train.synthetic_data(folder, 8, 3), folder, folder / "train", processes=1, progress=False
    ).directory


def test_a_synthetic_batch_is_like_one_of_the_pipelines(data):
    settings = training.load(f"data.train={data}", "data.size=[64,96]")
    info = dataset.load(data)
    images, instances = next(iter(pipeline.training_batches(info, settings).take(1)))
    made_images, made = growth.synthetic_batch(settings, 7, edges=16)
    assert (made_images.shape, made_images.dtype) == (images.shape, np.uint8)
    assert set(made) == set(instances)
    for name, value in instances.items():
        assert made[name].dtype == value.dtype and made[name].ndim == value.shape.rank, name
        assert made[name].shape[0] == 4 and (name in ("window", "ignore") or made[name].shape[1] == 7)
    assert made["ignore"].shape == instances["ignore"].shape
    np.testing.assert_array_equal(made["window"], [[96, 64]] * 4)
    # Round objects: every vertex is as far from the center as the sides of the box are.
    reach = np.linalg.norm(made["edges"][..., :2] - made["centers"][:, :, None], axis=-1)
    sides = (made["boxes"][..., 2:] - made["boxes"][..., :2]) / 2
    np.testing.assert_allclose(reach, np.broadcast_to(sides[..., :1], reach.shape), rtol=1e-3)
    np.testing.assert_array_equal(made["edges"][..., 2:], np.roll(made["edges"][..., :2], -1, axis=2))


def test_a_case_of_growth(monkeypatch):
    asked, smaller = [], training.load("data.batch=2", "model.rays=8")
    monkeypatch.setattr(growth.configs, "load", lambda *args: asked.append(args) or smaller)
    found = growth.one_case(batch=2, instances=3, rays=8)
    assert asked == [("small", ["data.batch=2", "model.rays=8", "data.size=[256,320]"])]
    assert set(found) == {"cpu_ms", "peak_mb"} and found["cpu_ms"] > 0
    resident = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    assert found["peak_mb"] == pytest.approx(int(resident.split()[1]) / 1024, rel=0.05)


def test_growth_compares_with_the_first_of_a_kind(tmp_path, monkeypatch, capsys):
    cases = []

    def ran(command, **_):
        case = json.loads(command[-1])
        cases.append(case)
        slow = 100.0 * (len(cases) <= 13 and len(cases) % 2)  # some of the first pass
        result = {"cpu_ms": case["batch"] * 10.0 + case["instances"] + case["rays"] + slow, "peak_mb": 512.0}
        return SimpleNamespace(stdout=f"something else\n{json.dumps(result)}\n")

    monkeypatch.setattr(growth.subprocess, "run", ran)
    monkeypatch.setattr(growth, "rays_ratio", lambda config: 1.25)
    monkeypatch.setattr(sys, "argv", ["growth.py", "--csv", str(tmp_path / "growth.csv")])
    assert growth.main() == 0
    with open(tmp_path / "growth.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert cases == [{name: int(row[name]) for name in ("batch", "instances", "rays")} for row in rows] * 2
    for what, values, fixed in (("batch", (2, 16), 46), ("instances", (1, 200), 76), ("rays", (4, 72), 50)):
        kind = [row for row in rows if row["what"] == what]
        factor = 10 if what == "batch" else 1
        assert (int(kind[0][what]), int(kind[-1][what])) == values and float(kind[0]["ratio"]) == 1
        expected = (fixed + factor * values[1]) / (fixed + factor * values[0])
        assert float(kind[-1]["ratio"]) == pytest.approx(expected, abs=1e-3)
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["what", "batch", "instances", "rays", "cpu_ms", "ratio", "peak_mb"]
    assert lines[2].split() == ["batch", "2", "10", "36", "66.0", "1.00", "512"] and len(lines) == 3 + len(rows)
    assert lines[-1] == "the paper's network with 36 rays relative to 4, in turns: 1.250 of the CPU time"


@pytest.mark.slow
def test_the_ratio_of_rays_is_of_the_second_to_the_first(monkeypatch):
    built = []
    monkeypatch.setattr(growth, "step", lambda settings, instances: built.append((settings.model.rays, instances)))
    monkeypatch.setattr(benchmark, "in_turns", lambda calls, steps: np.array([[[9, 10], [9, 20]], [[9, 10], [9, 15]]] * steps))
    assert growth.rays_ratio(training.load(), rays=(4, 36), steps=3) == pytest.approx(1.75)
    assert built == [(4, 10), (36, 10)]
    monkeypatch.undo()
    assert 0.2 < growth.rays_ratio(training.load("data.batch=1"), rays=(4, 8), steps=3) < 5
