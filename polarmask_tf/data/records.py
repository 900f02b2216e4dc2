"""The record schema, both ways: one tf.train.Example an image with Model Garden's key names, `dataset.json` beside.

The writer needs no TensorFlow (importing it takes seconds in each process of `convert`): an Example is four nested
protobuf messages; tfrecord.py puts them into files. The readers import TensorFlow when called.

Source of the format: tensorflow/core/example/example.proto; key names: official/vision/dataloaders/tf_example_decoder.py of
Model Garden.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from polarmask_tf.data import dataset, segmentation
from polarmask_tf.data.dataset import DatasetInfo

# write_record too: who writes records needs this module alone.
from polarmask_tf.data.tfrecord import DamagedShard, count_records, read_shard, write_record  # noqa: F401
from polarmask_tf.errors import InputError
from polarmask_tf.files import io_error_text
from polarmask_tf.lite import MAX_PIXELS

REPAIR_HINT = "run `polarmask convert` again, or go on without the rest of the shard: data.damaged=skip"
CONVERTED_SINCE = "a record of another conversion than dataset.json: converted again while it was in use, or files mixed"
_AGAIN = "run `polarmask convert` again to rewrite the data set"
_LACKS = "objects without label, area, mask or box"
_SIDES = ("xmin", "ymin", "xmax", "ymax")
# The schema, as it is read: key -> type of the values, and whether there are many. What is not here is not needed to train.
_FEATURES = {
    "image/encoded": (bytes, False),
    "image/filename": (bytes, False),
    "image/source_id": (bytes, False),
    "image/dataset_id": (bytes, False),  # of the conversion; earlier versions had none
    "image/height": (int, False),
    "image/width": (int, False),
    **{f"image/object/bbox/{side}": (float, True) for side in _SIDES},  # in widths and heights of the image
    "image/object/class/label": (int, True),  # from 1 on
    "image/object/is_crowd": (int, True),
    "image/object/area": (float, True),
    "image/object/polygon/xy": (float, True),  # x, y, x, y, ... of all rings, in pixels
    "image/object/polygon/ring_lengths": (int, True),
    "image/object/polygon/ring_instance": (int, True),  # ascending
}


class Instance(NamedTuple):
    """One annotation on its way into a record. Coordinates are pixels of the original image, (0, 0) its corner."""

    annotation_id: int
    label: int  # 0-based; the record holds label + 1
    name: str
    is_crowd: bool
    area: float  # square pixels, as the JSON says
    box: tuple[float, float, float, float]  # xmin, ymin, xmax, ymax
    rings: list[np.ndarray]  # each float [V, 2]; outer rings have a positive shoelace sum, holes a negative one
    rle: bytes  # compressed COCO counts of the original annotation at height x width
    mask_png: bytes | None = None


def encode_example(
    *,
    encoded: bytes,
    format: str,
    file_name: str,
    image_id: int,
    height: int,
    width: int,
    instances: list[Instance],
    dataset_id: str = "",
) -> bytes:
    """A serialised tf.train.Example of one image. `encoded`: the bytes of a JPEG, PNG or BMP file, `format` says which."""
    boxes = np.array([i.box for i in instances], np.float64).reshape(-1, 4) / (width, height, width, height)
    rings = [(index, ring) for index, instance in enumerate(instances) for ring in instance.rings]
    features = {
        "image/encoded": [encoded],
        "image/format": [format.encode()],
        "image/filename": [file_name.encode()],
        "image/source_id": [str(image_id).encode()],
        "image/height": [height],
        "image/width": [width],
        **{f"image/object/bbox/{side}": boxes[:, column] for column, side in enumerate(_SIDES)},
        "image/object/class/label": [i.label + 1 for i in instances],
        "image/object/class/text": [i.name.encode() for i in instances],
        "image/object/is_crowd": [int(i.is_crowd) for i in instances],
        "image/object/area": np.array([i.area for i in instances], np.float32),
        "image/object/annotation_id": [i.annotation_id for i in instances],
        "image/object/rle": [i.rle for i in instances],
        "image/object/polygon/xy": np.concatenate([ring.ravel() for _, ring in rings] or [np.zeros(0)]),
        "image/object/polygon/ring_lengths": [len(ring) for _, ring in rings],
        "image/object/polygon/ring_instance": [index for index, _ in rings],
    }
    if dataset_id:
        features["image/dataset_id"] = [dataset_id.encode()]
    if instances and all(i.mask_png is not None for i in instances):
        features["image/object/mask"] = [i.mask_png for i in instances]
    return _serialize(features)


def _serialize(features: dict) -> bytes:
    """Example{1: Features{1: map<1: name, 2: Feature>}}; Feature{1: bytes, 2: float, 3: int64 list} of {1: values}."""
    entries = b"".join(_field(1, _field(1, name.encode()) + _field(2, _feature(values))) for name, values in features.items())
    return _field(1, entries)


def _feature(values) -> bytes:
    if isinstance(values, np.ndarray):
        return _field(2, _field(1, values.astype("<f4").tobytes()))
    if values and isinstance(values[0], bytes):
        return _field(1, b"".join(_field(1, value) for value in values))
    small = not values or 0 <= min(values) <= max(values) < 128
    return _field(3, _field(1, bytes(values) if small else b"".join(map(_varint, values))))


def _field(number: int, payload: bytes) -> bytes:
    return b"".join((bytes((number << 3 | 2,)), _varint(len(payload)), payload))


def _varint(value: int) -> bytes:
    value &= 0xFFFFFFFFFFFFFFFF  # negative int64: two's complement, ten bytes
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def check_complete(info: DatasetInfo) -> None:
    """InputError unless the shards hold as many records as dataset.json says, and the first of each is of its conversion."""
    try:
        count = sum(map(count_records, info.shard_paths))
    except OSError as error:
        raise InputError(f"{info.directory}: cannot be read: {error.filename}: {io_error_text(error)}") from None
    if count != info.num_images:
        raise InputError(f"{info.directory}: {count} whole records, dataset.json says {info.num_images}; {_AGAIN}")
    for shard in info.shard_paths if info.id else ():
        for features in _features(shard, itertools.islice(read_shard(shard), 1)):
            _check_conversion(features, info, shard)


def _check_conversion(features, info, shard):
    if info.id and any(of != info.id.encode() for of in _values(features, "image/dataset_id", bytes)):
        raise InputError(f"{shard}: {CONVERTED_SINCE}; {_AGAIN}")


def parse(serialized) -> dict:
    """TF function: one serialised Example (string scalar) to a dict of tensors.

    "image/encoded" string, "height", "width" int32, "source_id", "filename", "dataset_id" string, "boxes" float32 [N, 4]
    (xmin, ymin, xmax, ymax in pixels), "labels" int32 [N] (0-based), "is_crowd" bool [N], "area" float32 [N], "xy" float32
    [V, 2] (pixels), "ring_lengths" int32 [R], "ring_instance" int32 [R] (index into the N instances).
    """
    import tensorflow as tf

    types = {bytes: tf.string, int: tf.int64, float: tf.float32}
    features = {
        key: tf.io.FixedLenSequenceFeature([], types[kind], allow_missing=True)
        if many
        else tf.io.FixedLenFeature([], types[kind], "" if key == "image/dataset_id" else None)
        for key, (kind, many) in _FEATURES.items()
    }
    record = tf.io.parse_single_example(serialized, features)
    height, width = tf.cast(record["image/height"], tf.int32), tf.cast(record["image/width"], tf.int32)
    boxes = tf.stack([record[f"image/object/bbox/{side}"] for side in _SIDES], axis=-1)
    return {
        "image/encoded": record["image/encoded"],
        "height": height,
        "width": width,
        **{name: record[f"image/{name}"] for name in ("source_id", "filename", "dataset_id")},
        "boxes": boxes * tf.cast(tf.stack([width, height, width, height]), tf.float32),
        "labels": tf.cast(record["image/object/class/label"], tf.int32) - 1,
        "is_crowd": record["image/object/is_crowd"] > 0,
        "area": record["image/object/area"],
        "xy": tf.reshape(record["image/object/polygon/xy"], [-1, 2]),
        "ring_lengths": tf.cast(record["image/object/polygon/ring_lengths"], tf.int32),
        "ring_instance": tf.cast(record["image/object/polygon/ring_instance"], tf.int32),
    }


def fault(record: dict, info: DatasetInfo, image=None):
    """TF function: why a parsed record of `info`, with its decoded `image`, cannot be used, a text; "" if it can."""
    import tensorflow as tf

    labels, lengths, of, classes = record["labels"], record["ring_lengths"], record["ring_instance"], len(info.classes)
    count, rings = tf.size(labels), tf.minimum(tf.size(lengths), tf.size(of))
    owners = tf.clip_by_value(of[:rings], 0, tf.maximum(count - 1, 0))
    edges = tf.math.unsorted_segment_sum(lengths[:rings], owners, tf.maximum(count, 1))
    aligned = (tf.size(record["is_crowd"]) == count) & (tf.size(lengths) == tf.size(of))
    ordered = tf.reduce_all(of[1:] >= of[:-1]) & tf.reduce_all((of >= 0) & (of < count)) & tf.reduce_all(lengths > 0)
    whole = (tf.reduce_sum(lengths) == tf.shape(record["xy"])[0]) & (tf.reduce_max(edges) <= info.max_edges)
    finite = tf.reduce_all(tf.math.is_finite(record["xy"]))
    resized = image is not None and tf.reduce_any(tf.shape(image)[:2] != (record["height"], record["width"]))
    faults = [
        (CONVERTED_SINCE, (record["dataset_id"] != info.id) & (record["dataset_id"] != "") & (info.id != "")),
        (f"a label outside the {classes} classes of dataset.json", tf.reduce_any((labels < 0) | (labels >= classes))),
        ("an image of another size than the record says", resized),
        ("polygons that do not fit its objects", ~(aligned & ordered & whole & finite)),
    ]
    text = tf.constant("")
    for reason, there in reversed(faults):
        text = tf.where(there, reason, text)
    return text


def iter_images(path) -> Iterator[tuple[int, bytes]]:
    """Yields (COCO image id, bytes of the image file) of every image of a converted data set, see dataset.load."""
    for image, features in iter_records(dataset.load(path)):
        yield image["id"], _values(features, "image/encoded", bytes)[0]


def read_ground_truth(path) -> dict:
    """The COCO dict that the shards were made from, for pycocotools; images are not decoded.

    Category ids, annotation ids, areas and masks (compressed RLE) are the original ones; boxes are the records'.
    """
    info = dataset.load(path)
    images, annotations = [], []
    for image, features in iter_records(info):
        images.append(image)
        annotations += _annotations(features, image, info)
    categories = [{"id": c["category_id"], "name": c["name"]} for c in info.classes]
    return {"images": images, "annotations": annotations, "categories": categories}


def _annotations(features, image, info):
    """InputError if something is missing, or a label is none of the data set's."""
    size = [image["height"], image["width"]]
    keys = ("annotation_id", int), ("class/label", int), ("area", float), ("is_crowd", int), ("rle", bytes)
    sides = [
        np.array(_values(features, f"image/object/bbox/{side}", float)) * extent
        for side, extent in zip(("ymin", "xmin", "ymax", "xmax"), size * 2, strict=True)
    ]
    columns = [_values(features, f"image/object/{key}", kind) for key, kind in keys]
    if len({len(values) for values in (*columns, *sides)}) > 1:
        raise InputError(f"{info.directory}: image {image['id']}: {_LACKS}; {_AGAIN}")
    annotations = []
    for annotation_id, label, area, is_crowd, rle, top, left, bottom, right in zip(*columns, *sides, strict=True):
        where = f"{info.directory}: image {image['id']}, annotation {annotation_id}"
        if not 1 <= label <= len(info.classes):
            raise InputError(f"{where}: label {label}, dataset.json has {len(info.classes)} classes; {_AGAIN}")
        try:  # pycocotools reads past the end of a broken one
            mask = segmentation.to_rle({"size": size, "counts": rle.decode(errors="replace")}, *size)
        except segmentation.Unusable as reason:
            raise InputError(f"{where}: {reason}; {_AGAIN}") from None
        ids = {"id": annotation_id, "image_id": image["id"], "category_id": info.classes[label - 1]["category_id"]}
        box = [float(v) for v in (left, top, right - left, bottom - top)]
        annotations.append({**ids, "area": area, "bbox": box, "iscrowd": is_crowd, "segmentation": mask})
    return annotations


def iter_records(info: DatasetInfo):
    """Yields ({"id", "file_name", "height", "width"}, features) of each record; InputError for a shard that is cut short,
    damaged, of another conversion or not ours."""
    try:
        yield from _records(info)
    except InputError as error:
        raise InputError(dataset.converted_again(info) or str(error)) from None


def _records(info):
    count = 0
    for shard in info.shard_paths:
        for features in _features(shard, read_shard(shard)):
            count += 1
            if "image/object/rle" not in features:
                raise InputError(f"{shard}: was not written by `polarmask convert` (no image/object/rle); {_AGAIN}")
            _check_conversion(features, info, shard)
            try:
                image = _image(features)
            except ValueError:
                raise InputError(f"{shard}: record {count} was not written by `polarmask convert`; {_AGAIN}") from None
            _check_boxes(features, f"{info.directory}: image {image['id']}")
            yield image, features
    if count != info.num_images:
        raise InputError(f"{info.directory}: {count} records, dataset.json says {info.num_images}; {_AGAIN}")


def _features(shard, examples):
    """The features of each of a shard's examples; InputError for what is damaged or none."""
    import tensorflow as tf
    from google.protobuf.message import DecodeError

    try:
        for data in examples:
            yield tf.train.Example.FromString(data).features.feature
    except DecodeError as error:
        raise InputError(f"{shard}: holds something else than tf.train.Example; {_AGAIN}") from error
    except DamagedShard as error:
        raise InputError(f"{error}; {_AGAIN}") from None


def _image(features) -> dict:
    """What is not an object; ValueError for a record that lacks it."""
    ((number,), (name,), (_,)) = (_values(features, f"image/{key}", bytes) for key in ("source_id", "filename", "encoded"))
    ((height,), (width,)) = (_values(features, f"image/{key}", int) for key in ("height", "width"))
    if not 0 < height * width <= MAX_PIXELS or height < 0:
        raise ValueError("no size of an image")
    return {"id": int(number), "file_name": name.decode(), "height": height, "width": width}


def _check_boxes(features, where):
    sides = [_values(features, f"image/object/bbox/{side}", float) for side in _SIDES]
    lower, upper = sides[:2], sides[2:]
    if len({*map(len, sides)}) > 1 or not np.isfinite(sides).all() or np.less(upper, lower).any():
        raise InputError(f"{where}: {_LACKS}; {_AGAIN}")


def _values(features, key, kind):
    lists = {bytes: "bytes_list", int: "int64_list", float: "float_list"}
    return getattr(features[key], lists[kind]).value if key in features else []
