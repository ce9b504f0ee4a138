"""Alg. 1 for one shard: a teacher and flow matching turn noise into tokens.

A ``Replica`` is what Ray Data runs in each of its actors; it knows neither Ray nor files.
"""

from __future__ import annotations

import json
import traceback
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline import flow, manifest, noise, pairs
from pipeline.ahead import ahead
from pipeline.manifest import Facts, Shard
from pipeline.models import checkpoints
from pipeline.models.base import Condition
from pipeline.pairs import Rows
from pipeline.precision import set_products
from pipeline.recipe import Recipe
from pipeline.stopwatch import now, warm_up


class Replica:
    """A teacher in an actor of its own."""

    def __init__(self, recipe: Recipe, known: Facts) -> None:
        torch.set_num_threads(max(1, int(recipe.cluster.cpus)))
        set_products(recipe.teacher.precision)
        self.recipe, self.known, self.device = recipe, known, recipe.cluster.runs_on
        self.teacher = checkpoints.teacher(recipe.teacher).to(self.device)

    def __call__(self, task: dict[str, np.ndarray]) -> Any:
        """{"number": [k], "rows": [r]} -> the Arrow table of the first r rows of shard k, or what went wrong.

        An error is handed on as a value, so that the driver names it in one line and the other shards go on.
        """
        number = int(task["number"][0])
        try:
            return pairs.table(self.known, self.rows(number, int(task["rows"][0])))
        except torch.OutOfMemoryError:
            raise  # Ray tries again: a neighbour on a shared device may have gone
        except Exception as error:
            return outcome(number, error=error)

    def rows(self, number: int, rows: int) -> Rows:
        """The first ``rows`` rows of shard ``number``.

        Batches are cut at fixed offsets, and one that ``rows`` ends in is made whole: so no row meets other neighbours
        than in a complete shard, and not even the rounding differs.
        """
        size, batch = self.known["shard_rows"], self.recipe.pairs.batch
        ids = number * size + np.arange(size)
        batches = [ids[begin : begin + batch] for begin in range(0, rows, batch)]
        drawn = ahead(manifest.gaussian(self.known, some) for some in batches)  # the teacher need not wait for noise
        parts = [self.make(*one) for one in zip(batches, drawn, strict=True)]
        made = Rows.join(parts).take(slice(0, rows))
        return made if self.known["noise"] == "stored" else made._replace(noise=None)

    def make(self, ids: np.ndarray, drawn: np.ndarray) -> Rows:
        """Alg. 1 for the given samples, together; ``drawn`` [B, n, C] is their noise."""
        labels = noise.labels(ids, self.teacher.layout.classes)
        tokens = self._generate(labels, drawn)
        return Rows(ids, labels, drawn, tokens.cpu().numpy().astype(np.uint16))

    def agreement(self, rows: Rows) -> float:
        """Share of the stored codes that flow matching finds again, each given the stored codes before it."""
        stored = torch.from_numpy(rows.tokens.astype(np.int64)).to(self.device)
        drawn = manifest.gaussian(self.known, rows.ids)
        found: list[Tensor] = []
        self._generate(rows.labels, drawn, stored, found)
        return (torch.cat(found, dim=1) == stored).float().mean().item()

    def measure(self) -> float:
        """Seconds of one batch in steady state."""
        batch = min(self.recipe.pairs.batch, self.known["shard_rows"])
        drawn = manifest.gaussian(self.known, np.arange(batch))
        call = partial(self.make, np.arange(batch), drawn)
        warm_up(call)
        start = now(self.device)
        call()
        return now(self.device) - start

    @torch.no_grad()
    def _generate(
        self,
        labels: np.ndarray,
        drawn: np.ndarray,
        forced: Tensor | None = None,
        found: list[Tensor] | None = None,
    ) -> Tensor:
        """Codes [B, n] of the noise; with ``forced`` the teacher goes on from those, and its own go to ``found``."""
        x = torch.from_numpy(drawn.astype(np.float32)).to(self.device)
        matcher, layout = flow.Matcher(self.teacher.codebook, self.recipe.pairs.solver), self.teacher.layout

        def choose(step: int, log_p: Tensor) -> Tensor:
            codes = matcher(x[:, layout.span(step)], log_p)
            if forced is None or found is None:
                return codes
            found.append(codes)
            return forced[:, layout.span(step)]

        tokens = self.teacher.generate(Condition(torch.from_numpy(labels).to(self.device)), choose)
        self.teacher.check()
        matcher.check()
        return tokens


def outcome(number: int, shard: Shard | None = None, error: Exception | None = None) -> dict[str, np.ndarray]:
    """A row for the driver: the shard's line of the manifest, or the error and where it was raised."""
    text = ""
    if error is not None:
        place = traceback.extract_tb(error.__traceback__)[-1]
        text = f"{type(error).__name__}: {error} ({Path(place.filename).name}:{place.lineno})"
    line = json.dumps(asdict(shard)) if shard else ""
    return {"number": np.array([number]), "error": np.array([text]), "shard": np.array([line])}
