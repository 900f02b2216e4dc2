"""What a predictor finds in one image: arrays, and from them masks, a picture, what other programs read."""

from __future__ import annotations

import dataclasses
import os
import typing
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from polarmask_tf import lite
from polarmask_tf.data import pictures, windows
from polarmask_tf.errors import InputError, counted, did_you_mean, nfc
from polarmask_tf.inference import coco_metrics, formats, visualize


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Detections:
    """What was found in one image; M instances by descending score, in pixels of that image and clipped to it."""

    scores: np.ndarray  # float32 [M]
    classes: np.ndarray  # int32 [M], 0-based index into `categories`
    boxes: np.ndarray  # float32 [M, 4]: xmin, ymin, xmax, ymax
    polygons: np.ndarray  # float32 [M, rays, 2]: x, y
    categories: typing.Sequence[dict] = ()  # {"name", "category_id"} of each class the model knows
    image_size: tuple[int, int] = (0, 0)  # height, width
    source: typing.Any = None  # the image, as the predictor was given it
    bit_depth: int | None = None  # that the predictor read it with

    def __len__(self) -> int:
        return len(self.scores)

    def __repr__(self) -> str:
        if not len(self):
            return "no detections"
        kinds = ", ".join(f"{count} {lite.one_line(name, 40)}" for name, count in Counter(self.names).most_common(5))
        more = ", ..." if len({*self.names}) > 5 else ""
        return f"{counted(len(self), 'detection')}: {kinds}{more}; best {float(self.scores.max()):.2f}"

    @property
    def names(self) -> list[str]:
        """The class name of each detection."""
        known = len(self.categories)
        return [self.categories[i]["name"] if i < known else f"class {i}" for i in self.classes.tolist()]

    def above(self, score: float | typing.Sequence[float]) -> Detections:
        """Those of at least this score; or of the score for their class, of a list of one for each."""
        kept = self.scores >= (score if np.ndim(score) == 0 else np.asarray(score)[self.classes])
        rows = {name: getattr(self, name)[kept] for name in lite.FOUND}
        return dataclasses.replace(self, **rows)

    def only(self, names: typing.Iterable[str]) -> Detections:
        """Those of these classes; InputError for a name that none of the classes has."""
        kept = np.isin(self.classes, class_indices(self.categories, names))
        return dataclasses.replace(self, **{name: getattr(self, name)[kept] for name in lite.FOUND})

    def rles(self) -> list[dict]:
        """Their masks as compressed COCO RLEs, {"size": [height, width], "counts": str}."""
        return coco_metrics.polygons_to_rle(self.polygons, *self.image_size)

    def masks(self) -> np.ndarray:
        """bool [M, height, width], rasterised by pycocotools; M times as many bytes as the image has pixels."""
        masks = np.zeros((len(self), *self.image_size), bool)
        for mask, rle in zip(masks, self.rles(), strict=True):
            mask[:] = coco_mask.decode(rle)
        return masks

    def to_coco(self, image_id: int | str, segmentation: str = "rle") -> list[dict]:
        """COCO result dicts, with the original category ids; segmentation: "rle", or "polygon", [[x, y, x, y, ...]]."""
        if segmentation not in ("rle", "polygon"):
            raise InputError(f"segmentation is {segmentation!r}, must be 'rle' or 'polygon'")
        return coco_metrics.detections_to_results(self, image_id, self.categories, *self.image_size, segmentation)

    def to_labelme(self, image_path: str | None = None) -> dict:
        """The content of labelme's JSON file of this image; the scores are in its shapes' descriptions.

        image_path: the picture as seen from the folder that the file will lie in; default: the name of the file that the
        image was read from, InputError if it was no file.
        """
        if image_path is None:
            if not isinstance(self.source, str | os.PathLike):
                raise InputError("to_labelme: these detections are of no file; give image_path")
            image_path = Path(self.source).name
        return formats.labelme(self, image_path)

    def to_geojson(self) -> dict:
        """A GeoJSON FeatureCollection as QuPath reads it, in pixels: class, colour and measurements of each detection."""
        return formats.geojson(self)

    def to_ids(self, dtype: type = np.uint16) -> np.ndarray:
        """[height, width] of uint16 or uint32: i + 1 at the pixels of detection i, 0 where none is.

        Where several overlap it is the one of the highest score. InputError for more detections than `dtype` can number.
        """
        return formats.instance_ids(self, dtype)

    def measurements(self) -> list[dict]:
        """A dict each, ready for csv or pandas, in pixels of the image: index (from 1, as in `to_ids`), class, score, area,
        centroid_x, centroid_y, xmin, ymin, width, height, perimeter, major_axis, minor_axis, orientation (degrees from +x
        towards +y), circularity; see measure.measure."""
        return formats.measurements(self)

    def plot(self, image=None, *, fit: int | None = None) -> Image.Image:
        """The image (default: the one they were found in; a path is read again) with polygons, names and scores.

        fit: see visualize.draw. With it, the one name of a model of one class is left out.
        """
        image = self.source if image is None else image
        if image is None:
            raise InputError("plot: these detections do not know their image; give it")
        labels = [""] * len(self) if fit and len(self.categories) == 1 else self.names
        colors = visualize.colors_for(self.classes, len(self.categories))
        pixels = windows.whole(image, self.bit_depth)
        # A large picture is shown smaller, see windows.whole.
        scale = np.divide(pixels.shape[1::-1], self.image_size[::-1], dtype=np.float32) if any(self.image_size) else 1
        return visualize.draw(pixels, list(self.polygons * scale), labels, self.scores, colors, fit=fit)

    def save(self, path: str | os.PathLike, image=None) -> None:
        """Writes `plot` to a picture file of the kind that its name says, PNG if it says none; InputError if it cannot."""
        visualize.save(self.plot(image), path)


def class_indices(categories: typing.Sequence[dict], names: typing.Iterable[str]) -> list[int]:
    """Indices of the classes of these names; InputError, with the known names, for one that no class has."""
    names = [names] if isinstance(names, str) else names  # and not its letters
    known, names = [nfc(entry["name"]) for entry in categories], list(map(nfc, names))
    if unknown := [name for name in names if name not in known]:
        others = ", ".join(known[:20]) + (", ..." if len(known) > 20 else "")
        hint = did_you_mean(unknown[0], known)
        raise InputError(f"no class {', '.join(map(repr, unknown))}; this model's are: {others}{hint}")
    return [index for index, name in enumerate(known) if name in {*names}]


def read_image(image, **options) -> np.ndarray:
    """A path, bytes, a binary file, a PIL.Image or an array of pixels -> uint8 [h, w, 3] RGB; see lite.read_image.

    Raises InputError for what is no image.
    """
    if image is None:
        raise InputError("the image is None, which cv2.imread gives for a file that it cannot read")
    try:
        if not isinstance(image, np.ndarray):
            given, image = image, lite.read_image(image, **options)
            if options.get("notes") is not None and isinstance(given, (str, os.PathLike, bytes)):
                options["notes"] += pictures.left_out(given)
        lite.check_image(image)
    except ValueError as error:
        raise InputError(str(error)) from None
    return image
