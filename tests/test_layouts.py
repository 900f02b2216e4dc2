"""One device, two mirrored devices and two worker processes train the same model, step by step."""

import csv
import json

import numpy as np
import pytest
import training

from polarmask_tf import cli

SGD = (
    "train.optimizer=sgd", "train.learning_rate=0.01", "train.steps=20", "train.checkpoint_every=20", "data.flip=both",
    "data.scale=[0.8,1.2]", "data.batch=4", "data.shuffle=10",
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


def losses(run):
    with open(run / "metrics.csv") as file:
        return [float(row["loss"]) for row in csv.DictReader(file) if row["loss"]]


@pytest.mark.parametrize("norm", ["group", "frozen", "sync"])
def test_the_layout_changes_nothing(data, tmp_path, norm):
    settings = (*SGD, f"model.backbone.norm={norm}")
    validate = (f"data.val={data / 'val'}", "train.evaluate_every=20") if norm == "group" else ()
    runs = {}
    for name, arguments in (("one", ("--strategy", "none")), ("mirrored", ("--strategy", "mirrored", "--devices", 2))):
        runs[name] = tmp_path / name
        words = training.command(data / "train", runs[name], *settings, *validate, arguments=arguments)
        [(status, _, error)] = training.finish(training.start(words))
        assert status == 0, error
    runs["workers"] = tmp_path / "workers"
    words = training.command(data / "train", runs["workers"], *settings, *validate)
    processes = [training.start(words, TF_CONFIG=text) for text in training.cluster(2)]
    (chief, out, error), (worker, worker_out, worker_error) = training.finish(*processes)
    assert (chief, worker) == (0, 0), error + worker_error
    assert "trained model in" in out and not worker_out  # the chief speaks and writes, the worker does not
    assert "Traceback" not in error + worker_error

    one = training.weights(runs["one"], 20)
    for other in ("mirrored", "workers"):
        theirs = training.weights(runs[other], 20)
        assert set(theirs) == set(one)
        for name, value in one.items():
            if name.startswith("model/"):
                distance = np.linalg.norm(value - theirs[name]) / max(np.linalg.norm(value), 1e-12)
                assert distance <= 1e-4, (other, name, distance)
        assert losses(runs[other]) == pytest.approx(losses(runs["one"]), rel=1e-4)
    if validate:  # every replica and worker evaluated its share: the same detections in all, none twice
        found = [json.loads((run / "best" / "metrics.json").read_text()) for run in runs.values()]
        assert len({(metrics["images"], metrics["detections"]) for metrics in found}) == 1 and found[0]["detections"] > 0
        for metrics in found:
            assert metrics["values"] == pytest.approx(found[0]["values"], abs=1e-3)
