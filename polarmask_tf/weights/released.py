"""Weights of the released PyTorch models (and of anything with the same keys) into a run directory.

Source: the released checkpoints' keys and conventions, see docs/released.md.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import numpy as np
import tensorflow as tf

from polarmask_tf import config as configs
from polarmask_tf import files
from polarmask_tf.data import dataset
from polarmask_tf.errors import InputError
from polarmask_tf.modeling.polarmask import PolarMask
from polarmask_tf.weights import pretrained, runs
from polarmask_tf.weights.state_dict import read_tensors

# The 80 classes of COCO in the order of their ids, which is that of the released models' class scores. Ten ids name nothing.
_NAMES = """
person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, stop sign, parking
meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, backpack, umbrella, handbag, tie,
suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard, surfboard, tennis
racket, bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange, broccoli, carrot, hot dog,
pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv, laptop, mouse, remote, keyboard, cell
phone, microwave, oven, toaster, sink, refrigerator, book, clock, vase, scissors, teddy bear, hair drier, toothbrush
"""
_UNUSED = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}
_IDS = [number for number in range(1, 91) if number not in _UNUSED]
COCO = dict(zip(_IDS, " ".join(_NAMES.split()).split(", "), strict=True))
RAYS = ("bbox_head.polar_mask.weight", "bbox_head.polar_mask.bias")
COCO_CLASSES = [{"name": name, "category_id": number} for number, name in COCO.items()]


def import_weights(
    checkpoint: str | os.PathLike, config: configs.Config, run: Path, *, data: str | os.PathLike = ""
) -> PolarMask:
    """Makes a run directory, which evaluate, predict, export and train --start accept, of a released checkpoint.

    Args:
      checkpoint: .pth, or .npz with the same keys, see tensors.read_tensors.
      config: of the same network; the released_* ones fit the released files. Without a box branch the checkpoint's goes
        unused, which is said.
      run: directory to make; must not exist yet, or be empty.
      data: converted data set whose classes the model was trained on, in that order; "" = the 80 of COCO.

    Rays are reordered from the released angles (from straight down, towards +x) to the paper's, which needs a number of
    rays that 4 divides; the first convolution of "caffe" models (stride_in: 1x1) is turned from BGR to RGB.
    Raises InputError where any tensor is missing, left over or of another shape, naming it.
    """
    if run.exists() and not run.is_dir():
        raise InputError(f"{run}: exists already; choose another --out")
    with files.lock(run, "import-weights"):
        if {path.name for path in run.iterdir()} - {files.LOCK}:
            raise InputError(f"{run}: exists already; choose another --out")
        return _import(checkpoint, config, run, data)


def _import(checkpoint, config, run, data):
    tensors = read(checkpoint)
    classes = dataset.load(data).classes if data else COCO_CLASSES
    _check_kind(checkpoint, tensors, config, len(classes))
    model = PolarMask(config, classes)
    left = _assign(checkpoint, tensors, model)
    if left:
        print(f"{checkpoint}: the box branch, {len(left)} tensors, goes unused: the config has none", file=sys.stderr)
    runs.write_run(run, config, {"classes": classes, "name": Path(checkpoint).name, "num_images": 0})
    runs.save(model, run, 0, weights_only=True)
    return model


def released_rays(rays: int) -> np.ndarray:
    """Which released ray each of ours is, int [rays]: theirs start straight down and turn towards +x.

    Raises InputError unless 4 divides `rays`: the two sets of directions are then not the same.
    """
    if rays % 4:
        raise InputError(f"model.rays is {rays}: released rays have other directions than ours unless 4 divides their number")
    return (rays // 4 - np.arange(rays)) % rays


def _renamed(key: str) -> str:
    return key.replace("bbox_head.fcos_", "bbox_head.polar_")  # as uploaded before 2019-11-12


def _check_kind(checkpoint, tensors, config, num_classes):
    """One line for the commonest mistakes, which would otherwise be hundreds of missing and unexpected tensors."""
    if any("offset" in key for key in tensors):
        raise InputError(f"{checkpoint}: has deformable convolutions (DCN), which TensorFlow lacks; use a model without them")
    if not is_released(tensors):
        raise InputError(f"{checkpoint}: not a PolarMask checkpoint (bbox_head.polar_mask.weight is missing)")
    depth = [
        len({m[1] for key in tensors if (m := re.match(rf"backbone\.layer{stage}\.(\d+)\.", key))}) for stage in (1, 2, 3, 4)
    ]
    blocks = list(config.model.backbone.blocks)
    if depth != blocks:
        raise InputError(f"{checkpoint}: has {depth} blocks in its stages, the config {blocks}; choose the config of its depth")
    groups = config.model.backbone.groups
    grouped = tensors.get("backbone.layer1.0.conv2.weight", np.empty((1, 0))).shape[1] < 64
    if grouped != (groups > 1):
        kinds = "ResNeXt, the config a ResNet" if grouped else "ResNet, the config a ResNeXt"
        raise InputError(f"{checkpoint}: is of a {kinds}; choose the config of its backbone")
    found = {
        "classes": (len(tensors.get("bbox_head.polar_cls.bias", ())), num_classes, "give the data of its classes with --data"),
        "rays": (len(tensors.get("bbox_head.polar_mask.bias", ())), config.model.rays, "set model.rays"),
    }
    for what, (theirs, ours, advice) in found.items():
        if theirs != ours:
            raise InputError(f"{checkpoint}: has {theirs} {what}, not {ours}; {advice}")


def _assign(checkpoint, tensors, model) -> list[str]:
    """Every tensor to its variable; returns the names of a box branch that the model lacks."""
    targets = variables(model)
    box = {key for key in tensors if re.match(r"bbox_head\.(reg_convs|polar_reg|scales_bbox)\b", key)}
    left = sorted(box - set(targets))
    values = converted({key: value for key, value in tensors.items() if key not in left}, model.config.model.backbone.stride_in)
    pretrained.check(targets, values, str(checkpoint))
    turn = released_rays(model.config.model.rays)
    for part in RAYS:
        values[part] = values[part][..., turn]
    for key, variable in targets.items():
        variable.assign(values[key])
    return left


def read(checkpoint) -> dict[str, np.ndarray]:
    """The tensors of a file by the names of the last release."""
    tensors = read_tensors(checkpoint)
    return {_renamed(key): value for key, value in tensors.items() if not key.endswith("num_batches_tracked")}


def is_released(tensors: dict) -> bool:
    """Whether they are of a PolarMask."""
    return RAYS[0] in tensors


def converted(tensors: dict[str, np.ndarray], stride_in: str) -> dict[str, np.ndarray]:
    """Kernels as TensorFlow has them, [height, width, in, out]; "caffe" models' first one from BGR to RGB."""
    values = {key: value.transpose(2, 3, 1, 0) if value.ndim == 4 else value for key, value in tensors.items()}
    first = "backbone.conv1.weight"
    if stride_in == "1x1" and first in values:
        values[first] = values[first][:, :, ::-1]
    return values


def needs(tensors: dict[str, np.ndarray]) -> dict:
    """The settings that a config needs to start from these, see pretrained.require."""
    caffe = {"model.mean": (122.7717, 115.9465, 102.9801), "model.std": (1.0, 1.0, 1.0), "model.normalization": "fixed"}
    backbone = {key.removeprefix("backbone."): value for key, value in tensors.items() if key.startswith("backbone.")}
    wanted = pretrained.shape_of_resnet({key: v.transpose(2, 3, 1, 0) if v.ndim == 4 else v for key, v in backbone.items()})
    if wanted.get("model.backbone.groups", 1) > 1:  # the ResNeXt began from PyTorch's weights, the others from Caffe's
        return {"model.backbone.type": "resnet", **wanted, **pretrained.TORCHVISION_NEEDS}
    return {"model.backbone.type": "resnet", **wanted, "model.backbone.stride_in": "1x1", **caffe}


def variables(model: PolarMask) -> dict[str, tf.Variable]:
    """The variables of a model with a ResNet by the released names; without those that no released model has."""
    named = {f"backbone.{key}": variable for key, variable in pretrained.variables(model.backbone).items()}
    return named | _fpn_keys(model.decoder) | _head_keys(model.head)


def _fpn_keys(fpn) -> dict[str, tf.Variable]:
    layers = {f"lateral_convs.{int(level) - 3}": layer for level, layer in fpn.laterals.items()}
    if fpn.config.conv == "dense":
        layers |= {f"fpn_convs.{int(level) - 3}": layer for level, layer in {**fpn.outputs, **fpn.extras}.items()}
    return {
        f"neck.{name}.conv.{part}": variable
        for name, layer in layers.items()
        for part, variable in (("weight", layer.conv.kernel), ("bias", layer.conv.bias))
    }


def _head_keys(head) -> dict[str, tf.Variable]:
    towers = {"class": "cls", "ray": "mask", "box": "reg"}
    outputs = {"classes": "cls", "centerness": "centerness", "rays": "mask"}
    scales = {"mask": head.scales}
    if "box" in head.towers:
        outputs["boxes"] = "reg"
        scales["bbox"] = head.box_scales
    keys = {}
    for tower in head.towers if head.config.norm == "group" and head.config.conv == "dense" else ():
        for i, (conv, norm) in enumerate(zip(getattr(head, f"{tower}_convs"), getattr(head, f"{tower}_norms"), strict=True)):
            name = f"{towers[tower]}_convs.{i}"
            keys |= {f"{name}.conv.weight": conv.conv.kernel, f"{name}.gn.weight": norm.gamma, f"{name}.gn.bias": norm.beta}
    for ours, theirs in outputs.items():
        conv = getattr(head, ours).conv
        keys |= {f"polar_{theirs}.weight": conv.kernel, f"polar_{theirs}.bias": conv.bias}
    for name, by_level in scales.items():
        keys |= {f"scales_{name}.{int(level) - 3}.scale": scale for level, scale in by_level.items()}
    return {f"bbox_head.{key}": variable for key, variable in keys.items()}
