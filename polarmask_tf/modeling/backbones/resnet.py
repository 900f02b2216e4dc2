"""ResNet as a subclassed model: any width and depth, basic or bottleneck blocks, either placement of the stride; ResNeXt."""

from __future__ import annotations

import tensorflow as tf
import tf_keras

from polarmask_tf.config import BackboneConfig, from_dict, to_dict
from polarmask_tf.modeling.layers import PACKAGE, Conv, norm

STEMS = {"7x7": (7, 2), "3x3": (3, 2), "6x6": (6, 4)}  # kernel and stride of the first convolution


@tf_keras.saving.register_keras_serializable(PACKAGE)
class Block(tf_keras.layers.Layer):
    """Residual block: two 3x3 convolutions ("basic"), or 1x1, 3x3 and 1x1 to 4 times the width ("bottleneck").

    With config.groups above 1 the 3x3 convolution is grouped, and groups * group_width wide in C2 where width may be 64.
    """

    def __init__(self, config: BackboneConfig, stage: int, stride: int, project: bool, **kwargs):
        super().__init__(**kwargs)
        self.config, self.stage, self.stride = config, stage, stride
        policy = self.dtype_policy
        basic = config.block == "basic"
        width = config.stage_widths()[stage]
        out = width if basic else 4 * width
        inner = width if config.groups == 1 else config.groups * config.group_width * 2**stage
        early = config.stride_in == "1x1"
        plan = (
            [(width, 3, stride), (width, 3, 1)]
            if basic
            else [(inner, 1, stride if early else 1), (inner, 3, 1 if early else stride), (out, 1, 1)]
        )
        self.convs = [
            Conv(filters, kernel, s, groups=config.groups if kernel == 3 else 1, dtype=policy, name=f"conv{i + 1}")
            for i, (filters, kernel, s) in enumerate(plan)
        ]
        self.norms = [norm(config.norm, filters, dtype=policy, name=f"norm{i + 1}") for i, (filters, _, _) in enumerate(plan)]
        self.shortcut = Conv(out, 1, stride, dtype=policy, name="shortcut") if project else None
        self.shortcut_norm = norm(config.norm, out, dtype=policy, name="shortcut_norm") if project else None

    def call(self, x, training=False):
        y = x
        for i, (conv, normalize) in enumerate(zip(self.convs, self.norms, strict=True)):
            y = normalize(conv(tf.nn.relu(y) if i else y), training=training)
        if self.shortcut is not None:
            x = self.shortcut_norm(self.shortcut(x), training=training)
        return tf.nn.relu(x + y)

    def get_config(self):
        own = {"stage": self.stage, "stride": self.stride, "project": self.shortcut is not None}
        return {**super().get_config(), "config": to_dict(self.config), **own}

    @classmethod
    def from_config(cls, config):
        return cls(from_dict(BackboneConfig, config.pop("config")), **config)


@tf_keras.saving.register_keras_serializable(PACKAGE)
class ResNet(tf_keras.Model):
    """Images [B, H, W, 3] to features {"2": C2, ..., "5": C5}, C_l of stride 2**l; H and W multiples of 32.

    ResNet-50 is blocks (3, 4, 6, 3), bottleneck, width 64; ResNeXt-101 64x4d is blocks (3, 4, 23, 3) of 64 groups. Sources:
    He et al., "Deep Residual Learning", table 1; Xie et al., "Aggregated Residual Transformations", table 1. What
    config.freeze_at names is not trainable; BatchNorm in it keeps its statistics.
    """

    def __init__(self, config: BackboneConfig, **kwargs):
        super().__init__(**kwargs)
        self.config, policy = config, self.dtype_policy
        widths = config.stage_widths()
        first = config.stem_width or widths[0]
        kernel, stride = STEMS[config.stem]
        self.stem = Conv(first, kernel, stride, dtype=policy, name="stem")
        self.stem_norm = norm(config.norm, first, dtype=policy, name="stem_norm")
        stem = [self.stem, self.stem_norm]
        if config.stem == "7x7":
            # Padding with zeros, which never exceed the ReLU's output, is as good as padding with -inf.
            self.pool = tf_keras.Sequential([tf_keras.layers.ZeroPadding2D(1), tf_keras.layers.MaxPool2D(3, 2)], name="pool")
        elif config.stem == "3x3":
            self.stem2 = Conv(widths[0], 3, 2, dtype=policy, name="stem2")
            self.stem2_norm = norm(config.norm, widths[0], dtype=policy, name="stem2_norm")
            stem += [self.stem2, self.stem2_norm]
        expansion = 1 if config.block == "basic" else 4
        stages, channels = [], widths[0]
        for stage, blocks in enumerate(config.blocks):
            out = widths[stage] * expansion
            layers = []
            for block in range(blocks):
                stride = 2 if stage and not block else 1
                project = stride > 1 or channels != out
                name = f"stage{stage + 2}_block{block + 1}"
                layers.append(Block(config, stage, stride, project, dtype=policy, name=name))
                channels = out
            stages.append(layers)
        # Flat lists of layers, which are all that Keras' own files look into.
        self.stage2, self.stage3, self.stage4, self.stage5 = stages
        for part in [stem, *stages][: config.freeze_at]:
            for layer in part:
                layer.trainable = False

    @property
    def stages(self) -> list:
        """The blocks of C2 to C5."""
        return [self.stage2, self.stage3, self.stage4, self.stage5]

    def call(self, images, training=False):
        x = tf.nn.relu(self.stem_norm(self.stem(images), training=training))
        if self.config.stem == "7x7":
            x = self.pool(x)
        elif self.config.stem == "3x3":
            x = tf.nn.relu(self.stem2_norm(self.stem2(x), training=training))
        features = {}
        for stage, blocks in enumerate(self.stages):
            for block in blocks:
                x = block(x, training=training)
            features[str(stage + 2)] = x
        return features

    def get_config(self):
        return {"name": self.name, "dtype": self.dtype_policy.name, "config": to_dict(self.config)}

    @classmethod
    def from_config(cls, config, custom_objects=None):
        return cls(from_dict(BackboneConfig, config.pop("config")), **config)
