"""One training step of a tiny student, for the tests of what may only change its rounding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pipeline.models import checkpoints
from pipeline.models.base import Prediction
from pipeline.numerics.precision import autocast
from pipeline.recipe import Recipe
from pipeline.training import batches
from pipeline.training import step as training_step


class Step(NamedTuple):
    """What the student said, its loss, and the gradients of all its parameters in one vector."""

    prediction: Prediction
    loss: Tensor
    gradient: Tensor


def stirred(network: nn.Module) -> nn.Module:
    """The network with noise on all weights: fresh ones hold gates near 0, behind which no error would show."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            noise = 0.1 * torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise.to(parameter.device, parameter.dtype))
    return network


def step(recipe: Recipe, prepare: Callable[[nn.Module], Any] = lambda student: None, device: str = "cpu") -> Step:
    """A training step on made-up pairs; ``prepare`` may compile the student."""
    student, loss = training_step.build(recipe, torch.device(device))
    prepare(stirred(student))
    layout = checkpoints.config(recipe.teacher).layout
    pairs = batches.made_up(layout, recipe.train.batch)
    batch = batches.noised(pairs, 0, recipe.train, layout, loss.tokenizer.codebook)
    with autocast(recipe.train.precision, device):
        prediction = student(batch.x_t, batch.t, batch.condition)
        value, _ = loss(prediction, batch.tokens, batch.t)
    value.backward()
    gradient = torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None])
    return Step(Prediction(*(x.detach() for x in prediction)), value.detach(), gradient)


def with_precision(recipe: Recipe, precision: str) -> Recipe:
    """The recipe with all three of its precisions the same."""
    parts = {name: replace(getattr(recipe, name), precision=precision) for name in ("teacher", "train", "evaluate")}
    return replace(recipe, **parts)


def error(found: Tensor, exact: Tensor) -> float:
    """|found - exact| / |exact|."""
    return ((found.float() - exact).norm() / exact.norm()).item()
