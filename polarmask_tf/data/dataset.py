"""`dataset.json`, what a converted data set says about itself: one schema, written and read. No TensorFlow."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from polarmask_tf.errors import InputError, counted, one_line
from polarmask_tf.files import io_error_text, read_file
from polarmask_tf.lite import MAX_CLASSES

FORMAT = "polarmask_tf/1"
_MOST_BYTES = 100 * 2**20
_LARGEST = {"max_instances": 10**6, "max_edges": 10**5}  # they decide how much memory a training batch takes


@dataclass(frozen=True)
class DatasetInfo:
    """A converted data set: a directory of shards and `dataset.json`.

    `classes[label]` is {"name": str, "category_id": int} of the 0-based label; `max_instances` counts the non-crowd
    instances of one image, `max_edges` the polygon edges of one instance. What follows `skipped` is empty in data sets of
    earlier versions.
    """

    directory: Path
    name: str
    num_images: int
    num_instances: int  # crowd regions included
    num_crowd: int
    classes: list[dict]
    max_instances: int
    max_edges: int
    shard_paths: list[Path]
    skipped: dict[str, int]  # what `convert` left out: reason -> how many
    notes: dict[str, int] = field(default_factory=dict)  # what else it said: remark -> how many
    id: str = ""  # of the conversion; the records have it too
    instances_per_image: dict[int, int] = field(default_factory=dict)  # non-crowd instances -> images that have so many
    exif: str = "auto"  # `convert --exif`
    bit_depth: int | None = None  # `convert --bit-depth`
    tile: int | None = None  # `convert --tile`: the images are windows of larger ones, ...
    overlap: int | None = None  # ... which overlap by so many pixels


def load(path) -> DatasetInfo:
    """Reads `dataset.json` of a converted data set (a directory); what has been loaded is returned as it is.

    Raises InputError for a missing directory, a missing or broken dataset.json, a missing shard.
    """
    if isinstance(path, DatasetInfo):
        return path
    again = "run `polarmask convert` to make it"
    if not os.path.isdir(path):  # unlike Path.is_dir, no error for what may not be looked at
        raise InputError(f"{path}: no such directory; give the output directory of `polarmask convert`")
    directory = Path(path).resolve()
    file = directory / "dataset.json"
    if not os.path.isfile(file):
        sets = [Path(path, name) for name in ("train", "val", "test")]
        below = [str(each) for each in sets if os.path.isfile(each / "dataset.json")]
        if below:
            raise InputError(f"{path}: is not one converted set, but holds {', '.join(below)}; name one")
        raise InputError(f"{path}: holds no dataset.json, so it is not a (completely) converted data set; {again}")
    try:
        content = json.loads(read_file(file, _MOST_BYTES))
        if not isinstance(content, dict):
            raise ValueError(f"a {type(content).__name__}, not an object")
        if "format" not in content and os.path.isfile(directory / "config.yaml"):
            raise InputError(f"{path}: is the run directory of a training; give a directory that `polarmask convert` made")
        if content.get("format") != FORMAT:
            raise InputError(f"{file}: format {_shown(content.get('format'))}, this version reads {FORMAT!r}; {again} anew")
        info = _parse(directory, content)
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {io_error_text(error)}") from None
    except (ValueError, RecursionError, MemoryError) as error:
        raise InputError(f"{file}: broken ({error}); {again} anew") from None
    missing = [shard.name for shard in info.shard_paths if not os.path.isfile(shard)]
    if missing:
        raise InputError(f"{path}: {len(missing)} of {len(info.shard_paths)} shards missing, first {missing[0]}; {again} anew")
    return info


def _parse(directory, content) -> DatasetInfo:
    """ValueError names what does not fit the schema."""
    counts = {
        key: _whole(content, key, _LARGEST.get(key, 2**53))
        for key in ("num_images", "num_instances", "num_crowd", "max_instances", "max_edges")
    }
    shards = content.get("shards")
    if not isinstance(shards, list) or not shards or not all(isinstance(s, str) and s and s == Path(s).name for s in shards):
        raise ValueError("'shards' is not a list of file names")
    per_image = {int(number): images for number, images in _counts(content, "instances_per_image", str.isdecimal).items()}
    if per_image and sum(per_image.values()) != counts["num_images"]:
        raise ValueError("'instances_per_image' counts other images than 'num_images'")
    return DatasetInfo(
        directory=directory,
        name=_text(content, "name"),
        classes=parse_classes(content.get("classes")),
        shard_paths=[directory / name for name in shards],
        skipped=_counts(content, "skipped"),
        notes=_counts(content, "notes"),
        id=_text(content, "id", ""),
        instances_per_image=per_image,
        exif=_text(content, "exif", "auto"),
        bit_depth=None if content.get("bit_depth") is None else _whole(content, "bit_depth", 32),
        **{key: None if content.get(key) is None else _whole(content, key, 2**31) for key in ("tile", "overlap")},
        **counts,
    )


def parse_classes(value) -> list[dict]:
    """Checked classes out of JSON: [{"name", "category_id"}, ...] with different ids. ValueError names what is wrong."""
    if not isinstance(value, list) or not value:
        raise ValueError('\'classes\' is not a list of {"name", "category_id"}')
    if len(value) > MAX_CLASSES:
        raise ValueError(f"{len(value):,} classes, and the limit is {MAX_CLASSES:,}")
    for entry in value:
        if not isinstance(entry, Mapping) or not isinstance(entry.get("name"), str):
            raise ValueError("a class has no 'name'")
        entry["name"].encode()  # a UnicodeEncodeError, half a character, is a ValueError
        if type(entry.get("category_id")) is not int or not -(2**63) <= entry["category_id"] < 2**63:
            raise ValueError(f"class {entry['name']!r} has no integer 'category_id'")
    if len({entry["category_id"] for entry in value}) < len(value):
        raise ValueError("two classes have one 'category_id'")
    return [{"name": entry["name"], "category_id": entry["category_id"]} for entry in value]


def _is_count(value, most=2**53):
    return type(value) is int and 0 <= value <= most


def _whole(content, key, most):
    value = content.get(key)
    if not _is_count(value, most):
        raise ValueError(f"'{key}' is {_shown(value)}, not a whole number from 0 to {most}")
    return value


def _text(content, key, default=None):
    value = content.get(key, default)
    if not isinstance(value, str):
        raise ValueError(f"'{key}' is {_shown(value)}, not text")
    return value


def _counts(content, key, is_key=lambda text: True):
    value = content.get(key, {} if key != "skipped" else None)
    if not isinstance(value, dict) or not all(is_key(text) and _is_count(count) for text, count in value.items()):
        raise ValueError(f"'{key}' is not an object of counts")
    return value


def _shown(value):
    return one_line(repr(value), 80) if isinstance(value, (str, int, float)) else f"a {type(value).__name__}"


def converted_again(info: DatasetInfo) -> str:
    """A line that says that the directory holds another conversion than `info`; "" otherwise."""
    try:
        same = load(info.directory).id == info.id
    except InputError:
        return ""
    again = "was converted again while it was in use; start anew, or convert into another directory"
    return "" if same else f"{info.directory}: {again}"


def dump(info: DatasetInfo) -> str:
    """The text of a `dataset.json` beside the shards, which `load` reads."""
    content = asdict(info)
    del content["directory"]
    content["shards"] = [path.name for path in content.pop("shard_paths")]
    return json.dumps({"format": FORMAT, **content}, indent=1)


def require_objects(info: DatasetInfo) -> None:
    """InputError for a data set to train on in which no object is."""
    if info.num_instances > info.num_crowd:
        return
    what = "only crowd regions, which training ignores" if info.num_crowd else "no object at all"
    see = "see what `polarmask convert` says of the annotations (single objects marked as crowds: --crowd-as-instances)"
    raise InputError(f"{info.directory}: {counted(info.num_images, 'image')} with {what}: nothing to train on; {see}")


def surplus(info: DatasetInfo, max_instances: int) -> tuple[int, int]:
    """(images, objects) beyond `max_instances` an image (data.max_instances), whose places training ignores.

    Of a data set of an earlier version, which has no counts an image, the least that there are.
    """
    counts = info.instances_per_image or {info.max_instances: 1}
    beyond = [(number - max_instances, images) for number, images in counts.items() if number > max_instances]
    return sum(images for _, images in beyond), sum(more * images for more, images in beyond)
