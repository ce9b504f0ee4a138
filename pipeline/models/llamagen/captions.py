"""What text-to-image LlamaGen is conditioned on: the features of a caption, left-padded, before the tokens.

The text encoder itself (FLAN-T5-XL, the last hidden state of its encoder) is not here; its output comes in as a tensor.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.models.conditions import Captions


def caption_mask(captions: Captions, tokens: int) -> Tensor:
    """Added to attention logits over the captions and then ``tokens`` tokens: float [B, 1, T + tokens, T + tokens].

    A position sees itself, and of the earlier ones the tokens and the filled places of the caption.
    """
    batch, positions = captions.valid.shape
    seen = torch.cat([captions.valid, captions.valid.new_ones(batch, tokens)], dim=1)[:, None, None]
    length = positions + tokens
    earlier = torch.ones(length, length, dtype=torch.bool, device=seen.device).tril()
    itself = torch.eye(length, dtype=torch.bool, device=seen.device)
    return torch.zeros(batch, 1, length, length, device=seen.device).masked_fill(~(earlier & seen | itself), -math.inf)


class Projection(nn.Module):
    """fc2(GELU(fc1 x)), GELU in its tanh form, without biases: what is zero stays zero."""

    def __init__(self, inside: int, outside: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(inside, outside, bias=False)
        self.fc2 = nn.Linear(outside, outside, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class CaptionEmbedding(nn.Module):
    """Captions -> the condition tokens [B, T, dim]. ``uncond_embedding`` [T, D] is the null caption, not trained."""

    uncond_embedding: Tensor

    def __init__(self, positions: int, caption_dim: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("uncond_embedding", torch.randn(positions, caption_dim) / caption_dim**0.5)
        self.cap_proj = Projection(caption_dim, dim)

    def forward(self, captions: Captions) -> Tensor:
        return self.cap_proj(captions.features.to(self.uncond_embedding.dtype))

    def null(self, captions: Captions) -> Captions:
        """The null caption for as many images; their mask stays, as in the official code."""
        return Captions(self.uncond_embedding.expand(len(captions), -1, -1), captions.valid)
