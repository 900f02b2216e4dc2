"""A model behind TF Serving: http://HOST:8501/v1/models/NAME and grpc://HOST:8500/NAME.

Images are sent as PNG, which loses nothing, one a request, so that a refused one costs no other. The model must be one that
`polarmask export --serving` wrote: class names come from its signature `metadata`, since TF Serving's own metadata has none.
A server is not trusted: what it may take and send is bounded, and its answers are checked against the export contract.
"""

import base64
import contextlib
import functools
import http.client
import io
import json
import re
import socket
import time
import urllib.parse
from concurrent import futures

import numpy as np
from PIL import Image

from polarmask_tf import lite
from polarmask_tf.errors import InputError

TIMEOUT = 60  # seconds for a question: connecting, sending, every byte of the answer, and all tries
WAITS = (0.25, 1, 4)  # seconds before each further try
AT_ONCE = 8  # requests
MAX_ANSWER = 2**25  # bytes; 1,000 detections of 36 rays are 2 MB of JSON
MAX_NUMBERS = 2**24  # of all its outputs
BAD_INPUT = (400, "INVALID_ARGUMENT")
MAYBE_LATER = (429, 503, 504, "RESOURCE_EXHAUSTED", "UNAVAILABLE", "DEADLINE_EXCEEDED")


class Refused(Exception):
    """The server's no, or why there is no answer, in one line. `code`: HTTP's number or gRPC's name, None where it is neither.

    `busy`: asking again may help: no connection, no answer in time, or an overloaded server.
    """

    def __init__(self, reason, code=None, busy=False):
        super().__init__(one_line(reason))
        self.code, self.busy = code, busy


def connect(url):
    """URL as above -> (metadata.json of the model, function as Predictor.run).

    Raises InputError for another URL, and where no such model is served there; so does the function for an image that the
    server refuses, for an answer that is none, and if there still is none after a few tries.
    """
    ask = asker(url)
    try:
        text = patiently(ask, "metadata", "request", [b""])["metadata"][0]
        metadata = lite.check_metadata(json.loads(text), "its metadata")
    except Refused as error:
        hint = "" if error.busy else "; is a model served there that `polarmask export --serving` wrote?"
        raise InputError(f"{url}: {error}{hint}") from None
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        why = one_line(error)
        raise InputError(f"{url}: no model that `polarmask export --serving` wrote answers there ({why})") from None

    def run(images):
        with futures.ThreadPoolExecutor(AT_ONCE) as pool:
            return list(pool.map(functools.partial(_detect, url, ask, metadata), images))

    return metadata, run


def asker(url):
    """The function ask(signature, input name, contents: list of bytes, seconds) -> outputs by name, of a URL as above.

    Outputs are arrays or nested lists. It raises Refused. InputError for another URL.
    """
    web = re.fullmatch(r"https?://[^/\s]+/v1/models/[^/:\s]+(/versions/\d+)?/?", url)
    direct = re.fullmatch(r"grpc://([^/\s]+)/([^/\s]+)/?", url)
    if not web and not direct:
        raise InputError(f"{url}: must look like http://HOST:8501/v1/models/NAME or grpc://HOST:8500/NAME")
    return _http(url.rstrip("/")) if web else _grpc(*direct.groups())


def patiently(ask, *question):
    """ask(*question, seconds), again after each of WAITS while the server is busy and TIMEOUT is not over."""
    deadline = time.monotonic() + TIMEOUT
    for wait in (*WAITS, TIMEOUT):
        try:
            return ask(*question, deadline - time.monotonic())
        except Refused as error:
            if not error.busy or time.monotonic() + wait >= deadline:
                raise
        time.sleep(wait)


def _detect(url, ask, metadata, image):
    """What lite.unpack gives, of one image uint8 [h, w, 3]."""
    height, width = image.shape[:2]
    content = io.BytesIO()
    Image.fromarray(image).save(content, "PNG", compress_level=1)
    try:
        outputs = lite.check_outputs(patiently(ask, "serving_default", "image_bytes", [content.getvalue()]), metadata)
    except Refused as error:
        what = "" if error.busy else f"the server refused an image of {width} x {height} pixels: "
        raise InputError(f"{url}: {what}{error}") from None
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError(f"{url}: the answer is not as the export contract says: {one_line(error)}") from None
    return lite.unpack(outputs, 0, width, height, height, width)


class _Incoming(io.RawIOBase):
    """What a socket receives, up to MAX_ANSWER bytes and a deadline, in the form that http.client reads from."""

    def __init__(self, sock, deadline):
        self.sock, self.deadline, self.left = sock, deadline, MAX_ANSWER

    def makefile(self, _):
        return io.BufferedReader(self)

    def readable(self):
        return True

    def readinto(self, buffer):
        self.sock.settimeout(_until(self.deadline))
        count = self.sock.recv_into(buffer)
        self.left -= count
        if self.left < 0:
            raise Refused(f"the answer is longer than {MAX_ANSWER:,} bytes")
        return count


def _until(deadline):
    if (seconds := deadline - time.monotonic()) <= 0:
        raise TimeoutError
    return seconds


def _http(url):
    def post(body, deadline):
        """(response, its content). Directly: through no proxy, and without following elsewhere."""
        parts = urllib.parse.urlsplit(url)
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        connection = kind(parts.netloc, timeout=_until(deadline))
        try:
            addresses = socket.getaddrinfo(connection.host, connection.port, type=socket.SOCK_STREAM)
            connection.timeout = _until(deadline) / (1 + len(addresses))  # they are tried in turn; then comes TLS
            connection.connect()
            connection.sock.settimeout(_until(deadline))
            headers = {"Content-Type": "application/json", "Content-Length": str(sum(map(len, body)))}
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # answered before all was read: too large, say
                connection.request("POST", f"{parts.path}:predict", body, headers)  # in parts: an image may be large
            response = http.client.HTTPResponse(_Incoming(connection.sock, deadline), method="POST")
            response.begin()
            content = b"".join(iter(lambda: response.read(2**20), b""))
            if response.length:  # bytes that were promised and did not come
                raise http.client.IncompleteRead(content)
            return response, content
        finally:
            connection.close()

    def ask(signature, name, contents, seconds):
        images = b", ".join(b'{"b64": "' + base64.b64encode(content) + b'"}' for content in contents)
        body = [f'{{"signature_name": "{signature}", "inputs": {{"{name}": ['.encode(), images, b"]}}"]
        try:
            response, content = post(body, time.monotonic() + seconds)
        except TimeoutError:
            raise Refused(f"no answer in {TIMEOUT} s", busy=True) from None
        except (OSError, http.client.HTTPException, ValueError) as error:  # ValueError: a host or a length that is none
            raise Refused(f"cannot be reached: {lite.one_line(error)}", busy=True) from None
        try:
            document = json.loads(content)
            if response.status == 200:
                outputs = document["outputs"]
                return outputs if isinstance(outputs, dict) else {signature: outputs}  # an only output has no name
            reason = str(document["error"])
        except (ValueError, LookupError, TypeError, RecursionError):
            reason = f"HTTP {response.status} {response.reason}"
            reason = "the answer is not TF Serving's JSON" if response.status == 200 else reason
        raise Refused(reason, response.status, response.status in MAYBE_LATER)

    return ask


def _grpc(address, model):
    try:
        import grpc
        import tensorflow as tf
        from tensorflow_serving.apis import predict_pb2, prediction_service_pb2_grpc
    except ImportError:
        raise InputError("grpc:// needs tensorflow-serving-api: pip install 'polarmask_tf[serving]'") from None
    options = [("grpc.max_receive_message_length", MAX_ANSWER), ("grpc.max_send_message_length", -1)]
    stub = prediction_service_pb2_grpc.PredictionServiceStub(grpc.insecure_channel(address, options))

    def ask(signature, name, contents, seconds):
        request = predict_pb2.PredictRequest()
        request.model_spec.name, request.model_spec.signature_name = model, signature
        request.inputs[name].CopyFrom(tf.make_tensor_proto(contents, tf.string))
        try:
            outputs = stub.Predict(request, timeout=seconds).outputs
        except grpc.RpcError as error:
            code, reason = error.code().name, error.details() or error.code().name
            raise Refused(reason, code, code in MAYBE_LATER and "larger than max" not in reason) from None
        # A tensor may say that it is large and hold one number.
        sizes = [np.prod([abs(side.size) for side in value.tensor_shape.dim], dtype=float) for value in outputs.values()]
        if sum(sizes) > MAX_NUMBERS:
            raise Refused(f"the answer has {sum(sizes):.3g} numbers, and the limit is {MAX_NUMBERS:,}")
        try:
            return {output: tf.make_ndarray(value) for output, value in outputs.items()}
        except (TypeError, ValueError) as error:
            raise Refused(f"the answer cannot be read: {error}") from None

    return ask


def one_line(reason):
    """TensorFlow names the graph's nodes behind a reason, and numbers it if several operations failed."""
    text = re.sub(r"\[\[.*?\]\]", "", str(reason)[:4000], flags=re.S)
    several = re.search(r"\(0\) [A-Za-z_ ]+: (.*?)(\n|$)", text)
    text = lite.one_line(several[1] if several else text, 4000)
    return re.sub(r"^assertion failed: \[(.*)\]$", r"\1", text)[:300]
