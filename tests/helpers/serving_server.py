"""A small server that answers as TF Serving does, over REST and gRPC, in front of an exported model: tests and the soak use it.

    python tests/helpers/serving_server.py exported/polarmask --rest 8501 --grpc 8500

The SavedModel is loaded into a session, with the tag "serve", and run by the tensor names of its signatures: the way TF
Serving runs it. What is answered, errors and their codes included, follows TF Serving's documentation of its REST API and its
sources (json_tensor.cc, http_rest_api_handler.cc, http_server.cc, predict_util.cc). There is no batching of requests, no
labels of versions, and no classify or regress.
"""

import argparse
import base64
import binascii
import contextlib
import dataclasses
import http.server
import json
import os
import re
import threading
from concurrent import futures
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import grpc
import numpy as np
import tensorflow as tf
from google.protobuf import json_format
from tensorflow_serving.apis import (
    get_model_metadata_pb2,
    model_service_pb2_grpc,
    predict_pb2,
    prediction_service_pb2_grpc,
)
from tensorflow_serving.apis import get_model_status_pb2 as status_pb2

INVALID_ARGUMENT, NOT_FOUND, FAILED_PRECONDITION = 3, 5, 9  # of google.rpc.Code, which TensorFlow and gRPC share
HTTP_STATUS = {3: 400, 4: 504, 5: 404, 6: 409, 7: 403, 8: 429, 9: 400, 10: 409, 11: 400, 12: 501, 14: 503, 16: 401}
GRPC_STATUS = {code.value[0]: code for code in grpc.StatusCode}
URL = re.compile(r"/v1/models/([^/:]+)(?:/versions/(\d+))?(:predict|/metadata)?", re.I)


class Refused(Exception):
    def __init__(self, code, message):
        super().__init__(message)
        self.code, self.message = code, message


@dataclasses.dataclass(frozen=True)
class Model:
    name: str
    version: int
    session: object
    signatures: dict  # name -> SignatureDef


def load(directory):
    """The newest version of the model directory NAME, which holds NAME/1, NAME/2, ..."""
    version = max(int(path.name) for path in Path(directory).iterdir() if path.name.isdigit())
    graph = tf.Graph()
    with graph.as_default():
        session = tf.compat.v1.Session(graph=graph)
        meta_graph = tf.compat.v1.saved_model.load(session, ["serve"], str(Path(directory) / str(version)))
    return Model(Path(directory).name, version, session, dict(meta_graph.signature_def))


def predict(model, signature, inputs):
    """Arrays by the signature's input names -> arrays by its output names, or Refused."""
    if set(inputs) != set(signature.inputs):
        missing, extra = set(signature.inputs) - set(inputs), set(inputs) - set(signature.inputs)
        raise Refused(
            INVALID_ARGUMENT,
            (
                f"input size does not match signature: {len(inputs)}!={len(signature.inputs)}. "
                f"Sent extra: {{{','.join(extra)}}}. Missing but required: {{{','.join(missing)}}}."
            ),
        )
    for name, value in inputs.items():
        wanted = tf.dtypes.as_dtype(signature.inputs[name].dtype)
        if tf.dtypes.as_dtype(value.dtype) != wanted:
            raise Refused(INVALID_ARGUMENT, f"input {name} is {value.dtype}, expected {wanted.name}")
    fetches = {name: info.name for name, info in sorted(signature.outputs.items())}
    try:
        return model.session.run(fetches, {signature.inputs[name].name: value for name, value in sorted(inputs.items())})
    except tf.errors.OpError as error:
        # Python adds the graph's construction to the message; the session itself said this:
        raise Refused(error.error_code, getattr(error.__context__, "message", error.message)) from None
    except (TypeError, ValueError) as error:  # a shape that the placeholder does not take
        raise Refused(INVALID_ARGUMENT, str(error)) from None


def _is_b64(value):
    return isinstance(value, dict) and list(value) == ["b64"] and isinstance(value["b64"], str)


def _bytes(value):
    if isinstance(value, list):
        return [_bytes(item) for item in value]
    if isinstance(value, str):
        return value.encode()
    if not _is_b64(value):
        raise Refused(INVALID_ARGUMENT, f"JSON Value: {json.dumps(value)} not formatted correctly for base64 data")
    try:
        return base64.b64decode(value["b64"], validate=True)
    except binascii.Error:
        raise Refused(INVALID_ARGUMENT, "Unable to base64 decode") from None


def _array(value, info):
    """JSON value -> array of the dtype that the signature's input has."""
    dtype = tf.dtypes.as_dtype(info.dtype)
    try:
        if dtype == tf.string:
            content = _bytes(value)
            if isinstance(content, list) and any(isinstance(item, list) for item in content):
                raise ValueError("Encountered list at unexpected level: 1 expected < 1")
            return np.array(content, object)
        array = np.array(value)
        if array.size and (array.dtype.kind not in ("iuf" if dtype.is_floating else "iu")):
            raise ValueError(f"JSON Value is not of expected type: {dtype.name}")
        return array.astype(dtype.as_numpy_dtype)
    except ValueError as error:
        raise Refused(INVALID_ARGUMENT, str(error)) from None


def _inputs_of_rows(instances, signature):
    if not isinstance(instances, list) or not instances:
        raise Refused(INVALID_ARGUMENT, "JSON Value: No values in 'instances' array")
    named = isinstance(instances[0], dict) and not _is_b64(instances[0])
    if not named:
        if len(signature.inputs) > 1:
            raise Refused(INVALID_ARGUMENT, "instances is a plain list, but expecting list of objects as multiple inputs")
        instances = [{next(iter(signature.inputs)): item} for item in instances]
    for number, item in enumerate(instances):
        if not isinstance(item, dict) or set(item) != set(signature.inputs):
            why = f"Failed to process element: {number} of 'instances' list. keys must be equal to: "
            raise Refused(INVALID_ARGUMENT, why + ",".join(sorted(signature.inputs)))
    return {name: _array([item[name] for item in instances], info) for name, info in signature.inputs.items()}


def _inputs_of_columns(inputs, signature):
    if not isinstance(inputs, dict) or _is_b64(inputs):
        if len(signature.inputs) > 1:
            raise Refused(INVALID_ARGUMENT, "inputs is a plain value/list, but expecting an object as multiple inputs")
        inputs = {next(iter(signature.inputs)): inputs}
    for name in signature.inputs:
        if name not in inputs:
            raise Refused(INVALID_ARGUMENT, f"Missing named input: {name} in 'inputs' object.")
    return {name: _array(inputs[name], info) for name, info in signature.inputs.items()}


def _json_value(name, value):
    """Array -> nested lists. Strings of outputs that are called NAME_bytes become {"b64": ...}, others text."""
    if value.dtype != object:
        return value.tolist()

    def text(item):
        if isinstance(item, list):
            return [text(inner) for inner in item]
        return {"b64": base64.b64encode(item).decode()} if name.endswith("_bytes") else item.decode()

    return text(value.tolist())


def predict_json(model, body):
    """The body of a REST request -> what is answered, as a dict."""
    try:
        document = json.loads(body or b"")
    except (ValueError, RecursionError) as error:
        raise Refused(INVALID_ARGUMENT, f"JSON Parse error: {error}") from None
    if not isinstance(document, dict):
        raise Refused(INVALID_ARGUMENT, "JSON Value: Is not object")
    name = document.get("signature_name") or "serving_default"
    if name not in model.signatures:
        raise Refused(INVALID_ARGUMENT, f'Serving signature name: "{name}" not found in signature def')
    signature = model.signatures[name]
    if not signature.inputs:
        raise Refused(INVALID_ARGUMENT, f"Failed to get input map for signature: {name}")
    if ("instances" in document) == ("inputs" in document):
        raise Refused(INVALID_ARGUMENT, "Missing 'inputs' or 'instances' key, or both")
    rows = "instances" in document
    read = _inputs_of_rows if rows else _inputs_of_columns
    outputs = predict(model, signature, read(document["instances" if rows else "inputs"], signature))
    values = {name: _json_value(name, value) for name, value in outputs.items()}
    if not rows:
        return {"outputs": values if len(values) > 1 else next(iter(values.values()))}
    if any(value.ndim == 0 for value in outputs.values()) or len({len(value) for value in outputs.values()}) > 1:
        raise Refused(INVALID_ARGUMENT, "an output has an inconsistent batch size")
    predictions = [dict(zip(values, row, strict=True)) for row in zip(*values.values(), strict=True)]
    return {"predictions": predictions if len(values) > 1 else next(iter(values.values()))}


def _metadata(model):
    answer = get_model_metadata_pb2.GetModelMetadataResponse()
    answer.model_spec.name, answer.model_spec.version.value = model.name, model.version
    signatures = get_model_metadata_pb2.SignatureDefMap()
    for name, signature in model.signatures.items():
        signatures.signature_def[name].CopyFrom(signature)
    answer.metadata["signature_def"].Pack(signatures)
    return answer, signatures


def _status(model):
    one = status_pb2.ModelVersionStatus(version=model.version, state=status_pb2.ModelVersionStatus.AVAILABLE)
    one.status.error_code = 0
    return status_pb2.GetModelStatusResponse(model_version_status=[one])


def _as_dict(message):
    return json_format.MessageToDict(message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)


def rest_answer(model, method, path, body):
    """(HTTP status, what is answered as a dict)."""
    matched = URL.fullmatch(path)
    try:
        if not matched or (method == "POST") != (matched[3] == ":predict"):
            raise Refused(INVALID_ARGUMENT, f"Malformed request: {method} {path}")
        name, version, what = matched.groups()
        if name != model.name or version not in (None, str(model.version)):
            asked = f"Specific({name}, {version})" if version else f"Latest({name})"
            raise Refused(
                NOT_FOUND,
                (f"Servable not found for request: {asked}" if what else f"Could not find any versions of model {name}"),
            )
        if what == ":predict":
            return 200, predict_json(model, body)
        if what:
            spec = {"name": name, "signature_name": "", "version": str(model.version)}
            return 200, {"model_spec": spec, "metadata": {"signature_def": _as_dict(_metadata(model)[1])}}
        return 200, _as_dict(_status(model))
    except Refused as refused:
        return HTTP_STATUS.get(refused.code, 500), {"error": refused.message}


def _rest_handler(model):
    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self):
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            status, document = rest_answer(model, self.command, self.path, body)
            content = json.dumps(document).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = answer

        def log_message(self, *_):
            pass

    return Handler


class _HTTPServer(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128


class _Service(prediction_service_pb2_grpc.PredictionServiceServicer, model_service_pb2_grpc.ModelServiceServicer):
    def __init__(self, model):
        self.model = model

    def _answer(self, context, request, make):
        spec = request.model_spec
        try:
            if spec.name != self.model.name or spec.version.value not in (0, self.model.version):
                raise Refused(NOT_FOUND, f"Servable not found for request: Latest({spec.name})")
            return make()
        except Refused as refused:
            context.abort(GRPC_STATUS[refused.code], refused.message)

    def Predict(self, request, context):
        def make():
            name = request.model_spec.signature_name or "serving_default"
            if name not in self.model.signatures:
                raise Refused(FAILED_PRECONDITION, f'Serving signature key "{name}" not found.')
            inputs = {name: tf.make_ndarray(value) for name, value in request.inputs.items()}
            outputs = predict(self.model, self.model.signatures[name], inputs)
            answer = predict_pb2.PredictResponse()
            for output, value in outputs.items():
                answer.outputs[output].CopyFrom(tf.make_tensor_proto(value))
            return answer

        return self._answer(context, request, make)

    def GetModelMetadata(self, request, context):
        return self._answer(context, request, lambda: _metadata(self.model)[0])

    def GetModelStatus(self, request, context):
        return self._answer(context, request, lambda: _status(self.model))


@contextlib.contextmanager
def serve(directory, rest_port=0, grpc_port=0, threads=16):
    """Serves the model directory on this machine while the context lasts; gives (name, "host:rest port", "host:grpc port")."""
    model = load(directory)
    rest = _HTTPServer(("127.0.0.1", rest_port), _rest_handler(model))
    server = grpc.server(futures.ThreadPoolExecutor(threads), options=[("grpc.max_receive_message_length", -1)])
    service = _Service(model)
    prediction_service_pb2_grpc.add_PredictionServiceServicer_to_server(service, server)
    model_service_pb2_grpc.add_ModelServiceServicer_to_server(service, server)
    grpc_port = server.add_insecure_port(f"127.0.0.1:{grpc_port}")
    server.start()
    thread = threading.Thread(target=rest.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield model.name, f"127.0.0.1:{rest.server_port}", f"127.0.0.1:{grpc_port}"
    finally:
        rest.shutdown()
        rest.server_close()
        server.stop(None).wait()
        thread.join()
        model.session.close()


def main():
    parser = argparse.ArgumentParser(description="Answers as TF Serving does; for tests.")
    parser.add_argument("directory", help="the model's directory, which holds 1/, 2/, ...")
    parser.add_argument("--rest", type=int, default=8501, help="port")
    parser.add_argument("--grpc", type=int, default=8500, help="port")
    args = parser.parse_args()
    with serve(args.directory, args.rest, args.grpc) as (name, rest, grpc_address):
        print(f"{name} at http://{rest} and grpc {grpc_address}", flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
