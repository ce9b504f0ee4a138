"""What text-to-image LlamaGen is conditioned on: the features of a caption, left-padded, before the tokens.

The text encoder itself (FLAN-T5-XL, the last hidden state of its encoder) is not here; its output comes in as
``Captions``. Their T positions may be fewer than the network was made for, as long as the longest caption of the batch
has room: no token sees the padding, and the positions turn nothing (``rotary``), so the answer is the same for less
work.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.host.errors import Refused
from pipeline.models.conditions import Captions, Condition
from pipeline.models.llamagen.config import Config


def positions(condition: Condition) -> int:
    """Positions before the first token: 1 of a class, T of captions."""
    return condition.features.shape[1] if isinstance(condition, Captions) else 1


def caption_columns(captions: Captions, tokens: int) -> Tensor:
    """What a token adds to its attention logits: float [B, 1, 1, T + tokens], -inf for padding and 0 elsewhere."""
    seen = F.pad(captions.valid, (0, tokens), value=True)[:, None, None]
    return torch.zeros(seen.shape, device=seen.device).masked_fill(~seen, -math.inf)


def caption_mask(columns: Tensor) -> Tensor:
    """Added to attention logits by all positions of ``columns`` [B, 1, 1, L]: float [B, 1, L, L].

    A position sees itself, and of the earlier ones the tokens and the filled places of the caption.
    """
    length, device = columns.shape[-1], columns.device
    later = torch.ones(length, length, dtype=torch.bool, device=device).triu(1)
    itself = torch.eye(length, dtype=torch.bool, device=device)
    return columns.masked_fill(later, -math.inf).masked_fill(itself, 0)


def sequence_mask(condition: Condition, tokens: int) -> Tensor | None:
    """``caption_mask`` of captions and ``tokens`` tokens; None of classes, where attention is merely causal."""
    return caption_mask(caption_columns(condition, tokens)) if isinstance(condition, Captions) else None


class Projection(nn.Module):
    """fc2(GELU(fc1 x)), GELU in its tanh form, without biases: what is zero stays zero."""

    def __init__(self, inside: int, outside: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(inside, outside, bias=False)
        self.fc2 = nn.Linear(outside, outside, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class CaptionEmbedding(nn.Module):
    """Captions -> the condition tokens [B, T, dim]. ``uncond_embedding`` is the null caption, which is not trained."""

    uncond_embedding: Tensor

    def __init__(self, config: Config, null: Tensor) -> None:
        """``null`` [caption_length, caption_dim] is what ``uncond_embedding`` holds until weights are loaded."""
        super().__init__()
        self.register_buffer("uncond_embedding", null)
        self.cap_proj = Projection(config.caption_dim, config.dim)

    def forward(self, condition: Condition) -> Tensor:
        """TypeError for what is no ``Captions``, Refused (ValueError) for captions of another shape."""
        return self.cap_proj(self._checked(condition).features.to(self.cap_proj.fc1.weight.dtype))

    def null(self, condition: Condition) -> Captions:
        """The null caption for as many images: its last T positions. Their mask stays, as in the official code."""
        captions = self._checked(condition)
        null = self.uncond_embedding[-positions(captions) :]
        return Captions(null.expand(len(captions), -1, -1), captions.valid)

    def pooled(self, embedded: Tensor, condition: Condition) -> Tensor:
        """The mean of the filled places of ``embedded`` [B, T, dim] -> [B, 1, dim] float32."""
        filled = self._checked(condition).valid[..., None]
        return embedded.float().masked_fill(~filled, 0).sum(1, keepdim=True) / filled.sum(1, keepdim=True)

    def _checked(self, condition: Condition) -> Captions:
        if not isinstance(condition, Captions):
            raise TypeError(
                f"this network draws captions and was given {type(condition).__name__}; give it Captions, which a text"
                " encoder makes of prompts."
            )
        length, width = self.uncond_embedding.shape
        if condition.features.shape[2] != width:
            raise Refused(
                f"captions have features of width {condition.features.shape[2]}, and the network takes {width}"
                " (teacher.config.caption_dim); encode them with the text encoder that it was trained with."
            )
        if not 1 <= positions(condition) <= length:
            raise Refused(
                f"captions fill {positions(condition)} positions, and the network has 1 to {length}"
                f" (teacher.config.caption_length); cut prompts to {length} tokens when they are encoded."
            )
        return condition
