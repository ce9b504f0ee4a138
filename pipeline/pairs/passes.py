"""Numbers -> teachers -> Parquet: two stages of Ray Data, in passes until nothing is left that can be made.

An actor makes one whole shard with its ``Replica``, a task without a CPU of its own commits it: the replicas may have
taken all there are, and a device never waits for storage. Where the storage does not answer, the commits wait, and with
them the teachers. Ray gives a shard whose process died to the process that follows it. What failed all the same comes
into another pass, whose replicas are new processes: so a shard has failed when another replica has failed it, too. At
the end of a pass nobody waits for a replica that is slow (``stragglers``).
"""

from __future__ import annotations

import gc
import json
import math
import os
import socket
import traceback
from collections import Counter
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray.data
import torch
from ray.data import TaskPoolStrategy

from pipeline.host import errors, signals
from pipeline.host.errors import Refused, Unfinished
from pipeline.host.progress import Progress
from pipeline.pairs import shards
from pipeline.pairs.commits import answer, commit
from pipeline.pairs.facts import PairFacts
from pipeline.pairs.manifest import Gap, Shard
from pipeline.pairs.replica import Replica
from pipeline.pairs.stragglers import ORIGINAL, SPARE, Book, Stragglers
from pipeline.recipe import Recipe
from pipeline.services import cluster
from pipeline.services.heartbeat import Announcer, Heartbeat, beside_driver
from pipeline.services.metrics import Recorder
from pipeline.services.parts import Crew, crew_for
from pipeline.services.ray_errors import device_error

TRIES = 2  # passes in which a shard has to fail, or in a row that make nothing
DEATHS = 5  # times that a shard may take its process down with it, or lose its node, in a pass
FAILURES = 10  # shards that may fail in a pass for each replica before it ends: new processes may do better
COMMITS = 2  # shards that are written at once, for each replica


@dataclass(frozen=True)
class Outcome:
    """What became of a shard: its line of the manifest once it is committed, or why it was not made."""

    number: int
    shard: Shard | None = None
    error: str = ""


@dataclass
class Verdicts:
    """What is still to be made and how often each shard has failed, pass by pass."""

    missing: list[int]
    failures: Counter[int] = field(default_factory=Counter)
    passes: int = 0
    fruitless: int = 0  # whole passes in a row that made nothing

    def after(self, successes: set[int], reasons: dict[int, str], whole: bool) -> list[Outcome]:
        """The shards that are given up after a pass that committed ``successes``; the others stay among the missing.

        ``reasons`` are of those that a replica reported as failed. One of which nothing came took its processes with
        it, which is no fault of its own until passes make nothing any more. ``whole``: the pass did not end early.
        """
        self.passes += 1
        self.failures.update(reasons.keys() - successes)
        self.missing = [number for number in self.missing if number not in successes]
        self.fruitless = 0 if successes or not whole else self.fruitless + 1
        over = self.fruitless >= TRIES
        hopeless = [number for number in self.missing if over or self.failures[number] >= TRIES]
        self.missing = [number for number in self.missing if number not in set(hopeless)]
        deaths = f"its process or its node died {DEATHS + 1} times in each of {self.passes} passes"
        return [Outcome(number, error=reasons.get(number, deaths)) for number in hopeless]


@dataclass(frozen=True)
class Failure:
    """What went wrong with a shard, and where; ``device_lost`` if the process can do nothing more on its device,
    ``refused`` if the recipe is to blame, so that no other replica would do better.
    """

    text: str
    device_lost: bool = False
    refused: bool = False


class ReplicaWorker:
    """A Ray Data actor: a replica in a process of its own, which makes one shard at a time.

    ``more`` is what the constructor of the class ``replica`` takes beside recipe and facts.
    """

    def __init__(
        self,
        replica: type[Replica],
        recipe: Recipe,
        facts: PairFacts,
        more: dict[str, Any],
        announcer: Announcer,
        stragglers: Stragglers,
    ) -> None:
        self.host, self.recipe, self.facts, self.announcer = socket.gethostname(), recipe, facts, announcer
        self.stragglers = stragglers
        self.record = Recorder(recipe)
        self.replica = replica(recipe, facts, **more)
        self.replica.spent = self.count

    def __call__(self, task: dict[str, np.ndarray]) -> Any:
        """{"number": [k], "rows": [r], "copy": [c]} -> the Arrow table of the first r rows of shard k, or a row with
        the failure; a ``SPARE`` task makes a shard that is late, or comes to nothing.

        A process that has lost its device ends; Ray gives the shard to the one that follows it.
        """
        number, rows, copy = (int(task[name][0]) for name in ("number", "rows", "copy"))
        if number == SPARE:
            late = self.stragglers.wait()
            if late is None:
                return answer(SPARE)
            number, rows = late
        return self.made(number, rows, copy)

    def made(self, number: int, rows: int, copy: int) -> Any:
        """A copy of a shard as ``__call__`` returns it."""
        self.announcer.pause()
        if copy == ORIGINAL:
            self.stragglers.begin(number, rows)
        with self.announcer.working(f"shard {number}" if copy == ORIGINAL else f"a second copy of shard {number}"):
            outcome = self.attempt(number, rows)
        if not isinstance(outcome, Failure):
            self.stragglers.end(number)
            for name, value in (("host", self.host), ("copy", copy)):
                outcome = outcome.append_column(name, pa.array([value] * outcome.num_rows))
            return outcome
        if outcome.device_lost:
            node = ray.util.get_node_ip_address()
            text = f"a replica on node {node} lost its device and gets a new process: {outcome.text}"
            self.announcer.tell(text, text)
            cluster.end_process(RuntimeError(outcome.text))
        if copy != ORIGINAL:  # what becomes of the first copy counts
            return answer(SPARE)
        self.stragglers.end(number)
        return answer(number, error=outcome.text, fatal=Refused.__name__ if outcome.refused else "")

    def count(self, rows: int, teacher: float, flow: float) -> None:
        """Tell Prometheus how a batch was made, as ``Replica.spent`` hears of it."""
        seconds = {"dd_pairs_teacher_seconds_total": teacher, "dd_pairs_flow_seconds_total": flow}
        self.record({"dd_pairs_drawn_total": rows} | seconds)

    def attempt(self, number: int, rows: int) -> pa.Table | Failure:
        """The table, or why there is none: an error is handed on as a value, and the other shards go on."""
        try:
            return self._with_memory(number, rows)
        except Refused as error:
            return Failure(str(error), refused=True)
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            text = f"{type(error).__name__}: {error} ({Path(place.filename).name}:{place.lineno})"
            return Failure(text, device_error(error))

    def _with_memory(self, number: int, rows: int) -> pa.Table:
        """The table, at the second attempt if memory is short; Unfinished, which names pairs.batch, if it stays so.

        Where the size of a batch is this replica's to choose, it is halved before that, as often as there is need.
        """
        device, tried = self.recipe.cluster.runs_on, False
        while True:
            try:
                return self._table(number, rows)
            except Exception as error:
                if not _is_full(error):
                    raise
                size = self.replica.batch
                if tried and (size == 1 or self.recipe.pairs.batch != "auto"):
                    raise Unfinished(
                        f"pairs.batch is {size}, for which the memory does not suffice"
                        f" ({_free(device)}): lower it, or see what else is at work there"
                    ) from error
            if tried:
                self.replica.shrink()
                text = (
                    f"a replica on {self.host} goes on in batches of {self.replica.batch}: the memory does not suffice"
                    f" for {size} ({_free(device)})."
                )
                self.announcer.tell(text, text)
            gc.collect()  # what the failed attempt held, which its traceback no longer does
            if device == "cuda":
                torch.cuda.empty_cache()
            tried = True

    def _table(self, number: int, rows: int) -> pa.Table:
        return shards.table(self.facts, self.replica.rows(number, rows))


def _is_full(error: Exception) -> bool:
    """Whether it says that memory is short; torch's allocator for the CPU raises nothing more particular."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and ("out of memory" in str(error) or "can't allocate memory" in str(error))
    )


def _free(device: str) -> str:
    """How much of the memory of a device is free."""
    if device == "cuda":
        free, total = torch.cuda.mem_get_info()
    else:
        free, total = (os.sysconf(name) * os.sysconf("SC_PAGE_SIZE") for name in ("SC_AVPHYS_PAGES", "SC_PHYS_PAGES"))
    return f"{free / 1e9:,.1f} of {total / 1e9:,.1f} GB are free"


def commits(
    recipe: Recipe,
    gap: Gap,
    progress: Progress,
    replica: type[Replica] = Replica,
    **more: Any,
) -> Iterator[Outcome]:
    """What became of each of the missing shards, as it is committed or has failed for good; in ``cluster.session``.

    ``replica`` is the class that makes them, ``more`` what its constructor takes beside recipe and facts. Raises what
    the storage says that waiting does not change, at once.
    """
    verdicts = Verdicts(gap.missing)
    crew = crew_for(recipe, recipe.pairs.actors, len(verdicts.missing))
    with Heartbeat(recipe, "shards", progress.total, progress.done, progress.begin, COMMITS * crew.now) as beat:
        run = partial(_rows, recipe, gap, beat, crew, replica, more)
        while verdicts.missing:
            successes: set[int] = set()
            reasons: dict[int, str] = {}
            with closing(run(verdicts.missing, again=verdicts.passes > 0)) as rows:
                for row in rows:
                    number = int(row["number"])
                    if row["fatal"]:
                        raise getattr(errors, row["fatal"], Unfinished)(row["error"])
                    if row["shard"] and number not in successes:  # the second copy of one is the same
                        successes.add(number)
                        yield Outcome(number, Shard(**json.loads(row["shard"])))
                    elif row["error"]:
                        _say_first(progress, reasons, number, row["error"], last=verdicts.failures[number] > 0)
                    beat.done = progress.done
                    whole = len(reasons) < FAILURES * crew.now
                    # Of a later pass, a shard that has failed once may still be made by another replica.
                    over = successes if verdicts.passes else successes | reasons.keys()
                    if not whole or len(over) == len(verdicts.missing):
                        break
                else:
                    whole = True
            yield from verdicts.after(successes, reasons, whole)


def _say_first(progress: Progress, reasons: dict[int, str], number: int, error: str, last: bool) -> None:
    """Note a failure, and say the first of its kind, which is not yet the shard's end."""
    if not last and error not in reasons.values():
        progress.say(f"shard {number} failed with one replica ({error}); another one tries it.")
    reasons[number] = error


def _rows(
    recipe: Recipe,
    gap: Gap,
    beat: Heartbeat,
    crew: Crew,
    replica: type[Replica],
    more: dict[str, Any],
    numbers: list[int],
    again: bool,
) -> Generator[dict[str, Any]]:
    """One pass over the shards ``numbers``: {number, error, fatal, shard} of each as it comes out of Ray Data.

    Of a pass that comes ``again`` every replica gets a shard, copies where there are few: one replica may be ill.
    """
    copies = math.ceil(crew.most / len(numbers)) if again else 1
    # Those of a later pass may all be written: the replica, or the disk, of the one that comes first may be ill.
    tasks = [{"number": number, "rows": gap.rows_of(number), "copy": ORIGINAL} for number in numbers] * copies
    spares = range(1, 1 if again else crew.now)
    tasks += [{"number": SPARE, "rows": 0, "copy": copy} for copy in spares]
    book = beside_driver(Book)
    stragglers = Stragglers(book)
    tables = ray.data.from_items(tasks, override_num_blocks=len(tasks)).map_batches(
        ReplicaWorker,
        fn_constructor_args=(replica, recipe, gap.facts, more, beat.announcer, stragglers),
        batch_size=1,
        **cluster.pool(recipe, min(crew.most, len(numbers) * copies), DEATHS),
    )
    tables.context.max_errored_blocks = -1  # of shards whose process died every time; they are missed here
    settings = {"uri": recipe.pairs_uri, "facts": gap.facts, "hours": recipe.pairs.patience_hours}
    outcomes = tables.map_batches(
        commit,  # type: ignore[arg-type]  # Ray's type leaves no room for fn_kwargs
        fn_kwargs=settings | {"announcer": beat.announcer, "stragglers": stragglers, "record": Recorder(recipe)},
        batch_size=None,
        batch_format="pyarrow",
        num_cpus=0,
        compute=TaskPoolStrategy(size=min(COMMITS * crew.now, len(tasks))),
    )
    try:
        yield from beat.rows(outcomes)
    finally:
        if not signals.stopping():
            ray.kill(book)  # after the pass: a copy that is late to come may not be written
