"""Files in, pictures and COCO results out, by whichever predictor."""

import contextlib
import json
import os
import sys
from collections import Counter
from pathlib import Path

import numpy as np
from pycocotools import mask as coco_mask
from tqdm import tqdm

from polarmask_tf.errors import InputError
from polarmask_tf.inference import visualize
from polarmask_tf.inference.evaluate import annotation_rle, detections_to_results, read_coco
from polarmask_tf.inference.predictor import read_image

SHEET_IMAGES = 12


def predict(predictor, source, out, *, score_threshold=None, truth=None, limit=None, results_only=False, progress=True):
    """Run `predictor` over an image file, or over the (first `limit`) files of a directory, and write what it finds.

    out/results.json: COCO results with the original category ids and the image's id in `truth` (a COCO JSON, which may
    lack annotations), else its file name's number, else its file name. out/overlays/NAME.png: the image with its polygons.
    out/sheet.png: up to 12 of the images (figure 8), beside their ground truth where `truth` has annotations.
    With `results_only` there are no pictures, `score_threshold` is the predictor's own in place of 0.3, and of a
    directory only the images of `truth` are taken: what an evaluation server wants. Files that are no images, and then
    images of `truth` that are not there, are named on stderr, counted and left out.
    Returns {"images", "detections", "skipped": {file name: reason}, "missing": [file name], "results": Path,
    "sheet": Path | None}. Raises InputError if no file is an image, or if `out` cannot be written.
    """
    source, out = Path(source), Path(out)
    files, missing = _files(source), []
    if score_threshold is None:
        score_threshold = 0.0 if results_only else 0.3
    dataset = _read_truth(truth) if truth is not None else None
    entries = _truth_entries(files, dataset)
    if results_only and dataset is not None:
        files, missing = _only_of_truth(files, entries, dataset, source, truth)
    files = files[:limit]
    ids, names = _image_ids(files, entries), _overlay_names(files)
    beside_truth = bool(dataset and dataset["annotations"])
    shown = [] if results_only else _spread([file for file in files if not beside_truth or file in entries], SHEET_IMAGES)
    cells, skipped, images, detections = [], {}, 0, 0
    _make_directory(out if results_only else out / "overlays")
    with _beside(out / "results.json") as part, open(part, "w", encoding="utf-8") as results:
        for file in tqdm(files, desc="predict", unit="image", disable=not progress):
            image = _read_or_skip(file, skipped)
            if image is None:
                continue
            images += 1
            found = predictor([image])[0].above(score_threshold)
            # A line each, written at once: a test set has millions.
            for result in detections_to_results(found, ids[file], predictor.classes, *image.shape[:2]):
                results.write((",\n" if detections else "[") + json.dumps(result))
                detections += 1
            if results_only:
                continue
            _save_picture(_draw_found(image, found, predictor.classes), out / "overlays" / names[file])
            if file in shown:
                cells.append(cell(file.name, image, found, predictor.classes, entries[file] if beside_truth else None, dataset))
        results.write("]" if detections else "[]")
        _report_skipped(skipped, len(files), images, source)
    if beside_truth and not cells and not results_only:
        print(f"no sheet.png: {truth} names none of the images in {source}", file=sys.stderr)
    if cells:
        heads = ("ground truth", "prediction") if beside_truth else ()
        title = f"PolarMask, {len(cells)} of {images} images"
        _save_picture(visualize.sheet(cells, heads=heads, title=title), out / "sheet.png")
    counts = {"images": images, "detections": detections, "skipped": skipped, "missing": missing}
    return {**counts, "results": out / "results.json", "sheet": out / "sheet.png" if cells else None}


def compare(predictors, source, out, *, score_threshold=0.3, images=6, title=""):
    """Writes the picture `out`: what each of `predictors` (name -> Predictor) finds in the same images, side by side.

    This is figure 6 of the paper. `source` is a directory, an image file or a list of files, of which up to `images` are
    taken, spread over all. Returns `out`; raises InputError if no file is an image, or if `out` cannot be written.
    """
    files = list(map(Path, source)) if isinstance(source, list | tuple) else _files(Path(source))
    skipped, cells = {}, []
    chosen = _spread(files, images)
    for file in chosen:
        image = _read_or_skip(file, skipped)
        if image is None:
            continue
        pairs = [(p.classes, p([image])[0].above(score_threshold)) for p in predictors.values()]
        pictures = [_draw_found(image, found, classes, fit=visualize.SHEET_SIDE) for classes, found in pairs]
        cells.append((*pictures, f"{file.name}: {', '.join(str(len(found.scores)) for _, found in pairs)} found"))
    _report_skipped(skipped, len(chosen), len(cells), source)
    _make_directory(Path(out).parent)
    _save_picture(visualize.sheet(cells, heads=tuple(predictors), title=title), Path(out))
    return Path(out)


def _spread(items, count):
    """Up to `count` of the items, evenly from the first to the last."""
    return [items[i] for i in dict.fromkeys(np.linspace(0, len(items) - 1, count).astype(int).tolist())] if items else []


def _read_or_skip(file, skipped):
    """The image of a file, or None, said on stderr and noted in `skipped`."""
    try:
        return read_image(file)
    except InputError as error:
        skipped[file.name] = str(error)
        tqdm.write(f"skipped {error}", file=sys.stderr)
        return None


def _report_skipped(skipped, files, images, source):
    if not images:
        reason = next(iter(skipped.values()), "no files")
        raise InputError(f"{source}: no image to predict on: {reason}" + (", ..." if files > 1 else ""))
    if skipped:
        print(f"skipped {len(skipped)} of {files} files: {_some(skipped)}", file=sys.stderr)


def _some(names):
    names = list(names)
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def _files(source):
    try:
        if source.is_dir():
            files = sorted(file for file in source.iterdir() if file.is_file() and not file.name.startswith("."))
        else:
            files = [source] if source.exists() else []
    except OSError as error:
        raise InputError(f"{source}: cannot read it: {error.strerror or error}") from None
    if not files:
        raise InputError(f"{source}: " + ("no files in it" if source.is_dir() else "no such file or directory"))
    return files


def _read_truth(path):
    """The COCO dict of `path`; of one without annotations, like COCO's files of its test images, the images alone."""
    try:
        document = json.loads(Path(path).read_bytes())
    except (OSError, ValueError, RecursionError):
        return read_coco(path)  # which says what is wrong with it
    if not isinstance(document, dict) or not isinstance(document.get("images"), list) or document.get("annotations"):
        return read_coco(path)
    images = [
        image
        for image in document["images"]
        if isinstance(image, dict) and isinstance(image.get("id"), int) and isinstance(image.get("file_name"), str)
    ]
    if not images:
        raise InputError(f"{path}: names no images; its list 'images' needs objects with an integer 'id' and a 'file_name'")
    if unusable := len(document["images"]) - len(images):
        print(f"skipped {unusable} of {len(document['images'])} images of {path}: no 'id' or 'file_name'", file=sys.stderr)
    return {"images": images, "annotations": [], "categories": []}


def _truth_entries(files, dataset):
    """File -> its entry of the truth's images, by the name as it stands there or else without its directory."""
    images = dataset["images"] if dataset else []
    by_name = {Path(image["file_name"]).name: image for image in images}
    by_name |= {image["file_name"]: image for image in images}
    return {file: by_name[file.name] for file in files if file.name in by_name}


def _only_of_truth(files, entries, dataset, source, truth):
    """Those of the files that `truth` names, and the names of its images that are not among them."""
    there = {entry["id"] for entry in entries.values()}
    missing = [image["file_name"] for image in dataset["images"] if image["id"] not in there]
    if not there:
        raise InputError(f"{source}: holds none of the {len(missing)} images of {truth}, like {missing[0]}")
    if missing:
        print(f"missing {len(missing)} of {len(dataset['images'])} images of {truth}: {_some(missing)}", file=sys.stderr)
    return [file for file in files if file in entries], missing


def _image_ids(files, entries):
    """File -> image id: the truth's, else the stem as a number, else (or if two files would share it) the name."""

    def number(file):
        return int(file.stem) if file.stem.isascii() and file.stem.isdigit() else file.name

    ids = {file: entries[file]["id"] if file in entries else number(file) for file in files}
    shared = Counter(ids.values())
    return {file: image_id if file in entries or shared[image_id] == 1 else file.name for file, image_id in ids.items()}


def _overlay_names(files):
    """File -> name of its overlay: the stem, or the whole name where a.jpg and a.png would share one."""
    shared = Counter(file.stem for file in files)
    return {file: f"{file.stem if shared[file.stem] == 1 else file.name}.png" for file in files}


def _draw_found(image, found, classes, fit=None):
    plain = fit is not None and len(classes) == 1  # in a sheet, one class's name on every instance only hides them
    labels = ["" if plain else classes[index]["name"] for index in found.classes]
    colors = visualize.colors_for(found.classes, len(classes))
    return visualize.draw(image, list(found.polygons), labels, found.scores, colors, fit=fit)


def cell(name, image, found, classes, entry, dataset):
    """A cell of a sheet (see visualize.sheet): the picture of what was found, after the ground truth's if `entry` is given.

    `entry` is the image's in `dataset`, a COCO dict; of it the id counts.
    """
    picture = _draw_found(image, found, classes, fit=visualize.SHEET_SIDE)
    if entry is None:
        return picture, f"{name}: {len(found.scores)} found"
    true, shapes = _draw_truth(image, entry, dataset, classes)
    return true, picture, f"{name}: {shapes} true, {len(found.scores)} found"


def _draw_truth(image, entry, dataset, classes):
    """One image's ground truth as a picture for the sheet, and its number of instances, crowd regions left out."""
    instances = [a for a in dataset["annotations"] if a["image_id"] == entry["id"] and not a.get("iscrowd")]
    shapes = [_truth_shape(annotation, image) for annotation in instances]
    names = {category["id"]: category["name"] for category in dataset["categories"]}
    index = {entry["category_id"]: number for number, entry in enumerate(classes)}
    labels = [names.get(a["category_id"], "?") if len(classes) > 1 else "" for a in instances]
    colors = visualize.colors_for([index.get(a["category_id"], len(classes)) for a in instances], len(classes))
    return visualize.draw(image, shapes, labels, colors=colors, fit=visualize.SHEET_SIDE), len(shapes)


def _truth_shape(annotation, image):
    try:
        rle = annotation_rle(annotation, list(image.shape[:2]))
    except InputError as error:
        print(f"not drawn: {error}", file=sys.stderr)
        return []
    if isinstance(annotation["segmentation"], list):
        return [np.reshape(ring, (-1, 2)).astype(np.float64) for ring in annotation["segmentation"]]
    return coco_mask.decode(rle).astype(bool)


def _make_directory(path):
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path}: cannot make this directory: {error.strerror or error}") from None


@contextlib.contextmanager
def _beside(path):
    """A path to write to, renamed to `path` at the end unless an error came between: nobody ever sees half a file."""
    part = path.with_name(f".{path.name}.part")
    try:
        yield part
        os.replace(part, path)
    except OSError as error:
        raise InputError(f"{path}: cannot write it: {error.strerror or error}") from None
    finally:
        with contextlib.suppress(OSError):  # it is gone if all went well
            part.unlink()


def _save_picture(picture, path):
    with _beside(path) as part:
        picture.save(part, format="PNG")
