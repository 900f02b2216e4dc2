"""What a training step costs, and its input: numbers a user can make again on the machine that is to train."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import tensorflow as tf

from polarmask_tf import config as configs
from polarmask_tf.config import Config
from polarmask_tf.data import pipeline, records
from polarmask_tf.tools.benchmark import device_name, synthetic_data
from polarmask_tf.training import replicas
from polarmask_tf.training.train import build, check_layout


def run(config: Config, strategy: tf.distribute.Strategy, *, steps: int = 10) -> list[dict]:
    """Images/s of the input pipeline alone, of the training step alone, and of both together.

    Args:
      config: its data.train is read; without one, made-up 640 x 480 JPEGs with 7 objects each.
      strategy: see distribution.make; every worker calls this.
      steps: timed ones, after three that do not count.

    Returns:
      Rows {"what", "images_per_second", "step_ms" (wall, medians over the steps), "cpu_ms" (of all threads of this process)}.

    Raises InputError for data that cannot be read and a batch that cannot be divided, as training does.
    """
    check_layout(config, strategy.num_replicas_in_sync)
    with contextlib.ExitStack() as stack:
        if config.data.train:
            info = records.load_dataset_info(config.data.train)
        else:
            info = synthetic_data(Path(stack.enter_context(tempfile.TemporaryDirectory())))
        with strategy.scope():
            model = build(config, info.classes)
        worker, workers = replicas.worker(strategy)
        count = strategy.num_replicas_in_sync
        batches = pipeline.training_batches(
            info, config, seed=config.train.seed, worker=worker, workers=workers, replicas=count
        )

        def on_devices(dataset):
            return strategy.distribute_datasets_from_function(lambda _: dataset) if count > 1 else dataset

        step = model.make_train_function()
        local = count // workers
        kept = list(batches.take(local))
        first = tf.data.Dataset.from_tensor_slices(_stack(kept)).repeat()
        rows = []
        for what, dataset, function in (
            ("input pipeline", batches, lambda iterator: [next(iterator) for _ in range(local)]),
            ("step", on_devices(first), step),
            ("both", on_devices(batches), step),
        ):
            iterator = iter(dataset)
            wall, cpu = _medians(lambda f=function, i=iterator: f(i), steps)
            rows.append(
                {
                    "what": what,
                    "images_per_second": 1e3 * config.data.batch / wall,
                    "step_ms": wall,
                    "cpu_ms": cpu,
                }
            )
    return rows


def format_rows(rows: list[dict], config: Config, strategy: tf.distribute.Strategy) -> str:
    """The rows of `run` as text, with what limits the training."""
    replicas = strategy.num_replicas_in_sync
    pipeline_alone, step_alone, both = (row["images_per_second"] for row in rows)
    lines = [
        f"{device_name()}; {replicas} devices x {config.data.batch // replicas} images, {config.train.precision}",
        "                images/s    ms a step    CPU ms",
        *(f"{row['what']:<15} {row['images_per_second']:8.1f} {row['step_ms']:12.1f} {row['cpu_ms']:9.1f}" for row in rows),
    ]
    if pipeline_alone < 1.1 * step_alone:
        lines.append(
            "the input pipeline limits: more CPU cores, `polarmask convert --decoded`, or more shards with data.sharding: file"
        )
    elif both < 0.8 * step_alone:
        lines.append("the step limits, and the pipeline takes its cores: more CPU cores, or `polarmask convert --decoded`")
    else:
        lines.append("the step limits: more devices, train.precision, train.jit_compile")
    return "\n".join(lines)


def growth(passes: int = 2) -> list[dict]:
    """Time and memory of a training step against batch, instances and rays, each in a process of its own.

    Returns rows {"what", "batch", "instances", "rays", "cpu_ms" (of a step, all threads, median; the least of the passes,
    since a machine that others use has slow minutes), "peak_mb" (resident, of the process), "ratio" (of cpu_ms to the first
    row of its kind)}.
    """
    cases = [("batch", {"batch": b}) for b in (2, 4, 8, 16)]
    cases += [("instances", {"instances": n}) for n in (1, 10, 50, 100, 200)]
    cases += [("rays", {"rays": n}) for n in (4, 18, 36, 72)]
    rows = [{"what": what, "batch": 4, "instances": 10, "rays": 36, **change} for what, change in cases]
    for row in rows * passes:
        case = json.dumps({key: row[key] for key in ("batch", "instances", "rays")})
        command = [sys.executable, "-m", "polarmask_tf.tools.benchmark_train", case]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        row |= {key: min(value, row.get(key, value)) for key, value in json.loads(done.stdout.splitlines()[-1]).items()}
    for row in rows:
        first = next(r for r in rows if r["what"] == row["what"])
        row["ratio"] = row["cpu_ms"] / first["cpu_ms"]
    return rows


def rays_ratio(config: Config, rays=(4, 36), steps: int = 10) -> float:
    """CPU time of a step with rays[1] rays relative to rays[0], the two taking turns in one process."""
    sides = []
    for number in rays:
        settings = dataclasses.replace(config, model=dataclasses.replace(config.model, rays=number))
        model = build(settings, 80)
        batch = synthetic_batch(settings, 10)
        iterator = iter(tf.data.Dataset.from_tensors(batch).repeat())
        sides.append((model.make_train_function(), iterator))
    for function, iterator in sides * 3:
        function(iterator)
    times = [[], []]
    for _ in range(steps):
        for (function, iterator), measured in zip(sides, times, strict=True):
            measured.append(_time(lambda f=function, i=iterator: f(i))[1])
    return statistics.median(b / a for a, b in zip(*times, strict=True))


def synthetic_batch(config: Config, instances: int, edges: int = 40) -> tuple:
    """A batch of noise with so many round objects an image, spread over it: what pipeline.training_batches gives."""
    rng = np.random.default_rng(0)
    (height, width), batch = configs.input_size(config.data), config.data.batch
    centers = rng.uniform([0.1 * width, 0.1 * height], [0.9 * width, 0.9 * height], (batch, instances, 2))
    radius = rng.uniform(0.02, 0.2, (batch, instances, 1)) * min(height, width)
    angles = 2 * np.pi * np.arange(edges) / edges
    ring = centers[:, :, None] + radius[..., None] * np.stack([np.cos(angles), np.sin(angles)], -1)
    locations = sum(-(-height // 2**level) * -(-width // 2**level) for level in config.model.fpn.levels)
    return rng.integers(0, 256, (batch, height, width, 3), np.uint8), {
        "boxes": np.float32(np.concatenate([centers - radius, centers + radius], -1)),
        "centers": np.float32(centers),
        "classes": rng.integers(0, 80, (batch, instances), np.int32),
        "edges": np.float32(np.concatenate([ring, np.roll(ring, -1, 2)], -1)),
        "window": np.tile(np.float32([width, height]), (batch, 1)),
        "ignore": np.zeros((batch, locations), bool),
    }


def _stack(batches: list) -> tuple:
    return tf.nest.map_structure(lambda *values: tf.stack(values), *batches)


def format_growth(rows: list[dict]) -> str:
    """The rows of `growth` as text."""
    head = f"{device_name()}; configs/small.yaml at 256 x 320, a step"
    lines = [head, "varied      batch  instances  rays    CPU ms  ratio   peak MB"]
    lines += [
        f"{row['what']:<10} {row['batch']:6} {row['instances']:10} {row['rays']:5} {row['cpu_ms']:9.1f} {row['ratio']:6.2f} "
        f"{row['peak_mb']:9.0f}"
        for row in rows
    ]
    return "\n".join(lines)


def _medians(function, steps: int) -> tuple[float, float]:
    times = [_time(function) for _ in range(steps + 3)][3:]
    return tuple(statistics.median(values) for values in zip(*times, strict=True))


def _time(function) -> tuple[float, float]:
    """Wall and CPU milliseconds of a call that returns numbers, which are waited for."""
    wall, cpu = time.perf_counter(), time.process_time()
    tf.nest.map_structure(np.asarray, function())
    return 1e3 * (time.perf_counter() - wall), 1e3 * (time.process_time() - cpu)


def _one_case(batch: int, instances: int, rays: int) -> dict:
    config = configs.load("small", [f"data.batch={batch}", f"model.rays={rays}", "data.size=[256,320]"])
    function = build(config, 80).make_train_function()
    iterator = iter(tf.data.Dataset.from_tensors(synthetic_batch(config, instances)).repeat())
    _, cpu = _medians(lambda: function(iterator), 7)
    return {"cpu_ms": cpu, "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


if __name__ == "__main__":
    print(json.dumps(_one_case(**json.loads(sys.argv[1]))))
