"""modeling/garden.py: backbones of tf-models-official and their checkpoints."""

import dataclasses
import subprocess
import sys
import typing
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
import tf_keras

from helpers.networks import OURS, instances_of, loss_and_gradients, random_images, random_scenes
from polarmask_tf.config import BackboneConfig, Config, FPNConfig, HeadConfig, ModelConfig
from polarmask_tf.errors import InputError
from polarmask_tf.modeling.backbones import garden
from polarmask_tf.modeling.polarmask import PolarMask
from polarmask_tf.weights import pretrained
from polarmask_tf.weights.start import start_from

pytestmark = pytest.mark.garden

LEVELS = "2345"
TYPES = [kind for kind in typing.get_args(typing.get_type_hints(BackboneConfig)["type"]) if kind not in OURS]
CLASSES = 3


def small_config(**backbone):
    values = {"type": "MobileNetV2", "multiplier": 0.35, **backbone}
    model = ModelConfig(
        rays=8,
        backbone=BackboneConfig(**values),
        fpn=FPNConfig(channels=16, levels=(3, 4, 5)),
        head=HeadConfig(channels=16, convs=1),
    )
    return dataclasses.replace(Config(), model=model)


def images(count=2, size=(64, 64), seed=0):
    return tf.constant(np.random.default_rng(seed).normal(size=(count, *size, 3)), tf.float32)


def mobilenet(kind="MobileNetV2", multiplier=0.35, seed=0):
    """As Model Garden builds it, with weights and statistics that a training might have left."""
    from official.vision.modeling.backbones.mobilenet import MobileNet

    network = MobileNet(kind, filter_size_scale=multiplier)
    rng = np.random.default_rng(seed)
    for v in network.variables:
        positive = "gamma" in v.name or "variance" in v.name
        start = v if "kernel" in v.name else 0.0
        v.assign(rng.uniform(0.5, 1.5, v.shape) if positive else start + rng.normal(0, 0.1, v.shape))
    return network


def save_as_model_garden_does(network, folder):
    """Its trainer's checkpoint has model, optimizer and global_step, and the items that tasks ask for, like backbone."""
    optimizer = tf_keras.optimizers.SGD(0.1, momentum=0.9)
    optimizer.build(network.trainable_variables)
    step = tf.Variable(7, dtype=tf.int64)
    model = tf.Module()
    model.backbone, model.classifier = network, tf.Variable(tf.ones([4, 4]))
    checkpoint = tf.train.Checkpoint(model=model, backbone=network, optimizer=optimizer, global_step=step)
    return tf.train.CheckpointManager(checkpoint, str(folder), max_to_keep=1, checkpoint_name="ckpt").save(7)


def assert_equal_features(found, expected):
    for level in LEVELS:
        wanted = expected[level].numpy()
        assert wanted.std() > 1e-3
        np.testing.assert_allclose(found[level], wanted, rtol=0, atol=1e-4 * np.abs(wanted).max())


@pytest.mark.parametrize("kind", TYPES)
def test_every_type_gives_c2_to_c5(kind):
    backbone = garden.build(BackboneConfig(type=kind))
    features = backbone(images(1, (64, 96)))
    assert {n: tuple(f.shape[:3]) for n, f in features.items()} == {n: (1, 64 >> int(n), 96 >> int(n)) for n in LEVELS}
    with tf.GradientTape() as tape:
        loss = tf.add_n([tf.reduce_sum(f) for f in backbone(images(2), training=True).values()])
    assert all(g is not None for g in tape.gradient(loss, backbone.trainable_variables))  # nothing hangs in the air


@pytest.mark.parametrize("kind, multiplier", [("MobileNetV2", 0.35), ("MobileNetV4ConvSmall", 1.0)])
def test_a_checkpoint_of_model_garden_gives_equal_features(kind, multiplier, tmp_path):
    network = mobilenet(kind, multiplier)
    prefix = save_as_model_garden_does(network, tmp_path)
    expected = network(images())
    model = PolarMask(small_config(type=kind, multiplier=multiplier), CLASSES)
    for weights in (prefix, str(tmp_path), f"{prefix}.index"):
        model.backbone.set_weights([np.zeros_like(w) for w in model.backbone.get_weights()])
        config = small_config(type=kind, multiplier=multiplier, weights=weights)
        pretrained.initialize(model.backbone, config.model)
        assert_equal_features(model.backbone(images()), expected)


def test_a_training_starts_from_a_checkpoint_of_model_garden(tmp_path, capsys):
    network = mobilenet()
    prefix = save_as_model_garden_does(network, tmp_path)
    for given in (prefix, f"{prefix}.index", tmp_path):
        model = PolarMask(small_config(), CLASSES)
        start_from(model, Path(given))
        assert_equal_features(model.backbone(images()), network(images()))
        out = capsys.readouterr().out
        assert f"starting from {given}: {len(model.backbone.variables)} of " in out and "anew: decoder/" in out
    with pytest.raises(InputError, match=r"--set 'model\.std=\[58\.395"):
        config = small_config()
        model = dataclasses.replace(config.model, std=(1.0, 1.0, 1.0))
        start_from(PolarMask(dataclasses.replace(config, model=model), CLASSES), tmp_path)


def test_a_mobile_backbone_learns(tmp_path):
    prefix = save_as_model_garden_does(mobilenet(), tmp_path)
    config = small_config(weights=prefix, norm="frozen", freeze_at=2)
    model = PolarMask(config, CLASSES)
    pretrained.initialize(model.backbone, config.model)
    pictures, instances = random_images(1, 2), instances_of(random_scenes(0, [3, 2]), (64, 64))
    loss, gradients = loss_and_gradients(model, pictures, instances)
    assert np.isfinite(loss) and all(np.isfinite(g).all() for g in gradients)
    model.compile(optimizer=tf_keras.optimizers.SGD(0.001))
    before = {id(v): v.numpy() for v in model.backbone.variables}
    model.train_on_batch(pictures, instances)
    learning = {id(v) for v in model.backbone.trainable_variables}
    assert 0 < len(learning) < len(before)
    for v in model.backbone.variables:
        assert np.array_equal(v.numpy(), before[id(v)]) == (id(v) not in learning)


@pytest.mark.parametrize(
    "kind, freezing",
    [
        ("MobileNetV2", (0, 1, 2, 3, 4, 5)),
        ("MobileNetV4ConvSmall", (0, 1, 4)),
        ("EfficientNetB0", (0, 1, 4)),
    ],
)
def test_freezing_by_level(kind, freezing):
    """What is frozen computes the same in training, BatchNorm included; what is not has BatchNorm of the batch."""
    x, counts = images(), []
    for freeze_at in freezing:
        backbone = garden.build(BackboneConfig(type=kind, freeze_at=freeze_at))
        inference, training = backbone(x), backbone(x, training=True)
        same = [bool(np.allclose(inference[n], training[n], atol=1e-5)) for n in LEVELS]
        assert same == [freeze_at >= int(n) for n in LEVELS]
        counts.append(len(backbone.trainable_variables))
    assert counts[0] - counts[1] == 3  # the stem: one kernel, gamma and beta
    assert all(np.diff(counts) < 0) and (counts[-1] == 0) == (freezing[-1] == 5)


def test_norms():
    def norms(backbone):
        return [part for part in backbone.submodules if isinstance(part, tf_keras.layers.BatchNormalization)]

    frozen = garden.build(BackboneConfig(type="MobileNetV2", norm="frozen"))
    assert all("kernel" in v.name for v in frozen.trainable_variables) and len(frozen.trainable_variables) == 51
    np.testing.assert_allclose(frozen(images(), training=True)["5"], frozen(images())["5"], atol=1e-6)
    for norm in ("batch", "sync"):
        found = norms(garden.build(BackboneConfig(type="MobileNetV2", norm=norm)))
        assert {layer.synchronized for layer in found} == {norm == "sync"}


@pytest.mark.parametrize(
    "options, words",
    [
        ({"norm": "group"}, "batch, sync or frozen"),
        ({"multiplier": 0.0}, "must be positive"),
        ({"multiplier": -1.0}, "must be positive"),
        ({"type": "EfficientNetB0", "multiplier": 0.5}, "one size"),
    ],
)
def test_what_does_not_apply_is_refused(options, words):
    with pytest.raises(InputError, match=words):
        garden.build(small_config(**options).model.backbone)


def test_checkpoints_that_do_not_fit(tmp_path):
    prefix = save_as_model_garden_does(mobilenet(), tmp_path / "whole")

    ordinary = garden.build(small_config().model.backbone)

    def error_of(weights, normalization=None, **options):
        config = small_config(weights=str(weights), **options).model
        config = dataclasses.replace(config, **(normalization or {}))
        with pytest.raises(InputError) as raised:
            pretrained.initialize(garden.build(config.backbone) if options else ordinary, config)
        message = str(raised.value)
        assert "\n" not in message and len(message) < 450
        return message

    assert "nothing to download" in error_of("imagenet")
    assert "no checkpoint" in error_of(tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    assert "no checkpoint" in error_of(tmp_path / "empty")
    assert "--set 'model.std=[58.395,57.12,57.375]'" in error_of(prefix, {"std": (1.0, 1.0, 1.0)})
    assert "of this multiplier" in error_of(prefix, multiplier=0.5)
    assert "MobileNetV3Small" in error_of(prefix, type="MobileNetV3Small")
    other = tf.train.Checkpoint(model=tf.Variable(1.0)).save(str(tmp_path / "other"))
    assert "without the backbone of a MobileNetV2" in error_of(other)
    for part in (".index", ".data-00000-of-00001"):
        for keep in (0, 100, 0.5):
            damaged = tmp_path / "damaged"
            for suffix in (".index", ".data-00000-of-00001"):
                data = (tmp_path / "whole" / f"ckpt-7{suffix}").read_bytes()
                cut = int(keep * len(data)) if isinstance(keep, float) else keep
                damaged.with_name(f"damaged{suffix}").write_bytes(data[:cut] if suffix == part else data)
            assert "damaged" in error_of(damaged)
    damaged.with_name("damaged.data-00000-of-00001").unlink()
    assert "damaged" in error_of(damaged)


def test_a_mobile_backbone_runs_in_tflite_with_builtins():
    litert = pytest.importorskip("ai_edge_litert.interpreter")
    from polarmask_tf.export import tflite

    config = small_config(type="MobileNetV3Small", multiplier=0.5)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, size=(64, 64)))
    model = PolarMask(config, CLASSES)
    interpreter = litert.Interpreter(model_content=tflite.convert(model))
    found = interpreter.get_signature_runner()(images=random_images(0, 1).numpy())
    expected = model.detect(random_images(0, 1))
    assert found["num_detections"][0] == expected["num_detections"][0]
    np.testing.assert_allclose(found["detection_scores"], expected["detection_scores"], atol=1e-4)


def test_official_is_imported_only_where_it_is_used():
    code = (
        "import sys; from polarmask_tf.config import Config; from polarmask_tf.modeling import polarmask; "
        "from polarmask_tf.weights import pretrained; "
        "polarmask.PolarMask(Config(), 2); assert not any(m.split('.')[0] == 'official' for m in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
