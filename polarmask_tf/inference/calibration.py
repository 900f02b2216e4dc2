"""A temperature and a bias for a run's scores, so that of all detections with a score of .8 about 80 % are right.

A detection is a hit if pycocotools matches it with an object of its class at mask IoU 0.5 (as for AP50); detections that
match crowd regions count nowhere. Calibrated scores are sigmoid(logit(score) / temperature + bias): in the same order.
"""

from __future__ import annotations

import typing
from pathlib import Path

import numpy as np

from polarmask_tf.errors import InputError
from polarmask_tf.files import check_writable
from polarmask_tf.inference import thresholds
from polarmask_tf.inference.coco_metrics import expected_calibration_error
from polarmask_tf.ops.postprocess import recalibrated
from polarmask_tf.weights import runs

LEAST_HITS, LEAST_MISSES = 20, 5  # that are fitted to; a good model has few misses, and Platt's targets allow for it
STEEPEST, FLATTEST = 0.1, 5.0  # temperatures


def fit(scores: np.ndarray, hits: np.ndarray) -> tuple[float, float]:
    """The temperature and bias at which the hits [M] (bool) are most likely, of scores [M] in (0, 1).

    Platt's scaling (1999), with his targets a little inside of 0 and 1. Raises InputError for too few hits or misses.
    """
    right, wrong = int(hits.sum()), int((~hits).sum())
    if right < LEAST_HITS or wrong < LEAST_MISSES:
        needed = f"{LEAST_HITS} and {LEAST_MISSES} are needed"
        raise InputError(f"--calibrate: {right} hits and {wrong} misses in every second image are too few, {needed}: give more")
    scores = np.clip(scores, 1e-6, 1 - 1e-6)
    logits, targets = np.log(scores) - np.log1p(-scores), np.where(hits, (right + 1) / (right + 2), 1 / (wrong + 2))
    slope, bias = _logistic(np.stack([logits, np.ones_like(logits)], 1), targets)
    if not 1 / FLATTEST <= slope <= 1 / STEEPEST:  # the order of scores has to stay, whatever they are worth
        slope = float(np.clip(slope, 1 / FLATTEST, 1 / STEEPEST))
        (bias,) = _logistic(np.ones([len(logits), 1]), targets, slope * logits)
    return float(1 / slope), float(np.clip(bias, -50, 50))


def _logistic(features, targets, offset=0.0) -> np.ndarray:
    """Weights [n] of a logistic regression of features [M, n], by Newton's method with steps that are halved if too long."""

    def loss(weights):
        z = features @ weights + offset
        return (np.logaddexp(0, z) - targets * z).sum()

    weights = np.zeros(features.shape[1])
    for _ in range(100):
        p = 1 / (1 + np.exp(-(features @ weights + offset)))
        curvature = (features.T * (p * (1 - p))) @ features + 1e-9 * np.eye(len(weights))
        step = np.linalg.solve(curvature, features.T @ (p - targets))
        while loss(weights - step) > loss(weights) and np.abs(step).max() > 1e-9:
            step /= 2
        weights = weights - step
        if np.abs(step).max() <= 1e-9:
            break
    return weights


def halves(matches: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows of every second image, and of the others, of Metrics.matches."""
    first = np.isin(matches["image"], np.unique(matches["image"])[::2])
    return matches[first], matches[~first]


class Calibration(typing.NamedTuple):
    """Of the half of the images, every second, that was not fitted to."""

    temperature: float
    score_bias: float
    error: float  # expected calibration error with them
    error_before: float  # with the one that the run had
    score_of_close_hits: float  # median calibrated score of hits with an IoU of at least .9; nan without any
    score_threshold: float  # what postprocess.score_threshold is now


def check_calibratable(run: Path, data=None) -> str:
    """runs.checkpoint_digest; InputError for what is no run directory, or has the released code's scores (up to 1.5), and for
    `data` that it was trained on, of which it knows more than its scores will promise of others."""
    run = Path(run)
    if not (run / "config.yaml").is_file():
        raise InputError(f"{run}: --calibrate is for a run directory; exports made of it then are calibrated")
    config = runs.read_run(run)[0]
    if data and thresholds.trained_on(config, data):
        raise InputError(f"{data}: these are the pictures that it was trained on: --calibrate needs others")
    if config.conventions == "released":
        raise InputError(f"{run}: conventions: released has scores up to 1.5; --calibrate is for those in [0, 1]")
    check_writable(run / runs.CALIBRATION)
    return runs.checkpoint_digest(run)


def calibrate(run: Path, matches: np.ndarray, checkpoint: str) -> Calibration:
    """Fits temperature and bias to the Metrics.matches of a run, and stores them in the run, for all that is made of it.

    The least score is stored too, as the calibrated score of the detections that it lets through now: which ones these
    are does not change. `checkpoint` is what check_calibratable gave before the evaluation, of all of whose detections the
    matches must be. Raises InputError for too few of them.
    """
    run = Path(run)
    config, _ = runs.read_run(run)
    options = runs.with_calibration(config, run).postprocess
    fitted, other = halves(matches)
    before, raw = (options.temperature, options.score_bias), (1.0, 0.0)
    now = fit(recalibrated(fitted["score"], before, raw), fitted["iou"] >= 0.5)
    threshold = recalibrated(options.score_threshold, before, now)
    scores, hits = recalibrated(other["score"], before, now), other["iou"] >= 0.5
    close = scores[other["iou"] >= 0.9]
    done = Calibration(
        *now,
        expected_calibration_error(scores, hits),
        expected_calibration_error(other["score"], hits),
        float(np.median(close)) if len(close) else float("nan"),
        threshold,
    )
    content = {"temperature": now[0], "score_bias": now[1], "score_threshold": threshold}
    runs.write_bound(run / runs.CALIBRATION, content, checkpoint)
    return done
