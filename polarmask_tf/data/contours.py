"""Masks to polygons: exact boundaries of a bitmap, and fewer vertices at the same area. numpy and pycocotools alone.

Coordinates are continuous: pixel (0, 0) covers [0, 1) x [0, 1), x to the right, y down. A ring is float [V, 2], closed,
the last vertex not repeated; outer rings have a positive shoelace sum, holes a negative one.
"""

import heapq
import math

import numpy as np
from pycocotools import mask as coco_mask


def trace(mask: np.ndarray) -> list[np.ndarray]:
    """The boundary of a binary mask [H, W] along the pixel edges: rings float64 [V, 2] holding corners only.

    The rings enclose exactly the pixels that are set. Pixels that touch diagonally belong together (8-neighbours), so
    such a ring passes through the point where they touch twice.
    """
    mask = np.asarray(mask, bool)
    padded = np.zeros((mask.shape[0] + 2, mask.shape[1] + 2), bool)  # np.pad would take as long as all that follows
    padded[1:-1, 1:-1] = mask
    # Four kinds of boundary edge, with the inside on the right hand (y points down): top edges of set pixels run east,
    # right edges south, bottom edges west, left edges north. Straight runs of one kind become one segment.
    below, above = padded[1:, 1:-1], padded[:-1, 1:-1]
    right, left = padded[1:-1, 1:].T, padded[1:-1, :-1].T
    starts, ends, kinds = [], [], []
    for kind, edges in enumerate((below & ~above, left & ~right, above & ~below, right & ~left)):
        line, low, high = _runs(edges)
        low, high = (np.stack([line, at] if kind % 2 else [at, line], axis=1) for at in (low, high))
        starts.append(low if kind < 2 else high)
        ends.append(high if kind < 2 else low)
        kinds.append(np.full(len(line), kind))
    starts = np.concatenate(starts)
    width = padded.shape[1]
    kinds = np.concatenate(kinds).tolist()
    start_keys = (starts @ (1, width)).tolist()
    end_keys = (np.concatenate(ends) @ (1, width)).tolist()
    segment_at = {(kind, key): segment for segment, (kind, key) in enumerate(zip(kinds, start_keys, strict=True))}
    rings, visited = [], bytearray(len(kinds))
    for first in range(len(kinds)):
        if visited[first]:
            continue
        ring, segment = [], first
        while not visited[segment]:
            visited[segment] = 1
            ring.append(segment)
            # Left turn first: where two set pixels touch diagonally it crosses over to the other one.
            kind, key = kinds[segment], end_keys[segment]
            segment = segment_at.get(((kind + 3) % 4, key))
            if segment is None:
                segment = segment_at[(kind + 1) % 4, key]
        rings.append(starts[ring].astype(np.float64))
    return rings


def corners(mask: np.ndarray) -> int:
    """How many vertices the rings of `trace` have in all, without tracing."""
    padded = np.pad(np.asarray(mask, np.uint8), 1)
    around = padded[:-1, :-1] + padded[1:, :-1] + padded[:-1, 1:] + padded[1:, 1:]  # pixels set, of the four at each point
    touching = (around == 2) & (padded[:-1, :-1] == padded[1:, 1:])
    return int(np.count_nonzero(around & 1) + 2 * np.count_nonzero(touching))


def _runs(edges):
    """The runs of True along the rows of a bool [L, N]: row, first, last + 1 of each run."""
    padded = np.zeros((edges.shape[0], edges.shape[1] + 2), bool)
    padded[:, 1:-1] = edges
    line, first = np.nonzero(padded[:, 1:] & ~padded[:, :-1])
    return line, first, np.nonzero(padded[:, :-1] & ~padded[:, 1:])[1]


def simplify(
    rings: list[np.ndarray], max_edges: int, min_iou: float = 0.99, tolerance: float = 0.0
) -> tuple[list[np.ndarray], float]:
    """Fewer vertices, the same area: returns the rings and their IoU with the originals.

    Repeatedly replaces two neighbouring vertices by one such that the area stays the same, cheapest displacement first
    (Kronenfeld et al., "Simplification of polylines by segment collapse: minimizing areal displacement while preserving
    area", 2020): a staircase becomes the line through its middle, not along its inner or outer corners.

    It goes on until at most `max_edges` vertices are left, whatever that costs, and then, for the staircase of a traced
    mask, as long as the boundary has moved by at most `tolerance` (pixels, mean) and the IoU is at least `min_iou`.
    Whole rings, the smallest first, go only where triangles alone would be too many. The IoU is a lower bound from the
    displaced areas if that is at least `min_iou`, and is measured otherwise.
    """
    area = abs(sum(map(shoelace, rings)))
    perimeter = sum(float(np.hypot(*(np.roll(ring, -1, axis=0) - ring).T).sum()) for ring in rings)
    # With equal areas A and a symmetric difference of D the IoU is (A - D / 2) / (A + D / 2).
    budget = min(2 * area * (1 - min_iou) / (1 + min_iou), tolerance * perimeter)
    kept, displaced = _collapse(_largest(rings, max_edges // 3), max_edges, budget)
    bound = (area - displaced / 2) / (area + displaced / 2) if area else 0.0
    if len(kept) == len(rings) and bound >= min_iou:
        return kept, bound
    return kept, iou(kept, rings)


def _largest(rings, count):
    order = sorted(range(len(rings)), key=lambda i: -abs(shoelace(rings[i])))
    return [rings[i] for i in sorted(order[:count])]


def _collapse(rings, max_edges, budget):
    """Collapses segments until `max_edges` vertices are left and the next would displace more than `budget` in sum."""
    points, following, previous = [], [], []
    for ring in rings:
        base, count = len(points), len(ring)
        points += ring.tolist()
        following += [base + (i + 1) % count for i in range(count)]
        previous += [base + (i - 1) % count for i in range(count)]
    remaining = [len(ring) for ring in rings for _ in ring]  # kept at the first vertex of each ring
    ring_of = [first for first, ring in zip(_offsets(rings), rings, strict=True) for _ in ring]
    alive = [True] * len(points)
    version = [0] * len(points)

    def candidate(b):
        """The collapse of the segment from vertex b to the one after it."""
        c = following[b]
        cost, x, y = _merged_vertex(points[previous[b]], points[b], points[c], points[following[c]])
        return cost, b, version[b], x, y

    heap = [candidate(b) for b in range(len(points)) if remaining[ring_of[b]] > 3]
    heapq.heapify(heap)
    total, displaced = len(points), 0.0
    while heap:
        cost, b, stamp, x, y = heapq.heappop(heap)
        first = ring_of[b]
        if not alive[b] or stamp != version[b] or remaining[first] <= 3:
            continue
        if cost == math.inf or (total <= max_edges and displaced + cost > budget):
            break
        c = following[b]
        points[b] = [x, y]
        following[b] = following[c]
        previous[following[c]] = b
        alive[c] = False
        remaining[first] -= 1
        total -= 1
        displaced += cost
        # The segments whose collapse looks at the new vertex: two before it, and the one that it starts with the next.
        at = previous[previous[b]]
        for _ in range(4):
            version[at] += 1
            heapq.heappush(heap, candidate(at))
            at = following[at]
    firsts = zip(_offsets(rings), rings, strict=True)
    return [np.array([points[i] for i in range(first, first + len(ring)) if alive[i]]) for first, ring in firsts], displaced


def _offsets(rings):
    return np.cumsum([0] + [len(ring) for ring in rings[:-1]]).tolist()


def _merged_vertex(a, b, c, d):
    """The vertex E for which a-E-d encloses what a-b-c-d does: (area that it displaces, x, y of E)."""
    # Relative to a. Cross products with d are heights over the line a-d, times |d|; E lies at `height`, twice the area.
    ax, ay = a
    bx, by, cx, cy, dx, dy = b[0] - ax, b[1] - ay, c[0] - ax, c[1] - ay, d[0] - ax, d[1] - ay
    height_b, height_c = bx * dy - by * dx, cx * dy - cy * dx
    height = bx * cy - by * cx + height_c
    # E goes onto the line a-b or c-d, whichever leaves less displaced: that of the farther vertex if b and c lie on one
    # side, else that of the vertex on the side of E.
    onto_ab = height * height_b > 0 if height_b * height_c < 0 else abs(height_b) >= abs(height_c)
    if not onto_ab:
        bx, by, cx, cy, dx, dy = cx - dx, cy - dy, bx - dx, by - dy, -dx, -dy
        height, height_b = -height, -height_c
        ax, ay = d
    flat = 1e-12 * (dx * dx + dy * dy + bx * bx + by * by)
    level = abs(height) <= flat  # then any point of a-d does: the cost is that of E at a, the choice the middle
    if level:
        ex = ey = 0.0
    elif height * height_b <= 0 or abs(height_b) <= flat:  # E would lie on the other side, or nowhere
        return math.inf, 0.0, 0.0
    else:
        ex, ey = bx * height / height_b, by * height / height_b
    # E-d crosses b-c at F; the triangles E-b-F and F-c-d are equal, and together they are what is displaced.
    ux, uy, vx, vy, wx, wy = cx - bx, cy - by, dx - ex, dy - ey, bx - ex, by - ey
    turn = vx * uy - vy * ux
    if abs(turn) <= flat:  # b, c, d and E on one line
        cost = 0.0 if abs(wx * uy - wy * ux) <= flat else math.inf
    else:
        along_ed, along_bc = (wx * uy - wy * ux) / turn, (wx * vy - wy * vx) / turn
        cost = abs(along_ed * (wx * vy - wy * vx)) if -1e-9 < along_ed < 1 + 1e-9 and -1e-9 < along_bc < 1 + 1e-9 else math.inf
    return (cost, ax + dx / 2, ay + dy / 2) if level else (cost, ax + ex, ay + ey)


def shoelace(ring: np.ndarray) -> float:
    """Signed area of a ring [V, 2]; positive for outer rings."""
    x, y = ring[:, 0] - ring[0, 0], ring[:, 1] - ring[0, 1]
    return 0.5 * float(np.dot(x[:-1], y[1:]) - np.dot(x[1:], y[:-1]))


def iou(first: list[np.ndarray], second: list[np.ndarray]) -> float:
    """IoU of the regions of two instances, from rasters with about 1,000 cells along the longer side."""
    points = np.concatenate([*first, *second])
    low = points.min(axis=0)
    scale = 1000 / max(float((points.max(axis=0) - low).max()), 1e-9)
    one, two = (_raster([(ring - low) * scale for ring in rings]) for rings in (first, second))
    return float(np.count_nonzero(one & two) / max(np.count_nonzero(one | two), 1))


def _raster(rings, size=1001):
    region = np.zeros((size, size), bool)
    for outer in (True, False):
        polygons = [ring.ravel().tolist() for ring in rings if (shoelace(ring) >= 0) == outer]
        if polygons:
            region ^= coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(polygons, size, size))).astype(bool)
    return region
