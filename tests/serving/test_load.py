"""Random arrivals, and what is counted of the answers to them."""

from __future__ import annotations

import asyncio
import math

import numpy as np
import pytest
from serving_app import served

from pipeline.host.errors import Outage
from pipeline.serving import load
from pipeline.serving.orders import Order, Sample
from pipeline.serving.painter import Drawn

ONE = [Sample(1, 0, 0, (1,))]


def test_arrivals_are_a_poisson_process() -> None:
    moments = load.arrivals(50.0, 200.0, seed=1)
    assert len(moments) == pytest.approx(10_000, rel=0.05)
    assert 0 < moments[0] < moments[-1] < 200
    gaps = np.diff(moments)
    assert (gaps.mean(), gaps.std()) == (pytest.approx(0.02, rel=0.05), pytest.approx(0.02, rel=0.05))
    assert np.array_equal(load.arrivals(50.0, 200.0, seed=1), moments)


def test_requests_without_an_image_take_for_ever() -> None:
    """And those of a server that falls behind are still asked when they are due."""
    open_at_once, most = 0, 0

    async def draw(order: Order) -> list[Drawn]:
        nonlocal open_at_once, most
        open_at_once, most = open_at_once + 1, max(most, open_at_once + 1)
        await asyncio.sleep(0.3)
        open_at_once -= 1
        if order.samples[0].seed == 1:
            raise Outage("too many.")
        if order.samples[0].seed == 2:
            raise RuntimeError("a fault")
        return [Drawn(np.zeros((3, 6, 6), np.uint8), 1.0, 1, 1)]

    with served(draw, dict) as address:
        found = load.open_loop(address, [Sample(1, seed, 0, (1,)) for seed in range(3)], np.array([0.0, 0.01, 0.02]))
    assert most == 3
    assert (found.refused, found.failed) == (1, 1)
    assert np.isfinite(found.seconds).tolist() == [True, False, False]
    assert 0.3 <= found.quantile(0.0) < math.inf
    assert found.quantile(0.99) == math.inf
    assert 0 < found.rate <= 1 / 0.3
    in_tenths = found.over(0.1)
    assert in_tenths.quantile(0.0) == pytest.approx(10 * found.quantile(0.0))
    assert in_tenths.rate == pytest.approx(found.rate / 10)
    assert (in_tenths.refused, in_tenths.failed) == (1, 1)


def test_clients_that_wait_ask_as_much_as_is_answered() -> None:
    open_at_once: set[int] = set()
    most = 0

    async def draw(order: Order) -> list[Drawn]:
        nonlocal most
        open_at_once.add(order.samples[0].seed)
        most = max(most, len(open_at_once))
        await asyncio.sleep(0.05)
        open_at_once.discard(order.samples[0].seed)
        if order.samples[0].seed == 1:
            raise Outage("too many.")
        return [Drawn(np.zeros((3, 6, 6), np.uint8), 1.0, 1, 1)]

    with served(draw, dict) as address:
        found = load.closed_loop(address, [Sample(1, seed, 0, (1,)) for seed in range(4)], 3, 0.5)
    assert most == 3
    assert len(found.seconds) >= 6
    assert (found.refused, found.failed) == (np.isinf(found.seconds).sum(), 0)
    assert found.refused >= 1
    assert found.seconds.min() >= 0.05


def test_a_sound_server_answers_all(server: str) -> None:
    found = load.open_loop(server, ONE, np.array([0.0, 0.0, 0.05]))
    assert np.isfinite(found.seconds).all()
    assert (len(found.seconds), found.refused, found.failed) == (3, 0, 0)
