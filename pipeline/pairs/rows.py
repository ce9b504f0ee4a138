"""Rows of a pair set in memory."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from pipeline.pairs.facts import PairFacts


class Rows(NamedTuple):
    """Rows as stored: ids int64 [b], conditions [b], noise [b, n, C] or None if derived, tokens uint16 [b, n].

    Conditions are int64 labels, or prompts in an object array of str.
    """

    ids: np.ndarray
    conditions: np.ndarray
    noise: np.ndarray | None
    tokens: np.ndarray

    def take(self, index: np.ndarray | slice | list[int]) -> Rows:
        """The rows at ``index``."""
        return Rows(*(None if column is None else column[index] for column in self))  # type: ignore[arg-type]

    @staticmethod
    def join(parts: list[Rows]) -> Rows:
        """One after the other."""
        columns = zip(*parts, strict=True)
        return Rows(*(None if column[0] is None else np.concatenate(column) for column in columns))  # type: ignore[arg-type]


def noise_of(facts: PairFacts, rows: Rows) -> np.ndarray:
    """Stored noise, or noise made again from the ids: [b, n, C] of the set's dtype."""
    return facts.noise(rows.ids) if rows.noise is None else rows.noise
