"""The networks: a teacher beside the machine's limits and beside plain code, a student beside its teacher."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from pipeline.benchmark.clock import Peaks, turns
from pipeline.benchmark.matching import inputs, likeliest, usual_condition
from pipeline.benchmark.sheet import Claim, Row, Section
from pipeline.models import checkpoints
from pipeline.models.base import Teacher
from pipeline.models.graphs import Replays
from pipeline.numerics import footprint
from pipeline.pairs.facts import conditioning
from pipeline.recipe import Recipe
from pipeline.sampling import selection, speed
from pipeline.sampling.samplers import Autoregressive, FewStep, FlowMatched, Models, Sampler
from pipeline.sampling.speed import Speed
from pipeline.settings.teacher import TeacherSettings
from pipeline.text import encoder

BEAT = {"cpu": 1.3, "cuda": 3.0}  # times as fast as plain code, at batch BEATEN_AT
BEATEN_AT = 4
TRACED = 6  # AR steps of a raster sequence
PROFILED = 32  # AR steps
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::_scaled_dot_product")


@torch.no_grad()
def teachers(
    teacher: Teacher, settings: TeacherSettings, batches: tuple[int, ...], seconds: float, peaks: Peaks
) -> Section:
    """AR sampling without flow matching: ours beside a straightforward loop, and both beside the machine."""
    device = teacher.codebook.device
    plain = importlib.import_module(f"{settings.family}.plain").generate
    section = Section(
        "The teacher",
        "AR sampling with guidance and filter, the likeliest code taken, in turns with a straightforward loop over the"
        " same weights: two passes for guidance, keys and values appended, LlamaGen's attention over the whole padded"
        f" sequence. This machine multiplies matrices at {peaks.flops / 1e9:,.0f} GFLOP/s and reads memory at"
        f" {peaks.bytes / 1e9:,.1f} GB/s, both measured; *roofline* is the time that the arithmetic or the reading of"
        " weights and cache takes at least, whichever is more in each AR step, over the time taken; *in products* is"
        " the share of matrix products and attention, which both loops have to compute, in a profile of ours"
        f" ({min(PROFILED, teacher.layout.steps)} AR steps), without CUDA graphs, whose replay names no operator.",
    )
    profiled = min(PROFILED, teacher.layout.steps) + 1
    for batch in batches:
        condition, _ = inputs(teacher, batch)
        calls = {
            "ours": partial(teacher.generate, condition, likeliest),
            "plain": partial(plain, teacher, condition, likeliest),
        }
        times = turns(calls, device, seconds)
        teacher.check()
        work = LeastWork.of(settings, batch)
        row: Row = {"batch": batch, "ms / image": 1000 * times["ours"] / batch}
        row |= {"plain, ms / image": 1000 * times["plain"] / batch, "plain / ours": times["plain"] / times["ours"]}
        row["GFLOP / image"] = sum(work.flops) / 1e9 / batch
        row["FLOP utilisation, %"] = 100 * sum(work.flops) / times["ours"] / peaks.flops
        row["roofline, %"] = 100 * work.least(peaks) / times["ours"]
        with eager(teacher):
            looked_at = partial(teacher.generate, condition, likeliest, stop=profiled)
            row["in products, %"] = 100 * in_products(looked_at, device)
        section.rows.append(row)
        if batch == BEATEN_AT:
            text = f"Plain AR loop over ours, batch {batch}, {device.type}"
            section.claims.append(Claim(text, times["plain"] / times["ours"], BEAT[device.type]))
    return section


@contextmanager
def eager(teacher: Teacher) -> Iterator[None]:
    """The teacher without its graphs: a profile sees operators, and a replay has none."""
    graphs, teacher.graphs = teacher.graphs, None
    try:
        yield
    finally:
        teacher.graphs = graphs


def in_products(call: Callable[[], object], device: torch.device) -> float:
    """Share of a call's time on the device that goes into matrix products and attention, by torch's profiler."""
    cuda = device.type == "cuda"
    kinds = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * cuda
    with torch.profiler.profile(activities=kinds) as profile:
        call()
    times = {e.key: e.self_device_time_total if cuda else e.self_cpu_time_total for e in profile.key_averages()}
    # A GPU's kernels have rows of their own beside their operators', which count them already.
    own = {name: time for name, time in times.items() if name.startswith("aten::")}
    return sum(time for name, time in own.items() if name.startswith(PRODUCTS)) / sum(own.values())


class LeastWork:
    """What each AR step of a generation must do at least: operations, and bytes read of weights and cache."""

    def __init__(self, flops: list[float], read: list[float]) -> None:
        self.flops, self.read = flops, read

    @classmethod
    def of(cls, settings: TeacherSettings, batch: int) -> LeastWork:
        """Counted in a generation on tensors without content, so at any size; of a raster sequence in its first steps,
        since each later one adds the same.
        """
        family, config = checkpoints.family(settings), checkpoints.config(settings)
        with torch.device("meta"):
            teacher = checkpoints.cast(family.Teacher(config, settings.filter), settings)
        counted = [(0.0, 0.0)]
        condition = usual_condition(teacher.caption, batch, teacher.layout.classes)
        with FakeTensorMode(allow_non_fake_inputs=True), Counter() as counter:

            def choose(step: int, log_p: Tensor) -> Tensor:
                counted.append((float(counter.get_total_flops()), float(counter.bytes)))
                return torch.zeros(log_p.shape[:-1], dtype=torch.long)

            raster = set(teacher.layout.groups) == {1} and teacher.layout.steps > TRACED
            stop = TRACED + 1 if raster else None
            footprint.hollow(teacher).generate(condition, choose, stop=stop)
        steps = [(b[0] - a[0], b[1] - a[1]) for a, b in itertools.pairwise(counted)]
        while len(steps) < teacher.layout.steps:
            steps.append((2 * steps[-1][0] - steps[-2][0], 2 * steps[-1][1] - steps[-2][1]))
        return cls([flops for flops, _ in steps], [read for _, read in steps])

    def least(self, peaks: Peaks) -> float:
        """Seconds: in each step the arithmetic or the reading, whichever takes longer."""
        return sum(max(f / peaks.flops, r / peaks.bytes) for f, r in zip(self.flops, self.read, strict=True))


class Counter(FlopCounterMode):
    """Operations of products, convolutions and attention; ``bytes`` are those of weights, keys and values read."""

    def __init__(self) -> None:
        self.bytes = 0

        def product(a: Tensor, b: Tensor, *args: Any, **kwargs: Any) -> int:
            self.bytes += b.nbytes
            return 2 * a.numel() * b.shape[-1]

        def added(bias: Tensor, a: Tensor, b: Tensor, *args: Any, **kwargs: Any) -> int:
            return product(a, b)

        def attention(q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> int:
            self.bytes += k.nbytes + v.nbytes
            return sdpa_flop_count(q.shape, k.shape, v.shape)

        aten = torch.ops.aten
        mapping = {aten.mm: product, aten.addmm: added, aten._scaled_dot_product_flash_attention_for_cpu: attention}
        for count in mapping.values():
            count._get_raw = True  # type: ignore[attr-defined]  # torch else hands over shapes, and not what is a number
        super().__init__(display=False, custom_mapping=mapping)


# ---- samplers


def sampling(recipe: Recipe, teacher: Teacher, batches: tuple[int, ...], seconds: float) -> Section:
    """The student's one and two steps beside the teacher, with and without decoding, and the paper's speed-ups."""
    device = teacher.codebook.device
    asked, seed = recipe.train.student_options, recipe.train.seed
    student = checkpoints.new_student(recipe.teacher, teacher, asked, seed).eval().to(device)
    if recipe.records("evaluate"):
        student.jumps, teacher.decodes = Replays(), Replays()
    precisions = recipe.teacher.precision, recipe.evaluate.precision
    models = Models(teacher, student, recipe.pairs.solver, recipe.evaluate.seed, None, device, *precisions)
    encode = encoder.conditioner(recipe.text, device)
    models = replace(models, conditioning=conditioning(recipe), encode=encode)
    several, paper = listed(recipe)
    section = Section(
        "Sampling",
        "A student as it starts from its teacher (its weights do not matter here) in turns with the teacher; *network*"
        " ends at the embeddings, the rest is decoding. Every sampler runs at every batch, and a speed-up is over the"
        f" teacher at the same one, ± its standard error (bootstrap over {speed.CALLS}). The paper's are those"
        " of its tables, on an A100, at a batch that it does not say.",
    )
    found = speed.measure(models, several, batches, seconds)
    base = {s.batch: s for s in found[Autoregressive()]}
    for sampler in several:
        for one in found[sampler]:
            row: Row = {"sampler": sampler.name, "batch": one.batch, "network, ms / image": one.network_ms}
            row |= {"ms / image": one.ms, "images / s": 1000 / one.ms}
            there = base.get(one.batch)
            row["speed-up of the network"] = there.network_ms / one.network_ms if there else None
            row["speed-up"], row["±"] = speed.speed_up(one, there) if there else (None, None)
            row["paper"] = paper.get(sampler) if one.batch == 1 else None
            section.rows.append(row)
    section.claims = _speed_ups(found, device.type)
    return section


def _speed_ups(found: dict[Sampler, list[Speed]], device: str) -> list[Claim]:
    """Of the few-step samplers, over the AR teacher at the same batch: at batch 1 and at the largest of all."""
    claims = []
    for batch in (1, speed.throughput_batch(found.values())):
        at = {sampler: one for sampler, speeds in found.items() for one in speeds if one.batch == batch}
        for sampler, one in at.items():
            if isinstance(sampler, FewStep) and Autoregressive() in at:
                ratio, _ = speed.speed_up(one, at[Autoregressive()])
                claims.append(Claim(f"Speed-up of {sampler.name}, batch {batch}, {device}", ratio))
    return claims


def listed(recipe: Recipe) -> tuple[list[Sampler], dict[Sampler, float]]:
    """The teacher with and without flow matching and the recipe's few-step samplers; the paper's speed-ups."""
    layout = checkpoints.config(recipe.teacher).layout
    entries = recipe.evaluate.samplers
    built = selection.build(entries, layout, recipe.train.split)
    printed = selection.published(entries)
    few = [s for s in built if isinstance(s, FewStep)] or [FewStep(recipe.train.split)]
    figures = {s: p["speedup"] for s, p in zip(built, printed, strict=True) if "speedup" in p}
    return [Autoregressive(), FlowMatched(), *few], figures
