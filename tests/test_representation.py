"""What 36 exact rays can reach as COCO counts it: polygons rebuilt from targets against the true masks."""

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from polarmask_tf.data import records
from polarmask_tf.data.convert import convert
from polarmask_tf.inference import ceiling
from polarmask_tf.inference.coco_metrics import coco_metrics, polygons_to_rle
from polarmask_tf.tools.shapes import make_shapes


def rebuild(directory):
    """The ground truth as a COCO dict, one result of score 1 for every instance that is no crowd, and their IoUs."""
    _, _, images, max_edges, report = ceiling.read(directory)
    polygons_of = ceiling.rebuilder((36,), ("mass",), max_edges)
    results, overlaps = [], []
    for image in images:
        annotations, (polygons,) = polygons_of(image, report)
        for annotation, rle in zip(annotations, polygons_to_rle(polygons, image["height"], image["width"]), strict=True):
            overlaps.append(float(coco_mask.iou([rle], [annotation["rle"]], [0])[0, 0]))
            results.append(
                {
                    "image_id": image["id"],
                    "category_id": annotation["category_id"],
                    "score": 1.0,
                    "segmentation": rle,
                    "bbox": list(coco_mask.toBbox(rle)),
                }
            )
    return records.read_ground_truth(directory), results, np.array(overlaps)


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
