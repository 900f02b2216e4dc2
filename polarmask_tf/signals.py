"""SIGTERM and SIGHUP end a command as Ctrl-C does: by an exception, so that nothing half-written stays behind."""

from __future__ import annotations

import contextlib
import signal
import threading
import typing


class Ended(SystemExit):
    """The command was ended by a signal; the exit status is 128 + its number."""

    def __init__(self, number: int):
        super().__init__(128 + number)
        self.name = signal.Signals(number).name


@contextlib.contextmanager
def unwinding() -> typing.Iterator[None]:
    """Within it, the first of these signals raises Ended, and a second one ends the process at once.

    That is what leaves here also where a library makes another exception of it, or of KeyboardInterrupt (NumPy, a TypeError
    while it reads a mask of pycocotools). A signal that was ignored before (nohup), or that somebody
    else takes, stays so. Does nothing outside the main thread.
    """
    names = ("SIGTERM", "SIGHUP", "SIGINT") if threading.current_thread() is threading.main_thread() else ()
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    usual = {number: signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL for number in numbers}
    taken = [number for number in numbers if signal.getsignal(number) is usual[number]]
    reasons: list[BaseException] = []

    def end(number, _):
        signal.signal(number, usual[number])
        reasons.append(KeyboardInterrupt() if number == signal.SIGINT else Ended(number))
        raise reasons[-1]

    for number in taken:
        signal.signal(number, end)
    try:
        yield
    except Exception:
        if reasons:
            raise reasons[0] from None
        raise
    finally:
        for number in taken:
            signal.signal(number, usual[number])
