"""Small shards of records, and batches of them."""

import dataclasses
import io

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from polarmask_tf import config as configs
from polarmask_tf.data import dataset, pipeline, records

# (height, width) of image i, which is filled with the gray 20 * (i + 1): 7 lie, 4 stand.
SIZES = [(40, 60), (60, 40), (64, 64), (30, 90), (90, 30), (64, 96), (50, 50), (100, 70), (70, 100), (33, 47), (128, 20)]


def write(folder, sizes, shards=3):
    """Images of one gray each with one triangle each as records -> DatasetInfo."""
    paths = [folder / f"train-{shard:05}-of-{shards:05}.tfrecord" for shard in range(shards)]
    for shard, path in enumerate(paths):
        with open(path, "wb") as out:
            for i in range(shard, len(sizes), shards):
                height, width = sizes[i]
                file = io.BytesIO()
                Image.new("RGB", (width, height), (20 * (i + 1),) * 3).save(file, "PNG")
                ring = np.array([[0.2, 0.2], [0.8, 0.3], [0.6, 0.9]]) * [width, height]
                instance = records.Instance(i, 0, "blob", False, 1.0, (*ring.min(0), *ring.max(0)), [ring], b"")
                records.write_record(
                    out,
                    records.encode_example(
                        encoded=file.getvalue(),
                        format="png",
                        file_name=f"{i}.png",
                        image_id=i,
                        height=height,
                        width=width,
                        instances=[instance],
                    ),
                )
    return records.DatasetInfo(
        folder, "train", len(sizes), len(sizes), 0, [{"name": "blob", "category_id": 1}], 1, 3, paths, {}
    )


def converted(folder, sizes=SIZES):
    """`write` with its dataset.json."""
    info = write(folder, sizes)
    (folder / "dataset.json").write_text(dataset.dump(info))
    return info


def config_of(**data):
    base = configs.Config()
    return dataclasses.replace(base, data=dataclasses.replace(base.data, **{"size": (64, 96), "batch": 3, **data}))


def take(info, count, *, seed=5, start_step=0, **data):
    batches = pipeline.training_batches(info, config_of(**data), seed=seed, start_step=start_step)
    return list(batches.take(count).as_numpy_iterator())


def ids(images):
    return (images.max(axis=(1, 2, 3)).astype(int) // 20 - 1).tolist()


TRACED = {}


@pytest.fixture
def traced_once(monkeypatch):
    """Building the graph of `prepare` takes a second: with this, pipelines of one config share it."""
    prepare = pipeline.prepare

    def shared(record, config, info, seed, size):
        function = tf.function(lambda record, seed, size: prepare(record, config, info, seed, size))
        return TRACED.setdefault((config, info.max_edges, info.max_instances), function)(record, seed, size)

    monkeypatch.setattr(pipeline, "prepare", shared)


SHORT = {"fit": "short_side", "size": (48, 90)}  # a canvas of 64 x 96
