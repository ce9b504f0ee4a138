"""Shards that are late: who is given which, and that one copy alone is committed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import faulty
import pytest
from tiny import tiny, with_pairs

from pipeline import storage
from pipeline.pairs import commits, manifest, passes, stragglers
from pipeline.pairs.facts import PairFacts
from pipeline.pairs.manifest import Gap
from pipeline.pairs.replica import Replica
from pipeline.pairs.stragglers import ORIGINAL, SPARE, Book
from pipeline.services.parts import Crew
from tests.pairs.test_passes import Noted, run, worker


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(stragglers.time, "monotonic", lambda: now[0])
    return now


def test_the_oldest_is_copied_once_when_it_takes_longer_than_the_others(clock: list[float]) -> None:
    book = Book()
    assert book.late() is None, "nothing was begun"
    for number in range(4):
        book.begin(number, 16 + number)
    clock[0] = 100.0
    assert book.late() == (SPARE, 0), "nobody knows how long one takes"
    clock[0] = 10.0
    book.end(0)
    book.begin(4, 16)
    assert book.late() == (SPARE, 0)
    clock[0] = 10 * stragglers.LATE
    assert book.late() == (1, 17)
    assert book.late() == (2, 18)
    book.end(3)
    assert book.late() == (SPARE, 0), "the last one is not late yet"
    book.begin(1, 17)  # its process died
    book.end(4)
    assert book.late() is None, "all are made, or made twice"


def test_what_has_failed_is_not_copied(clock: list[float]) -> None:
    book = Book()
    book.begin(0, 16)
    book.begin(1, 16)
    book.end(0)
    clock[0] = 1000.0
    book.end(1)
    assert book.late() is None


def test_the_first_copy_that_asks_is_written_as_often_as_it_is_asked_for() -> None:
    book = Book()
    assert [book.claim(3, copy) for copy in (ORIGINAL, 1, ORIGINAL, 1)] == [True, False, True, False]
    assert book.claim(4, 1)


class Local:
    """A ``Stragglers`` whose book is in this process; ``given`` is what its spare tasks get."""

    def __init__(self, *given: tuple[int, int]) -> None:
        self.book, self.given = Book(), list(given)
        self.begin, self.end, self.claim = self.book.begin, self.book.end, self.book.claim

    def wait(self) -> tuple[int, int] | None:
        return self.given.pop(0) if self.given else None


class Quiet:
    """An ``Announcer`` that nobody hears."""

    def __init__(self) -> None:
        self.units: list[str] = []

    def working(self, unit: str) -> Any:
        self.units.append(unit)
        return pytest.MonkeyPatch.context()

    def pause(self) -> None: ...

    def go_on(self, number: int, about: str) -> None: ...


def task(number: int, rows: int, copy: int) -> dict[str, Any]:
    return {"number": [number], "rows": [rows], "copy": [copy]}


def test_a_spare_task_makes_what_is_late_and_one_copy_is_written(tmp_path: Path) -> None:
    """Though the copies differ, as they might on other hardware."""
    recipe = with_pairs(tiny(tmp_path, "llamagen"), count=32, shard_rows=16)
    facts, uri, heard = PairFacts.of(recipe), recipe.pairs_uri, list[dict[str, float]]()
    manifest.claim(uri, facts, recipe)
    made = worker(recipe)
    made.stragglers, made.announcer = both = Local((1, 16)), Quiet()  # type: ignore[assignment]
    first = made(task(1, 16, ORIGINAL))
    second = made(task(SPARE, 0, 1))
    assert both[1].units == ["shard 1", "a second copy of shard 1"]
    assert second.drop(["copy"]).equals(first.drop(["copy"]))
    elsewhere = worker(with_pairs(recipe, seed=5))
    elsewhere.stragglers, elsewhere.announcer = both
    other = elsewhere(task(1, 16, ORIGINAL))
    assert not other.equals(first)
    write = (uri, facts, 0.0, both[1], both[0], heard.append)
    row = commits.commit(second, *write)
    assert row["number"] == [1]
    before = storage.read_bytes(f"{uri}/shard-00001.parquet")
    late = commits.commit(other, *write)
    assert (late["number"], late["shard"], late["error"]) == ([SPARE], [""], [""])
    assert storage.read_bytes(f"{uri}/shard-00001.parquet") == before
    assert len(heard) == 1, "and counted once"
    nothing = made(task(SPARE, 0, 1))
    assert (nothing["number"], nothing["shard"], nothing["error"]) == ([SPARE], [""], [""])


def test_a_copy_that_fails_is_no_failure_of_the_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What becomes of the first copy decides."""
    recipe = with_pairs(tiny(tmp_path, "llamagen"), count=32, shard_rows=16)
    made = worker(recipe)
    made.stragglers, made.announcer = Local((1, 16)), Quiet()  # type: ignore[assignment]

    def fail(number: int, count: int) -> Any:
        raise ArithmeticError("odd")

    monkeypatch.setattr(made.replica, "rows", fail)
    assert made(task(SPARE, 0, 1))["number"] == [SPARE]
    assert made(task(1, 16, ORIGINAL))["error"][0].startswith("ArithmeticError")


@pytest.mark.parametrize(("again", "copies"), [(False, [ORIGINAL, 1, 2]), (True, [ORIGINAL] * 3)])
def test_every_copy_of_a_later_pass_may_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, again: bool, copies: list[int]
) -> None:
    """The first to come may be from a machine that cannot write; a spare's is one of two that work."""
    recipe = with_pairs(tiny(tmp_path, "llamagen"), count=16, shard_rows=16)
    given = list[list[dict[str, int]]]()

    def from_items(tasks: list[dict[str, int]], **options: Any) -> None:
        given.append(tasks)
        raise StopAsyncIteration

    monkeypatch.setattr(passes.ray.data, "from_items", from_items)
    monkeypatch.setattr(passes, "beside_driver", lambda cls: None)
    gap, nothing = Gap.among((), PairFacts.of(recipe), 16), Quiet()
    with pytest.raises(StopAsyncIteration):
        next(passes._rows(recipe, gap, nothing, Crew(3, 3), Replica, {}, [0], again))  # type: ignore[arg-type]
    assert [task["copy"] for task in given[0]] == copies


@pytest.mark.faults("pairs: a replica that is slower than the others")
def test_a_pass_does_not_wait_for_a_slow_replica(ray_cluster: str, tmp_path: Path) -> None:
    """Shard 1 would take an hour where it is begun first, and no limit ends that."""
    recipe = with_pairs(tiny(tmp_path, "llamagen"), count=6, shard_rows=1, batch=1, actors=2)
    outcomes = run(recipe, Noted(6), replica=faulty.Hangs, folder=str(tmp_path))
    assert sorted(outcome.number for outcome in outcomes if outcome.shard) == list(range(6))
    assert (tmp_path / "hung").exists()
    assert len(manifest.committed(recipe.pairs_uri)) == 6
