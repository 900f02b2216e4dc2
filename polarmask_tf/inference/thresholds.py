"""From which score on detections are worth showing: where F1 is best, precision and recall counting alike.

A detection is right if pycocotools matches it with an object of its class at mask IoU 0.5 (as for AP50); what matches a crowd
region counts nowhere. Matching goes by descending score, so that the detections above a score match as if there were no others.
"""

from __future__ import annotations

import typing
from pathlib import Path

import numpy as np

from polarmask_tf import files
from polarmask_tf.errors import InputError, one_line
from polarmask_tf.inference.coco_metrics import Metrics
from polarmask_tf.weights import runs

LEAST = 20  # objects, of a class or of all, that a threshold is found on
FEW = 10  # classes, of which each is shown without being asked for


class Curve(typing.NamedTuple):
    """What is kept from each score on; the scores that there are, the highest first. All float64 [K]."""

    scores: np.ndarray
    precision: np.ndarray
    recall: np.ndarray
    f1: np.ndarray


class Best(typing.NamedTuple):
    """Where F1 is best. All zero where nothing was found, or nothing was to be found."""

    threshold: float
    f1: float
    precision: float
    recall: float


def curve(scores: np.ndarray, hits: np.ndarray, objects: int) -> Curve:
    """Of detections with these scores [M], of which `hits` (bool [M]) are right, in images with so many objects."""
    order = np.argsort(-scores, kind="stable")
    scores, right = scores[order], np.cumsum(hits[order])
    last = np.flatnonzero(np.diff(scores, append=-np.inf))  # detections of one score come or go together
    kept, right = last + 1, right[last]
    return Curve(scores[last], right / kept, right / max(objects, 1), 2 * right / (kept + max(objects, 1)))


def best_f1(scores: np.ndarray, hits: np.ndarray, objects: int) -> Best:
    """The best F1, and a threshold for it in the middle between the last score that is kept and the first that is not (or 1 %
    below the last of all): exports differ in the last digits. Of equals the highest."""
    found = curve(scores, hits, objects)
    if not hits.any() or not objects:
        return Best(0.0, 0.0, 0.0, 0.0)
    at = int(np.argmax(found.f1))
    kept, dropped = [*found.scores[at : at + 2], 0.98 * found.scores[-1]][:2]
    return Best(float(kept + dropped) / 2, float(found.f1[at]), float(found.precision[at]), float(found.recall[at]))


def find(metrics: Metrics) -> tuple[Best, list[Best]]:
    """The best of all classes together, and of each class, in the order of their category ids."""
    matches, objects = metrics.matches, metrics.objects
    every = best_f1(matches["score"], matches["iou"] > 0, len(objects))
    each = []
    for entry in metrics.per_class:
        of = matches[matches["category"] == entry["category_id"]]
        each.append(best_f1(of["score"], of["iou"] > 0, entry["objects"]))
    return every, each


def shown(metrics: Metrics, category_ids: typing.Iterable[int]) -> dict | None:
    """{"overall": score, "classes": [score, ...]} as models carry it, of their classes; None for fewer than LEAST objects, or
    without a hit.

    A class with fewer than LEAST objects, or without a hit, takes the score of all.
    """
    every, each = find(metrics)
    if len(metrics.objects) < LEAST or not every.f1:
        return None
    own = {
        entry["category_id"]: best.threshold
        for entry, best in zip(metrics.per_class, each, strict=True)
        if entry["objects"] >= LEAST and best.f1
    }
    return {"overall": every.threshold, "classes": [own.get(number, every.threshold) for number in category_ids]}


class Subject(typing.NamedTuple):
    """A run directory that is going to be evaluated: what a threshold then belongs to."""

    run: Path
    checkpoint: str  # runs.checkpoint_digest
    temperature: float
    score_bias: float


def subject(model) -> Subject | None:
    """Of a run directory with a checkpoint; None of any other model, which has no place to store anything."""
    run = Path(model)
    if not (run / "config.yaml").is_file():
        return None
    config = runs.with_calibration(runs.read_run(run)[0], run)
    return subject_of(run, config)


def subject_of(run: Path, config) -> Subject:
    """Of a run directory whose calibrated config is known."""
    return Subject(run, runs.checkpoint_digest(run), config.postprocess.temperature, config.postprocess.score_bias)


def trained_on(config, data) -> bool:
    """Whether `data` are what a run of this config learned from."""
    return bool(config.data.train) and Path(config.data.train).resolve() == Path(data).resolve()


def store(subject: Subject, metrics: Metrics, data) -> str:
    """Stores what is `shown` in a run directory, for all that is made of it, and says in a line whether, and why not.

    `metrics` are of all detections on the whole of `data`, and the subject is as it was before.
    """
    config, classes = runs.read_run(subject.run)
    found = shown(metrics, [entry["category_id"] for entry in classes])
    if trained_on(config, data):
        return "Not stored: these are the pictures that it was trained on."
    if found is None:
        return f"Not stored: it takes at least {LEAST} objects, and one that is found; there are {len(metrics.objects)}."
    most = int(np.unique(metrics.objects["image"], return_counts=True)[1].max())
    if most > metrics.max_detections:
        return (
            f"Not stored: of an image of {most} objects {metrics.max_detections} detections count; --max-detections {2 * most}"
        )
    try:
        content = {**found, "temperature": subject.temperature, "score_bias": subject.score_bias, "data": str(data)}
        runs.write_bound(subject.run / runs.THRESHOLDS, content, subject.checkpoint)
    except InputError as error:
        return f"Not stored: {error}"
    return f"Stored in {subject.run / runs.THRESHOLDS}: `predict` and new exports show detections from there on."


def rows(metrics: Metrics) -> list[dict]:
    """A row for all classes together, named "all", and one for each: {"category_id", "name", "objects", "AP", "AP50"} and what
    Best has."""
    every, each = find(metrics)
    together = {"category_id": None, "name": "all", "objects": len(metrics.objects)}
    together |= {name: metrics.values[name] for name in ("AP", "AP50")}
    entries = [together, *metrics.per_class]
    return [{**entry, **best._asdict()} for entry, best in zip(entries, [every, *each], strict=True)]


def format_table(metrics: Metrics, per_class: bool | None = None) -> str:
    """The best F1, and a line a class (default: of 2 to FEW classes)."""
    found = rows(metrics)
    best = found[0]
    text = "" if best["f1"] else " No object is found, so there is no threshold of best F1."
    if best["f1"]:
        text = (
            f" Best F1 @[ IoU=0.50 ] = {best['f1']:.3f} from score {best['threshold']:.3f} on: precision "
            f"{best['precision']:.3f}, recall {best['recall']:.3f}"
        )
    if not (1 < len(metrics.per_class) <= FEW if per_class is None else per_class):
        return text
    columns = {"class": "", "objects": "", "AP": "", "AP50": "", "best F1": "", "threshold": "", "precision": "", "recall": ""}
    cells = [dict(zip(columns, shown_row(row), strict=True)) for row in found[1:]]
    return "\n".join([text, "", *(f" {line}" for line in files.format_table(cells, columns).splitlines())])


def shown_row(row: dict) -> list[str]:
    """A row as text; "-" where there is nothing to measure."""
    aps = [f"{row[name]:.3f}" if row[name] >= 0 else "-" for name in ("AP", "AP50")]
    best = [f"{row[name]:.3f}" if row["objects"] else "-" for name in ("f1", "threshold", "precision", "recall")]
    return [one_line(row["name"], 60), str(row["objects"]), *aps, *best]
