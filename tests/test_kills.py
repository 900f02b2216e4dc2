"""What a kill, a damaged checkpoint or a full disk leaves is a training that goes on and ends as if nothing had happened."""

import dataclasses
import itertools
import os
import random
import resource
import shutil
import signal
import time
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import tensorflow as tf

from helpers import kills, training
from polarmask_tf import config as configs
from polarmask_tf.data import dataset
from polarmask_tf.errors import InputError
from polarmask_tf.training import callbacks, train
from polarmask_tf.weights import runs

DATA = "step-6.data-00000-of-00001"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return kills.make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def started(data):
    """The training that nobody disturbs, on its way while others are killed."""
    log = data / "alone.log"
    return kills.start(kills.command(data, data / "alone"), log), log, data / "alone"


@pytest.fixture(scope="module")
def alone(started):
    process, log, run = started
    assert process.wait(kills.LIMIT) == 0, log.read_text()
    return run


@pytest.fixture(scope="module")
def config(data):
    words = kills.command(data, data / "alone")
    settings = [word for before, word in itertools.pairwise(words) if before == "--set"]
    return configs.load("shapes", [f"data.train={data / 'train'}", *settings])


@pytest.fixture(scope="module")
def model(config):
    return train.build(config, 4)


@pytest.mark.slow
def test_kills_at_random_moments_change_nothing(data, started, request, tmp_path):
    """Three kills, or fewer on a machine that is so fast that the training ends before; benchmarks/soak_training does more."""
    run, kinds = tmp_path / "run", ("checkpoint", "evaluation")
    assert kills.round_of_kills(kills.command(data, run), run, random.Random(0), kinds, tell=print) > 0
    assert kills.differences(run, request.getfixturevalue("alone")) == []


@pytest.mark.slow
def test_a_lost_chief_ends_the_other_and_both_go_on(data, tmp_path):
    settings = (
        "train.deterministic=true",
        "train.optimizer=sgd",
        "model.backbone.norm=sync",
        "data.flip=both",
        "data.shuffle=10",
        "train.steps=12",
        "train.checkpoint_every=3",
        "model.head.convs=0",
    )
    alone, run = tmp_path / "alone", tmp_path / "run"

    def start(folder):
        return [training.start(training.command(data / "train", folder, *settings), TF_CONFIG=c) for c in cluster]

    cluster = training.cluster(2)
    for status, _, error in training.finish(*start(alone)):
        assert status == 0, error
    chief, other = start(run)  # the other one's loss is in test_distribute.py
    end = time.monotonic() + kills.LIMIT
    while kills.newest(run) < 6:
        assert chief.poll() is None and time.monotonic() < end
        time.sleep(0.001)
    moment = time.monotonic() + random.Random(1).uniform(0, 0.5)
    while time.monotonic() < moment and kills.newest(run) < 9:  # however fast: there are 3 more steps to the end
        time.sleep(0.001)
    chief.send_signal(signal.SIGKILL)
    killed, (status, _, error) = training.finish(chief, other)
    assert killed[0] == -signal.SIGKILL
    assert status == 2 and "Traceback" not in error, error
    lines = [line for line in error.splitlines() if "polarmask: error" in line]
    assert len(lines) == 1 and lines[0].startswith("polarmask: error: lost worker 0 (127.0.0.1:"), error
    assert error.rstrip().endswith(lines[0])
    found = kills.newest(run)
    (status, out, error), (worker, _, worker_error) = training.finish(*start(run))
    assert (status, worker) == (0, 0), error + worker_error
    assert 6 <= found < 12 and f"going on after step {found}" in out
    a, b = training.weights(run, 12), training.weights(alone, 12)
    assert set(a) == set(b) and [name for name in a if a[name].tobytes() != b[name].tobytes()] == []
    assert kills.metrics(run) == kills.metrics(alone) and kills.files(run) == kills.files(alone)


def fill(model, value):
    for variable in (v for v in model.optimizer.variables if v.dtype.is_floating):
        variable.assign(tf.fill(variable.shape, -float(value)))
    for variable in [*model.trainable_variables, *runs.ema_weights(model)]:
        variable.assign(tf.fill(variable.shape, float(value)))


@pytest.fixture
def run(model, tmp_path):
    """Checkpoints of the steps 3 and 6, whose weights are 3 and 6 and Adam's moments -3 and -6."""
    for step in (3, 6):
        fill(model, step)
        runs.save(model, tmp_path / "run", step)
    return tmp_path / "run"


def flip(content, at):
    return content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :]


def flip_value(content, value):
    return flip(content, content.index(np.full(8, value, np.float32).tobytes()) + 3)


DAMAGES = {
    "cut data": (DATA, lambda content: content[: len(content) // 2]),
    "no data": (DATA, None),
    "flipped weight": (DATA, lambda content: flip_value(content, 6)),
    "flipped moment": (DATA, lambda content: flip_value(content, -6)),
    "cut index": ("step-6.index", lambda content: content[: len(content) // 2]),
    "empty index": ("step-6.index", lambda content: b""),
    "flipped index": ("step-6.index", lambda content: flip(content, len(content) // 2)),
}


@pytest.mark.parametrize("name", DAMAGES)
@pytest.mark.parametrize("training", [True, False])
def test_a_damaged_checkpoint_is_skipped_with_one_line(model, run, name, training, capfd):
    file, damage = DAMAGES[name]
    path = run / "checkpoints" / file
    path.write_bytes(damage(path.read_bytes())) if damage else path.unlink()
    (run / "checkpoints" / "checkpoint").write_bytes(b"\xff\x00 no state file of TensorFlow's")
    if name == "flipped moment" and not training:  # which only a training reads
        assert runs.step_of(runs.restore(model, run)) == 6
        return
    assert runs.step_of(runs.restore(model, run, training=training)) == 3
    assert {float(value) for v in model.trainable_variables for value in np.unique(v)} == {3.0}
    out, error = capfd.readouterr()
    [line] = (out + error).splitlines()
    assert line.startswith(f"warning: {run / 'checkpoints/step-6'} cannot be read, the checkpoint before it is used")
    for path in (run / "checkpoints").glob("step-3.data*"):
        path.write_bytes(b"")
    with pytest.raises(InputError, match=r"step-3: damaged.* no older one is left; train again with --restart"):
        runs.restore(model, run, training=training)


@pytest.mark.slow
def test_a_training_goes_on_from_the_checkpoint_before(data, alone, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(alone, run)
    folder = run / "checkpoints"
    newest = folder / f"step-{kills.STEPS}.data-00000-of-00001"
    newest.write_bytes(newest.read_bytes()[:1000])
    # What kills left, of this program and of TensorFlow's own way of writing.
    for junk in (f"{runs.UNFINISHED}/step-1.index", "step-54.data-00000-of-00001", "step-66_temp/part-00000-of-00001.index"):
        (folder / junk).parent.mkdir(exist_ok=True)
        (folder / junk).write_bytes(b"junk")
    [(status, out, error)] = training.finish(training.start(kills.command(data, run)))
    assert status == 0 and f"going on after step {kills.STEPS - kills.EVERY}" in out, error
    assert error.count(f"step-{kills.STEPS} cannot be read, the checkpoint before it is used") == 1
    assert "Traceback" not in error and "could not be found" not in error
    assert kills.differences(run, alone) == []


@pytest.mark.slow
def test_no_checkpoint_left_is_one_line(data, alone, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(alone, run)
    for path in (run / "checkpoints").glob("*.index"):
        path.write_bytes(path.read_bytes()[:-100])
    [(status, out, error)] = training.finish(training.start(kills.command(data, run)))
    assert status == 2 and not out
    (line,) = error.splitlines()
    assert line.startswith("polarmask: error: ") and "train again with --restart" in line


@pytest.mark.parametrize("moves", [0, 1])
def test_a_checkpoint_counts_when_it_is_whole_and_leaves_no_rest(model, run, moves, monkeypatch):
    """A kill before the data are moved, and before the index is."""

    class Killed(BaseException):
        pass

    replace, left = os.replace, [moves]

    def killed(*paths):
        if not left[0]:
            raise Killed
        left[0] -= 1
        replace(*paths)

    fill(model, 9)
    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(Killed):
        runs.save(model, run, 9)
    monkeypatch.undo()
    fill(model, 0)
    assert runs.step_of(runs.restore(model, run, training=True)) == 6 and float(model.trainable_variables[0][0, 0, 0, 0]) == 6
    runs.save(model, run, 12)
    assert sorted(os.listdir(run / "checkpoints")) == sorted(
        f"step-{step}.{end}" for step in (6, 12) for end in ("index", "data-00000-of-00001")
    )


def test_a_checkpoint_that_could_not_be_read_does_not_outlive_the_next(model, run):
    """Else, being of a later step, it would be tried first at every start."""
    fill(model, 4)
    runs.save(model, run, 4)  # as of a training that went on from 3, since 6 was damaged
    assert [runs.step_of(path) for path in runs.checkpoints(run)] == [4, 3]


@pytest.mark.slow
def test_a_training_on_a_full_disk_ends_with_one_line(data, alone, model, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(alone, run)
    before = kills.files(run)
    limited = ["bash", "-c", 'ulimit -f 1000; exec "$@"', "bash"]  # KiB; a checkpoint has 1500
    words = kills.command(data, run, f"train.steps={kills.STEPS + 9}", "train.evaluate_every=0")
    [(status, _, error)] = training.finish(training.start([*limited, *words]))
    assert status == 2 and "Traceback" not in error, error
    lines = [line for line in error.splitlines() if "error" in line]
    wrong = f"{run / 'checkpoints'}: cannot write the checkpoint of step {kills.STEPS + kills.EVERY}: File too large"
    assert lines == [f"polarmask: error: {wrong}"]
    assert kills.files(run) == before
    assert runs.step_of(runs.restore(model, run, training=True)) == kills.STEPS
    weights = training.weights(alone, kills.STEPS)
    for index, variable in enumerate(runs.ema_weights(model)):
        np.testing.assert_array_equal(variable, weights[f"average/{index}/.ATTRIBUTES/VARIABLE_VALUE"])


@contextmanager
def files_of_at_most(size):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_checkpoint_that_does_not_fit_leaves_those_before(model, run):
    before = kills.files(run)
    fill(model, 9)
    for size in (0, 5000, 1_000_000):
        with files_of_at_most(size), pytest.raises(InputError, match=r"checkpoint of step 9: File too large$"):
            runs.save(model, run, 9)
        assert kills.files(run) == before
    assert runs.step_of(runs.restore(model, run, training=True)) == 6


@pytest.fixture
def log(tmp_path):
    log = callbacks.Log(tmp_path, 0, 100, True)
    log.set_model(SimpleNamespace(loss_names=("class",), trainable_variables=[]))
    log.on_train_begin()
    yield log
    log.close()


def test_metrics_that_cannot_be_written_are_one_line(log, tmp_path):
    log.add(20, {"loss": 1.0})
    whole = (tmp_path / "metrics.csv").read_bytes()
    again = callbacks.Log(tmp_path, 20, 100, True)
    again.set_model(log.model)
    with files_of_at_most(10), pytest.raises(InputError, match=r"metrics.csv: cannot be written: File too large$"):
        again.on_train_begin()
    again.close()
    assert (tmp_path / "metrics.csv").read_bytes() == whole and not list(tmp_path.glob(".*"))
    (tmp_path / "metrics.csv").unlink()
    (tmp_path / "metrics.csv").symlink_to("/dev/full")
    with pytest.raises(InputError, match=r"metrics.csv: cannot be written: No space left on device$"):
        log.add(40, {"loss": 1.0})


def test_events_that_cannot_be_written_are_one_line(log, tmp_path):
    log.add(20, {"loss": 1.0})
    wrong = "cannot write events for TensorBoard: File too large$"
    with files_of_at_most(1000):
        with pytest.raises(InputError, match=wrong), log.events(20):
            for number in range(50):
                tf.summary.scalar(f"number {number}", number)
        log.close()  # writes what is left: no second complaint
    with files_of_at_most(10), pytest.raises(InputError, match=wrong):
        callbacks.Log(tmp_path / "other", 0, 100, True)


def test_the_best_ap_is_the_same_after_an_interruption(config, tmp_path, monkeypatch):
    """Two equal APs: the first is the best, also where it was read back from metrics.csv."""
    saved = []
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, ema=0.0))
    model = SimpleNamespace(
        config=config, loss_names=(), trainable_variables=[], non_trainable_variables=[], stop_training=False
    )
    metrics = SimpleNamespace(values={"AP": 0.12345649, "AP50": 1 / 3, "AP75": 0.0})
    monkeypatch.setattr(callbacks, "evaluate", lambda *args, **kwargs: metrics)
    monkeypatch.setattr(runs, "save", lambda model, run, step, **kwargs: saved.append(step))
    monkeypatch.setattr(callbacks.Evaluation, "_describe_best", lambda *args: None)
    monkeypatch.setattr(callbacks.Evaluation, "_draw", lambda *args: None)
    monkeypatch.setattr(callbacks.Evaluation, "_store_thresholds", lambda *args: None)
    for step in (10, 20):
        log = callbacks.Log(tmp_path, step - 10, 100, True)
        log.set_model(model)
        log.on_train_begin()
        evaluation = callbacks.Evaluation(tmp_path, step - 10, tf.distribute.get_strategy(), log)
        evaluation.model, evaluation.predictor, evaluation.data = model, None, dataset.load(config.data.val)
        evaluation.on_step(step, None)
        log.close()
        assert log.rows == callbacks.read_metrics(tmp_path)
    assert saved == [10]


def test_an_interruption_between_the_steps_of_a_profile(tmp_path):
    profile = callbacks.Profile(tmp_path, 15, (10, 20))
    for batch in range(10):
        profile.on_train_batch_end(batch)
    assert profile.step == 25 and not os.listdir(tmp_path)


@pytest.mark.slow
def test_a_finished_training_gives_the_averages_too(config, alone, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tf.config.experimental, "enable_op_determinism", lambda: None)  # it would last for other tests
    run = tmp_path / "run"
    shutil.copytree(alone, run)
    model = train.train(config, run)
    assert "already trained" in capsys.readouterr().out
    weights = training.weights(alone, kills.STEPS)
    for index, variable in enumerate(model.trainable_variables):
        np.testing.assert_array_equal(variable, weights[f"average/{index}/.ATTRIBUTES/VARIABLE_VALUE"])
