"""The weights of step 0 that --start names: of whatever was trained before, what fits the new network."""

from __future__ import annotations

import dataclasses
from operator import attrgetter
from pathlib import Path

import numpy as np

from polarmask_tf.errors import InputError, one_line
from polarmask_tf.modeling.polarmask import PolarMask
from polarmask_tf.weights import pretrained, released, runs, shipped
from polarmask_tf.weights.state_dict import summarize

STATE_DICTS = (".pth", ".pt", ".npz")
# What weights mean depends on these; where they differ from a run's it is said, since training can make up for it.
_MEANING = ("normalization", "mean", "std", "rays", "backbone.stride_in", "head.centerness_tower", "head.ray_unit")
MOST_CLASSES = 10  # that are named


def start_from(model: PolarMask, path: Path, chief: bool = True) -> None:
    """Gives `model` the weights at `path` that have its names and shapes, and tells in one line which parts begin anew.

    `path` is a run directory, a shipped model's name, a .keras file, a released PolarMask (.pth, .npz of its keys), or what
    model.backbone.weights may name: a checkpoint of tf-models-official, a backbone's .pth, .npz or .h5 file. Raises
    InputError, and changes nothing, if it cannot be read, nothing of it fits, or a config would need other settings for it.
    """
    path = shipped.resolve(path)
    mine, remark = runs.named_weights(model), ""
    if path.suffix in STATE_DICTS and released.is_released(tensors := released.read(path)):
        taken, remark = _take_released(model, tensors, path)
    elif path.suffix in (*STATE_DICTS, ".h5") or _is_garden(path):
        backbone = dataclasses.replace(model.config.model.backbone, weights=str(path))
        pretrained.initialize(model.backbone, dataclasses.replace(model.config.model, backbone=backbone))
        taken = {id(variable) for variable in model.backbone.variables}
    else:
        taken, remark = _take_run(model, mine, path)
    if chief:
        anew = [name for name, variable in mine.items() if id(variable) not in taken]
        rest = f"; anew: {summarize(anew)}" if anew else ""
        print(f"starting from {path}: {len(mine) - len(anew)} of {len(mine)} tensors{rest}{remark}")


def _take_run(model: PolarMask, mine: dict, path: Path) -> tuple[set[int], str]:
    """(ids of the variables that were assigned, what else is to be said) of a run or a .keras file."""
    theirs = runs.load_model(path)
    values = runs.named_weights(theirs)
    fitting = {name: variable for name, variable in mine.items() if name in values and values[name].shape == variable.shape}
    _need_some(fitting, path)
    for name, variable in fitting.items():  # in one order on all workers, who together assign BatchNorm's moving statistics
        variable.assign(values[name])
    differing = []
    for name in _MEANING:
        ours, other = (attrgetter(name)(each.config.model) for each in (model, theirs))
        differing += [f"model.{name}={_plain(other)}"] * (ours != other)
    ours, other = ([entry["name"] for entry in each.classes] for each in (model, theirs))
    if ours != other and len(ours) == len(other):  # whose class scores were taken; of another number they begin anew
        differing.append(f"the classes {one_line(', '.join(other[:MOST_CLASSES]))}{', ...' * (len(other) > MOST_CLASSES)}")
    return {id(variable) for variable in fitting.values()}, f"; it was trained with {', '.join(differing)}" if differing else ""


def _take_released(model: PolarMask, tensors: dict[str, np.ndarray], path: Path) -> tuple[set[int], str]:
    """The same of a released PolarMask. Its rays are taken where they mean the same: lengths in pixels, equal directions."""
    config = model.config.model
    # The authors' means differ by less than 1 from those of the weights that they began with: either will do.
    pretrained.require(config, str(path), released.needs(tensors), tolerance=1.0)
    values, remark = released.converted(tensors, config.backbone.stride_in), ""
    if config.head.ray_unit != "pixel":
        values = {key: value for key, value in values.items() if key not in released.RAYS and ".scales_" not in key}
        remark = "; its rays are in pixels: model.head.ray_unit=pixel takes them"
    elif values[released.RAYS[0]].shape[-1] == config.rays:
        turn = released.released_rays(config.rays)
        values |= {key: values[key][..., turn] for key in released.RAYS if key in values}
    fitting = {
        key: variable
        for key, variable in released.variables(model).items()
        if key in values and values[key].shape == tuple(variable.shape)
    }
    _need_some(fitting, path)
    for key, variable in fitting.items():
        variable.assign(values[key])
    return {id(variable) for variable in fitting.values()}, remark


def _need_some(fitting, path: Path) -> None:
    if not fitting:
        raise InputError(f"{path}: no tensor of it has a name and shape of this network; --start needs a similar one")


def _is_garden(path: Path) -> bool:
    """Whether a checkpoint of TensorFlow is there that is not in a run directory."""
    if path.is_dir():
        return (path / "checkpoint").is_file() and not (path / "config.yaml").exists()
    return path.suffix == ".index" or path.with_name(f"{path.name}.index").is_file()


def _plain(value):
    return list(value) if isinstance(value, tuple) else value
