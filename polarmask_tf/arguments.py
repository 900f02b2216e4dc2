"""What each command of `polarmask` takes. Loads neither TensorFlow nor what the commands run."""

from __future__ import annotations

import argparse
from pathlib import Path

from polarmask_tf import __version__
from polarmask_tf.data.sources import FORMATS
from polarmask_tf.mistyped import Parser

MODEL = """run or SavedModel directory, .tflite or .keras file, or a server: http://HOST:8501/v1/models/NAME,
    grpc://HOST:8500/NAME"""

EPILOG = """Each command has its own --help. Typical order: convert, train, evaluate, export, predict.
Exit codes: 0 done; 2 wrong arguments or input, or a file that cannot be read or written; 130 interrupted (Ctrl-C), 143 and 129
ended by SIGTERM and SIGHUP (`train` saves its step first); 1 an error that polarmask does not know: --debug shows where."""


def parser() -> argparse.ArgumentParser:
    root = Parser(
        prog="polarmask",
        description="PolarMask instance segmentation: annotated pictures in, polygons out.",
        epilog=EPILOG,
    )
    root.add_argument("--version", action="version", version=f"polarmask_tf {__version__}")
    commands = root.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name, text):
        sub = commands.add_parser(name, help=text, description=text)
        sub.add_argument("--debug", action="store_true", help="show the traceback of an error")
        if name == "convert":
            _take_apart_positionals(sub)
        return sub.add_argument

    config = {"help": "YAML file, or the name of a shipped one, like shapes"}
    setting = {"action": "append", "default": [], "metavar": "KEY=VALUE"}
    limit = {"type": _positive, "metavar": "N", "help": "only the first images"}

    add = command("shapes", "draw the quickstart's data: images of simple shapes with COCO annotations")
    add("out", type=_path, help="directory to make; gets train/ and val/")
    add("--train", type=int, default=1000, help="training images (default %(default)s)")
    add("--val", type=int, default=150, help="validation images (default %(default)s)")
    add("--size", type=int, default=128, help="pixels a side (default %(default)s)")
    add("--seed", type=int, default=0)
    add("--kinds", metavar="A,B,...", help="default: circle,rectangle,triangle,star; there are also bar, ellipse, ell and cee")

    add = command("convert", "annotated pictures to TFRecord shards: COCO, labelme, YOLO, VIA, CVAT, Label Studio, masks")
    add("source", type=_path, metavar="SOURCE", help="file or folder of annotations, whose format is recognised")
    add("images", type=_path, nargs="?", metavar="IMAGES", help="folder of the pictures (default: found near the annotations)")
    add("out", type=_path, metavar="OUT", help="directory to write: shards, dataset.json, report.json")
    add("--add", type=_path, action="append", default=[], metavar="SOURCE", help="one more source, united by names of classes")
    add("--format", choices=FORMATS, help="of the annotations (default: by what is there)")
    text = "fractions of the images for val, or val and test: OUT/train, OUT/val, OUT/test (default: as the source has it)"
    add("--split", type=_fractions, default=[], metavar="X[,Y]", help=text)
    add("--seed", type=int, default=0, help="of --split (default %(default)s)")
    text = "what --split keeps together: `folder`, or a regular expression whose first group in a file's name says it"
    add("--group", metavar="folder|REGEX", help=text)
    text = "classes to keep (all others go), to rename or unite, or to drop; with an equals sign: --classes=-dirt,Cell=cell"
    add("--classes", action="append", default=[], metavar="KEEP,OLD=NEW,-DROP", help=text)
    add("--min-area", type=float, default=0, metavar="PIXELS", help="leave out objects of fewer pixels")
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
    add("--bit-depth", type=int, choices=range(8, 17), metavar="N", help="bits that 16-bit images use, like 12 (default: all)")
    add("--tile", type=_positive, metavar="N", help="cut large images into tiles of N x N pixels (docs/large.md)")
    add("--overlap", type=_count, metavar="N", help="pixels that neighbouring tiles share (default: a quarter of the tile)")

    add = command("init", "write a config that fits your data, with the reason behind each number")
    add("data", type=_path, help="converted data, or a directory that holds it as train/ and val/")
    add("--val", type=_path, metavar="DATA", help="converted validation data, to be measured at the end of the training")
    add("--out", type=_path, metavar="FILE", help="YAML file to write (default: to the terminal)")

    add = command("check", "what would keep a network from learning a data set, before it is trained")
    add("data", type=_path, help="converted data, or what `convert` takes: a file or a folder of annotations")
    add("images", type=_path, nargs="?", help="directory of the images, where it is not found near the annotations")
    text = "to be checked for: a YAML file, or the name of a shipped one (default: as `polarmask init` fits it)"
    add("--config", help=text)
    add("--set", **setting, help="override, like data.size=[640,640]")
    add("--val", type=_path, metavar="DATA", help="converted validation data: the same classes, and no image of both?")
    text = "draw N images (default 16): mask, polygon rebuilt from rays, center samples"
    add("--preview", type=_positive, nargs="?", const=16, default=0, metavar="N", help=text)
    add("--html", action="store_true", help="the same of up to 200 images, as a page to flip through")
    add("--out", type=_path, default=Path("check"), help="directory for check.png and check.html (default %(default)s)")
    add("--limit", **limit)

    add = command("train", "train a model with model.fit; goes on where an interrupted run stopped")
    text = "YAML file, or the name of a shipped one, like shapes (default: the run's in --out, else what `init` fits)"
    add("--config", help=text)
    add("--data", type=_path, help="converted training data (data.train), or a directory that holds it as train/ and val/")
    add("--out", type=_path, required=True, help="run directory")
    add("--set", **setting, help="override, like train.steps=100")
    add("--restart", action="store_true", help="start over; the first new checkpoint replaces what was there")
    text = "begin with the weights of a run, a .keras file, a released .pth, or a backbone's checkpoint, where they fit"
    add("--start", type=_path, metavar="RUN|FILE", help=text)
    _add_devices(add)
    text = "how long to wait for the other workers at the start (default %(default)s)"
    add("--worker-timeout", type=_positive, default=600, metavar="SECONDS", help=text)
    add("--profile", type=_numbers, metavar="A,B", help="profile between two steps, for TensorBoard")

    add = command("evaluate", "COCO mask AP of a run directory, a SavedModel or a .tflite file")
    add("model", help=MODEL)
    add("--data", type=_path, help="converted data (default: data.val of the run)")
    add("--max-detections", type=int, default=100, help="an image (default %(default)s)")
    add("--score-threshold", type=_fraction, metavar="X", help="drop detections below (default: the model's own)")
    _add_tiles(add)
    _add_accelerator(add)
    add("--limit", **limit)
    add("--per-class", action="store_true", help="a line for every class (default: up to 10)")
    add("--report", type=_path, metavar="DIR", help="also write report.html: curves, worst images, what makes it lose")
    text = "fit the scores to how often they are right, on half of the images, and store it in the run directory"
    add("--calibrate", action="store_true", help=text)
    add("--json", type=_path, metavar="FILE", help="also write the numbers as JSON")

    add = command("predict", "find objects in images, and write pictures, COCO results and other formats")
    add("model", help=MODEL)
    text = 'image or video file, folder (all below it), "pattern/*.png", or - for an image from stdin'
    add("images", type=_input, nargs="+", metavar="INPUT", help=text)
    add("--out", type=_path, required=True, help="directory to write to")
    text = """of overlays, overlays:jpg, coco (results.json), labelme, geojson, ids (16-bit PNG), ids:tif, ids:tif32,
        csv (measurements), gallery (gallery.html); default: overlays,coco"""
    add("--save", type=_texts, metavar="A,B,...", help=text)
    add("--segmentation", choices=("rle", "polygon"), default="rle", help="in results.json (default %(default)s)")
    add("--score-threshold", type=_fraction, metavar="X", help="least score (default: the model's of best F1, or 0.3)")
    add("--classes", type=_texts, metavar="A,B,...", help="only objects of these classes")
    add("--limit", **limit)
    add("--every", type=_positive, default=1, metavar="N", help="of a video every N-th frame (default %(default)s)")
    _add_tiles(add)
    add("--truth", type=_path, metavar="JSON", help="COCO file: its image ids, and its truth beside predictions")
    add("--results-only", action="store_true", help="results.json alone, of the images of --truth: for a server")
    add("--exif", choices=("ignore", "apply"), default="ignore", help="apply: turn images as their EXIF orientation says first")
    text = "that 16-bit gray images use, 8 to 16 (default: the model's, or 16)"
    add("--bit-depth", type=int, choices=range(8, 17), metavar="BITS", help=text)
    _add_accelerator(add)
    add("--resume", action="store_true", help="go on where the same command was interrupted")

    add = command("export", "a SavedModel and a .tflite file from a run directory, image to polygons inside")
    add("run", type=_path, help="run directory")
    add("--out", type=_path, required=True, help="directory for saved_model/, model.tflite and lite.py")
    text = "of the .tflite files: fp32, fp16, dynamic, int8 (default fp32)"
    add("--precision", type=lambda text: text.split(","), metavar="A,B,...", help=text)
    add("--raw", action="store_true", help="also .tflite files that end at the head's outputs, for GPUs and NPUs")
    add("--data", type=_path, help="converted data: measure the mask AP of every export beside Keras'")
    text = "with --data: fail if an AP is lower by more (default 0.01)"
    add("--max-ap-drop", type=_fraction, metavar="X", help=text)
    add("--images", type=_path, metavar="DATA", help="converted data to compare on (default: the run's own)")
    add("--score-threshold", type=_fraction, metavar="X", help="fixed in the exports (default: the config's)")
    add("--max-detections", type=int, help="fixed in the exports (default: the config's)")
    add("--serving", action="store_true", help="instead: a version directory for TF Serving, OUT/NAME/1")
    add("--name", help="serving: what the model is called in requests (default polarmask)")
    add("--contract", choices=("model_garden",), help="serving: also speak as Model Garden's Mask R-CNN does")
    text = "serving: refuse encoded images of more pixels (default 50000000)"
    add("--max-pixels", type=_positive, metavar="N", help=text)

    add = command("import-weights", "a run directory of a released PyTorch checkpoint")
    add("checkpoint", type=_path, help=".pth file, or .npz of the same keys")
    add("--config", required=True, help="the network's: released_r50_1x, released_r101_1x, ...")
    add("--out", type=_path, required=True, help="run directory to make")
    add("--data", help="converted data of the classes it was trained on (default: the 80 classes of COCO)")
    add("--set", **setting, help="override, like data.size=[800,1344]")

    add = command("upper-bound", "what polar masks can reach on your data, before any training (figure 7)")
    add("data", type=_path, help="COCO JSON file (images are not needed), or converted data")
    add("--out", type=_path, help="directory for upper_bound.csv and upper_bound.png")
    add("--rays", type=_numbers, metavar="N,N,...", help="numbers of rays (default: 8,12,18,24,36,72,120)")
    add("--limit", **limit)

    command("configs", "the shipped configs, a line each: what for, what each costs and has reached")

    command("doctor", "look for what a training or an export would stumble over on this machine")

    add = command("summary", "parameters, multiply-adds and memory of a config, part by part")
    add("config", **config)
    add("--classes", type=_positive, default=80, help="number of classes (default %(default)s)")
    add("--set", **setting, help="override, like model.rays=72")

    add = command("inspect", "what an exported .tflite file or SavedModel takes, gives and knows about itself")
    add("model", type=_path, help=".tflite file or SavedModel directory")

    add = command("benchmark", "inference time of configs, runs and exported files; what a training step costs")
    text = """timed in turns, one image, on the GPU if there is one; .tflite files: by LiteRT, on the CPU; `train CONFIG`:
        images/s of input, step and both"""
    add("models", nargs="*", metavar="CONFIG|RUN|FILE", help=text)
    add("--data", help="train: converted data (default: synthetic pictures)")
    add("--set", **setting, help="train: override, like data.batch=8")
    _add_devices(add)
    add("--operations", action="store_true", help=".tflite files: the time of each kind of operation, by LiteRT's profiler")
    add("--threads", type=_positive, help=".tflite files: threads (default 1)")
    add("--image", type=_path, help=".tflite files: image to run on (default: a synthetic one)")
    add("--repeats", type=_positive, help="timed calls of each model (default 10; 50 of a .tflite file)")
    add("--csv", type=_path, metavar="FILE", help="also write the rows as CSV")
    return root


def _add_devices(add) -> None:
    text = "one device, all of this machine, or all of several machines (default: by what there is)"
    add("--strategy", choices=("auto", "none", "mirrored", "multi_worker"), default="auto", help=text)
    text = "devices of this machine to use (default: all GPUs); without GPUs the CPU is split into N"
    add("--devices", type=_positive, default=0, metavar="N", help=text)


def _take_apart_positionals(sub: argparse.ArgumentParser) -> None:
    """Lets options stand between positional arguments of which one may be missing, which argparse does only if asked to."""
    plain = sub.parse_known_args

    def parse_known_args(args=None, namespace=None):
        sub.parse_known_args = plain  # type: ignore[method-assign]
        try:
            return sub.parse_known_intermixed_args(args, namespace)
        finally:
            sub.parse_known_args = parse_known_args  # type: ignore[method-assign]

    sub.parse_known_args = parse_known_args  # type: ignore[method-assign]


def _add_accelerator(add) -> None:
    text = "of a .tflite file: run by LiteRT's CompiledModel there (default: by its Interpreter, on the CPU)"
    add("--accelerator", choices=("cpu", "gpu"), help=text)


def _add_tiles(add) -> None:
    text = """for large images: run on tiles of N x N pixels, and join what they find (docs/large.md); best the size that the
        model was trained on"""
    add("--tile", type=_positive, metavar="N", help=text)
    text = "with --tile: pixels that neighbouring tiles share, best more than the largest object (default: a quarter)"
    add("--overlap", type=_count, metavar="N", help=text)


def _path(text: str) -> Path:
    if not text:  # which pathlib takes for the working directory: a shell's variable that is not set
        raise argparse.ArgumentTypeError("the path is empty")
    return Path(text)


def _input(text: str) -> str:
    return text if text == "-" else str(_path(text))


def _texts(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _positive(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 19 and int(text)):
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least 1")
    return int(text)


def _count(text: str) -> int:
    return 0 if text == "0" else _positive(text)


def _fraction(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number <= 1:  # NaN is neither
        raise argparse.ArgumentTypeError(f"{text} is not a number from 0 to 1")
    return number


def _fractions(text: str) -> list[float]:
    return [_fraction(part.strip()) for part in text.split(",")]


def _numbers(text: str) -> list[int]:
    return [_positive(part.strip()) for part in text.split(",")]
