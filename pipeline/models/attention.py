"""Attention of both families' transformers: torch's fused kernels, except where they are slow."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False, scale: float | None = None
) -> Tensor:
    """softmax(scale q k^T + mask) v for q [B, H, m, d], k and v [B, H, l, d]; a mask is added to the logits.

    ``causal`` (m = l, no mask) hides later positions; ``scale`` is 1 / sqrt(d) by default.
    """
    if v.dtype == torch.bfloat16 and v.device.type == "cpu" and torch.is_grad_enabled():
        return _plain(q.to(v.dtype), k.to(v.dtype), v, mask, causal, scale)
    if mask is not None:
        mask = mask.to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale)


def _plain(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float | None) -> Tensor:
    """The same as matrix products, for bfloat16 training on a CPU.

    torch 2.13 has no fast backward there: forward and backward take longer with the flash kernel, and with the MATH
    backend, which computes in float32.
    """
    if causal:
        mask = torch.full((q.shape[2], k.shape[2]), -math.inf, device=q.device).triu_(1)
    with torch.autocast(q.device.type, enabled=False):
        logits = (q * (q.shape[-1] ** -0.5 if scale is None else scale)) @ k.transpose(-1, -2)
        if mask is not None:
            logits = logits + mask.to(logits.dtype)
        return logits.softmax(-1) @ v
