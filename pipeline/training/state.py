"""What distillation carries from step to step, and the checkpoint that holds it.

A checkpoint is one file, written whole or not at all through ``storage``, so that a run goes on from the same file with
any number of workers, none included: Ray Train's local mode keeps no checkpoints of its own. No random state is saved;
the order of the pairs and every t are functions of (seed, epoch, sample id).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import torch
from torch import Tensor, nn

from pipeline import storage
from pipeline.host.errors import Refused, Unfinished
from pipeline.models.base import Student
from pipeline.settings.train import TrainSettings
from pipeline.training.optimizers import Optimizers

SUFFIX = ".pt"
LARGE = 256 << 20  # bytes of a student's weights, of whose state a checkpoint holds four times as many


class Diverged(Unfinished, FloatingPointError):
    """A gradient was not finite; the checkpoints before it are sound."""


class TrainingState:
    """Student, its moving average, the optimisers, and ``step``, the number of optimiser steps done."""

    def __init__(self, student: Student, settings: TrainSettings) -> None:
        """``student`` is on the training device already."""
        self.student, self.settings, self.step = student, settings, 0
        for weight, head in zip((settings.cross_entropy, settings.lpips), student.heads(), strict=True):
            for part in head if weight == 0 else ():
                part.requires_grad_(False)  # DDP would wait for its gradients
        self.average: Student = copy.deepcopy(student).eval().requires_grad_(False)
        self.optimizers = Optimizers(student, settings)
        device = next(student.parameters()).device
        self.failed_at = torch.tensor(0, device=device)  # the first step whose gradient was not finite

    def advance(self, total: int) -> Tensor:
        """One optimiser step from the gradients at hand; returns their norm before clipping, still on the device.

        Nothing here waits for the device: a gradient that is not finite is noted and raised by ``check``.
        """
        self.optimizers.rate = learning_rate(self.settings, self.step, total)
        norm = nn.utils.clip_grad_norm_(self.student.parameters(), self.settings.clip)
        # DDP keeps the memory of all gradients anyway; one that is None would be made a second time by the first part
        # of a batch, when the workers do not meet.
        self.optimizers.step(keep_gradients=torch.distributed.is_initialized())
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
            settings = self.settings
            instead = (
                "" if settings.precision == "fp32" else f" (or train.precision, now {settings.precision}, to fp32)"
            )
            raise Diverged(
                f"training diverged: the gradient of step {failed} is not finite. Set train.lr, now {settings.lr:g},"
                f" lower{instead} and train.uri to a new folder, where training begins again."
            )

    def content(self) -> dict[str, Any]:
        """What a checkpoint holds: the state itself, which the next step changes."""
        return {
            "step": self.step,
            "student": self.student.state_dict(),
            "average": self.average.state_dict(),
            **self.optimizers.content(),
        }

    @property
    def needs_room(self) -> bool:
        """Whether a copy on the host would be large and lie beside the state itself, as on a CPU."""
        weights = list(self.student.parameters())
        return weights[0].device.type == "cpu" and sum(weight.nbytes for weight in weights) > LARGE

    def restore(self, folder: str, names: list[str], say: Callable[[str], None]) -> str:
        """Continue from the last of the checkpoints ``names`` whose checksums fit, and return its name.

        Each is read once. Damaged ones are named to ``say``. Raises Refused where all are: starting again is for the
        user to decide.
        """
        for name in reversed(names):
            with storage.borrowed(storage.join(folder, name)) as path:
                if content := _content(path):
                    self._take(content)
                    return name
            say(_is_damaged(folder, name))
        raise _all_damaged(folder, names)

    def _take(self, content: dict[str, Any]) -> None:
        self.student.load_state_dict(content["student"])
        self.average.load_state_dict(content["average"])
        # On a CPU the optimisers would keep the mapped file's own memory.
        self.optimizers.take({name: _copied(content[name]) for name in self.optimizers.parts})
        self.step = content["step"]

    @torch.no_grad()
    def share(self, broadcast: Callable[[Any], Any]) -> None:
        """Make every worker's state that of rank 0, which alone has read or drawn it.

        ``broadcast`` hands a value of rank 0's to all. Tensors go from device to device.
        """
        self.step = broadcast(self.step)
        moments = self.optimizers.share(broadcast)
        tensors = [*self.student.state_dict().values(), *self.average.state_dict().values(), *moments]
        for tensor in tensors:
            torch.distributed.broadcast(tensor, 0)


class Writer:
    """Writes checkpoints in a thread, one at a time, while training goes on; use it as a context.

    An error of one is raised when the next is due, or at the end. A process that is killed meanwhile leaves the
    checkpoints from before. ``written`` is called with the step and the place of each one that is whole, in the thread.
    """

    def __init__(self, folder: str, keep: int, written: Callable[[int, str], object] = lambda step, uri: None) -> None:
        self.folder, self.keep, self.written = folder, keep, written
        self._pool = ThreadPoolExecutor(1)
        self._last: Future[None] | None = None

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self._pool.shutdown()  # what is being written is finished in any case
        if kind is None:
            self._wait()

    def write(self, state: TrainingState) -> None:
        """Write the checkpoint of this step, then remove all but the newest ``keep``.

        What is written is a copy on the host, which no later step changes. Where that ``needs_room``, training waits
        for the writing instead.
        """
        self._wait()
        if state.needs_room:
            self._finish(state.content())
        else:
            self._last = self._pool.submit(self._finish, _copied(state.content()))

    def _finish(self, content: dict[str, Any]) -> None:
        _write(content, self.folder, self.keep)
        self.written(content["step"], storage.join(self.folder, name_of(content["step"])))

    def _wait(self) -> None:
        last, self._last = self._last, None
        if last:
            last.result()


def _write(content: dict[str, Any], folder: str, keep: int) -> None:
    with storage.replacing(storage.join(folder, name_of(content["step"]))) as file:
        torch.save(content, file)
    for name in saved(folder)[:-keep]:
        storage.remove(storage.join(folder, name))


def name_of(step: int) -> str:
    """Of the checkpoint of a step."""
    return f"step-{step:08d}{SUFFIX}"


def _copied(value: Any) -> Any:
    """A value of dictionaries and lists with its tensors copied to the host."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _copied(inside) for key, inside in value.items()}
    return [_copied(inside) for inside in value] if isinstance(value, list) else value


def saved(folder: str) -> list[str]:
    """Names of the checkpoints in a folder, oldest first."""
    return [name for name in storage.listing(folder) if name.startswith("step-") and name.endswith(SUFFIX)]


def newest(folder: str, say: Callable[[str], None] = lambda sentence: None) -> str | None:
    """Name of the newest checkpoint that is not cut short; None in a folder without any. Others are named to ``say``.

    A few of its bytes are read: whether its checksums fit, ``TrainingState.restore`` finds, which reads it whole.
    Raises Refused if there are checkpoints and all are cut short.
    """
    names = saved(folder)
    for name in reversed(names):
        if complete(storage.join(folder, name)):
            return name
        say(_is_damaged(folder, name))
    if names:
        raise _all_damaged(folder, names)
    return None


def _is_damaged(folder: str, name: str) -> str:
    return f"{storage.join(folder, name)} is damaged; looking for the checkpoint before it."


def _all_damaged(folder: str, names: list[str]) -> Refused:
    return Refused(
        f"every checkpoint in {folder} is damaged ({', '.join(names)}); delete them to train from the start."
    )


def drop_after(folder: str, name: str) -> None:
    """Delete the checkpoints newer than ``name``: damaged ones, which must not count among those to keep."""
    for later in saved(folder):
        if later > name:
            storage.remove(storage.join(folder, later))


def complete(uri: str) -> bool:
    """Whether a checkpoint's file has its end: torch writes a zip archive, whose directory comes last."""
    try:
        with storage.reading(uri) as file, ZipFile(file) as archive:
            return bool(archive.namelist())
    except (Refused, Unfinished):
        raise
    except Exception:  # whatever a damaged directory makes zipfile stumble over
        return False


def _content(path: Path) -> dict[str, Any] | None:
    """What a checkpoint holds, mapped from the file; None for a damaged one. Torch asks no checksums itself."""
    try:
        with ZipFile(path) as archive:
            if archive.testzip() is not None:
                return None
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception:  # as above, and torch knows the archive's format less well than zipfile
        return None


def steps_done(folder: str, say: Callable[[str], None] = lambda sentence: None) -> int:
    """Optimiser steps of the ``newest`` checkpoint in a folder; 0 without one."""
    name = newest(folder, say)
    return int(name.removeprefix("step-").removesuffix(SUFFIX)) if name else 0


def learning_rate(settings: TrainSettings, step: int, total: int) -> float:
    """The rate of step ``step`` (from 0): linear warm-up, then constant, or half a cosine to 0 at ``total``."""
    if step < settings.warmup:
        return settings.lr * (step + 1) / settings.warmup
    if settings.schedule == "constant":
        return settings.lr
    done = (step - settings.warmup) / max(1, total - settings.warmup)
    return settings.lr * 0.5 * (1 + math.cos(math.pi * done))
