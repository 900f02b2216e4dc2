"""A run that was made before parts, keys and outputs had the names that they have now: tests/old_run."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from polarmask_tf import cli
from polarmask_tf import config as configs
from polarmask_tf.errors import InputError
from polarmask_tf.inference.predictor import load_predictor
from polarmask_tf.training import train
from polarmask_tf.weights import earlier, runs

RUN = Path(__file__).parent / "old_run"


@pytest.fixture
def run(tmp_path):
    return shutil.copytree(RUN, tmp_path / "run")


def test_it_is_small():
    assert sum(path.stat().st_size for path in RUN.rglob("*")) < 100_000


def test_it_gives_the_detections_that_it_gave():
    with np.load(RUN.with_name("old_run_detections.npz")) as expected:
        found = load_predictor(RUN, score_threshold=0.02)(list(expected["images"]))
        assert len(found) == 3
        for number, detections in enumerate(found):
            assert len(detections.scores) == 20
            for name in ("scores", "classes", "boxes", "polygons"):
                np.testing.assert_allclose(getattr(detections, name), expected[f"{name}{number}"], atol=1e-4)


def test_old_keys_of_its_config_are_read():
    config, classes = runs.read_run(RUN)
    assert (config.postprocess.pre_nms_top_k, config.train.final_lr_fraction) == (1000, 0.02)
    assert [entry["category_id"] for entry in classes] == [1, 3, 7, 12]


def test_another_training_starts_from_all_of_it(capsys):
    config, classes = runs.read_run(RUN)
    model = train.build(config, classes)
    train.start_from(model, RUN)
    theirs = runs.load_run(RUN)
    count = len(theirs.backbone.variables) + len(theirs.decoder.variables) + len(theirs.head.variables)
    assert f"{count} of {count} tensors\n" in capsys.readouterr().out
    for mine, other in zip(model.trainable_variables, theirs.trainable_variables, strict=True):
        np.testing.assert_array_equal(mine, other)


def test_resuming_it_is_refused_and_leaves_it_as_it_is(run, tmp_path, capsys):
    assert cli.main(["shapes", str(tmp_path / "shapes"), "--train", "8", "--val", "1", "--size", "64"]) == 0
    source = (tmp_path / "shapes/train/annotations.json", tmp_path / "shapes/train/images")
    assert cli.main(["convert", *map(str, source), str(tmp_path / "train"), "--processes", "1"]) == 0
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    config = tmp_path / "config.yaml"
    config.write_text(configs.dump(runs.read_run(run)[0]))
    capsys.readouterr()
    words = ["train", "--config", config, "--out", run, "--set", f"data.train={tmp_path / 'train'}"]
    assert cli.main([str(word) for word in words]) == 2
    assert "holds a training with data.train=" in capsys.readouterr().err  # another data set, first of all
    text = (run / "config.yaml").read_text().replace("train: data/train", f"train: {tmp_path / 'train'}")
    (run / "config.yaml").write_text(text)
    before[run / "config.yaml"] = text.encode()
    assert cli.main([str(word) for word in [*words, "--set", "train.steps=601"]]) == 2
    error = capsys.readouterr().err
    assert error == (
        f"polarmask: error: {run}: was trained by an earlier version, which this one cannot resume: give it to --start\n"
    )
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    with pytest.raises(InputError, match="an earlier version"):
        runs.restore(train.build(*runs.read_run(run)), run, training=True)


def test_averages_are_found_by_the_names_that_they_had():
    """In their order, which was another one; Keras had numbered the layers of the old process differently."""

    class Reader:
        def get_tensor(self, name):
            graph = earlier.TrackableObjectGraph()
            names = ("head/scale3", "conv2d_7/kernel", "conv2d_9/kernel", "fpn/lateral3/conv/bias")
            for place, name in enumerate(names):
                attribute = graph.nodes.add().attributes.add()
                attribute.full_name = f"average/{name}"
                attribute.checkpoint_key = f"average/{place}/.ATTRIBUTES/VARIABLE_VALUE"
            return graph.SerializeToString()

    ours = ["conv2d/kernel", "conv2d/kernel 2", "decoder/lateral3/conv/bias", "head/scale3"]
    assert earlier.order_of_averages(Reader(), ours) == [1, 2, 3, 0]
