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


def models_and_sampler(clock: Clock, network: float, decode: float, sizes: list[int]) -> tuple[Any, Any]:
    """A sampler that takes ``network`` seconds a call and a decoder that takes ``decode``, whatever the
    batch.
    """

    def run(seconds: float) -> None:
        clock.now += seconds

    def sample(models: Any, inputs: int) -> int:
        sizes.append(inputs)
        run(network)
        return inputs

    teacher = SimpleNamespace(decode=lambda embeddings: run(decode))
    return SimpleNamespace(inputs=len, teacher=teacher, device="cpu"), SimpleNamespace(sample=sample)


def test_times_are_per_image_with_and_without_decoding(clock: Clock) -> None:
    sizes: list[int] = []
    models, sampler = models_and_sampler(clock, 0.03, 0.01, sizes)
    found = speed.measure(models, sampler, (4,), budget=100.0)
    assert [one.batch for one in found] == [1, 4]
    assert [one.network_ms for one in found] == pytest.approx([30.0, 7.5])
    assert [one.ms for one in found] == pytest.approx([40.0, 10.0])
    assert [one.repeats for one in found] == [speed.REPEATS, speed.REPEATS]
    assert sizes == [1] * (speed.REPEATS + 1) + [4] * (speed.REPEATS + 1)  # one warm-up each


def test_the_budget_is_kept_and_batch_one_always_measured(clock: Clock) -> None:
    models, sampler = models_and_sampler(clock, 30.0, 10.0, [])
    found = speed.measure(models, sampler, (64, 1, 16), budget=10.0)
    assert [(one.batch, one.repeats) for one in found] == [(1, 1)]
    clock.now = 0.0
    models, sampler = models_and_sampler(clock, 0.5, 0.0, [])
    found = speed.measure(models, sampler, (2, 64), budget=10.0)
    assert [one.batch for one in found] == [1, 2]
    assert clock.now < 12.0


def test_a_device_has_a_name() -> None:
    assert speed.device_name("cpu")
