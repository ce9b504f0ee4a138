"""Streaming statistics, distances and the scoring networks.

python -m pytest tests/test_metrics.py
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline import digits, scoring
from pipeline.metrics import (
    BUFFER,
    ClassVariance,
    InceptionScore,
    Moments,
    Statistics,
    frechet,
    pixel_frechet,
    precision_recall,
    thumbnails,
)
from pipeline.models.convnet import to_uint8
from pipeline.recipe import EvaluateSettings

GOLDEN = json.loads((Path(__file__).parent / "goldens" / "eval.json").read_text())


def golden_features(n: int, low: float, high: float, noise: float, offset: float) -> np.ndarray:
    """The formula behind the golden values: points near a closed curve in 16 dimensions, float32."""
    i, j = np.arange(n, dtype=np.float64)[:, None], np.arange(16, dtype=np.float64)[None, :]
    turn = 0.6180339887498949 * (i + 1)
    u = low + (high - low) * (turn - np.floor(turn))
    curve = np.sin(2 * np.pi * (1 + np.mod(j, 3)) * u + 0.7 * j)
    wobble = np.sin(12.9898 * (i + 1) * (j + 1) + 78.233 * (j + 1))
    return (offset + 0.5 * curve + noise * wobble).astype(np.float32)


def golden_logits() -> np.ndarray:
    i, c = np.arange(200, dtype=np.float64)[:, None], np.arange(10, dtype=np.float64)[None, :]
    return (3.0 * np.sin(0.37 * (i + 1) * (c + 1)) + 1.5 * np.cos(1.7 * (i + 1) + 0.6 * c)).astype(np.float32)


GENERATED = golden_features(200, 0.00, 0.75, 0.12, 0.70)
REAL = golden_features(160, 0.30, 1.00, 0.14, 0.66)


def moments(rows: np.ndarray, batch: int = 64) -> Moments:
    out = Moments(rows.shape[1])
    for i in range(0, len(rows), batch):
        out.add(rows[i : i + batch])
    return out


# ---- golden values


def test_the_golden_inputs_are_those_of_the_golden_values() -> None:
    check = GOLDEN["check"]
    assert GENERATED[0, 0] == pytest.approx(check["gen_00"], abs=1e-12)
    assert GENERATED.sum(dtype=np.float64) == pytest.approx(check["gen_sum_float64"], abs=1e-9)
    assert REAL.sum(dtype=np.float64) == pytest.approx(check["ref_sum_float64"], abs=1e-9)
    assert golden_logits().sum(dtype=np.float64) == pytest.approx(check["logits_sum_float64"], abs=1e-9)


def test_frechet_distance_has_the_golden_value() -> None:
    found = frechet(moments(GENERATED).gaussian(), moments(REAL).gaussian())
    assert found == pytest.approx(GOLDEN["frechet"], abs=1e-10)
    few = frechet(moments(GENERATED[:9]).gaussian(), moments(REAL[:11]).gaussian())
    assert few == pytest.approx(GOLDEN["frechet_9_of_gen_11_of_ref"], abs=1e-6)


def test_frechet_distance_of_known_gaussians() -> None:
    """Diagonal covariances: |m|^2 + sum (s_a - s_b)^2."""
    a = (np.array([1.0, 2.0, 3.0]), np.diag([4.0, 9.0, 0.0]))
    b = (np.array([0.0, 2.0, 5.0]), np.diag([1.0, 16.0, 25.0]))
    assert frechet(a, b) == pytest.approx(1 + 4 + (2 - 1) ** 2 + (3 - 4) ** 2 + (0 - 5) ** 2, abs=1e-12)
    assert frechet(a, a) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(
    ("block", "key"), [(200, "inception_score_1_block"), (50, "inception_score_blocks_of_50")]
)
def test_inception_score_has_the_golden_value(block: int, key: str) -> None:
    score = InceptionScore(200 // block, 10)
    for i in range(0, 200, 32):
        rows = np.arange(i, min(i + 32, 200))
        score.add(golden_logits()[rows], rows // block)
    assert score.value() == pytest.approx(GOLDEN[key], abs=1e-10)


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("block", [37, 1_000])
def test_precision_and_recall_have_the_golden_values(k: int, block: int) -> None:
    assert precision_recall(GENERATED, REAL, k, block) == pytest.approx(
        GOLDEN[f"precision_recall_k{k}"], abs=1e-12
    )


def test_precision_and_recall_survive_an_offset() -> None:
    found = precision_recall(GENERATED.astype(np.float64) + 1e4, REAL.astype(np.float64) + 1e4)
    assert found == pytest.approx(GOLDEN["precision_recall_k3"], abs=1e-12)


def test_precision_and_recall_need_more_points_than_neighbours() -> None:
    with pytest.raises(ValueError, match="more than 3 images"):
        precision_recall(GENERATED[:3], REAL)


# ---- streaming


def test_streaming_moments_equal_two_passes() -> None:
    rows = np.random.default_rng(0).normal(5.0, 2.0, (3 * BUFFER + 7, 6))
    for batch in (1, 100, 5_000):
        mean, covariance = moments(rows, batch).gaussian()
        np.testing.assert_allclose(mean, rows.mean(0), rtol=1e-12)
        np.testing.assert_allclose(covariance, np.cov(rows.T), rtol=1e-10)


def test_streaming_moments_survive_an_offset() -> None:
    rows = np.random.default_rng(0).normal(size=(4_000, 3))
    parts = [moments(part) for part in np.split(rows + 1e6, 4)]
    for part in parts[1:]:
        parts[0].merge(part)
    np.testing.assert_allclose(parts[0].gaussian()[1], np.cov(rows.T), rtol=1e-8)


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 1, 0, 2]])
def test_merged_moments_do_not_depend_on_the_order(order: list[int]) -> None:
    parts = np.split(GENERATED.astype(np.float64), [11, 12, 120])
    merged = Moments(16)
    for i in order:
        merged.merge(moments(parts[i]))
    assert merged.n == 200
    np.testing.assert_allclose(merged.gaussian()[0], GOLDEN["mean_gen"], rtol=1e-12)
    np.testing.assert_allclose(merged.gaussian()[1], np.cov(GENERATED.astype(np.float64).T), atol=1e-14)


def test_a_covariance_needs_two_samples() -> None:
    with pytest.raises(ValueError, match="2 samples or more, and 1 were seen"):
        moments(GENERATED[:1]).gaussian()


def test_class_variance_equals_two_passes_and_merges() -> None:
    rng = np.random.default_rng(1)
    pixels, labels = rng.normal(size=(90, 5)), rng.integers(0, 3, 90)
    labels[-1] = 3  # a class with one image does not count
    expected = np.mean([pixels[labels == k].var(0, ddof=1).mean() for k in range(3)])
    whole, first, second = ClassVariance(5, 5), ClassVariance(5, 5), ClassVariance(5, 5)
    whole.add(pixels, labels)
    first.add(pixels[:40], labels[:40])
    second.add(pixels[40:], labels[40:])
    first.merge(second)
    assert whole.value() == pytest.approx(expected, rel=1e-12)
    assert first.value() == pytest.approx(expected, rel=1e-12)
    assert ClassVariance(2, 3).value() is None


def some_images(count: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed)) * 2.4 - 1.2


def statistics_of(images: torch.Tensor, labels: np.ndarray, parts: list[int], batch: int) -> Statistics:
    """Statistics of images 0.. in parts of the given sizes, each in batches, sent through bytes and
    merged.
    """
    network = scoring.features(EvaluateSettings(), "cpu")
    out, start = None, 0
    for size in parts:
        part = Statistics.empty(network, 10, 32, len(images))
        for i in range(start, start + size, batch):
            rows = np.arange(i, min(i + batch, start + size))
            part.add(images[rows], labels[rows], network, rows, True, 4)
        part = Statistics.unpack(part.pack())
        out = part if out is None else merged(out, part)
        start += size
    assert out is not None
    return out


def merged(first: Statistics, second: Statistics) -> Statistics:
    first.merge(second)
    return first


def test_statistics_of_parts_equal_those_of_the_whole() -> None:
    images, labels = some_images(30), np.arange(30) % 10
    whole = statistics_of(images, labels, [30], 30)
    parts = statistics_of(images, labels, [3, 20, 7], 4)
    np.testing.assert_allclose(parts.moments.gaussian()[1], whole.moments.gaussian()[1], atol=1e-6)
    np.testing.assert_allclose(parts.pixels.gaussian()[1], whole.pixels.gaussian()[1], atol=1e-12)
    assert parts.variance.value() == pytest.approx(whole.variance.value(), rel=1e-9)
    assert parts.score.value() == pytest.approx(whole.score.value(), rel=1e-6)
    assert (parts.right, parts.labelled) == (whole.right, 30)
    np.testing.assert_allclose(np.concatenate(parts.features), whole.features[0], atol=1e-5)
    assert np.array_equal(np.concatenate(parts.images), to_uint8(images[:4]).numpy())


def test_scored_pixels_are_those_of_a_png() -> None:
    """Two images that round to the same bytes have the same statistics."""
    images, labels = some_images(4), np.arange(4)
    saved = to_uint8(images).float() / 127.5 - 1
    assert not torch.equal(saved, images)
    for one, other in zip(
        statistics_of(images, labels, [4], 4).features,
        statistics_of(saved, labels, [4], 4).features,
        strict=True,
    ):
        assert np.array_equal(one, other)


def test_unknown_labels_leave_accuracy_and_variance_out() -> None:
    network = scoring.features(EvaluateSettings(), "cpu")
    statistics = Statistics.empty(network, 10, 32, 4)
    statistics.add(some_images(4), None, network, np.arange(4), False, 0)
    assert (statistics.labelled, statistics.variance.value(), statistics.features, statistics.images) == (
        0,
        None,
        [],
        [],
    )


def test_thumbnails_are_grey_and_small() -> None:
    pixels = torch.randint(
        0, 256, (2, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    small = thumbnails(pixels)
    assert small.shape == (2, 32 * 32)
    block = pixels[1, :, 2:4, 4:6].float() / 127.5 - 1
    assert small[1, 32 * 1 + 2] == pytest.approx(block.mean().item(), abs=1e-6)


def test_pixel_distance_sees_blur() -> None:
    real = some_images(400)
    blurred = torch.nn.functional.avg_pool2d(real, 3, 1, 1)
    sets = [moments(thumbnails(to_uint8(images))) for images in (real, some_images(400, 1), blurred)]
    assert pixel_frechet(sets[0], sets[0]) == pytest.approx(0, abs=1e-9)
    assert pixel_frechet(sets[2], sets[0]) > 1.5 * pixel_frechet(sets[1], sets[0]) > 0


# ---- networks and references


def test_real_digits_are_recognised() -> None:
    images = scoring.ReferenceImages(EvaluateSettings())
    pixels, labels = images[100:164]
    assert len(images) == len(digits.images_and_labels()[0])
    statistics = statistics_of(pixels, labels, [64], 64)
    assert statistics.right >= 62


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
def test_a_wrong_reference_is_one_sentence(
    tmp_path: Path, arrays: dict[str, np.ndarray], sentence: str
) -> None:
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
        def load_state_dict(
            self, *args: object, **kwargs: object
        ) -> None:  # the constructor insists on loading
            return None

    torch.save({}, tmp_path / "inception.pth")
    shapes = Blank("x", ["2048"], feature_extractor_weights_path=str(tmp_path / "inception.pth")).state_dict()
    weights = {
        name: torch.from_numpy(
            np.asarray(made(name, shapes[name].shape, np.random.RandomState(1000 + i)))
        ).to(shapes[name])
        for i, name in enumerate(sorted(shapes))
    }
    torch.save(weights, tmp_path / "inception.pth")
    settings = EvaluateSettings(
        features="inception", inception=str(tmp_path / "inception.pth"), reference="unused"
    )
    pixels = torch.from_numpy(np.random.RandomState(7).randint(0, 256, (2, 3, 64, 64)).astype(np.uint8))
    features, logits = scoring.features(settings, "cpu")(pixels)
    golden = GOLDEN["inception_formula_weights"]
    np.testing.assert_allclose(features[:, :6], golden["torch_fidelity_2048_first6_at_64"], atol=2e-4)
    np.testing.assert_allclose(
        logits[:, :4], golden["torch_fidelity_logits_unbiased_first4_at_64"], atol=2e-4
    )
