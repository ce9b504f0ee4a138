"""Noise-token pairs at scale (Alg. 1): a pool of teachers turns numbered shards of noise into Parquet files.

``passes`` has Ray Data make and commit the shards. What is committed is never made again; a run that was killed goes on
where it stopped.
"""

from __future__ import annotations

import math
import random
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

from pipeline import storage
from pipeline.host.errors import Refused, Unfinished
from pipeline.host.progress import Progress, duration
from pipeline.pairs import manifest
from pipeline.pairs import shards as pairs
from pipeline.pairs.manifest import Facts, Shard
from pipeline.pairs.passes import FAILURES, commits, patiently
from pipeline.pairs.replica import Replica
from pipeline.recipe import Recipe
from pipeline.services import cluster, tracking
from pipeline.workflow import costs, preflight, status

NAMED = 10  # of them, in a sentence
LEDGER = 60.0  # seconds between two records of what is committed; what a killed driver has not recorded is read again
VERIFIED_SHARDS = 8  # of which verify derives rows again, and more where more machines made them
VERIFIED_ROWS = 16  # of each of those
AGREEMENT = 0.95  # smallest share of codes found again; float rounding on another device moves few of them


def generate(recipe: Recipe) -> str:
    """Make what is missing of the recipe's pair set; returns a summary.

    Raises ValueError or FileNotFoundError for bad input before any work, RuntimeError when shards failed. Nothing is
    claimed before Ray and MLflow are there.
    """
    recipe = cluster.portable(recipe)
    if recipe.status:
        return status.of_pairs(recipe)
    if recipe.dry_run:
        return costs.described(recipe)
    preflight.check(recipe, "generate_pairs")
    uri, known = recipe.pairs_uri, manifest.facts_of(recipe)
    if recipe.pairs.verify:
        return verify(recipe, known)
    files, complete = storage.sizes(uri), manifest.complete(uri)
    count = max(recipe.pairs.count, complete["count"] if complete else 0)  # a set never shrinks
    there = manifest.shards_among(files)
    shards = manifest.present(there, count, recipe.pairs.shard_rows)
    todo = [number for number, name in shards.items() if name is None]
    if complete and complete["count"] == count and not todo:
        tracking.complete(recipe, "pairs", uri, lambda run: _log(run, recipe, complete))
        manifest.tidy(uri, complete, files)
        return f"Nothing is missing: {_described(uri, complete)}."
    storage.check_writable(uri, needed=_rows_of(recipe, count, todo) * pairs.row_bytes(known))
    if len(todo) < len(shards):
        print(f"{uri} holds {len(shards) - len(todo)} of {len(shards)} shards; making the others.", flush=True)
    with _at_work(recipe, todo), tracking.Run.start(recipe, "pairs") as run:
        manifest.claim(uri, known, recipe)
        run.mark(uri)
        done = _complete(recipe, known, count, shards, manifest.recorded(uri, known, there), run)
    last = done["made"][-1]
    return f"Made {last['rows']:,} pairs in {duration(last['seconds'])}; {_described(uri, done)}."


@contextmanager
def _at_work(recipe: Recipe, todo: list[int]) -> Iterator[None]:
    """Ray for the shards ``todo``, once it is certain that its workers see what this process sees; none for none."""
    if not todo:
        yield
        return
    with cluster.session(recipe, min(recipe.pairs.actors, len(todo))):
        preflight.check_workers(recipe, "generate_pairs", recipe.pairs_uri)
        yield


def _complete(
    recipe: Recipe,
    known: Facts,
    count: int,
    shards: dict[int, str | None],
    recorded: dict[str, Shard],
    run: tracking.Run,
) -> dict[str, Any]:
    """Make the missing shards, check those that nobody recorded, write the manifest; returns it."""
    uri, start = recipe.pairs_uri, time.monotonic()
    todo = [number for number, name in shards.items() if name is None]
    kept = [recorded[name] for name in shards.values() if name in recorded]
    unknown = [name for name in shards.values() if name and name not in recorded]
    made: list[Shard] = []
    # The manifest needs the SHA-256 of what is there: it is read beside the teachers' work, not after it.
    with _checking(uri, known, unknown) as reading:

        def record() -> None:
            """Write the ledger if it can be written: it only saves the next run some reading."""
            found = kept + _results(reading) + made
            with suppress(Refused, Unfinished):
                if found:  # else the folder may not even be claimed
                    manifest.record(uri, known, found)

        try:
            if todo:
                _make(recipe, known, count, todo, made, record, run)
            checked = [future.result() for future in reading]
        except BaseException:
            record()
            raise
    summary = {
        "rows": sum(shard.rows for shard in made),
        "seconds": round(time.monotonic() - start, 3),
        "batch": recipe.pairs.batch,
        "actors": recipe.pairs.actors,
        "device": recipe.cluster.runs_on,
        "mlflow_run": run.id,
    }
    finish = partial(manifest.finish, uri, known, kept + checked + made, summary)
    complete = patiently(finish, recipe.pairs.patience_hours, partial(print, file=sys.stderr, flush=True))
    _log(run, recipe, complete)
    return complete


def _log(run: tracking.Run, recipe: Recipe, complete: dict[str, Any]) -> None:
    """What MLflow is told of a complete set."""
    uri = recipe.pairs_uri
    run.dataset("pairs", uri, complete["fingerprint"], "output")
    run.tag("pairs_fingerprint", complete["fingerprint"])
    run.artifact("manifest.json", partial(storage.read_bytes, storage.join(uri, manifest.MANIFEST)))
    run.conclude(f"{recipe.name}, {complete['count']:,} pairs", f"{_described(uri, complete)}.")


@contextmanager
def _checking(uri: str, known: Facts, names: list[str]) -> Iterator[list[Future[Shard]]]:
    """Shards that are read and checked in threads while the body runs; when it ends, what is not begun is left."""
    pool = ThreadPoolExecutor(pairs.CHECKERS)
    try:
        yield [pool.submit(pairs.inspect_shard, uri, known, name) for name in names]
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _results(reading: list[Future[Shard]]) -> list[Shard]:
    """Of those that are done and found to be whole."""
    done = [future for future in reading if future.done() and not future.cancelled()]
    return [future.result() for future in done if not future.exception()]


def _make(
    recipe: Recipe,
    known: Facts,
    count: int,
    todo: list[int],
    made: list[Shard],
    record: Callable[[], None],
    run: tracking.Run,
) -> None:
    """Make and commit the shards ``todo``, with progress, into ``made``; RuntimeError naming those that failed."""
    failed: set[int] = set()
    total = math.ceil(count / recipe.pairs.shard_rows)
    limit = FAILURES * min(recipe.pairs.actors, len(todo))
    rows, size, last = 0, 0, time.monotonic()
    with Progress(total, "shards", done=total - len(todo)) as progress:
        for outcome in commits(recipe, known, count, todo, progress):
            if outcome.shard is None:
                failed.add(outcome.number)
                progress.say(f"shard {outcome.number} failed: {outcome.error}")
                if len(failed) == limit:
                    break
                continue
            made.append(outcome.shard)
            rows, size = rows + outcome.shard.rows, size + outcome.shard.bytes
            speed, rate = rows / progress.seconds, size / 1e6 / progress.seconds
            progress.update(note=f"{speed:,.0f} rows/s, {rate:,.1f} MB/s")
            values = {"shards": progress.done, "rows_per_second": speed, "megabytes_per_second": rate}
            run.metrics(values, step=progress.done)
            if time.monotonic() - last > LEDGER:
                record()
                last = time.monotonic()
    if len(made) < len(todo):
        raise Unfinished(_missing(recipe, todo, made))


def _missing(recipe: Recipe, todo: list[int], made: list[Shard]) -> str:
    """Which shards were not made."""
    missing = sorted(set(todo) - {shard.number for shard in made})
    names = ", ".join(map(str, missing[:NAMED])) + (", ..." if len(missing) > NAMED else "")
    return (
        f"{len(missing)} of {len(todo)} shards were not made ({names}), see above for why; the others are committed in"
        f" {recipe.pairs_uri}, and the same command makes what is missing."
    )


# ---- checking and planning


def verify(recipe: Recipe, known: Facts) -> str:
    """Check every shard of the complete set and derive some rows again through the teacher; returns a summary.

    The rows are of several shards, of every machine that made some at least one; each shard has to agree.
    """
    uri, chance = recipe.pairs_uri, random.Random()  # others every time
    complete = pairs.verify(uri)
    shards = _sample([Shard(**shard) for shard in complete["shards"]], chance)
    parts = []
    for shard in shards:
        picked = sorted(chance.sample(range(shard.rows), min(VERIFIED_ROWS, shard.rows)))
        parts.append(pairs.load_shard(uri, known, shard.name).take(picked))
    shares = _on_replica(recipe, known, "agreements", parts)
    count = sum(len(part.ids) for part in parts)
    share, worst = min(zip(shares, shards, strict=True), key=lambda pair: pair[0])
    if share < AGREEMENT:
        host = f", made on {worst.host}," if worst.host else ""
        raise Refused(
            f"only {share:.1%} of the codes of rows of {storage.join(uri, worst.name)}{host} were found again through"
            " the teacher; they were not made as the manifest says: make the set again elsewhere."
        )
    mean = sum(part.tokens.size * share for part, share in zip(parts, shares, strict=True))
    mean /= sum(part.tokens.size for part in parts)
    return (
        f"Verified: {_described(uri, complete)}; all shards are whole, and {mean:.2%} of the codes of {count} random"
        f" rows of {len(shards)} of them were found again through the teacher."
    )


def _sample(shards: list[Shard], chance: random.Random) -> list[Shard]:
    """Some shards at random, one of each machine that made some among them."""
    mixed = chance.sample(shards, len(shards))
    chosen = {shard.host: shard for shard in mixed}
    others = [shard for shard in mixed if shard is not chosen[shard.host]]
    return [*chosen.values(), *others[: max(0, VERIFIED_SHARDS - len(chosen))]]


def _on_replica(recipe: Recipe, known: Facts, method: str, *args: Any) -> Any:
    """Call a method of one Replica, on the hardware that the recipe gives it."""
    return cluster.on_actor(recipe, Replica, (recipe, known), method, *args)


def _rows_of(recipe: Recipe, count: int, todo: list[int]) -> int:
    size = recipe.pairs.shard_rows
    return sum(min(size, count - k * size) for k in todo)


def _described(uri: str, complete: dict[str, Any]) -> str:
    size = f"{len(complete['shards'])} shards, {complete['bytes'] / 1e6:,.1f} MB"
    return f"{uri} holds {complete['count']:,} pairs ({size}), fingerprint {complete['fingerprint'][:12]}"
