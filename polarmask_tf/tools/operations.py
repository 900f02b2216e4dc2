"""`polarmask benchmark FILE --operations`: which of a .tflite file's operations take the time.

LiteRT's C API has a profiler of compiled models that its Python package ships and does not wrap; hence ctypes.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import os
import time
from ctypes import POINTER, byref, c_char_p, c_int, c_int64, c_size_t, c_uint64, c_void_p
from pathlib import Path

import numpy as np

from polarmask_tf import lite
from polarmask_tf.errors import InputError
from polarmask_tf.export import flatbuffer
from polarmask_tf.export.tflite import without_native_log
from polarmask_tf.files import format_table
from polarmask_tf.tools.benchmark import MOST_THREADS, WARM_UP, synthetic_picture

KERNEL, IN_DELEGATE = 2, 8  # kinds of events: an operation by LiteRT's own kernels, one within a delegate (XNNPACK)
UNTOUCHED = b"\xa5"  # of memory that the profiler has not written to
LIBRARY = "libLiteRt.so"
CONVOLUTIONS = ("1x1", "depthwise", "other")


class _Event(ctypes.Structure):
    _fields_ = (
        ("name", c_char_p),
        ("kind", c_int),
        ("start_us", c_uint64),
        ("elapsed_us", c_uint64),
        ("memory", c_int64 * 6),
        ("metadata", c_uint64 * 2),
        ("source", c_int),
    )


def profile(file: Path | str, *, image: np.ndarray | None = None, threads: int = 1, repeats: int = 50) -> dict:
    """Times of the operations of a file that `polarmask export` wrote, on the CPU.

    Args: as of benchmark.benchmark_files.

    Returns:
      {"file", "call_ms" (median of a whole call, the profiler off), "operations": rows {"operation" (XNNPACK's name with the
      types, or LiteRT's), "count", "ms" (median over the calls of their sum), "share" (of all operations)}, slowest first,
      "convolutions": rows {"convolutions" ("1x1", "depthwise", "other"), "count", "ms", "multiply_adds", "giga_per_s"}, or none
      where XNNPACK did not do just the file's}. Each operation is timed in whole microseconds, rounded down.

    Raises InputError for other files, and where ai-edge-litert has no such profiler.
    """
    if not 1 <= threads <= MOST_THREADS:
        raise InputError(f"benchmark: {threads} threads, of 1 to {MOST_THREADS}")
    try:
        height, width = lite.PolarMaskLite(file).input_size
    except ImportError:
        raise InputError("running .tflite files needs ai-edge-litert: pip install ai-edge-litert") from None
    except ValueError as error:
        raise InputError(str(error)) from None
    picture = lite.letterbox(synthetic_picture() if image is None else image, height, width)[0]
    with without_native_log(), contextlib.ExitStack() as stack:
        model = _Compiled(stack, Path(file), picture, threads)
        calls = [model.call() for _ in range(WARM_UP + repeats)][WARM_UP:]
        events = [model.profiled_call() for _ in range(WARM_UP + repeats)][WARM_UP:]
    names = sorted({name for each in events for name, _ in each})
    sums = {name: float(np.median([sum(us for n, us in each if n == name) for each in events])) / 1e3 for name in names}
    counts = {name: sum(n == name for n, _ in events[0]) for name in names}
    total = sum(sums.values())
    rows = [
        {"operation": name, "count": counts[name], "ms": sums[name], "share": sums[name] / total}
        for name in sorted(names, key=sums.__getitem__, reverse=True)
    ]
    content = Path(file).read_bytes()
    return {
        "file": str(file),
        "call_ms": float(np.median(calls)),
        "operations": rows,
        "convolutions": _convolutions(rows, flatbuffer.multiply_adds(content)),
    }


def format_profile(found: dict) -> str:
    """What `profile` returned as text."""
    total = sum(row["ms"] for row in found["operations"])
    head = f"{found['file']}: {found['call_ms']:.2f} ms a call; its operations, profiled, {total:.2f} ms"
    tables = [format_table(found["operations"], {"operation": "", "count": "", "ms": ".3f", "share": ".1%"})]
    if found["convolutions"]:
        columns = {"convolutions": "", "count": "", "ms": ".3f", "multiply_adds": ",", "giga_per_s": ".0f"}
        tables.append(format_table(found["convolutions"], columns))
    return "\n\n".join(["\n".join([head, tables[0]]), *tables[1:]])


def _convolutions(rows: list[dict], counted: list[tuple[str, int]]) -> list[dict]:
    """By kind, as XNNPACK does them: 1x1 as a matrix product, depthwise, the others."""
    found = {kind: {"convolutions": kind, "count": 0, "ms": 0.0} for kind in CONVOLUTIONS}
    for row in rows:
        name = row["operation"]
        kind = "1x1" if name.startswith("Fully Connected") else "depthwise" if "DWConv" in name else "other"
        if kind != "other" or name.startswith("Convolution"):
            found[kind]["count"] += row["count"]
            found[kind]["ms"] += row["ms"]
    for kind, row in found.items():
        mine = [number for each, number in counted if each == kind]
        if len(mine) != row["count"]:
            return []
        row["multiply_adds"] = sum(mine)
        row["giga_per_s"] = sum(mine) / row["ms"] / 1e6 if row["ms"] else 0.0
    return [row for row in found.values() if row["count"]]


class _Compiled:
    """A file as a compiled model of LiteRT with the profiler, on the CPU; `stack` frees it."""

    def __init__(self, stack: contextlib.ExitStack, file: Path, picture: np.ndarray, threads: int):
        self._stack, self._library = stack, _library()
        self._environment = self._make("Environment", c_int(0), None)
        model = self._make("Model", self._environment, os.fsencode(file), create="CreateModelFromFile")
        options = self._make("Options")
        self._do("SetOptionsHardwareAccelerators", options, c_int(1))  # the CPU
        self._add(options, b"runtime_options_string", b"enable_profiling = true\n")
        self._add(options, b"xnnpack", b"num_threads = %d\n" % threads)
        self._model = self._make("CompiledModel", self._environment, model, options)
        self._profiler = self._out("CompiledModelGetProfiler", self._model)
        signature = self._out("GetModelSignature", model, c_size_t(0))
        given, made = self._buffers(signature, "Input"), self._buffers(signature, "Output")
        self._sides = [
            x for side in (given, made) for x in (c_size_t(len(side)), (c_void_p * len(side))(*[b.value for b in side]))
        ]
        size = c_size_t()
        self._do("GetTensorBufferPackedSize", given[0], byref(size))
        if size.value != picture.nbytes:
            raise InputError(f"{file}: takes {size.value} bytes, and the image has {picture.nbytes}")
        place = self._out("LockTensorBuffer", given[0], after=(c_int(1),))  # to write
        ctypes.memmove(place, np.ascontiguousarray(picture).ctypes.data, picture.nbytes)
        self._do("UnlockTensorBuffer", given[0])

    def call(self) -> float:
        """One inference: its milliseconds."""
        began = time.perf_counter()
        self._do("RunCompiledModel", self._model, c_size_t(0), *self._sides)
        return 1e3 * (time.perf_counter() - began)

    def profiled_call(self) -> list[tuple[str, int]]:
        """One inference: name and microseconds of each operation, in order."""
        for what in ("ResetProfiler", "StartProfiler"):
            self._do(what, self._profiler)
        self.call()
        self._do("StopProfiler", self._profiler)
        number = c_int()
        self._do("GetNumProfilerEvents", self._profiler, byref(number))
        size = number.value * ctypes.sizeof(_Event)
        memory = ctypes.create_string_buffer(UNTOUCHED * (2 * size), 2 * size)  # more than it should need
        self._do("GetProfilerEvents", self._profiler, number, memory)
        written = len(memory.raw.rstrip(UNTOUCHED))
        if not number.value or -(-written // 8) * 8 != size:
            raise InputError(f"--operations: the profiler of ai-edge-litert {_version()} gives its events in another form")
        events = (_Event * number.value).from_buffer(memory)
        return [(e.name.decode(errors="replace"), e.elapsed_us) for e in events if e.kind in (KERNEL, IN_DELEGATE)]

    def _do(self, what: str, *args) -> None:
        try:
            function = getattr(self._library, f"LiteRt{what}")
        except AttributeError:
            raise InputError(_MISSING.format(_version())) from None
        if status := function(*args):
            raise InputError(f"--operations: ai-edge-litert {_version()} answered LiteRt{what} with status {status}")

    def _out(self, what: str, *args, after: tuple = ()) -> c_void_p:
        """The pointer that the function writes behind `args`."""
        pointer = c_void_p()
        self._do(what, *args, byref(pointer), *after)
        return pointer

    def _make(self, kind: str, *args, create: str | None = None) -> c_void_p:
        made = self._out(create or f"Create{kind}", *args)
        self._stack.callback(getattr(self._library, f"LiteRtDestroy{kind}"), made)
        return made

    def _add(self, options: c_void_p, name: bytes, text: bytes) -> None:
        libc = ctypes.CDLL(None)
        libc.strdup.restype = c_void_p
        copy = c_void_p(libc.strdup(text))  # freed by LiteRT
        self._do("AddOpaqueOptions", options, self._out("CreateOpaqueOptions", name, copy, ctypes.cast(libc.free, c_void_p)))

    def _buffers(self, signature: c_void_p, side: str) -> list[c_void_p]:
        number, buffers = c_size_t(), []
        self._do(f"GetNumSignature{side}s", signature, byref(number))
        for index in range(number.value):
            tensor = self._out(f"GetSignature{side}TensorByIndex", signature, c_size_t(index))
            described = ctypes.create_string_buffer(256)  # LiteRtRankedTensorType
            self._do("GetRankedTensorType", tensor, described)
            where = (self._model, c_size_t(0), c_size_t(index))
            needs = self._out(f"GetCompiledModel{side}BufferRequirements", *where)
            args = (self._environment, described, needs)
            buffers.append(self._make("TensorBuffer", *args, create="CreateManagedTensorBufferFromRequirements"))
        return buffers


_MISSING = "--operations: ai-edge-litert {} has no profiler of compiled models; 2.3.0 has: pip install -U ai-edge-litert"


def _version() -> str:
    return importlib.metadata.version("ai-edge-litert")


def _library() -> ctypes.CDLL:
    """LiteRT's C API; InputError where the package has none, or none with a profiler."""
    import ai_edge_litert

    try:
        library = ctypes.CDLL(str(Path(ai_edge_litert.__file__).with_name(LIBRARY)))
        library.LiteRtCompiledModelGetProfiler.argtypes = [c_void_p, POINTER(c_void_p)]
    except (OSError, AttributeError, TypeError):
        raise InputError(_MISSING.format(_version())) from None
    return library
