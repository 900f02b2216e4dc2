"""Models that come with the package, by name, like "nuclei": weights in float16, config, classes and a model card.

A shipped model is a run directory with weights.npz in place of checkpoints: whatever takes a run takes it, but no training
can go on in it.
"""

from __future__ import annotations

import functools
import os
import sys
import zipfile
from pathlib import Path

import numpy as np

from polarmask_tf.errors import InputError, one_line

WEIGHTS = "weights.npz"
_FOLDER = Path(__file__).resolve().parents[1] / "models"
_MOST_BYTES = 2**30  # of all weights together


def names() -> list[str]:
    """What `resolve` knows."""
    return sorted(path.parent.name for path in _FOLDER.glob(f"*/{WEIGHTS}"))


def resolve(source: str | os.PathLike) -> Path:
    """The directory of a shipped model by its name, or `source` as it is; an existing path of that name wins, and is said."""
    if str(source) not in names():
        return Path(source)
    if os.path.exists(source):
        _say_that_it_wins(str(source), os.getcwd())
        return Path(source)
    return _FOLDER / str(source)


@functools.cache
def _say_that_it_wins(name: str, _folder: str) -> None:
    """Once in each folder, though one command asks for a model several times."""
    print(f"{name}: the path of that name, not the model that comes with polarmask_tf", file=sys.stderr)


def write_weights(path: Path, variables: dict) -> None:
    """Writes name -> variable in float16; InputError for a value that float16 cannot hold."""
    with np.errstate(over="ignore"):  # which is looked for below
        arrays = {name: np.asarray(variable, np.float16) for name, variable in variables.items()}
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            raise InputError(f"{name}: a weight beyond what float16 holds")
    with open(path, "wb") as file:
        np.savez_compressed(file, **arrays)


def assign_weights(path: Path, variables: dict) -> None:
    """Gives name -> variable the values of a file of `write_weights`; InputError where it does not hold exactly these."""
    try:
        with zipfile.ZipFile(path) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > _MOST_BYTES:
                raise ValueError(f"more than {_MOST_BYTES:,} bytes")
        with np.load(path, allow_pickle=False) as arrays:
            values = {name: np.asarray(arrays[name], np.float32) for name in arrays.files}
    except Exception as error:  # zip, zlib, NumPy's headers and its allocation fail in a dozen ways
        raise InputError(f"{path}: damaged ({one_line(error, 200)}); install polarmask_tf again") from None
    shapes = {name: tuple(variable.shape) for name, variable in variables.items()}
    if shapes != {name: value.shape for name, value in values.items()}:
        raise InputError(f"{path}: is of another model than config.yaml beside it says; install polarmask_tf again")
    for name, variable in variables.items():
        variable.assign(values[name])
