"""Reads what torch.save wrote, in its old format (pickles, then numbers) and in its new one (a zip file), without torch.

What is read and held is bounded by the size of the file. Formats: torch/serialization.py of PyTorch 2, from which the order of
the parts and their names are.
"""

from __future__ import annotations

import io
import math
import struct
import zipfile
from pathlib import Path

import numpy as np

from polarmask_tf.weights.unpickle import Storage, Tensor, are_counts, run

_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # with which the old format begins
_MOST_TEXT = 2**24  # bytes of pickle; released checkpoints, optimizers included, have less than a hundredth
_MOST_BYTES = 8  # times the file's: each number is read and copied once, or several times where tensors share it (tied weights)


class TorchFile:
    """An open file: `content` is what was saved, with a Tensor for each tensor; `array` gives the numbers of one.

    Raises ForeignObject for objects that no state dict needs, and ValueError (or one of the errors of zipfile, struct and
    the like, all of them Exceptions) for a file that is damaged or no such file.
    """

    def __init__(self, path: Path):
        self._size = path.stat().st_size
        self._left = _MOST_BYTES * self._size
        self._file = open(path, "rb")  # noqa: SIM115 closed by __exit__
        self._archive: zipfile.ZipFile | None = None
        self._order, self._places = "<", {}  # of the old format: where each storage's numbers begin
        self._newest: tuple = (None, None)
        try:
            self.content = self._read_zip() if self._file.read(4) == b"PK\x03\x04" else self._read_old()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._file.close()

    def _read_zip(self):
        self._archive = zipfile.ZipFile(self._file)
        found = [name for name in self._archive.namelist() if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(found) != 1:
            raise ValueError("not one data.pkl")
        self._folder = found[0].removesuffix("data.pkl")
        if f"{self._folder}byteorder" in self._archive.namelist():
            self._order = {b"little": "<", b"big": ">"}[self._member("byteorder", 16)]
        return run(io.BytesIO(self._member("data.pkl", _MOST_TEXT)))

    def _member(self, name: str, at_most: int) -> bytes:
        entry = self._archive.getinfo(f"{self._folder}{name}")
        # torch compresses nothing; a zip bomb would.
        if entry.compress_type != zipfile.ZIP_STORED or not entry.file_size <= min(at_most, self._size):
            raise ValueError(f"{name} is compressed, or too large")
        data = self._archive.read(entry)  # compares its checksum
        if len(data) != entry.file_size:
            raise ValueError(f"{name} is cut off")
        return data

    def _read_old(self):
        self._file.seek(0)
        text = io.BytesIO(self._file.read(_MOST_TEXT))
        if run(text) != _MAGIC or run(text) != _PROTOCOL:
            raise ValueError("no magic number")
        about = run(text)
        if not isinstance(about, dict) or about.get("little_endian") is not True:
            raise ValueError("of a machine with another byte order")
        storages: dict[str, Storage] = {}
        content, keys, at = run(text, storages), run(text), text.tell()
        if not isinstance(keys, list):
            raise ValueError("no list of storages")
        for key in keys:  # each is its number of numbers, and these
            self._file.seek(at)
            (count,) = struct.unpack("<q", self._file.read(8))
            storage = storages[key]
            end = at + 8 + count * storage.item_size
            if count != storage.count or end > self._size or key in self._places:
                raise ValueError("numbers are cut off")
            self._places[key], at = at + 8, end
        return content

    def array(self, tensor: Tensor) -> np.ndarray:
        """The numbers of a tensor; float32 for bfloat16. ValueError where its place in the storage is impossible."""
        storage, offset, size, strides = tensor
        if not isinstance(storage, Storage) or not are_counts([offset]) or not are_counts(size) or not are_counts(strides):
            raise ValueError("a tensor without a place")
        count = math.prod(size)
        last = offset + sum((n - 1) * step for n, step in zip(size, strides, strict=True)) + 1 if count else 0
        # More numbers than the storage has would be one number many times (an expanded tensor), as large as it likes.
        if last > storage.count or count > storage.count or math.prod(filter(None, size)) >= 2**48:
            raise ValueError("a tensor outside of its storage")
        numbers = self._numbers(storage)[offset:]
        self._spend(count * numbers.itemsize)
        steps = [step * numbers.itemsize for step in strides]
        return np.lib.stride_tricks.as_strided(numbers, size, steps, writeable=False).copy()

    def bits(self, tensor: Tensor) -> int:
        """How many a number of it has in the file."""
        return 8 * tensor.storage.item_size

    def _numbers(self, storage: Storage) -> np.ndarray:
        """All of a storage; of several tensors that follow one another in one storage, read once."""
        if self._newest[0] == storage:
            return self._newest[1]
        size = storage.count * storage.item_size
        self._spend(size)
        if self._archive is not None:
            data = self._member(f"data/{storage.key}", self._size)
        else:
            self._file.seek(self._places[storage.key])
            data = self._file.read(size)
        if len(data) != size:
            raise ValueError("a storage of another length")
        if storage.kind == "bfloat16":
            numbers = (np.frombuffer(data, f"{self._order}u2").astype(np.uint32) << 16).view(np.float32)
        elif storage.kind == "bool":
            numbers = np.frombuffer(data, np.uint8) != 0
        else:
            numbers = np.frombuffer(data, f"{self._order}{storage.kind}").astype(storage.kind, copy=False)
        self._newest = storage, numbers
        return numbers

    def _spend(self, size: int) -> None:
        """Counts bytes that are read and held: a small file is not to fill the memory, or take for ever."""
        self._left -= size
        if self._left < 0:
            raise ValueError("tensors of more bytes than the file")
