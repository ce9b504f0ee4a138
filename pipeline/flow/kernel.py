"""flow.match's adaptive solver on a GPU, as one Triton kernel: a program follows one token from its noise to its code.

The same method as solvers.adaptive and posterior.OpenTokens, with symbols of matching.py; passes.py streams the codes
that the token can still become, its survivors. The time of a token is that of its passes, the turns of the loops there,
which come one after the other: docs/speed.md counts them.

Who survives follows from a threshold that is known before the pass. Z is the sum of the weights before they are
normalised, e_j their exponents. Log-sum-exp is convex, so its tangent at the last evaluation lies below it at the next:

    log Z' >= log Z + sum_j w_j (e'_j - e_j) = log Z + <u' y' - u y, D> - (u'^2 - u^2) / 2 sum_j w_j |c_j|^2.

Of n codes those whose weights are below LOST / n of this bound have together less than LOST of the weight, which is as
much as float32 rounds. A token is looked at after every evaluation, not after every other as in torch, and is done when
it is decided.

All arithmetic is float32; no product is a `tl.dot`, which would round to TF32. Importing this module needs Triton.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from pipeline.flow import posterior, solvers
from pipeline.flow.passes import COPIED, LISTED, WHOLE, evaluate, prior, shorten, survey

LOST = 2e-7  # of the weight that may be struck off with one list; of 16,384 codes each is 25 nats below Z
# A tile is PARTS times PART numbers of the codebook. Chosen by the registers of a thread on an H100, 241 to 254 without
# a spill, so that one program has a multiprocessor for itself; with 128, for two, half of this tile spills. LIST codes
# are surveyed or listed at once. Not timed yet.
PART, PARTS, LIST, WARPS = 2048, 8, 4096, 8
PER_PROCESSOR = 4  # programs for each multiprocessor, which takes them as it comes to them; each has scratch memory


def solve(noise: Tensor, log_p: Tensor, codes: Tensor, tolerance: float, flags: Tensor) -> tuple[Tensor, Tensor]:
    """Codes int64 [N] and evaluations float32 [N] of noise [N, C], log_p [N, V] of any floating-point type.

    codes are the standardised codebook after `posterior.pad_columns`. flags int32 [3] are set, never cleared, where a
    token's noise is not finite, its log p is -inf for all codes, or holds NaN or +inf; such a token gets code 0 after
    no evaluation. Nothing here waits for the device.
    """
    return solve_counted(noise, log_p, codes, tolerance, flags)[:2]


def solve_counted(
    noise: Tensor, log_p: Tensor, codes: Tensor, tolerance: float, flags: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """`solve`, and the passes that each token took, int32 [N]; arguments as there.

    Scratch memory, for each program: 5 V bytes for the list and the marks, V / 2 times 4 (C + 1) for copied codes; of
    16,384 codes of 8 numbers 370 KB, of 4,096 of 32 280 KB. Other types of log p are converted first, as a whole.
    """
    (tokens, dimension), (vocabulary, width) = noise.shape, codes.shape
    device, whole = noise.device, triton.next_power_of_2(vocabulary)
    log_p = log_p.float()
    log_p = log_p if log_p.stride(1) == 1 else log_p.contiguous()
    answer = torch.empty(tokens, dtype=torch.long, device=device)
    count = torch.empty(tokens, dtype=torch.float32, device=device)
    passes = torch.empty(tokens, dtype=torch.int32, device=device)
    programs = min(tokens, at_once(device))
    capacity = 16 * triton.cdiv(vocabulary, 32)
    places = torch.empty(programs, 16 * triton.cdiv(vocabulary, 16), dtype=torch.int32, device=device)
    marks = torch.empty(places.shape, dtype=torch.int8, device=device)
    # Half of the codebook; addresses stay multiples of 16 bytes, as wide loads need them.
    levels = torch.empty(programs, capacity, dtype=torch.float32, device=device)
    copies = torch.empty(programs, capacity, width, dtype=torch.float32, device=device)
    tensors = noise.float().contiguous(), log_p, codes, places, marks, levels, copies, answer, count, passes, flags
    sizes = tokens, log_p.stride(0), vocabulary, places.shape[1], capacity, dimension
    lost = math.log(LOST) if LOST else -math.inf
    settings = tolerance, posterior.EXIT_WEIGHT, posterior.EXIT_GAIN, lost, solvers.MAX_STEP, solvers.MAX_STEPS
    # Tiles depend on the codebook alone: which tokens share a call must not change the order of a sum.
    part = max(1, min(PART // width, whole))
    tiles = {"LIST": min(LIST, whole), "ROWS": part, "PARTS": max(1, min(PARTS, whole // part)), "WIDTH": width}
    # Named, or Triton warns that its default will change: products and sums may become one rounding.
    options = {"num_warps": WARPS, "enable_fp_fusion": True}
    if tokens:
        with torch.cuda.device_of(noise):  # Triton launches on the current device, whatever holds the tensors
            _follow[(programs,)](*tensors, *sizes, *settings, **tiles, **options)
    return answer, count, passes


def at_once(device: torch.device) -> int:
    """How many programs share the tokens of a call; each follows its own one after the other."""
    if device.type != "cuda":
        return 2  # Triton's interpreter
    return PER_PROCESSOR * torch.cuda.get_device_properties(device).multi_processor_count


@triton.jit
def _norm(x):
    return tl.sqrt(tl.sum(x * x, 0))


@triton.jit
def _correct(y, h, value, latest, line, bend, a, c, aim, max_step):
    """The corrector, the next step over this one, and the terms of the parabola over it."""
    change = latest - value
    turn = change - line
    defect = turn - bend
    weight = h * ((2 - a) * (2 - c) + 2)
    growth = aim / tl.sqrt(tl.sqrt(tl.maximum(weight * _norm(defect), 1e-30)))
    growth = tl.minimum(tl.minimum(tl.maximum(growth, 0.25), 2.5), max_step / h)
    ga = growth * a
    y += weight * defect / 12
    return y, growth, growth * change, ga * (growth + 1) * turn, growth / (growth + 1), ga / (ga + 1)


@triton.jit
def _inner(query, half, value, size):
    """sum_j w_j e_j but for log p, of exponents <query, c_j> - half |c_j|^2."""
    return tl.sum(query * value, 0) - half * size


@triton.jit
def _flag(flags, far, kept, broken):
    """Say what is wrong with a token; every program that sets a flag writes the same 1."""
    tl.store(flags, 1, mask=far != 0)
    tl.store(flags + 1, 1, mask=(kept == 0) & (broken == 0))
    tl.store(flags + 2, 1, mask=broken != 0)


@triton.jit
def _shorter(left, kept, form, capacity, slots, tile):
    """Whether a new list is worth it: a quarter goes and passes with it, or three quarters of what a pass reads."""
    passes = (4 * left <= 3 * kept) & (tl.cdiv(left, tile) < tl.cdiv(kept, tile))
    reads = (4 * left <= kept) & (kept > slots)
    return (left > 0) & (passes | reads) & ((form != WHOLE) | (left <= capacity))


# fmt: off
@triton.jit
def _token(
    noise, memory, flags, vocabulary, capacity, dimension, settings,
    LIST: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):
    # fmt: on
    """``solvers.adaptive`` for one token, names and formulas of that function: code, evaluations and passes."""
    log_p, _codes, places, _marks, levels, _copies = memory
    tolerance, exit_weight, exit_gain, lost, max_step, steps = settings
    column = tl.arange(0, WIDTH)
    y = tl.load(noise + column, mask=column < dimension, other=0.0)
    kept, log_total, broken, passes = survey(log_p, places, vocabulary, LIST)
    far = tl.max(tl.where(tl.abs(y) < float("inf"), 0, 1), 0)
    _flag(flags, far, kept, broken)
    going = (kept > 0) & (far == 0) & (broken == 0)
    form = tl.where(kept > capacity, WHOLE, LISTED)
    kept = tl.where(going, tl.where(kept > capacity, vocabulary, kept), 0)

    value, slope, scale, size, made = prior(memory, kept, form, log_total, y, dimension, PARTS, ROWS, WIDTH)
    passes += made
    form = tl.where(form == LISTED, COPIED, form)
    root, quarter = tl.sqrt(1.0 * dimension), tl.sqrt(tl.sqrt(tolerance))
    first = 0.12 * 5.623413 * quarter / tl.sqrt(tl.maximum(_norm(slope) / root, 1e-12))  # 1e-3^(-1/4)
    h = tl.minimum(first, scale / 2)
    u, a, c = 0 * h, 0 * h + 1, 0 * h
    line, bend = h * slope, 0 * slope
    aim = 0.9 * quarter * tl.sqrt(tl.sqrt(12 * root))
    log_z, query, half = 0 * h, 0 * y, 0 * h  # of the last evaluation with D and `size`, at first of the prior
    step, best, spent = tl.full((), 0, tl.int32), tl.full((), 0, tl.int32), tl.full((), 0.0, tl.float32)
    while going:
        y += h * (value + line / 2 + (3 - a) * bend / 6)
        u += h
        before = log_z - _inner(query, half, value, size)
        query, half = u * y, u * u / 2
        threshold = before + _inner(query, half, value, size) + lost - tl.log(1.0 * kept)
        threshold -= 1e-5 * (tl.abs(tl.sum(query * value, 0)) + half * size)  # more than rounding moves it
        if kept > ROWS:
            log_z, share, best, latest, size, left, made = evaluate(
                memory, kept, form, log_total, query, half, threshold, PARTS, ROWS, WIDTH
            )
        else:  # the last codes need no whole tile
            log_z, share, best, latest, size, left, made = evaluate(
                memory, kept, form, log_total, query, half, threshold, 1, ROWS, WIDTH
            )
        passes += made
        form = tl.where(form == LISTED, COPIED, form)
        best = tl.maximum(tl.minimum(best, kept - 1), 0)  # whatever overflowed, a row
        p = tl.exp(tl.load(tl.where(form == COPIED, levels, log_p) + best) - log_total)
        decided = (share > exit_weight) & (share + (exit_gain - 1) * share * p >= exit_gain * p)
        spent = tl.where(step < steps, step + 2.5, step + 1.5)
        going = (step < steps) & (decided == 0)
        y, growth, line, bend, a, c = _correct(y, h, value, latest, line, bend, a, c, aim, max_step)
        value = latest
        step += 1
        h = tl.where(step < steps, growth * h, 0.0)  # the last evaluation, undecided after all, reads off where it is
        if going & _shorter(left, kept, form, capacity, ROWS, PARTS * ROWS):
            kept, made = shorten(memory, kept, form, LIST)
            passes += made
            form = form * 0 + LISTED
    place = tl.load(places + best, mask=(form != WHOLE) & (kept > 0), other=0)
    return tl.where(form == WHOLE, best, place).to(tl.int64), spent, passes


# fmt: off
@triton.jit(do_not_specialize=["tokens", "dimension", "steps"])
def _follow(
    noise, log_p, codes, places, marks, levels, copies, answer, count, passes, flags,  # tensors
    tokens, stride, vocabulary, listed, capacity, dimension,
    tolerance, exit_weight, exit_gain, lost, max_step, steps,
    LIST: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):
    # fmt: on
    """The tokens of this program, one after the other in the same scratch memory."""
    program = tl.program_id(0).to(tl.int64)  # row V passes 2^31
    places += program * listed
    marks += program * listed
    levels += program * capacity
    copies += program * capacity * WIDTH
    settings = tolerance, exit_weight, exit_gain, lost, max_step, steps
    row = program
    while row < tokens:
        memory = log_p + row * stride, codes, places, marks, levels, copies
        best, spent, made = _token(
            noise + row * dimension, memory, flags, vocabulary, capacity, dimension, settings, LIST, PARTS, ROWS, WIDTH
        )
        tl.store(answer + row, best)
        tl.store(count + row, spent)
        tl.store(passes + row, made)
        tl.debug_barrier()  # all threads are done with the memory
        row += tl.num_programs(0)
