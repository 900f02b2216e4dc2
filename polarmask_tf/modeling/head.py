"""The polar head: at every location class scores, one centerness, n rays and, if asked for, a box."""

from __future__ import annotations

import math
from collections.abc import Mapping

import tensorflow as tf
import tf_keras

from polarmask_tf.config import HeadConfig
from polarmask_tf.modeling.layers import CONVS, Conv, norm


def _init():
    return tf_keras.initializers.RandomNormal(stddev=0.01)


class PolarHead(tf_keras.layers.Layer):
    """{level: [B, h, w, c]} to {level: {"classes": [B, h, w, C], "centerness": [B, h, w, 1], "rays": [B, h, w, n]}}.

    All outputs are float32 logits; geometry.rays_from_logits makes lengths of the rays'. Two towers, for classes (and, as
    in the released models, centerness) and for rays, shared over levels (but for BatchNorms, of which each level has its
    own); one learned scalar a level for the rays. With config.box a third tower gives "boxes": [B, h, w, 4], the logits of
    l, t, r, b, with scalars of their own.
    Source: figure 2 and section 3.1; "Box Branch" in section 4.1.
    """

    def __init__(self, config: HeadConfig, levels, num_classes: int, rays: int, **kwargs):
        super().__init__(**kwargs)
        lengths = ("ray", "box") if config.box else ("ray",)
        conv = CONVS[config.conv]

        def norms(name):
            if config.norm != "batch":
                return norm(config.norm, config.channels, name=name)
            return {str(level): norm("batch", config.channels, name=f"{name}_level{level}") for level in levels}

        self.towers = {
            tower: [
                (conv(config.channels, 3, bias=config.norm == "none", init=_init(), name=f"{tower}_conv{i + 1}"),
                 norms(f"{tower}_norm{i + 1}"))
                for i in range(config.convs)
            ]
            for tower in ("class", *lengths)
        }
        # Every class starts at 0.01, so that the background does not drown the first steps (Lin et al., section 3.3).
        rare = tf_keras.initializers.Constant(-math.log(99))
        self.classes = Conv(num_classes, config.kernel, bias=True, init=_init(), bias_init=rare, name="classes")
        self.centerness = Conv(1, config.kernel, bias=True, init=_init(), name="centerness")
        bias = tf_keras.initializers.Constant(config.ray_bias)
        self.rays = Conv(rays, config.kernel, bias=True, init=_init(), bias_init=bias, name="rays")
        self.scales = self._scales("scale", levels)
        if config.box:
            self.boxes = Conv(4, config.kernel, bias=True, init=_init(), bias_init=bias, name="boxes")
            self.box_scales = self._scales("box_scale", levels)

    def _scales(self, name, levels):
        return {
            str(level): self.add_weight(
                name=f"{name}{level}", shape=(), dtype=tf.float32, initializer="ones", experimental_autocast=False
            )
            for level in levels
        }

    def call(self, pyramid, training=False):
        return {level: self._one(x, str(level), training) for level, x in pyramid.items()}

    def _one(self, x, level, training):
        features = {}
        for tower, layers in self.towers.items():
            y = x
            for conv, normalize in layers:
                if isinstance(normalize, Mapping):  # Keras makes a mapping of its own of the dict
                    normalize = normalize[level]
                y = tf.nn.relu(normalize(conv(y), training=training))
            features[tower] = y
        outputs = {
            "classes": tf.cast(self.classes(features["class"]), tf.float32),
            "centerness": tf.cast(self.centerness(features["class"]), tf.float32),
            "rays": self.scales[level] * tf.cast(self.rays(features["ray"]), tf.float32),
        }
        if "box" in features:
            outputs["boxes"] = self.box_scales[level] * tf.cast(self.boxes(features["box"]), tf.float32)
        return outputs
