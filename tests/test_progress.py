"""pytest tests/test_progress.py: what a log and a terminal see."""

from __future__ import annotations

import sys
import time

import pytest

from pipeline.progress import Progress, duration


def test_a_log_gets_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    with Progress(10, "shards", every=30, done=4) as progress:
        for _ in range(6):
            clock[0] += 20
            progress.update(note="5 rows/s")
    assert capsys.readouterr().err.splitlines() == [
        "shards 5/10, 5 rows/s, 2 min left",
        "shards 7/10, 5 rows/s, 60 s left",
        "shards 9/10, 5 rows/s, 20 s left",
        "shards 10/10, 5 rows/s, 2 min in all",
    ]
    assert progress.seconds == 120


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


def test_durations_are_readable() -> None:
    seconds = {0.04: "0.0 s", 4.26: "4.3 s", 89: "89 s", 150: "2 min", 3599: "1 h 0 min", 7500: "2 h 5 min"}
    assert {s: duration(s) for s in seconds} == seconds
    assert duration(200_000) == "2 d 7 h"
