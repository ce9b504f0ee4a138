"""What the solvers cost and how often they err on the codebook at hand, and what caching and distilling save.

Everything is measured in one run on one machine and printed as ratios beside the raw times: absolute times do not carry
over to another machine.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor

from pipeline import flow, flow_oracle, noise
from pipeline.flow import Solver
from pipeline.models import checkpoints
from pipeline.models.base import Condition, Student, Teacher
from pipeline.precision import set_products
from pipeline.recipe import Recipe
from pipeline.speed import device_name

SOLVERS = (
    Solver("adaptive", tolerance=1e-3),
    Solver("adaptive", tolerance=4e-4),
    Solver("fixed", evaluations=6),
    Solver("fixed", evaluations=10),
    Solver("fixed", evaluations=14),
    Solver("paper", evaluations=10),
)
TOKENS = 2_000  # per codebook; one wrong code is 0.05 %


def benchmark(recipe: Recipe) -> str:
    """Markdown: solver errors and costs, then generation and distillation speed, for the recipe's teacher."""
    gpu = recipe.cluster.runs_on == "cuda"
    if gpu and not torch.cuda.is_available():
        raise ValueError("cluster.gpus is above 0 but this machine has no CUDA device; set it to 0 to measure the CPU.")
    device = torch.device("cuda" if gpu else "cpu")
    if not gpu:
        torch.set_num_threads(max(1, math.ceil(recipe.cluster.cpus)))
    set_products(recipe.teacher.precision)
    teacher = checkpoints.teacher(recipe.teacher).to(device)
    student_of: type[Student] = checkpoints.family(recipe.teacher).Student
    where = f"{device_name(device)}, {torch.get_num_threads()} torch thread(s), torch {torch.__version__}"
    return "\n".join(
        [f"# Benchmark of {recipe.name}", "", where, "", *solvers(teacher, device), "", *speed(teacher, student_of)]
    )


def synthetic(vocabulary: int, dim: int, survivors: int, unit_norm: bool) -> tuple[Tensor, Tensor, Tensor]:
    """noise [N, C], log p [N, V] over ``survivors`` codes each (from peaked to flat) and a Gaussian codebook [V, C]."""
    generator = torch.Generator().manual_seed(vocabulary)
    codebook = torch.randn(vocabulary, dim, generator=generator)
    if unit_norm:
        codebook = torch.nn.functional.normalize(codebook, dim=-1)
    sharpness = torch.tensor([3.0, 2.0, 1.2, 0.2]).repeat_interleave(TOKENS // 4)[:, None]
    logits = sharpness * torch.randn(TOKENS, vocabulary, generator=generator)
    least = logits.topk(survivors).values[:, -1:]
    log_p = logits.masked_fill(logits < least, -torch.inf).log_softmax(-1)
    return torch.randn(TOKENS, dim, generator=generator), log_p, codebook


@torch.no_grad()
def taught(teacher: Teacher) -> tuple[Tensor, Tensor, Tensor]:
    """noise [N, C], log p [N, V] and codebook as the teacher meets them in Alg. 1: evenly spread over the AR steps."""
    layout, kept = teacher.layout, []
    ids = np.arange(max(10, math.ceil(4 * TOKENS / layout.length)))
    device = teacher.codebook.device
    x = torch.from_numpy(noise.gaussian(0, ids, layout.length, layout.code_dim)).float().to(device)
    matcher = flow.Matcher(teacher.codebook)

    def choose(t: int, log_p: Tensor) -> Tensor:
        part = x[:, layout.span(t)]
        kept.append((part.flatten(0, 1), log_p.flatten(0, 1)))
        return matcher(part, log_p)

    teacher.generate(Condition(torch.from_numpy(noise.labels(ids, layout.classes)).to(device)), choose)
    matcher.check()
    points, log_p = torch.cat([a for a, _ in kept]), torch.cat([b for _, b in kept])
    some = torch.linspace(0, len(points) - 1, TOKENS, device=device).long()
    return points[some], log_p[some], teacher.codebook


def solvers(teacher: Teacher, device: torch.device) -> list[str]:
    """Wrong codes against the float64 oracle, mean evaluations and milliseconds per 1,000 tokens."""
    cases = {
        "this teacher": lambda: taught(teacher),
        "VAR-like, V 4096, C 32, top 900": lambda: synthetic(4096, 32, 900, unit_norm=False),
        "LlamaGen-like, V 16384, C 8, top 2000": lambda: synthetic(16384, 8, 2000, unit_norm=True),
    }
    lines = [
        f"## Flow-matching solvers, {TOKENS} tokens a codebook",
        "",
        "| codebook | solver | wrong codes | evaluations | ms / 1000 tokens |",
        "|---|---|---:|---:|---:|",
    ]
    for name, make in cases.items():
        points, log_p, codebook = (tensor.to(device) for tensor in make())
        truth = flow_oracle.exact(points, log_p, codebook)
        for solver in SOLVERS:
            flow.match(points[:50], log_p[:50], codebook, solver)
            start = time.perf_counter()
            codes, evaluations = flow.match_counted(points, log_p, codebook, solver)
            wrong = (codes != truth).float().mean().item()
            cost = 1e6 * (time.perf_counter() - start) / len(points)
            setting = f"tolerance {solver.tolerance:g}" if solver.name == "adaptive" else f"{solver.evaluations}"
            mean = evaluations.float().mean().item()
            lines.append(f"| {name} | {solver.name}, {setting} | {wrong:.2%} | {mean:.1f} | {cost:.0f} |")
    return lines


@torch.no_grad()
def speed(teacher: Teacher, student_of: type[Student]) -> list[str]:
    """Cached against uncached generation, the share of flow matching, one student step against the teacher."""
    student = student_of.from_teacher(teacher, "released", 0).eval().to(teacher.codebook.device)
    layout, device = teacher.layout, teacher.codebook.device
    lines = [
        "## Speed, without decoding",
        "",
        "| batch | teacher, ms / image | without its cache | with flow matching | one student step | speed-up |",
        "|---:|---:|---:|---:|---:|---:|",
    ]
    for batch in (1, 16, 64):
        ids = np.arange(batch)
        condition = Condition(torch.from_numpy(noise.labels(ids, layout.classes)).to(device))
        x = torch.from_numpy(noise.gaussian(0, ids, layout.length, layout.code_dim)).float().to(device)

        def best(t: int, log_p: Tensor) -> Tensor:
            return log_p.argmax(-1)

        def matched(condition: Condition = condition, x: Tensor = x) -> Tensor:
            matcher = flow.Matcher(teacher.codebook)
            codes = teacher.generate(condition, lambda t, log_p: matcher(x[:, layout.span(t)], log_p))
            matcher.check()
            return codes

        def uncached(condition: Condition = condition) -> Tensor:
            codes = None
            for t in range(1, layout.steps + 1):
                codes = teacher.generate(condition, best, codes, t + 1)
            assert codes is not None
            return codes

        cached = _median(partial(teacher.generate, condition, best), device)
        slow = _median(uncached, device)
        flowing = _median(matched, device)
        step = _median(partial(student.jump, x, x, 1, condition, layout.steps), device)
        lines.append(
            f"| {batch} | {1000 * cached / batch:.2f} | {slow / cached:.1f}x | {flowing / cached:.2f}x |"
            f" {1000 * step / batch:.2f} | {cached / step:.1f}x |"
        )
    return lines


def _median(call: Callable[[], Tensor], device: torch.device, repeats: int = 5) -> float:
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return sorted(seconds[1:])[repeats // 2]  # the first is the warm-up
