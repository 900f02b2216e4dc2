"""Exported files on LiteRT's GPU delegate: the numbers of its CPU.

No GPU is needed: the delegate's WebGPU runs on a software Vulkan, see helpers/vulkan.py. Each file runs in a process of its
own, which a driver may crash.
"""

import functools
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from benchmarks.edge_table import make, pictures
from PIL import Image

from helpers.networks import marked
from helpers.vulkan import swiftshader
from polarmask_tf import config, lite
from polarmask_tf.export import flatbuffer, tflite

SIZE = 96
EDGE = sorted(path.stem for path in config.configs_dir().glob("edge*.yaml"))
SCORES, POLYGONS, LOGITS = 2e-5, 5e-5, 1e-4  # the largest difference that is allowed; polygons are relative to the image
RUN = """
import sys
import numpy as np
from ai_edge_litert.compiled_model import CompiledModel
from ai_edge_litert.hardware_accelerator import HardwareAccelerator

file, image, out = sys.argv[1:]
model = CompiledModel.from_file(file, HardwareAccelerator.GPU | HardwareAccelerator.CPU)
details = model.get_output_tensor_details("serving_default")
names = model.get_signature_list()["serving_default"]["outputs"]
given, made = model.create_input_buffers(0), model.create_output_buffers(0)
given[0].write(np.load(image))
model.run_by_index(0, given, made)
values = {}
for name, buffer in zip(names, made):
    shape = details[name]["shape"]
    values[name] = buffer.read(int(np.prod(shape)), np.dtype(details[name]["dtype"])).reshape(shape)
np.savez(out, whole=model.is_fully_accelerated(), **values)
"""


@pytest.fixture(scope="session")
def vulkan(tmp_path_factory):
    return swiftshader(tmp_path_factory.mktemp("vulkan"))


def picture():
    return np.roll(next(pictures(SIZE)), 9, axis=1)[np.newaxis]


@pytest.fixture
def both(vulkan, tmp_path):
    """both(file) -> its outputs for a picture on the CPU, and on the GPU with "whole", whether all of it ran there."""
    image = picture()
    np.save(tmp_path / "image.npy", image)

    def run(file):
        from ai_edge_litert.interpreter import Interpreter

        expected = Interpreter(model_path=str(file)).get_signature_runner("serving_default")(images=image)
        command = [sys.executable, "-c", RUN, str(file), str(tmp_path / "image.npy"), str(tmp_path / "out.npz")]
        done = subprocess.run(command, env=vulkan, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
        assert "SwiftShader" in done.stderr  # and not a device that this machine may have
        with np.load(tmp_path / "out.npz") as found:
            return expected, dict(found)

    return run


def export(model, folder, precision="fp32", raw=False):
    file = folder / tflite.file_name(precision, raw)
    return tflite.export_tflite(model, file, precision, raw=raw, images=functools.partial(pictures, SIZE))


def assert_equal_detections(expected, found, at_least):
    """The same objects, in an order in which only nearly equal scores may have changed places."""
    count = int(expected["num_detections"][0])
    assert count == int(found["num_detections"][0]) >= at_least
    scores, classes, polygons = (
        [outputs[f"detection_{name}"][0][:count] for outputs in (expected, found)] for name in ("scores", "classes", "polygons")
    )
    left = set(range(count))
    for row in range(count):
        equal = [
            other
            for other in left
            if abs(scores[1][other] - scores[0][row]) <= SCORES
            and classes[1][other] == classes[0][row]
            and np.abs(polygons[1][other] - polygons[0][row]).max() <= POLYGONS
        ]
        assert equal, f"detection {row} of {count}, score {scores[0][row]}: not found"
        left.remove(equal[0])


def assert_equal_logits(expected, found):
    assert found.pop("whole")  # every operation on the accelerator
    assert sorted(found) == sorted(expected)
    for name, value in expected.items():
        assert 0 < np.abs(value).max() < 50, name
        np.testing.assert_allclose(found[name], value, rtol=0, atol=LOGITS, err_msg=name)


@pytest.mark.parametrize("name", [marked(name, config.load(name)) for name in EDGE])
@pytest.mark.slow
def test_every_edge_config(name, both, tmp_path):
    model = make(name, SIZE, 60)
    everything = [("fp32", False), ("fp32", True), ("fp16", False), ("fp16", True)]
    for precision, raw in everything if name == "edge" else everything[1:3]:
        expected, found = both(export(model, tmp_path, precision, raw=raw))
        if raw:
            assert_equal_logits(expected, found)
        else:
            assert_equal_detections(expected, found, 30)
            assert len(set(expected["detection_classes"][0].tolist())) > 3


OTHERWISE = {
    "three classes": [],
    "places whose number no 4 divides": ["postprocess.pre_nms_top_k=7"],
    "pairs of a location and a class": ["postprocess.multi_label=true", "postprocess.pre_nms_top_k=25"],
    "all there is": ["postprocess.multi_label=true", "postprocess.pre_nms_top_k=1000"],
    "images normalised by themselves": ["model.normalization=image"],
    "four rays": ["model.rays=4"],
    "refined": ["model.refine_channels=16"],
    "voting": ["postprocess.voting_iou_threshold=0.3"],
    "voting of few": ["postprocess.voting_iou_threshold=0.1", "postprocess.pre_nms_top_k=7", "model.rays=35"],
}


@pytest.mark.parametrize("what", OTHERWISE)
def test_what_users_may_set(what, both, tmp_path):
    model = make("edge_small", SIZE, 20, *OTHERWISE[what], classes=3)
    if what == "refined":  # it begins as one that changes nothing
        kernel = model.refiner.convs[-1].kernel
        kernel.assign(np.random.default_rng(0).normal(0, 0.5, kernel.shape))
    expected, found = both(export(model, tmp_path))
    assert_equal_detections(expected, found, 8)
    if what.startswith(("voting", "refined")):
        model.refiner = None
        plain = model.detect(picture(), voting_iou_threshold=0.0)
        assert (np.abs(plain["detection_polygons"] - expected["detection_polygons"]).max((0, 2, 3)) > 0.01).sum() > 3


@pytest.mark.slow
def test_group_norm_runs_whole_on_the_accelerator(both, tmp_path):
    model = make("edge_small", SIZE, 60, "model.head.norm=group", "model.backbone.norm=group")
    assert_equal_logits(*both(export(model, tmp_path, raw=True)))
    assert_equal_detections(*both(export(model, tmp_path)), 30)


@pytest.mark.slow
def test_8_bits_are_8_bits_there_too(both, tmp_path):
    """Within what rounding differently makes of it: in float the distance would be that of float32, 1 in place of .5 (seen: up
    to .27 on a processor with AVX2 alone, whose kernels round in other places than those with AVX-512; below .1 there)."""
    model = make("edge", SIZE, 60)
    exact, _ = both(export(model, tmp_path, raw=True))
    expected, found = both(export(model, tmp_path, "int8", raw=True))
    assert found.pop("whole")
    for name, value in expected.items():
        assert np.abs(found[name] - value).mean() < 0.5 * np.abs(value - exact[name]).mean(), name


def test_no_tensor_has_more_than_four_dimensions(tmp_path):
    from tensorflow.lite.python import schema_py_generated as schema

    model = make("edge_small", SIZE, 20, "model.head.norm=group")
    content = export(model, tmp_path, raw=True).read_bytes()
    tensors = schema.ModelT.InitFromPackedBuf(content, 0).subgraphs[0].tensors
    assert max(len(tensor.shape) for tensor in tensors if tensor.shape is not None) == 4
    assert {"SUM", "TILE"} <= {kind for kind, *_ in flatbuffer.operations(content)}


LITE = """
import sys
import numpy as np
from polarmask_tf import lite

class Kept(lite.PolarMaskLite):
    def __call__(self, image, **options):
        found = super().__call__(image, **options)
        np.savez(sys.argv[3], **found)
        return found


lite.PolarMaskLite = Kept
sys.exit(lite.main([*sys.argv[1:3], "--accelerator", "gpu", "--score", "0"]))
"""


def test_lite_runs_there_and_says_what(vulkan, tmp_path):
    model = make("edge_small", SIZE, 60, "model.normalization=image")
    image = tmp_path / "image.png"
    Image.fromarray(np.roll(next(pictures(SIZE)), 9, axis=1)).save(image)
    assembling = "; polygons on the CPU (NumPy)"
    for raw in (False, True):
        file = export(model, tmp_path, raw=raw)
        expected = lite.PolarMaskLite(file)
        assert expected.runs_on == "network on the CPU" + assembling * raw
        done = subprocess.run(
            [sys.executable, "-c", LITE, str(file), str(image), str(tmp_path / "out.npz")],
            **{"env": vulkan, "cwd": Path(lite.__file__).parents[1], "capture_output": True, "text": True, "timeout": 300},
        )
        assert done.returncode == 0, done.stderr[-2000:]
        with np.load(tmp_path / "out.npz") as found:
            found = dict(found)
        lines = [line for line in done.stderr.splitlines() if not line.startswith("INFO")]
        assert len(lines) == 1, lines  # LiteRT's own forty are not shown
        share = re.fullmatch(r"network on the GPU \(SwiftShader[^;:]*\): (.*)", lines[0])[1]
        counts = re.fullmatch(r"(\d+) of (\d+) operations, the others on the CPU", share)
        assert share == "every operation" + assembling if raw else 100 < int(counts[1]) < int(counts[2])
        assert len(done.stdout.splitlines()) == len(found["scores"])  # nothing of LiteRT's where detections are written
        assert_equal_detections(*(in_the_contract(detections) for detections in (expected(image), found)), 30)


def in_the_contract(detections):
    """lite's detections as a file's outputs."""
    named = {f"detection_{name}": detections[name][np.newaxis] for name in ("scores", "classes")}
    polygons = detections["polygons"][np.newaxis] / SIZE
    return {"num_detections": [len(detections["scores"])], "detection_polygons": polygons, **named}
