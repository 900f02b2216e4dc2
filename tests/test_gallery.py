"""gallery.html in headless Chromium, opened from disk."""

import json
import os
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from helpers.browser import DRIVER, Page
from helpers.detections import STARS, star_predictor
from polarmask_tf.inference import gallery
from polarmask_tf.inference.predict import predict
from polarmask_tf.inference.results import Detections

ODD = "<img src=x onerror=hacked=1>&\"'#%41?.png"
EVIL = "</script><script>hacked=1</script><!--"

STATE = """async () => {
  const cards = () => [...document.querySelectorAll("main figure")];
  const done = () => cards().every((card) => card.querySelector("figcaption span").textContent)
    && [...document.querySelectorAll("main img")].every((image) => image.complete || image.loading === "lazy");
  while (!done()) await new Promise((resolve) => setTimeout(resolve, 20));
  const shown = (card, kind) => [...card.querySelectorAll(kind)].filter((one) => one.style.display !== "none");
  return {
    title: document.querySelector("h1").textContent, hacked: window.hacked ?? null,
    classes: [...document.querySelectorAll("#classes label")].map((label) => label.textContent),
    cards: cards().map((card) => ({
      name: card.querySelector("b").textContent, says: card.querySelector("figcaption span").textContent,
      wide: card.querySelector("img").naturalWidth,
      heads: [...card.querySelectorAll(".view span")].map((one) => one.textContent),
      found: shown(card, "polygon").map((one) => [one.querySelector("title").textContent, one.getAttribute("points")]),
      truth: shown(card, "path").map((one) => [one.querySelector("title").textContent, one.getAttribute("d")]),
    })),
  };
}"""
SET = """({ selector, value }) => {
  const one = document.querySelector(selector);
  if (one.type === "checkbox") one.checked = value; else one.value = value;
  one.dispatchEvent(new Event("input", { bubbles: true }));
  one.dispatchEvent(new Event("change", { bubbles: true }));
}"""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folder of a gallery with odd names and a truth, and the results."""
    folder = tmp_path_factory.mktemp("gallery")
    rng = np.random.default_rng(0)
    (folder / "in" / "deep").mkdir(parents=True)
    for name in ("a1.png", "a2.png", "a10.png", "deep/a1.png", ODD):
        Image.fromarray(rng.integers(0, 256, (60, 80, 3), np.uint8)).save(folder / "in" / name)
    Image.fromarray(rng.integers(0, 256, (60, 80, 3), np.uint8)).save(os.fsencode(folder / "in") + b"/z\xff.png", "PNG")
    square, stripe = [10, 10, 30, 10, 30, 30, 10, 30], {"size": [60, 80], "counts": [0, 600, 4200]}
    annotations = [
        {"id": 1, "image_id": 5, "category_id": 7, "segmentation": [square], "area": 400, "iscrowd": 0},
        {"id": 2, "image_id": 5, "category_id": 3, "segmentation": stripe, "area": 600, "iscrowd": 0},
        {"id": 3, "image_id": 5, "category_id": 3, "segmentation": stripe, "area": 600, "iscrowd": 1},
    ]
    images = [{"id": i, "file_name": name, "height": 60, "width": 80} for i, name in ((5, "a2.png"), (6, "a10.png"))]
    categories = [{"id": entry["category_id"], "name": entry["name"]} for entry in STARS]
    (folder / "truth.json").write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    classes = [*STARS[:2], {"name": EVIL, "category_id": 12}]
    predictor = star_predictor(5)
    predictor = type(predictor)("run", classes, (32, 32), 4, predictor.run)
    options = {"save": ["coco", "gallery"], "score_threshold": 0.0, "truth": folder / "truth.json"}
    predict(predictor, folder / "in", folder / "out", progress=False, segmentation="polygon", **options)
    return folder / "out"


@pytest.fixture(scope="module")
def page(tmp_path_factory, node_modules, chromium):
    folder = tmp_path_factory.mktemp("driver")
    shutil.copy(DRIVER, folder)
    (folder / "node_modules").symlink_to(node_modules)
    page = Page(folder, chromium)
    yield page
    page.close()


def state(page, **command):
    return page(call=STATE, **command)


def choose(page, selector, value):
    page(call=SET, **{"with": {"selector": selector, "value": value}})
    return state(page)


def names(found):
    return [card["name"] for card in found["cards"]]


def test_it_shows_every_picture_and_every_outline(page, made):
    found = state(page, open=(made / "gallery.html").as_uri())
    assert names(found)[:5] == [ODD, "a1.png", "a2.png", "a10.png", "deep/a1.png"]  # the sixth is no text
    assert found["title"] == "out: 6 pictures" and found["classes"] == ["circle", "star", EVIL] and found["hacked"] is None
    assert [card["wide"] for card in found["cards"]] == [80] * 6
    results = json.loads((made / "results.json").read_text())
    for card in found["cards"]:
        key = {"a2.png": 5, "a10.png": 6}.get(card["name"], card["name"])
        wanted = [r for r in results if r["image_id"] == key]
        if not wanted:  # the name that is no text
            assert "\ufffd" in card["name"] or "\udcff" in card["name"]
            continue
        assert len(card["found"]) == len(wanted) == 5
        for (title, points), result in zip(card["found"][::-1], wanted, strict=True):  # the best lies on top
            assert title.endswith(f"{result['score']:.2f}")
            shown = [float(number) for number in points.split()]
            np.testing.assert_allclose(shown, result["segmentation"][0], atol=0.06)


def test_nothing_can_come_from_a_network(page, made):
    blocked = """() => new Promise((resolve) => {
      document.addEventListener("securitypolicyviolation", (event) => resolve(event.blockedURI));
      new Image().src = "http://127.0.0.1:9/picture.png";
    })"""
    assert page(open=(made / "gallery.html").as_uri(), call=blocked) == "http://127.0.0.1:9/picture.png"


def test_truth_is_beside_where_there_is_some(page, made):
    cards = {card["name"]: card for card in state(page, open=(made / "gallery.html").as_uri())["cards"]}
    assert cards["a2.png"]["heads"] == ["truth", "prediction"] and cards["a1.png"]["heads"][0] == "no truth known"
    assert cards["a2.png"]["says"] == "5 found, 2 true" and cards["a10.png"]["says"] == "5 found, 0 true"
    assert cards["a1.png"]["says"] == "5 found"
    (stripe, square) = cards["a2.png"]["truth"]
    assert square == ["circle", "M10 10 30 10 30 30 10 30Z"] and stripe[0] == "star"
    corners = np.array(re.findall(r"[\d.]+", stripe[1]), float).reshape(-1, 2)
    assert (corners.min(axis=0).tolist(), corners.max(axis=0).tolist()) == ([0, 0], [10, 60])  # columns 0 to 9


def test_filters_and_order(page, made):
    results = json.loads((made / "results.json").read_text())
    state(page, open=(made / "gallery.html").as_uri())
    few = choose(page, "#score", "0.5")
    scores = [r["score"] for r in results if r["image_id"] == "a1.png"] or [r["score"] for r in results][:5]
    assert {len(card["found"]) for card in few["cards"]} == {sum(score >= 0.5 for score in scores)}
    assert len(few["cards"]) == 6 and "3 found" in few["cards"][0]["says"]
    assert [len(card["found"]) for card in choose(page, "#classes label:first-child input", False)["cards"]] == [2] * 6
    assert {title for card in state(page)["cards"] for title, _ in card["found"]} == {"star 0.79", f"{EVIL} 0.59"}
    assert [card["says"] for card in state(page)["cards"] if card["name"] == "a2.png"] == ["2 found, 1 true"]  # of the chosen
    assert len(choose(page, "#score", "0.9")["cards"]) == 6
    only = choose(page, "#only", True)
    assert only["cards"] == [] and only["title"] == "out: 0 of 6 pictures"
    assert len(choose(page, "#classes label:first-child input", True)["cards"]) == 6
    assert names(choose(page, "#search", "DEEP")) == ["deep/a1.png"]


def test_a_picture_can_be_enlarged(page, made):
    state(page, open=(made / "gallery.html").as_uri(), click="main figure:nth-child(2) button")
    dialog = "() => [document.querySelector('dialog').open, document.querySelector('dialog b')?.textContent]"
    assert page(call=dialog) == [True, "a1.png"]
    press = "(key) => document.querySelector('dialog').dispatchEvent(new KeyboardEvent('keydown', { key }))"
    for key, name in (("ArrowRight", "a2.png"), ("ArrowLeft", "a1.png"), ("x", "a1.png")):
        page(call=press, **{"with": key})
        assert page(call=dialog) == [True, name]


def test_a_missing_file_is_said(page, made, tmp_path):
    copy = shutil.copytree(made, tmp_path / "copy")
    (copy / "gallery/a1.js").unlink()
    cards = {card["name"]: card for card in state(page, open=(copy / "gallery.html").as_uri())["cards"]}
    assert cards["a1.png"]["says"] == "its file in gallery/ is missing" and len(cards["a2.png"]["found"]) == 5


def many(folder, count):
    """A page of `count` pictures, which share their files."""
    image = np.full((60, 80, 3), 90, np.uint8)
    rows = star_predictor(2).run([image])[0]
    found = Detections(**rows, categories=STARS[:1], image_size=(60, 80))
    for number in range(3):
        (folder / "gallery").mkdir(exist_ok=True)
        entry = gallery.write_picture(folder / "gallery" / str(number), image, found, f"{number}.png", None)
    entries = (
        (f"{n}.png", f"gallery/{n}", {**entry, "best": {0: (n * 7 % count) / count}, "count": n % 9}) for n in range(count)
    )
    gallery.write_page(folder / "gallery.html", entries, title="many", categories=STARS[:1], least=0.3, truth=False)
    return (folder / "gallery.html").as_uri()


def test_thousands_are_made_as_the_reader_comes_to_them(page, tmp_path):
    count = 5000
    number = "() => document.querySelectorAll('main figure').length"
    page(open=many(tmp_path, count), call=number)
    first = page(call=number)
    assert 10 < first < 500
    page(call="() => scrollTo(0, document.body.scrollHeight)")
    wait = """async (least) => {
      while (document.querySelectorAll("main figure").length <= least) await new Promise(requestAnimationFrame);
    }"""
    page(call=wait, **{"with": first})
    assert page(call=number) < 1000
    order = "() => [...document.querySelectorAll('main figure b')].slice(0, 3).map((one) => one.textContent)"
    for kind, key in (("best", lambda n: -(n * 7 % count)), ("worst", lambda n: n * 7 % count), ("count", lambda n: -(n % 9))):
        page(call=SET, **{"with": {"selector": "#sort", "value": kind}})
        assert page(call=order) == [f"{n}.png" for n in sorted(range(count), key=key)[:3]]


# ---- without a browser


def test_no_text_ends_the_page_s_script(made):
    html = (made / "gallery.html").read_text()
    assert html.count("</script>") == html.count("<script") == 2
    data = re.search(r'id="data">(.*?)</script>', html, re.S)[1]
    assert "<" not in data and json.loads(data)["classes"][2]["name"] == EVIL
    assert not re.search(r"(?:src|href)=.?https?:", html) and "http-equiv" in html
