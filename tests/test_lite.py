import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from helpers.exports import CLASSES, HEIGHT, RADIUS, WIDTH, damaged_images, make_exports, metadata, spot
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
    whole = tflite.read_bytes()
    path.write_bytes(whole[: whole.index(b"PK\x03\x04")])
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("metadata.json", json.dumps(metadata(resize=resize)))
    return path


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


def test_the_command_says_in_one_line_what_is_wrong(tflite, tmp_path, capsys):
    (tmp_path / "text.jpg").write_text("no image")
    assert lite.main([str(tflite), str(tmp_path / "text.jpg")]) == 2
    assert lite.main([str(tmp_path / "text.jpg"), str(tmp_path / "text.jpg")]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len([line for line in errors if line.startswith("error: ")]) == 2


def test_the_file_is_short():
    assert len(Path(lite.__file__).read_text().splitlines()) < 150
