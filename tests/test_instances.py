"""data/instances.py: a user's own objects become the instances that converted data would have given."""

import dataclasses
import json

import numpy as np
import pytest
import tensorflow as tf
from pycocotools import mask as coco_mask

from polarmask_tf.config import Config, ModelConfig
from polarmask_tf.data import pipeline, segmentation
from polarmask_tf.data.convert import convert
from polarmask_tf.data.instances import instances_spec, make_instances
from polarmask_tf.errors import InputError
from polarmask_tf.ops import targets
from polarmask_tf.tools.shapes import make_shapes

BASE = Config()
CONFIG = dataclasses.replace(BASE, data=dataclasses.replace(BASE.data, size=(64, 96), batch=2, flip="none", max_instances=6))
FOUR = dataclasses.replace(CONFIG, model=ModelConfig(rays=4))
SQUARE = [[10, 20], [30, 20], [30, 40], [10, 40]]
TRIANGLE = [50.5, 5, 70, 50, 40, 44.25]


def make(objects, size=(60, 90), config=CONFIG, **options):
    found = make_instances(objects, size, config, **options)
    spec = instances_spec(config, options.get("max_instances"), options.get("max_edges", 96))
    assert found.keys() == spec.keys() == targets.INSTANCES.keys()
    for name, value in found.items():
        assert isinstance(value, np.ndarray) and spec[name].is_compatible_with(tf.constant(value)), name
        assert np.isfinite(value).all()
    return found


def test_they_equal_what_converted_data_give(tmp_path):
    """Pictures of shapes, by way of records and by way of a user's own code: the same numbers, place by place."""
    make_shapes(tmp_path, train=6, val=0, size=64, kinds=["star", "cee", "circle"], progress=False)
    source = tmp_path / "train/annotations.json"
    convert(source, tmp_path / "train/images", tmp_path / "data", processes=1, progress=False)
    config = dataclasses.replace(CONFIG, data=dataclasses.replace(CONFIG.data, size=(64, 64), batch=6))
    ((_, batch),) = pipeline.validation_data(tmp_path / "data", config).as_numpy_iterator()
    document = json.loads(source.read_text())
    ids = sorted(category["id"] for category in document["categories"])
    most, edges = batch["edges"].shape[1:3]
    for row, image in enumerate(document["images"]):
        mine = [a for a in document["annotations"] if a["image_id"] == image["id"]]
        objects = {"polygons": [a["segmentation"] for a in mine], "classes": [ids.index(a["category_id"]) for a in mine]}
        found = make(objects, (64, 64), config, max_instances=most, max_edges=edges)
        for name, value in found.items():
            np.testing.assert_allclose(value, batch[name][row], atol=1e-4, err_msg=name)


@pytest.mark.parametrize(
    "polygons",
    [
        [SQUARE, TRIANGLE],
        [[SQUARE], [TRIANGLE]],
        [np.array(SQUARE), np.array(TRIANGLE).reshape(3, 2)],
        [np.array([SQUARE]), [np.array(TRIANGLE)]],
        (tuple(map(tuple, SQUARE[::-1])), TRIANGLE),  # turning the other way
        [[SQUARE, [1, 1, 2, 1, 2, 2]], TRIANGLE],
    ],
)
def test_polygons_come_in_any_form(polygons):
    found = make({"polygons": polygons, "classes": np.array([3, 1])})
    assert found["classes"].tolist() == [1, 3, -1, -1, -1, -1]  # the triangle is larger
    low, high = found["boxes"][1].reshape(2, 2)
    np.testing.assert_allclose(high, [30, 40])
    np.testing.assert_allclose(low, [1, 1] if len(polygons[0]) == 2 else [10, 20])
    np.testing.assert_allclose(found["centers"][1], [20, 30], atol=1e-4)
    np.testing.assert_allclose(found["boxes"][0], [40, 5, 70, 50])
    np.testing.assert_array_equal(found["window"], [90, 60])
    assert not found["ignore"].any() and found["ignore"].shape == (8 * 12 + 4 * 6 + 2 * 3,)


def test_masks_are_traced():
    masks = np.zeros((3, 60, 90), bool)
    masks[0, 20:40, 10:30] = True
    masks[1] = coco_mask.decode(coco_mask.frPyObjects([TRIANGLE], 60, 90)[0])
    found = make({"masks": masks, "classes": [3, 1, 0]})  # the last one is not visible
    polygons = make({"polygons": [SQUARE, TRIANGLE], "classes": [3, 1]})
    assert found["classes"].tolist() == polygons["classes"].tolist() == [1, 3, -1, -1, -1, -1]
    np.testing.assert_allclose(found["centers"], polygons["centers"], atol=0.3)
    np.testing.assert_allclose(found["boxes"], polygons["boxes"], atol=2.1)  # a tip is blunt in a mask
    np.testing.assert_allclose(found["boxes"][1], [10, 20, 30, 40])


def test_boxes_alone_are_enough_for_four_rays():
    boxes = [[10, 20, 30, 40], [40, 5, 95, 70]]
    found = make({"boxes": boxes, "classes": [3, 1]}, config=FOUR)
    np.testing.assert_allclose(found["boxes"][:2], [[40, 5, 90, 60], [10, 20, 30, 40]])  # what is visible of them
    assert found["classes"].tolist()[:3] == [1, 3, -1]
    with pytest.raises(InputError, match=r"'masks' or 'polygons' are needed; boxes alone are enough for model\.rays: 4"):
        make({"boxes": boxes, "classes": [3, 1]})


def test_boxes_beside_outlines_are_taken():
    objects = {"boxes": [[8, 18, 33, 44], [39, 4, 71, 51]], "polygons": [SQUARE, TRIANGLE], "classes": [3, 1]}
    found = make(objects)
    np.testing.assert_allclose(found["boxes"][:2], [[39, 4, 71, 51], [8, 18, 33, 44]])
    np.testing.assert_allclose(found["centers"][1], [20, 30], atol=1e-4)  # of the outline's mass
    boxed = dataclasses.replace(CONFIG, targets=dataclasses.replace(CONFIG.targets, center="box"))
    np.testing.assert_allclose(make(objects, config=boxed)["centers"][1], [20.5, 31])


def test_what_is_more_than_fits_is_ignored_and_no_object_is_none():
    found = make({"polygons": [SQUARE, TRIANGLE], "classes": [3, 1]}, max_instances=1)
    assert found["classes"].tolist() == [1]
    points = pipeline.locations((64, 96), CONFIG.model.fpn.levels).numpy()
    inside = ((points > [10, 20]) & (points < [30, 40])).all(axis=1)
    np.testing.assert_array_equal(found["ignore"], inside)
    for objects in ({"polygons": [], "classes": []}, {"masks": np.zeros((0, 60, 90), bool), "classes": []}):
        assert (make(objects)["classes"] == -1).all()
    assert (make({"boxes": [], "classes": []}, config=FOUR)["classes"] == -1).all()
    assert (make({"polygons": [[]], "classes": [1]})["classes"] == -1).all()


def test_too_many_edges_are_simplified():
    angles = np.linspace(0, 2 * np.pi, 500, endpoint=False)
    circle = np.stack([45 + 20 * np.cos(angles), 30 + 20 * np.sin(angles)], axis=1)
    found = make({"polygons": [circle], "classes": [0]}, max_edges=24)
    rings = [found["edges"][0, :, :2][np.ptp(found["edges"][0].reshape(-1, 2, 2), axis=1).any(axis=1)]]
    assert segmentation.contours.iou(rings, [circle]) > 0.98


GOOD = {"polygons": [SQUARE], "classes": [0]}
BAD = [
    ({**GOOD, "classes": [-1]}, "'classes' must be whole numbers from 0"),
    ({**GOOD, "classes": [0.5]}, "'classes' must be whole numbers"),
    ({**GOOD, "classes": 0}, "'classes' must be"),
    ({**GOOD, "classes": [0, 1]}, "'polygons' must be a list, one for each of 2 'classes'"),
    ({**GOOD, "polygons": 5}, "'polygons' must be a list"),
    ({**GOOD, "polygons": [5]}, r"'polygons\[0\]' is neither a ring"),
    ({**GOOD, "polygons": [[1, 2, 3, 4]]}, r"'polygons\[0\]' is neither a ring"),
    ({**GOOD, "polygons": [[1, 2, 3, 4, 5, 6, 7]]}, "neither a ring"),
    ({**GOOD, "polygons": [[[1, 2, 3], [3, 4, 5], [5, 6, 7]]]}, "neither a ring"),
    ({**GOOD, "polygons": [[*SQUARE, [1, float("nan")]]]}, "neither a ring"),
    ({**GOOD, "polygons": [[*SQUARE, [1, 10**400]]]}, "neither a ring"),
    ({**GOOD, "polygons": ["abc"]}, "neither a ring"),
    ({**GOOD, "polygons": [None]}, "neither a ring"),
    ({"classes": [0], "masks": np.zeros((1, 60, 91), bool)}, r"'masks' are bool \[1, 60, 91\], not bool .*\[1, 60, 90\]"),
    ({"classes": [0], "masks": np.zeros((1, 60, 90), np.uint8)}, "'masks' are uint8"),
    ({**GOOD, "boxes": [1, 2, 3, 4]}, r"'boxes' has the shape \[4\], not \[1, 4\]"),
    ({**GOOD, "boxes": [[3, 2, 1, 4]]}, "x1 < x2"),
    ({**GOOD, "boxes": [[1, 2, float("inf"), 4]]}, "'boxes' has numbers that are not finite"),
    ({**GOOD, "boxes": [["a"] * 4]}, "'boxes' is not an array of numbers"),
    ({"polygons": [SQUARE]}, "objects must be"),
    ([SQUARE], "objects must be"),
    ({"classes": [0]}, "'masks' or 'polygons' are needed"),
]


@pytest.mark.parametrize(("objects", "said"), BAD)
def test_what_cannot_be_taken_is_one_line(objects, said):
    with pytest.raises(InputError, match=f"make_instances: .*{said}") as error:
        make(objects)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("size", "options", "said"),
    [
        ((65, 96), {}, r"image_size is \[65, 96\], the network's input \[64, 96\]"),
        ((0, 96), {}, "image_size"),
        ((64,), {}, "'image_size' has the shape"),
        ((64, float("nan")), {}, "'image_size' has numbers that are not finite"),
        ((60, 90), {"max_instances": 0}, "max_instances is 0"),
        ((60, 90), {"max_edges": 3}, "max_edges 3"),
    ],
)
def test_sizes_that_cannot_be_are_one_line(size, options, said):
    with pytest.raises(InputError, match=said):
        make_instances(GOOD, size, CONFIG, **options)


@pytest.mark.parametrize("way", ["from_generator", "numpy_function"])
def test_they_work_in_a_tf_data_pipeline_of_ones_own(way):
    """The README's way: the batches are what `fit` takes."""
    spec = instances_spec(CONFIG, max_edges=16)

    def instances(number):
        ring = np.array(SQUARE) + number
        return make_instances({"polygons": [ring], "classes": [number]}, (60, 90), CONFIG, max_edges=16)

    image = tf.zeros([64, 96, 3], tf.uint8)
    if way == "from_generator":

        def generate():
            for number in range(4):
                yield image, instances(number)

        data = tf.data.Dataset.from_generator(generate, output_signature=(tf.TensorSpec([64, 96, 3], tf.uint8), spec))
    else:

        def load(number):
            flat = tf.numpy_function(
                lambda n: [instances(n)[name] for name in sorted(spec)], [number], [spec[name].dtype for name in sorted(spec)]
            )
            return image, {name: tf.ensure_shape(v, spec[name].shape) for name, v in zip(sorted(spec), flat, strict=True)}

        data = tf.data.Dataset.range(4).map(load, num_parallel_calls=2)
    batches = list(data.batch(2))
    assert len(batches) == 2
    for images, batch in batches:
        targets.check_batch((images, batch), CONFIG.model.fpn.levels)
    assert [batch["classes"][:, 0].numpy().tolist() for _, batch in batches] == [[0, 1], [2, 3]]
    np.testing.assert_allclose(batches[1][1]["centers"][1, 0], [23, 33], atol=1e-4)
