"""What the machinery around a teacher takes at full size: a pair set made by a stand-in that costs nothing.

Rows a second, the driver's memory, the files, a run that has nearly nothing left to do, and how well replicas add up.
A real teacher's seconds come on top (``--dry_run`` of generate_pairs measures them).
"""

from __future__ import annotations

import json
import random
import resource
import time
from collections.abc import Iterator
from dataclasses import replace

from pipeline import storage
from pipeline.host.errors import Refused, Unfinished
from pipeline.host.progress import Progress, duration
from pipeline.models import checkpoints, standin
from pipeline.pairs import manifest
from pipeline.pairs.facts import PairFacts
from pipeline.pairs.manifest import Gap
from pipeline.pairs.passes import commits
from pipeline.recipe import Recipe
from pipeline.services import cluster
from pipeline.services.parts import counted
from pipeline.workflow import generate

PART = 10  # the first of two runs makes one part in so many; both show whether memory grows with the rows
LOST = 2  # shards that the run that goes on has to make
ACTORS = (1, 2, 4)
SHARDS = 15  # of each replica that is asked how well it adds up
ROWS, SECONDS = 64, 4.0  # of one such shard, which is one batch; a real one takes minutes


def scale(recipe: Recipe) -> str:
    """Markdown: the pair set of the recipe at a part of ``pairs.count`` and at all of it, and 1, 2 and 4 replicas.

    The sets lie in <run>/scale. Raises ValueError for one that is there already: it would be measured half made.
    """
    recipe = counted(cluster.portable(recipe))
    folder = storage.join(recipe.run, "scale")
    if storage.listing(folder):
        raise Refused(f"{folder} is not empty; delete it, or give another --run: a set is measured from its start.")
    if recipe.pairs.count < PART:
        raise Refused(f"pairs.count is {recipe.pairs.count}; give {PART} or more: a part and all of them are made.")
    if recipe.dry_run:
        return plan(recipe, folder)
    layout = checkpoints.config(recipe.teacher).layout
    lines = [
        f"# Scale of {recipe.name}",
        "",
        f"{layout.length} tokens of {layout.code_dim} dimensions, noise {recipe.pairs.noise}; a teacher that costs"
        f" nothing; {recipe.pairs.replicas} actors of {recipe.cluster.cpus:g} CPU.",
        "",
        *_full(recipe, folder),
        "",
        *_efficiency(recipe, folder),
    ]
    return "\n".join(lines)


def plan(recipe: Recipe, folder: str) -> str:
    """The resolved recipe and what would be made, where, and how large it is; nothing is written."""
    row = PairFacts.of(recipe, checksums={}).row_bytes  # which does not depend on weights
    count, settings = recipe.pairs.count, recipe.pairs
    pools = ", ".join(map(str, ACTORS))
    sleeping = SHARDS * SECONDS * len(ACTORS)
    return "\n".join(
        [
            json.dumps(recipe.resolved(), indent=2),
            f"scale     {folder}",
            f"rows      {count // PART:,}, then {count:,}, in shards of {settings.shard_rows:,} by"
            f" {settings.replicas} actors whose teacher costs nothing",
            f"storage   at most {count * row / 1e9:,.2f} GB, {row:,} bytes a row",
            f"pools     {pools} actors that sleep {SECONDS:g} s a shard, {SHARDS} shards each, noise derived",
            f"time      {duration(sleeping)} of sleeping, and the making of the rows, which is what is measured",
        ]
    )


def _full(recipe: Recipe, folder: str) -> list[str]:
    """A part of the set, all of it, and the run that goes on when two shards are missing."""
    recipe = standin.of(recipe, folder)
    recipe = replace(recipe, run=folder, pairs=replace(recipe.pairs, uri=storage.join(folder, "pairs")))
    out = ["| rows | made | seconds | rows/s | driver's memory, peak |", "|---:|---:|---:|---:|---:|"]
    for count in (recipe.pairs.count // PART, recipe.pairs.count):
        part = replace(recipe, pairs=replace(recipe.pairs, count=count))
        generate.generate(part)
        out.append(_row(part))
    uri, inventory = recipe.pairs_uri, manifest.read(recipe.pairs_uri)
    losses = random.Random(0).sample(inventory["shards"], min(LOST, len(inventory["shards"])))
    for shard in losses:
        storage.remove(storage.join(uri, shard["name"]))
    start = time.monotonic()
    generate.generate(recipe)
    again = time.monotonic() - start
    out.append(_row(recipe))
    start = time.monotonic()
    names = len(manifest.committed(uri))
    listing = time.monotonic() - start
    size, shards, rows = inventory["bytes"], len(inventory["shards"]), inventory["count"]
    return [
        *out,
        "",
        f"* {names:,} files of {size / shards / 1e6:,.1f} MB, {size / 1e9:,.2f} GB; {size / names:,.0f} bytes a file,"
        f" {size / rows:,.0f} bytes a row.",
        f"* One listing of them: {1000 * listing:,.0f} ms.",
        f"* With {len(losses)} shards lost, the same command took {duration(again)}, start of Ray's actors included.",
    ]


def _row(recipe: Recipe) -> str:
    """The last run of a set as a row of the table."""
    inventory = manifest.read(recipe.pairs_uri)
    run, peak = inventory["made"][-1], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    speed = run["rows"] / run["seconds"]
    return f"| {inventory['count']:,} | {run['rows']:,} | {run['seconds']:,.0f} | {speed:,.0f} | {peak:,.0f} MiB |"


def _efficiency(recipe: Recipe, folder: str) -> list[str]:
    """Pools of teachers that sleep a second a shard, so that cores do not limit."""
    out = [
        f"Teachers that sleep {SECONDS:g} s a shard of {ROWS} rows, {SHARDS} shards each, so that cores do not limit:",
        "",
        "| actors | first shard after, s | the last two thirds, s | shards/s | efficiency |",
        "|---:|---:|---:|---:|---:|",
    ]
    for actors in ACTORS:
        place = storage.join(folder, f"actors-{actors}")
        sleepers = standin.of(recipe, place, SECONDS)
        shards = actors * SHARDS
        pairs = replace(recipe.pairs, uri=storage.join(place, "pairs"), actors=actors, shard_rows=ROWS, batch=ROWS)
        sleepers = replace(sleepers, run=place, pairs=replace(pairs, count=shards * ROWS, noise="derived"))
        start, times = time.monotonic(), list(commit_times(sleepers, shards))
        begun = shards // 3  # by then every process is there
        took = times[-1] - times[begun - 1]
        speed = (shards - begun) / took
        out.append(f"| {actors} | {times[0] - start:.1f} | {took:.1f} | {speed:.2f} | {speed * SECONDS / actors:.3f} |")
    return out


def commit_times(recipe: Recipe, shards: int) -> Iterator[float]:
    """The moments at which the shards of a new set were committed; RuntimeError if one failed."""
    facts = PairFacts.of(recipe)
    gap = Gap.among((), facts, recipe.pairs.count)
    manifest.claim(recipe.pairs_uri, facts, recipe)
    with cluster.session(recipe, recipe.pairs.replicas), Progress(shards, "shards") as progress:
        for outcome in commits(recipe, gap, progress):
            if outcome.error:
                raise Unfinished(f"shard {outcome.number} failed: {outcome.error}; see Ray's logs.")
            progress.update()
            yield time.monotonic()
