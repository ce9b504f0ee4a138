"""Units of work made by a pool of Ray Data actors, whoever dies meanwhile: the parts of a report, or of many images.

And how many actors that are, where a recipe leaves it to what there is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import ray
import ray.data

from pipeline.configuration.fields import Actors
from pipeline.recipe import Recipe
from pipeline.services import cluster
from pipeline.services.heartbeat import Heartbeat
from pipeline.services.ray_address import LOCAL, address

MOST = 256  # replicas that a cluster is asked for by ``actors: auto``
GROWING = 8  # replicas that a cluster is reckoned to have a place for soon, where it has none now
RETRIES = 5  # of a part whose actor died; a node that is lost takes several before Ray has noticed


@dataclass(frozen=True)
class Crew:
    """How many replicas share some units of work: ``most`` are asked for, and ``now`` there is a place for."""

    most: int
    now: int


def crew_for(recipe: Recipe, actors: Actors, units: int) -> Crew:
    """For a recipe's ``actors``, on the Ray that is joined, or on this machine.

    Of ``auto``, a cluster is asked for ``MOST``, so that it grows as far as it can. Those without a place wait for one.
    """
    if actors != "auto":
        return Crew(min(actors, units), min(actors, units))
    if address() == LOCAL:
        return Crew(min(cluster.own_places(recipe), units), min(cluster.own_places(recipe), units))
    if not ray.is_initialized():
        cluster.connect(recipe)
    return Crew(min(MOST, units), min(max(cluster.places(recipe), GROWING), units))


def counted(recipe: Recipe) -> Recipe:
    """The recipe with numbers in the place of ``auto``, those that there is a place for now: for what is measured."""

    def number(actors: Actors) -> int:
        """Of the actors of one pool."""
        if actors != "auto":
            return actors
        if address() == LOCAL:
            return cluster.own_places(recipe)
        cluster.connect(recipe)
        return max(1, cluster.places(recipe))

    pairs = replace(recipe.pairs, actors=number(recipe.pairs.actors))
    return replace(recipe, pairs=pairs, evaluate=replace(recipe.evaluate, actors=number(recipe.evaluate.actors)))


def made(
    beat: Heartbeat,
    recipe: Recipe,
    actors: int,
    units: Sequence[dict[str, Any]],
    actor: type,
    *args: Any,
    **more: Any,
) -> Iterator[dict[str, Any]]:
    """What ``actor(*args, working=..., **more)`` makes of each unit: rows, as they come, on the Ray that is joined.

    An actor is called with a batch of one unit, {name: array [1]}, in ``with working("part 3 of ..."):``. The unit of
    one that dies is given to another.
    """
    dataset = ray.data.from_items(list(units), override_num_blocks=len(units)).map_batches(
        actor,
        fn_constructor_args=args,
        fn_constructor_kwargs={"working": beat.announcer.working, **more},
        batch_size=1,
        **cluster.pool(recipe, actors, RETRIES),
    )
    return beat.rows(dataset)
