"""modeling/resnet.py and layers.py: grouped convolution, what is frozen, synchronised statistics, sizes of known networks."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
import tf_keras

from helpers.networks import images, sync_model, sync_step
from polarmask_tf.config import BackboneConfig
from polarmask_tf.modeling.backbones.resnet import ResNet
from polarmask_tf.modeling.layers import Conv, grouped_conv2d, norm

LEVELS = "2345"


def resnext(**options):
    return ResNet(BackboneConfig(**{"block": "bottleneck", "width": 8, "groups": 4, "group_width": 2, **options}))


def randomize(model, seed=0):
    """Weights that leave no symmetry: also gammas, betas and statistics that are neither 0 nor 1."""
    rng = np.random.default_rng(seed)
    for v in model.variables:
        name = v.name.rpartition("/")[2]
        if "kernel" in name:
            v.assign(rng.normal(0, np.sqrt(2 / np.prod(v.shape[:-1])), v.shape))
        else:
            v.assign(rng.uniform(0.5, 1.5, v.shape) if "gamma" in name or "variance" in name else rng.normal(0, 0.1, v.shape))


# ---- grouped convolution


def by_hand(x, kernel, stride):
    """Grouped 3x3 convolution with padding 1, in float64, from its definition."""
    x = np.pad(x.astype(np.float64), [(0, 0), (1, 1), (1, 1), (0, 0)])
    per_group, filters = kernel.shape[2:]
    groups = x.shape[3] // per_group
    y = np.zeros((len(x), (x.shape[1] - 3) // stride + 1, (x.shape[2] - 3) // stride + 1, filters))
    for i, j, f in np.ndindex(y.shape[1:]):
        group = f // (filters // groups)
        window = x[:, i * stride : i * stride + 3, j * stride : j * stride + 3, group * per_group : (group + 1) * per_group]
        y[:, i, j, f] = (window * kernel[..., f]).sum((1, 2, 3))
    return y


@pytest.mark.parametrize("groups", [2, 4])
@pytest.mark.parametrize("stride", [1, 2])
def test_grouped_convolution_from_its_definition(groups, stride):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 6, 8, 8)).astype(np.float32)
    conv = Conv(12, 3, stride, groups=groups)
    conv(x)
    assert conv.conv.kernel.shape == (3, 3, 8 // groups, 12)
    np.testing.assert_allclose(conv(x), by_hand(x, conv.conv.kernel.numpy(), stride), atol=1e-5)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("graph", [False, True])
def test_gradients_of_grouped_convolution_are_torchs(stride, graph):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(1)
    x, kernel = rng.normal(size=(2, 8, 10, 12)).astype(np.float32), rng.normal(size=(3, 3, 3, 8)).astype(np.float32)

    def gradients(x, kernel):
        with tf.GradientTape() as tape:
            tape.watch([x, kernel])
            padded = tf.pad(x, [[0, 0], [1, 1], [1, 1], [0, 0]])
            loss = tf.reduce_sum(tf.square(grouped_conv2d(padded, kernel, (stride, stride), "VALID")))
        return tape.gradient(loss, [x, kernel])

    unknown = [tf.TensorSpec([None, None, None, 12]), tf.TensorSpec([3, 3, 3, 8])]
    dx, dkernel = (tf.function(gradients, input_signature=unknown) if graph else gradients)(tf.constant(x), tf.constant(kernel))
    tx = torch.tensor(x.transpose(0, 3, 1, 2)).requires_grad_()
    tk = torch.tensor(kernel.transpose(3, 2, 0, 1)).requires_grad_()
    torch.nn.functional.conv2d(tx, tk, stride=stride, padding=1, groups=4).square().sum().backward()
    np.testing.assert_allclose(dx, tx.grad.numpy().transpose(0, 2, 3, 1), rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(dkernel, tk.grad.numpy().transpose(2, 3, 1, 0), rtol=1e-4, atol=1e-3)


def test_gradients_of_grouped_convolution_are_its_slopes():
    """Without torch: the loss along one random direction in float64, left and right of here."""
    rng = np.random.default_rng(2)
    x, kernel = tf.constant(rng.normal(size=(1, 5, 6, 6))), tf.constant(rng.normal(size=(3, 3, 2, 9)))
    weights = tf.constant(rng.normal(size=(1, 5, 6, 9)))
    ways = [tf.constant(rng.normal(size=v.shape)) for v in (x, kernel)]

    def loss(x, kernel):
        return tf.reduce_sum(weights * tf.sin(grouped_conv2d(x, kernel, (1, 1), "SAME")))

    with tf.GradientTape() as tape:
        tape.watch([x, kernel])
        value = loss(x, kernel)
    slope = sum(tf.reduce_sum(g * w) for g, w in zip(tape.gradient(value, [x, kernel]), ways, strict=True))
    h = 1e-5
    ahead, behind = (loss(x + s * ways[0], kernel + s * ways[1]) for s in (h, -h))
    np.testing.assert_allclose(slope, (ahead - behind) / (2 * h), rtol=1e-6)


def test_a_gpu_takes_tensorflows_own_gradient(monkeypatch):
    """One operation for all groups, where a CPU gets one for each: the tensors' device decides."""
    monkeypatch.setattr(tf.config, "list_logical_devices", lambda kind=None: ["a GPU"])
    x, kernel = tf.ones([1, 4, 4, 4]), tf.ones([3, 3, 2, 4])

    @tf.function
    def gradient(device):
        with tf.device(device), tf.GradientTape() as tape:
            tape.watch(x)
            y = grouped_conv2d(tf.identity(x), kernel, (1, 1), "SAME")
        return tape.gradient(y, x)

    def operations(device):
        graph = gradient.get_concrete_function(device).graph
        return sum(op.type == "Conv2DBackpropInput" for op in graph.get_operations())

    assert operations(None) == 1 and operations("CPU:0") == 2  # the latter on a machine that also has a GPU


def save(model, shape, folder):
    module = tf.Module()
    module.variables_ = model.variables

    @tf.function(input_signature=[tf.TensorSpec(shape, name="x")])
    def run(x):
        return {f"c{level}": feature for level, feature in model(x).items()}

    tf.saved_model.save(module, str(folder), signatures=run)


def test_inference_in_a_graph_is_inference_outside(tmp_path):
    """Grouped convolution, BatchNorm and ReLU in a row: what the graph optimiser fuses into an op that cannot do it."""
    model = resnext(stride_in="1x1")
    x = images()
    model(x)
    randomize(model)
    expected = model(x)
    graph = tf.function(lambda x: model(x))
    for level in LEVELS:
        np.testing.assert_allclose(graph(x)[level], expected[level], rtol=1e-4, atol=1e-4)
    save(model, [None, None, None, 3], tmp_path)
    served = tf.saved_model.load(str(tmp_path)).signatures["serving_default"](x)
    for level in LEVELS:
        np.testing.assert_allclose(served[f"c{level}"], expected[level], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("stride_in", ["1x1", "3x3"])
def test_resnext_runs_in_tflite_with_builtins(tmp_path, stride_in):
    litert = pytest.importorskip("ai_edge_litert.interpreter")
    model = resnext(stride_in=stride_in)
    x = images(1)
    model(x)
    randomize(model)
    save(model, [1, 64, 64, 3], tmp_path)
    converter = tf.lite.TFLiteConverter.from_saved_model(str(tmp_path))
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS]
    interpreter = litert.Interpreter(model_content=converter.convert())
    found = interpreter.get_signature_runner()(x=x.numpy())
    for level, expected in model(x).items():
        np.testing.assert_allclose(found[f"c{level}"], expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
def test_resnext_learns(policy):
    tf_keras.mixed_precision.set_global_policy(policy)
    try:
        tf_keras.utils.set_random_seed(0)
        model, x = resnext(), images(4, (32, 32))
        optimizer = tf_keras.optimizers.Adam(0.01)

        @tf.function
        def step():
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean(tf.square(tf.cast(model(x, training=True)["5"], tf.float32) - 1.0))
            gradients = tape.gradient(loss, model.trainable_variables)
            optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
            return loss, gradients

        model(x)
        optimizer.build(model.trainable_variables)
        losses = []
        for _ in range(16):
            loss, gradients = step()
            losses.append(float(loss))
        assert all(np.isfinite(g).all() and np.any(g) for g in gradients)
        assert losses[-1] < 0.5 * losses[0]
    finally:
        tf_keras.mixed_precision.set_global_policy("float32")


# ---- sizes of known networks


PUBLISHED = {  # torchvision's counts, of which the classifier holds 2,049,000
    "resnet50": (25_557_032, {"blocks": (3, 4, 6, 3)}),
    "resnet101": (44_549_160, {"blocks": (3, 4, 23, 3)}),
    "resnext50_32x4d": (25_028_904, {"blocks": (3, 4, 6, 3), "groups": 32}),
    "resnext101_64x4d": (83_455_272, {"blocks": (3, 4, 23, 3), "groups": 64}),
}


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("stride_in", ["1x1", "3x3"])
def test_published_numbers_of_parameters(name, stride_in):
    count, options = PUBLISHED[name]
    model = ResNet(BackboneConfig(block="bottleneck", width=64, group_width=4, stride_in=stride_in, **options))
    with tf.Graph().as_default():  # shapes alone, without the memory
        features = model(tf.zeros([1, 64, 96, 3]))
        assert sum(int(np.prod(v.shape)) for v in model.trainable_variables) == count - 2_049_000
    assert {n: tuple(f.shape) for n, f in features.items()} == {
        n: (1, 64 >> int(n), 96 >> int(n), 64 << int(n)) for n in LEVELS
    }


def test_groups_have_the_widths_of_the_config():
    model = resnext(groups=4, group_width=3, blocks=(1, 1, 1, 2))
    model(images(1))
    for stage, blocks in enumerate(model.stages):
        for block in blocks:
            assert block.convs[1].conv.kernel.shape == (3, 3, 3 * 2**stage, 12 * 2**stage)
            assert block.convs[2].conv.kernel.shape == (1, 1, 12 * 2**stage, 32 * 2**stage)


@pytest.mark.parametrize(("block", "expansion"), [("basic", 1), ("bottleneck", 4)])
def test_a_width_for_each_stage(block, expansion):
    model = ResNet(BackboneConfig(block=block, stem="6x6", blocks=(1, 2, 1, 1), widths=(16, 16, 48, 32), width=99))
    features = model(images())
    assert [features[n].shape[-1] for n in LEVELS] == [expansion * n for n in (16, 16, 48, 32)]
    assert [features[n].shape[1] for n in LEVELS] == [images().shape[1] // 2**n for n in (2, 3, 4, 5)]
    assert model.stem.conv.kernel.shape == (6, 6, 3, 16) and len(model.stages[1]) == 2
    as_before = ResNet(BackboneConfig(block=block, width=12, widths=(12, 24, 48, 96)))
    shapes = [
        [w.shape for w in (m(images()), m)[1].weights] for m in (as_before, ResNet(BackboneConfig(block=block, width=12)))
    ]
    assert shapes[0] == shapes[1]


# ---- what is frozen


def parts(model):
    """Variables of the stem, C2, C3, C4 and C5."""
    stem = [model.stem, model.stem_norm, *([model.stem2, model.stem2_norm] if model.config.stem == "3x3" else [])]
    return [[v for layer in part for v in layer.variables] for part in (stem, *model.stages)]


@pytest.mark.parametrize("stem", ["7x7", "3x3", "6x6"])
@pytest.mark.parametrize("freeze_at", range(6))
def test_frozen_parts_do_not_change(freeze_at, stem):
    model, x = ResNet(BackboneConfig(width=8, stem=stem, freeze_at=freeze_at, norm="batch")), images(4)
    model(x)
    before = [[v.numpy() for v in part] for part in parts(model)]
    learning = {id(v) for v in model.trainable_variables}
    assert [any(id(v) in learning for v in part) for part in parts(model)] == [i >= freeze_at for i in range(5)]
    with tf.GradientTape() as tape:
        loss = tf.add_n([tf.reduce_mean(tf.square(c)) for c in model(x, training=True).values()])
    gradients = tape.gradient(loss, model.trainable_variables)
    assert all(g is not None for g in gradients)
    optimizer = tf_keras.optimizers.SGD(0.1)
    optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
    for i, (old, part) in enumerate(zip(before, parts(model), strict=True)):
        changed = [not np.array_equal(a, v.numpy()) for a, v in zip(old, part, strict=True)]
        assert all(changed) if i >= freeze_at else not any(changed)  # statistics included


def test_frozen_parts_compute_the_same_in_training():
    model, x = ResNet(BackboneConfig(width=8, freeze_at=3)), images()
    model(x)
    randomize(model)
    inference, training = model(x), model(x, training=True)
    assert [np.allclose(inference[n], training[n], rtol=1e-4, atol=1e-4) for n in LEVELS] == [True, True, False, False]


def test_frozen_batchnorm_never_learns():
    model, x = ResNet(BackboneConfig(width=8, norm="frozen")), images()
    model(x)
    randomize(model)
    before = {v.ref(): v.numpy() for v in model.variables}
    inference, training = model(x), model(x, training=True)
    for level in LEVELS:
        np.testing.assert_allclose(training[level], inference[level], rtol=1e-4, atol=1e-4)
    assert all("kernel" in v.name for v in model.trainable_variables)
    assert len(model.trainable_variables) == 1 + 4 * 2 + 3  # stem, two a block, shortcuts of C3 to C5
    assert all(np.array_equal(v.numpy(), before[v.ref()]) for v in model.variables)
    layer = model.stem_norm
    gamma, beta, mean, variance = (v.numpy() for v in layer.weights)
    y = model.stem(x)
    np.testing.assert_allclose(layer(y, training=True), (y - mean) / np.sqrt(variance + 1e-5) * gamma + beta, atol=1e-4)


def test_what_is_frozen_survives_a_checkpoint(tmp_path):
    """A checkpoint of an ordinary network is that of a frozen one, and back."""
    plain, frozen = (ResNet(BackboneConfig(width=8, norm=n, freeze_at=f)) for n, f in (("batch", 0), ("frozen", 2)))
    x = images()
    plain(x), frozen(x)
    randomize(plain)
    path = tf.train.Checkpoint(model=plain).write(str(tmp_path / "a"))
    tf.train.Checkpoint(model=frozen).read(path).assert_consumed()
    np.testing.assert_allclose(frozen(x, training=True)["5"], plain(x)["5"], rtol=1e-4, atol=1e-4)


def test_groupnorm_is_what_it_was():
    assert isinstance(norm("group", 64), tf_keras.layers.GroupNormalization) and norm("group", 64).groups == 8


# ---- statistics over replicas


TWO_REPLICAS = """
import sys
import numpy as np, tensorflow as tf
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
from helpers import networks
strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
with strategy.scope():
    model = networks.sync_model()
batches = strategy.experimental_distribute_values_from_function(
    lambda context: networks.images(4)[2 * context.replica_id_in_sync_group:][:2])
c5, gradients = strategy.run(tf.function(lambda x: networks.sync_step(model, x)), args=(batches,))
local = strategy.experimental_local_results
sums = {f"g{i}": sum(map(np.asarray, local(g))) for i, g in enumerate(gradients)}
statistics = {f"s{i}": local(v)[0].numpy() for i, v in enumerate(model.non_trainable_variables)}
np.savez(sys.argv[1], c5=np.concatenate(local(c5)), **sums, **statistics)
"""


def test_synchronised_batchnorm_on_two_replicas_is_that_of_the_whole_batch(tmp_path):
    here = Path(__file__).resolve().parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(here), str(here.parent)]), "CUDA_VISIBLE_DEVICES": "-1"}
    command = [sys.executable, "-c", TWO_REPLICAS, str(tmp_path / "two.npz")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    two = np.load(tmp_path / "two.npz")
    model = sync_model()
    c5, gradients = sync_step(model, images(4))
    np.testing.assert_allclose(two["c5"], c5, rtol=1e-3, atol=1e-4)
    for i, gradient in enumerate(gradients):
        np.testing.assert_allclose(two[f"g{i}"], gradient, rtol=1e-2, atol=1e-3 * np.abs(gradient).max())
    for i, variable in enumerate(model.non_trainable_variables):
        np.testing.assert_allclose(two[f"s{i}"], variable, rtol=1e-3, atol=1e-5)
    halves = [sync_step(sync_model(), images(4)[i : i + 2])[0] for i in (0, 2)]  # what each replica alone would get
    assert np.abs(np.concatenate(halves) - c5).max() > 0.1
