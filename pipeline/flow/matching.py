"""AR flow matching's map q = FM(noise, p): the code that a token's noise flows to (paper Eq. 2-4, Alg. 1).

The source is N(0, I), the target sum_j p_j delta(c_j) over the codebook, the path x_t = (1 - t) noise + t code.
In u = t / (1 - t) and y = x_t / (1 - t), where du = dt / (1 - t)^2 and dy = dx / (1 - t) + x dt / (1 - t)^2, the
flow-matching ODE dx/dt = V(x, t) = (D - x) / (1 - t) of Eq. 3 becomes

    dy/du = D(y, u) = sum_j w_j c_j,   w = softmax_j(log p_j + u <y, c_j> - u^2 |c_j|^2 / 2),   y(0) = noise.

because dy/du = (1 - t) V + x = D, and Eq. 3's exponent -|x - t c_j|^2 / (2 (1 - t)^2) is -|y - u c_j|^2 / 2.
Nothing is singular at t = 0, nothing is divided by 1 - t, and as u grows one weight wins: its code is the answer,
so a code with p_j = 0 never is. The map ignores the codebook's position and scale (a scale a is u -> a u).

Knows no teacher, file or random generator: tensors in, tensors out, on the device they are on.
"""

import math
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Annotated, Literal

import torch
from torch import Tensor

from pipeline.configuration import fields
from pipeline.configuration.fields import Range
from pipeline.flow.posterior import OpenTokens, augment, pad_columns, portions, standardise
from pipeline.flow.solvers import GRIDS, adaptive, fixed, paper
from pipeline.host.errors import Refused
from pipeline.numerics.precision import full_precision


@dataclass(frozen=True)
class Solver:
    """How the ODE is integrated; in brackets the wrong codes in per cent for codebooks like VAR's / LlamaGen's.

    Attributes:
        name: adaptive lets each token choose its steps by ``tolerance``, safe for any codebook (1e-3: 0.07 / 0.05);
            fixed takes ``evaluations`` nodes on a tuned grid, less exact where codes nearly coincide (10: 0.12 / 0.43);
            paper is DPM-Solver++ with ``evaluations`` steps, as the paper sets it (10: 3.5 / 6.8).
        evaluations: how often the fixed and the paper's solver ask for D(y, u), for each token.
        tolerance: the error that a step of the adaptive solver may make.
    """

    name: Literal["adaptive", "fixed", "paper"] = "adaptive"
    evaluations: Annotated[int, Range(1, 10_000, "1 or more, and at most 10,000")] = 10
    tolerance: Annotated[float, Range(1e-6, 0.1, "between 1e-6 and 0.1, in float32")] = 1e-3

    def __post_init__(self) -> None:
        fields.check(self, "pairs.solver")
        if self.name == "fixed" and self.evaluations not in GRIDS:
            choices = ", ".join(map(str, GRIDS))
            raise Refused(
                f"pairs.solver.evaluations is {self.evaluations}; for the fixed solver choose one of {choices}."
            )


ADAPTIVE = Solver()


def posterior_mean(log_p: Tensor, x: Tensor, t: float, codebook: Tensor) -> Tensor:
    """E[c | x_t = x] under Eq. 3's weights, w_j ~ p_j exp(-|x - t c_j|^2 / (2 (1 - t)^2)): [..., C].

    The printed equation lacks the exponent's minus sign and its half. log_p [..., V], x [..., C], codebook [V, C];
    float64 if x is, otherwise float32. Raises ValueError unless 0 <= t < 1 and the tensors are as `match` wants.
    """
    if not 0 <= t < 1:
        raise ValueError(f"t is {t}; the posterior exists for 0 <= t < 1")
    check(x, log_p, codebook)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    with full_precision(x.device):
        tokens = OpenTokens(log_p.reshape(-1, len(codebook)).to(dtype), augment(codebook.to(dtype)))
        y = x.reshape(-1, x.shape[-1]).to(dtype) / (1 - t)
        return tokens.evaluate(y, y.new_full((len(y), 1), t / (1 - t)))[1].reshape(x.shape)


def velocity(log_p: Tensor, x: Tensor, t: float, codebook: Tensor) -> Tensor:
    """V(x, t) = (E[c | x_t = x] - x) / (1 - t), Eq. 3; arguments and errors as for `posterior_mean`."""
    return (posterior_mean(log_p, x, t, codebook) - x) / (1 - t)


def match(noise: Tensor, log_p: Tensor, codebook: Tensor, solver: Solver = ADAPTIVE) -> Tensor:
    """The code that each token's noise flows to (Eq. 4): noise [..., C], log_p [..., V], codebook [V, C] -> [...].

    log_p are log-probabilities after guidance, temperature and filter: -inf where p is 0, normalised or not. Solved
    in full float32 whatever the types and global settings; which tokens share a call makes no difference. Returns
    int64; raises ValueError for other shapes or types, NaN, and a token without any p > 0. In a loop use `Matcher`.
    """
    return match_counted(noise, log_p, codebook, solver)[0]


def match_counted(noise: Tensor, log_p: Tensor, codebook: Tensor, solver: Solver = ADAPTIVE) -> tuple[Tensor, Tensor]:
    """`match`, and how many evaluations of D each token took: int64 [...], float32 [...]."""
    matcher = Matcher(codebook, solver)
    result = matcher.counted(noise, log_p)
    matcher.check()
    return result


class Matcher:
    """`match` for all AR steps of a generation: the codebook is prepared once, and on a GPU no step waits for another.

    Where `has_kernel` says so, a step is one launch of ``kernel``'s; elsewhere it is torch, which asks the
    device now and then how many tokens are open. Both follow the same method, in float32, but add in another order,
    and a token that lies on the border of two codes may go to either: no code in 1,000 or fewer. A token with numbers
    that `match` refuses is refused at once by torch, while the kernel gives it code 0 and goes on until `check`.
    """

    @torch.no_grad()
    def __init__(self, codebook: Tensor, solver: Solver = ADAPTIVE) -> None:
        """codebook [V, C] of any floating-point type; ValueError unless it is one and finite."""
        check_codebook(codebook)
        self.shape, self.solver, self.kernel = codebook.shape, solver, has_kernel(codebook, solver)
        with full_precision(codebook.device):
            # The paper's grid in t is not free of scale and position, so it gets the codebook as it is.
            codes = codebook.float() if solver.name == "paper" else standardise(codebook.float())
        self.codes, self.padded = augment(codes), pad_columns(codes) if self.kernel else codes
        self.flags = torch.zeros(len(REFUSED), dtype=torch.int32, device=codebook.device)

    def __call__(self, noise: Tensor, log_p: Tensor) -> Tensor:
        """Codes int64 [...] of noise [..., C], log_p [..., V]; ValueError for other shapes and types, see `check`."""
        return self.counted(noise, log_p)[0]

    @torch.no_grad()
    def counted(self, noise: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
        """Codes int64 [...] and evaluations of D float32 [...]; arguments and errors as for a call."""
        check_shapes(noise, log_p, self.shape)
        shape, noise, log_p = noise.shape[:-1], noise.reshape(-1, self.shape[1]), log_p.reshape(-1, self.shape[0])
        if self.kernel:
            from pipeline.flow.kernel import solve  # not on every machine

            codes, counts = solve(noise, log_p, self.padded, self.solver.tolerance, self.flags)
        else:
            check_numbers(noise, log_p)
            codes, counts = self._solve(noise, log_p)
        return codes.view(shape), counts.view(shape)

    def check(self) -> None:
        """ValueError if a call so far met numbers that `match` refuses; waits for the device. Once per generation."""
        if self.kernel:
            for message, met in zip(REFUSED, self.flags.tolist(), strict=True):
                if met:
                    raise ValueError(message)

    def _solve(self, noise: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
        """In torch: noise [N, C], log_p [N, V] -> codes [N], evaluations [N]."""
        codes, counts = noise.new_empty(len(noise), dtype=torch.long), noise.new_empty(len(noise), dtype=torch.float32)
        # A step of few tokens is many small operations, which take less time in inference mode; the results are made
        # outside of it.
        with full_precision(noise.device), torch.inference_mode():
            for rows, width in portions(log_p, self.shape[1]):
                tokens = OpenTokens(log_p.index_select(0, rows).float(), self.codes, width)
                start = noise.index_select(0, rows).float()
                if self.solver.name == "adaptive":
                    adaptive(tokens, start, self.solver.tolerance)
                elif self.solver.name == "fixed":
                    fixed(tokens, start, self.solver.evaluations)
                else:
                    paper(tokens, start, self.solver.evaluations)
                codes[rows], counts[rows] = tokens.answer, tokens.count
        return codes, counts


def has_kernel(codebook: Tensor, solver: Solver) -> bool:
    """Whether `Matcher` uses the kernel: the adaptive solver, on a GPU, C <= 64, and what Triton needs is there.

    That is Triton itself, which torch brings along on Linux only, and the C compiler that builds its launchers.
    """
    if solver.name != "adaptive" or codebook.device.type != "cuda" or codebook.shape[1] > 64:
        return False
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    return bool(compiler) and find_spec("triton") is not None


REFUSED = (  # in the order of the kernel's flags
    "noise holds NaN or infinity; pass finite numbers",
    "log_p is -inf for all codes of a token; the filter must leave at least one",
    "log_p holds NaN or +inf; pass log-probabilities, -inf where p is 0",
)


def check(noise: Tensor, log_p: Tensor, codebook: Tensor) -> None:
    """ValueError, one sentence, unless shapes and types fit, numbers are finite and every token has a code."""
    check_codebook(codebook)
    check_shapes(noise, log_p, codebook.shape)
    check_numbers(noise, log_p)


def check_codebook(codebook: Tensor) -> None:
    """ValueError unless this is [V, C] of finite floating-point numbers."""
    if codebook.dim() != 2 or 0 in codebook.shape:
        raise ValueError(f"codebook has shape {tuple(codebook.shape)}; pass V codes of C dimensions as [V, C]")
    if not codebook.is_floating_point():
        raise ValueError(f"codebook is {codebook.dtype}; pass floating-point numbers")
    if not codebook.isfinite().all():
        raise ValueError("codebook holds NaN or infinity; pass finite numbers")


def check_shapes(noise: Tensor, log_p: Tensor, codebook: Sequence[int]) -> None:
    """ValueError unless noise [..., C] and log_p [..., V] fit a codebook of this shape and are floating-point."""
    (codes, dimension), leading = codebook, noise.shape[:-1]
    if noise.shape != (*leading, dimension) or log_p.shape != (*leading, codes):
        raise ValueError(
            f"noise has shape {tuple(noise.shape)} and log_p {tuple(log_p.shape)}; with a codebook "
            f"{[codes, dimension]} pass [..., {dimension}] and [..., {codes}] with equal leading dimensions"
        )
    for name, tensor in {"noise": noise, "log_p": log_p}.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{name} is {tensor.dtype}; pass floating-point numbers")


def check_numbers(noise: Tensor, log_p: Tensor) -> None:
    """ValueError unless the noise is finite and every token has a code, without NaN or +inf."""
    best = log_p.amax(-1)  # NaN where a row holds one, -inf where it holds nothing else
    if bool(best.isfinite().all() & noise.isfinite().all()):
        return  # one answer from the device; the questions below are for the message
    if not noise.isfinite().all():
        raise ValueError(REFUSED[0])
    raise ValueError(REFUSED[1 if (best == -math.inf).any() else 2])
