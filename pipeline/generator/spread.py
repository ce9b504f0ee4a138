"""The parts of many images, drawn by this process alone or by a pool of actors, and kept as they are finished.

Ray is imported when there are actors, and not before.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch

from pipeline.generator.generator import Generator
from pipeline.generator.request import Request
from pipeline.generator.targets import Target
from pipeline.host.behind import Behind
from pipeline.host.errors import Refused, Unfinished
from pipeline.host.progress import Progress
from pipeline.recipe import Recipe
from pipeline.services.ray_address import LOCAL, address
from pipeline.settings.cluster import ClusterSettings
from pipeline.settings.evaluate import EvaluateSettings
from pipeline.settings.pairs import PairSettings
from pipeline.settings.train import TrainSettings

MANY = 10_000  # images from which actors draw, where nobody says how many; Ray takes seconds to start
THREADS, PENDING = 4, 32  # of writing, beside a process that draws; calls of 16 pictures, or of a part of an .npz
RULE = (
    f"by default 0, which is this process without Ray, below {MANY:,} images. From there on, one for each GPU that Ray"
    " has, where RAY_ADDRESS names a cluster, or this machine, with more than one; without a GPU, one of one thread for"
    " each core"
)


def missing(places: list[Target]) -> list[tuple[int, int]]:
    """(place, part) of all that is still to be made; Refused for a place that holds something else."""
    return [(draw, item) for draw, place in enumerate(places) for item in place.missing()]


def make(
    request: Request, places: list[Target], units: list[tuple[int, int]], generator: Generator | None, actors: int
) -> None:
    """Make ``units``, all that is missing of a request, and finish its files; Unfinished where they do not come.

    ``generator`` draws, or that of each of ``actors``, where it is None.
    """
    total, left = request.count * len(places), sum(len(request.ids(item)) for _, item in units)
    if left < total:
        print(f"{total - left:,} of {total:,} images are there and kept.", file=sys.stderr, flush=True)
    if units:
        for place in places:
            place.begin()
        made = _alone(request, places, units, generator) if generator else _by_actors(request, places, units, actors)
        with Progress(total, "images", done=total - left) as progress:
            for _, item in made:
                progress.update(len(request.ids(item)))
        if lost := missing(places):
            raise Unfinished(
                f"{len(lost)} of {len(units)} parts were made and are not at --out as this process sees it; give --out"
                " a folder that every node shares, or an s3:// or gs:// URI."
            )
    for place in places:
        place.finish()


def _alone(
    request: Request, places: list[Target], units: list[tuple[int, int]], generator: Generator
) -> Iterator[tuple[int, int]]:
    """The units as they are drawn; the files of one are written while the next is drawn, and all when this ends."""
    with Behind(THREADS, PENDING) as behind:
        for draw, item in units:
            places[draw].put(item, _drawn(request, generator, draw, item), behind)
            yield draw, item


def _drawn(request: Request, generator: Generator, draw: int, item: int) -> Iterator[np.ndarray]:
    """uint8 images [B, 3, H, W] of a unit, a batch after the other."""
    ids = request.ids(item)
    for images in generator.batches(request.samplers[draw], request.of(ids), request.seed, ids):
        yield images.numpy()


# ---- actors


class SamplingActor:
    """A Ray Data actor: a generator of its own, which draws and writes one part at a time.

    ``working`` is a context around each part, which tells others of it.
    """

    def __init__(
        self,
        request: Request,
        places: list[Target],
        working: Callable[[str], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        torch.set_num_threads(1)  # as many as it has CPUs
        self.request, self.places, self.working = request, places, working
        self.generator = Generator.from_pretrained(request.student, request.device, teacher=request.teacher)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        """{draw [1], item [1]} -> the same, when the part's files are where they belong."""
        from pipeline.services import cluster

        draw, item = int(batch["draw"][0]), int(batch["item"][0])
        with self.working(f"part {item + 1} of {self.request.samplers[draw].name}"):
            try:
                with Behind(THREADS, PENDING) as behind:
                    self.places[draw].put(item, _drawn(self.request, self.generator, draw, item), behind)
            except Exception as error:
                if cluster.device_error(error):
                    cluster.end_process(error)
                raise
        return batch


def _by_actors(
    request: Request, places: list[Target], units: list[tuple[int, int]], actors: int
) -> Iterator[tuple[int, int]]:
    """The units as a pool of actors finishes them; that of an actor which dies is made again by another."""
    from pipeline.services import cluster, parts

    actors = min(actors, len(units))
    recipe = _recipe(request.places[0], request.device, actors)
    beat = cluster.Heartbeat(recipe, "parts", len(units))
    rows = [{"draw": draw, "item": item} for draw, item in units]
    with cluster.session(recipe, actors, "sampling actors"), beat:
        for row in parts.made(beat, recipe, actors, rows, SamplingActor, request, places):
            yield int(row["draw"]), int(row["item"])


def _recipe(place: str, device: str, actors: int) -> Recipe:
    """What the services want to know: what an actor needs, how many a local Ray must hold, where the files go."""
    return Recipe(
        name="sample",
        run=place,
        pairs=PairSettings(actors=1),
        train=TrainSettings(workers=1),
        evaluate=EvaluateSettings(actors=actors),
        cluster=ClusterSettings(gpus=0 if device == "cpu" else 1),
    )


def plan(actors: int | None, device: str | None, count: int, place: str) -> tuple[int, str]:
    """(how many actors draw, 0 for this process; what torch calls where), as ``RULE`` says where nobody asks for more.

    The Ray of RAY_ADDRESS is joined where it has to be asked. Refused where a GPU is asked for and there is none.
    """
    here, joined = torch.cuda.device_count(), address() != LOCAL
    alone = actors == 0 or (actors is None and count < MANY)
    gpus = _room(place, "cuda") if joined and not alone else here
    kind = device or ("cuda" if gpus else "cpu")
    if kind != "cpu" and not gpus:
        raise Refused(f"--device is {kind}, and no GPU is found; leave it out to draw on the CPU.")
    if alone:
        return 0, kind
    kind = torch.device(kind).type  # which of them, Ray says
    if actors is None and not joined:
        found = gpus if kind != "cpu" else len(os.sched_getaffinity(0))
        actors = found if found > 1 else 0
    return max(1, _room(place, kind)) if actors is None else actors, kind


def _room(place: str, device: str) -> int:
    """How many actors the cluster of RAY_ADDRESS, which is joined, has room for."""
    from pipeline.services import cluster

    recipe = _recipe(place, device, 1)
    cluster.connect(recipe)
    return cluster.places(recipe)
