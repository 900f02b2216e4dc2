"""What polygons of n rays can reach on a data set: rebuilt from exact targets, against the true masks (figure 7).

Needs annotations alone, no images and no training. The targets are those that training makes (data.transforms.instances):
rays to the farthest hit on the largest part of an instance, from that part's mass center or from the box center. The true
mask is pycocotools' own of the original annotation, with all parts and holes.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import time
import typing
from pathlib import Path

import numpy as np
from tqdm import tqdm

from polarmask_tf import files
from polarmask_tf.data.report import Report
from polarmask_tf.errors import InputError, counted
from polarmask_tf.files import lock
from polarmask_tf.inference.ceiling import SIZES, ceilings, read, rebuilder

RAYS = (8, 12, 18, 24, 36, 72, 120)
CENTERS = ("mass", "box")
SHARES = (0.5, 0.75, 0.9)


class UpperBound(typing.NamedTuple):
    """IoU of every usable instance with its polygon of each number of rays, from each center."""

    rays: tuple[int, ...]
    centers: tuple[str, ...]
    ious: np.ndarray  # float32 [instances, centers, rays]
    areas: np.ndarray  # float64 [instances], square pixels as the annotations say, else their masks'
    labels: np.ndarray  # int32 [instances], 0-based
    classes: list[dict]  # {"name", "category_id"} of each label
    images: int
    report: Report  # what was left out, and why
    seconds: float


def run(source, out=None, rays: typing.Sequence[int] = RAYS, limit: int | None = None) -> UpperBound:
    """`polarmask upper-bound`: measures, prints, and with `out` writes upper_bound.csv and upper_bound.png there."""
    if out is not None:
        _figure()  # before hours of work, and not after
    with lock(Path(out), "upper-bound") if out is not None else contextlib.nullcontext():
        result = upper_bound(source, rays, limit=limit)
        print(format_table(result))
        if out is not None:
            write(result, out)
            print(f"wrote {Path(out) / 'upper_bound.csv'} and {Path(out) / 'upper_bound.png'}")
    return result


def upper_bound(
    source,
    rays: typing.Sequence[int] = RAYS,
    centers: typing.Sequence[str] = CENTERS,
    *,
    limit: int | None = None,
    progress: bool = True,
) -> UpperBound:
    """Measures a COCO JSON file or a directory made by `polarmask convert` (its first `limit` images).

    `rays` are the numbers of rays, each at least 4; `centers` are "mass" and "box", see TargetConfig.center. Crowds and
    annotations without a usable mask are left out, counted in the result's report. One image is worked on at a time.
    Raises InputError if the source is not usable, if nothing usable is in it, or for numbers that make no sense.
    """
    rays = tuple(sorted(set(rays)))
    if not rays or rays[0] < 4 or rays[-1] > 3600:
        raise InputError(f"upper-bound: rays are {list(rays)}; give numbers of 4 to 3600")
    if limit is not None and limit < 1:
        raise InputError(f"upper-bound: limit is {limit}, must be at least 1")
    began = time.monotonic()
    count, classes, images, max_edges, report = read(source, limit)
    rebuild = rebuilder(rays, centers, max_edges)
    ious, areas, labels, done = [], [], [], 0
    for image in tqdm(images, total=count, desc="upper-bound", unit="img", disable=not progress):
        done += 1
        for annotation, its in ceilings(image, rebuild, report):
            ious.append(its)
            areas.append(annotation["area"])
            labels.append(annotation["label"])
    if not ious:
        raise InputError("; ".join([f"{source}: holds no instance to measure", *report.lines()]))
    measured = np.array(ious, np.float32).reshape(-1, len(centers), len(rays)), np.array(areas), np.array(labels, np.int32)
    return UpperBound(rays, tuple(centers), *measured, classes, done, report, time.monotonic() - began)


def rows(result: UpperBound) -> list[dict]:
    """One row for each group (all; each COCO size; each class that has instances), center and number of rays.

    "recall" is the mean of the shares above the IoUs .50, .55, ..., .95: average recall, were every polygon found.
    """
    groups = [("all", "", np.ones(len(result.ious), bool))]
    groups += [("size", name, (result.areas >= low) & (result.areas < high)) for name, (low, high) in SIZES.items()]
    groups += [("class", entry["name"], result.labels == label) for label, entry in enumerate(result.classes)]
    made = []
    for kind, name, chosen in groups:
        for (c, center), (r, rays) in itertools.product(enumerate(result.centers), enumerate(result.rays)):
            if len(ious := result.ious[chosen, c, r]):
                row = {"group": kind, "name": name, "center": center, "rays": rays, "instances": len(ious)}
                row |= {"mean_iou": float(ious.mean(dtype=np.float64))}
                row |= {f"above_{share:g}": float((ious > share).mean()) for share in SHARES}
                recall = float(np.mean([(ious >= least).mean() for least in np.arange(50, 100, 5) / 100]))
                made.append({**row, "recall": recall})
    return made


def format_table(result: UpperBound, at: int = 36, worst: int = 10) -> str:
    """The printed report; classes, and what to expect, at the number of rays nearest to `at`."""
    at, first = min(result.rays, key=lambda n: abs(n - at)), result.centers[0]
    every = rows(result)
    sizes = {(row["name"], row["center"], row["rays"]): row for row in every if row["group"] == "size"}
    counts = [f"{sizes[name, first, at]['instances']} {name}" for name in SIZES if (name, first, at) in sizes]
    table = []
    for row in (row for row in every if row["group"] == "all"):
        same = {name: sizes.get((name, row["center"], row["rays"])) for name in SIZES}
        shares = {f">{share:g}": f"{100 * row[f'above_{share:g}']:.0f}%" for share in SHARES}
        by_size = {name: f"{its['mean_iou']:.3f}" if its else "-" for name, its in same.items()}
        table.append({**row, "mean IoU": row["mean_iou"], **shares, **by_size})
    columns = {"center": "", "rays": "", "mean IoU": ".3f", **dict.fromkeys(shares, ""), "recall": ".3f"}
    overall, *classes = (row for row in every if (row["center"], row["rays"]) == (first, at) and row["group"] != "size")
    lines = [
        f"{counted(len(result.ious), 'instance')} in {counted(result.images, 'image')}, "
        f"measured in {result.seconds:.0f} s ({', '.join(counts)})",
        *(f"  {line}" for line in result.report.lines()),
        "",
        files.format_table(table, columns | dict.fromkeys(SIZES, "")),
        "",
        f"With {at} rays from the {first} center polygons reach IoU {overall['mean_iou']:.3f} and an average recall "
        f"(IoU .50 to .95) of {overall['recall']:.3f}; {100 * (1 - overall['above_0.5']):.1f}% of the instances below .5.",
    ]
    if len(classes) > 1:
        classes.sort(key=lambda row: row["mean_iou"])
        lines.append("Classes that lose most (mean IoU, instances):")
        lines += [f"  {row['mean_iou']:.3f} {row['instances']:6}  {row['name']}" for row in classes[:worst]]
        if len(classes) > worst:
            lines.append(f"  best: {classes[-1]['mean_iou']:.3f}  {classes[-1]['name']}")
    return "\n".join(lines)


def write(result: UpperBound, out) -> None:
    """upper_bound.csv (the rows) and upper_bound.png (mean IoU over the number of rays, as figure 7) into a directory."""
    out, every = Path(out), rows(result)
    files.make_directory(out)
    files.atomic_write(out / "upper_bound.csv", files.format_csv(every))
    files.atomic_write(out / "upper_bound.png", _plot(every))


def _plot(every) -> bytes:
    """Mean IoU over the number of rays: all instances from each center, and by size from the first. PNG."""
    figure = _figure()(figsize=(6, 4.2), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    first = every[0]["center"]
    lines = [("all", "", center, style) for center, style in (("mass", "o-"), ("box", "s--"))]
    for group, name, center, style in lines + [("size", name, first, ":") for name in SIZES]:
        line = [row for row in every if (row["group"], row["name"], row["center"]) == (group, name, center)]
        if line:
            label = f"{center} center" + (f", {name} only" if name else "")
            axes.plot([row["rays"] for row in line], [row["mean_iou"] for row in line], style, label=label)
    axes.set(xlabel="number of rays", ylabel="mean IoU with the mask", xticks=sorted({row["rays"] for row in every}))
    axes.grid(alpha=0.3)
    axes.legend()
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def _figure():
    """matplotlib's class Figure, and not pyplot: no window system, no global state. InputError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("upper-bound --out draws with matplotlib: pip install 'polarmask_tf[plots]'") from None
    return Figure
