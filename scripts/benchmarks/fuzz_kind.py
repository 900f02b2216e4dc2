"""What a kind of input is to fuzz.py, and what counts as a refusal."""

import os
import signal
import time
import typing

from polarmask_tf.errors import InputError


class Refusal(Exception):
    """What the library refuses an input with: InputError, or in lite.py, which stands alone, ValueError."""


class Kind(typing.NamedTuple):
    prepare: typing.Callable  # (folder to work in, OUT) -> function of the bytes of an input; imports what it needs
    seeds: typing.Callable  # OUT -> list of valid inputs
    mutate: typing.Callable  # (random.Random, valid input) -> bytes
    tensorflow: bool = False  # takes its import, or more than a few milliseconds an input


def refusing(function, refusal=InputError):
    def run(data):
        try:
            function(data)
        except refusal as error:
            raise Refusal(str(error)) from None

    return run


def _prepare_self(folder, out):
    """What fuzz.py must see, for its own test."""

    def refuse(text):
        raise InputError(text) if text else ValueError("two\nlines")

    return refusing(
        lambda data: {
            b"taken": lambda: None,
            b"refused": lambda: refuse("no"),
            b"lines": lambda: refuse(""),
            b"bug": lambda: 1 / 0,
            b"crash": lambda: os.kill(os.getpid(), signal.SIGSEGV),
            b"memory": lambda: bytes(3 << 30),
            b"hang": lambda: time.sleep(1000),
        }[data](),
        (InputError, ValueError),
    )


SELF = Kind(_prepare_self, lambda out: [b"taken"], lambda rng, data: data)
