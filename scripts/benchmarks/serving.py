"""What serving a model costs, by its export's signatures: time, its shares, memory; and beside Model Garden's Mask R-CNN.

    python scripts/benchmarks/serving.py table1e_r50 data.fit=letterbox data.size=[512,512]
    python scripts/benchmarks/serving.py table1e_r50 data.fit=letterbox data.size=[512,512] --model-garden

prints CSV. Weights are random where a config is named instead of a run; the score threshold is 0 then, so that all
detections are filled. The pictures are synthetic.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import resource
import subprocess
import sys
import tempfile
import typing
from functools import partial
from pathlib import Path

import numpy as np

from polarmask_tf.errors import InputError
from polarmask_tf.files import format_csv

COLUMNS = ("model", "device", "threads", "what", "batch", "value", "unit")
HEIGHT, WIDTH = 480, 640  # of the picture


def run(
    source: str,
    overrides: typing.Sequence[str] = (),
    *,
    threads: typing.Sequence[int] = (1, 2),
    batches: typing.Sequence[int] = (1, 4, 16),
    repeats: int = 5,
    requests: int = 1000,
) -> list[dict]:
    """Rows of COLUMNS for a run directory, or for a config and its overrides.

    Time and images a second of a request of `batch` images to each signature; the parts of it: decoding and resizing, the
    network, post-processing, Model Garden's masks; and the memory that `requests` requests of ever new sizes add (0: not
    measured). Medians of `repeats` (fewer for large batches); what is compared takes turns, and shares are of CPU time.
    Every number of threads has a process of its own, since TensorFlow's threads can be set only once.
    """
    options = {"batches": list(batches), "repeats": repeats}
    rows = []
    for count in threads:
        rows += _in_a_process("signatures", source, overrides, count, options)
    if requests:
        rows += _in_a_process("memory", source, overrides, 1, {"requests": requests})
    return rows


def run_model_garden(source: str, overrides: typing.Sequence[str] = (), *, repeats: int = 3) -> list[dict]:
    """The same rows for one image on one thread: source beside Model Garden's Mask R-CNN (ResNet-50 FPN, 91 classes).

    Both take an image and give boxes and 28 x 28 masks of 100 detections; Model Garden's input is data.size. They take turns;
    "times" is the median of the pairs' ratios.
    """
    return _in_a_process("model_garden", source, overrides, 1, {"repeats": repeats})


def _in_a_process(what: str, source: str, overrides, threads: int, options: dict) -> list[dict]:
    task = json.dumps([what, str(source), list(overrides), threads, options])
    command = [sys.executable, __file__, "--task", task]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise InputError((done.stderr.strip().splitlines() or ["the benchmark failed"])[-1].removeprefix("error: "))
    return json.loads(done.stdout.strip().splitlines()[-1])


def _task(what: str, source: str, overrides: list, threads: int, options: dict) -> list[dict]:
    """One process' part of the work."""
    import tensorflow as tf

    from polarmask_tf.tools.benchmark import device_name

    tf.config.threading.set_intra_op_parallelism_threads(threads)
    tf.config.threading.set_inter_op_parallelism_threads(threads)
    model = _model(source, overrides)
    rows = {"signatures": _signatures, "memory": _memory, "model_garden": _model_garden}[what](model, **options)
    shared = {"model": " ".join([Path(source).name, *overrides]), "device": device_name(), "threads": threads}
    return [{**shared, **row} for row in rows]


def _model(source: str, overrides: list):
    from polarmask_tf import config
    from polarmask_tf.modeling.polarmask import PolarMask
    from polarmask_tf.weights.runs import load_run

    if Path(source).is_dir():
        if overrides:
            raise InputError(f"{source}: a run has its own settings, which cannot be changed here")
        return load_run(Path(source))
    return PolarMask(config.load(source, [*overrides, "postprocess.score_threshold=0.0"]), 80)


def _exported(model, folder: str):
    import tensorflow as tf

    from polarmask_tf.export.serving import export_serving

    return tf.saved_model.load(str(export_serving(model, Path(folder), name="model", contract="model_garden")))


def _in_turns(cases: dict, repeats: int) -> dict:
    """Milliseconds of each call, [repeats, 2] by name; shares are made of the second, see benchmark.in_turns."""
    from polarmask_tf.tools.benchmark import in_turns

    return dict(zip(cases, np.moveaxis(in_turns([*cases.values()], repeats, warm_up=1), 1, 0), strict=True))


def _time_rows(times: dict, batch: int) -> list[dict]:
    rows = []
    for name, values in times.items():
        wall, cpu = np.median(values, axis=0)
        numbers = ((wall, "ms"), (cpu, "CPU ms"), (1e3 * batch / wall, "images/s"))
        rows += [{"what": name, "batch": batch, "value": float(value), "unit": unit} for value, unit in numbers]
    return rows


def _signatures(model, batches: list, repeats: int) -> list[dict]:
    import tensorflow as tf

    from polarmask_tf.export import model_garden
    from polarmask_tf.export.serving import place_encoded
    from polarmask_tf.inference.predictor import network_input
    from polarmask_tf.tools.benchmark import as_jpeg, synthetic_picture

    image = synthetic_picture(HEIGHT, WIDTH)
    content = as_jpeg(image)
    feature = tf.train.Feature(bytes_list=tf.train.BytesList(value=[content]))
    example = tf.train.Example(features=tf.train.Features(feature={"image/encoded": feature})).SerializeToString()
    canvas = network_input(image, model.config.data)[0]
    text = [tf.TensorSpec([None], tf.string)]
    decoding = tf.function(lambda x: place_encoded(x, model.config.data, 10**8), input_signature=text)
    network = tf.function(lambda x: model(x, training=False), reduce_retracing=True)
    detecting = tf.function(model.detect, reduce_retracing=True)

    @tf.function(reduce_retracing=True)
    def masks(found, sizes, filled):
        return model_garden.outputs(found, sizes, filled, filled, 28, False)

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        loaded = _exported(model, folder)
        ask = loaded.signatures
        for batch in batches:
            contents, examples = tf.constant([content] * batch), tf.constant([example] * batch)
            images, placed = (tf.constant(np.stack([x] * batch)) for x in (image, canvas))
            found = detecting(placed)
            sizes = tf.constant([[HEIGHT, WIDTH]] * batch, tf.float32)
            signatures = {
                "serving_default": partial(ask["serving_default"], image_bytes=contents),
                "images": partial(ask["images"], images=images),
                "tf_example": partial(ask["tf_example"], examples=examples),
                "model_garden_image_bytes": partial(ask["model_garden_image_bytes"], inputs=contents),
            }
            parts = {
                "decoding and resizing": partial(decoding, contents),
                "network": partial(network, placed),
                "network and post-processing": partial(detecting, placed),
                "Model Garden's masks": partial(masks, found, sizes, sizes),
            }
            times = _in_turns({**signatures, **parts}, max(2, round(repeats / batch**0.5)))
            rows += _time_rows(times, batch)
            cpu = {name: np.median(values[:, 1]) for name, values in times.items()}
            post = np.median((times["network and post-processing"] - times["network"])[:, 1])
            shares = {
                "decoding and resizing, of serving_default": cpu["decoding and resizing"] / cpu["serving_default"],
                "post-processing, of serving_default": post / cpu["serving_default"],
                "Model Garden's masks, of network and post-processing": cpu["Model Garden's masks"]
                / cpu["network and post-processing"],
            }
            rows += [{"what": name, "batch": batch, "value": float(100 * x), "unit": "%"} for name, x in shares.items()]
    return rows


def _memory(model, requests: int) -> list[dict]:
    """Megabytes that requests add once a tenth of them has warmed everything up; each is a picture of another size."""
    import tensorflow as tf

    from polarmask_tf.tools.benchmark import as_jpeg, synthetic_picture

    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        loaded = _exported(model, folder)
        used = []
        for number in range(requests):
            image = synthetic_picture(*rng.integers(32, 800, 2), seed=number)
            loaded.signatures["serving_default"](image_bytes=tf.constant([as_jpeg(image)]))
            loaded.signatures["images"](images=tf.constant(image[np.newaxis]))
            used.append(resident())
    rows = []
    for start, end in ((requests // 10, requests // 2), (requests // 2, requests)):
        what = f"memory that requests {start} to {end} add, each of a new size and to serving_default and images"
        rows.append({"what": what, "batch": 1, "value": used[end - 1] - used[start - 1], "unit": "MB"})
    return rows


def resident() -> float:
    """Megabytes of this process in memory, without what has been given back to the allocator (glibc) and waits for reuse."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e6


def _model_garden(model, repeats: int) -> list[dict]:
    import tensorflow as tf
    from official.core import exp_factory
    from official.vision.configs import maskrcnn  # noqa: F401, registers the experiment
    from official.vision.serving import detection

    from polarmask_tf.tools.benchmark import synthetic_picture

    size = list(model.input_size)
    params = exp_factory.get_exp_config("maskrcnn_resnetfpn_coco")
    params.task.model.input_size = [*size, 3]
    theirs = detection.DetectionModule(params, batch_size=1, input_image_size=size, input_type="image_tensor")
    image = tf.constant(synthetic_picture(HEIGHT, WIDTH)[np.newaxis])
    with tempfile.TemporaryDirectory() as folder:
        ours = _exported(model, str(Path(folder) / "ours"))
        path = str(Path(folder) / "theirs")
        tf.saved_model.save(theirs, path, theirs.get_inference_signatures({"image_tensor": "serving_default"}))
        loaded = tf.saved_model.load(path)
        times = _in_turns(
            {
                "PolarMask, model_garden_image_tensor": partial(ours.signatures["model_garden_image_tensor"], inputs=image),
                "Model Garden's Mask R-CNN R50": partial(loaded.signatures["serving_default"], inputs=image),
            },
            repeats,
        )
    fast, slow = times.values()
    what = "Model Garden's Mask R-CNN R50, relative to PolarMask"
    ratios = zip(np.median(slow / fast, axis=0), ("times", "times in CPU time"), strict=True)
    return _time_rows(times, 1) + [{"what": what, "batch": 1, "value": float(x), "unit": unit} for x, unit in ratios]


def main() -> int:
    """See the module's text."""
    parser = argparse.ArgumentParser(description="What serving a model costs, as CSV.")
    parser.add_argument("source", nargs="?", help="a run directory, or the name or path of a config")
    parser.add_argument("overrides", nargs="*", help="of the config, like data.size=[512,512]")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--requests", type=int, default=1000, help="of the measurement of memory; 0: none")
    parser.add_argument("--model-garden", action="store_true", help="instead: beside Model Garden's Mask R-CNN")
    parser.add_argument("--task", help=argparse.SUPPRESS)
    args = parser.parse_args()
    try:
        if args.task:
            print(json.dumps(_task(*json.loads(args.task))))
            return 0
        if not args.source:
            parser.error("name a run directory or a config")
        if args.model_garden:
            rows = run_model_garden(args.source, args.overrides, repeats=args.repeats)
        else:
            rows = run(
                args.source,
                args.overrides,
                threads=args.threads,
                batches=args.batches,
                repeats=args.repeats,
                requests=args.requests,
            )
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(format_csv(rows, COLUMNS), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
