"""Progress of a long loop: one updating bar on a terminal, a readable line now and then in a job's log."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from tqdm import tqdm

from pipeline.host import events


class Progress:
    """``with Progress(40, "shards") as progress: progress.update(note="1,520 rows/s")``, written to stderr.

    In a log a line is written after the first update, at most every ``every`` seconds, and at the end. ``done`` of the
    ``total`` were there before and do not count towards the speed. Where units are made side by side, ``begin`` says
    so, and time counts from the first one on: what a pool waits for before is no part of a unit's time. Where nobody
    says so, the time left is told from the second update on, by what came after the first.
    """

    def __init__(self, total: int, unit: str, every: float = 30.0, done: int = 0) -> None:
        self.total, self.unit, self.every, self.done = total, unit, every, done
        self._before, self._start, self._last = done, time.monotonic(), -float("inf")
        self._abreast, self._warm = 0, (0, 0.0)  # units in work at once; units and seconds of the first of each
        self._bar = None
        if sys.stderr.isatty():
            form = "{desc} {n_fmt}/{total_fmt} |{bar}| {elapsed}, {remaining} left{postfix}"
            self._bar = tqdm(total=total, initial=done, desc=unit, bar_format=form, dynamic_ncols=True)

    def begin(self, abreast: int) -> None:
        """A unit is begun, with which ``abreast`` are in work."""
        if not self._abreast:
            self._start = time.monotonic()
            if self._bar is not None:
                self._bar.unpause()
        self._abreast = max(self._abreast, abreast)

    def update(self, n: int = 1, note: str = "") -> None:
        """``n`` more are done; ``note`` says how it goes."""
        self.done += n
        made = self.done - self._before
        if not self._warm[0] and made >= max(1, self._abreast):
            self._warm = made, self.seconds
        if self._bar is not None:
            self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(n)
            return
        now = time.monotonic()
        if now - self._last >= self.every or self.done >= self.total:
            self._last = now
            print(", ".join(filter(None, [self._count(), note, self._left()])), file=sys.stderr, flush=True)

    def say(self, line: str) -> None:
        """Write a line of its own, above the bar if there is one; it is a warning among the events."""
        events.warn(line)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._start

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def _count(self) -> str:
        return f"{self.unit} {self.done:,}/{self.total:,}"

    def _left(self) -> str:
        """Time left, once as many are done as are made at once; then without these, which were slow to come.

        Without ``begin`` nobody knows when the first ones were begun, so that nothing is said by them.
        """
        made, left, seconds = self.done - self._before, self.total - self.done, self.seconds
        if left <= 0 or not made:
            return f"{duration(seconds)} in all"
        first, cold = self._warm
        if not first or (made == first and not self._abreast):
            return ""
        if made >= 2 * first or not self._abreast:
            made, seconds = made - first, seconds - cold
        return f"{duration(seconds / made * left)} left"


def pace(rate: float) -> str:
    """A rate to two digits where it is below 10, so that a slow one is not 0: 1,520, 8.4, 0.017."""
    return f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"


def duration(seconds: float) -> str:
    """1.4 s, 12 min, 3 h 20 min, 2 d 4 h."""
    if seconds < 90:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes // 1440} d {minutes % 1440 // 60} h"
