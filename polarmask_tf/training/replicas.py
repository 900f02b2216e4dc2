"""What the replicas and workers of a training tell one another, besides gradients."""

from __future__ import annotations

import json

import numpy as np
import tensorflow as tf

from polarmask_tf.errors import InputError


def worker(strategy: tf.distribute.Strategy) -> tuple[int, int]:
    """Index of this worker and number of workers; (0, 1) where there is one process."""
    resolver = strategy.cluster_resolver
    return (resolver.task_id, resolver.cluster_spec().num_tasks("worker")) if resolver else (0, 1)


def is_chief(strategy: tf.distribute.Strategy) -> bool:
    """Whether this is worker 0, the one that writes and prints."""
    return worker(strategy)[0] == 0


def all_gather(strategy: tf.distribute.Strategy, values: list) -> list:
    """The lists (of what JSON takes) of all workers, joined in the order of the workers: the same on each of them."""
    _, workers = worker(strategy)
    if workers == 1:
        return values
    content = json.dumps(values).encode()
    local = strategy.num_replicas_in_sync // workers

    def of_replica(context):  # the first replica of each worker speaks for it
        mine = content if context.replica_id_in_sync_group % local == 0 else b""
        return tf.constant(np.frombuffer(mine, np.uint8).astype(np.int32))  # collectives take no bytes

    parts = strategy.experimental_distribute_values_from_function(of_replica)
    together = strategy.gather(parts, axis=0).numpy().astype(np.uint8).tobytes().decode()
    joined, decoder, at = [], json.JSONDecoder(), 0
    while at < len(together):
        part, at = decoder.raw_decode(together, at)
        joined += part
    return joined


def assert_equal(strategy: tf.distribute.Strategy, value: int, what: str) -> None:
    """Returns when every worker has come here; InputError if not all of them bring the same value."""
    values = all_gather(strategy, [value])
    if len(set(values)) > 1:
        index, _ = worker(strategy)
        raise InputError(f"worker {index} {what} (the workers: {', '.join(map(str, values))})")


def average_batch_norm(model) -> None:
    """Gives the values that every replica keeps on its own, BatchNorm's moving statistics, their mean over the replicas.

    A checkpoint holds that mean, so a training that goes on from it is the one that was not interrupted.
    """
    for variable in model.non_trainable_variables:
        own = variable.synchronization == tf.VariableSynchronization.ON_READ
        if own and isinstance(variable, tf.distribute.DistributedValues):
            variable.assign(variable.read_value())
