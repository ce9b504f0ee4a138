"""Timing: what is measured, at which batch sizes, within which budget."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.models.conditions import Prompts
from pipeline.sampling import speed
from pipeline.sampling.speed import Speed


class Clock:
    """Seconds that pass only when a model runs."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(time, "perf_counter", made.perf_counter)
    return made


class Sampling:
    """A sampler that takes ``seconds`` a call, whatever the batch."""

    student = False
    frequencies = False

    def __init__(self, clock: Clock, seconds: float) -> None:
        self.clock, self.seconds = clock, seconds
        self.calls: list[int] = []
        self.began: list[float] = []

    def sample(self, models: Any, batch: int) -> int:
        self.calls.append(batch)
        self.began.append(self.clock.now)
        self.clock.now += self.seconds
        return batch


def models(clock: Clock, decode: float) -> Any:
    """A decoder that takes ``decode`` seconds, and inputs that are their number; samples are drawn for classes."""

    def run(embeddings: int, student: bool) -> None:
        clock.now += decode

    return SimpleNamespace(inputs=len, decode=run, device="cpu", column=np.array, encode=None)


def of_prompts(clock: Clock, decode: float, encode: Callable[[int], float]) -> Any:
    """The same with prompts, of which a text encoder takes so many seconds."""
    out = models(clock, decode)

    def run(prompts: Prompts) -> None:
        clock.now += encode(len(prompts))

    out.column, out.encode = lambda ids: np.full(len(ids), "a prompt", dtype=object), run
    return out


def test_times_are_per_image_with_and_without_decoding(clock: Clock) -> None:
    sampler: Any = Sampling(clock, 0.03)
    found = speed.measure(models(clock, 0.01), [sampler], (4,), budget=100.0)[sampler]
    assert [one.batch for one in found] == [1, 4]
    assert [one.network_ms for one in found] == pytest.approx([30.0, 7.5])
    assert [one.ms for one in found] == pytest.approx([40.0, 10.0])
    assert [len(one.rounds) for one in found] == [speed.MOST, speed.MOST]
    assert sampler.calls == [1] * (speed.MOST + 2) + [4] * (speed.MOST + 2)  # each warmed up


def test_every_sampler_is_timed_at_every_batch_however_slow(clock: Clock) -> None:
    """The teacher at the throughput batch takes many times the budget: it is called nevertheless."""
    slow: Any = Sampling(clock, 100.0)
    fast: Any = Sampling(clock, 0.1)
    found = speed.measure(models(clock, 10.0), [slow, fast], (64, 1, 16), budget=1.0)
    for one in found.values():
        assert [(size.batch, len(size.rounds)) for size in one] == [(1, 3), (16, 3), (64, 3)]
    assert speed.throughput_batch(found.values()) == 64


def test_samplers_take_turns_until_their_time_is_over(clock: Clock) -> None:
    fast: Any = Sampling(clock, 0.25)
    slow: Any = Sampling(clock, 2.0)
    found = speed.measure(models(clock, 0.0), [slow, fast], (2,), budget=18.0)
    events = sorted([(at, "slow") for at in slow.began] + [(at, "fast") for at in fast.began])
    first = [name for _, name in events[: 2 * 2 + 2 * 7]]
    assert first[:4] == ["slow", "slow", "fast", "fast"], "warmed up"
    assert first[4:10] == ["slow", "fast", "fast", "slow", "slow", "fast"], "in turns, the order turned each time"
    assert {len(one.rounds) for one in found[slow]} == {len(one.rounds) for one in found[fast]} == {6}


@pytest.mark.faults("timing: CUDA graphs are recorded in the second call")
def test_no_median_sees_a_recording(clock: Clock) -> None:
    """As with CUDA graphs: the first generation of a size is eager, the second records, the others are replayed."""

    class Recorded(Sampling):
        def sample(self, models: Any, batch: int) -> int:
            before = self.calls.count(batch)
            self.seconds = (50.0, 500.0)[before] if before < 2 else 0.5
            return super().sample(models, batch)

    sampler: Any = Recorded(clock, 0.0)
    for one in speed.measure(models(clock, 0.0), [sampler], (8,), budget=1.0)[sampler]:
        assert one.rounds == (500.0 / one.batch,) * 3
        assert one.ms == 500.0 / one.batch


@pytest.mark.faults("memory: a batch that does not fit while speed is measured")
def test_what_does_not_fit_into_memory_is_an_empty_cell(clock: Clock) -> None:
    class Large(Sampling):
        def sample(self, models: Any, batch: int) -> int:
            if batch > 4:
                raise torch.OutOfMemoryError
            return super().sample(models, batch)

    large: Any = Large(clock, 1.0)
    small: Any = Sampling(clock, 1.0)
    found = speed.measure(models(clock, 0.0), [large, small], (4, 16), budget=1.0)
    assert [[one.batch for one in found[sampler]] for sampler in (large, small)] == [[1, 4], [1, 4, 16]]
    assert speed.throughput_batch(found.values()) == 4, "the largest that all of them ran"
    row = speed.beside_teacher(found[small], found[large], 4)
    assert row["throughput_batch"] == 4
    assert speed.beside_teacher(found[small], found[large], 16).keys() == {
        *("ms", "speedup", "speedup_std", "throughput", "throughput_batch")
    }, "nothing is compared with a size that did not run"


# ---- the text encoder


def test_the_encoder_takes_turns_and_is_in_no_samplers_time(clock: Clock) -> None:
    sampler: Any = Sampling(clock, 0.03)
    found = speed.measure(of_prompts(clock, 0.01, lambda count: 0.002 + 0.001 * count), [sampler], (4,), 100.0)[sampler]
    assert [one.ms for one in found] == pytest.approx([40.0, 10.0])
    assert [len(one.encoder) for one in found] == [speed.MOST, speed.MOST]
    assert [one.encoder[0] for one in found] == pytest.approx([3.0, 1.5])
    both = speed.with_encoder(found, found)
    assert [one.ms for one in both] == pytest.approx([43.0, 11.5])
    assert [one.network_ms for one in both] == pytest.approx([33.0, 9.0])
    assert both[0].rounds == pytest.approx([43.0] * speed.MOST)
    assert speed.encoder_times(found) == [
        {"batch": 1, "ms": pytest.approx(3.0), "ms_std": pytest.approx(0, abs=1e-9)},
        {"batch": 4, "ms": pytest.approx(1.5), "ms_std": pytest.approx(0, abs=1e-9)},
    ]
    assert speed.as_json(found[0])["encoder"] == found[0].encoder


def test_of_classes_nothing_is_said_of_an_encoder(clock: Clock) -> None:
    sampler: Any = Sampling(clock, 0.03)
    found = speed.measure(models(clock, 0.01), [sampler], (), 100.0)[sampler]
    assert found[0].encoder == ()
    assert speed.as_json(found[0]).keys() == {"batch", "network_ms", "ms", "rounds"}
    assert speed.with_encoder(found, found) == speed.encoder_times(found) == []


def test_who_reads_no_prompt_waits_for_no_encoder(clock: Clock) -> None:
    class Counting(Sampling):
        frequencies = True

    teacher: Any = Sampling(clock, 0.5)
    counting: Any = Counting(clock, 0.1)
    found = speed.measure(of_prompts(clock, 0.0, lambda count: 1.0), [teacher, counting], (), 10.0)
    theirs, ours = (speed.with_encoder(found[one], found[teacher]) for one in (teacher, counting))
    assert (theirs[0].ms, ours[0].ms) == (pytest.approx(1500.0), pytest.approx(100.0))
    assert speed.speed_up(ours[0], theirs[0])[0] == pytest.approx(15.0)


def test_the_encoder_on_both_sides_has_an_error_of_its_own() -> None:
    """A machine that is slow in one round is slow for the encoder, too: rounds are added before they are compared."""
    loads = (1.0, 3.0, 1.2, 2.0, 1.1)
    ours, theirs = (
        Speed(1, 0.0, median(base * x for x in loads), tuple(base * x for x in loads), tuple(2 * x for x in loads))
        for base in (2, 10)
    )
    (mine,), (teacher,) = speed.with_encoder([ours], [theirs]), speed.with_encoder([theirs], [theirs])
    assert speed.speed_up(mine, teacher) == (pytest.approx(3.0), pytest.approx(0.0, abs=1e-12))
    assert speed.encoder_times([theirs])[0]["ms_std"] > 0.1


@pytest.mark.faults("memory: a batch of prompts that the text encoder has no room for while speed is measured")
def test_a_size_that_the_encoder_does_not_fit_is_left_out_of_its_times(clock: Clock) -> None:
    def encode(count: int) -> float:
        if count > 4:
            raise torch.OutOfMemoryError
        return 1.0

    sampler: Any = Sampling(clock, 1.0)
    found = speed.measure(of_prompts(clock, 0.0, encode), [sampler], (4, 16), 1.0)[sampler]
    assert [one.batch for one in found] == [1, 4, 16]
    assert [one.batch for one in speed.with_encoder(found, found)] == [1, 4]


# ---- ratios


def at(batch: int, *rounds: float) -> Speed:
    return Speed(batch, 0.0, sorted(rounds)[len(rounds) // 2], rounds)


def test_no_speed_up_is_of_two_batches() -> None:
    assert speed.speed_up(at(64, 2.0, 2.0, 2.0), at(64, 8.0, 8.0, 8.0)) == (4.0, 0.0)
    with pytest.raises(ValueError, match="a speed-up of batch 64 over batch 1 compares batches"):
        speed.speed_up(at(64, 2.0), at(1, 8.0))


def test_an_even_slowdown_is_no_error_and_an_uneven_one_is() -> None:
    """Rounds are drawn together: a machine that is slow in one of them is slow for both."""
    loads = (1.0, 3.0, 1.2, 2.0, 1.1)
    ours, theirs = at(1, *(2 * x for x in loads)), at(1, *(10 * x for x in loads))
    assert speed.speed_up(ours, theirs) == (5.0, pytest.approx(0.0, abs=1e-12))
    ratio, error = speed.speed_up(ours, at(1, 10.0, 11.0, 30.0, 12.0, 20.0))
    assert 0.3 < error < ratio


def test_one_size_has_no_throughput_batch() -> None:
    assert speed.throughput_batch([[at(1, 1.0)], [at(1, 1.0)]]) is None
    assert speed.throughput_batch([[at(1, 1.0), at(4, 1.0)], [at(1, 1.0), at(8, 1.0)]]) is None
    assert speed.throughput_batch([]) is None
