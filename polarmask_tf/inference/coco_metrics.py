"""The COCO numbers: polygons to RLE without bitmaps, then pycocotools."""

import contextlib
import dataclasses
import io

import numpy as np
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from polarmask_tf.data import segmentation
from polarmask_tf.errors import InputError


@dataclasses.dataclass(frozen=True)
class Metrics:
    """The 12 COCO numbers in COCO's order, each in [0, 1], or -1 where there is nothing to measure."""

    values: dict  # "AP", "AP50", "AP75", "APS", "APM", "APL", "AR1", "AR10", "AR<max>", "ARS", "ARM", "ARL" -> float
    max_detections: int
    iou_type: str
    images: int
    instances: int  # annotations, crowd regions included
    detections: int
    per_class: list  # {"category_id", "name", "objects", "AP", "AP50"} of each category, by id; crowd regions are no objects
    # A row of image, category (their ids), score and iou for each detection: its IoU with the object that it is matched with,
    # at 0.5 or more, or 0. What is matched with a crowd region is left out.
    matches: np.ndarray = dataclasses.field(compare=False, repr=False)
    # A row of image, category, annotation (their ids), area, score and iou for each object: of the detection that it is matched
    # with, or 0.
    objects: np.ndarray = dataclasses.field(compare=False, repr=False)
    calibration_error: float | None = None  # see calibration.py; None where there is nothing to measure
    score_iou_correlation: float | None = None  # Pearson's, of the detections with a match

    def to_dict(self):
        """For json.dump, without `matches` and `objects`."""
        return {key: value for key, value in vars(self).items() if key not in ("matches", "objects")}

    def why_empty(self):
        """Why all numbers are -1, in words; "" where they are not."""
        if self.values["AP"] >= 0:
            return ""
        crowd = f"; the {self.instances} annotations are crowd regions" if self.instances else ""
        return f"-1 stands for nothing to measure: none of the {self.images} images has an object to find{crowd}"


BINS = 15  # of equal width, between 0 and 1


def expected_calibration_error(scores, hits):
    """Mean distance of the score from the precision, over BINS bins of the scores [M] in [0, 1] by their part of the M hits
    (bool [M]) and misses."""
    place = np.clip((scores * BINS).astype(int), 0, BINS - 1)
    off = [abs(scores[place == i].sum() - hits[place == i].sum()) for i in range(BINS)]
    return float(sum(off) / max(len(scores), 1))


_IDS = [("image", np.int64), ("category", np.int64)]
_MATCH = [("score", np.float64), ("iou", np.float64)]


def _matches(coco_eval, annotations):
    """Metrics.matches and Metrics.objects of an evaluation of these annotations, which it numbers from 1 on."""
    rows, found = [], {}
    for image in coco_eval.evalImgs:
        if image is None or image["aRng"] != coco_eval.params.areaRng[0]:
            continue
        key = image["image_id"], image["category_id"]
        place = {annotation["id"]: i for i, annotation in enumerate(coco_eval._gts[key])}
        for i, score in enumerate(image["dtScores"]):
            match = int(image["dtMatches"][0, i])
            if not image["dtIgnore"][0, i]:
                iou = coco_eval.ious[key][i, place[match]] if match else 0.0
                rows.append((*key, score, iou))
                found[match] = (score, iou)
    objects = [
        (a["image_id"], a["category_id"], a.get("id", number), truth["area"], *found.get(number, (0.0, 0.0)))
        for number, (a, truth) in enumerate(zip(annotations, coco_eval.cocoGt.dataset["annotations"], strict=True), 1)
        if not truth["iscrowd"]
    ]
    about = [("annotation", np.int64), ("area", np.float64)]
    return np.array(rows, _IDS + _MATCH), np.array(objects, _IDS + about + _MATCH)


def check_rle_size(height, width):
    """InputError for a picture of more pixels than pycocotools counts."""
    if height * width >= 2**32:
        what = f"{width} x {height} pixels are too many for RLE masks"
        raise InputError(f"{what}; take polygons (--segmentation polygon, or GeoJSON)")


def polygons_to_rle(polygons, height, width):
    """Polygons float [M, R, 2] (x, y in pixels, R >= 3) -> M compressed RLEs {"size": [height, width], "counts": str}.

    What lies outside the image is cut off; a polygon with a coordinate that is not finite gets an empty mask.
    """
    polygons = np.array(polygons, np.float64)
    if len(polygons) == 0:
        return []
    check_rle_size(height, width)
    polygons[~np.isfinite(polygons).all(axis=(1, 2))] = 0
    # frPyObjects walks every edge pixel by pixel: a far vertex must not cost more than an image's width.
    polygons = np.clip(polygons, (-width, -height), (2 * width, 2 * height))
    rles = coco_mask.frPyObjects(list(polygons.reshape(len(polygons), -1)), int(height), int(width))
    for rle in rles:
        rle["counts"] = rle["counts"].decode("ascii")
    return rles


def detections_to_results(detections, image_id, classes, height, width, segmentation="rle"):
    """Detections of one image [height, width] -> COCO result dicts, with the original category ids.

    segmentation: "rle", or "polygon", [[x, y, x, y, ...]] to hundredths of a pixel, in pictures of any size.
    """
    boxes = np.array(detections.boxes, np.float64).reshape(-1, 4)
    boxes[:, 2:] -= boxes[:, :2]
    columns = (array.tolist() for array in (detections.classes, detections.scores, boxes.round(2)))
    if segmentation == "polygon":
        shapes = [[ring.ravel().tolist()] for ring in np.asarray(detections.polygons, np.float64).round(2)]
    else:
        shapes = polygons_to_rle(detections.polygons, height, width)
    return [
        dict(image_id=image_id, category_id=classes[label]["category_id"], score=score, segmentation=shape, bbox=box)
        for shape, label, score, box in zip(shapes, *columns, strict=True)
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
            theirs, ours = result["segmentation"]["size"], [image["height"], image["width"]]
            what = f"the results' masks are {theirs}, the ground truth says {ours} (height, width)"
            raise InputError(f"image {image['id']}: {what}")

    def area(result):  # of the mask, which says which size range a false positive belongs to
        return coco_mask.area(result["segmentation"]) if iou_type == "segm" else result["bbox"][2] * result["bbox"][3]

    results = [dict(result, iscrowd=0, area=area(result)) for result in results]
    return _index(truth.dataset["images"], truth.dataset["categories"], results)


def check_max_detections(number):
    """InputError for fewer than COCO's numbers are of."""
    if number <= 10:
        raise InputError(f"max_detections is {number}; it must be more than 10, for which AR10 stands")


def coco_metrics(ground_truth, results, *, max_detections=100, iou_type="segm"):
    """The 12 COCO numbers of `results` (list of COCO result dicts) against `ground_truth` (COCO dict) -> Metrics.

    `max_detections` an image replaces COCO's 100 for all numbers but AR1 and AR10. iou_type is "segm" or "bbox". The
    arguments are not changed. Raises InputError for results of unknown images and for unusable ground truth.
    """
    check_max_detections(max_detections)
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
    counts = len(truth.dataset["images"]), len(truth.dataset["annotations"]), len(results)
    matches, objects = _matches(coco_eval, ground_truth["annotations"])
    classes = [
        {
            "category_id": int(c),
            "name": names[c],
            "objects": int((objects["category"] == c).sum()),
            "AP": ap(category=k),
            "AP50": ap(0.5, category=k),
        }
        for k, c in enumerate(params.catIds)
    ]
    hits = matches[matches["iou"] > 0]
    varied = len(hits) > 1 and hits["score"].std() > 0 and hits["iou"].std() > 0
    return Metrics(
        values,
        max_detections,
        iou_type,
        *counts,
        classes,
        matches,
        objects,
        expected_calibration_error(matches["score"], matches["iou"] > 0) if len(matches) else None,
        float(np.corrcoef(hits["score"], hits["iou"])[0, 1]) if varied else None,
    )


def _mean(values):
    values = values[values > -1]
    return float(np.mean(values)) if values.size else -1.0


def format_table(metrics):
    """Metrics -> COCO's familiar twelve lines, and why there are no numbers."""
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
    if metrics.calibration_error is not None:
        correlation = metrics.score_iou_correlation
        tail = f"; correlation of score and mask IoU of hits = {correlation:0.3f}" if correlation is not None else ""
        lines.append(f" Expected calibration error of scores @[ IoU=0.50 ] = {metrics.calibration_error:0.3f}{tail}")
    if metrics.why_empty():
        lines.append(f" {metrics.why_empty()}")
    return "\n".join(lines)
