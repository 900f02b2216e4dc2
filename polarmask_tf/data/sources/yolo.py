"""YOLO-seg: one text file a picture, a line an object: class x y x y ... as fractions of width and height.

A data.yaml names classes and splits; without one, pictures lie in images/ and their files in labels/, or side by side.
"""

from __future__ import annotations

import itertools
import os
import posixpath
import re
from pathlib import Path

from polarmask_tf import config
from polarmask_tf.data.report import Report, Unusable
from polarmask_tf.data.sources.folder import Folder, Names, is_picture, stem, walk
from polarmask_tf.data.sources.source import BOX, ONE_CLASS, RECTANGLE, SPLITS, Builder, Source, class_name, skip_image, text_of
from polarmask_tf.errors import InputError
from polarmask_tf.files import io_error_text, read_file

_MOST_YAML, _MOST_LABELS, _MOST_LIST = 2**20, 200 * 2**20, 2**30  # bytes
_MOST_CLASSES = 100_000
_LISTS = ("classes.txt", "obj.names", "labels.txt", "predefined_classes.txt")  # names of classes, one a line
_YAML = ("data.yaml", "data.yml", "dataset.yaml", "dataset.yml")
_DECIMAL_COMMA = re.compile(r"-?\d+(,\d+)?")
_IMAGES = ("images", "obj_train_data")


def yaml_of(path: Path) -> Path | None:
    """The file in a folder that is a YOLO data set's, if any."""
    files = sorted(f for f in path.iterdir() if f.suffix in (".yaml", ".yml") and os.path.isfile(f))
    files.sort(key=lambda f: f.stem not in ("data", "dataset"))
    for file in files:
        try:
            content = config.parse(text_of(read_file(file, _MOST_YAML)), _MOST_YAML)
        except (OSError, ValueError):
            continue
        if isinstance(content, dict) and "names" in content and ("train" in content or "val" in content):
            return file
    return None


def is_folder(folder: Folder) -> bool:
    """Whether pictures have label files: texts of which the first line is a number and at least four more."""
    label_files = Names(folder.names(".txt"))
    found = filter(None, (_label_file(name, label_files) for name in folder.files))
    for name in itertools.islice(found, 50):
        try:
            words = _words(text_of(read_file(folder.root / name, _MOST_LABELS)).split("\n", 1)[0])[0]
            if len([float(word) for word in words]) > 4:
                return True
        except (OSError, ValueError):
            continue
    return False


def read(path: Path, report: Report, folder: Folder, allow_outside: bool = False) -> list[Source]:
    """A data.yaml, the folder of one, or a folder with images/ and labels/. One source for each split."""
    file = path if not os.path.isdir(path) else yaml_of(path)
    for name in _YAML if file is None else ():
        if os.path.isfile(path / name):
            _yaml(path / name)  # which says why it cannot be read: without it classes would be numbers
    names = _names_in_yaml(file) if file else _names_in_list(path)
    parts = _parts(file, folder, allow_outside, report) if file else _parts_of_folders(folder)
    texts = folder.names(".txt")
    sources, label_files = [], Names(texts)
    known: set[int] = set()
    read_files: set[str] = set()
    builders = {}
    for split, pictures in parts.items():
        builders[split] = builder = Builder(folder.most_pixels)
        _read(pictures, builder, report, folder, label_files, read_files, names, known)
    pictures = sum(map(len, parts.values()))
    if not read_files and pictures:
        beside = "labels/ beside images/, or in one folder with the pictures"
        raise InputError(f"{file or path}: none of its {pictures:,} pictures has a label file; expected are {beside}")
    for name in sorted({*texts} - read_files):
        if "labels" in name.split("/")[:-1]:
            report.skip("label file without a picture", name)
    if names is None:
        names = {index: str(index) for index in known} or {0: ONE_CLASS}  # the second: of files without an outline
        if known:
            what = "classes without names, called by their numbers (data.yaml or classes.txt would name them)"
            report.note(what, f"{path}: {', '.join(map(str, sorted(known)[:10]))}")
    for split, builder in builders.items():
        order = sorted(names)
        label_of = {index: label for label, index in enumerate(order)}
        for image in builder.images:
            for annotation in image["annotations"]:
                annotation["label"] = label_of[annotation.pop("class")]
        classes = [{"name": names[index], "category_id": index} for index in order]
        sources.append(Source(file or path, "yolo", builder.images, classes, folder.root, split))
    return sources


def _read(pictures, builder, report, folder, label_files, read_files, names, known):
    of_label: dict[str, str] = {}
    for picture in pictures:
        label_file = _label_file(picture, label_files)
        if label_file and label_file in of_label:
            report.skip("picture with the stem of another, whose label file is the same", f"{picture}, {of_label[label_file]}")
            continue
        lines = []
        if label_file:
            of_label[label_file] = picture
            read_files.add(label_file)
            try:
                text = text_of(read_file(folder.root / label_file, _MOST_LABELS))
            except (OSError, ValueError) as error:
                what = io_error_text(error) if isinstance(error, OSError) else "no text in UTF-8 or UTF-16"
                report.skip("label file that cannot be read, and its picture", f"{label_file}: {what}")
                continue
            for number, line in enumerate(text.splitlines(), 1):
                words, has_commas = _words(line)
                if words:
                    lines.append((number, words))
                if has_commas:
                    report.note("line with decimal commas, taken for points", f"{label_file}, line {number}")
        try:
            image = builder.image(picture, folder.size(picture))
        except Unusable as reason:
            skip_image(report, reason, picture, len(lines))
            continue
        if not label_file:
            report.note("picture without a label file: background", picture)
        elif not lines:
            report.note("picture with an empty label file: background", picture)
        for number, words in lines:
            try:
                index, outline = _line(words, image, names)
            except Unusable as reason:
                report.skip_object(reason, f"{label_file}, line {number}")
                continue
            known.add(index)
            if len(outline) == 8 and _is_rectangle(outline):  # as YOLO-OBB has them, and boxes that a tool turned into polygons
                report.note(RECTANGLE, f"{label_file}, line {number}")
            builder.add(image, index, [outline])


def _words(line):
    """(words of a line, whether they had the decimal commas of some spreadsheets and languages: 0 0,25 0,5 ...)."""
    words = line.split()
    if len(words) > 4 and all(_DECIMAL_COMMA.fullmatch(word) for word in words[1:]) and any("," in word for word in words[1:]):
        return [words[0], *(word.replace(",", ".") for word in words[1:])], True
    return words, False


def _line(words, image, names):
    """(class, [x, y, ...] in pixels) of one line."""
    try:
        number = float(words[0])
        values = [float(word) for word in words[1:]]
    except ValueError:
        raise Unusable("line that is not a class and numbers", " ".join(words)[:50]) from None
    if not number.is_integer() or not 0 <= number < _MOST_CLASSES or (names is not None and int(number) not in names):
        raise Unusable("class number that the data set does not name", words[0][:50])
    if len(values) in (4, 5):  # the fifth: a detector's score
        raise Unusable(BOX)
    if len(values) % 2:
        raise Unusable("line with an odd number of coordinates")
    if any(abs(value) > 1.5 for value in values):  # what is infinite or absurd, too; NaN is told by convert
        raise Unusable("coordinates that are not fractions of width and height")
    size = image["width"], image["height"]
    return int(number), [value * size[k % 2] for k, value in enumerate(values)]


def _is_rectangle(outline):
    """Whether four corners [x, y, ...] are those of a rectangle, also a turned one, to a hundredth of its size."""
    a, b, c, d = (complex(*outline[at : at + 2]) for at in (0, 2, 4, 6))
    slack = 0.01 * max(abs(c - a), abs(d - b))
    return abs(a + c - b - d) <= slack and abs(abs(c - a) - abs(d - b)) <= slack


def _label_file(picture, label_files):
    """labels/ for the last images/ of the path, as Ultralytics has it, or beside the picture."""
    own = f"{stem(picture)}.txt"
    parts = own.split("/")
    for index in reversed(range(len(parts) - 1)):
        if parts[index] in _IMAGES[:1]:
            name = "/".join([*parts[:index], "labels", *parts[index + 1 :]])
            return label_files.get(name)
    return label_files.get(own)


def _names_in_yaml(file):
    content = _yaml(file)
    names = content.get("names")
    entries = dict(enumerate(names)) if isinstance(names, list) else names
    if not isinstance(entries, dict) or not entries or len(entries) > _MOST_CLASSES:
        raise InputError(f"{file}: 'names' must be a list of class names, or an object of number: name")
    try:
        return {_index(index): class_name(name) for index, name in entries.items()}
    except (Unusable, ValueError):
        raise InputError(f"{file}: 'names' has a number or a name that is none") from None


def _index(value):
    index = int(value) if isinstance(value, str) else value
    if type(index) is not int or not 0 <= index < _MOST_CLASSES:
        raise ValueError(index)
    return index


def _names_in_list(path):
    for name in _LISTS:
        for folder in (path, path / "labels"):
            if os.path.isfile(folder / name):
                try:
                    lines = text_of(read_file(folder / name, _MOST_YAML)).splitlines()
                    return {index: class_name(line) for index, line in enumerate(lines) if line.strip()}
                except (OSError, ValueError, Unusable) as error:
                    raise InputError(f"{folder / name}: cannot be read as names of classes, one a line: {error}") from None
    return None


def _yaml(file):
    try:
        content = config.parse(text_of(read_file(file, _MOST_YAML)), _MOST_YAML)
    except FileNotFoundError:
        raise InputError(f"{file}: no such file") from None
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {io_error_text(error)}") from None
    except ValueError as error:
        raise InputError(f"{file}: not valid YAML: {error}") from None
    if not isinstance(content, dict):
        raise InputError(f"{file}: holds no settings of a YOLO data set ('names', 'train', 'val')")
    return content


def _parts(file, folder, allow_outside, report):
    """{split: pictures} of a data.yaml; InputError where it leads nowhere, or out of the folder."""
    content, parts = _yaml(file), {}
    if "kpt_shape" in content:
        raise InputError(f"{file}: is a set of poses (kpt_shape): its lines are boxes and keypoints, and outlines are needed")
    for key in ("train", "val", "test"):
        entries = content.get(key)
        for entry in entries if isinstance(entries, list) else [entries]:
            if entry is None or entry == "":
                continue
            if not isinstance(entry, str) or "\0" in entry:
                raise InputError(f"{file}: '{key}' must be a path, or a list of paths")
            place = _place(file, content.get("path"), entry, folder, allow_outside)
            if place is None:
                if key == "test":  # which many sets name and do not bring
                    report.note("split of data.yaml that is not there", f"{file.name}: test: {entry}")
                    continue
                raise InputError(
                    f"{file}: '{key}: {entry}' leads to no file or folder in {folder.root}; "
                    "mend the path, or give the folder that holds both"
                )
            parts.setdefault(key, []).extend(_pictures(place, folder, file, allow_outside))
    if not parts:
        raise InputError(f"{file}: names no 'train' or 'val' pictures")
    if content.get("train") == content.get("val"):  # as in the smallest examples
        report.note("'train' and 'val' are the same pictures, taken as 'train' alone", str(file))
        parts.pop("val", None)
    return {split: list(dict.fromkeys(pictures)) for split, pictures in parts.items()}


def _place(file, base, entry, folder, allow_outside):
    """Where an entry leads. Exports of Roboflow write ../train/images and mean train/images."""
    bases = [file.parent / base] if isinstance(base, str) and base and "\0" not in base else []
    inner = entry.replace("\\", "/")
    while inner.startswith(("../", "./")):
        inner = inner.split("/", 1)[1]
    for candidate in [*(b / entry for b in (*bases, file.parent)), file.parent / inner]:
        real = Path(os.path.realpath(candidate))
        if os.path.exists(real) and (allow_outside or real == folder.root or folder.root in real.parents):
            return real
    return None


def _pictures(place, folder, file, allow_outside):
    """Of a folder, or of a text file with one path a line."""
    if os.path.isdir(place):
        base = os.path.relpath(place, folder.root).replace(os.sep, "/")
        return [name if base == "." else f"{base}/{name}" for name in walk(place, allow_outside) if is_picture(name)]
    try:
        lines = text_of(read_file(place, _MOST_LIST)).splitlines()
    except (OSError, ValueError) as error:
        raise InputError(f"{place}: cannot be read as a list of pictures, which {file.name} names: {error}") from None
    near = os.path.relpath(place.parent, folder.root).replace(os.sep, "/")
    names = []
    for line in filter(None, map(str.strip, lines)):
        try:
            names.append(folder.find(line, near))
        except Unusable:
            names.append(posixpath.normpath(line))  # named as missing when its size is asked for
    return names


def _parts_of_folders(folder):
    """{split: pictures} by the folders' names: images/train or train/images; {"": all of them} where there are none."""
    parts: dict[str, list[str]] = {}
    for name in folder.files:
        if "labels" in (folders := name.split("/")[:-1]):
            continue
        split = next((SPLITS[part] for part in folders if part in SPLITS), "")
        parts.setdefault(split, []).append(name)
    if "" in parts and len(parts) > 1:
        raise InputError(
            f"{folder.root}: {len(parts['']):,} pictures lie in no split, like {parts[''][0]}, and others in "
            f"{', '.join(filter(None, parts))}; give one of these folders"
        )
    return parts
