"""Which devices and machines train: tf.distribute strategies, checked before TensorFlow sees them, that end instead of hanging.

TensorFlow 2.20's own start-up blocks inside C++ until every worker is there, deaf to Ctrl-C, SIGTERM and Python threads, and
its coordination service reports workers that merely finished. Both come from that service; here it is off. Workers wait for
each other in Python instead (`make`), and a thread watches them while they train (watchdog.py).
"""

from __future__ import annotations

import json
import os
import re
import socket
import sys
import threading
import time
from typing import NamedTuple

import tensorflow as tf
from tensorflow.python.distribute.cluster_resolver.slurm_cluster_resolver import expand_hostlist, expand_tasks_per_node
from tensorflow.python.distribute.collective_all_reduce_strategy import CollectiveAllReduceExtended
from tensorflow.python.eager import context  # no public name for collectives' health and abort; 2.20 and 2.21 have both

from polarmask_tf.errors import InputError, counted
from polarmask_tf.training.watchdog import worker_watchdog

EXAMPLE = '{"cluster": {"worker": ["host0:12345", "host1:12345"]}, "task": {"type": "worker", "index": 0}}'
MOST_CPU_DEVICES = 64  # each of which takes threads and seconds
TELL_EVERY = 10.0  # seconds between two lines about whom we wait for


class Cluster(NamedTuple):
    """All workers' "host:port", in the same order on each of them (a "chief" comes first), and which one this process is."""

    addresses: tuple[str, ...]
    index: int


def make(name: str = "auto", *, devices: int = 0, timeout: float = 600) -> tf.distribute.Strategy:
    """The strategy `name`: auto, none (one device), mirrored (GPUs of this machine) or multi_worker. Call it before any other
    TensorFlow operation.

    auto is multi_worker where TF_CONFIG or a Slurm step names several workers, else mirrored where there are several GPUs or
    devices > 1, else none. `devices` is the number of this process's GPUs to use (0: all); without GPUs, mirrored splits the
    CPU into so many. multi_worker waits up to `timeout` seconds for the other workers, telling stderr whom it waits for.
    Raises InputError: TF_CONFIG is wrong, more devices than there are, this worker's port is taken, a worker is missing.
    """
    gpus = tf.config.list_physical_devices("GPU")
    given = os.environ.get("TF_CONFIG", "").strip()
    cluster = None if name == "none" else parse_tf_config(given) if given else slurm_cluster(os.environ)
    if name == "auto":
        several = devices > 1 or (len(gpus) > 1 and devices != 1)
        name = "multi_worker" if cluster and len(cluster.addresses) > 1 else "mirrored" if several else "none"
    if name == "none" and devices > 1:
        raise InputError(f"devices={devices}, but the strategy none uses one; take mirrored")
    if name == "multi_worker":
        if not cluster:
            raise InputError(f"multi_worker: which workers are there? Start with srun, or set TF_CONFIG='{EXAMPLE}'")
        gpus = _share_of_node(gpus, os.environ)
        if not gpus and devices > 1:
            raise InputError(f"devices={devices}: without GPUs each of several workers has one device; start more workers")
    if not gpus and devices > MOST_CPU_DEVICES:
        raise InputError(f"devices={devices}: without GPUs the CPU is split into {MOST_CPU_DEVICES} devices at most")
    if gpus and devices > len(gpus):
        raise InputError(f"devices={devices}, but this process has {counted(len(gpus), 'GPU')}")
    if gpus:
        gpus = gpus[: 1 if name == "none" else devices or None]
        if gpus != tf.config.get_visible_devices("GPU"):  # the others' memory is not ours to take
            tf.config.set_visible_devices(gpus, "GPU")

    if name == "none":
        return tf.distribute.get_strategy()
    if name == "mirrored":
        if not gpus:
            _split_cpu(devices or 1)
        return tf.distribute.MirroredStrategy([f"{'GPU' if gpus else 'CPU'}:{i}" for i in range(len(gpus) or devices or 1)])
    if name == "multi_worker":
        return _multi_worker(cluster, len(gpus), timeout)
    raise InputError(f"strategy {name}: choose auto, none, mirrored or multi_worker")


def parse_tf_config(text: str) -> Cluster:
    """Checks the text of TF_CONFIG; InputError names what is wrong. Chief and workers become one list of workers."""

    def need(condition, problem):
        if not condition:
            raise InputError(f"TF_CONFIG: {problem}; an example that is right: TF_CONFIG='{EXAMPLE}'")

    try:
        config = json.loads(text)
    except ValueError as e:
        need(False, f"not JSON ({e})")
    need(isinstance(config, dict), "not a JSON object")
    jobs, task = config.get("cluster"), config.get("task")
    need(isinstance(jobs, dict) and jobs, 'no "cluster"')
    need(isinstance(task, dict), 'no "task"')
    need("worker" in jobs or "chief" in jobs, 'no "worker" list in "cluster"')
    for job, addresses in jobs.items():
        need(job in ("worker", "chief"), f'"cluster" has the job "{job}"; there are only workers and a chief here')
        strings = isinstance(addresses, list) and all(isinstance(a, str) for a in addresses)
        need(strings, f'"{job}" is not a list of "host:port"')
        need(job == "worker" or len(addresses) == 1, f"{len(addresses)} chiefs, there can be only one")
    everyone = [*jobs.get("chief", []), *jobs.get("worker", [])]
    need(everyone, 'the "worker" list is empty')
    for address in everyone:
        host, _, port = address.rpartition(":")
        need(host and not set(host) & set("/ ,") and port.isdecimal(), f'"{address}" is not "host:port"')
        need(0 < int(port) < 65536, f'"{address}": the port is not in 1..65535')
    twice = [a for i, a in enumerate(everyone) if a.lower() in [b.lower() for b in everyone[:i]]]
    need(not twice, f"{twice and twice[0]} is there twice")
    job, index = task.get("type"), task.get("index")
    need(isinstance(job, str) and job in jobs, f'"task" is of type {json.dumps(job)}, which "cluster" does not have')
    need(str(index).isdecimal(), f'"index" of "task" is {json.dumps(index)}, not a number from 0')
    size = len(jobs[job])
    need(int(index) < size, f'"index" of "task" is {index}, but "{job}" has only {size} address{"es" * (size > 1)}')
    return Cluster(tuple(everyone), int(index) + (len(jobs.get("chief", [])) if job == "worker" else 0))


def slurm_cluster(environment) -> Cluster | None:
    """The cluster of a Slurm step (srun) of several tasks, from the variables that srun sets for each task; else None.

    SlurmClusterResolver itself is not used, only its parsing: it orders hosts as text, so that n10 comes before n9 while
    Slurm numbers tasks the other way round, it cannot do without GPUs, and its port is that of notebooks.
    """
    names = ("SLURM_STEP_NODELIST", "SLURM_STEP_TASKS_PER_NODE", "SLURM_PROCID")
    if any(name not in environment for name in names):
        return None
    try:
        # Ranges like n[1-4] and 1(x4) are counted one by one.
        if re.search(r"\[[^]]*\d{7}|\(x\d{7}", environment[names[0]] + environment[names[1]]):
            raise ValueError("a number in brackets is above 999,999")
        hosts, tasks = expand_hostlist(environment[names[0]]), expand_tasks_per_node(environment[names[1]])
        places = [(node, local) for node, count in enumerate(tasks) for local in range(count)]
        rank, job = int(environment["SLURM_PROCID"]), int(environment.get("SLURM_JOB_ID", 0))
        own = tuple(int(environment.get(v, p)) for v, p in zip(("SLURM_NODEID", "SLURM_LOCALID"), places[rank], strict=True))
        if len(hosts) != len(tasks):
            raise ValueError(f"{len(hosts)} nodes, but tasks for {len(tasks)}")
    except (ValueError, IndexError) as e:
        given = " ".join(f"{name}={environment[name]}" for name in names)
        raise InputError(f"{given}: cannot be understood ({e}); set TF_CONFIG in their place") from None
    if len(places) == 1:
        return None
    if own != places[rank]:
        raise InputError("Slurm has not numbered the tasks node by node: start them with srun --distribution=block")
    port = 12000 + 16 * (job % 1000)  # below the ports that systems hand out; jobs that share a node rarely meet
    return Cluster(tuple(f"{hosts[node]}:{port + local}" for node, local in places), rank)


def _share_of_node(gpus: list, environment) -> list:
    """Of the GPUs that several Slurm tasks of one node see, this task's; all, where Slurm gave each task its own."""
    if "TF_CONFIG" in environment or "SLURM_STEP_TASKS_PER_NODE" not in environment or "SLURM_GPUS_PER_TASK" in environment:
        return gpus
    local = int(environment.get("SLURM_LOCALID", 0))
    tasks = expand_tasks_per_node(environment["SLURM_STEP_TASKS_PER_NODE"])[int(environment.get("SLURM_NODEID", 0))]
    if 0 < len(gpus) < tasks:
        raise InputError(f"{tasks} tasks on a node with {len(gpus)} GPUs: start at most one task for each")
    share = len(gpus) // tasks
    return gpus[local * share : (local + 1) * share]


def _split_cpu(number: int) -> None:
    cpu = tf.config.list_physical_devices("CPU")[0]
    if len(tf.config.get_logical_device_configuration(cpu) or [None]) != number:
        try:
            tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * number)
        except RuntimeError:
            raise InputError(f"devices={number}: TensorFlow already runs with another number of CPU devices") from None


def _multi_worker(cluster: Cluster, gpus: int, timeout: float) -> tf.distribute.Strategy:
    host, _, port = cluster.addresses[cluster.index].rpartition(":")
    try:
        with socket.socket() as probe:  # gRPC would share a taken port without a word
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("", int(port)))
    except OSError as e:
        taken = f"port {port} of this machine ({host}) is taken ({e.strerror})"
        raise InputError(f"{taken}: end what uses it, or give another in TF_CONFIG") from None
    # gRPC sends what goes to other workers through http_proxy, too, where one is set.
    hosts = ",".join(address.rpartition(":")[0] for address in cluster.addresses)
    os.environ["no_grpc_proxy"] = hosts  # noqa: SIM112 gRPC's name for it
    context.context().configure_coordination_service(service_type="")  # see the head of this file
    CollectiveAllReduceExtended._enable_check_health = False  # nor TensorFlow's own watch: 26 s, and it never stops
    resolver = tf.distribute.cluster_resolver.SimpleClusterResolver(
        tf.train.ClusterSpec({"worker": cluster.addresses}),
        task_type="worker",
        task_id=cluster.index,
        num_accelerators={"GPU": gpus},
        rpc_layer="grpc",
    )
    strategy = tf.distribute.MultiWorkerMirroredStrategy(resolver)
    _wait_for_all(cluster, timeout)
    reason = (tf.errors.DEADLINE_EXCEEDED, "they do not answer each other")
    abort = threading.Timer(max(timeout, 60), context.context().abort_collective_ops, reason)
    abort.daemon = True
    abort.start()
    try:
        with worker_watchdog(strategy):
            pass  # its end is the first meeting of all
    except tf.errors.OpError as e:
        advice = "give each the same list of workers, its own index and equally many GPUs"
        what = f"the workers are there but do not fit together ({e.message.splitlines()[0][:200]})"
        raise InputError(f"{what}: {advice}") from None
    finally:
        abort.cancel()
    return strategy


def _wait_for_all(cluster: Cluster, timeout: float) -> None:
    """Returns when every worker's port answers. Plain sockets: TensorFlow would take a worker's restart for its death."""
    begin = told = time.monotonic()
    others = [address for i, address in enumerate(cluster.addresses) if i != cluster.index]
    while missing := [address for address in others if not _answers(address)]:
        now = time.monotonic()
        names = ", ".join(missing)
        if now - begin >= timeout:
            late = f"{len(missing)} of {len(cluster.addresses)} workers did not come within {timeout:g} s: {names}"
            advice = "the same command, its own index and a way through the firewall (--worker-timeout waits longer)"
            raise InputError(f"{late}; start every worker with {advice}")
        if now - told >= TELL_EVERY:
            print(f"waiting for {len(missing)} of {len(cluster.addresses)} workers: {names}", file=sys.stderr, flush=True)
            told = now
        time.sleep(min(0.5, timeout))


def _answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=2).close()
    except OSError:  # also a name that does not exist yet, as of a pod that has not been started
        return False
    return True
