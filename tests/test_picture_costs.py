"""Pictures of which little is pixels: what Pillow goes through in Python beside them has bounds, and real ones are below."""

import io
import struct

import numpy as np
import pytest
import tifffile
from PIL import Image

from polarmask_tf import lite
from polarmask_tf.data import windows
from polarmask_tf.data.sources.folder import Folder

MANY = lite.MAX_CHUNKS + 1


def saved(format, mode="RGB", **options):
    file = io.BytesIO()
    Image.new(mode, (32, 16), 7).save(file, format, **options)
    return file.getvalue()


def tiff(strips=1, extra=(), big=False, order="<", height=16, rows=None):
    """A TIFF of 32 gray columns; `extra` are further tags (number, type, count, offset)."""
    word, wide = ("Q", 8) if big else ("I", 4)
    body = bytearray((b"II" if order == "<" else b"MM") + struct.pack(f"{order}H", 43 if big else 42))
    body += struct.pack(f"{order}HHQ", 8, 0, 0) if big else bytes(4)
    pixels, sizes = len(body), 0
    body += bytes(32 * 16)
    places = len(body)
    body += struct.pack(f"{order}I", pixels) * strips
    sizes = len(body)
    body += struct.pack(f"{order}I", 32 * 16 // min(strips, 16)) * strips
    one = strips == 1
    tags = [(256, 4, 1, 32), (257, 4, 1, height), (258, 4, 1, 8), (259, 4, 1, 1), (262, 4, 1, 1), (277, 4, 1, 1)]
    tags += [(273, 4, strips, pixels if one else places), (279, 4, strips, 512 if one else sizes)]
    tags += [(278, 4, 1, rows or 16 // min(strips, 16))]
    tags = sorted([*tags, *extra])
    directory = len(body)
    body += struct.pack(f"{order}{'Q' if big else 'H'}", len(tags))
    for number, type, count, value in tags:
        value = struct.pack(f"{order}I" if 4 * count <= wide else f"{order}{word}", value)
        body += struct.pack(f"{order}HH{word}", number, type, count) + value.ljust(wide, b"\0")
    body += bytes(wide)
    body[8 if big else 4 : (8 if big else 4) + wide] = struct.pack(f"{order}{word}", directory)
    return bytes(body)


def gif(*blocks, between=b""):
    """Frames with `blocks` before the first and `between` before the second."""
    whole = saved("GIF", "P")
    start = whole.index(b",", 13)
    frame = whole[start:-1]
    return whole[:start] + b"".join(blocks) + frame + between + frame + b";"


COMMENT = b"!\xfe\x01c\0"
JP2 = saved("JPEG2000")
HEADER = JP2.index(b"jp2h") - 4
HEADER_SIZE = int.from_bytes(JP2[HEADER : HEADER + 4], "big")
BOXES = struct.pack(">I4s", 8, b"free") * MANY
J2K = saved("JPEG2000", no_jp2=True)
SIZE_ENDS = 4 + int.from_bytes(J2K[4:6], "big")
COSTLY = {
    "strips": (lambda: tiff(lite.MAX_STRIPS + 1), "strips or tiles"),
    "strips of a BigTIFF": (lambda: tiff(lite.MAX_STRIPS + 1, big=True, order=">"), "strips or tiles"),
    "tags that overlap": (lambda: tiff(1, [(40000 + n, 2, 500, 8) for n in range(20)]), "tags of more bytes"),
    "comments": (lambda: gif(COMMENT * MANY), "more blocks"),
    "a comment of many blocks": (lambda: gif(b"!\xfe" + b"\x01c" * MANY + b"\0"), "more blocks"),
    "comments before the second frame": (lambda: gif(between=COMMENT * MANY), "more blocks"),
    "no blocks": (lambda: gif(b"\0" * MANY), "more blocks"),
    "boxes": (lambda: JP2[:12] + BOXES + JP2[12:], "boxes"),
    "boxes in the header": (
        lambda: JP2[:HEADER] + struct.pack(">I4s", HEADER_SIZE + len(BOXES), b"jp2h") + BOXES + JP2[HEADER + 8 :],
        "boxes",
    ),
    "markers": (lambda: J2K[:SIZE_ENDS] + b"\xff\x63\0\2" * MANY + J2K[SIZE_ENDS:], "segments"),
}


@pytest.mark.parametrize("name", COSTLY)
def test_what_costs_minutes_is_refused_before_pillow_sees_it(name):
    make, said = COSTLY[name]
    content = make()
    with pytest.raises(ValueError, match=said):
        lite.check_blocks(io.BytesIO(content))
    with pytest.raises(ValueError, match=said):
        lite.read_image(content)


@pytest.mark.parametrize(("big", "order"), [(False, "<"), (False, ">"), (True, "<")])  # the fourth Pillow does not read
@pytest.mark.parametrize("strips", [1, 4, 16])
def test_ordinary_tiffs_are_read(strips, big, order):
    assert lite.read_image(tiff(strips, big=big, order=order)).shape == (16, 32, 3)


@pytest.mark.parametrize("options", [{}, {"bigtiff": True}, {"tile": (16, 16), "compression": "zlib"}, {"byteorder": ">"}])
def test_tiffs_of_tifffile_are_read(options):
    pixels = np.random.default_rng(0).integers(0, 255, (3, 40, 50), np.uint8)
    file = io.BytesIO()
    tifffile.imwrite(file, pixels, photometric="minisblack", metadata={"axes": "ZYX"}, **options)
    assert (lite.read_image(file.getvalue())[..., 0] == pixels[0]).all()


def test_ordinary_gifs_and_jpeg2000s_are_read():
    frames = [Image.effect_noise((60, 40), 60).convert("P") for _ in range(3)]
    file = io.BytesIO()
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:], comment=b"c" * 1000)
    assert lite.read_image(file.getvalue()).shape == (40, 60, 3)
    assert lite.read_image(gif(COMMENT)).shape == lite.read_image(JP2).shape == lite.read_image(J2K).shape == (16, 32, 3)


def test_a_large_tiff_of_many_tiles_is_still_read_by_windows(tmp_path):
    path = tmp_path / "large.tif"
    path.write_bytes(tiff(lite.MAX_STRIPS + 1, height=100 * (lite.MAX_STRIPS + 1), rows=100))
    assert windows.is_large_tiff(path)
    assert Folder(tmp_path, most_pixels=2**32).size("large.tif") == (32, 100 * (lite.MAX_STRIPS + 1))
