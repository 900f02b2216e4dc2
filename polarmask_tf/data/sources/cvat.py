"""CVAT for images 1.1: one XML file."""

from __future__ import annotations

import os
import typing
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

from polarmask_tf.data import segmentation
from polarmask_tf.data.report import Report, Unusable
from polarmask_tf.data.sources import outlines
from polarmask_tf.data.sources.folder import Folder
from polarmask_tf.data.sources.source import LINE, RECTANGLE, Builder, Source, class_name, skip_image, well_formed
from polarmask_tf.errors import InputError
from polarmask_tf.files import io_error_text

_MOST_BYTES = 4 * 2**30
_BLOCK = 2**20
_MOST_ELEMENT = 2**26  # bytes of one, the runs of a mask: expat looks through all of it again with each block that is read
_SHAPES = ("polygon", "box", "ellipse", "mask", "polyline", "points", "cuboid", "skeleton", "tag")


class _Image(typing.NamedTuple):
    attributes: dict
    shapes: list[tuple[str, dict]]


class _Refused(Exception):
    """Why the file is none that is read here."""


class _Target:
    """Collects images and labels while the parser goes through the file; no tree is built."""

    def __init__(self):
        self.images: list[_Image] = []
        self.labels: list[str] = []
        self._path: list[str] = []
        self._text: list[str] = []
        self.events = 0  # that were told of

    def doctype(self, *_):
        raise _Refused("has a DOCTYPE, which may make text without end; CVAT writes none: remove it")

    def start(self, tag, attributes):
        self.events += 1
        if not self._path and tag == "annotation":
            raise _Refused("is XML of PASCAL VOC, which holds boxes alone, and outlines are needed: annotate polygons")
        if not self._path and tag != "annotations":
            raise _Refused(f"is XML of another kind (<{tag[:50]}>); expected 'CVAT for images 1.1'")
        if len(self._path) > 50:
            raise _Refused("is nested more than 50 elements deep: not a file of CVAT")
        self._path.append(tag)
        self._text = []
        if tag == "track":
            raise _Refused("is 'CVAT for video'; export the task as 'CVAT for images 1.1'")
        if tag == "image" and len(self._path) == 2:
            self.images.append(_Image(attributes, []))
        elif len(self._path) == 3 and self._path[1] == "image" and tag in _SHAPES:
            self.images[-1].shapes.append((tag, attributes))

    def data(self, text):
        self.events += 1
        if self._path[-2:] == ["label", "name"]:
            self._text.append(text)

    def end(self, tag):
        if self._path[-2:] == ["label", "name"]:
            self.labels.append("".join(self._text))
        self._path.pop()

    def close(self):
        return self


def read(path: Path, report: Report, find: typing.Callable[[list[str]], Folder]) -> Source:
    """An XML file; `find` tells the folder of pictures by their names."""
    content = _parse(path)
    names = [image.attributes.get("name", "") for image in content.images]
    folder = find([name for name in names if name])
    builder = Builder(folder.most_pixels)
    for index, (attributes, shapes) in enumerate(content.images):
        where = f"{path.name}, image {attributes.get('name', f'number {index}')}"
        try:
            file_name = folder.find(attributes.get("name"))
            image = builder.image(file_name, _size(attributes) or folder.size(file_name))
        except Unusable as reason:
            skip_image(report, reason, where, len(shapes))
            continue
        if not shapes:
            report.note("picture without a shape: background", where)
        _add(shapes, image, builder, report, where)
    images, classes = builder.finish(_names(content.labels))
    return Source(path, "cvat", images, classes, folder.root)


def check(path: Path) -> None:
    """InputError unless the file begins as one of CVAT does."""
    parser = ElementTree.XMLParser(target=_Target())
    try:
        with open(path, "rb") as file:
            parser.feed(file.read(_BLOCK))
    except _Refused as reason:
        raise InputError(f"{path}: {reason}") from None
    except (OSError, ElementTree.ParseError, ValueError, LookupError):
        return  # said when it is read


def _names(labels):
    for name in labels:
        try:
            yield class_name(name)
        except Unusable:
            continue


def _parse(path):
    give, target = "give the XML file of an export as 'CVAT for images 1.1'", _Target()
    parser = ElementTree.XMLParser(target=target)
    try:
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            if not os.path.isfile(path):
                raise InputError(f"{path}: not a regular file; {give}")
            if (size := os.fstat(file.fileno()).st_size) > _MOST_BYTES:
                raise InputError(f"{path}: {size:,} bytes, and the limit is {_MOST_BYTES:,}; split it")
            since, seen = 0, 0
            while block := file.read(_BLOCK):
                parser.feed(block)
                since, seen = (0 if target.events != seen else since + len(block)), target.events
                if since > _MOST_ELEMENT:
                    raise _Refused(f"has an element, or a comment, of more than {_MOST_ELEMENT:,} bytes")
            return parser.close()
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; {give}") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {io_error_text(error)}; {give}") from None
    except _Refused as reason:
        raise InputError(f"{path}: {reason}") from None
    except (ElementTree.ParseError, ValueError, LookupError) as error:  # of an encoding that does not exist, too
        raise InputError(f"{path}: not valid XML ({error}); {give}") from None


def _size(attributes):
    try:
        size = int(attributes["width"]), int(attributes["height"])
    except (KeyError, ValueError):
        return None
    return size if min(size) > 0 else None


def _add(shapes, image, builder, report, where):
    """Adds the objects of an image; polygons of one group and label are one object, as in CVAT's own COCO export."""
    groups: dict = {}
    for index, (kind, attributes) in enumerate(shapes):
        here = f"{where}, {kind} {index}"
        try:
            with well_formed():
                class_ = class_name(attributes.get("label"))
                outline = _outline(kind, attributes, image, report, here)
                group = int(attributes.get("group_id") or 0)
        except Unusable as reason:
            report.skip_object(reason, here)
            continue
        groups.setdefault((class_, group) if group else index, (class_, []))[1].append(outline)
    for class_, parts in groups.values():
        if len(parts) == 1 or all(isinstance(part, list) for part in parts):
            builder.add(image, class_, parts[0] if isinstance(parts[0], dict) else parts)
            continue
        try:
            builder.add(image, class_, segmentation.united(parts, image["height"], image["width"]))
        except Unusable as reason:
            report.skip_object(reason, f"{where}, a group of {len(parts)} shapes")


def _outline(kind, attributes, image, report, where):
    """[x, y, ...], or an RLE."""

    def numbers(*names):
        return [float(attributes[name]) for name in names]

    degrees = float(attributes.get("rotation") or 0)
    if kind in ("polyline", "points", "tag"):
        raise Unusable(LINE if kind != "tag" else "tag, which has no outline")
    if kind == "polygon":
        if attributes["points"].count(";") >= segmentation.MAX_VERTICES:
            raise Unusable(segmentation.MANY_VERTICES)
        return [float(v) for point in attributes["points"].split(";") for v in _pair(point)]
    if kind == "box":
        left, top, right, bottom = numbers("xtl", "ytl", "xbr", "ybr")
        report.note(RECTANGLE, where)
        return outlines.rectangle(left, top, right - left, bottom - top, degrees)
    if kind == "ellipse":
        return outlines.ellipse(*numbers("cx", "cy", "rx", "ry"), degrees)
    if kind == "mask":
        return _mask(attributes, image)
    raise Unusable("shape of a kind that is not known here", kind)


def _pair(point):
    x, y = point.split(",")
    return x, y


def _mask(attributes, image):
    """The RLE of a brush mask: runs along the rows of a box, the first of background."""
    height, width = image["height"], image["width"]
    left, top, w, h = (int(float(attributes[name])) for name in ("left", "top", "width", "height"))
    if left < 0 or top < 0 or w < 1 or h < 1 or left + w > width or top + h > height:
        raise Unusable("mask beyond its image")
    text = attributes["rle"]
    if text.count(",") >= segmentation.MAX_RUNS:
        raise Unusable(segmentation.MANY_RUNS)
    runs = np.array([int(run) for run in text.split(",")], np.int64)
    if runs.min() < 0 or runs.max() > w * h or not w * h - w < runs.sum() <= w * h:
        raise Unusable("RLE of the wrong size")
    part = np.zeros(w * h, np.uint8)  # what follows the last run is background
    part[: runs.sum()] = np.repeat(np.arange(len(runs), dtype=np.uint8) & 1, runs)
    return segmentation.from_crop(part.reshape(h, w), left, top, height, width)
