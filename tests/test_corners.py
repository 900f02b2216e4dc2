"""scripts/benchmarks/corners.py: distances by hand, and of a drawn data set."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np

from polarmask_tf.tools.shapes import make_shapes

SCRIPT = Path(__file__).parents[1] / "scripts" / "benchmarks" / "corners.py"


def ask(*words):
    done = subprocess.run([sys.executable, SCRIPT, *map(str, words)], capture_output=True, text=True, check=True)
    _, *rows, missed = done.stdout.splitlines()
    return {row.split()[0]: [float(word) for word in row.split()[1:]] for row in rows}, int(missed.split()[0])


def test_a_square_with_its_corners_cut(tmp_path):
    """By 4 pixels along each side: a corner is then 4 / sqrt(2) from the polygon. A second object has no detection."""
    square = [10, 10, 50, 10, 50, 50, 10, 50]
    cut = [14, 10, 46, 10, 50, 14, 50, 46, 46, 50, 14, 50, 10, 46, 10, 14]
    truth = {
        "categories": [{"id": 3, "name": "rectangle"}],
        "annotations": [
            {"image_id": 1, "category_id": 3, "segmentation": [square]},
            {"image_id": 2, "category_id": 3, "segmentation": [square]},
        ],
    }
    far = [100, 100, 104, 100, 104, 104]
    results = [{"image_id": 1, "segmentation": [far]}, {"image_id": 1, "segmentation": [cut]}]
    for name, document in (("truth.json", truth), ("results.json", results)):
        (tmp_path / name).write_text(json.dumps(document))
    kinds, missed = ask(tmp_path / "truth.json", tmp_path / "results.json")
    assert missed == 1
    np.testing.assert_allclose(kinds["rectangle"], [4, 4 / 2**0.5, 4 / 2**0.5], atol=0.006)


def test_what_cannot_be_measured_is_said_in_a_line(tmp_path):
    truth = {"categories": [], "annotations": [{"image_id": 1, "category_id": 1, "segmentation": [list(range(60))]}]}
    square = [{"image_id": 7, "segmentation": {"size": [9, 9], "counts": "a"}}]
    for name, document in (("round.json", truth), ("rle.json", square)):
        (tmp_path / name).write_text(json.dumps(document))
    for words, wanted in (
        (("round.json", "36"), "no object of 12 corners or fewer"),
        (("round.json", "0"), "0 rays: 4 to 720"),
        (("round.json", "rle.json"), "image 7 has no polygon"),
        (("round.json", "nothing.json"), "No such file"),
    ):
        paths = [str(tmp_path / word) if word.endswith("json") else word for word in words]
        done = subprocess.run([sys.executable, SCRIPT, *paths], capture_output=True, text=True)
        assert done.returncode != 0 and wanted in done.stderr and "Traceback" not in done.stderr


def test_more_rays_come_nearer(tmp_path):
    make_shapes(tmp_path, train=1, val=8, progress=False)
    truth = tmp_path / "val" / "annotations.json"
    few, many = ask(truth, 36)[0], ask(truth, 720)[0]
    assert few.keys() == many.keys() and "circle" not in few and len(few) == 3
    assert all(0 <= many[kind][1] < 0.2 * few[kind][1] < 1 for kind in few)
