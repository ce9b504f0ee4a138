"""What a teacher replica needs of memory, traced by running its very code without memory, and the batch that fits.

``footprint`` knows how to trace; this module knows what. Of a text encoder the weights are added: what its pass over a
batch takes is gone before the teacher's begins, and is less.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from pipeline.models import checkpoints, conditions
from pipeline.models.graphs import Graphs
from pipeline.numerics import footprint
from pipeline.numerics.footprint import Footprint, Nodes
from pipeline.recipe import Recipe
from pipeline.text import encoder

TRACED = 16  # AR steps of a raster sequence that are traced
LARGEST = 256  # samples of a batch whose size is ours to choose; of more, reading the weights is a small part
CPU = 64  # of one on a CPU, which is soon busy


class Rehearsal:
    """A ``graphs.Capture`` for tensors without content: functions run when they are recorded, and replays do nothing.

    ``nodes`` are those of all its graphs.
    """

    def __init__(self) -> None:
        self.nodes = 0

    def __call__(self, function: Callable[[], object]) -> Callable[[], None]:
        with Nodes() as counter:
            function()
        self.nodes += counter.count
        return lambda: None


def trace_replica(recipe: Recipe) -> Footprint:
    """What a batch of Alg. 1 needs on one replica: the teacher's weights, caches and probabilities, the text encoder.

    Flow matching's own memory does not grow with the batch and is not traced: what it does depends on p. Of a raster
    sequence only the first steps are traced; each later one adds the same to the cache. Where CUDA graphs are recorded,
    the generation that does so is traced, with all that a recording keeps, and ``footprint.NODE`` counts for each node.
    """
    layout = checkpoints.config(recipe.teacher).layout
    raster = layout.steps > TRACED and len(set(layout.groups)) == 1
    found, nodes = _generated(recipe, TRACED if raster else layout.steps)
    if raster:
        short, few = _generated(recipe, TRACED // 2)
        more = (layout.steps - TRACED) / (TRACED - TRACED // 2)
        found = replace(found, sample=round(found.sample + more * (found.sample - short.sample)))
        nodes = round(nodes + more * (nodes - few))
    return replace(found, fixed=found.fixed + footprint.NODE * nodes + encoder.memory(recipe.text))


def _generated(recipe: Recipe, steps: int) -> tuple[Footprint, int]:
    """What the first ``steps`` AR steps need, and the nodes of their graphs."""
    family, config = checkpoints.family(recipe.teacher), checkpoints.config(recipe.teacher)
    caption, recorded = checkpoints.caption_shape(recipe.teacher), recipe.records("teacher")
    with torch.device("meta"):
        teacher = checkpoints.cast(family.Teacher(config, recipe.teacher.filter), recipe.teacher)
    nodes = 0

    def choose(step: int, log_p: Tensor) -> Tensor:
        return torch.zeros(log_p.shape[:-1], dtype=torch.long)

    def work(samples: int) -> None:
        """A generation, and where it is to be recorded a step of one before it: the second of a size is."""
        nonlocal nodes
        condition, rehearsal = conditions.blank(samples, caption), Rehearsal()
        teacher.graphs = Graphs(lambda: rehearsal, "cpu") if recorded else None
        footprint.hollow(teacher)
        for last in [1] * recorded + [steps]:
            teacher.generate(condition, choose, stop=last + 1)
        nodes = rehearsal.nodes

    return footprint.trace(work), nodes


def batch_size(recipe: Recipe) -> int:
    """``pairs.batch``, where the replica is to work: ``auto`` is what this process's share of its GPU holds.

    Of ``LARGEST`` samples at most, or of ``CPU`` without a GPU; and a shard is cut into equal batches. Where not even
    one sample should fit, it is one all the same.
    """
    if recipe.pairs.batch != "auto":
        return recipe.pairs.batch
    most = CPU
    if recipe.cluster.runs_on == "cuda":
        card = torch.cuda.get_device_properties(0).total_memory * min(1.0, recipe.cluster.gpus) / 1e9
        most = min(LARGEST, max(1, trace_replica(recipe).largest(card)))
    rows = recipe.pairs.shard_rows
    return math.ceil(rows / math.ceil(rows / most))
