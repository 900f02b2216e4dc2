"""The export for TF Serving: what its signatures take and return, what they refuse, and what lies around them."""

import io
import itertools
import json
import re
import resource
import struct
import sys
import types
import zlib
from functools import partial

import numpy as np
import pytest
from benchmarks import serving as benchmark
from PIL import Image

from helpers.exports import CLASSES, RADIUS, expected_scale, fake_model, spot
from polarmask_tf import config as configs
from polarmask_tf import files
from polarmask_tf.errors import InputError
from polarmask_tf.inference.predictor import load_predictor, run_predictor

pytest.importorskip("tensorflow_serving.apis", reason="needs the extra `serving`")
import tensorflow as tf
from tensorflow_serving.apis import prediction_log_pb2

from polarmask_tf.export import decode, graph, serving

MAX_PIXELS = 1_000_000
CONTRACT = ["num_detections", "detection_scores", "detection_classes", "detection_boxes", "detection_polygons"]
SIGNATURES = ["serving_default", "images", "tf_example", "metadata"]
SIGNATURES += [f"model_garden_{kind}" for kind in ("image_bytes", "image_tensor", "tf_example")]


def encoded(image, kind="PNG", mode="RGB", **options):
    """An array, or a picture, as a file's bytes."""
    file = io.BytesIO()
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    picture.convert(mode).save(file, kind, **options)
    return file.getvalue()


def example(**features):
    """A serialized tf.train.Example of bytes, with / for _ in their names."""
    features = {
        name.replace("_", "/"): tf.train.Feature(bytes_list=tf.train.BytesList(value=[value]))
        for name, value in features.items()
    }
    return tf.train.Example(features=tf.train.Features(feature=features)).SerializeToString()


class Model:
    """A loaded export, asked by signature name."""

    def __init__(self, path):
        self.path, self.loaded = path, tf.saved_model.load(str(path))

    def __call__(self, signature, given):
        if not isinstance(given, np.ndarray):
            given = np.array(given, object)
        function = self.loaded.signatures[signature]
        (name,) = function.structured_input_signature[1]
        dtype = tf.string if given.dtype == object else given.dtype
        return {key: value.numpy() for key, value in function(**{name: tf.constant(given, dtype)}).items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("serving")


def load(folder, fit):
    model = fake_model(fit, (48, 90) if fit == "short_side" else (64, 96))
    contract = "model_garden" if fit == "letterbox" else None
    return Model(serving.export_serving(model, folder, name=fit, contract=contract, max_pixels=MAX_PIXELS))


@pytest.fixture(scope="module")
def letterbox(folder):
    return load(folder, "letterbox")


@pytest.fixture(scope="module")
def short_side(folder):
    return load(folder, "short_side")


@pytest.fixture(scope="module")
def stretch(folder):
    return load(folder, "stretch")


def test_the_signatures_and_their_tensors(letterbox):
    signatures = {
        name: (
            {k: (v.dtype, v.shape.as_list()) for k, v in function.structured_input_signature[1].items()},
            {k: v.dtype for k, v in function.structured_outputs.items()},
        )
        for name, function in letterbox.loaded.signatures.items()
    }
    assert sorted(signatures) == sorted(SIGNATURES)
    text, pixels = (tf.string, [None]), (tf.uint8, [None, None, None, 3])
    assert [signatures[name][0] for name in SIGNATURES] == [
        {"image_bytes": text},
        {"images": pixels},
        {"examples": text},
        {"request": text},
        {"inputs": text},
        {"inputs": pixels},
        {"inputs": text},
    ]
    for name in SIGNATURES[:3]:
        assert signatures[name][1] == {
            "num_detections": tf.int32,
            "detection_scores": tf.float32,
            "detection_classes": tf.int32,
            "detection_boxes": tf.float32,
            "detection_polygons": tf.float32,
        }


@pytest.mark.parametrize("size", [(64, 96), (96, 64), (128, 192), (40, 150), (90, 48)])
@pytest.mark.parametrize("fit", ["letterbox", "stretch", "short_side"])
def test_polygons_lie_on_the_image_that_was_sent(request, fit, size):
    model = request.getfixturevalue(fit)
    (height, width), (x, y) = size, (size[1] // 3, size[0] // 2)
    wide, high = expected_scale(fit, "saved_model", height, width)
    side = int(np.ceil(2 * max(wide, high)))
    image = spot(height, width, x, y, side)
    answers = [
        model("serving_default", [encoded(image)]),
        model("images", image[None]),
        model("tf_example", [example(image_encoded=encoded(image))]),
    ]
    for found in answers:
        assert sorted(found) == sorted(CONTRACT)
        assert found["num_detections"].tolist() == [2] and found["detection_classes"][0, :2].tolist() == [1, 0]
        np.testing.assert_allclose(found["detection_scores"][0], [0.9, 0.4, 0])
        polygon = found["detection_polygons"][0, 1] * [width, height]
        assert polygon[0, 0] - polygon[3, 0] == pytest.approx(RADIUS * wide, rel=1e-3)
        assert polygon[1, 1] - polygon[4, 1] == pytest.approx(RADIUS * np.sqrt(3) / 2 * high, rel=1e-3)
        center = (polygon[0] + polygon[3]) / 2
        assert (x - wide, y - high) <= tuple(center) and tuple(center) <= (x + side + wide, y + side + high)
        box = found["detection_boxes"][0, 1] * [height, width, height, width]
        np.testing.assert_allclose(box, [*polygon.min(0)[::-1], *polygon.max(0)[::-1]], atol=1e-3)
        np.testing.assert_allclose(found["detection_polygons"], answers[0]["detection_polygons"], atol=1e-6)


@pytest.mark.parametrize("fit", ["letterbox", "short_side"])
def test_one_batch_of_images_of_any_sizes(request, fit):
    model = request.getfixturevalue(fit)
    images = [spot(64, 96, 60, 20, 6), spot(96, 64, 20, 60, 6), spot(40, 150, 100, 30, 6), spot(30, 30, 12, 12, 4)]
    together = model("serving_default", [encoded(image) for image in images])
    for row, image in enumerate(images):
        alone = model("serving_default", [encoded(image)])
        for name in CONTRACT:  # with short_side the others' canvases are another size: this one is padded to it
            np.testing.assert_allclose(together[name][row], alone[name][0], atol=1e-6, err_msg=f"{row} {name}")


@pytest.mark.parametrize("model", ["letterbox", "short_side"])
def test_no_images_give_no_rows(request, model):
    model = request.getfixturevalue(model)
    for signature in ("serving_default", "tf_example"):
        found = model(signature, [])
        assert {name: value.shape[0] for name, value in found.items()} == dict.fromkeys(CONTRACT, 0)
    assert model("images", np.zeros((0, 20, 30, 3), np.uint8))["detection_polygons"].shape == (0, 3, 6, 2)


PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 20, 3), np.uint8)).resize((160, 96))


def with_alpha(image):
    image = image.copy()
    image.putalpha(77)
    return image


GOOD = {
    "JPEG": encoded(PICTURE, "JPEG", quality=90),
    "progressive JPEG": encoded(PICTURE, "JPEG", progressive=True),
    "gray JPEG": encoded(PICTURE, "JPEG", "L"),
    "CMYK JPEG": encoded(PICTURE, "JPEG", "CMYK"),
    "PNG": encoded(PICTURE),
    "gray PNG": encoded(PICTURE, mode="L"),
    "palette PNG": encoded(PICTURE, mode="P"),
    "black and white PNG": encoded(PICTURE, mode="1"),
    "PNG with alpha": encoded(with_alpha(PICTURE), mode="RGBA"),
    "gray PNG with alpha": encoded(with_alpha(PICTURE), mode="LA"),
    "GIF": encoded(PICTURE, "GIF", "P"),
    "animated GIF": encoded(PICTURE, "GIF", "P", save_all=True, append_images=[PICTURE.rotate(180)], comment=b"hi" * 200),
    "BMP": encoded(PICTURE, "BMP"),
    "BMP with alpha": encoded(with_alpha(PICTURE), "BMP", "RGBA"),
    "WebP": encoded(PICTURE, "WEBP"),
    "lossless WebP": encoded(PICTURE, "WEBP", lossless=True),
    "WebP with alpha": encoded(with_alpha(PICTURE), "WEBP", "RGBA", lossless=True, exact=True),
}


def decoded(content):
    content, problem = decode.examine(tf.constant(content), MAX_PIXELS)
    assert problem == b""
    return decode.decode(content).numpy()


@pytest.mark.parametrize("kind", GOOD)
def test_every_kind_is_decoded_as_pillow_does(letterbox, kind):
    expected = np.asarray(Image.open(io.BytesIO(GOOD[kind])).convert("RGB"))
    np.testing.assert_array_equal(decoded(GOOD[kind]), expected)
    found, same = letterbox("serving_default", [GOOD[kind]]), letterbox("images", expected[None])
    for name in CONTRACT:
        np.testing.assert_allclose(found[name], same[name], atol=1e-6)


def test_sixteen_bits_keep_their_high_byte():
    pixels = np.random.default_rng(0).integers(0, 2**16, (20, 30), np.uint16)
    np.testing.assert_array_equal(decoded(encoded(Image.fromarray(pixels), mode="I;16"))[..., 0], pixels >> 8)


def test_exif_rotation_is_ignored():
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    turned = encoded(PICTURE, "JPEG", quality=90, exif=exif.tobytes())
    assert turned != GOOD["JPEG"]
    np.testing.assert_array_equal(decoded(turned), decoded(GOOD["JPEG"]))


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_of(width, height):
    """A PNG whose header promises more than its data holds; and it holds much: 10 MB of zeros in 10 KB."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(10_000_000))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + data


def jpeg_of(width, height, content=GOOD["JPEG"]):
    """A JPEG whose frame header says another size."""
    at = content.index(b"\xff\xc0") + 5
    return content[:at] + struct.pack(">HH", height, width) + content[at + 4 :]


def patched(content, at, data):
    return content[:at] + data + content[at + len(data) :]


def with_thumbnail(content, thumbnail):
    """A JPEG with another one in its metadata, before its own headers."""
    segment = b"Exif\0\0" + thumbnail
    return content[:2] + b"\xff\xe1" + struct.pack(">H", len(segment) + 2) + segment + content[2:]


def of_many_scans(count):
    content = GOOD["progressive JPEG"]
    last = content.rindex(b"\xff\xda")
    return content[:-2] + content[last:-2] * count + content[-2:]


GIF = GOOD["GIF"]
FRAME = GIF.index(b"\x2c", 13 + 3 * 256)  # of its image descriptor, behind the color table
HUGE = struct.pack("<HH", 20_000, 20_000)
BOMBS = {
    "PNG": (png_of(20_000, 20_000), "20000 x 20000 pixels"),
    "PNG, one side": (png_of(2_000_001, 1), "2000001 x 1 pixels"),
    "PNG, beyond 64 bits": (png_of(2**32 - 1, 2**32 - 1), "4294967295 x 4294967295 pixels"),
    "JPEG": (jpeg_of(20_000, 20_000), "20000 x 20000 pixels"),
    "JPEG with a small thumbnail": (
        with_thumbnail(jpeg_of(20_000, 20_000), encoded(PICTURE.resize((16, 16)), "JPEG")),
        "20000 x 20000 pixels",
    ),
    "JPEG of many scans": (of_many_scans(1000), "a JPEG of 10"),
    "GIF, canvas": (patched(GIF, 6, HUGE), "20000 x 20000 pixels"),
    "GIF, frame": (patched(GIF, FRAME + 5, HUGE), "20000 x 20000 pixels"),
    "BMP": (patched(GOOD["BMP"], 18, struct.pack("<ii", 20_000, -20_000)), "20000 x 20000 pixels"),
    "lossless WebP": (patched(GOOD["lossless WebP"], 21, struct.pack("<I", 16_383 | 16_383 << 14)), "16384 x 16384 pixels"),
    "WebP": (patched(GOOD["WebP"], 26, struct.pack("<HH", 16_383, 16_383)), "16383 x 16383 pixels"),
    "extended WebP": (
        b"RIFF\x60\0\0\0WEBPVP8X\x0a\0\0\0\0\0\0\0" + b"\x3f\x42\x0f" * 2 + b"VP8 " + bytes(66),
        "1000000 x 1000000 pixels",
    ),
}
DAMAGED = "cannot be decoded: damaged"
BAD = {
    "nothing": (b"", "no data"),
    "one byte": (b"\xff", "not an image"),
    "random bytes": (np.random.default_rng(0).bytes(500), "not an image"),
    "text": (b"<html>404</html>", "not an image; JPEG, PNG, GIF, BMP or WebP is expected"),
    "TIFF": (encoded(PICTURE, "TIFF"), "not an image"),
    "SVG": (b"<svg/>", "not an image"),
    # From 2.21 on TensorFlow decodes it, and its size is not read here.
    "JPEG XL": (b"\xff\x0a" + bytes(60), "not an image"),
    "JPEG XL in boxes": (b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(60), "not an image"),
    "half a JPEG": (GOOD["JPEG"][: len(GOOD["JPEG"]) // 2], DAMAGED),
    "half a progressive JPEG": (GOOD["progressive JPEG"][:1000], DAMAGED),
    "the start of a JPEG": (b"\xff\xd8\xff", DAMAGED),
    "half a PNG": (GOOD["PNG"][:2000], DAMAGED),
    "the start of a PNG": (b"\x89PNG\r\n\x1a\n", "without pixels"),
    "a PNG with a wrong checksum": (patched(GOOD["PNG"], 60, b"\0\1\2"), DAMAGED),
    "a PNG without pixels": (png_of(0, 5), "without pixels"),
    "half a GIF": (GIF[: len(GIF) // 2], DAMAGED),
    "the start of a GIF": (GIF[:20], "whose first frame cannot be found"),
    "a GIF in a million blocks": (GIF[:FRAME] + b"\x21\xfe" + b"\1a\2bb" * 400_000, "whose first frame cannot be found"),
    "half a BMP": (GOOD["BMP"][:2000], DAMAGED),
    "the start of a BMP": (b"BM", "a BMP with a palette, compressed or of an old kind"),
    "a BMP with a palette": (encoded(PICTURE, "BMP", "P"), "a BMP with a palette, compressed or of an old kind"),
    "half a WebP": (GOOD["WebP"][:300], DAMAGED),
    "the start of a WebP": (b"RIFF\x10\0\0\0WEBP", "without pixels"),
    "an animated WebP": (
        encoded(PICTURE, "WEBP", save_all=True, append_images=[PICTURE.rotate(90), PICTURE.rotate(180)]),
        "an animated WebP",
    ),
}


def refusal(model, signature, given):
    with pytest.raises(tf.errors.InvalidArgumentError) as raised:
        model(signature, given)
    return re.search(r"assertion failed: \[(.*)\]\n", raised.value.message)[1]


@pytest.mark.parametrize("case", [*BAD, *BOMBS])
def test_a_bad_image_fails_its_batch_and_is_named(letterbox, case):
    bad, why = {**BAD, **BOMBS}[case]
    limit = " (width x height), the limit set at export is 1000000" if why.endswith("pixels") and case in BOMBS else ""
    for batch, number in (([GOOD["JPEG"], GOOD["PNG"], bad, GOOD["GIF"]], 2), ([bad], 0)):
        message = refusal(letterbox, "serving_default", batch)
        assert message.startswith(f"image {number} of the batch (the first is 0): ")
        assert why + limit in message
    assert letterbox("serving_default", [GOOD["JPEG"], GOOD["PNG"], GOOD["GIF"]])["num_detections"].tolist() == [2, 2, 2]


@pytest.mark.parametrize("case", BOMBS)
def test_a_decompression_bomb_costs_no_memory(letterbox, case):
    bad, _ = BOMBS[case]
    refusal(letterbox, "serving_default", [bad])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(3):
        refusal(letterbox, "serving_default", [bad])
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 30_000  # KB; unpacked they are 750 MB and more


def test_the_first_of_several_bad_images_is_named(letterbox):
    assert refusal(letterbox, "serving_default", [GOOD["PNG"], b"?", b""]).startswith("image 1 of the batch")


def test_the_limit_itself_is_allowed(letterbox):
    flat = np.zeros((1000, 1000, 3), np.uint8)
    assert letterbox("serving_default", [encoded(flat)])["num_detections"].tolist() == [2]
    larger = encoded(np.zeros((1000, 1001, 3), np.uint8), "JPEG")
    assert "1001 x 1000 pixels (width x height), the limit" in refusal(letterbox, "serving_default", [larger])


def test_the_thumbnail_of_a_jpeg_does_not_count(letterbox):
    """Neither the size nor the scans of an image in the metadata."""
    content = with_thumbnail(GOOD["JPEG"], jpeg_of(20_000, 20_000, encoded(PICTURE.resize((16, 16)), "JPEG")))
    np.testing.assert_array_equal(decoded(content), decoded(GOOD["JPEG"]))


def test_of_a_gif_of_many_frames_only_the_first_is_unpacked():
    """Unpacked as a whole it is a gigabyte."""
    blank = Image.new("P", (1000, 1000))
    one = encoded(blank, "GIF", "P")
    frame = one[one.index(b"\x2c", 13 + 3 * (2 << (one[10] & 7)) if one[10] & 128 else 13) : -1]
    content = one[:-1] + frame * 1000 + b";"
    assert decoded(one).shape == (1000, 1000, 3)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert decoded(content).shape == (1000, 1000, 3)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000


def test_bad_examples_and_images_without_pixels(letterbox):
    good = example(image_encoded=GOOD["PNG"])
    without = refusal(letterbox, "tf_example", [good, example(image_other=b"x")])
    assert without == "image 1 of the batch (the first is 0): no data"
    assert DAMAGED in refusal(letterbox, "tf_example", [good, b"\xff\xff\xff"])
    assert "not an image" in refusal(letterbox, "tf_example", [example(image_encoded=b"x"), good])
    for shape in ((1, 0, 5, 3), (2, 5, 0, 3)):
        assert refusal(letterbox, "images", np.zeros(shape, np.uint8)) == "images without pixels"


def test_two_thousand_requests_of_damaged_files(letterbox):
    """Every one gets an answer or INVALID_ARGUMENT; what is sent in between is answered as before."""
    rng = np.random.default_rng(0)
    small = PICTURE.resize((40, 24))
    sources = [
        encoded(small, "JPEG"),
        encoded(small, "JPEG", progressive=True),
        encoded(small),
        encoded(small, mode="P"),
        encoded(small, "GIF", "P", save_all=True, append_images=[small.rotate(180)]),
        encoded(small, "BMP"),
        encoded(small, "WEBP"),
        encoded(with_alpha(small), "WEBP", "RGBA", lossless=True),
        encoded(small, "WEBP", save_all=True, append_images=[small.rotate(180)]),
    ]
    expected = letterbox("serving_default", [GOOD["JPEG"]])
    answered = refused = 0
    for turn in range(2000):
        data = bytearray(sources[turn % len(sources)])
        head = turn % 2  # every other time only the headers are damaged, and all the rest is good
        for _ in range(rng.integers(1, 5)):
            at = rng.integers(0, max(1, min(len(data), 64) if head else len(data)))
            damage = rng.integers(0, 4) if data else 2
            if damage == 0:
                data[at] = rng.integers(0, 256)
            elif damage == 1:
                data[at] = rng.choice([0, 1, 0x7F, 0x80, 0xFF])
            elif damage == 2:
                data[at:at] = rng.bytes(rng.integers(1, 9))
            else:
                del data[at : at + rng.integers(1, 9) if rng.random() < 0.9 else len(data)]
        try:
            found = letterbox("serving_default", [bytes(data)])
            answered += 1
            assert np.isfinite(found["detection_polygons"]).all() and found["num_detections"].tolist() == [2]
        except tf.errors.InvalidArgumentError as error:
            refused += 1
            assert "image 0 of the batch (the first is 0): " in error.message
        if turn % 100 == 0:
            again = letterbox("serving_default", [GOOD["JPEG"]])
            for name in CONTRACT:
                np.testing.assert_array_equal(again[name], expected[name])
    assert answered + refused == 2000 and answered > 200 and refused > 200


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_images_of_ever_new_sizes_leave_nothing_behind(letterbox):
    rng = np.random.default_rng(0)

    def ask(count):
        for _ in range(count):
            image = np.zeros((*rng.integers(1, 300, 2), 3), np.uint8)
            letterbox("images", image[None])
            letterbox("serving_default", [encoded(image, "BMP"), GOOD["PNG"]][: rng.integers(1, 3)])

    ask(100)
    grown = []
    for _ in range(3):
        before = benchmark.resident()
        ask(100)
        grown.append(benchmark.resident() - before)
    assert min(grown) < 5, grown  # each of them leaving its 0.1 MB behind would be 10 every time


def test_a_session_runs_it_as_tf_serving_does(letterbox):
    """By the tag "serve" and the names of tensors, without the Python objects of TensorFlow 2."""
    expected = letterbox("serving_default", [GOOD["PNG"], GOOD["GIF"]])
    with tf.compat.v1.Session(graph=tf.Graph()) as session:
        meta = tf.compat.v1.saved_model.load(session, ["serve"], str(letterbox.path))

        def ask(name, *given):
            signature = meta.signature_def[name]
            (source,) = signature.inputs.values()
            outputs = {key: info.name for key, info in signature.outputs.items()}
            return session.run(outputs, {source.name: np.array(given, object)})

        found = ask("serving_default", GOOD["PNG"], GOOD["GIF"])
        for name in CONTRACT:
            np.testing.assert_array_equal(found[name], expected[name])
        with pytest.raises(tf.errors.InvalidArgumentError, match=r"image 1 of the batch \(the first is 0\): not an image"):
            ask("serving_default", GOOD["PNG"], b"no")
        assert ask("serving_default", GOOD["PNG"])["num_detections"].tolist() == [2]


def test_warm_up_requests_parse_and_run(letterbox):
    file = letterbox.path / "assets.extra" / "tf_serving_warmup_requests"
    logs = [prediction_log_pb2.PredictionLog.FromString(record.numpy()) for record in tf.data.TFRecordDataset(str(file))]
    requests = [log.predict_log.request for log in logs]
    assert all(log.WhichOneof("log_type") == "predict_log" for log in logs)
    assert sorted(request.model_spec.signature_name for request in requests) == sorted(SIGNATURES)
    for request in requests:
        assert request.model_spec.name == "letterbox"
        function = letterbox.loaded.signatures[request.model_spec.signature_name]
        outputs = function(**{name: tf.constant(tf.make_ndarray(value)) for name, value in request.inputs.items()})
        if request.model_spec.signature_name != "metadata":
            assert outputs["num_detections"].numpy().tolist() == [2]


def test_what_lies_in_a_version(letterbox):
    assert letterbox.path.name == "1" and letterbox.path.parent.name == "letterbox"
    assert sorted(path.name for path in letterbox.path.parent.iterdir()) == ["1"]
    extra = letterbox.path / "assets.extra"
    assert {"saved_model.pb", "variables", "assets.extra"} <= {path.name for path in letterbox.path.iterdir()}
    assert (extra / "labels.txt").read_text() == "sun\nmoon\n"
    description = json.loads((extra / "metadata.json").read_text())
    assert description["classes"] == CLASSES
    assert description["serving"] == {"name": "letterbox", "max_pixels": MAX_PIXELS, "contract": "model_garden"}
    served = letterbox("metadata", [b"", b"x"])["metadata"]
    assert [json.loads(text) for text in served] == [description] * 2
    # TF Serving may run as somebody else: nothing is more private than what is usual here.
    assert letterbox.path.stat().st_mode == letterbox.path.parent.stat().st_mode


def quick_save(module, path, signatures):
    serving.Path(path).mkdir()
    (serving.Path(path) / "saved_model.pb").write_bytes(b"")


def test_a_version_is_never_overwritten_and_appears_only_whole(tmp_path, monkeypatch):
    model = fake_model("letterbox", (64, 96))
    monkeypatch.setattr(tf.saved_model, "save", quick_save)
    (tmp_path / "m" / "7").mkdir(parents=True)
    (tmp_path / "m" / "old").mkdir()
    assert serving.export_serving(model, tmp_path, name="m") == tmp_path / "m" / "8"
    assert serving.export_serving(model, tmp_path, name="m") == tmp_path / "m" / "9"
    assert serving.export_serving(model, tmp_path, name="n") == tmp_path / "n" / "1"
    seen = []

    def full_disk(module, path, signatures):
        quick_save(module, path, signatures)
        seen.extend(other.name for other in (tmp_path / "m").iterdir())
        raise tf.errors.ResourceExhaustedError(None, None, "{{node Save}} x/model; No space left on device\nmore lines")

    monkeypatch.setattr(tf.saved_model, "save", full_disk)
    with pytest.raises(InputError, match=r"/m: cannot be written: No space left on device$"):
        serving.export_serving(model, tmp_path, name="m")
    assert sorted(name for name in seen if name.isdecimal()) == ["7", "8", "9"]  # what TF Serving looks at
    assert {path.name for path in (tmp_path / "m").iterdir()} == {"7", "8", "9", "old"}


def test_what_cannot_be_exported(tmp_path, monkeypatch):
    model = fake_model("letterbox", (64, 96))

    def error(**options):
        with pytest.raises(InputError) as raised:
            serving.export_serving(model, tmp_path / "out", **{"name": "m", **options})
        return str(raised.value)

    for name in ("", "a/b", "..", "1", "a b", "-x"):
        assert "--name" in error(name=name)
    assert error(contract="torch") == "--contract 'torch': possible is model_garden"
    assert "at least 1" in error(max_pixels=0) and "at least 1" in error(mask_size=0)
    (tmp_path / "out").write_text("a file")
    assert error().endswith("/out/m: cannot be written: Not a directory")
    monkeypatch.setitem(sys.modules, "tensorflow_serving.apis", None)
    assert "pip install 'polarmask_tf[serving]'" in error()
    assert (tmp_path / "out").read_text() == "a file"


def test_a_network_finds_what_it_finds_in_keras(tmp_path):
    """A real network with random weights, against the run's predictor, which decodes and resizes by Pillow.

    The images need no resizing, but inputs of the network of different sizes: in one request each is seen as if alone.
    """
    from polarmask_tf.modeling.polarmask import PolarMask

    overrides = [
        "model.rays=12",
        "model.backbone.width=8",
        "model.fpn.channels=16",
        "model.head.channels=16",
        "model.head.convs=1",
        "data.fit=short_side",
        "data.size=[64,96]",
        "postprocess.max_detections=20",
        "postprocess.score_threshold=0.001",
    ]
    config = configs.load("shapes", overrides)
    model = PolarMask(config, CLASSES)
    rng = np.random.default_rng(0)
    for variable in model.head.variables:
        variable.assign(variable + rng.normal(0, 0.1, variable.shape))
    path = serving.export_serving(model, tmp_path, name="net")
    served, keras = Model(path), run_predictor(model)
    images = [rng.integers(0, 256, (*size, 3), np.uint8) for size in ((64, 96), (96, 64), (64, 64), (32, 96))]
    found = served("serving_default", [encoded(image) for image in images])
    for row, (image, expected) in enumerate(zip(images, keras(images), strict=True)):
        count = found["num_detections"][row]
        assert count == len(expected.scores) > 5
        np.testing.assert_allclose(found["detection_scores"][row, :count], expected.scores, atol=1e-5)
        polygons = found["detection_polygons"][row, :count] * image.shape[1::-1]
        assert np.abs(polygons - expected.polygons).max(axis=(1, 2)).mean() < 0.05
    again = load_predictor(path)  # `polarmask predict out/net/1` takes the signature `images`
    np.testing.assert_allclose(again(images)[0].scores, keras(images)[0].scores, atol=1e-5)
    size = graph.metadata(model)["input"]
    assert again.input_size == (size["height"], size["width"]) == (64, 96)


def test_the_benchmark_measures_what_it_says(monkeypatch):
    class Network(types.SimpleNamespace):
        def __call__(self, images, training):
            return tf.cast(images, tf.float32)

    model = Network(**vars(fake_model("letterbox", (64, 96))))
    rows = benchmark._signatures(model, batches=[2], repeats=2)
    assert all(row["value"] > 0 or row["unit"] == "%" for row in rows)
    values = {(row["what"], row["batch"], row["unit"]): row["value"] for row in rows}
    assert values["serving_default", 2, "images/s"] == pytest.approx(2e3 / values["serving_default", 2, "ms"])
    assert values["decoding and resizing", 2, "CPU ms"] < 2 * values["serving_default", 2, "CPU ms"]
    monkeypatch.setattr(benchmark, "resident", partial(next, itertools.count(100, 2)))  # 2 MB a request
    rows = benchmark._memory(model, requests=30)
    assert [(row["value"], row["unit"]) for row in rows] == [(2 * (15 - 3), "MB"), (2 * (30 - 15), "MB")]
    named = [{"model": "m", "device": "d, 2 cores", "threads": 1, **row} for row in rows]
    lines = files.format_csv(named, benchmark.COLUMNS).splitlines()
    assert lines[0] == "model,device,threads,what,batch,value,unit" and lines[1].startswith('m,"d, 2 cores",1,"memory that')
    with pytest.raises(InputError, match="no config file 'none'"):
        benchmark.run("none", threads=[1])
