"""Pictures: an image with its instances, a sheet of ground truth beside prediction. NumPy and Pillow only."""

import colorsys
import functools
import math
import unicodedata
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from polarmask_tf import files
from polarmask_tf.errors import InputError, nfc

PAPER, INK, FAINT = (250, 249, 246), (32, 33, 36), (110, 110, 114)
SHEET_SIDE = 384  # longer side of a picture in a sheet
DIM = 64  # of 256 levels: a picture that nowhere is as bright looks black
LAYER_PIXELS = 8_000_000  # of what is painted at a time: a layer of a huge picture costs more than the picture
# For what Pillow's own font lacks, which is all but ASCII: fonts of Linux, macOS and Windows, looked for in their folders.
FONTS = ("DejaVuSans.ttf", "NotoSansCJK-Regular.ttc", "Arial Unicode.ttf", "PingFang.ttc", "segoeui.ttf", "msyh.ttc")


def color(index):
    """The index-th of endlessly many colours (R, G, B): neighbours differ clearly, and each is always the same."""
    hue = (0.56 + index * 0.61803398875) % 1  # golden-ratio steps never come close to a recent hue
    saturation, value = ((0.85, 0.95), (0.65, 1.0), (0.95, 0.8))[index % 3]
    return tuple(round(255 * channel) for channel in colorsys.hsv_to_rgb(hue, saturation, value))


def colors_for(classes, num_classes):
    """A colour an instance: its class's, or its own where there is only one class to tell apart."""
    return [color(int(index)) for index in (classes if num_classes > 1 else range(len(classes)))]


def _rings(shape):
    """The rings of an instance: one array [R, 2] or a list of them; those too short to be drawn are left out."""
    rings = [shape] if isinstance(shape, np.ndarray) else shape
    return [ring for ring in rings if len(ring) >= 3 and np.isfinite(ring).all()]


def _paint_rings(layer, shape, scale, top, rgb, width):
    """On a layer that begins `top` pixels below the upper edge of the picture."""
    pen = ImageDraw.Draw(layer)
    for ring in _rings(shape):
        points = [tuple(point) for point in (np.asarray(ring, np.float64) * scale - (0, top)).tolist()]
        pen.polygon(points, fill=(*rgb, 90))
        pen.line([*points, points[0], points[1]], fill=(*rgb, 255), width=width, joint="curve")


def _paint_mask(layer, mask, scale, top, rgb, width):
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return
    first, left = max(rows[0] - 1, 0), max(columns[0] - 1, 0)
    part = Image.fromarray(np.uint8(mask[first : rows[-1] + 2, left : columns[-1] + 2]) * 255)
    part = _scaled(part, scale, Image.Resampling.BILINEAR).point(lambda value: 255 * (value > 127))
    inner = part.filter(ImageFilter.MinFilter(2 * (width // 2) + 1))
    corner = (round(left * scale), round(first * scale) - top)
    layer.paste((*rgb, 255), corner, part)
    layer.paste((*rgb, 90), corner, inner)


def draw(image, shapes, labels=None, scores=None, colors=None, *, fit=None):
    """A uint8 [h, w, 3] image with its instances filled translucently, outlined and labelled -> PIL.Image (RGB).

    shapes: an instance each: a polygon [R, 2] (x, y in pixels), a list of such rings, or a bool mask [h, w].
    labels: a text each; scores: a number each, written behind it. Earlier instances lie on top, and their labels
    win the space. colors: (R, G, B) each; default: one for each instance. The picture's longer side is `fit` pixels;
    without `fit` it has the image's size, times the whole number (at most 8) that brings its shorter side to 384. A dim image
    is brightened.
    """
    height, width = image.shape[:2]
    scale = fit / max(height, width) if fit else min(8, max(1, -(-384 // min(height, width))))
    picture = brightened(Image.fromarray(image))
    if scale != 1:
        picture = _scaled(picture, scale, Image.Resampling.BICUBIC)
    colors = [color(index) for index in range(len(shapes))] if colors is None else colors
    stroke = max(2, round(min(picture.size) / 240))
    # Pillow draws hard edges: draw larger and shrink. Huge pictures need it less and could not pay for it.
    pixels = picture.width * picture.height
    finer = 3 if pixels <= 1_000_000 else 2 if pixels <= 6_000_000 else 1
    rows = max(1, LAYER_PIXELS // (picture.width * finer**2))
    for top in range(0, picture.height, rows):
        strip = picture.crop((0, top, picture.width, min(top + rows, picture.height)))
        layer = Image.new("RGBA", (strip.width * finer, strip.height * finer), (0, 0, 0, 0))
        for shape, rgb in reversed(list(zip(shapes, colors, strict=True))):
            paint = _paint_mask if _is_mask(shape) else _paint_rings
            paint(layer, shape, scale * finer, top * finer, rgb, stroke * finer)
        layer = layer.resize(strip.size, Image.Resampling.BOX) if finer > 1 else layer
        picture.paste(Image.alpha_composite(strip.convert("RGBA"), layer).convert("RGB"), (0, top))
    labels = [""] * len(shapes) if labels is None else labels
    numbers = [""] * len(shapes) if scores is None else [f"{score:.2f}" for score in scores]
    texts = [(nfc(f"{label} {number}".strip()), number) for label, number in zip(labels, numbers, strict=True)]
    _write_labels(picture, [_box(shape, scale) for shape in shapes], texts, colors)
    return picture


def _is_mask(shape):
    return isinstance(shape, np.ndarray) and shape.dtype == bool


def _box(shape, scale):
    """xmin, ymin, xmax, ymax of an instance in the picture, None if there is nothing of it."""
    points = np.argwhere(shape)[:, ::-1] if _is_mask(shape) else np.concatenate([np.zeros((0, 2)), *_rings(shape)])
    return np.concatenate([points.min(axis=0), points.max(axis=0)]) * scale if len(points) else None


def _write_labels(picture, boxes, texts, colors):
    """Each instance's text, or its shorter form, at its top left corner, unless it would cover another one."""
    size = max(11, min(26, round(min(picture.size) / 30)))
    pen = ImageDraw.Draw(picture)
    taken = np.zeros((0, 4))
    crowded = len(boxes) > 20
    for box, forms, rgb in zip(boxes, texts, colors, strict=True):
        for text in filter(None, forms if box is not None else ()):
            text, font = written(text, size)
            left, top, right, bottom = pen.textbbox((0, 0), text, font=font)
            wide, high = right - left + 6, bottom - top + 6
            if crowded and (wide > 1.3 * (box[2] - box[0]) or high > 0.6 * (box[3] - box[1])):
                continue
            x = float(np.clip(box[0], 0, max(0, picture.width - wide - 1)))
            y = float(np.clip(box[1] - high - 1, 0, max(0, picture.height - high - 1)))
            if ((taken[:, 0] < x + wide) & (x < taken[:, 2]) & (taken[:, 1] < y + high) & (y < taken[:, 3])).any():
                continue
            taken = np.vstack([taken, (x, y, x + wide, y + high)])
            pen.rounded_rectangle((x, y, x + wide, y + high), radius=3, fill=rgb)
            bright = np.dot(rgb, (0.299, 0.587, 0.114)) > 140
            pen.text((x + 3 - left, y + 3 - top), text, font=font, fill=INK if bright else (255, 255, 255))
            break


def save(picture, path):
    """Writes a PIL.Image as the kind of file that the name says, PNG if it says none; InputError if that cannot be done."""
    kind = Image.registered_extensions().get(Path(path).suffix.lower(), "PNG" if not Path(path).suffix else None)
    if kind not in Image.SAVE:
        raise InputError(f"{path}: no kind of picture that can be written; call it .png or .jpg")
    with files.replacing(path) as part:
        picture.save(part, format=kind, **({"quality": 90} if kind == "JPEG" else {}))


def brightened(picture):
    """A PIL.Image as it is; a dim one, like 12 bits of gray in 16, with its levels spread over all that there are."""
    # Averaged, since single pixels of a camera may be as bright as they like.
    extremes = np.reshape(picture.reduce(4).getextrema(), (-1, 2))
    low, high = int(extremes.min()), int(extremes.max())
    if high >= DIM or high == low:
        return picture
    levels = ((np.arange(256) - low) * 255 / (high - low)).clip(0, 255).round().astype(int)
    return picture.point(levels.tolist() * len(picture.getbands()))


def _scaled(picture, scale, resampling):
    return picture.resize([max(1, round(side * scale)) for side in picture.size], resampling)


def sheet(cells, *, heads=("ground truth", "prediction"), title="", side=SHEET_SIDE):
    """Cells (PIL.Image, ..., caption), each of as many pictures, side by side -> one PIL.Image.

    heads: a text over each picture of a cell, or none at all.
    """
    pictures = len(cells[0]) - 1
    columns = math.ceil(math.sqrt(len(cells) / pictures))
    gap, between, line, head = 28, 6, 24, 28 + (28 if heads else 0) + (40 if title else 0)
    fitted = [
        ([_scaled(one, side / max(one.size), Image.Resampling.LANCZOS) for one in shown], caption) for *shown, caption in cells
    ]
    rows = [fitted[first : first + columns] for first in range(0, len(cells), columns)]
    high = [max(picture.height for shown, _ in row for picture in shown) for row in rows]
    inner = pictures * (side + between) - between
    canvas = Image.new("RGB", (gap + columns * (inner + gap), head + sum(high) + len(rows) * (line + gap)), PAPER)
    pen = ImageDraw.Draw(canvas)
    if title:
        _write(pen, (gap, 24), title, 26, INK, canvas.width - 2 * gap)
    y = head
    for number, row in enumerate(rows):
        for column, (shown, caption) in enumerate(row):
            left = gap + column * (inner + gap)
            for k, picture in enumerate(shown):
                x = left + k * (side + between)
                canvas.paste(picture, (x, y))
                if number == 0 and heads:
                    _write(pen, (x, y - 26), heads[k], 16, INK, side)
            _write(pen, (left, y + shown[0].height + 4), caption, 15, FAINT, inner)
        y += high[number] + line + gap
    return canvas


def _write(pen, place, text, size, color, width):
    """As much of a text as fits into `width` pixels."""
    text, font = written(text, size)
    shown = text
    while shown and pen.textlength(shown, font=font) > width:
        text = text[:-1]
        shown = text.rstrip() + "..." if text else ""
    pen.text(place, shown, font=font, fill=color)


def written(text, size):
    """(text, font of `size` pixels) to write it with: what no font here has is written without its marks, else as "?"."""
    text = nfc(text)  # fonts have letters with their marks, rather than marks to put over letters
    own = _font("", size)
    if text.isascii():
        return text, own
    for font in (_font(name, size) for name in FONTS):
        if font and all(_has(font, letter) for letter in text):
            return text, font
    bare = (unicodedata.normalize("NFKD", letter) for letter in text)
    return "".join("".join(filter(str.isascii, letters)) or "?" for letters in bare), own


@functools.cache
def _font(name, size):
    """Pillow's own font without a name; None where the machine has none of that name."""
    try:
        return ImageFont.truetype(name, size) if name else ImageFont.load_default(size)
    except OSError:
        return None


@functools.lru_cache(10_000)
def _has(font, letter):
    """Whether a font shows a letter, and not the box that stands for all that it lacks."""
    return letter.isspace() or bytes(font.getmask(letter)) != bytes(font.getmask("\U0010ffff"))
