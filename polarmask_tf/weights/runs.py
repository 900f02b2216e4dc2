"""The run directory: config.yaml, dataset.json and checkpoints/, written so that a kill at any moment leaves a usable one."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

import tensorflow as tf
import tf_keras
import yaml

from polarmask_tf import config as configs
from polarmask_tf.config import Config
from polarmask_tf.errors import InputError
from polarmask_tf.files import atomic_write, io_error_text, make_directory
from polarmask_tf.modeling.polarmask import PolarMask

# What may differ when a training goes on: how long it lasts, what is watched, how the same numbers are computed.
MAY_CHANGE = (
    "train.steps",
    "train.checkpoint_every",
    "train.evaluate_every",
    "train.patience",
    "train.jit_compile",
    "data.damaged",
)
UNFINISHED = "unfinished"  # where in checkpoints/ the next one is written


def load_run(run: str | os.PathLike, **overrides) -> PolarMask:
    """The trained model of a run directory, at its newest checkpoint that can be read.

    With train.ema its weights are the running averages. `overrides` replace values of config.postprocess, like
    score_threshold=0.3. Raises InputError if `run` is not a run directory or holds no checkpoint.
    """
    run = Path(run)
    config, classes = read_run(run)
    config = dataclasses.replace(config, postprocess=dataclasses.replace(config.postprocess, **overrides))
    configs.check(config.postprocess, "postprocess.")
    model = PolarMask(config, classes)
    if not restore(model, run):
        raise InputError(f"{run}: no checkpoint yet; train it first (polarmask train --out {run})")
    return model


def load_model(path: str | os.PathLike, **overrides) -> PolarMask:
    """The model of a run directory, see load_run, or of a .keras file that model.save wrote.

    Raises InputError for anything else at `path`.
    """
    path = Path(path)
    if path.suffix != ".keras":
        return load_run(path, **overrides)
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        model = tf_keras.models.load_model(path)
    except Exception as error:  # zip, HDF5, JSON and Keras errors are of a dozen classes
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{path}: damaged, or not a .keras file that PolarMask.save wrote ({reason})") from None
    if not isinstance(model, PolarMask):
        raise InputError(f"{path}: holds a {type(model).__name__}, not a PolarMask")
    if overrides:
        model.config = dataclasses.replace(model.config, postprocess=dataclasses.replace(model.config.postprocess, **overrides))
    return model


def read_run(run: Path) -> tuple[Config, list]:
    """Config and classes of a run directory, without loading weights."""
    if not (run / "config.yaml").is_file() or not (run / "dataset.json").is_file():
        raise InputError(f"{run}: not a run directory (config.yaml and dataset.json are expected in it)")
    try:
        classes = json.loads((run / "dataset.json").read_text())["classes"]
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{run / 'dataset.json'}: damaged; copy dataset.json from the training data") from None
    return configs.load_saved(run / "config.yaml"), classes


def create_or_check(config: Config, info, run: Path, restart: bool) -> None:
    """Makes the run directory, or refuses one that belongs to something else. Lengthening a training is allowed."""
    # A run that ended before its first checkpoint, of missing weights for example, holds nothing to protect.
    if (run / "config.yaml").is_file() and not restart and checkpoints(run):
        before, classes = read_run(run)
        if classes != info.classes:
            raise InputError(
                f"{run}: was trained on {len(classes)} classes, and {config.data.train} has {len(info.classes)}, or others; "
                "choose another --out, or --restart"
            )
        old, new = (_flatten(yaml.safe_load(configs.dump(c))) for c in (before, config))
        changed = [key for key in new if old[key] != new[key] and key not in MAY_CHANGE]
        if changed:
            key = changed[0]
            more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
            raise InputError(
                f"{run}: holds a training with {key}={old[key]}, now {new[key]}{more}; choose another --out, or --restart"
            )
    elif run.is_dir() and not (run / "config.yaml").is_file() and any(path.suffix != ".tmp" for path in run.iterdir()):
        raise InputError(f"{run}: exists and is not a run directory; choose another --out")
    if restart and (run / "config.yaml").is_file():
        made = ("checkpoints/*", "events.out.tfevents.*", "not_finite_step_*.npz")
        _remove([run / "best", run / "metrics.csv", run / "plugins", *(path for name in made for path in run.glob(name))])
    _tidy(run / "checkpoints", checkpoints(run))
    write_run(run, config, {"classes": info.classes, "name": info.name, "num_images": info.num_images})


def write_run(run: Path, config: Config, dataset: dict) -> None:
    """Makes the run directory and writes config.yaml and dataset.json into it; InputError if it cannot."""
    make_directory(run)
    atomic_write(run / "config.yaml", configs.dump(config))
    atomic_write(run / "dataset.json", json.dumps(dataset, indent=1))


def _flatten(values: dict, prefix: str = "") -> dict:
    flat = {}
    for key, value in values.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def save(
    model: PolarMask,
    run: Path,
    step: int,
    *,
    keep: int = 2,
    chief: bool = True,
    weights_only: bool = False,
    passing: tuple = (),
) -> None:
    """Writes the checkpoint run/checkpoints/step-<step> and deletes all but the newest `keep`; InputError if it cannot.

    It is written beside and moved, the index last: a checkpoint that has an index is whole. Of several workers all must
    call this, since values are gathered from them, but only the chief's files stay. Errors of the classes `passing` are
    passed on as they are.
    """
    folder = run / "checkpoints"
    with contextlib.ExitStack() as stack:
        try:
            beside = folder / UNFINISHED if chief else Path(stack.enter_context(tempfile.TemporaryDirectory()))
            _remove([beside])
            # TensorFlow writes an index in place, and a kill would leave half of it under the checkpoint's own name.
            written = Path(_checkpoint(model, weights_only).save(str(beside / "step")))
            if not chief:
                return
            (folder / f"step-{step}.index").unlink(missing_ok=True)  # of one that could not be read
            for path in sorted(beside.glob(f"{written.name}.*")):  # .data-00000-of-00001, .index
                os.replace(path, folder / f"step-{step}{path.suffix}")
        except passing:
            raise
        except (tf.errors.OpError, OSError) as e:
            _remove([beside])
            raise InputError(f"{folder}: cannot write the checkpoint of step {step}: {io_error_text(e)}") from None
    # A later one is none that this training went on from: it could not be read.
    _tidy(folder, [path for path in checkpoints(run) if step_of(path) <= step][:keep])


def _tidy(folder: Path, keep: list[str]) -> None:
    """Deletes the checkpoints that are not to be kept, and what a kill left of others."""
    kept = {Path(path).name for path in keep}
    ours = [path for path in folder.glob("step-*") if re.fullmatch(r"step-\d+(\.index|\.data-.+|_temp)", path.name)]
    others = sorted((path for path in ours if path.stem not in kept), reverse=True)  # an index before its data
    _remove([folder / UNFINISHED, *others])


def _remove(paths) -> None:
    for path in list(paths):
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def restore(model: PolarMask, run: Path, *, training: bool = False) -> str | None:
    """Gives `model` the newest checkpoint of `run` that can be read and returns its path; None if there is none.

    `training` takes the optimizer's state too, and all or nothing; else the weights alone, which with train.ema are the
    averages. A newer one that is damaged is skipped with a line on stderr. Raises InputError if none is left.
    """
    paths = checkpoints(run)
    for path in paths:
        try:
            names = _check(path, training)
            legacy = any(name.startswith("model/") for name in names)
            if legacy and training:
                raise InputError(f"{run}: was trained by an earlier version, which this one cannot resume: give it to --start")
            averages = {}
            if not training and any(name.startswith("average/") for name in names):
                averages = {"average": [tf.Variable(v) for v in model.trainable_variables]}
            # TensorFlow would tell of every value that is left over, a line each; what matters is asserted.
            status = _checkpoint(model, not training, legacy, **averages).restore(path).expect_partial()
            status.assert_consumed() if training else status.assert_existing_objects_matched()
            for variable, value in zip(model.trainable_variables, averages.get("average", ()), strict=False):
                variable.assign(value)
            return path
        except (tf.errors.OpError, AssertionError, ValueError, IndexError) as e:  # the reader raises all of these
            damage = " ".join(str(e).split())[:200]
            if path == paths[-1]:
                raise InputError(
                    f"{path}: damaged, or of another model, and no older one is left; train again with --restart ({damage})"
                ) from None
            print(f"warning: {path} cannot be read, the checkpoint before it is used ({damage})", file=sys.stderr)
    return None


def _check(path: str, training: bool) -> list[str]:
    """The names in a checkpoint. Raises what TensorFlow does where the values that are needed are not as they were written."""
    reader = tf.train.load_checkpoint(path)
    names = list(reader.get_variable_to_shape_map())
    for name in names:
        if training or not name.startswith("optimizer/"):
            reader.get_tensor(name)  # compares its checksum
    return names


def checkpoints(run: Path) -> list[str]:
    """Paths of the whole checkpoints of a run, the newest first."""
    steps = [path.stem.rpartition("-")[2] for path in (run / "checkpoints").glob("step-*.index")]
    return [str(run / "checkpoints" / f"step-{step}") for step in sorted(map(int, filter(str.isdigit, steps)), reverse=True)]


def step_of(path: str | None) -> int:
    """The number of steps that a checkpoint was trained for."""
    return int(path.rpartition("-")[2]) if path else 0


def ema_weights(model: PolarMask) -> list:
    """The running averages of the trainable variables, in their order; none without train.ema."""
    if not model.config.train.ema:
        return []
    return getattr(model.optimizer, "inner_optimizer", model.optimizer)._model_variables_moving_average


def _checkpoint(model, weights_only, legacy=False, **more):
    # Not the model as a whole: its metrics and its optimizer hang on it too. The names are Model Garden's.
    parts = {"backbone": model.backbone, "decoder": model.decoder, "head": model.head, **more}
    if legacy:
        parts = {"model": _as_before(model), **more}
    if not weights_only:
        parts |= {"optimizer": model.optimizer, "average": ema_weights(model)}
    return tf.train.Checkpoint(**parts)


def _as_before(model) -> dict:
    """The parts of a model under the names of checkpoints that were written before decoder and towers had theirs."""
    backbone, head = model.backbone, model.head
    if hasattr(backbone, "stages"):
        names = ("stem", "stem_norm", "stem2", "stem2_norm")
        layers = {name: getattr(backbone, name) for name in names if hasattr(backbone, name)}
        backbone = tf.train.Checkpoint(**layers, stages=[list(blocks) for blocks in backbone.stages])
    towers = {}
    for tower in head.towers:
        convs, norms = getattr(head, f"{tower}_convs"), list(getattr(head, f"{tower}_norms"))
        if head.config.norm == "batch":
            count = len(head.levels)
            names = [str(level) for level in head.levels]
            norms = [dict(zip(names, norms[i : i + count], strict=True)) for i in range(0, len(norms), count)]
        towers[tower] = [list(pair) for pair in zip(convs, norms, strict=True)]
    outputs = {name: getattr(head, name) for name in ("classes", "centerness", "rays", "boxes") if hasattr(head, name)}
    scales = {f"scale{level}": scale for level, scale in head.scales.items()}
    if "box" in head.towers:
        scales |= {f"box_scale{level}": scale for level, scale in head.box_scales.items()}
    return {"backbone": backbone, "fpn": model.decoder, "head": tf.train.Checkpoint(towers=towers, **outputs, **scales)}
