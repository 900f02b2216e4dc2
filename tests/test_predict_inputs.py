"""What `predict` takes: several files, folders, patterns, videos, stdin; and how its outputs are named and left in peace."""

import io
import itertools
import json
import os
import sys
import types
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from helpers.detections import star_predictor
from polarmask_tf import cli, lite
from polarmask_tf.errors import InputError
from polarmask_tf.inference import inputs, outputs, video
from polarmask_tf.inference.predict import predict


def picture(path, level=0):
    """A file of its own pixels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(level)
    Image.fromarray(rng.integers(0, 256, (24, 32, 3), np.uint8)).save(path)
    return path


def tree(root, *names):
    for level, name in enumerate(names):
        picture(root / name, level)
    return root


def names(sources, own=()):
    return [entry.name for entry in inputs.find(sources, own)]


def stems(sources):
    return {entry.name: entry.stem for entry in inputs.find(sources)}


# ---- which files


def test_a_folder_is_all_below_it_but_hidden_files(tmp_path):
    tree(tmp_path / "in", "b.png", "a.png", "deep/er/c.png", "deep/a.png", ".hidden.png", ".cache/d.png")
    assert names(tmp_path / "in") == ["a.png", "b.png", "deep/a.png", "deep/er/c.png"]
    assert names(str(tmp_path / "in" / "deep")) == ["a.png", "er/c.png"]


def test_equal_names_of_several_folders_never_meet(tmp_path):
    tree(tmp_path, "in/a/1.png", "in/b/1.png", "other/1.png", "other/2.png")
    assert names([tmp_path / "in" / "a", tmp_path / "other" / "2.png"]) == ["1.png", "2.png"]
    assert names([tmp_path / "in" / "a", tmp_path / "in" / "b"]) == ["a/1.png", "b/1.png"]
    assert names([tmp_path / "in" / "a" / "1.png", tmp_path / "other"]) == ["in/a/1.png", "other/1.png", "other/2.png"]
    sources = (tmp_path / folder for folder in ("in", "other"))  # any iterable will do
    done = predict(star_predictor(), sources, tmp_path / "out", progress=False)
    overlays = sorted(str(path.relative_to(tmp_path / "out/overlays")) for path in (tmp_path / "out/overlays").rglob("*.png"))
    assert overlays == ["1.png", "2.png", "a/1.png", "b/1.png"] and done["images"] == 4
    ids = {result["image_id"] for result in json.loads((tmp_path / "out/results.json").read_text())}
    assert ids == {"a/1.png", "b/1.png", "1.png", 2}


def test_what_is_named_twice_is_taken_once(tmp_path, monkeypatch):
    tree(tmp_path, "in/1.png", "in/2.png")
    monkeypatch.chdir(tmp_path)
    assert names(["in/2.png", "in", str(tmp_path / "in" / "1.png"), "in/../in/2.png", "in/*.png"]) == ["2.png", "1.png"]


def test_patterns_are_what_a_shell_makes_of_them(tmp_path, monkeypatch):
    tree(tmp_path / "in", "a1.png", "a2.png", "b1.png", "a3.jpg", "deep/a4.png", "deep/er/a5.png", ".a6.png", "[x]1.png")
    monkeypatch.chdir(tmp_path)
    assert names("in/a*.png") == ["a1.png", "a2.png"]
    assert names("in/*/a?.png") == ["deep/a4.png"]
    assert names("in/**/*.png") == ["[x]1.png", "a1.png", "a2.png", "b1.png", "deep/a4.png", "deep/er/a5.png"]
    assert names(str(tmp_path / "i[n]" / "de*")) == ["in/deep/a4.png", "in/deep/er/a5.png"]  # a folder is walked
    assert names("in/[x]1.png") == ["[x]1.png"]  # a file that is called so, and not x1.png
    assert names("in/.a*.png") == [".a6.png"]
    with pytest.raises(InputError, match=r"in/c\*\.png: no file is called so"):
        names("in/c*.png")
    with pytest.raises(InputError, match=r"not a pattern|no file is called so"):
        names("in/**a")  # which Python 3.13 takes for in/*a


def test_links_to_folders_are_named_and_not_followed(tmp_path, capsys):
    tree(tmp_path, "in/deep/1.png", "elsewhere/2.png", "file.png")
    (tmp_path / "in/deep/round").symlink_to(tmp_path / "in")
    (tmp_path / "in/away").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in/3.png").symlink_to(tmp_path / "file.png")
    assert names(tmp_path / "in") == ["3.png", "deep/1.png"]
    assert (
        "links to folders, which are not followed" in (said := capsys.readouterr().err) and "away" in said and "round" in said
    )
    assert names(str(tmp_path / "in/**/*.png")) == ["3.png", "deep/1.png"]  # nor by patterns, without end
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    assert names(tmp_path / "link") == ["2.png"]  # one that was asked for


def test_folders_that_cannot_be_read_are_named(tmp_path, monkeypatch, capsys):
    tree(tmp_path, "in/1.png", "in/locked/2.png", "in/open/3.png")
    scandir = os.scandir

    def refusing(path):  # as to anybody but root
        if Path(path).name == "locked":
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    assert names(tmp_path / "in") == ["1.png", "open/3.png"]
    assert "locked (Permission denied): folders that cannot be read" in capsys.readouterr().err
    with pytest.raises(InputError, match="locked: cannot read it: Permission denied"):
        names(tmp_path / "in" / "locked")


def test_more_files_than_anybody_has_are_refused(tmp_path, monkeypatch):
    tree(tmp_path / "in", "1.png", "2.png", "3.png")
    monkeypatch.setattr(inputs, "MAX_INPUTS", 2)
    for source in (tmp_path / "in", str(tmp_path / "in/*.png"), [*(tmp_path / "in").iterdir()]):
        with pytest.raises(InputError, match="more than 2 files"):
            names(source)


def test_what_is_missing_is_said_before_anything_is_done(tmp_path, monkeypatch, capsys):
    picture(tmp_path / "1.png")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    wrong = ["1.png", "gone.png", "lost/"]
    assert cli.main(["predict", "no-model-either", *wrong, "--out", "out"]) == 2
    error = capsys.readouterr().err
    assert error == "polarmask: error: gone.png, lost: no such file or directory\n"
    for sources, text in ((["1.png", "empty"], "empty: no files in it"), ([], "no inputs")):
        with pytest.raises(InputError, match=text):
            predict(star_predictor(), sources, "out", progress=False)
    assert sorted(os.listdir()) == ["1.png", "empty"]


# ---- names of outputs


def test_outputs_are_called_after_their_pictures_and_never_alike(tmp_path):
    tree(tmp_path / "in", "1.png", "2.png", "2.bmp", "a.b.png", "deep/2.png", "3.png", "3.png.png")
    assert stems(tmp_path / "in") == {
        "1.png": "1",
        "2.png": "2.png",
        "2.bmp": "2.bmp",
        "a.b.png": "a.b",
        "deep/2.png": "deep/2",
        "3.png": "3",
        "3.png.png": "3.png.png",
    }


@pytest.mark.parametrize("suffixes", itertools.permutations(["", ".png", ".png.png", ".bmp"], 3))
def test_no_two_are_called_alike_whatever_their_names(tmp_path, suffixes):
    for suffix in suffixes:
        (tmp_path / f"a{suffix}").write_text("")
    found = stems(tmp_path)
    assert len(set(found.values())) == len(found) == 3


def test_names_as_long_as_a_file_system_takes_them(tmp_path):
    long = "ä" * 125
    tree(tmp_path / "in", f"{long}1.png", f"{long}.png")
    done = predict(star_predictor(), tmp_path / "in", tmp_path / "out", save=["overlays", "labelme", "gallery"], progress=False)
    assert done["images"] == 2 and len([*(tmp_path / "out/overlays").iterdir()]) == 2


def test_what_it_wrote_is_no_input(tmp_path, capsys):
    """Also where --out is the folder of the pictures, or in it."""
    for folder in ("in", "other"):
        tree(tmp_path / folder, "1.png", "2.png", "mine/3.png")
    for source, out in ((tmp_path / "in", tmp_path / "in"), (tmp_path / "other", tmp_path / "other" / "out")):
        for _ in range(2):
            done = predict(star_predictor(), source, out, save=[*outputs.PICTURES][2:5], progress=False)
            assert done["images"] == 3 and not done["skipped"]
            done = predict(star_predictor(), source, out, progress=False)
            assert done["images"] == 3 and not done["skipped"]
    said = capsys.readouterr().err
    assert "other/out/overlays" in said and "is where this command writes" in said
    (tmp_path / "link").symlink_to(tmp_path / "other")
    assert names(tmp_path / "link", outputs.own(tmp_path / "other" / "out")) == ["1.png", "2.png", "mine/3.png"]
    for source in ("overlays", "overlays/1.png", "../in/mine/../overlays"):
        with pytest.raises(InputError, match="is where this command writes to; choose another --out"):
            predict(star_predictor(), tmp_path / "in" / source, tmp_path / "in", progress=False)
    assert names(str(tmp_path / "in/**/3.png"), outputs.own(tmp_path / "in")) == ["mine/3.png"]


# ---- stdin


def give(monkeypatch, content):
    monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(buffer=io.BytesIO(content)))


def test_an_image_from_stdin(tmp_path, monkeypatch):
    content = picture(tmp_path / "1.png").read_bytes()
    give(monkeypatch, content)
    done = predict(star_predictor(), ["-", tmp_path / "1.png"], tmp_path / "out", save=["coco", "labelme"], progress=False)
    results = json.loads((tmp_path / "out/results.json").read_text())
    of = {image: [{**r, "image_id": 0} for r in results if r["image_id"] == image] for image in ("stdin", 1)}
    assert done["images"] == 2 and of["stdin"] == of[1] != []
    assert (tmp_path / "out/labelme/stdin.json").is_file()


@pytest.mark.parametrize("content, text", [(b"", "stdin: is empty"), (b"x" * 20, "not an image"), (b"x" * 99, "more than 50")])
def test_what_is_no_image_on_stdin(tmp_path, monkeypatch, content, text):
    monkeypatch.setattr(lite, "MAX_IMAGE_BYTES", 50)
    give(monkeypatch, content)
    with pytest.raises(InputError, match=text):
        predict(star_predictor(), "-", tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


# ---- videos


def clip(path, frames=7, codec="MJPG"):
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*codec), 5, (64, 48))
    assert writer.isOpened()
    for number in range(frames):
        writer.write(np.full((48, 64, 3), (0, 10, 30 * number), np.uint8))  # the more red, the later
    writer.release()
    return path


@pytest.mark.parametrize("every, expected", [(1, range(7)), (3, (0, 3, 6)), (100, (0,))])
def test_frames_of_a_video(tmp_path, every, expected):
    seen = []
    predictor = star_predictor(before=lambda image: seen.append(image[24, 32].tolist()))
    out = tmp_path / "out"
    done = predict(predictor, clip(tmp_path / "clip.avi"), out, every=every, save=["coco", "labelme"], progress=False)
    called = [f"clip_{number:06}" for number in expected]
    assert done["images"] == len(called)
    assert list(dict.fromkeys(r["image_id"] for r in json.loads((out / "results.json").read_text()))) == called
    np.testing.assert_allclose(seen, [(30 * number, 10, 0) for number in expected], atol=8)  # RGB, and the right ones
    for name, shown in zip(called, seen, strict=True):  # labelme finds a picture of the frame
        document = json.loads((out / f"labelme/{name}.json").read_text())
        assert Image.open(out / "labelme" / document["imagePath"]).getpixel((32, 24)) == tuple(shown)


def test_videos_and_pictures_in_one_folder(tmp_path):
    tree(tmp_path / "in", "a.png", "clip_000001.png")
    clip(tmp_path / "in" / "clip.avi", 2)
    clip(tmp_path / "in" / "clip.mp4", 2, "mp4v")
    clip(tmp_path / "in" / "b.avi", 3)
    done = predict(star_predictor(), tmp_path / "in", tmp_path / "out", limit=8, progress=False)
    called = sorted(path.stem for path in (tmp_path / "out/overlays").iterdir())
    assert called == [
        "a",
        "b_000000",
        "b_000001",
        "b_000002",
        "clip.avi_000000",
        "clip.avi_000001",
        "clip.mp4_000000",
        "clip.mp4_000001",
    ]
    assert done["images"] == 8


def test_broken_videos_are_named_and_left_out(tmp_path, capsys):
    whole = clip(tmp_path / "whole.avi", 40).read_bytes()
    source = tree(tmp_path / "in", "a.png")
    (source / "cut.avi").write_bytes(whole[: len(whole) // 2])
    (source / "head.avi").write_bytes(whole[:40])
    (source / "text.mp4").write_text("no video")
    (source / "empty.mov").write_text("")
    # FFmpeg would read the files and addresses that a playlist names, whatever it is called.
    (source / "list.mp4").write_text(
        f"#EXTM3U\n#EXT-X-MEDIA-SEQUENCE:0\n#EXTINF:1.0,\n{tmp_path / 'whole.avi'}\n#EXT-X-ENDLIST\n"
    )
    os.mkfifo(source / "pipe.mp4")
    done = predict(star_predictor(), source, tmp_path / "out", progress=False)
    assert set(done["skipped"]) == {"head.avi", "text.mp4", "empty.mov", "list.mp4", "pipe.mp4"}
    assert 2 < done["images"] < 40
    said = capsys.readouterr().err
    assert "cut.avi: ends or is damaged after" in said
    for text in ("list.mp4: not a video that can be read", "pipe.mp4: cannot read the video: not a regular file"):
        assert text in said
    with pytest.raises(InputError, match="not a video that can be read"):
        predict(star_predictor(), source / "text.mp4", tmp_path / "out2", progress=False)


def test_without_opencv_one_line_says_what_to_install(tmp_path, monkeypatch, capsys):
    source = tree(tmp_path / "in", "a.png")
    clip(source / "clip.avi")
    monkeypatch.setattr(video, "is_available", lambda: False)
    with pytest.raises(InputError, match=r"clip\.avi: videos need OpenCV: pip install opencv-python-headless"):
        predict(star_predictor(), [source / "a.png", source / "clip.avi"], tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()
    done = predict(star_predictor(), source, tmp_path / "out", progress=False)  # of a folder the pictures are taken
    assert done["images"] == 1 and "pip install" in done["skipped"]["clip.avi"]


# ---- from Python


def test_a_predictor_takes_iterators_and_holds_a_batch(tmp_path):
    taken = []

    def pictures():
        for number in range(10):
            taken.append(number)
            yield np.full((20, 30, 3), number, np.uint8)

    found = star_predictor()(pictures())
    assert taken == []
    assert len(next(found)) == 4 and taken == [0, 1, 2, 3]  # batch_size
    assert len(list(found)) == 9 and taken == list(range(10))
    tree(tmp_path, "1.png", "2.png")
    sources = [one.source for one in star_predictor()(Path(tmp_path).glob("*.png"))]
    assert sorted(sources) == [tmp_path / "1.png", tmp_path / "2.png"]
    assert len(star_predictor()(io.BytesIO((tmp_path / "1.png").read_bytes()))) == 4  # a file, and not its lines
    assert list(star_predictor()(iter([]))) == []


def test_annotations_beside_pictures_rename_no_output(tmp_path):
    for name in ("a.jpg", "a.json", "b.png", "b.txt", "c.jpg", "c.png"):
        (tmp_path / name).write_bytes(b"x")
    stems = {entry.name: entry.stem for entry in inputs.find(tmp_path)}
    assert (stems["a.jpg"], stems["b.png"], stems["c.jpg"], stems["c.png"]) == ("a", "b", "c.jpg", "c.png")
    assert len({*stems.values()}) == 6
