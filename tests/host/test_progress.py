"""What a log and a terminal see."""

from __future__ import annotations

import sys
import time

import pytest

from pipeline.host.progress import Progress, duration, pace


def test_a_log_gets_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    with Progress(10, "shards", every=30, done=4) as progress:
        for _ in range(6):
            clock[0] += 20
            progress.update(note="5 rows/s")
    assert capsys.readouterr().err.splitlines() == [
        "shards 5/10, 5 rows/s",
        "shards 7/10, 5 rows/s, 60 s left",
        "shards 9/10, 5 rows/s, 20 s left",
        "shards 10/10, 5 rows/s, 2 min in all",
    ]
    assert progress.seconds == 120


def test_time_left_counts_from_the_first_unit_and_leaves_out_the_slow_first_ones(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An hour for nodes; then two at once, of which each takes 100 s at first and 20 s from then on."""
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    with Progress(20, "shards", every=0) as progress:
        clock[0] = 3600
        for abreast in (1, 2):
            progress.begin(abreast)
        for moment in (3700, 3700, 3720, 3720):
            clock[0] = moment
            progress.update(note="fine")
            progress.begin(2)
    assert capsys.readouterr().err.splitlines() == [
        "shards 1/20, fine",  # the second is nearly done, which one alone does not say
        "shards 2/20, fine, 15 min left",
        "shards 3/20, fine, 11 min left",
        "shards 4/20, fine, 3 min left",
    ]
    assert progress.seconds == 120


def test_steps_that_waited_for_workers_promise_no_hours(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Workers take a minute to come, and then ten steps a second."""
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    with Progress(1200, "steps", every=0) as progress:
        for moment in (61, 62, 63):
            clock[0] = moment
            progress.update(10)
    assert capsys.readouterr().err.splitlines() == [
        "steps 10/1,200",
        "steps 20/1,200, 2 min left",
        "steps 30/1,200, 2 min left",
    ]


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with Progress(2, "shards") as progress:
        progress.update(note="9 rows/s")
        progress.say("shard 1 failed")
        progress.update(note="8 rows/s")
    printed = capsys.readouterr().err
    assert "shards 2/2 |" in printed
    assert "8 rows/s" in printed
    assert "shard 1 failed\n" in printed


def test_a_slow_pace_is_not_zero() -> None:
    assert [pace(rate) for rate in (1520.4, 10, 8.44, 0.0171, 0)] == ["1,520", "10", "8.4", "0.017", "0"]


def test_durations_are_readable() -> None:
    seconds = {0.04: "0.0 s", 4.26: "4.3 s", 89: "89 s", 150: "2 min", 3599: "1 h 0 min", 7500: "2 h 5 min"}
    assert {s: duration(s) for s in seconds} == seconds
    assert duration(200_000) == "2 d 7 h"
