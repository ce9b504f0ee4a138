"""The Inception network under weights from a formula: no download."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from inception_weights import weights
from torch import Tensor

from pipeline.scoring import inception, instruments
from pipeline.scoring.inception import Inception
from pipeline.scoring.tally import Sight, Statistics
from pipeline.settings.evaluate import EvaluateSettings, Flavour

GOLDEN = json.loads((Path(__file__).parents[1] / "goldens" / "eval.json").read_text())["inception_formula_weights"]


def pixels(side: int) -> Tensor:
    """The formula behind the golden values."""
    return torch.from_numpy(np.random.RandomState(7).randint(0, 256, (2, 3, side, side)).astype(np.uint8))


@pytest.mark.parametrize("side", [64, 256, 320])
@pytest.mark.parametrize("flavour", ["torch-fidelity", "pytorch-fid"])
def test_features_of_both_flavours_have_the_golden_values(flavour: Flavour, side: int) -> None:
    features, logits, spatial = Inception(weights(), flavour)(pixels(side))
    golden, name = GOLDEN[f"H{side}"], flavour.replace("-", "_")
    np.testing.assert_allclose(features[:, :6], golden[f"{name}_2048_first6"], atol=2e-4)
    np.testing.assert_allclose([features.mean(), features.std()], golden[f"{name}_2048_mean_std"], atol=2e-4)
    if flavour == "torch-fidelity":
        np.testing.assert_allclose(logits[:, :4], golden["torch_fidelity_logits_unbiased_first4"], atol=2e-4)
    assert (features.shape, logits.shape) == ((2, 2048), (2, 1008))
    assert (spatial is None) == (flavour == "pytorch-fid")


def test_the_default_flavour_is_torch_fidelitys_own_forward(tmp_path: Path) -> None:
    from pipeline.numerics import torchvision_ops  # noqa: F401  isort: skip  before torch_fidelity imports torchvision
    from torch_fidelity import FeatureExtractorInceptionV3

    torch.save({name: torch.from_numpy(array) for name, array in weights().items()}, tmp_path / "inception.pth")
    wanted, path = ["2048", "logits_unbiased"], str(tmp_path / "inception.pth")
    theirs = FeatureExtractorInceptionV3("inception", wanted, feature_extractor_weights_path=path)
    ours = Inception(weights(), "torch-fidelity")
    expected, logits = theirs(pixels(40))
    found = ours(pixels(40))
    assert torch.equal(found[0], expected)
    np.testing.assert_allclose(found[1], logits, atol=1e-5)


def test_spatial_features_are_the_1x1_branch_of_mixed_6d_after_its_relu() -> None:
    """TensorFlow's mixed_6/conv:0, seven channels, channels last: seen here from inside torch-fidelity's blocks."""
    network, seen = Inception(weights(), "torch-fidelity"), []
    network.layers["Mixed_6d"].register_forward_hook(lambda module, given, out: seen.append(out))
    spatial = network(pixels(64))[2]
    assert spatial is not None
    assert spatial.shape == (2, 2023)
    assert spatial.min() == 0
    assert torch.equal(spatial.reshape(2, 17, 17, 7), seen[0][:, :7].permute(0, 2, 3, 1))  # the branch comes first


def test_statistics_do_not_depend_on_the_batch() -> None:
    """Bit for bit: each image passes the network alone, and a part is summed up at once."""
    settings = EvaluateSettings(features="inception", inception="formula", reference="r.npz")
    network = instruments.features(settings, "cpu", weights())
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    packed = []
    for batch in (1, 2, 3):
        seen = Sight.joined([Sight.of(part, network) for part in images.split(batch)])
        statistics = Statistics.empty(network, 10, 32, 3)
        statistics.add(seen, None, False, np.arange(3), np.full(3, True), 2)
        packed.append(statistics.pack())
    assert packed[0] == packed[1] == packed[2]
    assert statistics.spatial is not None
    assert statistics.spatial.n == 3


def test_weights_are_checked_by_their_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "inception.pth"
    with pytest.raises(FileNotFoundError, match=r"is not there; fetch weights-inception-2015.*or set it to formula"):
        inception.check(str(place))
    torch.save({"a": torch.arange(3.0)}, place)
    for read in (inception.check, inception.weights):
        with pytest.raises(ValueError, match=r"has SHA-256 .*, not 6726825d0af5"):
            read(str(place))
    monkeypatch.setattr(inception, "SHA256", hashlib.sha256(place.read_bytes()).hexdigest())
    assert inception.check(str(place)) == inception.SHA256
    assert np.array_equal(inception.weights(str(place))["a"], np.arange(3.0))


def test_a_missing_package_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inception.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'distilled-decoding\[fid\]'"):
        inception.check("formula")
