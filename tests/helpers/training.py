"""Trainings as a user starts them, in processes of their own, for the tests of layouts and of kills."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import tensorflow as tf

from polarmask_tf import config as configs

ROOT = Path(__file__).resolve().parents[2]
TINY = [
    "model.rays=12",
    "model.refine_channels=0",
    "model.backbone.width=8",
    "model.fpn.channels=16",
    "model.fpn.levels=[3,4]",
    "model.head.channels=16",
    "model.head.convs=1",
    "model.head.ray_bias=1",
    "data.size=[64,64]",
    "data.batch=4",
    "targets.ranges=[24]",
    "postprocess.max_detections=20",
    "postprocess.score_threshold=0.001",
]
QUALITY = (
    "model.head.centerness_tower=ray",
    "targets.centerness=iou",
    "targets.classification=iou",
    "targets.match=cost",
    "targets.ranges=[]",
    "loss.weight_by=iou",
    "loss.mask_weight=1",
)
TINIEST = [  # for what needs steps and no learning
    *TINY,
    "model.backbone.width=4",
    "model.fpn.levels=[5]",
    "targets.ranges=[]",
    "model.backbone.norm=group",
    "model.backbone.freeze_at=5",
    "train.optimizer=sgd",
]


def load(*settings: str) -> configs.Config:
    return configs.load("shapes", [*TINIEST, *settings])


def command(data: Path, run: Path, *settings: str, arguments: tuple = ()) -> list[str]:
    words = [word for item in (*TINY, *settings) for word in ("--set", item)]
    return [
        sys.executable,
        "-m",
        "polarmask_tf",
        "train",
        "--config",
        "shapes",
        "--data",
        str(data),
        "--out",
        str(run),
        *words,
        *map(str, arguments),
    ]


def start(words: list[str], **environment) -> subprocess.Popen:
    return subprocess.Popen(
        words, cwd=ROOT, env={**os.environ, **environment}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(*processes: subprocess.Popen, timeout: float = 300) -> list[tuple[int, str, str]]:
    """(exit status, stdout, stderr) of each; all are killed if one takes too long."""
    try:
        return [(p.returncode, out, err) for p in processes for out, err in [p.communicate(timeout=timeout)]]
    finally:
        for p in processes:
            p.kill()


def cluster(workers: int) -> list[str]:
    """TF_CONFIG of each of several workers on this machine."""
    sockets = [socket.socket() for _ in range(workers)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    addresses = [f"127.0.0.1:{each.getsockname()[1]}" for each in sockets]
    for each in sockets:
        each.close()
    tasks = [{"type": "worker", "index": index} for index in range(workers)]
    return [json.dumps({"cluster": {"worker": addresses}, "task": task}) for task in tasks]


def weights(run: Path, step: int) -> dict[str, np.ndarray]:
    """Everything that a checkpoint holds, by name: the weights, and what the optimizer keeps."""
    reader = tf.train.load_checkpoint(str(run / "checkpoints" / f"step-{step}"))
    names = [n for n in reader.get_variable_to_shape_map() if "OBJECT_GRAPH" not in n and "save_counter" not in n]
    return {name: reader.get_tensor(name) for name in names}
