"""Writing files of which nobody ever sees a half, CSV, and why something could not be written."""

from __future__ import annotations

import contextlib
import csv
import fcntl
import io
import os
import socket
import tempfile
import time
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


@contextlib.contextmanager
def lock(directory: Path, purpose: str) -> typing.Iterator[None]:
    """Within it no other process has this lock on `directory`; InputError, naming who has it, if one has."""
    with open(Path(directory) / ".lock", "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            raise InputError(f"{directory}: in use by {file.read().strip() or 'another process'}; wait, or end it") from None
        file.truncate(0)
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        print(f"polarmask {purpose}, pid {os.getpid()} on {socket.gethostname()}, since {since}", file=file, flush=True)
        yield


@contextlib.contextmanager
def readable_by_tensorflow(path: str | os.PathLike) -> typing.Iterator[str]:
    """The path of a checkpoint, or one that leads to the same files by a link: TensorFlow takes what it reads for a pattern."""
    path = os.path.abspath(path)
    if not any(character in path for character in "[]*?\\"):
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        os.symlink(os.path.dirname(path), os.path.join(folder, "link"))
        yield os.path.join(folder, "link", os.path.basename(path))


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
