"""What a client gets: which form, and the same pixels in each."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
from PIL import Image

from pipeline.generator import grid
from pipeline.serving import replies
from pipeline.serving.orders import Order, Sample
from pipeline.serving.painter import Drawn


def drawn(value: int) -> Drawn:
    pixels = np.random.default_rng(value).integers(0, 256, (3, 6, 6)).astype(np.uint8)
    return Drawn(pixels, 12.346, 2, 4)


def decoded(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png))).transpose(2, 0, 1)


@pytest.mark.parametrize(
    ("accept", "expected"),
    [
        ("", "png"),
        ("*/*", "png"),
        ("image/*", "png"),
        ("application/json", "json"),
        ("image/png;q=0.5, application/json", "json"),
        ("text/html, application/*;q=0.2", "json"),
        ("application/json;q=0.5, */*;q=0.8", "png"),
        ("image/png;q=many, application/json;q=0.1", "json"),
        ("text/html", None),
        ("image/png;q=0", None),
    ],
)
def test_accept_says_which_form(accept: str, expected: str | None) -> None:
    assert replies.form(accept) == expected


def test_one_image_is_itself_and_several_are_a_grid_as_of_the_command_line() -> None:
    a, b = drawn(1), drawn(2)
    samples = Sample(3, 5, 0, (1,)), Sample(7, 6, 1, (1,))
    assert np.array_equal(decoded(replies.picture(Order(samples[:1]), [a])), a.pixels)
    expected = grid.picture(["student"], [np.stack([a.pixels, b.pixels])], [3, 7])
    assert np.array_equal(decoded(replies.picture(Order(samples), [a, b])), np.asarray(expected).transpose(2, 0, 1))


def test_json_has_every_image_and_what_it_is() -> None:
    order = Order((Sample(3, 5, 0, (1,)), Sample(7, 6, 1, (1,))))
    found = replies.listed(order, [drawn(1), drawn(2)], 20.0)
    assert (found["model"], found["milliseconds"]) == ("student", 20.0)
    for image, sample, one in zip(found["images"], order.samples, (drawn(1), drawn(2)), strict=True):
        assert np.array_equal(decoded(base64.b64decode(image.pop("png"))), one.pixels)
        identity = {"label": sample.wanted, "seed": sample.seed, "id": sample.id}
        assert image == identity | {"milliseconds": 12.35, "in_batch": 2, "batch": 4}
