"""What is in work while nothing is finished: workers announce their units, and the driver says which, where, how long.

A job of which nothing comes any more is either busy for long or hangs. The first is said now and then
(``cluster.heartbeat_minutes``), the second ends the job (``cluster.stall_minutes``).
"""

from __future__ import annotations

import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from tqdm import tqdm

from pipeline.errors import Unfinished
from pipeline.progress import duration
from pipeline.recipe import Recipe

LOOK = 5.0  # seconds between two looks at the clock while nothing comes
PATIENCE = 10.0  # seconds that the board may take to answer
NAMED = 3  # units that a line names, those in work for longest
END = object()  # after the last row


@dataclass(frozen=True)
class Work:
    """A unit in work: its name, the node's id and address, seconds since it was begun."""

    unit: str
    node: str
    address: str
    age: float


class Board:
    """The actor on which workers write what they are at; it lives beside the driver and takes no CPU."""

    def __init__(self) -> None:
        self.units: dict[str, tuple[str, str, float]] = {}

    def begin(self, unit: str, node: str, address: str) -> None:
        """A unit that is begun again, because who had it died, is in work from now on."""
        self.units[unit] = node, address, time.monotonic()

    def end(self, unit: str) -> None:
        self.units.pop(unit, None)

    def read(self) -> list[Work]:
        """All units in work, those begun first before the others."""
        now = time.monotonic()
        found = [Work(unit, node, address, now - begun) for unit, (node, address, begun) in self.units.items()]
        return sorted(found, key=lambda work: -work.age)


class Announcer:
    """A worker's end: ``with announcer.working("shard 3"):``; it waits for nothing and may be sent anywhere."""

    def __init__(self, board: Any) -> None:
        self._board = board

    @contextmanager
    def working(self, unit: str) -> Iterator[None]:
        """Announce the unit for as long as the body runs."""
        self._board.begin.remote(unit, ray.get_runtime_context().get_node_id(), ray.util.get_node_ip_address())
        try:
            yield
        finally:
            self._board.end.remote(unit)


class Heartbeat:
    """The driver's end: ``with Heartbeat(recipe, "shards", total, done) as beat``, then ``for row in beat.rows(ds)``.

    ``beat.announcer`` goes into the workers' constructor.
    """

    def __init__(self, recipe: Recipe, what: str, total: int, done: int = 0) -> None:
        self.what, self.total, self.done = what, total, done
        self._every, self._limit = 60 * recipe.cluster.heartbeat_minutes, 60 * recipe.cluster.stall_minutes

    def __enter__(self) -> Heartbeat:
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)  # not on a spot node
        self._board: Any = ray.remote(Board).options(num_cpus=0, scheduling_strategy=here).remote()
        self.announcer = Announcer(self._board)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        ray.kill(self._board)

    def rows(self, dataset: Any) -> Iterator[dict[str, Any]]:
        """The rows of a Ray data set as they come; Unfinished where none comes any more.

        Ray's iterator runs in a thread, so that this one can look at the clock and be told to stop.
        """
        pulled: queue.Queue[Any] = queue.Queue(maxsize=1)  # a driver that is slow holds Ray back
        thread = threading.Thread(target=_pull, args=(dataset, pulled.put), daemon=True)
        thread.start()
        last = said = time.monotonic()
        ended = False
        try:
            while True:
                try:
                    row = pulled.get(timeout=LOOK)
                except queue.Empty:
                    said = self._look(last, said)
                    continue
                ended = row is END or isinstance(row, Exception)
                if row is END:
                    return
                if isinstance(row, Exception):
                    raise row
                last = said = time.monotonic()
                self.done += 1
                yield row
        finally:
            if not ended:
                _end(dataset)

    def _look(self, last: float, said: float) -> float:
        """Say what is in work if it is time to; when it was said last. ``last``: when something came."""
        now = time.monotonic()
        silence = now - last
        if now - said < self._every and not (self._limit and silence >= self._limit):
            return said
        work = self._in_work()
        if self._limit and work and min(silence, work[0].age) >= self._limit:
            raise Unfinished(
                f"nothing has finished for {duration(silence)} although the replicas are at work ({_named(work)}); what"
                " is finished is kept, and the same command goes on. cluster.stall_minutes is"
                f" {self._limit / 60:g}: raise it if this is how long they take, 0 is no limit."
            )
        if now - said < self._every:
            return said
        tqdm.write(f"{self.done}/{self.total} {self.what}; {_named(work)}.", file=sys.stderr)
        return now

    def _in_work(self) -> list[Work]:
        """What living nodes are at."""
        alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        return [work for work in ray.get(self._board.read.remote(), timeout=PATIENCE) if work.node in alive]


def _named(work: list[Work]) -> str:
    """shard 1 in work since 12 min on node 10.0.0.7, and 4 more."""
    if not work:
        return "no replica is at work"
    said = [f"{one.unit} in work since {duration(one.age)} on node {one.address}" for one in work[:NAMED]]
    return ", ".join(said) + (f", and {len(work) - NAMED} more" if len(work) > NAMED else "")


def _pull(dataset: Any, put: Callable[[Any], None]) -> None:
    """Hand on the rows, and then END or what was raised."""
    try:
        for row in dataset.iter_rows():
            put(row)
    except Exception as error:
        put(error)
    else:
        put(END)


def _end(dataset: Any) -> None:
    """End what is still running of a data set, a worker that hangs with it. Ray has no public call for this."""
    executor = dataset._current_executor
    if executor:
        executor.shutdown(force=True)
