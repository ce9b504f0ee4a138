"""The minutes of a check: what a step gets of them, and how each step ended. It knows no process and no device."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from pipeline.device.plan import Step

CLOSING = 10.0  # seconds at the end in which a step that runs over is ended and the sheet is written
State = Literal["measured", "cut", "failed", "stopped", "left"]


@dataclass(frozen=True)
class Ending:
    """How a step ended.

    ``state`` is measured; cut, where its time ended before all was measured; failed; stopped, by a signal; or left,
    never begun. ``given`` and ``seconds`` are those that it had and took, ``shortened`` whether it had fewer than it
    wanted. ``values`` are its figures by key, None for what the machine does not tell. ``about`` are sentences for the
    reader, ``details`` lists of names, such as those of failed tests.
    """

    state: State
    given: float = 0.0
    seconds: float = 0.0
    shortened: bool = False
    values: dict[str, float | None] = field(default_factory=dict)
    about: list[str] = field(default_factory=list)
    details: dict[str, list[str]] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**vars(self), "given": round(self.given, 1), "seconds": round(self.seconds, 1)}


class Budget:
    """Seconds that begin to run at once, on a clock that may be another than the machine's."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.seconds, self.clock, self.begun = seconds, clock, clock()

    @property
    def used(self) -> float:
        return self.clock() - self.begun

    @property
    def left(self) -> float:
        """Seconds for steps: without those of the end."""
        return self.seconds - CLOSING - self.used

    def share(self, step: Step) -> float:
        """Seconds of a step: what it wants, less where less is left, 0 where that is not worth beginning."""
        given = min(step.wanted, self.left)
        return given if given >= step.least else 0.0


def conduct(
    steps: Iterable[Step], budget: Budget, carry_out: Callable[[Step, float], Ending]
) -> Iterator[tuple[Step, Ending]]:
    """The steps in their order, each with its outcome as soon as it has one; a later, cheaper step may still fit.

    Whatever ``carry_out(step, seconds)`` raises passes, a signal among it.
    """
    for step in steps:
        seconds = budget.share(step)
        if seconds:
            yield step, carry_out(step, seconds)
        else:
            left = f"{max(budget.left, 0):.0f} s were left, and it needs {step.least:g}."
            yield step, Ending("left", about=[left])
