"""What gathers while a batch is drawn is the next one."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import cast

import numpy as np
import pytest

from pipeline.host.errors import Outage
from pipeline.serving.desk import About, Desk
from pipeline.serving.gathering import Gathering
from pipeline.serving.orders import Sample
from pipeline.serving.painter import Drawn
from pipeline.serving.service import Service


class Brush:
    """Draws when it is let, and remembers its batches."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.let = asyncio.Event()

    async def __call__(self, samples: Sequence[Sample]) -> list[Drawn]:
        self.batches.append([sample.seed for sample in samples])
        await self.let.wait()
        await asyncio.sleep(0.01)
        if any(sample.seed == 13 for sample in samples):
            raise ValueError("thirteen")
        return [Drawn(np.full((3, 1, 1), sample.seed, np.uint8), 1.0, len(samples), 8) for sample in samples]


def sample(seed: int) -> Sample:
    return Sample(3, seed, 0, (1,))


def gathered(
    brush: Brush, seeds: range, gone: Sequence[int] = (), devices: int = 1, halved: bool = False
) -> list[int | str]:
    """One request after the other, and none is drawn before the last has come; of each its pixel, or the error."""

    async def ask() -> list[list[Drawn] | BaseException]:
        gathering = Gathering(brush, 8, devices, 64, halved)
        tasks = []
        for seed in seeds:
            tasks.append(asyncio.create_task(gathering.draw([sample(seed)])))
            await asyncio.sleep(0)
        for seed in gone:
            tasks[seed].cancel()
        await asyncio.sleep(0)
        brush.let.set()
        return await asyncio.gather(*tasks, return_exceptions=True)

    found = asyncio.run(ask())
    return [int(one[0].pixels[0, 0, 0]) if isinstance(one, list) else type(one).__name__ for one in found]


def test_a_busy_device_gets_half_a_batch_ahead_and_then_full_ones_and_everybody_their_own() -> None:
    brush = Brush()
    assert gathered(brush, range(12)) == list(range(12))
    assert brush.batches == [[0], [1, 2, 3, 4], [5, 6, 7, 8, 9, 10, 11]]


def test_each_device_has_one_batch_and_one_ahead() -> None:
    brush = Brush()
    gathered(brush, range(30), devices=2)
    assert [len(batch) for batch in brush.batches] == [1, 1, 4, 4, 8, 8, 4]


def test_what_is_less_than_a_batch_is_halved_where_that_is_sooner() -> None:
    brush = Brush()
    assert gathered(brush, range(25), halved=True) == [*range(13), *["ValueError"] * 8, 21, 22, 23, 24]
    assert brush.batches == [[0], [1, 2, 3, 4], [*range(5, 13)], [*range(13, 21)], [21, 22, 23, 24]]
    assert gathered(brush := Brush(), range(12), halved=True) == list(range(12))
    assert brush.batches == [[0], [1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11]]


@pytest.mark.parametrize(("device", "halved"), [("cpu", True), ("cuda", False)])
def test_halves_are_for_devices_that_take_half_the_time(device: str, halved: bool) -> None:
    desk = Desk(Service("student", device=device), cast(About, None), {"student": Brush()})
    assert desk._gatherings["student"].halved is halved


def test_less_than_half_a_batch_waits_until_a_device_is_free() -> None:
    brush = Brush()
    gathered(brush, range(4))
    assert brush.batches == [[0], [1, 2, 3]]


def test_who_has_gone_is_left_out() -> None:
    brush = Brush()
    found = gathered(brush, range(4), gone=[2])
    assert found == [0, 1, "CancelledError", 3]
    assert brush.batches == [[0], [1, 3]]


def test_an_error_is_that_of_its_batch_alone() -> None:
    brush = Brush()
    found = gathered(brush, range(25))
    assert found == [*range(13), *["ValueError"] * 8, 21, 22, 23, 24]


@pytest.mark.parametrize("count", [1, 8, 9])
def test_what_comes_together_is_drawn_together(count: int) -> None:
    brush = Brush()
    brush.let.set()

    async def ask() -> list[Drawn]:
        return await Gathering(brush, 8, 1, 64).draw([sample(seed) for seed in range(count)])

    assert [int(one.pixels[0, 0, 0]) for one in asyncio.run(ask())] == list(range(count))
    assert [len(batch) for batch in brush.batches] == ([count] if count <= 8 else [8, 1])


def test_where_one_of_a_request_fails_the_others_are_not_drawn() -> None:
    brush = Brush()

    async def ask() -> None:
        gathering = Gathering(brush, 8, 1, 64)
        asked = asyncio.create_task(gathering.draw([sample(seed) for seed in range(13, 77)]))
        await asyncio.sleep(0)
        other = asyncio.create_task(gathering.draw([sample(77)]))
        await asyncio.sleep(0)
        brush.let.set()
        with pytest.raises(ValueError, match="thirteen"):
            await asked
        await other

    asyncio.run(ask())
    assert brush.batches[-1] == [77]
    assert not any(76 in batch for batch in brush.batches)


def test_what_a_failed_request_left_in_the_queue_keeps_nobody_out() -> None:
    """While another batch of it is still with the device, as when a replica dies and its batch goes to another."""
    brush, stuck = Brush(), asyncio.Event()
    brush.let.set()

    async def work(samples: list[Sample]) -> list[Drawn]:
        if samples[0].seed == 21:
            await stuck.wait()
        return await brush(samples)

    async def ask() -> None:
        gathering = Gathering(work, 8, 1, 4)
        with pytest.raises(ValueError, match="thirteen"):
            await gathering.draw([sample(seed) for seed in range(13, 77)])
        later = asyncio.create_task(gathering.draw([sample(77)]))
        await asyncio.sleep(0)
        stuck.set()
        assert len(await later) == 1

    asyncio.run(ask())


def test_a_full_queue_takes_no_more_until_it_is_shorter() -> None:
    """One request may be longer than the queue: it is taken whole, or not at all."""
    brush = Brush()

    async def ask() -> None:
        gathering = Gathering(brush, 8, 1, 4)
        first = asyncio.create_task(gathering.draw([sample(20 + seed) for seed in range(20)]))  # 16 are with the device
        await asyncio.sleep(0)
        with pytest.raises(Outage, match="4 images wait to be drawn already; try again"):
            await gathering.draw([sample(40)])
        brush.let.set()
        assert len(await first) == 20
        assert len(await gathering.draw([sample(41)])) == 1

    asyncio.run(ask())
