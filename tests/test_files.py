"""files.py: one process at a time writes into a directory, and the next one is told whom it waits for."""

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import threading

import pytest

from polarmask_tf import files
from polarmask_tf.errors import InputError

HOLD = """
import sys
from polarmask_tf import files
with files.lock(sys.argv[1], "train"):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lock of tmp_path / "run" until its stdin ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "run")],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_a_second_process_is_told_who_holds_the_directory(holder, tmp_path):
    with pytest.raises(InputError) as error, files.lock(tmp_path / "run", "convert"):
        pytest.fail("two hold it")
    said = f"{tmp_path / 'run'}: in use by polarmask train (process {holder.pid} on {socket.gethostname()}, since 20"
    assert str(error.value).startswith(said) and "choose another --out" in str(error.value)
    assert "\n" not in str(error.value)
    holder.communicate("")
    with files.lock(tmp_path / "run", "convert"):
        pass
    assert not (tmp_path / "run").exists()  # made by the first, which left it empty


def test_any_death_releases_it(holder, tmp_path):
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    assert (tmp_path / "run" / files.LOCK).exists()
    with files.lock(tmp_path / "run", "convert"):
        assert json.loads((tmp_path / "run" / files.LOCK).read_text())["pid"] == os.getpid()
    assert list((tmp_path / "run").iterdir()) == []  # not made here: kept


def test_one_process_cannot_hold_it_twice(tmp_path):
    me = rf"polarmask predict \(process {os.getpid()} on"
    with files.lock(tmp_path, "predict"), pytest.raises(InputError, match=me), files.lock(tmp_path, "train"):
        pytest.fail("two hold it")
    with files.lock(tmp_path, "predict"):
        pass


def test_what_was_made_for_nothing_is_removed_and_what_was_written_is_kept(tmp_path):
    with pytest.raises(KeyError), files.lock(tmp_path / "a" / "b", "train"):
        raise KeyError
    assert not (tmp_path / "a" / "b").exists()
    with files.lock(tmp_path / "c", "train"):
        (tmp_path / "c" / "kept").write_text("")
    assert os.listdir(tmp_path / "c") == ["kept"]


def test_a_file_removed_between_opening_and_locking_locks_nothing(tmp_path, monkeypatch):
    take, calls = files._take, []

    def slow(file, directory):
        calls.append(file)
        if len(calls) == 1:  # the holder before ends just now
            (directory / files.LOCK).unlink()
        take(file, directory)

    monkeypatch.setattr(files, "_take", slow)
    with files.lock(tmp_path, "train"):
        monkeypatch.setattr(files, "_take", take)
        with pytest.raises(InputError, match="in use"), files.lock(tmp_path, "train"):
            pytest.fail("two hold it")
    assert len(calls) == 2


def test_a_holder_that_has_not_written_its_name_yet_is_waited_for(tmp_path):
    with files.lock(tmp_path, "train"):
        name = (tmp_path / files.LOCK).read_bytes()
        (tmp_path / files.LOCK).write_bytes(b"")
        writer = threading.Timer(0.2, (tmp_path / files.LOCK).write_bytes, [name])
        writer.start()
        me = rf"in use by polarmask train \(process {os.getpid()} on"
        with pytest.raises(InputError, match=me), files.lock(tmp_path, "train"):
            pytest.fail("two hold it")
        writer.join()


@pytest.mark.parametrize("text", [b"", b"[]", b"\xff\0", b"[" * 3000, b'{"purpose": "\x1b[2J"}'])
def test_what_the_file_says_is_not_trusted(tmp_path, text, monkeypatch):
    monkeypatch.setattr(files, "_WRITTEN_WITHIN", 0)
    with files.lock(tmp_path, "train"):
        (tmp_path / files.LOCK).write_bytes(text)
        with pytest.raises(InputError, match="in use by another process") as error, files.lock(tmp_path, "train"):
            pass
        assert str(error.value).isprintable()


def test_a_lock_file_of_another_user_locks_too(tmp_path, monkeypatch):
    """Who may write the directory and not that file is told who holds it, and takes what a killed process left."""
    real = os.open

    def read_only(path, flags, *mode):
        if str(path).endswith(files.LOCK) and flags & os.O_RDWR:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return real(path, flags, *mode)

    with files.lock(tmp_path, "train"), monkeypatch.context() as patch:
        patch.setattr(files.os, "open", read_only)
        refused = pytest.raises(InputError, match=rf"in use by polarmask train \(process {os.getpid()} on")
        with refused, files.lock(tmp_path, "convert"):
            pytest.fail("two hold it")
    (tmp_path / files.LOCK).touch()
    monkeypatch.setattr(files.os, "open", read_only)
    with files.lock(tmp_path, "convert"):
        pass
    assert not (tmp_path / files.LOCK).exists()


def test_on_a_full_disk_it_is_locked_all_the_same(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "pwrite", full)
    monkeypatch.setattr(files, "_WRITTEN_WITHIN", 0)
    refused = pytest.raises(InputError, match="in use by another process")
    with files.lock(tmp_path / "run", "train"), refused, files.lock(tmp_path / "run", "train"):
        pytest.fail("two hold it")
    assert not (tmp_path / "run").exists()


def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch, capsys):
    def without(file, how):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(files.fcntl, "flock", without)
    with files.lock(tmp_path, "train"):
        pass
    assert f"warning: {tmp_path}: no locks on this file system (No locks available)" in capsys.readouterr().err


def test_a_directory_that_cannot_be_locked_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / files.LOCK).symlink_to(tmp_path / "file")  # would be truncated
    (tmp_path / "taken" / files.LOCK).mkdir(parents=True)
    for name in ("file", "linked", "taken"):
        with pytest.raises(InputError, match=f"{name}: cannot be ") as error, files.lock(tmp_path / name, "train"):
            pass
        assert "\n" not in str(error.value)


def test_no_device_is_replaced_by_a_file_and_no_link_either(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "out").symlink_to("pipe")  # as /dev/stdout is one
    for write in (files.check_writable, lambda path: files.atomic_write(path, "text")):
        for name in ("pipe", "out"):
            with pytest.raises(InputError, match=f"{name}: is a device or a pipe"):
                write(tmp_path / name)
        with pytest.raises(InputError, match="is a directory"):
            write(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["out", "pipe"] and (tmp_path / "pipe").is_fifo()
    (tmp_path / "far").mkdir()
    (tmp_path / "link").symlink_to("far/file")
    for text in ("one", "two"):
        files.atomic_write(tmp_path / "link", text)
        assert (tmp_path / "link").is_symlink() and (tmp_path / "far" / "file").read_text() == text
    assert os.listdir(tmp_path / "far") == ["file"]


def test_of_two_writers_of_a_new_file_the_second_is_refused(tmp_path):
    files.write_new(tmp_path / "a", "one")
    with pytest.raises(InputError, match="a: exists; remove it"):
        files.write_new(tmp_path / "a", "two")
    with pytest.raises(InputError, match="cannot be written: No such file"):
        files.write_new(tmp_path / "none" / "a", "two")
    assert [path.name for path in tmp_path.iterdir()] == ["a"] and (tmp_path / "a").read_text() == "one"


def test_a_pipe_in_the_place_of_a_checkpoint_is_not_waited_for(tmp_path):
    (tmp_path / "step-1.index").write_text("")
    with files.readable_by_tensorflow(tmp_path / "step-1") as path:
        assert path == str(tmp_path / "step-1")
    os.mkfifo(tmp_path / "step-1.data-00000-of-00001")
    refused = pytest.raises(InputError, match=r"step-1.data-00000-of-00001: not a regular file")
    with refused, files.readable_by_tensorflow(tmp_path / "step-1"):
        pytest.fail("TensorFlow would wait")


def test_only_regular_files_are_read_and_not_beyond_their_size(tmp_path):
    (tmp_path / "file").write_bytes(b"123")
    (tmp_path / "link").symlink_to("file")
    assert files.read_file(tmp_path / "file", 3) == files.read_file(tmp_path / "link", 3) == b"123"
    with pytest.raises(OSError, match="larger than 2 bytes"):
        files.read_file(tmp_path / "file", 2)
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero"):
        with pytest.raises(OSError, match="not a regular file"):
            files.read_file(path, 100)
    with pytest.raises(IsADirectoryError):
        files.read_file(tmp_path, 100)
    assert files.read_file("/proc/self/pagemap", 10**20) == b""  # without an end


def test_a_directory_that_is_moved_meanwhile_is_not_the_one_that_took_its_place(tmp_path):
    run = tmp_path / "run"
    with pytest.raises(InputError, match="moved or removed while it was written"), files.lock(run, "train"):
        run.rename(tmp_path / "old")
        with files.lock(run, "convert"):
            pass
        other = files.lock(run, "convert")
        other.__enter__()
    assert (run / files.LOCK).is_file()  # of the other, who keeps a third one out
    with pytest.raises(InputError, match="in use by polarmask convert"), files.lock(run, "predict"):
        pytest.fail("two hold it")
    other.__exit__(None, None, None)
    assert not run.exists()


def test_a_directory_that_is_removed_meanwhile_is_told(tmp_path):
    with pytest.raises(InputError, match="moved or removed"), files.lock(tmp_path / "run", "train"):
        (tmp_path / "run" / files.LOCK).unlink()
        (tmp_path / "run").rmdir()


def test_a_file_of_the_input_is_not_replaced_by_the_output(tmp_path):
    data, model = tmp_path / "data", tmp_path / "model.tflite"
    data.mkdir()
    for path, text in ((data / "dataset.json", "{}"), (data / "found.json", '{"AP": 1}'), (model, "x")):
        path.write_text(text)
    os.symlink(model, tmp_path / "link")
    for path in (data / "dataset.json", model, tmp_path / "link"):
        with pytest.raises(InputError, match="which would be replaced"):
            files.check_writable(path, (None, data, model), b'{"AP"')
    for path in (data / "found.json", data / "new.json", tmp_path / "other.json"):  # what it wrote before, what is not there
        files.check_writable(path, (None, data, model), b'{"AP"')


def test_names_that_are_no_utf8_are_read_by_a_link_and_refused_for_writing(tmp_path):
    folder = tmp_path / os.fsdecode(b"d\xff")
    folder.mkdir()
    (folder / "step-1.index").write_text("here")
    with files.readable_by_tensorflow(folder / "step-1") as path:
        path.encode()
        with open(f"{path}.index") as file:
            assert file.read() == "here"
    with pytest.raises(InputError, match="no name in UTF-8"):
        files.check_text(folder)
    files.check_text(tmp_path / "Äpfel")
