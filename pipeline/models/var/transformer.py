"""VAR's transformer, shared by the teacher and the student: embeddings, blocks with adaptive norms, the head.

Names and order of the modules are those of the official files. D is the width of the transformer, H its
heads, L the length of its sequence (the student's is one longer than the teacher's: it has a class token).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.models.attention import attend
from pipeline.models.var.config import Config


class Modulation(NamedTuple):
    """What the class does to a block: six vectors [B, 1, D]; scale1 and scale2 hold 1 + the network's."""

    gamma1: Tensor
    gamma2: Tensor
    scale1: Tensor
    scale2: Tensor
    shift1: Tensor
    shift2: Tensor


class CosineAttention(nn.Module):
    """Cosine attention: q and k of unit length, q times a learned factor per head, no 1 / sqrt(D / H)."""

    zero_k_bias: Tensor

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.scale_mul_1H11 = nn.Parameter(torch.full((1, heads, 1, 1), math.log(4)))
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.register_buffer("zero_k_bias", torch.zeros(width, device="cpu"))
        self.mat_qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None = None, cache: Tensor | None = None) -> Tensor:
        """x [B, m, D]; mask [1, 1, m, m] is added to the logits.

        A cache [2, B, H, l, D / H] holds the keys and values up to x's, which are written here; x sees them all.
        """
        batch, m, width = x.shape
        bias = torch.cat([self.q_bias, self.zero_k_bias, self.v_bias])
        qkv = F.linear(x, self.mat_qkv.weight, bias).view(batch, m, 3, self.heads, width // self.heads)
        qkv = qkv.permute(2, 0, 3, 1, 4)  # [3, B, H, m, D / H]
        q, k = unit(qkv[:2])
        q = q * self.scale_mul_1H11.clamp_max(math.log(100)).exp()
        v = qkv[2]
        if cache is not None:
            keys, values = cache
            keys[:, :, -m:], values[:, :, -m:] = k, v
            k, v = keys, values
        out = attend(q, k, v, mask, scale=1.0)
        return self.proj(out.transpose(1, 2).reshape(batch, m, width))


def unit(x: Tensor) -> Tensor:
    """x [..., D] over its length; float16 as float32, since the length may lie beyond its range."""
    return F.normalize(x.float() if x.dtype == torch.float16 else x, dim=-1)


class GeluFeedForward(nn.Module):
    """fc2(GELU(fc1 x)), GELU in its tanh form."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Block(nn.Module):
    """x + gamma1 Attn(norm(x) scale1 + shift1), then the same with the feed-forward layer."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        if config.shared_aln:
            self.ada_gss = nn.Parameter(torch.zeros(1, 1, 6, config.width))
        self.attn = CosineAttention(config.width, config.heads)
        self.ffn = GeluFeedForward(config.width, config.mlp_ratio * config.width)
        if not config.shared_aln:
            self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(config.width, 6 * config.width))

    def modulation(self, condition: Tensor) -> Modulation:
        """condition: class embedding [B, D], or [B, 1, 6, D] from the layer that all blocks share."""
        if hasattr(self, "ada_gss"):
            six = self.ada_gss + condition
        else:
            six = self.ada_lin(condition).view(len(condition), 1, 6, -1)
        gamma1, gamma2, scale1, scale2, shift1, shift2 = six.unbind(2)
        return Modulation(gamma1, gamma2, 1 + scale1, 1 + scale2, shift1, shift2)

    def forward(
        self,
        x: Tensor,
        by: Modulation,
        mask: Tensor | None = None,
        cache: Tensor | None = None,
        between: Tensor | None = None,
    ) -> Tensor:
        """x [B, m, D] -> [B, m, D]; the student adds ``between`` [B, m, D] between the two branches."""
        x = torch.addcmul(x, by.gamma1, self.attn(modulated(x, by.scale1, by.shift1), mask, cache))
        if between is not None:
            x = x + between
        return torch.addcmul(x, by.gamma2, self.ffn(modulated(x, by.scale2, by.shift2)))


class HeadNorm(nn.Module):
    """The adaptive norm before the head."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def modulation(self, condition: Tensor) -> tuple[Tensor, Tensor]:
        """Class embedding [B, D] -> (1 + scale, shift), [B, 1, D] each."""
        scale, shift = self.ada_lin(condition)[:, None].chunk(2, dim=-1)
        return 1 + scale, shift


class Transformer(nn.Module):
    """All that teacher and student share.

    ``sides`` are the token grids of the sequence's scales. ``allowed`` says which position sees which, from
    the scale numbers of the positions as [L, 1] and [1, L].
    """

    lvl_1L: Tensor
    attn_bias_for_masking: Tensor

    def __init__(self, config: Config, sides: tuple[int, ...], allowed: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        width = config.width
        # Constants are real even under the meta device, so that a file which lacks them can be loaded there.
        levels = torch.cat([torch.full((p * p,), s, device="cpu") for s, p in enumerate(sides)])
        hidden = torch.zeros(len(levels), len(levels), device="cpu")
        hidden.masked_fill_(~allowed(levels[:, None], levels[None, :]), -math.inf)
        self.pos_start = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_1LC = nn.Parameter(torch.zeros(1, len(levels), width))
        self.register_buffer("lvl_1L", levels[None])
        self.register_buffer("attn_bias_for_masking", hidden[None, None])
        self.word_embed = nn.Linear(config.code_dim, width)
        self.class_emb = nn.Embedding(config.classes + 1, width)
        self.lvl_embed = nn.Embedding(len(sides), width)
        if config.shared_aln:
            self.shared_ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.head_nm = HeadNorm(width)
        self.head = nn.Linear(width, config.vocabulary)

    @property
    def layers(self) -> list[Block]:
        """The blocks by their type, which nn.ModuleList does not know."""
        return cast("list[Block]", list(self.blocks))

    def positions(self) -> Tensor:
        """What every position adds to its input, [1, L, D]."""
        return self.lvl_embed(self.lvl_1L) + self.pos_1LC

    def modulations(self, condition: Tensor) -> list[Modulation]:
        """Class embedding [B, D] -> what it does to every block."""
        if hasattr(self, "shared_ada_lin"):
            condition = self.shared_ada_lin(condition).view(len(condition), 1, 6, -1)
        return [block.modulation(condition) for block in self.layers]


def modulated(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """norm(x) scale + shift for x [B, m, D]: a layer norm without weights, eps 1e-6."""
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=1e-6), scale)


def initialise(net: Transformer, generator: torch.Generator | None = None) -> None:
    """Fresh weights in place, as VAR starts: normals of std sqrt(1 / 3D) cut at two std, zero biases.

    The layers that end a branch are divided by sqrt(2 depth). The adaptive norms start near the identity:
    scale and shift at half size, the gates gamma at 1e-5. The head starts at 2 %.
    """
    for name, weight in net.named_parameters():
        draw(net, name, weight, generator)


@torch.no_grad()
def draw(net: Transformer, name: str, weight: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """``weight``, filled with what the parameter ``name`` of ``net`` starts as."""
    std = math.sqrt(1 / (3 * net.head.in_features))
    if name.endswith("scale_mul_1H11"):
        nn.init.constant_(weight, math.log(4))
    elif name.endswith("bias"):
        nn.init.zeros_(weight)
    elif name.endswith(("ada_gss", "scale_shift_table")):
        nn.init.normal_(weight, std=net.head.in_features**-0.5, generator=generator)
    else:
        nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std, generator=generator)
    return weight.mul_(_start(name, weight, len(net.blocks)))


def _start(name: str, weight: Tensor, depth: int) -> Tensor | float:
    """What ``initialise`` multiplies a fresh weight with."""
    if name.endswith(("attn.proj.weight", "ffn.fc2.weight")):
        return (2 * depth) ** -0.5
    if name == "head.weight":
        return 0.02
    if name == "head_nm.ada_lin.1.weight":
        return 0.5
    if name.endswith((".ada_lin.1.weight", ".ada_gss")):
        factor = torch.tensor([1e-5, 1e-5, 0.5, 0.5, 0.5, 0.5], device=weight.device)  # gamma1, gamma2, ...
        return factor[:, None].repeat_interleave(weight.numel() // 6 // weight.shape[-1], 0)
    return 1.0
