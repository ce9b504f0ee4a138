"""Scores over the size of the pair set, out of several reports."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.evaluation.plan import EvaluationPlan
from pipeline.models.base import Layout
from pipeline.recipe import Recipe
from pipeline.report import comparison
from pipeline.sampling.samplers import FewStep
from pipeline.settings.evaluate import EvaluateSettings
from pipeline.workflow import other_reports

PAIR_SETS: dict[str, Any] = {
    "count": 5000,
    "points": [{"pairs": 600, "name": "DD 1 step", "score": 9.0}, {"pairs": 1200, "name": "DD 1 step", "score": 7.0}],
    "curve": {
        "count": 1000,
        "axis": "epochs",
        "points": [
            {"pairs": pairs, "name": "DD 1 step", "x": x, "score": 12.0 - x}
            for pairs in (600, 1200)
            for x in (1.0, 2.0)
        ],
    },
    "reports": [{"uri": "s3://bucket/half/report.json", "SHA-256": "ab", "pairs": 600}],
}


def results(pairs: int, score: float, steps_per_epoch: int | None = 10) -> dict[str, Any]:
    """A report of two samplers whose student is of so many pairs."""
    return {
        "title": "FD",
        "rows": [
            {"name": "real images", "type": "real"},
            {"name": "teacher, AR", "type": "AR", "sampler": {"name": "Autoregressive"}, "score": 3.0},
            {"name": "DD 1 step", "type": "DD", "sampler": {"name": "FewStep", "steps": [1]}, "score": score},
        ],
        "curve": {
            "count": 100,
            "steps_per_epoch": steps_per_epoch,
            "teachers": {"teacher, AR": 3.5},
            "points": [{"step": step, "name": "DD 1 step", "score": score + 100 / step} for step in (20, 40)],
        },
        "made": {
            "count": 500,
            "seed": 2,
            "features SHA-256": {"scorer": "abc"},
            "reference": {"uri": "the digits", "images": 5000},
            "student": {"pairs_count": pairs, "pairs_fingerprint": "f", "precision": "fp32"},
        },
    }


def plan(tmp_path: Path, *uris: str, **exported: Any) -> EvaluationPlan:
    """A plan that would make ``results(1200, ...)``."""
    settings = EvaluateSettings(count=500, compare=uris)
    recipe = Recipe(run=str(tmp_path), evaluate=settings)
    student = {"pairs_count": 1200, "pairs_fingerprint": "f"} | exported
    facts = {"features": {"scorer": "abc"}, "reference": {"images": 5000}}
    return EvaluationPlan(recipe, Layout((1, 4), 24, 4, 10, 32), [FewStep(1)], 0, facts, exported=student)


def written(folder: Path, name: str, content: Any) -> str:
    (folder / name).write_text(json.dumps(content))
    return str(folder / name)


def test_scores_are_collected_by_the_count_of_pairs(tmp_path: Path) -> None:
    uris = [written(tmp_path, f"{n}.json", results(n, score)) for n, score in ((600, 9.0), (900, 8.0))]
    others = other_reports.read(plan(tmp_path, *uris), "FD")
    found = comparison.pair_sets(results(1200, 7.0), others)
    assert found is not None
    assert found["points"] == [
        {"pairs": pairs, "name": "DD 1 step", "score": score} for pairs, score in ((1200, 7.0), (600, 9.0), (900, 8.0))
    ]
    assert [(one["uri"], one["pairs"]) for one in found["reports"]] == [(uris[0], 600), (uris[1], 900)]
    assert found["curve"]["axis"] == "epochs"
    assert {"pairs": 600, "name": "DD 1 step", "score": 14.0, "x": 2.0} in found["curve"]["points"]
    assert len(found["curve"]["points"]) == 6
    json.dumps(found)


def test_a_row_counts_where_its_sampler_is_the_same(tmp_path: Path) -> None:
    other = results(600, 9.0)
    other["rows"][2] |= {"sampler": {"name": "FewStep", "steps": [1, 2]}}  # under the same name
    uri = written(tmp_path, "other.json", other)
    found = comparison.pair_sets(results(1200, 7.0), other_reports.read(plan(tmp_path, uri), "FD"))
    assert found is not None
    assert [point["pairs"] for point in found["points"]] == [1200]


def test_curves_need_every_report_and_epochs_every_length(tmp_path: Path) -> None:
    for change, expected in [
        (lambda other: other | {"curve": None}, None),
        (lambda other: other | {"curve": other["curve"] | {"count": 50}}, None),
        (lambda other: results(600, 9.0, steps_per_epoch=None), "optimiser step"),
    ]:
        uri = written(tmp_path, "other.json", change(results(600, 9.0)))
        found = comparison.pair_sets(results(1200, 7.0), other_reports.read(plan(tmp_path, uri), "FD"))
        assert found is not None
        assert (found["curve"] and found["curve"]["axis"]) == expected


def test_nothing_to_compare_is_no_comparison(tmp_path: Path) -> None:
    assert other_reports.read(plan(tmp_path), "FD") == []
    assert comparison.pair_sets(results(1200, 7.0), []) is None


def changed(path: str, value: Any) -> dict[str, Any]:
    """The smaller report with one value replaced, or left out where it is None."""
    found = copy.deepcopy(results(600, 9.0))
    *outer, last = path.split("/")
    inside: Any = found
    for key in outer:
        inside = inside[key]
    inside[last] = value
    if value is None:
        del inside[last]
    return found


@pytest.mark.parametrize(
    ("other", "sentence"),
    [
        (changed("title", "FID"), "whose title is FID where this recipe's is FD"),
        (changed("made/count", 50), "whose count is 50 where this recipe's is 500"),
        (changed("made/seed", 3), "whose seed is 3"),
        (changed("made/features SHA-256", {"scorer": "x"}), "whose scoring network is"),
        (changed("made/reference/images", 50), "whose reference is"),
        (changed("made/student/precision", "bf16"), "whose student's precision is bf16"),
        (changed("made/student/pairs_fingerprint", "g"), "whose pair set is g where this recipe's is f"),
        (changed("made/student/pairs_count", 1200), "of 1,200 pairs, as many as this recipe's student"),
        (changed("made/student/pairs_count", None), "does not hold the count of its student's pairs"),
        (changed("made/student", {}), "does not hold the count of its student's pairs"),
        (changed("made", None), "which is no report of this package"),
        ([1], "which is no report of this package"),
    ],
)
def test_reports_that_cannot_be_compared_are_refused(tmp_path: Path, other: Any, sentence: str) -> None:
    uri = written(tmp_path, "other.json", other)
    with pytest.raises(ValueError, match=sentence) as caught:
        other_reports.read(plan(tmp_path, uri), "FD")
    assert uri in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_student_without_a_count_and_a_missing_report_are_refused(tmp_path: Path) -> None:
    uri = written(tmp_path, "other.json", results(600, 9.0))
    silent = plan(tmp_path, uri)
    del silent.exported["pairs_count"]
    with pytest.raises(ValueError, match="needs a student that says from how many pairs"):
        other_reports.read(silent, "FD")
    with pytest.raises(FileNotFoundError, match=r"none\.json"):
        other_reports.read(plan(tmp_path, str(tmp_path / "none.json")), "FD")
    with pytest.raises(ValueError, match=r"as many as .*other\.json"):
        other_reports.read(plan(tmp_path, uri, uri), "FD")
