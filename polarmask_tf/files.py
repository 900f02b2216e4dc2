"""Writing files of which nobody ever sees a half, CSV, and why something could not be written."""

from __future__ import annotations

import contextlib
import csv
import io
import os
import typing
import uuid
from pathlib import Path

from polarmask_tf.errors import InputError


@contextlib.contextmanager
def replacing(path: Path) -> typing.Iterator[Path]:
    """A path beside `path` to write to, renamed to it at the end unless an error came between; InputError if that fails."""
    part = _beside(path)
    try:
        yield part
        os.replace(part, path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {io_error_text(error)}") from None
    finally:
        with contextlib.suppress(OSError):  # it is gone if all went well
            part.unlink()


def atomic_write(path: Path, content: str | bytes) -> None:
    """Writes a file that is either the old or the new one; InputError if it cannot."""
    with replacing(path) as part:
        part.write_bytes(content.encode() if isinstance(content, str) else content)


def check_writable(path: Path) -> None:
    """InputError unless a file can be written at `path`: to be said before the work whose outcome it will hold."""
    part = _beside(path)
    try:
        part.touch()
        part.unlink()
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {io_error_text(error)}") from None
    if os.path.isdir(path):
        raise InputError(f"{path}: is a directory; name a file in it")


def _beside(path: Path) -> Path:
    """A name that nobody else takes, in the directory of `path`."""
    path = Path(path)
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")


def make_directory(path: Path) -> None:
    """Makes a directory and those above it; InputError if it cannot."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path}: cannot be made: {io_error_text(error)}") from None


def format_csv(rows: typing.Sequence[dict], columns: typing.Sequence[str] | None = None, digits: int = 4) -> str:
    """Rows as CSV with a header; numbers with `digits` behind the point. `columns`: default, those of the first row."""
    with io.StringIO(newline="") as text:
        writer = csv.DictWriter(text, columns or list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: round(v, digits) if isinstance(v, float) else v for key, v in row.items()} for row in rows)
        return text.getvalue()


def io_error_text(error: Exception) -> str:
    """Why something could not be read or written, like "No space left on device", of an OSError or a TensorFlow error."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    message = getattr(error, "message", str(error))
    return message.splitlines()[0].split(" [Op:")[0].split("; ")[-1]  # "{{node ...}} PATH; WHY [Op:...]" and more lines
