"""`polarmask benchmark train`: its rows and its verdict, on one device and two."""

import csv
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest

from helpers import training
from polarmask_tf import cli, config
from polarmask_tf.errors import InputError
from polarmask_tf.tools import benchmark_train

WHAT = ["input pipeline", "step", "both"]


def words(*settings, data=None, arguments=()):
    sets = [word for item in (*training.TINIEST, *settings) for word in ("--set", item)]
    return ["benchmark", "train", "shapes", *sets, *(["--data", str(data)] if data else []), *map(str, arguments)]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    assert cli.main(["shapes", str(folder / "shapes"), "--train", "12", "--val", "1", "--size", "64"]) == 0
    source = (folder / "shapes" / "train" / "annotations.json", folder / "shapes" / "train" / "images")
    assert cli.main(["convert", *map(str, source), str(folder / "train"), "--processes", "1"]) == 0
    return folder / "train"


def check(text, rows, batch, devices):
    head, columns, *lines, verdict = text.splitlines()
    assert f"{devices} devices x {batch // devices} images, float32" in head and "limits" in verdict
    assert columns.split() == ["what", "images_per_second", "step_ms", "cpu_ms"]
    assert [line[:14].strip() for line in lines] == WHAT == [row["what"] for row in rows]
    for line, row in zip(lines, rows, strict=True):
        speed, wall, cpu = map(float, (row["images_per_second"], row["step_ms"], row["cpu_ms"]))
        assert speed == pytest.approx(batch * 1000 / wall, rel=1e-2) and cpu > 0
        assert [float(word) for word in line[14:].split()] == pytest.approx([speed, wall, cpu], abs=0.051)


@pytest.mark.slow
def test_the_three_rows_and_a_verdict(data, tmp_path, capsys):
    table = tmp_path / "rows.csv"
    more = ("train.accumulate=2", "train.ema=0.9")
    assert cli.main(words(*more, data=data, arguments=("--repeats", 2, "--csv", table))) == 0
    with open(table, newline="") as file:
        check(capsys.readouterr().out, list(csv.DictReader(file)), 4, 1)


@pytest.mark.slow
def test_two_devices_and_synthetic_pictures(tmp_path):
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
    text = benchmark_train.format_training(rows, settings, SimpleNamespace(num_replicas_in_sync=8))
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
        benchmark_train.benchmark_training(training.load("train.accumulate=4"), strategy)


@pytest.mark.slow
def test_damaged_shards_are_one_line_or_skipped(data, tmp_path, capsys):
    copy = shutil.copytree(data, tmp_path / "train")
    shard = next(copy.glob("*.tfrecord"))
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    assert cli.main(words(data=copy, arguments=("--repeats", 1))) == 2
    error = capsys.readouterr().err
    assert f"error: {shard}: " in error and error.count("\n") == 1
    assert cli.main(words("data.damaged=skip", data=copy, arguments=("--repeats", 1))) == 0
    assert f"warning: {shard}: " in capsys.readouterr().err
