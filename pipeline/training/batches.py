"""What a step of distillation sees (Alg. 2): pairs in an order that is arithmetic, t, and X_t.

The last rows of a pair set are held out: no step trains on them, and the loss on them is logged along the way.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipeline import noise
from pipeline.models import conditions
from pipeline.models.base import Layout
from pipeline.models.conditions import Condition, Encode, of_column
from pipeline.pairs import manifest
from pipeline.pairs.facts import PairFacts
from pipeline.pairs.rows import Rows
from pipeline.pairs.shards import read_shard
from pipeline.pairs.stream import WINDOW, Pairs, PairStream
from pipeline.settings.train import TrainSettings
from pipeline.training.plan import TrainingPlan

WORDS = 12  # of a made-up prompt; those of LAION-COCO have 9 on average


class Batch(NamedTuple):
    """On the training device: X_t [B, n, C], t [B] int64, the teacher's tokens [B, n] int64, and the condition, as the
    networks are given it.
    """

    x_t: Tensor
    t: Tensor
    tokens: Tensor
    condition: Condition

    def parts(self, size: int) -> list[Batch]:
        """The batch in pieces of ``size`` samples, the last one maybe smaller; 0 leaves it whole."""
        if not size:
            return [self]
        return [Batch(*part) for part in zip(*(field.split(size) for field in self), strict=True)]


def stream(plan: TrainingPlan) -> PairStream:
    """The rows that steps train on; those held out, and those beyond pairs.count of a grown set, are left out."""
    inventory = manifest.read(plan.recipe.pairs_uri, plan.pairs_fingerprint)
    facts = PairFacts.from_json(inventory["facts"])
    shards = [
        shard | {"rows": min(shard["rows"], rows)}
        for shard in inventory["shards"]
        if (rows := facts.rows_of(shard["number"], plan.rows))
    ]
    return PairStream(plan.recipe.pairs_uri, inventory | {"count": plan.rows, "shards": shards}, WINDOW)


def held_out(plan: TrainingPlan) -> Rows:
    """The rows that no step trains on, with their noise."""
    uri, count = plan.recipe.pairs_uri, plan.recipe.pairs.count
    inventory = manifest.read(uri, plan.pairs_fingerprint)
    facts = PairFacts.from_json(inventory["facts"])
    numbers = range(facts.shard_of(plan.rows), facts.shard_of(count - 1) + 1)
    names = [shard["name"] for shard in inventory["shards"] if shard["number"] in numbers]
    rows = Rows.join([read_shard(uri, facts, name) for name in names])
    return rows.take((rows.ids >= plan.rows) & (rows.ids < count))


def batches(plan: TrainingPlan, pairs: PairStream, done: int, rank: int, world: int) -> Iterator[tuple[int, Pairs]]:
    """(epoch, this worker's share) of every global batch after the first ``done``."""
    settings = plan.recipe.train
    epochs = range(done // plan.per_epoch, settings.epochs)
    return pairs.epochs(epochs, settings.seed, settings.batch, done % plan.per_epoch, rank, world)


def as_pairs(rows: Rows) -> Pairs:
    """Rows with their noise -> a batch for training."""
    gaussian = torch.from_numpy(rows.noise).float()
    tokens = torch.from_numpy(rows.tokens.astype(np.int64))
    return Pairs(torch.from_numpy(rows.ids), of_column(rows.conditions), gaussian, tokens)


def made_up(layout: Layout, count: int) -> Pairs:
    """Pairs of the right shape and no meaning, to measure speed with; prompts are of ``WORDS`` words."""
    ids = np.arange(count)
    column = noise.labels(ids, layout.classes) if layout.classes else np.full(count, "word " * WORDS, dtype=object)
    gaussian = noise.gaussian(0, ids, layout.length, layout.code_dim)
    tokens = np.zeros((count, layout.length), dtype=np.uint16)
    return as_pairs(Rows(ids, column, gaussian, tokens))


def blank(layout: Layout, count: int, caption: tuple[int, int] | None = None) -> Batch:
    """A batch of zeros, for work that only looks at shapes; ``caption`` as for ``conditions.blank``."""
    tokens = torch.zeros(count, layout.length, dtype=torch.long)
    x_t, ones = torch.zeros(count, layout.length, layout.code_dim), torch.ones(count, dtype=torch.long)
    return Batch(x_t, ones, tokens, conditions.blank(count, caption))


def noised(
    pairs: Pairs, draw: int, settings: TrainSettings, layout: Layout, codebook: Tensor, encode: Encode | None = None
) -> Batch:
    """X_t of Alg. 2: the codes of the tokens before AR step t, noise from there on; on the codebook's device.

    t is drawn from ``start_steps``, as often as ``start_weights`` say, by (seed, sample id, ``draw``), the epoch.
    ``encode`` turns the condition into what the networks are given; None for classes, which are given as they are.
    """
    starts = np.array(settings.start_steps)
    t = starts[noise.choice(settings.seed, pairs.ids.numpy(), draw, len(starts), settings.start_weights)]
    before = np.array([layout.before(step) for step in range(1, layout.steps + 1)])[t - 1]
    is_data = torch.from_numpy(np.arange(layout.length) < before[:, None])
    host = (is_data, pairs.noise, torch.from_numpy(t), pairs.tokens)
    mask, gaussian, steps, tokens = (_on(codebook.device, tensor) for tensor in host)
    condition = encode(pairs.condition) if encode else pairs.condition.to(codebook.device)
    return Batch(torch.where(mask[..., None], codebook[tokens], gaussian), steps, tokens, condition)


def _on(device: torch.device, tensor: Tensor) -> Tensor:
    """The tensor on the device, without waiting for the copy to a GPU."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
