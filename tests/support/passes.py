"""How many serial passes flow/kernel.py needs for a token: a model in torch, and probabilities to ask it about.

Run ``python tests/support/passes.py [tokens]`` for the table of docs/speed.md. ``tests/support/interpreted.py``
compares the model with what the kernel itself counts.

The shipped teachers have 64 codes. ``like`` makes p of full size from theirs: each code's probability is spread over
V / 64 codes in the shape of a log-normal, whose width sets the perplexity, and then filtered as the recipes of full
size do. The codebook is Gaussian for VAR and of unit norm for LlamaGen, as the tokenizers' are.
"""

from __future__ import annotations

import math
import sys
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.command_line import parse
from pipeline.flow import matching, posterior, solvers
from pipeline.models import checkpoints
from pipeline.models.conditions import Labels

RECIPES = Path(__file__).parents[2] / "jobs" / "recipes"
LOST, TILE, LIST = 2e-7, 16384, 4096  # of the kernel, whose tile has PARTS times PART numbers
BEFORE = 2048, 1024, 25.0  # of the kernel before: numbers of a tile, of a list, and CUT


class Like(NamedTuple):
    """Which shipped teacher p comes from, the size of the codebook, the width of the spread and the filter."""

    family: str
    codes: int
    dimension: int
    width: float
    top_k: int


LIKE = {
    "LlamaGen-like, top-k 8000": Like("llamagen", 16384, 8, 1.5, 8000),
    "LlamaGen-like, no filter": Like("llamagen", 16384, 8, 1.5, 16384),
    "VAR-like, top-k 900": Like("var", 4096, 32, 1.0, 900),
}


@torch.no_grad()
def taught(family: str, tokens: int) -> Tensor:
    """log p [tokens, 64] after guidance and temperature of a shipped teacher, from all AR steps of plain sampling."""
    teacher = checkpoints.teacher(parse(None, ["--config", str(RECIPES / f"digits-{family}.yaml")]).teacher).eval()
    layout, kept = teacher.layout, list[Tensor]()
    labels = torch.arange(math.ceil(tokens / layout.length)) % layout.classes
    random = torch.Generator().manual_seed(0)

    def choose(t: int, log_p: Tensor) -> Tensor:
        kept.append(log_p.flatten(0, 1))
        return torch.multinomial(kept[-1].exp(), 1, generator=random).view(log_p.shape[:-1])

    teacher.generate(Labels(labels), choose)
    found = torch.cat(kept)
    return found[torch.linspace(0, len(found) - 1, tokens).long()]


def like(recipe: Like, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """noise [tokens, C], log p [tokens, V] and codebook [V, C] of full size, see the module's docstring."""
    random = torch.Generator().manual_seed(recipe.codes)
    codebook = torch.randn(recipe.codes, recipe.dimension, generator=random)
    if recipe.family == "llamagen":
        codebook = torch.nn.functional.normalize(codebook, dim=-1)
    logits = taught(recipe.family, tokens).repeat_interleave(recipe.codes // 64, 1)
    logits = logits + recipe.width * torch.randn(logits.shape, generator=random)
    logits = logits.masked_fill(logits < logits.topk(recipe.top_k).values[:, -1:], -math.inf)
    return torch.randn(tokens, recipe.dimension, generator=random), logits.log_softmax(-1), codebook


class Watched(posterior.OpenTokens):
    """One token of ``solvers.adaptive``, and what the kernel sees at each of its evaluations."""

    def __init__(self, log_p: Tensor, codes: posterior.Codes) -> None:
        super().__init__(log_p, codes)
        p = self.log_p.exp()
        # The exponents but for log p, as (u y, -u^2 / 2 |c|^2), logits, and the moments, first those of the prior.
        self.seen = [(torch.zeros(self.codes.shape[0]), self.log_p[0], self.moments(p)[0])]

    def evaluate(self, y: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        weights, mean = super().evaluate(y, u)
        self.seen.append((torch.cat([u * y, -u * u], -1)[0], self.logits(y, u)[0], self.moments(weights)[0]))
        return weights, mean


def watch(noise: Tensor, log_p: Tensor, codebook: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    """What is seen of one token, noise [C], log p [V], up to the evaluation that decides it."""
    token = Watched(log_p[None], posterior.augment(posterior.standardise(codebook)))
    prior = token.log_p[0].exp()
    solvers.adaptive(token, noise[None], matching.ADAPTIVE.tolerance)
    for number, (_, logits, _) in enumerate(token.seen[1:], 1):
        w, best = logits.softmax(-1).max(-1)
        gain = posterior.EXIT_GAIN
        if w > posterior.EXIT_WEIGHT and w + (gain - 1) * w * prior[best] >= gain * prior[best]:
            return token.seen[: number + 1]
    return token.seen


def passes(seen: list[tuple[Tensor, Tensor, Tensor]], width: int) -> tuple[int, int]:
    """The kernel's passes for a token, and how many codes they read; width is that of a code."""
    vocabulary, tile = len(seen[0][1]), TILE // width
    rows = (seen[0][1] > -math.inf).nonzero()[:, 0]
    whole = len(rows) > vocabulary // 2
    rows = torch.arange(vocabulary) if whole else rows
    count, read, log_z = -(-vocabulary // LIST) - (-len(rows) // tile), len(rows), 0.0
    for number, ((query, _, moments), (ahead, logits, _)) in enumerate(pairwise(seen), 2):
        kept = len(rows)
        count, read = count - (-kept // tile), read + kept
        bound = log_z + float((ahead - query) @ moments)
        alive = logits[rows] > bound + math.log(LOST / kept)
        left = int(alive.sum())
        fewer = 4 * left <= 3 * kept and -(-left // tile) < -(-kept // tile)
        shorter = 4 * left <= kept and kept > tile // 8
        if number < len(seen) and (fewer or shorter) and (not whole or left <= vocabulary // 2):
            count, rows, whole = count - (-kept // LIST), rows[alive], False
        log_z = float(logits.logsumexp(-1))
    return count, read


def passes_before(seen: list[tuple[Tensor, Tensor, Tensor]], width: int) -> int:
    """Passes of the kernel that had a running maximum of a tile and shortened its list in every one."""
    numbers, listed, cut = BEFORE
    count, rows = 0, torch.arange(len(seen[0][1]))
    for number, (_, logits, _) in enumerate(seen):
        for tile in (listed, numbers // width) if number == 0 else (numbers // width,):
            peak, left = torch.tensor(-math.inf), []
            for part in rows.split(tile):
                peak = torch.maximum(peak, logits[part].max())
                left.append(part[logits[part] > peak - cut])
                count += 1
            rows = torch.cat(left)
    return count


def main(tokens: int) -> None:
    """The table: means over tokens, and the most of any token."""
    print("| p | perplexity | evaluations | passes before | now | at most | codes read now |")
    print("|:--|--:|--:|--:|--:|--:|--:|")
    for name, recipe in LIKE.items():
        points, log_p, codebook = like(recipe, tokens)
        seen = [watch(x, p, codebook) for x, p in zip(points, log_p, strict=True)]
        counts = torch.tensor([passes(token, recipe.dimension) for token in seen]).double()
        before = torch.tensor([passes_before(token, recipe.dimension) for token in seen]).double()
        entropy = -(log_p.exp() * log_p.clamp_min(-1e4)).sum(-1)
        evaluations = sum(map(len, seen)) / tokens + 0.5  # the start counts as 1.5, and is seen once
        print(
            f"| {name} | {entropy.exp().median():.0f} | {evaluations:.1f} | {before.mean():.0f} |"
            f" {counts[:, 0].mean():.1f} | {counts[:, 0].max():.0f} | {counts[:, 1].mean():,.0f} |"
        )


if __name__ == "__main__":
    torch.manual_seed(0)
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 32)
