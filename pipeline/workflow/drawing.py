"""The images of an evaluation, drawn and scored on Ray's actors, and the cache of what is finished.

A fixed pool of Ray Data actors draws fixed ranges of sample ids and returns float64 statistics; the driver merges them
in the order of the ids, so neither the number of actors nor who finishes first changes a digit. A finished draw's
statistics stay in the cache under a fingerprint of all that shaped them, and a rerun draws only what is missing.
Inception's weights travel to the actors as shared arrays, never as a module.
"""

from __future__ import annotations

import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import ray

from pipeline import storage
from pipeline.configuration.fields import Actors
from pipeline.evaluation.artist import Artist
from pipeline.evaluation.draws import Draw
from pipeline.evaluation.plan import EvaluationPlan
from pipeline.host import events, provenance
from pipeline.host.progress import Progress
from pipeline.sampling import sample_files
from pipeline.scoring import instruments
from pipeline.scoring.tally import Outline, Statistics, outline
from pipeline.services import cluster
from pipeline.services.parts import crew_for, made


class Shelf(Mapping[Draw, Statistics]):
    """The statistics of the finished draws of a plan, read when asked for: one may hold half a gigabyte."""

    def __init__(self, plan: EvaluationPlan, draws: list[Draw]) -> None:
        self.plan, self.draws = plan, draws

    def __getitem__(self, draw: Draw) -> Statistics:
        return Statistics.unpack(storage.read_bytes(self.plan.cache(draw)))

    def __iter__(self) -> Iterator[Draw]:
        return iter(self.draws)

    def __len__(self) -> int:
        return len(self.draws)

    def outline(self, draw: Draw) -> Outline:
        """The small parts, without reading the rest."""
        with storage.reading(self.plan.cache(draw)) as file:
            return outline(file)


def collect(plan: EvaluationPlan, frequencies: np.ndarray | None) -> Shelf:
    """The statistics of all draws: out of the cache, or drawn now and put there."""
    draws = plan.draws()
    finished = in_cache(plan)
    todo = [draw for draw in draws if draw not in finished]
    if not todo:
        return Shelf(plan, draws)
    for sentence in plan.stale(todo):
        print(sentence, file=sys.stderr, flush=True)
    total, done = (sum(draw.items for draw in some) for some in (draws, finished))
    growing: dict[Draw, Statistics] = {}
    parts = dict.fromkeys(range(len(todo)), 0)
    with Progress(total, "parts", done=done) as progress:
        for i, part in in_order(parts_of(plan, todo, frequencies)):
            draw = todo[i]
            if parts[i]:
                growing[draw].merge(part)
            else:
                growing[draw] = part
            parts[i] += 1
            if parts[i] == draw.items:
                _finish(plan, draw, growing.pop(draw))
            progress.update(note=draw.name)
            which = {"draw": draw.name, "part": parts[i], "parts": draw.items}
            events.tell("part", folder=plan.recipe.report_uri, **which, done=progress.done, total=total)
    return Shelf(plan, draws)


def in_cache(plan: EvaluationPlan) -> list[Draw]:
    """The draws of a plan of which nothing is missing: their statistics, and the images where they are wanted."""
    names = set(storage.listing(plan.shelf))
    draws = [draw for draw in plan.draws() if plan.cache(draw).rpartition("/")[2] in names]
    return [draw for draw in draws if saved(plan, draw)]


def _finish(plan: EvaluationPlan, draw: Draw, statistics: Statistics) -> None:
    """Put a whole draw away: its images, if they are wanted, and then its statistics, which say that it is done."""
    if draw in plan.samples():
        sample_files.join(plan.samples()[draw], plan.key(draw), draw.items)
    settings = plan.recipe.evaluate
    statistics.origin = {"date": provenance.now(), "batch": settings.batch, "actors": settings.actors}
    statistics.origin |= {"code": plan.code(draw)[:12]} | provenance.version()
    storage.write_bytes(plan.cache(draw), statistics.pack())


def saved(plan: EvaluationPlan, draw: Draw) -> bool:
    """Whether a draw's images are in their file, if the recipe wants them there."""
    wanted = plan.samples().get(draw)
    return wanted is None or sample_files.holds(wanted, plan.key(draw))


def parts_of(
    plan: EvaluationPlan, todo: list[Draw], frequencies: np.ndarray | None, artist: type[Artist] = Artist, **more: Any
) -> Iterable[dict[str, Any]]:
    """The parts of all draws as the actors finish them: {draw, item, statistics}.

    ``artist`` is the actor's class, ``more`` what its constructor takes beside the usual.
    """
    weights = instruments.weights(plan.recipe.evaluate)
    units = [{"draw": i, "item": item} for i, draw in enumerate(todo) for item in range(draw.items)]
    parts = sum(draw.items for draw in plan.draws())
    actors = crew_for(plan.recipe, plan.recipe.evaluate.actors, len(units)).most
    beat = cluster.Heartbeat(plan.recipe, "parts", parts, done=parts - len(units))
    waited: Actors = "auto" if plan.recipe.evaluate.actors == "auto" else actors
    with cluster.session(plan.recipe, waited, "sampling actors"), beat:
        shared = None if weights is None else ray.put(weights)  # a generator, so that it lives as long as the actors
        yield from made(beat, plan.recipe, actors, units, artist, plan, todo, frequencies, shared, **more)


def in_order(rows: Iterable[dict[str, Any]]) -> Iterator[tuple[int, Statistics]]:
    """(draw, part), the parts of each draw in the order of their ids, whoever came first.

    One that comes before its turn waits in a temporary file: parts of Inception's features have tens of megabytes, and
    a slow first one may let hundreds pass.
    """
    following: dict[int, int] = defaultdict(int)
    with tempfile.TemporaryDirectory(prefix="dd-parts-") as folder:
        for row in rows:
            i, part = row["draw"], row["statistics"]
            early = Path(folder, f"{i}-{row['item']}")
            if row["item"] != following[i]:
                early.write_bytes(part)
                continue
            while part is not None:
                yield i, Statistics.unpack(part)
                following[i] += 1
                waiting = Path(folder, f"{i}-{following[i]}")
                part = waiting.read_bytes() if waiting.exists() else None
                waiting.unlink(missing_ok=True)
