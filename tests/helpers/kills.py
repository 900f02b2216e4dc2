"""Kills a training at random moments, starts it again with the same command until it is done, and compares with one that
was left alone. The tests kill a few times; `scripts/benchmarks/soak_training N` kills N times."""

import argparse
import csv
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from helpers import training
from polarmask_tf import cli
from polarmask_tf.weights import runs

# Everything that a checkpoint has to bring back: Adam's moments, averages, BatchNorm's statistics, the place in the data.
# Evaluations come with checkpoints and between them; an epoch, 25 images of 4 a step, ends within a step.
SETTINGS = (
    *training.QUALITY,
    "model.refine_channels=8",
    "train.deterministic=true",
    "train.ema=0.9",
    "model.backbone.norm=sync",
    "data.flip=both",
    "data.scale=[0.8,1.2]",
    "data.shuffle=10",
    "train.steps=60",
    "train.checkpoint_every=3",
    "train.evaluate_every=10",
)
STEPS, EVERY = 60, 3
# Seconds that may pass between what a kill waits for and the kill: about what a start, some steps, a checkpoint and an
# evaluation take. Where they take less, the next checkpoint but one is the end of it: so a training of 20 checkpoints has
# room for several kills however fast the machine is, and one that comes too late finds a training that has ended.
MOMENTS = {"start-up": 12.0, "steps": 0.3, "checkpoint": 0.03, "evaluation": 4.0, "end": 0.3}
A_ROUND = ("start-up",) * 3 + ("steps",) * 3 + ("checkpoint",) * 2 + ("evaluation",) * 2
LIMIT = 600  # seconds after which a start that neither ends nor comes to its moment has hung


def make_data(folder: Path) -> Path:
    """Converted train/ and val/ of a few small pictures."""
    assert cli.main(["shapes", str(folder / "shapes"), "--train", "25", "--val", "5", "--size", "64"]) == 0
    for split in ("train", "val"):
        source = (folder / "shapes" / split / "annotations.json", folder / "shapes" / split / "images")
        words = ["convert", *source, folder / split, "--processes", "1", "--shards", "3"]
        assert cli.main([str(word) for word in words]) == 0
    return folder


def command(data: Path, run: Path, *settings: str) -> list[str]:
    return training.command(
        data / "train", run, *SETTINGS, f"data.val={data / 'val'}", *settings, arguments=("--strategy", "none")
    )


def start(words: list[str], log: Path, **environment: str) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", **environment}
    with open(log, "wb") as file:  # and no pipe, which would have to be read meanwhile
        return subprocess.Popen(words, cwd=training.ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT)


def newest(run: Path) -> int:
    return runs.step_of(next(iter(runs.checkpoints(run)), None))


def kill(process: subprocess.Popen, kind: str, run: Path, log: Path, rng: random.Random, number=signal.SIGKILL) -> bool:
    """Sends a signal to the process at a random moment of a kind; False if it has ended before."""
    least = newest(run) + (rng.randrange(3) * EVERY if kind != "start-up" else 0)

    def reached():
        if kind == "checkpoint":
            writes = any((folder / "checkpoints" / runs.UNFINISHED).exists() for folder in (run, run / "best"))
            return writes and newest(run) >= least
        return newest(run) >= least and (kind != "evaluation" or b"evaluate:" in log.read_bytes())

    if kind == "steps":
        least += EVERY
    if kind == "end":
        least = STEPS
    end = time.monotonic() + LIMIT
    while process.poll() is None and not reached():
        assert time.monotonic() < end, f"{kind}: nothing happens, see {log}"
        time.sleep(0.001 if kind == "checkpoint" else 0.02)
    moment, last = time.monotonic() + rng.uniform(0, MOMENTS[kind]), newest(run) + 2 * EVERY
    while process.poll() is None and time.monotonic() < moment and newest(run) < last:
        time.sleep(0.001)
    process.send_signal(number)
    return process.wait(LIMIT) in (-number, 128 + number)  # the former also where SIGTERM comes before training begins


def round_of_kills(words: list[str], run: Path, rng: random.Random, kinds=A_ROUND, tell=lambda line: None) -> int:
    """Trains into `run` with a kill of each kind, in random order, one after the last checkpoint, and then to the end; returns
    how many kills it was: fewer where the training ended before."""
    kills, found = 0, 0
    for kind in (*rng.sample(kinds, len(kinds)), "end", None):
        log = run.with_name(f"{run.name}_{kills}.log")
        process = start(words, log)
        killed = kind is not None and kill(process, kind, run, log, rng)
        status = process.wait(LIMIT)
        text = log.read_text()
        assert "Traceback" not in text and "warning:" not in text, text
        said = re.search(r"(?:already trained for|going on after step) (\d+)", text)
        if said or not killed:  # a kill may come before it says so
            assert int(said[1] if said else 0) == found, f"step {found} was saved: {text}"
        if not killed:
            assert status == 0, text
            return kills
        kills, found = kills + 1, newest(run)
        left = " and an unfinished one" if (run / "checkpoints" / runs.UNFINISHED).exists() else ""
        tell(f"kill {kills}, {kind}: left the checkpoint of step {found}{left}")


def metrics(run: Path) -> list[dict]:
    with open(run / "metrics.csv") as file:
        return [{k: v for k, v in row.items() if k != "images_per_second"} for row in csv.DictReader(file)]


def files(run: Path) -> list[str]:
    return sorted(str(path.relative_to(run)) for path in run.rglob("*") if ".tfevents." not in path.name)


def differences(run: Path, other: Path, step: int = STEPS) -> list[str]:
    """What two finished trainings do not have in common, bit for bit; only how fast they were may differ."""
    found = [] if files(run) == files(other) else [f"files {files(run)} and {files(other)}"]
    if metrics(run) != metrics(other):
        found.append(f"metrics.csv {metrics(run)} and {metrics(other)}")
    best, theirs = (json.loads((each / "best" / "metrics.json").read_text()) for each in (run, other))
    if best != theirs:
        return [*found, f"best {best} and {theirs}"]
    for a, b, at in ((run, other, step), (run / "best", other / "best", best["step"])):
        a, b = ({name: (v.dtype, v.tobytes()) for name, v in training.weights(each, at).items()} for each in (a, b))
        found += [name for name in sorted(a | b) if a.get(name) != b.get(name)]
    return found


def several(words: list[str], run: Path, layout: str) -> list[tuple[subprocess.Popen, Path]]:
    """One training of two workers ("workers"), two into one directory ("rivals"), or one ("one"): processes and their logs."""
    tasks = training.cluster(2) if layout == "workers" else ["", ""] if layout == "rivals" else [""]
    logs = [run.with_name(f"{run.name}_{index}.log") for index in range(len(tasks))]
    return [(start(words, log, TF_CONFIG=task), log) for task, log in zip(tasks, logs, strict=True)]


def round_of_signals(words: list[str], run: Path, rng: random.Random, kinds, number: int, layout: str, tell) -> int:
    """As round_of_kills: a signal to any of the processes, which all must end, and be told why in at most one line each."""
    signals = 0
    for kind in (*kinds, None):
        found, processes = newest(run), several(words, run, layout)
        victim, _ = rng.choice(processes)
        sent = kind is not None and kill(victim, kind, run, processes[0][1], rng, number)
        ends = [(process.wait(LIMIT), log.read_text()) for process, log in processes]
        text = "".join(text for _, text in ends)
        assert "Traceback" not in text and "cannot be read" not in text, text
        reasons = ("in use by", "lost worker", "workers did not come")
        for line in (text for status, text in ends if status == 2):
            assert line.count("polarmask: error:") == 1 and any(reason in line for reason in reasons), line
        assert newest(run) >= found, f"step {found} was lost: {text}"
        if said := re.search(r"(?:already trained for|going on after step) (\d+)", text):
            assert int(said[1]) == found, f"step {found} was saved: {text}"
        if sent:
            signals += 1
            tell(f"signal {signals}, {kind}: statuses {[status for status, _ in ends]}, step {found} to {newest(run)}")
    assert newest(run) == STEPS and 0 in [status for status, _ in ends], text
    return signals


def soak(kills: int, folder: Path, seed: int, number: int, layout: str) -> int:
    data = make_data(folder)
    print(f"seed {seed}; the training that is left alone ...", flush=True)
    alone = folder / "alone"
    more = ("--strategy", "multi_worker", "--worker-timeout", "60") if layout == "workers" else ()  # the last one counts
    for process, log in several([*command(data, alone), *more], alone, "workers" if more else "one"):
        assert process.wait(LIMIT) == 0, log.read_text()
    rng, done, rounds, wrong = random.Random(seed), 0, 0, 0
    while done < kills:
        rounds += 1
        run = folder / f"run{rounds}"
        kinds = rng.sample(A_ROUND, len(A_ROUND))[: kills - done]
        tell = lambda line, n=rounds: print(f"training {n}, {line}", flush=True)  # noqa: E731
        if number == signal.SIGKILL and layout == "one":
            done += round_of_kills(command(data, run), run, rng, kinds, tell)
        else:
            done += round_of_signals([*command(data, run), *more], run, rng, kinds, number, layout, tell)
        differ = differences(run, alone)
        if number != signal.SIGKILL:  # which saved other steps too
            differ = [line for line in differ if not line.startswith("files ")]
        wrong += bool(differ)
        print(f"training {rounds}: " + (f"DIFFERS: {'; '.join(differ)[:2000]}" if differ else "equal, bit for bit"), flush=True)
    print(f"{done} signals, {rounds} trainings, {wrong} differ")
    return int(wrong > 0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kills", nargs="?", type=int, default=50)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    parser.add_argument("--signal", choices=("SIGKILL", "SIGTERM"), default="SIGKILL")
    parser.add_argument("--layout", choices=("one", "workers", "rivals"), default="one", help="rivals: two into one directory")
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="soak_training_"))
    status = soak(given.kills, folder, given.seed, signal.Signals[given.signal], given.layout)
    if status:
        print(f"what was found is in {folder}")
    else:
        shutil.rmtree(folder)
    sys.exit(status)
