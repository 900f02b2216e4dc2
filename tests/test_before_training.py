"""What is checked before the first step, what is never lost or deleted, and where a run directory may lie."""

import json
import os
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from helpers import training
from polarmask_tf import cli, config
from polarmask_tf.data import dataset, records
from polarmask_tf.errors import InputError
from polarmask_tf.files import lock
from polarmask_tf.inference.predictor import load_predictor
from polarmask_tf.training import callbacks, directory, log
from polarmask_tf.training import train as train_module
from polarmask_tf.weights import runs

QUICK = (
    *training.TINY,
    "model.backbone.width=4",
    "model.backbone.freeze_at=5",
    "model.fpn.levels=[5]",
    "targets.ranges=[]",
    "train.optimizer=sgd",
    "train.steps=4",
    "train.checkpoint_every=2",
)


def polarmask(*words) -> int:
    return cli.main([str(word) for word in words])


def train(data, run, *settings, arguments=(), name="shapes") -> int:
    words = [word for item in (*QUICK, *settings) for word in ("--set", item)]
    return polarmask("train", "--config", name, "--data", data, "--out", run, *words, *arguments)


def convert(folder, name, *words):
    assert polarmask("shapes", folder / "shapes" / name, "--train", 12, "--val", 4, "--size", 64, *words) == 0
    for split in ("train", "val"):
        source = (folder / "shapes" / name / split / "annotations.json", folder / "shapes" / name / split / "images")
        assert polarmask("convert", *source, folder / name / split, "--processes", 1, "--shards", 2) == 0
    return folder / name


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return convert(tmp_path_factory.mktemp("data"), "data")


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    run = tmp_path_factory.mktemp("trained") / "run"
    assert train(data / "train", run) == 0
    return run


@pytest.fixture
def run(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


def content(folder) -> dict:
    """Everything in a folder: path -> bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def one_line(capsys) -> str:
    error = capsys.readouterr().err.splitlines()
    assert len([line for line in error if line.startswith("polarmask: error: ")]) == 1, error
    assert error[-1].startswith("polarmask: error: ") and not any("Traceback" in line for line in error)
    return error[-1]


def changed_copy(data, folder, change):
    """A copy of converted data with another dataset.json."""
    shutil.copytree(data, folder)
    values = json.loads((folder / "dataset.json").read_text())
    change(values)
    (folder / "dataset.json").write_text(json.dumps(values))
    return folder


# ---- checked before anything of an earlier training is touched


def empty_run(run, folder):
    folder.mkdir()
    for name in ("config.yaml", "dataset.json"):
        shutil.copy(run / name, folder)
    return folder


def turned(values):
    values["classes"] = values["classes"][1:] + values["classes"][:1]


def only_crowds(values):
    values["num_crowd"] = values["num_instances"]


MISTAKES = {
    "start is missing": (lambda t, d, r: ("--start", t / "none"), "none: not a run directory"),
    "start has no checkpoint": (lambda t, d, r: ("--start", empty_run(r, t / "empty")), "empty: no checkpoint yet"),
    "start is no .keras file": (lambda t, d, r: ("--start", t / "none.keras"), "none.keras: no such file"),
    "start is a checkpoint that is none": (lambda t, d, r: ("--start", t / "none.pth"), "none.pth: no such file"),
    "start needs other settings": (
        lambda t, d, r: ("--start", classifier(t / "a.npz")),
        "a.npz: these weights need other settings than the config's: --set model.backbone.stem=7x7 ",
    ),
    "weights are missing": (lambda t, d, r: ("--set", f"model.backbone.weights={t / 'none.npz'}"), "none.npz: no such file"),
    "validation is missing": (lambda t, d, r: ("--set", f"data.val={t / 'none'}"), "none: no such directory"),
    "validation has other classes": (
        lambda t, d, r: ("--set", f"data.val={changed_copy(d / 'val', t / 'val', turned)}"),
        "class 0 is rectangle (category 3), in training circle (category 1), ",
    ),
    "a shard of validation is cut": (
        lambda t, d, r: ("--set", f"data.val={changed_copy(d / 'val', t / 'val', cut_shard(t / 'val'))}"),
        "2 whole records, dataset.json says 4",
    ),
    "a shard of training is cut": (
        lambda t, d, r: ("--data", changed_copy(d / "train", t / "cut", cut_shard(t / "cut"))),
        "cut: 6 whole records, dataset.json says 12",
    ),
    "no object": (
        lambda t, d, r: ("--data", changed_copy(d / "train", t / "crowds", only_crowds)),
        "12 images with only crowd regions, which training ignores",
    ),
    "profile": (lambda t, d, r: ("--profile", "3,9"), "--profile 3,9: give two of the 4 steps"),
}


def classifier(path):
    """Names of a ResNet's weights, as far as settings follow from them."""
    stages = {f"layer{stage}.0.conv{i}.weight": np.zeros((64, 64, 3, 3), np.float32) for stage in (1, 2, 3, 4) for i in (1, 2)}
    np.savez(path, **{"conv1.weight": np.zeros((64, 3, 7, 7), np.float32)}, **stages)
    return path


def cut_shard(folder):
    def cut(_):
        shard = sorted(folder.glob("*.tfrecord"))[0]
        shard.write_bytes(shard.read_bytes()[:20])

    return cut


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_costs_nothing_of_the_run_that_was_to_be_restarted(data, run, tmp_path, capsys, name):
    words, message = MISTAKES[name]
    words, before = words(tmp_path, data, run), content(run)
    assert train(data / "train", run, arguments=("--restart", *words)) == 2
    assert message in one_line(capsys)
    assert content(run) == before
    assert train(data / "train", tmp_path / "new", arguments=words) == 2
    assert not (tmp_path / "new").exists()


def test_weights_of_another_network_are_refused_before_the_restart(data, run, tmp_path, capsys):
    np.savez(tmp_path / "a.npz", **{"conv1.weight": np.zeros((4, 3, 7, 7), np.float32)})
    before = content(run)
    settings = ("model.backbone.stem=7x7", f"model.backbone.weights={tmp_path / 'a.npz'}")
    assert train(data / "train", run, *settings, arguments=("--restart",)) == 2
    assert "weights of another network" in one_line(capsys) and content(run) == before


def test_places_that_no_run_can_be_written_to(data, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "run"):
        assert train(data / "train", out) == 2
        assert f"{tmp_path / 'file'} is a file; choose another --out" in one_line(capsys)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    assert train(data / "train", tmp_path / "mine") == 2
    assert "exists and is not a run directory" in one_line(capsys)
    assert os.listdir(tmp_path / "mine") == ["notes.txt"] and (tmp_path / "file").read_text() == "mine"


def test_data_that_are_not_there_are_said_to_be_so(tmp_path, capsys):
    assert train(tmp_path / "nowhere", tmp_path / "run", "train.evaluate_every=3") == 2  # and not that data.val is missing
    assert one_line(capsys).startswith(f"polarmask: error: {tmp_path / 'nowhere'}: no such directory")


def test_a_place_that_cannot_be_written(data, capsys):
    assert train(data / "train", "/proc/run") == 2  # nor by root
    assert "/proc/run: cannot be written: " in one_line(capsys)


# ---- a restart keeps what was there until something new stands


def weights_of(run):
    return [v.numpy() for v in runs.load_run(run).variables]


@pytest.mark.slow
def test_a_restart_that_comes_to_no_checkpoint_keeps_the_run_before(data, run, capsys, monkeypatch):
    before, weights = content(run), weights_of(run)

    def fit(*_, **__):
        raise log.NotFinite("the loss is not finite", 1)

    with monkeypatch.context() as patch:
        patch.setattr(train_module.PolarMask, "fit", fit)
        for _ in range(2):  # the second attempt finds no checkpoint to set aside, and leaves what the first one kept
            assert train(data / "train", run, "train.learning_rate=0.5", arguments=("--restart",)) == 2
    out = capsys.readouterr().out
    aside = run / runs.SET_ASIDE
    assert f"{run}: --restart: starting from step 0; what was there before --restart is in {aside}" in out
    assert before.items() <= content(aside).items()
    for value, kept in zip(weights, weights_of(aside), strict=True):
        np.testing.assert_array_equal(value, kept)
    assert polarmask("evaluate", run, "--data", data / "val") == 2
    assert f"what was there before --restart is in {aside}" in one_line(capsys)

    # Starting from itself takes what was set aside, and from the first checkpoint on nothing is left of that.
    assert train(data / "train", run, "train.learning_rate=0.5", arguments=("--restart", "--start", run)) == 0
    out = capsys.readouterr().out
    assert f"starting from {aside.resolve()}: " in out and "anew" not in out
    assert not aside.exists() and runs.steps(run) == {2, 4} and "0.5" in (run / "config.yaml").read_text()


@pytest.mark.slow
def test_a_restart_from_itself(data, run, capsys, monkeypatch):
    started = {}
    begin = callbacks.Checkpoints.on_train_begin
    monkeypatch.setattr(
        callbacks.Checkpoints,
        "on_train_begin",
        lambda self, logs=None: (started.update(w=[v.numpy() for v in self.model.trainable_variables]), begin(self)),
    )
    before = [v.numpy() for v in runs.load_run(run).trainable_variables]
    assert train(data / "train", run, arguments=("--restart", "--start", run)) == 0
    assert f"starting from {run}: {len(weights_of(run)) - 10} of " in capsys.readouterr().out
    for value, kept in zip(started["w"], before, strict=True):
        np.testing.assert_array_equal(value, kept)
    assert sorted(content(run)) == [name for name in sorted(content(run)) if not name.startswith(runs.SET_ASIDE)]


@pytest.mark.parametrize("moves", range(5))
def test_a_restart_that_is_killed_while_it_moves_things_loses_nothing(data, run, moves, monkeypatch):
    class Killed(BaseException):
        pass

    (run / "best").mkdir()
    shutil.copytree(run / "checkpoints", run / "best" / "checkpoints")
    weights, info = weights_of(run), dataset.load(data / "train")
    settings = runs.read_run(run)[0]
    replace, left = os.replace, [moves]

    def killed(*paths):
        if not left[0]:
            raise Killed
        left[0] -= 1
        replace(*paths)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(Killed):
            directory.create_or_check(settings, info, run, restart=True)
    place = run if runs.checkpoints(run) else run / runs.SET_ASIDE
    for value, kept in zip(weights, weights_of(place), strict=True):
        np.testing.assert_array_equal(value, kept)
    directory.create_or_check(settings, info, run, restart=True)
    aside = run / runs.SET_ASIDE
    assert runs.steps(aside) == runs.steps(aside / "best") == {2, 4} and not runs.checkpoints(run)
    assert (aside / "metrics.csv").is_file() and not (run / "metrics.csv").exists() and not (run / "best").exists()


def test_what_a_kill_left_goes_from_the_best_as_from_the_rest(data, run):
    """A training whose best is never bettered would keep it for ever."""
    shutil.copytree(run / "checkpoints", run / "best" / "checkpoints")
    before = content(run)
    for folder in (run, run / "best"):
        (folder / "checkpoints" / runs.UNFINISHED / "0123").mkdir(parents=True)
        (folder / "checkpoints" / "step-9.data-00000-of-00001").write_bytes(b"half")
    directory.create_or_check(runs.read_run(run)[0], dataset.load(data / "train"), run, restart=False)
    assert content(run).keys() == before.keys() and not list(run.rglob(runs.UNFINISHED))


def test_a_start_without_a_checkpoint_says_so(data, run, capsys):
    shutil.rmtree(run / "checkpoints")
    assert train(data / "train", run) == 0
    assert f"{run}: no checkpoint yet: starting from step 0\n" in capsys.readouterr().out


# ---- a config.yaml that a person wrote


def test_a_config_that_the_user_wrote_is_not_overwritten(data, tmp_path, capsys):
    run, text = tmp_path / "run", "base: shapes  # mine\ntrain: {steps: 3}\n"
    run.mkdir()
    (run / "config.yaml").write_text("train:\n  steps: 3\n")
    for arguments in ((), ("--restart",)):
        assert train(data / "train", run, arguments=arguments) == 2
        assert f"{run / 'config.yaml'}: would be overwritten; move it out of {run} and give it by --config" in one_line(capsys)
        assert content(run) == {"config.yaml": b"train:\n  steps: 3\n"}
    (run / "config.yaml").write_text(text)
    assert train(data / "train", run) == 2
    assert content(run) == {"config.yaml": text.encode()}
    (run / "config.yaml").write_text(config.dump(config.load("shapes")))  # ours, of a start that came to no checkpoint
    assert train(data / "train", run) == 0


def test_a_comment_in_the_config_of_a_run_stays(data, run):
    with open(run / "config.yaml", "a") as file:
        file.write("# the one for the paper\n")
    assert train(data / "train", run) == 0
    assert (run / "config.yaml").read_text().endswith("# the one for the paper\n")
    assert train(data / "train", run, "train.steps=5") == 0  # another one to be written
    assert runs.read_run(run)[0].train.steps == 5


# ---- two trainings into one directory


def test_a_locked_directory_is_refused(data, run, capsys):
    before = content(run)
    with lock(run, "train"):
        assert train(data / "train", run, "train.steps=6") == 2
        assert str(os.getpid()) in one_line(capsys)
        assert {name: value for name, value in content(run).items() if name in before} == before
    assert train(data / "train", run, "train.steps=6") == 0 and runs.steps(run) == {4, 6}


def test_a_lock_file_makes_no_directory_foreign(data, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").write_text("left by a machine that lost power")
    assert train(data / "train", tmp_path / "run") == 0


def test_a_checkpoint_of_another_hand_stops_a_training_that_lags(data, run, capsys, monkeypatch):
    """As of a job that was started again beside one that is not dead yet, on a file system without locks."""
    step = log.Log.on_step

    def on_step(self, number, logs):
        if number == 5:
            for name in ("step-400", "step-600"):
                for path in list((run / "checkpoints").glob("step-4.*")):
                    shutil.copy(path, path.with_name(name + path.suffix))
        step(self, number, logs)

    monkeypatch.setattr(log.Log, "on_step", on_step)
    assert train(data / "train", run, "train.steps=8") == 2
    error = one_line(capsys)
    assert "the checkpoint of step 600 is not this training's: another one writes there too" in error
    assert runs.steps(run) == {2, 4, 400, 600} and not (run / "checkpoints" / runs.UNFINISHED).exists()


def test_only_known_checkpoints_are_deleted(run):
    model = runs.load_run(run)
    known = runs.steps(run)
    runs.save(model, run, 6, weights_only=True, known=known)
    assert known == {2, 4, 6} and runs.steps(run) == {4, 6}
    (run / "checkpoints" / "step-7.data-00000-of-00001").write_bytes(b"on its way, by another hand")
    (run / "checkpoints" / runs.UNFINISHED / "theirs").mkdir(parents=True)
    runs.save(model, run, 8, weights_only=True, known=known)
    assert runs.steps(run) == {6, 8}
    assert (run / "checkpoints" / "step-7.data-00000-of-00001").exists()
    assert (run / "checkpoints" / runs.UNFINISHED / "theirs").exists()


def test_what_holds_weights_alone_is_not_resumed(data, run, tmp_path, capsys):
    model = runs.load_run(run)
    runs.write_run(tmp_path / "weights", *[runs.read_run(run)[0], json.loads((run / "dataset.json").read_text())])
    runs.save(model, tmp_path / "weights", 0, weights_only=True)
    before = content(tmp_path / "weights")
    assert train(data / "train", tmp_path / "weights") == 2
    assert "holds weights alone, which no training can resume: give it to --start" in one_line(capsys)
    assert content(tmp_path / "weights") == before


# ---- an evaluation that fails


@pytest.mark.slow
def test_an_evaluation_that_fails_costs_no_checkpoint(data, tmp_path, capsys, monkeypatch):
    run, settings = tmp_path / "run", (f"data.val={data / 'val'}", "train.evaluate_every=3")

    def fail(*_, **__):
        raise InputError("the disk of the validation set is gone")

    with monkeypatch.context() as patch:
        patch.setattr(callbacks, "evaluate", fail)
        assert train(data / "train", run, *settings) == 2
    assert one_line(capsys) == "polarmask: error: the disk of the validation set is gone"
    assert runs.steps(run) == {2, 3}
    assert train(data / "train", run, *settings) == 0
    rows = [(row["step"], "AP" in row) for row in log.read_metrics(run)]
    assert rows == [(3, True), (4, False), (4, True)]  # the one that failed was made up for first

    # Of a training that had come to its end nothing but the evaluation is left to do.
    text = (run / "metrics.csv").read_text().splitlines(keepends=True)
    (run / "metrics.csv").write_text("".join(text[:-1]))
    assert train(data / "train", run, *settings) == 0
    assert log.read_metrics(run)[-1]["step"] == 4 and "AP" in log.read_metrics(run)[-1]
    assert train(data / "train", run, *settings) == 0
    assert "already trained for 4 steps" in capsys.readouterr().out


# ---- data


def test_validation_without_objects_is_said(data, tmp_path, capsys):
    val = changed_copy(data / "val", tmp_path / "val", only_crowds)
    crowds = json.loads((val / "dataset.json").read_text())["num_crowd"]
    assert train(data / "train", tmp_path / "run", f"data.val={val}") == 0
    assert f"warning: {val}: no object but {crowds} crowd regions in 4 images: every AP will be -1" in capsys.readouterr().err


@pytest.mark.slow
def test_objects_beyond_max_instances_are_said(data, tmp_path, capsys):
    most = json.loads((data / "train" / "dataset.json").read_text())["max_instances"]
    assert most > 1
    assert train(data / "train", tmp_path / "run", "data.max_instances=1") == 0
    line = next(line for line in capsys.readouterr().err.splitlines() if "max_instances" in line)
    truth = records.read_ground_truth(data / "train")
    counts = Counter(annotation["image_id"] for annotation in truth["annotations"])
    images, objects = sum(count > 1 for count in counts.values()), sum(count - 1 for count in counts.values())
    assert line == (
        f"warning: {data / 'train'}: {objects} of {sum(counts.values())} objects, in {images} images, exceed "
        f"data.max_instances (1) and are ignored; set data.max_instances={most} to learn from all"
    )
    assert train(data / "train", tmp_path / "all", f"data.max_instances={most}") == 0
    assert "max_instances" not in capsys.readouterr().err


@pytest.mark.slow
def test_data_that_was_converted_again_is_said(data, run, tmp_path, capsys):
    again = changed_copy(data / "train", tmp_path / "again", lambda values: None)
    shutil.rmtree(run)
    assert train(again, run) == 0
    assert train(again, run, "train.steps=5") == 0
    assert "converted again" not in capsys.readouterr().err
    source = (data.parent / "shapes/data/train/annotations.json", data.parent / "shapes/data/train/images")
    assert polarmask("convert", *source, again, "--processes", 1, "--shards", 2) == 0
    assert train(again, run, "train.steps=6") == 0
    assert f"warning: {run}: {again} was converted again since" in capsys.readouterr().err


@pytest.mark.slow
def test_validation_data_that_are_converted_again_end_a_training(data, tmp_path, capsys, monkeypatch):
    """Else `best` would be chosen by AP of two sets of pictures, and nobody would know."""
    val = changed_copy(data / "val", tmp_path / "val", lambda values: None)
    run, settings, draw = tmp_path / "run", (f"data.val={val}", "train.evaluate_every=1"), callbacks.Evaluation._draw
    source = (data.parent / "shapes/data/val/annotations.json", data.parent / "shapes/data/val/images")

    def draw_and_convert(*given):
        draw(*given)
        assert polarmask("convert", *source, val, "--processes", 1) == 0

    with monkeypatch.context() as patch:
        patch.setattr(callbacks.Evaluation, "_draw", draw_and_convert)
        assert train(data / "train", run, *settings) == 2
    assert one_line(capsys).startswith(f"polarmask: error: {val}: was converted again while it was in use")
    assert [row["step"] for row in log.read_metrics(run) if "AP" in row] == [1] and runs.steps(run) == {1, 2}
    assert train(data / "train", run, *settings) == 0
    assert f"warning: {run}: {val} was converted again since: AP is of other pictures" in capsys.readouterr().err


# ---- paths that TensorFlow takes for patterns


@pytest.mark.slow
def test_a_run_may_lie_anywhere(data, tmp_path, capsys):
    run = tmp_path / "a[1] b\\c [x]*?" / "run"
    settings = (f"data.val={data / 'val'}", "train.evaluate_every=4")
    assert train(data / "train", run, *settings) == 0
    assert train(data / "train", run, *settings, "train.steps=6") == 0
    assert f"{run}: going on after step 4" in capsys.readouterr().out
    for each in (run, run / "best"):
        assert load_predictor(each, score_threshold=0.0)([np.zeros((64, 64, 3), np.uint8)])[0].polygons.shape[1:] == (12, 2)
    assert train(data / "train", tmp_path / "next", arguments=("--start", run)) == 0
    out = capsys.readouterr().out
    assert f"starting from {run}: " in out and "anew" not in out


def test_a_good_run_that_cannot_be_read_is_not_to_be_deleted(run, monkeypatch):
    def denied(path):
        raise tf.errors.PermissionDeniedError(None, None, f"{path}; Permission denied")

    monkeypatch.setattr(tf.train, "load_checkpoint", denied)
    with pytest.raises(InputError, match=r"step-2: cannot be read, and no older one is left .*Permission denied") as error:
        runs.load_run(run)
    assert "restart" not in str(error.value)
    monkeypatch.undo()
    values = json.loads((run / "dataset.json").read_text())
    (run / "dataset.json").write_text(json.dumps({**values, "classes": values["classes"][:2]}))
    with pytest.raises(
        InputError, match=r"step-2: is of another model than config\.yaml and dataset\.json beside it say"
    ) as error:
        runs.load_run(run)
    assert "restart" not in str(error.value)


@pytest.mark.parametrize("text", [b"", b"{}", b'{"classes": 3}', b'{"classes": [{"name": "a"}]}', b"[" * 10**5, b"\xff"])
def test_a_broken_list_of_classes_is_one_line(run, text):
    (run / "dataset.json").write_bytes(text)
    with pytest.raises(InputError, match=r"dataset\.json: damaged .*; copy dataset\.json from the training data"):
        runs.load_run(Path(run))
