"""One way to ask a run directory, a SavedModel or a .tflite file for polygons; pictures and COCO results of them."""

import dataclasses
import json
import os
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
from pycocotools import mask as coco_mask
from tqdm import tqdm

from polarmask_tf import lite, visualize
from polarmask_tf.errors import InputError
from polarmask_tf.evaluate import annotation_rle, detections_to_results, read_coco

SHEET_IMAGES = 12


@dataclasses.dataclass(frozen=True)
class Detections:
    """What was found in one image; M instances by descending score, in pixels of that image and clipped to it."""

    scores: np.ndarray  # float32 [M]
    classes: np.ndarray  # int32 [M], 0-based index into the predictor's classes
    boxes: np.ndarray  # float32 [M, 4]: xmin, ymin, xmax, ymax
    polygons: np.ndarray  # float32 [M, rays, 2]: x, y

    def above(self, score):
        """Those of at least this score."""
        kept = self.scores >= score
        return Detections(self.scores[kept], self.classes[kept], self.boxes[kept], self.polygons[kept])


@dataclasses.dataclass(frozen=True)
class Predictor:
    """predictor([uint8 [h, w, 3] RGB, ...]) -> [Detections, ...]; the images may differ in size."""

    kind: str  # "run", "saved_model" or "tflite"
    classes: list  # {"name", "category_id"} of each class index
    input_size: tuple  # (height, width) of the network's input
    batch_size: int  # images a call that this back end takes well
    run: Callable  # list of images -> list of dicts as lite.unpack gives
    score_threshold: float = 0.0
    max_detections: int | None = None

    def __call__(self, images):
        for image in images:
            try:
                lite.check_image(image)
            except ValueError as error:
                raise InputError(str(error)) from None
        most = self.max_detections
        found = [Detections(**{key: rows[:most] for key, rows in one.items()}) for one in self.run(images)]
        return [detections.above(self.score_threshold) for detections in found]


def load_predictor(path, *, score_threshold=None, max_detections=None):
    """A run directory, a SavedModel directory or a .tflite file -> Predictor.

    A run takes both overrides into its post-processing; an exported file has its own fixed in the graph, so a lower
    threshold than that changes nothing. Raises InputError for anything else at `path`, and for more detections than an
    exported file gives.
    """
    path = Path(path)
    if path.is_file() and path.suffix == ".tflite":
        predictor, most = _load_tflite(path)
    elif (path / "saved_model.pb").is_file():
        predictor, most = _load_saved_model(path)
    elif (path / "config.yaml").is_file():
        return _load_run(path, score_threshold, max_detections)
    else:
        what = "is none of these" if path.exists() else "does not exist"
        kinds = "a run directory (config.yaml), a SavedModel directory (saved_model.pb), a .tflite file"
        raise InputError(f"{path} {what}: {kinds}")
    if max_detections is not None and most is not None and max_detections > most:
        raise InputError(f"{path} gives at most {most} detections, not {max_detections}; export it again for more")
    return dataclasses.replace(predictor, score_threshold=score_threshold or 0.0, max_detections=max_detections)


def _load_tflite(path):
    try:
        model = lite.PolarMaskLite(path, threads=min(4, os.cpu_count() or 1))
    except ImportError:
        raise InputError(f"{path}: running it needs ai-edge-litert: pip install ai-edge-litert") from None
    except ValueError as error:
        raise InputError(str(error)) from None

    def run(images):
        return [model(image) for image in images]

    return Predictor("tflite", model.classes, model.input_size, 1, run), model.metadata.get("max_detections")


def _load_saved_model(path):
    import tensorflow as tf

    file = path / "assets.extra" / "metadata.json"
    try:
        metadata = json.loads(file.read_bytes())
        classes, size = metadata["classes"], (metadata["input"]["height"], metadata["input"]["width"])
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(f"{file}: missing or broken; export the SavedModel with `polarmask export`") from None
    try:
        loaded = tf.saved_model.load(str(path))
        signature = loaded.signatures["serving_default"]
    except Exception as error:  # a damaged SavedModel makes the loader raise many types
        raise InputError(f"{path}: TensorFlow cannot load it: {' '.join(str(error).split())[:300]}") from None

    def run(images, loaded=loaded):  # the signature only holds weak references: `loaded` must live as long as it
        found = [None] * len(images)
        shapes = [image.shape for image in images]
        for shape in dict.fromkeys(shapes):  # images of one size make a batch
            rows = [index for index, other in enumerate(shapes) if other == shape]
            outputs = signature(images=tf.constant(np.stack([images[index] for index in rows])))
            outputs = {name: tensor.numpy() for name, tensor in outputs.items()}
            height, width = shape[:2]
            for row, index in enumerate(rows):
                found[index] = lite.unpack(outputs, row, width, height, height, width)
        return found

    return Predictor("saved_model", classes, size, 8, run), metadata.get("max_detections")


def _load_run(path, score_threshold, max_detections):
    import tensorflow as tf

    from polarmask_tf.train import load_run

    overrides = {"score_threshold": score_threshold, "max_detections": max_detections}
    model = load_run(path, **{key: value for key, value in overrides.items() if value is not None})
    height, width = model.input_size
    detect = tf.function(model.detect, input_signature=[tf.TensorSpec((None, height, width, 3), tf.uint8)])

    def run(images):
        if not images:
            return []
        canvases, backs = zip(*(lite.letterbox(image, height, width) for image in images), strict=True)
        outputs = {name: tensor.numpy() for name, tensor in detect(np.stack(canvases)).items()}
        return [
            lite.unpack(outputs, row, width * back[0], height * back[1], *image.shape[:2])
            for row, (image, back) in enumerate(zip(images, backs, strict=True))
        ]

    return Predictor("run", model.classes, (height, width), 8, run)


def read_image(path):
    """Image file -> uint8 [h, w, 3] RGB (see lite.read_image); InputError for a file that is no image."""
    try:
        return lite.read_image(path)
    except ValueError as error:
        raise InputError(str(error)) from None


def predict(predictor, source, out, *, score_threshold=0.3, truth=None, limit=None, progress=True):
    """Run `predictor` over an image file, or over the (first `limit`) files of a directory, and write what it finds.

    out/overlays/NAME.png: the image with its polygons; out/results.json: COCO results with the original category ids
    and the image's id in `truth` (a COCO JSON), else its file name's number, else its file name. With `truth` also
    out/sheet.png: up to 12 images, ground truth beside prediction. Files that are no images are named on stderr,
    counted and left out.
    Returns {"images", "detections", "skipped": {file name: reason}, "results": Path, "sheet": Path | None}.
    Raises InputError if no file is an image, or if `out` cannot be written.
    """
    source, out = Path(source), Path(out)
    files = _files(source)[:limit]
    dataset = read_coco(truth) if truth is not None else None
    entries = _truth_entries(files, dataset)
    ids, names = _image_ids(files, entries), _overlay_names(files)
    shown = {list(entries)[int(index)] for index in np.linspace(0, len(entries) - 1, SHEET_IMAGES) if entries}
    results, pairs, skipped, images = [], [], {}, 0
    _make_directory(out / "overlays")
    for file in tqdm(files, desc="predict", unit="image", disable=not progress):
        try:
            image = read_image(file)
        except InputError as error:
            skipped[file.name] = str(error)
            tqdm.write(f"skipped {error}", file=sys.stderr)
            continue
        images += 1
        found = predictor([image])[0].above(score_threshold)
        results += detections_to_results(found, ids[file], predictor.classes, *image.shape[:2])
        _save_picture(_draw_found(image, found, predictor.classes), out / "overlays" / names[file])
        if file in shown:
            true, shapes = _draw_truth(image, entries[file], dataset, predictor.classes)
            caption = f"{file.name}: {shapes} true, {len(found.scores)} found"
            pairs.append((true, _draw_found(image, found, predictor.classes, fit=visualize.SHEET_SIDE), caption))
    if not images:
        reason = next(iter(skipped.values()))
        raise InputError(f"{source}: no image to predict on: {reason}" + (", ..." if len(files) > 1 else ""))
    if skipped:
        more = ", ..." if len(skipped) > 5 else ""
        print(f"skipped {len(skipped)} of {len(files)} files: {', '.join(list(skipped)[:5])}{more}", file=sys.stderr)
    _write(out / "results.json", lambda beside: beside.write_text(json.dumps(results), encoding="utf-8"))
    if dataset is not None and not pairs:
        print(f"no sheet.png: {truth} names none of the images in {source}", file=sys.stderr)
    if pairs:
        _save_picture(visualize.sheet(pairs, title=f"PolarMask, {len(pairs)} of {images} images"), out / "sheet.png")
    paths = {"results": out / "results.json", "sheet": out / "sheet.png" if pairs else None}
    return {"images": images, "detections": len(results), "skipped": skipped, **paths}


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


def _truth_entries(files, dataset):
    """File -> its entry of the truth's images, by the name as it stands there or else without its directory."""
    images = dataset["images"] if dataset else []
    by_name = {Path(image["file_name"]).name: image for image in images}
    by_name |= {image["file_name"]: image for image in images}
    return {file: by_name[file.name] for file in files if file.name in by_name}


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


def _write(path, write):
    """Write beside `path`, then rename: nobody ever sees half a file."""
    beside = path.with_name(f".{path.name}.part")
    try:
        write(beside)
        os.replace(beside, path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise InputError(f"{path}: cannot write it: {error.strerror or error}") from None


def _save_picture(picture, path):
    _write(path, lambda beside: picture.save(beside, format="PNG"))
