"""The polar head: at every location class scores, one centerness, n rays and, if asked for, a box."""

from __future__ import annotations

import math

import tensorflow as tf
import tf_keras

from polarmask_tf.config import HeadConfig, from_dict, to_dict
from polarmask_tf.modeling.layers import CONVS, PACKAGE, Conv, norm


@tf_keras.saving.register_keras_serializable(PACKAGE)
class PolarHead(tf_keras.layers.Layer):
    """{level: [B, h, w, c]} to {level: {"class_logits": [B, h, w, C], "centerness_logits": [B, h, w, 1], "ray_logits":
    [B, h, w, n]}}, all float32.

    geometry.rays_from_logits makes lengths of the rays'. Two towers, for classes and for rays; centerness comes from the
    first, as in the released models, or from the second (config.centerness_tower). They are shared over levels (but for
    BatchNorms, of which each level has its own); one learned scalar a level for the rays. With config.box a third tower
    gives "ltrb_logits": [B, h, w, 4], the logits of l, t, r, b, with scalars of their own.
    Source: figure 2 and section 3.1; "Box Branch" in section 4.1.
    """

    def __init__(self, config: HeadConfig, levels, num_classes: int, rays: int, **kwargs):
        super().__init__(**kwargs)
        self.config, self.levels, self.num_classes, self.num_rays = config, tuple(levels), num_classes, rays
        conv, options = CONVS[config.conv], {"dtype": self.dtype_policy}
        self.towers = ("class", "ray", "box") if config.box else ("class", "ray")
        for tower in self.towers:
            convs, norms = [], []
            for i in range(1, config.convs + 1):
                convs.append(
                    conv(config.channels, 3, bias=config.norm == "none", init=_init(), name=f"{tower}_conv{i}", **options)
                )
                each = [f"_level{level}" for level in self.levels] if config.norm == "batch" else [""]
                norms += [
                    norm(config.norm, config.channels, name=f"{tower}_norm{i}{level}", dtype=self.dtype_policy)
                    for level in each
                ]
            # Flat lists of layers, which are all that Keras' own files look into.
            setattr(self, f"{tower}_convs", convs)
            setattr(self, f"{tower}_norms", norms)
        options |= {"kernel": config.kernel, "bias": True}
        # Every class starts at 0.01, so that the background does not drown the first steps (Lin et al., section 3.3).
        rare = tf_keras.initializers.Constant(-math.log(99))
        bias = tf_keras.initializers.Constant(config.ray_bias)
        self.classes = Conv(num_classes, init=_init(), bias_init=rare, name="classes", **options)
        self.centerness = Conv(1, init=_init(), name="centerness", **options)
        self.rays = Conv(rays, init=_init(), bias_init=bias, name="rays", **options)
        self.scales = self._scales("scale")
        if config.box:
            self.boxes = Conv(4, init=_init(), bias_init=bias, name="boxes", **options)
            self.box_scales = self._scales("box_scale")

    @property
    def predictions(self) -> list:
        """The last convolutions."""
        return [self.classes, self.centerness, self.rays, *([self.boxes] if self.config.box else [])]

    def _scales(self, name):
        options = {"shape": (), "dtype": tf.float32, "initializer": "ones", "experimental_autocast": False}
        return {str(level): self.add_weight(name=f"{name}{level}", **options) for level in self.levels}

    def call(self, pyramid, training=False):
        return {str(level): self._level(x, str(level), training) for level, x in pyramid.items()}

    def _level(self, x, level, training):
        features = {tower: self._tower(x, tower, level, training) for tower in self.towers}
        outputs = {
            "class_logits": tf.cast(self.classes(features["class"]), tf.float32),
            "centerness_logits": tf.cast(self.centerness(features[self.config.centerness_tower]), tf.float32),
            "ray_logits": self.scales[level] * tf.cast(self.rays(features["ray"]), tf.float32),
        }
        if "box" in features:
            outputs["ltrb_logits"] = self.box_scales[level] * tf.cast(self.boxes(features["box"]), tf.float32)
        return outputs

    def _tower(self, x, tower, level, training):
        norms = getattr(self, f"{tower}_norms")
        if self.config.norm == "batch":
            norms = norms[[str(n) for n in self.levels].index(level) :: len(self.levels)]
        for conv, normalize in zip(getattr(self, f"{tower}_convs"), norms, strict=True):
            x = tf.nn.relu(normalize(conv(x), training=training))
        return x

    def get_config(self):
        own = {"levels": list(self.levels), "num_classes": self.num_classes, "rays": self.num_rays}
        return {**super().get_config(), "config": to_dict(self.config), **own}

    @classmethod
    def from_config(cls, config):
        return cls(from_dict(HeadConfig, config.pop("config")), **config)


def _init():
    return tf_keras.initializers.RandomNormal(stddev=0.01)
