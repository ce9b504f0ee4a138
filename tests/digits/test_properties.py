"""Width, slant and place of shapes that are drawn to have them."""

import numpy as np
import pytest

from pipeline.digits import networks, properties
from pipeline.digits.properties import PROPERTIES, WORDS


def blank(count: int = 1) -> np.ndarray:
    return np.zeros((count, 3, 32, 32), dtype=np.uint8)


def bar(width: int, top: int = 6, left: int = 15) -> np.ndarray:
    """An upright bar, 20 pixels high."""
    image = blank()
    image[:, :, top : top + 20, left : left + width] = 255
    return image


def slope(columns: float) -> np.ndarray:
    """A line of 21 rows, two pixels wide, whose ink moves by ``columns`` to the right with every row up."""
    image = blank()
    for row in range(6, 27):
        place = round(16 + columns * (16 - row))
        image[:, :, row, place : place + 2] = 255
    return image


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_the_width_of_a_long_stroke_is_about_its_own(width: int) -> None:
    found = properties.measured(bar(width)).width[0]
    assert found == pytest.approx(2 * 20 * width / (2 * 20 + 2 * width))
    assert width * 0.8 < found <= width


@pytest.mark.parametrize("columns", [-1.0, -0.5, 0.0, 0.5, 1.0])
def test_the_slant_is_columns_per_row_up(columns: float) -> None:
    assert properties.measured(slope(columns)).slant[0] == pytest.approx(columns, abs=0.02)


def test_a_place_is_that_of_the_box_around_the_ink() -> None:
    image = blank()
    image[:, :, 4:10, 20:30] = 255
    image[:, :, 25, 2] = 127  # too dark for ink
    found = properties.measured(image)
    assert (found.down[0], found.right[0]) == (6.5 - 15.5, 24.5 - 15.5)
    centred = properties.measured(bar(2))
    assert (centred.down[0], centred.right[0]) == (0, 0)


def test_ink_is_the_mean_of_the_channels() -> None:
    image = blank()
    image[:, 0, 8, 8] = 255
    assert np.isnan(properties.measured(image).down[0])
    image[:, 1, 8, 8] = 128
    assert properties.measured(image).down[0] == 8 - 15.5


def test_an_image_without_ink_has_no_properties() -> None:
    found = properties.measured(np.concatenate([blank(), bar(2)]))
    assert np.isnan(np.stack(found)).T.tolist() == [[True] * 4, [False] * 4]
    with pytest.raises(ValueError, match="too little ink"):
        properties.combinations(np.array([3]), properties.measured(blank()))


def test_one_row_of_ink_has_no_slant() -> None:
    image = blank()
    image[:, :, 9, 9:20] = 255
    assert np.isnan(properties.measured(image).slant[0])


@pytest.mark.parametrize(
    ("image", "index", "word"),
    [
        (bar(1), 1, "thin"),
        (bar(2), 1, "medium"),
        (bar(3), 1, "bold"),
        (slope(-0.5), 2, "leaning left"),
        (slope(0.1), 2, "upright"),
        (slope(0.5), 2, "leaning right"),
        (bar(2, top=4), 3, "top"),
        (bar(2, top=5), 3, "middle"),
        (bar(2, top=7), 3, "middle"),
        (bar(2, top=8), 3, "bottom"),
        (bar(2, left=13), 4, "left"),
        (bar(3, left=14), 4, "middle"),
        (bar(2, left=17), 4, "right"),
    ],
)
def test_a_combination_names_the_words(image: np.ndarray, index: int, word: str) -> None:
    row = properties.combinations(np.array([7]), properties.measured(image))[0]
    assert row[0] == 7
    assert WORDS[PROPERTIES[index]][row[index]] == word


def test_the_borders_are_quantiles_of_the_digits_and_no_shift_changes_them() -> None:
    images, labels = networks.images_and_labels()
    found = properties.described(images, labels)
    for index in (1, 2):
        shares = np.bincount(found[:, index], minlength=3) / len(found)
        assert np.abs(shares - [0.3, 0.4, 0.3]).max() < 0.01
    at_centre = properties.described(*networks.centred())
    assert (at_centre[:, :3] == found[:, :3]).all()
    assert (at_centre[:, 3:] != found[:, 3:]).any()
    pixels = ((images + 1) * 127.5).round().byte().numpy()
    measured = properties.measured(pixels)
    quantiles = [np.quantile(measured.width, 0.5), *np.quantile(measured.slant, [0.15, 0.5, 0.85])]
    kept = [properties.WIDTH_50, properties.SLANT_15, properties.SLANT_50, properties.SLANT_85]
    assert np.allclose(quantiles, kept, atol=0.01)
    assert np.bincount(found[:, 3]).min() > 1000, "every word for a place is common"
    assert np.bincount(found[:, 4]).min() > 1000


@pytest.mark.parametrize("images", [np.zeros((1, 3, 32, 32)), np.zeros((1, 32, 32), dtype=np.uint8)])
def test_images_of_another_kind_are_refused(images: np.ndarray) -> None:
    with pytest.raises(ValueError, match="give uint8"):
        properties.measured(images)
