"""Checkpoints that earlier versions wrote: under which names, and in which order, they hold the parts of a model."""

from __future__ import annotations

import tensorflow as tf
from tensorflow.core.protobuf.trackable_object_graph_pb2 import TrackableObjectGraph

from polarmask_tf.weights.state_dict import without_numbers


def is_earlier(names) -> bool:
    """Whether a checkpoint with these tensors was written before decoder and towers had names of their own."""
    return any(name.startswith("model/") for name in names)


def parts(model) -> dict:
    """What such a checkpoint holds of a model, for tf.train.Checkpoint."""
    backbone, head = model.backbone, model.head
    if hasattr(backbone, "stages"):
        names = ("stem", "stem_norm", "stem2", "stem2_norm")
        layers = {name: getattr(backbone, name) for name in names if hasattr(backbone, name)}
        backbone = tf.train.Checkpoint(**layers, stages=[list(blocks) for blocks in backbone.stages])
    towers = {}
    for tower in head.towers:
        convs, norms = getattr(head, f"{tower}_convs"), list(getattr(head, f"{tower}_norms"))
        if head.config.norm == "batch":
            names = [str(level) for level in head.levels]
            count = len(names)
            norms = [dict(zip(names, norms[i : i + count], strict=True)) for i in range(0, len(norms), count)]
        towers[tower] = [list(pair) for pair in zip(convs, norms, strict=True)]
    outputs = {name: getattr(head, name) for name in ("classes", "centerness", "rays", "boxes") if hasattr(head, name)}
    scales = {f"scale{level}": scale for level, scale in head.scales.items()}
    if "box" in head.towers:
        scales |= {f"box_scale{level}": scale for level, scale in head.box_scales.items()}
    head = tf.train.Checkpoint(towers=towers, **outputs, **scales)
    return {"model": {"backbone": backbone, "fpn": model.decoder, "head": head}}


def order_of_averages(reader, names) -> list[int]:
    """At which place such a checkpoint has the running average of each of these variables, named as we do."""
    graph = TrackableObjectGraph.FromString(reader.get_tensor("_CHECKPOINTABLE_OBJECT_GRAPH"))
    theirs = {
        int(attribute.checkpoint_key.split("/")[1]): attribute.full_name.removeprefix("average/")
        for node in graph.nodes
        for attribute in node.attributes
        if attribute.checkpoint_key.startswith("average/")
    }
    places = {name: place for place, name in enumerate(without_numbers(theirs[place] for place in sorted(theirs)))}
    return [places["fpn/" + name.removeprefix("decoder/") if name.startswith("decoder/") else name] for name in names]
