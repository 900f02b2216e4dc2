"""Pictures of `polarmask check`: image, mask, polygon rebuilt from rays, and the locations that learn it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from pycocotools import mask as coco_mask

from polarmask_tf.config import Config
from polarmask_tf.data.dataset import DatasetInfo
from polarmask_tf.files import atomic_write
from polarmask_tf.inference import html, visualize

HEADS = ("image", "mask", "polygons from rays", "center samples")
PAGE_IMAGES = 200  # most pictures of a page, of which each takes about 60 kB
PAGE_SIDE = 360
_STYLE = """
section{scroll-margin-top:12px;border-top:1px solid #e4e2dc;padding:12px 0}
body{max-width:1560px}.row{gap:10px;flex-wrap:nowrap}.row figure{flex:1 1 0;min-width:0}img{height:auto}
nav{font-size:14px}nav a{margin-right:14px}
"""


def bounds(rings) -> tuple[np.ndarray, np.ndarray]:
    """Least and greatest x, y of an object's rings [V, 2] each."""
    points = np.concatenate(rings)
    return points.min(axis=0), points.max(axis=0)


class Pages:
    """Draws images of a data set as they come, spread evenly over it."""

    def __init__(self, config: Config, info: DatasetInfo, preview: int, page: bool, limit: int | None):
        self.config, self.info = config, info
        count = min(info.num_images, limit or info.num_images)

        def spread(number):
            return {*np.linspace(0, count - 1, min(number, count)).round().astype(int).tolist()} if number else set()

        self.in_sheet, self.in_page = spread(preview), spread(PAGE_IMAGES * page)
        self.number = 0
        self.cells: list[tuple] = []
        self.sections: list[tuple[str, str, int]] = []  # name, HTML, objects that no location learns

    def wants(self, number: int) -> bool:
        """Whether the image of that number, from 0 on, is to be added."""
        self.number = number
        return number in self.in_sheet or number in self.in_page

    def add(self, name: str, pixels: np.ndarray, image: dict, polygons, place, lost: int) -> None:
        """`image` as ceiling.read gives it; polygons [K, n, 2] rebuilt; `place` a check_locations.Place."""
        caption = f"{name}: {len(image['annotations'])} objects" + (f", {lost} learned by no location" if lost else "")
        for numbers, side in ((self.in_sheet, visualize.SHEET_SIDE), (self.in_page, PAGE_SIDE)):
            if self.number not in numbers:
                continue
            pictures = self._draw(pixels, image, polygons, place, side)
            if numbers is self.in_sheet:
                self.cells.append((*pictures, caption))
            else:
                row = "".join(html.picture(p, head, 80) for p, head in zip(pictures, HEADS, strict=True))
                self.sections.append((caption, f"<div class=row>{row}</div>", lost))

    def _draw(self, pixels, image, polygons, place, side) -> list[Image.Image]:
        labels = [annotation["label"] for annotation in image["annotations"]]
        names = [self.info.classes[label]["name"] if len(self.info.classes) > 1 else "" for label in labels]
        colors = visualize.colors_for(labels, len(self.info.classes))
        # Not all masks of a large picture at once, at its size.
        step = max(1, max(pixels.shape[:2]) // side)
        masks = [coco_mask.decode(annotation["rle"])[::step, ::step].astype(bool) for annotation in image["annotations"]]
        plain = visualize.draw(pixels, [], fit=side)
        outlines = visualize.draw(pixels, [annotation["rings"] for annotation in image["annotations"]], colors=colors, fit=side)
        pen, scale = ImageDraw.Draw(outlines), side / max(pixels.shape[:2])
        lowest = self.config.model.fpn.levels[0]
        for point, owner, level in zip(place.points.tolist(), place.owners.tolist(), place.levels.tolist(), strict=True):
            x, y, r = point[0] * scale, point[1] * scale, 1.5 + level - lowest  # a larger dot for a coarser level
            pen.ellipse((x - r, y - r, x + r, y + r), fill=colors[owner], outline=(255, 255, 255))
        drawn = visualize.draw(np.ascontiguousarray(pixels[::step, ::step]), masks, names, colors=colors, fit=side)
        rebuilt = visualize.draw(pixels, list(polygons.astype(np.float64)), fit=side)
        return [plain, drawn, rebuilt, outlines]

    def write(self, out: Path, warnings: list[str]) -> list[Path]:
        """check.png and check.html, as far as they were asked for; where they are."""
        written = []
        if self.cells:
            title = f"{self.info.name}: {len(self.cells)} of {self.info.num_images} images"
            visualize.save(visualize.sheet(self.cells, heads=HEADS, title=title), out / "check.png")
            written.append(out / "check.png")
        if self.sections:
            atomic_write(out / "check.html", self._page(warnings))
            written.append(out / "check.html")
        return written

    def _page(self, warnings) -> str:
        count, size = len(self.sections), list(self.config.data.size)
        about = f"{count} of {self.info.num_images} images, as a network sees them at data.size {size}"
        lost = [f'<a href="#p{k}">{html.text(name)}</a>' for k, (name, _, lost) in enumerate(self.sections) if lost]
        body = [
            f"<h1>{html.text(self.info.name)}</h1>",
            f"<p class=quiet>{html.text(about)}. A dot: a location that learns an object; large: of a coarse level.</p>",
            *(f"<p class=bad>{html.text(line)}</p>" for line in warnings),
            f"<p>Not all is learned in: {', '.join(lost)}</p>" if lost else "",
        ]
        for k, (caption, row, _) in enumerate(self.sections):
            links = f'<a href="#p{max(k - 1, 0)}">previous</a><a href="#p{min(k + 1, count - 1)}">next</a>'
            heading = f"<nav>{links} {k + 1} of {count}: {html.text(caption)}</nav>"
            body.append(f"<section id=p{k}>{heading}{row}</section>")
        return html.page(f"{self.info.name}: check", body, _STYLE)
