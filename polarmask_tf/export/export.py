"""From a run directory to files that take an image and return polygons."""

from __future__ import annotations

import functools
import io
import itertools
import shutil
import sys
import time
from pathlib import Path

from polarmask_tf import lite
from polarmask_tf.errors import InputError

PARITY_IMAGES = 8
CALIBRATION_IMAGES = 128


def export(
    run: Path,
    out: Path,
    *,
    images: Path | None = None,
    precisions=("fp32",),
    raw: bool = False,
    data: Path | None = None,
    max_ap_drop: float = 0.01,
    **overrides,
) -> dict:
    """Writes out/saved_model, out/model.tflite and out/lite.py, and compares all with the Keras model.

    Args:
      run: run directory.
      out: directory to make or to fill.
      images: converted data whose first images the comparison takes; default: `data`, or the run's own data.
      precisions: of tflite.PRECISIONS, a .tflite file of each. int8 is calibrated on the run's training data, or else on
        the data that the comparison takes.
      raw: also a file of each that ends at the head's outputs.
      data: converted data on which the mask AP of all that is exported is measured beside Keras', of 100 detections an
        image or as many as the model gives.
      max_ap_drop: how much lower an AP on `data` may be.
      overrides: of config.postprocess, fixed in the exports; None values are ignored.

    Returns:
      Rows of parity.compare by export; with `data` each has "AP" too. Raises InputError if `run` cannot be exported, `out`
      cannot be written, or an AP drops too much, which leaves the files where they are.
    """
    from polarmask_tf.export import parity
    from polarmask_tf.export.graph import export_saved_model
    from polarmask_tf.export.tflite import PRECISIONS, export_tflite, file_name, fit
    from polarmask_tf.inference.predictor import load_predictor, run_predictor
    from polarmask_tf.weights.runs import load_run

    for precision in precisions:
        if precision not in PRECISIONS:
            raise InputError(f"precision {precision}: choose of {', '.join(PRECISIONS)}")
    for path in (images, data):
        if path and not path.is_dir():
            raise InputError(f"{path}: not a directory of converted data")
    overrides = {key: value for key, value in overrides.items() if value is not None}
    model = load_run(run, **overrides)
    own = model.config.data
    calibration = next((d for d in (own.train, images, data, own.val) if d and Path(d).is_dir()), None)
    images = next((d for d in (images, data, own.val, own.train) if d and Path(d).is_dir()), None)
    if "int8" in precisions and calibration is None:
        raise InputError("int8 is calibrated on images, and the run's training data is not here: give --images DATA")
    written = {}
    try:
        out.mkdir(parents=True, exist_ok=True)
        jobs = {"saved_model": export_saved_model}
        for precision, ends in itertools.product(precisions, (False, True) if raw else (False,)):
            jobs[file_name(precision, ends)] = functools.partial(
                export_tflite, precision=precision, raw=ends, images=functools.partial(_calibration, model, calibration)
            )
        for name, function in jobs.items():
            began = time.monotonic()
            path = written[name] = function(model, model.classes, out / name)
            size = sum(f.stat().st_size for f in ([path] if path.is_file() else path.rglob("*")) if f.is_file())
            print(f"{path}: {size / 1e6:.1f} MB, {time.monotonic() - began:.0f} s")
        shutil.copyfile(lite.__file__, out / "lite.py")
        if fit(own) != own.fit:
            height, width = model.input_size
            print(
                f"warning: model.tflite fits every image into {height} x {width}: a standing one gets smaller in it than in "
                "training",
                file=sys.stderr,
            )
    except OSError as e:
        raise InputError(f"{out}: cannot be written: {e.strerror}") from None
    rows = {}
    if images is None:
        print("no comparison with Keras: the run's data is not here; give --images DATA")
    else:
        pictures = _pictures(images, PARITY_IMAGES)
        # Each against Keras on images that are resized as it resizes them.
        for name, path in written.items():
            reference = run_predictor(model, own.fit if name == "saved_model" else fit(own))
            rows[name] = parity.compare(reference, load_predictor(path), pictures)
        if data:
            keras = run_predictor(model)
            in_file = keras if fit(own) == own.fit else run_predictor(model, fit(own))
            _measure(rows, written, keras, in_file, data, model.config.postprocess.max_detections)
        print(parity.format_table(rows))
    file = next(path for path in written.values() if path.suffix == ".tflite")
    if data:
        _refuse(rows, max_ap_drop)
    print(f"next: python {out / 'lite.py'} {file} IMAGE")
    return rows


def _pictures(data, number: int) -> list:
    from polarmask_tf.data import records

    return [lite.read_image(io.BytesIO(encoded)) for _, encoded in itertools.islice(records.iter_images(data), number)]


def _calibration(model, data):
    """Images as evaluation prepares them, one after the other."""
    from polarmask_tf.data import records
    from polarmask_tf.export.tflite import fit
    from polarmask_tf.inference.predictor import network_input

    for _, encoded in itertools.islice(records.iter_images(data), CALIBRATION_IMAGES):
        yield network_input(lite.read_image(io.BytesIO(encoded)), model.config.data, fit(model.config.data))[0]


def _measure(rows: dict, written: dict, keras, keras_in_file, data: Path, detections: int) -> None:
    """Adds "AP", of every export, and "keras", of the model that resizes images as that does.

    Of 100 detections an image, as COCO counts, or of `detections` where the model gives more.
    """
    from polarmask_tf.inference.evaluate import evaluate
    from polarmask_tf.inference.predictor import load_predictor

    def mask_ap(predictor):
        return evaluate(predictor, data, max_detections=max(100, detections)).values["AP"]

    found = {}
    for name, path in written.items():
        reference = keras if name == "saved_model" else keras_in_file
        if id(reference) not in found:
            found[id(reference)] = mask_ap(reference)
        rows[name] |= {"AP": mask_ap(load_predictor(path)), "keras": found[id(reference)]}


def _refuse(rows: dict, max_ap_drop: float) -> None:
    for name, row in rows.items():
        if row["keras"] - row["AP"] > max_ap_drop:
            raise InputError(
                f"{name}: mask AP {row['AP']:.4f}, {row['keras'] - row['AP']:.4f} below Keras' {row['keras']:.4f}: more than "
                f"--max-ap-drop {max_ap_drop:g}; do not ship it"
            )


def export_for_serving(run: Path, out: Path, *, name: str, contract: str | None, max_pixels: int, **overrides) -> Path:
    """Writes the next version of the model for TF Serving, out/NAME/1 at first, and returns it; see serving.export_serving."""
    from polarmask_tf.export.serving import export_serving
    from polarmask_tf.weights.runs import load_run

    model = load_run(run, **{key: value for key, value in overrides.items() if value is not None})
    began = time.monotonic()
    version = export_serving(model, model.classes, out, name=name, contract=contract, max_pixels=max_pixels)
    size = sum(file.stat().st_size for file in version.rglob("*") if file.is_file())
    print(f"{version}: {size / 1e6:.1f} MB, {time.monotonic() - began:.0f} s")
    print(f"next: exports/serving/README.md; MODEL_DIR={version.parent.resolve()}")
    return version
