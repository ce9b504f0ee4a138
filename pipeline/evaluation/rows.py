"""The rows of the report's table: from a sampler's statistics and seconds to its numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pipeline.report.results import Agreement, OfFeatures, Quality, Row
from pipeline.sampling import speed
from pipeline.sampling.speed import Speed
from pipeline.scoring import metrics
from pipeline.scoring.metrics import Gaussian, Jackknife, Moments, frechet, pixel_frechet, precision_recall
from pipeline.scoring.tally import Statistics

NEIGHBOURS = 3  # of precision and recall


@dataclass(frozen=True)
class Entry:
    """A row of the table before its numbers: a sampler's images and its speed.

    ``parameters`` are those of its network, None where it asks none; ``paper`` the figures that the paper prints;
    ``rounds`` the round of classes that each kept image belongs to, None where there are no classes; ``departs`` says
    in what it asks more of its student than that was trained for. ``student`` is the name of another student than the
    recipe's own, empty where it is that or none.
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
    student: str = ""


@dataclass(frozen=True)
class Reference:
    """What images are compared with: feature mean and covariance, the real images' statistics where there are any,
    the spatial features' mean and covariance where they are known, those of the second flavour and of DINOv2's features
    where they are scored.
    ``of_digits``: the digits' scorer looked, whose classes make no Inception Score.
    """

    gaussian: Gaussian
    real: Statistics | None
    spatial: Gaussian | None = None
    second: Gaussian | None = None
    dinov2: Gaussian | None = None
    of_digits: bool = False


def numbers(
    entries: Iterable[Entry],
    reference: Reference,
    ar: Sequence[Speed] = (),
    batch: int | None = None,
    jackknives: dict[str, Jackknife] | None = None,
) -> list[Row]:
    """One dictionary per row, real images first; None where a number does not exist.

    Into ``jackknives`` go those of the rows' distances by their names, as far as features were kept.

    The teacher that others are compared with is the AR one if listed, else the flow-matched one. Of speed it is always
    the AR one, timed as ``ar`` says, at batch 1 and at the throughput batch, ``batch``.
    """
    found = {} if jackknives is None else jackknives
    rows: list[Row] = [{**_row(entry, reference, found), **speed.paces(entry.speeds, ar, batch)} for entry in entries]
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


def _row(entry: Entry, reference: Reference, jackknives: dict[str, Jackknife]) -> Row:
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
    if entry.student:
        row["student"] = entry.student
    if reference.spatial and statistics.spatial:
        row["sfid"] = frechet(statistics.spatial.gaussian(), reference.spatial)
    if reference.second and statistics.second:
        row["second_score"] = frechet(statistics.second.gaussian(), reference.second)
    if reference.dinov2 and statistics.dinov2:
        row["dinov2_score"] = frechet(statistics.dinov2.gaussian(), reference.dinov2)
    of_features, jackknife = _of_features(statistics, entry.rounds, reference)
    if jackknife:
        jackknives[entry.name] = jackknife
    return {**row, **of_features, **_quality(statistics, reference)}


def _of_features(
    statistics: Statistics, rounds: np.ndarray | None, reference: Reference
) -> tuple[OfFeatures, Jackknife | None]:
    """What needs the images' features themselves, not their sums alone, and what is behind the distance's error.

    Of fewer images than all the error shrinks with the root of their share, as it does with more images. Precision and
    recall are not asked of the digits' scorer: near-black images have a precision of 1.000 there.
    """
    out: OfFeatures = {"score_std": None, "score_inf": None}
    out |= {"precision": None, "recall": None, "kid": None, "kid_std": None}
    if not statistics.features:
        return out, None
    mine = np.concatenate(statistics.features)
    rounds = np.arange(len(mine)) if rounds is None else rounds
    share, total = len(mine) / statistics.moments.n, statistics.moments
    if share < 1:
        total = Moments(mine.shape[1])
        total.add(mine)
    with ThreadPoolExecutor() as pool:  # most of each runs without Python's lock, on few cores
        error = pool.submit(metrics.jackknife, mine, total, reference.gaussian, rounds)
        if reference.real and reference.real.features:
            theirs = np.concatenate(reference.real.features)
            kid = pool.submit(metrics.kid, mine, theirs)
            if not reference.of_digits and min(len(mine), len(theirs)) > NEIGHBOURS:
                out["precision"], out["recall"] = precision_recall(mine, theirs, NEIGHBOURS)
            out["kid"], out["kid_std"] = kid.result()
    if found := error.result():
        out["score_std"], out["score_inf"] = found.error * math.sqrt(share), found.limit
    return out, found


def _quality(statistics: Statistics, reference: Reference) -> Quality:
    """What needs no real images. A network whose classes are drawn, that of the digits, makes no Inception Score."""
    labelled, sums = statistics.labelled, statistics.clip
    of_clip: Quality = {}
    if sums and sums.mean() is not None:
        of_clip = {"clip_score": sums.mean(), "clip_score_std": sums.error(), "clip_score_of_others": sums.floor()}
    out: Quality = {
        "inception_score": None if reference.of_digits else statistics.score.value(),
        "inception_score_std": None if reference.of_digits else statistics.score.error(),
        "accuracy": statistics.right / labelled if labelled else None,
        "variance": statistics.variance.value(),
        **of_clip,
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
