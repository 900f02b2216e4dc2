"""`polarmask check`: what would keep a network from learning a data set, said before it is trained.

What `convert` skipped and noted; pictures that cannot be read, are there twice or have no object; how large objects are at the
network's input; objects that no location learns; what perfect rays would reach; how many objects each class has.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import tempfile
import typing
from pathlib import Path

import numpy as np
from pycocotools import mask as coco_mask
from tqdm import tqdm

from polarmask_tf import config as configs
from polarmask_tf import console, lite
from polarmask_tf.config import Config
from polarmask_tf.data import dataset, records
from polarmask_tf.data.convert import convert_dataset
from polarmask_tf.data.dataset import DatasetInfo
from polarmask_tf.data.report import Report
from polarmask_tf.errors import InputError, one_line
from polarmask_tf.files import lock
from polarmask_tf.inference import ceiling
from polarmask_tf.inference.results import read_image
from polarmask_tf.tools import check_page, init_config
from polarmask_tf.tools.check_findings import TWICE, Findings, format_findings, some, warnings_of
from polarmask_tf.tools.check_locations import locator
from polarmask_tf.training import checks

CEILINGS = 2000  # objects that the ceiling is measured on
_MOST = 10_000  # objects of an image that are placed; data.max_instances allows no more


def run(
    source: Path,
    images: Path | None = None,
    *,
    config: str | None = None,
    overrides: typing.Sequence[str] = (),
    val: Path | None = None,
    out: Path = Path("check"),
    preview: int = 0,
    html: bool = False,
    limit: int | None = None,
) -> Findings:
    """`polarmask check`: looks, prints, and with `preview` or `html` writes check.png or check.html into `out`.

    `source` and `val` are converted data as init_config.locate takes it; `source` with `images` is a COCO JSON file and the
    directory of its images. `config`, as configs.load takes it with `overrides`: default, what `polarmask train` would fit.
    Raises InputError where training would be refused: nothing to learn, damaged records, images that cannot be read, other
    classes in `val`.
    """
    configs.load(config, overrides) if config else configs.check_overrides(overrides)  # before pictures are read
    with contextlib.ExitStack() as stack:
        if preview or html:
            stack.enter_context(lock(out, "check"))
        directory, found_val = stack.enter_context(_converted(Path(source), images))
        val = init_config.locate(Path(val))[0] if val else found_val
        settings = (
            configs.load(config, overrides)
            if config
            else configs.loads(init_config.fit(directory, val), f"polarmask init {directory}", overrides)
        )
        places = {"train": str(directory), "val": str(val or "")}
        settings = dataclasses.replace(settings, data=dataclasses.replace(settings.data, **places))
        info = checks.check_data(settings)
        pages = check_page.Pages(settings, info, preview, html, limit)
        found = look(info, settings, limit, pages)
        leaks = _shared_pictures(found, dataset.load(val)) if val else []
        warnings = [*warnings_of(found), *leaks]
        print(format_findings(found, warnings))
        for path in pages.write(out, warnings):
            print(f"wrote {path}")
        if found.unreadable:
            what = f"images that training would stop at, {len(found.unreadable)}: {some(found.unreadable)}"
            raise InputError(f"{source}: {what}; run `polarmask convert --verify`, which leaves them out")
        print(f"next: {_next(Path(source), images, val, config, overrides)}")
    return found


@contextlib.contextmanager
def _converted(source: Path, images: Path | None) -> typing.Iterator[tuple[Path, Path | None]]:
    """(converted data, converted validation data or None); what is not converted is, into a temporary directory."""
    train, val = init_config.locate(source)
    if os.path.isfile(train / "dataset.json") and images is None:
        yield train, val
        return
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "data"
        sets = convert_dataset(source, out, images=images)
        yield (out, None) if "" in sets else (out / next(iter(sets)), out / "val" if "val" in sets else None)


def look(info: DatasetInfo, config: Config, limit: int | None, pages: check_page.Pages) -> Findings:
    """Goes through the images once."""
    found = Findings(info, config)
    count, _, images, max_edges, found.report = ceiling.read(info.directory, limit)
    rays = config.model.rays, 2 * config.model.rays
    rebuild = ceiling.rebuilder(rays, (config.targets.center,), max_edges)
    locate = locator(config, max_edges, min(max(1, info.max_instances), _MOST))
    stored = records.iter_records(info)
    for image, (entry, features) in tqdm(zip(images, stored, strict=False), total=count, desc="check", unit="img"):
        name = one_line(entry["file_name"], 100)
        pixels = _pixels(image, features["image/encoded"].bytes_list.value[0], name, found)
        place = locate(image)
        before = len(found.small) + len(found.hidden)
        _objects(image, name, place, found)
        if len(found.ceilings) < CEILINGS:
            for annotation, its in ceiling.ceilings(image, rebuild, found.report):
                found.ceilings.append((annotation["label"], float(its[0])))
                found.finer.append(float(its[1]))
        if pixels is not None and pages.wants(found.images):
            lost = len(found.small) + len(found.hidden) - before
            pages.add(name, pixels, image, rebuild(image, Report())[1][0], place, lost)
        found.images += 1
    return found


def _pixels(image, encoded, name, found) -> np.ndarray | None:
    """The decoded picture, whose digest is noted; None, and noted, if it cannot be read."""
    try:
        pixels = read_image(encoded)
    except InputError as error:
        found.unreadable.append(f"{name} ({error})")
        return None
    if pixels.shape[:2] != (image["height"], image["width"]):
        found.unreadable.append(f"{name} (is {pixels.shape[1]} x {pixels.shape[0]}, the record says another size)")
        return None
    found.pixels.setdefault(digest(pixels), []).append(name)
    return pixels


def digest(pixels: np.ndarray) -> bytes:
    """Equal for equal pictures, however they are stored."""
    return hashlib.sha256(repr(pixels.shape).encode() + np.ascontiguousarray(pixels).tobytes()).digest()


def _objects(image, name, place, found):
    annotations, data = image["annotations"], found.config.data
    if not annotations:
        found.unlabelled.append(name)
    found.images_of.update({annotation["label"] for annotation in annotations})
    found.surplus += max(0, len(annotations) - data.max_instances)
    height, width = image["height"], image["width"]
    fitted = lite.fit_sizes(height, width, data.size, data.fit)[0]
    for number, annotation in enumerate(annotations):
        low, high = check_page.bounds(annotation["rings"])
        sides = np.minimum(high, (width, height)) - np.maximum(low, 0)
        found.shorter.append(float(sides.min()))
        found.scaled.append(float((sides * (fitted[1] / width, fitted[0] / height)).min()))
        found.longest.append(max(height, width))
        found.labels.append(annotation["label"])
        if not place.learned[number]:
            (found.hidden if place.alone[number] else found.small).append(f"{name}, annotation {annotation['id']}")
    if 1 < len(annotations) <= 2000:
        rles = [annotation["rle"] for annotation in annotations]
        ious = np.triu(coco_mask.iou(rles, rles, [0] * len(rles)), 1)
        found.twice += [
            f"{name}, annotations {annotations[a]['id']} and {annotations[b]['id']}"
            for a, b in np.argwhere(ious > TWICE).tolist()
        ]


def _shared_pictures(found: Findings, val: DatasetInfo) -> list[str]:
    """A warning where pictures are in the validation data too; and one where that has no object."""
    names = []
    for image, features in records.iter_records(val):
        with contextlib.suppress(InputError):  # of a picture that cannot be read, which evaluation will name
            same = found.pixels.get(digest(read_image(features["image/encoded"].bytes_list.value[0])))
            names += [f"{one_line(image['file_name'], 100)} = {same[0]}"] if same else []
    lines = [f"validation images that are training images too, {len(names)}: {some(names)}; AP would flatter"] if names else []
    if val.num_instances == val.num_crowd:
        lines.append(f"no object in the {val.num_images} validation images: every AP would be -1")
    return lines


def _next(source, images, val, config, overrides) -> str:
    if images is not None or not os.path.isfile(init_config.locate(source)[0] / "dataset.json"):
        return console.command("convert", source, *([images] if images else []), "data", "--split", "0.1")
    options = ["--config", config] if config else []
    options += ["--set", f"data.val={val}"] if val is not None and val.parent != source else []
    options += [word for override in overrides for word in ("--set", override)]
    return console.command("train", "--data", source, *options, "--out", f"runs/{source.resolve().name}")
