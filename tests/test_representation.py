"""What 36 exact rays can reach: polygons rebuilt from targets against the true masks (the paper's figure 7)."""

import numpy as np
import pytest
import tensorflow as tf
from pycocotools import mask as coco_mask

from polarmask_tf import geometry
from polarmask_tf.data import records, transforms
from polarmask_tf.data.convert import convert
from polarmask_tf.data.shapes import make_shapes
from polarmask_tf.evaluate import coco_metrics, polygons_to_rle

RAYS = 36


@tf.function(reduce_retracing=True)
def rebuild_one(xy, ring_lengths, height, width, max_edges):
    """Rings of one instance to its polygon from exact targets, [1, RAYS, 2]; [0, RAYS, 2] if it has no area."""
    one = {
        "labels": tf.zeros([1], tf.int32), "is_crowd": tf.zeros([1], tf.bool),
        "ring_lengths": ring_lengths, "ring_instance": tf.zeros_like(ring_lengths),
    }
    made = transforms.instances(
        one, xy, tf.stack([height, width]), max_edges=max_edges, max_instances=1, parts="largest", center="mass"
    )
    window = tf.cast([[0, 0, width, height]], tf.float32)
    lengths = geometry.ray_lengths(made["centers"], made["edges"], RAYS, window)
    return tf.boolean_mask(geometry.assemble(made["centers"], lengths), made["classes"] >= 0)


def rebuild(directory):
    """The ground truth as a COCO dict, and one result of score 1 for every instance that is no crowd."""
    info = records.load_dataset_info(directory)
    truth = records.read_ground_truth(directory)
    of_image = {}
    for annotation in truth["annotations"]:
        of_image.setdefault(annotation["image_id"], []).append(annotation)
    results, overlaps = [], []
    for path in info.shard_paths:
        for serialized in tf.data.TFRecordDataset(str(path)):
            record = records.parse(serialized)
            height, width = record["height"], record["width"]
            annotations = of_image.get(int(record["source_id"].numpy()), [])
            # Annotations and record are in the same order; instances() sorts by area, so one at a time.
            for index, annotation in enumerate(annotations):
                if annotation["iscrowd"]:
                    continue
                rings = np.flatnonzero(record["ring_instance"].numpy() == index)
                lengths = record["ring_lengths"].numpy()
                mine = np.isin(np.repeat(np.arange(len(lengths)), lengths), rings)
                polygon = rebuild_one(record["xy"][mine], tf.constant(lengths[rings]), height, width, max_edges=info.max_edges)
                if not len(polygon):
                    continue  # no pixel of area
                rle = polygons_to_rle(polygon.numpy(), int(height), int(width))[0]
                overlaps.append(float(coco_mask.iou([rle], [annotation["segmentation"]], [0])[0, 0]))
                results.append({
                    "image_id": annotation["image_id"], "category_id": annotation["category_id"], "score": 1.0,
                    "segmentation": rle, "bbox": list(coco_mask.toBbox(rle)),
                })
    return truth, results, np.array(overlaps)


def test_real_images_reach_what_an_independent_computation_found(shared, tmp_path):
    folder = shared / "data/coco_dev"
    convert(folder / "annotations/instances_dev.json", folder / "images", tmp_path / "dev", processes=1, progress=False)
    truth, results, overlaps = rebuild(tmp_path / "dev")
    metrics = coco_metrics(truth, results).to_dict()["values"]
    print(f"\n{len(overlaps)} instances, mean IoU {overlaps.mean():.4f}, above .9: {(overlaps > 0.9).mean():.3f}, {metrics}")
    assert overlaps.mean() == pytest.approx(0.906, abs=0.01)
    assert (overlaps > 0.9).mean() == pytest.approx(0.70, abs=0.03)
    assert metrics["AP"] == pytest.approx(0.834, abs=0.02)
    assert metrics["AP50"] == pytest.approx(0.994, abs=0.005)


def test_shapes_are_all_but_perfect(tmp_path):
    make_shapes(tmp_path, train=30, val=0, progress=False)
    convert(tmp_path / "train/annotations.json", tmp_path / "train/images", tmp_path / "data", processes=1, progress=False)
    _, results, overlaps = rebuild(tmp_path / "data")
    assert len(overlaps) == len(results) > 30
    assert overlaps.mean() > 0.94 and overlaps.min() > 0.8
