"""pytest tests/host/test_behind.py"""

from __future__ import annotations

import threading

import pytest

from pipeline.host.behind import Behind


def fail() -> None:
    raise ArithmeticError("the disk is full")


def test_calls_are_made_while_the_body_goes_on_and_are_done_after_it() -> None:
    going, done = threading.Event(), list[int]()
    with Behind(1, 4) as behind:
        behind.call(going.wait, 10)
        for i in range(3):
            behind.call(done.append, i)
        assert not done, "the body waits for nobody"
        going.set()
    assert done == [0, 1, 2]


def test_a_slow_disk_holds_its_feeder_back() -> None:
    going, fed = threading.Event(), list[int]()

    def feed() -> None:
        with Behind(1, 2) as behind:
            for i in range(5):
                behind.call(going.wait, 10)
                fed.append(i)

    feeder = threading.Thread(target=feed)
    feeder.start()
    feeder.join(0.2)
    assert fed == [0, 1]
    going.set()
    feeder.join(10)
    assert fed == [0, 1, 2, 3, 4]


def test_what_a_call_raises_is_raised() -> None:
    with pytest.raises(ArithmeticError, match="the disk is full"), Behind(1, 2) as behind:
        behind.call(fail)
    seen = 0
    with pytest.raises(ArithmeticError, match="the disk is full"), Behind(1, 1) as behind:
        for _ in range(10):
            behind.call(fail)
            seen += 1
    assert seen == 1, "the next call says it already"


def test_a_body_that_raises_has_the_first_word_and_what_waits_is_left() -> None:
    going, done = threading.Event(), list[int]()

    def body() -> None:
        with Behind(1, 4) as behind:
            behind.call(going.wait, 0.2)
            behind.call(done.append, 1)
            raise KeyError("stopped")

    with pytest.raises(KeyError, match="stopped"):
        body()
    assert not done
