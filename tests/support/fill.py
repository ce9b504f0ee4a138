"""Weights and inputs of the golden files as closed formulas, so that no library version matters.

    u(key, i) = 2 frac(gain(key) sin(13301/1024 i + phase(key))) - 1      in [-1, 1), float64
    phase = crc32(key) mod 1000,    gain = 43758.546875 + (crc32(key) // 1000) mod 1000

A tensor of a state_dict is u(salt + name, 0, 1, ...) * scale + offset in float32: ``scale_and_offset``.
u has mean 0 and variance 1/3, so sqrt(3 / fan_in) keeps the variance of what flows through a layer.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from typing import TypeVar

import numpy as np
import torch
from torch import nn

M = TypeVar("M", bound=nn.Module)
CONSTANTS = {  # what a constructor computes is never overwritten
    "zero_k_bias", "lvl_1L", "attn_bias_for_masking", "ema_vocab_hit_SV", "codebook_used",
    "freqs_cis", "causal_mask", "k_cache", "v_cache", "noise_mask",
}  # fmt: skip
BIASES = {"bias", "q_bias", "v_bias"}
TABLES = (  # lookup tables; for the student of LlamaGen tok_embeddings is a linear layer and still counts
    "quantize.embedding.weight", "class_emb.weight", "lvl_embed.weight", "n_d_embed.weight",
    "tok_embeddings.weight", "embedding_table.weight", "uncond_embedding", "pos_start", "pos_1LC",
)  # fmt: skip
MODULATIONS = {"ada_gss", "scale_shift_table"}


def unit(key: str, count: int) -> np.ndarray:
    """u(key, 0 .. count - 1), float64."""
    checksum = zlib.crc32(key.encode())
    gain, phase = 43758.546875 + checksum // 1000 % 1000, checksum % 1000
    out = np.empty(count)
    for start in range(0, count, 1 << 20):  # real checkpoints have tensors of 10^8 elements
        i = np.arange(start, min(start + (1 << 20), count), dtype=np.float64)
        y = gain * np.sin(i * (13301 / 1024) + phase)
        out[start : start + len(i)] = 2 * (y - np.floor(y)) - 1
    return out


def scale_and_offset(name: str, shape: tuple[int, ...]) -> tuple[float, float] | None:
    """(scale, offset) of one entry of a state_dict; None for a constant, which stays as it was built."""
    leaf = name.split(".")[-1]
    fan_in = max(1, math.prod(shape[1:])) if shape else 1
    if leaf in CONSTANTS:
        return None
    if leaf == "scale_mul_1H11":
        return 0.5, 1.4
    if leaf == "weight" and len(shape) == 1:  # the gain of a norm
        return 0.1, 1.0
    if leaf in BIASES:
        return 0.1, 0.0
    if name.endswith(TABLES):
        return 1.0, 0.0
    if leaf in MODULATIONS:
        return 0.5, 0.0
    scale = math.sqrt(3 / fan_in)
    if f".{name}".endswith((".head.weight", ".output.weight")):  # logits with a spread of 3
        return 3 * scale, 0.0
    if name.endswith("decoder.conv_out.weight"):  # images that seldom leave [-1, 1]
        return 0.5 * scale, 0.0
    return scale, 0.0


def fill_module(module: M, salt: str = "") -> M:
    """Overwrite every tensor of the state_dict but the constants, in place; returns the module."""
    own = module.state_dict()
    for name, value in filled(module, salt):
        own[name].copy_(value)
    return module


def filled(module: nn.Module, salt: str) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, value) of every tensor but the constants; the module may be on the meta device."""
    for name, tensor in module.state_dict().items():
        rule = scale_and_offset(name, tuple(tensor.shape))
        if rule is None:
            continue
        value = (unit(salt + name, tensor.numel()) * rule[0] + rule[1]).astype(np.float32)
        if name.endswith("blocks.0.attn.scale_mul_1H11"):
            value[0] = 5.0  # above log(100), where the official code clamps
        yield name, torch.from_numpy(value).view(tensor.shape)


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
