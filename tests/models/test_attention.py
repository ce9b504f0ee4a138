"""The plain bfloat16 path against torch's attention in float32."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.models import attention, convnet
from pipeline.models.attention import attend


@pytest.fixture
def qkv() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, 9, 8, generator=generator) for _ in range(3)]


@pytest.mark.parametrize("kind", ["open", "mask", "causal"])
@pytest.mark.parametrize("scale", [None, 1.0])
def test_training_in_bfloat16_is_attention_forward_and_backward(
    qkv: list[Tensor], kind: str, scale: float | None
) -> None:
    mask = torch.zeros(1, 1, 9, 9).masked_fill(torch.ones(9, 9).triu(2) > 0, -math.inf) if kind == "mask" else None
    exact = [x.bfloat16().float().requires_grad_() for x in qkv]
    rounded = [x.detach().bfloat16().requires_grad_() for x in exact]
    expected = F.scaled_dot_product_attention(*exact, attn_mask=mask, is_causal=kind == "causal", scale=scale)
    found = attend(*rounded, mask, causal=kind == "causal", scale=scale)
    assert found.dtype == torch.bfloat16
    assert torch.allclose(found.float(), expected, atol=0.03)
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    (expected * weight).sum().backward()
    (found * weight).sum().backward()
    for x, y in zip(exact, rounded, strict=True):
        assert x.grad is not None
        assert y.grad is not None
        assert (x.grad - y.grad.float()).norm() < 0.02 * x.grad.norm()


def test_the_plain_path_is_for_bfloat16_training_alone(qkv: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    plain = attention._plain
    monkeypatch.setattr(attention, "_plain", lambda *args: calls.append(1) or plain(*args))
    attend(*qkv)
    with torch.no_grad():
        attend(*(x.bfloat16() for x in qkv))
    assert not calls
    attend(*(x.bfloat16() for x in qkv))
    with torch.autocast("cpu", torch.bfloat16):
        q, k, v = qkv
        assert attend(q, k, v.bfloat16()).dtype == torch.bfloat16, "autocast leaves normalised q and k in float32"
    assert len(calls) == 2


@pytest.mark.parametrize("block", [convnet.FusedAttention, convnet.SplitAttention])
def test_the_tokenizers_attention_is_laid_out_for_fused_kernels(
    block: type[nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They refuse channels that do not lie side by side; the numbers are those of the formula."""
    net, x = block(32), torch.randn(2, 32, 3, 3)
    seen: list[Tensor] = []

    def formula(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen.extend((q, k, v))
        return (q @ k.mT / 32**0.5).softmax(-1) @ v

    fused = net(x)
    monkeypatch.setattr(convnet.F, "scaled_dot_product_attention", formula)
    torch.testing.assert_close(fused, net(x))
    assert len(seen) == 3
    assert all(part.is_contiguous() and part.shape == (2, 1, 9, 32) for part in seen)
