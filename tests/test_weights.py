"""The released checkpoints' way in: golden forward pass, golden detections, and every way in which a file can be wrong."""

import dataclasses
import importlib.util
import json

import numpy as np
import pytest
import tensorflow as tf

from polarmask_tf import cli, files
from polarmask_tf import config as configs
from polarmask_tf.config import FPNConfig, HeadConfig
from polarmask_tf.errors import InputError
from polarmask_tf.inference.predictor import load_predictor
from polarmask_tf.modeling.polarmask import PolarMask
from polarmask_tf.weights import released
from polarmask_tf.weights.runs import load_run
from polarmask_tf.weights.start import start_from

TURN = (9 - np.arange(36)) % 36  # our ray k is the released ray TURN[k]


def override(config, **changes):
    return dataclasses.replace(
        config,
        **{
            section: dataclasses.replace(getattr(config, section), **values) if isinstance(values, dict) else values
            for section, values in changes.items()
        },
    )


# ---- the golden network


@pytest.fixture(scope="module")
def golden(shared):
    return shared / "reference/golden"


@pytest.fixture(scope="module")
def seeded(golden):
    """The state dict that the golden arrays were made with."""
    spec = importlib.util.spec_from_file_location("seeded_weights", golden / "seeded_weights.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    keys = json.loads((golden / "state_dict_r50_keys.json").read_text())
    return {key: module.tensor_for(key, shape) for key, shape in keys.items()}


@pytest.fixture(scope="module")
def imported(seeded, tmp_path_factory):
    """A run directory made from a .pth of the state dict by the command."""
    torch = pytest.importorskip("torch")
    folder = tmp_path_factory.mktemp("imported")
    state = {key: torch.from_numpy(np.array(value)) for key, value in seeded.items()}
    torch.save({"meta": {"epoch": 12}, "state_dict": state, "optimizer": {}}, folder / "seeded.pth")
    arguments = ["import-weights", folder / "seeded.pth", "--config", "released_r50_1x", "--out", folder / "run"]
    assert cli.main([*map(str, arguments), "--set", "data.size=[256,320]"]) == 0
    return folder / "run"


def test_forward_equals_the_golden_network(imported, golden):
    model = load_run(imported)
    arrays = np.load(golden / "forward_r50_256x320_f32.npz", allow_pickle=False)
    exact = np.load(golden / "forward_r50_256x320_f64_heads.npz", allow_pickle=False)
    outputs = model(tf.constant(arrays["image_bgr_u8"][None, :, :, ::-1]))
    for index, (level, maps) in enumerate(sorted(outputs.items())):
        assert int(level) == index + 3
        truth = {
            "class_logits": exact[f"cls{index}"],
            "centerness_logits": exact[f"ctr{index}"],
            "ltrb_logits": np.log(arrays[f"bbox{index}"]),
        }
        for name, values in truth.items():
            expected = values[0].transpose(1, 2, 0)
            assert (np.abs(maps[name][0] - expected) <= 1e-3 * np.maximum(1, np.abs(expected))).all(), (level, name)
        expected = arrays[f"rays{index}"][0].transpose(1, 2, 0)[..., TURN]
        assert (np.abs(np.exp(maps["ray_logits"][0]) - expected) <= 1e-3 * np.maximum(1, np.abs(expected))).all(), level


def test_features_equal_the_golden_ones(imported, golden):
    model = load_run(imported)
    arrays = np.load(golden / "forward_r50_256x320_f32.npz", allow_pickle=False)
    features = np.load(golden / "forward_r50_256x320_feats_f16.npz", allow_pickle=False)
    x = arrays["input"].transpose(0, 2, 3, 1)[..., ::-1]  # BGR, normalised
    ours = model.backbone(tf.constant(x))
    pyramid = model.decoder(ours)
    for name, found in {"C5": ours["5"], "P5": pyramid["5"], "P6": pyramid["6"], "P7": pyramid["7"]}.items():
        expected = features[name].astype(np.float32).transpose(0, 2, 3, 1)
        np.testing.assert_allclose(found, expected, atol=2e-3 * np.abs(expected).max())


def test_end_to_end_detections_equal_the_golden_ones(imported, golden):
    image = np.load(golden / "forward_r50_256x320_f32.npz", allow_pickle=False)["image_bgr_u8"][..., ::-1]
    dets = np.load(golden / "forward_r50_256x320_dets.npz", allow_pickle=False)
    found = load_predictor(imported)([np.ascontiguousarray(image)])[0]
    height, width = dets["ori_shape"]
    scale = dets["scale_factor"][:1]
    assert (height * 4 / 3, width * 4 / 3) == (256, 320)
    assert len(found.scores) == len(dets["det_labels"]) == 100
    np.testing.assert_allclose(found.scores, dets["det_bboxes"][:, 4], atol=1e-3)
    expected = dets["det_masks"].transpose(0, 2, 1)[:, TURN]
    # In the same order up to ties: each golden detection has ours of its class, score and place at its rank or beside it.
    for rank in range(100):
        near = [k for k in range(max(rank - 2, 0), min(rank + 3, 100)) if found.classes[k] == dets["det_labels"][rank]]
        off = [np.abs(found.polygons[k] / scale - expected[rank]).max() for k in near]
        assert near and min(off) < 0.5, rank
        corners = found.boxes[near[int(np.argmin(off))]] / scale
        np.testing.assert_allclose(corners, dets["det_bboxes"][rank, :4], atol=0.5)
    assert (found.classes == dets["det_labels"]).mean() > 0.95


def test_old_keys_are_the_same_model(seeded, imported, tmp_path):
    old = {key.replace("bbox_head.polar_", "bbox_head.fcos_"): value for key, value in seeded.items()}
    assert set(old) != set(seeded)
    np.savez(tmp_path / "old.npz", **old)
    config = configs.load("released_r50_1x", ["data.size=[256,320]"])
    model = released.import_weights(tmp_path / "old.npz", config, tmp_path / "run")
    for mine, theirs in zip(model.head.variables, load_run(imported).head.variables, strict=True):
        np.testing.assert_array_equal(mine, theirs)


# ---- a small network of the same kind, for all the rest


SMALL = override(
    configs.load("released_r50_1x"),
    model=dataclasses.replace(
        configs.load("released_r50_1x").model,
        rays=8,
        backbone=dataclasses.replace(configs.load("released_r50_1x").model.backbone, blocks=(1, 1, 2, 1)),
    ),
    data={"size": (64, 96)},
)


def small_state(blocks=(1, 1, 2, 1), classes=80, rays=8, seed=0):
    """A state dict of released names and PyTorch shapes, from the reference's description alone."""
    rng = np.random.default_rng(seed)
    state = {}

    def conv(name, out, into, kernel, bias=False):
        state[f"{name}.weight"] = rng.normal(0, 0.05, (out, into, kernel, kernel)).astype(np.float32)
        if bias:
            state[f"{name}.bias"] = rng.normal(0, 0.1, out).astype(np.float32)

    def norm(name, channels, running=True):
        for part in ("weight", "bias", *(("running_mean", "running_var") if running else ())):
            state[f"{name}.{part}"] = rng.uniform(0.5, 1.5, channels).astype(np.float32)

    conv("backbone.conv1", 64, 3, 7)
    norm("backbone.bn1", 64)
    channels = 64
    for stage, count in enumerate(blocks, 1):
        width = 32 * 2**stage
        for block in range(count):
            name = f"backbone.layer{stage}.{block}"
            for i, (out, into, kernel) in enumerate([(width, channels, 1), (width, width, 3), (4 * width, width, 1)], 1):
                conv(f"{name}.conv{i}", out, into, kernel)
                norm(f"{name}.bn{i}", out)
            if block == 0:
                conv(f"{name}.downsample.0", 4 * width, channels, 1)
                norm(f"{name}.downsample.1", 4 * width)
            channels = 4 * width
    for i in range(3):
        conv(f"neck.lateral_convs.{i}.conv", 256, 512 * 2**i, 1, bias=True)
    for i in range(5):
        conv(f"neck.fpn_convs.{i}.conv", 256, 256, 3, bias=True)
    for tower in ("cls", "reg", "mask"):
        for i in range(4):
            conv(f"bbox_head.{tower}_convs.{i}.conv", 256, 256, 3)
            norm(f"bbox_head.{tower}_convs.{i}.gn", 256, running=False)
    for name, out in (("cls", classes), ("reg", 4), ("mask", rays), ("centerness", 1)):
        conv(f"bbox_head.polar_{name}", out, 256, 3, bias=True)
    for i in range(5):
        state[f"bbox_head.scales_bbox.{i}.scale"] = np.float32(1 + i / 10)
        state[f"bbox_head.scales_mask.{i}.scale"] = np.float32(1 - i / 10)
    return state


@pytest.fixture(scope="module")
def small():
    return small_state()


def run_import(state, folder, config=SMALL, name="small.npz", **options):
    np.savez(folder / name, **state)
    return released.import_weights(folder / name, config, folder / "run", **options)


def refusal(state, folder, config=SMALL, **options):
    with pytest.raises(InputError) as error:
        run_import(state, folder, config, **options)
    assert "\n" not in str(error.value) and not (folder / "run").exists()
    return str(error.value)


def test_each_tensor_is_where_it_belongs(small, tmp_path):
    model = run_import(small, tmp_path)
    kernel = small["backbone.layer3.1.conv2.weight"]
    np.testing.assert_array_equal(model.backbone.stages[2][1].convs[1].conv.kernel, kernel.transpose(2, 3, 1, 0))
    rgb = small["backbone.conv1.weight"][:, ::-1]
    np.testing.assert_array_equal(model.backbone.stem.conv.kernel, rgb.transpose(2, 3, 1, 0))
    assert float(model.head.scales["7"]) == np.float32(0.6) and float(model.head.box_scales["4"]) == np.float32(1.1)
    # Our ray 0 points right: 90 degrees from straight down, the released ray 2 of 8; our ray 2, straight down, is its ray 0.
    bias = small["bbox_head.polar_mask.bias"]
    np.testing.assert_array_equal(model.head.rays.conv.bias, bias[[2, 1, 0, 7, 6, 5, 4, 3]])


@pytest.mark.parametrize("rays", [4, 8, 24, 36, 72])
def test_released_rays_point_the_same_way(rays):
    """Released ray i at 360 i / n from straight down (0, 1), towards +x."""
    theirs = 2 * np.pi * np.arange(rays) / rays
    ours = 2 * np.pi * np.arange(rays) / rays
    turned = theirs[released.released_rays(rays)]
    np.testing.assert_allclose(np.sin(turned), np.cos(ours), atol=1e-12)
    np.testing.assert_allclose(np.cos(turned), np.sin(ours), atol=1e-12)


def test_the_run_is_accepted_by_what_comes_next(small, tmp_path, capsys):
    run_import(small, tmp_path)
    found = load_predictor(tmp_path / "run", score_threshold=0.0)([np.zeros((40, 50, 3), np.uint8)])[0]
    assert found.polygons.shape[1:] == (8, 2)
    classes = json.loads((tmp_path / "run/dataset.json").read_text())["classes"]
    assert classes[0] == {"name": "person", "category_id": 1} and classes[79] == {"name": "toothbrush", "category_id": 90}
    assert classes[11] == {"name": "stop sign", "category_id": 13}


def test_coco_classes_are_those_of_coco(shared):
    categories = json.loads((shared / "data/coco_dev/annotations/instances_dev.json").read_text())["categories"]
    assert {c["id"]: c["name"] for c in categories} == released.COCO and list(released.COCO) == sorted(released.COCO)


def test_without_a_box_branch_its_tensors_are_named_as_unused(small, tmp_path, capsys):
    model_config = dataclasses.replace(SMALL.model, head=dataclasses.replace(SMALL.model.head, box=False))
    run_import(small, tmp_path, dataclasses.replace(SMALL, model=model_config, conventions="paper"))
    assert "the box branch, 19 tensors, goes unused" in capsys.readouterr().err


# ---- train --start with a released file


def start_config(**model):
    """A network of one's own with that backbone: other levels, classes and rays in strides, unless `model` says otherwise."""
    config = override(SMALL, conventions="paper", model={"fpn": FPNConfig(channels=256, levels=(3, 4, 5)), **model})
    return override(config, model={"head": dataclasses.replace(config.model.head, box=False, ray_unit="stride")})


def started(state, config, folder, capsys):
    np.savez(folder / "small.npz", **state)
    model = PolarMask(config, 2)
    start_from(model, folder / "small.npz")
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and out.startswith(f"starting from {folder / 'small.npz'}: ")
    return model, out


def test_a_training_starts_from_what_fits_of_a_released_file(small, tmp_path, capsys):
    model, said = started(small, start_config(), tmp_path, capsys)
    kernel = small["backbone.layer3.1.conv2.weight"].transpose(2, 3, 1, 0)
    np.testing.assert_array_equal(model.backbone.stages[2][1].convs[1].conv.kernel, kernel)
    np.testing.assert_array_equal(
        model.backbone.stem.conv.kernel, small["backbone.conv1.weight"][:, ::-1].transpose(2, 3, 1, 0)
    )
    np.testing.assert_array_equal(model.decoder.outputs["4"].conv.bias, small["neck.fpn_convs.1.conv.bias"])
    np.testing.assert_array_equal(
        model.head.ray_convs[3].conv.kernel, small["bbox_head.mask_convs.3.conv.weight"].transpose(2, 3, 1, 0)
    )
    assert not model.head.rays.conv.bias.numpy().any() and float(model.head.scales["3"]) == 1  # of another unit
    assert "anew: scale3, scale4, scale5 and 4 more; " in said  # and classes and rays, of each kernel and bias
    assert "its rays are in pixels: model.head.ray_unit=pixel takes them" in said


def test_rays_in_pixels_are_taken_and_turned(small, tmp_path, capsys):
    config = start_config()
    config = override(config, model={"head": dataclasses.replace(config.model.head, ray_unit="pixel")})
    model, said = started(small, config, tmp_path, capsys)
    bias = small["bbox_head.polar_mask.bias"]
    np.testing.assert_array_equal(model.head.rays.conv.bias, bias[[2, 1, 0, 7, 6, 5, 4, 3]])
    assert float(model.head.scales["4"]) == np.float32(0.9)
    assert said.endswith("anew: head/classes/conv/kernel, head/classes/conv/bias\n")
    other, said = started(small, override(config, model={"rays": 12}), tmp_path, capsys)
    assert not other.head.rays.conv.bias.numpy().any() and "head/rays/conv/kernel" in said


def test_heads_and_pyramids_of_other_layers_begin_anew(small, tmp_path, capsys):
    thin = HeadConfig(channels=32, convs=1, kernel=1, norm="batch", conv="separable")
    config = override(start_config(), model={"head": thin, "fpn": FPNConfig(channels=256, levels=(2, 3), conv="separable")})
    model, said = started(small, config, tmp_path, capsys)
    np.testing.assert_array_equal(model.decoder.laterals["5"].conv.bias, small["neck.lateral_convs.2.conv.bias"])
    assert "decoder/lateral2/conv/kernel" in said


def test_settings_that_a_released_file_needs_are_named_at_once(small, tmp_path):
    np.savez(tmp_path / "small.npz", **small)
    config = override(start_config(), model={"mean": (0.0, 0.0, 0.0), "std": (58.0, 57.0, 57.0)})
    backbone = dataclasses.replace(config.model.backbone, stride_in="3x3", blocks=(1, 1, 1, 1), norm="group")
    model = PolarMask(override(config, model={"backbone": backbone}), 2)
    before = [v.numpy() for v in model.variables]
    with pytest.raises(InputError) as error:
        start_from(model, tmp_path / "small.npz")
    for setting in ("'model.backbone.blocks=[1,1,2,1]'", "model.backbone.stride_in=1x1", "model.backbone.norm=frozen"):
        assert f"--set {setting}" in str(error.value)
    assert "--set 'model.mean=[122.7717,115.9465,102.9801]' --set 'model.std=[1.0,1.0,1.0]'" in str(error.value)
    for value, variable in zip(before, model.variables, strict=True):
        np.testing.assert_array_equal(variable, value)


def changed(state, drop=(), **add):
    return {**{key: value for key, value in state.items() if key not in drop}, **add}


def test_refusals(small, tmp_path):
    more = {"backbone.layer1.0.conv2_offset.weight": np.zeros((18, 64, 3, 3), np.float32)}
    assert "DCN" in refusal(changed(small, **more), tmp_path)
    assert "not a PolarMask checkpoint" in refusal({"conv1.weight": np.zeros((64, 3, 7, 7), np.float32)}, tmp_path)
    assert "[1, 1, 2, 1] blocks in its stages, the config [3, 4, 6, 3]" in refusal(
        small,
        tmp_path,
        dataclasses.replace(
            SMALL,
            model=dataclasses.replace(SMALL.model, backbone=dataclasses.replace(SMALL.model.backbone, blocks=(3, 4, 6, 3))),
        ),
    )
    grouped = dataclasses.replace(SMALL.model.backbone, groups=64, stride_in="3x3")
    config = dataclasses.replace(SMALL, model=dataclasses.replace(SMALL.model, backbone=grouped))
    assert "of a ResNet, the config a ResNeXt" in refusal(small, tmp_path, config)
    assert "has 3 classes, not 80; give the data" in refusal(small_state(classes=3), tmp_path)
    assert "has 36 rays, not 8; set model.rays" in refusal(small_state(rays=36), tmp_path)
    missing = changed(small, drop=["neck.fpn_convs.3.conv.bias"])
    assert "tensors 1 missing (neck.fpn_convs.3.conv.bias)" in refusal(missing, tmp_path)
    assert "tensors 1 unexpected (neck.extra)" in refusal(changed(small, **{"neck.extra": np.zeros(3, np.float32)}), tmp_path)
    wrong = changed(small, **{"neck.fpn_convs.0.conv.bias": np.zeros(128, np.float32)})
    assert "1 of another shape (neck.fpn_convs.0.conv.bias (128 instead of 256))" in refusal(wrong, tmp_path)
    six = dataclasses.replace(SMALL, model=dataclasses.replace(SMALL.model, rays=18))
    assert "unless 4 divides" in refusal(small_state(rays=18), tmp_path, six)


def test_a_directory_in_use_is_not_touched(small, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/mine").write_text("x")
    with pytest.raises(InputError, match="exists already"):
        run_import(small, tmp_path)
    assert [file.name for file in (tmp_path / "run").iterdir()] == ["mine"]
    (tmp_path / "run/mine").unlink()
    with files.lock(tmp_path / "run", "train"), pytest.raises(InputError, match="in use by polarmask train"):
        run_import(small, tmp_path)


def test_a_broken_file_is_one_line_and_exit_code_2(tmp_path, capsys):
    for name, content in {"half.pth": b"PK\x03\x04 half of a zip", "text.pth": b"hello", "half.npz": b"PK\x03\x04"}.items():
        (tmp_path / name).write_bytes(content)
        arguments = ["import-weights", str(tmp_path / name), "--config", "released_r50_1x", "--out", str(tmp_path / "run")]
        assert cli.main(arguments) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1 and name in lines[0]
    assert not (tmp_path / "run").exists()


def test_half_precision_is_taken_and_said(small, tmp_path, capsys):
    model = run_import({key: value.astype(np.float16) for key, value in small.items()}, tmp_path)
    assert "half precision" in capsys.readouterr().err
    expected = small["neck.fpn_convs.0.conv.bias"].astype(np.float16)
    np.testing.assert_array_equal(model.decoder.outputs["3"].conv.bias, expected)
