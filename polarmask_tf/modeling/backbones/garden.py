"""Backbones of tf-models-official. Nothing else imports `official`, and this module only when one is asked for: it takes
seconds."""

from __future__ import annotations

import tf_keras

from polarmask_tf.config import BackboneConfig
from polarmask_tf.errors import InputError


def build(config: BackboneConfig, dtype=None, name: str = "backbone") -> tf_keras.Model:
    """Images [B, H, W, 3] to features {"2": C2, ..., "5": C5}, as resnet.ResNet; H and W multiples of 32.

    config.type is the `model_id` of a MobileNet of tf-models-official, or EfficientNetB0; multiplier (a MobileNet's
    `filter_size_scale`), norm and freeze_at apply, the other fields describe a ResNet. `dtype` is a policy or its name.
    Raises InputError for what such a backbone cannot have, and where tf-models-official is not installed.
    """
    if config.norm == "group":
        raise InputError(f"model.backbone.norm is group: {config.type} has BatchNorm; give batch, sync or frozen")
    if config.multiplier <= 0:
        raise InputError(f"model.backbone.multiplier is {config.multiplier}: it must be positive")
    options = {"use_sync_bn": config.norm == "sync", "norm_momentum": 0.97}
    if config.type == "EfficientNetB0" and config.multiplier != 1:
        raise InputError(f"model.backbone.multiplier is {config.multiplier}: EfficientNetB0 has one size, of multiplier 1")
    try:
        from official.vision.modeling.backbones.efficientnet import EfficientNet
        from official.vision.modeling.backbones.mobilenet import MobileNet
    except ImportError as error:
        raise InputError(
            f"model.backbone.type {config.type} is tf-models-official's, which cannot be imported ({error}): "
            "pip install 'polarmask_tf[garden]'"
        ) from None
    before = tf_keras.mixed_precision.global_policy()
    try:
        tf_keras.mixed_precision.set_global_policy(dtype or before)  # their layers know no other way
        if config.type == "EfficientNetB0":
            # As in its paper: squeeze-and-excitation and swish, which are not EfficientNet's defaults there.
            whole = EfficientNet("b0", se_ratio=0.25, activation="swish", se_inner_activation="swish", **options)
        else:
            whole = MobileNet(config.type, filter_size_scale=config.multiplier, **options)
    finally:
        tf_keras.mixed_precision.set_global_policy(before)
    # Without what comes after C5, which is for classifying.
    features = {level: whole.output[level] for level in "2345"}
    backbone = tf_keras.Model(whole.input, features, name=name)
    if config.norm == "frozen":
        for layer in backbone.submodules:
            if isinstance(layer, tf_keras.layers.BatchNormalization):
                layer.trainable = False
    for layer in _up_to(backbone, features, config.freeze_at):
        layer.trainable = False
    return backbone


def _up_to(backbone, features, freeze_at: int) -> list:
    """The layers that freeze_at names: none, the stem's (up to the first BatchNorm), or all that lead to a feature."""
    if freeze_at >= 2:
        return tf_keras.Model(backbone.input, features[str(freeze_at)]).layers
    stem = []
    for layer in backbone.layers if freeze_at else []:
        stem.append(layer)
        if any(isinstance(part, tf_keras.layers.BatchNormalization) for part in (layer, *layer.submodules)):
            break
    return stem
