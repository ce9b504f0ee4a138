"""Time on a machine that is not quiet: calls take turns, so what slows the machine for a while slows all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median
from types import TracebackType

import torch

MOST = 20  # repetitions of a call
SIZE = {"cpu": 2048, "cuda": 8192}  # of the square matrices whose product is the machine's peak
READ = {"cpu": 1 << 27, "cuda": 1 << 28}  # float32 numbers that are read for the machine's bandwidth


class Stopwatch:
    """Adds up the seconds of the blocks that it encloses, on a GPU without stopping it: ``with watch: ...``."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.total = 0.0
        self.events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def __enter__(self) -> Stopwatch:
        if self.cuda:
            self.events.append((torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)))
            self.events[-1][0].record()
        else:
            self.start = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.cuda:
            self.events[-1][1].record()
        else:
            self.total += time.perf_counter() - self.start

    @property
    def seconds(self) -> float:
        """Of all blocks so far; waits for the GPU."""
        if self.cuda:
            torch.cuda.synchronize()
            return sum(start.elapsed_time(end) for start, end in self.events) / 1000
        return self.total


def once(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, the GPU's work included."""
    watch = Stopwatch(device)
    with watch:
        call()
    return watch.seconds


def turns(
    calls: Mapping[str, Callable[[], object]],
    device: torch.device,
    seconds: float,
    warm: Callable[[], object] | None = None,
) -> dict[str, float]:
    """Median seconds of each call: rounds in which every one has its turn, until each had about ``seconds``.

    ``warm`` is called once before; without it every call is, and that turn does not count.
    """
    for call in [warm] if warm else calls.values():
        call()
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
def peaks(device: torch.device, dtype: torch.dtype, seconds: float = 2.0) -> Peaks:
    """Measured, not looked up: the best of some large products and of some passes over much memory."""
    size = SIZE[device.type]
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    much = torch.zeros(READ[device.type], device=device)
    products, reads = _best(lambda: a @ b, device, seconds), _best(lambda: much.sum(), device, seconds)
    return Peaks(2 * size**3 / products, much.nbytes / reads)


def _best(call: Callable[[], object], device: torch.device, seconds: float) -> float:
    call()
    found: list[float] = []
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline or not found:
        found.append(once(call, device))
    return min(found)
