"""How long a sampler takes: milliseconds per image at several batch sizes, in one process, and how many times as fast
it is as the teacher at the same size.

Noise, labels and uniform draws are made beforehand, so what is timed is the networks: from inputs to embeddings and
from embeddings to images.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median

import numpy as np
import torch

from pipeline.host.stopwatch import WARM_UP, now, warm_up
from pipeline.report.results import Pace, SpeedAtBatch
from pipeline.sampling.samplers import Inputs, Models, Sampler

LEAST, MOST = 3, 20  # rounds at one size: an error needs several
CALLS = f"{LEAST} to {MOST} calls after {WARM_UP} to warm up"
RESAMPLED = 1_000  # times that the rounds are drawn anew for an error


@dataclass(frozen=True)
class Speed:
    """One sampler at one batch size: milliseconds per image, medians without (``network_ms``) and with decoding
    (``ms``), and ``rounds``, the latter of every round in the order in which they ran.
    """

    batch: int
    network_ms: float
    ms: float
    rounds: tuple[float, ...]


def as_json(speed: Speed) -> SpeedAtBatch:
    """A speed as report.json holds it."""
    return {"batch": speed.batch, "network_ms": speed.network_ms, "ms": speed.ms, "rounds": speed.rounds}


@torch.no_grad()
def measure(
    models: Models, samplers: Sequence[Sampler], batches: Collection[int], budget: float = 10.0
) -> dict[Sampler, list[Speed]]:
    """Time every sampler at batch 1 and at each of ``batches``, all of them at every size, however long that takes.

    At each size every sampler is warmed up, and then they take turns: a round is one call of each. So whatever slows
    the machine for a while slows all of them, and the ratio of two stands. There are 3 rounds or more, up to 20 while
    their share of ``budget`` seconds a sampler lasts. A size that does not fit into the device's memory is missing from
    the list of the sampler that it does not fit.
    """
    out: dict[Sampler, list[Speed]] = {sampler: [] for sampler in samplers}
    sizes, left = sorted({1, *batches}), budget * len(out)
    for i, batch in enumerate(sizes):
        begun = now(models.device)
        for sampler, found in _at(models, list(out), batch, left / (len(sizes) - i)).items():
            out[sampler].append(found)
        left -= now(models.device) - begun
    return out


def _at(models: Models, samplers: Sequence[Sampler], batch: int, seconds: float) -> dict[Sampler, Speed]:
    """One size: at least LEAST rounds, and more for about so many ``seconds``, the warm-up among them."""
    begun, inputs = now(models.device), models.inputs(range(batch))
    turns = {sampler: _Turn(models, sampler, inputs) for sampler in samplers}
    for sampler, turn in turns.copy().items():
        if not _fits(partial(warm_up, turn.call)):
            del turns[sampler]
    for round_ in range(MOST):
        for sampler in list(turns)[:: -1 if round_ % 2 else 1]:
            if not _fits(turns[sampler].call):
                del turns[sampler]
        if round_ + 1 >= LEAST and now(models.device) - begun >= seconds:
            break
    return {sampler: turn.speed(batch) for sampler, turn in turns.items()}


def _fits(call: Callable[[], None]) -> bool:
    """Whether the device's memory was enough for it."""
    try:
        call()
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return False
    return True


class _Turn:
    """One sampler at one size: what it is called with, and the seconds of every call so far."""

    def __init__(self, models: Models, sampler: Sampler, inputs: Inputs) -> None:
        self.models, self.sampler, self.inputs = models, sampler, inputs
        self.draws: list[float] = []
        self.decodes: list[float] = []

    def call(self) -> None:
        """Draw and decode the batch once, and note the seconds of either."""
        device = self.models.device
        start = now(device)
        embeddings = self.sampler.sample(self.models, self.inputs)
        drawn = now(device)
        self.models.decode(embeddings, self.sampler.student)
        self.draws.append(drawn - start)
        self.decodes.append(now(device) - drawn)

    def speed(self, batch: int) -> Speed:
        """What the calls after the warm-up took."""
        draws, decodes = self.draws[WARM_UP:], self.decodes[WARM_UP:]
        rounds = tuple(1000 * (a + b) / batch for a, b in zip(draws, decodes, strict=True))
        return Speed(batch, 1000 * median(draws) / batch, median(rounds), rounds)


# ---- ratios


def speed_up(mine: Speed, teacher: Speed) -> tuple[float, float]:
    """How many times as fast as the teacher at the same batch, and the standard error of that.

    The ratio of the medians; for its error the rounds that both ran are drawn anew with replacement, 1,000 times, and
    the deviation of their ratios is taken. ValueError for two sizes: such a ratio says nothing about the samplers.
    """
    if mine.batch != teacher.batch:
        raise ValueError(f"a speed-up of batch {mine.batch} over batch {teacher.batch} compares batches, not samplers.")
    count = min(len(mine.rounds), len(teacher.rounds))
    picked = np.random.default_rng(0).integers(0, count, (RESAMPLED, count))
    theirs, ours = (np.median(np.array(one.rounds)[picked], axis=1) for one in (teacher, mine))
    return teacher.ms / mine.ms, float(np.std(theirs / ours))


def throughput_batch(speeds: Iterable[Sequence[Speed]]) -> int | None:
    """The largest batch above 1 at which all of these samplers were timed; None without any."""
    sizes = [{one.batch for one in of_sampler} for of_sampler in speeds]
    common = set.intersection(*sizes) - {1} if sizes else set()
    return max(common, default=None)


def beside_teacher(mine: Sequence[Speed], teacher: Sequence[Speed], batch: int | None) -> Pace:
    """A row's figures of speed, each over the AR teacher's at the same batch: at batch 1 and at the throughput batch.

    "ms" per image, "speedup" and "speedup_std" at batch 1; "throughput" in images a second, "throughput_speedup" and
    "throughput_speedup_std" at ``batch``, which is "throughput_batch". What was not timed is missing.
    """
    own, theirs = ({one.batch: one for one in speeds} for speeds in (mine, teacher))
    out: Pace = {}
    if 1 in own:
        out["ms"] = own[1].ms
        if 1 in theirs:
            out["speedup"], out["speedup_std"] = speed_up(own[1], theirs[1])
    if batch in own:
        out |= {"throughput_batch": float(batch), "throughput": 1000 / own[batch].ms}
        if batch in theirs:
            out["throughput_speedup"], out["throughput_speedup_std"] = speed_up(own[batch], theirs[batch])
    return out
