"""SIGTERM, Ctrl-C and SIGHUP: the step is finished and saved, the printed command goes on, and the end is the same."""

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import tensorflow as tf

from helpers import kills, training
from polarmask_tf import cli
from polarmask_tf.training import callbacks, log, preemption
from polarmask_tf.training import train as train_module
from polarmask_tf.weights import runs


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return kills.make_data(tmp_path_factory.mktemp("data"))


def wait_for(condition):
    end = time.monotonic() + kills.LIMIT
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


# ---- signals


@pytest.mark.parametrize("number", preemption.SIGNALS)
def test_the_first_signal_is_noted_and_handlers_come_back(number):
    before = signal.signal(number, signal.SIG_DFL)
    try:
        with preemption.noted_signals() as signalled:
            assert signalled() == 0
            os.kill(os.getpid(), number)
            wait_for(signalled)
            assert signalled() == number
        assert signal.getsignal(number) == signal.SIG_DFL
    finally:
        signal.signal(number, before)


def test_what_was_ignored_stays_so():
    """As `nohup` and background jobs of shells have it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with preemption.noted_signals() as signalled:
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGTERM)
            wait_for(signalled)
            assert signalled() == signal.SIGTERM and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


# The main thread is where Python's handlers do not come: in C code that neither ends nor looks at signals.
BUSY = """
import hashlib
from polarmask_tf.training.preemption import noted_signals
with noted_signals() as signalled:
    print("busy", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)
"""


def test_a_second_signal_ends_at_once_wherever_the_first_finds_it():
    process = subprocess.Popen([sys.executable, "-c", BUSY], cwd=training.ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "busy\n"
        process.send_signal(signal.SIGTERM)
        time.sleep(0.5)  # so that it comes as two
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 128 + signal.SIGINT
    finally:
        process.kill()


# ---- when to stop


def steps_asked(paces, signals, monkeypatch):
    """At which steps workers of these paces (seconds a step) ask each other, and where they stop."""
    clock, asked = [0.0], []
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(preemption.replicas, "worker", lambda strategy: (0, len(paces)))
    stops = []

    def all_gather(strategy, mine):
        asked.append(strategy.step)
        return [[signals.get((worker, strategy.step), 0), pace] for worker, pace in enumerate(paces)]

    monkeypatch.setattr(preemption.replicas, "all_gather", all_gather)
    strategy = SimpleNamespace(step=0)
    stop = preemption.StopOnSignal(0, strategy, lambda: 0)
    stop.model = SimpleNamespace(stop_training=False)
    for step in range(1, 200):
        clock[0] += max(paces)
        strategy.step = step
        stop.on_train_batch_end(step)
        if stop.model.stop_training:
            stops.append(step)
            break
    return asked, stops, stop.number


def test_several_workers_ask_each_other_every_two_seconds_by_the_slowest(monkeypatch):
    asked, stops, _ = steps_asked((0.1, 0.2), {}, monkeypatch)
    assert asked[:4] == [1, 11, 21, 31] and not stops
    asked, stops, _ = steps_asked((5.0, 30.0), {}, monkeypatch)
    assert asked[:4] == [1, 2, 3, 4]
    asked, stops, _ = steps_asked((1e-5, 1e-5), {}, monkeypatch)
    assert asked == [1, 101]


def test_one_worker_that_is_told_stops_all(monkeypatch):
    assert steps_asked((0.1, 0.2), {(1, 21): 15}, monkeypatch)[1:] == ([21], 15)


# ---- whole trainings


SETTINGS = ("train.steps=60", "train.checkpoint_every=50", "train.evaluate_every=25")  # signals come between checkpoints


def resume(text):
    """The command that the line of a stopped training names, for this interpreter."""
    [line] = [line for line in text.replace("\r", "\n").splitlines() if line.startswith("polarmask: SIG")]
    told, command = line.split("; go on with: ")
    words = shlex.split(command)
    assert words[:2] == ["polarmask", "train"]
    return int(told.split()[4].rstrip(",")), [sys.executable, "-m", "polarmask_tf", *words[1:]]


@pytest.mark.slow
def test_a_training_that_was_stopped_twice_ends_as_if_it_had_not_been(data, tmp_path):
    alone, run = tmp_path / "alone", tmp_path / "the run"
    undisturbed = kills.start(kills.command(data, alone, *SETTINGS), tmp_path / "alone.log")
    words, found = kills.command(data, run, *SETTINGS), 0
    for number in (signal.SIGTERM, signal.SIGINT):
        path = tmp_path / f"{number}.log"
        process = kills.start(words, path)
        # A few steps after the first evaluation, or just after a start: there are many left on the fastest machine.
        mark = b"step 25: AP" if number == signal.SIGTERM else b"the first step"
        wait_for(lambda path=path, mark=mark: mark in path.read_bytes())
        process.send_signal(number)
        assert process.wait(kills.LIMIT) == 128 + number, path.read_text()
        text = path.read_text()
        assert "Traceback" not in text and f"polarmask: {number.name} after step " in text
        assert not found or f"going on after step {found}" in text
        step, words = resume(text)
        assert step == kills.newest(run) >= found and words[words.index("--out") + 1] == str(run)
        found = step
        words += ["--strategy", "none"]
    [(status, out, error)] = training.finish(training.start(words))
    assert status == 0 and f"going on after step {found}" in out, error
    assert undisturbed.wait(kills.LIMIT) == 0
    # But for the second checkpoint that is kept, of where it was stopped last.
    assert [difference for difference in kills.differences(run, alone) if not difference.startswith("files ")] == []
    assert runs.steps(run) == {max(found, 50), 60} and runs.steps(alone) == {50, 60}


@pytest.mark.slow
def test_workers_stop_at_the_same_step_when_one_is_told(data, tmp_path):
    run, settings = tmp_path / "run", ("train.optimizer=sgd", "model.head.convs=0", "train.steps=2000", "data.shuffle=10")
    words = training.command(data / "train", run, *settings)
    processes = [training.start(words, TF_CONFIG=text, PYTHONUNBUFFERED="1") for text in training.cluster(2)]
    wait_for(lambda: len(log.read_metrics(run)) > 0 or any(process.poll() is not None for process in processes))
    processes[1].send_signal(signal.SIGTERM)  # as where one pod is moved
    (chief, out, error), (worker, worker_out, worker_error) = training.finish(*processes)
    assert (chief, worker) == (128 + signal.SIGTERM, 128 + signal.SIGTERM), error + worker_error
    assert "Traceback" not in error + worker_error and "polarmask: SIG" not in worker_error and not worker_out
    step, _ = resume(error)
    assert [step] == sorted(runs.steps(run)) and 20 <= step < 2000
    # All go on from there, on one device too; a worker that had stopped elsewhere would have other weights.
    words = training.command(data / "train", run, *settings[:2], f"train.steps={step + 1}", settings[3])
    [(status, out, error)] = training.finish(training.start(words))
    assert status == 0 and f"going on after step {step}" in out, error


@pytest.fixture
def small(data, monkeypatch):
    """Trains in this process, which is told to stop when `state` says so."""
    state = SimpleNamespace(number=0, stop_after_save=0)
    save = callbacks.save

    def saved(model, run, step, *args, **options):
        save(model, run, step, *args, **options)
        if step == state.stop_after_save:
            state.number = int(signal.SIGTERM)

    @contextlib.contextmanager
    def noted_signals():
        yield lambda: state.number

    monkeypatch.setattr(callbacks, "save", saved)
    monkeypatch.setattr(train_module, "noted_signals", noted_signals)

    def train(run, *settings):
        quick = (*training.TINIEST, "train.steps=6", f"data.val={data / 'val'}", *settings)
        return cli.main(training.command(data / "train", run, *quick)[3:])

    state.train = train
    return state


@pytest.mark.slow
def test_a_signal_in_an_evaluation_ends_it_since_it_can_be_made_up_for(small, tmp_path, capsys):
    run, settings = tmp_path / "run", ("train.evaluate_every=3", "train.checkpoint_every=6")
    small.stop_after_save = 3
    with pytest.raises(SystemExit) as stopped:
        small.train(run, *settings)
    assert stopped.value.code == 143
    error = capsys.readouterr().err
    assert resume(error)[0] == 3 and runs.steps(run) == {3} and not any("AP" in row for row in log.read_metrics(run))
    small.number = small.stop_after_save = 0
    assert small.train(run, *settings) == 0
    assert [row["step"] for row in log.read_metrics(run) if "AP" in row] == [3, 6]
    assert "going on after step 3" in capsys.readouterr().out


def test_a_signal_at_the_last_step_leaves_the_evaluation_to_the_next_start(small, tmp_path, capsys):
    run, settings = tmp_path / "run", ("train.evaluate_every=6",)
    small.stop_after_save = 6
    with pytest.raises(preemption.Stopped):
        small.train(run, *settings)
    assert runs.steps(run) == {6} and not (run / "best").exists()
    small.number = small.stop_after_save = 0
    assert small.train(run, *settings) == 0
    assert runs.steps(run / "best") == {6}


@pytest.mark.slow
def test_a_run_that_stopped_can_be_stopped_and_gone_on_with_at_every_step(small, tmp_path):
    """One step a start: each saves once, and the last one ends it."""
    run = tmp_path / "run"
    small.number = int(signal.SIGINT)
    for step in range(1, 4):
        with pytest.raises(preemption.Stopped) as stopped:
            small.train(run, "train.steps=4")
        assert stopped.value.code == 130 and max(runs.steps(run)) == step
    small.number = 0
    assert small.train(run, "train.steps=4") == 0 and runs.steps(run) == {3, 4}
    assert (
        tf.train.load_checkpoint(runs.checkpoints(run)[0]).get_tensor("optimizer/_iterations/.ATTRIBUTES/VARIABLE_VALUE") == 4
    )
