"""The LlamaGen transformer (arXiv 2406.06525): a Llama over tokens in raster order, given a class or a caption.

The sequence is T condition positions (1 of a class, those of a caption), then token 0 .. token n - 2; position
T - 1 + i predicts token i. Attribute names and their order are those of the official files (``c2i_B_256.pt``), whose
rotary table is not stored. The official training dropout (0.1) is left out: a teacher is used in eval mode, and the
small one of the embedded default is trained without.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.models.attention import attend
from pipeline.models.conditions import Condition, Labels, labels_of
from pipeline.models.float16 import Float16
from pipeline.models.llamagen.captions import CaptionEmbedding, positions, sequence_mask
from pipeline.models.llamagen.config import Config

INIT_STD = 0.02  # of every matrix and table of the official initialisation


def rotary(config: Config, device: torch.device, conditions: int) -> Tensor:
    """Rotations [T + n, D / 2, 2] of T = ``conditions`` positions and every token, D channels per head: cosine, sine.

    Half of the angles turn with the token's row, half with its column. Condition positions are **zero**, not an
    identity rotation: their query and key vanish, so every token gives them the attention logit 0. The
    released weights were trained so. Recomputed in every pass: a few tiny operations, which no cast of the
    network to bfloat16 can blur.
    """
    half = config.dim // config.heads // 2
    frequency = 10_000.0 ** (-torch.arange(0, half, 2, device=device).float() / half)
    angle = torch.arange(config.side, device=device).float()[:, None] * frequency
    rows, columns = angle.repeat_interleave(config.side, dim=0), angle.repeat(config.side, 1)
    angles = torch.cat([rows, columns], dim=1)
    rotations = torch.view_as_real(torch.polar(torch.ones_like(angles), angles))
    return F.pad(rotations, (0, 0, 0, 0, conditions, 0))


def turn(x: Tensor, rotations: Tensor) -> Tensor:
    """Neighbouring channels of x [..., D] float32, as complex numbers, times rotations [..., D / 2, 2] -> [..., D]."""
    pairs = x.view(*x.shape[:-1], -1, 2)
    if torch.compiler.is_compiling():  # which makes no kernels for complex numbers; without it, one does it all
        (a, b), (cos, sin) = pairs.unbind(-1), rotations.unbind(-1)
        return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)
    return torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(rotations)).flatten(-2)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + 1e-5) in float32, then cast back, then scaled."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), (x.shape[-1],), eps=1e-5).to(x.dtype) * self.weight


class RotaryAttention(nn.Module):
    """Causal attention with rotary positions, over what is passed in or over a cache."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.heads = config.heads
        self.wqkv = nn.Linear(config.dim, 3 * config.dim, bias=False)
        self.wo = nn.Linear(config.dim, config.dim, bias=False)

    def forward(
        self,
        x: Tensor,
        rotations: Tensor,
        cache: Tensor | None = None,
        causal: bool = True,
        mask: Tensor | None = None,
    ) -> Tensor:
        """x [B, g, dim] -> [B, g, dim]; ``rotations`` [g, D / 2, 2] are those of x's positions.

        A cache [2, B, heads, m, D] holds the keys and values up to x's, which are written here: x is either all
        of its positions (g = m), or the last one, which sees them all and is not ``causal``. A mask [B, 1, g, m] is
        added to the logits instead.
        """
        batch, new, dim = x.shape
        qkv = self.wqkv(x).view(batch, new, 3, self.heads, dim // self.heads)
        turned = turn(qkv[:, :, :2].float(), rotations[:, None, None]).to(qkv.dtype)
        q, k, v = (
            turned[:, :, 0].transpose(1, 2),
            turned[:, :, 1].transpose(1, 2),
            qkv[:, :, 2].transpose(1, 2),
        )
        if cache is not None:
            keys, values = cache
            keys[:, :, -new:], values[:, :, -new:] = k, v
            k, v = keys, values
        out = attend(q, k, v, mask, causal=causal and mask is None)
        return self.wo(out.transpose(1, 2).reshape(batch, new, dim))


class GatedFeedForward(nn.Module):
    """SwiGLU: w2(SiLU(w1 x) * w3 x)."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.dim, config.hidden, bias=False)
        self.w3 = nn.Linear(config.dim, config.hidden, bias=False)
        self.w2 = nn.Linear(config.hidden, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Layer(nn.Module):
    """Pre-norm attention and feed-forward, each added to its input."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.attention = RotaryAttention(config)
        self.feed_forward = GatedFeedForward(config)
        self.attention_norm = RMSNorm(config.dim)
        self.ffn_norm = RMSNorm(config.dim)

    def forward(
        self,
        x: Tensor,
        rotations: Tensor,
        cache: Tensor | None = None,
        causal: bool = True,
        mask: Tensor | None = None,
    ) -> Tensor:
        """x [B, g, dim] -> [B, g, dim]; the others as in ``RotaryAttention``."""
        x = x + self.attention(self.attention_norm(x), rotations, cache, causal, mask)
        return x + self.feed_forward(self.ffn_norm(x))


class ClassEmbedding(nn.Module):
    """Labels [B] -> the condition token [B, 1, dim]; row ``classes`` is the null class."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(config.classes + 1, config.dim)

    def forward(self, condition: Condition) -> Tensor:
        """TypeError for what is no ``Labels``."""
        return self.embedding_table(labels_of(condition))[:, None]

    def null(self, condition: Condition) -> Labels:
        """The null class for as many images."""
        return Labels(torch.full_like(labels_of(condition), self.embedding_table.num_embeddings - 1))

    def pooled(self, embedded: Tensor, condition: Condition) -> Tensor:
        """What stands for a whole condition: of a class its only token, ``embedded`` [B, 1, dim] itself."""
        return embedded


class LlamaNetwork(nn.Module):
    """The transformer of the teacher, with the official initialisation: normal matrices and a zero head."""

    cls_embedding: ClassEmbedding | CaptionEmbedding

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        if config.caption_dim:
            null = torch.randn(config.caption_length, config.caption_dim) / config.caption_dim**0.5
            self.cls_embedding = CaptionEmbedding(config, null)
        else:
            self.cls_embedding = ClassEmbedding(config)
        self.tok_embeddings = nn.Embedding(config.vocabulary, config.dim)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.dim)
        self.output = nn.Linear(config.dim, config.vocabulary, bias=False)
        self.float16 = Float16()
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=INIT_STD)
        nn.init.zeros_(self.output.weight)

    def to_float16(self) -> None:
        """Have the layers compute in float16."""
        layers = cast("list[Layer]", list(self.layers))
        self.float16.switch_on(part for layer in layers for part in (layer.attention, layer.feed_forward))

    def embed(self, conditions: Sequence[Condition], codes: Tensor) -> Tensor:
        """Conditions of B samples each and their first m codes [B, m] -> inputs [copies * B, T + m, dim].

        Raises TypeError and ValueError for conditions that are not this network's.
        """
        given = torch.cat([self.cls_embedding(condition) for condition in conditions])
        return torch.cat([given, self.tok_embeddings(codes).repeat(len(conditions), 1, 1)], dim=1)

    def forward(self, condition: Condition, codes: Tensor) -> Tensor:
        """Condition of B samples, codes [B, n] -> logits [B, n, V]; the last code is not looked at."""
        h = self.embed([condition], codes[:, :-1])
        conditions, mask = positions(condition), sequence_mask(condition, codes.shape[1] - 1)
        rotations = rotary(self.config, h.device, conditions)[: h.shape[1]]
        with self.float16.region(h.device):
            for layer in self.layers:
                h = layer(h, rotations, mask=mask)
        return self.output(self.norm(self.float16.watched(h)[:, conditions - 1 :]))

    def cache(self, batch: int, length: int) -> Tensor:
        """Room for the keys and values of ``length`` positions: [layers, 2, B, heads, length, D]."""
        config = self.config
        shape = (config.layers, 2, batch, config.heads, length, config.dim // config.heads)
        return cast("Layer", self.layers[0]).attention.wo.weight.new_empty(shape)

    def extend(self, h: Tensor, rotations: Tensor, cache: Tensor, start: int, mask: Tensor | None = None) -> Tensor:
        """Inputs [B, g, dim] of the positions from ``start`` on -> logits [B, 1, V] float32 of the last.

        ``mask`` [B, 1, g, start + g] is added to their attention logits.
        """
        end = start + h.shape[1]
        # The layers are told where they are by the length of what they see, not by a number that
        # torch.compile would take for a constant.
        with self.float16.region(h.device):
            for layer, keys_values in zip(self.layers, cache[..., :end, :], strict=True):
                h = layer(h, rotations, keys_values, causal=h.shape[1] > 1, mask=mask)
        return self.output(self.norm(self.float16.watched(h)[:, -1:])).float()
