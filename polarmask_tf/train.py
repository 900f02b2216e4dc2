"""`fit` with checkpoints, resuming and a readable progress line, in a run directory; and the way back from one."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
import time
from pathlib import Path

import tensorflow as tf
import tf_keras
import yaml
from tqdm import tqdm

from polarmask_tf import config as configs
from polarmask_tf import optimizers, targets
from polarmask_tf.config import Config
from polarmask_tf.data import pipeline, records
from polarmask_tf.errors import InputError
from polarmask_tf.modeling import pretrained
from polarmask_tf.modeling.polarmask import PolarMask
from polarmask_tf.tensors import summarize


def train(config: Config, run: Path, *, restart: bool = False, start: Path | None = None) -> PolarMask:
    """Trains a model into the directory `run`, or goes on where it was interrupted.

    The directory holds config.yaml, dataset.json (class names and category ids), checkpoints/ and TensorBoard events.
    `start` is another run directory whose weights are taken at step 0, where their shapes agree; else the backbone starts
    from config.model.backbone.weights, if that is set.
    Raises InputError if `run` holds another config's or another data set's training (restart=True starts over), or the
    data or the weights cannot be read.
    """
    if not config.data.train:
        raise InputError("no training data: give --data DIR, a directory made by `polarmask convert`")
    info = records.load_dataset_info(config.data.train)
    _prepare_run(config, info, run, restart)
    size = configs.canvas(config.data)
    lost = targets.unreachable_levels(config.model.fpn.levels, size, config.targets.ranges)
    if lost:
        names = ", ".join(f"P{level}" for level in lost)
        size = " x ".join(map(str, size))
        print(f"warning: {names} can get no object in images of {size}; shorten model.fpn.levels", file=sys.stderr)

    tf_keras.utils.set_random_seed(config.train.seed)
    model = PolarMask(config, len(info.classes))
    model.build((None, *configs.canvas(config.data), 3))
    model.compile(optimizer=optimizers.make(config))
    model.optimizer.build(model.trainable_variables)
    manager = _checkpoints(model, run)
    if manager.latest_checkpoint:
        _restore(manager, complete=True)
    elif start:
        start_from(model, start)
    elif config.model.backbone.weights:
        pretrained.initialize(model.backbone, config.model)
    elif config.model.backbone.norm == "frozen" or config.model.backbone.freeze_at:
        print("warning: frozen parts of the backbone start from noise and stay so: set model.backbone.weights, or give --start",
              file=sys.stderr)
    done, steps = int(model.optimizer.iterations), config.train.steps
    if done >= steps:
        print(f"{run}: already trained for {done} steps; --restart to train anew, or --set train.steps=N to go on")
        return model
    if done:
        print(f"{run}: going on after step {done}")

    batches = pipeline.training_batches(info, config, seed=config.train.seed, start_step=done)
    # An epoch, to Keras, is the time from one checkpoint to the next.
    every = config.train.checkpoint_every
    progress = Progress(run, done, steps)
    try:
        model.fit(
            batches, steps_per_epoch=every, initial_epoch=done // every, epochs=math.ceil(steps / every), verbose=0,
            callbacks=[progress, Checkpoints(manager, every, steps)],
        )
    except tf.errors.DataLossError as e:
        reason = e.message.splitlines()[0]
        raise InputError(f"{config.data.train}: a shard is damaged, convert the data again ({reason})") from None
    except tf.errors.InvalidArgumentError as e:
        if "Decode" not in e.message:
            raise
        raise InputError(
            f"{config.data.train}: holds an image that cannot be decoded; `polarmask convert --verify` finds and skips it"
        ) from None
    finally:
        progress.close()
    return model


class Progress(tf_keras.callbacks.Callback):
    """A tqdm line with the losses since the last checkpoint and images/s, and TensorBoard scalars every 20 steps."""

    def __init__(self, run: Path, done: int, steps: int):
        super().__init__()
        self.steps = steps
        self.writer = tf.summary.create_file_writer(str(run))
        self.bar = tqdm(total=steps, initial=done, unit="step", desc="train", mininterval=1.0, smoothing=0.05)
        self.since = (time.monotonic(), done)

    def on_train_batch_end(self, batch, logs=None):
        step = int(self.model.optimizer.iterations)
        self.bar.update(step - self.bar.n)
        if step % 20 and step != self.steps:
            return
        now = time.monotonic()
        speed = (step - self.since[1]) * self.model.config.data.batch / max(now - self.since[0], 1e-9)
        self.since = (now, step)
        values = " ".join(f"{name} {logs[name]:.3f}" for name in ("loss", *self.model.parts))
        self.bar.set_postfix_str(f"{values}, {speed:.0f} images/s", refresh=False)
        with self.writer.as_default(step):
            for name in ("loss", *self.model.parts):
                tf.summary.scalar(name, logs[name])
            tf.summary.scalar("learning_rate", self.model.optimizer.lr)
            tf.summary.scalar("images_per_second", speed)

    def on_train_end(self, logs=None):
        self.close()

    def close(self):
        """Also after an error, of which Keras does not tell: the message is to stand on a line of its own."""
        self.bar.close()
        self.writer.close()


class Checkpoints(tf_keras.callbacks.Callback):
    """Saves model and optimizer every `every` steps and at the last step, and ends the training there."""

    def __init__(self, manager: tf.train.CheckpointManager, every: int, steps: int):
        super().__init__()
        self.manager, self.every, self.steps = manager, every, steps

    def on_train_batch_end(self, batch, logs=None):
        step = int(self.model.optimizer.iterations)
        if step % self.every == 0 or step >= self.steps:
            try:
                self.manager.save(step)
            except tf.errors.OpError as e:
                reason = e.message.splitlines()[0]
                raise InputError(f"{self.manager.directory}: cannot write the checkpoint: {reason}") from None
        self.model.stop_training = step >= self.steps


def start_from(model: PolarMask, run: Path) -> None:
    """Gives `model` the weights of a run wherever both have a variable of one name and shape; names the others."""
    theirs = {variable.name: variable for variable in _weights(load_run(run))}
    mine = _weights(model)
    other = [v.name for v in mine if v.name not in theirs or theirs[v.name].shape != v.shape]
    for variable in mine:
        if variable.name not in other:
            variable.assign(theirs[variable.name])
    print(f"starting from {run}: {len(mine) - len(other)} of {len(mine)} tensors" + (
        f"; anew: {summarize(other)}" if other else ""))


def _weights(model: PolarMask) -> list:
    return [*model.backbone.variables, *model.fpn.variables, *model.head.variables]  # without the metrics' state


def load_run(run: str | os.PathLike, **overrides) -> PolarMask:
    """The trained model of a run directory, at its newest checkpoint.

    `overrides` replace values of config.postprocess, like score_threshold=0.3. model.classes is a list of {"name",
    "category_id"}, model.input_size is (height, width). Raises InputError if `run` is not a run directory or holds no
    checkpoint.
    """
    run = Path(run)
    config, classes = read_run(run)
    config = dataclasses.replace(config, postprocess=dataclasses.replace(config.postprocess, **overrides))
    model = PolarMask(config, len(classes))
    model.build((None, *configs.canvas(config.data), 3))
    model.classes, model.input_size = classes, configs.canvas(config.data)
    manager = _checkpoints(model, run)
    if not manager.latest_checkpoint:
        raise InputError(f"{run}: no checkpoint yet; train it first (polarmask train --out {run})")
    _restore(manager, complete=False)
    return model


def read_run(run: Path) -> tuple[Config, list]:
    """Config and classes of a run directory, without loading weights."""
    if not (run / "config.yaml").is_file() or not (run / "dataset.json").is_file():
        raise InputError(f"{run}: not a run directory (config.yaml and dataset.json are expected in it)")
    try:
        classes = json.loads((run / "dataset.json").read_text())["classes"]
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{run / 'dataset.json'}: damaged; copy dataset.json from the training data") from None
    return configs.load(run / "config.yaml"), classes


def _prepare_run(config: Config, info, run: Path, restart: bool) -> None:
    """Makes the run directory, or refuses one that belongs to something else. Lengthening a training is allowed."""
    # A run that ended before its first checkpoint, of missing weights for example, holds nothing to protect.
    if (run / "config.yaml").is_file() and not restart and tf.train.latest_checkpoint(str(run / "checkpoints")):
        before, classes = read_run(run)
        if classes != info.classes:
            raise InputError(
                f"{run}: was trained on other classes than {config.data.train}; choose another --out, or --restart"
            )
        old, new = (_flatten(yaml.safe_load(configs.dump(c))) for c in (before, config))
        changed = [key for key in new if old[key] != new[key] and key not in ("train.steps", "train.checkpoint_every")]
        if changed:
            key = changed[0]
            more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
            raise InputError(
                f"{run}: holds a training with {key}={old[key]}, now {new[key]}{more}; choose another --out, or --restart"
            )
    elif run.is_dir() and any(run.iterdir()) and not (run / "config.yaml").is_file():
        raise InputError(f"{run}: exists and is not a run directory; choose another --out")
    if restart and (run / "config.yaml").is_file():
        for old_file in [*run.glob("checkpoints/*"), *run.glob("events.out.tfevents.*")]:
            old_file.unlink()
    write_run(run, config, {"classes": info.classes, "name": info.name, "num_images": info.num_images})


def write_run(run: Path, config: Config, dataset: dict) -> None:
    """Makes the run directory and writes config.yaml and dataset.json into it; InputError if it cannot."""
    try:
        run.mkdir(parents=True, exist_ok=True)
        for name, text in (("dataset.json", json.dumps(dataset, indent=1)), ("config.yaml", configs.dump(config))):
            (run / f"{name}.tmp").write_text(text)
            os.replace(run / f"{name}.tmp", run / name)
    except OSError as e:
        raise InputError(f"{run}: cannot be written: {e.strerror}") from None


def save_weights(model: PolarMask, run: Path) -> None:
    """A checkpoint of the model alone, for a run that was not trained here."""
    _checkpoints(model, run).save(0)


def _flatten(values: dict, prefix: str = "") -> dict:
    flat = {}
    for key, value in values.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _checkpoints(model: PolarMask, run: Path) -> tf.train.CheckpointManager:
    optimizer_part = {"optimizer": model.optimizer} if getattr(model, "optimizer", None) else {}
    checkpoint = tf.train.Checkpoint(model=model, **optimizer_part)
    return tf.train.CheckpointManager(checkpoint, str(run / "checkpoints"), max_to_keep=2, checkpoint_name="step")


def _restore(manager: tf.train.CheckpointManager, complete: bool) -> None:
    try:
        status = manager.checkpoint.restore(manager.latest_checkpoint)
        status.assert_consumed() if complete else status.assert_existing_objects_matched().expect_partial()
    except (tf.errors.OpError, AssertionError, ValueError, IndexError) as e:  # the reader raises all of these
        reason = str(e).splitlines()[0][:200]
        raise InputError(
            f"{manager.latest_checkpoint}: damaged, or of another model; delete it to use the one before ({reason})"
        ) from None
