"""The LlamaGen transformer (arXiv 2406.06525): a Llama over tokens in raster order, given a class or a caption.

The sequence is T condition positions (1 for a class, 120 for a caption), then token 0 .. token n - 2; position
T - 1 + i predicts token i. Attribute names and their order
are those of the official files (``c2i_B_256.pt``), whose rotary table is not stored. The official training
dropout (0.1) is left out: a teacher is used in eval mode, and the small one of the embedded default is
trained without.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.host.errors import Refused
from pipeline.models import base, filters
from pipeline.models.attention import attend
from pipeline.models.conditions import Captions, Condition, Labels, labels_of
from pipeline.models.float16 import Float16
from pipeline.models.graphs import eagerly
from pipeline.models.llamagen.captions import CaptionEmbedding, caption_mask
from pipeline.models.llamagen.config import Config
from pipeline.models.llamagen.tokenizer import Tokenizer
from pipeline.settings.teacher import Filter

INIT_STD = 0.02  # of every matrix and table of the official initialisation


def rotary(config: Config, device: torch.device) -> Tensor:
    """Rotations [T + n, D / 2, 2] of the T condition positions and every token, D channels per head: cosine and sine.

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
    return F.pad(rotations, (0, 0, 0, 0, config.conditions, 0))


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

    def forward(self, labels: Tensor) -> Tensor:
        return self.embedding_table(labels)[:, None]


class LlamaNetwork(nn.Module):
    """The transformer of the teacher, with the official initialisation: normal matrices and a zero head."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        caption = (config.caption_length, config.caption_dim, config.dim)
        self.cls_embedding = CaptionEmbedding(*caption) if config.caption_dim else ClassEmbedding(config)
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

    def null(self, condition: Condition) -> Condition:
        """What the unconditional half of guidance is given instead."""
        if isinstance(condition, Captions):
            return cast("CaptionEmbedding", self.cls_embedding).null(condition)
        return Labels(torch.full_like(labels_of(condition), self.config.classes))

    def embed(self, conditions: Sequence[Condition], codes: Tensor) -> Tensor:
        """Conditions of B samples each and their first m codes [B, m] -> inputs [copies * B, T + m, dim]."""
        given = [self.cls_embedding(c if isinstance(c, Captions) else labels_of(c)) for c in conditions]
        tokens = self.tok_embeddings(codes).repeat(len(given), 1, 1)
        return torch.cat([torch.cat(given), tokens], dim=1)

    def forward(self, condition: Condition, codes: Tensor) -> Tensor:
        """Condition of B samples, codes [B, n] -> logits [B, n, V]; the last code is not looked at."""
        h = self.embed([condition], codes[:, :-1])
        rotations = rotary(self.config, h.device)[: h.shape[1]]
        mask = caption_mask(condition, codes.shape[1] - 1) if isinstance(condition, Captions) else None
        with self.float16.region(h.device):
            for layer in self.layers:
                h = layer(h, rotations, mask=mask)
        return self.output(self.norm(self.float16.watched(h)[:, self.config.conditions - 1 :]))

    def cache(self, batch: int, length: int) -> Tensor:
        """Room for keys and values of ``length`` tokens and the condition: [layers, 2, B, heads, T + length, D]."""
        config = self.config
        shape = (config.layers, 2, batch, config.heads, config.conditions + length, config.dim // config.heads)
        return cast("Layer", self.layers[0]).attention.wo.weight.new_empty(shape)

    def extend(self, h: Tensor, rotations: Tensor, cache: Tensor, start: int, mask: Tensor | None = None) -> Tensor:
        """Inputs [B, g, dim] of the positions from ``start`` on -> logits [B, 1, V] float32 of the last.

        ``mask`` [B, 1, L, L] is that of the whole sequence.
        """
        end = start + h.shape[1]
        if mask is not None:
            mask = mask[:, :, start:end, :end]
        # The layers are told where they are by the length of what they see, not by a number that
        # torch.compile would take for a constant.
        with self.float16.region(h.device):
            for layer, keys_values in zip(self.layers, cache[..., :end, :], strict=True):
                h = layer(h, rotations, keys_values, causal=h.shape[1] > 1, mask=mask)
        return self.output(self.norm(self.float16.watched(h)[:, -1:])).float()


def log_probabilities(logits: Tensor, filter: Filter) -> Tensor:
    """LlamaGen's temperature, top-k and top-p: logits [..., V] float32 -> log p [..., V], -inf where p is 0.

    Top-k keeps ties with the k-th. Top-p keeps the most probable codes up to and including the one with which
    their sum exceeds ``top_p``; among equals torch.sort's order decides, as in the official code.
    """
    if filter.temperature != 1:
        logits = logits / max(filter.temperature, 1e-5)
    if filter.top_p == 1:
        return filters.top_k(logits, filter.top_k).log_softmax(-1)
    found = filters.ranked(logits, filter.top_k, descending=True)
    p = found.logits.softmax(-1)
    p = p / (1 + found.ties * p[..., -1:])  # as if the ties beyond the order stood behind it
    sums = p.cumsum(-1)
    gone = F.pad(sums[..., :-1] > filter.top_p, (1, 0))
    ties = ((filter.top_p - sums[..., -1:]) / p[..., -1:]).floor().add(1).clamp_min(0).minimum(found.ties)
    return filters.keep(logits, found, gone, ties).log_softmax(-1)


class Teacher(base.Teacher):
    """A LlamaGen model with its tokenizer.

    Guided logits are uncond + guidance * (cond - uncond); with guidance 1 the unconditional half is not
    computed. Below 1 the formula would weaken the condition, while the official code silently leaves guidance
    out: such a filter is refused with a ValueError.
    """

    network: LlamaNetwork

    def __init__(self, config: Config, filter: Filter) -> None:
        if filter.guidance < 1:
            raise Refused(
                f"teacher.filter.guidance is {filter.guidance}; for LlamaGen 1 means none, so give 1 or more."
            )
        super().__init__()
        self.config = config
        self.layout = config.layout
        self.caption = config.caption
        self.filter = filter
        self.network = LlamaNetwork(config)
        self.tokenizer = Tokenizer(config)

    def forward(self, condition: Condition, codes: Tensor) -> Tensor:
        """Teacher-forced logits [B, n, V] in the network's dtype, without guidance or filter; codes [B, n].

        The label ``layout.classes`` is the null class: training drops a label by replacing it with that.
        """
        return self.network(condition, codes)

    @torch.no_grad()
    def generate(
        self,
        condition: Condition,
        choose: base.Choose,
        prefix: Tensor | None = None,
        stop: int | None = None,
    ) -> Tensor:
        """See ``base.Teacher.generate``; a prefix goes through the network in one causal pass."""
        first, end = self.span(prefix, stop)
        batch = len(condition)
        codes = torch.empty(batch, end - 1, dtype=torch.long, device=self.codebook.device)
        if prefix is not None:
            codes[:, : first - 1] = prefix
        # No job draws from captions, so their masks need no place in a recording.
        recorded = first == 1 and isinstance(condition, Labels)
        recording = self.recording(batch, lambda: RasterPass(self, batch, self.layout.length)) if recorded else None
        sequence = recording.memory if recording else RasterPass(self, batch, end - 1, first, condition)
        draw = recording or eagerly
        halves = [condition, self.network.null(condition)][: self.copies(first)]
        for t in range(first, end):
            if t == first:
                log_p = draw(t, sequence.begin, self.network.embed(halves, codes[:, : t - 1]))
            else:
                log_p = draw(t, sequence.follow, codes[:, t - 2 : t - 1])
            codes[:, t - 1 : t] = choose(t, log_p)
        sequence.watch(first, end)
        return codes

    def copies(self, t: int) -> int:
        """Sequences per image in AR step t: two where it is guided, conditional ones first.

        Without an interval all steps are, else the first and K + 1 after it.
        """
        last = self.config.guidance_interval
        return 2 if self.filter.guidance != 1 and (last < 0 or t <= last + 2) else 1


class RasterPass:
    """One generation on its way through the network, AR step after AR step: its cache, its rotations, its mask."""

    def __init__(
        self, teacher: Teacher, batch: int, length: int, first: int = 1, condition: Condition | None = None
    ) -> None:
        """Room for ``length`` codes of ``batch`` images, drawn from AR step ``first`` on."""
        self.teacher, self.network, self.batch = teacher, teacher.network, batch
        copies = teacher.copies(first)
        self.cache = self.network.cache(copies * batch, length)
        self.rotations = rotary(teacher.config, self.cache.device)
        self.mask = None
        if isinstance(condition, Captions):
            self.mask = caption_mask(condition, length - 1).repeat(copies, 1, 1, 1)

    def begin(self, t: int, h: Tensor) -> Tensor:
        """AR step t from the inputs [copies * B, g, dim] of all positions up to its own -> log p [B, 1, V]."""
        return self._draw(t, h)

    def follow(self, t: int, codes: Tensor) -> Tensor:
        """AR step t from the codes [B, 1] of the one before -> log p [B, 1, V]."""
        return self._draw(t, self.network.tok_embeddings(codes).repeat(self.teacher.copies(t), 1, 1))

    def watch(self, first: int, end: int) -> None:
        """Have ``Float16`` look at the keys that AR steps first .. end - 1 left: a replay did not run any Python."""
        for half in range(self.teacher.copies(first) if first < end else 0):
            last = max(t for t in range(first, end) if self.teacher.copies(t) > half)
            rows = slice(half * self.batch, (half + 1) * self.batch)
            self.network.float16.watch(self.cache[:, 0, rows, :, : self.teacher.config.conditions - 1 + last])

    def _draw(self, t: int, h: Tensor) -> Tensor:
        # In the step after guidance ends the unconditional half is left behind.
        here, rows = self.teacher.config.conditions - 1 + t, len(h)
        start = here - h.shape[1]
        mask = None if self.mask is None else self.mask[:rows]
        logits = self.network.extend(h, self.rotations[start:here], self.cache[:, :, :rows], start, mask)
        if rows == 2 * self.batch:
            cond, uncond = logits.chunk(2)
            logits = torch.lerp(uncond, cond, self.teacher.filter.guidance)
        return log_probabilities(logits, self.teacher.filter)
