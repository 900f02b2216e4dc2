"""int8 files that read the image's own 8 bits: the mean at the border, and pairs of pixels."""

import numpy as np
import pytest
import tf_keras
from ai_edge_litert.interpreter import Interpreter, OpResolverType

from helpers.edge import SMALL, images, make_model
from polarmask_tf import config as configs
from polarmask_tf.export import flatbuffer, pixels, tflite
from polarmask_tf.modeling.polarmask import PolarMask


def first_convolution(content, image):
    """What it gives, and the step of its 8 bits (0 of a float file)."""
    plain = {"experimental_op_resolver_type": OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES}
    interpreter = Interpreter(model_content=content, experimental_preserve_all_tensors=True, **plain)
    interpreter.allocate_tensors()
    interpreter.set_tensor(interpreter.get_input_details()[0]["index"], image)
    interpreter.invoke()
    made = next(outputs[0] for kind, _, outputs, _ in flatbuffer.operations(content) if kind == "CONV_2D")
    step, zero = next(d["quantization"] for d in interpreter.get_tensor_details() if d["index"] == made)
    values = interpreter.get_tensor(made)
    return ((values - np.float32(zero)) * step if step else values), step


def own_stem(size, stride):
    """A model whose first convolution pads by itself, and pixels have another mean and deviation in each channel."""
    tf_keras.utils.set_random_seed(0)
    image = tf_keras.Input((64, 96, 3))
    x = tf_keras.layers.Conv2D(8, size, stride, padding="same", activation="relu")(image)
    x = tf_keras.layers.Conv2D(8, 3, 8 // stride, padding="same", activation="relu")(x)
    levels = {"3": x, "4": tf_keras.layers.Conv2D(8, 3, 2, padding="same")(x)}
    config = configs.load("shapes", [*SMALL, "model.mean=[10.4,120.0,230.5]", "model.std=[20,60,90]"])
    return PolarMask(config, 3, backbone=tf_keras.Model(image, levels))


@pytest.mark.parametrize("size_and_stride", [(5, 2), (6, 4), (3, 1), None])
@pytest.mark.slow
def test_mean_and_deviation_in_the_first_convolution(size_and_stride):
    """Of an int8 file, which pads pixels with the mean where Keras pads what is normalised with zeros."""
    model = own_stem(*size_and_stride) if size_and_stride else make_model()
    contents = [tflite.convert(model, p, raw=True, images=lambda: images(8, 64, 96)) for p in ("fp32", "int8")]
    assert "CAST" not in [kind for kind, *_ in flatbuffer.operations(contents[1])] and flatbuffer.reads_pixels(contents[1])
    border = np.zeros([1, 64, 96, 3], np.uint8)
    border[:, 1:-1, 1:-1] = 255  # what lies at the border, and around it, differs from the mean
    for image in (next(images(1, 64, 96, seed=9))[None], border, 255 - border, np.full_like(border, 90)):
        (expected, _), (found, step) = (first_convolution(content, image) for content in contents)
        assert 0 < step < 0.2 * np.ptp(expected) or (image == 90).all()
        expected = np.clip(expected, found.min(), found.max())  # 8 bits end where the calibration images did
        assert np.abs(found - expected).max() < 4 * step  # black around the image, not the mean, makes that dozens
        assert np.abs(found - expected).mean() < 0.6 * step


@pytest.mark.parametrize(
    ("stem", "kernel", "padded"),
    [("6x6", (6, 3), (66, 98)), ("7x7", (7, 4), (69, 102))],  # of 3x3 all other files here are
)
@pytest.mark.slow
def test_pairs_of_pixels_change_no_number(stem, kernel, padded, monkeypatch):
    """The first convolution of an int8 file, as of 6 channels, gives the very bytes that it gives of 3."""
    model, contents = make_model(f"model.backbone.stem={stem}", "model.backbone.stem_width=0"), []
    for _ in range(2):
        contents.append(tflite.convert(model, "int8", raw=True, images=lambda: images(4, 64, 96)))
        monkeypatch.setattr(pixels, "_pairs", lambda start, columns, width: (start.pads, False))
    shapes = []
    for content in contents:
        tensors = {d["index"]: d["shape"] for d in Interpreter(model_content=content).get_tensor_details()}
        inputs = next(inputs for kind, inputs, *_ in flatbuffer.operations(content) if kind == "CONV_2D")
        shapes.append([tuple(map(int, tensors[i])) for i in inputs[:2]])
    (image, weights), (as_it_is, _) = shapes
    assert weights[1:] == (*kernel, 6) and image == (1, padded[0], padded[1] // 2, 6) and as_it_is[3] == 3
    for image in images(2, 64, 96, seed=5):
        (found, step), (expected, _) = (first_convolution(content, image[None]) for content in contents)
        assert step > 0 and np.ptp(found) > 50 * step
        np.testing.assert_array_equal(found, expected)
