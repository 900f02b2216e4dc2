"""Reading COCO JSON that somebody else wrote: nothing in it is trusted, and what cannot be used is counted and named."""

from __future__ import annotations

import collections
import posixpath
from pathlib import Path

from polarmask_tf.data.pictures import OUTSIDE
from polarmask_tf.data.report import Report, Unusable
from polarmask_tf.data.segmentation import RELATIVE
from polarmask_tf.data.sources.folder import Folder
from polarmask_tf.data.sources.source import load_json
from polarmask_tf.errors import InputError, nfc
from polarmask_tf.lite import MAX_PIXELS

_KEYS = ("images", "annotations", "categories")
_GIVE = "give the COCO JSON file with the annotations"
# By keys of the whole file: what it is instead.
_READ = "`polarmask convert SOURCE OUT` and pm.convert_dataset read it"
_OTHERS = {
    "_via_img_metadata": f"a project of the VGG Image Annotator (VIA): {_READ}",
    "shapes": f"a labelme file, of one image: {_READ}",
    "asset": "a VoTT file, of one image: export it as COCO",
    "view": "a project of VIA 3: export it as COCO",
}


def read(
    path: Path, report: Report, folder: Folder | None = None, document: dict | None = None
) -> tuple[list[dict], list[dict]]:
    """Images with their annotations, and classes, of a COCO file, whose content is `document` if that was read before.

    Returns images as {"id", "file_name", "height", "width", "annotations": [{"id", "label" (0-based), "iscrowd", "area"
    (None where the file gives none), "segmentation" (as it was read)}, ...]} in the order of the file, and classes as
    {"name", "category_id"} ordered by category id. With the `folder` of pictures, names that are not quite those of the
    files are understood, and sizes that are not given are read there. Ids that are text are those numbers if they are
    digits, and get a free number otherwise. Raises InputError if the file as a whole is not usable.
    """
    document = check(path, load_json(path, _GIVE) if document is None else document)
    numbers = {key: _Numbers(document[key]) for key in ("images", "annotations", "categories")}
    classes = _classes(path, document["categories"], numbers["categories"], report)
    label_of = {c["category_id"]: label for label, c in enumerate(classes)}
    ids_by_name = {c["name"]: c["category_id"] for c in reversed(classes)}
    images, unusable = _images(path, document["images"], numbers["images"], folder, report)
    seen: set[int] = set()
    for index, entry in enumerate(document["annotations"]):
        where = f"{path.name}, annotations[{index}]"
        try:
            entry = _numbered(entry, numbers, classes, ids_by_name, report, where)
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
            report.skip_object(reason, where)
            continue
        seen.add(annotation["id"])
        annotation["label"] = label_of[entry["category_id"]]
        images[entry["image_id"]]["annotations"].append(annotation)
    classes = _without_parent(document["categories"], classes, images.values(), report, path)
    return list(images.values()), classes


def _without_parent(categories, classes, images, report, path):
    """Classes without the one that exports of Roboflow put before the others: their supercategory, which no object has."""
    first = categories[0]
    below = [entry.get("supercategory") == first["name"] for entry in categories[1:]]
    if first["id"] not in (0, "0") or first.get("supercategory") != "none" or not below or not all(below):
        return classes
    annotations = [annotation for image in images for annotation in image["annotations"]]
    if any(annotation["label"] == 0 for annotation in annotations):
        return classes
    for annotation in annotations:
        annotation["label"] -= 1
    report.note("category that only stands for all others (Roboflow's), left out", f"{path.name}: {first['name']!r}")
    return classes[1:]


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


def is_one(document) -> bool:
    return isinstance(document, dict) and all(isinstance(document.get(key), list) for key in _KEYS)


def names_of(document: dict) -> list[str]:
    """What the images are called, of those that have a name."""
    names = (entry.get("file_name") for entry in document["images"] if isinstance(entry, dict))
    return [name for name in names if isinstance(name, str) and name]


def check(path: Path, document) -> dict:
    """The content of a file, as it is; InputError unless it is COCO's."""
    wanted = "expected a COCO file: an object with the lists 'images', 'annotations' and 'categories'"
    if not isinstance(document, dict):
        what = f"a {type(document).__name__}"
        if isinstance(document, list) and document and isinstance(document[0], dict) and "score" in document[0]:
            what = "results of a detector, not annotations"
        raise InputError(f"{path}: holds {what}; {wanted}")
    for key in _KEYS:
        if key not in document:
            what = next((what for other, what in _OTHERS.items() if other in document), "")
            values = next(iter(document.values()), None)
            if isinstance(values, dict) and "regions" in values:
                what = f"annotations of the VGG Image Annotator (VIA): {_READ}"
            raise InputError(f"{path}: {what and f'is {what}; '}has no key '{key}'; {wanted}")
        if not isinstance(document[key], list):
            raise InputError(f"{path}: '{key}' is a {type(document[key]).__name__}; {wanted}")
    first = next(iter(document["annotations"]), None)
    if isinstance(first, dict) and "segments_info" in first and "segmentation" not in first:
        tool = "panopticapi's panoptic2detection_coco_format.py"
        raise InputError(f"{path}: is a panoptic COCO file (segments_info); convert it to instances first, with {tool}")
    return document


class _Numbers:
    """Ids of one list of the file: integers as they are, text by what it spells, or in its order by the next free number."""

    def __init__(self, entries):
        ids = [entry.get("id") for entry in entries if isinstance(entry, dict)]
        self._of = {}
        texts = [value for value in ids if isinstance(value, str)]
        if texts:
            taken = {value for value in map(self._plain, ids) if value is not None}
            free = 1
            for text in dict.fromkeys(texts):
                if self._plain(text) is None:
                    while free in taken:
                        free += 1
                    self._of[text] = free
                    taken.add(free)

    def __call__(self, value):
        """The number of an id; what is neither a number nor text as it is."""
        plain = self._plain(value)
        return plain if plain is not None else self._of.get(value, value) if isinstance(value, str) else value

    @staticmethod
    def _plain(value):
        if isinstance(value, str) and value.isascii() and value.isdecimal() and len(value) < 19:
            return int(value)
        return value if _is_integer(value) else None


def _numbered(entry, numbers, classes, ids_by_name, report, where):
    """An annotation with integers for ids that are text, and in the list that COCO has for one polygon without it."""
    if not isinstance(entry, dict):
        return entry
    entry = dict(entry)
    for key, of in (("id", "annotations"), ("image_id", "images"), ("category_id", "categories")):
        if isinstance(entry.get(key), str):
            entry[key] = numbers[of](entry[key])
    if isinstance(entry.get("category_id"), str) and (number := ids_by_name.get(nfc(entry["category_id"]))) is not None:
        report.note("annotation whose category is given by its name", where)
        entry["category_id"] = number
    if entry.get("category_id") is None and len(classes) == 1:
        report.note("annotation without a category, taken for the only one", where)
        entry["category_id"] = classes[0]["category_id"]
    parts = entry.get("segmentation")
    if isinstance(parts, list) and parts and set(map(type, parts)) <= {int, float}:  # as VIA writes it
        entry["segmentation"] = [parts]
    return entry


def _classes(path, categories, number, report):
    classes = []
    for index, entry in enumerate(categories):
        if not (isinstance(entry, dict) and _is_integer(number(entry.get("id"))) and _is_text(entry.get("name"))):
            raise InputError(f"{path}: categories[{index}] needs an integer 'id' and a string 'name'")
        classes.append({"name": nfc(entry["name"]), "category_id": number(entry["id"])})
    if not classes:
        raise InputError(f"{path}: 'categories' is empty; at least one class is needed")
    if twice := _twice([entry["category_id"] for entry in classes]):
        raise InputError(f"{path}: category id {twice[0]} is given twice; every category needs its own id")
    return sorted(classes, key=lambda c: c["category_id"])


def _twice(values):
    return [value for value, count in collections.Counter(values).items() if count > 1]


def _images(path, entries, number, folder, report):
    """Usable images by id, and the ids of the others."""
    named = collections.defaultdict(list)  # every file name that an id is given to
    usable, unusable = [], set()
    for index, entry in enumerate(entries):
        where = f"{path.name}, images[{index}]"
        if isinstance(entry, dict):
            entry = entry | {"id": number(entry.get("id"))}
            if _is_integer(entry["id"]):
                unusable.add(entry["id"])  # until it is found usable
        try:
            there = _as_there(entry, folder, report, where) if folder and isinstance(entry, dict) else entry
            image = _image(there, folder.most_pixels if folder else MAX_PIXELS)
            image["as_shown"] = there is not entry and not (entry.get("height") and entry.get("width"))  # sizes of the file are
        except Unusable as reason:
            report.skip(reason, where)
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


def _as_there(entry, folder, report, where):
    """An image with the name that its file has here, and with the file's size where none is given."""
    name = entry.get("file_name")
    if not _is_text(name) or not name or "\0" in name:
        return entry
    lacking = [key for key in ("height", "width") if entry.get(key) in (None, 0)]
    try:
        found = folder.find(name)
        if lacking:
            width, height = folder.size(found)
            entry = entry | {"height": height, "width": width}
            report.note("image without a size, which was read from its file", where)
    except Unusable as reason:
        if not lacking and str(reason) in ("missing image", OUTSIDE):  # said when it is read
            return entry
        raise
    if found != name and found != posixpath.normpath(name):
        report.note("file name that was understood as that of a file here", f"{where}: {name} is {found}")
        return entry | {"file_name": found}
    return entry


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
    kept = {"id": entry["id"], "iscrowd": int(crowd), "area": area, "segmentation": entry.get("segmentation")}
    box = entry.get("bbox")
    if isinstance(box, list) and len(box) == 4 and all(type(v) in (int, float) and abs(v) < 1e9 for v in box):  # NaN is not
        kept["bbox"] = box
    return kept


def _is_integer(value):
    return isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63


def _is_text(value):
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:  # a lone surrogate, which JSON can spell and no file name or record can hold
        return False
