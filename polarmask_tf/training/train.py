"""`fit` in a run directory: on one device or many, going on where an interrupted run stopped."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import tensorflow as tf
import tf_keras

from polarmask_tf import config as configs
from polarmask_tf.config import Config
from polarmask_tf.data import pipeline, records
from polarmask_tf.errors import InputError
from polarmask_tf.modeling.polarmask import PolarMask
from polarmask_tf.ops import targets
from polarmask_tf.training import optimizers, replicas
from polarmask_tf.training.callbacks import Checkpoints, Evaluation, Log, NotFinite, Profile, ap_history, patience_exhausted
from polarmask_tf.training.watchdog import WORKER_LOST_ERRORS, worker_watchdog
from polarmask_tf.weights import pretrained, runs
from polarmask_tf.weights.state_dict import summarize

POLICIES = {"float32": "float32", "float16": "mixed_float16", "bfloat16": "mixed_bfloat16"}


def train(
    config: Config,
    run: Path,
    *,
    strategy: tf.distribute.Strategy | None = None,
    restart: bool = False,
    start: Path | None = None,
    profile: tuple[int, int] | None = None,
) -> PolarMask:
    """Trains a model into the directory `run`, or goes on where it was interrupted.

    The directory holds config.yaml, dataset.json (class names and category ids), checkpoints/, metrics.csv, TensorBoard
    events and, with train.evaluate_every, best/, a run directory of the model with the best AP. `strategy` comes from
    training.distribution.make; of several workers each calls this, with a `run` that all of them see. `start` is another run
    directory whose weights are taken at step 0, where their shapes agree; else the backbone starts from
    config.model.backbone.weights, if that is set. `profile`: steps between which TensorFlow's profiler runs.

    Returns the model; with train.ema its weights are the averages. Raises InputError if `run` holds another config's or
    another data set's training (restart=True starts over), if the data or the weights cannot be read, if the loss is no
    longer finite, or a worker is lost.
    """
    if not config.data.train:
        raise InputError("no training data: give --data DIR, a directory made by `polarmask convert`")
    if profile and not 0 < profile[0] < profile[1] <= config.train.steps:
        raise InputError(
            f"--profile {profile[0]},{profile[1]}: give two of the {config.train.steps} steps, the earlier one first"
        )
    if config.train.deterministic:
        tf.config.experimental.enable_op_determinism()
    info = records.load_dataset_info(config.data.train)
    strategy = strategy or tf.distribute.get_strategy()
    check_layout(config, strategy.num_replicas_in_sync)
    chief = replicas.is_chief(strategy)
    if chief:
        runs.create_or_check(config, info, run, restart)
        _warn_of_lost_levels(config)
    with worker_watchdog(strategy):
        replicas.assert_equal(strategy, 0, "")  # until the chief has prepared the directory
        with strategy.scope():
            model = build(config, info.classes)
        found = runs.restore(model, run, training=True)
        done, steps = runs.step_of(found), config.train.steps
        replicas.assert_equal(strategy, done, f"found step {done} in {run}; is it on a file system that all workers see?")
        if not found:
            _start(model, start, chief)
        if done >= steps:
            if chief:
                print(f"{run}: already trained for {done} steps; --restart to train anew, or --set train.steps=N to go on")
        else:
            if done and chief:
                print(f"{run}: going on after step {done}")
            _fit(model, info, run, done, strategy, profile)
        for average, variable in zip(runs.ema_weights(model), model.trainable_variables, strict=False):
            variable.assign(average)
    return model


def check_layout(config: Config, replicas: int) -> None:
    """InputError for a batch, or a norm, that does not go with so many devices."""
    train, each = config.train, config.data.batch // replicas
    if config.data.batch % replicas:
        raise InputError(f"data.batch is {config.data.batch}, images over all devices: not divisible by {replicas} devices")
    if each % train.accumulate:
        raise InputError(
            f"data.batch is {config.data.batch}, {each} on each of {replicas} devices: not divisible by train.accumulate "
            f"({train.accumulate})"
        )
    if config.model.backbone.norm == "sync" and replicas > 1 and (train.jit_compile or train.accumulate > 1):
        raise InputError(
            "model.backbone.norm: sync does not go with train.jit_compile or train.accumulate on several devices; "
            "frozen and group do"
        )


def _warn_of_lost_levels(config: Config) -> None:
    size = configs.input_size(config.data)
    lost = targets.unreachable_levels(config.model.fpn.levels, size, config.targets.ranges)
    if lost:
        names = ", ".join(f"P{level}" for level in lost)
        size = " x ".join(map(str, size))
        print(f"warning: {names} can get no object in images of {size}; shorten model.fpn.levels", file=sys.stderr)


def build(config: Config, classes) -> PolarMask:
    """A compiled model for `fit`, its weights by train.seed, its optimizer's state made; `classes` as PolarMask takes them."""
    tf_keras.utils.set_random_seed(config.train.seed)
    model = PolarMask(config, classes, dtype=POLICIES[config.train.precision])
    model.compile(optimizer=optimizers.make(config), jit_compile=config.train.jit_compile)
    model.optimizer.build(model.trainable_variables)
    return model


def _start(model: PolarMask, start: Path | None, chief: bool) -> None:
    """The weights of step 0."""
    config = model.config.model
    if start:
        start_from(model, start, chief)
    elif config.backbone.weights:
        pretrained.initialize(model.backbone, config)
    elif chief and (config.backbone.norm == "frozen" or config.backbone.freeze_at):
        print(
            "warning: frozen parts of the backbone start from noise and stay so: set model.backbone.weights, or give --start",
            file=sys.stderr,
        )
    for average, variable in zip(runs.ema_weights(model), model.trainable_variables, strict=False):
        average.assign(variable)


def _fit(model: PolarMask, info, run: Path, done: int, strategy, profile) -> None:
    config, chief = model.config, replicas.is_chief(strategy)
    worker, workers = replicas.worker(strategy)
    count = strategy.num_replicas_in_sync

    def batches(**layout):
        return pipeline.training_batches(info, config, seed=config.train.seed, **layout)

    data = batches(start_step=done, worker=worker, workers=workers, replicas=count)
    if count > 1:
        # The pipeline makes every replica's batch itself; TensorFlow would share out by decoding all on every worker.
        data = strategy.distribute_datasets_from_function(lambda context, mine=data: mine)
    # An epoch, to Keras, is the time from one checkpoint to the next.
    every, steps = config.train.checkpoint_every, config.train.steps
    log = Log(run, done, steps, chief)
    if patience_exhausted(ap_history(log.rows), config.train.patience):
        log.close()
        if chief:
            print(f"{run}: stopped at step {done}, since AP no longer rose; raise train.patience to go on")
        return
    callbacks = [log]
    if config.train.evaluate_every:
        callbacks.append(Evaluation(run, done, strategy, log))
    callbacks.append(Checkpoints(run, done, strategy, log))
    if profile and done < profile[0]:
        callbacks.append(Profile(run, done, profile))
    elif profile and chief:
        print(f"{run}: no profile, since step {profile[0]} has been trained before; --restart to train anew")
    try:
        model.fit(
            data,
            steps_per_epoch=every,
            initial_epoch=done // every,
            epochs=math.ceil(steps / every),
            verbose=0,
            callbacks=callbacks,
        )
    except NotFinite as e:
        saved = ""
        if chief:
            saved = f" and its batch is {_save_batch(batches(start_step=e.step - 1), run, e.step)}"
        newest = runs.step_of(next(iter(runs.checkpoints(run)), None))
        newest = f"the newest checkpoint is of step {newest}" if newest else "there is no checkpoint yet"
        raise InputError(
            f"{run}: {e} at step {e.step}; {newest}{saved}. Look at that batch, or start over with a lower train.learning_rate"
        ) from None
    except tf.errors.OpError as e:
        if workers > 1 and isinstance(e, WORKER_LOST_ERRORS):
            raise  # the watchdog says whom we lost
        explained = pipeline.explain(e, info, config, seed=config.train.seed, step=log.step, worker=worker, workers=workers)
        if explained is None:
            raise
        raise explained from None
    finally:
        log.close()
        for callback in callbacks:
            if isinstance(callback, Profile):
                callback.on_train_end()  # Keras does not tell it of an error


def _save_batch(batches: tf.data.Dataset, run: Path, step: int) -> Path:
    """The images and instances of a step, which a run's config and the number of the step determine, as an .npz file."""
    images, instances = next(iter(batches.take(1)))
    path = run / f"not_finite_step_{step}.npz"
    np.savez_compressed(path, images=images.numpy(), **{name: value.numpy() for name, value in instances.items()})
    return path


def start_from(model: PolarMask, run: Path, chief: bool = True) -> None:
    """Gives `model` the weights of a run (or .keras file) that have its names and shapes, and tells which have not."""
    theirs = {variable.name: variable for variable in _weights(runs.load_model(run))}
    mine = _weights(model)
    other = [v.name for v in mine if v.name not in theirs or theirs[v.name].shape != v.shape]
    for variable in mine:
        if variable.name not in other:
            variable.assign(theirs[variable.name])
    if chief:
        print(
            f"starting from {run}: {len(mine) - len(other)} of {len(mine)} tensors"
            + (f"; anew: {summarize(other)}" if other else "")
        )


def _weights(model: PolarMask) -> list:
    return [*model.backbone.variables, *model.decoder.variables, *model.head.variables]  # without the metrics' state
