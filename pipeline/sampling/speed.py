"""How long a sampler takes: milliseconds per image at several batch sizes, in one process, and how many times as fast
it is as the teacher at the same size.

Noise, labels and uniform draws are made beforehand, and prompts are encoded, so what is timed is the networks: from
inputs to embeddings and from embeddings to images. The text encoder takes a turn of its own in every round: from its
letters to its image, a prompt takes the sum.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import median

import numpy as np
import torch

from pipeline.host.stopwatch import WARM_UP, now, warm_up
from pipeline.models.conditions import Prompts, of_column
from pipeline.report.results import EncoderTime, Pace, Paces, SpeedAtBatch, SpeedBaseline
from pipeline.sampling.samplers import Inputs, Models, Sampler

LEAST, MOST = 3, 20  # rounds at one size: an error needs several
CALLS = f"{LEAST} to {MOST} calls after {WARM_UP} to warm up"
RESAMPLED = 1_000  # times that the rounds are drawn anew for an error


@dataclass(frozen=True)
class Speed:
    """One sampler at one batch size: milliseconds per image, medians without (``network_ms``) and with decoding
    (``ms``), and ``rounds``, the latter of every round in the order in which they ran.

    ``encoder`` are the text encoder's milliseconds per image in the same rounds; empty where no prompt is read.
    """

    batch: int
    network_ms: float
    ms: float
    rounds: tuple[float, ...]
    encoder: tuple[float, ...] = ()


def as_json(speed: Speed) -> SpeedAtBatch:
    """A speed as report.json holds it."""
    out: SpeedAtBatch = {"batch": speed.batch, "network_ms": speed.network_ms, "ms": speed.ms, "rounds": speed.rounds}
    if speed.encoder:
        out["encoder"] = speed.encoder
    return out


@torch.no_grad()
def measure(
    models: Models, samplers: Sequence[Sampler], batches: Collection[int], budget: float = 10.0
) -> dict[Sampler, list[Speed]]:
    """Time every sampler at batch 1 and at each of ``batches``, all of them at every size, however long that takes.

    At each size every sampler is warmed up, and then they take turns: a round is one call of each, and where samples
    are drawn for prompts, one of the text encoder. So whatever slows the machine for a while slows all of them, and the
    ratio of two stands. There are 3 rounds or more, up to 20 while their share of ``budget`` seconds a sampler lasts. A
    size that does not fit into the device's memory is missing from the list of the sampler that it does not fit.
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
    turns = [_Turn(models, sampler, inputs) for sampler in samplers]
    condition = of_column(models.column(range(batch)))
    encoding = [_Encoding(models, condition)] if isinstance(condition, Prompts) else []
    every: list[_Turn | _Encoding] = [*turns, *encoding]
    fitting = [one for one in every if _fits(partial(warm_up, one.call))]
    for round_ in range(MOST):
        for one in fitting[:: -1 if round_ % 2 else 1]:
            if not _fits(one.call):
                fitting.remove(one)
        if round_ + 1 >= LEAST and now(models.device) - begun >= seconds:
            break
    encoder = next((one.rounds(batch) for one in encoding if one in fitting), ())
    return {turn.sampler: turn.speed(batch, encoder) for turn in turns if turn in fitting}


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

    def speed(self, batch: int, encoder: tuple[float, ...]) -> Speed:
        """What the calls after the warm-up took, and ``encoder``'s beside them, where the sampler reads prompts."""
        draws, decodes = self.draws[WARM_UP:], self.decodes[WARM_UP:]
        rounds = tuple(1000 * (a + b) / batch for a, b in zip(draws, decodes, strict=True))
        read = () if self.sampler.frequencies else encoder
        return Speed(batch, 1000 * median(draws) / batch, median(rounds), rounds, read)


class _Encoding:
    """The text encoder on the prompts of one size: the seconds of every call so far."""

    def __init__(self, models: Models, prompts: Prompts) -> None:
        self.models, self.prompts = models, prompts
        self.seconds: list[float] = []

    def call(self) -> None:
        """Encode the batch once, and note the seconds."""
        start = now(self.models.device)
        if self.models.encode:
            self.models.encode(self.prompts)
        self.seconds.append(now(self.models.device) - start)

    def rounds(self, batch: int) -> tuple[float, ...]:
        """Milliseconds per image of each call after the warm-up."""
        return tuple(1000 * seconds / batch for seconds in self.seconds[WARM_UP:])


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


def with_encoder(speeds: Sequence[Speed], teacher: Sequence[Speed]) -> list[Speed]:
    """The same speeds with the text encoder's time in every round, at the sizes at which that was measured.

    The teacher reads prompts and so says at which. A sampler that reads none takes what it took.
    """
    timed = {one.batch for one in teacher if one.encoder}
    return [_with_encoder(one) if one.encoder else one for one in speeds if one.batch in timed]


def _with_encoder(speed: Speed) -> Speed:
    rounds = tuple(a + b for a, b in zip(speed.rounds, speed.encoder, strict=True))
    return replace(
        speed, network_ms=speed.network_ms + median(speed.encoder), ms=median(rounds), rounds=rounds, encoder=()
    )


def encoder_times(teacher: Sequence[Speed]) -> list[EncoderTime]:
    """The text encoder's own time at each size: the median of its rounds, its error from drawing them anew."""
    return [
        {"batch": one.batch, "ms": median(one.encoder), "ms_std": _error(one.encoder)} for one in teacher if one.encoder
    ]


def _error(rounds: tuple[float, ...]) -> float:
    """The standard error of the median of rounds."""
    picked = np.random.default_rng(0).integers(0, len(rounds), (RESAMPLED, len(rounds)))
    return float(np.std(np.median(np.array(rounds)[picked], axis=1)))


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


def paces(mine: Sequence[Speed], teacher: Sequence[Speed], batch: int | None) -> Paces:
    """``beside_teacher``; for prompts, the same once more with the text encoder's time on both sides."""
    out: Paces = {**beside_teacher(mine, teacher, batch)}
    if encoded := with_encoder(mine, teacher):
        out["with_encoder"] = beside_teacher(encoded, with_encoder(teacher, teacher), batch)
    return out


def baseline(teacher: Sequence[Speed], batch: int | None) -> SpeedBaseline:
    """What speed-ups are over, and the text encoder's own times, where there is one."""
    out: SpeedBaseline = {"teacher": list(map(as_json, teacher)), "throughput_batch": batch}
    if encoder := encoder_times(teacher):
        out["encoder"] = encoder
    return out
