"""How a run of one of the three jobs stands, read from its folders alone: ``--status true``, without Ray.

A driver may be alive on another machine or dead since yesterday; a folder does not say. It does say when each piece was
finished, so this names the rate, the last activity, and whether a piece is overdue at that rate.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

from pipeline import storage
from pipeline.evaluation.plan import EvaluationPlan
from pipeline.host.progress import duration
from pipeline.pairs import manifest
from pipeline.pairs.manifest import Gap
from pipeline.recipe import Recipe
from pipeline.training import state
from pipeline.training.plan import check

RECENT = 20  # newest pieces whose times give the rate
OVERDUE = 3  # times its usual interval after which a piece is late
SHORTEST = 60.0  # seconds within which nothing is called late


def of_pairs(recipe: Recipe) -> str:
    """Shards and rows that are there and missing, with rate and last activity."""
    uri, times = recipe.pairs_uri, storage.modified(recipe.pairs_uri)
    if not manifest.begun(uri):
        return f"pairs: {uri} holds no pair set; generate_pairs has not begun one there."
    complete, sizes = manifest.complete(uri), manifest.committed(uri)
    facts = manifest.facts_of(recipe, checksums={})  # which shards there are does not depend on the weights
    gap = Gap.among(sizes, facts, recipe.pairs.count, complete)
    rows = sum(facts.number_and_rows(name)[1] for name in gap.names)
    megabytes = sum(sizes[name] for name in gap.names) / 1e6
    lines = [
        f"pairs: {uri}",
        f"there        {len(gap.names):,} of {len(gap.present):,} shards, {rows:,} of {gap.count:,} rows,"
        f" {megabytes:,.1f} MB",
    ]
    if complete and complete["count"] == gap.count and not gap.missing:
        return "\n".join([*lines, f"state        complete; the last file was written {_ago(times)} ago"])
    lines.append(f"missing      {_numbers(gap.missing)}" if gap.missing else "missing      the manifest alone")
    each = rows / max(1, len(gap.names))
    pace = _pace([times[name] for name in gap.names if name in times], each, "rows", len(gap.missing), times)
    return "\n".join([*lines, *pace])


def of_training(recipe: Recipe) -> str:
    """Optimiser steps that are done and left, with rate and last activity."""
    plan = check(replace(recipe, dry_run=True))
    times = storage.modified(plan.at())
    if "recipe.json" not in times:
        return f"student: {plan.at()} holds no student; distill has not begun one there."
    exports = [step for step in plan.snapshot_steps if f"step-{step:06d}.safetensors" in times]
    lines = [f"student: {plan.at()}"]
    if storage.exists(plan.result):
        return "\n".join([*lines, f"state        complete after {plan.total:,} steps; written {_ago(times)} ago"])
    folder = plan.at("checkpoints")
    checkpoints = {name: when for name, when in storage.modified(folder).items() if name.endswith(state.SUFFIX)}
    steps = sorted(map(_step, checkpoints))
    done = steps[-1] if steps else 0
    lines += [
        f"there        step {done:,} of {plan.total:,} in the newest checkpoint",
        f"exported     {len(exports)} of {len(plan.snapshot_steps)} students along the way",
    ]
    each = (done - steps[0]) / (len(steps) - 1) if len(steps) > 1 else recipe.train.checkpoint_every
    pace = _pace(list(checkpoints.values()), each, "steps", (plan.total - done) / each, times | checkpoints)
    return "\n".join([*lines, *pace])


def of_evaluation(plan: EvaluationPlan) -> str:
    """Sets of images that are scored and that are left, with the last activity."""
    recipe = plan.recipe
    draws, shelf, report = plan.draws(), storage.modified(plan.shelf), storage.modified(recipe.report_uri)
    done = [draw for draw in draws if plan.cache(draw).rpartition("/")[2] in shelf]
    lines = [f"report: {recipe.report_uri}", f"there        {len(done)} of {len(draws)} sets of images are scored"]
    if missing := [f"{draw.count:,} x {draw.name}" for draw in draws if draw not in done]:
        lines.append(f"missing      {'; '.join(missing)}")
    if not missing and "report.html" in report:
        return "\n".join([*lines, f"state        written {_ago({'': report['report.html']})} ago"])
    times = [shelf[plan.cache(draw).rpartition("/")[2]] for draw in done]
    return "\n".join([*lines, *_pace(times, 1, "sets", len(missing), shelf | report)])


def _pace(times: Sequence[float], each: float, unit: str, missing: float, files: dict[str, float]) -> list[str]:
    """Rate of the newest pieces, what is left at that rate, and the last activity; a late piece is named.

    ``times`` are those of the finished pieces, ``each`` what a piece holds, ``missing`` the pieces to come, ``files``
    when each file of the folder was written.
    """
    if not files:
        return ["activity     none"]
    lines, recent = [], sorted(times)[-RECENT:]
    interval = (recent[-1] - recent[0]) / (len(recent) - 1) if len(recent) > 1 else 0.0
    if interval > 0:
        lines.append(f"rate         {each / interval:,.3g} {unit}/s over the last {len(recent)} pieces")
        lines.append(f"time         about {duration(missing * interval)} left at that rate")
    said = f"activity     the last file was written {_ago(files)} ago"
    if 0 < OVERDUE * interval < _silence(files) and _silence(files) > SHORTEST:
        said += f"; a piece took {duration(interval)}, so the run has stopped or hangs: the same command goes on"
    return [*lines, said]


def _numbers(numbers: list[int]) -> str:
    """[0, 1, 2, 7] -> "4 shards: 0-2, 7", the first five runs of them."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    shown = ", ".join("-".join(map(str, run)) for run in runs[:5])
    return f"{len(numbers):,} shards: {shown}" + (f", and {len(runs) - 5} more gaps" if len(runs) > 5 else "")


def _step(name: str) -> int:
    return int(name.removeprefix("step-").removesuffix(state.SUFFIX))


def _silence(files: dict[str, float]) -> float:
    """Seconds since anything was written."""
    return max(0.0, time.time() - max(files.values()))


def _ago(files: dict[str, float]) -> str:
    return duration(_silence(files))
