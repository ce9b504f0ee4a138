"""pytest tests/test_pool.py: replicas that lose their device, hang or cannot start, and storages that do not answer."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import faulty
import pytest
from tiny import tiny, with_pairs

from pipeline import cluster, generate, manifest, pairs, pool
from pipeline.errors import Outage, Refused, Unfinished
from pipeline.pool import Outcome, Pool
from pipeline.progress import Progress
from pipeline.recipe import Recipe


class Noted(Progress):
    """Keeps the lines that are said."""

    def __init__(self, total: int) -> None:
        super().__init__(total, "shards")
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)

    def having(self, words: str) -> list[str]:
        return [line for line in self.lines if words in line]


def run(recipe: Recipe, progress: Noted, **more: Any) -> list[Outcome]:
    """Make all shards of the recipe's set on the session's Ray."""
    known = manifest.facts_of(recipe)
    manifest.claim(recipe.pairs_uri, known, recipe)
    with cluster.session(recipe, recipe.pairs.actors):
        todo = list(range(progress.total))
        outcomes = []
        for outcome in generate.commits(recipe, known, recipe.pairs.count, todo, progress, **more):
            outcomes.append(outcome)
            progress.update()
        return outcomes


@pytest.mark.faults("pairs: a device that is lost for ever", "pairs: no CPU beside the replicas")
def test_one_ill_replica_costs_no_shard(ray_cluster: str, tmp_path: Path) -> None:
    """Its process is replaced, fails again and is sent off; and the replicas have taken all CPUs there are."""
    recipe = with_pairs(tiny(tmp_path, "llamagen"), count=40, shard_rows=1, batch=1, actors=2)
    recipe = replace(recipe, cluster=replace(recipe.cluster, cpus=2))  # of four
    progress = Noted(40)
    outcomes = run(recipe, progress, replica=faulty.Poisoned, folder=str(tmp_path))
    assert sorted(outcome.number for outcome in outcomes if outcome.shard) == list(range(40))
    assert manifest.committed(recipe.pairs_uri).keys() == {f"shard-{k:05d}.parquet" for k in range(40)}
    assert len(progress.having("CUDA error: an illegal memory access")) == 1, "it is named once"
    assert len(progress.having("lost its device and gets a new process")) == 1
    assert len(progress.having("lost it again and gets no more work; 1 of 2 replicas go on")) == 1
    assert all(outcome.shard.host for outcome in outcomes if outcome.shard)


@pytest.mark.faults("pairs: a replica that hangs", "pairs: a replica that cannot start at first")
def test_a_replica_that_hangs_or_cannot_start_holds_nothing_up(
    ray_cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What hangs is named, with its node, and taken away when it is over the limit; here the clock is put forward."""
    recipe = with_pairs(tiny(tmp_path, "llamagen"), count=4, shard_rows=1, batch=1, actors=2)
    recipe = replace(recipe, cluster=replace(recipe.cluster, heartbeat_minutes=0.001, stall_minutes=360))
    clock, ahead = time.monotonic, [0.0]
    monkeypatch.setattr(pool.time, "monotonic", lambda: clock() + ahead[0])
    monkeypatch.setattr(pool, "TICK", 0.1)

    class Patient(Noted):
        def say(self, line: str) -> None:
            super().say(line)
            if line.startswith("3/4 shards; shard 1 in work since"):
                ahead[0] = 7 * 3600

    progress = Patient(4)
    outcomes = run(recipe, progress, replica=faulty.Hangs, folder=str(tmp_path))
    assert sorted(outcome.number for outcome in outcomes if outcome.shard) == [0, 1, 2, 3]
    (line,) = progress.having("could not start")
    assert "429: too many requests" in line
    assert " on node 1" in progress.having("3/4 shards; shard 1 in work since")[0]
    assert len(progress.having("shard 1 is taken from replica")) == 1
    assert pairs.load_shard(recipe.pairs_uri, manifest.facts_of(recipe), "shard-00001.parquet").ids.tolist() == [1]


@pytest.mark.faults("pairs: another recipe takes the folder")
def test_a_folder_that_is_lost_ends_the_work_at_once(ray_cluster: str, tmp_path: Path) -> None:
    """And with it whatever else the storage says that waiting does not change."""
    recipe = with_pairs(tiny(tmp_path, "llamagen"), count=4, shard_rows=1, batch=1, actors=1)
    other = with_pairs(recipe, seed=5)

    class Robbed(Noted):
        def begin(self, abreast: int) -> None:
            super().begin(abreast)
            if not manifest.committed(recipe.pairs_uri):
                manifest.claim(recipe.pairs_uri, manifest.facts_of(other), other)

    with pytest.raises(Refused, match=r"is another one's now: seed is 5 there and 1 here; somebody else works in it"):
        run(recipe, Robbed(4))
    assert not manifest.committed(recipe.pairs_uri)


# ---- without Ray


@pytest.fixture
def idle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pool:
    """A pool of a recipe with two replicas, which has started nobody."""
    recipe = with_pairs(tiny(tmp_path), count=64, actors=2, patience_hours=1)
    monkeypatch.setattr(Pool, "_start", lambda own, seat: own._end(seat))
    return Pool(recipe, manifest.facts_of(recipe), 64, [0, 1, 2, 3], Noted(4))


@pytest.mark.faults("pairs: storage does not answer for longer than it is waited for")
def test_patience_ends(idle: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(pool.time, "monotonic", lambda: clock[0])
    idle.finished |= {3, 4}
    for moment in (0.0, 1800.0, 3600.0):
        clock[0] = moment
        idle._wait_for_storage(Outage("s3://b/x could not be written; run the same command again later."))
    (line,) = idle.progress.lines  # type: ignore[attr-defined]
    assert line.startswith("s3://b/x could not be written")
    assert "It is tried again until it answers, for 1 h 0 min at most" in line
    clock[0] = 3601.0
    with pytest.raises(Unfinished, match=r"longer than pairs\.patience_hours, so that 2 finished shards are lost"):
        idle._wait_for_storage(Outage("s3://b/x could not be written."))


def test_a_shard_fails_when_another_replica_has_failed_it(idle: Pool) -> None:
    idle._add_seat()
    idle._add_seat()
    one, other = idle.seats
    idle.queue.clear()
    assert idle._failed(one, 2, "ArithmeticError") is None
    assert list(idle.queue) == [2]
    one.up, other.up, other.shard, begun = True, True, 1, []
    idle._begin = lambda seat, number: begun.append((seat.number, number))  # type: ignore[method-assign]
    idle._hand_out()
    assert begun == [], "it waits for the other one"
    other.shard = None
    idle._hand_out()
    assert begun == [(2, 2)]
    assert idle._failed(other, 2, "ArithmeticError") == Outcome(2, error="ArithmeticError")


def test_a_shard_that_costs_both_their_device_is_to_blame_itself(idle: Pool) -> None:
    idle._add_seat()
    idle._add_seat()
    one, other = idle.seats
    idle._strike(one, "CUDA error")
    assert idle._failed(one, 2, "CUDA error", device_lost=True) is None
    idle._strike(one, "CUDA error")
    assert one.off
    idle._failed(one, 3, "CUDA error", device_lost=True)
    idle._strike(other, "CUDA error")
    assert idle._failed(other, 3, "CUDA error", device_lost=True) == Outcome(3, error="CUDA error")
    assert not one.off
    assert (one.strikes, other.strikes) == (1, 0)


def test_nobody_left_is_one_sentence(idle: Pool) -> None:
    idle._add_seat()
    idle._add_seat()
    for seat in idle.seats:
        for _ in range(pool.STRIKES):
            idle._strike(seat, "CUDA error")
    with pytest.raises(Unfinished, match="no replica is left: all 2 lost their device again in a new process"):
        idle._hand_out()
