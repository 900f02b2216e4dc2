"""The command line's manners: quick help, quiet start, one line and exit code 2 for what is wrong."""

import os
import subprocess
import sys

import pytest

from polarmask_tf import cli, config

COMMANDS = ("shapes", "convert", "train", "evaluate", "predict", "export")


def test_help_loads_no_tensorflow():
    code = (
        "import sys, polarmask_tf, polarmask_tf.config, polarmask_tf.errors\nfrom polarmask_tf import cli\n"
        "try: cli.main(['--help'])\nexcept SystemExit: pass\n"
        "assert not [m for m in sys.modules if m.split('.')[0] in ('tensorflow', 'tf_keras', 'keras')]"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(command in done.stdout for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    assert stop.value.code == 0
    assert "usage: polarmask " + command in capsys.readouterr().out


def test_start_up_noise_does_not_reach_the_user():
    env = {k: v for k, v in os.environ.items() if k != "TF_CPP_MIN_LOG_LEVEL"}
    command = [sys.executable, "-m", "polarmask_tf", "train", "--config", "shapes", "--data", "nowhere", "--out", "nowhere"]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 2
    assert done.stderr.startswith("polarmask: error: ") and len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--config", "nothing", "--out", "x"], "no config file 'nothing'"),
        (["train", "--config", "shapes", "--out", "x", "--set", "train.stps=1"], "did you mean train.steps?"),
        (["train", "--config", "shapes", "--out", "x", "--set", "train.steps"], "write it as key=value"),
        (["train", "--config", "shapes", "--out", "x"], "no training data: give --data"),
        (["train", "--config", "shapes", "--out", "x", "--data", "nowhere"], "nowhere"),
        (["evaluate", "nowhere", "--data", "nowhere"], "nowhere"),
        (["export", "nowhere", "--out", "x"], "nowhere"),
        (["predict", "nowhere", "nowhere", "--out", "x"], "nowhere"),
        (["convert", "nowhere.json", "nowhere", "x"], "nowhere"),
        (["shapes", "x", "--size", "1"], "size"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("polarmask: error: ") and len(error.splitlines()) == 1
    assert message in error
    assert not list(tmp_path.iterdir())  # nothing half-written


def test_the_entry_point_and_the_shipped_configs_are_found_from_anywhere(tmp_path):
    done = subprocess.run([sys.executable, "-m", "polarmask_tf", "--version"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert config.find("shapes").is_file()
