"""Draws docs/pictures/: rays, center samples, centerness, NMS and what polygons of rays cannot hold, by the package's own code.

python scripts/docs_pictures.py [FOLDER]
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import tensorflow as tf
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image, ImageChops, ImageDraw

import polarmask_tf as pm
from polarmask_tf.data.instances import make_instances
from polarmask_tf.ops import geometry, postprocess, targets

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "pictures"
SIDE = 128  # pixels of the drawn scene
FINE = 8  # masks are compared on a grid so many times finer
FILL, LINE, HIT, MISS = "#cfe3f5", "#1f5f99", "#d9480f", "#b8c0c8"


def wavy(x, y, radius, waves=(), turn=0.0, stretch=1.0, vertices=120) -> np.ndarray:
    """Outline [vertices, 2] of a circle with `waves` of (number, part of the radius), stretched along x and turned."""
    angle = np.linspace(0, 2 * np.pi, vertices, endpoint=False)
    length = radius * (1 + sum(part * np.sin(number * angle + number) for number, part in waves))
    points = np.stack([length * np.cos(angle) * stretch, length * np.sin(angle) / stretch], axis=-1)
    rotation = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
    return points @ rotation + [x, y]


def star(x, y, radius, tips=5, inner=0.45) -> np.ndarray:
    angle = np.linspace(0, 2 * np.pi, 2 * tips, endpoint=False) - np.pi / 2
    length = np.where(np.arange(2 * tips) % 2, radius * inner, radius)
    return np.stack([x + length * np.cos(angle), y + length * np.sin(angle)], axis=-1)


def letter_c(x, y, radius, width) -> np.ndarray:
    angle = np.linspace(0.7, 2 * np.pi - 0.7, 60)
    arcs = [np.stack([x + r * np.cos(angle), y + r * np.sin(angle)], axis=-1) for r in (radius, radius - width)]
    return np.concatenate([arcs[0], arcs[1][::-1]])


def mask(rings) -> np.ndarray:
    """What rings [V, 2] cover by the even-odd rule, on the fine grid."""
    whole = Image.new("1", (SIDE * FINE, SIDE * FINE))
    for ring in rings:
        one = Image.new("1", whole.size)
        ImageDraw.Draw(one).polygon([tuple(point) for point in np.asarray(ring) * FINE], fill=1)
        whole = ImageChops.logical_xor(whole, one)
    return np.asarray(whole)


def iou(first: np.ndarray, second: np.ndarray) -> float:
    return (first & second).sum() / (first | second).sum()


def encoded(shapes, *, rays=36, levels=(3,), ranges=()) -> tuple[dict, targets.Targets]:
    """(instances, targets) of shapes, each a list of rings, as training makes them."""
    config = pm.load_config("shapes", [f"data.size=[{SIDE},{SIDE}]", f"model.fpn.levels={list(levels)}", "targets.ranges=[]"])
    objects = {"classes": np.zeros(len(shapes), int), "polygons": shapes}
    instances = make_instances(objects, (SIDE, SIDE), config, max_edges=256)
    batch = {name: tf.constant(value)[tf.newaxis] for name, value in instances.items()}
    made = targets.encode(batch, rays=rays, levels=levels, size=(SIDE, SIDE), ranges=ranges)
    return batch, made


def rebuilt(shape, rays: int) -> tuple[np.ndarray, np.ndarray]:
    """(center [2], polygon [rays, 2]) from the mass center of a shape's largest part."""
    instances, _ = encoded([shape], rays=rays)
    center, edges = instances["centers"][0, :1], instances["edges"][0, :1]
    lengths = geometry.ray_lengths(center, edges, rays)
    return center[0].numpy(), geometry.assemble(center, lengths)[0].numpy()


def panels(count: int, height: float = 3.0, width: float | None = None):
    figure = Figure(figsize=(width or 3 * count, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = np.atleast_1d(figure.subplots(1, count))
    for axis in axes:
        axis.set(aspect="equal", xlim=(0, SIDE), ylim=(SIDE, 0), xticks=[], yticks=[])
    return figure, axes


def fill(axis, rings, color=FILL, edge=LINE, **options) -> None:
    shape = np.concatenate([np.concatenate([ring, ring[:1], [[np.nan, np.nan]]]) for ring in rings])
    for ring, paint in zip(rings, [color, *["white"] * len(rings)], strict=False):
        axis.fill(*np.asarray(ring).T, color=paint, linewidth=0)
    axis.plot(*shape.T, color=edge, linewidth=1, **options)


def outline(axis, polygon, color=HIT, width=1.5, **options) -> None:
    axis.plot(*np.concatenate([polygon, polygon[:1]]).T, color=color, linewidth=width, **options)


def rays_picture() -> Figure:
    """One object by more and more rays."""
    shape = [wavy(64, 66, 42, [(2, 0.18), (5, 0.12)], turn=0.5)]
    figure, axes = panels(4)
    for axis, rays in zip(axes, (8, 18, 36, 72), strict=True):
        center, polygon = rebuilt(shape, rays)
        fill(axis, shape)
        for tip in polygon:
            axis.plot(*np.stack([center, tip]).T, color=MISS, linewidth=0.6)
        outline(axis, polygon)
        axis.plot(*center, "o", color=HIT, markersize=4)
        axis.set_title(f"{rays} rays: IoU {iou(mask(shape), mask([polygon])):.3f}", fontsize=10)
    return figure


def samples_picture() -> Figure:
    """Which locations of two levels learn which object."""
    shapes = [[star(27, 30, 20)], [wavy(82, 80, 36, [(3, 0.15)])]]
    instances, made = encoded(shapes, levels=(3, 4), ranges=(48,))
    labels, first = made.labels[0].numpy(), 0
    figure, axes = panels(2, height=4.2, width=8)
    for axis, level in zip(axes, (3, 4), strict=True):
        where = geometry.locations(SIDE, SIDE, 2**level).numpy()
        positive = labels[first : first + len(where)] >= 0
        first += len(where)
        for shape in shapes:
            fill(axis, shape)
        axis.plot(*where[~positive].T, ".", color=MISS, markersize=3)
        axis.plot(*where[positive].T, "o", color=HIT, markersize=5)
        axis.plot(*instances["centers"][0, : len(shapes)].numpy().T, "+", color="black", markersize=9)
        axis.set_title(f"level P{level}: a location every {2**level} pixels", fontsize=10)
    return figure


def centerness_picture() -> Figure:
    """Polar centerness beside what a polygon from there can reach, over a round and a long object."""
    shapes = [[wavy(64, 34, 26, [(3, 0.08)])], [wavy(64, 96, 20, stretch=2.4, turn=0.15)]]
    points = geometry.locations(SIDE, SIDE, 2)
    maps = {title: np.full(len(points), np.nan) for title in ("polar centerness", "IoU that a polygon from there can reach")}
    for shape in shapes:
        instances, _ = encoded([shape])
        edges = instances["edges"][0, :1]
        inside = np.flatnonzero(geometry.contains(edges, points).numpy())
        lengths = geometry.ray_lengths(tf.gather(points, inside), tf.repeat(edges, len(inside), axis=0), 36)
        maps["polar centerness"][inside] = geometry.polar_centerness(lengths).numpy()
        whole = mask(shape)
        polygons = geometry.assemble(tf.gather(points, inside), lengths).numpy()
        maps["IoU that a polygon from there can reach"][inside] = [iou(whole, mask([polygon])) for polygon in polygons]
    figure, axes = panels(2, height=4.2, width=8.6)
    for axis, (title, values) in zip(axes, maps.items(), strict=True):
        side = SIDE // 2  # locations in a row
        shown = axis.imshow(values.reshape(side, side), extent=(0, SIDE, SIDE, 0), vmin=0, vmax=1, cmap="viridis")
        for shape in shapes:
            outline(axis, shape[0], color=LINE, width=1)
        axis.set_title(title, fontsize=10)
    figure.colorbar(shown, ax=list(axes), shrink=0.8)
    return figure


def nms_picture(seed: int = 0) -> Figure:
    """What the head says at every positive location, and what NMS leaves: exact rays with noise, scored by centerness."""
    random = np.random.default_rng(seed)
    shapes = [[wavy(34, 40, 22, [(3, 0.12)])], [wavy(88, 44, 26, [(2, 0.15)])], [wavy(62, 98, 22, [(4, 0.1)])]]
    _, made = encoded(shapes)
    where, rays = made.positives[:, 1].numpy(), made.rays.numpy()
    noisy = rays * np.exp(random.normal(0, 0.06, rays.shape))
    cells, score = (SIDE // 8) ** 2, made.centerness.numpy()
    logits = np.full((cells, 1), -9.0, np.float32)
    logits[where, 0] = np.log(score / (1 - score + 1e-6))
    lengths = np.zeros((cells, 36), np.float32)
    lengths[where] = np.log(noisy)
    grid = (SIDE // 8, SIDE // 8)
    outputs = {
        "class_logits": tf.fill([*grid, 1], 9.0),
        "centerness_logits": tf.reshape(logits, [*grid, 1]),
        "ray_logits": tf.reshape(lengths, [*grid, 36]),
    }
    settings = {"score_threshold": 0.3, "pre_nms_top_k": 200, "max_detections": 50, "multi_label": False}
    figure, axes = panels(2, height=4.2, width=8)
    for axis, threshold in zip(axes, (1.0, 0.5), strict=True):
        found = postprocess.detect({3: outputs}, (SIDE, SIDE), {3: 1.0}, nms_iou_threshold=threshold, **settings)
        count = int(found["num_detections"])
        for shape in shapes:
            fill(axis, shape)
        for polygon, score in zip(found["detection_polygons"][:count] * SIDE, found["detection_scores"][:count], strict=True):
            outline(axis, polygon.numpy(), width=1)
            if threshold < 1:
                axis.text(*polygon.numpy().mean(axis=0), f"{score:.2f}", ha="center", va="center", fontsize=10)
        axis.set_title(f"{count} polygons" + (" before NMS" if threshold == 1 else ": the best of each object"), fontsize=10)
    return figure


def limits_picture() -> Figure:
    """What 36 rays make of shapes that they cannot hold."""
    shapes = {
        "long and thin": [wavy(64, 64, 14, stretch=3.8, turn=0.4)],
        "a C": [letter_c(64, 64, 46, 22)],
        "a hole": [wavy(64, 64, 46), wavy(64, 64, 26)],
        "two parts": [wavy(36, 60, 30, [(3, 0.1)]), wavy(102, 76, 19, [(2, 0.1)])],
    }
    figure, axes = panels(4)
    for axis, (name, shape) in zip(axes, shapes.items(), strict=True):
        center, polygon = rebuilt(shape, 36)
        if name == "two parts":
            for ring in shape:
                fill(axis, [ring])
        else:
            fill(axis, shape)
        outline(axis, polygon)
        axis.plot(*center, "o", color=HIT, markersize=4)
        axis.set_title(f"{name}: IoU {iou(mask(shape), mask([polygon])):.2f}", fontsize=10)
    return figure


PICTURES = {
    "rays": rays_picture,
    "center_samples": samples_picture,
    "centerness": centerness_picture,
    "nms": nms_picture,
    "limits": limits_picture,
}


def main(folder: Path = FOLDER) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, make in PICTURES.items():
        make().savefig(folder / f"{name}.png", dpi=100, metadata={"Software": None})
        print(folder / f"{name}.png")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:2]))
