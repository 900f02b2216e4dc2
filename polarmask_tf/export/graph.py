"""A SavedModel from uint8 images of any size to polygons, and what both exports are made of."""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
import typing
from pathlib import Path

import tensorflow as tf

from polarmask_tf import __version__
from polarmask_tf.errors import InputError
from polarmask_tf.files import check_text, io_error_text
from polarmask_tf.modeling.polarmask import PolarMask
from polarmask_tf.ops.placement import resize

TEMPORARY = ".export-"  # how a directory begins that holds a SavedModel until it is whole


def metadata(model: PolarMask, resize: str | None = None) -> dict:
    """What a user of an exported file needs to know, stored with it as metadata.json; `resize` defaults to data.fit."""
    height, width = model.input_size
    config = model.config
    return {
        "format": "polarmask_tf/1",
        "version": __version__,
        "classes": model.classes,
        "input": {
            "height": height,
            "width": width,
            "layout": "NHWC, RGB, uint8, 0..255, pixels as decoded (no EXIF rotation)",
            "resize": resize or config.data.fit,
            **({"bit_depth": depth} if (depth := getattr(model, "bit_depth", None)) else {}),
        },
        "output": "detection_boxes are ymin, xmin, ymax, xmax and detection_polygons x, y, relative to the image passed in",
        "rays": config.model.rays,
        "angles": (
            "the polygon is the box: lower right, lower left, upper left, upper right"
            if config.model.rays == 4
            else "point k of a polygon lies at 360 k / rays degrees from +x towards +y (down), seen from its center"
        ),
        "max_detections": config.postprocess.max_detections,
        **({"thresholds": found} if (found := getattr(model, "thresholds", None)) else {}),
    }


def detect(model: PolarMask, padded: tf.Tensor, filled: tf.Tensor) -> dict:
    """Detections in images that placement.resize padded, relative to the images themselves.

    `filled` is the part of width and height that they fill, float32 [2], or [B, 2] where they differ.
    """
    found = model.detect(padded)
    filled = tf.reshape(filled, [-1, 1, 2])
    # From the padded image to the image; what reached into the padding is cut at the image's border.
    polygons = tf.clip_by_value(found["detection_polygons"] / filled[:, tf.newaxis], 0.0, 1.0)
    boxes = tf.clip_by_value(found["detection_boxes"] / tf.tile(filled[..., ::-1], [1, 1, 2]), 0.0, 1.0)
    return {**found, "detection_boxes": boxes, "detection_polygons": polygons}


class DetectionModule(tf.Module):
    """What is saved: the variables, and one function that closes over the model (a Keras model that belonged to it would be
    saved, with its training functions, as well)."""

    def __init__(self, model: PolarMask):
        super().__init__()
        self.variables_ = list(model.variables)
        data = model.config.data

        @tf.function(input_signature=[tf.TensorSpec([None, None, None, 3], tf.uint8, "images")])
        def detect_images(images):
            return detect(model, *resize(images, data.size, data.fit))

        self.detect = detect_images


def export_saved_model(model: PolarMask, out: Path) -> Path:
    """Writes the SavedModel directory `out` (replacing an older one) and returns it.

    Signature serving_default: `images` uint8 [B, any, any, 3] RGB, to the outputs of exports/README.md. Raises InputError if
    it cannot be written, or if something else lies there.
    """
    check_saved_model_path(out)
    module = DetectionModule(model)
    with saving(module, {"serving_default": module.detect}, metadata(model), out.parent) as written:
        if out.exists():
            out.rename(written.with_name("older"))  # one of the two stands until the other does
        written.rename(out)
    return out


def check_saved_model_path(out: Path) -> None:
    """InputError where TensorFlow would not load a SavedModel from, and where what is no SavedModel would be replaced."""
    check_text(out)
    if set(str(out)) & set("[\\"):
        raise InputError(f"{out}: TensorFlow loads no SavedModel from a path with [ or \\ in it; choose another directory")
    if out.exists() and not (out / "saved_model.pb").is_file():
        raise InputError(f"{out}: in the way, and no SavedModel that could be replaced; move it, or choose another directory")


@contextlib.contextmanager
def saving(module: tf.Module, signatures: dict, description: dict, folder: Path) -> typing.Iterator[Path]:
    """Within it, a SavedModel with metadata.json in a temporary directory of `folder`, to be renamed to where it belongs.

    Raises InputError if it cannot be written.
    """
    temporary = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=TEMPORARY, dir=folder))
        written = temporary / "model"  # with the permissions that are usual here, which the temporary directory has not
        tf.saved_model.save(module, str(written), signatures=signatures)
        (written / "assets.extra").mkdir()
        (written / "assets.extra" / "metadata.json").write_text(json.dumps(description, indent=1), encoding="utf-8")
        yield written
    except (OSError, tf.errors.OpError) as error:
        raise InputError(f"{folder}: cannot be written: {io_error_text(error)}") from None
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
