"""From a gap to a complete set: missing shards are made, unrecorded ones checked meanwhile, the manifest comes last."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

from pipeline.host import events
from pipeline.host.errors import Refused, Unfinished
from pipeline.host.progress import Progress, pace
from pipeline.pairs import manifest, shards
from pipeline.pairs.commits import patiently
from pipeline.pairs.facts import PairFacts
from pipeline.pairs.manifest import Gap, Shard
from pipeline.pairs.passes import FAILURES, commits
from pipeline.recipe import Recipe
from pipeline.services import tracking
from pipeline.services.parts import crew_for

NAMED = 10  # shards that a sentence names
LEDGER = 60.0  # seconds between two records of what is committed; what a killed driver has not recorded is read again


def fill(recipe: Recipe, gap: Gap, records: dict[str, Shard], run: tracking.Run) -> dict[str, Any]:
    """Make the missing shards, check those that nobody recorded, write the manifest; returns it.

    ``records`` are ``manifest.records``. The folder is claimed; where shards are missing, in ``cluster.session``.
    Raises Unfinished naming the shards that were not made, and Refused for a damaged one.
    """
    uri, start = recipe.pairs_uri, time.monotonic()
    old = [records[name] for name in gap.names if name in records]
    new: list[Shard] = []
    # The manifest needs the SHA-256 of what is there: it is read beside the teachers' work, not after it.
    with _checks(uri, gap.facts, [name for name in gap.names if name not in records]) as checks:

        def record() -> None:
            """Write the ledger if it can be written: it only saves the next run some reading."""
            lines = old + _results(checks) + new
            with suppress(Refused, Unfinished):
                if lines:  # else the folder may not even be claimed
                    manifest.record(uri, gap.facts, lines)

        try:
            if gap.missing:
                _make(recipe, gap, new, record, run)
            old += [check.result() for check in checks]
        except BaseException:
            record()
            raise
    summary = {
        "rows": sum(shard.rows for shard in new),
        "seconds": round(time.monotonic() - start, 3),
        "batch": recipe.pairs.batch,
        "actors": recipe.pairs.actors,
        "device": recipe.cluster.runs_on,
        "mlflow_run": run.id,
    }
    finish = partial(manifest.finish, uri, gap.facts, old + new, summary)
    return patiently(finish, recipe.pairs.patience_hours, partial(print, file=sys.stderr, flush=True))


@contextmanager
def _checks(uri: str, facts: PairFacts, names: list[str]) -> Iterator[list[Future[Shard]]]:
    """Shards that are read and checked in threads while the body runs; when it ends, what is not begun is left."""
    pool = ThreadPoolExecutor(shards.CHECKERS)
    try:
        yield [pool.submit(shards.inspect_shard, uri, facts, name) for name in names]
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _results(checks: list[Future[Shard]]) -> list[Shard]:
    """The shards whose check has ended and found them whole."""
    ends = [check for check in checks if check.done() and not check.cancelled()]
    return [check.result() for check in ends if not check.exception()]


def _make(recipe: Recipe, gap: Gap, new: list[Shard], record: Callable[[], None], run: tracking.Run) -> None:
    """Make and commit the missing shards, with progress, into ``new``; Unfinished naming those that failed."""
    failures: set[int] = set()
    missing, total = gap.missing, len(gap.present)
    limit = FAILURES * crew_for(recipe, recipe.pairs.actors, len(missing)).now
    rows, size, last = 0, 0, time.monotonic()
    with Progress(total, "shards", done=total - len(missing)) as progress:
        for outcome in commits(recipe, gap, progress):
            if outcome.shard is None:
                failures.add(outcome.number)
                progress.say(f"shard {outcome.number} failed: {outcome.error}")
                if len(failures) == limit:
                    break
                continue
            new.append(outcome.shard)
            rows, size = rows + outcome.shard.rows, size + outcome.shard.bytes
            speed, rate = rows / progress.seconds, size / 1e6 / progress.seconds
            progress.update(note=f"{pace(speed)} rows/s, {pace(rate)} MB/s")
            values = {"shards": progress.done, "rows_per_second": speed, "megabytes_per_second": rate}
            run.metrics(values, step=progress.done)
            committed = {"number": outcome.number, "rows": outcome.shard.rows, "bytes": outcome.shard.bytes}
            events.tell("shard", folder=recipe.pairs_uri, **committed, done=progress.done, total=total)
            if time.monotonic() - last > LEDGER:
                record()
                last = time.monotonic()
    rest = sorted(set(missing) - {shard.number for shard in new})
    if rest:
        names = ", ".join(map(str, rest[:NAMED])) + (", ..." if len(rest) > NAMED else "")
        raise Unfinished(
            f"{len(rest)} of {len(missing)} shards were not made ({names}), see above for why; the others are committed"
            f" in {recipe.pairs_uri}, and the same command makes what is missing."
        )
