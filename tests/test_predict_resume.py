"""An interrupted `predict` goes on where it stopped, and ends as if it had not been interrupted."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from helpers.detections import star_predictor
from polarmask_tf import files
from polarmask_tf.errors import InputError
from polarmask_tf.inference import journal, outputs
from polarmask_tf.inference.predict import predict

ROOT = Path(__file__).resolve().parents[1]
SAVE = ["coco", "labelme", "geojson", "ids", "csv", "gallery"]


@pytest.fixture
def source(tmp_path):
    """Five files, of which one is no image, and a video of three frames."""
    folder = tmp_path / "in"
    (folder / "deep").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in ("1.png", "2.png", "deep/1.png", "deep/9.png"):
        Image.fromarray(rng.integers(0, 256, (24, 32, 3), np.uint8)).save(folder / name)
    (folder / "1b.txt").write_text("no image")
    writer = cv2.VideoWriter(str(folder / "clip.avi"), cv2.VideoWriter_fourcc(*"MJPG"), 5, (64, 48))
    for level in (30, 90, 200):
        writer.write(np.full((48, 64, 3), level, np.uint8))
    writer.release()
    return folder


def stopping(at, seen=None):
    """A predictor that fails at the image number `at`, and notes those that it saw."""
    seen = [] if seen is None else seen

    def before(image):
        if len(seen) == at:
            raise RuntimeError("the power is gone")
        seen.append(image)

    return star_predictor(before=before)


def content(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def run(predictor, source, out, **options):
    return predict(predictor, source, out, progress=False, **{"save": SAVE, **options})


@pytest.mark.parametrize("at", [1, 4, 6])
def test_it_ends_as_if_it_had_not_been_interrupted(source, tmp_path, at, capsys):
    save = ["overlays:jpg", *SAVE]
    whole = run(star_predictor(), source, tmp_path / "one" / "out", save=save)
    assert whole["images"] == 7 and list(whole["skipped"]) == ["1b.txt"]
    said = capsys.readouterr().err
    out, seen = tmp_path / "other" / "out", []
    with pytest.raises(RuntimeError):
        run(stopping(at), source, out, save=save)
    assert f"finished: {at} image{'s' * (at != 1)}; the same command with --resume goes on" in capsys.readouterr().err
    assert not (out / "results.json").exists() and not (out / "gallery.html").exists()
    done = run(stopping(99, seen), source, out, save=save, resume=True)
    assert content(out) == content(tmp_path / "one" / "out") and (out / "sheet.png").is_file()
    assert capsys.readouterr().err.splitlines()[-1] == said.splitlines()[-1]
    assert [done[key] for key in ("images", "detections", "skipped")] == [
        whole[key] for key in ("images", "detections", "skipped")
    ]
    # Those of before are looked at again for the sheet alone, which has twelve at the most.
    assert len(seen) <= 7


def test_what_is_finished_is_not_done_again(source, tmp_path):
    seen = []
    with pytest.raises(RuntimeError):
        run(stopping(4), source, tmp_path / "out", save=["coco", "ids"])
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out/ids").rglob("*.png")}
    run(stopping(99, seen), source, tmp_path / "out", save=["coco", "ids"], resume=True)
    assert len(before) == 4 and len(seen) == 3
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())


@pytest.mark.parametrize("lost", [1, 2, 40])
def test_half_a_line_of_a_killed_process_is_cut_off(source, tmp_path, lost):
    run(star_predictor(), source, tmp_path / "one" / "out")
    out = tmp_path / "other" / "out"
    with pytest.raises(RuntimeError):
        run(stopping(3), source, out)
    state = (out / journal.NAME).read_bytes()
    (out / journal.NAME).write_bytes(state[:-lost])
    run(star_predictor(), source, out, resume=True)
    assert content(out) == content(tmp_path / "one" / "out")


KILLED = """
import os, signal, sys
from helpers.detections import star_predictor
from polarmask_tf.inference.predict import predict
seen = []
def before(image):
    seen.append(image)
    if len(seen) == 4:
        os.kill(os.getpid(), signal.SIGKILL)
predict(star_predictor(before=before), sys.argv[1], sys.argv[2], save=sys.argv[3].split(","), progress=False)
"""


def test_a_killed_process_loses_nothing_that_was_finished(source, tmp_path):
    run(star_predictor(), source, tmp_path / "one" / "out")
    out, seen = tmp_path / "other" / "out", []
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    command = [sys.executable, "-c", KILLED, str(source), str(out), ",".join(SAVE)]
    assert subprocess.run(command, env=env).returncode == -signal.SIGKILL
    assert len((out / journal.NAME).read_text().splitlines()) == 1 + 3 + 1  # settings, images, the one that is none
    done = run(stopping(99, seen), source, out, resume=True)
    assert done["images"] == 7 and content(out) == content(tmp_path / "one" / "out")


def test_a_kill_while_the_tables_are_written(source, tmp_path, monkeypatch):
    run(star_predictor(), source, tmp_path / "one" / "out")
    out = tmp_path / "other" / "out"
    with monkeypatch.context() as patched:
        patched.setattr(outputs.gallery, "write_page", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(star_predictor(), source, out)
    run(star_predictor(), source, out, resume=True)
    assert content(out) == content(tmp_path / "one" / "out")


def test_another_command_is_refused_and_changes_nothing(source, tmp_path):
    out, model = tmp_path / "out", tmp_path / "model.tflite"
    model.write_bytes(b"weights")
    options = {"model": model, "classes": ["star", "moon"]}
    with pytest.raises(RuntimeError):
        run(stopping(2), source, out, **options)
    before = content(out)
    for more, text in (
        ({"score_threshold": 0.5}, r"score_threshold \(0.3 then, 0.5 now\)"),
        ({"save": ["coco"]}, "save "),
        ({"classes": None}, r"classes \(\['star', 'moon'\] then, all now\)"),
        ({"every": 2}, "every "),
        ({"limit": 3}, "limit "),
        ({"segmentation": "polygon"}, "segmentation "),
        ({"exif": "apply"}, "exif "),
        ({"accelerator": "gpu"}, r"accelerator \(default then, gpu now\)"),
    ):
        with pytest.raises(InputError, match=f"the interrupted run had other settings: .*{text}") as error:
            run(star_predictor(), source, out, resume=True, **{**options, **more})
        assert "leave --resume out to start over" in str(error.value)
    model.write_bytes(b"better weights")
    with pytest.raises(InputError, match="other settings: model; give"):
        run(star_predictor(), source, out, resume=True, **options)
    model.write_bytes(b"weights")
    shutil.copy(source / "1.png", source / "0.png")
    with pytest.raises(InputError, match="other settings: inputs; give"):
        run(star_predictor(), source, out, resume=True, **options)
    assert content(out) == before
    (source / "0.png").unlink()
    assert run(star_predictor(), source, out, resume=True, **options)["images"] == 7


def test_a_model_is_known_by_its_weights(tmp_path):
    run_folder = tmp_path / "run"
    (run_folder / "checkpoints").mkdir(parents=True)
    (run_folder / "config.yaml").write_text("a: 1")
    known = {journal.digest_of_model(run_folder), journal.digest_of_model("http://host:8501/v1/models/m")}
    for step, text in ((9, "nine"), (10, "ten"), (10, "other")):
        (run_folder / f"checkpoints/step-{step}.index").write_text(text)
        known.add(journal.digest_of_model(run_folder))
    (run_folder / "checkpoints/step-9.index").write_text("no more")  # an older one is not what is loaded
    known.add(journal.digest_of_model(run_folder))
    (run_folder / "config.yaml").write_text("a: 2")
    known.add(journal.digest_of_model(run_folder))
    assert len(known) == 6
    moved = shutil.copytree(run_folder, tmp_path / "moved")
    assert journal.digest_of_model(moved) in known


def test_without_resume_it_starts_over(source, tmp_path, capsys):
    with pytest.raises(RuntimeError):
        run(stopping(3), source, tmp_path / "out")
    seen = []
    run(stopping(99, seen), source, tmp_path / "out")
    assert len(seen) == 7 and "starting over: what an interrupted run had finished" in capsys.readouterr().err


def test_resume_without_anything_to_resume(source, tmp_path):
    assert run(star_predictor(), source, tmp_path / "out", resume=True)["images"] == 7  # the first time it just begins
    before = content(tmp_path / "out")
    with pytest.raises(InputError, match=r"no interrupted run to resume: results\.json there is of a finished run"):
        run(star_predictor(), source, tmp_path / "out", resume=True)
    assert content(tmp_path / "out") == before


def test_nothing_finished_leaves_nothing(source, tmp_path):
    with pytest.raises(RuntimeError):
        run(stopping(0), source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


_WHOLE = {"name": "1.png", "stem": "1", "objects": 1, "notes": [], "coco": [], "csv": [], "gallery": {}}
_OTHERS = [
    {"objects": "1"},
    {"notes": [3]},
    {"coco": 1},
    {"csv": [1]},
    {"csv": [["\ud800"]]},
    {"name": "\ud800"},
    {"gallery": None},
    {"skipped": 1},
]
_LINES = [json.dumps({**_WHOLE, **other}).encode() + b"\n" for other in _OTHERS]


@pytest.mark.parametrize(
    "damage", [b"no json\n", b"[]\n", b'{"a": 1}\n', b"\xff\xfe\n", b"[" * 100_000 + b"\n", *_LINES], ids=lambda b: str(b[:60])
)
def test_a_damaged_journal_is_one_line(source, tmp_path, damage):
    with pytest.raises(RuntimeError):
        run(stopping(3), source, tmp_path / "out")
    path = tmp_path / "out" / journal.NAME
    lines = path.read_bytes().splitlines(keepends=True)
    for place in (0, 2):
        path.write_bytes(b"".join([*lines[:place], damage, *lines[place + 1 :]]))
        before = content(tmp_path / "out")
        with pytest.raises(InputError, match="leave --resume out to start over") as error:
            run(star_predictor(), source, tmp_path / "out", resume=True)
        assert "\n" not in str(error.value) and content(tmp_path / "out") == before


def test_a_pipe_or_a_link_in_the_journals_place_does_no_harm(source, tmp_path):
    (tmp_path / "precious").write_text("precious")
    for make in (os.mkfifo, lambda path: os.symlink(tmp_path / "precious", path)):
        (tmp_path / "out").mkdir(exist_ok=True)
        make(tmp_path / "out" / journal.NAME)
        assert run(star_predictor(), source, tmp_path / "out", save=["coco"])["images"] == 7
    assert (tmp_path / "precious").read_text() == "precious"
    os.mkfifo(tmp_path / "out" / journal.NAME)
    with pytest.raises(InputError, match="not a regular file"):
        run(star_predictor(), source, tmp_path / "out", save=["coco"], resume=True)


def test_a_full_disk_is_one_line_and_the_finished_stays(source, tmp_path, monkeypatch):
    """A limit on the size of files stands in for the disk's."""
    run(star_predictor(), source, tmp_path / "one" / "out", save=["csv", "coco"])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    out = tmp_path / "other" / "out"
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, hard))
        with pytest.raises(InputError, match=r"unfinished\.jsonl: cannot be written: File too large"):
            run(star_predictor(), source, out, save=["csv", "coco"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    run(star_predictor(), source, out, save=["csv", "coco"], resume=True)
    assert content(out) == content(tmp_path / "one" / "out")
    monkeypatch.setattr(files.os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(InputError, match=r"results\.json: cannot be written: No space left"):
        run(star_predictor(), source, tmp_path / "third", save=["coco"])
    assert sorted(os.listdir(tmp_path / "third")) == [journal.NAME]


def test_a_journal_holds_what_it_was_given(tmp_path):
    record = journal.Journal(tmp_path, {"a": (1, 2.5)})
    entries = [{"name": "ä\u2028\udcff\n", "n": 0.1 + 0.2}, {}, {"coco": [1e-300]}]
    for entry in entries:
        record.append(entry)
    record.close()
    again = journal.Journal(tmp_path, {"a": [1, 2.5]}, resume=True)
    assert again.count_before == 3 and list(again.entries()) == entries
    again.append({"more": 1})
    assert [*again.entries()][-1] == {"more": 1} and json.loads(again.path.read_text().splitlines()[0])["format"]
    again.remove()
    assert not list(tmp_path.iterdir())
