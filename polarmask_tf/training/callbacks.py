"""What happens between the steps of `fit`: checkpoints, evaluation, a profile; what is written about them is in log.py."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import json
from pathlib import Path

import numpy as np
import tensorflow as tf
from tqdm import tqdm

from polarmask_tf.config import Config
from polarmask_tf.data import dataset, records
from polarmask_tf.errors import InputError
from polarmask_tf.files import atomic_write
from polarmask_tf.inference import thresholds, visualize
from polarmask_tf.inference.evaluate import evaluate
from polarmask_tf.inference.predictor import read_image, run_predictor
from polarmask_tf.inference.truth import cell
from polarmask_tf.training import directory, replicas
from polarmask_tf.training.log import APS, Log, Stepwise, ap_history, patience_exhausted, read_metrics, rounded
from polarmask_tf.training.watchdog import WORKER_LOST_ERRORS
from polarmask_tf.weights import runs

PICTURES = 4


def save(model, run: Path, step: int, strategy, **options) -> None:
    """runs.save by all workers of a strategy; that one is lost is the watchdog's to tell."""
    _, workers = replicas.worker(strategy)
    runs.save(model, run, step, chief=replicas.is_chief(strategy), passing=WORKER_LOST_ERRORS if workers > 1 else (), **options)


class Checkpoints(Stepwise):
    """Saves model and optimizer every train.checkpoint_every steps, before each evaluation, and when the training ends.

    Ends it at the last step. `known` steps are those of the checkpoints that this training may delete, see runs.save.
    """

    def __init__(self, run: Path, done: int, strategy, log: Log):
        super().__init__(done)
        self.run, self.strategy, self.log = run, strategy, log
        self.known = runs.steps(run)

    def set_model(self, model):
        super().set_model(model)
        self.means = [variable.numpy() for metric in model.loss_metrics for variable in metric.variables]

    def on_epoch_begin(self, epoch, logs=None):
        # Keras has just reset them; a checkpoint that came between two others holds what they had summed up.
        variables = [variable for metric in self.model.loss_metrics for variable in metric.variables]
        for variable, value in zip(variables, self.means, strict=True):
            variable.assign(value)

    def on_step(self, step, logs):
        train = self.model.config.train
        due = step % train.checkpoint_every == 0
        if step >= train.steps:
            self.model.stop_training = True
        if due or self.model.stop_training or is_evaluated(self.model.config, step):
            self.log.check(step)
            replicas.average_batch_norm(self.model)
            save(self.model, self.run, step, self.strategy, known=self.known)
            if replicas.is_chief(self.strategy):
                directory.remove_set_aside(self.run)


def is_evaluated(config: Config, step: int) -> bool:
    """Whether there is an evaluation after this step: of every training with validation data at its end at least."""
    train = config.train
    return bool(config.data.val) and (step >= train.steps or bool(train.evaluate_every and step % train.evaluate_every == 0))


def is_evaluation_missing(config: Config, step: int, run: Path) -> bool:
    """Whether a training that was interrupted after `step` did not come to the evaluation there, by its metrics.csv."""
    return step > 0 and is_evaluated(config, step) and not any(r["step"] == step and "AP" in r for r in read_metrics(run))


class Evaluation(Stepwise):
    """COCO evaluation on data.val, every train.evaluate_every steps and at the last one; the best model goes to run/best.

    All replicas of all workers take their share of the images. Ends the training after train.patience evaluations
    without a better AP. `stop` is the StopOnSignal that comes before it: what a signal prevents is made up for by the
    training that goes on.
    """

    def __init__(self, run: Path, done: int, strategy, log: Log, stop=None):
        super().__init__(done)
        self.run, self.strategy, self.log, self.stop = run, strategy, log, stop
        self.chief = replicas.is_chief(strategy)
        self.known = runs.steps(run / "best")
        self.truth, self.pictures = None, []

    def set_model(self, model):
        if model is self.model:
            return
        super().set_model(model)
        self.data = dataset.load(val) if (val := model.config.data.val) else None
        _, workers = replicas.worker(self.strategy)
        devices = self.strategy.num_replicas_in_sync // workers
        predictor = run_predictor(model, strategy=self.strategy, devices=devices)

        def run(images):
            if self.stop:
                self.stop.check()
            return predictor.run(images)

        self.predictor = dataclasses.replace(predictor, run=run)

    def on_step(self, step, logs):
        if is_evaluated(self.model.config, step) and not (self.stop and self.stop.number):
            self.evaluate(step)

    def evaluate(self, step: int) -> None:
        """Measures the model as it stands after `step`, which has been saved."""
        config = self.model.config
        before = ap_history(self.log.rows)
        if again := dataset.converted_again(self.data):  # AP of other pictures is not to choose the best model by
            raise InputError(f"{again}; step {step} is saved")
        with averaged(self.model):
            metrics = evaluate(
                self.predictor,
                self.data,
                progress=self.chief,
                worker=replicas.worker(self.strategy),
                gather=lambda results: replicas.all_gather(self.strategy, results),
            )
            values = {name: rounded(metrics.values[name]) for name in APS}
            if values["AP"] > max(before, default=-2.0):
                save(self.model, self.run / "best", step, self.strategy, keep=1, weights_only=True, known=self.known)
                if self.chief:
                    self._describe_best(step, metrics)
            if self.chief:
                self._draw(step)
                self._store_thresholds(self.run, metrics)
        self.log.add(step, values)
        if self.chief:
            tqdm.write(f"step {step}: " + ", ".join(f"{name} {value:.3f}" for name, value in values.items()))
        if patience_exhausted([*before, values["AP"]], config.train.patience):
            if self.chief:
                tqdm.write(f"no better AP in {config.train.patience} evaluations: stopping at step {step}")
            self.model.stop_training = True

    def _describe_best(self, step, metrics):
        best = self.run / "best"
        runs.write_run(best, self.model.config, json.loads((self.run / "dataset.json").read_text()))
        atomic_write(best / "metrics.json", json.dumps({"step": step, **metrics.to_dict()}, indent=1))
        self._store_thresholds(best, metrics)

    def _store_thresholds(self, run, metrics):
        """As `polarmask evaluate` does, of the checkpoint that has just been saved."""
        config = self.model.config
        thresholds.store(thresholds.subject_of(run, config), metrics, config.data.val)

    def _draw(self, step):
        """The first validation images, truth beside prediction, for TensorBoard."""
        if self.truth is None:
            self.truth = records.read_ground_truth(self.data)
            self.pictures = [
                (image_id, read_image(io.BytesIO(encoded)))
                for image_id, encoded in itertools.islice(records.iter_images(self.data), PICTURES)
            ]
        found = self.predictor([image for _, image in self.pictures])
        cells = [
            cell(str(image_id), image, detections.above(0.3), self.model.classes, {"id": image_id}, self.truth)
            for (image_id, image), detections in zip(self.pictures, found, strict=True)
        ]
        with self.log.events(step):
            tf.summary.image("validation", np.asarray(visualize.sheet(cells))[np.newaxis])


@contextlib.contextmanager
def averaged(model):
    """Within it, the model's weights are their running averages (with train.ema)."""
    averages = runs.ema_weights(model)
    kept = [tf.identity(variable) for variable in model.trainable_variables] if averages else []
    for variable, value in zip(model.trainable_variables, averages, strict=False):
        variable.assign(value)
    try:
        yield
    finally:
        for variable, value in zip(model.trainable_variables, kept, strict=False):
            variable.assign(value)


class Profile(Stepwise):
    """TensorFlow's profiler between two steps; `tensorboard` shows what it wrote into the run directory."""

    def __init__(self, run: Path, done: int, steps: tuple[int, int]):
        super().__init__(done)
        self.run, self.steps, self.started = run, steps, False

    def on_step(self, step, logs):
        if step == self.steps[0]:
            tf.profiler.experimental.start(str(self.run))
            self.started = True
        elif step == self.steps[1]:
            self.on_train_end()

    def on_train_end(self, logs=None):
        if self.started:
            tf.profiler.experimental.stop()
            self.started = False
