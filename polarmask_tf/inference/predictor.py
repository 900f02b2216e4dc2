"""One way to ask a run directory, a model, a SavedModel, a .tflite file or a served model for polygons."""

import dataclasses
import functools
import itertools
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from polarmask_tf import config as configs
from polarmask_tf import lite
from polarmask_tf.data import dataset
from polarmask_tf.errors import InputError
from polarmask_tf.files import check_regular
from polarmask_tf.inference.results import Detections, read_image
from polarmask_tf.weights import shipped


@dataclasses.dataclass(frozen=True)
class Predictor:
    """predictor(image) -> Detections; predictor([image, ...]) -> [Detections, ...]; predictor(iterator) -> iterator.

    Of an iterator, like Path("photos").glob("*.jpg") or a generator, no more than a batch of images and results is held at a
    time. An image is a path, bytes of an image file, a PIL.Image, or a uint8 array [h, w, 3] in RGB; images may differ in size.
    Raises InputError for what is none.
    """

    kind: str  # "run", "saved_model", "tflite" or "served"
    classes: list  # {"name", "category_id"} of each class index
    input_size: tuple  # (height, width) of the network's input
    batch_size: int  # images a call that this back end takes well
    run: Callable  # list of images -> list of dicts as lite.unpack gives
    score_threshold: float = 0.0
    max_detections: int | None = None
    bit_depth: int | None = None  # that deep gray image files are read with, see lite.read_image
    rays: int | None = None  # vertices of a polygon, where the model says it
    thresholds: dict | None = None  # {"overall": score, "classes": [score, ...]} that `evaluate` found, if it was run
    runs_on: str | None = None  # which part of a .tflite file runs where, in a line

    def __call__(self, images):
        if isinstance(images, Iterator) and not hasattr(images, "read"):  # open files are iterators of lines
            batches = iter(lambda: list(itertools.islice(images, self.batch_size)), [])
            return itertools.chain.from_iterable(map(self, batches))
        if not isinstance(images, list | tuple):
            return self([images])[0]
        results = []
        for first in range(0, len(images), self.batch_size):
            given = images[first : first + self.batch_size]
            pixels = [read_image(image, bit_depth=self.bit_depth) for image in given]
            for source, image, rows in zip(given, pixels, self.run(pixels), strict=True):
                rows = {name: rows[name][: self.max_detections] for name in lite.FOUND}
                size, depth = image.shape[:2], self.bit_depth
                found = Detections(**rows, categories=self.classes, image_size=size, source=source, bit_depth=depth)
                results.append(found.above(self.score_threshold))
        return results

    def default_threshold(self) -> tuple[float | list[float], str]:
        """From which score on detections are worth showing, for Detections.above; and a line that says why."""
        if not self.thresholds:
            return lite.SHOWN, f"from score {lite.SHOWN} on: `polarmask evaluate` has not told this model a better threshold"
        overall, scores = self.thresholds["overall"], self.thresholds["classes"]
        own = [f"{lite.one_line(entry['name'], 40)} {score:.2f}" for entry, score in zip(self.classes, scores, strict=True)]
        differ = f" (by class: {', '.join(own[:8])}{', ...' if len(own) > 8 else ''})" if {*scores} != {overall} else ""
        return scores, f"from the model's own score of best F1 on, {overall:.2f}{differ}; --score-threshold overrides"


def load_predictor(source, *, score_threshold=None, max_detections=None, accelerator=None):
    """A run directory, .keras file, PolarMask, SavedModel directory, .tflite file, URL of a served model or name of a shipped
    one -> Predictor.

    URLs are http://HOST:8501/v1/models/NAME and grpc://HOST:8500/NAME, see client.py. A run, a .keras file and a PolarMask
    take both overrides into their post-processing; an exported or served model has its own fixed in the graph, so a lower
    threshold than that changes nothing. Exported models are tried on an empty image. accelerator: of a .tflite file, "cpu" or
    "gpu", see lite.PolarMaskLite; Predictor.runs_on says what came of it.
    Raises InputError for anything else, for more detections than an exported model gives, and for a GPU that is not there.
    """
    if max_detections is not None and not 1 <= max_detections <= lite.MAX_DETECTIONS:
        raise InputError(f"max_detections is {max_detections}, must be 1 to {lite.MAX_DETECTIONS}")
    if score_threshold is not None and not 0 <= score_threshold <= 1:
        raise InputError(f"score_threshold is {score_threshold}, must be 0 to 1")
    options = {"score_threshold": score_threshold, "max_detections": max_detections}
    options = {name: value for name, value in options.items() if value is not None}
    if accelerator and not str(source).endswith(".tflite"):
        raise InputError(f"accelerator {accelerator}: of .tflite files alone; TensorFlow takes a GPU by itself")
    runs_on = None
    if callable(getattr(source, "detect", None)):
        return run_predictor(source, **options)
    path = shipped.resolve(source)
    if str(source).startswith(("http://", "https://", "grpc://")):
        from polarmask_tf.inference import client

        kind, batch_size, (metadata, run) = "served", client.AT_ONCE, client.connect(source)
    elif path.suffix == ".tflite" and os.path.isfile(path):
        kind, batch_size, (metadata, run, runs_on) = "tflite", 1, _tflite(path, accelerator)
    elif os.path.isfile(path / "saved_model.pb"):
        kind, batch_size, (metadata, run) = "saved_model", 8, _saved_model(path)
    elif os.path.isfile(path / "config.yaml") or (path.suffix == ".keras" and os.path.isfile(path)):
        from polarmask_tf.weights.runs import load_model

        return run_predictor(load_model(path), **options)
    else:
        check_regular([path, path / "config.yaml", path / "saved_model.pb"])
        what = "is none of these" if os.path.exists(path) else "does not exist"
        kinds = "a run directory (config.yaml), a SavedModel directory (saved_model.pb), a .tflite or .keras file, a URL"
        kinds += f", a model that comes with polarmask_tf ({', '.join(shipped.names())})" if shipped.names() else ""
        raise InputError(f"{path} {what}: {kinds}")
    try:
        classes = dataset.parse_classes(metadata["classes"])  # whose names every output must be able to write
    except ValueError as error:
        raise InputError(f"{source}: what it knows about itself is damaged: {error}; export it again") from None
    most = metadata.get("max_detections", lite.MAX_DETECTIONS)
    if max_detections is not None and max_detections > most:
        raise InputError(f"{source} gives at most {most} detections, not {max_detections}; export it again for more")
    height, width, bit_depth = (metadata["input"].get(key) for key in ("height", "width", "bit_depth"))
    known = {"bit_depth": bit_depth, "rays": metadata.get("rays"), "thresholds": metadata.get("thresholds"), "runs_on": runs_on}
    return Predictor(kind, classes, (height, width), batch_size, run, **options, **known)


def _tflite(path, accelerator):
    """(metadata.json, function as Predictor.run), also in what follows; and what runs where."""
    try:
        model = lite.PolarMaskLite(path, min(4, os.cpu_count() or 1), accelerator)
    except ImportError:
        raise InputError(f"{path}: running it needs ai-edge-litert: pip install ai-edge-litert") from None
    except ValueError as error:
        raise InputError(str(error)) from None

    def run(images):
        try:
            return [model(image) for image in images]
        except (ValueError, RuntimeError) as error:
            raise InputError(f"{path}: damaged, or not as the export wrote it: {lite.one_line(error)}") from None

    return model.metadata, run, model.runs_on


def saved_model_metadata(path):
    """metadata.json of an exported SavedModel directory; InputError for one that is missing or damaged."""
    file = Path(path) / "assets.extra" / "metadata.json"
    try:
        lite.check_file(file, lite.MAX_METADATA_BYTES)
        return lite.check_metadata(json.loads(file.read_bytes()), file)
    except (OSError, ValueError, RecursionError) as error:
        why = lite.one_line(error)
        raise InputError(f"{file}: missing or broken; export the SavedModel with `polarmask export` ({why})") from None


def _saved_model(path):
    import tensorflow as tf

    metadata = saved_model_metadata(path)
    check_regular(path.rglob("*"))

    def detect(images):
        return lite.check_outputs(signature(images=tf.constant(images)), metadata, len(images))

    def run(images):
        try:
            return _by_shape(detect, images, images)
        except (ValueError, TypeError, tf.errors.OpError) as error:
            raise InputError(f"{path}: damaged, or not as the export wrote it: {lite.one_line(error)}") from None

    try:
        loaded = tf.saved_model.load(str(path))
        # Of a model exported for serving, serving_default takes encoded images.
        signature = loaded.signatures["images" if "images" in loaded.signatures else "serving_default"]
    except Exception as error:  # a damaged SavedModel makes the loader raise many types
        raise InputError(f"{path}: TensorFlow cannot load it: {lite.one_line(error)}") from None
    run.loaded = loaded  # the signature has weak references alone
    run([np.zeros((metadata["input"]["height"], metadata["input"]["width"], 3), np.uint8)])
    return metadata, run


def run_predictor(model, fit=None, strategy=None, devices=1, **overrides):
    """A PolarMask -> Predictor; images meet it by `fit`, see DataConfig (default: as in training).

    With a tf.distribute `strategy`, its `devices` of this process share the images of a call. `overrides` are of
    config.postprocess; InputError where they are out of bounds.
    """
    import tensorflow as tf

    configs.override(model.config.postprocess, overrides, "postprocess.")
    data = model.config.data
    fit = fit or data.fit
    size = configs.input_size(data)
    fixed = (None, None) if fit == "short_side" else size  # one graph for inputs of every size
    detect = functools.partial(model.detect, **overrides) if overrides else model.detect
    if strategy and strategy.num_replicas_in_sync > 1:
        detect = _on_all(detect, strategy, devices)
    else:
        detect = tf.function(detect, input_signature=[tf.TensorSpec((None, *fixed, 3), tf.uint8)])

    def run(images):
        return _by_shape(detect, images, *zip(*(network_input(image, data, fit) for image in images), strict=True))

    known = {name: getattr(model, name, None) for name in ("thresholds", "bit_depth")}
    return Predictor("run", model.classes, size, 8 * devices, run, rays=model.config.model.rays, **known)


def _on_all(detect, strategy, devices):
    """`detect` with its images shared out over the devices of a strategy; an image that is short is one of zeros."""
    import tensorflow as tf

    # strategy.run itself cannot call a tf.function that has an input signature.
    on_each = tf.function(lambda images: strategy.run(detect, args=(images,)), reduce_retracing=True)

    def everywhere(images):
        each = -(-len(images) // devices)
        images, count = np.pad(images, [(0, each * devices - len(images))] + [(0, 0)] * 3), len(images)

        def share(context):
            first = context.replica_id_in_sync_group % devices * each
            return tf.constant(images[first : first + each])

        outputs = on_each(strategy.experimental_distribute_values_from_function(share))
        return {name: tf.concat(strategy.experimental_local_results(parts), axis=0)[:count] for name, parts in outputs.items()}

    return everywhere


def network_input(image, data, fit=None):
    """uint8 [h, w, 3] as the network sees it under DataConfig `data`; see its `fit`, and lite.place for what is returned."""
    fit = fit or data.fit
    size = data.size if fit == "short_side" else configs.input_size(data)
    return lite.place(image, *lite.fit_sizes(*image.shape[:2], size, fit))


def _by_shape(detect, images, placed, factors=None):
    """What lite.unpack gives of each image; detect(uint8 [B, H, W, 3]) gets those that are `placed` on one shape together.

    `factors`: (x, y) each, from `placed` back to the image.
    """
    groups, found = {}, [None] * len(images)
    for index, image in enumerate(placed):
        groups.setdefault(image.shape[:2], []).append(index)
    for (height, width), rows in groups.items():
        outputs = {name: np.asarray(value) for name, value in detect(np.stack([placed[index] for index in rows])).items()}
        for row, index in enumerate(rows):
            x, y = factors[index] if factors else (1, 1)
            found[index] = lite.unpack(outputs, row, width * x, height * y, *images[index].shape[:2])
    return found
