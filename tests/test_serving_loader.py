"""exports/serving/loader.c: what TensorFlow's C API loads and runs gives Python's numbers."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from helpers.exports import spot
from helpers.serving import BAD, encoded, make_model

SERVING = Path(__file__).resolve().parents[1] / "exports/serving"
OUTPUTS = ("detection_classes", "detection_scores", "detection_boxes", "detection_polygons")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The built loader, the model in polarmask/1, and images: what exports/serving/README.md says, done."""
    if shutil.which("gcc") is None:
        pytest.skip("no gcc here to build exports/serving/loader.c with")
    folder = tmp_path_factory.mktemp("loader")
    make_model(folder)
    shutil.copy(SERVING / "loader.c", folder)
    build = re.search(r"```bash\n(TF=.*?)\./loader", (SERVING / "README.md").read_text(), re.S)[1]
    build = build.replace("-Wall", "-Wall -Wextra -Werror")
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-ec", build], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rng = np.random.default_rng(0)
    for number, (height, width) in enumerate([(1, 1), (33, 47), (200, 300), (5, 400)]):
        image = rng.integers(0, 256, (height, width, 3), np.uint8)
        (folder / f"{number}.jpg").write_bytes(encoded(image, "JPEG"))
    (folder / "gray.png").write_bytes(encoded(spot(50, 60, 20, 30, 2), mode="L"))
    for name, content in BAD.items():
        (folder / name).write_bytes(content)
    return folder


def load(folder, *arguments):
    command = [str(folder / "loader"), *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env={"TF_CPP_MIN_LOG_LEVEL": "3"}, timeout=120)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    return done.returncode, done.stdout.splitlines(), errors


def test_the_build_in_the_source_is_that_of_the_readme():
    words = [
        re.search(r"TF=.*?libtensorflow_framework\.so\.2", text, re.S)[0].replace("*", "").replace("\\", "").split()
        for text in ((SERVING / "loader.c").read_text(), (SERVING / "README.md").read_text())
    ]
    assert words[0] == words[1]


def test_c_gives_the_numbers_of_python(folder):
    import tensorflow as tf

    signature = (model := tf.saved_model.load(str(folder / "polarmask/1"))).signatures["serving_default"]
    files = ["0.jpg", "gray.png", "1.jpg", "2.jpg", "3.jpg"]
    status, lines, errors = load(folder, "polarmask/1", *files)
    assert (status, errors) == (0, [])
    for file in files:
        expected = signature(image_bytes=tf.constant([(folder / file).read_bytes()]))
        count = int(expected["num_detections"][0])
        assert count == 2 and lines.pop(0) == f"{file}: {count} detections"
        for row in range(count):
            numbers = np.float32(lines.pop(0).split())  # nine digits give every float32 exactly
            wanted = np.concatenate([np.ravel(expected[name][0, row]).astype(np.float32) for name in OUTPUTS])
            np.testing.assert_array_equal(numbers, wanted)
    assert not lines
    del model


def test_a_refused_image_costs_only_itself(folder):
    status, lines, errors = load(folder, "polarmask/1", "1.jpg", *BAD, "nowhere.jpg", "gray.png")
    assert status == 1
    assert [line for line in lines if "detections" in line] == ["1.jpg: 2 detections", "gray.png: 2 detections"]
    assert [line.split(": ")[1] for line in errors] == [*BAD, "nowhere.jpg"]
    assert "400 x 400 pixels" in errors[3] and errors[4].endswith("nowhere.jpg: No such file or directory")
    assert not any("[[" in line for line in errors)


def test_what_is_no_model_is_said(folder, tmp_path):
    from helpers.exports import make_exports

    plain = make_exports(tmp_path)["saved_model"]
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged/saved_model.pb").write_bytes((folder / "polarmask/1/saved_model.pb").read_bytes()[:5000])
    for model, message in (
        (tmp_path / "nowhere", "nowhere: Could not find SavedModel"),
        (tmp_path / "damaged", "damaged: "),
        (plain, "image_bytes: not in the signature serving_default"),
    ):
        status, lines, errors = load(folder, model, "1.jpg")
        assert (status, lines, len(errors)) == (2, [], 1) and message in errors[0]
    assert load(folder)[0] == 2
