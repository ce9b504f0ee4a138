"""A recipe's selection of samplers, from its YAML: {name: FewStep, steps: [1, 6]} -> FewStep(steps=(1, 6)).

An entry may hold the figures that the paper prints for it, ``paper: {fid: 7.82, speedup: 3.7}``. They stand beside
ours in the report and are no part of the sampler.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import MISSING, fields
from typing import Any

from pipeline.configuration.fields import check_value, kinds
from pipeline.host.errors import Refused
from pipeline.models.base import Layout
from pipeline.sampling.samplers import SAMPLERS, Sampler

PAPER = ("fid", "is", "precision", "recall", "parameters", "seconds", "speedup")  # seconds are per image


def build(settings: list[dict[str, Any]], layout: Layout, split: int) -> list[Sampler]:
    """The samplers that a recipe lists as {name: FewStep, steps: [1, 6]}; ``split`` is for those that name
    none.

    Raises ValueError, one sentence, for an unknown name, an unknown, missing or ill-typed field, a value
    outside the layout, a sampler listed twice, and figures of the paper that are none.
    """
    if not settings:
        raise Refused("evaluate.samplers is empty; list at least one, e.g. {name: FewStep, steps: [1]}.")
    out: list[Sampler] = []
    for entry in settings:
        sampler = _construct(entry, split)
        sampler.check(layout)
        if sampler in out:
            raise Refused(f"evaluate.samplers lists {entry} twice; remove one.")
        out.append(sampler)
    published(settings)
    return out


def published(settings: list[dict[str, Any]]) -> list[dict[str, float]]:
    """The paper's figures of each sampler, those of PAPER that its tables have; {} where they have none.

    Raises ValueError, one sentence, for an unknown figure and for one that is no number above 0.
    """
    return [_figures(entry["name"], entry.get("paper", {})) for entry in settings]


def _figures(name: str, figures: Any) -> dict[str, float]:
    if not isinstance(figures, dict):
        raise Refused(f"sampler {name} has paper {figures!r}; it must hold named figures, e.g. {{fid: 9.94}}.")
    for key, value in figures.items():
        if key not in PAPER:
            raise Refused(f"sampler {name} has no figure {key!r} of the paper; it knows {', '.join(PAPER)}.")
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise Refused(f"sampler {name} has the paper's {key} {value!r}; it must be a number above 0.")
    return dict(figures)


def names(samplers: Sequence[Sampler]) -> list[str]:
    """One distinct name each: two that differ in the split alone carry it."""
    plain = [sampler.name for sampler in samplers]
    return [
        f"{name}, split {getattr(sampler, 'split', 0)}" if plain.count(name) > 1 else name
        for sampler, name in zip(samplers, plain, strict=True)
    ]


def _construct(entry: dict[str, Any], split: int) -> Sampler:
    classes = {kind.__name__: kind for kind in SAMPLERS}
    if not isinstance(entry, dict) or entry.get("name") not in list(classes):
        raise Refused(f"evaluate.samplers holds {entry!r}; an entry needs a name out of {', '.join(classes)}.")
    kind = classes[entry["name"]]
    own, wanted = {f.name: f for f in fields(kind)}, kinds(kind)
    values = {key: value for key, value in entry.items() if key not in ("name", "paper")}
    if "split" in own:
        values.setdefault("split", split)
    for key, value in values.items():
        if key not in own:
            raise Refused(
                f"sampler {kind.__name__} has no field {key!r}; it knows {', '.join(own) or 'none besides its name'}."
            )
        values[key] = tuple(value) if isinstance(value, list) else value
        check_value(values[key], wanted[key], f"evaluate.samplers: {kind.__name__}.{key}")
    missing = [key for key, f in own.items() if key not in values and f.default is MISSING]
    if missing:
        raise Refused(f"sampler {kind.__name__} needs {missing[0]}; add it to its entry in evaluate.samplers.")
    return kind(**values)
