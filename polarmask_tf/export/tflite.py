"""A .tflite file of builtin operations alone, from one uint8 image of fixed size to polygons, or to the head's outputs."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import tensorflow as tf

from polarmask_tf.config import DataConfig
from polarmask_tf.errors import InputError
from polarmask_tf.export import quantize
from polarmask_tf.export.graph import metadata
from polarmask_tf.files import replacing
from polarmask_tf.modeling.polarmask import PolarMask
from polarmask_tf.ops import geometry, postprocess

# float32; float16 weights, computed in float32; 8-bit weights alone; 8 bits but for what needs float, see quantize.py.
PRECISIONS = ("fp32", "fp16", "dynamic", "int8")
# What a raw file calls the head's outputs: P3_classes, ...
RAW_NAMES = {"class_logits": "classes", "centerness_logits": "centerness", "ray_logits": "rays"}


def file_name(precision: str = "fp32", raw: bool = False) -> str:
    """model.tflite, model_int8.tflite, model_raw.tflite, model_int8_raw.tflite, ..."""
    return "_".join(["model", *([precision] if precision != "fp32" else []), *(["raw"] if raw else [])]) + ".tflite"


def file_fit(data: DataConfig) -> str:
    """How an image meets the file's one fixed size: data.fit, but letterbox for short_side, which has no one size."""
    return "letterbox" if data.fit == "short_side" else data.fit


def check_raw(model: PolarMask) -> None:
    """InputError for a model whose raw outputs nothing would make polygons of."""
    config = model.config
    if config.model.refine_channels:
        raise InputError("--raw: nothing would refine the polygons; only of a model trained with --set model.refine_channels=0")
    if config.model.head.box or config.conventions != "paper" or config.model.rays == 4:
        raise InputError("--raw: lite.py assembles rays alone; not with model.head.box, conventions: released or model.rays: 4")


class TFLiteModule(tf.Module):
    """What is converted: detections in one image, or, if `raw`, the head's outputs."""

    def __init__(self, model: PolarMask, raw: bool = False):
        super().__init__()
        self.variables_ = list(model.variables)

        @tf.function(input_signature=[tf.TensorSpec([1, *model.input_size, 3], tf.uint8, "images")])
        def run(images):
            if not raw:
                return model.detect(images)
            outputs = model(images, training=False)
            return {f"P{level}_{RAW_NAMES[name]}": value for level, maps in outputs.items() for name, value in maps.items()}

        self.run = run


def convert(
    model: PolarMask, precision: str = "fp32", *, raw: bool = False, images: Callable[[], Iterable[np.ndarray]] | None = None
) -> bytes:
    """The TFLite flatbuffer: input `images` uint8 [1, H, W, 3], outputs as exports/README.md says.

    Args:
      precision: one of PRECISIONS.
      raw: ends at the head's outputs, float32 logits: P3_classes [1, h, w, C], P3_centerness, P3_rays, and so on by level.
      images: for int8: gives uint8 [H, W, 3] as the network takes them, on which ranges are measured.

    Raises InputError for a raw file of a model that check_raw refuses.
    """
    if raw:
        check_raw(model)
    module = TFLiteModule(model, raw)
    # Names of inputs and outputs survive conversion only by way of a SavedModel with a signature.
    with tempfile.TemporaryDirectory() as folder, without_native_log():
        tf.saved_model.save(module, folder, signatures={"serving_default": module.run})
        if precision == "int8":
            return quantize.int8(folder, images)
        if precision == "dynamic":
            return quantize.dynamic(folder)
        if precision == "fp16":
            return quantize.half(folder)
        converter = tf.lite.TFLiteConverter.from_saved_model(folder)
        converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS]
        return converter.convert()


@contextlib.contextmanager
def without_native_log():
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


def export_tflite(model: PolarMask, out: Path, precision: str = "fp32", *, raw: bool = False, images=None) -> Path:
    """Writes the file `out`, with metadata.json zipped onto its end (runtimes ignore it), and returns it; see `convert`.

    Raises InputError if it cannot be written.
    """
    content = convert(model, precision, raw=raw, images=images)
    described = {
        **metadata(model, file_fit(model.config.data)),
        "precision": precision,
        "flatbuffer_bytes": len(content),  # what comes before the zip file
        "flatbuffer_sha256": hashlib.sha256(content).hexdigest(),
    }
    if model.config.model.head.box:
        described["cpu_only"] = True  # LiteRT's GPU delegate gives other polygons (exports/README.md), and no error
    if raw:
        options = model.config.postprocess
        assembling = {  # what lite.assemble needs to know
            "ray_units": model.ray_units,
            "ray_limit": geometry.MAX_RAY_LOGIT,
            "score_threshold": postprocess.uncalibrated(options.score_threshold, options.temperature, options.score_bias),
            "temperature": options.temperature,
            "score_bias": options.score_bias,
            "candidates": options.pre_nms_top_k,
            "nms_iou": options.nms_iou_threshold,
            "voting_iou": options.voting_iou_threshold,
            "max_detections": options.max_detections,
            "multi_label": options.multi_label,
        }
        described |= {"output": "the head's logits by level; lite.py makes polygons of them", "raw": assembling}
    with replacing(out) as part:
        part.write_bytes(content)
        with zipfile.ZipFile(part, "a") as archive:
            archive.writestr("metadata.json", json.dumps(described, indent=1))
    return out
