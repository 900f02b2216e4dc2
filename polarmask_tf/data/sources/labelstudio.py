"""Label Studio: its JSON and JSON-MIN exports of image segmentation, polygons and brush masks alike."""

from __future__ import annotations

import typing
from pathlib import Path

import numpy as np

from polarmask_tf.data import segmentation
from polarmask_tf.data.report import Report, Unusable
from polarmask_tf.data.sources import outlines
from polarmask_tf.data.sources.folder import Folder
from polarmask_tf.data.sources.source import LINE, RECTANGLE, Builder, Source, class_name, skip_image, well_formed
from polarmask_tf.errors import InputError

_LABELS = ("polygonlabels", "brushlabels", "rectanglelabels", "ellipselabels", "keypointlabels", "labels")
_KINDS = ("polygon", "brush", "rectangle", "ellipse", "keypoint")


class _Task(typing.NamedTuple):
    picture: str
    results: list | None  # None: nobody has labelled it


def is_one(document) -> bool:
    return isinstance(document, list) and bool(document) and isinstance(document[0], dict) and _is_task(document[0])


def _is_task(entry):
    if isinstance(entry.get("data"), dict):
        return any(key in entry for key in ("annotations", "completions", "predictions"))
    return "annotation_id" in entry or "annotator" in entry  # JSON-MIN


def read(path: Path, report: Report, document: list, find: typing.Callable[[list[str]], Folder]) -> Source:
    """The content `document` of an export at `path`; `find` tells the folder of pictures by their names."""
    tasks = []
    for index, entry in enumerate(document):
        where = f"{path.name}, task {entry.get('id', index) if isinstance(entry, dict) else index}"
        try:
            with well_formed("task"):
                tasks.append((where, _task(entry, report, where)))
        except Unusable as reason:
            report.skip(reason, where)
    if not tasks:
        raise InputError(f"{path}: none of its {len(document)} tasks has a picture")
    folder = find([task.picture for _, task in tasks])
    builder = Builder(folder.most_pixels)
    for where, (picture, results) in tasks:
        if results is None:
            report.skip("task without an annotation: not labelled yet?", f"{where}: {picture}")
            continue
        try:
            file_name = folder.find(picture)
            image = builder.image(file_name, _size(results) or folder.size(file_name))
        except Unusable as reason:
            skip_image(report, reason, f"{where}: {picture}", len(results))
            continue
        _add(results, image, builder, report, where)
    images, classes = builder.finish()
    return Source(path, "labelstudio", images, classes, folder.root)


def _task(entry, report, where):
    if not isinstance(entry.get("data"), dict):  # JSON-MIN: picture and results are fields of the task itself
        results = [r for value in entry.values() if isinstance(value, list) for r in value if _is_result(r)]
        return _Task(_picture(entry), results)
    done = entry.get("annotations", entry.get("completions")) or []
    done = [a for a in done if isinstance(a, dict) and not a.get("was_cancelled") and isinstance(a.get("result"), list)]
    if len(done) > 1:
        report.note("task with several annotations, of which the first is taken", where)
    return _Task(_picture(entry["data"]), done[0]["result"] if done else None)


def _picture(data):
    """The value that is an image's: by its key, else the one that ends like a picture's name."""
    texts = {key: value for key, value in data.items() if isinstance(value, str)}
    for key in ("image", "img", "ocr", "picture", "photo"):
        if key in texts:
            return texts[key]
    for value in texts.values():
        if "/" in value or "." in value:
            return value
    raise Unusable("task without a picture")


def _is_result(value):
    return isinstance(value, dict) and any(key in value for key in _LABELS)


def _value(result):
    """The coordinates and labels of a result: under "value", or (JSON-MIN) the result itself."""
    return result["value"] if isinstance(result.get("value"), dict) else result


def _size(results):
    for result in results:
        if isinstance(result, dict):
            size = result.get("original_width"), result.get("original_height")
            if all(type(side) is int and side > 0 for side in size):
                return size
    return None


def _add(results, image, builder, report, where):
    labels_of = {}  # of regions whose label is a result of its own
    for result in results:
        if isinstance(result, dict) and isinstance(result.get("id"), str) and (names := _names(result)):
            labels_of.setdefault(result["id"], names)
    for index, result in enumerate(results):
        here = f"{where}, result {index}"
        try:
            with well_formed():
                kind = _kind(result)
                if kind is None:  # a label alone, a choice, a text
                    if not isinstance(result["type"], str):
                        raise Unusable("malformed annotation")
                    continue
                names = _names(result) or labels_of.get(result.get("id"), [])
                if len(names) > 1:
                    report.note("region with several labels, of which the first is taken", here)
                class_ = class_name(names[0] if names else None)
                builder.add(image, class_, _outline(kind, _value(result), image, report, here))
        except Unusable as reason:
            report.skip_object(reason, here)


def _names(result):
    value = _value(result)
    names = next((value[key] for key in _LABELS if isinstance(value.get(key), list)), [])
    return names


def _kind(result):
    kind, value = result.get("type", ""), _value(result)
    for name in _KINDS:
        if f"{name}labels" in value or kind in (name, f"{name}labels"):
            return name
    if kind == "labels" and not any(key in value for key in ("points", "rle", "width", "radiusX")):
        return None
    if "points" in value:
        return "polygon"
    if "rle" in value:
        return "brush"
    if "radiusX" in value:
        return "ellipse"
    return "rectangle" if "width" in value and "height" in value and "x" in value else None


def _outline(kind, value, image, report, where):
    """A segmentation; coordinates are percents of the picture."""
    width, height = image["width"], image["height"]

    def pixels(*names):
        scales = {"x": width, "width": width, "radiusX": width, "y": height, "height": height, "radiusY": height}
        return [float(value[name]) * scales[name] / 100 for name in names]

    degrees = float(value.get("rotation") or 0)
    if kind == "keypoint" or value.get("closed") is False:
        raise Unusable(LINE)
    if kind == "polygon":
        return [[float(v) * (width, height)[k] / 100 for x, y in value["points"] for k, v in enumerate((x, y))]]
    if kind == "rectangle":
        report.note(RECTANGLE, where)
        x, y, w, h = pixels("x", "y", "width", "height")
        return [outlines.rectangle(x, y, w, h, degrees, about=(x, y))]
    if kind == "ellipse":
        return [outlines.ellipse(*pixels("x", "y", "radiusX", "radiusY"), degrees)]
    if value.get("format", "rle") != "rle":
        raise Unusable("brush mask in a format that is not known here")
    return segmentation.from_mask(brush_mask(value["rle"], height, width))


def brush_mask(data: list[int], height: int, width: int) -> np.ndarray:
    """The mask, uint8 [height, width] of 0 and 1, of Label Studio's own RLE: bytes that hold the runs of an RGBA picture.

    After 32 bits for the number of values, 5 for the bits of a value less 1, and four times 4 for the bits of a run's length
    less 1, every run is: 1 bit that says whether one value repeats, 2 that choose the bits of the length, the length less 1,
    and the value, or as many values (npm package @thi.ng/rle-pack). Raises Unusable.
    """
    if len(data) > 5 * height * width + 64:  # longer than the pixels themselves
        raise Unusable("brush mask of the wrong size")
    bits = "".join(format(byte, "08b") for byte in bytes(data))
    at = 0

    def take(count):
        nonlocal at
        at += count
        if at > len(bits):
            raise Unusable("brush mask that is cut short")
        return int(bits[at - count : at], 2)

    total, word = take(32), take(5) + 1
    lengths = [take(4) + 1 for _ in range(4)]
    if total != 4 * height * width or word != 8:
        raise Unusable("brush mask of the wrong size")
    values = np.zeros(total, np.uint8)
    filled = 0
    while filled < total:
        repeats, length = take(1), take(lengths[take(2)]) + 1
        length = min(length, total - filled)
        if repeats:
            values[filled : filled + length] = take(8)
        else:
            values[filled : filled + length] = [take(8) for _ in range(length)]
        filled += length
    return (values.reshape(height, width, 4)[..., 3] > 0).astype(np.uint8)
