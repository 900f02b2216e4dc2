"""The pages of docs/: links, what is generated, the tutorial's commands, the notebooks' code, the site."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import docs_pictures
import docs_settings
import docs_site
import pytest
import yaml
from PIL import Image

from polarmask_tf import cli

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = [*ROOT.glob("*.md"), *DOCS.rglob("*.md"), *(ROOT / "exports").glob("*.md"), *(ROOT / "exports").glob("*/*.md")]
NOTEBOOKS = sorted((DOCS / "examples").glob("*.ipynb"))


def without_code(text: str) -> str:
    return re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.S)


def anchors(page: Path) -> set[str]:
    """Those that GitHub and MkDocs give to the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.S), re.M)
    plain = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading) for heading in headings]
    return {re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in plain}


def links(text: str):
    """(path, anchor) of each relative link."""
    return re.findall(r"\]\((?!\w+:)([^)#\s]*)#?([^)\s]*)\)", text)


def texts():
    for page in PAGES:
        yield pytest.param(page, without_code(page.read_text()), id=str(page.relative_to(ROOT)))
    for notebook in NOTEBOOKS:
        cells = json.loads(notebook.read_text())["cells"]
        text = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
        yield pytest.param(notebook, without_code(text), id=notebook.name)


@pytest.mark.parametrize(("page", "text"), texts())
def test_every_relative_link_leads_to_a_file_and_a_heading(page, text):
    for path, anchor in links(text):
        target = page.parent / path if path else page
        assert target.is_file(), f"{path} (a link to a folder shows nothing on the site)"
        assert not anchor or anchor in anchors(target), f"{path}#{anchor}"


@pytest.mark.parametrize(("page", "text"), texts())
def test_a_table_has_a_heading_and_as_many_columns_in_each_row(page, text):
    for table in re.findall(r"(?:^\|.*\n)+", text + "\n", re.M):
        rows = table.splitlines()
        assert len(rows) > 1 and re.fullmatch(r"\|[-:| ]+\|", rows[1]), f"not shown as a table: {rows[0]}"
        assert len({row.count("|") for row in rows}) == 1, f"rows of different length: {rows[0]}"


def test_the_settings_page_is_that_of_the_schema():
    assert docs_settings.PAGE.read_text() == docs_settings.page(), "run scripts/docs_settings.py"


def test_every_setting_has_a_meaning():
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in docs_settings.page().splitlines() if line.startswith("| `")]
    assert len(rows) > 70 and all(len(row) == 5 and row[4].strip() for row in rows)


def test_comments_above_and_beside_a_field_are_its_meaning():
    source = """
class A:
    # Not of the next field,

    # but this is: above,
    x: int = 1  # and beside
    y: tuple = (  # in the middle
        1,
    )
    z: int = 3
"""
    found = docs_settings.comments(source)
    assert found == {("A", "x"): "but this is: above, and beside", ("A", "y"): "in the middle", ("A", "z"): ""}


def test_every_page_is_in_the_navigation():
    def files(nav):
        for entry in nav:
            for value in entry.values():
                yield from files(value) if isinstance(value, list) else (value,)

    listed = list(files(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]))
    assert sorted(listed) == sorted(path.name for path in DOCS.glob("*.md"))


def test_the_site_builds_and_links_of_pages_outside_docs_lead_to_pages(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    edge = (tmp_path / "edge.html").read_text()
    assert 'href="repository/exports/index.html#edge"' in edge
    contract = (tmp_path / "repository/exports/index.html").read_text()
    assert 'href="serving/index.html"' in contract and "<h2" in contract
    for page in tmp_path.rglob("*.html"):
        for target in re.findall(r'(?:href|src)="(?!\w+:|#|//)([^"#?]+)', page.read_text()):
            if page.name != "404.html":
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_links_lead_in_the_site_where_they_lead_in_the_repository():
    text = (
        "[a](paper.md#x) [b](../exports/README.md#edge) [c](#here) [d](https://x.org/y.md) `x[0](y)`\n```python\nf[1](z)\n```\n"
    )
    assert docs_site.moved(text, "edge.md") == text.replace("../exports", "repository/exports")
    assert docs_site.linked(text, "docs/edge.md") == ["docs/paper.md", "exports/README.md"]
    outside = "[a](../docs/paper.md) [b](cpp/README.md) [c](../SECURITY.md)"
    assert docs_site.moved(outside, "repository/exports/README.md") == outside.replace("../docs", "../..")


def test_the_pictures_are_drawn_by_code_that_runs():
    drawn = {path.stem for path in (DOCS / "pictures").iterdir()}
    assert drawn == set(docs_pictures.PICTURES)
    assert [axis.get_title() for axis in docs_pictures.nms_picture().axes][1].startswith("3 polygons")
    ring = [docs_pictures.wavy(64, 64, 40), docs_pictures.wavy(64, 64, 20)]
    center, polygon = docs_pictures.rebuilt(ring, 36)
    reached = docs_pictures.iou(docs_pictures.mask(ring), docs_pictures.mask([polygon]))
    assert center == pytest.approx([64, 64], abs=0.1) and reached == pytest.approx(1 - 20**2 / 40**2, abs=0.01)


def tutorial():
    """The `polarmask` commands of the tutorial's numbered steps, as lists of words."""
    text = (DOCS / "own-pictures.md").read_text()
    steps = text[text.index("## 1.") : text.index("## What to expect")]
    for block in re.findall(r"```bash\n(.*?)```", steps, re.S):
        for line in block.splitlines():
            if line.startswith("polarmask "):
                yield shlex.split(line, comments=True)[1:]


def as_labelme(source: Path, out: Path) -> None:
    """A COCO set as a folder of pictures and labelme files."""
    out.mkdir()
    document = json.loads((source / "annotations.json").read_text())
    names = {category["id"]: category["name"] for category in document["categories"]}
    for image in document["images"]:
        shapes = [
            {
                "label": names[annotation["category_id"]],
                "points": list(zip(ring[::2], ring[1::2], strict=True)),
                "shape_type": "polygon",
                "group_id": None,
                "flags": {},
            }
            for annotation in document["annotations"]
            if annotation["image_id"] == image["id"]
            for ring in annotation["segmentation"]
        ]
        stem = Path(image["file_name"]).stem
        Image.open(source / "images" / image["file_name"]).convert("RGB").save(out / f"{stem}.jpg")
        labels = {
            "version": "5.5.0",
            "flags": {},
            "shapes": shapes,
            "imagePath": f"{stem}.jpg",
            "imageData": None,
            "imageHeight": image["height"],
            "imageWidth": image["width"],
        }
        (out / f"{stem}.json").write_text(json.dumps(labels))


@pytest.mark.slow
def test_the_tutorial_leads_from_a_labelme_folder_to_polygons(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["shapes", "drawn", "--train", "20", "--val", "1", "--size", "96"]) == 0
    as_labelme(tmp_path / "drawn/train", tmp_path / "pictures")
    pictures = {path.name: path.read_bytes() for path in Path("pictures").iterdir()}
    commands = [words for words in tutorial() if words[0] != "doctor"]
    assert [words[0] for words in commands] == [
        "convert", "check", "init", "train", "evaluate", "predict", "export", "predict"
    ]  # fmt: skip
    few = ["train.steps=6", "data.batch=4", "data.size=[64,64]", "model.fpn.channels=16", "model.head.channels=16"]
    for words in commands:
        more = [word for setting in few for word in ("--set", setting)] if words[0] == "train" else []
        assert cli.main([*words, *more]) == 0, (words, capsys.readouterr())
    assert pictures == {path.name: path.read_bytes() for path in Path("pictures").iterdir()}
    for made in ("data/train/dataset.json", "data/val/dataset.json", "mine.yaml", "exported/model.tflite"):
        assert Path(made).is_file()
    for folder in ("found", "found_lite"):
        assert Path(folder, "sheet.png").is_file() and Path(folder, "results.json").is_file()


def test_the_tutorials_first_steps_take_a_coco_file_too(tmp_path, monkeypatch):
    """What differs with the format is over when the data are converted."""
    monkeypatch.chdir(tmp_path)
    assert cli.main(["shapes", "drawn", "--train", "12", "--val", "1", "--size", "64"]) == 0
    (tmp_path / "drawn/train").rename("pictures")
    for words in tutorial():
        if words[0] in ("convert", "init"):
            assert cli.main(words) == 0, words
    config = yaml.safe_load(Path("mine.yaml").read_text())
    assert (config["data"]["train"], config["data"]["val"]) == (str(tmp_path / "data/train"), str(tmp_path / "data/val"))


@pytest.mark.parametrize("block", [1, 2])
@pytest.mark.slow
def test_the_python_pages_examples_run(block, tmp_path, monkeypatch):
    """The first is run by test_end_to_end.py, which has the data that it wants."""
    monkeypatch.chdir(tmp_path)
    code = re.findall(r"```python\n(.*?)```", (DOCS / "python.md").read_text(), re.S)[block]
    names = {}
    exec(code, names)
    assert names["model"].classes if block == 1 else names["model"].history.history["loss"]


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.name)
def test_the_notebooks_run(notebook, tmp_path):
    code = "\n".join("".join(cell["source"]) for cell in cells(notebook) if cell["cell_type"] == "code")
    (tmp_path / "notebook.py").write_text(code)
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "notebook.py"], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.name)
def test_notebooks_are_stored_without_outputs(notebook):
    code = [cell for cell in cells(notebook) if cell["cell_type"] == "code"]
    assert code and all(not cell["outputs"] and cell["execution_count"] is None for cell in code)


def cells(notebook: Path) -> list[dict]:
    return json.loads(notebook.read_text())["cells"]
