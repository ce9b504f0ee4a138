"""Rows and reports beside one another: which distances are too close to tell apart, and scores over the count of pairs.

The latter, out of the reports of several runs, are the paper's Fig. 8. Numbers in, numbers out.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from itertools import combinations

from pipeline.report.results import (
    ComparedReport,
    OtherReport,
    PairSetCurve,
    PairSetCurvePoint,
    PairSetPoint,
    PairSets,
    Results,
    Row,
    TrainingCurve,
)

MARGIN = 0.013  # of a distance: rows that are closer are not told apart, however small their standard errors


def alike(rows: list[Row], told: Collection[tuple[str, str]] = ()) -> list[tuple[str, str]]:
    """The pairs of rows whose distances are too close to tell one from the other, the nearest first.

    Pairs of names in ``told`` are left out: of these the error of the difference itself is known.

    Too close is less than the larger standard error, or than ``MARGIN`` of the distance where that is more: the images
    are of one seed and one student, and the error knows of neither.
    """
    scored = sorted((row for row in rows if row.get("score") is not None), key=lambda row: row["score"])
    pairs = []
    for one, other in combinations(scored, 2):
        if {(one["name"], other["name"]), (other["name"], one["name"])} & set(told):
            continue
        apart = other["score"] - one["score"]
        if apart < max(one.get("score_std") or 0, other.get("score_std") or 0, MARGIN * other["score"]):
            pairs.append((apart, one["name"], other["name"]))
    return [(one, other) for _, one, other in sorted(pairs)]


def pair_sets(results: Results, others: list[OtherReport]) -> PairSets | None:
    """The scores of this report and the others over the count of pairs: {count, points, curve, reports}.

    ``results`` needs its rows, curve and made. Rows are those of samplers with a student; another report's row counts
    where its sampler is the same. The curve holds the students exported along the way, over epochs where every report
    knows its own, else over optimiser steps.
    """
    if not others:
        return None
    named = {json.dumps(row["sampler"]): row["name"] for row in results["rows"] if _of_student(row)}
    points: list[PairSetPoint] = []
    curves = []
    for report in [results, *(other["results"] for other in others)]:
        pairs = _pairs_count(report)
        rows = [row for row in report["rows"] if not row.get("student")]
        names = {row["name"]: named.get(json.dumps(row.get("sampler"))) for row in rows}
        for row in rows:
            if name := names[row["name"]]:
                points.append({"pairs": pairs, "name": name, "score": row["score"]})
        curves.append((pairs, names, report["curve"]))
    reports: list[ComparedReport] = [
        {"uri": other["uri"], "SHA-256": other["SHA-256"], "pairs": _pairs_count(other["results"])} for other in others
    ]
    return {"count": results["made"]["count"], "points": points, "curve": _curve(curves), "reports": reports}


def _of_student(row: Row) -> bool:
    """Whether the report's own student drew a row; another one that stands beside it did not."""
    return row.get("type") in ("DD", "DD + AR") and not row.get("student")


def _pairs_count(results: Results) -> int:
    student = results["made"]["student"]
    assert student is not None  # every report here names its student
    return student["pairs_count"]


def _curve(curves: list[tuple[int, dict[str, str | None], TrainingCurve | None]]) -> PairSetCurve | None:
    """The students exported along the way of every report, if all have them, of equally many images each.

    Of each report the count of its pairs, this report's names for its samplers, and its curve.
    """
    given = [(pairs, names, curve) for pairs, names, curve in curves if curve]
    if len(given) < len(curves) or len({curve["count"] for _, _, curve in given}) > 1:
        return None
    epochs = all(curve.get("steps_per_epoch") for _, _, curve in given)
    points: list[PairSetCurvePoint] = []
    for pairs, names, curve in given:
        per_epoch = curve.get("steps_per_epoch")
        for point in curve["points"]:
            if name := names.get(point["name"]):
                x = point["step"] / per_epoch if epochs and per_epoch else point["step"]
                points.append({"pairs": pairs, "name": name, "score": point["score"], "x": x})
    return {"count": given[0][2]["count"], "axis": "epochs" if epochs else "optimiser step", "points": points}
