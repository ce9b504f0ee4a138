"""What it costs to tell Prometheus, as a share of the work that is told of, each ratio measured in one process.

``python tests/support/metrics_cost.py``, on a local Ray that it starts; ``--config`` and other flags as for a job.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import numpy as np
import torch

from pipeline.command_line import parse
from pipeline.host.stopwatch import Stopwatch, warm_up
from pipeline.pairs.facts import PairFacts
from pipeline.pairs.passes import ReplicaWorker
from pipeline.pairs.replica import Replica
from pipeline.recipe import Recipe
from pipeline.services import cluster
from pipeline.services.metrics import GAUGES, Recorder
from pipeline.training.step import seconds_per_step

CALLS, BATCHES = 2_000, 4


def each(call: Callable[[], object]) -> float:
    """Seconds of a call, the median of ten blocks."""
    warm_up(call)
    found = []
    for _ in range(10):
        begun = time.perf_counter()
        for _ in range(CALLS // 10):
            call()
        found.append((time.perf_counter() - begun) / (CALLS // 10))
    return median(found)


def watched() -> None:
    """What a replica does at an AR step to know the seconds of flow matching."""
    with Stopwatch(torch.device("cpu")):
        pass


def pairs(recipe: Recipe) -> float:
    """Share of a batch's time in its three records and the stopwatches of its AR steps, measured beside it."""
    facts, announcer = PairFacts.of(recipe), None
    worker = ReplicaWorker(Replica, recipe, facts, {}, announcer)  # type: ignore[arg-type]
    ids = facts.ids(0, recipe.pairs.batch)
    noise, steps, shares = facts.noise(ids), worker.replica.teacher.layout.steps, []
    worker.replica.make(ids, noise)
    for _ in range(BATCHES):
        cost = each(partial(worker.count, len(ids), 1e-9, 1e-9)) + (steps + 2) * each(watched)
        begun = time.perf_counter()
        worker.replica.make(ids, noise)
        seconds = time.perf_counter() - begun
        shares.append(cost / seconds)
        print(f"pairs: {1e6 * cost:.0f} us of a batch of {len(ids)}, which takes {seconds:.2f} s")
    return float(np.median(shares))


def training(recipe: Recipe) -> float:
    """Share of the time between two log lines in the seven gauges of one."""
    cost = each(partial(Recorder(recipe), dict.fromkeys(GAUGES, 0.5)))
    seconds = recipe.train.log_every * seconds_per_step(recipe)
    print(f"training: {1e6 * cost:.0f} us of {recipe.train.log_every} steps, which take {seconds:.2f} s")
    return cost / seconds


def main(*flags: Any) -> None:
    recipe = parse(__doc__, *flags)
    cluster.connect(recipe)
    print(f"pairs: {100 * pairs(recipe):.4f} % of the time")
    print(f"training: {100 * training(recipe):.4f} % of the time")


if __name__ == "__main__":
    main()
