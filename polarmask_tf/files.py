"""Writing files of which nobody ever sees a half, tables, and why something could not be written."""

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
    path = Path(path)
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
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


def format_table(rows: typing.Sequence[dict], columns: dict[str, str]) -> str:
    """Rows as text under their keys; `columns` are {key: format}, the first one to the left."""
    cells = [[*columns], *([x if isinstance(x := row[k], str) else format(x, f) for k, f in columns.items()] for row in rows)]
    first, *others = (max(map(len, column)) for column in zip(*cells, strict=True))
    lines = ([line[0].ljust(first), *map(str.rjust, line[1:], others)] for line in cells)
    return "\n".join("  ".join(line) for line in lines)


def io_error_text(error: Exception) -> str:
    """Why something could not be read or written, like "No space left on device", of an OSError or a TensorFlow error."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    message = getattr(error, "message", str(error))
    return message.splitlines()[0].split(" [Op:")[0].split("; ")[-1]  # "{{node ...}} PATH; WHY [Op:...]" and more lines
