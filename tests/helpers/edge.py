"""A small edge network of chance whose detections differ, and pictures for it."""

import numpy as np
import tensorflow as tf
import tf_keras

from helpers import training
from polarmask_tf import config as configs
from polarmask_tf.modeling.polarmask import PolarMask

SMALL = (
    *training.TINY,
    "model.head.norm=batch",
    "model.head.conv=separable",
    "model.head.kernel=1",
    "model.fpn.conv=separable",
    "data.size=[64,96]",
    "postprocess.pre_nms_top_k=50",
    "postprocess.multi_label=false",
    "postprocess.score_threshold=0.02",
    "model.refine_channels=0",
)


def images(number, height, width, seed=0):
    """Blocks of colors with noise."""
    rng = np.random.default_rng(seed)
    for _ in range(number):
        blocks = np.kron(rng.integers(0, 256, (-(-height // 8), -(-width // 8), 3)), np.ones((8, 8, 1)))[:height, :width]
        yield np.clip(blocks + rng.normal(0, 5, blocks.shape), 0, 255).astype(np.uint8)


def make_model(*overrides, classes=3):
    """Of chance, but with BatchNorms that fit their inputs and scores that differ."""
    tf_keras.utils.set_random_seed(0)
    names = [{"name": f"kind {i}", "category_id": i + 1} for i in range(classes)]
    model = PolarMask(configs.load("shapes", [*SMALL, *overrides]), names)
    rng = np.random.default_rng(3)
    for variable in model.head.trainable_variables:
        if variable.shape.rank == 4:
            variable.assign(variable + rng.normal(0, 0.3, variable.shape))
    model.head.classes.conv.bias.assign(tf.fill([classes], -2.0))
    norms = [layer for layer in model.submodules if isinstance(layer, tf_keras.layers.BatchNormalization)]
    for layer in norms:
        layer.momentum = 0.0
    model(np.stack(list(images(8, 64, 96))), training=True)
    return model
