"""What turns gradients into weights: AdamW for all of a student, or Muon for the matrices of its blocks beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from pipeline.models.base import Student
from pipeline.numerics.compilation import layers
from pipeline.settings.train import TrainSettings
from pipeline.training.muon import Muon

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
            dtype = torch.bfloat16 if settings.precision == "bf16" else torch.float32
            self.parts[MUON] = Muon(orthogonalised, settings.lr, settings.weight_decay, dtype)

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
        for part in self.parts.values():
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
