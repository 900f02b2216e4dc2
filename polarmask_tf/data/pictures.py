"""The bytes that a record holds of one picture: the file's own where any reader takes them alike, else its pixels anew.

Pixels come from lite.read_image, as in `predict`: what is trained on is what is predicted on.
"""

import contextlib
import io
import os
import stat
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from polarmask_tf import lite
from polarmask_tf.data.report import Report, Unusable
from polarmask_tf.files import read_file

_MOST_BYTES = 2**29  # of a file; a record must stay below 2 GB
_WITH_FRAMES = ("PNG", "GIF", "TIFF", "WEBP")  # or with transparency; of MPO the others are previews
OUTSIDE = "image outside the images directory (--allow-outside takes such)"
TURNED = "image turned by its EXIF orientation, and stored as turned"
UNTOLD = (
    "EXIF orientation that the size does not tell, ignored: annotations are taken to fit the image as stored"
    " (--exif apply: as viewers show it)"
)
_CORRUPT = "corrupt or truncated image, or not an image"
# First bytes: format in a record, end of a whole file, modes of 8 bits that every reader makes the same RGB of.
_PLAIN = {
    b"\xff\xd8": ("jpeg", b"\xff\xd9", ("L", "RGB")),
    b"\x89P": ("png", b"IEND\xaeB`\x82", ("1", "L", "LA", "P", "RGB", "RGBA")),
}


def find(folder: Path, name: str, allow_outside: bool) -> Path:
    """The path of an image file of the JSON; Unusable if there is none, or if it lies outside `folder`.

    `folder` is resolved; a link counts as what it points to.
    """
    try:
        name.encode()
    except UnicodeEncodeError:  # bytes of another encoding
        raise Unusable("image whose file name is not UTF-8: rename it") from None
    try:
        path = os.path.realpath(folder / name)
        if not (allow_outside or path.startswith(os.path.join(folder, ""))):
            raise Unusable(OUTSIDE)
        if not stat.S_ISREG(os.stat(path).st_mode):  # also keeps from waiting at a pipe
            raise Unusable("missing image")
    except (FileNotFoundError, NotADirectoryError):
        raise Unusable("missing image") from None
    except (OSError, ValueError):  # too long, links in a circle
        raise Unusable("unreadable image file") from None
    return Path(path)


def stored(path: Path, size: tuple[int, int], options, report: Report, where: str, as_shown=False) -> tuple[bytes, str]:
    """(bytes, format) of a picture that must have `size` (width, height); Unusable otherwise.

    `options` are those of convert.convert: verify (decode all pixels in any case), decoded (store pixels), exif, bit_depth.
    as_shown: a picture whose size is the same before and after its EXIF orientation is turned by it.
    """
    try:
        data = read_file(path, _MOST_BYTES)
    except (OSError, ValueError):
        raise Unusable("unreadable image file") from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's opinion of odd EXIF blocks and large images
            record = _stored(data, size, options, report, where, as_shown)
            for text in left_out(data):
                report.note(text, where)
            return record
    except (Unusable, MemoryError):
        raise
    except Image.DecompressionBombError:
        raise Unusable(f"image of more than {lite.MAX_PIXELS // 10**6} megapixels") from None
    except Exception as error:  # Pillow's parsers fail in every way there is: struct.error, SyntaxError, ZeroDivisionError, ...
        if "bit depth" in str(error):
            raise Unusable("pixels whose values no picture of 8 or 16 bits has (see --bit-depth)", str(error)) from None
        raise Unusable(_CORRUPT, str(error)) from None


def _stored(data, size, options, report, where, as_shown):
    format, end, modes = _PLAIN.get(data[:2], (None, b"", ()))
    turn, notes = False, []
    # What Pillow cannot open read_image refuses below, and says why.
    with contextlib.suppress(UnidentifiedImageError), lite.open_image(io.BytesIO(data)) as image:
        # Of a PNG Pillow would decode all pixels, to look behind them as well.
        told = format != "png" or "exif" in image.info or image.size != size
        orientation = lite.orientation(image) if told else 1
        turn = _turns(stored_size(image, orientation), size, orientation, options.exif, as_shown, report, where)
        deep = ";16" in str(image.tile)  # of which lite.read_image has something to say
        if format and image.mode in modes and not turn and not options.decoded and not deep:
            # Some files carry padding or a second picture behind the end marker; then decoding has the last word.
            if options.verify or not data.rstrip(b"\0\r\n ").endswith(end):
                image.load()
                if end not in data:
                    raise Unusable(_CORRUPT)
            return data, format
    pixels = lite.read_image(data, exif="apply" if turn else "ignore", bit_depth=options.bit_depth, notes=notes)
    if pixels.shape[:2] != size[::-1]:
        raise Unusable("size mismatch")
    for text in notes:
        if not text.startswith("EXIF"):  # of which _turns says more
            report.note(text, where)
    return encode(pixels, "bmp" if options.decoded else "png")


def stored_size(image: Image.Image, orientation: int) -> tuple[int, int]:
    """(width, height) of the pixels in a file that has been opened and not read: of a TIFF Pillow says it as turned."""
    return image.size[::-1] if image.format == "TIFF" and orientation > 4 else image.size


def _turns(actual, wanted, orientation, exif, as_shown, report, where) -> bool:
    """Whether a picture is to be turned as its EXIF says: `exif` is "apply", "ignore" or, by the wanted size, "auto"."""
    upright = actual[::-1] if orientation > 4 else actual
    told = wanted == upright != actual or (as_shown and wanted == upright == actual)
    turn = orientation > 1 and (exif == "apply" or (exif == "auto" and told))
    if (upright if turn else actual) != wanted:
        raise Unusable("size mismatch (EXIF orientation)" if wanted in (actual, upright) else "size mismatch")
    if turn:
        report.note(TURNED, f"{where}: orientation {orientation}")
    elif orientation > 1 and upright == actual and exif == "auto":
        report.note(UNTOLD, f"{where}: orientation {orientation}")
    elif orientation > 1:
        report.note("EXIF orientation ignored: annotations fit the image as stored", f"{where}: orientation {orientation}")
    return turn


def left_out(source) -> list[str]:
    """What reading a picture file (its path or bytes) leaves out, in the same words for all of a kind."""
    found: list[str] = []
    with warnings.catch_warnings(), contextlib.suppress(Exception):  # Pillow's parsers fail in every way there is
        warnings.simplefilter("ignore")
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=_WITH_FRAMES) as image:
            if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
                found.append("transparency left out: such pixels have the color that is stored beneath")
            image.seek(1)  # n_frames would go through all
            found.append("several frames or pages, of which the first is taken")
    return found


def encode(pixels: np.ndarray, format: str) -> tuple[bytes, str]:
    """uint8 RGB [h, w, 3] as a file: "png", or "bmp", which is read faster than any decoder works."""
    file = io.BytesIO()
    gray = format == "png" and (pixels == pixels[..., :1]).all()  # BMP readers disagree about gray
    Image.fromarray(pixels[..., 0] if gray else pixels).save(file, format, **({"compress_level": 1} if format == "png" else {}))
    return file.getvalue(), format
