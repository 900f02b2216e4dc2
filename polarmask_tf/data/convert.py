"""Annotated pictures to sharded TFRecords: `polarmask convert`. No TensorFlow here, so processes start at once.

`sources.recognise` reads annotations of any format, `combine` makes one list of several sources, `split` several sets of it;
`publish` is how files get their final names.
"""

from __future__ import annotations

import contextlib
import os
import time
import typing
import uuid
from collections import Counter
from pathlib import Path

import numpy as np
from pycocotools import mask as coco_mask
from tqdm import tqdm

from polarmask_tf import lite
from polarmask_tf.data import contours, dataset, pictures, publish, records, report_file, segmentation, tiles
from polarmask_tf.data.combine import combine, edit_classes, mark_duplicates, tell_classes
from polarmask_tf.data.options import Options, check_choices, checked
from polarmask_tf.data.processes import run_tasks
from polarmask_tf.data.report import Report, Unusable
from polarmask_tf.data.sources import coco, recognise
from polarmask_tf.data.sources.folder import Folder
from polarmask_tf.data.sources.source import Source
from polarmask_tf.data.split import sets_of
from polarmask_tf.errors import InputError
from polarmask_tf.files import lock

_IMAGES_PER_SHARD = 256
_OF_MASK = -1  # the area of annotations in formats that give none


class _Task(typing.NamedTuple):
    """Everything a process needs to write one shard."""

    partial: Path
    images: list[dict]
    names: list[str]
    options: Options


class _Written(typing.NamedTuple):
    report: Report
    counts: Counter  # num_images, num_instances, num_crowd; drawn: those that are no crowd and have a pixel
    per_image: Counter  # instances that are no crowd -> images
    max_edges: int
    labels: Counter  # label -> instances that are no crowd
    areas: Counter  # the least side of a class of sizes, see report_file.SIDES -> instances that are no crowd


def convert(annotations: Path, images: Path, out: Path, **options) -> dataset.DatasetInfo:
    """Writes the COCO data set `annotations` (a JSON file) with its `images` (a directory) as shards into `out`.

    Keyword arguments:
      shards: how many files; about one per 256 images if None, never more than images.
      processes: 1 works in this process; if None, one a core where there is enough work. More than one needs a main
        module that can be imported (`if __name__ == "__main__":`).
      masks: also store a PNG per instance, which Model Garden's own models read.
      verify: decode every image instead of checking header, size and end marker.
      strict: raise InputError for the first thing that would be skipped.
      max_edges: polygon edges an instance may keep; more are simplified at equal area (default 96).
      decoded: store the pixels of images (BMP), so that training decodes nothing; three bytes a pixel.
      crowd_as_instances: take annotations with `iscrowd: 1` for single objects.
      allow_outside: also take image files that do not lie in `images` (`..`, absolute paths, links).
      exif: "apply" or "ignore" the orientation that images have in their EXIF data; None: apply it only where the size in
        the JSON is that of the turned image and not that of the image as stored.
      bit_depth: bits that 16-bit images use, like 12; None: all 16.
      tile: cut images into tiles of so many pixels a side, see tiles.cut; TIFFs may then be of any size.
      overlap: of neighbouring tiles; None: a quarter of the tile.
      min_area: leave out objects whose mask has fewer pixels (they become background).
      progress: bar, and the closing report on stdout (default True).

    Images without annotations are kept. What is skipped is counted in the report and in the returned info. Raises
    InputError if nothing usable is left (a file without any annotation is taken as it is: background only), something is
    missing, or `out` is in use or cannot be written; then `out` is as it was.
    """
    record_options, work = checked(**options)
    annotations, images = Path(annotations), Path(images)
    if not os.path.isdir(images):
        raise InputError(f"{images}: no such directory; give the one that holds the image files")
    report, out = Report(record_options.strict), Path(out).resolve()
    folder = Folder(images, record_options.exif, record_options.allow_outside, _most_pixels(record_options))
    with lock(out, "convert"):
        source = Source(annotations, "coco", *coco.read(annotations, report, folder), folder.root)
        return _convert([source], out, record_options, work, report)[""]


def convert_dataset(
    source: Path,
    out: Path,
    *,
    images: Path | None = None,
    add: typing.Sequence[Path] = (),
    format: str | None = None,
    split: typing.Sequence[float] = (),
    seed: int = 0,
    group: str | None = None,
    classes: typing.Sequence[str] = (),
    **options,
) -> dict[str, dataset.DatasetInfo]:
    """Writes a data set in any of the formats of docs/formats.md as shards into `out`, or into train/, val/, test/ there.

    Args:
      source: a file or a folder of annotations, whose format is recognised.
      images: the folder of its pictures; None: found near the annotations.
      add: more sources of the same kind, united with it; classes by their names.
      format: one of recognise.FORMATS, of all sources; None: by what is in each.
      split: fractions of the images for val, or for val and test; none: as the source has it.
      seed, group: of that split, see split.sets_of.
      classes: edits like "old=new" and "-drop", see combine.edit_classes.
      options: those of `convert`.

    Returns {"train": info, "val": info, ...}, or {"": info} of one set. `out`/report.json holds what is printed. Raises as
    `convert` does. Nothing in a source is changed.
    """
    record_options, work = checked(**options)
    check_choices(split, classes, group)
    report, out, sources = Report(record_options.strict), Path(out).resolve(), []
    publish.check_target(out, None, [source, *add])
    finding = {
        "format": format,
        "progress": work.progress,
        "exif": record_options.exif,
        "allow_outside": record_options.allow_outside,
        "most_pixels": _most_pixels(record_options),
    }
    with lock(out, "convert"):  # before masks are decoded; also of train/ and val/ in it, which all are of one conversion
        for path in (source, *add):
            sources += recognise.read(path, report, images=images if path is source else None, **finding)
        return _convert(sources, out, record_options, work, report, split=split, seed=seed, group=group, edits=classes)


def _most_pixels(options: Options) -> int:
    return tiles.MOST_PIXELS if options.tile else lite.MAX_PIXELS


def _convert(sources, out, options, work, report, *, split=(), seed=0, group=None, edits=()):
    """Sources as they were read to sets in `out`: {name: info}, the name of one alone being ""."""
    of = ", ".join(str(path) for path in dict.fromkeys(source.path for source in sources))
    entries, classes = combine(sources, report)
    if not entries:
        raise InputError("; ".join([f"{of}: empty data set: it names no usable image", *report.lines()]))
    given = sum(len(entry["annotations"]) for entry in entries)
    classes = edit_classes(entries, classes, edits, report)
    if len(classes) > lite.MAX_CLASSES:
        raise InputError(f"{of}: {len(classes):,} classes, and the limit is {lite.MAX_CLASSES:,}; keep some with --classes")
    if work.crowd_as_instances:
        for annotation in (a for entry in entries for a in entry["annotations"] if a["iscrowd"]):
            annotation["iscrowd"] = 0
            report.note("crowd region taken for a single object, as asked", f"annotation {annotation['id']}")
    tell_classes(classes, entries, sources[0].path.name, report)
    mark_duplicates(entries, report, options.allow_outside)
    sets = sets_of(entries, split, seed, group, report)
    if options.tile:
        sets = {name: tiles.cut(members, options.tile, options.overlap, report) for name, members in sets.items()}
    publish.check_target(out, sets, ())
    with contextlib.ExitStack() as held:
        done = []
        for name, members in sets.items():
            if name:
                held.enter_context(lock(out / name, "convert"))
            held.enter_context(publish.removing_partial(out / name))
            done.append(_write_set(out / name, members, classes, options, work, report if len(sets) == 1 else Report()))
        total = Report()
        for each in [report, *(each.report for each in done if len(sets) > 1)]:
            total.merge(each)
        if pictures.TURNED in total.notes and pictures.UNTOLD in total.notes:
            total.notes[f"{pictures.UNTOLD}; others are turned, so it is likely wrong"] = total.notes.pop(pictures.UNTOLD)
        infos = {name: each.info for name, each in zip(sets, done, strict=True)}
        if not any(info.num_images for info in infos.values()):
            raise InputError("; ".join([f"{of}: empty data set: none of its images is usable", *total.lines()]))
        if not any(each.drawn for each in done) and (given or total.objects):
            why = coco.why_unusable(entries, total)
            raise InputError("; ".join([f"{of}: no usable object: {why}", *total.lines()]))
        for name, info in infos.items():
            if not info.num_images:
                raise InputError("; ".join([f"{of}: no image of '{name}' is usable", *total.lines()]))
        for info in infos.values():
            publish.publish(info)
        report_file.write(out, sources, dict(zip(sets, done, strict=True)), total)
    if work.progress:
        speed = len(entries) / max(time.monotonic() - work.started, 1e-9)
        print(report_file.text(dict(zip(sets, done, strict=True)), total, speed))
    return {name: dataset.load(out / name) for name in sets}


def _write_set(out, entries, classes, options, work, report) -> report_file.WrittenSet:
    """Writes the shards of one set under temporary names; what was skipped is in `report`, which the info has."""
    options = options._replace(id=uuid.uuid4().hex)  # of each set: shards of val/ are none of train/
    count = min(work.shards or max(1, round(len(entries) / _IMAGES_PER_SHARD)), len(entries))
    objects = sum(len(entry["annotations"]) for entry in entries)
    processes = work.processes or ((os.cpu_count() or 1) if len(entries) + objects > 2000 else 1)
    publish.check_room(out, entries, options.decoded)
    # Round robin: files that follow one another in a source are often alike, and training shuffles only so far.
    tasks = [
        _Task(out / f"{name}.tmp", entries[i::count], [c["name"] for c in classes], options)
        for i, name in enumerate(publish.free_names(out, count, options.id))
    ]
    with tqdm(total=len(entries), desc=f"convert {out.name}", unit="img", disable=not work.progress) as bar:
        written = run_tasks(_write_shard, tasks, min(processes, count), bar)
    for part in written:
        report.merge(part.report)
    per_image, labels, areas = (
        sum((getattr(part, n) for part in written), Counter()) for n in ("per_image", "labels", "areas")
    )
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
        bit_depth=options.bit_depth,
        tile=options.tile,
        overlap=options.overlap,
    )
    return report_file.WrittenSet(info, report, labels, areas, sum(part.counts["drawn"] for part in written))


def _write_shard(task: _Task, after_image: typing.Callable) -> _Written:
    options, report = task.options, Report(task.options.strict)
    counts, per_image, labels, areas, max_edges = Counter(), Counter(), Counter(), Counter(), 0
    last: dict = {}
    with open(task.partial, "wb") as file:
        for image in task.images:
            where = f"image {image['id']}, {image['file_name']}"
            size = {"height": image["height"], "width": image["width"]}
            try:
                path = pictures.find(Path(image["folder"]), image.get("picture", image["file_name"]), options.allow_outside)
                if "picture" in image:
                    encoded, format = tiles.stored(path, image, options, report, where, last)
                else:
                    width_height, as_shown = (image["width"], image["height"]), image.get("as_shown", False)
                    encoded, format = pictures.stored(path, width_height, options, report, where, as_shown)
            except Unusable as reason:
                report.skip(reason, where)
                if image["annotations"]:
                    report.skip_object("annotation of a skipped image", where, len(image["annotations"]))
            except MemoryError:
                raise InputError(f"{where}: not enough memory; try fewer --processes") from None
            else:
                found = _instances(image, task, report, where)
                names = {"file_name": image["file_name"], "image_id": image["id"], "dataset_id": options.id}
                example = records.encode_example(encoded=encoded, format=format, **names, **size, instances=found)
                records.write_record(file, example)
                crowd = sum(i.is_crowd for i in found)
                counts.update(num_images=1, num_instances=len(found), num_crowd=crowd)
                sides = [image["height"], image["width"]]
                counts["drawn"] += sum(not i.is_crowd and coco_mask.area({"size": sides, "counts": i.rle}) > 0 for i in found)
                per_image[len(found) - crowd] += 1
                labels.update(i.label for i in found if not i.is_crowd)
                areas.update(report_file.side_of(i.area) for i in found if not i.is_crowd)
                max_edges = max([max_edges, *(sum(map(len, i.rings)) for i in found)])
            after_image()
    tiles.close(last, report)
    return _Written(report, counts, per_image, max_edges, labels, areas)


def _instances(image, task, report, where):
    height, width = image["height"], image["width"]
    max_edges, found, seen = task.options.max_edges, [], set()
    for annotation in image["annotations"]:
        here = f"{where}, annotation {annotation['id']}"
        crowd = bool(annotation["iscrowd"])
        try:
            rle, rings, iou, reduced = segmentation.region(annotation["segmentation"], height, width, max_edges, coarse=crowd)
        except Unusable as reason:
            report.skip_object(reason, here)
            continue
        if not crowd and coco_mask.area(rle) < task.options.min_area:
            report.note(f"object smaller than --min-area {task.options.min_area:g}, left out as asked", here)
            continue
        _tell_odd(annotation, rle, rings, seen, report, here)
        if iou < 0.99:
            report.note(f"polygon simplified to {max_edges} edges with an IoU below 0.99", f"{here}: {iou:.3f}")
        if reduced:
            report.note("degenerate part of a polygon left out", here)
        left, top, right, bottom = _bounds(rings)
        if max(-left, right - width) > 0.1 * width or max(-top, bottom - height) > 0.1 * height:
            what = "outline that reaches more than a tenth of the image beyond it (are they of the image in another size?)"
            report.note(what, f"{here}: {width} x {height}, to {right:.0f}, {bottom:.0f}")
        found.append(
            records.Instance(
                annotation_id=annotation["id"],
                label=annotation["label"],
                name=task.names[annotation["label"]],
                is_crowd=crowd,
                area=_area(annotation.get("area", _OF_MASK), rle, rings, report, here),
                box=(max(left, 0.0), max(top, 0.0), min(right, float(width)), min(bottom, float(height))),
                rings=rings,
                rle=rle["counts"],
                mask_png=segmentation.mask_png(rle) if task.options.masks else None,
            )
        )
    return found


def _bounds(rings):
    points = rings[0] if len(rings) == 1 else np.concatenate(rings)
    return [*points.min(axis=0).tolist(), *points.max(axis=0).tolist()]


def _tell_odd(annotation, rle, rings, seen, report, where):
    """Notes what an outline alone does not show to be wrong. `seen`: the objects of the image before."""
    if not coco_mask.area(rle):
        report.note("object whose mask has no pixel: nothing is learned from it, and no detection matches it", where)
    key = annotation["label"], annotation["iscrowd"], rle["counts"]
    if key in seen:
        report.note("object that is annotated twice, with the same class and mask", where)
    seen.add(key)
    if "bbox" in annotation:
        left, top, width, height = annotation["bbox"]
        limits = rle["size"][::-1] * 2
        theirs, ours = (np.clip(box, 0, limits) for box in ((left, top, left + width, top + height), _bounds(rings)))
        if np.abs(theirs - ours).max() > 3 + 0.25 * (ours[2:] - ours[:2]).max():
            what = "'bbox' (x, y, width, height) far from the outline's, which counts (is one in another order or size?)"
            report.note(what, where)


def _area(area, rle, rings, report, where) -> float:
    """What a COCO annotation says, else the mask's; a note where it is neither the mask's nor the polygon's."""
    actual = float(coco_mask.area(rle))
    if area == _OF_MASK:
        return actual
    if area is None:
        report.note("annotation without 'area', which was taken from its mask", where)
        return actual
    if abs(area - actual) > 0.1 * actual and abs(area - sum(map(contours.shoelace, rings))) > 0.1 * actual:
        what = "'area' more than 10 % off the mask's: APS, APM, APL and the like go by it"
        report.note(what, f"{where}: {area:g}, the mask has {actual:g}")
    return float(area)
