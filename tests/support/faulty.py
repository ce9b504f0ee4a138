"""A family whose teacher fails on demand; Ray's workers find it because ``conftest`` puts this folder on PYTHONPATH."""

from __future__ import annotations

import os
import time
from pathlib import Path

import ray
from torch import Tensor

from pipeline.models import llamagen
from pipeline.models.base import Choose
from pipeline.models.conditions import Condition
from pipeline.models.llamagen import Config, Student, Tokenizer
from pipeline.pairs.facts import PairFacts
from pipeline.pairs.replica import Replica
from pipeline.pairs.rows import Rows
from pipeline.recipe import Recipe

__all__ = ["Config", "Hangs", "Poisoned", "Student", "Teacher", "Tokenizer"]

RAISES = 1  # the class that cannot be drawn
DIES = 2  # the class that takes the process with it
SESSION = os.environ.get("DD_TESTS")  # of tests, which the workers have from ``conftest``
ILL = Path("/tmp", f"distilled-decoding-ill-{SESSION}")  # the two are so as long as this file exists
SLOW = Path("/tmp", f"distilled-decoding-slow-{SESSION}")  # and as long as this one does, every batch takes its time
PAUSE = 0.5  # seconds


class Teacher(llamagen.Teacher):
    def generate(
        self, condition: Condition, choose: Choose, prefix: Tensor | None = None, stop: int | None = None
    ) -> Tensor:
        if SLOW.exists():
            time.sleep(PAUSE)
        if ILL.exists() and (condition.labels == DIES).any():
            os._exit(1)
        if ILL.exists() and (condition.labels == RAISES).any():
            raise ArithmeticError("this class cannot be drawn")
        return super().generate(condition, choose, prefix, stop)


class Poisoned(Replica):
    """The first replica of each of two pools loses its device with every shard, in its next processes, too."""

    def __init__(self, recipe: Recipe, facts: PairFacts, folder: str) -> None:
        super().__init__(recipe, facts)
        self.folder, me = Path(folder), ray.get_runtime_context().get_actor_id()
        first_pool = len(self.losses()) < 2  # processes of one replica, which may lose two before it is given up
        self.ill = Path(folder, f"ill-{me}").exists() or first(Path(folder, f"pool-{first_pool}"))
        if self.ill:
            Path(folder, f"ill-{me}").touch()

    def losses(self) -> list[Path]:
        return list(self.folder.glob("lost-*"))

    def rows(self, number: int, count: int) -> Rows:
        if self.ill:
            Path(self.folder, f"lost-{os.getpid()}").touch()
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        while number > 3 and len(self.losses()) < 2:  # else there may be nothing left to fail
            time.sleep(0.05)
        return super().rows(number, count)


class Hangs(Replica):
    """The first process of all cannot start; shard 1 hangs the first time."""

    def __init__(self, recipe: Recipe, facts: PairFacts, folder: str) -> None:
        self.folder = Path(folder)
        if first(self.folder / "started"):
            raise ConnectionError("429: too many requests")
        super().__init__(recipe, facts)

    def rows(self, number: int, count: int) -> Rows:
        if number == 1 and first(self.folder / "hung"):
            time.sleep(3600)
        return super().rows(number, count)


def first(mark: Path) -> bool:
    """Whether nobody has been here before."""
    try:
        mark.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True
