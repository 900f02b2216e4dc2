"""`fit` in a run directory: on one device or many, going on where an interrupted run stopped."""

from __future__ import annotations

import contextlib
import shlex
import signal
import sys
from pathlib import Path

import numpy as np
import tensorflow as tf
import tf_keras

from polarmask_tf.config import Config
from polarmask_tf.data import pipeline
from polarmask_tf.errors import InputError, counted
from polarmask_tf.files import check_text, lock
from polarmask_tf.modeling.polarmask import PolarMask
from polarmask_tf.training import checks, directory, optimizers, replicas
from polarmask_tf.training.callbacks import Checkpoints, Evaluation, Profile, is_evaluation_missing
from polarmask_tf.training.checks import check_layout
from polarmask_tf.training.log import Log, NotFinite, ap_history, patience_exhausted
from polarmask_tf.training.preemption import StopOnSignal, Stopped, noted_signals
from polarmask_tf.training.watchdog import WORKER_LOST_ERRORS, worker_watchdog
from polarmask_tf.weights import pretrained, runs
from polarmask_tf.weights.start import start_from

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
    training.distribution.make; of several workers each calls this, with a `run` that all of them see. `start` is what weights
    of step 0 are taken from where their shapes agree, see weights.start; else the backbone starts from
    config.model.backbone.weights, if that is set. `profile`: steps between which TensorFlow's profiler runs.

    Returns the model; with train.ema its weights are the averages. Raises InputError if `run` holds another config's or
    another data set's training (restart=True starts over) or is in use, if the data or the weights cannot be read, if the
    loss is no longer finite, or a worker is lost: what can be checked is checked before anything in `run` changes. Raises
    preemption.Stopped, a SystemExit, when SIGTERM, SIGINT or SIGHUP came, after the step and its checkpoint.
    """
    run = Path(run)
    if profile and not 0 < profile[0] < profile[1] <= config.train.steps:
        raise InputError(
            f"--profile {profile[0]},{profile[1]}: give two of the {config.train.steps} steps, the earlier one first"
        )
    if config.train.deterministic:
        tf.config.experimental.enable_op_determinism()
    check_text(run)
    info = checks.check_data(config)
    strategy = strategy or tf.distribute.get_strategy()
    check_layout(config, strategy.num_replicas_in_sync)
    chief = replicas.is_chief(strategy)
    if chief:
        directory.check(config, info, run, restart)
        checks.warn(config, info)
    with contextlib.ExitStack() as stack:
        with worker_watchdog(strategy):
            with strategy.scope():
                model = build(config, info.classes)
            if restart or not runs.checkpoints(run):
                _start(model, start and directory.where_it_is(Path(start), run), chief)
            replicas.assert_equal(strategy, 0, "")  # until all have read what the chief may now move
            if chief:
                stack.enter_context(lock(run, "train"))
                _prepare(config, info, run, restart)
            replicas.assert_equal(strategy, 0, "")  # until the chief has prepared the directory
            found = runs.restore(model, run, training=True)
            done = runs.step_of(found)
            replicas.assert_equal(strategy, done, f"found step {done} in {run}; is it on a file system that all workers see?")
            number, step = _fit(model, info, run, done, strategy, profile)
        if number:
            if chief:
                again = shlex.join(["polarmask", "train", "--config", str(run / "config.yaml"), "--out", str(run)])
                name = signal.Signals(number).name
                print(f"polarmask: {name} after step {step}, which is saved; go on with: {again}", file=sys.stderr)
            raise Stopped(number)
    for average, variable in zip(runs.ema_weights(model), model.trainable_variables, strict=False):
        variable.assign(average)
    return model


def _prepare(config: Config, info, run: Path, restart: bool) -> None:
    """The chief's part before all look for a checkpoint."""
    had_begun = (run / "metrics.csv").is_file()
    directory.create_or_check(config, info, run, restart)
    if had_begun and not runs.checkpoints(run):
        why = "--restart" if restart else "no checkpoint yet"
        print(f"{run}: {why}: starting from step 0{runs.kept_aside(run)}")


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


def _fit(model: PolarMask, info, run: Path, done: int, strategy, profile) -> tuple[int, int]:
    """Trains from step `done` on; returns the number of the signal that ended it, or 0, and the last step."""
    config, chief = model.config, replicas.is_chief(strategy)
    worker, workers = replicas.worker(strategy)
    count, steps = strategy.num_replicas_in_sync, config.train.steps
    missing = replicas.all_gather(strategy, [is_evaluation_missing(config, done, run)])[0]  # as the chief reads it
    if done >= steps and not missing:
        if chief:
            trained = f"{run}: already trained for {counted(done, 'step')}"
            print(f"{trained}; --restart to train anew, or --set train.steps=N to go on")
        return 0, done
    if done and chief:
        print(f"{run}: going on after step {done}")

    def batches(**layout):
        return pipeline.training_batches(info, config, seed=config.train.seed, **layout)

    with contextlib.ExitStack() as stack:
        stop = StopOnSignal(done, strategy, stack.enter_context(noted_signals()))
        log = Log(run, done, steps, chief)
        stack.callback(log.close)
        evaluation = Evaluation(run, done, strategy, log, stop)
        callbacks = [log, stop, Checkpoints(run, done, strategy, log), evaluation]
        if profile and done < profile[0]:
            callbacks.append(Profile(run, done, profile))
            stack.callback(callbacks[-1].on_train_end)  # Keras does not tell it of an error
        elif profile and chief:
            print(f"{run}: no profile, since step {profile[0]} has been trained before; --restart to train anew")
        try:
            if missing:  # a signal, a kill or an error came between a checkpoint and its evaluation
                for callback in (log, evaluation):
                    callback.set_model(model)
                    callback.on_train_begin()
                evaluation.evaluate(done)
            if patience_exhausted(ap_history(log.rows), config.train.patience):
                if chief:
                    print(f"{run}: stopped at step {done}, since AP no longer rose; raise train.patience to go on")
            elif done < steps:
                if chief:
                    _announce(model, info, done, count)
                data = batches(start_step=done, worker=worker, workers=workers, replicas=count)
                if count > 1:
                    # The pipeline makes every replica's batch itself; TensorFlow would decode all on every worker.
                    data = strategy.distribute_datasets_from_function(lambda context, mine=data: mine)
                model.fit(data, steps_per_epoch=steps - done, verbose=0, callbacks=callbacks)
        except Stopped as stopped:
            stop.number = stopped.number
        except NotFinite as e:
            saved = ""
            if chief:
                saved = f" and its batch is {_save_batch(batches(start_step=e.step - 1), run, e.step)}"
            newest = runs.step_of(next(iter(runs.checkpoints(run)), None))
            newest = f"the newest checkpoint is of step {newest}" if newest else "there is no checkpoint yet"
            raise InputError(
                f"{run}: {e} at step {e.step}; {newest}{saved}. Look at that batch, or start over with a lower "
                "train.learning_rate"
            ) from None
        except (tf.errors.OpError, UnicodeDecodeError) as e:
            if workers > 1 and isinstance(e, WORKER_LOST_ERRORS):
                raise  # the watchdog says whom we lost
            explained = pipeline.explain(e, info, config, seed=config.train.seed, step=log.step, worker=worker, workers=workers)
            if explained is None:
                raise
            raise explained from None
        return stop.number, log.step


def _announce(model: PolarMask, info, done: int, devices: int) -> None:
    config, objects = model.config, info.num_instances - info.num_crowd
    batch, steps = config.data.batch, config.train.steps
    classes = counted(len(info.classes), "class", "classes")
    print(
        f"{counted(info.num_images, 'image')}, {counted(objects, 'object')}, {classes}; "
        f"{model.count_params() / 1e6:.1f} M parameters; {counted(steps - done, 'step')} of {counted(batch, 'image')} on "
        f"{counted(devices, 'device')}, {(steps - done) * batch / info.num_images:.1f} epochs\n"
        "the first step may take a minute: TensorFlow prepares it",
        flush=True,
    )


def _save_batch(batches: tf.data.Dataset, run: Path, step: int) -> Path:
    """The images and instances of a step, which a run's config and the number of the step determine, as an .npz file."""
    images, instances = next(iter(batches.take(1)))
    path = run / f"not_finite_step_{step}.npz"
    np.savez_compressed(path, images=images.numpy(), **{name: value.numpy() for name, value in instances.items()})
    return path
