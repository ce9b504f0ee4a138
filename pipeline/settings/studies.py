"""What is studied around a recipe: an ablation and a benchmark."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, get_args

from pipeline.configuration import fields
from pipeline.configuration.fields import Range, Seed, Size, Uri


@dataclass(frozen=True)
class AblationSettings:
    """What ``jobs/ablate.py`` varies, one thing at a time around the rest of the recipe.

    Attributes:
        uri: folder of the table and of all that only the ablation needs; default <run>/ablation.
        seeds: every variant is trained once with each of them as ``train.seed``. Pairs and evaluation keep their own
            seeds: all students are compared on the same noise, and the spread is that of training.
        axes: {name: values}. The name is that of a field (train.lpips), or of a section (train, pairs.solver), whose
            values are then mappings that lie over it, e.g. {split: 32, lpips: 1.0}; evaluate.samplers.split is the
            split of all few-step samplers, which needs no training. Any other name is a title, and its values are
            mappings of fields, for what only makes sense together: {pairs.count: 1000, train.epochs: 8}. Another
            train.start_steps takes the few-step samplers that stood at the base's start steps with it.
    """

    uri: Uri | None = None
    seeds: tuple[Seed, ...] = (3, 13)
    axes: dict[str, list[Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        fields.check(self, "ablate")
        seeds = list(self.seeds)
        fields.require(
            bool(seeds) and len(set(seeds)) == len(seeds), f"ablate.seeds is {seeds}; list one seed or more, each once."
        )
        for name, values in self.axes.items():
            fields.require(
                bool(values), f"ablate.axes lists no values of {name}; list one or more, or leave the axis out."
            )


Measured = Literal[
    "solvers",
    "precision",
    "matching",
    "teacher",
    "sampling",
    "training",
    "generation",
    "evaluation",
    "images",
    "growth",
    "serving",
]


@dataclass(frozen=True)
class BenchmarkSettings:
    """What ``jobs/benchmark.py`` measures.

    Attributes:
        uri: folder of its table; default <run>/benchmark.
        sections: what is measured, in this order.
        batches: batch sizes of teacher and samplers.
        seconds: of measuring for each thing that takes its turn; more scatter less.
        serving_seconds: of requests to a server, of each load; at the 99th percentile a hundredth of them count.
    """

    uri: Uri | None = None
    sections: tuple[Measured, ...] = get_args(Measured)
    batches: tuple[Size, ...] = (1, 4, 64)
    seconds: Annotated[float, Range(math.nextafter(0, 1), 86_400, "above 0, and at most 86,400")] = 10.0
    serving_seconds: Annotated[float, Range(math.nextafter(0, 1), 86_400, "above 0, and at most 86,400")] = 60.0

    def __post_init__(self) -> None:
        fields.check(self, "benchmark")
        fields.require(bool(self.sections), "benchmark.sections is empty; name what is to be measured.")
        fields.require(bool(self.batches), "benchmark.batches is empty; list batch sizes of 1 or more.")
