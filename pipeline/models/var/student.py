"""The Distilled Decoding student of a VAR: all scales in one pass (App. C).

A VAR whose sequence begins with a class token of its own, followed by the n tokens, each a code or noise. A
position reads and predicts its own token. An embedding tells noise from data, in every block again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.host.errors import Refused
from pipeline.models import base
from pipeline.models.base import Prediction, answer
from pipeline.models.conditions import Condition, labels_of
from pipeline.models.var.config import Config
from pipeline.models.var.teacher import Teacher
from pipeline.models.var.transformer import Transformer, draw, initialise, modulated


class Student(Transformer, base.Student):
    """F_theta with fresh weights, from ``generator`` if there is one; ``codebook`` [V, C] is the tokenizer's.

    ``mask``: "released" lets a token see the class, the earlier scales and itself, as the released code does;
    "paper" lets it see its scale mates too, as App. C says. A file that holds another mask replaces this one.
    """

    released = (("trainer", "ema_parameters"), ("trainer", "var_wo_ddp"))
    settings = ("mask",)

    def __init__(
        self,
        config: Config,
        codebook: Tensor,
        mask: Literal["released", "paper"] = "released",
        generator: torch.Generator | None = None,
    ) -> None:
        if mask not in MASKS:
            raise Refused(f"the student's mask is {mask!r}; it must be one of {', '.join(MASKS)}.")
        super().__init__(config, (1, *config.patch_nums), MASKS[mask])
        self.layout = config.layout
        self.n_d_embed = nn.Embedding(2, config.width)  # row 0 is noise, row 1 is data
        self.layerwise_n_d_embed = nn.ModuleList(nn.Linear(config.width, config.width) for _ in range(config.depth + 1))
        self.final_layer_conti = EmbeddingHead(config.width, config.code_dim)
        self.register_buffer("codebook", codebook.detach().clone(), persistent=False)
        initialise(self, generator)

    @classmethod
    def from_teacher(cls, teacher: Teacher, seed: int, mask: Literal["released", "paper"] = "released") -> Student:
        """A student that starts from the teacher's weights; ``seed`` determines the new ones.

        The class token takes the teacher's first position and level, which held the class there; the token of
        the first scale, which has none in the teacher, gets a fresh row of each. (The official routine draws a
        row of the class embedding anew instead of that level's.) The layer-wise embeddings start at zero, so
        the copied blocks begin undisturbed; the noise-data embedding and the embedding head start at random.
        """
        generator = torch.Generator().manual_seed(seed)
        with torch.device("meta"):  # every parameter is given below; loading strictly proves it
            student = cls(teacher.config, teacher.codebook, mask)
        known, state = teacher.network.state_dict(), student.state_dict()
        for name, weight in student.named_parameters():
            # All are drawn, one after the other: how often a cut normal asks the generator depends on what it gets, so
            # the new weights would be others if the teacher's were passed over.
            state[name] = draw(student, name, torch.empty(weight.shape), generator)
            if name in ("pos_1LC", "lvl_embed.weight"):
                rows, old = (x.view(-1, x.shape[-1]) for x in (state[name], known[name]))
                rows[:1], rows[2:] = old[:1], old[1:]
            elif name in known:
                state[name].copy_(known[name])
            elif name.startswith("layerwise_n_d_embed"):
                state[name].zero_()
        student.load_state_dict(state, assign=True)
        return student.to(teacher.codebook.device)

    def heads(self) -> tuple[tuple[nn.Module, ...], tuple[nn.Module, ...]]:
        return (self.head, self.head_nm), (self.final_layer_conti,)

    def forward(self, x_t: Tensor, t: Tensor, condition: Condition) -> Prediction:
        """As base.Student; embeddings have the dtype of the weights or of autocast."""
        c = self.class_emb(labels_of(condition))
        # The class has level 0 and the tokens of AR step t level t, so data is what lies below t: [B, n + 1].
        data = (self.lvl_1L < t[:, None]).long()
        tokens = self.word_embed(x_t.to(self.word_embed.weight.dtype))
        x = torch.cat([(c[:, None] + self.pos_start).to(tokens.dtype), tokens], dim=1)
        x = x + self.positions() + self.n_d_embed(data)
        # e has two values: the layer-wise linears run on these two rows, and every position picks its own.
        added = [linear(self.n_d_embed.weight) for linear in self.layerwise_n_d_embed]
        for block, by, rows in zip(self.layers, self.modulations(c), added[:-1], strict=True):
            x = block(x, by, self.attn_bias_for_masking, between=F.embedding(data, rows))
        h = (x + F.embedding(data, added[-1]))[:, 1:]
        logits = answer(self.head, modulated(h, *self.head_nm.modulation(c)))
        return Prediction(logits, self.final_layer_conti(h, c))


class EmbeddingHead(nn.Module):
    """h [B, n, D] -> embeddings [B, n, C]: a norm shifted and scaled by a table plus the class embedding."""

    def __init__(self, width: int, code_dim: int) -> None:
        super().__init__()
        self.scale_shift_table = nn.Parameter(torch.zeros(2, width))  # row 0 shifts, row 1 scales
        self.linear = nn.Linear(width, code_dim)

    def forward(self, h: Tensor, c: Tensor) -> Tensor:
        shift, scale = (self.scale_shift_table + c[:, None]).unsqueeze(2).unbind(1)
        return self.linear(modulated(h, 1 + scale, shift))


def _released(query: Tensor, key: Tensor) -> Tensor:
    """Earlier scales and the token itself; from scale numbers [L, 1] and [1, L]."""
    return (query > key) | torch.eye(len(query), dtype=torch.bool, device=query.device)


def _paper(query: Tensor, key: Tensor) -> Tensor:
    """Earlier scales and the token's own."""
    return query >= key


MASKS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"released": _released, "paper": _paper}
