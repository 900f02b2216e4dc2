"""The directory that TF Serving takes as it is: signatures from encoded images, warm-up requests, labels and metadata."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import numpy as np
import tensorflow as tf

from polarmask_tf.config import CONVENTIONS, DataConfig
from polarmask_tf.errors import InputError
from polarmask_tf.export import decode, model_garden
from polarmask_tf.export.graph import check_saved_model_path, detect, metadata, saving
from polarmask_tf.modeling.polarmask import PolarMask
from polarmask_tf.ops.placement import resize

WARM_UP_SIZE = (96, 128)  # height and width of the picture in the warm-up requests


def export_serving(
    model: PolarMask,
    out: Path,
    *,
    name: str,
    contract: str | None = None,
    max_pixels: int = 50_000_000,
    mask_size: int = 28,
) -> Path:
    """Writes a new version of a model for TF Serving, out/NAME/1 or the next free number, and returns it.

    Signatures: exports/README.md. The version appears under its number only when it is complete; older ones stay.

    Args:
      name: what the model is called in requests; a directory of this name is made in `out`.
      contract: "model_garden" adds signatures with the outputs of its Mask R-CNN.
      max_pixels: an encoded image of more pixels is refused.
      mask_size: cells a side of the contract's masks.

    Raises InputError for values that cannot be, without tensorflow-serving-api, and if `out` cannot be written.
    """
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_.-]*", name):
        raise InputError(f"--name {name!r}: letters, digits and _.- are possible, a letter or _ first")
    if contract not in (None, "model_garden"):
        raise InputError(f"--contract {contract!r}: possible is model_garden")
    if max_pixels < 1 or mask_size < 1:
        raise InputError("the limit of pixels and the size of masks must be at least 1")
    _protos()
    folder = out / name
    check_saved_model_path(folder / "new")
    description = {**metadata(model), "serving": {"name": name, "max_pixels": max_pixels, "contract": contract}}
    module = ServingModule(model, json.dumps(description), contract, max_pixels, mask_size)
    with saving(module, module.functions, description, folder) as written:  # not a number: TF Serving does not look at it
        labels = "".join(" ".join(str(entry["name"]).split()) + "\n" for entry in model.classes)
        (written / "assets.extra" / "labels.txt").write_text(labels, encoding="utf-8")
        with tf.io.TFRecordWriter(str(written / "assets.extra" / "tf_serving_warmup_requests")) as writer:
            for record in warm_up(module.functions, name):
                writer.write(record.SerializeToString())
        return _publish(written, folder)


def place_encoded(contents: tf.Tensor, data: DataConfig, max_pixels: int, examples: bool = False):
    """Encoded images, string [B], to what the network takes; see decode.place_batch."""

    def place(image):
        padded, filled = _place(image[tf.newaxis], data)
        return padded[0], filled

    return decode.place_batch(contents, place, max_pixels, examples)


def _place(images, data):
    """placement.resize, with the height and width filled, in pixels."""
    padded, filled = resize(images, data.size, data.fit)
    return padded, tf.round(filled[::-1] * tf.cast(tf.shape(padded)[1:3], tf.float32))


class ServingModule(tf.Module):
    """What is saved: the variables and the signatures, which all run one and the same network function."""

    def __init__(self, model: PolarMask, description: str, contract: str | None, max_pixels: int, mask_size: int):
        super().__init__()
        self.variables_ = list(model.variables)
        data, box_branch = model.config.data, CONVENTIONS[model.config.conventions].box_nms
        size = (None, None) if data.fit == "short_side" else data.size
        text, pixels = tf.TensorSpec([None], tf.string), tf.TensorSpec([None, None, None, 3], tf.uint8)

        @tf.function(input_signature=[tf.TensorSpec([None, *size, 3], tf.uint8), tf.TensorSpec([None, 2])])
        def network(padded, filled):
            return detect(model, padded, filled[:, ::-1] / tf.cast(tf.shape(padded)[2:0:-1], tf.float32))

        network = network.get_concrete_function()

        def alone(given):
            padded, filled, canvas = given
            found = network(padded[tf.newaxis, : canvas[0], : canvas[1]], filled[tf.newaxis])
            return {name: value[0] for name, value in found.items()}

        def detections(padded, filled):
            """Of each image as if it were sent alone (one does not see the padding to another's canvas), and its canvas."""
            if data.fit != "short_side":
                return network(padded, filled), tf.broadcast_to(tf.shape(padded)[1:3], tf.shape(filled))
            canvases = tf.cast(-(-filled // 32) * 32, tf.int32)
            shapes = {name: tf.TensorSpec(value.shape[1:], value.dtype) for name, value in network.structured_outputs.items()}
            found = tf.cond(
                tf.reduce_all(canvases == tf.shape(padded)[1:3]),
                lambda: network(padded, filled),
                lambda: tf.map_fn(alone, (padded, filled, canvases), fn_output_signature=shapes, parallel_iterations=1),
            )
            return found, canvases

        # Each gives padded images, heights and widths filled, heights and widths of the images. (As functions of their own,
        # decoders are in the graph once.)
        @tf.function(input_signature=[text])
        def from_bytes(contents):
            return place_encoded(contents, data, max_pixels)

        @tf.function(input_signature=[text])
        def from_examples(contents):
            return place_encoded(contents, data, max_pixels, examples=True)

        def from_images(images):
            sides = tf.shape(images)[1:3]
            with tf.control_dependencies([tf.debugging.Assert(tf.reduce_all(sides > 0), ["images without pixels"])]):
                padded, filled = _place(tf.identity(images), data)
            many = [tf.shape(images)[0], 1]
            return padded, tf.tile(filled[tf.newaxis], many), tf.tile(tf.cast(sides, tf.float32)[tf.newaxis], many)

        def ours(padded, filled, _):
            return detections(padded, filled)[0]

        def theirs(padded, filled, sizes):
            found, canvases = detections(padded, filled)
            return model_garden.outputs(found, sizes, filled, canvases, mask_size, box_branch)

        def told(request):
            return {"metadata": tf.fill(tf.shape(request), description)}

        def signature(spec, name, read, answer):
            given = tf.TensorSpec(spec.shape, spec.dtype, name)
            return tf.function(lambda given: answer(*read(given)), input_signature=[given])

        self.functions = {
            "serving_default": signature(text, "image_bytes", from_bytes, ours),
            "images": signature(pixels, "images", from_images, ours),
            "tf_example": signature(text, "examples", from_examples, ours),
            # TF Serving gives a client the signatures, but no file of the model's.
            "metadata": signature(text, "request", lambda request: [request], told),
        }
        if contract == "model_garden":  # by its names for kinds of input; the tensor is called `inputs` in all of them
            kinds = [("image_bytes", text, from_bytes), ("image_tensor", pixels, from_images)]
            for kind, spec, read in [*kinds, ("tf_example", text, from_examples)]:
                self.functions[f"model_garden_{kind}"] = signature(spec, "inputs", read, theirs)


def warm_up(signatures: dict, name: str) -> list:
    """A tensorflow_serving.apis PredictionLog of one picture for every signature.

    TF Serving runs them when it loads a model, from assets.extra/tf_serving_warmup_requests.
    """
    predict_pb2, prediction_log_pb2 = _protos()
    height, width = WARM_UP_SIZE
    y, x = np.mgrid[:height, :width]
    image = np.stack([x + y, 2 * x, 255 - y], axis=-1).astype(np.uint8)
    encoded = tf.io.encode_jpeg(image).numpy()
    feature = tf.train.Feature(bytes_list=tf.train.BytesList(value=[encoded]))
    example = tf.train.Example(features=tf.train.Features(feature={"image/encoded": feature})).SerializeToString()
    records = []
    for key, function in signatures.items():
        (given,) = function.input_signature
        content = image[np.newaxis] if given.dtype == tf.uint8 else [example if key.endswith("tf_example") else encoded]
        request = predict_pb2.PredictRequest()
        request.model_spec.name, request.model_spec.signature_name = name, key
        request.inputs[given.name].CopyFrom(tf.make_tensor_proto(content, given.dtype))
        records.append(prediction_log_pb2.PredictionLog(predict_log=prediction_log_pb2.PredictLog(request=request)))
    return records


def _protos():
    try:
        from tensorflow_serving.apis import predict_pb2, prediction_log_pb2
    except ImportError:
        raise InputError("warm-up requests need tensorflow-serving-api: pip install 'polarmask_tf[serving]'") from None
    return predict_pb2, prediction_log_pb2


def _publish(whole: Path, folder: Path) -> Path:
    """Renames a complete version to the next free number in its model's folder, and returns its new path."""
    while True:
        versions = [int(path.name) for path in folder.iterdir() if path.name.isdecimal()]
        version = folder / str(max(versions, default=0) + 1)
        try:
            os.rename(whole, version)
            return version
        except OSError:
            if not version.exists():  # else another export was faster
                raise
