"""The two recipes: AdamW (or SGD) with decoupled decay for training from scratch, and the paper's SGD."""

from __future__ import annotations

import dataclasses
import math

import tensorflow as tf
import tf_keras

from polarmask_tf.config import Config, TrainConfig


class Schedule(tf_keras.optimizers.schedules.LearningRateSchedule):
    """Linear warm-up from a third of the rate, then cosine to `final_rate` of it, or a tenth after each decay step."""

    def __init__(self, config: TrainConfig):
        self.config = config

    def __call__(self, step):
        c = self.config
        step = tf.cast(step, tf.float32)
        warm = 1 / 3 + 2 / 3 * tf.minimum(step / max(c.warmup_steps, 1), 1.0) if c.warmup_steps else 1.0
        if c.schedule == "cosine":
            done = tf.clip_by_value((step - c.warmup_steps) / max(c.steps - c.warmup_steps, 1), 0.0, 1.0)
            factor = c.final_rate + (1 - c.final_rate) * (1 + tf.cos(math.pi * done)) / 2
        else:
            factor = 0.1 ** tf.add_n([0.0, *(tf.cast(step >= at, tf.float32) for at in c.decay_steps)])
        return c.learning_rate * warm * factor

    def get_config(self):
        return dataclasses.asdict(self.config)


class PaperSGD(tf_keras.optimizers.SGD):
    """SGD as the published models were trained: the decay is L2 in the gradient, after clipping; the biases of
    convolutions do not decay and learn `bias_rate` times as fast; momentum gathers gradients, not steps, so that a drop of
    the learning rate acts at once. Scales and shifts of norms decay like kernels.

    Source: section 4.1, "Training Details", and the released configs.
    """

    def __init__(self, learning_rate, *, l2: float, bias_rate: float, **kwargs):
        super().__init__(learning_rate, **kwargs)
        self.l2, self.bias_rate = l2, bias_rate

    def update_step(self, gradient, variable):
        bias = _is_bias(variable.name)
        rate = tf.cast(self.learning_rate, variable.dtype) * (self.bias_rate if bias else 1.0)
        if not bias:
            gradient += self.l2 * variable
        if self.momentum:
            velocity = self.momentums[self._index_dict[self._var_key(variable)]]
            gradient += self.momentum * velocity
            velocity.assign(gradient)
        variable.assign_sub(rate * gradient)

    def get_config(self):
        return {**super().get_config(), "l2": self.l2, "bias_rate": self.bias_rate}


def _is_bias(name: str) -> bool:
    return name.rpartition("/")[2].startswith("bias")  # norms call theirs beta


def make(config: Config) -> tf_keras.optimizers.Optimizer:
    """The optimizer of config.train, its learning rate scaled to the batch if config.train.rate_batch says for which it is."""
    train = config.train
    if train.rate_batch:
        train = dataclasses.replace(train, learning_rate=train.learning_rate * config.data.batch / train.rate_batch)
    common = {"learning_rate": Schedule(train), "global_clipnorm": train.clip_norm or None}
    common |= {"use_ema": True, "ema_momentum": train.ema} if train.ema else {}
    if train.decay == "l2":
        return PaperSGD(l2=train.weight_decay, bias_rate=train.bias_rate, momentum=train.momentum, **common)
    common["weight_decay"] = train.weight_decay
    made = (
        tf_keras.optimizers.AdamW(**common) if train.optimizer == "adamw"
        else tf_keras.optimizers.SGD(momentum=train.momentum, **common)
    )
    made.exclude_from_weight_decay(var_names=["bias", "gamma", "beta", "scale"])  # convolution kernels alone decay
    return made
