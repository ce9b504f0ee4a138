"""Noise-token pairs at scale (Alg. 1): a pool of teachers turns numbered shards of noise into Parquet files.

Two stages of Ray Data: a teacher actor makes one whole shard, a CPU task commits it, so that the device never waits for
storage. What is committed is never made again; a run that was killed goes on where it stopped.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

import numpy as np
import ray
import torch
from ray.data import ActorPoolStrategy, DataContext, Dataset
from torch import Tensor

from pipeline import cluster, flow, manifest, noise, pairs, storage, tracking
from pipeline.manifest import Facts, Shard
from pipeline.models import checkpoints
from pipeline.models.base import Condition
from pipeline.pairs import Rows
from pipeline.progress import Progress, duration
from pipeline.recipe import Recipe, fingerprint

FAILURES = 10  # shards that may fail before the job stops; those are named at the end
DEATHS = 5  # times that a shard may take its actor down with it before it counts as failed
VERIFIED_ROWS = 64  # rows that verify derives again
AGREEMENT = 0.95  # smallest share of codes found again; float rounding on another device moves few of them


def generate(recipe: Recipe) -> str:
    """Make what is missing of the recipe's pair set; returns a summary.

    Raises ValueError or FileNotFoundError for bad input before any model is built, RuntimeError when shards failed.
    """
    recipe = cluster.portable(recipe)
    uri, known = recipe.pairs_uri, manifest.facts_of(recipe)
    claimed = manifest.check_claim(uri, known)
    if recipe.pairs.verify:
        return verify(recipe, known)
    complete = storage.read_json(storage.join(uri, "manifest.json")) if _is_complete(uri) else None
    count = max(recipe.pairs.count, complete["count"] if complete else 0)  # a set never shrinks
    shards = manifest.present(manifest.committed(uri), count, recipe.pairs.shard_rows)
    if recipe.dry_run:
        return plan(recipe, known, count, shards)
    if complete and complete["count"] == count and None not in shards.values():
        return f"Nothing is missing: {_described(uri, complete)}."
    rows_left = sum(
        min(recipe.pairs.shard_rows, count - k * recipe.pairs.shard_rows) for k in _missing(shards)
    )
    storage.check_writable(uri, needed=rows_left * pairs.row_bytes(known))
    manifest.claim(uri, known, recipe)
    if claimed and len(_missing(shards)) < len(shards):
        print(f"Resuming {uri}: {len(_missing(shards))} of {len(shards)} shards are missing.", flush=True)
    cluster.connect(recipe)
    with tracking.Run.start(recipe, "pairs") as run:
        done = _complete(recipe, known, count, shards, run)
    last = done["made"][-1]
    return f"Made {last['rows']:,} pairs in {duration(last['seconds'])}; {_described(uri, done)}."


def _complete(
    recipe: Recipe, known: Facts, count: int, shards: dict[int, str | None], run: tracking.Run
) -> dict[str, Any]:
    """Make the missing shards, check those that were there, write the manifest; returns it."""
    uri, todo, start = recipe.pairs_uri, _missing(shards), time.monotonic()
    # Checking reads what is there once more (the manifest needs its SHA-256): beside the teachers' work, not after it.
    with ThreadPoolExecutor(pairs.CHECKERS) as pool:
        there = [pool.submit(pairs.inspect_shard, uri, known, name) for name in shards.values() if name]
        made = (
            list(_report(recipe, _shards(recipe, known, count, todo), len(shards), len(todo), run))
            if todo
            else []
        )
        failed = sorted(set(todo) - {shard.number for shard in made})
        if failed:
            raise RuntimeError(
                f"{len(failed)} of {len(todo)} shards could not be made ({', '.join(map(str, failed[:10]))}); the causes are"
                f" above; the others are committed in {uri}, and the same command makes what is missing."
            )
        checked = [future.result() for future in there]
    rows = sum(shard.rows for shard in made)
    summary = {
        "rows": rows,
        "seconds": round(time.monotonic() - start, 3),
        "batch": recipe.pairs.batch,
        "actors": recipe.pairs.actors,
        "device": _device(recipe),
        "mlflow_run": run.id,
    }
    complete = manifest.finish(uri, known, checked + made, summary)
    run.dataset("pairs", uri, complete["fingerprint"], "output")
    run.tag("pairs_fingerprint", complete["fingerprint"])
    run.artifact(storage.local(storage.join(uri, "manifest.json")))
    return complete


def _shards(recipe: Recipe, known: Facts, count: int, todo: list[int]) -> Dataset:
    """The dataset whose rows are the committed shards: numbers -> teacher -> Parquet file."""
    size = recipe.pairs.shard_rows
    DataContext.get_current().max_errored_blocks = FAILURES
    numbers = ray.data.from_items(
        [{"number": k, "rows": min(size, count - k * size)} for k in todo], override_num_blocks=len(todo)
    )
    made = numbers.map_batches(
        Replica,
        fn_constructor_args=(recipe, known),
        batch_size=1,
        compute=ActorPoolStrategy(size=min(recipe.pairs.actors, len(todo)), max_tasks_in_flight_per_actor=1),
        num_cpus=recipe.cluster.cpus,
        num_gpus=recipe.cluster.gpus,
        max_task_retries=DEATHS,
    )
    return made.map_batches(
        commit, fn_kwargs={"uri": recipe.pairs_uri, "known": known}, batch_size=None, batch_format="pyarrow"
    )


def _report(recipe: Recipe, shards: Dataset, total: int, todo: int, run: tracking.Run) -> Iterator[Shard]:
    """The shards as they are committed, with progress."""
    rows = size = 0
    with Progress(total, "shards", done=total - todo) as progress:
        for row in shards.iter_rows():
            shard = Shard(**json.loads(row["shard"]))
            rows, size = rows + shard.rows, size + shard.bytes
            speed, rate = rows / progress.seconds, size / 1e6 / progress.seconds
            progress.update(note=f"{speed:,.0f} rows/s, {rate:,.1f} MB/s")
            values = {"shards": progress.done, "rows_per_second": speed, "megabytes_per_second": rate}
            run.metrics(values, step=progress.done)
            yield shard


class Replica:
    """A teacher in an actor of its own."""

    def __init__(self, recipe: Recipe, known: Facts) -> None:
        torch.set_num_threads(max(1, int(recipe.cluster.cpus)))
        self.recipe, self.known, self.device = recipe, known, _device(recipe)
        self.teacher = checkpoints.teacher(recipe.teacher).to(self.device)

    def __call__(self, task: dict[str, np.ndarray]) -> Any:
        """{"number": [k], "rows": [r]} -> the Arrow table of the first r rows of shard k."""
        return pairs.table(self.known, self.rows(int(task["number"][0]), int(task["rows"][0])))

    def rows(self, number: int, rows: int) -> Rows:
        """The first ``rows`` rows of shard ``number``.

        Batches are cut at fixed offsets, and one that ``rows`` ends in is made whole: so no row meets other neighbours
        than in a complete shard, and not even the rounding differs.
        """
        size, batch = self.known["shard_rows"], self.recipe.pairs.batch
        ids = number * size + np.arange(size)
        parts = [self.make(ids[begin : begin + batch]) for begin in range(0, rows, batch)]
        made = Rows.join(parts).take(slice(0, rows))
        return made if self.known["noise"] == "stored" else made._replace(noise=None)

    def make(self, ids: np.ndarray) -> Rows:
        """Alg. 1 for the given samples, together."""
        labels = noise.labels(ids, self.teacher.layout.classes)
        drawn = noise.gaussian(self.known["seed"], ids, *manifest.noise_shape(self.known))
        tokens = self._generate(labels, drawn)
        return Rows(ids, labels, drawn, tokens.cpu().numpy().astype(np.uint16))

    def agreement(self, rows: Rows) -> float:
        """Share of the stored codes that flow matching finds again, each given the stored codes before it."""
        stored = torch.from_numpy(rows.tokens.astype(np.int64)).to(self.device)
        drawn = noise.gaussian(self.known["seed"], rows.ids, *manifest.noise_shape(self.known))
        found: list[Tensor] = []
        self._generate(rows.labels, drawn, stored, found)
        return (torch.cat(found, dim=1) == stored).float().mean().item()

    def measure(self) -> float:
        """Seconds of one batch, after a short one to warm up."""
        batch = min(self.recipe.pairs.batch, self.known["shard_rows"])
        self.make(np.arange(min(2, batch)))
        start = time.perf_counter()
        self.make(np.arange(batch))
        return time.perf_counter() - start

    @torch.no_grad()
    def _generate(
        self,
        labels: np.ndarray,
        drawn: np.ndarray,
        forced: Tensor | None = None,
        found: list[Tensor] | None = None,
    ) -> Tensor:
        """Codes [B, n] of the noise; with ``forced`` codes the teacher goes on from those, and its own go to ``found``."""
        x = torch.from_numpy(drawn.astype(np.float32)).to(self.device)
        codebook, layout = self.teacher.codebook.float(), self.teacher.layout

        def choose(step: int, log_p: Tensor) -> Tensor:
            codes = flow.match(x[:, layout.span(step)], log_p, codebook, self.recipe.pairs.solver)
            if forced is None or found is None:
                return codes
            found.append(codes)
            return forced[:, layout.span(step)]

        return self.teacher.generate(Condition(torch.from_numpy(labels).to(self.device)), choose)


def commit(table: Any, uri: str, known: Facts) -> dict[str, np.ndarray]:
    """Write the table of one shard; its line of the manifest as JSON."""
    return {"shard": np.array([json.dumps(asdict(pairs.write_shard(uri, known, table)))])}


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
        raise ValueError(
            f"only {share:.1%} of the codes of {len(picked)} rows of {uri} were found again through the teacher (ids from"
            f" {chosen.ids[picked[0]]}); the rows were not made as the manifest says, so delete the set and make it anew."
        )
    return (
        f"Verified: {_described(uri, complete)}; all shards are whole, and {share:.2%} of the codes of {len(picked)} random"
        " rows were found again through the teacher."
    )


def plan(recipe: Recipe, known: Facts, count: int, shards: dict[int, str | None]) -> str:
    """The resolved recipe and what a run would take, from the seconds of one batch; nothing is written."""
    size, todo = recipe.pairs.shard_rows, _missing(shards)
    left = sum(min(size, count - k * size) for k in todo)
    batch = min(recipe.pairs.batch, size)
    seconds = _on_replica(recipe, known, "measure") if todo else 0.0
    total = seconds * left / batch
    replicas = max(1, min(recipe.pairs.actors, len(todo)))
    lines = [
        json.dumps(recipe.resolved(), indent=2),
        f"pair set     {recipe.pairs_uri}, fingerprint {fingerprint(known)}",
        f"rows         {count:,} in {len(shards)} shards; {len(todo)} shards are left, {left:,} rows",
        f"one batch    {batch} rows in {duration(seconds)} on one replica ({_device(recipe)})"
        if todo
        else "",
        f"time         about {duration(total / replicas)} with {replicas} replicas",
        f"storage      at most {left * pairs.row_bytes(known) / 1e9:.2f} GB more, {pairs.row_bytes(known):,} bytes a row",
    ]
    if recipe.cluster.gpus:
        hours = total * recipe.cluster.gpus / 3600
        price = recipe.cluster.usd_per_gpu_hour
        dollars = f", ${hours * price:,.2f}" if price is not None else ""
        lines.append(f"GPU-hours    {hours:,.2f}{dollars}")
    return "\n".join(line for line in lines if line)


def _on_replica(recipe: Recipe, known: Facts, method: str, *args: Any) -> Any:
    """Call a method of one Replica, on the hardware that the recipe gives it."""
    cluster.connect(recipe)
    actor = ray.remote(Replica).options(num_cpus=recipe.cluster.cpus, num_gpus=recipe.cluster.gpus)
    return ray.get(getattr(actor.remote(recipe, known), method).remote(*args))


def _missing(shards: dict[int, str | None]) -> list[int]:
    return [number for number, name in shards.items() if name is None]


def _is_complete(uri: str) -> bool:
    return storage.exists(storage.join(uri, "manifest.json"))


def _device(recipe: Recipe) -> str:
    return "cuda" if recipe.cluster.gpus else "cpu"


def _described(uri: str, complete: dict[str, Any]) -> str:
    size = f"{len(complete['shards'])} shards, {complete['bytes'] / 1e6:,.1f} MB"
    return f"{uri} holds {complete['count']:,} pairs ({size}), fingerprint {complete['fingerprint'][:12]}"
