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

    A signal that was ignored before (nohup), or that somebody else takes, stays so. Does nothing outside the main thread.
    """
    names = ("SIGTERM", "SIGHUP") if threading.current_thread() is threading.main_thread() else ()
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    taken = [number for number in numbers if signal.getsignal(number) is signal.SIG_DFL]

    def end(number, _):
        signal.signal(number, signal.SIG_DFL)
        raise Ended(number)

    for number in taken:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)
