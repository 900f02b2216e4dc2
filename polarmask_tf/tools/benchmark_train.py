"""`polarmask benchmark train`: what a training step costs, and its input, on the machine that is to train."""

from __future__ import annotations

import contextlib
import json
import tempfile
from pathlib import Path

import numpy as np
import tensorflow as tf

from polarmask_tf.config import Config
from polarmask_tf.data import dataset, pipeline
from polarmask_tf.data.convert import convert
from polarmask_tf.errors import InputError
from polarmask_tf.files import format_table, io_error_text
from polarmask_tf.tools.benchmark import as_jpeg, device_name, in_turns, synthetic_picture
from polarmask_tf.training import replicas
from polarmask_tf.training.train import build, check_layout


def benchmark_training(config: Config, strategy: tf.distribute.Strategy, *, steps: int = 10) -> list[dict]:
    """Images/s of the input pipeline alone, of the training step alone, and of both together.

    Args:
      config: its data.train is read; without one, synthetic 640 x 480 JPEGs with 7 objects each.
      strategy: see distribution.make; every worker calls this.
      steps: timed ones, after three that do not count.

    Returns:
      Rows {"what", "images_per_second", "step_ms" (wall, medians over the steps), "cpu_ms" (of all threads of this process)}.

    Raises InputError for data that cannot be read and a batch that cannot be divided, as training does.
    """
    check_layout(config, strategy.num_replicas_in_sync)
    with contextlib.ExitStack() as stack:
        if config.data.train:
            info = dataset.load(config.data.train)
        else:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            info = convert(synthetic_data(folder), folder, folder / "train", processes=1, progress=False)
        with strategy.scope():
            model = build(config, info.classes)
        worker, workers = replicas.worker(strategy)
        count = strategy.num_replicas_in_sync
        batches = pipeline.training_batches(
            info, config, seed=config.train.seed, worker=worker, workers=workers, replicas=count
        )

        def on_devices(batches):
            return iter(strategy.distribute_datasets_from_function(lambda _: batches) if count > 1 else batches)

        step, local, rows = model.make_train_function(), count // workers, []
        try:
            kept = tf.nest.map_structure(lambda *values: tf.stack(values), *batches.take(local))
            alone, both = iter(batches), on_devices(batches)
            repeated = on_devices(tf.data.Dataset.from_tensor_slices(kept).repeat())
            for what, call in (
                ("input pipeline", lambda: [next(alone) for _ in range(local)]),
                ("step", lambda: finished(step(repeated))),
                ("both", lambda: finished(step(both))),
            ):
                wall, cpu = np.median(in_turns([call], steps), axis=0)[0].tolist()
                speed = 1e3 * config.data.batch / wall
                rows.append({"what": what, "images_per_second": speed, "step_ms": wall, "cpu_ms": cpu})
        except tf.errors.OpError as error:
            place = {"seed": config.train.seed, "step": 0, "worker": worker, "workers": workers}
            why = pipeline.explain(error, info, config, **place)
            raise why or InputError(f"the step failed: {io_error_text(error)}") from None
    return rows


def finished(values):
    """Waits for tensors, as arrays."""
    return tf.nest.map_structure(np.asarray, values)


def format_training(rows: list[dict], config: Config, strategy: tf.distribute.Strategy) -> str:
    """The rows of `benchmark_training` as text, with what limits the training."""
    count = strategy.num_replicas_in_sync
    pipeline_alone, step_alone, both = (row["images_per_second"] for row in rows)
    if pipeline_alone < 1.1 * step_alone:
        limit = (
            "the input pipeline limits: more CPU cores, `polarmask convert --decoded`, or more shards with data.sharding: file"
        )
    elif both < 0.8 * step_alone:
        limit = "the step limits, and the pipeline takes its cores: more CPU cores, or `polarmask convert --decoded`"
    else:
        limit = "the step limits: more devices, train.precision, train.jit_compile"
    columns = {"what": "", "images_per_second": ".1f", "step_ms": ".1f", "cpu_ms": ".1f"}
    head = f"{device_name()}; {count} devices x {config.data.batch // count} images, {config.train.precision}"
    return "\n".join([head, format_table(rows, columns), limit])


def synthetic_data(folder: Path, images: int = 64, instances: int = 7) -> Path:
    """Writes JPEGs of 640 x 480 and their annotations.json into a directory, and returns this file's path."""
    rng, jpeg = np.random.default_rng(0), as_jpeg(synthetic_picture())
    for number in range(images):
        (folder / f"{number}.jpg").write_bytes(jpeg)
    file = folder / "annotations.json"
    file.write_text(json.dumps(synthetic_coco(rng, images, instances)))
    return file


def synthetic_coco(rng: np.random.Generator, images: int, instances: int, vertices: int = 30) -> dict:
    """A COCO data set of wavy outlines in images of 640 x 480."""
    annotations = []
    for image in range(1, images + 1):
        for outline in wavy_outlines(rng, instances, 480, 640, vertices):
            low, sides = outline.min(0), np.ptp(outline, axis=0)
            shape = {"bbox": [*low.tolist(), *sides.tolist()], "segmentation": [outline.round(2).ravel().tolist()]}
            shared = {"image_id": image, "category_id": 1, "iscrowd": 0, "area": float(0.7 * sides.prod())}
            annotations.append({"id": len(annotations) + 1, **shared, **shape})
    return {
        "images": [{"id": i, "file_name": f"{i - 1}.jpg", "height": 480, "width": 640} for i in range(1, images + 1)],
        "annotations": annotations,
        "categories": [{"id": 1, "name": "blob"}],
    }


def wavy_outlines(rng: np.random.Generator, count: int, height: int, width: int, vertices: int) -> list[np.ndarray]:
    """Closed outlines [vertices, 2] of 60 to 200 pixels inside the image."""
    angles = 2 * np.pi * np.arange(vertices) / vertices
    outlines = []
    for _ in range(count):
        radius = rng.uniform(30, 100) * (1 + 0.25 * np.sin(rng.integers(2, 6) * angles + rng.uniform(0, 6)))
        center = rng.uniform([130, 130], [width - 130, height - 130])
        outlines.append(center + radius[:, None] * np.stack([np.cos(angles), np.sin(angles)], 1))
    return outlines
