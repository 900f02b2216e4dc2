"""A .tflite file of builtin operations alone, from one uint8 image of fixed size to polygons."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
import zipfile
from pathlib import Path

import tensorflow as tf

from polarmask_tf.config import DataConfig, canvas
from polarmask_tf.export.saved_model import metadata
from polarmask_tf.modeling.polarmask import PolarMask


def fit(data: DataConfig) -> str:
    """How an image meets the file's one fixed size: data.fit, but letterbox for short_side, which has no one size."""
    return "letterbox" if data.fit == "short_side" else data.fit


def convert(model: PolarMask) -> bytes:
    """The float32 TFLite flatbuffer: input `images` uint8 [1, H, W, 3], outputs as exports/README.md says."""

    class Edge(tf.Module):
        def __init__(self):
            super().__init__()
            self.variables_ = list(model.variables)

        @tf.function(input_signature=[tf.TensorSpec([1, *canvas(model.config.data), 3], tf.uint8, "images")])
        def detect(self, images):
            return model.detect(images)

    edge = Edge()
    # Names of inputs and outputs survive conversion only by way of a SavedModel with a signature.
    with tempfile.TemporaryDirectory() as folder:
        tf.saved_model.save(edge, folder, signatures={"serving_default": edge.detect})
        converter = tf.lite.TFLiteConverter.from_saved_model(folder)
        converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS]
        with _without_native_log():
            return converter.convert()


@contextlib.contextmanager
def _without_native_log():
    """The converter's C++ side writes warnings nobody can act on straight to file descriptor 2; errors are raised anyway."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def export_tflite(model: PolarMask, classes: list[dict], out: Path) -> Path:
    """Writes the file `out`, with metadata.json zipped onto its end (runtimes ignore it), and returns it."""
    beside = out.with_name(out.name + ".tmp")
    beside.write_bytes(convert(model))
    with zipfile.ZipFile(beside, "a") as archive:
        archive.writestr("metadata.json", json.dumps(metadata(model, classes, fit(model.config.data)), indent=1))
    os.replace(beside, out)
    return out
