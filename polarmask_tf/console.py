"""What a command prints: it never ends the command, and no file's control characters reach the terminal."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import shlex
import sys
import typing

# How progress bars move; the rest of a text stays where it is written.
_MOVES = re.compile(r"(?:[\r\n\b]|\x1b\[A)*")
# C0 and C1 without line end and tab, and what changes the direction of writing.
_CONTROLS = (*range(32), *range(127, 160), *range(0x202A, 0x202F), *range(0x2066, 0x206A))
_ESCAPES = {code: ascii(chr(code))[1:-1] for code in _CONTROLS if chr(code) not in "\n\t"}


def command(*words) -> str:
    """A polarmask command as a shell takes it, whatever blanks and quotes its words have."""
    return shlex.join(["polarmask", *map(str, words)])


class _Stream:
    """A text stream that takes everything: what cannot be written, the disk full or the reader gone, is dropped."""

    def __init__(self, stream: typing.TextIO):
        self._stream = stream
        self.error: OSError | None = None  # why something was dropped
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a file name may hold what the terminal's encoding lacks

    def __getattr__(self, name):
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        found = _MOVES.match(text)
        moves = found.end() if found else 0
        self._try(self._stream.write, text[:moves] + text[moves:].translate(_ESCAPES))
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, function, *args):
        try:
            function(*args)
        except OSError as error:
            self.error = self.error or error
            with contextlib.suppress(OSError):  # what is still in its buffer would fail again when Python ends
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, self._stream.fileno())
                os.close(null)


@contextlib.contextmanager
def tolerant() -> typing.Iterator[None]:
    """sys.stdout and sys.stderr as above while a command runs; a closed one, or a closed stdin, is the null device."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets this number, which the next file to be opened would have got
    before = sys.stdout, sys.stderr
    with open(os.devnull, "w") as null:
        sys.stdout, sys.stderr = out, err = [_Stream(stream or null) for stream in before]
        try:
            yield
        finally:
            out.flush()
            if out.error and not isinstance(out.error, BrokenPipeError):  # a reader that goes away, like `head`, means to
                print(f"polarmask: warning: stdout cannot be written: {out.error.strerror}", file=err)
            err.flush()
            sys.stdout, sys.stderr = before


class _QuietTensorFlow:
    """A finder of sys.meta_path: what TensorFlow writes to stderr while it is imported comes after it, without its noise."""

    # Lines of information, which 2.21 writes whatever TF_CPP_MIN_LOG_LEVEL says.
    NOISE = re.compile(rb"WARNING: All log messages before absl::InitializeLog|I\d{4} ")

    def find_spec(self, name, path=None, target=None):
        if name != "tensorflow":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec and spec.loader and hasattr(os, "memfd_create"):  # Linux
            load = spec.loader.exec_module
            spec.loader.exec_module = lambda module: self._load(load, module)
        return spec

    def _load(self, load, module):
        sys.stderr.flush()
        stderr = os.dup(2)
        with open(os.memfd_create("stderr"), "w+b") as log:
            os.dup2(log.fileno(), 2)
            try:
                load(module)
            finally:
                os.dup2(stderr, 2)
                os.close(stderr)
                log.seek(0)
                with contextlib.suppress(OSError):
                    os.write(2, b"".join(line for line in log if not self.NOISE.match(line)))


@contextlib.contextmanager
def quiet_tensorflow() -> typing.Iterator[None]:
    """Within it the first import of TensorFlow says nothing but what is wrong."""
    finder = _QuietTensorFlow()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        if finder in sys.meta_path:
            sys.meta_path.remove(finder)
