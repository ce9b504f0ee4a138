"""The replicas at work: who makes which shard, who writes it, and what follows when something fails.

The driver hands out shards to Ray actors, one at a time, and their tables to Ray tasks that write them; it sees none.
Ray Data has such pools, but its own give a shard back to the actor that failed it and drop one that could not be
written. Here a shard that failed goes to another replica, a replica whose device is lost gets a new process, and
finished shards wait for a storage that does not answer.
"""

from __future__ import annotations

import socket
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from pipeline import cluster, manifest, pairs
from pipeline.errors import Outage, Unfinished
from pipeline.manifest import Facts, Shard
from pipeline.progress import Progress, duration
from pipeline.ray_errors import translation
from pipeline.recipe import Recipe
from pipeline.replica import Failure, Replica

TRIES = 2  # replicas that have to fail a shard before it counts as failed
DEATHS = 5  # times that a shard may take its process down with it, or lose its node, before it counts as failed
STRIKES = 2  # devices lost in a row, each by a new process, after which a replica gets no more work
BACKLOG = 2  # finished shards that wait for the storage, for each replica, before the replicas wait, too
PAUSE, LONGEST = 1.0, 60.0  # seconds before what failed is tried again: at first, doubling, and at most
TICK = 2.0  # seconds between two looks at the clock while nothing comes
GRACE = 600.0  # seconds that a replica without a place is waited for by a shard that the others have failed
NAMED = 3  # shards in work that a line names


@dataclass(frozen=True)
class Outcome:
    """What became of a shard: its line of the manifest once it is committed, or why it was not made."""

    number: int
    shard: Shard | None = None
    error: str = ""


class ReplicaActor:
    """A replica in a process of its own."""

    def __init__(self, replica: type[Replica], recipe: Recipe, known: Facts, more: dict[str, Any]) -> None:
        self.replica = replica(recipe, known, **more)

    def place(self) -> tuple[str, str]:
        """(host name, address of the node); it answers when the replica is there."""
        return socket.gethostname(), ray.util.get_node_ip_address()

    def make(self, number: int, rows: int) -> tuple[Failure | None, Any]:
        """(None, the shard's Arrow table), or (what went wrong, None)."""
        return self.replica.attempt(number, rows)


@dataclass(eq=False)
class Seat:
    """A replica of the pool, whatever process it has at the moment."""

    number: int
    actor: Any = None
    host: str = ""
    node: str = ""
    up: bool = False
    fresh: bool = False  # its process has not worked yet
    strikes: int = 0
    off: bool = False  # sent off: it gets no more work
    shard: int | None = None  # in work
    since: float = 0.0  # when that was begun, or the process was started
    ref: Any = None  # of what it is at

    @property
    def idle(self) -> bool:
        return self.up and not self.off and self.shard is None


def commit(uri: str, known: Facts, host: str, table: Any) -> Shard:
    """Write the Arrow table of a shard, if the folder still belongs to its set."""
    manifest.check_owner(uri, known)
    return pairs.write_shard(uri, known, table, host)


@dataclass(eq=False)
class Pool:
    """A pool that makes and commits the shards ``todo`` of the first ``count`` rows; ``outcomes`` runs it.

    ``replica`` is the class that makes them, ``more`` what its constructor takes beside recipe and facts.
    """

    recipe: Recipe
    known: Facts
    count: int
    todo: list[int]
    progress: Progress
    replica: type[Replica] = Replica
    more: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.queue = deque(self.todo)
        self.left = len(self.todo)
        self.seats: list[Seat] = []
        self.events: dict[Any, Callable[[Any], Outcome | None]] = {}  # what to do when a reference is ready
        self.later: list[tuple[float, Callable[[], None]]] = []  # and what when a moment has come
        self.finished: set[int] = set()  # shards that are made and not yet committed
        self.failed_by: dict[int, set[Seat]] = defaultdict(set)
        self.failures, self.deaths = Counter[int](), Counter[int]()
        self.failed_starts = 0
        self.silent_since: float | None = None  # when the storage stopped to answer
        self.said = time.monotonic()  # when something was last heard of
        settings = self.recipe.cluster
        self.kind = ray.remote(ReplicaActor).options(num_cpus=settings.cpus, num_gpus=settings.gpus)
        # No CPU: the replicas may have taken all there are, and it waits for the storage more than it computes.
        self.writer = ray.remote(commit).options(num_cpus=0)

    def outcomes(self) -> Iterator[Outcome]:
        """Of every shard, as it is committed or has failed for good.

        Raises what a replica's constructor raises again and again, RuntimeError if no replica is left or the storage
        does not answer for ``pairs.patience_hours``, and what else the storage says, at once.
        """
        try:
            for _ in range(min(self.recipe.pairs.actors, len(self.todo))):
                self._add_seat()
            while self.left:
                self._hand_out()
                for outcome in self._next():
                    self.left -= 1
                    self.said = time.monotonic()
                    yield outcome
        finally:
            for seat in self.seats:
                self._end(seat)

    # ---- the loop

    def _next(self) -> list[Outcome]:
        """Wait for something to happen, and do what follows from it."""
        due = min((moment for moment, _ in self.later), default=float("inf")) - time.monotonic()
        patience, found = max(0.0, min(TICK, due)), []
        if self.events:
            ready, _ = ray.wait(list(self.events), timeout=patience, fetch_local=False)
            found = [self.events.pop(ref)(ref) for ref in ready]
        else:
            time.sleep(patience)
        now = time.monotonic()
        for item in [item for item in self.later if item[0] <= now]:
            self.later.remove(item)
            item[1]()
        return [outcome for outcome in [*found, *self._look(now)] if outcome]

    def _hand_out(self) -> None:
        """Give every idle replica a shard that it has not failed, unless too many wait to be committed."""
        for seat in [seat for seat in self.seats if seat.idle]:
            if len(self.finished) >= BACKLOG * len(self.seats):
                return
            number = next((number for number in self.queue if seat not in self.failed_by[number]), None)
            if number is not None:
                self.queue.remove(number)
                self._begin(seat, number)
        late = time.monotonic() - GRACE
        if self.queue and all(
            seat.off or (seat.shard is None and (seat.up or seat.since < late)) for seat in self.seats
        ):
            self._try_again_here()

    def _try_again_here(self) -> None:
        """Who is there has failed all that is left: one more replica, if the recipe has one, else new processes."""
        if len(self.seats) < self.recipe.pairs.actors:
            return self._add_seat()
        if all(seat.off for seat in self.seats):
            raise Unfinished(
                f"no replica is left: all {len(self.seats)} lost their device again in a new process, see above; what"
                " is committed is kept, and the same command goes on, best on another machine."
            )
        for number in self.queue:
            self.failed_by[number].clear()
        for seat in self.seats:
            if seat.idle and not seat.fresh:
                self._start(seat)

    def _look(self, now: float) -> list[Outcome | None]:
        """Say what is in work if nothing has come for long, and take a shard away from who is at it for too long."""
        settings, at_work = self.recipe.cluster, [seat for seat in self.seats if seat.shard is not None]
        at_work.sort(key=lambda seat: seat.since)
        if now - self.said >= 60 * settings.heartbeat_minutes and (at_work or self.finished):
            self.said = now
            self.progress.say(f"{self.progress.done}/{self.progress.total} shards; {self._at_work(at_work, now)}.")
        limit = 60 * settings.stall_minutes or float("inf")
        return [self._stalled(seat) for seat in at_work if now - seat.since >= limit]

    def _at_work(self, seats: list[Seat], now: float) -> str:
        """shard 1 in work since 12 min on node 10.0.0.7, 4 more, 2 finished shards wait to be written."""
        said = [f"shard {seat.shard} in work since {duration(now - seat.since)} on node {seat.node}" for seat in seats]
        said[NAMED:] = [f"{len(said) - NAMED} more"] if len(said) > NAMED else []
        wait = [f"{len(self.finished)} finished shards wait to be written"] if self.finished else []
        return ", ".join(said + wait)

    # ---- replicas

    def _add_seat(self) -> None:
        self.seats.append(Seat(len(self.seats) + 1))
        self._start(self.seats[-1])

    def _start(self, seat: Seat) -> None:
        """Give the seat a process, a new one if it has one, and none if it is off."""
        self._end(seat)
        if seat.off:
            return
        seat.since = time.monotonic()
        seat.actor = self.kind.remote(self.replica, self.recipe, self.known, self.more)
        self._expect(seat, seat.actor.place.remote(), self._started)

    def _end(self, seat: Seat) -> None:
        """End the seat's process, whatever it is at."""
        self.events.pop(seat.ref, None)
        if seat.actor is not None:
            with suppress(RayError):  # the cluster is gone
                ray.kill(seat.actor)
        seat.actor, seat.up, seat.shard, seat.ref = None, False, None, None

    def _expect(self, seat: Seat, ref: Any, then: Callable[..., Outcome | None], *args: Any) -> None:
        seat.ref = ref
        self.events[ref] = partial(then, seat, *args)

    def _started(self, seat: Seat, ref: Any) -> None:
        """It is there; or it could not start, and is started again a little later."""
        try:
            seat.host, seat.node = ray.get(ref)
        except RayError as error:
            self.failed_starts += 1
            if self.failed_starts > cluster.STARTS:
                raise
            self.progress.say(f"replica {seat.number} could not start, and is started again: {translation(error)}")
            self._after(self.failed_starts - 1, partial(self._start, seat))
            return
        self.failed_starts, seat.up, seat.fresh = 0, True, True

    def _begin(self, seat: Seat, number: int) -> None:
        size = self.known["shard_rows"]
        report, table = seat.actor.make.options(num_returns=2).remote(number, min(size, self.count - number * size))
        seat.shard, seat.since, seat.fresh = number, time.monotonic(), False
        self.progress.begin(sum(seat.shard is not None for seat in self.seats))
        self._expect(seat, report, self._made, table)

    def _made(self, seat: Seat, table: Any, report: Any) -> Outcome | None:
        """Have the shard committed, or see to what went wrong."""
        number = seat.shard
        assert number is not None
        try:
            failure = ray.get(report)
        except RayTaskError as error:  # not of the making, which reports what goes wrong
            failure = Failure(str(translation(error)))
        except RayError:  # the process or its node is gone
            return self._died(seat, number)
        seat.shard = None
        if failure is None:
            seat.strikes = 0
            self.finished.add(number)
            self._commit(number, seat.host, table)
            return None
        if failure.device_lost:
            self._strike(seat, failure.text)
        return self._failed(seat, number, failure.text, failure.device_lost)

    def _died(self, seat: Seat, number: int) -> Outcome | None:
        """A new process for the replica; the shard comes after the others, and to another replica if there is one."""
        self._start(seat)
        self.failed_by[number].add(seat)
        return self._lost(number)

    def _lost(self, number: int) -> Outcome | None:
        """Make a shard again that went away with a process or a node."""
        self.deaths[number] += 1
        if self.deaths[number] > DEATHS:
            return Outcome(number, error=f"its process or its node died {self.deaths[number]} times")
        self.queue.append(number)
        return None

    def _strike(self, seat: Seat, text: str) -> None:
        """A new process for a replica whose device is lost, and no more work for one that lost it again."""
        seat.strikes += 1
        seat.off = seat.strikes >= STRIKES
        if seat.off:
            left = sum(not seat.off for seat in self.seats)
            line = f"lost it again and gets no more work; {left} of {len(self.seats)} replicas go on."
        else:
            line = f"on node {seat.node} lost its device and gets a new process: {text}"
        self.progress.say(f"replica {seat.number} {line}")
        self._start(seat)

    def _stalled(self, seat: Seat) -> Outcome | None:
        """A new process for a replica that does not come back, and its shard for another."""
        number, limit = seat.shard, self.recipe.cluster.stall_minutes
        assert number is not None
        text = f"it was in work for more than cluster.stall_minutes ({limit:g}) on node {seat.node}"
        self.progress.say(f"shard {number} is taken from replica {seat.number}, which gets a new process: {text}")
        self._start(seat)
        return self._failed(seat, number, text)

    def _failed(self, seat: Seat, number: int, text: str, device_lost: bool = False) -> Outcome | None:
        """To another replica with it, unless that was one; then the shard is to blame, and not the replicas."""
        self.failures[number] += 1
        self.failed_by[number].add(seat)
        if self.failures[number] < TRIES:
            self.queue.append(number)
            return None
        for other in self.failed_by[number] if device_lost else ():
            other.strikes = max(0, other.strikes - 1)
            if other.off:
                other.off = False
                self._start(other)
        return Outcome(number, error=text)

    # ---- commits

    def _commit(self, number: int, host: str, table: Any, tries: int = 0) -> None:
        ref = self.writer.remote(self.recipe.pairs_uri, self.known, host, table)
        self.events[ref] = partial(self._committed, number, host, table, tries)

    def _committed(self, number: int, host: str, table: Any, tries: int, ref: Any) -> Outcome | None:
        try:
            shard = ray.get(ref)
        except RayError as error:
            cause = getattr(error, "cause", None)
            if isinstance(cause, Outage):
                self._wait_for_storage(cause)
                self._after(tries, partial(self._commit, number, host, table, tries + 1))
                return None
            if isinstance(error, RayTaskError) and not isinstance(cause, RayError):
                raise
            self.finished.remove(number)
            return self._lost(number)  # with the node that held its table
        self.finished.remove(number)
        if self.silent_since is not None:
            self.progress.say(f"{self.recipe.pairs_uri} answers again.")
            self.silent_since = None
        return Outcome(number, shard)

    def _wait_for_storage(self, error: Outage) -> None:
        """Say once that finished shards wait; RuntimeError when they have waited for long enough."""
        now, hours = time.monotonic(), self.recipe.pairs.patience_hours
        if self.silent_since is None:
            self.silent_since = now
            self.progress.say(
                f"{error} It is tried again until it answers, for {duration(3600 * hours)} at most; finished shards"
                " wait, and so do the replicas when there are many."
            )
        elif now - self.silent_since > 3600 * hours:
            raise Unfinished(
                f"the storage has not answered for {duration(now - self.silent_since)}, longer than"
                f" pairs.patience_hours, so that {len(self.finished)} finished shards are lost: {error}"
            )

    def _after(self, tries: int, then: Callable[[], None]) -> None:
        """Do something later: the later, the more often it was tried."""
        self.later.append((time.monotonic() + min(PAUSE * 2 ** min(tries, 10), LONGEST), then))
