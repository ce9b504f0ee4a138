"""What others did on a machine while something was timed."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from pipeline.host import machine
from pipeline.host.machine import Moment, Watch

# /proc/stat: user nice system idle iowait irq softirq steal guest guest_nice, in hundredths of a second
LINE = "cpu  {} 0 {} 900000 5000 0 0 {} 77 0\ncpu0 1 1 1 1 1 1 1 1 1 1\n"


@pytest.fixture
def stat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine of two cores whose clocks stand where the test puts them."""
    monkeypatch.setattr(machine, "STAT", tmp_path / "stat")
    monkeypatch.setattr(machine.os, "cpu_count", lambda: 2)
    monkeypatch.setattr(machine.os, "sysconf", lambda name: 100)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    (tmp_path / "stat").write_text(LINE.format(0, 0, 0))
    return tmp_path / "stat"


def test_what_others_took_is_all_work_but_our_own() -> None:
    start, end = Moment(10.0, 500.0, 3.0), Moment(20.0, 518.0, 12.0)
    assert machine.taken(start, end) == pytest.approx(0.9), "of 18 s of work in 10 s nine were ours"
    assert machine.taken(start, Moment(20.0, 508.9, 12.0)) == 0.0, "never below 0: the clocks differ a little"
    assert machine.taken(start, Moment(20.0, None, 12.0)) is None


@pytest.mark.faults("timing: others work on the machine")
@pytest.mark.parametrize(
    ("user", "system", "steal", "busy"), [(0, 0, 0, False), (10, 5, 0, False), (60, 0, 0, True), (0, 0, 60, True)]
)
def test_a_machine_is_busy_by_others_work_and_by_other_guests(
    stat: Path, monkeypatch: pytest.MonkeyPatch, user: int, system: int, steal: int, busy: bool
) -> None:
    at = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: at[0])
    monkeypatch.setattr(time, "process_time", lambda: 0.0)
    watch = Watch("cpu")
    at[0] = 1.0
    stat.write_text(LINE.format(user, system, steal))
    load = watch.load()
    assert load.during == pytest.approx((user + system + steal) / 100)
    assert load.busy is busy
    assert load.gpu is None


def test_a_system_that_does_not_say_is_no_quiet_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(machine, "STAT", tmp_path / "none")
    monkeypatch.setattr(machine, "BEFORE", 0.0)
    load = Watch("cpu").load()
    assert (load.before, load.during) == (None, None)
    assert load.average >= 0


def test_a_device_has_a_name() -> None:
    assert machine.device_name("cpu")
    assert machine.described("cpu").keys() == {"device", "cores"}
