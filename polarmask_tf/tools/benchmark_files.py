"""What exported .tflite files cost on this machine: latency, memory, and the share of the post-processing."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from polarmask_tf import lite
from polarmask_tf.errors import InputError
from polarmask_tf.export import flatbuffer

WARM_UP = 5


def run(files: Sequence[Path], *, image: np.ndarray | None = None, threads: int = 1, repeats: int = 50) -> list[dict]:
    """Time of one image through each file, the files taking turns so that a machine's slow moments meet all of them.

    Args:
      files: .tflite files that `polarmask export` wrote.
      image: uint8 RGB [h, w, 3], letterboxed beforehand; by default a made-up picture.
      threads: of LiteRT.
      repeats: timed calls of each, after 5 that do not count.

    Returns:
      Rows {"file", "mb" (10^6 bytes), "threads", "height", "width", "detections", "p50_ms", "p95_ms" (wall), "cpu_ms" (median,
      all threads), "ratio" (median of cpu_ms in the same turn, relative to the first file), "post_ms" (median CPU time of all
      that follows the head's last convolutions, run alone on what they give; 0 of a --raw file), "post_share" (of cpu_ms),
      "peak_mb" (most memory that a process that loads and runs it takes on top of what it had)}. Raises InputError for other
      files.
    """
    cases = []
    for path in files:
        try:
            metadata = lite.PolarMaskLite(path).metadata
        except ImportError:
            raise InputError("running .tflite files needs ai-edge-litert: pip install ai-edge-litert") from None
        except ValueError as error:
            raise InputError(str(error)) from None
        content = Path(path).read_bytes()
        size = metadata["input"]["height"], metadata["input"]["width"]
        picture = lite.letterbox(synthetic_picture() if image is None else image, *size)[0]
        network, rest = flatbuffer.split_at_postprocess(content)
        post = Runner(rest, picture, threads, after=Runner(network, picture, threads)) if rest else lambda: (0.0, 0.0)
        cases.append((path, metadata, len(content), Runner(content, picture, threads), post))
    turns = [[(whole(), post()) for *_, whole, post in cases] for _ in range(repeats + WARM_UP)][WARM_UP:]
    rows = []
    for number, (path, metadata, length, whole, _) in enumerate(cases):
        wall, cpu = zip(*(turn[number][0] for turn in turns), strict=True)
        post = statistics.median(turn[number][1][1] for turn in turns)
        rows.append(
            {
                "file": str(path),
                "mb": length / 1e6,
                "threads": threads,
                "height": metadata["input"]["height"],
                "width": metadata["input"]["width"],
                "detections": whole.detections(),
                "p50_ms": statistics.median(wall),
                "p95_ms": float(np.percentile(wall, 95)),
                "cpu_ms": statistics.median(cpu),
                "ratio": statistics.median(turn[number][0][1] / turn[0][0][1] for turn in turns),
                "post_ms": post,
                "post_share": post / statistics.median(cpu),
                "peak_mb": _peak(path, threads),
            }
        )
    return rows


def format_rows(rows: list[dict]) -> str:
    """The rows of `run` as text."""
    width = max(len(row["file"]) for row in rows)
    lines = [
        f"one image a call, {rows[0]['threads']} thread{'s' * (rows[0]['threads'] > 1)}, medians over turns",
        f"{'file':<{width}}      MB       input  found   p50 ms   p95 ms   CPU ms  ratio  post ms  (share)  peak MB",
    ]
    for row in rows:
        lines.append(
            f"{row['file']:<{width}} {row['mb']:7.2f} {row['height']:5} x {row['width']:4} {row['detections']:>6} "
            f"{row['p50_ms']:8.2f} {row['p95_ms']:8.2f} {row['cpu_ms']:8.2f} {row['ratio']:6.3f} {row['post_ms']:8.2f} "
            f"{row['post_share']:7.1%} {row['peak_mb']:9.1f}"
        )
    return "\n".join(lines)


def synthetic_picture(height: int = 480, width: int = 640) -> np.ndarray:
    """Colored blocks with noise, always the same: uint8 [height, width, 3]."""
    rng = np.random.default_rng(0)
    blocks = np.kron(rng.integers(0, 256, (-(-height // 32), -(-width // 32), 3)), np.ones((32, 32, 1)))[:height, :width]
    return np.clip(blocks + rng.normal(0, 10, blocks.shape), 0, 255).astype(np.uint8)


class Runner:
    """A loaded file with its input, a picture or what another one gives; a call gives wall and CPU ms of one inference."""

    def __init__(self, content: bytes, picture: np.ndarray, threads: int, after: Runner | None = None):
        from ai_edge_litert.interpreter import Interpreter

        self.interpreter = Interpreter(model_content=content, num_threads=threads)
        self.interpreter.allocate_tensors()
        if after is None:
            images = self.interpreter.get_input_details()[0]
            self.interpreter.set_tensor(images["index"], picture[np.newaxis].astype(images["dtype"]))
            return
        after.interpreter.invoke()
        for end in after.interpreter.get_output_details():  # see flatbuffer.split_at_postprocess
            self.interpreter.set_tensor(end["index"], after.interpreter.get_tensor(end["index"]))

    def __call__(self) -> tuple[float, float]:
        wall, cpu = time.perf_counter(), time.process_time()
        self.interpreter.invoke()
        return 1e3 * (time.perf_counter() - wall), 1e3 * (time.process_time() - cpu)

    def detections(self):
        """How many the last call found; None of a --raw file."""
        names = self.interpreter.get_signature_list()["serving_default"]["outputs"]
        if "num_detections" not in names:
            return "-"
        return int(
            self.interpreter.get_signature_runner("serving_default")(
                images=self.interpreter.get_tensor(self.interpreter.get_input_details()[0]["index"])
            )["num_detections"][0]
        )


def _peak(path, threads: int) -> float:
    done = subprocess.run(
        [sys.executable, "-c", _LOAD_AND_RUN, str(path), str(threads)], capture_output=True, text=True, check=True
    )
    return float(done.stdout.split()[-1])


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
