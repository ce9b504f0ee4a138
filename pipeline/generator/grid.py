"""Many images as one picture to look at: what each was drawn for above it, and, of several samplers, whose row it is.

No pixel is mixed with another: small images are enlarged by a whole factor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from pipeline.report import lettering

GAP = 4  # white pixels between images, and around letters
LEAST_CELL = 64  # pixels of an image's side, to which small ones are enlarged
POINTS = 8.0  # size of the letters
LINES = 3  # of a prompt, at most
INK, FAINT = (30, 30, 30), (120, 120, 120)


def picture(names: Sequence[str], rows: Sequence[np.ndarray], wanted: Sequence[Any]) -> Image.Image:
    """Images uint8 [N, 3, H, W] of each of the samplers ``names``, drawn for ``wanted`` [N], as one picture.

    It is about square: lines of images with what they are of on top, and in each a row of every sampler, named on the
    left where there is more than one.
    """
    count, _, height, width = rows[0].shape
    factor = max(1, round(LEAST_CELL / max(height, width)))
    columns = min(count, math.ceil((count * len(rows)) ** 0.5))
    heads, letters = [_head(one, width * factor) for one in wanted], _line()
    left = max(map(_across, names)) + 3 * GAP if len(names) > 1 else 0
    lines = [range(start, min(start + columns, count)) for start in range(0, count, columns)]
    tall = [max(len(heads[i]) for i in line) * letters + len(rows) * (height * factor + GAP) for line in lines]
    size = left + columns * (width * factor + GAP) - GAP, sum(tall) + 2 * GAP * (len(lines) - 1) - GAP
    sheet = Image.new("RGB", size, "white")
    drawing, top = ImageDraw.Draw(sheet), 0
    for line, tallness in zip(lines, tall, strict=True):
        below = top + tallness - len(rows) * (height * factor + GAP)
        for column, i in enumerate(line):
            x = left + column * (width * factor + GAP)
            for k, text in enumerate(heads[i]):
                drawing.text((x, top + k * letters), text, INK, _font())
            for k, images in enumerate(rows):
                large = images[i].transpose(1, 2, 0).repeat(factor, axis=0).repeat(factor, axis=1)
                sheet.paste(Image.fromarray(large), (x, below + k * (height * factor + GAP)))
        for k, name in enumerate(names if left else ()):
            middle = below + k * (height * factor + GAP) + (height * factor - letters) // 2
            drawing.text((GAP, middle), name, FAINT, _font())
        top += tallness + 2 * GAP
    return sheet


def _head(wanted: Any, width: int) -> list[str]:
    """What stands above an image: its class, or the beginning of its prompt in short lines."""
    lines = lettering.wrapped(lettering.shown(str(wanted)), width, POINTS)
    return lines if len(lines) <= LINES else [*lines[: LINES - 1], lines[LINES - 1][:-2].rstrip() + lettering.ELLIPSIS]


def _font() -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(lettering.font_file(), round(POINTS * lettering.DPI / 72))


def _line() -> int:
    """Pixels from a line of letters to the next."""
    return round(1.35 * POINTS * lettering.DPI / 72)


def _across(text: str) -> int:
    return round(_font().getlength(text))
