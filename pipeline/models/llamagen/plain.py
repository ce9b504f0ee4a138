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
from pipeline.models.conditions import Condition
from pipeline.models.llamagen.captions import positions, sequence_mask
from pipeline.models.llamagen.teacher import Teacher, log_probabilities
from pipeline.models.llamagen.transformer import Layer, RotaryAttention, rotary, turn


@torch.no_grad()
def generate(teacher: Teacher, condition: Condition, choose: Choose) -> Tensor:
    """Codes [B, n] int64, all AR steps from the first, given classes or captions."""
    net, n, w = teacher.network, teacher.layout.length, teacher.filter.guidance
    layers, codes = cast("list[Layer]", list(net.layers)), []
    halves = [condition, net.cls_embedding.null(condition)][: teacher.copies(1)]
    inputs = [net.cls_embedding(half) for half in halves]
    length, device = positions(condition) - 1 + n, inputs[0].device
    caches = [[_empty(layer.attention, len(condition), length) for layer in layers] for _ in halves]
    rotations, mask = rotary(teacher.config, device, positions(condition)), sequence_mask(condition, n - 1)
    if mask is None:
        mask = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    end = 0
    for t in range(1, n + 1):
        logits = []
        start, end = end, end + inputs[0].shape[1]
        for x, cache in zip(inputs, caches[: len(inputs)], strict=True):
            with net.float16.region(x.device):
                for layer, (keys, values) in zip(layers, cache, strict=True):
                    x = _layer(layer, x, start, keys, values, rotations[start:end], mask[..., start:end, :])
            logits.append(net.output(net.norm(x[:, -1:])).float())
        guided = logits[0] if len(logits) == 1 else logits[1] + w * (logits[0] - logits[1])
        codes.append(choose(t, log_probabilities(guided, teacher.filter)))
        inputs = [net.tok_embeddings(codes[-1])] * teacher.copies(t + 1)
    return torch.cat(codes, dim=1)


def _empty(attention: RotaryAttention, batch: int, length: int) -> tuple[Tensor, Tensor]:
    """Keys and values [B, H, length, D] of one layer."""
    weight = attention.wo.weight
    shape = (batch, attention.heads, length, len(weight) // attention.heads)
    return weight.new_zeros(shape), weight.new_zeros(shape)


def _layer(layer: Layer, x: Tensor, start: int, keys: Tensor, values: Tensor, rotated: Tensor, mask: Tensor) -> Tensor:
    """x [B, g, dim] of the positions from ``start`` on -> [B, g, dim]; writes their keys and values to [B, H, L, D]."""
    attention, heads = layer.attention, layer.attention.heads
    q, k, v = attention.wqkv(layer.attention_norm(x)).unflatten(-1, (3, heads, -1)).unbind(2)
    q, k = (turn(part.float(), rotated[:, None]).to(part.dtype) for part in (q, k))
    here = slice(start, start + x.shape[1])
    keys[:, :, here], values[:, :, here] = k.transpose(1, 2), v.transpose(1, 2)
    mask = mask if mask.dtype == torch.bool else mask.to(q.dtype)
    out = F.scaled_dot_product_attention(q.transpose(1, 2), keys, values, attn_mask=mask)
    x = x + attention.wo(out.transpose(1, 2).flatten(2))
    return x + layer.feed_forward(layer.ffn_norm(x))
