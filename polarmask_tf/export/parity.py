"""How much an exported model differs from the one it was made of, on the same images."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from pycocotools import mask as coco_mask

from polarmask_tf.files import format_table
from polarmask_tf.inference.coco_metrics import polygons_to_rle


def compare(reference: Callable, other: Callable, images: list[np.ndarray]) -> dict:
    """Runs two predictors over uint8 images of any sizes and matches their detections.

    A detection is matched with the unused one of its class whose mask overlaps it most, by IoU 0.5 at least.

    Returns:
      {"detections": of the reference, "matched": how many of them, "score": largest difference of matched scores, "boxes":
      of the sides of matched boxes, "pixels": largest distance between matched polygons' vertices; in pixels of the image}.
    """
    total = matched = 0
    score = sides = pixels = 0.0
    for image in images:
        a, b = reference([image])[0], other([image])[0]
        total += len(a.scores)
        if not len(a.scores) or not len(b.scores):
            continue
        masks = [polygons_to_rle(found.polygons, *image.shape[:2]) for found in (a, b)]
        overlap = np.array(coco_mask.iou(masks[0], masks[1], [0] * len(b.scores)))
        overlap *= a.classes[:, None] == b.classes[None]
        # Exact equals first: masks of the same few pixels have several partners of IoU 1.
        overlap -= np.abs(a.scores[:, None] - b.scores[None]) * 1e-3
        for i in range(len(a.scores)):
            j = int(np.argmax(overlap[i]))
            if overlap[i, j] < 0.5:
                continue
            overlap[:, j] = -1
            matched += 1
            score = max(score, abs(float(a.scores[i] - b.scores[j])))
            sides = max(sides, float(np.abs(a.boxes[i] - b.boxes[j]).max()))
            pixels = max(pixels, float(np.linalg.norm(a.polygons[i] - b.polygons[j], axis=-1).max()))
    return {"detections": total, "matched": matched, "score": score, "boxes": sides, "pixels": pixels}


def format_rows(rows: dict[str, dict]) -> str:
    """Rows of `compare`, by name, as text; with their APs, if they have some."""
    columns = {"against Keras": "", "detections": "", "matched": "", "score": ".2e", "boxes": ".3f", "pixels": ".3f"}
    if all("AP" in row for row in rows.values()):
        columns |= {"AP": ".4f", "keras": ".4f"}
    return format_table([{"against Keras": name, **row} for name, row in rows.items()], columns)
