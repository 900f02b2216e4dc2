"""Training shards with their images decoded (data.cache): to read pixels costs less than to decode JPEG in every epoch."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import errno
import hashlib
import itertools
import json
import os
import random
import shutil
import struct
import sys
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import tensorflow as tf
from google.protobuf.message import DecodeError
from tqdm import tqdm

from polarmask_tf.data import records
from polarmask_tf.errors import InputError

_FORMAT = 1  # of what is written here
_ABANDONED = 600  # seconds without a write after which a temporary file is taken for a killed process's


def cached(info: records.DatasetInfo, directory, *, damaged: str = "fail", progress: bool = True) -> records.DatasetInfo:
    """The same data set in a directory inside `directory`, each image as an uncompressed BMP of its decoded pixels.

    It is made once, shard by shard: a call goes on where an earlier one stopped, and processes may work on it at the same
    time, also on a shared file system. The inner directory's name hangs on what it was made from (names, sizes and times
    of change of the shards), so a source that was converted again gets a new one. The old one is named, not removed.

    Args:
      damaged: "skip" leaves out the rest of a damaged shard, with a line on stderr; see DataConfig.
      progress: bar on stderr.

    Raises InputError if there is not enough room, `directory` cannot be written, a shard is damaged ("fail"), or an image
    cannot be decoded.
    """
    out = Path(directory).resolve() / f"{info.directory.name}-{_fingerprint(info, damaged)}"
    try:
        if not (out / "dataset.json").is_file():
            out.mkdir(parents=True, exist_ok=True)
            _tell_of_older(info, out)
            _build(info, out, damaged, progress)
            made = dataclasses.replace(info, directory=out, shard_paths=[out / path.name for path in info.shard_paths])
            with _beside(out / "dataset.json") as file:
                file.write(records.dump_dataset_info(made).encode())
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        advice = f"{_gigabytes(_room(_missing(info, out)))} more are needed" if full else "choose another data.cache"
        raise InputError(f"data.cache: {error.filename or out}: {error.strerror or error}; {advice}") from None
    found = records.load_dataset_info(out)
    if damaged == "skip" and (lost := info.num_images - sum(map(records.count_records, found.shard_paths))):
        print(f"warning: {out}: without {lost} images, in damaged shards of {info.directory}", file=sys.stderr)
    return found


def _fingerprint(info, damaged):
    try:
        shards = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in info.shard_paths]
    except OSError as error:
        raise InputError(f"{error.filename}: cannot be read ({error.strerror}); {records.MEND}") from None
    text = json.dumps([_FORMAT, str(info.directory), shards, info.num_images, info.classes, damaged])
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _tell_of_older(info, out):
    with _beside(out / "source.txt") as file:
        file.write(f"{info.directory}\n".encode())
    for source in out.parent.glob("*/source.txt"):
        if source.parent != out and source.read_text().strip() == str(info.directory):
            print(f"{source.parent}: made from another state of {info.directory}; delete it if nothing uses it",
                  file=sys.stderr)


def _build(info, out, damaged, progress):
    for file in out.glob("*.tmp"):
        with contextlib.suppress(FileNotFoundError):  # another process may be just now at its end
            if time.time() - file.stat().st_mtime > _ABANDONED:
                file.unlink()
    missing = _missing(info, out)
    need, free = _room(missing), shutil.disk_usage(out).free
    if need > free:
        raise InputError(
            f"data.cache: {out}: the decoded images take {_gigabytes(need)}, {_gigabytes(free)} are free; "
            "make room, choose another directory, or train without"
        )
    # Processes that work at the same time take the shards in different orders, and so mostly different shards.
    random.Random().shuffle(missing)
    counts = {path: records.count_records(path) for path in info.shard_paths}
    todo = sum(counts[path] for path in missing)
    with (
        tqdm(total=info.num_images, initial=info.num_images - todo, desc="decode", unit="img", disable=not progress) as bar,
        ThreadPoolExecutor(os.cpu_count()) as pool,
    ):
        for path in missing:
            if (out / path.name).exists():
                bar.update(counts[path])
                continue
            with _beside(out / path.name) as file:
                for data in _decoded(path, pool, damaged):
                    records.write_record(file, data)
                    bar.update()


def _missing(info, out):
    return [path for path in info.shard_paths if not (out / path.name).exists()]


@contextlib.contextmanager
def _beside(path):
    """A file for writing that gets its name when it is complete; processes that write the same one do not meet."""
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(partial, "wb") as file:
            yield file
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _decoded(path, pool, damaged):
    """Yields the records of a shard with their images decoded, in order."""
    waiting = collections.deque()
    try:
        for data in records.read_shard(path):
            waiting.append(pool.submit(_decode, data, path))
            if len(waiting) > 2 * (os.cpu_count() or 1):
                yield waiting.popleft().result()
    except records.DamagedShard as error:
        if damaged == "fail":
            raise InputError(f"{error}; {records.MEND}") from None
        tqdm.write(f"warning: {error}; its rest is left out (data.damaged: skip)", file=sys.stderr)
    for result in waiting:
        yield result.result()


def _decode(data: bytes, path) -> bytes:
    """The record `data` with its image as BMP."""
    try:
        example = tf.train.Example.FromString(data)
        features = example.features.feature
        image = tf.io.decode_image(features["image/encoded"].bytes_list.value[0], channels=3, expand_animations=False)
    except (DecodeError, IndexError):
        raise InputError(f"{path}: holds a record that `polarmask convert` did not write; convert again") from None
    except tf.errors.InvalidArgumentError:
        number, name = (b"".join(features[f"image/{key}"].bytes_list.value).decode() for key in ("source_id", "filename"))
        raise InputError(
            f"{path}: image {number} ({name}) cannot be decoded; run `polarmask convert --verify` again, which leaves it out"
        ) from None
    features["image/encoded"].bytes_list.value[0] = bmp(image.numpy())
    features["image/format"].bytes_list.value[:] = [b"bmp"]
    return example.SerializeToString(deterministic=True)


def bmp(image: np.ndarray) -> bytes:
    """An uncompressed BMP file of uint8 RGB [h, w, 3]: rows from the top, blue first, padded to four bytes."""
    height, width, _ = image.shape
    rows = np.zeros((height, _row_bytes(width)), np.uint8)
    rows[:, : 3 * width] = image[..., ::-1].reshape(height, -1)
    header = struct.pack("<2sIIIIiiHHIIiiII", b"BM", 54 + rows.size, 0, 54, 40, width, -height, 1, 24, 0, rows.size, 0, 0, 0, 0)
    return header + rows.tobytes()


def _row_bytes(width):
    return -(-3 * width // 4) * 4


def _room(paths) -> int:
    """Bytes that the decoded shards will take, judged by the first few records of each."""
    total = 0
    for path in paths:
        sizes = []
        with contextlib.suppress(records.DamagedShard, DecodeError):  # told when it is written
            for data in itertools.islice(records.read_shard(path), 8):
                features = tf.train.Example.FromString(data).features.feature
                height, width = (sum(features[f"image/{side}"].int64_list.value) for side in ("height", "width"))
                encoded = sum(map(len, features["image/encoded"].bytes_list.value))
                sizes.append(len(data) - encoded + height * _row_bytes(width) + 80)  # 80: headers
        total += records.count_records(path) * sum(sizes) // max(len(sizes), 1)
    return total


def _gigabytes(size) -> str:
    return f"{size / 1e9:.3g} GB"
