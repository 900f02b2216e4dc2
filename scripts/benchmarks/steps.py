"""What the package's own steps cost on synthetic data, in CPU time of one thread (docs/benchmark.csv); a few minutes.

python scripts/benchmarks/steps.py [--csv FILE]
"""

import argparse
import contextlib
import copy
import io
import statistics
import sys
import tempfile
from pathlib import Path

import numpy as np
import tensorflow as tf
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from polarmask_tf import config
from polarmask_tf.data import pipeline
from polarmask_tf.data.convert import convert
from polarmask_tf.files import atomic_write, format_csv
from polarmask_tf.inference.coco_metrics import coco_metrics, polygons_to_rle
from polarmask_tf.ops import geometry, targets
from polarmask_tf.tools.benchmark import as_jpeg, in_turns, synthetic_picture
from polarmask_tf.tools.benchmark_train import synthetic_coco, synthetic_data, wavy_outlines


def cpu(call, repeats: int) -> float:
    """Median CPU milliseconds of a call."""
    return float(np.median(in_turns([call], repeats)[..., 1]))


def target_steps(repeats: int) -> list[dict]:
    size, levels = (768, 1280), (3, 4, 5, 6, 7)
    outlines = np.array(wavy_outlines(np.random.default_rng(0), 10, *size, 40), np.float32)[None]
    locations = sum(-(-size[0] // 2**level) * -(-size[1] // 2**level) for level in levels)
    instances = {
        "boxes": tf.constant(np.concatenate([outlines.min(2), outlines.max(2)], -1)),
        "centers": tf.constant(outlines.mean(2)),
        "classes": tf.zeros([1, 10], tf.int32),
        "edges": tf.constant(np.concatenate([outlines, np.roll(outlines, -1, 2)], -1)),
        "window": tf.constant([[1280.0, 768.0]]),
        "ignore": tf.zeros([1, locations], tf.bool),
    }
    encode = tf.function(lambda: targets.encode(instances, rays=36, levels=levels, size=size, ranges=(64, 128, 256, 512)))
    positives = len(encode().positives)
    edges = tf.repeat(instances["edges"][0], positives // 10 + 1, axis=0)[:positives]
    points = tf.repeat(instances["centers"][0], positives // 10 + 1, axis=0)[:positives]
    lengths = tf.function(lambda: geometry.ray_lengths(points, edges, 36))
    scene = f"768x1280, 10 instances of 40 edges, {positives} positives, 36 rays"
    return [
        {"what": f"targets with rays, {scene}", "value": cpu(encode, repeats), "unit": "ms"},
        {"what": "of that, the rays alone", "value": cpu(lengths, repeats), "unit": "ms"},
    ]


def pipeline_steps(repeats: int) -> list[dict]:
    settings = config.load("shapes", ["data.size=[512,512]", "data.scale=[0.8,1.25]", "data.batch=8", "data.shuffle=16"])
    batch, levels = settings.data.batch, settings.model.fpn.levels
    with tempfile.TemporaryDirectory() as folder:
        info = convert(synthetic_data(Path(folder)), folder, Path(folder, "train"), processes=1, progress=False)
        batches = pipeline.training_batches(info, settings)

        def encode(instances):
            return targets.encode(instances, rays=36, levels=levels, size=settings.data.size)

        in_pipeline = batches.map(lambda images, instances: (images, encode(instances)))
        in_step, sample = tf.function(encode), next(iter(batches))[1]
        scene = f"640x480 JPEG of {len(as_jpeg(synthetic_picture())) >> 10} KB to 512x512, 7 instances"
        rows = []
        for name, dataset in (("input pipeline", batches), ("input pipeline with targets made in it", in_pipeline)):
            iterator = iter(dataset)
            speed = 1e3 * batch / cpu(lambda iterator=iterator: next(iterator), repeats)
            rows.append({"what": f"{name}, {scene}", "value": speed, "unit": "images/s/core"})
        cost = cpu(lambda: in_step(sample), repeats) / batch
        rows.append({"what": "targets made in the step, one image of those", "value": cost, "unit": "ms"})
        return rows


def convert_steps(images: int = 400) -> list[dict]:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        file = synthetic_data(Path(folder), images)
        for masks in (False, True):

            def once(masks=masks):
                convert(file, folder, Path(folder, "out"), processes=1, masks=masks, progress=False)

            what = f"convert, 640x480 JPEG, 7 polygons of 30 vertices, {'with' if masks else 'without'} PNG masks"
            rows.append({"what": what, "value": 1e3 * images / cpu(once, 3), "unit": "images/s/core"})
    return rows


def rle_steps(repeats: int) -> list[dict]:
    polygons = np.array(wavy_outlines(np.random.default_rng(0), 100, 480, 640, 36), np.float32)
    cost = cpu(lambda: polygons_to_rle(polygons, 480, 640), repeats)
    return [{"what": "polygons of 100 detections to RLE, 480x640, 36 rays", "value": cost, "unit": "ms"}]


def evaluation_steps(images: int = 1000, detections: int = 20) -> list[dict]:
    rng = np.random.default_rng(0)
    truth = synthetic_coco(rng, images, 7)
    results = []
    for image in range(1, images + 1):
        polygons = np.array(wavy_outlines(rng, detections, 480, 640, 36), np.float32)
        results += [
            {"image_id": image, "category_id": 1, "score": float(score), "segmentation": rle, "bbox": [0.0, 0.0, 9.0, 9.0]}
            for rle, score in zip(polygons_to_rle(polygons, 480, 640), rng.uniform(0.05, 1, detections), strict=True)
        ]

    def theirs():
        with contextlib.redirect_stdout(io.StringIO()):
            coco = COCO()
            coco.dataset = copy.deepcopy(truth)
            coco.createIndex()
            evaluation = COCOeval(coco, coco.loadRes(copy.deepcopy(results)), "segm")
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()

    def ours():
        coco_metrics(copy.deepcopy(truth), copy.deepcopy(results))

    ratio = statistics.median(own / other for own, other in in_turns([ours, theirs], 3, warm_up=0)[..., 1])
    what = f"evaluation of {images} images, 7 objects and {detections} detections each, relative to pycocotools alone"
    return [{"what": what, "value": ratio, "unit": "times"}]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--csv", type=Path, metavar="FILE", help="also write the rows as CSV")
    args = parser.parse_args()
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    rows = [
        *target_steps(args.repeats),
        *pipeline_steps(args.repeats),
        *convert_steps(),
        *rle_steps(args.repeats),
        *evaluation_steps(),
    ]
    for row in rows:
        print(f"{row['value']:8.2f} {row['unit']:<14} {row['what']}")
    if args.csv:
        atomic_write(args.csv, format_csv(rows, digits=3))
    return 0


if __name__ == "__main__":
    sys.exit(main())
