"""What is kept of a sampler's images: parts and the whole, rounding, thumbnails."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest
import torch

from pipeline.models.convnet import to_uint8
from pipeline.scoring import instruments
from pipeline.scoring.metrics import Moments, pixel_frechet
from pipeline.scoring.tally import Sight, Statistics, outline, spread, thumbnails
from pipeline.settings.evaluate import EvaluateSettings


def some_images(count: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed)) * 2.4 - 1.2


def statistics_of(images: torch.Tensor, labels: np.ndarray, parts: list[int], batch: int) -> Statistics:
    """Statistics of images 0.. in parts of the given sizes, each in batches, sent through bytes and
    merged.
    """
    network = instruments.features(EvaluateSettings(), "cpu")
    out, start = None, 0
    for size in parts:
        part = Statistics.empty(network, 10, 32, len(images))
        for i in range(start, start + size, batch):
            rows = np.arange(i, min(i + batch, start + size))
            part.add(Sight.of(images[rows], network), labels[rows], network, rows, np.full(len(rows), True), 4)
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
    network = instruments.features(EvaluateSettings(), "cpu")
    statistics = Statistics.empty(network, 10, 32, 4)
    statistics.add(Sight.of(some_images(4), network), None, network, np.arange(4), np.full(4, False), 0)
    assert (statistics.labelled, statistics.variance.value(), statistics.features, statistics.images) == (
        0,
        None,
        [],
        [],
    )


def drawn_for(prompts: list[str], parts: list[int], asked: bool = True) -> Statistics:
    """Statistics of images whose "logits" are all alike, of a network that finds the letter a in the prompts."""
    plain = instruments.features(EvaluateSettings(), "cpu")
    found = lambda pixels, logits, texts: np.array(["a" in text for text in texts])  # noqa: E731
    network = replace(plain, satisfied=found if asked else None)
    out, start, texts = Statistics.empty(network, 1, 32, sum(parts)), 0, np.array(prompts, dtype=object)
    for size in parts:
        part, rows = Statistics.empty(network, 1, 32, sum(parts)), np.arange(start, start + size)
        part.add(Sight.of(some_images(sum(parts))[rows], network), texts[rows], network, rows, rows < 0, 0)
        out.merge(Statistics.unpack(part.pack()))
        start += size
    return out


def test_images_that_are_what_their_prompts_name_are_counted() -> None:
    """With their own prompts, and with those half a part further on, which a part of one image does not have."""
    statistics = drawn_for(["a", "a", "b", "a", "b", "a"], [5, 1])
    assert statistics.agreement.tolist() == [[4, 6], [3, 5]]
    assert (statistics.right, statistics.labelled) == (0, 0), "prompts are no classes"
    assert drawn_for(["a"] * 4, [4], asked=False).agreement.tolist() == [[0, 0], [0, 0]]


def test_other_images_prompts_are_those_half_a_part_further_on() -> None:
    seen: list[list[str]] = []
    network = replace(
        instruments.features(EvaluateSettings(), "cpu"),
        satisfied=lambda pixels, logits, texts: seen.append(list(texts)) or np.zeros(len(texts), dtype=bool),
    )
    rows, prompts = np.arange(4), np.array(list("abcd"), dtype=object)
    statistics = Statistics.empty(network, 1, 32, 4)
    statistics.add(Sight.of(some_images(4), network), prompts, network, rows, rows < 0, 0)
    assert seen == [list("abcd"), list("cdab")]


def test_the_variance_of_images_for_prompts_is_that_of_all() -> None:
    statistics = drawn_for(list("abcdef"), [4, 2])
    pixels = thumbnails(to_uint8(some_images(6))).astype(np.float64)
    assert statistics.variance.value() == pytest.approx(pixels.var(0, ddof=1).mean(), rel=1e-9)


def test_statistics_from_before_there_were_prompts_are_read() -> None:
    new = statistics_of(some_images(6), np.arange(6), [6], 6)
    with np.load(io.BytesIO(new.pack())) as file:
        assert "agreement" not in file.files, "of classes the file is as it was"
        assert file["counts"].shape == (3,)
    assert Statistics.unpack(new.pack()).agreement.tolist() == [[0, 0], [0, 0]]


def test_an_outline_reads_seconds_and_grid_alone() -> None:
    statistics = statistics_of(some_images(6), np.arange(6), [6], 6)
    statistics.seconds = 1.5
    statistics.machines, statistics.origin = [{"host": "a"}], {"batch": 6}
    found = outline(io.BytesIO(statistics.pack()))
    assert (found.seconds, found.origin) == (1.5, {"batch": 6, "machines": [{"host": "a"}]})
    assert np.array_equal(found.images, to_uint8(some_images(6)[:4]).numpy())
    again = Statistics.unpack(statistics.pack())
    assert (again.machines, again.origin) == (statistics.machines, statistics.origin)
    again.merge(replace(statistics, machines=[{"host": "a"}, {"host": "b"}]))
    assert again.machines == [{"host": "a"}, {"host": "b"}]


def test_sums_travel_bit_for_bit() -> None:
    """Half of each matrix is sent."""
    before = statistics_of(some_images(9), np.arange(9), [9], 9)
    after = Statistics.unpack(before.pack())
    for mine, theirs in ((before.moments, after.moments), (before.pixels, after.pixels)):
        assert np.array_equal(mine.m2, theirs.m2)
        assert np.array_equal(mine.mean, theirs.mean)
    assert len(before.pack()) < 1.1 * 8 * (64 * 64 + 1024 * 1024) / 2 + 9 * 3 * 32 * 32 + 11 * 1024 * 8


@pytest.mark.parametrize(("keep", "count"), [(0, 7), (3, 7), (7, 7), (10_000, 50_000)])
def test_kept_rows_are_spread_evenly_however_they_are_cut(keep: int, count: int) -> None:
    whole = spread(np.arange(count), keep, count)
    assert whole.sum() == keep
    assert np.array_equal(
        whole, np.concatenate([spread(part, keep, count) for part in np.array_split(np.arange(count), 3)])
    )
    if keep:
        assert np.ptp(np.diff(np.flatnonzero(whole))) <= 1
        assert whole[-1], "not the first of them"


def test_spatial_features_are_summed_and_travel() -> None:
    plain = instruments.features(EvaluateSettings(), "cpu")
    network = replace(plain, spatial=5, network=lambda pixels: (*plain(pixels)[:2], pixels.flatten(1)[:, 7:12].float()))
    images, parts = some_images(9), []
    for rows in (np.arange(4), np.arange(4, 9)):
        part = Statistics.empty(network, 10, 32, 9)
        part.add(Sight.of(images[rows], network), None, network, rows, np.full(len(rows), False), 0)
        parts.append(Statistics.unpack(part.pack()))
    whole = merged(*parts).spatial
    assert whole is not None
    expected = to_uint8(images).flatten(1)[:, 7:12].double().numpy()
    np.testing.assert_allclose(whole.gaussian()[1], np.cov(expected.T), rtol=1e-12)


def test_thumbnails_are_grey_and_small() -> None:
    pixels = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    small = thumbnails(pixels)
    assert small.shape == (2, 32 * 32)
    block = pixels[1, :, 2:4, 4:6].float() / 127.5 - 1
    assert small[1, 32 * 1 + 2] == pytest.approx(block.mean().item(), abs=1e-6)


def pixel_moments(images: torch.Tensor) -> Moments:
    out = Moments(32 * 32)
    out.add(thumbnails(to_uint8(images)))
    return out


def test_pixel_distance_sees_blur() -> None:
    real = some_images(400)
    blurred = torch.nn.functional.avg_pool2d(real, 3, 1, 1)
    sets = [pixel_moments(images) for images in (real, some_images(400, 1), blurred)]
    assert pixel_frechet(sets[0], sets[0]) == pytest.approx(0, abs=1e-9)
    assert pixel_frechet(sets[2], sets[0]) > 1.5 * pixel_frechet(sets[1], sets[0]) > 0
