"""Frames of video files, by OpenCV where it is installed."""

import contextlib
import functools
import importlib.util
import sys

import numpy as np

from polarmask_tf import lite
from polarmask_tf.errors import InputError

SUFFIXES = {".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".wmv", ".ts", ".mts", ".flv"}
NEEDS = "videos need OpenCV: pip install opencv-python-headless"
MAX_BYTES = 2**44
# How each kind begins. A file that begins otherwise may be a playlist, by which FFmpeg would read other files and addresses.
_BEGINS = (
    (0, b"RIFF"),
    (0, b"\x1a\x45\xdf\xa3"),
    (0, b"\x00\x00\x01\xba"),
    (0, b"\x00\x00\x01\xb3"),
    (0, b"\x30\x26\xb2\x75"),
    (0, b"FLV"),
    (0, b"G"),
    (4, b"G"),
    *((4, box) for box in (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"pnot")),
)


def is_available():
    return importlib.util.find_spec("cv2") is not None


def frames(path, every=1, *, exif="ignore", notes=None):
    """(number, read) of the frames 0, `every`, 2 x `every`, ... of a video; read() -> uint8 [h, w, 3] RGB, until the next.

    Frames that are not read are not decoded into pixels. exif="apply" turns frames as the file says, like those of phones.
    Of a video without one frame that can be read there is one (None, read), whose read raises the InputError that says why.
    """
    notes = [] if notes is None else notes
    try:
        capture = _open(path)
    except InputError as error:
        yield None, functools.partial(_fail, error)
        return
    import cv2

    with contextlib.ExitStack() as stack:
        stack.callback(capture.release)
        capture.set(cv2.CAP_PROP_ORIENTATION_AUTO, float(exif == "apply"))
        if exif != "apply" and capture.get(cv2.CAP_PROP_ORIENTATION_META):
            notes.append("the video's orientation ignored")
        number = 0
        while capture.grab():
            if number % every == 0:
                yield number, functools.partial(_retrieve, capture, path, number)
            number += 1
        promised = capture.get(cv2.CAP_PROP_FRAME_COUNT)
        if not number:
            yield None, functools.partial(_fail, InputError(f"{path}: no frame of the video can be read"))
        elif number < promised - max(2, 0.02 * promised):  # players count frames roughly
            print(f"{lite.one_line(path)}: ends or is damaged after {number} of {promised:.0f} frames", file=sys.stderr)


def _fail(error):
    raise error


def _open(path):
    try:
        lite.check_file(path, MAX_BYTES)
        with open(path, "rb") as file:
            start = file.read(16)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot read the video: {lite.one_line(error)}") from None
    if not any(start[first : first + len(mark)] == mark for first, mark in _BEGINS):
        raise InputError(f"{path}: not a video that can be read: none of {', '.join(sorted(SUFFIXES))}")
    if not is_available():
        raise InputError(f"{path}: {NEEDS}")
    import cv2

    with contextlib.suppress(AttributeError):
        cv2.setLogLevel(0)  # FFmpeg's opinion of each damaged frame
    capture = cv2.VideoCapture(str(path.absolute()), cv2.CAP_FFMPEG)
    width, height = (int(capture.get(which)) for which in (cv2.CAP_PROP_FRAME_WIDTH, cv2.CAP_PROP_FRAME_HEIGHT))
    if not capture.isOpened() or width < 1 or height < 1:
        raise InputError(f"{path}: damaged, or a kind of video that OpenCV cannot read here")
    if width * height > lite.MAX_PIXELS:
        raise InputError(f"{path}: frames of {width} x {height} pixels, and the limit is {lite.MAX_PIXELS:,} in all")
    return capture


def _retrieve(capture, path, number):
    there, pixels = capture.retrieve()
    if not there or pixels is None or pixels.dtype != np.uint8:
        raise InputError(f"{path}: frame {number} cannot be decoded")
    pixels = pixels if pixels.ndim == 3 else np.repeat(pixels[..., np.newaxis], 3, axis=2)
    return np.ascontiguousarray(pixels[..., 2::-1])
