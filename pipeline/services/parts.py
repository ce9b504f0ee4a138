"""Units of work made by a pool of Ray Data actors, whoever dies meanwhile: the parts of a report, or of many images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import ray.data

from pipeline.recipe import Recipe
from pipeline.services import cluster
from pipeline.services.heartbeat import Heartbeat

RETRIES = 5  # of a part whose actor died; a node that is lost takes several before Ray has noticed


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
