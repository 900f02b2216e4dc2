"""`polarmask inspect`: what an exported file takes, gives and knows about itself."""

from __future__ import annotations

import json
from pathlib import Path

from polarmask_tf import lite
from polarmask_tf.errors import InputError, counted
from polarmask_tf.export import flatbuffer
from polarmask_tf.inference.predictor import saved_model_metadata

_IMAGE = {
    True: "its own 8 bits; mean and deviation are in the first convolution's weights",
    False: "made float and normalised first: model.normalization is image, or the backbone begins with no convolution",
}


def describe(path: Path) -> str:
    """Size, tensors and metadata of a .tflite file, or the metadata of a SavedModel directory, as text.

    Raises InputError for a file that LiteRT does not load and for one without our metadata.
    """
    path = Path(path)
    if path.is_dir():
        return "\n".join([str(path), *_known(saved_model_metadata(path))])
    try:
        from ai_edge_litert.interpreter import Interpreter

        metadata = lite.PolarMaskLite(path).metadata
    except ImportError:
        raise InputError(f"{path}: running it needs ai-edge-litert: pip install ai-edge-litert") from None
    except ValueError as error:
        raise InputError(str(error)) from None
    signature = Interpreter(model_path=str(path)).get_signature_runner("serving_default")
    lines = [f"{path}: {path.stat().st_size / 1e6:.2f} MB"]
    for what, details in (("input", signature.get_input_details()), ("output", signature.get_output_details())):
        lines += [f"{what:<7} {name}: {d['dtype'].__name__} {d['shape'].tolist()}" for name, d in sorted(details.items())]
    if metadata.get("precision") == "int8":
        lines.append(f"image   {_IMAGE[flatbuffer.reads_pixels(path.read_bytes())]}")
    return "\n".join([*lines, *_known(metadata)])


def _known(metadata: dict) -> list[str]:
    names = [entry["name"] for entry in metadata["classes"]]
    rest = {key: value for key, value in metadata.items() if key != "classes"}
    return [f"{counted(len(names), 'class', 'classes')}: {', '.join(names)}", "metadata.json:", json.dumps(rest, indent=1)]
