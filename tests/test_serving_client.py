"""exports/serving: the client against a server that answers as TF Serving does, and what docker-compose.yml says."""

import base64
import importlib.util
import json
import re
import subprocess
import sys
import threading
import time
import types
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from helpers.exports import RADIUS, expected_scale, spot
from helpers.serving import BAD, METADATA, OK, answer, encoded, hostile, make_model, scripted, sends

SERVING = Path(__file__).resolve().parents[1] / "exports/serving"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """(name, "host:port" of REST, "host:port" of gRPC) of a served model."""
    from helpers import serving_server

    with serving_server.serve(make_model(tmp_path_factory.mktemp("served"))) as addresses:
        yield addresses


@pytest.fixture(scope="module")
def client():
    spec = importlib.util.spec_from_file_location("serving_client", SERVING / "client.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


GOOD = {  # name -> (image, kind, mode): where the bright square lies, the hexagons are
    "a.png": ((64, 96, 10, 20, 1), "PNG", "RGB"),
    "b.png": ((128, 80, 30, 70, 4), "PNG", "L"),
    "c.bmp": ((32, 40, 20, 12, 1), "BMP", "RGB"),
    "d.gif": ((64, 64, 40, 18, 1), "GIF", "P"),
}


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for name, (place, kind, mode) in GOOD.items():
        (folder / name).write_bytes(encoded(spot(*place), kind, mode))
    (folder / ".hidden").write_bytes(b"not sent")
    return folder


@pytest.mark.parametrize("way", ["rest", "grpc"])
def test_files_go_there_as_they_are_and_polygons_come_back(client, server, folder, tmp_path, capsys, way):
    name, rest, grpc = server
    for bad, content in BAD.items():
        (folder / bad).write_bytes(content)
    url = f"http://{rest if way == 'rest' else '127.0.0.1:9'}/v1/models/{name}"  # with --grpc, REST is not asked
    arguments = [url, str(folder), "--out", str(tmp_path / "out"), *(["--grpc", grpc] if way == "grpc" else [])]
    assert client.main(arguments) == 1
    results = {entry["file"]: entry for entry in json.loads((tmp_path / "out/results.json").read_text())}
    assert list(results) == sorted([*GOOD, *BAD])
    for file, ((height, width, x, y, size), _, _) in GOOD.items():
        large, small = results[file]["detections"]
        assert (results[file]["width"], results[file]["height"]) == (width, height)
        assert (large["class"], large["score"], small["class"], small["score"]) == ("moon", 0.9, "sun", 0.4)
        scale = np.array(expected_scale("letterbox", "", height, width))
        polygon = np.array(large["polygon"])
        center = polygon.mean(axis=0)
        angle = np.arange(6) * np.pi / 3
        around = RADIUS * np.stack([np.cos(angle), np.sin(angle)], axis=1) * scale
        np.testing.assert_allclose(polygon - center, around, atol=1e-3)
        assert (center > np.array([x, y]) - scale).all() and (center < np.array([x, y]) + scale + size).all()
        np.testing.assert_allclose(large["box"], [*polygon.min(0), *polygon.max(0)], atol=1e-3)
        with Image.open(tmp_path / "out" / f"{file}.png") as picture:
            assert picture.size == (width, height)
            drawn = np.asarray(picture).astype(int)
        assert (np.ptp(drawn, axis=2) > 30).sum() > 10  # the images are gray
    printed = capsys.readouterr().out
    for bad in BAD:
        assert set(results[bad]) == {"file", "error"}
        assert f"{bad}: {results[bad]['error']}" in printed
        assert "\n" not in results[bad]["error"] and "[[" not in results[bad]["error"]
    assert "400 x 400 pixels" in results["huge.png"]["error"] and "limit" in results["huge.png"]["error"]
    assert "4 of 8 files, 4 failed" in printed
    assert not list((tmp_path / "out").glob("*.part"))


def test_only_what_scores_enough_and_names_from_a_file(client, server, folder, tmp_path):
    url = f"http://{server[1]}/v1/models/{server[0]}"
    (tmp_path / "labels.txt").write_text("Sonne\nMond\n")
    (tmp_path / "metadata.json").write_text(json.dumps({"classes": [{"name": "soleil"}, {"name": "lune"}]}))
    for labels, score, expected in (("labels.txt", 0.5, ["Mond"]), ("metadata.json", 0.1, ["lune", "soleil"])):
        options = ["--out", str(tmp_path), "--score", str(score), "--labels", str(tmp_path / labels)]
        assert client.main([url, str(folder / "a.png"), *options]) == 0
        found = json.loads((tmp_path / "results.json").read_text())[0]["detections"]
        assert [one["class"] for one in found] == expected


def test_the_client_needs_no_tensorflow(server, folder, tmp_path):
    code = (
        "import runpy, sys; sys.argv[0:1] = []"
        "\ntry: runpy.run_path(sys.argv[0], run_name='__main__')\nexcept SystemExit as e: assert not e.code, e.code"
        "\nassert not {'tensorflow', 'polarmask_tf', 'requests', 'grpc'} & set(sys.modules)"
    )
    arguments = [str(SERVING / "client.py"), f"http://{server[1]}/v1/models/{server[0]}", str(folder / "a.png")]
    done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "found/a.png.png").exists()


@pytest.mark.parametrize("busy", [(503, {"error": "full"}, 0), (429, b"?", 0), (504, b"", 0), (200, answer(), 1.5)])
def test_a_busy_server_is_asked_again(client, folder, tmp_path, monkeypatch, busy):
    waits = []
    monkeypatch.setattr(client, "time", types.SimpleNamespace(sleep=waits.append, monotonic=time.monotonic))
    with scripted(METADATA, busy, busy, (200, answer(), 0)) as (address, asked):
        options = ["--out", str(tmp_path), "--timeout", "0.5"]
        assert client.main([f"http://{address}/v1/models/x", str(folder / "a.png"), *options]) == 0
    assert len(asked) == 4 and waits == [0.5, 1.0]
    sent = base64.b64decode(asked[1][1]["inputs"]["image_bytes"][0]["b64"])
    assert asked[1][0] == "/v1/models/x:predict" and sent == (folder / "a.png").read_bytes()


def test_what_stays_busy_fails_and_what_is_refused_is_not_asked_again(client, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(client, "time", types.SimpleNamespace(sleep=lambda seconds: None, monotonic=time.monotonic))
    url, options = "http://{}/v1/models/x", [str(folder / "a.png"), "--out", str(tmp_path), "--retries", "2"]
    for status, body, times in ((503, {"error": "full"}, 3), (400, {"error": "no\n\t [[{{node x}}]]"}, 1), (500, b"", 1)):
        with scripted(METADATA, (status, body, 0)) as (address, asked):
            assert client.main([url.format(address), *options]) == 1
        assert len(asked) == 1 + times
    printed = capsys.readouterr().out
    assert "a.png: full\n" in printed and "a.png: no\n" in printed and "a.png: HTTP 500" in printed


@pytest.mark.parametrize("reply", [b"<html>", {"outputs": {"other": [1]}}, [], answer(num_detections=[7]), {"outputs": None}])
def test_an_answer_of_something_else_is_an_error_of_that_file(client, folder, tmp_path, reply):
    with scripted(METADATA, (200, reply, 0), (200, answer(), 0)) as (address, _):
        options = ["--out", str(tmp_path), "--concurrency", "1"]
        assert client.main([f"http://{address}/v1/models/x", str(folder), *options]) == 1
    assert ["error" in entry for entry in json.loads((tmp_path / "results.json").read_text())] == [True, False, False, False]


def test_files_are_sent_at_the_same_time(client, folder, tmp_path):
    together = threading.Barrier(4)
    real = client.patiently

    def patiently(ask, retries, signature, *question):
        if signature == "serving_default":
            together.wait(10)  # passes only if four are here
        return real(ask, retries, signature, *question)

    with scripted(METADATA, (200, answer(), 0)) as (address, _), pytest.MonkeyPatch.context() as patch:
        patch.setattr(client, "patiently", patiently)
        options = ["--out", str(tmp_path), "--concurrency", "4"]
        assert client.main([f"http://{address}/v1/models/x", str(folder), *options]) == 0


@pytest.mark.parametrize(
    "serve, expected",
    [
        (sends(b"", b" ", 0.05), "no answer in 0.3 s"),
        (sends(OK + b"\r\n", b"1", 0.05), "no answer in 0.3 s"),
        (sends(OK + b"Content-Length: 1000\r\n\r\n", b"1", 0.05), "no answer in 0.3 s"),
        (sends(OK + b"\r\n", b"1" * 0x10000), "larger than 4,194,304 bytes"),
        (sends(OK + b"Content-Length: 1000000000000\r\n\r\n", b"1" * 0x10000), "larger than 4,194,304 bytes"),
    ],
)
def test_a_server_that_never_ends_is_left(client, folder, tmp_path, monkeypatch, capsys, serve, expected):
    monkeypatch.setattr(client, "LIMIT", 2**22)
    options = ["--out", str(tmp_path), "--retries", "0", "--timeout", "10" if "larger" in expected else "0.3"]
    with hostile(serve) as address:
        assert client.main([f"http://{address}/v1/models/x", str(folder / "a.png"), *options]) == 2
    error = capsys.readouterr().err
    assert expected in error and error.startswith("error: ") and error.count("\n") == 1


def test_no_server_no_model_no_files(client, server, folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(client, "time", types.SimpleNamespace(sleep=lambda seconds: None, monotonic=time.monotonic))
    name, rest, grpc = server
    url, image = f"http://{rest}/v1/models/{name}", str(folder / "a.png")
    (tmp_path / "none").mkdir()
    for arguments, message in (
        (["http://127.0.0.1:9/v1/models/x", image], "http://127.0.0.1:9/v1/models/x: cannot be reached"),
        ([f"http://{rest}/v1/models/other", image], "Servable not found for request: Latest(other)"),
        ([f"http://{rest}/v1/models/other", image, "--grpc", grpc], "Servable not found for request: Latest(other)"),
        ([url, image, "--grpc", "127.0.0.1:9"], "127.0.0.1:9: "),
        ([f"http://{rest}", image], "must look like http://HOST:8501/v1/models/NAME"),
        ([url, str(tmp_path / "nowhere.jpg")], "no such file"),
        ([url, str(tmp_path / "none")], "no such file, or no files in it"),
        ([url, image, "--labels", str(tmp_path / "nowhere.txt")], "nowhere.txt"),
    ):
        assert client.main([*arguments, "--out", str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert not (tmp_path / "out/results.json").exists()


@pytest.mark.parametrize("words", ["--concurrency 0", "--score nan", "--score 50", "--timeout -1", "--retries 1000"])
def test_numbers_that_cannot_be_are_refused(client, folder, tmp_path, capsys, words):
    arguments = ["http://127.0.0.1:9/v1/models/x", str(folder / "a.png"), "--out", str(tmp_path / "out"), *words.split()]
    assert client.main(arguments) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith(f"error: {words}: a number from ") and not (tmp_path / "out").exists()


def test_the_test_server_speaks_as_tf_serving_does(server):
    """Rows and columns, status, metadata and errors, as TF Serving's documentation and sources have them."""
    name, rest, _ = server

    def ask(path, body=None):
        try:
            with urllib.request.urlopen(f"http://{rest}/v1/models/{path}", body and json.dumps(body).encode()) as reply:
                return reply.status, json.loads(reply.read())
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())["error"]

    image = {"b64": base64.b64encode(encoded(spot(20, 30, 5, 5, 1))).decode()}
    rows = ask(f"{name}:predict", {"instances": [image, image]})[1]["predictions"]
    assert len(rows) == 2 and rows[0] == rows[1] and rows[0]["num_detections"] == 2 and len(rows[0]["detection_boxes"]) == 3
    named = ask(f"{name}/versions/1:predict", {"instances": [{"image_bytes": image}], "signature_name": "serving_default"})
    assert named[1]["predictions"] == rows[:1]
    columns = ask(f"{name}:predict", {"inputs": {"image_bytes": [image, image]}})[1]["outputs"]
    assert columns["num_detections"] == [2, 2] and columns["detection_boxes"][1] == rows[1]["detection_boxes"]
    pixels = spot(20, 30, 5, 5, 1).tolist()
    assert ask(f"{name}:predict", {"signature_name": "images", "inputs": [pixels]})[1]["outputs"]["num_detections"] == [2]
    assert ask(name)[1]["model_version_status"] == [
        {"version": "1", "state": "AVAILABLE", "status": {"error_code": "OK", "error_message": ""}}
    ]
    described = ask(f"{name}/metadata")[1]
    assert described["model_spec"] == {"name": name, "signature_name": "", "version": "1"}
    inputs = described["metadata"]["signature_def"]["signature_def"]["serving_default"]["inputs"]
    assert inputs["image_bytes"]["dtype"] == "DT_STRING"
    for path, body, status, message in (
        (f"{name}:predict", {"instances": [{"b64": "%"}]}, 400, "Unable to base64 decode"),
        (f"{name}:predict", {"instances": []}, 400, "No values in 'instances'"),
        (f"{name}:predict", {"instances": [[image], [image, image]]}, 400, ""),
        (f"{name}:predict", {"instances": [{"b64": "aGVsbG8="}]}, 400, "not an image"),
        (f"{name}:predict", {"instances": [image], "inputs": [image]}, 400, "'inputs' or 'instances'"),
        (f"{name}:predict", {"inputs": {"other": [image]}}, 400, "Missing named input: image_bytes"),
        (f"{name}:predict", {"inputs": [image], "signature_name": "x"}, 400, 'Serving signature name: "x" not found'),
        (f"{name}:predict", [1], 400, "Is not object"),
        (f"{name}/versions/2:predict", {"inputs": [image]}, 404, f"Servable not found for request: Specific({name}, 2)"),
        ("other", None, 404, "Could not find any versions of model other"),
        (f"{name}:predict", None, 400, "Malformed request: GET /v1/models/"),
    ):
        code, error = ask(path, body)
        assert (code, message in error) == (status, True), (path, body, error)


def services():
    text = (SERVING / "docker-compose.yml").read_text()
    return yaml.safe_load(text)["services"]


def test_compose_serves_what_the_client_asks(client):
    help_text = client.__doc__ + (SERVING / "README.md").read_text()
    for name, service in services().items():
        assert service["image"] == "tensorflow/serving:2.20.0"
        assert sorted(port.rsplit(":", 2)[1:] for port in service["ports"]) == [["8500", "8500"], ["8501", "8501"]]
        assert all(port.startswith("${BIND:-127.0.0.1}:") for port in service["ports"])
        default = re.fullmatch(r"\$\{MODEL_NAME:-(\w+)\}", service["environment"]["MODEL_NAME"])[1]
        assert f"http://localhost:8501/v1/models/{default} " in help_text and "--grpc localhost:8500" in help_text
        mounts = [v for v in service["volumes"] if isinstance(v, dict)]
        assert [(m["target"], m["read_only"]) for m in mounts] == [(f"/models/${{MODEL_NAME:-{default}}}", True)]
        assert service["read_only"] and service["restart"] == "unless-stopped" and service["user"] != "0"
        assert set(service["deploy"]["resources"]["limits"]) == {"cpus", "memory"}
        batched = "--enable_batching" in service["command"]
        assert batched == (name == "polarmask-batching") == ("profiles" in service)
        flags = dict(flag.lstrip("-").split("=") for flag in service["command"] if "=" in flag)
        assert flags["tensorflow_intra_op_parallelism"] == service["deploy"]["resources"]["limits"]["cpus"]
        assert batched == ("batching_parameters_file" in flags)
        if batched:
            source, target, mode = service["volumes"][1].split(":")
            assert (target, mode) == (flags["batching_parameters_file"], "ro")
            lines = [line for line in (SERVING / source).read_text().splitlines() if line and line[0] != "#"]
            assert {re.fullmatch(r"(\w+) \{ value: \d+ \}", line)[1] for line in lines} == {
                "max_batch_size",
                "batch_timeout_micros",
                "max_enqueued_batches",
                "num_batch_threads",
            }


def test_composes_health_check_tells_a_served_model(server):
    name, rest, _ = server
    for service in services().values():
        command = [part.replace("8501", rest.split(":")[1]).replace("$$", "$") for part in service["healthcheck"]["test"]]
        assert command[:3] == ["CMD", "bash", "-c"]
        for model, healthy in ((name, True), ("other", False)):
            done = subprocess.run(command[1:], env={"MODEL_NAME": model, "PATH": "/usr/bin:/bin"}, timeout=20, check=False)
            assert (done.returncode == 0) == healthy
        command[3] = command[3].replace(rest.split(":")[1], "9")
        assert subprocess.run(command[1:], env={"MODEL_NAME": name}, capture_output=True, check=False).returncode != 0
