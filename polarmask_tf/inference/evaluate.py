"""`polarmask evaluate`: the COCO numbers of a predictor on converted data."""

import itertools
import sys
from pathlib import Path

from tqdm import tqdm

from polarmask_tf.data import dataset, records
from polarmask_tf.data.report import Report
from polarmask_tf.data.sources import coco
from polarmask_tf.errors import InputError
from polarmask_tf.inference.coco_metrics import check_max_detections, coco_metrics, detections_to_results
from polarmask_tf.inference.results import read_image
from polarmask_tf.weights.runs import read_run
from polarmask_tf.weights.state_dict import summarize


def read_coco(path):
    """COCO JSON file -> COCO dict of its usable images and annotations; the others are counted and named on stderr.

    Raises InputError if the file as a whole is not usable.
    """
    report = Report()
    images, classes = coco.read(Path(path), report)
    for line in report.lines():
        print(line, file=sys.stderr)
    annotations = [
        {**annotation, "image_id": image["id"], "category_id": classes[annotation["label"]]["category_id"]}
        for image in images
        for annotation in image["annotations"]
    ]
    categories = [{"id": entry["category_id"], "name": entry["name"]} for entry in classes]
    return {"images": images, "annotations": annotations, "categories": categories}


def _check_classes(classes, categories, data):
    model = {entry["category_id"]: entry["name"] for entry in classes}
    names = {category["id"]: category["name"] for category in categories}
    wrong = [
        f"{i} ({model.get(i, '-')} in the model, {names.get(i, '-')} in the data)"
        for i in sorted({*model, *names})
        if model.get(i) != names.get(i)
    ]
    if wrong:
        what = f"other classes than the model's: category {summarize(wrong, 5)}"
        raise InputError(f"{data}: {what}; evaluate on data converted from the same category list")


def default_data(model):
    """data.val of a run directory; InputError where there is none."""
    if not (Path(model) / "config.yaml").is_file():
        raise InputError(f"{model}: give --data DIR, converted data; only a run directory knows its own")
    config, _ = read_run(Path(model))
    if not config.data.val:
        raise InputError(f"{model}: was trained without data.val: give --data DIR, converted data to evaluate on")
    return config.data.val


def _batches(items, size):
    items = iter(items)
    while batch := list(itertools.islice(items, size)):
        yield batch


def evaluate(
    predictor,
    data,
    *,
    max_detections=100,
    limit=None,
    annotations=None,
    progress=True,
    worker=(0, 1),
    gather=None,
):
    """Run `predictor` over converted data and measure its polygons against the original masks -> Metrics.

    `data` is the directory, or what dataset.load has told of it: of a later conversion nothing is taken.
    `limit` takes the first images only; `annotations` is a COCO JSON to measure against in place of the records' own
    annotations (its other images count as missed, unless there is a limit). Of several workers, each calls this with its
    `worker` (index, number) and looks at its share of the images; gather(list) then returns the workers' lists joined.
    Raises InputError for classes that differ and for images that cannot be decoded.
    """
    if limit is not None and limit < 1:
        raise InputError(f"limit is {limit}, must be at least 1")
    check_max_detections(max_detections)  # before the work, not behind it
    info = dataset.load(data)  # once: pictures and truth are of one conversion
    data = info.directory
    truth = records.read_ground_truth(info) if annotations is None else read_coco(annotations)
    _check_classes(predictor.classes, truth["categories"], annotations or data)
    known = {image["id"] for image in truth["images"]}
    results, seen = [], set()
    index, workers = worker
    total = len(range(index, min(len(known), limit or len(known)), workers))
    with tqdm(total=total, desc="evaluate", unit="image", disable=not progress, leave=gather is None) as bar:
        for batch in _batches(itertools.islice(records.iter_images(info), index, limit, workers), predictor.batch_size):
            images = []
            for image_id, encoded in batch:
                if image_id not in known:
                    raise InputError(f"{annotations or data}: no image {image_id!r}, which {data} holds")
                try:
                    images.append(read_image(encoded))
                except InputError as error:
                    raise InputError(f"{data}: image {image_id}: {error}") from None
            for (image_id, _), image, found in zip(batch, images, predictor(images), strict=True):
                results += detections_to_results(found, image_id, predictor.classes, *image.shape[:2])
                seen.add(image_id)
            bar.update(len(batch))
    if gather:
        results = gather(results)
    if limit is not None:
        truth |= {"images": [image for image in truth["images"] if image["id"] in seen]}
        truth |= {"annotations": [entry for entry in truth["annotations"] if entry["image_id"] in seen]}
    return coco_metrics(truth, results, max_detections=max_detections)
