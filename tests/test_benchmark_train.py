"""`polarmask benchmark train`: its rows and its verdict, on one device and two, and the pieces of `growth`."""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from helpers import training
from polarmask_tf import cli, config
from polarmask_tf.data import pipeline, records
from polarmask_tf.errors import InputError
from polarmask_tf.tools import benchmark_train

TINY = (
    *training.TINY,
    "model.backbone.width=4",
    "model.fpn.levels=[5]",
    "targets.ranges=[]",
    "model.backbone.norm=group",
    "model.backbone.freeze_at=5",
    "train.optimizer=sgd",
)
WHAT = ["input pipeline", "step", "both"]


def words(*settings, data=None, arguments=()):
    sets = [word for item in (*TINY, *settings) for word in ("--set", item)]
    return ["benchmark", "train", "shapes", *sets, *(["--data", str(data)] if data else []), *map(str, arguments)]


def load(*settings):
    return config.load("shapes", [*TINY, *settings])


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    assert cli.main(["shapes", str(folder / "shapes"), "--train", "12", "--val", "1", "--size", "64"]) == 0
    source = (folder / "shapes" / "train" / "annotations.json", folder / "shapes" / "train" / "images")
    assert cli.main(["convert", *map(str, source), str(folder / "train"), "--processes", "1"]) == 0
    return folder / "train"


def check(text, rows, batch, devices):
    lines = text.splitlines()
    assert f"{devices} devices x {batch // devices} images, float32" in lines[0]
    assert [line[:15].strip() for line in lines[2:5]] == WHAT == [row["what"] for row in rows]
    for line, row in zip(lines[2:5], rows, strict=True):
        speed, wall, cpu = map(float, (row["images_per_second"], row["step_ms"], row["cpu_ms"]))
        assert speed == pytest.approx(batch * 1000 / wall, rel=1e-2) and cpu > 0
        assert [float(word) for word in line[15:].split()] == pytest.approx([speed, wall, cpu], abs=0.051)
    assert "limits" in lines[5] and len(lines) == 6


def test_the_three_rows_and_a_verdict(data, tmp_path, capsys):
    table = tmp_path / "rows.csv"
    more = ("train.accumulate=2", "train.ema=0.9", f"data.cache={tmp_path / 'cache'}")
    assert cli.main(words(*more, data=data, arguments=("--repeats", 2, "--csv", table))) == 0
    with open(table, newline="") as file:
        check(capsys.readouterr().out, list(csv.DictReader(file)), 4, 1)
    assert list((tmp_path / "cache").glob("train-*/dataset.json"))


def test_two_devices_and_made_up_pictures(tmp_path):
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "polarmask_tf",
            *words(
                "train.accumulate=2",
                arguments=("--strategy", "mirrored", "--devices", 2, "--repeats", 2, "--csv", tmp_path / "rows.csv"),
            ),
        ],
        capture_output=True,
        text=True,
        cwd=training.ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        timeout=300,
    )
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    with open(tmp_path / "rows.csv", newline="") as file:
        check(done.stdout, list(csv.DictReader(file)), 4, 2)


@pytest.mark.parametrize(
    ("speeds", "verdict"),
    [
        ((90, 100, 80), "the input pipeline limits: more CPU cores"),
        ((300, 100, 70), "the step limits, and the pipeline takes its cores"),
        ((300, 100, 95), "the step limits: more devices"),
    ],
)
def test_the_bottleneck_is_named(speeds, verdict):
    rows = [
        {"what": what, "images_per_second": float(speed), "step_ms": 16e3 / speed, "cpu_ms": 1.0}
        for what, speed in zip(WHAT, speeds, strict=True)
    ]
    settings = config.load("shapes", ["data.batch=16", "train.precision=bfloat16"])
    text = benchmark_train.format_rows(rows, settings, SimpleNamespace(num_replicas_in_sync=8))
    assert "8 devices x 2 images, bfloat16" in text.splitlines()[0]
    assert text.splitlines()[-1].startswith(verdict)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (["benchmark", "train"], "polarmask benchmark train CONFIG"),
        (["benchmark", "train", "shapes", "small"], "polarmask benchmark train CONFIG"),
        (["benchmark", "train", "nothing"], "no config file 'nothing'"),
        (["benchmark", "train", "shapes", "--set", "data.bacth=3"], "did you mean data.batch"),
        (["benchmark", "train", "shapes", "--data", "/nowhere/at/all"], "/nowhere/at/all"),
        (["benchmark", "train", "shapes", "--strategy", "none", "--devices", "2"], "devices=2"),
        (words("data.cache=/dev/null/cache", "data.train=DATA"), "choose another data.cache"),
        (words("train.accumulate=4", "data.batch=6"), "not a multiple of train.accumulate"),
        (words("data.train=EMPTY"), "EMPTY"),
    ],
)
def test_a_wrong_call_is_one_line(data, tmp_path, capsys, call, message):
    empty = tmp_path / "EMPTY"
    empty.mkdir()
    call = [word.replace("=DATA", f"={data}").replace("=EMPTY", f"={empty}") for word in call]
    assert cli.main(call) == 2
    error = capsys.readouterr().err
    assert error.startswith("polarmask: error: ") and message in error and error.count("\n") == 1


def test_a_batch_that_does_not_fit_the_devices_is_refused():
    strategy = SimpleNamespace(num_replicas_in_sync=2, cluster_resolver=None)
    with pytest.raises(InputError, match=r"data\.batch is 4, 2 on each of 2 devices: not divisible by train\.accumulate"):
        benchmark_train.run(load("train.accumulate=4"), strategy)


def test_damaged_shards_are_skipped_on_request(data, tmp_path, capsys, monkeypatch):
    copy = shutil.copytree(data, tmp_path / "train")
    shard = next(copy.glob("*.tfrecord"))
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])

    def build(*_):
        raise InputError("the data have been read")

    monkeypatch.setattr(benchmark_train, "build", build)
    more = (f"data.cache={tmp_path / 'cache'}",)
    assert cli.main(words(*more, data=copy)) == 2
    assert f"error: {shard}: " in capsys.readouterr().err
    assert cli.main(words(*more, "data.damaged=skip", data=copy)) == 2
    error = capsys.readouterr().err
    assert f"warning: {shard}: " in error and error.endswith("error: the data have been read\n")


# ---- what growth is made of


def test_a_made_up_batch_is_one_of_the_pipelines(data):
    settings = load(f"data.train={data}", "data.size=[64,96]")
    info = records.load_dataset_info(data)
    images, instances = next(iter(pipeline.training_batches(info, settings).take(1)))
    made_images, made = benchmark_train.synthetic_batch(settings, 7, edges=16)
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
    asked, smaller = [], load("data.batch=2", "model.rays=8")
    monkeypatch.setattr(benchmark_train.configs, "load", lambda *args: asked.append(args) or smaller)
    found = benchmark_train._one_case(batch=2, instances=3, rays=8)
    assert asked == [("small", ["data.batch=2", "model.rays=8", "data.size=[256,320]"])]
    assert set(found) == {"cpu_ms", "peak_mb"} and found["cpu_ms"] > 0
    resident = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    assert found["peak_mb"] == pytest.approx(int(resident.split()[1]) / 1024, rel=0.05)


def test_growth_compares_with_the_first_of_a_kind(monkeypatch):
    cases = []

    def ran(command, **_):
        case = json.loads(command[-1])
        cases.append(case)
        slow = 100.0 * (len(cases) <= 13 and len(cases) % 2)  # some of the first pass
        result = {"cpu_ms": case["batch"] * 10.0 + case["instances"] + case["rays"] + slow, "peak_mb": 512.0}
        return SimpleNamespace(stdout=f"something else\n{json.dumps(result)}\n")

    monkeypatch.setattr(benchmark_train.subprocess, "run", ran)
    rows = benchmark_train.growth()
    assert cases == [{name: row[name] for name in ("batch", "instances", "rays")} for row in rows] * 2
    for what, values, fixed in (("batch", (2, 16), 46), ("instances", (1, 200), 76), ("rays", (4, 72), 50)):
        kind = [row for row in rows if row["what"] == what]
        factor = 10 if what == "batch" else 1
        assert (kind[0][what], kind[-1][what]) == values and kind[0]["ratio"] == 1
        assert kind[-1]["ratio"] == pytest.approx((fixed + factor * values[1]) / (fixed + factor * values[0]))
    lines = benchmark_train.format_growth(rows).splitlines()
    assert len(lines) == 2 + len(rows) and " ".join(lines[1].split()) == "varied batch instances rays CPU ms ratio peak MB"
    for line, row in zip(lines[2:], rows, strict=True):
        assert line.split() == [
            row["what"],
            str(row["batch"]),
            str(row["instances"]),
            str(row["rays"]),
            f"{row['cpu_ms']:.1f}",
            f"{row['ratio']:.2f}",
            "512",
        ]


def test_the_ratio_of_rays_is_of_the_second_to_the_first(monkeypatch):
    built, rates = [], []

    def build(settings, classes):
        built.append((settings.model.rays, classes))
        return SimpleNamespace(make_train_function=lambda rays=settings.model.rays: lambda _: rates.append(rays) or rays)

    monkeypatch.setattr(benchmark_train, "build", build)
    monkeypatch.setattr(benchmark_train, "_time", lambda f: (1.0, 10.0 + f()))
    assert benchmark_train.rays_ratio(load(), rays=(4, 36), steps=3) == pytest.approx(46 / 14)
    assert built == [(4, 80), (36, 80)] and rates == [4, 36] * 6  # in turns, three of them before it is timed
    monkeypatch.undo()
    assert 0.2 < benchmark_train.rays_ratio(load("data.batch=1"), rays=(4, 8), steps=3) < 5
