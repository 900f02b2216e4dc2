"""Pickles of tensors, run by a machine that knows what a state dict needs and nothing else.

A pickle is a program. Python's own machine imports and calls what the program names; this one knows plain values, lists,
tuples and dicts, and three functions: those that rebuild a tensor or a parameter, and OrderedDict. It has no recursion, and
its time and what it holds are bounded by the length of the program: no opcode copies what another one has made.
"""

from __future__ import annotations

import io
import pickletools
import typing

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
_MOST_OPCODES = 10**6
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


class Storage(typing.NamedTuple):
    kind: str  # a value of STORAGES
    key: str
    count: int  # of numbers

    @property
    def item_size(self) -> int:
        """Bytes of a number."""
        return {"bfloat16": 2, "bool": 1}.get(self.kind) or int(self.kind[1])


class Tensor(typing.NamedTuple):
    """A view of a storage, as it is in the file; nothing of it is checked yet."""

    storage: typing.Any
    offset: typing.Any
    size: typing.Any
    strides: typing.Any


class _Name(typing.NamedTuple):
    """What the pickle calls a global: "module name"."""

    text: str


def are_counts(values) -> bool:
    """Whether these are a few numbers that might be sizes. A bool is a number to Python."""
    return isinstance(values, (tuple, list)) and len(values) <= 16 and all(type(n) is int and 0 <= n < 2**48 for n in values)


def run(text: io.BytesIO, storages: dict | None = None):
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
        case "_rebuild_tensor_v2", (storage, offset, size, strides, _, _, *_):
            return Tensor(storage, offset, size, strides)
        case "_rebuild_parameter", (Tensor() as tensor, _, _):
            return tensor
    raise ValueError(f"{name} of other arguments")


def _storage(about, storages: dict[str, Storage]) -> Storage:
    """That of a persistent id: ("storage", type, key, device, number of numbers) and, in the old format, None."""
    match about:
        case ("storage", _Name() as kind, str() as key, str(), int() as count, *rest) if rest in ([], [None]):
            storage = Storage(STORAGES[kind.text.split(" ")[1]], key, count)
            if not are_counts([count]) or storages.setdefault(key, storage) != storage:
                raise ValueError("one storage of two kinds")
            return storage
    raise ValueError("no storage")
