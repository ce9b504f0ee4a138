"""What is measured on a device, in order of worth: the steps, their seconds, and the figures that each is to bring."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from pipeline.host.errors import Refused

Kind = Literal["tests", "benchmark", "pairs", "memory", "training"]
KINDS: tuple[Kind, ...] = get_args(Kind)
RECIPES = {"cuda": {"var-d16": 64, "llamagen-l": 256}, "cpu": {"digits-var": 4, "digits-llamagen": 4}}
"""Device -> recipe -> the large batch of its benchmark; on a CPU small recipes rehearse the steps of the large ones."""
ON_GRAPHS: tuple[Kind, ...] = ("benchmark", "pairs", "memory")  # steps that record CUDA graphs
# Seconds of a step that has all it wants, and of the least that is worth beginning. Together they are a little more
# than ten minutes, for most steps end before their time.
WANTED: dict[Kind, float] = {"tests": 130, "benchmark": 95, "pairs": 95, "memory": 40, "training": 45}
LEAST: dict[Kind, float] = {"tests": 40, "benchmark": 45, "pairs": 50, "memory": 25, "training": 25}
PATIENCE = {"cuda": 1.0, "cpu": 2.0}  # device -> of these seconds: two cores that also do other things need more
PLAIN = 4  # the batch at which the teacher stands beside a straightforward loop


@dataclass(frozen=True)
class Figure:
    """A number that a step is to bring, None until it has; ``bound``, where one is claimed, is kept from the side that
    ``at_most`` names.
    """

    key: str
    text: str
    unit: str
    bound: float | None = None
    at_most: bool = True
    value: float | None = None

    @property
    def met(self) -> bool | None:
        """Whether the number keeps its bound; None where nothing was claimed or measured."""
        if self.bound is None or self.value is None:
            return None
        return self.value <= self.bound if self.at_most else self.value >= self.bound


@dataclass(frozen=True)
class Step:
    """One step of a check, which runs in a process of its own.

    ``wanted`` and ``least`` are seconds: of a step that has all it wants, and of one that is still worth beginning.
    ``batch`` is the large one of a benchmark.
    """

    kind: Kind
    recipe: str | None
    wanted: float
    least: float
    figures: tuple[Figure, ...]
    batch: int = 1

    @property
    def name(self) -> str:
        """As ``--only`` takes it."""
        return f"{self.kind}-{self.recipe}" if self.recipe else self.kind


def steps(device: str) -> list[Step]:
    """All steps on "cuda" or on "cpu", the most worth first. Bounds are claimed of a GPU alone."""
    out = [Step("tests", None, WANTED["tests"], LEAST["tests"], TESTS)]
    for kind in ("benchmark", "pairs", "memory", "training"):
        for name, batch in RECIPES[device].items():
            if kind != "training" or "var" in name:
                out.append(Step(kind, name, WANTED[kind], LEAST[kind], _figures(kind, name, device), batch))
    return [replace(one, wanted=PATIENCE[device] * one.wanted, least=PATIENCE[device] * one.least) for one in out]


def chosen(every: Sequence[Step], only: Sequence[str]) -> list[Step]:
    """The steps of these kinds and names, all without any. Raises Refused for a name that is neither."""
    known = [*KINDS, *(step.name for step in every if step.recipe)]
    for name in only:
        if name not in known:
            raise Refused(f"--only names {name!r}; there are {', '.join(known)}.")
    return [step for step in every if not only or {step.kind, step.name} & set(only)]


def _figures(kind: Kind, name: str, device: str) -> tuple[Figure, ...]:
    """Of one recipe's step; without bounds, and without what only a GPU has, on a CPU."""
    figures = {"benchmark": BENCHMARK, "pairs": PAIRS, "memory": MEMORY, "training": TRAINING}[kind]
    if device == "cpu":
        return tuple(replace(one, bound=None) for one in figures if not one.key.startswith(GPU_ONLY))
    bounds = BOUNDS.get((name, kind), {})
    return tuple(replace(one, bound=bounds.get(one.key, one.bound)) for one in figures)


TESTS = (
    Figure("passed", "tests that passed", "tests"),
    Figure("failed", "tests that failed", "tests", bound=0),
    Figure("skipped", "tests that were skipped", "tests"),
)
BENCHMARK = (
    Figure("batch", "the large batch", "images"),
    Figure("alg1_batch_1", "Alg. 1 over plain AR sampling, time at batch 1", "ratio", bound=1.05),
    Figure("alg1_large", "Alg. 1 over plain AR sampling, time at the large batch", "ratio", bound=1.05),
    Figure("ar_ms", "teacher, AR, decoded, batch 1", "ms/image"),
    Figure("ar_rate", "teacher, AR, decoded, large batch", "images/s", at_most=False),
    Figure("fm_ms", "teacher, Alg. 1, decoded, batch 1", "ms/image"),
    Figure("fm_rate", "teacher, Alg. 1, decoded, large batch", "images/s"),
    Figure("one_step_ms", "student, one step, decoded, batch 1", "ms/image", bound=12),
    Figure("one_step_rate", "student, one step, decoded, large batch", "images/s"),
    Figure("speed_up_batch_1", "one step over AR, speed-up at batch 1", "ratio"),
    Figure("speed_up_large", "one step over AR, speed-up at the large batch", "ratio"),
    Figure("plain", f"a straightforward AR loop over ours, time at batch {PLAIN}", "ratio", bound=3, at_most=False),
    Figure("roofline", f"of ours the least that arithmetic and memory allow, batch {PLAIN}", "%"),
)
PAIRS = (
    Figure("pairs_rate", "pairs a second, noise to Parquet", "pairs/s"),
    Figure("pairs", "pairs that were counted", "pairs"),
    Figure("seconds", "seconds that were counted", "s"),
    Figure("starting", "seconds until the first shard was written, not counted", "s"),
    Figure("row_bytes", "bytes of a pair in Parquet", "bytes"),
)
MEMORY = tuple(
    figure
    for key, text in (("teacher", "pairs, a batch"), ("step", "training, a step"))
    for figure in (
        Figure(f"{key}_samples", f"{text}: samples at once", "samples"),
        Figure(f"{key}_predicted", f"{text}: predicted", "GB"),
        Figure(f"{key}_allocated", f"{text}: most that torch allocated", "GB"),
        Figure(f"{key}_reserved", f"{text}: most that torch reserved", "GB"),
        Figure(f"{key}_used", f"{text}: in use by nvidia-smi", "GB"),
        Figure(f"{key}_share", f"{text}: reserved over predicted", "ratio", bound=1),
    )
)
TRAINING = (
    Figure("steps_rate", "optimiser steps a second", "steps/s"),
    Figure("samples_rate", "samples a second", "samples/s"),
    Figure("batch", "samples of a step", "samples"),
    Figure("at_once", "samples of it in one pass", "samples"),
    Figure("steps", "steps that were counted", "steps"),
)
GPU_ONLY = tuple(f"{key}_{what}" for key in ("teacher", "step") for what in ("allocated", "reserved", "used", "share"))
BOUNDS: dict[tuple[str, str], dict[str, float]] = {("llamagen-l", "benchmark"): {"ar_rate": 230}}
"""What is claimed of one recipe beyond the bounds of all."""
