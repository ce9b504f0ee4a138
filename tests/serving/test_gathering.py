"""What gathers while a batch is drawn is the next one."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from pipeline.serving.gathering import Gathering
from pipeline.serving.orders import Sample
from pipeline.serving.painter import Drawn


class Brush:
    """Draws when it is let, and remembers its batches."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.let = threading.Event()

    def __call__(self, samples: Sequence[Sample]) -> list[Drawn]:
        self.let.wait(30)
        self.batches.append([sample.seed for sample in samples])
        if any(sample.seed == 13 for sample in samples):
            raise ValueError("thirteen")
        return [Drawn(np.full((3, 1, 1), sample.seed, np.uint8), 1.0, len(samples)) for sample in samples]


def gathered(brush: Brush, seeds: range, gone: Sequence[int] = ()) -> list[int | str]:
    """The first alone, the others while it is drawn; of each its pixel, or the error."""

    async def ask() -> list[Drawn | BaseException]:
        with ThreadPoolExecutor(1) as thread:
            gathering = Gathering(brush, 8, thread)
            tasks = []
            for seed in seeds:
                tasks.append(asyncio.create_task(gathering.draw(Sample(3, seed, 0, (1,)))))
                await asyncio.sleep(0)  # it waits now, and the first is being drawn
                await asyncio.sleep(0)
            for seed in gone:
                tasks[seed].cancel()
            await asyncio.sleep(0)
            brush.let.set()
            return await asyncio.gather(*tasks, return_exceptions=True)

    return [int(one.pixels[0, 0, 0]) if isinstance(one, Drawn) else type(one).__name__ for one in asyncio.run(ask())]


def test_a_busy_device_gets_full_batches_and_everybody_their_own() -> None:
    brush = Brush()
    assert gathered(brush, range(12)) == list(range(12))
    assert brush.batches == [[0], [1, 2, 3, 4, 5, 6, 7, 8], [9, 10, 11]]


def test_who_has_gone_is_left_out() -> None:
    brush = Brush()
    found = gathered(brush, range(5), gone=[2])
    assert found == [0, 1, "CancelledError", 3, 4]
    assert brush.batches == [[0], [1, 3, 4]]


def test_an_error_is_that_of_its_batch_alone() -> None:
    brush = Brush()
    found = gathered(brush, range(20))
    assert found == [*range(9), *["ValueError"] * 8, 17, 18, 19]


@pytest.mark.parametrize("count", [1, 8, 9])
def test_what_comes_at_once_is_drawn_at_once(count: int) -> None:
    brush = Brush()
    brush.let.set()

    async def ask() -> None:
        with ThreadPoolExecutor(1) as thread:
            gathering = Gathering(brush, 8, thread)
            await asyncio.gather(*(gathering.draw(Sample(3, seed, 0, (1,))) for seed in range(count)))

    asyncio.run(ask())
    assert [len(batch) for batch in brush.batches] == ([count] if count <= 8 else [8, 1])
