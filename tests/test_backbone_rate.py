"""train.backbone_lr_multiplier and train.freeze_backbone_steps: in the optimizers, in a model's fit, and in a training that
goes on."""

import dataclasses

import numpy as np
import pytest
import tensorflow as tf
import tf_keras

from helpers import training
from helpers.networks import CLASSES, instances_of, random_images, random_scenes, tiny_config
from polarmask_tf import cli
from polarmask_tf.config import Config, TrainConfig
from polarmask_tf.modeling.polarmask import PolarMask
from polarmask_tf.training import optimizers
from polarmask_tf.training.train import train

NAMES = ("backbone/conv/kernel", "backbone/norm/gamma", "head/conv/kernel", "head/conv/bias")
RECIPES = {
    "adamw": {"optimizer": "adamw"},
    "sgd": {"optimizer": "sgd"},
    "paper": {"optimizer": "sgd", "decay": "l2", "bias_lr_multiplier": 2.0},
}
MODEL_STEPS = 4


def made(recipe, **options):
    values = {"warmup_steps": 2, "weight_decay": 0.05, "clip_norm": 3.0, "learning_rate": 0.01, **RECIPES[recipe], **options}
    return optimizers.make(dataclasses.replace(Config(), train=TrainConfig(**values)))


def weights_by_step(optimizer, steps=6):
    """[step][variable] after the same gradients; the first two variables are the backbone's."""
    rng = np.random.default_rng(0)
    variables = [tf.Variable(rng.normal(size=5).astype(np.float32), name=name) for name in NAMES]
    optimizer.build(variables)
    optimizer.set_backbone(variables[:2])
    step = tf.function(lambda gradients: optimizer.apply_gradients(zip(gradients, variables, strict=True)))
    history = [[variable.numpy() for variable in variables]]
    for _ in range(steps):
        step([tf.constant(rng.normal(0, 2, 5).astype(np.float32)) for _ in NAMES])
        history.append([variable.numpy() for variable in variables])
    return np.array(history)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("multiplier", [0.1, 0.0, 3.0])
def test_the_backbone_learns_and_decays_at_its_part_of_the_rate(recipe, multiplier):
    """As if all of the optimizer had the lower rate, of which the decay is a part; the rest is as without."""
    found = weights_by_step(made(recipe, backbone_lr_multiplier=multiplier))
    plain, slow = weights_by_step(made(recipe)), weights_by_step(made(recipe, learning_rate=0.01 * multiplier))
    np.testing.assert_array_equal(found[:, 2:], plain[:, 2:])
    if recipe == "paper":  # L2 in the gradient depends on where the weights are: by hand, of the first step
        np.testing.assert_allclose(
            found[1, :2] - found[0, :2], multiplier * (plain[1, :2] - plain[0, :2]), rtol=1e-4, atol=1e-7
        )
    np.testing.assert_allclose(found[:, :2], slow[:, :2], rtol=1e-5, atol=1e-7)
    assert (np.abs(found[-1, 2:] - found[0, 2:]) > 1e-4).any()


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("jit", [False, True])
def test_the_backbone_is_frozen_for_some_steps(recipe, jit):
    optimizer = made(recipe, freeze_backbone_steps=3, backbone_lr_multiplier=0.5)
    optimizer.jit_compile = jit  # as Keras sets it where there is a GPU
    found, plain = weights_by_step(optimizer), weights_by_step(made(recipe))
    for step in range(1, 4):
        np.testing.assert_array_equal(found[step, :2], found[0, :2])
    assert (found[4:, :2] != found[3:-1, :2]).any(axis=(1, 2)).all()
    np.testing.assert_allclose(found[:, 2:], plain[:, 2:], rtol=1e-5, atol=1e-7)
    assert float(optimizer.learning_rate) == pytest.approx(float(optimizer._learning_rate(5)))  # what is logged


def test_callbacks_may_set_the_rate():
    optimizer = optimizers.AdamW(0.1, backbone_lr_multiplier=0.5)
    optimizer.learning_rate = 0.2
    assert float(optimizer.learning_rate) == pytest.approx(0.2)


# ---- in a model


def model_of(policy="float32", **options):
    config = dataclasses.replace(tiny_config(), train=TrainConfig(warmup_steps=0, learning_rate=0.003, **options))
    tf_keras.utils.set_random_seed(3)
    model = PolarMask(config, CLASSES, dtype=policy)
    model.compile(optimizers.make(config))
    return model


def data(count=2):
    batch = random_images(1, count), instances_of(random_scenes(0, [2] * count), (64, 64))
    return tf.data.Dataset.from_tensors(batch).repeat(MODEL_STEPS)


def changed(model, fit):
    """Of each trainable variable by name, how much fit moves it, for the backbone and for the rest."""
    before = [v.numpy() for v in model.trainable_variables]
    fit(model)
    backbone = {id(v) for v in model.backbone.trainable_variables}
    moved = {True: 0.0, False: 0.0}
    for variable, value in zip(model.trainable_variables, before, strict=True):
        key = id(variable) in backbone
        moved[key] = max(moved[key], float(np.abs(variable.numpy() - value).max()))
    return moved[True], moved[False]


@pytest.mark.parametrize("policy", ["float32", "mixed_float16"])
@pytest.mark.parametrize("options", [{"backbone_lr_multiplier": 0.0}, {"freeze_backbone_steps": MODEL_STEPS}])
@pytest.mark.slow
def test_fit_tells_the_optimizer_which_variables_are_the_backbones(policy, options):
    backbone, rest = changed(model_of(policy, **options), lambda model: model.fit(data(), verbose=0))
    assert backbone == 0 and rest > 1e-3


@pytest.mark.slow
def test_a_saved_model_goes_on_with_its_backbones_rate(tmp_path):
    model = model_of(backbone_lr_multiplier=0.0, weight_decay=0.1)
    model.fit(data(), verbose=0)
    model.save(tmp_path / "m.keras")
    backbone, rest = changed(tf_keras.models.load_model(tmp_path / "m.keras"), lambda model: model.fit(data(), verbose=0))
    assert backbone == 0 and rest > 1e-3


def test_a_backbone_that_is_a_function_has_no_rate_of_its_own():
    inner = tf_keras.Sequential([tf_keras.layers.Conv2D(8, 3, 2, "same") for _ in range(3)])
    model = PolarMask(tiny_config(levels=(3,)), CLASSES, backbone=lambda x: {"3": inner(x)})
    model.compile(optimizers.AdamW(0.01, backbone_lr_multiplier=0.1))
    assert not model.optimizer._backbone


# ---- in a training


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    assert cli.main(["shapes", str(folder / "shapes"), "--train", "8", "--val", "1", "--size", "64"]) == 0
    source = (folder / "shapes/train/annotations.json", folder / "shapes/train/images")
    assert cli.main(["convert", *map(str, source), str(folder / "train"), "--processes", "1"]) == 0
    return folder / "train"


SETTINGS = (
    "model.backbone.freeze_at=0",
    "train.backbone_lr_multiplier=0.3",
    "train.freeze_backbone_steps=3",
    "train.schedule=step",  # a rate that does not depend on train.steps
    "train.deterministic=true",
)


@pytest.mark.slow
def test_a_training_that_was_interrupted_goes_on_exactly(converted, tmp_path):
    """After step 2, with the backbone frozen, and after step 4, without. Two devices: test_layouts.py."""

    def run(name, *steps):
        for number in steps:
            train(training.load(*SETTINGS, f"train.steps={number}", f"data.train={converted}"), tmp_path / name)
        return training.weights(tmp_path / name, 6)

    whole, again = run("whole", 6), run("again", 2, 4, 6)
    assert whole.keys() == again.keys()
    for name, value in whole.items():
        np.testing.assert_array_equal(again[name], value, err_msg=name)
    start, kernel = training.weights(tmp_path / "again", 4), "backbone/stem/conv/kernel/.ATTRIBUTES/VARIABLE_VALUE"
    assert (start[kernel] != whole[kernel]).any()
