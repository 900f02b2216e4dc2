"""The `polarmask` command. Knows arguments and nothing else; loads TensorFlow only for what needs it."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import traceback
from pathlib import Path

from polarmask_tf import __version__, console
from polarmask_tf.errors import InputError, one_line
from polarmask_tf.files import atomic_write, check_writable, format_csv

MODEL = """run or SavedModel directory, .tflite or .keras file, or a server: http://HOST:8501/v1/models/NAME,
    grpc://HOST:8500/NAME"""

EPILOG = """Each command has its own --help. Typical order: convert, train, evaluate, export, predict.
Exit codes: 0 done; 2 wrong arguments or input, or a file that cannot be read or written; 130 interrupted (Ctrl-C); 1 an error
that polarmask does not know: --debug shows where."""


def parser() -> argparse.ArgumentParser:
    root = argparse.ArgumentParser(
        prog="polarmask",
        description="PolarMask instance segmentation: COCO JSON in, polygons out.",
        epilog=EPILOG,
    )
    root.add_argument("--version", action="version", version=f"polarmask_tf {__version__}")
    commands = root.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name, function, text):
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(function=function)
        sub.add_argument("--debug", action="store_true", help="show the traceback of an error")
        return sub.add_argument

    config = {"help": "YAML file, or the name of a shipped one, like shapes"}
    setting = {"action": "append", "default": [], "metavar": "KEY=VALUE"}
    limit = {"type": _positive, "metavar": "N", "help": "only the first images"}

    add = command("shapes", shapes, "draw the quickstart's data: images of simple shapes with COCO annotations")
    add("out", type=_path, help="directory to make; gets train/ and val/")
    add("--train", type=int, default=1000, help="training images (default %(default)s)")
    add("--val", type=int, default=150, help="validation images (default %(default)s)")
    add("--size", type=int, default=128, help="pixels a side (default %(default)s)")
    add("--seed", type=int, default=0)
    add("--kinds", metavar="A,B,...", help="default: circle,rectangle,triangle,star; there are also bar, ellipse, ell and cee")

    add = command("convert", convert, "COCO JSON and images to TFRecord shards")
    add("annotations", type=_path, help="COCO JSON file")
    add("images", type=_path, help="directory of the images")
    add("out", type=_path, help="directory to write: shards and dataset.json")
    add("--shards", type=int, help="number of shards (default: one for every 256 images)")
    add("--processes", type=int, help="worker processes (default: one for each CPU)")
    add("--masks", action="store_true", help="also write PNG masks, for Model Garden's own models")
    add("--verify", action="store_true", help="decode every image instead of checking header and end")
    add("--strict", action="store_true", help="stop at the first image or annotation that would be skipped")
    add("--max-edges", type=int, default=96, help="most polygon edges of an instance (default %(default)s)")
    add("--decoded", action="store_true", help="store pixels: training then decodes nothing, and reads more")
    add("--crowd-as-instances", action="store_true", help="take iscrowd: 1 for single objects, as CVAT means it")
    add("--allow-outside", action="store_true", help="also image files outside the directory (.., links)")
    text = "orientation of photos (default: applied only where the JSON has the size of the turned photo)"
    add("--exif", choices=("apply", "ignore"), help=text)
    add("--bit-depth", type=int, metavar="N", help="bits that 16-bit images use, like 12 (default: all)")

    add = command("train", train, "train a model with model.fit; goes on where an interrupted run stopped")
    add("--config", required=True, **config)
    add("--data", help="converted training data (data.train)")
    add("--out", type=_path, required=True, help="run directory")
    add("--set", **setting, help="override, like train.steps=100")
    add("--restart", action="store_true", help="start over; the first new checkpoint replaces what was there")
    text = "begin with the weights of a run, a .keras file, a released .pth, or a backbone's checkpoint, where they fit"
    add("--start", type=_path, metavar="RUN|FILE", help=text)
    _add_devices(add)
    text = "how long to wait for the other workers at the start (default %(default)s)"
    add("--worker-timeout", type=_positive, default=600, metavar="SECONDS", help=text)
    add("--profile", type=_numbers, metavar="A,B", help="profile between two steps, for TensorBoard")

    add = command("evaluate", evaluate, "COCO mask AP of a run directory, a SavedModel or a .tflite file")
    add("model", help=MODEL)
    add("--data", type=_path, required=True, help="converted data")
    add("--max-detections", type=int, default=100, help="an image (default %(default)s)")
    add("--score-threshold", type=_fraction, metavar="X", help="drop detections below (default: the model's own)")
    add("--limit", **limit)
    add("--per-class", action="store_true", help="AP of every class as well")
    text = "fit one temperature to the scores on half of the images, and store it in the run directory"
    add("--calibrate", action="store_true", help=text)
    add("--json", type=_path, metavar="FILE", help="also write the numbers as JSON")

    add = command("predict", predict, "draw what a model finds in images, and write COCO results")
    add("model", help=MODEL)
    add("images", type=_path, help="image file, or directory of images")
    add("--out", type=_path, required=True, help="directory for overlays/ and results.json")
    add("--score-threshold", type=_fraction, metavar="X", help="least score (default 0.3; with --results-only the model's own)")
    add("--limit", **limit)
    add("--truth", type=_path, metavar="JSON", help="COCO file: its image ids, and its truth beside predictions")
    add("--results-only", action="store_true", help="results.json alone, of the images of --truth: for a server")
    add("--exif", choices=("ignore", "apply"), default="ignore", help="apply: turn images as their EXIF orientation says first")
    text = "that 16-bit gray images use, 8 to 16 (default: the model's, or 16)"
    add("--bit-depth", type=int, metavar="BITS", help=text)

    add = command("export", export, "a SavedModel and a .tflite file from a run directory, image to polygons inside")
    add("run", type=_path, help="run directory")
    add("--out", type=_path, required=True, help="directory for saved_model/, model.tflite and lite.py")
    text = "of the .tflite files: fp32, fp16, dynamic, int8 (default fp32)"
    add("--precision", type=lambda text: text.split(","), default=["fp32"], metavar="A,B,...", help=text)
    add("--raw", action="store_true", help="also .tflite files that end at the head's outputs, for GPUs and NPUs")
    add("--data", type=_path, help="converted data: measure the mask AP of every export beside Keras'")
    text = "with --data: fail if an AP is lower by more (default %(default)s)"
    add("--max-ap-drop", type=_fraction, default=0.01, metavar="X", help=text)
    add("--images", type=_path, metavar="DATA", help="converted data to compare on (default: the run's own)")
    add("--score-threshold", type=_fraction, metavar="X", help="fixed in the exports (default: the config's)")
    add("--max-detections", type=int, help="fixed in the exports (default: the config's)")
    add("--serving", action="store_true", help="instead: a version directory for TF Serving, OUT/NAME/1")
    add("--name", default="polarmask", help="serving: what the model is called in requests (default %(default)s)")
    add("--contract", choices=("model_garden",), help="serving: also speak as Model Garden's Mask R-CNN does")
    text = "serving: refuse encoded images of more pixels (default %(default)s)"
    add("--max-pixels", type=_positive, default=50_000_000, metavar="N", help=text)

    add = command("import-weights", import_weights, "a run directory of a released PyTorch checkpoint")
    add("checkpoint", type=_path, help=".pth file, or .npz of the same keys")
    add("--config", required=True, help="the network's: released_r50_1x, released_r101_1x, ...")
    add("--out", type=_path, required=True, help="run directory to make")
    add("--data", help="converted data of the classes it was trained on (default: the 80 classes of COCO)")
    add("--set", **setting, help="override, like data.size=[800,1344]")

    add = command("upper-bound", upper_bound, "what polar masks can reach on your data, before any training (figure 7)")
    add("data", type=_path, help="COCO JSON file (images are not needed), or converted data")
    add("--out", type=_path, help="directory for upper_bound.csv and upper_bound.png")
    add("--rays", type=_numbers, metavar="N,N,...", help="numbers of rays (default: 8,12,18,24,36,72,120)")
    add("--limit", **limit)

    add = command("summary", summary, "parameters, multiply-adds and memory of a config, part by part")
    add("config", **config)
    add("--classes", type=_positive, default=80, help="number of classes (default %(default)s)")
    add("--set", **setting, help="override, like model.rays=72")

    add = command("inspect", inspect, "what an exported .tflite file or SavedModel takes, gives and knows about itself")
    add("model", type=_path, help=".tflite file or SavedModel directory")

    add = command("benchmark", benchmark, "inference time of configs, runs and exported files; what a training step costs")
    text = """timed in turns, one image, on the GPU if there is one; .tflite files: by LiteRT, on the CPU; `train CONFIG`:
        images/s of input, step and both"""
    add("models", nargs="*", metavar="CONFIG|RUN|FILE", help=text)
    add("--data", help="train: converted data (default: synthetic pictures)")
    add("--set", **setting, help="train: override, like data.batch=8")
    _add_devices(add)
    add("--threads", type=_positive, default=1, help=".tflite files: threads (default %(default)s)")
    add("--image", type=_path, help=".tflite files: image to run on (default: a synthetic one)")
    add("--repeats", type=_positive, help="timed calls of each model (default 10; 50 of a .tflite file)")
    add("--csv", type=_path, metavar="FILE", help="also write the rows as CSV")
    return root


def _add_devices(add) -> None:
    text = "one device, all of this machine, or all of several machines (default: by what there is)"
    add("--strategy", choices=("auto", "none", "mirrored", "multi_worker"), default="auto", help=text)
    text = "devices of this machine to use (default: all GPUs); without GPUs the CPU is split into N"
    add("--devices", type=_positive, default=0, metavar="N", help=text)


def _path(text: str) -> Path:
    if not text:  # which pathlib takes for the working directory: a shell's variable that is not set
        raise argparse.ArgumentTypeError("the path is empty")
    return Path(text)


def _positive(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 19 and int(text)):
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least 1")
    return int(text)


def _fraction(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number <= 1:  # NaN is neither
        raise argparse.ArgumentTypeError(f"{text} is not a number from 0 to 1")
    return number


def _numbers(text: str) -> list[int]:
    return [_positive(part.strip()) for part in text.split(",")]


def _options(args, *names: str) -> dict:
    return {name: getattr(args, name) for name in names}


def _settings(args, name: str, data: str | None = None):
    """The config of a name with every --set, and with `data` as data.train."""
    from polarmask_tf import config

    return config.load(name, [*([f"data.train={json.dumps(data)}"] if data else []), *args.set])


def shapes(args):
    from polarmask_tf.tools.shapes import DEFAULT_KINDS, make_shapes

    kinds = args.kinds.split(",") if args.kinds else DEFAULT_KINDS
    make_shapes(args.out, kinds=kinds, **_options(args, "train", "val", "size", "seed"))


def convert(args):
    from polarmask_tf.data.convert import convert

    names = ("shards", "processes", "masks", "verify", "strict", "max_edges", "decoded", "crowd_as_instances")
    options = _options(args, *names, "allow_outside", "exif", "bit_depth")
    convert(args.annotations, args.images, args.out, **options)


def train(args):
    settings = _settings(args, args.config, args.data)
    if args.profile and (len(args.profile) != 2 or args.profile[0] >= args.profile[1]):
        raise InputError("--profile takes two steps, the first before the second, like 10,20")
    from polarmask_tf.training import distribution, replicas

    strategy = distribution.make(args.strategy, devices=args.devices, timeout=args.worker_timeout)
    from polarmask_tf.training.train import train

    train(settings, args.out, strategy=strategy, **_options(args, "restart", "start", "profile"))
    if replicas.is_chief(strategy):
        print(f"trained model in {args.out}; next: polarmask evaluate {args.out} --data DATA")


def evaluate(args):
    from polarmask_tf.inference.coco_metrics import format_table
    from polarmask_tf.inference.evaluate import evaluate
    from polarmask_tf.inference.predictor import load_predictor

    if args.json:
        check_writable(args.json)
    checkpoint = ""
    if args.calibrate:
        from polarmask_tf.inference.calibration import calibrate, check_calibratable

        if args.score_threshold is not None:
            raise InputError("--calibrate needs all detections: leave --score-threshold out")
        checkpoint = check_calibratable(Path(args.model))
    most = args.max_detections if args.max_detections != 100 else None
    predictor = load_predictor(args.model, score_threshold=args.score_threshold, max_detections=most)
    metrics = evaluate(predictor, args.data, **_options(args, "max_detections", "per_class", "limit"))
    if args.json:
        atomic_write(args.json, json.dumps(metrics.to_dict(), indent=1))
    print(format_table(metrics))
    if args.calibrate:
        done = calibrate(args.model, metrics.matches, checkpoint)
        print(
            f" Calibrated: temperature {done.temperature:.3f}. On the other half of the images the expected calibration error "
            f"is {done.error:.3f} (before: {done.error_before:.3f}), the median score of hits with IoU >= 0.9 "
            f"{done.score_of_close_hits:.3f}.\n The least score is {done.score_threshold:.2g} now, for the same detections. "
            f"Stored in {Path(args.model) / 'calibration.json'}; exports made from now on have it."
        )


def predict(args):
    from polarmask_tf.inference.predict import predict
    from polarmask_tf.inference.predictor import load_predictor

    options = _options(args, "score_threshold", "truth", "limit", "results_only", "exif", "bit_depth")
    done = predict(load_predictor(args.model), args.images, args.out, **options)
    pictures = "" if args.results_only else f"pictures in {args.out / 'overlays'}, "
    print(f"{done['detections']} detections in {done['images']} images; {pictures}{done['results']}")


def export(args):
    from polarmask_tf.export import export

    options = _options(args, "score_threshold", "max_detections")
    if args.serving:
        export.export_for_serving(args.run, args.out, **options, **_options(args, "name", "contract", "max_pixels"))
    else:
        options |= {"precisions": args.precision, **_options(args, "images", "raw", "data", "max_ap_drop")}
        export.export_model(args.run, args.out, **options)


def import_weights(args):
    settings = _settings(args, args.config)
    from polarmask_tf.weights.released import import_weights

    import_weights(args.checkpoint, settings, args.out, data=args.data or "")
    print(f"imported into {args.out}; next: polarmask predict {args.out} IMAGES --out predictions")


def upper_bound(args):
    from polarmask_tf.tools import upper_bound

    upper_bound.run(args.data, args.out, args.rays or upper_bound.RAYS, args.limit)


def summary(args):
    settings = _settings(args, args.config)
    from polarmask_tf.tools.summary import print_summary

    print_summary(settings, args.classes)


def inspect(args):
    from polarmask_tf.export.inspect import describe

    print(describe(args.model))


def benchmark(args):
    if args.csv:
        check_writable(args.csv)
    if not args.models:
        raise InputError("name configs, runs or .tflite files, or `train CONFIG`; the data side: scripts/benchmarks/steps.py")
    if args.models[0] == "train":
        rows, text = _benchmark_train(args)
    elif all(model.endswith(".tflite") for model in args.models):
        from polarmask_tf.inference.predictor import read_image
        from polarmask_tf.tools.benchmark import benchmark_files, format_files

        image = read_image(args.image) if args.image else None
        rows = benchmark_files(args.models, image=image, threads=args.threads, repeats=args.repeats or 50)
        text = format_files(rows)
    else:
        from polarmask_tf.tools.benchmark import benchmark_models, format_models

        rows = benchmark_models(args.models, repeats=args.repeats or 10)
        text = format_models(rows)
    if text:
        print(text)
    if args.csv:
        atomic_write(args.csv, format_csv(rows, digits=3))


def _benchmark_train(args):
    if len(args.models) != 2:
        raise InputError("write it as: polarmask benchmark train CONFIG")
    settings = _settings(args, args.models[1], args.data)
    from polarmask_tf.tools.benchmark_train import benchmark_training, format_training
    from polarmask_tf.training import distribution, replicas

    strategy = distribution.make(args.strategy, devices=args.devices)
    rows = benchmark_training(settings, strategy, steps=args.repeats or 10)
    return rows, format_training(rows, settings, strategy) if replicas.is_chief(strategy) else ""


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns its exit code, see EPILOG; whatever goes wrong is said in one line on stderr."""
    # Before anything imports TensorFlow: its start-up lines (cuInit, oneDNN, ...) tell a user nothing.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    # TensorFlow imports a Keras for its own tf.keras, which nothing here uses: let it be the one that is imported anyway,
    # since the other takes 2 CPU seconds of every command.
    os.environ.setdefault("TF_USE_LEGACY_KERAS", "1")
    logging.getLogger("tensorflow").setLevel(logging.ERROR)  # of retracing and slow callbacks
    with console.tolerant():
        args = parser().parse_args(argv)
        try:
            args.function(args)
            return 0
        except (Exception, KeyboardInterrupt) as error:
            if args.debug:
                traceback.print_exc()
            message, code = _explain(error)
            print(f"polarmask: {one_line(message)}", file=sys.stderr)
            return code


def _explain(error: BaseException) -> tuple[str, int]:
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", 130
    if isinstance(error, InputError):
        return f"error: {error}", 2
    if isinstance(error, OSError):
        return f"error: {f'{error.filename}: ' if error.filename else ''}{error.strerror or error}", 2
    return f"error: unexpected {type(error).__name__}: {error}; run again with --debug for the traceback", 1
