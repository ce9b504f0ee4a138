"""The stream of pairs that training reads: shuffled, shared by workers, and at any position without a saved state."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipeline import storage
from pipeline.host.ahead import ahead
from pipeline.models.conditions import Condition, of_column
from pipeline.pairs import manifest
from pipeline.pairs.facts import PairFacts
from pipeline.pairs.manifest import Shard
from pipeline.pairs.rows import Rows, noise_of
from pipeline.pairs.shards import load_shard

READERS = 16  # threads that read the shards of a window
WINDOW = 1 << 30  # bytes of rows that are shuffled together; a set that fits is read once and kept


class Pairs(NamedTuple):
    """A batch for training: ids int64 [b], what they are drawn for, noise float32 [b, n, C], tokens int64 [b, n]."""

    ids: Tensor
    condition: Condition
    noise: Tensor
    tokens: Tensor


class PairStream:
    """Rows of a complete set in an order that is a function of (seed, epoch) alone.

    The shards are permuted, then the rows within each window of consecutive shards. Global batch k of an epoch is a
    fixed set of rows however many workers share it, so a position is arithmetic and no loader state is ever saved.
    Neighbouring rows are independent draws, hence shuffling within windows loses nothing.
    """

    def __init__(self, uri: str, inventory: dict[str, Any], window: int) -> None:
        self.uri, self.fingerprint, self.count = uri, inventory["fingerprint"], inventory["count"]
        self.facts = PairFacts.from_json(inventory["facts"])
        self.layout = self.facts.layout
        self.shards = [Shard(**shard) for shard in inventory["shards"]]
        self._per_window = max(1, window // (self.facts.row_bytes * self.facts.shard_rows))
        self._cache: dict[str, Rows] = {}

    @classmethod
    def open(cls, uri: str, expected: str | None = None, window: int = WINDOW) -> PairStream:
        """Open a set after checking that it is complete, is the ``expected`` one, and that its noise can be made here.

        ``window`` bytes of rows are shuffled together; it is part of the order.
        """
        return cls(storage.resolve(uri), manifest.read(uri, expected), window)

    def steps(self, batch: int) -> int:
        """Batches of an epoch; a last one that is not full is dropped."""
        return self.count // batch

    def batches(
        self, epoch: int, seed: int, batch: int, start: int = 0, rank: int = 0, world: int = 1
    ) -> Iterator[Pairs]:
        """One epoch of ``epochs``: rank ``rank``'s share of the global batches start, start + 1, ..."""
        return (share for _, share in self.epochs(range(epoch, epoch + 1), seed, batch, start, rank, world))

    def epochs(
        self, epochs: range, seed: int, batch: int, start: int = 0, rank: int = 0, world: int = 1
    ) -> Iterator[tuple[int, Pairs]]:
        """(epoch, rank ``rank``'s share) of the global batches of some epochs, the first of them from ``start`` on.

        The shares follow each other in the batch, and where they cannot be equal some have one row more. Batches and
        windows are made one ahead in threads, the next epoch's first ones while this one's last are used. Raises
        ValueError for a batch that has no row for each of the ranks or that is larger than the set.
        """
        if not 0 <= rank < world <= batch:
            raise ValueError(
                f"a batch of {batch} cannot be shared by {world} workers (rank {rank}); make it that large."
            )
        if batch > self.count:
            raise ValueError(f"a batch of {batch} is larger than the pair set, which has {self.count} rows; reduce it.")
        windows = ahead(
            (epoch, rows)
            for epoch in epochs
            for rows in self._windows(epoch, seed, batch, start if epoch == epochs.start else 0, rank, world)
        )
        return ahead(
            (epoch, self._pairs(rows))
            for epoch, group in groupby(windows, key=itemgetter(0))
            for rows in _cut((rows for _, rows in group), len(_share(batch, rank, world)))
        )

    def order(self, epoch: int, seed: int) -> np.ndarray:
        """The ids of an epoch in order, int64 [count]: what ``batches`` follows."""
        parts = []
        for group, places in self._plan(epoch, seed):
            shards = [self.shards[i] for i in group]
            ids = np.concatenate([self.facts.ids(shard.number, shard.rows) for shard in shards])
            parts.append(ids[places])
        return np.concatenate(parts)

    def _plan(self, epoch: int, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Windows of an epoch: the shards of each (places in ``shards``) and the permutation of their rows."""
        shards = _permutation(seed, epoch, 0, len(self.shards))
        for window, begin in enumerate(range(0, len(shards), self._per_window), start=1):
            group = shards[begin : begin + self._per_window]
            yield group, _permutation(seed, epoch, window, sum(self.shards[i].rows for i in group))

    def _windows(self, epoch: int, seed: int, batch: int, start: int, rank: int, world: int) -> Iterator[Rows]:
        """This rank's rows of every window, in order."""
        share, before = _share(batch, rank, world), 0
        for group, places in self._plan(epoch, seed):
            position = before + np.arange(len(places))
            before += len(places)
            due = (position >= start * batch) & (position < self.steps(batch) * batch)
            mine = places[due & (position % batch >= share.start) & (position % batch < share.stop)]
            if len(mine):
                yield self._gather(group, mine)

    def _gather(self, group: np.ndarray, places: np.ndarray) -> Rows:
        """The rows at ``places`` of the concatenated shards of ``group``; each shard is read once and cut at once.

        Threads read the shards together: an object store answers a hundred requests as fast as one.
        """
        ends = np.cumsum([self.shards[i].rows for i in group])
        pieces = []  # (shard, which of its rows, where these stand in ``places``)
        for i, end in zip(group, ends, strict=True):
            begin = end - self.shards[i].rows
            here = np.flatnonzero((places >= begin) & (places < end))
            if len(here):
                pieces.append((self.shards[i], places[here] - begin, here))
        with ThreadPoolExecutor(READERS) as pool:
            parts = list(pool.map(lambda shard, rows, _: self._load(shard).take(rows), *zip(*pieces, strict=True)))
        back = np.empty(len(places), dtype=np.int64)
        back[np.concatenate([here for *_, here in pieces])] = np.arange(len(places))
        return Rows.join(parts).take(back)

    def _load(self, shard: Shard) -> Rows:
        if shard.name in self._cache:
            return self._cache[shard.name]
        rows = load_shard(self.uri, self.facts, shard.name)
        if len(self.shards) <= self._per_window:
            self._cache[shard.name] = rows
        return rows

    def _pairs(self, rows: Rows) -> Pairs:
        return Pairs(
            torch.from_numpy(rows.ids),
            of_column(rows.conditions),
            torch.from_numpy(noise_of(self.facts, rows).astype(np.float32)),
            torch.from_numpy(rows.tokens.astype(np.int64)),
        )


def _permutation(seed: int, epoch: int, stream: int, count: int) -> np.ndarray:
    """A permutation of range(count) from raw Philox bits, which no numpy version changes."""
    bits = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64), counter=[0, 0, 0, stream]).random_raw(count)
    return np.argsort(bits, kind="stable")


def _share(batch: int, rank: int, world: int) -> range:
    """The places in a batch that are rank ``rank``'s."""
    return range(rank * batch // world, (rank + 1) * batch // world)


def _cut(windows: Iterator[Rows], size: int) -> Iterator[Rows]:
    """Windows of any length -> pieces of ``size`` rows, across their borders; a short rest is dropped."""
    rest: Rows | None = None
    for rows in windows:
        at = 0
        if rest is not None:
            at = size - len(rest.ids)
            rest = Rows.join([rest, rows.take(slice(0, at))])
            if len(rest.ids) < size:
                continue
            yield rest
        while at + size <= len(rows.ids):
            yield rows.take(slice(at, at + size))
            at += size
        rest = rows.take(slice(at, None)) if at < len(rows.ids) else None
