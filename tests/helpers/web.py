"""exports/web, served to a browser, and its detections."""

import functools
import http.server
import json
import shutil
import threading

import numpy as np
import pytest

from helpers.browser import DRIVER, WEB, Page
from polarmask_tf import lite

# float32 in both, but XNNPACK for WASM sums in another order than the native one: measured were 1e-7 in scores and, as rays are
# the exponentials of logits, 1e-4 pixels in polygons. Ten to twenty times that is allowed.
SCORES, PIXELS = 1e-6, 2e-3


class WebPage(Page):
    """exports/web."""

    def call(self, source, value):
        """A JavaScript function of the modules `m` (polarmask.js) and of `value`."""
        source = f"async (value) => {{ const m = await import('/polarmask.js'); return ({source})(value); }}"
        return self(call=source, **{"with": value})

    def found(self, **command):
        """The detections after a command, as lite.py gives them, and all else of the page's JSON."""
        state = self(**command)
        assert state["message"] == ""
        shown = json.loads(state["json"])
        rows = shown.pop("detections")
        texts = {name: state[name] for name in ("status", "where", "shown")}
        return arrays(rows), {**shown, **texts, "labels": [row["label"] for row in rows]}


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


def serve(folder):
    handler = functools.partial(Quiet, directory=str(folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server, f"http://127.0.0.1:{server.server_port}/"


def copy_page(folder, node_modules):
    """exports/web and what drives it, as a web server gives them out."""
    for path in (*WEB.glob("*.*"), DRIVER):
        if path.suffix in (".html", ".js", ".jpg", ".mjs"):
            shutil.copy(path, folder)
    (folder / "node_modules").symlink_to(node_modules)


def compare(found, expected, scores=SCORES, pixels=PIXELS):
    """The same detections. Near ties may change places, so each is compared with the nearest of its class."""
    assert len(found["scores"]) == len(expected["scores"]) > 0
    assert (np.diff(found["scores"]) <= 0).all()
    left = list(range(len(found["scores"])))
    for score, number, box, polygon in zip(*(expected[name] for name in lite.FOUND), strict=True):
        near = min(left, key=lambda i: np.abs(found["polygons"][i] - polygon).max() + 1e6 * (found["classes"][i] != number))
        left.remove(near)
        assert found["classes"][near] == number
        assert found["scores"][near] == pytest.approx(score, abs=scores)
        np.testing.assert_allclose(found["boxes"][near], box, atol=pixels)
        np.testing.assert_allclose(found["polygons"][near], polygon, atol=pixels)


def arrays(rows):
    """The page's list of detections as lite.py gives them."""
    names = zip(lite.FOUND, ("score", "class", "box", "polygon"), strict=True)
    return {many: np.array([row[one] for row in rows]) for many, one in names}
