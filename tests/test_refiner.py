"""Contour refinement against look-ups and convolutions written out in loops, and its place in the model, losses and files."""

import re

import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from ai_edge_litert.interpreter import Interpreter
from benchmarks.growth import synthetic_batch

from helpers import training
from polarmask_tf import PolarMask
from polarmask_tf import config as configs
from polarmask_tf.errors import InputError
from polarmask_tf.export import tflite
from polarmask_tf.modeling import step, terms
from polarmask_tf.modeling.refiner import FEATURES, KERNELS, SAMPLES, Refiner
from polarmask_tf.ops import geometry, losses, overlap
from polarmask_tf.training.train import build
from polarmask_tf.weights import runs, start

SETTINGS = (*training.TINY, "model.refine_channels=8")


def made(channels=6, stride=4, seed=0):
    """A refiner whose every weight is random."""
    layer = Refiner(channels, stride)
    layer(tf.zeros([1, 2, 2, 3]))
    rng = np.random.default_rng(seed)
    for variable in layer.trainable_variables:
        variable.assign(rng.normal(0, 0.4, variable.shape))
    return layer


def slow_refine(layer, features, image, points, lengths):
    """One sample, one ray and one weight after the other."""
    n = lengths.shape[1]
    result, lengths, ways = np.zeros(lengths.shape), np.float32(lengths), geometry.ray_directions(n)
    for row, (x, y) in enumerate(points):
        z = []
        for k in range(n):
            values, within = [], ([], [])
            for j in range(SAMPLES):
                far = lengths[row, k] * np.float32(1 + 0.03 * (j - SAMPLES // 2)) + np.float32(1.5 * (j - SAMPLES // 2))
                place = (np.float32([x, y]) + far * ways[k]) / layer.stride  # in float32, as cells end where rays may run
                place = np.clip(place, 0.5, np.array(features.shape[2:0:-1]) - 0.5)
                cell = np.minimum(np.floor(place), np.array(features.shape[2:0:-1]) - 1).astype(int)
                values.append(features[image[row], cell[1], cell[0]])
                for axis in (0, 1):
                    within[axis].append(place[axis] - cell[axis] - 0.5)
            z.append(np.concatenate([*values, *within]))
        z = np.array(z)
        for number, conv in enumerate(layer.convs):
            kernel, bias = conv.kernel.numpy()[0], conv.bias.numpy()
            reach = len(kernel) // 2
            y_ = np.array([bias + sum(z[(k + d - reach) % n] @ kernel[d] for d in range(len(kernel))) for k in range(n)])
            z = y_ if number == len(KERNELS) - 1 else np.maximum(y_, 0) + (z if number else 0)
        result[row] = lengths[row] * np.exp(np.clip(0.1 * z[:, 0], -1, 1))
    return result


def test_it_is_what_loops_over_samples_rays_and_weights_give():
    """Two images that are not square, polygons that reach over the border."""
    layer, rng = made(), np.random.default_rng(1)
    features = rng.normal(size=(2, 7, 9, FEATURES)).astype(np.float32)
    image, points = np.int32([0, 1, 1]), np.float32([[10, 9], [33, 4], [18.3, 14.1]])
    lengths = rng.uniform(1, 14, (3, 12)).astype(np.float32)
    found = layer.refine(tf.constant(features), image, tf.constant(points), tf.constant(lengths)).numpy()
    np.testing.assert_allclose(found, slow_refine(layer, features, image, points, lengths), rtol=1e-4)
    assert np.abs(found / lengths - 1).max() > 0.05


def test_a_contour_has_no_first_ray():
    """On features of which one direction is like the others, rays that are turned are corrected as they were."""
    layer, n = made(), 16
    layer.convs[0].kernel.assign(layer.convs[0].kernel * np.r_[np.ones(SAMPLES * FEATURES), np.zeros(2 * SAMPLES)][:, None])
    lengths = np.random.default_rng(2).uniform(5, 9, (1, n)).astype(np.float32)
    y, x = (np.mgrid[:33, :33] - 16.0) ** 2
    features = tf.constant(np.repeat(np.float32(np.round(np.sqrt(x + y) / 8))[None, :, :, None], FEATURES, 3))

    def refined(values):
        return layer.refine(features, np.int32([0]), np.float32([[66, 66]]), tf.constant(values)).numpy()

    expected = np.roll(refined(lengths), n // 4, axis=1)  # by a quarter, which cells do not tell apart
    np.testing.assert_allclose(refined(np.roll(lengths, n // 4, axis=1)), expected, rtol=1e-5)


def test_training_begins_with_the_polygons_as_they_are():
    layer = Refiner(8, 4)
    features = layer(tf.random.stateless_normal([1, 8, 8, 5], [0, 1]))
    lengths = tf.random.stateless_uniform([3, 12], [0, 1], 2.0, 9.0)
    found = layer.refine(features, tf.zeros([3], tf.int32), tf.fill([3, 2], 16.0), lengths)
    np.testing.assert_allclose(found, lengths, rtol=1e-6)


def test_no_length_changes_without_end():
    layer = made()
    layer.convs[-1].bias.assign([1e6])
    lengths = tf.fill([1, 12], 5.0)
    found = layer.refine(tf.zeros([1, 8, 8, FEATURES]), tf.zeros([1], tf.int32), tf.fill([1, 2], 16.0), lengths)
    np.testing.assert_allclose(found, 5 * np.e * np.ones([1, 12]), rtol=1e-5)


def test_a_length_that_is_no_number_stays_that_and_stops_no_look_up():
    """A training that diverges is told by its loss, in one line (training/log.py)."""
    layer, lengths = made(), np.full((2, 12), 5.0, np.float32)
    lengths[0] = np.nan
    found = layer.refine(tf.zeros([1, 8, 8, FEATURES]), tf.zeros([2], tf.int32), tf.fill([2, 2], 16.0), tf.constant(lengths))
    assert np.isnan(found[0]).all() and np.isfinite(found[1]).all()


def randomized(*settings, classes=3):
    model = build(configs.load("shapes", [*SETTINGS, *settings]), classes)
    rng = np.random.default_rng(0)
    for variable in model.refiner.trainable_variables:
        variable.assign(rng.normal(0, 0.3, variable.shape))
    return model


def batch(config, classes=3):
    images, instances = synthetic_batch(config, 5, edges=16)
    instances["classes"] %= classes
    return tf.constant(images), {name: tf.constant(value) for name, value in instances.items()}


def polygons_of(model, outputs, at):
    """Points, lengths before and lengths after at (image, location), by the loops above."""
    sizes = {level: maps["ray_logits"].shape[1:3] for level, maps in outputs.items()}
    points = np.concatenate([geometry.locations(h * 2 ** int(n), w * 2 ** int(n), 2 ** int(n)) for n, (h, w) in sizes.items()])
    logits = np.concatenate([m["ray_logits"].numpy().reshape(len(m["ray_logits"]), -1, 12) for m in outputs.values()], axis=1)
    lengths, points = geometry.rays_from_logits(tf.constant(logits[tuple(at.T)]), 1.0).numpy(), points[at[:, 1]]
    features = outputs["3"]["contour_features"].numpy()
    return points, lengths, slow_refine(model.refiner, features, at[:, 0], points, lengths)


def test_losses_are_of_both_polygons_and_the_iou_is_of_the_refined():
    model = randomized("loss.mask_weight=1", "targets.centerness=iou", "loss.weight_by=iou")
    images, instances = batch(model.config)
    outputs, prepared = model(images), step.prepare(model, images, instances)
    encoded = prepared.targets
    found = dict(zip(model.loss_names, terms.losses_of(model, outputs, encoded, prepared.normalizers), strict=True))
    _, before, after = polygons_of(model, outputs, encoded.positives.numpy())
    areas = [overlap.areas(tf.constant(np.float32(each)), encoded.crossings, encoded.border) for each in (before, after)]
    iou = overlap.iou(areas[1]).numpy()
    assert np.abs(iou - overlap.iou(areas[0])).max() > 0.02
    rays = sum(losses.polar_iou_loss(tf.constant(np.float32(each)), encoded.rays).numpy() for each in (before, after))
    masks = sum(overlap.dice_loss(each).numpy() for each in areas)
    assert float(found["ray"]) == pytest.approx((rays * iou).sum() / len(iou), rel=1e-3)
    assert float(found["mask"]) == pytest.approx((masks * iou).sum() / len(iou), rel=1e-3)


def test_rays_do_not_learn_from_what_becomes_of_them():
    rays_alone = ("loss.class_weight=0", "loss.centerness_weight=0", "loss.mask_weight=0")
    model, plain = randomized(*rays_alone), build(configs.load("shapes", [*training.TINY, *rays_alone]), 3)
    for mine, theirs in zip(plain.head.variables, model.head.variables, strict=True):
        mine.assign(theirs)
    for mine, theirs in zip(
        [*plain.backbone.variables, *plain.decoder.variables],
        [*model.backbone.variables, *model.decoder.variables],
        strict=True,
    ):
        mine.assign(theirs)
    images, instances = batch(model.config)

    def gradient(model):
        with tf.GradientTape() as tape:
            loss = model.compute_loss(images, instances, model(images, training=False))
        return tape.gradient(loss, model.head.rays.conv.kernel).numpy()

    np.testing.assert_allclose(gradient(model), gradient(plain), rtol=1e-4, atol=1e-7)


def test_detections_are_the_refined_polygons_and_their_boxes():
    model = randomized("postprocess.nms_iou_threshold=0.3")
    images, _ = batch(model.config)
    images, outputs = images[:2], model(images[:2])
    found = model.detect(images)
    model.refiner, refiner = None, model.refiner
    plain = model.detect(images)
    model.refiner = refiner
    np.testing.assert_array_equal(found["num_detections"], plain["num_detections"])
    np.testing.assert_array_equal(found["detection_scores"], plain["detection_scores"])  # the same are kept
    moved, checked = 0.0, 0
    for image in range(2):
        count = int(found["num_detections"][image])
        all_points = np.concatenate([geometry.locations(64, 64, 8), geometry.locations(64, 64, 16)])
        at = np.array([[image, k] for k in range(len(all_points))])
        points, before, after = polygons_of(model, outputs, at)
        ways = geometry.ray_directions(12)
        coarse, fine = ((points[:, None] + each[..., None] * ways).clip(0, 64) / 64 for each in (before, after))
        for row in range(count):  # its location is that whose polygon it was before
            where = np.abs(coarse - plain["detection_polygons"][image, row]).max((1, 2)).argmin()
            polygon = found["detection_polygons"][image, row].numpy()
            np.testing.assert_allclose(polygon, fine[where], atol=1e-4)
            box = [*polygon.min(0)[::-1], *polygon.max(0)[::-1]]
            np.testing.assert_allclose(found["detection_boxes"][image, row], box, atol=1e-5)
            moved, checked = max(moved, np.abs(polygon - coarse[where]).max()), checked + 1
    assert checked >= 10 and moved > 0.02


def test_it_learns_corners_that_the_rays_do_not_have():
    """A few steps of one bright square, the network frozen: what is learned is the refiner's."""
    model = build(configs.load("shapes", [*SETTINGS, "model.rays=36", "loss.mask_weight=1", "targets.ranges=[64]"]), 1)
    images = np.full((2, 64, 64, 3), 60, np.uint8)
    images[0, 16:44, 20:52], images[1, 12:50, 18:44] = 220, 220
    boxes = np.float32([[[20, 16, 52, 44]], [[18, 12, 44, 50]]])
    x1, y1, x2, y2 = boxes[:, 0].T
    corners = np.stack([x1, y1, x2, y1, x2, y1, x2, y2, x2, y2, x1, y2, x1, y2, x1, y1], 1).reshape(2, 1, 4, 4)
    instances = {
        "boxes": boxes,
        "centers": (boxes[..., :2] + boxes[..., 2:]) / 2,
        "classes": np.zeros((2, 1), np.int32),
        "edges": corners,
        "window": np.full((2, 2), 64, np.float32),
        "ignore": np.zeros((2, 80), bool),
    }
    instances = {name: tf.constant(value) for name, value in instances.items()}
    model.head.rays.conv.kernel.assign(tf.zeros_like(model.head.rays.conv.kernel))  # circles of 14 pixels
    model.head.rays.conv.bias.assign(tf.fill([36], float(np.log(14.0))))
    prepared, optimizer = step.prepare(model, images, instances), tf_keras.optimizers.Adam(0.02)
    features = model.backbone(model._normalize(tf.cast(images, tf.float32)))["2"]
    encoded = prepared.targets
    points = tf.gather(terms._locations(model(images)), encoded.positives[:, 1])
    circles, errors = tf.fill(encoded.rays.shape, 14.0), []

    @tf.function
    def learn():
        with tf.GradientTape() as tape:
            refined = model.refiner.refine(model.refiner(features), encoded.positives[:, 0], points, circles)
            loss = tf.reduce_mean(losses.polar_iou_loss(refined, encoded.rays))
        variables = model.refiner.trainable_variables
        optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables, strict=True))
        return tf.reduce_mean(tf.abs(refined - encoded.rays))

    for _ in range(150):
        errors.append(float(learn()))
    assert errors[-1] < 0.25 * errors[0]


@pytest.mark.parametrize("precision", tflite.PRECISIONS)
def test_a_file_refines_as_keras_does(precision, tmp_path):
    model = randomized("postprocess.max_detections=8", "data.batch=1")
    images, _ = batch(model.config)
    images = images[:1].numpy()
    path = tflite.export_tflite(model, tmp_path / "a.tflite", precision, images=lambda: [images[0]] * 2)
    found = Interpreter(model_path=str(path)).get_signature_runner()(images=images)
    expected = model.detect(images)
    if precision == "fp32":
        np.testing.assert_allclose(found["detection_polygons"], expected["detection_polygons"], atol=1e-5)
    else:  # another location may win; polygons without the refiner are farther
        model.refiner = None
        plain = model.detect(images)

        def distance(theirs):
            each = np.abs(found["detection_polygons"][0][:, None] - theirs["detection_polygons"][0].numpy()[None])
            return np.median(each.mean((2, 3)).min(1))

        assert distance(expected) < 0.5 * distance(plain)


def test_what_does_not_go_with_it_is_refused(tmp_path):
    told = r"model\.refine_channels does not go with model\.head\.box, nor with model\.rays: 4; --set model\.refine_channels=0"
    for setting in ("model.head.box=true", "model.rays=4"):
        with pytest.raises(InputError, match=told):
            configs.load("shapes", ["model.refine_channels=8", setting])
    with pytest.raises(InputError, match=r"--raw: .*model\.refine_channels"):
        tflite.check_raw(PolarMask(configs.load("shapes", SETTINGS), 2))


def test_a_backbone_of_ones_own_is_looked_up_at_its_finest_level():
    images = tf_keras.Input((64, 64, 3))
    c3 = tf_keras.layers.Conv2D(5, 8, 8)(images)
    c4 = tf_keras.layers.Conv2D(6, 2, 2)(c3)
    model = PolarMask(configs.load("shapes", SETTINGS), 2, backbone=tf_keras.Model(images, {3: c3, 4: c4}))
    assert model.refiner.stride == 8
    assert model(tf.zeros([1, 64, 64, 3]))["3"]["contour_features"].shape == (1, 8, 8, FEATURES)


def test_a_checkpoint_holds_it(tmp_path):
    """It did not: what --start and a training that was interrupted went on from had the weights of the beginning."""
    model = randomized("train.ema=0", "model.backbone.norm=group")
    runs.write_run(tmp_path, model.config, {"classes": model.classes, "name": "some", "num_images": 0})
    for weights_only in (True, False):
        runs.save(model, tmp_path, 1, weights_only=weights_only)
        again = build(model.config, 3)
        assert runs.restore(again, tmp_path, training=not weights_only)
        saved = {id(variable) for variable in runs.named_weights(again).values()}
        assert {id(variable) for variable in again.trainable_variables} <= saved  # whatever parts a model gets
        for name, variable in runs.named_weights(model).items():
            np.testing.assert_array_equal(runs.named_weights(again)[name], variable, err_msg=name)


def test_a_start_says_that_the_refiner_begins_anew(tmp_path, capsys):
    plain = PolarMask(configs.load("shapes", training.TINY), 3)
    plain.save(tmp_path / "plain.keras")
    model, other = randomized(), PolarMask(configs.load("shapes", SETTINGS), 3)
    start.start_from(other, tmp_path / "plain.keras")
    assert re.search(r"anew: refiner/.*conv1", capsys.readouterr().out)
    model.save(tmp_path / "refined.keras")
    start.start_from(other, tmp_path / "refined.keras")
    assert "anew" not in capsys.readouterr().out
    for mine, theirs in zip(other.refiner.variables, model.refiner.variables, strict=True):
        np.testing.assert_array_equal(mine, theirs)
