"""What a job has to tell a server that may be slow, hung or gone: a queue, and a thread that empties it in order.

Whoever puts something in never waits. What cannot be delivered is kept and tried again at the end, for which there is a
bounded wait. What waits takes a bounded part of memory: beyond it, the oldest of what may be lost is.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from typing import Any

TRIES = 2  # of a call at the end
PAUSE = 15.0  # seconds that a server is left alone after a call that failed
JOINED = 1000  # items of one kind that go out in one call
ROOM = 64 << 20  # bytes that may wait

Send = Callable[[list[Any]], object]


@dataclass(eq=False)
class Call:
    """``send(items)`` is to be called; ``number`` is its place in the order, ``size`` the bytes that it holds.

    ``tries`` counts those at the end only.
    """

    number: int
    send: Send
    items: list[Any]
    size: int
    lossy: bool
    tries: int = 0


class Outbox:
    """A queue of calls and the thread that makes them.

    ``failed`` is told of the first call that fails, ``full`` is called when the first one is dropped for want of room.
    """

    def __init__(self, failed: Callable[[Exception], None], full: Callable[[], None]) -> None:
        self._failed, self._full = failed, full
        self._pending: deque[Call] = deque()
        self._kept: list[Call] = []  # that failed once
        self._making: Call | None = None
        self._size, self._lost, self._said, self._dropped = 0, 0, False, False
        self._resume = 0.0  # the time at which the server is spoken to again
        self._advanced = 0.0  # the time at which a call last succeeded
        self._closing = False
        self._numbers = count()
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="outbox", daemon=True)

    def put(self, send: Send, items: list[Any] | None = None, size: int = 0, lossy: bool = False) -> None:
        """Have ``send(items)`` called when its turn comes, in one call with what of its kind waits just before it."""
        items = items or []
        with self._changed:
            last = self._pending[-1] if self._pending else None
            if items and last and last.send == send and len(last.items) + len(items) <= JOINED:
                last.items += items
                last.size += size
            else:
                self._pending.append(Call(next(self._numbers), send, items, size, lossy))
            self._size += size
            full = self._make_room()
            if self._thread.ident is None:
                self._thread.start()
            self._changed.notify_all()
        if full:
            self._full()

    @property
    def lost(self) -> int:
        """Calls that were dropped, or that failed again at the end."""
        return self._lost

    def close(self, patience: float) -> int:
        """Make what is left as long as a call succeeds every ``patience`` seconds; returns how many were not made."""
        with self._changed:
            if self._thread.ident is None:
                return self._lost
            self._closing, self._advanced = True, time.monotonic()
            self._pending = deque(sorted([*self._kept, *self._pending], key=lambda call: call.number))
            self._kept = []
            self._changed.notify_all()
            while self._pending or self._making:
                left = self._advanced + patience - time.monotonic()
                if left <= 0:
                    break
                self._changed.wait(left)
            missing = self._lost + len(self._pending) + (self._making is not None)
            self._pending.clear()
        return missing

    def _make_room(self) -> bool:
        """Drop the oldest that may be lost until the rest fits; whether that happened for the first time."""
        before = self._dropped
        while self._size > ROOM:
            waiting = self._kept if any(call.lossy for call in self._kept) else self._pending
            oldest = next((call for call in waiting if call.lossy), None)
            if oldest is None:
                break
            waiting.remove(oldest)
            self._size -= oldest.size
            self._lost += 1
            self._dropped = True
        return self._dropped and not before

    def _work(self) -> None:
        """The thread."""
        while (call := self._next()) is not None:
            try:
                call.send(call.items)
            except Exception as error:  # whatever the server's client raises
                self._keep(call, error)
            else:
                with self._changed:
                    self._size -= call.size
                    self._making, self._advanced = None, time.monotonic()
                    self._changed.notify_all()

    def _next(self) -> Call | None:
        """Wait for the next call to make; None when there will be no more."""
        with self._changed:
            while not self._closing:
                now = time.monotonic()
                if self._pending and now >= self._resume:
                    break
                self._changed.wait(self._resume - now if now < self._resume else None)
            if not self._pending:
                return None
            self._making = self._pending.popleft()
            return self._making

    def _keep(self, call: Call, error: Exception) -> None:
        with self._changed:
            first, self._said = not self._said, True
            call.tries += self._closing
            if not self._closing:
                self._kept.append(call)
            elif call.tries < TRIES:
                self._pending.appendleft(call)
            else:
                self._lost += 1
                self._size -= call.size
            self._making, self._resume = None, time.monotonic() + PAUSE
            self._changed.notify_all()
        if first:
            self._failed(error)
