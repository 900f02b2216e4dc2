"""`polarmask benchmark` runs, and counts what it says it counts; the numbers themselves belong to no test."""

import pytest

from polarmask_tf import benchmark


@pytest.mark.parametrize(
    ("part", "arguments", "units"),
    [
        (benchmark._targets, (1,), ["ms", "ms"]),
        (benchmark._pipeline, (1,), ["images/s/core", "images/s/core", "ms"]),
        (benchmark._convert, (6,), ["images/s/core", "images/s/core"]),
        (benchmark._rle, (1,), ["ms"]),
        (benchmark._evaluation, (4, 3), ["times"]),
    ],
)
def test_every_part_gives_rows(part, arguments, units):
    rows = part(*arguments)
    assert [row["unit"] for row in rows] == units
    assert all(row["value"] > 0 and row["what"] for row in rows)


def test_the_scene_has_about_as_many_positives_as_the_released_codes():
    assert "111 positives" in benchmark._targets(1)[0]["what"]  # 108 there
