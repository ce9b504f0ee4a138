"""From statistics and seconds to the numbers of the report: one JSON value that holds everything it says."""

from __future__ import annotations

import dataclasses
import json
import math
import shlex
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pipeline.evaluation import metrics, real_images, scoring, unseen
from pipeline.evaluation.metrics import Gaussian, Moments, frechet, pixel_frechet, precision_recall
from pipeline.evaluation.plan import Draw, EvaluationPlan
from pipeline.evaluation.references import References
from pipeline.evaluation.tally import SCORE_BLOCK, Outline, Statistics
from pipeline.evaluation.timing import Times
from pipeline.host import provenance
from pipeline.models import checkpoints
from pipeline.recipe import fingerprint
from pipeline.report import comparison
from pipeline.report.origin import Conditions, Origin, ReferenceOrigin, ReportOrigin, StudentOrigin
from pipeline.report.results import Agreement, CurvePoint, OfFeatures, OtherReport, Quality, Results, Row, TrainingCurve
from pipeline.sampling import selection, speed
from pipeline.sampling.samplers import Autoregressive
from pipeline.sampling.speed import Speed
from pipeline.settings.evaluate import FORMULA, EvaluateSettings

FORMAT = 3  # of report.json: an older one is written again, from the same statistics and times
NEIGHBOURS = 3  # of precision and recall


@dataclass(frozen=True)
class Entry:
    """A row of the table before its numbers: a sampler's images and its speed.

    ``parameters`` are those of its network, None where it asks none; ``paper`` the figures that the paper prints;
    ``rounds`` the round of classes that each kept image belongs to, None where there are no classes; ``departs`` says
    in what it asks more of its student than that was trained for.
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
    rounds: np.ndarray | None = None
    departs: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Reference:
    """What images are compared with: feature mean and covariance, the real images' statistics where there are any,
    the spatial features' mean and covariance where they are known, and those of the second flavour where it is scored.
    ``of_digits``: the digits' scorer looked, whose classes make no Inception Score.
    """

    gaussian: Gaussian
    real: Statistics | None
    spatial: Gaussian | None = None
    second: Gaussian | None = None
    of_digits: bool = False


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
    rows = numbers(_entries(plan, statistics, times), reference, teacher, batch)
    results: Results = {
        "name": plan.recipe.name,
        "title": scoring.title(settings),
        "second_title": scoring.second_title(settings),
        "meaning": scoring.meaning(settings, plan.facts["reference"].get("described", False)),
        "fingerprint": plan.fingerprint(),
        "shown": frame(plan, others),
        "rows": rows,
        # The AR teacher's, which speed-ups are over; and the largest batch at which all samplers were timed.
        "speed": {"teacher": list(map(speed.as_json, teacher)), "throughput_batch": batch},
        "alike": comparison.alike(rows),
        "agreement": _agreement(plan, statistics),
        "curve": _curve(plan, statistics, reference),
        "notes": list(plan.notes),
        "made": _origin(plan, times, outlines),
    }
    if plan.prompts:
        results["grid"] = plan.prompts(range(plan.grid_columns)).tolist()
    results = json.loads(json.dumps(results))  # tuples become lists, as they are when report.json is read
    results["pair_sets"] = comparison.pair_sets(results, others)
    return results


def frame(plan: EvaluationPlan, others: list[OtherReport]) -> str:
    """Fingerprint of what a report shows beside its own measurements, and of its form."""
    settings = plan.recipe.evaluate
    facts = {"format": FORMAT, "name": plan.recipe.name, "paper": selection.published(settings.samplers)}
    return fingerprint(facts | {"others": [[other["uri"], other["SHA-256"]] for other in others]})


def _entries(plan: EvaluationPlan, statistics: Mapping[Draw, Statistics], times: Times) -> Iterator[Entry]:
    """The rows of the table, one at a time: each holds a sampler's statistics."""
    counted = checkpoints.parameters(plan.recipe.teacher, plan.built)
    names, papers = selection.names(plan.samplers), selection.published(plan.recipe.evaluate.samplers)
    for name, sampler, draw, paper in zip(names, plan.samplers, plan.table(), papers, strict=True):
        yield Entry(
            name=name,
            kind=type(sampler).__name__,
            settings=dataclasses.asdict(sampler),
            steps=sampler.steps_label(plan.layout),
            statistics=statistics[draw],
            rounds=draw.rounds(),
            speeds=times.speeds.get(sampler, []),
            type=sampler.type,
            parameters=None if sampler.frequencies else counted["student" if sampler.student else "teacher"],
            paper=paper,
            departs=plan.departures(sampler),
        )


def compared_with(plan: EvaluationPlan, statistics: Mapping[Draw, Statistics]) -> Reference:
    """The reference of a recipe, for each flavour: statistics out of its files, or those of the real images."""
    settings, real = plan.recipe.evaluate, statistics[plan.reference()] if plan.real else None
    files = {} if settings.features == "digits" else scoring.statistics(settings)
    first, *others = settings.flavours
    second = None
    if others:
        second = _gaussian(files.get(others[0]), real.second if real else None)
    if first in files:
        return Reference(files[first].pooled, real, files[first].spatial, second)
    assert real is not None
    spatial = real.spatial.gaussian() if real.spatial else None
    return Reference(real.moments.gaussian(), real, spatial, second, settings.features == "digits")


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
        "samplers": {
            name: [type(sampler).__name__, dataclasses.asdict(sampler)]
            for name, sampler in zip(selection.names(plan.samplers), plan.samplers, strict=True)
        },
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
        "features kept": {"images": kept[0], "real images": kept[1]},
        "standard error and limit": f"jackknife over up to {metrics.GROUPS} groups of "
        + ("images" if plan.prompts else "whole rounds of classes"),
        "sampling": {"seconds of all actors": round(sum(one.seconds for one in outlines.values()), 1)}
        | sampling({draw.name: one.origin for draw, one in outlines.items()}),
        "timing": {
            **times.measurement,
            "compiled teacher": recipe.teacher.compile,
            "compiled student": settings.compile,
            "CUDA graphs of the teacher": recipe.teacher.graphs,
        },
        "report": _report(),
        "fingerprint": plan.fingerprint(),
    }


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


def numbers(
    entries: Iterable[Entry], reference: Reference, ar: Sequence[Speed] = (), batch: int | None = None
) -> list[Row]:
    """One dictionary per row, real images first; None where a number does not exist.

    The teacher that others are compared with is the AR one if listed, else the flow-matched one. Of speed it is always
    the AR one, timed as ``ar`` says, at batch 1 and at the throughput batch, ``batch``.
    """
    rows: list[Row] = [{**_row(entry, reference), **speed.beside_teacher(entry.speeds, ar, batch)} for entry in entries]
    by_kind = {row["sampler"]["name"]: row for row in reversed(rows)}
    teacher = by_kind.get("Autoregressive", by_kind.get("FlowMatched"))
    if reference.real is not None:
        count = reference.real.moments.n
        rows.insert(0, {**_quality(reference.real, reference), "name": "real images", "type": "real", "count": count})
    for row in rows:
        row["score_over_teacher"] = _ratio(row.get("score"), teacher and teacher.get("score"))
        row["variance_over_teacher"] = _ratio(row.get("variance"), teacher and teacher.get("variance"))
    return rows


def _ratio(mine: float | None, theirs: float | None) -> float | None:
    return mine / theirs if mine is not None and theirs else None


def score(statistics: Statistics, reference: Reference) -> float:
    """Fréchet distance of a set of images to the reference."""
    return frechet(statistics.moments.gaussian(), reference.gaussian)


def _row(entry: Entry, reference: Reference) -> Row:
    statistics, real = entry.statistics, reference.real
    row: Row = {
        "name": entry.name,
        "type": entry.type,
        "departs": entry.departs,
        "parameters": entry.parameters,
        "paper": entry.paper,
        "sampler": {"name": entry.kind} | entry.settings,
        "steps": entry.steps,
        "count": statistics.moments.n,
        "score": score(statistics, reference),
        "pixel_score": pixel_frechet(statistics.pixels, real.pixels) if real else None,
        "sfid": None,
        "second_score": None,
        "seconds": statistics.seconds,
        "speeds": list(map(speed.as_json, entry.speeds)),
    }
    if reference.spatial and statistics.spatial:
        row["sfid"] = frechet(statistics.spatial.gaussian(), reference.spatial)
    if reference.second and statistics.second:
        row["second_score"] = frechet(statistics.second.gaussian(), reference.second)
    return {**row, **_of_features(statistics, entry.rounds, reference), **_quality(statistics, reference)}


def _of_features(statistics: Statistics, rounds: np.ndarray | None, reference: Reference) -> OfFeatures:
    """What needs the images' features themselves, not their sums alone.

    Of fewer images than all the error shrinks with the root of their share, as it does with more images. Precision and
    recall are not asked of the digits' scorer: near-black images have a precision of 1.000 there.
    """
    out: OfFeatures = {"score_std": None, "score_inf": None}
    out |= {"precision": None, "recall": None, "kid": None, "kid_std": None}
    if not statistics.features:
        return out
    mine = np.concatenate(statistics.features)
    rounds = np.arange(len(mine)) if rounds is None else rounds
    share, total = len(mine) / statistics.moments.n, statistics.moments
    if share < 1:
        total = Moments(mine.shape[1])
        total.add(mine)
    with ThreadPoolExecutor() as pool:  # most of each runs without Python's lock, on few cores
        error = pool.submit(metrics.frechet_error, mine, total, reference.gaussian, rounds)
        if reference.real and reference.real.features:
            theirs = np.concatenate(reference.real.features)
            kid = pool.submit(metrics.kid, mine, theirs)
            if not reference.of_digits and min(len(mine), len(theirs)) > NEIGHBOURS:
                out["precision"], out["recall"] = precision_recall(mine, theirs, NEIGHBOURS)
            out["kid"], out["kid_std"] = kid.result()
    if found := error.result():
        out["score_std"], out["score_inf"] = found[0] * math.sqrt(share), found[1]
    return out


def _quality(statistics: Statistics, reference: Reference) -> Quality:
    """What needs no real images. A network whose classes are drawn, that of the digits, makes no Inception Score."""
    labelled = statistics.labelled
    out: Quality = {
        "inception_score": None if reference.of_digits else statistics.score.value(),
        "inception_score_std": None if reference.of_digits else statistics.score.error(),
        "accuracy": statistics.right / labelled if labelled else None,
        "variance": statistics.variance.value(),
    }
    (agreeing, asked), (by_chance, asked_of_others) = statistics.agreement.tolist()
    if asked:
        out["prompt_agreement"] = agreeing / asked
    if asked_of_others:
        out["prompt_agreement_of_others"] = by_chance / asked_of_others
    return out


def agreement(flow_matched: Statistics, first: Statistics, second: Statistics) -> Agreement:
    """Whether flow matching left the teacher's distribution alone: its distance to an AR draw over that of
    two AR draws.
    """
    fm, ar = (frechet(s.moments.gaussian(), first.moments.gaussian()) for s in (flow_matched, second))
    return {"fm_to_ar": fm, "ar_to_ar": ar, "ratio": fm / ar}
