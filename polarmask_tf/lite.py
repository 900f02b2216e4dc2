"""Run an exported PolarMask .tflite file: an image in, polygons out, in pixels of that image.

This file stands alone (needs NumPy, Pillow, ai-edge-litert; no TensorFlow) and is copied beside every exported model:
    python lite.py model.tflite image.jpg      (or a folder of images)
Coordinates are continuous, x right, y down; pixel (0, 0) covers [0, 1) x [0, 1).
"""

import argparse
import json
import sys
import warnings
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

FOUND = ("scores", "classes", "boxes", "polygons")


def read_image(source):
    """Path or binary file -> uint8 [height, width, 3] RGB, as decoded: no EXIF rotation, no alpha, 16-bit gray's high byte."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow still raises for an image of more than 179 megapixels
            with Image.open(source) as image:
                if image.mode == "F":
                    raise ValueError("floating-point pixels; save it with 8 or 16 bits a channel")
                if image.mode.startswith("I"):
                    return np.repeat((np.clip(np.asarray(image), 0, 65535) >> 8).astype(np.uint8)[..., None], 3, axis=-1)
                return np.array(image.convert("RGB"))
    except Exception as error:  # broken files make Pillow's decoders raise nearly any type
        reason = f"cannot read the image: {getattr(error, 'strerror', None) or ' '.join(str(error).split())}"
        reason = "not an image that Pillow can read" if isinstance(error, UnidentifiedImageError) else reason
        raise ValueError(f"{source if isinstance(source, (str, Path)) else 'the image'}: {reason}") from None


def check_image(image):
    """Raises ValueError unless image is a uint8 array [height, width, 3] of at least one pixel."""
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.shape[2:] != (3,) or not image.size:
        got = f"{image.dtype} {list(image.shape)}" if isinstance(image, np.ndarray) else type(image).__name__
        raise ValueError(f"an image must be a uint8 array [height, width, 3] in RGB with pixels in it, not {got}")


def place(image, filled, canvas):
    """Image resized to `filled` (height, width), top left in zeros of size `canvas`; factors (x, y) back to its pixels."""
    placed = np.zeros((*canvas, 3), np.uint8)
    placed[: filled[0], : filled[1]] = Image.fromarray(image).resize(filled[::-1], Image.Resampling.BILINEAR)
    return placed, (image.shape[1] / filled[1], image.shape[0] / filled[0])


def letterbox(image, height, width, stretch=False):
    """Fit a uint8 [h, w, 3] image into [height, width, 3], its ratio kept, or lost if `stretch`; see `place`."""
    scale = min(height / image.shape[0], width / image.shape[1])
    filled = tuple(max(1, round(side * scale)) for side in image.shape[:2])
    return place(image, (height, width) if stretch else filled, (height, width))


def assemble(heads, raw, size):
    """From a --raw file's outputs to those of the other files: postprocess.detect in NumPy, for an image of `size`."""
    limit, one, parts = np.float32(size[::-1]), np.float32(1), []
    for level, unit in raw["ray_units"].items():
        logits, centerness, rays = (heads[f"P{level}_{name}"][0] for name in ("classes", "centerness", "rays"))
        (_, w, c), n, pairs = logits.shape, rays.shape[-1], raw["multi_label"]
        every = logits.reshape(-1, c)
        logits = every if pairs else every.max(1, keepdims=True)
        scores = (one / (one + np.exp(-logits)) / (one + np.exp(-centerness.reshape(-1, 1)))).ravel()
        best = np.argsort(-scores, kind="stable")[: raw["candidates"]]
        where, classes = np.divmod(best, c) if pairs else (best, every[best].argmax(1))
        centers = np.float32(2 ** int(level)) * (np.float32([where % w, where // w]).T[:, None] + np.float32(0.5))
        reach = np.float32(unit) * np.exp(np.clip(rays.reshape(-1, n)[where], -raw["ray_limit"], raw["ray_limit"]))
        ways = np.float32([[f(2 * np.pi * k / n) for f in (np.cos, np.sin)] for k in range(n)])
        parts.append((scores[best], classes, np.clip(centers + reach[..., None] * ways, 0, limit)))
    scores, classes, polygons = (np.concatenate(part) for part in zip(*parts, strict=True))
    boxes = np.concatenate([polygons.min(1), polygons.max(1)], 1)
    low, high = np.split(boxes + np.float32(classes[:, None] * (limit.max() + 1)), 2, 1)  # no two classes overlap
    area, kept = (high - low).prod(1), []
    for i in (i for i in np.argsort(-scores, kind="stable") if scores[i] > raw["score_threshold"]):
        common = np.maximum(np.minimum(high[kept], high[i]) - np.maximum(low[kept], low[i]), 0).prod(1)
        if len(kept) < raw["max_detections"] and not (common > raw["nms_iou"] * (area[kept] + area[i] - common)).any():
            kept.append(i)
    found = (scores, classes, boxes[:, [1, 0, 3, 2]] / np.tile(limit[::-1], 2), polygons / limit)
    return {"num_detections": [len(kept)], **{f"detection_{n}": x[kept][None] for n, x in zip(FOUND, found, strict=True)}}


def unpack(outputs, row, scale_x, scale_y, height, width):
    """Row `row`'s valid detections, of coordinates times (scale_x, scale_y), clipped to [0, width] x [0, height]."""
    scores, classes, boxes, polygons = (outputs[f"detection_{n}"][row][: int(outputs["num_detections"][row])] for n in FOUND)
    boxes = np.clip(boxes[:, [1, 0, 3, 2]] * np.float32([scale_x, scale_y] * 2), 0, np.float32([width, height] * 2))
    polygons = np.clip(polygons * np.float32([scale_x, scale_y]), 0, np.float32([width, height]))
    return {"scores": np.array(scores), "classes": np.array(classes, np.int32), "boxes": boxes, "polygons": polygons}


class PolarMaskLite:
    """model(image) -> {"scores" [M] descending, "classes" [M] int, "boxes" [M, 4], "polygons" [M, rays, 2]}.

    Boxes are xmin, ymin, xmax, ymax, polygons x, y, in pixels of the image passed in, clipped to it: a uint8 RGB array
    [h, w, 3] of any size, or a path. labels[classes[i]] is the i-th name. Raises ValueError, in one line.
    """

    def __init__(self, path, threads=1):
        from ai_edge_litert.interpreter import Interpreter

        try:
            with zipfile.ZipFile(path) as archive:
                self.metadata = json.loads(archive.read("metadata.json"))
            self.classes = self.metadata["classes"]
            self.labels = [entry["name"] for entry in self.classes]
            self.input_size = tuple(int(self.metadata["input"][side]) for side in ("height", "width"))
            self._stretch = {"letterbox": False, "stretch": True}[self.metadata["input"].get("resize", "letterbox")]
            self._run = Interpreter(model_path=str(path), num_threads=threads).get_signature_runner("serving_default")
        except (OSError, zipfile.BadZipFile, KeyError, TypeError, ValueError, RuntimeError) as error:
            reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:300]
            raise ValueError(f"{path}: no .tflite file with metadata.json, or damaged; export it again: {reason}") from None

    def __call__(self, image):
        image = image if isinstance(image, np.ndarray) else read_image(image)
        check_image(image)
        canvas, (x, y) = letterbox(image, *self.input_size, self._stretch)
        outputs, raw = self._run(images=canvas[None]), self.metadata.get("raw")
        outputs = assemble(outputs, raw, self.input_size) if raw else outputs
        return unpack(outputs, 0, canvas.shape[1] * x, canvas.shape[0] * y, *image.shape[:2])


def main(argv=None):
    """Print label, score, box and polygon, one line a detection; of a folder, the file's name before them."""
    parser = argparse.ArgumentParser(description="Polygons in an image, by an exported PolarMask .tflite file.")
    parser.add_argument("model", help="the .tflite file")
    parser.add_argument("image", type=Path, help="any image that Pillow reads, or a folder of images")
    parser.add_argument("--score", type=float, default=0.3, help="least score to print (default 0.3)")
    args = parser.parse_args(argv)
    folder, status, model = args.image.is_dir(), 0, None
    for path in sorted(args.image.iterdir()) if folder else [args.image]:
        try:
            model = model or PolarMaskLite(args.model)
            found = model(path)
        except (ImportError, ValueError) as error:  # of a folder the other images are read
            print(f"error: {error}", file=sys.stderr)
            status = 2
            continue
        for score, label, box, polygon in zip(*(found[name] for name in FOUND), strict=True):
            if score >= args.score:
                numbers = (*(f"{v:.1f}" for v in box), "polygon", *(f"{x:.1f},{y:.1f}" for x, y in polygon))
                print(*[path.name] * folder, model.labels[label], f"{score:.3f} box", *numbers)
    return status


if __name__ == "__main__":
    sys.exit(main())
