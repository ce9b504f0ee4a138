"""DINOv2's features are those of torch-fidelity's own call, with a slow network of Meta's layout behind it."""

from __future__ import annotations

import io
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.evaluation.rows import Entry, Reference, numbers
from pipeline.host.errors import Missing, Refused
from pipeline.models.convnet import to_uint8
from pipeline.report import tables
from pipeline.scoring import dinov2, instruments, tally
from pipeline.scoring.dinov2 import DinoV2, Shape
from pipeline.scoring.tally import Sight, Statistics
from pipeline.settings.evaluate import EvaluateSettings

TINY = Shape(32, 2, 4, 37)  # Meta's positions across, so that they are interpolated


class Slow(torch.nn.Module):
    """Meta's vision transformer as its code computes it, head by head, with tensors under Meta's names."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        super().__init__()
        self.tensors = weights

    def linear(self, x: Tensor, name: str) -> Tensor:
        return x @ self.tensors[f"{name}.weight"].T + self.tensors[f"{name}.bias"]

    def norm(self, x: Tensor, name: str) -> Tensor:
        scaled = (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, unbiased=False, keepdim=True) + 1e-6)
        return scaled * self.tensors[f"{name}.weight"] + self.tensors[f"{name}.bias"]

    def attention(self, x: Tensor, name: str) -> Tensor:
        queries, keys, values = self.linear(x, f"{name}.qkv").chunk(3, dim=-1)
        size, out = TINY.width // TINY.heads, []
        for head in range(TINY.heads):
            q, k, v = (part[..., head * size : (head + 1) * size] for part in (queries, keys, values))
            out.append(torch.softmax(q @ k.transpose(1, 2) / math.sqrt(size), dim=-1) @ v)
        return self.linear(torch.cat(out, dim=-1), f"{name}.proj")

    def positions(self, across: int) -> Tensor:
        """As ``interpolate_pos_encoding`` of Meta's code: a tenth is added before the factor is taken."""
        found = self.tensors["pos_embed"]
        grid = found[:, 1:].reshape(1, TINY.positions, TINY.positions, -1).permute(0, 3, 1, 2)
        factor = float((across + 0.1) / math.sqrt(TINY.positions**2))
        grid = F.interpolate(grid, scale_factor=(factor, factor), mode="bicubic")
        assert grid.shape[-2:] == (across, across)
        return torch.cat([found[:, :1], grid.permute(0, 2, 3, 1).reshape(1, across**2, -1)], dim=1)

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = (self.tensors[f"patch_embed.proj.{kind}"] for kind in ("weight", "bias"))
        patches = F.conv2d(x, weight, bias, stride=14).flatten(2).transpose(1, 2)
        x = torch.cat([self.tensors["cls_token"].expand(len(x), -1, -1), patches], dim=1)
        x = x + self.positions(math.isqrt(patches.shape[1]))
        for i in range(TINY.depth):
            name = f"blocks.{i}"
            x = x + self.tensors[f"{name}.ls1.gamma"] * self.attention(self.norm(x, f"{name}.norm1"), f"{name}.attn")
            hidden = F.gelu(self.linear(self.norm(x, f"{name}.norm2"), f"{name}.mlp.fc1"))
            x = x + self.tensors[f"{name}.ls2.gamma"] * self.linear(hidden, f"{name}.mlp.fc2")
        return self.norm(x, "norm")[:, 0]


@pytest.fixture
def weights() -> dict[str, Tensor]:
    """Larger than those of ``formula``, so that attention is not flat and positions matter."""
    return {name: 4 * value for name, value in dinov2.formula(TINY).items()}


@pytest.mark.parametrize("side", [32, 224, 256])
def test_features_are_those_of_torch_fidelity(
    weights: dict[str, Tensor], side: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.numerics import torchvision_ops  # noqa: F401  isort: skip
    from torch_fidelity.feature_extractor_dinov2 import FeatureExtractorDinoV2

    asked: list[Any] = []
    monkeypatch.setattr(torch.hub, "load", lambda *args: asked.append(args) or Slow(weights))
    theirs = FeatureExtractorDinoV2("dinov2-vit-l-14", ["dinov2"])
    assert asked == [("facebookresearch/dinov2", "dinov2_vitl14")]
    pixels = torch.randint(0, 256, (3, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    (expected,) = theirs(pixels)
    found = DinoV2(weights, TINY)(pixels)
    assert found.dtype == torch.float32
    assert expected.std(0).mean() > 1e-3, "images differ"
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_positions_are_interpolated_by_metas_factor(weights: dict[str, Tensor]) -> None:
    found = dinov2.interpolated(weights["pos_embed"], 37)
    torch.testing.assert_close(found, Slow(weights).positions(16))
    grid = weights["pos_embed"][:, 1:].reshape(1, 37, 37, -1).permute(0, 3, 1, 2)
    other = F.interpolate(grid, size=(16, 16), mode="bicubic").permute(0, 2, 3, 1).reshape(1, 256, -1)
    assert (found[:, 1:] - other).abs().max() > 1e-3, "transformers' own factor is another"


def test_the_official_shapes_are_those_of_a_vit_l() -> None:
    shapes = dinov2._shapes(dinov2.VIT_L)
    assert sum(math.prod(size) for size in shapes.values()) == 304_368_640
    body = dinov2._blank(dinov2.VIT_L)
    empty = {name: torch.empty(size, device="meta") for name, size in shapes.items()}
    assert dinov2._renamed(empty, dinov2.VIT_L).keys() == body.state_dict().keys()


def test_another_file_is_refused_in_one_sentence(weights: dict[str, Tensor], tmp_path: Path) -> None:
    with pytest.raises(Missing, match=r"evaluate\.dinov2 .*nothing\.pth is no file; fetch dinov2_vitl14_pretrain\.pth"):
        dinov2.check(str(tmp_path / "nothing.pth"))
    torch.save(weights, tmp_path / "small.pth")
    with pytest.raises(
        Refused, match=r"is not DINOv2's ViT-L/14: blocks\.0\.attn\.proj\.bias is \(32,\) and should be \(1024,\)"
    ):
        dinov2.check(str(tmp_path / "small.pth"))
    (tmp_path / "text.pth").write_text("no weights")
    with pytest.raises(Refused, match="could not be read"):
        dinov2.check(str(tmp_path / "text.pth"))
    assert dinov2.check("formula") == "formula"


def test_a_tensor_that_is_not_there_is_never_made_up(weights: dict[str, Tensor]) -> None:
    lacking = {name: value for name, value in weights.items() if name != "norm.bias"}
    with pytest.raises(KeyError):
        DinoV2(lacking, TINY)


def test_the_report_has_its_distance_of_the_same_images(
    weights: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Statistics of parts, packed and merged, against one pass over all features."""
    monkeypatch.setattr(dinov2, "load", lambda uri: DinoV2(weights, TINY))
    monkeypatch.setattr(tally, "FEATURES", TINY.width)
    settings = EvaluateSettings(dinov2="formula")
    network = instruments.features(settings, "cpu")
    images = 2 * torch.rand(14, 3, 32, 32, generator=torch.Generator().manual_seed(0)) - 1
    parts = []
    for rows in (np.arange(8), np.arange(8, 14)):
        part = Statistics.empty(network, 10, 32, 14)
        part.add(Sight.of(images[rows], network), None, network, rows, np.full(len(rows), True), 0)
        parts.append(Statistics.unpack(part.pack()))
    parts[0].merge(parts[1])
    features = DinoV2(weights, TINY)(to_uint8(images)).double().numpy()
    assert parts[0].dinov2 is not None
    mean, cov = parts[0].dinov2.gaussian()
    np.testing.assert_allclose(mean, features.mean(0), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(cov, np.cov(features.T), rtol=1e-3, atol=1e-6)
    reference = Reference(parts[0].moments.gaussian(), None, dinov2=(mean + 1, cov))
    (row,) = numbers([Entry("DD 1 step", "FewStep", {}, 1, parts[0])], reference)
    assert row["dinov2_score"] == pytest.approx(TINY.width)
    results: Any = {"title": "FD", "dinov2_title": "FD-DINOv2", "rows": [row]}
    table = tables.main(results)
    assert table.cells[0][table.headings.index("FD-DINOv2")] == "32.00"


def test_without_it_nothing_is_scored_and_nothing_changes() -> None:
    network = instruments.features(EvaluateSettings(), "cpu")
    assert network.dinov2 is None
    part = Statistics.empty(network, 10, 32, 4)
    images = torch.zeros(4, 3, 32, 32)
    part.add(Sight.of(images, network), None, network, np.arange(4), np.full(4, True), 0)
    assert part.dinov2 is None
    assert not [name for name in np.load(io.BytesIO(part.pack())).files if "dinov2" in name]
    assert "dinov2" not in instruments.check(EvaluateSettings(), 32, 10)


def test_its_weights_are_a_fact_and_random_ones_are_called_so() -> None:
    settings = EvaluateSettings(dinov2="formula")
    assert instruments.check(settings, 32, 10)["dinov2"] == "formula"
    assert instruments.dinov2_title(settings) == "FD of a random DINOv2 (not FD-DINOv2)"
    assert instruments.dinov2_title(EvaluateSettings(dinov2="w.pth")) == "FD-DINOv2"


def test_a_reference_of_statistics_alone_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "adm.npz", mu=np.zeros(2048), sigma=np.eye(2048), mu_s=np.zeros(2023), sigma_s=np.eye(2023))
    given: Any = {"inception": "weights.pth", "reference": str(tmp_path / "adm.npz")}
    settings = EvaluateSettings(features="inception", dinov2="formula", **given)
    with pytest.raises(Refused, match=r"evaluate\.dinov2 is set, and .*adm\.npz holds statistics of Inception"):
        instruments.check_reference(settings, 256)
    assert instruments.check_reference(replace(settings, dinov2=None), 256)["images"] == 0
