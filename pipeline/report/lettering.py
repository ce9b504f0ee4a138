"""Prompts as a picture can show them: one line of text that the font can draw, cut, and broken into short lines.

Prompts are what their users fed: of any length, in any script, with control characters. A picture shows their
beginning, a page all of them.
"""

from __future__ import annotations

import unicodedata
from functools import lru_cache
from typing import Any

from matplotlib import font_manager

LONGEST = 60  # characters of a prompt in a picture
BOX = "\u25a1"  # stands for what cannot be drawn
ELLIPSIS = "\u2026"
EMPTY = "(empty)"  # for a prompt that has nothing to show
DPI = 100  # of the pictures with prompts


def shown(prompt: str) -> str:
    """The beginning of a prompt, at most ``LONGEST`` characters on one line, all of which the font has.

    Blanks, tabs and newlines become one blank; other control characters and those without a glyph become ``BOX``.
    """
    line = " ".join(prompt.split())
    if len(line) > LONGEST:
        line = line[: LONGEST - 1].rstrip() + ELLIPSIS
    return "".join(letter if _has_glyph(letter) else BOX for letter in line) or EMPTY


def printable(prompt: str) -> str:
    """A whole prompt for a page: control characters but tabs and newlines become ``BOX``; ``EMPTY`` for none."""
    kept = "".join(BOX if unicodedata.category(c) == "Cc" and c not in "\t\n\r" else c for c in prompt)
    return kept if kept.strip() else EMPTY


def wrapped(text: str, width: float, size: float) -> list[str]:
    """A line of text in lines of at most ``width`` pixels at ``size`` points; longer words are broken anywhere.

    A single letter that is wider stands on a line of its own.
    """
    lines: list[str] = []
    for word in text.split(" "):
        if lines and _width(f"{lines[-1]} {word}", size) <= width:
            lines[-1] += f" {word}"
            continue
        lines.append("")
        for letter in word:
            if lines[-1] and _width(lines[-1] + letter, size) > width:
                lines.append("")
            lines[-1] += letter
    return lines


def _has_glyph(letter: str) -> bool:
    return not unicodedata.category(letter).startswith("C") and ord(letter) in _glyphs()


@lru_cache(1)
def _glyphs() -> frozenset[int]:
    """The code points that the pictures' font can draw."""
    return frozenset(_font().get_charmap())


def _width(text: str, size: float) -> float:
    """Pixels across a line of text."""
    font = _font()
    font.set_size(size, DPI)
    font.set_text(text, 0.0)
    return font.get_width_height()[0] / 64  # FreeType counts in 64ths of a pixel


def font_file() -> str:
    """Path of the pictures' font, a TrueType file that matplotlib ships."""
    return str(font_manager.findfont(font_manager.FontProperties()))


def _font() -> Any:
    return font_manager.get_font(font_file())
