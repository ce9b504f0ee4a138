"""From statistics and seconds to the numbers of the report: one JSON value that holds everything it says."""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from pipeline.evaluation import unseen
from pipeline.evaluation.differences import differences
from pipeline.evaluation.draws import Draw
from pipeline.evaluation.plan import EvaluationPlan
from pipeline.evaluation.rows import NEIGHBOURS, Entry, Reference, agreement, numbers, score
from pipeline.evaluation.timing import Times
from pipeline.host import provenance
from pipeline.models import checkpoints
from pipeline.recipe import fingerprint
from pipeline.report import comparison
from pipeline.report.origin import Conditions, Origin, ReferenceOrigin, ReportOrigin, StudentOrigin, Timing
from pipeline.report.results import Agreement, CurvePoint, OtherReport, Results, TrainingCurve
from pipeline.sampling import selection, speed
from pipeline.sampling.samplers import Autoregressive
from pipeline.scoring import clip, dinov2, instruments, metrics, real_images
from pipeline.scoring.metrics import Gaussian, Jackknife, Moments
from pipeline.scoring.references import References
from pipeline.scoring.tally import SCORE_BLOCK, Outline, Statistics
from pipeline.settings.evaluate import FORMULA, EvaluateSettings

FORMAT = 3  # of report.json: an older one is written again, from the same statistics and times


def summarise(
    plan: EvaluationPlan,
    statistics: Mapping[Draw, Statistics],
    times: Times,
    outlines: Mapping[Draw, Outline],
    others: list[OtherReport],
) -> Results:
    """Everything the report says, as JSON values; ``outlines`` say how the images were made, ``others`` are as
    ``workflow.other_reports`` found them.

    ``statistics`` may read a draw when it is asked for: hardly more than one is held at a time.
    """
    settings, reference = plan.recipe.evaluate, compared_with(plan, statistics)
    teacher, batch = times.speeds.get(Autoregressive(), []), speed.throughput_batch(times.speeds.values())
    jackknives: dict[str, Jackknife] = {}
    rows = numbers(_entries(plan, statistics, times), reference, teacher, batch, jackknives)
    apart = differences(plan, rows, jackknives) if plan.beside else []
    results: Results = {
        "name": plan.recipe.name,
        "title": instruments.title(settings),
        "second_title": instruments.second_title(settings),
        "meaning": instruments.meaning(settings, plan.facts["reference"].get("described", False)),
        "fingerprint": plan.fingerprint(),
        "shown": frame(plan, others),
        "rows": rows,
        # The AR teacher's, which speed-ups are over; and the largest batch at which all samplers were timed.
        "speed": speed.baseline(teacher, batch),
        "alike": comparison.alike(rows, [(one["first"], one["second"]) for one in apart]),
        "agreement": _agreement(plan, statistics),
        "curve": _curve(plan, statistics, reference),
        "notes": list(plan.notes),
        "made": _origin(plan, times, outlines),
    }
    if plan.prompts:
        results["grid"] = plan.prompts(range(plan.grid_columns)).tolist()
    if plan.beside:
        results["differences"] = apart
        results["made"]["students"] = {name: _student(other) for name, other in plan.beside.items()}
    if settings.dinov2:
        results["dinov2_title"] = instruments.dinov2_title(settings)
    results = json.loads(json.dumps(results))  # tuples become lists, as they are when report.json is read
    results["pair_sets"] = comparison.pair_sets(results, others)
    return results


def frame(plan: EvaluationPlan, others: list[OtherReport]) -> str:
    """Fingerprint of what a report shows beside its own measurements, and of its form."""
    settings = plan.recipe.evaluate
    facts: dict[str, Any] = {"format": FORMAT, "name": plan.recipe.name}
    facts["paper"] = selection.published(settings.samplers)
    if plan.beside:  # their names, which are no part of what is drawn
        facts["students"] = [[name, other.student, other.registered] for name, other in plan.beside.items()]
    return fingerprint(facts | {"others": [[other["uri"], other["SHA-256"]] for other in others]})


def _entries(plan: EvaluationPlan, statistics: Mapping[Draw, Statistics], times: Times) -> Iterator[Entry]:
    """The rows of the table, one at a time: each holds a sampler's statistics."""
    counted = checkpoints.parameters(plan.recipe.teacher, plan.built)
    for name, draw, paper in plan.lines():
        sampler, of = draw.sampler, plan.of(draw)
        assert sampler is not None
        # Speed is that of networks, whatever their weights: another student's are timed with the recipe's own.
        timed = of.built == plan.built
        yield Entry(
            name=name,
            kind=type(sampler).__name__,
            settings=dataclasses.asdict(sampler),
            steps=sampler.steps_label(plan.layout),
            statistics=statistics[draw],
            rounds=draw.rounds(),
            speeds=times.speeds.get(sampler, []) if timed else [],
            type=sampler.type,
            parameters=None if sampler.frequencies else counted["student" if sampler.student else "teacher"],
            paper=paper,
            departs=of.departures(sampler),
            student=draw.owner,
        )


def compared_with(plan: EvaluationPlan, statistics: Mapping[Draw, Statistics]) -> Reference:
    """The reference of a recipe, for each flavour: statistics out of its files, or those of the real images."""
    settings, real = plan.recipe.evaluate, statistics[plan.reference()] if plan.real else None
    files = {} if settings.features == "digits" else instruments.statistics(settings)
    first, *others = settings.flavours
    second = None
    if others:
        second = _gaussian(files.get(others[0]), real.second if real else None)
    further = real.dinov2.gaussian() if real and real.dinov2 else None
    if first in files:
        return Reference(files[first].pooled, real, files[first].spatial, second, further)
    assert real is not None
    spatial = real.spatial.gaussian() if real.spatial else None
    return Reference(real.moments.gaussian(), real, spatial, second, further, settings.features == "digits")


def _gaussian(file: References | None, own: Moments | None) -> Gaussian | None:
    """Statistics out of a file, else those that were made here."""
    return file.pooled if file else own.gaussian() if own else None


def _agreement(plan: EvaluationPlan, statistics: Mapping[Draw, Statistics]) -> Agreement | None:
    second = plan.teacher_again()
    if second is None:
        return None
    first = {type(draw.sampler).__name__: draw for draw in plan.table()}
    return agreement(*(statistics[draw] for draw in (first["FlowMatched"], first["Autoregressive"], second)))


def _curve(plan: EvaluationPlan, statistics: Mapping[Draw, Statistics], reference: Reference) -> TrainingCurve | None:
    draws = plan.curve()
    if not draws:
        return None
    named = dict(zip(plan.samplers, selection.names(plan.samplers), strict=True)) | {Autoregressive(): "teacher, AR"}

    def point(step: int, draw: Draw) -> CurvePoint:
        assert draw.sampler is not None
        return {"step": step, "name": named[draw.sampler], "score": score(statistics[draw], reference)}

    points = [point(step, draw) for step in sorted(draws) for draw in draws[step]]
    return {
        "count": plan.recipe.evaluate.curve_count,
        "steps_per_epoch": plan.exported.get("steps_per_epoch"),
        "teachers": {one["name"]: one["score"] for one in points if not one["step"]},
        "points": [one for one in points if one["step"]],
    }


def _origin(plan: EvaluationPlan, times: Times, outlines: Mapping[Draw, Outline]) -> Origin:
    """What somebody needs who wants the same numbers."""
    recipe, settings = plan.recipe, plan.recipe.evaluate
    inception = settings.features == "inception"
    conditions: Conditions = {"classes": plan.layout.classes}
    if plan.prompts:
        conditions = unseen.origin(recipe, plan.prompts, plan.facts)
    kept = [draw.keep for draw in (plan.table()[0], plan.reference())]
    return {
        "count": settings.count,
        "seed": settings.seed,
        **conditions,
        "samplers": _samplers(plan),
        "teacher": {
            "family": plan.facts["family"],
            "config": plan.facts["config"],
            "filter": plan.facts["filter"],
            "precision": plan.facts["precision"],
            "tokenizer SHA-256": plan.facts["teacher"]["tokenizer"],
            "checkpoint SHA-256": plan.facts["teacher"]["checkpoint"],
        },
        "solver": dataclasses.asdict(recipe.pairs.solver),
        "student": _student(plan) if plan.students else None,
        "pairs": plan.facts.get("pairs"),
        "features": settings.features,
        "flavour": settings.flavour if inception else None,
        "weights": _weights(settings) if inception else None,
        "dimensions": plan.facts["dim"],
        "features SHA-256": plan.facts["features"],
        "reference": _reference(plan),
        "pixels across an image": plan.side,
        "real images": plan.real,
        "Inception Score": {"images of a block": SCORE_BLOCK, "order": "sample ids", "weight of a block": "its images"}
        if inception
        else None,
        "KID": {"subsets": metrics.SUBSETS, "images of a subset": min(metrics.SUBSET_SIZE, *kept)}
        | {"kernel": "(x.y / D + 1)^3", "seed": metrics.SUBSET_SEED}
        if min(kept)
        else None,
        "precision and recall": {"k": NEIGHBOURS, "images": kept[0], "real images": kept[1]}
        if inception and min(kept)
        else None,
        **_further(settings),
        "features kept": {"images": kept[0], "real images": kept[1]},
        "standard error and limit": f"jackknife over up to {metrics.GROUPS} groups of "
        + ("images" if plan.prompts else "whole rounds of classes"),
        "sampling": {"seconds of all actors": round(sum(one.seconds for one in outlines.values()), 1)}
        | sampling({draw.name: one.origin for draw, one in outlines.items()}),
        "timing": _timing(plan, times),
        "report": _report(),
        "fingerprint": plan.fingerprint(),
    }


def _timing(plan: EvaluationPlan, times: Times) -> Timing:
    return {
        **times.measurement,
        "compiled teacher": plan.recipe.teacher.compile,
        "compiled student": plan.recipe.evaluate.compile,
        "CUDA graphs of the teacher": plan.recipe.records("teacher"),
        "CUDA graphs of students and decoder": plan.recipe.records("evaluate"),
        "runs on": plan.device,
    }


def _samplers(plan: EvaluationPlan) -> dict[str, list[Any]]:
    """[class, fields] of each row's sampler by its name."""
    named = [(line.name, line.draw.sampler) for line in plan.lines()]
    return {name: [type(one).__name__, dataclasses.asdict(one)] for name, one in named if one}


def sampling(origins: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """How images were made, from what their statistics say: once where it was alike for all, else by names of draws."""
    days = sorted(one["date"] for one in origins.values())
    groups: dict[str, list[str]] = {}
    for name, one in origins.items():
        facts = {key: value for key, value in one.items() if key not in ("date", "machines", "code")}
        for key in one["machines"][0]:
            facts[key] = ", ".join(sorted({machine[key] for machine in one["machines"]}))
        groups.setdefault(json.dumps(facts), []).append(name)
    by_names = {", ".join(names): json.loads(facts) for facts, names in groups.items()}
    alike = next(iter(by_names.values())) if len(by_names) == 1 else by_names
    return {"between": [days[0], days[-1]]} | alike | {"code": {name: one["code"] for name, one in origins.items()}}


def _report() -> ReportOrigin:
    return {**provenance.version(), "written": provenance.now(), "command": shlex.join(["python", *sys.argv])}


def _reference(plan: EvaluationPlan) -> ReferenceOrigin:
    settings = plan.recipe.evaluate
    uri = settings.reference or ""
    if settings.features == "digits":
        described = plan.facts["reference"].get("described", False)
        uri = f"the digits that {settings.captions.uri} describes" if described else "the digits"
    files = {"images": settings.images} if settings.images else {}
    cut = {"cut": real_images.CUT} if plan.prompts and plan.real and settings.features == "inception" else {}
    return {"uri": uri} | files | plan.facts["reference"] | cut


def _weights(settings: EvaluateSettings) -> str:
    return "by formula, random: nothing here is FID" if settings.inception == FORMULA else settings.inception or ""


def _further(settings: EvaluateSettings) -> Any:
    """The CLIP model and its convention, and DINOv2's weights and flavour, where a recipe names them."""
    facts = {"CLIP": {"model": settings.clip, "convention": clip.CONVENTION}} if settings.clip else {}
    return facts | ({"DINOv2": {"weights": settings.dinov2, "flavour": dinov2.FLAVOUR}} if settings.dinov2 else {})


def _student(plan: EvaluationPlan) -> StudentOrigin:
    """Where the student came from: its file, and what distillation wrote into it (nothing in the authors'
    files).
    """
    own = ("step", "steps_per_epoch", "start_steps", "split", "pairs_count", "pairs_fingerprint", "mlflow_run")
    exported: Any = {key: plan.exported[key] for key in own if key in plan.exported}
    place = {"uri": plan.student, "SHA-256": plan.students[plan.student]}
    origin: Any = place | plan.built | {"precision": plan.recipe.evaluate.precision} | exported
    if plan.registered:
        origin["registry"] = plan.registered
    return origin
