"""Run an exported PolarMask .tflite file: an image in, polygons out, in pixels of that image.

This file stands alone (needs NumPy, Pillow, ai-edge-litert; no TensorFlow) and is copied beside every exported model:
    python lite.py model.tflite image.jpg      (or a folder of images)
    python lite.py model_raw.tflite image.jpg --accelerator gpu
Coordinates are continuous, x right, y down; pixel (0, 0) covers [0, 1) x [0, 1).
"""

import argparse
import contextlib
import hashlib
import io
import json
import os
import re
import stat
import sys
import tempfile
import warnings
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

FOUND = ("scores", "classes", "boxes", "polygons")
SHOWN = 0.3  # least score of what is printed and drawn, of a model that does not say it
MAX_SCORE = 1.5  # the most that a model with the released code's scores gives
FITS = ("letterbox", "stretch", "short_side")  # see fit_sizes
ACCELERATORS = ("cpu", "gpu")  # of LiteRT's CompiledModel
_JPEG, _PNG, _JP2, _J2K = b"\xff\xd8", b"\x89P", b"\0\0\0\x0c", b"\xff\x4f"  # how files begin
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_SIDES, _STRIPS = (256, 257), (273, 324)  # its tags: width and height, where its pixels are
_TAG_BYTES = (0, 1, 1, 2, 4, 8, 1, 1, 2, 4, 8, 4, 8, 4, 0, 0, 8, 8, 8)  # by type

# Bounds that no real data meets. What is beyond them is refused in one line, before it costs memory or time.
MAX_PIXELS = 120_000_000  # of an image, which is decoded whole
_CUT = "cut it into tiles, as `polarmask predict --tile 512` does by itself with TIFF files"
MAX_IMAGE_BYTES = 2**29  # of an image file
MAX_SCANS = 100  # of a progressive JPEG, each of which takes about as long as a whole picture
MAX_SLOW_PIXELS = 10_000_000  # of an image that Pillow decodes in Python: QOI, PPM with text or few levels, ...
MAX_SEGMENTS, MAX_CHUNKS = 500, 100_000  # of a JPEG before its pixels, of a PNG: Pillow goes through them in Python, ...
MAX_STRIPS, MAX_SUB_BLOCKS = 100_000, 5_000_000  # of a TIFF; of a GIF's first frame
MAX_HEADER_BYTES = 2**16  # ... and through a PPM's header byte by byte
MAX_MODEL_BYTES = 2**31  # of a .tflite file
MAX_METADATA_BYTES = 2**20
MAX_CLASSES, MAX_RAYS, MAX_DETECTIONS = 100_000, 3600, 100_000

_KINDS = {_JPEG: (2, "segments before its pixels", MAX_SEGMENTS), _PNG: (8, "chunks", MAX_CHUNKS)}
_KINDS |= {_JP2: (12, "boxes", MAX_CHUNKS), _J2K: (2, "segments before its pixels", MAX_CHUNKS)}

# Raster formats alone: for others, like PostScript, Pillow runs programs. The commonest first.
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "PPM", "TIFF", "WEBP", "JPEG2000", "TGA", "PCX", "SGI", "SUN", "DIB", "QOI", "AVIF")
_T = Image.Transpose
TURNS = {2: _T.FLIP_LEFT_RIGHT, 3: _T.ROTATE_180, 4: _T.FLIP_TOP_BOTTOM, 5: _T.TRANSPOSE}  # by EXIF orientation
TURNS |= {6: _T.ROTATE_270, 7: _T.TRANSVERSE, 8: _T.ROTATE_90}
_BACK = {**TURNS, 6: TURNS[8], 8: TURNS[6]}


def one_line(text, most=300):
    """What a file, path, server or exception says, fit to be printed: one line, no control characters, at most `most` long."""
    if isinstance(text, Exception):
        text = getattr(text, "strerror", None) or str(text) or type(text).__name__
    return "".join(c if c.isprintable() else "?" for c in " ".join(str(text).split()))[:most]


def check_file(path, most):
    """Raises ValueError or OSError unless path is a regular file of 1 to `most` bytes: a pipe or a device may never end."""
    entry = os.stat(path)
    if not stat.S_ISREG(entry.st_mode):
        raise ValueError("is a directory" if stat.S_ISDIR(entry.st_mode) else "not a regular file, but a pipe or a device")
    if not 0 < entry.st_size <= most:  # files of /proc say 0
        raise ValueError(f"{entry.st_size:,} bytes, and the limit is {most:,}" if entry.st_size else "is empty")


def orientation(image):
    """The EXIF orientation of a PIL.Image, 1 to 8; 1, upright, where there is none that can be read."""
    with contextlib.suppress(Exception):  # broken EXIF data make Pillow raise nearly any type
        return value if (value := image.getexif().get(0x0112)) in TURNS else 1
    return 1


def oriented(image):
    """A PIL.Image as viewers show it: turned and mirrored as its EXIF orientation says."""
    return image.transpose(TURNS[value]) if (value := orientation(image)) > 1 else image


def read_image(source, *, exif="ignore", bit_depth=None, notes=None):
    """Path, bytes, binary file or PIL.Image -> uint8 [height, width, 3] RGB; no alpha, of several frames the first.

    exif: "ignore", or "apply": turned as the EXIF orientation says (of a TIFF its own), and coordinates are those of the
    turned image. A PIL.Image of a TIFF is taken as it is: Pillow has turned it.
    bit_depth: 8 to 16, the bits that gray pixels of 16 or 32 bits (integers or floats) use, of which the upper 8 are taken:
    12 for values up to 4095 in 16-bit files. Default: 16, and floats are refused, as are those from 0 to 1 in any case. Nothing
    changes for 8-bit images.
    notes: a list to which what is worth knowing is added, in the same words for all images of a kind.
    Raises ValueError, in one line.
    """
    if exif not in ("ignore", "apply") or bit_depth not in (None, *range(8, 17)):
        raise ValueError(f"exif is {exif!r}, of 'ignore' and 'apply'; bit_depth is {bit_depth!r}, of 8 to 16")
    notes, is_path = [] if notes is None else notes, isinstance(source, (str, os.PathLike))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's opinion of odd EXIF data
            if is_path:
                check_file(source, MAX_IMAGE_BYTES)
                with open(source, "rb") as file:
                    return _decode(open_image(file), exif, bit_depth, notes)
            if isinstance(source, Image.Image):
                source.load()
            else:
                source = open_image(io.BytesIO(source) if isinstance(source, bytes) else source)
            return _decode(source, exif, bit_depth, notes)
    except Exception as error:  # broken files make Pillow's decoders raise nearly any type
        reason = f"cannot read the image: {one_line(error)}"
        if isinstance(error, Image.DecompressionBombError):  # whose text says less
            reason = f"cannot read the image: more than {MAX_PIXELS:,} pixels; {_CUT}"
        elif isinstance(error, (UnidentifiedImageError, KeyError)):  # KeyError: a format that this Pillow does not know
            reason = f"not an image that can be read: none of {', '.join(FORMATS)}"
        raise ValueError(f"{one_line(source) if is_path else 'the image'}: {reason}") from None


def open_image(file):
    """The PIL.Image of a binary file, of which only the header has been read. Raises what Pillow raises, and ValueError."""
    if not getattr(file, "seekable", lambda: True)():
        file = io.BytesIO(file.read(MAX_IMAGE_BYTES))
    image = Image.open(check_blocks(file), formats=FORMATS)
    if (pixels := image.width * image.height) > MAX_SLOW_PIXELS and any(part[0] in Image.DECODERS for part in image.tile):
        limit = f"the limit of this slow kind is {MAX_SLOW_PIXELS:,}"
        raise ValueError(f"{image.format} of {pixels:,} pixels, and {limit}; save it as PNG")
    if image.format in ("JPEG", "MPO"):
        file.seek(0)
        scans = sum(block.count(b"\xff\xda") for block in iter(lambda: file.read(2**20), b""))
        if scans > MAX_SCANS:
            raise ValueError(f"a JPEG of {scans} scans, and the limit is {MAX_SCANS}")
    return image


def check_blocks(file):
    """The binary file, to be opened; ValueError, or what Pillow raises, for so much beside its pixels that it takes minutes."""
    file.seek(0)
    head = file.read(4)
    if head[:1] == b"P" and head[1:2] in b"0123456fy":
        Image.open(io.BytesIO(head + file.read(MAX_HEADER_BYTES)), formats=("PPM",))
    elif head in _TIFF:
        _check_tags(file, head)
    elif head[:3] == b"GIF":
        _check_extensions(file)
    start, what, most = next((kind for mark, kind in _KINDS.items() if head.startswith(mark)), (0, "", 0))
    count, at = 0, start
    while at:
        file.seek(at)
        block = file.read(16)
        step = _step(head, block)
        if not step:
            break
        count, at = count + 1, at + step
        if count > most:
            raise ValueError(f"more than {most:,} {what}")
    file.seek(0)
    return file


def _step(head, block):
    """Bytes from the beginning of a block to that of the next one that Pillow goes through; 0 at the last."""
    if len(block) < 4:
        return 0
    if head.startswith(_PNG):
        return 12 + int.from_bytes(block[:4], "big")
    if head.startswith(_JP2):
        size = int.from_bytes(block[8:16] if block[:4] == b"\0\0\0\1" else block[:4], "big")
        return 8 if block[4:8] == b"jp2h" else 0 if block[4:8] == b"jp2c" or size < 8 else size
    last = 0xDA if head.startswith(_JPEG) else 0x90
    if block[0] != 0xFF or block[1] == last:
        return 0
    if block[1] in (0, 0xFF):  # filling
        return 1
    return 2 if block[1] == 1 or 0xD0 <= block[1] < 0xDA else 2 + int.from_bytes(block[2:4], "big")


def _check_tags(file, head):
    """Of the first two pages of a TIFF, which are opened: Pillow reads all tags, and makes an object of each strip or tile."""
    order, large = "little" if head[:1] == b"I" else "big", 43 in head[2:]
    wide, each = (8, 20) if large else (4, 12)
    most, at = file.seek(0, 2), wide
    for _ in range(2):
        file.seek(at)
        page = int.from_bytes(file.read(wide), order)
        if not 0 < page < most:
            break
        file.seek(page)
        number, total, sides, strips = int.from_bytes(file.read(8 if large else 2), order), 0, [], 0
        if number >= 2**16:
            raise ValueError(f"{number:,} tags")
        tags, at = file.read(number * each), page + (8 if large else 2) + number * each
        for first in range(0, len(tags) - each + 1, each):
            tag, kind, count = (int.from_bytes(tags[first + a : first + b], order) for a, b in ((0, 2), (2, 4), (4, 4 + wide)))
            size = _TAG_BYTES[kind] if kind < len(_TAG_BYTES) else 0
            total += count * size
            if tag in _SIDES:
                sides.append(int.from_bytes(tags[first + 4 + wide :][:size], order))
            strips = count if tag in _STRIPS else strips
        if strips > MAX_STRIPS:
            what = f"{strips:,} strips or tiles, and the limit is {MAX_STRIPS:,}"
            raise (Image.DecompressionBombError if np.prod(sides, dtype=float) > MAX_PIXELS else ValueError)(what)
        if total > most:
            raise ValueError("tags of more bytes than the file has")


def _check_extensions(file):
    """Of a GIF before its second frame: Pillow goes through blocks, and joins comments each time anew."""
    file.seek(10)
    colors, kind, count = file.read(3)[:1], b"", {b",": 0, b"!": 0}
    _skip_colors(file, colors)
    frames = 0
    while frames < 2 and (kind := file.read(1)) not in (b"", b";"):
        if kind == b",":
            frames += 1
            _skip_colors(file, file.read(9)[8:])
        file.seek(kind in (b",", b"!"), 1)  # the bits of a code, or what an extension is
        while kind in count and frames < 2 and (size := file.read(1)) not in (b"", b"\0"):
            count[kind] += 1
            file.seek(size[0], 1)
            if count[b"!"] > MAX_CHUNKS or count[b","] > MAX_SUB_BLOCKS:
                raise ValueError("more blocks than any picture has")
        count[b"!"] += kind != b","
        if count[b"!"] > MAX_CHUNKS:
            raise ValueError("more blocks than any picture has")


def _skip_colors(file, flags):
    if flags and flags[0] & 128:
        file.seek(6 << (flags[0] & 7), 1)


def _decode(image, exif, bit_depth, notes):
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"{image.width} x {image.height} pixels, and the limit is {MAX_PIXELS:,} in all; {_CUT}")
    gray = image.mode == "F" or image.mode.startswith("I")
    deep_colors = not gray and ";16" in str(getattr(image, "tile", ""))
    if bit_depth not in (None, 16) and deep_colors:
        raise ValueError("16-bit colors, and a bit depth is of gray alone; save it with 8 bits")
    if image.mode == "F" and bit_depth is None:
        raise ValueError("floating-point pixels; give the bits of their range as bit depth, or save it with 8 or 16 bits")
    turn = orientation(image) if image.format == "TIFF" else 1  # which Pillow turns when it loads it
    image.load()  # before a PNG is asked: that loads it too, and no error comes of loading it a second time
    turned = turn > 1 and orientation(image) == 1
    turn = turn if turned else orientation(image)
    if exif == "apply":
        image = image if turned else oriented(image)
    elif turn > 1:
        image = image.transpose(_BACK[turn]) if turned else image
        notes.append("EXIF orientation ignored")
    pixels = np.empty((image.height, image.width, 3), np.uint8)
    rows, most = max(1, 2**22 // image.width), 0
    for top in range(0, image.height, rows):  # in strips: a copy of a whole picture is large
        part = image.crop((0, top, image.width, min(top + rows, image.height)))
        if gray:
            values = np.asarray(part)
            low, most = values.min(), max(most, values.max())
            if not 0 <= low <= values.max() < 2 ** (bit_depth or 16):  # NaN is not
                raise ValueError(f"pixels from {low:g} to {values.max():g}, beyond the {bit_depth or 16} bits of the bit depth")
            pixels[top : top + rows] = (values.astype(np.uint16) >> (bit_depth or 16) - 8)[..., np.newaxis]
        else:
            pixels[top : top + rows] = part if part.mode == "RGB" else part.convert("RGB")
    if image.mode == "F" and 0 < most <= 1:
        raise ValueError("floating-point pixels from 0 to 1, where a bit depth is of whole numbers; save it with 8 or 16 bits")
    notes += few_levels(most if gray else 256 * int(pixels.max()) if deep_colors else 2**16, bit_depth or 16, gray)
    return pixels


def few_levels(most, bits, gray):
    """A note where values up to `most`, of which 2**bits are possible, leave few of the 256 levels of a pixel, or none."""
    if not gray:
        return ["16-bit colors of at most 12 bits: few levels are left; save it with 8 bits"] if most < 4096 else []
    if 0 < most < 2 ** (bits - 8):
        advice = "--bit-depth 8 keeps it" if most < 256 else "a lower --bit-depth keeps it"
        return [f"gray of at most {bits - 8} bits where {bits} are expected: all of it becomes black; {advice}"]
    few = "gray of at most 12 bits in 16: few gray levels are left; --bit-depth 12 keeps more"
    return [few] if bits == 16 and 0 < most < 4096 else []


def check_image(image):
    """Raises ValueError unless image is a uint8 array [height, width, 3] of at least one pixel."""
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.shape[2:] != (3,) or not image.size:
        got = f"{image.dtype} {list(image.shape)}" if isinstance(image, np.ndarray) else type(image).__name__
        raise ValueError(f"an image must be a uint8 array [height, width, 3] in RGB with pixels in it, not {got}")


def fit_sizes(height, width, size, fit="letterbox"):
    """How an image meets the network: its size after resizing, and that of the canvas it lies on, both (height, width).

    fit: "letterbox" (as large as `size` allows, its ratio kept), "stretch" (exactly `size`), or "short_side" (its ratio kept,
    shorter side size[0], longer side at most size[1], on a canvas of multiples of 32).
    """
    if fit == "short_side":
        scale = min(size[0] / min(height, width), size[1] / max(height, width))
    else:
        scale = min(size[0] / height, size[1] / width)
    resized = tuple(max(1, round(side * scale)) for side in (height, width))
    if fit == "short_side":
        return resized, tuple(-(-side // 32) * 32 for side in resized)
    return (tuple(size) if fit == "stretch" else resized), tuple(size)


def place(image, resized_size, canvas_size):
    """Image resized to `resized_size`, top left in zeros of `canvas_size`; and the factors (x, y) back to its pixels."""
    canvas = np.zeros((*canvas_size, 3), np.uint8)
    resized = Image.fromarray(image).resize(resized_size[::-1], Image.Resampling.BILINEAR)
    canvas[: resized_size[0], : resized_size[1]] = resized
    return canvas, (image.shape[1] / resized_size[1], image.shape[0] / resized_size[0])


def letterbox(image, height, width, stretch=False):
    """Fit a uint8 [h, w, 3] image into [height, width, 3], its ratio kept, or lost if `stretch`; see `place`."""
    return place(image, *fit_sizes(*image.shape[:2], (height, width), "stretch" if stretch else "letterbox"))


def read_metadata(path):
    """metadata.json at the end of a .tflite file, checked; the network must have the checksum that it gives, if any."""
    check_file(path, MAX_MODEL_BYTES)
    with open(path, "rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - 2 * MAX_METADATA_BYTES))
        end = io.BytesIO(file.read())
    with zipfile.ZipFile(end) as archive:
        member = archive.getinfo("metadata.json")
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # of others reading has no bound
            raise ValueError("metadata.json is compressed in another way than deflate")
        with archive.open(member) as file:
            text = file.read(MAX_METADATA_BYTES + 1)
    if max(member.file_size, len(text)) > MAX_METADATA_BYTES:
        raise ValueError(f"metadata.json is larger than {MAX_METADATA_BYTES:,} bytes")
    metadata = check_metadata(json.loads(text), "metadata.json")
    digest = metadata.get("flatbuffer_sha256")
    if "flatbuffer_sha256" in metadata and flatbuffer_digest(path, metadata["flatbuffer_bytes"]) != digest:
        raise ValueError("the network is not what the checksum in metadata.json is of")
    return metadata


def flatbuffer_digest(path, size):
    """SHA-256, in hexadecimal, of a file's first `size` bytes: of a .tflite without the zip behind it."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while size > 0 and (block := file.read(min(size, 2**20))):
            digest.update(block)
            size -= len(block)
    return digest.hexdigest()


def check_metadata(metadata, where):
    """The content of metadata.json, as it is; ValueError that begins with `where` unless all is as the export writes it.

    May be missing: "rays", "max_detections", "raw", "input"."resize" (letterbox) and "bit_depth" (that read_image is to take),
    "thresholds" (see shown_scores), and the checksum of a .tflite file, "flatbuffer_bytes" and "flatbuffer_sha256", see
    flatbuffer_digest.
    """

    def number(entry, key, least, most, kind=int):
        if type(entry[key]) not in (int, kind) or not least <= entry[key] <= most:
            raise ValueError(f"{key} is {one_line(repr(entry[key]), 40)}, not of {least} to {most}")

    try:
        classes, size, raw = metadata["classes"], metadata["input"], metadata.get("raw")
        if metadata.get("format", "polarmask_tf/1") != "polarmask_tf/1" or size.get("resize", FITS[0]) not in FITS:
            raise ValueError("it is of another version")
        if not all(type(entry["name"]) is str for entry in classes) or not 0 < len(classes) <= MAX_CLASSES:
            raise ValueError("it names no classes")
        for entry in classes:
            number(entry, "category_id", -(2**63), 2**63 - 1)
        if len({entry["category_id"] for entry in classes}) < len(classes):
            raise ValueError("a category_id is given twice")
        for side in ("height", "width"):
            number(size, side, 1, 2**15)
        optional = ((metadata, "rays", 1, MAX_RAYS), (metadata, "max_detections", 1, MAX_DETECTIONS))
        for entry, key, least, most in ((size, "bit_depth", 8, 16), *optional):
            if key in entry:
                number(entry, key, least, most)
        if "thresholds" in metadata:
            overall, each = (metadata["thresholds"][key] for key in ("overall", "classes"))
            for score in (overall, *each):
                number({"a threshold": score}, "a threshold", 0, MAX_SCORE, float)
            if type(each) is not list or len(each) != len(classes):
                raise ValueError("thresholds has not one for each class")
        number({"cpu_only": False, **metadata}, "cpu_only", 0, 1, bool)
        if "flatbuffer_sha256" in metadata:
            number(metadata, "flatbuffer_bytes", 1, MAX_MODEL_BYTES)
        if raw is not None:
            for level in raw["ray_units"]:
                number({"level": int(level)}, "level", 1, 10)
                number(raw["ray_units"], level, 0, 2**15, float)
            number(raw, "candidates", 1, 10**9)
            number(raw, "max_detections", 1, MAX_DETECTIONS)
            number(raw, "multi_label", 0, 1, bool)
            for key, most in (("ray_limit", 50), ("score_threshold", 10), ("nms_iou", 1)):
                number(raw, key, 0, most, float)
            number({"temperature": 1.0, **raw}, "temperature", 0.01, 100, float)
            number({"score_bias": 0.0, **raw}, "score_bias", -50, 50, float)
            number({"voting_iou": 0.0, **raw}, "voting_iou", 0, 1, float)
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else one_line(error)
        raise ValueError(f"{one_line(where)} is not what `polarmask export` writes: {reason}") from None
    return metadata


def shown_scores(metadata):
    """Least score of what is worth showing, of each class: those of best F1 that `polarmask evaluate` found, else SHOWN."""
    return metadata["thresholds"]["classes"] if "thresholds" in metadata else [SHOWN] * len(metadata["classes"])


def assemble(heads, raw, size):
    """From a --raw file's outputs to those of the other files: postprocess.detect in NumPy, for an image of `size`."""
    limit, one, parts = np.float32(size[::-1]), np.float32(1), []
    for level, unit in raw["ray_units"].items():
        logits, centerness, rays = (heads[f"P{level}_{name}"][0] for name in ("classes", "centerness", "rays"))
        (_, w, c), n, pairs = logits.shape, rays.shape[-1], raw["multi_label"]
        every = logits.reshape(-1, c)
        logits = every if pairs else every.max(1, keepdims=True)
        scores = (one / (one + np.exp(-logits)) / (one + np.exp(-centerness.reshape(-1, 1)))).ravel()
        best = np.argsort(-scores, kind="stable")[: raw["candidates"]]
        where, classes = np.divmod(best, c) if pairs else (best, every[best].argmax(1))
        centers = np.float32(2 ** int(level)) * (np.float32([where % w, where // w]).T[:, None] + np.float32(0.5))
        reach = np.float32(unit) * np.exp(np.clip(rays.reshape(-1, n)[where], -raw["ray_limit"], raw["ray_limit"]))
        ways = np.float32([[f(2 * np.pi * k / n) for f in (np.cos, np.sin)] for k in range(n)])
        parts.append((scores[best], classes, centers, reach))
    scores, classes, centers, reach = (np.concatenate(part) for part in zip(*parts, strict=True))
    polygons = np.clip(centers + reach[..., None] * ways, 0, limit)
    boxes = np.concatenate([polygons.min(1), polygons.max(1)], 1)
    low, high = np.split(boxes + np.float32(classes[:, None] * (limit.max() + 1)), 2, 1)  # no two classes overlap
    area, kept, order = (high - low).prod(1), [], np.argsort(-scores, kind="stable")
    for i in (i for i in order if scores[i] > raw["score_threshold"]):
        if len(kept) == raw["max_detections"]:
            break
        common = np.maximum(np.minimum(high[kept], high[i]) - np.maximum(low[kept], low[i]), 0).prod(1)
        if not (common > raw["nms_iou"] * (area[kept] + area[i] - common)).any():
            kept.append(i)
    if kept and raw.get("voting_iou", 0):
        iou, groups = np.float32(raw["voting_iou"]), np.array_split(kept, len(kept) // 1000 + 1)  # each of bounded memory
        voted = [vote(scores, centers[:, 0], reach, low, high, group, iou, ways, order) for group in groups]
        reach[kept] = np.concatenate(voted)
        polygons[kept] = np.clip(centers[kept] + reach[kept, :, None] * ways, 0, limit)
        boxes[kept] = np.concatenate([polygons[kept].min(1), polygons[kept].max(1)], 1)
    temperature, bias = raw.get("temperature", 1), raw.get("score_bias", 0)
    if (temperature, bias) != (1, 0):  # of calibrated scores
        scores = np.clip(scores, 1e-6, 1 - 1e-6)
        scores = one / (one + np.exp((np.log(one - scores) - np.log(scores)) / np.float32(temperature) - np.float32(bias)))
    found = (scores, classes, boxes[:, [1, 0, 3, 2]] / np.tile(limit[::-1], 2), polygons / limit)
    return {"num_detections": [len(kept)], **{f"detection_{n}": x[kept][None] for n, x in zip(FOUND, found, strict=True)}}


def vote(scores, centers, reach, low, high, kept, iou, ways, order):
    """Rays [N, n] of the kept, averaged with those whose boxes, `low` to `high`, overlap more than `iou`, as in the graph.

    order: of all, the best first.
    """
    n, low, high = reach.shape[1], low[order], high[order]
    area, voters, weights = (high - low).prod(1), np.zeros((len(kept), 4), int), np.zeros((len(kept), 4), np.float32)
    for row, i in enumerate(np.argsort(order)[kept]):
        common = np.maximum(np.minimum(high[i], high) - np.maximum(low[i], low), 0).prod(1)
        best = order[np.flatnonzero(common > (area + area[i]) * (iou / (1 + iou)))[:4]]
        voters[row, : len(best)], weights[row, : len(best)] = best, scores[best]
    weights /= np.maximum(weights.sum(1, keepdims=True), np.float32(1e-12))
    shift, length = (centers[kept, None] - centers[voters])[:, :, None], reach[kept][:, None].repeat(voters.shape[1], 1)
    for _ in range(2):  # Newton's method: where the ray meets the line of the side of the voter's polygon that it points to
        x, y = np.moveaxis(shift + length[..., None] * ways, -1, 0)
        first = np.floor(np.arctan2(y, x) * np.float32(n / (2 * np.pi))).astype(int) % n
        start, end = (reach[voters[:, :, None], side][..., None] * ways[side] for side in (first, (first + 1) % n))
        along, start = end - start, start - shift
        across = ways[:, 0] * along[..., 1] - ways[:, 1] * along[..., 0]
        meets = (start[..., 0] * along[..., 1] - start[..., 1] * along[..., 0]) / np.where(
            abs(across) > 1e-6, across, np.float32(1e-6)
        )
        length = np.where((meets > length / 2) & (meets < 2 * length), meets, length)
    return (length * weights[..., None]).sum(1) + reach[kept] * (1 - weights.sum(1, keepdims=True))


def check_outputs(outputs, metadata, batch=1):
    """A model's outputs for a batch, as arrays by name; ValueError where they are not as exports/README.md and metadata say."""
    names = ["num_detections", *(f"detection_{name}" for name in FOUND)]
    if missing := [name for name in names if name not in outputs]:
        what = (
            ", and metadata.json has no `raw`, by which lite.py makes polygons of a raw file"
            if any(name.endswith("_rays") for name in outputs)
            else ""
        )
        raise ValueError(f"no output {missing[0]}{what}")
    whole = ("num_detections", "detection_classes")
    arrays = {name: np.asarray(outputs[name], np.int32 if name in whole else np.float32) for name in names}
    count, scores, classes, boxes, polygons = arrays.values()
    most = scores.shape[-1] if scores.ndim else 0
    rays = metadata.get("rays", polygons.shape[2] if polygons.ndim == 4 else 0)
    shapes = [(batch,), (batch, most), (batch, most), (batch, most, 4), (batch, most, rays, 2)]
    for name, shape in zip(names, shapes, strict=True):
        if arrays[name].shape != shape:
            raise ValueError(f"{name} is {list(arrays[name].shape)}, expected {list(shape)}")
    if not ((count >= 0) & (count <= most)).all() or most > metadata.get("max_detections", MAX_DETECTIONS):
        raise ValueError("more detections than there may be")
    if not ((classes >= 0) & (classes < len(metadata["classes"]))).all():
        raise ValueError(f"a class beyond the {len(metadata['classes'])} that metadata.json names")
    if not all(np.isfinite(array).all() for array in (scores, boxes, polygons)):
        raise ValueError("a number that is not finite")
    return arrays


def unpack(outputs, row, scale_x, scale_y, height, width):
    """Row `row`'s valid detections, of coordinates times (scale_x, scale_y), clipped to [0, width] x [0, height]."""
    scores, classes, boxes, polygons = (outputs[f"detection_{n}"][row][: int(outputs["num_detections"][row])] for n in FOUND)
    boxes = np.clip(boxes[:, [1, 0, 3, 2]] * np.float32([scale_x, scale_y] * 2), 0, np.float32([width, height] * 2))
    polygons = np.clip(polygons * np.float32([scale_x, scale_y]), 0, np.float32([width, height]))
    return {"scores": np.array(scores), "classes": np.array(classes, np.int32), "boxes": boxes, "polygons": polygons}


class NoAccelerator(ValueError):
    """What --accelerator asks for is not on this machine."""


@contextlib.contextmanager
def _kept_log():
    """What is written to stdout and stderr within it, in a binary file: LiteRT says in tens of lines what it does, on both."""
    sys.stdout.flush()
    sys.stderr.flush()
    with tempfile.TemporaryFile() as log, contextlib.ExitStack() as undo:
        for stream in (1, 2):
            with contextlib.suppress(OSError):  # of one that is closed
                kept = os.dup(stream)
                undo.callback(os.close, kept)
                undo.callback(os.dup2, kept, stream)
                os.dup2(log.fileno(), stream)
        yield log


def _compiled(path, accelerator, threads):
    """A .tflite file on LiteRT's CompiledModel: run(images=uint8 [1, h, w, 3]) -> outputs by name; the shape of its input;
    and which part of it runs where. Raises NoAccelerator where there is none."""
    try:
        from ai_edge_litert.compiled_model import CompiledModel, CpuOptions, GpuOptions, HardwareAccelerator, Options
    except ImportError:
        raise NoAccelerator("--accelerator needs ai-edge-litert 2.3: pip install -U ai-edge-litert") from None

    def load(on):
        # In float32: left to itself a GPU may compute in halves, to which far corners and classes apart for NMS are lost.
        return CompiledModel.from_file(str(path), options=Options(on, CpuOptions(threads), GpuOptions(enforce_f32=True)))

    cpu, gpu = HardwareAccelerator.CPU, HardwareAccelerator.GPU
    with _kept_log() as log:
        try:
            model = load(cpu | gpu if accelerator == "gpu" else cpu)
        except RuntimeError:
            model = load(cpu)  # if it is the file that is wrong, this fails too
        outputs = model.get_signature_list()["serving_default"]["outputs"]
        takes = model.get_input_tensor_details("serving_default")["images"]
        gives = model.get_output_tensor_details("serving_default")
        if takes["dtype"] != "uint8":
            raise ValueError(f"the network takes {takes['dtype']}, and an image is uint8")
        given, made = model.create_input_buffers(0), model.create_output_buffers(0)
        given[0].write(np.zeros(takes["shape"], np.uint8))  # which says something at first, too
        with contextlib.suppress(RuntimeError):  # the log has what a GPU does not compute, error or not; a CPU's comes again
            model.run_by_index(0, given, made)
        log.seek(0)
        said = log.read().decode(errors="replace")

    def run(images):
        given[0].write(images)
        model.run_by_index(0, given, made)
        arrays = {}
        for name, buffer in zip(outputs, made, strict=True):
            shape, dtype = gives[name]["shape"], np.dtype(gives[name]["dtype"])
            arrays[name] = buffer.read(int(np.prod(shape)), dtype).reshape(shape)
        return arrays

    return run, list(takes["shape"]), _place_of(model, said) if accelerator == "gpu" else "network on the CPU"


def _place_of(model, said):
    """Where a CompiledModel that was to run on the GPU runs, of which LiteRT knows little; `said` is its log."""
    share = re.search(r"(\d+) operations will run on the GPU, and the remaining (\d+)", said)
    # The one trace there: from which memory the input is taken. 1 is the host's, also for int8 files that run on the GPU.
    if not share and set(model.get_input_buffer_requirements(0)["supported_types"]) == {1}:
        reason = re.search(r"Couldn't load .*|GPU accelerator could not be .*|No adapters.*", said)
        why = f" ({one_line(reason[0], 150)})" if reason else ""
        raise NoAccelerator(f"LiteRT finds no GPU that it can use{why}; run it without --accelerator gpu")
    if wrong := re.search(r"Validation error: .*|Failed to invoke", said):
        raise NoAccelerator(f"LiteRT's GPU does not compute it ({one_line(wrong[0], 150)}); run it without --accelerator gpu")
    adapter = re.search(r"adapter: (.*?), ", said)
    where = f"network on the GPU{f' ({one_line(adapter[1], 60)})' if adapter else ''}: "
    part = f"{share[1]} of {int(share[1]) + int(share[2])} operations" if share else "not every operation"
    return where + ("every operation" if not share and model.is_fully_accelerated() else f"{part}, the others on the CPU")


class PolarMaskLite:
    """model(image) -> {"scores" [M] descending, "classes" [M] int, "boxes" [M, 4], "polygons" [M, rays, 2]}.

    Boxes are xmin, ymin, xmax, ymax, polygons x, y, in pixels of the image passed in, clipped to it: a uint8 RGB array
    [h, w, 3] of any size, or what read_image takes; then `options` are its. labels[classes[i]] is the i-th name.
    accelerator: of ACCELERATORS, to run by LiteRT's CompiledModel on the CPU, or on the GPU and, of what that does not take, on
    the CPU; default: by its Interpreter, on the CPU. runs_on says in a line which part runs where.
    Raises ValueError, in one line.
    """

    def __init__(self, path, threads=1, accelerator=None):
        if accelerator not in (None, *ACCELERATORS):
            raise ValueError(f"accelerator is {accelerator!r}, of {', '.join(ACCELERATORS)}")
        from ai_edge_litert.interpreter import Interpreter

        try:
            self.metadata = read_metadata(path)
            self.classes = self.metadata["classes"]
            self.labels = [entry["name"] for entry in self.classes]
            self.input_size = self.metadata["input"]["height"], self.metadata["input"]["width"]
            self._fit = self.metadata["input"].get("resize", FITS[0])
            if self._fit not in FITS[:2]:
                raise ValueError(f"metadata.json says {self._fit}, and a .tflite file has one input size")
            if accelerator == "gpu" and self.metadata.get("cpu_only"):
                raise NoAccelerator("on a GPU its box branch gives other polygons; run it without --accelerator gpu")
            if accelerator:
                self._run, takes, self.runs_on = _compiled(path, accelerator, threads)
            else:
                self._run = Interpreter(model_path=str(path), num_threads=threads).get_signature_runner("serving_default")
                takes, self.runs_on = self._run.get_input_details()["images"]["shape"].tolist(), "network on the CPU"
            if (shape := [1, *self.input_size, 3]) != takes:
                raise ValueError(f"the network takes {takes}, and metadata.json says {shape}")
            if self.metadata.get("raw"):
                self.runs_on += "; polygons on the CPU (NumPy)"
            self(np.zeros(shape[1:], np.uint8))  # a damaged network shows here
        except NoAccelerator as error:
            raise ValueError(f"{one_line(path)}: {error}") from None
        except Exception as error:  # broken files make zipfile and LiteRT raise nearly any type
            what = "no .tflite file with metadata.json, or damaged; export it again"
            raise ValueError(f"{one_line(path)}: {what}: {one_line(error)}") from None

    def __call__(self, image, **options):
        options = {"bit_depth": self.metadata["input"].get("bit_depth"), **options}
        image = image if isinstance(image, np.ndarray) else read_image(image, **options)
        check_image(image)
        canvas, (x, y) = place(image, *fit_sizes(*image.shape[:2], self.input_size, self._fit))
        outputs, raw = self._run(images=canvas[None]), self.metadata.get("raw")
        outputs = check_outputs(assemble(outputs, raw, self.input_size) if raw else outputs, self.metadata)
        return unpack(outputs, 0, canvas.shape[1] * x, canvas.shape[0] * y, *image.shape[:2])


def main(argv=None):
    """Print label, score, box and polygon, one line a detection; of a folder, the file's name before them."""
    parser = argparse.ArgumentParser(description="Polygons in an image, by an exported PolarMask .tflite file.")
    parser.add_argument("model", help="the .tflite file")
    parser.add_argument("image", type=Path, help="any image that Pillow reads, or a folder of images")
    parser.add_argument("--score", type=float, help=f"least score to print (default: the model's own, or {SHOWN})")
    parser.add_argument("--exif", choices=("ignore", "apply"), default="ignore", help="turn images as their EXIF data say")
    text = "that 16-bit gray images use, 8 to 16 (default: the model's, or 16)"
    parser.add_argument("--bit-depth", type=int, choices=range(8, 17), metavar="BITS", help=text)
    text = "run by LiteRT's CompiledModel there, and say which part ran where (default: by its Interpreter, on the CPU)"
    parser.add_argument("--accelerator", choices=ACCELERATORS, help=text)
    parser.print_usage = lambda *_: None  # an error is one line
    args = parser.parse_args(argv)
    if args.score is not None and not 0 <= args.score <= MAX_SCORE:
        parser.error(f"--score {args.score:g}: a number from 0 to 1.5 is needed")
    folder, status, model, said = os.path.isdir(args.image), 0, None, set()
    paths = sorted(args.image.glob("*")) if folder else [args.image]  # of what may not be read: none
    if not paths:
        parser.error(f"{one_line(args.image)}: no file in it")
    for path in paths:
        try:
            if model is None:
                model = PolarMaskLite(args.model, accelerator=args.accelerator)
                if args.accelerator:
                    print(model.runs_on, file=sys.stderr)
            notes, depth = [], {} if args.bit_depth is None else {"bit_depth": args.bit_depth}
            found = model(path, exif=args.exif, notes=notes, **depth)
        except (ImportError, ValueError) as error:  # of a folder the other images are read
            print(f"error: {error}{': pip install ai-edge-litert' * isinstance(error, ImportError)}", file=sys.stderr)
            status = 2
            if model is None:  # which is what is wrong, with every image
                break
            continue
        for note in sorted({*notes} - said):  # of a folder once
            print(f"note: {one_line(path.name)}: {note}", file=sys.stderr)
        said.update(notes)
        least = shown_scores(model.metadata) if args.score is None else [args.score] * len(model.labels)
        for score, label, box, polygon in zip(*(found[name] for name in FOUND), strict=True):
            if score >= least[label]:
                numbers = (*(f"{v:.1f}" for v in box), "polygon", *(f"{x:.1f},{y:.1f}" for x, y in polygon))
                print(*[one_line(path.name)] * folder, one_line(model.labels[label]), f"{score:.3f} box", *numbers)
    return status


def script():
    """main as a program: whoever reads its output may go away, like `head`; a full disk is an error in one line."""
    try:
        status = main()
        print(end="", flush=True)
        return status
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is left in the buffer would fail again
        if isinstance(error, BrokenPipeError):
            return 0
        print(f"error: the output cannot be written: {one_line(error)}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(script())
