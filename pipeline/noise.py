"""(seed, sample id) -> Gaussian noise, uniform draws and class label: the same on every machine.

Philox-4x64 in counter mode, keyed by (seed, sample id), gives the bits (numpy fixes the raw stream of its ``Philox``
across versions); an inverse CDF turns them into normals. Nothing depends on batch, worker or device. Normals are
rounded to float16 (a pair set may ask for float32) before anybody uses them, so what the set stores is exactly what the
teacher saw.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cache
from typing import Literal

import numpy as np
from scipy.special import ndtri

Dtype = Literal["float16", "float32"]

GAUSSIAN, UNIFORM, CHOICE = 1, 2, 3  # the streams of one sample live in different counters
LEADING = 17  # bits of a draw that settle its normal as float16, but for 13 % of the draws; a table of 256 KB
UNSETTLED = np.uint16(0x7E00)  # float16's NaN, which no draw gives
ERROR = 1e-9  # far above ndtri's own, relative and, near 0, absolute


def _bits(seed: int, ids: Sequence[int] | np.ndarray, stream: int, count: int, block: int = 0) -> np.ndarray:
    """uint64 [len(ids), count]: the raw Philox stream ``stream`` of every sample, from its block ``block``."""
    raw = [_stream(seed, i, stream, count, block) for i in ids]
    return np.stack(raw) if raw else np.empty((0, count), dtype=np.uint64)


def _stream(seed: int, sample: int, stream: int, count: int, block: int = 0) -> np.ndarray:
    """One sample's row of ``_bits``, uint64 [count]; ValueError for a seed out of range."""
    if not 0 <= seed < 2**63:
        raise ValueError(f"the seed is {seed}; it must lie between 0 and 2^63 - 1.")
    key = np.array([seed, sample], dtype=np.uint64)
    return np.random.Philox(key=key, counter=[0, 0, block, stream]).random_raw(count)


def _open_unit(bits: np.ndarray) -> np.ndarray:
    """uint64 -> float64 in the open interval (0, 1): the middle of one of 2^52 equal cells, exact in float64."""
    return ((bits >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52


def gaussian(seed: int, ids: Sequence[int] | np.ndarray, length: int, dim: int, dtype: Dtype = "float16") -> np.ndarray:
    """Noise sequences X_1 ~ N(0, I), rounded to ``dtype``: [len(ids), length, dim].

    ndtri of ``_open_unit``, row by row, so that a row stays in the processor's cache; in float16 mostly looked up. Both
    save time.
    """
    out = np.empty((len(ids), length * dim), dtype)
    for row, sample in zip(out, ids, strict=True):
        bits = _stream(seed, sample, GAUSSIAN, length * dim)
        if dtype == "float16":
            _look_up(bits, row.view(np.uint16))
        else:
            row[:] = ndtri(_open_unit(bits))
    return out.reshape(-1, length, dim)


def _look_up(bits: np.ndarray, out: np.ndarray) -> None:
    """float16(ndtri(_open_unit(bits))), bit for bit, of uint64 [count] into ``out`` uint16 [count]."""
    cell = (bits >> np.uint64(64 - LEADING)).view(np.int64)
    np.take(_halves(), cell, out=out, mode="clip")  # no index is beyond; "raise" would copy ``out``
    rest = np.flatnonzero(out == UNSETTLED)
    out[rest] = ndtri(_open_unit(bits[rest])).astype(np.float16).view(np.uint16)


@cache
def _halves() -> np.ndarray:
    """What draws with the same ``LEADING`` bits have in common: uint16 [2^LEADING], a float16 or ``UNSETTLED``.

    The inverse CDF rises, so a normal lies between those of its cell's ends. If both round to the same float16, and
    still do when each is moved outwards by more than the error of ndtri, all of the cell does.
    """
    first = np.arange(1 << LEADING, dtype=np.uint64) << np.uint64(64 - LEADING)
    last = first + np.uint64((1 << (64 - LEADING)) - 1)
    low, high = (ndtri(_open_unit(end)) for end in (first, last))
    low, high = low - ERROR * (1 + np.abs(low)), high + ERROR * (1 + np.abs(high))
    a, b = (end.astype(np.float16).view(np.uint16) for end in (low, high))
    return np.where(a == b, a, UNSETTLED)


def uniform(seed: int, ids: Sequence[int] | np.ndarray, length: int) -> np.ndarray:
    """Uniform draws for plain AR sampling: float64 [len(ids), length] in (0, 1)."""
    return _open_unit(_bits(seed, ids, UNIFORM, length))


def choice(
    seed: int, ids: Sequence[int] | np.ndarray, draw: int, options: int, weights: Sequence[float] | None = None
) -> np.ndarray:
    """One of ``options`` per sample: int64 [len(ids)]; ``draw`` counts a sample's choices.

    All are equally likely, or as their ``weights``, whose sum is free.
    """
    unit = _open_unit(_bits(seed, ids, CHOICE, 1, block=draw))[:, 0]
    if weights is None:
        return (unit * options).astype(np.int64)
    ends = np.cumsum(weights, dtype=np.float64)
    return np.searchsorted(ends[:-1] / ends[-1], unit, side="right").astype(np.int64)


def labels(ids: Sequence[int] | np.ndarray, classes: int) -> np.ndarray:
    """Class labels int64 [len(ids)]: id modulo classes, so any whole number of rounds is balanced."""
    return (np.asarray(ids, dtype=np.uint64) % np.uint64(classes)).astype(np.int64)


def digest(seed: int, length: int, dim: int, dtype: Dtype = "float16", rows: int = 4) -> str:
    """SHA-256 of the first rows' noise: two machines that agree on it make the same noise."""
    drawn = gaussian(seed, range(rows), length, dim, dtype)
    return hashlib.sha256(drawn.astype(drawn.dtype.newbyteorder("<")).tobytes()).hexdigest()
