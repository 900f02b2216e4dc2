"""Polygons, and what rays and masks of them are by other ways than ops/geometry.py's."""

import numpy as np
from pycocotools import mask as coco_mask

MAX_EDGES = 40
SQUARE = [[10, 10], [30, 10], [30, 30], [10, 30]]
HOLE = [[15, 15], [15, 25], [25, 25], [25, 15]]  # turns the other way


def edges_of(*rings, pad=MAX_EDGES):
    """float32 [pad, 4] edges of rings, padded with zeros."""
    edges = np.concatenate([np.concatenate([ring, np.roll(ring, -1, axis=0)], axis=1) for ring in map(np.asarray, rings)])
    return np.pad(edges, [(0, pad - len(edges)), (0, 0)]).astype(np.float32)


def star(rng, center, radius, corners, roughness=0.7):
    """A polygon float64 [corners, 2] that is star-shaped around its center, with positive shoelace sum."""
    angles = 2 * np.pi * (np.arange(corners) + rng.uniform(0.05, 0.95, corners)) / corners
    radii = radius * rng.uniform(1 - roughness, 1, corners)
    return np.asarray(center) + radii[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)


def unit_vectors(n):
    return [(np.cos(2 * np.pi * k / n), np.sin(2 * np.pi * k / n)) for k in range(n)]


def hits(point, edges, direction):
    """Distances >= 0 at which a ray meets edges, by solving p + t d = a + u (b - a) with 0 <= u <= 1 in float64."""
    found = []
    for x1, y1, x2, y2 in np.asarray(edges, np.float64):
        matrix = np.array([[direction[0], x1 - x2], [direction[1], y1 - y2]])
        if (x1, y1) != (x2, y2) and abs(np.linalg.det(matrix)) > 1e-12:
            t, u = np.linalg.solve(matrix, [x1 - point[0], y1 - point[1]])
            if t >= 0 and 0 <= u <= 1:
                found.append(t)
    return found


def inside(point, edges):
    """Even-odd rule in float64, by crossings to the left (geometry.contains looks to the right)."""
    crossings = 0
    for x1, y1, x2, y2 in np.asarray(edges, np.float64):
        if (y1 <= point[1]) != (y2 <= point[1]) and x1 + (point[1] - y1) * (x2 - x1) / (y2 - y1) < point[0]:
            crossings += 1
    return crossings % 2 == 1


def raster(rings, height, width, scale=8, origin=(0, 0)):
    """bool [height * scale, width * scale] of rings (holes cut out) as pycocotools fills them."""
    mask = np.zeros((height * scale, width * scale), bool)
    for ring in rings:
        xy = ((np.asarray(ring, np.float64) - origin) * scale).ravel().tolist()
        mask ^= coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects([xy], *mask.shape))).astype(bool)
    return mask


def raster_moments(mask, scale=8):
    """Area, mass center and box of a mask in pixels."""
    y, x = np.nonzero(mask)
    center = (np.array([x.mean(), y.mean()]) + 0.5) / scale
    return len(x) / scale**2, center, np.array([x.min(), y.min(), x.max() + 1, y.max() + 1]) / scale


def iou(a, b):
    return (a & b).sum() / (a | b).sum()


def polar_star(rng, x, y, radius, rays=36):
    """A polygon float64 [rays, 2] of random lengths at even angles, as the network gives them."""
    angle = 2 * np.pi * np.arange(rays) / rays
    return (x, y) + np.stack([np.cos(angle), np.sin(angle)], -1) * rng.uniform(0.5, 1, (rays, 1)) * radius


def brute_raster(polygon, height, width):
    """Pixels whose center is inside by the even-odd rule: crossings of a ray towards +x, edge by edge."""
    y, x = np.mgrid[:height, :width] + 0.5
    inside = np.zeros((height, width), bool)
    for (x1, y1), (x2, y2) in zip(polygon, np.roll(polygon, -1, axis=0), strict=True):
        if y1 != y2:
            inside ^= ((y1 > y) != (y2 > y)) & (x < x1 + (y - y1) / (y2 - y1) * (x2 - x1))
    return inside
