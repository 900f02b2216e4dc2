"""Reads what torch.save wrote, in its old format (pickles, then numbers) and in its new one (a zip file), without torch.

A pickle is a program. The one here is run by a machine of its own that knows plain values, lists and dicts, and three
functions: those that rebuild a tensor or a parameter, and OrderedDict. It imports nothing and calls nothing else, has no
recursion, and what it holds is bounded by the size of the file. Formats: torch/serialization.py of PyTorch 2, from which the
names of the persistent ids and the order of the parts are.
"""

from __future__ import annotations

import io
import math
import pickletools
import struct
import typing
import zipfile
from pathlib import Path

import numpy as np

# Names of storages to numpy's types, in the file's byte order. Numbers of bfloat16 are the upper halves of float32's.
STORAGES = {
    "DoubleStorage": "f8",
    "FloatStorage": "f4",
    "HalfStorage": "f2",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "i8",
    "IntStorage": "i4",
    "ShortStorage": "i2",
    "CharStorage": "i1",
    "ByteStorage": "u1",
    "BoolStorage": "bool",
}
FUNCTIONS = {
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
    "collections OrderedDict",
    *(f"torch {name}" for name in STORAGES),
}
_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # with which the old format begins
_MOST_TEXT = 2**24  # bytes of pickle; released checkpoints, optimizers included, have less than a hundredth
_MOST_OPCODES = 10**6
_MOST_BYTES = 8  # times the file's: each number is read and copied once, or several times where tensors share it (tied weights)
_WRITTEN_OUT = (  # what opcodes push that have their value behind them
    pickletools.pyint,
    pickletools.pyinteger_or_bool,
    pickletools.pyfloat,
    pickletools.pyunicode,
    pickletools.pybytes_or_str,
    pickletools.pybytes,
)
_PLAIN = (str, int, float, bool, type(None))


class ForeignObject(Exception):
    """A pickle asks for something that is not in FUNCTIONS; the message is its name."""


class _Storage(typing.NamedTuple):
    kind: str  # a value of STORAGES
    key: str
    count: int  # of numbers


class Tensor(typing.NamedTuple):
    """A view of a storage, as it is in the file; nothing of it is checked yet."""

    storage: typing.Any
    offset: typing.Any
    size: typing.Any
    strides: typing.Any


class _Name(typing.NamedTuple):
    """What the pickle calls a global: "module name"."""

    text: str


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
        return _run(io.BytesIO(self._member("data.pkl", _MOST_TEXT)))

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
        if _run(text) != _MAGIC or _run(text) != _PROTOCOL:
            raise ValueError("no magic number")
        about = _run(text)
        if not isinstance(about, dict) or about.get("little_endian") is not True:
            raise ValueError("of a machine with another byte order")
        storages: dict[str, _Storage] = {}
        content, keys, at = _run(text, storages), _run(text), text.tell()
        if not isinstance(keys, list):
            raise ValueError("no list of storages")
        for key in keys:  # each is its number of numbers, and these
            self._file.seek(at)
            (count,) = struct.unpack("<q", self._file.read(8))
            storage = storages[key]
            end = at + 8 + count * _item_size(storage.kind)
            if count != storage.count or end > self._size or key in self._places:
                raise ValueError("numbers are cut off")
            self._places[key], at = at + 8, end
        return content

    def array(self, tensor: Tensor) -> np.ndarray:
        """The numbers of a tensor; float32 for bfloat16. ValueError where its place in the storage is impossible."""
        storage, offset, size, strides = tensor
        if not isinstance(storage, _Storage) or not _are_counts([offset]) or not _are_counts(size) or not _are_counts(strides):
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
        return 8 * _item_size(tensor.storage.kind)

    def _numbers(self, storage: _Storage) -> np.ndarray:
        """All of a storage; of several tensors that follow one another in one storage, read once."""
        if self._newest[0] == storage:
            return self._newest[1]
        size = storage.count * _item_size(storage.kind)
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


def _item_size(kind: str) -> int:
    return {"bfloat16": 2, "bool": 1}.get(kind) or int(kind[1])


def _are_counts(values) -> bool:
    """Whether these are a few numbers that might be sizes. A bool is a number to Python."""
    return isinstance(values, (tuple, list)) and len(values) <= 16 and all(type(n) is int and 0 <= n < 2**48 for n in values)


def _run(text: io.BytesIO, storages: dict | None = None):
    """The value of the pickle at the place of `text`, which is left behind it. `storages` collects those it names."""
    stack: list = []  # of the values so far; at a MARK it goes to `marked` and a new one begins
    marked: list[list] = []
    memo: dict = {}
    storages = {} if storages is None else storages
    for number, (opcode, value, _) in enumerate(pickletools.genops(text)):
        if number > _MOST_OPCODES:
            raise ValueError("a pickle without end")
        match opcode.name:
            case "STOP":
                return stack.pop()
            case "PROTO" | "FRAME":
                pass
            case "MARK":
                marked.append(stack)
                stack = []
            case "POP":
                stack.pop()
            case "POP_MARK":
                stack = marked.pop()
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[opcode.name])
            case "EMPTY_TUPLE" | "EMPTY_LIST" | "EMPTY_DICT":
                stack.append({"EMPTY_TUPLE": (), "EMPTY_LIST": [], "EMPTY_DICT": {}}[opcode.name])
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = int(opcode.name[-1])
                if len(stack) < count:
                    raise ValueError("too short a stack")
                stack[-count:] = [tuple(stack[-count:])]
            case "TUPLE" | "LIST" | "DICT":
                items, stack = stack, marked.pop()
                make = {"TUPLE": tuple, "LIST": list, "DICT": _pairs}[opcode.name]
                stack.append(make(items))
            case "APPEND":
                item = stack.pop()
                _of_type(stack[-1], list).append(item)
            case "APPENDS":
                items, stack = stack, marked.pop()
                _of_type(stack[-1], list).extend(items)
            case "SETITEM":
                items = [stack.pop(-2), stack.pop()]
                _of_type(stack[-1], dict).update(_pairs(items))
            case "SETITEMS":
                items, stack = stack, marked.pop()
                _of_type(stack[-1], dict).update(_pairs(items))
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                memo[value] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(memo[value])
            case "GLOBAL":
                stack.append(_named(value))
            case "STACK_GLOBAL":
                stack[-2:] = [_named(f"{_of_type(stack[-2], str)} {_of_type(stack[-1], str)}")]
            case "BINPERSID":
                stack.append(_storage(stack.pop(), storages))
            case "REDUCE":
                arguments = _of_type(stack.pop(), tuple)
                stack.append(_call(_of_type(stack.pop(), _Name).text, arguments))
            case "BUILD":  # the attributes of an OrderedDict: versions of modules, which nothing here needs
                stack.pop()
                _of_type(stack[-1], dict)
            case _ if not opcode.stack_before and opcode.stack_after[0] in _WRITTEN_OUT:
                stack.append(value)
            case _:
                raise ForeignObject(opcode.name)
    raise ValueError("a pickle without end")


def _of_type(value, kind):
    if not isinstance(value, kind):
        raise ValueError(f"{kind.__name__} expected")
    return value


def _pairs(items: list) -> dict:
    """[key, value, key, value, ...] as a dict."""
    keys = items[::2]
    # Of plain types: the hash of a deeply nested tuple, say, is computed by recursion in C, without a limit.
    if len(items) % 2 or not all(isinstance(key, _PLAIN) for key in keys):
        raise ValueError("keys that are no texts or numbers")
    return dict(zip(keys, items[1::2], strict=True))


def _named(text: str) -> _Name:
    if text not in FUNCTIONS:
        raise ForeignObject(text.replace(" ", "."))
    return _Name(text)


def _call(name: str, arguments: tuple):
    match name.split(" ")[1], arguments:
        case "OrderedDict", ():
            return {}
        case "OrderedDict", (list() as pairs,):  # as Python 2 writes it
            return _pairs([part for pair in pairs for part in _pair(pair)])
        case "_rebuild_tensor_v2", (storage, offset, size, strides, _, _, *_):
            return Tensor(storage, offset, size, strides)
        case "_rebuild_parameter", (Tensor() as tensor, _, _):
            return tensor
    raise ValueError(f"{name} of other arguments")


def _pair(value) -> typing.Sequence:
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        raise ValueError("a pair expected")
    return value


def _storage(about, storages: dict[str, _Storage]) -> _Storage:
    """That of a persistent id: ("storage", type, key, device, number of numbers) and, in the old format, None."""
    match about:
        case ("storage", _Name() as kind, str() as key, str(), int() as count, *rest) if rest in ([], [None]):
            storage = _Storage(STORAGES[kind.text.split(" ")[1]], key, count)
            if not _are_counts([count]) or storages.setdefault(key, storage) != storage:
                raise ValueError("one storage of two kinds")
            return storage
    raise ValueError("no storage")
