"""The samplers that a recipe lists, from its YAML: {name: FewStep, steps: [1, 6]} -> FewStep(steps=(1, 6))."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, fields
from typing import Any, get_origin, get_type_hints

from pipeline.models.base import Layout
from pipeline.samplers import SAMPLERS, Sampler


def build(settings: list[dict[str, Any]], layout: Layout, split: int) -> list[Sampler]:
    """The samplers that a recipe lists as {name: FewStep, steps: [1, 6]}; ``split`` is for those that name
    none.

    Raises ValueError, one sentence, for an unknown name, an unknown, missing or ill-typed field, a value
    outside the layout, and a sampler listed twice.
    """
    if not settings:
        raise ValueError("evaluate.samplers is empty; list at least one, e.g. {name: FewStep, steps: [1]}.")
    out: list[Sampler] = []
    for entry in settings:
        sampler = _construct(entry, split)
        sampler.check(layout)
        if sampler in out:
            raise ValueError(f"evaluate.samplers lists {entry} twice; remove one.")
        out.append(sampler)
    return out


def names(samplers: Sequence[Sampler]) -> list[str]:
    """One distinct name each: two that differ in the split alone carry it."""
    plain = [sampler.name for sampler in samplers]
    return [
        f"{name}, split {getattr(sampler, 'split', 0)}" if plain.count(name) > 1 else name
        for sampler, name in zip(samplers, plain, strict=True)
    ]


def _construct(entry: dict[str, Any], split: int) -> Sampler:
    kinds = {kind.__name__: kind for kind in SAMPLERS}
    if not isinstance(entry, dict) or entry.get("name") not in kinds:
        raise ValueError(f"evaluate.samplers holds {entry!r}; an entry needs a name out of {', '.join(kinds)}.")
    kind, hints = kinds[entry["name"]], get_type_hints(kinds[entry["name"]])
    own = {f.name: f for f in fields(kind)}
    values = {key: value for key, value in entry.items() if key != "name"}
    if "split" in own and values.get("split") is None:
        values["split"] = split
    for key, value in values.items():
        if key not in own:
            raise ValueError(
                f"sampler {kind.__name__} has no field {key!r}; it knows {', '.join(own) or 'none besides its name'}."
            )
        values[key] = _typed(kind, key, value, hints[key])
    missing = [key for key, f in own.items() if key not in values and f.default is MISSING]
    if missing:
        raise ValueError(f"sampler {kind.__name__} needs {missing[0]}; add it to its entry in evaluate.samplers.")
    return kind(**values)


def _typed(kind: type[Sampler], key: str, value: Any, hint: Any) -> Any:
    """A YAML value as the field's type (bool, int or tuple of int)."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    if (hint is bool and isinstance(value, bool)) or (hint is int and whole):
        return value
    numbers = isinstance(value, list | tuple) and all(isinstance(v, int) and not isinstance(v, bool) for v in value)
    if get_origin(hint) is tuple and numbers:
        return tuple(value)
    wanted = {bool: "true or false", int: "a whole number"}.get(hint, "a list of whole numbers")
    raise ValueError(f"sampler {kind.__name__} has {key} {value!r}; it must be {wanted}.")
