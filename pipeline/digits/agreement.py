"""How far images of digits are what their captions ask for, property by property: the digits' measure of prompts.

The digit is the scorer's. A property near a border between two words counts as either, so that an image is not blamed
for half a pixel: real images through the tokenizer reach nearly 1, and images beside other images' captions little.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from pipeline.digits import captions, properties
from pipeline.digits.captions import UNNAMED

SLACK = 1.0  # pixels by which a digit may miss its place


class CaptionAgreement(NamedTuple):
    """Of B images, in the order of ``properties.PROPERTIES``: what is named and what of that is so, bool [B, 5].

    ``satisfied`` is False where nothing is named. Rows of several batches may simply be stacked.
    """

    named: np.ndarray
    satisfied: np.ndarray

    def all_named(self) -> np.ndarray:
        """Which images satisfy every property that their captions name, bool [B]."""
        return (self.satisfied == self.named).all(axis=1)

    def shares(self) -> dict[str, float]:
        """Of all images those that satisfy every property named ("all"), and by property, of those that name it.

        A property that no caption names is NaN.
        """
        counts, satisfied = self.named.sum(axis=0), self.satisfied.sum(axis=0)
        each = [float(part / whole) if whole else float("nan") for part, whole in zip(satisfied, counts, strict=True)]
        return {"all": float(self.all_named().mean())} | dict(zip(properties.PROPERTIES, each, strict=True))


def agreement(images: np.ndarray, logits: np.ndarray, prompts: Sequence[str]) -> CaptionAgreement:
    """Images uint8 [B, 3, 32, 32], the scorer's logits [B, 10] of them, and the captions they were drawn for.

    Refused for a prompt outside the captions' grammar, ValueError where there are not as many of each.
    """
    if not len(images) == len(logits) == len(prompts):
        raise ValueError(f"{len(images)} images, {len(logits)} rows of logits, {len(prompts)} prompts; give one each.")
    asked = np.stack([captions.named_by(text) for text in prompts])
    found = properties.measured(images)
    so = np.stack(
        [
            logits.argmax(axis=1) == asked[:, captions.DIGIT],
            _within(found.width, asked[:, captions.WEIGHT], _WIDTHS),
            _within(found.slant, asked[:, captions.SLANT], _SLANTS),
            _within(found.down, asked[:, captions.VERTICAL], _PLACES),
            _within(found.right, asked[:, captions.HORIZONTAL], _PLACES),
        ],
        axis=1,
    )
    named = asked != UNNAMED
    return CaptionAgreement(named, named & so)


_OPEN = np.inf
_NEAR, _FAR = properties.OFF_CENTRE - SLACK, properties.OFF_CENTRE - 0.5 + SLACK  # boxes stand at half pixels
# Lowest and highest measurement that passes for each of the three words.
_WIDTHS = np.array([(-_OPEN, properties.WIDTH_50), (-_OPEN, _OPEN), (properties.WIDTH_50, _OPEN)])
_SLANTS = np.array(
    [
        (-_OPEN, properties.SLANT_50),
        (properties.SLANT_15, properties.SLANT_85),
        (properties.SLANT_50, _OPEN),
    ]
)
_PLACES = np.array([(-_OPEN, -_NEAR), (-_FAR, _FAR), (_NEAR, _OPEN)])


def _within(measured: np.ndarray, asked: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """Whether measurements [B] pass for the words ``asked`` [B]; NaN passes for none."""
    low, high = bounds[asked].T
    return (low <= measured) & (measured <= high)
