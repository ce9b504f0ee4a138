"""Prompts as pictures and pages show them."""

from __future__ import annotations

import warnings

import pytest

from pipeline.report import lettering
from pipeline.report.lettering import BOX


@pytest.mark.parametrize(
    ("prompt", "line"),
    [
        ("a cat", "a cat"),
        (" two\nlines,\ta tab  and blanks ", "two lines, a tab and blanks"),
        ("", "(empty)"),
        (" \n", "(empty)"),
        ("nul\x00bell\x07", f"nul{BOX}bell{BOX}"),
        ("right-to-left \u202eoverride", f"right-to-left {BOX}override"),
        ("漢字", BOX * 2),
        ("🦄", BOX),
        ("é ß", "é ß"),
        ("x" * 60, "x" * 60),
        ("x" * 61, "x" * 59 + "…"),
        ("word " * 2000, "word " * 11 + "word…"),
    ],
)
def test_a_picture_shows_one_line_that_its_font_can_draw(prompt: str, line: str) -> None:
    assert lettering.shown(prompt) == line
    assert len(lettering.shown(prompt)) <= lettering.LONGEST


def test_lines_are_as_narrow_as_asked() -> None:
    for text in ("a three upright at the middle", "W" * 60, "Incomprehensibilities of counterrevolutionaries", "مرحبا"):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            lines = lettering.wrapped(text, 60, 7)
        assert all(lettering._width(line, 7) <= 60 for line in lines)
        assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    assert lettering.wrapped("a three upright", 60, 7) == ["a three", "upright"]
    assert lettering.wrapped("ab", 1, 7) == ["a", "b"], "a letter is never cut"


def test_a_page_shows_the_whole_prompt() -> None:
    assert lettering.printable("x" * 10_000) == "x" * 10_000
    assert lettering.printable("two\nlines \x00 漢字 🦄") == f"two\nlines {BOX} 漢字 🦄"
    assert lettering.printable("\n") == lettering.printable("") == "(empty)"
