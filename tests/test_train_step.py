"""The training step: in parts, by XLA, padded, in half precision, and what it does with every kind of batch."""

import dataclasses
import functools
import os
from types import SimpleNamespace

# Half the time to compile, the same operations. Read when a process compiles for the first time.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true")

import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from benchmarks.growth import synthetic_batch

from helpers import training
from polarmask_tf import config as configs
from polarmask_tf.modeling import step as steps
from polarmask_tf.ops import targets
from polarmask_tf.training.train import build
from polarmask_tf.weights import runs

CLASSES = 4
BASE = (
    *training.TINY,
    "model.backbone.width=4",
    "model.backbone.norm=group",
    "train.optimizer=sgd",
    "train.learning_rate=0.01",
    "train.clip_norm=0",
    "train.weight_decay=0",
    "train.momentum=0",
    "train.warmup_steps=0",
)
BRANCHES = {
    "plain": ("loss.mask_weight=0",),
    "four rays": ("loss.mask_weight=0", "model.rays=4"),
    "released": ("loss.mask_weight=0", "conventions=released", "model.head.box=true"),
    "iou": (*training.QUALITY, "targets.match=static", "model.head.box=true"),
    "cost": training.QUALITY,
    "refined": (*training.QUALITY, "targets.match=static", "model.refine_channels=6"),
    "cost of boxes": (*training.QUALITY, "model.rays=4"),
}


def make(*settings):
    return build(configs.load("shapes", [*BASE, *settings]), CLASSES)


kept = functools.cache(make)  # for tests that leave the weights alone: to build a model takes longer than a step


def changed(model, **train):
    """The same model with other settings of train."""
    model.config = dataclasses.replace(model.config, train=dataclasses.replace(model.config.train, **train))
    return model


@functools.cache
def batch(size=(64, 64), instances=5):
    """Four images: one with all of its instances, one with a crowd region, one with a single instance, one with none."""
    config = configs.load("shapes", [*BASE, f"data.size={list(size)}"])
    images, values = synthetic_batch(config, instances, edges=16)
    values["classes"] %= CLASSES
    values["classes"][2, 1:] = values["classes"][3] = -1
    values["ignore"][1, ::7] = True
    return tf.constant(images), {name: tf.constant(value) for name, value in values.items()}


def without_instances(images, instances):
    return images, {**instances, "classes": tf.fill(instances["classes"].shape, -1)}


def whole_batch(model, images, instances):
    """Losses by name, and gradients, from one tape over one pass of all images through the network."""
    with tf.GradientTape() as tape:
        loss = model.compute_loss(images, instances, model(images, training=True))
    gradients = tape.gradient(loss, model.trainable_variables, unconnected_gradients="zero")
    values = {name: float(value) for name, value in model.get_metrics_result().items()}
    model.reset_metrics()
    return values, [gradient.numpy() for gradient in gradients]


def stepped(model, images, instances, xla=False, **train):
    """Losses by name, and gradients that the optimizer got (and did not apply), from train_step."""
    given, config = [], model.config
    changed(model, **train)
    before, model.xla = model.xla, xla or model.xla
    apply, model.optimizer.apply_gradients = model.optimizer.apply_gradients, lambda pairs: given.extend(pairs)
    try:
        values = {name: float(value) for name, value in model.train_step((images, instances)).items()}
    finally:
        model.optimizer.apply_gradients, model.config, model.xla = apply, config, before
    model.reset_metrics()
    assert [v.name for _, v in given] == [v.name for v in model.trainable_variables]
    return values, [gradient.numpy() for gradient, _ in given]


def assert_same(found, expected, tolerance):
    assert found[0] == pytest.approx(expected[0], rel=tolerance, abs=1e-7)
    largest = max(np.linalg.norm(gradient) for gradient in expected[1])
    for a, b in zip(found[1], expected[1], strict=True):
        assert a.dtype == np.float32 and np.isfinite(a).all()
        # A tensor whose gradient cancels to nothing beside all the others' has no digits of its own.
        assert np.linalg.norm(a - b) <= tolerance * max(np.linalg.norm(b), 1e-3 * largest)


# ---- parts


@pytest.mark.parametrize("branch", BRANCHES)
def test_the_parts_of_a_step_add_up_to_the_whole_batch(branch):
    model = kept(*BRANCHES[branch])
    expected = whole_batch(model, *batch())
    assert expected[0]["ray"] > 0 and ("box" in expected[0]) == (branch in ("released", "iou"))
    assert ("mask" in expected[0]) == (branch in ("iou", "cost", "cost of boxes", "refined"))
    assert_same(stepped(model, *batch()), expected, 1e-6)
    for parts in (2, 4) if branch == "plain" else (4,):  # of four, one has no instance at all
        assert_same(stepped(model, *batch(), accumulate=parts), expected, 1e-5)


def test_a_batch_without_instances_trains_the_classes_alone():
    nothing = without_instances(*batch())
    expected = whole_batch(kept(), *nothing)
    assert expected[0]["class"] > 0 and expected[0]["ray"] == expected[0]["centerness"] == 0
    assert_same(stepped(kept(), *nothing, accumulate=2), expected, 1e-5)


def test_batchnorm_sees_the_parts_one_after_the_other():
    model = changed(make("model.backbone.norm=batch"), accumulate=4)
    mean = next(v for v in model.backbone.non_trainable_variables if "moving_mean" in v.name)
    start, (images, _) = mean.numpy(), batch()
    for index in range(4):
        model(images[index : index + 1], training=True)
    expected = mean.numpy()
    mean.assign(start)
    model.train_step(batch())
    np.testing.assert_allclose(mean, expected, rtol=1e-4, atol=1e-6)
    assert np.abs(expected - start).max() > 1e-3


def test_targets_of_some_images_are_those_of_a_batch_of_them():
    model, (images, instances) = kept(), batch()
    whole = steps.prepare(model, images, instances).targets
    for first, count in ((0, 1), (1, 2), (2, 2), (3, 1)):
        some = {name: value[first : first + count] for name, value in instances.items()}
        expected = steps.prepare(model, images[first : first + count], some).targets
        selected = targets.select_images(whole, first, count)
        selected = selected._replace(instance=selected.instance - first * instances["classes"].shape[1])
        for a, b in zip(selected, expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6)


# ---- padding


def test_padded_rows_change_nothing():
    for branch in ("plain", "released", "iou", "cost", "refined"):
        model = kept(*BRANCHES[branch])
        images, instances = batch()
        prepared = steps.prepare(model, images, instances)
        real = prepared.targets
        values, gradients = [], []
        for rows in (None, len(real.positives), len(real.positives) + 1, steps.most_positives(model, 4, instances)):
            more = targets.pad_positives(real, rows)
            assert (
                len(more.positives) == len(more.rays) == len(more.centerness) == len(more.ltrb) == (rows or len(real.positives))
            )
            got, values_of = steps.part_gradients(model, images, steps.Prepared(more, prepared.normalizers))
            values.append([float(v) for v in values_of])
            gradients.append([g.numpy() for g in got])
        for v, g in zip(values[1:], gradients[1:], strict=True):
            assert v == pytest.approx(values[0], rel=1e-5)
            assert_same(({}, g), ({}, gradients[0]), 1e-5)


@pytest.mark.parametrize("radius", [0.4, 1.0, 1.2, 1.5, 2.5])
def test_no_instance_has_more_positives_than_the_padding_holds(radius):
    """Its center on every kind of place between locations; once all of its positives on P3, and once on P4."""
    counts = []
    for center in (32.0, 36.0, 32.001, 33.3, 35.999):
        owners = [
            targets.assign(
                np.float32([[[0, 0, 64, 64]]]),
                np.float32([[[center, center]]]),
                np.array([[True]]),
                levels=(3, 4),
                size=(64, 64),
                radius=radius,
                ranges=ranges,
            )
            for ranges in ([1e7], [0.0])
        ]
        counts.append(sum(np.count_nonzero(owner >= 0) for owner in owners))
    config = kept().config
    other = dataclasses.replace(config, targets=dataclasses.replace(config.targets, radius=radius))
    model = SimpleNamespace(config=other, ray_units={"3": 8.0, "4": 16.0})
    most = steps.most_positives(model, 2, {"classes": np.zeros((2, 7))})
    assert max(counts) * 2 * 7 <= most
    assert radius != 1.5 or max(counts) * 2 * 7 == most


# ---- XLA


@pytest.mark.parametrize("branch", ["released", "iou", "cost", "refined"])
def test_xla_computes_the_same_step(branch):
    model = kept(*BRANCHES[branch], "model.backbone.freeze_at=5")  # its gradient: below
    expected = stepped(model, *batch())
    assert_same(stepped(model, *batch(), xla=True), expected, 1e-4)


@pytest.mark.slow
def test_fit_by_xla_in_parts_on_several_sizes():
    """In a graph as `fit` runs it, one for all of data.sizes: the weights of whole batches without XLA, step by step."""
    recipe = ("train.learning_rate=0.05", "train.momentum=0.9", "train.weight_decay=0.01", "train.clip_norm=1")
    settings = ("data.sizes=[[64,64],[32,64]]", *recipe)
    nothing = without_instances(*batch((32, 64)))  # another number of positives is the same program
    batches = [batch((64, 64)), batch((32, 64)), nothing, batch((64, 64))]
    spec = tf.nest.map_structure(lambda t: tf.TensorSpec([4, *[None] * (t.shape.rank - 1)], t.dtype), batches[0])
    for name in ("boxes", "centers", "classes", "edges"):  # as the pipeline gives them: their number is known
        spec[1][name] = tf.TensorSpec(batches[0][1][name].shape, spec[1][name].dtype)
    plain, parts = make(*settings), changed(make("train.jit_compile=true", *settings), accumulate=2)
    before = [v.numpy() for v in plain.trainable_variables]
    step = parts.make_train_function()
    iterator = iter(tf.data.Dataset.from_generator(lambda: iter(batches), output_signature=spec))
    for each in batches:
        expected = {name: float(value) for name, value in plain.train_step(each).items()}
        found = {name: float(value) for name, value in step(iterator).items()}
        assert found == pytest.approx(expected, rel=1e-4)  # means since the first step
    assert step.experimental_get_tracing_count() == 1
    moved = []
    for a, b, start in zip(parts.trainable_variables, plain.trainable_variables, before, strict=True):
        assert np.linalg.norm(a - b) <= 1e-4 * max(np.linalg.norm(b), 1e-3), a.name
        moved.append(np.linalg.norm(b - start) / max(np.linalg.norm(start), 1e-3))
    assert np.median(moved) > 1e-3


# ---- precision


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
@pytest.mark.parametrize("branch", ["released", "iou", "refined"])
def test_half_precision_computes_almost_the_same(precision, branch):
    expected = stepped(kept(*BRANCHES[branch]), *batch())
    model = make(*BRANCHES[branch], f"train.precision={precision}")
    found = stepped(model, *batch())
    assert found[0] == pytest.approx(expected[0], rel=0.01)
    flat = [np.concatenate([g.ravel() for g in gradients]) for _, gradients in (found, expected)]
    assert flat[0] @ flat[1] > 0.99 * np.linalg.norm(flat[0]) * np.linalg.norm(flat[1])  # not scaled, not zeros
    assert 0.95 < np.linalg.norm(flat[0]) / np.linalg.norm(flat[1]) < 1.05
    assert model.compute_dtype == precision and tf_keras.mixed_precision.global_policy().name == "float32"
    for _ in range(2):
        model.train_step(batch())
    assert all(
        v.dtype == tf.float32 and np.isfinite(v).all()
        for v in [*model.backbone.variables, *model.decoder.variables, *model.head.variables]
    )
    outputs = tf.nest.flatten(model(batch()[0]))
    assert all(o.dtype == tf.float32 and np.isfinite(o).all() for o in outputs)


def test_a_step_that_overflows_float16_is_skipped_and_the_scale_halved(tmp_path):
    settings = ("train.precision=float16", "train.ema=0.9")
    model = make(*settings)
    optimizer = model.optimizer
    optimizer._loss_scale._current_loss_scale.assign(2.0**100)  # nothing of the gradient is left at this scale
    state = [v for v in [*model.trainable_variables, *optimizer.inner_optimizer.variables] if "iteration" not in v.name]
    start = [v.numpy() for v in state]
    for skipped, parts in ((1, 1), (2, 2)):
        values = changed(model, accumulate=parts).train_step(batch())
        assert np.isfinite([float(value) for value in values.values()]).all()
        assert float(optimizer.loss_scale) == 2.0 ** (100 - skipped)
        assert int(optimizer.iterations) == skipped  # the learning rate goes by steps, taken or not
        for variable, before in zip(state, start, strict=True):
            np.testing.assert_array_equal(variable, before, err_msg=variable.name)
    optimizer._loss_scale._current_loss_scale.assign(2.0**15)  # where it would have come to, half by half
    model.train_step(batch())
    assert float(optimizer.loss_scale) == 2.0**15
    moved = [(v.numpy() != before).any() for v, before in zip(model.trainable_variables, start, strict=False)]
    assert np.mean(moved) > 0.9 and all(np.isfinite(v).all() for v in state)

    optimizer._loss_scale._current_loss_scale.assign(2.0**7)
    runs.save(model, tmp_path, 3)
    other = make(*settings)
    runs.restore(other, tmp_path, training=True)  # the scale goes on where it was, and so does all else
    assert float(other.optimizer.loss_scale) == 2.0**7 and int(other.optimizer.iterations) == 3
    mine, theirs = ([*m.trainable_variables, *m.optimizer.inner_optimizer.variables] for m in (model, other))
    for a, b in zip(mine, theirs, strict=True):
        np.testing.assert_array_equal(a, b, err_msg=a.name)
