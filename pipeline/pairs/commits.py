"""Arrow tables -> Parquet shards in the folder: a task for each, which waits where the storage does not answer.

What a worker sends the driver is a row: the shard's line of the manifest, or what went wrong with it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import TypeVar

import numpy as np
import pyarrow as pa

from pipeline.host.errors import Outage, Refused, Unfinished
from pipeline.host.progress import duration
from pipeline.pairs import manifest, shards
from pipeline.pairs.facts import PairFacts
from pipeline.pairs.manifest import Shard
from pipeline.pairs.stragglers import SPARE, Stragglers
from pipeline.services.heartbeat import Announcer
from pipeline.services.metrics import Recorder

PAUSE, LONGEST = 1.0, 60.0  # seconds before a storage that does not answer is asked again: at first, doubling, at most
T = TypeVar("T")


def commit(
    table: pa.Table,
    uri: str,
    facts: PairFacts,
    hours: float,
    announcer: Announcer,
    stragglers: Stragglers,
    record: Recorder,
) -> dict[str, np.ndarray]:
    """Write the Arrow table of one shard, if the folder still belongs to its set, or hand on what came instead of it.

    A second copy of what is or was written comes to nothing.

    While the storage does not answer it is asked again, for so many hours. ``record`` hears of what is committed.
    """
    if "error" in table.column_names:
        return {name: table[name].to_numpy() for name in table.column_names}
    number = facts.shard_of(int(table["sample_id"][0].as_py()))
    if not stragglers.claim(number, table["copy"][0].as_py()):
        return answer(SPARE)
    write, begun = partial(write_owned, uri, facts, table["host"][0].as_py(), table), time.monotonic()

    def say(text: str) -> None:
        announcer.tell(uri, text)
        announcer.wait(number)

    try:
        shard = patiently(write, hours, say)
        announcer.go_on(number, uri)
        seconds = time.monotonic() - begun
        record({"dd_pairs_committed_total": shard.rows, "dd_pairs_commit_seconds_total": seconds})
        return answer(number, shard)
    except (Refused, Unfinished) as error:
        return answer(number, error=str(error), fatal=type(error).__name__)
    except Exception as error:
        return answer(number, error=f"{type(error).__name__}: {error}")


def write_owned(uri: str, facts: PairFacts, host: str, table: pa.Table) -> Shard:
    """Write the Arrow table of a shard that ``host`` made, if the folder still belongs to its set."""
    manifest.check_owner(uri, facts)
    return shards.write_shard(uri, facts, table, host)


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


def answer(number: int, shard: Shard | None = None, error: str = "", fatal: str = "") -> dict[str, np.ndarray]:
    """A row for the driver: the shard's line of the manifest, or what went wrong; ``fatal`` names the class of it."""
    line = json.dumps(asdict(shard)) if shard else ""
    return {
        "number": np.array([number]),
        "error": np.array([error]),
        "fatal": np.array([fatal]),
        "shard": np.array([line]),
    }
