"""What training needs of memory, traced by running the very code of a step without memory.

``footprint`` knows how to trace; this module knows what. Of a text encoder the weights are added: what its pass over a
batch takes is gone before the student's begins, and is less.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from pipeline.models import checkpoints
from pipeline.numerics import footprint
from pipeline.numerics.footprint import Footprint
from pipeline.numerics.recomputation import recomputed
from pipeline.recipe import Recipe
from pipeline.text import encoder
from pipeline.training import batches, perceptual
from pipeline.training.losses import Loss
from pipeline.training.state import TrainingState
from pipeline.training.step import recomputable, step


def trace_worker(recipe: Recipe) -> Footprint:
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
    return replace(found, fixed=found.fixed + encoder.memory(recipe.text))
