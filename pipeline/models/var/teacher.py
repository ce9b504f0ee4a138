"""VAR as a teacher: all tokens of a scale at once, scale after scale, with guidance, filter and a cache."""

from __future__ import annotations

from itertools import chain

import torch
from torch import Tensor

from pipeline.host.errors import Refused
from pipeline.models import base, filters
from pipeline.models.base import Choose
from pipeline.models.conditions import Condition, labels_of
from pipeline.models.float16 import Float16
from pipeline.models.graphs import eagerly
from pipeline.models.var.config import Config
from pipeline.models.var.tokenizer import Tokenizer
from pipeline.models.var.transformer import Transformer, initialise, modulated
from pipeline.settings.teacher import Filter


class VarNetwork(Transformer):
    """The official VAR transformer: a token sees its own scale and all earlier ones."""

    def __init__(self, config: Config, generator: torch.Generator | None = None) -> None:
        super().__init__(config, config.patch_nums, lambda query, key: query >= key)
        self.float16 = Float16()
        initialise(self, generator)

    def to_float16(self) -> None:
        """Have the blocks compute in float16, but not what the class does to them."""
        layers = ((b.attn.mat_qkv, b.attn.proj, b.ffn.fc1, b.ffn.fc2) for b in self.layers)
        self.float16.switch_on(chain.from_iterable(layers))

    def forward(self, labels: Tensor, inputs: Tensor) -> Tensor:
        """Labels [B] and inputs [B, L - 1, C] of scales 1, 2, ... -> logits [B, L, V]."""
        return ScalePass(self, labels)(inputs)

    def cache(self, batch: int, length: int) -> Tensor:
        """Room for the keys and values of ``length`` positions and one more: [depth, 2, B, H, length + 1, D / H].

        Nothing is written to the last one. With it, what a layer sees is never the whole of its cache, which lies in
        memory in another way than a part, so that torch.compile would make a form of its own for the last AR step.
        """
        weight, heads = self.layers[0].attn.proj.weight, self.layers[0].attn.heads
        return weight.new_empty(len(self.blocks), 2, batch, heads, length + 1, weight.shape[1] // heads)


class ScalePass:
    """One sequence per label on its way through the network, in one call or, with a cache, scale by scale.

    What depends on the class alone is computed once. ``length`` positions are cached; 0 stands for no cache.
    """

    def __init__(self, network: VarNetwork, labels: Tensor, length: int = 0) -> None:
        self.network, self.end = network, 0
        condition = network.class_emb(labels)
        self.start = condition[:, None] + network.pos_start
        self.positions = network.positions()
        self.modulations = network.modulations(condition)
        self.head = network.head_nm.modulation(condition)
        self.cache = network.cache(len(labels), length) if length else None

    def restart(self, labels: Tensor) -> None:
        """Other labels, as many, in the memory of the former ones: where graphs look for them."""
        fresh = ScalePass(self.network, labels)
        for mine, new in zip(self._given(), fresh._given(), strict=True):
            mine.copy_(new)

    def _given(self) -> list[Tensor]:
        """All that depends on the class."""
        return [self.start, *self.head, *chain.from_iterable(self.modulations)]

    def __call__(self, inputs: Tensor, masked: bool = True, last: int = 0) -> Tensor:
        """The next m positions -> their logits [B, m, V], or those of the ``last`` ones only.

        ``inputs`` [B or B / 2, m, C] serve both halves of guidance; in the first call they are m - 1, because
        the start token comes before them. ``masked`` hides later scales from the positions of the first call.
        """
        net = self.network
        x = net.word_embed(inputs.to(net.word_embed.weight.dtype))
        if len(x) != len(self.start):
            x = x.repeat(len(self.start) // len(x), 1, 1)
        if self.end == 0:
            x = torch.cat([self.start.to(x.dtype), x], dim=1)
        begin, self.end = self.end, self.end + x.shape[1]
        x = x + self.positions[:, begin : self.end]
        mask = net.attn_bias_for_masking[..., : self.end, : self.end] if masked and begin == 0 else None
        seen = [None] * len(net.blocks) if self.cache is None else self.cache[..., : self.end, :]
        with net.float16.region(x.device):
            for block, by, cache in zip(net.layers, self.modulations, seen, strict=True):
                x = block(x, by, mask, cache)
        return net.head(modulated(net.float16.watched(x)[:, -last:], *self.head))


class Teacher(base.Teacher):
    """A VAR and its tokenizer. The network starts with fresh weights, from ``generator`` if there is one."""

    tokenizer: Tokenizer
    network: VarNetwork

    def __init__(self, config: Config, filter: Filter, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.config = config
        self.layout = config.layout
        self.filter = filter
        self.tokenizer = Tokenizer(config)
        self.network = VarNetwork(config, generator)

    def forward(self, condition: Condition, codes: Tensor) -> Tensor:
        """Teacher-forced logits [B, n, V] of codes [B, n].

        No label is dropped here, in training or not (the official forward drops them even in evaluation). Who
        trains for guidance replaces labels by the null class, ``layout.classes``.
        """
        known = codes[:, : self.layout.before(self.layout.steps)]  # the last scale's codes are no input
        _, inputs = self.tokenizer.quantize.replay(self.codebook[known])
        return self.network(labels_of(condition), torch.cat(inputs, dim=1))

    @torch.no_grad()
    def generate(
        self, condition: Condition, choose: Choose, prefix: Tensor | None = None, stop: int | None = None
    ) -> Tensor:
        """As base.Teacher: one scale per AR step; guidance runs both halves in one batch."""
        first, end = self.span(prefix, stop)
        labels, layout, quantize = labels_of(condition), self.layout, self.tokenizer.quantize
        if prefix is None:
            prefix = labels.new_empty(len(labels), 0)
        if len(prefix) != len(labels):
            raise Refused(f"the prefix has {len(prefix)} rows for {len(labels)} labels; give one per label.")
        if first == end:
            return prefix
        if self.filter.guidance:
            labels = torch.cat([labels, torch.full_like(labels, layout.classes)])
        whole = layout.before(layout.steps + 1)
        recording = self.recording(len(prefix), lambda: ScalePass(self.network, labels, whole)) if first == 1 else None
        if recording:
            sequence: ScalePass = recording.memory
            sequence.restart(labels)
        else:
            sequence = ScalePass(self.network, labels, layout.before(end))
        f_hat, inputs = quantize.replay(self.codebook[prefix])
        x = torch.cat([self.codebook.new_empty(len(prefix), 0, layout.code_dim), *inputs], dim=1)

        def step(t: int, x: Tensor) -> Tensor:
            sequence.end = layout.before(t) if t > first else 0  # a replay does not count
            # With a prefix, the first pass holds several scales, and only there does a mask say something.
            masked = t == first > 1 and self.config.prefix_mask == "causal"
            logits = sequence(x, masked, layout.groups[t - 1])
            return filtered(guided(logits, self.filter.guidance, t, layout.steps), self.filter)

        draw, codes = recording or eagerly, [prefix]
        for t in range(first, end):
            codes.append(choose(t, draw(t, step, x)))
            if t + 1 < end:
                added = quantize.contribution(self.codebook[codes[-1]], t - 1)
                f_hat = added if f_hat is None else f_hat + added
                x = quantize.next_input(f_hat, t)
        return torch.cat(codes, dim=1)


def guided(logits: Tensor, guidance: float, t: int, steps: int) -> Tensor:
    """(1 + w) cond - w uncond with w = guidance (t - 1) / (steps - 1), float32: AR step 1 is never guided.

    ``logits`` [2 B, g, V] hold the conditional half first; without guidance they are [B, g, V] and only cast.
    """
    logits = logits.float()
    if not guidance:
        return logits
    conditional, unconditional = logits.chunk(2)
    return torch.lerp(unconditional, conditional, 1 + guidance * (t - 1) / (steps - 1))


def filtered(logits: Tensor, filter: Filter) -> Tensor:
    """Logits [..., V] float32 -> log-probabilities after temperature, top-k and top-p; -inf where removed.

    Top-k keeps ties with the k-th. Top-p removes, from the least likely up, every code whose cumulative
    probability is at most 1 - p, but never the most likely one; torch.sort decides which of equal codes goes.
    """
    if filter.temperature != 1:
        logits = logits / filter.temperature
    if filter.top_p == 1:
        return filters.top_k(logits, filter.top_k).log_softmax(-1)
    found = filters.ranked(logits, filter.top_k, descending=False)
    p = found.logits.softmax(-1)
    p = p / (1 + found.ties * p[..., :1])  # as if the ties beyond the order stood before it
    gone = found.ties * p[..., :1] + p.cumsum(-1) <= 1 - filter.top_p
    gone[..., -1].fill_(False)
    ties = found.ties - ((1 - filter.top_p) / p[..., :1]).floor().minimum(found.ties)
    return filters.keep(logits, found, gone, ties).log_softmax(-1)
