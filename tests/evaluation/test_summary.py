"""From statistics to numbers: what each needs, and what is left out without it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pipeline.evaluation import rows
from pipeline.evaluation.rows import Entry, Reference, numbers
from pipeline.report import comparison
from pipeline.sampling.speed import Speed
from pipeline.scoring.metrics import (
    ClassVariance,
    InceptionScore,
    Moments,
    frechet,
    jackknife,
    kid,
    precision_recall,
)
from pipeline.scoring.tally import Statistics

RNG = np.random.default_rng(0)
OF_ROWS = ("score_std", "score_inf", "precision", "recall", "kid", "kid_std")


def statistics(shift: float, count: int = 60, blocks: int = 1, keep: bool = True, spatial: bool = True) -> Statistics:
    """Of random images with 4 features, 3 spatial ones, 64 pixels and 2 classes."""
    out = Statistics(Moments(4), Moments(64), ClassVariance(2, 64), InceptionScore(blocks, 3))
    features = (RNG.normal(size=(count, 4)) + shift).astype(np.float32)
    out.moments.add(features)
    out.pixels.add(RNG.normal(size=(count, 64)))
    out.score.add(RNG.normal(size=(count, 3)), np.arange(count) * blocks // count)
    if spatial:
        out.spatial = Moments(3)
        out.spatial.add(RNG.normal(size=(count, 3)) + 2 * shift)
    out.features = [features[:20], features[20:]] if keep else []
    return out


def row_of(sampler: Statistics, reference: Reference) -> dict[str, Any]:
    return numbers([Entry("DD 1 step", "FewStep", {}, 1, sampler)], reference)[-1]


def test_every_number_is_that_of_the_metric() -> None:
    real, sampler = statistics(0.0), statistics(0.5, blocks=5)
    assert real.spatial is not None
    assert sampler.spatial is not None
    row = row_of(sampler, Reference(real.moments.gaussian(), real, real.spatial.gaussian()))
    mine, theirs = np.concatenate(sampler.features), np.concatenate(real.features)
    assert row["sfid"] == frechet(sampler.spatial.gaussian(), real.spatial.gaussian())
    assert (row["kid"], row["kid_std"]) == kid(mine, theirs)
    found = jackknife(mine, sampler.moments, real.moments.gaussian(), np.arange(60))
    assert found is not None
    assert (row["score_std"], row["score_inf"]) == (found.error, found.limit)
    assert (row["precision"], row["recall"]) == precision_recall(mine, theirs)
    assert row["inception_score_std"] == pytest.approx(sampler.score.scores().std(ddof=1) / np.sqrt(5))
    assert row["score"] == frechet(sampler.moments.gaussian(), real.moments.gaussian())


def test_features_that_were_not_kept_leave_their_numbers_out() -> None:
    real = statistics(0.0)
    row = row_of(statistics(0.5, keep=False), Reference(real.moments.gaussian(), real))
    assert [row[name] for name in OF_ROWS] == [None] * 6
    assert row["score"] > 0
    assert row["inception_score_std"] is None, "of one block"


def test_a_reference_without_images_gives_distances_and_their_error_alone() -> None:
    real = statistics(0.0)
    row = row_of(statistics(0.5), Reference(real.moments.gaussian(), None))
    assert row["score_std"] > 0
    assert row["score_inf"] < row["score"]
    assert [row[name] for name in ("precision", "recall", "kid", "kid_std", "pixel_score", "sfid")] == [None] * 6


def test_spatial_statistics_of_one_side_alone_are_no_distance() -> None:
    real = statistics(0.0)
    assert real.spatial is not None
    reference = Reference(real.moments.gaussian(), real, real.spatial.gaussian())
    assert row_of(statistics(0.5, spatial=False), reference)["sfid"] is None


def test_three_images_have_no_precision() -> None:
    real = statistics(0.0)
    row = row_of(statistics(0.5, count=3), Reference(real.moments.gaussian(), real))
    assert (row["precision"], row["recall"], row["score_std"]) == (None, None, None)
    assert row["kid"] is not None


def test_a_short_last_block_weighs_as_its_images_and_has_no_part_in_the_error() -> None:
    """ADM's evaluator counts it like the others, and fewer images score lower."""
    score, logits = InceptionScore(6, 3), RNG.normal(size=(110, 3)) * 2
    score.add(logits, np.arange(110) // 20)
    blocks = score.scores()
    assert score.n[-1] == 10
    assert score.value() == pytest.approx((20 * blocks[:5].sum() + 10 * blocks[5]) / 110)
    assert score.error() == pytest.approx(blocks[:5].std(ddof=1) / np.sqrt(5))


def test_the_digits_scorer_gives_neither_inception_score_nor_precision() -> None:
    real = statistics(0.0)
    row = row_of(statistics(0.5), Reference(real.moments.gaussian(), real, of_digits=True))
    assert [row[key] for key in ("inception_score", "inception_score_std", "precision", "recall")] == [None] * 4
    assert row["kid"] is not None


def test_fewer_features_than_images_make_a_smaller_error_than_their_own() -> None:
    sampler, reference = statistics(0.5), Reference(statistics(0.0).moments.gaussian(), None)
    kept = statistics(0.5)
    sampler.features = kept.features
    sampler.moments.merge(kept.moments)
    alone, among = (row_of(one, reference) for one in (kept, sampler))
    assert among["score_std"] == pytest.approx(alone["score_std"] / np.sqrt(2))
    assert among["score_inf"] == pytest.approx(alone["score_inf"])


def test_rows_that_cannot_be_told_apart_are_named() -> None:
    rows = [
        ("a", 10.0, 0.5),
        ("b", 10.4, 0.1),
        ("c", 10.6, None),
        ("d", 20.0, 0.1),
        ("e", 20.25, None),
        ("f", None, None),
    ]
    named = [{"name": name, "score": score, "score_std": error} for name, score, error in rows]
    assert comparison.alike(named) == [("d", "e"), ("a", "b")], "the nearest first"


def test_samplers_are_looked_at_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """What reads half a gigabyte a sampler is not asked for the next before this one is done."""
    alive: list[int] = []
    real = statistics(0.0)

    def entries() -> Any:
        for i in range(3):
            alive.append(i)
            yield Entry(f"sampler {i}", "FewStep", {}, 1, statistics(0.5))

    seen: list[list[int]] = []
    monkeypatch.setattr(rows, "_of_features", lambda *args: seen.append(list(alive)) or ({}, None))
    assert len(numbers(entries(), Reference(real.moments.gaussian(), real))) == 4
    assert seen == [[0], [0, 1], [0, 1, 2]]


def test_a_row_of_prompts_has_its_pace_with_the_encoder_on_both_sides_too() -> None:
    real = statistics(0.0)
    ar = [Speed(batch, 40.0, 40.0, (40.0,) * 3, (10.0,) * 3) for batch in (1, 64)]
    mine = [Speed(batch, 5.0, 5.0, (5.0,) * 3, (5.0,) * 3) for batch in (1, 64)]
    entry = Entry("DD 1 step", "FewStep", {}, 1, statistics(0.5), mine)
    row = numbers([entry], Reference(real.moments.gaussian(), None), ar, 64)[-1]
    assert (row["ms"], row["speedup"], row["throughput_speedup"]) == (5.0, 8.0, 8.0)
    pace = row["with_encoder"]
    assert (pace["ms"], pace["speedup"], pace["speedup_std"]) == (10.0, 5.0, 0.0)
    assert (pace["throughput"], pace["throughput_batch"], pace["throughput_speedup"]) == (100.0, 64.0, 5.0)
