"""Polygons from a --raw file's outputs: lite.py's NumPy and exports/cpp/assemble.h give what the other files' graph does."""

import json
import shutil
import subprocess
import zipfile
from pathlib import Path

import numpy as np
import pytest

from polarmask_tf import lite

CPP = Path(__file__).resolve().parents[1] / "exports/cpp"
RAW = {"ray_units": {"3": 8.0}, "ray_limit": 20, "score_threshold": 0.05, "candidates": 100, "nms_iou": 0.5}
RAW |= {"max_detections": 100, "multi_label": False, "temperature": 1.0, "score_bias": 0.0, "voting_iou": 0.0}
CASES = {  # what differs from RAW; (height, width); classes, rays; what the class logits are moved by
    "one level": ({}, (40, 56), 3, 8, 0.0),
    "nothing to find": ({}, (40, 56), 3, 8, -30.0),
    "levels": ({"ray_units": {"3": 4.0, "4": 11.0, "5": 30.0}}, (64, 96), 5, 12, 0.0),
    "pairs": ({"ray_units": {"3": 4.0, "4": 11.0}, "multi_label": True}, (48, 48), 4, 9, 0.0),
    "more candidates than are taken": ({"candidates": 7, "ray_units": {"3": 9.0, "4": 9.0}}, (64, 64), 2, 36, 1.0),
    "more detections than are given": ({"max_detections": 5, "multi_label": True}, (64, 64), 3, 36, 1.0),
    "one detection": ({"max_detections": 1, "candidates": 1}, (32, 32), 1, 3, 0.0),
    "all overlap": ({"nms_iou": 0.0, "ray_units": {"4": 60.0}}, (64, 64), 2, 16, 0.0),
    "calibrated": ({"temperature": 1.7, "score_bias": 0.4}, (64, 64), 2, 16, 0.0),
    "a low limit of rays": ({"ray_limit": 0.25}, (32, 64), 2, 16, 0.0),
    "sizes that 8 does not divide": ({"ray_units": {"3": 8.0, "4": 8.0}}, (35, 51), 2, 16, 0.0),
    "votes": ({"voting_iou": 0.3, "ray_units": {"3": 9.0, "4": 9.0}, "candidates": 300}, (64, 64), 2, 36, 1.0),
    "votes of few": ({"voting_iou": 0.1, "candidates": 2, "multi_label": True}, (32, 32), 2, 5, 1.0),
    "votes below the threshold of scores": (
        {"voting_iou": 0.2, "score_threshold": 0.5, "ray_units": {"3": 9.0}},
        (64, 64),
        2,
        36,
        0.5,
    ),
    "votes of equals": ({"voting_iou": 0.2, "multi_label": True, "candidates": 10**9}, (32, 48), 2, 8, 200.0),
    "no votes": ({"voting_iou": 1.0, "nms_iou": 1.0, "candidates": 10**9, "max_detections": 10**5}, (32, 48), 2, 8, 0.0),
    "saturated": ({}, (32, 32), 2, 16, 200.0),
}


def make_heads(case):
    """Random logits by the names of a raw file's outputs, [1, h, w, ...]."""
    change, (height, width), classes, rays, shift = CASES[case]
    raw, rng, heads = {**RAW, **change}, np.random.default_rng(len(case)), {}
    for level in raw["ray_units"]:
        shape = (1, -(-height // 2 ** int(level)), -(-width // 2 ** int(level)))
        heads[f"P{level}_classes"] = rng.normal(shift, 1.5, (*shape, classes)).astype(np.float32)
        heads[f"P{level}_centerness"] = rng.normal(0, 1.5, (*shape, 1)).astype(np.float32)
        heads[f"P{level}_rays"] = rng.normal(0, 0.4, (*shape, rays)).astype(np.float32)
    return heads, raw, (height, width)


def graph(heads, raw, size):
    """What postprocess.detect, which is in the other files, makes of them."""
    from polarmask_tf.ops import postprocess

    names = {"class_logits": "classes", "centerness_logits": "centerness", "ray_logits": "rays"}
    outputs = {level: {name: heads[f"P{level}_{short}"][0] for name, short in names.items()} for level in raw["ray_units"]}
    options = {name: raw[name] for name in ("max_detections", "multi_label", "temperature", "score_bias")}
    least = postprocess.uncalibrated(raw["score_threshold"], raw["temperature"], raw["score_bias"])
    found = postprocess.detect(
        outputs,
        size,
        raw["ray_units"],
        score_threshold=raw["score_threshold"],
        pre_nms_top_k=raw["candidates"],
        nms_iou_threshold=raw["nms_iou"],
        voting_iou_threshold=raw["voting_iou"],
        **options,
    )
    count = int(found["num_detections"])
    return [found[f"detection_{name}"].numpy()[:count] for name in lite.FOUND], {**raw, "score_threshold": least}


def by_numpy(heads, raw, size):
    found = lite.assemble(heads, raw, size)
    count = int(found["num_detections"][0])
    return [found[f"detection_{name}"][0][:count] for name in lite.FOUND]


def assert_equal(found, expected):
    scores, classes, boxes, polygons = zip(found, expected, strict=True)
    assert scores[0].shape == scores[1].shape
    np.testing.assert_allclose(*scores, atol=2e-6)
    np.testing.assert_array_equal(*classes)
    np.testing.assert_allclose(*boxes, atol=2e-6)
    np.testing.assert_allclose(*polygons, atol=2e-6)


@pytest.mark.parametrize("case", [case for case in CASES if case != "a low limit of rays"])  # the graph's is fixed
def test_numpy_is_the_graph(case):
    heads, raw, size = make_heads(case)
    expected, raw = graph(heads, raw, size)
    assert_equal(by_numpy(heads, raw, size), expected)
    assert (len(expected[0]) == 0) == (case == "nothing to find")
    if case in ("more detections than are given", "one detection"):
        assert len(expected[0]) == raw["max_detections"]


DRIVER = r"""
#include <cstdio>
#include "assemble.h"
#include "image.h"

int main(int, char** argv) try {
  const Metadata metadata = read_metadata(read_file(argv[1]));
  const std::string numbers = read_file(argv[2]);
  const float* at = reinterpret_cast<const float*>(numbers.data());
  const auto next = [&](size_t count) { return (at += count) - count; };
  const float* size = next(2);
  std::vector<Level> levels;
  for (size_t i = 0; i < metadata.raw.ray_units.size(); ++i) {
    const float* shape = next(4);
    Level level{int(shape[0]), int(shape[1]), int(shape[2]), int(shape[3]), nullptr, nullptr, nullptr};
    const size_t places = size_t(level.height) * level.width;
    level.class_logits = next(places * level.classes);
    level.centerness_logits = next(places);
    level.ray_logits = next(places * level.rays);
    levels.push_back(level);
  }
  for (const Detection& one : assemble(levels, metadata.raw, int(size[0]), int(size[1]))) {
    std::printf("%d %.9g", one.label, one.score);
    for (const float side : one.box) std::printf(" %.9g", side);
    for (const float number : one.polygon) std::printf(" %.9g", number);
    std::printf("\n");
  }
} catch (const std::exception& error) {
  std::fprintf(stderr, "error: %s\n", error.what());
  return 2;
}
"""


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    if shutil.which("g++") is None:
        pytest.skip("no g++ here to build exports/cpp/assemble.h with")
    folder = tmp_path_factory.mktemp("assemble")
    (folder / "driver.cc").write_text(DRIVER)
    options = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-fsanitize=address,undefined", f"-I{CPP}"]
    done = subprocess.run(["g++", *options, "driver.cc", "-o", "driver"], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / "driver"


def by_cpp(driver, folder, heads, raw, size, **others):
    """Exit code, detections as lists of numbers, and what it says on stderr."""
    numbers = [np.float32(size)]
    for level in (key[1] for key in heads if key.endswith("_rays")):
        parts = [heads[f"P{level}_{name}"] for name in ("classes", "centerness", "rays")]
        numbers += [np.float32([*parts[0].shape[1:], parts[2].shape[3]]), *(part.ravel() for part in parts)]
    (folder / "heads").write_bytes(np.concatenate(numbers).tobytes())
    described = {"classes": [{"name": 'the "candidates": 3 one', "category_id": 1}], **others, "raw": raw}
    with zipfile.ZipFile(folder / "metadata", "w") as archive:
        archive.writestr("metadata.json", json.dumps(described, indent=1))
    done = subprocess.run([driver, folder / "metadata", folder / "heads"], capture_output=True, text=True, timeout=60)
    return done.returncode, [np.array(line.split(), float) for line in done.stdout.splitlines()], done.stderr


@pytest.mark.parametrize("case", CASES)
def test_cpp_is_numpy(driver, tmp_path, case):
    heads, raw, size = make_heads(case)
    expected = by_numpy(heads, raw, size)
    status, rows, errors = by_cpp(driver, tmp_path, heads, raw, size)
    assert (status, errors, len(rows)) == (0, "", len(expected[0]))
    if rows:
        table = np.stack(rows)
        boxes = table[:, [3, 2, 5, 4]]  # the graph's order has y first
        polygons = table[:, 6:].reshape(len(rows), -1, 2)
        assert_equal([table[:, 1], table[:, 0], boxes, polygons], expected)


@pytest.mark.parametrize("name", ["classes", "centerness", "rays"])
def test_cpp_refuses_what_is_not_finite(driver, tmp_path, name):
    heads, raw, size = make_heads("one level")
    heads[f"P3_{name}"][...] = np.nan
    assert by_cpp(driver, tmp_path, heads, raw, size) == (2, [], "error: a number that is not finite\n")


@pytest.mark.parametrize(
    "change",
    [
        {"ray_units": {}},
        {"ray_units": {"0": 8.0}},
        {"ray_units": {"11": 8.0}},
        {"ray_units": {"x": 8.0}},
        {"ray_units": {"3": "8"}},
        {"ray_units": {"3": -1.0}},
        {"ray_units": [8.0]},
        {"ray_limit": 51},
        {"ray_limit": float("nan")},
        {"candidates": 0},
        {"candidates": 10**10},
        {"candidates": None},
        {"max_detections": 10**6},
        {"nms_iou": 1.5},
        {"score_threshold": -1},
        {"score_threshold": "0.1"},
        {"temperature": 0},
        {"score_bias": 51},
        {"voting_iou": 1.1},
        {"voting_iou": -0.1},
        {"voting_iou": "0.5"},
        {"voting_iou": None},
        {"voting_iou": float("nan")},
    ],
)
def test_cpp_checks_metadata_as_lite_does(driver, tmp_path, change):
    heads, raw, size = make_heads("one level")
    described = {"classes": [{"name": "a", "category_id": 1}], "input": {"height": 8, "width": 8}}
    lite.check_metadata({**described, "raw": raw}, "it")
    if change != {"ray_units": {}}:  # which lite finds when it assembles
        with pytest.raises(ValueError):
            lite.check_metadata({**described, "raw": {**raw, **change}}, "it")
    status, rows, errors = by_cpp(driver, tmp_path, heads, {**raw, **change}, size)
    assert (status, rows) == (2, []) and errors.startswith("error: metadata.json is not as export writes it: "), errors


@pytest.mark.parametrize("key", ["ray_units", "ray_limit", "score_threshold", "candidates", "nms_iou", "max_detections"])
def test_cpp_misses_what_is_missing(driver, tmp_path, key):
    heads, raw, size = make_heads("one level")
    del raw[key]
    status, rows, errors = by_cpp(driver, tmp_path, heads, raw, size)
    assert (status, rows) == (2, []) and key in errors


@pytest.mark.parametrize("classes", [[0.3, 0.4], [], [2], ["x"], "0.3"])
def test_cpp_needs_a_threshold_of_each_class(driver, tmp_path, classes):
    heads, raw, size = make_heads("one level")
    assert by_cpp(driver, tmp_path, heads, raw, size, thresholds={"overall": 0.5, "classes": [0.5]})[0] == 0
    status, rows, errors = by_cpp(driver, tmp_path, heads, raw, size, thresholds={"overall": 0.5, "classes": classes})
    assert (status, rows) == (2, []) and "thresholds" in errors
