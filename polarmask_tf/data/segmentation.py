"""One annotation's segmentation, as COCO spells it, to its mask and its outline. Nothing in it is trusted."""

import math
import struct
import zlib

import numpy as np
from pycocotools import mask as coco_mask

from polarmask_tf.data import contours
from polarmask_tf.data.report import Unusable

# Bounds that no annotation of a real picture meets, so that a few bytes of JSON cannot cost minutes or gigabytes.
MAX_VERTICES, MAX_PARTS = 100_000, 10_000  # of one annotation: seconds of simplification, and of merging
MAX_RUNS = 5_000_000  # of an RLE: 60 bytes each
RELATIVE = "polygon within the first pixel (are its coordinates fractions of width and height?)"
MANY_VERTICES = f"polygon of more than {MAX_VERTICES:,} vertices or {MAX_PARTS:,} parts"
MANY_RUNS = f"RLE of more than {MAX_RUNS:,} runs"
_LONGEST_OUTLINE = 4_000_000  # pixels, of one annotation; pycocotools takes 40 bytes for each
# How far the boundary of a traced mask may move, in pixels, while its staircase turns into lines.
_STAIRCASE = 0.35


def region(
    segmentation, height: int, width: int, max_edges: int, *, coarse: bool = False
) -> tuple[dict, list[np.ndarray], float, bool]:
    """The mask and the rings of one annotation's segmentation.

    Returns the mask as `to_rle` gives it; the rings, float64 [V, 2] in pixels, with at most `max_edges` vertices in all;
    their IoU with the original; and whether a degenerate part was left out. Polygons are kept as they are, also beyond the
    border, unless they have too many vertices; of masks it is `outline`, where `coarse` is for what training only ignores.
    Raises Unusable.
    """
    if isinstance(segmentation, list):
        parts, rings = polygons(segmentation, height, width)
        simple, iou = simplified(rings, max_edges)
        return _rasterized(parts, height, width), simple, iou, len(rings) < len(segmentation)
    rle = to_rle(segmentation, height, width)
    if not coco_mask.area(rle):
        raise Unusable("empty mask")
    x, y, w, h = (int(v) for v in coco_mask.toBbox(rle))
    rings, iou = outline(columns(rle, x, x + w)[:, y : y + h].T, max_edges, coarse=coarse)
    return rle, [ring + np.array([x, y]) for ring in rings], iou, False


def to_rle(segmentation, height: int, width: int) -> dict:
    """The compressed RLE of a segmentation in any of its forms, as pycocotools' annToRLE makes it. Raises Unusable."""
    if isinstance(segmentation, list):
        return _rasterized(polygons(segmentation, height, width)[0], height, width)
    if isinstance(segmentation, dict):
        return _checked_rle(segmentation, height, width)
    raise Unusable("annotation without segmentation" if segmentation is None else "malformed segmentation")


def from_mask(mask: np.ndarray) -> dict:
    """A uint8 mask [H, W] of 0 and 1 as a segmentation: an RLE whose counts are text."""
    return _as_text(coco_mask.encode(np.asfortranarray(mask)))


def from_crop(mask: np.ndarray, left: int, top: int, height: int, width: int) -> dict:
    """As from_mask, of a mask [h, w] whose first pixel is (left, top) in a picture of height x width, in which it lies."""
    columns = np.zeros((mask.shape[1], height), np.int8)
    columns[:, top : top + mask.shape[0]] = mask.T > 0
    edges = np.flatnonzero(np.diff(columns.ravel(), prepend=0, append=0)) + left * height
    return from_runs(edges[0::2], edges[1::2], height, width)


def from_runs(starts: np.ndarray, ends: np.ndarray, height: int, width: int) -> dict:
    """As from_mask, of the pixels from starts[i] to ends[i] - 1, ascending, counted down the columns."""
    counts = np.empty(2 * len(starts) + 1, np.int64)
    counts[0:-1:2] = starts - np.concatenate([[0], ends[:-1]])[: len(starts)]
    counts[1::2] = ends - starts
    counts[-1] = height * width - (ends[-1] if len(ends) else 0)
    counts = counts[:-1] if counts[-1] == 0 else counts  # as pycocotools itself ends them
    return _as_text(coco_mask.frPyObjects({"size": [height, width], "counts": counts.tolist()}, height, width))


def united(parts: list, height: int, width: int) -> dict:
    """Polygons [x, y, ...] and RLEs of one object as one RLE. Raises Unusable."""
    return _as_text(coco_mask.merge([to_rle(p if isinstance(p, dict) else [p], height, width) for p in parts]))


def _as_text(rle):
    return {"size": [int(side) for side in rle["size"]], "counts": rle["counts"].decode()}


def outline(mask: np.ndarray, max_edges: int, *, coarse: bool = False) -> tuple[list[np.ndarray], float]:
    """The rings of a mask [H, W], its staircases smoothed, with at most `max_edges` vertices in all; their IoU with it.

    Traced at a lower resolution where it is far more intricate than that, or (IoU not measured: 1) where `coarse` will do.
    """
    rings = _traced(mask, 64 if coarse else 2**16, (2 if coarse else 16) * max_edges)
    if coarse:
        return contours.simplify(rings, max_edges, min_iou=0.0)[0], 1.0
    return contours.simplify(rings, max_edges, tolerance=_STAIRCASE)


def simplified(rings: list[np.ndarray], max_edges: int) -> tuple[list[np.ndarray], float]:
    """Rings with at most `max_edges` vertices in all, and their IoU with what they were."""
    if sum(map(len, rings)) <= max_edges:
        return rings, 1.0
    simple, iou = contours.simplify(rings, max_edges)
    return simple, contours.iou(simple, rings) if len(rings) > 1 else iou  # parts that overlap break the bound


def oriented(ring: np.ndarray) -> np.ndarray | None:
    """An outer ring [V, 2] with a positive shoelace sum and no vertex twice in a row; None if it encloses nothing."""
    different = ring != np.concatenate([ring[-1:], ring[:-1]])
    different = different[:, 0] | different[:, 1]
    ring = ring if different.all() else ring[different]
    area = contours.shoelace(ring) if len(ring) > 2 else 0.0
    if abs(area) <= 1e-6:
        return None
    return ring if area > 0 else ring[::-1]


def columns(rle, first, last):
    """The columns from `first` to `last` - 1 of a mask, as uint8 [last - first, height]: no need to unpack all of it."""
    height = rle["size"][0]
    ends = np.cumsum(_decompress(rle["counts"].decode()))
    lengths = np.diff(np.clip(ends, first * height, last * height), prepend=first * height)
    return np.repeat(np.arange(len(ends), dtype=np.uint8) & 1, lengths).reshape(last - first, height)


def _traced(mask, max_size, max_corners):
    """The outline of a mask at the finest of the resolutions 1, 1/2, 1/4, ... that keeps to both maxima."""
    scale = 1
    while True:
        # Counting first costs little and spares tracing what is too intricate, which can take minutes and gigabytes.
        if max(mask.shape) <= max_size and (mask.size < 2**17 or contours.corners(mask) <= max_corners):
            rings = contours.trace(mask)
            if sum(map(len, rings)) <= max_corners or max(mask.shape) <= 16:
                return [ring * scale for ring in rings]
        padded = np.pad(np.asarray(mask, np.uint8), [(0, side % 2) for side in mask.shape])
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
        bits = np.zeros((8 * (last - first), h), np.uint8)
        bits[x - 8 * first : x - 8 * first + w] = columns(rle, x, x + w)[:, y : y + h]
        rows[y : y + h, 1 + first : 1 + last] = np.packbits(np.ascontiguousarray(bits.T), axis=1)
    header = struct.pack(">IIBBBBB", width, height, 1, 3, 0, 0, 0)  # bit depth 1, palette
    chunks = ((b"IHDR", header), (b"PLTE", b"\0\0\0\1\1\1"), (b"IDAT", zlib.compress(rows.tobytes(), 1)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )


def polygons(parts: list, height: int, width: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Checked polygons, float64 [V, 2] each: those that pycocotools may draw, and the rings of these. Raises Unusable."""
    malformed = Unusable("malformed polygon (not lists of x, y, x, y, ...)")
    if not all(isinstance(part, list) and len(part) % 2 == 0 and set(map(type, part)) <= {int, float} for part in parts):
        raise malformed
    if sum(map(len, parts)) > 2 * MAX_VERTICES or len(parts) > MAX_PARTS:
        raise Unusable(MANY_VERTICES)
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
    # pycocotools walks every edge pixel by pixel: memory without end for an absurd coordinate, or for many long edges.
    reach = 10 * max(height, width) + 1000
    if max(-left, -top, right, bottom) > reach:
        raise Unusable("polygon with absurd coordinates (beyond ten times the image)")
    if max(right, bottom) <= 1 < min(height, width) / 2:
        raise Unusable(RELATIVE)
    drawable = [part for part in parts if len(part) > 2]
    if not drawable:
        raise Unusable("polygon with fewer than 3 points")
    longest = min(2 * height * width, _LONGEST_OUTLINE) + 8 * reach
    # Measured only where it can be too long.
    if len(points) * max(right - left, bottom - top) > longest and sum(map(_length, drawable)) > longest:
        raise Unusable("polygon with an outline longer than the image can hold")
    rings = [ring for ring in map(oriented, drawable) if ring is not None]
    if not rings:
        raise Unusable("polygon of zero area")
    return drawable, rings


def _length(ring):
    """In steps from pixel to pixel."""
    return np.abs(ring - np.roll(ring, 1, axis=0)).max(axis=1).sum()


def _rasterized(parts, height, width):
    rles = coco_mask.frPyObjects([part.ravel() for part in parts], height, width)
    return rles[0] if len(rles) == 1 else coco_mask.merge(rles)


def _checked_rle(segmentation, height, width):
    size, counts = segmentation.get("size"), segmentation.get("counts")
    if not (isinstance(size, list) and [type(side) for side in size] == [int, int]):
        raise Unusable("malformed RLE (no 'size' of two integers)")
    if size != [height, width]:
        raise Unusable("RLE of the wrong size")
    if isinstance(counts, list):
        if len(counts) > MAX_RUNS:
            raise Unusable(MANY_RUNS)
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
    codes = np.frombuffer(text.encode(errors="surrogatepass"), np.uint8).astype(np.int64) - 48
    ends = np.flatnonzero(codes & 32 == 0)
    if not len(codes) or codes.min() < 0 or codes.max() > 63 or not len(ends) or ends[-1] != len(codes) - 1:
        raise Unusable("malformed RLE (broken 'counts')")
    if len(ends) > MAX_RUNS:
        raise Unusable(MANY_RUNS)
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
