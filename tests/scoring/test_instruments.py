"""The scoring networks and the files behind them; no downloads."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline import storage
from pipeline.command_line import DEFAULT, parse
from pipeline.digits import networks
from pipeline.evaluation.rows import Entry, Reference, numbers
from pipeline.models.convnet import to_uint8
from pipeline.report import tables
from pipeline.scoring import inception, instruments
from pipeline.scoring.tally import Sight, Statistics
from pipeline.settings.evaluate import EvaluateSettings


def test_real_digits_are_recognised() -> None:
    images = instruments.real(EvaluateSettings(), 32)
    assert images is not None
    pixels, labels = images[100:164]
    assert len(images) == len(networks.images_and_labels()[0])
    _, logits, _ = instruments.features(EvaluateSettings(), "cpu")(to_uint8(pixels))
    assert labels is not None
    assert (logits.argmax(1).numpy() == labels).sum() >= 62


def test_digits_features_refuse_other_images() -> None:
    with pytest.raises(
        ValueError, match="scores 32x32 images of 10 classes, but the teacher makes 256x256 images of 1000"
    ):
        instruments.check(EvaluateSettings(), 256, 1000)
    assert set(instruments.check(EvaluateSettings(), 32, 10)) == {"scorer"}


def inception_settings(folder: Path, **changes: Any) -> EvaluateSettings:
    """Of weights that are not the official ones, and ADM's layout of a reference."""
    (folder / "inception.pth").write_bytes(b"weights")
    np.savez(folder / "adm.npz", mu=np.zeros(2048), sigma=np.eye(2048), arr_0=np.zeros((2, 4, 4, 3), dtype=np.uint8))
    given = {"inception": str(folder / "inception.pth"), "reference": str(folder / "adm.npz")} | changes
    return EvaluateSettings(features="inception", **given)


def test_what_is_made_of_whose_features_has_a_name() -> None:
    settings = EvaluateSettings(features="inception", inception="i.pth", reference="r.npz")
    assert instruments.title(EvaluateSettings()) == "FD"
    assert instruments.title(settings) == "FID (torch-fidelity)"
    assert instruments.title(replace(settings, flavour="pytorch-fid")) == "FID (pytorch-fid)"
    random = replace(settings, inception="formula")
    assert instruments.title(random) == "FD of a random Inception (not FID)"
    meanings = [instruments.meaning(one) for one in (settings, replace(settings, flavour="pytorch-fid"), random)]
    assert "preprocessed as torch-fidelity does, comparable with ADM" in meanings[0]
    assert "preprocessed as pytorch-fid does, as in the Distilled Decoding paper" in meanings[1]
    assert "It is not FID: a rehearsal" in meanings[2]


def test_the_network_is_told_apart_by_weights_and_flavour(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = inception_settings(tmp_path)
    monkeypatch.setattr(inception.importlib.util, "find_spec", lambda name: object())
    with pytest.raises(ValueError, match=r"has SHA-256 .*, not 6726825d0af5"):
        instruments.check(settings, 256, 1000)
    digest = hashlib.sha256(b"weights").hexdigest()
    monkeypatch.setattr(inception, "SHA256", digest)
    assert instruments.check(settings, 256, 1000) == {"inception": digest, "flavour": "torch-fidelity"}
    other = replace(settings, flavour="pytorch-fid", inception="formula")
    assert instruments.check(other, 256, 1000) == {"inception": "formula", "flavour": "pytorch-fid"}


def test_a_reference_says_who_made_its_statistics(tmp_path: Path) -> None:
    settings = inception_settings(tmp_path)
    facts = instruments.check_reference(settings, 4)
    digest = storage.sha256(settings.reference or "")
    assert facts == {"SHA-256": digest, "images": 2, "statistics": "read", "count": None, "sFID": False}
    images = instruments.real(settings, 4)
    assert images is not None
    assert len(images) == 2
    np.savez(tmp_path / "images.npz", arr_0=np.zeros((3, 4, 4, 3), dtype=np.uint8))
    facts = instruments.check_reference(replace(settings, reference=str(tmp_path / "images.npz")), 4)
    assert (facts["images"], facts["statistics"]) == (3, "made here")
    assert instruments.check_reference(EvaluateSettings(), 32) == {"images": 5000, "statistics": "made here"}


def test_a_reference_that_cannot_serve_is_one_sentence(tmp_path: Path) -> None:
    settings = inception_settings(tmp_path)
    with pytest.raises(ValueError, match="holds images of 4x4 pixels and the teacher makes 8x8"):
        instruments.check_reference(settings, 8)
    with pytest.raises(ValueError, match=r"is of flavour torch-fidelity and evaluate.flavour is pytorch-fid"):
        instruments.check_reference(replace(settings, flavour="pytorch-fid"), 4)
    with pytest.raises(FileNotFoundError, match=r"evaluate.reference .*none.npz is not there"):
        instruments.check_reference(replace(settings, reference=str(tmp_path / "none.npz")), 4)
    np.savez(tmp_path / "one.npz", arr_0=np.zeros((1, 4, 4, 3), dtype=np.uint8))
    with pytest.raises(ValueError, match="holds 1 images; a covariance needs 2 or more"):
        instruments.check_reference(replace(settings, reference=str(tmp_path / "one.npz")), 4)


@pytest.mark.faults("reference: two images")
def test_a_reference_of_few_images_is_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(tmp_path / "two.npz", arr_0=np.zeros((2, 4, 4, 3), dtype=np.uint8))
    instruments.check_reference(inception_settings(tmp_path, reference=str(tmp_path / "two.npz")), 4)
    assert "holds 2 images for 2048 features, so its covariance is singular" in capsys.readouterr().err


def test_statistics_and_images_serve_one_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The authors' statistic.pth for FID, ADM's file for what needs images and for the second flavour."""
    monkeypatch.setattr(inception, "FEATURES", 4)
    monkeypatch.setattr(inception, "SPATIAL", 4)
    torch.save({"m": np.zeros(4, dtype=np.float32), "s": np.eye(4)}, tmp_path / "statistic.pth")
    pixels = np.zeros((3, 4, 4, 3), dtype=np.uint8)
    np.savez(tmp_path / "adm.npz", mu=np.ones(4), sigma=np.eye(4), mu_s=np.ones(4), sigma_s=np.eye(4), arr_0=pixels)
    np.savez(tmp_path / "images.npz", arr_0=pixels)
    given: dict[str, Any] = {
        "features": "inception",
        "inception": "i.pth",
        "reference": str(tmp_path / "statistic.pth"),
    }
    alone = EvaluateSettings(**given, flavour="pytorch-fid", images=str(tmp_path / "images.npz"))
    facts = instruments.check_reference(alone, 4)
    assert (facts["images"], facts["statistics"], "second" in facts) == (3, "read", False)
    assert facts["images SHA-256"] == storage.sha256(str(tmp_path / "images.npz"))
    both = replace(alone, flavour="both", images=str(tmp_path / "adm.npz"))
    facts = instruments.check_reference(both, 4)
    assert (facts["images"], facts["statistics"], facts["second"], facts["sFID"]) == (3, "read", "read", True)
    assert {name: float(found.pooled[0][0]) for name, found in instruments.statistics(both).items()} == {
        "pytorch-fid": 0.0,
        "torch-fidelity": 1.0,
    }
    facts = instruments.check_reference(replace(both, images=str(tmp_path / "images.npz")), 4)
    assert (facts["statistics"], facts["second"]) == ("made here", "read")
    with pytest.raises(ValueError, match=r"flavour is both, and .* holds statistics of pytorch-fid alone"):
        instruments.check_reference(replace(both, images=None), 4)
    with pytest.raises(FileNotFoundError, match=r"evaluate.images .*none is not there"):
        instruments.check_reference(replace(both, images=str(tmp_path / "none")), 4)


def test_both_flavours_see_the_same_images(monkeypatch: pytest.MonkeyPatch) -> None:
    class Network(torch.nn.Module):
        def __init__(self, weights: Any, flavour: str) -> None:
            super().__init__()
            self.scale = {"torch-fidelity": 1.0, "pytorch-fid": 2.0}[flavour]

        def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
            return self.scale * pixels.flatten(1)[:, :3].float(), pixels.flatten(1)[:, :2].float(), None

    monkeypatch.setattr(inception, "Inception", Network)
    monkeypatch.setattr(inception, "FEATURES", 3)
    monkeypatch.setattr(inception, "SPATIAL", 0)
    monkeypatch.setattr(inception, "CLASSES", 2)
    settings = EvaluateSettings(features="inception", inception="formula", reference="r", flavour="both")
    network = instruments.features(settings, "cpu", {"weights": np.zeros(1)})
    images = torch.rand(9, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    parts = []
    for rows in (np.arange(5), np.arange(5, 9)):
        part = Statistics.empty(network, 10, 8, 9)
        part.add(Sight.of(images[rows], network), None, network, rows, np.full(len(rows), True), 0)
        parts.append(Statistics.unpack(part.pack()))
    parts[0].merge(parts[1])
    mean, cov = parts[0].moments.gaussian()
    assert parts[0].second is not None
    np.testing.assert_allclose(parts[0].second.gaussian()[0], 2 * mean, rtol=1e-12)
    np.testing.assert_allclose(parts[0].second.gaussian()[1], 4 * cov, rtol=1e-9)
    reference = Reference((mean, cov), None, second=(2 * mean + 1, 4 * cov))
    (row,) = numbers([Entry("DD 1 step", "FewStep", {}, 1, parts[0])], reference)
    assert (row["score"], row["second_score"]) == (pytest.approx(0, abs=1e-6), pytest.approx(3))
    titles = {"title": instruments.title(replace(settings, inception="i")), "second_title": "FID (pytorch-fid)"}
    assert titles["second_title"] == instruments.second_title(replace(settings, inception="i"))
    shown = tables.main(titles | {"rows": [row | {"paper": {"fid": 9.94}}]})
    assert shown.headings[2:5] == ["FID (torch-fidelity)", "FID (pytorch-fid)", "FID, paper"]


def test_images_of_384_pixels_are_scored_at_256() -> None:
    """As LlamaGen's authors sample them for their evaluation; others as they are, or as the recipe says."""
    sides = [instruments.side(EvaluateSettings(), side) for side in (32, 256, 384, 512)]
    assert sides == [32, 256, 256, 512]
    assert instruments.side(EvaluateSettings(image_size=128), 384) == 128


@pytest.mark.parametrize("name", sorted(path.name for path in DEFAULT.parent.glob("*.yaml")))
def test_every_shipped_recipe_has_the_flavour_of_its_reference(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the authors' file in its place, as their fid_score writes it."""
    below = name.replace("-released", "")
    files = [f"--config={DEFAULT.parent / file}" for file in dict.fromkeys([below, name])]
    settings = parse(None, files).evaluate
    if settings.features == "inception":
        if name == "llamagen-t2i-xl.yaml":  # images of its very prompts, which the user has
            assert (settings.reference or "").startswith("CHANGE")
            assert settings.flavour == "pytorch-fid"
            return
        assert (settings.reference or "").endswith("statistic.pth")
        monkeypatch.setattr(inception, "FEATURES", 4)
        torch.save({"m": np.zeros(4, dtype=np.float32), "s": np.eye(4)}, tmp_path / "statistic.pth")
        settings = replace(settings, reference=str(tmp_path / "statistic.pth"))
    assert instruments.check_reference(settings, 256)["statistics"] in ("read", "made here")
