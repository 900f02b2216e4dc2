"""Writes docs/settings.md: every setting of polarmask_tf/config/schema.py and the comments beside it. Loads no TensorFlow."""

from __future__ import annotations

import ast
import dataclasses
import io
import json
import re
import tokenize
import typing
from pathlib import Path

from polarmask_tf.config import schema

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "settings.md"
HEAD = """# All settings

Written by `scripts/docs_settings.py` from `polarmask_tf/config/schema.py`; what you see is what the program checks.

A config is a YAML file with some of these keys over a base, or none; `--set` changes one of them for one command. What none of
the files names has the default below. An unknown key, a value out of bounds, or two that contradict each other are refused
in one line. `polarmask init` writes the few that depend on your pictures ([choosing](choosing.md)).
```yaml
base: small.yaml
data:
  size: [384, 512]
train:
  steps: 2000
```
```bash
polarmask train --config mine.yaml --data data --out runs/mine --set train.learning_rate=0.002
```
"""
TITLES = {
    "": "Of the whole",
    "model": "The network",
    "model.backbone": "Backbone",
    "model.fpn": "Feature pyramid",
    "model.head": "Head",
    "data": "Data",
    "targets": "Targets",
    "loss": "Losses",
    "postprocess": "From the network's outputs to objects",
    "train": "Training",
}


def comments(source: str) -> dict[tuple[str, str], str]:
    """(class, field) -> the comment above the field and beside its lines, as one text."""
    lines = source.splitlines()
    on_line = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            on_line[token.start[0]] = token.string.removeprefix("#").strip()
    found = {}
    for body in ast.parse(source).body:
        for entry in getattr(body, "body", ()) if isinstance(body, ast.ClassDef) else ():
            if isinstance(entry, ast.AnnAssign) and isinstance(entry.target, ast.Name) and entry.end_lineno:
                first = entry.lineno
                while lines[first - 2].lstrip().startswith("#"):
                    first -= 1
                texts = [on_line[line] for line in range(first, entry.end_lineno + 1) if line in on_line]
                found[body.name, entry.target.id] = " ".join(texts)
    return found


def kind(hint) -> str:
    """A field's type in words."""
    plain = {int: "whole number", float: "number", bool: "`true` or `false`", str: "text"}
    if hint in plain:
        return plain[hint]
    parts = typing.get_args(hint)
    if typing.get_origin(hint) is typing.Literal:
        return ", ".join(f"`{part}`" for part in parts)
    if parts[-1] is Ellipsis:
        return f"list of {plural(kind(parts[0]))}"
    return f"{len(parts)} {plural(kind(parts[0]))}"


def plural(text: str) -> str:
    return f"pairs of {text[2:]}" if text.startswith("2 ") else f"{text}s"


def bounds(entry: dataclasses.Field) -> str:
    need = entry.metadata.get("need", "")
    return re.sub(r"^(?:a number|numbers) from |,? (?:is|are) needed", "", need)


def default(value) -> str:
    if dataclasses.is_dataclass(value):
        return ""
    return f"`{value}`" if isinstance(value, str) and value else f"`{json.dumps(value)}`"


def sections(config: type, prefix: str = "") -> typing.Iterator[tuple[str, type]]:
    """(key of the section, its class), the whole first."""
    yield prefix, config
    for name, hint in typing.get_type_hints(config).items():
        if dataclasses.is_dataclass(hint):
            yield from sections(typing.cast(type, hint), f"{prefix}.{name}".lstrip("."))


def page() -> str:
    """The text of docs/settings.md."""
    meaning = comments(Path(schema.__file__).read_text(encoding="utf-8"))
    parts = [HEAD]
    for key, section in sections(schema.Config):
        hints = typing.get_type_hints(section)
        rows = []
        for entry in dataclasses.fields(section):
            if dataclasses.is_dataclass(hints[entry.name]):
                continue
            given = entry.default if entry.default is not dataclasses.MISSING else None
            text = meaning[section.__name__, entry.name]
            text = text.replace("see Conventions", "see [released weights](released.md)")
            if text.partition(":")[0] not in {*typing.get_args(hints[entry.name]), "sgd"}:
                text = text[:1].upper() + text[1:]
            text = re.sub(r"docs/(\w+)\.md", r"[\1](\1.md)", text)
            name = f"{key}.{entry.name}".lstrip(".")
            cells = (f"`{name}`", kind(hints[entry.name]), default(given), bounds(entry), text)
            rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        table = ("| key | value | default | bounds | meaning |", "|---|---|---|---|---|", *rows)
        parts.append("\n".join((f"## {TITLES[key]}", "", *table, "")))
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE.relative_to(ROOT))
