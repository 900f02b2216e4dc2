"""The options of a conversion, checked before anything is read."""

from __future__ import annotations

import collections.abc
import numbers
import time
import typing

from polarmask_tf.data import tiles
from polarmask_tf.errors import InputError


class Options(typing.NamedTuple):
    """What decides about every record; see `convert`."""

    masks: bool = False
    verify: bool = False
    strict: bool = False
    max_edges: int = 96
    decoded: bool = False
    allow_outside: bool = False
    exif: str = "auto"
    bit_depth: int | None = None
    min_area: float = 0
    tile: int | None = None
    overlap: int | None = None
    id: str = ""  # of each set that is written


class Work(typing.NamedTuple):
    """How it is done; see `convert`."""

    shards: int | None
    processes: int | None
    crowd_as_instances: bool
    progress: bool
    started: float


def checked(
    *,
    shards: int | None = None,
    processes: int | None = None,
    masks: bool = False,
    verify: bool = False,
    strict: bool = False,
    max_edges: int = 96,
    decoded: bool = False,
    crowd_as_instances: bool = False,
    allow_outside: bool = False,
    exif: str | None = None,
    bit_depth: int | None = None,
    min_area: float = 0,
    tile: int | None = None,
    overlap: int | None = None,
    progress: bool = True,
) -> tuple[Options, Work]:
    """What `convert.convert` takes as keywords; InputError for what is out of bounds."""
    limits = ((shards, 1, "shards"), (processes, 1, "processes"), (max_edges, 8, "max_edges"), (bit_depth, 8, "bit_depth"))
    whole = {"shards": shards, "processes": processes, "bit_depth": bit_depth, "tile": tile, "overlap": overlap}
    for name, given in whole.items():
        _check_type(given, numbers.Integral, name, optional=True)
    _check_type(max_edges, numbers.Integral, "max_edges")
    _check_type(min_area, numbers.Real, "min_area")
    for value, least, name in (*limits, (min_area, 0, "min_area")):
        if value is not None and not value >= least:
            raise InputError(f"{name} is {value}; it must be at least {least}")
    if exif not in (None, "apply", "ignore"):
        raise InputError(f"exif is {exif!r}; it must be apply or ignore")
    if bit_depth and bit_depth > 16:
        raise InputError(f"bit_depth is {bit_depth}; it must be at most 16")
    if tile is None and overlap is not None:
        raise InputError("overlap is of tiles: give tile as well")
    overlap = tiles.check(tile, overlap) if tile else None
    of_all = (masks, verify, strict, max_edges, decoded, allow_outside, exif or "auto", bit_depth, min_area)
    return Options(*of_all, tile, overlap), Work(shards, processes, crowd_as_instances, progress, time.monotonic())


def check_choices(split, classes, group) -> None:
    """InputError for options of convert_dataset that are none, like a text where a list is wanted."""
    for value, name, kind in ((split, "split", numbers.Real), (classes, "classes", str)):
        if isinstance(value, str) or not isinstance(value, collections.abc.Sequence):
            raise InputError(f"{name} is {value!r}; it must be a list")
        for each in value:
            _check_type(each, kind, f"{name} is {value!r}: one value")
    _check_type(group, str, "group", optional=True)


def _check_type(value, kind, name, optional=False):
    if isinstance(value, bool) or not (isinstance(value, kind) or (optional and value is None)):
        what = {str: "text", numbers.Integral: "a whole number", numbers.Real: "a number"}[kind]
        raise InputError(f"{name} is {value!r}; it must be {what}")
