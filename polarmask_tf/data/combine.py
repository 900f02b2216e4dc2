"""Several sources as one list of images: classes united by name, renamed and dropped; pictures with the same bytes found."""

from __future__ import annotations

import collections
import hashlib
import os
from pathlib import Path

from polarmask_tf.data import pictures
from polarmask_tf.data.report import Report, Unusable
from polarmask_tf.data.sources.source import Source
from polarmask_tf.errors import InputError, did_you_mean, nfc
from polarmask_tf.files import read_file

# Also labelme's name for what is to be looked away from.
_BACKGROUND = ("_background_", "__background__", "background", "bg", "__ignore__")
_MOST_BYTES = 2**29  # of a picture that is compared, as of one that is converted


def combine(sources: list[Source], report: Report) -> tuple[list[dict], list[dict]]:
    """(images, classes) of all sources. Images get "folder" (of pictures), "source" (its number) and "split".

    Classes of one name are one; of several category ids it has the first. Ids stay as they are where none is twice.
    """
    classes = _united(sources, report)
    images = []
    for number, source in enumerate(sources):
        for image in source.images:
            images.append(image | {"folder": str(source.folder), "source": number, "split": source.split})
    annotations = [annotation for image in images for annotation in image["annotations"]]
    if any(len({entry["id"] for entry in entries}) < len(entries) for entries in (images, annotations)):
        for entries in (images, annotations):
            for number, entry in enumerate(entries, 1):
                entry["id"] = number
        if coco := [source for source in sources if source.format == "coco"]:
            report.note("sources that share ids: images and annotations are numbered anew", str(coco[0].path))
    return images, classes


def _united(sources, report):
    """The classes of all sources; labels of annotations become those among them."""
    if all(source.classes == sources[0].classes for source in sources):
        return sources[0].classes
    ids: dict = {}  # (name, how many of that name the source had before) -> category id
    taken: set[int] = set()
    keys_of, most = [], 0
    for source in sources:
        before: collections.Counter = collections.Counter()
        keys = []
        for entry in source.classes:
            key = entry["name"], before[entry["name"]]
            before[entry["name"]] += 1
            keys.append(key)
            if key not in ids:
                ids[key] = entry["category_id"] if entry["category_id"] not in taken else most + 1
                taken.add(ids[key])
                most = max(most, ids[key])
            elif ids[key] != entry["category_id"]:
                what = "class with another category id in another source: it has that of the first"
                report.note(what, f"{source.path}: {entry['name']!r} has {entry['category_id']}, and {ids[key]} here")
        keys_of.append(keys)
    order = sorted(ids, key=ids.__getitem__)
    label_of = {key: label for label, key in enumerate(order)}
    for source, keys in zip(sources, keys_of, strict=True):
        for image in source.images:
            for annotation in image["annotations"]:
                annotation["label"] = label_of[keys[annotation["label"]]]
    return [{"name": name, "category_id": ids[name, k]} for name, k in order]


def tell_classes(classes: list[dict], images: list[dict], where: str, report: Report) -> None:
    """Notes names that are the same, or nearly, and those of no class of objects."""
    ids, plain = collections.defaultdict(list), collections.defaultdict(set)
    for entry in classes:
        ids[entry["name"]].append(str(entry["category_id"]))
        plain["".join(entry["name"].lower().split())].add(entry["name"])
    for name, same in ids.items():
        if len(same) > 1:
            what = "categories of one name, which stay different classes: each with an AP of its own, confused with the others"
            report.note(what, f"{where}: {name!r} has the ids {', '.join(same[:10])}")
    for names in plain.values():
        if len(names) > 1:
            shown = " and ".join(map(repr, sorted(names)[:10]))
            report.note("classes whose names differ in case or spaces alone (--classes OLD=NEW makes them one)", shown)
    if not plain.keys().isdisjoint(_BACKGROUND):
        number = collections.Counter(annotation["label"] for image in images for annotation in image["annotations"])
        for label, entry in enumerate(classes):
            if entry["name"].lower() in _BACKGROUND:
                what = f"a class named like the background, one of {len(classes)} classes to train and to average AP over"
                report.note(what, f"{where}: {entry['name']!r} has {number[label]} annotations")


def edit_classes(images: list[dict], classes: list[dict], edits: list[str], report: Report) -> list[dict]:
    """The classes after edits like "old=new" (renames, and unites with a class of that name), "-drop" and "keep".

    With a class to keep, those that no edit names are dropped.

    Annotations follow; those of dropped classes are counted. InputError for a class that there is not, or none that is left.
    """
    names = [entry["name"] for entry in classes]
    becomes: dict[str, str | None] = {}
    only = False
    for edit in map(nfc, edits):
        old, equals, new = edit.partition("=")
        if edit in names or (not equals and not edit.startswith("-")):  # whatever signs its name has
            old = new = edit
            only = True
        elif not equals:
            old, new = edit[1:], ""
        if old not in names:
            known = did_you_mean(old, names) or f"; there are {', '.join(map(repr, names[:20]))}"
            raise InputError(f"--classes {edit}: there is no class {old!r}{known}")
        if old in becomes or (equals and not new.strip()):
            what = "the class is given twice" if old in becomes else "the new name is empty"
            raise InputError(f"--classes {edit}: {what}; write NAME, OLD=NEW or -NAME")
        becomes[old] = new.strip() or None
    target = [becomes.get(name, None if only else name) for name in names]
    united_names = {new for old, new in becomes.items() if new != old}
    kept: list[dict] = []
    label_of: list[int | None] = []
    first: dict[str, int] = {}  # label of the first kept class of a name
    for entry, name in zip(classes, target, strict=True):
        if name is None:
            label_of.append(None)
        elif name in first and name in united_names:
            label_of.append(first[name])
        else:
            first.setdefault(name, len(kept))
            label_of.append(len(kept))
            kept.append({"name": name, "category_id": entry["category_id"]})
    if not kept:
        raise InputError("--classes drops every class; leave one")
    for image in images:
        stay = []
        for annotation in image["annotations"]:
            label = label_of[annotation["label"]]
            if label is None:
                report.note(f"annotation of class {names[annotation['label']]!r}, dropped as asked", _where(image, annotation))
            else:
                stay.append(annotation | {"label": label})
        image["annotations"] = stay
    return kept


def _where(image, annotation):
    return f"image {image['id']}, {image['file_name']}, annotation {annotation['id']}"


def mark_duplicates(images: list[dict], report: Report, allow_outside: bool = False) -> None:
    """Gives images whose files have equal bytes one "content"; the others have none. Each further one is named.

    Only files of equal length are read.
    """
    by_length = collections.defaultdict(list)
    for image in images:
        try:
            path = pictures.find(Path(image["folder"]), image["file_name"], allow_outside)
            by_length[os.stat(path).st_size].append((image, path))
        except (Unusable, OSError):
            continue  # said when it is converted
    first: dict = {}
    for alike in by_length.values():
        for image, path in alike if len(alike) > 1 else ():
            try:
                content = hashlib.blake2b(read_file(path, _MOST_BYTES), digest_size=16).hexdigest()
            except (OSError, MemoryError):
                continue
            other = first.setdefault(content, image)
            if other is not image:
                image["content"] = other["content"] = content
                report.note("picture with the same bytes as another", f"{image['file_name']} is {other['file_name']}")
