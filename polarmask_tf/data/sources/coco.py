"""Reading COCO JSON that somebody else wrote: nothing in it is trusted, and what cannot be used is counted and named."""

import itertools
import json
import math
import struct
import zlib
from pathlib import Path

import numpy as np
from pycocotools import mask as coco_mask

from polarmask_tf.data import contours
from polarmask_tf.errors import InputError

# How far the boundary of a traced mask may move, in pixels, while its staircase turns into lines.
_STAIRCASE = 0.35


class Unusable(Exception):
    """An image or an annotation that has to be skipped; the text is the reason, the same for all of a kind."""


class Report:
    """What was skipped and what is worth knowing: reason -> [count, first example]."""

    def __init__(self, strict: bool = False):
        self.strict = strict
        self.skipped: dict[str, list] = {}
        self.notes: dict[str, list] = {}

    def skip(self, reason: str, where: str, count: int = 1) -> None:
        where = _one_line(where)
        if self.strict:
            raise InputError(f"{where}: {reason}; mend it, or leave out --strict to skip such things")
        self.skipped.setdefault(reason, [0, where])[0] += count

    def note(self, reason: str, where: str) -> None:
        self.notes.setdefault(reason, [0, _one_line(where)])[0] += 1

    def merge(self, other: "Report") -> None:
        for mine, theirs in ((self.skipped, other.skipped), (self.notes, other.notes)):
            for reason, (count, example) in theirs.items():
                mine.setdefault(reason, [0, example])[0] += count

    def lines(self) -> list[str]:
        kinds = (("skipped", self.skipped), ("note:", self.notes))
        return [f"{kind} {n} x {reason} (first: {where})" for kind, found in kinds for reason, (n, where) in found.items()]


def _one_line(text):
    """File names may hold anything."""
    text = "".join(c if c.isprintable() else "?" for c in text)
    return text if len(text) <= 200 else f"{text[:130]}...{text[-60:]}"


def read(path: Path, report: Report) -> tuple[list[dict], list[dict]]:
    """Images with their annotations, and classes, of a COCO file.

    Returns images as {"id", "file_name", "height", "width", "annotations": [{"id", "label" (0-based), "iscrowd", "area"
    (None where the file gives none), "segmentation" (as it was read)}, ...]} in the order of the file, and classes as
    {"name", "category_id"} ordered by category id. Raises InputError if the file as a whole is not usable.
    """
    document = _load(path)
    classes = _classes(path, document["categories"])
    label_of = {c["category_id"]: label for label, c in enumerate(classes)}
    images: dict[int, dict] = {}
    unusable: set[int] = set()
    for index, entry in enumerate(document["images"]):
        where = f"{path.name}, images[{index}]"
        try:
            image = _image(entry)
        except Unusable as reason:
            report.skip(str(reason), where)
            if isinstance(entry, dict) and _is_integer(entry.get("id")):
                unusable.add(entry["id"])
            continue
        if image["id"] in images:
            report.skip("duplicate image id", f"{where}: id {image['id']}, {image['file_name']}")
        else:
            images[image["id"]] = image
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
    return list(images.values()), classes


def _load(path):
    if path.is_dir():
        raise InputError(f"{path}: is a directory; give the COCO JSON file with the annotations")
    try:
        document = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; give the COCO JSON file with the annotations") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON ({error}); give the COCO JSON file with the annotations") from None
    wanted = "expected a COCO file: an object with the lists 'images', 'annotations' and 'categories'"
    if not isinstance(document, dict):
        raise InputError(f"{path}: holds a {type(document).__name__}; {wanted}")
    for key in ("images", "annotations", "categories"):
        if key not in document:
            raise InputError(f"{path}: has no key '{key}'; {wanted}")
        if not isinstance(document[key], list):
            raise InputError(f"{path}: '{key}' is a {type(document[key]).__name__}; {wanted}")
    return document


def _classes(path, categories):
    classes = []
    for index, entry in enumerate(categories):
        usable = isinstance(entry, dict) and _is_integer(entry.get("id")) and _is_text(entry.get("name"))
        if not usable:
            raise InputError(f"{path}: categories[{index}] needs an integer 'id' and a string 'name'")
        classes.append({"name": entry["name"], "category_id": entry["id"]})
    classes.sort(key=lambda c: c["category_id"])
    for one, two in itertools.pairwise(classes):
        if one["category_id"] == two["category_id"]:
            raise InputError(f"{path}: category id {one['category_id']} is given twice; every category needs its own id")
    if not classes:
        raise InputError(f"{path}: 'categories' is empty; at least one class is needed")
    return classes


def _image(entry):
    if not isinstance(entry, dict):
        raise Unusable("malformed image entry (not an object)")
    if not _is_integer(entry.get("id")):
        raise Unusable("malformed image entry (no integer 'id')")
    if not _is_text(entry.get("file_name")) or not entry["file_name"] or "\0" in entry["file_name"]:
        raise Unusable("malformed image entry (no 'file_name')")
    for key in ("height", "width"):
        if not _is_integer(entry.get(key)) or entry[key] < 1:
            raise Unusable(f"malformed image entry (no positive integer '{key}')")
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


def region(
    segmentation, height: int, width: int, max_edges: int, *, coarse: bool = False
) -> tuple[dict, list[np.ndarray], float, bool]:
    """The mask and the rings of one annotation's segmentation.

    Returns the compressed RLE of the original, as pycocotools' annToRLE makes it; the rings, float64 [V, 2] in pixels,
    with at most `max_edges` vertices in all; their IoU with the original; and whether a degenerate part was left out.
    Polygons are kept as they are, also beyond the border, unless they have too many vertices; masks are traced, at a
    lower resolution where their outline is far more intricate than `max_edges` can follow, or where `coarse` says that
    an approximation will do (a crowd, which training only ignores). Raises Unusable.
    """
    if isinstance(segmentation, list):
        return _polygons(segmentation, height, width, max_edges)
    if isinstance(segmentation, dict):
        rle = _checked_rle(segmentation, height, width)
        if not coco_mask.area(rle):
            raise Unusable("empty mask")
        x, y, w, h = (int(v) for v in coco_mask.toBbox(rle))
        mask = _columns(rle, x, x + w)[:, y : y + h].T
        outline = _traced(mask, 64 if coarse else 2**16, (2 if coarse else 16) * max_edges)
        rings = [ring + np.array([x, y]) for ring in outline]
        if coarse:
            return rle, contours.simplify(rings, max_edges, min_iou=0.0)[0], 1.0, False
        return rle, *contours.simplify(rings, max_edges, tolerance=_STAIRCASE), False
    raise Unusable("annotation without segmentation" if segmentation is None else "malformed segmentation")


def _columns(rle, first, last):
    """The columns from `first` to `last` - 1 of a mask, as uint8 [last - first, height]: no need to unpack all of it."""
    height = rle["size"][0]
    ends = np.cumsum(_decompress(rle["counts"].decode()))
    lengths = np.diff(np.clip(ends, first * height, last * height), prepend=first * height)
    return np.repeat(np.arange(len(ends), dtype=np.uint8) & 1, lengths).reshape(last - first, height)


def _traced(mask, max_size, max_corners):
    """The outline of a mask at the finest of the resolutions 1, 1/2, 1/4, ... that keeps to both maxima."""
    scale = 1
    while True:
        if max(mask.shape) <= max_size:
            rings = contours.trace(mask)
            if sum(map(len, rings)) <= max_corners or max(mask.shape) <= 16:
                return [ring * scale for ring in rings]
        h, w = mask.shape
        padded = np.zeros((h + h % 2, w + w % 2), np.uint8)
        padded[:h, :w] = mask
        covered = padded[0::2, 0::2] + padded[0::2, 1::2] + padded[1::2, 0::2] + padded[1::2, 1::2]
        mask = covered >= min(2, covered.max())  # a mask of specks must not vanish
        scale *= 2


def mask_png(rle: dict) -> bytes:
    """A PNG of a mask that decodes to 0 and 1 in 8 bits, which is what Model Garden reads.

    It holds one bit a pixel and a palette of two grays: an eighth of the bytes to pack, unpack and store.
    """
    height, width = rle["size"]
    x, y, w, h = (int(v) for v in coco_mask.toBbox(rle))
    first, last = x // 8, -(-(x + w) // 8)
    rows = np.zeros((height, 1 + -(-width // 8)), np.uint8)  # a filter byte (0: none) and the pixels
    if w and h:
        columns = np.zeros((8 * (last - first), h), np.uint8)
        columns[x - 8 * first : x - 8 * first + w] = _columns(rle, x, x + w)[:, y : y + h]
        rows[y : y + h, 1 + first : 1 + last] = np.packbits(np.ascontiguousarray(columns.T), axis=1)
    header = struct.pack(">IIBBBBB", width, height, 1, 3, 0, 0, 0)  # bit depth 1, palette
    chunks = ((b"IHDR", header), (b"PLTE", b"\0\0\0\1\1\1"), (b"IDAT", zlib.compress(rows.tobytes(), 1)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )


def _polygons(parts, height, width, max_edges):
    malformed = Unusable("malformed polygon (not lists of x, y, x, y, ...)")
    if not all(isinstance(part, list) and len(part) % 2 == 0 and set(map(type, part)) <= {int, float} for part in parts):
        raise malformed
    try:
        parts = [np.array(part, np.float64).reshape(-1, 2) for part in parts if part]
    except OverflowError:  # an integer of hundreds of digits
        raise malformed from None
    if not parts:
        raise Unusable("empty polygon")
    points = np.concatenate(parts)
    (left, top), (right, bottom) = points.min(axis=0).tolist(), points.max(axis=0).tolist()
    if not math.isfinite(left + top + right + bottom):
        raise Unusable("polygon with NaN or infinite coordinates")
    if right <= 0 or bottom <= 0 or left >= width or top >= height:
        raise Unusable("polygon outside the image")
    # pycocotools walks every edge pixel by pixel: memory without end for an absurd coordinate.
    if max(-left, -top, right, bottom) > 10 * max(height, width) + 1000:
        raise Unusable("polygon with absurd coordinates (beyond ten times the image)")
    drawable = [part for part in parts if len(part) > 2]
    if not drawable:
        raise Unusable("polygon with fewer than 3 points")
    rings = []
    for ring in map(_without_repeats, drawable):
        area = contours.shoelace(ring) if len(ring) > 2 else 0.0
        if abs(area) > 1e-6:
            rings.append(ring if area > 0 else ring[::-1])
    if not rings:
        raise Unusable("polygon of zero area")
    rles = coco_mask.frPyObjects([part.ravel() for part in drawable], height, width)
    rle = rles[0] if len(rles) == 1 else coco_mask.merge(rles)
    iou = 1.0
    if sum(map(len, rings)) > max_edges:
        before = rings
        rings, iou = contours.simplify(rings, max_edges)
        if len(before) > 1:
            iou = contours.iou(rings, before)  # parts that overlap break the bound
    return rle, rings, iou, len(rings) < len(parts)


def _without_repeats(ring):
    different = ring != np.concatenate([ring[-1:], ring[:-1]])
    different = different[:, 0] | different[:, 1]
    return ring if different.all() else ring[different]


def _checked_rle(segmentation, height, width):
    size, counts = segmentation.get("size"), segmentation.get("counts")
    if not (isinstance(size, list) and len(size) == 2 and all(map(_is_integer, size))):
        raise Unusable("malformed RLE (no 'size' of two integers)")
    if size != [height, width]:
        raise Unusable("RLE of the wrong size")
    if isinstance(counts, list):
        if not (set(map(type, counts)) == {int} and min(counts) >= 0):
            raise Unusable("malformed RLE ('counts' are not integers >= 0)")
        total = sum(counts)
    elif isinstance(counts, str):
        total = int(_decompress(counts).sum())
    else:
        raise Unusable("malformed RLE (no 'counts')")
    if total != height * width:
        raise Unusable("RLE of the wrong size")
    if isinstance(counts, list):
        return coco_mask.frPyObjects({"size": size, "counts": counts}, height, width)
    return {"size": size, "counts": counts.encode()}


def _decompress(text: str) -> np.ndarray:
    """Run lengths of compressed counts. pycocotools would read past the end of a broken string, so it is never given one.

    Five bits a character (48 is zero), bit 5 for "more follows", the last one's bit 4 is the sign; from the fourth run on
    the difference to the run before the last (pycocotools/common/maskApi.c, rleToString).
    """
    codes = np.frombuffer(text.encode(), np.uint8).astype(np.int64) - 48
    ends = np.flatnonzero(codes & 32 == 0)
    if not len(codes) or codes.min() < 0 or codes.max() > 63 or not len(ends) or ends[-1] != len(codes) - 1:
        raise Unusable("malformed RLE (broken 'counts')")
    starts = np.concatenate([[0], ends[:-1] + 1])
    shifts = 5 * (np.arange(len(codes)) - np.repeat(starts, ends - starts + 1))
    if shifts.max() > 30:  # runs have 32 bits
        raise Unusable("malformed RLE (broken 'counts')")
    runs = np.add.reduceat((codes & 31) << shifts, starts)
    runs -= np.where(codes[ends] & 16, 32 << shifts[ends], 0)
    runs[1::2] = np.cumsum(runs[1::2])
    runs[2::2] = np.cumsum(runs[2::2])
    if runs.min() < 0:
        raise Unusable("malformed RLE (broken 'counts')")
    return runs
