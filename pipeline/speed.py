"""How long a sampler takes: seconds per image at several batch sizes, in one process with nothing else
running.

Noise, labels and uniform draws are made beforehand, so what is timed is the networks: from inputs to
embeddings and from embeddings to images.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
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
def measure(models: Models, sampler: Sampler, batches: tuple[int, ...], budget: float = 10.0) -> list[Speed]:
    """Time ``sampler`` at batch 1 and at each of ``batches`` within about ``budget`` seconds in all.

    Every size is warmed up once, then repeated up to 20 times within its share of the budget, and at least
    once. A size that by the last one's pace would overrun what is left is not measured, nor any beyond it.
    """
    sizes = sorted({1, *batches})
    started = time.perf_counter()
    out: list[Speed] = []
    for i, batch in enumerate(sizes):
        left = budget - (time.perf_counter() - started)
        if out and 2 * out[-1].ms / 1000 * batch > left:  # the warm-up and one repeat
            break
        share = time.perf_counter() + left / (len(sizes) - i)
        inputs = models.inputs(range(batch))
        decode = partial(models.teacher.decode, sampler.sample(models, inputs))
        decode()
        draws: list[float] = []
        decodes: list[float] = []
        while not draws or (len(draws) < REPEATS and time.perf_counter() < share):
            draws.append(_seconds(partial(sampler.sample, models, inputs), models.device))
            decodes.append(_seconds(decode, models.device))
        whole = median(a + b for a, b in zip(draws, decodes, strict=True))
        out.append(Speed(batch, 1000 * median(draws) / batch, 1000 * whole / batch, len(draws)))
    return out


def device_name(device: torch.device | str) -> str:
    """The GPU's or the processor's own name."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    listing = Path("/proc/cpuinfo")
    lines = listing.read_text().splitlines() if listing.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def _seconds(call: Callable[[], torch.Tensor], device: torch.device | str) -> float:
    _wait(device)
    start = time.perf_counter()
    call()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device | str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
