"""COCO numbers of a predictor: polygons to RLE without bitmaps, then pycocotools."""

import contextlib
import dataclasses
import io
import itertools
import sys
from pathlib import Path

import numpy as np
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from tqdm import tqdm

from polarmask_tf.data import records, segmentation
from polarmask_tf.data.sources import coco
from polarmask_tf.errors import InputError
from polarmask_tf.lite import read_image


@dataclasses.dataclass(frozen=True)
class Metrics:
    """The 12 COCO numbers in COCO's order, each in [0, 1], or -1 where there is nothing to measure."""

    values: dict  # "AP", "AP50", "AP75", "APS", "APM", "APL", "AR1", "AR10", "AR<max>", "ARS", "ARM", "ARL" -> float
    max_detections: int
    iou_type: str
    images: int
    instances: int  # annotations, crowd regions included
    detections: int
    per_class: list | None = None  # {"category_id", "name", "AP"} of each category, by id

    def to_dict(self):
        """For json.dump."""
        return dataclasses.asdict(self)


def polygons_to_rle(polygons, height, width):
    """Polygons float [M, R, 2] (x, y in pixels, R >= 3) -> M compressed RLEs {"size": [height, width], "counts": str}.

    What lies outside the image is cut off; a polygon with a coordinate that is not finite gets an empty mask.
    """
    polygons = np.array(polygons, np.float64)
    if len(polygons) == 0:
        return []
    polygons[~np.isfinite(polygons).all(axis=(1, 2))] = 0
    # frPyObjects walks every edge pixel by pixel: a far vertex must not cost more than an image's width.
    polygons = np.clip(polygons, (-width, -height), (2 * width, 2 * height))
    rles = coco_mask.frPyObjects(list(polygons.reshape(len(polygons), -1)), int(height), int(width))
    for rle in rles:
        rle["counts"] = rle["counts"].decode("ascii")
    return rles


def detections_to_results(detections, image_id, classes, height, width):
    """Detections of one image [height, width] -> COCO result dicts, with the original category ids."""
    boxes = np.array(detections.boxes, np.float64).reshape(-1, 4)
    boxes[:, 2:] -= boxes[:, :2]
    return [
        dict(image_id=image_id, category_id=classes[label]["category_id"], score=score, segmentation=rle, bbox=box)
        for rle, label, score, box in zip(
            polygons_to_rle(detections.polygons, height, width),
            detections.classes.tolist(),
            detections.scores.tolist(),
            boxes.round(2).tolist(),
            strict=True,
        )
    ]


def _quiet(function, *args):
    with contextlib.redirect_stdout(io.StringIO()):
        return function(*args)


def _index(images, categories, annotations):
    """A COCO index of annotations whose ids are made 1, 2, ...: COCOeval takes a match with id 0 for none."""
    index = COCO()
    for number, annotation in enumerate(annotations, 1):
        annotation["id"] = number
    index.dataset = {"images": images, "categories": categories, "annotations": annotations}
    _quiet(index.createIndex)
    return index


def annotation_rle(annotation, size):
    """The RLE of a COCO annotation in any of its forms (rings, uncompressed, compressed), as pycocotools' annToRLE makes it.

    Raises InputError if its segmentation is unusable or not of `size` ([height, width] of its image).
    """
    shape = annotation.get("segmentation")
    if isinstance(shape, dict) and isinstance(shape.get("counts"), bytes):  # by pycocotools, not out of a JSON file
        if list(shape["size"]) != size:
            raise _bad_annotation(annotation, f"its mask is {list(shape['size'])}, the image is {size} (height, width)")
        return shape
    try:
        return segmentation.to_rle(shape, *size)
    except segmentation.Unusable as reason:
        raise _bad_annotation(annotation, str(reason)) from None


def _bad_annotation(annotation, what):
    return InputError(f"annotation {annotation.get('id')} of image {annotation.get('image_id')}: {what}")


def _ground_truth(dataset, iou_type):
    sizes = {image["id"]: [image["height"], image["width"]] for image in dataset["images"]}
    annotations = []
    for annotation in dataset["annotations"]:
        if annotation["image_id"] not in sizes:
            raise _bad_annotation(annotation, "the ground truth has no such image")
        annotation = {"iscrowd": 0, **annotation}
        without_area = annotation.get("area") is None
        if iou_type == "segm" or "bbox" not in annotation or without_area:
            rle = annotation["segmentation"] = annotation_rle(annotation, sizes[annotation["image_id"]])
            if without_area:
                annotation["area"] = float(coco_mask.area(rle))
            if "bbox" not in annotation:
                annotation["bbox"] = coco_mask.toBbox(rle).tolist()
        annotations.append(annotation)
    return _index(dataset["images"], dataset["categories"], annotations)


def _results(truth, results, iou_type):
    for result in results:
        if result["image_id"] not in truth.imgs:
            raise InputError(f"results name image {result['image_id']!r}, which the ground truth does not have")
        image = truth.imgs[result["image_id"]]
        if iou_type == "segm" and list(result["segmentation"]["size"]) != [image["height"], image["width"]]:
            raise InputError(
                f"image {image['id']}: the results' masks are {result['segmentation']['size']}, "
                f"the ground truth says {[image['height'], image['width']]} (height, width)"
            )
    results = [dict(result, iscrowd=0) for result in results]
    if iou_type == "segm":  # the mask's area says which size range a false positive belongs to
        # One call each: under NumPy 2, pycocotools 2.0.11 fails on lists of more than 255 masks.
        areas = [coco_mask.area(result["segmentation"]) for result in results]
    else:
        areas = [result["bbox"][2] * result["bbox"][3] for result in results]
    for result, area in zip(results, areas, strict=True):
        result["area"] = area
    return _index(truth.dataset["images"], truth.dataset["categories"], results)


def coco_metrics(ground_truth, results, *, max_detections=100, iou_type="segm", per_class=False):
    """The 12 COCO numbers of `results` (list of COCO result dicts) against `ground_truth` (COCO dict) -> Metrics.

    `max_detections` an image replaces COCO's 100 for all numbers but AR1 and AR10. iou_type is "segm" or "bbox". The
    arguments are not changed. Raises InputError for results of unknown images and for unusable ground truth.
    """
    if max_detections <= 10:
        raise InputError(f"max_detections is {max_detections}; it must be more than 10, for which AR10 stands")
    truth = _ground_truth(ground_truth, iou_type)
    coco_eval = COCOeval(truth, _results(truth, results, iou_type), iou_type)
    params = coco_eval.params
    params.maxDets = [1, 10, max_detections]
    _quiet(coco_eval.evaluate)
    _quiet(coco_eval.accumulate)
    # Axes of precision: IoU, recall, class, area, maxDets; of recall: IoU, class, area, maxDets. -1: nothing to find.
    precision, recall = coco_eval.eval["precision"], coco_eval.eval["recall"]
    limits = list(params.maxDets)  # evaluate() has sorted them
    most, areas = limits.index(max_detections), dict(zip(params.areaRngLbl, range(4), strict=True))

    def ap(iou=None, area="all", category=slice(None)):
        ious = slice(None) if iou is None else np.where(np.isclose(params.iouThrs, iou))[0]
        return _mean(precision[ious, :, category, areas[area], most])

    def ar(limit, area="all"):
        return _mean(recall[:, :, areas[area], limits.index(limit)])

    values = {"AP": ap(), "AP50": ap(0.5), "AP75": ap(0.75)}
    values |= {"APS": ap(area="small"), "APM": ap(area="medium"), "APL": ap(area="large")}
    values |= {f"AR{limit}": ar(limit) for limit in (1, 10, max_detections)}
    values |= {f"AR{size[0].upper()}": ar(max_detections, size) for size in ("small", "medium", "large")}
    names = {category["id"]: category["name"] for category in ground_truth["categories"]}
    classes = [{"category_id": int(c), "name": names[c], "AP": ap(category=k)} for k, c in enumerate(params.catIds)]
    counts = len(truth.dataset["images"]), len(truth.dataset["annotations"]), len(results)
    return Metrics(values, max_detections, iou_type, *counts, classes if per_class else None)


def _mean(values):
    values = values[values > -1]
    return float(np.mean(values)) if values.size else -1.0


def format_table(metrics):
    """Metrics -> COCO's familiar twelve lines, then one line a class if per-class numbers are there."""
    most = metrics.max_detections
    rows = [("AP", iou, "all", most) for iou in ("0.50:0.95", "0.50", "0.75")]
    rows += [("AP", "0.50:0.95", area, most) for area in ("small", "medium", "large")]
    rows += [("AR", "0.50:0.95", "all", limit) for limit in (1, 10, most)]
    rows += [("AR", "0.50:0.95", area, most) for area in ("small", "medium", "large")]
    titles = {"AP": "Average Precision  (AP)", "AR": "Average Recall     (AR)"}
    width = max(3, len(str(most)))
    lines = [
        f" {titles[kind]} @[ IoU={iou:<9} | area={area:>6} | maxDets={limit:>{width}} ] = {value:0.3f}"
        for (kind, iou, area, limit), value in zip(rows, metrics.values.values(), strict=True)
    ]
    if metrics.per_class is not None:
        width = max((len(entry["name"]) for entry in metrics.per_class), default=0)
        lines += ["", " AP of each class:"]
        for entry in metrics.per_class:
            ap = f"{entry['AP']:.3f}" if entry["AP"] > -1 else "no ground truth"
            lines.append(f"  {entry['name']:<{width}}  {ap}")
    return "\n".join(lines)


def read_coco(path):
    """COCO JSON file -> COCO dict of its usable images and annotations; the others are counted and named on stderr.

    Raises InputError if the file as a whole is not usable.
    """
    report = coco.Report()
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
    """The model's category ids and names must be the data set's."""
    model = {entry["category_id"]: entry["name"] for entry in classes}
    names = {category["id"]: category["name"] for category in categories}
    wrong = [
        f"{i} ({model.get(i, '-')} in the model, {names.get(i, '-')} in the data)"
        for i in sorted({*model, *names})
        if model.get(i) != names.get(i)
    ]
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise InputError(
            f"{data}: other classes than the model's: category {', '.join(wrong[:5])}{more}; "
            "evaluate on data converted from the same category list"
        )


def _batches(items, size):
    items = iter(items)
    while batch := list(itertools.islice(items, size)):
        yield batch


def evaluate(
    predictor,
    data,
    *,
    max_detections=100,
    per_class=False,
    limit=None,
    annotations=None,
    progress=True,
    worker=(0, 1),
    gather=None,
):
    """Run `predictor` over a converted data directory and measure its polygons against the original masks -> Metrics.

    `limit` takes the first images only; `annotations` is a COCO JSON to measure against in place of the records' own
    annotations (its other images count as missed, unless there is a limit). Of several workers, each calls this with its
    `worker` (index, number) and looks at its share of the images; gather(list) then returns the workers' lists joined.
    Raises InputError for classes that differ and for images that cannot be decoded.
    """
    if limit is not None and limit < 1:
        raise InputError(f"limit is {limit}, must be at least 1")
    truth = records.read_ground_truth(data) if annotations is None else read_coco(annotations)
    _check_classes(predictor.classes, truth["categories"], annotations or data)
    known = {image["id"] for image in truth["images"]}
    results, seen = [], set()
    index, workers = worker
    total = len(range(index, min(len(known), limit or len(known)), workers))
    with tqdm(total=total, desc="evaluate", unit="image", disable=not progress, leave=gather is None) as bar:
        for batch in _batches(itertools.islice(records.iter_images(data), index, limit, workers), predictor.batch_size):
            images = []
            for image_id, encoded in batch:
                if image_id not in known:
                    raise InputError(f"{annotations or data}: no image {image_id!r}, which {data} holds")
                try:
                    images.append(read_image(io.BytesIO(encoded)))
                except ValueError as error:
                    raise InputError(f"{data}: image {image_id}: {error}") from None
            for (image_id, _), image, found in zip(batch, images, predictor(images), strict=True):
                results += detections_to_results(found, image_id, predictor.classes, *image.shape[:2])
                seen.add(image_id)
            bar.update(len(batch))
    if gather:
        results = gather(results)
    if limit is not None:
        truth = dict(
            truth,
            images=[image for image in truth["images"] if image["id"] in seen],
            annotations=[entry for entry in truth["annotations"] if entry["image_id"] in seen],
        )
    return coco_metrics(truth, results, max_detections=max_detections, per_class=per_class)
