"""A SavedModel from uint8 images of any size to polygons, and the function that both exports are made of."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import tensorflow as tf

from polarmask_tf import __version__
from polarmask_tf.config import input_size
from polarmask_tf.data import transforms
from polarmask_tf.modeling.polarmask import PolarMask

OUTPUTS = ("num_detections", "detection_scores", "detection_classes", "detection_boxes", "detection_polygons")


def metadata(model: PolarMask, classes: list[dict], resize: str | None = None) -> dict:
    """What a user of an exported file needs to know, stored with it as metadata.json; `resize` defaults to data.fit."""
    height, width = input_size(model.config.data)
    return {
        "format": "polarmask_tf/1",
        "version": __version__,
        "classes": [dict(entry) for entry in classes],  # not what Keras makes of a model's attributes
        "input": {
            "height": height,
            "width": width,
            "layout": "NHWC, RGB, uint8, 0..255, pixels as decoded (no EXIF rotation)",
            "resize": resize or model.config.data.fit,
        },
        "output": "detection_boxes are ymin, xmin, ymax, xmax and detection_polygons x, y, relative to the image passed in",
        "rays": model.config.model.rays,
        "angles": (
            "the polygon is the box: lower right, lower left, upper left, upper right"
            if model.config.model.rays == 4
            else "point k of a polygon lies at 360 k / rays degrees from +x towards +y (down), seen from its center"
        ),
        "max_detections": model.config.postprocess.max_detections,
    }


def resize(images: tf.Tensor, size: tuple[int, int], fit: str) -> tuple[tf.Tensor, tf.Tensor]:
    """uint8 [B, h, w, 3] to what the network takes, [B, H, W, 3]: scaled as DataConfig.fit says, padded with zeros.

    H and W are `size`; with short_side the scaled image's own sides in multiples of 32. Returns the canvas, uint8, and
    the part of its width and height that the images fill, float32 [2], in (0, 1].
    """
    # In double precision the same sides as lite.letterbox finds: one rounded otherwise is another picture.
    source = tf.cast(tf.shape(images)[1:3], tf.float64)
    scaled = tf.maximum(tf.round(source * transforms.factors(source, size, fit)), 1.0)
    whole = tf.math.ceil(scaled / 32) * 32 if fit == "short_side" else tf.constant(size, tf.float64)
    placed = tf.raw_ops.ScaleAndTranslate(
        images=images,
        size=tf.cast(whole, tf.int32),
        scale=tf.cast(scaled / source, tf.float32),
        translation=tf.zeros(2),
        kernel_type="triangle",
        antialias=True,
    )
    placed = tf.ensure_shape(placed, [None, *((None, None) if fit == "short_side" else size), 3])
    return tf.cast(tf.clip_by_value(tf.round(placed), 0.0, 255.0), tf.uint8), tf.cast((scaled / whole)[::-1], tf.float32)


def detect(model: PolarMask, placed: tf.Tensor, filled: tf.Tensor) -> dict:
    """Detections in images that `resize` placed, relative to the images themselves.

    `filled` is the part of the canvas' width and height that they fill, float32 [2], or [B, 2] where they differ.
    """
    found = model.detect(placed)
    filled = tf.reshape(filled, [-1, 1, 2])
    # From the canvas to the image; what reached into the padding is cut at the image's border.
    polygons = tf.clip_by_value(found["detection_polygons"] / filled[:, tf.newaxis], 0.0, 1.0)
    boxes = tf.clip_by_value(found["detection_boxes"] / tf.tile(filled[..., ::-1], [1, 1, 2]), 0.0, 1.0)
    return {**found, "detection_boxes": boxes, "detection_polygons": polygons}


class Serving(tf.Module):
    """What is saved: the variables, and one function that closes over the model (a Keras model hung on it would be saved,
    with its training functions, as well)."""

    def __init__(self, model: PolarMask):
        super().__init__()
        self.variables_ = list(model.variables)
        data = model.config.data

        @tf.function(input_signature=[tf.TensorSpec([None, None, None, 3], tf.uint8, "images")])
        def run(images):
            return detect(model, *resize(images, data.size, data.fit))

        self.run = run


def export_saved_model(model: PolarMask, classes: list[dict], out: Path) -> Path:
    """Writes the SavedModel directory `out` (replacing an older one) and returns it.

    Signature serving_default: `images` uint8 [B, any, any, 3] RGB, to the outputs of exports/README.md.
    """
    beside = out.with_name(out.name + ".tmp")
    shutil.rmtree(beside, ignore_errors=True)
    serving = Serving(model)
    tf.saved_model.save(serving, str(beside), signatures={"serving_default": serving.run})
    (beside / "assets.extra").mkdir()
    (beside / "assets.extra" / "metadata.json").write_text(json.dumps(metadata(model, classes), indent=1))
    shutil.rmtree(out, ignore_errors=True)
    beside.rename(out)
    return out
