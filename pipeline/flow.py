"""AR flow matching's map q = FM(noise, p): the code that a token's noise flows to (paper Eq. 2-4, Alg. 1).

The source is N(0, I), the target sum_j p_j delta(c_j) over the codebook, the path x_t = (1 - t) noise + t code.
In u = t / (1 - t) and y = x_t / (1 - t) the flow-matching ODE dx/dt = V(x, t) becomes

    dy/du = D(y, u) = sum_j w_j c_j,   w = softmax_j(log p_j + u <y, c_j> - u^2 |c_j|^2 / 2),   y(0) = noise.

Nothing is singular at t = 0, nothing is divided by 1 - t, and as u grows one weight wins: its code is the answer,
so a code with p_j = 0 never is. The map ignores the codebook's position and scale (a scale a is u -> a u).

Knows no teacher, file or random generator: tensors in, tensors out, on the device they are on.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

SOLVERS = ("adaptive", "fixed", "paper")


class Grid(NamedTuple):
    """n nodes u_i = S reach (i / (n - 1))^power, the second times `first`; S is the token's own, see `_prior`."""

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
EXIT_WEIGHT, EXIT_GAIN = 0.9, 20.0  # a token is decided when its best weight and the growth of its odds exceed these
GATHER_BELOW = 3  # each token's K survivors are gathered if K (C + 4) is below this times V
BLOCK_BYTES = {"cpu": 8 << 20, "cuda": 1 << 30}  # working set of the tokens solved together: stays in the cache


@dataclass(frozen=True)
class Solver:
    """How the ODE is integrated; in brackets the wrong codes in per cent for codebooks like VAR's / LlamaGen's.

    adaptive: each token chooses its steps by `tolerance`, safe for any codebook (1e-3: 0.07 / 0.05).
    fixed: `evaluations` nodes on a tuned grid, less exact where codes nearly coincide (10: 0.12 / 0.43).
    paper: DPM-Solver++ with `evaluations` steps, as the paper sets it (10: 3.5 / 6.8).
    """

    name: Literal["adaptive", "fixed", "paper"] = "adaptive"
    evaluations: int = 10
    tolerance: float = 1e-3

    def __post_init__(self) -> None:
        if self.name not in SOLVERS:
            raise ValueError(f"solver name is {self.name!r}; choose one of {', '.join(SOLVERS)}")
        if self.name == "fixed" and self.evaluations not in GRIDS:
            choices = ", ".join(map(str, GRIDS))
            raise ValueError(f"solver evaluations is {self.evaluations}; for the fixed solver choose one of {choices}")
        if self.name == "paper" and self.evaluations < 1:
            raise ValueError(f"solver evaluations is {self.evaluations}; give the paper's solver 1 or more")
        if self.name == "adaptive" and not 1e-6 <= self.tolerance <= 0.1:
            raise ValueError(f"solver tolerance is {self.tolerance}; choose one between 1e-6 and 0.1 (float32)")


ADAPTIVE = Solver()


def posterior_mean(log_p: Tensor, x: Tensor, t: float, codebook: Tensor) -> Tensor:
    """E[c | x_t = x] under Eq. 3's weights, w_j ~ p_j exp(-|x - t c_j|^2 / (2 (1 - t)^2)): [..., C].

    The printed equation lacks the exponent's minus sign and its half. log_p [..., V], x [..., C], codebook [V, C];
    float64 if x is, otherwise float32. Raises ValueError unless 0 <= t < 1 and the tensors are as `match` wants.
    """
    if not 0 <= t < 1:
        raise ValueError(f"t is {t}; the posterior exists for 0 <= t < 1")
    _check(x, log_p, codebook)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    with _full_precision(x.device):
        block = _Block(log_p.reshape(-1, len(codebook)).to(dtype), _augment(codebook.to(dtype)))
        y = x.reshape(-1, x.shape[-1]).to(dtype) / (1 - t)
        return block.evaluate(y, y.new_full((len(y), 1), t / (1 - t)))[1].reshape(x.shape)


def velocity(log_p: Tensor, x: Tensor, t: float, codebook: Tensor) -> Tensor:
    """V(x, t) = (E[c | x_t = x] - x) / (1 - t), Eq. 3; arguments and errors as for `posterior_mean`."""
    return (posterior_mean(log_p, x, t, codebook) - x) / (1 - t)


def match(noise: Tensor, log_p: Tensor, codebook: Tensor, solver: Solver = ADAPTIVE) -> Tensor:
    """The code that each token's noise flows to (Eq. 4): noise [..., C], log_p [..., V], codebook [V, C] -> [...].

    log_p are log-probabilities after guidance, temperature and filter: -inf where p is 0, normalised or not. Solved
    in full float32 whatever the types and global settings; which tokens share a call makes no difference. Returns
    int64; raises ValueError for other shapes or types, NaN, and a token without any p > 0.
    """
    return match_counted(noise, log_p, codebook, solver)[0]


@torch.no_grad()
def match_counted(noise: Tensor, log_p: Tensor, codebook: Tensor, solver: Solver = ADAPTIVE) -> tuple[Tensor, Tensor]:
    """`match`, and how many evaluations of D each token took: int64 [...], float32 [...]."""
    _check(noise, log_p, codebook)
    shape, noise, log_p = noise.shape[:-1], noise.reshape(-1, noise.shape[-1]), log_p.reshape(-1, len(codebook))
    codes, counts = noise.new_empty(len(noise), dtype=torch.long), noise.new_empty(len(noise), dtype=torch.float32)
    with _full_precision(noise.device):
        # The paper's grid in t is not free of scale and position, so it gets the codebook as it is.
        codebook = codebook.float() if solver.name == "paper" else _standardise(codebook.float())
        augmented = _augment(codebook)
        for rows, width in _blocks(log_p, codebook.shape[1]):
            block = _Block(log_p.index_select(0, rows).float(), augmented, width)
            start = noise.index_select(0, rows).float()
            if solver.name == "adaptive":
                _adaptive(block, start, solver.tolerance)
            elif solver.name == "fixed":
                _fixed(block, start, solver.evaluations)
            else:
                _paper(block, start, solver.evaluations)
            codes[rows], counts[rows] = block.answer, block.count
    return codes.view(shape), counts.view(shape)


@torch.no_grad()
def exact(noise: Tensor, log_p: Tensor, codebook: Tensor) -> Tensor:
    """`match` as a slow oracle: adaptive Dormand-Prince 5(4) in float64, 100 to 200 evaluations a token.

    Arguments, result and ValueErrors of `match`; RuntimeError if a token does not come to an end.
    """
    _check(noise, log_p, codebook)
    shape, noise, log_p = noise.shape[:-1], noise.reshape(-1, noise.shape[-1]), log_p.reshape(-1, len(codebook))
    used = (log_p > -math.inf).any(0).nonzero()[:, 0]  # leaving out what no token can reach changes no weight
    augmented = _augment(_standardise(codebook.double()[used]))
    answers = [noise.new_empty(0, dtype=torch.long)]
    for rows in torch.arange(len(noise), device=noise.device).split(512) if len(noise) else ():
        block = _Block(log_p[rows][:, used].double(), augmented)
        _dormand_prince(block, noise[rows].double())
        answers.append(used[block.answer])
    return torch.cat(answers).view(shape)


def _check(noise: Tensor, log_p: Tensor, codebook: Tensor) -> None:
    """ValueError, one sentence, unless shapes and types fit, numbers are finite and every token has a code."""
    if codebook.dim() != 2 or 0 in codebook.shape:
        raise ValueError(f"codebook has shape {tuple(codebook.shape)}; pass V codes of C dimensions as [V, C]")
    (codes, dimension), leading = codebook.shape, noise.shape[:-1]
    if noise.shape != (*leading, dimension) or log_p.shape != (*leading, codes):
        raise ValueError(
            f"noise has shape {tuple(noise.shape)} and log_p {tuple(log_p.shape)}; with a codebook "
            f"{[codes, dimension]} pass [..., {dimension}] and [..., {codes}] with equal leading dimensions"
        )
    tensors = {"noise": noise, "log_p": log_p, "codebook": codebook}
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{name} is {tensor.dtype}; pass floating-point numbers")
    best = log_p.amax(-1)  # NaN where a row holds one, -inf where it holds nothing else
    if bool(best.isfinite().all() & noise.isfinite().all() & codebook.isfinite().all()):
        return  # one answer from the device; the questions below are for the message
    for name in ("noise", "codebook"):
        if not tensors[name].isfinite().all():
            raise ValueError(f"{name} holds NaN or infinity; pass finite numbers")
    if (best == -math.inf).any():
        raise ValueError("log_p is -inf for all codes of a token; the filter must leave at least one")
    raise ValueError("log_p holds NaN or +inf; pass log-probabilities, -inf where p is 0")


@contextmanager
def _full_precision(device: torch.device) -> Iterator[None]:
    """Matrix products in full float32: TF32 would change 0.07 to 0.35 % of the codes, bfloat16 up to 1.9 %."""
    products = [torch.backends.cuda.matmul, torch.backends.mkldnn.matmul]  # type: ignore[attr-defined]
    before = [(product, product.fp32_precision) for product in products]
    lowered = [(product, setting) for product, setting in before if setting not in ("none", "ieee")]
    try:
        for product, _ in lowered:
            product.fp32_precision = "ieee"
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for product, setting in lowered:
            product.fp32_precision = setting


def _standardise(codebook: Tensor) -> Tensor:
    """Mean 0, variance 1: the same map, with the digits of float32 spent on the differences between codes."""
    centred = codebook - codebook.mean(0)
    return centred / centred.square().mean().sqrt().clamp_min(torch.finfo(centred.dtype).tiny)


def _augment(codebook: Tensor) -> Tensor:
    """[V, C + 1]: |c|^2 / 2 as one more column makes the logits a single matrix product."""
    return torch.cat([codebook, codebook.square().sum(-1, keepdim=True) / 2], -1)


def _blocks(log_p: Tensor, dimension: int) -> Iterator[tuple[Tensor, int | None]]:
    """Rows to solve together, and the width that holds the survivors (p > 0) of each; None: use the codebook.

    The width is the token's own affair (its count, up to a power of two), so its neighbours cannot change its way.
    Measured on a CPU, an evaluation costs about 9 V over the codebook and (C + 4) K over K gathered codes, and
    gathering as much as a few evaluations.
    """
    tokens, vocabulary = log_p.shape
    floats = BLOCK_BYTES.get(log_p.device.type, BLOCK_BYTES["cuda"]) // 4
    step = max(1, floats // (3 * vocabulary))
    if vocabulary < 1024 or not tokens:  # not worth counting
        yield from ((rows, None) for rows in torch.arange(tokens, device=log_p.device).split(step) if tokens)
        return
    counts = torch.cat([(rows > -math.inf).sum(-1) for rows in log_p.split(step)])
    widths = 2 ** counts.clamp_min(16).double().log2().ceil().long()
    widths[widths * (dimension + 4) >= GATHER_BELOW * vocabulary] = 0
    for width in widths.unique().tolist():
        step = max(1, floats // ((dimension + 4) * width or 3 * vocabulary))
        yield from ((rows, width or None) for rows in (widths == width).nonzero()[:, 0].split(step))


class _Block:
    """n tokens solved together: their weights over K codes, and the answers of those that are decided.

    log_p [n, K] and codes (a code and |c|^2 / 2 per column, [C + 1, K] or gathered [n, C + 1, K]) are of the `open`
    tokens only; answer and count are of all.
    """

    def __init__(self, log_p: Tensor, augmented: Tensor, width: int | None = None) -> None:
        self.open = torch.arange(len(log_p), device=log_p.device)
        self.answer = torch.zeros_like(self.open)
        self.count = torch.zeros_like(self.open, dtype=torch.float32)
        self.places: Tensor | None = None  # [n, K] in the codebook, if gathered
        if width is None:
            self.codes = augmented.mT.contiguous()
        else:  # survivors in the codebook's order, then codes of probability 0
            alive = log_p > -math.inf
            filled = torch.arange(width, device=log_p.device) < alive.sum(-1, keepdim=True)
            self.places = filled.long().masked_scatter_(filled, alive.nonzero()[:, 1])
            log_p = log_p.gather(1, self.places).masked_fill(~filled, -math.inf)
            codes = augmented.index_select(0, self.places.flatten()).view(*self.places.shape, -1)
            self.codes = codes.mT.contiguous()
        self.log_p = log_p.log_softmax(-1)

    def project(self, query: Tensor, onto: Tensor) -> Tensor:
        """onto_j + <query, (c_j, |c_j|^2 / 2)>: query [n, C + 1], onto [n, K] -> [n, K]."""
        if self.places is None:
            return torch.addmm(onto, query, self.codes)
        return torch.baddbmm(onto[:, None], query[:, None], self.codes)[:, 0]

    def logits(self, y: Tensor, u: Tensor) -> Tensor:
        """log w_j but for a constant: y [n, C], u [n, 1] -> [n, K]."""
        return self.project(torch.cat([u * y, -u * u], -1), self.log_p)

    def moments(self, weights: Tensor) -> Tensor:
        """sum_j w_j (c_j, |c_j|^2 / 2): weights [n, K] -> [n, C + 1]."""
        return weights @ self.codes.mT if self.places is None else (weights[:, None] @ self.codes.mT)[:, 0]

    def evaluate(self, y: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """The weights [n, K] and D [n, C] at y [n, C], u [n, 1]."""
        weights = self.logits(y, u).softmax(-1)
        return weights, self.moments(weights)[:, :-1]

    def settle(self, weights: Tensor, count: float, *state: Tensor) -> tuple[Tensor, ...]:
        """Close the tokens that no later evaluation can change; returns `state` without their rows.

        Those are the tokens whose best weight exceeds EXIT_WEIGHT with EXIT_GAIN times its prior odds (under a
        peaked p a weight starts high): in the study that changed none of 36,864 codes on any grid.
        """
        rows = (weights.amax(-1) > EXIT_WEIGHT).nonzero()[:, 0]
        if not len(rows):
            return state
        w, best = weights.index_select(0, rows).max(-1, keepdim=True)
        p = self.log_p.index_select(0, rows).gather(1, best).exp()
        grown = torch.addcmul(w, w, p, value=EXIT_GAIN - 1) >= EXIT_GAIN * p  # w / (1 - w) >= gain p / (1 - p)
        sure = grown.nonzero()[:, 0]
        return self.close(rows.index_select(0, sure), best[:, 0].index_select(0, sure), count, *state)

    def close(self, rows: Tensor, best: Tensor, count: float, *state: Tensor) -> tuple[Tensor, ...]:
        """Record the codes at `best` (of K) as the answers of `rows`; returns `state` without these rows."""
        if self.places is not None:
            best = self.places.index_select(0, rows).gather(1, best[:, None])[:, 0]
        tokens = self.open.index_select(0, rows)
        self.answer.index_copy_(0, tokens, best)
        self.count.index_fill_(0, tokens, count)
        stay = torch.ones_like(self.open).index_fill_(0, rows, 0).nonzero()[:, 0]
        if self.places is not None:
            self.places, self.codes = self.places.index_select(0, stay), self.codes.index_select(0, stay)
        self.open, self.log_p = self.open.index_select(0, stay), self.log_p.index_select(0, stay)
        return tuple(tensor.index_select(0, stay) for tensor in state)

    def finish(self, scores: Tensor, count: float) -> None:
        """Close all that are open with their best scores [n, K]."""
        self.close(torch.arange(len(scores), device=scores.device), scores.argmax(-1), count)


def _prior(block: _Block, margin: float) -> tuple[Tensor, Tensor, Tensor]:
    """p [n, K], the mean code [n, C] and S [n, 1], the u about which a token is decided.

    S = sqrt(exp((2 H + margin sqrt(2 C)) / C) - 1) / s with H the entropy of p in nats and s^2 = tr Cov_p(c) / C:
    the signal-to-noise ratio at which a Gaussian channel of C dimensions carries H nats, and some more.
    """
    p = block.log_p.softmax(-1)  # the exponential, several times faster
    moments = block.moments(p)
    mean, dimension = moments[:, :-1], moments.shape[1] - 1
    variance = (2 * moments[:, -1:] - mean.square().sum(-1, keepdim=True)) / dimension
    entropy = -(p * block.log_p.clamp_min(-1e4)).sum(-1, keepdim=True)  # 0 log 0 = 0
    ratio = torch.expm1((2 * entropy + margin * math.sqrt(2 * dimension)) / dimension)
    return p, mean, (ratio / variance.clamp_min(1e-12)).sqrt()


def _adaptive(block: _Block, noise: Tensor, tolerance: float) -> None:
    """Third-order Adams predictor, fourth-order corrector, one evaluation a step, each token at its own pace.

    The last three evaluations are held as the terms of Newton's interpolation over the step ahead, value + line +
    bend; a and c are that step over its distances from the last node but one and but two. At u = 0 the slope is
    known, Cov_p(c) noise: two nodes coincide there (a = 1) and the third is far (c = 0). The corrector's move sets
    the next step, h <- h clip(0.9 (tolerance / move)^(1/4), 1/4, 5/2); no step is repeated. The start counts 1.5.
    """
    p, value, scale = _prior(block, 2.75)
    inner = block.project(pad(noise, (0, 1)), torch.zeros_like(p))
    slope = block.moments(p * inner)[:, :-1] - value * (value * noise).sum(-1, keepdim=True)
    root = math.sqrt(noise.shape[1])
    first = 0.12 * (tolerance / 1e-3) ** 0.25 * (slope.norm(dim=-1, keepdim=True) / root).clamp_min(1e-12).rsqrt()
    h = torch.minimum(first, scale / 2)
    y, u, line, bend, a, c = noise, 0 * h, h * slope, 0 * slope, torch.ones_like(h), 0 * h
    one, two = torch.tensor(1.0), torch.tensor(2.0)  # Python numbers would be converted in every operation
    for step in range(MAX_STEPS):
        mean = torch.addcmul(torch.add(value, line, alpha=1 / 2), two - a + one, bend, value=1 / 6)
        y, u = torch.addcmul(y, h, mean), u + h
        weights, latest = block.evaluate(y, u)
        change = latest - value
        turn = change - line
        defect, weight = turn - bend, h * ((two - a) * (two - c) + two)
        y = torch.addcmul(y, weight, defect, value=1 / 12)
        move = weight * defect.norm(dim=-1, keepdim=True)
        growth = (move.pow(-1 / 4) * (0.9 * (12 * root * tolerance) ** 0.25)).clamp(0.25, 2.5)
        growth = torch.minimum(growth, MAX_STEP / h)
        ga, after = growth * a, growth + one
        value, line, bend = latest, growth * change, ga * after * turn
        h, a, c = growth * h, growth / after, ga / (ga + one)
        if step % 2 == 0:  # in a small block, to look who is decided costs as much as a step
            y, u, h, value, line, bend, a, c = block.settle(weights, step + 2.5, y, u, h, value, line, bend, a, c)
            if not len(y):
                return
    block.finish(block.logits(y, u), MAX_STEPS + 1.5)


def _fixed(block: _Block, noise: Tensor, evaluations: int) -> None:
    """Adams predictor-corrector on the token's grid, one evaluation a node; the answer lies a step further on."""
    nodes, predictor, corrector = _adams(evaluations)
    _, value, scale = _prior(block, GRIDS[evaluations].margin)
    history: tuple[Tensor, ...] = (value,)  # D at the nodes so far, newest first
    y = noise
    ahead = y + scale * _combine(predictor[0], history)
    for i in range(1, evaluations):
        weights, value = block.evaluate(ahead, scale * nodes[i])
        history = (value, *history[:3])
        y = y + scale * _combine(corrector[i - 1], history)
        ahead = y + scale * _combine(predictor[i], history)
        y, ahead, scale, *kept = block.settle(weights, i + 1, y, ahead, scale, *history)
        history = tuple(kept)
        if not len(y):
            return
    block.finish(block.logits(ahead, scale * nodes[-1]), evaluations)


@lru_cache
def _adams(evaluations: int) -> tuple[list[float], list[list[float]], list[list[float]]]:
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


def _combine(weights: list[float], values: tuple[Tensor, ...]) -> Tensor:
    total = weights[0] * values[0]
    for weight, value in zip(weights[1:], values[1:], strict=False):
        total = torch.add(total, value, alpha=weight)
    return total


def _paper(block: _Block, noise: Tensor, evaluations: int) -> None:
    """The paper's solver, then the nearest code with p > 0 (Eq. 4).

    Snapped to the whole codebook, 2 % of the tokens of a LlamaGen-like one land on codes of probability 0: 7.9 %
    wrong instead of 6.8 %. VAR-like ones have 3.5 % either way.
    """
    x = _dpm_solver(block, noise, evaluations)
    support = block.log_p.masked_fill(block.log_p > -math.inf, 0)
    block.finish(block.project(pad(x, (0, 1), value=-1), support), evaluations)  # <x, c> - |c|^2 / 2


def _dpm_solver(block: _Block, noise: Tensor, evaluations: int) -> Tensor:
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
        _, value = block.evaluate(y, y.new_full((len(y), 1), u[i]))
        history = (value, *history[:2])
        order = min(3, i + 1, evaluations - i)
        y = y + _combine(_dpm_weights(log_u[i + 1 - order : i + 2], u[i + 1]), history)
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


def _dormand_prince(block: _Block, noise: Tensor, tolerance: float = 1e-8) -> None:
    """Each token with its own steps, until its code has won for good or coinciding codes can win no more."""
    _, mean, scale = _prior(block, 0)
    y, u, h, end, first = noise, 0 * scale, 0.01 * scale.clamp_max(1), 1e3 * scale.clamp_min(1), mean
    for _ in range(5000):
        slopes = [first]
        for stage, time in zip(_STAGES, _TIMES, strict=True):
            ahead = y + h * _combine(stage, tuple(slopes))
            weights, slope = block.evaluate(ahead, u + time * h)
            slopes.append(slope)
        error = (h * _combine(_ERROR, tuple(slopes))).square().mean(-1, keepdim=True).sqrt()
        good = error <= tolerance
        y, u, first = (torch.where(good, *pair) for pair in ((ahead, y), (u + h, u), (slope, first)))
        h = h * (0.9 * (tolerance / error.clamp_min(1e-300)) ** 0.2).clamp(0.2, 6)
        done = (good[:, 0] & (_won(block, weights, y, u) | (u > end)[:, 0])).nonzero()[:, 0]
        y, u, h, end, first = block.close(done, weights[done].argmax(-1), 0, y, u, h, end, first)
        if not len(y):
            return
    raise RuntimeError("a token is undecided after 5000 steps; look at the codebook for extreme values")


def _won(block: _Block, weights: Tensor, y: Tensor, u: Tensor) -> Tensor:
    """Whether the best code has won for good, [n]: nearly all weight is its own, and along dy/du = that code, the
    path from here on, all others' odds together stay below 1e-6, each at its own maximum.
    """
    w, best = weights.max(-1, keepdim=True)
    code = block.codes.mT[best[:, 0]]  # [n, C + 1]
    origin = y - u * code[:, :-1]  # stays put from here on
    # log odds at u: log p_j - log p_best + gain u - bend u^2, highest at u = gain / (2 bend)
    zeros = torch.zeros_like(weights)
    gain = block.project(pad(origin, (0, 1)), zeros) - (origin * code[:, :-1]).sum(-1, keepdim=True)
    bend = block.project(pad(-code[:, :-1], (0, 1), value=1), code[:, -1:] + zeros)  # |c_j - c_best|^2 / 2
    peak = torch.maximum(gain / (2 * bend).clamp_min(1e-300), u)
    odds = block.log_p - block.log_p.gather(1, best) + peak * gain - peak.square() * bend
    odds = odds.scatter(1, best, -math.inf).logsumexp(-1)
    return (w[:, 0] > 1 - 1e-10) & (odds < math.log(1e-6))
