"""What an interrupted `polarmask predict` had finished: a line of JSON a picture, from which the same command goes on."""

import contextlib
import functools
import hashlib
import json
import os
from pathlib import Path

from polarmask_tf import files, lite
from polarmask_tf.errors import InputError
from polarmask_tf.weights import shipped

NAME = "unfinished.jsonl"
FORMAT = "polarmask predict 1"
MAX_LINE = 2**28  # bytes; a picture of 10,000 objects takes some 10 MB


class Journal:
    """OUT/unfinished.jsonl. Its first line are the settings; the others are what `append` was given.

    With `resume` it goes on behind the `count_before` entries of a file that is there: InputError if that is of other settings,
    or damaged; half a line at its end, of a killed process, is cut off. Without, it starts anew.
    """

    def __init__(self, out: Path, settings: dict, *, resume: bool = False):
        self.path, self.count_before = out / NAME, 0
        settings = json.loads(json.dumps(settings))  # as they will be read
        ends = [end for end, _ in self._lines(whole=False)] if resume and self.path.exists() else []
        if ends:
            self._check(settings)
            self.count_before = len(ends) - 1  # without the settings
            self._try(os.truncate, self.path, ends[-1])
            self._file = self._try(open, self.path, "ab")
        else:
            self._try(functools.partial(self.path.unlink, missing_ok=True))  # it may be a link, or a pipe
            self._file = self._try(open, self.path, "xb")
            self.append({"format": FORMAT, "settings": settings})

    def _try(self, function, *args):
        try:
            return function(*args)
        except OSError as error:
            raise InputError(f"{self.path}: cannot be written: {files.io_error_text(error)}") from None

    def _check(self, settings):
        _, head = next(self._lines())
        before = head.get("settings")
        if head.get("format") != FORMAT or not isinstance(before, dict):
            raise InputError(f"{self.path}: damaged, or of another version; leave --resume out to start over")
        differ = [name for name in settings if before.get(name) != settings[name]]
        if differ:
            told = [name + _then_and_now(before.get(name), settings[name]) for name in differ]
            what = f"the interrupted run had other settings: {'; '.join(told[:4])}"
            raise InputError(f"{self.path.parent}: {what}; give the same command, or leave --resume out to start over")

    def _lines(self, whole=True):
        """(where it ends, its content) of each line, the settings first; without `whole` up to the first half line."""
        try:
            lite.check_file(self.path, 2**50)
            with open(self.path, "rb") as file:
                while line := file.readline(MAX_LINE):
                    if not line.endswith(b"\n") and not whole and len(line) < MAX_LINE:
                        return
                    entry = json.loads(line)
                    if not isinstance(entry, dict):
                        raise ValueError("not an object")
                    yield file.tell(), entry
        except (OSError, ValueError, RecursionError) as error:
            why = lite.one_line(error)
            raise InputError(f"{self.path}: cannot be read: {why}; leave --resume out to start over") from None

    def append(self, entry: dict) -> None:
        """What is appended is safe from whatever ends this process."""
        self._try(self._file.write, (json.dumps(entry) + "\n").encode())
        self._try(self._file.flush)

    def entries(self):
        """All that was appended, also before an interruption, in that order."""
        lines = self._lines()
        next(lines)
        return (entry for _, entry in lines)

    def close(self) -> None:
        with contextlib.suppress(OSError):  # of a full disk
            self._file.close()

    def remove(self) -> None:
        self.close()
        self._try(self.path.unlink)


def _then_and_now(*values):
    if any(isinstance(value, str) and len(value) == 64 for value in values):  # a digest, which says nothing
        return ""
    then, now = (lite.one_line("all" if value is None else value, 60) for value in values)
    return f" ({then} then, {now} now)"


def digest_of_model(source) -> str:
    """What tells one trained model from another: its address if it is served, else a SHA-256 of its weights and settings."""
    path = Path(source) if os.path.exists(source) else shipped.resolve(source)
    if str(source).startswith(("http://", "https://", "grpc://")):
        return str(source)
    if path.is_dir():
        # The indices of checkpoints and variables hold a checksum of every tensor.
        names = ("config.yaml", "calibration.json", shipped.WEIGHTS)
        names += ("saved_model.pb", "variables/variables.index", "assets.extra/metadata.json")
        newest = sorted(path.glob("checkpoints/step-*.index"), key=lambda file: (len(file.name), file.name))[-1:]
        parts = [file for file in (*(path / name for name in names), *newest) if file.is_file()]
    else:
        parts = [path]
    return digest(*(digest_of_file(part) for part in parts))


def digest_of_file(path) -> str:
    whole = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            for block in iter(lambda: file.read(2**20), b""):
                whole.update(block)
    except OSError as error:
        raise InputError(f"{path}: cannot read it: {files.io_error_text(error)}") from None
    return whole.hexdigest()


def digest(*texts) -> str:
    """Of texts, in their order."""
    whole = hashlib.sha256()
    for text in texts:
        whole.update(str(text).encode(errors="surrogatepass") + b"\n")
    return whole.hexdigest()
