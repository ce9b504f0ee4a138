"""A family whose student takes its worker down once, in the middle of training; importable in Ray's workers."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

from pipeline.models import var
from pipeline.models.base import Condition, Prediction
from pipeline.models.var import Config, Teacher, Tokenizer

__all__ = ["Config", "Student", "Teacher", "Tokenizer"]

SESSION = os.environ.get("DD_TESTS")  # of tests, which the workers have from ``conftest``
FUSE = Path("/tmp", f"distilled-decoding-fuse-{SESSION}")  # holds the number of forward passes that rank 1 survives


class Student(var.Student):
    def forward(self, x_t: Tensor, t: Tensor, condition: Condition) -> Prediction:
        if self.training and torch.distributed.get_rank() == 1 and FUSE.exists():
            left = int(FUSE.read_text())
            if left == 0:
                FUSE.unlink()
                os._exit(1)
            FUSE.write_text(str(left - 1))
        return super().forward(x_t, t, condition)
