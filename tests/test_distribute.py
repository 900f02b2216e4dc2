"""training/distribution.py and watchdog.py: what is checked before TensorFlow, and real processes over loopback on CPU."""

import json
import os
import re
import socket
import subprocess
import sys
from types import SimpleNamespace

import pytest
import tensorflow as tf

from polarmask_tf.errors import InputError
from polarmask_tf.training import distribution, replicas, watchdog

TWO = {"cluster": {"worker": ["a:1", "b:2"]}, "task": {"type": "worker", "index": 1}}


def test_tf_config_names_the_workers():
    assert distribution.parse_tf_config(json.dumps(TWO)) == (("a:1", "b:2"), 1)
    assert distribution.parse_tf_config(distribution.EXAMPLE) == (("host0:12345", "host1:12345"), 0)


@pytest.mark.parametrize("job, index, expected", [("chief", 0, 0), ("worker", 0, 1), ("worker", "1", 2)])
def test_a_chief_is_the_first_worker(job, index, expected):
    cluster = {"worker": ["a:1", "b:2"], "chief": ["[::1]:3"]}  # as Kubeflow writes it, with more keys beside
    text = json.dumps({"cluster": cluster, "task": {"type": job, "index": index}, "environment": "cloud"})
    assert distribution.parse_tf_config(text) == (("[::1]:3", "a:1", "b:2"), expected)


def cluster(*addresses, **jobs):
    return {"cluster": jobs or {"worker": list(addresses)}, "task": {"type": "worker", "index": 0}}


def task(**task):
    return {**TWO, "task": task}


@pytest.mark.parametrize(
    "config, problem",
    [
        ("{'cluster'", "not JSON"),
        ("[]", "not a JSON object"),
        ({}, 'no "cluster"'),
        ({"cluster": [], "task": {}}, 'no "cluster"'),
        ({"cluster": {"worker": ["a:1"]}}, 'no "task"'),
        ({"cluster": {"worker": ["a:1"]}, "task": 0}, 'no "task"'),
        (cluster(master=["a:1"]), 'no "worker" list'),
        (cluster(worker=["a:1"], ps=["b:1"]), 'the job "ps"'),
        (cluster(worker=["a:1"], evaluator=["b:1"]), 'the job "evaluator"'),
        (cluster(worker="a:1"), '"worker" is not a list'),
        (cluster(worker=[1]), '"worker" is not a list'),
        (cluster(worker=[]), "empty"),
        (cluster(worker=["a:1"], chief=["b:1", "c:1"]), "2 chiefs"),
        (cluster("a:1", "b"), '"b" is not "host:port"'),
        (cluster("a:1", ":2"), '":2" is not "host:port"'),
        (cluster("a:1", "b:http"), '"b:http" is not "host:port"'),
        (cluster("a:1", "grpc://b:2"), '"grpc://b:2" is not "host:port"'),
        (cluster("a:1,b:1"), '"a:1,b:1" is not "host:port"'),
        (cluster("a:1", "b:70000"), "not in 1..65535"),
        (cluster("a:0"), "not in 1..65535"),
        (cluster("a:1", "b:2", "A:1"), "A:1 is there twice"),
        (cluster(worker=["a:1"], chief=["a:1"]), "a:1 is there twice"),
        (task(index=0), "of type null"),
        (task(type="ps", index=0), 'of type "ps"'),
        (task(type=["worker"], index=0), "of type"),
        (task(type="worker"), '"index" of "task" is null'),
        (task(type="worker", index=-1), "is -1, not a number"),
        (task(type="worker", index=True), "is true, not a number"),
        (task(type="worker", index=0.5), "is 0.5, not a number"),
        (task(type="worker", index=2), 'is 2, but "worker" has only 2 addresses'),
    ],
)
def test_a_bad_tf_config_is_one_line_with_an_example(config, problem):
    text = config if isinstance(config, str) else json.dumps(config)
    with pytest.raises(InputError) as e:
        distribution.parse_tf_config(text)
    assert problem in str(e.value) and distribution.EXAMPLE in str(e.value) and "\n" not in str(e.value)


def slurm(nodes, tasks, rank, **more):
    step = {"SLURM_STEP_NODELIST": nodes, "SLURM_STEP_TASKS_PER_NODE": tasks, "SLURM_PROCID": str(rank)}
    return {**step, "SLURM_JOB_ID": "2003", **more}


def test_slurm_numbers_tasks_by_node_in_its_own_order():
    # Sorted as text n10 would come before n9, and rank 0 would be looked for on the wrong node.
    port = 12000 + 16 * 3
    assert distribution.slurm_cluster(slurm("n[9-10]", "1(x2)", 1)) == ((f"n9:{port}", f"n10:{port}"), 1)
    addresses, index = distribution.slurm_cluster(slurm("gpu[01,03],x", "2(x2),1", 3, SLURM_NODEID="1", SLURM_LOCALID="1"))
    assert addresses == (f"gpu01:{port}", f"gpu01:{port + 1}", f"gpu03:{port}", f"gpu03:{port + 1}", f"x:{port}")
    assert index == 3


def test_no_slurm_step_or_one_of_one_task_is_no_cluster():
    assert distribution.slurm_cluster({}) is None
    assert distribution.slurm_cluster({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}) is None  # a batch script outside of srun
    assert distribution.slurm_cluster(slurm("n1", "1", 0)) is None


@pytest.mark.parametrize(
    "environment, problem",
    [
        (slurm("n[1", "1(x2)", 0), "cannot be understood"),
        (slurm("n[1-2]", "two", 0), "cannot be understood"),
        (slurm("n[1-99999999999]", "1(x2)", 0), "above 999,999"),
        (slurm("n[1-2]", "1(x99999999999)", 0), "above 999,999"),
        (slurm("n[1-3]", "1(x2)", 0), "cannot be understood"),
        (slurm("n[1-2]", "1(x2)", 2), "cannot be understood"),
        (slurm("n[1-2]", "1(x2)", "x"), "cannot be understood"),
        (slurm("n[1-2]", "2(x2)", 1, SLURM_NODEID="1", SLURM_LOCALID="0"), "--distribution=block"),
    ],
)
def test_a_slurm_step_that_is_not_understood(environment, problem):
    with pytest.raises(InputError, match=problem):
        distribution.slurm_cluster(environment)


@pytest.mark.parametrize(
    "environment, expected",
    [
        (slurm("n1", "2", 1, SLURM_LOCALID="1", SLURM_NODEID="0"), [2, 3]),
        (slurm("n1", "2", 0, SLURM_LOCALID="0", SLURM_NODEID="0"), [0, 1]),
        (slurm("n[1-2]", "1(x2)", 1, SLURM_LOCALID="0", SLURM_NODEID="1"), [0, 1, 2, 3]),
        (slurm("n1", "2", 1, SLURM_LOCALID="1", SLURM_NODEID="0", SLURM_GPUS_PER_TASK="4"), [0, 1, 2, 3]),
        ({"TF_CONFIG": "..."}, [0, 1, 2, 3]),
    ],
)
def test_tasks_of_one_node_share_its_gpus(environment, expected):
    assert distribution._share_of_node([0, 1, 2, 3], environment) == expected


def test_more_tasks_than_gpus_on_a_node():
    with pytest.raises(InputError, match="5 tasks on a node with 4 GPUs"):
        distribution._share_of_node([0, 1, 2, 3], slurm("n1", "5", 0))


@pytest.fixture
def machine(monkeypatch):
    """Sets the GPUs and the cluster that there are; the strategies are their arguments."""

    def setup(gpus=0, environment=None):
        for name in [*os.environ]:
            if name.startswith(("SLURM_", "TF_CONFIG")):
                monkeypatch.delenv(name)
        for name, value in (environment or {}).items():
            monkeypatch.setenv(name, value)
        devices = [f"gpu{i}" for i in range(gpus)]
        visible = []
        monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: devices)
        monkeypatch.setattr(tf.config, "get_visible_devices", lambda kind: devices)
        monkeypatch.setattr(tf.config, "set_visible_devices", lambda devices, kind: visible.extend(devices))
        monkeypatch.setattr(tf.distribute, "get_strategy", lambda: ("none", visible))
        monkeypatch.setattr(tf.distribute, "MirroredStrategy", lambda devices: ("mirrored", devices, visible))
        monkeypatch.setattr(distribution, "_multi_worker", lambda cluster, gpus, timeout: ("workers", cluster.index, gpus))
        monkeypatch.setattr(distribution, "_split_cpu", lambda number: None)

    return setup


@pytest.mark.parametrize(
    "gpus, environment, devices, expected",
    [
        (0, {}, 0, ("none", [])),
        (1, {}, 0, ("none", [])),
        (4, {}, 0, ("mirrored", ["GPU:0", "GPU:1", "GPU:2", "GPU:3"], [])),
        (4, {}, 1, ("none", ["gpu0"])),
        (4, {}, 2, ("mirrored", ["GPU:0", "GPU:1"], ["gpu0", "gpu1"])),
        (0, {}, 2, ("mirrored", ["CPU:0", "CPU:1"], [])),
        (0, {"TF_CONFIG": json.dumps(TWO)}, 0, ("workers", 1, 0)),
        (4, {"TF_CONFIG": json.dumps(TWO)}, 3, ("workers", 1, 3)),
        (4, {"TF_CONFIG": json.dumps(cluster("a:1"))}, 0, ("mirrored", ["GPU:0", "GPU:1", "GPU:2", "GPU:3"], [])),
        (2, slurm("n[1-2]", "1(x2)", 1), 0, ("workers", 1, 2)),
        (2, slurm("n1", "1", 0), 0, ("mirrored", ["GPU:0", "GPU:1"], [])),
        (2, {**slurm("n[1-2]", "1(x2)", 0), "TF_CONFIG": json.dumps(TWO)}, 0, ("workers", 1, 2)),  # TF_CONFIG goes first
    ],
)
def test_auto_takes_all_that_there_is(machine, gpus, environment, devices, expected):
    machine(gpus, environment)
    assert distribution.make(devices=devices) == expected


@pytest.mark.parametrize(
    "name, gpus, environment, devices, problem",
    [
        ("mirrored", 2, {}, 3, "has 2 GPUs"),
        ("auto", 1, {}, 2, "has 1 GPU$"),
        ("none", 2, {}, 2, "take mirrored"),
        ("multi_worker", 2, {}, 0, "TF_CONFIG='{"),
        ("multi_worker", 0, {"TF_CONFIG": json.dumps(TWO)}, 2, "without GPUs"),
        ("mirrored", 0, {"TF_CONFIG": "{"}, 0, "not JSON"),
        ("auto", 0, {"TF_CONFIG": "{"}, 0, "not JSON"),
        ("two", 0, {}, 0, "choose auto"),
        ("auto", 0, {}, 10**6, "split into 64 devices at most"),
    ],
)
def test_what_cannot_be_made(machine, name, gpus, environment, devices, problem):
    machine(gpus, environment)
    with pytest.raises(InputError, match=problem):
        distribution.make(name, devices=devices)


def free_ports(number):
    sockets = [socket.socket() for _ in range(number)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def tf_config(ports, index):
    return json.dumps({"cluster": {"worker": [f"127.0.0.1:{p}" for p in ports]}, "task": {"type": "worker", "index": index}})


@pytest.mark.parametrize("bound", ["127.0.0.1", "0.0.0.0"])
def test_a_taken_port_is_said_at_once(monkeypatch, bound):
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)  # as gRPC does, which would then share it
        other.bind((bound, 0))
        other.listen()
        port = other.getsockname()[1]
        monkeypatch.setenv("TF_CONFIG", tf_config([port, *free_ports(1)], 0))
        with pytest.raises(InputError, match=f"port {port} of this machine .* is taken"):
            distribution.make()


def test_without_a_cluster_this_is_the_only_worker():
    strategy = tf.distribute.get_strategy()
    assert replicas.worker(strategy) == (0, 1) and replicas.is_chief(strategy)
    with watchdog.worker_watchdog(strategy):
        pass
    with pytest.raises(ZeroDivisionError), watchdog.worker_watchdog(strategy):
        raise ZeroDivisionError


# A process of its own: TensorFlow's devices cannot be changed once it runs. Prints its results as JSON.
SCRIPT = """
import json, os, signal, sys, time
import tensorflow as tf
from polarmask_tf.errors import InputError
from polarmask_tf.training import distribution, replicas, watchdog

what, devices, timeout = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
distribution.TELL_EVERY = 1 if timeout < 10 else 60
watchdog.GRACE = 2
try:
    strategy = distribution.make(devices=devices, timeout=timeout)
    index, number = replicas.worker(strategy)
    step = tf.function(lambda x: strategy.reduce("SUM", strategy.run(
        lambda x: tf.distribute.get_replica_context().all_reduce("sum", x * 1.0), (x,)), axis=None))
    with watchdog.worker_watchdog(strategy):
        total = step(tf.constant(index + 1.0))
        print(json.dumps([type(strategy).__name__, index, number, strategy.num_replicas_in_sync, float(total)]))
        for number in range(10000 if what.startswith("kill") else 3):
            # Not before the second step: then the other one has its part of the first.
            if what.startswith("kill") and index == 1 and number:
                os.kill(os.getpid(), signal.SIGKILL)
            if what == "kill while busy" and number:
                time.sleep(60)
            step(tf.constant(1.0))
            time.sleep(0.1)
        if what == "late" and replicas.is_chief(strategy):
            time.sleep(1)
    if what == "late" and replicas.is_chief(strategy):
        time.sleep(5)  # longer than a dead worker would go unnoticed
    print("finished")
except InputError as e:
    print(f"polarmask: error: {e}", file=sys.stderr)
    sys.exit(2)
"""


def run(what="plain", environments=({},), devices=0, timeout=60):
    """Runs SCRIPT once for each environment, all at once; returns objects of status, out and err."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "TF_CONFIG", "PYTHONUNBUFFERED"))}
    command = [sys.executable, "-c", SCRIPT, what, str(devices), str(timeout)]
    processes = [
        subprocess.Popen(command, env={**clean, "CUDA_VISIBLE_DEVICES": "-1", **more}, text=True, stdout=-1, stderr=-1)
        for more in environments
    ]
    try:
        ends = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [SimpleNamespace(status=p.returncode, out=out, err=err) for p, (out, err) in zip(processes, ends, strict=True)]


def lines_of(err):
    """What a user reads, without TensorFlow's information: that its server runs, and what 2.21 says when it is imported."""
    return [line for line in err.splitlines() if line and not re.match("I0000 |WARNING: All log mess", line)]


def test_the_cpu_is_split_into_devices():
    (end,) = run(devices=2)
    assert end.status == 0, end.err
    assert json.loads(end.out.splitlines()[0]) == ["MirroredStrategy", 0, 1, 2, 4.0]  # two replicas, each with 1 + 1


@pytest.mark.slow
def test_two_workers_by_tf_config_may_finish_at_different_times():
    ports = free_ports(2)
    # A proxy that is not there: what workers say to each other must not go through one.
    ends = run("late", [{"TF_CONFIG": tf_config(ports, i), "http_proxy": "http://127.0.0.1:9"} for i in range(2)])
    assert [end.status for end in ends] == [0, 0], "\n".join(end.err for end in ends)
    for index, end in enumerate(ends):
        first, *rest = end.out.splitlines()
        assert json.loads(first) == ["CollectiveAllReduceStrategy", index, 2, 2, 6.0] and rest == ["finished"]
        assert lines_of(end.err) == []


@pytest.mark.slow
def test_two_slurm_tasks_and_one_is_killed():
    job = next(job for job in range(1000) if all(_free(12000 + 16 * job + i) for i in range(2)))
    more = {"SLURM_NTASKS": "2", "SLURM_NODEID": "0", "SLURM_JOB_ID": str(job)}
    survivor, killed = run("kill", [slurm("127.0.0.1", "2", i, SLURM_LOCALID=str(i), **more) for i in range(2)])
    assert killed.status == -9 and survivor.status == 2
    assert json.loads(survivor.out) == ["CollectiveAllReduceStrategy", 0, 2, 2, 6.0]
    assert lines_of(survivor.err) == [_lost(f"127.0.0.1:{12000 + 16 * job + 1}")]


@pytest.mark.slow
def test_a_worker_that_is_busy_elsewhere_is_ended_with_the_same_line():
    ports = free_ports(2)
    survivor, killed = run("kill while busy", [{"TF_CONFIG": tf_config(ports, i)} for i in range(2)])
    assert killed.status == -9 and survivor.status == 2
    assert lines_of(survivor.err) == [_lost(f"127.0.0.1:{ports[1]}")]
    assert json.loads(survivor.out) == ["CollectiveAllReduceStrategy", 0, 2, 2, 6.0]  # what it had printed is not lost


def _lost(address):
    return (
        f"polarmask: error: lost worker 1 ({address}): start all workers again with the same command; "
        "the training goes on from the last checkpoint"
    )


def _free(port):
    with socket.socket() as s:
        return s.connect_ex(("127.0.0.1", port)) != 0


@pytest.mark.slow
def test_missing_workers_are_named():
    pairs = [free_ports(2), free_ports(2)]  # of each pair only one worker comes: worker 0 of the first, 1 of the second
    ends = run(environments=[{"TF_CONFIG": tf_config(ports, i)} for i, ports in enumerate(pairs)], timeout=5)
    for end, missing in zip(ends, (pairs[0][1], pairs[1][0]), strict=True):
        *waiting, last = lines_of(end.err)
        assert end.status == 2 and set(waiting) == {f"waiting for 1 of 2 workers: 127.0.0.1:{missing}"}
        assert last.startswith(f"polarmask: error: 1 of 2 workers did not come within 5 s: 127.0.0.1:{missing};")
