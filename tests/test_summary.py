"""From statistics to numbers: what each needs, and what is left out without it.

python -m pytest tests/test_summary.py
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pipeline import summary
from pipeline.metrics import ClassVariance, InceptionScore, Moments, frechet, frechet_error, kid, precision_recall
from pipeline.summary import Entry, Reference
from pipeline.tally import Statistics

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
    return summary.numbers([Entry("DD 1 step", "FewStep", {}, 1, sampler)], reference)[-1]


def test_every_number_is_that_of_the_metric() -> None:
    real, sampler = statistics(0.0), statistics(0.5, blocks=3)
    assert real.spatial is not None
    assert sampler.spatial is not None
    row = row_of(sampler, Reference(real.moments.gaussian(), real, real.spatial.gaussian()))
    mine, theirs = np.concatenate(sampler.features), np.concatenate(real.features)
    assert row["sfid"] == frechet(sampler.spatial.gaussian(), real.spatial.gaussian())
    assert (row["kid"], row["kid_std"]) == kid(mine, theirs)
    assert (row["score_std"], row["score_inf"]) == frechet_error(mine, sampler.moments, real.moments.gaussian())
    assert (row["precision"], row["recall"]) == precision_recall(mine, theirs)
    assert row["inception_score_std"] == pytest.approx(sampler.score.scores().std())
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


def test_samplers_are_looked_at_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """What reads half a gigabyte a sampler is not asked for the next before this one is done."""
    alive: list[int] = []
    real = statistics(0.0)

    def entries() -> Any:
        for i in range(3):
            alive.append(i)
            yield Entry(f"sampler {i}", "FewStep", {}, 1, statistics(0.5))

    seen: list[list[int]] = []
    monkeypatch.setattr(summary, "_of_rows", lambda *args: seen.append(list(alive)) or {})
    assert len(summary.numbers(entries(), Reference(real.moments.gaussian(), real))) == 4
    assert seen == [[0], [0, 1], [0, 1, 2]]
