"""Which format a file or a folder of annotations has, by what is in it; and reading it."""

from __future__ import annotations

import collections
import functools
import itertools
import os
import re
import typing
from pathlib import Path

from polarmask_tf.data.report import Report
from polarmask_tf.data.sources import FORMATS, coco, cvat, labelme, labelstudio, masks, via, yolo
from polarmask_tf.data.sources.folder import Folder, beside, is_picture, walk
from polarmask_tf.data.sources.source import SPLITS, Source, load_json
from polarmask_tf.errors import InputError
from polarmask_tf.lite import MAX_PIXELS

_MOST_SNIFFED = 200  # JSON files of a folder that are looked into
# Names of files of other programs, and how these write what is read here.
_FOREIGN = {
    r"(^|/)ann/[^/]+\.json$": "of a Supervisely project: export it there as COCO, or as 'YOLOv8 segmentation'",
    r"_seg\.npy$": "of Cellpose, and not read, since it may hold code: save the masks there as PNG, NAME_cp_masks.png",
    r"\.geojson$": "GeoJSON, of QuPath, say: export label images there, and put masks/NAME.tif beside images/NAME.tif",
    r"(^|/)via[^/]*\.csv$": "of the VGG Image Annotator: Annotation, Export Annotations (as json) there",
    r"\.(zip|tar|t?gz|7z|rar)$": "is an archive; unpack it, and give the folder",
}


class _Options(typing.NamedTuple):
    """How pictures are found: `images` is their folder, None if it is to be found."""

    images: Path | None
    exif: str
    allow_outside: bool
    progress: bool
    most_pixels: int

    def folder(self, default: Path) -> Folder:
        return Folder(self.images or default, self.exif, self.allow_outside, self.most_pixels)

    def both(self, path: Path) -> Folder:
        """The folder of annotations that are files beside or below the pictures, and so of both."""
        if self.images and os.path.realpath(self.images) != os.path.realpath(path):
            what = "of YOLO and of masks the folder that holds pictures and annotations is SOURCE itself"
            raise InputError(f"{self.images}: {what}; leave IMAGES out")
        return self.folder(path)

    def find(self, path: Path, split: str) -> typing.Callable[[list[str]], Folder]:
        """A function from the names of pictures to the folder that has them, near the file `path`."""
        return lambda names: self.folder(self.images or beside(path, names, split))


def read(
    path: Path,
    report: Report,
    *,
    format: str | None = None,
    images: Path | None = None,
    exif: str = "auto",
    allow_outside: bool = False,
    progress: bool = False,
    most_pixels: int = MAX_PIXELS,
) -> list[Source]:
    """The sets that a file or a folder of annotations holds: one, or one for each split that it brings.

    Args:
      format: one of FORMATS; None: by what is there.
      images: the folder of the pictures; None: found near the annotations.
      exif, allow_outside: see convert.convert.
      progress: a bar where masks are decoded.
      most_pixels: of a picture; larger ones are skipped.

    Nothing is decoded but masks; sizes are read from headers where the annotations lack them. What cannot be used is counted
    in `report`. Raises InputError where nothing is recognised, and where a file as a whole is not usable.
    """
    path = Path(path)
    if format not in (None, *FORMATS):
        raise InputError(f"format is {format!r}; it must be one of {', '.join(FORMATS)}")
    if not os.path.exists(path):
        raise InputError(f"{path}: no such file or folder; give the annotations, or the folder that holds them")
    if images is not None and not os.path.isdir(images):
        raise InputError(f"{images}: no such directory; give the one that holds the image files")
    options = _Options(images and Path(images), exif, allow_outside, progress, most_pixels)
    if os.path.isdir(path):
        sources = _folder(path, report, format, options) or _split_folders(path, report, format, options)
    else:
        sources = _file(path, report, format, options)
    if sources and os.path.isdir(path) and format is None:
        _tell_others(path, sources[0].format, report)
    if not sources:
        if os.path.isfile(path / "dataset.json") or os.path.isfile(path / "train" / "dataset.json"):
            raise InputError(f"{path}: is converted already; give the annotations and pictures that it was made from")
        raise InputError(f"{path}: {_why_not(path)}")
    if len({source.split for source in sources}) == 1:
        sources = [source._replace(split="") for source in sources]
    return sources


def _tell_others(path, found, report):
    """A note where a folder has labels in a format other than the one that was read."""
    folder = Folder(path)
    others = {
        "yolo": lambda: yolo.is_folder(folder),
        "labelme": lambda: any(_is_labelme(path / name) for name in _some_below(path, ".json")),
        "cvat": lambda: (path / "annotations.xml").is_file(),
    }
    names = [name for name, there in others.items() if name != found and there()]
    if names:
        what = f"annotations of another format in the same folder, not read (--format {names[0]} reads them instead)"
        report.note(what, f"{path}: read as {found}, and there is {' and '.join(names)}")


def kind_of(document) -> str:
    """The format of a JSON file's content; "" for none that is known."""
    for name, module in (("labelme", labelme), ("via", via), ("labelstudio", labelstudio), ("coco", coco)):
        if module.is_one(document):
            return name
    return ""


def _file(path, report, format, options, split="", document=None) -> list[Source]:
    foreign = (advice for pattern, advice in _FOREIGN.items() if re.search(pattern, path.name, re.IGNORECASE))
    if advice := next(foreign, ""):
        raise InputError(f"{path}: {advice}")
    if is_picture(path.name):
        raise InputError(f"{path}: is a picture; give the file, or the folder, with the annotations")
    format = format or {".xml": "cvat", ".yaml": "yolo", ".yml": "yolo"}.get(path.suffix.lower())
    if format == "cvat":
        return [cvat.read(path, report, options.find(path, split))]
    if format == "yolo":
        return yolo.read(path, report, options.both(path.parent), options.allow_outside)
    if format == "masks":
        return masks.read(path, report, options.both(path.parent), options.progress)
    if document is None:
        document = load_json(path)
    format = format or kind_of(document) or "coco"  # whose reader says what the file is instead
    if format == "labelme":
        return [labelme.read(path, report, options.folder(path.parent))]
    if format == "coco":
        coco.check(path, document)
        folder = options.find(path, split)(coco.names_of(document))
        return [Source(path, "coco", *coco.read(path, report, folder, document), folder.root, split)]
    module = {"via": via, "labelstudio": labelstudio}[format]
    if not module.is_one(document):
        raise InputError(f"{path}: is no file of {format}; leave --format out, or give another")
    return [module.read(path, report, document, options.find(path, split))]


def _folder(path, report, format, options) -> list[Source]:
    """What lies in a folder itself; nothing if it holds only folders of splits, or nothing that is known."""
    if format == "yolo" or (format is None and yolo.yaml_of(path)):
        return yolo.read(path, report, options.both(path), options.allow_outside)
    if format == "masks":
        return masks.read(path, report, options.both(path), options.progress)
    if format != "cvat" and (found := _json_files(path, format)):
        kind, documents = found
        if kind == "labelme":
            return [labelme.read(path, report, options.folder(path))]
        return _files(path, documents, functools.partial(_file, report=report, format=kind, options=options))
    if format in (None, "cvat"):
        files = _in(path, ".xml")
        files = [file for file in files if file.name == "annotations.xml"] or files
        if files and not (path / "SegmentationObject").is_dir():
            cvat.check(files[0])
            return _files(path, dict.fromkeys(files), functools.partial(_file, report=report, format="cvat", options=options))
    if format is None:
        folder = Folder(path, options.exif, options.allow_outside, options.most_pixels)
        if yolo.is_folder(folder):
            return yolo.read(path, report, options.both(path), options.allow_outside)
        if masks.layout(folder):
            return masks.read(path, report, options.both(path), options.progress)
        if not _called_like_splits(path) and any(_is_labelme(path / name) for name in _some_below(path, ".json")):
            return [labelme.read(path, report, options.folder(path))]
    return []


def _split_folders(path, report, format, options) -> list[Source]:
    """The sets of folders train/, valid/, test/ and the like, each of which is one."""
    sources = []
    for folder, split in _called_like_splits(path).items():
        inner = options if options.images is None else options._replace(images=_inside(options.images, folder.name))
        sources += [source._replace(split=split) for source in _folder(folder, report, format, inner)]
    return sources


def _called_like_splits(path):
    folders = {entry: SPLITS[entry.name.lower()] for entry in sorted(path.iterdir()) if entry.name.lower() in SPLITS}
    return {entry: split for entry, split in folders.items() if os.path.isdir(entry)}


def _inside(folder, name):
    return folder / name if os.path.isdir(folder / name) else folder


def _files(path, documents, read_file) -> list[Source]:
    """Of several files the one of each split, by their names (instances_train2017.json)."""
    if len(documents) == 1:
        [(file, document)] = documents.items()
        return read_file(file, document=document, split=_split_in(file) or "")
    by_split = collections.defaultdict(list)
    for file in documents:
        by_split[_split_in(file)].append(file)
    names = ", ".join(file.name for file in list(documents)[:5])
    if "" in by_split or any(len(files) > 1 for files in by_split.values()):
        what = f"holds {len(documents)} files of annotations ({names})"
        raise InputError(f"{path}: {what}; give one of them, and others by --add")
    return [source for split, [file] in by_split.items() for source in read_file(file, document=documents[file], split=split)]


def _split_in(file):
    words = re.split(r"[^a-z]+", file.stem.lower())
    return next((SPLITS[word] for word in words if word in SPLITS), "")


def _json_files(path, format):
    """(format, {file: its content}) of the JSON files in a folder or its annotations/; labelme's are not kept. None if none."""
    files = _in(path, ".json")
    files = [file for file in files if file.name.startswith("instances_")] or files
    of_kind = collections.defaultdict(dict)
    for file in files[:_MOST_SNIFFED]:
        try:
            document = load_json(file)
        except InputError:
            if len(files) == 1:
                raise
            continue
        kind = kind_of(document)
        if kind and format in (None, kind):
            if kind == "labelme":
                return kind, {}
            of_kind[kind][file] = document
    if len(of_kind) > 1:
        names = ", ".join(f"{next(iter(files)).name} ({kind})" for kind, files in of_kind.items())
        raise InputError(f"{path}: annotations of several formats: {names}; give one of them, or --format")
    return next(iter(of_kind.items()), None)


def _in(path, suffix):
    """Files in a folder, else in annotations/ in it."""
    for folder in (path, path / "annotations", path / "Annotations"):
        if os.path.isdir(folder):
            files = [file for file in sorted(folder.iterdir()) if file.suffix.lower() == suffix and os.path.isfile(file)]
            if files := [file for file in files if not file.name.startswith(".")]:
                return files
    return []


def _some_below(path, suffix):
    """Names of the first files of a suffix below a folder."""
    return itertools.islice((name for name in walk(path) if name.lower().endswith(suffix)), 3)


def _is_labelme(file):
    try:
        return labelme.is_one(load_json(file))
    except InputError:
        return False


def _why_not(path):
    """What a folder in which nothing is recognised holds instead, and what to do."""
    if not os.path.isdir(path):
        return f"no annotations recognised: a file of another kind; give --format ({', '.join(FORMATS)})"
    names = list(walk(path))
    counts = collections.Counter(os.path.splitext(name)[1].lower() or "(no suffix)" for name in names)
    seen = (
        "saw " + ", ".join(f"{number} {suffix}" for suffix, number in counts.most_common(5)) if names else "the folder is empty"
    )
    for pattern, advice in _FOREIGN.items():
        if found := next((name for name in names if re.search(pattern, name, re.IGNORECASE)), None):
            return f"{found[:200]}: {advice}"
    if names and all(map(is_picture, names)):
        masks_in = "if some are masks, put them in masks/ beside images/, or call them NAME_masks.png"
        return f"{len(names)} pictures and no annotations: outline the objects first, with labelme, say; {masks_in}"
    if names and not any(map(is_picture, names)):
        return f"holds no pictures ({seen}); give the folder that has them and the annotations"
    if len(files := _in(path, ".json")) == 1 and isinstance(document := load_json(files[0]), dict):
        coco.check(files[0], document)  # which says what it is
    return f"no annotations recognised: {seen}; give --format ({', '.join(FORMATS)})"
