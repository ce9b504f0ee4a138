"""Lines of events: whole, in order, and never at the job's expense."""

from __future__ import annotations

import errno
import json
import os
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from pipeline.command_line import main, parse
from pipeline.host import events
from pipeline.host.errors import Refused, Unfinished
from pipeline.host.signals import Stopped
from pipeline.recipe import Recipe


def lines(place: Path) -> list[dict[str, Any]]:
    """What the file holds, as strict JSON."""

    def constant(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    return [json.loads(line, parse_constant=constant) for line in place.read_text().splitlines()]


def test_a_line_has_time_job_run_and_values(tmp_path: Path) -> None:
    place = tmp_path / "made" / "events.jsonl"
    events.tell("unheard")
    with events.written(str(place), job="distill", run="/runs/é"):
        events.tell("step", step=3, metrics={"loss": 0.5, "lr": float("nan")}, wide=[float("inf")])
        events.warn("warning: two\nlines")
    events.tell("unheard")
    step, warning = lines(place)
    assert step.pop("time").endswith("Z")
    assert step == {"job": "distill", "run": "/runs/é", "event": "step", "step": 3} | {
        "metrics": {"loss": 0.5, "lr": None},
        "wide": [None],
    }
    assert (warning["event"], warning["text"]) == ("warning", "two\nlines")


def test_several_logs_and_threads_share_a_file_line_by_line(tmp_path: Path) -> None:
    place = tmp_path / "events.jsonl"
    place.write_text('{"event": "before"}\n')
    logs = [events.Log(events._opened(str(place)), str(place), {"log": i}) for i in range(4)]
    threads = [
        threading.Thread(target=lambda log=log: [log.write("x", {"i": i, "text": "y" * 999}) for i in range(50)])
        for log in logs
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    before, *written = lines(place)
    assert before == {"event": "before"}, "it is added to"
    for number in range(4):
        assert [line["i"] for line in written if line["log"] == number] == list(range(50))


def test_a_line_that_a_full_disk_takes_a_part_of_is_cut_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is said once, the job goes on, and so do the lines when there is room again."""
    place, write, room = tmp_path / "events.jsonl", os.write, [10**6]

    def short(file: int, data: bytes) -> int:
        taken = min(room[0], len(data))
        if not taken:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        room[0] -= taken
        return write(file, data[:taken])

    monkeypatch.setattr(os, "write", short)
    with events.written(str(place), job="distill"):
        events.tell("first")
        room[0] = 20
        events.tell("lost")
        events.tell("lost, too")
        room[0] = 10**6
        events.tell("last")
    assert [line["event"] for line in lines(place)] == ["first", "last"]
    assert capsys.readouterr().err == f"Events are missing in {place} (No space left on device); the job goes on.\n"


@pytest.mark.parametrize(
    ("error", "ending"),
    [
        (Refused("pairs.count is 0;\nraise it."), ("failed", 2, "pairs.count is 0; raise it.")),
        (Unfinished("2 shards were not made."), ("failed", 1, "2 shards were not made.")),
        (ZeroDivisionError("by zero"), ("failed", 1, "ZeroDivisionError: by zero")),
        (Stopped(143), ("stopped", 143, "Stopped by SIGTERM.")),
        (KeyboardInterrupt(), ("stopped", 130, "Stopped by SIGINT.")),
    ],
)
def test_the_last_line_says_how_a_job_ended(tmp_path: Path, error: BaseException, ending: tuple[str, int, str]) -> None:
    place = tmp_path / "events.jsonl"
    with pytest.raises(type(error)), events.written(str(place), job="distill"):
        raise error
    (line,) = lines(place)
    assert (line["event"], line["status"], line["text"]) == ending


def test_what_cannot_be_opened_is_refused_before_the_job_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").touch()

    def job(recipe: Recipe) -> str:
        raise AssertionError("it was to be refused before")

    for place, reason in [(".", "Is a directory"), ("pipe", "No such device"), ("file/x", "File exists")]:
        monkeypatch.setattr(sys, "argv", ["distill.py", "--events", str(tmp_path / place)])
        with pytest.raises(SystemExit) as end:
            main(None, job)
        assert end.value.code == 2
        assert f"error: events is {tmp_path / place}" in (said := capsys.readouterr().err)
        assert reason in said


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        ("s3://bucket/events.jsonl", "to which no line can be added; give a path, or - for standard output."),
        ("", "events is empty"),
        ("s3:/bucket", "write s3://bucket"),
    ],
)
def test_bad_values_are_one_sentence(value: str, sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        parse(None, ["--events", value])
    assert end.value.code == 2
    assert sentence in capsys.readouterr().err


def test_standard_output_has_events_alone(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    def job(recipe: Recipe) -> str:
        print("for people")
        events.tell("shard", number=1)
        return "a table\n\nMade 8 pairs."

    monkeypatch.setattr(sys, "argv", ["jobs/distill.py", "--events", "-", "--run", "/runs/mine"])
    main(None, job)
    out, err = capfd.readouterr()
    found = [json.loads(line) for line in out.splitlines()]
    assert [line["event"] for line in found] == ["started", "shard", "finished"]
    assert {(line["job"], line["run"]) for line in found} == {("distill", "/runs/mine")}
    assert found[0]["name"] == "digits-llamagen"
    assert len(found[0]["recipe"]) == 64
    assert (found[2]["status"], found[2]["text"]) == (0, "Made 8 pairs.")
    assert err == "for people\na table\n\nMade 8 pairs.\n"


def test_what_only_prints_something_tells_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "events.jsonl"
    for flag in ("--dry_run", "--status"):
        monkeypatch.setattr(sys, "argv", ["distill.py", "--events", str(place), flag])
        main(None, lambda recipe: "costs")
    assert capsys.readouterr().out == "costs\ncosts\n"
    assert not place.exists()
