"""COCO JSON and images to sharded TFRecords: `polarmask convert`. No TensorFlow here, so processes start at once.

Shards are written beside their final names and renamed when all are complete, `dataset.json` last: whatever happens in
between, no file under a final name is half, and a directory without dataset.json is not a data set.
"""

import contextlib
import errno
import glob
import io
import json
import multiprocessing
import os
import signal
import threading
import time
import warnings
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask
from tqdm import tqdm

from polarmask_tf.data import records
from polarmask_tf.data.sources import coco
from polarmask_tf.data.sources.coco import Report, Unusable
from polarmask_tf.errors import InputError

_IMAGES_PER_SHARD = 256
_FORMATS = {b"\xff\xd8": ("jpeg", b"\xff\xd9"), b"\x89P": ("png", b"IEND\xaeB`\x82")}
_EXIF_ORIENTATION = 274


class _Task(NamedTuple):
    """Everything a process needs to write one shard."""

    partial: Path
    images: list[dict]
    folder: Path
    names: list[str]
    masks: bool
    verify: bool
    strict: bool
    max_edges: int


class _Written(NamedTuple):
    images: int
    instances: int
    crowd: int
    max_instances: int
    max_edges: int
    report: Report


class _Stopped(Exception):
    """Another process failed, or the user pressed Ctrl-C."""


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
    progress: bool = True,
) -> records.DatasetInfo:
    """Writes the COCO data set `annotations` (a JSON file) with its `images` (a directory) as shards into `out`.

    Args:
      shards: how many files; about one per 256 images if None, never more than images.
      processes: 1 works in this process; if None, one a core where there is enough work. More than one needs a main
        module that can be imported (`if __name__ == "__main__":`).
      masks: also store a PNG per instance, which Model Garden's own models read.
      verify: decode every image instead of checking header, size and end marker.
      strict: raise InputError for the first thing that would be skipped.
      max_edges: polygon edges an instance may keep; more are simplified at equal area.
      progress: bar, and the closing report on stdout.

    Images without annotations are kept. What is skipped is counted in the report and in the returned info. Raises
    InputError if nothing usable is left, something is missing, or `out` cannot be written; then `out` is as it was.
    """
    annotations, images, out = Path(annotations), Path(images), Path(out).resolve()
    for value, least, name in ((shards, 1, "shards"), (processes, 1, "processes"), (max_edges, 8, "max_edges")):
        if value is not None and value < least:
            raise InputError(f"{name} is {value}; it must be at least {least}")
    if not images.is_dir():
        raise InputError(f"{images}: no such directory; give the one that holds the image files")
    started = time.monotonic()
    report = Report(strict)
    entries, classes = coco.read(annotations, report)
    if not entries:
        raise InputError("; ".join([f"{annotations}: empty data set: it names no usable image", *report.lines()]))
    count = min(shards or max(1, round(len(entries) / _IMAGES_PER_SHARD)), len(entries))
    names = [f"{out.name}-{i:05d}-of-{count:05d}.tfrecord" for i in range(count)]
    # Round robin: files that follow one another in the JSON are often alike, and training shuffles only so far.
    tasks = [
        _Task(out / f"{name}.tmp", entries[i::count], images, [c["name"] for c in classes], masks, verify, strict, max_edges)
        for i, name in enumerate(names)
    ]
    if processes is None:
        work = len(entries) + sum(len(entry["annotations"]) for entry in entries)
        processes = (os.cpu_count() or 1) if work > 2000 else 1
    with _clean_directory(out):
        with tqdm(total=len(entries), desc="convert", unit="img", disable=not progress) as bar:
            written = _run(tasks, min(processes, count), bar)
        for part in written:
            report.merge(part.report)
        if not sum(part.images for part in written):
            raise InputError("; ".join([f"{annotations}: empty data set: none of its images is usable", *report.lines()]))
        content = {
            "format": records.FORMAT,
            "name": out.name,
            "num_images": sum(part.images for part in written),
            "num_instances": sum(part.instances for part in written),
            "num_crowd": sum(part.crowd for part in written),
            "classes": classes,
            "max_instances": max(part.max_instances for part in written),
            "max_edges": max(part.max_edges for part in written),
            "shards": names,
            "skipped": {reason: number for reason, (number, _) in report.skipped.items()},
        }
        _publish(out, content)
    if progress:
        _print(content, out, report, len(entries) / max(time.monotonic() - started, 1e-9))
    return records.load_dataset_info(out)


def _print(content, out, report, speed):
    print(
        f"{out}: {content['num_images']} images, {content['num_instances']} instances ({content['num_crowd']} crowd), "
        f"{len(content['classes'])} classes, {len(content['shards'])} shards, {speed:.0f} images/s"
    )
    for line in report.lines():
        print(f"  {line}")


@contextlib.contextmanager
def _clean_directory(out):
    """Makes the directory; afterwards no temporary file is left in it, nor the directory if it was made in vain."""
    made = not out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
        _remove_partial(out)  # of a run that was killed
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        advice = "free some space and run again" if full else "choose another --out"
        raise InputError(f"{out}: cannot be written: {error.strerror or error}; {advice}") from error
    finally:
        with contextlib.suppress(OSError):
            _remove_partial(out)
            if made:
                out.rmdir()  # only succeeds if empty


def _remove_partial(out):
    for partial in [*out.glob(f"{glob.escape(out.name)}-*.tfrecord.tmp"), out / "dataset.json.tmp"]:
        partial.unlink(missing_ok=True)


def _publish(out, content):
    partial = out / "dataset.json.tmp"
    partial.write_text(json.dumps(content, indent=1))
    # Without dataset.json it is no data set: so the old one goes first and the new one comes last.
    (out / "dataset.json").unlink(missing_ok=True)
    for name in content["shards"]:
        os.replace(out / f"{name}.tmp", out / name)
    for stale in out.glob(f"{glob.escape(out.name)}-*-of-*.tfrecord"):
        if stale.name not in content["shards"]:
            stale.unlink()
    os.replace(partial, out / "dataset.json")


def _run(tasks, processes, bar):
    if processes == 1:
        return [_write_shard(task, bar.update) for task in tasks]
    # Spawned, not forked: the caller may have TensorFlow's threads running.
    context = multiprocessing.get_context("spawn")
    with _ctrl_c_held():  # starts a process too
        stop, done = context.Event(), context.Value("q", 0)
    pool = ProcessPoolExecutor(processes, mp_context=context, initializer=_start_process, initargs=(stop, done))
    try:
        with _ctrl_c_held():
            pending = {pool.submit(_write_shard_in_process, task): i for i, task in enumerate(tasks)}
        futures = list(pending)
        while pending:
            finished, _ = wait(pending, timeout=0.2, return_when=FIRST_EXCEPTION)
            bar.update(done.value - bar.n)
            for future in finished:
                future.result()
                del pending[future]
        return [future.result() for future in futures]
    except BrokenProcessPool as error:
        raise InputError(
            "a worker process died: out of memory, or the calling script lacks `if __name__ == '__main__':`; "
            "try fewer --processes"
        ) from error
    finally:
        stop.set()
        pool.shutdown(wait=True, cancel_futures=True)


@contextlib.contextmanager
def _ctrl_c_held():
    """Ctrl-C, which reaches every process of a terminal, is the parent's to handle, and only after this block.

    Processes that start within inherit the blocked signal, so that not even one that is still importing shows a traceback. The
    parent has other threads, which take the signal when this one blocks it: its handler must wait, too.
    """
    came = []
    ours = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) is not None
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    handler = signal.signal(signal.SIGINT, lambda *_: came.append(True)) if ours else None
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if ours:
            signal.signal(signal.SIGINT, handler)
    if came:
        signal.raise_signal(signal.SIGINT)


def _start_process(stop, done):
    # A parent that was killed cannot set anything: its end is watched for.
    threading.Thread(target=lambda: (multiprocessing.parent_process().join(), os._exit(1)), daemon=True).start()
    _start_process.shared = stop, done


def _write_shard_in_process(task):
    stop, done = _start_process.shared

    def count():
        with done.get_lock():
            done.value += 1
        if stop.is_set():
            raise _Stopped

    return _write_shard(task, count)


def _write_shard(task: _Task, after_image) -> _Written:
    report = Report(task.strict)
    images = instances = crowd = max_instances = max_edges = 0
    with open(task.partial, "wb") as file:
        for image in task.images:
            where = f"image {image['id']}, {image['file_name']}"
            try:
                encoded, format = _read_image(task.folder / image["file_name"], image["height"], image["width"], task.verify)
            except Unusable as reason:
                report.skip(str(reason), where)
                if image["annotations"]:
                    report.skip("annotation of a skipped image", where, len(image["annotations"]))
            else:
                found = _instances(image, task, report, where)
                example = {key: image[key] for key in ("file_name", "height", "width")}
                records.write_record(
                    file,
                    records.encode_example(encoded=encoded, format=format, image_id=image["id"], instances=found, **example),
                )
                images += 1
                instances += len(found)
                crowd += sum(i.is_crowd for i in found)
                max_instances = max(max_instances, sum(not i.is_crowd for i in found))
                max_edges = max([max_edges, *(sum(map(len, i.rings)) for i in found)])
            after_image()
    return _Written(images, instances, crowd, max_instances, max_edges, report)


def _instances(image, task, report, where):
    height, width = image["height"], image["width"]
    found = []
    for annotation in image["annotations"]:
        here = f"{where}, annotation {annotation['id']}"
        try:
            rle, rings, iou, reduced = coco.region(
                annotation["segmentation"], height, width, task.max_edges, coarse=bool(annotation["iscrowd"])
            )
        except Unusable as reason:
            report.skip(str(reason), here)
            continue
        if iou < 0.99:
            report.note(f"polygon simplified to {task.max_edges} edges with an IoU below 0.99", f"{here}: {iou:.3f}")
        if reduced:
            report.note("degenerate part of a polygon left out", here)
        area = annotation["area"]
        if area is None:
            report.note("annotation without 'area', which was taken from its mask", here)
            area = float(coco_mask.area(rle))
        points = rings[0] if len(rings) == 1 else np.concatenate(rings)
        (left, top), (right, bottom) = points.min(axis=0).tolist(), points.max(axis=0).tolist()
        found.append(
            records.Instance(
                annotation_id=annotation["id"],
                label=annotation["label"],
                name=task.names[annotation["label"]],
                is_crowd=bool(annotation["iscrowd"]),
                area=float(area),
                box=(max(left, 0.0), max(top, 0.0), min(right, float(width)), min(bottom, float(height))),
                rings=rings,
                rle=rle["counts"],
                mask_png=coco.mask_png(rle) if task.masks else None,
            )
        )
    return found


def _read_image(path, height, width, verify):
    """The bytes of a usable JPEG or PNG and its format; Unusable otherwise. Only `verify` decodes all the pixels."""
    try:
        if not path.is_file():  # also keeps from waiting at a pipe
            raise Unusable("missing image")
        data = path.read_bytes()
    except (OSError, ValueError):
        raise Unusable("unreadable image file") from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's opinion of odd EXIF blocks and large images
            return _checked_image(data, height, width, verify)
    except (Unusable, MemoryError):
        raise
    except Exception:  # Pillow's parsers fail in every way there is: struct.error, SyntaxError, ZeroDivisionError, ...
        raise Unusable("corrupt or truncated image, or not an image") from None


def _checked_image(data, height, width, verify):
    image = Image.open(io.BytesIO(data))
    if image.size != (width, height):
        if image.size == (height, width) and image.getexif().get(_EXIF_ORIENTATION, 1) > 4:
            raise Unusable("size mismatch (EXIF orientation)")
        raise Unusable("size mismatch")
    format, end = _FORMATS.get(data[:2], (None, b""))
    # Some files carry padding or a second picture behind the end marker; then decoding has the last word.
    if verify or not format or not data.rstrip(b"\0\r\n ").endswith(end):
        image.load()
        if format and end not in data:
            raise Unusable("corrupt or truncated image, or not an image")
    if format:
        return data, format
    if image.mode not in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"):
        image = image.convert("RGB")
    return _png(image), "png"


def _png(image):
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)
    return file.getvalue()
