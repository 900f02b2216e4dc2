"""Run an exported PolarMask .tflite file: an image in, polygons out, in pixels of that image.

This file stands alone (NumPy, Pillow and ai-edge-litert; no TensorFlow) and is copied beside every exported model:

    pip install numpy pillow ai-edge-litert
    python lite.py model.tflite image.jpg

Coordinates are continuous, x right, y down; pixel (0, 0) covers [0, 1) x [0, 1).
"""

import argparse
import json
import sys
import warnings
import zipfile

import numpy as np


def read_image(source):
    """Path or binary file -> uint8 [height, width, 3] RGB, as decoded: EXIF rotation is not applied, alpha is dropped.

    16-bit gray keeps its high byte, as TensorFlow's PNG decoder does. Raises ValueError, in one line, for no image.
    """
    from PIL import Image, UnidentifiedImageError

    name = source if isinstance(source, str) or hasattr(source, "__fspath__") else "the image"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow still raises for an image of more than 179 megapixels
            with Image.open(source) as image:
                if image.mode == "F":
                    raise ValueError("floating-point pixels; save it with 8 or 16 bits a channel")
                if image.mode.startswith("I"):
                    gray = np.clip(np.asarray(image), 0, 65535) >> 8
                    return np.repeat(gray.astype(np.uint8)[..., None], 3, axis=-1)
                return np.array(image.convert("RGB"))
    except UnidentifiedImageError:
        raise ValueError(f"{name}: not an image that Pillow can read") from None
    except OSError as error:
        raise ValueError(f"{name}: cannot read the image: {error.strerror or error}") from None
    except Exception as error:  # broken files make Pillow's decoders raise nearly any type
        raise ValueError(f"{name}: cannot read the image: {' '.join(str(error).split())}") from None


def check_image(image):
    """Raises ValueError unless image is a uint8 array [height, width, 3] of at least one pixel."""
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        got = f"{image.dtype} {list(image.shape)}" if isinstance(image, np.ndarray) else type(image).__name__
        raise ValueError(f"an image must be a uint8 array [height, width, 3] in RGB, not {got}")
    if image.size == 0:
        raise ValueError(f"the image {list(image.shape)} has no pixels")


def place(image, filled, canvas):
    """Resize a uint8 [h, w, 3] image to `filled` (height, width), at the top left of zeros of size `canvas`.

    Returns (canvas uint8, (canvas pixels -> x factor, canvas pixels -> y factor) back to the image's pixels).
    """
    from PIL import Image

    placed = np.zeros((*canvas, 3), np.uint8)
    placed[: filled[0], : filled[1]] = Image.fromarray(image).resize(filled[::-1], Image.Resampling.BILINEAR)
    return placed, (image.shape[1] / filled[1], image.shape[0] / filled[0])


def letterbox(image, height, width, stretch=False):
    """Fit a uint8 [h, w, 3] image into [height, width, 3], its ratio kept, or lost if `stretch`; see `place`."""
    scale = min(height / image.shape[0], width / image.shape[1])
    filled = tuple(max(1, round(side * scale)) for side in image.shape[:2])
    return place(image, (height, width) if stretch else filled, (height, width))


def unpack(outputs, row, scale_x, scale_y, height, width):
    """One image's valid detections from the exported tensors (batch index `row`), clipped to [0, width] x [0, height].

    The normalised coordinates times (scale_x, scale_y) are the image's pixels.
    """
    count = int(outputs["num_detections"][row])
    polygons = outputs["detection_polygons"][row][:count] * np.float32([scale_x, scale_y])
    boxes = outputs["detection_boxes"][row][:count][:, [1, 0, 3, 2]] * np.float32([scale_x, scale_y] * 2)
    return {
        "scores": np.array(outputs["detection_scores"][row][:count]),
        "classes": np.array(outputs["detection_classes"][row][:count]),
        "boxes": np.clip(boxes, 0, np.float32([width, height] * 2)),
        "polygons": np.clip(polygons, 0, np.float32([width, height])),
    }


class PolarMaskLite:
    """model(image) -> {"scores" [M] descending, "classes" [M] int, "boxes" [M, 4], "polygons" [M, rays, 2]}.

    Boxes are xmin, ymin, xmax, ymax and polygons x, y in pixels of the image passed in, clipped to it. The image is a
    uint8 RGB array [h, w, 3] of any size, or a path. `labels[classes[i]]` is the i-th name. Raises ValueError, in one
    line, for a file that is not an exported PolarMask model and for an image that cannot be used.
    """

    def __init__(self, path, threads=1):
        from ai_edge_litert.interpreter import Interpreter

        try:
            with open(path, "rb") as file:
                if file.read(8)[4:] != b"TFL3":
                    raise ValueError(f"{path}: not a TFLite model")
        except OSError as error:
            raise ValueError(f"{path}: cannot read the model: {error.strerror or error}") from None
        try:
            with zipfile.ZipFile(path) as archive:
                self.metadata = json.loads(archive.read("metadata.json"))
            self.classes = self.metadata["classes"]
            self.labels = [entry["name"] for entry in self.classes]
            self.input_size = tuple(int(self.metadata["input"][side]) for side in ("height", "width"))
            self._stretch = {"letterbox": False, "stretch": True}[self.metadata["input"].get("resize", "letterbox")]
        except (zipfile.BadZipFile, KeyError, TypeError, ValueError):
            raise ValueError(f"{path}: no usable metadata.json in it; export it with `polarmask export`") from None
        try:
            self._run = Interpreter(model_path=str(path), num_threads=threads).get_signature_runner("serving_default")
        except (ValueError, RuntimeError) as error:
            raise ValueError(f"{path}: LiteRT cannot load it: {' '.join(str(error).split())[:300]}") from None

    def __call__(self, image):
        image = image if isinstance(image, np.ndarray) else read_image(image)
        check_image(image)
        canvas, (back_x, back_y) = letterbox(image, *self.input_size, self._stretch)
        return unpack(self._run(images=canvas[None]), 0, canvas.shape[1] * back_x, canvas.shape[0] * back_y, *image.shape[:2])


def main(argv=None):
    """Print label, score, box and polygon, one line a detection."""
    parser = argparse.ArgumentParser(description="Polygons in an image, by an exported PolarMask .tflite file.")
    parser.add_argument("model", help="the .tflite file")
    parser.add_argument("image", help="any image that Pillow reads")
    parser.add_argument("--score", type=float, default=0.3, help="least score to print (default 0.3)")
    args = parser.parse_args(argv)
    try:
        model = PolarMaskLite(args.model)
        found = model(args.image)
    except (ImportError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for score, label, box, polygon in zip(*(found[k] for k in ("scores", "classes", "boxes", "polygons")), strict=True):
        if score >= args.score:
            points = (f"{x:.1f},{y:.1f}" for x, y in polygon)
            print(model.labels[label], f"{score:.3f} box", *(f"{v:.1f}" for v in box), "polygon", *points)
    return 0


if __name__ == "__main__":
    sys.exit(main())
