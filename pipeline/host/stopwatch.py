"""Seconds of what runs on a device, and the one rule of warming up before any are counted."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType

import torch

WARM_UP = 2  # whole calls before one counts: libraries set themselves up in the first, CUDA graphs record in the second


def warm_up(call: Callable[[], object]) -> None:
    """Call what will be timed as often as it takes to be in its steady state."""
    for _ in range(WARM_UP):
        call()


def now(device: torch.device | str) -> float:
    """Seconds on a clock of this process, read when the device has finished all that it was given."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


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
