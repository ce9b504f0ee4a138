"""(seed, sample id) -> Gaussian noise, uniform draws and class label: the same on every machine.

Philox-4x64 in counter mode, keyed by (seed, sample id), gives the bits (numpy fixes the raw stream of its ``Philox``
across versions); an inverse CDF turns them into normals. Nothing depends on batch, worker or device. Normals are
rounded to float16 (a pair set may ask for float32) before anybody uses them, so what the set stores is exactly what the
teacher saw.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Literal

import numpy as np
from scipy.special import ndtri

Dtype = Literal["float16", "float32"]

GAUSSIAN, UNIFORM, CHOICE = 1, 2, 3  # the streams of one sample live in different counters


def _bits(seed: int, ids: Sequence[int] | np.ndarray, stream: int, count: int, block: int = 0) -> np.ndarray:
    """uint64 [len(ids), count]: the raw Philox stream ``stream`` of every sample, from its block ``block``."""
    if not 0 <= seed < 2**63:
        raise ValueError(f"the seed is {seed}; it must lie between 0 and 2^63 - 1.")
    raw = [
        np.random.Philox(key=np.array([seed, i], dtype=np.uint64), counter=[0, 0, block, stream]).random_raw(count)
        for i in ids
    ]
    return np.stack(raw) if raw else np.empty((0, count), dtype=np.uint64)


def _open_unit(bits: np.ndarray) -> np.ndarray:
    """uint64 -> float64 in the open interval (0, 1): the middle of one of 2^52 equal cells, exact in float64."""
    return ((bits >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52


def gaussian(seed: int, ids: Sequence[int] | np.ndarray, length: int, dim: int, dtype: Dtype = "float16") -> np.ndarray:
    """Noise sequences X_1 ~ N(0, I), rounded to ``dtype``: [len(ids), length, dim]."""
    normal = ndtri(_open_unit(_bits(seed, ids, GAUSSIAN, length * dim)))
    return normal.astype(dtype).reshape(-1, length, dim)


def uniform(seed: int, ids: Sequence[int] | np.ndarray, length: int) -> np.ndarray:
    """Uniform draws for plain AR sampling: float64 [len(ids), length] in (0, 1)."""
    return _open_unit(_bits(seed, ids, UNIFORM, length))


def choice(seed: int, ids: Sequence[int] | np.ndarray, draw: int, options: int) -> np.ndarray:
    """One of ``options`` per sample, all equally likely: int64 [len(ids)]; ``draw`` counts a sample's choices."""
    unit = _open_unit(_bits(seed, ids, CHOICE, 1, block=draw))[:, 0]
    return (unit * options).astype(np.int64)


def labels(ids: Sequence[int] | np.ndarray, classes: int) -> np.ndarray:
    """Class labels int64 [len(ids)]: id modulo classes, so any whole number of rounds is balanced."""
    return (np.asarray(ids, dtype=np.uint64) % np.uint64(classes)).astype(np.int64)


def digest(seed: int, length: int, dim: int, dtype: Dtype = "float16", rows: int = 4) -> str:
    """SHA-256 of the first rows' noise: two machines that agree on it make the same noise."""
    drawn = gaussian(seed, range(rows), length, dim, dtype)
    return hashlib.sha256(drawn.astype(drawn.dtype.newbyteorder("<")).tobytes()).hexdigest()
