"""What fuzz.py tries: of each kind its valid inputs, how they are changed, and the function that takes the bytes of one."""

import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import typing
import zipfile
from pathlib import Path

import numpy as np
from fuzz_inputs import mutate_bytes, mutate_json, to_text
from PIL import Image
from pycocotools import mask as coco_mask

from polarmask_tf import config as configs
from polarmask_tf.errors import InputError


class Refusal(Exception):
    """What the library refuses an input with: InputError, or in lite.py, which stands alone, ValueError."""


class Kind(typing.NamedTuple):
    prepare: typing.Callable  # (folder to work in, OUT) -> function of the bytes of an input; imports what it needs
    seeds: typing.Callable  # OUT -> list of valid inputs
    mutate: typing.Callable  # (random.Random, valid input) -> bytes
    tensorflow: bool = False  # takes its import, or more than a few milliseconds an input


def _refusing(function, refusal=InputError):
    def run(data):
        try:
            function(data)
        except refusal as error:
            raise Refusal(str(error)) from None

    return run


# ---- COCO JSON with a few small images

IMAGES = {"a.png": (32, 24), "b.jpg": (20, 20), "c.png": (64, 48)}


def _coco():
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


def _change_coco(rng, data):
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


def _prepare_coco(folder, out):
    from polarmask_tf.data.convert import convert

    _draw_images(folder)

    def run(data):
        (folder / "a.json").write_bytes(data)
        shutil.rmtree(folder / "data", ignore_errors=True)
        convert(folder / "a.json", folder / "images", folder / "data", processes=1, progress=False)

    return _refusing(run)


def _prepare_bound(folder, out):
    from polarmask_tf.tools import upper_bound

    def run(data):
        (folder / "a.json").write_bytes(data)
        for _ in upper_bound.read(folder / "a.json")[2]:
            pass

    return _refusing(run)


# ---- images


def _pictures(out):
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


def _prepare_image(folder, out):
    from polarmask_tf import lite

    def run(data):
        (folder / "image").write_bytes(data)
        pixels = lite.read_image(folder / "image")
        assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.size, "not an image"

    return _refusing(run, ValueError)


# ---- converted data: a shard, dataset.json


def _example(rng):
    from polarmask_tf.data import records

    file = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (24, 32, 3), np.uint8)).save(file, "PNG")
    ring = np.array([[2.0, 2.0], [18.0, 3.0], [17.0, 16.0]])
    instances = [
        records.Instance(n, n % 2, "one", n == 2, 100.0, (2.0, 2.0, 18.0, 16.0), [ring, ring + 1], b"02", None)
        for n in range(3)
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


def _shards(out):
    rng = np.random.default_rng(0)
    return [_shard([_example(rng)]), _shard([_example(rng), _example(rng)])]


def _change_shard(rng, data):
    if rng.random() < 0.3:
        return mutate_bytes(rng, data)
    examples, at = [], 0
    while at < len(data):  # what is in a record is changed, its checksums are right
        size = int.from_bytes(data[at : at + 8], "little")
        examples.append(mutate_bytes(rng, data[at + 12 : at + 12 + size]))
        at += size + 16
    return _shard(examples)


def _dataset(count=1):
    """The dataset.json of `count` records in one shard."""
    from polarmask_tf.data import records

    classes = [{"name": "one", "category_id": 1}, {"name": "two", "category_id": 7}]
    info = records.DatasetInfo(
        **{
            **dict.fromkeys(records.DatasetInfo.__dataclass_fields__),
            "directory": Path(),
            "name": "data",
            "num_images": count,
            "num_instances": 2 * count,
            "num_crowd": count,
            "classes": classes,
            "max_instances": 2,
            "max_edges": 6,
            "shard_paths": [Path("data-00000-of-00001.tfrecord")],
            "skipped": {"empty mask": 1},
        }
    )
    return json.loads(records.dump_dataset_info(info))


def _prepare_record(folder, out):
    from polarmask_tf.data import records

    def run(data):
        count, at = 0, 0
        while at + 12 <= len(data):
            count, at = count + 1, at + 16 + int.from_bytes(data[at : at + 8], "little")
        (folder / "data-00000-of-00001.tfrecord").write_bytes(data)
        (folder / "dataset.json").write_text(json.dumps(_dataset(count)))
        records.read_ground_truth(folder)
        for _ in records.iter_images(folder):
            pass

    return _refusing(run)


def _prepare_dataset(folder, out):
    from polarmask_tf.data import records

    (folder / "data-00000-of-00001.tfrecord").write_bytes(_shards(out)[0])

    def run(data):
        (folder / "dataset.json").write_bytes(data)
        records.load_dataset_info(folder)

    return _refusing(run)


def _prepare_run(folder, out):
    from polarmask_tf.weights.runs import read_run

    (folder / "config.yaml").write_text(configs.dump(configs.load("shapes")))

    def run(data):
        (folder / "dataset.json").write_bytes(data)
        read_run(folder)

    return _refusing(run)


# ---- configs


def _yaml_files(out):
    shipped = [path.read_bytes() for path in sorted(configs.configs_dir().glob("*.yaml"))]
    # Their bases are found by name, from anywhere.
    return [*shipped, *(configs.dump(configs.load(name)).encode() for name in ("shapes", "paper_1x", "edge"))]


def _change_yaml(rng, data):
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


def _prepare_yaml(folder, out):
    def run(data):
        (folder / "a.yaml").write_bytes(data)
        configs.load(folder / "a.yaml")

    return _refusing(run)


# ---- answers of a server

CLASSES = [{"name": "one", "category_id": 1}, {"name": "two", "category_id": 7}]
METADATA = {"classes": CLASSES, "input": {"height": 64, "width": 64}, "max_detections": 3}
DETECTIONS = {
    "num_detections": [2],
    "detection_scores": [[0.9, 0.5, 0.0]],
    "detection_classes": [[1, 0, 0]],
    "detection_boxes": [[[0.1, 0.1, 0.5, 0.5], [0.2, 0.2, 0.4, 0.9], [0, 0, 0, 0]]],
    "detection_polygons": [[[[0.1, 0.1], [0.5, 0.1], [0.5, 0.5], [0.1, 0.5]]] * 3],
}


def _answer(value, status="200 OK"):
    body = value if isinstance(value, bytes) else to_text(value)
    return f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


def _conversation(first, second):
    """Two answers in one input: to the question for metadata, and to that for detections."""
    return len(first).to_bytes(4, "big") + first + second


def _conversations(out):
    metadata = [{"outputs": [json.dumps(METADATA)]}, {"outputs": {"metadata": [json.dumps(METADATA)]}}]
    return [_conversation(_answer(first), _answer({"outputs": DETECTIONS})) for first in metadata]


def _change_conversation(rng, data):
    size = int.from_bytes(data[:4], "big")
    first, second = data[4 : 4 + size], data[4 + size :]
    if rng.random() < 0.3:
        outputs = [mutate_json(rng, METADATA).decode(errors="replace")] if rng.random() < 0.7 else None
        body = to_text({"outputs": outputs}) if outputs else mutate_json(rng, json.loads(first.partition(b"\r\n\r\n")[2]))
        return _conversation(_answer(body), second)
    changed = {
        0: lambda: mutate_bytes(rng, second),
        1: lambda: _answer(mutate_bytes(rng, to_text({"outputs": DETECTIONS}))),
        2: lambda: _answer(
            mutate_json(rng, {"error": "no\n\x1b[31m"}), rng.choice(("400 Bad", "500 \x1b[31m", "503 Busy", "302 Found"))
        ),
        3: lambda: (
            rng.choice((b"@ENDLESS@", b"@DRIP@", b"@SILENT@")) + second
            if rng.random() < 0.1
            else second[: rng.randrange(len(second))]
        ),
    }
    other = lambda: _answer(mutate_json(rng, {"outputs": DETECTIONS}))  # noqa: E731
    return _conversation(first, changed.get(rng.randrange(10), other)())


class _Server:
    """Answers each connection with the bytes it was told, whatever is asked."""

    def __init__(self):
        self.answers, self.listener = [b""], socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self):
        while True:
            connection, _ = self.listener.accept()
            threading.Thread(target=self._talk, args=(connection,), daemon=True).start()

    def _talk(self, connection):
        with connection:
            try:
                connection.settimeout(30)
                asked, whole = b"", 1
                while len(asked) < whole and (more := connection.recv(1 << 20)):
                    asked += more
                    size = re.search(rb"(?is)content-length: (\d+)\r\n.*?\r\n\r\n", asked)
                    whole = size.end() + int(size[1]) if size else len(asked) + 1
                answer = self.answers[0 if b'"metadata"' in asked else -1]
                if odd := re.match(rb"@([A-Z]+)@", answer):
                    self._torment(connection, odd[1], answer[odd.end() :])
                else:
                    connection.sendall(answer)
            except OSError:
                return

    def _torment(self, connection, how, answer):
        """More than ever ends, a byte at a time, or nothing at all: until the other side hangs up, or for 30 s."""
        head = answer.partition(b"\r\n\r\n")[0].replace(b"Content-Length", b"X") + b"\r\n\r\n"
        end = time.monotonic() + 30
        while time.monotonic() < end:
            if how == b"ENDLESS":
                connection.sendall(head + b"[" * (1 << 20))
                head = b""
            elif how == b"DRIP":
                connection.sendall(answer[:1])
                answer = answer[1:] or b" "
            if how != b"ENDLESS":
                time.sleep(0.2)


def _prepare_server(folder, out):
    from polarmask_tf.inference import client
    from polarmask_tf.inference.predictor import load_predictor

    server = _Server()
    url = f"http://127.0.0.1:{server.listener.getsockname()[1]}/v1/models/polarmask"
    # As long as the machine's answers take; a user's patience is longer.
    client.TIMEOUT, client.WAITS = 4, (0.0,)

    def run(data):
        size = int.from_bytes(data[:4], "big")
        server.answers = [data[4 : 4 + size], data[4 + size :]]
        load_predictor(url)([np.zeros((24, 32, 3), np.uint8)])

    return _refusing(run)


# ---- .tflite files, and the metadata in them


def _tflite_file(out):
    """A small trained network as a .tflite file; made by the command line once for each OUT, which takes two minutes."""
    file = out / "seed" / "exported" / "model.tflite"
    if not file.is_file():
        work = out / "seed"
        small = [
            "model.backbone.width=16",
            "model.fpn.channels=16",
            "model.head.channels=16",
            "data.size=[64,64]",
            "model.rays=8",
        ]
        small += ["train.steps=2", "train.checkpoint_every=2", "data.batch=2", "postprocess.score_threshold=0.001"]
        for words in (
            ["shapes", work / "shapes", "--train", 4, "--val", 2, "--size", 64],
            ["convert", work / "shapes/train/annotations.json", work / "shapes/train/images", work / "data"],
            [
                "train",
                "--config",
                "shapes",
                "--data",
                work / "data",
                "--out",
                work / "run",
                *(w for s in small for w in ("--set", s)),
            ],
            ["export", work / "run", "--out", work / "exported", "--images", work / "data"],
        ):
            subprocess.run([sys.executable, "-m", "polarmask_tf", *map(str, words)], check=True, stdout=subprocess.DEVNULL)
    return file.read_bytes()


def _split(data):
    """(the flatbuffer, metadata) of a .tflite file."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        start = min(entry.header_offset for entry in archive.infolist())
        return data[:start], json.loads(archive.read("metadata.json"))


def _join(flatbuffer, metadata):
    file = io.BytesIO()
    file.write(flatbuffer)
    with zipfile.ZipFile(file, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("metadata.json", metadata)
    return file.getvalue()


def _change_metadata(rng, data):
    flatbuffer, metadata = _split(data)
    text = mutate_json(rng, metadata) if rng.random() < 0.9 else mutate_bytes(rng, json.dumps(metadata).encode())
    return _join(flatbuffer, text if rng.random() < 0.97 else b" " * (256 << 20))  # a zip of 2 GB takes too long to make


def _change_tflite(rng, data):
    flatbuffer, metadata = _split(data)
    if rng.random() < 0.3:
        return flatbuffer + mutate_bytes(rng, data[len(flatbuffer) :])  # the zip's own structures
    return _join(mutate_bytes(rng, flatbuffer), json.dumps(metadata)) if rng.random() < 0.8 else mutate_bytes(rng, data)


def _prepare_tflite(folder, out):
    from polarmask_tf.inference.predictor import load_predictor

    def run(data):
        (folder / "model.tflite").write_bytes(data)
        load_predictor(folder / "model.tflite")([np.zeros((24, 32, 3), np.uint8)])

    return _refusing(run)


def _change_text(rng, data):
    return mutate_json(rng, json.loads(data)) if rng.random() < 0.9 else mutate_bytes(rng, data)


def _prepare_self(folder, out):
    """What fuzz.py must see, for its own test."""

    def refuse(text):
        raise InputError(text) if text else ValueError("two\nlines")

    return _refusing(
        lambda data: {
            b"taken": lambda: None,
            b"refused": lambda: refuse("no"),
            b"lines": lambda: refuse(""),
            b"bug": lambda: 1 / 0,
            b"crash": lambda: os.kill(os.getpid(), signal.SIGSEGV),
            b"memory": lambda: bytes(3 << 30),
            b"hang": lambda: time.sleep(1000),
        }[data](),
        (InputError, ValueError),
    )


KINDS = {
    "coco": Kind(_prepare_coco, lambda out: [json.dumps(_coco()).encode()], _change_coco),
    "image": Kind(_prepare_image, _pictures, mutate_bytes),
    "dataset": Kind(_prepare_dataset, lambda out: [json.dumps(_dataset()).encode()], _change_text),
    "yaml": Kind(_prepare_yaml, _yaml_files, _change_yaml),
    "server": Kind(_prepare_server, _conversations, _change_conversation),
    "metadata": Kind(_prepare_tflite, lambda out: [_tflite_file(out)], _change_metadata),
    "tflite": Kind(_prepare_tflite, lambda out: [_tflite_file(out)], _change_tflite),
    "bound": Kind(_prepare_bound, lambda out: [json.dumps(_coco()).encode()], _change_coco, tensorflow=True),
    "record": Kind(_prepare_record, _shards, _change_shard, tensorflow=True),
    "run": Kind(_prepare_run, lambda out: [json.dumps(_dataset()).encode()], _change_text, tensorflow=True),
}
SELF = Kind(_prepare_self, lambda out: [b"taken"], lambda rng, data: data)
