"""Areas, centroids, axes and outlines of polygons, in closed form: no pixels are counted."""

from __future__ import annotations

import numpy as np

NAMES = ("area", "centroid_x", "centroid_y", "perimeter", "major_axis", "minor_axis", "orientation", "circularity")


def measure(polygons: np.ndarray) -> dict[str, np.ndarray]:
    """Polygons [M, R, 2] (x, y in pixels) -> each of NAMES as float64 [M].

    area, centroid: of the region inside (shoelace formula and first moments), in pixels. major_axis, minor_axis, orientation:
    of the ellipse that has the region's second moments: full lengths in pixels, and the angle from +x towards +y (down) in
    degrees, above -90 up to 90. perimeter: of the polygon. circularity: 4 pi area / perimeter**2, 1 for a disk.
    A polygon without area has its vertices' mean as centroid, and 0 for all that has no value.
    """
    points = np.asarray(polygons, np.float64)
    middle = points.mean(axis=1)
    x, y = np.moveaxis(points - middle[:, np.newaxis], -1, 0)  # about a near point: far ones cost digits
    u, v = np.roll(x, -1, axis=1), np.roll(y, -1, axis=1)
    cross = x * v - u * y
    signed = cross.sum(axis=1) / 2
    area, perimeter = np.abs(signed), np.hypot(u - x, v - y).sum(axis=1)
    flat = area <= 1e-9 * np.maximum(perimeter**2, 1)
    whole = np.where(flat, 1.0, signed)

    def moment(values):
        return np.where(flat, 0.0, (values * cross).sum(axis=1) / whole)

    cx, cy = moment(x + u) / 6, moment(y + v) / 6
    xx = moment(x * x + x * u + u * u) / 12 - cx * cx
    yy = moment(y * y + y * v + v * v) / 12 - cy * cy
    xy = moment(2 * x * y + x * v + u * y + 2 * u * v) / 24 - cx * cy
    spread = np.hypot(2 * xy, xx - yy)
    return {
        "area": np.where(flat, 0.0, area),
        "centroid_x": middle[:, 0] + cx,
        "centroid_y": middle[:, 1] + cy,
        "perimeter": perimeter,
        "major_axis": 4 * np.sqrt(np.maximum(xx + yy + spread, 0) / 2),
        "minor_axis": 4 * np.sqrt(np.maximum(xx + yy - spread, 0) / 2),
        "orientation": np.degrees(np.arctan2(2 * xy, xx - yy)) / 2,
        "circularity": np.where(flat, 0.0, 4 * np.pi * area / np.maximum(perimeter, 1e-30) ** 2),
    }
