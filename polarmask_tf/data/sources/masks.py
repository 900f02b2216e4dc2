"""Masks as pictures, in which every object has a number or a color of its own, or a file of its own.

Known are images/ beside masks/, NAME.tif beside NAME_masks.tif (Cellpose), JPEGImages/ with SegmentationObject/ (PASCAL VOC,
also as CVAT exports it) and ID/images/ID.png with ID/masks/*.png (2018 Data Science Bowl).
"""

from __future__ import annotations

import collections
import os
import posixpath
import re
from pathlib import Path

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask
from tqdm import tqdm

from polarmask_tf.data import contours, segmentation
from polarmask_tf.data.report import Report, Unusable
from polarmask_tf.data.sources.folder import Folder, stem
from polarmask_tf.data.sources.id_image import FORMATS, ids_of, packed, packed_image, split_ids
from polarmask_tf.data.sources.source import ONE_CLASS, SPLITS, Builder, Source, class_name, skip_image, text_of
from polarmask_tf.errors import InputError, nfc
from polarmask_tf.files import io_error_text, read_file

_IMAGES = ("images", "image", "imgs", "img", "raw", "jpegimages", "pictures")
_MASKS = ("masks", "mask", "labels", "label", "instances", "instance_masks", "segmentationobject", "gt", "annotations")
# What follows the name of the picture in the name of its mask; of the picture, what may follow instead.
_SUFFIX = re.compile(r"[_-](cp_masks|masks?|labels?|instances?|instanceids|gt)$", re.IGNORECASE)
_OWN_SUFFIX = re.compile(r"[_-](img|image|raw)$", re.IGNORECASE)
_VOID = 255, (224, 224, 192)  # PASCAL VOC's number and color of "do not care"
_MOST_CLASSES = 25  # numbers of a mask that may be one of classes
_SPECK = 5  # pixels: an object of fewer tells nothing
_VOC = ("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog", "horse")
_VOC += ("motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor")


def layout(folder: Folder) -> str:
    """Which of the layouts a folder has: "bowl", "voc", "folders", "suffix", or "" for none."""
    parts = [name.lower().split("/") for name in folder.files]
    if any(len(p) > 2 and p[-2] == "masks" for p in parts) and _bowl(folder):
        return "bowl"
    tops = {part for p in parts for part in p[:-1]}
    if "segmentationobject" in tops:
        return "voc"
    if tops & {*_IMAGES} and tops & {*_MASKS}:
        return "folders"
    return "suffix" if _with_suffix(folder) else ""


def read(path: Path, report: Report, folder: Folder, progress: bool = False) -> list[Source]:
    """A folder in one of the layouts; one source for each split that its folders name (images/train and the like).

    All masks are decoded here; `progress` shows a bar.
    """
    if not os.path.isdir(path):
        raise InputError(f"{path}: is a file; give the folder of pictures and masks")
    kind, twins = layout(folder), set()
    if kind == "bowl":
        pairs = _bowl(folder)
    elif kind == "suffix":
        pairs = {picture: [mask] for picture, mask in _with_suffix(folder).items()}
    elif kind:
        pairs = _in_folders(folder, ("segmentationobject",) if kind == "voc" else _MASKS, twins, report)
    else:
        told = "images/ beside masks/, NAME.tif beside NAME_masks.tif, SegmentationObject/, or ID/images/ with ID/masks/"
        raise InputError(f"{path}: no pictures with masks found; known are {told}")
    masks = {mask for found in pairs.values() for mask in found}
    for name in folder.files:
        if name not in pairs and name not in masks and name not in twins:
            _tell_alone(name, report, kind)
    classes_of = _Classes(folder, path) if kind == "voc" else None
    builders: dict[str, Builder] = collections.defaultdict(Builder)
    for picture, found in tqdm(sorted(pairs.items()), desc="read masks", unit="img", disable=not progress):
        try:
            image, objects = _objects(folder, picture, found, kind, report)
            image = builders[_split(picture)].image(picture, image)
            for outline in objects.values() if isinstance(objects, dict) else objects:
                name = classes_of.of(picture, outline, image, report) if classes_of else ONE_CLASS
                builders[_split(picture)].add(image, name, outline)
        except Unusable as reason:
            skip_image(report, reason, f"{picture} with {found[0]}", 0)
    names = classes_of.names if classes_of else None
    builders = builders or {"": Builder(as_shown=False)}
    return [Source(path, "masks", *builder.finish(names), folder.root, split) for split, builder in builders.items()]


def _split(name):
    return next((SPLITS[part.lower()] for part in name.split("/")[:-1] if part.lower() in SPLITS), "")


def _tell_alone(name, report, kind):
    folders = {part.lower() for part in name.split("/")[:-1]}
    if kind != "suffix" and folders & {"segmentationclass", "outlines", "semantic", "visualization"}:
        return
    if _SUFFIX.search(stem(name)) if kind == "suffix" else folders & {*_MASKS}:
        report.skip("mask without a picture", name)
    elif kind == "suffix" or folders & {*_IMAGES}:
        report.skip("picture without a mask: not labelled yet?", name)


# ---- which mask belongs to which picture


def _bowl(folder):
    """{ID/images/ID.png: [ID/masks/1.png, ...]}: a folder for every picture, a mask for every object."""
    images, masks = {}, collections.defaultdict(list)
    for name in folder.files:
        parts = name.split("/")
        if len(parts) > 2 and parts[-2] in ("images", "masks"):
            home = nfc("/".join(parts[:-2]))
            if parts[-2] == "masks":
                masks[home].append(name)
            elif nfc(stem(parts[-1])) == nfc(parts[-3]):
                images[home] = name
    return {name: masks[home] for home, name in images.items() if home in masks}


def _in_folders(folder, mask_folders, twins, report):
    """{images/a.png: [masks/a.tif]} by the same name under both, the suffixes aside, in which the masks' may have a _mask.

    Of files that differ in their suffix alone the first is taken; `twins` gets the others.
    """
    images, masks = {}, {}
    for name in folder.files:
        parts = nfc(stem(name)).split("/")
        lower = [part.lower() for part in parts[:-1]]
        for kinds, found in ((mask_folders, masks), (_IMAGES, images)):
            if at := [i for i, part in enumerate(lower) if part in kinds]:
                ending = _SUFFIX if found is masks else _OWN_SUFFIX
                at = at[-1]
                key = "/".join([*lower[:at], *parts[at + 1 :]])
                keys = (key, ending.sub("", key))
                if keys[0] in found:
                    what = "mask" if found is masks else "picture"
                    report.skip(f"{what} with the stem of another", f"{name}, {found[keys[0]]}")
                    twins.add(name)
                else:
                    for k in keys:
                        found.setdefault(k, name)
                break
    pairs = {}
    for key, name in images.items():
        if key in masks and name not in pairs:
            pairs[name] = [masks[key]]
    return pairs


def _with_suffix(folder):
    """{a.tif: a_masks.tif} side by side; of several masks the first of the alphabet."""
    there = {nfc(stem(name)): name for name in reversed(folder.files)}
    bare = {}
    for own in there:
        if not _SUFFIX.search(own):
            bare[own] = there[own]
            bare.setdefault(_OWN_SUFFIX.sub("", own), there[own])
    pairs = {}
    for own, name in sorted(there.items()):
        if _SUFFIX.search(own) and (picture := bare.get(_SUFFIX.sub("", own))):
            pairs.setdefault(picture, name)
    return pairs


# ---- what is in a mask


def _objects(folder, picture, found, kind, report):
    """(width, height) that the masks have, and their objects: RLEs, of one mask by number."""
    stored, upright = folder.sizes(picture)
    if kind == "bowl":
        objects, size = [], None
        for name in found:
            try:
                ids = ids_of(folder, name, report)
                size = _fitting(ids, stored, upright)
            except Unusable as reason:
                report.skip_object(reason, name)
                continue
            if (ids > 0).any():
                objects.append(segmentation.from_mask((ids > 0).astype(np.uint8)))
            else:
                report.skip_object("empty mask", name)
        return size or upright, objects
    ids = ids_of(folder, found[0], report)
    size = _fitting(ids, stored, upright)
    if kind == "voc":
        ids[(ids == _VOID[0]) | (ids == packed(*_VOID[1]))] = 0
    objects = split_ids(ids)
    if ids[0, 0] and (ids[[0, 0, -1, -1], [0, -1, 0, -1]] == ids[0, 0]).all():
        report.note("mask whose four corners have one number, taken for an object (is it the background?)", found[0])
    looked_at = [*objects.items()][:: max(1, len(objects) // _MOST_CLASSES)]
    if len(objects) > _MOST_CLASSES:
        specks = [_has_parts(ids, number, rle) or coco_mask.area(rle) < _SPECK for number, rle in looked_at]
        if sum(specks) >= len(looked_at) / 2:
            what = "mask of many numbers, most of which are in pieces or specks, each taken for one object (is it blurred?)"
            report.note(what, found[0])
    elif parted := sum(_has_parts(ids, number, rle) for number, rle in looked_at):
        if len(objects) == 1:
            what = "mask of one number with several parts, taken for one object (is it a binary mask, not one of instances?)"
            report.note(what, found[0])
        elif parted >= len(objects) / 2:
            what = "mask of few numbers, most of which have several parts, each taken for one object (are they classes?)"
            report.note(what, found[0])
    if not objects:
        report.note("mask without an object: background", found[0])
    return size, objects


def _has_parts(ids, number, rle):
    """Whether what has a number is several things of a size."""
    left, top, width, height = coco_mask.toBbox({**rle, "counts": rle["counts"].encode()}).astype(int).tolist()
    rings = contours.trace(ids[top : top + height, left : left + width] == number)
    areas = np.array([contours.shoelace(ring) for ring in rings])
    return int((areas > 0.1 * areas.max()).sum()) > 1


def _fitting(ids, stored, upright):
    size = ids.shape[::-1]
    if size not in (stored, upright):
        raise Unusable("mask of another size than its image", f"{size[0]} x {size[1]}, the image {stored[0]} x {stored[1]}")
    return size


class _Classes:
    """Classes of PASCAL VOC's objects: what SegmentationClass/ has where the object is; its names by labelmap.txt, if any."""

    def __init__(self, folder, path):
        self._folder, self._of = folder, {}
        self._masks = {
            nfc(stem(posixpath.basename(name))): name
            for name in folder.files
            if "segmentationclass" in name.lower().split("/")[:-1]
        }
        self._map = _label_map(path)
        self.names = list(self._map.values()) if self._map else None

    def of(self, picture, rle, image, report):
        name = self._masks.get(nfc(stem(posixpath.basename(picture))))
        if name is None:
            report.note(f"picture without a mask of classes: its objects are called {ONE_CLASS!r}", picture)
            return ONE_CLASS
        if self._of.get("name") != name:
            try:
                self._of = {"name": name, **self._colors(name, report)}
            except Unusable as reason:
                report.note(f"mask of classes that cannot be used ({reason}): its objects are called {ONE_CLASS!r}", name)
                self._of = {"name": name, "colors": None}
        colors = self._of["colors"]
        if colors is None:
            return ONE_CLASS
        if colors.shape != (image["height"], image["width"]):
            report.note(f"mask of classes of another size than its image: its objects are called {ONE_CLASS!r}", name)
            return ONE_CLASS
        inside = colors[coco_mask.decode({**rle, "counts": rle["counts"].encode()}) > 0]
        numbers, counts = np.unique(inside, return_counts=True)
        number = int(numbers[counts.argmax()])
        if self._map:
            if number not in self._map:
                report.note(f"object of a color that labelmap.txt does not name: it is called {ONE_CLASS!r}", name)
            return self._map.get(number, ONE_CLASS)
        if not 1 <= number <= len(_VOC):
            return f"class {number}"
        if not self._of["palette"]:  # with which PASCAL VOC's own come
            what = "object named as PASCAL VOC names its number, for want of a labelmap.txt (--classes OLD=NEW renames)"
            report.note(what, name)
        return _VOC[number - 1]

    def _colors(self, name, report):
        """Numbers of a class mask; colors, also those of a palette, where labelmap.txt gives colors. And whether it has one."""
        values = ids_of(self._folder, name, report)
        with Image.open(self._folder.root / name, formats=FORMATS) as image:
            palette = image.mode == "P"
            if self._map and values.max(initial=0) <= 255:
                values = packed_image(np.asarray(image.convert("RGB")))
        return {"colors": values, "palette": palette}


def _label_map(path):
    """{packed color: class} of a labelmap.txt of CVAT: lines of name:r,g,b:parts:actions."""
    file = path / "labelmap.txt"
    if not os.path.isfile(file):
        return None
    try:
        lines = text_of(read_file(file, 2**20)).splitlines()
        rows = [line.split(":") for line in lines if line.strip() and not line.startswith("#")]
        found = {packed(*(int(v) for v in row[1].split(","))): class_name(row[0]) for row in rows}
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {io_error_text(error)}") from None
    except (ValueError, LookupError, TypeError, Unusable):
        raise InputError(f"{file}: not lines of name:red,green,blue:parts:actions") from None
    found.pop(0, None)  # background
    return found
