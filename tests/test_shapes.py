import errno
import hashlib
import json
import os

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from polarmask_tf import files
from polarmask_tf.data.contours import shoelace
from polarmask_tf.errors import InputError
from polarmask_tf.tools import shapes
from polarmask_tf.tools.shapes import CATEGORIES, DEFAULT_KINDS, make_shapes

HARD_KINDS = ("bar", "ellipse", "ell", "cee")


def make(out, **options):
    make_shapes(out, train=60, val=5, progress=False, **options)
    return out, json.loads((out / "train/annotations.json").read_text())


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make(tmp_path_factory.mktemp("shapes"))


@pytest.fixture(scope="module")
def hard(tmp_path_factory):
    return make(tmp_path_factory.mktemp("hard"), kinds=HARD_KINDS)


@pytest.fixture(params=["made", "hard"])
def either(request):
    return request.getfixturevalue(request.param)


def mask_of(ring):
    return coco_mask.decode(coco_mask.frPyObjects([np.ravel(ring).tolist()], 128, 128)[0]) > 0


def grown(mask, pixels):
    """The mask and all pixels up to so many beside it (in city blocks)."""
    for _ in range(pixels):
        padded = np.pad(mask, 1)
        mask = mask | padded[2:, 1:-1] | padded[:-2, 1:-1] | padded[1:-1, 2:] | padded[1:-1, :-2]
    return mask


def centroid(ring):
    after = np.roll(ring, -1, axis=0)
    cross = ring[:, 0] * after[:, 1] - after[:, 0] * ring[:, 1]
    return ((ring + after) * cross[:, None]).sum(axis=0) / (3 * cross.sum())


def test_files_and_ids(made):
    out, document = made
    assert [len(list((out / split / "images").glob("*.png"))) for split in ("train", "val")] == [60, 5]
    chosen = {name: CATEGORIES[name] for name in DEFAULT_KINDS}
    assert {c["name"]: c["id"] for c in document["categories"]} == chosen
    assert {a["category_id"] for a in document["annotations"]} == set(chosen.values())
    counts = np.bincount([a["image_id"] for a in document["annotations"]], minlength=61)[1:]
    assert counts.min() >= 1 and counts.max() <= 4
    with Image.open(out / "train/images/000000.png") as image:
        assert image.size == (128, 128) and image.mode == "RGB"


def test_polygons_lie_inside_do_not_overlap_and_have_the_stated_area(either):
    _, document = either
    polygons_of = {}
    for annotation in document["annotations"]:
        ring = np.array(annotation["segmentation"][0]).reshape(-1, 2)
        assert ring.min() >= 1 and ring.max() <= 127
        assert abs(shoelace(ring)) == pytest.approx(annotation["area"], abs=0.01)
        x, y, w, h = annotation["bbox"]
        assert np.allclose([x, y, x + w, y + h], [*ring.min(axis=0), *ring.max(axis=0)], atol=0.011)
        assert 14 < max(w, h) <= 72.1
        polygons_of.setdefault(annotation["image_id"], []).append(annotation["segmentation"])
    for polygons in polygons_of.values():
        masks = [coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(polygon, 128, 128))) for polygon in polygons]
        assert np.sum(masks, axis=0).max() <= 1


def test_shapes_stand_out_where_their_polygons_say(either):
    """The colours inside and around each polygon differ, right up to its border."""
    out, document = either
    for annotation in document["annotations"]:
        pixels = np.asarray(Image.open(out / f"train/images/{annotation['image_id'] - 1:06d}.png"), np.float32)
        mask = mask_of(annotation["segmentation"])
        inside, around = pixels[~grown(~mask, 1)], pixels[grown(mask, 2) & ~grown(mask, 1)]
        assert len(inside) > 40
        assert np.linalg.norm(np.median(inside, axis=0) - np.median(around, axis=0)) > 35


@pytest.mark.parametrize("kinds", [DEFAULT_KINDS, HARD_KINDS])
def test_pixels_are_covered_without_bias(kinds):
    """Area and center of what is painted are those of the polygon: a shift here is one that no model could undo."""
    rng = np.random.default_rng(0)
    ratios, shifts = [], []
    while len(ratios) < 100:
        _, ring = shapes._random_shape(rng, 128, kinds)
        if ring.min() < 2 or ring.max() > 126:
            continue
        coverage, (x0, y0, x1, y1) = shapes._coverage(ring)
        ratios.append(coverage.sum() / shoelace(ring))
        y, x = np.mgrid[y0:y1, x0:x1] + 0.5
        center = centroid(ring)
        shifts.append([(coverage * x).sum() / coverage.sum() - center[0], (coverage * y).sum() / coverage.sum() - center[1]])
    assert np.mean(ratios) == pytest.approx(1, abs=0.003) and np.ptp(ratios) < 0.03
    assert np.abs(np.mean(shifts, axis=0)).max() < 0.03 and np.abs(shifts).max() < 0.15


def test_an_image_depends_on_seed_split_and_index_alone(made, tmp_path):
    out, document = made
    make_shapes(tmp_path / "less", train=3, val=1, progress=False)
    make_shapes(tmp_path / "other", train=3, val=1, seed=1, progress=False)

    def pixels(folder, split="train", index=0):
        return (folder / split / "images" / f"{index:06d}.png").read_bytes()

    assert pixels(tmp_path / "less", index=2) == pixels(out, index=2)
    assert pixels(tmp_path / "less") != pixels(tmp_path / "other")
    assert pixels(out, "train") != pixels(out, "val")
    less = json.loads((tmp_path / "less/train/annotations.json").read_text())
    assert less["annotations"] == document["annotations"][: len(less["annotations"])]


def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch):
    save, room = Image.Image.save, []

    def full(*args, **options):
        if len(room) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        room.append(save(*args, **options))

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(InputError, match="No space left"):
        make_shapes(tmp_path / "out", train=5, val=1, progress=False)
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    make_shapes(tmp_path / "out", train=2, val=1, progress=False)
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(InputError, match="No space left"):
        make_shapes(tmp_path / "out", train=5, val=1, seed=1, progress=False)
    assert before == {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}


def test_the_default_kinds_look_as_they_did_before_there_were_others(made):
    """Recorded when these four were all there was: a data set of an earlier release can be made again."""
    _, document = made
    text = json.dumps([[a[key] for key in ("category_id", "segmentation", "bbox")] for a in document["annotations"][:40]])
    assert hashlib.sha256(text.encode()).hexdigest().startswith("6c533f8393c5c071")


def test_hard_kinds_are_long_or_hollow(hard):
    _, document = hard
    assert [c["name"] for c in document["categories"]] == list(HARD_KINDS)
    rings = {name: [] for name in HARD_KINDS}
    for annotation in document["annotations"]:
        name = next(name for name, number in CATEGORIES.items() if number == annotation["category_id"])
        rings[name].append(np.array(annotation["segmentation"][0]).reshape(-1, 2))
    assert min(map(len, rings.values())) > 10
    for ring in rings["bar"] + rings["ellipse"]:
        # Of a rectangle and of an ellipse alike, the standard deviations of the area go as length and width.
        y, x = np.nonzero(mask_of(ring))
        small, large = np.sqrt(np.linalg.eigvalsh(np.cov(x, y)))
        assert 3.7 < large / small < 6.5
    for name in ("ell", "cee"):
        hollow = []
        for ring in rings[name]:
            along = np.roll(ring, -1, axis=0) - ring
            after = np.roll(along, -1, axis=0)
            turns = along[:, 0] * after[:, 1] - along[:, 1] * after[:, 0]
            assert (turns > 0).any() and (turns < 0).any()
            x, y = np.floor(centroid(ring)).astype(int)
            hollow.append(not mask_of(ring)[y, x])
        assert np.mean(hollow) == 1 if name == "cee" else np.mean(hollow) > 0.5


def test_kinds_are_chosen_by_name(tmp_path):
    make_shapes(tmp_path, train=4, val=1, kinds=["star", "cee"], progress=False)
    for split in ("train", "val"):
        document = json.loads((tmp_path / split / "annotations.json").read_text())
        assert {c["name"] for c in document["categories"]} == {"star", "cee"}
        assert {a["category_id"] for a in document["annotations"]} <= {CATEGORIES["star"], CATEGORIES["cee"]}


@pytest.mark.parametrize(("kinds", "said"), [(["blob"], "'blob'"), ([], "no kind"), (["bar", "bar"], "twice")])
def test_unknown_kinds_are_refused_with_the_known_ones(tmp_path, kinds, said):
    with pytest.raises(InputError, match=f"{said}.*circle, .*cee"):
        make_shapes(tmp_path / "out", train=1, val=0, kinds=kinds, progress=False)
    assert not (tmp_path / "out").exists()


def test_bad_requests_are_refused(tmp_path):
    for name, value in (
        ("size", 8),
        ("size", 10**8),
        ("train", 0),
        ("train", 10**9),
        ("val", -1),
        ("seed", -1),
        ("seed", 10**30),
    ):
        with pytest.raises(InputError, match=f"{name} is {value}; it must be"):
            make_shapes(tmp_path, **{name: value}, progress=False)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        make_shapes(tmp_path / "file", train=1, val=0, progress=False)


def test_one_drawing_at_a_time_and_no_labels_beside_pictures_of_others(tmp_path, monkeypatch):
    make_shapes(tmp_path, train=2, val=1, progress=False)
    with files.lock(tmp_path, "shapes"), pytest.raises(InputError, match="in use by polarmask shapes"):
        make_shapes(tmp_path, train=2, val=1, seed=1, progress=False)
    assert (tmp_path / "train/annotations.json").is_file()
    put = shapes.os.replace
    monkeypatch.setattr(shapes.os, "replace", lambda a, b: 1 / 0 if "images" in str(a) else put(a, b))
    with pytest.raises(ZeroDivisionError):  # where pictures take the places of those before
        make_shapes(tmp_path, train=2, val=1, seed=1, progress=False)
    assert not (tmp_path / "train/annotations.json").exists() and (tmp_path / "val/annotations.json").is_file()
