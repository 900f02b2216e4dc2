"""One way to ask a run directory, a SavedModel, a .tflite file or a served model for polygons."""

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from polarmask_tf import lite
from polarmask_tf.config import input_size
from polarmask_tf.errors import InputError


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

    kind: str  # "run", "saved_model", "tflite" or "served"
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
    """A run directory, a SavedModel directory, a .tflite file, or the URL (str) of a served model -> Predictor.

    URLs are http://HOST:8501/v1/models/NAME and grpc://HOST:8500/NAME, see client.py. A run takes both overrides into its
    post-processing; an exported or served model has its own fixed in the graph, so a lower threshold than that changes
    nothing. Raises InputError for anything else at `path`, and for more detections than an exported model gives.
    """
    if str(path).startswith(("http://", "https://", "grpc://")):
        from polarmask_tf.inference import client

        predictor, most = client.connect(str(path))
    elif (path := Path(path)).is_file() and path.suffix == ".tflite":
        predictor, most = _load_tflite(path)
    elif (path / "saved_model.pb").is_file():
        predictor, most = _load_saved_model(path)
    elif (path / "config.yaml").is_file():
        return _load_run(path, score_threshold, max_detections)
    else:
        what = "is none of these" if path.exists() else "does not exist"
        kinds = "a run directory (config.yaml), a SavedModel directory (saved_model.pb), a .tflite file, a URL"
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
        # Of a model exported for serving, serving_default takes encoded images.
        signature = loaded.signatures["images" if "images" in loaded.signatures else "serving_default"]
    except Exception as error:  # a damaged SavedModel makes the loader raise many types
        raise InputError(f"{path}: TensorFlow cannot load it: {' '.join(str(error).split())[:300]}") from None

    def run(images, loaded=loaded):  # the signature only holds weak references: `loaded` must live as long as it
        found = [None] * len(images)
        for rows in _of_one_shape(images):
            outputs = signature(images=tf.constant(np.stack([images[index] for index in rows])))
            outputs = {name: tensor.numpy() for name, tensor in outputs.items()}
            for row, index in enumerate(rows):
                height, width = images[index].shape[:2]
                found[index] = lite.unpack(outputs, row, width, height, height, width)
        return found

    return Predictor("saved_model", classes, size, 8, run), metadata.get("max_detections")


def _load_run(path, score_threshold, max_detections):
    from polarmask_tf.weights.runs import load_run

    overrides = {"score_threshold": score_threshold, "max_detections": max_detections}
    return run_predictor(load_run(path, **{key: value for key, value in overrides.items() if value is not None}))


def run_predictor(model, fit=None, strategy=None, devices=1):
    """The model that runs.load_run gives -> Predictor; images meet it by `fit`, see DataConfig (default: as in training).

    With a tf.distribute `strategy`, its `devices` of this process share the images of a call.
    """
    import tensorflow as tf

    data = model.config.data
    fit = fit or data.fit
    size = input_size(data)
    fixed = (None, None) if fit == "short_side" else size  # one graph for inputs of every size
    detect = tf.function(model.detect, input_signature=[tf.TensorSpec((None, *fixed, 3), tf.uint8)])
    if strategy and strategy.num_replicas_in_sync > 1:
        detect = _on_all(model, strategy, devices)

    def run(images):
        placed, backs = zip(*(network_input(i, data, fit) for i in images), strict=True) if images else ((), ())
        found = [None] * len(images)
        for rows in _of_one_shape(placed):
            outputs = {name: tensor.numpy() for name, tensor in detect(np.stack([placed[i] for i in rows])).items()}
            for row, index in enumerate(rows):
                (height, width), (back_x, back_y) = placed[index].shape[:2], backs[index]
                found[index] = lite.unpack(outputs, row, width * back_x, height * back_y, *images[index].shape[:2])
        return found

    return Predictor("run", model.classes, size, 8 * devices, run)


def _on_all(model, strategy, devices):
    """model.detect with its images shared out over the devices of a strategy; an image that is short is one of zeros."""
    import tensorflow as tf

    # strategy.run itself cannot call a tf.function that has an input signature.
    detect = tf.function(lambda images: strategy.run(model.detect, args=(images,)), reduce_retracing=True)

    def everywhere(images):
        each = -(-len(images) // devices)
        images, count = np.pad(images, [(0, each * devices - len(images))] + [(0, 0)] * 3), len(images)

        def share(context):
            first = context.replica_id_in_sync_group % devices * each
            return tf.constant(images[first : first + each])

        outputs = detect(strategy.experimental_distribute_values_from_function(share))
        return {name: tf.concat(strategy.experimental_local_results(parts), axis=0)[:count] for name, parts in outputs.items()}

    return everywhere


def network_input(image, data, fit=None):
    """uint8 [h, w, 3] as the network sees it under DataConfig `data`; see its `fit`, and lite.place for what is returned."""
    fit = fit or data.fit
    if fit != "short_side":
        return lite.letterbox(image, *input_size(data), fit == "stretch")
    sides, (shorter, longer) = image.shape[:2], data.size
    scale = min(shorter / min(sides), longer / max(sides))
    filled = tuple(max(1, round(side * scale)) for side in sides)
    return lite.place(image, filled, tuple(-(-side // 32) * 32 for side in filled))


def _of_one_shape(images):
    """Lists of the indices of images that can be stacked."""
    groups = {}
    for index, image in enumerate(images):
        groups.setdefault(image.shape, []).append(index)
    return list(groups.values())


def read_image(path):
    """Image file -> uint8 [h, w, 3] RGB (see lite.read_image); InputError for a file that is no image."""
    try:
        return lite.read_image(path)
    except ValueError as error:
        raise InputError(str(error)) from None
