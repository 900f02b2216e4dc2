"""`polarmask benchmark`: what configs, runs and exported files cost on this machine; numbers a user can make again."""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import platform
import statistics
import subprocess
import sys
import time
import typing
from pathlib import Path

import numpy as np
import tensorflow as tf
from PIL import Image

from polarmask_tf import config as configs
from polarmask_tf import lite
from polarmask_tf.errors import InputError
from polarmask_tf.export import flatbuffer
from polarmask_tf.files import format_table
from polarmask_tf.inference.predictor import network_input
from polarmask_tf.modeling.polarmask import PolarMask
from polarmask_tf.weights.runs import load_run

MOST_THREADS = 256
WARM_UP = 5  # calls of a .tflite file that do not count


def benchmark_models(models: typing.Sequence, images: typing.Sequence[np.ndarray] = (), repeats: int = 10) -> list[dict]:
    """Inference time of one image (batch 1) for each model: the FPS column of table 1f.

    Args:
      models: each a config.Config, the name or path of a config file, or a run directory. A config gets random weights
        and 80 classes; its score threshold is taken as 0, for else nothing would reach NMS.
      images: uint8 RGB [h, w, 3], taken in turn; by default a synthetic picture. Each is scaled to the model's input
        beforehand: decoding and scaling are not timed.
      repeats: timed calls. The models take turns, so that a machine that changes its speed does so for all of them.

    Returns:
      Rows {"model", "device", "height", "width" (of the input; of the first image), "what" ("network", or "network and
      post-processing"), "wall_ms", "cpu_ms" (of all threads), "fps"}: medians over the repeats. Runs on the GPU if there
      is one. Raises InputError for what is neither config nor run.
    """
    images = images or [synthetic_picture()]
    rows, calls = [], []
    for number, source in enumerate(models, 1):
        model, options = _model(source)
        inputs = [tf.constant(network_input(image, model.config.data)[0][np.newaxis]) for image in images]
        height, width = inputs[0].shape[1:3]
        name = f"config {number}" if isinstance(source, configs.Config) else str(source)
        shared = {"model": name, "device": device_name(), "height": height, "width": width}
        network = tf.function(lambda x, model=model: model(x, training=False))
        whole = tf.function(lambda x, model=model, options=options: model.detect(x, **options))
        for what, function in (("network", network), ("network and post-processing", whole)):
            rows.append({**shared, "what": what})
            calls.append(_on_each(function, inputs))
    # The first call builds the graph, and the next may still choose algorithms.
    wall, cpu = np.median(in_turns(calls, repeats, warm_up=2 * len(images)), axis=0).T
    return [row | {"wall_ms": w, "cpu_ms": c, "fps": 1e3 / w} for row, w, c in zip(rows, wall, cpu, strict=True)]


def format_models(rows: list[dict]) -> str:
    """The rows of `benchmark_models` as text."""
    columns = {"model": "", "height": "", "width": "", "wall_ms": ".1f", "cpu_ms": ".1f", "fps": ".2f", "what": ""}
    return f"{rows[0]['device']}; one image a call, medians\n{format_table(rows, columns)}"


def _model(source):
    """The network, and what its post-processing is to do otherwise than its config says."""
    if not isinstance(source, configs.Config):
        if Path(source).is_dir():
            return load_run(source), {}
        source = configs.load(source)
    return PolarMask(source, 80), {"score_threshold": 0.0}


def _on_each(function, inputs):
    """A call of it on the next of the inputs, over and over, which waits for the result."""
    inputs = itertools.cycle(inputs)

    def call():
        function(next(inputs))
        tf.test.experimental.sync_devices()  # a GPU works on after the call has returned

    return call


def benchmark_files(
    files: typing.Sequence, *, image: np.ndarray | None = None, threads: int = 1, repeats: int = 50
) -> list[dict]:
    """Time of one image through each file, the files taking turns so that a machine's slow moments meet all of them.

    Args:
      files: .tflite files that `polarmask export` wrote.
      image: uint8 RGB [h, w, 3], letterboxed beforehand; by default a synthetic picture.
      threads: of LiteRT.
      repeats: timed calls of each, after 5 that do not count.

    Returns:
      Rows {"file", "mb" (10^6 bytes), "threads", "height", "width", "detections" ("-" of a --raw file), "p50_ms", "p95_ms"
      (wall), "cpu_ms" (median, all threads), "ratio" (median of cpu_ms in the same turn, relative to the first file), "post_ms"
      (median CPU time of all that follows the head's last convolutions, run alone on what they give; 0 of a --raw file),
      "post_share" (of cpu_ms), "peak_mb" (most memory that a process that loads and runs it takes on top of what it had)}.
      Raises InputError for other files.
    """
    if not 1 <= threads <= MOST_THREADS:
        raise InputError(f"benchmark: {threads} threads, of 1 to {MOST_THREADS}")
    rows, whole, post = [], [], {}
    for number, path in enumerate(files):
        try:
            model = lite.PolarMaskLite(path)
        except ImportError:
            raise InputError("running .tflite files needs ai-edge-litert: pip install ai-edge-litert") from None
        except ValueError as error:
            raise InputError(str(error)) from None
        content, (height, width) = Path(path).read_bytes(), model.input_size
        picture = lite.letterbox(synthetic_picture() if image is None else image, height, width)[0]
        whole.append(FileRunner(content, picture, threads))
        network, rest = flatbuffer.split_at_postprocess(content)
        if rest:
            post[number] = FileRunner(rest, picture, threads, after=FileRunner(network, picture, threads))
        row = {"file": str(path), "mb": len(content) / 1e6, "threads": threads, "height": height, "width": width}
        rows.append({**row, "detections": "-" if "raw" in model.metadata else len(model(picture)["scores"])})
    times = in_turns([*whole, *post.values()], repeats, WARM_UP)
    post = dict(zip(post, np.median(times[:, len(whole) :, 1], axis=0), strict=True))
    for number, row in enumerate(rows):
        wall, cpu = times[:, number].T
        row |= {"p50_ms": statistics.median(wall), "p95_ms": float(np.percentile(wall, 95)), "cpu_ms": statistics.median(cpu)}
        row["ratio"] = statistics.median(cpu / times[:, 0, 1])
        row["post_ms"] = post.get(number, 0.0)
        row["post_share"] = row["post_ms"] / row["cpu_ms"]
        command = [sys.executable, "-c", _LOAD_AND_RUN, row["file"], str(threads)]
        row["peak_mb"] = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])
    return rows


def format_files(rows: list[dict]) -> str:
    """The rows of `benchmark_files` as text."""
    columns = {"file": "", "mb": ".2f", "height": "", "width": "", "detections": ""}
    columns |= {"p50_ms": ".2f", "p95_ms": ".2f", "cpu_ms": ".2f", "ratio": ".3f", "post_ms": ".2f", "post_share": ".1%"}
    columns["peak_mb"] = ".1f"
    return f"one image a call, threads: {rows[0]['threads']}; medians over turns\n{format_table(rows, columns)}"


class FileRunner:
    """A loaded file with its input, a picture or what another one gives; a call is one inference."""

    def __init__(self, content: bytes, picture: np.ndarray, threads: int, after: FileRunner | None = None):
        from ai_edge_litert.interpreter import Interpreter

        self.interpreter = Interpreter(model_content=content, num_threads=threads)
        self.interpreter.allocate_tensors()
        if after is None:
            images = self.interpreter.get_input_details()[0]
            self.interpreter.set_tensor(images["index"], picture[np.newaxis].astype(images["dtype"]))
            return
        after()
        for end in after.interpreter.get_output_details():  # see flatbuffer.split_at_postprocess
            self.interpreter.set_tensor(end["index"], after.interpreter.get_tensor(end["index"]))

    def __call__(self) -> None:
        self.interpreter.invoke()


# In a process without TensorFlow, whose own memory would hide what a small file takes.
_LOAD_AND_RUN = """
import re, sys
from ai_edge_litert.interpreter import Interpreter
# Linux; getrusage would give the parent's peak where that was higher.
peak = lambda: int(re.search("VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024
before = peak()
model = Interpreter(model_path=sys.argv[1], num_threads=int(sys.argv[2]))
model.allocate_tensors()
model.invoke()
model.invoke()
print(peak() - before)
"""


def in_turns(calls: typing.Sequence[typing.Callable], repeats: int, warm_up: int = 3) -> np.ndarray:
    """Milliseconds by the clock and of all threads together, float [repeats, calls, 2]; the calls take turns.

    The second is what to compare: others who use the machine change it less. `warm_up` turns before do not count.
    """
    turns = np.zeros((warm_up + repeats, len(calls), 2))
    for turn, (number, call) in itertools.product(turns, enumerate(calls)):
        wall, cpu = time.perf_counter(), time.process_time()
        call()
        turn[number] = 1e3 * (time.perf_counter() - wall), 1e3 * (time.process_time() - cpu)
    return turns[warm_up:]


def device_name() -> str:
    """What TensorFlow computes on."""
    for gpu in tf.config.list_physical_devices("GPU"):
        return tf.config.experimental.get_device_details(gpu).get("device_name", gpu.name)
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
        return f"{name}, {os.cpu_count()} cores"
    return f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def synthetic_picture(height: int = 480, width: int = 640, seed: int = 0) -> np.ndarray:
    """Smooth colours and some noise, which make a JPEG as large as a photograph's: uint8 [height, width, 3]."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (height // 32 + 2, width // 32 + 2, 3), np.uint8)
    smooth = np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC), np.float32)
    return np.clip(smooth + rng.normal(0, 8, smooth.shape), 0, 255).astype(np.uint8)


def as_jpeg(image: np.ndarray) -> bytes:
    """uint8 [h, w, 3] as a JPEG file."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=90)
    return file.getvalue()
