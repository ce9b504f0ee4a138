"""VAR sampled as one writes it first: the oracle of ``Teacher.generate``, and what its speed is compared with.

The conditional and the unconditional sequence take turns, and every scale's keys and values are concatenated to those
before it.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.models.base import Choose
from pipeline.models.conditions import Condition, labels_of
from pipeline.models.var.teacher import Teacher, VarNetwork, filtered
from pipeline.models.var.transformer import CosineAttention, modulated, unit

Cache = list[tuple[Tensor, Tensor] | None]
"""Of every block: keys and values [B, H, l, D / H] of the scales so far, None before the first."""


@torch.no_grad()
def generate(teacher: Teacher, condition: Condition, choose: Choose) -> Tensor:
    """Codes [B, n] int64, all AR steps from the first."""
    net, layout, quantize = teacher.network, teacher.layout, teacher.tokenizer.quantize
    labels, strength, codes = labels_of(condition), teacher.filter.guidance, []
    tables = [labels, torch.full_like(labels, layout.classes)][: 2 if strength else 1]
    caches: list[Cache] = [[None] * len(net.layers) for _ in tables]
    f_hat: Tensor | None = None
    x: Tensor | None = None
    for t in range(1, layout.steps + 1):
        logits = [_logits(net, table, x, layout.before(t), cache) for table, cache in zip(tables, caches, strict=True)]
        w = strength * (t - 1) / (layout.steps - 1)
        guided = (1 + w) * logits[0] - w * logits[1] if strength else logits[0]
        codes.append(choose(t, filtered(guided, teacher.filter)))
        if t < layout.steps:
            added = quantize.contribution(teacher.codebook[codes[-1]], t - 1)
            f_hat = added if f_hat is None else f_hat + added
            x = quantize.next_input(f_hat, t)
    return torch.cat(codes, dim=1)


def _logits(net: VarNetwork, labels: Tensor, x: Tensor | None, begin: int, cache: Cache) -> Tensor:
    """Logits [B, m, V] float32 of the scale that begins at position ``begin``; x [B, m, C], None for the first."""
    condition = net.class_emb(labels)
    h = condition[:, None] + net.pos_start if x is None else net.word_embed(x.to(net.word_embed.weight.dtype))
    h = h + net.positions()[:, begin : begin + h.shape[1]]
    with net.float16.region(h.device):
        for i, (block, by) in enumerate(zip(net.layers, net.modulations(condition), strict=True)):
            out, cache[i] = _attention(block.attn, modulated(h, by.scale1, by.shift1), cache[i])
            h = h + by.gamma1 * out
            h = h + by.gamma2 * block.ffn(modulated(h, by.scale2, by.shift2))
    return net.head(modulated(h, *net.head_nm.modulation(condition))).float()


def _attention(
    attn: CosineAttention, x: Tensor, before: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """x [B, m, D] -> [B, m, D], and all keys and values with its own after them."""
    bias = torch.cat([attn.q_bias, attn.zero_k_bias, attn.v_bias])
    qkv = F.linear(x, attn.mat_qkv.weight, bias).unflatten(-1, (3, attn.heads, -1))
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    q = unit(q) * attn.scale_mul_1H11.clamp_max(math.log(100)).exp()
    k = unit(k).to(v.dtype)
    if before is not None:
        k, v = torch.cat([before[0], k], dim=2), torch.cat([before[1], v], dim=2)
    out = F.scaled_dot_product_attention(q, k, v, scale=1.0)
    return attn.proj(out.transpose(1, 2).flatten(2)), (k, v)
