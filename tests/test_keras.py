"""What Keras promises of a model: files, clones, callbacks, compile and fit; and the front door of the package."""

import importlib
import json
import pkgutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from PIL import Image

import polarmask_tf as pm
from helpers import training
from helpers.networks import marked
from polarmask_tf import cli
from polarmask_tf import config as configs
from polarmask_tf.config import BackboneConfig, FPNConfig, HeadConfig
from polarmask_tf.errors import InputError
from polarmask_tf.modeling.backbones.resnet import Block, ResNet
from polarmask_tf.modeling.fpn import FPN
from polarmask_tf.modeling.head import PolarHead
from polarmask_tf.modeling.layers import Conv, GroupedConv2D, SeparableConv
from polarmask_tf.modeling.polarmask import PolarMask
from polarmask_tf.ops import targets
from polarmask_tf.weights import runs

ROOT = Path(__file__).resolve().parents[1]
SMALL = ("data.size=[64,64]", "model.fpn.channels=16", "model.head.channels=16", "model.head.convs=1", "model.rays=8")
NARROW = (*SMALL, "model.backbone.width=16")
PAPER = (*NARROW, "data.fit=letterbox", "model.backbone.blocks=[1,1,2,1]", "model.backbone.weights=''")
FAMILIES = {
    "shapes": ("shapes", NARROW),
    "shapes, box branch": ("shapes", (*NARROW, "model.refine_channels=0", "model.head.box=true")),
    "shapes, not refined": ("shapes", (*NARROW, "model.refine_channels=0")),
    "shapes, head without norm": ("shapes", (*NARROW, "model.head.norm=none", "model.head.convs=2")),
    "edge": ("edge", (*NARROW, "model.head.convs=2")),
    "edge, box branch": ("edge", (*NARROW, "model.head.box=true", "model.head.conv=separable", "model.fpn.conv=separable")),
    "edge_fast": ("edge_fast", (*SMALL, "model.backbone.widths=[16,16,32,48]")),
    "nuclei": ("nuclei", (*NARROW, "data.crop=[]")),
    "paper": ("paper_1x", PAPER),
    "released": ("released_r50_1x", (*PAPER, "model.head.convs=2")),
    "ResNeXt": ("table1e_x101", (*PAPER, "model.backbone.groups=4", "model.backbone.group_width=4")),
    "GroupNorm, sync": ("shapes", (*NARROW, "model.backbone.norm=group", "model.normalization=image")),
    "EfficientNetLite0": ("edge", (*SMALL, "model.backbone.type=EfficientNetLite0")),
    "MobileNetV2": ("edge", (*SMALL, "model.backbone.type=MobileNetV2", "model.backbone.multiplier=0.35")),
}
# Keras' SavedModel takes as long as all the others together: of these, which have every kind of layer of ours.
AS_SAVED_MODEL = ("shapes", "edge, box branch", "released", "ResNeXt", "MobileNetV2")
CLASSES = ["a", "b", "c"]


def make(name="shapes", overrides=NARROW, **options):
    return PolarMask.from_config_name(name, CLASSES, overrides, **options)


def randomize(model, seed=0):
    rng = np.random.default_rng(seed)
    for variable in model.variables:
        if variable.dtype.is_floating:
            variable.assign(rng.uniform(0.05, 0.2, variable.shape))
    return model


def images(count=2, size=(64, 64), seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, *size, 3), np.uint8)


def assert_equal_models(found, expected):
    """The same variables with the same values, and equal outputs: nothing was left out."""
    variables, others = found.get_weight_paths(), expected.get_weight_paths()
    assert len(found.variables) == len(expected.variables) and set(variables) == set(others)
    for name, variable in others.items():
        np.testing.assert_array_equal(variables[name].numpy(), variable.numpy(), err_msg=name)
    x = images()
    outputs, wanted = found(x), expected(x)
    assert list(outputs) == list(wanted)
    tf.nest.map_structure(np.testing.assert_array_equal, dict(outputs), dict(wanted))


def batch(count=2, size=(64, 64), levels=(3,)):
    """Images with one square object each."""
    side = np.float32(40)
    corners = np.float32([[10, 10], [10 + side, 10], [10 + side, 10 + side], [10, 10 + side]])
    edges = np.concatenate([corners, np.roll(corners, -1, 0)], 1)
    locations = sum(-(-size[0] // 2**n) * -(-size[1] // 2**n) for n in levels)
    instances = {
        "boxes": np.tile(np.float32([10, 10, 50, 50]), (count, 1, 1)),
        "centers": np.full((count, 1, 2), 30, np.float32),
        "classes": np.ones((count, 1), np.int32),
        "edges": np.tile(edges, (count, 1, 1, 1)),
        "window": np.tile(np.float32([size[1], size[0]]), (count, 1)),
        "ignore": np.zeros((count, locations), bool),
    }
    return images(count, size), instances


def weighted(parts):
    """The loss of its parts with the weights of configs/shapes.yaml."""
    return parts["class"] + 2 * parts["ray"] + parts["centerness"] + 2 * parts["mask"]


def dataset(count=2, repeat=3, **options):
    return tf.data.Dataset.from_tensors(batch(count, **options)).repeat(repeat)


# ---- files


@pytest.fixture(scope="module", params=[marked(name, configs.load(*words)) for name, words in FAMILIES.items()])
def family(request):
    return request.param, randomize(make(*FAMILIES[request.param]))


@pytest.mark.slow
def test_every_way_of_saving_gives_the_same_model_back(family, tmp_path):
    name, family = family
    family.save(tmp_path / "whole.keras")
    assert_equal_models(tf_keras.models.load_model(tmp_path / "whole.keras"), family)
    other = type(family).from_config(family.get_config())  # one for all that brings weights alone; building takes seconds
    for file in ("w.weights.h5", "w.h5", "checkpoint"):
        family.save_weights(tmp_path / file)
        randomize(other, seed=1).load_weights(tmp_path / file)
        assert_equal_parts(other, family)
    if name in AS_SAVED_MODEL:
        family.save(tmp_path / "saved_model")
        assert_equal_models(tf_keras.models.load_model(tmp_path / "saved_model"), family)
    clone = tf_keras.models.clone_model(family)
    clone.set_weights(family.get_weights())
    assert_equal_models(clone, family)
    assert clone.classes == family.classes and clone.config == family.config
    # As in Model Garden's checkpoints, the parts have their names at the root.
    path = tf.train.Checkpoint(family).write(str(tmp_path / "garden"))
    randomize(other, seed=1)
    tf.train.Checkpoint(backbone=other.backbone, decoder=other.decoder, head=other.head).read(path).expect_partial()
    assert_equal_parts(other, family)


def test_a_compiled_model_comes_back_compiled(tmp_path):
    model = make()
    model.compile(pm.make_optimizer(model.config), jit_compile=True)
    model.save(tmp_path / "m.keras")
    other = tf_keras.models.load_model(tmp_path / "m.keras")
    assert other.xla and type(other.optimizer) is type(model.optimizer)
    for step in (0, 7, 800):
        assert float(other.optimizer._learning_rate(step)) == pytest.approx(float(model.optimizer._learning_rate(step)))


@pytest.mark.parametrize(
    "layer",
    [
        Conv(4, 3, 2, bias=True, groups=2),
        Conv(4, 1, 2, init=tf_keras.initializers.RandomNormal(stddev=0.01)),
        SeparableConv(4, 3, 2),
        GroupedConv2D(4, 3, groups=2),
        Block(BackboneConfig(width=4), 1, 2, True),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_layers_come_back_from_their_config(layer):
    other = type(layer).from_config(layer.get_config())
    assert other.get_config() == layer.get_config()
    x = tf.constant(np.random.default_rng(0).normal(size=(1, 8, 8, 4)), tf.float32)
    layer(x), other(x)
    other.set_weights(randomize(layer).get_weights())
    np.testing.assert_array_equal(other(x), layer(x))


def test_parts_come_back_from_their_config():
    features = {level: tf.ones([1, 64 >> int(level), 64 >> int(level), 8]) for level in "2345"}
    for part, given in (
        (FPN(FPNConfig(channels=8, levels=(3, 4, 5, 6))), features),
        (PolarHead(HeadConfig(channels=8, norm="batch"), (2, 3, 4, 5), 2, 8), features),
        (ResNet(BackboneConfig(width=16)), tf.ones([1, 64, 64, 3])),
    ):
        other = type(part).from_config(part.get_config())
        part(given), other(given)
        other.set_weights(randomize(part).get_weights())
        tf.nest.map_structure(np.testing.assert_array_equal, part(given), other(given))


def test_a_run_that_was_made_before_keras_files_is_read(tmp_path):
    model = runs.load_run(ROOT / "tests" / "old_run")
    model.save(tmp_path / "m.keras")
    assert_equal_models(pm.load_model(tmp_path / "m.keras"), model)
    assert pm.load_model(tmp_path / "m.keras", max_detections=7).config.postprocess.max_detections == 7
    for values in ({"max_detections": 10**9}, {"score_threshold": -1}, {"score_threshold": "x"}, {"max_detection": 7}):
        for path in (ROOT / "tests" / "old_run", tmp_path / "m.keras"):
            with pytest.raises(InputError, match=f"postprocess.*{next(iter(values))}"):
                pm.load_model(path, **values)


def test_no_code_of_a_keras_file_is_run(tmp_path):
    """Neither of one as Keras writes it now, nor of the HDF5 of earlier times, which it reads under any name."""
    code = f"open({str(tmp_path / 'ran')!r}, 'w')"
    layers = [tf_keras.layers.Input((4,)), tf_keras.layers.Lambda(eval(f"lambda x: [{code}, x][1]"))]
    model = tf_keras.Sequential(layers)
    model.save(tmp_path / "m.keras")
    model.save(tmp_path / "m.h5")
    (tmp_path / "m.h5").rename(tmp_path / "h5.keras")
    (tmp_path / "ran").unlink()  # when it was built
    for name in ("m", "h5"):
        with pytest.raises(InputError, match=f"{name}.keras: damaged, or not a .keras file that PolarMask.save wrote"):
            pm.load_model(tmp_path / f"{name}.keras")
        assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [b"", b"not a zip file", b"PK\x03\x04 and then nothing"])
def test_a_file_that_is_no_keras_file_is_refused(tmp_path, content):
    (tmp_path / "m.keras").write_bytes(content)
    with pytest.raises(InputError, match=r"m\.keras"):
        pm.load_model(tmp_path / "m.keras")
    with pytest.raises(InputError, match="no such file"):
        pm.load_model(tmp_path / "none.keras")


def test_another_keras_model_is_refused(tmp_path):
    tf_keras.Sequential([tf_keras.layers.Dense(1, input_shape=(2,))]).save(tmp_path / "m.keras")
    with pytest.raises(InputError, match="holds a Sequential"):
        pm.load_model(tmp_path / "m.keras")


# ---- compile and fit


@pytest.mark.slow
def test_a_model_fits_at_once_and_summarises(capsys):
    model = make()
    model.summary()
    text = capsys.readouterr().out
    assert all(part in text for part in ("backbone", "decoder", "head")) and "loss" not in text
    model.compile("adam", steps_per_execution=2)
    before = [v.numpy() for v in model.trainable_variables]
    history = model.fit(dataset(repeat=4), epochs=2, validation_data=dataset(repeat=1), verbose=0).history
    assert set(history) == {f"{way}{name}" for way in ("", "val_") for name in ("loss", "class", "ray", "centerness", "mask")}
    assert history["loss"][1] < history["loss"][0] and np.isfinite(history["val_loss"]).all()
    assert not [b.name for a, b in zip(before, model.trainable_variables, strict=True) if (a == b.numpy()).all()]
    arrays = batch()
    assert np.isfinite(model.fit(*arrays, batch_size=2, verbose=0).history["loss"]).all()
    assert model.predict(arrays[0], verbose=0)["3"]["ray_logits"].shape == (2, 8, 8, 8)


@pytest.mark.parametrize(("optimizer", "times"), [(tf_keras.optimizers.Adam, 1), (tf_keras.optimizers.legacy.Adam, 2)])
def test_the_step_is_traced_once(optimizer, times):
    """Twice, where the optimizer makes its variables in the first step: Keras' legacy optimizers know no other way."""
    model, traces = make(), []
    model.compile(optimizer())
    step = model.train_step
    model.train_step = lambda data: traces.append(data) or step(data)
    model.fit(dataset(repeat=2), verbose=0)
    assert len(traces) == times


@pytest.mark.slow
def test_keras_own_callbacks(tmp_path):
    model = make()
    model.compile("adam")
    callbacks = [
        tf_keras.callbacks.ModelCheckpoint(str(tmp_path / "best.keras"), save_best_only=True, monitor="loss"),
        tf_keras.callbacks.ModelCheckpoint(str(tmp_path / "epoch{epoch}.weights.h5"), save_weights_only=True),
        tf_keras.callbacks.BackupAndRestore(str(tmp_path / "backup"), delete_checkpoint=False),
    ]
    model.fit(dataset(), epochs=2, callbacks=callbacks, verbose=0)
    assert_equal_parts(pm.load_model(tmp_path / "best.keras"), model)
    other = make()
    other.load_weights(tmp_path / "epoch2.weights.h5")
    assert_equal_parts(other, model)
    # A training that was interrupted after two epochs goes on with the third.
    other = make()
    other.compile("adam")
    seen = []
    watch = tf_keras.callbacks.LambdaCallback(on_epoch_begin=lambda epoch, logs: seen.append(epoch))
    other.fit(dataset(), epochs=3, callbacks=[tf_keras.callbacks.BackupAndRestore(str(tmp_path / "backup")), watch], verbose=0)
    assert seen == [2]


def assert_equal_parts(found, expected):
    """But for the state of metrics."""
    for part in ("backbone", "decoder", "head"):
        for a, b in zip(getattr(found, part).variables, getattr(expected, part).variables, strict=True):
            np.testing.assert_array_equal(a, b, err_msg=a.name)


def test_the_best_weights_are_restored():
    model = make()
    model.compile(tf_keras.optimizers.SGD(1.0, global_clipnorm=1000.0))  # it gets worse
    kept = {}
    keep = tf_keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: kept.setdefault(epoch, model.get_weights()))
    stop = tf_keras.callbacks.EarlyStopping("val_loss", patience=1, restore_best_weights=True)
    model.fit(dataset(repeat=1), validation_data=dataset(repeat=1), epochs=8, callbacks=[keep, stop], verbose=0)
    assert len(kept) < 8
    before = kept[stop.best_epoch]
    for a, b in zip(before, model.get_weights(), strict=True):
        if a.size > 1:  # not the state of metrics
            np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_compile_by_xla_is_the_same_switch_as_the_configs():
    plain, compiled = make(), make()
    compiled.set_weights(plain.get_weights())
    plain.compile(tf_keras.optimizers.SGD(0.1))
    compiled.compile(tf_keras.optimizers.SGD(0.1), jit_compile=True)
    for model in (plain, compiled):
        model.fit(dataset(repeat=2), verbose=0)
    for a, b in zip(plain.trainable_variables, compiled.trainable_variables, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)
    graph = compiled.train_tf_function
    assert graph is not None and compiled.xla and not plain.xla


@pytest.mark.parametrize("dtype", ["mixed_float16", tf_keras.mixed_precision.Policy("mixed_bfloat16")])
def test_a_policy_reaches_every_layer_and_the_global_one_stays(dtype):
    model = make("shapes", (*NARROW, "model.refine_channels=0", "model.head.box=true"), dtype=dtype)
    wanted = getattr(dtype, "name", dtype)
    policies = {layer.dtype_policy.name for layer in model.submodules if isinstance(layer, Conv | SeparableConv)}
    policies |= {layer.dtype_policy.name for layer in model.submodules if isinstance(layer, tf_keras.layers.Conv2D)}
    assert policies == {wanted} and tf_keras.mixed_precision.global_policy().name == "float32"
    assert model.backbone(tf.zeros([1, 32, 32, 3], model.compute_dtype))["3"].dtype == model.compute_dtype
    assert all(value.dtype == tf.float32 for value in tf.nest.flatten(model(images())))
    assert all(variable.dtype == tf.float32 for variable in model.trainable_variables)
    assert type(model).from_config(model.get_config()).dtype_policy.name == wanted


def test_the_callers_policy_is_taken_and_kept():
    tf_keras.mixed_precision.set_global_policy("mixed_bfloat16")
    try:
        assert make().compute_dtype == "bfloat16"
        assert tf_keras.mixed_precision.global_policy().name == "mixed_bfloat16"
    finally:
        tf_keras.mixed_precision.set_global_policy("float32")


# ---- one loss


def test_what_fit_trains_is_compute_loss():
    class Doubled(PolarMask):
        def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None):
            return 2 * super().compute_loss(x, y, y_pred, sample_weight)

    config = configs.load("shapes", NARROW)
    plain, doubled = PolarMask(config, CLASSES), Doubled(config, CLASSES)
    doubled.set_weights(plain.get_weights())
    start = [v.numpy() for v in plain.trainable_variables]
    for model in (plain, doubled):
        model.compile(tf_keras.optimizers.SGD(0.01))
        model.fit(dataset(repeat=1), verbose=0)
    moved = [
        (a.numpy() - s, b.numpy() - s)
        for a, b, s in zip(*(m.trainable_variables for m in (plain, doubled)), start, strict=True)
    ]
    one, two = (np.concatenate([pair[i].ravel() for pair in moved]) for i in (0, 1))
    np.testing.assert_allclose(two, 2 * one, atol=1e-3 * np.abs(one).max())


def test_thresholds_of_the_weights_before_are_forgotten():
    model = make()
    model.compile("sgd")
    model.set_thresholds({"overall": 0.5, "classes": [0.5] * model.num_classes})
    assert "thresholds" in model.get_config()
    model.fit(dataset(repeat=1), verbose=0)
    assert model.thresholds is None and "thresholds" not in model.get_config()


@pytest.mark.slow
def test_pictures_are_read_with_the_bit_depth_of_the_training(tmp_path):
    """In each form that the model takes; 12 bits of gray read as 16 are nearly black, and find nothing."""
    (tmp_path / "pictures").mkdir()
    gray = np.random.default_rng(0).integers(0, 4096, (64, 64)).astype(np.uint16)
    Image.fromarray(gray).save(tmp_path / "pictures" / "a.tif")
    box = {"id": 1, "image_id": 1, "category_id": 1, "iscrowd": 0, "segmentation": [[8, 8, 40, 8, 40, 40, 8, 40]]}
    truth = {
        "images": [{"id": 1, "file_name": "a.tif", "width": 64, "height": 64}],
        "annotations": [{**box, "area": 1024, "bbox": [8, 8, 32, 32]}],
        "categories": [{"id": 1, "name": "cell"}],
    }
    (tmp_path / "a.json").write_text(json.dumps(truth))
    run, data, out = tmp_path / "run", tmp_path / "data", tmp_path / "exported"
    words = [word for setting in (*training.TINIEST, "train.steps=1") for word in ("--set", setting)]
    for command in (
        ["convert", tmp_path / "a.json", tmp_path / "pictures", data, "--bit-depth", "12", "--processes", "1"],
        ["train", "--config", "shapes", "--data", data, "--out", run, *words],
        ["export", run, "--out", out],
    ):
        assert cli.main([str(word) for word in command]) == 0
    model = pm.load_model(run)
    model.save(tmp_path / "a.keras")
    for path in (run, tmp_path / "a.keras", out / "saved_model", out / "model.tflite"):
        predictor = pm.load_predictor(path)
        assert predictor.bit_depth == 12
        found, expected = (
            predictor(tmp_path / "pictures" / "a.tif"),
            predictor(np.repeat(gray[..., None] >> 4, 3, -1).astype(np.uint8)),
        )
        np.testing.assert_array_equal(found.scores, expected.scores)
    trained = PolarMask(model.config, model.classes)
    trained.compile("sgd")
    trained.fit(pm.training_data(data, model.config), verbose=0)
    assert trained.bit_depth == 12

    about = json.loads((run / "dataset.json").read_text())
    (run / "dataset.json").write_text(json.dumps({**about, "bit_depth": 99}))
    with pytest.raises(InputError, match=r"dataset\.json: damaged \(bit_depth is 99, not 8 to 16\)"):
        pm.load_model(run)


def test_evaluate_reports_compute_loss():
    model = make()
    model.compile("sgd")
    x, y = batch()
    y = {name: tf.constant(value) for name, value in y.items()}
    expected = float(model.compute_loss(tf.constant(x), y, model(x)))
    reported = model.evaluate(dataset(repeat=1), verbose=0, return_dict=True)
    assert reported["loss"] == pytest.approx(expected, rel=1e-5)
    assert reported["loss"] == pytest.approx(weighted(reported), rel=1e-5)


# ---- refusals


@pytest.mark.parametrize("argument", [{"loss": "mse"}, {"metrics": ["mae"]}, {"loss_weights": [1.0]}, {"weighted_metrics": []}])
def test_losses_and_metrics_are_refused_by_name(argument):
    with pytest.raises(InputError, match=f"{next(iter(argument))}.*config.loss"):
        make().compile("sgd", **argument)


def test_weights_of_classes_and_samples_are_refused():
    model = make()
    model.compile("sgd")
    x, y = batch()
    for argument in ({"class_weight": {0: 1.0}}, {"sample_weight": np.ones(2)}):
        with pytest.raises(InputError, match=f"{next(iter(argument))}.*config.loss"):
            model.fit(x, y, **argument)
    weighted = tf.data.Dataset.from_tensors((x, y, np.ones(2, np.float32)))
    with pytest.raises(InputError, match="sample weights"):
        model.fit(weighted)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda y: {k: v for k, v in y.items() if k != "edges"}, "without 'edges'.*make_instances"),
        (lambda y: {**y, "boxes": y["boxes"].astype(np.float64)}, "'boxes' is float64.*float32"),
        (lambda y: {**y, "classes": y["classes"][..., None]}, "'classes' is int32"),
        (
            lambda y: {**y, "ignore": y["ignore"][:, 1:]},
            r"'ignore' has 63 locations, images of 64 x 64 have 64 at",
        ),
        (lambda y: y["boxes"], "instances a dict"),
    ],
)
def test_other_data_are_refused_in_one_line(change, message):
    model = make()
    model.compile("sgd")
    x, y = batch()
    with pytest.raises(InputError, match=message) as error:
        model.fit(tf.data.Dataset.from_tensors((x, change(y))), verbose=0)
    assert "\n" not in str(error.value)


def test_a_size_that_the_pyramid_cannot_halve_is_refused():
    with pytest.raises(InputError, match=r"\[1, 130, 130, 3\].*multiples of 32.*load_predictor"):
        make()(np.zeros((1, 130, 130, 3), np.uint8))
    model = make()
    model.compile("sgd")
    with pytest.raises(InputError, match=r"130, 130, 3\].*multiples of 32"):
        model.fit(dataset(count=1, size=(130, 130)))


def test_the_documented_instances_are_what_the_pipeline_gives(tmp_path):
    pm.draw_shapes(tmp_path, train=4, val=0, size=64, progress=False)
    pm.convert_coco(tmp_path / "train/annotations.json", tmp_path / "train/images", tmp_path / "data", progress=False)
    config = configs.load("shapes", ["data.size=[64,64]", "data.batch=2"])
    x, y = next(iter(pm.training_data(tmp_path / "data", config)))
    assert list(y) == list(targets.INSTANCES)
    targets.check_batch((x, y), config.model.fpn.levels)


def test_classes_of_a_sequence_are_not_taken_for_those_of_converted_data():
    class Batches(tf_keras.utils.Sequence):
        classes = np.array([2, 0, 1])  # as Keras' own iterators have

        def __len__(self):
            return 1

        def __getitem__(self, index):
            return batch()

    model = make()
    model.compile("adam")
    model.fit(Batches(), verbose=0)
    assert [entry["name"] for entry in model.classes] == CLASSES


@pytest.mark.slow
def test_fit_compares_the_classes_of_converted_data_with_the_models(tmp_path, monkeypatch):
    pm.draw_shapes(tmp_path, train=2, val=0, size=64, progress=False)
    document = json.loads((tmp_path / "train/annotations.json").read_text())
    names = [category["name"] for category in document["categories"]]
    for entry in (*document["categories"], *document["annotations"]):
        entry["id" if "name" in entry else "category_id"] += 20
    (tmp_path / "coco.json").write_text(json.dumps(document))
    pm.convert_coco(tmp_path / "coco.json", tmp_path / "train/images", tmp_path / "data", progress=False)
    monkeypatch.setattr(tf_keras.Model, "fit", lambda self, *args, **kwargs: "fitted")

    def fit(classes):
        model = PolarMask(configs.load("shapes", NARROW), classes)
        data = pm.training_data(tmp_path / "data", model.config)
        assert model.fit(data, validation_data=pm.validation_data(tmp_path / "data", model.config)) == "fitted"
        return [(entry["name"], entry["category_id"]) for entry in model.classes]

    expected = [(entry["name"], entry["id"]) for entry in document["categories"]]
    assert fit(names) == expected and expected[0][1] > 20  # results then have the ids of the data
    assert fit(pm.training_data(tmp_path / "data", configs.load("shapes", NARROW)).classes) == expected
    mine = [{"name": name, "category_id": 7 + n} for n, name in enumerate(names)]
    assert fit(mine) == [(name, 7 + n) for n, name in enumerate(names)]
    assert len(fit(len(names))) == len(names)
    for wrong in (names[::-1], names[:2], 2, [*names, "more"]):
        with pytest.raises(InputError, match=rf"data's classes are {names[0]}.*in this order, and the model's .*data\.classes"):
            fit(wrong)


@pytest.mark.parametrize("damaged", ["train", "validation", "neither"])
def test_fit_names_the_shard_that_is_damaged(tmp_path, damaged):
    pm.draw_shapes(tmp_path, train=4, val=0, size=64, progress=False)
    for name in ("train", "validation"):
        pm.convert_coco(tmp_path / "train/annotations.json", tmp_path / "train/images", tmp_path / name, progress=False)
    model = PolarMask(configs.load("shapes", (*NARROW, "data.size=[64,64]", "data.batch=2")), 4)
    model.compile("sgd")
    data, validation = (
        make_data(tmp_path / name, model.config)
        for name, make_data in (("train", pm.training_data), ("validation", pm.validation_data))
    )
    if damaged == "neither":
        images, instances = next(iter(data))
        broken = tf.data.Dataset.from_tensors((images, instances)).map(
            lambda x, y: (tf.cast(tf.debugging.check_numerics(tf.cast(x, tf.float32) / 0, "no"), tf.uint8), y)
        )
        with pytest.raises(tf.errors.InvalidArgumentError):  # of a pipeline of one's own: as it came
            model.fit(broken, verbose=0)
        return
    (shard,) = (tmp_path / damaged).glob("*.tfrecord")
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 8
    shard.write_bytes(content)
    with pytest.raises(InputError, match=rf"{damaged}/.*damaged or cut short after \d records"):
        model.fit(data, validation_data=validation, verbose=0)


# ---- a backbone of one's own


def functional(levels):
    x = inputs = tf_keras.Input((None, None, 3))
    features = {}
    for level in range(1, 6):
        x = tf_keras.layers.Conv2D(8, 3, 2, "same", activation="relu", kernel_regularizer=tf_keras.regularizers.L2(0.1))(x)
        if level in levels:
            features[str(level)] = x
    return tf_keras.Model(inputs, features)


@pytest.mark.parametrize(("levels", "pyramid"), [((3, 4), (3, 4)), ((2, 3), (2, 3, 4)), ((4, 5), (4, 5, 6))])
def test_any_keras_model_is_a_backbone(levels, pyramid, tmp_path):
    overrides = (*NARROW, f"model.fpn.levels={list(pyramid)}", "targets.ranges=[]")
    model = make("shapes", overrides, backbone=functional(levels))
    assert list(model(images())) == list(map(str, pyramid)) and model.stride == 2 ** max(levels)
    model.compile("adam")
    logs = model.fit(dataset(levels=pyramid), verbose=0).history
    parts = weighted({name: values[0] for name, values in logs.items()})
    assert logs["loss"][0] == pytest.approx(parts, rel=1e-5)  # regularisation is trained, and is none of these
    randomize(model)
    model.save(tmp_path / "m.keras")
    assert_equal_models(tf_keras.models.load_model(tmp_path / "m.keras"), model)


def test_regularisation_of_a_backbone_counts_once_whatever_the_parts():
    gradients = []
    for parts in (1, 2):
        overrides = (*NARROW, f"train.accumulate={parts}", "data.batch=2")
        tf_keras.utils.set_random_seed(1)
        model = make("shapes", overrides, backbone=functional((3, 4, 5)))
        model.compile(tf_keras.optimizers.SGD(1e-3))
        before = model.backbone.get_weights()[0]
        model.fit(dataset(repeat=1), verbose=0)
        gradients.append(before - model.backbone.get_weights()[0])
    np.testing.assert_allclose(gradients[0], gradients[1], rtol=1e-3, atol=1e-6)


def test_a_function_is_a_backbone_that_is_saved_by_weights_alone(tmp_path):
    inner = functional((3, 4, 5))
    model = make(backbone=lambda x: {int(level): feature for level, feature in inner(x).items()})
    assert list(model(images())) == ["3"]
    with pytest.raises(InputError, match=r"no Keras model.*save_weights"):
        model.save(tmp_path / "m.keras")


@pytest.mark.parametrize(
    ("backbone", "message"),
    [(functional((4, 5)), "begin at 3.*gives .4, 5."), (lambda x: x, "is needed"), (lambda x: {"3": x[0]}, "is needed")],
)
def test_backbones_that_do_not_fit_are_refused(backbone, message):
    with pytest.raises(InputError, match=message):
        make(backbone=backbone)


@pytest.mark.parametrize("classes", [0, []])
def test_a_model_needs_classes(classes):
    with pytest.raises(InputError, match="at least one"):
        PolarMask(configs.load("shapes"), classes)


# ---- the front door


def test_the_front_door_loads_no_tensorflow_until_it_is_used():
    code = "import sys, polarmask_tf; dir(polarmask_tf); polarmask_tf.load_config('edge'); print('tensorflow' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "False"


def test_no_module_hides_a_name_of_the_front_door():
    for module in pkgutil.walk_packages(pm.__path__, "polarmask_tf."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    for name in pm.__all__:
        assert callable(getattr(pm, name)), name
    assert set(pm.__all__) == set(pm._FRONT_DOOR) and set(pm.__all__) <= set(dir(pm))
    with pytest.raises(AttributeError, match="no attribute 'PolarMusk'"):
        _ = pm.PolarMusk
    with pytest.raises(InputError, match="no config file"):
        pm.load_config("none")
    with pytest.raises(InputError):
        pm.load_predictor("none")
    with pytest.raises(InputError):
        pm.training_data("none", pm.load_config("shapes"))


@pytest.mark.slow
def test_the_example_that_a_keras_person_would_write(tmp_path):
    script = ROOT / "docs" / "examples" / "keras_fit.py"
    assert len(script.read_text().splitlines()) <= 40
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path), "1"], capture_output=True, text=True, cwd=ROOT, timeout=400
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "detections" in done.stdout and (tmp_path / "result.png").is_file() and (tmp_path / "best.keras").is_file()
