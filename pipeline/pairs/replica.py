"""Alg. 1: a teacher and flow matching turn the noise of sample ids into tokens.

A ``Replica`` knows neither Ray nor Arrow nor files, and whatever goes wrong it raises; ``passes`` puts it to work, and
hears from it how its time is spent.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor

from pipeline.flow import matching
from pipeline.host.ahead import ahead
from pipeline.host.stopwatch import Stopwatch, now, warm_up
from pipeline.models import checkpoints
from pipeline.models.conditions import of_column
from pipeline.models.graphs import Graphs
from pipeline.numerics.precision import set_products
from pipeline.pairs.facts import PairFacts, conditioning
from pipeline.pairs.memory import batch_size
from pipeline.pairs.rows import Rows
from pipeline.recipe import Recipe
from pipeline.text import encoder

Spent = Callable[[int, float, float], object]
"""Is told of a batch: its rows, seconds in the teacher, seconds in flow matching."""


class Replica:
    """A teacher on a device of its own, and the settings under which it makes rows, ``batch`` at once.

    ``spent`` is called after every batch; whoever wants to hear of them sets it.
    """

    spent: Spent = staticmethod(lambda rows, teacher, flow: None)

    def __init__(self, recipe: Recipe, facts: PairFacts) -> None:
        torch.set_num_threads(max(1, int(recipe.cluster.cpus)))
        set_products(recipe.teacher.precision)
        self.recipe, self.facts, self.device = recipe, facts, recipe.cluster.runs_on
        self.batch = batch_size(recipe)
        self.teacher = checkpoints.teacher(recipe.teacher).to(self.device)
        self.conditioning = conditioning(recipe)
        self.encode = encoder.conditioner(recipe.text, self.device)

    def rows(self, number: int, count: int) -> Rows:
        """The first ``count`` rows of shard ``number``; without noise in a set that does not store it.

        Batches are cut at fixed offsets, and one that ``count`` ends in is made whole: so no row meets other neighbours
        than in a complete shard, and not even the rounding differs. Raises Refused for a teacher whose numbers leave
        the range of its precision, and whatever torch raises.
        """
        ids, batch = self.facts.ids(number, self.facts.shard_rows), self.batch
        batches = [ids[begin : begin + batch] for begin in range(0, count, batch)]
        gaussian = ahead(map(self.facts.noise, batches))  # the teacher need not wait for noise
        parts = [self.make(*one) for one in zip(batches, gaussian, strict=True)]
        rows = Rows.join(parts).take(slice(0, count))
        return rows if self.facts.noise_is_stored else rows._replace(noise=None)

    def shrink(self) -> None:
        """Go on with batches of half the size, and without what is kept for larger ones."""
        self.batch = math.ceil(self.batch / 2)
        if self.teacher.graphs:
            self.teacher.graphs = Graphs()

    def make(self, ids: np.ndarray, gaussian: np.ndarray) -> Rows:
        """Alg. 1 for the given samples, together; ``gaussian`` [B, n, C] is their noise."""
        conditions = self.conditioning(ids)
        tokens = self._generate(conditions, gaussian)
        return Rows(ids, conditions, gaussian, tokens.cpu().numpy().astype(np.uint16))

    def agreements(self, parts: list[Rows]) -> list[float]:
        """``agreement`` of each."""
        return [self.agreement(rows) for rows in parts]

    def agreement(self, rows: Rows) -> float:
        """Share of the stored codes that flow matching finds again, each given the stored codes before it."""
        same, batch = 0, self.batch
        for begin in range(0, len(rows.ids), batch):
            some = rows.take(slice(begin, begin + batch))
            stored = torch.from_numpy(some.tokens.astype(np.int64)).to(self.device)
            answers: list[Tensor] = []
            self._generate(some.conditions, self.facts.noise(some.ids), stored, answers)
            same += int((torch.cat(answers, dim=1) == stored).sum())
        return same / rows.tokens.size

    def measure(self) -> tuple[int, float]:
        """Samples of one batch, and its seconds in steady state."""
        ids = self.facts.ids(0, min(self.batch, self.facts.shard_rows))
        call = partial(self.make, ids, self.facts.noise(ids))
        warm_up(call)
        start = now(self.device)
        call()
        return len(ids), now(self.device) - start

    @torch.no_grad()
    def _generate(
        self,
        conditions: np.ndarray,
        gaussian: np.ndarray,
        prefix: Tensor | None = None,
        answers: list[Tensor] | None = None,
    ) -> Tensor:
        """Codes [B, n] of the noise; with ``prefix`` the teacher goes on from those, its own codes into ``answers``."""
        x, layout = torch.from_numpy(gaussian.astype(np.float32)).to(self.device), self.teacher.layout
        whole, flow = (Stopwatch(torch.device(self.device)) for _ in range(2))

        def choose(step: int, log_p: Tensor) -> Tensor:
            """Flow matching's codes of a step, timed; with a prefix, those of the prefix."""
            with flow:
                codes = matcher(x[:, layout.span(step)], log_p)
            if prefix is None or answers is None:
                return codes
            answers.append(codes)
            return prefix[:, layout.span(step)]

        with whole:
            with flow:
                matcher = matching.Matcher(self.teacher.codebook, self.recipe.pairs.solver)
            tokens = self.teacher.generate(self.encode(of_column(conditions)), choose)
        self.teacher.check()
        matcher.check()
        self.spent(len(x), whole.seconds - flow.seconds, flow.seconds)
        return tokens
