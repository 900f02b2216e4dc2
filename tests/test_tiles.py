"""`polarmask convert --tile`: polygons and masks cut exactly, slivers, crowds, ids and names, large TIFFs."""

import itertools
import json

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as coco_mask

from helpers.polygons import raster, star
from polarmask_tf import cli, lite
from polarmask_tf.data import contours, dataset, records, tiles, windows
from polarmask_tf.data.convert import convert
from polarmask_tf.data.report import Report
from polarmask_tf.errors import InputError

RNG = np.random.default_rng(0)


def area(rings):
    return sum(abs(contours.shoelace(ring)) for ring in rings)


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**32), st.integers(3, 40), st.booleans(), st.booleans())
def test_clipping_is_the_window_of_the_raster(seed, corners, whole_numbers, is_star):
    """Also of polygons that cross themselves, have vertices and edges on the border, or come back into the window."""
    rng = np.random.default_rng(seed)
    ring = star(rng, rng.uniform(0, 40, 2), 30, corners, 0.9) if is_star else rng.uniform(-20, 60, (corners, 2))
    if whole_numbers:
        ring = np.round(ring / 5) * 5
    height, width = 30, 40
    rings = tiles.clip(ring, height, width)
    for piece in rings:
        assert piece.min() >= 0 and (piece <= (width, height)).all()
        # No bridge: along a border no stretch is walked twice.
        for axis, limit in ((0, 0), (0, width), (1, 0), (1, height)):
            on = (piece[:, axis] == limit) & (np.roll(piece, -1, axis=0)[:, axis] == limit)
            spans = np.sort(np.stack([piece, np.roll(piece, -1, axis=0)])[:, on, 1 - axis], axis=0).T
            spans = spans[spans[:, 1] > spans[:, 0]]
            if is_star and not whole_numbers:  # those may run along the border themselves
                spans = spans[np.argsort(spans[:, 0])]
                assert (spans[1:, 0] >= spans[:-1, 1] - 1e-9).all()
    scale, around = 8, 60
    expected = raster([ring], height + 2 * around, width + 2 * around, scale, (-around, -around))
    expected = expected[around * scale : -around * scale, around * scale : -around * scale]
    got = raster([piece for piece in rings if len(piece) > 2], height, width, scale)
    # The rasters may differ by a cell along each edge, no more.
    length = sum(np.hypot(*(np.roll(p, -1, axis=0) - p).T).sum() for p in [*rings, ring[:0]]) * scale
    assert (expected ^ got).sum() <= 1.0 * length + 4


def test_two_tips_become_two_rings_and_a_touching_corner_nothing():
    comb = np.array([[-10, -5], [5, 2], [-5, 5], [5, 8], [-10, 15]], float)
    rings = tiles.clip(comb, 20, 20)
    assert len(rings) == 2
    assert area(rings) == pytest.approx(2 * 5 * (3.5 + 2.5) / 2 / 2, rel=0.5)
    assert area(tiles.clip(np.array([[-5, -5], [0, 5], [-5, 15]], float), 20, 20)) == 0
    assert tiles.clip(np.array([[30, 30], [40, 30], [35, 40]], float), 20, 20) == []
    inside = np.array([[1, 1], [5, 1], [3, 4]], float)
    np.testing.assert_array_equal(tiles.clip(inside, 20, 20)[0], inside)


@pytest.mark.parametrize(
    "height, width, tile, overlap", [(10, 10, 16, 4), (100, 50, 16, 4), (512, 513, 64, 0), (33, 70, 32, 31)]
)
def test_a_grid_covers_the_picture_with_whole_tiles(height, width, tile, overlap):
    rows, columns = tiles.grid(height, width, tile, overlap)
    for side, starts in ((height, rows), (width, columns)):
        assert starts[0] == 0 and starts[-1] + min(tile, side) == side and len(set(starts)) == len(starts)
        assert all(b - a <= tile - overlap for a, b in itertools.pairwise(starts))
    for wrong in ((8, 0), (64, 64), (64, -1)):
        with pytest.raises(InputError, match="must be"):
            tiles.check(*wrong)
    assert tiles.check(64, None) == 16
    with pytest.raises(InputError, match="tiles; use larger"):
        tiles.grid(10**5, 10**5, 32, 31)


def disc(x, y, radius, corners=40):
    angle = 2 * np.pi * np.arange(corners) / corners
    return (np.stack([x + radius * np.cos(angle), y + radius * np.sin(angle)], 1)).round(2)


def make(folder, side=(150, 200), suffix="png"):
    """One picture with a polygon and a mask on seams, a crowd, and objects of which tiles of 100 show slivers."""
    pixels = RNG.integers(0, 255, (*side, 3), np.uint8)
    (folder / "images").mkdir(parents=True)
    if suffix == "tif":
        tifffile.imwrite(folder / "images/a.tif", pixels, tile=(64, 64), compression="zlib", photometric="rgb")
    else:
        Image.fromarray(pixels).save(folder / f"images/a.{suffix}")
    mask = np.zeros(side, np.uint8)
    mask[60:120, 70:130] = 1
    mask[80:90, 90:110] = 0  # a hole
    rle = coco_mask.encode(np.asfortranarray(mask))
    shapes = [
        ([disc(100, 75, 30).ravel().tolist()], 0),
        ({"size": list(side), "counts": rle["counts"].decode()}, 0),
        ([disc(95, 44, 12).ravel().tolist()], 1),
        ([disc(118.5, 20, 20).ravel().tolist()], 0),  # 1.5 pixels in the tiles that end at 100
    ]
    annotations = [
        {"id": 10 + i, "image_id": 7, "category_id": 3, "segmentation": shape, "iscrowd": crowd}
        for i, (shape, crowd) in enumerate(shapes)
    ]
    content = {
        "images": [{"id": 7, "file_name": f"a.{suffix}", "height": side[0], "width": side[1]}],
        "annotations": annotations,
    }
    (folder / "a.json").write_text(json.dumps({**content, "categories": [{"id": 3, "name": "cell"}]}))
    return pixels, annotations


def test_tiles_hold_the_pixels_and_the_masks_of_their_windows(tmp_path, capsys):
    pixels, annotations = make(tmp_path)
    cli.main(["convert", *(str(tmp_path / p) for p in ("a.json", "images", "out")), "--tile", "100", "--overlap", "40"])
    info = dataset.load(tmp_path / "out")
    assert (info.tile, info.overlap, info.num_images) == (100, 40, 6)
    truth = records.read_ground_truth(tmp_path / "out")
    assert len({a["id"] for a in truth["annotations"]}) == len(truth["annotations"])
    whole = [coco_mask.decode(lite_rle(a["segmentation"], *pixels.shape[:2])) for a in annotations]
    corners, seen = {}, 0
    for image in truth["images"]:
        name, _, window = image["file_name"].partition("#xywh=")
        x, y, w, h = map(int, window.split(","))
        assert name == "a.png" and (h, w) == (image["height"], image["width"]) == (100, 100)
        corners[image["id"]] = y, x
        expected = [(i, m[y : y + h, x : x + w]) for i, m in enumerate(whole) if m[y : y + h, x : x + w].any()]
        got = [a for a in truth["annotations"] if a["image_id"] == image["id"]]
        assert len(got) == len(expected)
        for (index, mask), annotation in zip(expected, got, strict=True):
            actual = coco_mask.decode(annotation["segmentation"])
            assert (actual != mask).sum() <= 0.02 * mask.sum() + 2, (index, window)
            sliver = mask.sum() < 0.1 * whole[index].sum() and mask.sum() < 100
            assert annotation["iscrowd"] == int(index == 2 or sliver)
            assert annotation["area"] == pytest.approx(mask.sum(), rel=0.05, abs=3)
            seen += sliver and index != 2
    assert sorted(corners) == [1, 2, 3, 4, 5, 6] and {*corners.values()} == {(y, x) for y in (0, 50) for x in (0, 60, 100)}
    assert seen == 1
    assert "sliver of a cut object (below 10% of it and 1% of the tile) made a crowd region" in capsys.readouterr().out
    for image_id, encoded in records.iter_images(tmp_path / "out"):
        y, x = corners[image_id]
        np.testing.assert_array_equal(lite.read_image(encoded), pixels[y : y + 100, x : x + 100])


def lite_rle(shape, height, width):
    return coco_mask.merge(coco_mask.frPyObjects(shape, height, width)) if isinstance(shape, list) else shape


def test_large_tiffs_are_read_by_windows_in_several_shards(tmp_path, monkeypatch):
    pixels, _ = make(tmp_path, suffix="tif")
    monkeypatch.setattr(lite, "MAX_PIXELS", 20_000)
    monkeypatch.setattr(records, "MAX_PIXELS", 20_000)
    options = {"shards": 3, "decoded": True, "progress": False, "tile": 100}
    info = convert(tmp_path / "a.json", tmp_path / "images", tmp_path / "out", **options)
    assert (info.num_images, len(info.shard_paths), info.overlap) == (6, 3, 25)
    names = {image["id"]: image["file_name"] for image in records.read_ground_truth(tmp_path / "out")["images"]}
    for image_id, encoded in records.iter_images(tmp_path / "out"):
        x, y, w, h = map(int, names[image_id].split("=")[1].split(","))
        np.testing.assert_array_equal(lite.read_image(encoded), pixels[y : y + h, x : x + w])


def test_gray_levels_of_a_large_tiff_are_noted(tmp_path, monkeypatch):
    make(tmp_path, suffix="tif")
    monkeypatch.setattr(lite, "MAX_PIXELS", 20_000)
    monkeypatch.setattr(records, "MAX_PIXELS", 20_000)
    with Image.open(tmp_path / "images" / "a.tif") as picture:
        dark = np.asarray(picture.convert("L")).astype(np.uint16)
    Image.fromarray(dark).save(tmp_path / "images" / "a.tif")
    options = {"shards": 1, "processes": 1, "progress": False, "tile": 100}
    info = convert(tmp_path / "a.json", tmp_path / "images", tmp_path / "out", **options)
    assert [number for text, number in info.notes.items() if text.startswith("gray of at most 8 bits where 16 are")] == [1]


def entry(segmentations, height=300, width=1000, crowd=0):
    annotations = [
        {"id": i, "label": 0, "iscrowd": crowd, "area": None, "segmentation": s} for i, s in enumerate(segmentations)
    ]
    return {"id": 1, "file_name": "a.png", "height": height, "width": width, "annotations": annotations}


def test_as_many_empty_tiles_are_kept_as_others():
    report = Report()
    found = tiles.cut([entry([[disc(50, 50, 20).ravel().tolist()], [disc(450, 250, 20).ravel().tolist()]])], 100, 0, report)
    assert [bool(tile["annotations"]) for tile in found] == [True, False, False, True]
    assert [tile["id"] for tile in found] == [1, 2, 3, 4]
    assert report.notes["tile without annotations left out: as many are kept as have some"][0] == 30 - 4
    assert len(tiles.cut([entry([])], 100, 0, report)) == 30  # background alone
    assert not report.skipped


def test_an_object_larger_than_a_tile_is_no_sliver_and_a_broken_one_is_skipped():
    report = Report()
    found = tiles.cut([entry([[[0, 0, 1000, 0, 1000, 300, 0, 300]], [[5, 5]], "x"])], 100, 0, report)
    pieces = [tile["annotations"] for tile in found]
    assert [len(there) for there in pieces] == [1] * 30
    assert {(there[0]["iscrowd"], there[0]["area"]) for there in pieces} == {(0, 10_000.0)}
    assert sum(count for count, _ in report.skipped.values()) == 2
    with pytest.raises(InputError, match="--strict"):
        tiles.cut([entry([[[5, 5]]])], 100, 0, Report(strict=True))


def test_what_cannot_be_read_is_skipped_and_wrong_options_are_one_line(tmp_path, monkeypatch):
    make(tmp_path)
    paths = tmp_path / "a.json", tmp_path / "images", tmp_path / "out"
    with pytest.raises(InputError, match="overlap is 100; it must be less than the tile, 100"):
        convert(*paths, tile=100, overlap=100)
    with pytest.raises(InputError, match="overlap is of tiles"):
        convert(*paths, overlap=10)
    (tmp_path / "images/a.png").write_bytes((tmp_path / "images/a.png").read_bytes()[:5000])
    with pytest.raises(InputError, match="6 x corrupt or truncated image"):
        convert(*paths, tile=100, overlap=40, progress=False)
    assert not (tmp_path / "out").exists()
    assert windows.MAX_PIXELS > tiles.MOST_PIXELS
