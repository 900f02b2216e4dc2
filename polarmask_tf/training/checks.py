"""What can be known to go wrong, checked before the first step and before anything of an earlier training is touched."""

from __future__ import annotations

import itertools
import sys

from polarmask_tf import config as configs
from polarmask_tf.config import Config
from polarmask_tf.data import dataset, records
from polarmask_tf.errors import InputError
from polarmask_tf.files import check_text
from polarmask_tf.ops import targets
from polarmask_tf.weights.state_dict import summarize


def check_layout(config: Config, replicas: int) -> None:
    """InputError for a batch, or a norm, that does not go with so many devices."""
    train, each = config.train, config.data.batch // replicas
    if config.data.batch % replicas:
        raise InputError(f"data.batch is {config.data.batch}, images over all devices: not divisible by {replicas} devices")
    if each % train.accumulate:
        raise InputError(
            f"data.batch is {config.data.batch}, {each} on each of {replicas} devices: not divisible by train.accumulate "
            f"({train.accumulate})"
        )
    if config.model.backbone.norm == "sync" and replicas > 1 and (train.jit_compile or train.accumulate > 1):
        raise InputError(
            "model.backbone.norm: sync does not go with train.jit_compile or train.accumulate on several devices; "
            "frozen and group do"
        )


def check_data(config: Config) -> dataset.DatasetInfo:
    """What data.train says about itself. InputError if it, or data.val where that is set, cannot be used or is not whole."""
    data = config.data
    if not data.train:
        raise InputError("no training data: give --data DIR, a directory made by `polarmask convert`")
    for path in filter(None, (data.train, data.val)):
        check_text(path)
    info = dataset.load(data.train)
    dataset.require_objects(info)
    if data.damaged == "fail":
        records.check_complete(info)
    if data.val:
        _check_validation(info, config)
    return info


def _check_validation(info: dataset.DatasetInfo, config: Config) -> None:
    train, path = config.data.train, config.data.val
    val = dataset.load(path)
    differences = [
        f"class {number} is {_named(theirs)}, in training {_named(ours)}"
        for number, (ours, theirs) in enumerate(itertools.zip_longest(info.classes, val.classes))
        if ours != theirs
    ]
    if differences:
        raise InputError(
            f"data.val: {path} has not the classes of {train}: {summarize(differences)} (of {len(info.classes)}); "
            "convert both with the same list of categories"
        )
    records.check_complete(val)


def warn(config: Config, info: dataset.DatasetInfo) -> None:
    """Tells stderr what a training on `info` goes without."""
    size, most = configs.input_size(config.data), config.data.max_instances
    lost = targets.unreachable_levels(config.model.fpn.levels, size, config.targets.ranges)
    if lost:
        names = ", ".join(f"P{level}" for level in lost)
        _tell(f"{names} can get no object in images of {' x '.join(map(str, size))}; shorten model.fpn.levels")
    images, objects = dataset.surplus(info, most)
    if objects:
        _tell(
            f"{config.data.train}: {objects} of {info.num_instances - info.num_crowd} objects, in {images} images, exceed "
            f"data.max_instances ({most}) and are ignored; set data.max_instances={info.max_instances} to learn from all"
        )
    if config.data.val:
        val = dataset.load(config.data.val)
        if val.id and val.id == info.id:
            _tell(f"{config.data.val}: is what the training learns from: AP will say nothing about other images")
        if val.num_instances == val.num_crowd:
            regions = f" but {val.num_crowd} crowd regions" if val.num_crowd else ""
            _tell(f"{config.data.val}: no object{regions} in {val.num_images} images: every AP will be -1")


def _named(entry: dict | None) -> str:
    return f"{entry['name']} (category {entry['category_id']})" if entry else "none"


def _tell(line: str) -> None:
    print(f"warning: {line}", file=sys.stderr)
