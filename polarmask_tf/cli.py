"""The `polarmask` command. Knows arguments and nothing else; loads TensorFlow only for what needs it."""

from __future__ import annotations

import argparse
import csv
import json
import logging
import os
import sys
from pathlib import Path

from polarmask_tf import __version__
from polarmask_tf.errors import InputError

MODEL = "run directory, SavedModel directory, .tflite file, or a server: http://HOST:8501/v1/models/NAME, grpc://HOST:8500/NAME"


def parser() -> argparse.ArgumentParser:
    root = argparse.ArgumentParser(
        prog="polarmask",
        description="PolarMask instance segmentation: COCO JSON in, polygons out.",
        epilog="Each command has its own --help. Typical order: convert, train, evaluate, export, predict.",
    )
    root.add_argument("--version", action="version", version=f"polarmask_tf {__version__}")
    commands = root.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name, function, text):
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(function=function)
        return sub

    sub = command("shapes", shapes, "draw the quickstart's data: images of simple shapes with COCO annotations")
    sub.add_argument("out", type=Path, help="directory to make; gets train/ and val/")
    sub.add_argument("--train", type=int, default=1000, help="training images (default %(default)s)")
    sub.add_argument("--val", type=int, default=150, help="validation images (default %(default)s)")
    sub.add_argument("--size", type=int, default=128, help="pixels a side (default %(default)s)")
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument(
        "--kinds", metavar="A,B,...", help="default: circle,rectangle,triangle,star; there are also bar, ellipse, ell and cee"
    )

    sub = command("convert", convert, "COCO JSON and images to TFRecord shards")
    sub.add_argument("annotations", type=Path, help="COCO JSON file")
    sub.add_argument("images", type=Path, help="directory of the images")
    sub.add_argument("out", type=Path, help="directory to write: shards and dataset.json")
    sub.add_argument("--shards", type=int, help="number of shards (default: one for every 256 images)")
    sub.add_argument("--processes", type=int, help="worker processes (default: one for each CPU)")
    sub.add_argument("--masks", action="store_true", help="also write PNG masks, for Model Garden's own models")
    sub.add_argument("--verify", action="store_true", help="decode every image instead of checking header and end")
    sub.add_argument("--strict", action="store_true", help="stop at the first image or annotation that would be skipped")
    sub.add_argument("--max-edges", type=int, default=96, help="most polygon edges of an instance (default %(default)s)")
    sub.add_argument("--decoded", action="store_true", help="store pixels: training then decodes nothing, and reads more")
    sub.add_argument("--crowd-as-instances", action="store_true", help="take iscrowd: 1 for single objects, as CVAT means it")
    sub.add_argument("--allow-outside", action="store_true", help="also image files outside the directory (.., links)")
    sub.add_argument(
        "--exif",
        choices=("apply", "ignore"),
        help="orientation of photos (default: applied only where the JSON has the size of the turned photo)",
    )
    sub.add_argument("--bit-depth", type=int, metavar="N", help="bits that 16-bit images use, like 12 (default: all)")

    sub = command("train", train, "train a model with model.fit; goes on where an interrupted run stopped")
    sub.add_argument("--config", required=True, help="YAML file, or the name of a shipped one, like shapes")
    sub.add_argument("--data", help="converted training data (data.train)")
    sub.add_argument("--out", type=Path, required=True, help="run directory")
    sub.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override, like train.steps=100")
    sub.add_argument("--restart", action="store_true", help="start over, deleting the run's checkpoints")
    sub.add_argument("--start", type=Path, metavar="RUN", help="begin with the weights of another run, or an imported one")
    _add_devices(sub)
    sub.add_argument(
        "--worker-timeout",
        type=_positive,
        default=600,
        metavar="SECONDS",
        help="how long to wait for the other workers at the start (default %(default)s)",
    )
    sub.add_argument("--profile", type=_numbers, metavar="A,B", help="profile between two steps, for TensorBoard")

    sub = command("evaluate", evaluate, "COCO mask AP of a run directory, a SavedModel or a .tflite file")
    sub.add_argument("model", help=MODEL)
    sub.add_argument("--data", type=Path, required=True, help="converted data")
    sub.add_argument("--max-detections", type=int, default=100, help="an image (default %(default)s)")
    sub.add_argument("--score-threshold", type=float, help="drop detections below (default: the model's own)")
    sub.add_argument("--limit", type=_positive, help="only the first images")
    sub.add_argument("--per-class", action="store_true", help="AP of every class as well")
    sub.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers as JSON")

    sub = command("predict", predict, "draw what a model finds in images, and write COCO results")
    sub.add_argument("model", help=MODEL)
    sub.add_argument("images", type=Path, help="image file, or directory of images")
    sub.add_argument("--out", type=Path, required=True, help="directory for overlays/ and results.json")
    sub.add_argument("--score-threshold", type=float, help="least score (default 0.3; with --results-only the model's own)")
    sub.add_argument("--limit", type=_positive, help="only the first images of the directory")
    sub.add_argument("--truth", type=Path, metavar="JSON", help="COCO file: its image ids, and its truth beside predictions")
    sub.add_argument("--results-only", action="store_true", help="results.json alone, of the images of --truth: for a server")

    sub = command("export", export, "a SavedModel and a .tflite file from a run directory, image to polygons inside")
    sub.add_argument("run", type=Path, help="run directory")
    sub.add_argument("--out", type=Path, required=True, help="directory for saved_model/, model.tflite and lite.py")
    sub.add_argument(
        "--precision",
        type=lambda text: text.split(","),
        default=["fp32"],
        metavar="A,B,...",
        help="of the .tflite files: fp32, fp16, dynamic, int8 (default fp32)",
    )
    sub.add_argument("--raw", action="store_true", help="also .tflite files that end at the head's outputs, for GPUs and NPUs")
    sub.add_argument("--data", type=Path, help="converted data: measure the mask AP of every export beside Keras'")
    sub.add_argument(
        "--max-ap-drop",
        type=float,
        default=0.01,
        metavar="X",
        help="with --data: fail if an AP is lower by more (default %(default)s)",
    )
    sub.add_argument("--images", type=Path, metavar="DATA", help="converted data to compare on (default: the run's own)")
    sub.add_argument("--score-threshold", type=float, help="fixed in the exports (default: the config's)")
    sub.add_argument("--max-detections", type=int, help="fixed in the exports (default: the config's)")
    sub.add_argument("--serving", action="store_true", help="instead: a version directory for TF Serving, OUT/NAME/1")
    sub.add_argument("--name", default="polarmask", help="serving: what the model is called in requests (default %(default)s)")
    sub.add_argument("--contract", choices=("model_garden",), help="serving: also speak as Model Garden's Mask R-CNN does")
    sub.add_argument(
        "--max-pixels",
        type=_positive,
        default=50_000_000,
        metavar="N",
        help="serving: refuse encoded images of more pixels (default %(default)s)",
    )

    sub = command("import-weights", import_weights, "a run directory of a released PyTorch checkpoint")
    sub.add_argument("checkpoint", type=Path, help=".pth file (needs the `import` extra), or .npz of the same keys")
    sub.add_argument("--config", required=True, help="the network's: released_r50_1x, released_r101_1x, ...")
    sub.add_argument("--out", type=Path, required=True, help="run directory to make")
    sub.add_argument("--data", help="converted data of the classes it was trained on (default: the 80 classes of COCO)")
    sub.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override, like data.size=[800,1344]")

    sub = command("upper-bound", upper_bound, "what polar masks can reach on your data, before any training (figure 7)")
    sub.add_argument("data", type=Path, help="COCO JSON file (images are not needed), or converted data")
    sub.add_argument("--out", type=Path, help="directory for upper_bound.csv and upper_bound.png")
    sub.add_argument("--rays", type=_numbers, metavar="N,N,...", help="numbers of rays (default: 8,12,18,24,36,72,120)")
    sub.add_argument("--limit", type=_positive, help="only the first images")

    sub = command("summary", summary, "parameters, multiply-adds and memory of a config, part by part")
    sub.add_argument("config", help="YAML file, or the name of a shipped one")
    sub.add_argument("--classes", type=_positive, default=80, help="number of classes (default %(default)s)")
    sub.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override, like model.rays=72")

    sub = command("inspect", inspect, "what an exported .tflite file or SavedModel takes, gives and knows about itself")
    sub.add_argument("model", type=Path, help=".tflite file or SavedModel directory")

    sub = command("benchmark", benchmark, "inference time of configs and runs; without any: CPU time of the data side")
    sub.add_argument(
        "models",
        nargs="*",
        metavar="CONFIG|RUN|FILE",
        help="timed in turns, one image, on the GPU if there is one; .tflite files: by LiteRT, on the CPU; `train CONFIG`: "
        "images/s of input, step and both; `growth`: a training step against batch, instances and rays",
    )
    sub.add_argument("--data", help="train: converted data (default: made-up pictures)")
    sub.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="train: override, like data.batch=8")
    _add_devices(sub)
    sub.add_argument("--threads", type=_positive, default=1, help=".tflite files: threads (default %(default)s)")
    sub.add_argument("--image", type=Path, help=".tflite files: image to run on (default: a made-up one)")
    sub.add_argument("--repeats", type=_positive, help="timed calls of each model (default 10; 50 of a .tflite file)")
    sub.add_argument("--csv", type=Path, metavar="FILE", help="also write the rows as CSV")
    return root


def _add_devices(sub) -> None:
    sub.add_argument(
        "--strategy",
        choices=("auto", "none", "mirrored", "multi_worker"),
        default="auto",
        help="one device, all of this machine, or all of several machines (default: by what there is)",
    )
    sub.add_argument(
        "--devices",
        type=_positive,
        default=0,
        metavar="N",
        help="devices of this machine to use (default: all GPUs); without GPUs the CPU is split into N",
    )


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return number


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} is not a list of numbers like 18,36,72") from None


def shapes(args):
    from polarmask_tf.tools.shapes import DEFAULT_KINDS, make_shapes

    kinds = args.kinds.split(",") if args.kinds else DEFAULT_KINDS
    make_shapes(args.out, train=args.train, val=args.val, size=args.size, seed=args.seed, kinds=kinds)


def convert(args):
    from polarmask_tf.data.convert import convert

    convert(
        args.annotations,
        args.images,
        args.out,
        shards=args.shards,
        processes=args.processes,
        masks=args.masks,
        verify=args.verify,
        strict=args.strict,
        max_edges=args.max_edges,
        decoded=args.decoded,
        crowd_as_instances=args.crowd_as_instances,
        allow_outside=args.allow_outside,
        exif=args.exif,
        bit_depth=args.bit_depth,
    )


def train(args):
    from polarmask_tf import config

    data = [f"data.train={json.dumps(args.data)}"] if args.data else []
    settings = config.load(args.config, [*data, *args.set])
    if args.profile and (len(args.profile) != 2 or args.profile[0] >= args.profile[1]):
        raise InputError("--profile takes two steps, the first before the second, like 10,20")
    from polarmask_tf.training import distribution, replicas

    strategy = distribution.make(args.strategy, devices=args.devices, timeout=args.worker_timeout)
    from polarmask_tf.training.train import train

    train(settings, args.out, strategy=strategy, restart=args.restart, start=args.start, profile=args.profile)
    if replicas.is_chief(strategy):
        print(f"trained model in {args.out}; next: polarmask evaluate {args.out} --data DATA")


def evaluate(args):
    from polarmask_tf.inference import evaluate
    from polarmask_tf.inference.predictor import load_predictor

    predictor = load_predictor(
        args.model,
        score_threshold=args.score_threshold,
        max_detections=args.max_detections if args.max_detections != 100 else None,
    )
    metrics = evaluate.evaluate(
        predictor, args.data, max_detections=args.max_detections, per_class=args.per_class, limit=args.limit
    )
    print(evaluate.format_table(metrics))
    if args.json:
        beside = args.json.with_name(args.json.name + ".tmp")
        beside.write_text(json.dumps(metrics.to_dict(), indent=1))
        os.replace(beside, args.json)


def predict(args):
    from polarmask_tf.inference.predict import predict
    from polarmask_tf.inference.predictor import load_predictor

    predictor = load_predictor(args.model)
    done = predict(
        predictor,
        args.images,
        args.out,
        score_threshold=args.score_threshold,
        truth=args.truth,
        limit=args.limit,
        results_only=args.results_only,
    )
    pictures = "" if args.results_only else f"pictures in {args.out / 'overlays'}, "
    print(f"{done['detections']} detections in {done['images']} images; {pictures}{done['results']}")


def export(args):
    from polarmask_tf.export import export

    overrides = {"score_threshold": args.score_threshold, "max_detections": args.max_detections}
    if args.serving:
        export.export_for_serving(
            args.run, args.out, name=args.name, contract=args.contract, max_pixels=args.max_pixels, **overrides
        )
    else:
        export.export(
            args.run,
            args.out,
            images=args.images,
            precisions=args.precision,
            raw=args.raw,
            data=args.data,
            max_ap_drop=args.max_ap_drop,
            **overrides,
        )


def import_weights(args):
    from polarmask_tf import config

    settings = config.load(args.config, args.set)
    from polarmask_tf.weights.released import import_weights

    import_weights(args.checkpoint, settings, args.out, data=args.data or "")
    print(f"imported into {args.out}; next: polarmask predict {args.out} IMAGES --out predictions")


def upper_bound(args):
    from polarmask_tf.tools import upper_bound

    upper_bound.run(args.data, args.out, args.rays or upper_bound.RAYS, args.limit)


def summary(args):
    from polarmask_tf import config

    settings = config.load(args.config, args.set)
    from polarmask_tf.tools.summary import run

    run(settings, args.classes)


def inspect(args):
    from polarmask_tf.export.inspect import describe

    print(describe(args.model))


def benchmark(args):
    if args.models[:1] == ["train"]:
        rows = _benchmark_train(args)
    elif args.models == ["growth"]:
        from polarmask_tf.tools import benchmark_train

        rows = benchmark_train.growth()
        print(benchmark_train.format_growth(rows))
    else:
        rows = _benchmark_models(args)
    if args.csv:
        with open(args.csv, "w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()} for row in rows)


def _benchmark_train(args):
    from polarmask_tf import config
    from polarmask_tf.training import distribution, replicas

    if len(args.models) != 2:
        raise InputError("write it as: polarmask benchmark train CONFIG")
    settings = config.load(args.models[1], [*([f"data.train={json.dumps(args.data)}"] if args.data else []), *args.set])
    strategy = distribution.make(args.strategy, devices=args.devices)
    from polarmask_tf.tools import benchmark_train

    rows = benchmark_train.run(settings, strategy, steps=args.repeats or 10)
    if replicas.is_chief(strategy):
        print(benchmark_train.format_rows(rows, settings, strategy))
    return rows


def _benchmark_models(args):
    if args.models and all(model.endswith(".tflite") for model in args.models):
        from polarmask_tf.inference.predictor import read_image
        from polarmask_tf.tools import benchmark_files

        image = read_image(args.image) if args.image else None
        files = [Path(model) for model in args.models]
        rows = benchmark_files.run(files, image=image, threads=args.threads, repeats=args.repeats or 50)
        print(benchmark_files.format_rows(rows))
        return rows
    from polarmask_tf.tools import benchmark

    if args.models:
        rows = benchmark.run_models(args.models, repeats=args.repeats or 10)
        print(benchmark.format_models(rows))
    else:
        rows = benchmark.run()
        for row in rows:
            print(f"{row['value']:8.2f} {row['unit']:<14} {row['what']}")
    return rows


def main(argv: list[str] | None = None) -> int:
    # Before anything imports TensorFlow: its start-up lines (cuInit, oneDNN, ...) tell a user nothing.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    # TensorFlow imports a Keras for its own tf.keras, which nothing here uses: let it be the one that is imported anyway,
    # since the other takes 2 CPU seconds of every command.
    os.environ.setdefault("TF_USE_LEGACY_KERAS", "1")
    logging.getLogger("tensorflow").setLevel(logging.ERROR)  # of retracing and slow callbacks
    args = parser().parse_args(argv)
    try:
        args.function(args)
    except InputError as error:
        print(f"polarmask: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("polarmask: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `polarmask ... | head`
        sys.stderr.close()
        return 1
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"polarmask: error: {where}{error.strerror or error}", file=sys.stderr)
        return 2
    return 0
