"""Writing: files of which nobody ever sees a half, directories that one process writes at a time, tables, and why it failed."""

from __future__ import annotations

import contextlib
import errno
import glob
import io
import json
import os
import stat
import sys
import time
import typing
from pathlib import Path

from polarmask_tf.errors import InputError, one_line

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"  # in a directory that is being written; a directory that holds nothing else counts as empty
_WRITTEN_WITHIN = 1.0  # seconds, the holder's name after it took the lock
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)


@contextlib.contextmanager
def replacing(path: Path) -> typing.Iterator[Path]:
    """A path beside `path` to write to, renamed to it at the end unless an error came between; InputError if that fails.

    A link stays one: the file that it leads to is replaced. What is no file, like /dev/stdout, is refused.
    """
    path = _file(path)
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


def write_new(path: Path, content: str) -> None:
    """Writes a file that was not there; InputError if there is one, by whose hand and however late, or if it cannot."""
    path = Path(path)
    try:
        file = path.open("x", encoding="utf-8")  # not a link to a temporary file, which not every file system can make
    except FileExistsError:
        raise InputError(f"{path}: exists; remove it, or choose another --out") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {io_error_text(error)}") from None
    try:
        with file:
            file.write(content)
    except BaseException as error:
        with contextlib.suppress(OSError):
            path.unlink()
        if isinstance(error, OSError):
            raise InputError(f"{path}: cannot be written: {io_error_text(error)}") from None
        raise


def check_writable(path: Path, inputs: typing.Iterable = (), begins: bytes = b"") -> None:
    """InputError unless a file can be written at `path`: to be said before the work whose outcome it will hold.

    Neither is a file of the work's `inputs` (paths, or None) replaced, or one in them, unless it begins as what was written
    there before.
    """
    for each in filter(None, inputs):
        base, real = os.path.realpath(each), os.path.realpath(path)
        if os.path.isfile(real) and (real == base or real.startswith(os.path.join(base, ""))) and not _begins(real, begins):
            raise InputError(f"{path}: is a file of {each}, which would be replaced; name another one")
    part = _beside(_file(path))
    try:
        part.touch()
        part.unlink()
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {io_error_text(error)}") from None


def _begins(path, start):
    try:
        with open(path, "rb") as file:
            return bool(start) and file.read(len(start)) == start
    except OSError:
        return False


def _file(path):
    """Where what is written to `path` goes."""
    real = Path(os.path.realpath(path))
    if os.path.isdir(real):
        raise InputError(f"{path}: is a directory; name a file in it")
    if os.path.exists(real) and not os.path.isfile(real):
        raise InputError(f"{path}: is a device or a pipe; name a file")
    return real


def _beside(path: Path) -> Path:
    """A name that nobody else takes, in the directory of `path`."""
    path = Path(path)
    return path.with_name(f".{path.name}.{os.urandom(6).hex()}.tmp")


@contextlib.contextmanager
def readable_by_tensorflow(path: str | os.PathLike) -> typing.Iterator[str]:
    """The path of a checkpoint, or one that leads to the same files by a link: TensorFlow takes what it reads for a pattern.

    InputError if a file of it is a pipe or a device, at which TensorFlow would wait for ever.
    """
    path = os.path.abspath(path)
    check_regular(Path(os.path.dirname(path)).glob(glob.escape(os.path.basename(path)) + "*"))
    if is_text(path) and not any(character in path for character in "[]*?\\"):
        yield path
        return
    import tempfile  # this and others below where they are needed: they are half the time of `polarmask --help`

    with tempfile.TemporaryDirectory() as folder:
        os.symlink(os.path.dirname(path), os.path.join(folder, "link"))
        yield os.path.join(folder, "link", os.path.basename(path))


def is_text(path: str | os.PathLike) -> bool:
    """Whether a path is UTF-8, and not of bytes in another encoding: TensorFlow takes no other."""
    try:
        return str(path).encode() is not None
    except UnicodeEncodeError:
        return False


def check_text(path: str | os.PathLike) -> None:
    """InputError unless it `is_text`."""
    if not is_text(path):
        raise InputError(f"{path}: no name in UTF-8, of which TensorFlow reads and writes files; rename it")


def check_regular(paths: typing.Iterable[Path]) -> None:
    """InputError if one of the paths is a pipe or a device; directories, and what is not there, pass."""
    for path in paths:
        if os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path)):
            raise InputError(f"{path}: not a regular file, but a pipe or a device")


def make_directory(path: Path) -> None:
    """Makes a directory and those above it; InputError if it cannot."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path}: cannot be made: {io_error_text(error)}") from None


@contextlib.contextmanager
def lock(directory: Path, purpose: str) -> typing.Iterator[None]:
    """Keeps other processes out of an output directory, which is made if need be; they are told `purpose`, like "train".

    The lock is the kernel's, on the file LOCK in the directory: whatever ends this process releases it, and a file that a
    killed process left behind locks nothing. It is promised on local file systems, and between machines on NFS, Lustre and
    the like where these have locks (NFS: lockd or version 4; Lustre: mounted with `flock`; with `localflock` processes of
    one machine only). Where there are none at all a line on stderr says so, and the work goes on.

    Raises InputError that names the holder (command, process, machine, since when) if there is one, or if the directory
    cannot be written; and at the end if it is another directory than at the beginning, of which nothing is touched. Else the
    file is removed, and so is the directory if it was made here and is empty.
    """
    directory = Path(directory)
    made = not directory.exists()
    file = _locked_file(directory, purpose)
    ours = os.stat(directory)
    try:
        yield
        if not _is(directory, ours):
            what = "was moved or removed while it was written, and what was written may lie in two places"
            raise InputError(f"{directory}: {what}")
    finally:
        try:
            with contextlib.suppress(OSError):
                if _is(directory / LOCK, os.fstat(file)):
                    (directory / LOCK).unlink()  # while it is locked: nobody else's
        finally:  # of a Ctrl-C just now
            os.close(file)
        if made and _is(directory, ours):
            with contextlib.suppress(OSError):
                directory.rmdir()


def _is(path, status):
    """Whether a path leads to what has this os.stat."""
    with contextlib.suppress(OSError):
        return os.path.samestat(os.stat(path), status)
    return False


def _locked_file(directory, purpose):
    """An open file that holds the lock."""
    path = directory / LOCK
    while True:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            file = _opened_lock(path)
        except OSError as error:
            raise InputError(f"{directory}: cannot be written: {io_error_text(error)}; choose another --out") from None
        try:
            _take(file, directory)
            # Between opening and locking, the holder before may have removed the file: then it locks nothing.
            if _is(path, os.fstat(file)):
                import datetime
                import socket

                since = datetime.datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
                holder = {"purpose": purpose, "pid": os.getpid(), "host": socket.gethostname(), "since": since}
                content = json.dumps(holder).encode()
                with contextlib.suppress(OSError):  # of a full disk: it is locked all the same
                    os.pwrite(file, content, 0)  # over what a killed one left, so that it is never empty for long
                    os.truncate(file, len(content))
                return file
        except BaseException as error:
            os.close(file)
            if isinstance(error, OSError):
                raise InputError(f"{path}: cannot be written: {io_error_text(error)}; choose another --out") from None
            raise
        os.close(file)


def _opened_lock(path):
    flags = os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        return os.open(path, flags | os.O_RDWR, 0o666)
    except PermissionError:  # another user's: it can be locked, or its holder be named, all the same
        if not os.access(path.parent, os.W_OK):
            raise
        return os.open(path, flags & ~os.O_CREAT)


def _take(file, directory):
    try:
        if fcntl is None:
            raise OSError(errno.ENOSYS, "no locks on this system")
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(f"{directory}: in use by {_holder(file)}; wait for its end, or choose another --out") from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        print(
            f"warning: {directory}: no locks on this file system ({io_error_text(error)}): nothing keeps another process "
            "from writing there at the same time",
            file=sys.stderr,
        )


def _holder(file):
    end = time.monotonic() + _WRITTEN_WITHIN
    while True:
        try:
            found = json.loads(os.pread(file, 4096, 0))
            return one_line("polarmask {purpose} (process {pid} on {host}, since {since})".format(**found), 200)
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
            if time.monotonic() > end:
                return "another process"
            time.sleep(0.01)


def read_file(path: Path, at_most: int) -> bytes:
    """The bytes of a regular file; OSError for a larger one, and for a pipe or device, which might never end."""
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        if status.st_size > at_most:
            raise OSError(errno.EFBIG, f"larger than {at_most:,} bytes", str(path))
        return file.read(status.st_size)  # not to its end: some files of the system have none


def format_csv(rows: typing.Sequence[dict], columns: typing.Sequence[str] | None = None, digits: int = 4) -> str:
    """Rows as CSV with a header; numbers with `digits` behind the point. `columns`: default, those of the first row."""
    import csv

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
