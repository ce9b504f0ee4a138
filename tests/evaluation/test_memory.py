"""What an actor of an evaluation needs of memory, against what its networks take."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import Family, tiny

from pipeline.evaluation.memory import CLIP, DINOV2, INCEPTION, trace_actor
from pipeline.models import checkpoints
from pipeline.numerics.footprint import Footprint, Meter
from pipeline.pairs.memory import trace_replica
from pipeline.recipe import Recipe
from pipeline.sampling.samplers import Autoregressive, FewStep, OneStepStar, Sampler
from pipeline.sampling.samplers import Models as Networks

SAMPLES = 300


def measured(recipe: Recipe, samplers: list[Sampler]) -> int:
    """Bytes at the moment of most memory while each sampler draws and decodes a batch."""
    teacher = checkpoints.teacher(recipe.teacher)
    student = checkpoints.new_student(recipe.teacher, teacher, recipe.train.student_options, 0).eval()
    with Meter() as meter, torch.no_grad():
        teacher = copy.deepcopy(teacher)  # so that its weights count
        student = copy.deepcopy(student)
        student.codebook = teacher.codebook
        models = Networks(teacher, student, recipe.pairs.solver, 2)
        for sampler in samplers:
            models.decode(sampler.draw(models, np.arange(SAMPLES)), sampler.student)
    return meter.peak


def planned(recipe: Recipe, *samplers: Sampler) -> Footprint:
    return trace_actor(replace(recipe, evaluate=replace(recipe.evaluate, batch=SAMPLES)), samplers)


@pytest.mark.parametrize("family", ["var", "llamagen"])
def test_a_batch_takes_what_the_plan_says(tmp_path: Path, family: Family) -> None:
    """The jump or the decoder, whichever is more, beside both networks; its noise and its codes are small beside it."""
    recipe, sampler = tiny(tmp_path, family), FewStep(1, (1, 2))
    need = planned(recipe, sampler)
    assert measured(recipe, [sampler]) == pytest.approx(need.fixed + SAMPLES * need.sample, rel=0.05)


def test_what_is_not_asked_for_is_not_counted(tmp_path: Path) -> None:
    """A student is held where one jumps, a teacher's generation counts where it is the most, a table costs no pass."""
    recipe = tiny(tmp_path)
    decoded = planned(recipe, OneStepStar())
    assert planned(recipe, OneStepStar(), FewStep(1)).fixed > decoded.fixed
    deep = tiny(tmp_path / "deep", depth=8, width=256, heads=8)
    assert planned(deep, Autoregressive()).sample == trace_replica(deep).sample > planned(deep, OneStepStar()).sample
    beside = {
        "features": "inception",
        "inception": "w",
        "reference": "r",
        "flavour": "both",
        "clip": "x",
        "dinov2": "y",
    }
    scored = planned(replace(recipe, evaluate=replace(recipe.evaluate, **beside)), OneStepStar())
    assert scored.fixed - decoded.fixed == 2 * INCEPTION + CLIP + DINOV2


def test_every_recording_keeps_a_pass_for_itself(tmp_path: Path) -> None:
    """A jump from each AR step and decoding; eagerly the largest of them counts alone."""
    recipe = tiny(tmp_path)
    on_gpu = replace(recipe, cluster=replace(recipe.cluster, gpus=1), train=replace(recipe.train, workers=1))
    eager = replace(on_gpu, evaluate=replace(on_gpu.evaluate, graphs=False))
    recorded = replace(on_gpu, evaluate=replace(on_gpu.evaluate, graphs=True))
    plain, one = planned(eager, FewStep(1, (1,))), planned(recorded, FewStep(1, (1,)))
    assert planned(eager, FewStep(1, (1, 2, 3))).sample == pytest.approx(plain.sample, rel=0.1)
    two, three = (planned(recorded, FewStep(1, steps)).sample for steps in ((1, 2), (1, 2, 3)))
    assert plain.sample < one.sample < two < three
    assert three - two == pytest.approx(two - one.sample, rel=0.1)
