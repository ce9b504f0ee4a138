"""LlamaGen as a teacher: one token per AR step in raster order, with guidance, filter and a cache."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.host.errors import Refused
from pipeline.models import base, filters
from pipeline.models.conditions import Captions, Condition
from pipeline.models.graphs import eagerly
from pipeline.models.llamagen.captions import caption_columns, caption_mask, positions
from pipeline.models.llamagen.config import Config
from pipeline.models.llamagen.tokenizer import Tokenizer
from pipeline.models.llamagen.transformer import LlamaNetwork, rotary
from pipeline.settings.teacher import Filter


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

        The label ``layout.classes`` is the null class: training drops a label by replacing it with that, and a caption
        by what ``network.cls_embedding.null`` makes of it.
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
        batch, net = len(condition), self.network
        codes = torch.empty(batch, end - 1, dtype=torch.long, device=self.codebook.device)
        if prefix is not None:
            codes[:, : first - 1] = prefix
        halves = [condition, net.cls_embedding.null(condition)][: self.copies(first)]
        beginning = net.embed(halves, codes[:, : first - 1])

        def whole() -> RasterPass:
            return RasterPass(self, condition, self.layout.length)

        recording = self.recording(batch, whole, positions(condition)) if first == 1 else None
        sequence = recording.memory if recording else RasterPass(self, condition, end - 1, first)
        if recording:
            sequence.restart(condition)
        draw = recording or eagerly
        for t in range(first, end):
            if t == first:
                log_p = draw(t, sequence.begin, beginning)
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
    """One generation on its way through the network, AR step after AR step: its cache, its rotations, its mask.

    ``columns`` [copies * B, 1, 1, L] say which positions captions fill (``caption_columns``); of classes they are None.
    """

    def __init__(self, teacher: Teacher, condition: Condition, length: int, first: int = 1) -> None:
        """Room for ``length`` codes of every image of ``condition``, drawn from AR step ``first`` on."""
        self.teacher, self.network, self.batch = teacher, teacher.network, len(condition)
        self.conditions, self.length, self.copies = positions(condition), length, teacher.copies(first)
        self.cache = self.network.cache(self.copies * self.batch, self.conditions + length)
        self.rotations = rotary(teacher.config, self.cache.device, self.conditions)
        self.columns = self._columns(condition)

    def restart(self, condition: Condition) -> None:
        """Other conditions, as many and as long, in the memory of the former ones: where graphs look for them."""
        columns = self._columns(condition)
        if self.columns is not None and columns is not None:
            self.columns.copy_(columns)

    def _columns(self, condition: Condition) -> Tensor | None:
        if not isinstance(condition, Captions):
            return None
        return caption_columns(condition, self.length).repeat(self.copies, 1, 1, 1)

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
            self.network.float16.watch(self.cache[:, 0, rows, :, : self.conditions - 1 + last])

    def _draw(self, t: int, h: Tensor) -> Tensor:
        # In the step after guidance ends the unconditional half is left behind.
        here, rows = self.conditions - 1 + t, len(h)
        start = here - h.shape[1]
        mask = None if self.columns is None else self.columns[:rows, ..., :here]
        if mask is not None and start == 0:
            mask = caption_mask(mask)  # later on, a single token comes, which sees all that are filled
        logits = self.network.extend(h, self.rotations[start:here], self.cache[:, :, :rows], start, mask)
        if rows == 2 * self.batch:
            cond, uncond = logits.chunk(2)
            logits = torch.lerp(uncond, cond, self.teacher.filter.guidance)
        return log_probabilities(logits, self.teacher.filter)
