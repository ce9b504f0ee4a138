"""Requests that share a batch: those that have gathered while the batch before was drawn.

Nobody waits for company, and a device that is busy gets full batches. Ray Serve's own ``serve.batch`` closes a batch
when its time is up, busy or not: without a time to wait all its batches are of one request.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor

from pipeline.serving.orders import Sample
from pipeline.serving.painter import Drawn


class Gathering:
    """What waits to be drawn by ``work``, at most ``batch`` samples at a time, in ``thread``; for one event loop."""

    def __init__(self, work: Callable[[list[Sample]], Sequence[Drawn]], batch: int, thread: Executor) -> None:
        self.work, self.batch, self.thread = work, batch, thread
        self._waiting: deque[tuple[Sample, asyncio.Future[Drawn]]] = deque()
        self._drawing: asyncio.Task[None] | None = None

    async def draw(self, sample: Sample) -> Drawn:
        """The image of a sample; raises what ``work`` raised of its batch."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Drawn] = loop.create_future()
        self._waiting.append((sample, future))
        if self._drawing is None:
            self._drawing = loop.create_task(self._draw_all())
        return await future

    async def _draw_all(self) -> None:
        """Draw until nothing waits. Who has gone meanwhile is left out."""
        try:
            while self._waiting:
                taken: list[tuple[Sample, asyncio.Future[Drawn]]] = []
                while self._waiting and len(taken) < self.batch:
                    sample, future = self._waiting.popleft()
                    if not future.done():
                        taken.append((sample, future))
                if taken:
                    await self._draw([sample for sample, _ in taken], [future for _, future in taken])
        finally:
            self._drawing = None

    async def _draw(self, samples: list[Sample], futures: list[asyncio.Future[Drawn]]) -> None:
        try:
            drawn = await asyncio.get_running_loop().run_in_executor(self.thread, self.work, samples)
        except Exception as error:
            for future in futures:
                if not future.done():
                    future.set_exception(error)
            return
        for future, one in zip(futures, drawn, strict=True):
            if not future.done():
                future.set_result(one)
