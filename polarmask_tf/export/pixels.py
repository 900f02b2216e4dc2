"""An int8 file that reads the image's own 8 bits: mean and deviation in the first convolution's weights, no float image."""

from __future__ import annotations

import dataclasses

import numpy as np
from tensorflow.lite.python import schema_py_generated as schema

from polarmask_tf.export import flatbuffer
from polarmask_tf.export.flatbuffer import add_tensor, make_operation, scaled

ARITHMETIC = {"SUB": np.subtract, "ADD": np.add, "MUL": np.multiply, "DIV": np.divide}
ZERO = -128  # what stands for a pixel of 0 in int8; a step is one


@dataclasses.dataclass
class _Start:
    """How a file begins: what makes the first convolution's input of the image, and this convolution."""

    before: list  # operations
    conv: schema.OperatorT
    mean: np.ndarray  # [3], and factor: the convolution is of (pixel - mean) * factor
    factor: np.ndarray
    pads: list[tuple[int, int]]  # zeros before and after that it uses, of height and width


def fold(content: bytes, exact: bytes) -> bytes:
    """The 8-bit file `content` without the float image, where it begins with a normalisation by constants and a convolution;
    the same file elsewhere. `exact` is the float file of the same network.

    The image's border is padded with the mean, as the network pads with zeros what is normalised; rounded to a whole pixel
    value, less than half a step of the 8 bits that there were.
    """
    model, source = flatbuffer.unpack(content), flatbuffer.unpack(exact)
    start, original = _start(model), _start(source)
    if start is None or original is None or _type(model, start.conv.outputs[0]) != schema.TensorType.INT8:
        return content
    graph, conv = model.subgraphs[0], start.conv
    image = graph.inputs[0]
    height, width = graph.tensors[image].shape[1:3]
    weights, bias = (flatbuffer.constant(source, i) for i in original.conv.inputs[1:3])
    weights = weights * original.factor
    pads, pairs = _pairs(start, weights.shape[2], width)
    weights = np.pad(weights, [(0, 0), (0, 0), (0, weights.shape[2] % 2 if pairs else 0), (0, 0)])
    scales = np.maximum(np.abs(weights).max(axis=(1, 2, 3)), 1e-12) / 127
    rounded = np.round(weights / scales[:, None, None, None])
    # With the weights as they are rounded, so that an image of the mean still gives the bias alone.
    shift = bias / scales - (rounded * original.mean).sum(axis=(1, 2, 3))

    graph.tensors[image].quantization = scaled([1.0])
    pixels = add_tensor(model, "pixels", [1, height, width, 3], schema.TensorType.FLOAT32)
    reads = [make_operation(model, "DEQUANTIZE", 1, [image], pixels)]
    made = _pixels(model, "pixels_8_bits", [1, height, width, 3])
    reads.append(make_operation(model, "QUANTIZE", 1, [pixels], made))
    shape = np.array([height, width])
    for axis, (first, last) in enumerate(pads):
        sides = []
        for rows in (first, last):
            size = shape.copy()
            size[axis] = rows
            values = np.broadcast_to(np.round(original.mean) + ZERO, [1, *size, 3]).astype(np.int8)
            sides.append([_pixels(model, f"border_{axis}", values.shape, values)] if rows else [])
        if first + last:
            shape[axis] += first + last
            wider = _pixels(model, f"padded_{axis}", [1, *shape, 3])
            options = schema.ConcatenationOptionsT()
            options.axis, options.fusedActivationFunction = 1 + axis, 0
            reads.append(make_operation(model, "CONCATENATION", 2, [*sides[0], made, *sides[1]], wider, options))
            made = wider
    if pairs:
        options, dimensions = schema.ReshapeOptionsT(), np.array([1, shape[0], shape[1] // 2, 6], np.int32)
        options.newShape = dimensions
        by_two = _pixels(model, "pairs_of_pixels", dimensions)
        described = add_tensor(model, "pairs_shape", [4], schema.TensorType.INT32, dimensions)
        reads.append(make_operation(model, "RESHAPE", 1, [made, described], by_two, options))
        made, rounded = by_two, rounded.reshape(*rounded.shape[:2], -1, 6)
        conv.builtinOptions.strideW //= 2
    weights, bias, by_channel = rounded.astype(np.int8), np.round(shift).astype(np.int32), scaled(scales)
    weights = add_tensor(model, "stem_weights", weights.shape, schema.TensorType.INT8, weights, by_channel)
    bias = add_tensor(model, "stem_bias", bias.shape, schema.TensorType.INT32, bias, by_channel)
    conv.inputs = np.array([made, weights, bias], np.int32)
    conv.builtinOptions.padding = schema.Padding.VALID
    graph.operators = [*reads, *(op for op in graph.operators if not any(op is each for each in start.before))]
    flatbuffer.prune(model)
    return flatbuffer.pack(model)


def _pixels(model: schema.ModelT, name: str, shape, data: np.ndarray | None = None) -> int:
    return add_tensor(model, name, shape, schema.TensorType.INT8, data, scaled([1.0], ZERO))


def _pairs(start: _Start, columns: int, width: int) -> tuple[list[tuple[int, int]], bool]:
    """start.pads, and whether the convolution, so many columns wide, is to be one of pairs of pixels, 6 channels instead of 3,
    which LiteRT fills up to 8; the pads are then enough to make the padded width even, and with the kernel's."""
    options, (first, last) = start.conv.builtinOptions, start.pads[1]
    wide = columns + columns % 2
    made = (first + width + last - columns) // options.strideW + 1
    total = max(first + width + last, (made - 1) * options.strideW + wide)
    total += total % 2
    if options.strideW % 2 or options.dilationWFactor > 1 or (total - wide) // options.strideW + 1 != made:
        return start.pads, False
    return [start.pads[0], (first, total - first - width)], True


def _start(model: schema.ModelT) -> _Start | None:
    """None where it is something else."""
    graph, users = model.subgraphs[0], {}
    for op in graph.operators:
        for i in op.inputs:
            users.setdefault(int(i), []).append(op)
    at, before = int(graph.inputs[0]), []
    factor, offset, pads = np.ones(3), np.zeros(3), np.zeros([4, 2], int)
    while len(users.get(at, ())) == 1:
        [op] = users[at]
        kind, others = flatbuffer.kind_of(model, op), [flatbuffer.constant(model, i) for i in op.inputs[1:]]
        if op.inputs[0] != at or any(each is None for each in others):
            return None
        if kind == "CONV_2D":
            if others[0].shape[3] != 3 or len(others) != 2 or not factor.all() or pads[[0, 3]].any():
                return None
            return _Start(before, op, -offset / factor, factor, _used(graph, op, others[0].shape, pads))
        if kind in ARITHMETIC:
            [values] = others
            width = graph.tensors[at].shape[-1]
            if values.size not in (1, width) or width % 3 or op.builtinOptions.fusedActivationFunction or pads.any():
                return None
            by_channel = np.broadcast_to(values.reshape(-1), [width]).reshape(-1, 3).astype(np.float64)
            if (by_channel != by_channel[0]).any():
                return None
            offset = ARITHMETIC[kind](offset, by_channel[0])
            factor = ARITHMETIC[kind](factor, by_channel[0]) if kind in ("MUL", "DIV") else factor
        elif kind == "PAD":
            pads += others[0]
        elif kind not in ("CAST", "RESHAPE", "QUANTIZE"):
            return None
        before.append(op)
        at = int(op.outputs[0])
    return None


def _used(graph: schema.SubGraphT, conv: schema.OperatorT, weights: tuple, pads: np.ndarray) -> list[tuple[int, int]]:
    """The zeros that the convolution uses of those around its input and of its own, of height and width."""
    options, found = conv.builtinOptions, []
    strides, dilations = (options.strideH, options.strideW), (options.dilationHFactor, options.dilationWFactor)
    for axis, stride, dilation in zip((1, 2), strides, dilations, strict=True):
        size, made = (int(graph.tensors[i].shape[axis]) for i in (conv.inputs[0], conv.outputs[0]))
        needed = (made - 1) * stride + (weights[axis] - 1) * dilation + 1
        first = int(pads[axis, 0]) + (max(needed - size, 0) // 2 if options.padding == schema.Padding.SAME else 0)
        found.append((first, max(needed - first - (size - int(pads[axis].sum())), 0)))
    return found


def _type(model: schema.ModelT, tensor: int) -> int:
    return model.subgraphs[0].tensors[tensor].type
