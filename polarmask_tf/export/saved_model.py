"""A SavedModel from uint8 images of any size to polygons, and the function that both exports are made of."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import tensorflow as tf

from polarmask_tf import __version__
from polarmask_tf.modeling.polarmask import PolarMask

OUTPUTS = ("num_detections", "detection_scores", "detection_classes", "detection_boxes", "detection_polygons")


def metadata(model: PolarMask, classes: list[dict]) -> dict:
    """What a user of an exported file needs to know, stored with it as metadata.json."""
    height, width = model.config.data.size
    return {
        "format": "polarmask_tf/1",
        "version": __version__,
        "classes": classes,
        "input": {
            "height": height, "width": width, "layout": "NHWC, RGB, uint8, 0..255, pixels as decoded (no EXIF rotation)",
            "letterbox": "resized keeping the ratio, top left, padded with zeros",
        },
        "output": "detection_boxes are ymin, xmin, ymax, xmax and detection_polygons x, y, relative to the image passed in",
        "rays": model.config.model.rays,
        "angles": "point k of a polygon lies at 360 k / rays degrees from +x towards +y (down), seen from its center",
        "max_detections": model.config.postprocess.max_detections,
    }


def letterbox(images: tf.Tensor, size: tuple[int, int]) -> tuple[tf.Tensor, tf.Tensor]:
    """uint8 [B, h, w, 3] to [B, *size, 3]: resized keeping the ratio, top left, padded with zeros.

    Returns the canvas, uint8, and the part of its width and height that the images fill, float32 [2], in (0, 1].
    """
    canvas = tf.constant(size, tf.float32)
    source = tf.cast(tf.shape(images)[1:3], tf.float32)
    scaled = tf.maximum(tf.round(source * tf.reduce_min(canvas / source)), 1.0)
    placed = tf.raw_ops.ScaleAndTranslate(
        images=images, size=size, scale=scaled / source, translation=tf.zeros(2), kernel_type="triangle", antialias=True
    )
    return tf.cast(tf.clip_by_value(tf.round(placed), 0.0, 255.0), tf.uint8), (scaled / canvas)[::-1]


class Serving(tf.Module):
    """What is saved: the variables, and one function that closes over the model (a Keras model hung on it would be saved,
    with its training functions, as well)."""

    def __init__(self, model: PolarMask):
        super().__init__()
        self.variables_ = list(model.variables)
        size = model.config.data.size

        @tf.function(input_signature=[tf.TensorSpec([None, None, None, 3], tf.uint8, "images")])
        def detect(images):
            canvas, filled = letterbox(images, size)
            found = model.detect(tf.ensure_shape(canvas, [None, *size, 3]))
            # From the canvas to the image; what reached into the padding is cut at the image's border.
            polygons = tf.clip_by_value(found["detection_polygons"] / filled, 0.0, 1.0)
            boxes = tf.clip_by_value(found["detection_boxes"] / tf.tile(filled[::-1], [2]), 0.0, 1.0)
            return {**found, "detection_boxes": boxes, "detection_polygons": polygons}

        self.detect = detect


def export_saved_model(model: PolarMask, classes: list[dict], out: Path) -> Path:
    """Writes the SavedModel directory `out` (replacing an older one) and returns it.

    Signature serving_default: `images` uint8 [B, any, any, 3] RGB, to the outputs of exports/README.md.
    """
    beside = out.with_name(out.name + ".tmp")
    shutil.rmtree(beside, ignore_errors=True)
    serving = Serving(model)
    tf.saved_model.save(serving, str(beside), signatures={"serving_default": serving.detect})
    (beside / "assets.extra").mkdir()
    (beside / "assets.extra" / "metadata.json").write_text(json.dumps(metadata(model, classes), indent=1))
    shutil.rmtree(out, ignore_errors=True)
    beside.rename(out)
    return out
