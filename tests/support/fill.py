"""Weights and inputs of the golden files as closed formulas, those of ``pipeline.device.formula``."""

from __future__ import annotations

import math
import zlib
from typing import TypeVar

import numpy as np
from torch import nn

from pipeline.device.formula import filled, scale_and_offset, unit

__all__ = ["fill_module", "filled", "image", "labels", "noise", "projections", "scale_and_offset", "tokens", "unit"]
M = TypeVar("M", bound=nn.Module)


def fill_module(module: M, salt: str = "") -> M:
    """Overwrite every tensor of the state_dict but the constants, in place; returns the module."""
    own = module.state_dict()
    for name, value in filled(module, salt).items():
        own[name].copy_(value)
    return module


def noise(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The sum of three u's: mean 0, variance 1, float32."""
    u = [unit(f"{name}#{j}", math.prod(shape)) for j in range(3)]
    return (u[0] + u[1] + u[2]).astype(np.float32).reshape(shape)


def image(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Values in [-0.9, 0.9), float32."""
    return (0.9 * unit(name, math.prod(shape))).astype(np.float32).reshape(shape)


def labels(name: str, count: int, classes: int) -> list[int]:
    return [zlib.crc32(f"{name}:{i}".encode()) % classes for i in range(count)]


def tokens(name: str, shape: tuple[int, ...], vocabulary: int) -> np.ndarray:
    """Codes in [0, vocabulary), int64."""
    return np.floor((unit(name, math.prod(shape)) + 1) * 0.5 * vocabulary).astype(np.int64).reshape(shape)


def projections(x: np.ndarray, count: int = 8) -> np.ndarray:
    """Dot products of x with fixed directions: they move by about as much as x does, wherever it moves."""
    flat = np.asarray(x, dtype=np.float64).ravel()
    return np.array([flat @ unit(f"proj{j}", flat.size) for j in range(count)]) * math.sqrt(3 / flat.size)
