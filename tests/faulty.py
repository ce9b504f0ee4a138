"""A family whose teacher fails on demand; Ray's workers find it because ``conftest`` puts this folder on PYTHONPATH."""

from __future__ import annotations

import os
import time
from pathlib import Path

from torch import Tensor

from pipeline.models import llamagen
from pipeline.models.base import Choose, Condition
from pipeline.models.llamagen import Config, Student, Tokenizer

__all__ = ["Config", "Student", "Teacher", "Tokenizer"]

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
