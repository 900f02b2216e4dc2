"""exports/web by WebGPU, which is SwiftShader in headless Chromium: the CPU's detections, and a word where it is not used."""

import json
import zipfile

import pytest
from benchmarks.edge_table import make, pictures
from PIL import Image

from helpers.web import WebPage, compare, copy_page, serve
from polarmask_tf import lite
from polarmask_tf.export import tflite

pytestmark = pytest.mark.slow
SIZE = 96
SCORES, PIXELS = 2e-5, 5e-3  # measured: 2e-7 and 4e-5
FLAGS = ("--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader")
# What other browsers lack.
NO_WEBGPU, NO_JSPI = "delete Navigator.prototype.gpu", "delete WebAssembly.Suspending"
NO_ADAPTER = "GPU.prototype.requestAdapter = async () => null"
LOST = """const submit = GPUQueue.prototype.submit;
  GPUQueue.prototype.submit = function (...rest) {
    if (window.lost) throw new Error("device lost");
    return submit.apply(this, rest);
  };"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory, node_modules):
    folder = tmp_path_factory.mktemp("web_gpu")
    copy_page(folder, node_modules)
    model = make("edge", SIZE, 60)
    for precision in ("fp32", "fp16"):
        for raw in (False, True):
            tflite.export_tflite(model, folder / tflite.file_name(precision, raw), precision, raw=raw)
    Image.fromarray(next(pictures(SIZE))).save(folder / "sample.jpg", "PNG")  # what the page starts with
    return folder


@pytest.fixture(scope="module")
def server(folder):
    server, url = serve(folder)
    yield url
    server.shutdown()


@pytest.fixture(scope="module")
def gpu(folder, server, chromium):
    page = WebPage(folder, chromium, *FLAGS)
    page.url = server
    yield page
    page.close()


@pytest.fixture
def lacking(folder, server, chromium):
    """lacking(source) -> a page in a browser in which `source` was run before the page's own."""
    pages = []

    def start(source):
        page = WebPage(folder, chromium, *FLAGS)
        pages.append(page)
        page.url = server
        page(init=source)
        return page

    yield start
    for page in pages:
        page.close()


def expected(folder, name):
    return lite.PolarMaskLite(folder / name)(folder / "sample.jpg")


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_edge_finds_what_it_finds_on_the_cpu(gpu, folder, precision):
    for raw, where in ((False, "GPU and CPU"), (True, "GPU")):  # NMS is the CPU's
        name = tflite.file_name(precision, raw)
        found, shown = gpu.found(open=f"{gpu.url}?model={name}&accelerator=gpu")
        compare(found, expected(folder, name), SCORES, PIXELS)
        assert len(found["scores"]) > 30 and shown["accelerator"] == where
        assert shown["where"].startswith("Runs on the GPU (WebGPU)") and ("NMS" in shown["where"]) == (not raw)


def test_software_is_left_alone_unless_asked_for(gpu, folder):
    found, shown = gpu.found(open=gpu.url)
    compare(found, expected(folder, "model.tflite"))
    assert shown["where"] == "Runs on the CPU (WebAssembly): WebGPU is software here, which is slower."
    assert gpu(open=f"{gpu.url}?accelerator=cpu")["where"] == "Runs on the CPU (WebAssembly): as asked for."


@pytest.mark.parametrize("lacks, said", [(NO_WEBGPU, "this browser has no WebGPU"), (NO_ADAPTER, "WebGPU finds no GPU here")])
def test_without_webgpu_the_cpu_runs_and_one_line_says_so(lacking, folder, lacks, said):
    page = lacking(lacks)
    found, shown = page.found(open=f"{page.url}?accelerator=gpu")
    compare(found, expected(folder, "model.tflite"))
    assert shown["where"].startswith(f"Runs on the CPU (WebAssembly): {said}") and shown["where"].count("\n") == 0


def test_without_jspi_raw_files_run_on_the_gpu_and_others_on_the_cpu(lacking, folder):
    page = lacking(NO_JSPI)
    for name, where in (("model.tflite", "CPU"), ("model_raw.tflite", "GPU")):
        found, shown = page.found(open=f"{page.url}?model={name}&accelerator=gpu")
        compare(found, expected(folder, name), SCORES, PIXELS)
        assert shown["accelerator"] == where and ("JSPI" in shown["where"]) == (where == "CPU")


def test_a_gpu_that_fails_is_left(lacking, folder):
    page = lacking(LOST)
    _, shown = page.found(open=f"{page.url}?model=model_raw.tflite&accelerator=gpu")
    assert shown["accelerator"] == "GPU"
    page.call("() => { window.lost = true; }", None)
    found, shown = page.found(click="#sample")
    compare(found, expected(folder, "model_raw.tflite"))
    assert shown["where"].startswith("Runs on the CPU (WebAssembly): the GPU failed: ")


def test_a_gpu_that_finds_something_else_is_left(gpu, folder):
    """As it does of a box branch, which see exports/README.md: a file that says so, and one of before that."""
    model = make("edge_small", SIZE, 20, "model.head.box=true", classes=3)
    path = tflite.export_tflite(model, folder / "box.tflite")
    found, shown = gpu.found(open=f"{gpu.url}?model=box.tflite&accelerator=gpu")
    compare(found, expected(folder, "box.tflite"))
    assert shown["where"] == "Runs on the CPU (WebAssembly): on a GPU its box branch gives other polygons."
    described = lite.read_metadata(path)
    assert described.pop("cpu_only")
    (folder / "old.tflite").write_bytes(path.read_bytes()[: described["flatbuffer_bytes"]])
    with zipfile.ZipFile(folder / "old.tflite", "a") as archive:
        archive.writestr("metadata.json", json.dumps(described))
    found, shown = gpu.found(open=f"{gpu.url}?model=old.tflite&accelerator=gpu")
    compare(found, expected(folder, "old.tflite"))
    assert shown["where"] == "Runs on the CPU (WebAssembly): the GPU's detections were not the CPU's."
