"""How far rows of one report are apart, with the error of the difference: their images are pairs, of the same noise."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from itertools import combinations

from pipeline.evaluation.plan import EvaluationPlan
from pipeline.report.comparison import MARGIN
from pipeline.report.results import Difference, Row
from pipeline.scoring.metrics import Jackknife

ERRORS = 2.0  # standard errors of a difference within which two rows are called indistinguishable


def differences(plan: EvaluationPlan, rows: list[Row], jackknives: Mapping[str, Jackknife]) -> list[Difference]:
    """The differences of the students' rows of each sampler, then of the own student's samplers.

    ``rows`` are those of the plan's table, ``jackknives`` those of their distances by name, of as many kept images of
    each row. A row without one, of which no or too few features were kept, has differences without errors.
    """
    scores, kept = {row["name"]: row["score"] for row in rows if "score" in row}, plan.table()[0].keep
    share, out = kept / plan.recipe.evaluate.count, list[Difference]()
    for one, other in _pairs(plan):
        apart, error = scores[one] - scores[other], None
        if one in jackknives and other in jackknives and (both := jackknives[one].minus(jackknives[other])):
            error = both.error * math.sqrt(share)
        out.append(
            {
                "first": one,
                "second": other,
                "difference": apart,
                "std": error,
                "count": plan.recipe.evaluate.count,
                "indistinguishable": indistinguishable(apart, error, max(scores[one], scores[other])),
            }
        )
    return out


def indistinguishable(apart: float, error: float | None, larger: float) -> bool | None:
    """Whether a difference is less than two standard errors of it, or than 1.3 % of the ``larger`` distance.

    None where the error is not known and the margin does not decide.
    """
    if abs(apart) < MARGIN * larger:
        return True
    return None if error is None else abs(apart) < ERRORS * error


def _pairs(plan: EvaluationPlan) -> Iterator[tuple[str, str]]:
    """The names of the rows that are told apart: all that one sampler drew with, then all of the own student."""
    groups: list[list[str]] = []
    for name, draw, _ in plan.lines():
        if draw.student and not draw.owner:
            groups.append([])
        if draw.student:
            groups[-1].append(name)
    for group in [*groups, [group[0] for group in groups]]:
        yield from combinations(group, 2)
