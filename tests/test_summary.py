"""`polarmask summary` against numbers worked out by hand and against published ones."""

import dataclasses
import math

import pytest
import tensorflow as tf
import tf_keras

from polarmask_tf import config
from polarmask_tf.errors import InputError
from polarmask_tf.modeling.backbones.resnet import ResNet
from polarmask_tf.tools import summary

TINY = [
    "model.rays=4",
    "model.refine_channels=0",
    "model.backbone.width=8",
    "model.backbone.stem=3x3",
    "model.fpn.channels=16",
    "model.fpn.levels=[4,5]",
    "targets.ranges=[]",
    "model.head.channels=16",
    "model.head.convs=1",
    "model.head.norm=none",
    "model.head.box=true",
    "postprocess.pre_nms_top_k=20",
]


def by_part(rows):
    return {row["part"]: row for row in rows}


def graph_of(function, *shape):
    return tf.function(function, input_signature=[tf.TensorSpec(shape)]).get_concrete_function().graph


def counted(graph):
    return sum(summary.multiply_adds(op) for op in graph.get_operations())


def test_every_part_of_a_tiny_network_by_hand():
    rows = by_part(summary.summarize(config.load("shapes", TINY), 3, (64, 96)))

    def conv(kernel, inputs, outputs, height, width):
        return kernel**2 * inputs * outputs * height * width

    # Stem of two convolutions, then a basic block of two a stage, and a shortcut wherever width and size change.
    stages = [(8, 8, 16, 24), (8, 16, 8, 12), (16, 32, 4, 6), (32, 64, 2, 3)]
    backbone = conv(3, 3, 8, 32, 48) + conv(3, 8, 8, 16, 24)
    kernels = 9 * 3 * 8 + 9 * 8 * 8
    for i, (inputs, outputs, *size) in enumerate(stages):
        backbone += conv(3, inputs, outputs, *size) + conv(3, outputs, outputs, *size)
        kernels += 9 * inputs * outputs + 9 * outputs * outputs
        if i:
            backbone += conv(1, inputs, outputs, *size)
            kernels += inputs * outputs
    norms = 8 + 8 + sum((3 if i else 2) * stage[1] for i, stage in enumerate(stages))
    assert rows["backbone"]["multiply_adds"] == backbone
    assert rows["backbone"]["trainable"] == kernels + 2 * norms
    assert rows["backbone"]["parameters"] == kernels + 4 * norms  # mean and variance are no weights that learn
    # P4 and P5: a 1x1 and a 3x3 convolution each, with bias.
    assert rows["FPN"]["multiply_adds"] == 4 * 6 * (32 * 16 + 9 * 16 * 16) + 2 * 3 * (64 * 16 + 9 * 16 * 16)
    assert rows["FPN"]["parameters"] == rows["FPN"]["trainable"] == (32 + 64) * 16 + 2 * 16 + 2 * (9 * 16 * 16 + 16)
    locations = 4 * 6 + 2 * 3
    for part, outputs, scalars in (("class", 3 + 1, 0), ("ray", 4, 2), ("box", 4, 2)):
        row = rows[f"head, {part} tower"]
        assert row["multiply_adds"] == locations * 9 * 16 * (16 + outputs)
        assert row["parameters"] == 9 * 16 * (16 + outputs) + 16 + outputs + scalars
    # 20 of the 24 x 3 pairs of a location and a class, and 18 of 6 x 3, are decoded: x and y of each of the 4 rays.
    assert rows["post-processing"]["multiply_adds"] == (20 + 18) * 4 * 2
    assert rows["post-processing"]["parameters"] == 0
    total = rows.pop("total")
    for key in ("parameters", "trainable", "multiply_adds", "weights_mb", "activations_mb"):
        assert total[key] == pytest.approx(sum(row[key] for row in rows.values()))
    assert total["weights_mb"] == pytest.approx(4 * total["parameters"] / 1e6)


def test_the_refiner_is_a_part_of_its_own():
    """One 1x1 convolution of C2, then of every detection's contour: 5 samples of 4 features and 2 places a ray."""
    tiny = [setting for setting in TINY if "box" not in setting and "rays" not in setting]
    settings = [*tiny, "model.rays=12", "model.refine_channels=6", "postprocess.max_detections=9"]
    rows = by_part(summary.summarize(config.load("shapes", settings), 3, (64, 96)))
    weights = 5 * 5 * (4 + 2) * 6 + 2 * 3 * 6 * 6 + 3 * 6
    assert rows["refiner"]["multiply_adds"] == 16 * 24 * 8 * 4 + 9 * 12 * weights
    assert rows["refiner"]["parameters"] == rows["refiner"]["trainable"] == 8 * 4 + 4 + weights + 3 * 6 + 1
    plain = by_part(summary.summarize(config.load("shapes", [*settings, "model.refine_channels=0"]), 3, (64, 96)))
    assert "refiner" not in plain
    for part, row in plain.items():
        if part not in ("total", "post-processing"):  # whose sums are more
            assert row == rows[part]


def test_activations_of_a_convolution_its_bias_and_its_relu_by_hand():
    layer = tf_keras.layers.Conv2D(5, 3, padding="same", activation="relu", bias_initializer="ones")
    graph = graph_of(layer, 1, 10, 20, 3)
    assert sum(summary.activations(op) for op in graph.get_operations()) == 3 * 10 * 20 * 5
    # The ray tower of the tiny network: two levels of convolution, bias, ReLU, convolution, bias, scale.
    row = by_part(summary.summarize(config.load("shapes", TINY), 3, (64, 96)))["head, ray tower"]
    assert row["activations_mb"] == pytest.approx(4e-6 * (4 * 6 + 2 * 3) * (3 * 16 + 3 * 4))


def test_the_papers_network_has_the_published_numbers():
    settings = config.load(
        "paper_1x", ["model.backbone.norm=batch", "model.backbone.freeze_at=0", "model.backbone.stride_in=3x3"]
    )
    rows = by_part(summary.summarize(settings, 80, (224, 224)))
    # torchvision's resnet50 without its classifier: 25,557,032 - 2,049,000 parameters, 4.09 G multiply-adds at 224 x 224.
    assert rows["backbone"]["trainable"] == 25_557_032 - 2_049_000
    assert rows["backbone"]["multiply_adds"] == pytest.approx(4.087e9, rel=1e-3)
    # Towers as RetinaNet's and FCOS's: four 3x3 convolutions of 256 channels with GroupNorm, shared over the levels.
    locations = sum(math.ceil(224 / 2**level) ** 2 for level in range(3, 8))
    for part, outputs, scalars in (("class", 81, 0), ("ray", 36, 5)):
        row = rows[f"head, {part} tower"]
        assert row["multiply_adds"] == locations * 9 * 256 * (4 * 256 + outputs)
        assert row["parameters"] == 4 * (9 * 256 * 256 + 2 * 256) + 9 * 256 * outputs + outputs + scalars
    assert "head, box tower" not in rows
    sides = {level: math.ceil(224 / 2**level) for level in range(3, 8)}
    laterals = sum(sides[level] ** 2 * 256 * 2 ** (level + 6) for level in (3, 4, 5))
    assert rows["FPN"]["multiply_adds"] == laterals + locations * 9 * 256 * 256


def test_grouped_convolutions_count_as_published():
    """torchvision's resnext50_32x4d: 25,028,904 parameters with a classifier of 2,049,000, 4.23 G multiply-adds."""
    backbone = ResNet(
        config.BackboneConfig(
            block="bottleneck",
            blocks=(3, 4, 6, 3),
            width=64,
            groups=32,
            group_width=4,
            stride_in="3x3",
        )
    )
    graph = graph_of(backbone, 1, 224, 224, 3)
    assert sum(v.shape.num_elements() for v in backbone.trainable_variables) == 25_028_904 - 2_049_000
    assert counted(graph) == pytest.approx(4.23e9, rel=2e-3)


def test_depthwise_convolutions_and_matrix_products():
    assert counted(graph_of(tf_keras.layers.DepthwiseConv2D(3, 2, "same", 2), 1, 10, 20, 6)) == 9 * 5 * 10 * 6 * 2
    assert counted(graph_of(tf_keras.layers.Dense(7), 4, 5)) == 4 * 5 * 7
    assert counted(graph_of(lambda x: tf.matmul(x, x, transpose_a=True), 2, 3, 5)) == 2 * 3 * 5 * 5
    with pytest.raises(InputError, match="graph of its own"):
        counted(graph_of(tf.function(lambda x: tf.nn.relu(x)), 3))


@pytest.mark.garden
def test_a_mobile_backbone_is_counted_too():
    settings = config.load("shapes", ["model.backbone.type=MobileNetV2", "model.backbone.multiplier=0.35"])
    rows = by_part(summary.summarize(settings, 4, (64, 64)))
    assert 0.1e6 < rows["backbone"]["trainable"] < 1.7e6  # 1.66 M with its classifier
    # 59 M at 224 x 224 with what comes after C5, as published (Sandler et al., "MobileNetV2"; TensorFlow's model list).
    assert 0.5 * 59e6 < rows["backbone"]["multiply_adds"] * (224 / 64) ** 2 < 59e6


def test_what_does_not_learn_is_no_trainable_parameter():
    frozen = by_part(summary.summarize(config.load("shapes", [*TINY, "model.backbone.freeze_at=5"]), 3, (64, 64)))
    learning = by_part(summary.summarize(config.load("shapes", TINY), 3, (64, 64)))
    assert frozen["backbone"]["trainable"] == 0
    assert frozen["backbone"]["parameters"] == learning["backbone"]["parameters"] > 0


@pytest.mark.parametrize(
    ("fit", "size", "expected"),
    [
        ("letterbox", (96, 160), (96, 160)),
        ("stretch", (96, 160), (96, 160)),
        ("short_side", (800, 1333), (800, 1088)),
        ("short_side", (400, 1333), (416, 544)),
        ("short_side", (600, 700), (544, 704)),
    ],
)
def test_the_input_of_a_picture_of_480_x_640(fit, size, expected):
    data = dataclasses.replace(config.DataConfig(), fit=fit, size=size)
    assert summary.input_size(data) == expected
    if fit == "short_side":
        assert summary.input_size(data, (640, 480)) == expected[::-1]


def test_the_table_says_what_it_counts(capsys):
    rows = summary.print_summary(config.load("shapes", [*TINY, "data.size=[64,96]"]), 3)
    printed = capsys.readouterr().out
    assert "64 x 96, 3 classes, 4 rays" in printed and "activations: all tensors" in printed
    for row in rows:
        assert f" {row['multiply_adds']:,} " in next(x for x in printed.splitlines() if x.startswith(row["part"]))


def test_a_size_that_the_network_cannot_take_is_refused():
    with pytest.raises(InputError, match="multiples of 32"):
        summary.summarize(config.load("shapes", TINY), 3, (60, 64))


def test_more_classes_than_anybody_has_are_refused():
    with pytest.raises(InputError, match="99999999 classes, and the limit is 100000"):
        summary.print_summary(config.load("shapes"), 99_999_999)
