"""LPIPS and its weight files."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from pipeline.training import perceptual
from pipeline.training.perceptual import Lpips, trunk_file


def test_a_missing_or_wrong_trunk_is_found_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(ValueError, match=r"alexnet-owt-7be5be79\.pth are missing .* on every machine"):
        Lpips("alex")
    wrong = tmp_path / "hub" / "checkpoints" / perceptual.TRUNKS["alex"]
    wrong.parent.mkdir(parents=True)
    wrong.write_bytes(b"another file of that name")
    with pytest.raises(ValueError, match="damaged or another file"):
        trunk_file("alex")


@pytest.mark.parametrize("kind", ["vgg", "alex"])
def test_lpips_is_frozen_and_differentiable_in_the_image(kind: str) -> None:
    network = Lpips(kind, pretrained=False)
    assert not any(p.requires_grad for p in network.parameters())
    assert not any(m.training for m in network.modules()), "its dropout must stay off"
    a, b = torch.randn(2, 2, 3, 32, 32, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    a.requires_grad_()
    distance = network(a, b)
    assert distance.shape == (2,)
    assert torch.equal(network(b, b), torch.zeros(2))
    distance.sum().backward()
    assert a.grad.isfinite().all()
    assert a.grad.abs().sum() > 0
    with torch.no_grad():
        assert torch.allclose(distance, network.net(a, b).view(2))
        assert not torch.allclose(distance, network.net(a, b, normalize=True).view(2)), "images are in [-1, 1]"


def test_where_channels_lie_changes_rounding_only() -> None:
    network = Lpips("alex", pretrained=False)
    plain = copy.deepcopy(network).to(memory_format=torch.contiguous_format)
    convolutions = [m.weight for m in network.modules() if isinstance(m, nn.Conv2d)]
    assert all(w.is_contiguous(memory_format=torch.channels_last) for w in convolutions)
    a, b = torch.randn(2, 4, 3, 64, 64, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    assert torch.allclose(network(a, b), plain(a, b), rtol=1e-5)


def test_the_digits_network_comes_with_the_package() -> None:
    network = perceptual.network("digits")
    image = torch.zeros(2, 3, 32, 32)
    assert network(image, image).tolist() == [0, 0]
    assert network(image, image + 0.5).min() > 0
