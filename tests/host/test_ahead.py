"""pytest tests/host/test_ahead.py"""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from pipeline.host.ahead import ahead


def test_the_next_item_is_made_while_the_last_one_is_used() -> None:
    began = [threading.Event() for _ in range(3)]

    def items() -> Iterator[int]:
        for i, event in enumerate(began):
            event.set()
            yield i

    seen = []
    for i in ahead(items()):
        seen.append(i)
        if i + 1 < len(began):
            assert began[i + 1].wait(10), "nobody makes the next one"
        if i + 2 < len(began):
            assert not began[i + 2].is_set(), "one ahead, not more"
    assert seen == [0, 1, 2]


def test_what_goes_wrong_is_raised_at_its_item() -> None:
    def items() -> Iterator[int]:
        yield 0
        raise ArithmeticError("no second one")

    made = ahead(items())
    assert next(made) == 0
    with pytest.raises(ArithmeticError, match="no second one"):
        next(made)


def test_nobody_is_left_when_the_consumer_stops() -> None:
    before = threading.active_count()
    made = ahead(iter(range(100)))
    assert next(made) == 0
    made.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before
