"""Configs from YAML files that are diffs over one or several `base:` files, plus dotted overrides. Loads no TensorFlow.

Every key that a file or an override may set is a field of schema.Config; anything else is refused with the nearest valid name.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import typing
from pathlib import Path

import yaml

from polarmask_tf.config.schema import Config, check
from polarmask_tf.errors import InputError

# Keys that runs of earlier versions have in their config.yaml, and what they are called now ("": gone).
RENAMED = {
    "postprocess.candidates": "postprocess.pre_nms_top_k",
    "postprocess.nms_iou": "postprocess.nms_iou_threshold",
    "train.rate_batch": "train.base_batch_size",
    "train.bias_rate": "train.bias_lr_multiplier",
    "train.final_rate": "train.final_lr_fraction",
    "train.decay_steps": "train.lr_boundaries",
    "data.cache": "",
}
_GONE = {"data.cache": "convert the data with `polarmask convert --decoded`"}


def configs_dir() -> Path:
    """Where the shipped YAML files are: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    return next((d for d in (package / "configs", package.parent / "configs") if d.is_dir()), package / "configs")


def find(name: str | os.PathLike) -> Path:
    """A config file by path, or a shipped one by name ("shapes" or "shapes.yaml"). InputError if there is none."""
    path = Path(name)
    shipped = configs_dir() / path.name
    candidates = [path, shipped, shipped.with_name(path.name + ".yaml")]
    for candidate in candidates if path.parent == Path(".") or path.parts[:1] == ("configs",) else [path]:
        if candidate.is_file():
            return candidate
    known = ", ".join(sorted(p.stem for p in configs_dir().glob("*.yaml")))
    raise InputError(f"no config file {str(name)!r}; give a path, or one of: {known}")


def load(name: str | os.PathLike, overrides: typing.Sequence[str] = ()) -> Config:
    """Config from a YAML file (path or shipped name) and overrides like "train.steps=600".

    Raises InputError for an unknown file or key (naming the nearest valid one), a value of the wrong type, a cycle of
    bases, or settings that contradict each other.
    """
    path = find(name)
    values = _read(path, ())
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise InputError(f"override {override!r}: write it as key=value, for example train.steps=600")
        try:
            value = yaml.safe_load(text)
        except (yaml.YAMLError, ValueError):  # ValueError: a date or number that is none, like 2021-13-01
            raise InputError(f"override {override!r}: {text!r} is not a YAML value") from None
        for part in reversed(key.split(".")):
            value = {part: value}
        values = _merge(values, value)
    config = _build(Config, values, "", str(path))
    check(config)
    return config


def load_saved(path: Path) -> Config:
    """The config that `dump` wrote into a run directory, also one of an earlier version; raises InputError as `load` does."""
    values = _read(path, ())
    for old, new in RENAMED.items():
        section, key = old.split(".")
        if isinstance(values.get(section), dict) and key in values[section]:
            value = values[section].pop(key)
            if new:
                values[section].setdefault(new.split(".")[1], value)
    config = _build(Config, values, "", str(path))
    check(config)
    return config


def dump(config: Config) -> str:
    """YAML text that `load` turns into an equal config, without a base."""
    return yaml.safe_dump(to_dict(config), sort_keys=False)


def to_dict(config) -> dict:
    """A config, or a section of one, as dicts, lists, numbers and text."""
    return _plain(dataclasses.asdict(config))


def from_dict(cls, values: dict, source: str = "config"):
    """The config, or section of one, of a class of schema.py that `to_dict` made of; InputError names `source`."""
    return _build(cls, values, "", source)


def _read(path: Path, seen: tuple[Path, ...]) -> dict:
    path = path.resolve()
    if path in seen:
        raise InputError(f"{path}: the chain of `base:` comes back to this file")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError) as e:
        raise InputError(f"{path}: cannot be read ({e.__class__.__name__}); is it a YAML file?") from None
    except (yaml.YAMLError, ValueError) as e:  # ValueError: a date or number that is none, like 2021-13-01
        raise InputError(f"{path}: not valid YAML: {' '.join(str(e).split())}") from None
    if not isinstance(values, dict):
        raise InputError(f"{path}: expected `key: value` lines, found {type(values).__name__}")
    bases, merged = values.pop("base", []), {}
    for base in bases if isinstance(bases, list) else [bases]:  # later ones win
        base_path = path.parent / str(base)
        if not base_path.is_file():
            raise InputError(f"{path}: base {base!r} does not exist beside it")
        merged = _merge(merged, _read(base_path, (*seen, path)))
    return _merge(merged, values)


def _merge(below: dict, above: dict) -> dict:
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _build(cls, values, prefix: str, source: str):
    if not isinstance(values, dict):
        raise InputError(f"{source}: {prefix.rstrip('.')} is a section with keys of its own, not {values!r}")
    hints = typing.get_type_hints(cls)
    for key in values:
        if f"{prefix}{key}" in RENAMED:
            now = RENAMED[f"{prefix}{key}"]
            what = f"is called {now} now" if now else f"is gone: {_GONE[prefix + key]}"
            raise InputError(f"{source}: {prefix}{key} {what}")
        if key not in hints:
            near = _nearest(str(key), prefix)
            written = " ".join(f"{prefix}{key}".split())
            raise InputError(f"{source}: unknown key {written}" + (f"; did you mean {near}?" if near else ""))
    return cls(
        **{
            key: _build(hints[key], value, f"{prefix}{key}.", source)
            if dataclasses.is_dataclass(hints[key])
            else _convert(hints[key], value, prefix + key, source)
            for key, value in values.items()
        }
    )


def _all_keys(cls, prefix: str = "") -> list[str]:
    keys = []
    for key, hint in typing.get_type_hints(cls).items():
        keys += [prefix + key, *(_all_keys(hint, f"{prefix}{key}.") if dataclasses.is_dataclass(hint) else [])]
    return keys


def _nearest(key: str, prefix: str) -> str | None:
    """The valid dotted key that the user most likely meant: here by spelling, or the same name in another section."""
    keys = _all_keys(Config)
    same_name = [k for k in keys if k.rpartition(".")[2] == key]
    return next(iter(same_name or difflib.get_close_matches(prefix + key, keys, n=1, cutoff=0.5)), None)


def _convert(hint, value, key: str, source: str):
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise InputError(f"{source}: {key} takes a list, not {value!r}")
        if args[-1] is not Ellipsis and len(value) != len(args):
            raise InputError(f"{source}: {key} takes {len(args)} values, not {len(value)}")
        return tuple(_convert(args[0], v, key, source) for v in value)
    if origin is typing.Literal:
        if value not in args:
            raise InputError(f"{source}: {key} is one of {', '.join(map(str, args))}, not {value!r}")
        return value
    if hint is float and not isinstance(value, bool):
        try:
            number = float(value)  # YAML reads 1e-2 (without a point) as text
            if math.isfinite(number):
                return number
        except (TypeError, ValueError, OverflowError):
            pass
    elif isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    names = {int: "a whole number", float: "a finite number", bool: "true or false", str: "text"}
    raise InputError(f"{source}: {key} takes {names[hint]}, not {value!r}")


def _plain(value):
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, tuple) else value
