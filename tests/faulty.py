"""A family whose teacher fails on demand; Ray's workers find it because ``conftest`` puts this folder on PYTHONPATH."""

from __future__ import annotations

import os

from torch import Tensor

from pipeline.models import llamagen
from pipeline.models.base import Choose, Condition
from pipeline.models.llamagen import Config, Student, Tokenizer

__all__ = ["Config", "Student", "Teacher", "Tokenizer"]

RAISES = 1  # the class that cannot be drawn
DIES = int(os.environ.get("FAULTY_DIES", -1))  # the class that takes the process with it


class Teacher(llamagen.Teacher):
    def generate(
        self, condition: Condition, choose: Choose, prefix: Tensor | None = None, stop: int | None = None
    ) -> Tensor:
        if (condition.labels == DIES).any():
            os._exit(1)
        if (condition.labels == RAISES).any():
            raise ArithmeticError("this class cannot be drawn")
        return super().generate(condition, choose, prefix, stop)
