"""The agreement of images with their captions: what passes, what does not, ceiling and floor."""

from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.command_line import parse
from pipeline.digits import captioned, captions, networks, properties
from pipeline.digits.agreement import CaptionAgreement, agreement
from pipeline.host.errors import Refused
from pipeline.models import checkpoints
from pipeline.models.convnet import to_uint8

ROOT = Path(__file__).parents[2]
BAR = np.zeros((1, 3, 32, 32), dtype=np.uint8)  # a bold upright bar at the top, one pixel to the left of the middle
BAR[:, :, 2:18, 13:17] = 255


def logits(digit: int, count: int = 1) -> np.ndarray:
    return np.eye(10, dtype=np.float32)[[digit] * count]


@pytest.mark.parametrize(
    ("text", "satisfied"),
    [
        ("a 1", [True, False, False, False, False]),
        ("a 2", [False] * 5),
        ("a bold one upright at the top middle", [True] * 5),
        ("a thin 1 upright at the bottom middle", [True, False, True, False, True]),
        ("a 1 leaning left at the top left", [True, False, True, True, True]),
        ("a 1 leaning right at the middle right", [True, False, False, False, False]),
    ],
)
def test_what_is_named_is_held_against_the_image(text: str, satisfied: list[bool]) -> None:
    found = agreement(BAR, logits(1), [text])
    assert found.satisfied[0].tolist() == satisfied
    assert found.named[0].tolist() == (captions.named_by(text) != captions.UNNAMED).tolist()
    assert found.all_named().tolist() == [found.named[0].tolist() == satisfied]


@pytest.mark.parametrize(
    ("right", "passes"),
    [(-2, "left middle"), (-1, "left middle"), (0, "middle"), (1, "middle right"), (2, "middle right"), (3, "right")],
)
def test_a_pixel_beside_the_border_counts_as_either(right: int, passes: str) -> None:
    """A box of even width stands at half pixels: 14 is the middle."""
    image = np.zeros((1, 3, 32, 32), dtype=np.uint8)
    image[:, :, 8:24, 14 + right : 18 + right] = 255
    places = properties.WORDS["horizontal place"]
    texts = [f"a 1 at the {captions.place_of(0, i)}" for i in range(3)]
    found = agreement(np.repeat(image, 3, axis=0), logits(1, 3), texts)
    assert [word for word, so in zip(places, found.satisfied[:, 4], strict=True) if so] == passes.split()


def test_an_image_without_ink_satisfies_nothing_but_its_digit() -> None:
    found = agreement(np.zeros_like(BAR), logits(1), ["a bold one upright at the top middle"])
    assert found.satisfied.tolist() == [[True, False, False, False, False]]
    assert not found.all_named()[0]


def test_shares_are_of_the_images_that_name_a_property() -> None:
    named = np.array([[True, True, False, True, True], [True, False, False, True, True]])
    found = CaptionAgreement(
        named, named & np.array([[True, False, True, True, True], [True, True, True, True, False]])
    )
    shares = found.shares()
    assert np.isnan(shares.pop("slant"))
    assert shares == {"all": 0.0, "digit": 1.0, "weight": 0.0, "vertical place": 1.0, "horizontal place": 0.5}


def test_prompts_that_are_no_captions_are_refused() -> None:
    with pytest.raises(Refused, match="is no caption"):
        agreement(BAR, logits(1), ["a photo of a cat"])
    with pytest.raises(ValueError, match="give one each"):
        agreement(BAR, logits(1), ["a 1", "a 1"])


@torch.no_grad()
def test_ceiling_and_floor() -> None:
    """Real images through the tokenizer agree with their captions, and hardly ever with those of others."""
    table = captioned.unseen_captions(8, 300)
    texts = table["caption"].to_pylist()
    real = np.stack([table[name].to_numpy() for name in captioned.COLUMNS], axis=1).astype(np.int64)
    settings = parse(None, ["--config", str(ROOT / "jobs" / "recipes" / "digits-llamagen.yaml")]).teacher
    tokenizer = checkpoints.tokenizer(settings)
    pixels = to_uint8(tokenizer.decode(tokenizer.codebook[tokenizer.encode(captioned.shown(real)[0])]))
    seen = networks.scorer()(pixels / 127.5 - 1)[1].numpy()
    ceiling = agreement(pixels.numpy(), seen, texts).shares()
    floor = agreement(pixels.numpy(), seen, texts[1:] + texts[:1]).shares()
    assert ceiling["all"] > 0.95
    assert min(ceiling.values()) == ceiling["all"], "no property is harder than all of them together"
    assert floor["all"] < 0.05
    assert all(floor[name] < 0.65 for name in properties.PROPERTIES)
