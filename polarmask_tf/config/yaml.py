"""Configs from YAML files that are diffs over one or several `base:` files, plus dotted overrides. Loads no TensorFlow.

Every key that a file or an override may set is a field of schema.Config; anything else is refused with the nearest valid name.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import os
import reprlib
import typing
from pathlib import Path

import yaml

from polarmask_tf.config.schema import Config, check
from polarmask_tf.errors import InputError, did_you_mean, one_line
from polarmask_tf.files import check_regular

# Names of settings that stand in a file of another name: most are rows of the paper's tables that equal another row.
SAME_SETTINGS = {
    "table1a_rays36": "table1",
    "table1b_polar_iou": "table1",
    "table1c_cartesian": "table1",
    "table1d_with_box": "table1",
    "table1e_r50": "paper_1x",
    "table1f_800": "paper_1x",
    "table2_r101": "table1e_r101",
    "table2_x101": "table1e_x101",
    "released": "released_r50_1x",
}

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
_MOST_TEXT = 100_000  # characters of a file; one with every key has 3,000
_MOST_FILES = 100  # that `base:` may lead to
_shown = reprlib.Repr()  # of values in messages: bounded in depth and length
_shown.maxstring = _shown.maxother = 80


def configs_dir() -> Path:
    """Where the shipped YAML files are: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    return next((d for d in (package / "configs", package.parent / "configs") if d.is_dir()), package / "configs")


def find(name: str | os.PathLike) -> Path:
    """A config file by path, or a shipped one by name ("shapes" or "shapes.yaml"). InputError if there is none."""
    found = _find(Path(name), Path())
    if found is None:
        check_regular([Path(name)])
        known = sorted({p.stem for p in configs_dir().glob("*.yaml")} | set(SAME_SETTINGS))
        near = did_you_mean(Path(name).stem, known) or f"; give a path, or one of: {', '.join(known)}"
        raise InputError(f"no config file {_shown.repr(str(name))}{near}")
    return found


def _find(path: Path, folder: Path) -> Path | None:
    candidates = [folder / path]
    if path.parent == Path(".") or path.parts[:1] == ("configs",):
        candidates += [configs_dir() / path.name, configs_dir() / f"{SAME_SETTINGS.get(path.stem, path.name)}.yaml"]
    return next(filter(os.path.isfile, candidates), None)  # neither a directory nor a pipe


def load(name: str | os.PathLike, overrides: typing.Sequence[str] = ()) -> Config:
    """Config from a YAML file (path or shipped name) and overrides like "train.steps=600".

    Raises InputError for an unknown file or key (naming the nearest valid one), a value of the wrong type or out of bounds,
    a cycle of bases, or settings that contradict each other.
    """
    path = find(name)
    return _checked(_read(path), path, overrides)


def loads(text: str, source: str, overrides: typing.Sequence[str] = ()) -> Config:
    """As `load`, of YAML text whose bases are shipped ones; `source` is what messages call it."""
    return _checked(_over_bases(parse(text), Path(source), (), []), Path(source), overrides)


def check_overrides(overrides: typing.Sequence[str]) -> None:
    """InputError for an override that no config could take, like an unknown key."""
    for text in overrides:
        _override(text)


def load_saved(path: Path, overrides: typing.Sequence[str] = ()) -> Config:
    """The config that `dump` wrote into a run directory, also one of an earlier version; raises InputError as `load` does."""
    values = _read(path)
    for old, new in RENAMED.items():
        section, key = old.split(".")
        if isinstance(values.get(section), dict) and key in values[section]:
            value = values[section].pop(key)
            if new:
                values[section].setdefault(new.split(".")[1], value)
    return _checked(values, path, overrides)


def _checked(values: dict, path: Path, overrides: typing.Sequence[str]) -> Config:
    for override in overrides:
        values = _merge(values, _override(override))
    config = _build(Config, values, "", str(path))
    check(config)
    return config


def dump(config: Config) -> str:
    """YAML text that `load` turns into an equal config, without a base."""
    return yaml.safe_dump(to_dict(config), sort_keys=False)


def to_dict(config) -> dict:
    """A config, or a section of one, as dicts, lists, numbers and text."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_dict(cls, values: dict, source: str = "config"):
    """The config, or section of one, of a class of schema.py that `to_dict` made of; InputError names `source`."""
    return _build(cls, values, "", source)


def override(section, values: dict, prefix: str):
    """A section with other values, of the right types and within bounds; InputError names `prefix` and the key."""
    changed = from_dict(type(section), to_dict(section) | values, prefix.rstrip("."))
    check(changed, prefix)
    return changed


class _Loader(yaml.SafeLoader):
    """yaml.safe_load without what YAML allows and no config needs: aliases, a key twice, whole numbers above 64 bits."""

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):  # a few of them make a value of any size
            raise yaml.MarkedYAMLError(problem="aliases (*name) are not taken", problem_mark=self.peek_event().start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key, _ in node.value:
            if key.id == "scalar" and key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"the key {key.value} stands twice", problem_mark=key.start_mark)
            seen.add(key.value if key.id == "scalar" else None)
        return super().construct_mapping(node, deep)

    def construct_int(self, node):
        number = self.construct_yaml_int(node)
        if abs(number) >= 2**63:
            raise yaml.MarkedYAMLError(problem="a whole number of more than 64 bits", problem_mark=node.start_mark)
        return number


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_int)


def parse(text: str, most: int = _MOST_TEXT):
    """The value of YAML text of at most so many characters; ValueError that says what is wrong with it."""
    if len(text) > most:
        raise ValueError(f"longer than {most} characters")
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise ValueError(f"{line}{error.problem}") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except Exception as error:  # of many types: for a date that is none (2021-13-01), a tag that does not fit, a null byte
        raise ValueError(one_line(error) or type(error).__name__) from None


def _override(text: str) -> dict:
    """{"a": {"b": value}} of "a.b=value"."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise InputError(f"override {_shown.repr(text)}: write it as key=value, for example train.steps=600")
    try:
        nested = parse(value)
    except ValueError as error:
        raise InputError(f"override {_shown.repr(text)}: not a YAML value ({error})") from None
    for part in reversed(key.split(".")):
        nested = {part: nested}
    _build(Config, nested, "", f"override {_shown.repr(text)}")  # so that what is wrong is said of this override
    return nested


def _read(path: Path, chain: tuple[Path, ...] = (), files: list[Path] | None = None) -> dict:
    """What a file says over its bases. `chain`: the files that lead to it, `files`: all that were read before."""
    path, files = path.resolve(), [] if files is None else files
    if path in chain:
        raise InputError(f"{path}: the chain of `base:` comes back to this file")
    files.append(path)
    if len(files) > _MOST_FILES:
        raise InputError(f"{files[0]}: `base:` leads to more than {_MOST_FILES} files")
    try:
        with path.open(encoding="utf-8") as file:
            values = parse(file.read(_MOST_TEXT + 1))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({type(error).__name__}); is it a YAML file?") from None
    except ValueError as error:
        raise InputError(f"{path}: not valid YAML: {error}") from None
    return _over_bases(values, path, chain, files)


def _over_bases(values, path: Path, chain: tuple[Path, ...], files: list[Path]) -> dict:
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise InputError(f"{path}: expected `key: value` lines, found {type(values).__name__}")
    bases: typing.Any = values.pop("base", None) or []
    merged: dict = {}
    for base in bases if isinstance(bases, list) else [bases]:  # later ones win
        base_path = _find(Path(str(base)), path.parent)
        if base_path is None:
            raise InputError(f"{path}: base {_shown.repr(base)} does not exist beside it, and is no shipped one")
        merged = _merge(merged, _read(base_path, (*chain, path), files))
    return _merge(merged, values)


def _merge(below: dict, above: dict) -> dict:
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    if "width" in above and "widths" not in above:  # of these two the later counts, as whoever sets it expects
        merged.pop("widths", None)
    return merged


def _build(cls, values, prefix: str, source: str):
    if not isinstance(values, dict):
        raise InputError(f"{source}: {prefix.rstrip('.')} is a section with keys of its own, not {_shown.repr(values)}")
    hints = typing.get_type_hints(cls)
    for key in values:
        if f"{prefix}{key}" in RENAMED:
            now = RENAMED[f"{prefix}{key}"]
            what = f"is called {now} now" if now else f"is gone: {_GONE[prefix + key]}"
            raise InputError(f"{source}: {prefix}{key} {what}")
        if key not in hints:
            near = _nearest(str(key)[:100], prefix)
            written = one_line(f"{prefix}{key}", 100)
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
    """The valid dotted key that the user most likely meant: here by spelling, or the same (old) name in another section."""
    keys = _all_keys(Config)
    names = {**{k: k for k in keys}, **RENAMED}
    same_name = [now for name, now in names.items() if name.rpartition(".")[2] == key and now]
    return next(iter(same_name or difflib.get_close_matches(prefix + key, keys, n=1, cutoff=0.5)), None)


def _convert(hint, value, key: str, source: str):
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise InputError(f"{source}: {key} takes a list, not {_shown.repr(value)}")
        if args[-1] is not Ellipsis and len(value) != len(args):
            raise InputError(f"{source}: {key} takes {len(args)} values, not {len(value)}")
        return tuple(_convert(args[0], v, key, source) for v in value)
    if origin is typing.Literal:
        if not any(value == arg and type(value) is type(arg) for arg in args):  # true is 1 to Python
            raise InputError(f"{source}: {key} is one of {', '.join(map(str, args))}, not {_shown.repr(value)}")
        return value
    if hint is float and not isinstance(value, bool):
        try:
            number = float(value)  # YAML reads 1e-2 (without a point) as text
            if math.isfinite(number):
                return number
        except (TypeError, ValueError, OverflowError):
            pass
    elif hint is str and value is None:  # `val:` and --set data.val=
        return ""
    elif isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    names = {int: "a whole number", float: "a finite number", bool: "true or false", str: "text"}
    raise InputError(f"{source}: {key} takes {names[hint]}, not {_shown.repr(value)}")
