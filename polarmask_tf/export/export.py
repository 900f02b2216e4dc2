"""From a run directory, or a model, to files that take an image and return polygons, each compared with Keras."""

from __future__ import annotations

import functools
import importlib.util
import itertools
import shlex
import shutil
import sys
import time
from pathlib import Path

import tensorflow as tf
from tensorflow.lite.python.convert import ConverterError

from polarmask_tf import lite
from polarmask_tf.data import dataset, records
from polarmask_tf.errors import InputError
from polarmask_tf.export import graph, parity, serving, tflite
from polarmask_tf.files import atomic_write, io_error_text, lock
from polarmask_tf.inference.evaluate import evaluate
from polarmask_tf.inference.predictor import load_predictor, network_input, run_predictor
from polarmask_tf.modeling.polarmask import PolarMask
from polarmask_tf.weights.runs import load_run

PARITY_IMAGES = 8
CALIBRATION_IMAGES = 128


def export_model(
    model: PolarMask | Path | str,
    out: Path | str,
    *,
    images: Path | str | None = None,
    precisions=("fp32",),
    raw: bool = False,
    data: Path | str | None = None,
    max_ap_drop: float = 0.01,
    **overrides,
) -> dict:
    """Writes out/saved_model, out/model.tflite and out/lite.py, and compares all with the Keras model.

    Args:
      model: a run directory, or a model.
      out: directory to make or to fill.
      images: converted data whose first images the comparison takes; default: `data`, or the run's own data.
      precisions: of tflite.PRECISIONS, a .tflite file of each. int8 is calibrated on the run's training data, or else on
        the data that the comparison takes.
      raw: also a file of each that ends at the head's outputs.
      data: converted data on which the mask AP of all that is exported is measured beside Keras', of 100 detections an
        image or as many as the model gives.
      max_ap_drop: how much lower an AP on `data` may be.
      overrides: of a run's config.postprocess, fixed in the exports; None values are ignored.

    Returns:
      Rows of parity.compare by export; with `data` each has "AP" too. Raises InputError, before anything is converted, if
      `model` cannot be exported so, data cannot be read or `out` cannot be written; and if an AP drops too much, which leaves
      the files where they are.
    """
    if unknown := [precision for precision in precisions if precision not in tflite.PRECISIONS]:
        raise InputError(f"precision {unknown[0]}: choose of {', '.join(tflite.PRECISIONS)}")
    if not 0 <= max_ap_drop <= 1:
        raise InputError(f"--max-ap-drop {max_ap_drop:g}: a difference of two APs is between 0 and 1")
    if missing := [path for path in (images, data) if path and not Path(path).is_dir()]:
        raise InputError(f"{missing[0]}: not a directory of converted data")
    out, model = Path(out), _load(model, overrides)
    own = model.config.data
    pictures = _first_images([images, data, own.val, own.train], PARITY_IMAGES)
    calibration = _first_images([own.train, images, data, own.val], CALIBRATION_IMAGES) if "int8" in precisions else None
    if data:
        dataset.load(data)
    if calibration == []:
        raise InputError("int8 is calibrated on images, and the run's training data is not here: give --images DATA")
    runs_files = importlib.util.find_spec("ai_edge_litert") is not None  # an extra, which writing them does without
    if data and not runs_files:
        raise InputError("--data runs the .tflite files, which needs ai-edge-litert: pip install ai-edge-litert")
    if raw:
        tflite.check_raw(model)
    graph.check_saved_model_path(out / "saved_model")
    fit = tflite.file_fit(own)

    def prepared():  # images as evaluation prepares them, one after the other
        return (network_input(lite.read_image(content), own, fit)[0] for content in calibration)

    jobs = {"saved_model": graph.export_saved_model}
    for precision, ends in itertools.product(precisions, (False, True) if raw else (False,)):
        job = functools.partial(tflite.export_tflite, precision=precision, raw=ends, images=prepared)
        jobs[tflite.file_name(precision, ends)] = job
    with lock(out, "export"):
        written = {name: _write(job, model, out / name) for name, job in jobs.items()}
        atomic_write(out / "lite.py", Path(lite.__file__).read_bytes())
        for stale in out.glob(f"{graph.TEMPORARY}*"):  # of an export that was killed; it may hold the model before
            shutil.rmtree(stale, ignore_errors=True)
    if fit != own.fit:
        what = "model.tflite fits every image into {} x {}: a portrait one gets smaller than in training"
        print(f"warning: {what.format(*model.input_size)}", file=sys.stderr)
    rows = {}
    if pictures:
        # Each against Keras on images that are resized as it resizes them.
        keras = run_predictor(model)
        in_files = keras if fit == own.fit else run_predictor(model, fit)
        references = {name: keras if name == "saved_model" else in_files for name in written}
        decoded = [lite.read_image(encoded) for encoded in pictures]
        for name, path in written.items():
            if not runs_files and name.endswith(".tflite"):
                continue
            rows[name] = parity.compare(references[name], load_predictor(path), decoded)
        if data:
            _measure(rows, written, references, Path(data), model.config.postprocess.max_detections)
        print(parity.format_rows(rows))
        if not runs_files:
            print("the .tflite files are not compared: that needs ai-edge-litert: pip install ai-edge-litert")
    else:
        print("no comparison with Keras: the run's data is not here; give --images DATA")
    for name, row in rows.items() if data else ():
        if (drop := row["keras"] - row["AP"]) > max_ap_drop:
            what = (
                f"mask AP {row['AP']:.4f}, {drop:.4f} below Keras' {row['keras']:.4f}: more than --max-ap-drop {max_ap_drop:g}"
            )
            raise InputError(f"{name}: {what}; do not ship it")
    print(f"next: {shlex.join(['python', str(out / 'lite.py'), str(out / tflite.file_name(precisions[0])), 'IMAGE'])}")
    return rows


def export_for_serving(
    model: PolarMask | Path | str,
    out: Path | str,
    *,
    name: str = "polarmask",
    contract: str | None = None,
    max_pixels: int = 50_000_000,
    **overrides,
) -> Path:
    """Writes the next version for TF Serving, out/NAME/1 at first, and returns it; see serving.export_serving."""
    job = functools.partial(serving.export_serving, name=name, contract=contract, max_pixels=max_pixels)
    version = _write(job, _load(model, overrides), Path(out))
    print(f"next: exports/serving/README.md; MODEL_DIR={version.parent.resolve()}")
    return version


def _load(model, overrides: dict) -> PolarMask:
    overrides = {key: value for key, value in overrides.items() if value is not None}
    if not isinstance(model, PolarMask):
        return load_run(Path(model), **overrides)
    if overrides:
        raise InputError(f"{next(iter(overrides))}: of a model, set it in config.postprocess")
    return model


def _write(job, model: PolarMask, out: Path) -> Path:
    """Does `job`, an exporter, and says what it wrote, in how long; returns where."""
    began = time.monotonic()
    try:
        path = job(model, out)
    except (tf.errors.OpError, ConverterError) as error:
        raise InputError(f"{out}: TensorFlow cannot make it: {io_error_text(error)}") from None
    size = sum(f.stat().st_size for f in ([path] if path.is_file() else path.rglob("*")) if f.is_file())
    print(f"{path}: {size / 1e6:.1f} MB, {time.monotonic() - began:.0f} s")
    return path


def _first_images(directories: list, number: int) -> list[bytes]:
    """Encoded images of the first of these directories that is here; [] if none is."""
    directory = next((path for path in directories if path and Path(path).is_dir()), None)
    return [encoded for _, encoded in itertools.islice(records.iter_images(directory), number)] if directory else []


def _measure(rows: dict, written: dict, references: dict, data: Path, detections: int) -> None:
    """Adds "AP", of every export, and "keras", of the model that resizes images as that does.

    Of 100 detections an image, as COCO counts, or of `detections` where the model gives more.
    """

    def mask_ap(predictor):
        return evaluate(predictor, data, max_detections=max(100, detections)).values["AP"]

    keras = {id(predictor): mask_ap(predictor) for predictor in {id(p): p for p in references.values()}.values()}
    for name, path in written.items():
        rows[name] |= {"AP": mask_ap(load_predictor(path)), "keras": keras[id(references[name])]}
