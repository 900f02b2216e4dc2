"""`polarmask benchmark CONFIG` runs, and counts what it says it counts; the numbers themselves belong to no test."""

import time

import numpy as np
import pytest
import tensorflow as tf

from polarmask_tf import cli, config
from polarmask_tf.errors import InputError
from polarmask_tf.files import format_table
from polarmask_tf.inference.predictor import network_input
from polarmask_tf.modeling.polarmask import PolarMask
from polarmask_tf.tools import benchmark
from polarmask_tf.weights import runs

SMALL = ["model.backbone.width=8", "model.fpn.channels=16", "model.head.channels=16", "model.head.convs=1", "data.size=[64,96]"]


def test_every_model_gives_its_network_alone_and_with_post_processing():
    settings = config.load("shapes", SMALL)
    rows = benchmark.benchmark_models([settings, config.load("shapes", [*SMALL, "data.fit=short_side"])], repeats=3)
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


def test_models_take_turns_with_every_picture(monkeypatch):
    seen = []
    tf.config.run_functions_eagerly(True)
    try:
        model = PolarMask(config.load("shapes", SMALL), 80)
        monkeypatch.setattr(benchmark, "_model", lambda source: (model, {"score_threshold": 0.0}))
        monkeypatch.setattr(model, "detect", lambda x, **options: seen.append(("both", int(x[0, 0, 0, 0]), options)))
        monkeypatch.setattr(model, "call", lambda x, training: seen.append(("network", int(x[0, 0, 0, 0]), training)) or x)
        pictures = [np.full((64, 96, 3), value, np.uint8) for value in (1, 2)]
        rows = benchmark.benchmark_models(["a config"], pictures, repeats=3)
    finally:
        tf.config.run_functions_eagerly(False)
    turns = [(what, picture, option) for picture in (1, 2, 1, 2, 1, 2, 1) for what, option in CALLS.items()]
    assert seen == turns  # four turns that do not count, and three that do
    assert [row["what"] for row in rows] == ["network", "network and post-processing"]


CALLS = {"network": False, "both": {"score_threshold": 0.0}}


def test_turns_give_the_time_of_each_call_by_the_clock_and_of_the_processor():
    calls = []
    times = benchmark.in_turns([lambda: calls.append("a"), lambda: (calls.append("b"), time.sleep(0.1))], 2, warm_up=1)
    assert calls == ["a", "b"] * 3 and times.shape == (2, 2, 2)
    assert (times[:, 1, 0] >= 100).all() and (times[:, 1, 1] < 50).all() and (times >= 0).all()


def test_a_table_is_as_wide_as_its_cells():
    rows = [{"name": "a", "ms": 1.25, "n": 3}, {"name": "longer", "ms": 100.0, "n": "-"}]
    lines = format_table(rows, {"name": "", "n": "", "ms": ".1f"}).splitlines()
    assert lines == ["name    n     ms", "a       3    1.2", "longer  -  100.0"]


def test_a_run_directory_brings_its_weights_and_its_threshold(tmp_path):
    settings = config.load("shapes", SMALL)
    model = PolarMask(settings, 1)
    model.head.centerness.conv.bias.assign([5.0])
    runs.write_run(tmp_path, settings, {"classes": [{"name": "a", "category_id": 3}]})
    runs.save(model, tmp_path, 1, weights_only=True)
    loaded, options = benchmark._model(tmp_path)
    assert loaded.num_classes == 1 and loaded.head.centerness.conv.bias.numpy() == [5.0] and options == {}
    rows = benchmark.benchmark_models([tmp_path], repeats=1)
    assert rows[0]["model"] == str(tmp_path) and (rows[0]["height"], rows[0]["width"]) == (64, 96)


def test_a_config_is_found_by_name_and_something_else_refused(tmp_path):
    model, options = benchmark._model("shapes")
    assert model.num_classes == 80 and options == {"score_threshold": 0.0}
    with pytest.raises(InputError, match="no config file"):
        benchmark._model("nonesuch")
    with pytest.raises(InputError, match="not a run directory"):
        benchmark._model(tmp_path)


def test_without_anything_to_time_it_says_what_to_give(tmp_path, capsys):
    assert cli.main(["benchmark"]) == 2
    assert cli.main(["benchmark", "shapes", "--csv", str(tmp_path / "no" / "rows.csv")]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert (
        len(errors) == 2 and "name configs, runs or .tflite files" in errors[0] and "scripts/benchmarks/steps.py" in errors[0]
    )
    assert "cannot be written" in errors[1]


def test_more_threads_than_any_machine_has_are_refused():
    with pytest.raises(InputError, match="99999999999 threads, of 1 to 256"):
        benchmark.benchmark_files(["model.tflite"], threads=99999999999)
