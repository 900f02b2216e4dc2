"""Large pictures cut into tiles that overlap, with their annotations: `polarmask convert --tile 512 --overlap 64`.

Neither touches a picture until it is read, so thousands of tiles cost nothing but their annotations.
"""

import bisect
import collections
from pathlib import Path

import numpy as np
from pycocotools import mask as coco_mask

from polarmask_tf import lite
from polarmask_tf.data import contours, pictures, segmentation, windows
from polarmask_tf.data.report import Report, Unusable
from polarmask_tf.errors import InputError

# A piece of a cut object with less of it than the first and less of the tile than the second is a crowd region.
MIN_OF_OBJECT, MIN_OF_TILE = 0.1, 0.01
_AREA = 1.0  # square pixels, of a piece too small to say anything
MAX_TILES = 1_000_000  # of a picture
MOST_PIXELS = 2**32 - 1  # of a picture: pycocotools counts in 32 bits


def check(tile: int, overlap: int | None) -> int:
    """The overlap, by default a quarter of the tile; InputError where the two do not fit."""
    overlap = tile // 4 if overlap is None else overlap
    if tile < 16:
        raise InputError(f"tile is {tile}; it must be at least 16 pixels")
    if not 0 <= overlap < tile:
        raise InputError(f"overlap is {overlap}; it must be less than the tile, {tile}")
    return overlap


def grid(height: int, width: int, tile: int, overlap: int) -> tuple[list[int], list[int]]:
    """Top rows and left columns of the tiles of a picture.

    Neighbours overlap by `overlap`, the last two of a row or column by more, so that it ends with the picture: all have `tile`
    pixels a side unless the picture has fewer.
    """
    step = tile - overlap
    rows, columns = ([*range(0, max(side - tile, 0), step), max(side - tile, 0)] for side in (height, width))
    if len(rows) * len(columns) > MAX_TILES:
        raise InputError(f"{width} x {height} pixels are {len(rows) * len(columns):,} tiles; use larger tiles or less overlap")
    return rows, columns


def cut(entries: list[dict], tile: int, overlap: int, report: Report) -> list[dict]:
    """Images with annotations as sources/coco.py reads them -> their tiles, in the same form.

    A tile has an id of its own (1, 2, ...; so have its annotations), "file_name" with the window behind it, as media
    fragments are written ("a.tif#xywh=448,0,512,512"), and of the picture "picture" (its file_name), "source_size" (height,
    width) and "corner" (y, x); what else there is in an entry its tiles have, too. Polygons are cut exactly; so are masks. A
    crowd region stays one; a piece of an object below MIN_OF_OBJECT of its area and MIN_OF_TILE of the tile's becomes one,
    because neither an object nor background is to be learnt from it. Of tiles without annotation as many are kept, evenly, as
    there are others (all, if there are no others). Both are counted in the report.
    """
    tiles, number = [], 0
    for entry in entries:
        rows, columns = grid(entry["height"], entry["width"], tile, overlap)
        whole = entry["height"], entry["width"]
        sides = min(tile, whole[0]), min(tile, whole[1])
        pieces = collections.defaultdict(list)  # (row, column) of the tile -> its annotations
        for annotation in entry["annotations"]:
            where = f"image {entry['id']}, {entry['file_name']}, annotation {annotation['id']}"
            try:
                for place, piece in _pieces(annotation, entry, rows, columns, sides, report, where):
                    number += 1
                    pieces[place].append({**piece, "id": number})
            except Unusable as reason:
                report.skip_object(str(reason), where)
        for y in rows:
            for x in columns:
                there = {"height": sides[0], "width": sides[1], "annotations": pieces.pop((y, x), [])}
                there["file_name"] = f"{entry['file_name']}#xywh={x},{y},{sides[1]},{sides[0]}"
                tiles.append({**entry, **there, "picture": entry["file_name"], "source_size": whole, "corner": (y, x)})
    tiles = _without_most_empty(tiles, report)
    return [{**entry, "id": index} for index, entry in enumerate(tiles, 1)]


def _without_most_empty(tiles, report):
    empty = [index for index, entry in enumerate(tiles) if not entry["annotations"]]
    used = len(tiles) - len(empty)
    if not used or len(empty) <= used:
        return tiles
    kept = {empty[i * len(empty) // used] for i in range(used)}
    left_out = [index for index in empty if index not in kept]
    report.note(
        "tile without annotations left out: as many are kept as have some", tiles[left_out[0]]["file_name"], len(left_out)
    )
    left_out = set(left_out)
    return [entry for index, entry in enumerate(tiles) if index not in left_out]


def _pieces(annotation, entry, rows, columns, sides, report, where):
    """Yields ((row, column), annotation) of each tile that an annotation reaches into. Raises Unusable."""
    height, width = entry["height"], entry["width"]
    shape = annotation["segmentation"]
    if isinstance(shape, list):
        parts, _ = segmentation.polygons(shape, height, width)
        points = np.concatenate(parts)
        (left, top), (right, bottom) = points.min(axis=0), points.max(axis=0)
        whole = _inside(parts, 0, 0, height, width)
        area = sum(abs(contours.shoelace(ring)) for ring in whole)
    else:
        rle = segmentation.to_rle(shape, height, width)
        left, top, w, h = coco_mask.toBbox(rle)
        right, bottom, area = left + w, top + h, float(coco_mask.area(rle))
        if not area:
            raise Unusable("empty mask")
    found = False
    for y in _between(rows, top - sides[0], bottom):
        for x in _between(columns, left - sides[1], right):
            if isinstance(shape, list):
                rings = _inside(parts, y, x, *sides)
                piece, size = [ring.ravel().tolist() for ring in rings], sum(abs(contours.shoelace(ring)) for ring in rings)
                inside = left >= x and top >= y and right <= x + sides[1] and bottom <= y + sides[0]
            else:
                mask = segmentation.columns(rle, x, x + sides[1])[:, y : y + sides[0]].T
                size, encoded = float(np.count_nonzero(mask)), coco_mask.encode(np.asfortranarray(mask))
                piece, inside = {"size": list(sides), "counts": encoded["counts"].decode()}, size == area
            if size < _AREA and not inside:
                if size:
                    report.note("piece of a cut object with less than a pixel left out", f"{where}, tile at {x}, {y}")
                continue
            found = True
            given = {"label": annotation["label"], "iscrowd": annotation["iscrowd"], "segmentation": piece}
            if inside:
                given |= {key: annotation[key] for key in ("area",) if key in annotation}  # COCO alone gives one
            else:
                given["area"] = _mask_area(piece, sides)
                if not given["area"]:
                    continue
                if size < MIN_OF_OBJECT * area and size < MIN_OF_TILE * sides[0] * sides[1] and not given["iscrowd"]:
                    given["iscrowd"] = 1
                    limits = f"{MIN_OF_OBJECT:.0%} of it and {MIN_OF_TILE:.0%} of the tile"
                    report.note(f"sliver of a cut object (below {limits}) made a crowd region, which training ignores", where)
            yield (y, x), given
    if not found:
        raise Unusable("object of less than a pixel")


def _between(values, low, high):
    """Those of ascending values that lie between the two."""
    return values[bisect.bisect_right(values, low) : bisect.bisect_left(values, high)]


def _mask_area(piece, sides):
    """What the mask of the piece will have, so that `convert` finds the two alike."""
    try:
        return float(coco_mask.area(segmentation.to_rle(piece, *sides)))
    except Unusable:  # all of it in less than a pixel of the border
        return 0.0


def _inside(parts, y, x, height, width):
    """The rings of what lies of each part in the window, relative to it."""
    rings = [ring for part in parts for ring in clip(part - (x, y), height, width)]
    return [ring for ring in rings if abs(contours.shoelace(ring)) > 1e-6]


def clip(ring: np.ndarray, height: float, width: float) -> list[np.ndarray]:
    """The rings [V, 2] of what a ring encloses (even-odd) of [0, width] x [0, height], each in one piece, without bridges."""
    rings = [np.asarray(ring, np.float64)]
    for axis, sign, limit in ((0, 1, 0), (0, -1, width), (1, 1, 0), (1, -1, height)):
        rings = [piece for ring in rings for piece in _half(ring, axis, sign, limit)]
    return rings


def _half(ring, axis, sign, limit):
    """What a ring encloses of the half plane sign * (coordinate - limit) >= 0, as rings.

    The line is crossed an even number of times; in order along the line every second gap between crossings is enclosed, and
    becomes an edge. Vertices on the line count as inside: as if it lay a little further out, so no crossing is missed or met
    twice.
    """
    depth = sign * (ring[:, axis] - limit)
    inside = depth >= 0
    if inside.all():
        return [ring]
    if not inside.any():
        return []
    start = int(np.argmin(inside))  # begin outside
    ring, depth, inside = (np.roll(values, -start, axis=0) for values in (ring, depth, inside))
    following, deep = np.roll(ring, -1, axis=0), np.roll(depth, -1)
    crossed = np.flatnonzero(inside != np.roll(inside, -1))
    part = (depth[crossed] / (depth[crossed] - deep[crossed]))[:, None]
    points = ring[crossed] + part * (following[crossed] - ring[crossed])
    points[:, axis] = limit
    # Chains of vertices inside, each between an entry (crossing 2 i) and an exit (2 i + 1).
    chains = [ring[crossed[i] + 1 : crossed[i + 1] + 1] for i in range(0, len(crossed), 2)]
    order = np.argsort(points[:, 1 - axis], kind="stable")
    partner = np.empty(len(order), int)
    partner[order[0::2]], partner[order[1::2]] = order[1::2], order[0::2]
    rings, used = [], set()
    for first in range(len(chains)):
        vertices, at = [], 2 * first
        while at // 2 not in used:
            used.add(at // 2)
            chain, end = chains[at // 2], at ^ 1
            vertices += [points[at], *(chain if at % 2 == 0 else chain[::-1]), points[end]]
            at = int(partner[end])
        if len(vertices) > 2:
            rings.append(np.array(vertices))
    return rings


def close(last: dict, report: Report) -> None:
    """Ends with the picture that the last tile came from, see `stored`: of a large one its gray levels are noted."""
    for path, picture in last.items():
        if isinstance(picture, windows.TiffWindows):
            for text in picture.notes():
                report.note(text, path.name)
            picture.close()
    last.clear()


def stored(path: Path, entry: dict, options, report: Report, where: str, last: dict) -> tuple[bytes, str]:
    """(bytes, format) of a tile of `cut` out of the picture at `path`, as pictures.stored gives them; nothing is lost.

    last: {} at first, then with the picture that the last tile came from. Raises Unusable.
    """
    (height, width), (y, x) = entry["source_size"], entry["corner"]
    try:
        if path not in last:
            close(last, report)
            if windows.is_large_tiff(path):
                last[path] = windows.TiffWindows(path, options.bit_depth)
            else:
                whole = options._replace(decoded=False)
                data, _ = pictures.stored(path, (width, height), whole, report, where, entry.get("as_shown", False))
                last[path] = windows.ArrayWindows(lite.read_image(data))
        if last[path].shape[:2] != (height, width):
            raise Unusable("size mismatch")
        pixels = last[path].read(y, x, entry["height"], entry["width"])
    except (InputError, OSError, ValueError) as error:
        raise Unusable("corrupt or truncated image, or not an image", str(error)) from None
    return pictures.encode(np.ascontiguousarray(pixels), "bmp" if options.decoded else "png")
