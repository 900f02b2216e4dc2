"""One device, two mirrored devices and two worker processes train the same model, step by step."""

import csv
import json

import numpy as np
import pytest
import tf_keras

from helpers import training
from polarmask_tf import cli
from polarmask_tf import config as configs
from polarmask_tf.modeling.polarmask import PolarMask
from polarmask_tf.weights import runs

pytestmark = pytest.mark.slow

SGD = (
    "train.optimizer=sgd",
    "train.learning_rate=0.003",
    "train.steps=20",
    "train.checkpoint_every=20",
    "data.flip=both",
    "data.scale=[0.8,1.2]",
    "data.shuffle=10",
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("layouts")
    assert cli.main(["shapes", str(folder / "shapes"), "--train", "24", "--val", "5", "--size", "64"]) == 0
    for split in ("train", "val"):
        source = (folder / "shapes" / split / "annotations.json", folder / "shapes" / split / "images")
        words = ["convert", *source, folder / split, "--processes", "1", "--shards", "3"]
        assert cli.main([str(word) for word in words]) == 0
    return folder


def start_run(folder, settings):
    """Weights for step 0 that are nowhere zero. The loss has kinks, ReLU's and those of min and max in Polar IoU, and a value
    close to one may fall on either side of it when sums are rounded otherwise: that is one small step of a weight. In a
    bias that has only begun to leave zero it would be all there is to compare. Always the same weights: of many starts
    by chance one had such a step early enough to move tensors by 3e-4, where these reach 5e-7."""
    tf_keras.utils.set_random_seed(1)
    config = configs.load("shapes", [*training.TINY, *settings])
    model = PolarMask(config, 4)
    model.build((None, 64, 64, 3))
    rng = np.random.default_rng(0)
    for variable in model.trainable_variables:
        variable.assign(variable + rng.normal(0, 0.1 if variable.shape.rank == 1 else 0.02, variable.shape))
    classes = json.loads((folder.parent / "train" / "dataset.json").read_text())["classes"]
    runs.write_run(folder, config, {"classes": classes, "name": "start", "num_images": 0})
    runs.save(model, folder, 0, weights_only=True)
    return folder


def losses(run):
    with open(run / "metrics.csv") as file:
        return [float(row["loss"]) for row in csv.DictReader(file) if row["loss"]]


@pytest.mark.parametrize("kind", ["frozen", "sync"])  # GroupNorm, of which a layout makes as little, is in the heads of both
def test_the_layout_changes_nothing(data, tmp_path, kind):
    # A run of its own for these losses costs 2 minutes.
    quality = (*training.QUALITY, "model.refine_channels=8") if kind == "frozen" else ()
    part = ("train.backbone_lr_multiplier=0.3", "train.freeze_backbone_steps=3") if kind == "sync" else ()
    settings = (*SGD, f"model.backbone.norm={kind}", *quality, *part)
    start = ("--start", start_run(data / f"start_{kind}", settings))
    validate = (f"data.val={data / 'val'}", "train.evaluate_every=20") if kind == "frozen" else ()
    done = {}
    for name, arguments in (("one", ("--strategy", "none")), ("mirrored", ("--strategy", "mirrored", "--devices", 2))):
        done[name] = tmp_path / name
        words = training.command(data / "train", done[name], *settings, *validate, arguments=(*start, *arguments))
        [(status, _, error)] = training.finish(training.start(words))
        assert status == 0, error
    done["workers"] = tmp_path / "workers"
    words = training.command(data / "train", done["workers"], *settings, *validate, arguments=start)
    processes = [training.start(words, TF_CONFIG=text) for text in training.cluster(2)]
    (chief, out, error), (worker, worker_out, worker_error) = training.finish(*processes)
    assert (chief, worker) == (0, 0), error + worker_error
    assert "trained model in" in out and not worker_out  # the chief speaks and writes, the worker does not
    assert "Traceback" not in error + worker_error

    one, before = training.weights(done["one"], 20), training.weights(data / f"start_{kind}", 0)
    learned = {name: value for name, value in before.items() if "moving" not in name and np.any(one[name] != value)}
    moved = [np.linalg.norm(one[name] - value) / np.linalg.norm(value) for name, value in learned.items()]
    assert len(moved) > 30 and np.median(moved) > 1e-3  # what is compared to 1e-4 is ten times as large
    for other in ("mirrored", "workers"):
        theirs = training.weights(done[other], 20)
        assert set(theirs) == set(one)
        for name, value in one.items():
            if name.startswith("model/"):
                distance = np.linalg.norm(value - theirs[name]) / max(np.linalg.norm(value), 1e-12)
                assert distance <= 1e-4, (other, name, distance)
        assert losses(done[other]) == pytest.approx(losses(done["one"]), rel=1e-4)
    if validate:  # every replica and worker evaluated its share: the same detections in all, none twice
        found = [json.loads((run / "best" / "metrics.json").read_text()) for run in done.values()]
        assert len({(metrics["images"], metrics["detections"]) for metrics in found}) == 1 and found[0]["detections"] > 0
        for metrics in found:
            assert metrics["values"] == pytest.approx(found[0]["values"], abs=1e-3)
