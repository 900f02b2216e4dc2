"""Settings: their schema, and reading them from YAML."""

from polarmask_tf.config.schema import (
    CONVENTIONS,
    BackboneConfig,
    Config,
    Conventions,
    DataConfig,
    FPNConfig,
    HeadConfig,
    LossConfig,
    ModelConfig,
    PostprocessConfig,
    TargetConfig,
    TrainConfig,
    check,
    input_size,
)
from polarmask_tf.config.yaml import configs_dir, dump, find, from_dict, load, load_saved, override, to_dict

__all__ = [
    "CONVENTIONS",
    "BackboneConfig",
    "Config",
    "Conventions",
    "DataConfig",
    "FPNConfig",
    "HeadConfig",
    "LossConfig",
    "ModelConfig",
    "PostprocessConfig",
    "TargetConfig",
    "TrainConfig",
    "check",
    "configs_dir",
    "dump",
    "find",
    "from_dict",
    "input_size",
    "load",
    "load_saved",
    "override",
    "to_dict",
]
