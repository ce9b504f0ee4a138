"""A family whose student takes its worker down once, in the middle of training, or refuses to go on; importable in
Ray's workers.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

from pipeline.host.errors import Unfinished
from pipeline.models import var
from pipeline.models.base import Prediction
from pipeline.models.conditions import Condition
from pipeline.models.var import Config, Teacher, Tokenizer

__all__ = ["Config", "Student", "Teacher", "Tokenizer"]

SESSION = os.environ.get("DD_TESTS")  # of tests, which the workers have from ``conftest``
FUSE = Path("/tmp", f"distilled-decoding-fuse-{SESSION}")  # holds the number of forward passes that rank 1 survives
REFUSALS = Path("/tmp", f"distilled-decoding-refusals-{SESSION}")  # a letter for each, if it is there


class Student(var.Student):
    def forward(self, x_t: Tensor, t: Tensor, condition: Condition) -> Prediction:
        if self.training and torch.distributed.get_rank() == 1 and FUSE.exists():
            left = int(FUSE.read_text())
            if left == 0:
                FUSE.unlink()
                os._exit(1)
            FUSE.write_text(str(left - 1))
        if self.training and REFUSALS.exists():
            REFUSALS.write_text(REFUSALS.read_text() + "x")
            raise Unfinished("the loss is inf; lower train.lr.")
        return super().forward(x_t, t, condition)
