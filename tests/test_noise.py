"""The stream that everything random starts from must never change."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats
from scipy.special import ndtr

from pipeline import noise

PINNED_NORMALS = [[[47336, 16618, 12376], [14943, 47666, 46088]], [[14430, 16522, 47041], [48668, 12724, 14815]]]
PINNED_UNIFORMS = [[0.7516101348328031, 0.9542084747804752], [0.9539100108106259, 0.36067239091555126]]
PINNED_CHOICES = [1, 1, 2, 3, 3, 4, 4, 4]
PINNED_DIGEST = "986b0e505c9d7afe"


def test_the_stream_is_pinned() -> None:
    """Values of the first release: a change here makes every stored pair set unreadable."""
    drawn = noise.gaussian(1, [0, 12345], 2, 3)
    assert drawn.dtype == np.float16
    assert drawn.view(np.uint16).tolist() == PINNED_NORMALS
    assert noise.uniform(1, [0, 12345], 2).tolist() == PINNED_UNIFORMS
    assert noise.choice(1, range(8), 3, 5).tolist() == PINNED_CHOICES
    assert noise.digest(1, 16, 4).startswith(PINNED_DIGEST)


def test_weighted_choices_are_as_often_as_their_weights() -> None:
    drawn = noise.choice(1, range(30_000), 3, 3, (2, 1, 5))
    assert np.bincount(drawn) / len(drawn) == pytest.approx([2 / 8, 1 / 8, 5 / 8], abs=0.01)
    assert np.array_equal(noise.choice(1, [7, 5], 3, 3, (2, 1, 5)), drawn[[7, 5]])
    assert np.array_equal(noise.choice(1, range(999), 3, 4, (3, 3, 3, 3)), noise.choice(1, range(999), 3, 4))


def test_a_sample_does_not_depend_on_its_batch() -> None:
    whole = noise.gaussian(7, range(20), 5, 4)
    for i in (0, 3, 19):
        assert np.array_equal(noise.gaussian(7, [i], 5, 4)[0], whole[i])
    assert np.array_equal(noise.gaussian(7, [19, 3], 5, 4), whole[[19, 3]])
    assert np.array_equal(noise.uniform(7, [4], 9)[0], noise.uniform(7, range(5), 9)[4])


def test_seeds_ids_and_streams_are_independent() -> None:
    assert not np.array_equal(noise.gaussian(1, [0], 8, 4), noise.gaussian(2, [0], 8, 4))
    assert not np.array_equal(noise.gaussian(1, [0], 8, 4), noise.gaussian(0, [1], 8, 4))
    rows = noise.gaussian(1, range(400), 8, 4).reshape(400, -1).astype(np.float64)
    between_rows = np.corrcoef(rows)[np.triu_indices(400, 1)]
    assert abs(between_rows.mean()) < 0.005
    uniform = noise.uniform(1, range(400), 32)
    assert abs(np.corrcoef(rows.ravel(), uniform.ravel())[0, 1]) < 0.03


def test_normals_are_normal_and_uniforms_uniform() -> None:
    drawn = noise.gaussian(3, range(300), 16, 8).astype(np.float64).ravel()
    # Rounding to float16 moves the distribution function by less than 2e-4: far below the test's resolution.
    assert stats.kstest(drawn, "norm").pvalue > 1e-3
    assert abs(drawn.mean()) < 0.02
    assert abs(drawn.std() - 1) < 0.02
    uniform = noise.uniform(3, range(300), 128)
    assert stats.kstest(uniform.ravel(), "uniform").pvalue > 1e-3
    assert uniform.min() > 0
    assert uniform.max() < 1


def test_the_open_unit_never_gives_an_infinite_normal() -> None:
    ends = noise._open_unit(np.array([0, 2**64 - 1], dtype=np.uint64))
    assert (ends > 0).all()
    assert (ends < 1).all()
    assert np.isfinite(noise.ndtri(ends)).all()


def test_what_is_looked_up_is_what_the_inverse_cdf_gives() -> None:
    """Bit for bit: at random, at both ends of every cell, and on either side of where float16 rounds to another."""
    cells = np.arange(1 << noise.LEADING, dtype=np.uint64) << np.uint64(64 - noise.LEADING)
    halves = np.arange(0x4900, dtype=np.uint16).view(np.float16).astype(np.float64)  # 0 to 10
    between = (halves[1:] + halves[:-1]) / 2
    steps = (ndtr(np.concatenate([-between, between])) * 2**52).astype(np.int64)[:, None] + np.arange(-1, 2)
    steps = np.clip(steps, 0, 2**52 - 1).ravel().astype(np.uint64) << np.uint64(12)
    drawn = noise._bits(4, range(40), noise.GAUSSIAN, 5_000)
    for bits in (drawn.ravel(), cells, cells - np.uint64(1), steps):
        found = np.empty(len(bits), np.uint16)
        noise._look_up(bits, found)
        assert np.array_equal(found, noise.ndtri(noise._open_unit(bits)).astype(np.float16).view(np.uint16))
    assert (noise._halves() == noise.UNSETTLED).mean() == pytest.approx(0.13, abs=0.01)
    exact = noise.ndtri(noise._open_unit(noise._bits(7, range(20), noise.GAUSSIAN, 20)))
    for dtype in ("float16", "float32"):
        assert np.array_equal(noise.gaussian(7, range(20), 5, 4, dtype), exact.astype(dtype).reshape(20, 5, 4))


def test_noise_survives_float16_exactly() -> None:
    drawn = noise.gaussian(5, range(50), 16, 8)
    assert np.array_equal(drawn.astype(np.float32).astype(np.float16), drawn)


def test_float32_is_the_same_noise_rounded_less() -> None:
    fine, coarse = noise.gaussian(5, range(50), 16, 8, "float32"), noise.gaussian(5, range(50), 16, 8)
    assert fine.dtype == np.float32
    assert np.array_equal(fine.astype(np.float16), coarse)
    assert 1e-5 < np.abs(fine - coarse).max() < 2e-3
    assert noise.digest(5, 16, 8, "float32") != noise.digest(5, 16, 8)


def test_labels_are_balanced() -> None:
    labels = noise.labels(range(30), 10)
    assert labels.dtype == np.int64
    assert (np.bincount(labels) == 3).all()
    assert noise.labels([2**63 + 5], 10).tolist() == [(2**63 + 5) % 10]


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_a_seed_out_of_range_is_refused(seed: int) -> None:
    with pytest.raises(ValueError, match="the seed is"):
        noise.gaussian(seed, [0], 1, 1)
