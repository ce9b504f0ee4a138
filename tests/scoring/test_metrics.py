"""Streaming statistics and distances."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.scoring.metrics import (
    BUFFER,
    ClassVariance,
    InceptionScore,
    Moments,
    frechet,
    jackknife,
    kid,
    mmd2,
    pixel_frechet,
    precision_recall,
)

GOLDEN = json.loads((Path(__file__).parents[1] / "goldens" / "eval.json").read_text())


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


@pytest.mark.parametrize(("block", "key"), [(200, "inception_score_1_block"), (50, "inception_score_blocks_of_50")])
def test_inception_score_has_the_golden_value(block: int, key: str) -> None:
    score = InceptionScore(200 // block, 10)
    for i in range(0, 200, 32):
        rows = np.arange(i, min(i + 32, 200))
        score.add(golden_logits()[rows], rows // block)
    assert score.value() == pytest.approx(GOLDEN[key], abs=1e-10)
    if block == 50:
        assert score.scores().std() == pytest.approx(GOLDEN["inception_score_std_blocks_of_50"], abs=1e-10)


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("block", [37, 1_000])
def test_precision_and_recall_have_the_golden_values(k: int, block: int) -> None:
    assert precision_recall(GENERATED, REAL, k, block) == pytest.approx(GOLDEN[f"precision_recall_k{k}"], abs=1e-12)


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


def test_pixel_distance_is_that_of_the_leading_components() -> None:
    """Pixels that differ in a direction in which real images hardly vary are not seen, others are."""
    rng = np.random.default_rng(2)
    scale = np.r_[np.full(50, 5.0), np.full(10, 0.01)]
    real, other = rng.normal(size=(2, 3_000, 60)) * scale
    other[:, 55] += 100.0
    assert pixel_frechet(moments(real), moments(real)) == pytest.approx(0, abs=1e-9)
    floor = pixel_frechet(moments(other), moments(real))
    other[:, 7] += 5.0
    assert pixel_frechet(moments(other), moments(real)) == pytest.approx(25.0 + floor, rel=0.1)


# ---- KID


def test_kid_has_the_golden_values() -> None:
    assert kid(GENERATED, REAL, subsets=10, size=100) == pytest.approx(GOLDEN["kid_10_subsets_of_100"], abs=1e-12)
    x, y = GENERATED.astype(np.float64), REAL.astype(np.float64)
    assert mmd2(x, y) == pytest.approx(GOLDEN["kid_all_rows"], abs=1e-12)
    assert mmd2(x[:160], y) == pytest.approx(GOLDEN["kid_first_160_of_both"], abs=1e-12)


def test_kid_of_few_images_takes_smaller_subsets() -> None:
    mean, deviation = kid(GENERATED[:20], REAL[:20], subsets=3)
    assert mean == pytest.approx(mmd2(GENERATED[:20].astype(np.float64), REAL[:20].astype(np.float64)), abs=1e-12)
    assert deviation == pytest.approx(0, abs=1e-12)


def test_kid_of_one_distribution_is_unbiased() -> None:
    rows = np.random.default_rng(0).normal(size=(2, 400, 8)).astype(np.float32)
    mean, deviation = kid(rows[0], rows[1], subsets=50, size=200)
    assert abs(mean) < deviation


# ---- the error and the limit of a distance


def test_a_part_taken_out_leaves_the_rest() -> None:
    rows = GENERATED.astype(np.float64)
    rest = moments(rows).without(moments(rows[40:90]))
    expected = np.concatenate([rows[:40], rows[90:]])
    assert rest.n == 150
    np.testing.assert_allclose(rest.gaussian()[0], expected.mean(0), rtol=1e-12)
    np.testing.assert_allclose(rest.gaussian()[1], np.cov(expected.T), atol=1e-14)


def frechet_error(*args: Any) -> tuple[float, float] | None:
    """Error and limit of a jackknife."""
    found = jackknife(*args)
    return found and (found.error, found.limit)


def test_error_and_limit_equal_a_slow_jackknife() -> None:
    """Ten distances without a tenth of the rows each, two passes every time."""
    reference = (REAL.mean(0, dtype=np.float64), np.cov(REAL.astype(np.float64).T))
    distances = []
    for group in (np.arange(200)[k::10] for k in range(10)):
        rest = np.delete(GENERATED.astype(np.float64), group, axis=0)
        distances.append(frechet((rest.mean(0), np.cov(rest.T)), reference))
    whole = frechet((GENERATED.mean(0, dtype=np.float64), np.cov(GENERATED.astype(np.float64).T)), reference)
    found = frechet_error(GENERATED, moments(GENERATED), reference, np.arange(200))
    assert found is not None
    assert found[0] == pytest.approx(np.sqrt(9 * np.var(distances)), rel=1e-8)
    assert found[1] == pytest.approx(10 * whole - 9 * np.mean(distances), rel=1e-8)


def test_error_and_limit_are_those_of_many_draws() -> None:
    """200 draws of 600 rows: their spread, and a limit that has lost the bias of finite sets."""
    rng, dim, reference = np.random.default_rng(0), 12, (np.zeros(12), np.eye(12))
    drawn = rng.normal(0.1, 1.1, (200, 600, dim))
    scores = [frechet(moments(rows, 600).gaussian(), reference) for rows in drawn]
    found = np.array([frechet_error(rows, moments(rows, 600), reference, np.arange(600)) for rows in drawn])
    true = dim * (0.1**2 + 0.1**2)
    assert found[:, 0].mean() == pytest.approx(np.std(scores), rel=0.15)
    assert np.mean(scores) - true > 0.05
    assert found[:, 1].mean() == pytest.approx(true, abs=0.01)


def test_too_few_rows_have_no_error() -> None:
    reference = (np.zeros(16), np.eye(16))
    assert frechet_error(GENERATED[:31], moments(GENERATED[:31]), reference, np.arange(31)) is None
    assert frechet_error(GENERATED[:32], moments(GENERATED[:32]), reference, np.arange(32)) is not None
    for classes, given in ((40, True), (41, False), (1000, False)):  # five whole rounds, four and a part, none
        found = frechet_error(GENERATED, moments(GENERATED), reference, np.arange(200) // classes)
        assert (found is not None) is given, classes


@pytest.mark.parametrize(("classes", "count"), [(100, 500), (100, 1_050), (1_000, 5_000)])
def test_the_error_of_balanced_classes_is_the_spread_of_draws(classes: int, count: int) -> None:
    """Images are balanced by class, so draws differ by less than groups in which classes are missing would."""
    rng, dim = np.random.default_rng(0), 6
    means, ids = 3 * rng.normal(size=(classes, dim)), np.arange(count)
    reference, scores, found = (np.ones(dim), 9 * np.eye(dim)), [], []
    for _ in range(60):
        rows = means[ids % classes] + 1.1 * rng.normal(size=(count, dim))
        total = moments(rows, count)
        scores.append(frechet(total.gaussian(), reference))
        found.append(frechet_error(rows, total, reference, ids // classes))
    errors, limits = np.array(found).T
    assert 0.8 < errors.mean() / np.std(scores, ddof=1) < 1.3
    true = frechet((means.mean(0), np.cov(means.T, bias=True) + 1.21 * np.eye(dim)), reference)
    assert abs(limits.mean() - true) < 3 * np.std(limits) / np.sqrt(60)


# ---- differences of pairs


@pytest.mark.parametrize(("common", "ratio"), [(0.98, 0.5), (0.6, 1.0), (0.0, 1.2)])
def test_the_error_of_a_difference_is_the_spread_of_draws_of_pairs(common: float, ratio: float) -> None:
    """60 draws of two sets whose rows have a share of their noise in common, all of them and none: the error is the
    spread of the differences, and far below that of independent rows only where the rows are pairs.
    """
    rng, dim, count, reference = np.random.default_rng(1), 4, 400, (np.zeros(4), np.eye(4))
    apart, errors, independent = [], [], []
    for _ in range(60):
        shared, one, other = rng.normal(size=(3, count, dim))
        first = 1.2 * (np.sqrt(common) * shared + np.sqrt(1 - common) * one) + 0.3
        second = 1.25 * (np.sqrt(common) * shared + np.sqrt(1 - common) * other) + 0.25
        found = [jackknife(rows, moments(rows, count), reference, np.arange(count)) for rows in (first, second)]
        scores = [frechet(reference, moments(rows, count).gaussian()) for rows in (first, second)]
        assert found[0]
        assert found[1]
        both = found[0].minus(found[1])
        assert both
        apart.append(scores[0] - scores[1])
        errors.append(both.error)
        independent.append(np.hypot(found[0].error, found[1].error))
    assert 0.8 < np.mean(errors) / np.std(apart, ddof=1) < 1.25
    assert np.mean(errors) / np.mean(independent) < ratio
    if not common:
        assert np.mean(errors) == pytest.approx(np.mean(independent), rel=0.1)


def test_the_jackknife_of_a_difference_equals_a_slow_one_that_leaves_pairs_out() -> None:
    rng, reference, ids = np.random.default_rng(2), (np.zeros(3), np.eye(3)), np.arange(105)
    first = rng.normal(size=(105, 3))
    second, groups = 1.1 * first + 0.1, [ids[ids // 2 % 10 == k] for k in range(10)]  # rounds of two; the last has one

    def distance(rows: np.ndarray) -> float:
        return frechet((rows.mean(0), np.cov(rows.T)), reference)

    whole, n = distance(first) - distance(second), len(ids)
    rest = [np.delete(ids, group) for group in groups]
    left_out = np.array([distance(first[keep]) - distance(second[keep]) for keep in rest])
    times = np.array([n / len(group) for group in groups])
    pseudo = times * whole - (times - 1) * left_out
    limit = 10 * whole - ((1 - 1 / times) * left_out).sum()
    found = [jackknife(rows, moments(rows), reference, ids // 2) for rows in (first, second)]
    assert found[0]
    assert found[1]
    both = found[0].minus(found[1])
    assert both
    assert both.error == pytest.approx(np.sqrt(((pseudo - limit) ** 2 / (times - 1)).mean()), rel=1e-7)
    assert both.limit == pytest.approx(limit, rel=1e-7)


def test_rows_of_other_groups_are_no_pairs() -> None:
    rows, reference = GENERATED[:, :3].astype(np.float64), (np.zeros(3), np.eye(3))
    one = jackknife(rows, moments(rows), reference, np.arange(200))
    other = jackknife(rows, moments(rows), reference, np.arange(200) // 3)
    assert one
    assert other
    assert one.minus(other) is None
