"""Top-p among the codes that top-k leaves, against a sort of the whole codebook."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.models.filters import ROOM
from pipeline.models.llamagen.teacher import log_probabilities
from pipeline.models.var.teacher import filtered
from pipeline.settings.teacher import Filter

Rule = Callable[[Tensor, Filter], Tensor]


def top_k(logits: Tensor, filter: Filter) -> Tensor:
    if not 0 < filter.top_k < logits.shape[-1]:
        return logits
    return logits.masked_fill(logits < logits.topk(filter.top_k).values[..., -1:], -torch.inf)


def slow_var(logits: Tensor, filter: Filter) -> Tensor:
    """From the least likely up, what sums up to 1 - p at most goes."""
    logits = top_k(logits / filter.temperature, filter)
    ascending, order = logits.sort(stable=True)
    gone = ascending.softmax(-1).cumsum(-1) <= 1 - filter.top_p
    gone[..., -1] = False
    return logits.masked_fill(torch.zeros_like(gone).scatter(-1, order, gone), -torch.inf).log_softmax(-1)


def slow_llamagen(logits: Tensor, filter: Filter) -> Tensor:
    """From the most likely down, what comes after a sum above p goes."""
    logits = top_k(logits / filter.temperature, filter)
    descending, order = logits.sort(descending=True, stable=True)
    gone = F.pad(descending.softmax(-1).cumsum(-1)[..., :-1] > filter.top_p, (1, 0))
    return logits.masked_fill(torch.zeros_like(gone).scatter(-1, order, gone), -torch.inf).log_softmax(-1)


RULES = pytest.mark.parametrize(("fast", "slow"), [(filtered, slow_var), (log_probabilities, slow_llamagen)])
SIZES = pytest.mark.parametrize(("vocabulary", "k"), [(24, 0), (24, 9), (24, 23), (1000, 1), (1024, 0), (4096, 900)])


@RULES
@SIZES
@pytest.mark.parametrize("p", [0.01, 0.5, 0.95, 0.9999])
def test_the_same_bit_for_bit(fast: Rule, slow: Rule, vocabulary: int, k: int, p: float) -> None:
    """In float32; and rounded to bfloat16, where codes are equal at the border, as many of each probability."""
    logits = 3 * torch.randn(60, vocabulary, generator=torch.Generator().manual_seed(vocabulary + k))
    for temperature in (1.0, 0.8):
        filter = Filter(temperature=temperature, top_k=k, top_p=p)
        assert torch.equal(fast(logits, filter), slow(logits, filter))
        found, expected = (rule(logits.bfloat16().float(), filter) for rule in (fast, slow))
        assert torch.equal(found.exp() > 0, found > -torch.inf)
        assert torch.equal((found > -torch.inf).sum(-1), (expected > -torch.inf).sum(-1))
        torch.testing.assert_close(found.sort().values, expected.sort().values, atol=1e-6, rtol=0)


@RULES
@pytest.mark.parametrize("p", [0.01, 0.3, 0.95])
def test_more_ties_than_there_is_room_for(fast: Rule, slow: Rule, p: float) -> None:
    """Hundreds of codes as likely as the k-th: one of them more or less may stay, for their sum is a product here."""
    logits = torch.randint(0, 3, (60, 1000), generator=torch.Generator().manual_seed(1)).float()
    for given in (logits, torch.zeros(2, 1000)):
        filter = Filter(top_k=9, top_p=p)
        found, expected = fast(given, filter), slow(given, filter)
        assert ((given >= given.topk(9).values[..., -1:]).sum(-1) > 9 + 2 * ROOM).all()
        counts = [(log_p > -torch.inf).sum(-1) for log_p in (found, expected)]
        assert (counts[0] - counts[1]).abs().max() <= 1
        assert found.exp().sum(-1).allclose(torch.ones(len(given)))
        lost = (found == -torch.inf) & (expected > -torch.inf)
        assert (given.where(lost, -9).amax(-1) <= given.where(found > -torch.inf, 9).amin(-1)).all(), "the least go"


@RULES
def test_only_what_top_k_leaves_is_sorted(fast: Rule, slow: Rule, monkeypatch: pytest.MonkeyPatch) -> None:
    sort, sizes = Tensor.sort, []
    monkeypatch.setattr(Tensor, "sort", lambda x, *a, **kw: sizes.append(x.shape[-1]) or sort(x, *a, **kw))
    fast(torch.randn(2, 4096), Filter(top_k=900, top_p=0.95))
    assert sizes == [1024]
