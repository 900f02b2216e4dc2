"""Detections in other programs' formats, and measurements of polygons against pixels."""

import csv
import io
import json

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from helpers.detections import STARS, star_rows
from helpers.polygons import polar_star
from polarmask_tf.errors import InputError
from polarmask_tf.inference import visualize
from polarmask_tf.inference.formats import COLUMNS
from polarmask_tf.inference.measure import NAMES, measure
from polarmask_tf.inference.results import Detections


def stars(count=5, seed=0, height=60, width=80, **more):
    return Detections(**star_rows(seed, count, height, width), categories=STARS, image_size=(height, width), **more)


# ---- measurements


def test_a_rectangle_by_hand():
    found = measure(np.array([[(10, 20), (50, 20), (50, 30), (10, 30)]]))
    assert {name: values[0] for name, values in found.items()} == pytest.approx(
        {
            "area": 400,
            "centroid_x": 30,
            "centroid_y": 25,
            "perimeter": 100,
            "major_axis": 4 * 40 / 12**0.5,
            "minor_axis": 4 * 10 / 12**0.5,
            "orientation": 0,
            "circularity": 4 * np.pi * 400 / 100**2,
        }
    )


def ellipse(x, y, a, b, degrees, points=720):
    turn, angle = np.radians(degrees), np.linspace(0, 2 * np.pi, points, endpoint=False)
    along, across = a * np.cos(angle), b * np.sin(angle)
    return np.stack([x + along * np.cos(turn) - across * np.sin(turn), y + along * np.sin(turn) + across * np.cos(turn)], -1)


@pytest.mark.parametrize("degrees", [-60, -10, 0, 35, 90])
@pytest.mark.parametrize("order", [1, -1])
def test_an_ellipse_has_its_own_axes(degrees, order):
    found = measure(ellipse(1e4, -3e3, 30, 12, degrees)[np.newaxis, ::order])
    values = {name: values[0] for name, values in found.items()}
    assert values["area"] == pytest.approx(np.pi * 30 * 12, rel=1e-4)
    assert (values["centroid_x"], values["centroid_y"]) == pytest.approx((1e4, -3e3), abs=1e-6)
    assert (values["major_axis"], values["minor_axis"]) == pytest.approx((60, 24), rel=1e-4)
    assert np.sin(np.radians(values["orientation"] - degrees)) == pytest.approx(0, abs=1e-6)  # 90 and -90 are one
    assert measure(ellipse(0, 0, 9, 9, 0)[np.newaxis])["circularity"][0] == pytest.approx(1, abs=1e-4)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(3, 40))
def test_they_are_what_fine_pixels_give(seed, rays):
    """OpenCV's moments of a raster of 1/16 pixel by pycocotools; OpenCV's perimeter."""
    rng, fine = np.random.default_rng(seed), 16
    polygon = np.asarray(polar_star(rng, 30, 25, 20, rays), np.float64)
    found = {name: values[0] for name, values in measure(polygon[np.newaxis]).items()}
    (rle,) = coco_mask.frPyObjects([(polygon * fine).ravel().tolist()], 60 * fine, 60 * fine)
    moments = cv2.moments(coco_mask.decode(rle), binaryImage=True)
    border = found["perimeter"] / fine
    assert found["area"] == pytest.approx(moments["m00"] / fine**2, abs=border)
    assert found["perimeter"] == pytest.approx(cv2.arcLength(polygon.astype(np.float32), True), rel=1e-5)
    if found["area"] < 60:  # of slivers, pixels say little
        return
    # A raster's pixel (i, j) is the square up to (i + 1, j + 1).
    center = np.array([moments["m10"], moments["m01"]]) / moments["m00"] + 0.5
    assert (found["centroid_x"], found["centroid_y"]) == pytest.approx(center / fine, abs=0.1)
    inertia = np.array([[moments["mu20"], moments["mu11"]], [moments["mu11"], moments["mu02"]]]) / moments["m00"] / fine**2
    values, vectors = np.linalg.eigh(inertia)
    assert (found["minor_axis"], found["major_axis"]) == pytest.approx(4 * np.sqrt(values), rel=0.03, abs=0.15)
    if found["major_axis"] > 1.2 * found["minor_axis"]:
        angle = np.degrees(np.arctan2(vectors[1, 1], vectors[0, 1]))
        assert abs((found["orientation"] - angle + 90) % 180 - 90) < 4


def test_what_has_no_area_is_a_number_all_the_same():
    flat = np.array([[(5, 5), (9, 5), (7, 5)], [(3, 4)] * 3, [(0, 0), (1e-30, 0), (0, 1e-30)]], np.float64)
    found = measure(flat)
    assert all(np.isfinite(values).all() for values in found.values())
    assert found["area"].tolist() == [0, 0, 0] and found["centroid_x"].tolist()[:2] == [7, 3]
    assert found["perimeter"][0] == 8 and (found["circularity"] == 0).all() and (found["major_axis"] == 0).all()
    assert set(measure(np.zeros((0, 5, 2)))) == set(NAMES)


def test_rows_of_measurements():
    found = stars(5)
    rows = found.measurements()
    assert [tuple(row) for row in rows] == [COLUMNS] * 5 and stars(0).measurements() == []
    assert [row["index"] for row in rows] == [1, 2, 3, 4, 5] and [row["class"] for row in rows] == found.names
    for row, polygon, box, score in zip(rows, found.polygons, found.boxes, found.scores, strict=True):
        assert row["area"] == pytest.approx(abs(cv2.contourArea(polygon)), rel=1e-3)
        assert (row["xmin"], row["ymin"], row["xmin"] + row["width"], row["ymin"] + row["height"]) == pytest.approx(
            box.tolist(), abs=0.01
        )
        assert row["score"] == pytest.approx(float(score), abs=1e-4)
    text = io.StringIO()
    csv.DictWriter(text, COLUMNS).writerows(rows)
    assert len(text.getvalue().splitlines()) == 5
    json.dumps(rows)


# ---- ids


def by_masks(found):
    ids = np.zeros(found.image_size, np.int64)
    for index in np.argsort(found.scores)[:]:  # the best is painted last
        ids[found.masks()[index]] = index + 1
    return ids


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 8), st.integers(1, 70), st.integers(1, 70))
def test_ids_are_the_masks_the_best_on_top(seed, count, height, width):
    found = stars(count, seed, height, width)
    np.testing.assert_array_equal(found.to_ids(), by_masks(found))
    assert found.to_ids().dtype == np.uint16 and found.to_ids(np.uint32).dtype == np.uint32


def test_ids_do_not_depend_on_the_order_but_for_their_numbers():
    found = stars(4)
    order = [2, 0, 3, 1]
    shuffled = Detections(*(getattr(found, n)[order] for n in ("scores", "classes", "boxes", "polygons")), STARS, (60, 80))
    np.testing.assert_array_equal(shuffled.to_ids(), by_masks(shuffled))


def test_more_objects_than_a_type_can_number_are_refused():
    many = stars(300, height=40, width=40)
    assert many.to_ids().max() == by_masks(many).max()
    with pytest.raises(InputError, match="300 objects are more than the 255"):
        many.to_ids(np.uint8)
    wild = stars(2)
    wild.polygons[0] = np.nan
    assert 1 not in wild.to_ids() and 2 in wild.to_ids()


# ---- other programs' files


def test_coco_polygons_are_those_of_the_rles():
    found = stars(6)
    polygons, rles = found.to_coco(5, "polygon"), found.to_coco(5)
    for polygon, rle in zip(polygons, rles, strict=True):
        assert {key: value for key, value in polygon.items() if key != "segmentation"} == {
            key: value for key, value in rle.items() if key != "segmentation"
        }
        (again,) = coco_mask.frPyObjects(polygon["segmentation"], 60, 80)
        assert coco_mask.iou([again], [rle["segmentation"]], [0])[0, 0] > 0.97  # hundredths of a pixel
    json.dumps(polygons)
    assert stars(0).to_coco(5, "polygon") == []
    with pytest.raises(InputError, match="must be 'rle' or 'polygon'"):
        found.to_coco(5, "mask")


def test_labelme_has_the_keys_that_it_saves():
    found = stars(3, source="photos/a.png")
    document = json.loads(json.dumps(found.to_labelme()))
    assert list(document) == ["version", "flags", "shapes", "imagePath", "imageData", "imageHeight", "imageWidth"]
    assert document["imagePath"] == "a.png" and document["imageData"] is None and document["flags"] == {}
    assert (document["imageHeight"], document["imageWidth"]) == (60, 80) and document["version"].startswith("5.")
    for shape, name, polygon in zip(document["shapes"], found.names, found.polygons, strict=True):
        assert {"label", "points", "group_id", "shape_type", "flags"} <= set(shape)
        assert (shape["label"], shape["shape_type"], shape["group_id"]) == (name, "polygon", None)
        np.testing.assert_allclose(shape["points"], polygon, atol=0.006)
    assert found.to_labelme("../b.png")["imagePath"] == "../b.png"
    with pytest.raises(InputError, match="are of no file"):
        stars(1).to_labelme()


def test_geojson_is_what_qupath_reads():
    found = stars(4)
    document = json.loads(json.dumps(found.to_geojson()))
    assert document["type"] == "FeatureCollection" and len(document["features"]) == 4
    for feature, index, polygon in zip(document["features"], found.classes.tolist(), found.polygons, strict=True):
        (ring,) = feature["geometry"]["coordinates"]
        assert feature["type"] == "Feature" and feature["geometry"]["type"] == "Polygon" and ring[0] == ring[-1]
        np.testing.assert_allclose(ring[:-1], polygon, atol=0.006)
        properties = feature["properties"]
        assert properties["objectType"] == "detection"
        assert properties["classification"] == {"name": STARS[index]["name"], "color": list(visualize.color(index))}
        assert all(isinstance(value, float) for value in properties["measurements"].values())
        assert properties["measurements"]["area"] == pytest.approx(abs(cv2.contourArea(polygon)), rel=1e-3)
    assert stars(0).to_geojson() == {"type": "FeatureCollection", "features": []}


# ---- filters


def test_only_some_classes():
    found = stars(7)
    assert found.only(["star"]).names == ["star", "star"] and found.only(iter(["moon", "circle"])).classes.tolist() == [
        0,
        2,
        0,
        2,
        0,
    ]
    assert len(found.only([])) == 0 and found.only(["star"]).image_size == (60, 80)
    with pytest.raises(InputError, match="no class 'cat', 'dog'; this model's are: circle, star, moon"):
        found.only(["cat", "star", "dog"])
