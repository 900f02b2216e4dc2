"""SIGTERM, Ctrl-C and SIGHUP in a training: the step is finished and saved; the exit status is 128 + the signal's number."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
import typing

import tensorflow as tf

from polarmask_tf.training import replicas
from polarmask_tf.training.log import Stepwise

SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name))
ASK_EVERY = 2.0  # seconds after which several workers ask each other again, and the most that a signal may wait for it


class Stopped(SystemExit):
    """A training was ended by a signal, after a step that is saved. The exit status is 128 + the signal's number."""

    def __init__(self, number: int):
        super().__init__(128 + number)
        self.number = number


@contextlib.contextmanager
def noted_signals() -> typing.Iterator[typing.Callable[[], int]]:
    """Within it, the first of SIGNALS is noted, and a second one ends the process at once, with the same status.

    Yields a function that gives the number of the noted signal, or 0. A signal that was ignored before (nohup, a
    background job) stays so. Does nothing outside the main thread, where Python takes no signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: 0
        return
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    handlers = {number: handler for number, handler in handlers.items() if handler not in (signal.SIG_IGN, None)}
    noted: list[int] = []
    # Python calls a handler when the main thread comes back from TensorFlow, which may be never where a worker is lost.
    # What it writes into this pipe, it writes at once, and a thread of its own reads it.
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def listen():
        while (byte := os.read(reader, 1)) != b"\0":
            if byte[0] in handlers:
                if noted:
                    os._exit(128 + byte[0])
                noted.append(byte[0])

    listener = threading.Thread(target=listen, daemon=True)
    listener.start()
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    for number in handlers:
        signal.signal(number, lambda *_: None)
        signal.siginterrupt(number, False)  # nor is a write that it comes into cut short
    try:
        yield lambda: noted[0] if noted else 0
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(before)
        os.write(writer, b"\0")
        listener.join()
        os.close(writer)
        os.close(reader)


class StopOnSignal(Stepwise):
    """Ends the training after the step at which a signal has come to any of the workers, the same step on each of them.

    `number` is then the signal's. Several workers ask each other about every ASK_EVERY seconds: at a step that follows
    from how fast the slowest one was, so that all ask at the same.
    """

    def __init__(self, done: int, strategy: tf.distribute.Strategy, signalled: typing.Callable[[], int]):
        super().__init__(done)
        self.strategy, self.signalled, self.number = strategy, signalled, 0
        _, self.workers = replicas.worker(strategy)
        self.asked, self.ask_at = (done, time.monotonic()), done + 1

    def on_step(self, step, logs):
        if self.workers == 1:
            self.number = self.signalled()
        elif step >= self.ask_at:
            now = time.monotonic()
            pace = (now - self.asked[1]) / (step - self.asked[0])
            answers = replicas.all_gather(self.strategy, [[self.signalled(), pace]])
            self.number = max(number for number, _ in answers)
            slowest = max(pace for _, pace in answers)
            self.asked, self.ask_at = (step, now), step + max(1, min(100, int(ASK_EVERY / max(slowest, 1e-3))))
        if self.number:
            self.model.stop_training = True

    def check(self) -> None:
        """Stopped if a signal came, for what need not be finished. Several workers finish it: they could not agree here."""
        if self.workers == 1 and self.signalled():
            raise Stopped(self.signalled())
