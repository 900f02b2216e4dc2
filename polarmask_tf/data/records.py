"""The record schema, both ways: one tf.train.Example an image with Model Garden's key names, `dataset.json` beside.

The writer needs no TensorFlow (importing it takes seconds in each process of `convert`): an Example is four nested
protobuf messages and a TFRecord is a length, the bytes and two checksums. The readers import TensorFlow when called.

Source of the formats: tensorflow/core/example/example.proto, tensorflow/core/lib/io/record_writer.h (framing), RFC 3720
appendix B.4 (CRC-32C); key names: official/vision/dataloaders/tf_example_decoder.py of Model Garden.
"""

import json
import os
import struct
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import google_crc32c
import numpy as np

from polarmask_tf.errors import InputError

FORMAT = "polarmask_tf/1"
REPAIR_HINT = "run `polarmask convert` again, or go on without the rest of the shard: data.damaged=skip"


class DamagedShard(InputError):
    """A shard has no further record that can be read; the message says how many could be."""


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


@dataclass(frozen=True)
class DatasetInfo:
    """`dataset.json` of a converted data set. `classes[label]` is {"name": str, "category_id": int} of the 0-based label,
    `max_instances` counts the non-crowd instances of one image, `max_edges` the polygon edges of one instance."""

    directory: Path
    name: str
    num_images: int
    num_instances: int
    num_crowd: int
    classes: list[dict]
    max_instances: int
    max_edges: int
    shard_paths: list[Path]
    skipped: dict[str, int]


def encode_example(
    *, encoded: bytes, format: str, file_name: str, image_id: int, height: int, width: int, instances: list[Instance]
) -> bytes:
    """A serialised tf.train.Example of one image. `encoded`: the bytes of a JPEG or PNG file, `format` says which."""
    boxes = np.array([i.box for i in instances], np.float64).reshape(-1, 4) / (width, height, width, height)
    rings = [(index, ring) for index, instance in enumerate(instances) for ring in instance.rings]
    features = {
        "image/encoded": [encoded],
        "image/format": [format.encode()],
        "image/filename": [file_name.encode()],
        "image/source_id": [str(image_id).encode()],
        "image/height": [height],
        "image/width": [width],
        "image/object/bbox/xmin": boxes[:, 0],
        "image/object/bbox/ymin": boxes[:, 1],
        "image/object/bbox/xmax": boxes[:, 2],
        "image/object/bbox/ymax": boxes[:, 3],
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
    if 0 <= value < 128:
        return bytes((value,))
    value &= 0xFFFFFFFFFFFFFFFF  # negative int64: two's complement, ten bytes
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def write_record(file, data: bytes) -> None:
    """Appends one TFRecord to a binary file."""
    length = struct.pack("<Q", len(data))
    file.write(length + struct.pack("<I", _masked(google_crc32c.value(length))))
    file.write(data)
    file.write(struct.pack("<I", _masked(google_crc32c.value(data))))


def _masked(crc: int) -> int:
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def read_shard(path) -> Iterator[bytes]:
    """Yields the records of one shard, whose checksums are compared. No TensorFlow.

    Raises DamagedShard where no further record can be had: "PATH: damaged or cut short after N records (reason)".
    """
    count = 0
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            while header := file.read(12):
                length = int.from_bytes(header[:8], "little")
                if len(header) == 12 and not _is_whole(header[:8], header[8:]):
                    raise ValueError("the checksum of a length is wrong")
                if len(header) < 12 or file.tell() + length + 4 > size:
                    raise ValueError("it ends within a record")
                data, checksum = file.read(length), file.read(4)
                if not _is_whole(data, checksum):
                    raise ValueError("the checksum of a record is wrong")
                yield data
                count += 1
    except ValueError as error:
        raise DamagedShard(f"{path}: damaged or cut short after {count} records ({error})") from None
    except OSError as error:
        raise DamagedShard(f"{path}: cannot be read after {count} records ({error.strerror or error})") from None


def count_records(path) -> int:
    """How many records a shard holds up to its first damaged length: 12 bytes are read of each. OSError if it cannot be."""
    count = end = 0
    with open(path, "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        while len(header := os.pread(file.fileno(), 12, end)) == 12:
            end += 16 + int.from_bytes(header[:8], "little")
            if end > size or not _is_whole(header[:8], header[8:]):
                break
            count += 1
    return count


def _is_whole(data: bytes, checksum: bytes) -> bool:
    return _masked(google_crc32c.value(data)) == int.from_bytes(checksum, "little")


def load_dataset_info(path) -> DatasetInfo:
    """Reads `dataset.json` of a converted data set (a directory). No TensorFlow.

    Raises InputError for a missing directory, a missing or broken dataset.json, a missing shard.
    """
    directory = Path(path).resolve()
    file = directory / "dataset.json"
    again = "run `polarmask convert` to make it"
    if not directory.is_dir():
        raise InputError(f"{path}: no such directory; give the output directory of `polarmask convert`")
    if not file.is_file():
        raise InputError(f"{path}: holds no dataset.json, so it is not a (completely) converted data set; {again}")
    try:
        content = json.loads(file.read_bytes())
        if content["format"] != FORMAT:
            raise InputError(f"{file}: format {content['format']!r}, this version reads {FORMAT!r}; {again} anew")
        info = DatasetInfo(
            directory=directory,
            name=str(content["name"]),
            num_images=int(content["num_images"]),
            num_instances=int(content["num_instances"]),
            num_crowd=int(content["num_crowd"]),
            classes=[{"name": str(c["name"]), "category_id": int(c["category_id"])} for c in content["classes"]],
            max_instances=int(content["max_instances"]),
            max_edges=int(content["max_edges"]),
            shard_paths=[directory / Path(name).name for name in content["shards"]],
            skipped={str(reason): int(count) for reason, count in content["skipped"].items()},
        )
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{file}: broken ({type(error).__name__}: {error}); {again} anew") from error
    missing = [shard.name for shard in info.shard_paths if not shard.is_file()]
    if missing:
        raise InputError(f"{path}: {len(missing)} of {len(info.shard_paths)} shards missing, first {missing[0]}; {again} anew")
    return info


def dump_dataset_info(info: DatasetInfo) -> str:
    """The text of a `dataset.json` beside the shards, which `load_dataset_info` reads."""
    content = asdict(info)
    del content["directory"]
    content["shards"] = [path.name for path in content.pop("shard_paths")]
    return json.dumps({"format": FORMAT, **content}, indent=1)


def parse(serialized) -> dict:
    """TF function: one serialised Example (string scalar) to a dict of tensors.

    "image/encoded" string, "height", "width" int32, "source_id" string, "boxes" float32 [N, 4] (xmin, ymin, xmax, ymax
    in pixels), "labels" int32 [N] (0-based), "is_crowd" bool [N], "area" float32 [N], "xy" float32 [V, 2] (pixels),
    "ring_lengths" int32 [R], "ring_instance" int32 [R] (index into the N instances).
    """
    import tensorflow as tf

    def many(dtype):
        return tf.io.FixedLenSequenceFeature([], dtype, allow_missing=True)

    sides = ("xmin", "ymin", "xmax", "ymax")
    record = tf.io.parse_single_example(
        serialized,
        {
            "image/encoded": tf.io.FixedLenFeature([], tf.string),
            "image/height": tf.io.FixedLenFeature([], tf.int64),
            "image/width": tf.io.FixedLenFeature([], tf.int64),
            "image/source_id": tf.io.FixedLenFeature([], tf.string),
            **{f"image/object/bbox/{side}": many(tf.float32) for side in sides},
            "image/object/class/label": many(tf.int64),
            "image/object/is_crowd": many(tf.int64),
            "image/object/area": many(tf.float32),
            "image/object/polygon/xy": many(tf.float32),
            "image/object/polygon/ring_lengths": many(tf.int64),
            "image/object/polygon/ring_instance": many(tf.int64),
        },
    )
    height, width = tf.cast(record["image/height"], tf.int32), tf.cast(record["image/width"], tf.int32)
    boxes = tf.stack([record[f"image/object/bbox/{side}"] for side in sides], axis=-1)
    return {
        "image/encoded": record["image/encoded"],
        "height": height,
        "width": width,
        "source_id": record["image/source_id"],
        "boxes": boxes * tf.cast(tf.stack([width, height, width, height]), tf.float32),
        "labels": tf.cast(record["image/object/class/label"], tf.int32) - 1,
        "is_crowd": record["image/object/is_crowd"] > 0,
        "area": record["image/object/area"],
        "xy": tf.reshape(record["image/object/polygon/xy"], [-1, 2]),
        "ring_lengths": tf.cast(record["image/object/polygon/ring_lengths"], tf.int32),
        "ring_instance": tf.cast(record["image/object/polygon/ring_instance"], tf.int32),
    }


def iter_images(path) -> Iterator[tuple[int, bytes]]:
    """Yields (COCO image id, bytes of the JPEG or PNG file) of every image of a converted data set."""
    for features in _iter_features(load_dataset_info(path)):
        yield int(features["image/source_id"].bytes_list.value[0]), features["image/encoded"].bytes_list.value[0]


def read_ground_truth(path) -> dict:
    """The COCO dict that the shards were made from, for pycocotools; images are not decoded.

    Category ids, annotation ids, areas and masks (compressed RLE) are the original ones; boxes are the records'.
    """
    info = load_dataset_info(path)
    images, annotations = [], []
    for features in _iter_features(info):
        image = {
            "id": int(features["image/source_id"].bytes_list.value[0]),
            "file_name": features["image/filename"].bytes_list.value[0].decode(),
            "height": features["image/height"].int64_list.value[0],
            "width": features["image/width"].int64_list.value[0],
        }
        images.append(image)
        annotations += _annotations(features, image, info)
    categories = [{"id": c["category_id"], "name": c["name"]} for c in info.classes]
    return {"images": images, "annotations": annotations, "categories": categories}


def _annotations(features, image, info):
    size = [image["height"], image["width"]]
    xmin, ymin, xmax, ymax = (
        np.array(features[f"image/object/bbox/{side}"].float_list.value) * image[extent]
        for side, extent in (("xmin", "width"), ("ymin", "height"), ("xmax", "width"), ("ymax", "height"))
    )
    return [
        {
            "id": annotation_id,
            "image_id": image["id"],
            "category_id": info.classes[label - 1]["category_id"],
            "area": area,
            "bbox": [float(v) for v in (xmin[i], ymin[i], xmax[i] - xmin[i], ymax[i] - ymin[i])],
            "iscrowd": is_crowd,
            "segmentation": {"size": size, "counts": rle},
        }
        for i, (annotation_id, label, area, is_crowd, rle) in enumerate(
            zip(
                features["image/object/annotation_id"].int64_list.value,
                features["image/object/class/label"].int64_list.value,
                features["image/object/area"].float_list.value,
                features["image/object/is_crowd"].int64_list.value,
                features["image/object/rle"].bytes_list.value,
                strict=True,
            )
        )
    ]


def _iter_features(info: DatasetInfo):
    """Yields the feature map of each record; InputError for a shard that is cut short, damaged or not ours."""
    import tensorflow as tf
    from google.protobuf.message import DecodeError

    count = 0
    mend = "run `polarmask convert` again to rewrite the data set"
    for shard in info.shard_paths:
        try:
            for data in read_shard(shard):
                count += 1
                features = tf.train.Example.FromString(data).features.feature
                if "image/object/rle" not in features:
                    raise InputError(f"{shard}: was not written by `polarmask convert` (no image/object/rle); {mend}")
                yield features
        except DecodeError as error:
            raise InputError(f"{shard}: holds something else than tf.train.Example; {mend}") from error
        except DamagedShard as error:
            raise InputError(f"{error}; {mend}") from None
    if count != info.num_images:
        raise InputError(f"{info.directory}: {count} records, dataset.json says {info.num_images}; {mend}")
