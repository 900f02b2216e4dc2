"""For fuzz.py: what `polarmask convert` reads beside COCO: labelme, YOLO, VIA, CVAT, Label Studio, masks; and its TIFFs."""

import base64
import io
import json
import shutil

import numpy as np
from fuzz_inputs import mutate_bytes, mutate_json, mutate_text
from fuzz_kind import Kind, refusing
from PIL import Image

NAMES = {"a.png": (32, 24), "b.png": (20, 20)}
RING = [[2.0, 2.0], [18.0, 3.0], [17.5, 16.0], [3.0, 15.0]]
FLAT = [v for point in RING for v in point]


def _png(array):
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return file.getvalue()


def _pictures(folder):
    folder.mkdir(parents=True, exist_ok=True)
    for name, (width, height) in NAMES.items():
        pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
        Image.fromarray(pixels).save(folder / name)


def _converting(file, pictures=".", others=(), source=""):
    """A `prepare` whose function writes an input as the `file` (a name, or a function of the bytes) and converts `source`."""

    def prepare(folder, out):
        from polarmask_tf.data.convert import convert_dataset

        _pictures(folder / "set" / pictures)
        for name, content in others:
            (folder / "set" / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / "set" / name).write_bytes(content)
        written = []

        def run(data):
            for path in (*written, folder / "data"):
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
            path = folder / "set" / (file(data) if callable(file) else file)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
            written[:] = [path]
            convert_dataset(folder / "set" / source, folder / "data", processes=1, progress=False)

        return refusing(run)

    return prepare


def _json(document):
    return lambda out: [json.dumps(each).encode() for each in document]


def change_json(rng, data):
    return mutate_bytes(rng, data) if rng.random() < 0.15 else mutate_json(rng, json.loads(data))


# ---- labelme, VIA, Label Studio


def _labelme():
    mask = base64.b64encode(_png(np.eye(8, 12, 2, np.uint8) * 255)).decode()
    shapes = [
        {"label": "one", "points": RING, "shape_type": "polygon", "group_id": 1, "flags": {}},
        {"label": "one", "points": RING, "shape_type": "polygon", "group_id": 1, "flags": {}},
        {"label": "two", "points": [[1, 2], [9, 8]], "shape_type": "rectangle", "group_id": None},
        {"label": "two", "points": [[9, 9], [12, 9]], "shape_type": "circle", "group_id": None},
        {"label": "two", "points": [[3, 4], [14, 11]], "shape_type": "mask", "group_id": None, "mask": mask},
    ]
    size = {"imageHeight": 24, "imageWidth": 32}
    return [{"version": "5.4.1", "flags": {}, "shapes": shapes, "imagePath": "a.png", "imageData": None, **size}]


def _via():
    xs, ys = zip(*RING, strict=True)
    shapes = [
        {"name": "polygon", "all_points_x": list(xs), "all_points_y": list(ys)},
        {"name": "rect", "x": 1, "y": 2, "width": 8, "height": 6},
        {"name": "ellipse", "cx": 9, "cy": 9, "rx": 4, "ry": 3, "theta": 0.3},
        {"name": "circle", "cx": 9, "cy": 9, "r": 4},
    ]
    regions = [{"shape_attributes": shape, "region_attributes": {"label": "one"}} for shape in shapes]
    entries = {name: {"filename": name, "size": 1, "regions": regions, "file_attributes": {}} for name in NAMES}
    first = {"a.png": {**entries["a.png"], "regions": {"0": regions[0], "1": regions[1]}}}  # VIA 1
    return [{"_via_settings": {}, "_via_img_metadata": entries, "_via_attributes": {}}, first]


def _brush(height, width):
    """The mask of all pixels in Label Studio's RLE: one run."""
    total = 4 * height * width
    bits = f"{total:032b}{7:05b}{2:04b}{3:04b}{7:04b}{15:04b}" + f"1{3:02b}{total - 1:016b}{255:08b}"
    bits += "0" * (-len(bits) % 8)
    return [int(bits[at : at + 8], 2) for at in range(0, len(bits), 8)]


def _labelstudio():
    size = {"original_width": 32, "original_height": 24, "image_rotation": 0}
    values = [
        ("polygonlabels", {"points": RING, "closed": True, "polygonlabels": ["one"]}),
        ("rectanglelabels", {"x": 10, "y": 10, "width": 30, "height": 40, "rotation": 5, "rectanglelabels": ["two"]}),
        ("ellipselabels", {"x": 50, "y": 50, "radiusX": 10, "radiusY": 20, "rotation": 5, "ellipselabels": ["two"]}),
        ("brushlabels", {"format": "rle", "rle": _brush(24, 32), "brushlabels": ["one"]}),
    ]
    result = [{"type": kind, "id": f"r{n}", "value": value, **size} for n, (kind, value) in enumerate(values)]
    task = {"id": 1, "data": {"image": "/data/upload/3/0a1b2c3d-a.png"}}
    least = {"id": 1, "annotator": 1, "annotation_id": 1, "image": "a.png", "label": [{**value, **size} for _, value in values]}
    return [[{**task, "annotations": [{"id": 1, "was_cancelled": False, "result": result}]}], [least]]


# ---- CVAT


def _cvat(out):
    xml = f"""<?xml version="1.0" encoding="utf-8"?>
<annotations><version>1.1</version><meta><job><labels><label><name>one</name></label><label><name>two</name></label></labels>
</job></meta>
<image id="0" name="a.png" width="32" height="24">
<polygon label="one" occluded="0" points="{";".join(f"{x},{y}" for x, y in RING)}" group_id="1" z_order="0"></polygon>
<polygon label="one" occluded="0" points="20,2;28,2;28,9" group_id="1" z_order="0"></polygon>
<box label="two" xtl="1" ytl="2" xbr="9" ybr="8" rotation="10" z_order="0"></box>
<ellipse label="two" cx="9" cy="9" rx="4" ry="3"></ellipse>
<mask label="one" rle="3, 5, 4, 12, 6" left="2" top="3" width="6" height="5" z_order="0"></mask>
<points label="two" points="3,4"></points>
</image>
<image id="1" name="b.png" width="20" height="20"></image>
</annotations>"""
    return [xml.encode()]


_XML = [
    *("<!DOCTYPE a [<!ENTITY a 'aaaa'><!ENTITY b '&a;&a;&a;&a;'>]>", "&b;", "&#0;", "&lt;", "<![CDATA[", "]]>", "<?x ?>"),
    *("<track>", "</image>", "<image>", "<a>" * 3000, "<!--", "x='1'", "<label><name>", "<polygon/>", "\ufeff", "<image " * 50),
    "<?xml version='1.0' encoding='utf-7'?>",
]


def change_cvat(rng, data):
    return mutate_bytes(rng, data) if rng.random() < 0.2 else mutate_text(rng, data, _XML)


# ---- YOLO

LABELS = "0 " + " ".join(f"{x / 32:.4f} {y / 24:.4f}" for x, y in RING)
_DATA_YAML = b"path: .\ntrain: images\nval: images\nnc: 2\nnames:\n  0: one\n  1: two\n"
_PATHS = ["train: [images, images]", "train: /etc", "val: ../..", "path: /", "test: images", "names: [a, b]", "names: {1: x}"]
_PATHS += ["<<: *a", "&a [*a]", "? [a]", "!!python/object:os.system {}", "\t- x", "names: 3", "[" * 5000, "train: labels/a.txt"]
_LINES = ["0 0.5 0.5 0.2 0.2", "0 0.5 0.5 0.2 0.2 0.9", "1e0 " + LABELS[2:], "0,0.5,0.5", "0 0,5 0,5", "0 " + "0.1 0.2 " * 5000]
_LINES += ["\ufeff" + LABELS, "\0", "one 0 0 1 0 1 1", "-1 0 0 1 0 1 1", "0 nan nan inf 1 -inf 0", "0 " + "9" * 5000]


def change_yolo(rng, data):
    return mutate_bytes(rng, data) if rng.random() < 0.3 else mutate_text(rng, data, _LINES)


def change_yaml(rng, data):
    return mutate_bytes(rng, data) if rng.random() < 0.3 else mutate_text(rng, data, _PATHS)


# ---- masks, and TIFFs read by windows


def masks(out):
    """As many ways to number two objects in a picture of 32 x 24."""
    ids = np.zeros((24, 32), np.uint16)
    ids[2:9, 3:12], ids[12:20, 10:28] = 1, 700
    small = np.minimum(ids, 2).astype(np.uint8)
    palette = Image.fromarray(small, "P")
    palette.putpalette(list(range(256)) * 3)
    colors = np.stack([small * 40, small * 90, small * 3], -1)
    files = []
    for image, kind, options in (
        (Image.fromarray(ids), "PNG", {}),
        (Image.fromarray(ids), "TIFF", {"compression": "tiff_lzw"}),
        (Image.fromarray(ids.astype(np.int32)), "TIFF", {}),
        (Image.fromarray(ids.astype(np.float32)), "TIFF", {"compression": "tiff_adobe_deflate"}),
        (Image.fromarray(colors), "PNG", {}),
        (palette, "PNG", {}),
        (palette, "GIF", {}),
        (Image.fromarray(small), "BMP", {}),
    ):
        file = io.BytesIO()
        image.save(file, kind, **options)
        files.append(file.getvalue())
    return files


_SUFFIXES = {b"\x89PNG": ".png", b"GIF8": ".gif", b"BM": ".bmp"}


def _mask_name(data):
    return "masks/a" + next((suffix for start, suffix in _SUFFIXES.items() if data.startswith(start)), ".tif")


def _label_map(out):
    return [b"# label:color_rgb:parts:actions\nbackground:0,0,0::\none:40,90,3::\ntwo:80,180,6::\n"]


_COLORS = [
    "one:1,2::",
    "one:1,2,3,4::",
    ":1,2,3::",
    "one:-1,0,0::",
    "one:999999999999,1,1::",
    "one",
    "\0:0,0,0::",
    "::::",
    "\xff",
]


def _voc():
    ids = np.zeros((24, 32), np.uint8)
    ids[2:9, 3:12], ids[12:20, 10:28] = 1, 2
    kind = np.stack([ids * 40, ids * 90, ids * 3], -1)
    return [("SegmentationObject/a.png", _png(ids)), ("SegmentationClass/a.png", _png(kind))]


def tiffs(out):
    import tifffile

    rng = np.random.default_rng(0)
    gray, color = rng.integers(0, 256, (70, 100), np.uint8), rng.integers(0, 256, (70, 100, 3), np.uint8)
    files = []
    for pixels, options in (
        (gray, {}),
        (color, {"tile": (32, 32), "compression": "zlib", "photometric": "rgb"}),
        (color, {"rowsperstrip": 8, "compression": "zlib", "photometric": "rgb", "predictor": True}),
        (gray.astype(np.uint16) << 6, {"tile": (16, 48), "compression": "lzma"}),
        (np.moveaxis(color, -1, 0), {"tile": (32, 32), "planarconfig": "separate", "photometric": "rgb", "bigtiff": True}),
        (gray, {"description": "ImageJ=1.53\nimages=1\n", "metadata": None, "byteorder": ">"}),
    ):
        file = io.BytesIO()
        tifffile.imwrite(file, pixels, **options)
        files.append(file.getvalue())
    return files


def prepare_windows(folder, out):
    from polarmask_tf.data import windows

    def run(data):
        (folder / "a.tif").write_bytes(data)
        opened = windows.TiffWindows(folder / "a.tif")
        try:
            height, width = opened.shape[:2]
            for y, x in ((0, 0), (height // 2, width // 2), (height - 1, width - 1)):
                pixels = opened.read(y, x, min(64, height - y), min(64, width - x))
                assert pixels.dtype == np.uint8 and pixels.shape[2:] == (3,), "not a window"
        finally:
            opened.close()

    return refusing(run)


_prepare_yaml = _converting("data.yaml", "images", [("labels/a.txt", LABELS.encode())], "data.yaml")

KINDS = {
    "labelme": Kind(_converting("a.json"), _json(_labelme()), change_json),
    "via": Kind(_converting("via.json"), _json(_via()), change_json),
    "labelstudio": Kind(_converting("project.json"), _json(_labelstudio()), change_json),
    "cvat": Kind(_converting("annotations.xml"), _cvat, change_cvat),
    "yolo": Kind(_converting("labels/a.txt", "images"), lambda out: [f"{LABELS}\n1 {LABELS[2:]}\n".encode()], change_yolo),
    "yoloyaml": Kind(_prepare_yaml, lambda out: [_DATA_YAML], change_yaml),
    "masks": Kind(_converting(_mask_name, "images"), masks, mutate_bytes),
    "labelmap": Kind(
        _converting("labelmap.txt", "JPEGImages", _voc()),
        _label_map,
        lambda rng, data: mutate_text(rng, data, _COLORS) if rng.random() < 0.7 else mutate_bytes(rng, data),
    ),
    "windows": Kind(prepare_windows, tiffs, mutate_bytes),
}
