"""For fuzz.py: what commands read of runs, truth and data that are there: thresholds, shipped weights, journals, surveys."""

import io
import json

import numpy as np
from fuzz_data import change_coco, change_shard, change_text, coco, dataset, shards
from fuzz_inputs import mutate_bytes, mutate_json
from fuzz_kind import Kind, refusing

THRESHOLDS = {"overall": 0.4, "classes": [0.3, 0.5], "temperature": 1.5, "data": "data/val", "checkpoint": ""}
CALIBRATION = {"temperature": 1.5, "score_threshold": 0.05, "checkpoint": ""}


def prepare_thresholds(folder, out):
    from polarmask_tf.config import PostprocessConfig
    from polarmask_tf.weights import runs

    options = PostprocessConfig(temperature=1.2)

    def run(data):
        (folder / runs.THRESHOLDS).write_bytes(data)
        runs.read_thresholds(folder, 2, options)

    return refusing(run)


def prepare_calibration(folder, out):
    from polarmask_tf import config as configs
    from polarmask_tf.weights import runs

    config = configs.load("shapes")

    def run(data):
        (folder / runs.CALIBRATION).write_bytes(data)
        runs.with_calibration(config, folder)

    return refusing(run)


class _Variable:
    def __init__(self, shape):
        self.shape = shape

    def assign(self, value):
        assert value.shape == self.shape and value.dtype == np.float32, "not its weights"


VARIABLES = {"backbone/stem/kernel:0": _Variable((3, 3, 2, 4)), "head/bias:0": _Variable((4,)), "head/scale:0": _Variable(())}


def weights(out):
    file = io.BytesIO()
    rng = np.random.default_rng(0)
    np.savez_compressed(file, **{name: rng.random(variable.shape).astype(np.float16) for name, variable in VARIABLES.items()})
    plain = io.BytesIO()
    np.savez(plain, **{name: np.zeros(variable.shape, np.float16) for name, variable in VARIABLES.items()})
    return [file.getvalue(), plain.getvalue()]


def prepare_weights(folder, out):
    from polarmask_tf.weights import shipped

    def run(data):
        (folder / shipped.WEIGHTS).write_bytes(data)
        shipped.assign_weights(folder / shipped.WEIGHTS, VARIABLES)

    return refusing(run)


SETTINGS = {
    "version": "0.1.0",
    "inputs": "0" * 64,
    "save": ["coco", "csv", "gallery"],
    "score_threshold": [0.3, 0.4],
    "limit": None,
}
_ENTRIES = [
    {
        "name": "a.png",
        "stem": "a",
        "objects": 2,
        "notes": ["EXIF orientation ignored"],
        "coco": [{"image_id": 1, "score": 0.5}],
        "csv": [[1, "one", 0.5]],
        "gallery": {"width": 32, "height": 24, "count": 1, "best": {"0": 0.5}, "truth": None},
    },
    {"name": "b.png", "skipped": "b.png: not an image"},
]


def journals(out):
    lines = [{"format": "polarmask predict 1", "settings": SETTINGS}, *_ENTRIES]
    return [b"".join(json.dumps(line).encode() + b"\n" for line in lines)]


def change_journal(rng, data):
    if rng.random() < 0.4:
        return mutate_bytes(rng, data)
    lines = data.splitlines()
    at = rng.randrange(len(lines))
    lines[at] = mutate_json(rng, json.loads(lines[at]))
    return b"\n".join(lines) + b"\n" * (rng.random() < 0.8)


def prepare_journal(folder, out):
    from polarmask_tf.inference import journal, outputs, predict

    kinds = ["coco", "csv", "gallery"]
    page = {"title": "out", "categories": [{"name": "one", "category_id": 1}], "least": 0.3, "truth": False}

    def run(data):
        for table in outputs.TABLES.values():  # else the last run is finished, and there is none to resume
            (folder / table).unlink(missing_ok=True)
        (folder / journal.NAME).write_bytes(data)
        with predict._journal(folder, SETTINGS, True, kinds, predict._Tally()) as record:
            outputs.write_tables(kinds, folder, record, **page)

    return refusing(run)


def prepare_truth(folder, out):
    from polarmask_tf.inference import inputs, truth

    names = ("a.png", "b.jpg", "c.png")
    for name in names:
        (folder / name).write_bytes(b"")
    image = np.zeros((24, 32, 3), np.uint8)

    def run(data):
        (folder / "a.json").write_bytes(data)
        there = truth.read(folder / "a.json")
        found = inputs.find([folder / name for name in names])
        known = truth.entries(found, there)
        truth.image_ids(found, known, there)
        for entry in known.values():
            truth.shapes(entry["id"], image, there)

    return refusing(run)


def _prepare_data(name, prepare_reader):
    """The `name` of a converted set as the input, the other file valid; taken by what `prepare_reader` gives."""

    def prepare(folder, out):
        (folder / "data-00000-of-00001.tfrecord").write_bytes(shards(out)[0])
        (folder / "dataset.json").write_text(json.dumps(dataset()))
        read = prepare_reader(folder, out)

        def run(data):
            (folder / name).write_bytes(data)
            read(folder)

        return refusing(run)

    return prepare


def _reader_of_init(folder, out):
    from polarmask_tf.tools import init_config

    return init_config.fit


def _reader_of_check(folder, out):
    import tensorflow as tf

    from polarmask_tf.tools import check

    tf.config.run_functions_eagerly(True)  # every input would be traced anew, which takes longer than it is looked at
    return lambda data: check.run(data, config="shapes", out=out / "checked")


SHARD = "data-00000-of-00001.tfrecord"
KINDS = {
    "shipped": Kind(prepare_weights, weights, mutate_bytes),
    "init": Kind(_prepare_data(SHARD, _reader_of_init), lambda out: shards(out)[:1], change_shard, tensorflow=True),
    "thresholds": Kind(prepare_thresholds, lambda out: [json.dumps(THRESHOLDS).encode()], change_text, tensorflow=True),
    "calibration": Kind(prepare_calibration, lambda out: [json.dumps(CALIBRATION).encode()], change_text, tensorflow=True),
    "journal": Kind(prepare_journal, journals, change_journal, tensorflow=True),
    "truth": Kind(prepare_truth, lambda out: [json.dumps(coco()).encode()], change_coco, tensorflow=True),
    "check": Kind(_prepare_data(SHARD, _reader_of_check), lambda out: shards(out)[:1], change_shard, tensorflow=True),
}
