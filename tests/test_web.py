"""exports/web in headless Chromium: the numbers of lite.py, and clear words for files that are none."""

import base64
import json
import shutil
import struct
import zipfile

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from helpers.web import PIXELS, WebPage, arrays, compare, copy_page, serve
from polarmask_tf import config, lite

HEIGHT, WIDTH = 96, 128
CLASSES = [{"name": name, "category_id": 7 + i} for i, name in enumerate(("circle", "rectangle", "triangle", "star"))]
# Where single values may be one level of 255 off: resized by a Pillow that makes the rows first, or computed in 8 bits.
SCORES_LEVEL, PIXELS_LEVEL = 5e-3, 0.5


def make_model(path, *overrides, raw=False, precision="fp32"):
    """A tiny network of random weights, exported to `path`; always the same for the same options."""
    import tf_keras

    from polarmask_tf.export import tflite
    from polarmask_tf.modeling.polarmask import PolarMask

    options = config.load(
        "shapes",
        [
            "model.backbone.width=8",
            "model.fpn.channels=16",
            "model.head.channels=16",
            f"data.size=[{HEIGHT},{WIDTH}]",
            "postprocess.score_threshold=0.05",
            "postprocess.pre_nms_top_k=100",
            "postprocess.multi_label=false",
            *(["model.refine_channels=0"] if raw else []),
            *overrides,
        ],
    )
    tf_keras.utils.set_random_seed(0)
    model = PolarMask(options, CLASSES)
    rng = np.random.default_rng(0)
    for variable in model.variables:
        if "kernel" in variable.name or "conv/bias" in variable.name:
            more = 2.5 if "classes/conv/bias" in variable.name else 0  # else all scores are low
            variable.assign(variable + rng.normal(more, 0.1, variable.shape))
    return tflite.export_tflite(model, path, precision, raw=raw)


def picture(height, width, seed=0):
    """Blobs, edges and grain: what makes the network's outputs differ from place to place."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (7, 9, 3)).astype(np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
    image = np.asarray(coarse).astype(int) + rng.integers(-20, 21, (height, width, 3))
    image[height // 3 : height // 2, width // 4 : width // 2] = rng.integers(0, 256, 3)
    return image.clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, node_modules):
    """What a web server gives out: the page, node_modules beside it, a model, others."""
    folder = tmp_path_factory.mktemp("web")
    copy_page(folder, node_modules)
    make_model(folder / "model.tflite")
    make_model(folder / "raw.tflite", raw=True)
    return folder


@pytest.fixture(scope="module")
def page(folder, chromium):
    server, url = serve(folder)
    page = WebPage(folder, chromium)
    page.url = url
    page(
        init="delete Navigator.prototype.gpu"
    )  # for the CPU's numbers, whatever this machine has; of the GPU is test_web_gpu.py
    yield page
    page.close()
    server.shutdown()


def save(path, image):
    Image.fromarray(image).save(path)
    return path


def test_the_page_starts_with_the_model_beside_it_and_the_sample(page, folder):
    found, shown = page.found(open=page.url)
    sample = folder / "sample.jpg"
    expected = lite.PolarMaskLite(folder / "model.tflite")(sample)
    compare(found, expected, scores=0.02, pixels=0.5)  # decoders of JPEG may differ by a level
    assert (shown["width"], shown["height"]) == Image.open(sample).size
    assert shown["labels"] == [CLASSES[number]["name"] for number in found["classes"]]
    assert shown["milliseconds"]["model"] > 0 and shown["milliseconds"]["runs"] >= 1
    assert "median of" in shown["status"]


@pytest.mark.parametrize("name", ["model.tflite", "raw.tflite"])
@pytest.mark.parametrize("how", ["drop", "choose"])
def test_the_numbers_are_those_of_lite(page, folder, tmp_path, name, how):
    image = save(tmp_path / "image.png", picture(HEIGHT, WIDTH))
    expected = lite.PolarMaskLite(folder / name)(image)
    assert len(expected["scores"]) > 5 and len(set(expected["classes"])) > 1  # or it would compare little
    page(open=f"{page.url}?model={name}")
    found, shown = page.found(**({"drop": [image]} if how == "drop" else {"choose": image, "into": "#image"}))
    compare(found, expected)
    assert shown["image"] == "image.png" and shown["model"] == name


def columns_first(image, filled, canvas):
    """lite.place in the order of exports/web. Pillow makes the rows first for some sizes, since some version."""
    placed = np.zeros((*canvas, 3), np.uint8)
    columns = Image.fromarray(image).resize((filled[1], image.shape[0]), Image.Resampling.BILINEAR)
    placed[: filled[0], : filled[1]] = columns.resize(filled[::-1], Image.Resampling.BILINEAR)
    return placed, (image.shape[1] / filled[1], image.shape[0] / filled[0])


@pytest.mark.parametrize("height, width", [(192, 256), (300, 201), (50, 40), (97, 500), (700, 9), (1, 1)])
def test_images_of_any_size(page, folder, tmp_path, monkeypatch, height, width):
    monkeypatch.setattr(lite, "place", columns_first)
    image = save(tmp_path / "image.png", picture(height, width))
    for name in ("model.tflite", "raw.tflite"):
        page(open=f"{page.url}?model={name}")
        found, _ = page.found(drop=[image])
        expected = lite.PolarMaskLite(folder / name)(image)
        compare(found, expected, pixels=PIXELS * max(1, height / HEIGHT, width / WIDTH))


def test_an_image_that_is_resized_by_pillow_itself(page, folder, tmp_path):
    image = save(tmp_path / "image.png", picture(500, 700))
    page(open=page.url)
    found, _ = page.found(drop=[image])
    compare(found, lite.PolarMaskLite(folder / "model.tflite")(image), SCORES_LEVEL, PIXELS_LEVEL * 700 / WIDTH)


def test_stretched_images_are_undone_by_axis(page, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(lite, "place", columns_first)
    whole = (folder / "model.tflite").read_bytes()
    described = lite.PolarMaskLite(folder / "model.tflite").metadata
    described["input"]["resize"] = "stretch"
    model = with_metadata(tmp_path / "stretch.tflite", whole[: whole.index(b"PK\x03\x04")], described)
    image = save(tmp_path / "image.png", picture(200, 150))
    page(open=page.url)
    page(drop=[model])
    found, shown = page.found(drop=[image])
    compare(found, lite.PolarMaskLite(model)(image), pixels=PIXELS * 200 / HEIGHT)
    assert shown["model"] == "stretch.tflite"


def with_metadata(path, bare, described, compression=zipfile.ZIP_STORED, before=()):
    """A .tflite file with metadata.json zipped onto its end, after the members `before`."""
    path.write_bytes(bare)
    with zipfile.ZipFile(path, "a", compression) as archive:
        for name in before:
            archive.writestr(name, "x" * 1000)
        archive.writestr("metadata.json", described if isinstance(described, str) else json.dumps(described))
        archive.comment = b"a comment" if before else b""
    return path


@pytest.mark.parametrize("precision", ["fp16", "dynamic"])
def test_other_precisions_run(page, tmp_path, precision):
    """Weights are equal bits; what is computed in 8 bits is rounded alike but for rare ties."""
    model = make_model(tmp_path / f"{precision}.tflite", precision=precision)
    image = save(tmp_path / "image.png", picture(HEIGHT, WIDTH))
    page(open=page.url)
    found, shown = page.found(drop=[image, model])
    compare(found, lite.PolarMaskLite(model)(image), SCORES_LEVEL, PIXELS_LEVEL)
    assert shown["model"] == model.name


@pytest.mark.parametrize(
    "height, width, to",
    [
        (300, 201, (HEIGHT, WIDTH)),
        (40, 50, (HEIGHT, WIDTH)),
        (700, 9, (96, 96)),
        (1, 1, (32, 32)),
        (123, 457, (64, 64)),
        (45, 64, (32, 32)),  # 22.5 and 32 pixels: Python rounds to 22
    ],
)
@pytest.mark.parametrize("stretch", [False, True])
def test_resizing_is_that_of_pillow(page, height, width, to, stretch):
    image = np.random.default_rng(0).integers(0, 256, (height, width, 4)).astype(np.uint8)
    page(open=page.url, wait=False)
    source = """({data, width, height, to, stretch}) => {
      const {pixels, scaleX, scaleY} = m.letterbox({data, width, height}, ...to, stretch);
      return [[...pixels], [scaleX, scaleY]];
    }"""
    options = {"data": image.ravel().tolist(), "width": width, "height": height, "to": to, "stretch": stretch}
    pixels, scales = page.call(source, options)
    pixels = np.reshape(pixels, (*to, 3))
    rgb = np.ascontiguousarray(image[..., :3])
    expected, back = lite.letterbox(rgb, *to, stretch)
    assert tuple(scales) == pytest.approx(back)
    assert np.abs(pixels - expected.astype(int)).max() <= 1
    filled = (round(height / back[1]), round(width / back[0]))
    np.testing.assert_array_equal(pixels, columns_first(rgb, filled, to)[0])
    assert not pixels[filled[0] :].any() and not pixels[:, filled[1] :].any()


@pytest.mark.parametrize("multi_label", [False, True])
@pytest.mark.parametrize(
    "limits",
    [
        {"candidates": 1000, "max_detections": 100},
        {"candidates": 9, "max_detections": 5, "temperature": 1.7, "score_bias": -0.4},
        {"candidates": 1000, "max_detections": 100, "voting_iou": 0.3},
        {"candidates": 100, "max_detections": 100, "voting_iou": 0.1},
    ],
)
def test_raw_outputs_are_assembled_as_in_python(page, multi_label, limits):
    rng = np.random.default_rng(1)
    raw = {
        "ray_units": {"3": 1.5, "4": 4.0},
        "ray_limit": 3.0,
        "score_threshold": 0.2,
        "nms_iou": 0.4,
        "multi_label": multi_label,
        **limits,
    }
    heads = {}
    for level, (h, w) in {3: (12, 16), 4: (6, 8)}.items():
        for name, depth in (("classes", 3), ("centerness", 1), ("rays", 8)):
            spread = rng.normal(2 if name == "rays" else 0, 1.2, (1, h, w, depth))  # some rays meet the limit
            heads[f"P{level}_{name}"] = np.float32(spread)
    outputs = lite.assemble(heads, raw, (HEIGHT, WIDTH))
    expected = lite.unpack(outputs, 0, WIDTH, HEIGHT, HEIGHT, WIDTH)
    page(open=page.url, wait=False)
    source = """({heads, raw, size}) => {
      for (const head of Object.values(heads)) head.data = Float32Array.from(head.data);
      return m.assemble(heads, raw, ...size);
    }"""
    plain = {name: {"shape": head.shape, "data": head.ravel().tolist()} for name, head in heads.items()}
    rows = page.call(source, {"heads": plain, "raw": raw, "size": (HEIGHT, WIDTH)})
    compare(arrays(rows), expected)
    assert len(rows) == 5 if limits["candidates"] == 9 else len(rows) > 20


def kinds_of_files(folder):
    """Pictures as files of several kinds -> their paths."""
    image = picture(33, 47)
    gray = Image.fromarray(image[..., 0])
    exif = Image.Exif()
    exif[0x0112] = 6  # "rotate by 90 degrees to show"
    linear = PngImagePlugin.PngInfo()
    linear.add(b"gAMA", struct.pack(">I", 100000))  # a browser that heeds it makes all brighter
    opaque = Image.fromarray(image)
    opaque.putalpha(255)
    for name, kind, options in (
        ("rgb.png", Image.fromarray(image), {}),
        ("gray.png", gray, {}),
        ("bits.png", gray.convert("1"), {}),
        ("palette.png", Image.fromarray(image).quantize(64), {}),
        ("alpha.png", opaque, {}),
        ("sixteen.png", Image.fromarray(image[..., 0].astype(np.uint16) * 257), {}),
        ("whole.webp", Image.fromarray(image), {"lossless": True}),
        ("image.bmp", Image.fromarray(image), {}),
        ("gamma.png", Image.fromarray(image), {"pnginfo": linear}),
        ("image.jpg", Image.fromarray(image), {"quality": 95, "subsampling": 0}),
        ("rotated.jpg", Image.fromarray(image), {"quality": 95, "subsampling": 0, "exif": exif}),
    ):
        kind.save(folder / name, **options)
    return sorted(folder.iterdir())


def test_files_are_decoded_as_pillow_does(page, tmp_path):
    page(open=page.url, wait=False)
    source = """async ({content}) => {
      const bytes = Uint8Array.from(atob(content), (letter) => letter.charCodeAt(0));
      const {width, height, data} = await m.readImage(new Blob([bytes]));
      return [height, width, [...data]];
    }"""
    for path in kinds_of_files(tmp_path):
        height, width, data = page.call(source, {"content": base64.b64encode(path.read_bytes()).decode()})
        found = np.reshape(data, (height, width, 4))[..., :3]
        expected = lite.read_image(path)
        assert found.shape == expected.shape, path.name
        off = np.abs(found - expected.astype(int)).max()
        assert off <= (4 if path.suffix == ".jpg" else 0), (path.name, off)


def test_metadata_is_found_however_it_was_zipped(page, folder, tmp_path):
    bare = (folder / "model.tflite").read_bytes()
    bare = bare[: bare.index(b"PK\x03\x04")]
    described = lite.PolarMaskLite(folder / "model.tflite").metadata
    others = ("labels.txt", "metadata.json.old")
    with_metadata(tmp_path / "deflated.tflite", bare, described, zipfile.ZIP_DEFLATED, before=others)
    with_metadata(tmp_path / "stored.tflite", bare, described, before=others)
    with_metadata(tmp_path / "alone.zip", b"", described)
    (tmp_path / "joined.tflite").write_bytes(bare + (tmp_path / "alone.zip").read_bytes())  # its offsets count from the zip
    with_metadata(tmp_path / "packed.tflite", bare, described, zipfile.ZIP_BZIP2)
    page(open=page.url)
    for name in ("deflated", "stored", "joined"):
        state = page(drop=[tmp_path / f"{name}.tflite"])
        assert state["message"] == "" and json.loads(state["json"])["model"] == f"{name}.tflite"
    assert "method 12" in page(drop=[tmp_path / "packed.tflite"])["message"]


def bad_files(folder, tmp_path):
    """{path: what the page says of it}, each to be dropped on a page that works."""
    whole = (folder / "model.tflite").read_bytes()
    cut = whole.index(b"PK\x03\x04")
    bare, described = whole[:cut], lite.PolarMaskLite(folder / "model.tflite").metadata
    png, jpg = (save(tmp_path / f"whole.{kind}", picture(64, 64)).read_bytes() for kind in ("png", "jpg"))
    contents = {
        "text.jpg": (b"this is no image\n", "cannot read the image"),
        "empty.png": (b"", "cannot read the image"),
        "cut.png": (png[: len(png) // 2], "cannot read the image"),
        "cut.jpg": (jpg[: len(jpg) // 2], "cannot read the image"),
        "head.jpg": (jpg[:5], "cannot read the image"),
        "head.png": (png[:20], "cannot read the image"),
        "bare.tflite": (bare, "no metadata.json at its end"),
        "truncated.tflite": (whole[: len(whole) // 2], "no metadata.json at its end"),
        "end.tflite": (whole[:-4], "no metadata.json at its end"),
        "text.tflite": (b"hello\n", "no metadata.json at its end"),
        "empty.tflite": (b"", "no metadata.json at its end"),
        "zip.tflite": (whole[cut + 10 :], "damaged"),
        "hole.tflite": (whole[: cut // 2] + whole[cut:], "Failed to load model"),
    }
    said = {}
    for name, (content, message) in contents.items():
        (tmp_path / name).write_bytes(content)
        said[tmp_path / name] = message
    incomplete = {**described, "classes": [{"nam": "sun"}]}
    other_size = {**described, "input": {**described["input"], "height": 64}}
    for number, (text, message) in enumerate(
        (
            ("not json", "JSON"),
            ("{}", "damaged"),
            ("null", "damaged"),
            (incomplete, "incomplete"),
            ({**described, "input": {"height": 96}}, "incomplete"),
            (other_size, "its input is uint8 1,96,128,3"),
            ({**described, "input": {**described["input"], "resize": "crop"}}, "input.resize is crop"),
            ({**described, "raw": {"voting_iou": "a\nlot"}}, "raw.voting_iou is not of 0 to 1"),
        )
    ):
        said[with_metadata(tmp_path / f"metadata{number}.tflite", bare, text)] = message
    return said


def test_bad_files_are_named_and_cost_nothing_else(page, folder, tmp_path):
    before, _ = page.found(open=page.url)
    for path, message in bad_files(folder, tmp_path).items():
        state = page(drop=[path])
        assert state["message"].startswith(f"{path.name}: ") and message in state["message"], state["message"]
        assert "\n" not in state["message"] and len(state["message"]) < 300
    after, _ = page.found(click="#sample")
    compare(after, before)


def test_an_accelerator_that_is_none_is_told(page):
    assert page(open=f"{page.url}?accelerator=npu")["message"].endswith("accelerator is npu: gpu or cpu")


def test_a_page_without_a_model_says_so_and_waits_for_one(page, folder):
    state = page(open=f"{page.url}?model=nowhere.tflite")
    assert "nowhere.tflite: 404" in state["message"] and "drop" in state["message"]
    assert "drop" in page(drop=[folder / "sample.jpg"])["message"]
    found, shown = page.found(choose=folder / "model.tflite", into="#model")
    assert len(found["scores"]) > 0 and shown["image"] == "sample.jpg"


def test_a_page_without_node_modules_says_so(page, folder, tmp_path):
    for path in folder.iterdir():
        if path.is_file():
            shutil.copy(path, tmp_path)
    server, url = serve(tmp_path)
    try:
        assert "node_modules" in page(open=url)["message"]
    finally:
        server.shutdown()


def test_the_canvas_shows_polygons_above_the_least_score(page):
    found, shown = page.found(open=page.url)
    assert shown["shown"] == "0.30"
    source = """(least) => {
      const slider = document.getElementById("least");
      slider.value = least;
      slider.dispatchEvent(new Event("input"));
      const canvas = document.getElementById("canvas");
      const seen = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
      const before = window.before ?? seen;
      window.before = seen;
      return seen.filter((value, at) => value !== before[at]).length / seen.length;
    }"""
    assert page.call(source, "1") == 0 and page.call(source, "0") > 0.02 and len(found["scores"]) > 0
    assert page.call(source, "0") == 0


def test_the_page_starts_at_the_scores_that_evaluate_found(page, folder, tmp_path):
    """Each class at its own, as lite.py does; the slider, once moved, is for all."""
    whole = (folder / "model.tflite").read_bytes()
    bare, described = whole[: whole.index(b"PK\x03\x04")], lite.PolarMaskLite(folder / "model.tflite").metadata
    found, _ = page.found(open=page.url)
    best = int(found["classes"][0])
    only = {"overall": 0.62, "classes": [0.0 if number == best else 1.1 for number in range(len(CLASSES))]}
    drawn = """(least) => {
      const slider = document.getElementById("least");
      if (least !== null) {
        slider.value = least;
        slider.dispatchEvent(new Event("input"));
      }
      return [slider.value, document.getElementById("canvas").toDataURL()];
    }"""
    seen = {}
    for name, scores in (("only", only), ("none", {"overall": 1.0, "classes": [1.1] * len(CLASSES)})):
        path = with_metadata(tmp_path / f"{name}.tflite", bare, {**described, "thresholds": scores})
        _, shown = page.found(drop=[path])
        seen[name] = page.call(drawn, None)
        assert shown["shown"] == f"{scores['overall']:.2f}, the model's own"
    assert seen["only"][0] == "0.62" and seen["only"][1] != seen["none"][1] == page.call(drawn, "1")[1]
    bad = with_metadata(tmp_path / "bad.tflite", bare, {**described, "thresholds": {"overall": 0.5, "classes": [0.5]}})
    assert "incomplete" in page(drop=[bad])["message"]
