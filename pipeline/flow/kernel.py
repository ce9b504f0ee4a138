"""flow.match's adaptive solver on a GPU, as one Triton kernel: a program follows one token from its noise to its code.

The same method as solvers.adaptive and posterior.OpenTokens, with symbols of matching.py. A program first writes down
the codes that its token can still become (its survivors: at the start those of p > 0) and then streams these alone, in
tiles: a softmax that keeps its running maximum needs one pass for the weights and their mean, so no [n, V] tensor of
weights exists. A code whose weight falls below exp(-CUT) of the best is struck off the list in the same pass. A token
is looked at after every evaluation, not after every other as in torch, and is done when it is decided.

All arithmetic is float32; no product is a `tl.dot`, which would round to TF32. Importing this module needs Triton.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pipeline.flow import posterior, solvers

CUT = 25.0  # what is struck off in one evaluation is less than V exp(-25), 2e-7 of the weight for 16,384 codes
# Numbers of the codebook and of log p that a program holds at once. Chosen by the registers that a thread then takes
# on an H100, 107 to 112, so that two programs share a multiprocessor; not timed yet.
TILE, LIST, WARPS = 2048, 1024, 8
SCRATCH_BYTES = 256 << 20  # lists of survivors of the tokens of one launch, 8 bytes a code


def solve(noise: Tensor, log_p: Tensor, codes: Tensor, tolerance: float, flags: Tensor) -> tuple[Tensor, Tensor]:
    """Codes int64 [N] and evaluations float32 [N] of noise [N, C], log_p [N, V] of any floating-point type.

    codes are the standardised codebook after `posterior.pad_columns`. flags int32 [3] are set, never cleared, where a
    token's noise is not finite, its log p is -inf for all codes, or holds NaN or +inf; such a token gets code 0 after
    no evaluation. Nothing here waits for the device.
    """
    (tokens, dimension), vocabulary, width = noise.shape, log_p.shape[1], codes.shape[1]
    noise = noise.float().contiguous()
    log_p = log_p if log_p.stride(1) == 1 else log_p.contiguous()
    device, whole = noise.device, triton.next_power_of_2(vocabulary)
    answer = torch.empty(tokens, dtype=torch.long, device=device)
    count = torch.empty(tokens, dtype=torch.float32, device=device)
    at_once = max(1, min(tokens, SCRATCH_BYTES // (8 * vocabulary)))
    places = torch.empty(at_once, vocabulary, dtype=torch.int32, device=device)
    levels = torch.empty(at_once, vocabulary, dtype=torch.float32, device=device)
    sizes = log_p.stride(0), vocabulary, dimension
    settings = tolerance, posterior.EXIT_WEIGHT, posterior.EXIT_GAIN, CUT, solvers.MAX_STEP, solvers.MAX_STEPS
    # Tiles depend on the codebook alone: which tokens share a call must not change the order of a sum.
    tiles = {"LIST": min(LIST, whole), "BLOCK": max(1, min(TILE // width, whole)), "WIDTH": width}
    for first in range(0, tokens, at_once):
        rows = slice(first, min(first + at_once, tokens))
        tensors = noise[rows], log_p[rows], codes, places, levels, answer[rows], count[rows], flags
        # Named, or Triton warns that its default will change: products and sums may become one rounding.
        options = {"num_warps": WARPS, "enable_fp_fusion": True}
        with torch.cuda.device_of(noise):  # Triton launches on the current device, whatever holds the tensors
            _follow[(rows.stop - rows.start,)](*tensors, *sizes, *settings, **tiles, **options)
    return answer, count


@triton.jit
def _survivors(log_p, places, levels, vocabulary, cut, LIST: tl.constexpr):
    """List the codes of p > 0 in the codebook's order: how many, log sum p, and whether NaN or +inf was met."""
    kept = tl.full((), 0, tl.int32)
    peak = tl.full((), float("-inf"), tl.float32)
    total = tl.zeros((LIST,), tl.float32)
    broken = tl.zeros((LIST,), tl.int32)
    for start in range(0, vocabulary, LIST):
        place = start + tl.arange(0, LIST)
        level = tl.load(log_p + place, mask=place < vocabulary, other=float("-inf")).to(tl.float32)
        broken = tl.where(level < float("inf"), broken, 1)  # NaN compares false
        above = tl.maximum(peak, tl.max(level, 0))
        base = tl.where(above == float("-inf"), 0.0, above)  # no code so far: -inf - -inf would be NaN
        total = total * tl.exp(peak - base) + tl.exp(level - base)
        alive = level > above - cut
        taken = alive.to(tl.int32)
        slot = kept + tl.cumsum(taken, 0) - 1
        tl.store(places + slot, place, mask=alive)
        tl.store(levels + slot, level, mask=alive)
        kept += tl.sum(taken, 0)
        peak = above
    tl.debug_barrier()  # what one thread wrote, others read
    return kept, peak + tl.log(tl.sum(total, 0)), tl.max(broken, 0)


@triton.jit
def _tile(codes, places, levels, start, kept, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """Of the survivors from `start`: their places in the codebook, log p and codes; beyond the last one p is 0."""
    slot = start + tl.arange(0, BLOCK)
    here = slot < kept
    place = tl.load(places + slot, mask=here, other=0)
    level = tl.load(levels + slot, mask=here, other=float("-inf"))
    column = tl.arange(0, WIDTH)
    code = tl.load(codes + place[:, None] * WIDTH + column[None, :], mask=here[:, None], other=0.0)
    return slot, place, level, code


@triton.jit
def _prior(codes, places, levels, kept, log_total, noise, dimension, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """posterior.prior with margin 2.75, in one pass: the mean code, the slope Cov_p(c) noise and S."""
    mean = tl.zeros((BLOCK, WIDTH), tl.float32)
    turned = tl.zeros((BLOCK, WIDTH), tl.float32)
    square = tl.zeros((BLOCK,), tl.float32)
    entropy = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, kept, BLOCK):
        _slot, _place, level, code = _tile(codes, places, levels, start, kept, BLOCK, WIDTH)
        level = level - log_total
        p = tl.exp(level)
        mean += p[:, None] * code
        turned += (p * tl.sum(code * noise[None, :], 1))[:, None] * code
        square += p * tl.sum(code * code, 1)
        entropy -= p * tl.maximum(level, -1e4)  # 0 log 0 = 0
    value = tl.sum(mean, 0)
    slope = tl.sum(turned, 0) - value * tl.sum(value * noise, 0)
    variance = (tl.sum(square, 0) - tl.sum(value * value, 0)) / dimension
    nats = 2 * tl.sum(entropy, 0) + 2.75 * tl.sqrt(2.0 * dimension)
    return value, slope, tl.sqrt((tl.exp(nats / dimension) - 1) / tl.maximum(variance, 1e-12))


@triton.jit
def _evaluate(codes, places, levels, kept, log_total, y, u, cut, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """The best weight, its code, D at (y, u), and how many survivors are left; the list is shortened in place."""
    query = u * y
    bend = u * u / 2
    left = tl.full((), 0, tl.int32)
    peak = tl.full((), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    mean = tl.zeros((BLOCK, WIDTH), tl.float32)
    top = tl.full((BLOCK,), float("-inf"), tl.float32)
    best = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, kept, BLOCK):
        slot, place, level, code = _tile(codes, places, levels, start, kept, BLOCK, WIDTH)
        logit = level - log_total + tl.sum(code * (query[None, :] - bend * code), 1)
        above = tl.maximum(peak, tl.max(logit, 0))
        weight = tl.exp(logit - above)
        shrink = tl.exp(peak - above)
        total = total * shrink + weight
        mean = mean * shrink + weight[:, None] * code
        best = tl.where(logit > top, place, best)
        top = tl.maximum(top, logit)
        alive = logit > above - cut
        taken = alive.to(tl.int32)
        target = left + tl.cumsum(taken, 0) - 1  # never beyond the tile that was read
        tl.debug_barrier()  # all threads have read the tile before any of it is overwritten
        moved = alive & (target < slot)
        tl.store(places + target, place, mask=moved)
        tl.store(levels + target, level, mask=moved)
        left += tl.sum(taken, 0)
        peak = above
    tl.debug_barrier()
    share = 1 / tl.sum(total, 0)
    code_of_best = tl.min(tl.where(top == peak, best, 2147483647), 0)  # of equals the first, as argmax has it
    return share, code_of_best, tl.sum(mean, 0) * share, left


@triton.jit
def _norm(x):
    return tl.sqrt(tl.sum(x * x, 0))


@triton.jit
def _flag(flags, lost, kept, broken):
    """Say what is wrong with a token; every program that sets a flag writes the same 1."""
    tl.store(flags, 1, mask=lost != 0)
    tl.store(flags + 1, 1, mask=(kept == 0) & (broken == 0))
    tl.store(flags + 2, 1, mask=broken != 0)


# fmt: off
@triton.jit(do_not_specialize=["dimension", "steps"])
def _follow(
    noise, log_p, codes, places, levels, answer, count, flags,  # tensors
    stride, vocabulary, dimension,
    tolerance, exit_weight, exit_gain, cut, max_step, steps,
    LIST: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
):
    # fmt: on
    """``solvers.adaptive`` for the token of this program; names and formulas are that function's."""
    row = tl.program_id(0).to(tl.int64)  # row V passes 2^31
    log_p += row * stride
    places += row * vocabulary
    levels += row * vocabulary
    column = tl.arange(0, WIDTH)
    y = tl.load(noise + row * dimension + column, mask=column < dimension, other=0.0)
    kept, log_total, broken = _survivors(log_p, places, levels, vocabulary, cut, LIST)
    lost = tl.max(tl.where(tl.abs(y) < float("inf"), 0, 1), 0)
    _flag(flags, lost, kept, broken)
    kept = tl.where((lost != 0) | (broken != 0), 0, kept)

    value, slope, scale = _prior(codes, places, levels, kept, log_total, y, dimension, BLOCK, WIDTH)
    root = tl.sqrt(1.0 * dimension)
    quarter = tl.sqrt(tl.sqrt(tolerance))
    first = 0.12 * 5.623413 * quarter / tl.sqrt(tl.maximum(_norm(slope) / root, 1e-12))  # 1e-3^(-1/4)
    h = tl.minimum(first, scale / 2)
    u = 0 * h
    a = 0 * h + 1
    c = 0 * h
    line = h * slope
    bend = 0 * slope
    aim = 0.9 * quarter * tl.sqrt(tl.sqrt(12 * root))
    step = tl.full((), 0, tl.int32)
    spent = tl.full((), 0.0, tl.float32)
    best = tl.full((), 0, tl.int32)
    going = kept > 0
    while going:
        y += h * (value + line / 2 + (3 - a) * bend / 6)
        u += h
        share, best, latest, kept = _evaluate(codes, places, levels, kept, log_total, y, u, cut, BLOCK, WIDTH)
        best = tl.minimum(best, vocabulary - 1)  # whatever overflowed, a code of the codebook
        p = tl.exp(tl.load(log_p + best, mask=share > exit_weight, other=float("-inf")).to(tl.float32) - log_total)
        decided = (share > exit_weight) & (share + (exit_gain - 1) * share * p >= exit_gain * p)
        spent = tl.where(step < steps, step + 2.5, step + 1.5)
        going = (step < steps) & (decided == 0)
        change = latest - value
        turn = change - line
        defect = turn - bend
        weight = h * ((2 - a) * (2 - c) + 2)
        y += weight * defect / 12
        growth = aim / tl.sqrt(tl.sqrt(tl.maximum(weight * _norm(defect), 1e-30)))
        growth = tl.minimum(tl.minimum(tl.maximum(growth, 0.25), 2.5), max_step / h)
        ga = growth * a
        value = latest
        line = growth * change
        bend = ga * (growth + 1) * turn
        a = growth / (growth + 1)
        c = ga / (ga + 1)
        step += 1
        h = tl.where(step < steps, growth * h, 0.0)  # the last evaluation, undecided after all, reads off where it is
    tl.store(answer + row, best.to(tl.int64))
    tl.store(count + row, spent)
