"""Noise-token pairs at scale (Alg. 1): a pool of teachers turns numbered shards of noise into Parquet files.

Two stages of Ray Data: a teacher actor makes one whole shard, a CPU task commits it, so that the device never waits for
storage. What is committed is never made again; a run that was killed goes on where it stopped.
"""

from __future__ import annotations

import json
import math
import random
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import ray
import torch
import yaml
from ray.data import ActorPoolStrategy, DataContext
from ray.exceptions import RayError
from torch import Tensor

from pipeline import cluster, compilation, footprint, manifest, mlflow_store, pairs, storage, tracking
from pipeline.errors import Outage, Refused, Unfinished
from pipeline.manifest import Facts, Shard
from pipeline.models import checkpoints
from pipeline.models.base import Condition
from pipeline.progress import Progress, duration
from pipeline.recipe import Recipe, fingerprint
from pipeline.replica import Replica, outcome

FAILURES = 10  # failed shards at which the job stops; fewer are named at the end
DEATHS = 5  # times that a shard may take its actor down with it before it counts as failed
LEDGER = 60.0  # seconds between two records of what is committed; what a killed driver has not recorded is read again
TRACED = 16  # AR steps of a raster sequence that a plan traces
VERIFIED_ROWS = 64  # rows that verify derives again
AGREEMENT = 0.95  # smallest share of codes found again; float rounding on another device moves few of them


def generate(recipe: Recipe) -> str:
    """Make what is missing of the recipe's pair set; returns a summary.

    Raises ValueError or FileNotFoundError for bad input before any work, RuntimeError when shards failed.
    """
    recipe = cluster.portable(recipe)
    mlflow_store.check(recipe)
    recipe.check_filled("teacher", "pairs")
    uri, known = recipe.pairs_uri, manifest.facts_of(recipe)
    manifest.check_claim(uri, known)
    if recipe.teacher.compile:
        compilation.check("teacher.compile", recipe.cluster.runs_on)
    if recipe.pairs.verify:
        return verify(recipe, known)
    complete = storage.read_json(_manifest(uri)) if storage.exists(_manifest(uri)) else None
    count = max(recipe.pairs.count, complete["count"] if complete else 0)  # a set never shrinks
    there = manifest.committed(uri)
    shards = manifest.present(there, count, recipe.pairs.shard_rows)
    todo = [number for number, name in shards.items() if name is None]
    if complete and complete["count"] == count and not todo:
        if not recipe.dry_run:
            tracking.complete(recipe, "pairs", uri, lambda run: _log(run, recipe, complete))
        return f"Nothing is missing: {_described(uri, complete)}."
    _check_weights(recipe)
    if recipe.dry_run:
        return plan(recipe, known, count, todo)
    cluster.check_address()
    storage.check_writable(uri, needed=_rows_of(recipe, count, todo) * pairs.row_bytes(known))
    if len(todo) < len(shards):
        print(f"{uri} holds {len(shards) - len(todo)} of {len(shards)} shards; making the others.", flush=True)
    with tracking.Run.start(recipe, "pairs") as run:
        manifest.claim(uri, known, recipe)
        run.mark(uri)
        done = _complete(recipe, known, count, shards, manifest.recorded(uri, known, there), run)
    last = done["made"][-1]
    return f"Made {last['rows']:,} pairs in {duration(last['seconds'])}; {_described(uri, done)}."


def _check_weights(recipe: Recipe) -> None:
    """Hold the weight files against the recipe's networks without memory for either."""
    family, config = checkpoints.family(recipe.teacher), checkpoints.config(recipe.teacher)
    with torch.device("meta"):
        model = family.Teacher(config, recipe.teacher.filter)
    checkpoints.weights(model.tokenizer, recipe.teacher.tokenizer, recipe.teacher.unpickle)
    checkpoints.weights(model.network, recipe.teacher.checkpoint, recipe.teacher.unpickle)


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
    # The manifest needs the SHA-256 of what is there: it is read beside the teachers' work, not after it.
    with ThreadPoolExecutor(pairs.CHECKERS) as pool:
        unknown = [name for name in shards.values() if name and name not in recorded]
        there = [pool.submit(pairs.inspect_shard, uri, known, name) for name in unknown]
        made = _make(recipe, known, count, todo, kept, run) if todo else []
        checked = [future.result() for future in there]
    summary = {
        "rows": sum(shard.rows for shard in made),
        "seconds": round(time.monotonic() - start, 3),
        "batch": recipe.pairs.batch,
        "actors": recipe.pairs.actors,
        "device": recipe.cluster.runs_on,
        "mlflow_run": run.id,
    }
    complete = manifest.finish(uri, known, kept + checked + made, summary)
    _log(run, recipe, complete)
    return complete


def _log(run: tracking.Run, recipe: Recipe, complete: dict[str, Any]) -> None:
    """What MLflow is told of a complete set."""
    uri = recipe.pairs_uri
    run.dataset("pairs", uri, complete["fingerprint"], "output")
    run.tag("pairs_fingerprint", complete["fingerprint"])
    run.artifact("manifest.json", partial(storage.read_bytes, _manifest(uri)))
    run.conclude(f"{recipe.name}, {complete['count']:,} pairs", f"{_described(uri, complete)}.")


def _make(
    recipe: Recipe, known: Facts, count: int, todo: list[int], kept: list[Shard], run: tracking.Run
) -> list[Shard]:
    """Make and commit the shards ``todo``, with progress; RuntimeError naming those that failed."""
    made: list[Shard] = []
    failed: set[int] = set()
    total = math.ceil(count / recipe.pairs.shard_rows)
    replicas, rows, size, last = min(recipe.pairs.actors, len(todo)), 0, 0, time.monotonic()
    try:
        with cluster.session(recipe, replicas), Progress(total, "shards", done=total - len(todo)) as progress:
            for row in commits(recipe, known, count, todo):
                if row["error"]:
                    failed.add(int(row["number"]))
                    progress.say(f"shard {row['number']} failed: {row['error']}")
                    if len(failed) == FAILURES:
                        break
                    continue
                shard = Shard(**json.loads(row["shard"]))
                made.append(shard)
                rows, size = rows + shard.rows, size + shard.bytes
                speed, rate = rows / progress.seconds, size / 1e6 / progress.seconds
                progress.update(note=f"{speed:,.0f} rows/s, {rate:,.1f} MB/s")
                values = {"shards": progress.done, "rows_per_second": speed, "megabytes_per_second": rate}
                run.metrics(values, step=progress.done)
                if time.monotonic() - last > LEDGER:
                    _record(recipe, known, kept + made)
                    last = time.monotonic()
    finally:
        if len(made) < len(todo):
            _record(recipe, known, kept + made)
    if len(made) < len(todo):
        raise Unfinished(_lost(recipe, todo, made, failed))
    return made


def _record(recipe: Recipe, known: Facts, shards: list[Shard]) -> None:
    """Write the ledger if it can be written: it only saves the next run some reading."""
    with suppress(Refused, Outage):
        manifest.record(recipe.pairs_uri, known, shards)


def _lost(recipe: Recipe, todo: list[int], made: list[Shard], failed: set[int]) -> str:
    """Which shards were not made; those that took their process with them are named on stderr, having had no say."""
    lost = sorted(set(todo) - {shard.number for shard in made})
    for number in set(lost) - failed if len(failed) < FAILURES else ():
        print(f"shard {number} failed: its process or its node died {DEATHS + 1} times", file=sys.stderr)
    names = ", ".join(map(str, lost[:FAILURES])) + (", ..." if len(lost) > FAILURES else "")
    return (
        f"{len(lost)} of {len(todo)} shards were not made ({names}), see above for why; the others are committed in"
        f" {recipe.pairs_uri}, and the same command makes what is missing."
    )


def commits(
    recipe: Recipe, known: Facts, count: int, todo: list[int], replica: type[Replica] = Replica, **more: Any
) -> Iterator[dict[str, Any]]:
    """Numbers -> teacher -> Parquet file: {number, error, shard} of every shard as it is committed.

    ``replica`` is the actor's class, ``more`` what its constructor takes beside recipe and facts.
    """
    size = recipe.pairs.shard_rows
    DataContext.get_current().max_errored_blocks = FAILURES  # of shards whose process died every time
    tasks = [{"number": k, "rows": min(size, count - k * size)} for k in todo]
    made = ray.data.from_items(tasks, override_num_blocks=len(tasks)).map_batches(
        replica,
        fn_constructor_args=(recipe, known),
        fn_constructor_kwargs=more,
        batch_size=1,
        # One at a time: a shard that takes its actor down would take the retries of one queued behind it, too.
        compute=ActorPoolStrategy(size=min(recipe.pairs.actors, len(todo)), max_tasks_in_flight_per_actor=1),
        num_cpus=recipe.cluster.cpus,
        num_gpus=recipe.cluster.gpus,
        max_task_retries=DEATHS,
    )
    written = made.map_batches(
        commit,  # type: ignore[arg-type]  # Ray's type leaves no room for fn_kwargs
        fn_kwargs={"uri": recipe.pairs_uri, "known": known},
        batch_size=None,
        batch_format="pyarrow",
    )
    try:
        yield from written.iter_rows()
    except RayError as error:
        raise Unfinished(f"Ray ended the work early ({_last_line(error)}); the same command goes on.") from error


def commit(table: Any, uri: str, known: Facts) -> dict[str, np.ndarray]:
    """Write the Arrow table of one shard, or hand on the error that came instead."""
    if "error" in table.column_names:
        return {name: table[name].to_numpy() for name in table.column_names}
    number = int(table["sample_id"][0].as_py()) // known["shard_rows"]
    try:
        return outcome(number, pairs.write_shard(uri, known, table))
    except Exception as error:
        return outcome(number, error=error)


# ---- checking and planning


def verify(recipe: Recipe, known: Facts) -> str:
    """Check every shard of the complete set and derive some rows again through the teacher; returns a summary."""
    uri = recipe.pairs_uri
    complete = pairs.verify(uri)
    names = [shard["name"] for shard in complete["shards"]]
    chosen = pairs.load_shard(uri, known, random.choice(names))  # another one every time
    picked = np.sort(np.random.default_rng().permutation(len(chosen.ids))[:VERIFIED_ROWS])
    share = _on_replica(recipe, known, "agreement", chosen.take(picked))
    if share < AGREEMENT:
        raise Refused(
            f"only {share:.1%} of the codes of {len(picked)} rows of {uri} were found again through the teacher (from"
            f" id {chosen.ids[picked[0]]} on); they were not made as the manifest says: make the set again elsewhere."
        )
    return (
        f"Verified: {_described(uri, complete)}; all shards are whole, and {share:.2%} of the codes of {len(picked)}"
        " random rows were found again through the teacher."
    )


def plan(recipe: Recipe, known: Facts, count: int, todo: list[int]) -> str:
    """The resolved recipe and what a run would take, from the seconds of one batch; nothing is written."""
    left, batch = _rows_of(recipe, count, todo), min(recipe.pairs.batch, recipe.pairs.shard_rows)
    row = pairs.row_bytes(known)
    lines = [
        yaml.safe_dump(recipe.resolved(), sort_keys=False, default_flow_style=None),
        f"pair set     {recipe.pairs_uri}, fingerprint {fingerprint(known)[:12]}",
        f"rows         {count:,}; {left:,} in {len(todo)} shards are left to make",
        f"storage      at most {left * row / 1e9:,.2f} GB more, {row:,} bytes a row",
        *footprint_of(recipe).lines(batch, "pairs.batch", recipe.cluster.runs_on == "cuda"),
    ]
    try:
        seconds = _on_replica(recipe, known, "measure")
    except cluster.NoGpu as error:
        return "\n".join([*lines, f"time         not measured: {error}"])
    total, replicas = seconds * left / batch, max(1, min(recipe.pairs.actors, len(todo)))
    lines += [
        f"one batch    {batch} rows in {duration(seconds)} on one replica ({recipe.cluster.runs_on})",
        f"time         about {duration(total / replicas)} with {replicas} replica{'s' * (replicas > 1)}",
    ]
    if recipe.cluster.gpus:
        hours, price = total * recipe.cluster.gpus / 3600, recipe.cluster.usd_per_gpu_hour
        cost = "" if price is None else f", ${hours * price:,.2f} at ${price:g} an hour"
        lines.append(f"GPU-hours    {hours:,.2f}{cost}")
    return "\n".join(lines)


def footprint_of(recipe: Recipe) -> footprint.Footprint:
    """What a batch of Alg. 1 needs on one replica: the teacher's weights, caches and probabilities.

    Flow matching's own memory does not grow with the batch and is not traced: what it does depends on p. Of a raster
    sequence only the first steps are traced; each later one adds the same to the cache.
    """
    family, config = checkpoints.family(recipe.teacher), checkpoints.config(recipe.teacher)
    with torch.device("meta"):
        teacher = checkpoints.cast(family.Teacher(config, recipe.teacher.filter), recipe.teacher)

    def upto(steps: int) -> footprint.Footprint:
        """What the first ``steps`` AR steps need."""

        def choose(step: int, log_p: Tensor) -> Tensor:
            return torch.zeros(log_p.shape[:-1], dtype=torch.long)

        def work(samples: int) -> None:
            condition = Condition(torch.zeros(samples, dtype=torch.long))
            footprint.hollow(teacher).generate(condition, choose, stop=steps + 1)

        return footprint.trace(work)

    steps = config.layout.steps
    if steps <= TRACED or len(set(config.layout.groups)) > 1:
        return upto(steps)
    short, longer = upto(TRACED // 2), upto(TRACED)
    per_step = (longer.sample - short.sample) / (TRACED - TRACED // 2)
    return replace(longer, sample=round(longer.sample + (steps - TRACED) * per_step))


def _on_replica(recipe: Recipe, known: Facts, method: str, *args: Any) -> Any:
    """Call a method of one Replica, on the hardware that the recipe gives it."""
    return cluster.on_actor(recipe, Replica, (recipe, known), method, *args)


def _last_line(error: Exception) -> str:
    """What was raised in the worker; the lines before it are its traceback."""
    return " ".join(str(error).strip().splitlines()[-1].split())


def _rows_of(recipe: Recipe, count: int, todo: list[int]) -> int:
    size = recipe.pairs.shard_rows
    return sum(min(size, count - k * size) for k in todo)


def _manifest(uri: str) -> str:
    return storage.join(uri, "manifest.json")


def _described(uri: str, complete: dict[str, Any]) -> str:
    size = f"{len(complete['shards'])} shards, {complete['bytes'] / 1e6:,.1f} MB"
    return f"{uri} holds {complete['count']:,} pairs ({size}), fingerprint {complete['fingerprint'][:12]}"
