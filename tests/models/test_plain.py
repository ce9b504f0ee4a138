"""The fast ways to sample a teacher against the plain ones."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import torch
from step import stirred
from tiny import Family, tiny
from torch import Tensor

from pipeline.flow import matching
from pipeline.models import checkpoints
from pipeline.models.conditions import Captions, Condition, Labels
from pipeline.settings.teacher import Filter

CASES = [
    (family, Filter(*filter), {})
    for family, off in (("var", 0.0), ("llamagen", 1.0))
    for filter in ((off,), (2.0,), (2.0, 0.8, 9, 0.9))
]
CASES.append(("llamagen", Filter(2.0), {"guidance_interval": 3}))
CAPTIONS = {"caption_dim": 8, "caption_length": 16}
CASES += [("llamagen", Filter(*filter), CAPTIONS) for filter in ((1.0,), (2.0,), (2.0, 0.8, 9, 0.9))]
CASES.append(("llamagen", Filter(2.0), CAPTIONS | {"guidance_interval": 3}))
LENGTHS = torch.tensor([1, 7, 4, 8])


@pytest.mark.parametrize(("family", "filter", "config"), CASES)
def test_the_codes_are_those_of_plain_sampling(tmp_path: Path, family: Family, filter: Filter, config: dict) -> None:
    """By flow matching; the log-probabilities differ by rounding. Plain sampling does not trim captions."""
    teacher = checkpoints.teacher(replace(tiny(tmp_path, family, **config).teacher, filter=filter))
    stirred(teacher.network)
    layout = teacher.layout
    condition: Condition = Labels(torch.tensor([0, 2, 1, 2]))
    trimmed = condition
    if "caption_dim" in config:
        features = torch.randn(4, 16, 8, generator=torch.Generator().manual_seed(1))
        condition, trimmed = (Captions.from_encoder(features[:, :end], LENGTHS) for end in (16, 8))
    noise = torch.randn(4, layout.length, layout.code_dim, generator=torch.Generator().manual_seed(0))
    shown: list[list[Tensor]] = [[], []]

    def choose(t: int, log_p: Tensor, seen: list[Tensor]) -> Tensor:
        seen.append(log_p)
        return matching.match(noise[:, layout.span(t)], log_p, teacher.codebook)

    plain = import_module(f"pipeline.models.{family}.plain").generate
    codes = plain(teacher, condition, lambda t, log_p: choose(t, log_p, shown[0]))
    assert codes.shape == (4, layout.length)
    assert len(codes.unique()) > 5
    assert torch.equal(teacher.generate(trimmed, lambda t, log_p: choose(t, log_p, shown[1])), codes)
    for mine, other in zip(*shown, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-4, rtol=0)
