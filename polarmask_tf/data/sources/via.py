"""VGG Image Annotator (VIA 1 and 2): a project, or its annotations exported as JSON."""

from __future__ import annotations

import collections
import math
import typing
from pathlib import Path

from polarmask_tf.data.report import Report, Unusable
from polarmask_tf.data.sources import outlines
from polarmask_tf.data.sources.folder import Folder
from polarmask_tf.data.sources.source import LINE, ONE_CLASS, RECTANGLE, Builder, Source, class_name, skip_image, well_formed
from polarmask_tf.errors import InputError

_USUAL = ("class", "label", "name", "category", "type", "object", "object_name")


def is_one(document) -> bool:
    if not isinstance(document, dict):
        return False
    if "_via_img_metadata" in document:
        return True
    first = next(iter(document.values()), None)
    return isinstance(first, dict) and "regions" in first and "filename" in first


def read(path: Path, report: Report, document: dict, find: typing.Callable[[list[str]], Folder]) -> Source:
    """The content `document` of a VIA file at `path`; `find` tells the folder of pictures by their names."""
    files = document.get("_via_img_metadata", document)
    if not isinstance(files, dict):
        raise InputError(f"{path}: '_via_img_metadata' is no object: not a project of VIA")
    entries = []
    for name, entry in files.items():
        if isinstance(entry, dict) and isinstance(entry.get("regions", []), list | dict | None):
            entries.append(entry)
        else:
            report.skip_object("malformed image entry", f"{path.name}: {name}")
    names = [entry["filename"] for entry in entries if isinstance(entry.get("filename"), str)]
    folder = find(names)
    regions_of = [_regions(entry) for entry in entries]
    attribute = _class_attribute(path, [r for regions in regions_of for r in regions], report)
    builder = Builder(folder.most_pixels)
    for index, (entry, regions) in enumerate(zip(entries, regions_of, strict=True)):
        where = f"{path.name}, {entry.get('filename', f'entry {index}')}"
        try:
            file_name = folder.find(entry.get("filename"))
            image = builder.image(file_name, folder.size(file_name))
        except Unusable as reason:
            skip_image(report, reason, where, len(regions))
            continue
        if not regions:
            report.note("picture without a region: background", where)
        for number, region in enumerate(regions):
            here = f"{where}, region {number}"
            try:
                with well_formed():
                    class_ = _class(region, attribute, report, here)
                    builder.add(image, class_, [_outline(region["shape_attributes"], report, here)])
            except Unusable as reason:
                report.skip_object(reason, here)
    images, classes = builder.finish()
    return Source(path, "via", images, classes, folder.root)


def _regions(entry):
    regions = entry.get("regions")  # a list in VIA 2, an object in VIA 1
    regions = list(regions.values()) if isinstance(regions, dict) else regions
    return regions if isinstance(regions, list) else []


def _class_attribute(path, regions, report):
    """Which attribute of the regions is their class; None if they have none."""
    filled = collections.Counter()
    for region in regions:
        attributes = region.get("region_attributes") if isinstance(region, dict) else None
        if isinstance(attributes, dict):
            filled.update(key for key, value in attributes.items() if value)
    if not filled:
        report.note(f"regions without attributes: one class, {ONE_CLASS!r}", path.name)
        return None
    usual = [key for key in filled if key.lower() in _USUAL]
    best = min(usual, key=lambda key: _USUAL.index(key.lower())) if usual else filled.most_common(1)[0][0]
    if len(filled) > 1:
        others = ", ".join(repr(key) for key in filled if key != best)
        report.note("one of several region attributes taken as the class", f"{path.name}: {best!r}, not {others}")
    return best


def _class(region, attribute, report, where):
    if attribute is None:
        return ONE_CLASS
    attributes = region.get("region_attributes")
    value = attributes.get(attribute) if isinstance(attributes, dict) else None
    if isinstance(value, dict):  # of a checkbox
        chosen = [name for name, is_chosen in value.items() if is_chosen]
        if len(chosen) > 1:
            report.note("region with several labels, of which the first is taken", where)
        value = next(iter(chosen), None)
    return class_name(value)


def _outline(shape, report, where):
    kind = shape["name"]
    if kind in ("point", "polyline", "line"):
        raise Unusable(LINE)
    if kind in ("polygon", "polygons"):
        xs, ys = shape["all_points_x"], shape["all_points_y"]
        return [float(v) for point in zip(xs, ys, strict=True) for v in point]
    if kind == "rect":
        report.note(RECTANGLE, where)
        return outlines.rectangle(*(float(shape[key]) for key in ("x", "y", "width", "height")))
    if kind == "circle":
        x, y, radius = (float(shape[key]) for key in ("cx", "cy", "r"))
        return outlines.ellipse(x, y, radius, radius)
    if kind == "ellipse":
        center = [float(shape[key]) for key in ("cx", "cy", "rx", "ry")]
        return outlines.ellipse(*center, math.degrees(float(shape.get("theta", 0))))
    raise Unusable("shape of a kind that is not known here", str(kind)[:50])
