"""How much an exported model differs from the one it was made of, on the same images."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from polarmask_tf.inference.coco_metrics import polygons_to_rle


def compare(reference: Callable, other: Callable, images: list[np.ndarray]) -> dict:
    """Runs two predictors over uint8 images of any sizes and matches their detections.

    A detection is matched with the unused one of its class whose mask overlaps it most, by IoU 0.5 at least.

    Returns:
      {"detections": of the reference, "matched": how many of them, "score": largest difference of matched scores, "boxes":
      of the sides of matched boxes, "pixels": largest distance between matched polygons' vertices; in pixels of the image}.
    """
    from pycocotools import mask as coco_mask

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


def format_table(rows: dict[str, dict]) -> str:
    """Rows of `compare`, by name, as text; with their APs, if they have some."""
    width = max(map(len, ("against Keras", *rows))) + 1
    measured = all("AP" in row for row in rows.values())
    head = f"{'against Keras':<{width}}{'detections':>11}{'matched':>9}{'max score diff':>16}{'boxes':>12}{'polygons':>12}"
    lines = [head + (f"{'mask AP':>9}{'Keras':>8}" if measured else "")]
    for name, row in rows.items():
        line = f"{name:<{width}}{row['detections']:>11}{row['matched']:>9}{row['score']:>16.2e}{row['boxes']:>9.3f} px"
        line += f"{row['pixels']:>9.3f} px"
        lines.append(line + (f"{row['AP']:>9.4f}{row['keras']:>8.4f}" if measured else ""))
    return "\n".join(lines)
