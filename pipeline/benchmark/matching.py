"""What flow matching adds to a teacher, and how often each solver errs on the codebook at hand."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import partial
from statistics import median

import numpy as np
import torch
from torch import Tensor

from pipeline import noise
from pipeline.benchmark.sheet import Claim, Row, Section
from pipeline.flow import matching, oracle
from pipeline.flow.matching import Solver
from pipeline.host.stopwatch import Stopwatch, once, warm_up
from pipeline.models import conditions
from pipeline.models.base import Teacher
from pipeline.models.conditions import Condition, Labels

SOLVERS = (
    Solver("adaptive", tolerance=1e-3),
    Solver("adaptive", tolerance=4e-4),
    Solver("fixed", evaluations=6),
    Solver("fixed", evaluations=10),
    Solver("fixed", evaluations=14),
    Solver("paper", evaluations=10),
)
USUAL = 16  # positions of a caption: those of LAION-COCO have 12 to 20 tokens
TOKENS = 2_000  # per codebook; one wrong code is 0.05 %
BOUND = {"cpu": 1.03, "cuda": 1.05}  # of the time of Alg. 1 over that of plain sampling


def inputs(teacher: Teacher, batch: int) -> tuple[Condition, Tensor]:
    """Labels, or captions of the usual length, and noise [B, n, C] of the first samples, on the teacher's device."""
    ids, layout, device = np.arange(batch), teacher.layout, teacher.codebook.device
    x = torch.from_numpy(noise.gaussian(0, ids, layout.length, layout.code_dim)).float().to(device)
    return usual_condition(teacher.caption, batch, layout.classes).to(device), x


def usual_condition(caption: tuple[int, int] | None, batch: int, classes: int) -> Condition:
    """Labels in turn; blank captions of the usual length where the longest ones have the shape ``caption``."""
    if caption:
        return conditions.blank(batch, (min(USUAL, caption[0]), caption[1]))
    return Labels(torch.from_numpy(noise.labels(np.arange(batch), classes)))


def likeliest(step: int, log_p: Tensor) -> Tensor:
    """Choose the code of the highest probability: next to nothing beside the network."""
    return log_p.argmax(-1)


def multinomial(log_p: Tensor) -> Tensor:
    """Plain AR sampling, as the official codes draw: log p [B, g, V] -> codes [B, g]."""
    return torch.multinomial(log_p.exp().flatten(0, 1), 1).view(log_p.shape[:-1])


@torch.no_grad()
def overhead(teacher: Teacher, solver: Solver, batches: tuple[int, ...], seconds: float) -> Section:
    """Time of Alg. 1 over that of plain AR sampling, at each batch."""
    bound, device = BOUND[teacher.codebook.device.type], teacher.codebook.device
    section = Section(
        "Flow matching beside plain sampling",
        "Every generation draws each code twice from the same p, by flow matching and by `torch.multinomial`, in turns"
        " which of them comes first; the rest of its time is the network with guidance and filter. So the ratio"
        " (network + flow matching) / (network + multinomial) does not depend on what else the machine does.",
    )
    for batch in batches:
        condition, x = inputs(teacher, batch)
        warm_up(partial(_drawn_twice, teacher, solver, condition, x, 0))
        found: list[tuple[float, float, float]] = []
        deadline = time.monotonic() + seconds
        while not found or (time.monotonic() < deadline and len(found) < 20):
            found.append(_drawn_twice(teacher, solver, condition, x, len(found) % 2))
        network, matched, drawn = (1000 * median(part) / batch for part in zip(*found, strict=True))
        ratio = median((n + m) / (n + d) for n, m, d in found)
        section.rows.append(
            {"batch": batch, "network, ms / image": network, "flow matching": matched, "multinomial": drawn}
            | {"Alg. 1 / AR": ratio, "generations": len(found)}
        )
        section.claims.append(Claim(f"Time of Alg. 1 over plain AR, batch {batch}, {device.type}", ratio, bound, True))
    return section


def _drawn_twice(
    teacher: Teacher, solver: Solver, condition: Condition, x: Tensor, first: int
) -> tuple[float, float, float]:
    """Seconds of the network, of flow matching (its preparation included) and of multinomial sampling."""
    device, layout = teacher.codebook.device, teacher.layout
    watches, matchers = (Stopwatch(device), Stopwatch(device)), list[matching.Matcher]()

    def choose(t: int, log_p: Tensor) -> Tensor:
        """Both ways' codes, one after the other; flow matching's are drawn."""
        ways: list[Callable[[], Tensor]] = [
            lambda: matchers[0](x[:, layout.span(t)], log_p),
            lambda: multinomial(log_p),
        ]
        drawn = {}
        for way in (0, 1) if (t + first) % 2 else (1, 0):
            with watches[way]:
                drawn[way] = ways[way]()
        return drawn[0]

    def generation() -> None:
        """Alg. 1 with the other way beside it."""
        with watches[0]:
            matchers.append(matching.Matcher(teacher.codebook, solver))
        teacher.generate(condition, choose)
        teacher.check()
        matchers[0].check()

    whole = once(generation, device)
    matched, multi = (watch.seconds for watch in watches)
    return whole - matched - multi, matched, multi


# ---- the solvers


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
    """noise [N, C], log p [N, V] and codebook as the teacher meets them in Alg. 1, in all its AR steps."""
    layout, kept = teacher.layout, []
    condition, x = inputs(teacher, math.ceil(TOKENS / layout.length))

    def choose(t: int, log_p: Tensor) -> Tensor:
        part = x[:, layout.span(t)]
        kept.append((part.flatten(0, 1), log_p.flatten(0, 1)))
        return matching.match(part, log_p, teacher.codebook)

    teacher.generate(condition, choose)
    teacher.check()
    points, log_p = torch.cat([a for a, _ in kept]), torch.cat([b for _, b in kept])
    some = torch.linspace(0, len(points) - 1, TOKENS, device=points.device).long()
    return points[some], log_p[some], teacher.codebook


def solvers(teacher: Teacher) -> Section:
    """Wrong codes against the float64 oracle, mean evaluations and milliseconds per 1,000 tokens."""
    cases = {
        "this teacher": lambda: taught(teacher),
        "VAR-like, V 4096, C 32, top 900": lambda: synthetic(4096, 32, 900, unit_norm=False),
        "LlamaGen-like, V 16384, C 8, top 2000": lambda: synthetic(16384, 8, 2000, unit_norm=True),
    }
    section = Section("Flow-matching solvers", f"{TOKENS:,} tokens a codebook, wrong where the float64 oracle differs.")
    device = teacher.codebook.device
    for name, make in cases.items():
        points, log_p, codebook = (tensor.to(device) for tensor in make())
        truth = oracle.exact(points, log_p, codebook)
        for solver in SOLVERS:
            warm_up(partial(matching.match_counted, points, log_p, codebook, solver))
            watch = Stopwatch(device)
            with watch:
                codes, evaluations = matching.match_counted(points, log_p, codebook, solver)
            setting = f"tolerance {solver.tolerance:g}" if solver.name == "adaptive" else f"{solver.evaluations}"
            row: Row = {"codebook": name, "solver": f"{solver.name}, {setting}"}
            row["wrong codes, %"] = 100 * (codes != truth).float().mean().item()
            row["evaluations"] = evaluations.float().mean().item()
            row["ms / 1000 tokens"] = 1e6 * watch.seconds / len(points)
            section.rows.append(row)
    return section
