"""What is in work while nothing is finished: workers announce their units, and the driver says which, where, how long.

A unit of which nothing comes is either long or hangs. The driver says now and then what is in work
(``cluster.heartbeat_minutes``), and gives a unit to a new process that one is at for too long
(``cluster.stall_minutes``).
"""

from __future__ import annotations

import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.host import events, signals
from pipeline.host.errors import Unfinished
from pipeline.host.progress import duration

if TYPE_CHECKING:  # the board's process needs neither recipes nor torch, which take seconds to import
    from pipeline.recipe import Recipe

LOOK = 5.0  # seconds between two looks at what is in work
PATIENCE = 0.2  # seconds that the board may take to answer before the rows go on
NAMED = 3  # units that a line names, those in work for longest
TRIES = 2  # processes in which a unit may stall
END = object()  # after the last row
TOLD = 60.0  # seconds that a worker waits for the board to take a line
HOLD = 2.0  # seconds between two questions whether work may go on
AGAIN = "answers again."


@dataclass(frozen=True)
class Work:
    """A unit in work: its name, the node's id and address, who is at it, seconds since it was begun."""

    unit: str
    node: str
    address: str
    actor: Any
    age: float


class Board:
    """The actor on which workers write what they are at; it lives beside the driver and takes no CPU."""

    def __init__(self) -> None:
        self.units: dict[str, tuple[tuple[str, str, Any], float]] = {}
        self.notes: dict[str, str] = {}  # by what they are about, in the order of their coming
        self.waiting: set[int] = set()

    def begin(self, unit: str, node: str, address: str, actor: Any) -> None:
        """A unit that is begun again, because who had it died, is in work from now on."""
        self.units[unit] = (node, address, actor), time.monotonic()

    def end(self, unit: str) -> None:
        self.units.pop(unit, None)

    def tell(self, about: str, text: str) -> None:
        """A line for the driver to say; of several about one thing the first counts, until ``go_on``."""
        self.notes.setdefault(about, text)

    def wait(self, number: int) -> None:
        self.waiting.add(number)

    def go_on(self, number: int, about: str) -> None:
        """What a unit waited for has come."""
        self.waiting.discard(number)
        if about in self.notes and not self.notes[about].endswith(AGAIN):
            self.notes[about] = f"{about} {AGAIN}"

    def waits(self) -> int:
        """How many units wait."""
        return len(self.waiting)

    def read(self) -> tuple[list[Work], list[str]]:
        """All units in work, those begun first before the others, and the lines to say."""
        now = time.monotonic()
        found = [Work(unit, *at, now - begun) for unit, (at, begun) in self.units.items()]
        lines = list(self.notes.values())
        self.notes = {about: text for about, text in self.notes.items() if not text.endswith(AGAIN)}
        return sorted(found, key=lambda work: -work.age), lines


class Announcer:
    """An actor's end: ``with announcer.working("part 3 of Skip 1"):``, and lines for the driver."""

    def __init__(self, board: Any, slots: int) -> None:
        self._board, self._slots = board, slots

    def tell(self, about: str, text: str) -> None:
        """Have the driver say a line, once."""
        with suppress(RayError):  # the work does not depend on what is said of it
            ray.get(self._board.tell.remote(about, text), timeout=TOLD)  # the process may end with the next statement

    def wait(self, number: int) -> None:
        """The unit waits for the storage."""
        self._board.wait.remote(number)

    def go_on(self, number: int, about: str) -> None:
        """It waits no more; the driver says so where it said that it did."""
        self._board.go_on.remote(number, about)

    def pause(self) -> None:
        """Begin nothing while as many units wait as may be under way at once."""
        with suppress(RayError):  # the board is starting again
            while self._slots and ray.get(self._board.waits.remote()) >= self._slots:
                time.sleep(HOLD)

    @contextmanager
    def working(self, unit: str) -> Iterator[None]:
        """Announce the unit for as long as the body runs."""
        me = ray.get_runtime_context()
        self._board.begin.remote(unit, me.get_node_id(), ray.util.get_node_ip_address(), me.current_actor)
        try:
            yield
        finally:
            self._board.end.remote(unit)


class Heartbeat:
    """The driver's end: ``with Heartbeat(recipe, "parts", total, done) as beat``, then ``for row in beat.rows(ds)``.

    ``beat.announcer`` goes into the constructor of the data set's actors, whom Ray must restart when they die.
    ``begun`` is told how many units are in work, whenever this looks; ``slots`` is how many may wait for the storage.
    """

    def __init__(
        self,
        recipe: Recipe,
        what: str,
        total: int,
        done: int = 0,
        begun: Callable[[int], None] = lambda abreast: None,
        slots: int = 0,
    ) -> None:
        self.what, self.total, self.done, self._begun, self._slots = what, total, done, begun, slots
        self._lines: set[str] = set()  # that were said
        self._asked: Any = None  # the board, and not yet answered
        self._every, self._limit = 60 * recipe.cluster.heartbeat_minutes, 60 * recipe.cluster.stall_minutes
        self._said = time.monotonic()  # when something was last heard of
        self._taken = Counter[str]()

    def __enter__(self) -> Heartbeat:
        self._board = beside_driver(Board)
        self.announcer = Announcer(self._board, self._slots)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not signals.stopping():
            ray.kill(self._board)

    def rows(self, dataset: Any) -> Iterator[dict[str, Any]]:
        """The rows of a Ray data set as they come; Unfinished where a unit has stalled in two processes.

        Ray's iterator runs in a thread, so that this one can look at the clock and be told to stop.
        """
        pulled: queue.Queue[Any] = queue.Queue(maxsize=1)  # a driver that is slow holds Ray back
        threading.Thread(target=_pull, args=(dataset, pulled.put), daemon=True).start()
        looked = self._said = time.monotonic()
        ended = False
        try:
            while not ended:
                row = _next(pulled)
                ended = row is END or isinstance(row, Exception)
                if isinstance(row, Exception):
                    raise row
                if row is not None and not ended:
                    self._said = time.monotonic()
                    self.done += 1
                    yield row
                if time.monotonic() - looked >= LOOK or ended:
                    self._look(LOOK if ended else PATIENCE)
                    looked = time.monotonic()
        finally:
            if not ended and not signals.stopping():
                self._in_work(LOOK)  # what the workers have told until now
                _end(dataset)

    def _look(self, patience: float) -> None:
        """Say what is in work if nothing has come for long, and take a unit away from who is at it for too long."""
        work, now = self._in_work(patience), time.monotonic()
        if work:
            self._begun(len(work))
        if now - self._said >= self._every:
            self._say(f"{self.done}/{self.total} {self.what}; {_named(work)}.")
        for one in work:
            if self._limit and one.age >= self._limit:
                self._take(one)

    def _take(self, one: Work) -> None:
        """End the process that is at a unit; Ray gives it to another. Unfinished if that was tried."""
        self._taken[one.unit] += 1
        limit = f"cluster.stall_minutes ({self._limit / 60:g})"
        text = f"{one.unit} was in work on node {one.address} for more than {limit}"
        if self._taken[one.unit] == TRIES:
            raise Unfinished(
                f"{text}, and before that in another process, too; what is finished is kept, and the same command goes"
                " on. Raise cluster.stall_minutes if this is how long it takes; 0 is no limit."
            )
        self._say(f"{text}; another process gets it.")
        self._board.end.remote(one.unit)
        ray.kill(one.actor, no_restart=False)

    def _say(self, line: str) -> None:
        events.warn(line)
        self._said = time.monotonic()

    def _in_work(self, patience: float) -> list[Work]:
        """What living nodes are at; lines that workers have for the driver are said on the way."""
        alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        self._asked = self._asked or self._board.read.remote()
        answered, _ = ray.wait([self._asked], timeout=patience, fetch_local=False)
        if not answered:  # on a machine that is very busy: the next look will tell, and the work goes on
            return []
        try:
            found, lines = ray.get(self._asked)
        except RayError:  # the board died with what it knew, and has started again
            found, lines = [], []
        self._asked = None
        for line in lines:
            if line.endswith(AGAIN):
                self._lines = {said for said in self._lines if not said.startswith(line.removesuffix(AGAIN).rstrip())}
                self._say(line)
            elif line not in self._lines:
                self._lines.add(line)
                self._say(line)
        return [work for work in found if work.node in alive]


def beside_driver(cls: type) -> Any:
    """An actor of this class on the driver's node, which is no spot node; it takes no CPU."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(cls).options(num_cpus=0, max_restarts=-1, scheduling_strategy=here).remote()


def _named(work: list[Work]) -> str:
    """shard 1 in work since 12 min on node 10.0.0.7, and 4 more."""
    if not work:
        return "no replica is at work"
    said = [f"{one.unit} in work since {duration(one.age)} on node {one.address}" for one in work[:NAMED]]
    return ", ".join(said) + (f", and {len(work) - NAMED} more" if len(work) > NAMED else "")


def _next(pulled: queue.Queue[Any]) -> Any:
    """What was pulled, or None if nothing comes for a moment."""
    try:
        return pulled.get(timeout=LOOK)
    except queue.Empty:
        return None


def _pull(dataset: Any, put: Callable[[Any], None]) -> None:
    """Hand on the rows as they come, and then END or what was raised.

    Not by ``iter_rows``, which fetches ahead: it would keep the last row that there is until another one comes.
    """
    try:
        for block in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            for row in block.to_pylist():
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
