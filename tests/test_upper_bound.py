"""`polarmask upper-bound`: numbers worked out by hand, and against the released code's integer-degree rays on real data."""

import csv
import json
import math

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image
from pycocotools import mask as coco_mask

from polarmask_tf import files
from polarmask_tf.data import records
from polarmask_tf.data.convert import convert
from polarmask_tf.errors import InputError
from polarmask_tf.inference.ceiling import read
from polarmask_tf.inference.coco_metrics import polygons_to_rle
from polarmask_tf.tools.shapes import make_shapes
from polarmask_tf.tools.upper_bound import format_table, rows, run, upper_bound, write

SIZE = 200


def square(x, y, side):
    return [x, y, x + side, y, x + side, y + side, x, y + side]


def circle(x, y, radius, vertices=90):
    angles = 2 * math.pi * np.arange(vertices) / vertices
    return np.stack([x + radius * np.cos(angles), y + radius * np.sin(angles)], 1).ravel().tolist()


def star(x, y, radius):
    angles = 2 * math.pi * np.arange(10) / 10 + 0.1
    radii = np.tile([radius, 0.45 * radius], 5)
    return np.stack([x + radii * np.cos(angles), y + radii * np.sin(angles)], 1).ravel().tolist()


def coco_file(path, segmentations, categories=None, **more):
    """One image for each list of segmentations; every annotation's area is left out unless it is a dict of its own."""
    annotations = []
    for image, several in enumerate(segmentations, 1):
        for one in several:
            entry = one if isinstance(one, dict) and "segmentation" in one else {"segmentation": one}
            annotations.append({"id": len(annotations) + 1, "image_id": image, "category_id": 1, "iscrowd": 0, **entry})
    images = [{"id": i + 1, "file_name": f"{i}.png", "height": SIZE, "width": SIZE} for i in range(len(segmentations))]
    path.write_text(
        json.dumps(
            {
                "images": images,
                "annotations": annotations,
                "categories": categories or [{"id": 1, "name": "thing"}],
                **more,
            }
        )
    )
    return path


def donut(outer, inner):
    mask = np.zeros((SIZE, SIZE), np.uint8, order="F")
    mask[20 : 20 + outer, 20 : 20 + outer] = 1
    gap = (outer - inner) // 2 + 20
    mask[gap : gap + inner, gap : gap + inner] = 0
    rle = coco_mask.encode(mask)
    return {"size": rle["size"], "counts": rle["counts"].decode()}


def ious_of(path, rays, **options):
    return upper_bound(path, rays, progress=False, **options).ious


def test_an_inscribed_polygon_covers_as_much_of_a_disc_as_trigonometry_says(tmp_path):
    rays = (8, 12, 24, 72)
    ious = ious_of(coco_file(tmp_path / "a.json", [[[circle(100, 100, 80, 360)]]]), rays)
    inscribed = [n / (2 * math.pi) * math.sin(2 * math.pi / n) for n in rays]
    assert ious.shape == (1, 2, 4)
    assert ious[0, 0] == pytest.approx(inscribed, abs=0.004)  # a raster of 200 pixels
    assert ious[0, 1] == pytest.approx(inscribed, abs=0.004)  # a disc's box has the same center


def test_a_star_shaped_polygon_from_its_own_kernel_approaches_its_mask(tmp_path):
    ious = ious_of(coco_file(tmp_path / "a.json", [[[star(100, 100, 90)]]]), (8, 40, 360))[0, 0]
    assert ious[0] < 0.8 and ious[1] < ious[2] and ious[2] > 0.985


def test_only_the_largest_part_is_reached_and_holes_are_filled(tmp_path):
    parts = [square(10, 10, 80), square(150, 150, 40)]
    path = coco_file(tmp_path / "a.json", [[parts], [donut(100, 50)]])
    ious = ious_of(path, (120,))
    assert ious[0, 0, 0] == pytest.approx(80**2 / (80**2 + 40**2), abs=0.01)
    assert ious[1, 0, 0] == pytest.approx(1 - 50**2 / 100**2, abs=0.01)
    assert ious[0, 1, 0] < ious[0, 0, 0]  # between the two parts lies the center of their box


def test_annotations_may_come_as_a_converted_directory_and_in_any_number(tmp_path):
    make_shapes(tmp_path, train=12, val=0, kinds=["star", "cee", "bar"], progress=False)
    convert(tmp_path / "train/annotations.json", tmp_path / "train/images", tmp_path / "data", processes=1, progress=False)
    file, directory = (upper_bound(tmp_path / name, (12, 36), progress=False) for name in ("train/annotations.json", "data"))
    assert np.allclose(file.ious, directory.ious, atol=2e-3) and file.images == directory.images == 12  # float64, float32
    assert (file.labels == directory.labels).all() and np.allclose(file.areas, directory.areas)
    assert upper_bound(tmp_path / "data", (8,), limit=3, progress=False).images == 3
    # More than are worked on at once, in an image of their own.
    many = [[square(x, y, 3 + (x + y) % 5)] for x in range(0, 190, 15) for y in range(0, 190, 15)]
    apart = coco_file(tmp_path / "apart.json", [[one] for one in many])
    together = coco_file(tmp_path / "together.json", [many])
    assert sorted(ious_of(apart, (12,))[:, 0, 0]) == pytest.approx(sorted(ious_of(together, (12,))[:, 0, 0]), abs=1e-6)


def test_records_that_do_not_fit_are_named(tmp_path):
    make_shapes(tmp_path, train=1, val=0, progress=False)
    info = convert(tmp_path / "train/annotations.json", tmp_path / "train/images", tmp_path / "data", progress=False)
    (data,) = records.read_shard(info.shard_paths[0])
    example = tf.train.Example.FromString(data)
    example.features.feature["image/object/polygon/ring_lengths"].int64_list.value[0] += 1
    with open(info.shard_paths[0], "wb") as file:
        records.write_record(file, example.SerializeToString())
    with pytest.raises(InputError, match=r"image 1: polygons that do not fit its objects; run `polarmask convert`"):
        upper_bound(tmp_path / "data", (8,), progress=False)


def test_every_instance_left_out_is_counted_and_named(tmp_path):
    path = coco_file(
        tmp_path / "a.json",
        [
            [
                [square(10, 10, 50)],
                {"segmentation": donut(60, 20), "iscrowd": 1},
                {"segmentation": []},
                {"segmentation": [[1, 2, 3]]},
                [square(100, 100, 0.8)],
            ]
        ],
    )
    result = upper_bound(path, (8,), progress=False)
    assert len(result.ious) == 1
    assert sum(count for count, _ in result.report.skipped.values()) == 4
    table = format_table(result)
    assert all(text in table for text in ("crowd region", "annotation 2 of image 1", "empty", "malformed", "one pixel"))


def test_sizes_and_classes_are_told_apart(tmp_path):
    categories = [{"id": 5, "name": "disc"}, {"id": 2, "name": "ring"}, {"id": 9, "name": "unseen"}]
    path = coco_file(
        tmp_path / "a.json",
        [
            [
                {"segmentation": [circle(50, 50, 20)], "category_id": 5},
                {"segmentation": [circle(150, 50, 8)], "category_id": 5, "area": 1023.9},
                {"segmentation": donut(120, 90), "category_id": 2},
                {"segmentation": donut(60, 10), "category_id": 2, "area": 1024.0},
                {"segmentation": [circle(100, 100, 60)], "category_id": 5},
            ]
        ],
        categories,
    )
    result = upper_bound(path, (36,), progress=False)
    assert result.areas[2] == 120**2 - 90**2
    groups = {(row["group"], row["name"], row["center"]): row for row in rows(result)}
    assert {name: groups["size", name, "mass"]["instances"] for name in ("small", "medium", "large")} == {
        "small": 1,
        "medium": 3,
        "large": 1,
    }
    assert {name for kind, name, _ in groups if kind == "class"} == {"disc", "ring"}
    expected = np.mean([1 - 90**2 / 120**2, 1 - 10**2 / 60**2])
    assert groups["class", "ring", "mass"]["mean_iou"] == pytest.approx(expected, abs=0.02)
    assert groups["class", "ring", "mass"]["above_0.5"] == 0.5
    everything = groups["all", "", "mass"]
    assert everything["mean_iou"] == pytest.approx(result.ious[:, 0, 0].mean(), abs=1e-6)
    by_hand = np.mean([[iou >= t for iou in result.ious[:, 0, 0]] for t in np.linspace(0.5, 0.95, 10)])
    assert everything["recall"] == pytest.approx(by_hand)
    table = format_table(result)
    assert table.index("ring") < table.index("disc")  # what loses most comes first


def test_the_table_is_printed_and_written_with_a_plot(tmp_path, capsys):
    path = coco_file(tmp_path / "a.json", [[[circle(100, 100, 50)], [star(60, 60, 30)]]])
    result = run(path, tmp_path / "out", rays=(12, 6, 12))
    printed = capsys.readouterr().out
    assert result.rays == (6, 12)
    assert f"{result.ious[:, 0, 1].mean():.3f}" in printed and "With 12 rays from the mass center" in printed
    with open(tmp_path / "out/upper_bound.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert [(row["center"], row["rays"]) for row in table if row["group"] == "all"] == [
        ("mass", "6"),
        ("mass", "12"),
        ("box", "6"),
        ("box", "12"),
    ]
    assert float(table[1]["mean_iou"]) == pytest.approx(result.ious[:, 0, 1].mean(), abs=1e-4)
    with Image.open(tmp_path / "out/upper_bound.png") as picture:
        pixels = np.asarray(picture.convert("RGB"))
    assert min(pixels.shape[:2]) > 400 and len(np.unique(pixels.reshape(-1, 3), axis=0)) > 20
    assert not list((tmp_path / "out").glob("*.tmp"))
    (tmp_path / "taken").write_text("")
    with pytest.raises(InputError, match="cannot be made"):
        write(result, tmp_path / "taken")


@pytest.mark.parametrize("side", [20_000, 100_000, 10**9])
@pytest.mark.parametrize("kind", ["polygon", "rle"])
def test_no_picture_has_so_many_pixels(tmp_path, side, kind):
    """A few bytes of JSON that would take gigabytes."""
    path = coco_file(tmp_path / "a.json", [[]])
    document = json.loads(path.read_text())
    document["images"][0] |= {"height": side, "width": side}
    whole = [[0, 0, side, 0, side, side, 0, side]] if kind == "polygon" else {"size": [side, side], "counts": [0, side * side]}
    document["annotations"] = [{"id": 1, "image_id": 1, "category_id": 1, "segmentation": whole}]
    path.write_text(json.dumps(document))
    with pytest.raises(InputError, match=r"holds no instance.*image of more than 120 megapixels.*annotation of a skipped"):
        upper_bound(path, (8,), progress=False)


@pytest.mark.parametrize(("text", "said"), [("{", "not valid JSON"), ("[]", "COCO file"), ('{"images": []}', "annotations")])
def test_a_bad_file_is_one_line(tmp_path, text, said):
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(InputError, match=said) as error:
        upper_bound(path, progress=False)
    assert "\n" not in str(error.value)


def test_what_cannot_be_measured_is_refused(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        upper_bound(tmp_path / "none.json", progress=False)
    with pytest.raises(InputError, match="no dataset"):
        upper_bound(tmp_path, progress=False)
    nothing = coco_file(tmp_path / "a.json", [[{"segmentation": donut(60, 20), "iscrowd": 1}], []])
    with pytest.raises(InputError, match=r"no instance.*crowd region"):
        upper_bound(nothing, (8,), progress=False)
    path = coco_file(tmp_path / "b.json", [[[square(10, 10, 50)]]])
    with pytest.raises(InputError, match="rays"):
        upper_bound(path, (3, 8), progress=False)
    with pytest.raises(InputError, match="limit"):
        upper_bound(path, limit=0, progress=False)


def integer_degree_polygon(cv2, mask, n):
    """The released code's target from its center: contour pixels in bins of whole degrees (reference README, rows 6 and 8).

    Returns float32 [n, 2]; contour pixels are taken at their centers.
    """
    contours, _ = cv2.findContours(mask, cv2.RETR_TREE, cv2.CHAIN_APPROX_NONE)
    largest = max(contours, key=cv2.contourArea)
    points = largest[:, 0].astype(np.float64)
    moments = cv2.moments(largest)
    center = points.mean(0) if not moments["m00"] else np.array([moments["m10"], moments["m01"]]) / moments["m00"]
    offsets = points - center.astype(int)
    degrees = (np.degrees(np.arctan2(offsets[:, 1], offsets[:, 0])) % 360).astype(int)
    farthest = {}
    for degree, distance in zip(degrees, np.hypot(*offsets.T), strict=True):
        farthest[degree] = max(distance, farthest.get(degree, 0))
    directions = 360 * np.arange(n) // n
    lengths = [
        next((farthest[d + step] for step in (0, 1, -1, 2, -2, 3, -3) if d + step in farthest), 1e-6) for d in directions
    ]
    angles = np.radians(directions)
    return center.astype(int) + 0.5 + np.array(lengths)[:, None] * np.stack([np.cos(angles), np.sin(angles)], 1)


def integer_degree_ious(path, n, size=None):
    """IoUs with the masks, the targets made in the image as it is, or resized to (width, height) as before training."""
    cv2 = pytest.importorskip("cv2")
    ious = []
    for image in read(path)[2]:
        for annotation in image["annotations"]:
            mask, true_size = coco_mask.decode(annotation["rle"]), np.array([image["width"], image["height"]])
            resized = cv2.resize(mask, size, interpolation=cv2.INTER_NEAREST) if size else mask
            polygon = integer_degree_polygon(cv2, resized, n) * (true_size / (size or true_size))
            rle = polygons_to_rle(polygon[None], image["height"], image["width"])[0]
            ious.append(coco_mask.iou([rle], [annotation["rle"]], [0])[0, 0])
    return np.array(ious)


def test_exact_rays_beat_whole_degrees_and_the_mass_center_beats_the_box_center_on_real_images(shared):
    path = shared / "data/coco_dev/annotations/instances_dev.json"
    result = upper_bound(path, (36, 72), progress=False)
    mass, box = result.ious[:, 0].astype(np.float64), result.ious[:, 1].astype(np.float64)
    binned, enlarged = integer_degree_ious(path, 36), integer_degree_ious(path, 36, (1280, 768))
    print(
        f"\n36 rays, {len(mass)} instances: exact, mass center {mass[:, 0].mean():.4f}; exact, box center "
        f"{box[:, 0].mean():.4f}; whole degrees {binned.mean():.4f}, and made at 1280x768 {enlarged.mean():.4f}"
    )
    assert len(binned) == len(enlarged) == len(mass) == 820
    assert mass[:, 0].mean() == pytest.approx(0.906, abs=0.005)
    # Small objects have fewer contour pixels than degrees; at the size that the released code trains with it is less bad.
    assert mass[:, 0].mean() > enlarged.mean() + 0.01 > binned.mean()
    assert (mass.mean(0) > box.mean(0) + 0.005).all() and mass[:, 1].mean() > mass[:, 0].mean()


def test_exact_rays_beat_whole_degrees_on_shapes(tmp_path):
    make_shapes(tmp_path, train=20, val=0, kinds=["circle", "star", "ell", "ellipse"], progress=False)
    path = tmp_path / "train/annotations.json"
    result = upper_bound(path, (36,), progress=False)
    assert result.ious[:, 0].mean() > integer_degree_ious(path, 36).mean() + 0.01
    assert result.ious[:, 0].mean() > result.ious[:, 1].mean()  # an L's box center lies outside of it


def test_four_rays_are_measured_as_they_are_trained(tmp_path):
    """The polygon is the box: a triangle with two sides along it fills half of it, from either center."""
    source = coco_file(tmp_path / "triangle.json", [[[[20, 20, 120, 20, 20, 120]]]])
    result = upper_bound(source, (4,), progress=False)
    np.testing.assert_allclose(result.ious, 0.5, atol=0.01)


def test_where_it_is_written_is_known_before_anything_is_measured(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("polarmask_tf.tools.upper_bound.upper_bound", lambda *_, **__: pytest.fail("it measures"))
    with pytest.raises(InputError, match="file: cannot be written"):
        run(tmp_path / "a.json", tmp_path / "file")
    with files.lock(tmp_path / "out", "upper-bound"), pytest.raises(InputError, match="in use by polarmask upper-bound"):
        run(tmp_path / "a.json", tmp_path / "out")
