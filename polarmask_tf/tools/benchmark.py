"""What the package's own steps cost on made-up data, and what networks take for an image: numbers a user can make again."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import os
import platform
import statistics
import tempfile
import time
import typing
from pathlib import Path

import numpy as np
import tensorflow as tf
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from polarmask_tf import config
from polarmask_tf.data import pipeline, records
from polarmask_tf.data.convert import convert
from polarmask_tf.inference.coco_metrics import coco_metrics, polygons_to_rle
from polarmask_tf.inference.predictor import network_input
from polarmask_tf.modeling.polarmask import PolarMask
from polarmask_tf.ops import geometry, targets
from polarmask_tf.weights.runs import load_run


def run(repeats: int = 21) -> list[dict]:
    """Rows {"what", "value", "unit"} of the package's own steps, in CPU time of one thread.

    Call it in a fresh process: TensorFlow's thread pools can be set only once.
    """
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    return [*_targets(repeats), *_pipeline(repeats), *_convert(), *_rle(repeats), *_evaluation()]


def run_models(models: typing.Sequence, images: typing.Sequence[np.ndarray] | None = None, repeats: int = 10) -> list[dict]:
    """Inference time of one image (batch 1) for each model: the FPS column of table 1f.

    Args:
      models: each a config.Config, the name or path of a config file, or a run directory. A config gets random weights
        and 80 classes; its score threshold is taken as 0, for else nothing would reach NMS.
      images: uint8 RGB [h, w, 3], taken in turn; by default one made-up picture of 480 x 640. Each is scaled to the
        model's input beforehand: decoding and scaling are not timed.
      repeats: timed calls. The models take turns, so that a machine that changes its speed does so for all of them.

    Returns:
      Rows {"model", "device", "height", "width" (of the input; of the first image), "what" ("network", or "network and
      post-processing"), "wall_ms", "cpu_ms" (of all threads), "fps"}: medians over the repeats. Runs on the GPU if there
      is one. Raises InputError for what is neither config nor run.
    """
    images = images or [np.asarray(Image.open(io.BytesIO(_jpeg(np.random.default_rng(0)))))]
    cases = []
    for number, source in enumerate(models, 1):
        name = f"config {number}" if isinstance(source, config.Config) else str(source)
        model, options = _model(source)
        inputs = [tf.constant(network_input(image, model.config.data)[0][np.newaxis]) for image in images]
        network = tf.function(lambda x, model=model: model(x, training=False))
        both = tf.function(lambda x, model=model, options=options: model.detect(x, **options))
        cases += [(name, inputs, "network", network), (name, inputs, "network and post-processing", both)]
    for _, inputs, _, function in cases:
        for _ in range(2):  # the first call builds the graph, and the next may still choose algorithms
            for x in inputs:
                _wall_and_cpu(function, x)
    times = [[] for _ in cases]
    for repeat in range(repeats):
        for case, measured in zip(cases, times, strict=True):
            measured.append(_wall_and_cpu(case[3], case[1][repeat % len(images)]))
    rows, device = [], device_name()
    for (name, inputs, what, _), measured in zip(cases, times, strict=True):
        wall, cpu = (statistics.median(values) for values in zip(*measured, strict=True))
        height, width = inputs[0].shape[1:3]
        rows.append(
            {
                "model": name,
                "device": device,
                "height": height,
                "width": width,
                "what": what,
                "wall_ms": wall,
                "cpu_ms": cpu,
                "fps": 1e3 / wall,
            }
        )
    return rows


def format_models(rows: list[dict]) -> str:
    """The rows of run_models as text."""
    width = max(len(row["model"]) for row in rows)
    lines = [f"{rows[0]['device']}; one image a call, medians", f"{'model':<{width}}   input       wall ms    CPU ms      FPS"]
    lines += [
        f"{row['model']:<{width}}  {row['height']:4} x {row['width']:4}  {row['wall_ms']:8.1f}  {row['cpu_ms']:8.1f}"
        f"  {row['fps']:7.2f}  {row['what']}"
        for row in rows
    ]
    return "\n".join(lines)


def device_name() -> str:
    """What TensorFlow computes on."""
    for gpu in tf.config.list_physical_devices("GPU"):
        return tf.config.experimental.get_device_details(gpu).get("device_name", gpu.name)
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
        return f"{name}, {os.cpu_count()} cores"
    return f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def _model(source):
    """The network, and what its post-processing is to do otherwise than its config says."""
    if not isinstance(source, config.Config):
        if Path(source).is_dir():
            return load_run(source), {}
        source = config.load(source)
    return PolarMask(source, 80), {"score_threshold": 0.0}


def _wall_and_cpu(function, x) -> tuple[float, float]:
    """Milliseconds of one call."""
    wall, cpu = time.perf_counter(), time.process_time()
    function(x)
    tf.test.experimental.sync_devices()  # a GPU works on after the call has returned
    return 1e3 * (time.perf_counter() - wall), 1e3 * (time.process_time() - cpu)


def _median(function, repeats: int) -> float:
    """Median CPU milliseconds of a call, after three that do not count."""
    return statistics.median([_cpu(function) for _ in range(repeats + 3)][3:])


def _cpu(function) -> float:
    """CPU milliseconds of one call, of all threads of this process."""
    began = time.process_time()
    function()
    return 1e3 * (time.process_time() - began)


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
    with tempfile.TemporaryDirectory() as folder:
        info = synthetic_data(Path(folder))
        kilobytes = len(_jpeg(np.random.default_rng(0))) >> 10
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
            rows.append(
                {
                    "what": f"{name}, 640x480 JPEG of {kilobytes} KB to 512x512, 7 instances",
                    "value": 1e3 / cost,
                    "unit": "images/s/core",
                }
            )
        cost = _median(lambda: in_step(sample), repeats) / settings.data.batch
        rows.append({"what": "targets made in the step, one image of those", "value": cost, "unit": "ms"})
        return rows


def synthetic_data(folder: Path) -> records.DatasetInfo:
    """A converted data set of 64 JPEGs of 640 x 480 with 7 objects of 30 vertices each, one shard."""
    rng = np.random.default_rng(0)
    jpeg = _jpeg(rng)
    shard = folder / "train-00000-of-00001.tfrecord"
    with open(shard, "wb") as out:
        for i in range(64):
            instances = [
                records.Instance(k, 0, "blob", False, 1.0, (*ring.min(0), *ring.max(0)), [ring], b"")
                for k, ring in enumerate(_blobs(rng, 7, 480, 640, 30))
            ]
            records.write_record(
                out,
                records.encode_example(
                    encoded=jpeg,
                    format="jpeg",
                    file_name="x.jpg",
                    image_id=i,
                    height=480,
                    width=640,
                    instances=instances,
                ),
            )
    return records.DatasetInfo(folder, "train", 64, 448, 0, [{"name": "blob", "category_id": 1}], 7, 30, [shard], {})


def _jpeg(rng) -> bytes:
    """A 640x480 picture of about 100 KB: smooth colours and some noise."""
    smooth = Image.fromarray(rng.integers(0, 256, (15, 20, 3), np.uint8)).resize((640, 480), Image.Resampling.BICUBIC)
    noisy = np.clip(np.asarray(smooth) + rng.normal(0, 8, (480, 640, 3)), 0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(noisy).save(file, "JPEG", quality=90)
    return file.getvalue()


def _coco(rng, images: int, instances: int) -> dict:
    """A COCO data set of made-up outlines in 640x480 images."""
    annotations = []
    for image in range(images):
        for outline in _blobs(rng, instances, 480, 640, 30):
            x, y = outline.min(0)
            width, height = outline.max(0) - (x, y)
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image + 1,
                    "category_id": 1,
                    "iscrowd": 0,
                    "area": float(width * height * 0.7),
                    "bbox": [float(v) for v in (x, y, width, height)],
                    "segmentation": [outline.round(2).ravel().tolist()],
                }
            )
    return {
        "images": [{"id": i + 1, "file_name": f"{i}.jpg", "height": 480, "width": 640} for i in range(images)],
        "annotations": annotations,
        "categories": [{"id": 1, "name": "blob"}],
    }


def _convert(images: int = 400) -> list[dict]:
    rng = np.random.default_rng(0)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        jpeg = _jpeg(rng)
        for i in range(images):
            (folder / f"{i}.jpg").write_bytes(jpeg)
        (folder / "annotations.json").write_text(json.dumps(_coco(rng, images, 7)))
        for masks in (False, True):

            def once(masks=masks):
                convert(folder / "annotations.json", folder, folder / "out", processes=1, masks=masks, progress=False)

            rows.append(
                {
                    "what": f"convert, 640x480 JPEG, 7 polygons of 30 vertices, {'with' if masks else 'without'} PNG masks",
                    "value": 1e3 * images / _median(once, 3),
                    "unit": "images/s/core",
                }
            )
    return rows


def _evaluation(images: int = 1000, detections: int = 20) -> list[dict]:
    rng = np.random.default_rng(0)
    truth = _coco(rng, images, 7)
    results = []
    for image in range(1, images + 1):
        polygons = np.array(_blobs(rng, detections, 480, 640, 36), np.float32)
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

    ratios = []
    for _ in range(3):  # paired: this machine or yours may change its speed between two runs
        own = _cpu(lambda: coco_metrics(copy.deepcopy(truth), copy.deepcopy(results)))
        ratios.append(own / _cpu(theirs))
    what = f"evaluation of {images} images, 7 objects and {detections} detections each, relative to pycocotools alone"
    return [{"what": what, "value": statistics.median(ratios), "unit": "times"}]


def _rle(repeats: int) -> list[dict]:
    polygons = np.array(_blobs(np.random.default_rng(0), 100, 480, 640, 36), np.float32)
    cost = _median(lambda: polygons_to_rle(polygons, 480, 640), repeats)
    return [{"what": "polygons of 100 detections to RLE, 480x640, 36 rays", "value": cost, "unit": "ms"}]
