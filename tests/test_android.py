"""exports/android: the decoding's numbers on a JVM, the Kotlin by its compiler. Gradle and devices are not had here."""

import json
import os
import re
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree
import zipfile
from pathlib import Path

import numpy as np
import pytest
from benchmarks.edge_table import make, pictures

from helpers import npm
from polarmask_tf import lite
from polarmask_tf.export import tflite

ANDROID = Path(__file__).resolve().parents[1] / "exports/android"
SOURCES = ANDROID / "src/main/java/polarmask"
HELPERS = Path(__file__).parent / "helpers"
JSON = Path("/usr/share/java/com.android.json.jar")  # Android has these classes itself
KOTLIN = {"private": True, "dependencies": {"kotlin-compiler": "2.4.20"}}
SCORES, PIXELS = 1e-6, 1e-3  # float32 in both, but exp and the order of sums are each library's own
SIZE = 96
CLASSES = [{"name": name, "category_id": i} for i, name in enumerate(("a", "b", "c"))]


def run(*command, **options):
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=300, **options)


@pytest.fixture(scope="module")
def classes(tmp_path_factory):
    """The class path of Decode and PolarMask."""
    if shutil.which("javac") is None or shutil.which("java") is None:
        pytest.skip("no javac here (Debian: apt-get install default-jdk-headless)")
    if not JSON.is_file():
        pytest.skip(f"no {JSON} here (Debian: apt-get install libandroid-json-java)")
    out = tmp_path_factory.mktemp("classes")
    files = (SOURCES / "PolarMask.java", HELPERS / "Decode.java")
    done = run("javac", "-Xlint:all", "-Werror", "--release", "11", "-cp", JSON, "-d", out, *files)
    assert done.returncode == 0, done.stderr
    return f"{out}{os.pathsep}{JSON}"


@pytest.fixture
def decode(classes, tmp_path):
    """decode(model, image, outputs) -> what Java prints, its input for the network, and its detections as lite.py's."""

    def call(model, image, outputs):
        folder = tmp_path / "java"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        shutil.copy(model, folder / "model.tflite")
        rgb = image.astype(np.uint32)
        argb = 0xFF << 24 | rgb[..., 0] << 16 | rgb[..., 1] << 8 | rgb[..., 2]
        (folder / "image").write_bytes(np.uint32(image.shape[:2]).tobytes() + argb.astype("<u4").tobytes())
        for name, values in outputs.items():
            (folder / f"{name}.f32").write_bytes(np.asarray(values, "<f4").tobytes())
        done = run("java", "-Xshare:auto", "-XX:TieredStopAtLevel=1", "-cp", classes, "Decode", folder)
        assert done.returncode == 0 and done.stderr == "", done.stderr
        if done.stdout.startswith("error: "):
            return done.stdout.strip(), None, None
        metadata = json.loads(zipfile.ZipFile(model).read("metadata.json"))
        size = metadata["input"]["height"], metadata["input"]["width"], 3
        pixels = np.frombuffer((folder / "input").read_bytes(), np.uint8).reshape(size)
        rows = np.frombuffer((folder / "found").read_bytes(), "<f4").reshape(-1, 6 + 2 * metadata["rays"])
        boxes, polygons = rows[:, 2:6], rows[:, 6:].reshape(-1, metadata["rays"], 2)
        found = {"scores": rows[:, 1], "classes": rows[:, 0].astype(int), "boxes": boxes, "polygons": polygons}
        return done.stdout.strip(), pixels, found

    return call


def assert_equal(found, expected):
    """In the same order, too: both sort by the same float32 scores and keep the order of equal ones."""
    assert found["classes"].tolist() == expected["classes"].tolist()
    np.testing.assert_allclose(found["scores"], expected["scores"], rtol=0, atol=SCORES)
    for name in ("boxes", "polygons"):
        np.testing.assert_allclose(found[name], expected[name].reshape(found[name].shape), rtol=0, atol=PIXELS)


@pytest.fixture(scope="module")
def model():
    return make("edge", SIZE, 60)


@pytest.mark.parametrize("raw", [True, False])
@pytest.mark.slow
def test_edge_finds_what_it_finds_in_python(decode, model, tmp_path, raw):
    from ai_edge_litert.interpreter import Interpreter

    file = tflite.export_tflite(model, tmp_path / "edge.tflite", raw=raw)
    image = next(pictures(SIZE))[: SIZE - 20]  # its ratio is kept, and below it is black
    canvas, _ = lite.letterbox(image, SIZE, SIZE)
    outputs = Interpreter(model_path=str(file)).get_signature_runner("serving_default")(images=canvas[None])
    said, pixels, found = decode(file, image, outputs)
    np.testing.assert_array_equal(pixels, canvas)
    expected = lite.PolarMaskLite(file)(image)
    assert len(expected["scores"]) > 30 and len(set(expected["classes"])) > 3
    assert_equal(found, expected)
    assert said.startswith("class 1,class 2,") and said.endswith(" 0.3")


def with_metadata(path, raw=None, size=(96, 128), **more):
    """A file of metadata alone, behind bytes that stand for a network."""
    described = {"classes": CLASSES, "input": {"height": size[0], "width": size[1], "resize": "letterbox"}, "rays": 8, **more}
    path.write_bytes(b"a network " * 100)
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("metadata.json", json.dumps({**described, **({"raw": raw} if raw else {})}))
    return path


RAW = {"ray_units": {"3": 1.5, "4": 4.0}, "ray_limit": 3.0, "score_threshold": 0.2, "nms_iou": 0.4}
RAW |= {"candidates": 1000, "max_detections": 100, "multi_label": False}


def random_heads(rng, size):
    heads = {}
    for level in (3, 4):
        h, w = (-(-side // 2**level) for side in size)
        for name, depth in (("classes", 3), ("centerness", 1), ("rays", 8)):
            heads[f"P{level}_{name}"] = np.float32(rng.normal(2 if name == "rays" else 0, 1.2, (1, h, w, depth)))
    return heads


def equal_scores(heads):
    for name, head in heads.items():
        if "rays" not in name:
            head[:] = 1.0


@pytest.mark.parametrize(
    "settings, change, at_least",
    [
        ({}, lambda heads: None, 20),
        ({"multi_label": True}, lambda heads: None, 20),
        ({"candidates": 9, "max_detections": 5}, lambda heads: None, 5),  # more than are let through
        ({"temperature": 1.7, "score_bias": -0.4}, lambda heads: None, 20),
        ({"voting_iou": 0.3}, lambda heads: None, 20),
        ({"voting_iou": 0.3, "multi_label": True, "score_threshold": 0.6, "candidates": 10**9}, lambda heads: None, 2),
        ({"voting_iou": 0.1, "candidates": 30}, equal_scores, 5),
        ({}, equal_scores, 20),  # of equal scores and classes the first are taken
        ({"multi_label": True, "candidates": 40}, equal_scores, 20),
        ({"score_threshold": 0.999}, lambda heads: None, 0),  # nothing is found
        ({}, lambda heads: [head.fill(-200) for head in heads.values()], 0),  # exp of which is infinite
    ],
)
def test_raw_outputs_are_assembled_as_in_python(decode, tmp_path, settings, change, at_least):
    size, raw = (90, 128), {**RAW, **settings}
    heads = random_heads(np.random.default_rng(1), size)
    change(heads)
    with np.errstate(over="ignore"):
        outputs = lite.assemble(heads, raw, size)
    image = np.random.default_rng(2).integers(0, 256, (180, 200, 3)).astype(np.uint8)
    canvas, (x, y) = lite.letterbox(image, *size)
    expected = lite.unpack(outputs, 0, canvas.shape[1] * x, canvas.shape[0] * y, *image.shape[:2])
    _, pixels, found = decode(with_metadata(tmp_path / "model.tflite", raw, size), image, heads)
    assert np.abs(pixels - canvas.astype(int)).max() <= 1  # Pillow sometimes makes the rows first
    assert (len(expected["scores"]) >= at_least > 0) or len(expected["scores"]) == at_least == 0
    assert_equal(found, expected)


def test_stretched_images_and_the_models_own_thresholds(decode, tmp_path):
    raw, size = RAW, (96, 128)
    heads = random_heads(np.random.default_rng(3), size)
    thresholds = {"overall": 0.5, "classes": [0.125, 0.5, 0.75]}
    stretch = {"height": size[0], "width": size[1], "resize": "stretch"}
    file = with_metadata(tmp_path / "model.tflite", raw, input=stretch, thresholds=thresholds)
    image = np.random.default_rng(2).integers(0, 256, (50, 300, 3)).astype(np.uint8)
    expected = lite.unpack(lite.assemble(heads, raw, size), 0, 300, 50, 50, 300)
    said, pixels, found = decode(file, image, heads)
    assert np.abs(pixels - lite.letterbox(image, *size, stretch=True)[0].astype(int)).max() <= 1
    assert_equal(found, expected)
    assert said == "a,b,c 0.125"


def test_what_does_not_fit_is_said(decode, tmp_path):
    heads, image = random_heads(np.random.default_rng(1), (96, 128)), np.zeros((20, 20, 3), np.uint8)
    file = with_metadata(tmp_path / "model.tflite", RAW)
    missing = {name: head for name, head in heads.items() if name != "P4_rays"}
    assert decode(file, image, missing)[0] == "error: output P4_rays is missing, expected 384"
    assert (
        "P3_rays has 1535 numbers, expected 1536" in decode(file, image, {**heads, "P3_rays": heads["P3_rays"].ravel()[1:]})[0]
    )
    assert "rays" in decode(with_metadata(tmp_path / "less.tflite", RAW, rays=None), image, heads)[0]
    for wrong in (1.1, "x", None):
        file = with_metadata(tmp_path / "voting.tflite", {**RAW, "voting_iou": wrong})
        assert "voting_iou" in decode(file, image, heads)[0]
    (tmp_path / "none.tflite").write_bytes(b"a network " * 100)
    assert decode(tmp_path / "none.tflite", image, heads)[0].startswith("error: ")


@pytest.mark.slow
def test_the_kotlin_compiles(classes, tmp_path, pytestconfig):
    """Against stubs of what it calls: a name or a type that is wrong in it does not pass."""
    compiler = npm.install(pytestconfig, "kotlin", json.dumps(KOTLIN).encode()) / "kotlin-compiler/bin/kotlinc"
    stubs = re.split(r"^(?=package )", (HELPERS / "android_stubs.txt").read_text(), flags=re.MULTILINE)[1:]
    for number, stub in enumerate(stubs):
        (tmp_path / f"stub{number}.kt").write_text(stub)
    files = [*tmp_path.glob("stub*.kt"), *SOURCES.iterdir()]
    done = run("bash", compiler, "-nowarn", "-cp", JSON, *files, "-d", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out/polarmask/MainActivity.class").is_file()


def test_the_manifest_and_the_build_name_what_is_there():
    android = "{http://schemas.android.com/apk/res/android}"
    manifest = ElementTree.parse(ANDROID / "src/main/AndroidManifest.xml").getroot()
    activity = manifest.find("application/activity")
    kotlin = (SOURCES / "MainActivity.kt").read_text()
    assert f"class {activity.get(android + 'name').removeprefix('.')} : ComponentActivity()" in kotlin
    assert manifest.find("uses-permission").get(android + "name") == "android.permission.CAMERA"
    build = (ANDROID / "build.gradle.kts").read_text()
    (package,) = re.findall(r'namespace = "(.*)"', build)
    for file in SOURCES.iterdir():
        assert re.search(rf"^package {package};?$", file.read_text(), re.MULTILINE)
    imported = set(re.findall(r"^import (androidx\.[a-z]+|com\.google\.ai\.edge\.litert)", kotlin, re.MULTILINE))
    needed = {"androidx.activity", "androidx.camera", "com.google.ai.edge.litert"}
    assert imported == needed and all(f'"{name}:' in build for name in needed)
    for text in (build, (ANDROID / "settings.gradle.kts").read_text()):
        assert text.count("{") == text.count("}") and text.count("(") == text.count(")")
    readme = (ANDROID / "README.md").read_text()
    versions = dict(re.findall(r'"([a-z.]+:[a-z0-9-]+):([0-9.]+)"', build))
    assert versions["com.google.ai.edge.litert:litert"] == versions["com.google.ai.edge.litert:litert-gpu"]
    assert f"LiteRT {versions['com.google.ai.edge.litert:litert']}" in readme
    assert {path.name for path in ANDROID.rglob("*") if path.is_file()} - {"README.md"} <= set(
        re.findall(r"[A-Za-z.]+", readme)
    )
