"""The scoring networks and the files behind them; no downloads.

python -m pytest tests/test_scoring.py
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline import digits, scoring
from pipeline.models.convnet import to_uint8
from pipeline.recipe import EvaluateSettings

GOLDEN = json.loads((Path(__file__).parent / "goldens" / "eval.json").read_text())


def test_real_digits_are_recognised() -> None:
    images = scoring.ReferenceImages(EvaluateSettings())
    pixels, labels = images[100:164]
    assert len(images) == len(digits.images_and_labels()[0])
    _, logits = scoring.features(EvaluateSettings(), "cpu")(to_uint8(pixels))
    assert labels is not None
    assert (logits.argmax(1).numpy() == labels).sum() >= 62


def test_digits_features_refuse_other_images() -> None:
    with pytest.raises(
        ValueError, match="scores 32x32 images of 10 classes, but the teacher makes 256x256 images of 1000"
    ):
        scoring.check(EvaluateSettings(), 256, 1000)
    assert set(scoring.check(EvaluateSettings(), 32, 10)) == {"scorer"}


def inception_settings(folder: Path, **arrays: np.ndarray) -> EvaluateSettings:
    (folder / "inception.pth").write_bytes(b"weights")
    np.savez(folder / "reference.npz", **arrays)
    return EvaluateSettings(
        features="inception", inception=str(folder / "inception.pth"), reference=str(folder / "reference.npz")
    )


def test_reference_file_gives_mean_and_covariance(tmp_path: Path) -> None:
    mean, covariance = np.arange(2048, dtype=np.float32), np.eye(2048, dtype=np.float32)
    settings = inception_settings(tmp_path, mu=mean, sigma=covariance)
    found = scoring.reference_gaussian(settings.reference or "")
    assert np.array_equal(found[0], mean)
    assert found[1].dtype == np.float64
    assert len(scoring.ReferenceImages(settings)) == 0


def test_reference_images_are_read_row_by_row(tmp_path: Path) -> None:
    stored = np.random.default_rng(0).integers(0, 256, (7, 5, 5, 3), dtype=np.uint8)
    images = scoring.ReferenceImages(inception_settings(tmp_path, arr_0=stored))
    assert len(images) == 7
    found, labels = images[2:6]
    assert labels is None
    assert np.array_equal(to_uint8(found).permute(0, 2, 3, 1).numpy(), stored[2:6])
    assert len(images[5:9][0]) == 2


@pytest.mark.parametrize(
    ("arrays", "sentence"),
    [
        ({"m": np.zeros(3)}, "is no npz file with mu and sigma"),
        ({"mu": np.zeros(3), "sigma": np.eye(3)}, r"has mu of shape \(3,\)"),
    ],
)
def test_a_wrong_reference_is_one_sentence(tmp_path: Path, arrays: dict[str, np.ndarray], sentence: str) -> None:
    settings = inception_settings(tmp_path, **arrays)
    with pytest.raises(ValueError, match=sentence):
        scoring.reference_gaussian(settings.reference or "")


def test_wrong_inception_weights_are_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = inception_settings(tmp_path, mu=np.zeros(2048), sigma=np.eye(2048))
    monkeypatch.setattr(scoring.importlib.util, "find_spec", lambda name: object())
    with pytest.raises(ValueError, match=r"has SHA-256 .*, not 6726825d0af5"):
        scoring.check(settings, 256, 1000)
    monkeypatch.setattr(scoring, "INCEPTION_SHA256", hashlib.sha256(b"weights").hexdigest())
    assert set(scoring.check(settings, 256, 1000)) == {"inception", "reference"}
    monkeypatch.setattr(scoring.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'distilled-decoding\[fid\]'"):
        scoring.check(settings, 256, 1000)


def test_inception_features_have_the_golden_values(tmp_path: Path) -> None:
    """torch-fidelity's network under weights from a formula: right outputs, right preprocessing, no
    download.
    """
    from pipeline import torchvision_ops  # noqa: F401  isort: skip  before torch_fidelity imports torchvision

    torch_fidelity = pytest.importorskip("torch_fidelity")

    def made(name: str, shape: torch.Size, rng: np.random.RandomState) -> np.ndarray:
        normal, fan_in = rng.standard_normal, int(np.prod(shape[1:]))
        if name.endswith("conv.weight"):
            return normal(shape) * np.sqrt(2 / fan_in)
        if name == "fc.weight":
            return normal(shape) / np.sqrt(2048)
        if name.endswith("bn.weight"):
            return 1 + 0.1 * normal(shape)
        if name.endswith("running_var"):
            return 0.5 + rng.random_sample(shape)
        return np.zeros(shape) if name.endswith("num_batches_tracked") else 0.1 * normal(shape)

    class Blank(torch_fidelity.FeatureExtractorInceptionV3):
        def load_state_dict(self, *args: object, **kwargs: object) -> None:  # the constructor insists on loading
            return None

    torch.save({}, tmp_path / "inception.pth")
    shapes = Blank("x", ["2048"], feature_extractor_weights_path=str(tmp_path / "inception.pth")).state_dict()
    weights = {
        name: torch.from_numpy(np.asarray(made(name, shapes[name].shape, np.random.RandomState(1000 + i)))).to(
            shapes[name]
        )
        for i, name in enumerate(sorted(shapes))
    }
    torch.save(weights, tmp_path / "inception.pth")
    settings = EvaluateSettings(features="inception", inception=str(tmp_path / "inception.pth"), reference="unused")
    pixels = torch.from_numpy(np.random.RandomState(7).randint(0, 256, (2, 3, 64, 64)).astype(np.uint8))
    features, logits = scoring.features(settings, "cpu")(pixels)
    golden = GOLDEN["inception_formula_weights"]
    np.testing.assert_allclose(features[:, :6], golden["torch_fidelity_2048_first6_at_64"], atol=2e-4)
    np.testing.assert_allclose(logits[:, :4], golden["torch_fidelity_logits_unbiased_first4_at_64"], atol=2e-4)
