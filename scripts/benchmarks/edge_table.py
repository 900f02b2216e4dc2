"""Writes exports/edge.csv: what the edge configs cost on this machine, every precision, randomly initialised.

    python scripts/benchmarks/edge_table.py [--configs edge,edge_small] [--sizes 320] [--precisions fp32,int8] [--csv FILE]

Without arguments about half an hour.
"""

import argparse
import functools
import itertools
import sys
import tempfile
from pathlib import Path

import numpy as np
import tf_keras

from polarmask_tf import config
from polarmask_tf.export import tflite
from polarmask_tf.files import atomic_write, format_csv
from polarmask_tf.modeling.polarmask import PolarMask
from polarmask_tf.tools import benchmark, summary

CONFIGS = "edge,edge_fast,edge_small,edge_lite0"
CLASSES = 80
EXPORTS = Path(__file__).resolve().parents[2] / "exports"


def make(name: str, size: int, detections: int, *settings: str, classes: int = CLASSES) -> PolarMask:
    """A network of random weights, its BatchNorms fitted, that finds about so many objects in the benchmark's picture."""
    tf_keras.utils.set_random_seed(0)
    found = (f"postprocess.max_detections={detections}", "postprocess.score_threshold=0.0")
    model = PolarMask(config.load(name, [*settings, f"data.size=[{size},{size}]", *found]), classes)
    model.head.classes.conv.kernel.assign(np.random.default_rng(0).normal(0, 0.1, model.head.classes.conv.kernel.shape))
    for layer in model.submodules:
        if isinstance(layer, tf_keras.layers.BatchNormalization):
            layer.momentum = 0.0
    model(np.stack(list(pictures(size))), training=True)
    return model


def pictures(size: int):
    picture = benchmark.synthetic_picture(size, size)
    return (np.roll(picture, 17 * shift, axis=shift % 2) for shift in range(4))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--configs", default=CONFIGS)
    parser.add_argument("--sizes", default="256,320,416,512,640")
    parser.add_argument("--precisions", default=",".join(tflite.PRECISIONS))
    parser.add_argument("--detections", default="10,100")
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--csv", type=Path, default=EXPORTS / "edge.csv")
    args = parser.parse_args()
    configs, precisions = args.configs.split(","), args.precisions.split(",")
    cases = itertools.product(map(int, args.sizes.split(",")), map(int, args.detections.split(",")), configs)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for size, detections, name in cases:
            model = make(name, size, detections)
            parts = summary.summarize(model.config, CLASSES, (size, size))[-1]
            files = [Path(folder) / f"{name}_{precision}.tflite" for precision in precisions]
            for file, precision in zip(files, precisions, strict=True):
                tflite.export_tflite(model, file, precision, images=functools.partial(pictures, size))
            for row, precision in zip(benchmark.benchmark_files(files, repeats=args.repeats), precisions, strict=True):
                del row["file"]
                network = {key: parts[key] for key in ("parameters", "multiply_adds")}
                rows.append({"config": name, "precision": precision, **network, **row})
                print(*(f"{k} {v:.4g}" if isinstance(v, float) else v for k, v in rows[-1].items()), sep=", ", flush=True)
    atomic_write(args.csv, format_csv(rows, digits=3))
    return 0


if __name__ == "__main__":
    sys.exit(main())
