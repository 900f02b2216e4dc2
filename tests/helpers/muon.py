"""A small model that Muon trains and a batch for it, in this process and in others."""

import dataclasses

import tensorflow as tf
import tf_keras

from helpers.networks import CLASSES, instances_of, random_images, random_scenes, tiny_config
from polarmask_tf.config import TrainConfig
from polarmask_tf.modeling.polarmask import PolarMask
from polarmask_tf.training import optimizers


def model_of(policy="float32", **options):
    config = tiny_config(width=16)
    train = TrainConfig(optimizer="muon", warmup_steps=0, learning_rate=0.003, ema=0.9, **options)
    tf_keras.utils.set_random_seed(3)
    model = PolarMask(dataclasses.replace(config, train=train), CLASSES, dtype=policy)
    model.compile(optimizers.make(model.config))
    return model


def data(steps=4):
    batch = random_images(1, 2), instances_of(random_scenes(0, [2, 2]), (64, 64))
    return tf.data.Dataset.from_tensors(batch).repeat(steps)
