"""What is inside a .tflite file: its operations, and where the network ends and post-processing begins."""

from __future__ import annotations

import itertools

import flatbuffers
import numpy as np
from tensorflow.lite.python import schema_py_generated as schema

HEADS = tuple(f"/head/{name}/conv" for name in ("classes", "centerness", "rays", "boxes"))
_NAMES = {value: name for name, value in vars(schema.BuiltinOperator).items() if isinstance(value, int)}


class _Builder(flatbuffers.Builder):
    """Vectors begin at multiples of 16 bytes, as the format wants of weights."""

    def StartVector(self, elemSize, numElems, alignment):
        return super().StartVector(elemSize, numElems, max(16, alignment))


def unpack(content: bytes) -> schema.ModelT:
    """The file as objects; weights that lie behind the flatbuffer, as some quantizers leave them, come into it."""
    model = schema.ModelT.InitFromPackedBuf(content, 0)
    for buffer in model.buffers:
        if buffer.offset > 1:
            buffer.data = np.frombuffer(content, np.uint8, buffer.size, buffer.offset)
            buffer.offset = buffer.size = 0
    return model


def pack(model: schema.ModelT) -> bytes:
    """The objects as a file."""
    builder = _Builder(1 << 20)
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())


def prune(model: schema.ModelT) -> None:
    """Takes out the tensors that no operation uses, and what their buffers hold."""
    graph = model.subgraphs[0]
    used = {int(i) for op in graph.operators for i in (*op.inputs, *op.outputs)} | {*graph.inputs, *graph.outputs}
    kept = [i for i in range(len(graph.tensors)) if i in used]
    number = {old: new for new, old in enumerate(kept)} | {-1: -1}  # -1: an input that is left out
    buffers = {graph.tensors[i].buffer for i in kept} | {each.buffer for each in model.metadata or ()}
    for i, buffer in enumerate(model.buffers):
        if i not in buffers:
            buffer.data = None
    graph.tensors = [graph.tensors[i] for i in kept]
    for what in (graph, *graph.operators):
        what.inputs, what.outputs = (np.array([number[int(i)] for i in side], np.int32) for side in (what.inputs, what.outputs))
    for signature in model.signatureDefs or ():
        for each in (*signature.inputs, *signature.outputs):
            each.tensorIndex = number[each.tensorIndex]


def constant(model: schema.ModelT, tensor: int) -> np.ndarray | None:
    """A constant; None for what is computed."""
    described = model.subgraphs[0].tensors[tensor]
    data = model.buffers[described.buffer].data
    kinds = {schema.TensorType.FLOAT32: np.float32, schema.TensorType.INT32: np.int32, schema.TensorType.INT8: np.int8}
    if data is None or described.type not in kinds:
        return None
    return np.frombuffer(bytes(data), kinds[described.type]).reshape([] if described.shape is None else described.shape)


def scaled(scales, zero: int = 0) -> schema.QuantizationParametersT:
    """Of what is quantised: a number q stands for scale * (q - zero), of weights with a scale for each output channel."""
    made = schema.QuantizationParametersT()
    made.scale, made.zeroPoint = np.float32(scales), np.full(len(scales), zero, np.int64)
    made.quantizedDimension = 0
    return made


def add_tensor(model, name: str, shape, kind: int, data: np.ndarray | None = None, quantization=None) -> int:
    """A new tensor's number; with `data` a constant."""
    tensor = schema.TensorT()
    tensor.name, tensor.shape, tensor.type, tensor.buffer = name.encode(), np.array(shape, np.int32), kind, 0
    tensor.quantization = quantization
    if data is not None:
        buffer = schema.BufferT()
        buffer.data = np.frombuffer(data.tobytes(), np.uint8)
        model.buffers.append(buffer)
        tensor.buffer = len(model.buffers) - 1
    tensors = model.subgraphs[0].tensors
    tensors.append(tensor)
    return len(tensors) - 1


def make_operation(model, kind: str, version: int, inputs: list[int], output: int, options=None) -> schema.OperatorT:
    """A new operation, not yet in the graph."""
    number = getattr(schema.BuiltinOperator, kind)
    codes = [(code.builtinCode, code.version) for code in model.operatorCodes]
    if (number, version) not in codes:
        code = schema.OperatorCodeT()
        code.builtinCode = code.deprecatedBuiltinCode = number
        code.version = version
        model.operatorCodes.append(code)
        codes.append((number, version))
    op = schema.OperatorT()
    op.opcodeIndex = codes.index((number, version))
    op.inputs, op.outputs = np.array(inputs, np.int32), np.array([output], np.int32)
    if options is not None:
        op.builtinOptions = options
        op.builtinOptionsType = getattr(schema.BuiltinOptions, type(options).__name__.removesuffix("T"))
    return op


def operations(content: bytes) -> list[tuple[str, list[int], list[int], list[str]]]:
    """Of a .tflite file's operations, in order: kind, the tensors it takes, those it gives, and the names of these.

    The kind of one that is not TensorFlow Lite's own is "CUSTOM" and its name, which begins with Flex if TensorFlow has it.
    """
    model = schema.ModelT.InitFromPackedBuf(content, 0)
    graph = model.subgraphs[0]
    return [
        (
            kind_of(model, op),
            [i for i in op.inputs if i >= 0],
            list(op.outputs),
            [graph.tensors[i].name.decode() for i in op.outputs],
        )
        for op in graph.operators
    ]


def kind_of(model: schema.ModelT, op: schema.OperatorT) -> str:
    """As `operations` gives it."""
    code = model.operatorCodes[op.opcodeIndex]
    name = _NAMES.get(max(code.builtinCode, code.deprecatedBuiltinCode), "UNKNOWN")
    custom = (code.customCode or b"").decode()
    return f"{name} {custom}" if custom else name


def multiply_adds(content: bytes) -> list[tuple[str, int]]:
    """Of each convolution, in order: "1x1" (of stride 1), "depthwise" or "other", and its multiply-adds."""
    graph, found = schema.ModelT.InitFromPackedBuf(content, 0).subgraphs[0], []
    for op, (kind, inputs, outputs, _) in zip(graph.operators, operations(content), strict=True):
        if kind.endswith("CONV_2D"):
            # Weights are [outputs, k, k, inputs], depthwise [1, k, k, channels]: each is used once at every position.
            weights, made = (graph.tensors[i].shape for i in (inputs[1], outputs[0]))
            options = op.builtinOptions
            small = max(weights[1], weights[2], options.strideH, options.strideW) == 1
            name = "depthwise" if kind.startswith("DEPTHWISE") else "1x1" if small else "other"
            found.append((name, int(np.prod(weights)) * int(np.prod(made[:3]))))
    return found


def parts(operations: list) -> list[str]:
    """Of each operation, in order: "before" the first convolution, "network" up to the head's last ones, or "after" these."""
    network, after, found = set(), set(), []
    for kind, inputs, outputs, names in operations:
        if after & set(inputs):
            after |= set(outputs)
            found.append("after")
        elif kind.endswith("CONV_2D") or network & set(inputs):
            network |= set(outputs)
            if kind == "CONV_2D" and any(head in names[0] for head in HEADS):
                after |= set(outputs)
            found.append("network")
        else:
            found.append("before")
    return found


def reads_pixels(content: bytes) -> bool:
    """Whether the image goes into the network in its own 8 bits, as pixels.fold makes it."""
    return [kind for kind, *_ in operations(content)[:2]] == ["DEQUANTIZE", "QUANTIZE"]


def split_at_postprocess(content: bytes) -> tuple[bytes, bytes | None]:
    """The same file, ended where post-processing begins, and the post-processing alone; (the bytes given, None) without one.

    What the first gives the second takes, tensors of the same indices. Neither has a signature.
    """
    found = operations(content)
    late = [part == "after" for part in parts(found)]
    moving = set(schema.ModelT.InitFromPackedBuf(content, 0).subgraphs[0].inputs)  # what depends on the image
    for _, inputs, outputs, _ in found:
        if moving & set(inputs):
            moving |= set(outputs)
    taken = [set(), set()]  # by the network, by the post-processing
    for (_, inputs, _, _), after in zip(found, late, strict=True):
        taken[after] |= set(inputs)
    made = {i for (_, _, outputs, _), after in zip(found, late, strict=True) if not after for i in outputs}
    ends = sorted(taken[True] & made & moving)
    if not ends:
        return content, None

    def keep(half: bool) -> list[bool]:
        # What makes a constant of a constant, as of 16-bit weights, belongs to whichever half takes it.
        return [
            after == half if moving & set(outputs) else bool(taken[half] & set(outputs))
            for (_, _, outputs, _), after in zip(found, late, strict=True)
        ]

    return _cut(content, keep(False), outputs=ends), _cut(content, keep(True), inputs=ends)


def _cut(content: bytes, keep: list[bool], **ends) -> bytes:
    model = unpack(content)
    graph = model.subgraphs[0]
    graph.operators = list(itertools.compress(graph.operators, keep))
    for name, value in ends.items():
        setattr(graph, name, value)
    model.signatureDefs = []
    return pack(model)
