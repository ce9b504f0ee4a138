"""The picture of many images: every pixel as it was drawn, and words that say what it is of."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.generator import grid


def images(count: int, side: int, seed: int = 0) -> np.ndarray:
    """Grey ones without white, so that letters and gaps are told apart from them."""
    return np.random.default_rng(seed).integers(40, 200, (count, 3, side, side), dtype=np.uint8)


def found(sheet: np.ndarray, image: np.ndarray, factor: int) -> list[tuple[int, int]]:
    """(top, left) of every place at which the picture has the image, enlarged."""
    large = image.transpose(1, 2, 0).repeat(factor, axis=0).repeat(factor, axis=1)
    side = len(large)
    places = zip(*np.nonzero((sheet == large[0, 0]).all(-1)), strict=True)
    return [(int(y), int(x)) for y, x in places if np.array_equal(sheet[y : y + side, x : x + side], large)]


@pytest.mark.parametrize(("side", "factor"), [(6, 11), (32, 2), (128, 1)])
@pytest.mark.parametrize("count", [1, 2, 7])
def test_every_image_is_there_once_and_no_pixel_is_mixed(count: int, side: int, factor: int) -> None:
    student, teacher = images(count, side, 1), images(count, side, 2)
    sheet = np.asarray(grid.picture(["DD 1 step", "teacher, FM"], [student, teacher], range(count)))
    for upper, lower in zip(student, teacher, strict=True):
        ((top, left),) = found(sheet, upper, factor)
        assert found(sheet, lower, factor) == [(top + side * factor + grid.GAP, left)], "the teacher's below"


def test_it_is_about_square_and_in_the_order_of_ids() -> None:
    these = images(64, 32)
    sheet = np.asarray(grid.picture(["DD 1 step"], [these], range(64)))
    assert sheet.shape[1] == 8 * 64 + 7 * grid.GAP, "no margin where there is one sampler"
    places = [found(sheet, one, 2)[0] for one in these]
    assert places == sorted(places)
    assert len({top for top, _ in places}) == 8


def test_rows_are_named_and_images_say_what_they_are_of() -> None:
    """Letters are ink: without names there is no margin, and another label is another picture."""
    these = images(2, 32)
    named = np.asarray(grid.picture(["DD 1 step", "teacher, FM"], [these, these], [3, 7]))
    (_, left), *_ = found(named, these[0], 2)
    assert left > 40
    assert (named[:, :left] < 255).any()
    plain, other = (np.asarray(grid.picture(["DD 1 step"], [these], wanted)) for wanted in ([3, 7], [8, 7]))
    (top, _), *_ = found(plain, these[0], 2)
    assert not np.array_equal(plain[:top], other[:top])
    assert np.array_equal(plain[top:], other[top:])


def test_a_long_prompt_stays_above_its_image() -> None:
    assert len(grid._head("a bold seven leaning right at the top left of a large page", 64)) == grid.LINES
    assert grid._head("a bold seven leaning right at the top left", 64)[-1].endswith("\u2026")
    assert grid._head("", 64) == ["(empty)"]
    assert all(grid._across(line) <= 66 for line in grid._head("W" * 60, 64)), "long words are broken"
