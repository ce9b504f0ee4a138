"""The convolutional blocks that the VAR and the LlamaGen tokenizer share.

Attribute names and their order are those of the official files; only the attention block exists in two layouts (one
1x1 convolution for q, k and v in VAR, three in LlamaGen). All tensors are NCHW.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def norm(channels: int) -> nn.GroupNorm:
    """The GroupNorm of both tokenizers: 32 groups, eps 1e-6."""
    return nn.GroupNorm(32, channels, eps=1e-6)


class ResBlock(nn.Module):
    """x + conv(SiLU(norm(conv(SiLU(norm(x)))))), with a 1x1 shortcut where the width changes."""

    def __init__(self, inside: int, outside: int) -> None:
        super().__init__()
        self.norm1 = norm(inside)
        self.conv1 = nn.Conv2d(inside, outside, 3, padding=1)
        self.norm2 = norm(outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, padding=1)
        if inside != outside:
            self.nin_shortcut = nn.Conv2d(inside, outside, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class FusedAttention(nn.Module):
    """Single-head attention over all pixels; one 1x1 convolution gives q, k, v (VAR)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.proj_out(_attend(*self.qkv(self.norm(x)).chunk(3, dim=1)))


class SplitAttention(nn.Module):
    """Single-head attention over all pixels; q, k, v from a 1x1 convolution each (LlamaGen)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = norm(channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return x + self.proj_out(_attend(self.q(h), self.k(h), self.v(h)))


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k / sqrt(c)) v over the pixels of maps [B, c, h, w]."""
    shape = v.shape
    # The fused kernels want a pixel's channels side by side in memory.
    q, k, v = (m.flatten(2).transpose(1, 2)[:, None].contiguous() for m in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v)
    return out[:, 0].transpose(1, 2).reshape(shape)


class Down(nn.Module):
    """Half the resolution: one zero pixel on the right and at the bottom, then a 3x3 convolution of stride 2."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Up(nn.Module):
    """Twice the resolution: nearest neighbour, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def blocks(network: nn.Module) -> list[nn.Module]:
    """The residual and attention blocks inside a network."""
    return [m for m in network.modules() if isinstance(m, ResBlock | FusedAttention | SplitAttention)]


def widths(channels: int, multipliers: tuple[int, ...]) -> list[int]:
    """Channels of every level, finest first."""
    return [channels * m for m in multipliers]


def to_map(embeddings: Tensor) -> Tensor:
    """[B, side * side, C] in raster order -> [B, C, side, side]."""
    batch, n, dim = embeddings.shape
    side = math.isqrt(n)
    return embeddings.transpose(1, 2).reshape(batch, dim, side, side)


def to_uint8(images: Tensor) -> Tensor:
    """Images in [-1, 1] -> uint8 as PNG savers round: floor(clamp(127.5 y + 128, 0, 255))."""
    return (127.5 * images.float() + 128.0).clamp(0, 255).to(torch.uint8)
