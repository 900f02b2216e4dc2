"""What the package's own steps cost, on made-up data, in CPU time of one thread: numbers a user can make again."""

from __future__ import annotations

import io
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import tensorflow as tf
from PIL import Image

from polarmask_tf import config, geometry, targets
from polarmask_tf.data import pipeline, records
from polarmask_tf.evaluate import polygons_to_rle


def run(repeats: int = 21) -> list[dict]:
    """Rows {"what", "value", "unit"}; call it in a fresh process, TensorFlow's thread pools can be set only once."""
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    return [*_targets(repeats), *_pipeline(repeats), *_rle(repeats)]


def _median(function, repeats: int) -> float:
    """Median CPU milliseconds of a call, after three that do not count."""
    costs = []
    for _ in range(repeats + 3):
        began = time.process_time()
        function()
        costs.append(1e3 * (time.process_time() - began))
    return statistics.median(costs[3:])


def _blobs(rng, count: int, height: int, width: int, vertices: int) -> list[np.ndarray]:
    """Wavy closed outlines [vertices, 2] of 60 to 200 pixels inside the image."""
    angles = 2 * np.pi * np.arange(vertices) / vertices
    outlines = []
    for _ in range(count):
        radius = rng.uniform(30, 100) * (1 + 0.25 * np.sin(rng.integers(2, 6) * angles + rng.uniform(0, 6)))
        center = rng.uniform([130, 130], [width - 130, height - 130])
        outlines.append(center + radius[:, None] * np.stack([np.cos(angles), np.sin(angles)], 1))
    return outlines


def _targets(repeats: int) -> list[dict]:
    size, levels = (768, 1280), (3, 4, 5, 6, 7)
    outlines = np.array(_blobs(np.random.default_rng(0), 10, *size, 40), np.float32)[None]
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
    encoded = encode()
    positives = len(encoded.positives)
    edges = tf.repeat(instances["edges"][0], positives // 10 + 1, axis=0)[:positives]
    points = tf.repeat(instances["centers"][0], positives // 10 + 1, axis=0)[:positives]
    lengths = tf.function(lambda: geometry.ray_lengths(points, edges, 36))
    scene = f"768x1280, 10 instances of 40 edges, {positives} positives, 36 rays"
    return [
        {"what": f"targets with rays, {scene}", "value": _median(encode, repeats), "unit": "ms"},
        {"what": "of that, the rays alone", "value": _median(lengths, repeats), "unit": "ms"},
    ]


def _pipeline(repeats: int) -> list[dict]:
    settings = config.load("shapes", ["data.size=[512,512]", "data.scale=[0.8,1.25]", "data.batch=8", "data.shuffle=16"])
    rng = np.random.default_rng(0)
    smooth = Image.fromarray(rng.integers(0, 256, (15, 20, 3), np.uint8)).resize((640, 480), Image.Resampling.BICUBIC)
    noisy = np.clip(np.asarray(smooth) + rng.normal(0, 8, (480, 640, 3)), 0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(noisy).save(file, "JPEG", quality=90)
    with tempfile.TemporaryDirectory() as folder:
        shard = Path(folder) / "train-00000-of-00001.tfrecord"
        with open(shard, "wb") as out:
            for i in range(64):
                instances = [
                    records.Instance(k, 0, "blob", False, 1.0, (*ring.min(0), *ring.max(0)), [ring], b"")
                    for k, ring in enumerate(_blobs(rng, 7, 480, 640, 30))
                ]
                records.write_record(out, records.encode_example(
                    encoded=file.getvalue(), format="jpeg", file_name="x.jpg", image_id=i, height=480, width=640,
                    instances=instances,
                ))
        info = records.DatasetInfo(Path(folder), "train", 64, 448, 0, [{"name": "blob", "category_id": 1}], 7, 30, [shard], {})
        batches = pipeline.training_batches(info, settings)
        levels = settings.model.fpn.levels

        def encode(instances):
            return targets.encode(instances, rays=36, levels=levels, size=settings.data.size)

        in_pipeline = batches.map(lambda images, instances: (images, encode(instances)))
        in_step = tf.function(encode)
        sample = next(iter(batches))[1]
        rows = []
        for name, dataset in (("input pipeline", batches), ("input pipeline with targets made in it", in_pipeline)):
            iterator = iter(dataset)
            cost = _median(lambda iterator=iterator: next(iterator), repeats) / settings.data.batch
            rows.append({"what": f"{name}, 640x480 JPEG of {len(file.getvalue()) >> 10} KB to 512x512, 7 instances",
                         "value": 1e3 / cost, "unit": "images/s/core"})
        cost = _median(lambda: in_step(sample), repeats) / settings.data.batch
        rows.append({"what": "targets made in the step, one image of those", "value": cost, "unit": "ms"})
        return rows


def _rle(repeats: int) -> list[dict]:
    polygons = np.array(_blobs(np.random.default_rng(0), 100, 480, 640, 36), np.float32)
    cost = _median(lambda: polygons_to_rle(polygons, 480, 640), repeats)
    return [{"what": "polygons of 100 detections to RLE, 480x640, 36 rays", "value": cost, "unit": "ms"}]
