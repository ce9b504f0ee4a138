"""What generation and training need of memory, traced by running the very code of the jobs without memory.

``footprint`` knows how to trace; this module knows what. Of a text encoder the weights are added: what its pass over a
batch takes is gone before the other networks' begins, and is less.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from pipeline.models import checkpoints, conditions
from pipeline.numerics import footprint
from pipeline.numerics.footprint import Footprint
from pipeline.numerics.recomputation import recomputed
from pipeline.recipe import Recipe
from pipeline.text import encoder
from pipeline.training import batches, perceptual
from pipeline.training.losses import Loss
from pipeline.training.state import TrainingState
from pipeline.training.step import recomputable, step

TRACED = 16  # AR steps of a raster sequence that are traced


def of_generation(recipe: Recipe) -> Footprint:
    """What a batch of Alg. 1 needs on one replica: the teacher's weights, caches and probabilities, the text encoder.

    Flow matching's own memory does not grow with the batch and is not traced: what it does depends on p. Of a raster
    sequence only the first steps are traced; each later one adds the same to the cache.
    """
    family, config = checkpoints.family(recipe.teacher), checkpoints.config(recipe.teacher)
    caption = checkpoints.caption_shape(recipe.teacher)
    with torch.device("meta"):
        teacher = checkpoints.cast(family.Teacher(config, recipe.teacher.filter), recipe.teacher)

    def upto(steps: int) -> Footprint:
        """What the first ``steps`` AR steps need."""

        def choose(step: int, log_p: Tensor) -> Tensor:
            return torch.zeros(log_p.shape[:-1], dtype=torch.long)

        def work(samples: int) -> None:
            condition = conditions.blank(samples, caption)
            footprint.hollow(teacher).generate(condition, choose, stop=steps + 1)

        return footprint.trace(work)

    steps = config.layout.steps
    if steps <= TRACED or len(set(config.layout.groups)) > 1:
        return _with_encoder(upto(steps), recipe)
    short, longer = upto(TRACED // 2), upto(TRACED)
    per_step = (longer.sample - short.sample) / (TRACED - TRACED // 2)
    return _with_encoder(replace(longer, sample=round(longer.sample + (steps - TRACED) * per_step)), recipe)


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
