"""The run directory of a training: whether it may be this one's, and what --restart keeps of the one before."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
from pathlib import Path

import tensorflow as tf
import yaml

from polarmask_tf import config as configs
from polarmask_tf.config import Config
from polarmask_tf.data import dataset
from polarmask_tf.errors import InputError
from polarmask_tf.files import atomic_write, check_writable, io_error_text, make_directory, readable_by_tensorflow
from polarmask_tf.weights import runs

# What may differ when a training goes on: how long it lasts, what is watched, how the same numbers are computed.
MAY_CHANGE = (
    "train.steps",
    "train.checkpoint_every",
    "train.evaluate_every",
    "train.patience",
    "train.jit_compile",
    "data.damaged",
)


def check(config: Config, info, run: Path, restart: bool) -> None:
    """InputError if `run` is no place for this training, or holds another one. Lengthening a training is allowed."""
    file = missing = run.absolute() / "config.yaml"
    while not missing.parent.exists():
        missing = missing.parent
    if not missing.parent.is_dir():
        raise InputError(f"{run}: {missing.parent} is a file; choose another --out")
    check_writable(missing)
    if not file.exists():
        if run.is_dir() and any(not path.name.startswith(".") for path in run.iterdir()):
            raise InputError(f"{run}: exists and is not a run directory; choose another --out")
        return
    # A run that ended before its first checkpoint, of missing weights for example, holds nothing to protect.
    if restart or not runs.checkpoints(run):
        if not _is_dumped(file):
            raise InputError(f"{file}: would be overwritten; move it out of {run} and give it by --config")
        return
    before, classes = runs.read_run(run)
    if classes != info.classes:
        raise InputError(
            f"{run}: was trained on {len(classes)} classes, and {config.data.train} has {len(info.classes)}, or others; "
            "choose another --out, or --restart"
        )
    old, new = (_flatten(configs.to_dict(c)) for c in (before, config))
    is_moved = info.id and info.id == json.loads((run / "dataset.json").read_bytes()).get("id")
    for key in ("data.train", "data.val"):
        if _may_be_moved(key, old[key], new[key]) or (key == "data.train" and is_moved):
            old[key] = new[key]
    changed = [key for key in new if old[key] != new[key] and key not in MAY_CHANGE]
    if changed:
        key = changed[0]
        more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
        raise InputError(
            f"{run}: holds a training with {key}={old[key]}, now {new[key]}{more}; choose another --out, or --restart"
        )
    with contextlib.suppress(*runs.UNREADABLE), readable_by_tensorflow(runs.checkpoints(run)[0]) as path:
        runs.check_resumable(run, tf.train.load_checkpoint(path).get_variable_to_shape_map())


def _may_be_moved(key: str, old: str, new: str) -> bool:
    """Whether two paths are one folder; or of validation data, from which nothing is learned, the old one is of nothing."""
    is_one = bool(old and new) and os.path.realpath(old) == os.path.realpath(new)
    return is_one or (key == "data.val" and not (old and os.path.exists(old)))


def create_or_check(config: Config, info, run: Path, restart: bool) -> None:
    """Makes the run directory, or refuses one that belongs to something else, see `check`; the caller has its lock.

    With `restart`, what an earlier training made moves to run/before-restart, where it is a run directory.
    """
    check(config, info, run, restart)
    if runs.checkpoints(run):
        remove_set_aside(run)  # a checkpoint of the training that was started over stands
    if restart and (run / "config.yaml").is_file():
        try:
            _set_aside(run)
        except OSError as e:
            raise InputError(f"{run}: cannot be set aside for --restart: {io_error_text(e)}") from None
    val = dataset.load(config.data.val).id if config.data.val else ""
    if not restart and runs.checkpoints(run):
        _tell_of_other_conversions(config, info.id, val, run)
    for each in (run, run / "best"):  # of what a kill left
        runs.tidy(each / "checkpoints", runs.checkpoints(each))
    about = {"classes": info.classes, "name": info.name, "num_images": info.num_images, "id": info.id, "val_id": val}
    about["bit_depth"] = info.bit_depth
    runs.write_run(run, config, about)


def _tell_of_other_conversions(config: Config, train_id: str, val_id: str, run: Path) -> None:
    """A line on stderr for each data set that is not of the id that the run was trained with; "" is of no known one."""
    before = json.loads((run / "dataset.json").read_bytes())
    what = "batches are other ones than those of a training without interruption"
    best = "AP is of other pictures than before, and best/ is chosen by both"
    for path, now, key, follows in ((config.data.train, train_id, "id", what), (config.data.val, val_id, "val_id", best)):
        if now and before.get(key, "") not in ("", now):
            print(f"warning: {run}: {path} was converted again since: {follows}", file=sys.stderr)


def _set_aside(run: Path) -> None:
    """Moves what a training made to run/before-restart; of one that came to no checkpoint, deletes it."""
    aside = run / runs.SET_ASIDE
    if runs.checkpoints(run) or runs.checkpoints(run / "best"):
        make_directory(aside)
        for name in ("config.yaml", "dataset.json"):
            if not (aside / name).exists():  # copied: whenever a kill comes, checkpoints are in a run directory
                atomic_write(aside / name, (run / name).read_bytes())
    names = ("checkpoints", "best", "metrics.csv", "plugins", "events.out.tfevents.*", "not_finite_step_*.npz")
    for path in [path for name in names for path in run.glob(name)]:
        if aside.is_dir() and not (aside / path.name).exists():
            os.replace(path, aside / path.name)
        else:
            runs.remove([path])


def remove_set_aside(run: Path) -> None:
    """Deletes what --restart has kept."""
    runs.remove([run / runs.SET_ASIDE])


def where_it_is(path: Path, run: Path) -> Path:
    """`path`, or where a restart of `run` that came to no checkpoint has put it."""
    try:
        aside = run / runs.SET_ASIDE / Path(path).resolve().relative_to(run.resolve())
    except ValueError:
        return path
    return aside if runs.checkpoints(aside) and not runs.checkpoints(path) else path


def _is_dumped(file: Path) -> bool:
    """Whether it is a config.yaml as write_run writes it, now or in an earlier version, and not one that a person wrote."""
    try:
        text = file.read_text(encoding="utf-8")
        values = yaml.safe_load(text)
        sections = {field.name for field in dataclasses.fields(Config)}
        return sections <= set(values) and yaml.safe_dump(values, sort_keys=False) == text
    except (OSError, ValueError, TypeError, RecursionError, yaml.YAMLError):
        return False


def _flatten(values: dict, prefix: str = "") -> dict:
    flat = {}
    for key, value in values.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
