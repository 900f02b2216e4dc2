"""Tasks of `convert` in several processes, which end with their parent and leave Ctrl-C to it."""

import contextlib
import multiprocessing
import os
import signal
import threading
import typing
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool

from polarmask_tf.errors import InputError


class _Stopped(Exception):
    """Another process failed, or the user pressed Ctrl-C."""


def run_tasks(work: typing.Callable, tasks: list, processes: int, bar) -> list:
    """[work(task, after_each), ...] in so many processes, 1 being this one; `after_each()` moves the tqdm `bar` by one.

    The first error of a process ends all of them and is raised here; InputError if a process dies.
    """
    if processes == 1:
        return [work(task, bar.update) for task in tasks]
    # Spawned, not forked: the caller may have TensorFlow's threads running.
    context = multiprocessing.get_context("spawn")
    with _ctrl_c_held():  # starts a process too, which complains of semaphores that were made and not yet noted down
        stop, done = context.Event(), context.Value("q", 0)
        pool = ProcessPoolExecutor(processes, mp_context=context, initializer=_start_process, initargs=(stop, done))
    try:
        with _ctrl_c_held():
            futures = [pool.submit(_in_process, work, task) for task in tasks]
        pending = set(futures)
        while pending:
            finished, pending = wait(pending, timeout=0.2, return_when=FIRST_EXCEPTION)
            bar.update(done.value - bar.n)
            for future in finished:
                future.result()
        return [future.result() for future in futures]
    except BrokenProcessPool as error:
        why = "out of memory, or the calling script lacks `if __name__ == '__main__':`"
        raise InputError(f"a worker process died: {why}; try fewer --processes") from error
    finally:
        stop.set()
        pool.shutdown(wait=True, cancel_futures=True)


@contextlib.contextmanager
def _ctrl_c_held():
    """Ctrl-C, which reaches every process of a terminal, is the parent's to handle, and only after this block.

    Processes that start within inherit the blocked signal, so that not even one that is still importing shows a traceback. The
    parent has other threads, which take the signal when this one blocks it: its handler must wait, too.
    """
    came = []
    ours = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) is not None
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    handler = signal.signal(signal.SIGINT, lambda *_: came.append(True)) if ours else None
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if ours:
            signal.signal(signal.SIGINT, handler)
    if came:
        signal.raise_signal(signal.SIGINT)


def _start_process(stop, done):
    # A parent that was killed cannot set anything: its end is watched for.
    threading.Thread(target=lambda: (multiprocessing.parent_process().join(), os._exit(1)), daemon=True).start()
    _start_process.shared = stop, done


def _in_process(work, task):
    stop, done = _start_process.shared

    def count():
        with done.get_lock():
            done.value += 1
        if stop.is_set():
            raise _Stopped

    return work(task, count)
