import contextlib
import copy
import dataclasses
import io
import json
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from helpers.polygons import brute_raster, polar_star
from polarmask_tf.errors import InputError
from polarmask_tf.inference import evaluate as evaluation
from polarmask_tf.inference.coco_metrics import coco_metrics, detections_to_results, format_table, polygons_to_rle
from polarmask_tf.inference.evaluate import evaluate
from polarmask_tf.inference.predictor import Predictor
from polarmask_tf.inference.results import Detections

CATEGORIES = [{"id": 3, "name": "cat"}, {"id": 1, "name": "dog"}, {"id": 17, "name": "unseen"}]
NAMES = ["AP", "AP50", "AP75", "APS", "APM", "APL", "AR1", "AR10", "AR100", "ARS", "ARM", "ARL"]


def test_rle_of_a_square_worked_by_hand():
    (rle,) = polygons_to_rle([[(2, 3), (6, 3), (6, 8), (2, 8)]], 10, 9)
    expected = np.zeros((10, 9), np.uint8)
    expected[3:8, 2:6] = 1
    assert rle["size"] == [10, 9] and isinstance(rle["counts"], str)
    np.testing.assert_array_equal(coco_mask.decode(rle), expected)


def test_rles_match_a_brute_force_raster():
    rng = np.random.default_rng(0)
    polygons = [polar_star(rng, *rng.uniform((-10, -10), (170, 110)), rng.uniform(15, 60)) for _ in range(20)]  # some leave
    for polygon, rle in zip(polygons, polygons_to_rle(polygons, 100, 160), strict=True):
        mask, expected = coco_mask.decode(rle).astype(bool), brute_raster(polygon, 100, 160)
        edges = np.concatenate([np.linspace(a, b, 200) for a, b in zip(polygon, np.roll(polygon, -1, 0), strict=True)])
        for y, x in np.argwhere(mask != expected):
            assert np.linalg.norm(edges - (x + 0.5, y + 0.5), axis=1).min() < 0.75  # differences only along the border
        assert (mask & expected).sum() >= 0.93 * (mask | expected).sum()


@pytest.mark.parametrize(
    "polygon",
    [
        np.full((6, 2), np.nan),
        np.full((6, 2), np.inf),
        np.full((6, 2), 7.0),
        np.tile([[5.0, 5.0], [9.0, 5.0]], (3, 1)),
        np.full((6, 2), -1e30),
        np.float64([(500, 500), (510, 500), (510, 510)]),
    ],
)
def test_degenerate_polygons_have_empty_masks_and_leave_others_alone(polygon):
    square = np.float64([(2, 3), (6, 3), (6, 8), (2, 8)])
    square = np.concatenate([square, np.repeat(square[:1], 2, axis=0)]) if len(polygon) == 6 else square[:3]
    alone = polygons_to_rle([square], 20, 20)[0]
    assert polygons_to_rle([polygon, square], 20, 20)[1] == alone
    assert coco_mask.area(polygons_to_rle([polygon], 20, 20)[0]) == 0


def test_a_far_vertex_costs_nothing_and_keeps_the_inside():
    (rle,) = polygons_to_rle([[(-1e9, -1e9), (1e9, -1e9), (1e9, 1e9), (-1e9, 1e9)]], 20, 30)
    assert coco_mask.area(rle) == 600


def test_no_polygons():
    assert polygons_to_rle(np.zeros((0, 36, 2), np.float32), 10, 10) == []


def detections(polygons, scores, classes):
    polygons = np.float32(polygons)
    boxes = np.concatenate([polygons.min(axis=1), polygons.max(axis=1)], axis=-1)
    return Detections(np.float32(scores), np.int32(classes), boxes, polygons)


def test_results_have_original_categories_and_survive_json():
    found = detections([[(2, 3), (6, 3), (6, 8), (2, 8)]], [0.5], [1])
    results = detections_to_results(found, "a.png", [{"category_id": 9, "name": "x"}, {"category_id": 90, "name": "y"}], 10, 9)
    assert json.loads(json.dumps(results)) == results
    assert results[0]["image_id"] == "a.png" and results[0]["category_id"] == 90 and results[0]["score"] == 0.5
    assert results[0]["bbox"] == [2, 3, 4, 5] and coco_mask.area(results[0]["segmentation"]) == 20


def scene(seed=0, images=12, height=300, width=320):
    """Random ground truth of all sizes (crowds, RLE and polygons) and results near it, with tied scores and misses."""
    rng = np.random.default_rng(seed)
    truth = {"images": [], "annotations": [], "categories": CATEGORIES}
    results = []
    for image_id in range(10, 10 + images):
        truth["images"].append({"id": image_id, "file_name": f"{image_id}.png", "height": height, "width": width})
        for _ in range(rng.integers(0, 9)):
            radius = rng.choice([10, 40, 120]) * rng.uniform(0.6, 1.2)
            polygon = polar_star(rng, *rng.uniform((0, 0), (width, height)), radius).clip(0, (width, height))
            rle = polygons_to_rle([polygon], height, width)[0]
            kind = rng.integers(3)
            segmentation = [polygon.ravel().tolist()] if kind == 0 else rle if kind == 1 else uncompressed(rle)
            category = int(rng.choice([1, 3]))
            truth["annotations"].append(
                {
                    "id": 100 + len(truth["annotations"]),
                    "image_id": image_id,
                    "category_id": category,
                    "iscrowd": int(kind == 2 and rng.random() < 0.5),
                    "segmentation": segmentation,
                    "area": float(coco_mask.area(rle)),
                    "bbox": coco_mask.toBbox(rle).tolist(),
                }
            )
            for _ in range(rng.integers(0, 4)):
                near = polygon * rng.uniform(0.97, 1.03) + rng.normal(0, 2, 2)
                label = category if rng.random() < 0.9 else 17
                found = detections([near], [rng.integers(20) / 20], [0])
                results += detections_to_results(found, image_id, [{"category_id": label}], height, width)
    return truth, results


def uncompressed(rle):
    flat = coco_mask.decode(rle).ravel(order="F")
    changes = np.flatnonzero(np.diff(np.concatenate([[0], flat])))
    return {"size": rle["size"], "counts": np.diff(np.concatenate([[0], changes, [len(flat)]])).tolist()}


def pycocotools_says(truth, results, iou_type="segm"):
    """The 12 numbers and the printed table, by pycocotools' own loading, summarize and printing."""
    truth, results = copy.deepcopy(truth), copy.deepcopy(results)
    for result in results:
        del result["bbox" if iou_type == "segm" else "segmentation"]
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = truth
        coco.createIndex()
        coco_eval = COCOeval(coco, coco.loadRes(results), iou_type)
        coco_eval.evaluate()
        coco_eval.accumulate()
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        coco_eval.summarize()
    return coco_eval.stats, printed.getvalue()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("iou_type", ["segm", "bbox"])
def test_the_twelve_numbers_equal_summarize(seed, iou_type, capsys):
    truth, results = scene(seed)
    stats, printed = pycocotools_says(truth, results, iou_type)
    assert len(set(stats)) > 6  # numbers that could not be equal by chance
    metrics = coco_metrics(truth, results, iou_type=iou_type)
    assert list(metrics.values) == NAMES
    assert list(metrics.values.values()) == stats.tolist()
    *table, error = format_table(metrics).splitlines()
    assert table == printed.rstrip("\n").splitlines() and error.startswith(" Expected calibration error of scores")
    assert capsys.readouterr().out == ""


def test_arguments_are_left_alone():
    truth, results = scene()
    before = copy.deepcopy((truth, results))
    coco_metrics(truth, results)
    assert (truth, results) == before


def test_ap_of_each_class_equals_an_evaluation_of_that_class_alone():
    truth, results = scene(1)
    metrics = coco_metrics(truth, results)
    for entry, expected in zip(metrics.per_class, (1, 3, 17), strict=True):
        assert entry["category_id"] == expected
        alone = dict(truth, categories=[c for c in CATEGORIES if c["id"] == expected])
        alone["annotations"] = [a for a in truth["annotations"] if a["category_id"] == expected]
        some = [r for r in results if r["category_id"] == expected]
        assert [entry["AP"], entry["AP50"]] == pytest.approx(pycocotools_says(alone, some)[0][:2])
        assert entry["objects"] == sum(not a["iscrowd"] for a in alone["annotations"])
    assert metrics.per_class[2] == {"category_id": 17, "name": "unseen", "objects": 0, "AP": -1, "AP50": -1}
    assert json.loads(json.dumps(metrics.to_dict()))["values"]["AP"] == metrics.values["AP"]


def row_of_squares(count):
    polygons = np.float32([(0, 0), (4, 0), (4, 4), (0, 4)]) + np.float32([(5 * i, 0) for i in range(count)])[:, None]
    found = detections(polygons, np.linspace(1, 0.5, count), np.zeros(count))
    results = detections_to_results(found, 1, [{"category_id": 1}], 4, 5 * count)
    keys = ("image_id", "category_id", "segmentation")
    truth = {
        "images": [{"id": 1, "height": 4, "width": 5 * count}],
        "annotations": [{k: r[k] for k in keys} for r in results],  # no id, area, bbox, iscrowd: all can be made up for
        "categories": [{"id": 1, "name": "a"}],
    }
    return truth, results


def test_more_detections_than_100_count_when_asked():
    truth, results = row_of_squares(150)
    few, many = coco_metrics(truth, results), coco_metrics(truth, results, max_detections=200)
    assert few.values["AR100"] == pytest.approx(100 / 150)
    assert few.values["AP"] == pytest.approx(67 / 101)  # recall points 0, .01 ... .66 are reached
    assert many.values["AP"] == many.values["AR200"] == many.values["APS"] == 1
    assert many.values["AR1"] == pytest.approx(1 / 150) and many.values["AR10"] == pytest.approx(10 / 150)
    assert list(many.values) == [*NAMES[:8], "AR200", *NAMES[9:]]
    assert "maxDets=200 ] = 1.000" in format_table(many).splitlines()[0]
    assert (many.images, many.instances, many.detections, many.max_detections) == (1, 150, 150, 200)
    table = format_table(coco_metrics(truth, [], max_detections=1000)).splitlines()
    assert len({line.index(" ] = ") for line in table}) == 1


@pytest.mark.parametrize("ids", [range(4), [7] * 4])
def test_annotation_ids_do_not_matter(ids):
    truth, results = row_of_squares(4)
    for annotation, number in zip(truth["annotations"], ids, strict=True):
        annotation["id"] = number  # pycocotools takes a match with id 0 for no match, and loses equal ids
    assert coco_metrics(truth, results).values["AP"] == 1


def test_nothing_found_and_nothing_to_find():
    truth, results = scene()
    assert coco_metrics(truth, []).values["AP"] == 0 and coco_metrics(truth, []).values["AR100"] == 0
    empty = dict(truth, annotations=[])
    assert set(coco_metrics(empty, results).values.values()) == {-1}
    assert set(coco_metrics(empty, []).values.values()) == {-1}
    assert coco_metrics(dict(truth, images=[], annotations=[]), []).values["AP"] == -1


def test_why_all_numbers_are_minus_one_is_said():
    truth, results = row_of_squares(2)
    crowds = [dict(annotation, iscrowd=1) for annotation in truth["annotations"]]
    for annotations, expected in (([], "object to find"), (crowds, "object to find; the 2 annotations are crowd regions")):
        metrics = coco_metrics(dict(truth, annotations=annotations), results)
        why = f"-1 stands for nothing to measure: none of the 1 images has an {expected}"
        assert metrics.why_empty() == why and format_table(metrics).splitlines()[-1] == f" {why}"
    metrics = coco_metrics(truth, results)
    assert metrics.values["APL"] == -1 and metrics.why_empty() == "" and len(format_table(metrics).splitlines()) == 13


def test_a_json_that_cannot_be_written_is_said_before_the_work(records, tmp_path, monkeypatch, capsys):
    from polarmask_tf import cli
    from polarmask_tf.inference import predictor as predictors

    loaded = []
    monkeypatch.setattr(predictors, "load_predictor", lambda *_, **__: loaded.append(1) or perfect_predictor(records))
    arguments = ["evaluate", "model", "--data", "data", "--json"]
    for path, expected in ((tmp_path / "none" / "a.json", "No such file or directory"), (tmp_path, "is a directory")):
        assert cli.main([*arguments, str(path)]) == 2
        assert expected in capsys.readouterr().err
    assert not loaded and not list(tmp_path.iterdir())
    (tmp_path / "a.json").write_text("older")
    assert cli.main([*arguments, str(tmp_path / "a.json")]) == 0
    assert json.loads((tmp_path / "a.json").read_text())["values"]["AP"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_the_accelerator_is_passed_on_and_what_runs_where_is_said(records, monkeypatch, capsys):
    from polarmask_tf import cli
    from polarmask_tf.inference import predictor as predictors

    def load(source, *, accelerator, **_):
        return dataclasses.replace(perfect_predictor(records), runs_on=f"network on the {accelerator}")

    monkeypatch.setattr(predictors, "load_predictor", load)
    assert cli.main(["evaluate", "model.tflite", "--data", "data", "--accelerator", "gpu"]) == 0
    assert "network on the gpu\n" in capsys.readouterr().err


def test_wrong_input_is_said_in_one_line():
    truth, results = row_of_squares(2)

    def refuses(text, truth=truth, results=results, **options):
        with pytest.raises(InputError, match=text) as error:
            coco_metrics(truth, results, **options)
        assert "\n" not in str(error.value)

    refuses("image 9", results=[dict(results[0], image_id=9)])
    refuses("image 1: the results' masks", results=[dict(results[0], segmentation={"size": [1, 1], "counts": "1"})])
    refuses("more than 10", max_detections=10)
    good = truth["annotations"][0]
    for segmentation in (None, [], [[]], [[1, "x"]], {}, {"counts": [20, 20]}, {"size": [4, 10], "counts": ["x"]}):
        bad = dict(truth, annotations=[dict(good, id=5, segmentation=segmentation)])
        refuses("annotation 5 of image 1: (malformed|empty|annotation without)", truth=bad)
    for counts, text in (([4], "wrong size"), ("o", "broken"), (b"4", r"its mask is \[1, 4\], the image is \[4, 10\]")):
        size = [4, 10] if counts == "o" else [1, 4]
        refuses(text, truth=dict(truth, annotations=[dict(good, segmentation={"size": size, "counts": counts})]))
    refuses("no such image", truth=dict(truth, annotations=[dict(good, image_id=2)]))


def perfect_predictor(truth, batch_size=4):
    """Finds each image by the color that `encoded` paints it in, and answers with the polygons of its annotations."""
    classes = [{"name": c["name"], "category_id": c["id"]} for c in truth["categories"]]
    label = {entry["category_id"]: index for index, entry in enumerate(classes)}

    def run(images):
        assert 0 < len(images) <= batch_size
        answers = []
        for image in images:
            found = [a for a in truth["annotations"] if a["image_id"] == int(image[0, 0, 0])]
            polygons = np.float32([np.reshape(a["segmentation"][0], (-1, 2)) for a in found]).reshape(len(found), 36, 2)
            scores = 1 - np.arange(len(found)) / 100
            answers.append(vars(detections(polygons, scores, [label[a["category_id"]] for a in found])))
        return answers

    return Predictor("run", classes, (64, 64), batch_size, run)


def encoded(image):
    file = io.BytesIO()
    Image.new("RGB", (image["width"], image["height"]), (image["id"], 0, 0)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def records(monkeypatch):
    """Ground truth of polygons, served as if converted records held it."""
    rng = np.random.default_rng(3)
    truth = {"images": [], "annotations": [], "categories": CATEGORIES}
    for image_id in range(10, 20):
        truth["images"].append({"id": image_id, "file_name": f"{image_id}.png", "height": 100, "width": 120})
        for _ in range(image_id % 4):
            polygon = polar_star(rng, *rng.uniform((30, 30), (90, 70)), 25)
            rings = [polygon.ravel().tolist()]
            entry = {"id": len(truth["annotations"]) + 1, "image_id": image_id, "category_id": 3, "segmentation": rings}
            truth["annotations"].append({**entry, "area": 900.0, "iscrowd": 0, "bbox": [0, 0, 1, 1]})
    monkeypatch.setattr(evaluation.dataset, "load", lambda path: SimpleNamespace(directory=path, instances_per_image={}))
    monkeypatch.setattr(evaluation.records, "read_ground_truth", lambda info: truth)
    monkeypatch.setattr(evaluation.records, "iter_images", lambda path: ((i["id"], encoded(i)) for i in truth["images"]))
    return truth


def test_a_perfect_predictor_scores_one(records, capsys):
    metrics = evaluate(perfect_predictor(records), "data", progress=False)
    assert metrics.values["AP"] == 1 and metrics.values["AR100"] == 1
    assert (metrics.images, metrics.instances, metrics.detections) == (10, 17, 17)
    assert capsys.readouterr() == ("", "")


def test_limit_takes_the_first_images_and_their_truth_alone(records):
    metrics = evaluate(perfect_predictor(records), "data", limit=3, progress=False)
    assert (metrics.images, metrics.instances) == (3, 2 + 3 + 0) and metrics.values["AP"] == 1
    with pytest.raises(InputError, match="limit"):
        evaluate(perfect_predictor(records), "data", limit=0, progress=False)


def test_too_few_detections_are_refused_before_the_work(records):
    never = dataclasses.replace(perfect_predictor(records), run=lambda images: pytest.fail("looked at a picture"))
    with pytest.raises(InputError, match="max_detections is 10; it must be more than 10"):
        evaluate(never, "data", max_detections=10, progress=False)


def test_missed_images_lower_the_recall(records, monkeypatch):
    def half(path):
        return ((image["id"], encoded(image)) for image in records["images"][:5])

    monkeypatch.setattr(evaluation.records, "iter_images", half)
    assert evaluate(perfect_predictor(records), "data", progress=False).values["AR100"] == pytest.approx(8 / 17)


def test_annotations_of_a_json_take_the_place_of_the_records(records, tmp_path):
    other = copy.deepcopy(records)
    for annotation in other["annotations"]:
        annotation["segmentation"] = [[0, 0, 5, 0, 5, 5]]
    (tmp_path / "other.json").write_text(json.dumps(other))
    metrics = evaluate(perfect_predictor(records), "data", annotations=tmp_path / "other.json", progress=False)
    assert metrics.values["AP"] == 0
    (tmp_path / "none.json").write_text(json.dumps(dict(other, images=[], annotations=[])))
    with pytest.raises(InputError, match="no image 10"):
        evaluate(perfect_predictor(records), "data", annotations=tmp_path / "none.json", progress=False)


def test_other_classes_than_the_models_are_named(records):
    predictor = perfect_predictor(records)
    for change, text in (
        ({"category_id": 18}, r"17 \(- in the model, unseen in the data\), 18 \(unseen in the model, - in the data\)"),
        ({"name": "hidden"}, r"17 \(hidden in the model, unseen in the data\)"),
    ):
        other = dataclasses.replace(predictor, classes=[*predictor.classes[:2], {**predictor.classes[2], **change}])
        with pytest.raises(InputError, match=text):
            evaluate(other, "data", progress=False)


def test_an_image_that_cannot_be_decoded_is_named(records, monkeypatch):
    monkeypatch.setattr(evaluation.records, "iter_images", lambda path: iter([(10, b"broken")]))
    with pytest.raises(InputError, match="data: image 10: the image: not an image"):
        evaluate(perfect_predictor(records), "data", progress=False)


def test_records_and_source_json_give_equal_numbers(tmp_path):
    from polarmask_tf.data.convert import convert

    truth, _ = scene(5)
    truth = dict(truth, categories=CATEGORIES[:2])
    (tmp_path / "images").mkdir()
    for image in truth["images"]:
        (tmp_path / "images" / image["file_name"]).write_bytes(encoded(image))
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    convert(tmp_path / "truth.json", tmp_path / "images", tmp_path / "set", shards=3, processes=1, progress=False)
    classes = [{"name": "dog", "category_id": 1}, {"name": "cat", "category_id": 3}]

    def run(images):  # something right, something wrong, on each image the same every time
        answers = []
        for image in images:
            found = [a for a in truth["annotations"] if a["image_id"] == int(image[0, 0, 0])]
            boxes = np.reshape([a["bbox"] for a in found], (-1, 4))
            angle = 2 * np.pi * np.arange(36) / 36
            ellipses = (boxes[:, None, :2] + boxes[:, None, 2:] / 2) + (
                boxes[:, None, 2:] * 0.45 * np.stack([np.cos(angle), np.sin(angle)], -1)
            )
            scores = np.sort(np.random.default_rng(len(found)).random(len(found)))[::-1]
            answers.append(vars(detections(ellipses, scores, [int(a["category_id"] == 3) for a in found])))
        return answers

    predictor = Predictor("run", classes, (64, 64), 3, run)
    of_records = evaluate(predictor, tmp_path / "set", progress=False)
    of_json = evaluate(predictor, tmp_path / "set", annotations=tmp_path / "truth.json", progress=False)
    assert of_records == of_json
    assert len(set(of_records.values.values())) > 6 and of_records.images == 12
    predicted = [
        result
        for image in truth["images"]
        for answer in predictor([np.full((300, 320, 3), (image["id"], 0, 0), np.uint8)])
        for result in detections_to_results(answer, image["id"], classes, 300, 320)
    ]
    assert list(of_records.values.values()) == pycocotools_says(truth, predicted)[0].tolist()


def test_what_a_json_holds_in_vain_is_counted_and_named(tmp_path, capsys):
    truth, _ = row_of_squares(3)
    for number, annotation in enumerate(truth["annotations"]):
        annotation["id"] = number
    truth["images"][0]["file_name"] = "a.png"
    truth["annotations"][1]["image_id"] = 99
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    assert [a["id"] for a in evaluation.read_coco(tmp_path / "truth.json")["annotations"]] == [0, 2]
    assert "skipped 1 x annotation of an unknown image (first: truth.json" in capsys.readouterr().err
