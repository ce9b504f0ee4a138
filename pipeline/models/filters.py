"""What both families' top-k and top-p share: only the codes that top-k leaves are sorted, 900 of VAR's 4,096."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

ROOM = 64  # codes beyond k, for ties with the k-th; multiples of it leave the sums of a softmax as they are


class Ranked(NamedTuple):
    """What top-k leaves of logits [..., V]: W of them in order [..., W], their places in the codebook [..., W].

    W is V or a little more than k; -inf fills it up. ``ties`` [..., 1] more are left, for which there was no room; each
    is equal to the ``least`` [..., 1].
    """

    logits: Tensor
    places: Tensor
    least: Tensor
    ties: Tensor


def top_k(logits: Tensor, k: int) -> Tensor:
    """Logits [..., V] with -inf for codes below the k-th largest; ties with it stay, and 0 leaves all codes."""
    if not 0 < k < logits.shape[-1]:
        return logits
    return logits.masked_fill(logits < _least(logits, k), -torch.inf)


def ranked(logits: Tensor, k: int, descending: bool) -> Ranked:
    """The codes that ``top_k`` leaves, in order; torch.sort decides about equal ones."""
    size, width = logits.shape[-1], (k // ROOM + 2) * ROOM
    if not 0 < k < size or width >= size:
        logits = top_k(logits, k)
        none = logits.new_zeros(*logits.shape[:-1], 1)
        return Ranked(*logits.sort(dim=-1, descending=descending), none, none)
    block, places = logits.topk(width, sorted=False)
    ordered, order = block.sort(dim=-1, descending=descending)
    least = ordered[..., k - 1 : k] if descending else ordered[..., width - k : width - k + 1]
    ties = ((logits >= least).sum(-1, keepdim=True) - width).clamp_min(0)
    return Ranked(ordered.masked_fill(ordered < least, -torch.inf), places.gather(-1, order), least, ties.to(logits))


def _least(logits: Tensor, k: int) -> Tensor:
    return logits.topk(k, sorted=False).values.amin(-1, keepdim=True)


def keep(logits: Tensor, found: Ranked, gone: Tensor, ties: Tensor) -> Tensor:
    """Logits [..., V] with -inf for all but those of ``found`` that are not ``gone`` [..., W], and some of its ties.

    Of those, the first ``ties`` [..., 1] in the codebook stay.
    """
    kept = torch.full_like(logits, -torch.inf).scatter(-1, found.places, found.logits.masked_fill(gone, -torch.inf))
    if found.places.shape[-1] == logits.shape[-1]:
        return kept
    outside = (logits == found.least).scatter(-1, found.places, False)
    return kept.where(~outside | (outside.cumsum(-1, dtype=torch.int32) > ties), logits)
