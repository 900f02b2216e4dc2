"""The wheel holds what a bare checkout has, and what belongs to an extra is asked for in one line."""

import configparser
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

import polarmask_tf
from polarmask_tf import cli

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def setup():
    parser = configparser.ConfigParser(interpolation=None)
    parser.read(ROOT / "setup.cfg")
    return {section: {key: value.split("\n") for key, value in parser[section].items()} for section in parser.sections()}


def test_every_room_is_a_package(setup):
    rooms = {".".join(path.parent.relative_to(ROOT).parts) for path in ROOT.glob("polarmask_tf/**/*.py")}
    assert sorted(filter(None, setup["options"]["packages"])) == sorted({*rooms, "polarmask_tf.configs"})
    assert all((ROOT / room.replace(".", "/") / "__init__.py").is_file() for room in rooms)


def test_the_wheel_ships_modules_and_configs(tmp_path):
    # From a copy of the tracked files: building in the checkout would leave build/ behind.
    sources = ("polarmask_tf/**/*.py*", "polarmask_tf/**/*.html", "polarmask_tf/models/*/*", "configs/*.*")
    for pattern in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE", *sources):
        for file in ROOT.glob(pattern):
            if file.suffix != ".pyc":
                copy = tmp_path / "source" / file.relative_to(ROOT)
                copy.parent.mkdir(parents=True, exist_ok=True)
                copy.write_bytes(file.read_bytes())
    (tmp_path / "source/polarmask_tf/py.typed").write_bytes((ROOT / "polarmask_tf/py.typed").read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", str(tmp_path)]
    done = subprocess.run([*command, str(tmp_path / "source")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    wheel = next(tmp_path.glob("polarmask_tf-*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path / "installed")
    modules = {str(p.relative_to(ROOT)) for p in ROOT.glob("polarmask_tf/**/*.py")}
    assert modules | {"polarmask_tf/py.typed", "polarmask_tf/inference/gallery.html"} <= names
    assert {f"polarmask_tf/configs/{p.name}" for p in (ROOT / "configs").glob("*.*")} <= names
    assert {str(p.relative_to(ROOT)) for p in ROOT.glob("polarmask_tf/models/*/*")} <= names
    code = "import polarmask_tf.config as c; print(c.find('shapes')); c.load('shapes')"
    env = {**os.environ, "PYTHONPATH": str(tmp_path / "installed")}
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=tmp_path)
    assert found.stdout.strip() == str(tmp_path / "installed/polarmask_tf/configs/shapes.yaml"), found.stderr


def test_every_extra_that_a_message_names_exists(setup):
    extras = setup["options.extras_require"]
    texts = [path.read_text() for path in (*ROOT.glob("polarmask_tf/**/*.py"), ROOT / "README.md", *ROOT.glob("docs/*.md"))]
    named = {name for text in texts for name in re.findall(r"(?:polarmask_tf|'\.)\[(\w+(?:,\w+)*)\]'", text)}
    assert {"garden", "plots", "serving"} <= {part for name in named for part in name.split(",")} <= set(extras)


def test_the_citation_names_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == polarmask_tf.__version__ and citation["license"] == "Apache-2.0"


WITHOUT = """
import sys
sys.modules[sys.argv[1]] = None  # as if it were not installed
from polarmask_tf import cli
sys.exit(cli.main(sys.argv[2:]))
"""


@pytest.fixture(scope="module")
def annotations(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes")
    assert cli.main(["shapes", str(folder), "--train", "2", "--val", "1", "--size", "64"]) == 0
    return folder / "train" / "annotations.json"


@pytest.mark.parametrize(
    "package, command, extra",
    [
        ("official", ["summary", "edge", "--set", "model.backbone.type=MobileNetV4ConvSmall"], "garden"),
        ("matplotlib", ["upper-bound", "ANNOTATIONS", "--out", "OUT"], "plots"),
    ],
)
def test_without_an_extra_one_line_names_it(package, command, extra, annotations, tmp_path):
    words = [{"ANNOTATIONS": annotations, "OUT": tmp_path / "out"}.get(word, word) for word in command]
    done = subprocess.run([sys.executable, "-c", WITHOUT, package, *map(str, words)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and not (tmp_path / "out").exists(), done.stderr
    [line] = done.stderr.splitlines()
    assert line.startswith("polarmask: error: ") and f"pip install 'polarmask_tf[{extra}]'" in line


def test_docs_name_the_files_that_know_which_keras_it_is():
    page = (ROOT / "docs/keras.md").read_text()
    known = {str(p.relative_to(ROOT)) for p in ROOT.glob("polarmask_tf/**/*.py") if re.search("tf_keras|KERAS", p.read_text())}
    assert known == set(re.findall(r"^\| `(polarmask_tf/\S+\.py)`", page, re.M))
    for path in (*ROOT.glob("polarmask_tf/**/*.py"), *ROOT.glob("tests/**/*.py")):
        assert not re.search(r"\btf\.keras\.|^\s*(?:import|from) keras\b", path.read_text(), re.M), path
