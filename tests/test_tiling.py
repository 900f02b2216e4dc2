"""Tiles of a picture to polygons of the picture: with a predictor that sees exactly what lies in each tile."""

import dataclasses
import json

import numpy as np
import pytest
import tifffile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as coco_mask

from polarmask_tf import cli, lite
from polarmask_tf.data import tiles, windows
from polarmask_tf.errors import InputError
from polarmask_tf.inference import tiling
from polarmask_tf.inference.predict import predict
from polarmask_tf.inference.predictor import Predictor
from polarmask_tf.inference.tiling import merge, tiled

RAYS = 48
CLASSES = [{"name": "a", "category_id": 1}, {"name": "b", "category_id": 2}]


def with_vertices(ring, count):
    """The same outline with more vertices."""
    ring = list(map(np.asarray, ring))
    while len(ring) < count:
        lengths = [np.hypot(*(ring[(i + 1) % len(ring)] - p)) for i, p in enumerate(ring)]
        i = int(np.argmax(lengths))
        ring.insert(i + 1, (ring[i] + ring[(i + 1) % len(ring)]) / 2)
    assert len(ring) == count
    return np.array(ring, np.float32)


def in_tiles(shapes, classes, size, tile, overlap, wobble=0.0, rng=None):
    """What a predictor that knows the shapes finds in each tile: every piece, exactly cut, or moved by up to `wobble`."""
    rows, columns = tiles.grid(*size, tile, overlap)
    parts = []
    for y in rows:
        for x in columns:
            found = []
            for shape, label in zip(shapes, classes, strict=True):
                for ring in tiles.clip(shape - (x, y), min(tile, size[0]), min(tile, size[1])):
                    ring = ring[(ring != np.roll(ring, 1, axis=0)).any(axis=1)]
                    if len(ring) > 2 and np.ptp(ring, axis=0).min() > 1:
                        ring = with_vertices(ring, RAYS)
                        if wobble:
                            ring = np.clip(ring + rng.normal(0, wobble, 2), 0, tile).astype(np.float32)
                        found.append((ring, label))
            parts.append(
                {
                    "scores": np.linspace(0.9, 0.5, len(found), dtype=np.float32),
                    "classes": np.array([label for _, label in found], np.int32),
                    "polygons": np.array([ring for ring, _ in found], np.float32).reshape(-1, RAYS, 2),
                }
            )
    return parts, rows, columns


def iou_matrix(ones, others, size, scale=8):
    one, two = (
        coco_mask.frPyObjects([(np.float64(p) * scale).ravel() for p in polygons], size[0] * scale, size[1] * scale)
        for polygons in (ones, others)
    )
    return np.asarray(coco_mask.iou(one, two, [0] * len(others)))


def assert_each_once(shapes, classes, found, size, least=0.95):
    assert len(found["scores"]) == len(shapes)
    assert found["polygons"].dtype == np.float32 and found["polygons"].shape[1:] == (RAYS, 2)
    if not len(shapes):
        return
    ious = iou_matrix(found["polygons"], shapes, size)
    of = ious.argmax(axis=1)
    assert sorted(of.tolist()) == list(range(len(shapes)))
    assert ious.max(axis=1).min() >= least
    assert (found["classes"] == np.asarray(classes)[of]).all()
    assert (np.diff(found["scores"]) <= 0).all()
    np.testing.assert_array_equal(found["boxes"][:, :2], found["polygons"].min(axis=1))
    np.testing.assert_array_equal(found["boxes"][:, 2:], found["polygons"].max(axis=1))


@st.composite
def scenes(draw):
    """Discs, ellipses and stars that do not touch, anywhere in a picture, of up to two tiles, also beyond the border."""
    tile = draw(st.sampled_from([64, 80, 100]))
    overlap = draw(st.integers(8, tile * 3 // 4))
    size = draw(st.tuples(st.integers(40, 260), st.integers(40, 260)))
    shapes, classes, taken = [], [], []
    for _ in range(draw(st.integers(0, 7))):
        radius = draw(st.sampled_from([6, 12, 25, 60, 100]))
        # Often on a seam or on a corner of tiles.
        rows, columns = tiles.grid(*size, tile, overlap)
        places = [
            draw(st.one_of(st.floats(0, side), st.sampled_from([*starts, *(start + tile for start in starts)])))
            for side, starts in zip(size[::-1], (columns, rows), strict=True)
        ]
        center = np.clip(places, 0, size[::-1])
        if any(np.hypot(*(center - other)) < radius + reach + 4 for other, reach in taken):
            continue
        angle = 2 * np.pi * np.arange(24) / 24
        radii = np.full(24, float(radius))
        kind = draw(st.sampled_from(["disc", "ellipse", "star"]))
        if kind == "star":
            radii[::2] *= draw(st.floats(0.55, 0.8))
        shape = np.stack([np.cos(angle), np.sin(angle)], 1) * radii[:, None]
        if kind == "ellipse":
            shape[:, 1] *= draw(st.floats(0.4, 1))
        shape = tiles.clip(center + shape, *size)
        # Not what hardly reaches into the picture, nor what the border cuts in two.
        if len(shape) != 1 or np.ptp(shape[0], axis=0).min() < 4:
            continue
        taken.append((center, radius))
        shapes.append(shape[0])
        classes.append(draw(st.integers(0, 1)))
    return tile, overlap, size, shapes, classes


@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
@given(scenes())
def test_every_object_is_found_once_and_whole(scene):
    tile, overlap, size, shapes, classes = scene
    parts, rows, columns = in_tiles(shapes, classes, size, tile, overlap)
    assert_each_once(shapes, classes, merge(parts, rows, columns, tile, size), size)


def disc(x, y, radius):
    angle = 2 * np.pi * np.arange(RAYS - 8) / (RAYS - 8)
    return np.stack([x + radius * np.cos(angle), y + radius * np.sin(angle)], 1)


def test_seams_and_corners_one_by_one():
    """A disc of every size around the corner where four tiles meet, moved over it."""
    size, tile = (240, 240), 96
    for overlap in (8, 24, 48):
        for radius in (4, 10, 22, 40, 90):
            for at in (96 - overlap, 96 - overlap / 2, 96, 110):
                shape = tiles.clip(disc(at, at + 3, radius), *size)[0]
                parts, rows, columns = in_tiles([shape], [0], size, tile, overlap)
                assert_each_once([shape], [0], merge(parts, rows, columns, tile, size), size)


def test_neighbours_on_a_seam_stay_two_and_classes_stay_apart():
    size, tile, overlap = (100, 164), 100, 36
    touching = [disc(75, 50, 12), disc(99.5, 50, 12), disc(82, 80, 9), disc(82, 80, 9)]
    classes = [0, 0, 0, 1]
    parts, rows, columns = in_tiles(touching, classes, size, tile, overlap)
    found = merge(parts, rows, columns, tile, size)
    assert len(found["scores"]) == 4 and sorted(found["classes"].tolist()) == [0, 0, 0, 1]


def test_views_that_differ_a_little_are_one_object():
    """As a network sees them: each tile a little elsewhere, borders missed by a pixel."""
    rng = np.random.default_rng(0)
    size, tile, overlap = (400, 400), 128, 32
    shapes = [disc(x, y, rng.uniform(7, 14)) for x in range(20, 390, 36) for y in range(20, 390, 36)]
    shapes = [tiles.clip(shape, *size)[0] for shape in shapes]
    parts, rows, columns = in_tiles(shapes, [0] * len(shapes), size, tile, overlap, wobble=0.7, rng=rng)
    assert sum(len(part["scores"]) for part in parts) > 1.5 * len(shapes)
    assert_each_once(shapes, [0] * len(shapes), merge(parts, rows, columns, tile, size), size, least=0.6)


def test_a_whole_view_wins_over_pieces_with_its_score():
    size, tile, overlap = (100, 160), 100, 40
    parts, rows, columns = in_tiles([disc(85, 50, 14)], [0], size, tile, overlap)
    assert [len(part["scores"]) for part in parts] == [1, 1]
    parts[0]["scores"][0], parts[1]["scores"][0] = 0.95, 0.4  # the left tile has it whole, one pixel from its border
    found = merge(parts, rows, columns, tile, size)
    assert found["scores"] == pytest.approx([0.4])
    np.testing.assert_allclose(found["polygons"][0], parts[1]["polygons"][0] + (60, 0), atol=1e-4)


def test_a_bad_guess_that_looks_like_a_piece_does_not_take_its_place():
    """The right tile has the object whole, and a guess of little score at what the left one sees of it."""
    size, tile, overlap = (100, 160), 100, 40
    parts, rows, columns = in_tiles([disc(96, 50, 14)], [0], size, tile, overlap)
    piece, whole = parts[0], parts[1]
    guess = np.clip(piece["polygons"] - (61, 0), 0, None).astype(np.float32)
    parts[1] = {
        "scores": np.array([0.8, 0.1], np.float32),
        "classes": np.zeros(2, np.int32),
        "polygons": np.concatenate([whole["polygons"], guess + np.array([0.5, 0])]).astype(np.float32),
    }
    found = merge(parts, rows, columns, tile, size)
    assert found["scores"] == pytest.approx([0.8, 0.1])
    np.testing.assert_allclose(found["polygons"][0], whole["polygons"][0] + (60, 0), atol=1e-4)


def test_work_grows_with_the_objects_and_not_with_their_square(monkeypatch):
    """Counted, not timed: pairs that are compared, an object of a large picture."""
    calls, real, compared = [], tiling._areas, []
    monkeypatch.setattr(tiling, "_areas", lambda *args: calls.append(1) or real(*args))
    square = with_vertices([[0, 0], [12, 0], [12, 12], [0, 12]], RAYS)
    for side in (300, 600, 1200):
        rows, columns = tiles.grid(side, side, 128, 32)
        places = np.array([(x, y) for x in range(4, side - 12, 20) for y in range(4, side - 12, 20)])
        parts = []
        for y in rows:
            for x in columns:
                inside = ((places >= (x, y)) & (places + 12 <= (x + 128, y + 128))).all(axis=1)  # whole ones alone
                polygons = (square + (places[inside] - (x, y))[:, None]).astype(np.float32)
                scores, classes = np.full(len(polygons), 0.5, np.float32), np.zeros(len(polygons), np.int32)
                parts.append({"scores": scores, "classes": classes, "polygons": polygons})
        calls.clear()
        assert len(merge(parts, rows, columns, 128, (side, side))["scores"]) == len(places)
        compared.append(len(calls) / len(places))
    assert max(compared) < 2.5


def brightest(images):
    """A back end that finds one square: the bounding box of what is bright."""
    rows = []
    for image in images:
        y, x = np.nonzero(image[..., 0] > 100)
        box = np.array([x.min(), y.min(), x.max() + 1, y.max() + 1], np.float32).reshape(1, 4) if len(x) else np.zeros((0, 4))
        rows.append(
            {
                "scores": np.full(len(box), 0.8, np.float32),
                "classes": np.zeros(len(box), np.int32),
                "boxes": box.astype(np.float32),
                "polygons": box[:, [0, 1, 2, 1, 2, 3, 0, 3]].reshape(-1, 4, 2).astype(np.float32),
            }
        )
    return rows


def test_a_tiled_predictor_is_a_predictor(tmp_path):
    sizes = []
    base = Predictor(
        "run", CLASSES, (64, 64), 3, lambda images: sizes.append([i.shape for i in images]) or brightest(images), 0.5
    )
    predictor = tiled(base, 64, 16)
    for name in {field.name for field in dataclasses.fields(Predictor)} - {"run", "batch_size"}:
        assert getattr(predictor, name) == getattr(base, name)
    image = np.zeros((150, 200, 3), np.uint8)
    image[40:60, 50:80] = 200
    Image.fromarray(image).save(tmp_path / "a.png")
    one, two = predictor([image, tmp_path / "a.png"])
    for found in (one, two, predictor(predictor.read(tmp_path / "a.png"))):
        np.testing.assert_allclose(found.boxes, [[50, 40, 80, 60]], atol=0.1)  # joined of pieces
        assert (found.image_size, found.categories) == ((150, 200), CLASSES)
        assert found.masks()[0].sum() == 600
    assert two.source == tmp_path / "a.png"  # and not its pixels
    (three,) = predictor(path for path in [tmp_path / "a.png"])
    np.testing.assert_array_equal(three.boxes, two.boxes)
    assert [len(batch) for batch in sizes[:4]] == [3, 3, 3, 3] and {shape for batch in sizes for shape in batch} == {
        (64, 64, 3)
    }
    assert len(predictor(image[:30, :30])) == 0
    assert len(predictor(np.zeros((40, 500, 3), np.uint8))) == 0
    assert tiled(base, 100).overlap == 25
    with pytest.raises(InputError, match="overlap is 64; it must be less than the tile, 64"):
        tiled(base, 64, 64)


def test_predict_on_a_large_tiff_writes_results_and_a_smaller_overlay(tmp_path, monkeypatch):
    monkeypatch.setattr(lite, "MAX_PIXELS", 20_000)
    monkeypatch.setattr(windows, "OVERVIEW", 100)
    image = np.zeros((150, 200, 3), np.uint8)
    image[40:60, 50:80] = 200
    tifffile.imwrite(tmp_path / "a.tif", image, tile=(64, 64), compression="zlib", photometric="rgb")
    done = predict(
        tiled(Predictor("run", CLASSES, (64, 64), 3, brightest), 64, 16), tmp_path / "a.tif", tmp_path / "out", progress=False
    )
    assert (done["images"], done["detections"], done["skipped"]) == (1, 1, {})
    (result,) = json.loads((tmp_path / "out/results.json").read_text())
    assert result["bbox"] == pytest.approx([50, 40, 30, 20], abs=0.1) and coco_mask.area(result["segmentation"]) == 600
    with Image.open(tmp_path / "out/overlays/a.png") as overlay:  # 100 x 75, enlarged as small pictures are
        assert overlay.size[0] / 4 == overlay.size[1] / 3
        scale = overlay.size[0] / 200
        colors = {overlay.getpixel((round(x * scale), round(y * scale))) for x, y in ((65, 50), (20, 20))}
        assert len(colors) == 2


@pytest.mark.parametrize(
    "shape, options, message",
    [
        ((150, 200), {"save": ["csv", "ids"]}, "a.tif: ids of so large a picture do not fit into memory"),
        ((70_000, 70_000), {}, "a.tif: 70000 x 70000 pixels are too many for RLE masks; take polygons"),
    ],
)
def test_what_a_large_picture_cannot_have_is_refused_before_the_work(shape, options, message, tmp_path, monkeypatch):
    monkeypatch.setattr(lite, "MAX_PIXELS", 20_000)
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((150, 200), np.uint8), tile=(64, 64))
    monkeypatch.setattr(windows.TiffWindows, "_check", lambda self: setattr(self, "shape", (*shape, 3)))
    never = tiled(Predictor("run", CLASSES, (64, 64), 3, lambda images: pytest.fail("looked at a tile")), 64, 16)
    with pytest.raises(InputError, match=message):
        predict(never, tmp_path / "a.tif", tmp_path / "out", progress=False, **options)


def test_a_large_tiff_that_becomes_black_is_told_as_a_small_one_is(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(lite, "MAX_PIXELS", 20_000)
    tifffile.imwrite(tmp_path / "a.tif", np.full((150, 200), 200, np.uint16), tile=(64, 64))
    predictor = tiled(Predictor("run", CLASSES, (64, 64), 3, brightest), 64, 16)
    predict(predictor, tmp_path / "a.tif", tmp_path / "out", progress=False)
    note = "note: 1 of 1 images: gray of at most 8 bits where 16 are expected: all of it becomes black"
    assert note in capsys.readouterr().err


def test_the_commands_take_tiles(tmp_path):
    for command in (["predict", "RUN", "a.tif", "--out", "o"], ["evaluate", "RUN", "--data", "d"]):
        args = cli.parser().parse_args([*command, "--tile", "512", "--overlap", "64"])
        assert (args.tile, args.overlap) == (512, 64)
    base = Predictor("run", CLASSES, (64, 64), 3, brightest)
    assert cli._tiled(base, args).overlap == 64
    args.tile, args.overlap = None, None
    assert cli._tiled(base, args) is base
    args.overlap = 3
    with pytest.raises(InputError, match="give --tile"):
        cli._tiled(base, args)
