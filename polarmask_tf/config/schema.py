"""Every setting: frozen dataclasses of fields with their default, bounds and meaning. Loads no TensorFlow.

Numbers that belong to the data (class names and counts) are not here: they come with the data. A bound above is one that no
data and no machine of today meets: what exceeds it is a slip or an attack, and would cost memory without end.
"""

from __future__ import annotations

import dataclasses
import json
import typing
from dataclasses import dataclass, field

from polarmask_tf.errors import InputError


def _checked(default, passes: typing.Callable, need: str):
    """A field that `check` refuses where `passes` is false, saying what is needed."""
    return field(default=default, metadata={"passes": passes, "need": need})


def _within(default, least, most):
    """A field that is a number from `least` to `most`."""
    return _checked(default, lambda number: least <= number <= most, f"a number from {least} to {most} is needed")


def _each(default, least, most, multiples=None):
    """A field that is a list of numbers from `least` to `most`, or of lists of them."""

    def passes(value):
        return (
            all(map(passes, value))
            if isinstance(value, tuple)
            else least <= value <= most and not (multiples and value % multiples)
        )

    kind = f"multiples of {multiples}" if multiples else "numbers"
    return _checked(default, passes, f"{kind} from {least} to {most} are needed")


@dataclass(frozen=True)
class Section:
    """Base of all settings that a YAML file may name."""

    def contradictions(self) -> typing.Iterable[str]:
        """What is wrong with fields that are right one by one."""
        return ()


@dataclass(frozen=True)
class BackboneConfig(Section):
    # "resnet" is described by stem to group_width. EfficientNetLite0 is as it is; the others are tf-models-official's, and the
    # MobileNets among them take `multiplier`.
    type: typing.Literal[
        "resnet",
        "EfficientNetLite0",
        "MobileNetV2",
        "MobileNetV3Small",
        "MobileNetV3Large",
        "MobileNetV4ConvSmall",
        "MobileNetV4ConvMedium",
        "EfficientNetB0",
    ] = "resnet"
    multiplier: float = _within(1.0, 0.01, 100)  # times the channels of a MobileNet
    # How an image becomes a quarter as high and wide: 7x7 convolution and max pooling; two 3x3 convolutions, which cost less;
    # or one 6x6 convolution of stride 4, which costs least.
    stem: typing.Literal["7x7", "3x3", "6x6"] = "7x7"
    stem_width: int = _within(0, 0, 1024)  # channels between the two 3x3 convolutions; 0: as many as after them, `width`
    block: typing.Literal["basic", "bottleneck"] = "basic"  # residual blocks of two 3x3 convolutions, or of 1x1, 3x3 and 1x1
    # Residual blocks in stages C2..C5; ResNet-50 is (3, 4, 6, 3).
    blocks: tuple[int, int, int, int] = _each((1, 1, 1, 1), 1, 200)
    # Channels of C2's 3x3 convolutions, doubled at every stage; ResNet-50 has 64. Below 16 see layers.Conv.
    width: int = _within(24, 1, 1024)
    # Channels of C2's to C5's in place of `width` and its doubles, or () for these; `width` set over them undoes them.
    widths: tuple[int, ...] = _each((), 1, 8192)
    stride_in: typing.Literal["3x3", "1x1"] = "3x3"  # "pytorch" or "caffe" placement of a bottleneck's stride
    groups: int = _within(1, 1, 1024)  # ResNeXt: groups of a bottleneck's 3x3 convolution ...
    group_width: int = _within(4, 1, 1024)  # ... and channels of each in C2, doubled at every stage; ResNeXt-101 64x4d: 64, 4
    norm: typing.Literal["batch", "frozen", "sync", "group"] = "batch"  # frozen: BatchNorm that never learns
    freeze_at: int = _within(0, 0, 5)  # 1: the stem does not learn, 2: nor does C2, ..., 5: nothing of the backbone does
    # Where training starts: "imagenet" (a ResNet's are downloaded, EfficientNetLite0's are in a package of the extra
    # `imagenet`), a file, or nothing; see docs/pretrained.md.
    weights: str = ""

    def contradictions(self):
        if self.multiplier != 1 and self.type == "resnet":
            yield "model.backbone.multiplier is for the mobile backbones; a resnet has model.backbone.width"
        if self.groups > 1 and self.block != "bottleneck":
            yield "model.backbone.groups above 1 needs model.backbone.block: bottleneck"
        if sum(self.blocks) > 300:
            yield f"model.backbone.blocks is {list(self.blocks)}: at most 300 blocks together"
        if self.stem_width and self.stem != "3x3":
            yield "model.backbone.stem_width needs model.backbone.stem: 3x3"
        if len(self.widths) not in (0, 4):
            yield f"model.backbone.widths is {list(self.widths)}: four numbers are needed, of C2 to C5, or none"

    def stage_widths(self) -> tuple[int, ...]:
        """Channels of the 3x3 convolutions in C2 to C5."""
        return self.widths or tuple(self.width * 2**stage for stage in range(4))


@dataclass(frozen=True)
class FPNConfig(Section):
    channels: int = _within(64, 1, 4096)  # of every level
    levels: tuple[int, ...] = _checked(  # level l has stride 2**l, and is half as high and wide as the one before
        (3, 4, 5),
        lambda levels: levels and 2 <= levels[0] <= 5 and levels == tuple(range(levels[0], min(levels[-1], 10) + 1)),
        "consecutive levels are needed, from 2, 3, 4 or 5 up (and to 10 at most)",
    )
    conv: typing.Literal["dense", "separable"] = "dense"  # of the 3x3 convolutions; separable: depthwise, then 1x1 ("FPN-lite")


@dataclass(frozen=True)
class HeadConfig(Section):
    channels: int = _within(64, 1, 4096)  # of the towers
    convs: int = _within(2, 0, 100)  # 3x3 convolutions in each of the two towers
    conv: typing.Literal["dense", "separable"] = "dense"  # what those are; separable: depthwise, then 1x1
    kernel: typing.Literal[3, 1] = 3  # of the last convolutions, to classes, centerness and rays
    # batch: BatchNorm with statistics of each level, which an export folds into the convolution before it.
    norm: typing.Literal["group", "batch", "none"] = "group"
    centerness_tower: typing.Literal["class", "ray"] = "class"  # that centerness is a convolution of; class as released
    box: bool = False  # a third tower for l, t, r, b; rays are cut at the box (table 1d)
    ray_unit: typing.Literal["pixel", "stride"] = "stride"  # rays = exp(.) as released, or stride * exp(.)
    ray_bias: float = _within(0.0, -20, 20)  # initial bias of the ray convolution: rays start at exp(ray_bias) units


@dataclass(frozen=True)
class ModelConfig(Section):
    rays: int = _within(36, 4, 720)  # ray k points k * 360 / rays degrees from +x towards +y
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    fpn: FPNConfig = field(default_factory=FPNConfig)
    head: HeadConfig = field(default_factory=HeadConfig)
    # Contour refinement: channels of convolutions along the contours of detections that make their rays more exact, by the
    # features at their ends (modeling/refiner.py); 0: none, as in the paper. 32 is good.
    refine_channels: int = _within(0, 0, 1024)
    normalization: typing.Literal["fixed", "image"] = "fixed"  # by mean and std below, or by each image's own
    mean: tuple[float, float, float] = (123.675, 116.28, 103.53)  # RGB, subtracted from 0..255 pixels in the graph
    std: tuple[float, float, float] = _each((58.395, 57.12, 57.375), 1e-6, 10**6)  # RGB, what they are then divided by

    def contradictions(self):
        """Widths and depths that are right one by one can make a network that no machine holds."""
        backbone, head = self.backbone, self.head
        stages = sum(count * width**2 for count, width in zip(backbone.blocks, backbone.stage_widths(), strict=False))
        if self.refine_channels and (head.box or self.rays == 4):
            yield "model.refine_channels does not go with model.head.box, nor with model.rays: 4; --set model.refine_channels=0"
        about = 18 * stages + 9 * (len(self.fpn.levels) * self.fpn.channels**2 + 3 * (head.convs + 1) * head.channels**2)
        if about > 2 * 10**9:
            yield f"model: about {about:,} weights; at most 2 billion: lower width, channels, blocks or convs"


@dataclass(frozen=True)
class DataConfig(Section):
    train: str = ""  # directory made by `polarmask convert`
    val: str = ""  # the same, of pictures to measure on; none: nothing is measured
    size: tuple[int, int] = _each((128, 128), 1, 16384)  # height and width of the network's input, multiples of 32; see `fit`
    # How an image meets `size`. letterbox: it fits in, its ratio kept. stretch: it fills it, its ratio lost, as released.
    # short_side: its shorter side is size[0] unless its longer one then exceeds size[1], as in the paper; the input is
    # portrait or landscape as the image is, padded to multiples of 32.
    fit: typing.Literal["letterbox", "short_side", "stretch"] = "letterbox"
    batch: int = _within(16, 1, 65536)  # images a step, over all replicas
    # Training only: images are scaled for `size` and cropped to this height and width, or () for not at all.
    crop: tuple[int, ...] = _each((), 32, 16384, multiples=32)
    flip: typing.Literal["none", "horizontal", "both"] = "horizontal"  # both: also upside down
    scale: tuple[float, float] = _each((1.0, 1.0), 0.01, 100)  # scale jitter, times the scale that fits the image into `size`
    # Color jitter: brightness, contrast and saturation of a training image change by up to this part of them; 0: not at all.
    color_jitter: float = _within(0.0, 0, 1)
    max_instances: int = _within(100, 1, 10**4)  # padding of a training image; an image with more keeps its largest
    shuffle: int = _within(2048, 1, 10**7)  # images are shuffled in blocks of this many (and so are the shards)
    # Multi-scale training: every step takes one of these in place of `size`, like [[448, 448], [512, 512]].
    sizes: tuple[tuple[int, int], ...] = _each((), 1, 16384)
    # What each of several workers reads. data: every shard, and decodes its part of every batch, so that batches are the
    # same whatever the layout. file: only its own shards, which is faster with many; batches then depend on the layout.
    sharding: typing.Literal["data", "file"] = "data"
    damaged: typing.Literal["fail", "skip"] = "fail"  # a shard that cannot be read to its end: stop, or go on without its rest

    def contradictions(self):
        size, sizes = list(self.size), [list(size) for size in self.sizes]
        if self.fit == "short_side":
            if size[0] > size[1]:
                yield f"data.size is {size}: data.fit: short_side takes the shorter side, then the most that the longer may be"
            if self.crop:
                yield "data.crop does not go with data.fit: short_side"
        elif any(side % 32 for side in size):
            yield f"data.size is {size}: multiples of 32 are needed"
        elif any(side % 32 for one in sizes for side in one):
            yield f"data.sizes is {sizes}: multiples of 32 are needed"
        if len(self.crop) not in (0, 2):
            yield f"data.crop is {list(self.crop)}: a height and a width are needed, or none"
        if self.scale[0] > self.scale[1]:
            yield f"data.scale is {list(self.scale)}: the smaller comes first"
        if self.sizes and self.crop:
            yield "data.sizes does not go with data.crop"


@dataclass(frozen=True)
class TargetConfig(Section):
    radius: float = _within(1.5, 0.001, 1000)  # center sampling, in strides
    # Upper bounds of max(l, t, r, b) between levels, ascending; () = 64, 128, ... * input / 800.
    ranges: tuple[float, ...] = _checked((), lambda bounds: list(bounds) == sorted(bounds), "ascending numbers are needed")
    center: typing.Literal["mass", "box"] = "mass"  # what center sampling is around (figure 7)
    # Equation 3; FCOS's (table 1c); or the IoU of the polygon that the network predicts there with the true one.
    centerness: typing.Literal["polar", "cartesian", "iou"] = "polar"
    # What the class score of a location that learns an instance becomes: 1, or that IoU (quality focal loss).
    classification: typing.Literal["label", "iou"] = "label"
    parts: typing.Literal["largest", "all"] = "largest"  # which polygons of an instance give center and rays
    # Which of the locations around an instance's center learn it. static: all on the level of its size. cost: of those of
    # all levels the 9 that come closest to it so far, by class, ray and mask loss (PolarNeXt).
    match: typing.Literal["static", "cost"] = "static"


@dataclass(frozen=True)
class LossConfig(Section):
    focal_gamma: float = _within(2.0, 0, 100)  # how much less what is already right counts in the class loss (focal loss)
    focal_alpha: float = _within(0.25, 0, 1)  # what positives weigh there; background weighs 1 - this
    ray: typing.Literal["polar_iou", "polar_iou_squared", "smooth_l1"] = "polar_iou"  # equations 7, 6; table 1b
    class_weight: float = _within(1.0, 0, 10**6)  # what the class loss counts in the sum
    ray_weight: float = _within(1.0, 0, 10**6)  # of the ray loss; with smooth_l1 this is table 1b's alpha
    centerness_weight: float = _within(1.0, 0, 10**6)  # of the loss of centerness
    box_weight: float = _within(1.0, 0, 10**6)  # of the box branch, where there is one
    mask_weight: float = _within(0.0, 0, 10**6)  # of the dice loss between predicted and true polygons (ops/overlap.py)
    # What ray, box and mask losses of a location are weighted by: its centerness target, or the IoU of its polygon.
    weight_by: typing.Literal["centerness", "iou"] = "centerness"


@dataclass(frozen=True)
class PostprocessConfig(Section):
    # Detections that score this or less are dropped.
    score_threshold: float = _checked(0.05, lambda score: 0 <= score < 1, "a number in [0, 1) is needed")
    pre_nms_top_k: int = _within(1000, 1, 10**5)  # candidates a level, before NMS
    nms_iou_threshold: float = _within(0.5, 0, 1)  # of two boxes of a class that overlap more the one with the lower score goes
    max_detections: int = _within(100, 1, 10**4)  # most of an image
    multi_label: bool = True  # candidates are (location, class) pairs; False: each location's best class only
    # Scores are sigmoid(logit(score) / temperature + score_bias), see `evaluate --calibrate`.
    temperature: float = _within(1.0, 0.01, 100)
    score_bias: float = _within(0.0, -50, 50)  # see temperature
    # Polygons whose boxes overlap a detection's more are averaged with it, by score (polygon voting); 0: none. 0.7 is good.
    voting_iou_threshold: float = _within(0.0, 0, 1)


@dataclass(frozen=True)
class TrainConfig(Section):
    steps: int = _within(600, 1, 10**9)  # batches to train on
    seed: int = _within(0, 0, 2**32 - 1)  # of the first weights, the order of images, flips and jitter
    # muon: AdamW but for kernels, which learn faster (docs/recipe.md); sgd: with momentum, as the paper.
    optimizer: typing.Literal["adamw", "muon", "sgd"] = "adamw"
    learning_rate: float = _within(0.01, 0, 1000)  # the highest, after warm-up
    # The learning rate is for so many images a step, and scaled linearly to data.batch; 0: as it stands.
    base_batch_size: int = _within(0, 0, 65536)
    warmup_steps: int = _within(50, 0, 10**9)  # in which the learning rate rises from a third
    schedule: typing.Literal["cosine", "step"] = "cosine"  # of the learning rate after warm-up
    final_lr_fraction: float = _within(0.02, 0, 1)  # cosine: fraction of learning_rate at the last step
    lr_boundaries: tuple[int, ...] = _each((), 0, 10**9)  # step: learning rate is divided by 10 at each of these
    # The backbone's part of the learning rate, and of the weight decay: 0.1, say, for one that was trained before.
    backbone_lr_multiplier: float = _within(1.0, 0, 1000)
    # So many steps at first in which the backbone's weights stay as they are (BatchNorm's statistics do with norm: frozen).
    freeze_backbone_steps: int = _within(0, 0, 10**9)
    weight_decay: float = _within(1e-4, 0, 100)  # how fast weights shrink; see `decay`
    decay: typing.Literal["decoupled", "l2"] = "decoupled"  # l2: added to the gradient, as in the paper; sgd only
    # With l2: times the learning rate for the biases of convolutions, which then do not decay.
    bias_lr_multiplier: float = _within(1.0, 0, 1000)
    # Of sgd, and of muon's kernels.
    momentum: float = _checked(0.9, lambda momentum: 0 <= momentum < 1, "a number from 0 up to 1, like 0.9, is needed")
    clip_norm: float = _within(10.0, 0, 10**6)  # 0 = off
    checkpoint_every: int = _within(200, 1, 10**9)  # steps between checkpoints
    precision: typing.Literal["float32", "float16", "bfloat16"] = "float32"  # of the network in training; weights stay float32
    jit_compile: bool = False  # the network and its gradient by XLA
    # A step's images go through the network in so many parts, one after the other, to save memory.
    accumulate: int = _within(1, 1, 65536)
    # Momentum of the running average of the weights that evaluation and export then take; 0: none.
    ema: float = _checked(0.0, lambda momentum: 0 <= momentum < 1, "a number from 0 up to 1, like 0.999, is needed")
    deterministic: bool = False  # the same weights from every run, bit for bit; slower
    # Steps between COCO evaluations on data.val; the best model is kept in best/; 0: one at the end, where there is data.val.
    evaluate_every: int = _within(0, 0, 10**9)
    patience: int = _within(0, 0, 10**9)  # stop after so many evaluations without a better AP; 0: never

    def contradictions(self):
        if self.decay == "l2" and self.optimizer != "sgd":
            yield "train.decay: l2 is for train.optimizer: sgd; that of the others is decoupled"
        if self.bias_lr_multiplier != 1 and self.decay != "l2":
            yield "train.bias_lr_multiplier goes with train.decay: l2"
        if self.patience and not self.evaluate_every:
            yield "train.patience needs train.evaluate_every"


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
class Config(Section):
    conventions: typing.Literal["paper", "released"] = "paper"  # see Conventions
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    targets: TargetConfig = field(default_factory=TargetConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    postprocess: PostprocessConfig = field(default_factory=PostprocessConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def contradictions(self):
        levels, ranges = self.model.fpn.levels, self.targets.ranges
        if self.conventions == "released" and not self.model.head.box:
            yield "conventions: released compares boxes of the box branch; it needs model.head.box: true"
        if self.postprocess.voting_iou_threshold and (self.conventions == "released" or self.model.rays < 5):
            yield "postprocess.voting_iou_threshold goes with conventions: paper and more than 4 rays"
        if self.conventions == "released" and (self.postprocess.temperature, self.postprocess.score_bias) != (1, 0):
            yield "conventions: released has scores up to 1.5, which postprocess.temperature and score_bias cannot take"
        if self.data.batch % self.train.accumulate:
            yield f"data.batch is {self.data.batch}: not a multiple of train.accumulate ({self.train.accumulate})"
        if self.train.evaluate_every and not self.data.val:
            yield "train.evaluate_every needs data.val, converted data to evaluate on"
        if self.targets.match == "cost":
            if ranges:
                yield "targets.match: cost chooses among all levels; it needs targets.ranges: []"
            if self.loss.weight_by == "centerness" and self.targets.centerness != "iou":
                yield "targets.match: cost needs loss.weight_by: iou, or targets.centerness: iou"
        if ranges and len(ranges) != len(levels) - 1:
            wanted = f"{len(levels) - 1} of them, or []" if len(levels) > 1 else "none: --set 'targets.ranges=[]'"
            yield f"targets.ranges is {list(ranges)}: model.fpn.levels {list(levels)} need {wanted}"


def needs_mask_iou(config: Config) -> bool:
    """Whether training compares the predicted polygons with the true ones."""
    targets, loss = config.targets, config.loss
    by_iou = "iou" in (targets.centerness, targets.classification, loss.weight_by)
    return by_iou or targets.match == "cost" or loss.mask_weight > 0


def input_size(data: DataConfig) -> tuple[int, int]:
    """Height and width of the network's input for whole images (data.crop is not applied).

    With data.fit: short_side it is that of a landscape image in training: `size` in multiples of 32; a portrait image has
    them swapped.
    """
    height, width = data.size if data.fit != "short_side" else (-(-side // 32) * 32 for side in data.size)
    return height, width


def check(section: Section, prefix: str = "") -> None:
    """InputError for the first value of a config, or of a section of one, that is out of bounds or contradicts another.

    `prefix` stands before the names of the section's fields in messages, like "model.fpn."; a whole config needs none.
    """
    for entry in dataclasses.fields(section):
        key, value = prefix + entry.name, getattr(section, entry.name)
        if isinstance(value, Section):
            check(value, f"{key}.")
        elif entry.metadata and not entry.metadata["passes"](value):
            raise InputError(f"{key} is {json.dumps(value, default=str)}: {entry.metadata['need']}")
    for message in section.contradictions():
        raise InputError(message)
