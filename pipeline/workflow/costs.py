"""What the three jobs of a recipe will cost: what is left of each, memory, time, GPU-hours and dollars, in one form.

``--dry_run true`` of any job prints it. Counts and memory are found without Ray and without a GPU. Time is measured:
one batch of each kind of work, where a replica would do it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace

import yaml
from tqdm import tqdm

from pipeline import storage
from pipeline.configuration.fields import Actors
from pipeline.evaluation import artist
from pipeline.evaluation import plan as evaluation
from pipeline.evaluation.memory import trace_actor
from pipeline.generator import folder
from pipeline.host.errors import Outage, Refused, Unfinished
from pipeline.host.progress import duration
from pipeline.models import checkpoints
from pipeline.pairs import manifest
from pipeline.pairs.facts import PairFacts
from pipeline.pairs.manifest import Gap
from pipeline.pairs.memory import trace_replica
from pipeline.pairs.replica import Replica
from pipeline.recipe import Recipe
from pipeline.sampling.samplers import FewStep
from pipeline.services import cluster
from pipeline.training import plan, state, step
from pipeline.training.memory import trace_worker
from pipeline.workflow import preflight


@dataclass(frozen=True)
class Cost:
    """One job's share. ``lines`` are for people; ``measure`` returns the seconds of all that is left on one replica and
    a line on how they were found, and is None where nothing is left or could be planned.
    """

    title: str
    lines: list[str]
    replicas: int = 1
    measure: Callable[[], tuple[float, str]] | None = None


def described(recipe: Recipe) -> str:
    """The resolved recipe, what its three jobs would miss, and what they cost; nothing is written.

    What cannot be planned, because an input is missing or this machine has no GPU, says so in its place.
    """
    text = [yaml.safe_dump(recipe.resolved(), sort_keys=False, default_flow_style=None).rstrip()]
    missing = preflight.findings(replace(recipe, preflight="all"), "generate_pairs")
    said = [f"{one.job}: {one.error}" for one in missing] or ["nothing: every input of the three jobs is there"]
    text.append("\n".join(["== missing", *said]))
    total, whole = 0.0, True
    for make in (of_pairs, of_training, of_evaluation):
        cost = _planned(make, recipe)
        lines, seconds = _timed(recipe, cost)
        text.append("\n".join([f"== {cost.title}", *cost.lines, *lines]))
        total, whole = total + (seconds or 0.0), whole and seconds is not None
    if recipe.cluster.gpus:
        text.append("\n".join(["== all three" + ("" if whole else ", as far as measured"), *_priced(recipe, total)]))
    return "\n\n".join(text)


def _planned(make: Callable[[Recipe], Cost], recipe: Recipe) -> Cost:
    """A job's cost, or the sentence that says why it cannot be planned."""
    try:
        return make(recipe)
    except (Refused, Outage) as error:
        return Cost(make.__name__.removeprefix("of_"), [f"not planned: {error}"], measure=_unknown)


def _unknown() -> tuple[float, str]:
    raise Refused("its inputs are not all there")


def _timed(recipe: Recipe, cost: Cost) -> tuple[list[str], float | None]:
    """Lines of time and price, and the seconds of one replica: 0 where nothing is left, None where nobody can tell."""
    if cost.measure is None:
        return ["time         nothing is left to do"], 0.0
    tqdm.write(f"Measuring the time of {cost.title}, from one batch of its work.", file=sys.stderr)  # may take minutes
    try:
        seconds, how = cost.measure()
    except (Refused, Unfinished) as error:  # no GPU here, no inputs, or no memory for a batch: all else is still said
        return [f"time         not measured: {error}"], None
    where = f"{cost.replicas} replica{'s' * (cost.replicas > 1)} ({recipe.cluster.runs_on})"
    return [
        how,
        f"time         about {duration(seconds / cost.replicas)} with {where}",
        *_priced(recipe, seconds),
    ], seconds


def _priced(recipe: Recipe, seconds: float) -> list[str]:
    """GPU-hours of so many seconds of one replica, and dollars where the recipe knows a price; nothing on CPUs."""
    settings = recipe.cluster
    if not settings.gpus:
        return []
    hours, price = seconds * settings.gpus / 3600, settings.usd_per_gpu_hour
    return [f"GPU-hours    {hours:,.2f}" + ("" if price is None else f", ${hours * price:,.2f} at ${price:g} an hour")]


# ---- the three jobs


def of_pairs(recipe: Recipe) -> Cost:
    """Rows that are missing, their storage, a batch's memory and time."""
    facts, uri = PairFacts.of(recipe), recipe.pairs_uri
    manifest.check_claim(uri, facts)
    gap = Gap.among(manifest.committed(uri), facts, recipe.pairs.count, manifest.complete(uri))
    left, missing = gap.rows_left, len(gap.missing)
    row, asked = facts.row_bytes, recipe.pairs.batch
    batch = None if asked == "auto" else min(asked, facts.shard_rows)
    lines = [
        f"pair set     {uri}, fingerprint {facts.fingerprint[:12]}",
        f"rows         {gap.count:,}; {left:,} in {missing} shards are left to make",
        f"storage      at most {left * row / 1e9:,.2f} GB more, {row:,} bytes a row",
        *trace_replica(recipe).lines(batch, "pairs.batch", recipe.cluster.runs_on == "cuda"),
    ]

    def measure() -> tuple[float, str]:
        rows, seconds = cluster.on_actor(recipe, Replica, (recipe, facts), "measure")
        return seconds * left / rows, f"one batch    {rows} rows in {duration(seconds)} on one replica"

    replicas = max(1, min(_counted(recipe.pairs.actors), missing))
    return Cost("pairs (generate_pairs)", lines, replicas, measure if left else None)


def of_training(recipe: Recipe) -> Cost:
    """Optimiser steps that are left, a worker's memory, the time of a step without reading and communication."""
    found, settings = plan.check(replace(recipe, dry_run=True)), recipe.train
    plan.check_batch(found)
    left = 0 if storage.exists(found.result) else found.total - state.steps_done(found.at("checkpoints"))
    student = checkpoints.parameters(recipe.teacher, settings.student_options)["student"]
    at_once = plan.at_once(settings)
    lines = [
        f"student      {found.at()}, fingerprint {found.fingerprint[:12]}",
        f"parameters   {student:,} of the student; weight, gradient, two moments, average: 20 bytes each",
        f"pairs        {found.rows:,} to train on, {found.held_out:,} held out",
        f"steps        {found.total:,} of {settings.batch} pairs; {left:,} are left",
        *trace_worker(recipe).lines(at_once, "train.micro_batch", recipe.cluster.runs_on == "cuda"),
    ]
    workers = max(1, settings.most)

    def measure() -> tuple[float, str]:
        on_ray = bool(settings.most)
        seconds = cluster.on_worker(recipe, step.seconds_per_step, recipe) if on_ray else step.seconds_per_step(recipe)
        how = f"one step     {duration(seconds)} on each of {workers} worker{'s' * (workers > 1)}"
        return seconds * left * workers, f"{how}, communication and reading not counted"

    return Cost("student (distill)", lines, workers, measure if left else None)


def of_evaluation(recipe: Recipe) -> Cost:
    """Images that are left to draw, those of students still to be exported among them, from a batch of each sampler.

    Of another student that the registry still has nothing is known, so all its images count.
    """
    student = folder.weights_of(recipe.evaluate.student or recipe.student_uri)
    begun = storage.exists(student) or not any(s.student for s in evaluation.inputs(recipe).samplers)
    report = evaluation.prepare(recipe) if begun else evaluation.inputs(recipe)
    missing = [draw for draw in report.draws() if draw.sampler and not (begun and storage.exists(report.cache(draw)))]
    need = trace_actor(recipe, report.samplers)
    lines = [f"report       {recipe.report_uri}"]
    lines += need.lines(recipe.evaluate.batch, "evaluate.batch", recipe.cluster.runs_on == "cuda")
    drawn = [draw for draw in report.draws() if draw.sampler]
    lines += [f"{draw.count:>12,} x {draw.name}" + ("" if draw in missing else ", in the cache") for draw in drawn]
    images = [(draw.sampler, draw.count) for draw in missing if draw.sampler]
    few = [sampler for sampler in report.samplers if isinstance(sampler, FewStep)]
    if not begun and recipe.evaluate.curve_count and few:
        lines.append(f"{recipe.evaluate.curve_count:>12,} x {len(few)} samplers of {recipe.train.snapshots} snapshots")
        images += [(sampler, recipe.evaluate.curve_count * recipe.train.snapshots) for sampler in few]
    for name in (name for name in recipe.evaluate.students if name not in report.beside):  # still in the registry
        drawn_with = [sampler for sampler in report.samplers if sampler.student]
        lines += [f"{recipe.evaluate.count:>12,} x {sampler.name} of {name}" for sampler in drawn_with]
        images += [(sampler, recipe.evaluate.count) for sampler in drawn_with]

    def measure() -> tuple[float, str]:
        asked = list(dict.fromkeys(sampler for sampler, _ in images))
        seconds = cluster.on_worker(recipe, artist.seconds_per_image, report, asked)
        total = sum(seconds[sampler] * count for sampler, count in images if sampler in seconds)
        return total, f"one batch    {recipe.evaluate.batch} images of each sampler; scoring and baselines not counted"

    return Cost("report (evaluate)", lines, _counted(recipe.evaluate.actors), measure if images else None)


def _counted(actors: Actors) -> int:
    """Replicas that the time is said for: one of ``auto``, for a plan is made before the cluster is joined."""
    return 1 if actors == "auto" else actors
