"""The recipes: Muon, AdamW or SGD with decoupled decay, and the paper's SGD."""

from __future__ import annotations

import contextlib
import dataclasses
import typing

import tensorflow as tf
import tf_keras

from polarmask_tf.config import Config, TrainConfig
from polarmask_tf.errors import InputError
from polarmask_tf.modeling.layers import PACKAGE

MUON_SCALE = 0.8  # of the learning rate: the size of a kernel's update


def schedule(train: TrainConfig):
    """The learning rate by step: linear warm-up from a third of the rate, then cosine to final_lr_fraction of it, or a tenth
    after each of lr_boundaries."""
    rate, warm = train.learning_rate, train.warmup_steps
    if train.schedule == "step":
        return StepDecay(rate, warm, train.lr_boundaries)
    decay = {"decay_steps": max(train.steps - warm, 1), "alpha": train.final_lr_fraction}
    warm_up = {"initial_learning_rate": rate / 3, "warmup_target": rate, "warmup_steps": warm}
    return tf_keras.optimizers.schedules.CosineDecay(**decay, **(warm_up if warm else {"initial_learning_rate": rate}))


@tf_keras.saving.register_keras_serializable(PACKAGE)
class StepDecay(tf_keras.optimizers.schedules.LearningRateSchedule):
    """Linear warm-up from a third of the rate, and a tenth of the rate after each boundary (section 4.1)."""

    def __init__(self, learning_rate: float, warmup_steps: int, boundaries: typing.Sequence[int]):
        self.learning_rate, self.warmup_steps, self.boundaries = learning_rate, warmup_steps, tuple(boundaries)

    def __call__(self, step):
        step = tf.cast(step, tf.float32)
        warm = 1 / 3 + 2 / 3 * tf.minimum(step / self.warmup_steps, 1.0) if self.warmup_steps else 1.0
        return self.learning_rate * warm * 0.1 ** tf.add_n([0.0, *(tf.cast(step >= b, tf.float32) for b in self.boundaries)])

    def get_config(self):
        return {"learning_rate": self.learning_rate, "warmup_steps": self.warmup_steps, "boundaries": list(self.boundaries)}


class _BackboneRate:
    """The backbone learns, and decays, at `backbone_lr_multiplier` times the learning rate, and not at all for the first
    `freeze_backbone_steps` steps, in which moments are gathered already. Which variables are the backbone's PolarMask.compile
    tells; without it there are none."""

    _backbone: frozenset = frozenset()  # a set, not a list, which checkpoints would look into
    _factor = None  # while variables of the backbone are updated

    def __init__(self, *args, backbone_lr_multiplier: float = 1.0, freeze_backbone_steps: int = 0, **kwargs):
        super().__init__(*args, **kwargs)
        self.backbone_lr_multiplier, self.freeze_backbone_steps = backbone_lr_multiplier, freeze_backbone_steps

    def set_backbone(self, variables) -> None:
        """Says which variables are the backbone's."""
        self._backbone = frozenset(self._var_key(variable) for variable in variables)

    @property
    def learning_rate(self):
        rate = super().learning_rate
        return rate if self._factor is None else rate * self._factor

    @learning_rate.setter
    def learning_rate(self, value):
        tf_keras.optimizers.Optimizer.learning_rate.fset(self, value)

    @contextlib.contextmanager
    def _rate_of(self, is_backbone: bool):
        """Within it, learning_rate is that of the backbone, or the ordinary one."""
        if is_backbone and (self.backbone_lr_multiplier != 1 or self.freeze_backbone_steps):
            # By the number of finished steps, which checkpoints hold: a training that goes on goes on with this too.
            is_free = self.iterations >= self.freeze_backbone_steps
            self._factor = tf.where(is_free, tf.constant(self.backbone_lr_multiplier, tf.float32), 0.0)
        try:
            yield
        finally:
            self._factor = None

    def _update_step(self, gradient, variable):
        with self._rate_of(self._var_key(variable) in self._backbone):
            super()._update_step(gradient, variable)

    def _apply_weight_decay(self, variables):
        backbone = [variable for variable in variables if self._var_key(variable) in self._backbone]
        rest = [variable for variable in variables if self._var_key(variable) not in self._backbone]
        for part in (backbone, rest):
            if part:
                with self._rate_of(part is backbone):
                    super()._apply_weight_decay(part)

    def get_config(self):
        own = {name: getattr(self, name) for name in ("backbone_lr_multiplier", "freeze_backbone_steps")}
        return {**super().get_config(), **own}


class _EarlyAverages:
    """Running averages that are of use from the first steps on: their momentum is at most (1 + step) / (10 + step), as in
    tf.train.ExponentialMovingAverage. Without it the averages of a short training are mostly the weights it began with."""

    def _update_model_variables_moving_average(self, var_list):
        momentum, step = self.ema_momentum, tf.cast(self.iterations, tf.float32)
        try:
            self.ema_momentum = tf.minimum(momentum, (1 + step) / (10 + step))
            super()._update_model_variables_moving_average(var_list)
        finally:
            self.ema_momentum = momentum


class _KernelDecay:
    """Decoupled decay of convolution kernels alone. A class, since Keras saves no call of exclude_from_weight_decay."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.exclude_from_weight_decay(var_names=["bias", "gamma", "beta", "scale"])


@tf_keras.saving.register_keras_serializable(PACKAGE)
class AdamW(_BackboneRate, _EarlyAverages, _KernelDecay, tf_keras.optimizers.AdamW):
    """Adam with decoupled decay of the kernels."""


@tf_keras.saving.register_keras_serializable(PACKAGE)
class Muon(AdamW):
    """Kernels of convolutions move along the orthogonal matrix that is nearest to their momentum, all else by AdamW.

    Every direction in which a kernel could learn is gone as far, not only the few that dominate its gradient. A kernel [h, w,
    i, o] is taken for a matrix [h * w * i, o]; groups of a grouped one count as one. AdamW are left biases, norms, what
    `set_predictions` was given, and kernels with fewer than 16 rows or columns, as of depthwise convolutions. The elements of
    a kernel's update are MUON_SCALE times the learning rate large (root mean square): rates and decays of AdamW fit.
    `momentum` is of the gradients of kernels.

    Source: Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024); sizes by the longer side as in
    Liu et al., "Muon is Scalable for LLM Training" (2025), section 2.2. Raises InputError for a momentum outside of [0, 1).
    """

    _predictions: frozenset = frozenset()

    def __init__(self, *args, momentum: float = 0.9, **kwargs):
        super().__init__(*args, **kwargs)
        if not (isinstance(momentum, (int, float)) and 0 <= momentum < 1):
            raise InputError(f"Muon: momentum is {momentum!r}; a number from 0 up to 1, like 0.9, is needed")
        self.momentum = momentum

    def set_predictions(self, variables) -> None:
        """Says which variables are the last layers', of which each output stands for itself."""
        self._predictions = frozenset(self._var_key(variable) for variable in variables)

    def update_step(self, gradient, variable):
        if not self._is_matrix(variable):
            super().update_step(gradient, variable)
            return
        velocity = self._momentums[self._index_dict[self._var_key(variable)]]
        velocity.assign(self.momentum * velocity + gradient)
        ahead = tf.reshape(gradient + self.momentum * velocity, [-1, variable.shape[-1]])  # Nesterov's
        size = MUON_SCALE * max(ahead.shape) ** 0.5  # of n orthonormal vectors of length m, elements are m ** -0.5 large
        rate = tf.cast(self.learning_rate, variable.dtype)
        variable.assign_sub(rate * size * tf.reshape(orthogonalize(ahead), variable.shape))

    def _is_matrix(self, variable):
        shape = variable.shape
        large = shape.rank == 4 and min(shape[-1], shape.num_elements() // shape[-1]) >= 16
        return large and self._var_key(variable) not in self._predictions

    def get_config(self):
        return {**super().get_config(), "momentum": self.momentum}


def orthogonalize(matrix: tf.Tensor) -> tf.Tensor:
    """U V' of a float32 [m, n] matrix U S V', roughly: its singular values become .7 to 1.2, but for those below a thousandth
    of its norm, which become less.

    Five iterations of Newton and Schulz by Jordan's polynomial. They all are polynomials of the smaller of the two Gram
    matrices, so that the larger side is met twice only.
    """
    wide = matrix.shape[0] < matrix.shape[1]
    matrix /= tf.reduce_max(tf.abs(matrix)) + 1e-30  # squares of what is very small or large are 0 or infinite
    matrix /= tf.norm(matrix) + 1e-30
    gram = tf.matmul(matrix, matrix, transpose_a=not wide, transpose_b=wide)
    product = identity = tf.eye(gram.shape[0], dtype=matrix.dtype)
    for _ in range(5):
        step = 3.4445 * identity - 4.7750 * gram + 2.0315 * tf.matmul(gram, gram)
        product = tf.matmul(product, step)
        gram = tf.matmul(tf.matmul(step, gram), step)
    return tf.matmul(product, matrix) if wide else tf.matmul(matrix, product)


@tf_keras.saving.register_keras_serializable(PACKAGE)
class SGD(_BackboneRate, _EarlyAverages, _KernelDecay, tf_keras.optimizers.SGD):
    """SGD with decoupled decay of the kernels."""


@tf_keras.saving.register_keras_serializable(PACKAGE)
class PaperSGD(_BackboneRate, _EarlyAverages, tf_keras.optimizers.SGD):
    """SGD as the published models were trained: the decay is L2 in the gradient, after clipping; the biases of
    convolutions do not decay and learn `bias_lr_multiplier` times as fast; momentum gathers gradients, not steps, so that
    a drop of the learning rate acts at once. Scales and shifts of norms decay like kernels.

    Source: section 4.1, "Training Details", and the released configs.
    """

    def __init__(self, learning_rate=0.01, *, l2: float = 1e-4, bias_lr_multiplier: float = 2.0, **kwargs):
        super().__init__(learning_rate, **kwargs)
        self.l2, self.bias_lr_multiplier = l2, bias_lr_multiplier

    def update_step(self, gradient, variable):
        bias = _is_bias(variable.name)
        rate = tf.cast(self.learning_rate, variable.dtype) * (self.bias_lr_multiplier if bias else 1.0)
        if not bias:
            gradient += self.l2 * variable
        if self.momentum:
            velocity = self.momentums[self._index_dict[self._var_key(variable)]]
            gradient += self.momentum * velocity
            velocity.assign(gradient)
        variable.assign_sub(rate * gradient)

    def get_config(self):
        return {**super().get_config(), "l2": self.l2, "bias_lr_multiplier": self.bias_lr_multiplier}


def _is_bias(name: str) -> bool:
    return name.rpartition("/")[2].startswith("bias")  # norms call theirs beta


def make(config: Config) -> tf_keras.optimizers.Optimizer:
    """The optimizer of config.train, its learning rate scaled to the batch if base_batch_size says for which it is."""
    train = config.train
    if train.base_batch_size:
        train = dataclasses.replace(train, learning_rate=train.learning_rate * config.data.batch / train.base_batch_size)
    common = {"learning_rate": schedule(train), "global_clipnorm": train.clip_norm or None}
    common |= {name: getattr(train, name) for name in ("backbone_lr_multiplier", "freeze_backbone_steps")}
    common |= {"use_ema": True, "ema_momentum": train.ema} if train.ema else {}
    if train.decay == "l2":
        options = {"l2": train.weight_decay, "bias_lr_multiplier": train.bias_lr_multiplier, "momentum": train.momentum}
        return PaperSGD(**options, **common)
    common["weight_decay"] = train.weight_decay
    if train.optimizer == "adamw":
        return AdamW(**common)
    return (Muon if train.optimizer == "muon" else SGD)(momentum=train.momentum, **common)
