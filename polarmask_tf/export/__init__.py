"""From a run directory to files that take an image and return polygons."""

from __future__ import annotations

import io
import itertools
import shutil
import sys
import time
from pathlib import Path

from polarmask_tf import lite
from polarmask_tf.errors import InputError

PARITY_IMAGES = 8


def export(run: Path, out: Path, *, images: Path | None = None, **overrides) -> dict:
    """Writes out/saved_model, out/model.tflite and out/lite.py, and compares both with the Keras model.

    Args:
      run: run directory.
      out: directory to make or to fill.
      images: converted data whose first images the comparison takes; default: the run's validation or training data.
      overrides: of config.postprocess, fixed in the exports; None values are ignored.

    Returns:
      Rows of parity.compare by export. Raises InputError if `run` cannot be exported or `out` cannot be written.
    """
    from polarmask_tf.data import records
    from polarmask_tf.export import parity
    from polarmask_tf.export.saved_model import export_saved_model
    from polarmask_tf.export.tflite import export_tflite, fit
    from polarmask_tf.predictor import load_predictor, run_predictor
    from polarmask_tf.runs import load_run

    overrides = {key: value for key, value in overrides.items() if value is not None}
    model = load_run(run, **overrides)
    data = next((d for d in (images, model.config.data.val, model.config.data.train) if d and Path(d).is_dir()), None)
    if images and data != images:
        raise InputError(f"{images}: not a directory of converted data")
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, function in (("saved_model", export_saved_model), ("model.tflite", export_tflite)):
            began = time.monotonic()
            path = function(model, model.classes, out / name)
            size = sum(f.stat().st_size for f in ([path] if path.is_file() else path.rglob("*")) if f.is_file())
            print(f"{path}: {size / 1e6:.1f} MB, {time.monotonic() - began:.0f} s")
        shutil.copyfile(lite.__file__, out / "lite.py")
        if fit(model.config.data) != model.config.data.fit:
            height, width = model.input_size
            print(f"warning: model.tflite fits every image into {height} x {width}: a standing one gets smaller in it than in "
                  "training", file=sys.stderr)
    except OSError as e:
        raise InputError(f"{out}: cannot be written: {e.strerror}") from None
    rows = {}
    if data is None:
        print("no comparison with Keras: the run's data is not here; give --images DATA")
    else:
        encoded = [encoded for _, encoded in itertools.islice(records.iter_images(data), PARITY_IMAGES)]
        pictures = [lite.read_image(io.BytesIO(content)) for content in encoded]
        # Each against Keras on images that are resized as it resizes them.
        for name, resize in (("saved_model", model.config.data.fit), ("model.tflite", fit(model.config.data))):
            rows[name] = parity.compare(run_predictor(model, resize), load_predictor(out / name), pictures)
        print(parity.format_table(rows))
    print(f"next: python {out / 'lite.py'} {out / 'model.tflite'} IMAGE")
    return rows


def export_for_serving(run: Path, out: Path, *, name: str, contract: str | None, max_pixels: int, **overrides) -> Path:
    """Writes the next version of the model for TF Serving, out/NAME/1 at first, and returns it; see serving.export_serving."""
    from polarmask_tf.export.serving import export_serving
    from polarmask_tf.runs import load_run

    model = load_run(run, **{key: value for key, value in overrides.items() if value is not None})
    began = time.monotonic()
    version = export_serving(model, model.classes, out, name=name, contract=contract, max_pixels=max_pixels)
    size = sum(file.stat().st_size for file in version.rglob("*") if file.is_file())
    print(f"{version}: {size / 1e6:.1f} MB, {time.monotonic() - began:.0f} s")
    print(f"next: exports/serving/README.md; MODEL_DIR={version.parent.resolve()}")
    return version
