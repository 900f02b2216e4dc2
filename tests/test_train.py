"""`polarmask train` in this process: averages, evaluation inside, what it writes, how it goes on, and how it stops."""

import contextlib
import csv
import io
import itertools
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tensorflow as tf

from helpers import training
from polarmask_tf import cli, config
from polarmask_tf.data import dataset, pipeline, records
from polarmask_tf.errors import InputError
from polarmask_tf.inference.evaluate import evaluate
from polarmask_tf.inference.predict import predict
from polarmask_tf.inference.predictor import Detections, load_predictor
from polarmask_tf.training import callbacks, directory
from polarmask_tf.training import log as logs
from polarmask_tf.training import train as train_module
from polarmask_tf.weights import runs

pytestmark = pytest.mark.slow

TINY = (*training.TINY, "model.backbone.width=4")
QUICK = (  # where nothing depends on the network: half the time until the first step
    "model.backbone.freeze_at=5",
    "model.fpn.levels=[5]",
    "targets.ranges=[]",
    "train.optimizer=sgd",
)
EMA, EVERY, STEPS = 0.8, 12, 24


def polarmask(*words) -> int:
    return cli.main([str(word) for word in words])


def train(data, run, *settings, arguments=()) -> int:
    words = [word for item in (*TINY, *settings) for word in ("--set", item)]
    return polarmask("train", "--config", "shapes", "--data", data, "--out", run, *words, *arguments)


def finite(path: str) -> bool:
    """Whether all numbers in a checkpoint are."""
    reader = tf.train.load_checkpoint(path)
    values = [reader.get_tensor(name) for name in reader.get_variable_to_shape_map() if "OBJECT_GRAPH" not in name]
    assert len(values) > 20
    return all(np.isfinite(value).all() for value in values)


def log_rows(run):
    with open(run / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def spy(patch) -> dict:
    """{step: (loss, weights)} of the trainings to come; losses are means since the last checkpoint, the weights are raw."""
    steps, begin, step = {}, logs.Log.on_train_begin, logs.Log.on_step

    def keep(log, number, loss):
        steps[number] = loss, [v.numpy() for v in log.model.trainable_variables]

    def on_train_begin(log, logs=None):
        keep(log, log.step, None)
        begin(log, logs)

    def on_step(log, number, logs):
        keep(log, number, float(logs["loss"]))
        step(log, number, logs)

    patch.setattr(logs.Log, "on_train_begin", on_train_begin)
    patch.setattr(logs.Log, "on_step", on_step)
    return steps


@pytest.fixture
def seen(monkeypatch):
    return spy(monkeypatch)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    assert polarmask("shapes", folder / "shapes", "--train", 24, "--val", 6, "--size", 64) == 0
    for split in ("train", "val"):
        source = (folder / "shapes" / split / "annotations.json", folder / "shapes" / split / "images")
        assert polarmask("convert", *source, folder / split, "--processes", 1, "--shards", 3) == 0
    return folder


def full_settings(data):
    return (
        f"data.val={data / 'val'}",
        "data.sizes=[[64,64],[32,64]]",
        "train.accumulate=2",
        f"train.ema={EMA}",
        f"train.steps={STEPS}",
        "train.checkpoint_every=8",
        f"train.evaluate_every={EVERY}",
        "model.backbone.norm=group",
    )


@pytest.fixture(scope="module")
def straight(data, tmp_path_factory):
    """A training with everything switched on: (run, steps)."""
    run = tmp_path_factory.mktemp("straight") / "run"
    with pytest.MonkeyPatch.context() as patch:
        steps = spy(patch)
        assert train(data / "train", run, *full_settings(data), arguments=("--profile", "2,4")) == 0
    return run, steps


def averages_of(steps, until):
    """The running averages by numpy, over the weights of each step."""
    averages = [value.astype(np.float64) for value in steps[0][1]]
    for step in range(1, until + 1):
        kept = min(EMA, step / (9 + step))  # a short training's averages forget its first weights
        averages = [kept * a + (1 - kept) * w for a, w in zip(averages, steps[step][1], strict=True)]
    return averages


def assert_close(found, expected, tolerance=1e-5):
    for a, b in zip(found, expected, strict=True):
        assert np.linalg.norm(a - b) <= tolerance * max(np.linalg.norm(b), 1e-3)


# ---- averages, evaluation, going on


def test_the_weights_of_a_run_are_their_averages(straight):
    run, steps = straight
    assert sorted(steps) == list(range(STEPS + 1))
    expected = averages_of(steps, STEPS)
    assert_close([v.numpy() for v in runs.load_run(run).trainable_variables], expected)
    apart = [np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-3) for a, b in zip(expected, steps[STEPS][1], strict=True)]
    assert np.median(apart) > 1e-3  # the weights of the last step are others
    model = train_module.build(*runs.read_run(run))
    assert runs.restore(model, run, training=True).endswith(f"step-{STEPS}")
    assert_close([v.numpy() for v in model.trainable_variables], steps[STEPS][1], 0)  # from which it would go on
    assert_close([v.numpy() for v in runs.ema_weights(model)], expected)
    assert int(model.optimizer.iterations) == STEPS


def test_the_best_is_a_run_of_averaged_weights_that_every_command_takes(straight, data, tmp_path):
    run, steps = straight
    evaluated = {int(row["step"]): row for row in log_rows(run) if row["AP"]}
    assert sorted(evaluated) == [EVERY, STEPS]
    best = max(evaluated, key=lambda step: (float(evaluated[step]["AP"]), -step))
    assert [Path(path).name for path in runs.checkpoints(run / "best")] == [f"step-{best}"]
    assert_close([v.numpy() for v in runs.load_run(run / "best").trainable_variables], averages_of(steps, best))

    predictor = load_predictor(run / "best")  # as `evaluate` and `predict` do
    again, kept = evaluate(predictor, data / "val"), json.loads((run / "best" / "metrics.json").read_text())
    assert kept["step"] == best and kept["detections"] == again.detections > 0
    for name in ("AP", "AP50", "AP75"):
        assert float(evaluated[best][name]) == pytest.approx(again.values[name], abs=1e-6)
    assert again.values["AR100"] > 0
    assert predict(predictor, data / "shapes" / "val" / "images", tmp_path / "found", score_threshold=0.0)["detections"] > 0
    assert polarmask("export", run / "best", "--out", tmp_path / "export") == 0
    assert (tmp_path / "export" / "model.tflite").stat().st_size > 1e4


@pytest.fixture(scope="module")
def resumed(straight, data, tmp_path_factory):
    """The same training as if it had been killed after step 17, and started again: (run, steps, what it printed)."""
    run = shutil.copytree(straight[0], tmp_path_factory.mktemp("resumed") / "run")
    for file in (run / "checkpoints").glob(f"step-{STEPS}.*"):
        file.unlink()
    shutil.rmtree(run / "plugins")
    with open(run / "metrics.csv", "a") as file:
        file.write("24,0.")  # the kill came while a line was written
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        steps = spy(patch)
        assert train(data / "train", run, *full_settings(data), arguments=("--profile", "2,4")) == 0
    return run, steps, printed.getvalue()


def test_going_on_equals_training_without_a_break(straight, resumed):
    """Several sizes, parts, averages: from step 16, which the checkpoint holds with the weights as they were trained."""
    assert "going on after step 16" in resumed[2]
    assert sorted(resumed[1]) == list(range(16, STEPS + 1))
    assert_close(resumed[1][16][1], straight[1][16][1], 0)
    one, other = training.weights(straight[0], STEPS), training.weights(resumed[0], STEPS)
    assert set(one) == set(other) and any(name.startswith("average/") for name in one)
    assert_close([other[name] for name in one], [one[name] for name in one], 1e-3)
    weights = [name for name in one if name.startswith(("backbone/", "decoder/", "head/"))]
    assert len(weights) > 30
    assert_close([other[name] for name in weights], [one[name] for name in weights], 1e-4)
    rows, others = log_rows(straight[0]), log_rows(resumed[0])
    assert [row["step"] for row in rows] == [row["step"] for row in others]
    for row, same in zip(rows, others, strict=True):
        for name in ("loss", "class", "ray", "centerness", "learning_rate"):
            assert float(row[name] or 0) == pytest.approx(float(same[name] or 0), rel=1e-3)


def test_a_profile_that_is_past_is_told(resumed):
    assert "no profile, since step 2 has been trained before" in resumed[2]
    assert not (resumed[0] / "plugins").exists()


def test_a_finished_run_gives_its_averages_to_python_too(straight, data):
    run, steps = straight
    settings = config.load("shapes", [*TINY, f"data.train={data / 'train'}", *full_settings(data)])
    model = train_module.train(settings, run)
    assert_close([v.numpy() for v in model.trainable_variables], averages_of(steps, STEPS))


# ---- what is written


def test_the_metrics_are_a_table(straight):
    rows = log_rows(straight[0])
    assert list(rows[0]) == [
        "step",
        "loss",
        "class",
        "ray",
        "centerness",
        "mask",
        "learning_rate",
        "images_per_second",
        "AP",
        "AP50",
        "AP75",
    ]
    trained = {int(row["step"]): row for row in rows if row["loss"]}
    assert sorted(trained) == [20, STEPS] and sorted({int(row["step"]) for row in rows}) == [EVERY, 20, STEPS]
    for step, row in trained.items():
        numbers = {name: float(row[name]) for name in ("loss", "class", "ray", "centerness", "mask")}
        parts = numbers["class"] + 2 * numbers["ray"] + numbers["centerness"] + 2 * numbers["mask"]  # weights of shapes.yaml
        assert numbers["loss"] == pytest.approx(parts, rel=1e-4)
        assert numbers["loss"] == pytest.approx(straight[1][step][0], rel=1e-5)
        rate = 0.004 * (1 / 3 + 2 / 3 * (step - 1) / 50)  # of configs/shapes.yaml, in its warm-up; the first step is 0
        assert float(row["learning_rate"]) == pytest.approx(rate, rel=1e-5)
        assert float(row["images_per_second"]) > 0
    assert [int(row["step"]) for row in logs.read_metrics(straight[0])] == [int(row["step"]) for row in rows]


def events(run):
    """{tag: {step: tensor}} of the newest event file."""
    found = {}
    for path in sorted(run.glob("events.out.tfevents.*"))[-1:]:
        for record in tf.data.TFRecordDataset(str(path)):
            event = tf.compat.v1.Event.FromString(record.numpy())
            for value in event.summary.value:
                found.setdefault(value.tag, {})[event.step] = tf.make_ndarray(value.tensor)
    return found


def test_tensorboard_gets_scalars_and_pictures(straight):
    run, rows = straight[0], log_rows(straight[0])
    found = events(run)
    for name in ("loss", "class", "ray", "centerness", "learning_rate", "AP", "AP50", "AP75"):
        expected = {int(row["step"]): float(row[name]) for row in rows if row[name]}
        assert len(expected) == 2
        assert {step: float(value) for step, value in found[name].items()} == pytest.approx(expected, rel=1e-5)
    assert sorted(found["validation"]) == [EVERY, STEPS]
    width, height, png = found["validation"][STEPS]
    image = tf.io.decode_png(png).numpy()
    assert image.shape == (int(height), int(width), 3)
    # Four pictures of 64 pixels, truth and prediction side by side.
    assert image.shape[0] >= 4 * 64 or image.shape[1] >= 4 * 64
    assert len(np.unique(image.astype(int) @ [1, 256, 65536])) > 1000


def test_the_pictures_show_truth_beside_prediction(straight, data, tmp_path):
    """Drawn once with nothing found and once with the truth's boxes found: the two differ in the right halves alone."""
    settings, classes = runs.read_run(straight[0])
    truth = records.read_ground_truth(data / "val")
    boxes = {i["id"]: [a["bbox"] for a in truth["annotations"] if a["image_id"] == i["id"]] for i in truth["images"]}

    def found(score):
        def one(number):
            corners = [[[x, y], [x + w, y], [x + w, y + h], [x, y + h]] for x, y, w, h in boxes[number]]
            polygons = np.float32(corners).reshape(-1, 4, 2)
            return Detections(np.full(len(corners), score), np.zeros(len(corners), np.int32), polygons[:, 0], polygons)

        ids = [image_id for image_id, _ in itertools.islice(records.iter_images(data / "val"), callbacks.PICTURES)]
        return lambda images: [one(image_id) for image_id, _ in zip(ids, images, strict=True)]

    pictures = []
    for score in (0.1, 0.9):  # below and above what is drawn
        log = logs.Log(tmp_path / str(score), 0, 9, chief=True)
        evaluation = callbacks.Evaluation(tmp_path, 0, tf.distribute.get_strategy(), log)
        evaluation.model, evaluation.predictor = SimpleNamespace(config=settings, classes=classes), found(score)
        evaluation.data = dataset.load(settings.data.val)
        evaluation._draw(3)
        log.close()
        pictures.append(tf.io.decode_png(events(tmp_path / str(score))["validation"][3][2]).numpy().astype(int))
    changed = np.abs(pictures[0] - pictures[1]).max(-1) > 0
    columns = np.flatnonzero(changed.any(0)) / changed.shape[1]
    assert 0.02 < changed.mean() < 0.3
    # Two pairs stand side by side, each of truth and prediction.
    assert ((columns > 0.25) & (columns < 0.5) | (columns > 0.75)).mean() > 0.9


def test_a_profile_is_written_on_request(straight):
    assert list((straight[0] / "plugins" / "profile").glob("*/*"))


@pytest.mark.parametrize("steps", ["4", "4,2", "2,4,6", "2,400"])
def test_a_wrong_profile_is_one_line(data, tmp_path, capsys, steps):
    assert train(data / "train", tmp_path / "run", "train.steps=8", arguments=(f"--profile={steps}",)) == 2
    error = capsys.readouterr().err
    assert error.startswith("polarmask: error: --profile") and error.count("\n") == 1
    with pytest.raises(InputError, match="--profile 0,2: give two of the 1600 steps"):
        train_module.train(config.load("shapes"), tmp_path / "run", profile=(0, 2))
    assert not (tmp_path / "run").exists()


def test_a_profile_ends_with_the_training(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(tf.profiler.experimental, "start", lambda folder: calls.append(folder))
    monkeypatch.setattr(tf.profiler.experimental, "stop", lambda: calls.append("stop"))
    for until, expected in ((1, []), (5, [str(tmp_path), "stop"]), (9, [str(tmp_path), "stop"])):
        profile = callbacks.Profile(tmp_path, 0, (2, 7))
        calls.clear()
        for batch in range(until):
            profile.on_train_batch_end(batch)
        profile.on_train_end()
        assert calls == expected


# ---- stopping


def test_patience_by_hand():
    assert not logs.patience_exhausted([], 2) and not logs.patience_exhausted([0.3, 0.2, 0.1], 0)
    history = [0.1, 0.2, 0.2, 0.15, 0.3, 0.3, 0.3]
    assert [logs.patience_exhausted(history[:n], 2) for n in range(1, 8)] == [False, False, False, True, False, False, True]
    assert [logs.patience_exhausted([-1.0] * n, 1) for n in (1, 2)] == [False, True]


def test_a_training_without_progress_stops_early(data, tmp_path, capsys, seen):
    """At a learning rate of 0."""
    run, settings = (
        tmp_path / "run",
        (
            f"data.val={data / 'val'}",
            "train.learning_rate=0",
            "train.steps=9",
            "train.checkpoint_every=4",
            "train.evaluate_every=1",
            "train.patience=2",
            "model.backbone.norm=group",
            *QUICK,
        ),
    )
    assert train(data / "train", run, *settings) == 0
    assert "no better AP in 2 evaluations: stopping at step 3" in capsys.readouterr().out
    assert sorted(seen) == [0, 1, 2, 3]
    assert [Path(path).name for path in runs.checkpoints(run)] == ["step-3", "step-2"]
    assert [Path(path).name for path in runs.checkpoints(run / "best")] == ["step-1"]
    assert train(data / "train", run, *settings) == 0
    assert "stopped at step 3, since AP no longer rose" in capsys.readouterr().out
    assert sorted(seen) == [0, 1, 2, 3] and [int(row["step"]) for row in log_rows(run)] == [1, 2, 3]


@pytest.mark.parametrize("settings", [("train.evaluate_every=5",), ("train.patience=2",)])
def test_evaluation_without_data_is_refused(data, tmp_path, capsys, settings):
    assert train(data / "train", tmp_path / "run", *settings) == 2
    assert re.match(r"polarmask: error: train\.(evaluate_every needs data\.val|patience needs)", capsys.readouterr().err)


def test_a_loss_that_is_not_finite_stops_the_training(data, tmp_path, capsys, seen):
    run = tmp_path / "run"
    settings = (
        "train.learning_rate=1000",
        "train.clip_norm=0",
        "train.warmup_steps=0",
        "loss.class_weight=1e6",
        "train.steps=30",
        "train.checkpoint_every=1",
        "train.ema=0.5",
        "data.flip=both",
        *QUICK,
        "model.refine_channels=8",
    )
    assert train(data / "train", run, *settings, arguments=("--profile", "1,8")) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    what, first = re.match(rf"polarmask: error: {run}: (the loss|a weight) is not finite at step (\d+); ", error).groups()
    first, sound = int(first), {}
    for step, (loss, weights) in seen.items():
        sound[step] = {"the loss": loss is None or np.isfinite(loss), "a weight": all(np.isfinite(w).all() for w in weights)}
    assert not sound[first][what] and max(seen) <= first + 1
    assert all(all(sound[step].values()) for step in range(first))
    saved = run / f"not_finite_step_{first}.npz"
    assert str(saved) in error and f"the newest checkpoint is of step {first - 1} " in error

    settings = config.load("shapes", [*TINY, f"data.train={data / 'train'}", *settings])
    batches = pipeline.training_batches(dataset.load(data / "train"), settings, seed=settings.train.seed)
    images, instances = list(batches.take(first))[-1]
    with np.load(saved) as file:
        assert set(file.files) == {"images", *instances} and file["images"].std() > 0
        np.testing.assert_array_equal(file["images"], images)
        for name, value in instances.items():
            np.testing.assert_array_equal(file[name], value)

    assert [Path(path).name for path in runs.checkpoints(run)] == [f"step-{step}" for step in range(first - 1, 0, -1)][:2]
    assert all(finite(path) for path in runs.checkpoints(run))
    model = runs.load_run(run)
    assert all(np.isfinite(v).all() for v in model.variables)
    assert int(model.detect(images)["num_detections"].shape[0]) == 4

    assert list((run / "plugins" / "profile").glob("*/*"))  # though the training did not come to its step 8
    directory.create_or_check(settings, dataset.load(data / "train"), run, restart=True)
    assert not saved.exists() and not (run / "plugins").exists()


def test_a_loss_that_is_not_finite_from_the_start(data, tmp_path, capsys, monkeypatch):
    def fit(*_, **__):
        raise logs.NotFinite("the loss is not finite", 1)

    monkeypatch.setattr(train_module.PolarMask, "fit", fit)
    assert train(data / "train", tmp_path / "run", *QUICK) == 2
    assert "at step 1; there is no checkpoint yet and its batch is " in capsys.readouterr().err
    assert (tmp_path / "run" / "not_finite_step_1.npz").is_file()


@pytest.mark.parametrize(
    ("loss", "weight", "message"),
    [
        (np.inf, 1.0, "the loss is not finite"),
        (1.0, np.nan, "a weight is not finite"),
        (1.0, 1.0, None),
    ],
)
def test_what_is_not_finite_is_not_saved(tmp_path, loss, weight, message):
    log = logs.Log(tmp_path, 0, 10, chief=False)
    log.model, log.before = SimpleNamespace(trainable_variables=[tf.Variable(1.0), tf.Variable([weight])]), {"loss": loss}
    if message is None:
        return log.check(7)
    with pytest.raises(logs.NotFinite, match=message) as stopped:
        log.check(7)
    assert stopped.value.step == 7


# ---- what does not fit together


def test_classes_of_another_data_set_are_refused(straight, data, tmp_path, capsys):
    kinds = "circle,star"
    assert polarmask("shapes", tmp_path / "two", "--train", 4, "--val", 1, "--size", 64, "--kinds", kinds) == 0
    source = (tmp_path / "two/train/annotations.json", tmp_path / "two/train/images")
    assert polarmask("convert", *source, tmp_path / "two_classes", "--processes", 1) == 0
    run = shutil.copytree(straight[0], tmp_path / "run")
    capsys.readouterr()
    assert train(tmp_path / "two_classes", run, *full_settings(data), f"data.val={tmp_path / 'two_classes'}") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "was trained on 4 classes" in error and "has 2" in error

    dataset = json.loads((run / "dataset.json").read_text())
    dataset["classes"] = dataset["classes"][:2]
    (run / "dataset.json").write_text(json.dumps(dataset))  # then the checkpoint is another one's
    assert polarmask("evaluate", run, "--data", data / "val") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("polarmask: error: ") and "of another model" in error
    assert "shape (4,)" in error and "shape (2,)" in error and "classes/conv" in error  # the class convolution, theirs and ours


LAYOUTS = [
    (("data.batch=6",), 4, r"data\.batch is 6, images over all devices: not divisible by 4 devices"),
    (("data.batch=8", "train.accumulate=4"), 4, r"data\.batch is 8, 2 on each of 4 devices: not divisible .*accumulate \(4\)"),
    (("data.batch=8", "train.accumulate=2", "model.backbone.norm=sync"), 2, "norm: sync does not go with .*accumulate"),
    (("data.batch=8", "train.jit_compile=true", "model.backbone.norm=sync"), 2, "norm: sync does not go with .*jit_compile"),
]


@pytest.mark.parametrize(("settings", "devices", "message"), LAYOUTS)
def test_batches_that_do_not_fit_the_devices_are_refused(data, tmp_path, settings, devices, message):
    settings = config.load("shapes", [*TINY, f"data.train={data / 'train'}", *settings])
    strategy = SimpleNamespace(num_replicas_in_sync=devices, cluster_resolver=None)
    with pytest.raises(InputError, match=message):
        train_module.train(settings, tmp_path / "run", strategy=strategy)
    assert not (tmp_path / "run").exists()
    train_module.check_layout(settings, 1)


def test_parts_that_do_not_divide_the_batch_are_refused(data, tmp_path, capsys):
    assert train(data / "train", tmp_path / "run", "train.accumulate=3") == 2
    assert "data.batch is 4: not a multiple of train.accumulate (3)" in capsys.readouterr().err


# ---- damaged data


def damaged(data, folder, cut):
    """A copy of the training data whose second shard is not what it was; its path."""
    copy = shutil.copytree(data / "train", folder)
    shard = sorted(copy.glob("*.tfrecord"))[1]
    content = bytearray(shard.read_bytes())
    if cut:
        del content[len(content) // 2 :]
    else:
        content[len(content) // 2] ^= 255
    shard.write_bytes(content)
    return shard


def test_a_damaged_shard_in_mid_epoch_stops_or_is_skipped(data, tmp_path, capfd, seen):
    shard = damaged(data, tmp_path / "train", cut=False)
    settings = ("data.shuffle=4", "train.checkpoint_every=1", "train.steps=9", *QUICK)
    assert train(tmp_path / "train", tmp_path / "run", *settings) == 2
    stopped, error = max(seen), capfd.readouterr().err
    assert stopped >= 1  # some of the epoch was read
    last = error.splitlines()[-1]
    assert last.startswith(f"polarmask: error: {shard}: ") and "convert" in last and "Traceback" not in error
    assert runs.checkpoints(tmp_path / "run")[0].endswith(f"/step-{stopped}")

    seen.clear()
    assert train(tmp_path / "train", tmp_path / "run", *settings, "data.damaged=skip") == 0
    error = capfd.readouterr().err
    assert error.count(f"warning: {shard}: ") == 1 and sorted(seen) == list(range(stopped, 10))


def test_metrics_are_read_although_a_kill_cut_them(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,loss,AP\n20,1.5,\n20,,0.25\nx,1,2\n\n40,abc,\n40,0.5,\n60")
    rows = logs.read_metrics(tmp_path)
    assert rows == [{"step": 20, "loss": 1.5}, {"step": 20, "AP": 0.25}, {"step": 40, "loss": 0.5}]
    assert logs.ap_history(rows) == [0.25]
    assert logs.read_metrics(tmp_path / "none") == []
