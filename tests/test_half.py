"""fp16 files: in 16 bits is what convolutions multiply by and add, and nothing else."""

import numpy as np
import pytest
from ai_edge_litert.interpreter import Interpreter
from benchmarks.edge_table import make

from polarmask_tf.export import flatbuffer, tflite

HALF = np.dtype(np.float16)


@pytest.fixture(scope="module", params=["edge_small", "small"])
def files(request):
    """One of one tower and one with GroupNorm and votes: fp32 and fp16, as objects."""
    model = make(request.param, 64, 10)
    return [flatbuffer.unpack(tflite.convert(model, precision)) for precision in ("fp32", "fp16")]


def constants(model):
    """Bytes of the constants that each operation takes, by what it makes."""
    graph, halved = model.subgraphs[0], {}
    for op in graph.operators:
        if flatbuffer.kind_of(model, op) == "DEQUANTIZE":
            halved[op.outputs[0]] = np.frombuffer(bytes(model.buffers[graph.tensors[op.inputs[0]].buffer].data), HALF)
    for op in graph.operators:
        kind = flatbuffer.kind_of(model, op)
        if kind != "DEQUANTIZE":
            for place, number in enumerate(op.inputs):
                data = model.buffers[graph.tensors[number].buffer].data
                if number in halved or data is not None:
                    value = halved.get(number, None if data is None else bytes(data))
                    yield (graph.tensors[op.outputs[0]].name, place), (kind, value)


@pytest.mark.slow
def test_the_numbers_of_convolutions_alone_are_rounded(files):
    exact, half = (dict(constants(model)) for model in files)
    assert exact.keys() == half.keys() and len(exact) > 50
    rounded = {key for key, (_, value) in half.items() if isinstance(value, np.ndarray)}
    assert rounded == {key for key, (kind, _) in exact.items() if kind.endswith("CONV_2D")}
    for key, (_, value) in exact.items():
        found = half[key][1]
        if key in rounded:
            np.testing.assert_array_equal(found, np.frombuffer(value, np.float32).astype(HALF))
        else:
            assert found == value, key


def test_what_is_too_large_for_16_bits_stays():
    model = make("edge_small", 64, 10)
    bias = model.head.classes.conv.bias
    bias.assign(np.full(bias.shape, -70000.0))
    content = tflite.convert(model, "fp16", raw=True)
    found = Interpreter(model_content=content).get_signature_runner("serving_default")(
        images=np.zeros((1, 64, 64, 3), np.uint8)
    )
    assert (found["P3_classes"] < -60000).all()  # it runs, with weights of 16 bits beside
    half = dict(constants(flatbuffer.unpack(content)))
    kept = [np.frombuffer(value, np.float32) for kind, value in half.values() if kind == "CONV_2D" and isinstance(value, bytes)]
    assert kept and all((value == -70000).all() for value in kept)
