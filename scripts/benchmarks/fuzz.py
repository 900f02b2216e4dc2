"""Broken and hostile inputs by the thousand, in child processes: what is not taken must be refused in one line.

    python scripts/benchmarks/fuzz.py --count 10000 --seed 0 --out out/fuzz       all kinds, a tenth to those of TensorFlow
    python scripts/benchmarks/fuzz.py --count 200 --kinds yaml,coco              some
    python scripts/benchmarks/fuzz.py --again out/fuzz/failures/coco-17          one again, its traceback on the terminal

Inputs are mutations of small valid ones that are made here. A child process takes one after the other and is restarted
when it dies; it gets 2 GB of address space over what it holds after a valid input, and 20 s for each. Failures are:
a signal, an exception other than a refusal, more than 20 s, a refusal of more than one line or with control characters.
Each is stored in OUT/failures with what was said. Exit code 1 if there are any, or if a valid input is refused.
"""

import argparse
import collections
import json
import os
import random
import resource
import select
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

import fuzz_data
import fuzz_formats
import fuzz_kind
import fuzz_models
import fuzz_runs
import fuzz_weights

KINDS = {**fuzz_data.KINDS, **fuzz_formats.KINDS, **fuzz_models.KINDS, **fuzz_runs.KINDS, **fuzz_weights.KINDS}
SECONDS = 20  # an input
MEMORY = 2 << 30  # bytes over what the child holds after a valid input
FAILURES = ("signal", "traceback", "time-out", "several lines")


class Child:
    """A process that answers one input after the other, each in at most `seconds`."""

    def __init__(self, kind, out, seconds=SECONDS):
        self.kind, self.out, self.seconds, self.process = kind, out, seconds, None

    def ask(self, data):
        """{"outcome", "text", "seconds", "megabytes"} of an input."""
        if self.process is None:
            self._start()
        began = time.monotonic()
        try:
            self.process.stdin.write(struct.pack("<Q", len(data)) + data)
            self.process.stdin.flush()
            answer = self._read(self.seconds)
        except (BrokenPipeError, EOFError):
            answer = {"outcome": "signal", "text": self._end()}
        except TimeoutError:
            self._end()
            answer = {"outcome": "time-out", "text": f"no answer in {self.seconds} s"}
        return {"megabytes": 0, "seconds": time.monotonic() - began, **answer}

    def _start(self):
        command = [sys.executable, __file__, "--child", self.kind, "--out", str(self.out)]
        log = open(self.out / f"{self.kind}.log", "ab")  # noqa: SIM115, the child keeps it
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log)
        log.close()
        try:
            self._read(300)  # it imports, and takes a valid input
        except (EOFError, TimeoutError):
            sys.exit(f"{self.kind}: the child process does not start: {self._end()}")

    def _read(self, seconds):
        if not select.select([self.process.stdout], [], [], seconds)[0]:
            raise TimeoutError
        line = self.process.stdout.readline()
        if not line:
            raise EOFError
        return json.loads(line)

    def _end(self):
        self.process.kill()
        code = self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()
        self.process = None
        name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return f"{name}; see {self.kind}.log"

    def close(self):
        if self.process:
            self._end()


def serve(name, out):
    """The child: inputs of one kind from stdin, length first; outcomes to what was stdout, as lines of JSON."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries may print
    kind = KINDS.get(name, fuzz_kind.SELF)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        run = kind.prepare(folder, out)
        for data in kind.seeds(out)[:3]:
            print(json.dumps(outcome(run, data)), file=sys.stderr, flush=True)
        holds = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (holds + MEMORY, resource.RLIM_INFINITY))
        print("{}", file=answers, flush=True)
        while header := sys.stdin.buffer.read(8):
            data = sys.stdin.buffer.read(struct.unpack("<Q", header)[0])
            print(json.dumps(outcome(run, data)), file=answers, flush=True)


def outcome(run, data):
    """Of one input, in this process: taken, refused, several lines or traceback."""
    before, began = _peak(), time.monotonic()
    try:
        run(data)
        kind, text = "taken", ""
    except fuzz_kind.Refusal as error:
        text = str(error)
        kind = "refused" if text and text.isprintable() else "several lines"
    except Exception:
        kind, text = "traceback", traceback.format_exc()
    grown = (_peak() - before) >> 20
    return {"outcome": kind, "text": text[-20_000:], "seconds": time.monotonic() - began, "megabytes": grown}


def _peak():
    """The most bytes that were resident since the last call."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    return int(lines["VmHWM"].split()[0]) << 10


def fuzz(name, count, seed, out):
    """Counter of outcomes of one kind, its slowest input and the most memory one took, and what was said of failures."""
    kind, child = KINDS[name], Child(name, out)
    seeds = kind.seeds(out)
    counts, slowest, most, said = collections.Counter(), 0.0, 0, collections.Counter()
    for number in range(-len(seeds), count):
        # Each input depends on seed, kind and number alone; the valid ones come first.
        rng = random.Random(f"{seed} {name} {number}")
        data = seeds[number] if number < 0 else kind.mutate(rng, rng.choice(seeds))
        answer = child.ask(data)
        if number < 0 and answer["outcome"] != "taken":
            print(f"{name}: a valid input is not taken: {answer['text'].splitlines()[-1:]}")
            counts["valid"] += 1
        if number >= 0:
            counts[answer["outcome"]] += 1
            slowest, most = max(slowest, answer["seconds"]), max(most, answer["megabytes"])
        if answer["outcome"] in FAILURES:
            folder = out / "failures"
            folder.mkdir(exist_ok=True)
            (folder / f"{name}-{number}").write_bytes(data)
            (folder / f"{name}-{number}.txt").write_text(f"{answer['outcome']}\n{answer['text']}\n", errors="backslashreplace")
            said[f"{answer['outcome']}: {_where(answer)}"] += 1
    child.close()
    return counts, slowest, most, said


def _where(answer):
    """The last line of a traceback and the last place in the package that it went through."""
    lines = answer["text"].strip().splitlines() or [""]
    if answer["outcome"] != "traceback":
        return ascii(answer["text"])[1:-1][:120]
    frames = [line.split('"')[1:] for line in lines if line.startswith("  File ")]
    mine = [f"{Path(file).name}{rest.replace(', line ', ':')}" for file, rest in frames if "polarmask_tf" in file]
    return f"{ascii(lines[-1])[1:-1][:100]} ({mine[-1] if mine else 'outside'})"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=1000, help="inputs, over all kinds (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", help=f"of {', '.join(KINDS)} (default: all)")
    parser.add_argument("--out", type=Path, default=Path("out/fuzz"), help="default %(default)s")
    parser.add_argument("--again", type=Path, metavar="FILE", help="a stored input: take it in this process")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.child:
        return serve(args.child, args.out)
    if args.again:
        kind = KINDS[args.again.name.split("-")[0]]
        with tempfile.TemporaryDirectory() as folder:
            answer = outcome(kind.prepare(Path(folder), args.out), args.again.read_bytes())
        print("\n".join(f"{key}: {value}" for key, value in answer.items()))
        return 0
    kinds = args.kinds.split(",") if args.kinds else list(KINDS)
    if unknown := set(kinds) - set(KINDS):
        parser.error(f"no kind {sorted(unknown)[0]}; there are {', '.join(KINDS)}")
    heavy = [name for name in kinds if KINDS[name].tensorflow]
    light = [name for name in kinds if name not in heavy]
    shutil.rmtree(args.out / "failures", ignore_errors=True)
    columns = ("taken", "refused", *FAILURES)
    print(f"{'kind':<10} {'inputs':>7}  " + "  ".join(columns) + "  slowest s  most MB")
    said, failed = {}, False
    for group, share in ((light, 0.9 if heavy else 1.0), (heavy, 0.1 if light else 1.0)):
        for name in group:
            count = round(args.count * share / len(group))
            counts, slowest, most, said[name] = fuzz(name, count, args.seed, args.out)
            cells = "  ".join(f"{counts[column]:>{len(column)}}" for column in columns)
            print(f"{name:<10} {count:>7}  {cells}  {slowest:>9.1f}  {most:>7}", flush=True)
            failed |= bool(counts["valid"] or said[name])
    for name, texts in said.items():
        for text, number in texts.most_common():
            print(f"{name}: {number} x {text}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
