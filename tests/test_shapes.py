import json

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from polarmask_tf.data import shapes
from polarmask_tf.data.contours import shoelace
from polarmask_tf.data.shapes import CATEGORIES, make_shapes
from polarmask_tf.errors import InputError


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    out = tmp_path_factory.mktemp("shapes")
    make_shapes(out, train=60, val=5, progress=False)
    return out, json.loads((out / "train/annotations.json").read_text())


def test_files_and_ids(made):
    out, document = made
    assert [len(list((out / split / "images").glob("*.png"))) for split in ("train", "val")] == [60, 5]
    assert {c["name"]: c["id"] for c in document["categories"]} == CATEGORIES
    assert {a["category_id"] for a in document["annotations"]} == set(CATEGORIES.values())
    counts = np.bincount([a["image_id"] for a in document["annotations"]], minlength=61)[1:]
    assert counts.min() >= 1 and counts.max() <= 4
    with Image.open(out / "train/images/000000.png") as image:
        assert image.size == (128, 128) and image.mode == "RGB"


def test_polygons_lie_inside_do_not_overlap_and_have_the_stated_area(made):
    _, document = made
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


def test_shapes_stand_out_where_their_polygons_say(made):
    """The colours inside and around each polygon differ, right up to its border."""
    out, document = made
    for annotation in document["annotations"]:
        pixels = np.asarray(Image.open(out / f"train/images/{annotation['image_id'] - 1:06d}.png"), np.float32)
        ring = np.array(annotation["segmentation"][0]).reshape(-1, 2)
        center = ring.mean(axis=0)
        inner, outer = (
            coco_mask.decode(coco_mask.frPyObjects([(center + (ring - center) * f).ravel().tolist()], 128, 128)[0]) > 0
            for f in (0.85, 1.12)
        )
        full = coco_mask.decode(coco_mask.frPyObjects([ring.ravel().tolist()], 128, 128)[0]) > 0
        inside, around = pixels[inner], pixels[outer & ~full]
        assert np.linalg.norm(np.median(inside, axis=0) - np.median(around, axis=0)) > 35


def test_pixels_are_covered_without_bias():
    """Area and center of what is painted are those of the polygon: a shift here is one that no model could undo."""
    rng = np.random.default_rng(0)
    ratios, shifts = [], []
    while len(ratios) < 100:
        _, ring = shapes._random_shape(rng, 128)
        if ring.min() < 2 or ring.max() > 126:
            continue
        coverage, (x0, y0, x1, y1) = shapes._coverage(ring)
        ratios.append(coverage.sum() / shoelace(ring))
        y, x = np.mgrid[y0:y1, x0:x1] + 0.5
        after = np.roll(ring, -1, axis=0)
        cross = ring[:, 0] * after[:, 1] - after[:, 0] * ring[:, 1]
        center = ((ring + after) * cross[:, None]).sum(axis=0) / (3 * cross.sum())
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


def test_bad_requests_are_refused(tmp_path):
    with pytest.raises(InputError, match="size"):
        make_shapes(tmp_path, size=8, progress=False)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write"):
        make_shapes(tmp_path / "file", train=1, val=0, progress=False)
