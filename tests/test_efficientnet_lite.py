"""EfficientNet-Lite0 with the weights of the package, against PyTorch's own operators on the same tensors."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
import tf_keras

from polarmask_tf import config as configs
from polarmask_tf.config import BackboneConfig, ModelConfig
from polarmask_tf.errors import InputError
from polarmask_tf.modeling.backbones import efficientnet_lite
from polarmask_tf.modeling.polarmask import PolarMask
from polarmask_tf.weights import imagenet, pretrained
from polarmask_tf.weights.start import start_from

LEVELS = ("2", "3", "4", "5")
# Blocks of each stage: kernel, stride of the first, number.
STAGES = ((3, 1, 1), (3, 2, 2), (5, 2, 2), (3, 2, 3), (5, 1, 3), (5, 2, 4), (3, 1, 1))


def model_config(**backbone):
    options = {"type": "EfficientNetLite0", "weights": "imagenet", "norm": "frozen", **backbone}
    return ModelConfig(backbone=BackboneConfig(**options), mean=(127.0,) * 3, std=(128.0,) * 3)


@pytest.fixture(scope="module")
def file():
    pytest.importorskip(imagenet.LITE0_PACKAGE)
    return imagenet.lite0_file()


@pytest.fixture(scope="module")
def state(file):
    return pytest.importorskip("torch").load(file, weights_only=True)


def torch_features(state, rgb):
    """From the description alone: MBConv by torch.nn.functional, TensorFlow's SAME padding, (x - 127) / 128."""
    import torch
    from torch.nn import functional

    def conv(x, name, stride, groups=1):
        kernel = state[f"{name}.weight"]
        pads = []
        for side in (x.shape[3], x.shape[2]):
            total = max((-(-side // stride) - 1) * stride + kernel.shape[2] - side, 0)
            pads += [total // 2, total - total // 2]
        return functional.conv2d(functional.pad(x, pads), kernel, stride=stride, groups=groups)

    def norm(x, name):
        values = (state[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
        return functional.batch_norm(x, *values, eps=1e-3)

    def block(x, at, stride):
        y = x
        if f"{at}._expand_conv.weight" in state:
            y = functional.relu6(norm(conv(y, f"{at}._expand_conv", 1), f"{at}._bn0"))
        y = functional.relu6(norm(conv(y, f"{at}._depthwise_conv", stride, y.shape[1]), f"{at}._bn1"))
        y = norm(conv(y, f"{at}._project_conv", 1), f"{at}._bn2")
        return x + y if y.shape == x.shape else y

    with torch.no_grad():
        x = (torch.tensor(rgb.transpose(0, 3, 1, 2)) - 127) / 128
        x = functional.relu6(norm(conv(x, "_conv_stem", 2), "_bn0"))
        number, after = 0, []
        for kernel, stride, count in STAGES:
            for i in range(count):
                assert state[f"_blocks.{number}._depthwise_conv.weight"].shape[2] == kernel
                x = block(x, f"_blocks.{number}", stride if i == 0 else 1)
                number += 1
            after.append(x)
    return {level: after[stage].numpy().transpose(0, 2, 3, 1) for level, stage in zip(LEVELS, (1, 2, 4, 6), strict=True)}


def picture(size=(96, 160)):
    """Smooth, as photographs are."""
    rng = np.random.default_rng(0)
    coarse = rng.uniform(0, 255, (1, size[0] // 16, size[1] // 16, 3))
    return tf.image.resize(coarse, size, "bicubic").numpy().clip(0, 255).astype(np.float32)


@pytest.mark.parametrize("norm", ["frozen", "batch", "sync"])
def test_features_equal_the_pytorch_models(state, norm):
    config = model_config(norm=norm)
    backbone = efficientnet_lite.build(config.backbone)
    pretrained.initialize(backbone, config)
    rgb = picture()
    found, expected = backbone((rgb - 127) / 128), torch_features(state, rgb)
    assert [expected[level].shape[-1] for level in LEVELS] == [24, 40, 112, 320]
    for level in LEVELS:
        assert expected[level].std() > 0.5
        np.testing.assert_allclose(found[level], expected[level], rtol=0, atol=1e-4 * np.abs(expected[level]).max())


def test_every_tensor_of_the_file_is_accounted_for(state):
    backbone = efficientnet_lite.build(model_config().backbone)
    named = imagenet.lite0_variables(backbone)
    assert {id(v) for v in named.values()} == {id(v) for v in backbone.variables}
    theirs = {".".join(part.removeprefix("_") for part in name.split(".")) for name in state}
    left = {name for name in theirs - set(named) if not name.endswith("num_batches_tracked")}
    assert {name.split(".")[0] for name in left} == {"conv_head", "bn1", "fc"} and set(named) < theirs


def test_the_file_itself_may_be_named(file, tmp_path):
    config = model_config(weights=str(file))
    backbone = efficientnet_lite.build(config.backbone)
    pretrained.initialize(backbone, config)
    kernel = backbone.get_layer("blocks.0.depthwise_conv").depthwise_kernel
    assert kernel.shape == (3, 3, 32, 1) and float(tf.math.reduce_std(kernel)) > 0.1
    (tmp_path / "cut.pth").write_bytes(file.read_bytes()[:100_000])
    with pytest.raises(InputError, match=r"cut\.pth: truncated"):
        pretrained.initialize(backbone, model_config(weights=str(tmp_path / "cut.pth")))


def test_a_training_starts_from_the_file(file, capsys):
    config = configs.load("edge_lite0", ["model.backbone.weights=''", "data.size=[64,64]"])
    model = PolarMask(config, 2)
    start_from(model, file)
    expected = efficientnet_lite.build(model_config().backbone)
    pretrained.initialize(expected, model_config())
    np.testing.assert_array_equal(model.backbone(images())["5"], expected(images())["5"])
    assert f"starting from {file}: {len(expected.variables)} of " in capsys.readouterr().out


def test_its_config_starts_from_the_package(file):
    config = configs.load("edge_lite0")
    backbone = efficientnet_lite.build(config.model.backbone)
    before = backbone.get_layer("conv_stem").kernel.numpy()
    pretrained.initialize(backbone, config.model)
    assert np.abs(backbone.get_layer("conv_stem").kernel - before).max() > 0.1


def error_of(config, backbone=None):
    with pytest.raises(InputError) as raised:
        pretrained.initialize(backbone or efficientnet_lite.build(config.backbone), config)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_its_normalisation_is_asked_for_in_one_message():
    config = dataclasses.replace(ModelConfig(backbone=model_config().backbone), normalization="image")
    assert error_of(config) == (
        "imagenet: these weights need other settings than the config's: --set model.normalization=fixed "
        "--set 'model.mean=[127.0,127.0,127.0]' --set 'model.std=[128.0,128.0,128.0]'"
    )


def test_without_the_package_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, imagenet.LITE0_PACKAGE, None)
    assert "pip install 'polarmask_tf[imagenet]'" in error_of(model_config())


@pytest.mark.parametrize("content", [None, b"", b"another file"])
def test_another_file_under_its_name_is_refused(monkeypatch, tmp_path, content):
    folder = tmp_path / imagenet.LITE0_PACKAGE
    (folder / "models").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('is not to be run')")
    if content is not None:
        (folder / imagenet.LITE0_FILE).write_bytes(content)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, imagenet.LITE0_PACKAGE, raising=False)
    message = error_of(model_config())
    assert str(tmp_path) in message and ("cannot be read" if content is None else "sha256") in message


def test_the_package_is_not_imported(file):
    code = (
        "import sys; from polarmask_tf.weights import imagenet; print(imagenet.lite0_file()); "
        f"assert '{imagenet.LITE0_PACKAGE}' not in sys.modules and 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and Path(done.stdout.strip()) == file, done.stderr[-2000:]


def images(size=64):
    return tf.constant(np.random.default_rng(0).normal(size=(2, size, size, 3)), tf.float32)


def test_freezing_by_level():
    """What is frozen computes the same in training, BatchNorm included; what is not has BatchNorm of the batch."""
    x, counts = images(), []
    for freeze_at in range(6):
        backbone = efficientnet_lite.build(BackboneConfig(type="EfficientNetLite0", freeze_at=freeze_at))
        inference, training = backbone(x), backbone(x, training=True)
        same = [bool(np.allclose(inference[n], training[n], atol=1e-5)) for n in LEVELS]
        assert same == [freeze_at >= int(n) for n in LEVELS]
        counts.append(len(backbone.trainable_variables))
    assert counts[0] - counts[1] == 3 and all(np.diff(counts) < 0) and counts[-1] == 0


def test_norms_and_gradients():
    def norms(backbone):
        return [layer for layer in backbone.layers if isinstance(layer, tf_keras.layers.BatchNormalization)]

    frozen = efficientnet_lite.build(BackboneConfig(type="EfficientNetLite0", norm="frozen"))
    assert all("kernel" in v.name for v in frozen.trainable_variables)
    for norm in ("batch", "sync"):
        backbone = efficientnet_lite.build(BackboneConfig(type="EfficientNetLite0", norm=norm))
        assert {(layer.synchronized, layer.epsilon) for layer in norms(backbone)} == {(norm == "sync", 1e-3)}
    backbone = efficientnet_lite.build(BackboneConfig(type="EfficientNetLite0"), dtype="mixed_bfloat16")
    with tf.GradientTape() as tape:
        features = backbone(tf.cast(images(), tf.bfloat16), training=True)
        loss = tf.add_n([tf.reduce_sum(tf.cast(f, tf.float32)) for f in features.values()])
    assert all(f.dtype == tf.bfloat16 for f in features.values())
    assert all(g is not None for g in tape.gradient(loss, backbone.trainable_variables))


@pytest.mark.parametrize("options, words", [({"norm": "group"}, "batch, sync or frozen"), ({"multiplier": 0.5}, "one size")])
def test_what_does_not_apply_is_refused(options, words):
    with pytest.raises(InputError, match=words):
        efficientnet_lite.build(BackboneConfig(type="EfficientNetLite0", **options))
