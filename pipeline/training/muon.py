"""Muon (K. Jordan, 2024): a matrix steps along its orthogonalised momentum. torch's, whose iteration suits the device.

torch scales a step to the size of one of AdamW's (J. Liu et al., arXiv 2502.16982, sec. 2.2), so that one learning rate
and one weight decay serve both. What differs here is the Newton-Schulz iteration, which is most of the work. torch
multiplies in bfloat16 everywhere; where a processor has no instructions for it that takes 15 times as long as float32
(0.90 against 0.058 s for the matrices of the digits' student, one core with AVX2), so ``dtype`` is the caller's. And
workers share the matrices out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Muon(torch.optim.Muon):
    """Muon with the iteration in a ``dtype``; its states, groups and checkpoints are torch's."""

    def __init__(self, matrices: list[Tensor], lr: float, weight_decay: float, dtype: torch.dtype) -> None:
        """``matrices`` [out, in] are in an order that all workers share."""
        super().__init__(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # nothing here evaluates a loss again
        """One step of all workers, whose gradients are equal, as their weights are afterwards, bit for bit.

        Each worker orthogonalises its share of the matrices and hands them to the others. The momenta are cheap, and
        every worker keeps all of them, as a checkpoint needs them.
        """
        workers = torch.distributed.is_initialized()
        rank, world = (torch.distributed.get_rank(), torch.distributed.get_world_size()) if workers else (0, 1)
        (group,) = self.param_groups
        shares = shared_out(group["params"], world)
        for owner, share in enumerate(shares):
            for matrix in share:
                self._follow(matrix, group["momentum"])
                if owner == rank:
                    self._move(matrix, group)
        for owner, share in enumerate(shares if world > 1 else []):
            if share:
                flat = torch.cat([matrix.flatten() for matrix in share])
                torch.distributed.broadcast(flat, owner)
                for matrix, values in zip(share, flat.split([m.numel() for m in share]), strict=True):
                    matrix.copy_(values.view_as(matrix))

    def _follow(self, matrix: Tensor, momentum: float) -> None:
        """The momentum of a matrix with its gradient in it."""
        state = self.state[matrix]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(matrix)
        state["momentum_buffer"].lerp_(matrix.grad, 1 - momentum)

    def _move(self, matrix: Tensor, group: dict[str, Any]) -> None:
        """A matrix along its orthogonalised momentum, in Nesterov's form, after its decay."""
        assert matrix.grad is not None
        ahead = matrix.grad.lerp(self.state[matrix]["momentum_buffer"], group["momentum"])
        matrix.mul_(1 - group["lr"] * group["weight_decay"])
        length = 0.2 * max(matrix.shape) ** 0.5  # by which its root mean square becomes that of a step of AdamW
        matrix.add_(self._orthogonalised(ahead, group), alpha=-group["lr"] * length)

    def _orthogonalised(self, matrix: Tensor, group: dict[str, Any]) -> Tensor:
        """A matrix [m, n] with the singular vectors of this one, and singular values from 0.5 to 1.5; in ``dtype``."""
        a, b, c = group["ns_coefficients"]
        wide = (matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T).to(self.dtype)
        wide = wide / wide.norm().clamp(min=group["eps"])
        for _ in range(group["ns_steps"]):
            gram = wide @ wide.T
            wide = torch.addmm(wide, torch.addmm(gram, gram, gram, beta=b, alpha=c), wide, beta=a)
        return wide if matrix.shape[0] <= matrix.shape[1] else wide.T


def shared_out(matrices: list[Tensor], workers: int) -> list[list[Tensor]]:
    """The matrices in as many shares, about equal in the products of a Newton-Schulz iteration; the largest first."""
    shares: list[list[Tensor]] = [[] for _ in range(workers)]
    work = [0] * workers
    for matrix in sorted(matrices, key=_products, reverse=True):  # stable, so that all workers agree
        least = work.index(min(work))
        shares[least].append(matrix)
        work[least] += _products(matrix)
    return shares


def _products(matrix: Tensor) -> int:
    """Multiplications of a round of the iteration on a matrix: two with its short side squared and its long one."""
    short, long = sorted(matrix.shape)
    return 2 * short * short * long + short**3
