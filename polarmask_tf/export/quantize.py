"""Weights of 16 and of 8 bits, and .tflite files that compute in 8 bits where that does no harm."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import tensorflow as tf
from tensorflow.lite.python import schema_py_generated as schema

from polarmask_tf.export import flatbuffer, pixels

FLOAT16 = schema.TensorType.FLOAT16
# What copies or compares values, which 8 bits do as exactly, and move a quarter of the bytes.
EXACT = ("RESHAPE", "GATHER", "REDUCE_MAX", "ARG_MAX", "CONCATENATION", "SLICE", "TILE")


def float_nodes(content: bytes) -> list[str]:
    """Names of the tensors that are to be made in float: all before the first convolution, and after the head's last ones all
    but copies of the logits, of which post-processing gathers few.

    Scores, boxes moved apart for NMS, and exp have no range that 8 bits would cover: quantised, AP goes from .61 to .08.
    Nor has an image normalised by its own mean and deviation, before these are known. The zeros around the normalised image
    are 8 bits: there are a quarter of the bytes to copy.
    """
    operations, logits, found = flatbuffer.operations(content), set(), []
    for (kind, inputs, outputs, names), part in zip(operations, flatbuffer.parts(operations), strict=True):
        if kind == "CONV_2D" and any(head in names[0] for head in flatbuffer.HEADS):
            logits |= set(outputs)
        elif kind in EXACT and logits.issuperset(inputs if kind == "CONCATENATION" else inputs[:1]):
            logits |= set(outputs)
            continue
        if part != "network" and kind != "PAD":
            found += names
    return found


def half(folder: str) -> bytes:
    """The SavedModel in `folder` as .tflite: what convolutions multiply by and add, in 16 bits and made float32 as it runs.

    TensorFlow's converter halves every constant, the places of locations and the cosines of rays, too, and those that LiteRT's
    WebGPU joins with other tensors: on a GPU that has 16-bit numbers these do not compile where it computes in float32, and
    the file fails (seen on an H200; not on a software Vulkan, which has none).
    """
    converter = tf.lite.TFLiteConverter.from_saved_model(folder)
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS]
    model = flatbuffer.unpack(converter.convert())
    graph = model.subgraphs[0]
    halved = {}  # what makes float32 of them, by the tensor that it makes
    for op in graph.operators:
        if not flatbuffer.kind_of(model, op).endswith("CONV_2D"):
            continue
        for number in map(int, op.inputs[1:3]):
            values = flatbuffer.constant(model, number)
            # Levels share weights. A number beyond what 16 bits hold would become infinity.
            if number not in halved and values is not None and np.abs(values).max() <= np.finfo(np.float16).max:
                name = graph.tensors[number].name.decode()
                small = flatbuffer.add_tensor(model, f"{name}/half", values.shape, FLOAT16, values.astype(np.float16))
                graph.tensors[number].buffer = 0
                halved[number] = flatbuffer.make_operation(model, "DEQUANTIZE", 3, [small], number)
    graph.operators = [*halved.values(), *graph.operators]
    flatbuffer.prune(model)
    return flatbuffer.pack(model)


def int8(folder: str, images: Callable[[], Iterable[np.ndarray]]) -> bytes:
    """The SavedModel in `folder`, one image in, as .tflite: the network in 8 bits, what float_nodes names in float.

    `images` gives uint8 [H, W, 3] as the network takes them, on which the ranges of all tensors are measured. Weights have a
    scale for each output channel.
    """
    converter = tf.lite.TFLiteConverter.from_saved_model(folder)
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS]
    exact = converter.convert()
    nodes = float_nodes(exact)
    converter = tf.lite.TFLiteConverter.from_saved_model(folder)
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8, tf.lite.OpsSet.TFLITE_BUILTINS]
    converter.representative_dataset = lambda: ([image[np.newaxis]] for image in images())
    # The debugger is the one public way to tell the quantiser what to leave alone. It does not find operations of several
    # outputs by name: TOPK_V2, on scores, and NMS, which has no 8 bit form anyway.
    options = tf.lite.experimental.QuantizationDebugOptions(denylisted_nodes=nodes, denylisted_ops=["TOPK_V2"])
    debugger = tf.lite.experimental.QuantizationDebugger(
        converter=converter, debug_dataset=converter.representative_dataset, debug_options=options
    )
    return pixels.fold(debugger.get_nondebug_quantized_model(), exact)


def dynamic(folder: str) -> bytes:
    """The SavedModel in `folder` as .tflite: weights of dense convolutions in 8 bits, everything else in float.

    With a float image and 8-bit weights LiteRT has fast kernels (XNNPACK's) for dense convolutions alone; depthwise ones took
    most of the time, and have few weights. And the converter takes every large table for weights, that of the locations, too:
    in 8 bits they are pixels off, and small objects miss theirs.
    """
    converter = tf.lite.TFLiteConverter.from_saved_model(folder)
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS]
    source = flatbuffer.unpack(converter.convert())
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    model = flatbuffer.unpack(converter.convert())
    graph = model.subgraphs[0]
    weights = {int(op.inputs[1]) for op in graph.operators if flatbuffer.kind_of(model, op) == "CONV_2D"}
    floats = set()  # tensors that were 8 bits
    for number, tensor in enumerate(list(graph.tensors)):
        if number in weights or tensor.type != schema.TensorType.INT8 or tensor.quantization is None:
            continue
        values = flatbuffer.constant(model, number)
        original = None if values is None else _original(source, tensor.quantization, values)
        if original is not None:
            made = flatbuffer.add_tensor(model, tensor.name.decode(), original.shape, schema.TensorType.FLOAT32, original)
            tensor.buffer = graph.tensors[made].buffer  # one of its own: equal 8 bits of different tensors share theirs
            floats.add(number)
    instead = {}  # of what made float of them
    for op in graph.operators:
        taken, made = (int(side[0]) if len(side) else -1 for side in (op.inputs, op.outputs))
        if taken in floats and flatbuffer.kind_of(model, op) == "DEQUANTIZE":
            instead[made] = taken
        elif taken in floats and graph.tensors[made].type == schema.TensorType.INT8:  # a look-up in a table
            floats.add(made)
    for number in floats:
        graph.tensors[number].type, graph.tensors[number].quantization = schema.TensorType.FLOAT32, None
    graph.operators = [op for op in graph.operators if not set(map(int, op.outputs)) & set(instead)]
    for op in graph.operators:
        op.inputs = np.array([instead.get(int(number), int(number)) for number in op.inputs], np.int32)
    flatbuffer.prune(model)
    return flatbuffer.pack(model)


def _original(source: schema.ModelT, made: schema.QuantizationParametersT, values: np.ndarray) -> np.ndarray | None:
    """The constant of `source` that these 8-bit `values` were made of: of those of their shape the closest; None: of none."""
    scales, zeros = np.float32(made.scale), np.float32(made.zeroPoint)
    if len(scales) > 1:
        along = [-1 if axis == made.quantizedDimension else 1 for axis in range(values.ndim)]
        scales, zeros = scales.reshape(along), zeros.reshape(along)
    about = (values - zeros) * scales
    numbers = range(len(source.subgraphs[0].tensors))
    constants = (flatbuffer.constant(source, number) for number in numbers)
    floats = [each for each in constants if each is not None and each.dtype == np.float32 and each.shape == values.shape]
    return min(floats, key=lambda each: np.abs(each - about).max(), default=None)
