"""exports/cpp: what the C++ program makes of a .tflite file by LiteRT's C API are the numbers of lite.py."""

import errno
import importlib.util
import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from helpers.exports import hexagon_around_brightest, make_exports, spot
from helpers.vulkan import no_device, swiftshader
from polarmask_tf import lite

CPP = Path(__file__).resolve().parents[1] / "exports/cpp"
HEIGHT, WIDTH = 96, 128
LABELS = ["circle", "red square", 'a "quoted" \\ one', "Bär"]


def noise(height, width, seed=0):
    """Smooth enough that resizing leaves something to find."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (height // 8 + 2, width // 8 + 2, 3), np.uint8))
    return np.asarray(small.resize((width, height), Image.Resampling.BICUBIC))


def write_ppm(path, image):
    path.write_bytes(b"P6\n%d %d\n255\n" % (image.shape[1], image.shape[0]) + image.tobytes())
    return path


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """Built as exports/cpp/README.md says, and with warnings as errors."""
    if shutil.which("g++") is None:
        pytest.skip("no g++ here to build exports/cpp/polarmask.cc with")
    package = Path(importlib.util.find_spec("ai_edge_litert").submodule_search_locations[0])
    if not (package / "libLiteRt.so").is_file():
        pytest.skip("the ai-edge-litert installed here has no libLiteRt.so")
    folder = tmp_path_factory.mktemp("cpp")
    for path in (*CPP.glob("*.cc"), *CPP.glob("*.h")):
        shutil.copy(path, folder)
    build = re.search(r"```bash\n(LITERT=.*?)```", (CPP / "README.md").read_text(), re.S)[1]
    assert "-Wall" in build
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    # Lazily, as not every g++ does by default: so a library without our functions can be loaded and say so.
    build = build.replace("-Wall", "-Wall -Wextra -Werror -Wl,-z,lazy")
    done = subprocess.run(["bash", "-ec", build], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / "polarmask"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A tiny model of random weights that finds many overlapping things, in float32 and 8 bits, and raw."""
    import tf_keras

    from polarmask_tf import config
    from polarmask_tf.export import tflite
    from polarmask_tf.modeling.polarmask import PolarMask

    tf_keras.utils.set_random_seed(0)
    options = ["model.backbone.width=8", "model.fpn.channels=16", "model.head.channels=16", f"data.size=[{HEIGHT},{WIDTH}]"]
    options += ["model.fpn.levels=[3,4]", "targets.ranges=[64]", "model.head.convs=2", "model.refine_channels=0"]
    options += ["postprocess.score_threshold=0.05", "postprocess.pre_nms_top_k=60", "postprocess.nms_iou_threshold=0.6"]
    classes = [{"name": name, "category_id": number} for number, name in enumerate(LABELS)]
    model = PolarMask(config.load("shapes", [*options, "postprocess.max_detections=40"]), classes)
    rng = np.random.default_rng(0)
    for variable in model.head.trainable_variables:
        # No bias of -log(99) on the classes: half of the places have something.
        kept = 0 if "classes/conv/bias" in variable.name else 1
        variable.assign(kept * variable + rng.normal(0, 0.15, variable.shape) * ("kernel" in variable.name))
    folder = tmp_path_factory.mktemp("models")
    tflite.export_tflite(model, folder / "fp32.tflite")
    seen = [noise(HEIGHT, WIDTH, seed) for seed in range(4)]
    tflite.export_tflite(model, folder / "int8.tflite", precision="int8", images=lambda: seen)
    tflite.export_tflite(model, folder / "fp32_raw.tflite", raw=True)
    tflite.export_tflite(model, folder / "int8_raw.tflite", precision="int8", raw=True, images=lambda: seen)
    return {name: folder / f"{name}.tflite" for name in ("fp32", "int8", "fp32_raw", "int8_raw")}


@pytest.fixture(scope="module")
def hexagons(tmp_path_factory):
    """Of 32 x 48 pixels: finds two hexagons around the brightest pixel."""
    return make_exports(tmp_path_factory.mktemp("hexagons"))["tflite"]


def with_metadata(model, path, change):
    """The same model with changed metadata."""
    with zipfile.ZipFile(model) as archive:
        described = json.loads(archive.read("metadata.json"))
        end = archive.getinfo("metadata.json").header_offset
    change(described)
    path.write_bytes(model.read_bytes()[:end])
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("metadata.json", json.dumps(described, indent=1))
    return path


def run(program, *arguments, **options):
    """Exit code, lines of detections, lines of errors."""
    done = subprocess.run([program, *arguments], capture_output=True, timeout=120, **options)
    errors = [line for line in done.stderr.decode(errors="replace").splitlines() if line.startswith("error: ")]
    return done.returncode, done.stdout.decode().splitlines(), errors


def parse(line, labels):
    """Class, score, box, polygon."""
    said, score, rest = re.fullmatch(r"(.*) ([0-9.]+) box (.*)", line).groups()
    box, polygon = rest.split(" polygon ")
    points = [point.split(",") for point in polygon.split()]
    return labels.index(said), np.float64(score), np.float64(box.split()), np.float64(points)


def width_first(image, filled, canvas):
    """lite.place in two passes, of which the order is certain: Pillow 13 takes the height first where that is faster."""
    placed = np.zeros((*canvas, 3), np.uint8)
    wide = Image.fromarray(image).resize((filled[1], image.shape[0]), Image.Resampling.BILINEAR)
    placed[: filled[0], : filled[1]] = wide.resize(filled[::-1], Image.Resampling.BILINEAR)
    return placed, (image.shape[1] / filled[1], image.shape[0] / filled[0])


def compare(program, model, image, path, *options, threads=1):
    """Both agree in every number on every detection -> their count."""
    expected = lite.PolarMaskLite(model, threads)(image)
    status, lines, errors = run(program, model, write_ppm(path, image), "--score", "0", "--digits", "9", *options)
    assert (status, errors, len(lines)) == (0, [], len(expected["scores"]))
    labels = [json.dumps(name)[1:-1] for name in LABELS]
    for row, line in enumerate(lines):
        label, score, box, polygon = parse(line, labels)
        assert label == expected["classes"][row]
        # The same kernels on the same bytes, so equal but for what another order of float32 sums would do.
        np.testing.assert_allclose(score, expected["scores"][row], atol=1e-5)
        np.testing.assert_allclose(box, expected["boxes"][row], atol=1e-5 * max(image.shape))
        np.testing.assert_allclose(polygon, expected["polygons"][row], atol=1e-5 * max(image.shape))
    return len(lines)


@pytest.mark.parametrize("precision", ["fp32", "int8", "fp32_raw", "int8_raw"])
@pytest.mark.slow
def test_an_image_of_the_models_size(program, models, tmp_path, precision):
    assert compare(program, models[precision], noise(HEIGHT, WIDTH), tmp_path / "a.ppm") >= 5
    assert compare(program, models[precision], noise(HEIGHT, WIDTH, 7), tmp_path / "a.ppm", "--threads", "2", threads=2) >= 5


def test_a_raw_file_gives_what_the_whole_one_does(program, models, tmp_path):
    image = write_ppm(tmp_path / "a.ppm", noise(70, 150, 3))
    options = ("--score", "0", "--digits", "4")
    labels = [json.dumps(name)[1:-1] for name in LABELS]
    whole, raw = (run(program, models[name], image, *options)[1] for name in ("fp32", "fp32_raw"))
    assert len(whole) == len(raw) >= 5
    for one, other in zip(whole, raw, strict=True):
        a, b = parse(one, labels), parse(other, labels)
        assert a[0] == b[0] and abs(a[1] - b[1]) <= 2e-6
        np.testing.assert_allclose(a[3], b[3], atol=1e-3)
    # In 8 bits the two files' ranges are of two calibrations, which round alike.
    whole, raw = (run(program, models[name], image, *options)[1] for name in ("int8", "int8_raw"))
    assert abs(len(whole) - len(raw)) <= 2


def test_raw_files_are_assembled_as_their_metadata_say(program, models, tmp_path):
    image = noise(HEIGHT, WIDTH)
    for number, change in enumerate(
        (
            {"multi_label": True},
            {"candidates": 3},
            {"max_detections": 2},
            {"temperature": 2.0, "score_bias": -0.5},
            {"nms_iou": 0.05},
        )
    ):
        path = tmp_path / f"{number}.tflite"
        with_metadata(models["fp32_raw"], path, lambda described, change=change: described["raw"].update(change))
        assert compare(program, path, image, tmp_path / "a.ppm") >= 2


def test_what_is_shown_is_what_the_model_says(program, models, tmp_path, capsys):
    path = write_ppm(tmp_path / "a.ppm", noise(HEIGHT, WIDTH, 2))
    scores = lite.PolarMaskLite(models["fp32"])(path)["scores"]
    for each in ([float(np.median(scores))] * 4, [1.5, 0.0, 0.4, 0.4]):

        def known(described, each=each):
            described["thresholds"] = {"overall": 0.5, "classes": each}
            for number, entry in enumerate(described["classes"]):
                entry["name"] = f"class {number}"

        model = with_metadata(models["fp32"], tmp_path / "a.tflite", known)
        assert lite.main([str(model), str(path)]) == 0
        expected = capsys.readouterr().out.splitlines()
        status, lines, errors = run(program, model, path)
        assert (status, errors, lines) == (0, [], expected) and 0 < len(lines) < len(scores)
        assert len(run(program, model, path, "--score", "0")[1]) == len(scores)


def test_it_says_which_part_ran_where(program, models, tmp_path):
    image = write_ppm(tmp_path / "a.ppm", noise(HEIGHT, WIDTH))
    for name, expected in (
        ("fp32", "network on the CPU"),
        ("fp32_raw", "network on the CPU; polygons on the CPU (assemble.h)"),
    ):
        done = subprocess.run([program, models[name], image, "--accelerator", "cpu"], capture_output=True, text=True)
        assert done.returncode == 0 and expected in done.stderr.splitlines()
        assert done.stdout.splitlines() == run(program, models[name], image)[1]
    for name in ("fp32", "fp32_raw"):
        status, lines, errors = run(program, models[name], image, "--accelerator", "gpu", env=no_device())
        assert (status, lines, len(errors)) == (2, [], 1) and "LiteRT finds no GPU that it can use; run it without" in errors[0]


def test_what_a_gpu_would_do_wrong_is_left_to_the_cpu(program, models, tmp_path):
    image = write_ppm(tmp_path / "a.ppm", noise(HEIGHT, WIDTH))
    model = with_metadata(models["fp32"], tmp_path / "a.tflite", lambda described: described.update(cpu_only=True))
    status, lines, errors = run(program, model, image, "--accelerator", "gpu")
    assert (status, lines, len(errors)) == (2, [], 1) and "its box branch gives other polygons" in errors[0]
    assert run(program, model, image, "--accelerator", "cpu")[0] == 0


def test_on_the_gpu(program, models, tmp_path):
    """SwiftShader's numbers, as in test_gpu.py."""
    environment = swiftshader(tmp_path)
    image = write_ppm(tmp_path / "a.ppm", noise(HEIGHT, WIDTH))
    arguments = [image, "--score", "0", "--digits", "6"]
    labels = [json.dumps(name)[1:-1] for name in LABELS]
    for name, where in (
        ("fp32", "not every operation, the others on the CPU"),
        ("fp32_raw", "every operation; polygons on the CPU"),
    ):
        command = [program, models[name], *arguments, "--accelerator", "gpu"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0 and "SwiftShader" in done.stderr, done.stderr
        assert f"network on the GPU: {where}" in done.stderr
        found = [parse(line, labels) for line in done.stdout.splitlines()]
        expected = [parse(line, labels) for line in run(program, models[name], *arguments)[1]]
        assert len(found) == len(expected) >= 5
        for label, score, _, polygon in expected:  # nearly equal scores may have changed places
            near = [one for one in found if one[0] == label and abs(one[1] - score) < 2e-5]
            assert any(np.abs(one[3] - polygon).max() < 5e-5 * WIDTH for one in near), (label, score)


SIZES = [(200, 300), (301, 97), (50, 20), (30, 128), (95, 127), (7, 500), (400, 3), (1, 1)]


@pytest.mark.parametrize("height, width", SIZES)
def test_a_resized_image(program, models, tmp_path, monkeypatch, height, width):
    """To the same 1e-5, because the resized bytes are Pillow's; see the next test for what another order of passes does."""
    monkeypatch.setattr(lite, "place", width_first)
    for precision in ("fp32", "int8"):
        found = compare(program, models[precision], noise(height, width), tmp_path / "a.ppm")
        assert found >= 5 or min(height, width) < 20


@pytest.mark.parametrize("height, width", SIZES)
def test_an_order_of_passes_moves_bytes_by_one(height, width):
    image = noise(height, width)
    chosen, back = lite.letterbox(image, HEIGHT, WIDTH)
    filled = (round(height / back[1]), round(width / back[0]))
    ours, also_back = width_first(image, filled, (HEIGHT, WIDTH))
    assert back == also_back and np.abs(chosen.astype(int) - ours).max() <= 1


@pytest.mark.parametrize("height, width", [(200, 300), (301, 97), (64, 24), (20, 30), (40, 400)])
def test_a_spot_is_where_lite_finds_it(program, hexagons, tmp_path, height, width):
    """Pillow in its own order of passes; bytes that differ by 1 can choose another of the brightest pixels, its neighbour."""
    image = spot(height, width, width * 3 // 5, height // 3, size=max(3, min(height, width) // 6))
    expected = lite.PolarMaskLite(hexagons)(image)
    status, lines, errors = run(program, hexagons, write_ppm(tmp_path / "a.ppm", image), "--digits", "6")
    assert (status, errors, len(lines)) == (0, [], 2)
    pixel = 1 / min(32 / height, 48 / width)  # of the model's input, in pixels of the image
    for row, line in enumerate(lines):
        label, score, box, polygon = parse(line, ["sun", "moon"])
        assert label == expected["classes"][row] and score == pytest.approx(expected["scores"][row])
        assert np.abs(polygon - expected["polygons"][row]).max() < 1.1 * pixel
        assert np.abs(box - expected["boxes"][row]).max() < 1.1 * pixel


def test_a_stretched_image(program, models, tmp_path, monkeypatch):
    monkeypatch.setattr(lite, "place", width_first)
    model = with_metadata(models["fp32"], tmp_path / "a.tflite", lambda described: described["input"].update(resize="stretch"))
    for height, width in ((300, 160), (40, 160)):
        assert compare(program, model, noise(height, width), tmp_path / "a.ppm") >= 5
        both = [run(program, path, tmp_path / "a.ppm", "--score", "0")[1] for path in (model, models["fp32"])]
        assert both[0] != both[1]


def test_the_lines_are_those_of_lite(program, models, tmp_path, capsys):
    def plain(described):
        for number, entry in enumerate(described["classes"]):
            entry["name"] = f"class {number}"

    model = with_metadata(models["fp32"], tmp_path / "a.tflite", plain)
    path = write_ppm(tmp_path / "a.ppm", noise(HEIGHT, WIDTH, 2))
    scores = sorted(lite.PolarMaskLite(model)(path)["scores"])
    limit = float(scores[len(scores) // 2] + scores[len(scores) // 2 - 1]) / 2
    for arguments in ((), ("--score", str(limit)), ("--score", "1.5")):
        assert lite.main([str(model), str(path), *arguments]) == 0
        status, lines, errors = run(program, model, path, *arguments)
        assert (status, errors, lines) == (0, [], capsys.readouterr().out.splitlines())
        assert not arguments or len(lines) == {"1.5": 0}.get(arguments[1], len(scores) - len(scores) // 2)
    with open(path, "rb") as piped:
        assert run(program, model, "/dev/stdin", "--score", "0", stdin=piped)[1] == run(program, model, path, "--score", "0")[1]


def test_a_class_without_a_name_is_a_number(program, models, tmp_path):
    model = with_metadata(models["fp32"], tmp_path / "a.tflite", lambda described: described.update(classes=[]))
    path = write_ppm(tmp_path / "a.ppm", noise(HEIGHT, WIDTH))
    expected = lite.PolarMaskLite(models["fp32"])(path)["classes"]
    assert [int(line.split()[0]) for line in run(program, model, path, "--score", "0")[1]] == expected.tolist()


def test_the_number_of_threads_is_that_asked_for(program, models, tmp_path):
    if not Path("/proc/self/task").is_dir():
        pytest.skip("threads are counted in Linux's /proc")
    os.mkfifo(tmp_path / "a.ppm")
    for threads in (1, 3):
        arguments = [program, models["fp32"], tmp_path / "a.ppm", "--threads", str(threads)]
        process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        try:
            end = time.monotonic() + 60
            while True:  # the program opens the image when the model is ready
                try:
                    pipe = os.open(tmp_path / "a.ppm", os.O_WRONLY | os.O_NONBLOCK)
                    break
                except OSError as error:
                    assert error.errno == errno.ENXIO and process.poll() is None and time.monotonic() < end
                    time.sleep(0.01)
            found = len(os.listdir(f"/proc/{process.pid}/task"))
            os.close(pipe)
            assert found == threads
        finally:
            process.kill()
            process.communicate()


def test_comments_and_other_spaces_are_a_ppm_too(program, models, tmp_path):
    image = noise(40, 50)
    expected = run(program, models["fp32"], write_ppm(tmp_path / "a.ppm", image), "--score", "0")
    (tmp_path / "b.ppm").write_bytes(b"P6 # 9 9\n# more\n50\t\n 40#\n255 " + image.tobytes() + b"P6 1 1 255 \0\0\0")
    assert run(program, models["fp32"], tmp_path / "b.ppm", "--score", "0") == expected and expected[1]


def test_bad_images_are_refused_in_one_line(program, models, tmp_path):
    whole = write_ppm(tmp_path / "whole.ppm", noise(20, 30)).read_bytes()
    (tmp_path / "folder.ppm").mkdir()
    cases = {
        b"": "P6",
        b"P5 1 1 255 \0": "P6",
        b"\x89PNG\r\n": "P6",
        b"P6": "header",
        b"P6 3 #": "header",
        b"P6 -3 4 255 ": "header",
        b"P6 99999999999 1 255 ": "header",
        b"P6 0 4 255 ": "without pixels",
        b"P6 4 0 255 ": "without pixels",
        b"P6 1 1 65535 \0\0\0\0\0\0": "8 bits",
        b"P6 1 1 0 \0\0\0": "8 bits",
        b"P6 1 1 255": "cut off",
        b"P6 1 1 255 \0\0": "cut off",
        b"P6 4294967295 4294967295 255 \0": "cut off",
        whole[:-1]: "cut off",
    }
    for content, message in cases.items():
        (tmp_path / "a.ppm").write_bytes(content)
        status, lines, errors = run(program, models["fp32"], tmp_path / "a.ppm")
        assert (status, lines, len(errors)) == (2, [], 1) and "a.ppm: " in errors[0] and message in errors[0], (content, errors)
    for name, message in (("folder.ppm", "folder.ppm: Is a directory"), ("nowhere.ppm", "nowhere.ppm: No such file")):
        status, lines, errors = run(program, models["fp32"], tmp_path / name)
        assert (status, lines, len(errors)) == (2, [], 1) and message in errors[0]


def other_model(path, outputs, dtype="uint8"):
    """A .tflite file with metadata.json whose function returns `outputs(images)`."""
    import tensorflow as tf

    module = tf.Module()
    module.run = tf.function(outputs, input_signature=[tf.TensorSpec([1, 8, 8, 3], dtype, "images")])
    tf.saved_model.save(module, str(path) + ".saved", signatures={"serving_default": module.run})
    path.write_bytes(tf.lite.TFLiteConverter.from_saved_model(str(path) + ".saved").convert())
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("metadata.json", json.dumps({"classes": [], "input": {"height": 8, "width": 8}}))
    return path


def test_bad_models_are_refused_in_one_line(program, models, tmp_path):
    import tensorflow as tf

    whole = models["fp32"].read_bytes()
    deflated = tmp_path / "deflated.tflite"
    deflated.write_bytes(whole[: whole.rindex(b"PK\x03\x04")])
    with zipfile.ZipFile(deflated, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("metadata.json", "{}" + " " * 1000)
    contents = {
        "nowhere": (None, "nowhere: No such file"),
        "empty": (b"", "not a .tflite file"),
        "text": (b"hello\n" * 9, "not a .tflite"),
        "bare": (whole[: whole.rindex(b"PK\x03\x04")], "no metadata.json"),
        "head": (whole[:20], "no metadata.json"),
        "cut": (whole[: len(whole) // 2], "no metadata.json"),
        "last": (whole[:-1], "no metadata.json"),
        "middle": (whole[:5000] + whole[9000:], "no metadata.json"),
        "zipped": (deflated.read_bytes(), "no metadata.json"),
        "overwritten": (whole[:8] + bytes(2000) + whole[2008:], "LiteRT could not"),
    }
    for name, (content, _) in contents.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)

    def renamed(images):
        return {name.replace("scores", "score"): value for name, value in hexagon_around_brightest(images).items()}

    def integer_boxes(images):
        found = hexagon_around_brightest(images)
        return {**found, "detection_boxes": tf.cast(found["detection_boxes"], tf.int32)}

    def fewer_boxes(images):
        found = hexagon_around_brightest(images)
        return {**found, "detection_boxes": found["detection_boxes"][:, :2]}

    good = other_model(tmp_path / "good", hexagon_around_brightest)
    other = "its tensors are not those"
    for name, outputs, dtype in (
        ("one output", lambda images: {"y": tf.cast(images, tf.float32)}, "uint8"),
        ("renamed", renamed, "uint8"),
        ("more", lambda images: {**hexagon_around_brightest(images), "y": tf.cast(images, tf.float32)}, "uint8"),
        ("floats", hexagon_around_brightest, "float32"),
        ("integers", integer_boxes, "uint8"),
        ("fewer", fewer_boxes, "uint8"),
    ):
        other_model(tmp_path / name, outputs, dtype)
        contents[name] = (None, other)

    def described_as_raw(described):
        described["raw"] = {**json.loads(zipfile.ZipFile(models["fp32_raw"]).read("metadata.json"))["raw"]}

    def described_as_whole(described):
        del described["raw"]

    def of_other_levels(described):
        described["raw"]["ray_units"] = {"6": 8.0, "7": 8.0, "8": 8.0}

    for name, model, change in (
        ("no raw", "fp32", described_as_raw),
        ("raw without its metadata", "fp32_raw", described_as_whole),
        ("other levels", "fp32_raw", of_other_levels),
    ):
        with_metadata(models[model], tmp_path / name, change)
        contents[name] = (None, other)
    image = write_ppm(tmp_path / "a.ppm", noise(8, 8))
    status, lines, errors = run(program, good, image)
    assert (status, len(lines), errors) == (0, 2, [])
    for name, (_, message) in contents.items():
        status, lines, errors = run(program, tmp_path / name, image)
        assert (status, lines, len(errors)) == (2, [], 1), (name, errors)
        assert errors[0].startswith(f"error: {tmp_path / name}: ") and message in errors[0], (name, errors)


def test_bad_arguments_are_refused(program, models, tmp_path):
    image = write_ppm(tmp_path / "a.ppm", noise(20, 30))
    bad = [
        ("--score",),
        ("--score", "x"),
        ("--score", "0.3x"),
        ("--score", ""),
        ("--threads", "0"),
        ("--threads", "65"),
        ("--threads", "nan"),
        ("--digits", "10"),
        ("--digits", "-1"),
        ("--best", "1"),
        ("--threads", "1", "--best"),
        ("--accelerator", "npu"),
        ("--accelerator",),
        ("--score", "-0.5"),
        ("--score", "30"),
        ("--score", "inf"),
    ]
    for arguments in ((), (models["fp32"],), *((models["fp32"], image, *options) for options in bad)):
        status, lines, errors = run(program, *arguments)
        assert (status, lines, len(errors)) == (2, [], 1) and "usage: " in errors[0], arguments


def test_an_output_that_cannot_be_written_is_an_error(program, models, tmp_path):
    image = write_ppm(tmp_path / "a.ppm", noise(20, 30))
    command = [program, models["fp32"], image, "--score", "0"]
    with open("/dev/full", "wb") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, timeout=120)
    assert done.returncode == 2 and b"error: the output cannot be written: No space left on device" in done.stderr


def test_damaged_files_never_crash_it(program, models, tmp_path):
    rng = random.Random(0)
    image, model = write_ppm(tmp_path / "a.ppm", noise(9, 7)).read_bytes(), models["fp32"].read_bytes()
    seen = set()
    for number in range(300):
        damaged = bytearray(image)
        for _ in range(rng.randint(0, 3)):
            damaged[rng.randrange(16)] = rng.choice([rng.randrange(256), *b"0123456789 \n#"])
        (tmp_path / "b.ppm").write_bytes(damaged[: rng.randrange(len(image))] if number % 2 else damaged)
        status, lines, errors = run(program, models["fp32"], tmp_path / "b.ppm")
        assert (status, len(errors)) in {(0, 0), (2, 1)}, (bytes(damaged), errors)
        seen.add(status)
    assert seen == {0, 2}
    for _ in range(100):
        (tmp_path / "b.tflite").write_bytes(model[: rng.randrange(len(model))])
        status, lines, errors = run(program, tmp_path / "b.tflite", tmp_path / "a.ppm")
        assert (status, lines, len(errors)) == (2, [], 1)


def test_an_old_library_is_named(program, models, tmp_path):
    """A library of that name with no function at all stands for one from before the functions took their arguments."""
    (tmp_path / "versions").write_text("VERS_1.0 { global: *; };\n")
    command = ["g++", "-shared", "-x", "c++", os.devnull, "-o", "libLiteRt.so", "-Wl,-soname,libLiteRt.so"]
    subprocess.run([*command, "-Wl,--version-script=versions"], cwd=tmp_path, check=True)
    environment = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path)}
    status, lines, errors = run(program, models["fp32"], "a.ppm", env=environment)
    assert (status, lines, len(errors)) == (2, [], 1) and "libLiteRt.so is older than 2.2" in errors[0]


def test_the_source_is_a_few_short_files():
    names = ["README.md", "assemble.h", "image.h", "metadata.h", "polarmask.cc"]
    assert sorted(path.name for path in CPP.iterdir()) == names
    assert all(len((CPP / name).read_text().splitlines()) < 340 for name in names)
