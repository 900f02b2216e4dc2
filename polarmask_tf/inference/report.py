"""`polarmask evaluate --report`: one page that says what a model finds, from which score on, and what makes it lose.

An object counts as found where a detection matches it at mask IoU 0.5 with a score that would be shown, see thresholds.py.
"""

from __future__ import annotations

import typing

import numpy as np

from polarmask_tf import files
from polarmask_tf.data import dataset, records
from polarmask_tf.errors import InputError, counted
from polarmask_tf.inference import ceiling, html, thresholds
from polarmask_tf.inference.coco_metrics import BINS, Metrics, format_table
from polarmask_tf.inference.predictor import Predictor
from polarmask_tf.inference.results import read_image
from polarmask_tf.inference.truth import cell

CEILINGS = (0.0, 0.5, 0.7, 0.8, 0.85, 0.9, 0.95, 1.0)  # between which objects are grouped
WORST = 12  # pictures
_RAYS = 36  # of an export of an earlier version, which does not say it


def ceilings(data, metrics: Metrics, rays: int, limit: int | None = None) -> np.ndarray:
    """Of each row of metrics.objects, from the mass center, float64; nan for what training leaves out."""
    _, _, images, max_edges, report = ceiling.read(data, limit)
    rebuild = ceiling.rebuilder((rays,), ("mass",), max_edges)
    known = {}
    for image in images:
        known |= {(image["id"], a["id"]): its[0] for a, its in ceiling.ceilings(image, rebuild, report)}
    keys = zip(metrics.objects["image"].tolist(), metrics.objects["annotation"].tolist(), strict=True)
    return np.array([known.get(key, np.nan) for key in keys], np.float64)


def least_scores(metrics: Metrics) -> dict[int, float]:
    """Category id -> from which score on a model evaluated so shows detections."""
    every, _ = thresholds.find(metrics)
    ids = [entry["category_id"] for entry in metrics.per_class]
    found = thresholds.shown(metrics, ids) or {"classes": [every.threshold] * len(ids)}
    return dict(zip(ids, found["classes"], strict=True))


def _is_shown(rows: np.ndarray, least: dict) -> np.ndarray:
    return rows["score"] >= np.array([least[c] for c in rows["category"].tolist()], np.float64)


def groups(metrics: Metrics, ceilings: np.ndarray) -> dict[str, list[dict]]:
    """{"size", "ceiling": rows}: how objects of COCO's sizes, and of each ceiling, are found.

    A row is {"name", "objects", "ceiling" (mean), "recall", "recall75" (with IoU 0.75 or more), "iou" and "found_ceiling" (mean
    IoU and ceiling of those found; None without any)}, "AP" too of a size.
    """
    objects = metrics.objects
    found = (objects["iou"] > 0) & _is_shown(objects, least_scores(metrics))

    def row(name, chosen):
        hits = chosen & found
        mean = lambda values: float(np.nanmean(values)) if np.isfinite(values).any() else None  # noqa: E731
        return {
            "name": name,
            "objects": int(chosen.sum()),
            "ceiling": mean(ceilings[chosen]),
            "recall": mean(found[chosen].astype(float)),
            "recall75": mean((found & (objects["iou"] >= 0.75))[chosen].astype(float)),
            "iou": mean(objects["iou"][hits]),
            "found_ceiling": mean(ceilings[hits]),
        }

    all_of_them = np.ones(len(objects), bool)
    by_size = [{**row("all", all_of_them), "AP": metrics.values["AP"]}]
    for name, (low, high) in ceiling.SIZES.items():
        chosen = (objects["area"] >= low) & (objects["area"] < high)
        by_size.append({**row(name, chosen), "AP": metrics.values[f"AP{name[0].upper()}"]})
    edges = list(zip(CEILINGS, (*CEILINGS[1:-1], np.inf), strict=False))
    by_ceiling = [row(f"{low:g} to {min(high, 1):g}", (ceilings >= low) & (ceilings < high)) for low, high in edges]
    by_ceiling.append(row("of at most a pixel", np.isnan(ceilings)))
    return {"size": by_size, "ceiling": [row for row in by_ceiling if row["objects"]]}


def worst_images(metrics: Metrics) -> list[dict]:
    """Up to WORST images with most objects missed and detections too many: {"image", "missed", "false", "found", "f1"} each."""
    least = least_scores(metrics)
    objects, matches = metrics.objects, metrics.matches[_is_shown(metrics.matches, least)]
    found = (objects["iou"] > 0) & _is_shown(objects, least)
    rows = []
    for image in np.union1d(objects["image"], matches["image"]).tolist():
        of = found[objects["image"] == image]
        false = int((matches["iou"][matches["image"] == image] == 0).sum())
        hits, missed = int(of.sum()), int((~of).sum())
        f1 = 2 * hits / max(2 * hits + missed + false, 1)
        rows.append({"image": image, "missed": missed, "false": false, "found": hits, "f1": f1})
    rows = [row for row in rows if row["missed"] + row["false"]]
    return sorted(rows, key=lambda row: (-row["missed"] - row["false"], row["f1"], row["image"]))[:WORST]


def write(path, predictor: Predictor, data, metrics: Metrics, *, model, limit: int | None = None) -> dict:
    """Writes the page and returns what it says beyond Metrics, for json.dump: {"rays", "by_size", "by_ceiling", "worst"}.

    `data` is the directory, or what dataset.load has told of it, `limit` what the metrics were measured with. The worst
    images are predicted again, for their pictures. InputError where the data have been converted again since.
    """
    data = dataset.load(data)
    rays = predictor.rays or _RAYS
    by = groups(metrics, ceilings(data.directory, metrics, rays, limit))
    found = {"rays": rays, "by_size": by["size"], "by_ceiling": by["ceiling"], "worst": worst_images(metrics)}
    page = _page(predictor, data, metrics, found, str(model))
    if again := dataset.converted_again(data):
        raise InputError(again)
    files.atomic_write(path, page)
    return found


def _page(predictor, data, metrics, found, model) -> str:
    best, *classes = thresholds.rows(metrics)
    head = ["class", "objects", "AP", "AP50", "best F1", "from score", "precision", "recall"]
    rows = [best, *classes] if len(classes) > 1 else [best]
    body = [
        f"<h1>{html.text(model)}</h1>",
        f"<p class=quiet>{counted(metrics.images, 'image')} of {html.text(data.directory)}, "
        f"{counted(len(metrics.objects), 'object')} to find, "
        f"up to {counted(metrics.max_detections, 'detection')} an image. Masks by pycocotools.</p>",
        html.table(head, map(thresholds.shown_row, rows)),
        "<p>Precision: how much of what is shown is right, at mask IoU 0.5. Recall: how many of the objects are found. F1 "
        "counts both alike; <code>predict</code> with a run that was evaluated on all pictures goes by the score where it is "
        f"best, of classes with fewer than {thresholds.LEAST} objects by that of all. AP averages over all scores, and "
        "over IoU 0.5 to 0.95.</p>",
        "<h2>Scores</h2>",
        _curves(metrics, best),
        "<h2>Rays or network</h2>",
        f"<p>{html.text(verdict(found))}</p>",
        "<p>The ceiling of an object is the IoU with its mask of the polygon that perfect rays would give it: low for what is "
        "not star-shaped, in several parts, or tiny. Where the mean IoU of found objects is near their ceiling, the rays lose; "
        "where it is far below, or recall is low, the network does.</p>",
        html.table(["ceiling", *_GROUP_HEAD], map(_group_row, found["by_ceiling"])),
        html.table(["size", *_GROUP_HEAD, "AP"], [[*_group_row(r), _number(r["AP"])] for r in found["by_size"]]),
        "<p class=quiet>Small: below 32 x 32 pixels of the image, large: from 96 x 96 on. Found: a detection that is shown "
        "matches at IoU 0.5.</p>",
        "<h2>Worst images</h2>",
        _worst(predictor, data, metrics, found["worst"]),
        "<h2>COCO's numbers</h2>",
        f"<pre>{'<br>'.join(html.text(line.strip()) for line in format_table(metrics).splitlines())}</pre>",
    ]
    return html.page(f"{model}: evaluation", body)


def verdict(found: dict) -> str:
    """Of what `write` gives: what found objects lack of IoU 1, and who loses it; and how many are missed."""
    every, rays = found["by_size"][0], found["rays"]
    if every["iou"] is None or every["found_ceiling"] is None:
        return "No object is found."
    lost, by_rays = 1 - every["iou"], 1 - every["found_ceiling"]
    by_network = max(lost - by_rays, 0.0)
    who = "the network" if by_network > by_rays else "the rays"
    return (
        f"{100 * every['recall']:.0f} % of the objects are found, with a mean IoU of {every['iou']:.3f}; perfect polygons of "
        f"{rays} rays would have {every['found_ceiling']:.3f}. So of {lost:.3f} that masks lack, {by_rays:.3f} is lost by the "
        f"rays and {by_network:.3f} by the network: {who} lose{'s' if who == 'the network' else ''} more."
    )


_GROUP_HEAD = ["objects", "mean ceiling", "found", "with IoU 0.75", "mean IoU of found", "their ceiling"]


def _number(value):
    return "-" if value is None or value < 0 else f"{value:.3f}"


def _group_row(row):
    return [row["name"], row["objects"], *(_number(row[k]) for k in ("ceiling", "recall", "recall75", "iou", "found_ceiling"))]


def _curves(metrics, best) -> str:
    matches, objects = metrics.matches, len(metrics.objects)
    lines = {"all classes": thresholds.curve(matches["score"], matches["iou"] > 0, objects)}
    if 1 < len(metrics.per_class) <= thresholds.FEW:
        for entry in metrics.per_class:
            of = matches[matches["category"] == entry["category_id"]]
            lines[entry["name"]] = thresholds.curve(of["score"], of["iou"] > 0, entry["objects"])
    recall = {name: (line.recall, line.precision) for name, line in lines.items()}
    f1 = {name: (line.scores, line.f1) for name, line in lines.items()}
    title = "What a score promises" + (f" (error {metrics.calibration_error:.3f})" if len(matches) else "")
    charts = [
        html.line_chart("Precision and recall", recall, "recall", "precision", marks=[(best["recall"], best["precision"])]),
        html.line_chart("F1", f1, "from this score on", "F1", marks=[(best["threshold"], best["f1"])]),
        html.line_chart(title, {"": reliability(matches)}, "score", "part that is right", diagonal=True),
    ]
    return f"<div class=row>{''.join(charts)}</div>"


def reliability(matches: np.ndarray) -> tuple[list[float], list[float]]:
    """(mean score, part that is right) of each of BINS bins of the scores that holds a detection."""
    place = np.clip((matches["score"] * BINS).astype(int), 0, BINS - 1)
    bins = [matches[place == i] for i in range(BINS)]
    return [float(b["score"].mean()) for b in bins if len(b)], [float((b["iou"] > 0).mean()) for b in bins if len(b)]


def _worst(predictor, data, metrics, rows: typing.Sequence[dict]) -> str:
    if not rows:
        return "<p>Every object is found, and nothing else.</p>"
    truth, least = records.read_ground_truth(data), least_scores(metrics)
    scores = [least.get(entry["category_id"], 1.0) for entry in predictor.classes]
    entries = {image["id"]: image for image in truth["images"]}
    wanted, drawn = {row["image"] for row in rows}, {}
    for image_id, encoded in records.iter_images(data):
        if image_id not in wanted:
            continue
        image, entry = read_image(encoded), entries[image_id]
        found = predictor([image])[0].above(scores)
        *pictures, _ = cell(entry["file_name"], image, found, predictor.classes, entry, truth)
        drawn[image_id] = "".join(
            html.picture(picture, caption) for picture, caption in zip(pictures, ("ground truth", "prediction"), strict=True)
        )
        if len(drawn) == len(wanted):
            break
    parts = []
    for row in rows:
        if row["image"] in drawn:
            what = f"{row['missed']} missed, {row['false']} too many, {row['found']} found: F1 {row['f1']:.2f}"
            name = f"{entries[row['image']]['file_name']} (image {row['image']})"
            parts.append(f"<p><b>{html.text(name)}</b>: {html.text(what)}</p><div class=row>{drawn[row['image']]}</div>")
    return "".join(parts)
