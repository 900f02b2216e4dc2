"""weights/pretrained.py: ResNets that start from weights made elsewhere, against independent networks with those weights."""

import dataclasses
import itertools
import shlex
import sys
import urllib.error

import numpy as np
import pytest
import tensorflow as tf
import tf_keras

from polarmask_tf import config as configs
from polarmask_tf.config import BackboneConfig, ModelConfig
from polarmask_tf.errors import InputError
from polarmask_tf.modeling.backbones.resnet import ResNet
from polarmask_tf.weights import imagenet, pretrained
from polarmask_tf.weights.pretrained import TORCHVISION_NEEDS

CAFFE, TORCHVISION, LITE0 = (
    (needs["model.mean"], needs["model.std"]) for needs in (imagenet.RESNET_NEEDS, TORCHVISION_NEEDS, imagenet.LITE0_NEEDS)
)
LEVELS = ("2", "3", "4", "5")
R50 = {"block": "bottleneck", "blocks": (3, 4, 6, 3), "width": 64, "stem": "7x7"}
SMALL = {"block": "bottleneck", "blocks": (2, 1, 1, 1), "width": 8, "stem": "7x7", "stride_in": "3x3"}


def model_config(normalization=TORCHVISION, **backbone):
    return ModelConfig(backbone=BackboneConfig(**backbone), mean=normalization[0], std=normalization[1])


def built(config):
    backbone = ResNet(config.backbone)
    backbone.build((None, 64, 64, 3))
    return backbone


def started(config):
    backbone = built(config)
    pretrained.initialize(backbone, config)
    return backbone


def error_of(config, backbone=None):
    backbone = backbone or built(config)
    before = [v.numpy() for v in backbone.variables]
    with pytest.raises(InputError) as raised:
        pretrained.initialize(backbone, config)
    message = str(raised.value)
    assert "\n" not in message and len(message) < 600
    assert all(np.array_equal(a, v.numpy()) for a, v in zip(before, backbone.variables, strict=True))  # nothing half-loaded
    return message


def random_value(name, shape, rng):
    """Like weights of a trained network: signals neither die nor explode, and no two channels are alike."""
    if len(shape) == 4:
        fan_in = np.prod(shape) / max(shape[0], shape[-1])
        return rng.normal(0, np.sqrt(1.4 / fan_in), shape).astype(np.float32)
    if "var" in name or "gamma" in name or name.endswith("weight"):
        return rng.uniform(0.5, 1.5, shape).astype(np.float32)
    return rng.normal(0, 0.2, shape).astype(np.float32)


def assert_equal_features(found, expected):
    assert set(found) == set(LEVELS)
    for level in LEVELS:
        value, wanted = np.asarray(found[level]), np.asarray(expected[level])
        assert wanted.std() > 1e-3 and np.isfinite(wanted).all()
        np.testing.assert_allclose(value, wanted, rtol=0, atol=2e-4 * np.abs(wanted).max())


# ---- tf_keras.applications


def applications(kind="ResNet50", seed=0):
    network = getattr(tf_keras.applications, kind)(weights=None, include_top=False, input_shape=(None, None, 3))
    rng = np.random.default_rng(seed)
    for v in network.variables:
        v.assign(random_value(v.name.split("/")[-1], tuple(v.shape), rng))  # biases of convolutions are not zero
    return network


@pytest.fixture(scope="module")
def resnet50():
    return applications()


@pytest.fixture(scope="module")
def resnet50_h5(resnet50, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "resnet50_weights_tf_dim_ordering_tf_kernels_notop.h5"
    resnet50.save_weights(path)
    return path


def caffe(path, **options):
    return model_config(CAFFE, **{**R50, "stride_in": "1x1", "weights": str(path), **options})


def picture(size=(64, 96), seed=0):
    return np.random.default_rng(seed).integers(0, 256, (1, *size, 3)).astype(np.float32)


def features_of_applications(network, rgb):
    """By Keras' own preprocessing, at the last activation of each stage."""
    images = tf_keras.applications.resnet.preprocess_input(rgb.copy())
    ends = {level: f"conv{level}_block{{}}_out" for level in LEVELS}
    names = {layer.name for layer in network.layers}
    last = {n: name.format(max(i for i in range(1, 40) if name.format(i) in names)) for n, name in ends.items()}
    return tf_keras.Model(network.input, {n: network.get_layer(name).output for n, name in last.items()})(images)


@pytest.mark.parametrize("norm", ["frozen", "batch", "sync"])
def test_a_keras_file_gives_equal_features(resnet50, resnet50_h5, norm):
    config = caffe(resnet50_h5, norm=norm)
    backbone = started(config)
    rgb = picture()
    assert_equal_features(backbone((rgb - config.mean) / config.std), features_of_applications(resnet50, rgb))


def test_all_tensors_of_keras_are_used(resnet50):
    """Each is changed in turn by its own amount; one that were left out would change nothing."""
    first = imagenet.applications_tensors(resnet50)
    assert set(first) == set(pretrained.variables(built(caffe(""))))
    before = resnet50.get_weights()
    try:
        resnet50.set_weights([w + 0.1 for w in before])
        second = imagenet.applications_tensors(resnet50)
    finally:
        resnet50.set_weights(before)
    for name in first:
        # The moving mean and the bias that goes into it both moved by 0.1.
        moved = 0.0 if name.endswith("running_mean") else 0.1
        np.testing.assert_allclose(second[name] - first[name], moved, atol=1e-5)


def test_variances_take_up_the_difference_of_the_epsilons(resnet50):
    """In float32 hardly to be seen, so with variances as small as it."""
    before = resnet50.get_weights()
    try:
        for v in resnet50.variables:
            if "moving_variance" in v.name:
                v.assign(tf.fill(v.shape, 1e-8))
        variance = imagenet.applications_tensors(resnet50)["layer2.0.bn2.running_var"]
        np.testing.assert_allclose(variance.astype(np.float64) + 1e-5, 1e-8 + 1.001e-5, rtol=1e-6)
    finally:
        resnet50.set_weights(before)


def test_imagenet_is_what_keras_downloads(resnet50, resnet50_h5, monkeypatch):
    """The download itself is replaced: the file of this test under the name that Keras looks for."""
    asked = []

    def get_file(name, origin, **options):
        asked.append((name, origin))
        return str(resnet50_h5)

    monkeypatch.setattr(tf_keras.src.applications.resnet.data_utils, "get_file", get_file)
    config = caffe("imagenet")
    backbone = started(config)
    assert asked[0][0] == resnet50_h5.name and asked[0][1].startswith("https://")
    rgb = picture()
    assert_equal_features(backbone(rgb - config.mean), features_of_applications(resnet50, rgb))


def test_offline_without_weights(monkeypatch, tmp_path):
    def unreachable(*args, **kwargs):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(tf_keras.src.utils.data_utils, "urlretrieve", unreachable)
    monkeypatch.setenv("HOME", str(tmp_path))  # not the cache, where the weights may be
    message = error_of(caffe("imagenet"))
    assert "could not be downloaded" in message and "Name or service not known" in message
    assert "resnet50_weights_tf_dim_ordering_tf_kernels_notop.h5" in message and "model.backbone.weights=FILE" in message


def test_deeper_networks_of_keras():
    """Names alone for ResNet-152; features for ResNet-101."""
    network = applications("ResNet101")
    config = caffe("", blocks=(3, 4, 23, 3))
    backbone = built(config)
    pretrained.assign(pretrained.variables(backbone), imagenet.applications_tensors(network), "here")
    rgb = picture((32, 32))
    assert_equal_features(backbone(rgb - config.mean), features_of_applications(network, rgb))


def test_one_message_names_every_setting_ready_to_paste(tmp_path, monkeypatch):
    """Of a config with nothing right: with what it says pasted, the next message is about the file."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "none.h5").touch()
    ours = configs.load("shapes", ["model.backbone.weights=none.h5", "model.backbone.norm=group", "model.mean=[0,0,0]"])
    message = error_of(ours.model)
    assert "ResNet-50; 101 has blocks [3,4,23,3], 152 [3,8,36,3]" in message
    words = shlex.split(message.partition("config's: ")[2].partition(" (ResNet")[0])
    pasted = [after for word, after in itertools.pairwise(words) if word == "--set"]
    assert len(pasted) == 9 and "model.backbone.stride_in=1x1" in pasted and "model.backbone.norm=frozen" in pasted
    mended = configs.load("shapes", ["model.backbone.weights=none.h5", "model.backbone.norm=group", *pasted])
    assert error_of(mended.model).startswith("none.h5: ")
    (tmp_path / "none.h5").unlink()
    assert error_of(mended.model) == error_of(ours.model) == "model.backbone.weights: none.h5: no such file"


@pytest.mark.parametrize("options", [{"stem": "3x3"}, {"blocks": (3, 4, 6, 4)}, {"block": "basic"}, {"groups": 32}])
def test_keras_has_three_networks(resnet50_h5, options):
    [(name, value)] = options.items()
    backbone = built(caffe(""))
    wanted = {"stem": "7x7", "blocks": "[3,4,6,3]", "block": "bottleneck", "groups": "1"}[name]
    assert f"model.backbone.{name}={wanted}" in error_of(caffe(resnet50_h5, **{name: value}), backbone)


def test_keras_needs_its_normalisation_and_strides(resnet50_h5):
    config = caffe(resnet50_h5)
    backbone = built(config)
    assert error_of(caffe(resnet50_h5, stride_in="3x3"), backbone).endswith(": --set model.backbone.stride_in=1x1")
    for wrong, said in (
        ({"mean": (103.939, 116.779, 123.68)}, "'model.mean=[123.68,116.779,103.939]'"),
        ({"std": (58.395, 57.12, 57.375)}, "'model.std=[1.0,1.0,1.0]'"),
        ({"normalization": "image"}, "model.normalization=fixed"),
    ):
        assert error_of(dataclasses.replace(config, **wrong), backbone).endswith(f": --set {said}")
    assert "--set model.backbone.norm=frozen" in error_of(caffe(resnet50_h5, norm="group"), backbone)


def test_keras_files_that_are_none(resnet50_h5, tmp_path):
    config, backbone = caffe(""), built(caffe("", blocks=(1, 1, 1, 1)))  # refused before its size matters

    def refused(path):
        backbone_config = dataclasses.replace(config.backbone, weights=str(path))
        message = error_of(dataclasses.replace(config, backbone=backbone_config), backbone)
        assert str(path) in message
        return message

    assert "no such file" in refused(tmp_path / "a.h5")
    data = resnet50_h5.read_bytes()
    for content in (b"", data[:1000], data[: len(data) // 2], b"<html></html>" * 99):
        (tmp_path / "a.h5").write_bytes(content)
        assert "truncated, or not an HDF5" in refused(tmp_path / "a.h5")
    tf_keras.Sequential([tf_keras.layers.Dense(2, input_shape=(3,))]).save_weights(tmp_path / "b.h5")
    assert "not the weights of ResNet50" in refused(tmp_path / "b.h5")
    deeper = error_of(caffe(resnet50_h5, blocks=(3, 4, 23, 3)), backbone)
    assert "not the weights of ResNet101" in deeper
    assert "is expected" in refused(tmp_path / "a.ckpt")


# ---- torchvision's names


def torch_resnet(block, blocks, width, groups, group_width):
    """A ResNet in torch from the description (He et al., table 1, stride in the 3x3; Xie et al., table 1), with names as in
    torchvision: modules by the names that its files show."""
    torch = pytest.importorskip("torch")
    nn = torch.nn

    class Residual(nn.Module):
        def __init__(self, cin, stage, stride):
            super().__init__()
            base, expansion = width * 2**stage, 1 if block == "basic" else 4
            inner = base if groups == 1 else groups * group_width * 2**stage
            if block == "basic":
                shapes = [(cin, base, 3, stride, 1), (base, base, 3, 1, 1)]
            else:
                shapes = [(cin, inner, 1, 1, 1), (inner, inner, 3, stride, groups), (inner, 4 * base, 1, 1, 1)]
            self.count = len(shapes)
            for i, (a, b, k, s, g) in enumerate(shapes, 1):
                setattr(self, f"conv{i}", nn.Conv2d(a, b, k, s, k // 2, groups=g, bias=False))
                setattr(self, f"bn{i}", nn.BatchNorm2d(b))
            out = base * expansion
            self.downsample = None
            if stride > 1 or cin != out:
                self.downsample = nn.Sequential(nn.Conv2d(cin, out, 1, stride, bias=False), nn.BatchNorm2d(out))

        def forward(self, x):
            y = x
            for i in range(1, self.count + 1):
                y = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(y))
                if i < self.count:
                    y = y.relu()
            return (y + (x if self.downsample is None else self.downsample(x))).relu()

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.bn1 = nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width)
            channels = width
            for stage, count in enumerate(blocks):
                layers = []
                for i in range(count):
                    layers.append(Residual(channels, stage, 2 if stage and i == 0 else 1))
                    channels = width * 2**stage * (1 if block == "basic" else 4)
                setattr(self, f"layer{stage + 1}", nn.Sequential(*layers))
            self.fc = nn.Linear(channels, 10)

        def forward(self, x):
            x = nn.functional.max_pool2d(self.bn1(self.conv1(x)).relu(), 3, 2, 1)
            features = {}
            for level in LEVELS:
                x = features[level] = getattr(self, f"layer{int(level) - 1}")(x)
            return features

    network = Network().eval()
    rng = np.random.default_rng(0)
    state = {
        name: torch.tensor(random_value(name, tuple(t.shape), rng)) if t.is_floating_point() else t
        for name, t in network.state_dict().items()
    }
    network.load_state_dict(state)
    return network


def torch_features(network, rgb):
    import torch

    images = (rgb - TORCHVISION[0]) / TORCHVISION[1]
    with torch.no_grad():
        features = network(torch.tensor(images.transpose(0, 3, 1, 2), dtype=torch.float32))
    return {level: f.numpy().transpose(0, 2, 3, 1) for level, f in features.items()}


def describe(**options):
    values = BackboneConfig(**options)
    return {name: getattr(values, name) for name in ("block", "blocks", "width", "groups", "group_width")}


def save_torch(path, content):
    pytest.importorskip("torch").save(content, path)
    return path


def save_numpy(path, state):
    np.savez(path, **{name: t.numpy() for name, t in state.items()})
    return path


@pytest.fixture(scope="module")
def small():
    return torch_resnet(**describe(**SMALL))


NETWORKS = {
    "resnet18": {**R50, "block": "basic", "blocks": (2, 2, 2, 2)},
    "resnet101": {**R50, "blocks": (3, 4, 23, 3)},
    "resnext 64x4d, two blocks a stage": {**R50, "blocks": (2, 2, 2, 2), "groups": 64, "group_width": 4},
    "resnext, narrow": {**SMALL, "groups": 4, "group_width": 3},
}


@pytest.mark.parametrize("name", NETWORKS)
def test_torch_files_give_equal_features(name, tmp_path):
    options = {**NETWORKS[name], "stride_in": "3x3"}
    network = torch_resnet(**describe(**options))
    path = save_torch(tmp_path / "a.pth", network.state_dict())
    config = model_config(**options, weights=str(path), norm="frozen")
    rgb = picture((64, 96))
    backbone = started(config)
    expected = torch_features(network, rgb)
    images = tf.constant((rgb - config.mean) / config.std, tf.float32)
    assert_equal_features(backbone(images), expected)
    assert_equal_features(tf.function(lambda x: backbone(x, training=False))(images), expected)


@pytest.mark.parametrize("prefix", ["", "module.", "backbone.", "module.backbone."])
@pytest.mark.parametrize("kind", ["pth", "npz", "wrapped", "half"])
def test_forms_of_torch_files(small, prefix, kind, tmp_path, capsys):
    state = {prefix + name: t for name, t in small.state_dict().items()}
    if "backbone." in prefix:  # of a detector
        outside = prefix.removesuffix("backbone.")
        state |= {f"{outside}neck.conv.weight": small.conv1.weight.detach(), f"{outside}head.bias": small.fc.bias.detach()}
    if kind == "half":
        state = {name: t.half() if t.is_floating_point() else t for name, t in state.items()}
    path = tmp_path / ("a.npz" if kind == "npz" else "a.pth")
    if kind == "npz":
        save_numpy(path, state)
    else:
        save_torch(path, {"meta": {}, "state_dict": state, "optimizer": {}} if kind == "wrapped" else state)
    config = model_config(**SMALL, weights=str(path))
    backbone, rgb = started(config), picture()
    features, expected = backbone((rgb - config.mean) / config.std), torch_features(small, rgb)
    if kind == "half":
        assert all(np.abs(features[n] - expected[n]).max() < 0.02 * expected[n].max() for n in LEVELS)
        assert "half precision" in capsys.readouterr().err
    else:
        assert_equal_features(features, expected)
        assert ("2 tensors outside backbone. are not used" in capsys.readouterr().err) == ("backbone." in prefix)


@pytest.mark.parametrize("kind", ["npz", "pth"])
def test_no_file_needs_torch(small, tmp_path, monkeypatch, kind):
    save = {"npz": save_numpy, "pth": save_torch}[kind]
    config = model_config(**SMALL, weights=str(save(tmp_path / f"a.{kind}", small.state_dict())))
    expected = torch_features(small, picture())
    monkeypatch.setitem(sys.modules, "torch", None)
    assert_equal_features(started(config)((picture() - config.mean) / config.std), expected)


def test_torch_files_of_other_networks(small, tmp_path):
    state = small.state_dict()
    backbone = built(model_config(**SMALL))

    def refused(changed):
        path = save_torch(tmp_path / "a.pth", changed)
        message = error_of(model_config(**SMALL, weights=str(path)), backbone)
        assert str(path) in message and "another network" in message
        return message

    lacking = {n: t for n, t in state.items() if n not in ("layer1.0.conv2.weight", "bn1.running_mean")}
    assert "2 missing (bn1.running_mean, layer1.0.conv2.weight)" in refused(lacking)
    assert "1 unexpected (layer9.0.conv1.weight)" in refused(state | {"layer9.0.conv1.weight": state["conv1.weight"]})
    turned = state | {"layer1.0.conv1.weight": state["layer1.0.conv1.weight"][:4]}
    assert "1 of another shape (layer1.0.conv1.weight (1x1x8x4 instead of 1x1x8x8))" in refused(turned)
    assert "more" in refused({f"net.{n}": t for n, t in state.items()})
    path = save_torch(tmp_path / "a.pth", state)
    for options, said in (
        ({"blocks": (3, 1, 1, 1)}, "'model.backbone.blocks=[2,1,1,1]'"),
        ({"width": 4}, "model.backbone.width=8"),
        ({"widths": (8, 16, 32, 32)}, "'model.backbone.widths=[]'"),
        ({"groups": 4, "group_width": 2}, "model.backbone.groups=1"),
        ({"block": "basic"}, "model.backbone.block=bottleneck"),
        ({"stem": "3x3", "stem_width": 4}, "model.backbone.stem=7x7 --set model.backbone.stem_width=0"),
    ):
        message = error_of(model_config(**{**SMALL, **options}, weights=str(path)), backbone)
        assert message == f"{path}: these weights need other settings than the config's: --set {said}"


def test_torch_files_that_are_none(small, tmp_path):
    whole = save_torch(tmp_path / "whole.pth", small.state_dict()).read_bytes()
    backbone = built(model_config(**SMALL))
    path = tmp_path / "a.pth"
    config = model_config(**SMALL, weights=str(path))
    assert "no such file" in error_of(config, backbone)
    for content in (b"", whole[: len(whole) // 2], b"<html></html>" * 99):
        path.write_bytes(content)
        assert "truncated, or not a PyTorch" in error_of(config, backbone)
    save_torch(path, small.state_dict() | {"layer1.0.conv1.weight": small.conv1.weight.detach() * np.inf})
    assert "not finite" in error_of(config, backbone)


def test_torch_files_need_torchvisions_normalisation_and_strides(small, tmp_path):
    path = save_torch(tmp_path / "a.pth", small.state_dict())
    backbone = built(model_config(**SMALL))
    message = error_of(model_config(CAFFE, **{**SMALL, "stride_in": "1x1"}, norm="group", weights=str(path)), backbone)
    assert message.endswith(
        "config's: --set model.backbone.stride_in=3x3 --set 'model.mean=[123.675,116.28,103.53]' "
        "--set 'model.std=[58.395,57.12,57.375]' --set model.backbone.norm=frozen"
    )


# ---- checkpoints of tf-models-official


@pytest.mark.parametrize("folder", ["plain", "with [1] brackets"])
def test_a_checkpoint_of_model_garden_may_lie_anywhere(tmp_path, folder):
    def network():
        return tf_keras.Sequential([tf_keras.layers.Dense(3, input_shape=(2,))])

    theirs, mine = network(), network()
    (tmp_path / folder).mkdir()
    path = tf.train.Checkpoint(backbone=theirs, step=tf.Variable(7)).save(str(tmp_path / folder / "ckpt"))
    for given in (path, f"{path}.index", str(tmp_path / folder)):
        mine.set_weights([np.zeros_like(weight) for weight in mine.get_weights()])
        pretrained._load_garden(mine, given, "MobileNetV2")
        for a, b in zip(mine.get_weights(), theirs.get_weights(), strict=True):
            np.testing.assert_array_equal(a, b)
    with pytest.raises(InputError, match="without the backbone of a MobileNetV2"):
        pretrained._load_garden(tf_keras.Sequential([tf_keras.layers.Dense(4, input_shape=(2,))]), path, "MobileNetV2")
