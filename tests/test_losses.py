"""losses.py against the released implementation's values and gradients, Keras, and sums by hand."""

from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
import tf_keras
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polarmask_tf.ops import geometry, losses
from polarmask_tf.ops.targets import BACKGROUND, IGNORED

GOLDEN = np.load(Path(__file__).parent / "golden" / "losses_unit.npz", allow_pickle=False)


def value_and_gradient(function, x):
    """Value of function(x) and its gradient with respect to x, numpy."""
    x = tf.constant(x)
    with tf.GradientTape() as tape:
        tape.watch(x)
        value = function(x)
    return value.numpy(), tape.gradient(value, x).numpy()


def assert_equals_golden(function, x, name):
    value, gradient = value_and_gradient(function, x)
    golden = GOLDEN[f"{name}_grad"]
    assert value == pytest.approx(float(GOLDEN[name]), rel=1e-5)
    np.testing.assert_allclose(gradient, golden, atol=1e-4 * np.abs(golden).max(), rtol=0)


def test_polar_iou_equals_the_released_one():
    target, weight = GOLDEN["rays_target"], GOLDEN["centerness_target"]
    np.testing.assert_allclose(losses.polar_iou_loss(GOLDEN["rays_pred"], target), GOLDEN["mask_iou_v1_each"], rtol=1e-5)
    assert_equals_golden(
        lambda rays: tf.reduce_sum(losses.polar_iou_loss(rays, target) * weight) / weight.sum(),
        GOLDEN["rays_pred"],
        "mask_iou_v1",
    )


def test_squared_polar_iou_equals_the_released_one():
    target, weight = GOLDEN["rays_target"], GOLDEN["centerness_target"]
    np.testing.assert_allclose(
        losses.polar_iou_squared_loss(GOLDEN["rays_pred"], target), GOLDEN["mask_iou_v3_each"], rtol=1e-5
    )
    assert_equals_golden(
        lambda rays: tf.reduce_sum(losses.polar_iou_squared_loss(rays, target) * weight) / weight.sum(),
        GOLDEN["rays_pred"],
        "mask_iou_v3",
    )


def test_box_iou_equals_the_released_one():
    """Boxes there are corners and end at their last pixel; distances from any one point to the sides say the same."""
    weight = GOLDEN["centerness_target"]

    def sides(corners):
        return tf.concat([200.0 - corners[:, :2], corners[:, 2:] - 200.0], axis=1)

    def loss(corners):
        each = losses.iou_loss(sides(corners), sides(GOLDEN["box_target"]), pixel=1.0)
        return tf.reduce_sum(each * weight) / weight.sum()

    assert_equals_golden(loss, GOLDEN["box_pred"], "box_iou_loss")


def test_box_iou_by_hand():
    # 4 x 6 and 6 x 4 around one point share 4 x 4: 16 / 32. Disjoint boxes: no IoU, no infinity.
    boxes = tf.constant([[2.0, 3, 2, 3], [-5, 1, 6, 1]])
    others = tf.constant([[3.0, 2, 3, 2], [6, 1, -5, 1]])
    np.testing.assert_allclose(losses.iou_loss(boxes, others), [np.log(2), -np.log(1e-6)], rtol=1e-6)


def test_smooth_l1_equals_torch():
    torch = pytest.importorskip("torch")
    rays, target = GOLDEN["rays_pred"], GOLDEN["rays_target"]
    parameter = torch.tensor(rays, requires_grad=True)
    expected = torch.nn.functional.smooth_l1_loss(parameter, torch.tensor(target), reduction="none").mean(dim=1)
    expected.sum().backward()
    value, gradient = value_and_gradient(lambda x: tf.reduce_sum(losses.smooth_l1_loss(x, target)), rays)
    assert value == pytest.approx(expected.sum().item(), rel=1e-5)
    np.testing.assert_allclose(gradient, parameter.grad.numpy(), atol=1e-6)


def test_smooth_l1_by_hand():
    # .5 * .5^2, 3 - .5 and 0, over three rays.
    np.testing.assert_allclose(losses.smooth_l1_loss(tf.constant([[2.5, 7, 1]]), tf.constant([[2.0, 4, 1]])), [2.625 / 3])


def test_centerness_equals_the_released_one():
    target = GOLDEN["centerness_target"]
    assert_equals_golden(
        lambda logits: tf.reduce_mean(losses.centerness_loss(logits, target)), GOLDEN["ctr_logits"], "ctr_loss"
    )


def test_focal_equals_the_released_one():
    labels = GOLDEN["cls_labels"].astype(np.int32) - 1  # there 0 is the background
    assert (labels == BACKGROUND).any()
    count = float(GOLDEN["focal_avg_factor"])
    assert_equals_golden(lambda logits: losses.focal_loss(logits, labels) / count, GOLDEN["cls_logits"], "focal_loss")


@pytest.mark.parametrize(("gamma", "alpha"), [(2.0, 0.25), (1.0, 0.5), (0.5, 0.9), (0.0, 0.25)])
def test_focal_equals_keras(gamma, alpha):
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, (6, 5)).astype(np.float32)
    labels = np.array([0, 4, BACKGROUND, 2, BACKGROUND, 1], np.int32)
    hot = np.eye(6, dtype=np.float32)[labels][:, :5]
    keras = tf_keras.losses.BinaryFocalCrossentropy(
        apply_class_balancing=True, alpha=alpha, gamma=gamma, from_logits=True, reduction="none"
    )
    expected = tf.reduce_sum(keras(hot[..., None], logits[..., None]))
    np.testing.assert_allclose(losses.focal_loss(logits, labels, gamma=gamma, alpha=alpha), expected, rtol=1e-4)


def test_focal_by_hand():
    # One location of class 1: logit 0 is p = 0.5 everywhere, -log p = log 2.
    expected = 0.25 * 0.5**2 * np.log(2) + 2 * 0.75 * 0.5**2 * np.log(2)
    assert losses.focal_loss(tf.zeros([1, 3]), tf.constant([1])).numpy() == pytest.approx(expected, rel=1e-6)


def test_focal_cost_is_the_difference_of_two_losses():
    for logit in (-3.0, 0.0, 2.5):
        as_class, as_background = (losses.focal_loss(tf.constant([[logit]]), tf.constant([label])) for label in (0, -1))
        assert float(losses.focal_cost(tf.constant([logit]))[0]) == pytest.approx(float(as_class - as_background), rel=1e-5)


@pytest.mark.parametrize("gamma", [2.0, 1.0, 0.5])
def test_quality_focal_loss_equals_torch(gamma):
    quality = np.array([0.0, 0.2, 0.5, 0.9, 1.0, 0.5], np.float32)
    logits = np.array([-4.0, 1.0, 0.5, 3.0, -30.0, 0.0], np.float32)  # the last one is right
    leaf = torch.tensor(logits, requires_grad=True)
    entropy = torch.nn.functional.binary_cross_entropy_with_logits(leaf, torch.tensor(quality), reduction="none")
    expected = 0.75 * (torch.tensor(quality) - leaf.sigmoid()).abs() ** gamma * entropy
    expected[:-1].sum().backward()  # torch's gradient of the last is not a number if gamma < 1
    variable = tf.Variable(logits)
    with tf.GradientTape() as tape:
        found = losses.quality_focal_loss(variable, tf.constant(quality), gamma=gamma)
    np.testing.assert_allclose(found[:-1], expected.detach()[:-1], rtol=2e-5)
    gradient = tape.gradient(found, variable).numpy()
    np.testing.assert_allclose(gradient[:-1], leaf.grad[:-1], rtol=1e-4)
    assert abs(gradient[-1]) < 1e-3 and float(found[-1]) < 1e-2


def test_quality_focal_loss_is_background_where_the_quality_is_zero():
    logits = tf.constant([-2.0, 0.0, 3.0])
    background = [float(losses.focal_loss(logits[i : i + 1, tf.newaxis], tf.constant([BACKGROUND]))) for i in range(3)]
    np.testing.assert_allclose(losses.quality_focal_loss(logits, tf.zeros(3)), background, rtol=1e-5)


def test_ignored_locations_neither_count_nor_learn():
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, (2, 4, 3)).astype(np.float32)
    labels = np.array([[0, IGNORED, BACKGROUND, IGNORED], [IGNORED, 2, 1, BACKGROUND]], np.int32)
    value, gradient = value_and_gradient(lambda x: losses.focal_loss(x, labels), logits)
    kept = labels != IGNORED
    assert value == pytest.approx(losses.focal_loss(logits[kept], labels[kept]).numpy(), rel=1e-6)
    assert (gradient[~kept] == 0).all() and (gradient[kept] != 0).all()


def test_polar_iou_by_hand():
    predicted, target = tf.constant([[1.0, 2.0, 3.0, 4.0], [5, 5, 5, 5]]), tf.constant([[2.0, 2.0, 2.0, 2.0], [5, 5, 5, 5]])
    # max: 2 2 3 4 = 11, min: 1 2 2 2 = 7 (equation 7); its negative logarithm (equation 8).
    np.testing.assert_allclose(losses.polar_iou_loss(predicted, target), [np.log(11 / 7), 0], rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(losses.polar_iou_loss(predicted, target), losses.polar_iou_loss(target, predicted))


def test_centerness_by_hand():
    found = losses.centerness_loss(tf.constant([0.0, np.log(3)]), tf.constant([0.3, 1.0]))  # p = 0.5 and 0.75
    np.testing.assert_allclose(found, [np.log(2), -np.log(0.75)], rtol=1e-6)


extreme = st.one_of(st.sampled_from([-1e4, 1e4, 0.0, -1e-30, 1e30, -1e30]), st.floats(-200, 200, width=32))


@settings(max_examples=30, deadline=None)
@given(
    st.lists(extreme, min_size=6, max_size=6),
    st.lists(st.sampled_from([0, 1, BACKGROUND, IGNORED]), min_size=3, max_size=3),
    st.sampled_from([0.0, 0.5, 1.0, 2.0, 5.0]),
)
def test_focal_is_finite_for_extreme_logits(logits, labels, gamma):
    logits = np.float32(logits).reshape(3, 2)
    value, gradient = value_and_gradient(lambda x: losses.focal_loss(x, np.int32(labels), gamma=gamma), logits)
    assert np.isfinite(value) and value >= 0 and np.isfinite(gradient).all()


def test_focal_of_nothing_is_zero():
    for count in (3, 0):
        labels = np.full(count, IGNORED, np.int32)
        logits = np.full((count, 2), 1e4, np.float32)
        value, gradient = value_and_gradient(lambda x, labels=labels: losses.focal_loss(x, labels), logits)
        assert value == 0 and (gradient == 0).all()


@settings(max_examples=30, deadline=None)
@given(
    st.lists(extreme, min_size=8, max_size=8),
    st.lists(st.sampled_from([geometry.EPSILON, 1.0, 30.0, 2e4]), min_size=8, max_size=8),
)
def test_rays_and_centerness_are_finite_for_extreme_logits_and_zero_rays(logits, target):
    """From the logits on, as the model does it: the ray lengths of a location may all be epsilon."""
    logits, target = np.float32(logits).reshape(2, 4), np.float32(target).reshape(2, 4)
    value, gradient = value_and_gradient(
        lambda x: tf.reduce_sum(losses.polar_iou_loss(geometry.rays_from_logits(x, 8.0), target)), logits
    )
    assert np.isfinite(value) and value >= -1e-5 and np.isfinite(gradient).all()
    value, gradient = value_and_gradient(
        lambda x: tf.reduce_sum(losses.centerness_loss(x, geometry.polar_centerness(target))), logits[:, 0]
    )
    assert np.isfinite(value) and value >= 0 and np.isfinite(gradient).all()


def test_no_positives_sum_to_zero():
    none = np.zeros((0, 36), np.float32)
    value, gradient = value_and_gradient(lambda x: tf.reduce_sum(losses.polar_iou_loss(x, none)), none)
    assert value == 0 and gradient.shape == (0, 36)
    value, _ = value_and_gradient(lambda x: tf.reduce_sum(losses.centerness_loss(x, none[:, 0])), none[:, 0])
    assert value == 0


def test_losses_are_float32_whatever_the_logits():
    half = tf.constant([[300.0, -300.0]], tf.float16)
    assert losses.focal_loss(half, tf.constant([0])).dtype == tf.float32
    assert losses.centerness_loss(half[0], tf.constant([0.5, 0.5])).dtype == tf.float32
