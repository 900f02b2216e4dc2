"""Ground truth beside predictions: which image of a COCO JSON a file is, and its instances as shapes."""

import itertools
import json
import os
import sys
from collections import Counter
from pathlib import Path

import numpy as np
from pycocotools import mask as coco_mask

from polarmask_tf import lite
from polarmask_tf.data.sources.source import each_key_once
from polarmask_tf.errors import InputError, nfc
from polarmask_tf.inference import visualize
from polarmask_tf.inference.coco_metrics import annotation_rle
from polarmask_tf.inference.evaluate import read_coco
from polarmask_tf.inference.inputs import some

MAX_JSON_BYTES = 2**32


def read(path):
    """The COCO dict of `path`; of one without annotations, like COCO's files of its test images, the images alone.

    "by_image" in it are the annotations by image id.
    """
    dataset = _read(path)
    by_image: dict = {}
    for annotation in dataset["annotations"]:
        by_image.setdefault(annotation["image_id"], []).append(annotation)
    return {**dataset, "by_image": by_image}


def _read(path):
    try:
        lite.check_file(path, MAX_JSON_BYTES)
        document = json.loads(Path(path).read_bytes(), object_pairs_hook=each_key_once)
    except (OSError, ValueError, RecursionError):
        return read_coco(path)  # which says what is wrong with it
    if not isinstance(document, dict) or not isinstance(document.get("images"), list) or document.get("annotations"):
        return read_coco(path)
    images = [
        image
        for image in document["images"]
        if isinstance(image, dict) and _is_id(image.get("id")) and isinstance(image.get("file_name"), str)
    ]
    if not images:
        raise InputError(f"{path}: names no images; its list 'images' needs objects with an integer 'id' and a 'file_name'")
    times = Counter(image["id"] for image in images)
    images = [image for image in images if times[image["id"]] == 1]
    if unusable := len(document["images"]) - len(images):
        why = "no 'id' or 'file_name', or an 'id' that several have"
        print(f"skipped {unusable} of {len(document['images'])} images of {path}: {why}", file=sys.stderr)
    return {"images": images, "annotations": [], "categories": []}


def _is_id(value):
    return type(value) is int and abs(value) < 2**63


def entries(inputs, dataset):
    """Input -> its entry of the truth's images: the one whose file_name has the most parts in common with it, from the end.

    The bare name is enough where no two images share one. An input that fits several equally well gets none, and is named.
    """
    by_name, found, unclear = {}, {}, []
    for image in dataset["images"] if dataset else []:
        by_name.setdefault(nfc(Path(image["file_name"]).name), []).append(image)
    for entry in inputs:
        images = by_name.get(nfc(entry.path.name), ()) if entry.path else ()
        fits = [(_common_end(entry.path, image["file_name"]), image) for image in images]
        best = [image for fit, image in fits if fit == max(fit for fit, _ in fits)]
        if len(best) == 1:
            found[entry] = best[0]
        elif best:
            unclear.append(entry.name)
    if dataset and inputs and not found and not unclear:
        print("the truth names none of these files: image ids are made of their names", file=sys.stderr)
    if unclear:
        print(
            f"{len(unclear)} files could be any of several images of the truth, and are none of it here: {some(unclear)}; "
            "put them into directories as it names them",
            file=sys.stderr,
        )
    return found


def _common_end(path, name):
    """(whether the parts of `name` end those of `path`, how many they have in common at their ends)."""
    path, name = Path(nfc(os.path.abspath(path))).parts, Path(nfc(name)).parts
    pairs = zip(reversed(path), reversed(name), strict=False)
    common = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
    return common == len(name), common


def only_named(inputs, known, dataset, source, truth):
    """Those of the inputs that are `known`, of entries(), and the names of the truth's images that are not among them."""
    there = {entry["id"] for entry in known.values()}
    missing = [image["file_name"] for image in dataset["images"] if image["id"] not in there]
    if not there:
        raise InputError(f"{source}: holds none of the {len(missing)} images of {truth}, like {lite.one_line(missing[0])}")
    if missing:
        print(f"missing {len(missing)} of {len(dataset['images'])} images of {truth}: {some(missing)}", file=sys.stderr)
    return [entry for entry in inputs if entry in known], missing


def image_ids(inputs, known, dataset):
    """Input -> image id: the truth's, else the stem as a number, else the name (also if another image has that number)."""

    def number(entry):
        stem = Path(entry.name).stem
        return int(stem) if stem.isascii() and stem.isdigit() and entry.path and not entry.is_video else entry.name

    others = Counter(number(entry) for entry in inputs if entry not in known)
    others.update(image["id"] for image in (dataset["images"] if dataset else ()))
    return {
        entry: known[entry]["id"] if entry in known else number(entry) if others[number(entry)] == 1 else entry.name
        for entry in inputs
    }


def shapes(image_id, image, dataset):
    """(class name, category id, shape as visualize.draw takes it) of each instance in an image of the truth but crowd regions.

    image: its pixels. An instance that cannot be drawn is named on stderr, and its shape is [].
    """
    names = {category["id"]: category["name"] for category in dataset["categories"]}
    found = dataset["by_image"].get(image_id, ()) if "by_image" in dataset else dataset["annotations"]
    instances = [a for a in found if a["image_id"] == image_id and not a.get("iscrowd")]
    return [(names.get(a["category_id"], "?"), a["category_id"], _shape(a, image)) for a in instances]


def cell(name, image, found, classes, entry, dataset):
    """A cell of a sheet (see visualize.sheet): the picture of what was found, after the ground truth's if `entry` is given.

    `entry` is the image's in `dataset`, a COCO dict; of it the id counts. Crowd regions are left out.
    """
    picture = found.plot(image, fit=visualize.SHEET_SIDE)
    if entry is None:
        return picture, f"{name}: {len(found)} found"
    instances = shapes(entry["id"], image, dataset)
    index = {entry["category_id"]: number for number, entry in enumerate(classes)}
    labels = [label if len(classes) > 1 else "" for label, _, _ in instances]
    colors = visualize.colors_for([index.get(category, len(classes)) for _, category, _ in instances], len(classes))
    truth = visualize.draw(image, [shape for *_, shape in instances], labels, colors=colors, fit=visualize.SHEET_SIDE)
    return truth, picture, f"{name}: {len(instances)} true, {len(found)} found"


def _shape(annotation, image):
    try:
        rle = annotation_rle(annotation, list(image.shape[:2]))
    except InputError as error:
        print(f"not drawn: {error}", file=sys.stderr)
        return []
    if isinstance(annotation["segmentation"], list):
        return [np.reshape(ring, (-1, 2)).astype(np.float64) for ring in annotation["segmentation"]]
    return coco_mask.decode(rle).astype(bool)
