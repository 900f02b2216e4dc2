"""Exported models that need no training, and images for them."""

import dataclasses
import json
import struct
import types
import zipfile

import numpy as np
from PIL import Image

from polarmask_tf import config as configs

HEIGHT, WIDTH, RADIUS = 32, 48, 4
CLASSES = [{"name": "sun", "category_id": 7}, {"name": "moon", "category_id": 3}]


def hexagon_around_brightest(images):
    """TF function with the export contract's outputs: around the brightest pixel of each image a hexagon of RADIUS
    pixels (score .9, "moon") and one of half its size (score .4, "sun"); the third row is padding."""
    import tensorflow as tf

    shape = tf.shape(images)
    brightness = tf.reduce_sum(tf.cast(images, tf.float32), axis=-1)
    at = tf.argmax(tf.reshape(brightness, [shape[0], -1]), axis=1, output_type=tf.int32)
    center = tf.cast(tf.stack([at % shape[2], at // shape[2]], axis=-1), tf.float32) + 0.5
    angle = 2 * np.pi * np.arange(6) / 6
    rays = np.stack([np.cos(angle), np.sin(angle)], -1).astype(np.float32)
    sizes = tf.constant([RADIUS, RADIUS / 2, 0.0])[None, :, None, None]
    extent = tf.cast(tf.stack([shape[2], shape[1]]), tf.float32)
    valid = tf.constant([1.0, 1.0, 0.0])[None, :, None, None]
    polygons = tf.clip_by_value((center[:, None, None] + sizes * rays) / extent, 0.0, 1.0) * valid
    low, high = tf.reduce_min(polygons, axis=2), tf.reduce_max(polygons, axis=2)
    ones = tf.ones([shape[0], 1])
    return {
        "num_detections": tf.fill([shape[0]], 2),
        "detection_scores": ones * [[0.9, 0.4, 0.0]],
        "detection_classes": tf.cast(ones * [[1.0, 0.0, 0.0]], tf.int32),
        "detection_boxes": tf.concat([low[..., ::-1], high[..., ::-1]], axis=-1),
        "detection_polygons": polygons,
    }


def metadata(**resize):
    """Without "resize", as the first versions wrote it."""
    sizes = {"input": {"height": HEIGHT, "width": WIDTH, **resize}, "rays": 6, "max_detections": 3}
    return {"format": "polarmask_tf/1", "version": "0", "classes": CLASSES, **sizes}


def make_exports(folder):
    """A SavedModel directory and a .tflite file in `folder` that keep to the export contract -> their paths."""
    import tensorflow as tf

    paths = {}
    for name, shape in (("saved_model", [None, None, None, 3]), ("canvas", [1, HEIGHT, WIDTH, 3])):
        module = tf.Module()
        module.run = tf.function(hexagon_around_brightest, input_signature=[tf.TensorSpec(shape, tf.uint8, "images")])
        paths[name] = folder / name
        tf.saved_model.save(module, str(paths[name]), signatures={"serving_default": module.run})
    (paths["saved_model"] / "assets.extra").mkdir()
    (paths["saved_model"] / "assets.extra" / "metadata.json").write_text(json.dumps(metadata()))
    paths["tflite"] = folder / "model.tflite"
    paths["tflite"].write_bytes(tf.lite.TFLiteConverter.from_saved_model(str(paths["canvas"])).convert())
    with zipfile.ZipFile(paths["tflite"], "a") as archive:
        archive.writestr("metadata.json", json.dumps(metadata()))
    return paths


def spot(height, width, x, y, size):
    """A dark image with a bright square whose top left corner is (x, y)."""
    image = np.full((height, width, 3), 10, np.uint8)
    image[y : y + size, x : x + size] = 250
    return image


def damaged_images(folder):
    whole = folder / "whole.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)).save(whole)
    Image.open(whole).save(folder / "whole.jpg")
    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    contents = {
        "text.jpg": b"this is no image\n",
        "empty.png": b"",
        "cut.png": whole.read_bytes()[:2000],
        "cut.jpg": (folder / "whole.jpg").read_bytes()[:1000],
        "head.png": whole.read_bytes()[:20],
        "bomb.png": whole.read_bytes().replace(whole.read_bytes()[16:29], header),
        "missing.png": None,
        "folder.png": None,
    }
    (folder / "folder.png").mkdir()
    for name, content in contents.items():
        if content is not None:
            (folder / name).write_bytes(content)
    Image.fromarray(np.zeros((3, 3), np.float32)).save(folder / "float.tif")
    return [folder / name for name in [*contents, "float.tif"]]


def fake_model(fit, size):
    """What the exporters use of a model; it marks the brightest pixel of what it sees with hexagons of RADIUS pixels."""
    config = configs.Config()
    rays = dataclasses.replace(config.model, rays=6)
    config = dataclasses.replace(config, model=rays, data=dataclasses.replace(config.data, fit=fit, size=size))
    return types.SimpleNamespace(
        config=config,
        classes=CLASSES,
        input_size=configs.input_size(config.data),
        variables=[],
        detect=hexagon_around_brightest,
    )


def expected_scale(fit, name, height, width):
    """Pixels of the image in one of the network's input, along x and along y, by hand."""
    if fit == "stretch":
        return width / 96, height / 64
    if fit == "short_side" and name != "model.tflite":
        side = min(48 / min(height, width), 90 / max(height, width))
    else:
        side = min(64 / height, 96 / width)
    return width / round(width * side), height / round(height * side)
