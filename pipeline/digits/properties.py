"""What can be seen on any image of a digit, real or drawn: which digit, how heavy, how slanted, and where it stands.

A combination is a row of five numbers, int64, in the order of ``PROPERTIES``: the digit, and for each of the others the
index of its word in ``WORDS``. Ink is where the mean of the three channels is above half of white.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

PROPERTIES = ("digit", "weight", "slant", "vertical place", "horizontal place")
WORDS: dict[str, tuple[str, str, str]] = {
    "weight": ("thin", "medium", "bold"),
    "slant": ("leaning left", "upright", "leaning right"),
    "vertical place": ("top", "middle", "bottom"),
    "horizontal place": ("left", "middle", "right"),
}
INK = 127.5  # of 255
# Quantiles of the 5,000 digits, which no shift changes: 30 and 70 % divide three words, 15 and 85 % are where the
# middle word begins to be wrong, 50 % is where an outer one does.
WIDTH_30, WIDTH_50, WIDTH_70 = 1.70, 1.95, 2.20
SLANT_15, SLANT_30, SLANT_50, SLANT_70, SLANT_85 = -0.15, -0.01, 0.14, 0.29, 0.44
OFF_CENTRE = 1.5  # pixels from the middle of the image to the middle of a digit that stands at a side


class Measurements(NamedTuple):
    """Of B images, float64 [B] each, NaN where an image has too little ink to say.

    Attributes:
        width: of the strokes in pixels, 2 area / length of the outline. A stroke much longer than wide has about its
            own width.
        slant: by how many columns the ink moves to the right, on average, for every row up.
        down, right: from the middle of the image to the middle of the smallest box around all ink, in pixels.
    """

    width: np.ndarray
    slant: np.ndarray
    down: np.ndarray
    right: np.ndarray


def measured(images: np.ndarray) -> Measurements:
    """Images uint8 [B, 3, H, W] -> what is measured on them. ValueError for arrays of another kind."""
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images are {images.dtype} {list(images.shape)}; give uint8 [B, 3, H, W].")
    ink = images.mean(axis=1) > INK
    area = ink.sum(axis=(1, 2)).astype(np.float64)
    framed = np.pad(ink, ((0, 0), (1, 1), (1, 1)))
    outline = sum((np.diff(framed, axis=axis)).sum(axis=(1, 2)) for axis in (1, 2))
    rows, columns = np.arange(ink.shape[1], dtype=np.float64), np.arange(ink.shape[2], dtype=np.float64)
    by_row, by_column = ink.sum(axis=2), ink.sum(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):  # no ink, or one row of it: NaN says so
        row, column = by_row @ rows / area, by_column @ columns / area
        variance = by_row @ rows**2 / area - row**2
        covariance = (ink @ columns) @ rows / area - row * column
        slant = np.where(variance > 0, -covariance / variance, np.nan)
        width = 2 * area / outline
    return Measurements(width, slant, _box_centre(by_row > 0), _box_centre(by_column > 0))


def _box_centre(used: np.ndarray) -> np.ndarray:
    """Which rows (or columns) hold ink, bool [B, H] -> the middle of their range less that of the image, [B]."""
    last = used.shape[1] - 1
    middle = (used.argmax(axis=1) + last - used[:, ::-1].argmax(axis=1)) / 2 - last / 2
    return np.where(used.any(axis=1), middle, np.nan)


def combinations(digits: np.ndarray, found: Measurements) -> np.ndarray:
    """Digits int64 [B] and what was measured on their images -> their combinations int64 [B, 5].

    ValueError where an image has too little ink to be described.
    """
    if not np.isfinite(np.stack(found)).all():
        raise ValueError("an image has too little ink to be described; give images of digits.")
    columns = [
        np.asarray(digits, dtype=np.int64),
        np.digitize(found.width, [WIDTH_30, WIDTH_70]),
        np.digitize(found.slant, [SLANT_30, SLANT_70]),
        *((place > -OFF_CENTRE).astype(np.int64) + (place >= OFF_CENTRE) for place in (found.down, found.right)),
    ]
    return np.stack(columns, axis=1)


def described(images: Tensor, digits: Tensor) -> np.ndarray:
    """Real images float32 [B, 3, 32, 32] in [-1, 1] and their labels int64 [B] -> their combinations int64 [B, 5]."""
    pixels = ((images + 1) * 127.5).round().to(torch.uint8).numpy()
    return combinations(digits.numpy(), measured(pixels))
