"""Which operations of a .tflite file compute in 8 bits, and the conversion that leaves the others in float."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import tensorflow as tf
from tensorflow.lite.python import schema_py_generated as schema

HEADS = tuple(f"/head/{name}/conv" for name in ("classes", "centerness", "rays", "boxes"))
_NAMES = {value: name for name, value in vars(schema.BuiltinOperator).items() if isinstance(value, int)}


def operations(content: bytes) -> list[tuple[str, list[int], list[int], list[str]]]:
    """Of a .tflite file's operations, in order: kind, the tensors it takes, those it gives, and the names of these.

    The kind of one that is not TensorFlow Lite's own is "CUSTOM" and its name, which begins with Flex if TensorFlow has it.
    """
    model = schema.ModelT.InitFromPackedBuf(content, 0)
    kinds = []
    for code in model.operatorCodes:
        name = _NAMES.get(max(code.builtinCode, code.deprecatedBuiltinCode), "UNKNOWN")
        custom = (code.customCode or b"").decode()
        kinds.append(f"{name} {custom}" if custom else name)
    graph = model.subgraphs[0]
    return [
        (kinds[op.opcodeIndex], [i for i in op.inputs if i >= 0], list(op.outputs),
         [graph.tensors[i].name.decode() for i in op.outputs])
        for op in graph.operators
    ]


def float_nodes(content: bytes) -> list[str]:
    """Names of the tensors that are to be made in float: all after the head's last convolutions, all before the first one.

    Scores, boxes moved apart for NMS, and exp have no range that 8 bits would cover: quantised, AP goes from .61 to .08.
    Nor has an image normalised by its own mean and deviation, before these are known.
    """
    quantised, after, names = set(), set(), []
    for kind, inputs, outputs, made in operations(content):
        if after & set(inputs):
            after |= set(outputs)
        elif kind.endswith("CONV_2D") or quantised & set(inputs):
            quantised |= set(outputs)
            if kind == "CONV_2D" and any(head in made[0] for head in HEADS):
                after |= set(outputs)
            continue
        names += made
    return names


def int8(folder: str, images: Callable[[], Iterable[np.ndarray]]) -> bytes:
    """The SavedModel in `folder`, one image in, as .tflite: network in 8 bits, what float_nodes names in float.

    `images` gives uint8 [H, W, 3] as the network takes them, on which the ranges of all tensors are measured. Weights have a
    scale for each output channel.
    """
    converter = tf.lite.TFLiteConverter.from_saved_model(folder)
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS]
    nodes = float_nodes(converter.convert())
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
    return debugger.get_nondebug_quantized_model()
