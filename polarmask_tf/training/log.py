"""The progress line, metrics.csv and TensorBoard's events of a training."""

from __future__ import annotations

import contextlib
import csv
import io
import math
import shutil
import sys
import time
from pathlib import Path

import tensorflow as tf
import tf_keras
from tqdm import tqdm

from polarmask_tf.errors import InputError
from polarmask_tf.files import atomic_write, io_error_text

LOG_EVERY = 20
SECONDS_A_LINE = 30  # where there is no terminal for a bar
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

    Losses are means since the row before. Of a run that goes on, later rows of metrics.csv are dropped. The bar's time
    begins at the end of the first step, which takes as long as hundreds: it is traced then.
    """

    def __init__(self, run: Path, done: int, steps: int, chief: bool):
        super().__init__(done)
        self.run, self.steps, self.before = run, steps, None
        with self._written():
            self.writer = tf.summary.create_file_writer(str(run)) if chief else tf.summary.create_noop_writer()
        self.chief, self.bar, self.said = chief, None, -math.inf
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
        if self.bar is None:
            self.began = self.since = (time.monotonic(), step)
            show = self.chief and sys.stderr.isatty()
            form = "{desc} {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
            options = {"bar_format": form, "ncols": shutil.get_terminal_size().columns, "mininterval": 1.0}
            self.bar = tqdm(desc="train", total=self.steps, initial=step, disable=not show, **options)
        else:
            self.bar.update(1)
        if step % LOG_EVERY and step != self.steps:
            return
        now = time.monotonic()
        speed = (step - self.since[1]) * self.model.config.data.batch / max(now - self.since[0], 1e-9)
        self.since = (now, step)
        values = {name: float(logs[name]) for name in ("loss", *self.model.loss_names)}
        self.model.reset_metrics()  # the next losses are means since this step
        self._show(step, values, speed, now)
        self.add(step, {**values, "learning_rate": float(self.model.optimizer.lr.numpy()), "images_per_second": speed})

    def _show(self, step, values, speed, now):
        left = (self.steps - step) * (now - self.began[0]) / max(step - self.began[1], 1)
        ends = f"ends about {time.strftime('%H:%M', time.localtime(time.time() + left))}"
        losses = [f"{name} {value:.3f}" for name, value in values.items()]
        if not self.bar.disable:
            room = shutil.get_terminal_size().columns - len(f"train {self.steps}/{self.steps} [00:00:00<00:00:00, ]")
            while len(losses) > 1 and len(" ".join(losses)) > room:
                losses.pop()
            self.bar.set_postfix_str(" ".join(losses), refresh=False)
            if self.said < 0:
                self.said = now
                self.bar.write(f"{ends}, evaluations aside", file=sys.stderr)
        elif self.chief and (now - self.said >= SECONDS_A_LINE or step == self.steps):
            self.said = now
            rest = f"{speed:.0f} images/s, {left / 60:.1f} min left" + (f", {ends}" if step < self.steps else "")
            print(f"step {step}/{self.steps}: {' '.join(losses)}, {rest}", file=sys.stderr)

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
        if self.bar:
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


def summarize(run: Path) -> str:
    """The evaluations of a run in one line, or ""."""
    rows = [row for row in read_metrics(run) if "AP" in row]
    if not rows:
        return ""
    last, best = rows[-1], max(rows, key=lambda row: row["AP"])
    text = f"AP {last['AP']:.3f} (AP50 {last.get('AP50', math.nan):.3f}) after step {last['step']}"
    better = best["AP"] > last["AP"]
    return text + (f", best {best['AP']:.3f} after step {best['step']} ({run / 'best'})" if better else "")


def ap_history(rows: list[dict]) -> list[float]:
    """The APs among the rows of read_metrics, in their order."""
    return [row["AP"] for row in rows if "AP" in row]


def patience_exhausted(history: list[float], patience: int) -> bool:
    """Whether the last `patience` of these APs brought no better one; never with patience 0."""
    return bool(patience and history) and len(history) - 1 - history.index(max(history)) >= patience
