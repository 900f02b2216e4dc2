"""One temperature for a run's scores, so that of all detections with a score of .8 about 80 % are right.

A detection is a hit if pycocotools matches it with an object of its class at mask IoU 0.5 (as for AP50); detections that
match crowd regions count nowhere. Calibrated scores are sigmoid(logit(score) / temperature): in the same order.
"""

from __future__ import annotations

import typing
from pathlib import Path

import numpy as np

from polarmask_tf.errors import InputError
from polarmask_tf.files import check_writable
from polarmask_tf.inference.coco_metrics import expected_calibration_error
from polarmask_tf.ops.postprocess import uncalibrated
from polarmask_tf.weights import runs

TEMPERATURES = np.exp(np.linspace(np.log(0.1), np.log(5), 400))
LEAST = 20  # hits, and misses, that a temperature is fitted to


def calibrated(scores: np.ndarray, temperature: float) -> np.ndarray:
    """postprocess.calibrated in NumPy."""
    return uncalibrated(scores, 1 / temperature)


def fit_temperature(scores: np.ndarray, hits: np.ndarray) -> float:
    """The temperature at which the hits [M] (bool) are most likely, of scores [M] in (0, 1)."""
    if min(hits.sum(), (~hits).sum()) < LEAST:
        raise InputError(f"--calibrate: {hits.sum()} hits and {(~hits).sum()} misses are too few, {LEAST} of each are needed")

    def likelihood(temperature):
        p = np.clip(calibrated(scores, temperature), 1e-9, 1 - 1e-9)
        return np.log(np.where(hits, p, 1 - p)).sum()

    return float(max(TEMPERATURES, key=likelihood))


def halves(matches: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows of every second image, and of the others, of Metrics.matches."""
    first = np.isin(matches["image"], np.unique(matches["image"])[::2])
    return matches[first], matches[~first]


class Calibration(typing.NamedTuple):
    """Of the half of the images, every second, that the temperature was not fitted on."""

    temperature: float
    error: float  # expected calibration error with the temperature
    error_before: float  # with the one that the run had
    score_of_close_hits: float  # median calibrated score of hits with an IoU of at least .9; nan without any
    score_threshold: float  # what postprocess.score_threshold is now


def check_calibratable(run: Path) -> str:
    """runs.checkpoint_digest; InputError for what is no run directory, or has the released code's scores (up to 1.5)."""
    run = Path(run)
    if not (run / "config.yaml").is_file():
        raise InputError(f"{run}: --calibrate is for a run directory; exports made of it then have its temperature")
    if runs.read_run(run)[0].conventions == "released":
        raise InputError(f"{run}: conventions: released has scores up to 1.5; --calibrate is for those in [0, 1]")
    check_writable(run / runs.CALIBRATION)
    return runs.checkpoint_digest(run)


def calibrate(run: Path, matches: np.ndarray, checkpoint: str) -> Calibration:
    """Fits a temperature to the Metrics.matches of a run, and stores it in the run, for all that is made of it.

    The least score is stored too, as the calibrated score of the detections that it lets through now: which ones these
    are does not change. `checkpoint` is what check_calibratable gave before the evaluation, of all of whose detections the
    matches must be. Raises InputError for too few of them.
    """
    run = Path(run)
    config, _ = runs.read_run(run)
    before = runs.with_calibration(config, run).postprocess
    fitted, other = halves(matches)
    raw = uncalibrated(fitted["score"], before.temperature)
    temperature = fit_temperature(raw, fitted["iou"] >= 0.5)
    threshold = float(calibrated(uncalibrated(before.score_threshold, before.temperature), temperature))
    scores, hits = calibrated(uncalibrated(other["score"], before.temperature), temperature), other["iou"] >= 0.5
    close = scores[other["iou"] >= 0.9]
    done = Calibration(
        temperature,
        expected_calibration_error(scores, hits),
        expected_calibration_error(other["score"], hits),
        float(np.median(close)) if len(close) else float("nan"),
        threshold,
    )
    runs.write_bound(run / runs.CALIBRATION, {"temperature": temperature, "score_threshold": threshold}, checkpoint)
    return done
