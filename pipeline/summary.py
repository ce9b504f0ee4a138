"""From statistics and seconds to the numbers of the report: one JSON value that holds everything it says."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from pipeline import comparison, sampler_list, scoring
from pipeline.metrics import frechet, pixel_frechet, precision_recall
from pipeline.models import checkpoints
from pipeline.plan import Draw, Plan
from pipeline.recipe import EvaluateSettings, fingerprint
from pipeline.samplers import Autoregressive, Sampler
from pipeline.speed import Speed
from pipeline.tally import Statistics

VERSIONS = ("torch", "numpy", "scipy", "ray")
FORMAT = 2  # of report.json: an older one is written again, from the same statistics and times


@dataclass(frozen=True)
class Entry:
    """A row of the table before its numbers: a sampler's images and its speed.

    ``parameters`` are those of its network, None where it asks none; ``paper`` the figures that the paper prints.
    """

    name: str
    kind: str
    settings: dict[str, Any]
    steps: int
    statistics: Statistics
    speeds: list[Speed] = field(default_factory=list)
    type: str = "baseline"
    parameters: int | None = None
    paper: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Reference:
    """What images are compared with: feature mean and covariance, and the real images' statistics where
    there are any.
    """

    gaussian: tuple[np.ndarray, np.ndarray]
    real: Statistics | None


def title(settings: EvaluateSettings) -> str:
    """What the report calls its Fréchet distance."""
    return "FD" if settings.features == "digits" else "FID"


def summarise(
    plan: Plan, statistics: dict[Draw, Statistics], timing: dict[str, Any], others: list[dict[str, Any]]
) -> dict[str, Any]:
    """Everything the report says, as JSON values; ``others`` as ``comparison.read`` found them."""
    reference = _reference(plan, statistics)
    entries = _entries(plan, statistics, timing)
    by_kind = {entry.kind: entry.statistics for entry in entries}
    baseline = next(iter(timing["speeds"].get(Autoregressive(), [])), None)
    second = plan.second()
    found: dict[str, Any] = {
        "name": plan.recipe.name,
        "title": title(plan.recipe.evaluate),
        "fingerprint": plan.fingerprint(),
        "shown": shown(plan, others),
        "rows": numbers(entries, reference, baseline.ms if baseline else None),
        "baseline": asdict(baseline) if baseline else None,  # the AR teacher at batch 1, which speed-ups are over
        "agreement": agreement(by_kind["FlowMatched"], by_kind["Autoregressive"], statistics[second])
        if second
        else None,
        "curve": _curve(plan, statistics, reference),
        "made": _made(plan, statistics, timing),
    }
    found = json.loads(json.dumps(found))  # tuples become lists, as they are when report.json is read
    return found | {"pair_sets": comparison.pair_sets(found, others)}


def shown(plan: Plan, others: list[dict[str, Any]]) -> str:
    """Fingerprint of what a report shows beside its own measurements, and of its form."""
    settings = plan.recipe.evaluate
    facts = {"format": FORMAT, "name": plan.recipe.name, "paper": sampler_list.paper(settings.samplers)}
    return fingerprint(facts | {"others": [[other["uri"], other["SHA-256"]] for other in others]})


def recalled(plan: Plan, results: dict[str, Any]) -> dict[str, Any]:
    """The times that an earlier report of the same plan holds, as ``evaluate.time_samplers`` returns them."""
    rows = {json.dumps(row["sampler"]): row["speeds"] for row in results["rows"] if "sampler" in row}
    speeds: dict[Sampler, list[Speed]] = {}
    if results["baseline"]:
        speeds[Autoregressive()] = [Speed(**results["baseline"])]
    for sampler in plan.samplers:
        key = json.dumps({"name": type(sampler).__name__} | dataclasses.asdict(sampler))
        speeds[sampler] = [Speed(**speed) for speed in rows[key]]
    return {"speeds": speeds} | {key: results["made"]["timing"][key] for key in ("device", "threads")}


def _entries(plan: Plan, statistics: dict[Draw, Statistics], timing: dict[str, Any]) -> list[Entry]:
    counted = checkpoints.parameters(plan.recipe.teacher, plan.mask)
    names, papers = sampler_list.names(plan.samplers), sampler_list.paper(plan.recipe.evaluate.samplers)
    return [
        Entry(
            name=name,
            kind=type(sampler).__name__,
            settings=dataclasses.asdict(sampler),
            steps=sampler.steps_label(plan.layout),
            statistics=statistics[draw],
            speeds=timing["speeds"].get(sampler, []),
            type=sampler.type,
            parameters=None if sampler.frequencies else counted["student" if sampler.student else "teacher"],
            paper=paper,
        )
        for name, sampler, draw, paper in zip(names, plan.samplers, plan.table(), papers, strict=True)
    ]


def _reference(plan: Plan, statistics: dict[Draw, Statistics]) -> Reference:
    settings = plan.recipe.evaluate
    real = statistics[plan.reference()] if plan.real else None
    if settings.features == "digits" and real:
        return Reference(real.moments.gaussian(), real)
    return Reference(scoring.reference_gaussian(settings.reference or ""), real)


def _curve(plan: Plan, statistics: dict[Draw, Statistics], reference: Reference) -> dict[str, Any] | None:
    draws = plan.curve()
    if not draws:
        return None
    named = dict(zip(plan.samplers, sampler_list.names(plan.samplers), strict=True)) | {Autoregressive(): "teacher, AR"}

    def point(draw: Draw) -> tuple[str, float]:
        assert draw.sampler is not None
        return named[draw.sampler], score(statistics[draw], reference)

    points = [(step, *point(draw)) for step in sorted(draws) if step for draw in draws[step]]
    return {
        "count": plan.recipe.evaluate.curve_count,
        "steps_per_epoch": plan.exported.get("steps_per_epoch"),
        "teachers": dict(point(draw) for draw in draws[0]),
        "points": [{"step": step, "name": name, "score": value} for step, name, value in points],
    }


def _made(plan: Plan, statistics: dict[Draw, Statistics], timing: dict[str, Any]) -> dict[str, Any]:
    """What somebody needs who wants the same numbers."""
    recipe, settings = plan.recipe, plan.recipe.evaluate
    return {
        "count": settings.count,
        "seed": settings.seed,
        "samplers": {
            name: [type(sampler).__name__, dataclasses.asdict(sampler)]
            for name, sampler in zip(sampler_list.names(plan.samplers), plan.samplers, strict=True)
        },
        "teacher": {key: plan.facts[key] for key in ("family", "config", "filter", "precision")}
        | {f"{key} SHA-256": value for key, value in plan.facts["teacher"].items()},
        "solver": dataclasses.asdict(recipe.pairs.solver),
        "student": _student(plan) if plan.students else None,
        "pairs": plan.facts.get("pairs"),
        "features": settings.features,
        "dimensions": plan.facts["dim"],
        "features SHA-256": plan.facts["features"],
        "real images": plan.real,
        "sampling": {
            "device": plan.device,
            "actors": settings.actors,
            "batch": settings.batch,
            "seconds of all actors": round(sum(found.seconds for found in statistics.values()), 1),
        },
        "timing": {key: timing[key] for key in ("device", "threads")}
        | {"compiled teacher": recipe.teacher.compile, "compiled student": settings.compile},
        "versions": {name: importlib.metadata.version(name) for name in VERSIONS},
        "fingerprint": plan.fingerprint(),
    }


def _student(plan: Plan) -> dict[str, Any]:
    """Where the student came from: its file, and what distillation wrote into it (nothing in the authors'
    files).
    """
    own = ("step", "steps_per_epoch", "start_steps", "split", "pairs_count", "pairs_fingerprint", "mlflow_run")
    found = {key: plan.exported[key] for key in own if key in plan.exported}
    here = {"uri": plan.student, "SHA-256": plan.students[plan.student], "mask": plan.mask}
    return here | {"precision": plan.recipe.evaluate.precision} | found


def numbers(entries: Sequence[Entry], reference: Reference, baseline_ms: float | None) -> list[dict[str, Any]]:
    """One dictionary per row, real images first; None where a number does not exist.

    The teacher that others are compared with is the AR one if listed, else the flow-matched one;
    ``baseline_ms`` is the AR teacher's time per image at batch 1, None where no speed was measured.
    """
    teachers = [entry for kind in ("Autoregressive", "FlowMatched") for entry in entries if entry.kind == kind]
    rows = [_row(entry, reference, baseline_ms) for entry in entries]
    teacher = next((row for row in rows if teachers and row["name"] == teachers[0].name), None)
    if reference.real is not None:
        rows.insert(
            0, _quality(reference.real) | {"name": "real images", "type": "real", "count": reference.real.moments.n}
        )
    for row in rows:
        for key in ("score", "variance"):
            mine, theirs = row.get(key), teacher and teacher.get(key)
            row[f"{key}_over_teacher"] = mine / theirs if mine is not None and theirs else None
    return rows


def score(statistics: Statistics, reference: Reference) -> float:
    """Fréchet distance of a set of images to the reference."""
    return frechet(statistics.moments.gaussian(), reference.gaussian)


def _row(entry: Entry, reference: Reference, baseline_ms: float | None) -> dict[str, Any]:
    statistics, real = entry.statistics, reference.real
    row: dict[str, Any] = {
        "name": entry.name,
        "type": entry.type,
        "parameters": entry.parameters,
        "paper": entry.paper,
        "sampler": {"name": entry.kind} | entry.settings,
        "steps": entry.steps,
        "count": statistics.moments.n,
        "score": score(statistics, reference),
        "pixel_score": pixel_frechet(statistics.pixels, real.pixels) if real else None,
        "precision": None,
        "recall": None,
        "seconds": statistics.seconds,
        "speeds": [asdict(speed) for speed in entry.speeds],
    }
    if real and real.features and statistics.features:
        both = precision_recall(np.concatenate(statistics.features), np.concatenate(real.features))
        row["precision"], row["recall"] = both
    if entry.speeds and baseline_ms is not None:
        best = min(entry.speeds, key=lambda speed: speed.ms)
        row |= {"ms": entry.speeds[0].ms, "speedup": baseline_ms / entry.speeds[0].ms}
        row |= {"best_ms": best.ms, "best_batch": best.batch}
    return row | _quality(statistics)


def _quality(statistics: Statistics) -> dict[str, Any]:
    """What needs no reference."""
    labelled = statistics.labelled
    return {
        "inception_score": statistics.score.value(),
        "accuracy": statistics.right / labelled if labelled else None,
        "variance": statistics.variance.value(),
    }


def agreement(flow_matched: Statistics, first: Statistics, second: Statistics) -> dict[str, float]:
    """Whether flow matching left the teacher's distribution alone: its distance to an AR draw over that of
    two AR draws.
    """
    fm, ar = (frechet(s.moments.gaussian(), first.moments.gaussian()) for s in (flow_matched, second))
    return {"fm_to_ar": fm, "ar_to_ar": ar, "ratio": fm / ar}
