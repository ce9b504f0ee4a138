"""How far rows of pairs are apart: which are told apart, with which error, and how a report says it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pipeline.evaluation.differences import differences, indistinguishable
from pipeline.evaluation.draws import Draw, Line
from pipeline.report import comparison, tables
from pipeline.sampling.samplers import Autoregressive, FewStep, Sampler
from pipeline.scoring.metrics import Jackknife


def line(name: str, sampler: Sampler, owner: str = "") -> Line:
    return Line(name, Draw(sampler, 100, student="uri" if sampler.student else "", keep=25, owner=owner), {})


ONE, TWO = FewStep(1), FewStep(1, (1, 2))
LINES = [line("AR", Autoregressive()), line("one", ONE), line("one of a", ONE, "a"), line("one of b", ONE, "b")]
LINES += [line("two", TWO), line("two of a", TWO, "a"), line("two of b", TWO, "b")]
PLAN: Any = SimpleNamespace(
    lines=lambda: LINES,
    table=lambda: [line.draw for line in LINES],
    recipe=SimpleNamespace(evaluate=SimpleNamespace(count=100)),
)
SCORES = {"AR": 5.0, "one": 10.0, "one of a": 10.1, "one of b": 8.0, "two": 7.0, "two of a": 7.5, "two of b": 9.0}
ROWS: Any = [{"name": "real images"}, *({"name": name, "score": score} for name, score in SCORES.items())]


def of(*pseudo: float, times: float = 4.0) -> Jackknife:
    return Jackknife(np.array(pseudo), np.full(len(pseudo), times), float(np.mean(pseudo)))


def test_rows_of_a_sampler_and_the_own_samplers_are_told_apart() -> None:
    found = differences(PLAN, ROWS, {})
    assert [(one["first"], one["second"]) for one in found] == [
        ("one", "one of a"),
        ("one", "one of b"),
        ("one of a", "one of b"),
        ("two", "two of a"),
        ("two", "two of b"),
        ("two of a", "two of b"),
        ("one", "two"),
    ]
    assert [one["difference"] for one in found] == pytest.approx([-0.1, 2, 2.1, -0.5, -2, -1.5, 3])
    assert {one["count"] for one in found} == {100}


def test_without_features_there_is_no_error_and_no_verdict_but_the_margins() -> None:
    near, far, *_ = differences(PLAN, ROWS, {"one": of(1, 2, 3)})
    assert (near["std"], near["indistinguishable"]) == (None, True), "less than 1.3 % of the distance"
    assert (far["std"], far["indistinguishable"]) == (None, None)
    results: Any = {"title": "FD", "differences": [near, far]}
    table = tables.differences(results)
    assert table
    assert table.cells[0] == ["one", "one of a", "indistinguishable", "-0.10", "-", "100"]
    assert table.cells[1] == ["one", "one of b", "-", "+2.00", "-", "100"]
    assert tables.differences({"title": "FD"}) is None  # type: ignore[typeddict-item]


def test_the_error_is_of_pairs_and_shrinks_with_the_share_of_kept_features() -> None:
    """A quarter of the images' features were kept: half the error."""
    jackknives = {"two": of(1, 5, 9, 5), "two of a": of(2, 6, 11, 5), "two of b": of(9, 5, 1, 5)}
    by_pair = {(one["first"], one["second"]): one for one in differences(PLAN, ROWS, jackknives)}
    paired, opposite = by_pair["two", "two of a"], by_pair["two", "two of b"]
    assert paired["std"] == pytest.approx(0.5 * np.sqrt(np.var([-1, -1, -2, 0]) / 3))
    assert opposite["std"] == pytest.approx(0.5 * np.sqrt(np.var([-8, 0, 8, 0]) / 3))
    assert (paired["indistinguishable"], opposite["indistinguishable"]) == (False, True)
    other = differences(PLAN, ROWS, jackknives | {"two of a": of(1, 2, 3, 4, times=5)})
    assert [one["std"] for one in other if one["second"] == "two of a"] == [None], "groups of other rows"


def test_two_standard_errors_and_the_margin_decide() -> None:
    assert indistinguishable(0.99, 0.5, 10.0) is True
    assert indistinguishable(-1.01, 0.5, 10.0) is False
    assert indistinguishable(0.129, 0.001, 10.0) is True, "1.3 % of 10, however small the error"
    assert indistinguishable(0.131, 0.001, 10.0) is False
    assert indistinguishable(5.0, None, 10.0) is None


def test_what_the_differences_tell_is_not_told_again() -> None:
    rows: Any = [{"name": "a", "score": 10.0}, {"name": "b", "score": 10.01}, {"name": "c", "score": 10.02}]
    assert comparison.alike(rows, [("b", "a"), ("b", "c")]) == [("a", "c")]
