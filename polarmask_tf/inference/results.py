"""What a predictor finds in one image: arrays, and from them masks, a picture, COCO dicts."""

from __future__ import annotations

import dataclasses
import os
import typing
from collections import Counter

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from polarmask_tf import lite
from polarmask_tf.data import windows
from polarmask_tf.errors import InputError
from polarmask_tf.inference import coco_metrics, visualize


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

    def __len__(self) -> int:
        return len(self.scores)

    def __repr__(self) -> str:
        if not len(self):
            return "no detections"
        kinds = ", ".join(f"{count} {lite.one_line(name, 40)}" for name, count in Counter(self.names).most_common(5))
        more = ", ..." if len({*self.names}) > 5 else ""
        return f"{len(self)} detection{'s' * (len(self) > 1)}: {kinds}{more}; best {float(self.scores.max()):.2f}"

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

    def rles(self) -> list[dict]:
        """Their masks as compressed COCO RLEs, {"size": [height, width], "counts": str}."""
        return coco_metrics.polygons_to_rle(self.polygons, *self.image_size)

    def masks(self) -> np.ndarray:
        """bool [M, height, width], rasterised by pycocotools; M times as many bytes as the image has pixels."""
        masks = np.zeros((len(self), *self.image_size), bool)
        for mask, rle in zip(masks, self.rles(), strict=True):
            mask[:] = coco_mask.decode(rle)
        return masks

    def to_coco(self, image_id: int | str) -> list[dict]:
        """COCO result dicts, with the original category ids."""
        return coco_metrics.detections_to_results(self, image_id, self.categories, *self.image_size)

    def plot(self, image=None, *, fit: int | None = None) -> Image.Image:
        """The image (default: the one they were found in; a path is read again) with polygons, names and scores.

        fit: see visualize.draw. With it, the one name of a model of one class is left out.
        """
        image = self.source if image is None else image
        if image is None:
            raise InputError("plot: these detections do not know their image; give it")
        labels = [""] * len(self) if fit and len(self.categories) == 1 else self.names
        colors = visualize.colors_for(self.classes, len(self.categories))
        pixels = windows.whole(image)
        # A large picture is shown smaller, see windows.whole.
        scale = np.divide(pixels.shape[1::-1], self.image_size[::-1], dtype=np.float32) if any(self.image_size) else 1
        return visualize.draw(pixels, list(self.polygons * scale), labels, self.scores, colors, fit=fit)

    def save(self, path: str | os.PathLike, image=None) -> None:
        """Writes `plot` to a picture file of the kind that its name says, PNG if it says none; InputError if it cannot."""
        visualize.save(self.plot(image), path)


def read_image(image, **options) -> np.ndarray:
    """A path, bytes, a binary file, a PIL.Image or an array of pixels -> uint8 [h, w, 3] RGB; see lite.read_image.

    Raises InputError for what is no image.
    """
    try:
        image = image if isinstance(image, np.ndarray) else lite.read_image(image, **options)
        lite.check_image(image)
    except ValueError as error:
        raise InputError(str(error)) from None
    return image
