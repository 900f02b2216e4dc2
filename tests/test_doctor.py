"""What `polarmask doctor` and `polarmask configs` say."""

import configparser
import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from polarmask_tf import cli
from polarmask_tf.config import configs_dir
from polarmask_tf.tools import catalogue, doctor


@pytest.mark.slow
def test_a_sound_machine_gets_a_report_and_status_0(capsys, monkeypatch):
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert all(what in out for what in ("polarmask_tf", "tensorflow 2.", "GB free", "CPU core", "a tiny network trains"))
    assert "problem" not in out


def test_problems_are_named_and_give_status_1(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "_train_a_little", lambda: 1 / 0)
    usage = namedtuple("Usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**12, 10**12, 10**8))
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    assert cli.main(["doctor"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("problem")] == [
        next(line for line in lines if "0 GB free" in line and line.endswith("make room")),
        "problem a tiny training failed: ZeroDivisionError: division by zero",
    ]
    assert "note    not installed: pip install 'polarmask_tf[edge]', to run .tflite files" in lines
    assert "note    not installed: pip install 'polarmask_tf[garden]', for MobileNet and EfficientNetB0 backbones" in lines


def test_every_extra_is_looked_for():
    setup = configparser.ConfigParser()
    setup.read(Path(__file__).parents[1] / "setup.cfg")
    extras = set(setup["options.extras_require"]) - {"cuda", "dev"}  # the first is told where there is a GPU
    assert {extra for extra, _ in doctor._EXTRAS.values()} == extras


@pytest.mark.parametrize(
    ("capability", "level", "text"),
    [
        ((8, 9), "ok", "8.9"),
        ((8, 6), "ok", "8.6"),  # by the code for 8.0
        ((12, 0), "note", "newer than"),
        ((5, 2), "problem", "too old"),
        (None, "ok", "unknown"),
    ],
)
def test_the_generation_of_a_gpu_is_compared_with_what_tensorflow_was_built_for(capability, level, text):
    built = {"cuda_compute_capabilities": ["sm_60", "sm_70", "sm_80", "sm_89", "compute_90"]}
    finding = doctor._gpu("RTX", capability, built)
    assert finding.level == level and text in finding.text and "GPU RTX" in finding.text


def test_every_config_has_a_line_with_its_costs(capsys):
    assert cli.main(["configs"]) == 0
    out = capsys.readouterr().out
    names = [path.stem for path in configs_dir().glob("*.yaml") if "A base, not a" not in path.read_text()]
    costs = catalogue.read_costs()
    assert sorted(costs) == sorted(names) == sorted(catalogue.headers())
    for name in names:
        (line,) = (line for line in out.splitlines() if line.split()[:1] == [name])
        assert costs[name]["gmac"] in line and costs[name]["parameters_m"] in line
        assert line.endswith(catalogue.headers()[name][0])  # whole, where there is no terminal to fit


@pytest.mark.parametrize("name", ["shapes", "edge"])
def test_the_costs_are_those_that_summary_counts(name):
    from polarmask_tf import config
    from polarmask_tf.tools.summary import input_size, summarize

    settings, row = config.load(name), catalogue.read_costs()[name]
    height, width = input_size(settings.data)
    total = summarize(settings, 80, (height, width))[-1]
    assert row["input"] == f"{height}x{width}"
    assert float(row["parameters_m"]) == pytest.approx(total["parameters"] / 1e6, abs=0.051)
    assert float(row["gmac"]) == pytest.approx(total["multiply_adds"] / 1e9, abs=0.0051)
