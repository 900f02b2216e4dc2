"""PolarMask (CVPR 2020) for TensorFlow: instance segmentation as polygons, from COCO JSON to one .tflite file.

    import polarmask_tf as pm

    model = pm.PolarMask.from_config_name("edge", classes=["cat", "dog"])
    model.compile(optimizer=pm.make_optimizer(model.config))
    model.fit(pm.training_data("data/train", model.config), epochs=10)

Each name below is imported when it is first used: `import polarmask_tf` loads no TensorFlow.
"""

from __future__ import annotations

import importlib
import typing

__version__ = "0.1.0"

# The front door: name -> module and what it is called there. None is the name of a module of this package.
_FRONT_DOOR = {
    "InputError": ("errors", "InputError"),
    "load_config": ("config", "load"),
    "PolarMask": ("modeling.polarmask", "PolarMask"),
    "load_model": ("weights.runs", "load_model"),
    "convert_coco": ("data.convert", "convert"),
    "convert_dataset": ("data.convert", "convert_dataset"),
    "training_data": ("data.pipeline", "training_data"),
    "validation_data": ("data.pipeline", "validation_data"),
    "make_instances": ("data.instances", "make_instances"),
    "instances_spec": ("data.instances", "instances_spec"),
    "make_optimizer": ("training.optimizers", "make"),
    "train": ("training.train", "train"),
    "load_predictor": ("inference.predictor", "load_predictor"),
    "predict": ("inference.predict", "predict"),
    "read_image": ("inference.predictor", "read_image"),
    "evaluate": ("inference.evaluate", "evaluate"),
    "export_model": ("export.export", "export_model"),
    "draw_shapes": ("tools.shapes", "make_shapes"),
}

if typing.TYPE_CHECKING:
    from polarmask_tf.config import load as load_config
    from polarmask_tf.data.convert import convert as convert_coco
    from polarmask_tf.data.convert import convert_dataset
    from polarmask_tf.data.instances import instances_spec, make_instances
    from polarmask_tf.data.pipeline import training_data, validation_data
    from polarmask_tf.errors import InputError
    from polarmask_tf.export.export import export_model
    from polarmask_tf.inference.evaluate import evaluate
    from polarmask_tf.inference.predict import predict
    from polarmask_tf.inference.predictor import load_predictor, read_image
    from polarmask_tf.modeling.polarmask import PolarMask
    from polarmask_tf.tools.shapes import make_shapes as draw_shapes
    from polarmask_tf.training.optimizers import make as make_optimizer
    from polarmask_tf.training.train import train
    from polarmask_tf.weights.runs import load_model

__all__ = [  # noqa: RUF022 in the order in which they are used
    "InputError",
    "load_config",
    "PolarMask",
    "load_model",
    "convert_coco",
    "convert_dataset",
    "training_data",
    "validation_data",
    "make_instances",
    "instances_spec",
    "make_optimizer",
    "train",
    "load_predictor",
    "predict",
    "read_image",
    "evaluate",
    "export_model",
    "draw_shapes",
]


def __getattr__(name: str):
    if name not in _FRONT_DOOR:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, inner = _FRONT_DOOR[name]
    value = globals()[name] = getattr(importlib.import_module(f"{__name__}.{module}"), inner)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_FRONT_DOOR})
