"""Pictures of any size by tiles that overlap, and one polygon for what several tiles saw. Memory is that of a batch of tiles.

Two detections of neighbouring tiles are one object where their polygons agree within the overlap. Of such a group the version
that ends farthest from its tile's border counts; where every tile cut the object, the pieces are united. A piece that the
border of its tile cuts, and of which another tile that has it well inside found nothing, is left out: such pieces are what
networks get wrong. All is done with polygons on small rasters, which cost the same for any size, between neighbouring tiles
alone: linear in the objects near seams.
"""

import bisect
import dataclasses
import itertools
from collections import defaultdict
from collections.abc import Iterator

import numpy as np
from pycocotools import mask as coco_mask
from tqdm import tqdm

from polarmask_tf import lite
from polarmask_tf.data import contours, windows
from polarmask_tf.data.tiles import check, grid
from polarmask_tf.inference.predictor import Predictor
from polarmask_tf.inference.results import Detections

SAME = 0.5  # least IoU, within the overlap of two tiles, of two views of one object
WITHIN = 0.7  # or, where one was cut, least part of the smaller that lies in the other
_BOXES = 0.25  # least part of the smaller box that lies in the other, for polygons to be compared
_TOUCH = 2.0  # pixels of the network's input: what ends so near to a tile's border counts as cut by it
_TOUCH_PART = 0.05  # or this part of the object, for its outline is as uncertain
_CELLS, _UNION_CELLS = 64, 192  # sides of the rasters for comparing and for uniting
_SHOWN_TILES = 50  # with more a picture has a bar of its own


@dataclasses.dataclass(frozen=True)
class TiledPredictor:
    """A Predictor of pictures of any size, see `tiled`. Also takes what `read` gives."""

    predictor: Predictor
    tile: int
    overlap: int
    progress: bool = False
    batch_size: int = 1  # pictures; tiles are run in batches of predictor.batch_size

    kind = property(lambda self: self.predictor.kind)
    classes = property(lambda self: self.predictor.classes)
    input_size = property(lambda self: self.predictor.input_size)
    bit_depth = property(lambda self: self.predictor.bit_depth)
    score_threshold = property(lambda self: self.predictor.score_threshold)
    max_detections = property(lambda self: self.predictor.max_detections)  # of a tile
    rays = property(lambda self: self.predictor.rays)
    thresholds = property(lambda self: self.predictor.thresholds)
    runs_on = property(lambda self: self.predictor.runs_on)
    default_threshold = property(lambda self: self.predictor.default_threshold)

    def __call__(self, images):
        if isinstance(images, Iterator) and not hasattr(images, "read"):  # as Predictor takes them
            return map(self._detect, images)
        if not isinstance(images, list | tuple):
            return self([images])[0]
        return [self._detect(image) for image in images]

    def read(self, source, **options):
        """The pixels of a picture file, TiffWindows of a large TIFF; see windows.open_windows."""
        opened = windows.open_windows(source, **{"bit_depth": self.bit_depth, **options})
        return opened if isinstance(opened, windows.TiffWindows) else opened.read(0, 0, *opened.shape[:2])

    def _detect(self, image):
        picture = windows.open_windows(image, bit_depth=self.bit_depth)
        height, width = picture.shape[:2]
        rows, columns = grid(height, width, self.tile, self.overlap)
        places, parts = itertools.product(rows, columns), []
        hidden = not self.progress or len(rows) * len(columns) <= _SHOWN_TILES
        with tqdm(total=len(rows) * len(columns), desc="tiles", unit="tile", leave=False, disable=hidden) as bar:
            while batch := list(itertools.islice(places, self.predictor.batch_size)):
                sides = min(self.tile, height), min(self.tile, width)
                # Copies: a view would keep the whole picture, and what a back end is given has to be in one piece.
                tiles = [np.array(picture.read(y, x, *sides)) for y, x in batch]
                parts += [{name: getattr(found, name) for name in lite.FOUND} for found in self.predictor(tiles)]
                bar.update(len(batch))
        if picture is not image:
            picture.close()
        scale = max(1.0, self.tile / max(self.input_size))
        rows = merge(parts, rows, columns, self.tile, (height, width), touch=_TOUCH * scale)
        source = getattr(image, "source", image)
        size, depth = (height, width), self.bit_depth
        return Detections(**rows, categories=self.classes, image_size=size, source=source, bit_depth=depth)


def tiled(predictor: Predictor, tile: int, overlap: int | None = None, *, progress: bool = False) -> TiledPredictor:
    """A predictor of pictures of any size, that runs `predictor` on tiles of tile x tile pixels and joins what they find.

    overlap: pixels that neighbouring tiles share, by default a quarter of the tile. An object up to that size is whole in one
    of the tiles; of a larger one the pieces are united. Pictures are whatever the predictor takes, and TIFF files of any
    size, see windows.open_windows. Raises InputError for an overlap that is not less than the tile.
    """
    return TiledPredictor(predictor, tile, check(tile, overlap), progress)


def merge(parts, rows, columns, tile, size, touch=_TOUCH):
    """Detections of the tiles of a picture -> of the picture, by descending score: the arrays of lite.FOUND.

    parts: {"scores", "classes", "polygons"} of each tile, row by row, in its pixels; rows, columns: see tiles.grid; size:
    (height, width) of the picture; touch: how near to a tile's border a polygon may end, in pixels, to count as cut by it.
    """
    corners = np.array([(x, y) for y in rows for x in columns], np.float32)
    polygons = np.concatenate([part["polygons"] + corner for part, corner in zip(parts, corners, strict=True)])
    scores, classes = (np.concatenate([part[name] for part in parts]) for name in ("scores", "classes"))
    of_tile = np.repeat(np.arange(len(parts)), [len(part["scores"]) for part in parts])
    limits = np.minimum(corners + tile, size[::-1])
    found = _Found(polygons.astype(np.float32), scores, classes, of_tile, np.concatenate([corners, limits], 1), size, touch)
    kept = []
    for group in _groups(found, len(rows), len(columns)):
        if len(group) > 1 or not found.cut[group[0]] or not _seen_better(found, group[0], rows, columns, tile):
            # A piece may be a sure thing where another tile has a bad guess: of whole views their own scores count.
            views = [i for i in group if not found.cut[i]] or group
            kept.append((float(scores[views].max()), int(classes[group[0]]), _one_polygon(found, views, tile)))
    kept.sort(key=lambda row: -row[0])
    polygons = np.array([polygon for *_, polygon in kept], np.float32).reshape(-1, *polygons.shape[1:])
    boxes = np.concatenate([polygons.min(axis=1), polygons.max(axis=1)], axis=1)
    scores, classes = np.array([row[0] for row in kept], np.float32), np.array([row[1] for row in kept], np.int32)
    return {"scores": scores, "classes": classes, "boxes": boxes, "polygons": polygons}


class _Found:
    """All detections of all tiles, M in pixels of the picture."""

    def __init__(self, polygons, scores, classes, of_tile, frames, size, touch):
        self.polygons, self.scores, self.classes, self.tile, self.frames = polygons, scores, classes, of_tile, frames
        self.boxes = np.concatenate([polygons.min(axis=1), polygons.max(axis=1)], axis=1)
        # From each side of the box to the tile's; a side that the picture ends at cuts nothing.
        inner = frames != np.array([0, 0, *size[::-1]])
        gaps = (self.boxes - frames[of_tile]) * (1, 1, -1, -1)
        self.inner, self.room = inner, np.where(inner[of_tile], gaps, np.inf).min(axis=1, initial=np.inf)
        longest = (self.boxes[:, 2:] - self.boxes[:, :2]).max(axis=1, initial=0)
        self.touch = np.maximum(touch, _TOUCH_PART * longest)
        self.cut = self.room <= self.touch


def _groups(found, rows, columns):
    """Lists of the indices of those detections that are one object."""
    members = [[i] for i in range(len(found.scores))]
    group_of = list(range(len(members)))
    for _, i, j in sorted(_matches(found, rows, columns), reverse=True):
        one, two = group_of[i], group_of[j]
        if one == two or _contradict(found, members[one], members[two]):
            continue
        members[one] += members[two]
        for k in members[two]:
            group_of[k] = one
        members[two] = []
    return [group for group in members if group]


def _contradict(found, one, two):
    """Whether a tile saw two objects in what would be one: other than pieces, of which it may see several."""
    tiles = defaultdict(list)
    for i in one:
        tiles[found.tile[i]].append(i)
    return any(not (found.cut[i] and found.cut[j]) for j in two for i in tiles.get(found.tile[j], ()))


def _matches(found, rows, columns):
    """Yields (how well, i, j) of the detections of two tiles that may be one object."""
    starts = np.searchsorted(found.tile, np.arange(rows * columns + 1))
    for first in range(rows * columns):
        if starts[first] == starts[first + 1]:
            continue
        for second in _neighbours(found.frames, first, rows, columns):
            if starts[second] < starts[second + 1]:
                yield from _matches_of(
                    found, slice(*starts[first : first + 2]), slice(*starts[second : second + 2]), first, second
                )


def _neighbours(frames, first, rows, columns):
    """Tiles behind the `first` that it overlaps with."""
    row, column = divmod(first, columns)
    last_row, first_column, last_column = row, column, column
    while last_row + 1 < rows and frames[(last_row + 1) * columns, 1] < frames[first, 3]:
        last_row += 1
    while last_column + 1 < columns and frames[last_column + 1, 0] < frames[first, 2]:
        last_column += 1
    while first_column and frames[first_column - 1, 2] > frames[first, 0]:
        first_column -= 1
    for below in range(row, last_row + 1):
        for beside in range(first_column, last_column + 1):
            if below * columns + beside > first:
                yield below * columns + beside


def _matches_of(found, ours, theirs, first, second):
    low = np.maximum(found.frames[first, :2], found.frames[second, :2])
    high = np.minimum(found.frames[first, 2:], found.frames[second, 2:])
    # Boxes within the overlap; where these have little in common, polygons have less.
    one, two = (
        np.concatenate([np.maximum(boxes[:, :2], low), np.minimum(boxes[:, 2:], high)], axis=1)
        for boxes in (found.boxes[ours], found.boxes[theirs])
    )
    sides = np.minimum(one[:, None, 2:], two[None, :, 2:]) - np.maximum(one[:, None, :2], two[None, :, :2])
    areas = [(boxes[:, 2:] - boxes[:, :2]).clip(0).prod(axis=1) for boxes in (one, two)]
    meet = (sides > 0).all(axis=-1) & (sides.prod(axis=-1) >= _BOXES * np.minimum(areas[0][:, None], areas[1][None]))
    meet &= found.classes[ours, None] == found.classes[None, theirs]
    for i, j in np.argwhere(meet) + np.array([ours.start, theirs.start]):
        lowest = np.maximum(np.minimum(found.boxes[i, :2], found.boxes[j, :2]), low)
        highest = np.minimum(np.maximum(found.boxes[i, 2:], found.boxes[j, 2:]), high)
        common, one_area, two_area = _areas(found.polygons[i], found.polygons[j], lowest, highest)
        if not common:
            continue
        # The surest of those that agree come first: a bad guess may look like a piece, too.
        sure = min(found.scores[i], found.scores[j])
        iou, within = common / (one_area + two_area - common), common / min(one_area, two_area)
        if iou >= SAME:
            yield 1 + iou * sure, int(i), int(j)
        elif within >= WITHIN and (found.cut[i] or found.cut[j]):
            yield within * sure, int(i), int(j)


def _areas(one, two, low, high):
    """Cells of a raster over the box from low to high that two polygons have in common, and that each has."""
    rles = _drawn([one, two], low, _CELLS / np.maximum(high - low, 1e-6), (_CELLS, _CELLS))
    common = coco_mask.merge(rles, intersect=True)
    return tuple(map(float, coco_mask.area([common, *rles])))


def _drawn(polygons, low, scale, shape):
    # pycocotools walks every edge cell by cell, so what lies far outside is brought nearer.
    far = 4 * max(shape)
    points = [np.clip((np.asarray(polygon, np.float64) - low) * scale, -far, far).ravel() for polygon in polygons]
    return coco_mask.frPyObjects(points, *shape)


def _seen_better(found, i, rows, columns, tile):
    """Whether a piece that its tile's border cuts lies well within another tile, which did not find anything like it there."""
    left, top, right, bottom = found.boxes[i].tolist()
    for row in range(bisect.bisect_left(rows, bottom - tile), bisect.bisect_right(rows, top)):
        for column in range(bisect.bisect_left(columns, right - tile), bisect.bisect_right(columns, left)):
            other = row * len(columns) + column
            gaps = (found.boxes[i] - found.frames[other]) * (1, 1, -1, -1)
            if other != found.tile[i] and np.where(found.inner[other], gaps, np.inf).min() > found.touch[i]:
                return True
    return False


def _one_polygon(found, views, tile):
    """[rays, 2] of an object of which there are whole views, or only pieces."""
    if len(views) > 1 and found.cut[views[0]]:
        return _union([found.polygons[i] for i in views])
    # Farther than an eighth of the tile from the border nothing is gained: then the score decides.
    return found.polygons[max(views, key=lambda i: (min(found.room[i], tile / 8), found.scores[i]))]


def _union(polygons):
    """The outline of the largest part of a union of polygons [rays, 2], with as many vertices."""
    points = np.concatenate(polygons).astype(np.float64)
    low, high = points.min(axis=0), points.max(axis=0)
    scale = (_UNION_CELLS - 2) / max(float((high - low).max()), 1e-6)
    shape = tuple(int(side) for side in np.ceil((high - low)[::-1] * scale) + 2)
    mask = coco_mask.decode(coco_mask.merge(_drawn(polygons, low - 1 / scale, scale, shape)))
    rings = contours.trace(mask) if mask.any() else []
    if not rings:
        return polygons[0]
    largest = max(rings, key=contours.shoelace)  # holes are negative
    (ring,), _ = contours.simplify([largest], len(polygons[0]), min_iou=0.0, tolerance=0.35)
    return (_with_vertices(ring, len(polygons[0])) / scale + low - 1 / scale).astype(np.float32)


def _with_vertices(ring, count):
    """A ring with as many vertices as asked for, of which it has no more: its longest edges are divided."""
    lengths = np.hypot(*(np.roll(ring, -1, axis=0) - ring).T)
    pieces = np.ones(len(ring), int)
    for _ in range(count - len(ring)):
        pieces[np.argmax(lengths / pieces)] += 1
    following = np.roll(ring, -1, axis=0)
    parts = [a + (b - a) * (np.arange(n) / n)[:, None] for a, b, n in zip(ring, following, pieces, strict=True)]
    return np.concatenate(parts)
