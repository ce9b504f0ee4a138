"""Numbers -> teachers -> Parquet: two stages of Ray Data, in passes until nothing is left that can be made.

An actor makes one whole shard, a task without a CPU of its own commits it: the replicas may have taken all there are,
and a device never waits for storage. Where the storage does not answer, the commits wait, and with them the teachers.
Ray gives a shard whose process died to the process that follows it. What failed all the same comes into another pass,
whose replicas are new processes: so a shard has failed when another replica has failed it, too.
"""

from __future__ import annotations

import json
import math
import socket
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import ray.data
from ray.data import DataContext, TaskPoolStrategy

from pipeline.host import errors
from pipeline.host.errors import Outage, Refused, Unfinished
from pipeline.host.progress import Progress, duration
from pipeline.pairs import manifest, shards
from pipeline.pairs.manifest import Facts, Shard
from pipeline.pairs.replica import Replica
from pipeline.recipe import Recipe
from pipeline.services import cluster
from pipeline.services.heartbeat import Announcer, Heartbeat

TRIES = 2  # passes in which a shard has to fail, or in a row that make nothing
DEATHS = 5  # times that a shard may take its process down with it, or lose its node, in a pass
FAILURES = 10  # shards that may fail in a pass for each replica before it ends: new processes may do better
COMMITS = 2  # shards that are written at once, for each replica
PAUSE, LONGEST = 1.0, 60.0  # seconds before a storage that does not answer is asked again: at first, doubling, at most
T = TypeVar("T")


@dataclass(frozen=True)
class Outcome:
    """What became of a shard: its line of the manifest once it is committed, or why it was not made."""

    number: int
    shard: Shard | None = None
    error: str = ""


@dataclass
class Verdicts:
    """What is left to make and how often each shard has failed, pass by pass."""

    left: list[int]
    failures: Counter[int] = field(default_factory=Counter)
    passes: int = 0
    fruitless: int = 0  # whole passes in a row that made nothing

    def after(self, made: set[int], failed: dict[int, str], whole: bool) -> list[Outcome]:
        """The shards that are given up after a pass that committed ``made``; the others that are missing stay left.

        ``failed`` are those that a replica reported, with the reason. One of which nothing came took its processes with
        it, which is no fault of its own until passes make nothing any more. ``whole``: the pass did not end early.
        """
        self.passes += 1
        self.failures.update(failed.keys() - made)
        self.left = [number for number in self.left if number not in made]
        self.fruitless = 0 if made or not whole else self.fruitless + 1
        over = self.fruitless >= TRIES
        lost = [number for number in self.left if over or self.failures[number] >= TRIES]
        self.left = [number for number in self.left if number not in set(lost)]
        died = f"its process or its node died {DEATHS + 1} times in each of {self.passes} passes"
        return [Outcome(number, error=failed.get(number, died)) for number in lost]


class ReplicaWorker:
    """A Ray Data actor: a replica in a process of its own, which makes one shard at a time."""

    def __init__(
        self, replica: type[Replica], recipe: Recipe, known: Facts, more: dict[str, Any], announcer: Announcer
    ) -> None:
        self.host, self.announcer = socket.gethostname(), announcer
        self.replica = replica(recipe, known, **more)

    def __call__(self, task: dict[str, np.ndarray]) -> Any:
        """{"number": [k], "rows": [r]} -> the Arrow table of the first r rows of shard k, or a row with the failure.

        A process that has lost its device ends; Ray gives the shard to the one that follows it.
        """
        number = int(task["number"][0])
        self.announcer.pause()
        with self.announcer.working(f"shard {number}"):
            failure, table = self.replica.attempt(number, int(task["rows"][0]))
        if table is not None:
            return table.append_column("host", pa.array([self.host] * table.num_rows))
        assert failure is not None
        if failure.device_lost:
            node = ray.util.get_node_ip_address()
            text = f"a replica on node {node} lost its device and gets a new process: {failure.text}"
            self.announcer.tell(text, text)
            cluster.end_process(RuntimeError(failure.text))
        return _row(number, error=failure.text, fatal=Refused.__name__ if failure.refused else "")


def commit(table: pa.Table, uri: str, known: Facts, hours: float, announcer: Announcer) -> dict[str, np.ndarray]:
    """Write the Arrow table of one shard, if the folder still belongs to its set, or hand on what came instead of it.

    While the storage does not answer it is asked again, for so many hours.
    """
    if "error" in table.column_names:
        return {name: table[name].to_numpy() for name in table.column_names}
    number = int(table["sample_id"][0].as_py()) // known["shard_rows"]
    write = partial(write_owned, uri, known, table["host"][0].as_py(), table)

    def say(text: str) -> None:
        announcer.tell(uri, text)
        announcer.wait(number)

    try:
        shard = patiently(write, hours, say)
        announcer.go_on(number, uri)
        return _row(number, shard)
    except (Refused, Unfinished) as error:
        return _row(number, error=str(error), fatal=type(error).__name__)
    except Exception as error:
        return _row(number, error=f"{type(error).__name__}: {error}")


def write_owned(uri: str, known: Facts, host: str, table: pa.Table) -> Shard:
    """Write the Arrow table of a shard that ``host`` made, if the folder still belongs to its set."""
    manifest.check_owner(uri, known)
    return shards.write_shard(uri, known, table, host)


def patiently(write: Callable[[], T], hours: float, say: Callable[[str], None]) -> T:
    """What ``write`` returns; it is called again while it raises Outage, for so many hours, which ``say`` is told."""
    start, pause = time.monotonic(), PAUSE
    while True:
        try:
            return write()
        except Outage as error:
            if time.monotonic() - start > 3600 * hours:
                raise
            say(
                f"{error} It is tried again until it answers, for {duration(3600 * hours)} at most"
                " (pairs.patience_hours); what is made waits, and so do the teachers."
            )
        time.sleep(pause)
        pause = min(2 * pause, LONGEST)


def commits(
    recipe: Recipe,
    known: Facts,
    count: int,
    todo: list[int],
    progress: Progress,
    replica: type[Replica] = Replica,
    **more: Any,
) -> Iterator[Outcome]:
    """What became of every shard of ``todo``, as it is committed or has failed for good; inside ``cluster.session``.

    ``replica`` is the class that makes them, ``more`` what its constructor takes beside recipe and facts. Raises what
    the storage says that waiting does not change, at once.
    """
    verdicts = Verdicts(list(todo))
    slots = COMMITS * min(recipe.pairs.actors, len(todo))
    with Heartbeat(recipe, "shards", progress.total, progress.done, progress.begin, slots) as beat:
        run = partial(_rows, recipe, known, count, beat, slots, replica, more)
        while verdicts.left:
            made: set[int] = set()
            failed: dict[int, str] = {}
            with closing(run(verdicts.left, again=verdicts.passes > 0)) as rows:
                for row in rows:
                    number = int(row["number"])
                    if row["fatal"]:
                        raise getattr(errors, row["fatal"], Unfinished)(row["error"])
                    if row["shard"] and number not in made:  # the second copy of one is the same
                        made.add(number)
                        yield Outcome(number, Shard(**json.loads(row["shard"])))
                    elif row["error"]:
                        _say_first(progress, failed, number, row["error"], last=verdicts.failures[number] > 0)
                    beat.done = progress.done
                    whole = len(failed) < FAILURES * recipe.pairs.actors
                    if not whole:
                        break
                else:
                    whole = True
            yield from verdicts.after(made, failed, whole)


def _say_first(progress: Progress, failed: dict[int, str], number: int, error: str, last: bool) -> None:
    """Note a failure, and say the first of its kind, which is not yet the shard's end."""
    if not last and error not in failed.values():
        progress.say(f"shard {number} failed with one replica ({error}); another one tries it.")
    failed[number] = error


def _rows(
    recipe: Recipe,
    known: Facts,
    count: int,
    beat: Heartbeat,
    slots: int,
    replica: type[Replica],
    more: dict[str, Any],
    numbers: list[int],
    again: bool,
) -> Generator[dict[str, Any]]:
    """One pass over the shards ``numbers``: {number, error, fatal, shard} of each as it comes out of Ray Data.

    Of a pass that comes ``again`` every replica gets a shard, copies where there are few: one replica may be ill.
    """
    DataContext.get_current().max_errored_blocks = -1  # of shards whose process died every time; they are missed here
    size, actors = recipe.pairs.shard_rows, recipe.pairs.actors
    tasks = [{"number": k, "rows": min(size, count - k * size)} for k in numbers]
    tasks *= math.ceil(actors / len(tasks)) if again else 1
    tables = ray.data.from_items(tasks, override_num_blocks=len(tasks)).map_batches(
        ReplicaWorker,
        fn_constructor_args=(replica, recipe, known, more, beat.announcer),
        batch_size=1,
        **cluster.pool(recipe, min(actors, len(tasks)), DEATHS),
    )
    settings = {"uri": recipe.pairs_uri, "known": known, "hours": recipe.pairs.patience_hours}
    written = tables.map_batches(
        commit,  # type: ignore[arg-type]  # Ray's type leaves no room for fn_kwargs
        fn_kwargs=settings | {"announcer": beat.announcer},
        batch_size=None,
        batch_format="pyarrow",
        num_cpus=0,
        compute=TaskPoolStrategy(size=slots),
    )
    yield from beat.rows(written)


def _row(number: int, shard: Shard | None = None, error: str = "", fatal: str = "") -> dict[str, np.ndarray]:
    """A row for the driver: the shard's line of the manifest, or what went wrong; ``fatal`` names the class of it."""
    line = json.dumps(asdict(shard)) if shard else ""
    return {
        "number": np.array([number]),
        "error": np.array([error]),
        "fatal": np.array([fatal]),
        "shard": np.array([line]),
    }
