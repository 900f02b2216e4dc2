"""data/pictures.py: what is stored of a picture is what `predict` sees of its file, whoever wrote it and however it is read."""

import io

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from polarmask_tf import lite
from polarmask_tf.data import pictures
from polarmask_tf.data.convert import Options
from polarmask_tf.data.report import Report, Unusable

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (30, 41, 3), np.uint8)
GRAY16 = RNG.integers(0, 2**16, (30, 41)).astype(np.uint16)


def sixteen(order):
    return Image.frombytes({">": "I;16B", "<": "I;16"}[order], (41, 30), GRAY16.astype(f"{order}u2").tobytes())


def palette():
    image = Image.fromarray(RGB).quantize(200)
    image.info["transparency"] = 5
    return image


FILES = {
    "rgb.png": lambda: Image.fromarray(RGB),
    "gray.png": lambda: Image.fromarray(RGB[..., 0]),
    "bits.png": lambda: Image.fromarray(RGB[..., 0]).convert("1"),
    "palette.png": palette,
    "alpha.png": lambda: Image.fromarray(RNG.integers(0, 256, (30, 41, 4), np.uint8)),
    "gray alpha.png": lambda: Image.fromarray(RGB[..., :2], "LA"),
    "sixteen.png": lambda: sixteen("<"),
    "rgb.jpg": lambda: Image.fromarray(RGB),
    "gray.jpg": lambda: Image.fromarray(RGB[..., 0]),
    "cmyk.jpg": lambda: Image.fromarray(RGB).convert("CMYK"),
    "rgb.bmp": lambda: Image.fromarray(RGB),
    "rgb.gif": lambda: Image.fromarray(RGB),
    "rgb.webp": lambda: Image.fromarray(RGB),
    "rgb.ppm": lambda: Image.fromarray(RGB),
    "rgb.tif": lambda: Image.fromarray(RGB),
    "big endian.tif": lambda: sixteen(">"),
    "little endian.tif": lambda: sixteen("<"),
}
RE_ENCODED = {"sixteen.png", "cmyk.jpg"} | {name for name in FILES if not name.endswith(("png", "jpg"))}


def stored(path, size=(41, 30), **options):
    report = Report()
    return *pictures.stored(path, size, Options(**options), report, "here"), report


def written(folder, name):
    path = folder / name
    FILES[name]().save(path)
    return path


@pytest.mark.parametrize("name", FILES)
def test_stored_are_the_pixels_that_predict_sees(tmp_path, name):
    path = written(tmp_path, name)
    expected = lite.read_image(path)
    encoded, format, _ = stored(path)
    assert (encoded != path.read_bytes()) == (name in RE_ENCODED)
    assert format == ("jpeg" if name in ("rgb.jpg", "gray.jpg") else "png")
    np.testing.assert_array_equal(lite.read_image(io.BytesIO(encoded)), expected)
    seen = tf.io.decode_image(encoded, channels=3, expand_animations=False).numpy()
    if format == "jpeg":  # a decoder of its own
        assert np.abs(seen.astype(int) - expected).max() < 40 and np.abs(seen.astype(int) - expected).mean() < 2
    else:
        np.testing.assert_array_equal(seen, expected)


@pytest.mark.parametrize("name", FILES)
def test_decoded_pictures_are_read_alike_by_all(tmp_path, name):
    path = written(tmp_path, name)
    encoded, format, _ = stored(path, decoded=True)
    assert format == "bmp" and len(encoded) == 54 + 30 * 124  # rows of 4 bytes
    for pixels in (lite.read_image(io.BytesIO(encoded)), tf.io.decode_image(encoded, 3, expand_animations=False).numpy()):
        np.testing.assert_array_equal(pixels, lite.read_image(path))


@pytest.mark.parametrize("name", ["big endian.tif", "little endian.tif", "sixteen.png"])
def test_twelve_bits_in_sixteen_are_told(tmp_path, name, monkeypatch):
    monkeypatch.setitem(globals(), "GRAY16", (GRAY16 >> 4).astype(np.uint16))
    path = written(tmp_path, name)
    encoded, _, report = stored(path)
    ((reason, (count, where)),) = report.notes.items()
    assert "few gray levels are left" in reason and "--bit-depth" in reason and (count, where) == (1, "here")
    encoded, _, report = stored(path, bit_depth=12)
    assert not report.notes
    np.testing.assert_array_equal(lite.read_image(io.BytesIO(encoded)), lite.read_image(path, bit_depth=12))
    assert lite.read_image(io.BytesIO(encoded)).max() > 250


def test_what_a_record_cannot_hold_is_unusable(tmp_path):
    with open(tmp_path / "large.jpg", "wb") as file:
        file.truncate(2**30)  # without a byte on the disk
    (tmp_path / "text.tif").write_text("no picture")
    Image.fromarray(RGB).save(tmp_path / "other.tif")
    for name, size, reason in (
        ("large.jpg", (41, 30), "unreadable image file"),
        ("text.tif", (41, 30), "corrupt or truncated"),
        ("other.tif", (41, 31), "size mismatch"),
    ):
        with pytest.raises(Unusable, match=reason) as error:
            stored(tmp_path / name, size)
        assert bool(error.value.detail) == ("corrupt" in reason)  # what the reader says
