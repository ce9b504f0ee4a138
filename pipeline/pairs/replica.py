"""Alg. 1 for one shard: a teacher and flow matching turn noise into tokens.

A ``Replica`` works in an actor of ``passes``; it knows neither Ray nor files.
"""

from __future__ import annotations

import gc
import os
import traceback
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from pipeline import noise
from pipeline.flow import matching
from pipeline.host.ahead import ahead
from pipeline.host.errors import Refused, Unfinished
from pipeline.host.stopwatch import now, warm_up
from pipeline.models import checkpoints
from pipeline.models.base import Condition
from pipeline.numerics.precision import set_products
from pipeline.pairs import manifest, shards
from pipeline.pairs.manifest import Facts
from pipeline.pairs.shards import Rows
from pipeline.recipe import Recipe
from pipeline.services.ray_errors import device_error


@dataclass(frozen=True)
class Failure:
    """What went wrong with a shard, and where; ``device_lost`` if the process can do nothing more on its device,
    ``refused`` if the recipe is to blame, so that no other replica would do better.
    """

    text: str
    device_lost: bool = False
    refused: bool = False


class Replica:
    """A teacher in an actor of its own."""

    def __init__(self, recipe: Recipe, known: Facts) -> None:
        torch.set_num_threads(max(1, int(recipe.cluster.cpus)))
        set_products(recipe.teacher.precision)
        self.recipe, self.known, self.device = recipe, known, recipe.cluster.runs_on
        self.teacher = checkpoints.teacher(recipe.teacher).to(self.device)

    def __call__(self, number: int, rows: int) -> pa.Table:
        """The first ``rows`` rows of shard ``number`` as the Arrow table of a shard."""
        return shards.table(self.known, self.rows(number, rows))

    def attempt(self, number: int, rows: int) -> tuple[Failure | None, pa.Table | None]:
        """The table, or why there is none: an error is handed on as a value, and the other shards go on."""
        try:
            return None, self._with_memory(number, rows)
        except Refused as error:
            return Failure(str(error), refused=True), None
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            text = f"{type(error).__name__}: {error} ({Path(place.filename).name}:{place.lineno})"
            return Failure(text, device_error(error)), None

    def _with_memory(self, number: int, rows: int) -> pa.Table:
        """The table, at the second attempt if memory is short; Unfinished, which names pairs.batch, if it stays so."""
        try:
            return self(number, rows)
        except Exception as error:
            if not _is_full(error):
                raise
        gc.collect()  # what the failed attempt held, which its traceback no longer does
        if self.device == "cuda":
            torch.cuda.empty_cache()
        try:
            return self(number, rows)
        except Exception as error:
            if not _is_full(error):
                raise
            raise Unfinished(
                f"pairs.batch is {self.recipe.pairs.batch}, for which the memory does not suffice"
                f" ({_free(self.device)}): lower it, or see what else is at work there"
            ) from error

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

    def agreements(self, parts: list[Rows]) -> list[float]:
        """``agreement`` of each."""
        return [self.agreement(rows) for rows in parts]

    def agreement(self, rows: Rows) -> float:
        """Share of the stored codes that flow matching finds again, each given the stored codes before it."""
        same, batch = 0, self.recipe.pairs.batch
        for begin in range(0, len(rows.ids), batch):
            some = rows.take(slice(begin, begin + batch))
            stored = torch.from_numpy(some.tokens.astype(np.int64)).to(self.device)
            found: list[Tensor] = []
            self._generate(some.labels, manifest.gaussian(self.known, some.ids), stored, found)
            same += int((torch.cat(found, dim=1) == stored).sum())
        return same / rows.tokens.size

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
        matcher, layout = matching.Matcher(self.teacher.codebook, self.recipe.pairs.solver), self.teacher.layout

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


def _is_full(error: Exception) -> bool:
    """Whether it says that memory is short; torch's allocator for the CPU raises nothing more particular."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and ("out of memory" in str(error) or "can't allocate memory" in str(error))
    )


def _free(device: str) -> str:
    """How much of the memory of a device is free."""
    if device == "cuda":
        free, total = torch.cuda.mem_get_info()
    else:
        free, total = (os.sysconf(name) * os.sysconf("SC_PAGE_SIZE") for name in ("SC_AVPHYS_PAGES", "SC_PHYS_PAGES"))
    return f"{free / 1e9:,.1f} of {total / 1e9:,.1f} GB are free"
