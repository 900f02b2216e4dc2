"""scripts/benchmarks/fuzz.py sees every kind of failure, goes on after each, and finds none in what it has a small run of."""

import subprocess
import sys
from pathlib import Path

import pytest

from polarmask_tf.inference import client

FORMATS = ("labelme", "via", "labelstudio", "cvat", "yolo", "yoloyaml", "masks", "labelmap", "windows")
FOLDER = Path(__file__).resolve().parents[1] / "scripts/benchmarks"


@pytest.fixture
def fuzz(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import fuzz

    return fuzz


def test_every_kind_of_failure_is_seen(fuzz, tmp_path):
    child = fuzz.Child("self", tmp_path, seconds=2)
    said = {data: child.ask(data) for data in (b"taken", b"lines", b"bug", b"memory", b"crash", b"refused", b"hang")}
    again = child.ask(b"taken")
    child.close()
    outcomes = {data.decode(): answer["outcome"] for data, answer in said.items()}
    assert outcomes == {
        "taken": "taken",
        "refused": "refused",
        "lines": "several lines",
        "bug": "traceback",
        "memory": "traceback",
        "crash": "signal",
        "hang": "time-out",
    }
    assert "ZeroDivisionError" in said[b"bug"]["text"] and "SIGSEGV" in said[b"crash"]["text"] and again["outcome"] == "taken"
    assert "MemoryError" in said[b"memory"]["text"] and 2 <= said[b"hang"]["seconds"] < 60


def test_inputs_depend_on_their_seed_alone(fuzz, tmp_path):
    import random

    for name in ("coco", "image", "yaml", "dataset", "server", "record", *FORMATS):
        kind = fuzz.KINDS[name]
        made = [kind.mutate(random.Random(7), kind.seeds(tmp_path)[0]) for _ in range(2)]
        assert made[0] == made[1]


@pytest.mark.parametrize("name", ["coco", "image", "yaml", "dataset", "server", *FORMATS, "shipped"])
def test_valid_inputs_are_taken(fuzz, tmp_path, name, monkeypatch):
    """Else what is tried would not come further than to the first question."""
    for patience in ("TIMEOUT", "WAITS"):  # which are shortened there
        monkeypatch.setattr(client, patience, getattr(client, patience))
    kind = fuzz.KINDS[name]
    take = kind.prepare(tmp_path, tmp_path)
    assert {fuzz.outcome(take, data)["text"] for data in kind.seeds(tmp_path)} == {""}


@pytest.mark.slow
def test_a_small_run_finds_nothing(tmp_path):
    command = [sys.executable, FOLDER / "fuzz.py", "--count", "150", "--seed", "3", "--kinds", "yaml", "--out", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    cells = done.stdout.splitlines()[1].split()
    assert cells[:2] == ["yaml", "150"] and int(cells[2]) + int(cells[3]) == 150 and int(cells[3]) > 50
