"""The paper's recipe against PyTorch's SGD with parameter groups, and the schedule against numbers by hand."""

import dataclasses
import json
import math

import numpy as np
import pytest
import tensorflow as tf
import tf_keras

from polarmask_tf import config as configs
from polarmask_tf.config import Config, TrainConfig
from polarmask_tf.training import optimizers

NAMES = ("conv/kernel", "conv/bias", "norm/gamma", "norm/beta", "head/scale3")


def released_recipe(**changes):
    values = {
        "optimizer": "sgd",
        "schedule": "step",
        "decay": "l2",
        "bias_lr_multiplier": 2.0,
        "learning_rate": 0.01,
        "warmup_steps": 4,
        "lr_boundaries": (8, 12),
        "weight_decay": 1e-2,
        "clip_norm": 3.0,
        "base_batch_size": 16,
    }
    return dataclasses.replace(Config(), train=TrainConfig(**{**values, **changes}))


def steps_of(optimizer, values, gradients):
    variables = [tf.Variable(value, name=name) for name, value in zip(NAMES, values, strict=True)]
    for step in gradients:
        optimizer.apply_gradients(zip(map(tf.constant, step), variables, strict=True))
    return [variable.numpy() for variable in variables]


@pytest.mark.parametrize("momentum", [0.9, 0.0])
def test_paper_sgd_equals_torch(momentum):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    values = [rng.normal(size=5).astype(np.float32) for _ in NAMES]
    gradients = [[rng.normal(0, 2, 5).astype(np.float32) for _ in NAMES] for _ in range(16)]
    config = released_recipe(momentum=momentum)
    ours = steps_of(optimizers.make(config), values, gradients)

    parameters = [torch.nn.Parameter(torch.tensor(value)) for value in values]
    groups = [{"params": [p], **({"weight_decay": 0.0} if i == 1 else {})} for i, p in enumerate(parameters)]
    theirs = torch.optim.SGD(groups, lr=0.01, momentum=momentum, weight_decay=1e-2)
    for step, gradient in enumerate(gradients):
        rate = 0.01 * min(1.0, 1 / 3 + 2 / 3 * step / 4) * (0.1 if step >= 8 else 1) * (0.1 if step >= 12 else 1)
        for i, (parameter, group, value) in enumerate(zip(parameters, theirs.param_groups, gradient, strict=True)):
            group["lr"] = rate * (2 if i == 1 else 1)
            parameter.grad = torch.tensor(value)
        torch.nn.utils.clip_grad_norm_(parameters, 3.0)
        theirs.step()
    for mine, parameter in zip(ours, parameters, strict=True):
        np.testing.assert_allclose(mine, parameter.detach().numpy(), rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("batch", "base_batch_size", "expected"), [(16, 16, 0.01), (4, 16, 0.0025), (64, 16, 0.04), (4, 0, 0.01)]
)
def test_the_rate_is_scaled_to_the_batch(batch, base_batch_size, expected):
    config = released_recipe(base_batch_size=base_batch_size, warmup_steps=0)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, batch=batch))
    assert float(optimizers.make(config).learning_rate) == pytest.approx(expected)


def test_decoupled_decay_leaves_all_but_kernels_alone():
    config = dataclasses.replace(Config(), train=TrainConfig(optimizer="sgd", weight_decay=0.1, momentum=0.0))
    values = [np.ones(3, np.float32) for _ in NAMES]
    after = steps_of(optimizers.make(config), values, [[np.zeros(3, np.float32) for _ in NAMES]])
    assert (after[0] < 1).all() and all((value == 1).all() for value in after[1:])


@pytest.mark.parametrize("fraction, warm", [(0.02, 50), (0.5, 1), (0.0, 0)])
def test_the_cosine_schedule_by_hand(fraction, warm):
    """A straight line from a third of the rate; then from the rate down half a cosine to a fraction of it at the last step."""
    rate = optimizers.schedule(TrainConfig(learning_rate=0.3, warmup_steps=warm, steps=450, final_lr_fraction=fraction))
    for step in (0, 1, 7, 49, 50, 51, 200, 250, 449, 450, 600):
        if step < warm:
            expected = 0.1 + 0.2 * step / warm
        else:
            way = min((step - warm) / (450 - warm), 1)
            expected = 0.3 * (fraction + (1 - fraction) * (1 + math.cos(math.pi * way)) / 2)
        assert float(rate(tf.constant(step))) == pytest.approx(expected, rel=1e-5, abs=1e-8), step


@pytest.mark.parametrize("warm", [0, 4])
def test_the_step_schedule_by_hand(warm):
    rate = optimizers.schedule(TrainConfig(learning_rate=0.9, warmup_steps=warm, schedule="step", lr_boundaries=(3, 6, 8)))
    for step in range(12):
        expected = 0.9 * 0.1 ** sum(step >= boundary for boundary in (3, 6, 8))
        if step < warm:
            expected *= 1 / 3 + 2 / 3 * step / warm
        assert float(rate(tf.constant(step))) == pytest.approx(expected, rel=1e-5), step


def test_the_shipped_recipes_follow_the_paper():
    train = configs.load("paper_1x").train
    rate = optimizers.schedule(train)
    assert [round(float(rate(step)), 7) for step in (0, 250, 500, 59_999, 60_000, 79_999, 80_000)] == [
        0.0033333,
        0.0066667,
        0.01,
        0.01,
        0.001,
        0.001,
        0.0001,
    ]
    assert (train.steps, train.momentum, train.weight_decay, train.clip_norm) == (90_000, 0.9, 1e-4, 35.0)
    twice = configs.load("paper_2x").train
    assert (twice.steps, twice.lr_boundaries) == (180_000, (120_000, 160_000))


@pytest.mark.parametrize("ema", [0.5, 0.999])
def test_averages_are_of_use_from_the_first_steps_on(ema):
    optimizer = optimizers.make(released_recipe(ema=ema, momentum=0.0))
    rng = np.random.default_rng(0)
    variable = tf.Variable(rng.normal(size=5).astype(np.float32), name="kernel")
    optimizer.build([variable])
    update = tf.function(lambda gradient: optimizer.apply_gradients([(gradient, variable)]))
    average = variable.numpy()
    for step in range(40):
        update(tf.constant(rng.normal(0, 30, 5).astype(np.float32)))
        momentum = min(ema, (1 + step) / (10 + step))  # by the number of finished steps
        average = momentum * average + (1 - momentum) * variable.numpy()
        np.testing.assert_allclose(optimizer._model_variables_moving_average[0], average, rtol=1e-4, atol=1e-6)
    assert optimizer.get_config()["ema_momentum"] == ema


RECIPES = {
    "paper": {},
    "paper, averaged": {"ema": 0.9, "momentum": 0.0, "clip_norm": 0.0},
    "sgd": {"decay": "decoupled", "bias_lr_multiplier": 1.0},
    "paper, backbone slower": {"backbone_lr_multiplier": 0.1, "freeze_backbone_steps": 3},
    "adamw, backbone slower": {
        "optimizer": "adamw",
        "decay": "decoupled",
        "bias_lr_multiplier": 1.0,
        "backbone_lr_multiplier": 0.5,
    },
    "adamw": {"decay": "decoupled", "bias_lr_multiplier": 1.0, "optimizer": "adamw", "schedule": "cosine", "ema": 0.9},
}


@pytest.mark.parametrize("name", RECIPES)
def test_keras_saves_and_loads_every_recipe(name):
    """The copy, made from its JSON, takes the same steps: rates, decay and what is left out of it, momentum, averages."""
    made = optimizers.make(released_recipe(**RECIPES[name]))
    text = json.dumps(tf_keras.optimizers.serialize(made))
    copy = tf_keras.optimizers.deserialize(json.loads(text))
    assert type(copy) is type(made) and json.dumps(tf_keras.optimizers.serialize(copy)) == text
    rng = np.random.default_rng(0)
    values = [rng.normal(size=5).astype(np.float32) for _ in NAMES]
    gradients = [[rng.normal(0, 2, 5).astype(np.float32) for _ in NAMES] for _ in range(14)]
    ours, theirs = (steps_of(optimizer, values, gradients) for optimizer in (made, copy))
    for mine, other, start in zip(ours, theirs, values, strict=True):
        np.testing.assert_array_equal(mine, other)
        assert np.abs(mine - start).max() > 1e-4
    for mine, other in zip(made.variables, copy.variables, strict=True):
        np.testing.assert_array_equal(mine, other)
