"""Detections as other programs read them: labelme's JSON, QuPath's GeoJSON, an image of instance ids, rows of measurements."""

from __future__ import annotations

import typing

import numpy as np
from pycocotools import mask as coco_mask

from polarmask_tf.errors import InputError
from polarmask_tf.inference import visualize
from polarmask_tf.inference.measure import measure

if typing.TYPE_CHECKING:
    from polarmask_tf.inference.results import Detections

LABELME = "5.5.0"  # the version whose files these are like


def labelme(found: Detections, image_path: str) -> dict:
    """What labelme opens and saves for one image; the score is in each shape's description."""
    rows = zip(found.names, found.scores.tolist(), _rounded(found.polygons), strict=True)
    shapes = [
        {
            "label": name,
            "points": points,
            "group_id": None,
            "description": f"score {score:.3f}",
            "shape_type": "polygon",
            "flags": {},
            "mask": None,
        }
        for name, score, points in rows
    ]
    height, width = found.image_size
    picture = {"imagePath": image_path, "imageData": None, "imageHeight": height, "imageWidth": width}
    return {"version": LABELME, "flags": {}, "shapes": shapes, **picture}


def geojson(found: Detections) -> dict:
    """A FeatureCollection in pixels (y down), its features as QuPath imports them: detections with class and measurements."""
    rows = zip(found.names, found.classes.tolist(), _rounded(found.polygons), measurements(found), strict=True)
    features = [
        {
            "type": "Feature",
            "geometry": {"type": "Polygon", "coordinates": [[*points, points[0]]]},
            "properties": {
                "objectType": "detection",
                "classification": {"name": name, "color": list(visualize.color(index))},
                "measurements": {key: row[key] for key in row if key not in ("index", "class")},
            },
        }
        for name, index, points, row in rows
    ]
    return {"type": "FeatureCollection", "features": features}


def instance_ids(found: Detections, dtype: type = np.uint16) -> np.ndarray:
    """[height, width]: i + 1 where detection i is, 0 where none is; where several are, the one of the highest score."""
    if len(found) > np.iinfo(dtype).max:
        name = np.dtype(dtype).name
        raise InputError(f"{len(found)} objects are more than the {np.iinfo(dtype).max} that {name} can number; take uint32")
    height, width = found.image_size
    ids = np.zeros((height, width), dtype)
    order = np.argsort(-found.scores, kind="stable")[::-1]
    for index in order.tolist():
        polygon = found.polygons[index].astype(np.float64)
        if not np.isfinite(polygon).all():
            continue
        # Only where the polygon is: whole masks of many objects would take as many times the image.
        left, top = np.clip(np.floor(polygon.min(axis=0)) - 1, 0, (width, height)).astype(int).tolist()
        right, bottom = np.clip(np.ceil(polygon.max(axis=0)) + 1, 0, (width, height)).astype(int).tolist()
        if left < right and top < bottom:
            ring = (polygon - (left, top)).ravel().tolist()
            (rle,) = coco_mask.frPyObjects([ring], bottom - top, right - left)
            ids[top:bottom, left:right][coco_mask.decode(rle).astype(bool)] = index + 1
    return ids


def measurements(found: Detections) -> list[dict]:
    """A row each: index (as in instance_ids), class, score, box and what measure.measure gives, rounded to 3 digits."""
    values = {name: column.round(3).tolist() for name, column in measure(found.polygons).items()}
    xmin, ymin, xmax, ymax = np.asarray(found.boxes, np.float64).reshape(-1, 4).T
    box = {"xmin": xmin, "ymin": ymin, "width": xmax - xmin, "height": ymax - ymin}
    columns = {
        "index": list(range(1, len(found) + 1)),
        "class": found.names,
        "score": np.asarray(found.scores, np.float64).round(4).tolist(),
        **{name: values.pop(name) for name in ("area", "centroid_x", "centroid_y")},
        **{name: column.round(3).tolist() for name, column in box.items()},
        **values,
    }
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


COLUMNS = ("index", "class", "score", "area", "centroid_x", "centroid_y", "xmin", "ymin", "width", "height")
COLUMNS += ("perimeter", "major_axis", "minor_axis", "orientation", "circularity")


def _rounded(polygons):
    """To hundredths of a pixel, as lists."""
    return np.asarray(polygons, np.float64).round(2).tolist()
