"""Notices that another worker of a training is lost, where TensorFlow would wait for it for ever."""

from __future__ import annotations

import contextlib
import os
import sys
import threading

import tensorflow as tf
from tensorflow.python.eager import context  # no public name for collectives' health and abort

from polarmask_tf.errors import InputError
from polarmask_tf.training.replicas import worker

PROBE_EVERY, PROBE_TIMEOUT, PROBES = 1.0, 5.0, 3  # a worker that fails so many probes in a row, for 3 to 18 s, is lost
GRACE = 15.0  # seconds that a training has to end by an exception after a loss, before the process is ended
WORKER_LOST_ERRORS = (
    tf.errors.UnavailableError,
    tf.errors.AbortedError,
    tf.errors.CancelledError,
    tf.errors.FailedPreconditionError,
    tf.errors.DeadlineExceededError,
    tf.errors.InternalError,
)


@contextlib.contextmanager
def worker_watchdog(strategy: tf.distribute.Strategy):
    """Around a training: raises InputError if another worker is lost, within half a minute, where TensorFlow would hang.

    Leaving it waits until every worker has come there, so that workers may finish at different times; after it, nothing may
    be computed together any more. A worker that lives and does not go on is not noticed.
    If the training does not end by itself in time, the process ends with the same line and exit status 2.
    """
    index, number = worker(strategy)
    if number == 1:
        yield
        return
    addresses = strategy.cluster_resolver.cluster_spec().job_tasks("worker")
    failures = {i: 0 for i in range(number) if i != index}
    lost, left, message = threading.Event(), threading.Event(), ""

    def watch():
        nonlocal message
        while max(failures.values()) < PROBES:
            if left.wait(PROBE_EVERY):
                return
            for i in failures:
                failures[i] = 0 if _healthy(i) else failures[i] + 1
        names = ", ".join(f"worker {i} ({addresses[i]})" for i, count in failures.items() if count)
        message = f"lost {names}: start all workers again with the same command; the training goes on from the last checkpoint"
        lost.set()
        context.context().abort_collective_ops(tf.errors.UNAVAILABLE, message)  # ends what waits for the lost worker
        if not left.wait(GRACE):
            with contextlib.suppress(Exception):  # whatever cannot be written, the process is to end
                print(end="", flush=True)
                print(f"\npolarmask: error: {message}", file=sys.stderr, flush=True)
            os._exit(2)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
        _barrier(strategy)
    except WORKER_LOST_ERRORS:
        # TensorFlow may notice first, but does not say whom it misses.
        if not lost.wait(2 * PROBES * (PROBE_EVERY + PROBE_TIMEOUT)):
            raise
        raise InputError(message) from None
    finally:
        left.set()
        watcher.join()


@tf.function
def _barrier(strategy: tf.distribute.Strategy) -> tf.Tensor:
    """Returns when all workers have called it."""
    return strategy.reduce("SUM", strategy.run(lambda: tf.ones([])), axis=None)


def _healthy(index: int) -> bool:
    """Whether a worker answers, and is the process that it was."""
    try:
        context.context().check_collective_ops_peer_health(f"/job:worker/replica:0/task:{index}", int(1000 * PROBE_TIMEOUT))
    except tf.errors.OpError:
        return False
    return True
