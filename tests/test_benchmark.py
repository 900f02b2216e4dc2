"""`polarmask benchmark` runs, and counts what it says it counts; the numbers themselves belong to no test."""

import json
import time

import numpy as np
import pytest
import tensorflow as tf

from polarmask_tf import config
from polarmask_tf.errors import InputError
from polarmask_tf.inference.predictor import network_input
from polarmask_tf.modeling.polarmask import PolarMask
from polarmask_tf.tools import benchmark


@pytest.mark.parametrize(
    ("part", "arguments", "units"),
    [
        (benchmark._targets, (1,), ["ms", "ms"]),
        (benchmark._pipeline, (1,), ["images/s/core", "images/s/core", "ms"]),
        (benchmark._convert, (6,), ["images/s/core", "images/s/core"]),
        (benchmark._rle, (1,), ["ms"]),
        (benchmark._evaluation, (4, 3), ["times"]),
    ],
)
def test_every_part_gives_rows(part, arguments, units):
    rows = part(*arguments)
    assert [row["unit"] for row in rows] == units
    assert all(row["value"] > 0 and row["what"] for row in rows)


def test_the_scene_has_about_as_many_positives_as_the_released_codes():
    assert "111 positives" in benchmark._targets(1)[0]["what"]  # 108 there


SMALL = ["model.backbone.width=8", "model.fpn.channels=16", "model.head.channels=16", "model.head.convs=1", "data.size=[64,96]"]


def test_every_model_gives_its_network_alone_and_with_post_processing():
    settings = config.load("shapes", SMALL)
    rows = benchmark.run_models([settings, config.load("shapes", [*SMALL, "data.fit=short_side"])], repeats=3)
    assert [(row["model"], row["what"]) for row in rows] == [
        (f"config {i}", what) for i in (1, 2) for what in ("network", "network and post-processing")
    ]
    # 480 x 640 at a shorter side of 64, a longer one of at most 96: 64 x 85, padded.
    assert [(row["height"], row["width"]) for row in rows] == [(64, 96)] * 4
    for row in rows:
        assert row["wall_ms"] > 0 and row["cpu_ms"] > 0 and row["fps"] == pytest.approx(1000 / row["wall_ms"])
        assert row["device"] == benchmark.device_name()
    text = benchmark.format_models(rows)
    assert rows[0]["device"] in text and f"{rows[3]['fps']:.2f}" in text and text.count("config 2") == 2


def test_a_picture_is_scaled_as_the_config_says():
    picture = np.full((480, 640, 3), 7, np.uint8)

    def filled(fit, size):
        placed = network_input(picture, config.load("shapes", [f"data.fit={fit}", f"data.size={size}"]).data)[0]
        return placed.shape[:2], (int((placed[:, 0, 0] == 7).sum()), int((placed[0, :, 0] == 7).sum()))

    assert filled("letterbox", [64, 64]) == ((64, 64), (48, 64))
    assert filled("stretch", [64, 96]) == ((64, 96), (64, 96))
    assert filled("short_side", [400, 1333]) == ((416, 544), (400, 533))


def test_models_take_turns_and_the_median_counts(monkeypatch):
    calls = []

    def timed(function, x):
        calls.append((id(function), int(x[0, 0, 0, 0])))
        turn = len(calls) - 9  # after two for warming up, for two functions, with two pictures
        return (float([50, 51, 1, 2, 9, 90][turn]), 3.0) if turn >= 0 else (1e6, 1e6)

    monkeypatch.setattr(benchmark, "_wall_and_cpu", timed)
    pictures = [np.full((64, 96, 3), value, np.uint8) for value in (1, 2)]
    rows = benchmark.run_models([config.load("shapes", SMALL)], pictures, repeats=3)
    one, two = calls[8][0], calls[9][0]
    assert one != two
    assert calls[8:] == [(one, 1), (two, 1), (one, 2), (two, 2), (one, 1), (two, 1)]
    assert [row["wall_ms"] for row in rows] == [9, 51] and rows[0]["cpu_ms"] == 3


def test_time_is_wall_time_and_cpu_time():
    wall, cpu = benchmark._wall_and_cpu(lambda seconds: time.sleep(seconds), 0.1)
    assert 100 <= wall < 1000 and cpu < 50


def test_a_run_directory_brings_its_weights_and_its_threshold(tmp_path):
    settings = config.load("shapes", SMALL)
    (tmp_path / "config.yaml").write_text(config.dump(settings))
    (tmp_path / "dataset.json").write_text(json.dumps({"classes": [{"name": "a", "category_id": 3}]}))
    model = PolarMask(settings, 1)
    model.build((None, 64, 96, 3))
    model.head.centerness.conv.bias.assign([5.0])
    tf.train.CheckpointManager(
        tf.train.Checkpoint(model=model), str(tmp_path / "checkpoints"), max_to_keep=1, checkpoint_name="step"
    ).save(1)
    loaded, options = benchmark._model(tmp_path)
    assert loaded.num_classes == 1 and loaded.head.centerness.conv.bias.numpy() == [5.0] and options == {}
    rows = benchmark.run_models([tmp_path], repeats=1)
    assert rows[0]["model"] == str(tmp_path) and (rows[0]["height"], rows[0]["width"]) == (64, 96)


def test_a_config_is_found_by_name_and_something_else_refused(tmp_path):
    model, options = benchmark._model("shapes")
    assert model.num_classes == 80 and options == {"score_threshold": 0.0}
    with pytest.raises(InputError, match="no config file"):
        benchmark._model("nonesuch")
    with pytest.raises(InputError, match="not a run directory"):
        benchmark._model(tmp_path)
