import hashlib
import io
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import tracemalloc
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from helpers.exports import CLASSES, HEIGHT, RADIUS, WIDTH, damaged_images, make_exports, metadata, spot
from helpers.vulkan import no_device
from polarmask_tf import lite


@pytest.fixture(scope="session")
def tflite(tmp_path_factory):
    return make_exports(tmp_path_factory.mktemp("exports"))["tflite"]


def test_polygons_are_in_pixels_of_a_larger_image(tflite):
    found = lite.PolarMaskLite(tflite)(spot(64, 96, x=60, y=20, size=2))  # exactly twice the canvas
    assert found["scores"] == pytest.approx([0.9, 0.4])
    assert found["classes"].tolist() == [1, 0] and found["classes"].dtype == np.int32
    r, h = 2 * RADIUS, 2 * RADIUS * np.sqrt(3) / 2
    hexagon = [(r, 0), (r / 2, h), (-r / 2, h), (-r, 0), (-r / 2, -h), (r / 2, -h)]
    np.testing.assert_allclose(found["polygons"][0], np.add(hexagon, (61, 21)), atol=1e-3)
    np.testing.assert_allclose(found["boxes"][0], (61 - r, 21 - h, 61 + r, 21 + h), atol=1e-3)
    assert found["polygons"].shape == (2, 6, 2)


@pytest.mark.parametrize("height, width", [(96, 64), (200, 48), (11, 100), (9, 7), (32, 48)])
def test_any_shape_of_image_is_fitted_and_undone(tflite, height, width):
    scale = min(HEIGHT / height, WIDTH / width)
    size = max(3, round(3 / scale))
    x, y = width - size - 1, height // 2 - size // 2  # beside the right edge: a wrong padding or scale would show
    found = lite.PolarMaskLite(tflite)(spot(height, width, x, y, size))
    center = found["polygons"][1].clip((0, 0), (width, height)).mean(axis=0)
    assert np.abs(center - (x + size / 2, y + size / 2)).max() <= size / 2 + 1 / scale
    assert (found["polygons"] >= 0).all() and (found["polygons"] <= (width, height)).all()
    left, right = found["polygons"][0, :, 0].min(), found["polygons"][0, :, 0].max()
    fitted = max(1, round(width * scale))
    assert right - left == pytest.approx(min(width, center[0] + RADIUS * width / fitted) - left, abs=size + 1 / scale)


def test_coordinates_are_clipped_to_the_image_not_to_the_canvas(tflite):
    found = lite.PolarMaskLite(tflite)(spot(64, 24, x=22, y=30, size=2))  # fills 12 of 48 columns of the canvas
    assert found["polygons"][0, :, 0].max() == 24 and found["boxes"][0, 2] == 24


def test_letterbox_keeps_ratio_and_puts_zeros_elsewhere():
    canvas, back = lite.letterbox(np.full((10, 40, 3), 200, np.uint8), 32, 20)
    assert canvas.shape == (32, 20, 3)
    assert (canvas[:5] == 200).all() and (canvas[5:] == 0).all()
    assert back == (2, 2)


def test_letterbox_resizes_with_antialias_about_pixel_centers():
    ramp = np.repeat(np.repeat(np.arange(0, 240, 4, dtype=np.uint8)[None, :, None], 60, 0), 3, 2)
    canvas, _ = lite.letterbox(ramp, 30, 30)
    np.testing.assert_allclose(canvas[15, 2:-2, 0], (np.arange(2, 28) * 2 + 0.5) * 4, atol=1)
    checkers = np.repeat((np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)[..., None], 3, 2)
    canvas, _ = lite.letterbox(checkers, 16, 16)
    assert np.abs(canvas.astype(int) - 127).max() <= 2  # sampling without a filter would give 0 and 255


def test_letterbox_of_a_sliver_keeps_one_pixel():
    canvas, back = lite.letterbox(np.full((1000, 1, 3), 9, np.uint8), 32, 32)
    assert (canvas[:, 0] == 9).all() and (canvas[:, 1:] == 0).all() and back == (1, 1000 / 32)


def resized(tflite, path, resize):
    """The same model with another way to resize in its metadata."""
    return with_metadata(tflite, path, metadata(resize=resize))


@pytest.mark.parametrize("height, width", [(96, 64), (16, 48), (64, 24)])
def test_a_stretched_image_fills_the_canvas_and_each_axis_is_undone(tflite, tmp_path, height, width):
    model = lite.PolarMaskLite(resized(tflite, tmp_path / "a.tflite", "stretch"))
    wide, high = width / WIDTH, height / HEIGHT  # pixels of the image in one of the canvas
    x, y = width - 8, height - 8
    found = model(spot(height, width, x, y, size=8))
    polygon = found["polygons"][1]  # the smaller one
    center_x, center_y = polygon[0] - (RADIUS / 2 * wide, 0)  # ray 0 points along +x
    assert x - wide <= center_x <= width and y - high <= center_y <= height
    tall = RADIUS / 2 * np.sqrt(3) / 2 * high
    assert polygon[3, 0] == pytest.approx(center_x - RADIUS / 2 * wide)
    assert polygon[4, 1] == pytest.approx(center_y - tall) and polygon[1, 1] == pytest.approx(min(height, center_y + tall))


def test_stretching_leaves_no_padding_and_blends_within_each_axis():
    ramp = np.repeat(np.arange(0, 240, 4, dtype=np.uint8)[None, :, None], 10, 0).repeat(3, 2)  # 10 x 60
    canvas, back = lite.letterbox(ramp, 40, 30, stretch=True)
    assert canvas.shape == (40, 30, 3) and back == (2, 0.25)
    np.testing.assert_allclose(canvas[:, 2:-2, 0], np.tile((np.arange(2, 28) * 2 + 0.5) * 4, (40, 1)), atol=1)


def test_the_metadata_says_whether_to_letterbox(tflite, tmp_path):
    image = spot(64, 24, x=10, y=30, size=2)
    expected = lite.PolarMaskLite(tflite)(image)
    for key, value in lite.PolarMaskLite(resized(tflite, tmp_path / "a.tflite", "letterbox"))(image).items():
        np.testing.assert_array_equal(value, expected[key])
    with pytest.raises(ValueError, match=r"metadata\.json"):  # of a later version, perhaps
        lite.PolarMaskLite(resized(tflite, tmp_path / "b.tflite", "crop"))


GRADIENT = np.arange(12, dtype=np.uint8).reshape(3, 4) * 20


@pytest.mark.parametrize(
    "name, picture, expected",
    [
        ("gray.png", lambda: Image.fromarray(GRADIENT), GRADIENT),
        ("sixteen.png", lambda: Image.fromarray(GRADIENT.astype(np.uint16) * 257), GRADIENT),
        ("sixteen.tif", lambda: Image.fromarray(GRADIENT.astype(np.uint16) * 256 + 255), GRADIENT),
        ("int.tif", lambda: Image.fromarray(GRADIENT.astype(np.int32) * 257), GRADIENT),
        ("bits.png", lambda: Image.fromarray(GRADIENT > 100), np.where(GRADIENT > 100, 255, 0)),
        ("palette.png", lambda: Image.fromarray(GRADIENT).convert("RGB").quantize(64), GRADIENT),
        ("alpha.png", lambda: Image.merge("LA", [Image.fromarray(GRADIENT), Image.fromarray(GRADIENT)]), GRADIENT),
        ("rgba.png", lambda: Image.merge("RGBA", [Image.fromarray(GRADIENT)] * 4), GRADIENT),
        ("cmyk.tif", lambda: Image.merge("CMYK", [Image.fromarray(255 - GRADIENT)] * 3 + [Image.new("L", (4, 3))]), GRADIENT),
    ],
)
def test_every_kind_of_image_file_becomes_rgb(tmp_path, name, picture, expected):
    picture().save(tmp_path / name)
    image = lite.read_image(tmp_path / name)
    assert image.dtype == np.uint8 and image.shape == (3, 4, 3)
    np.testing.assert_array_equal(image, np.repeat(expected[..., None], 3, -1))


def test_sixteen_bit_gray_reads_as_tensorflow_does(tmp_path):
    import tensorflow as tf

    values = np.random.default_rng(0).integers(0, 65536, (5, 7)).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    decoded = tf.io.decode_png((tmp_path / "a.png").read_bytes(), channels=3).numpy()
    np.testing.assert_array_equal(lite.read_image(tmp_path / "a.png"), decoded)


def test_exif_rotation_is_not_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # "rotate by 90 degrees to show"
    Image.new("RGB", (40, 20)).save(tmp_path / "a.jpg", exif=exif)
    assert lite.read_image(tmp_path / "a.jpg").shape == (20, 40, 3)


@pytest.mark.parametrize("value", range(1, 9))
@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.tif"])
def test_exif_rotation_is_applied_on_request(tmp_path, value, name):
    exif = Image.Exif()
    exif[0x0112] = value
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3, 3), np.uint8).repeat(8, 0).repeat(8, 1)
    Image.fromarray(pixels).save(tmp_path / name, exif=exif)
    notes = []
    as_stored = lite.read_image(tmp_path / name, notes=notes)
    assert as_stored.shape == (16, 24, 3) and notes == ["EXIF orientation ignored"] * (value > 1)
    assert name == "a.jpg" or (as_stored == pixels).all()
    turned = lite.read_image(tmp_path / name, exif="apply", notes=(quiet := []))
    with Image.open(tmp_path / name) as image:
        np.testing.assert_array_equal(turned, np.asarray(ImageOps.exif_transpose(image)))
        np.testing.assert_array_equal(np.asarray(lite.oriented(image)), turned)
    assert not quiet and (turned.shape == (24, 16, 3)) == (value > 4)
    with pytest.raises(ValueError, match="exif is 'turn'"):
        lite.read_image(tmp_path / name, exif="turn")


def test_broken_exif_data_are_none(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.jpg", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff broken")
    assert lite.read_image(tmp_path / "a.jpg", exif="apply").shape == (4, 4, 3)


DEEP = np.array([[0, 1, 255, 256], [4095, 2048, 17, 1000]])


@pytest.mark.parametrize("dtype", ["<u2", ">u2", "<i4", "<f4"])
def test_deep_gray_reads_alike_however_it_is_stored(tmp_path, dtype):
    """As ImageJ writes it (big-endian), as others do, with 16 and 32 bits: the upper 8 of the bits that are used."""
    path = tmp_path / "a.tif"
    Image.fromarray((DEEP * 16).astype(dtype)).save(path)
    if dtype != "<f4":
        np.testing.assert_array_equal(lite.read_image(path)[..., 1], DEEP * 16 // 256)
    np.testing.assert_array_equal(lite.read_image(path, bit_depth=16)[..., 2], DEEP * 16 // 256)
    Image.fromarray(DEEP.astype(dtype)).save(path)
    notes = []
    np.testing.assert_array_equal(lite.read_image(path, bit_depth=12, notes=notes)[..., 0], DEEP // 16)
    assert not notes
    with pytest.raises(ValueError, match="pixels from 0 to 4095, beyond the 11 bits of the bit depth"):
        lite.read_image(path, bit_depth=11)
    if dtype != "<f4":
        np.testing.assert_array_equal(lite.read_image(path, notes=notes)[..., 0], DEEP // 256)
        assert len(notes) == 1 and "12" in notes[0]


@pytest.mark.parametrize("dtype", ["<u2", ">u2", "<i4"])
@pytest.mark.parametrize(("most", "depth", "advice"), [(200, None, "--bit-depth 8 keeps it"), (15, 12, "--bit-depth 8")])
def test_gray_of_which_nothing_but_black_is_left_is_told(tmp_path, dtype, most, depth, advice):
    Image.fromarray(np.array([[0, most // 2], [most, 3]]).astype(dtype)).save(tmp_path / "a.tif")
    notes = []
    assert not lite.read_image(tmp_path / "a.tif", bit_depth=depth, notes=notes).any()
    assert len(notes) == 1 and "all of it becomes black" in notes[0] and advice in notes[0]
    assert lite.read_image(tmp_path / "a.tif", bit_depth=8, notes=(quiet := []))[..., 0].max() == most and not quiet
    Image.fromarray(np.zeros((2, 2)).astype(dtype)).save(tmp_path / "a.tif")  # which was black before
    lite.read_image(tmp_path / "a.tif", bit_depth=depth, notes=(quiet := []))
    assert not quiet


def test_floats_from_0_to_1_are_refused_whatever_the_bit_depth(tmp_path):
    Image.fromarray(np.float32([[0, 0.5], [1, 0.25]])).save(tmp_path / "a.tif")
    for depth in (8, 16):
        with pytest.raises(ValueError, match="floating-point pixels from 0 to 1"):
            lite.read_image(tmp_path / "a.tif", bit_depth=depth)


@pytest.mark.parametrize("value", [-1, 65536, 2**31 - 1, float("nan"), float("inf")])
def test_pixels_beyond_the_bit_depth_are_refused_not_clipped(tmp_path, value):
    pixels = np.full((3, 3), 7, np.float32 if isinstance(value, float) else np.int32)
    pixels[1, 1] = value
    Image.fromarray(pixels).save(tmp_path / "a.tif")
    with pytest.raises(ValueError, match="beyond the 16 bits") as error:
        lite.read_image(tmp_path / "a.tif", bit_depth=16)
    assert "a.tif" in one_line(error)


def test_a_bit_depth_changes_nothing_for_eight_bits_and_is_refused_for_deep_colors(tmp_path):
    Image.fromarray(GRADIENT).save(tmp_path / "a.png")
    np.testing.assert_array_equal(lite.read_image(tmp_path / "a.png", bit_depth=12)[..., 0], GRADIENT)
    rows = b"".join(b"\0" + np.arange(9, dtype=">u2").tobytes() for _ in range(2))  # 16 bits a channel, 3 x 2 pixels
    parts = ((b"IHDR", struct.pack(">IIBBBBB", 3, 2, 16, 2, 0, 0, 0)), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    chunks = (struct.pack(">I", len(c)) + n + c + struct.pack(">I", zlib.crc32(n + c)) for n, c in parts)
    content = b"\x89PNG\r\n\x1a\n" + b"".join(chunks)
    assert lite.read_image(content, notes=(notes := [])).shape == (2, 3, 3)
    assert notes == ["16-bit colors of at most 12 bits: few levels are left; save it with 8 bits"]
    with pytest.raises(ValueError, match="the image: cannot read the image: 16-bit colors"):
        lite.read_image(content, bit_depth=12)
    for depth in (7, 17, 12.5, "12"):
        with pytest.raises(ValueError, match="bit_depth is"):
            lite.read_image(content, bit_depth=depth)


def test_paths_bytes_files_and_pictures_read_alike(tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(GRADIENT).convert("P").save(path)
    expected = lite.read_image(path)
    with open(path, "rb") as file:
        others = [str(path), path.read_bytes(), file, Image.open(path), io.BytesIO(path.read_bytes())]
        for other in others:
            np.testing.assert_array_equal(lite.read_image(other), expected)


def test_a_large_picture_is_read_in_strips_that_fit_together():
    height, width = 2500, 3000
    y, x = np.indices((height, width))
    pixels = np.stack([x % 251, y % 241, (x + y) % 239], -1).astype(np.uint8)
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "BMP")
    assert height * width > 2**22
    np.testing.assert_array_equal(lite.read_image(content), pixels)


def test_a_path_gives_the_same_as_its_pixels(tflite, tmp_path):
    image = spot(50, 70, 30, 20, 4)
    Image.fromarray(image).save(tmp_path / "a.png")
    model = lite.PolarMaskLite(tflite)
    for key, value in model(image).items():
        np.testing.assert_array_equal(model(tmp_path / "a.png")[key], value)
        np.testing.assert_array_equal(model(str(tmp_path / "a.png"))[key], value)


def test_attributes(tflite):
    model = lite.PolarMaskLite(str(tflite), threads=2)
    assert model.labels == ["sun", "moon"] and model.classes == CLASSES and model.input_size == (HEIGHT, WIDTH)
    assert model.metadata["rays"] == 6


def one_line(error):
    text = str(error.value)
    return text if "\n" not in text and len(text) < 400 else pytest.fail(f"not one short line: {text!r}")


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((4, 4), np.uint8),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((4, 4, 3), np.float32),
        np.zeros((1, 4, 4, 3), np.uint8),
        np.zeros((0, 4, 3), np.uint8),
    ],
)
def test_wrong_arrays_are_refused(tflite, image):
    with pytest.raises(ValueError) as error:
        lite.PolarMaskLite(tflite)(image)
    assert str(list(image.shape)) in one_line(error)


def test_files_that_are_no_images_are_refused_in_one_line(tmp_path):
    for path in damaged_images(tmp_path):
        with pytest.raises(ValueError) as error:
            lite.read_image(path)
        assert str(path) in one_line(error)


def refused(source, expected, **options):
    with pytest.raises(ValueError) as error:
        lite.read_image(source, **options)
    assert expected in one_line(error)


def test_only_regular_files_of_bounded_size_are_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    with open(tmp_path / "sparse.jpg", "wb") as file:
        file.truncate(200 * 10**9)
    for path, expected in (
        (tmp_path / "pipe.jpg", "not a regular file, but a pipe or a device"),
        ("/dev/zero", "not a regular file"),
        ("/proc/self/status", "is empty"),  # so it says
        (tmp_path / "sparse.jpg", "200,000,000,000 bytes, and the limit is"),
        (tmp_path, "is a directory"),
        (tmp_path / "no\nsuch\x1b[31m.jpg", "such?[31m.jpg: cannot read the image: No such file"),
        ("a\0b.jpg", "a?b.jpg: cannot read the image"),
    ):
        refused(path, expected)
        with pytest.raises(ValueError, match=r"no \.tflite file with"):
            lite.PolarMaskLite(path)


@pytest.mark.parametrize("height, width", [(12_001, 10_000), (13_300, 13_300), (60_000, 60_000), (1, 2**31 - 1)])
def test_too_many_pixels_are_refused_by_the_header(height, width):
    """The first would decode; Pillow itself refuses the others, or thinks them bombs."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + b"IHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    tracemalloc.start()
    refused(b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 0) + b"IDAT" + bytes(4), "pixels")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10**7


def test_a_jpeg_of_hundreds_of_scans_is_refused():
    content = io.BytesIO()
    Image.fromarray(GRADIENT.repeat(8, 0).repeat(8, 1)).save(content, "JPEG", progressive=True)
    content = content.getvalue()
    assert lite.read_image(content).shape == (24, 32, 3)
    start = content.rindex(b"\xff\xda")
    refused(content[:start] + content[start:-2] * 101 + content[-2:], "scans, and the limit is 100")


def test_what_pillow_goes_through_in_python_is_bounded():
    """Each would take minutes, or grow with the square of its size."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    for format, block, most, what in (
        ("JPEG", b"\xff\xe1\0\x0aExif\0\0MM", lite.MAX_SEGMENTS, "segments before its pixels"),
        ("JPEG", b"\xff", lite.MAX_SEGMENTS, "segments before its pixels"),
        ("PNG", chunk(b"tEXt", b"key\0value"), lite.MAX_CHUNKS, "chunks"),
    ):
        content = io.BytesIO()
        Image.fromarray(GRADIENT).save(content, format)
        content, at = content.getvalue(), 2 if format == "JPEG" else 33
        assert lite.read_image(content[:at] + block * 20 + content[at:]).shape == (3, 4, 3)
        refused(content[:at] + block * most + content[at:], f"more than {most:,} {what}")
    assert lite.read_image(b"P5 #a comment\n4 3 255\n" + bytes(12)).shape == (3, 4, 3)
    refused(b"P5 #" + b"-" * lite.MAX_HEADER_BYTES + b"\n4 3 255\n" + bytes(12), "EOF while reading header")
    refused(b"P6 4000 4000 1000\n" + bytes(100), "PPM of 16,000,000 pixels, and the limit of this slow kind is 10,000,000")
    refused(b"qoif" + struct.pack(">IIBB", 4000, 4000, 3, 0), "QOI of 16,000,000 pixels")


def test_no_program_is_run_for_postscript(tmp_path, monkeypatch):
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path / 'ran'}\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    (tmp_path / "photo.jpg").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 10\n%%EndComments\nshowpage\n%%EOF\n")
    with Image.open(tmp_path / "photo.jpg") as image:
        assert image.format == "EPS"  # Pillow alone would take it for a picture
    refused(tmp_path / "photo.jpg", "not an image that can be read")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", lite.FORMATS)
def test_every_format_that_is_named_is_read(tmp_path, name):
    content = io.BytesIO()
    if name == "SUN":  # which Pillow reads alone: a header of eight numbers, and rows of blue, green, red
        content.write(struct.pack(">8I", 0x59A66A95, 40, 30, 24, 40 * 30 * 3, 1, 0, 0) + bytes((90, 20, 200)) * 40 * 30)
    else:
        Image.new("RGB", (40, 30), (200, 20, 90)).save(content, name)
    assert np.abs(lite.read_image(content.getvalue()).astype(int) - (200, 20, 90)).max() <= 8


def with_metadata(tflite, path, described, compress_type=zipfile.ZIP_STORED):
    """The same network with another metadata.json: a dict, or bytes."""
    whole = tflite.read_bytes()
    path.write_bytes(whole[: whole.index(b"PK\x03\x04")])
    with zipfile.ZipFile(path, "a", compress_type) as archive:
        archive.writestr("metadata.json", described if isinstance(described, bytes) else json.dumps(described))
    return path


def refused_model(path, expected):
    with pytest.raises(ValueError) as error:
        lite.PolarMaskLite(path)
    text = one_line(error)
    assert text.startswith(f"{path}: ") and expected in text


RAW = {"ray_units": {"3": 8.0}, "ray_limit": 20, "score_threshold": 0.05, "candidates": 100, "nms_iou": 0.5}
RAW |= {"max_detections": 10, "multi_label": False}


@pytest.mark.parametrize(
    "change, expected",
    [
        ({"classes": []}, "names no classes"),
        ({"classes": "sun"}, "string indices"),
        ({"classes": [{"name": 3, "category_id": 3}]}, "names no classes"),
        ({"classes": [{"name": "a", "category_id": 1.5}]}, "category_id is 1.5"),
        ({"classes": [{"name": "a", "category_id": True}]}, "category_id is True"),
        ({"classes": [{"name": "a", "category_id": 1}, {"name": "b", "category_id": 1}]}, "a category_id is given twice"),
        ({"classes": [{"name": "a", "category_id": 1}]}, "a class beyond the 1 that metadata.json names"),
        ({"input": None}, "'get'"),
        ({"input": {"height": 0, "width": 48}}, "height is 0"),
        ({"input": {"height": 32, "width": 10**9}}, "width is 1000000000"),
        ({"input": {"height": 32, "width": "48"}}, "width is '48'"),
        ({"input": {"height": 32, "width": 64}}, "the network takes [1, 32, 48, 3], and metadata.json says [1, 32, 64, 3]"),
        ({"input": {"height": 32, "width": 48, "resize": "short_side"}}, "one input size"),
        ({"format": "polarmask_tf/2"}, "another version"),
        ({"rays": 7}, "detection_polygons is [1, 3, 6, 2], expected [1, 3, 7, 2]"),
        ({"rays": 0}, "rays is 0"),
        ({"max_detections": 2}, "more detections than there may be"),
        ({"max_detections": 10**9}, "max_detections is 1000000000"),
        ({"raw": []}, "list indices"),
        ({"raw": {**RAW, "ray_units": [5]}}, "index out of range"),
        ({"raw": {**RAW, "ray_units": {"3": "x"}}}, "3 is 'x'"),
        ({"raw": {**RAW, "ray_units": {"x": 1}}}, "invalid literal"),
        ({"raw": {**RAW, "candidates": 10**12}}, "candidates is"),
        ({"raw": {**RAW, "nms_iou": float("nan")}}, "nms_iou is nan"),
        ({"raw": {**RAW, "multi_label": 1.0}}, "multi_label is 1.0"),
        ({"raw": RAW}, "damaged"),  # the network has no such outputs
        ({"raw": {**RAW, "ray_units": {}}}, "damaged"),
        ({"flatbuffer_sha256": "0" * 64}, "'flatbuffer_bytes' is missing"),
    ],
)
def test_metadata_must_fit_the_schema_and_the_network(tflite, tmp_path, change, expected):
    refused_model(with_metadata(tflite, tmp_path / "a.tflite", {**metadata(), **change}), expected)


@pytest.mark.parametrize("kind", [zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2])
def test_metadata_is_never_unpacked_beyond_its_bound(tflite, tmp_path, kind):
    path = with_metadata(tflite, tmp_path / "a.tflite", bytes(64 * 2**20), kind)
    assert path.stat().st_size < tflite.stat().st_size + 100_000
    tracemalloc.start()
    refused_model(path, "metadata.json is ")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 * 2**20


def test_the_metadata_may_say_the_bit_depth(tflite, tmp_path, capsys):
    described = metadata()
    described["input"]["bit_depth"] = 12
    path = with_metadata(tflite, tmp_path / "a.tflite", described)
    dark = spot(40, 60, 50, 5, 2)[..., 0].astype(np.uint16)
    Image.fromarray(dark * 16).save(tmp_path / "a.png")
    Image.fromarray(dark * 256).save(tmp_path / "b.png")
    expected = lite.PolarMaskLite(tflite)(tmp_path / "b.png")
    for key, value in lite.PolarMaskLite(path)(tmp_path / "a.png").items():
        np.testing.assert_array_equal(value, expected[key])
    with pytest.raises(ValueError, match="beyond the 12 bits"):
        lite.PolarMaskLite(path)(tmp_path / "b.png")
    assert lite.main([str(path), str(tmp_path / "b.png")]) == 2
    assert lite.main([str(path), str(tmp_path / "b.png"), "--bit-depth", "16"]) == 0
    assert capsys.readouterr().out.startswith("moon 0.900")
    described["input"]["bit_depth"] = 20
    refused_model(with_metadata(tflite, path, described), "bit_depth is 20")


@pytest.mark.parametrize(("classes", "labels"), [([0.3, 0.95], ["sun"]), ([0.45, 0.2], ["moon"])])
def test_the_metadata_may_say_what_is_worth_printing(tflite, tmp_path, capsys, classes, labels):
    path = with_metadata(tflite, tmp_path / "a.tflite", {**metadata(), "thresholds": {"overall": 0.5, "classes": classes}})
    Image.fromarray(spot(32, 48, 20, 10, 2)).save(tmp_path / "a.png")
    assert lite.main([str(path), str(tmp_path / "a.png")]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == labels
    assert lite.main([str(path), str(tmp_path / "a.png"), "--score", "0"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_metadata_deep_as_a_well_is_refused(tflite, tmp_path):
    refused_model(with_metadata(tflite, tmp_path / "a.tflite", b"[" * 100_000), "export it again")


def test_one_changed_bit_of_the_weights_is_found(tflite, tmp_path):
    size = tflite.read_bytes().index(b"PK\x03\x04")
    digest = lite.flatbuffer_digest(tflite, size)
    assert digest == hashlib.sha256(tflite.read_bytes()[:size]).hexdigest()
    described = {**metadata(), "flatbuffer_bytes": size, "flatbuffer_sha256": digest}
    path = with_metadata(tflite, tmp_path / "a.tflite", described)
    lite.PolarMaskLite(path)
    content = bytearray(path.read_bytes())
    content[size - 1] ^= 1
    path.write_bytes(content)
    refused_model(path, "checksum")
    refused_model(with_metadata(tflite, path, {**described, "flatbuffer_bytes": 10**9}), "checksum")
    refused_model(with_metadata(tflite, path, {**described, "flatbuffer_sha256": None}), "checksum")


@pytest.mark.parametrize("fit", ["letterbox", "stretch", "short_side"])
def test_the_fit_rule_by_hand(fit):
    expected = {
        ("letterbox", (100, 50)): ((64, 32), (64, 96)),
        ("letterbox", (50, 100)): ((48, 96), (64, 96)),
        ("stretch", (100, 50)): ((64, 96), (64, 96)),
        ("stretch", (50, 100)): ((64, 96), (64, 96)),
        ("short_side", (100, 50)): ((96, 48), (96, 64)),
        ("short_side", (50, 100)): ((48, 96), (64, 96)),
    }
    for size in ((100, 50), (50, 100)):
        assert lite.fit_sizes(*size, (64, 96), fit) == expected[fit, size]


def test_files_that_are_no_models_are_refused_in_one_line(tflite, tmp_path):
    whole = tflite.read_bytes()
    bare = whole[: whole.index(b"PK\x03\x04")]
    cases = {
        "text.tflite": (b"hello\n", "metadata.json"),
        "empty.tflite": (b"", "metadata.json"),
        "bare.tflite": (bare, "metadata.json"),
        "cut.tflite": (whole[: len(whole) // 2], "metadata.json"),
        "missing.tflite": (None, "No such file"),
    }
    for name, (content, expected) in cases.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError) as error:
            lite.PolarMaskLite(tmp_path / name)
        assert expected in one_line(error) and name in str(error.value)
    for number, text in enumerate(("not json", "[]", "{}", '{"classes": [{"nam": 1}], "input": {}}')):
        path = tmp_path / f"metadata{number}.tflite"
        path.write_bytes(bare)
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr("metadata.json", text)
        with pytest.raises(ValueError) as error:
            lite.PolarMaskLite(path)
        assert "metadata.json" in one_line(error)


def run_alone(folder, *arguments):
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)


def test_the_file_runs_alone_without_tensorflow(tflite, tmp_path):
    shutil.copy(lite.__file__, tmp_path / "lite.py")
    shutil.copy(tflite, tmp_path / "model.tflite")
    Image.fromarray(spot(64, 96, 60, 20, 2)).save(tmp_path / "image.png")
    script = (
        "import sys, lite\n"
        "assert lite.main(['model.tflite', 'image.png', '--score', '0']) == 0\n"
        "wrong = {name.split('.')[0] for name in sys.modules} & {'tensorflow', 'polarmask_tf', 'tf_keras', 'keras'}\n"
        "assert not wrong, wrong\n"
        "assert lite.__file__.startswith(sys.argv[1]), lite.__file__\n"
    )
    done = run_alone(tmp_path, "-c", script, str(tmp_path))
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split()[:2] for line in lines] == [["moon", "0.900"], ["sun", "0.400"]]
    assert lines[0].split()[2:4] == ["box", "53.0"] and "polygon 69.0,21.0 " in lines[0]

    done = run_alone(tmp_path, "lite.py", "model.tflite", "image.png", "--score", "0.5")
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 1


def test_the_command_turns_images_and_reads_12_bits(tflite, tmp_path, capsys):
    exif = Image.Exif()
    exif[0x0112] = 6  # a viewer shows the right edge at the bottom
    Image.fromarray(spot(40, 60, 50, 5, 2)).save(tmp_path / "a.png", exif=exif)
    assert lite.main([str(tflite), str(tmp_path / "a.png"), "--exif", "apply"]) == 0
    turned = capsys.readouterr().out
    Image.fromarray(np.rot90(spot(40, 60, 50, 5, 2), -1)).save(tmp_path / "b.png")
    assert lite.main([str(tflite), str(tmp_path / "b.png")]) == 0
    assert turned == capsys.readouterr().out
    dark = spot(40, 60, 50, 5, 2)[..., 0].astype(np.uint16)
    Image.fromarray(dark * 16).save(tmp_path / "c.png")
    Image.fromarray(dark * 256).save(tmp_path / "d.png")
    assert lite.main([str(tflite), str(tmp_path / "c.png"), "--bit-depth", "12"]) == 0
    shallow = capsys.readouterr().out
    assert lite.main([str(tflite), str(tmp_path / "d.png")]) == 0
    assert shallow == capsys.readouterr().out
    (tmp_path / "many").mkdir()
    for name in ("e.png", "f.png"):
        Image.fromarray(dark).save(tmp_path / "many" / name)
    assert lite.main([str(tflite), str(tmp_path / "many")]) == 0
    (note,) = capsys.readouterr().err.splitlines()
    assert note.startswith("note: e.png: gray of at most 8 bits where 16 are expected")


def test_the_command_says_in_one_line_what_is_wrong(tflite, tmp_path, capsys):
    (tmp_path / "text.jpg").write_text("no image")
    assert lite.main([str(tflite), str(tmp_path / "text.jpg")]) == 2
    assert lite.main([str(tmp_path / "text.jpg"), str(tmp_path / "text.jpg")]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len([line for line in errors if line.startswith("error: ")]) == 2
    (tmp_path / "empty").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    for words, said in (
        (["a.png", "--score", "nan"], "--score nan: a number"),
        (["a.png", "--bit-depth", "0"], "--bit-depth"),
        (["empty"], "empty: no file in it\n"),
    ):
        with pytest.raises(SystemExit) as stop:
            lite.main([str(tflite), str(tmp_path / words[0]), *words[1:]])
        assert stop.value.code == 2 and said in capsys.readouterr().err


def test_without_litert_it_says_what_to_install(tmp_path, capsys, monkeypatch):
    for name in ("ai_edge_litert", "ai_edge_litert.interpreter"):
        monkeypatch.setitem(sys.modules, name, None)
    assert lite.main([str(tmp_path / "model.tflite"), str(tmp_path / "a.png")]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith("error: ") and error.endswith(": pip install ai-edge-litert")


def test_a_model_that_cannot_run_is_said_once_of_a_whole_folder(tmp_path, capsys):
    for number in range(3):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{number}.png")
    assert lite.main([str(tmp_path / "nowhere.tflite"), str(tmp_path)]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith(f"error: {tmp_path / 'nowhere.tflite'}: ")


@pytest.mark.parametrize("redirect, code", [("| true", 0), (">&-", 0), (">/dev/full", 2)])
def test_an_output_that_nobody_takes_shows_no_traceback(tflite, tmp_path, redirect, code):
    for number in range(20):
        Image.fromarray(spot(64, 96, 60, 20, 2)).save(tmp_path / f"{number}.png")
    command = f"set -o pipefail; {sys.executable} {lite.__file__} {tflite} {tmp_path} --score 0 {redirect}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120)
    lines = [line for line in done.stderr.splitlines() if not line.startswith("INFO")]
    assert done.returncode == code, lines
    assert lines == ["error: the output cannot be written: No space left on device"] * (code == 2)


def test_the_compiled_model_gives_the_same_and_says_so(tflite, tmp_path, capfd):
    image = spot(64, 96, 60, 20, 2)
    Image.fromarray(image).save(tmp_path / "a.png")
    model = lite.PolarMaskLite(tflite, accelerator="cpu", threads=2)
    assert model.runs_on == "network on the CPU"
    for name, value in lite.PolarMaskLite(tflite)(image).items():
        np.testing.assert_array_equal(model(image)[name], value)
    capfd.readouterr()
    for options in ((), ("--accelerator", "cpu")):
        assert lite.main([str(tflite), str(tmp_path / "a.png"), *options]) == 0
        out, err = capfd.readouterr()
        assert out.startswith("moon 0.900") and len(out.splitlines()) == 2
        assert [line for line in err.splitlines() if not line.startswith("INFO")] == ["network on the CPU"] * bool(options)


def test_bad_models_on_the_compiled_model(tflite, tmp_path):
    whole = tflite.read_bytes()
    end = whole.index(b"PK\x03\x04")
    with pytest.raises(ValueError, match="accelerator is 'npu', of cpu, gpu"):
        lite.PolarMaskLite(tflite, accelerator="npu")
    for content, described in (
        (whole[:8] + bytes(2000) + whole[2008:end], metadata()),
        (whole[:end], {**metadata(), "input": {"height": 32, "width": 64}}),
        (whole[:end], {**metadata(), "raw": RAW}),
        (whole[:end], {}),
    ):
        path = tmp_path / "a.tflite"
        path.write_bytes(content)
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr("metadata.json", json.dumps(described))
        with pytest.raises(ValueError) as error:
            lite.PolarMaskLite(path, accelerator="cpu")
        assert one_line(error).startswith(f"{path}: no .tflite file with metadata.json, or damaged")


def test_an_old_litert_has_no_accelerators(tflite, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ai_edge_litert.compiled_model", None)  # which makes importing it fail
    assert lite.PolarMaskLite(tflite).runs_on == "network on the CPU"
    with pytest.raises(ValueError) as error:
        lite.PolarMaskLite(tflite, accelerator="gpu")
    assert one_line(error) == f"{tflite}: --accelerator needs ai-edge-litert 2.3: pip install -U ai-edge-litert"


def test_what_a_gpu_would_do_wrong_is_left_to_the_cpu(tflite, tmp_path):
    """Before anybody looks for a GPU: its polygons would be others, without an error."""
    path = tmp_path / "box.tflite"
    shutil.copy(tflite, path)
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr("metadata.json", json.dumps({**lite.read_metadata(tflite), "cpu_only": True}))
    with pytest.raises(ValueError, match="box branch gives other polygons; run it without --accelerator gpu"):
        lite.PolarMaskLite(path, accelerator="gpu")
    assert lite.PolarMaskLite(path, accelerator="cpu").runs_on == "network on the CPU"


def test_a_machine_without_a_gpu_is_told_in_one_line(tflite, tmp_path):
    Image.new("RGB", (48, 32)).save(tmp_path / "a.png")
    command = [sys.executable, lite.__file__, str(tflite), str(tmp_path / "a.png"), "--accelerator", "gpu"]
    done = subprocess.run(command, env=no_device(), capture_output=True, text=True, timeout=120)
    errors = [line for line in done.stderr.splitlines() if not line.startswith("INFO")]
    assert (done.returncode, done.stdout, len(errors)) == (2, "", 1), done.stderr
    assert re.fullmatch(r"error: .*model.tflite: LiteRT finds no GPU that it can use .*; run it without .*", errors[0])


def test_a_raw_file_without_its_metadata_is_told_so():
    with pytest.raises(ValueError, match=r"no output num_detections, and .* no `raw`"):
        lite.check_outputs({"P3_rays": np.zeros((1, 2, 2, 8), np.float32)}, metadata())


def test_the_file_is_short():
    assert len(Path(lite.__file__).read_text().splitlines()) < 700


def test_a_file_whose_input_stays_with_the_host_still_runs_on_the_gpu():
    """As LiteRT says of edge's int8 file; without a GPU it says nothing of operations."""

    class Model:
        def get_input_buffer_requirements(self, index):
            return {"supported_types": [1]}

        def is_fully_accelerated(self):
            return False

    split = "205 operations will run on the GPU, and the remaining 35 operations will run on the CPU."
    said = f"Selected adapter: Some GPU, arch=x\n{split}"
    assert lite._place_of(Model(), said) == "network on the GPU (Some GPU): 205 of 240 operations, the others on the CPU"
    with pytest.raises(lite.NoAccelerator, match="No adapters found"):
        lite._place_of(Model(), "No adapters found")
    for wrong in (
        "Validation error: Error while parsing WGSL: :50:12 error: ...",
        "ERROR: [litert_compiled_model.cc:164] Failed to invoke",
    ):
        with pytest.raises(lite.NoAccelerator, match="does not compute it"):
            lite._place_of(Model(), f"{said}\n{wrong}")


def test_a_png_of_nonsense_between_its_header_and_its_end_is_refused():
    file = io.BytesIO()
    Image.new("RGB", (32, 32), (9, 99, 200)).save(file, "PNG")
    content = file.getvalue()
    at = content.index(b"IDAT")
    length = int.from_bytes(content[at - 4 : at], "big")
    junk = b"IDAT" + bytes(length)
    broken = content[:at] + junk + zlib.crc32(junk).to_bytes(4, "big") + content[at + 8 + length :]
    with pytest.raises(ValueError, match=r"^the image: cannot read the image: "):
        lite.read_image(broken)


@pytest.mark.parametrize("side", [11_000, 20_000])  # the second is one that Pillow itself refuses
def test_a_picture_of_too_many_pixels_is_told_of_tiles(side):
    file = io.BytesIO()
    Image.new("1", (side, side)).save(file, "PNG")
    with pytest.raises(ValueError, match=r"120,000,000.*cut it into tiles, as `polarmask predict --tile 512`"):
        lite.read_image(file.getvalue())
