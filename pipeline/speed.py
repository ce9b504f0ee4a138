"""How long a sampler takes: seconds per image at several batch sizes, in one process with nothing else
running.

Noise, labels and uniform draws are made beforehand, so what is timed is the networks: from inputs to
embeddings and from embeddings to images.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

import torch

from pipeline.samplers import Models, Sampler

REPEATS = 20


@dataclass(frozen=True)
class Speed:
    """Medians at one batch size; milliseconds per image, without (``network_ms``) and with decoding
    (``ms``).
    """

    batch: int
    network_ms: float
    ms: float
    repeats: int


@torch.no_grad()
def measure(
    models: Models, samplers: Sequence[Sampler], batches: tuple[int, ...], budget: float = 10.0
) -> dict[Sampler, list[Speed]]:
    """Time every sampler at batch 1 and at each of ``batches`` within about ``budget`` seconds a sampler.

    Samplers take turns, call by call: whatever slows the machine for a while slows all of them, and the ratio
    of two stands. Every size is warmed up once, then repeated up to 20 times within its share of the sampler's
    budget, and at least once. A size that by the last one's pace would overrun what is left of it is not
    measured, nor any beyond it.
    """
    out: dict[Sampler, list[Speed]] = {sampler: [] for sampler in samplers}
    left = dict.fromkeys(samplers, budget)
    sizes = sorted({1, *batches})
    for i, batch in enumerate(sizes):
        fit = [s for s in out if not i or (len(out[s]) == i and 2 * out[s][-1].ms / 1000 * batch <= left[s])]
        stopwatches = {sampler: _Stopwatch(models, sampler, batch, left[sampler] / (len(sizes) - i)) for sampler in fit}
        for _ in range(REPEATS):
            for stopwatch in stopwatches.values():
                stopwatch.repeat()
        for sampler, stopwatch in stopwatches.items():
            out[sampler].append(stopwatch.speed())
            left[sampler] -= stopwatch.spent
    return out


class _Stopwatch:
    """One sampler at one batch size: a warm-up, then a call whenever ``share`` seconds are not yet spent."""

    def __init__(self, models: Models, sampler: Sampler, batch: int, share: float) -> None:
        self.device, self.batch, self.share = models.device, batch, share
        self.draw = partial(sampler.sample, models, models.inputs(range(batch)))
        self.decode = partial(models.decode, student=sampler.student)
        self.draws: list[float] = []
        self.decodes: list[float] = []
        self.spent = sum(self._once())

    def repeat(self) -> None:
        if not self.draws or self.spent < self.share:
            drawing, decoding = self._once()
            self.draws.append(drawing)
            self.decodes.append(decoding)
            self.spent += drawing + decoding

    def speed(self) -> Speed:
        whole = median(a + b for a, b in zip(self.draws, self.decodes, strict=True))
        return Speed(self.batch, 1000 * median(self.draws) / self.batch, 1000 * whole / self.batch, len(self.draws))

    def _once(self) -> tuple[float, float]:
        start = self._now()
        embeddings = self.draw()
        drawn = self._now()
        self.decode(embeddings)
        return drawn - start, self._now() - drawn

    def _now(self) -> float:
        if torch.device(self.device).type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def device_name(device: torch.device | str) -> str:
    """The GPU's or the processor's own name."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    listing = Path("/proc/cpuinfo")
    lines = listing.read_text().splitlines() if listing.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()
