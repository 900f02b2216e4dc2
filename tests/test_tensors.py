"""tensors.py: state dicts out of files of PyTorch and numpy, and one clear line for everything else."""

import os
import sys
from collections import OrderedDict

import numpy as np
import pytest

from polarmask_tf.errors import InputError
from polarmask_tf.weights.state_dict import read_tensors, summarize

ARRAYS = {"conv1.weight": np.arange(24, dtype=np.float32).reshape(2, 3, 2, 2), "bn1.num_batches_tracked": np.array(7)}


def torch_or_skip():
    return pytest.importorskip("torch")


def saved(path, content, **options):
    torch_or_skip().save(content, path, **options)
    return path


def state_dict(prefix="", dtype=None):
    torch = torch_or_skip()
    tensors = {prefix + name: torch.tensor(array) for name, array in ARRAYS.items()}
    return OrderedDict((n, t.to(dtype) if dtype and t.is_floating_point() else t) for n, t in tensors.items())


def assert_is_arrays(tensors):
    assert set(tensors) == set(ARRAYS)
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(tensors[name], array)
    assert tensors["conv1.weight"].dtype == np.float32


def error_of(path):
    with pytest.raises(InputError) as raised:
        read_tensors(path)
    message = str(raised.value)
    assert "\n" not in message and str(path) in message and len(message) < 300
    assert "weights_only" not in message  # torch's advice to load whatever it is
    return message


@pytest.mark.parametrize("new_format", [True, False])
@pytest.mark.parametrize("wrapped", [True, False])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_checkpoints_of_both_formats(tmp_path, new_format, wrapped, prefix, capsys):
    content = state_dict(prefix)
    if wrapped:
        content = {"meta": {"epoch": 12, "config": "text", "CLASSES": ("a", "b")}, "state_dict": content, "optimizer": {}}
    path = saved(tmp_path / "a.pth", content, _use_new_zipfile_serialization=new_format)
    assert_is_arrays(read_tensors(path))
    assert capsys.readouterr().err == ""


def test_npz_of_the_same_keys_needs_no_torch(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    np.savez(tmp_path / "a.npz", **ARRAYS)
    assert_is_arrays(read_tensors(str(tmp_path / "a.npz")))
    np.savez_compressed(tmp_path / "b.npz", **{f"module.{name}": array for name, array in ARRAYS.items()})
    assert_is_arrays(read_tensors(tmp_path / "b.npz"))


def test_a_prefix_that_only_some_keys_have_is_kept(tmp_path):
    np.savez(tmp_path / "a.npz", **{"module.a": np.ones(2, np.float32), "b": np.ones(2, np.float32)})
    assert set(read_tensors(tmp_path / "a.npz")) == {"module.a", "b"}


@pytest.mark.parametrize("new_format", [True, False])
def test_a_pth_needs_no_torch(tmp_path, monkeypatch, new_format):
    path = saved(tmp_path / "a.pth", state_dict(), _use_new_zipfile_serialization=new_format)
    monkeypatch.setitem(sys.modules, "torch", None)
    assert_is_arrays(read_tensors(path))


@pytest.mark.parametrize("kind", ["float16", "bfloat16", "float64"])
def test_other_precisions_become_float32(tmp_path, kind, capsys):
    torch = torch_or_skip()
    path = saved(tmp_path / "a.pth", state_dict(dtype=getattr(torch, kind)))
    assert_is_arrays(read_tensors(path))  # the numbers up to 23 are exact in all of them
    said = capsys.readouterr().err
    assert (said == "") if kind == "float64" else (said.count("\n") == 1 and "1 of 2 tensors have half precision" in said)


def test_half_precision_in_an_npz_is_said_too(tmp_path, capsys):
    np.savez(tmp_path / "a.npz", a=np.float16([1, 2]))
    assert read_tensors(tmp_path / "a.npz")["a"].dtype == np.float32
    assert "half precision" in capsys.readouterr().err


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_values_that_are_not_finite_are_refused(tmp_path, value):
    np.savez(tmp_path / "a.npz", good=np.ones(3), running_var=np.float16([1, value]))
    assert "running_var" in error_of(tmp_path / "a.npz")


def test_missing_files_and_directories(tmp_path):
    assert "no such file" in error_of(tmp_path / "a.pth")
    assert "no such file" in error_of(tmp_path)


@pytest.mark.parametrize("new_format", [True, False])
@pytest.mark.parametrize("keep", [0, 1, 10, 0.5, -40, -1])
def test_truncated_checkpoints(tmp_path, new_format, keep):
    data = saved(tmp_path / "whole.pth", state_dict(), _use_new_zipfile_serialization=new_format).read_bytes()
    path = tmp_path / "cut.pth"
    path.write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    assert "truncated" in error_of(path)


@pytest.mark.parametrize("keep", [0, 1, 10, 0.5, -40, -1])
def test_truncated_npz(tmp_path, keep):
    np.savez(tmp_path / "whole.npz", **ARRAYS)
    data, path = (tmp_path / "whole.npz").read_bytes(), tmp_path / "cut.npz"
    path.write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    assert "truncated" in error_of(path)


def test_an_npz_with_a_flipped_byte(tmp_path):
    np.savez(tmp_path / "a.npz", a=np.arange(1000.0))
    data = bytearray((tmp_path / "a.npz").read_bytes())
    data[500] ^= 255
    (tmp_path / "a.npz").write_bytes(data)
    assert "truncated" in error_of(tmp_path / "a.npz")


@pytest.mark.parametrize("suffix", ["pth", "npz"])
@pytest.mark.parametrize(
    "data", [b"<html>not found</html>", b"\x89HDF\r\n\x1a\n" * 9, b"version https://git-lfs.github.com/spec"]
)
def test_foreign_files(tmp_path, suffix, data):
    torch_or_skip()
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(data)
    assert "truncated, or not" in error_of(path)


def test_a_single_array_is_no_npz(tmp_path):
    np.save(tmp_path / "a.npy", np.ones(3))
    os.replace(tmp_path / "a.npy", tmp_path / "a.npz")
    assert "not an .npz" in error_of(tmp_path / "a.npz")


def test_pickled_objects_are_not_loaded(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    np.savez(tmp_path / "a.npz", a=np.array([Bomb()], dtype=object))
    assert "could run code" in error_of(tmp_path / "a.npz")
    for content in ({"state_dict": {"a": Bomb()}}, torch_or_skip().nn.Linear(2, 2)):
        assert "could run code" in error_of(saved(tmp_path / "a.pth", content))
    assert not (tmp_path / "ran").exists()


def test_what_is_not_a_dict_of_tensors(tmp_path):
    torch = torch_or_skip()
    assert "not a list" in error_of(saved(tmp_path / "a.pth", [1, 2]))
    assert "not a Tensor" in error_of(saved(tmp_path / "a.pth", torch.ones(3)))
    assert "no tensors" in error_of(saved(tmp_path / "a.pth", {}))
    assert "'epoch'" in error_of(saved(tmp_path / "a.pth", {"a": torch.ones(3), "epoch": 3}))
    assert "a int" in error_of(saved(tmp_path / "a.pth", {3: torch.ones(3)}))
    assert "torch._utils._rebuild_sparse_tensor" in error_of(saved(tmp_path / "a.pth", {"a": torch.ones(3).to_sparse()}))
    assert "torch.ComplexFloatStorage" in error_of(saved(tmp_path / "a.pth", {"a": torch.ones(3, dtype=torch.complex64)}))
    np.savez(tmp_path / "a.npz", a=np.array(["text"]))
    assert "'a'" in error_of(tmp_path / "a.npz")


def test_summaries_name_a_few():
    assert summarize(["a"]) == "a" and summarize("abc") == "a, b, c" and summarize("abcdef") == "a, b, c and 3 more"
