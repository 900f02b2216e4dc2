"""The run directory: config.yaml, dataset.json and checkpoints/, written so that a kill at any moment leaves a usable one."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
import typing
import uuid
import zipfile
from pathlib import Path

import tensorflow as tf
import tf_keras

from polarmask_tf import config as configs
from polarmask_tf import lite
from polarmask_tf.config import Config
from polarmask_tf.data import dataset
from polarmask_tf.errors import InputError, one_line
from polarmask_tf.files import atomic_write, io_error_text, make_directory, read_file, readable_by_tensorflow
from polarmask_tf.modeling.polarmask import PolarMask
from polarmask_tf.ops.postprocess import recalibrated
from polarmask_tf.weights import earlier, shipped
from polarmask_tf.weights.state_dict import without_numbers

CALIBRATION = "calibration.json"  # what `evaluate --calibrate` found; see inference/calibration.py
THRESHOLDS = "thresholds.json"  # what `evaluate` found; see inference/thresholds.py
UNFINISHED = "unfinished"  # where in checkpoints/ the next one is written
SET_ASIDE = "before-restart"  # where in a run --restart keeps what was there, until a new checkpoint stands


def load_run(run: str | os.PathLike, **overrides) -> PolarMask:
    """The trained model of a run directory, at its newest checkpoint that can be read, or a shipped one by name ("nuclei").

    With train.ema its weights are the running averages. Scores are calibrated where `evaluate --calibrate` has been run on
    that checkpoint, and model.thresholds are what `evaluate` found on it. `overrides` replace values of config.postprocess,
    like score_threshold=0.3. Raises InputError if `run` is not a run directory or holds no checkpoint.
    """
    run = shipped.resolve(run)
    config, classes = read_run(run)
    config = _overridden(with_calibration(config, run), overrides)
    model = PolarMask(config, classes)
    if not checkpoints(run) and (run / shipped.WEIGHTS).is_file():
        shipped.assign_weights(run / shipped.WEIGHTS, named_weights(model))
    elif not restore(model, run):
        raise InputError(f"{run}: no checkpoint yet; train it first (polarmask train --out {run}){kept_aside(run)}")
    model.set_thresholds(read_thresholds(run, len(classes), config.postprocess))
    model.bit_depth = _read_about(run).get("bit_depth")
    return model


def load_model(path: str | os.PathLike, **overrides) -> PolarMask:
    """The model of a run directory or of a shipped name, see load_run, or of a .keras file that model.save wrote.

    Raises InputError for anything else at `path`.
    """
    path = Path(path)
    if path.suffix != ".keras":
        return load_run(path, **overrides)
    if not os.path.isfile(path):
        raise InputError(f"{path}: no such file")
    if not zipfile.is_zipfile(path):  # of HDF5 by that name Keras would run the code of Lambda layers
        raise InputError(f"{path}: damaged, or not a .keras file that PolarMask.save wrote (it is no zip archive)")
    try:
        model = tf_keras.models.load_model(path, safe_mode=True)
    except Exception as error:  # zip, HDF5, JSON and Keras errors are of a dozen classes
        reason = one_line(error, 200)
        raise InputError(f"{path}: damaged, or not a .keras file that PolarMask.save wrote ({reason})") from None
    if not isinstance(model, PolarMask):
        raise InputError(f"{path}: holds a {type(model).__name__}, not a PolarMask")
    model.config = _overridden(model.config, overrides)
    return model


def _overridden(config: Config, postprocess: dict) -> Config:
    return dataclasses.replace(config, postprocess=configs.override(config.postprocess, postprocess, "postprocess."))


def read_run(run: Path) -> tuple[Config, list]:
    """Config and classes of a run directory, without loading weights."""
    if not os.path.isfile(run / "config.yaml") or not os.path.isfile(run / "dataset.json"):  # unlike Path's, without errors
        raise InputError(f"{run}: not a run directory (config.yaml and dataset.json are expected in it)")
    return configs.load_saved(run / "config.yaml"), _read_about(run)["classes"]


def _read_about(run: Path) -> dict:
    """What run/dataset.json says of the training data: "classes", as PolarMask takes them, and more."""
    file = run / "dataset.json"
    try:
        content = json.loads(read_file(file, 2**20 * 100))
        classes = dataset.parse_classes(content.get("classes") if isinstance(content, dict) else None)
        if content.get("bit_depth") not in (None, *range(8, 17)):
            raise ValueError(f"bit_depth is {content['bit_depth']!r}, not 8 to 16")
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {io_error_text(error)}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file}: damaged ({error}); copy dataset.json from the training data") from None
    return {**content, "classes": classes}


def with_calibration(config: Config, run: Path) -> Config:
    """The config with the calibration and the least score of run/calibration.json, if it is of the newest checkpoint."""
    file = run / CALIBRATION

    def values(content):
        return {name: float({"score_bias": 0, **content}[name]) for name in ("temperature", "score_bias", "score_threshold")}

    found, current = _read_bound(file, values, "polarmask evaluate --calibrate")
    if found and not current:
        print(
            f"warning: {file} is of another checkpoint: scores are not calibrated; evaluate --calibrate again", file=sys.stderr
        )
    if not found or not current:
        return config
    config = dataclasses.replace(config, postprocess=dataclasses.replace(config.postprocess, **found))
    configs.check(config.postprocess, f"{file}: ")
    return config


def read_thresholds(run: Path, classes: int, options) -> dict | None:
    """The {"overall", "classes"} of run/thresholds.json as scores of `options`, a PostprocessConfig; None if the newest
    checkpoint has none: a training that went on since is no news to anybody."""

    def values(content):
        numbers = [float(number) for number in (content["overall"], *content["classes"])]
        if len(numbers) != 1 + classes or not all(0 <= number <= lite.MAX_SCORE for number in numbers):
            raise ValueError(f"not a score for each of {classes} classes")
        then, now = (content["temperature"], content.get("score_bias", 0.0)), (options.temperature, options.score_bias)
        if not (0.01 <= then[0] <= 100 and -50 <= then[1] <= 50):
            raise ValueError("no temperature")
        if then != now:
            numbers = [recalibrated(number, then, now) for number in numbers]
        return {"overall": numbers[0], "classes": numbers[1:]}

    found, current = _read_bound(run / THRESHOLDS, values, "polarmask evaluate")
    return found if current else None


def write_bound(file: Path, content: dict, checkpoint: str) -> None:
    """Writes what was found out about a run's checkpoint, of that checkpoint_digest, into a file of the run."""
    atomic_write(file, json.dumps({**content, "checkpoint": checkpoint}, indent=1))


def _read_bound(file: Path, values: typing.Callable, command: str) -> tuple[typing.Any, bool]:
    """values(content) of a file that write_bound wrote, None without one; and whether it is of the newest checkpoint."""
    if not file.is_file():
        return None, False
    try:
        content = json.loads(read_file(file, 2**24))
        return values(content), content["checkpoint"] == checkpoint_digest(file.parent)
    except (OSError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
        reason = one_line(error, 200)
        raise InputError(f"{file}: damaged ({reason}); delete it, or run {command} again") from None


def checkpoint_digest(run: Path) -> str:
    """SHA-256 of the index of the newest checkpoint, which holds checksums of its values; "" without one. A training that
    starts over comes to the same steps with other weights."""
    newest = next(iter(checkpoints(run)), None)
    return hashlib.sha256(Path(f"{newest}.index").read_bytes()).hexdigest() if newest else ""


def write_run(run: Path, config: Config, dataset: dict) -> None:
    """Makes the run directory and writes config.yaml, unless it says the same, and dataset.json; InputError if it cannot."""
    make_directory(run)
    try:
        same = (run / "config.yaml").is_file() and configs.load(run / "config.yaml") == config
    except InputError:  # of an earlier version
        same = False
    if not same:
        atomic_write(run / "config.yaml", configs.dump(config))
    atomic_write(run / "dataset.json", json.dumps(dataset, indent=1))


def kept_aside(run: Path) -> str:
    """The end of a line that says where --restart keeps what was there, if it does."""
    aside = run / SET_ASIDE
    return f"; what was there before --restart is in {aside}" if checkpoints(aside) else ""


def check_resumable(run: Path, names) -> None:
    """InputError where a checkpoint of these tensors does not hold all that a training goes on from."""
    if earlier.is_earlier(names):
        raise InputError(f"{run}: was trained by an earlier version, which this one cannot resume: give it to --start")
    if not any(name.startswith("optimizer/") for name in names):
        raise InputError(f"{run}: holds weights alone, which no training can resume: give it to --start")


def save(
    model: PolarMask,
    run: Path,
    step: int,
    *,
    keep: int = 2,
    chief: bool = True,
    weights_only: bool = False,
    passing: tuple = (),
    known: set[int] | None = None,
) -> None:
    """Writes the checkpoint run/checkpoints/step-<step> and deletes all but the newest `keep`; InputError if it cannot.

    It is written beside and moved, the index last: a checkpoint that has an index is whole. Of several workers all must
    call this, since values are gathered from them, but only the chief's files stay. Errors of the classes `passing` are
    passed on as they are. `known`: the steps of the checkpoints that are this training's to delete, to which `step` is
    added; where there is another one, somebody else trains into `run`, and nothing is touched. Default: all there are.
    """
    folder = run / "checkpoints"
    beside = folder / UNFINISHED / uuid.uuid4().hex if chief else Path(tempfile.mkdtemp())
    try:
        if chief:
            _refuse_others(run, step, known)
        # TensorFlow writes an index in place, and a kill would leave half of it under the checkpoint's own name.
        written = Path(_checkpoint(model, weights_only).save(str(beside / "step")))
        if not chief:
            return
        _refuse_others(run, step, known)
        (folder / f"step-{step}.index").unlink(missing_ok=True)  # of one that could not be read
        for path in sorted(beside.glob(f"{written.name}.*")):  # .data-00000-of-00001, .index
            os.replace(path, folder / f"step-{step}{path.suffix}")
    except passing:
        raise
    except (tf.errors.OpError, OSError) as e:
        raise InputError(f"{folder}: cannot write the checkpoint of step {step}: {io_error_text(e)}") from None
    finally:
        shutil.rmtree(beside, ignore_errors=True)
        with contextlib.suppress(OSError):  # where another one writes
            (folder / UNFINISHED).rmdir()
    if known is not None:
        known.add(step)
    # A later one is none that this training went on from: it could not be read.
    tidy(folder, [path for path in checkpoints(run) if step_of(path) <= step][:keep], known)


def _refuse_others(run: Path, step: int, known: set[int] | None) -> None:
    others = sorted(steps(run) - known) if known is not None else []
    if others:
        raise InputError(
            f"{run}: the checkpoint of step {others[-1]} is not this training's: another one writes there too; this one ends "
            f"after step {step}, which is not saved, and deletes nothing"
        )


def tidy(folder: Path, keep: list[str], known: set[int] | None = None) -> None:
    """Deletes what is not to `keep`: checkpoints of `known` steps; without it all of them, and what a kill left of others."""
    kept = {Path(path).name for path in keep}
    ours = [path for path in folder.glob("step-*") if re.fullmatch(r"step-\d+(\.index|\.data-.+|_temp)", path.name)]
    if known is not None:
        ours = [path for path in ours if path.stem in {f"step-{step}" for step in known}]
    others = sorted((path for path in ours if path.stem not in kept), reverse=True)  # an index before its data
    remove([*([folder / UNFINISHED] if known is None else ()), *others])


def remove(paths) -> None:
    """Deletes files and whole directories, where they are there."""
    for path in list(paths):
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


UNREADABLE = (tf.errors.OpError, AssertionError, ValueError, IndexError)  # TensorFlow's reader raises all of these


def restore(model: PolarMask, run: Path, *, training: bool = False) -> str | None:
    """Gives `model` the newest checkpoint of `run` that can be read and returns its path; None if there is none.

    `training` takes the optimizer's state too, and all or nothing; else the weights alone, which with train.ema are the
    averages. A newer one that is damaged is skipped with a line on stderr. Raises InputError if none is left.
    """
    paths, skipped = checkpoints(run), []
    for path in paths:
        try:
            with readable_by_tensorflow(path) as readable:
                _restore(model, run, readable, training)
            for line in skipped:
                print(line, file=sys.stderr)
            return path
        except UNREADABLE as e:
            reason = one_line(e, 200)
            if path == paths[-1]:
                raise InputError(f"{path}: {_why_unreadable(e)} ({reason})") from None
            skipped.append(f"warning: {path} cannot be read, the checkpoint before it is used ({reason})")
    return None


def _restore(model: PolarMask, run: Path, path: str, training: bool) -> None:
    reader = tf.train.load_checkpoint(path)
    names = list(reader.get_variable_to_shape_map())
    if training:
        check_resumable(run, names)
    for name in names:
        if training or not name.startswith("optimizer/"):
            reader.get_tensor(name)  # compares its checksum
    old = earlier.is_earlier(names)
    # TensorFlow would tell of every value that is left over, a line each; what matters is asserted.
    status = _checkpoint(model, not training, earlier.parts(model) if old else None).restore(path).expect_partial()
    status.assert_consumed() if training else status.assert_existing_objects_matched()
    if not training and any(name.startswith("average/") for name in names):
        variables = model.trainable_variables
        order = earlier.order_of_averages(reader, variable_names(model, variables)) if old else range(len(variables))
        for variable, place in zip(variables, order, strict=True):
            variable.assign(reader.get_tensor(f"average/{place}/.ATTRIBUTES/VARIABLE_VALUE"))


def _why_unreadable(error: Exception) -> str:
    if isinstance(error, (tf.errors.NotFoundError, tf.errors.PermissionDeniedError)):
        return "cannot be read, and no older one is left"
    if isinstance(error, (AssertionError, ValueError)):
        return "is of another model than config.yaml and dataset.json beside it say"
    return "damaged, and no older one is left; train again with --restart, or into another --out"


def checkpoints(run: Path) -> list[str]:
    """Paths of the whole checkpoints of a run, the newest first."""
    return [str(run / "checkpoints" / f"step-{step}") for step in sorted(steps(run), reverse=True)]


def steps(run: Path) -> set[int]:
    """Of how many steps the whole checkpoints of a run are."""
    names = [path.stem.rpartition("-")[2] for path in (run / "checkpoints").glob("step-*.index")]
    return {int(name) for name in names if name.isdecimal()}


def step_of(path: str | None) -> int:
    """The number of steps that a checkpoint was trained for."""
    return int(path.rpartition("-")[2]) if path else 0


def ema_weights(model: PolarMask) -> list:
    """The running averages of the trainable variables, in their order; none without train.ema."""
    if not model.config.train.ema:
        return []
    return getattr(model.optimizer, "inner_optimizer", model.optimizer)._model_variables_moving_average


def variable_names(model: PolarMask, variables) -> list[str]:
    """The same names for equal networks, however many models a process has made."""
    return without_numbers(variable.name.removeprefix(f"{model.name}/") for variable in variables)


def named_weights(model: PolarMask) -> dict[str, tf.Variable]:
    """Name -> variable of a model, without the metrics' state."""
    variables = [variable for part in model.parts.values() for variable in part.variables]
    return dict(zip(variable_names(model, variables), variables, strict=True))


def _checkpoint(model, weights_only, parts=None):
    # Not the model as a whole: its metrics and its optimizer belong to it too. The names are Model Garden's.
    parts = parts or model.parts
    if not weights_only:
        parts |= {"optimizer": model.optimizer, "average": ema_weights(model), "losses": model.loss_metrics}
    return tf.train.Checkpoint(**parts)
