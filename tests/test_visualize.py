import numpy as np
import pytest
from PIL import Image

from polarmask_tf.inference import visualize

GRAY = np.full((400, 500, 3), 100, np.uint8)
SQUARE = np.float32([(100, 150), (200, 150), (200, 250), (100, 250)])


def changed(picture, image=GRAY):
    return (np.asarray(picture) != image).any(axis=-1)


def test_a_polygon_is_filled_where_it_is_and_nowhere_else():
    touched = changed(visualize.draw(GRAY, [SQUARE]))
    assert touched[152:248, 102:198].all()
    touched[145:256, 95:206] = False
    assert not touched.any()


def test_the_fill_is_translucent_and_the_outline_is_the_colour():
    picture = np.asarray(visualize.draw(GRAY, [SQUARE], colors=[(255, 0, 0)]))
    assert picture[200, 150, 0] > 130 and picture[200, 150, 1] > 50  # the gray shines through
    assert picture[200, 100].tolist() == [255, 0, 0]


def test_outlines_are_antialiased():
    triangle = np.float32([(100, 100), (300, 137), (120, 300)])
    picture = visualize.draw(np.zeros((400, 500, 3), np.uint8), [triangle], colors=[(255, 255, 255)])
    assert len(np.unique(np.asarray(picture)[..., 0])) > 5  # hard edges: background, fill and line alone


def test_a_mask_covers_the_same_as_its_polygon():
    mask = np.zeros(GRAY.shape[:2], bool)
    mask[150:250, 100:200] = True
    of_mask, of_polygon = changed(visualize.draw(GRAY, [mask])), changed(visualize.draw(GRAY, [SQUARE]))
    assert (of_mask & of_polygon).sum() / (of_mask | of_polygon).sum() > 0.95


def test_every_ring_of_an_instance_is_drawn():
    touched = changed(visualize.draw(GRAY, [[SQUARE, SQUARE + 120]]))
    assert touched[200, 150] and touched[320, 270]


def test_the_first_instance_lies_on_top():
    picture = np.asarray(visualize.draw(GRAY, [SQUARE, SQUARE], colors=[(255, 0, 0), (0, 255, 0)]))
    assert picture[200, 100].tolist() == [255, 0, 0]


def test_a_picture_painted_in_strips_is_the_same(monkeypatch):
    mask = np.zeros(GRAY.shape[:2], bool)
    mask[90:370, 220:300] = True
    mask[140:160, 240:260] = False
    arguments = (GRAY, [SQUARE, mask, SQUARE + 40], ["one", "two", ""], [0.5, 0.25, 0.125])
    whole = np.asarray(visualize.draw(*arguments))
    monkeypatch.setattr(visualize, "LAYER_PIXELS", 100_000)
    np.testing.assert_array_equal(visualize.draw(*arguments), whole)


def test_small_images_are_enlarged_by_a_whole_factor():
    image = np.zeros((128, 160, 3), np.uint8)
    picture = visualize.draw(image, [np.float32([(20, 20), (60, 20), (60, 60), (20, 60)])])
    assert picture.size == (480, 384)
    touched = changed(picture, np.zeros((384, 480, 3), np.uint8))
    assert touched[62:178, 62:178].all() and not touched[190:].any()
    assert visualize.draw(np.zeros((1, 2, 3), np.uint8), []).size == (16, 8)


def test_fit_sets_the_longer_side_and_moves_the_shapes_along():
    picture = visualize.draw(GRAY, [SQUARE], fit=250)
    assert picture.size == (250, 200)
    touched = changed(picture, np.full((200, 250, 3), 100, np.uint8))
    assert touched[77:123, 52:98].all() and not touched[:70].any()


def test_labels_and_scores_are_written_above_the_instance():
    bare = np.asarray(visualize.draw(GRAY, [SQUARE]))
    named = np.asarray(visualize.draw(GRAY, [SQUARE], ["cat"], [0.75]))
    rows, columns = np.nonzero((bare != named).any(axis=-1))
    assert rows.min() > 115 and rows.max() <= 152 and columns.min() >= 99
    assert columns.max() - columns.min() > 40  # "cat 0.75", not the bare score
    values = named[rows.min() : rows.max(), columns.min() : columns.max()].reshape(-1, 3).astype(int).sum(-1)
    assert values.max() - values.min() > 300  # letters stand out from their plate


def test_labels_at_the_edge_stay_inside_and_labels_do_not_cover_each_other():
    corner = SQUARE - (100, 150)
    bare, one = (np.asarray(visualize.draw(GRAY, [corner], labels)) for labels in (None, ["a long name"]))
    assert (bare != one).any()
    both = np.asarray(visualize.draw(GRAY, [corner, corner], ["a long name", "hidden"]))
    alone = np.asarray(visualize.draw(GRAY, [corner, corner], ["a long name", ""]))
    assert (both == alone).all()


@pytest.mark.parametrize(
    "shape",
    [
        np.zeros((0, 2), np.float32),
        np.float32([(5, 5), (9, 9)]),
        np.full((6, 2), np.nan, np.float32),
        np.full((6, 2), 50, np.float32),
        np.zeros(GRAY.shape[:2], bool),
        [],
        SQUARE + 1e4,
    ],
)
def test_degenerate_instances_do_no_harm(shape):
    picture = visualize.draw(GRAY, [shape, SQUARE], ["nothing", "square"], [0.9, 0.5])
    assert changed(picture)[200, 150]


def test_a_mask_on_the_edge_of_the_image():
    mask = np.zeros((30, 40), bool)
    mask[25:, 35:] = True
    touched = changed(visualize.draw(np.zeros((30, 40, 3), np.uint8), [mask]), np.zeros((240, 320, 3), np.uint8))
    assert touched[-1, -1] and not touched[:190].any()


def test_colours_are_stable_and_differ():
    colors = [visualize.color(index) for index in range(12)]
    assert colors == [visualize.color(index) for index in range(12)]
    distances = [np.abs(np.subtract(a, b)).sum() for i, a in enumerate(colors) for b in colors[:i]]
    assert min(distances) > 60


def test_colours_follow_the_class_or_the_instance():
    assert visualize.colors_for([2, 0, 2], 3) == [visualize.color(2), visualize.color(0), visualize.color(2)]
    assert len(set(visualize.colors_for([0, 0, 0], 1))) == 3


@pytest.mark.parametrize("count", [1, 2, 5, 12])
def test_a_sheet_holds_every_pair_side_by_side(count):
    pairs = [
        (Image.new("RGB", (64, 48), (255, index, 0)), Image.new("RGB", (64, 48), (0, index, 255)), f"image {index}")
        for index in range(count)
    ]
    page = np.asarray(visualize.sheet(pairs, title="All of them", side=64)).astype(int)
    for index in range(count):
        truth = np.argwhere((page == (255, index, 0)).all(axis=-1))
        prediction = np.argwhere((page == (0, index, 255)).all(axis=-1))
        assert len(truth) == len(prediction) == 64 * 48
        assert (truth.min(axis=0)[0] == prediction.min(axis=0)[0]) and truth.max(axis=0)[1] < prediction.min(axis=0)[1]


@pytest.mark.parametrize("count", [1, 3, 12])
@pytest.mark.parametrize("pictures", [1, 3])
def test_a_sheet_takes_any_number_of_pictures_a_cell(count, pictures):
    cells = [
        (*(Image.new("RGB", (64, 40 + 8 * k), (k, index, 255)) for k in range(pictures)), f"image {index}")
        for index in range(count)
    ]
    page = np.asarray(visualize.sheet(cells, heads=[f"model {k}" for k in range(pictures)], side=64)).astype(int)
    corners = []
    for index in range(count):
        found = [np.argwhere((page == (k, index, 255)).all(axis=-1)) for k in range(pictures)]
        assert all(len(pixels) == 64 * (40 + 8 * k) for k, pixels in enumerate(found))
        tops, lefts = np.array([pixels.min(axis=0) for pixels in found]).T
        assert len(set(tops)) == 1 and (np.diff(lefts) > 64).all()
        corners.append((tops[0], lefts[0]))
    assert corners == sorted(corners)  # row by row
    if pictures == 1 and count == 12:
        assert len({left for _, left in corners}) == 4 and page.shape[1] < 2 * page.shape[0]


def test_heads_stand_over_the_first_row_and_are_cut():
    cells = [(Image.new("RGB", (64, 64)), Image.new("RGB", (64, 64)), "") for _ in range(2)]
    bare = np.asarray(visualize.sheet(cells, heads=(), side=64))
    page = np.asarray(visualize.sheet(cells, heads=("one", "a very long name of a model " * 9), side=64))
    assert page.shape[0] == bare.shape[0] + 28 and page.shape[1] == bare.shape[1]
    over = (page[28:56] != page[0, 0]).any(axis=(0, 2))  # columns with ink
    assert over[28:92].any() and over[98:162].any() and not over[162:].any()
    np.testing.assert_array_equal(page[56:], bare[28:])


def test_a_caption_that_is_too_long_is_cut_not_spilled():
    pair = (Image.new("RGB", (64, 64)), Image.new("RGB", (64, 64)), "a very long file name " * 20)
    page = np.asarray(visualize.sheet([pair], side=64))
    below = page[56 + 64 + 1 :]
    assert (below != page[0, 0]).any() and (below[:, -28:] == page[0, 0]).all()


@pytest.mark.parametrize("fonts", [visualize.FONTS, ()], ids=["fonts of the machine", "none"])
def test_no_letter_becomes_the_box_that_stands_for_what_a_font_lacks(fonts, monkeypatch):
    monkeypatch.setattr(visualize, "FONTS", fonts)
    for name in ("Käfer", "Ka\u0308fer", "łódź", "Ωmega", "細胞", "cell"):
        text, font = visualize.written(f"{name} 0.98", 15)
        box = bytes(font.getmask("\U0010ffff"))
        assert text.endswith(" 0.98") and all(bytes(font.getmask(letter)) != box for letter in text if letter != " ")
    assert visualize.written("Käfer", 15)[0] in ("Käfer", "Kafer")
    assert visualize.written("cell", 15)[0] == "cell"


def test_only_dim_pictures_are_brightened():
    gray = np.tile(np.arange(visualize.DIM, dtype=np.uint8).repeat(8)[:, None, None], (1, 400, 3))
    shown = np.asarray(visualize.draw(gray, []))
    assert shown[4].max() == 0 and shown[-4].min() == 255 and (np.diff(shown[:, 0, 0].astype(int)) >= 0).all()
    flat, bright = np.full_like(gray, 20), gray + np.uint8(1)
    for image in (flat, bright):
        np.testing.assert_array_equal(visualize.draw(image, []), image)
