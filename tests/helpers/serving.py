"""A served model, and a server that says what a test wants."""

import contextlib
import http.server
import io
import json
import socket
import threading
import time

import numpy as np
from PIL import Image

from helpers.exports import fake_model, metadata

MAX_PIXELS = 100_000


def make_model(folder):
    """A served model's directory: the serving export of what marks the brightest pixel with hexagons, at 64 x 96."""
    from polarmask_tf.export.serving import export_serving

    return export_serving(fake_model("letterbox", (64, 96)), folder, name="polarmask", max_pixels=MAX_PIXELS).parent


@contextlib.contextmanager
def scripted(*answers):
    """An HTTP server that gives these answers (status, body, seconds to wait first) in turn, the last one for ever.

    Gives its address and the list of the requests' paths and JSON bodies.
    """
    asked, lock = [], threading.Lock()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                status, content, wait = answers[min(len(asked), len(answers) - 1)]
                asked.append((self.path, body))
            time.sleep(wait)
            self.send_response(status)
            self.end_headers()
            with contextlib.suppress(OSError):  # who asked may have gone
                self.wfile.write(content if isinstance(content, bytes) else json.dumps(content).encode())

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield f"127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()


@contextlib.contextmanager
def hostile(serve):
    """The address of a server that calls serve(socket) when it has read a request's beginning."""
    server = socket.create_server(("127.0.0.1", 0))

    def talk(connection):
        with connection, contextlib.suppress(OSError):
            connection.recv(65536)
            serve(connection)

    def accept():
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=talk, args=(server.accept()[0],), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield f"127.0.0.1:{server.getsockname()[1]}"
    finally:
        server.close()


def sends(first, again, pause=0.0):
    """serve for `hostile`: `first`, then `again` for ever (for as long as anybody listens)."""

    def serve(connection):
        connection.sendall(first)
        while True:
            connection.sendall(again)
            time.sleep(pause)

    return serve


OK = b"HTTP/1.1 200 OK\r\n"


def encoded(image, kind="PNG", mode="RGB", **options):
    file = io.BytesIO()
    Image.fromarray(image).convert(mode).save(file, kind, **options)
    return file.getvalue()


def answer(**changes):
    """What TF Serving's REST API says of one image without detections."""
    empty = {
        "num_detections": [0],
        "detection_scores": [[0.0]],
        "detection_classes": [[0]],
        "detection_boxes": [[[0.0] * 4]],
        "detection_polygons": [[[[0.0, 0.0]] * 6]],
    }
    return {"outputs": {**empty, **changes}}


METADATA = (200, {"outputs": [json.dumps(metadata())]}, 0)
BAD = {
    "empty.jpg": b"",
    "text.jpg": b"no image at all",
    "cut.png": encoded(np.random.default_rng(0).integers(0, 256, (50, 50, 3), np.uint8))[:2000],
    "huge.png": encoded(np.zeros((400, 400, 3), np.uint8)),
}
