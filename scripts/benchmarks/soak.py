"""Good and bad requests, mixed, from several clients at once over REST and gRPC; see scripts/benchmarks/soak.

Every answer must be what the SavedModel, opened in this process, says of the same request: the same numbers, or the same
refusal (HTTP 400, INVALID_ARGUMENT). The server is tests/helpers/serving_server.py in a process of its own, whose memory is
watched.
"""

import argparse
import collections
import io
import os
import random
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import tensorflow as tf
from PIL import Image

from polarmask_tf.inference import client

SERVER = Path(__file__).resolve().parents[2] / "tests/helpers/serving_server.py"
TOLERANCE = 1e-5  # of scores, and of coordinates relative to the image
GROWTH = 0.03  # of the server's memory from the second quarter of the time to the last
SIZES = [(1, 1), (1, 700), (64, 96), (97, 33), (240, 320), (480, 640), (333, 500), (700, 2)]


def make_model(folder):
    """The serving export of a small network with random weights."""
    from polarmask_tf import config as configs
    from polarmask_tf.export.serving import export_serving
    from polarmask_tf.modeling.polarmask import PolarMask

    config = configs.load("shapes", ["model.backbone.width=8", "postprocess.score_threshold=0.001"])
    model = PolarMask(config, 4)
    noise = np.random.default_rng(0)
    for variable in model.head.variables:
        variable.assign(variable + noise.normal(0, 0.1, variable.shape))
    export_serving(model, folder, name="polarmask")
    return folder / "polarmask"


def encode(image, kind, mode, **options):
    file = io.BytesIO()
    Image.fromarray(image).convert(mode).save(file, kind, **options)
    return file.getvalue()


def bomb(height, width):
    """A PNG of a few bytes whose header promises height x width pixels."""

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def make_requests(seed):
    """[(what it is, files of one batch, whether the answer must be good: True, False, or None for whatever the model says)]."""
    rng = np.random.default_rng(seed)

    def picture(height, width):
        coarse = rng.integers(0, 256, (6, 8, 3), np.uint8)
        return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))

    good = []
    for size in SIZES:
        good += [("JPEG", encode(picture(*size), "JPEG", "RGB")), ("PNG", encode(picture(*size), "PNG", "RGB"))]
    for what, kind, mode, options in (
        ("gray JPEG", "JPEG", "L", {}),
        ("gray PNG", "PNG", "L", {}),
        ("CMYK", "JPEG", "CMYK", {}),
        ("RGBA", "PNG", "RGBA", {}),
        ("palette", "PNG", "P", {}),
        ("GIF", "GIF", "P", {}),
        ("BMP", "BMP", "RGB", {}),
        ("progressive", "JPEG", "RGB", {"progressive": True}),
    ):
        good.append((what, encode(picture(120, 160), kind, mode, **options)))
    frames = [Image.fromarray(picture(80, 100)) for _ in range(3)]
    animation = io.BytesIO()
    frames[0].save(animation, "GIF", save_all=True, append_images=frames[1:])
    good.append(("animated GIF", animation.getvalue()))
    requests = [(what, [content], True) for what, content in good]

    jpeg = encode(picture(480, 640), "JPEG", "RGB")
    bad = [("empty", b""), ("text", b"no image"), ("bomb", bomb(20_000, 20_000)), ("wide bomb", bomb(1, 2**31 - 1))]
    bad += [("random bytes", rng.bytes(int(rng.integers(1, 5000)))) for _ in range(20)]
    whole = [(what, content) for what, content in good if len(content) > 2000 and "GIF" not in what]  # a GIF's start is one
    bad += [(f"truncated {what}", content[: len(content) // 2]) for what, content in whole]
    requests += [(what, [content], False) for what, content in bad]
    for start in range(0, len(good), 4):
        requests.append(("batch", [content for _, content in good[start : start + 4]], True))
        requests.append(("batch with a bad one", [good[start][1], bad[start % len(bad)][1]], False))
    for _ in range(150):  # bytes changed anywhere: some still are images
        fuzzed = bytearray(jpeg if rng.random() < 0.5 else good[int(rng.integers(len(good)))][1])
        for _ in range(int(rng.integers(1, 6))):
            fuzzed[int(rng.integers(len(fuzzed)))] = int(rng.integers(256))
        requests.append(("fuzzed", [bytes(fuzzed)], None))
    return requests


def make_references(directory, requests):
    """What the SavedModel says of each request: arrays by name, or None where it refuses. Exits if that is wrong already."""
    newest = max(directory.iterdir(), key=lambda path: int(path.name) if path.name.isdigit() else -1)
    model = tf.saved_model.load(str(newest))
    references = []
    for what, contents, must_be_good in requests:
        try:
            outputs = model.signatures["serving_default"](image_bytes=tf.constant(contents))
            references.append({name: value.numpy() for name, value in outputs.items()})
        except tf.errors.InvalidArgumentError:
            references.append(None)
        if must_be_good is not None and must_be_good != (references[-1] is not None):
            sys.exit(f"soak: the SavedModel {'refuses' if must_be_good else 'takes'} this one: {what}")
    return references


def over(url):
    """ask(files) -> arrays by name, or None for a refusal of bad input; anything else raises."""
    ask_once = client.asker(url)

    def ask(contents):
        try:
            outputs = ask_once("serving_default", "image_bytes", contents, 120)
        except client.Refused as error:
            if error.code in client.BAD_INPUT and str(error):
                return None
            raise
        return {name: np.asarray(value) for name, value in outputs.items()}

    return ask


def same(answer, reference):
    if answer is None or reference is None:
        return answer is reference
    return answer.keys() == reference.keys() and all(
        value.shape == reference[name].shape and np.allclose(value, reference[name], rtol=0, atol=TOLERANCE)
        for name, value in answer.items()
    )


def memory(process):
    """Megabytes that the process holds, or None if it has ended."""
    text = subprocess.run(["ps", "-o", "rss=", "-p", str(process.pid)], capture_output=True, text=True, check=False).stdout
    return int(text) / 1024 if process.poll() is None and text.strip() else None


def start(directory, log):
    """The server's process, the model's name, and the addresses of REST and gRPC; stderr goes to the file `log`."""
    command = [sys.executable, str(SERVER), str(directory), "--rest", "0", "--grpc", "0"]
    with open(log, "w") as errors:  # TensorFlow's JPEG decoder has a word for each damaged file
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
    line = process.stdout.readline().split()  # NAME at http://ADDRESS and grpc ADDRESS
    if len(line) != 6:
        sys.exit(f"soak: the server did not start\n{log.read_text()[-2000:]}")
    return process, line[0], line[2].removeprefix("http://"), line[5]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", type=Path, help="directory NAME that holds NAME/1 (default: made here)")
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--clients", type=int, default=8, help="half of them by REST, half by gRPC (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        directory = args.model or make_model(Path(folder))
        requests = make_requests(args.seed)
        references = make_references(directory, requests)
        log = Path(folder) / "server.log"
        process, name, rest, grpc_address = start(directory, log)
        try:
            status = soak(process, name, rest, grpc_address, requests, references, args)
            if process.poll() is not None:
                print(f"the server ended with {process.returncode}:\n{log.read_text()[-2000:]}")
            return status
        finally:
            process.terminate()
            process.wait()


def soak(process, name, rest, grpc_address, requests, references, args):
    kinds = collections.Counter("good" if reference else "bad" for reference in references)
    kinds = f"{kinds['good']} good and {kinds['bad']} bad"
    print(f"{len(requests)} different requests, {kinds}; {args.clients} clients", flush=True)
    counts, wrong, lock = collections.Counter(), [], threading.Lock()
    began, samples = time.monotonic(), []
    end = began + args.seconds

    def run(number):
        ask = over(f"grpc://{grpc_address}/{name}" if number % 2 else f"http://{rest}/v1/models/{name}")
        choice = random.Random(args.seed * 1000 + number)
        while time.monotonic() < end:
            index = choice.randrange(len(requests))
            what, contents, _ = requests[index]
            try:
                problem = None if same(ask(contents), references[index]) else "another answer"
            except Exception as error:
                problem = f"{type(error).__name__}: {error}"
            with lock:
                counts["refused" if references[index] is None else "answered"] += 1
                if problem:
                    wrong.append(f"request {index} ({what}): {problem}")

    threads = [threading.Thread(target=run, args=(number,), daemon=True) for number in range(args.clients)]
    for thread in threads:
        thread.start()
    shown = began
    while (now := time.monotonic()) < end:
        if (held := memory(process)) is None:
            wrong.append("the server's process has ended")
            break
        samples.append(held)
        if now >= shown:
            print(
                f"{now - began:5.0f} s  {held:6.0f} MB  {counts['answered']} answered, {counts['refused']} refused, "
                f"{len(wrong)} wrong",
                flush=True,
            )
            shown += max(5, args.seconds / 20)
        time.sleep(max(0.2, args.seconds / 400))
    for thread in threads:
        thread.join(120)
    quarter = len(samples) // 4
    before, after = statistics.median(samples[quarter : 2 * quarter]), statistics.median(samples[-quarter:])
    grown = after > before * (1 + GROWTH)
    for line in wrong[:20]:
        print(line)
    total = counts.total()
    memories = f"memory {before:.0f} MB in the second quarter, {after:.0f} MB in the last{' (grows)' if grown else ''}"
    print(
        f"soak: {'FAILED' if wrong or grown else 'passed'}: {total} requests in {time.monotonic() - began:.0f} s "
        f"({total / args.seconds:.0f}/s), {len(wrong)} wrong; {memories}"
    )
    return 1 if wrong or grown else 0


if __name__ == "__main__":
    sys.exit(main())
