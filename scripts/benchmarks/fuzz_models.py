"""For fuzz.py: what a server answers, .tflite files and the metadata in them."""

import io
import json
import re
import socket
import subprocess
import sys
import threading
import time
import zipfile

import numpy as np
from fuzz_inputs import mutate_bytes, mutate_json, to_text
from fuzz_kind import Kind, refusing

# ---- answers of a server

CLASSES = [{"name": "one", "category_id": 1}, {"name": "two", "category_id": 7}]
METADATA = {"classes": CLASSES, "input": {"height": 64, "width": 64}, "max_detections": 3}
DETECTIONS = {
    "num_detections": [2],
    "detection_scores": [[0.9, 0.5, 0.0]],
    "detection_classes": [[1, 0, 0]],
    "detection_boxes": [[[0.1, 0.1, 0.5, 0.5], [0.2, 0.2, 0.4, 0.9], [0, 0, 0, 0]]],
    "detection_polygons": [[[[0.1, 0.1], [0.5, 0.1], [0.5, 0.5], [0.1, 0.5]]] * 3],
}


def _answer(value, status="200 OK"):
    body = value if isinstance(value, bytes) else to_text(value)
    return f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


def _conversation(first, second):
    """Two answers in one input: to the question for metadata, and to that for detections."""
    return len(first).to_bytes(4, "big") + first + second


def conversations(out):
    metadata = [{"outputs": [json.dumps(METADATA)]}, {"outputs": {"metadata": [json.dumps(METADATA)]}}]
    return [_conversation(_answer(first), _answer({"outputs": DETECTIONS})) for first in metadata]


def change_conversation(rng, data):
    size = int.from_bytes(data[:4], "big")
    first, second = data[4 : 4 + size], data[4 + size :]
    if rng.random() < 0.3:
        outputs = [mutate_json(rng, METADATA).decode(errors="replace")] if rng.random() < 0.7 else None
        body = to_text({"outputs": outputs}) if outputs else mutate_json(rng, json.loads(first.partition(b"\r\n\r\n")[2]))
        return _conversation(_answer(body), second)
    changed = {
        0: lambda: mutate_bytes(rng, second),
        1: lambda: _answer(mutate_bytes(rng, to_text({"outputs": DETECTIONS}))),
        2: lambda: _answer(
            mutate_json(rng, {"error": "no\n\x1b[31m"}), rng.choice(("400 Bad", "500 \x1b[31m", "503 Busy", "302 Found"))
        ),
        3: lambda: (
            rng.choice((b"@ENDLESS@", b"@DRIP@", b"@SILENT@")) + second
            if rng.random() < 0.1
            else second[: rng.randrange(len(second))]
        ),
    }
    other = lambda: _answer(mutate_json(rng, {"outputs": DETECTIONS}))  # noqa: E731
    return _conversation(first, changed.get(rng.randrange(10), other)())


class _Server:
    """Answers each connection with the bytes it was told, whatever is asked."""

    def __init__(self):
        self.answers, self.listener = [b""], socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self):
        while True:
            connection, _ = self.listener.accept()
            threading.Thread(target=self._talk, args=(connection,), daemon=True).start()

    def _talk(self, connection):
        with connection:
            try:
                connection.settimeout(30)
                asked, whole = b"", 1
                while len(asked) < whole and (more := connection.recv(1 << 20)):
                    asked += more
                    size = re.search(rb"(?i)content-length: (\d+)\r\n(.+\r\n)*\r\n", asked)
                    whole = size.end() + int(size[1]) if size else len(asked) + 1
                answer = self.answers[0 if b'"metadata"' in asked else -1]
                if odd := re.match(rb"@([A-Z]+)@", answer):
                    self._torment(connection, odd[1], answer[odd.end() :])
                else:
                    connection.sendall(answer)
            except OSError:
                return

    def _torment(self, connection, how, answer):
        """More than ever ends, a byte at a time, or nothing at all: until the other side hangs up, or for 30 s."""
        head = answer.partition(b"\r\n\r\n")[0].replace(b"Content-Length", b"X") + b"\r\n\r\n"
        end = time.monotonic() + 30
        while time.monotonic() < end:
            if how == b"ENDLESS":
                connection.sendall(head + b"[" * (1 << 20))
                head = b""
            elif how == b"DRIP":
                connection.sendall(answer[:1])
                answer = answer[1:] or b" "
            if how != b"ENDLESS":
                time.sleep(0.2)


def prepare_server(folder, out):
    from polarmask_tf.inference import client
    from polarmask_tf.inference.predictor import load_predictor

    server = _Server()
    url = f"http://127.0.0.1:{server.listener.getsockname()[1]}/v1/models/polarmask"
    # As long as the machine's answers take; a user's patience is longer.
    client.TIMEOUT, client.WAITS = 4, (0.0,)

    def run(data):
        size = int.from_bytes(data[:4], "big")
        server.answers = [data[4 : 4 + size], data[4 + size :]]
        load_predictor(url)([np.zeros((24, 32, 3), np.uint8)])

    return refusing(run)


# ---- .tflite files, and the metadata in them


def tflite_file(out):
    """A small trained network as a .tflite file; made by the command line once for each OUT, which takes two minutes."""
    file = out / "seed" / "exported" / "model.tflite"
    if not file.is_file():
        work = out / "seed"
        small = [
            "model.backbone.width=16",
            "model.fpn.channels=16",
            "model.head.channels=16",
            "data.size=[64,64]",
            "model.rays=8",
        ]
        small += ["train.steps=2", "train.checkpoint_every=2", "data.batch=2", "postprocess.score_threshold=0.001"]
        for words in (
            ["shapes", work / "shapes", "--train", 4, "--val", 2, "--size", 64],
            ["convert", work / "shapes/train/annotations.json", work / "shapes/train/images", work / "data"],
            [
                "train",
                "--config",
                "shapes",
                "--data",
                work / "data",
                "--out",
                work / "run",
                *(w for s in small for w in ("--set", s)),
            ],
            ["export", work / "run", "--out", work / "exported", "--images", work / "data"],
        ):
            subprocess.run([sys.executable, "-m", "polarmask_tf", *map(str, words)], check=True, stdout=subprocess.DEVNULL)
    return file.read_bytes()


def _split(data):
    """(the flatbuffer, metadata) of a .tflite file."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        start = min(entry.header_offset for entry in archive.infolist())
        return data[:start], json.loads(archive.read("metadata.json"))


def _join(flatbuffer, metadata):
    file = io.BytesIO()
    file.write(flatbuffer)
    with zipfile.ZipFile(file, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("metadata.json", metadata)
    return file.getvalue()


def change_metadata(rng, data):
    flatbuffer, metadata = _split(data)
    text = mutate_json(rng, metadata) if rng.random() < 0.9 else mutate_bytes(rng, json.dumps(metadata).encode())
    return _join(flatbuffer, text if rng.random() < 0.97 else b" " * (256 << 20))  # a zip of 2 GB takes too long to make


def change_tflite(rng, data):
    flatbuffer, metadata = _split(data)
    if rng.random() < 0.3:
        return flatbuffer + mutate_bytes(rng, data[len(flatbuffer) :])  # the zip's own structures
    return _join(mutate_bytes(rng, flatbuffer), json.dumps(metadata)) if rng.random() < 0.8 else mutate_bytes(rng, data)


def prepare_tflite(folder, out):
    from polarmask_tf.inference.predictor import load_predictor

    def run(data):
        (folder / "model.tflite").write_bytes(data)
        load_predictor(folder / "model.tflite")([np.zeros((24, 32, 3), np.uint8)])

    return refusing(run)


KINDS = {
    "server": Kind(prepare_server, conversations, change_conversation),
    "metadata": Kind(prepare_tflite, lambda out: [tflite_file(out)], change_metadata),
    "tflite": Kind(prepare_tflite, lambda out: [tflite_file(out)], change_tflite),
}
