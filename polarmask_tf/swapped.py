"""Arguments in the wrong order: told by what lies at each, before anything is read or loaded."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from polarmask_tf.data.sources.folder import is_picture
from polarmask_tf.errors import InputError
from polarmask_tf.weights import shipped


def check_convert(source: Path, images: Path | None, out: Path) -> None:
    """InputError, with the right order, where SOURCE, IMAGES or OUT of `polarmask convert` stands in another's place."""
    if images is None:
        if _is_unread(source) and _holds_data(out):
            raise _wrong(f"{source} is nothing to convert, and {out} holds data", "convert", out, source)
    elif _are_swapped(source, images):
        raise _wrong(f"{images} is no folder of pictures: the annotations come first", "convert", images, source, out)
    elif _is_unread(images) and os.path.isfile(source) and _holds_pictures(out):
        raise _wrong(f"{images} is no folder of pictures, and {out} is one", "convert", source, out, images)
    elif _is_unread(source) and os.path.exists(images) and _holds_data(out):
        first, second = (out, images) if os.path.isfile(out) or _are_swapped(images, out) else (images, out)
        raise _wrong(f"{source} is nothing to convert, and OUT comes last", "convert", first, second, source)


def check_check(source: Path, images: Path | None) -> None:
    """InputError where SOURCE and IMAGES of `polarmask check` stand in each other's place."""
    if images is not None and _are_swapped(source, images):
        raise _wrong(f"{images} is no folder of pictures: the annotations come first", "check", images, source)


def check_predict(model: str, inputs: list[str]) -> None:
    """InputError where a model stands among the pictures, and none in its place."""
    if not is_model(model) and (models := [each for each in inputs if is_model(each)]):
        others = [model, *(each for each in inputs if each != models[0])]
        shown = [*others[:3], *["..."] * (len(others) > 3)]
        raise _wrong(f"{model} is no model, and {models[0]} is one", "predict", models[0], *shown)


def check_one(command: str, model: str | Path, option: str, other: str | Path | None) -> None:
    """InputError where the model that `command` takes first stands behind `option`."""
    if is_model(model):
        return
    if other is not None and is_model(other):
        raise _wrong(f"{model} is no model, and {other} is one", command, other, option, model)
    if option == "--data" and other is None and os.path.isfile(Path(model) / "dataset.json"):
        raise InputError(f"{model}: is converted data: write polarmask {command} MODEL --data {shlex.quote(str(model))}")


def is_model(source: str | Path) -> bool:
    """Whether something has the looks of what predictor.load_predictor takes."""
    text, path = str(source), Path(source)
    if text.startswith(("http://", "https://", "grpc://")):
        return True
    if path.suffix in (".tflite", ".keras") and os.path.isfile(path):
        return True
    if any(os.path.isfile(path / name) for name in ("config.yaml", "saved_model.pb")):
        return True
    return text in shipped.names() and not os.path.exists(path)


def _wrong(what, command, *words):
    return InputError(f"{what}; write: polarmask {command} {' '.join(shlex.quote(str(word)) for word in words)}")


def _is_unread(path):
    """Not there, an empty folder, or one that `convert` wrote."""
    if not os.path.isdir(path):
        return not os.path.exists(path)
    return not _names(path) or any(os.path.isfile(path / part / "dataset.json") for part in ("", "train"))


def _holds_data(path):
    return os.path.isfile(path) or not _is_unread(path)


def _holds_pictures(path):
    return os.path.isdir(path) and any(map(is_picture, _names(path)))


def _are_swapped(source, images):
    """Whether `images` has the annotations, and `source` the pictures alone."""
    if not os.path.isdir(source):
        return False
    if os.path.isfile(images):
        return not is_picture(images.name)
    if not os.path.isdir(images) or _holds_pictures(images) or not _holds_pictures(source):
        return False
    texts = (".json", ".xml", ".txt", ".yaml", ".yml")
    return not any(name.lower().endswith(texts) for name in _names(source)) and any(
        name.lower().endswith(texts) for name in _names(images)
    )


def _names(path):
    try:
        return os.listdir(path)
    except OSError:
        return []
