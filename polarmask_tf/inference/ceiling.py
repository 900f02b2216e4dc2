"""The ceiling of each object: the IoU with its mask of the polygon that perfect rays would give it.

The rays are those that training teaches (data.transforms.instances): to the farthest hit on the largest part of an object,
from that part's mass center or from the box center. The mask is pycocotools' own of the original annotation, with all parts
and holes.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
import os
import typing
from pathlib import Path

import numpy as np
import tensorflow as tf
from pycocotools import mask as coco_mask

from polarmask_tf.data import dataset, records, segmentation, transforms
from polarmask_tf.data.instances import record_of
from polarmask_tf.data.report import Report, Unusable
from polarmask_tf.data.sources import coco
from polarmask_tf.errors import InputError
from polarmask_tf.inference.coco_metrics import polygons_to_rle
from polarmask_tf.ops import geometry

# Square pixels: from, and below. COCO's own ranges overlap at their ends.
SIZES = {"small": (0, 32**2), "medium": (32**2, 96**2), "large": (96**2, float("inf"))}
_MAX_EDGES = 96  # of `polarmask convert`, so that a file and what is converted from it give the same numbers
_CHUNK = 128  # instances at once


def ceilings(image: dict, rebuild: typing.Callable, report: Report) -> list[tuple[dict, np.ndarray]]:
    """(annotation, its ceilings) of an image as `read` gives them: float [K], for each polygon that `rebuild` makes."""
    annotations, polygons = rebuild(image, report)
    rles = [polygons_to_rle(some, image["height"], image["width"]) for some in polygons]
    return [
        (annotation, coco_mask.iou(its, [annotation["rle"]], [0])[:, 0])
        for annotation, *its in zip(annotations, *rles, strict=True)
    ]


def read(source, limit: int | None = None):
    """(number of images, classes, iterator of images, most edges of an instance, report) of a file or directory.

    Images are {"id", "height", "width", "annotations": [{"label", "category_id", "area", "rings": [float [V, 2], ...],
    "rle"}, ...]} without crowds and unusable annotations; those are counted in the report while iterating.
    """
    source, report = Path(source), Report()
    if os.path.isdir(source):
        info = dataset.load(source)
        for reason, number in info.skipped.items():
            report.skip(f"{reason} (by convert)", str(source / "dataset.json"), number)
        images = _of_records(info)
        count, classes, max_edges = info.num_images, info.classes, info.max_edges
    else:
        entries, classes = coco.read(source, report)
        images = ((image, [(a, a["segmentation"], None) for a in image["annotations"]]) for image in entries)
        count, max_edges = len(entries), _MAX_EDGES
    return min(count, limit or count), classes, _usable(itertools.islice(images, limit), classes, report), max_edges, report


def _of_records(info):
    """Images of a converted data set with (annotation, segmentation, rings) of all that is in them."""
    truth = records.read_ground_truth(info.directory)  # checks every shard
    label_of = {c["category_id"]: label for label, c in enumerate(info.classes)}
    of_image = collections.defaultdict(list)
    for annotation in truth["annotations"]:
        of_image[annotation["image_id"]].append(annotation | {"label": label_of[annotation["category_id"]]})

    def parsed(serialized):
        record = records.parse(serialized)
        return record, records.fault(record, info)

    shards = tf.data.TFRecordDataset([str(path) for path in info.shard_paths]).map(parsed).as_numpy_iterator()
    for image, (record, fault) in zip(truth["images"], shards, strict=True):
        if fault:
            raise InputError(f"{info.directory}: image {image['id']}: {fault.decode()}; run `polarmask convert` again")
        rings = np.split(record["xy"], np.cumsum(record["ring_lengths"]))[:-1]
        rings_of = collections.defaultdict(list)
        for index, ring in zip(record["ring_instance"], rings, strict=True):
            rings_of[index].append(ring)
        yield image, [(a, a["segmentation"], rings_of[i]) for i, a in enumerate(of_image[image["id"]])]  # in one order


def image_of(image: dict, features, most: int) -> dict:
    """Up to `most` objects, evenly chosen, of a record as records.iter_records gives it: {"height", "width", "annotations":
    [{"rings", "rle"}, ...]}, what `ceilings` needs of an image. Of a damaged record there are none."""
    lengths, instance, crowd = (
        np.array(features[f"image/object/{key}"].int64_list.value, np.int64)
        for key in ("polygon/ring_lengths", "polygon/ring_instance", "is_crowd")
    )
    xy = np.array(features["image/object/polygon/xy"].float_list.value, np.float32)
    counts = features["image/object/rle"].bytes_list.value
    size = image["height"], image["width"]
    found: dict = {"height": size[0], "width": size[1], "annotations": []}
    if len(xy) != 2 * lengths.sum() or len(lengths) != len(instance) or (lengths < 1).any() or len(counts) != len(crowd):
        return found
    rings = np.split(xy.reshape(-1, 2), np.cumsum(lengths))[:-1]
    chosen = np.flatnonzero((crowd == 0) & np.isin(np.arange(len(crowd)), instance))
    for index in chosen[:: max(1, -(-len(chosen) // most))].tolist():
        with contextlib.suppress(Unusable):
            rle = segmentation.to_rle({"size": list(size), "counts": counts[index].decode(errors="replace")}, *size)
            its = [ring for ring, of in zip(rings, instance, strict=True) if of == index]
            found["annotations"].append({"id": index, "rings": its, "rle": rle})
    return found


def _usable(images, classes, report):
    for image, found in images:
        size, kept = (image["height"], image["width"]), []
        for annotation, shape, rings in found:
            where = f"annotation {annotation['id']} of image {image['id']}"
            try:
                if annotation["iscrowd"]:
                    raise Unusable("crowd region")
                rle, rings = (shape, rings) if rings is not None else segmentation.region(shape, *size, _MAX_EDGES)[:2]
            except Unusable as reason:
                report.skip(str(reason), where)
                continue
            area = float(coco_mask.area(rle)) if annotation["area"] is None else annotation["area"]
            category = classes[annotation["label"]]["category_id"]
            names = {"id": annotation["id"], "label": annotation["label"], "category_id": category}
            kept.append({**names, "area": area, "rings": rings, "rle": rle})
        yield {"id": image["id"], "height": size[0], "width": size[1], "annotations": kept}


def rebuilder(rays: typing.Sequence[int], centers: typing.Sequence[str], max_edges: int) -> typing.Callable:
    """A function (image, report) -> (K annotations, polygons) for images as `read` gives them.

    The polygons are float32 [K, n, 2] (x, y in pixels), one array for each center and number of rays, the rays running
    faster. Annotations of at most a pixel are left out, as in training, and counted in the report.
    """
    specs = {name: tf.TensorSpec([None], tf.int32) for name in ("labels", "ring_lengths", "ring_instance")}
    specs |= {"is_crowd": tf.TensorSpec([None], tf.bool), "xy": tf.TensorSpec([None, 2])}

    @tf.function(input_signature=[specs, tf.TensorSpec([2], tf.int32)], autograph=False)
    def polygons(record, size):
        nowhere = tf.zeros([0, 2])  # no location, since no targets are made of them here
        found = transforms.instances(
            record, record["xy"], size, nowhere, max_edges=max_edges, max_instances=_CHUNK, parts="largest", center="mass"
        )
        count = tf.reduce_sum(tf.cast(found["classes"] >= 0, tf.int32))
        order, middles, boxes, edges = (found[name][:count] for name in ("classes", "centers", "boxes", "edges"))
        used = tf.reduce_any(edges != 0, axis=[0, 2])
        edges = edges[:, : tf.reduce_max(tf.where(used, tf.range(max_edges) + 1, 1))]
        window = tf.tile(tf.cast([[0, 0, size[1], size[0]]], tf.float32), [count, 1])
        points = {"mass": middles, "box": (boxes[:, :2] + boxes[:, 2:]) / 2}

        def polygon(center, n):  # of 4 rays as in training
            lengths = geometry.box_rays(center, boxes) if n == 4 else geometry.ray_lengths(center, edges, n, window)
            return geometry.assemble(center, lengths)

        return order, [polygon(points[center], n) for center in centers for n in rays]

    def rebuild(image, report):
        annotations, parts = [], [[np.zeros((0, n, 2), np.float32)] for _ in centers for n in rays]
        for start in range(0, len(image["annotations"]), _CHUNK):
            chunk = image["annotations"][start : start + _CHUNK]
            record = record_of([annotation["rings"] for annotation in chunk])
            order, found = polygons(record, np.array([image["height"], image["width"]], np.int32))
            rows = np.argsort(order)  # they come sorted by area
            order = order.numpy()[rows].tolist()
            annotations += [chunk[index] for index in order]
            for part, some in zip(parts, found, strict=True):
                part.append(some.numpy()[rows])
            for index in sorted(set(range(len(chunk))) - set(order)):
                where = f"annotation {chunk[index]['id']} of image {image['id']}"
                report.skip("largest part covers at most one pixel", where)
        return annotations, [np.concatenate(part) for part in parts]

    return rebuild
