"""What rank 0 does beside training: log lines, the loss on held-out pairs, sample grids, exported students."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipeline.models import checkpoints
from pipeline.models.conditions import Encode
from pipeline.models.convnet import to_uint8
from pipeline.numerics.precision import autocast
from pipeline.settings.train import TrainSettings
from pipeline.training import batches, losses
from pipeline.training.losses import Loss
from pipeline.training.plan import TrainingPlan, at_once
from pipeline.training.state import TrainingState

GRID = 8  # noises of a sample grid


class Message(NamedTuple):
    """What the driver is told: metrics at a step, the rows of a sample grid, uint8 [columns, 3, H, W] each, a line.

    ``conditions`` [columns] are the labels or the prompts of the grid, ``machine`` what ``system_metrics.now`` says of
    rank 0's machine, ``checkpoint`` the place of one that is whole.
    """

    step: int
    metrics: dict[str, float]
    grid: list[np.ndarray]
    line: str = ""  # to print
    conditions: np.ndarray | None = None
    machine: dict[str, float] | None = None
    checkpoint: str = ""


Report = Callable[[Message], None]


class Window:
    """Sums over the steps since the last log line. They stay on the device until ``close``.

    ``waited`` are the seconds that the loop waited for pairs; whoever runs the loop adds to them. A device that still
    has work from earlier steps may not have noticed.
    """

    def __init__(self, settings: TrainSettings, device: torch.device) -> None:
        self.settings = settings
        self.sums = torch.zeros(len(settings.start_steps), len(losses.COLUMNS), device=device)
        self.norm = torch.zeros((), device=device)
        self.steps, self.waited, self.since = 0, 0.0, time.perf_counter()

    def begin(self) -> None:
        """Let the time count from now on: what was done since ``close`` was no training."""
        self.since = time.perf_counter()

    def add(self, sums: Tensor, norm: Tensor) -> None:
        """Take one step's sums in, on the device."""
        self.sums += sums
        self.norm += norm
        self.steps += 1

    def close(self) -> dict[str, float]:
        """Metrics over the window and over all workers, which must all call this; then a new window begins.

        ``data_wait`` is the share of the time that the worker which waited longest for its pairs did.
        """
        waited = torch.tensor(self.waited, device=self.sums.device)
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(self.sums)
            torch.distributed.all_reduce(waited, torch.distributed.ReduceOp.MAX)
        out = losses.summary(self.settings, self.sums) | {"gradient_norm": self.norm.item() / self.steps}
        seconds = time.perf_counter() - self.since
        out |= {"images_per_second": self.steps * self.settings.batch / seconds, "data_wait": waited.item() / seconds}
        self.sums.zero_()
        self.norm.zero_()
        self.steps, self.waited = 0, 0.0
        self.begin()
        return out


class Observer:
    """Tells the driver how training goes and writes the exported students, all from the moving average."""

    def __init__(
        self, plan: TrainingPlan, state: TrainingState, loss: Loss, encode: Encode, report: Report, mlflow_run: str
    ) -> None:
        self.plan, self.state, self.loss, self.encode = plan, state, loss, encode
        self.report, self.mlflow_run = report, mlflow_run
        self.rows = batches.held_out(plan)
        self.since = time.perf_counter()

    def log(self, metrics: dict[str, float]) -> None:
        """Report the metrics of a window, with the learning rate and the seconds since this process began to train."""
        also = {"lr": self.state.optimizers.rate, "seconds": time.perf_counter() - self.since}
        self.report(Message(self.state.step, metrics | also, []))

    def snapshot(self) -> None:
        """Export the student of this step, then report its held-out loss and a sample grid."""
        self.export(self.plan.at(f"step-{self.state.step:06d}.safetensors"))
        metrics = {f"held_out/{name}": value for name, value in self.held_out().items()}
        self.report(Message(self.state.step, metrics, self.grid(), conditions=self.rows.conditions[:GRID]))

    def export(self, uri: str) -> None:
        """Write the moving average as safetensors, with the settings that a sampler needs."""
        checkpoints.save(self.state.average, uri, self.plan.metadata(self.state.step, self.mlflow_run))

    @torch.no_grad()
    def held_out(self) -> dict[str, float]:
        """Loss, its parts and token accuracy on the held-out pairs, from the same t at every step of training."""
        settings, codebook = self.state.settings, self.loss.tokenizer.codebook
        total = torch.zeros(len(settings.start_steps), len(losses.COLUMNS), device=codebook.device)
        size = at_once(settings)
        for begin in range(0, len(self.rows.ids), size):
            pairs = batches.as_pairs(self.rows.take(slice(begin, begin + size)))
            batch = batches.noised(pairs, 0, settings, self.plan.layout, codebook, self.encode)
            with autocast(settings.precision, codebook.device):
                prediction = self.state.average(batch.x_t, batch.t, batch.condition)
                total += self.loss(prediction, batch.tokens, batch.t)[1]
        return losses.summary(settings, total)

    @torch.no_grad()
    def grid(self) -> list[np.ndarray]:
        """Images of the first held-out noises: the teacher's, then Alg. 3's in one step and in all start steps."""
        settings, tokenizer = self.plan.recipe.train, self.loss.tokenizer
        pairs = batches.as_pairs(self.rows.take(slice(0, GRID)))
        start, tokens = (x.to(tokenizer.codebook.device) for x in (pairs.noise, pairs.tokens))
        condition = self.encode(pairs.condition)
        drawn = [tokenizer.codebook[tokens]]
        for steps in dict.fromkeys([(1,), settings.start_steps]):
            x = start
            for t in steps:
                x = self.state.average.jump(x, start, t, condition, settings.split)
            drawn.append(x)
        return [to_uint8(tokenizer.decode(embeddings)).cpu().numpy() for embeddings in drawn]
