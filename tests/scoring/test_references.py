"""Files of reference statistics: every published layout, written here as its authors' code writes it."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.scoring import inception, references
from pipeline.scoring.references import References
from pipeline.settings.evaluate import EvaluateSettings, Flavour


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shapes of four instead of 2048 features: the files are small, the code is the same."""
    monkeypatch.setattr(inception, "FEATURES", 4)
    monkeypatch.setattr(inception, "SPATIAL", 3)


def pooled(dtype: type = np.float64) -> dict[str, np.ndarray]:
    return {"mu": np.arange(4).astype(dtype), "sigma": (np.eye(4) * 2).astype(dtype)}


def spatial() -> dict[str, np.ndarray]:
    return {"mu_s": np.arange(3.0), "sigma_s": np.eye(3)}


def settings(uri: str, flavour: Flavour = "torch-fidelity", **changes: Any) -> EvaluateSettings:
    given = {"inception": "weights.pth", "reference": uri} | changes
    return EvaluateSettings(features="inception", flavour=flavour, **given)


def written(folder: Path, **arrays: np.ndarray) -> str:
    np.savez(folder / "r.npz", **arrays)
    return str(folder / "r.npz")


def found_in(uri: str) -> References:
    found = references.read(uri)
    assert found is not None
    return found


def test_adms_file_is_of_tensorflows_flavour_and_serves_sfid(tmp_path: Path) -> None:
    images = np.zeros((2, 4, 4, 3), dtype=np.uint8)
    uri = written(tmp_path, **pooled(np.float32), **spatial(), arr_0=images, arr_1=np.arange(2))
    found = found_in(uri)
    assert found.pooled[0].dtype == np.float64
    assert np.array_equal(found.pooled[1], np.eye(4) * 2)
    assert found.spatial is not None
    assert np.array_equal(found.spatial[0], np.arange(3.0))
    assert references.check(found, settings(uri)) == "torch-fidelity"
    with pytest.raises(ValueError, match=r"is of flavour torch-fidelity and evaluate.flavour is pytorch-fid, whose"):
        references.check(found, settings(uri, "pytorch-fid"))
    assert found_in(written(tmp_path, **pooled(), arr_0=images)).flavour == "torch-fidelity"


@pytest.mark.parametrize("numpy", [1, 2])
def test_the_authors_file_is_read_without_running_it(tmp_path: Path, numpy: int) -> None:
    """As their fid_score writes it: {"m": float32, "s": float64}. numpy 1 pickles its arrays by another name."""
    arrays = {"m": np.arange(4, dtype=np.float32), "s": np.eye(4)}
    torch.save(arrays, tmp_path / "statistic.pth")
    if numpy == 1:
        save_as_numpy_1(tmp_path / "statistic.pth")
    uri = str(tmp_path / "statistic.pth")
    found = found_in(uri)
    assert found.pooled[0].dtype == np.float64
    assert np.array_equal(found.pooled[0], np.arange(4.0))
    assert np.array_equal(found.pooled[1], np.eye(4))
    assert references.check(found, settings(uri, "pytorch-fid")) == "pytorch-fid"
    with pytest.raises(ValueError, match=r"is of flavour pytorch-fid and evaluate.flavour is torch-fidelity"):
        references.check(found, settings(uri))


def save_as_numpy_1(place: Path) -> None:
    """A file of torch.save once more, its pickle spelt as numpy 1 did."""
    with zipfile.ZipFile(place) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(place, "w", zipfile.ZIP_STORED) as archive:
        for name, data in members.items():
            archive.writestr(name, data.replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    assert b"numpy.core.multiarray" in place.read_bytes()


class Harmful:
    def __reduce__(self) -> Any:
        return os.mkdir, ("harm",)


def test_code_in_a_file_is_refused_and_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"m": Harmful(), "s": np.eye(4)}, tmp_path / "statistic.pth")
    with pytest.raises(
        ValueError, match=r"statistic.pth could not be read \(it is damaged, or holds more than"
    ) as caught:
        references.read(str(tmp_path / "statistic.pth"))
    assert "\n" not in str(caught.value)
    np.savez(tmp_path / "r.npz", mu=np.array([Harmful()], dtype=object), sigma=np.eye(4))
    with pytest.raises(ValueError, match=r"r.npz could not be read"):
        references.read(str(tmp_path / "r.npz"))
    assert not (tmp_path / "harm").exists()


def test_mean_and_covariance_alone_need_to_be_told_apart(tmp_path: Path) -> None:
    uri = written(tmp_path, **pooled())
    found = found_in(uri)
    with pytest.raises(ValueError, match=r"which does not tell the flavour; set evaluate.reference_flavour to"):
        references.check(found, settings(uri))
    assert references.check(found, settings(uri, "pytorch-fid", reference_flavour="pytorch-fid")) == "pytorch-fid"
    with pytest.raises(ValueError, match=r"is of flavour pytorch-fid and evaluate.flavour is torch-fidelity"):
        references.check(found, settings(uri, reference_flavour="pytorch-fid"))


@pytest.mark.parametrize("with_spatial", [True, False])
def test_our_own_file_says_what_it_is(tmp_path: Path, with_spatial: bool) -> None:
    gaussians = [tuple(arrays.values()) for arrays in (pooled(), spatial())]
    made = References(gaussians[0], gaussians[1] if with_spatial else None, "pytorch-fid", True, "formula", 50_000)
    (tmp_path / "reference.npz").write_bytes(references.packed(made))
    uri = str(tmp_path / "reference.npz")
    found = found_in(uri)
    assert (found.flavour, found.stated, found.weights, found.count) == ("pytorch-fid", True, "formula", 50_000)
    assert np.array_equal(found.pooled[1], made.pooled[1])
    assert (found.spatial is not None) == with_spatial
    assert references.check(found, settings(uri, "pytorch-fid", inception="formula")) == "pytorch-fid"
    with pytest.raises(ValueError, match=r"evaluate.reference_flavour is torch-fidelity, but .* says that it is pytor"):
        references.check(found, settings(uri, inception="formula", reference_flavour="torch-fidelity"))
    with pytest.raises(ValueError, match=r"was made with random weights and evaluate.inception is trained weights"):
        references.check(found, settings(uri, "pytorch-fid"))


def test_a_rehearsal_is_not_compared_with_the_trained_network(tmp_path: Path) -> None:
    uri = written(tmp_path, **pooled(), **spatial())
    with pytest.raises(
        ValueError, match=r"was made with trained weights and evaluate.inception is random weights; give"
    ):
        references.check(found_in(uri), settings(uri, inception="formula"))


def test_images_are_no_statistics(tmp_path: Path) -> None:
    assert references.read(str(tmp_path)) is None
    assert references.read(str(tmp_path / "train.parquet")) is None
    assert references.read(written(tmp_path, arr_0=np.zeros((2, 4, 4, 3), dtype=np.uint8))) is None


@pytest.mark.parametrize(
    ("arrays", "sentence"),
    [
        ({"a": np.zeros(3)}, "r.npz holds a; it must hold mu and sigma, m and s, or images as arr_0"),
        ({"mu": np.zeros(3), "sigma": np.eye(3)}, r"a pooled mean of shape \(3,\) and covariance of \(3, 3\);"),
        (pooled() | {"mu_s": np.zeros(2), "sigma_s": np.eye(2)}, r"a spatial mean of shape \(2,\)"),
        ({"mu": np.full(4, np.nan), "sigma": np.eye(4)}, "holds NaN or infinity; it is damaged"),
    ],
)
def test_a_wrong_file_is_one_sentence(tmp_path: Path, arrays: dict[str, np.ndarray], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence) as caught:
        references.read(written(tmp_path, **arrays))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["r.npz", "statistic.pth"])
def test_a_damaged_file_is_one_sentence(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"<html>no such file</html>")
    with pytest.raises(ValueError, match="could not be read") as caught:
        references.read(str(tmp_path / name))
    assert "\n" not in str(caught.value)
