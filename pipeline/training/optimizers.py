"""What turns gradients into weights: AdamW for all of a student, or Muon for the matrices of its blocks beside it.

Muon (K. Jordan, 2024) steps along the orthogonalised momentum of a matrix. torch scales the step to the size of one of
AdamW's (J. Liu et al., arXiv 2502.16982, sec. 2.2), so that one learning rate and one weight decay serve both. Its
Newton-Schulz iteration multiplies in bfloat16 whatever ``train.precision`` is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Muon, Optimizer

from pipeline.models.base import Student
from pipeline.numerics.compilation import layers
from pipeline.settings.train import TrainSettings

ADAMW, MUON = "optimizer", "muon"  # their names in a checkpoint


class Optimizers:
    """AdamW, and Muon beside it where the recipe says so; every parameter of the student belongs to one of them.

    Attributes:
        parts: torch's optimisers by the names that their states have in a checkpoint.
    """

    def __init__(self, student: Student, settings: TrainSettings) -> None:
        orthogonalised = blocks_matrices(student) if settings.optimizer == "muon" else []
        self.parts: dict[str, Optimizer] = {ADAMW: _adamw(student, settings, {id(p) for p in orthogonalised})}
        if orthogonalised:
            self.parts[MUON] = Muon(
                orthogonalised, lr=settings.lr, weight_decay=settings.weight_decay, adjust_lr_fn="match_rms_adamw"
            )

    @property
    def rate(self) -> float:
        """The learning rate of the next step."""
        return float(self.parts[ADAMW].param_groups[0]["lr"])

    @rate.setter
    def rate(self, value: float) -> None:
        for group in (group for part in self.parts.values() for group in part.param_groups):
            group["lr"] = value

    def step(self, keep_gradients: bool) -> None:
        """One step from the gradients at hand, which are zero afterwards, or gone unless ``keep_gradients``."""
        for name, part in self.parts.items():
            if name == MUON and torch.distributed.is_initialized():
                _step_together(part)
            else:
                part.step()
            part.zero_grad(set_to_none=not keep_gradients)

    def content(self) -> dict[str, Any]:
        """What a checkpoint holds of them: the states themselves, which the next step changes."""
        return {name: part.state_dict() for name, part in self.parts.items()}

    def take(self, content: dict[str, Any]) -> None:
        """Go on from the states of a checkpoint, whose tensors they keep."""
        for name, part in self.parts.items():
            part.load_state_dict(content[name])

    @torch.no_grad()
    def share(self, broadcast: Callable[[Any], Any]) -> Iterator[Tensor]:
        """Give every worker's state the form of rank 0's; yields the tensors that are to be filled with rank 0's.

        ``broadcast`` hands a value of rank 0's to all. What is a single number comes with the form.
        """
        for part in self.parts.values():
            parameters = [p for group in part.param_groups for p in group["params"]]
            form = broadcast({i: _form(part.state[p]) for i, p in enumerate(parameters) if part.state[p]})
            if torch.distributed.get_rank():
                state = {
                    i: {
                        name: torch.zeros_like(parameters[i]) if number is None else torch.tensor(number)
                        for name, number in names.items()
                    }
                    for i, names in form.items()
                }
                part.load_state_dict(part.state_dict() | {"state": state})
            for i, names in form.items():
                yield from (part.state[parameters[i]][name] for name, number in names.items() if number is None)


def _form(state: dict[str, Tensor]) -> dict[str, float | None]:
    """Of one parameter's state: the numbers, and None for what is as large as the parameter."""
    return {name: float(value) if value.ndim == 0 else None for name, value in state.items()}


def blocks_matrices(student: Student) -> list[Tensor]:
    """The weights [out, in] of all linear layers in the student's blocks."""
    return [m.weight for block in layers(student) for m in block.modules() if isinstance(m, nn.Linear)]


@torch.no_grad()
def _step_together(muon: Optimizer) -> None:
    """A step of all workers: each orthogonalises its share of the matrices, and hands them to the others.

    That iteration is most of Muon's work. The momenta are cheap, and every worker keeps all of them, as a checkpoint
    needs them. The gradients are equal on all workers, and so are the weights afterwards, bit for bit.
    """
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    (group,) = muon.param_groups
    shares = shared_out(group["params"], world)
    others = [p for owner, share in enumerate(shares) for p in share if owner != rank]
    gradients = [p.grad for p in others]
    for p in others:
        state = muon.state[p]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(p)
        state["momentum_buffer"].lerp_(p.grad, 1 - group["momentum"])  # as torch's step does it
        p.grad = None  # which makes Muon pass it over
    muon.step()
    for p, gradient in zip(others, gradients, strict=True):
        p.grad = gradient
    for owner, share in enumerate(shares):
        if share:
            flat = torch.cat([p.flatten() for p in share])
            torch.distributed.broadcast(flat, owner)
            for p, values in zip(share, flat.split([p.numel() for p in share]), strict=True):
                p.copy_(values.view_as(p))


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


def _adamw(student: Student, settings: TrainSettings, others: set[int]) -> AdamW:
    """AdamW that decays the matrices of linear layers and convolutions, not embeddings, positions and biases.

    It leaves ``others``, parameters by their id, alone.
    """
    matrices = {id(m.weight) for m in student.modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    own = [p for p in student.parameters() if id(p) not in others]
    groups = [
        {"params": [p for p in own if (id(p) in matrices) == decayed], "weight_decay": decay}
        for decayed, decay in ((True, settings.weight_decay), (False, 0.0))
    ]
    return AdamW(groups, lr=settings.lr, betas=settings.betas, fused=next(student.parameters()).is_cuda)
