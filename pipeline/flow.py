"""AR flow matching's map q = FM(noise, p): which code a token's noise flows to (paper Eq. 2 to 4, Alg. 1 line 5).

A token's target is the discrete distribution sum_j p_j delta(c_j) over the codebook, its source N(0, I), its path
x_t = (1 - t) noise + t code. With u = t / (1 - t) and y = x_t / (1 - t) the flow-matching ODE dx/dt = V(x, t) becomes

    dy/du = D(y, u) = sum_j w_j c_j,   w = softmax_j(log p_j + u <y, c_j> - u^2 |c_j|^2 / 2),   y(0) = noise:

nothing is singular at t = 0 and nothing is divided by 1 - t. As u grows one weight wins; its code is the answer, so a
code with p_j = 0 can never be one. The map ignores the codebook's scale and position (a scale a is u -> a u).

Knows nothing of teachers, files or randomness: tensors in, tensors out, on whatever device they are.
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

SOLVERS = ("adaptive", "fixed", "paper")


class Grid(NamedTuple):
    """A tuned grid of n nodes in u: S * reach * (i / (n - 1)) ** power, the second node times `first`."""

    margin: float  # kappa in S, see `_scale`
    reach: float
    power: float
    first: float
    end: float  # the weights are read off at S * reach * end
    predictor: int  # past evaluations the step to the next node is fitted through
    corrector: int  # past evaluations the repeated step is fitted through, beside the new one


GRIDS = {  # evaluations per token -> grid, tuned on synthetic VAR-like and LlamaGen-like codebooks
    5: Grid(2.34, 0.63, 1.308, 0.80, 1.213, 4, 2),
    6: Grid(1.80, 0.68, 1.255, 0.88, 1.540, 2, 1),
    8: Grid(2.40, 0.69, 1.234, 1.03, 1.350, 4, 3),
    10: Grid(2.75, 0.69, 1.330, 1.10, 1.360, 4, 3),
    14: Grid(3.00, 0.84, 1.345, 1.15, 1.500, 4, 3),
    20: Grid(1.93, 1.04, 1.320, 0.90, 1.420, 3, 2),
}
MARGIN = 2.75  # kappa of the adaptive solver's S
MAX_STEPS = 96  # adaptive: a token still undecided after this many is read off where it stands
MAX_U = 1e3  # adaptive: as is one past this u, where float32 tells codes of a standardised codebook no further apart
EXIT_WEIGHT, EXIT_GAIN = (
    0.9,
    20.0,
)  # a token is decided when its best weight and the growth of its odds exceed these
GATHER_BELOW = 3  # survivors are gathered if their number times (C + 4) is at most this times V
BLOCK_BYTES = {
    "cpu": 8 << 20,
    "cuda": 1 << 30,
}  # working set of one block of tokens: the cache, or some of the memory


@dataclass(frozen=True)
class Solver:
    """How the ODE is integrated. Share of wrong codes against `exact`, VAR-like / LlamaGen-like codebooks, per cent:

    adaptive  step size per token from `tolerance`; safe for any codebook (0.07 / 0.05 at 9.5 / 14.5 evaluations)
    fixed     `evaluations` nodes on a tuned grid scaled to each token (10: 0.12 / 0.43), wrong where codes nearly coincide
    paper     DPM-Solver++, order 3, multistep, as the paper sets it (10: 3.5 / 6.8)
    """

    name: Literal["adaptive", "fixed", "paper"] = "adaptive"
    evaluations: int = 10
    tolerance: float = 1e-3

    def __post_init__(self) -> None:
        if self.name not in SOLVERS:
            raise ValueError(f"solver name is {self.name!r}; choose one of {', '.join(SOLVERS)}")
        if self.name == "fixed" and self.evaluations not in GRIDS:
            raise ValueError(
                f"solver evaluations is {self.evaluations}; the fixed solver has grids for {', '.join(map(str, GRIDS))}: "
                "choose one of them"
            )
        if self.name == "paper" and self.evaluations < 1:
            raise ValueError(
                f"solver evaluations is {self.evaluations}; the paper solver needs 1 or more: raise it"
            )
        if self.name == "adaptive" and not 1e-6 <= self.tolerance < 1:
            raise ValueError(
                f"solver tolerance is {self.tolerance}; float32 resolves 1e-6 up to 1: choose one there, or use exact()"
            )


# ---- public functions


def posterior_mean(log_p: Tensor, x: Tensor, t: float, codebook: Tensor) -> Tensor:
    """E[c | x_t = x], the weights of the paper's Eq. 3: w_j ~ p_j exp(-|x - t c_j|^2 / (2 (1 - t)^2)).

    (The printed equation lacks the exponent's sign and half.) log_p [..., V], x [..., C], 0 <= t < 1, codebook [V, C];
    returns [..., C] in float64 if x is float64, otherwise float32. Raises ValueError for other shapes, values or t.
    """
    if not 0 <= t < 1:
        raise ValueError(f"t is {t}; the velocity exists for 0 <= t < 1: stop before the data end")
    _check(x, log_p, codebook)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    with _full_precision(x.device):
        posterior = _dense(log_p.reshape(-1, len(codebook)).to(dtype), _augment(codebook.to(dtype)))
        y = x.reshape(-1, x.shape[-1]).to(dtype) / (1 - t)
        u = y.new_full((len(y), 1), t / (1 - t))
        return posterior.mean(posterior.logits(y, u).softmax(-1))[:, :-1].reshape(x.shape)


def velocity(log_p: Tensor, x: Tensor, t: float, codebook: Tensor) -> Tensor:
    """V(x, t) = (E[c | x_t = x] - x) / (1 - t), the paper's Eq. 3; arguments as in `posterior_mean`."""
    return (posterior_mean(log_p, x, t, codebook) - x) / (1 - t)


def match(noise: Tensor, log_p: Tensor, codebook: Tensor, solver: Solver = Solver()) -> Tensor:
    """The code each token's noise flows to (Eq. 4): noise [..., C], log_p [..., V], codebook [V, C] -> int64 [...].

    log_p holds log-probabilities after guidance, temperature and filter, -inf where p is 0, normalised or not; its
    leading dimensions are the noise's. Computed in float32 whatever the types and global settings; the codes do not
    depend on which tokens share a call. Raises ValueError for other shapes, NaN, or a token without any p > 0.
    """
    return match_counted(noise, log_p, codebook, solver)[0]


@torch.no_grad()
def match_counted(
    noise: Tensor, log_p: Tensor, codebook: Tensor, solver: Solver = Solver()
) -> tuple[Tensor, Tensor]:
    """`match`, and the posterior evaluations each token took: codes int64 [...], float32 [...]."""
    _check(noise, log_p, codebook)
    leading, noise, log_p = (
        noise.shape[:-1],
        noise.reshape(-1, noise.shape[-1]),
        log_p.reshape(-1, len(codebook)),
    )
    codes = torch.empty(len(noise), dtype=torch.long, device=noise.device)
    counts = torch.empty(len(noise), device=noise.device)
    with _full_precision(noise.device):
        # The paper's grid is in t, hence not free of scale: only there is the codebook taken as it is.
        augmented = _augment(codebook.float() if solver.name == "paper" else _standardise(codebook.float()))
        for rows, width in _blocks(log_p, codebook.shape[1]):
            block = log_p[rows].float()
            posterior = _dense(block, augmented) if width is None else _gathered(block, augmented, width)
            start = noise[rows].float()
            if solver.name == "adaptive":
                best, count = _adaptive(posterior, start, solver.tolerance)
            elif solver.name == "fixed":
                best, count = _fixed(posterior, start, solver.evaluations)
            else:
                best, count = _paper(posterior, start, solver.evaluations)
            codes[rows] = best if posterior.index is None else posterior.index.gather(1, best[:, None])[:, 0]
            counts[rows] = count
    return codes.view(leading), counts.view(leading)


@torch.no_grad()
def exact(noise: Tensor, log_p: Tensor, codebook: Tensor) -> Tensor:
    """`match` as an oracle: Dormand-Prince 5(4) in float64, error per step below 1e-8 in y; 100 to 200 evaluations.

    A token is released when no code can overtake its best one any more (`_sealed`), or at u = 3000 / s, where s^2 is the
    variance of its codes. Same arguments, result and errors as `match`; RuntimeError if a token is never released.
    """
    _check(noise, log_p, codebook)
    leading, noise, log_p = (
        noise.shape[:-1],
        noise.reshape(-1, noise.shape[-1]),
        log_p.reshape(-1, len(codebook)),
    )
    reachable = (
        (log_p > -math.inf).any(0).nonzero()[:, 0]
    )  # by any token: dropping the others changes no weight
    augmented = _augment(_standardise(codebook.double()[reachable]))
    step = max(1, BLOCK_BYTES.get(noise.device.type, BLOCK_BYTES["cuda"]) // (24 * max(1, len(reachable))))
    codes = [
        _dormand_prince(_dense(p[:, reachable].double(), augmented), start.double())
        for start, p in zip(noise.split(step), log_p.split(step), strict=True)
    ]
    return reachable[torch.cat(codes)].view(leading)


# ---- checks and settings


def _check(noise: Tensor, log_p: Tensor, codebook: Tensor) -> None:
    """ValueError in one sentence unless shapes, types and devices fit, values are finite and every token has a code."""
    if codebook.dim() != 2 or 0 in codebook.shape:
        raise ValueError(f"codebook has shape {tuple(codebook.shape)}; pass the V codes as [V, C]")
    (vocabulary, dimension), leading = codebook.shape, noise.shape[:-1]
    if noise.shape != (*leading, dimension) or log_p.shape != (*leading, vocabulary):
        raise ValueError(
            f"noise has shape {tuple(noise.shape)} and log_p {tuple(log_p.shape)}; with a codebook of {vocabulary} codes "
            f"in {dimension} dimensions pass [..., {dimension}] and [..., {vocabulary}] with the same leading dimensions"
        )
    if not all(tensor.is_floating_point() for tensor in (noise, log_p, codebook)):
        raise ValueError(
            f"noise, log_p and codebook are {noise.dtype}, {log_p.dtype} and {codebook.dtype}; pass floating-point tensors"
        )
    if not noise.device == log_p.device == codebook.device:
        raise ValueError(
            f"noise is on {noise.device}, log_p on {log_p.device}, codebook on {codebook.device}; move all to one device"
        )
    best = log_p.amax(-1)  # NaN where a row holds one, -inf where all of it is
    if bool(best.isfinite().all() & noise.isfinite().all() & codebook.isfinite().all()):
        return
    for name, tensor in (("noise", noise), ("codebook", codebook)):
        if not tensor.isfinite().all():
            raise ValueError(f"{name} holds NaN or infinity; pass finite numbers")
    if (best == -math.inf).any():
        raise ValueError(
            "log_p is -inf for every code of some token; leave each token at least one code with p > 0"
        )
    raise ValueError("log_p holds NaN or +inf; pass log-probabilities, -inf where p is 0")


@contextmanager
def _full_precision(device: torch.device) -> Iterator[None]:
    """float32 products in full for a while: TF32 changes 0.07 to 0.35 % of the codes, bfloat16 up to 1.9 %."""
    backends = [torch.backends.cuda.matmul, torch.backends.mkldnn.matmul]  # each has its own switch
    saved = [(backend, backend.fp32_precision) for backend in backends]
    lowered = [(backend, setting) for backend, setting in saved if setting not in ("none", "ieee")]
    try:
        for backend, _ in lowered:
            backend.fp32_precision = "ieee"
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for backend, setting in lowered:
            backend.fp32_precision = setting


# ---- blocks of tokens


def _blocks(log_p: Tensor, dimension: int) -> Iterator[tuple[Tensor, int | None]]:
    """Tokens that go through the solver together, and the width their survivors are gathered to (None: not gathered).

    Both follow from the token alone, so that a token's route does not depend on its neighbours. An evaluation costs
    about 9 V over the codebook and (C + 4) K over K gathered codes, and gathering costs a few evaluations' worth: K
    must be small, hence the margin. Widths are powers of two, so that few tokens make few blocks.
    """
    tokens, vocabulary = log_p.shape
    budget = BLOCK_BYTES.get(log_p.device.type, BLOCK_BYTES["cuda"]) // 4
    step = max(1, budget // (3 * vocabulary))
    if vocabulary < 1024 or not tokens:  # too small for gathering to pay for itself
        yield from (
            (rows, None) for rows in torch.arange(tokens, device=log_p.device).split(step) if len(rows)
        )
        return
    counts = torch.cat([(block > -math.inf).sum(-1) for block in log_p.split(step)])
    widths = 2 ** torch.log2(counts.clamp_min(16).double()).ceil().long()
    widths[widths * (dimension + 4) >= GATHER_BELOW * vocabulary] = 0
    for width in widths.unique().tolist():
        step = max(1, budget // ((dimension + 4) * width or 3 * vocabulary))
        yield from ((rows, width or None) for rows in (widths == width).nonzero()[:, 0].split(step))


# ---- what the tokens of one block are matched against


class _Posterior(NamedTuple):
    """p(code | x_t) of n tokens, over the whole codebook or over each token's own survivors (the codes with p > 0)."""

    log_p: Tensor  # [n, K], normalised
    codes: Tensor  # [C + 1, K] for all tokens or [n, C + 1, K] gathered: each column a code and |code|^2 / 2
    index: Tensor | None = None  # [n, K] place in the codebook, if gathered

    def project(self, query: Tensor, onto: Tensor) -> Tensor:
        """onto_j + <query, (c_j, |c_j|^2 / 2)>: query [n, C + 1], onto [n, K] -> [n, K]."""
        if self.index is None:
            return torch.addmm(onto, query, self.codes)
        return torch.baddbmm(onto[:, None], query[:, None], self.codes)[:, 0]

    def logits(self, y: Tensor, u: Tensor) -> Tensor:
        """log w_j up to a constant: y [n, C], u [n, 1] -> [n, K]."""
        return self.project(torch.cat([u * y, -u * u], -1), self.log_p)

    def mean(self, weights: Tensor) -> Tensor:
        """sum_j w_j (c_j, |c_j|^2 / 2): [n, K] -> [n, C + 1]."""
        return weights @ self.codes.mT if self.index is None else (weights[:, None] @ self.codes.mT)[:, 0]

    def evaluate(self, y: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """The weights at (y, u) and D(y, u): [n, K] and [n, C]."""
        weights = self.logits(y, u).softmax(-1)
        return weights, self.mean(weights)[:, :-1]

    def keep(self, rows: Tensor) -> "_Posterior":
        """The posterior of some of the tokens."""
        log_p = self.log_p.index_select(0, rows)
        if self.index is None:
            return _Posterior(log_p, self.codes)
        return _Posterior(log_p, self.codes.index_select(0, rows), self.index.index_select(0, rows))


def _dense(log_p: Tensor, augmented: Tensor) -> _Posterior:
    return _Posterior(log_p.log_softmax(-1), augmented.mT.contiguous())


def _gathered(log_p: Tensor, augmented: Tensor, width: int) -> _Posterior:
    """Each token's survivors in codebook order, the row filled up to `width` with codes of probability 0."""
    token, code = (log_p > -math.inf).nonzero(as_tuple=True)
    counts = torch.bincount(token, minlength=len(log_p))
    place = torch.arange(len(token), device=token.device) - (counts.cumsum(0) - counts)[token]
    index = token.new_zeros(len(log_p), width)
    index[token, place] = code
    values = log_p.gather(1, index)
    values.masked_fill_(torch.arange(width, device=token.device) >= counts[:, None], -math.inf)
    codes = augmented.index_select(0, index.flatten()).view(*index.shape, -1)
    return _Posterior(values.log_softmax(-1), codes.mT.contiguous(), index)


def _augment(codes: Tensor) -> Tensor:
    """[V, C] -> [V, C + 1]: |c|^2 / 2 as one more column makes the logits a single matrix product."""
    return torch.cat([codes, codes.square().sum(-1, keepdim=True) / 2], -1)


def _standardise(codebook: Tensor) -> Tensor:
    """Mean 0 and variance 1 over all entries: the same map (see the module's text) with more digits left in float32."""
    centred = codebook - codebook.mean(0)
    return centred / centred.square().mean().sqrt().clamp_min(torch.finfo(centred.dtype).tiny)


def _scale(posterior: _Posterior, margin: float) -> tuple[Tensor, Tensor]:
    """The mean code under p [n, C], and S [n, 1]: the u about which a token is decided.

    S = sqrt(exp((2 H + kappa sqrt(2 C)) / C) - 1) / s with H the entropy of p in nats and s^2 = tr Cov_p(c) / C: there a
    Gaussian channel of C dimensions carries H nats, plus a margin of kappa / 2 standard deviations.
    """
    p = posterior.log_p.softmax(-1)  # several times faster than exp
    moments = posterior.mean(p)
    mean, square = moments[:, :-1], 2 * moments[:, -1:]
    dimension = mean.shape[1]
    variance = (square - mean.square().sum(-1, keepdim=True)) / dimension
    nats = -(p * posterior.log_p.clamp_min(-1e4)).sum(-1, keepdim=True)  # 0 log 0 = 0
    growth = torch.expm1((2 * nats + margin * math.sqrt(2 * dimension)) / dimension)
    return p, mean, (growth / variance.clamp_min(1e-12)).sqrt()


# ---- the solvers: a block's posterior and noise [n, C] -> places among the K codes [n], evaluations [n]


class _Moving:
    """The tokens of a block that are not decided yet, and the answers of those that are."""

    def __init__(self, posterior: _Posterior) -> None:
        self.posterior = posterior
        self.rows = torch.arange(len(posterior.log_p), device=posterior.log_p.device)
        self.best = torch.zeros_like(self.rows)
        self.count = torch.zeros_like(self.rows, dtype=torch.float32)

    def settle(
        self, weights: Tensor, count: float, state: tuple[Tensor, ...], stuck: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """Record the tokens that no later evaluation can change and drop their rows from every tensor of `state`.

        Decided is a token whose best weight exceeds EXIT_WEIGHT with EXIT_GAIN times its prior odds (a weight that
        merely started high is not): that changed no code of 36,864 tokens on any grid. `stuck` [n] is read off too.
        """
        likely = weights.amax(-1, keepdim=True) > EXIT_WEIGHT
        rows = (likely if stuck is None else likely | stuck).nonzero()[:, 0]
        if not len(rows):
            return state
        w, best = weights.index_select(0, rows).max(-1, keepdim=True)
        p = self.posterior.log_p.index_select(0, rows).gather(1, best).exp()
        final = torch.addcmul(w, w, p, value=EXIT_GAIN - 1) >= p * EXIT_GAIN  # w / (1 - w) >= EXIT_GAIN p / (1 - p)
        if stuck is not None:
            final |= stuck.index_select(0, rows)
        sure = final.nonzero()[:, 0]
        return self.release(rows.index_select(0, sure), best[:, 0].index_select(0, sure), count, state)

    def release(self, rows: Tensor, best: Tensor, count: float, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Record `best` for `rows` and drop them from every tensor of `state`."""
        tokens = self.rows.index_select(0, rows)
        self.best.index_copy_(0, tokens, best)
        self.count.index_fill_(0, tokens, count)
        stay = torch.ones_like(self.rows).index_fill_(0, rows, 0).nonzero()[:, 0]
        self.posterior, self.rows = self.posterior.keep(stay), self.rows.index_select(0, stay)
        return tuple(tensor.index_select(0, stay) for tensor in state)

    def finish(self, scores: Tensor, count: float) -> tuple[Tensor, Tensor]:
        """Read off the tokens that remain, scores [n, K]; the places and evaluations of the whole block."""
        self.best[self.rows], self.count[self.rows] = scores.argmax(-1), count
        return self.best, self.count


def _adaptive(posterior: _Posterior, noise: Tensor, tolerance: float) -> tuple[Tensor, Tensor]:
    """Third-order Adams predictor, fourth-order corrector, one evaluation a step, each token with its own steps.

    The last three evaluations are held as the value and the terms `line` and `bend` of Newton's interpolation,
    carried on to the step ahead; a and c are that step over its distance to the nodes before the last. At u = 0 the
    slope Cov_p(c) noise is known: two nodes coincide there (a = 1), the third is far away (c = 0). The corrector's
    move sets the growth of the next step and rejects none: clip(0.9 (tolerance / move)^(1/4), 1/4, 5/2).
    The start counts as 1.5 evaluations.
    """
    p, value, scale = _scale(posterior, MARGIN)
    slope = _initial_slope(posterior, p, value, noise)
    root = math.sqrt(noise.shape[1])
    first = 0.12 * (tolerance / 1e-3) ** 0.25 * (slope.norm(dim=-1, keepdim=True) / root).clamp_min(1e-12).rsqrt()
    h = torch.minimum(first, scale / 2)
    y, u, line, bend, a, c = noise, torch.zeros_like(h), h * slope, 0 * slope, torch.ones_like(h), torch.zeros_like(h)
    one, two = torch.tensor(1.0), torch.tensor(2.0)  # a Python number would be converted anew in every operation
    moving = _Moving(posterior)
    for step in range(MAX_STEPS):
        mean = torch.addcmul(torch.add(value, line, alpha=1 / 2), two - a + one, bend, value=1 / 6)
        y, u = torch.addcmul(y, h, mean), u + h
        weights, latest = moving.posterior.evaluate(y, u)
        change = latest - value
        turn = change - line
        defect, weight = turn - bend, h * ((two - a) * (two - c) + two)
        y = torch.addcmul(y, weight, defect, value=1 / 12)
        move = weight * defect.norm(dim=-1, keepdim=True)
        growth = (move.pow(-1 / 4) * (0.9 * (12 * root * tolerance) ** 0.25)).clamp(0.25, 2.5)
        ga, after = growth * a, growth + one
        value, line, bend = latest, growth * change, ga * after * turn
        h, a, c = growth * h, growth / after, ga / (ga + one)
        if step % 2 == 0:  # in a small block looking who is decided costs as much as a step
            stuck = u > MAX_U if step % 8 == 6 else None
            state = (y, value, line, bend, u, h, a, c)
            y, value, line, bend, u, h, a, c = moving.settle(weights, step + 2.5, state, stuck)
            if not len(y):
                return moving.best, moving.count
    return moving.finish(moving.posterior.logits(y, u), MAX_STEPS + 1.5)


def _initial_slope(posterior: _Posterior, p: Tensor, mean: Tensor, noise: Tensor) -> Tensor:
    """dD/du at u = 0: Cov_p(c) noise = E[c <c, noise>] - E[c] <E[c], noise>, [n, C]."""
    onto = torch.zeros_like(posterior.log_p)
    inner = posterior.project(torch.cat([noise, torch.zeros_like(noise[:, :1])], -1), onto)
    return posterior.mean(p * inner)[:, :-1] - mean * (mean * noise).sum(-1, keepdim=True)


def _rms(x: Tensor) -> Tensor:
    return x.square().mean(-1, keepdim=True).sqrt()


def _fixed(posterior: _Posterior, noise: Tensor, evaluations: int) -> tuple[Tensor, Tensor]:
    """Adams predictor-corrector on a grid scaled to each token, one evaluation a node; argmax a step beyond the last."""
    nodes, predictor, corrector = _adams(evaluations)
    _, value, scale = _scale(posterior, GRIDS[evaluations].margin)
    moving, y, history = _Moving(posterior), noise, (value,)  # history: D at the nodes so far, newest first
    predicted = y + scale * _combine(predictor[0], history)
    for i in range(1, evaluations):
        weights, value = moving.posterior.evaluate(predicted, scale * nodes[i])
        history = (value, *history[:3])
        y = y + scale * _combine(corrector[i - 1], history)
        predicted = y + scale * _combine(predictor[i], history)
        y, predicted, scale, *rest = moving.settle(weights, i + 1, (y, predicted, scale, *history))
        history = tuple(rest)
        if not len(y):
            break
    return moving.finish(moving.posterior.logits(predicted, scale * nodes[-1]), evaluations)


@lru_cache
def _adams(evaluations: int) -> tuple[list[float], list[list[float]], list[list[float]]]:
    """For S = 1: the n nodes and the read-out point; the weights of the n predictor and the n - 1 corrector steps.

    Step i of either goes from node i to the next and weighs the evaluations newest first, exact for polynomials in u;
    the corrector has the evaluation at its end, too. The last predictor step leads to the read-out, along a line.
    """
    grid, last = GRIDS[evaluations], evaluations - 1
    nodes = [grid.reach * (i / last) ** grid.power for i in range(evaluations)]
    nodes[1] *= grid.first
    nodes.append(grid.reach * grid.end)
    predictor, corrector = [], []
    for i in range(evaluations):
        past = nodes[i::-1][: grid.predictor if i < last else 2]
        predictor.append(_quadrature(past, nodes[i], nodes[i + 1]))
        if i < last:
            corrector.append(_quadrature(nodes[i + 1 :: -1][: grid.corrector + 1], nodes[i], nodes[i + 1]))
    return nodes, predictor, corrector


def _quadrature(nodes: list[float], start: float, end: float) -> list[float]:
    """Weights w with integral_start^end f = sum_i w_i f(nodes_i) for polynomials f of a degree below len(nodes)."""
    length, powers = end - start, np.arange(len(nodes))
    offsets = (np.array(nodes) - start) / length
    return (np.linalg.solve(offsets ** powers[:, None], 1 / (powers + 1)) * length).tolist()


def _combine(weights: list[float], history: tuple[Tensor, ...]) -> Tensor:
    total = weights[0] * history[0]
    for weight, value in zip(weights[1:], history[1:], strict=False):
        total = torch.add(total, value, alpha=weight)
    return total


def _paper(posterior: _Posterior, noise: Tensor, evaluations: int) -> tuple[Tensor, Tensor]:
    """The paper's solver, then the nearest code (Eq. 4) among those with p > 0.

    Without that restriction 2 % of LlamaGen-like tokens land on codes of probability 0 (7.9 % wrong in all; with it
    6.8 %; VAR-like codes: 3.5 % either way).
    """
    x = _dpm_solver(posterior, noise, evaluations)
    support = torch.where(posterior.log_p > -math.inf, 0.0, posterior.log_p)
    scores = posterior.project(
        torch.cat([x, -torch.ones_like(x[:, :1])], -1), support
    )  # -|x - c|^2 / 2 + |x|^2 / 2
    return scores.argmax(-1), torch.full(x.shape[:1], float(evaluations), device=x.device)


def _dpm_solver(posterior: _Posterior, noise: Tensor, evaluations: int) -> Tensor:
    """DPM-Solver++ (arXiv 2211.01095), multistep, order 3, uniform in t: x_t at t = 0.999, [n, C].

    In (y, u) data prediction is Adams-Bashforth with D fitted in log u. As the public code has it, the noise starts at
    t = 0.001 unscaled, and the curve enters with half its Taylor weight. Unlike the public code, which at 10 steps or
    more keeps order 3 to the end and throws LlamaGen's unit-norm codes off (94 % wrong), the last two steps are of
    order 2 and 1, as its documentation says.
    """
    s = np.linspace(0.999, 0.001, evaluations + 1)  # 1 - t
    u, log_u = (1 - s) / s, np.log((1 - s) / s)
    y, history = noise / s[0], ()
    for i in range(evaluations):
        value = posterior.evaluate(y, y.new_full((len(y), 1), u[i]))[1]
        history = (value, *history[:2])
        order = min(3, i + 1, evaluations - i)
        y = y + _combine(_dpm_weights(log_u[i + 1 - order : i + 2], u[i + 1]), history)
    return y * s[-1]


def _dpm_weights(log_u: np.ndarray, end: float) -> list[float]:
    """Weights of the last evaluations, newest first, in the step from log_u[-2] to log_u[-1], where u is `end`."""
    h = log_u[-1] - log_u[-2]
    phi1 = -math.expm1(-h)
    if len(log_u) == 2:
        return [end * phi1]
    now, before, oldest = np.eye(3)  # as if the evaluations were these: the result is linear in them
    r0 = (log_u[-2] - log_u[-3]) / h
    slope = (now - before) / r0
    if len(log_u) == 3:
        return (end * phi1 * (now + slope / 2)).tolist()
    r1 = (log_u[-3] - log_u[-4]) / h
    older = (before - oldest) / r1
    curve = (slope - older) / (r0 + r1)
    phi2 = 1 - phi1 / h
    phi3 = phi2 / h - 0.5
    return (end * (phi1 * now + phi2 * (slope + r0 * curve) - phi3 * curve)).tolist()


# ---- the oracle's integration

_STAGES = (  # Dormand and Prince's tableau: the last row is the fifth-order step, its evaluation the next step's first
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
_NODES = (1 / 5, 3 / 10, 4 / 5, 8 / 9, 1, 1)
_ERROR = (71 / 57600, 0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)


def _dormand_prince(posterior: _Posterior, noise: Tensor) -> Tensor:
    """The codes' places [n]: each token with its own step, tolerance 1e-8 of the root mean square of y."""
    tolerance = 1e-8
    p = posterior.log_p.exp()
    moments = posterior.mean(p)
    spread = (2 * moments[:, -1:] - moments[:, :-1].square().sum(-1, keepdim=True)).div(noise.shape[1])
    spread = spread.clamp_min(1e-24).sqrt()
    y, u, h, limit, first = noise, torch.zeros_like(spread), 0.02 / spread, 3e3 / spread, moments[:, :-1]
    moving = _Moving(posterior)
    for _ in range(5000):
        slopes, weights = [first], p
        for stage, node in zip(_STAGES, _NODES, strict=True):
            end = y + h * _combine(list(stage), tuple(slopes))
            weights, slope = moving.posterior.evaluate(end, u + node * h)
            slopes.append(slope)
        error = _rms(h * _combine(list(_ERROR), tuple(slopes)))
        good = error <= tolerance
        y, u, first = (
            torch.where(good, end, y),
            torch.where(good, u + h, u),
            torch.where(good, slopes[-1], first),
        )
        h = h * (0.9 * (tolerance / error.clamp_min(1e-300)) ** 0.2).clamp(0.2, 6)
        done = (good[:, 0] & (_sealed(moving.posterior, weights, y, u) | (u >= limit)[:, 0])).nonzero()[:, 0]
        best = weights[done].argmax(-1)
        y, u, h, limit, first = moving.release(done, best, 0, (y, u, h, limit, first))
        if not len(y):
            return moving.best
    raise RuntimeError(
        "a token was not released within 5000 steps; look for NaN or a codebook of extreme values"
    )


def _sealed(posterior: _Posterior, weights: Tensor, y: Tensor, u: Tensor) -> Tensor:
    """Whether the best code has won for good, [n]: its weight exceeds 1 - 1e-10, and along dy/du = its code, which the
    path then follows, the other codes' odds against it stay below 1e-6 together, each taken at its own maximum.
    """
    sealed = weights.amax(-1) > 1 - 1e-10
    rows = sealed.nonzero()[:, 0]
    best = weights[rows].argmax(-1)
    log_p, codes = posterior.log_p[rows], posterior.codes[:-1]
    winner = codes.mT[best]
    origin = y[rows] - u[rows] * winner  # constant while the path is straight
    # log odds of code j at u: log p_j / p_best + gain u - bend u^2, highest at u = gain / (2 bend)
    gain = origin @ codes - (origin * winner).sum(-1, keepdim=True)
    bend = posterior.codes[-1] + winner.square().sum(-1, keepdim=True) / 2 - winner @ codes
    peak = torch.maximum(gain / (2 * bend).clamp_min(1e-300), u[rows])
    odds = log_p - log_p.gather(1, best[:, None]) + peak * gain - peak.square() * bend
    odds.scatter_(1, best[:, None], -math.inf)
    sealed[rows] = odds.logsumexp(-1) < math.log(1e-6)
    return sealed
