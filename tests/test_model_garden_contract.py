"""The signatures of `--contract model_garden`, read by tf-models-official's own code as it reads its Mask R-CNN."""

import contextlib
import io
import json
import types

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from polarmask_tf import config as configs
from polarmask_tf.inference.coco_metrics import coco_metrics, detections_to_results
from polarmask_tf.inference.predictor import Detections
from polarmask_tf.ops import geometry

pytest.importorskip("tensorflow_serving.apis", reason="needs the extra `serving`")
pytest.importorskip("official.vision", reason="needs the extra `garden`")
import dataclasses

import tensorflow as tf
from official.vision.evaluation import coco_evaluator
from official.vision.ops import mask_ops, preprocess_ops

from polarmask_tf.export import model_garden, serving

RAYS = 36


def blobs(rng, count, low, high, extent):
    """Wavy outlines [count, RAYS, 2] of mean radius low to high around points in a square, cut at its border."""
    angles = 2 * np.pi * np.arange(RAYS) / RAYS
    waves = np.sin(rng.integers(2, 7, (count, 1)) * angles + rng.uniform(0, 6, (count, 1)))
    radius = rng.uniform(low, high, (count, 1)) * (1 + 0.35 * waves)
    rays = radius[..., None] * np.stack([np.cos(angles), np.sin(angles)], -1)
    return np.clip(rng.uniform(0, extent, (count, 1, 2)) + rays, 0, extent).astype(np.float32)


def boxes_of(polygons):
    """ymin, xmin, ymax, xmax."""
    return np.concatenate([polygons.min(-2)[..., ::-1], polygons.max(-2)[..., ::-1]], axis=-1)


def covered(polygon, box, size, fine):
    """The part of each cell of a box that a polygon covers: points on a fine grid, even-odd, one by one."""
    low, high = box[1::-1].astype(float), box[:1:-1].astype(float)
    steps = (np.arange(size * fine) + 0.5) / (size * fine)
    x, y = np.meshgrid(*(low[i] + steps * (high[i] - low[i]) for i in (0, 1)))
    inside = np.zeros(x.shape, bool)
    for (x1, y1), (x2, y2) in zip(polygon.astype(float), np.roll(polygon, -1, 0).astype(float), strict=True):
        if y1 != y2:
            crosses = (y1 > y) != (y2 > y)
            inside ^= crosses & (x < x1 + (y - y1) * (x2 - x1) / (y2 - y1))
    return inside.reshape(size, fine, size, fine).mean(axis=(1, 3))


@pytest.mark.parametrize("size", [5, 14, 28])
def test_a_mask_is_the_part_of_each_cell_that_the_polygon_covers(size):
    polygons = blobs(np.random.default_rng(0), 12, 10, 60, 128)  # some are cut at the border
    boxes = boxes_of(polygons)
    masks = model_garden.rasterise(tf.constant(polygons), tf.constant(boxes), size).numpy()
    expected = np.array([covered(*pair, size, fine=24) for pair in zip(polygons, boxes, strict=True)])
    assert masks.shape == (12, size, size) and masks.min() >= 0 and masks.max() <= 1
    assert np.abs(masks - expected).mean() < 0.01 and np.abs(masks - expected).max() < 0.3
    clear = np.abs(expected - 0.5) > 0.15
    np.testing.assert_array_equal((masks > 0.5)[clear], (expected > 0.5)[clear])


def test_a_mask_in_a_box_that_is_not_the_polygons():
    """As where the box branch gives the boxes."""
    polygons = blobs(np.random.default_rng(1), 6, 20, 40, 128)
    boxes = boxes_of(polygons) + np.float32([-9, 12, 7, -5])
    masks = model_garden.rasterise(tf.constant(polygons), tf.constant(boxes), 28).numpy()
    expected = np.array([covered(*pair, 28, fine=24) for pair in zip(polygons, boxes, strict=True)])
    assert np.abs(masks - expected).mean() < 0.01


def test_a_box_fills_its_mask_and_nothing_fills_none():
    corners = np.float32([[[30, 40], [10, 40], [10, 20], [30, 20]]])
    squares = tf.constant(np.concatenate([corners, np.zeros_like(corners), np.full_like(corners, 7)]))
    boxes = tf.constant([[20, 10, 40, 30], [0, 0, 0, 0], [7, 7, 7, 7]], tf.float32)
    masks = model_garden.rasterise(squares, boxes, 5).numpy()
    np.testing.assert_allclose(masks[0], np.ones((5, 5)))
    np.testing.assert_array_equal(masks[1:], np.zeros((2, 5, 5)))
    left = model_garden.rasterise(squares[:1], tf.constant([[20, 10, 40, 50]], tf.float32), 4).numpy()
    np.testing.assert_allclose(left[0], [[1, 1, 0, 0]] * 4)


def test_there_is_no_loop_over_detections():
    specs = [tf.TensorSpec([None, RAYS, 2]), tf.TensorSpec([None, 4])]
    graph = tf.function(lambda p, b: model_garden.rasterise(p, b, 28)).get_concrete_function(*specs).graph
    kinds = {node.op for node in graph.as_graph_def().node}
    assert kinds and not any("While" in kind or "Map" in kind or "PartitionedCall" in kind for kind in kinds)


def iou(a, b):
    return (a & b).sum() / max((a | b).sum(), 1)


# What remains is Model Garden's way to paste: it rounds the box to pixels. Its second way does not.
@pytest.mark.parametrize("low, high, least, least_v2", [(8, 16, 0.91, 0.975), (16, 48, 0.955, 0.98), (48, 150, 0.975, 0.985)])
def test_pasted_by_model_garden_a_mask_is_the_polygon(low, high, least, least_v2):
    polygons = blobs(np.random.default_rng(0), 60, low, high, 400)
    boxes = boxes_of(polygons)
    masks = model_garden.rasterise(tf.constant(polygons), tf.constant(boxes), 28).numpy()
    rles = coco_mask.frPyObjects([polygon.astype(float).ravel().tolist() for polygon in polygons], 400, 400)
    truth = [coco_mask.decode(rle).astype(bool) for rle in rles]
    xywh = np.concatenate([boxes[:, 1::-1], boxes[:, :1:-1] - boxes[:, 1::-1]], axis=1)
    for paste, floor in ((mask_ops.paste_instance_masks, least), (mask_ops.paste_instance_masks_v2, least_v2)):
        pasted = paste(masks, xywh.copy(), 400, 400).astype(bool)
        assert np.mean([iou(a, b) for a, b in zip(pasted, truth, strict=True)]) > floor


def fixed_model(fit, size, tables, scores, labels, box_branch=False):
    """What the exporter uses of a model that finds tables[i] (polygons [N, n, 2] relative to the canvas, NaN past the last)
    in image i: the number that stands in the first pixel's red and green."""
    config = configs.Config()
    data = dataclasses.replace(config.data, fit=fit, size=size)
    config = dataclasses.replace(config, data=data, conventions="released" if box_branch else "paper")
    valid = np.isfinite(tables).all(axis=(2, 3))
    polygons = np.where(valid[..., None, None], tables, 0).astype(np.float32)
    boxes = boxes_of(polygons)
    if box_branch:
        boxes = (boxes + np.float32([0.05, 0.0, 0.0, 0.02])) * valid[..., None]
    outputs = {
        "num_detections": valid.sum(1).astype(np.int32),
        "detection_scores": (scores * valid).astype(np.float32),
        "detection_classes": (labels * valid).astype(np.int32),
        "detection_boxes": boxes.astype(np.float32),
        "detection_polygons": polygons,
    }

    def detect(images):
        number = tf.cast(images[:, 0, 0, :2], tf.int32)
        number = number[:, 0] + 256 * number[:, 1]
        return {name: tf.gather(tf.constant(value), number) for name, value in outputs.items()}

    names = [{"name": f"c{i}", "category_id": i + 1} for i in range(int(np.max(labels)) + 1)]
    return types.SimpleNamespace(
        config=config, classes=names, input_size=configs.input_size(config.data), variables=[], detect=detect
    )


def numbered(number, height, width):
    """A PNG that fixed_model knows after resizing, too."""
    file = io.BytesIO()
    Image.new("RGB", (width, height), (number % 256, number // 256, 0)).save(file, "PNG")
    return file.getvalue()


def exported(model, folder, **options):
    path = serving.export_serving(model, folder, name="m", contract="model_garden", **options)
    return tf.saved_model.load(str(path))


def test_outputs_are_named_shaped_and_placed_as_model_gardens(tmp_path):
    """image_info is what Model Garden's own resizing gives for the image; boxes lie in the resized image's pixels."""
    square = [[0.5, 0.5], [0.25, 0.5], [0.25, 0.25], [0.5, 0.25]]  # of the canvas
    table = np.full((1, 3, 4, 2), np.nan)
    table[0, 0] = square
    model = fixed_model("letterbox", (64, 96), table, np.array([[0.8, 0.5, 0.4]]), np.array([[4, 2, 1]]))
    loaded = exported(model, tmp_path, mask_size=14)
    contents = [numbered(0, *size) for size in ((100, 80), (64, 96), (33, 200))]
    found = loaded.signatures["model_garden_image_bytes"](inputs=tf.constant(contents))
    assert {name: (value.dtype, value.shape.as_list()) for name, value in found.items()} == {
        "num_detections": (tf.int32, [3]),
        "detection_scores": (tf.float32, [3, 3]),
        "detection_classes": (tf.int32, [3, 3]),
        "detection_boxes": (tf.float32, [3, 3, 4]),
        "detection_masks": (tf.float32, [3, 3, 14, 14]),
        "image_info": (tf.float32, [3, 4, 2]),
    }
    assert found["detection_classes"].numpy().tolist() == [[5, 0, 0]] * 3  # from 1, zeros past the last
    assert found["detection_scores"].numpy()[:, 1:].max() == 0 and np.abs(found["detection_boxes"][:, 1:]).max() == 0
    for row, content in enumerate(contents):
        image = tf.cast(tf.io.decode_png(content), tf.float32)
        _, info = preprocess_ops.resize_and_crop_image(image, (64, 96), (64, 96))
        np.testing.assert_allclose(found["image_info"][row], info, rtol=1e-6)
        filled = np.array(image.shape[:2]) * info[2]
        expected = np.minimum([16, 24, 32, 48], np.tile(filled, 2))  # of the canvas, cut where the image ends
        np.testing.assert_allclose(found["detection_boxes"][row, 0], expected, rtol=1e-5)
    np.testing.assert_allclose(found["detection_masks"][1, 0], np.ones((14, 14)), atol=1e-4)
    pixels = np.asarray(Image.open(io.BytesIO(contents[0])))[None]
    feature = tf.train.Feature(bytes_list=tf.train.BytesList(value=[contents[0]]))
    example = tf.train.Example(features=tf.train.Features(feature={"image/encoded": feature})).SerializeToString()
    for kind, inputs in (("image_tensor", tf.constant(pixels)), ("tf_example", tf.constant([example]))):
        same = loaded.signatures[f"model_garden_{kind}"](inputs=inputs)
        for name, value in same.items():
            np.testing.assert_allclose(value[0], found[name][0], atol=1e-5, err_msg=f"{kind} {name}")


def test_boxes_of_a_box_branch_come_beside_the_boxes_that_masks_fill(tmp_path):
    table = blobs(np.random.default_rng(3), 4, 10, 20, 64)[None] / 64
    model = fixed_model("stretch", (64, 64), table, np.array([[0.8, 0.7, 0.6, 0.5]]), np.zeros((1, 4)), box_branch=True)
    found = exported(model, tmp_path).signatures["model_garden_image_bytes"](inputs=tf.constant([numbered(0, 64, 64)]))
    outer = found["detection_outer_boxes"].numpy()[0]
    np.testing.assert_allclose(outer, boxes_of(table[0] * 64), atol=1e-3)
    assert np.abs(found["detection_boxes"][0] - outer).max() > 1
    expected = np.array([covered(*pair, 28, fine=12) for pair in zip(table[0] * 64, outer, strict=True)])
    assert np.abs(found["detection_masks"][0] - expected).mean() < 0.01


def evaluated(found, truth, tmp_path):
    """Model Garden's evaluator on the outputs of a signature for the images of a COCO dict, in their order."""
    file = tmp_path / "truth.json"
    file.write_text(json.dumps(truth))
    with contextlib.redirect_stdout(io.StringIO()):
        evaluator = coco_evaluator.COCOEvaluator(str(file), include_mask=True)
        for image, outputs in zip(truth["images"], found, strict=True):
            evaluator.update_state({}, {**outputs, "source_id": tf.constant([image["id"]])})
        return evaluator.result()


def compare(images, annotations, detections, classes, size, tmp_path):
    """Both evaluators' numbers for the same detections: ours from polygons, Model Garden's through the served signature.

    `detections`: a list of (scores [M] descending, labels [M], polygons [M, n, 2] in the image's pixels) for each image.
    """
    most = max(len(scores) for scores, _, _ in detections)
    tables = np.full((len(images), most, RAYS, 2), np.nan)
    scores, labels = np.zeros((2, len(images), most))
    results = []
    for row, (image, (score, label, polygons)) in enumerate(zip(images, detections, strict=True)):
        height, width = image["height"], image["width"]
        # fixed_model works on the canvas, which the image fills from its top left corner.
        filled = np.round(np.array([width, height]) * min(size[0] / height, size[1] / width))
        tables[row, : len(score)] = polygons / [width, height] * filled / size[::-1]
        scores[row, : len(score)], labels[row, : len(score)] = score, label
        boxes = np.concatenate([polygons.min(1), polygons.max(1)], 1)
        found = Detections(np.float32(score), np.int32(label), np.float32(boxes), np.float32(polygons))
        results += detections_to_results(found, image["id"], classes, height, width)
    model = fixed_model("letterbox", size, tables, scores, labels)
    path = serving.export_serving(model, tmp_path, name="m", contract="model_garden")
    signature = tf.saved_model.load(str(path)).signatures["model_garden_image_bytes"]
    contents = [numbered(row, image["height"], image["width"]) for row, image in enumerate(images)]
    found = [signature(inputs=tf.constant([content])) for content in contents]
    numbers = {entry["category_id"]: number for number, entry in enumerate(classes, 1)}
    # In its data the categories are the numbers 1, 2, ..., as in the records that `polarmask convert` writes.
    theirs = {
        "images": images,
        "categories": [{"id": number, "name": "?"} for number in numbers.values()],
        "annotations": [{**one, "category_id": numbers[one["category_id"]]} for one in annotations],
    }
    categories = [{"id": entry["category_id"], "name": entry["name"]} for entry in classes]
    ours = coco_metrics({"images": images, "categories": categories, "annotations": annotations}, results)
    return ours.values, evaluated(found, theirs, tmp_path)


def test_model_gardens_evaluator_gives_the_ap_that_ours_gives(tmp_path):
    rng = np.random.default_rng(0)
    classes = [{"name": "a", "category_id": 3}, {"name": "b", "category_id": 17}]
    images, annotations, detections = [], [], []
    for number in range(12):
        height, width = int(rng.integers(200, 400)), int(rng.integers(200, 400))
        images.append({"id": 100 + number, "file_name": "x.png", "height": height, "width": width})
        truth = blobs(rng, 6, 15, 70, min(height, width)).astype(float)
        labels = rng.integers(0, 2, 6)
        for polygon, label in zip(truth, labels, strict=True):
            box = [*polygon.min(0), *(polygon.max(0) - polygon.min(0))]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": 100 + number,
                    "iscrowd": 0,
                    "category_id": classes[label]["category_id"],
                    "area": float(coco_mask.area(coco_mask.frPyObjects([polygon.ravel().tolist()], height, width))[0]),
                    "bbox": box,
                    "segmentation": [polygon.ravel().tolist()],
                }
            )
        # Found a little beside and a little too large or small; some twice, some not at all.
        which = np.concatenate([rng.permutation(6)[:5], rng.integers(0, 6, 3)])
        middle = truth[which].mean(1, keepdims=True)
        moved = middle + (truth[which] - middle) * rng.uniform(0.85, 1.1, (8, 1, 1)) + rng.normal(0, 2, (8, 1, 2))
        moved = np.clip(moved, 0, [width, height])
        detections.append((np.sort(rng.uniform(0.1, 1, 8))[::-1], labels[which], moved))
    ours, theirs = compare(images, annotations, detections, classes, (512, 512), tmp_path)
    assert 0.3 < ours["AP"] < 0.8
    assert theirs["mask_AP"] == pytest.approx(ours["AP"], abs=0.025)
    assert theirs["mask_AP50"] == pytest.approx(ours["AP50"], abs=0.01)


def test_on_real_coco(shared, tmp_path):
    """Rays around the largest part's mass center of real outlines, as a network would give them that is right."""
    dataset = json.loads(next((shared / "data" / "coco_dev" / "annotations").glob("instances_*.json")).read_text())
    images = dataset["images"][:25]
    classes = [{"name": entry["name"], "category_id": entry["id"]} for entry in dataset["categories"]]
    labels = {entry["category_id"]: label for label, entry in enumerate(classes)}
    wanted = {image["id"]: image for image in images}
    annotations = [one for one in dataset["annotations"] if one["image_id"] in wanted]
    found = {image["id"]: [] for image in images}
    for one in annotations:
        image = wanted[one["image_id"]]
        if one["iscrowd"] or one["area"] < 100:
            continue
        rings = max(one["segmentation"], key=lambda ring: np.ptp(ring[::2]) * np.ptp(ring[1::2]))
        points = np.float32(rings).reshape(-1, 2)
        edges = tf.constant(np.concatenate([points, np.roll(points, -1, 0)], 1)[None])
        _, center = geometry.area_and_centroid(edges)
        polygon = geometry.assemble(center, geometry.ray_lengths(center, edges, RAYS))[0].numpy()
        found[image["id"]].append((labels[one["category_id"]], np.clip(polygon, 0, [image["width"], image["height"]])))
    detections = []
    for image in images:
        rows = found[image["id"]]
        scores = np.linspace(0.9, 0.5, len(rows))
        detections.append((scores, [row[0] for row in rows], np.array([row[1] for row in rows]).reshape(-1, RAYS, 2)))
    ours, theirs = compare(images, annotations, detections, classes, (512, 512), tmp_path)
    assert ours["AP"] > 0.5
    print({name: (ours[name], float(theirs[f"mask_{name}"])) for name in ("AP", "AP50", "AP75")})
    assert theirs["mask_AP"] == pytest.approx(ours["AP"], abs=0.05)
    assert theirs["mask_AP50"] == pytest.approx(ours["AP50"], abs=0.02)
