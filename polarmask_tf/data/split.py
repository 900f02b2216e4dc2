"""One set as training, validation and test sets: by chance, by seed; by groups that stay together; or as the source has it."""

from __future__ import annotations

import collections
import hashlib
import posixpath
import re
import typing

from polarmask_tf.data.report import Report
from polarmask_tf.errors import InputError, counted

NAMES = ("train", "val", "test")


def sets_of(
    images: list[dict], fractions: typing.Sequence[float], seed: int, group: str | None, report: Report
) -> dict[str, list[dict]]:
    """{"train": images, "val": ..., "test": ...}, or {"": images} where neither the source nor `fractions` split.

    Args:
      images: as combine.combine makes them, with "content" of those that combine.mark_duplicates found alike.
      fractions: of images, for val and test; none: as the source has it, whatever has no split being "train".
      seed: of the order in which images, or groups, are drawn; an image's place depends on its name and not on others'.
      group: "folder", or a regular expression whose first group in an image's name says what stays together; None: every
        image for itself. Pictures with the same bytes stay together in any case.

    Raises InputError where there are too few groups.
    """
    own = [image["split"] for image in images]
    if not fractions:
        if group is not None:
            raise InputError("--group says what --split keeps together; give --split too")
        if not any(own):
            return {"": images}
        sets = {name: [i for i in images if (i["split"] or "train") == name] for name in NAMES}
        if without := [image for image in images if not image["split"]]:
            report.note("image of a source without splits, taken to train", without[0]["file_name"], len(without))
        sets = {name: members for name, members in sets.items() if members}
    else:
        if len({*own}) > 1:
            report.note("image whose own split was given up for --split", images[0]["file_name"], len(images))
        sets = _drawn(images, fractions, seed, group, report)
    _tell_shared(sets, report)
    return sets


def _drawn(images, fractions, seed, group, report):
    if not 1 <= len(fractions) <= 2 or not all(0 < f < 1 for f in fractions) or sum(fractions) >= 1:
        raise InputError(
            f"--split {','.join(f'{f:g}' for f in fractions)}: give the fraction of val, or of val and test, like 0.1,0.1"
        )
    groups, joined = _groups(images, group, report)

    def chance(key):
        return hashlib.blake2b(f"{seed}\0{key}".encode(errors="surrogatepass")).digest()

    order = sorted(groups, key=chance)
    if len(order) <= len(fractions):
        what = counted(len(order), "image" if group is None else "group")
        what += f" (of {len(order) + joined}, those with a picture of equal bytes being one)" if joined else ""
        advice = "give more images" if group is None else "choose another --group" + ", or remove copies" * bool(joined)
        raise InputError(f"--split: {what} cannot be split into {len(fractions) + 1} sets; {advice}")
    sets: dict[str, list[int]] = {}
    for place, (name, fraction) in enumerate(zip(NAMES[1:], fractions, strict=False)):
        target, taken = max(1, round(fraction * len(images))), []
        spare = len(fractions) - place  # groups that the sets after this one need
        for key in list(order):
            if len(order) > spare and len(taken) < target and len(taken) + len(groups[key]) / 2 <= target:
                taken += groups[key]
                order.remove(key)
        if not taken:  # all groups are large
            order.remove(least := min(order, key=lambda key: len(groups[key])))
            taken = groups[least]
        sets[name] = sorted(taken)
    sets["train"] = sorted(index for key in order for index in groups[key])
    return {name: [images[index] for index in sets[name]] for name in NAMES if name in sets}


def _groups(images, group, report):
    """({key: indices of the images that stay together}, how many groups went into others that have the same picture)."""
    if group not in (None, "folder"):
        try:
            pattern = re.compile(group)
        except (re.error, RecursionError, OverflowError) as error:
            raise InputError(f"--group {group}: neither 'folder' nor a regular expression: {error}") from None
        if not pattern.groups:
            raise InputError(f"--group {group}: has no group in parentheses, like '^(patient[0-9]+)_'")
    keys = []
    for image in images:
        name = image["file_name"]
        key = f"{image['source']}\0{name}"
        if group == "folder":
            key = f"{image['source']}\0{posixpath.dirname(name)}"
        elif group is not None:
            match = pattern.search(name)
            if match and match[1] is not None:
                key = match[1]
            else:
                report.note("image whose name --group does not match, a group for itself", name)
        keys.append(key)
    before, keys = len({*keys}), _joined(keys, [image.get("content") for image in images])
    groups = collections.defaultdict(list)
    for index, key in enumerate(keys):
        groups[key].append(index)
    return groups, before - len(groups)


def _joined(keys, contents):
    """Keys, of which those that share a content are one: the least of them."""
    leader: dict[str, str] = {}

    def lead(key):
        while (above := leader.get(key, key)) != key:
            key = above
        return key

    of_content: dict[str, str] = {}
    for key, content in zip(keys, contents, strict=True):
        if content is not None:
            one, two = sorted((lead(key), lead(of_content.setdefault(content, key))))
            if one != two:
                leader[two] = one
    return [lead(key) for key in keys]


def _tell_shared(sets, report):
    """Names pictures that are in more than one set."""
    where = collections.defaultdict(dict)
    for name, members in sets.items():
        for image in members:
            if content := image.get("content"):
                where[content].setdefault(name, image["file_name"])
    for found in where.values():
        if len(found) > 1:
            shown = " and ".join(f"{file_name} ({name})" for name, file_name in found.items())
            report.note("picture that is in several splits: what is measured there has been seen in training", shown)
