"""Send image files to a PolarMask behind TF Serving; draw what comes back and write it down as JSON.

    pip install numpy pillow                    # and tensorflow-serving-api for --grpc
    python client.py http://localhost:8501/v1/models/polarmask photo.jpg
    python client.py http://localhost:8501/v1/models/polarmask photos/ --out found --score 0.5
    python client.py http://localhost:8501/v1/models/polarmask photos/ --grpc localhost:8500

Files go to the server as they are; it decodes them. OUT/results.json lists each file with what was found in it, in pixels, x
right, y down, before any EXIF rotation; OUT/NAME.png shows it. A file that the server refuses is reported with the server's
reason and left out, and the exit code is 1; it is 2 if there is no such server.
"""

import argparse
import base64
import concurrent.futures
import http.client
import json
import os
import re
import socket
import sys
import threading
import time
import urllib.parse
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

COLORS = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#46c8f0", "#f032e6", "#bfef45", "#fabed4", "#469990")
LIMIT = 2**25  # bytes of an answer, and numbers in it
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP")  # those that the server decodes


class Refused(Exception):
    """The server's no: the same question gets the same answer."""


class Busy(Exception):
    """No connection, no answer in time, or an overloaded server: worth another try."""


def rest(url, timeout):
    """ask(signature, input name, content: bytes) -> the outputs of a batch of one, by name, by TF Serving's REST API."""
    parts = urllib.parse.urlsplit(url)

    def post(body, end):
        connect = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        connection = connect(parts.netloc, timeout=timeout)
        connection.connect()
        # The time of a socket begins anew with every byte.
        cut = threading.Timer(max(0, end - time.monotonic()), connection.sock.shutdown, [socket.SHUT_RDWR])
        cut.start()
        try:
            connection.request("POST", f"{parts.path}:predict", body, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            return answer, answer.read(LIMIT)
        finally:
            cut.cancel()
            connection.close()

    def ask(signature, name, content):
        body = {"signature_name": signature, "inputs": {name: [{"b64": base64.b64encode(content).decode()}]}}
        end = time.monotonic() + timeout
        try:
            answer, text = post(json.dumps(body).encode(), end)
            if time.monotonic() >= end:  # it was cut
                raise TimeoutError
        except (OSError, http.client.HTTPException) as error:
            late = f"no answer in {timeout:g} s"
            raise Busy(late if time.monotonic() >= end else f"cannot be reached: {one_line(error)}") from None
        try:
            document = json.loads(text)
            if answer.status == 200:
                outputs = document["outputs"]
                return outputs if isinstance(outputs, dict) else {signature: outputs}  # an only output has no name
            reason = one_line(document["error"])
        except (ValueError, KeyError, TypeError, RecursionError):
            bad = f"the answer is not TF Serving's JSON, or larger than {LIMIT:,} bytes"
            reason = bad if answer.status == 200 else one_line(f"HTTP {answer.status} {answer.reason}")
        raise (Busy if answer.status in (429, 503, 504) else Refused)(reason)

    return ask


def grpc_(address, model, timeout):
    """The same by gRPC."""
    import grpc
    import tensorflow as tf
    from tensorflow_serving.apis import predict_pb2, prediction_service_pb2_grpc

    options = [("grpc.max_receive_message_length", LIMIT), ("grpc.max_send_message_length", -1)]
    stub = prediction_service_pb2_grpc.PredictionServiceStub(grpc.insecure_channel(address, options))

    def ask(signature, name, content):
        request = predict_pb2.PredictRequest()
        request.model_spec.name, request.model_spec.signature_name = model, signature
        request.inputs[name].CopyFrom(tf.make_tensor_proto([content], tf.string))
        try:
            outputs = stub.Predict(request, timeout=timeout).outputs
        except grpc.RpcError as error:
            busy = error.code().name in ("UNAVAILABLE", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED")
            raise (Busy if busy else Refused)(one_line(error.details() or error.code().name)) from None
        if sum(np.prod([abs(d.size) for d in value.tensor_shape.dim], dtype=float) for value in outputs.values()) > LIMIT:
            raise Refused(f"an answer of more than {LIMIT:,} numbers")
        return {key: tf.make_ndarray(value) for key, value in outputs.items()}

    return ask


def one_line(reason):
    """TensorFlow names the graph's nodes behind a reason, and numbers it if several operations failed."""
    text = re.sub(r"\[\[.*?\]\]", "", str(reason)[:4000], flags=re.S)
    several = re.search(r"\(0\) [A-Za-z_ ]+: (.*?)(\n|$)", text)
    text = "".join(c if c.isprintable() else "?" for c in " ".join((several[1] if several else text).split()))
    return re.sub(r"^assertion failed: \[(.*)\]$", r"\1", text)[:300]


def patiently(ask, retries, *question):
    """ask(*question), again after 0.5, 1, 2, ... seconds as long as the server is busy."""
    for attempt in range(retries):
        try:
            return ask(*question)
        except Busy:
            time.sleep(0.5 * 2**attempt)
    return ask(*question)


def class_names(ask, retries, file):
    """Of a file with a name a line, or of a metadata.json; without a file, the served model's own."""
    text = file.read_text(encoding="utf-8") if file else patiently(ask, retries, "metadata", "request", b"")["metadata"][0]
    if file and file.suffix != ".json":
        return text.splitlines()
    return [entry["name"] for entry in json.loads(text)["classes"]]


def detections(outputs, names, width, height, least):
    """The rows of at least this score, in pixels."""
    rows = (np.asarray(outputs[f"detection_{name}"])[0] for name in ("scores", "classes", "boxes", "polygons"))
    scores, classes, boxes, polygons = rows
    found = []
    for row in range(int(np.asarray(outputs["num_detections"])[0])):
        if scores[row] >= least:
            top, left, bottom, right = (boxes[row] * [height, width, height, width]).tolist()
            found.append(
                {
                    "class": names[classes[row]] if 0 <= classes[row] < len(names) else f"class {classes[row]}",
                    "score": round(float(scores[row]), 4),
                    "box": [left, top, right, bottom],
                    "polygon": (polygons[row] * [width, height]).tolist(),
                }
            )
    return found


def draw(image, found, names):
    picture = image.convert("RGB")
    pen = ImageDraw.Draw(picture, "RGBA")
    for one in reversed(found):  # the best on top
        color = COLORS[(names.index(one["class"]) if one["class"] in names else 0) % len(COLORS)]
        points = [tuple(point) for point in one["polygon"]]
        pen.polygon(points, fill=color + "50", outline=color, width=max(2, round(max(picture.size) / 400)))
        pen.text(one["box"][:2], f"{one['class']} {one['score']:.2f}", fill="white", stroke_width=2, stroke_fill=color)
    return picture


def handle(file, ask, names, args):
    """{"file", "width", "height", "detections"} of a file, or {"file", "error"}."""
    try:
        outputs = patiently(ask, args.retries, "serving_default", "image_bytes", file.read_bytes())
        with Image.open(file, formats=FORMATS) as image:
            found = detections(outputs, names, *image.size, args.score)
            draw(image, found, names).save(args.out / f"{file.name}.png")
            return {"file": file.name, "width": image.width, "height": image.height, "detections": found}
    except Exception as error:  # also an answer of another model, or a file that the server can read and Pillow cannot
        known = isinstance(error, (Refused, Busy))
        return {"file": file.name, "error": str(error) if known else one_line(f"{type(error).__name__}: {error}")}


def arguments(argv):
    parser = argparse.ArgumentParser(description="Polygons in images, by a PolarMask behind TF Serving.")
    parser.add_argument("url", help="like http://localhost:8501/v1/models/polarmask")
    parser.add_argument("images", type=Path, help="image file, or directory of images")
    parser.add_argument("--grpc", metavar="HOST:PORT", help="ask there, by gRPC, for the model that the URL names")
    parser.add_argument("--out", type=Path, default=Path("found"), help="directory to write (default: %(default)s)")
    parser.add_argument("--score", type=float, default=0.3, help="least score (default %(default)s)")
    parser.add_argument("--labels", type=Path, help="class names, one a line, or a metadata.json (default: the model's own)")
    parser.add_argument("--concurrency", type=int, default=8, help="requests at a time (default %(default)s)")
    parser.add_argument("--timeout", type=float, default=10, help="seconds a request may take (default %(default)s)")
    parser.add_argument("--retries", type=int, default=3, help="further tries when the server is busy (default %(default)s)")
    return parser.parse_args(argv)


def main(argv=None):
    args = arguments(argv)
    url, files = args.url.rstrip("/"), [args.images]
    try:
        for name, least, most in (("score", 0, 1.5), ("concurrency", 1, 1000), ("timeout", 0.001, 86400), ("retries", 0, 20)):
            if not least <= (number := getattr(args, name)) <= most:  # NaN is neither
                raise ValueError(f"--{name} {number:g}: a number from {least:g} to {most:g} is needed")
        if args.images.is_dir():
            files = sorted(path for path in args.images.iterdir() if path.is_file() and not path.name.startswith("."))
        if not files or not files[0].is_file():  # of a pipe there might be no end
            raise ValueError(f"{args.images}: no such file, or no files in it")
        if not (model := re.fullmatch(r"https?://[^/\s]+/v1/models/([^/:\s]+)(/versions/\d+)?", url)):
            raise ValueError(f"{url}: must look like http://HOST:8501/v1/models/NAME")
        args.out.mkdir(parents=True, exist_ok=True)
        ask = grpc_(args.grpc, model[1], args.timeout) if args.grpc else rest(url, args.timeout)
        names = class_names(ask, args.retries, args.labels)
    except (Refused, Busy, ImportError, OSError, ValueError, LookupError, TypeError) as error:
        where = f"{args.grpc or url}: " if isinstance(error, (Refused, Busy)) else ""
        print(f"error: {where}{error}", file=sys.stderr)
        return 2
    results = []
    with concurrent.futures.ThreadPoolExecutor(args.concurrency) as pool:
        for result in pool.map(lambda file: handle(file, ask, names, args), files):
            results.append(result)
            outcome = result.get("error") or f"{len(result['detections'])} found"
            print(f"{one_line(result['file'])}: {outcome}", flush=True)
    part = args.out / f".results.json.{os.getpid()}.tmp"
    part.write_text(json.dumps(results, indent=1))
    part.replace(args.out / "results.json")
    failed = sum("error" in result for result in results)
    print(f"{len(results) - failed} of {len(results)} files, {failed} failed; {args.out / 'results.json'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
