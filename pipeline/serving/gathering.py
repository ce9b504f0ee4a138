"""Requests that share a batch: those that have gathered while the batches before were drawn.

Nobody waits for company where a device is free. A busy one gets its next batch ahead of its need, once that is half
full, so that it does not wait while one comes and goes. Where a batch takes the longer the more it holds, as on a CPU,
those of a full batch that nobody else fills are drawn in two halves: the first half has its images earlier, and the
second takes along who comes meanwhile. Ray Serve's own ``serve.batch`` closes a batch when its time is up, busy or not:
without a time to wait all its batches are of one request.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence

from pipeline.host.errors import Outage
from pipeline.serving.orders import Sample
from pipeline.serving.painter import Drawn

AHEAD = 2  # batches that a device may have: the one that it draws, and the next
HALF = 2  # the part of a batch, one of so many, that has to wait before a busy device gets it, and that is drawn alone


class Gathering:
    """What waits to be drawn by ``work``, for one event loop.

    Attributes:
        work: draws at most ``batch`` samples, on the freest of ``devices`` devices.
        queue: samples that may wait, beyond those that are with a device, when more are taken.
        halved: whether half a batch is taken where less than a whole one waits.
    """

    def __init__(
        self,
        work: Callable[[list[Sample]], Awaitable[Sequence[Drawn]]],
        batch: int,
        devices: int,
        queue: int,
        halved: bool = False,
    ) -> None:
        self.work, self.batch, self.devices, self.queue, self.halved = work, batch, devices, queue, halved
        self._waiting: deque[tuple[Sample, asyncio.Future[Drawn]]] = deque()
        self._drawing: set[asyncio.Task[None]] = set()

    async def draw(self, samples: Sequence[Sample]) -> list[Drawn]:
        """Their images, in as many batches as it takes; Outage where too many wait, or what ``work`` raised."""
        self._forget_who_has_gone()
        if len(self._waiting) >= self.queue:
            raise Outage(f"{len(self._waiting):,} images wait to be drawn already; try again.")
        loop = asyncio.get_running_loop()
        futures: list[asyncio.Future[Drawn]] = [loop.create_future() for _ in samples]
        self._waiting.extend(zip(samples, futures, strict=True))
        self._hand_on()
        try:
            return list(await asyncio.gather(*futures))
        finally:
            for future in futures:  # where one has failed, nobody waits for the others
                future.cancel()

    def _hand_on(self) -> None:
        """Give the devices what they have room for: anything to one that is free, half a batch to one that is not."""
        self._forget_who_has_gone()
        while (taken := self._next()) and len(self._drawing) < self.devices * AHEAD:
            if len(self._drawing) >= self.devices and HALF * len(taken) < self.batch:
                return
            for _ in taken:
                self._waiting.popleft()
            task = asyncio.get_running_loop().create_task(self._draw(taken))
            self._drawing.add(task)
            task.add_done_callback(self._done)

    def _next(self) -> list[tuple[Sample, asyncio.Future[Drawn]]]:
        """The head of the queue: a batch, or what there is, or half a batch of that."""
        most = -(-self.batch // HALF) if self.halved and len(self._waiting) < self.batch else self.batch
        return [self._waiting[i] for i in range(min(most, len(self._waiting)))]

    def _forget_who_has_gone(self) -> None:
        if any(future.done() for _, future in self._waiting):
            self._waiting = deque(one for one in self._waiting if not one[1].done())

    def _done(self, task: asyncio.Task[None]) -> None:
        self._drawing.discard(task)
        self._hand_on()

    async def _draw(self, taken: list[tuple[Sample, asyncio.Future[Drawn]]]) -> None:
        try:
            drawn = await self.work([sample for sample, _ in taken])
        except Exception as error:
            for _, future in taken:
                if not future.done():
                    future.set_exception(error)
            return
        for (_, future), one in zip(taken, drawn, strict=True):
            if not future.done():
                future.set_result(one)
