"""Writes exports/edge.csv: what the edge configs cost on this machine, every precision, with weights of chance.

    python scripts/edge_table.py [--configs edge,edge_small] [--sizes 320] [--precisions fp32,int8] [--csv FILE]

Without arguments about half an hour.
"""

import argparse
import csv
import functools
import itertools
import sys
import tempfile
from pathlib import Path

import numpy as np
import tf_keras

from polarmask_tf import config
from polarmask_tf.export import tflite
from polarmask_tf.modeling.polarmask import PolarMask
from polarmask_tf.tools import benchmark_files, summary

CONFIGS = "edge,edge_small,edge_mobilenetv2,edge_mobilenetv4,edge_efficientnet"
CLASSES = [{"name": f"class {i}", "category_id": i + 1} for i in range(80)]


def make(name: str, size: int, detections: int, *settings: str) -> PolarMask:
    """A network of chance, its BatchNorms fitted, that finds about so many objects in the benchmark's picture."""
    tf_keras.utils.set_random_seed(0)
    found = (f"postprocess.max_detections={detections}", "postprocess.score_threshold=0.0")
    model = PolarMask(config.load(name, [*settings, f"data.size=[{size},{size}]", *found]), len(CLASSES))
    model.build((None, size, size, 3))
    model.head.classes.conv.kernel.assign(np.random.default_rng(0).normal(0, 0.1, model.head.classes.conv.kernel.shape))
    for layer in model.submodules:
        if isinstance(layer, tf_keras.layers.BatchNormalization):
            layer.momentum = 0.0
    model(np.stack(list(pictures(size))), training=True)
    model.classes, model.input_size = CLASSES, (size, size)
    return model


def pictures(size: int):
    picture = benchmark_files.synthetic_picture(size, size)
    return (np.roll(picture, 17 * shift, axis=shift % 2) for shift in range(4))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--configs", default=CONFIGS)
    parser.add_argument("--sizes", default="256,320,416,512,640")
    parser.add_argument("--precisions", default=",".join(tflite.PRECISIONS))
    parser.add_argument("--detections", default="10,100")
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--csv", type=Path, default=Path(__file__).resolve().parents[1] / "exports" / "edge.csv")
    args = parser.parse_args()
    configs, precisions = args.configs.split(","), args.precisions.split(",")
    cases = itertools.product(map(int, args.sizes.split(",")), map(int, args.detections.split(",")), configs)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for size, detections, name in cases:
            model = make(name, size, detections)
            parts = summary.summarize(model.config, len(CLASSES), (size, size))[-1]
            files = [Path(folder) / f"{name}_{precision}.tflite" for precision in precisions]
            for file, precision in zip(files, precisions, strict=True):
                tflite.export_tflite(model, CLASSES, file, precision, images=functools.partial(pictures, size))
            for row, precision in zip(benchmark_files.run(files, repeats=args.repeats), precisions, strict=True):
                del row["file"]
                network = {key: parts[key] for key in ("parameters", "multiply_adds")}
                rows.append({"config": name, "precision": precision, **network, **row})
                print(*(f"{k} {v:.4g}" if isinstance(v, float) else v for k, v in rows[-1].items()), sep=", ", flush=True)
    with open(args.csv, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
