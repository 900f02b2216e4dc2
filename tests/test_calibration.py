"""What the calibration error is, which temperature and bias are fitted, and that run, graph and exports all have them."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image
from pycocotools import mask as coco_mask

from polarmask_tf import cli, lite
from polarmask_tf import config as configs
from polarmask_tf.errors import InputError
from polarmask_tf.export import tflite
from polarmask_tf.inference import calibration
from polarmask_tf.inference.coco_metrics import coco_metrics, expected_calibration_error
from polarmask_tf.inference.predictor import load_predictor
from polarmask_tf.ops import postprocess
from polarmask_tf.weights import runs

RUN = Path(__file__).parent / "old_run"
IMAGES = np.load(RUN.with_name("old_run_detections.npz"))["images"]


@pytest.fixture
def run(tmp_path):
    return shutil.copytree(RUN, tmp_path / "run")


def flat_matches(temperature, count=20_000, images=10, seed=0, bias=0.0):
    """Matches of scores that are right as often as they say at this temperature and bias."""
    rng = np.random.default_rng(seed)
    truth = rng.beta(0.6, 0.8, count).clip(1e-4, 1 - 1e-4)
    score = 1 / (1 + np.exp(temperature * (np.log1p(-truth) - np.log(truth) + bias)))
    matches = np.zeros(count, [("image", np.int64), ("score", np.float64), ("iou", np.float64)])
    matches["image"], matches["score"] = rng.integers(0, images, count), score
    matches["iou"] = np.where(rng.random(count) < truth, rng.uniform(0.5, 1, count), 0)
    return matches


def test_the_error_by_hand():
    scores = np.array([0.9, 0.9, 0.9, 0.9, 0.1, 0.1])
    hits = np.array([True, True, True, False, False, False])
    assert expected_calibration_error(scores, hits) == pytest.approx(abs(3.6 - 3) / 6 + 0.2 / 6)
    assert expected_calibration_error(np.array([1.0, 0.0]), np.array([True, False])) == 0
    assert expected_calibration_error(np.zeros(0), np.zeros(0, bool)) == 0


@pytest.mark.parametrize("bias", [0.0, 1.5, -0.5])
@pytest.mark.parametrize("temperature", [0.3, 0.7, 1.0, 2.0])
def test_temperature_and_bias_of_the_scores_are_fitted(temperature, bias):
    matches = flat_matches(temperature, bias=bias)
    # Scores are (logit(truth) - bias) * temperature: undone, they are what is true.
    found = calibration.fit(matches["score"], matches["iou"] > 0)
    assert found == (pytest.approx(temperature, rel=0.05), pytest.approx(bias, abs=0.05))


def test_scores_that_say_nothing_or_all_keep_their_order():
    rng = np.random.default_rng(0)
    scores = rng.uniform(0.01, 0.99, 2000)
    # worse than nothing: the flattest that is allowed, and the bias says how many are right
    temperature, bias = calibration.fit(scores, rng.random(2000) < 0.8 - 0.6 * scores)
    assert temperature == calibration.FLATTEST
    assert postprocess.recalibrated(scores, now=(temperature, bias)).mean() == pytest.approx(0.5, abs=0.05)
    # all that is right scores more than all that is not: no temperature is steep enough
    temperature, bias = calibration.fit(scores, scores > 0.7)
    after = postprocess.recalibrated(scores, now=(temperature, bias))
    assert temperature == calibration.STEEPEST and (np.diff(after[np.argsort(scores)]) >= 0).all()
    assert after[scores > 0.75].min() > 0.8 and after[scores < 0.65].max() < 0.2


def test_a_model_that_hardly_errs_is_calibrated_too():
    """Scores of .3 to .8, all but 6 of 206 right: 20 misses were asked for."""
    rng = np.random.default_rng(0)
    scores, hits = rng.uniform(0.3, 0.8, 206), np.arange(206) >= 6
    scores[~hits] -= 0.2
    after = postprocess.recalibrated(scores, now=calibration.fit(scores, hits))
    assert after.mean() == pytest.approx(200 / 206, abs=0.01) and after[~hits].mean() < 0.8
    with pytest.raises(InputError, match="200 hits and 4 misses"):
        calibration.fit(scores[2:], hits[2:])


def test_calibrated_and_back():
    scores = np.float32([1e-4, 0.05, 0.3, 0.5, 0.9, 0.999])
    odds = np.log(scores / (1 - scores))
    for now in ((0.4, 0.0), (1.0, 0.0), (3.0, 0.0), (1.0, 1.5), (0.4, 1.5), (2.0, -1.0)):
        there = postprocess.calibrated(tf.constant(scores), *now).numpy()
        np.testing.assert_allclose(there, 1 / (1 + np.exp(-(odds / now[0] + now[1]))), rtol=1e-3, atol=1e-6)
        np.testing.assert_allclose(there, postprocess.recalibrated(scores, now=now), rtol=1e-3, atol=1e-6)
        np.testing.assert_allclose(postprocess.uncalibrated(there, *now), scores, rtol=2e-2)
        other = postprocess.recalibrated(scores, now=(0.7, -0.3))
        np.testing.assert_allclose(postprocess.recalibrated(there, now, (0.7, -0.3)), other, rtol=2e-2)
        assert (np.diff(there) > 0).all()


def test_matches_are_those_of_pycocotools():
    """Two objects, one of them met exactly, one by half, one detection beside; a crowd's counts nowhere."""

    def rle(x, width):
        mask = np.zeros((20, 60), np.uint8, order="F")
        mask[5:15, x : x + width] = 1
        return coco_mask.encode(mask)

    def annotation(x, **more):
        return {"image_id": 4, "category_id": 1, "iscrowd": 0, "segmentation": rle(x, 10), "area": 100, **more}

    truth = {
        "images": [{"id": 4, "height": 20, "width": 60}],
        "categories": [{"id": 1, "name": "a"}],
        "annotations": [annotation(0), annotation(20), annotation(40, iscrowd=1)],
    }
    results = [
        {"image_id": 4, "category_id": 1, "score": score, "segmentation": rle(x, width), "bbox": [x, 5, width, 10]}
        for x, width, score in ((0, 10, 0.9), (20, 6, 0.6), (52, 8, 0.3), (41, 5, 0.2))
    ]
    metrics = coco_metrics(truth, results)
    assert metrics.matches.tolist() == [(4, 1, 0.9, 1.0), (4, 1, 0.6, 0.6), (4, 1, 0.3, 0.0)]
    assert metrics.objects.tolist() == [(4, 1, 1, 100, 0.9, 1.0), (4, 1, 2, 100, 0.6, 0.6)]
    assert metrics.calibration_error == pytest.approx((0.1 + 0.4 + 0.3) / 3)
    assert metrics.score_iou_correlation == pytest.approx(1.0)
    assert "matches" not in json.loads(json.dumps(metrics.to_dict()))
    nothing = coco_metrics(truth, [])
    assert nothing.calibration_error is None and nothing.score_iou_correlation is None


@pytest.mark.slow
def test_a_run_and_what_is_made_of_it_have_the_temperature(run, tmp_path, capsys):
    before = load_predictor(run)(list(IMAGES))
    matches = flat_matches(0.4, bias=0.5)
    done = calibration.calibrate(run, matches, calibration.check_calibratable(run))
    assert done[:2] == (pytest.approx(0.4, rel=0.05), pytest.approx(0.5, abs=0.05))
    assert done.error < 0.02 < 0.1 < done.error_before
    assert 0.5 < done.score_of_close_hits <= 1 and done.score_threshold < 0.05
    after = load_predictor(run)(list(IMAGES))
    assert sum(map(len, before)) > 0
    for a, b in zip(after, before, strict=True):  # the same detections
        np.testing.assert_allclose(a.polygons, b.polygons)
        np.testing.assert_allclose(a.scores, postprocess.recalibrated(b.scores, now=done[:2]), rtol=1e-3, atol=1e-6)
    # a least score is one of calibrated scores
    least = float(after[0].scores[len(after[0]) // 2])
    assert load_predictor(run, score_threshold=least)(IMAGES[0]).scores.min() >= least
    model = runs.load_run(run)
    for raw in (False, True):
        path = tflite.export_tflite(model, tmp_path / f"{raw}.tflite", raw=raw)
        found = lite.PolarMaskLite(path)(IMAGES[0])
        np.testing.assert_allclose(found["scores"], after[0].scores, atol=2e-3)
    model.save(tmp_path / "a.keras")
    np.testing.assert_allclose(load_predictor(tmp_path / "a.keras")(IMAGES[0]).scores, after[0].scores, atol=1e-6)
    # a second time: of what the scores are without the first one
    matches["score"] = postprocess.recalibrated(matches["score"], now=done[:2])
    again = calibration.calibrate(run, matches, runs.checkpoint_digest(run))
    assert again[:2] == pytest.approx(done[:2], rel=0.02)
    assert runs.load_run(run).config.postprocess.score_threshold == pytest.approx(done.score_threshold, rel=0.1)
    # a training that started over has come to the same step
    model.head.classes.conv.kernel.assign_add(tf.ones_like(model.head.classes.conv.kernel))
    runs.save(model, run, runs.step_of(runs.checkpoints(run)[0]), weights_only=True)
    assert runs.load_run(run).config.postprocess.temperature == 1
    assert "scores are not calibrated" in capsys.readouterr().err


def test_what_cannot_be_calibrated_is_said(run, tmp_path, capsys):
    with pytest.raises(InputError, match=r"hits and .* misses in every second image are too few, 20 and 5 are needed"):
        calibration.calibrate(run, flat_matches(1.0, 30), "")
    for content in ("{", "[]", '{"temperature": "a"}', '{"temperature": -1, "score_threshold": 0.1, "checkpoint": "STEP"}'):
        (run / runs.CALIBRATION).write_text(content.replace("STEP", runs.checkpoint_digest(run)))
        with pytest.raises(InputError, match=r"calibration\.json: "):
            runs.with_calibration(*runs.read_run(run)[:1], run)
    file = tmp_path / "model.tflite"
    file.write_bytes(b"")
    assert cli.main(["evaluate", str(file), "--data", "x", "--calibrate"]) == 2
    assert "--calibrate is for a run directory" in capsys.readouterr().err
    (run / runs.CALIBRATION).unlink()
    config, classes = runs.read_run(run)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, train=str(tmp_path / "train")))
    runs.write_run(run, config, {"classes": classes})
    assert cli.main(["evaluate", str(run), "--data", str(tmp_path / "train"), "--calibrate"]) == 2
    assert "these are the pictures that it was trained on: --calibrate needs others" in capsys.readouterr().err
    assert cli.main(["evaluate", str(run), "--data", "x", "--calibrate", "--score-threshold", "0.5"]) == 2
    assert "leave --score-threshold out" in capsys.readouterr().err
    boxes = [[x, y, 8, 8] for y in (0, 10, 20) for x in (0, 10, 20, 30)]
    truth = {
        "images": [{"id": 1, "file_name": "a.png", "width": 40, "height": 30}],
        "annotations": [
            {"id": n, "image_id": 1, "category_id": 1, "iscrowd": 0, "bbox": [x, y, w, h], "area": 64}
            | {"segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]]}
            for n, (x, y, w, h) in enumerate(boxes, 1)
        ],
        "categories": [{"id": entry["category_id"], "name": entry["name"]} for entry in classes],
    }
    (tmp_path / "a.json").write_text(json.dumps(truth))
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    words = [str(tmp_path / name) for name in ("a.json", "", "val")]
    assert cli.main(["convert", *words, "--processes", "1"]) == 0
    words = ["evaluate", str(run), "--data", str(tmp_path / "val"), "--calibrate", "--max-detections", "11"]
    assert cli.main(words) == 2
    assert "of an image of 12 objects 11 would count; --max-detections 24" in capsys.readouterr().err
    with pytest.raises(InputError, match=r"postprocess\.temperature"):
        configs.load("released_r50_1x", ["postprocess.temperature=0.5"])
