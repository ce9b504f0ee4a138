"""Streams of a token's survivors, for kernel.py: Triton functions whose loops make the passes of a token.

Survivors are read from the codebook as it lies (WHOLE) while more than half of it survives. Otherwise they have a list
of places. The first pass through a new list (LISTED) gathers their codes from the codebook and copies them, so that all
later ones (COPIED) read without looking anything up. A new list is made from marks that the evaluation before has left.

A tile is PARTS rows for each of ROWS slots. What is summed is summed for each slot, below the slot's own running
maximum of the exponents, and combined behind the last tile: within a pass no thread waits for another, and no [n, V]
tensor of weights exists.

`memory` is log p [V] of the token, codes [V, WIDTH], and the program's own: places int32 [V], marks int8 [V], levels
(log p) [V / 2] and copies [V / 2, WIDTH], float32 where nothing is said. `form` is one of the three words above.
"""

from __future__ import annotations

import triton
import triton.language as tl

WHOLE, LISTED, COPIED = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
LOWEST = tl.constexpr(-3e38)  # below every exponent; -inf - -inf would be NaN


@triton.jit
def survey(log_p, places, vocabulary, LIST: tl.constexpr):
    """List the codes of p > 0 in the codebook's order: how many, log sum p, whether NaN or +inf was met; passes."""
    kept = tl.full((), 0, tl.int32)
    passes = tl.full((), 0, tl.int32)
    broken = tl.full((), 0, tl.int32)
    peak = tl.full((), LOWEST, tl.float32)
    total = tl.full((), 0.0, tl.float32)
    for start in range(0, vocabulary, LIST):
        place = start + tl.arange(0, LIST)
        level = tl.load(log_p + place, mask=place < vocabulary, other=float("-inf"))
        broken |= tl.max(tl.where(level < float("inf"), 0, 1), 0)  # NaN compares false
        above = tl.maximum(peak, tl.max(level, 0))
        total = total * tl.exp(peak - above) + tl.sum(tl.exp(level - above), 0)
        peak = above
        taken = (level > float("-inf")).to(tl.int32)
        tl.store(places + kept + tl.cumsum(taken, 0) - 1, place, mask=taken != 0)
        kept += tl.sum(taken, 0)
        passes += 1
    tl.debug_barrier()  # what one thread wrote, others read
    return kept, peak + tl.log(total), broken, passes


@triton.jit
def shorten(memory, kept, form, LIST: tl.constexpr):
    """List the places of the rows that are marked, over the list that there is: how many, and passes."""
    _log_p, _codes, places, marks, _levels, _copies = memory
    left = tl.full((), 0, tl.int32)
    passes = tl.full((), 0, tl.int32)
    for start in range(0, kept, LIST):
        row = start + tl.arange(0, LIST)
        taken = tl.load(marks + row, mask=row < kept, other=0).to(tl.int32)
        place = tl.load(places + row, mask=row < tl.where(form != WHOLE, kept, 0), other=0)
        place = tl.where(form != WHOLE, place, row)
        target = left + tl.cumsum(taken, 0) - 1  # never beyond the tile that was read
        tl.debug_barrier()  # all threads have read the tile before any of it is overwritten
        tl.store(places + target, place, mask=taken != 0)
        left += tl.sum(taken, 0)
        passes += 1
    tl.debug_barrier()
    return left, passes


@triton.jit
def _tile(memory, start, kept, form, PARTS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """From row `start`: rows and log p [PARTS, ROWS] and codes [PARTS, ROWS, WIDTH]; beyond the last one p is 0.

    The PARTS rows of a slot lie in the same threads: what is done along them needs no others. All are loaded before any
    is used, and a new list's are copied.
    """
    log_p, codes, places, _marks, levels, copies = memory
    row = start + tl.arange(0, PARTS)[:, None] * ROWS + tl.arange(0, ROWS)[None, :]
    column = tl.arange(0, WIDTH)[None, None, :]
    here = row < kept
    listed = row < tl.where(form == LISTED, kept, 0)
    at = tl.where(form == LISTED, tl.load(places + row, mask=listed, other=0), row)
    level = tl.load(tl.where(form == COPIED, levels, log_p) + at, mask=here, other=float("-inf"))
    source = tl.where(form == COPIED, copies, codes)
    code = tl.load(source + at[:, :, None] * WIDTH + column, mask=here[:, :, None], other=0.0)
    tl.store(levels + row, level, mask=listed)
    tl.store(copies + row[:, :, None] * WIDTH + column, code, mask=listed[:, :, None])
    return row, level, code


# fmt: off
@triton.jit
def prior(
    memory, kept, form, log_total, noise, dimension, PARTS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr
):
    # fmt: on
    """posterior.prior with margin 2.75: the mean code, the slope Cov_p(c) noise, S and sum p |c|^2; passes."""
    passes = tl.full((), 0, tl.int32)
    mean = tl.zeros((ROWS, WIDTH), tl.float32)
    turned = tl.zeros((ROWS, WIDTH), tl.float32)
    square = tl.zeros((ROWS,), tl.float32)
    entropy = tl.zeros((ROWS,), tl.float32)
    for start in range(0, kept, PARTS * ROWS):
        _row, level, code = _tile(memory, start, kept, form, PARTS, ROWS, WIDTH)
        level = level - log_total
        p = tl.exp(level)
        mean += tl.sum(p[:, :, None] * code, 0)
        turned += tl.sum((p * tl.sum(code * noise[None, None, :], 2))[:, :, None] * code, 0)
        square += tl.sum(p * tl.sum(code * code, 2), 0)
        entropy -= tl.sum(p * tl.maximum(level, -1e4), 0)  # 0 log 0 = 0
        passes += 1
    tl.debug_barrier()  # copies are there
    value = tl.sum(mean, 0)
    slope = tl.sum(turned, 0) - value * tl.sum(value * noise, 0)
    size = tl.sum(square, 0)
    variance = (size - tl.sum(value * value, 0)) / dimension
    nats = 2 * tl.sum(entropy, 0) + 2.75 * tl.sqrt(2.0 * dimension)
    scale = tl.sqrt((tl.exp(nats / dimension) - 1) / tl.maximum(variance, 1e-12))
    return value, slope, scale, size, passes


# fmt: off
@triton.jit
def evaluate(
    memory, kept, form, log_total, query, half, threshold,
    PARTS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):
    # fmt: on
    """log Z, the best weight, its row, D, sum w |c|^2, how many rows are marked, being above the threshold; passes."""
    _log_p, _codes, _places, marks, _levels, _copies = memory
    passes = tl.full((), 0, tl.int32)
    marked = tl.zeros((ROWS,), tl.int32)
    total = tl.zeros((ROWS,), tl.float32)
    square = tl.zeros((ROWS,), tl.float32)
    mean = tl.zeros((ROWS, WIDTH), tl.float32)
    top = tl.full((ROWS,), LOWEST, tl.float32)
    best = tl.zeros((ROWS,), tl.int32)
    for start in range(0, kept, PARTS * ROWS):
        row, level, code = _tile(memory, start, kept, form, PARTS, ROWS, WIDTH)
        logit = level - log_total + tl.sum(code * (query[None, None, :] - half * code), 2)
        higher = tl.max(logit, 0)
        first = tl.min(tl.where(logit == higher[None, :], row, 2147483647), 0)
        best = tl.where(higher > top, first, best)
        above = tl.maximum(top, higher)
        shrink = tl.exp(top - above)
        weight = tl.exp(logit - above[None, :])
        total = total * shrink + tl.sum(weight, 0)
        square = square * shrink + tl.sum(weight * tl.sum(code * code, 2), 0)
        mean = mean * shrink[:, None] + tl.sum(weight[:, :, None] * code, 0)
        top = above
        taken = logit > threshold
        tl.store(marks + row, taken.to(tl.int8), mask=row < kept)
        marked += tl.sum(taken.to(tl.int32), 0)
        passes += 1
    tl.debug_barrier()  # copies and marks are there
    peak = tl.max(top, 0)
    share = tl.exp(top - peak)
    row = tl.min(tl.where(top == peak, best, 2147483647), 0)  # of equals the first, as argmax has it
    z = tl.sum(total * share, 0)
    size = tl.sum(square * share, 0) / z
    return peak + tl.log(z), 1 / z, row, tl.sum(mean * share[:, None], 0) / z, size, tl.sum(marked, 0), passes
