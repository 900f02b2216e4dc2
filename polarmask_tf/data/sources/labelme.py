"""labelme: one JSON file a picture, in a folder with all below it (also of AnyLabeling and X-AnyLabeling)."""

from __future__ import annotations

import base64
import io
import math
import os
import posixpath
from pathlib import Path

import numpy as np
from PIL import Image

from polarmask_tf import lite
from polarmask_tf.data import segmentation
from polarmask_tf.data.report import Report, Unusable
from polarmask_tf.data.sources import outlines
from polarmask_tf.data.sources.folder import Folder, stem
from polarmask_tf.data.sources.source import LINE, RECTANGLE, Builder, Source, class_name, load_json, skip_image, well_formed
from polarmask_tf.errors import InputError


def is_one(document) -> bool:
    return isinstance(document, dict) and isinstance(document.get("shapes"), list) and "images" not in document


def read(path: Path, report: Report, folder: Folder) -> Source:
    """A folder of labelme files, or one such file, with their pictures in `folder`."""
    home = path if os.path.isdir(path) else path.parent
    files = Folder(home).names(".json") if home == path else [path.name]
    builder, others = Builder(folder.most_pixels), 0
    for name in files:
        try:
            document = load_json(home / name)
        except InputError as error:
            report.skip("file that is no JSON, or cannot be read", str(error).removeprefix(f"{home}{os.sep}"))
            continue
        if is_one(document):
            _read(document, name, builder, report, folder)
        else:
            others += 1
            report.note("JSON file that is not labelme's, left out", name)
    if files and others == len(files):
        raise InputError(f"{path}: none of its {others} JSON files is labelme's (an object with the list 'shapes')")
    taken = {image["file_name"] for image in builder.images}
    if home == path:
        for name in folder.files:
            if name not in taken:
                report.note("picture without a labelme file, left out: not labelled yet?", name)
    images, classes = builder.finish()
    return Source(path, "labelme", images, classes, folder.root)


def _read(document, name, builder, report, folder):
    shapes = document["shapes"]
    try:
        given = document.get("imagePath") or f"{stem(name)}.jpg"
        file_name = _picture(folder, given, name)
        size = document.get("imageWidth"), document.get("imageHeight")
        if not all(type(side) is int and side > 0 for side in size):
            size = folder.size(file_name)
        image = builder.image(file_name, size)
    except Unusable as reason:
        if document.get("imageData") and str(reason) == "missing image":
            reason = Unusable("missing image, of which the labelme file has a copy (labelme_export_json writes it)")
        skip_image(report, reason, name, len(shapes))
        return
    if not shapes:
        report.note("picture without a shape: background", name)
    for class_, parts in _instances(shapes, image, report, name):
        builder.add(image, class_, parts)


def _picture(folder, given, name):
    """By imagePath; else the picture with the stem of the file, which people rename together."""
    near = posixpath.dirname(name)
    try:
        return folder.find(given, near)
    except Unusable as reason:
        own = folder.with_stem(stem(name))
        if len(own) != 1:
            raise reason
        return own[0]


def _instances(shapes, image, report, name):
    """(class, segmentation) of every object: shapes of one group_id and class are one."""
    groups: dict = {}
    for index, shape in enumerate(shapes):
        where = f"{name}, shapes[{index}]"
        try:
            with well_formed():
                class_, outline = class_name(shape["label"]), _outline(shape, image, report, where)
                group = shape.get("group_id")
        except Unusable as reason:
            report.skip_object(reason, where)
            continue
        together = type(group) in (int, str) and group != ""
        groups.setdefault((class_, group) if together else index, (class_, []))[1].append(outline)
    height, width = image["height"], image["width"]
    for class_, parts in groups.values():
        if len(parts) > 1 and any(isinstance(part, dict) for part in parts):
            try:
                yield class_, segmentation.united(parts, height, width)
            except Unusable as reason:
                report.skip_object(reason, f"{name}, a group of {len(parts)} shapes")
        else:
            yield class_, parts[0] if isinstance(parts[0], dict) else parts


def _outline(shape, image, report, where):
    """[x, y, ...], or the RLE of a mask."""
    kind = shape.get("shape_type") or "polygon"
    if kind in ("line", "linestrip", "point", "points"):
        raise Unusable(LINE)
    points = [[float(x), float(y)] for x, y in shape["points"]]
    if kind in ("polygon", "rotation", "oriented_rectangle", "quadrilateral"):
        return [v for point in points for v in point]
    if kind == "rectangle":
        (x1, y1), (x2, y2) = points[0], points[2 if len(points) == 4 else 1]
        report.note(RECTANGLE, where)
        return outlines.rectangle(min(x1, x2), min(y1, y2), abs(x2 - x1), abs(y2 - y1))
    if kind == "circle":
        (x, y), (to_x, to_y) = points
        radius = math.hypot(to_x - x, to_y - y)
        return outlines.ellipse(x, y, radius, radius)
    if kind == "mask":
        return _mask(shape["mask"], points, image)
    raise Unusable("shape of a kind that is not known here", str(kind)[:50])


def _mask(text, points, image):
    """The RLE of a PNG in base64 that covers the box from the first point on."""
    height, width = image["height"], image["width"]
    data = base64.b64decode(text)
    try:
        with Image.open(lite.check_blocks(io.BytesIO(data)), formats=("PNG",)) as picture:
            fits = picture.width <= width + 1 and picture.height <= height + 1
            part = np.asarray(picture.convert("L")) > 0 if fits else None
    except Exception:  # Pillow's parsers fail in every way there is
        raise Unusable("mask that is no PNG") from None
    if not fits:
        raise Unusable("mask beyond its image")
    left, top = (round(v) for v in points[0])
    if left < 0 or top < 0 or left + part.shape[1] > width + 1 or top + part.shape[0] > height + 1:
        raise Unusable("mask beyond its image")
    return segmentation.from_crop(part[: height - top, : width - left], left, top, height, width)
