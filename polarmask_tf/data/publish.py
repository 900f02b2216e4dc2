"""The files of a converted set while it is written, and the moment in which it takes the place of the one before.

Shards are written beside their final names and renamed when all are complete, `dataset.json` last, which names them. A set
that is converted again gets shards of other names, and the old ones go at the very end: whatever happens in between, no file
under a final name is half, and the directory is the old data set or the new one.
"""

import contextlib
import errno
import os
import re
import shutil

from polarmask_tf.data import dataset
from polarmask_tf.data.sources.folder import is_picture
from polarmask_tf.errors import InputError
from polarmask_tf.files import atomic_write


def _ours(out, suffix=""):
    """Shards in the directory, of this or of earlier conversions into it."""
    name = re.compile(re.escape(out.name) + r"(-[0-9a-f]{8})?-\d{5,}-of-\d{5,}\.tfrecord" + re.escape(suffix))
    return [path for path in out.iterdir() if name.fullmatch(path.name)]


@contextlib.contextmanager
def removing_partial(out):
    """No temporary file is left in the directory, also none of a run that was killed; errors of writing are InputErrors."""
    try:
        remove_partial(out)
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        advice = "free some space and run again" if full else "choose another --out"
        raise InputError(f"{out}: cannot be written: {error.strerror or error}; {advice}") from error
    finally:
        with contextlib.suppress(OSError):
            remove_partial(out)


def remove_partial(out):
    for partial in (*_ours(out, ".tmp"), *out.glob(".dataset.json.*.tmp"), *out.glob(".report.json.*.tmp")):
        partial.unlink(missing_ok=True)


def check_room(out, entries, decoded):
    """InputError where the pixels of all images do not fit onto the disk."""
    need, free = 3 * sum(entry["height"] * entry["width"] for entry in entries), shutil.disk_usage(out).free
    if decoded and need > free:
        sizes = f"the decoded images take {need / 1e9:.3g} GB, {free / 1e9:.3g} GB are free"
        raise InputError(f"{out}: {sizes}; make room, or go without --decoded")


def check_target(out, names, sources):
    """InputError where `out` lies in a source, or the sets `names` ("": in `out` itself) would lie beside those of before."""
    for source in sources:
        folder = os.path.realpath(source) if os.path.isdir(source) else None
        if folder and (str(out) == folder or str(out).startswith(os.path.join(folder, ""))):
            raise InputError(f"{out}: lies in {source}, and nothing is written into a source; choose a directory elsewhere")
    if os.path.isdir(out) and any(is_picture(name) for name in os.listdir(out)):
        raise InputError(f"{out}: holds pictures, not a data set: was OUT forgotten? Name a directory of its own for it, last")
    if names is None:
        return
    there = {name for name in ("", "train", "val", "test") if os.path.isfile(out / name / "dataset.json")}
    if stale := sorted(there - set(names)):
        what = " and ".join(str(out / name) for name in stale)
        new = " and ".join(name or "one set without splits" for name in names)
        raise InputError(f"{out}: {what} from an earlier conversion would stay beside {new}: remove it, or write elsewhere")


def free_names(out, count, id):
    """Names of shards that no shard of the data set in the directory has."""
    there = {path.name for path in _ours(out)}
    for name in (out.name, f"{out.name}-{id[:8]}"):
        names = [f"{name}-{i:05d}-of-{count:05d}.tfrecord" for i in range(count)]
        if there.isdisjoint(names):
            break
    return names


def publish(info):
    for path in info.shard_paths:
        os.replace(path.with_name(f"{path.name}.tmp"), path)
    try:
        atomic_write(info.directory / "dataset.json", dataset.dump(info))
    except InputError:  # the old one stands
        for path in info.shard_paths:
            path.unlink()
        raise
    for stale in {*_ours(info.directory)} - {*info.shard_paths}:
        stale.unlink()
