"""What an actor of an evaluation needs of memory, traced by running the very code of its networks without memory.

Its networks stand there together, and work one after the other: the teacher generates, a student jumps, the tokenizer
decodes. ``footprint`` knows how to trace; this module knows what.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch

from pipeline.models import checkpoints, conditions
from pipeline.models.base import Student, Teacher
from pipeline.numerics import footprint
from pipeline.numerics.footprint import Footprint
from pipeline.pairs.memory import trace_replica
from pipeline.recipe import Recipe
from pipeline.sampling.samplers import FewStep, Inputs, Models, Sampler
from pipeline.settings.evaluate import EvaluateSettings
from pipeline.text import encoder

# Bytes of the weights of what scores, all float32: Inception-v3 of FID, CLIP ViT-B/32, DINOv2 ViT-L/14. What they need
# for a batch comes after decoding and is not traced.
INCEPTION, CLIP, DINOV2 = 96_000_000, 606_000_000, 1_217_000_000

Pass = Callable[[Models, int], object]


def trace_actor(recipe: Recipe, samplers: Sequence[Sampler]) -> Footprint:
    """What a batch of whichever of ``samplers`` takes most needs on one actor, beside all networks that it holds.

    Recorded as CUDA graphs, the jump from each AR step and decoding each keep the memory of a pass for themselves.
    """
    layout = checkpoints.config(recipe.teacher).layout
    jumps = sorted({t for sampler in samplers for t in sampler.jumps(layout)})
    teacher, student = _networks(recipe)
    holders = (teacher, student if jumps else None)
    held = _traced(recipe, holders, lambda models, samples: None).fixed
    passes: list[Pass] = [_decode, *(partial(_jump, t=t, split=recipe.train.split) for t in jumps)]
    takes = [_beside(_traced(recipe, holders, one), held) for one in passes]
    if any(not (sampler.frequencies or isinstance(sampler, FewStep)) for sampler in samplers):
        alone = _traced(recipe, (teacher, None), lambda models, samples: None).fixed + encoder.memory(recipe.text)
        takes.append(_beside(trace_replica(recipe), alone))
    if recipe.records("evaluate"):
        most = Footprint(sum(one.fixed for one in takes), sum(one.sample for one in takes))
    else:
        most = max(takes, key=lambda one: one.fixed + one.sample * recipe.evaluate.batch)
    return replace(most, fixed=most.fixed + held + encoder.memory(recipe.text) + _scorers(recipe.evaluate))


def _networks(recipe: Recipe) -> tuple[Teacher, Student]:
    """Teacher and student of a recipe, without weights."""
    family, config = checkpoints.family(recipe.teacher), checkpoints.config(recipe.teacher)
    options = checkpoints.student_options(recipe.teacher, recipe.train.student_options)
    with torch.device("meta"):
        teacher = checkpoints.cast(family.Teacher(config, recipe.teacher.filter), recipe.teacher)
        return teacher.eval(), family.Student(config, teacher.codebook, **options).eval()


def _traced(recipe: Recipe, networks: tuple[Teacher, Student | None], call: Pass) -> Footprint:
    """The footprint of a call of so many samples beside the networks."""
    caption = checkpoints.caption_shape(recipe.teacher)
    positions = networks[0].layout.length + (caption[0] if caption else 1)

    @torch.no_grad()
    def work(samples: int) -> None:
        for network in filter(None, networks):
            footprint.hollow(network)
        precisions = recipe.teacher.precision, recipe.evaluate.precision
        call(Models(*networks, recipe.pairs.solver, recipe.evaluate.seed, None, "cpu", *precisions), samples)

    return footprint.trace(work, square=positions if recipe.cluster.runs_on == "cuda" else 0)


def _decode(models: Models, samples: int) -> None:
    layout = models.layout
    models.decode(torch.empty(samples, layout.length, layout.code_dim), student=models.student is not None)


def _jump(models: Models, samples: int, t: int, split: int) -> None:
    noise = torch.empty(samples, models.layout.length, models.layout.code_dim)
    inputs = Inputs(conditions.blank(samples, models.teacher.caption), noise, torch.empty(noise.shape[:2]))
    models.jump(noise, inputs, t, split)


def _beside(found: Footprint, held: int) -> Footprint:
    """The footprint without the weights that are held anyway."""
    return replace(found, fixed=found.fixed - held)


def _scorers(settings: EvaluateSettings) -> int:
    """Bytes of the weights of what scores; the digits' own network has next to none."""
    inceptions = 0 if settings.features == "digits" else len(settings.flavours)
    return INCEPTION * inceptions + CLIP * bool(settings.clip) + DINOV2 * bool(settings.dinov2)
