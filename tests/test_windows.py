"""Large TIFFs by windows: the pixels of the ordinary reader, memory of a window, one line for what is damaged."""

import importlib.util
import io
import json
import re
import subprocess
import sys
import zlib

import numpy as np
import pytest
import tifffile
from PIL import Image

from polarmask_tf import lite
from polarmask_tf.data import windows
from polarmask_tf.errors import InputError

RNG = np.random.default_rng(0)
COLOR = RNG.integers(0, 256, (203, 317, 3), np.uint8)
DEEP = RNG.integers(0, 4096, (203, 317)).astype(np.uint16)
RGB = {"photometric": "rgb"}
FILES = {
    "tiled": (COLOR, {"tile": (64, 96), "compression": "zlib", **RGB}),
    "tiled, plain": (COLOR, {"tile": (64, 96), **RGB}),
    "strips, predictor": (COLOR, {"rowsperstrip": 7, "compression": "zlib", "predictor": True, **RGB}),
    "one plain strip": (COLOR, RGB),
    "planes": (np.moveaxis(COLOR, -1, 0), {"tile": (64, 64), "compression": "zlib", "planarconfig": "separate", **RGB}),
    "alpha": (np.dstack([COLOR, DEEP & 255]).astype(np.uint8), {"tile": (64, 64), "extrasamples": ["unassalpha"], **RGB}),
    "gray": (COLOR[..., 0], {"tile": (64, 64), "compression": "zlib"}),
    "white is zero": (COLOR[..., 0], {"tile": (64, 64), "photometric": "miniswhite"}),
    "16 bits": (DEEP, {"tile": (64, 64), "compression": "zlib"}),
    "OME, pyramid": (DEEP, {"tile": (64, 64), "compression": "zlib", "subifds": 1, "ome": True}),
    "BigTIFF": (COLOR, {"tile": (64, 64), "compression": "zlib", "bigtiff": True, **RGB}),
}


def write(path, pixels, ome=False, bigtiff=False, **options):
    with tifffile.TiffWriter(path, ome=ome, bigtiff=bigtiff) as out:
        out.write(pixels, **options)
        if options.get("subifds"):
            out.write(pixels[::2, ::2], tile=(64, 64), subfiletype=1)
    return path


@pytest.mark.parametrize("kind", FILES)
def test_windows_are_the_ordinary_readers_pixels(kind, tmp_path):
    pixels, options = FILES[kind]
    path = write(tmp_path / "a.tif", pixels, **options)
    opened = windows.TiffWindows(path)
    whole = lite.read_image(path)
    assert opened.shape == whole.shape
    for y, x, height, width in ((0, 0, 203, 317), (60, 90, 70, 150), (202, 316, 1, 1), (5, 64, 64, 96), (60, 90, 70, 150)):
        part = opened.read(y, x, height, width)
        assert part.dtype == np.uint8
        np.testing.assert_array_equal(part, whole[y : y + height, x : x + width])
    with pytest.raises(ValueError, match="not in a picture"):
        opened.read(200, 0, 4, 4)


def test_bit_depths_and_floats_are_as_the_ordinary_reader_has_them(tmp_path):
    path = write(tmp_path / "a.tif", DEEP, tile=(64, 64))
    np.testing.assert_array_equal(windows.TiffWindows(path, 12).read(0, 0, 203, 317), lite.read_image(path, bit_depth=12))
    with pytest.raises(InputError, match="beyond the 10 bits"):
        windows.TiffWindows(path, 10).read(0, 0, 203, 317)
    floats = write(tmp_path / "f.tif", DEEP.astype(np.float32), tile=(64, 64))
    np.testing.assert_array_equal(
        windows.TiffWindows(floats, 12).read(9, 9, 99, 99), lite.read_image(path, bit_depth=12)[9:108, 9:108]
    )
    with pytest.raises(InputError, match="floating-point"):
        windows.TiffWindows(floats)


@pytest.mark.parametrize("kind", [*FILES, "16-bit colors", "dark"])
def test_what_is_noted_of_gray_levels_is_what_the_ordinary_reader_notes(kind, tmp_path):
    more = {"16-bit colors": (COLOR.astype(np.uint16), {"tile": (64, 64), **RGB}), "dark": (DEEP >> 4, {"tile": (64, 64)})}
    pixels, options = (FILES | more)[kind]
    path = write(tmp_path / "a.tif", pixels, **options)
    opened, notes = windows.TiffWindows(path), []
    assert opened.notes() == []
    lite.read_image(path, notes=notes)
    for y in (0, 128):
        opened.read(y, 0, 75, 317)
    assert opened.notes() == notes and bool(notes) == (kind in ("16 bits", "OME, pyramid", *more))


def test_only_tiffs_that_are_too_large_are_read_by_windows(tmp_path, monkeypatch):
    path = write(tmp_path / "a.tif", COLOR, **RGB)
    Image.fromarray(COLOR).save(tmp_path / "a.png")
    for source in (path, tmp_path / "a.png", COLOR, (tmp_path / "a.png").read_bytes()):
        opened = windows.open_windows(source)
        assert isinstance(opened, windows.ArrayWindows) and opened.source is source
        np.testing.assert_array_equal(opened.read(3, 4, 50, 60), COLOR[3:53, 4:64])
    monkeypatch.setattr(lite, "MAX_PIXELS", 1000)
    assert isinstance(windows.open_windows(path), windows.TiffWindows)
    with pytest.raises(InputError, match=r"a\.png: .*limit is 1,000"):
        windows.open_windows(tmp_path / "a.png")
    monkeypatch.setitem(sys.modules, "tifffile", None)
    with pytest.raises(InputError, match=re.escape("pip install 'polarmask_tf[large]'")):
        windows.open_windows(path)


def test_an_overview_is_the_mean_of_squares(tmp_path, monkeypatch):
    pixels = RNG.integers(0, 256, (2050, 1030, 3), np.uint8)
    path = write(tmp_path / "a.tif", pixels, tile=(256, 256), compression="zlib", **RGB)
    small = windows.overview(windows.TiffWindows(path), 700)
    assert small.shape == (684, 344, 3)
    for y, x in ((0, 0), (340, 341), (683, 343), (683, 5)):
        mean = pixels[3 * y : 3 * y + 3, 3 * x : 3 * x + 3].reshape(-1, 3).mean(axis=0)
        assert np.abs(small[y, x] - mean).max() <= 0.51
    monkeypatch.setattr(lite, "MAX_PIXELS", 1000)
    assert windows.whole(path).shape == (2050, 1030, 3)


LZW = io.BytesIO()
Image.fromarray(COLOR).save(LZW, "TIFF", compression="tiff_lzw")


def test_other_compressions_need_imagecodecs(tmp_path):
    path = tmp_path / "a.tif"
    path.write_bytes(LZW.getvalue())
    opened = windows.TiffWindows(path)
    if importlib.util.find_spec("imagecodecs"):
        np.testing.assert_array_equal(opened.read(5, 5, 90, 90), COLOR[5:95, 5:95])
    else:
        with pytest.raises(InputError, match="needs imagecodecs: pip install imagecodecs"):
            opened.read(0, 0, 9, 9)


def tagged(path, **tags):
    """The file with other values of tags of its first page."""
    with tifffile.TiffFile(path, mode="r+") as file:
        for name, value in tags.items():
            file.pages.first.tags[name].overwrite(value)
    return path


BAD = {
    "ImageWidth": (4_000_000_000, "limit is"),
    "ImageLength": (60_000, "damaged: .* of .* tiles"),
    "TileWidth": (2**31 - 16, "pieces of"),
    "Compression": (4242, "damaged, or of a kind"),
    "BitsPerSample": ((8, 8, 4), "damaged|pixels of"),
    "PhotometricInterpretation": (5, "not RGB or gray"),
    "TileByteCounts": ([2**31] * 20, "tile or strip of|cut short"),
    "TileOffsets": ([2**31] * 20, "cut short|damaged"),
}


@pytest.mark.parametrize("tag", BAD)
def test_hostile_tags_are_one_line(tag, tmp_path):
    value, match = BAD[tag]
    path = tagged(write(tmp_path / "a.tif", COLOR, tile=(64, 64), compression="zlib", **RGB), **{tag: value})
    with pytest.raises(InputError, match=match) as caught:
        windows.TiffWindows(path).read(0, 0, 100, 100)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_every_cut_of_a_file_is_one_line_or_the_pixels(tmp_path):
    whole = write(tmp_path / "a.tif", COLOR, tile=(64, 64), compression="zlib", **RGB).read_bytes()
    path, failed = tmp_path / "b.tif", 0
    for length in (0, 3, 8, 20, 100, 200, 400, 700, 1500, *range(3000, len(whole), 20000)):
        path.write_bytes(whole[:length])
        try:
            np.testing.assert_array_equal(windows.TiffWindows(path).read(0, 0, 203, 317), COLOR)
        except InputError as error:
            failed += "b.tif: " in str(error)
    assert failed >= 9
    path.write_bytes(whole[:-1000] + RNG.bytes(1000))
    with pytest.raises(InputError, match=r"b\.tif: damaged"):
        windows.TiffWindows(path).read(0, 0, 203, 317)


def test_packbits(tmp_path):
    Image.fromarray(COLOR).save(tmp_path / "a.tif", compression="packbits")
    np.testing.assert_array_equal(windows.TiffWindows(tmp_path / "a.tif").read(5, 5, 90, 90), COLOR[5:95, 5:95])


def test_a_tile_that_unpacks_to_far_more_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(windows, "_MAX_UNPACKED", 2**20)
    path = write(tmp_path / "a.tif", np.zeros((64, 64), np.uint8), tile=(64, 64), compression="zlib")
    bomb = zlib.compress(bytes(2**24), 9)
    with open(path, "ab") as file:
        at = file.seek(0, 2)
        file.write(bomb)
    tagged(path, TileOffsets=[at], TileByteCounts=[len(bomb)])
    with pytest.raises(InputError, match="holds more than its pixels"):
        windows.TiffWindows(path).read(0, 0, 64, 64)


SCRIPT = """
import resource, sys, json
import numpy as np
from polarmask_tf.inference.predictor import Predictor
from polarmask_tf.inference.tiling import tiled

def run(images):
    rows = []
    for image in images:  # a square around what is bright
        y, x = np.nonzero(image[..., 0] > 100)
        box = [x.min(), y.min(), x.max() + 1, y.max() + 1] if len(x) else []
        ring = np.float32([[[box[i], box[j]] for i, j in ((0, 1), (2, 1), (2, 3), (0, 3))]] if box else []).reshape(-1, 4, 2)
        count = len(ring)
        boxes = np.float32([box] if box else []).reshape(-1, 4)
        ones = np.ones(count, np.float32)
        rows.append({"scores": ones, "classes": np.zeros(count, np.int32), "boxes": boxes, "polygons": ring})
    return rows

before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
found = tiled(Predictor("run", [{"name": "a", "category_id": 1}], (512, 512), 4, run), 512, 64)(sys.argv[1])
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert "tensorflow" not in sys.modules
print(json.dumps([found.image_size, found.boxes.tolist(), found.source, (after - before) // 1024]))
"""


@pytest.mark.parametrize("stored", [{"tile": (1024, 1024)}, {"rowsperstrip": 32}], ids=["tiles", "strips"])
def test_memory_is_that_of_tiles_and_not_of_the_picture(stored, tmp_path):
    side, square = 20_000, (9_990, 10_300, 10_090, 10_400)  # y, x, y, x: on a seam of tiles
    high, wide = stored["tile"] if "tile" in stored else (stored["rowsperstrip"], side)

    def pieces():
        for top in range(0, side, high):
            for left in range(0, side, wide):
                piece = np.zeros((high, wide), np.uint8)
                y1, x1, y2, x2 = np.subtract(square, (top, left) * 2).clip(0)
                piece[y1:y2, x1:x2] = 200
                yield zlib.compress(piece, 1)

    path = tmp_path / "large.tif"
    tifffile.imwrite(path, pieces(), shape=(side, side), dtype=np.uint8, compression="zlib", **stored)
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(path)], capture_output=True, text=True, check=True)
    size, boxes, source, grown = json.loads(done.stdout)
    assert size == [side, side] and source == str(path)
    assert boxes == [[10_300.0, 9_990.0, 10_400.0, 10_090.0]]
    assert grown < 300  # MB; the picture has 1,200 as RGB
