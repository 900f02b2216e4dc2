"""Tiny networks, and pictures and instances for them."""

import dataclasses

import numpy as np
import pytest
import tensorflow as tf
import tf_keras

from helpers.polygons import edges_of, star
from polarmask_tf.config import BackboneConfig, Config, FPNConfig, HeadConfig, ModelConfig
from polarmask_tf.modeling.backbones.resnet import ResNet
from polarmask_tf.modeling.polarmask import PolarMask

CLASSES, ROWS, EDGES = 3, 4, 24
OURS = ("resnet", "EfficientNetLite0")  # backbones; the others are tf-models-official's


def marked(name: str, settings: Config):
    """A test's parameter, marked where the backbone of its settings needs the extra `garden`."""
    return pytest.param(name, marks=[pytest.mark.garden] * (settings.model.backbone.type not in OURS))


def tiny_config(levels=(3, 4, 5), rays=8, **backbone):
    config = ModelConfig(
        rays=rays,
        backbone=BackboneConfig(**{"width": 8, "norm": "group", **backbone}),
        fpn=FPNConfig(channels=16, levels=levels),
        head=HeadConfig(channels=16, convs=1),
    )
    return dataclasses.replace(Config(), model=config)


def location_count(size, levels):
    return sum(-(-size[0] // 2**level) * -(-size[1] // 2**level) for level in levels)


def instances_of(scenes, size, levels=(3, 4, 5), ignore=False):
    """Instances of a batch, [[(class, ring), ...], ...], as the pipeline gives them."""
    batch = {
        "boxes": np.zeros((len(scenes), ROWS, 4), np.float32),
        "centers": np.zeros((len(scenes), ROWS, 2), np.float32),
        "classes": np.full((len(scenes), ROWS), -1, np.int32),
        "edges": np.zeros((len(scenes), ROWS, EDGES, 4), np.float32),
        "window": np.tile(np.float32(size[::-1]), (len(scenes), 1)),
        "ignore": np.full((len(scenes), location_count(size, levels)), ignore),
    }
    for i, scene in enumerate(scenes):
        for j, (label, ring) in enumerate(scene):
            batch["boxes"][i, j] = [*ring.min(0), *ring.max(0)]
            batch["centers"][i, j] = (ring.min(0) + ring.max(0)) / 2
            batch["classes"][i, j] = label
            batch["edges"][i, j] = edges_of(ring, pad=EDGES)
    return {name: tf.constant(value) for name, value in batch.items()}


def random_scenes(seed, counts, size=(64, 64)):
    rng = np.random.default_rng(seed)
    return [
        [(int(rng.integers(CLASSES)), star(rng, rng.uniform(16, np.array(size[::-1]) - 16), 14, 10, 0.4)) for _ in range(n)]
        for n in counts
    ]


def random_images(seed, count, size=(64, 64)):
    return tf.constant(np.random.default_rng(seed).integers(0, 256, (count, *size, 3), np.uint8))


def loss_and_gradients(model, images, instances):
    with tf.GradientTape() as tape:
        loss = model.compute_loss(images, instances, model(images, training=True))
    return loss, tape.gradient(loss, model.trainable_variables)


COUNTS = {"even": [1, 2, 2, 1], "uneven": [4, 3, 0, 1], "one_side_empty": [2, 3, 0, 0], "none": [0, 0, 0, 0]}
SEED, RATE = 7, 0.1


def replica_model():
    tf_keras.utils.set_random_seed(SEED)
    return PolarMask(tiny_config(), CLASSES)


def replica_batch(name):
    return random_images(SEED, 4), instances_of(random_scenes(SEED, COUNTS[name]), (64, 64))


def images(count=2, size=(64, 64), seed=0):
    return tf.constant(np.random.default_rng(seed).normal(size=(count, *size, 3)), tf.float32)


def sync_model():
    tf_keras.utils.set_random_seed(0)
    model = ResNet(BackboneConfig(width=8, norm="sync"))
    model.build((None, 64, 64, 3))
    return model


def sync_step(model, x):
    """(C5 in training, gradients of a sum over images, so that those of replicas add up)."""
    with tf.GradientTape() as tape:
        features = model(x, training=True)
        loss = tf.add_n([tf.reduce_sum(tf.sin(c)) for c in features.values()])
    return features["5"], tape.gradient(loss, model.trainable_variables)
