"""Noise-token pairs at scale (Alg. 1): a pool of teachers turns numbered shards of noise into Parquet files.

What is committed is never made again; a run that was killed goes on where it stopped.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from pipeline import storage
from pipeline.host import events
from pipeline.host.progress import duration
from pipeline.pairs import completion, manifest
from pipeline.pairs.facts import PairFacts
from pipeline.pairs.manifest import Gap
from pipeline.recipe import Recipe
from pipeline.services import cluster, tracking
from pipeline.text.prompts import PromptList, described
from pipeline.workflow import costs, preflight, status, verification


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
    uri, facts = recipe.pairs_uri, PairFacts.of(recipe)
    if recipe.pairs.verify:
        return verification.verify(recipe, facts)
    files, complete = storage.sizes(uri), manifest.complete(uri)
    sizes = manifest.shards_among(files)
    gap = Gap.among(sizes, facts, recipe.pairs.count, complete)
    if complete and complete["count"] == gap.count and not gap.missing:
        tracking.complete(recipe, "pairs", uri, lambda run: _log(run, recipe, complete))
        manifest.tidy(uri, complete, files)
        return f"Nothing is missing: {manifest.describe(uri, complete)}."
    storage.check_writable(uri, needed=gap.rows_left * facts.row_bytes)
    if recipe.captions.uri:
        print(f"{described(PromptList.open(recipe.captions.uri, recipe.captions.column))}.", flush=True)
    if gap.names:
        print(f"{uri} holds {len(gap.names)} of {len(gap.present)} shards; making the others.", flush=True)
    done, total = len(gap.present) - len(gap.missing), len(gap.present)
    events.tell("begun", folder=uri, fingerprint=facts.fingerprint, unit="shard", done=done, total=total)
    with _at_work(recipe, gap), tracking.Run.start(recipe, "pairs") as run:
        manifest.claim(uri, facts, recipe)
        run.mark(uri)
        with run.watching_this_machine():
            inventory = completion.fill(recipe, gap, manifest.records(uri, facts, sizes), run)
        _log(run, recipe, inventory)
    last = inventory["made"][-1]
    return f"Made {last['rows']:,} pairs in {duration(last['seconds'])}; {manifest.describe(uri, inventory)}."


@contextmanager
def _at_work(recipe: Recipe, gap: Gap) -> Iterator[None]:
    """Ray for the missing shards, once it is certain that its workers see what this process sees; none for none."""
    if not gap.missing:
        yield
        return
    actors = recipe.pairs.actors
    with cluster.session(recipe, actors if actors == "auto" else min(actors, len(gap.missing))):
        preflight.check_workers(recipe, "generate_pairs", recipe.pairs_uri)
        yield


def _log(run: tracking.Run, recipe: Recipe, inventory: dict[str, Any]) -> None:
    """What MLflow is told of a complete set, by its manifest."""
    uri = recipe.pairs_uri
    run.dataset("pairs", uri, inventory["fingerprint"], "output")
    run.tag("pairs_fingerprint", inventory["fingerprint"])
    if captions := inventory["facts"].get("captions"):
        run.tag("prompts", f"{captions['rows']:,} rows")
        run.dataset("prompts", str(recipe.captions.uri), captions["sha256"], "input")
    run.artifact("manifest.json", partial(storage.read_bytes, storage.join(uri, manifest.MANIFEST)))
    run.conclude(f"{inventory['count']:,} pairs", f"{manifest.describe(uri, inventory)}.")
