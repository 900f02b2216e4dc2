"""The whole network with its losses: what `fit` trains and what the exporter closes over."""

from __future__ import annotations

import dataclasses
import typing

import numpy as np
import tensorflow as tf
import tf_keras

from polarmask_tf import config as configs
from polarmask_tf.config import CONVENTIONS, Config
from polarmask_tf.errors import InputError
from polarmask_tf.modeling import step, terms
from polarmask_tf.modeling.backbones import efficientnet_lite, garden
from polarmask_tf.modeling.backbones.resnet import ResNet
from polarmask_tf.modeling.fpn import FPN
from polarmask_tf.modeling.head import PolarHead
from polarmask_tf.modeling.layers import PACKAGE
from polarmask_tf.modeling.refiner import Refiner
from polarmask_tf.ops import postprocess, targets

# Nothing in the network and its losses branches on tensors, and AutoGraph would take seconds to find that out.
_no_autograph = tf.autograph.experimental.do_not_convert
LOSSES = ("class", "ray", "centerness")


@dataclasses.dataclass(frozen=True)
class _Untracked:
    """Keeps Keras from making a mapping of its own, which checkpoints look into, of what is set as an attribute."""

    value: typing.Any


@tf_keras.saving.register_keras_serializable(PACKAGE)
class PolarMask(tf_keras.Model):
    """PolarMask for one config and its classes; built, and like any Keras model from then on.

    Images are uint8 or float RGB [B, H, W, 3] in 0..255, H and W multiples of 32; normalisation is part of the network.
    Outputs are the head's: {level: {"class_logits", "centerness_logits", "ray_logits"}}, see PolarHead; `detect` gives
    detections. `fit` takes (images, instances), see ops/targets.py for instances; compile it with an optimizer alone.

    Args:
      config: see polarmask_tf.load_config.
      classes: how many, or their names, or {"name", "category_id"} of each.
      backbone: a tf_keras.Model or layer, or any callable, from images (normalised, float) to {level: [B, h, w, c]}, level
        l of stride 2**l, as text or number, in place of the one that config.model.backbone describes.
      dtype: a mixed precision policy or its name; the global policy if None, which stays as it is.

    Raises InputError for what cannot be built.
    """

    def __init__(self, config: Config, classes: int | typing.Sequence, backbone=None, name: str = "polarmask", **kwargs):
        super().__init__(name=name, **kwargs)  # always the same name: variables of two models are compared by theirs
        model, policy = config.model, self.dtype_policy
        self.config = config
        self._classes = _Untracked(_named_classes(classes))
        self._thresholds = _Untracked(None)
        self.bit_depth: int | None = None  # that deep gray pictures of its training were converted with, see lite.read_image
        self.num_classes = len(self.classes)
        self._own_backbone = backbone is not None
        if backbone is None:
            own = {"resnet": ResNet, "EfficientNetLite0": efficientnet_lite.build}
            make = own.get(model.backbone.type, garden.build)
            self.backbone, levels = make(model.backbone, dtype=policy, name="backbone"), (2, 3, 4, 5)
        else:
            self.backbone, levels = backbone, _levels(backbone, self.input_size)
        self.stride = 2 ** max(levels)  # height and width of an image are multiples of it
        self.decoder = FPN(model.fpn, levels, dtype=policy, name="decoder")
        self.head = PolarHead(model.head, model.fpn.levels, self.num_classes, model.rays, dtype=policy, name="head")
        self._finest = str(min(levels))
        refiner = {"stride": 2 ** min(levels), "dtype": policy, "name": "refiner"}
        self.refiner = Refiner(model.refine_channels, **refiner) if model.refine_channels else None
        strided = model.head.ray_unit == "stride"
        self._ray_units = _Untracked({str(level): float(2**level if strided else 1) for level in model.fpn.levels})
        # By the size of whole images, also where training sees crops of them.
        self.ranges = config.targets.ranges or tuple(targets.scaled_bounds(model.fpn.levels, config.data.size))
        self.conventions = CONVENTIONS[config.conventions]
        self.needs_mask_iou = configs.needs_mask_iou(config)
        self.loss_names = (*LOSSES, *["box"] * model.head.box, *["mask"] * (config.loss.mask_weight > 0))
        self.loss_metrics = [tf_keras.metrics.Mean(name=name) for name in ("loss", *self.loss_names)]
        self.xla = False  # compile(jit_compile=True)
        # They are means over all replicas already; Keras would add up those of the workers.
        self.distribute_reduction_method = "first"
        fixed = getattr(self.backbone, "input_shape", None) if self._own_backbone else None
        size = fixed[1:3] if isinstance(fixed, tuple) else (None, None)
        _no_autograph(super().__call__)(tf_keras.Input((*size, 3), dtype=tf.uint8))

    @classmethod
    def from_config_name(cls, name, classes: int | typing.Sequence, overrides: typing.Sequence[str] = (), **kwargs):
        """PolarMask(polarmask_tf.load_config(name, overrides), classes, **kwargs): "edge", "paper_1x", a YAML file."""
        return cls(configs.load(name, overrides), classes, **kwargs)

    @property
    def classes(self) -> list[dict]:
        """{"name", "category_id"} of each class index."""
        return [dict(entry) for entry in self._classes.value]

    @property
    def thresholds(self) -> dict | None:
        """{"overall": score, "classes": [score, ...]} from which on detections are worth showing, which `evaluate` found for
        the run that this was loaded from; None if it was not evaluated."""
        return self._thresholds.value

    def set_thresholds(self, thresholds: dict | None) -> None:
        """Not an attribute to be assigned: Keras would track a dict."""
        self._thresholds = _Untracked(thresholds)

    @property
    def parts(self) -> dict[str, tf_keras.layers.Layer]:
        """What holds its weights, by the names that checkpoints have for it."""
        refiner = {} if self.refiner is None else {"refiner": self.refiner}
        return {"backbone": self.backbone, "decoder": self.decoder, "head": self.head, **refiner}

    @property
    def input_size(self) -> tuple[int, int]:
        """Height and width of the network's input for whole images."""
        return configs.input_size(self.config.data)

    @property
    def ray_units(self) -> dict[str, float]:
        """Pixels that a ray of logit 0 has, by level."""
        return self._ray_units.value

    def call(self, images, training=False):
        """Head outputs by level, float32 logits; see PolarHead. With config.model.refine_channels the lowest level has
        "contour_features" too, what `Refiner.refine` takes."""
        self._check_shape(images.shape)
        x = tf.cast(self._normalize(tf.cast(images, tf.float32)), self.compute_dtype)
        features = self.backbone(x, training=training) if isinstance(self.backbone, tf_keras.layers.Layer) else self.backbone(x)
        outputs = self.head(self.decoder(features), training=training)
        if self.refiner is not None:
            finest = next(feature for level, feature in features.items() if str(level) == self._finest)
            outputs[min(outputs, key=int)]["contour_features"] = self.refiner(finest)
        return outputs

    def _check_shape(self, shape):
        """InputError, also for `fit` before it builds its graph, for images that the network cannot take."""
        fits = len(shape) == 4 and shape[3] in (None, 3)
        if not fits or not all(side is None or side % self.stride == 0 for side in shape[1:3]):
            raise InputError(
                f"images are {list(shape)}: [batch, height, width, 3] is needed, height and width multiples of {self.stride}; "
                "polarmask_tf.load_predictor takes images of any size"
            )

    def _normalize(self, images):
        config = self.config.model
        if config.normalization == "fixed":
            mean, std = np.float32(config.mean), np.float32(config.std)
            _, height, width, _ = images.shape
            if None in (height, width):
                return (images - mean) / std
            # Whole rows at once: along a last dimension of 3, LiteRT takes ten times as long.
            rows = tf.reshape(images, [-1, height, 3 * width])
            return tf.reshape((rows - np.tile(mean, width)) / np.tile(std, width), [-1, height, width, 3])
        # Rows and columns of nothing but zeros are padding: a dim image's own contrast drowns in the step to them.
        height, width = (tf.cast(side, tf.float32) for side in tf.unstack(tf.shape(images)[1:3]))
        rows, columns = (tf.reduce_sum(tf.sign(tf.reduce_max(images, axis=axes)), axis=1) for axes in ([2, 3], [1, 3]))
        share = tf.maximum(rows, 1.0) / height * (tf.maximum(columns, 1.0) / width)
        share = tf.reshape(share, [-1, 1, 1, 1])

        def average(values):  # by rows first: the number of an image's pixels is no number of 16 bits, as fp16 files hold it
            of_rows = tf.reduce_sum(values, axis=[2, 3], keepdims=True) / (3 * width)
            return tf.reduce_sum(of_rows, axis=1, keepdims=True) / height

        mean = average(images) / share
        squares = average(tf.square(images - mean)) - (1 - share) * tf.square(mean)
        return (images - mean) / tf.sqrt(tf.maximum(squares / share, 0.0) + 1.0)

    def compile(self, optimizer="rmsprop", *, run_eagerly=None, steps_per_execution=None, jit_compile=None, **others):
        """As Keras', without losses and metrics, which belong to the model: loss, class, ray, centerness (and box).

        `jit_compile` compiles the network and its gradient by XLA; what is around it has shapes that change.
        """
        others.pop("from_serialized", None)  # by which Keras loads a SavedModel
        given = [name for name, value in others.items() if value is not None]
        if given:
            raise InputError(f"compile({given[0]}=...): PolarMask computes its own losses; set their weights in config.loss")
        self.xla = bool(jit_compile)
        super().compile(optimizer=optimizer, run_eagerly=run_eagerly, steps_per_execution=steps_per_execution)
        optimizer = getattr(self.optimizer, "inner_optimizer", self.optimizer)  # of one that scales the loss
        if hasattr(optimizer, "set_backbone"):  # ours, which may train it at a rate of its own
            optimizer.set_backbone(getattr(self.backbone, "trainable_variables", ()))
        if hasattr(optimizer, "set_predictions"):
            last = [*self.head.predictions, *([] if self.refiner is None else [self.refiner.convs[-1]])]
            optimizer.set_predictions([v for layer in last for v in layer.trainable_variables])

    def get_compile_config(self):
        compiled = super().get_compile_config()
        return compiled and {**compiled, "jit_compile": self.xla}

    def compile_from_config(self, config):
        self.compile(**tf_keras.saving.deserialize_keras_object(config))
        self.optimizer.build(self.trainable_variables)

    def fit(self, x=None, y=None, *args, **kwargs):
        """As Keras'; data are (images, instances). Raises InputError for weights of samples or classes, and other data."""
        for name in ("class_weight", "sample_weight"):
            if kwargs.get(name) is not None:
                raise InputError(f"fit({name}=...): there is no such weight in the focal loss; set config.loss.focal_alpha")
        for data in (x, kwargs.get("validation_data")):
            if isinstance(data, tf.data.Dataset):
                images, _ = targets.check_batch(data.element_spec, self.config.model.fpn.levels)
                self._check_shape(images.shape)
                self._check_classes(getattr(data, "classes", None))
        told = getattr(x, "classes", None) if isinstance(x, tf.data.Dataset) else None  # a Sequence's may be anything
        if told and [entry["category_id"] for entry in self.classes] == list(range(1, self.num_classes + 1)):  # of names alone
            self._classes = _Untracked(told)
        if isinstance(x, tf.data.Dataset):
            self.bit_depth = getattr(x, "bit_depth", self.bit_depth)
        self.set_thresholds(None)  # which were found on the weights as they are now
        if hasattr(self.optimizer, "build"):  # variables that its first step makes would have TensorFlow trace that step twice
            with self.distribute_strategy.scope():
                self.optimizer.build(self.trainable_variables)
        first = self.optimizer.iterations.numpy() if self.optimizer else 0
        try:
            return super().fit(x, y, *args, **kwargs)
        except (tf.errors.OpError, UnicodeDecodeError) as error:
            for data in (x, kwargs.get("validation_data")):
                explain = getattr(data, "explain", lambda error, step: None)
                if explained := explain(error, step=int(self.optimizer.iterations.numpy() - first)):
                    raise explained from None
            raise

    def _check_classes(self, theirs):
        """InputError unless `theirs`, the classes of data that know them, are in number and, if there are any, in name ours."""
        names = [entry["name"] for entry in theirs or ()]
        own = [entry["name"] for entry in self.classes]
        if theirs and own not in (names, [entry["name"] for entry in _named_classes(len(names))]):
            told, mine = (", ".join(each[:10]) + (", ..." if len(each) > 10 else "") for each in (names, own))
            how = "PolarMask(config, classes=data.classes) takes those of the data"
            raise InputError(f"fit: the data's classes are {told}, in this order, and the model's {mine}: {how}")

    @_no_autograph
    def train_step(self, data):
        """One step of `fit`, like Keras' own, but in train.accumulate parts and, with jit_compile, by XLA; see step.py."""
        images, instances = targets.check_batch(data, self.config.model.fpn.levels)
        gradients, values = step.gradients(self, images, instances)
        self.optimizer.apply_gradients(zip(gradients, self.trainable_variables, strict=True))
        self._update_metrics(values)
        return self.get_metrics_result()

    def test_step(self, data):
        """What `evaluate` does with a batch: the losses, without learning."""
        return super().test_step(targets.check_batch(data, self.config.model.fpn.levels))

    @_no_autograph
    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None):
        """Sum of the weighted losses of this replica's images, divided by counts over all replicas.

        `x` are images, `y_pred` what the model gives for them, `y` the instances, see ops/targets.py; or, of a part of a
        training step, step.Prepared, which then gets the single losses. The optimizer adds the gradients of the replicas,
        so the total is that of one device with the whole batch: focal loss / positives, centerness loss / positives; ray,
        box and mask loss weighted by the centerness targets / their sum, or by the IoU of the polygon / positives.
        """
        if sample_weight is not None:
            raise InputError("sample_weight: there is no such weight in the losses; leave it out")
        prepared = y if isinstance(y, step.Prepared) else step.prepare(self, x, y)
        prepared.losses = terms.losses_of(self, y_pred, prepared.targets, prepared.normalizers)
        if prepared is not y:
            self._update_metrics(prepared.losses)
        total = self._weighted_sum(prepared.losses)
        if self.losses:  # regularisation of a backbone of one's own
            total += tf.nn.scale_regularization_loss(tf.add_n(self.losses)) * prepared.share
        return total

    def _weighted_sum(self, values):
        return tf.add_n([getattr(self.config.loss, f"{p}_weight") * v for p, v in zip(self.loss_names, values, strict=True)])

    def _update_metrics(self, values):
        replicas = tf.distribute.get_strategy().num_replicas_in_sync
        for metric, value in zip(self.loss_metrics, (self._weighted_sum(values), *values), strict=True):
            # Mean metrics average over replicas, and each replica holds only its share of the sum.
            metric.update_state(value * replicas)

    def compute_metrics(self, x, y, y_pred, sample_weight):
        return self.get_metrics_result()

    @_no_autograph
    def detect(self, images, **overrides) -> dict:
        """Detections of a batch of equally sized images, with a batch dimension before what postprocess.detect returns.

        `overrides` replace values of config.postprocess, like score_threshold=0.3.
        """
        outputs = self(images, training=False)
        conventions = {k: v for k, v in vars(self.conventions).items() if k != "count_images"}
        options = {**vars(self.config.postprocess), **conventions, **overrides}
        size = step.size_of(images)

        def of_image(maps):
            return postprocess.detect(maps, size, self.ray_units, refine=self._refine_in(maps), **options)

        if images.shape[0] == 1:  # no loop in the graph of the .tflite
            # Squeezed and expanded: t[0] and t[tf.newaxis] would be slices in that file, and take longer than all the rest.
            detections = of_image(tf.nest.map_structure(lambda t: tf.squeeze(t, 0), outputs))
            return {name: tf.expand_dims(value, 0) for name, value in detections.items()}
        floats = {"detection_scores", "detection_boxes", "detection_polygons"}
        names = ("num_detections", "detection_classes", *sorted(floats))
        return tf.map_fn(of_image, outputs, fn_output_signature={n: tf.float32 if n in floats else tf.int32 for n in names})

    def _refine_in(self, maps):
        """What corrects lengths [N, n] of rays from points [N, 2] in the image of these outputs, or None."""
        if self.refiner is None:
            return None
        features = tf.expand_dims(maps[min(maps, key=int)]["contour_features"], 0)
        return lambda points, lengths: self.refiner.refine(features, tf.zeros_like(points[:, 0], tf.int32), points, lengths)

    def get_config(self):
        values = {
            "name": self.name,
            "dtype": self.dtype_policy.name,
            "config": configs.to_dict(self.config),
            "classes": self.classes,
        }
        if self.thresholds:
            values["thresholds"] = self.thresholds
        if self.bit_depth:
            values["bit_depth"] = self.bit_depth
        if self._own_backbone:
            if not isinstance(self.backbone, tf_keras.layers.Layer):
                raise InputError(
                    "the backbone is no Keras model or layer, so this model cannot be saved whole: save_weights() works, and "
                    "polarmask_tf.export_model"
                )
            values["backbone"] = tf_keras.saving.serialize_keras_object(self.backbone)
        return values

    @classmethod
    def from_config(cls, config, custom_objects=None):
        values = dict(config)
        values["config"] = configs.from_dict(Config, values["config"], "saved model")
        if values.get("backbone"):
            values["backbone"] = tf_keras.saving.deserialize_keras_object(values["backbone"], custom_objects)
        thresholds, bit_depth = values.pop("thresholds", None), values.pop("bit_depth", None)
        model = cls(**values)
        model.set_thresholds(thresholds)
        model.bit_depth = bit_depth
        return model


def _named_classes(classes) -> list[dict]:
    if isinstance(classes, int):
        classes = [f"class {number}" for number in range(1, classes + 1)]
    if isinstance(classes, (str, bytes, typing.Mapping)):  # whose letters, or keys, would be names
        raise InputError(f"classes is {classes!r}: a list is needed, also of a single name")
    named = []
    for number, entry in enumerate(classes, 1):
        if isinstance(entry, typing.Mapping) and not {"name", "category_id"} <= set(entry):
            raise InputError(f'classes: "name" and "category_id" of each are needed, and {dict(entry)} has not both')
        known = entry if isinstance(entry, typing.Mapping) else {"name": entry, "category_id": number}
        named.append({"name": str(known["name"]), "category_id": int(known["category_id"])})
    if not named:
        raise InputError("classes: at least one is needed: a number, names, or the classes of a data set")
    if len({entry["category_id"] for entry in named}) < len(named):  # which no export could be read with
        raise InputError("classes: two of them have one category_id")
    return named


def _levels(backbone, size) -> list[int]:
    """The levels that a backbone of the user's gives, found by asking it."""
    shape = getattr(backbone, "input_shape", None)
    fixed = isinstance(shape, tuple) and len(shape) == 4 and None not in shape[1:3]
    features = backbone(tf.zeros([1, *(shape[1:3] if fixed else size), 3]))
    try:
        levels = sorted(int(level) for level in features)
        ranks = {len(feature.shape) for feature in features.values()}
    except (TypeError, ValueError, AttributeError):
        levels, ranks = [], set()
    if not levels or ranks != {4}:
        raise InputError(f"backbone gives {type(features).__name__}: {{level: [B, h, w, c]}} is needed, level l of stride 2**l")
    return levels
