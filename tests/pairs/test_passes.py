"""Replicas that lose their device, hang or cannot start; storages that do not answer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import faulty
import pytest
import torch
from tiny import tiny, with_pairs

from pipeline.host.errors import Outage, Refused
from pipeline.host.progress import Progress
from pipeline.models.graphs import Graphs
from pipeline.pairs import commits, manifest, passes, shards
from pipeline.pairs.facts import PairFacts
from pipeline.pairs.manifest import Gap
from pipeline.pairs.passes import Failure, Outcome, ReplicaWorker, Verdicts
from pipeline.pairs.replica import Replica
from pipeline.pairs.rows import Rows
from pipeline.recipe import Recipe
from pipeline.services import cluster, heartbeat


class Noted(Progress):
    """Keeps the lines that are said."""

    def __init__(self, total: int) -> None:
        super().__init__(total, "shards")
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)


def run(recipe: Recipe, progress: Progress, **more: Any) -> list[Outcome]:
    """Make all shards of the recipe's set on the session's Ray."""
    facts = PairFacts.of(recipe)
    manifest.claim(recipe.pairs_uri, facts, recipe)
    with cluster.session(recipe, recipe.pairs.actors):
        outcomes = []
        for outcome in passes.commits(recipe, Gap.among((), facts, recipe.pairs.count), progress, **more):
            outcomes.append(outcome)
            progress.update()
        return outcomes


@pytest.mark.faults("pairs: a device that is lost for ever", "pairs: no CPU beside the replicas")
@pytest.mark.slow
def test_one_ill_replica_costs_no_shard(
    ray_cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Its process is replaced and fails again, for ever; and the replicas have taken all CPUs there are."""
    monkeypatch.setattr(passes, "DEATHS", 1)
    monkeypatch.setattr(heartbeat, "LOOK", 0.1)
    recipe = with_pairs(tiny(tmp_path, "llamagen"), count=12, shard_rows=1, batch=1, actors=2)
    recipe = replace(recipe, cluster=replace(recipe.cluster, cpus=2))  # of four
    outcomes = run(recipe, Noted(12), replica=faulty.Poisoned, folder=str(tmp_path))
    assert sorted(outcome.number for outcome in outcomes if outcome.shard) == list(range(12))
    assert manifest.committed(recipe.pairs_uri).keys() == {f"shard-{k:05d}.parquet" for k in range(12)}
    assert capfd.readouterr().err.count("lost its device and gets a new process") == 1, "it is named once"
    assert all(outcome.shard.host for outcome in outcomes if outcome.shard)


@pytest.mark.faults("pairs: a replica that hangs", "pairs: a replica that cannot start at first")
@pytest.mark.slow
def test_a_replica_that_hangs_or_cannot_start_holds_nothing_up(
    ray_cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """What hangs is named, with its node, and taken away when it is over the limit; nobody else could make it."""
    monkeypatch.setattr(heartbeat, "LOOK", 0.1)
    recipe = with_pairs(tiny(tmp_path, "llamagen"), count=4, shard_rows=1, batch=1, actors=1)
    recipe = replace(recipe, cluster=replace(recipe.cluster, heartbeat_minutes=0.02, stall_minutes=0.2))
    outcomes = run(recipe, Noted(4), replica=faulty.Hangs, folder=str(tmp_path))
    assert sorted(outcome.number for outcome in outcomes if outcome.shard) == [0, 1, 2, 3]
    said = capfd.readouterr().err
    assert "429: too many requests" in said
    assert "/4 shards; shard 1 in work since" in said
    assert "another process gets it" in said
    assert shards.load_shard(recipe.pairs_uri, PairFacts.of(recipe), "shard-00001.parquet").ids.tolist() == [1]


@pytest.mark.faults("pairs: another recipe takes the folder")
def test_a_folder_that_is_lost_ends_the_work_at_once(ray_cluster: str, tmp_path: Path) -> None:
    """And with it whatever else the storage says that waiting does not change."""
    recipe = with_pairs(tiny(tmp_path, "llamagen"), count=4, shard_rows=1, batch=1, actors=1)
    other = with_pairs(recipe, seed=5)
    facts = PairFacts.of(recipe)
    with pytest.raises(Refused, match=r"is another one's now: seed is 5 there and 1 here; somebody else works in it"):
        manifest.claim(recipe.pairs_uri, PairFacts.of(other), other)
        with cluster.session(recipe, 1):
            list(passes.commits(recipe, Gap.among((), facts, 4), Noted(4)))
    assert not manifest.committed(recipe.pairs_uri)


# ---- without Ray


@pytest.mark.faults("pairs: storage does not answer for longer than it is waited for")
def test_patience_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, said = [0.0], list[str]()
    monkeypatch.setattr(commits.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(commits.time, "sleep", lambda seconds: clock.__setitem__(0, clock[0] + seconds))

    def write() -> str:
        if clock[0] < 1800:
            raise Outage("s3://b/x could not be written.")
        return "written"

    assert commits.patiently(write, 1.0, said.append) == "written"
    assert said[0].startswith("s3://b/x could not be written. It is tried again until it answers, for 1 h 0 min")
    clock[0] = 0.0
    with pytest.raises(Outage):
        commits.patiently(write, 0.25, said.append)


def test_a_shard_fails_when_another_replica_has_failed_it() -> None:
    verdicts = Verdicts([0, 1, 2])
    assert verdicts.after({0}, {1: "ArithmeticError"}, whole=True) == []
    assert verdicts.missing == [1, 2]
    assert verdicts.after({2}, {1: "ArithmeticError"}, whole=True) == [Outcome(1, error="ArithmeticError")]
    assert verdicts.missing == []


def test_a_shard_whose_processes_die_is_left_as_long_as_others_are_made() -> None:
    verdicts = Verdicts([0, 1, 2])
    assert verdicts.after(set(), {}, whole=True) == [], "new processes may do better"
    assert verdicts.after({0}, {}, whole=True) == []
    assert verdicts.after({1}, {}, whole=True) == []
    assert verdicts.after(set(), {}, whole=True) == []
    assert verdicts.after(set(), {}, whole=True) == [
        Outcome(2, error="its process or its node died 6 times in each of 5 passes")
    ]


def test_a_pass_that_ended_early_gives_nothing_up_that_nobody_tried() -> None:
    verdicts = Verdicts([0, 1, 2], passes=1)
    assert verdicts.after(set(), {0: "odd"}, whole=False) == []
    assert verdicts.missing == [0, 1, 2]


def test_too_many_failures_of_one_replica_end_a_pass_and_not_the_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An ill process fails as fast as it is given work; the next pass has new ones."""
    recipe = with_pairs(tiny(tmp_path), count=16 * 40, actors=1)
    asked = list[list[int]]()

    def rows(*args: Any, **more: Any) -> Iterator[dict[str, Any]]:
        numbers = args[-1]
        asked.append(list(numbers))
        for number in numbers:
            shard = manifest.Shard(f"shard-{number:05d}.parquet", number, 16, 1, "")
            row = commits.answer(number, error="ill") if len(asked) == 1 else commits.answer(number, shard)
            yield {key: value[0] for key, value in row.items()}

    class Beat(heartbeat.Heartbeat):
        def __enter__(self) -> Beat:
            return self

        def __exit__(self, *args: Any) -> None: ...

    monkeypatch.setattr(passes, "_rows", rows)
    monkeypatch.setattr(passes, "Heartbeat", Beat)
    monkeypatch.setattr(cluster, "connect", lambda recipe: None)
    progress = Noted(40)
    outcomes = list(passes.commits(recipe, Gap.among((), PairFacts.of(recipe), 640), progress))
    assert [outcome.number for outcome in outcomes if outcome.shard] == list(range(40))
    assert [len(numbers) for numbers in asked] == [40, 40]
    assert progress.lines == ["shard 0 failed with one replica (ill); another one tries it."]


# ---- a worker without Ray


def worker(recipe: Recipe) -> ReplicaWorker:
    """One in this process, which has nobody to announce its work to."""
    nobody: Any = None
    return ReplicaWorker(Replica, recipe, PairFacts.of(recipe), {}, nobody, nobody)


def attempt(worker: ReplicaWorker, *errors: Exception, monkeypatch: pytest.MonkeyPatch) -> Failure | None:
    """What becomes of a shard whose making raises these errors, one after the other; None if it is made."""
    to_come, rows = list(errors), worker.replica.rows

    def failing(number: int, count: int) -> Rows:
        if to_come:
            raise to_come.pop(0)
        return rows(number, count)

    monkeypatch.setattr(worker.replica, "rows", failing)
    outcome = worker.attempt(0, 8)
    assert not to_come, "as many attempts as there are errors"
    if isinstance(outcome, Failure):
        return outcome
    assert outcome["sample_id"].to_pylist() == list(range(8))
    return None


def test_a_failure_names_the_error_and_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failure = attempt(worker(tiny(tmp_path)), ZeroDivisionError("by zero"), monkeypatch=monkeypatch)
    assert failure is not None
    assert failure.text.startswith("ZeroDivisionError: by zero (test_passes.py:")
    assert not failure.device_lost


def test_what_the_recipe_is_to_blame_for_is_told_from_other_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failure = attempt(worker(tiny(tmp_path)), Refused("teacher.precision is fp16"), monkeypatch=monkeypatch)
    assert failure == Failure("teacher.precision is fp16", refused=True)


@pytest.mark.faults("pairs: a device that is lost")
def test_a_lost_device_is_told_from_other_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    error = RuntimeError("CUDA error: an illegal memory access was encountered")
    failure = attempt(worker(tiny(tmp_path)), error, monkeypatch=monkeypatch)
    assert failure is not None
    assert failure.device_lost


@pytest.mark.faults("pairs: out of memory")
@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes"),
        MemoryError("Unable to allocate 9.00 GiB for an array"),
    ],
    ids=["torch", "driver", "torch on a CPU", "numpy"],
)
def test_memory_that_is_short_is_tried_again_and_then_names_the_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    made = worker(tiny(tmp_path))
    assert attempt(made, error, monkeypatch=monkeypatch) is None, "a neighbour may have gone"
    failure = attempt(made, error, error, monkeypatch=monkeypatch)
    assert failure is not None
    assert "pairs.batch is 6, for which the memory does not suffice" in failure.text
    assert "GB are free" in failure.text
    assert not failure.device_lost


@pytest.mark.faults("pairs: out of memory")
def test_a_batch_of_auto_is_halved_where_memory_is_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the second attempt, as often as there is need, with what graphs keep given up; the shard is made."""
    made, said = worker(with_pairs(tiny(tmp_path), batch="auto")), dict[str, str]()
    made.announcer = SimpleNamespace(tell=said.setdefault)  # type: ignore[assignment]  # as the board keeps them
    made.replica.teacher.graphs = before = Graphs()
    assert made.replica.batch == 16, "of shards of 16"
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
    assert attempt(made, error, error, error, monkeypatch=monkeypatch) is None
    assert made.replica.batch == 4
    assert made.replica.teacher.graphs is not before
    assert [line.split("batches of ")[1].split(" (")[0] for line in said.values()] == [
        "8: the memory does not suffice for 16",
        "4: the memory does not suffice for 8",
    ]
    failure = attempt(made, *[error] * 4, monkeypatch=monkeypatch)
    assert failure is not None
    assert "pairs.batch is 1, for which the memory does not suffice" in failure.text
