"""Named tensors from the files that PyTorch models come in."""

from __future__ import annotations

import collections
import os
import re
import sys
from pathlib import Path

import numpy as np

from polarmask_tf.errors import InputError, one_line
from polarmask_tf.weights.torch_file import TorchFile
from polarmask_tf.weights.unpickle import ForeignObject, Tensor


def read_tensors(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """The state dict of a PyTorch checkpoint (.pth, old or new format), or an .npz of the same keys, as arrays in host memory.

    A training checkpoint ({"meta", "state_dict", "optimizer"}) gives its state_dict; a "module." before every key is
    dropped. Floating point tensors come back as float32, others as they are. Half-precision ones are accepted, with a
    line on stderr. No pickled object but tensors is loaded. Raises InputError for a missing, truncated or foreign file,
    entries that are no tensors, and values that are not finite.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    entries = _read_npz(path) if path.suffix == ".npz" else _read_torch(path)
    if entries and all(isinstance(name, str) and name.startswith("module.") for name in entries):
        entries = {name.removeprefix("module."): value for name, value in entries.items()}
    if not entries:
        raise InputError(f"{path}: holds no tensors")

    tensors, narrow = {}, 0
    for name, (value, bits) in entries.items():
        if not isinstance(name, str):
            raise InputError(f"{path}: a state_dict has names of tensors for keys, not a {type(name).__name__}")
        if not isinstance(value, np.ndarray) or value.dtype.kind not in "fiub":
            raise InputError(f"{path}: {name!r} is not a tensor of numbers; save a model's state_dict alone")
        if not np.isfinite(value).all():
            raise InputError(f"{path}: {name} holds values that are not finite")
        is_float = value.dtype.kind == "f"
        narrow += is_float and bits == 16
        tensors[name] = value.astype(np.float32, copy=False) if is_float else value
    if narrow:
        print(f"warning: {path}: {narrow} of {len(tensors)} tensors have half precision; used as they are", file=sys.stderr)
    return tensors


def summarize(names, most: int = 3) -> str:
    """The first few of some names and how many more there are, for a message of one line."""
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(str, names[:most])) + more


def without_numbers(names) -> list[str]:
    """Names of variables without the numbers that Keras gives within a process: "conv2d_7/kernel:0" is "conv2d/kernel".

    Of several that are then alike, the second is "conv2d/kernel 2", and so on: equal networks have equal names.
    """
    seen, plain = collections.Counter(), []
    for name in names:
        name = re.sub(r"_\d+(?=/)", "", name.removesuffix(":0"))
        seen[name] += 1
        plain.append(name if seen[name] == 1 else f"{name} {seen[name]}")
    return plain


def _read_npz(path: Path) -> dict:
    """{key: (array, bits of a number)}."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: (array := archive[name], 8 * array.dtype.itemsize) for name in archive.files}
    except Exception as e:  # zip, zlib, header and pickle errors are of a dozen classes
        if "Object arrays" in str(e):
            raise InputError(f"{path}: holds pickled objects, which are not loaded since they could run code") from None
        raise InputError(f"{path}: truncated, or not an .npz file of arrays") from None


def _read_torch(path: Path) -> dict:
    """{key: (array, bits of a number in the file)}; of what is no tensor, (None, 0)."""
    try:
        with TorchFile(path) as file:
            entries = file.content
            if isinstance(entries, dict) and isinstance(entries.get("state_dict"), dict):
                entries = entries["state_dict"]
            if not isinstance(entries, dict):
                raise InputError(f"{path}: a state_dict is expected, not a {type(entries).__name__}")
            # Only these are read of what a training's checkpoint holds: the optimizer's numbers stay where they are.
            return {
                key: (file.array(value), file.bits(value)) if isinstance(value, Tensor) else (None, 0)
                for key, value in entries.items()
            }
    except InputError:
        raise
    except ForeignObject as e:
        raise InputError(
            f"{path}: holds Python objects beside tensors ({one_line(e, 60)}), which are not loaded since they could run "
            "code; save its state_dict alone with torch.save"
        ) from None
    except Exception:  # as above
        raise InputError(f"{path}: truncated, or not a PyTorch checkpoint") from None
