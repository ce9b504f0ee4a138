"""The three integrators behind matching.match: ``adaptive``, ``fixed`` and ``paper``; ODE and symbols are matching's.

Each takes open tokens and their noise [n, C] and closes every one of them.

The step of ``adaptive``, for one token. D has been evaluated at the nodes u_0 (the last), u_-1 and u_-2; the step goes
from u_0 to u_1 = u_0 + h. In Newton's form, with divided differences D[...], the parabola through the three is

    P(u) = D[0] + D[0, -1] (u - u_0) + D[0, -1, -2] (u - u_0) (u - u_-1).

Its terms at u_1 are what a ``Stride`` holds: value = D[0], line = h D[0, -1], bend = h (u_1 - u_-1) D[0, -1, -2], so
that P(u_1) = value + line + bend. With a = h / (u_1 - u_-1), the mean of (u - u_0) (u - u_-1) over the step is
h (h / 3 + (u_0 - u_-1) / 2) = h (u_1 - u_-1) (3 - a) / 6, which gives the predictor (Adams-Bashforth, order 3)

    y_1 = y_0 + h (value + line / 2 + (3 - a) bend / 6).

There D is evaluated. defect = D[1] - P(u_1) is h (u_1 - u_-1) (u_1 - u_-2) D[1, 0, -1, -2], what P lacks at u_1 of the
cubic through all four nodes. With c = h / (u_1 - u_-2), the mean over the step of the product of the three distances
behind it, (u - u_0) (u - u_-1) (u - u_-2), is its value at u_1 times

    a c / 4 + (a (1 - c) + c (1 - a)) / 3 + (1 - a) (1 - c) / 2 = ((2 - a) (2 - c) + 2) / 12,

which gives the corrector (Adams-Moulton, order 4; D is not evaluated again)

    y_1 <- y_1 + h ((2 - a) (2 - c) + 2) defect / 12.

That move is the error of the predictor, of order h^4, so the next step is h' = g h with the factor of growth
g = 0.9 (tolerance / move)^(1/4), move being the root mean square over the C dimensions, g kept in [1/4, 5/2] and
h' at most MAX_STEP. The terms over it follow from those over the last one. With change = D[1] - D[0] = h D[1, 0] and
turn = change - line = h (u_1 - u_-1) D[1, 0, -1],

    value' = D[1],   line' = h' D[1, 0] = g change,   bend' = h' (h' + h) D[1, 0, -1] = g a (g + 1) turn,
    a' = h' / (h' + h) = g / (g + 1),   c' = h' / (h' + u_1 - u_-1) = g a / (g a + 1).

At u = 0 nothing lies behind, but the slope is known: dD/du = sum_j w_j' c_j with w_j' = p_j <noise, c_j - mean>, which
is Cov_p(c) noise. Two nodes coincide there, D[0, -1] being the slope: line = h slope and a = 1. The third is at
minus infinity: bend = 0 and c = 0, and the corrector's weight is h / 3, as Hermite's interpolation has it.
"""

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from pipeline.flow.posterior import OpenTokens, prior


class Grid(NamedTuple):
    """n nodes u_i = S reach (i / (n - 1))^power, the second times `first`; S is the token's own, see `prior`."""

    margin: float
    reach: float
    power: float
    first: float
    end: float  # the answer is the best weight at u = S reach end
    predictor: int  # evaluations behind the step to the next node
    corrector: int  # evaluations behind its repetition, beside the one at its end


# Evaluations per token -> grid, tuned on synthetic codebooks like VAR's and LlamaGen's.
GRIDS = {
    5: Grid(2.34, 0.63, 1.308, 0.80, 1.213, 4, 2),
    6: Grid(1.80, 0.68, 1.255, 0.88, 1.540, 2, 1),
    8: Grid(2.40, 0.69, 1.234, 1.03, 1.350, 4, 3),
    10: Grid(2.75, 0.69, 1.330, 1.10, 1.360, 4, 3),
    14: Grid(3.00, 0.84, 1.345, 1.15, 1.500, 4, 3),
    20: Grid(1.93, 1.04, 1.320, 0.90, 1.420, 3, 2),
}
MAX_STEPS = 64  # adaptive: a token open after these (its best codes coincide) is read off where it stands
MAX_STEP = 100.0  # in u, for a standardised codebook: keeps the logits of such a token finite


class Stride(NamedTuple):
    """Where the open tokens of ``adaptive`` stand and the step ahead of each, in letters of the module's docstring."""

    y: Tensor  # [n, C]: x_t / (1 - t), at u_0
    u: Tensor  # [n, 1]: t / (1 - t), the node u_0
    h: Tensor  # [n, 1]: length of the step ahead
    value: Tensor  # [n, C]: D at u_0, the constant term of P over the step
    line: Tensor  # [n, C]: the linear term of P at the step's end
    bend: Tensor  # [n, C]: the quadratic term of P at the step's end
    a: Tensor  # [n, 1]: the step over the distance from the last node but one to its end
    c: Tensor  # [n, 1]: the step over the distance from the last node but two to its end


def adaptive(tokens: OpenTokens, noise: Tensor, tolerance: float) -> None:
    """Third-order Adams predictor, fourth-order corrector, one evaluation a step, each token at its own pace.

    The module's docstring derives the step. No step is repeated. The start counts as 1.5 evaluations.
    """
    state, root = _start(tokens, noise, tolerance), math.sqrt(noise.shape[1])
    # Python numbers would be converted in every operation. ``aim`` is for 12 times the move, as its norm.
    one, two, most, aim = map(torch.tensor, (1.0, 2.0, MAX_STEP, 0.9 * (12 * root * tolerance) ** 0.25))
    for step in range(MAX_STEPS):
        y, u, h, value, line, bend, a, c = state
        # Predict, evaluate, correct.
        mean = torch.addcmul(torch.add(value, line, alpha=1 / 2), two - a + one, bend, value=1 / 6)
        y, u = torch.addcmul(y, h, mean), u + h
        weights, latest = tokens.evaluate(y, u)
        change = latest - value
        turn = change - line
        defect, weight = turn - bend, h * ((two - a) * (two - c) + two)
        y = torch.addcmul(y, weight, defect, value=1 / 12)
        # The step after it.
        move = weight * (defect * defect).sum(-1, keepdim=True).sqrt()  # norm() takes longer for one token
        growth = torch.minimum((move.pow(-1 / 4) * aim).clamp(0.25, 2.5), most / h)
        ga, after = growth * a, growth + one
        state = Stride(
            y=y,
            u=u,
            h=growth * h,
            value=latest,
            line=growth * change,
            bend=ga * after * turn,
            a=growth / after,
            c=ga / (ga + one),
        )
        if step % 2 == 0:  # of few tokens, to look who is decided costs as much as a step
            state = Stride(*tokens.close_decided(weights, step + 2.5, *state))
            if not len(state.y):
                return
    tokens.close_all(tokens.logits(state.y, state.u), MAX_STEPS + 1.5)


def _start(tokens: OpenTokens, noise: Tensor, tolerance: float) -> Stride:
    """At u = 0. The first step, at most S / 2, is as long as the slope and the tolerance let it be."""
    p, value, scale = prior(tokens, 2.75)
    inner = tokens.project(pad(noise, (0, 1)), torch.zeros_like(p))
    slope = tokens.moments(p * inner)[:, :-1] - value * (value * noise).sum(-1, keepdim=True)  # Cov_p(c) noise
    root = math.sqrt(noise.shape[1])
    first = 0.12 * (tolerance / 1e-3) ** 0.25 * (slope.norm(dim=-1, keepdim=True) / root).clamp_min(1e-12).rsqrt()
    h = torch.minimum(first, scale / 2)
    return Stride(noise, 0 * h, h, value, h * slope, 0 * slope, torch.ones_like(h), 0 * h)


def fixed(tokens: OpenTokens, noise: Tensor, evaluations: int) -> None:
    """Adams predictor-corrector on the token's grid, one evaluation a node; the answer lies a step further on."""
    nodes, predictor, corrector = adams(evaluations)
    _, value, scale = prior(tokens, GRIDS[evaluations].margin)
    history: tuple[Tensor, ...] = (value,)  # D at the nodes so far, newest first
    y = noise
    ahead = y + scale * combine(predictor[0], history)
    for i in range(1, evaluations):
        weights, value = tokens.evaluate(ahead, scale * nodes[i])
        history = (value, *history[:3])
        y = y + scale * combine(corrector[i - 1], history)
        ahead = y + scale * combine(predictor[i], history)
        y, ahead, scale, *kept = tokens.close_decided(weights, i + 1, y, ahead, scale, *history)
        history = tuple(kept)
        if not len(y):
            return
    tokens.close_all(tokens.logits(ahead, scale * nodes[-1]), evaluations)


@lru_cache
def adams(evaluations: int) -> tuple[list[float], list[list[float]], list[list[float]]]:
    """With S = 1: the nodes and the read-out; weights of the predictor steps from each, of the corrector steps.

    Weights belong to the evaluations newest first and are exact for polynomials in u; a corrector step ends at its
    newest. The last predictor step goes to the read-out along a straight line.
    """
    grid, last = GRIDS[evaluations], evaluations - 1
    nodes = [grid.reach * (i / last) ** grid.power for i in range(evaluations)] + [grid.reach * grid.end]
    nodes[1] *= grid.first
    orders = [grid.predictor] * last + [2]
    predictor = [_quadrature(nodes[i::-1][: orders[i]], *nodes[i : i + 2]) for i in range(evaluations)]
    corrector = [_quadrature(nodes[i + 1 :: -1][: grid.corrector + 1], *nodes[i : i + 2]) for i in range(last)]
    return nodes, predictor, corrector


def _quadrature(nodes: list[float], start: float, end: float) -> list[float]:
    """w with int_start^end f = sum_i w_i f(nodes_i) for polynomials f of a degree below the number of nodes."""
    length, powers = end - start, np.arange(len(nodes))
    relative = (np.array(nodes) - start) / length
    return (length * np.linalg.solve(relative ** powers[:, None], 1 / (powers + 1))).tolist()


def combine(weights: list[float], values: tuple[Tensor, ...]) -> Tensor:
    """sum_i weights_i values_i; values beyond the last weight do not count."""
    total = weights[0] * values[0]
    for weight, value in zip(weights[1:], values[1:], strict=False):
        total = torch.add(total, value, alpha=weight)
    return total


def paper(tokens: OpenTokens, noise: Tensor, evaluations: int) -> None:
    """The paper's solver, then the nearest code with p > 0 (Eq. 4).

    Snapped to the whole codebook, 2 % of the tokens of a LlamaGen-like one land on codes of probability 0: 7.9 %
    wrong instead of 6.8 %. VAR-like ones have 3.5 % either way.
    """
    x = dpm_solver(tokens, noise, evaluations)
    support = tokens.log_p.masked_fill(tokens.log_p > -math.inf, 0)
    tokens.close_all(tokens.project(pad(x, (0, 1), value=-1), support), evaluations)  # <x, c> - |c|^2 / 2


def dpm_solver(tokens: OpenTokens, noise: Tensor, evaluations: int) -> Tensor:
    """DPM-Solver++ (arXiv 2211.01095), multistep, order 3, uniform in t: x at t = 0.999, [n, C].

    In (y, u) its data prediction is Adams-Bashforth with D fitted in log u. As in the public code the noise stands
    for x at t = 0.001 and the curve has half its Taylor weight. Not as in the public code, which from 10 steps on
    keeps order 3 to the end (94 % wrong for LlamaGen-like codes), the last two steps are of order 2 and 1.
    """
    s = np.linspace(0.999, 0.001, evaluations + 1)  # 1 - t
    u, log_u = (1 - s) / s, np.log((1 - s) / s)
    history: tuple[Tensor, ...] = ()
    y = noise / s[0]
    for i in range(evaluations):
        _, value = tokens.evaluate(y, y.new_full((len(y), 1), u[i]))
        history = (value, *history[:2])
        order = min(3, i + 1, evaluations - i)
        y = y + combine(_dpm_weights(log_u[i + 1 - order : i + 2], u[i + 1]), history)
    return y * s[-1]


def _dpm_weights(log_u: np.ndarray, end: float) -> list[float]:
    """Weights of the evaluations, newest first, in the step from log_u[-2] to log_u[-1], where u is `end`."""
    now, before, oldest = np.eye(3)  # the step is linear in them
    h, *spans = np.diff(log_u)[::-1]
    phi1 = -math.expm1(-h)
    step = phi1 * now
    if spans:
        slope = (now - before) * h / spans[0]
        step = phi1 * (now + slope / 2)
    if len(spans) == 2:
        phi2 = 1 - phi1 / h
        curve = (slope - (before - oldest) * h / spans[1]) * h / sum(spans)
        step = phi1 * now + phi2 * (slope + spans[0] / h * curve) - (phi2 / h - 1 / 2) * curve
    return (end * step).tolist()
