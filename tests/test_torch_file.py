"""weights/torch_file.py against torch.load(weights_only=True), and what a hostile file can try."""

import pickle
import struct
import time
import tracemalloc
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from polarmask_tf.errors import InputError
from polarmask_tf.weights.state_dict import read_tensors

torch = pytest.importorskip("torch")
DTYPES = ["float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"]


def saved(path, content, new_format=True, **options):
    torch.save(content, path, _use_new_zipfile_serialization=new_format, **options)
    return path


def assert_as_torch_reads_it(path, expected=None):
    found, expected = read_tensors(path), expected or torch.load(path, weights_only=True)
    expected = expected.get("state_dict", expected)
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        wanted = (tensor.float() if tensor.is_floating_point() else tensor).detach().numpy()
        assert found[name].dtype == wanted.dtype
        np.testing.assert_array_equal(found[name], wanted, err_msg=name)


@pytest.mark.parametrize("new_format", [True, False])
@pytest.mark.parametrize("protocol", [2, 4])
def test_tensors_of_every_type_and_layout(tmp_path, new_format, protocol):
    whole = torch.arange(24).reshape(2, 3, 4)
    state = OrderedDict((dtype, (whole % 3).to(getattr(torch, dtype))) for dtype in DTYPES)
    numbers = torch.randn(4, 5, 6)
    state |= {
        "view": numbers[1:3, ::2, 1],
        "turned": numbers.permute(2, 0, 1),
        "shares": numbers,
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 3),
        "parameter": torch.nn.Parameter(torch.randn(3)),
        "tied": numbers,
    }
    path = saved(tmp_path / "a.pth", state, new_format, pickle_protocol=protocol)
    assert_as_torch_reads_it(path, state if protocol == 4 else None)  # torch writes protocol 4, and reads 2 alone


@pytest.mark.parametrize("new_format", [True, False])
def test_what_a_training_saves(tmp_path, new_format):
    """With its optimizer and an OrderedDict that has attributes (the versions of its modules)."""
    module = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 3), torch.nn.BatchNorm2d(3))
    optimizer = torch.optim.SGD(module.parameters(), 0.1, momentum=0.9)
    module(torch.randn(2, 2, 8, 8)).sum().backward()
    optimizer.step()
    content = {
        "meta": {"epoch": 12, "time": "now", "CLASSES": ("a", "b")},
        "state_dict": module.state_dict(),
        "optimizer": optimizer.state_dict(),
    }
    assert_as_torch_reads_it(saved(tmp_path / "a.pth", content, new_format))


# ---- pickles by hand


def old_file(path, program, keys=(), numbers=b""):
    """A file of the old format whose content is a program of opcodes."""
    head = [pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})]
    path.write_bytes(b"".join([*head, program, pickle.dumps(list(keys), 2), numbers]))
    return path


def tensor_program(size=(2,), strides=(1,), offset=0, count=2, kind=b"FloatStorage", tail=b""):
    """{"a": a tensor}"""
    pid = b"(X\x07\0\0\0storagectorch\n" + kind + b"\nX\1\0\0\0kX\3\0\0\0cpu" + dump(count) + b"NtQ"
    arguments = pid + dump(offset) + dump(size) + dump(strides) + b"\x89N"
    return b"\x80\2}X\1\0\0\0actorch._utils\n_rebuild_tensor_v2\n(" + arguments + b"tRs" + tail + b"."


def dump(value):
    return pickle.dumps(value, 2)[2:-1]


NUMBERS = struct.pack("<q2f", 2, 1.0, 2.0)
DEEP = 100_000


def test_a_file_by_hand(tmp_path):
    path = old_file(tmp_path / "a.pth", tensor_program(), "k", NUMBERS)
    np.testing.assert_array_equal(read_tensors(path)["a"], [1, 2])
    assert_as_torch_reads_it(path)


HOSTILE = {
    "negative size": tensor_program(size=(-2,)),
    "negative stride": tensor_program(strides=(-1,)),
    "negative offset": tensor_program(offset=-1),
    "offset beyond": tensor_program(offset=1),
    "stride beyond": tensor_program(strides=(2,)),
    "huge size": tensor_program(size=(2**62, 2**62)),
    "one number many times": tensor_program(size=(10**9,), strides=(0,)),
    "empty and huge": tensor_program(size=(0, 2**40, 2**40), strides=(1, 1, 1)),
    "many dimensions": tensor_program(size=(1,) * 100, strides=(1,) * 100),
    "strides missing": tensor_program(strides=()),
    "sizes that are none": tensor_program(size=("x",)),
    "size that is a bool": tensor_program(size=(True,)),
    "huge storage": tensor_program(count=2**60),
    "storage of other length": tensor_program(count=1, size=(1,)),
    "negative storage": tensor_program(count=-2),
    "a storage that is none": tensor_program(kind=b"LongTensor"),
    "a storage twice, of two types": tensor_program(tail=tensor_program(kind=b"IntStorage")[2:-1] + b"0"),
    "os.system": b"\x80\2cos\nsystem\n(X\4\0\0\0exittR.",
    "os.system by the stack": b"\x80\4\x8c\2os\x8c\6system\x93\x8c\4exit\x85R.",
    "builtins": b"\x80\2cbuiltins\neval\n(X\1\0\0\0" + b"1tR.",
    "inst": b"(S'x'\nios\nsystem\n.",
    "extension": b"\x80\2\x82\1.",
    "new object": b"\x80\2ccollections\nOrderedDict\n)\x81.",
    "attributes of a tensor": tensor_program()[:-2] + b"}bs.",
    "a deep key": b"\x80\2}" + b")" + b"\x85" * DEEP + b"Ns.",
    "deep values": b"\x80\2}X\1\0\0\0a" + b"]" * DEEP + b"a" * (DEEP - 1) + b"s.",
    "a list in itself": b"\x80\2}X\1\0\0\0a]q\0h\0as.",
    "a far place of the memo": b"\x80\2}r\xff\xff\xff\xff.",
    "a long text": b"\x80\2X\xff\xff\xff\x7fabc.",
    "a long text of protocol 4": b"\x80\4\x8d" + b"\xff" * 7 + b"\x7fabc.",
    "a long number": b"\x80\2\x8b\xff\xff\xff\x7f1.",
    "digits": b"I" + b"9" * 10_000 + b"\n.",
    "a huge key": b"\x80\2}\x8b\x00\x10\0\0" + b"\x7f" * 4096 + b"Ns.",
    "an empty stack": b"\x80\2.",
    "no mark": b"\x80\2t.",
    "too many marks": b"\x80\2" + b"(" * DEEP + b".",
    "nothing for a tuple": b"\x80\2\x87.",
    "OrderedDict of numbers": b"\x80\2ccollections\nOrderedDict\n(K\1tR.",
    "no end": b"\x80\2}",
    "no value": b"\x80\2}X\1\0\0\0as.",
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("new_format", [True, False])
def test_hostile_pickles_are_refused_in_one_line_and_little_memory(tmp_path, name, new_format):
    path = tmp_path / "a.pth"
    if new_format:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a/data.pkl", HOSTILE[name])
            archive.writestr("a/data/k", NUMBERS[8:])
    else:
        old_file(path, HOSTILE[name], "k", NUMBERS)
    began = time.process_time()
    tracemalloc.start()
    try:
        with pytest.raises(InputError) as error:
            read_tensors(path)
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()
    message = str(error.value)
    assert "\n" not in message and str(path) in message and time.process_time() - began < 10


def test_objects_that_are_not_loaded_are_named(tmp_path):
    for name, expected in {
        "os.system": "os.system",
        "builtins": "builtins.eval",
        "extension": "EXT1",
        "new object": "NEWOBJ",
    }.items():
        with pytest.raises(InputError, match=f"{expected}.*could run code"):
            read_tensors(old_file(tmp_path / "a.pth", HOSTILE[name], "k", NUMBERS))


def test_many_tensors_of_one_storage_do_not_fill_the_memory(tmp_path):
    """A thousand names of one tensor of a megabyte."""
    numbers = torch.zeros(2**18)
    path = saved(tmp_path / "a.pth", {f"t{i}": numbers for i in range(1000)})
    with pytest.raises(InputError, match="truncated"):
        read_tensors(path)


def test_hostile_archives(tmp_path):
    path, pickled = tmp_path / "a.pth", tensor_program()
    for entries, method in (
        ({"a/data.pkl": pickled, "b/data.pkl": pickled, "a/data/k": NUMBERS[8:]}, zipfile.ZIP_STORED),
        ({"a/data.pkl": pickled, "a/data/k": NUMBERS[8:], "a/byteorder": b"middle"}, zipfile.ZIP_STORED),
        ({"a/data.pkl": pickled, "a/data/k": NUMBERS[8:-1]}, zipfile.ZIP_STORED),
        ({"a/data.pkl": pickled, "a/data/k": bytes(10**7)}, zipfile.ZIP_DEFLATED),
        ({"a/data.pkl": pickled}, zipfile.ZIP_STORED),
        ({"a/x": b""}, zipfile.ZIP_STORED),
    ):
        with zipfile.ZipFile(path, "w", method) as archive:
            for name, data in entries.items():
                archive.writestr(name, data)
        with pytest.raises(InputError, match="truncated, or not a PyTorch"):
            read_tensors(path)


def test_the_other_byte_order(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.pth", "w") as archive:
        archive.writestr("a/data.pkl", tensor_program())
        archive.writestr("a/byteorder", "big")
        archive.writestr("a/data/k", struct.pack(">2f", 1, 2))
    np.testing.assert_array_equal(read_tensors(tmp_path / "a.pth")["a"], [1, 2])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Files of both formats, as bytes."""
    folder = tmp_path_factory.mktemp("whole")
    state = {"state_dict": OrderedDict(a=torch.ones(2, 3), b=torch.arange(4)), "meta": {"CLASSES": ("x", "y")}}
    return [saved(folder / "a.pth", state, new_format).read_bytes() for new_format in (True, False)]


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_changed_bytes_are_refused_or_harmless(whole, tmp_path_factory, data):
    content = bytearray(data.draw(st.sampled_from(whole)))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(content)))
        match data.draw(st.sampled_from(["set", "cut", "insert", "delete"])):
            case "set":
                content[at : at + 1] = data.draw(st.binary(min_size=1, max_size=4))
            case "cut":
                del content[at:]
            case "insert":
                content[at:at] = data.draw(st.binary(max_size=8))
            case "delete":
                del content[at : at + data.draw(st.integers(1, 9))]
    path = tmp_path_factory.getbasetemp() / "changed.pth"
    path.write_bytes(content)
    try:
        tensors = read_tensors(path)
    except InputError as error:
        assert str(error).isprintable()
    else:
        assert all(isinstance(value, np.ndarray) for value in tensors.values())


def test_a_pickle_without_end_is_given_up(tmp_path):
    began = time.process_time()
    with pytest.raises(InputError):
        read_tensors(old_file(tmp_path / "a.pth", b"\x80\2" + b"N0" * (4 << 20) + b"}.", "k", NUMBERS))
    assert time.process_time() - began < 30
