"""Predictors of served models against the same SavedModel opened here, and against servers that misbehave."""

import json
import subprocess
import sys
import time
import tracemalloc
import types
from concurrent import futures

import numpy as np
import pytest
from PIL import Image

from helpers.exports import CLASSES, metadata, spot
from helpers.serving import MAX_PIXELS, METADATA, OK, answer, hostile, make_model, scripted, sends
from polarmask_tf.errors import InputError
from polarmask_tf.inference import client
from polarmask_tf.inference.evaluate import evaluate
from polarmask_tf.inference.predict import predict
from polarmask_tf.inference.predictor import load_predictor

IMAGE = spot(20, 30, 5, 5, 2)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """The served model's directory and its URLs, of REST and of gRPC."""
    from helpers import serving_server

    directory = make_model(tmp_path_factory.mktemp("served"))
    with serving_server.serve(directory) as (name, rest, grpc):
        yield directory, (f"http://{rest}/v1/models/{name}", f"grpc://{grpc}/{name}")


@pytest.fixture(autouse=True)
def hurry(monkeypatch):
    waits = []
    monkeypatch.setattr(client, "time", types.SimpleNamespace(sleep=waits.append, monotonic=time.monotonic))
    return waits


def assert_equal(ours, others):
    for one, other in zip(ours, others, strict=True):
        for field in ("scores", "classes", "boxes", "polygons"):
            np.testing.assert_array_equal(getattr(one, field), getattr(other, field))
            assert getattr(one, field).dtype == getattr(other, field).dtype


def test_served_equals_local(served):
    directory, urls = served
    local = load_predictor(directory / "1")
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (h, w, 3), np.uint8) for h, w in ((1, 1), (33, 47), (7, 300), (64, 96), (2, 3)) * 3]
    expected = local(images)
    assert len({found.polygons.tobytes() for found in expected}) > 5
    for url in urls:
        predictor = load_predictor(url)
        assert predictor.classes == local.classes == CLASSES
        assert predictor.input_size == local.input_size == (64, 96)
        assert predictor.kind == "served"
        assert_equal(predictor(images), expected)
        assert predictor([]) == []
        assert_equal(load_predictor(url, score_threshold=0.5)(images[:1]), [expected[0].above(0.5)])
        assert [len(found.scores) for found in load_predictor(url, max_detections=1)(images[:2])] == [1, 1]
        with pytest.raises(InputError, match="gives at most 100 detections, not 101"):
            load_predictor(url, max_detections=101)
        with pytest.raises(InputError, match="an image must be a uint8 array"):
            predictor([np.zeros((4, 4))])


def test_a_version_may_be_asked_for(served):
    url = served[1][0]
    assert_equal(load_predictor(f"{url}/versions/1/")([IMAGE]), load_predictor(url)([IMAGE]))
    with pytest.raises(InputError, match=r"Servable not found for request: Specific\(polarmask, 2\)"):
        load_predictor(f"{url}/versions/2")


def test_predict_and_evaluate_with_a_served_model(served, tmp_path):
    from polarmask_tf.data.convert import convert

    directory, urls = served
    (tmp_path / "images").mkdir()
    images, annotations = [], []
    for number, (x, y) in enumerate([(10, 10), (30, 20), (20, 5)], 1):
        Image.fromarray(spot(64, 96, x, y, 1)).save(tmp_path / f"images/{number}.png")
        images.append({"id": number, "file_name": f"{number}.png", "height": 64, "width": 96})
        ring = [x + 4, y, x + 4, y + 4, x - 4, y + 4, x - 4, y - 4]
        annotation = {"segmentation": [ring], "category_id": 3, "iscrowd": 0, "bbox": [x - 4, y - 4, 8, 8], "area": 48}
        annotations.append({**annotation, "id": number, "image_id": number})
    categories = [{"id": entry["category_id"], "name": entry["name"]} for entry in CLASSES]
    document = {"images": images, "annotations": annotations, "categories": categories}
    (tmp_path / "coco.json").write_text(json.dumps(document))
    convert(tmp_path / "coco.json", tmp_path / "images", tmp_path / "data", processes=1)
    local = evaluate(load_predictor(directory / "1"), tmp_path / "data", progress=False)
    assert local.values["AP50"] > 0
    for number, url in enumerate(urls):
        assert evaluate(load_predictor(url), tmp_path / "data", progress=False) == local
        done = predict(load_predictor(url), tmp_path / "images", tmp_path / f"out{number}", progress=False)
        assert (done["images"], done["detections"]) == (3, 6)
    assert (tmp_path / "out0/results.json").read_text() == (tmp_path / "out1/results.json").read_text()


def test_http_needs_no_tensorflow(served):
    code = (
        "import sys; from polarmask_tf.inference.predictor import load_predictor; import numpy as np"
        "\nfound, = load_predictor(sys.argv[1])([np.zeros((20, 30, 3), np.uint8)])"
        "\nassert len(found.scores) == 2 and 'tensorflow' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code, served[1][0]], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("way", [0, 1])
def test_what_the_server_refuses_is_one_line(served, way, hurry):
    predictor = load_predictor(served[1][way])
    with pytest.raises(InputError) as error:
        predictor([IMAGE, np.zeros((3, MAX_PIXELS // 2, 3), np.uint8), IMAGE])
    size = f"{MAX_PIXELS // 2} x 3 pixels"
    assert str(error.value).startswith(f"{served[1][way]}: the server refused an image of {size}: ")
    assert str(error.value).count(size) == 2 and "\n" not in str(error.value) and "[[" not in str(error.value)
    assert not hurry
    assert len(predictor([IMAGE])[0].scores) == 2  # and it goes on


@pytest.mark.parametrize("way", [0, 1])
def test_an_unknown_model_is_one_line(served, way, hurry):
    with pytest.raises(InputError) as error:
        load_predictor(served[1][way].replace("polarmask", "other"))
    assert "/other: Servable not found for request: Latest(other); is a model served there that" in str(error.value)
    assert not hurry


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/v1/models/x", "grpc://127.0.0.1:9/x"])
def test_nobody_there(url, hurry, monkeypatch):
    monkeypatch.setattr(client, "TIMEOUT", 5)
    with pytest.raises(InputError, match=r"refused|connect") as error:
        load_predictor(url)
    assert str(error.value).startswith(f"{url}: ") and "\n" not in str(error.value)
    assert hurry == list(client.WAITS)


@pytest.mark.parametrize(
    "url",
    [
        "http://host:8501",
        "http://host:8501/v1/models/",
        "http://host/v1/models/a/b",
        "http://host/v1/models/a:predict",
        "grpc://host:8500",
        "grpc://host:8500/",
        "grpc://host:8500/a/b",
        "https:///v1/models/a",
    ],
)
def test_other_urls_are_refused(url):
    with pytest.raises(InputError, match="must look like http://HOST:8501/v1/models/NAME or grpc://HOST:8500/NAME"):
        load_predictor(url)


def test_a_model_without_the_signature_metadata(tmp_path):
    from helpers import serving_server
    from helpers.exports import make_exports

    make_exports(tmp_path)["saved_model"].rename(tmp_path / "1")
    with serving_server.serve(tmp_path) as (name, rest, grpc):
        for url in (f"http://{rest}/v1/models/{name}", f"grpc://{grpc}/{name}"):
            with pytest.raises(InputError, match=r'Serving signature .*"metadata".* `polarmask export --serving` wrote'):
                load_predictor(url)


def without_classes(**changes):
    return 200, {"outputs": [json.dumps({**metadata(), **changes})]}, 0


@pytest.mark.parametrize(
    "reply, message",
    [
        ((200, b"<html>hello</html>", 0), "the answer is not TF Serving's JSON"),
        ((200, b"[" * 100_000, 0), "the answer is not TF Serving's JSON"),
        ((200, {"predictions": []}, 0), "the answer is not TF Serving's JSON"),
        ((404, b"<html>nothing here</html>", 0), "HTTP 404 Not Found"),
        ((200, {"outputs": {"a": 1, "b": 2}}, 0), "no model that `polarmask export --serving` wrote"),
        ((200, {"outputs": []}, 0), "no model that"),
        ((200, {"outputs": [3]}, 0), "no model that"),
        ((200, {"outputs": ["{"]}, 0), "no model that"),
        ((200, {"outputs": ["[]"]}, 0), "no model that"),
        ((302, b"", 0), "HTTP 302 Found"),
        (without_classes(classes=[]), "names no classes"),
        (without_classes(classes=[{"name": "a"}]), "'category_id' is missing"),
        (without_classes(input={}), "'height' is missing"),
        (without_classes(max_detections=10**9), "max_detections is 1000000000, not of 1 to 100000"),
    ],
)
def test_a_server_of_something_else_is_one_line(reply, message):
    with scripted(reply) as (address, _), pytest.raises(InputError) as error:
        load_predictor(f"http://{address}/v1/models/x")
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_detections": [4]},
        {"num_detections": [-1]},
        {"num_detections": 0},
        {"num_detections": ["one"]},
        {"num_detections": [2**40]},
        {"detection_scores": [[None]]},
        {"detection_scores": [[float("nan")]]},
        {"detection_classes": [[2]]},
        {"detection_classes": [[-1]]},
        {"detection_boxes": [[[0.0] * 3]]},
        {"detection_polygons": [[[0.0, 0.0]]]},
        {"detection_polygons": [[[[0.0, 0.0]]], [[[0.0, 0.0]]]]},
        {"detection_boxes": [[[0.0] * 4] * 2]},
        {"detection_scores": "x"},
    ],
)
def test_an_answer_against_the_contract_is_one_line(changes):
    with scripted(METADATA, (200, answer(), 0), (200, answer(**changes), 0)) as (address, _):
        predictor = load_predictor(f"http://{address}/v1/models/x")
        assert len(predictor([IMAGE])[0].scores) == 0
        with pytest.raises(InputError, match="the answer is not as the export contract says") as error:
            predictor([IMAGE])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("busy", [(503, {"error": "full"}, 0), (429, b"", 0), (504, b"", 0)])
def test_a_busy_server_is_asked_again(busy, hurry):
    with scripted(METADATA, busy, busy, (200, answer(), 0)) as (address, asked):
        assert len(load_predictor(f"http://{address}/v1/models/x")([IMAGE])[0].scores) == 0
    assert len(asked) == 4 and hurry == list(client.WAITS[:2])


def test_in_the_end_a_busy_server_is_one_line():
    with scripted(METADATA, (503, {"error": "full"}, 0)) as (address, asked):
        predictor = load_predictor(f"http://{address}/v1/models/x")
        with pytest.raises(InputError) as error:
            predictor([IMAGE])
    assert str(error.value) == f"http://{address}/v1/models/x: full" and len(asked) == 5


@pytest.mark.parametrize("code, tries", [("UNAVAILABLE", 4), ("DEADLINE_EXCEEDED", 4), ("INTERNAL", 1)])
def test_errors_by_grpc(code, tries):
    import grpc
    from tensorflow_serving.apis import prediction_service_pb2_grpc

    asked = []

    class Service(prediction_service_pb2_grpc.PredictionServiceServicer):
        def Predict(self, request, context):
            asked.append(request)
            context.abort(grpc.StatusCode[code], "why\nnot\n\t [[{{node a}}]]\n\t [[b]]")

    server = grpc.server(futures.ThreadPoolExecutor(2))
    prediction_service_pb2_grpc.add_PredictionServiceServicer_to_server(Service(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        with pytest.raises(InputError, match=rf"^grpc://127\.0\.0\.1:{port}/x: why not(;|$)"):
            load_predictor(f"grpc://127.0.0.1:{port}/x")
    finally:
        server.stop(None)
    assert len(asked) == tries


def test_reasons_of_several_operations_are_one():
    one = "INVALID_ARGUMENT: no PNG\n\t [[{{node a}}]]\n\t [[b]]\n"
    several = f"2 root error(s) found.\n  (0) {one}  (1) {one}"
    assert client.one_line(several) == "no PNG"
    assert client.one_line("assertion failed: [image 0: too large]\n\t [[{{node Assert}}]]") == "image 0: too large"


# ---- servers that mean no good: one deadline and one size for all that they send


@pytest.mark.parametrize(
    "serve, expected",
    [
        (sends(b"", b" ", 0.05), "no answer in 0.5 s"),
        (sends(OK, b"a", 0.05), "no answer in 0.5 s"),  # within a header
        (sends(OK + b"\r\n", b"1", 0.05), "no answer in 0.5 s"),
        (sends(OK + b"Content-Length: 1000\r\n\r\n", b"1", 0.05), "no answer in 0.5 s"),
        (sends(OK + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\n1\r\n", 0.05), "no answer in 0.5 s"),
        (sends(b"", b"HTTP/1.1 100 Continue\r\n\r\n", 0.05), "no answer in 0.5 s"),
        (sends(b"", b"x" * 9999), "cannot be reached: "),
        (sends(OK + b"Content-Length: nine\r\n\r\n", b"", 0.05), "no answer in 0.5 s"),
        (lambda connection: None, "cannot be reached: "),
        (lambda connection: connection.sendall(OK + b"Transfer-Encoding: chunked\r\n\r\nx\r\n"), "cannot be reached: "),
        (lambda connection: connection.sendall(OK + b"Content-Length: 99\r\n\r\n1"), "cannot be reached: "),
        (lambda connection: connection.sendall(b"HTTP/1.1 500 \x1b[31m\x07\r\n\r\n"), "HTTP 500 ?[31m?"),
    ],
)
def test_one_deadline_for_all_that_a_server_does(serve, expected, monkeypatch):
    monkeypatch.setattr(client, "TIMEOUT", 0.5)
    with hostile(serve) as address, pytest.raises(InputError) as error:
        load_predictor(f"http://{address}/v1/models/x")
    assert expected in str(error.value) and str(error.value).isprintable()


@pytest.mark.parametrize("head", [b"\r\n", b"Content-Length: 1000000000000000\r\n\r\n", b"Transfer-Encoding: chunked\r\n\r\n"])
def test_an_answer_without_end_is_cut(head, monkeypatch):
    monkeypatch.setattr(client, "MAX_ANSWER", 2**22)
    again = b"10000\r\n" + b"[" * 0x10000 + b"\r\n" if b"chunked" in head else b"[" * 0x10000
    tracemalloc.start()
    with hostile(sends(OK + head, again)) as address, pytest.raises(InputError, match="longer than 4,194,304 bytes"):
        load_predictor(f"http://{address}/v1/models/x")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**25


@pytest.mark.parametrize("text", ["[[" * 10**6, "why\x1b]0;title\x07\r\n" * 10_000, "\ud800", {"a": ["b"]}, None])
def test_what_a_server_says_is_one_short_printable_line(text):
    with scripted((400, {"error": text}, 0)) as (address, _), pytest.raises(InputError) as error:
        load_predictor(f"http://{address}/v1/models/x")
    assert str(error.value).isprintable() and len(str(error.value)) < 500


def test_more_detections_than_the_model_gives_are_refused():
    many = 300_000
    described = without_classes(max_detections=100)
    columns = {"scores": 0, "classes": 0, "boxes": [0] * 4, "polygons": [[0, 0]] * 6}
    reply = answer(num_detections=[1], **{f"detection_{name}": [[value] * many] for name, value in columns.items()})
    with scripted(described, (200, reply, 0)) as (address, _):
        predictor = load_predictor(f"http://{address}/v1/models/x")
        with pytest.raises(InputError, match="more detections than there may be"):
            predictor(IMAGE)


@pytest.mark.parametrize("shapes", [[(1, 10**12)], [(-1, 10**12)], [(2**40, 2**40, 2**40)], [(1, 2**23)] * 3])
def test_a_tensor_that_says_it_is_huge_is_refused_before_it_is_made(shapes):
    import grpc
    from tensorflow_serving.apis import predict_pb2, prediction_service_pb2_grpc

    class Service(prediction_service_pb2_grpc.PredictionServiceServicer):
        def Predict(self, request, context):
            reply = predict_pb2.PredictResponse()
            for number, shape in enumerate(shapes):
                tensor = reply.outputs[f"output {number}"]
                tensor.dtype = 1  # DT_FLOAT, of which one value stands for all
                tensor.float_val.append(1)
                for side in shape:
                    tensor.tensor_shape.dim.add().size = side
            return reply

    server = grpc.server(futures.ThreadPoolExecutor(2))
    prediction_service_pb2_grpc.add_PredictionServiceServicer_to_server(Service(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        with pytest.raises(InputError, match="numbers, and the limit is 16,777,216"):
            load_predictor(f"grpc://127.0.0.1:{port}/x")
    finally:
        server.stop(None)


def test_a_message_that_is_too_long_is_refused_at_once(hurry, monkeypatch):
    import grpc
    from tensorflow_serving.apis import predict_pb2, prediction_service_pb2_grpc

    monkeypatch.setattr(client, "MAX_ANSWER", 2**20)

    class Service(prediction_service_pb2_grpc.PredictionServiceServicer):
        def Predict(self, request, context):
            reply = predict_pb2.PredictResponse()
            reply.outputs["metadata"].string_val.append(bytes(2**21))
            return reply

    server = grpc.server(futures.ThreadPoolExecutor(2))
    prediction_service_pb2_grpc.add_PredictionServiceServicer_to_server(Service(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        with pytest.raises(InputError, match="larger than max"):
            load_predictor(f"grpc://127.0.0.1:{port}/x")
    finally:
        server.stop(None)
    assert not hurry


def test_time_that_is_over_is_not_waited_for(hurry, monkeypatch):
    """A try is only worth it while there is time to wait for it."""
    monkeypatch.setattr(client, "TIMEOUT", 1.0)
    with scripted((503, {"error": "full"}, 0.3)) as (address, asked), pytest.raises(InputError, match="full"):
        load_predictor(f"http://{address}/v1/models/x")
    assert hurry == [0.25] and len(asked) == 2
