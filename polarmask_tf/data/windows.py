"""Pictures read by windows: memory is that of the window, not of the picture. TIFFs beyond lite.MAX_PIXELS need tifffile.

An ordinary picture is decoded whole by lite.read_image. A larger TIFF, BigTIFF or OME-TIFF is read segment by segment (its
tiles or strips) from its first page, which of a pyramid is the full resolution. Pixels are what lite.read_image would make of
them.
"""

import collections
import contextlib
import logging
import math
import os
import warnings
import zlib

import numpy as np
from PIL import Image

from polarmask_tf import lite
from polarmask_tf.errors import InputError

OVERVIEW = 4096  # pixels, longer side of a large picture where it is shown
MAX_PIXELS = 2**36  # of a picture read by windows
_MAX_SIDE = 2**24
_MAX_SEGMENT = 2**28  # bytes of one decoded tile or strip: nothing smaller can be read
_MAX_UNPACKED = 2**29  # bytes that Deflate may make of a segment without being asked first how many
_CACHE = 2**27  # bytes of decoded segments that are kept for the next window
_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_INSTALL = "pip install 'polarmask_tf[large]'"
_MIN_IS_WHITE, _MIN_IS_BLACK, _RGB, _YCBCR = 0, 1, 2, 6
_DEFLATE, _JPEG = (8, 32946), 7


class ArrayWindows:
    """Windows of pixels that are in memory, uint8 [h, w, 3]; see TiffWindows."""

    def __init__(self, pixels: np.ndarray):
        self.shape, self._pixels, self.source = pixels.shape, pixels, pixels

    def read(self, y: int, x: int, height: int, width: int) -> np.ndarray:
        return self._pixels[y : y + height, x : x + width]

    def close(self) -> None:
        pass


class TiffWindows:
    """The first page of a TIFF. `shape` is (height, width, 3).

    Reads with the `bit_depth` of lite.read_image. The constructor and `read` raise InputError, in one line, for what is
    damaged, of a kind that is not read, or stored in pieces that are too large.
    """

    def __init__(self, path, bit_depth: int | None = None):
        tifffile = _tifffile(path)
        self.source = self._path = path
        self._bit_depth, self._decoded, self._bytes = bit_depth, collections.OrderedDict(), 0
        self._most = None  # of the deep values that were read
        try:
            lite.check_file(path, 2**63)
            self._file = tifffile.TiffFile(path)
        except Exception as error:  # broken files make tifffile raise nearly any type, here and below
            raise InputError(f"{path}: cannot read the image: {lite.one_line(error)}") from None
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # NumPy's opinion of absurd tags
                self._page = self._file.pages.first
                self._check()
        except Exception as error:
            self.close()
            raise error if isinstance(error, InputError) else self._broken(error) from None

    def close(self) -> None:
        self._file.close()
        self._decoded.clear()

    def notes(self) -> list[str]:
        """What lite.read_image notes of gray levels, by what has been read."""
        return [] if self._most is None else lite.few_levels(self._most, self._bit_depth or 16, not self._color)

    def read(self, y: int, x: int, height: int, width: int) -> np.ndarray:
        """uint8 [height, width, 3] RGB of the pixels from row y and column x on, which must lie in the picture."""
        if not (0 <= y <= y + height <= self.shape[0] and 0 <= x <= x + width <= self.shape[1] and height and width):
            raise ValueError(f"a window of {height} x {width} at {y}, {x} is not in a picture of {self.shape[:2]}")
        try:
            if self._map is not None:
                window = np.array(self._map[:, y : y + height, x : x + width])
            else:
                window = np.zeros((self._planes, height, width, self._samples), self._page.dtype)
                (tall, wide), (rows, columns) = self._segment, self._grid
                for plane in range(self._planes):
                    for row in range(y // tall, (y + height - 1) // tall + 1):
                        for column in range(x // wide, (x + width - 1) // wide + 1):
                            self._paste(
                                window[plane], (plane * rows + row) * columns + column, y - row * tall, x - column * wide
                            )
            return self._rgb(np.moveaxis(window, 0, -1).reshape(height, width, -1))
        except MemoryError:
            raise InputError(f"{self._path}: not enough memory for its tiles") from None
        except Exception as error:
            raise error if isinstance(error, InputError) else self._broken(error) from None

    def _broken(self, error):
        hint = "; reading this compression needs imagecodecs: pip install imagecodecs" if "imagecodecs" in str(error) else ""
        return InputError(f"{self._path}: damaged, or of a kind that is not read: {lite.one_line(error)}{hint}")

    def _refuse(self, what):
        return InputError(f"{self._path}: {what}")

    def _check(self):
        page = self._page
        height, width = page.imagelength, page.imagewidth
        self.shape = height, width, 3
        save = "save it as tiled RGB or gray TIFF"
        if not (0 < height <= _MAX_SIDE and 0 < width <= _MAX_SIDE and height * width <= MAX_PIXELS):
            raise self._refuse(f"{width} x {height} pixels, and the limit is {MAX_PIXELS:,} in all")
        if page.imagedepth != 1:
            raise self._refuse("a volume, not a picture")
        if page.tags.valueof(274, 1) != 1:
            raise self._refuse("its orientation tag says that it is turned; save it upright")
        color = page.photometric == _RGB or (page.photometric == _YCBCR and page.compression == _JPEG)
        if not (color and page.samplesperpixel >= 3) and not (
            page.photometric in (_MIN_IS_BLACK, _MIN_IS_WHITE) and page.samplesperpixel <= 2
        ):
            raise self._refuse(f"{page.samplesperpixel} channels of kind {page.photometric!s}, not RGB or gray; {save}")
        kinds = ("uint8", "uint16") if color else ("uint8", "uint16", "uint32", "int16", "int32", "float32", "float64")
        if str(page.dtype) not in kinds or page.bitspersample != page.dtype.itemsize * 8:
            raise self._refuse(f"pixels of {page.bitspersample} bits ({page.dtype}); {save}")
        if page.dtype.kind == "f" and self._bit_depth is None:
            raise self._refuse("floating-point pixels; give the bits of their range as bit depth, or save it with 8 or 16 bits")
        if color and page.dtype != np.uint8 and self._bit_depth not in (None, 16):
            raise self._refuse("16-bit colors, and a bit depth is of gray alone; save it with 8 bits")
        self._color, separate = color, page.planarconfig == 2
        self._planes, self._samples = (page.samplesperpixel, 1) if separate else (1, page.samplesperpixel)
        self._map = None
        if page.is_memmappable:  # as ImageJ writes them, in one strip of any size
            self._map = page.asarray(out="memmap").reshape(self._planes, height, width, self._samples)
            return
        self._segment = (page.tilelength, page.tilewidth) if page.is_tiled else (min(page.rowsperstrip, height), width)
        self._grid = -(-height // self._segment[0]), -(-width // self._segment[1])
        self._size = math.prod(self._segment) * self._samples * page.dtype.itemsize
        if not 0 < self._size <= _MAX_SEGMENT:
            raise self._refuse(f"stored in pieces of {self._size:,} bytes, and the limit is {_MAX_SEGMENT:,}; {save}")
        count = self._planes * math.prod(self._grid)
        if not len(page.dataoffsets) == len(page.databytecounts) == count:
            raise self._refuse(f"damaged: {len(page.dataoffsets)} of {count} tiles or strips")

    def _paste(self, window, index, y, x):
        """Copy the segment into what it covers of `window`, whose corner lies at y, x of the segment."""
        segment = self._decode(index)
        if segment is None:  # of a sparse file
            return
        part = segment[max(y, 0) :, max(x, 0) :][: window.shape[0] + min(y, 0), : window.shape[1] + min(x, 0)]
        top, left = max(-y, 0), max(-x, 0)
        window[top : top + part.shape[0], left : left + part.shape[1]] = part

    def _decode(self, index):
        """The segment, [rows, columns, samples]; None where nothing is stored. The last ones are kept."""
        if index in self._decoded:
            self._decoded.move_to_end(index)
            return self._decoded[index]
        page, count = self._page, self._page.databytecounts[index]
        if not count:
            return None
        if count > 2 * self._size + 2**16:
            raise ValueError(f"a tile or strip of {count:,} bytes for {self._size:,}")
        handle = self._file.filehandle
        handle.seek(page.dataoffsets[index])
        data = handle.read(count)
        if len(data) < count:
            raise ValueError("the file is cut short")
        # Deflate makes at most 1,032 bytes of one: where that could be much, it is tried first how much it is.
        if page.compression in _DEFLATE and 1032 * count > max(_MAX_UNPACKED, 2 * self._size):
            beyond = len(zlib.decompressobj().decompress(data, self._size + 1)) > self._size
            if beyond:
                raise ValueError("a tile or strip that holds more than its pixels")
        tables = {"jpegtables": page.jpegtables} if page.jpegtables else {}
        segment = page.decode(data, index, **tables)[0]
        if segment is None:
            return None
        segment = segment[0]
        self._decoded[index] = segment
        self._bytes += segment.nbytes
        while self._bytes > _CACHE and len(self._decoded) > 1:
            self._bytes -= self._decoded.popitem(last=False)[1].nbytes
        return segment

    def _rgb(self, values):
        """[h, w, samples] as stored -> uint8 [h, w, 3], by the rules of lite.read_image."""
        if self._color:
            values = values[..., :3]
            self._see(values)
            return values if values.dtype == np.uint8 else (values >> 8).astype(np.uint8)
        values = values[..., :1]
        if values.dtype == np.uint8:
            values = 255 - values if self._page.photometric == _MIN_IS_WHITE else values
        else:
            bits = self._bit_depth or 16
            if not 0 <= values.min() <= values.max() < 2**bits:  # NaN is not
                low, most = values.min(), values.max()
                raise self._refuse(f"pixels from {low:g} to {most:g}, beyond the {bits} bits of the bit depth")
            self._see(values)
            values = (values.astype(np.uint16) >> bits - 8).astype(np.uint8)
        return np.repeat(values, 3, axis=-1)

    def _see(self, values):
        if values.dtype != np.uint8:
            self._most = max(self._most or 0, values.max())


def open_windows(source, *, exif: str = "ignore", bit_depth: int | None = None, notes: list | None = None):
    """A picture -> ArrayWindows or TiffWindows: `shape` (height, width, 3), `read(y, x, height, width)`, `close()`.

    source: a path, uint8 pixels [h, w, 3], or what else lite.read_image takes; the options are its. Only TIFF files may have
    more than lite.MAX_PIXELS pixels (or lite.MAX_IMAGE_BYTES bytes). Raises InputError.
    """
    if isinstance(source, (ArrayWindows, TiffWindows)):
        return source
    given, is_path = source, isinstance(source, (str, os.PathLike))
    try:
        if is_path:
            lite.check_file(source, 2**63)
            if is_large_tiff(source):
                return TiffWindows(source, bit_depth)
        pixels = (
            source if isinstance(source, np.ndarray) else lite.read_image(source, exif=exif, bit_depth=bit_depth, notes=notes)
        )
        lite.check_image(pixels)
    except (OSError, ValueError) as error:
        where = f"{source}: " if is_path and str(source) not in str(error) else ""
        raise InputError(f"{where}{lite.one_line(error)}") from None
    opened = ArrayWindows(pixels)
    opened.source = given
    return opened


def whole(source, bit_depth: int | None = None) -> np.ndarray:
    """The pixels of what open_windows takes, uint8 [h, w, 3]: of a large TIFF its overview. Raises InputError."""
    opened = open_windows(source, bit_depth=bit_depth)
    if isinstance(opened, TiffWindows):
        return overview(opened, OVERVIEW)
    return opened.read(0, 0, *opened.shape[:2])


def overview(windows, longest: int) -> np.ndarray:
    """A picture averaged down by a whole number so that no side is longer than `longest`: uint8 [h, w, 3]; read in bands."""
    height, width = windows.shape[:2]
    factor = max(1, -(-max(height, width) // longest))
    small = np.zeros((-(-height // factor), -(-width // factor), 3), np.uint8)
    step = max(1, 1024 // factor) * factor
    for y in range(0, height, step):
        for x in range(0, width, step):
            part = windows.read(y, x, min(step, height - y), min(step, width - x))
            rows, columns = np.arange(0, part.shape[0], factor), np.arange(0, part.shape[1], factor)
            sums = np.add.reduceat(np.add.reduceat(part.astype(np.uint32), rows, axis=0), columns, axis=1)
            of = np.minimum(factor, part.shape[0] - rows)[:, None] * np.minimum(factor, part.shape[1] - columns)
            top, left = y // factor, x // factor
            small[top : top + len(rows), left : left + len(columns)] = (sums + of[..., None] // 2) // of[..., None]
    return small


def is_large_tiff(path) -> bool:
    """Whether a file is a TIFF too large for lite.read_image. Raises OSError."""
    with open(path, "rb") as file:
        if file.read(4) not in _MAGIC:
            return False
    if os.path.getsize(path) > lite.MAX_IMAGE_BYTES:
        return True
    with warnings.catch_warnings(), contextlib.suppress(Exception):  # of what Pillow cannot open, the reader says what it is
        warnings.simplefilter("ignore")
        try:
            with open(path, "rb") as file, Image.open(lite.check_blocks(file), formats=("TIFF",)) as image:
                return image.width * image.height > lite.MAX_PIXELS
        except Image.DecompressionBombError:
            return True
    return False


def _tifffile(path):
    try:
        import tifffile
    except ImportError:
        raise InputError(f"{path}: reading so large a TIFF by windows needs tifffile: {_INSTALL}") from None
    logging.getLogger("tifffile").addHandler(logging.NullHandler())  # its opinion of odd tags is not for the terminal
    return tifffile
