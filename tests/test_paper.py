"""The paper's and the released recipes from data to exported files, with a narrow, shallow network of the same kind."""

import json
import shutil

import numpy as np
import pytest

from polarmask_tf import cli
from polarmask_tf.inference.predictor import load_predictor

pytestmark = pytest.mark.slow

NARROW = [
    "model.backbone.blocks=[1,1,1,1]",
    "model.backbone.width=8",
    "model.backbone.weights=''",
    "model.fpn.channels=16",
    "model.head.channels=16",
    "model.head.convs=1",
    "data.batch=4",
    "train.steps=4",
    "train.checkpoint_every=4",
    "train.warmup_steps=2",
    "postprocess.score_threshold=0.001",
    "postprocess.pre_nms_top_k=50",
    "postprocess.max_detections=20",
]
SIZES = {"paper_1x": "data.size=[64,100]", "released_r50_1x": "data.size=[64,96]"}


def polarmask(*args):
    return cli.main([str(arg) for arg in args])


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Shapes in landscape and portrait pictures: half of the squares lose a quarter of their width, half of their height."""
    work = tmp_path_factory.mktemp("paper")
    assert polarmask("shapes", work / "shapes", "--train", 16, "--val", 4, "--size", 64) == 0
    from PIL import Image

    for split in ("train", "val"):
        file = work / "shapes" / split / "annotations.json"
        coco = json.loads(file.read_text())
        for image in coco["images"]:
            name = work / "shapes" / split / "images" / image["file_name"]
            image["width"], image["height"] = (64, 48) if image["id"] % 2 else (48, 64)
            Image.open(name).crop((0, 0, image["width"], image["height"])).save(name)
        file.write_text(json.dumps(coco))
        assert polarmask("convert", file, file.parent / "images", work / split, "--processes", 1) == 0
    return work


@pytest.mark.parametrize("recipe", SIZES)
def test_a_recipe_trains_evaluates_and_exports(data, tmp_path, capfd, recipe):
    overrides = [word for item in (*NARROW, SIZES[recipe]) for word in ("--set", item)]
    run = tmp_path / "run"
    common = ["train", "--config", recipe, "--data", data / "train", "--out", run, *overrides]
    if recipe == "paper_1x":  # weights that are missing cost nothing but a line: the run directory is none yet
        assert polarmask(*common, "--set", f"model.backbone.weights={tmp_path / 'none.h5'}") == 2
        error = capfd.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("polarmask: error: ") and "model.backbone.weights" in error
    assert polarmask(*common) == 0
    assert "frozen parts of the backbone start from noise" in capfd.readouterr().err
    assert polarmask("evaluate", run, "--data", data / "val", "--json", tmp_path / "metrics.json") == 0
    assert json.loads((tmp_path / "metrics.json").read_text())["detections"] > 0
    assert polarmask("export", run, "--out", tmp_path / "export", "--images", data / "val") == 0
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (48, 64, 3), np.uint8), rng.integers(0, 256, (64, 48, 3), np.uint8)]
    found = load_predictor(run)(images)
    for path in ("saved_model", "model.tflite"):
        other = load_predictor(tmp_path / "export" / path)(images)
        # A .tflite of the paper's recipe has one size, in which a portrait image is smaller than in training.
        pairs = list(zip(found, other, strict=True))[: 1 if path == "model.tflite" and recipe == "paper_1x" else 2]
        for mine, theirs in pairs:
            assert len(mine.scores) == len(theirs.scores) > 0
            np.testing.assert_allclose(theirs.scores, mine.scores, atol=2e-3)
    # Frozen: the stem, C2 and every BatchNorm are as they were before training.
    from polarmask_tf.weights.runs import load_run

    model = load_run(run)
    learning = {v.name for v in model.trainable_variables}
    frozen = {v.name.partition("backbone/")[2] for v in model.variables if v.name not in learning}
    same = ("stem/conv/kernel:0", "stage2_block1/conv1/conv/kernel:0", "stage5_block1/norm1/gamma:0")
    assert set(same) <= frozen
    assert "stage3_block1/conv1/conv/kernel:0" not in frozen
    assert any(name.endswith("backbone/stage3_block1/conv1/conv/kernel:0") for name in learning)
    assert (model.backbone.stem_norm.moving_mean.numpy() == 0).all()
    shutil.rmtree(tmp_path)
