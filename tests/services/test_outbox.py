"""A queue whose server works, hangs, fails once or for good."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest

from pipeline.services import outbox
from pipeline.services.outbox import Outbox


class Server:
    """What an outbox speaks to: notes what it was sent, unless ``trouble`` has something to raise for it."""

    def __init__(self) -> None:
        self.got: list[Any] = []
        self.said: list[str] = []
        self.trouble: Callable[[Any], Exception | None] = lambda what: None
        self.outbox = Outbox(lambda error: self.said.append(str(error)), lambda: self.said.append("full"))

    def take(self, items: list[Any]) -> None:
        if error := self.trouble(items):
            raise error
        self.got.append(items)

    def put(self, *items: Any, **more: Any) -> None:
        """One call for each item: another function every time, so that none is joined to the one before."""
        for item in items:
            self.outbox.put(lambda some: self.take(some), [item], **more)


@pytest.fixture
def server() -> Server:
    return Server()


@pytest.fixture
def hung(server: Server) -> Server:
    """Its first call does not come back before the test ends."""
    entered, leave = threading.Event(), threading.Event()

    def hang(items: list[Any]) -> None:
        entered.set()
        leave.wait()

    server.outbox.put(hang)
    entered.wait()
    yield server  # type: ignore[misc]
    leave.set()


def test_calls_are_made_in_order_and_those_of_one_kind_together(hung: Server) -> None:
    for step in range(3):
        hung.outbox.put(hung.take, [step])
    hung.put("tag")
    hung.outbox.put(hung.take, [3])
    assert [call.items for call in hung.outbox._pending] == [[0, 1, 2], ["tag"], [3]]


def test_the_end_waits_for_what_is_left(server: Server) -> None:
    server.put(*range(50))
    assert server.outbox.close(60) == 0
    assert server.got == [[n] for n in range(50)]


@pytest.mark.faults("MLflow: one call fails")
def test_what_failed_is_made_at_the_end_in_its_place(server: Server) -> None:
    failed = threading.Event()

    def once(items: list[Any]) -> Exception | None:
        if items == [1] and not failed.is_set():
            failed.set()
            return OSError("gone")
        return None

    server.trouble = once
    server.put(0, 1)
    failed.wait()
    server.put(2, 3)
    assert server.outbox.close(60) == 0
    assert server.got == [[0], [1], [2], [3]]
    assert server.said == ["gone"]


def test_what_fails_for_good_keeps_nothing_else_back(server: Server) -> None:
    server.trouble = lambda items: ValueError("never") if items == [1] else None
    server.put(0, 1, 2)
    assert server.outbox.close(60) == 1
    assert server.got == [[0], [2]]
    assert server.said == ["never"], "said once"


@pytest.mark.faults("MLflow: hangs")
def test_a_hung_server_costs_a_bounded_wait(hung: Server) -> None:
    hung.put(1, 2)
    assert hung.outbox.close(0.01) == 3, "the one that hangs is missing, too"
    assert hung.got == []


def test_beyond_its_room_the_oldest_that_may_be_lost_is(hung: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox, "ROOM", 100)
    hung.put("tag", size=20)
    hung.put(1, 2, 3, 4, size=30, lossy=True)
    assert [call.items[0] for call in hung.outbox._pending] == ["tag", 3, 4]
    assert hung.said == ["full"]
    assert hung.outbox.lost == 2
