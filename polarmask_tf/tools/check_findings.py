"""What `polarmask check` saw, and what of it is likely to cost accuracy."""

from __future__ import annotations

import collections
import dataclasses
import math

import numpy as np

from polarmask_tf import config as configs
from polarmask_tf.config import Config
from polarmask_tf.data.dataset import DatasetInfo
from polarmask_tf.data.report import Report
from polarmask_tf.errors import counted, one_line
from polarmask_tf.files import format_table
from polarmask_tf.ops import targets

SIZES = (256, 320, 416, 512, 640, 800, 1024)  # longer side of the input, tried for small objects
FEW = 20  # objects of a class that is rare
TWICE = 0.9  # mask IoU of two objects of an image, from which on they are one
TOLERATED = 0.05  # part of the objects that may be smaller than a stride


@dataclasses.dataclass
class Findings:
    """What was seen of a data set. Sizes are pixels of the images; `shorter` is the shorter side of an object's box."""

    info: DatasetInfo
    config: Config
    images: int = 0
    shorter: list[float] = dataclasses.field(default_factory=list)  # of each object
    scaled: list[float] = dataclasses.field(default_factory=list)  # the same, at the config's input
    longest: list[int] = dataclasses.field(default_factory=list)  # longer side of the object's image
    labels: list[int] = dataclasses.field(default_factory=list)
    ceilings: list[tuple[int, float]] = dataclasses.field(default_factory=list)  # label and ceiling of the first objects
    finer: list[float] = dataclasses.field(default_factory=list)  # ceilings of these objects with twice as many rays
    images_of: collections.Counter = dataclasses.field(default_factory=collections.Counter)  # label -> images that have it
    unlabelled: list[str] = dataclasses.field(default_factory=list)
    unreadable: list[str] = dataclasses.field(default_factory=list)
    twice: list[str] = dataclasses.field(default_factory=list)  # objects that were annotated twice
    small: list[str] = dataclasses.field(default_factory=list)  # objects without a location, since they are too small
    hidden: list[str] = dataclasses.field(default_factory=list)  # objects without a location, since smaller ones have them
    pixels: dict[bytes, list[str]] = dataclasses.field(default_factory=dict)  # digest of a picture -> names
    surplus: int = 0  # objects beyond data.max_instances
    report: Report = dataclasses.field(default_factory=Report)


def warnings_of(found: Findings) -> list[str]:
    """What is likely to cost accuracy, each in a line that says what to do."""
    info, config, objects = found.info, found.config, len(found.shorter)
    stride, size = 2 ** config.model.fpn.levels[0], configs.input_size(config.data)
    lines = []
    if found.unlabelled:
        lines.append(
            f"{len(found.unlabelled)} of {found.images} images have no object and teach background alone: "
            f"{some(found.unlabelled)}; leave out what is only not labelled yet"
        )
    same = [names for names in found.pixels.values() if len(names) > 1]
    if same:
        pairs = some([" = ".join(names[:3]) for names in same])
        lines.append(f"images that are there twice, {sum(map(len, same)) - len(same)}: {pairs}; keep one of each")
    if found.twice:
        lines.append(
            f"objects that are there twice, with masks of an IoU above {TWICE:g}, {len(found.twice)}: {some(found.twice)}"
        )
    tiny = int((np.array(found.scaled) < stride).sum())
    if tiny > TOLERATED * objects:
        lines.append(
            f"{100 * tiny / objects:.0f} % of the objects ({tiny:,}) are under {stride} px, the stride of "
            f"P{config.model.fpn.levels[0]}, at data.size {list(size)}: {_larger(found, stride)}"
        )
    for what, which in (("too small", found.small), ("hidden by smaller ones", found.hidden)):
        if which:
            lines.append(f"objects that no location learns at this size, since they are {what}, {len(which)}: {some(which)}")
    if found.surplus:
        most = f"data.max_instances is {config.data.max_instances}"
        lines.append(
            f"objects beyond it, which are ignored, {found.surplus}: {most}, --set data.max_instances={info.max_instances}"
        )
    if lost := targets.unreachable_levels(config.model.fpn.levels, size, config.targets.ranges):
        lines.append(
            f"{', '.join(f'P{level}' for level in lost)} can get no object at data.size {list(size)}: shorten model.fpn.levels"
        )
    per_class = np.bincount(found.labels, minlength=len(info.classes))
    for what, chosen in (
        ("no object of", per_class == 0),
        (f"fewer than {FEW} objects of", (per_class > 0) & (per_class < FEW)),
        (
            "less than a hundredth of the commonest class are",
            (per_class >= FEW) & (per_class < 0.01 * per_class.max(initial=0)),
        ),
    ):
        if chosen.any():
            lines.append(f"{what} {some([info.classes[k]['name'] for k in np.flatnonzero(chosen)])}")
    low = [iou for _, iou in found.ceilings if iou < 0.5]
    if len(low) > TOLERATED * len(found.ceilings):
        what = f"{100 * len(low) / len(found.ceilings):.0f} % of the objects cannot be found at IoU 0.5 even by perfect rays"
        lines.append(f"{what}: they are not star-shaped, or in parts; see polarmask upper-bound")
    return lines


def _larger(found, stride) -> str:
    """What to set so that fewer objects are small."""
    longest, shorter = np.array(found.longest), np.array(found.shorter)
    most = 2 * float(np.median(longest))  # beyond, images are blown up for nothing
    levels, now = found.config.model.fpn.levels, max(configs.input_size(found.config.data))
    advice = []
    for size in SIZES:
        if now < size <= most and (shorter * size / longest < stride).mean() <= TOLERATED:
            advice.append(f"--set 'data.size=[{size},{size}]'")
            break
    if levels[0] > 2 and (np.array(found.scaled) < stride / 2).mean() <= TOLERATED:
        advice.append(f"--set 'model.fpn.levels={[levels[0] - 1, *levels]}'".replace(", ", ","))
    tiles = "cut the images into tiles" if most > SIZES[-1] else "they are as small in the images, which should be larger"
    return " or ".join(advice) or tiles


def format_findings(found: Findings, warnings: list[str]) -> str:
    """The printed report."""
    info, objects = found.info, len(found.shorter)
    classes = counted(len(info.classes), "class", "classes")
    lines = [f"{counted(found.images, 'image')}, {counted(objects, 'object')} to learn, {classes}"]
    if objects:
        shorter, longest, labels = (np.array(values) for values in (found.shorter, found.longest, found.labels))
        rows = []
        for label, entry in sorted(enumerate(info.classes), key=lambda pair: -int((labels == pair[0]).sum()))[:20]:
            of = shorter[labels == label]
            mine = [iou for known, iou in found.ceilings if known == label]
            row = {"class": one_line(entry["name"], 40), "objects": len(of), "images": found.images_of[label]}
            row["median px"] = f"{np.median(of):.0f}" if len(of) else "-"
            rows.append({**row, "ceiling": f"{np.mean(mine):.3f}" if mine else "-"})
        lines += ["", format_table(rows, {"class": "", "objects": ",", "images": ",", "median px": "", "ceiling": ""})]
        if len(info.classes) > len(rows):
            lines.append(f"  and {counted(len(info.classes) - len(rows), 'class', 'classes')} with fewer objects")
        every, rays = [iou for _, iou in found.ceilings], found.config.model.rays
        lines += [
            "",
            f"Ceiling: perfect polygons of {rays} rays reach a mean IoU of {np.mean(every):.3f} with the masks, "
            f"of {2 * rays} rays {np.mean(found.finer):.3f} ({counted(len(every), 'object')}).",
            "",
            "Shorter side of the objects' boxes, by the longer side of the network's input:",
        ]
        now = max(configs.input_size(found.config.data))
        most = 2 * np.median(longest)
        sizes = {size: shorter * size / longest for size in SIZES if size <= most} | {now: np.array(found.scaled)}
        columns = {
            "under 8 px": (0, 8),
            "8 to 16": (8, 16),
            "16 to 32": (16, 32),
            "32 to 96": (32, 96),
            "over 96": (96, math.inf),
        }
        rows = [
            {"input": f"{size}{' (config)' if size == now else ''}"}
            | {name: f"{100 * ((of >= low) & (of < high)).mean():.0f} %" for name, (low, high) in columns.items()}
            for size, of in sorted(sizes.items())
        ]
        lines.append(format_table(rows, dict.fromkeys(["input", *columns], "")))
    notes = [*found.report.lines(), *(f"note: {number} x {what} (by convert)" for what, number in info.notes.items())]
    lines += ["", *notes] if notes else []
    lines += ["", *(f"warning: {line}" for line in warnings)] if warnings else ["", "nothing to warn of"]
    return "\n".join(lines)


def some(names: list[str]) -> str:
    return ", ".join(one_line(name, 100) for name in names[:3]) + (", ..." if len(names) > 3 else "")
