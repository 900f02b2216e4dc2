"""`polarmask configs`: the shipped configs, a line each: what for, what it costs, what it reached. Loads no TensorFlow."""

from __future__ import annotations

import csv
import shutil
import sys
from pathlib import Path

from polarmask_tf.config import configs_dir
from polarmask_tf.files import format_table

COSTS = "costs.csv"  # beside the configs; written by scripts/benchmarks/config_costs.py
_BASE = "A base, not a"  # in the header of files that are no config of their own

_LEGEND = (
    "params: millions; gmac: 10^9 multiply-adds of one image of `input`, 80 classes; cpu_ms: CPU time of that, all threads,",
    "on an AMD EPYC (polarmask benchmark NAME: on yours); ap: mask AP and its source. For own pictures: polarmask init DATA",
)
_COLUMNS = {"params": "parameters_m", "gmac": "gmac", "cpu_ms": "cpu_ms", "input": "input", "ap": "ap"}  # head -> in costs.csv
_LEAST_WIDTH = 100  # of a line; narrower ones would hold numbers alone


def headers() -> dict[str, list[str]]:
    """Name -> the comment lines at the head of each shipped config, without bases."""
    found = {}
    for path in sorted(configs_dir().glob("*.yaml")):
        lines = []
        for line in path.read_text(encoding="utf-8").splitlines():
            if not line.startswith("#"):
                break
            lines.append(line.removeprefix("#").strip())
        if not any(_BASE in line for line in lines):
            found[path.stem] = lines
    return found


def read_costs(folder: Path | None = None) -> dict[str, dict]:
    """Name -> its row of costs.csv: "input", "parameters_m", "gmac", "cpu_ms" and "ap", as text."""
    with open((folder or configs_dir()) / COSTS, newline="", encoding="utf-8") as file:
        return {row["config"]: row for row in csv.DictReader(file)}


def format_configs() -> str:
    """The table that `polarmask configs` prints; in a terminal no line is longer than that is wide."""
    costs = read_costs()
    rows = []
    for name in headers():
        row = costs.get(name, {})
        rows.append({"config": name, **{head: row.get(key, "") for head, key in _COLUMNS.items()}})
    table = format_table(rows, dict.fromkeys(("config", *_COLUMNS), "")).splitlines()
    purposes = ["for", *(lines[0] for lines in headers().values())]
    lines = [f"{line}  {purpose}".rstrip() for line, purpose in zip(table, purposes, strict=True)]
    if sys.stdout.isatty():
        width = max(_LEAST_WIDTH, shutil.get_terminal_size().columns)
        lines = [line if len(line) <= width else f"{line[: width - 3].rstrip()}..." for line in lines]
    return "\n".join([*lines, *_LEGEND])
