"""Muon: kernels move along orthogonal matrices, all else as AdamW's."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import training
from helpers.muon import data, model_of
from polarmask_tf.config import Config, TrainConfig
from polarmask_tf.errors import InputError
from polarmask_tf.training import optimizers

RATE, DECAY = 0.01, 0.05
SHAPES = {
    "tall/kernel": (3, 3, 16, 20),
    "wide/kernel": (1, 1, 16, 40),
    "depthwise/kernel": (3, 3, 32, 1),
    "few rows/kernel": (3, 3, 1, 32),
    "norm/gamma": (32,),
    "rays/kernel": (3, 3, 16, 36),
}
MATRICES = ("tall/kernel", "wide/kernel")


def made(**options):
    values = {"optimizer": "muon", "schedule": "step", "warmup_steps": 0, "learning_rate": RATE, "weight_decay": DECAY}
    return optimizers.make(dataclasses.replace(Config(), train=TrainConfig(**{**values, "clip_norm": 0.0, **options})))


def drawn(steps):
    rng = np.random.default_rng(0)
    values = {name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}
    gradients = [{name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()} for _ in range(steps)]
    return values, gradients


def after(optimizer, values, gradients, backbone=()):
    variables = {name: tf.Variable(value, name=name) for name, value in values.items()}
    optimizer.build(list(variables.values()))
    optimizer.set_backbone([variables[name] for name in backbone])
    if hasattr(optimizer, "set_predictions"):
        optimizer.set_predictions([variables["rays/kernel"]])
    step = tf.function(lambda all_: optimizer.apply_gradients([(all_[name], variables[name]) for name in variables]))
    for each in gradients:
        step({name: tf.constant(value) for name, value in each.items()})
    return {name: variable.numpy() for name, variable in variables.items()}


def newton_schulz(matrix):
    """As Jordan writes it: on the matrix itself, in float64."""
    x = matrix.astype(np.float64) / np.linalg.norm(matrix)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x


@settings(max_examples=25, deadline=None)
@given(st.integers(16, 90), st.integers(16, 90), st.integers(0, 2**32 - 1), st.floats(0, 2), st.floats(-30, 30))
def test_singular_vectors_stay_and_singular_values_become_about_one(rows, columns, seed, spread, size):
    rng = np.random.default_rng(seed)
    u, _, v = np.linalg.svd(rng.normal(size=(rows, columns)), full_matrices=False)
    matrix = 10**size * (u * 10 ** -rng.uniform(0, spread, u.shape[1])) @ v
    found = optimizers.orthogonalize(tf.constant(matrix, tf.float32)).numpy()
    np.testing.assert_allclose(found, newton_schulz(matrix), atol=2e-3)
    inside = u.T @ found @ v.T  # what is left of the singular vectors: a diagonal
    assert np.abs(inside - np.diag(np.diag(inside))).max() < 5e-3
    # The least is 1 / 100 of the largest, and so at least 1e-3 of the norm.
    assert np.diag(inside).min() > 0.3 and np.diag(inside).max() < 1.25


def test_a_gradient_of_nothing_moves_nothing():
    assert (optimizers.orthogonalize(tf.zeros([20, 30])).numpy() == 0).all()


@pytest.mark.parametrize("momentum", [-0.1, 1, 1.5, "a", None])
def test_a_momentum_that_cannot_be_is_refused(momentum):
    with pytest.raises(InputError, match=r"Muon: momentum is .* from 0 up to 1"):
        optimizers.Muon(0.01, momentum=momentum)
    if isinstance(momentum, (int, float)):
        with pytest.raises(InputError, match=r"train\.momentum is .* from 0 up to 1"):
            training.load("train.optimizer=muon", f"train.momentum={momentum}")


@pytest.mark.parametrize("multiplier", [1.0, 0.1])
def test_steps_of_kernels_by_hand(multiplier):
    """Nesterov's momentum of 0.8, the update's size, decoupled decay, all at the backbone's part of the rate."""
    values, gradients = drawn(3)
    found = after(made(momentum=0.8, backbone_lr_multiplier=multiplier), values, gradients, backbone=MATRICES)
    for name in MATRICES:
        weights, velocity, rate = values[name].astype(np.float64), 0.0, RATE * multiplier
        for each in gradients:
            velocity = 0.8 * velocity + each[name]
            ahead = (each[name] + 0.8 * velocity).reshape(-1, SHAPES[name][-1])
            update = newton_schulz(ahead) * 0.8 * np.sqrt(max(ahead.shape))
            assert 0.5 < np.sqrt(np.mean(update**2)) < 1  # near MUON_SCALE
            weights = weights * (1 - rate * DECAY) - rate * update.reshape(SHAPES[name])
        np.testing.assert_allclose(found[name], weights, atol=2e-5)
        assert np.abs(found[name] - values[name]).max() > 1e-3


def test_all_else_is_adamws():
    values, gradients = drawn(4)
    muon, adamw = after(made(), values, gradients), after(made(optimizer="adamw"), values, gradients)
    for name in SHAPES:
        assert np.array_equal(muon[name], adamw[name]) == (name not in MATRICES), name


def test_the_size_of_a_gradient_does_not_matter_to_kernels():
    values, gradients = drawn(3)
    larger = [{name: 1000 * value for name, value in each.items()} for each in gradients]
    once, again = after(made(), values, gradients), after(made(), values, larger)
    for name in MATRICES:
        np.testing.assert_allclose(once[name], again[name], atol=1e-5)


# ---- in a model


def test_fit_tells_the_optimizer_which_layers_are_the_last():
    model = model_of()
    by_key = {model.optimizer._var_key(v): v.name for v in model.trainable_variables}
    last = {by_key[key] for key in model.optimizer._predictions}
    expected = {v.name for v in model.trainable_variables if {"classes", "centerness", "rays"} & set(v.name.split("/"))}
    assert last == expected and len(last) == 6


@pytest.mark.slow
def test_fit_learns_in_half_precision():
    model = model_of("mixed_float16")
    losses = model.fit(data(30), verbose=0, steps_per_epoch=1, epochs=30).history["loss"]
    assert np.isfinite(losses).all() and losses[-1] < 0.7 * losses[0]


@pytest.mark.slow
def test_a_saved_model_goes_on_as_if_it_had_not_stopped(tmp_path):
    model = model_of()
    model.fit(data(), verbose=0)
    model.save(tmp_path / "m.keras")
    copy = tf_keras.models.load_model(tmp_path / "m.keras")
    text = json.dumps(tf_keras.optimizers.serialize(model.optimizer))
    assert type(copy.optimizer) is optimizers.Muon and json.dumps(tf_keras.optimizers.serialize(copy.optimizer)) == text
    for each in (model, copy):
        each.fit(data(), verbose=0)
    for mine, other in zip(model.trainable_variables, copy.trainable_variables, strict=True):
        np.testing.assert_allclose(mine, other, atol=1e-6)


TWO_REPLICAS = """
import sys
import numpy as np, tensorflow as tf
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
from helpers import muon
with tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]).scope():
    model = muon.model_of()
model.fit(muon.data(), verbose=0)
for variable in model.trainable_variables:
    first, second = (value.numpy() for value in variable.values)
    np.testing.assert_array_equal(first, second)
np.savez(sys.argv[1], *[v.numpy() for v in model.trainable_variables])
"""


@pytest.mark.slow
def test_two_replicas_take_the_steps_of_one_device(tmp_path):
    here = Path(__file__).resolve().parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(here), str(here.parent)]), "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([sys.executable, "-c", TWO_REPLICAS, tmp_path / "two.npz"], env=environment, check=True, timeout=900)
    model = model_of()
    start = [variable.numpy() for variable in model.trainable_variables]
    model.fit(data(), verbose=0)
    two, kernels = np.load(tmp_path / "two.npz"), 0
    for value, variable, found in zip(start, model.trainable_variables, two.values(), strict=True):
        if model.optimizer._is_matrix(variable):  # AdamW's first steps are of the size of the rate however small a gradient is
            moved = np.abs(variable.numpy() - value).max()
            np.testing.assert_allclose(found, variable, atol=0.05 * moved, err_msg=variable.name)
            kernels += moved > 1e-3
    assert kernels > 5


def test_configs_choose_it():
    config = training.load("train.optimizer=muon", "train.momentum=0.95")
    assert isinstance(optimizers.make(config), optimizers.Muon) and optimizers.make(config).momentum == 0.95
