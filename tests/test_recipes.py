"""The recipes for clusters in scripts/, as far as they can be checked without a cluster: parsed, and their shell lines run."""

import os
import re
import shlex
import signal
import subprocess
from pathlib import Path

import pytest
import yaml

from polarmask_tf import cli, config
from polarmask_tf.training import distribution

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
SBATCH = SCRIPTS / "slurm.sbatch"


def documents(name):
    return list(yaml.safe_load_all((SCRIPTS / "kubernetes" / name).read_text()))


def pod(name):
    """The pod template's spec and the number of pods."""
    spec = documents(name)[-1]["spec"]
    if name == "job.yaml":
        return spec["template"]["spec"], spec["parallelism"]
    worker = spec["tfReplicaSpecs"]["Worker"]
    return worker["template"]["spec"], worker["replicas"]


def sbatch_options():
    lines = re.findall(r"^#SBATCH --(\S+)$", SBATCH.read_text(), re.M)
    return dict(line.partition("=")[::2] for line in lines)


def shell_command(text):
    """The arguments of the one `polarmask` command in a shell script."""
    words = shlex.split(text.replace("\\\n", " "), comments=True)
    begin = [i for i, word in enumerate(words) if word == "polarmask"]
    assert len(begin) == 1
    words = words[begin[0] + 1 :]
    return words[: words.index("&")] if "&" in words else words


# Each recipe: its arguments for polarmask, and how many GPUs train.
RECIPES = {
    "slurm.sbatch": lambda: (
        shell_command(SBATCH.read_text()),
        int(sbatch_options()["nodes"]) * int(sbatch_options()["gpus-per-node"]),
    ),
    "job.yaml": lambda: (shell_command(container("job.yaml")["args"][0]), gpus("job.yaml")),
    "tfjob.yaml": lambda: (container("tfjob.yaml")["command"][1:], gpus("tfjob.yaml")),
}


def container(name):
    (container,) = pod(name)[0]["containers"]
    return container


def gpus(name):
    return pod(name)[1] * container(name)["resources"]["limits"]["nvidia.com/gpu"]


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_command_is_accepted_and_its_batch_fits_the_gpus(recipe):
    words, gpus = RECIPES[recipe]()
    args = cli.parser().parse_args(words)
    assert args.command == "train" and args.strategy == "multi_worker" and not args.devices
    assert config.load(args.config, args.set).data.batch % gpus == 0


def test_the_sbatch_file_is_bash_and_asks_for_one_task_on_each_of_several_nodes():
    text = SBATCH.read_text()
    assert subprocess.run(["bash", "-n", SBATCH]).returncode == 0
    # Slurm reads no option after the first command, and none with a blank or a comment behind it.
    options = [i for i, line in enumerate(text.splitlines()) if line.startswith("#SBATCH")]
    first = next(i for i, line in enumerate(text.splitlines()) if line and not line.startswith("#"))
    assert text.startswith("#!") and max(options) < first and len(options) == len(sbatch_options())
    assert int(sbatch_options()["nodes"]) > 1 and sbatch_options()["ntasks-per-node"] == "1"


def slurm(folder, srun, **environment):
    """Starts the sbatch file with a stand-in for Slurm's srun, and one for scontrol that notes what it is given."""
    tools = folder / ".venv" / "bin"
    tools.mkdir(parents=True)
    for name, text in {
        "srun": srun,
        "scontrol": f'echo "$*" >> {folder / "scontrol"}\n',
        "sleep": "exec /bin/sleep 0.1",
    }.items():
        (tools / name).write_text(f"#!/bin/bash\n{text}")
        (tools / name).chmod(0o755)
    environment |= {"SLURM_SUBMIT_DIR": str(folder), "SLURM_CPUS_PER_TASK": "32", "SLURM_JOB_ID": "77"}
    return subprocess.Popen(["bash", SBATCH], env={**os.environ, **environment}, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.mark.parametrize("failures, status, starts", [(0, 0, 1), (2, 0, 3), (3, 1, 3)])
def test_the_sbatch_file_starts_all_again_when_they_fail(tmp_path, failures, status, starts):
    log = tmp_path / "log"
    job = slurm(tmp_path, f'echo "$SRUN_CPUS_PER_TASK $*" >> {log}\n[ "$(wc -l < {log})" -gt {failures} ]\n')
    job.communicate(timeout=60)
    lines = log.read_text().splitlines()
    assert job.returncode == status and len(lines) == starts and not (tmp_path / "scontrol").exists()
    assert all(line.startswith("32 --kill-on-bad-exit=1 polarmask train ") for line in lines)


@pytest.mark.parametrize("slow", [None, "srun=$!", "tell", "wait"])
def test_the_sbatch_file_puts_a_job_whose_time_is_up_back_into_the_queue(tmp_path, slow):
    """When the tasks, which get the signal too, have saved and ended: not before. Wherever the signal comes."""
    log, pause, environment = tmp_path / "log", tmp_path / "pause", {}
    if slow:  # bash stops for a moment before that command
        pause.write_text("trap '[[ $BASH_COMMAND != \"$SLOW\"* ]] || /bin/sleep 0.5' DEBUG\n")
        environment = {"BASH_ENV": str(pause), "SLOW": slow}
    srun = f'trap "/bin/sleep 1; echo saved >> {log}; exit 143" TERM\necho started >> {log}\nwhile :; do sleep 0.1; done\n'
    job = slurm(tmp_path, srun, **environment)
    while not log.exists():
        assert job.poll() is None
    job.send_signal(signal.SIGTERM)  # as `--signal=B:TERM@...` has it: to this script alone
    job.communicate(timeout=60)
    assert job.returncode == 0 and log.read_text() == "started\nsaved\n"
    assert (tmp_path / "scontrol").read_text() == "requeue 77\n"
    signalled, seconds = sbatch_options()["signal"].split("@")
    assert signalled == "B:TERM" and int(seconds) >= 60 and "requeue" in sbatch_options()


@pytest.mark.parametrize("index", [0, 1])
def test_the_job_builds_the_tf_config_of_each_pod(tmp_path, index):
    tool = tmp_path / "polarmask"
    tool.write_text('#!/bin/bash\nprintf %s "$TF_CONFIG"\n')
    tool.chmod(0o755)
    command = [*container("job.yaml")["command"], *container("job.yaml")["args"]]
    environment = {entry["name"]: entry["value"] for entry in container("job.yaml")["env"]}
    assert not any(f"$({name})" in word for name in environment for word in command)  # Kubernetes would replace these
    environment |= {"PATH": f"{tmp_path}:{os.environ['PATH']}", "JOB_COMPLETION_INDEX": str(index)}
    end = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert end.returncode == 0, end.stderr
    cluster = distribution.parse_tf_config(end.stdout)

    service, job = documents("job.yaml")
    (port,) = service["spec"]["ports"]
    name, domain = job["metadata"]["name"], service["metadata"]["name"]
    assert cluster.addresses == tuple(f"{name}-{i}.{domain}:{port['port']}" for i in range(pod("job.yaml")[1]))
    assert cluster.index == index


def test_the_job_and_its_service_agree():
    service, job = documents("job.yaml")
    spec = job["spec"]
    assert (service["apiVersion"], service["kind"], job["apiVersion"], job["kind"]) == ("v1", "Service", "batch/v1", "Job")
    assert service["spec"]["clusterIP"] == "None" and service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    assert spec["template"]["spec"]["subdomain"] == service["metadata"]["name"]
    assert spec["completionMode"] == "Indexed" and spec["completions"] == spec["parallelism"] > 1
    assert {entry["name"]: entry["value"] for entry in container("job.yaml")["env"]} == {"WORKERS": str(spec["parallelism"])}
    assert container("job.yaml")["ports"] == [{"containerPort": service["spec"]["ports"][0]["port"]}]
    # All start again as often as the job allows: a loss ends every pod.
    assert spec["template"]["spec"]["restartPolicy"] == "OnFailure" and spec["backoffLimit"] >= 3 * spec["parallelism"]


def test_the_tfjob_is_as_the_operator_wants_it():
    (job,) = documents("tfjob.yaml")
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "TFJob")
    assert set(job["spec"]["tfReplicaSpecs"]) == {"Worker"} and pod("tfjob.yaml")[1] > 1  # neither PS nor Evaluator
    assert job["spec"]["tfReplicaSpecs"]["Worker"]["restartPolicy"] == "OnFailure"
    assert container("tfjob.yaml")["name"] == "tensorflow"
    assert container("tfjob.yaml")["ports"] == [{"name": "tfjob-port", "containerPort": 2222}]


@pytest.mark.parametrize("name", ["job.yaml", "tfjob.yaml"])
def test_a_pod_that_is_moved_has_time_to_save(name):
    assert pod(name)[0]["terminationGracePeriodSeconds"] >= 60  # Kubernetes' own 30 s may be less than a step and a save
    command = container(name).get("args", container(name)["command"])
    # The training itself gets the signal, not a shell that keeps it.
    assert command[0] == "polarmask" or command[0].splitlines()[-2].startswith("exec polarmask ")


@pytest.mark.parametrize("name", ["job.yaml", "tfjob.yaml"])
def test_data_and_runs_are_on_the_shared_volume(name):
    (claim,) = documents("volume.yaml")
    assert claim["kind"] == "PersistentVolumeClaim" and claim["spec"]["accessModes"] == ["ReadWriteMany"]
    volumes = {volume["name"]: volume for volume in pod(name)[0]["volumes"]}
    mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in container(name)["volumeMounts"]}
    shared = [
        path
        for path, volume in mounts.items()
        if volume.get("persistentVolumeClaim") == {"claimName": claim["metadata"]["name"]}
    ]
    args = cli.parser().parse_args(RECIPES[name]()[0])
    assert len(shared) == 1 and all(str(path).startswith(f"{shared[0]}/") for path in (args.data, args.out))
    assert mounts["/dev/shm"]["emptyDir"] == {"medium": "Memory"}
    assert container("job.yaml")["image"] == container("tfjob.yaml")["image"]
