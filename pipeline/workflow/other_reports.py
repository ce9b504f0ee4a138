"""The reports of other runs that a recipe wants beside its own, once they are known to be comparable.

A pair set grows without changing what is there, so runs that differ in ``pairs.count`` alone saw nested sets. Nothing
is drawn or trained here: each run wrote its report, and this one reads them.
"""

from __future__ import annotations

import json
from typing import Any

from pipeline import storage
from pipeline.evaluation.plan import EvaluationPlan
from pipeline.host.errors import Refused
from pipeline.report.results import OtherReport

WITHOUT_COUNT = "it was written before students said from how many pairs they are; distil and evaluate that run again"


def read(plan: EvaluationPlan, title: str) -> list[OtherReport]:
    """The reports at ``evaluate.compare``, {"uri", "SHA-256", "results"} each, in the recipe's order.

    Raises FileNotFoundError or ValueError, one sentence, for one that is not there or not a report, and for one whose
    scores this report's cannot stand beside: scored by another network or on other images, a student of another
    precision or another pair set, or of as many pairs as one before it.
    """
    out: list[OtherReport] = []
    uris = plan.recipe.evaluate.compare
    if not uris:
        return out
    if "pairs_count" not in plan.exported:
        raise Refused(
            f"evaluate.compare needs a student that says from how many pairs it was distilled, and {plan.student} does"
            " not, or no sampler asks for it; leave evaluate.compare out, or distil it again with this version."
        )
    own = _facts(json.loads(json.dumps(_own(plan, title))), "this recipe")
    counts = {own["pairs"]: "this recipe's student"}
    for uri in uris:
        results = storage.read_json(uri)
        found = _facts(results, uri)
        for key in own.keys() - {"pairs"}:
            if found[key] != own[key]:
                raise Refused(
                    f"evaluate.compare names {uri}, whose {key} is {found[key]} where this recipe's is {own[key]};"
                    " only reports that differ in pairs.count alone can be compared."
                )
        if found["pairs"] in counts:
            raise Refused(
                f"evaluate.compare names {uri}, whose student is of {found['pairs']:,} pairs, as many as"
                f" {counts[found['pairs']]}; leave one of them out."
            )
        counts[found["pairs"]] = uri
        out.append({"uri": uri, "SHA-256": storage.sha256(uri), "results": results})
    return out


def _own(plan: EvaluationPlan, title: str) -> dict[str, Any]:
    """The facts of the report to come, where a finished one has them."""
    settings = plan.recipe.evaluate
    student = {key: plan.exported.get(key) for key in ("pairs_count", "pairs_fingerprint")}
    origin = {"count": settings.count, "seed": settings.seed, "features SHA-256": plan.facts["features"]}
    origin["reference"] = plan.facts["reference"]
    return {"title": title, "made": origin | {"student": student | {"precision": settings.precision}}}


def _facts(results: Any, uri: str) -> dict[str, Any]:
    """What compared reports must share, and the count of pairs, in which they must differ."""
    try:
        origin = results["made"]
        student = origin["student"] or {}
        facts = {"title": results["title"], "count": origin["count"], "seed": origin["seed"]}
        facts |= {"scoring network": origin["features SHA-256"], "student's precision": student.get("precision")}
        facts["reference"] = {key: value for key, value in origin["reference"].items() if key != "uri"}
        facts |= {"pair set": student.get("pairs_fingerprint")}
    except (KeyError, TypeError, AttributeError):
        raise Refused(
            f"evaluate.compare names {uri}, which is no report of this package; give the URI of a report.json."
        ) from None
    if "pairs_count" not in student:
        raise Refused(
            f"evaluate.compare names {uri}, which does not hold the count of its student's pairs; {WITHOUT_COUNT}."
        )
    return facts | {"pairs": student["pairs_count"]}
