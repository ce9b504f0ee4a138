"""Timing: what is measured, at which batch sizes, within which budget.

python -m pytest tests/test_speed.py
"""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline import speed


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
    """A decoder that takes ``decode`` seconds, and inputs that are their number."""

    def run(embeddings: int, student: bool) -> None:
        clock.now += decode

    return SimpleNamespace(inputs=len, decode=run, device="cpu")


def test_times_are_per_image_with_and_without_decoding(clock: Clock) -> None:
    sampler: Any = Sampling(clock, 0.03)
    found = speed.measure(models(clock, 0.01), [sampler], (4,), budget=100.0)[sampler]
    assert [one.batch for one in found] == [1, 4]
    assert [one.network_ms for one in found] == pytest.approx([30.0, 7.5])
    assert [one.ms for one in found] == pytest.approx([40.0, 10.0])
    assert [one.repeats for one in found] == [speed.REPEATS, speed.REPEATS]
    assert sampler.calls == [1] * (speed.REPEATS + 1) + [4] * (speed.REPEATS + 1)  # one warm-up each


def test_the_budget_is_kept_and_batch_one_always_measured(clock: Clock) -> None:
    slow: Any = Sampling(clock, 30.0)
    found = speed.measure(models(clock, 10.0), [slow], (64, 1, 16), budget=10.0)[slow]
    assert [(one.batch, one.repeats) for one in found] == [(1, 1)]
    clock.now = 0.0
    middling: Any = Sampling(clock, 0.5)
    found = speed.measure(models(clock, 0.0), [middling], (2, 64), budget=10.0)[middling]
    assert [one.batch for one in found] == [1, 2]
    assert clock.now < 12.0


def test_samplers_take_turns_and_a_slow_one_costs_no_other_its_repeats(clock: Clock) -> None:
    fast: Any = Sampling(clock, 0.1)
    slow: Any = Sampling(clock, 2.0)
    found = speed.measure(models(clock, 0.0), [slow, fast], (2,), budget=12.0)
    assert slow.began[1] < fast.began[1] < slow.began[2] < fast.began[2]  # after a warm-up of each
    assert [(one.batch, one.repeats) for one in found[slow]] == [(1, 2)]  # half of 12 s holds the warm-up and two
    assert [(one.batch, one.repeats) for one in found[fast]] == [(1, speed.REPEATS), (2, speed.REPEATS)]


def test_a_device_has_a_name() -> None:
    assert speed.device_name("cpu")
