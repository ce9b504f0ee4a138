"""LlamaGen sampled as one writes it first: the oracle of ``Teacher.generate``, and what its speed is compared with.

As in the official code, keys and values lie in caches of the full length, and every token attends over the whole of
them under a mask. The conditional and the unconditional sequence take turns.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.models.base import Choose
from pipeline.models.conditions import Condition, labels_of
from pipeline.models.llamagen.teacher import Layer, RotaryAttention, Teacher, log_probabilities, rotary, turn


@torch.no_grad()
def generate(teacher: Teacher, condition: Condition, choose: Choose) -> Tensor:
    """Codes [B, n] int64, all AR steps from the first, given classes."""
    net, n, w = teacher.network, teacher.layout.length, teacher.filter.guidance
    layers, labels, codes = cast("list[Layer]", list(net.layers)), labels_of(condition), []
    tables = [labels, torch.full_like(labels, teacher.layout.classes)][: teacher.copies(1)]
    inputs = [net.cls_embedding(table) for table in tables]
    caches = [[_empty(layer.attention, len(labels), n) for layer in layers] for _ in tables]
    rotations = rotary(teacher.config, labels.device)
    mask = torch.ones(n, n, dtype=torch.bool, device=labels.device).tril()
    for t in range(1, n + 1):
        logits = []
        for x, cache in zip(inputs, caches[: len(inputs)], strict=True):
            with net.float16.region(x.device):
                for layer, (keys, values) in zip(layers, cache, strict=True):
                    x = _layer(layer, x, t - 1, keys, values, rotations[t - 1 : t], mask[t - 1 : t])
            logits.append(net.output(net.norm(x)).float())
        guided = logits[0] if len(logits) == 1 else logits[1] + w * (logits[0] - logits[1])
        codes.append(choose(t, log_probabilities(guided, teacher.filter)))
        inputs = [net.tok_embeddings(codes[-1])] * teacher.copies(t + 1)
    return torch.cat(codes, dim=1)


def _empty(attention: RotaryAttention, batch: int, n: int) -> tuple[Tensor, Tensor]:
    """Keys and values [B, H, n, D] of one layer."""
    weight = attention.wo.weight
    shape = (batch, attention.heads, n, len(weight) // attention.heads)
    return weight.new_zeros(shape), weight.new_zeros(shape)


def _layer(layer: Layer, x: Tensor, at: int, keys: Tensor, values: Tensor, rotation: Tensor, seen: Tensor) -> Tensor:
    """x [B, 1, dim] of position ``at`` -> [B, 1, dim]; its keys and values are written to [B, H, n, D]."""
    attention, heads = layer.attention, layer.attention.heads
    q, k, v = attention.wqkv(layer.attention_norm(x)).unflatten(-1, (3, heads, -1)).unbind(2)
    q, k = (turn(part.float(), rotation[:, None]).to(part.dtype) for part in (q, k))
    keys[:, :, at], values[:, :, at] = k[:, 0], v[:, 0]
    out = F.scaled_dot_product_attention(q.transpose(1, 2), keys, values, attn_mask=seen)
    x = x + attention.wo(out.transpose(1, 2).flatten(2))
    return x + layer.feed_forward(layer.ffn_norm(x))
