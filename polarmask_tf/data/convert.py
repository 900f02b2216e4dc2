"""COCO JSON and images to sharded TFRecords: `polarmask convert`. No TensorFlow here, so processes start at once.

Shards are written beside their final names and renamed when all are complete, `dataset.json` last, which names them. A set
that is converted again gets shards of other names, and the old ones go at the very end: whatever happens in between, no file
under a final name is half, and the directory is the old data set or the new one.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import time
import typing
import uuid
from collections import Counter
from pathlib import Path

import numpy as np
from pycocotools import mask as coco_mask
from tqdm import tqdm

from polarmask_tf.data import contours, dataset, pictures, records, segmentation, tiles
from polarmask_tf.data.processes import run_tasks
from polarmask_tf.data.report import Report, Unusable
from polarmask_tf.data.sources import coco
from polarmask_tf.errors import InputError
from polarmask_tf.files import atomic_write, lock

_IMAGES_PER_SHARD = 256


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
    id: str = ""


class _Task(typing.NamedTuple):
    """Everything a process needs to write one shard."""

    partial: Path
    images: list[dict]
    folder: Path
    names: list[str]
    options: Options


class _Written(typing.NamedTuple):
    report: Report
    counts: Counter  # num_images, num_instances, num_crowd
    per_image: Counter  # instances that are no crowd -> images
    max_edges: int


def convert(
    annotations: Path,
    images: Path,
    out: Path,
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
    tile: int | None = None,
    overlap: int | None = None,
    progress: bool = True,
) -> dataset.DatasetInfo:
    """Writes the COCO data set `annotations` (a JSON file) with its `images` (a directory) as shards into `out`.

    Args:
      shards: how many files; about one per 256 images if None, never more than images.
      processes: 1 works in this process; if None, one a core where there is enough work. More than one needs a main
        module that can be imported (`if __name__ == "__main__":`).
      masks: also store a PNG per instance, which Model Garden's own models read.
      verify: decode every image instead of checking header, size and end marker.
      strict: raise InputError for the first thing that would be skipped.
      max_edges: polygon edges an instance may keep; more are simplified at equal area.
      decoded: store the pixels of images (BMP), so that training decodes nothing; three bytes a pixel.
      crowd_as_instances: take annotations with `iscrowd: 1` for single objects.
      allow_outside: also take image files that do not lie in `images` (`..`, absolute paths, links).
      exif: "apply" or "ignore" the orientation that images have in their EXIF data; None: apply it only where the size in
        the JSON is that of the turned image and not that of the image as stored.
      bit_depth: bits that 16-bit images use, like 12; None: all 16.
      tile: cut images into tiles of so many pixels a side, see tiles.cut; TIFFs may then be of any size.
      overlap: of neighbouring tiles; None: a quarter of the tile.
      progress: bar, and the closing report on stdout.

    Images without annotations are kept. What is skipped is counted in the report and in the returned info. Raises
    InputError if nothing usable is left (a file without any annotation is taken as it is: background only), something is
    missing, or `out` is in use or cannot be written; then `out` is as it was.
    """
    annotations, images, out = Path(annotations), Path(images), Path(out).resolve()
    limits = ((shards, 1, "shards"), (processes, 1, "processes"), (max_edges, 8, "max_edges"), (bit_depth, 8, "bit_depth"))
    for value, least, name in limits:
        if value is not None and value < least:
            raise InputError(f"{name} is {value}; it must be at least {least}")
    if exif not in (None, "apply", "ignore"):
        raise InputError(f"exif is {exif!r}; it must be apply or ignore")
    if bit_depth and bit_depth > 16:
        raise InputError(f"bit_depth is {bit_depth}; it must be at most 16")
    if tile is None and overlap is not None:
        raise InputError("overlap is of tiles: give tile as well")
    overlap = tiles.check(tile, overlap) if tile else None
    if not os.path.isdir(images):
        raise InputError(f"{images}: no such directory; give the one that holds the image files")
    started = time.monotonic()
    report = Report(strict)
    entries, classes = coco.read(annotations, report, *([tiles.MOST_PIXELS] if tile else []))
    given = sum(len(entry["annotations"]) for entry in entries)
    if not entries:
        raise InputError("; ".join([f"{annotations}: empty data set: it names no usable image", *report.lines()]))
    if crowd_as_instances:
        for annotation in (a for entry in entries for a in entry["annotations"] if a["iscrowd"]):
            annotation["iscrowd"] = 0
            report.note("crowd region taken for a single object, as asked", f"annotation {annotation['id']}")
    if tile:
        entries = tiles.cut(entries, tile, overlap, report)
    options = Options(masks, verify, strict, max_edges, decoded, allow_outside, exif or "auto", bit_depth, uuid.uuid4().hex)
    count = min(shards or max(1, round(len(entries) / _IMAGES_PER_SHARD)), len(entries))
    if processes is None:
        processes = (os.cpu_count() or 1) if len(entries) + given > 2000 else 1
    with lock(out, "convert"), _removing_partial(out):
        _check_room(out, entries, decoded)
        # Round robin: files that follow one another in the JSON are often alike, and training shuffles only so far.
        tasks = [
            _Task(out / f"{name}.tmp", entries[i::count], images.resolve(), [c["name"] for c in classes], options)
            for i, name in enumerate(_free_names(out, count, options.id))
        ]
        with tqdm(total=len(entries), desc="convert", unit="img", disable=not progress) as bar:
            written = run_tasks(_write_shard, tasks, min(processes, count), bar)
        for part in written:
            report.merge(part.report)
        per_image = sum((part.per_image for part in written), Counter())
        info = dataset.DatasetInfo(
            directory=out,
            name=out.name,
            **{name: sum(part.counts[name] for part in written) for name in ("num_images", "num_instances", "num_crowd")},
            classes=classes,
            max_instances=max(per_image, default=0),
            max_edges=max(part.max_edges for part in written),
            shard_paths=[task.partial.with_suffix("") for task in tasks],
            skipped={reason: number for reason, (number, _) in report.skipped.items()},
            notes={reason: number for reason, (number, _) in report.notes.items()},
            id=options.id,
            instances_per_image=dict(sorted(per_image.items())),
            exif=options.exif,
            bit_depth=bit_depth,
            tile=tile,
            overlap=overlap,
        )
        if not info.num_images:
            raise InputError("; ".join([f"{annotations}: empty data set: none of its images is usable", *report.lines()]))
        if info.num_instances == info.num_crowd and (given or any("annotation" in reason for reason in report.skipped)):
            why = coco.why_unusable(entries, report)
            raise InputError("; ".join([f"{annotations}: no usable object: {why}", *report.lines()]))
        _publish(info)
    if progress:
        _print(info, report, len(entries) / max(time.monotonic() - started, 1e-9))
    return dataset.load(out)


def _print(info, report, speed):
    objects = f"{info.num_instances} instances ({info.num_crowd} crowd)"
    rest = f"{len(info.classes)} classes, {len(info.shard_paths)} shards, {speed:.0f} images/s"
    print(f"{info.directory}: {info.num_images} images, {objects}, {rest}")
    if not info.num_instances:
        print("  note: no annotations: images of background alone, which `polarmask train` refuses")
    for line in report.lines():
        print(f"  {line}")


def _ours(out, suffix=""):
    """Shards in the directory, of this or of earlier conversions into it."""
    name = re.compile(re.escape(out.name) + r"(-[0-9a-f]{8})?-\d{5,}-of-\d{5,}\.tfrecord" + re.escape(suffix))
    return [path for path in out.iterdir() if name.fullmatch(path.name)]


@contextlib.contextmanager
def _removing_partial(out):
    """No temporary file is left in the directory, also none of a run that was killed; errors of writing are InputErrors."""
    try:
        _remove_partial(out)
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        advice = "free some space and run again" if full else "choose another --out"
        raise InputError(f"{out}: cannot be written: {error.strerror or error}; {advice}") from error
    finally:
        with contextlib.suppress(OSError):
            _remove_partial(out)


def _remove_partial(out):
    for partial in (*_ours(out, ".tmp"), *out.glob(".dataset.json.*.tmp")):
        partial.unlink(missing_ok=True)


def _check_room(out, entries, decoded):
    """InputError where the pixels of all images do not fit onto the disk."""
    need, free = 3 * sum(entry["height"] * entry["width"] for entry in entries), shutil.disk_usage(out).free
    if decoded and need > free:
        sizes = f"the decoded images take {need / 1e9:.3g} GB, {free / 1e9:.3g} GB are free"
        raise InputError(f"{out}: {sizes}; make room, or go without --decoded")


def _free_names(out, count, id):
    """Names of shards that no shard of the data set in the directory has."""
    there = {path.name for path in _ours(out)}
    for name in (out.name, f"{out.name}-{id[:8]}"):
        names = [f"{name}-{i:05d}-of-{count:05d}.tfrecord" for i in range(count)]
        if there.isdisjoint(names):
            break
    return names


def _publish(info):
    for path in info.shard_paths:
        os.replace(path.with_name(f"{path.name}.tmp"), path)
    try:
        atomic_write(info.directory / "dataset.json", dataset.dump(info))
    except InputError:  # the old one stands
        for path in info.shard_paths:
            path.unlink()
        raise
    for stale in {*_ours(info.directory)} - {*info.shard_paths}:
        stale.unlink()


def _write_shard(task: _Task, after_image: typing.Callable) -> _Written:
    options, report = task.options, Report(task.options.strict)
    counts, per_image, max_edges = Counter(), Counter(), 0
    last: dict = {}  # picture of the last tile
    with open(task.partial, "wb") as file:
        for image in task.images:
            where = f"image {image['id']}, {image['file_name']}"
            size = {"height": image["height"], "width": image["width"]}
            try:
                path = pictures.find(task.folder, image.get("source", image["file_name"]), options.allow_outside)
                if "source" in image:
                    encoded, format = tiles.stored(path, image, options, report, where, last)
                else:
                    encoded, format = pictures.stored(path, (image["width"], image["height"]), options, report, where)
            except Unusable as reason:
                report.skip(str(reason), f"{where}: {reason.detail}" if reason.detail else where)
                if image["annotations"]:
                    report.skip("annotation of a skipped image", where, len(image["annotations"]))
            except MemoryError:
                raise InputError(f"{where}: not enough memory; try fewer --processes") from None
            else:
                found = _instances(image, task, report, where)
                names = {"file_name": image["file_name"], "image_id": image["id"], "dataset_id": options.id}
                example = records.encode_example(encoded=encoded, format=format, **names, **size, instances=found)
                records.write_record(file, example)
                crowd = sum(i.is_crowd for i in found)
                counts.update(num_images=1, num_instances=len(found), num_crowd=crowd)
                per_image[len(found) - crowd] += 1
                max_edges = max([max_edges, *(sum(map(len, i.rings)) for i in found)])
            after_image()
    return _Written(report, counts, per_image, max_edges)


def _instances(image, task, report, where):
    height, width = image["height"], image["width"]
    max_edges, found = task.options.max_edges, []
    for annotation in image["annotations"]:
        here = f"{where}, annotation {annotation['id']}"
        crowd = bool(annotation["iscrowd"])
        try:
            rle, rings, iou, reduced = segmentation.region(annotation["segmentation"], height, width, max_edges, coarse=crowd)
        except Unusable as reason:
            report.skip(str(reason), here)
            continue
        if iou < 0.99:
            report.note(f"polygon simplified to {max_edges} edges with an IoU below 0.99", f"{here}: {iou:.3f}")
        if reduced:
            report.note("degenerate part of a polygon left out", here)
        points = rings[0] if len(rings) == 1 else np.concatenate(rings)
        (left, top), (right, bottom) = points.min(axis=0).tolist(), points.max(axis=0).tolist()
        found.append(
            records.Instance(
                annotation_id=annotation["id"],
                label=annotation["label"],
                name=task.names[annotation["label"]],
                is_crowd=crowd,
                area=_area(annotation["area"], rle, rings, report, here),
                box=(max(left, 0.0), max(top, 0.0), min(right, float(width)), min(bottom, float(height))),
                rings=rings,
                rle=rle["counts"],
                mask_png=segmentation.mask_png(rle) if task.options.masks else None,
            )
        )
    return found


def _area(area, rle, rings, report, where) -> float:
    """What the annotation says, else the mask's; a note where it is neither the mask's nor the polygon's."""
    actual = float(coco_mask.area(rle))
    if area is None:
        report.note("annotation without 'area', which was taken from its mask", where)
        return actual
    if abs(area - actual) > 0.1 * actual and abs(area - sum(map(contours.shoelace, rings))) > 0.1 * actual:
        what = "'area' more than 10 % off the mask's: APS, APM, APL and the like go by it"
        report.note(what, f"{where}: {area:g}, the mask has {actual:g}")
    return float(area)
