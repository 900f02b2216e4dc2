"""The pictures of a source: found by what annotations call them, and their sizes by their headers alone."""

from __future__ import annotations

import collections
import contextlib
import functools
import os
import posixpath
import re
import typing
import urllib.parse
import warnings
from pathlib import Path

from PIL import Image

from polarmask_tf import lite
from polarmask_tf.data import pictures, windows
from polarmask_tf.data.report import Unusable
from polarmask_tf.data.sources.source import SPLITS
from polarmask_tf.errors import InputError, nfc

SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".dib", ".tif", ".tiff", ".webp", ".gif", ".ppm", ".pgm", ".pnm")
SUFFIXES += (".jp2", ".tga", ".pcx", ".sgi", ".qoi", ".avif")
_MOST_FILES = 5_000_000  # in a folder with all below


class Names:
    """Names of files, found however accents are spelled, and in upper or lower case where that fits one alone."""

    def __init__(self, names: typing.Iterable[str]):
        self._exact = {nfc(name): name for name in names}
        self._folded = _grouped(self._exact.values(), lambda name: nfc(name).casefold())

    def get(self, name: str) -> str | None:
        alike = self._folded.get(nfc(name).casefold(), ())
        return self._exact.get(nfc(name)) or (alike[0] if len(alike) == 1 else None)


class Folder:
    """A folder of pictures of at most so many pixels. `exif` and `allow_outside` are those of `polarmask convert`."""

    def __init__(self, root: Path, exif: str = "auto", allow_outside: bool = False, most_pixels: int = lite.MAX_PIXELS):
        self.root, self._exif, self._allow_outside = Path(root).resolve(), exif, allow_outside
        self.most_pixels = most_pixels

    @functools.cached_property
    def files(self) -> list[str]:
        """Names of all pictures in it and below, relative to it, with slashes, sorted."""
        return [name for name in walk(self.root, self._allow_outside) if is_picture(name)]

    def names(self, suffix: str) -> list[str]:
        """Names of all files with a suffix in it and below."""
        return [name for name in walk(self.root, self._allow_outside) if name.lower().endswith(suffix)]

    def with_stem(self, name: str) -> list[str]:
        """The pictures whose names without suffixes are `name`."""
        return self._by_stem.get(nfc(name), [])

    @functools.cached_property
    def _by_stem(self):
        return _grouped(self.files, lambda name: nfc(stem(name)))

    @functools.cached_property
    def _by_spelling(self):
        return Names(self.files)

    @functools.cached_property
    def _by_name(self):
        return _grouped(self.files, lambda name: nfc(posixpath.basename(name)).casefold())

    def find(self, name: str, near: str = "") -> str:
        """The picture that an annotation calls `name`, relative to the folder. Unusable if there is none.

        A name as it stands is looked for beside the annotations (`near`) and in the folder. Backslashes, URLs and paths of
        another machine lead to the file here that ends like them. A name with folders of its own never leads into another
        folder than these.
        """
        if not isinstance(name, str) or not name or "\0" in name:
            raise Unusable("malformed image entry (no file name)")
        for spelling in _spellings(name):
            for base in dict.fromkeys((near, "")):
                inside = posixpath.normpath(posixpath.join(base, spelling))
                if inside.startswith(("/", "..")):
                    continue
                if os.path.isfile(self.root / inside):
                    return inside
                if found := self._by_spelling.get(inside):
                    return found
        if self._allow_outside and os.path.isfile(self.root / near / name):
            return os.path.relpath(self.root / near / name, self.root)
        for spelling in _spellings(name):
            if found := self._ends_like(spelling):
                return found
        there = os.path.isfile(self.root / near / name) and not self._allow_outside
        raise Unusable(pictures.OUTSIDE if there else "missing image", name[:200])

    def _ends_like(self, name):
        elsewhere = posixpath.isabs(name) or re.match(r"[A-Za-z]:/", name)
        parts = [part for part in nfc(posixpath.normpath(name)).casefold().split("/") if part not in ("", ".", "..")]
        as_spelled = nfc(name).rpartition("/")[2]
        best = collections.defaultdict(list)
        for file in self._by_name.get(parts[-1], ()) if parts else ():
            theirs = nfc(file).casefold().split("/")
            common = 0
            while common < min(len(parts), len(theirs)) and parts[-1 - common] == theirs[-1 - common]:
                common += 1
            if elsewhere or common in (len(parts), len(theirs)):
                best[common, nfc(file).endswith(as_spelled)].append(file)
        found = best[max(best)] if best else []
        if len(found) > 1:
            raise Unusable("image name that fits several files", f"{' and '.join(found[:3])}")
        return found[0] if found else None

    def size(self, name: str) -> tuple[int, int]:
        """(width, height) of a picture as viewers show it; as it is stored with `--exif ignore`. Unusable if it is none."""
        stored, upright = self.sizes(name)
        return stored if self._exif == "ignore" else upright

    def sizes(self, name: str) -> tuple[tuple[int, int], tuple[int, int]]:
        """(width, height) as stored, and as the EXIF orientation turns it."""
        path = pictures.find(self.root, name, self._allow_outside)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                with open(path, "rb") as file, Image.open(lite.check_blocks(file), formats=lite.FORMATS) as image:
                    # Of a PNG Pillow would decode all pixels, to look behind them as well.
                    told = image.format != "PNG" or "exif" in image.info
                    orientation = lite.orientation(image) if told else 1
                    size, turned = pictures.stored_size(image, orientation), orientation > 4
        except MemoryError:
            raise
        except Image.DecompressionBombError:  # of more pixels than Pillow opens
            size, turned = self._size_of_large(path), False
        except Exception:  # Pillow's parsers fail in every way there is
            raise Unusable("corrupt or truncated image, or not an image") from None
        if size[0] * size[1] > self.most_pixels:
            raise Unusable(f"image of more than {self.most_pixels // 10**6} megapixels")
        return size, size[::-1] if turned else size

    def _size_of_large(self, path):
        if self.most_pixels > lite.MAX_PIXELS:
            try:
                with contextlib.closing(windows.open_windows(path)) as opened:
                    return opened.shape[1::-1]
            except InputError as error:
                raise Unusable("large image that cannot be read by windows", str(error)) from None
        raise Unusable(f"image of more than {self.most_pixels // 10**6} megapixels")


def _grouped(names, key):
    found = collections.defaultdict(list)
    for name in names:
        found[key(name)].append(name)
    return found


def walk(root: Path, allow_outside: bool = False) -> typing.Iterator[str]:
    """Names of the files in a folder and below, relative to it, with slashes, sorted.

    Without hidden ones, links to folders, and (unless `allow_outside`) links to files elsewhere.
    """
    found: list[str] = []
    inside = os.path.join(os.path.realpath(root), "")

    def is_inside(path):
        return allow_outside or not os.path.islink(path) or os.path.realpath(path).startswith(inside)

    for folder, below, names in os.walk(root):
        below[:] = [name for name in below if not name.startswith((".", "__MACOSX"))]
        base = os.path.relpath(folder, root)
        found += [
            name if base == "." else f"{base}/{name}"
            for name in names
            if not name.startswith(".") and is_inside(f"{folder}/{name}")
        ]
        if len(found) > _MOST_FILES:
            raise InputError(f"{root}: more than {_MOST_FILES:,} files in it; name the folder of the data set itself")
    return iter(sorted(name.replace(os.sep, "/") for name in found))


def is_picture(name: str) -> bool:
    return posixpath.splitext(name)[1].lower() in SUFFIXES


def stem(name: str) -> str:
    """A name without its suffix, with its folders."""
    return posixpath.splitext(name)[0]


def beside(path: Path, names: list[str], split: str = "") -> Path:
    """The folder of the pictures of a file of annotations: of those near it, the one that has most of `names`.

    Looked at are the file's own folder, images/ in it and beside it, and folders there that are called like the file or its
    split. InputError if none has any.
    """
    home = path.parent
    token = re.sub(r"^(instances|annotations?|labels|person_keypoints)[_-]?|[_-]?(annotations?|coco|instances)$", "", path.stem)
    called = dict.fromkeys(name for name in (token, split, *_called(split)) if name)
    looked: list[Path] = []
    for base in (home, home.parent):
        for folder in (*called, *(f"images/{name}" for name in called), *(f"{name}/images" for name in called)):
            looked.append(base / folder)
        looked += [base / name for name in ("images", "imgs", "image", "JPEGImages", "data", "train2017", "val2017")]
        looked.append(base)
    looked = [folder for folder in dict.fromkeys(looked) if os.path.isdir(folder)]
    sample = names[:: max(1, len(names) // 50)][:50]
    exact = {folder: sum(os.path.isfile(folder / _plain(name)) for name in sample) for folder in looked}
    best = max(exact, key=exact.__getitem__, default=home)
    if exact.get(best):
        return best
    for folder in looked:  # names of another machine
        if folder == home.parent:
            continue
        pictures_of = Folder(folder)
        for name in sample:
            try:
                pictures_of.find(name)
            except Unusable:
                continue
            return folder
    if not sample:
        return home
    where = ", ".join(str(folder) for folder in looked[:6])
    tell = "name their folder: polarmask convert SOURCE IMAGES OUT"
    raise InputError(f"{path}: none of its pictures (like {sample[0][:100]!r}) lies in {where}; {tell}")


def _called(split):
    return [name for name, meant in SPLITS.items() if meant == split]


def _plain(name):
    return name.replace("\0", "?")


def _spellings(name):
    """A name as it stands, and what else it may mean here."""
    yield name
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", name) or name.startswith("/data/"):  # the second: of Label Studio
        with contextlib.suppress(ValueError):  # of a host that cannot be
            url = urllib.parse.urlsplit(name)
            query = urllib.parse.parse_qs(url.query).get("d", [""])[0]
            path = urllib.parse.unquote(query or url.path)
            yield path if path.startswith("/") else f"/{path}"
            name = path
    if "\\" in name:
        name = name.replace("\\", "/")
        yield name
    folder, base = posixpath.split(name)
    if re.match(r"[0-9a-f]{8}-.", base):  # which Label Studio puts before the names of files that were uploaded
        yield posixpath.join(folder, base[9:])
