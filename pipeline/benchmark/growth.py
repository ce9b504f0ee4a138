"""How time and memory grow: with the batch, the length of a sequence, the codes, the pairs and the actors.

Each curve is measured on networks with fresh weights, small enough for any machine, and has the exponent of its best
power law beside the one that it should have.
"""

from __future__ import annotations

import resource
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from pipeline import storage
from pipeline.benchmark import scale
from pipeline.benchmark.clock import turns
from pipeline.benchmark.matching import inputs, likeliest
from pipeline.benchmark.sheet import Row, Section
from pipeline.command_line import parse
from pipeline.flow import matching
from pipeline.models import checkpoints, standin
from pipeline.models.base import Teacher
from pipeline.models.conditions import Labels
from pipeline.numerics import footprint
from pipeline.recipe import Recipe
from pipeline.report import plots

BATCHES = (8, 16, 32, 64)
SIDES = (4, 8, 16)  # of a LlamaGen grid: 16 to 256 tokens
CODES = (1024, 4096, 16384, 65536)
PAIRS = (4_000, 8_000, 16_000, 32_000)
ACTORS = (1, 2, 4)
SHARDS, ROWS, SLEEP = 9, 16, 1.0  # of each sleeping replica; rows and seconds of a shard


@dataclass(frozen=True)
class Curve:
    """y over x; ``power`` is the exponent that it should have."""

    title: str
    x: str
    y: str
    points: list[tuple[float, float]]
    power: float

    @property
    def found(self) -> float:
        """The exponent of the power law that fits best."""
        x, y = np.log(np.array(self.points)).T
        return round(float(np.polyfit(x, y, 1)[0]), 4) + 0.0  # no -0.0


def growth(recipe: Recipe, teacher: Teacher, folder: str, seconds: float) -> tuple[Section, list[Curve]]:
    """All curves as a section, and for a picture."""
    small = _small(recipe)
    curves = [
        _over_batch(teacher, seconds),
        _memory_over_batch(small),
        *_over_length(small, teacher.codebook.device, seconds),
        _over_codes(teacher.codebook.device, seconds),
        *_over_pairs(recipe, folder),
        _over_actors(recipe, folder),
    ]
    section = Section(
        "Growth",
        "The exponent is that of the power law through the points: 1 is a straight line through 0, 0 a constant. Caches"
        " and fixed costs make a curve flatter at its left end; attention over a longer sequence makes it steeper.",
    )
    for curve in curves:
        (x0, y0), (x1, y1) = curve.points[0], curve.points[-1]
        row: Row = {"what": f"{curve.title}, {curve.y}", "over": curve.x, "from": x0, "": y0, "to": x1, " ": y1}
        section.rows.append(row | {"exponent": curve.found, "straight is": curve.power})
    return section, curves


def _small(recipe: Recipe) -> Recipe:
    """The digits' LlamaGen with fresh weights, whose grid may be of any side."""
    return replace(parse(None, []), run=recipe.run, cluster=recipe.cluster)


def _over_batch(teacher: Teacher, seconds: float) -> Curve:
    """One generation of the recipe's teacher."""
    device = teacher.codebook.device
    points = []
    with torch.no_grad():
        for batch in BATCHES:  # one after the other: graphs are those of one batch, and in turns none would be replayed
            call = partial(teacher.generate, inputs(teacher, batch)[0], likeliest)
            points.append((float(batch), turns({"": call}, device, seconds)[""]))
    return Curve("the teacher", "batch", "seconds of a generation", points, 1.0)


def _memory_over_batch(recipe: Recipe) -> Curve:
    """What a generation of the small LlamaGen takes, its weights included."""
    work = _generation(checkpoints.family(recipe.teacher), recipe.teacher)
    points = [(float(b), footprint.peak(work, b) / 1e6) for b in BATCHES]
    return Curve("LlamaGen teacher", "batch", "MB of memory, traced", points, 1.0)


def _over_length(recipe: Recipe, device: torch.device, seconds: float) -> list[Curve]:
    """A generation, the student's step and the memory of both, of a small LlamaGen of each side."""
    family = checkpoints.family(recipe.teacher)
    memory, calls = [], {}
    for side in SIDES:
        settings = replace(recipe.teacher, config=recipe.teacher.config | {"side": side})
        teacher = family.Teacher(checkpoints.config(settings), settings.filter).to(device).eval()
        student = family.Student.from_teacher(teacher, 0).to(device).eval()
        condition, x = inputs(teacher, 4)
        calls[f"draw {side}"] = partial(teacher.generate, condition, likeliest)
        calls[f"jump {side}"] = partial(student.jump, x, x, 1, condition, teacher.layout.steps)
        memory.append((float(side**2), footprint.trace(_generation(family, settings)).sample / 1e6))
    with torch.no_grad():
        times = turns(calls, device, seconds)
    drawn = [(float(side**2), times[f"draw {side}"]) for side in SIDES]
    jumped = [(float(side**2), times[f"jump {side}"]) for side in SIDES]
    return [
        Curve("LlamaGen teacher", "tokens", "seconds of 4 images", drawn, 1.0),
        Curve("LlamaGen student, one step", "tokens", "seconds of 4 images", jumped, 1.0),
        Curve("LlamaGen teacher", "tokens", "MB of memory a sample, traced", memory, 1.0),
    ]


def _generation(family: object, settings: object) -> Callable[[int], None]:
    """What ``footprint.trace`` runs: AR sampling of a teacher without content."""

    def work(samples: int) -> None:
        with torch.device("meta"):
            teacher = family.Teacher(checkpoints.config(settings), settings.filter)  # type: ignore[attr-defined, arg-type]
        condition = Labels(torch.zeros(samples, dtype=torch.long))
        footprint.hollow(teacher).generate(condition, lambda t, log_p: torch.zeros(log_p.shape[:-1], dtype=torch.long))

    return work


def _over_codes(device: torch.device, seconds: float) -> Curve:
    """Flow matching of tokens over an unfiltered vocabulary."""
    generator, calls = torch.Generator().manual_seed(0), {}
    for codes in CODES:
        codebook = torch.nn.functional.normalize(torch.randn(codes, 8, generator=generator), dim=-1).to(device)
        log_p = torch.randn(256, codes, generator=generator).mul_(2).log_softmax(-1).to(device)
        x = torch.randn(256, 8, generator=generator).to(device)
        calls[str(codes)] = partial(matching.match, x, log_p, codebook)
    times = turns(calls, device, seconds)
    points = [(float(v), 1e6 * times[str(v)] / 256) for v in CODES]
    return Curve("flow matching, C 8, no filter", "codes", "microseconds a token", points, 1.0)


def _over_pairs(recipe: Recipe, folder: str) -> list[Curve]:
    """Seconds that the machinery around a teacher that costs nothing takes, from a set's first shard to its last, and
    the driver's memory.
    """
    points: list[tuple[float, float]] = []
    memory: list[tuple[float, float]] = []
    for count in (PAIRS[0], *PAIRS):  # the first time starts the process that writes
        place = storage.join(folder, f"pairs-{len(points)}")
        idle = _idle(recipe, place, 0.0)
        pairs = replace(recipe.pairs, uri=storage.join(place, "pairs"), count=count, shard_rows=500, actors=1)
        pairs = replace(pairs, noise="derived")
        times = list(scale.commit_times(replace(idle, run=place, pairs=pairs), count // 500))
        points.append((float(count - 500), times[-1] - times[0]))
        memory.append((float(count), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024))
    return [
        Curve("pairs without a teacher", "pairs", "seconds after the first shard", points[1:], 1.0),
        Curve("pairs without a teacher", "pairs", "MiB of the driver, peak", memory[1:], 0.0),
    ]


def _idle(recipe: Recipe, place: str, seconds: float) -> Recipe:
    """With a stand-in for the teacher, and next to no CPU for each, so that there is always room for who writes."""
    idle, cluster = standin.of(recipe, place, seconds), replace(recipe.cluster, cpus=0.1, gpus=0)
    train, evaluate = replace(recipe.train, precision="fp32"), replace(recipe.evaluate, precision="fp32")
    return replace(idle, cluster=cluster, train=train, evaluate=evaluate)


def _over_actors(recipe: Recipe, folder: str) -> Curve:
    """Shards a second of replicas that sleep, so that cores do not limit."""
    points = []
    for actors in ACTORS:
        place = storage.join(folder, f"actors-{actors}")
        sleepers = _idle(recipe, place, SLEEP)
        pairs = replace(recipe.pairs, uri=storage.join(place, "pairs"), actors=actors, shard_rows=ROWS, batch=ROWS)
        pairs = replace(pairs, count=actors * SHARDS * ROWS, noise="derived")
        times = list(scale.commit_times(replace(sleepers, run=place, pairs=pairs), actors * SHARDS))
        begun = len(times) // 3  # by then every process is there
        points.append((float(actors), (len(times) - begun) / (times[-1] - times[begun - 1])))
    return Curve(f"replicas that sleep {SLEEP:g} s a shard", "actors", "shards a second", points, 1.0)


def picture(curves: Sequence[Curve]) -> bytes:
    """A panel per curve, both axes logarithmic, with the straight line of the exponent that it should have."""
    columns = 4
    rows = -(-len(curves) // columns)
    figure = Figure(figsize=(3.6 * columns, 3.1 * rows), dpi=110, layout="constrained")
    panels = np.atleast_1d(figure.subplots(rows, columns)).ravel()
    for axes, curve in zip(panels, curves, strict=False):
        x, y = zip(*curve.points, strict=True)
        axes.plot(x, y, **plots.line(0), label=f"measured, exponent {curve.found:.2f}")
        ideal = [y[-1] * (value / x[-1]) ** curve.power for value in x]
        axes.plot(x, ideal, linestyle=":", color="#555555", label=f"exponent {curve.power:g}")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(x, [f"{value:,.0f}" for value in x])
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        axes.set_title(curve.title, fontsize=10)
        axes.set_xlabel(curve.x)
        axes.set_ylabel(curve.y, fontsize=9)
        axes.legend(frameon=False, fontsize=8)
        plots.plain(axes)
    for axes in panels[len(curves) :]:
        axes.set_axis_off()
    return plots.png(figure)
