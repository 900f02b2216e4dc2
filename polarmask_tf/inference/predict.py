"""`polarmask predict`: files in, pictures and COCO results out, by whichever predictor."""

import itertools
import json
import os
import sys
from collections import Counter
from pathlib import Path

import numpy as np
from pycocotools import mask as coco_mask
from tqdm import tqdm

from polarmask_tf import files, lite
from polarmask_tf.errors import InputError
from polarmask_tf.inference import visualize
from polarmask_tf.inference.coco_metrics import annotation_rle
from polarmask_tf.inference.evaluate import read_coco
from polarmask_tf.inference.results import read_image

SHEET_IMAGES = 12
MAX_JSON_BYTES = 2**32


def predict(
    predictor,
    source,
    out,
    *,
    score_threshold=None,
    truth=None,
    limit=None,
    results_only=False,
    exif="ignore",
    bit_depth=None,
    progress=True,
):
    """Run `predictor` over an image file, or over the (first `limit`) files of a directory, and write what it finds.

    out/results.json: COCO results with the original category ids and the image's id in `truth` (a COCO JSON, which may
    lack annotations), else its file name's number, else its file name. out/overlays/NAME.png: the image with its polygons.
    out/sheet.png: up to 12 of the images (figure 8), beside their ground truth where `truth` has annotations.
    `score_threshold` is a number, or one for each class; default: predictor.default_threshold. With `results_only` there are
    no pictures, the default is the predictor's least score, and of a directory only the images of `truth` are taken: what an
    evaluation server wants. `exif` and `bit_depth` (default: the predictor's) are lite.read_image's: with exif="apply"
    coordinates are those of the turned image. Files that are no images, and then images of `truth` that are not there, are
    named on stderr, counted and left out.
    Returns {"images", "detections", "skipped": {file name: reason}, "missing": [file name], "results": Path,
    "sheet": Path | None}. Raises InputError if no file is an image, or if `out` is in use or cannot be written.
    """
    source, out = Path(source), Path(out)
    paths, missing = _files(source), []
    if score_threshold is None:
        score_threshold = 0.0 if results_only else predictor.default_threshold()[0]
    dataset = _read_truth(truth) if truth is not None else None
    entries = _truth_entries(paths, dataset)
    if results_only and dataset is not None:
        paths, missing = _only_of_truth(paths, entries, dataset, source, truth)
    paths = paths[:limit]
    ids, stems = _image_ids(paths, entries, dataset), Counter(path.stem for path in paths)
    beside_truth = bool(dataset and dataset["annotations"])
    shown = [] if results_only else _spread([path for path in paths if not beside_truth or path in entries], SHEET_IMAGES)
    cells, images, detections = [], 0, 0
    read = _Reader(getattr(predictor, "read", read_image), exif=exif, bit_depth=bit_depth or predictor.bit_depth)
    with files.lock(out, "predict"):
        with files.replacing(out / "results.json") as part, open(part, "w", encoding="utf-8") as results:
            for path in tqdm(paths, desc="predict", unit="image", disable=not progress):
                image = read(path)
                if image is None:
                    continue
                images += 1
                found = predictor(image).above(score_threshold)
                # A line each, written at once: a test set has millions.
                for result in found.to_coco(ids[path]):
                    results.write((",\n" if detections else "[") + json.dumps(result))
                    detections += 1
                if results_only:
                    continue
                files.make_directory(out / "overlays")
                name = path.stem if stems[path.stem] == 1 else path.name  # where a.jpg and a.png would share one
                found.save(out / "overlays" / f"{name}.png")
                if path in shown and isinstance(image, np.ndarray):  # not windows of a large picture, see tiling.py
                    entry = entries[path] if beside_truth else None
                    cells.append(cell(lite.one_line(path.name), image, found, predictor.classes, entry, dataset))
            results.write("]" if detections else "[]")
            read.report(source, images)
        if beside_truth and not cells and not results_only:
            print(f"no sheet.png: {truth} names none of the images in {source}", file=sys.stderr)
        if cells:
            heads = ("ground truth", "prediction") if beside_truth else ()
            title = f"PolarMask, {len(cells)} of {images} images"
            visualize.save(visualize.sheet(cells, heads=heads, title=title), out / "sheet.png")
    counts = {"images": images, "detections": detections, "skipped": read.skipped, "missing": missing}
    return {**counts, "results": out / "results.json", "sheet": out / "sheet.png" if cells else None}


def _spread(items, count):
    """Up to `count` of the items, evenly from the first to the last."""
    return [items[i] for i in dict.fromkeys(np.linspace(0, len(items) - 1, count).astype(int).tolist())] if items else []


class _Reader:
    """read(path) -> its image, or None for a file that is none, which is said on stderr and noted in `skipped`."""

    def __init__(self, read, **options):
        self.read, self.options, self.skipped, self.notes = read, options, {}, []

    def __call__(self, path):
        try:
            return self.read(path, notes=self.notes, **self.options)
        except InputError as error:
            self.skipped[path.name] = str(error)
            tqdm.write(f"skipped {error}", file=sys.stderr)
            return None

    def report(self, source, images):
        """Says what was skipped and what was noted; InputError if there were no images."""
        if not images:
            reason = next(iter(self.skipped.values()), "no files")
            raise InputError(f"{source}: no image to predict on: {reason}" + (", ..." if len(self.skipped) > 1 else ""))
        if self.skipped:
            total = images + len(self.skipped)
            print(f"skipped {len(self.skipped)} of {total} files: {_some(self.skipped)}", file=sys.stderr)
        for note, count in Counter(self.notes).items():
            print(f"note: {count} of {images} images: {note}", file=sys.stderr)


def _some(names):
    names = list(map(lite.one_line, names))
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def _files(source):
    """What is in the directory `source` but directories and hidden files, or `source` itself."""
    try:
        if source.is_dir():
            paths = sorted(path for path in source.iterdir() if not path.is_dir() and not path.name.startswith("."))
        else:
            paths = [source] if source.exists() else []
    except OSError as error:
        raise InputError(f"{source}: cannot read it: {files.io_error_text(error)}") from None
    if not paths:
        raise InputError(f"{source}: " + ("no files in it" if source.is_dir() else "no such file or directory"))
    return paths


def _read_truth(path):
    """The COCO dict of `path`; of one without annotations, like COCO's files of its test images, the images alone."""
    try:
        lite.check_file(path, MAX_JSON_BYTES)
        document = json.loads(Path(path).read_bytes())
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


def _truth_entries(paths, dataset):
    """Path -> its entry of the truth's images: the one whose file_name has the most parts in common with it, from the end.

    The bare name is enough where no two images share one. A path that fits several equally well gets none, and is named.
    """
    by_name, entries, unclear = {}, {}, []
    for image in dataset["images"] if dataset else []:
        by_name.setdefault(Path(image["file_name"]).name, []).append(image)
    for path in paths:
        fits = [(_common_end(path, image["file_name"]), image) for image in by_name.get(path.name, ())]
        best = [image for fit, image in fits if fit == max(fit for fit, _ in fits)]
        if len(best) == 1:
            entries[path] = best[0]
        elif best:
            unclear.append(path.name)
    if dataset and paths and not entries and not unclear:
        print("the truth names none of these files: image ids are made of their names", file=sys.stderr)
    if unclear:
        print(
            f"{len(unclear)} files could be any of several images of the truth, and are none of it here: {_some(unclear)}; "
            "put them into directories as it names them",
            file=sys.stderr,
        )
    return entries


def _common_end(path, name):
    """(whether the parts of `name` end those of `path`, how many they have in common at their ends)."""
    path, name = Path(os.path.abspath(path)).parts, Path(name).parts
    pairs = zip(reversed(path), reversed(name), strict=False)
    common = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
    return common == len(name), common


def _only_of_truth(paths, entries, dataset, source, truth):
    """Those of the paths that `truth` names, and the names of its images that are not among them."""
    there = {entry["id"] for entry in entries.values()}
    missing = [image["file_name"] for image in dataset["images"] if image["id"] not in there]
    if not there:
        raise InputError(f"{source}: holds none of the {len(missing)} images of {truth}, like {lite.one_line(missing[0])}")
    if missing:
        print(f"missing {len(missing)} of {len(dataset['images'])} images of {truth}: {_some(missing)}", file=sys.stderr)
    return [path for path in paths if path in entries], missing


def _image_ids(paths, entries, dataset):
    """Path -> image id: the truth's, else the stem as a number, else the name (also if another image has that number)."""

    def number(path):
        return int(path.stem) if path.stem.isascii() and path.stem.isdigit() else path.name

    others = Counter(number(path) for path in paths if path not in entries)
    others.update(image["id"] for image in (dataset["images"] if dataset else ()))
    return {
        path: entries[path]["id"] if path in entries else number(path) if others[number(path)] == 1 else path.name
        for path in paths
    }


def cell(name, image, found, classes, entry, dataset):
    """A cell of a sheet (see visualize.sheet): the picture of what was found, after the ground truth's if `entry` is given.

    `entry` is the image's in `dataset`, a COCO dict; of it the id counts. Crowd regions are left out.
    """
    picture = found.plot(image, fit=visualize.SHEET_SIDE)
    if entry is None:
        return picture, f"{name}: {len(found)} found"
    instances = [a for a in dataset["annotations"] if a["image_id"] == entry["id"] and not a.get("iscrowd")]
    shapes = [_truth_shape(annotation, image) for annotation in instances]
    names = {category["id"]: category["name"] for category in dataset["categories"]}
    index = {entry["category_id"]: number for number, entry in enumerate(classes)}
    labels = [names.get(a["category_id"], "?") if len(classes) > 1 else "" for a in instances]
    colors = visualize.colors_for([index.get(a["category_id"], len(classes)) for a in instances], len(classes))
    truth = visualize.draw(image, shapes, labels, colors=colors, fit=visualize.SHEET_SIDE)
    return truth, picture, f"{name}: {len(shapes)} true, {len(found)} found"


def _truth_shape(annotation, image):
    try:
        rle = annotation_rle(annotation, list(image.shape[:2]))
    except InputError as error:
        print(f"not drawn: {error}", file=sys.stderr)
        return []
    if isinstance(annotation["segmentation"], list):
        return [np.reshape(ring, (-1, 2)).astype(np.float64) for ring in annotation["segmentation"]]
    return coco_mask.decode(rle).astype(bool)
