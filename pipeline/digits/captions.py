"""Captions of digits: a closed grammar that names properties, and the combinations that it keeps for the evaluation.

``a [thin|bold] DIGIT [leaning left|upright|leaning right] [at the PLACE]``: DIGIT is a numeral or a word, PLACE is one
of nine, from ``top left`` by ``middle`` to ``bottom right``. Medium weight has no word. What a caption names is a
combination as in ``properties``, with ``UNNAMED`` for the rest.

A tenth of the combinations is held out: no caption that a teacher or a student learns from names one completely. Every
word of them is learnt, also beside every other two: a network that draws such a combination has composed it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product

import numpy as np

from pipeline import noise
from pipeline.digits.properties import PROPERTIES, WORDS
from pipeline.host.errors import Refused

UNNAMED = -1
NAMED = 0.8  # probability that a caption names a property
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
MEDIUM = WORDS["weight"].index("medium")
DIGIT, WEIGHT, SLANT, VERTICAL, HORIZONTAL = range(len(PROPERTIES))
PLACE = (VERTICAL, HORIZONTAL)
FORMS = 2  # of a digit: its numeral, its word
DRAWS = 5  # of a caption: form, weight, slant, place, and what stays unnamed of a combination that is held out


def place_of(vertical: int, horizontal: int) -> str:
    """``top left``, ``top middle``, ... and ``middle`` for the middle of both."""
    words = (WORDS["vertical place"][vertical], WORDS["horizontal place"][horizontal])
    return words[0] if words == ("middle", "middle") else " ".join(words)


PLACES = {place_of(*pair): pair for pair in product(range(3), range(3))}


def caption(named: Sequence[int] | np.ndarray, form: int = 0) -> str:
    """What names the properties ``named`` (five numbers, ``UNNAMED`` where it is to say nothing) in words.

    ``form`` 0 writes the digit as a numeral, 1 as a word. Both places are named, or none.
    """
    digit, weight, slant, vertical, horizontal = (int(value) for value in named)
    words = ["a"]
    if weight not in (UNNAMED, MEDIUM):
        words.append(WORDS["weight"][weight])
    words.append(DIGITS[digit] if form else str(digit))
    if slant != UNNAMED:
        words.append(WORDS["slant"][slant])
    if vertical != UNNAMED:
        words.append(f"at the {place_of(vertical, horizontal)}")
    return " ".join(words)


def named_by(text: str) -> np.ndarray:
    """A caption -> what it names, int64 [5] with ``UNNAMED`` for the rest; Refused for text outside the grammar.

    Capital letters and the number of blanks do not matter.
    """
    found = _LEXICON.get(" ".join(text.lower().split()))
    if found is None:
        raise Refused(
            f"{text[:60]!r} is no caption of the digits; they read 'a [thin|bold] DIGIT [leaning left|upright|leaning"
            " right] [at the PLACE]', as in 'a bold 7 leaning right at the top left'."
        )
    return np.array(found, dtype=np.int64)


def every_caption() -> Iterator[tuple[str, tuple[int, ...]]]:
    """All captions of the grammar, each with what it names."""
    unnamed = (UNNAMED,)
    places = [*PLACES.values(), unnamed * 2]
    weights = (WORDS["weight"].index("thin"), UNNAMED, WORDS["weight"].index("bold"))
    for form, digit, weight, slant, place in product(range(FORMS), range(10), weights, (0, 1, 2, UNNAMED), places):
        named = (digit, weight, slant, *place)
        yield caption(named, form), named


_LEXICON = dict(every_caption())


def held_out(combinations: np.ndarray) -> np.ndarray:
    """Which combinations, int64 [..., 5], are kept for the evaluation, bool [...]: 81 of the 810.

    Whatever two properties are named, at most 4 in 27 completions are held out, of three 2 in 9.
    """
    return (combinations @ np.array([1, 1, 2, 3, 4]) % 10) == 0


def reveals(named: np.ndarray) -> np.ndarray:
    """Which of ``named`` int64 [..., 5] name a combination that is held out completely, bool [...].

    A caption without a word for the weight is read as one of medium weight: whether it left the word out or had none
    to say, its text is the same.
    """
    complete = (named[..., SLANT] != UNNAMED) & (named[..., VERTICAL] != UNNAMED)
    read = named.copy()
    read[..., WEIGHT] = np.where(read[..., WEIGHT] == UNNAMED, MEDIUM, read[..., WEIGHT])
    return complete & held_out(read)


def composed(combinations: np.ndarray, seed: int, ids: Sequence[int] | np.ndarray) -> list[str]:
    """Captions for training: of combinations int64 [B, 5], each a function of its combination, seed and id.

    Weight, slant and place are named with probability ``NAMED`` each. What would name a combination that is held out
    leaves its slant or its place unnamed instead.
    """
    drawn = noise.uniform(seed, ids, DRAWS)
    named = combinations.copy()
    for draw, told_together in ((1, (WEIGHT,)), (2, (SLANT,)), (3, PLACE)):
        for one in told_together:
            named[drawn[:, draw] >= NAMED, one] = UNNAMED
    told, slanted = reveals(named), drawn[:, 4] < 0.5
    named[told & slanted, SLANT] = UNNAMED
    for one in PLACE:
        named[told & ~slanted, one] = UNNAMED
    return [caption(row, form) for row, form in zip(named, (drawn[:, 0] * FORMS).astype(int), strict=True)]


def complete(combinations: np.ndarray, seed: int, ids: Sequence[int] | np.ndarray) -> list[str]:
    """Captions that name all of their combinations int64 [B, 5]; only the form of the digit is drawn."""
    forms = (noise.uniform(seed, ids, DRAWS)[:, 0] * FORMS).astype(int)
    return [caption(row, form) for row, form in zip(combinations, forms, strict=True)]
