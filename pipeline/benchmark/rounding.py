"""How far a teacher's lower precisions move p, and how many codes of Alg. 1 change with it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import get_args

import numpy as np
import torch
from torch import Tensor

from pipeline import noise
from pipeline.benchmark.sheet import Claim, Row, Section
from pipeline.flow import matching
from pipeline.host.errors import Refused
from pipeline.models import checkpoints
from pipeline.models.base import Teacher
from pipeline.models.conditions import of_column
from pipeline.numerics.precision import Precision, products
from pipeline.pairs.facts import conditioning
from pipeline.recipe import Recipe
from pipeline.text import encoder

TOKENS = 10_000
BATCH = 16
BOUNDS = {"total variation of p, %": 0.5, "codes changed, %": 1.0}  # of fp16


def precisions(recipe: Recipe, device: torch.device) -> Section:
    """Total variation of p and codes changed in every precision of ``teacher.precision``, in per cent of fp32's."""
    tokens = checkpoints.config(recipe.teacher).layout.length
    images = math.ceil(TOKENS / tokens)
    exact = list(_drawn(recipe, "fp32", device, images))
    section = Section(
        "Precision",
        f"{images * tokens:,} tokens of {images:,} images by Alg. 1, with the recipe's filter and solver. Every"
        " precision meets the same noise and, before each token, the codes that fp32 drew. The base is fp32, so its row"
        " is 0 by definition. The total variation is that between the p that remain after guidance and filter, half the"
        " sum of |difference| over the codes, a token's mean; codes changed are those that flow matching finds.",
    )
    for precision in get_args(Precision):
        row: Row = {"teacher.precision": precision} | dict.fromkeys(BOUNDS)
        if precision == "fp32":
            row |= dict.fromkeys(BOUNDS, 0.0)
        elif precision != "tf32" or device.type == "cuda":
            try:
                row |= zip(BOUNDS, _distance(_drawn(recipe, precision, device, images, exact), exact), strict=True)
            except Refused:  # of float16's range; the row says so instead of numbers
                row |= dict.fromkeys(BOUNDS, "overflow")
        section.rows.append(row)
        if precision == "fp16":
            for name, bound in BOUNDS.items():
                value = row[name]
                worst = value if isinstance(value, float) else math.inf
                section.claims.append(Claim(f"{name[:1].upper()}{name[1:]}, fp16, {device.type}", worst, bound, True))
    return section


Drawn = tuple[Tensor, Tensor]
"""log p [B, n, V] of some images, and the codes [B, n] that flow matching found under it."""


@torch.no_grad()
def _drawn(
    recipe: Recipe, precision: Precision, device: torch.device, images: int, exact: list[Drawn] | None = None
) -> Iterator[Drawn]:
    """Images in batches, each token after the codes of ``exact``, or after its own. Refused where fp16 overflows."""
    teacher = checkpoints.teacher(replace(recipe.teacher, precision=precision, graphs=False)).to(device)
    for number, ids in enumerate(np.array_split(np.arange(images), math.ceil(images / BATCH))):
        with products(precision):
            drawn = _batch(teacher, recipe, ids, exact[number][1] if exact else None)
        teacher.check()
        yield drawn


def _batch(teacher: Teacher, recipe: Recipe, ids: np.ndarray, forced: Tensor | None) -> Drawn:
    layout, device = teacher.layout, teacher.codebook.device
    x = torch.from_numpy(noise.gaussian(recipe.pairs.seed, ids, layout.length, layout.code_dim)).float().to(device)
    matcher = matching.Matcher(teacher.codebook, recipe.pairs.solver)
    seen, found = [], []

    def choose(t: int, log_p: Tensor) -> Tensor:
        seen.append(log_p)
        found.append(matcher(x[:, layout.span(t)], log_p))
        return found[-1] if forced is None else forced[:, layout.span(t)]

    encode = encoder.conditioner(recipe.text, device)
    teacher.generate(encode(of_column(conditioning(recipe)(ids))), choose)
    matcher.check()
    return torch.cat(seen, dim=1), torch.cat(found, dim=1)


def _distance(found: Iterator[Drawn], exact: list[Drawn]) -> tuple[float, float]:
    """Mean total variation of p and share of other codes, in per cent."""
    variation, changed = [], []
    for (log_p, codes), (log_q, true) in zip(found, exact, strict=True):
        variation.append((log_p.exp() - log_q.exp()).abs().sum(-1).flatten() / 2)
        changed.append((codes != true).flatten().float())
    return 100 * torch.cat(variation).mean().item(), 100 * torch.cat(changed).mean().item()
