"""What every reader of a format returns, and what they share: reading JSON, names of classes, making ids."""

from __future__ import annotations

import codecs
import collections
import contextlib
import json
import os
import typing
from pathlib import Path

from polarmask_tf.data.report import Report, Unusable
from polarmask_tf.errors import InputError, nfc
from polarmask_tf.files import io_error_text, read_file
from polarmask_tf.lite import MAX_PIXELS

MOST_BYTES = 10 * 2**30  # of one file of annotations
BOX = "annotation without segmentation"  # as of a COCO annotation that is a box alone
LINE = "point or line, which has no outline"
RECTANGLE = "rectangle taken as the outline of its object"
ONE_CLASS = "object"  # the class of formats, and of files, that name none

# Names of folders and files that say which part of a data set they are.
SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


class Source(typing.NamedTuple):
    """A set as it was read: `images` and `classes` as coco.read returns them; their `file_name`s are relative to `folder`.

    An annotation without a key "area" has that of its mask. Coordinates of an image with "as_shown" are those of the picture as
    viewers show it, also where its size does not tell (pictures.stored). `split` is what the set calls itself: "train", "val",
    "test", or "" where it says nothing.
    """

    path: Path
    format: str
    images: list[dict]
    classes: list[dict]
    folder: Path
    split: str = ""


class Builder:
    """Collects the images and annotations of a format that has no ids: they get 1, 2, 3, ... in the order of adding."""

    def __init__(self, most_pixels: int = MAX_PIXELS, as_shown: bool = True):
        self.most_pixels = most_pixels  # of an image
        self._as_shown = as_shown  # by programs, which turn photos as their EXIF data say
        self.images: list[dict] = []
        self._seen: set[str] = set()
        self._annotations = 0

    def image(self, file_name: str, size: tuple[int, int]) -> dict:
        """A new image; `size` is (width, height). Unusable if the file is there already."""
        if file_name in self._seen:
            raise Unusable("image that is listed twice")
        if size[0] * size[1] > self.most_pixels:
            raise Unusable(f"image of more than {self.most_pixels // 10**6} megapixels")
        self._seen.add(file_name)
        entry = {"id": len(self.images) + 1, "file_name": file_name, "height": size[1], "width": size[0], "annotations": []}
        entry["as_shown"] = self._as_shown
        self.images.append(entry)
        return entry

    def add(self, image: dict, class_name: str, segmentation) -> None:
        self._annotations += 1
        entry = {"id": self._annotations, "iscrowd": 0, "class": class_name, "segmentation": segmentation}
        image["annotations"].append(entry)

    def finish(self, names: typing.Iterable[str] | None = None, first_id: int = 1) -> tuple[list[dict], list[dict]]:
        """(images, classes). Classes are `names` in their order, or those of the annotations by alphabet; ids from `first_id`.

        By alphabet, so that two folders with the same classes, converted apart, have the same ids.
        """
        used = sorted({a["class"] for image in self.images for a in image["annotations"]})
        names = list(dict.fromkeys([*(names if names is not None else []), *used])) or [ONE_CLASS]
        label_of = {name: label for label, name in enumerate(names)}
        for image in self.images:
            for annotation in image["annotations"]:
                annotation["label"] = label_of[annotation.pop("class")]
        return self.images, [{"name": name, "category_id": first_id + label} for label, name in enumerate(names)]


@contextlib.contextmanager
def well_formed(what: str = "annotation"):
    """Turns what goes wrong in reading a value of unexpected shape into Unusable."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError):
        raise Unusable(f"malformed {what}") from None


def class_name(value) -> str:
    """The name of a class; Unusable unless it is text that can be stored."""
    name = nfc(value.strip()) if isinstance(value, str) else value
    if isinstance(name, int) and not isinstance(name, bool):
        name = str(name)
    if not isinstance(name, str) or not name:
        raise Unusable("annotation without a class")
    with well_formed("class name"):
        name.encode()
    return name


def text_of(data: bytes) -> str:
    """UTF-8, or what a byte order mark says it is: tools of Windows write UTF-16. Raises ValueError."""
    if data.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return data.decode("utf-32")
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return data.decode("utf-16")
    return data.decode("utf-8-sig")


def load_json(path: Path, give: str = "give the file, or the folder, with the annotations"):
    """The content of a JSON file; InputError where it cannot be had."""
    if os.path.isdir(path):
        raise InputError(f"{path}: is a directory; {give}")
    try:
        return json.loads(read_file(path, MOST_BYTES), object_pairs_hook=each_key_once)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; {give}") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {io_error_text(error)}; {give}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON ({error}); {give}") from None
    except MemoryError:
        raise InputError(f"{path}: does not fit into memory; split it") from None


def each_key_once(pairs: list[tuple]) -> dict:
    """An object of a JSON file, for json.loads: of a key that stands twice Python would lose the first value, unsaid."""
    found = dict(pairs)
    if len(found) < len(pairs):
        key, _ = collections.Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"the key {key!r} stands twice in one object")
    return found


def skip_image(report: Report, reason: Unusable, where: str, annotations: int) -> None:
    """Counts an image that is left out, and with it its annotations."""
    report.skip(reason, where)
    if annotations:
        report.skip_object("annotation of a skipped image", where, annotations)
