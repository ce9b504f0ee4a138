"""The scoring networks and the files behind them; no downloads.

python -m pytest tests/test_scoring.py
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline import digits, inception, scoring, storage
from pipeline.command_line import DEFAULT, parse
from pipeline.models.convnet import to_uint8
from pipeline.recipe import EvaluateSettings


def test_real_digits_are_recognised() -> None:
    images = scoring.real(EvaluateSettings(), 32)
    assert images is not None
    pixels, labels = images[100:164]
    assert len(images) == len(digits.images_and_labels()[0])
    _, logits, _ = scoring.features(EvaluateSettings(), "cpu")(to_uint8(pixels))
    assert labels is not None
    assert (logits.argmax(1).numpy() == labels).sum() >= 62


def test_digits_features_refuse_other_images() -> None:
    with pytest.raises(
        ValueError, match="scores 32x32 images of 10 classes, but the teacher makes 256x256 images of 1000"
    ):
        scoring.check(EvaluateSettings(), 256, 1000)
    assert set(scoring.check(EvaluateSettings(), 32, 10)) == {"scorer"}


def inception_settings(folder: Path, **changes: Any) -> EvaluateSettings:
    """Of weights that are not the official ones, and ADM's layout of a reference."""
    (folder / "inception.pth").write_bytes(b"weights")
    np.savez(folder / "adm.npz", mu=np.zeros(2048), sigma=np.eye(2048), arr_0=np.zeros((2, 4, 4, 3), dtype=np.uint8))
    given = {"inception": str(folder / "inception.pth"), "reference": str(folder / "adm.npz")} | changes
    return EvaluateSettings(features="inception", **given)


def test_what_is_made_of_whose_features_has_a_name() -> None:
    settings = EvaluateSettings(features="inception", inception="i.pth", reference="r.npz")
    assert scoring.title(EvaluateSettings()) == "FD"
    assert scoring.title(settings) == "FID (torch-fidelity)"
    assert scoring.title(replace(settings, flavour="pytorch-fid")) == "FID (pytorch-fid)"
    random = replace(settings, inception="formula")
    assert scoring.title(random) == "FD of a random Inception (not FID)"
    meanings = [scoring.meaning(one) for one in (settings, replace(settings, flavour="pytorch-fid"), random)]
    assert "preprocessed as torch-fidelity does, comparable with ADM" in meanings[0]
    assert "preprocessed as pytorch-fid does, as in the Distilled Decoding paper" in meanings[1]
    assert "It is not FID: a rehearsal" in meanings[2]


def test_the_network_is_told_apart_by_weights_and_flavour(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = inception_settings(tmp_path)
    monkeypatch.setattr(inception.importlib.util, "find_spec", lambda name: object())
    with pytest.raises(ValueError, match=r"has SHA-256 .*, not 6726825d0af5"):
        scoring.check(settings, 256, 1000)
    digest = hashlib.sha256(b"weights").hexdigest()
    monkeypatch.setattr(inception, "SHA256", digest)
    assert scoring.check(settings, 256, 1000) == {"inception": digest, "flavour": "torch-fidelity"}
    other = replace(settings, flavour="pytorch-fid", inception="formula")
    assert scoring.check(other, 256, 1000) == {"inception": "formula", "flavour": "pytorch-fid"}


def test_a_reference_says_who_made_its_statistics(tmp_path: Path) -> None:
    settings = inception_settings(tmp_path)
    facts = scoring.check_reference(settings, 4)
    digest = storage.sha256(settings.reference or "")
    assert facts == {"SHA-256": digest, "images": 2, "statistics": "read", "count": None, "sFID": False}
    images = scoring.real(settings, 4)
    assert images is not None
    assert len(images) == 2
    np.savez(tmp_path / "images.npz", arr_0=np.zeros((3, 4, 4, 3), dtype=np.uint8))
    facts = scoring.check_reference(replace(settings, reference=str(tmp_path / "images.npz")), 4)
    assert (facts["images"], facts["statistics"]) == (3, "made here")
    assert scoring.check_reference(EvaluateSettings(), 32) == {"images": 5000, "statistics": "made here"}


def test_a_reference_that_cannot_serve_is_one_sentence(tmp_path: Path) -> None:
    settings = inception_settings(tmp_path)
    with pytest.raises(ValueError, match="holds images of 4x4 pixels and the teacher makes 8x8"):
        scoring.check_reference(settings, 8)
    with pytest.raises(ValueError, match=r"is of flavour torch-fidelity and evaluate.flavour is pytorch-fid"):
        scoring.check_reference(replace(settings, flavour="pytorch-fid"), 4)
    with pytest.raises(FileNotFoundError, match=r"evaluate.reference .*none.npz is not there"):
        scoring.check_reference(replace(settings, reference=str(tmp_path / "none.npz")), 4)
    np.savez(tmp_path / "one.npz", arr_0=np.zeros((1, 4, 4, 3), dtype=np.uint8))
    with pytest.raises(ValueError, match="holds 1 images; a covariance needs 2 or more"):
        scoring.check_reference(replace(settings, reference=str(tmp_path / "one.npz")), 4)


@pytest.mark.parametrize("name", sorted(path.name for path in DEFAULT.parent.glob("*.yaml")))
def test_every_shipped_recipe_has_the_flavour_of_its_reference(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the authors' file in its place, as their fid_score writes it."""
    below = name.replace("-released", "")
    files = [f"--config={DEFAULT.parent / file}" for file in dict.fromkeys([below, name])]
    settings = parse(None, files).evaluate
    if settings.features == "inception":
        assert (settings.reference or "").endswith("statistic.pth")
        monkeypatch.setattr(inception, "FEATURES", 4)
        torch.save({"m": np.zeros(4, dtype=np.float32), "s": np.eye(4)}, tmp_path / "statistic.pth")
        settings = replace(settings, reference=str(tmp_path / "statistic.pth"))
    assert scoring.check_reference(settings, 256)["statistics"] in ("read", "made here")
