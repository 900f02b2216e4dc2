"""Pictures whose pixels are numbers of objects: reading them, and the RLE of every number."""

from __future__ import annotations

import contextlib
import warnings

import numpy as np
from PIL import Image

from polarmask_tf import lite
from polarmask_tf.data import pictures, segmentation
from polarmask_tf.data.report import Report, Unusable
from polarmask_tf.data.sources.folder import Folder

MAX_OBJECTS = 100_000  # of one picture; a photo has more colors
FORMATS = ("PNG", "TIFF", "BMP", "GIF", "PPM")
_LOSSY = (".jpg", ".jpeg", ".jpe", ".jfif", ".webp")


def ids_of(folder: Folder, name: str, report: Report) -> np.ndarray:
    """The number of every pixel of a mask, [H, W] of an unsigned integer type or int64; 0 is background.

    Of palettes it is the index, of colors red, green and blue in one number. Unusable where a file is no such picture.
    """
    if name.lower().endswith(_LOSSY):
        raise Unusable("mask in a lossy format, which blurs the numbers: save it as PNG or TIFF")
    path = pictures.find(folder.root, name, False)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            lite.check_file(path, lite.MAX_IMAGE_BYTES)
            with open(path, "rb") as file, Image.open(lite.check_blocks(file), formats=FORMATS) as image:
                if image.width * image.height > lite.MAX_PIXELS:
                    raise Unusable(f"image of more than {lite.MAX_PIXELS // 10**6} megapixels")
                values = _numbers(image)
                with contextlib.suppress(Exception):  # n_frames would go through all
                    image.seek(1)
                    report.note("mask of several frames, of which the first is taken", name)
    except (Unusable, MemoryError):
        raise
    except Exception as error:  # Pillow's parsers fail in every way there is
        raise Unusable("corrupt or truncated mask, or not an image", lite.one_line(error)) from None
    if values.dtype.kind == "f" or values.dtype.kind == "i":
        if not ((values >= 0) & (values < 2**62) & (values == np.floor(values))).all():  # NaN is not
            raise Unusable("mask whose pixels are not whole numbers >= 0")
        values = values.astype(np.int64)
    return values


def _numbers(image):
    if image.mode in ("1", "L", "P", "F") or image.mode.startswith("I"):
        array = np.asarray(image)
        return array.astype(np.uint8) if array.dtype == bool else np.array(array)
    if image.mode in ("LA", "La"):
        return np.array(image)[..., 0]
    colors = np.asarray(image if image.mode == "RGB" else image.convert("RGBA").convert("RGB"))
    if (colors == colors[..., :1]).all():  # gray written as color
        return np.array(colors[..., 0])
    return packed_image(colors)


def packed(red, green, blue):
    return red << 16 | green << 8 | blue


def packed_image(colors: np.ndarray) -> np.ndarray:
    """`packed` of uint8 [H, W, 3] as int32, one channel after the other: of 50 megapixels three of int64 are a gigabyte."""
    ids = colors[..., 0].astype(np.int32)
    for channel in (1, 2):
        ids <<= 8
        ids |= colors[..., channel]
    return ids


def split_ids(ids: np.ndarray) -> dict[int, dict]:
    """{number: RLE} of every number but 0 in [H, W], ascending. Takes one pass, however many there are. Raises Unusable."""
    height, width = ids.shape
    flat = ids.ravel(order="F")
    starts = np.concatenate([[0], np.flatnonzero(flat[1:] != flat[:-1]) + 1])
    values, lengths = flat[starts], np.diff(np.append(starts, flat.size))
    kept = np.flatnonzero(values)
    order = kept[np.argsort(values[kept], kind="stable")]
    numbers, firsts = np.unique(values[order], return_index=True)
    if len(numbers) > MAX_OBJECTS:
        raise Unusable(f"mask of more than {MAX_OBJECTS:,} numbers or colors (is it a photo?)")
    found: dict[int, dict] = {}
    if not len(numbers):
        return found
    # Every object is traced in its box: noise, in which all boxes are as large as the picture, would take hours.
    boxes = _box_areas(starts[order], starts[order] + lengths[order], firsts, height).sum() / flat.size
    if boxes > 1000 or (boxes > 100 and len(order) > flat.size / 10):
        raise Unusable("mask whose numbers or colors lie scattered over the picture (is it a photo, or noise?)")
    for number, runs in zip(numbers.tolist(), np.split(order, firsts[1:]), strict=True):
        found[number] = segmentation.from_runs(starts[runs], starts[runs] + lengths[runs], height, width)
    return found


def _box_areas(starts, ends, firsts, height):
    """The areas of the boxes around groups of runs down the columns; a group begins at each of `firsts`."""
    left, right = starts // height, (ends - 1) // height
    several = right > left  # columns: a run that goes on in the next has both ends of a column
    top, bottom = np.where(several, 0, starts % height), np.where(several, height - 1, (ends - 1) % height)
    low, high = (np.minimum.reduceat(v, firsts) for v in (left, top)), (np.maximum.reduceat(v, firsts) for v in (right, bottom))
    return np.prod([b - a + 1.0 for a, b in zip(low, high, strict=True)], axis=0)
