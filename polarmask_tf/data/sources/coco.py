"""Reading COCO JSON that somebody else wrote: nothing in it is trusted, and what cannot be used is counted and named."""

import collections
import json
import os
from pathlib import Path

from polarmask_tf.data.report import Report, Unusable
from polarmask_tf.data.segmentation import RELATIVE
from polarmask_tf.errors import InputError
from polarmask_tf.files import io_error_text, read_file
from polarmask_tf.lite import MAX_PIXELS

_MOST_BYTES = 10 * 2**30
# By keys of the whole file: what it is instead.
_OTHERS = {
    "_via_img_metadata": "a project of the VGG Image Annotator (VIA)",
    "shapes": "a LabelMe file, of one image",
    "asset": "a VoTT file, of one image",
}
_BACKGROUND = ("_background_", "__background__", "background", "bg")


def read(path: Path, report: Report, most_pixels: int = MAX_PIXELS) -> tuple[list[dict], list[dict]]:
    """Images with their annotations, and classes, of a COCO file.

    Returns images as {"id", "file_name", "height", "width", "annotations": [{"id", "label" (0-based), "iscrowd", "area"
    (None where the file gives none), "segmentation" (as it was read)}, ...]} in the order of the file, none larger than
    `most_pixels`, and classes as {"name", "category_id"} ordered by category id. Raises InputError if the file as a whole is
    not usable.
    """
    document = _load(path)
    classes = _classes(path, document["categories"], report)
    label_of = {c["category_id"]: label for label, c in enumerate(classes)}
    images, unusable = _images(path, document["images"], report, most_pixels)
    seen: set[int] = set()
    for index, entry in enumerate(document["annotations"]):
        where = f"{path.name}, annotations[{index}]"
        try:
            annotation = _annotation(entry)
            where += f": id {entry['id']}"
            if entry["image_id"] not in images:
                if entry["image_id"] in unusable:
                    raise Unusable("annotation of a skipped image")
                raise Unusable("annotation of an unknown image")
            if entry["category_id"] not in label_of:
                where += f", category {entry['category_id']}"
                raise Unusable("annotation of an unknown category")
            if annotation["id"] in seen:
                raise Unusable("duplicate annotation id")
        except Unusable as reason:
            report.skip(str(reason), where)
            continue
        seen.add(annotation["id"])
        annotation["label"] = label_of[entry["category_id"]]
        images[entry["image_id"]]["annotations"].append(annotation)
    for label, entry in enumerate(classes):
        if entry["name"].lower() in _BACKGROUND:
            number = sum(a["label"] == label for image in images.values() for a in image["annotations"])
            what = f"a class named like the background, one of {len(classes)} classes to train and to average AP over"
            report.note(what, f"{path.name}: {entry['name']!r} has {number} annotations")
    return list(images.values()), classes


def why_unusable(images: list[dict], report: Report) -> str:
    """What to do about annotations of which none can be used, judged by what was read and by what was skipped."""
    crowds = sum(annotation["iscrowd"] for image in images for annotation in image["annotations"])
    skipped = {reason: count for reason, (count, _) in report.skipped.items()}
    commonest = max(skipped, key=skipped.get, default="")
    if crowds > skipped.get(commonest, 0):
        single = "if they are single objects (CVAT exports brush masks so), add --crowd-as-instances"
        return f"{crowds} annotations are iscrowd: 1, which training only ignores; {single}"
    if commonest in ("annotation without segmentation", "empty polygon"):
        return "annotations are boxes without 'segmentation', and outlines are needed: annotate polygons or masks"
    if commonest == RELATIVE:
        return "coordinates lie between 0 and 1: multiply x by the image's width and y by its height, as COCO has them"
    if "no integer 'image_id'" in commonest or "no integer 'category_id'" in commonest:
        write = "write image_id and category_id as integers, and each segmentation as a list of lists [[x, y, x, y, ...]]"
        return f"ids are text or missing, as the VGG Image Annotator (VIA) exports them: {write}"
    return "see the reasons"


def _load(path):
    give = "give the COCO JSON file with the annotations"
    if os.path.isdir(path):
        raise InputError(f"{path}: is a directory; {give}")
    try:
        document = json.loads(read_file(path, _MOST_BYTES))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; {give}") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {io_error_text(error)}; {give}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON ({error}); {give}") from None
    except MemoryError:
        raise InputError(f"{path}: does not fit into memory; split it") from None
    wanted = "expected a COCO file: an object with the lists 'images', 'annotations' and 'categories'"
    if not isinstance(document, dict):
        what = f"a {type(document).__name__}"
        if isinstance(document, list) and document and isinstance(document[0], dict) and "score" in document[0]:
            what = "results of a detector, not annotations"
        raise InputError(f"{path}: holds {what}; {wanted}")
    for key in ("images", "annotations", "categories"):
        if key not in document:
            what = next((what for other, what in _OTHERS.items() if other in document), "")
            values = next(iter(document.values()), None)
            if isinstance(values, dict) and "regions" in values:
                what = "annotations of the VGG Image Annotator (VIA)"
            raise InputError(f"{path}: {what and f'is {what}: export it as COCO; '}has no key '{key}'; {wanted}")
        if not isinstance(document[key], list):
            raise InputError(f"{path}: '{key}' is a {type(document[key]).__name__}; {wanted}")
    first = next(iter(document["annotations"]), None)
    if isinstance(first, dict) and "segments_info" in first and "segmentation" not in first:
        tool = "panopticapi's panoptic2detection_coco_format.py"
        raise InputError(f"{path}: is a panoptic COCO file (segments_info); convert it to instances first, with {tool}")
    return document


def _classes(path, categories, report):
    classes = []
    for index, entry in enumerate(categories):
        if not (isinstance(entry, dict) and _is_integer(entry.get("id")) and _is_text(entry.get("name"))):
            raise InputError(f"{path}: categories[{index}] needs an integer 'id' and a string 'name'")
        classes.append({"name": entry["name"], "category_id": entry["id"]})
    if not classes:
        raise InputError(f"{path}: 'categories' is empty; at least one class is needed")
    ids, names = ([str(c[key]) for c in classes] for key in ("category_id", "name"))
    if twice := _twice(ids):
        raise InputError(f"{path}: category id {twice[0]} is given twice; every category needs its own id")
    for name in _twice(names):
        same = [c["category_id"] for c in classes if c["name"] == name]
        what = "categories of one name, which stay different classes: each with an AP of its own, confused with the others"
        report.note(what, f"{path.name}: {name!r} has the ids {', '.join(map(str, same))}")
    return sorted(classes, key=lambda c: c["category_id"])


def _twice(values):
    return [value for value, count in collections.Counter(values).items() if count > 1]


def _images(path, entries, report, most_pixels):
    """Usable images by id, and the ids of the others."""
    named = collections.defaultdict(list)  # every file name that an id is given to
    usable, unusable = [], set()
    for index, entry in enumerate(entries):
        where = f"{path.name}, images[{index}]"
        if isinstance(entry, dict) and _is_integer(entry.get("id")):
            unusable.add(entry["id"])  # until it is found usable
        try:
            image = _image(entry, most_pixels)
        except Unusable as reason:
            report.skip(str(reason), where)
            continue
        named[image["id"]].append(image["file_name"])
        usable.append((where, image))
    images: dict[int, dict] = {}
    for where, image in usable:
        names = named[image["id"]]
        if len(set(names)) > 1:  # whose are the annotations?
            report.skip("duplicate image id", f"{where}: id {image['id']}, {' and '.join(names[:3])}")
        elif image["id"] in images:
            report.skip("image that is listed twice", f"{where}: id {image['id']}, {image['file_name']}")
        else:
            images[image["id"]] = image
    return images, unusable


def _image(entry, most_pixels):
    if not isinstance(entry, dict):
        raise Unusable("malformed image entry (not an object)")
    if not _is_integer(entry.get("id")):
        raise Unusable("malformed image entry (no integer 'id')")
    if not _is_text(entry.get("file_name")) or not entry["file_name"] or "\0" in entry["file_name"]:
        raise Unusable("malformed image entry (no 'file_name')")
    for key in ("height", "width"):
        if not _is_integer(entry.get(key)) or entry[key] < 1:
            raise Unusable(f"malformed image entry (no positive integer '{key}')")
    if entry["height"] * entry["width"] > most_pixels:
        raise Unusable(f"image of more than {most_pixels // 10**6} megapixels")
    return {key: entry[key] for key in ("id", "file_name", "height", "width")} | {"annotations": []}


def _annotation(entry):
    if not isinstance(entry, dict):
        raise Unusable("malformed annotation (not an object)")
    for key in ("id", "image_id", "category_id"):
        if not _is_integer(entry.get(key)):
            raise Unusable(f"malformed annotation (no integer '{key}')")
    crowd, area = entry.get("iscrowd", 0), entry.get("area")
    if crowd not in (0, 1):
        raise Unusable("malformed annotation ('iscrowd' is neither 0 nor 1)")
    if area is not None and not (type(area) in (int, float) and 0 <= area < 1e30):  # NaN is neither
        raise Unusable("malformed annotation ('area' is not a number >= 0)")
    return {"id": entry["id"], "iscrowd": int(crowd), "area": area, "segmentation": entry.get("segmentation")}


def _is_integer(value):
    return isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63


def _is_text(value):
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:  # a lone surrogate, which JSON can spell and no file name or record can hold
        return False
