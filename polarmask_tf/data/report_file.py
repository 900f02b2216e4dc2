"""What a conversion says at its end: on the terminal, and the same in report.json."""

from __future__ import annotations

import json
import math
import typing
from collections import Counter
from pathlib import Path

from polarmask_tf.data.dataset import DatasetInfo
from polarmask_tf.data.report import Report
from polarmask_tf.data.sources.source import Source
from polarmask_tf.errors import counted, one_line
from polarmask_tf.files import atomic_write

FORMAT = "polarmask_tf report/1"
SIDES = (0, 8, 16, 32, 64, 128, 256, 512)  # where a class of sizes begins: sqrt(area), in pixels of the picture
_MOST_CLASSES = 12  # that are printed


class WrittenSet(typing.NamedTuple):
    """A set, what was skipped in writing it, and its instances (no crowds) by label and by side_of their area."""

    info: DatasetInfo
    report: Report
    labels: Counter
    areas: Counter
    drawn: int  # of the instances, those whose masks have a pixel


def side_of(area: float) -> int:
    """The class of sizes, one of SIDES, of an object with an area in square pixels."""
    side = math.sqrt(area)
    return max(least for least in SIDES if least <= side)


def content(out: Path, sources: list[Source], sets: dict[str, WrittenSet], total: Report) -> dict:
    """The content of report.json; of an unsplit conversion the name of the set is ""."""
    return {
        "format": FORMAT,
        "sources": [
            {
                "path": str(source.path),
                "format": source.format,
                "split": source.split,
                "images": len(source.images),
                "annotations": sum(len(image["annotations"]) for image in source.images),
            }
            for source in sources
        ],
        "sets": [
            {
                "name": name,
                "images": each.info.num_images,
                "instances": each.info.num_instances,
                "crowd": each.info.num_crowd,
                "instances_per_class": {name: each.labels[label] for label, name in enumerate(_keys(each.info))},
                "sizes": {_span(least): each.areas[least] for least in SIDES},
                "max_instances": each.info.max_instances,
            }
            for name, each in sets.items()
        ],
        "skipped": _rows(total.skipped),
        "notes": _rows(total.notes),
    }


def _keys(info):
    """The names of the classes, with their ids where it is not the only one of its name."""
    alike = Counter(entry["name"] for entry in info.classes)
    return [e["name"] if alike[e["name"]] == 1 else f"{e['name']} ({e['category_id']})" for e in info.classes]


def _span(least):
    place = SIDES.index(least) + 1
    return f"{least}-{SIDES[place]}" if place < len(SIDES) else f"{least}-"


def _rows(found):
    return [{"reason": reason, "count": count, "first": first} for reason, (count, first) in found.items()]


def write(out: Path, sources: list[Source], sets: dict[str, WrittenSet], total: Report) -> None:
    atomic_write(out / "report.json", json.dumps(content(out, sources, sets, total), indent=1))


def text(sets: dict[str, WrittenSet], total: Report, speed: float) -> str:
    lines = []
    for info, _, labels, areas, _ in sets.values():
        objects = f"{counted(info.num_instances, 'instance')} ({info.num_crowd} crowd)"
        rest = f"{counted(len(info.classes), 'class', 'classes')}, {counted(len(info.shard_paths), 'shard')}"
        lines.append(f"{info.directory}: {counted(info.num_images, 'image')}, {objects}, {rest}, {speed:.0f} images/s")
        if not info.num_instances:
            lines.append("  note: no annotations: images of background alone, which `polarmask train` refuses")
            continue
        counts = sorted(range(len(info.classes)), key=lambda label: -labels[label])
        keys = _keys(info)
        shown = [f"{one_line(keys[label], 40)} {labels[label]}" for label in counts[:_MOST_CLASSES]]
        more = f", and {len(counts) - _MOST_CLASSES} more in report.json" if len(counts) > _MOST_CLASSES else ""
        lines.append(f"  classes: {', '.join(shown)}{more}")
        sizes = ", ".join(f"{_span(least)}: {areas[least]}" for least in SIDES if areas[least])
        lines.append(f"  sizes (square root of the area, in pixels): {sizes}")
    return "\n".join([*lines, *(f"  {line}" for line in total.lines())])
