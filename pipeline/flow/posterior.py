"""The weights of the flow-matching ODE, and the book of the tokens that are solved together: ``OpenTokens``.

The weights of n tokens over K codes each, the whole codebook or a token's gathered survivors, are a few lines: logits,
softmax, moments. The rest keeps book. Tokens are decided at different times, and one that is decided leaves: its code
is noted, and its row is taken out of everything that has a row per token, the solver's tensors too, so that what
follows is computed for open tokens alone. y and u are the coordinates of matching.py.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

EXIT_WEIGHT, EXIT_GAIN = 0.9, 20.0  # a token is decided when its best weight and the growth of its odds exceed these
GATHER_BELOW = 3  # each token's K survivors are gathered if K (C + 4) is below this times V
BLOCK_BYTES = {"cpu": 8 << 20, "cuda": 1 << 30}  # working set of the tokens solved together: stays in the cache


def standardise(codebook: Tensor) -> Tensor:
    """Mean 0, variance 1: the same map, with the digits of float32 spent on the differences between codes."""
    centred = codebook - codebook.mean(0)
    return centred / centred.square().mean().sqrt().clamp_min(torch.finfo(centred.dtype).tiny)


class Codes(NamedTuple):
    """The codes (c, |c|^2 / 2): the half square as one more number makes the logits a single matrix product.

    By rows [V, C + 1], from which a token gathers its survivors, and by columns [C + 1, V], both contiguous.
    """

    rows: Tensor
    columns: Tensor


def augment(codebook: Tensor) -> Codes:
    """The codes of a codebook [V, C]."""
    rows = torch.cat([codebook, codebook.square().sum(-1, keepdim=True) / 2], -1)
    return Codes(rows, rows.mT.contiguous())


def pad_columns(codebook: Tensor) -> Tensor:
    """[V, W], W the power of two from C on: zeros, which change no product, are the columns that are added."""
    return pad(codebook, (0, (1 << (codebook.shape[1] - 1).bit_length()) - codebook.shape[1])).contiguous()


def portions(log_p: Tensor, dimension: int) -> Iterator[tuple[Tensor, int | None]]:
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


class OpenTokens:
    """Tokens solved together: the weights of the n that are open, and the answers of those that are closed.

    Of all tokens that came in, in their order: answer int64 (a code of the codebook) and count float32 (evaluations
    until then), both 0 until the token is closed. Of the open ones alone, a row each, in the order of `open` [n], their
    numbers among all: log_p [n, K] and, if gathered, `places` [n, K] of their codes in the codebook. codes are a code
    and |c|^2 / 2 per column, [C + 1, K] for all tokens or gathered [n, C + 1, K].

    A solver holds tensors with a row per open token and hands them to `close_decided` or `close`, which return them
    without the rows that were closed.
    """

    def __init__(self, log_p: Tensor, augmented: Codes, width: int | None = None) -> None:
        """log_p [N, V], none closed; `width` as `portions` has it."""
        self.open = torch.arange(len(log_p), device=log_p.device)
        self.answer = torch.zeros_like(self.open)
        self.count = torch.zeros_like(self.open, dtype=torch.float32)
        self.places: Tensor | None = None  # [n, K] in the codebook, if gathered
        if width is None:
            self.codes = augmented.columns
        else:  # survivors in the codebook's order, then codes of probability 0
            alive = log_p > -math.inf
            filled = torch.arange(width, device=log_p.device) < alive.sum(-1, keepdim=True)
            self.places = filled.long().masked_scatter_(filled, alive.nonzero()[:, 1])
            log_p = log_p.gather(1, self.places).masked_fill(~filled, -math.inf)
            codes = augmented.rows.index_select(0, self.places.flatten()).view(*self.places.shape, -1)
            self.codes = codes.mT.contiguous()
        self.log_p = log_p.log_softmax(-1)

    # ---- weights

    def project(self, query: Tensor, onto: Tensor) -> Tensor:
        """onto_j + <query, (c_j, |c_j|^2 / 2)>: query [n, C + 1], onto [n, K] -> [n, K]."""
        if self.places is None:
            return torch.addmm(onto, query, self.codes)
        return torch.baddbmm(onto[:, None], query[:, None], self.codes)[:, 0]

    def logits(self, y: Tensor, u: Tensor) -> Tensor:
        """log w_j but for a constant: y [n, C], u [n, 1] -> [n, K]."""
        return self.project(torch.cat([u * y, u * -u], -1), self.log_p)

    def moments(self, weights: Tensor) -> Tensor:
        """sum_j w_j (c_j, |c_j|^2 / 2): weights [n, K] -> [n, C + 1]."""
        return weights @ self.codes.mT if self.places is None else (weights[:, None] @ self.codes.mT)[:, 0]

    def evaluate(self, y: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """The weights [n, K] and D [n, C] at y [n, C], u [n, 1]."""
        weights = self.logits(y, u).softmax(-1)
        return weights, self.moments(weights)[:, :-1]

    # ---- book

    def close_decided(self, weights: Tensor, count: float, *state: Tensor) -> tuple[Tensor, ...]:
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

    def close_all(self, scores: Tensor, count: float) -> None:
        """Close all that are open with their best scores [n, K]."""
        self.close(torch.arange(len(scores), device=scores.device), scores.argmax(-1), count)


def prior(tokens: OpenTokens, margin: float) -> tuple[Tensor, Tensor, Tensor]:
    """p [n, K], the mean code [n, C] and S [n, 1], the u about which a token is decided.

    S = sqrt(exp((2 H + margin sqrt(2 C)) / C) - 1) / s with H the entropy of p in nats and s^2 = tr Cov_p(c) / C:
    the signal-to-noise ratio at which a Gaussian channel of C dimensions carries H nats, and some more.
    """
    p = tokens.log_p.softmax(-1)  # the exponential, but faster
    moments = tokens.moments(p)
    mean, dimension = moments[:, :-1], moments.shape[1] - 1
    variance = (2 * moments[:, -1:] - mean.square().sum(-1, keepdim=True)) / dimension
    entropy = -(p * tokens.log_p.clamp_min(-1e4)).sum(-1, keepdim=True)  # 0 log 0 = 0
    ratio = torch.expm1((2 * entropy + margin * math.sqrt(2 * dimension)) / dimension)
    return p, mean, (ratio / variance.clamp_min(1e-12)).sqrt()
