"""`polarmask summary`: parameters, multiply-adds and memory of a config's network, part by part, for one image.

Everything is read off the network itself: its variables, and the graph that one image takes through it.
"""

from __future__ import annotations

import collections
import functools
import math

import numpy as np
import tensorflow as tf

from polarmask_tf.config import CONVENTIONS, Config, DataConfig
from polarmask_tf.errors import InputError
from polarmask_tf.files import format_table
from polarmask_tf.inference.predictor import network_input
from polarmask_tf.lite import MAX_CLASSES
from polarmask_tf.modeling.polarmask import PolarMask

PICTURE = (480, 640)  # height and width of most COCO images, for configs whose input follows the image's ratio
# The first letters of what belongs to a tower in the head's scope.
_TOWERS = {"head, class tower": ("class", "centerness"), "head, ray tower": ("ray", "scale"), "head, box tower": ("box",)}
PARTS = ("backbone", "FPN", *_TOWERS, "refiner", "post-processing")
# Operations whose outputs take no memory of their own, or belong to the weights.
_FREE = {"Const", "ReadVariableOp", "Placeholder", "Identity", "IdentityN", "Reshape", "Squeeze", "ExpandDims", "EnsureShape"}
_CALLS = {"PartitionedCall", "StatefulPartitionedCall", "While", "StatelessWhile", "If", "StatelessIf"}


def print_summary(config: Config, num_classes: int = 80) -> list[dict]:
    """Prints the table of `summarize` with what its columns mean; returns its rows."""
    if num_classes > MAX_CLASSES:
        raise InputError(f"summary: {num_classes} classes, and the limit is {MAX_CLASSES}")
    height, width = input_size(config.data)
    rows = summarize(config, num_classes, (height, width))
    columns = {"part": "", "parameters": ",", "trainable": ",", "multiply_adds": ","}
    print(f"one image, input {height} x {width}, {num_classes} classes, {config.model.rays} rays")
    print(format_table(rows, columns | {"weights_mb": ".1f", "activations_mb": ".1f"}))
    print(
        "trainable: learned by gradient; the rest is frozen or running statistics. multiply_adds: of convolutions and matrix\n"
        "products; of post-processing those that turn candidates into polygons. weights, activations: float32, MB = 10^6 B.\n"
        "activations: all tensors that one forward pass makes. A training step keeps at most so much for the gradient, times\n"
        "images a step (gradients and optimizer come on top); inference frees most of it as it goes."
    )
    return rows


def input_size(data: DataConfig, image: tuple[int, int] = PICTURE) -> tuple[int, int]:
    """Height and width of the network's input for an image [height, width]; only `fit: short_side` depends on it."""
    return network_input(np.zeros((*image, 3), np.uint8), data)[0].shape[:2]


def summarize(config: Config, num_classes: int = 80, size: tuple[int, int] | None = None) -> list[dict]:
    """Rows {"part", "parameters", "trainable", "multiply_adds", "weights_mb", "activations_mb"} of PARTS and their "total".

    For one image of `size` (height and width, multiples of 32; by default input_size of the config). Normalisation of the
    image counts with the backbone. MB are 10^6 bytes of float32; see print_summary for what the columns mean.
    """
    size = size or input_size(config.data)
    if any(side < 32 or side % 32 for side in size):
        raise InputError(f"summary: the input is {list(size)}; multiples of 32 are needed")
    model = PolarMask(config, num_classes)
    images = tf.TensorSpec([1, *size, 3], tf.uint8)
    graph = tf.function(model.detect, input_signature=[images]).get_concrete_function().graph
    absent = {"head, box tower": not config.model.head.box, "refiner": model.refiner is None}
    parts = [part for part in PARTS if not absent.get(part)]
    rows = {part: collections.Counter() for part in parts}
    trainable = {id(variable) for variable in model.trainable_variables}
    names = {"backbone": "backbone", "decoder": "FPN", "refiner": "refiner"}
    for name, layer in model.parts.items():
        for variable in layer.weights:
            row = rows[names.get(name) or _tower(variable.name.removeprefix(f"{model.name}/head/"))]
            row["parameters"] += variable.shape.num_elements()
            row["trainable"] += variable.shape.num_elements() * (id(variable) in trainable)
    part_of = functools.cache(lambda op: _part(op, model.name, part_of))
    for op in graph.get_operations():
        row = rows[part_of(op) or "backbone"]
        row["multiply_adds"] += multiply_adds(op)
        row["activations"] += activations(op)
    rows["post-processing"]["multiply_adds"] += _decoding(config, num_classes, size)
    rows["total"] = sum(rows.values(), collections.Counter())
    counts = ("parameters", "trainable", "multiply_adds")
    return [
        {"part": part, **{key: row[key] for key in counts}}
        | {"weights_mb": 4e-6 * row["parameters"], "activations_mb": 4e-6 * row["activations"]}
        for part, row in rows.items()
    ]


def _part(op, model_name: str, part_of):
    """The part that an operation belongs to by its scope, or else by what it works on; None for the picture's own."""
    scope = op.name.split("/")
    if scope[0] != model_name:
        return None if op.type == "Placeholder" else "post-processing"
    known = {"backbone": "backbone", "decoder": "FPN", "refiner": "refiner"}.get(scope[1]) if len(scope) > 2 else None
    if known or len(scope) < 3:
        return known
    # A ReLU or a scale stands in the head's own scope; what it is applied to says in which tower.
    towers = (part_of(value.op) for value in op.inputs)
    return _tower(scope[2]) or next((tower for tower in towers if tower in _TOWERS), None)


def _tower(name: str) -> str | None:
    return next((tower for tower, starts in _TOWERS.items() if name.startswith(starts)), None)


def multiply_adds(op) -> int:
    """Of a convolution (also grouped or depthwise) or matrix product in a graph; 0 for other operations.

    Raises InputError for a call of another graph, whose operations would be missed.
    """
    if op.type in _CALLS:
        raise InputError(f"summary: {op.name} calls a graph of its own ({op.type}), which cannot be counted")
    if op.type in ("Conv2D", "DepthwiseConv2dNative"):
        # A kernel is [k, k, input channels / groups, outputs], depthwise [k, k, channels, multiplier]: in either case each
        # of its numbers is used once at every output position.
        batch, height, width, _ = op.outputs[0].shape
        return batch * height * width * op.inputs[1].shape.num_elements()
    if op.type in ("MatMul", "BatchMatMulV2"):
        return op.inputs[0].shape.num_elements() * op.outputs[0].shape[-1]
    return 0


def activations(op) -> int:
    """How many floating point numbers an operation makes; where post-processing does not know beforehand, none."""
    if op.type in _FREE:
        return 0
    return sum(output.shape.num_elements() or 0 for output in op.outputs if output.dtype.is_floating)


def _decoding(config: Config, num_classes: int, size) -> int:
    """Equations 1 and 2 for the candidates of every level: two multiply-adds a ray. NMS depends on the picture."""
    options = config.postprocess
    pairs = options.multi_label and not CONVENTIONS[config.conventions].class_threshold
    locations = (math.prod(-(-side // 2**level) for side in size) for level in config.model.fpn.levels)
    candidates = sum(min(options.pre_nms_top_k, count * (num_classes if pairs else 1)) for count in locations)
    return 2 * config.model.rays * candidates
