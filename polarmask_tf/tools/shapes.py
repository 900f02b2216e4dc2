"""The quickstart data: coloured circles, rectangles, triangles and stars, or harder shapes, as a COCO data set."""

import json
import math
import os
import shutil
import typing
from pathlib import Path

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask
from tqdm import tqdm

from polarmask_tf.data import contours
from polarmask_tf.errors import InputError
from polarmask_tf.files import atomic_write, lock

# Ids with gaps, as in COCO itself, so that nobody can take an id for a label.
CATEGORIES = {
    "circle": 1,
    "rectangle": 3,
    "triangle": 7,
    "star": 12,
    "bar": 15,
    "ellipse": 16,  # elongated: 4 to 6 times as long as wide
    "ell": 21,
    "cee": 22,  # concave, as the letters are; the mass center lies outside most L and all C
}
DEFAULT_KINDS = ("circle", "rectangle", "triangle", "star")
_SUPERSAMPLE = 4
_DRAWN = ".drawn"  # in OUT, until all is drawn: a full disk leaves what was there
_MARGIN = 2.0  # pixels kept free between a shape and the image border


def make_shapes(
    out: Path,
    *,
    train: int = 1000,
    val: int = 150,
    size: int = 128,
    seed: int = 0,
    kinds: typing.Sequence[str] = DEFAULT_KINDS,
    progress: bool = True,
) -> None:
    """Writes OUT/{train,val}/images/*.png and OUT/{train,val}/annotations.json (COCO, polygons).

    Images are RGB, `size` x `size`, with 1 to 4 shapes that never cover one another, so that each polygon (x, y in
    pixels, pixel (0, 0) covers [0, 1) x [0, 1)) is exactly what one sees. `kinds` are names of CATEGORIES, all equally
    frequent. Image i of a split depends on (seed, split, i, kinds) alone. Raises InputError where `out` is in use or cannot
    be written, a kind is unknown or a number makes no sense.
    """
    kinds = tuple(kinds)
    unknown = [str(kind) for kind in kinds if kind not in CATEGORIES]
    if unknown or not kinds or len(set(kinds)) < len(kinds):
        fault = f"unknown kind {unknown[0]!r}" if unknown else "a kind is named twice" if kinds else "no kind is named"
        raise InputError(f"shapes: {fault}; choose different ones from {', '.join(CATEGORIES)}")
    limits = {"size": (size, 48, 4096), "train": (train, 1, 10**6), "val": (val, 0, 10**6), "seed": (seed, 0, 2**63)}
    for name, (value, least, most) in limits.items():
        if not least <= value <= most:
            raise InputError(f"shapes: {name} is {value}; it must be {least} to {most}")
    try:
        with lock(out, "shapes"), tqdm(total=train + val, desc="shapes", unit="img", disable=not progress) as bar:
            drawn = Path(out) / _DRAWN
            try:
                shutil.rmtree(drawn, ignore_errors=True)  # of one that was killed
                for split, (name, count) in enumerate((("train", train), ("val", val))):
                    _write_split(drawn / name, count, size, (seed, split), kinds, bar)
                for name in ("train", "val"):
                    _publish(drawn / name, Path(out) / name)
            finally:
                shutil.rmtree(drawn, ignore_errors=True)
    except OSError as error:
        raise InputError(f"{out}: cannot write the shapes: {error.strerror or error}; choose another --out") from error


def _write_split(folder, count, size, seeds, kinds, bar):
    (folder / "images").mkdir(parents=True)
    images, annotations = [], []
    for i in range(count):
        pixels, shapes = _draw_image(np.random.default_rng([*seeds, i]), size, kinds)
        file_name = f"{i:06d}.png"
        Image.fromarray(pixels).save(folder / "images" / file_name, compress_level=1)
        images.append({"id": i + 1, "file_name": file_name, "width": size, "height": size})
        for name, polygon in shapes:
            annotations.append(_annotation(len(annotations) + 1, i + 1, CATEGORIES[name], polygon))
        bar.update()
    categories = [{"id": i, "name": name, "supercategory": "shape"} for name, i in CATEGORIES.items() if name in kinds]
    document = {"images": images, "annotations": annotations, "categories": categories}
    atomic_write(folder / "annotations.json", json.dumps(document))


def _publish(drawn, folder):
    """Moves a drawn split to its place; what else lies there stays."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    (folder / "annotations.json").unlink(missing_ok=True)  # they are not those of the images to come
    for path in (drawn / "images").iterdir():
        os.replace(path, folder / "images" / path.name)
    os.replace(drawn / "annotations.json", folder / "annotations.json")


def _annotation(number, image_id, category_id, polygon):
    polygon = np.round(polygon, 2)
    low, high = polygon.min(axis=0), polygon.max(axis=0)
    shape = {"segmentation": [polygon.ravel().tolist()], "bbox": np.round([*low, *(high - low)], 2).tolist()}
    area = round(abs(contours.shoelace(polygon)), 5)  # a multiple of .00005: with fewer digits ties fall as the processor adds
    return {"id": number, "image_id": image_id, "category_id": category_id, **shape, "area": area, "iscrowd": 0}


def _draw_image(rng, size, kinds):
    """One picture: uint8 [size, size, 3] and [(class name, polygon float [V, 2]), ...]."""
    picture, background_colours = _background(rng, size)
    taken = np.zeros((size, size), bool)
    shapes = []
    wanted = rng.integers(1, 5)
    for _ in range(60):  # tries, so that a crowded picture ends with fewer shapes rather than never
        if len(shapes) == wanted:
            break
        name, polygon = _random_shape(rng, size, kinds)
        if polygon.min() < _MARGIN or polygon.max() > size - _MARGIN:
            continue
        alpha, (x0, y0, x1, y1) = _coverage(polygon)
        if (taken[y0:y1, x0:x1] & (alpha > 0)).any():
            continue
        taken[y0:y1, x0:x1] |= alpha > 0
        paint = _shading(rng, _contrasting_colour(rng, background_colours), x1 - x0, y1 - y0)
        patch = picture[y0:y1, x0:x1]
        patch += alpha[..., None] * (paint - patch)
        shapes.append((name, polygon))
    picture += 4 * rng.standard_normal(picture.shape, np.float32)
    return np.clip(np.rint(picture), 0, 255).astype(np.uint8), shapes


def _random_shape(rng, size, kinds=DEFAULT_KINDS):
    name = kinds[rng.integers(len(kinds))]
    # A thin shape is longer, so that it is no less visible: never below 7 pixels across at size 128.
    radius = rng.uniform(14 if name in DEFAULT_KINDS else 22, 36) * size / 128
    turn = rng.uniform(0, 2 * math.pi)
    if name == "circle":
        radii, angles = np.full(40, radius), np.arange(40) * (2 * math.pi / 40)
    elif name in ("rectangle", "bar"):
        # Angle of the diagonal: a rectangle's aspect ratio lies below 2.1.
        half = rng.uniform(0.45, math.pi / 2 - 0.45) if name == "rectangle" else math.atan(1 / rng.uniform(4, 6))
        radii, angles = np.full(4, radius), np.array([half, math.pi - half, math.pi + half, -half])
    elif name == "triangle":
        # Corners 120 degrees apart at most 20 degrees off: never a sliver.
        radii, angles = np.full(3, radius), np.arange(3) * (2 * math.pi / 3) + rng.uniform(-0.35, 0.35, 3)
    elif name == "star":
        radii = np.tile([radius, radius * rng.uniform(0.42, 0.52)], 5)
        angles = np.arange(10) * (2 * math.pi / 10)
    else:
        outline = {"ellipse": _ellipse, "ell": _ell, "cee": _cee}[name](rng)
        radii, angles = radius * np.abs(outline), np.angle(outline)
    spokes = radii[:, None] * np.stack([np.cos(angles + turn), np.sin(angles + turn)], axis=1)
    reach = np.abs(spokes).max() + _MARGIN
    return name, spokes + rng.uniform(min(reach, size / 2), max(size - reach, size / 2), 2)


def _ellipse(rng):
    """Outline of half-length 1, complex [48]."""
    angles = np.arange(48) * (2 * math.pi / 48)
    return np.cos(angles) + 1j * np.sin(angles) / rng.uniform(4, 6)


def _ell(rng):
    """An L whose box has its center at 0 and its corners at distance 1, complex [6]."""
    half = rng.uniform(0.6, math.pi / 2 - 0.6)  # angle of the diagonal: the longer leg is below 1.5 times the shorter
    width, height = 2 * math.cos(half), 2 * math.sin(half)
    leg = rng.uniform(0.3, 0.4) * min(width, height)
    corners = np.array([0, width, width + 1j * leg, leg + 1j * leg, leg + 1j * height, 1j * height])
    return corners - (width + 1j * height) / 2


def _cee(rng):
    """A ring of radius 1 with an opening of 80 to 150 degrees, complex [40]."""
    opening = rng.uniform(1.4, 2.6)
    arc = np.exp(1j * np.linspace(opening / 2, 2 * math.pi - opening / 2, 20))
    return np.concatenate([arc, rng.uniform(0.5, 0.62) * arc[::-1]])


def _coverage(polygon):
    """How much of each pixel the polygon covers: float [h, w] in [0, 1] and its window (x0, y0, x1, y1)."""
    x0, y0 = np.floor(polygon.min(axis=0)).astype(int)
    x1, y1 = np.ceil(polygon.max(axis=0)).astype(int)
    # Pillow's own polygons come out a border too large, which is what the network would learn.
    points = ((polygon - (x0, y0)) * _SUPERSAMPLE).ravel().tolist()
    (rle,) = coco_mask.frPyObjects([points], (y1 - y0) * _SUPERSAMPLE, (x1 - x0) * _SUPERSAMPLE)
    cells = coco_mask.decode(rle).reshape(y1 - y0, _SUPERSAMPLE, x1 - x0, _SUPERSAMPLE)
    return cells.mean(axis=(1, 3), dtype=np.float32), (x0, y0, x1, y1)


def _contrasting_colour(rng, background_colours):
    for _ in range(100):
        colour = rng.uniform(20, 250, 3)
        if min(np.linalg.norm(colour - other) for other in background_colours) > 110 and np.ptp(colour) > 60:
            return colour
    return 255 - background_colours[0]


def _shading(rng, colour, width, height):
    """A gentle light from one side, so that shapes are not flat: float32 [height, width, 3]."""
    angle = rng.uniform(0, 2 * math.pi)
    x, y = np.linspace(-1, 1, width), np.linspace(-1, 1, height)
    light = 14 * (math.cos(angle) * x[None, :] + math.sin(angle) * y[:, None])
    return (colour + light[..., None]).astype(np.float32)


def _background(rng, size):
    """A textured ground between two related colours: float32 [size, size, 3] and the two colours."""
    first = rng.uniform(30, 225, 3)
    second = np.clip(first + rng.uniform(-55, 55, 3), 10, 245)
    y, x = np.mgrid[0:size, 0:size].astype(np.float32) / size
    angle = rng.uniform(0, 2 * math.pi)
    along = math.cos(angle) * x + math.sin(angle) * y
    kind = rng.integers(3)
    if kind == 0:  # gradient
        mix = (along - along.min()) / np.ptp(along)
    elif kind == 1:  # stripes
        mix = 0.5 + 0.5 * np.sin(2 * math.pi * (rng.uniform(3, 10) * along + rng.uniform()))
    else:  # smooth noise
        cells = int(rng.integers(4, 12))
        coarse = Image.fromarray(rng.uniform(0, 1, (cells, cells)).astype(np.float32))
        mix = np.clip(np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC)), 0, 1)
    return (first + mix[..., None] * (second - first)).astype(np.float32), (first, second)
