"""What happens between the steps of `fit`: the progress line, logs, checkpoints, evaluation."""

from __future__ import annotations

import contextlib
import csv
import io
import itertools
import json
import math
import time
from pathlib import Path

import numpy as np
import tensorflow as tf
import tf_keras
from tqdm import tqdm

from polarmask_tf.data import records
from polarmask_tf.errors import InputError
from polarmask_tf.files import atomic_write, io_error_text
from polarmask_tf.inference import visualize
from polarmask_tf.inference.evaluate import evaluate
from polarmask_tf.inference.predict import cell
from polarmask_tf.inference.predictor import read_image, run_predictor
from polarmask_tf.training import replicas
from polarmask_tf.training.watchdog import WORKER_LOST_ERRORS
from polarmask_tf.weights import runs

LOG_EVERY = 20
PICTURES = 4
APS = ("AP", "AP50", "AP75")


class NotFinite(Exception):
    """The loss or a weight is infinite or not a number."""

    def __init__(self, what: str, step: int):
        super().__init__(what)
        self.step = step


class Stepwise(tf_keras.callbacks.Callback):
    """A callback that is told how many steps the model has been trained for, those before an interruption included."""

    def __init__(self, done: int):
        super().__init__()
        self.step = done
        self._supports_tf_logs = True  # Keras would wait for the device after every step to make numbers of the logs

    def on_train_batch_end(self, batch, logs=None):
        self.step += 1
        self.on_step(self.step, logs)


class Log(Stepwise):
    """The progress line, metrics.csv and TensorBoard scalars every 20 steps, by the chief; stops where the loss is not finite.

    Losses are means since the last checkpoint. Of a run that goes on, later rows of metrics.csv are dropped.
    """

    def __init__(self, run: Path, done: int, steps: int, chief: bool):
        super().__init__(done)
        self.run, self.steps, self.before = run, steps, None
        with self._written():
            self.writer = tf.summary.create_file_writer(str(run)) if chief else tf.summary.create_noop_writer()
        self.since = (time.monotonic(), done)
        self.bar = tqdm(
            total=steps, initial=done, unit="step", desc="train", mininterval=1.0, smoothing=0.05, disable=not chief
        )
        self.file = run / "metrics.csv" if chief else None
        self.rows = [row for row in read_metrics(run) if row["step"] <= done]

    def on_train_begin(self, logs=None):
        self.names = ("loss", *self.model.loss_names, "learning_rate", "images_per_second", *APS)
        if self.file:
            with io.StringIO(newline="") as text:
                self._write(text, *self.rows, header=True)
                atomic_write(self.file, text.getvalue())

    def _write(self, file, *rows, header=False):
        writer = csv.DictWriter(file, ("step", *self.names))
        if header:
            writer.writeheader()
        writer.writerows(rows)

    def on_step(self, step, logs):
        # The loss of the step before: this one's may still be on its way from the device.
        if self.before is not None and not math.isfinite(float(self.before["loss"])):
            raise NotFinite("the loss is not finite", step - 1)
        self.before = logs
        self.bar.update(1)
        if step % LOG_EVERY and step != self.steps:
            return
        now = time.monotonic()
        speed = (step - self.since[1]) * self.model.config.data.batch / max(now - self.since[0], 1e-9)
        self.since = (now, step)
        values = {name: float(logs[name]) for name in ("loss", *self.model.loss_names)}
        self.bar.set_postfix_str(
            " ".join(f"{name} {value:.3f}" for name, value in values.items()) + f", {speed:.0f} images/s", refresh=False
        )
        self.add(step, {**values, "learning_rate": float(self.model.optimizer.lr.numpy()), "images_per_second": speed})

    def check(self, step: int) -> None:
        """NotFinite if the loss up to this step or a weight is not finite: for what must not be written."""
        if self.before is not None and not math.isfinite(float(self.before["loss"])):
            raise NotFinite("the loss is not finite", step)
        if not all(tf.reduce_all(tf.math.is_finite(v)) for v in self.model.trainable_variables):
            raise NotFinite("a weight is not finite", step)

    def add(self, step: int, values: dict) -> None:
        """One row of metrics.csv, and TensorBoard scalars."""
        row = {"step": step, **{name: rounded(value) for name, value in values.items()}}
        self.rows.append(row)
        if self.file:
            try:
                with open(self.file, "a", newline="") as file:
                    self._write(file, row)
            except OSError as e:
                raise InputError(f"{self.file}: cannot be written: {io_error_text(e)}") from None
        with self.events(step):
            for name, value in values.items():
                tf.summary.scalar(name, value)

    @contextlib.contextmanager
    def events(self, step: int):
        """What tf.summary is given within it goes to TensorBoard's file."""
        with self._written(), self.writer.as_default(step):
            yield

    @contextlib.contextmanager
    def _written(self):
        try:
            yield
        except tf.errors.OpError as e:
            raise InputError(f"{self.run}: cannot write events for TensorBoard: {io_error_text(e)}") from None

    def close(self):
        """Also after an error, of which Keras does not tell: the message is to stand on a line of its own."""
        self.bar.close()
        with contextlib.suppress(tf.errors.OpError):  # of events that could not be written; the others have been
            self.writer.close()


def rounded(value: float) -> float:
    """As it stands in metrics.csv: what is compared must be the same after an interruption."""
    return float(f"{value:.6g}")


def read_metrics(run: Path) -> list[dict]:
    """The rows of a run's metrics.csv with a step and at least one number, as numbers; a line cut by a kill is left out."""
    rows = []
    with contextlib.suppress(OSError), open(run / "metrics.csv", newline="", errors="replace") as file:
        for row in csv.DictReader(file):
            with contextlib.suppress(ValueError, TypeError):
                rows.append({k: int(v) if k == "step" else float(v) for k, v in row.items() if v})
    return [row for row in rows if len(row) > 1 and "step" in row]


def ap_history(rows: list[dict]) -> list[float]:
    """The APs among the rows of read_metrics, in their order."""
    return [row["AP"] for row in rows if "AP" in row]


def patience_exhausted(history: list[float], patience: int) -> bool:
    """Whether the last `patience` of these APs brought no better one; never with patience 0."""
    return bool(patience and history) and len(history) - 1 - history.index(max(history)) >= patience


def save(model, run: Path, step: int, strategy, **options) -> None:
    """runs.save by all workers of a strategy; that one is lost is the watchdog's to tell."""
    _, workers = replicas.worker(strategy)
    runs.save(model, run, step, chief=replicas.is_chief(strategy), passing=WORKER_LOST_ERRORS if workers > 1 else (), **options)


class Checkpoints(Stepwise):
    """Saves model and optimizer every train.checkpoint_every steps and at the last step, and ends the training there."""

    def __init__(self, run: Path, done: int, strategy, log: Log):
        super().__init__(done)
        self.run, self.strategy, self.log = run, strategy, log

    def on_step(self, step, logs):
        train = self.model.config.train
        if step % train.checkpoint_every == 0 or step >= train.steps or self.model.stop_training:
            self.log.check(step)
            replicas.average_batch_norm(self.model)
            save(self.model, self.run, step, self.strategy)
        if step >= train.steps:
            self.model.stop_training = True


class Evaluation(Stepwise):
    """COCO evaluation on data.val every train.evaluate_every steps and at the last one; the best model goes to run/best.

    All replicas of all workers take their share of the images. Ends the training after train.patience evaluations
    without a better AP.
    """

    def __init__(self, run: Path, done: int, strategy, log: Log):
        super().__init__(done)
        self.run, self.strategy, self.log = run, strategy, log
        self.chief = replicas.is_chief(strategy)
        self.truth, self.pictures = None, []

    def set_model(self, model):
        super().set_model(model)
        _, workers = replicas.worker(self.strategy)
        devices = self.strategy.num_replicas_in_sync // workers
        self.predictor = run_predictor(model, strategy=self.strategy, devices=devices)

    def on_step(self, step, logs):
        config = self.model.config
        if step % config.train.evaluate_every and step != config.train.steps:
            return
        self.log.check(step)
        replicas.average_batch_norm(self.model)
        before = ap_history(self.log.rows)
        with averaged(self.model):
            metrics = evaluate(
                self.predictor,
                config.data.val,
                progress=self.chief,
                worker=replicas.worker(self.strategy),
                gather=lambda results: replicas.all_gather(self.strategy, results),
            )
            values = {name: rounded(metrics.values[name]) for name in APS}
            if values["AP"] > max(before, default=-2.0):
                save(self.model, self.run / "best", step, self.strategy, keep=1, weights_only=True)
                if self.chief:
                    self._describe_best(step, metrics)
            if self.chief:
                self._draw(step)
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

    def _draw(self, step):
        """The first validation images, truth beside prediction, for TensorBoard."""
        data = self.model.config.data.val
        if self.truth is None:
            self.truth = records.read_ground_truth(data)
            self.pictures = [
                (image_id, read_image(io.BytesIO(encoded)))
                for image_id, encoded in itertools.islice(records.iter_images(data), PICTURES)
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
