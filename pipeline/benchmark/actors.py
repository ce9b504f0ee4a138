"""The two pools of actors, watched: how much of an actor's time its networks work, and what it spends the rest on.

The actors of the jobs themselves run, with a stopwatch around the networks, so both numbers of a ratio come from the
same seconds.
"""

from __future__ import annotations

import json
import os
import resource
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline import storage
from pipeline.benchmark.sheet import Claim, Row, Section
from pipeline.evaluation.artist import Artist
from pipeline.evaluation.draws import PART_IMAGES, Draw
from pipeline.evaluation.plan import EvaluationPlan, prepare
from pipeline.host.errors import Unfinished
from pipeline.host.progress import Progress
from pipeline.host.stopwatch import Stopwatch
from pipeline.pairs import manifest
from pipeline.pairs.facts import PairFacts
from pipeline.pairs.manifest import Gap
from pipeline.pairs.passes import commits
from pipeline.pairs.replica import Replica
from pipeline.pairs.rows import Rows
from pipeline.recipe import Recipe
from pipeline.scoring.tally import Statistics
from pipeline.services import cluster
from pipeline.workflow.drawing import parts_of

SHARDS = 4  # of each replica
PARTS = 4  # of each artist


@dataclass(frozen=True)
class Span:
    """What an actor did with one unit of work: when it began and ended, and the seconds of each kind of work."""

    actor: int
    born: float
    begin: float
    end: float
    busy: dict[str, float]

    def write(self, folder: str) -> None:
        """Append to the actor's own file."""
        with Path(folder, f"{self.actor}.jsonl").open("a") as file:
            file.write(json.dumps(vars(self)) + "\n")


def read(folder: str) -> list[Span]:
    """All that the actors wrote, by when it began."""
    lines = [line for path in Path(folder).glob("*.jsonl") for line in path.read_text().splitlines()]
    return sorted((Span(**json.loads(line)) for line in lines), key=lambda span: span.begin)


class WatchedReplica(Replica):
    """A replica whose teacher is timed."""

    def __init__(self, recipe: Recipe, facts: PairFacts, folder: str) -> None:
        self.born, self.folder = time.time(), folder
        super().__init__(recipe, facts)
        self.ready = time.time()

    def rows(self, number: int, count: int) -> Rows:
        begin, self.watch = time.time(), Stopwatch(torch.device(self.device))
        rows = super().rows(number, count)
        busy = {"teacher": self.watch.seconds}
        Span(os.getpid(), self.ready - self.born, begin, time.time(), busy).write(self.folder)
        return rows

    def _generate(self, *args: Any) -> Tensor:
        with self.watch:
            return super()._generate(*args)


class WatchedArtist(Artist):
    """An artist whose samplers and whose scoring network are timed."""

    def __init__(self, *args: Any, folder: str, **more: Any) -> None:
        born, self.folder = time.time(), folder
        super().__init__(*args, **more)
        self.born = time.time() - born
        network = self.network
        self.watches = {name: Stopwatch(torch.device(self.plan.device)) for name in ("drawing", "scoring")}

        def scored(pixels: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
            with self.watches["scoring"]:
                return network(pixels)

        self.network = replace(network, network=scored)

    def statistics(self, draw: Draw, item: int) -> Statistics:
        begin, before = time.time(), {name: watch.seconds for name, watch in self.watches.items()}
        out = super().statistics(draw, item)
        busy = {name: watch.seconds - before[name] for name, watch in self.watches.items()}
        Span(os.getpid(), self.born, begin, time.time(), busy).write(self.folder)
        return out

    def images(self, draw: Draw, places: np.ndarray) -> tuple[Tensor, np.ndarray | None]:
        with self.watches["drawing"]:
            return super().images(draw, places)


def generation(recipe: Recipe, folder: str) -> Section:
    """Pairs from the job's own pool, beside its teacher's loop alone."""
    place = storage.join(folder, "pairs")
    count = SHARDS * recipe.pairs.replicas * recipe.pairs.shard_rows
    recipe = replace(recipe, run=folder, pairs=replace(recipe.pairs, uri=place, count=count))
    facts, begun, cpu, size = PairFacts.of(recipe), time.time(), _cpu(), 0
    manifest.claim(place, facts, recipe)
    gap = Gap.among((), facts, count)
    progress = Progress(len(gap.missing), "shards")
    with cluster.session(recipe, recipe.pairs.replicas), tempfile.TemporaryDirectory() as watched:
        for outcome in commits(recipe, gap, progress, WatchedReplica, folder=watched):
            if outcome.shard is None:
                raise Unfinished(f"shard {outcome.number} failed: {outcome.error}; see Ray's logs.")
            size += outcome.shard.bytes
        spans, wall = read(watched), time.time() - begun
    rows, share = recipe.pairs.shard_rows, _share(spans, "teacher")
    busy = sum(span.busy["teacher"] for span in spans) / len(spans)
    section = Section(
        "Generation",
        f"{len(spans)} shards of {rows:,} rows from {recipe.pairs.replicas} replicas of {recipe.cluster.cpus:g} CPU"
        f" ({recipe.cluster.gpus:g} GPU), noise {recipe.pairs.noise}, through Ray to Parquet. *end to end* counts"
        " from a replica's first shard to its last; *bare* is the same replicas' teacher and flow matching alone, in"
        " the same seconds, without noise, tables, hand-over and files.",
    )
    row: Row = {"rows / s, end to end": share * rows * recipe.pairs.replicas / busy}
    row |= {"bare": rows * recipe.pairs.replicas / busy, "end to end / bare": share}
    row |= {"bytes a row": size / count, "first shard began after, s": spans[0].begin - begun}
    row |= {"of it a replica's start, s": spans[0].born, "driver, % of a core": 100 * (_cpu() - cpu) / wall}
    section.rows.append(row)
    section.claims.append(Claim(f"Pairs end to end over the bare teacher loop, {recipe.cluster.runs_on}", share, 0.97))
    return section


def evaluation(recipe: Recipe, folder: str, student: str) -> Section:
    """Images drawn and scored by the job's own pool, beside what its networks alone take."""
    listed: list[dict[str, Any]] = [{"name": "Autoregressive"}, {"name": "FewStep", "steps": [1]}]
    settings = replace(recipe.evaluate, uri=storage.join(folder, "report"), student=student, samplers=listed)
    settings = replace(settings, count=PART_IMAGES * PARTS * settings.replicas, curve_count=0, npz=False)
    plan = prepare(replace(recipe, run=folder, evaluate=settings))
    section = Section(
        "Evaluation",
        f"Parts of {PART_IMAGES:,} images from {settings.replicas} actors of {recipe.cluster.cpus:g} CPU"
        f" ({recipe.cluster.gpus:g} GPU), from an actor's first part to its last. Drawing (network and decoder) and"
        " scoring share a device, so the slowest stage is that device: both of them; the rest is statistics, hand-over"
        " and waiting.",
    )
    for draw in plan.table():
        row = _scored(plan, draw)
        text = f"Evaluation of {draw.name} end to end over its device, {recipe.cluster.runs_on}"
        section.rows.append(row)
        section.claims.append(Claim(text, float(row["end to end / device"] or 0), 0.9))
    return section


def _scored(plan: EvaluationPlan, draw: Draw) -> Row:
    """One sampler's row."""
    with tempfile.TemporaryDirectory() as watched:
        for _ in parts_of(plan, [draw], None, WatchedArtist, folder=watched):
            pass
        spans = read(watched)
    drawing, scoring = _share(spans, "drawing"), _share(spans, "scoring")
    busy = sum(sum(span.busy.values()) for span in spans) / len(spans)
    share = drawing + scoring
    row: Row = {"sampler": draw.name, "images / s": share * PART_IMAGES * plan.recipe.evaluate.replicas / busy}
    return row | {"drawing, %": 100 * drawing, "scoring, %": 100 * scoring, "end to end / device": share}


def _share(spans: list[Span], kind: str) -> float:
    """Of the actors' time between their first begin and their last end, how much went into ``kind``."""
    actors = {span.actor for span in spans}
    busy = wall = 0.0
    for actor in actors:
        mine = [span for span in spans if span.actor == actor]
        busy += sum(span.busy[kind] for span in mine)
        wall += mine[-1].end - mine[0].begin
    return busy / wall


def _cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
