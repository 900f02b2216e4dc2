"""The paper's options in the whole network: what each changes in losses and detections, and dynamic sizes."""

import dataclasses

import numpy as np
import pytest
import tensorflow as tf
import tf_keras

from helpers.networks import CLASSES, instances_of, random_images, random_scenes, tiny_config
from polarmask_tf import config as configs
from polarmask_tf.errors import InputError
from polarmask_tf.modeling.polarmask import PolarMask
from polarmask_tf.ops import geometry, losses, targets
from polarmask_tf.training import train
from polarmask_tf.weights import runs


def make(box=False, rays=8, conventions="paper", centerness="polar", **loss):
    config = tiny_config(rays=rays)
    head = dataclasses.replace(config.model.head, box=box, ray_bias=2.0, ray_unit="pixel")
    return PolarMask(
        dataclasses.replace(
            config,
            conventions=conventions,
            model=dataclasses.replace(config.model, head=head),
            targets=dataclasses.replace(config.targets, centerness=centerness),
            loss=dataclasses.replace(config.loss, **loss),
        ),
        CLASSES,
    )


@pytest.fixture(scope="module")
def batch():
    return random_images(1, 2), instances_of(random_scenes(0, [3, 2]), (64, 64))


def losses_of(model, batch):
    images, instances = batch
    total = float(model.compute_loss(images, instances, model(images, training=True)))
    values = {name: float(value) for name, value in model.get_metrics_result().items()}
    assert values["loss"] == pytest.approx(total, rel=1e-5) and np.isfinite(list(values.values())).all()
    return values


@pytest.mark.parametrize(("loss", "function"), losses.RAY_LOSSES.items())
@pytest.mark.parametrize("centerness", ["polar", "cartesian"])
def test_ray_losses_are_weighted_means_over_positives(batch, loss, function, centerness):
    model = make(ray=loss, ray_weight=0.3, centerness=centerness)
    images, instances = batch
    values = losses_of(model, batch)
    assert values["loss"] == pytest.approx(values["class"] + 0.3 * values["ray"] + values["centerness"], rel=1e-5)
    encoded = targets.encode(instances, rays=8, levels=(3, 4, 5), size=(64, 64), ranges=model.ranges, centerness=centerness)
    maps = model(images)
    flat = np.concatenate([maps[level]["ray_logits"].numpy().reshape(2, -1, 8) for level in "345"], axis=1)
    predicted = np.exp(flat[tuple(encoded.positives.numpy().T)])
    each, weight = function(predicted, encoded.rays).numpy(), encoded.centerness.numpy()
    assert values["ray"] == pytest.approx((each * weight).sum() / weight.sum(), rel=1e-4)


def test_the_box_branch_learns_its_boxes(batch):
    model = make(box=True, box_weight=0.5)
    values = losses_of(model, batch)
    parts = values["class"] + values["ray"] + values["centerness"] + 0.5 * values["box"]
    assert values["loss"] == pytest.approx(parts, rel=1e-5) and values["box"] > 0
    with tf.GradientTape() as tape:
        loss = model.compute_loss(*batch, model(batch[0], training=True))
    gradients = tape.gradient(loss, model.trainable_variables)
    assert [v.name for v, g in zip(model.trainable_variables, gradients, strict=True) if g is None] == []
    # A network that says exactly the boxes has no box loss: their logits are the logarithms of the targets.
    encoded = targets.encode(batch[1], rays=8, levels=(3, 4, 5), size=(64, 64), ranges=model.ranges)
    outputs, first = model(batch[0]), 0
    for level in "345":
        shape = outputs[level]["ltrb_logits"].shape
        count = shape[1] * shape[2]
        sides = np.zeros((2, count, 4), np.float32)
        for (image, location), box in zip(encoded.positives.numpy(), encoded.ltrb.numpy(), strict=True):
            if first <= location < first + count:
                sides[image, location - first] = np.log(box)
        outputs[level]["ltrb_logits"] = tf.constant(sides.reshape(shape))
        first += count
    model.reset_metrics()
    model.compute_loss(*batch, outputs)
    assert float(model.get_metrics_result()["box"]) == pytest.approx(0, abs=1e-4)


def test_the_released_count_adds_the_images(batch):
    paper, released = make(box=True), make(box=True, conventions="released")
    paper(batch[0]), released(batch[0])
    released.set_weights(paper.get_weights())
    images, instances = batch
    # In a scene whose positives are the same in both conventions; whole pixels move centers by half a pixel.
    counts = [
        len(targets.encode(instances, rays=8, levels=(3, 4, 5), size=(64, 64), ranges=paper.ranges, whole_pixels=w).positives)
        for w in (False, True)
    ]
    none = instances_of([[], []], (64, 64))
    assert min(counts) > 0
    # Without any positive: divided by 1, and by the 2 images.
    alone, with_images = (losses_of(model, (images, none))["class"] for model in (paper, released))
    assert alone == pytest.approx(2 * with_images, rel=1e-5)


def test_four_rays_are_boxes_from_end_to_end(batch):
    model = make(rays=4)
    found = model.detect(batch[0], score_threshold=0.0, max_detections=5)
    for polygon, box in zip(found["detection_polygons"][0].numpy(), found["detection_boxes"][0].numpy(), strict=True):
        top, left, bottom, right = box
        np.testing.assert_allclose(polygon, [[right, bottom], [left, bottom], [left, top], [right, top]], atol=1e-6)
    assert losses_of(model, batch)["ray"] > 0


@pytest.mark.parametrize("conventions", ["paper", "released"])
def test_dynamic_sizes_give_the_same(batch, conventions):
    model = make(box=True, conventions=conventions)
    images, instances = batch
    spec = tf.TensorSpec((None, None, None, 3), tf.uint8)
    loss = tf.function(lambda x: model.compute_loss(x, instances, model(x, training=True)), input_signature=[spec])
    assert float(loss(images)) == pytest.approx(float(model.compute_loss(images, instances, model(images))), rel=1e-5)
    detect = tf.function(lambda x: model.detect(x, score_threshold=0.001, max_detections=7), input_signature=[spec])
    for size in ((64, 64), (32, 96)):
        pictures = random_images(2, 2, size)
        fixed = model.detect(pictures, score_threshold=0.001, max_detections=7)
        assert fixed["num_detections"][0] > 0
        for name, value in detect(pictures).items():
            np.testing.assert_allclose(value, fixed[name], atol=1e-4)
    assert detect.experimental_get_tracing_count() == 1


def test_every_row_of_every_table_says_its_option():
    def of(name):
        return configs.load(name)

    assert [of(f"table1a_rays{n}").model.rays for n in (18, 24, 36, 72)] == [18, 24, 36, 72]
    assert of("table1a_rays36") == of("table1b_polar_iou") == of("table1c_cartesian") == of("table1d_with_box")
    smooth = [of(f"table1b_smooth_l1_{a}").loss for a in ("005", "030", "100")]
    assert [(loss.ray, loss.ray_weight) for loss in smooth] == [("smooth_l1", 0.05), ("smooth_l1", 0.3), ("smooth_l1", 1.0)]
    assert of("table1c_polar").targets.centerness == "polar" and not of("table1d_without_box").model.head.box
    assert of("table1e_r50") == of("paper_1x") == of("table1f_800")
    assert of("table1e_r101") == of("table2_r101") and of("table1e_r101").model.backbone.blocks == (3, 4, 23, 3)
    resnext = of("table1e_x101").model.backbone
    assert of("table1e_x101") == of("table2_x101") and (resnext.groups, resnext.group_width) == (64, 4)
    assert [of(f"table1f_{s}").data.size for s in (400, 600)] == [(400, 1333), (600, 1333)]
    for name in ("r50_1x", "r101_1x", "x101_1x", "r50_2x", "r101_2x", "x101_2x"):
        config = of(f"released_{name}")
        assert config.conventions == "released" and config.model.head.box and config.data.fit == "stretch"
        assert config.data.size == (768, 1280) and config.targets.parts == "largest"


def saved_run(folder, num_classes, seed, rays=8):
    tf_keras.utils.set_random_seed(seed)
    config = tiny_config(rays=rays)
    model = PolarMask(config, num_classes)
    model.build((None, 64, 64, 3))
    classes = [{"name": f"c{i}", "category_id": i} for i in range(num_classes)]
    runs.write_run(folder, config, {"classes": classes, "name": "x", "num_images": 0})
    runs.save(model, folder, 0, weights_only=True)
    return model


def test_a_training_can_start_from_another_runs_weights(tmp_path, capsys):
    before = saved_run(tmp_path / "a", 5, 1)
    same = PolarMask(tiny_config(), 5)
    same.build((None, 64, 64, 3))
    train.start_from(same, tmp_path / "a")
    for mine, theirs in zip(same.variables, before.variables, strict=True):
        np.testing.assert_array_equal(mine, theirs)
    other = PolarMask(tiny_config(), 3)
    other.build((None, 64, 64, 3))
    anew = other.head.classes.conv.kernel.numpy()
    train.start_from(other, tmp_path / "a")
    np.testing.assert_array_equal(other.head.classes.conv.kernel, anew)
    np.testing.assert_array_equal(other.head.rays.conv.kernel, before.head.rays.conv.kernel)
    assert "anew: head/classes/conv/kernel, head/classes/conv/bias" in capsys.readouterr().out
    with pytest.raises(InputError, match="not a run directory"):
        train.start_from(other, tmp_path / "b")


def test_a_start_says_what_its_weights_are_used_to(tmp_path, capsys):
    before = saved_run(tmp_path / "a", 5, 1)
    before.save(tmp_path / "a.keras")
    config = tiny_config(rays=12)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, normalization="image"))
    model = PolarMask(config, 5)
    train.start_from(model, tmp_path / "a.keras")
    np.testing.assert_array_equal(model.head.classes.conv.kernel, before.head.classes.conv.kernel)
    said = capsys.readouterr().out
    assert said.startswith(f"starting from {tmp_path / 'a.keras'}: ") and said.count("\n") == 1
    assert (
        "anew: head/rays/conv/kernel, head/rays/conv/bias; it was trained with model.normalization=fixed, model.rays=8" in said
    )


def test_a_start_says_what_its_rays_and_classes_were(tmp_path, capsys):
    before = saved_run(tmp_path / "a", 3, 1)
    config = tiny_config()
    head = dataclasses.replace(config.model.head, ray_unit="pixel", centerness_tower="ray")
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, head=head))
    train.start_from(PolarMask(config, ["c2", "c1", "c0"]), tmp_path / "a")
    said = capsys.readouterr().out
    told = "it was trained with model.head.centerness_tower=class, model.head.ray_unit=stride, the classes c0, c1, c2"
    assert said.count("\n") == 1 and said.endswith(f" tensors; {told}\n")
    before.save_weights(tmp_path / "a.weights.h5")
    with pytest.raises(InputError, match=r"a\.weights\.h5: weights of save_weights.* \.keras"):
        train.start_from(before, tmp_path / "a.weights.h5")


def test_centerness_of_locations_off_center_is_lower_in_polar_than_in_cartesian():
    """A thin diagonal bar: its box is square, so Cartesian centerness is 1 in the middle; polar centerness is not."""
    ring = np.float32([[10, 12], [12, 10], [54, 52], [52, 54]])
    instances = instances_of([[(0, ring)]], (64, 64))
    found = {
        kind: targets.encode(instances, rays=36, levels=(3, 4, 5), size=(64, 64), ranges=(20, 64), centerness=kind)
        for kind in ("polar", "cartesian")
    }
    assert len(found["polar"].positives) > 0
    assert (found["polar"].centerness.numpy() < 0.3).all() and (found["cartesian"].centerness.numpy() > 0.4).all()
    assert geometry.EPSILON < found["polar"].rays.numpy().max() < 64
