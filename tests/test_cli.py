"""The command line's manners: quick help, quiet start, one line and exit code 2 for what is wrong."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from PIL import Image

from polarmask_tf import cli, config, console, signals
from polarmask_tf.errors import InputError, one_line

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


def test_what_tensorflow_writes_on_import_loses_its_noise_alone(tmp_path):
    (tmp_path / "tensorflow.py").write_text(
        "import os, sys\nerr = sys.stderr\n"
        "os.write(2, b'WARNING: All log messages before absl::InitializeLog() is called are written to STDERR\\n')\n"
        "os.write(2, b'I0000 00:00:1795704030.863750   27930 port.cc:153] oneDNN custom operations are on.\\n')\n"
        "os.write(2, b'E0000 00:00:1795704030.863750   27930 gpu.cc:1] no driver\\n')\n"
    )
    code = "from polarmask_tf import console\nwith console.quiet_tensorflow():\n    import tensorflow as t\nt.err.write('on')"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stderr == "E0000 00:00:1795704030.863750   27930 gpu.cc:1] no driver\non"


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


# ---- errors


def test_what_the_library_does_not_know_is_one_line_too_and_debug_shows_where(monkeypatch, capsys, tmp_path):
    def broken(*args, **kwargs):
        raise RuntimeError("one\ntwo \x1b[31mred")

    monkeypatch.setattr("polarmask_tf.tools.shapes.make_shapes", broken)
    assert cli.main(["shapes", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert (
        error == "polarmask: error: unexpected RuntimeError: one two \\x1b[31mred; run again with --debug for the traceback\n"
    )
    assert cli.main(["shapes", str(tmp_path), "--debug"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("Traceback") and any("in broken" in line for line in lines)
    assert lines[-1].startswith("polarmask: error: unexpected RuntimeError")


def test_too_little_memory_is_no_unknown_error(monkeypatch, capsys, tmp_path):
    class ResourceExhaustedError(Exception):  # as TensorFlow's, which is not loaded for it
        message = "OOM when allocating tensor with shape[8,64]\n\nmore lines"

    for error, said in (
        (MemoryError(), "not enough memory"),
        (ResourceExhaustedError(), "not enough memory (OOM when allocating tensor with shape[8,64])"),
        (ImportError("libtensorflow_cc.so.2: failed to map segment"), "a library cannot be loaded: libtensorflow_cc.so.2"),
    ):

        def broken(*args, error=error, **kwargs):
            raise error

        monkeypatch.setattr("polarmask_tf.tools.shapes.make_shapes", broken)
        assert cli.main(["shapes", str(tmp_path)]) == 2
        assert capsys.readouterr().err.startswith(f"polarmask: error: {said}")


def test_the_exit_codes_are_documented(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert all(f" {code} " in text.partition("Exit codes:")[2] for code in (0, 1, 2, 130))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["evaluate", "x", "--data", "y", "--score-threshold", "nan"], "nan is not a number from 0 to 1"),
        (["evaluate", "x", "--data", "y", "--limit", "0"], "0 is not a whole number of at least 1"),
        (["evaluate", "x", "--data", "y", "--limit", "9" * 5000], "is not a whole number of at least 1"),
        (["upper-bound", "x", "--rays", "8,x"], "x is not a whole number"),
        (["convert", "x", "y", ""], "the path is empty"),
        (["export", "x", "--out", "y", "--max-ap-drop", "inf"], "inf is not a number from 0 to 1"),
    ],
)
def test_arguments_that_no_command_can_take_are_refused(words, message, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(words)
    assert stop.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "export x --out y --serving --precision int8 --raw --data z --max-ap-drop 0",
            "--precision, --raw, --data, --max-ap-drop: of",
        ),
        ("export x --out y --serving --images z", "--images: of the files that an export without --serving writes"),
        ("export x --out y --contract model_garden", "--contract: of an export with --serving; leave it out"),
        ("export x --out y --name cells --max-pixels 9", "--name, --max-pixels: of an export with --serving; leave them out"),
        ("export x --out y --max-ap-drop 0", "--max-ap-drop: of APs, which are measured with --data; leave it out"),
        ("benchmark edge --set model.rays=72", "--set: of `benchmark train CONFIG`; leave it out"),
        ("benchmark x.tflite --data y", "--data: of `benchmark train CONFIG`"),
        ("benchmark edge --threads 4 --image x.png", "--image, --threads: of .tflite files alone"),
    ],
)
def test_options_that_nothing_would_look_at_are_refused(words, message, capsys):
    assert cli.main(words.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"polarmask: error: {message}") and error.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("plain", "plain"),
        ("a\r\n  b\n\nc\u2028d\x85", "a b c d"),
        ("a  b", "a  b"),  # a file name may have two spaces
        ("\x1b]0;title\x07\t\x00\x9b", "\\x1b]0;title\\x07\\t\\x00\\x9b"),
        ("\u202egpj.exe", "\\u202egpj.exe"),  # right to left
        ("caf\xe9 \U0001f600", "caf\xe9 \U0001f600"),
        (os.fsdecode(b"\xff.jpg"), "\\udcff.jpg"),
        (ValueError("x\ny"), "x y"),
    ],
)
def test_text_of_others_is_one_line_that_a_terminal_only_shows(text, line):
    assert one_line(text) == line == one_line(one_line(text)) == str(InputError(text))
    assert line.isprintable()


def test_of_a_long_text_the_middle_is_left_out():
    line = one_line("a" * 5000 + "b" * 5000, longest=100)
    assert line == f"{'a' * 50} ... {'b' * 50}" and len(str(InputError("x" * 10**6))) < 2100


# ---- what is printed


def run(folder, redirect, **options):
    """`polarmask convert` in a shell, its output redirected; a picture with a name that commands the terminal is skipped."""
    (folder / "images").mkdir()
    Image.new("RGB", (32, 32)).save(folder / "images" / "good.png")
    names = ["good.png", "\x1b]0;title\x07\u202e\xe9.png"]
    images = [{"id": n, "file_name": name, "height": 32, "width": 32} for n, name in enumerate(names)]
    square = {"id": 1, "image_id": 0, "category_id": 1, "iscrowd": 0, "segmentation": [[2, 2, 20, 2, 20, 20]]}
    coco = {"images": images, "annotations": [square], "categories": [{"id": 1, "name": "square"}]}
    (folder / "a.json").write_text(json.dumps(coco))
    command = f"exec {sys.executable} -m polarmask_tf convert a.json images data --processes 1 {redirect}"
    done = subprocess.run(["sh", "-c", command], cwd=folder, capture_output=True, timeout=100, **options)
    return done, (folder / "data" / "dataset.json").is_file()


@pytest.mark.parametrize("redirect", [">/dev/full", "2>/dev/full", ">/dev/full 2>&1", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_full_or_closed_output_fails_no_finished_command(tmp_path, redirect):
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full")
    done, written = run(tmp_path, redirect)
    assert done.returncode == 0 and written, done.stderr
    assert b"Traceback" not in done.stderr and b"Exception ignored" not in done.stderr
    if redirect == ">/dev/full":
        assert done.stderr.endswith(b"polarmask: warning: stdout cannot be written: No space left on device\n")
    shard = next((tmp_path / "data").glob("*.tfrecord")).read_bytes()
    assert b"images/s" not in shard  # nothing was printed into a file that got the number of a closed stdout


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_signal_leaves_nothing_half_written(tmp_path, name, request):
    """In the process itself, and as a scheduler does it."""
    before = signal.signal(signal.Signals[name], signal.SIG_DFL)  # where tests run under nohup, too
    request.addfinalizer(lambda: signal.signal(signal.Signals[name], before))
    with pytest.raises(signals.Ended) as error, signals.unwinding():
        signal.raise_signal(signal.Signals[name])
    assert error.value.code == 128 + signal.Signals[name] and signal.getsignal(signal.Signals[name]) is signal.SIG_DFL
    process = subprocess.Popen(
        [sys.executable, "-m", "polarmask_tf", "shapes", "out", "--train", "100000"], cwd=tmp_path, stderr=subprocess.PIPE
    )
    while not list(tmp_path.rglob("*.png")):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.Signals[name])
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.Signals[name]
    assert said.endswith(f"polarmask: ended by {name}\n".encode()) and b"Traceback" not in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGINT"])
def test_a_signal_ends_what_runs_also_where_a_library_hides_its_exception(name, request):
    """As NumPy does now and then, where it reads a mask of pycocotools: a TypeError about its arguments is what comes of it."""
    usual = signal.default_int_handler if name == "SIGINT" else signal.SIG_DFL
    before = signal.signal(signal.Signals[name], usual)
    request.addfinalizer(lambda: signal.signal(signal.Signals[name], before))
    with pytest.raises(KeyboardInterrupt if name == "SIGINT" else signals.Ended), signals.unwinding():
        try:
            signal.raise_signal(signal.Signals[name])
        except BaseException:
            raise TypeError("__array__() got an unexpected keyword argument 'copy'") from None
    assert signal.getsignal(signal.Signals[name]) is usual


def test_a_signal_that_nohup_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals.unwinding():
            signal.raise_signal(signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_reader_that_goes_away_fails_no_finished_command(tmp_path):
    done, written = run(tmp_path, "2>&1 | true; exit ${PIPESTATUS[0]}", executable="/bin/bash")
    assert done.returncode == 0 and written and not done.stderr
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", f"{sys.executable} -m polarmask_tf --help | true"], capture_output=True, timeout=100
    )
    assert done.returncode == 0 and not done.stderr


def test_no_control_characters_of_a_file_reach_the_terminal(tmp_path):
    done, written = run(tmp_path, "", env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0 and written, done.stderr
    assert b"skipped 1 x" in done.stdout
    for output in (done.stdout, done.stderr):
        assert not set(output) & ({*range(32), 127} - {*b"\n\r"}) and b"Traceback" not in output


def test_progress_bars_still_move_and_what_follows_a_line_start_does_not(capsys):
    with console.tolerant():
        sys.stdout.write("\rhalf\rx\x1b[2J\n")
        sys.stdout.write("\n\x1b[A")
        sys.stderr.write("a\tb\x9b\u202e")
    assert capsys.readouterr() == ("\rhalf\\rx\\x1b[2J\n\n\x1b[A", "a\tb\\x9b\\u202e")
    assert not isinstance(sys.stdout, console._Stream)
