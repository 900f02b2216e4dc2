"""Every setting: frozen dataclasses with their defaults, and the checks that no single type can make. Loads no TensorFlow.

Numbers that belong to the data (class names and counts) are not here: they come with the data.
"""

from __future__ import annotations

import functools
import typing
from dataclasses import dataclass, field

from polarmask_tf.errors import InputError


@dataclass(frozen=True)
class BackboneConfig:
    # "resnet" is described by stem to group_width; the others are tf-models-official's, and take `multiplier` instead.
    type: typing.Literal[
        "resnet",
        "MobileNetV2",
        "MobileNetV3Small",
        "MobileNetV3Large",
        "MobileNetV4ConvSmall",
        "MobileNetV4ConvMedium",
        "EfficientNetB0",
    ] = "resnet"
    multiplier: float = 1.0  # times the channels of a MobileNet
    stem: typing.Literal["7x7", "3x3"] = "7x7"  # 7x7 convolution and max pooling, or two 3x3 convolutions, which cost less
    stem_width: int = 0  # channels between these two; 0: as many as after them, `width`
    block: typing.Literal["basic", "bottleneck"] = "basic"
    blocks: tuple[int, ...] = (1, 1, 1, 1)  # residual blocks in stages C2..C5; ResNet-50 is (3, 4, 6, 3)
    width: int = 24  # channels of C2's 3x3 convolutions, doubled at every stage; ResNet-50 has 64 (below 16 see layers.Conv)
    stride_in: typing.Literal["3x3", "1x1"] = "3x3"  # "pytorch" or "caffe" placement of a bottleneck's stride
    groups: int = 1  # ResNeXt: groups of a bottleneck's 3x3 convolution ...
    group_width: int = 4  # ... and channels of each in C2, doubled at every stage; ResNeXt-101 64x4d has 64 groups of 4
    norm: typing.Literal["batch", "frozen", "sync", "group"] = "batch"  # frozen: BatchNorm that never learns
    freeze_at: int = 0  # 1: the stem does not learn, 2: nor does C2, ..., 5: nothing of the backbone does
    weights: str = ""  # where training starts: "imagenet" (downloaded), a file, or nothing; see modeling/pretrained.py


@dataclass(frozen=True)
class FPNConfig:
    channels: int = 64
    levels: tuple[int, ...] = (3, 4, 5)  # consecutive; level l has stride 2**l; the lowest is 2 or more
    conv: typing.Literal["dense", "separable"] = "dense"  # of the 3x3 convolutions; separable: depthwise, then 1x1 ("FPN-lite")


@dataclass(frozen=True)
class HeadConfig:
    channels: int = 64
    convs: int = 2  # 3x3 convolutions in each of the two towers
    conv: typing.Literal["dense", "separable"] = "dense"  # what those are; separable: depthwise, then 1x1
    kernel: typing.Literal[3, 1] = 3  # of the last convolutions, to classes, centerness and rays
    # batch: BatchNorm with statistics of each level, which an export folds into the convolution before it.
    norm: typing.Literal["group", "batch", "none"] = "group"
    box: bool = False  # a third tower for l, t, r, b; rays are cut at the box (table 1d)
    ray_unit: typing.Literal["pixel", "stride"] = "stride"  # rays = exp(.) as released, or stride * exp(.)
    ray_bias: float = 0.0  # initial bias of the ray convolution: rays start at exp(ray_bias) units


@dataclass(frozen=True)
class ModelConfig:
    rays: int = 36
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    fpn: FPNConfig = field(default_factory=FPNConfig)
    head: HeadConfig = field(default_factory=HeadConfig)
    normalization: typing.Literal["fixed", "image"] = "fixed"  # by mean and std below, or by each image's own
    mean: tuple[float, ...] = (123.675, 116.28, 103.53)  # RGB, subtracted from 0..255 pixels in the graph
    std: tuple[float, ...] = (58.395, 57.12, 57.375)


@dataclass(frozen=True)
class DataConfig:
    train: str = ""  # directory made by `polarmask convert`
    val: str = ""
    size: tuple[int, int] = (128, 128)  # height and width of the network's input, multiples of 32; see `fit`
    # How an image meets `size`. letterbox: it fits in, its ratio kept. stretch: it fills it, its ratio lost, as released.
    # short_side: its shorter side is size[0] unless its longer one then exceeds size[1], as in the paper; the input is
    # portrait or landscape as the image is, padded to multiples of 32.
    fit: typing.Literal["letterbox", "short_side", "stretch"] = "letterbox"
    batch: int = 16  # images a step, over all replicas
    crop: tuple[int, ...] = ()  # training only: images are scaled for `size` and cropped to this height and width
    flip: typing.Literal["none", "horizontal", "both"] = "horizontal"  # both: also upside down
    scale: tuple[float, float] = (1.0, 1.0)  # scale jitter, times the scale that fits the image into `size`
    max_instances: int = 100  # padding of a training image; an image with more keeps its largest
    shuffle: int = 2048  # images are shuffled in blocks of this many (and so are the shards)
    sizes: tuple[tuple[int, int], ...] = ()  # multi-scale training: every step takes one of these in place of `size`
    # What each of several workers reads. data: every shard, and decodes its part of every batch, so that batches are the
    # same whatever the layout. file: only its own shards, which is faster with many; batches then depend on the layout.
    sharding: typing.Literal["data", "file"] = "data"
    damaged: typing.Literal["fail", "skip"] = "fail"  # a shard that cannot be read to its end: stop, or go on without its rest


@dataclass(frozen=True)
class TargetConfig:
    radius: float = 1.5  # center sampling, in strides
    ranges: tuple[float, ...] = ()  # upper bounds of max(l, t, r, b) between levels; () = 64, 128, ... * input / 800
    center: typing.Literal["mass", "box"] = "mass"  # what center sampling is around (figure 7)
    centerness: typing.Literal["polar", "cartesian"] = "polar"  # equation 3, or FCOS's (table 1c)
    parts: typing.Literal["largest", "all"] = "largest"  # which polygons of an instance give center and rays


@dataclass(frozen=True)
class LossConfig:
    focal_gamma: float = 2.0
    focal_alpha: float = 0.25
    ray: typing.Literal["polar_iou", "polar_iou_squared", "smooth_l1"] = "polar_iou"  # equations 7, 6; table 1b
    class_weight: float = 1.0
    ray_weight: float = 1.0  # with smooth_l1 this is table 1b's alpha
    centerness_weight: float = 1.0
    box_weight: float = 1.0  # of the box branch, where there is one


@dataclass(frozen=True)
class PostprocessConfig:
    score_threshold: float = 0.05
    pre_nms_top_k: int = 1000  # a level, before NMS
    nms_iou_threshold: float = 0.5
    max_detections: int = 100
    multi_label: bool = True  # candidates are (location, class) pairs; False: each location's best class only


@dataclass(frozen=True)
class TrainConfig:
    steps: int = 600
    seed: int = 0
    optimizer: typing.Literal["adamw", "sgd"] = "adamw"
    learning_rate: float = 0.01
    base_batch_size: int = 0  # learning_rate is for so many images a step, and scaled linearly to data.batch; 0: as it stands
    warmup_steps: int = 50
    schedule: typing.Literal["cosine", "step"] = "cosine"
    final_lr_fraction: float = 0.02  # cosine: fraction of learning_rate at the last step
    lr_boundaries: tuple[int, ...] = ()  # step: learning rate is divided by 10 at each of these
    weight_decay: float = 1e-4
    decay: typing.Literal["decoupled", "l2"] = "decoupled"  # l2: added to the gradient, as in the paper; sgd only
    bias_lr_multiplier: float = 1.0  # l2: times the learning rate for the biases of convolutions, which then do not decay
    momentum: float = 0.9  # sgd
    clip_norm: float = 10.0  # 0 = off
    checkpoint_every: int = 200
    precision: typing.Literal["float32", "float16", "bfloat16"] = "float32"  # of the network in training; weights stay float32
    jit_compile: bool = False  # the network and its gradient by XLA
    accumulate: int = 1  # a step's images go through the network in so many parts, one after the other, to save memory
    ema: float = 0.0  # momentum of the running average of the weights that evaluation and export then take; 0: none
    deterministic: bool = False  # the same weights from every run, bit for bit; slower
    evaluate_every: int = 0  # steps between COCO evaluations on data.val; the best model is kept in best/; 0: none
    patience: int = 0  # stop after so many evaluations without a better AP; 0: never


@dataclass(frozen=True)
class Conventions:
    """Where the released code does otherwise than the paper. `conventions: released` takes all of it at once."""

    centerness_offset: float = 0.0  # score = class * (centerness + this)
    class_threshold: bool = False  # the best `pre_nms_top_k` locations a level compete in NMS with every class whose own
    # score, without centerness, is above score_threshold
    box_nms: bool = False  # NMS compares the boxes of the box branch, and rays are not cut at them
    suppress_equal: bool = False  # NMS suppresses at nms_iou_threshold too, not only above
    whole_pixels: bool = False  # a box ends at its last pixel, NMS adds that pixel to its areas, centers are cut to integers
    count_images: bool = False  # focal loss is divided by positives + images


CONVENTIONS = {
    "paper": Conventions(),
    "released": Conventions(
        centerness_offset=0.5,
        class_threshold=True,
        box_nms=True,
        suppress_equal=True,
        whole_pixels=True,
        count_images=True,
    ),
}


@dataclass(frozen=True)
class Config:
    conventions: typing.Literal["paper", "released"] = "paper"  # see Conventions
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    targets: TargetConfig = field(default_factory=TargetConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    postprocess: PostprocessConfig = field(default_factory=PostprocessConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


def input_size(data: DataConfig) -> tuple[int, int]:
    """Height and width of the network's input for whole images (data.crop is not applied).

    With data.fit: short_side it is that of a landscape image in training: `size` in multiples of 32; a portrait image has
    them swapped.
    """
    height, width = data.size if data.fit != "short_side" else (-(-side // 32) * 32 for side in data.size)
    return height, width


def check(config: Config) -> None:
    """InputError for values that no single field's type can refuse."""
    model, data = config.model, config.data
    levels = model.fpn.levels
    rules = [
        (model.rays >= 4, f"model.rays is {model.rays}: at least 4 rays are needed"),
        (
            levels and levels == tuple(range(levels[0], levels[0] + len(levels))) and 2 <= levels[0] <= 5,
            f"model.fpn.levels is {list(levels)}: consecutive levels are needed, from 2, 3, 4 or 5 up",
        ),
        (
            len(model.backbone.blocks) == 4 and min(model.backbone.blocks) >= 1,
            f"model.backbone.blocks is {list(model.backbone.blocks)}: four numbers of at least 1 are needed (C2 to C5)",
        ),
        (
            len(model.mean) == len(model.std) == 3 and min(model.std) > 0,
            "model.mean and model.std are three numbers each, those of std positive",
        ),
        (
            model.backbone.multiplier == 1 or model.backbone.type != "resnet",
            "model.backbone.multiplier is for the mobile backbones; a resnet has model.backbone.width",
        ),
        (
            model.backbone.groups == 1 or model.backbone.block == "bottleneck",
            "model.backbone.groups above 1 needs model.backbone.block: bottleneck",
        ),
        (
            model.backbone.stem_width == 0 or model.backbone.stem == "3x3",
            "model.backbone.stem_width needs model.backbone.stem: 3x3",
        ),
        (0 <= model.backbone.freeze_at <= 5, f"model.backbone.freeze_at is {model.backbone.freeze_at}: 0 to 5 are possible"),
        (
            config.conventions == "paper" or model.head.box,
            "conventions: released compares boxes of the box branch; it needs model.head.box: true",
        ),
        (
            all(s > 0 and (s % 32 == 0 or data.fit == "short_side") for s in data.size),
            f"data.size is {list(data.size)}: multiples of 32 are needed",
        ),
        (
            data.fit != "short_side" or data.size[0] <= data.size[1],
            f"data.size is {list(data.size)}: data.fit: short_side takes the shorter side and the most that the longer may be",
        ),
        (data.fit != "short_side" or not data.crop, "data.crop does not go with data.fit: short_side"),
        (
            not data.crop or (len(data.crop) == 2 and all(s > 0 and s % 32 == 0 for s in data.crop)),
            f"data.crop is {list(data.crop)}: two multiples of 32 are needed, or none",
        ),
        (data.batch >= 1, f"data.batch is {data.batch}: at least 1 is needed"),
        (
            0 < data.scale[0] <= data.scale[1],
            f"data.scale is {list(data.scale)}: two positive numbers, the smaller first, are needed",
        ),
        (
            all(min(size) > 0 and (size[0] % 32 == size[1] % 32 == 0 or data.fit == "short_side") for size in data.sizes),
            "data.sizes is a list of sizes like data.size: [[448, 448], [512, 512]]",
        ),
        (not (data.sizes and data.crop), "data.sizes does not go with data.crop"),
        (
            data.batch % max(config.train.accumulate, 1) == 0,
            f"data.batch is {data.batch}: not a multiple of train.accumulate ({config.train.accumulate})",
        ),
        (0 <= config.train.ema < 1, f"train.ema is {config.train.ema}: a number from 0 up to 1, like 0.999, is needed"),
        (not config.train.evaluate_every or data.val, "train.evaluate_every needs data.val, converted data to evaluate on"),
        (not config.train.patience or config.train.evaluate_every, "train.patience needs train.evaluate_every"),
        (config.targets.radius > 0, "targets.radius must be positive"),
        (
            not config.targets.ranges or len(config.targets.ranges) == len(levels) - 1,
            f"targets.ranges needs {len(levels) - 1} numbers for {len(levels)} levels, or none",
        ),
        (list(config.targets.ranges) == sorted(config.targets.ranges), "targets.ranges must be ascending"),
        (config.train.steps >= 1, f"train.steps is {config.train.steps}: at least 1 is needed"),
        (
            config.train.decay == "decoupled" or config.train.optimizer == "sgd",
            "train.decay: l2 is for train.optimizer: sgd; adamw's is decoupled",
        ),
        (
            config.train.bias_lr_multiplier == 1.0 or config.train.decay == "l2",
            "train.bias_lr_multiplier goes with train.decay: l2",
        ),
        (config.train.checkpoint_every >= 1, "train.checkpoint_every must be at least 1"),
        (0 <= config.postprocess.score_threshold < 1, "postprocess.score_threshold must be in [0, 1)"),
        (0 <= config.postprocess.nms_iou_threshold <= 1, "postprocess.nms_iou_threshold must be in [0, 1]"),
        (config.postprocess.max_detections >= 1, "postprocess.max_detections must be at least 1"),
    ]
    at_least = {
        "model.backbone.width": 1,
        "model.backbone.stem_width": 0,
        "model.fpn.channels": 1,
        "model.head.channels": 1,
        "model.head.convs": 0,
        "model.backbone.groups": 1,
        "model.backbone.group_width": 1,
        "train.base_batch_size": 0,
        "train.bias_lr_multiplier": 0,
        "data.max_instances": 1,
        "data.shuffle": 1,
        "postprocess.pre_nms_top_k": 1,
        "train.learning_rate": 0,
        "train.warmup_steps": 0,
        "train.accumulate": 1,
        "train.evaluate_every": 0,
        "train.patience": 0,
    }
    for key, least in at_least.items():
        value = functools.reduce(getattr, key.split("."), config)
        rules.append((value >= least, f"{key} is {value}: at least {least} is needed"))
    for ok, message in rules:
        if not ok:
            raise InputError(message)
