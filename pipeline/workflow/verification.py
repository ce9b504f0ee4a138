"""Whether a complete set is what its manifest says: every shard whole, and codes that the teacher finds again."""

from __future__ import annotations

import random

from pipeline import storage
from pipeline.host.errors import Refused
from pipeline.pairs import manifest, shards
from pipeline.pairs.facts import PairFacts, conditioning
from pipeline.pairs.manifest import Shard
from pipeline.pairs.replica import Replica
from pipeline.recipe import Recipe
from pipeline.services import cluster

SHARDS = 8  # of which rows are derived again, and more where more machines made them
ROWS = 16  # of each of those
AGREEMENT = 0.95  # smallest share of codes found again; float rounding on another device moves few of them


def verify(recipe: Recipe, facts: PairFacts) -> str:
    """Check every shard of the complete set and derive some rows again through the teacher; returns a summary.

    The rows are of several shards, of every machine that made some at least one; each shard has to agree. Raises
    Refused for a shard that is damaged or does not agree, FileNotFoundError for a set that is not complete.
    """
    uri, chance = recipe.pairs_uri, random.Random()  # others every time
    inventory = shards.verify(uri, conditioning(recipe) if facts.captions else None)
    sample = _sample([Shard(**shard) for shard in inventory["shards"]], chance)
    parts = []
    for shard in sample:
        places = sorted(chance.sample(range(shard.rows), min(ROWS, shard.rows)))
        parts.append(shards.load_shard(uri, facts, shard.name).take(places))
    shares = cluster.on_actor(recipe, Replica, (recipe, facts), "agreements", parts)
    count = sum(len(part.ids) for part in parts)
    share, worst = min(zip(shares, sample, strict=True), key=lambda pair: pair[0])
    if share < AGREEMENT:
        host = f", made on {worst.host}," if worst.host else ""
        raise Refused(
            f"only {share:.1%} of the codes of rows of {storage.join(uri, worst.name)}{host} were found again through"
            " the teacher; they were not made as the manifest says: make the set again elsewhere."
        )
    mean = sum(part.tokens.size * share for part, share in zip(parts, shares, strict=True))
    mean /= sum(part.tokens.size for part in parts)
    return (
        f"Verified: {manifest.describe(uri, inventory)}; all shards are whole, and {mean:.2%} of the codes of {count}"
        f" random rows of {len(sample)} of them were found again through the teacher."
    )


def _sample(choice: list[Shard], chance: random.Random) -> list[Shard]:
    """Some shards at random, one of each machine that made some among them."""
    order = chance.sample(choice, len(choice))
    of_hosts = {shard.host: shard for shard in order}
    others = [shard for shard in order if shard is not of_hosts[shard.host]]
    return [*of_hosts.values(), *others[: max(0, SHARDS - len(of_hosts))]]
