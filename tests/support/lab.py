"""Functions and actors that fail in every way; importable in Ray's workers, whom ``conftest`` gives this folder."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from pipeline.host.errors import Missing, Outage, Refused, Unfinished


class Diverged(Unfinished):
    """A kind of ours that only this module knows."""


KINDS: dict[str, Exception] = {
    "refused": Refused("pairs.count is 3; it must be 4: change it."),
    "missing": Missing("there is no file x; check the path."),
    "unfinished": Unfinished("the disk is full; free some."),
    "outage": Outage("s3://bucket does not answer; run the same command again."),
    "diverged": Diverged("the loss is inf; lower train.lr."),
    "bug": ZeroDivisionError("division by zero"),
    "two lines": KeyError("one\ntwo"),
}


def fail(kind: str) -> None:
    """Raise one of KINDS, or take the process down."""
    if kind == "death":
        os._exit(1)
    raise KINDS[kind]


def linger(place: str) -> None:
    """Leave a file to say that the call has begun, and never end."""
    Path(place).touch()
    time.sleep(3600)


class Falling:
    """An actor whose constructor fails, and if not that, its work."""

    def __init__(self, kind: str = "") -> None:
        if kind:
            fail(kind)

    def work(self, kind: str) -> None:
        fail(kind)

    def __call__(self, batch: Any) -> Any:
        kind = str(batch["kind"][0])
        return fail(kind) if kind else batch


class Once:
    """A Ray Data actor whose constructor fails until ``place`` has so many files."""

    def __init__(self, place: str, failures: int) -> None:
        if len(list(Path(place).iterdir())) < failures:
            Path(place, str(os.getpid())).touch()
            raise ConnectionError("429 Too Many Requests")

    def __call__(self, batch: Any) -> Any:
        return batch


class Hanging:
    """A Ray Data actor that never comes back from unit 1, as long as ``place`` has fewer files than ``times``."""

    def __init__(self, place: str, times: int, working: Callable[[str], AbstractContextManager[Any]]) -> None:
        self.place, self.times, self.working = place, times, working

    def __call__(self, batch: Any) -> Any:
        number = int(batch["number"][0])
        with self.working(f"unit {number}"):
            if number == 1 and len(list(Path(self.place).iterdir())) < self.times:
                Path(self.place, str(os.getpid())).touch()
                time.sleep(3600)
        return batch
