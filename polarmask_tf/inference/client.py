"""Predictors of a model behind TF Serving: http://HOST:8501/v1/models/NAME and grpc://HOST:8500/NAME.

Images are sent as PNG, which loses nothing, one a request, so that a refused one costs no other. The model must be one that
`polarmask export --serving` wrote: class names come from its signature `metadata`, since TF Serving's own metadata has none.
"""

import base64
import functools
import http.client
import io
import json
import re
import time
import urllib.error
import urllib.request
from concurrent import futures

import numpy as np
from PIL import Image

from polarmask_tf import lite
from polarmask_tf.errors import InputError
from polarmask_tf.inference.predictor import Predictor

TIMEOUT = 60  # seconds a request may take
WAITS = (0.25, 1, 4)  # seconds before each further try
AT_ONCE = 8  # requests
MAYBE_LATER = (429, 503, 504)  # HTTP; in gRPC RESOURCE_EXHAUSTED, UNAVAILABLE and DEADLINE_EXCEEDED


class _Refused(Exception):
    """The server's no, in one line; asking again would not change it."""


class _Busy(Exception):
    """What may be over soon: no connection, no answer in time, or an overloaded server."""


def connect(url):
    """URL as above -> (Predictor, the model's max_detections or None).

    Raises InputError for another URL, and where no such model is served there. The predictor raises it for an image that
    the server refuses, for an answer that is none, and if there still is none after a few tries.
    """
    web = re.fullmatch(r"https?://[^/]+/v1/models/[^/:]+(/versions/\d+)?/?", url)
    direct = re.fullmatch(r"grpc://([^/]+)/([^/]+)/?", url)
    if not web and not direct:
        raise InputError(f"{url}: must look like http://HOST:8501/v1/models/NAME or grpc://HOST:8500/NAME")
    ask = _http(url.rstrip("/")) if web else _grpc(*direct.groups())
    try:
        text = _patiently(ask, "metadata", "request", b"")["metadata"][0]
    except _Refused as error:
        raise InputError(f"{url}: {error}; is a model served there that `polarmask export --serving` wrote?") from None
    except _Busy as error:
        raise InputError(f"{url}: {error}") from None
    except (KeyError, IndexError, TypeError):
        raise InputError(f"{url}: the answer does not come from a model that `polarmask export --serving` wrote") from None
    try:
        metadata = json.loads(text)
        classes, size = metadata["classes"], (metadata["input"]["height"], metadata["input"]["width"])
        named = [(entry["name"], entry["category_id"]) for entry in classes]
    except (ValueError, KeyError, TypeError):
        named = None
    if not named:
        raise InputError(f"{url}: the model's metadata names no classes; export it again with `polarmask export --serving`")

    def run(images):
        with futures.ThreadPoolExecutor(AT_ONCE) as pool:
            return list(pool.map(functools.partial(_detect, url, ask, len(classes)), images))

    return Predictor("served", classes, size, AT_ONCE, run), metadata.get("max_detections")


def _detect(url, ask, num_classes, image):
    """What lite.unpack gives, of one image uint8 [h, w, 3]."""
    height, width = image.shape[:2]
    content = io.BytesIO()
    Image.fromarray(image).save(content, "PNG", compress_level=1)
    try:
        outputs = _check(_patiently(ask, "serving_default", "image_bytes", content.getvalue()), num_classes)
    except _Refused as error:
        raise InputError(f"{url}: the server refused an image of {width} x {height} pixels: {error}") from None
    except _Busy as error:
        raise InputError(f"{url}: {error}") from None
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise InputError(f"{url}: the answer is not as the export contract says: {_one_line(error)}") from None
    return lite.unpack(outputs, 0, width, height, height, width)


def _check(outputs, num_classes):
    """The named outputs of one image as arrays; ValueError where they are not as in exports/README.md."""
    arrays = {
        name: np.asarray(outputs[name], np.int32 if name in ("num_detections", "detection_classes") else np.float32)
        for name in ("num_detections", "detection_scores", "detection_classes", "detection_boxes", "detection_polygons")
    }
    count, scores, classes, boxes, polygons = arrays.values()
    if scores.ndim != 2 or polygons.ndim != 4:
        raise ValueError(f"detection_scores {list(scores.shape)}, detection_polygons {list(polygons.shape)}")
    most, rays = scores.shape[1], polygons.shape[2]
    wanted = [(1,), (1, most), (1, most), (1, most, 4), (1, most, rays, 2)]
    for (name, array), shape in zip(arrays.items(), wanted, strict=True):
        if array.shape != shape:
            raise ValueError(f"{name} {list(array.shape)}, expected {list(shape)}")
    if not 0 <= count[0] <= most or not ((classes >= 0) & (classes < num_classes)).all():
        raise ValueError("a number of detections or a class out of range")
    if not all(np.isfinite(array).all() for array in (scores, boxes, polygons)):
        raise ValueError("a number that is not finite")
    return arrays


def _patiently(ask, *question):
    """ask(*question), again after each of WAITS while the server is busy."""
    for wait in WAITS:
        try:
            return ask(*question)
        except _Busy:
            time.sleep(wait)
    return ask(*question)


def _http(url):
    """ask(signature, input name, content: bytes) -> outputs by name, nested lists of a batch of one."""

    def ask(signature, name, content):
        inputs = {name: [{"b64": base64.b64encode(content).decode()}]}
        body = json.dumps({"signature_name": signature, "inputs": inputs}).encode()
        request = urllib.request.Request(f"{url}:predict", body, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
                outputs = json.loads(answer.read())["outputs"]
        except urllib.error.HTTPError as error:
            what = _http_reason(error)
            raise (_Busy if error.code in MAYBE_LATER else _Refused)(what) from None
        except TimeoutError:
            raise _Busy(f"no answer in {TIMEOUT} s") from None
        except (OSError, http.client.HTTPException) as error:
            raise _Busy(f"cannot be reached: {_one_line(getattr(error, 'reason', error))}") from None
        except (ValueError, KeyError, TypeError, RecursionError):
            raise _Refused("the answer is not TF Serving's JSON") from None
        return outputs if isinstance(outputs, dict) else {signature: outputs}  # TF Serving gives an only output no name

    return ask


def _http_reason(error):
    try:
        return _one_line(json.loads(error.read())["error"])
    except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError):
        return f"HTTP {error.code} {error.reason}"


def _grpc(address, model):
    """The same by gRPC, with arrays in place of lists."""
    try:
        import grpc
        import tensorflow as tf
        from tensorflow_serving.apis import predict_pb2, prediction_service_pb2_grpc
    except ImportError:
        raise InputError("grpc:// needs tensorflow-serving-api: pip install 'polarmask_tf[serving]'") from None
    options = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
    stub = prediction_service_pb2_grpc.PredictionServiceStub(grpc.insecure_channel(address, options))
    later = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.RESOURCE_EXHAUSTED)

    def ask(signature, name, content):
        request = predict_pb2.PredictRequest()
        request.model_spec.name, request.model_spec.signature_name = model, signature
        request.inputs[name].CopyFrom(tf.make_tensor_proto([content], tf.string))
        try:
            answer = stub.Predict(request, timeout=TIMEOUT)
        except grpc.RpcError as error:
            raise (_Busy if error.code() in later else _Refused)(_one_line(error.details() or error.code().name)) from None
        try:
            return {name: tf.make_ndarray(value) for name, value in answer.outputs.items()}
        except (TypeError, ValueError) as error:
            raise _Refused(f"the answer cannot be read: {_one_line(error)}") from None

    return ask


def _one_line(reason):
    """TensorFlow names the graph's nodes behind a reason, and numbers it if several operations failed."""
    text = re.sub(r"\[\[.*?\]\]", "", str(reason), flags=re.S)
    several = re.search(r"\(0\) [A-Za-z_ ]+: (.*?)(\n|$)", text)
    text = " ".join((several[1] if several else text).split())
    return re.sub(r"^assertion failed: \[(.*)\]$", r"\1", text)[:300]
