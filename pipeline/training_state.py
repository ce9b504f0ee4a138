"""What distillation carries from step to step, and the checkpoint that holds it.

A checkpoint is one file, written whole or not at all through ``storage``, so that a run goes on from the same file with
any number of workers, none included: Ray Train's local mode keeps no checkpoints of its own. No random state is saved;
the order of the pairs and every t are functions of (seed, epoch, sample id).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from zipfile import BadZipFile, ZipFile

import torch
from torch import Tensor, nn

from pipeline import storage
from pipeline.errors import Refused, Unfinished
from pipeline.models.base import Student
from pipeline.recipe import TrainSettings

SUFFIX = ".pt"


class Diverged(Unfinished, FloatingPointError):
    """A gradient was not finite; the checkpoints before it are sound."""


class TrainingState:
    """Student, its moving average, the optimiser, and ``step``, the number of optimiser steps done."""

    def __init__(self, student: Student, settings: TrainSettings) -> None:
        """``student`` is on the training device already."""
        self.student, self.settings, self.step = student, settings, 0
        self.average: Student = copy.deepcopy(student).eval().requires_grad_(False)
        self.optimizer = optimizer(student, settings)
        device = next(student.parameters()).device
        self.failed_at = torch.tensor(0, device=device)  # the first step whose gradient was not finite

    def advance(self, total: int) -> Tensor:
        """One optimiser step from the gradients at hand; returns their norm before clipping, still on the device.

        Nothing here waits for the device: a gradient that is not finite is noted and raised by ``check``.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.settings, self.step, total)
        norm = nn.utils.clip_grad_norm_(self.student.parameters(), self.settings.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        first = (self.failed_at == 0) & ~norm.isfinite()
        self.failed_at = torch.where(first, self.step, self.failed_at)
        self._update_average()
        return norm

    @torch.no_grad()
    def _update_average(self) -> None:
        """Exponential moving average, with a decay that warms up so that early weights are soon forgotten."""
        decay = min(self.settings.ema, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(list(self.average.parameters()), list(self.student.parameters()), 1 - decay)

    def check(self) -> None:
        """Raise Diverged if a gradient was not finite; called before anything is logged or saved."""
        failed = int(self.failed_at)
        if failed:
            raise Diverged(
                f"the gradient of step {failed} is not finite; the last checkpoint is older and sound, so"
                f" lower train.lr ({self.settings.lr}) or train.clip, or train in fp32, and start in a new"
                " folder."
            )

    def save(self, folder: str) -> None:
        """Write the checkpoint of this step and remove all but the newest ``train.keep``."""
        content = {
            "step": self.step,
            "student": self.student.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        with storage.replacing(storage.join(folder, f"step-{self.step:08d}{SUFFIX}")) as file:
            torch.save(content, file)
        for name in saved(folder)[: -self.settings.keep]:
            storage.remove(storage.join(folder, name))

    def restore(self, uri: str) -> None:
        """Continue from a checkpoint."""
        with storage.reading(uri) as file:
            content = torch.load(file, map_location="cpu", weights_only=True)
        self.student.load_state_dict(content["student"])
        self.average.load_state_dict(content["average"])
        self.optimizer.load_state_dict(content["optimizer"])
        self.step = content["step"]


def saved(folder: str) -> list[str]:
    """Names of the checkpoints in a folder, oldest first."""
    return [name for name in storage.listing(folder) if name.startswith("step-") and name.endswith(SUFFIX)]


def newest(folder: str, say: Callable[[str], None] = lambda sentence: None) -> str | None:
    """Name of the newest checkpoint that is whole; None in a folder without any. Damaged ones are named to ``say``.

    Raises ValueError if there are checkpoints and none is whole: starting again is for the user to decide.
    """
    names = saved(folder)
    for name in reversed(names):
        if whole(storage.join(folder, name)):
            return name
        say(f"{storage.join(folder, name)} is damaged; looking for the checkpoint before it.")
    if names:
        raise Refused(
            f"every checkpoint in {folder} is damaged ({', '.join(names)}); delete them to train from the start."
        )
    return None


def drop_after(folder: str, name: str) -> None:
    """Delete the checkpoints newer than ``name``: damaged ones, which must not count among those to keep."""
    for later in saved(folder):
        if later > name:
            storage.remove(storage.join(folder, later))


def whole(uri: str) -> bool:
    """Whether a checkpoint's file is complete and its checksums fit: torch writes a zip archive, with CRC-32 sums."""
    try:
        with storage.reading(uri) as file, ZipFile(file) as archive:
            return archive.testzip() is None
    except (BadZipFile, EOFError):
        return False


def steps_done(folder: str, say: Callable[[str], None] = lambda sentence: None) -> int:
    """Optimiser steps of the newest whole checkpoint in a folder, see ``newest``; 0 without one."""
    name = newest(folder, say)
    return int(name.removeprefix("step-").removesuffix(SUFFIX)) if name else 0


def optimizer(student: Student, settings: TrainSettings) -> torch.optim.AdamW:
    """AdamW that decays the matrices of linear layers and convolutions, not embeddings, positions and biases."""
    matrices = {id(m.weight) for m in student.modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    groups = [
        {"params": [p for p in student.parameters() if (id(p) in matrices) == decayed], "weight_decay": decay}
        for decayed, decay in ((True, settings.weight_decay), (False, 0.0))
    ]
    fused = next(student.parameters()).is_cuda
    return torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, fused=fused)


def learning_rate(settings: TrainSettings, step: int, total: int) -> float:
    """The rate of step ``step`` (from 0): linear warm-up, then constant, or half a cosine to 0 at ``total``."""
    if step < settings.warmup:
        return settings.lr * (step + 1) / settings.warmup
    if settings.schedule == "constant":
        return settings.lr
    done = (step - settings.warmup) / max(1, total - settings.warmup)
    return settings.lr * 0.5 * (1 + math.cos(math.pi * done))
