"""What `evaluate` says beyond AP: the score of best F1, which run and exports then have, curves, groups, and the page."""

import dataclasses
import json
import re
import shutil
import types
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from helpers.pages import check_page
from helpers.polygons import polar_star
from polarmask_tf import cli, lite
from polarmask_tf.config.schema import PostprocessConfig
from polarmask_tf.data.convert import convert
from polarmask_tf.errors import InputError
from polarmask_tf.export import graph, tflite
from polarmask_tf.inference import html, report, thresholds
from polarmask_tf.inference import predictor as predictors
from polarmask_tf.inference.coco_metrics import coco_metrics, polygons_to_rle
from polarmask_tf.inference.evaluate import default_data, evaluate
from polarmask_tf.inference.predictor import Predictor, load_predictor
from polarmask_tf.weights import runs

RUN = Path(__file__).parent / "old_run"
CATEGORIES = [{"id": 3, "name": "cat"}, {"id": 5, "name": "<b>dog</b>"}]


def scene(seed=0, images=10, size=120):
    """Ground truth of two classes with a crowd, and results near it: some too far off, some of the wrong class."""
    rng = np.random.default_rng(seed)
    truth = {"images": [], "annotations": [], "categories": CATEGORIES}
    results = []
    for image in range(1, images + 1):
        truth["images"].append({"id": image, "file_name": f"{image}.png", "height": size, "width": size})
        for _ in range(rng.integers(2, 6)):
            polygon = polar_star(rng, *rng.uniform(20, size - 20, 2), rng.uniform(8, 25)).clip(0, size)
            category = int(rng.choice([3, 5]))
            (rle,) = polygons_to_rle([polygon], size, size)
            box = [0, 0, 1, 1]
            entry = {"id": 50 + len(truth["annotations"]), "image_id": image, "category_id": category, "bbox": box}
            crowd = int(rng.random() < 0.1)
            truth["annotations"].append(
                {**entry, "segmentation": rle, "iscrowd": crowd, "area": 300.0 + 1000 * (category == 5)}
            )
            for _ in range(rng.integers(0, 3)):
                near = polygon + rng.normal(0, 4, 2)
                label = category if rng.random() < 0.85 else 8 - category
                result = {"image_id": image, "category_id": label, "score": float(rng.random()), "bbox": box}
                results.append({**result, "segmentation": polygons_to_rle([near], size, size)[0]})
    return truth, results


def counts_above(truth, results, least):
    """(hits, shown, objects) by pycocotools of what scores at least so much, matched anew. `least`: of each category."""
    results = [dict(r) for r in results if r["score"] >= least[r["category_id"]]]
    metrics = coco_metrics(truth, results)
    return int((metrics.matches["iou"] > 0).sum()), len(metrics.matches), len(metrics.objects)


def f1(hits, shown, objects):
    return 2 * hits / (shown + objects)


@pytest.mark.parametrize("seed", range(3))
def test_the_best_f1_is_the_best_of_every_threshold(seed):
    truth, results = scene(seed)
    for ids in ((3, 5), (3,), (5,)):
        part = dict(truth, categories=[c for c in CATEGORIES if c["id"] in ids])
        part["annotations"] = [a for a in truth["annotations"] if a["category_id"] in ids]
        some = [r for r in results if r["category_id"] in ids]
        brute = max(f1(*counts_above(part, some, dict.fromkeys((3, 5), r["score"]))) for r in some)
        metrics = coco_metrics(part, some)
        best, _ = thresholds.find(metrics)
        assert best.f1 == pytest.approx(brute)
        hits, shown, objects = counts_above(part, some, dict.fromkeys((3, 5), best.threshold))
        assert f1(hits, shown, objects) == pytest.approx(brute)  # and so it is at the threshold
        assert (best.precision, best.recall) == pytest.approx((hits / shown, hits / objects))
        apart = [r["score"] for r in some if abs(r["score"] - best.threshold) < 1e-9]
        assert not apart
    both = thresholds.find(coco_metrics(truth, results))[1]
    assert [b.f1 for b in both][1] == pytest.approx(best.f1)  # each class as if it were alone


def test_best_f1_by_hand():
    scores, hits = np.array([0.9, 0.5, 0.5, 0.4, 0.2]), np.array([True, True, False, True, False])
    found = thresholds.curve(scores, hits, 4)
    assert found.scores.tolist() == [0.9, 0.5, 0.4, 0.2]  # of equal scores none comes alone
    assert found.precision == pytest.approx([1, 2 / 3, 3 / 4, 3 / 5]) and found.recall == pytest.approx(
        [1 / 4, 2 / 4, 3 / 4, 3 / 4]
    )
    assert thresholds.best_f1(scores, hits, 4) == pytest.approx((0.3, 2 * 3 / 8, 0.75, 0.75))
    assert thresholds.best_f1(scores[:1], hits[:1], 4).threshold == pytest.approx(0.891)  # nothing below
    assert thresholds.best_f1(scores, ~hits, 0).f1 == thresholds.best_f1(scores[:0], hits[:0], 4).f1 == 0


def test_precision_and_recall_are_those_that_pycocotools_interpolates():
    truth, results = scene(4, images=30)
    metrics = coco_metrics(truth, results)
    coco, found = COCO(), COCO()
    coco.dataset = {**truth, "annotations": [dict(a) for a in truth["annotations"]]}
    coco.createIndex()
    found = coco.loadRes([{k: v for k, v in r.items() if k != "bbox"} for r in results])
    judge = COCOeval(coco, found, "segm")
    judge.evaluate()
    judge.accumulate()
    for k, category in enumerate((3, 5)):
        of = metrics.matches[metrics.matches["category"] == category]
        line = thresholds.curve(of["score"], of["iou"] > 0, metrics.per_class[k]["objects"])
        envelope = np.maximum.accumulate(line.precision[::-1])[::-1]
        at = np.searchsorted(line.recall, judge.params.recThrs, side="left")
        ours = np.append(envelope, 0)[np.minimum(at, len(envelope))]
        np.testing.assert_allclose(ours, judge.eval["precision"][0, :, k, 0, -1])


def test_a_class_of_few_objects_takes_the_threshold_of_all():
    truth, results = scene(0, images=30)
    few = {a["id"] for a in [a for a in truth["annotations"] if a["category_id"] == 5][5:]}
    truth["annotations"] = [a for a in truth["annotations"] if a["id"] not in few]
    metrics = coco_metrics(truth, results)
    every, (cat, dog) = thresholds.find(metrics)
    assert len({every.threshold, cat.threshold, dog.threshold}) == 3
    assert thresholds.shown(metrics, [5, 3]) == {"overall": every.threshold, "classes": [every.threshold, cat.threshold]}
    assert thresholds.shown(coco_metrics(truth, []), [3, 5]) is None
    alone = dict(truth, annotations=truth["annotations"][:10])
    assert thresholds.shown(coco_metrics(alone, results), [3, 5]) is None


def test_objects_are_grouped_and_images_ordered():
    truth, results = scene(1)
    metrics = coco_metrics(truth, results)
    objects = metrics.objects
    ceilings = np.linspace(0.4, 1.0, len(objects))
    ceilings[0] = np.nan
    by = report.groups(metrics, ceilings)
    least = report.least_scores(metrics)
    hits, shown, count = counts_above(truth, results, least)
    every, small, medium, large = by["size"]
    assert every["objects"] == count == small["objects"] + medium["objects"] and large["objects"] == 0
    assert every["recall"] == pytest.approx(hits / count) and large["recall"] is None
    assert every["AP"] == metrics.values["AP"] and small["AP"] == metrics.values["APS"]
    close = (objects["score"] >= [least[c] for c in objects["category"]]) & (objects["iou"] >= 0.75)
    assert every["recall75"] == pytest.approx(close.mean())
    assert by["ceiling"][0]["name"] == "0 to 0.5" and by["ceiling"][-1] | {"recall": 0} == {
        **by["ceiling"][-1],
        "name": "of at most a pixel",
        "objects": 1,
        "recall": 0,
        "ceiling": None,
    }
    assert sum(row["objects"] for row in by["ceiling"]) == count
    assert sum(row["objects"] * row["recall"] for row in by["ceiling"]) == pytest.approx(hits)
    worst = report.worst_images(metrics)
    wrong = {row["image"]: row["missed"] + row["false"] for row in worst}
    assert list(wrong.values()) == sorted(wrong.values(), reverse=True)
    for image, expected in wrong.items():
        alone = {
            **truth,
            **{k: [e for e in truth[k] if image in (e.get("image_id"), e["id"])] for k in ("images", "annotations")},
        }
        hits, shown, count = counts_above(alone, [r for r in results if r["image_id"] == image], least)
        assert expected == shown + count - 2 * hits


# ---- pages


def test_whatever_a_name_says_stays_text():
    evil = '"><script>alert(1)</script><img src=x onerror=alert(1)>\x1b[31m\x00'
    line = ([0, 1], [1, float("nan")])
    body = [html.table([evil], [[evil]]), html.line_chart(evil, {evil: line, "b": ([], [])}, evil, evil)]
    body.append(html.picture(Image.new("RGB", (3, 2)), evil))
    text = html.page(evil, body)
    assert "script" not in check_page(text).seen and "\x1b" not in text and "\x00" not in text and "nan" not in text
    assert text.count("&lt;script&gt;") == 8


def test_a_line_chart_has_the_points_where_they_belong():
    text = html.line_chart("t", {"a": ([0, 0.5, 1], [0, 1, 0.25])}, "x", "y")
    points = re.findall(r'points="([^"]*)"', text)[-1]
    (x0, y0), (x1, y1), (x2, y2) = (map(float, point.split(",")) for point in points.split())
    assert (x1 - x0, y1 - y0) == pytest.approx((x2 - x1, (y0 - y2) * -4), abs=0.3) and y1 < y2 < y0
    many = np.linspace(0, 1, 20_000)
    assert html.line_chart("t", {"a": (many, many)}, "x", "y").count(",") < 500


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """30 images of crosses, which rays get wrong, and discs, converted; and a predictor that knows them by their color."""
    folder = tmp_path_factory.mktemp("data")
    truth, _ = scene(3, images=30)
    angles = 2 * np.pi * np.arange(36) / 36
    disc = np.stack([np.cos(angles), np.sin(angles)], -1)
    truth["annotations"] = []
    answers = {}
    (folder / "images").mkdir()
    for image in truth["images"]:
        polygons = [disc * 15 + (30, 30), disc * 15 + (80, 80)]
        for k, polygon in enumerate(polygons):
            number = len(truth["annotations"]) + 1
            x, y = polygon.mean(0)
            cross = [[x + a, y + b] for a, b in ((-24, -2), (24, -2), (24, 2), (-24, 2))]
            arm = [[x + b, y + a] for a, b in ((-24, -2), (24, -2), (24, 2), (-24, 2))]
            rings = [np.ravel(r).tolist() for r in ((polygon,) if k == 0 else (cross, arm))]
            entry = {"id": number, "image_id": image["id"], "category_id": 3 + 2 * k, "iscrowd": 0, "segmentation": rings}
            truth["annotations"].append({**entry, "area": 700.0})
        scores = np.float32([0.9 - image["id"] / 100, 0.8, 0.1 + image["id"] / 100])
        found = np.float32([polygons[0], disc * 5 + (80, 80), disc * 12 + (30, 90)])
        answers[image["id"]] = {"scores": scores, "classes": np.int32([0, 1, 0]), "polygons": found}
        answers[image["id"]]["boxes"] = np.concatenate([found.min(1), found.max(1)], -1)
        Image.new("RGB", (120, 120), (image["id"], 0, 0)).save(folder / "images" / image["file_name"])
    (folder / "a.json").write_text(json.dumps(truth))
    convert(folder / "a.json", folder / "images", folder / "set", processes=1, progress=False)
    classes = [{"name": c["name"], "category_id": c["id"]} for c in CATEGORIES]
    run = lambda images: [answers[int(image[0, 0, 0])] for image in images]  # noqa: E731
    return folder / "set", Predictor("run", classes, (128, 128), 4, run, rays=36)


def test_the_report_says_what_loses(data, tmp_path, monkeypatch, capsys):
    directory, predictor = data
    monkeypatch.setattr(predictors, "load_predictor", lambda *_, **__: predictor)
    arguments = [
        "evaluate",
        "model",
        "--data",
        str(directory),
        "--report",
        str(tmp_path / "r"),
        "--json",
        str(tmp_path / "a.json"),
    ]
    assert cli.main(arguments) == 0
    out = capsys.readouterr().out
    found = json.loads((tmp_path / "a.json").read_text())
    every = found["best_f1"][0]
    assert (every["f1"], every["recall"], every["objects"]) == pytest.approx((2 * 30 / (60 + 60), 0.5, 60))
    # Discs are found and crosses are not; of a cross, one of whose arms alone is rebuilt, the ceiling is low.
    rows = found["by_ceiling"]
    assert [(row["objects"], row["recall"]) for row in rows] == [(30, 0), (30, 1)]
    assert rows[0]["ceiling"] < 0.6 and 0.95 < rows[1]["iou"] == pytest.approx(rows[1]["ceiling"], abs=0.02)
    assert found["rays"] == 36 and len(found["worst"]) == 12 and {row["missed"] for row in found["worst"]} == {1}
    assert "Best F1 @[ IoU=0.50 ] = 0.500" in out and "50 % of the objects are found" in out
    assert re.search(r"cat +30 +1\.000 +1\.000 +1\.000 ", out)
    text = (tmp_path / "r" / "report.html").read_text()
    tags = check_page(text)
    assert tags.seen.count("img") == 24 and tags.seen.count("svg") == 3 and "&lt;b&gt;dog&lt;/b&gt;" in text
    assert [p.name for p in (tmp_path / "r").iterdir()] == ["report.html"]
    for tiles in ([], ["--tile", "256"]):
        assert cli.main([*arguments, "--limit", "2", *tiles]) == 0
        assert json.loads((tmp_path / "a.json").read_text())["best_f1"][0]["objects"] == 4


def test_a_report_without_any_hit(data, tmp_path):
    directory, predictor = data
    nothing = {
        name: np.zeros((0, *shape), np.float32) for name, shape in (("scores", ()), ("boxes", (4,)), ("polygons", (36, 2)))
    }
    silent = Predictor(
        "run", predictor.classes, (128, 128), 4, lambda images: [{**nothing, "classes": np.int32([])}] * len(images)
    )
    metrics = evaluate(silent, directory, limit=3, progress=False)
    found = report.write(tmp_path / "a.html", silent, directory, metrics, model="m", limit=3)
    assert report.verdict(found) == "No object is found." and len(found["worst"]) == 3
    check_page((tmp_path / "a.html").read_text())
    assert "no threshold of best F1" in thresholds.format_table(metrics)


# ---- what a run and its exports carry


@pytest.fixture
def run(tmp_path):
    return shutil.copytree(RUN, tmp_path / "run")


def stored(run, overall=0.25, each=0.125, temperature=1.0):
    count = len(runs.read_run(run)[1])
    content = {"overall": overall, "classes": [each] * count, "temperature": temperature}
    runs.write_bound(run / runs.THRESHOLDS, content, runs.checkpoint_digest(run))
    return {"overall": overall, "classes": [each] * count}


def test_a_run_and_what_is_made_of_it_have_the_thresholds(run, tmp_path):
    assert load_predictor(run).default_threshold()[0] == lite.SHOWN and runs.load_run(run).thresholds is None
    found = stored(run)
    model = runs.load_run(run)
    assert model.thresholds == found
    path = tflite.export_tflite(model, tmp_path / "a.tflite")
    assert graph.metadata(model)["thresholds"] == found  # of SavedModels, for serving too
    model.save(tmp_path / "a.keras")
    for source in (run, path, tmp_path / "a.keras"):
        predictor = load_predictor(source)
        scores, why = predictor.default_threshold()
        assert predictor.thresholds == found and scores == found["classes"], source
        assert "score of best F1 on, 0.25 (by class: " in why and "--score-threshold overrides" in why
    assert lite.shown_scores(lite.read_metadata(path)) == found["classes"]
    # Of other weights it says nothing.
    newest = runs.checkpoints(run)[0]
    Path(f"{newest}.index").write_bytes(Path(f"{newest}.index").read_bytes() + b" ")
    assert runs.read_thresholds(run, len(model.classes), model.config.postprocess) is None


def test_thresholds_are_of_calibrated_scores(run):
    stored(run, 0.25, 0.125, temperature=1.0)
    content = {"temperature": 0.5, "score_bias": 1.5, "score_threshold": 0.01}
    runs.write_bound(run / runs.CALIBRATION, content, runs.checkpoint_digest(run))
    now = runs.load_run(run).thresholds
    assert now["overall"] == pytest.approx(1 / (1 + 9 * np.exp(-1.5)))  # odds 1/3, at temperature 1/2 squared
    assert now["classes"] == pytest.approx([1 / (1 + 49 * np.exp(-1.5))] * len(now["classes"]))
    stored(run, temperature=0.5)  # as it was before there was a bias
    assert runs.load_run(run).thresholds["overall"] == pytest.approx(1 / (1 + 3 * np.exp(-1.5)))
    (run / runs.CALIBRATION).unlink()
    assert runs.load_run(run).thresholds["overall"] == pytest.approx(1 / (1 + 3**0.5))


@pytest.mark.parametrize(
    "content",
    [
        *("{", "[]", '{"overall": 0.1}', '{"overall": "x", "classes": [], "temperature": 1, "checkpoint": ""}'),
        '{"overall": 1' + "0" * 400 + ', "classes": [], "temperature": 1, "checkpoint": ""}',
    ],
)
def test_a_damaged_file_is_named(run, content):
    (run / runs.THRESHOLDS).write_text(content)
    with pytest.raises(InputError, match=r"thresholds\.json: damaged .*run polarmask evaluate again"):
        runs.load_run(run)


def test_what_metadata_may_say(tmp_path):
    metadata = {"classes": [{"name": "a", "category_id": 1}], "input": {"height": 32, "width": 32}}
    for good in ({"overall": 0.5, "classes": [0.25]}, {"overall": 1.5, "classes": [0]}):
        assert lite.check_metadata({**metadata, "thresholds": good}, "m")["thresholds"] == good
    for bad in (None, [], {}, {"overall": 0.5}, {"overall": 2, "classes": [0.5]}, {"overall": 0.5, "classes": [0.5, 0.5]}):
        with pytest.raises(ValueError, match="m is not what"):
            lite.check_metadata({**metadata, "thresholds": bad}, "m")
    for bad in ("0.5", {0.5: 1}, ["x"], [float("nan")], [None], [True]):
        with pytest.raises(ValueError, match="m is not what"):
            lite.check_metadata({**metadata, "thresholds": {"overall": 0.5, "classes": bad}}, "m")


def test_evaluating_the_whole_stores_them_and_says_so(run, data, monkeypatch, capsys):
    directory, predictor = data
    classes = json.dumps({"classes": predictor.classes})
    (run / "dataset.json").write_text(classes)
    monkeypatch.setattr(predictors, "load_predictor", lambda *_, **__: predictor)
    file = run / runs.THRESHOLDS
    for more in (["--limit", "25"], ["--score-threshold", "0.2"]):
        assert cli.main(["evaluate", str(run), "--data", str(directory), *more]) == 0
        assert not file.exists() and "tored" not in capsys.readouterr().out
    assert cli.main(["evaluate", str(run), "--data", str(directory)]) == 0
    assert f"Stored in {file}" in capsys.readouterr().out
    metrics = evaluate(predictor, directory, progress=False)
    expected = thresholds.shown(metrics, [3, 5])
    assert runs.read_thresholds(run, 2, PostprocessConfig()) == expected
    assert 0.4 < expected["classes"][0] < 0.6  # discs have .6 and more
    # Pictures that it learnt say nothing about others.
    file.unlink()
    config = (run / "config.yaml").read_text()
    trained = re.sub(r"(\n  train:) .*", rf"\1 {directory}", config, count=1)
    assert trained != config
    (run / "config.yaml").write_text(trained)
    assert cli.main(["evaluate", str(run), "--data", str(directory)]) == 0
    assert "Not stored: these are the pictures" in capsys.readouterr().out and not file.exists()


def test_a_training_stores_them_when_it_evaluates(run, data):
    from polarmask_tf.training.callbacks import Evaluation

    directory, predictor = data
    (run / "dataset.json").write_text(json.dumps({"classes": predictor.classes}))
    evaluation = Evaluation.__new__(Evaluation)
    config, _ = runs.read_run(run)
    evaluation.model = types.SimpleNamespace(config=dataclasses.replace(config, data=dataclasses.replace(config.data, val="v")))
    metrics = evaluate(predictor, directory, progress=False)
    evaluation._store_thresholds(run, metrics)
    assert runs.read_thresholds(run, 2, PostprocessConfig()) == thresholds.shown(metrics, [3, 5])


def test_an_image_of_more_objects_than_detections_count_says_nothing(run):
    truth, results = scene(0, images=30)
    (run / "dataset.json").write_text(
        json.dumps({"classes": [{"name": c["name"], "category_id": c["id"]} for c in CATEGORIES]})
    )
    subject = thresholds.subject(run)
    metrics = coco_metrics(truth, results)
    crowded = dataclasses.replace(metrics, max_detections=3)
    assert "3 detections count; --max-detections " in thresholds.store(subject, crowded, "v")
    assert not (run / runs.THRESHOLDS).exists()


def test_the_data_may_be_the_runs_own(run, data, monkeypatch, capsys):
    directory, _ = data
    assert cli.main(["evaluate", str(run)]) == 2
    assert "was trained without data.val: give --data DIR" in capsys.readouterr().err
    assert cli.main(["evaluate", "a.tflite"]) == 2
    assert "only a run directory knows its own" in capsys.readouterr().err
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(re.sub(r"(\n  val:) .*", rf"\1 {directory}", config, count=1))
    assert default_data(run) == str(directory)
