"""What the exports do to an image, for every data.fit, and the comparison that `polarmask export` prints."""

import io
import json
import sys

import numpy as np
import pytest
import tf_keras
from PIL import Image

from helpers.exports import RADIUS, expected_scale, fake_model, hexagon_around_brightest, spot
from polarmask_tf import cli, lite
from polarmask_tf import config as configs
from polarmask_tf.data import dataset
from polarmask_tf.errors import InputError
from polarmask_tf.export import export, graph, parity, tflite
from polarmask_tf.inference.predictor import Detections, load_predictor, network_input, run_predictor
from polarmask_tf.ops import placement

SIZES = [(50, 120), (200, 90), (64, 96), (480, 640), (1, 1), (3, 2000), (33, 47), (120, 50), (427, 640), (2000, 3)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("fit", ["letterbox", "stretch", "short_side"])
def test_the_graphs_resizing_is_pillows(fit, size):
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    placed, filled = placement.resize(image[None], (64, 96), fit)
    expected, (back_x, back_y) = network_input(image, configs.DataConfig(size=(64, 96), fit=fit))
    assert placed.shape[1:] == expected.shape
    assert np.abs(placed[0].numpy().astype(int) - expected).max() <= 1
    height, width = expected.shape[:2]
    np.testing.assert_allclose(filled, [size[1] / back_x / width, size[0] / back_y / height], rtol=1e-6)


def test_the_graph_finds_the_same_canvas_for_every_size():
    """Rounded in single precision some sizes would come out one pixel, and a canvas 32 pixels, apart."""
    rng = np.random.default_rng(0)
    for size in [*rng.integers(1, 800, (100, 2)).tolist(), [640, 1066], [333, 555], [25, 50], [97, 64]]:
        image = np.zeros((*size, 3), np.uint8)
        rounded = [max(1, round(side * min(48 / min(size), 90 / max(size)))) for side in size]  # the rule, by hand
        expected, back = network_input(image, configs.DataConfig(size=(48, 90), fit="short_side"))
        assert expected.shape[:2] == tuple(-(-side // 32) * 32 for side in rounded)
        np.testing.assert_allclose(back, np.divide(size, rounded)[::-1])
        placed, filled = placement.resize(image[None], (48, 90), "short_side")
        assert placed.shape[1:] == expected.shape
        np.testing.assert_allclose(filled, np.divide(rounded, expected.shape[:2])[::-1], rtol=1e-6)


@pytest.fixture(scope="module", params=["letterbox", "stretch", "short_side"])
def three(request, tmp_path_factory):
    """A fit, and the same model as run, SavedModel and .tflite that take images so."""
    fit = request.param
    model = fake_model(fit, (48, 90) if fit == "short_side" else (64, 96))
    folder = tmp_path_factory.mktemp(fit)
    paths = [
        graph.export_saved_model(model, folder / "saved_model"),
        tflite.export_tflite(model, folder / "model.tflite"),
    ]
    return fit, {"run": run_predictor(model), **{path.name: load_predictor(path) for path in paths}}, paths


@pytest.mark.parametrize("height, width", [(64, 96), (96, 64), (128, 192), (40, 150), (150, 40), (48, 90), (90, 48)])
def test_all_three_put_polygons_onto_the_image(three, height, width):
    fit, predictors, _ = three
    x, y = width // 3, height // 2
    for name, predictor in predictors.items():
        wide, high = expected_scale(fit, name, height, width)
        size = int(np.ceil(2 * max(wide, high)))  # so that a pixel of the input is bright whatever the resizing
        (found,) = predictor([spot(height, width, x, y, size)])
        polygon = found.polygons[1]  # the smaller hexagon
        assert polygon[0, 0] - polygon[3, 0] == pytest.approx(RADIUS * wide, rel=1e-4), name
        assert polygon[1, 1] - polygon[4, 1] == pytest.approx(RADIUS * np.sqrt(3) / 2 * high, rel=1e-4), name
        center = (polygon[0] + polygon[3]) / 2
        assert (x - wide, y - high) <= tuple(center) and tuple(center) <= (x + size + wide, y + size + high), name
    same = ["saved_model"] if fit == "short_side" else ["saved_model", "model.tflite"]
    run, *others = (predictors[name]([spot(height, width, x, y, size)])[0] for name in ("run", *same))
    for other in others:
        np.testing.assert_allclose(run.polygons, other.polygons, atol=1e-2)


def test_a_batch_of_mixed_images_comes_back_in_order(three):
    _, predictors, _ = three
    images = [spot(64, 96, 60, 20, 6), spot(96, 64, 20, 60, 6), spot(64, 96, 10, 40, 6), spot(30, 30, 12, 12, 4)]
    for name, predictor in predictors.items():
        together, alone = predictor(images), [predictor([image])[0] for image in images]
        for one, other in zip(together, alone, strict=True):
            np.testing.assert_array_equal(one.polygons, other.polygons, err_msg=name)
        assert predictor([]) == []


def test_metadata_says_how_an_image_is_resized(three):
    fit, predictors, (saved, lite_file) = three
    model = lite.PolarMaskLite(lite_file)
    assert model.metadata["input"]["resize"] == ("letterbox" if fit == "short_side" else fit)
    assert json.loads((saved / "assets.extra" / "metadata.json").read_text())["input"]["resize"] == fit
    assert {predictor.input_size for predictor in predictors.values()} == {(64, 96)}  # short_side's in multiples of 32


def test_one_graph_for_inputs_of_every_size():
    traces = []

    def detect(images):
        traces.append(images.shape)
        return hexagon_around_brightest(images)

    model = fake_model("short_side", (48, 90))
    model.detect = detect
    run_predictor(model)([spot(h, w, 5, 5, 4) for h, w in ((40, 60), (60, 40), (30, 90), (64, 64))])
    assert [shape.as_list() for shape in traces] == [[None, None, None, 3]]


@pytest.fixture(scope="module")
def short_side_export(tmp_path_factory):
    """A real network with random weights whose images are resized by their shorter side: run directory and exports."""
    from polarmask_tf.data import records
    from polarmask_tf.modeling.polarmask import PolarMask
    from polarmask_tf.weights import runs

    folder = tmp_path_factory.mktemp("short_side")
    overrides = [
        "model.rays=12",
        "model.backbone.width=8",
        "model.fpn.channels=16",
        "model.fpn.levels=[3,4,5,6]",
        "targets.ranges=[]",
        "model.head.channels=16",
        "model.head.convs=1",
        "data.fit=short_side",
        "data.size=[48,90]",
        "postprocess.max_detections=20",
        "postprocess.score_threshold=0.001",
        f"data.val={folder / 'data'}",
    ]
    config = configs.load("shapes", overrides)
    tf_keras.utils.set_random_seed(0)
    model = PolarMask(config, 1)
    rng = np.random.default_rng(0)
    for variable in model.head.variables:  # weights of its start give every location nearly the same score
        variable.assign(variable + rng.normal(0, 0.1, variable.shape))
    runs.write_run(folder / "run", config, {"classes": [{"name": "a", "category_id": 1}]})
    runs.save(model, folder / "run", 0, weights_only=True)
    (folder / "data").mkdir()
    images = [rng.integers(0, 256, (*size, 3), np.uint8) for size in ((48, 80), (80, 48), (48, 48), (48, 90), (64, 64))]
    shard = folder / "data" / "val-00000-of-00001.tfrecord"
    with open(shard, "wb") as out:
        for i, image in enumerate(images):
            file = io.BytesIO()
            Image.fromarray(image).save(file, "PNG")
            records.write_record(
                out,
                records.encode_example(
                    encoded=file.getvalue(),
                    format="png",
                    file_name="x.png",
                    image_id=i,
                    height=image.shape[0],
                    width=image.shape[1],
                    instances=[records.Instance(1, 0, "a", False, 1.0, (0, 0, 1, 1), [], b"")],
                ),
            )
    content = {
        "format": dataset.FORMAT,
        "name": "val",
        "num_images": len(images),
        "num_instances": 5,
        "num_crowd": 0,
        "classes": [{"name": "a", "category_id": 1}],
        "max_instances": 1,
        "max_edges": 3,
        "shards": [shard.name],
        "skipped": {},
    }
    (folder / "data" / "dataset.json").write_text(json.dumps(content))
    rows = export.export_model(folder / "run", folder / "out")
    return folder, rows, images


@pytest.mark.slow
def test_a_network_finds_the_same_in_landscape_and_portrait(short_side_export):
    folder, _, images = short_side_export
    run, exported = load_predictor(folder / "run"), load_predictor(folder / "out" / "saved_model")
    assert run.input_size == exported.input_size == (64, 96)
    for image in images[:4]:  # of a size that needs no resizing, which differs by a gray level
        # Not by parity.compare: a network of chance also finds polygons of no area, which match nothing, not even themselves.
        one, other = run([image])[0], exported([image])[0]
        assert len(one.scores) > 5
        np.testing.assert_array_equal(one.classes, other.classes)
        np.testing.assert_allclose(one.scores, other.scores, atol=1e-5)
        np.testing.assert_allclose(one.polygons, other.polygons, atol=1e-2)
    together = run(images)  # three shapes of input in one call
    for one, image in zip(together, images, strict=True):
        assert (one.polygons >= 0).all() and (one.polygons <= image.shape[1::-1]).all()
        np.testing.assert_allclose(one.scores, run([image])[0].scores, atol=1e-5)


@pytest.mark.slow
def test_export_compares_each_on_images_resized_as_it_does(short_side_export, capsys):
    from polarmask_tf.weights.runs import load_run

    folder, rows, images = short_side_export
    # The .tflite letterboxes, and so does the Keras model that it is compared with: both resize by Pillow, and all agree.
    keras, edge = run_predictor(load_run(folder / "run"), "letterbox"), load_predictor(folder / "out" / "model.tflite")
    for image in images:
        one, other = keras([image])[0], edge([image])[0]
        np.testing.assert_allclose(one.scores, other.scores, atol=1e-5)
        np.testing.assert_allclose(one.polygons, other.polygons, atol=1e-2)
    assert rows["model.tflite"]["detections"] == sum(len(found.scores) for found in keras(images)) > 20
    assert rows["model.tflite"]["pixels"] < 1e-2
    assert lite.PolarMaskLite(folder / "out" / "model.tflite").metadata["input"]["resize"] == "letterbox"
    export.export_model(folder / "run", folder / "again", images=folder / "data")
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert warnings == ["warning: model.tflite fits every image into 64 x 96: a portrait one gets smaller than in training"]


def detections(*rows):
    """Squares of side 20 as (score, class, left)."""
    corners = np.array([[0, 0], [20, 0], [20, 20], [0, 20]], np.float32)
    polygons = np.array([corners + np.float32([left, 10]) for _, _, left in rows], np.float32).reshape(-1, 4, 2)
    boxes = np.concatenate([polygons.min(1), polygons.max(1)], 1) if rows else np.zeros((0, 4), np.float32)
    return Detections(np.float32([r[0] for r in rows]), np.int32([r[1] for r in rows]), boxes, polygons)


def test_compare_matches_by_class_and_overlap():
    image = np.zeros((50, 100, 3), np.uint8)
    a = detections((0.9, 0, 0), (0.8, 1, 50), (0.7, 0, 30))
    b = detections((0.85, 0, 3), (0.8, 0, 50), (0.7, 0, 30))
    row = parity.compare(lambda images: [a], lambda images: [b], [image])
    assert (row["detections"], row["matched"]) == (3, 2)
    assert row["score"] == pytest.approx(0.05, abs=1e-6) and row["pixels"] == pytest.approx(3)
    nothing = parity.compare(lambda images: [a], lambda images: [detections()], [image])
    assert (nothing["detections"], nothing["matched"]) == (3, 0)
    assert "saved_model" in parity.format_rows({"saved_model": row})


def test_metadata_says_what_a_user_needs():
    from polarmask_tf import __version__, config
    from polarmask_tf.modeling.polarmask import PolarMask

    model = PolarMask(config.load("shapes"), [{"name": "cat", "category_id": 17}])
    found = graph.metadata(model)
    assert found["version"] == __version__ and found["classes"] == [{"name": "cat", "category_id": 17}]
    assert (found["input"]["height"], found["input"]["width"], found["rays"]) == (128, 128, 72)


@pytest.mark.parametrize("box", [False, True])
def test_a_file_says_whether_a_gpu_would_do_it_wrong(box, tmp_path, monkeypatch):
    from polarmask_tf.modeling.polarmask import PolarMask

    monkeypatch.setattr(tflite, "convert", lambda *args, **options: b"TFL3")
    model = PolarMask(
        configs.load("shapes", ["model.refine_channels=0", f"model.head.box={json.dumps(box)}"]),
        [{"name": "cat", "category_id": 17}],
    )
    path = tflite.export_tflite(model, tmp_path / "a.tflite")
    assert lite.read_metadata(path).get("cpu_only", False) is box


def test_without_litert_files_are_written_and_not_compared(tmp_path, capsys, monkeypatch):
    """It is an extra; that it was missing used to be said once all was converted, as an error."""
    for name in ("ai_edge_litert", "ai_edge_litert.interpreter"):
        monkeypatch.setitem(sys.modules, name, None)
    model, picture = fake_model("letterbox", (32, 48)), io.BytesIO()
    Image.fromarray(spot(32, 48, 20, 10, 1)).save(picture, "PNG")
    monkeypatch.setattr(export, "_load", lambda model, overrides: model)
    monkeypatch.setattr(export, "_write", lambda job, model, out: out)
    monkeypatch.setattr(export, "_first_images", lambda *_: [picture.getvalue()])
    monkeypatch.setattr(export, "load_predictor", lambda path: run_predictor(model))
    assert list(export.export_model(model, tmp_path / "out")) == ["saved_model"]
    assert "the .tflite files are not compared: that needs ai-edge-litert: " in capsys.readouterr().out
    monkeypatch.setattr(export.dataset, "load", lambda path: None)
    with pytest.raises(InputError, match=r"--data runs the \.tflite files, which needs ai-edge-litert"):
        export.export_model(model, tmp_path / "none", data=tmp_path)
    assert not (tmp_path / "none").exists()
    assert cli.main(["inspect", str(tmp_path / "model.tflite")]) == 2
    assert "model.tflite: running it needs ai-edge-litert: pip install ai-edge-litert" in capsys.readouterr().err
