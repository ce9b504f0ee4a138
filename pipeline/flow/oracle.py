"""The slow oracle of flow.match: Dormand-Prince 5(4) in float64."""

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from pipeline.flow.matching import check
from pipeline.flow.posterior import OpenTokens, augment, prior, standardise
from pipeline.flow.solvers import combine

# Dormand and Prince's tableau; the last row is the step of order 5, its evaluation the first of the next step.
_STAGES = (
    [1 / 5],
    [3 / 40, 9 / 40],
    [44 / 45, -56 / 15, 32 / 9],
    [19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729],
    [9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656],
    [35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84],
)
_TIMES = (1 / 5, 3 / 10, 4 / 5, 8 / 9, 1, 1)
_ERROR = [71 / 57600, 0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40]


@torch.no_grad()
def exact(noise: Tensor, log_p: Tensor, codebook: Tensor) -> Tensor:
    """`match` as a slow oracle: adaptive Dormand-Prince 5(4) in float64, 100 to 200 evaluations a token.

    Arguments, result and ValueErrors of `match`; RuntimeError if a token does not come to an end.
    """
    check(noise, log_p, codebook)
    shape, noise, log_p = noise.shape[:-1], noise.reshape(-1, noise.shape[-1]), log_p.reshape(-1, len(codebook))
    used = (log_p > -math.inf).any(0).nonzero()[:, 0]  # leaving out what no token can reach changes no weight
    augmented = augment(standardise(codebook.double()[used]))
    answers = [noise.new_empty(0, dtype=torch.long)]
    for rows in torch.arange(len(noise), device=noise.device).split(512) if len(noise) else ():
        tokens = OpenTokens(log_p[rows][:, used].double(), augmented)
        _dormand_prince(tokens, noise[rows].double())
        answers.append(used[tokens.answer])
    return torch.cat(answers).view(shape)


def _dormand_prince(tokens: OpenTokens, noise: Tensor, tolerance: float = 1e-8) -> None:
    """Each token with its own steps, until its code has won for good or coinciding codes can win no more."""
    _, mean, scale = prior(tokens, 0)
    y, u, h, end, first = noise, 0 * scale, 0.01 * scale.clamp_max(1), 1e3 * scale.clamp_min(1), mean
    for _ in range(5000):
        slopes = [first]
        for stage, time in zip(_STAGES, _TIMES, strict=True):
            ahead = y + h * combine(stage, tuple(slopes))
            weights, slope = tokens.evaluate(ahead, u + time * h)
            slopes.append(slope)
        error = (h * combine(_ERROR, tuple(slopes))).square().mean(-1, keepdim=True).sqrt()
        good = error <= tolerance
        y, u, first = (torch.where(good, *pair) for pair in ((ahead, y), (u + h, u), (slope, first)))
        h = h * (0.9 * (tolerance / error.clamp_min(1e-300)) ** 0.2).clamp(0.2, 6)
        done = (good[:, 0] & (_won(tokens, weights, y, u) | (u > end)[:, 0])).nonzero()[:, 0]
        y, u, h, end, first = tokens.close(done, weights[done].argmax(-1), 0, y, u, h, end, first)
        if not len(y):
            return
    raise RuntimeError("a token is undecided after 5000 steps; look at the codebook for extreme values")


def _won(tokens: OpenTokens, weights: Tensor, y: Tensor, u: Tensor) -> Tensor:
    """Whether the best code has won for good, [n]: nearly all weight is its own, and along dy/du = that code, the
    path from here on, all others' odds together stay below 1e-6, each at its own maximum.
    """
    w, best = weights.max(-1, keepdim=True)
    code = tokens.codes.mT[best[:, 0]]  # [n, C + 1]
    origin = y - u * code[:, :-1]  # stays put from here on
    # log odds at u: log p_j - log p_best + gain u - bend u^2, highest at u = gain / (2 bend)
    zeros = torch.zeros_like(weights)
    gain = tokens.project(pad(origin, (0, 1)), zeros) - (origin * code[:, :-1]).sum(-1, keepdim=True)
    bend = tokens.project(pad(-code[:, :-1], (0, 1), value=1), code[:, -1:] + zeros)  # |c_j - c_best|^2 / 2
    peak = torch.maximum(gain / (2 * bend).clamp_min(1e-300), u)
    odds = tokens.log_p - tokens.log_p.gather(1, best) + peak * gain - peak.square() * bend
    odds = odds.scatter(1, best, -math.inf).logsumexp(-1)
    return (w[:, 0] > 1 - 1e-10) & (odds < math.log(1e-6))
