"""modeling/: shapes, losses that stay finite, mixed precision, replicas, and the size of ResNet-50."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
import tf_keras

from helpers.networks import (
    CLASSES,
    COUNTS,
    EDGES,
    RATE,
    instances_of,
    loss_and_gradients,
    random_images,
    random_scenes,
    replica_batch,
    replica_model,
    tiny_config,
)
from helpers.polygons import edges_of
from polarmask_tf.config import BackboneConfig, HeadConfig
from polarmask_tf.errors import InputError
from polarmask_tf.modeling.backbones.resnet import ResNet
from polarmask_tf.modeling.head import PolarHead
from polarmask_tf.modeling.polarmask import PolarMask
from polarmask_tf.ops import geometry


def assert_finite(model, images, instances):
    loss, gradients = loss_and_gradients(model, images, instances)
    assert loss.dtype == tf.float32 and np.isfinite(loss)
    assert all(gradient is not None and np.isfinite(gradient).all() for gradient in gradients)
    values = {name: float(value) for name, value in model.get_metrics_result().items()}
    assert set(values) == {"loss", "class", "ray", "centerness"} and np.isfinite(list(values.values())).all()
    model.reset_metrics()
    return values


# ---- shapes


@pytest.mark.parametrize("levels", [(3, 4, 5), (3, 4, 5, 6, 7), (2, 3, 4, 5), (4,), (3, 4)])
@pytest.mark.parametrize("size", [(64, 96), (32, 32)])
def test_output_shapes(levels, size):
    model = PolarMask(tiny_config(levels), CLASSES)
    outputs = model(random_images(0, 2, size))
    assert list(outputs) == list(map(str, levels))
    for level, maps in ((int(level), maps) for level, maps in outputs.items()):
        h, w = -(-size[0] // 2**level), -(-size[1] // 2**level)
        assert geometry.locations(*size, 2**level).shape[0] == h * w
        assert {name: value.shape for name, value in maps.items()} == {
            "class_logits": (2, h, w, CLASSES),
            "centerness_logits": (2, h, w, 1),
            "ray_logits": (2, h, w, 8),
        }
        assert all(value.dtype == tf.float32 for value in maps.values())


@pytest.mark.parametrize("options", [{"block": "bottleneck"}, {"block": "bottleneck", "stride_in": "1x1"}, {"norm": "batch"}])
def test_backbones_have_strides_4_to_32(options):
    backbone = ResNet(tiny_config(**options).model.backbone)
    features = backbone(tf.zeros([1, 64, 96, 3]))
    expansion = 4 if options.get("block") == "bottleneck" else 1
    assert {level: tuple(f.shape) for level, f in features.items()} == {
        str(level): (1, 64 // 2**level, 96 // 2**level, 8 * 2 ** (level - 2) * expansion) for level in (2, 3, 4, 5)
    }


def test_classes_start_rare():
    outputs = PolarMask(tiny_config(), CLASSES)(random_images(0, 1))
    scores = tf.sigmoid(tf.concat([tf.reshape(maps["class_logits"], [-1]) for maps in outputs.values()], 0)).numpy()
    assert np.median(scores) == pytest.approx(0.01, rel=0.1)


@pytest.mark.parametrize(
    ("classes", "said"),
    [
        ("cat", "classes is 'cat': a list is needed"),
        ({0: "cat", 1: "dog"}, "a list is needed"),
        ([{"id": 1, "name": "cat"}], '"name" and "category_id" of each are needed'),
        ([{"name": name, "category_id": 1} for name in ("cat", "dog")], "two of them have one category_id"),
        (0, "at least one is needed"),
    ],
)
def test_classes_that_would_be_others_are_refused(classes, said):
    with pytest.raises(InputError, match=said):
        PolarMask(tiny_config(), classes)


def test_the_head_works_on_any_features():
    """Any levels, any sizes, any number of channels: only {level: tensor}."""
    head = PolarHead(HeadConfig(channels=16, convs=1), (1, 4, 9), num_classes=5, rays=12)
    outputs = head({1: tf.ones([2, 7, 3, 10]), 4: tf.ones([2, 1, 1, 10]), 9: tf.ones([2, 2, 9, 10])})
    rays = {level: tuple(maps["ray_logits"].shape) for level, maps in outputs.items()}
    assert rays == {"1": (2, 7, 3, 12), "4": (2, 1, 1, 12), "9": (2, 2, 9, 12)}
    assert outputs["9"]["class_logits"].shape == (2, 2, 9, 5) and outputs["9"]["centerness_logits"].shape == (2, 2, 9, 1)


def test_normalisation_is_part_of_the_network():
    model = PolarMask(tiny_config(), CLASSES)
    images = random_images(0, 1)
    for level, maps in model(images).items():
        for name, value in model(tf.cast(images, tf.float32)).get(level).items():
            np.testing.assert_allclose(value, maps[name], atol=1e-6)
    gray = tf.ones([1, 32, 32, 3]) * list(model.config.model.mean)
    zero = model.head(model.decoder(model.backbone(tf.zeros([1, 32, 32, 3]))))
    np.testing.assert_allclose(model(gray)["3"]["class_logits"], zero["3"]["class_logits"], atol=1e-5)


def test_rays_are_in_units_of_the_stride_or_in_pixels():
    strided, plain = (
        PolarMask(tiny_config(), 1),
        PolarMask(
            dataclasses.replace(
                tiny_config(), model=dataclasses.replace(tiny_config().model, head=HeadConfig(ray_unit="pixel"))
            ),
            1,
        ),
    )
    assert strided.ray_units == {"3": 8.0, "4": 16.0, "5": 32.0} and plain.ray_units == {"3": 1.0, "4": 1.0, "5": 1.0}


def test_resnet_50_has_the_published_number_of_parameters():
    """torchvision's resnet50 holds 25,557,032 parameters, 2,049,000 of them in the classifier."""
    backbone = ResNet(BackboneConfig(block="bottleneck", blocks=(3, 4, 6, 3), width=64))
    backbone.build((None, 64, 64, 3))
    expected = 7 * 7 * 3 * 64 + 2 * 64  # stem; a batch norm has two trainable numbers a channel
    channels = 64
    for blocks, width in zip((3, 4, 6, 3), (64, 128, 256, 512), strict=True):
        for block in range(blocks):
            expected += channels * width + 9 * width * width + width * 4 * width + 2 * (width + width + 4 * width)
            expected += 0 if block else channels * 4 * width + 2 * 4 * width  # shortcut
            channels = 4 * width
    assert expected == 25_557_032 - (2048 * 1000 + 1000) == 23_508_032
    assert sum(np.prod(v.shape) for v in backbone.trainable_variables) == expected
    # Beside them a mean and a variance for each channel that is normalised.
    assert sum(np.prod(v.shape) for v in backbone.non_trainable_variables) == 53_120


# ---- losses


@pytest.fixture(scope="module")
def model():
    return PolarMask(tiny_config(), CLASSES)


def test_losses_of_ordinary_scenes_are_finite(model):
    values = assert_finite(model, random_images(1, 2), instances_of(random_scenes(0, [3, 2]), (64, 64)))
    assert values["loss"] == pytest.approx(values["class"] + values["ray"] + values["centerness"], rel=1e-5)
    assert min(values.values()) > 0


@pytest.mark.parametrize("levels", [(2, 3, 4, 5), (3, 4, 5, 6, 7), (3, 4)])
def test_every_weight_has_a_gradient(levels):
    model = PolarMask(tiny_config(levels), CLASSES)
    _, gradients = loss_and_gradients(
        model, random_images(1, 2), instances_of(random_scenes(0, [3, 2]), (64, 64), levels=levels)
    )
    assert [v.name for v, g in zip(model.trainable_variables, gradients, strict=True) if g is None] == []


def test_losses_without_instances_are_those_of_the_background(model):
    values = assert_finite(model, random_images(1, 2), instances_of([[], []], (64, 64)))
    assert values["ray"] == values["centerness"] == 0 and values["class"] > 0


def test_losses_where_everything_is_ignored_are_zero(model):
    values = assert_finite(model, random_images(1, 2), instances_of([[], []], (64, 64), ignore=True))
    assert values == {"loss": 0, "class": 0, "ray": 0, "centerness": 0}


def test_an_instance_whose_rays_are_all_epsilon(model):
    """Its contour lies between the rays of the only location that is its candidate."""
    instances = {name: value.numpy() for name, value in instances_of([[], []], (64, 64)).items()}
    instances["boxes"][0, 0], instances["centers"][0, 0], instances["classes"][0, 0] = [24, 24, 34, 34], [29, 29], 1
    instances["edges"][0, 0] = edges_of([[33, 30], [33.5, 30.5], [33.2, 30.6]], pad=EDGES)  # seen at about 25 degrees
    lengths = geometry.ray_lengths(tf.constant([[28.0, 28.0]]), tf.constant(instances["edges"][0, :1]), 8)
    assert (lengths.numpy() == np.float32(1e-6)).all()
    assert_finite(model, random_images(1, 2), {name: tf.constant(value) for name, value in instances.items()})


def test_losses_with_extreme_outputs_are_finite(model):
    instances = instances_of(random_scenes(0, [3, 2]), (64, 64))
    for value in (1e4, -1e4):
        outputs = tf.nest.map_structure(lambda v, value=value: tf.fill(v.shape, value), model(random_images(1, 2)))
        flat = tf.nest.flatten(outputs)
        with tf.GradientTape() as tape:
            tape.watch(flat)
            loss = model.compute_loss(random_images(1, 2), instances, tf.nest.pack_sequence_as(outputs, flat))
        assert np.isfinite(loss)
        assert all(np.isfinite(gradient).all() for gradient in tape.gradient(loss, flat))


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision(policy):
    tf_keras.mixed_precision.set_global_policy(policy)
    try:
        model = PolarMask(tiny_config(), CLASSES)
        images, instances = random_images(1, 2), instances_of(random_scenes(0, [3, 0]), (64, 64))
        outputs = model(images)
        assert all(value.dtype == tf.float32 for value in tf.nest.flatten(outputs))
        assert model.decoder(model.backbone(tf.zeros([1, 32, 32, 3], model.compute_dtype)))["3"].dtype == model.compute_dtype
        assert all(variable.dtype == tf.float32 for variable in model.trainable_variables)
        assert_finite(model, images, instances)
        model.compile(optimizer=tf_keras.optimizers.SGD(0.01), run_eagerly=True)
        before = model.head.classes.conv.kernel.numpy()
        for _ in range(12):  # the first steps in float16 only find the scale of the loss
            logs = model.train_on_batch(images, instances, return_dict=True)
            assert np.isfinite(list(logs.values())).all()
            if (model.head.classes.conv.kernel.numpy() != before).any():
                break
        else:
            pytest.fail("no step changed the weights")
        assert all(np.isfinite(variable.numpy()).all() for variable in model.trainable_variables)
        found = model.detect(images, score_threshold=0.0)
        assert found["detection_polygons"].dtype == tf.float32 and np.isfinite(found["detection_polygons"]).all()
    finally:
        tf_keras.mixed_precision.set_global_policy("float32")


def test_detect_of_a_batch_is_detect_of_each(model):
    images = random_images(3, 3)
    together = model.detect(images, score_threshold=0.0, max_detections=9)
    assert together["detection_polygons"].shape == (3, 9, 8, 2)
    for i in range(3):
        alone = model.detect(images[i : i + 1], score_threshold=0.0, max_detections=9)
        for name, value in alone.items():
            np.testing.assert_allclose(value[0], together[name][i], atol=1e-4)


# ---- replicas


TWO_REPLICAS = """
import json, sys
import numpy as np, tensorflow as tf, tf_keras
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
from helpers import networks
strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
assert strategy.num_replicas_in_sync == 2
with strategy.scope():
    model = networks.replica_model()
    model.compile(optimizer=tf_keras.optimizers.SGD(networks.RATE))
start, out = model.get_weights(), {}
for name in networks.COUNTS:
    model.set_weights(start)
    batches = tf.data.Dataset.from_tensors(networks.replica_batch(name)).unbatch().batch(4, drop_remainder=True)
    logs = model.fit(batches, verbose=0).history
    out[name] = {key: values[0] for key, values in logs.items()}
    np.savez(sys.argv[1] + "/" + name + ".npz", *[v.numpy() for v in model.trainable_variables])
print(json.dumps(out))
"""


@pytest.fixture(scope="module")
def two_replicas(tmp_path_factory):
    """{name of counts: (logs, weights)} of one step of `fit` on two logical CPUs, in a process of its own."""
    folder = tmp_path_factory.mktemp("replicas")
    here = Path(__file__).resolve().parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(here), str(here.parent)]), "CUDA_VISIBLE_DEVICES": ""}
    ran = subprocess.run(
        [sys.executable, "-c", TWO_REPLICAS, str(folder)], capture_output=True, text=True, timeout=300, env=environment
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    logs = json.loads(ran.stdout.splitlines()[-1])
    arrays = {name: np.load(folder / f"{name}.npz") for name in COUNTS}
    return {name: (logs[name], [arrays[name][key] for key in arrays[name].files]) for name in COUNTS}


@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.slow
def test_two_replicas_train_like_one_device(two_replicas, name):
    """Loss and weights after a step of plain SGD are those of one device with the whole batch, its gradients taken here by
    hand: so the number of positives and the sum of centerness are those of all replicas."""
    model = replica_model()
    images, instances = replica_batch(name)
    _, gradients = loss_and_gradients(model, images, instances)
    logs, weights = two_replicas[name]
    expected = {key: float(value) for key, value in model.get_metrics_result().items()}
    assert logs == pytest.approx(expected, rel=1e-4, abs=1e-7)
    moved = 0
    for variable, gradient, found in zip(model.trainable_variables, gradients, weights, strict=True):
        wanted = -RATE * gradient.numpy()
        # Compare the changes, which are small beside the weights; float32 weights keep seven digits.
        change = found - variable.numpy()
        resolution = 2e-7 * max(np.abs(variable).max(), 1e-3)
        np.testing.assert_allclose(change, wanted, rtol=0, atol=1e-4 * np.abs(wanted).max() + resolution)
        moved += np.abs(wanted).max() > 100 * resolution
    assert moved > 5


def test_images_are_normalised_alike_in_known_and_unknown_sizes():
    config = tiny_config()
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, mean=(10, 20, 30), std=(2, 4, 5)))
    model = PolarMask(config, 2)
    images = np.random.default_rng(0).uniform(0, 255, (2, 5, 7, 3)).astype(np.float32)
    expected = (images - np.float32([10, 20, 30])) / np.float32([2, 4, 5])
    for shape in ((2, 5, 7, 3), (None, None, None, 3), (None, None, 7, 3), (None, 5, 7, 3)):
        normalise = tf.function(model._normalize, input_signature=[tf.TensorSpec(shape)])
        np.testing.assert_allclose(normalise(images), expected, rtol=1e-6)


def test_an_image_is_normalised_by_itself_without_its_padding():
    config = tiny_config()
    model = PolarMask(dataclasses.replace(config, model=dataclasses.replace(config.model, normalization="image")), 2)
    images = np.random.default_rng(0).integers(8, 13, (2, 20, 30, 3)).astype(np.float32)  # dim: padding would be the most of it
    images[0, 5] = 0  # a black row of the image counts as padding, and matters little
    padded = np.zeros((2, 32, 64, 3), np.float32)
    padded[:, :20, :30] = images
    mean, std = images[1].mean(), np.sqrt(images[1].var() + 1)
    np.testing.assert_allclose(model._normalize(padded)[1, :20, :30], (images[1] - mean) / std, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(model._normalize(padded)[:, :20, :30], model._normalize(images), rtol=1e-4, atol=1e-5)
    assert np.isfinite(model._normalize(np.zeros((1, 32, 32, 3), np.float32))).all()
