"""Calls made behind the caller's back, in threads: files are written while the next images are drawn."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any


class Behind:
    """``with Behind(4, 16) as behind: behind.call(write, data)``: in 4 threads, 16 calls begun or waiting at most.

    ``call`` waits where there are more, so that a slow disk holds its feeder back and memory stays bounded. What a call
    raises is raised by a later ``call`` or when the body ends; a body that raises itself has the first word.
    """

    def __init__(self, threads: int, most: int) -> None:
        self._pool, self._most = ThreadPoolExecutor(threads), most
        self._calls: deque[Future[Any]] = deque()

    def call(self, function: Callable[..., Any], *args: Any) -> None:
        """Have ``function(*args)`` called; raises what an earlier call has raised."""
        while self._calls and (len(self._calls) >= self._most or self._calls[0].done()):
            self._calls.popleft().result()
        self._calls.append(self._pool.submit(function, *args))

    def __enter__(self) -> Behind:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=True, cancel_futures=error is not None)
        if error is None:
            for call in self._calls:
                call.result()
