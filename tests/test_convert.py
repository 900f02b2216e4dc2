import errno
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from polarmask_tf import files, lite
from polarmask_tf.data import contours, convert, dataset, processes, publish, records
from polarmask_tf.errors import InputError


def picture(path, height, width, seed=0, **save):
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse = np.random.default_rng(seed).integers(0, 255, (4, 5, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(path, **save)


def blob_mask():
    mask = np.zeros((60, 80), np.uint8)
    yy, xx = np.mgrid[0:60, 0:80] + 0.5
    mask[((xx - 30) / 22) ** 2 + ((yy - 25) / 15) ** 2 < 1] = 1
    mask[20:24, 28:34] = 0  # a hole
    mask[50:55, 60:72] = 1  # a second part
    return mask


def uncompressed(mask):
    flat = mask.ravel(order="F")
    edges = np.flatnonzero(np.diff(flat)) + 1
    runs = np.diff([0, *edges, len(flat)]).tolist()
    return {"size": list(mask.shape), "counts": runs if flat[0] == 0 else [0, *runs]}


def compressed(mask):
    rle = coco_mask.encode(np.asfortranarray(mask))
    return {"size": list(mask.shape), "counts": rle["counts"].decode()}


@pytest.fixture
def coco(tmp_path):
    """A small COCO set with everything that is allowed: (annotation file, image directory, document)."""
    folder = tmp_path / "images"
    picture(folder / "one.jpg", 60, 80)
    picture(folder / "sub/zwei ö.png", 60, 80, 1)
    Image.new("L", (80, 60), 40).save(folder / "gray.jpg")
    picture(folder / "map.bmp", 60, 80, 2)
    picture(folder / "empty.jpg", 30, 40, 3)
    names = {11: "one.jpg", 4: "sub/zwei ö.png", 900000000007: "gray.jpg", 5: "map.bmp", 6: "empty.jpg"}
    images = [{"id": n, "file_name": f, "height": 60, "width": 80} for n, f in names.items()]
    images[-1] |= {"height": 30, "width": 40}
    triangle, square = [10, 10, 30.5, 12, 20, 33.25], [40, 10, 70, 10, 70, 30, 40, 30]
    beyond = [60.0, 40, 95.5, 45, 90, 70, 62, 58]
    blob = blob_mask()
    segmentations = [
        (11, 7, 0, [triangle]),
        (11, 3, 0, [triangle, square]),
        (4, 7, 0, compressed(blob)),
        (4, 9, 1, uncompressed(blob)),
        (900000000007, 3, 0, [beyond]),
        (900000000007, 3, 0, uncompressed(1 - blob)),
        (5, 9, 0, [[40, 30, 70, 30, 70, 10, 40, 10]]),  # turning the other way
        (11, 9, 1, [square]),
    ]
    annotations = []
    for index, (image_id, category_id, crowd, segmentation) in enumerate(segmentations):
        annotations.append(
            {"id": 100 - index, "image_id": image_id, "category_id": category_id, "iscrowd": crowd}
            | {"segmentation": segmentation, "area": 10.5 + index, "bbox": [1, 2, 3, 4]}
        )
    categories = [{"id": n, "name": name} for n, name in ((7, "cat"), (3, "dog"), (9, "größe"), (12, "unused"))]
    document = {"images": images, "annotations": annotations, "categories": categories}
    file = tmp_path / "instances.json"
    file.write_text(json.dumps(document))
    return file, folder, document


def run(coco, out, **options):
    return convert.convert(coco[0], coco[1], out, **({"progress": False} | options))


def read_features(info):
    import tensorflow as tf

    data = tf.data.TFRecordDataset([str(path) for path in info.shard_paths])
    return [tf.train.Example.FromString(record).features.feature for record in data.as_numpy_iterator()]


def assert_equals_pycocotools(annotation_file, out, expected_images=None):
    """Ids, categories, areas, crowd flags and masks in the records are those that pycocotools reads from the JSON."""
    truth = COCO(str(annotation_file))
    ours = records.read_ground_truth(out)
    assert {i["id"] for i in ours["images"]} == set(expected_images or truth.imgs)
    assert sorted(a["id"] for a in ours["annotations"]) == sorted(truth.anns)
    for annotation in ours["annotations"]:
        theirs = truth.anns[annotation["id"]]
        rle = truth.annToRLE(theirs)
        counts = rle["counts"].encode() if isinstance(rle["counts"], str) else rle["counts"]
        assert annotation["segmentation"] == {"size": rle["size"], "counts": counts}
        assert annotation["area"] == np.float32(theirs["area"])
        for key in ("image_id", "category_id", "iscrowd"):
            assert annotation[key] == theirs[key]
    assert sorted(c["id"] for c in ours["categories"]) == sorted(truth.cats)


def test_round_trip_equals_pycocotools(coco, tmp_path):
    info = run(coco, tmp_path / "set", shards=2)
    assert_equals_pycocotools(coco[0], tmp_path / "set")
    assert (info.num_images, info.num_instances, info.num_crowd, info.max_instances) == (5, 8, 2, 2)
    assert [c["category_id"] for c in info.classes] == [3, 7, 9, 12]
    assert [path.name for path in info.shard_paths] == [f"set-0000{i}-of-00002.tfrecord" for i in (0, 1)]
    assert info.skipped == {}
    assert sorted(os.listdir(tmp_path / "set")) == ["dataset.json", "report.json", *[path.name for path in info.shard_paths]]


def test_images_keep_their_bytes_and_order_of_annotations(coco, tmp_path):
    info = run(coco, tmp_path / "set")
    features = {int(f["image/source_id"].bytes_list.value[0]): f for f in read_features(info)}
    for image in coco[2]["images"]:
        found = features[image["id"]]
        encoded = found["image/encoded"].bytes_list.value[0]
        if image["file_name"].endswith("bmp"):
            assert found["image/format"].bytes_list.value[0] == b"png" and encoded[:4] == b"\x89PNG"
            (tmp_path / "again.png").write_bytes(encoded)
            source = np.asarray(Image.open(coco[1] / image["file_name"]))
            assert np.array_equal(np.asarray(Image.open(tmp_path / "again.png")), source)
        else:
            assert encoded == (coco[1] / image["file_name"]).read_bytes()
        assert found["image/filename"].bytes_list.value[0].decode() == image["file_name"]
        ids = [a["id"] for a in coco[2]["annotations"] if a["image_id"] == image["id"]]
        assert list(found["image/object/annotation_id"].int64_list.value) == ids


def test_rings_are_oriented_and_boxes_are_clipped_bounds(coco, tmp_path):
    info = run(coco, tmp_path / "set")
    rings = {}
    for record in map(records.parse, [f for f in raw_records(info)]):
        xy, boxes = record["xy"].numpy(), record["boxes"].numpy()
        parts = np.split(xy, np.cumsum(record["ring_lengths"].numpy())[:-1])
        assert np.all(np.diff(record["ring_instance"].numpy()) >= 0)
        for index, box in enumerate(boxes):
            mine = [part for part, i in zip(parts, record["ring_instance"].numpy(), strict=True) if i == index]
            points = np.concatenate(mine)
            size = np.array([record["width"], record["height"]])
            bounds = [*points.min(axis=0).clip(0), *np.minimum(points.max(axis=0), size)]
            assert np.allclose(box, bounds, atol=1e-4)
            rings[int(record["source_id"].numpy()), index] = mine
    assert all(contours.shoelace(rings[key][0]) > 0 for key in rings)
    assert [len(ring) for ring in rings[11, 1]] == [3, 4]
    assert np.abs(rings[900000000007, 0][0]).max() == 95.5  # kept beyond the border
    blob = blob_mask()
    areas = sorted(map(contours.shoelace, rings[4, 0]))
    assert len(areas) == 3 and areas[0] == pytest.approx(-24, rel=0.2) and sum(areas) == pytest.approx(blob.sum(), rel=1e-4)
    assert contours.iou(rings[4, 0], contours.trace(blob)) >= 0.989
    assert max(sum(map(len, mine)) for mine in rings.values()) == info.max_edges <= 96


def raw_records(info):
    import tensorflow as tf

    return list(tf.data.TFRecordDataset([str(path) for path in info.shard_paths]).as_numpy_iterator())


def test_several_processes_write_the_same_bytes_as_one(coco, tmp_path, monkeypatch):
    monkeypatch.setattr(uuid, "uuid4", lambda: uuid.UUID(int=7))  # all that tells two conversions apart
    one = run(coco, tmp_path / "one/set", shards=3, processes=1)
    two = run(coco, tmp_path / "two/set", shards=3, processes=2)
    for a, b in zip(one.shard_paths, two.shard_paths, strict=True):
        assert a.read_bytes() == b.read_bytes()
    assert (one.directory / "dataset.json").read_text() == (two.directory / "dataset.json").read_text()


@pytest.mark.garden
def test_model_garden_reads_the_shards(coco, tmp_path):
    from official.vision.dataloaders.tf_example_decoder import TfExampleDecoder

    info = run(coco, tmp_path / "set", masks=True)
    truth = COCO(str(coco[0]))
    decoder = TfExampleDecoder(include_mask=True)
    label_of = {c["category_id"]: label + 1 for label, c in enumerate(info.classes)}
    seen = 0
    for raw in raw_records(info):
        decoded = {key: value.numpy() for key, value in decoder.decode(raw).items()}
        annotations = [a for a in coco[2]["annotations"] if a["image_id"] == int(decoded["source_id"])]
        height, width = decoded["image"].shape[:2]
        assert (decoded["height"], decoded["width"]) == (height, width)
        assert decoded["groundtruth_classes"].tolist() == [label_of[a["category_id"]] for a in annotations]
        assert decoded["groundtruth_is_crowd"].tolist() == [bool(a["iscrowd"]) for a in annotations]
        assert decoded["groundtruth_area"].tolist() == [a["area"] for a in annotations]
        boxes = records.parse(raw)["boxes"].numpy()[:, [1, 0, 3, 2]] / [height, width, height, width]
        assert np.allclose(decoded["groundtruth_boxes"], boxes, atol=1e-6)
        for mask, annotation in zip(decoded["groundtruth_instance_masks"], annotations, strict=True):
            assert np.array_equal(mask, truth.annToMask(truth.anns[annotation["id"]]))
            seen += 1
    assert seen == 8


def test_simplification_is_reported_and_bounded(coco, tmp_path, capsys):
    file, _, document = coco
    angles = np.arange(400) * (2 * np.pi / 400)
    radii = 20 + 8 * np.sin(40 * angles)
    gear = np.stack([40 + radii * np.cos(angles), 30 + radii * np.sin(angles)], axis=1).ravel().tolist()
    circle = np.stack([40 + 20 * np.cos(angles), 30 + 20 * np.sin(angles)], axis=1).ravel().tolist()
    document["annotations"][0]["segmentation"] = [gear]
    document["annotations"][1]["segmentation"] = [circle]
    file.write_text(json.dumps(document))
    info = run(coco, tmp_path / "set", max_edges=60, progress=True)
    assert info.max_edges == 60
    report = capsys.readouterr().out
    assert "1 x polygon simplified to 60 edges with an IoU below 0.99 (first: image 11, one.jpg, annotation 100:" in report
    assert_equals_pycocotools(file, tmp_path / "set")


def test_a_rerun_replaces_what_was_there(coco, tmp_path, capsys):
    first = run(coco, tmp_path / "set", shards=4)
    (tmp_path / "set/notes.txt").write_text("mine")
    (tmp_path / "set/set-00000-of-00009.tfrecord.tmp").write_text("left by a killed run")
    again = run(coco, tmp_path / "set", shards=2, progress=True)
    assert len(first.shard_paths) == 4 and len(again.shard_paths) == 2
    assert sorted(os.listdir(tmp_path / "set")) == [
        "dataset.json",
        "notes.txt",
        "report.json",
        *[p.name for p in again.shard_paths],
    ]
    assert "5 images, 8 instances (2 crowd), 4 classes, 2 shards" in capsys.readouterr().out
    assert_equals_pycocotools(coco[0], tmp_path / "set")


def test_a_set_is_the_old_or_the_new_one_at_every_moment(coco, tmp_path, monkeypatch):
    """Stopped before each file operation of the end, the directory loads, with the images of one conversion."""
    out = tmp_path / "set"
    for stop in range(14):
        before = run(coco, out, shards=3)
        calls = []

        def stopped(function, calls=calls, stop=stop):
            def call(*arguments):
                calls.append(function)
                if len(calls) > stop:
                    raise KeyboardInterrupt
                return function(*arguments)

            return call

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", stopped(os.replace))
            patch.setattr(Path, "unlink", stopped(Path.unlink))
            try:
                run(coco, out, shards=3)
            except KeyboardInterrupt:
                ended = False
            else:
                ended = True
        info = dataset.load(out)
        assert (info.id != before.id) == (len(calls) > 3 and stop > 3) or ended
        assert len(records.read_ground_truth(out)["images"]) == 5
        if ended:
            break
    assert ended and stop > 4
    run(coco, out, shards=3)
    assert len(os.listdir(out)) == 5  # what was left over is gone


def test_shards_of_another_conversion_are_told(coco, tmp_path):
    first, second = (run(coco, tmp_path / name / "set", shards=2) for name in ("one", "two"))
    assert first.id != second.id and len(first.id) == 32
    for features in read_features(first):
        assert features["image/dataset_id"].bytes_list.value[:] == [first.id.encode()]
    first.shard_paths[1].write_bytes(second.shard_paths[1].read_bytes())
    for read in (records.read_ground_truth, lambda path: list(records.iter_images(path))):
        with pytest.raises(InputError, match=r"set-00001-of-00002\.tfrecord: a record of another conversion than dataset"):
            read(first.directory)


def test_one_conversion_at_a_time_into_a_directory(coco, tmp_path):
    done, refused = [], []

    def work(number):
        try:
            done.append(run(coco, tmp_path / "set", shards=1 + number))
        except InputError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=work, args=[number]) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(done) + len(refused) == 4 and done
    assert all(f"in use by polarmask convert (process {os.getpid()} on" in text for text in refused)
    assert_equals_pycocotools(coco[0], tmp_path / "set")
    with files.lock(tmp_path / "set", "train"), pytest.raises(InputError, match="in use by polarmask train"):
        run(coco, tmp_path / "set")


@pytest.mark.parametrize("options", [{}, {"split": [0.3]}])
def test_a_directory_in_use_is_told_before_annotations_are_read(coco, tmp_path, monkeypatch, options):
    """Also of a conversion into train/ and val/ in it, beside which one without splits would lie."""
    monkeypatch.setattr(convert.recognise, "read", lambda *_, **__: pytest.fail("read"))
    with files.lock(tmp_path / "set", "convert"), pytest.raises(InputError, match="in use by polarmask convert"):
        convert.convert_dataset(coco[0], tmp_path / "set", images=coco[1], progress=False, **options)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        convert.convert_dataset(coco[0], tmp_path / "file", images=coco[1], progress=False, **options)


def test_a_disk_that_is_full_at_the_very_end_leaves_what_was_there(coco, tmp_path, monkeypatch):
    run(coco, tmp_path / "set")
    before = {path.name: path.read_bytes() for path in (tmp_path / "set").iterdir()}
    replace = os.replace

    def full(source, target):
        if os.path.basename(target) == "dataset.json":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, target)

    monkeypatch.setattr(files.os, "replace", full)
    with pytest.raises(InputError, match=r"dataset\.json: cannot be written: No space left on device"):
        run(coco, tmp_path / "set")
    assert {path.name: path.read_bytes() for path in (tmp_path / "set").iterdir()} == before


def test_decoded_shards_hold_the_pixels(coco, tmp_path):
    plain, decoded = run(coco, tmp_path / "plain"), run(coco, tmp_path / "decoded", decoded=True)
    assert_equals_pycocotools(coco[0], tmp_path / "decoded")
    before, after = (
        {int(f["image/source_id"].bytes_list.value[0]): f for f in read_features(info)} for info in (plain, decoded)
    )
    assert before.keys() == after.keys()
    for number, features in after.items():
        assert features["image/format"].bytes_list.value[:] == [b"bmp"]
        encoded = features["image/encoded"].bytes_list.value[0]
        assert encoded[:2] == b"BM"
        pixels = lite.read_image(io.BytesIO(before[number]["image/encoded"].bytes_list.value[0]))
        np.testing.assert_array_equal(lite.read_image(io.BytesIO(encoded)), pixels)
        assert {key for key in features if features[key] != before[number][key]} == {
            "image/encoded",
            "image/format",
            "image/dataset_id",
        }


def test_the_room_that_decoded_images_take_is_known_before(coco, tmp_path, monkeypatch):
    need = 3 * (4 * 60 * 80 + 30 * 40)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(publish.shutil, "disk_usage", lambda path: usage._replace(free=need - 1))
    with pytest.raises(InputError, match=r"decoded images take 6.12e-05 GB, .* are free; make room"):
        run(coco, tmp_path / "set", decoded=True)
    assert not (tmp_path / "set").exists()
    run(coco, tmp_path / "set")
    monkeypatch.setattr(publish.shutil, "disk_usage", lambda path: usage._replace(free=need))
    run(coco, tmp_path / "set", decoded=True)


def test_instances_are_counted_by_image(coco, tmp_path):
    info = run(coco, tmp_path / "set", shards=2)
    assert info.instances_per_image == {0: 1, 1: 2, 2: 2}  # crowds apart


def test_crowds_may_be_taken_for_instances(coco, tmp_path):
    info = run(coco, tmp_path / "set", crowd_as_instances=True)
    assert (info.num_instances, info.num_crowd, info.instances_per_image) == (8, 0, {0: 1, 1: 1, 2: 2, 3: 1})
    assert info.notes["crowd region taken for a single object, as asked"] == 2


def test_shards_never_outnumber_images_and_nonsense_is_refused(coco, tmp_path):
    assert len(run(coco, tmp_path / "set", shards=99).shard_paths) == 5
    for options in ({"shards": 0}, {"processes": 0}, {"max_edges": 2}, {"exif": "turn"}, {"bit_depth": 7}, {"bit_depth": 17}):
        with pytest.raises(InputError, match=next(iter(options))):
            run(coco, tmp_path / "set", **options)


SLOW = """
import sys, time
from pathlib import Path
from polarmask_tf.data import convert
if __name__ == "__main__":
    print("started", flush=True)
    convert.convert(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), shards=4, processes=int(sys.argv[4]))
"""


def enlarge(coco):
    """4,000 images of five masks each: seconds of work."""
    file, _, document = coco
    image = document["images"][1]
    document["images"] = [image | {"id": 1000 + i} for i in range(4000)]
    blob = compressed(blob_mask())
    document["annotations"] = [
        {"id": i, "image_id": 1000 + i // 5, "category_id": 3, "area": 5, "segmentation": blob} for i in range(20000)
    ]
    file.write_text(json.dumps(document))


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT])
def test_an_interrupted_run_leaves_no_half_shard(coco, tmp_path, processes, end):
    file = coco[0]
    enlarge(coco)
    (tmp_path / "slow.py").write_text(SLOW)
    out = tmp_path / "set"
    command = [sys.executable, tmp_path / "slow.py", file, coco[1], out, str(processes)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)

    def written():
        return sum(partial.stat().st_size for partial in out.glob("*.tmp")) if out.is_dir() else 0

    deadline = time.monotonic() + 60
    while written() < 20000 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    assert process.poll() is None and written() >= 20000, process.communicate()
    if end == signal.SIGINT:
        os.killpg(process.pid, end)  # as a terminal does: the workers get it too
    else:
        process.kill()
    output = process.communicate(timeout=60)[1].decode()
    assert not list(out.glob("*.tfrecord")) and not (out / "dataset.json").exists()
    if end == signal.SIGINT:
        assert not out.exists() and "KeyboardInterrupt" in output.splitlines()[-1]
        assert output.count("Traceback") == 1  # of the parent, which the command line catches; none of a worker
    else:
        with pytest.raises(InputError, match=r"no dataset\.json"):
            dataset.load(out)
    deadline = time.monotonic() + 20
    while group_is_alive(process.pid):
        assert time.monotonic() < deadline, "workers outlive the run"
        time.sleep(0.1)


@pytest.mark.parametrize(("started", "then"), [(1, 0.0), (2, 0.0), (3, 0.2)])  # two workers and a resource tracker
def test_ctrl_c_while_the_workers_start_shows_no_traceback_of_theirs(coco, tmp_path, started, then):
    enlarge(coco)
    (tmp_path / "slow.py").write_text(SLOW)
    command = [sys.executable, tmp_path / "slow.py", coco[0], coco[1], tmp_path / "set", "2"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, start_new_session=True)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    deadline = time.monotonic() + 60
    while len(children.read_text().split()) < started and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(then)
    os.killpg(process.pid, signal.SIGINT)
    output = process.communicate(timeout=60)[1].decode()
    assert output.count("Traceback") == 1 and "KeyboardInterrupt" in output.splitlines()[-1], output


def test_ctrl_c_waits_until_the_pool_is_made(monkeypatch):
    """Half of it would leave semaphores, of which the resource tracker complains after the traceback."""
    made = []

    class Pool(processes.ProcessPoolExecutor):
        def __init__(self, *args, **kwargs):
            signal.raise_signal(signal.SIGINT)
            super().__init__(*args, **kwargs)
            made.append(self)

    monkeypatch.setattr(processes, "ProcessPoolExecutor", Pool)
    with pytest.raises(KeyboardInterrupt):
        processes.run_tasks(len, [()], 2, None)
    assert made


def group_is_alive(group):
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_no_tensorflow_is_loaded(coco, tmp_path):
    code = (
        "import sys; from polarmask_tf.data.convert import convert; from pathlib import Path; "
        "convert(*map(Path, sys.argv[1:]), progress=False); sys.exit('tensorflow' in sys.modules)"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code, coco[0], coco[1], tmp_path / "set"], env=environment, check=True)


def test_real_coco(shared, tmp_path):
    source = shared / "data/coco_dev"
    info = convert.convert(source / "annotations/instances_dev.json", source / "images", tmp_path / "dev", progress=False)
    assert (info.num_images, info.num_instances, info.num_crowd, len(info.classes)) == (92, 829, 9, 80)
    assert info.skipped == {} and info.max_edges <= 96
    assert_equals_pycocotools(source / "annotations/instances_dev.json", tmp_path / "dev")


def test_real_nuclei(shared, tmp_path):
    source = shared / "data/nuclei/val"
    info = convert.convert(source / "annotations/instances_val.json", source / "images", tmp_path / "val", progress=False)
    assert (info.num_images, info.num_instances, info.num_crowd, info.max_instances) == (50, 1628, 0, 138)
    assert info.skipped == {} and info.max_edges <= 96
    assert_equals_pycocotools(source / "annotations/instances_val.json", tmp_path / "val")
