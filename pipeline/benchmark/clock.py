"""Time on a machine that is not quiet: calls take turns, so what slows the machine for a while slows all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median

import torch

from pipeline.host.stopwatch import once, warm_up
from pipeline.numerics.precision import Precision

MOST = 20  # repetitions of a call
SIZE = {"cpu": 2048, "cuda": 8192}  # of the square matrices whose product is the machine's peak
DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
READ = {"cpu": 1 << 27, "cuda": 1 << 28}  # float32 numbers that are read for the machine's bandwidth


def turns(
    calls: Mapping[str, Callable[[], object]],
    device: torch.device,
    seconds: float,
) -> dict[str, float]:
    """Median seconds of each call: all are warmed up, then rounds in which every one has its turn, until each had about
    ``seconds``.
    """
    for call in calls.values():
        warm_up(call)
    times: dict[str, list[float]] = {name: [] for name in calls}
    deadline = time.monotonic() + seconds * len(calls)
    for round_ in range(MOST):
        for name in list(calls) if round_ % 2 == 0 else list(calls)[::-1]:
            times[name].append(once(calls[name], device))
        if time.monotonic() > deadline:
            break
    return {name: median(found) for name, found in times.items()}


@dataclass(frozen=True)
class Peaks:
    """What a machine reaches with nothing else to do: multiply-adds count twice."""

    flops: float  # operations a second of a large matrix product
    bytes: float  # read a second from main memory


@torch.no_grad()
def peaks(device: torch.device, precision: Precision, seconds: float = 2.0) -> Peaks:
    """Measured, not looked up: the best of some large products and of some passes over much memory.

    The products are those of a teacher's ``precision``; a CPU multiplies fp16 through float32.
    """
    through_float32 = device.type == "cpu" and precision == "fp16"
    size, dtype = SIZE[device.type], torch.float32 if through_float32 else DTYPES[precision]
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    much = torch.zeros(READ[device.type], device=device)
    products, reads = _best(lambda: a @ b, device, seconds), _best(lambda: much.sum(), device, seconds)
    return Peaks(2 * size**3 / products, much.nbytes / reads)


def _best(call: Callable[[], object], device: torch.device, seconds: float) -> float:
    warm_up(call)
    found: list[float] = []
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline or not found:
        found.append(once(call, device))
    return min(found)
