"""What a predictor gives: its kinds of input, and what can be made of its results."""

import dataclasses
import io
import json

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from helpers.polygons import brute_raster, polar_star
from polarmask_tf import config as configs
from polarmask_tf.errors import InputError
from polarmask_tf.inference import visualize
from polarmask_tf.inference.predictor import Predictor, load_predictor
from polarmask_tf.inference.results import Detections
from polarmask_tf.inference.tiling import tiled

CLASSES = [{"name": "circle", "category_id": 7}, {"name": "star", "category_id": 3}]


def stars(count, height=60, width=80, rays=12, **more):
    """Made-up detections of alternating classes, by descending score."""
    rng = np.random.default_rng(count)
    polygons = np.float32([polar_star(rng, *rng.uniform((20, 20), (60, 40)), 18, rays) for _ in range(count)]).reshape(
        -1, rays, 2
    )
    boxes = np.concatenate([polygons.min(axis=1), polygons.max(axis=1)], -1) if count else np.zeros((0, 4), np.float32)
    scores = np.linspace(0.98, 0.2, count, dtype=np.float32)
    return Detections(scores, np.arange(count, dtype=np.int32) % 2, boxes, polygons, CLASSES, (height, width), **more)


def seen():
    """A predictor that finds a triangle in every image and tells of the images that it saw."""
    images = []

    def run(pixels):
        images.append([image.copy() for image in pixels])
        triangle = np.float32([[(1, 1), (9, 1), (1, 9)]])
        found = {
            "scores": np.float32([0.5]),
            "classes": np.int32([1]),
            "boxes": np.float32([[1, 1, 9, 9]]),
            "polygons": triangle,
        }
        return [found for _ in pixels]

    return Predictor("run", CLASSES, (32, 32), 2, run), images


PIXELS = np.random.default_rng(0).integers(0, 256, (12, 10, 3), np.uint8)


def test_an_image_may_be_given_in_any_form(tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(PIXELS).save(path)
    forms = [
        path,
        str(path),
        path.read_bytes(),
        Image.open(path),
        Image.fromarray(PIXELS),
        PIXELS,
        io.BytesIO(path.read_bytes()),
    ]
    predictor, images = seen()
    for form in forms:
        found = predictor(form)
        assert isinstance(found, Detections) and found.image_size == (12, 10) and found.names == ["star"]
    together = predictor(forms)
    assert isinstance(together, list) and [len(found) for found in together] == [1] * 7
    assert [len(batch) for batch in images] == [1] * 7 + [2, 2, 2, 1]  # never more than the back end takes well
    for image in (image for batch in images for image in batch):
        np.testing.assert_array_equal(image, PIXELS)
    assert predictor([]) == [] and predictor(()) == []
    for bad in (np.zeros((4, 4)), tmp_path / "none.png", b"no image", 3, None, [[1, 2], [3, 4]], [PIXELS, "none.png"]):
        with pytest.raises(InputError) as error:
            predictor(bad)
        assert "\n" not in str(error.value)


def test_masks_are_the_polygons_rasterised():
    found = stars(5)
    masks, rles = found.masks(), found.rles()
    assert masks.dtype == bool and masks.shape == (5, 60, 80) and len(rles) == 5
    for mask, rle, polygon in zip(masks, rles, found.polygons, strict=True):
        np.testing.assert_array_equal(mask, coco_mask.decode(rle).astype(bool))
        expected = brute_raster(polygon, 60, 80)
        assert (mask & expected).sum() > 0.85 * (mask | expected).sum()  # they differ along the border alone
    assert stars(0).masks().shape == (0, 60, 80) and stars(0).rles() == []


def test_many_masks_at_once():
    assert stars(300).masks().shape[0] == 300  # pycocotools 2.0.11 fails on lists of more than 255 under NumPy 2


def test_coco_dicts_have_the_original_categories():
    found = stars(3)
    results = json.loads(json.dumps(found.to_coco("a.png")))
    assert [r["category_id"] for r in results] == [7, 3, 7] and {r["image_id"] for r in results} == {"a.png"}
    assert [r["segmentation"] for r in results] == found.rles()
    np.testing.assert_allclose([r["score"] for r in results], found.scores, rtol=1e-6)
    widths = [r["bbox"][2] for r in results]
    np.testing.assert_allclose(widths, np.ptp(found.polygons[..., 0], axis=1), atol=0.01)


def test_a_picture_of_more_pixels_than_an_rle_counts_has_polygons():
    found = dataclasses.replace(stars(2), image_size=(70_000, 70_000))
    assert found.to_coco(1, "polygon") == stars(2).to_coco(1, "polygon")
    with pytest.raises(InputError, match="70000 x 70000 pixels are too many for RLE masks; take polygons"):
        found.to_coco(1)


def test_in_words():
    assert repr(stars(0)) == "no detections" and len(stars(0)) == 0 and stars(0).names == []
    assert repr(stars(1)) == "1 detection: 1 circle; best 0.98"
    assert repr(stars(3)) == "3 detections: 2 circle, 1 star; best 0.98"
    assert repr(stars(3).above(0.5)) == "2 detections: 1 circle, 1 star; best 0.98"
    strange = [{"name": "a\x1b[31m\nb" + "c" * 99, "category_id": 1}]
    text = repr(dataclasses.replace(stars(1), categories=strange))
    assert text.isprintable() and len(text) < 80
    many = [{"name": f"kind {i}", "category_id": i} for i in range(9)]
    assert repr(dataclasses.replace(stars(9), categories=many, classes=np.arange(9))).count("kind") == 5
    assert Detections(*(getattr(stars(2), name) for name in ("scores", "classes", "boxes", "polygons"))).names == [
        "class 0",
        "class 1",
    ]


def test_only_sure_ones_keep_what_belongs_to_the_image():
    found = stars(4, source=PIXELS).above(0.7)
    assert (
        len(found) == 2 and found.masks().shape == (2, 60, 80) and found.source is PIXELS and found.names == ["circle", "star"]
    )


def test_the_picture(tmp_path):
    image = np.full((60, 80, 3), 90, np.uint8)
    Image.fromarray(image).save(tmp_path / "a.png")
    found = stars(2)
    with pytest.raises(InputError, match="do not know their image"):
        found.plot()
    picture = found.plot(image)
    colors = [visualize.color(0), visualize.color(1)]
    expected = visualize.draw(image, list(found.polygons), ["circle", "star"], found.scores, colors)
    np.testing.assert_array_equal(picture, expected)
    assert (np.asarray(picture) != 90).any()
    for source in (image, tmp_path / "a.png", str(tmp_path / "a.png"), (tmp_path / "a.png").read_bytes()):
        np.testing.assert_array_equal(stars(2, source=source).plot(), expected)
    found.save(tmp_path / "b.png", image)
    dataclasses.replace(found, source=image).save(str(tmp_path / "c.JPG"))
    found.save(tmp_path / "d", image)
    with Image.open(tmp_path / "b.png") as b, Image.open(tmp_path / "c.JPG") as c, Image.open(tmp_path / "d") as d:
        np.testing.assert_array_equal(b, expected)
        assert (c.format, c.size, d.format) == ("JPEG", expected.size, "PNG")
    with pytest.raises(InputError, match="no kind of picture"):
        found.save(tmp_path / "e.txt", image)
    with pytest.raises(InputError, match="cannot be written"):
        found.save(tmp_path / "none" / "e.png", image)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "b.png", "c.JPG", "d"]


def test_the_picture_is_read_with_the_predictors_bit_depth(tmp_path):
    values = np.full((60, 80), 100, np.float32)
    values[:, 40:] = 3000
    Image.fromarray(values).save(tmp_path / "a.tif")
    predictor, _ = seen()
    predictor = dataclasses.replace(predictor, bit_depth=12)
    for found in (predictor(tmp_path / "a.tif"), tiled(predictor, 128)(tmp_path / "a.tif")):
        assert {*np.asarray(found.above(0.6).plot())[:, -100:].ravel().tolist()} == {3000 >> 4}


def test_one_name_of_a_class_is_no_list_of_letters():
    assert stars(4).only("star").names == ["star"] * 2
    with pytest.raises(InputError, match="no class 'moon'; this model's are: circle, star"):
        stars(4).only("moon")


def test_a_model_and_its_file_are_predictors(tmp_path):
    import polarmask_tf.modeling.polarmask as polarmask

    small = [
        "model.backbone.width=8",
        "model.fpn.channels=16",
        "model.head.channels=16",
        "model.head.convs=1",
        "data.size=[64,64]",
    ]
    small += ["model.rays=8", "postprocess.score_threshold=0.0", "postprocess.max_detections=5"]
    model = polarmask.PolarMask(configs.load("shapes", small), ["circle", "star"])
    model.save(tmp_path / "model.keras")
    image = np.random.default_rng(1).integers(0, 256, (50, 70, 3), np.uint8)
    one, other = load_predictor(model)(image), load_predictor(str(tmp_path / "model.keras"))(image)
    assert len(one) == 5 and one.names == other.names and one.polygons.shape == (5, 8, 2)
    np.testing.assert_allclose(one.polygons, other.polygons, atol=1e-3)
    for options in ({"max_detections": 2}, {"score_threshold": float(one.scores[2])}):
        np.testing.assert_array_equal(load_predictor(model, **options)(image).scores, one.scores[:2])
    (tmp_path / "broken.keras").write_bytes(b"no zip")
    with pytest.raises(InputError, match=r"broken\.keras: damaged"):
        load_predictor(tmp_path / "broken.keras")
