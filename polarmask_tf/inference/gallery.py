"""A page to flip through what was found: gallery.html, and in gallery/ a small picture and its outlines for each image.

It opens from disk, where a page may not fetch files: outlines are scripts of one call, which the page loads as they are needed.
"""

import json
import urllib.parse
from importlib import resources
from pathlib import Path

import numpy as np
from PIL import Image

from polarmask_tf import files
from polarmask_tf.data import contours, windows
from polarmask_tf.inference import visualize

SIDE = 800  # longest side of a picture, in pixels
TRUTH_EDGES = 200  # most of an outline that is traced from a mask
PALETTE = 24


def write_picture(path, image, found, name, truth):
    """Writes path.jpg, a dim picture brightened, and path.js (`path` has no suffix) -> the picture's entry for `write_page`.

    image: uint8 [h, w, 3], or windows of a large picture. truth: as truth.shapes gives it; None without any.
    """
    picture = visualize.brightened(Image.fromarray(windows.whole(image)))
    picture.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    visualize.save(picture, f"{path}.jpg")
    rows = zip(found.classes.tolist(), found.scores.round(4).tolist(), found.polygons, strict=True)
    data = {
        "found": [[index, score, _numbers(polygon)] for index, score, polygon in rows],
        "truth": [[index, label, _rings(shape)] for label, index, shape in _with_indices(truth or (), found.categories)],
    }
    files.atomic_write(Path(f"{path}.js"), f"polarmaskPicture({json.dumps(name)}, {json.dumps(data)});\n")
    best = {}
    for index, score, _ in reversed(data["found"]):
        best[index] = max(score, best.get(index, 0))
    height, width = found.image_size
    number = None if truth is None else len(truth)
    return {"width": width, "height": height, "count": len(found), "best": best, "truth": number}


def _with_indices(truth, categories):
    index = {entry["category_id"]: number for number, entry in enumerate(categories)}
    return [(label, index.get(category, -1), shape) for label, category, shape in truth]


def _rings(shape):
    if isinstance(shape, np.ndarray):
        shape = contours.simplify(contours.trace(shape), TRUTH_EDGES, tolerance=0.5)[0] if shape.any() else []
    return [_numbers(ring) for ring in shape]


def _numbers(ring):
    """x, y, x, y, ... to tenths of a pixel."""
    return np.asarray(ring, np.float64).round(1).ravel().tolist()


def write_page(path, pictures, *, title, categories, least, truth):
    """Writes gallery.html. pictures: an iterable of (name, path of its files from the page, entry of `write_picture`)."""
    before, after = resources.files(__package__).joinpath("gallery.html").read_text("utf-8").split("DATA", 1)
    classes = [{"name": entry["name"], "color": _hex(number)} for number, entry in enumerate(categories)]
    head = {"title": title, "least": least, "truth": truth, "classes": classes, "palette": [*map(_hex, range(PALETTE))]}
    with files.replacing(path) as part, open(part, "w", encoding="utf-8") as page:
        page.write(before + _inside_script(head)[:-1] + ', "pictures": [')
        for number, (name, beside, entry) in enumerate(pictures):
            url = urllib.parse.quote(beside, errors="surrogateescape")
            page.write(",\n" * bool(number) + _inside_script({"name": name, "files": url, **entry}))
        page.write("]}" + after)


def _hex(number):
    return "#{:02x}{:02x}{:02x}".format(*visualize.color(number))


def _inside_script(value):
    """JSON that no text in it ends the script element of: </script> and <!-- begin with <."""
    return json.dumps(value).replace("<", "\\u003c")
