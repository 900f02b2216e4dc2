"""What `polarmask predict` writes: files for each picture, and at the end those that tell of all of them."""

import csv
import dataclasses
import functools
import glob
import json
import os
from pathlib import Path

import numpy as np
from PIL import Image

from polarmask_tf import files
from polarmask_tf.errors import InputError
from polarmask_tf.inference import formats, gallery, inputs, journal, visualize
from polarmask_tf.inference.coco_metrics import check_rle_size
from polarmask_tf.inference.results import Detections

RESULTS, MEASUREMENTS, PAGE, SHEET = "results.json", "measurements.csv", "gallery.html", "sheet.png"


@dataclasses.dataclass(frozen=True)
class Predicted:
    """A picture, its pixels uint8 [h, w, 3] (or windows of a large one), what was found there, its truth (truth.shapes)."""

    picture: inputs.Picture
    image: np.ndarray
    found: Detections
    truth: list | None = None


def _overlay(path, one):
    one.found.save(path, one.image)


def _labelme(path, one):
    # Where labelme would show other pixels than those that were looked at, these are put beside.
    shown = one.picture.path
    if shown is None or "EXIF orientation ignored" in one.picture.notes:
        shown = path.with_suffix(".png")
        visualize.save(Image.fromarray(one.image), shown)
    beside = os.path.relpath(os.path.realpath(shown.parent), os.path.realpath(path.parent))
    image_path = os.path.join(beside, shown.name) if beside != "." else shown.name
    files.atomic_write(path, _labelme_text(one.found.to_labelme(image_path.replace(os.sep, "/"))))


def _labelme_text(content):
    return json.dumps(content, indent=1).encode()


def _geojson(path, one):
    files.atomic_write(path, json.dumps(one.found.to_geojson()))


def _ids(path, one, *, bits=16):
    try:
        ids = one.found.to_ids(np.uint16 if bits == 16 else np.uint32)
    except InputError:
        what = f"{one.picture.name}: {len(one.found):,} objects, and 16 bits number 65,535"
        raise InputError(f"{what}; take --save ids:tif32") from None
    picture = Image.fromarray(ids if bits == 16 else ids.astype(np.int32))  # Pillow has no unsigned 32 bits
    options = {"format": "PNG"} if path.suffix == ".png" else {"format": "TIFF", "compression": "tiff_lzw"}
    with files.replacing(path) as part:
        picture.save(part, **options)


# What --save takes -> folder in OUT, suffix, function of (path, Predicted).
PICTURES = {
    "overlays": ("overlays", ".png", _overlay),
    "overlays:jpg": ("overlays", ".jpg", _overlay),
    "labelme": ("labelme", ".json", _labelme),
    "geojson": ("geojson", ".geojson", _geojson),
    "ids": ("ids", ".png", _ids),
    "ids:tif": ("ids", ".tif", _ids),
    "ids:tif32": ("ids", ".tif", functools.partial(_ids, bits=32)),
}
TABLES = {"coco": RESULTS, "csv": MEASUREMENTS, "gallery": PAGE}
KINDS = (*PICTURES, *TABLES)
DEFAULT = ("overlays", "coco")


def check(save):
    """The kinds of output to write, each once; InputError for a name that is none."""
    kinds = [kind.strip() for kind in ([save] if isinstance(save, str) else save)]
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise InputError(f"--save {', '.join(map(repr, unknown))}: of {', '.join(KINDS)} one or several, with commas between")
    if not kinds:
        raise InputError(f"--save: nothing to write; name one or several of {', '.join(KINDS)}")
    if {"ids:tif", "ids:tif32"} <= {*kinds}:
        raise InputError("--save ids:tif and ids:tif32 are files of one name; take one of them")
    return list(dict.fromkeys(kinds))


def check_size(kinds, segmentation, name, image):
    """InputError for an output that a picture so large cannot have: before it is looked at, which may take hours."""
    if not isinstance(image, np.ndarray) and any(kind.startswith("ids") for kind in kinds):
        raise InputError(f"{name}: ids of so large a picture do not fit into memory; take --save geojson")
    if "coco" in kinds and segmentation == "rle":
        try:
            check_rle_size(*image.shape[:2])
        except InputError as error:
            raise InputError(f"{name}: {error}") from None


def own(out):
    """Paths in `out` that this command writes to, and never reads pictures from."""
    names = {*(folder for folder, *_ in PICTURES.values()), "gallery", *TABLES.values(), SHEET, journal.NAME}
    return [out / name for name in names]


def check_replaceable(kinds, out, found, truth):
    """InputError where the `truth`, or labelme files that were corrected since they were written here, would be replaced."""
    if truth is not None and os.path.realpath(truth) in [os.path.realpath(path) for path in own(out)]:
        raise InputError(f"{truth}: would be replaced by what is written; choose another --out")
    folder = out / PICTURES["labelme"][0]
    if "labelme" not in kinds or not os.path.isdir(folder):
        return
    for entry in found:
        paths = folder.glob(f"{glob.escape(entry.stem)}_*.json") if entry.is_video else [folder / f"{entry.stem}.json"]
        for path in paths:
            if os.path.lexists(path) and not _is_as_written(path):
                what = "is not as `predict` wrote it (corrected in labelme?), and would be replaced"
                raise InputError(f"{path}: {what}; move {folder} away, or choose another --out")


def _is_as_written(path):
    """Whether a labelme file is of _labelme: programs that save one put other blanks into it."""
    try:
        text = files.read_file(path, 2**30)
        return text == _labelme_text(json.loads(text))
    except (OSError, ValueError, RecursionError, MemoryError):
        return False


def write_picture(kinds, out, one, segmentation):
    """Writes the files of one picture -> what `write_tables` needs to know of it, for the journal."""
    stem, entry = one.picture.stem, {"name": one.picture.name, "stem": one.picture.stem, "objects": len(one.found)}
    entry["notes"] = list(one.picture.notes)
    for kind in kinds:
        if kind in PICTURES:
            folder, suffix, write = PICTURES[kind]
            path = out / folder / f"{stem}{suffix}"
            files.make_directory(path.parent)
            write(path, one)
    if "coco" in kinds:
        entry["coco"] = one.found.to_coco(one.picture.image_id, segmentation)
    if "csv" in kinds:
        entry["csv"] = [list(row.values()) for row in one.found.measurements()]
    if "gallery" in kinds:
        path = out / "gallery" / stem
        files.make_directory(path.parent)
        entry["gallery"] = gallery.write_picture(path, one.image, one.found, one.picture.name, one.truth)
    return entry


def is_entry(kinds, entry) -> bool:
    """Whether a line of a journal is as `write_picture` made it, or tells of a picture that was skipped."""
    fields = {"name": str, "skipped": str}
    if "skipped" not in entry:
        own = {"coco": list, "csv": list, "gallery": dict}
        fields = {"name": str, "stem": str, "objects": int, "notes": list} | {k: own[k] for k in own if k in kinds}
    if not all(type(entry.get(key)) is kind for key, kind in fields.items()):
        return False
    rows = entry.get("csv", [])
    if not all(type(row) is list for row in rows) or not all(type(note) is str for note in entry.get("notes", ())):
        return False
    try:
        for texts in ([entry["name"], entry.get("stem", "")], *rows):
            "".join(map(str, texts)).encode(errors="surrogateescape")
        return True
    except UnicodeEncodeError:  # of a lone surrogate
        return False


def write_tables(kinds, out, record, **page):
    """results.json, measurements.csv and gallery.html of all that the Journal `record` holds. page: as gallery.write_page."""
    if "coco" in kinds:
        with files.replacing(out / RESULTS) as part, open(part, "w", encoding="utf-8") as results:
            between = "["
            for entry in record.entries():
                for result in entry.get("coco", ()):
                    results.write(between + json.dumps(result))
                    between = ",\n"
            results.write("[]" if between == "[" else "]")
    if "csv" in kinds:
        # A file's name is written as it is, whatever its bytes.
        text = {"encoding": "utf-8", "errors": "surrogateescape", "newline": ""}
        with files.replacing(out / MEASUREMENTS) as part, open(part, "w", **text) as table:
            writer = csv.writer(table, lineterminator="\n")
            writer.writerow(["file", *formats.COLUMNS])
            for entry in record.entries():
                writer.writerows([entry["name"], *row] for row in entry.get("csv", ()))
    if "gallery" in kinds:
        found = (entry for entry in record.entries() if "gallery" in entry)
        rows = ((entry["name"], str(Path("gallery", entry["stem"])), entry["gallery"]) for entry in found)
        gallery.write_page(out / PAGE, rows, **page)


def written(kinds, out, sheet):
    """The folders and files in `out` that hold what was asked for."""
    folders = dict.fromkeys(PICTURES[kind][0] for kind in kinds if kind in PICTURES)
    return [out / name for name in (*folders, *(TABLES[kind] for kind in kinds if kind in TABLES), *([SHEET] if sheet else []))]
