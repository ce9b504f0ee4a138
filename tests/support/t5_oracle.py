"""The encoder of a T5 by its formulas, one prompt at a time and position by position: what transformers is tested with.

D is the width, H the heads, dk the width of one, n the tokens of the prompt. Everything is float64.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

BUCKETS, FAR = 32, 128


def features(weights: Mapping[str, Tensor], config: Mapping[str, Any], ids: Sequence[int]) -> Tensor:
    """Token ids of one prompt -> the features of its n positions [n, D] float64. ``weights`` has the file's names."""
    w = {name: value.double() for name, value in weights.items()}
    h = w["shared.weight"][list(ids)]
    table = w["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
    bias = table[torch.tensor([[bucket(j - i) for j in range(len(ids))] for i in range(len(ids))])]
    for block in range(config["num_layers"]):
        name = f"encoder.block.{block}.layer"
        h = h + attention(w, f"{name}.0.SelfAttention", config, norm(h, w[f"{name}.0.layer_norm.weight"]), bias)
        x = norm(h, w[f"{name}.1.layer_norm.weight"])
        wide = f"{name}.1.DenseReluDense"
        inner = gelu(x @ w[f"{wide}.wi_0.weight"].T) * (x @ w[f"{wide}.wi_1.weight"].T)
        h = h + inner @ w[f"{wide}.wo.weight"].T
    return norm(h, w["encoder.final_layer_norm.weight"])


def attention(w: Mapping[str, Tensor], name: str, config: Mapping[str, Any], x: Tensor, bias: Tensor) -> Tensor:
    """Every position sees every other: logits q.k, not scaled, plus bias [n, n, H] of their distance."""
    dk, heads = config["d_kv"], config["num_heads"]
    q, k, v = (x @ w[f"{name}.{part}.weight"].T for part in "qkv")
    out = torch.zeros(len(x), heads * dk, dtype=x.dtype)
    for head in range(heads):
        own = slice(head * dk, (head + 1) * dk)
        for i in range(len(x)):
            logits = k[:, own] @ q[i, own] + bias[i, :, head]
            out[i, own] = logits.softmax(0) @ v[:, own]
    return out @ w[f"{name}.o.weight"].T


def bucket(distance: int) -> int:
    """The row of the bias table for a key that stands ``distance`` positions behind its query."""
    behind, a = (BUCKETS // 2 if distance > 0 else 0), abs(distance)
    exact = BUCKETS // 4
    if a < exact:
        return behind + a
    step = math.floor(math.log(a / exact) / math.log(FAR / exact) * exact)
    return behind + min(BUCKETS // 2 - 1, exact + step)


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
