"""Shards that are late: who has nothing left to make makes a second copy of them, and only one copy is committed.

At the end of a pass replicas stand idle while the last shards are made, which a slow node, or one that is busy with
something else, may hold for long. Each idle replica then gets a spare task: it waits until a shard is late and makes it
again. The copies are the same but for the rounding of other hardware, so that of which one was committed the other must
not replace it.
"""

from __future__ import annotations

import statistics
import time
from contextlib import suppress
from typing import Any

import ray
from ray.exceptions import RayError

LATE = 1.5  # times what a shard takes, in the median of those that were made, after which one is late
PAUSE = 1.0  # seconds between two questions of a replica that has nothing to make
SPARE = -1  # the number of a task that is to make whatever is late
ORIGINAL = 0  # the copy that every shard's own task makes; those of spare tasks count from 1


class Book:
    """What is made where, in one pass: an actor, which takes no CPU."""

    def __init__(self) -> None:
        self.begun: dict[int, tuple[float, int]] = {}  # by number: when, and how many rows
        self.took: list[float] = []  # seconds
        self.copied: set[int] = set()
        self.committing: dict[int, int] = {}  # by number: the copy that is written, or was

    def begin(self, number: int, rows: int) -> None:
        """One that is begun again, because who had it died, is in work from now on."""
        self.begun[number] = time.monotonic(), rows

    def end(self, number: int) -> None:
        """A copy was made, or has failed, which another pass sees to."""
        if number in self.begun:
            self.took.append(time.monotonic() - self.begun.pop(number)[0])
        self.copied.add(number)

    def late(self) -> tuple[int, int] | None:
        """(number, rows) of a shard to copy, or of ``SPARE`` while none is late; None where none can be any more."""
        waiting = [(when, number, rows) for number, (when, rows) in self.begun.items() if number not in self.copied]
        if not waiting:
            return None
        when, number, rows = min(waiting)
        if not self.took or time.monotonic() - when < LATE * statistics.median(self.took):
            return SPARE, 0
        self.copied.add(number)
        return number, rows

    def claim(self, number: int, copy: int) -> bool:
        """Whether this copy may be written: the first that asks may, as often as Ray has it written again."""
        return self.committing.setdefault(number, copy) == copy


class Stragglers:
    """A worker's end of the ``Book``. What it says of shards that are late may be lost, and no shard with it."""

    def __init__(self, book: Any) -> None:
        self._book = book

    def begin(self, number: int, rows: int) -> None:
        self._book.begin.remote(number, rows)

    def end(self, number: int) -> None:
        self._book.end.remote(number)

    def wait(self) -> tuple[int, int] | None:
        """(number, rows) of a shard that is late, as soon as there is one; None once there will be none."""
        with suppress(RayError):  # the book is gone, and the pass with it
            while (found := ray.get(self._book.late.remote())) and found[0] == SPARE:
                time.sleep(PAUSE)
            return found
        return None

    def claim(self, number: int, copy: int) -> bool:
        """Whether this copy of a shard may be written."""
        try:
            return bool(ray.get(self._book.claim.remote(number, copy)))
        except RayError:  # the pass is over; a shard that nobody has written comes into another
            return False
