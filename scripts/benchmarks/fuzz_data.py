"""For fuzz.py: COCO JSON, images, converted data and configs."""

import io
import json
import shutil
from pathlib import Path

import numpy as np
from fuzz_inputs import mutate_bytes, mutate_json, to_text
from fuzz_kind import Kind, refusing
from PIL import Image
from pycocotools import mask as coco_mask

from polarmask_tf import config as configs

# ---- COCO JSON with a few small images

IMAGES = {"a.png": (32, 24), "b.jpg": (20, 20), "c.png": (64, 48)}


def coco():
    images = [{"id": n, "file_name": name, "width": w, "height": h} for n, (name, (w, h)) in enumerate(IMAGES.items(), 1)]
    categories = [{"id": 1, "name": "one"}, {"id": 7, "name": "two"}]
    polygon = [2.0, 2.0, 18.0, 3.0, 17.5, 16.0, 3.0, 15.0]
    segmentations = [
        [polygon],
        [polygon, [5.5, 5, 9, 5, 9, 9]],
        {"size": [48, 64], "counts": [48 * 10 + 5, 20, 28, 20, 48 * 52 - 25]},
        {"size": [48, 64], "counts": coco_mask.encode(np.asfortranarray(np.eye(48, 64, 5, np.uint8)))["counts"].decode()},
    ]
    annotations = [
        {"id": n, "image_id": image, "category_id": 1 + 6 * (n % 2), "iscrowd": int(n == 3), "area": 200.0, "segmentation": s}
        for n, (image, s) in enumerate(zip((1, 2, 3, 3), segmentations, strict=True), 1)
    ]
    for annotation in annotations:
        annotation["bbox"] = [2, 2, 16, 14]
    return {"images": images, "categories": categories, "annotations": annotations}


def change_coco(rng, data):
    value = json.loads(data)
    if rng.random() < 0.2:  # one size for an image and its masks
        image = rng.choice(value["images"])
        image["height"], image["width"] = (rng.choice((1, 10**5, 10**6, 10**9, 2**31, 2**32 + 5)) for _ in range(2))
        size = [image["height"], image["width"]]
        for annotation in value["annotations"]:
            if annotation["image_id"] == image["id"] and isinstance(annotation["segmentation"], dict):
                annotation["segmentation"] = {
                    "size": size,
                    "counts": rng.choice(([0, size[0] * size[1]], [size[0] * size[1]], "0")),
                }
    if rng.random() < 0.2:  # long outlines
        annotation, count = rng.choice(value["annotations"]), int(10 ** rng.uniform(1, 4.5))
        reach = rng.choice((1, 20, 1000, 1e6))
        points = [c for n in range(count) for c in ((n % 2) * reach, n * 20 / count)]
        annotation["segmentation"] = [points] if rng.random() < 0.8 else [points[:6]] * count
        if rng.random() < 0.5:
            return to_text(value)
    return mutate_bytes(rng, to_text(value)) if rng.random() < 0.2 else mutate_json(rng, value)


def _draw_images(folder):
    (folder / "images").mkdir()
    for name, (width, height) in IMAGES.items():
        pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
        Image.fromarray(pixels).save(folder / "images" / name)


def prepare_coco(folder, out):
    from polarmask_tf.data.convert import convert

    _draw_images(folder)

    def run(data):
        (folder / "a.json").write_bytes(data)
        shutil.rmtree(folder / "data", ignore_errors=True)
        convert(folder / "a.json", folder / "images", folder / "data", processes=1, progress=False)

    return refusing(run)


def prepare_bound(folder, out):
    from polarmask_tf.inference import ceiling

    def run(data):
        (folder / "a.json").write_bytes(data)
        for _ in ceiling.read(folder / "a.json")[2]:
            pass

    return refusing(run)


# ---- images


def pictures(out):
    rng = np.random.default_rng(0)
    color = Image.fromarray(rng.integers(0, 256, (24, 32, 3), np.uint8))
    deep = rng.integers(0, 2**16, (24, 32)).astype(np.uint16)
    files = []

    def add(image, kind, **options):
        file = io.BytesIO()
        image.save(file, kind, **options)
        files.append(file.getvalue())

    for kind in ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF"):
        add(color, kind)
    exif = Image.Exif()
    exif[274] = 6
    add(color, "JPEG", exif=exif, progressive=True)
    add(color.convert("RGBA"), "PNG")
    add(color.convert("P"), "PNG", transparency=3)
    add(Image.fromarray(deep), "PNG")
    add(Image.fromarray(deep), "TIFF", compression="tiff_lzw")
    add(color.convert("1"), "TIFF", compression="group4")
    return files


def prepare_image(folder, out):
    from polarmask_tf import lite

    def run(data):
        (folder / "image").write_bytes(data)
        pixels = lite.read_image(folder / "image")
        assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.size, "not an image"

    return refusing(run, ValueError)


# ---- converted data: a shard, dataset.json


def _example(rng):
    from polarmask_tf.data import records

    file = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (24, 32, 3), np.uint8)).save(file, "PNG")
    ring = np.array([[2.0, 2.0], [18.0, 3.0], [17.0, 16.0]])
    rle = coco_mask.frPyObjects([ring.ravel()], 24, 32)[0]["counts"]
    instances = [
        records.Instance(n, n % 2, "one", n == 2, 100.0, (2.0, 2.0, 18.0, 16.0), [ring, ring + 1], rle, None) for n in range(3)
    ]
    return records.encode_example(
        encoded=file.getvalue(), format="png", file_name="a.png", image_id=1, height=24, width=32, instances=instances
    )


def _shard(examples):
    from polarmask_tf.data import records

    file = io.BytesIO()
    for example in examples:
        records.write_record(file, example)
    return file.getvalue()


def shards(out):
    rng = np.random.default_rng(0)
    return [_shard([_example(rng)]), _shard([_example(rng), _example(rng)])]


def change_shard(rng, data):
    if rng.random() < 0.3:
        return mutate_bytes(rng, data)
    examples, at = [], 0
    while at < len(data):  # what is in a record is changed, its checksums are right
        size = int.from_bytes(data[at : at + 8], "little")
        examples.append(mutate_bytes(rng, data[at + 12 : at + 12 + size]))
        at += size + 16
    return _shard(examples)


def dataset(count=1):
    """The dataset.json of `count` records in one shard."""
    from polarmask_tf.data import dataset as dataset_file

    classes = [{"name": "one", "category_id": 1}, {"name": "two", "category_id": 7}]
    info = dataset_file.DatasetInfo(
        directory=Path(),
        name="data",
        num_images=count,
        num_instances=2 * count,
        num_crowd=count,
        classes=classes,
        max_instances=2,
        max_edges=6,
        shard_paths=[Path("data-00000-of-00001.tfrecord")],
        skipped={"empty mask": 1},
        notes={"odd": 1},
        id="this",
        instances_per_image={1: count} if count else {},
        exif="apply",
        bit_depth=12,
    )
    return json.loads(dataset_file.dump(info))


def prepare_record(folder, out):
    from polarmask_tf.data import records

    def run(data):
        count, at = 0, 0
        while at + 12 <= len(data):
            count, at = count + 1, at + 16 + int.from_bytes(data[at : at + 8], "little")
        (folder / "data-00000-of-00001.tfrecord").write_bytes(data)
        (folder / "dataset.json").write_text(json.dumps(dataset(count)))
        records.read_ground_truth(folder)
        for _ in records.iter_images(folder):
            pass

    return refusing(run)


def prepare_dataset(folder, out):
    from polarmask_tf.data import dataset as dataset_file

    (folder / "data-00000-of-00001.tfrecord").write_bytes(shards(out)[0])

    def run(data):
        (folder / "dataset.json").write_bytes(data)
        dataset_file.load(folder)

    return refusing(run)


def prepare_run(folder, out):
    from polarmask_tf.weights.runs import read_run

    (folder / "config.yaml").write_text(configs.dump(configs.load("shapes")))

    def run(data):
        (folder / "dataset.json").write_bytes(data)
        read_run(folder)

    return refusing(run)


# ---- configs


def yaml_files(out):
    shipped = [path.read_bytes() for path in sorted(configs.configs_dir().glob("*.yaml"))]
    # Their bases are found by name, from anywhere.
    return [*shipped, *(configs.dump(configs.load(name)).encode() for name in ("shapes", "paper_1x", "edge"))]


def change_yaml(rng, data):
    if rng.random() < 0.4:
        return mutate_json(rng, configs.to_dict(configs.load(rng.choice(("shapes", "paper_1x", "edge_shapes")))))
    if rng.random() < 0.6:
        return mutate_bytes(rng, data)
    lines = data.decode().splitlines()
    odd = (
        "&a [*a]",
        "*b",
        "<<: {a: 1}",
        "? [a]",
        "!!python/object:os.system {}",
        "\t- x",
        "base: [x, .]",
        "--- a",
        "%YAML 9.9",
    )
    odd = (
        *odd,
        "base: /dev/zero",
        "base: " + "a" * 5000,
        "!!timestamp x: !!bool y",
        "a: 2021-13-01",
        "[" * 5000,
        "{a: " * 3000,
        "'",
    )
    lines.insert(rng.randrange(len(lines) + 1), " " * rng.randrange(5) + rng.choice((*odd, rng.choice(lines))))
    return "\n".join(lines).encode()


def prepare_yaml(folder, out):
    def run(data):
        (folder / "a.yaml").write_bytes(data)
        configs.load(folder / "a.yaml")

    return refusing(run)


def change_text(rng, data):
    return mutate_json(rng, json.loads(data)) if rng.random() < 0.9 else mutate_bytes(rng, data)


KINDS = {
    "coco": Kind(prepare_coco, lambda out: [json.dumps(coco()).encode()], change_coco),
    "image": Kind(prepare_image, pictures, mutate_bytes),
    "dataset": Kind(prepare_dataset, lambda out: [json.dumps(dataset()).encode()], change_text),
    "yaml": Kind(prepare_yaml, yaml_files, change_yaml),
    "bound": Kind(prepare_bound, lambda out: [json.dumps(coco()).encode()], change_coco, tensorflow=True),
    "record": Kind(prepare_record, shards, change_shard, tensorflow=True),
    "run": Kind(prepare_run, lambda out: [json.dumps(dataset()).encode()], change_text, tensorflow=True),
}
