"""The `polarmask` command: from arguments to what they ask for. Loads TensorFlow only for what needs it."""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import os
import sys
from pathlib import Path

from polarmask_tf import console, signals
from polarmask_tf.arguments import parser
from polarmask_tf.errors import InputError, counted, one_line
from polarmask_tf.files import atomic_write, check_writable, format_csv, lock, write_new


def _options(args, *names: str) -> dict:
    return {name: getattr(args, name) for name in names}


def _leave_out(args, names: tuple, why: str) -> None:
    """InputError for those of these options that were given, and that nothing would look at."""
    values = {name: getattr(args, name) for name in names}
    given = [
        f"--{name.replace('_', '-')}" for name, value in values.items() if not (value is None or value is False or value == [])
    ]
    if given:
        raise InputError(f"{', '.join(given)}: {why}; leave {'it' if len(given) == 1 else 'them'} out")


def _settings(args, name: str, data: str | None = None):
    """The config of a name with every --set, and with `data` as data.train."""
    from polarmask_tf import config

    return config.load(name, [*([f"data.train={json.dumps(data)}"] if data else []), *args.set])


def _training_settings(args):
    """The config of `train`: the one named, else that of the run that is there, else one that fits the data."""
    from polarmask_tf import config
    from polarmask_tf.data import dataset
    from polarmask_tf.tools import init_config

    config.check_overrides(args.set)  # what is mistyped, before data are looked at
    data, val = init_config.locate(args.data) if args.data else (None, None)
    if data:
        dataset.load(data)  # else the settings would be found wrong for want of what is not there
    # Absolute, for what reads the run's config later, perhaps from another working directory.
    places = [f"data.{name}={json.dumps(os.path.abspath(path))}" for name, path in (("train", data), ("val", val)) if path]
    if args.config is None and (args.out / "config.yaml").is_file():
        return config.load_saved(args.out / "config.yaml", [*places, *args.set])
    if args.config in (None, "own"):
        if not args.data:
            raise InputError(f"{args.out}: no run to go on with, and no data: give --data DIR, made by `polarmask convert`")
        settings = config.loads(init_config.fit(data, val), f"polarmask init {args.data}", args.set)
        print(f"settings fitted to {data}; to read or change them: {console.command('init', args.data, '--out', 'my.yaml')}")
        return settings
    return config.load(args.config, [*places, *args.set])


def shapes(args):
    from polarmask_tf.tools.shapes import DEFAULT_KINDS, make_shapes

    kinds = args.kinds.split(",") if args.kinds else DEFAULT_KINDS
    make_shapes(args.out, kinds=kinds, **_options(args, "train", "val", "size", "seed"))


def convert(args):
    from polarmask_tf import swapped
    from polarmask_tf.data.convert import convert_dataset

    swapped.check_convert(args.source, args.images, args.out)
    names = ("shards", "processes", "masks", "verify", "strict", "max_edges", "decoded", "crowd_as_instances")
    options = _options(args, *names, "allow_outside", "exif", "bit_depth", "min_area", "tile", "overlap")
    options |= _options(args, "images", "add", "format", "split", "seed", "group")
    edits = [edit for text in args.classes for edit in text.split(",") if edit]
    convert_dataset(args.source, args.out, classes=edits, **options)


def init(args):
    from polarmask_tf.tools import init_config

    if args.out and args.out.exists():
        raise InputError(f"{args.out}: exists; remove it, or choose another --out")
    if args.out:
        check_writable(args.out)
    text = init_config.fit(args.data, args.val)
    if args.out:
        write_new(args.out, text)
        print(f"wrote {args.out}; next: {console.command('train', '--config', args.out, '--out', f'runs/{args.out.stem}')}")
    else:
        print(text, end="")


def check(args):
    from polarmask_tf import swapped

    swapped.check_check(args.data, args.images)
    from polarmask_tf.tools.check import run

    run(args.data, args.images, overrides=args.set, **_options(args, "config", "val", "out", "preview", "html", "limit"))


def train(args):
    settings = _training_settings(args)
    if args.profile and (len(args.profile) != 2 or args.profile[0] >= args.profile[1]):
        raise InputError("--profile takes two steps, the first before the second, like 10,20")
    from polarmask_tf.training import distribution, replicas

    strategy = distribution.make(args.strategy, devices=args.devices, timeout=args.worker_timeout)
    from polarmask_tf.training.train import train

    train(settings, args.out, strategy=strategy, **_options(args, "restart", "start", "profile"))
    if replicas.is_chief(strategy):
        from polarmask_tf.training.log import summarize

        if measured := summarize(args.out):
            print(measured)
        following = ("IMAGES", "--out", "predictions") if measured else ("--data", "DATA")
        following = console.command("predict" if measured else "evaluate", args.out, *following)
        print(f"trained model in {args.out}; next: {following}")


def evaluate(args):
    from polarmask_tf import swapped
    from polarmask_tf.data import dataset
    from polarmask_tf.inference import thresholds
    from polarmask_tf.inference.coco_metrics import format_table
    from polarmask_tf.inference.evaluate import default_data, evaluate
    from polarmask_tf.inference.predictor import load_predictor

    swapped.check_one("evaluate", args.model, "--data", args.data)
    if args.json:
        check_writable(args.json, (args.model, args.data), b'{\n "values"')
    # Only of the whole: else predict would go by a few pictures, or by what was left of the detections.
    subject = thresholds.subject(args.model) if args.limit is None and args.score_threshold is None else None
    checkpoint = ""
    if args.calibrate:
        from polarmask_tf.inference.calibration import calibrate, check_calibratable

        if args.score_threshold is not None:
            raise InputError("--calibrate needs all detections: leave --score-threshold out")
        checkpoint = check_calibratable(Path(args.model), args.data)
    data = dataset.load(args.data or default_data(args.model))  # once: all below is of one conversion
    objects = max(data.instances_per_image, default=0)
    if args.calibrate and objects > args.max_detections:
        counted = f"of an image of {objects} objects {args.max_detections} would count"
        raise InputError(f"--calibrate needs all detections: {counted}; --max-detections {2 * objects}")
    most = args.max_detections if args.max_detections != 100 else None
    options = {**_options(args, "score_threshold", "accelerator"), "max_detections": most}
    predictor = load_predictor(args.model, **options)
    if args.accelerator:
        print(predictor.runs_on, file=sys.stderr)
    predictor = _tiled(predictor, args)
    with lock(args.report, "evaluate") if args.report else contextlib.nullcontext():
        metrics = evaluate(predictor, data, **_options(args, "max_detections", "limit"))
        found = {**metrics.to_dict(), "best_f1": thresholds.rows(metrics)}
        print(format_table(metrics), thresholds.format_table(metrics, args.per_class or None), sep="\n")
        if subject:
            print(f" {thresholds.store(subject, metrics, data.directory)}")
        if args.report:
            from polarmask_tf.inference import report

            found |= report.write(args.report / "report.html", predictor, data, metrics, model=args.model, limit=args.limit)
            print(f" {report.verdict(found)}\n Report: {args.report / 'report.html'}")
    if args.json:
        atomic_write(args.json, json.dumps(found, indent=1))
    if args.calibrate:
        done = calibrate(args.model, metrics.matches, checkpoint)
        print(
            f" Calibrated: temperature {done.temperature:.3f}, bias {done.score_bias:.3f}. On the other half of the images the "
            f"expected calibration error is {done.error:.3f} (before: {done.error_before:.3f}), the median score "
            f"of hits with IoU >= 0.9 {done.score_of_close_hits:.3f}.\n The least score is {done.score_threshold:.2g} "
            f"now, for the same detections. Stored in {Path(args.model) / 'calibration.json'}; new exports have it."
        )


def _tiled(predictor, args):
    """The predictor, for --tile as one of large pictures."""
    if args.tile is None:
        if args.overlap is not None:
            raise InputError("--overlap is of tiles: give --tile as well")
        return predictor
    from polarmask_tf.inference.tiling import tiled

    return tiled(predictor, args.tile, args.overlap, progress=True)


def predict(args):
    from polarmask_tf import swapped
    from polarmask_tf.inference import inputs, outputs

    swapped.check_predict(args.model, args.images)  # all before TensorFlow is loaded, and the model
    inputs.check(args.images)
    if args.save is not None:
        outputs.check(args.save)
    from polarmask_tf.inference.predict import predict
    from polarmask_tf.inference.predictor import load_predictor

    options = _options(args, "score_threshold", "truth", "limit", "results_only", "exif", "bit_depth")
    options |= _options(args, "save", "segmentation", "classes", "every", "resume", "model", "accelerator")
    predictor = load_predictor(args.model, accelerator=args.accelerator)
    if args.accelerator:
        print(predictor.runs_on, file=sys.stderr)
    predictor = _tiled(predictor, args)
    done = predict(predictor, args.images, args.out, **options)
    if not done["detections"] and args.score_threshold is None:
        print("nothing found; --score-threshold 0.05 also takes what the model is less sure of", file=sys.stderr)
    found = f"{counted(done['detections'], 'detection')} in {counted(done['images'], 'image')}"
    print(f"{found}; written: {', '.join(map(str, done['written']))}")


def export(args):
    from polarmask_tf import swapped

    swapped.check_one("export", args.run, "--out", args.out)
    of_files, of_serving = ("precision", "raw", "data", "max_ap_drop", "images"), ("name", "contract", "max_pixels")
    if args.serving:
        _leave_out(args, of_files, "of the files that an export without --serving writes")
    else:
        _leave_out(args, of_serving, "of an export with --serving")
        if args.data is None:
            _leave_out(args, ("max_ap_drop",), "of APs, which are measured with --data")
    from polarmask_tf.export import export

    options = _options(args, "score_threshold", "max_detections", *(of_serving if args.serving else of_files))
    options = {"precisions" if name == "precision" else name: value for name, value in options.items() if value is not None}
    job = export.export_for_serving if args.serving else export.export_model
    job(args.run, args.out, **options)


def import_weights(args):
    settings = _settings(args, args.config)
    from polarmask_tf.weights.released import import_weights

    import_weights(args.checkpoint, settings, args.out, data=args.data or "")
    print(f"imported into {args.out}; next: {console.command('predict', args.out, 'IMAGES', '--out', 'predictions')}")


def upper_bound(args):
    from polarmask_tf.tools import upper_bound

    upper_bound.run(args.data, args.out, args.rays or upper_bound.RAYS, args.limit)


def configs(args):
    from polarmask_tf.tools.catalogue import format_configs

    print(format_configs())


def doctor(args):
    from polarmask_tf.tools.doctor import print_report

    return 0 if print_report() else 1


def summary(args):
    settings = _settings(args, args.config)
    from polarmask_tf.tools.summary import print_summary

    print_summary(settings, args.classes)


def inspect(args):
    from polarmask_tf.export.inspect import describe

    print(describe(args.model))


def benchmark(args):
    if args.csv:
        check_writable(args.csv, (*args.models, args.image, args.data))
    if not args.models:
        raise InputError("name configs, runs or .tflite files, or `train CONFIG`; the data side: scripts/benchmarks/steps.py")
    if args.models[0] != "train":
        _leave_out(args, ("data", "set"), "of `benchmark train CONFIG`")
    if not all(model.endswith(".tflite") for model in args.models):
        _leave_out(args, ("image", "threads"), "of .tflite files alone")
    if args.operations:
        rows, text = _profile(args)
    elif args.models[0] == "train":
        rows, text = _benchmark_train(args)
    elif all(model.endswith(".tflite") for model in args.models):
        from polarmask_tf.inference.predictor import read_image
        from polarmask_tf.tools.benchmark import benchmark_files, format_files

        image = read_image(args.image) if args.image else None
        rows = benchmark_files(args.models, image=image, threads=args.threads or 1, repeats=args.repeats or 50)
        text = format_files(rows)
    else:
        from polarmask_tf.tools.benchmark import benchmark_models, format_models

        rows = benchmark_models(args.models, repeats=args.repeats or 10)
        text = format_models(rows)
    if text:
        print(text)
    if args.csv:
        atomic_write(args.csv, format_csv(rows, digits=3))


def _profile(args):
    if not all(model.endswith(".tflite") for model in args.models):
        raise InputError("--operations is of .tflite files")
    from polarmask_tf.inference.predictor import read_image
    from polarmask_tf.tools.operations import format_profile, profile

    image = read_image(args.image) if args.image else None
    found = [profile(file, image=image, threads=args.threads or 1, repeats=args.repeats or 50) for file in args.models]
    rows = [{"file": each["file"], **row} for each in found for row in each["operations"]]
    return rows, "\n\n".join(map(format_profile, found))


def _benchmark_train(args):
    if len(args.models) != 2:
        raise InputError("write it as: polarmask benchmark train CONFIG")
    settings = _settings(args, args.models[1], args.data)
    from polarmask_tf.tools.benchmark_train import benchmark_training, format_training
    from polarmask_tf.training import distribution, replicas

    strategy = distribution.make(args.strategy, devices=args.devices)
    rows = benchmark_training(settings, strategy, steps=args.repeats or 10)
    return rows, format_training(rows, settings, strategy) if replicas.is_chief(strategy) else ""


COMMANDS = {
    "shapes": shapes,
    "convert": convert,
    "init": init,
    "check": check,
    "train": train,
    "evaluate": evaluate,
    "predict": predict,
    "export": export,
    "import-weights": import_weights,
    "upper-bound": upper_bound,
    "configs": configs,
    "doctor": doctor,
    "summary": summary,
    "inspect": inspect,
    "benchmark": benchmark,
}


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns its exit code, see arguments.EPILOG; whatever goes wrong is said in one line on stderr."""
    # Before anything imports TensorFlow: its start-up lines (cuInit, oneDNN, ...) tell a user nothing.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    # TensorFlow imports a Keras for its own tf.keras, which nothing here uses: let it be the one that is imported anyway,
    # since the other takes 2 CPU seconds of every command.
    os.environ.setdefault("TF_USE_LEGACY_KERAS", "1")
    gc.set_threshold(20_000, 20, 20)  # TensorFlow's objects stay: looking for garbage among them takes a twentieth of a start
    logging.getLogger("tensorflow").setLevel(logging.ERROR)  # of retracing and slow callbacks
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # of a HOME that cannot be written
    with console.tolerant(), console.quiet_tensorflow():
        args = parser().parse_args(argv)
        try:
            # A training has its own way, and waits for other workers where Python cannot take a signal.
            with contextlib.nullcontext() if args.command == "train" else signals.unwinding():
                return COMMANDS[args.command](args) or 0
        except signals.Ended as error:
            print(f"polarmask: ended by {error.name}", file=sys.stderr)
            raise
        except (Exception, KeyboardInterrupt) as error:
            if args.debug:
                import traceback

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
    if isinstance(error, MemoryError) or type(error).__name__ == "ResourceExhaustedError":  # the latter of TensorFlow
        said = getattr(error, "message", str(error)).splitlines()[:1]
        return f"error: not enough memory{''.join(f' ({one_line(text, 200)})' for text in said)}", 2
    if isinstance(error, ImportError):
        return f"error: a library cannot be loaded: {error}; too little memory, or install polarmask_tf again", 2
    return f"error: unexpected {type(error).__name__}: {error}; run again with --debug for the traceback", 1
