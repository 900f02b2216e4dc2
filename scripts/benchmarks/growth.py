"""Time and memory of a training step against batch, instances and rays (docs/growth.csv); about a quarter of an hour.

    python scripts/benchmarks/growth.py [--csv FILE]

configs/small.yaml at 256 x 320 on synthetic batches, each case in a process of its own; then the paper's network with 4 rays
beside itself with 36, in turns.
"""

import argparse
import dataclasses
import json
import resource
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np

from polarmask_tf import config as configs
from polarmask_tf.files import atomic_write, format_csv, format_table

CASES = [("batch", {"batch": b}) for b in (2, 4, 8, 16)]
CASES += [("instances", {"instances": n}) for n in (1, 10, 50, 100, 200)]
CASES += [("rays", {"rays": n}) for n in (4, 18, 36, 72)]


def growth(passes: int = 2) -> list[dict]:
    """Rows {"what", "batch", "instances", "rays", "cpu_ms" (of a step, all threads, median; the least of the passes, since a
    machine that others use has slow minutes), "peak_mb" (resident, of the process), "ratio" (of cpu_ms to the first row of
    its kind)}."""
    rows = [{"what": what, "batch": 4, "instances": 10, "rays": 36, **change} for what, change in CASES]
    for row in rows * passes:
        case = json.dumps({key: row[key] for key in ("batch", "instances", "rays")})
        done = subprocess.run([sys.executable, __file__, "--case", case], capture_output=True, text=True, check=True)
        row |= {key: min(value, row.get(key, value)) for key, value in json.loads(done.stdout.splitlines()[-1]).items()}
    for row in rows:
        first = next(r for r in rows if r["what"] == row["what"])
        row["ratio"] = row["cpu_ms"] / first["cpu_ms"]
    return rows


def one_case(batch: int, instances: int, rays: int) -> dict:
    """CPU milliseconds of a step and the most memory that this process had, megabytes."""
    from polarmask_tf.tools.benchmark import in_turns

    config = configs.load("small", [f"data.batch={batch}", f"model.rays={rays}", "data.size=[256,320]"])
    cpu = float(np.median(in_turns([step(config, instances)], 7)[..., 1]))
    return {"cpu_ms": cpu, "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def rays_ratio(config: configs.Config, rays=(4, 36), steps: int = 10) -> float:
    """CPU time of a step with rays[1] rays relative to rays[0], the two taking turns in one process."""
    from polarmask_tf.tools.benchmark import in_turns

    sides = [step(dataclasses.replace(config, model=dataclasses.replace(config.model, rays=number)), 10) for number in rays]
    return statistics.median(b / a for a, b in in_turns(sides, steps)[..., 1])


def step(config: configs.Config, instances: int):
    """A call that trains one step, always on the same batch."""
    import tensorflow as tf

    from polarmask_tf.tools.benchmark_train import finished
    from polarmask_tf.training.train import build

    function = build(config, 80).make_train_function()
    iterator = iter(tf.data.Dataset.from_tensors(synthetic_batch(config, instances)).repeat())
    return lambda: finished(function(iterator))


def synthetic_batch(config: configs.Config, instances: int, edges: int = 40) -> tuple:
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--csv", type=Path, metavar="FILE", help="also write the rows as CSV")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        print(json.dumps(one_case(**json.loads(args.case))))
        return 0
    from polarmask_tf.tools.benchmark import device_name

    rows = growth()
    print(f"{device_name()}; configs/small.yaml at 256 x 320, a step")
    columns = {"what": "", "batch": "", "instances": "", "rays": "", "cpu_ms": ".1f", "ratio": ".2f", "peak_mb": ".0f"}
    print(format_table(rows, columns))
    ratio = rays_ratio(configs.load("paper_1x", ["data.batch=4", "data.fit=letterbox", "data.size=[256,320]"]))
    print(f"the paper's network with 36 rays relative to 4, in turns: {ratio:.3f} of the CPU time")
    if args.csv:
        atomic_write(args.csv, format_csv(rows, digits=3))
    return 0


if __name__ == "__main__":
    sys.exit(main())
