#!/usr/bin/env python3
"""How far true corners are from predicted polygons, in pixels: what AP hardly sees, and the eye does.

  polarmask predict out/run out/shapes/val/images --truth out/shapes/val/annotations.json --out out/corners \
    --save coco --segmentation polygon
  python scripts/benchmarks/corners.py out/shapes/val/annotations.json out/corners/results.json

TRUTH is a COCO file whose objects are polygons of a few corners, as `polarmask shapes` draws them; RESULTS are COCO results
with polygons. An object has the detection of its image whose corners' mean is nearest to its own. With a number of rays in
place of RESULTS: polygons of that many true rays from the mass center, the best that they can be.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import tensorflow as tf

from polarmask_tf.ops import geometry

FAR = 8.0  # pixels between the two means, beyond which an object counts as missed
MOST_CORNERS = 12  # of a polygon that has corners: a circle is one of many more


def distances(points: np.ndarray, ring: np.ndarray) -> np.ndarray:
    """Of points [P, 2] to the closest place on the closed line through ring [V, 2]."""
    sides = np.roll(ring, -1, axis=0) - ring
    along = ((points[:, None] - ring) * sides).sum(-1) / np.maximum((sides**2).sum(-1), 1e-12)
    nearest = ring + np.clip(along, 0, 1)[..., None] * sides
    return np.linalg.norm(nearest - points[:, None], axis=-1).min(axis=1)


def load(path: str) -> dict | list:
    try:
        return json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        sys.exit(f"corners.py: {path}: {error}")


def ring_of(entry: dict, path: str) -> np.ndarray:
    """The first polygon of an annotation or result [V, 2]."""
    polygons = entry.get("segmentation")
    if not isinstance(polygons, list) or not polygons or len(polygons[0]) < 6:
        sys.exit(
            f"corners.py: {path}: an entry of image {entry.get('image_id')} has no polygon; predict with --segmentation polygon"
        )
    return np.asarray(polygons[0], float).reshape(-1, 2)


def perfect(ring: np.ndarray, rays: int) -> np.ndarray:
    edges = tf.constant(np.concatenate([ring, np.roll(ring, -1, axis=0)], axis=1)[None], tf.float32)
    _, center = geometry.area_and_centroid(edges)
    return geometry.assemble(center, geometry.ray_lengths(center, edges, rays))[0].numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("truth", help="COCO file, its objects polygons of a few corners")
    parser.add_argument("results", help="COCO results with polygons, or a number of rays")
    arguments = parser.parse_args()
    rays = int(arguments.results) if arguments.results.isdigit() else None
    if rays is not None and not 4 <= rays <= 720:
        parser.error(f"{rays} rays: 4 to 720 are needed")
    truth = load(arguments.truth)
    names = {category["id"]: category["name"] for category in truth["categories"]}
    found: dict[int, list] = {}
    for entry in [] if rays else load(arguments.results):
        found.setdefault(entry["image_id"], []).append(ring_of(entry, arguments.results))
    kinds: dict[str, list] = {}
    missed = 0
    for annotation in truth["annotations"]:
        ring = ring_of(annotation, arguments.truth)
        if len(ring) > MOST_CORNERS:
            continue
        candidates = [perfect(ring, rays)] if rays else found.get(annotation["image_id"], [])
        off = [np.abs(candidate.mean(axis=0) - ring.mean(axis=0)).max() for candidate in candidates]
        if not rays and (not off or min(off) > FAR):
            missed += 1
            continue
        kinds.setdefault(names[annotation["category_id"]], []).extend(distances(ring, candidates[int(np.argmin(off))]))
    if not kinds and not missed:
        sys.exit(f"corners.py: {arguments.truth}: no object of {MOST_CORNERS} corners or fewer")
    print("kind         corners  mean  90 % within (pixels)")
    for name, values in sorted(kinds.items()):
        print(f"{name:12} {len(values):7}  {np.mean(values):4.2f}  {np.quantile(values, 0.9):4.2f}")
    print(f"{missed} objects without a detection near")


if __name__ == "__main__":
    main()
