"""Which pictures to predict on: files, folders, patterns, videos and stdin, each with the name that its outputs get."""

import dataclasses
import hashlib
import itertools
import os
import re
import sys
import typing
from collections import Counter
from collections.abc import Callable, Iterator
from glob import has_magic
from pathlib import Path, PurePosixPath

from polarmask_tf import files, lite
from polarmask_tf.errors import InputError
from polarmask_tf.inference import video
from polarmask_tf.inference.results import read_image

STDIN = "-"
MAX_INPUTS = 1_000_000  # files; what is found is listed before the first is read
# What lies beside pictures: annotations, outlines of ImageJ and of Cellpose, what file managers leave.
NO_PICTURES = (".json", ".txt", ".xml", ".yaml", ".yml", ".csv", ".md", ".html", ".zip", ".roi", ".npy", ".db", ".ini")
MAX_NAME = 200  # bytes of a file's name: outputs get a suffix, and another while they are written


@dataclasses.dataclass(frozen=True)
class Input:
    """A file, or stdin."""

    path: Path | None  # None: stdin
    name: str  # the path below the folder that was named, with "/"; where that is not unique, below one that holds all
    stem: str  # what outputs are called: the name without suffix where that is clear

    @property
    def is_video(self):
        return self.path is not None and self.path.suffix.lower() in video.SUFFIXES


@dataclasses.dataclass(frozen=True)
class Picture:
    """What the network is to see once: an image file, a frame of a video, or what came from stdin."""

    input: Input
    name: str
    stem: str
    image_id: int | str
    path: Path | None  # of an image file alone
    read: Callable[[], typing.Any]  # -> uint8 [h, w, 3]; raises InputError
    notes: list  # what reading said, see lite.read_image


def find(sources, own_outputs=()) -> list[Input]:
    """The inputs that `sources` name, in their order, those of a folder or a pattern sorted.

    sources: a path or a list of them: image and video files, folders (with all that is below them but hidden files), patterns
    like "a/*.png" or "a/**/*.png", "-" for stdin. Files and folders in `own_outputs` are left out of folders: what this
    command itself writes. Names are unique, whatever folders the files are in. InputError in one line if a source does not
    exist or holds nothing; what is left out for another reason is named on stderr.
    """
    sources = check(sources)
    own, left_out = {os.path.realpath(path) for path in own_outputs}, _LeftOut()
    found: dict = {}
    for source in sources:
        root = _root(source)
        for path in _expand(source, own, left_out):
            found.setdefault(path and os.path.abspath(path), (path, root))
            if len(found) > MAX_INPUTS:
                raise InputError(f"{source}: more than {MAX_INPUTS:,} files; predict on one part at a time")
    left_out.report()
    if not found:
        raise InputError("no inputs; name image files, folders, or - for stdin")
    roots = {key: os.path.abspath(root) for key, (_, root) in found.items() if key}
    names = {key: os.path.relpath(key, root) for key, root in roots.items()}
    if len({*names.values()}) < len(names):
        common = os.path.commonpath({*roots.values()})
        names = {key: os.path.relpath(key, common) for key in roots}
    stdin = "stdin" if "stdin" not in names.values() else "stdin image"
    names = {key: names[key].replace(os.sep, "/") if key else stdin for key in found}
    stems = _stems(names.values())
    return [Input(path, names[key], stems[names[key]]) for key, (path, _) in found.items()]


def check(sources) -> list:
    """The sources as a list; InputError if one of them does not exist, or is a video that nothing here can read."""
    sources = [sources] if isinstance(sources, str | os.PathLike) else list(sources)
    absent = [str(source) for source in sources if not _exists(source)]
    if absent:
        raise InputError(f"{lite.one_line(', '.join(absent[:5]), 600)}{', ...' * (len(absent) > 5)}: no such file or directory")
    named = [source for source in sources if Path(source).suffix.lower() in video.SUFFIXES and os.path.isfile(source)]
    if named and not video.is_available():
        raise InputError(f"{named[0]}: {video.NEEDS}")
    return sources


def _exists(source):
    return source == STDIN or os.path.exists(source) or has_magic(str(source))


def _root(source):
    """The folder that names of what a source gives are relative to, at the most."""
    if os.path.isdir(source):
        return source
    if os.path.exists(source):
        return os.path.dirname(source)
    fixed = itertools.takewhile(lambda part: not has_magic(part), Path(source).parts)
    return os.path.join(*fixed, "")


def _expand(source, own, left_out):
    """The files of a source, in order; None for stdin."""
    if source == STDIN:
        return [None]
    source = Path(source)
    if os.path.exists(source) and _is_own(source, own):
        raise InputError(f"{source}: is where this command writes to; choose another --out")
    if os.path.isdir(source):
        paths, nothing = _walk(source, own, left_out), "no files in it"
    elif os.path.exists(source):
        return [source]
    else:
        paths, nothing = _matches(source, own, left_out), "no file is called so"
    paths = sorted(itertools.islice(paths, MAX_INPUTS + 1))
    if not paths:
        raise InputError(f"{source}: {nothing}")
    return paths


def _is_own(path, own):
    real = os.path.realpath(path)
    return any(real == each or real.startswith(each + os.sep) for each in own)


def _matches(pattern, own, left_out):
    """What a shell would make of a pattern; folders among it are walked, unless ** has done that."""
    root = Path(_root(pattern))
    below = pattern.relative_to(root)
    asks_for_hidden = any(part.startswith(".") for part in below.parts)
    try:
        # Of pathlib and not of glob, which follows links of folders to themselves.
        for path in root.glob(str(below)):
            if not asks_for_hidden and any(part.startswith(".") for part in path.relative_to(root).parts):
                continue
            if _is_own(path, own):
                left_out.own.append(str(path))
            elif not path.is_dir():
                yield path
            elif "**" not in below.parts:
                yield from _walk(path, own, left_out)
    except ValueError as error:
        raise InputError(f"{pattern}: not a pattern: {error}") from None
    except OSError as error:
        raise InputError(f"{pattern}: cannot be looked for: {files.io_error_text(error)}") from None


def _walk(folder, own, left_out):
    """All files below a folder but hidden ones. Links to folders are not followed: they may lead anywhere, or in a circle."""
    folders = [(folder, os.path.realpath(folder))]
    while folders:
        current, real = folders.pop()
        try:
            with os.scandir(current) as entries:
                for entry in entries:
                    path = Path(current, entry.name)
                    if entry.name.startswith("."):
                        continue
                    if os.path.join(real, entry.name) in own:
                        left_out.own.append(str(path))
                    elif entry.is_dir(follow_symlinks=False):
                        folders.append((path, os.path.join(real, entry.name)))
                    elif entry.is_dir():
                        left_out.links.append(str(path))
                    else:
                        yield path
        except OSError as error:
            if current is folder:
                raise InputError(f"{folder}: cannot read it: {files.io_error_text(error)}") from None
            left_out.unreadable.append(f"{current} ({files.io_error_text(error)})")


class _LeftOut:
    def __init__(self):
        self.own, self.links, self.unreadable = [], [], []

    def report(self):
        for what, names in (
            ("is where this command writes", self.own),
            ("links to folders, which are not followed", self.links),
            ("folders that cannot be read", self.unreadable),
        ):
            if names:
                print(f"left out: {some(names)}: {what}", file=sys.stderr)


def some(names):
    """The first five of the names, for a line."""
    names = list(map(lite.one_line, names))
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def _stems(names):
    """Name -> what its outputs are called. No two are alike, nor is one like a frame of another's video."""
    bare = {name: str(PurePosixPath(name).with_name(PurePosixPath(name).stem)) for name in names}
    # Annotations beside their pictures get no outputs that could be mistaken for these'.
    times = Counter(stem for name, stem in bare.items() if not name.lower().endswith(NO_PICTURES))
    frames = {match[1] for stem in bare.values() if (match := re.fullmatch(r"(.*)_\d{6,}", stem))}
    taken = set(bare)
    stems = {}
    for name, stem in bare.items():
        is_clear = (
            not name.lower().endswith(NO_PICTURES)
            and times[stem] == 1
            and (stem == name or stem not in taken)
            and stem not in frames
        )
        stems[name] = _short(stem if is_clear else name)
    return stems


def _short(stem):
    folder, _, name = stem.rpartition("/")
    content = os.fsencode(name)
    if len(content) > MAX_NAME:
        name = f"{content[: MAX_NAME - 20].decode(errors='ignore')}~{hashlib.sha256(content).hexdigest()[:12]}"
    return f"{folder}/{name}" if folder else name


def pictures(found, ids, *, read=read_image, every=1, **options) -> Iterator[Picture]:
    """The pictures of inputs, one after the other: of a video its frames 0, `every`, 2 x `every`, ....

    ids: Input -> image id; a frame's is its stem. read: what reads an image file. options: exif and bit_depth, see
    lite.read_image. Reading is up to the caller: frames have to be read before the next one is asked for.
    """
    for entry in found:
        notes: list = []  # a list of their own for all the frames of a video, which are noted of each
        if entry.is_video:
            for number, frame in video.frames(entry.path, every, exif=options.get("exif", "ignore"), notes=notes):
                stem = entry.stem if number is None else f"{entry.stem}_{number:06}"
                yield Picture(entry, entry.name if number is None else stem, stem, stem, None, frame, notes)
        else:
            source = _stdin if entry.path is None else entry.path
            reading = _reader(read, source, notes, options)
            yield Picture(entry, entry.name, entry.stem, ids[entry], entry.path, reading, notes)


def _reader(read, source, notes, options):
    return lambda: read(source() if callable(source) else source, notes=notes, **options)


def _stdin():
    """The bytes of the image that comes from there."""
    content = sys.stdin.buffer.read(lite.MAX_IMAGE_BYTES + 1)
    if not 0 < len(content) <= lite.MAX_IMAGE_BYTES:
        what = f"more than {lite.MAX_IMAGE_BYTES:,} bytes" if content else "is empty"
        raise InputError(f"stdin: {what}; an image was expected")
    return content
