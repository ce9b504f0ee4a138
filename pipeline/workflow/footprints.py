"""What generation and training need of memory, traced by running the very code of the jobs without memory.

``footprint`` knows how to trace; this module knows what. Of a text encoder the weights are added: what its pass over a
batch takes is gone before the other networks' begins, and is less.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from pipeline.models import checkpoints, conditions
from pipeline.models.graphs import Graphs
from pipeline.numerics import footprint
from pipeline.numerics.footprint import Footprint, Nodes
from pipeline.numerics.recomputation import recomputed
from pipeline.recipe import Recipe
from pipeline.text import encoder
from pipeline.training import batches, perceptual
from pipeline.training.losses import Loss
from pipeline.training.state import TrainingState
from pipeline.training.step import recomputable, step

TRACED = 16  # AR steps of a raster sequence that are traced


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


def of_generation(recipe: Recipe) -> Footprint:
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
    return _with_encoder(replace(found, fixed=found.fixed + footprint.NODE * nodes), recipe)


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


def of_training(recipe: Recipe) -> Footprint:
    """What ``step`` needs on one worker: student, gradients, optimiser, average, frozen networks, activations."""
    settings = replace(recipe.train, micro_batch=0)  # what is traced is taken at once
    if settings.precision == "auto":
        settings = replace(settings, precision="fp32")  # the workers settle it, and this one takes more
    family, config = checkpoints.family(recipe.teacher), checkpoints.config(recipe.teacher)
    caption = checkpoints.caption_shape(recipe.teacher)
    with torch.device("meta"):
        tokenizer = family.Tokenizer(config).eval().requires_grad_(False)
        options = checkpoints.student_options(recipe.teacher, settings.student_options)
        student = family.Student(config, tokenizer.codebook, **options).train()
    network = perceptual.network(settings.perceptual, pretrained=False) if settings.lpips else None
    if settings.recompute:
        recomputed(recomputable(student, tokenizer, network))

    def work(samples: int) -> None:
        """Two optimiser steps on so many samples."""
        for module in filter(None, (tokenizer, student, network)):
            footprint.hollow(module)
        loss, state = Loss(settings, tokenizer, network), TrainingState(student, settings)
        batch = batches.blank(config.layout, samples, caption)
        for _ in range(2):  # from the second on, the optimiser has its moments
            step(student, loss, state, batch, total=2)

    positions = config.layout.length + (caption[0] if caption else 1)
    found = footprint.trace(work, square=positions if recipe.cluster.runs_on == "cuda" else 0)
    return _with_encoder(found, recipe)


def _with_encoder(found: Footprint, recipe: Recipe) -> Footprint:
    """The footprint with the weights of the recipe's text encoder, if it has one, in their own precision."""
    return replace(found, fixed=found.fixed + encoder.memory(recipe.text)) if recipe.text.encoder else found
