"""What an exported file computes: a student's one step and its decoder as a graph of tensors, and what goes in and out.

Out come the images twice: ``pixels`` uint8 [B, 3, H, W], those of ``Generator.draw``, and ``images`` float32 [B, 3, H,
W] in [0, 1], before they are rounded. B is the batch, n the tokens, C the dimension of a code, T the positions of a
prompt, D the width of its features. The text encoder is not in the graph.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pipeline.models.base import Layout, Student, Tokenizer
from pipeline.models.conditions import Captions, Condition, Labels
from pipeline.models.convnet import to_uint8

OUTPUTS = ("pixels", "images")
NOISE = (
    "independent draws from N(0, 1); pipeline.noise.gaussian(seed, [sample id], n, C), in float32, gives the image that"
    " Generator and the report have of that seed and sample id"
)


class DrawingGraph(nn.Module):
    """The student's jump from AR step 1, whose first ``split`` AR steps are codes, and its decoder."""

    def __init__(self, student: Student, tokenizer: Tokenizer, split: int) -> None:
        super().__init__()
        self.student, self.tokenizer, self.split = student, tokenizer, split
        self.layout: Layout = student.layout

    def drawn(self, noise: Tensor, condition: Condition) -> tuple[Tensor, Tensor]:
        """Noise float32 [B, n, C] -> pixels and images."""
        embeddings = self.student.jump(noise, noise, 1, condition, self.split)
        y = self.tokenizer.decode(embeddings).clamp(-1, 1)
        return to_uint8(y), (y + 1) / 2


class ClassGraph(DrawingGraph):
    """For a student of classes."""

    def forward(self, noise: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Noise [B, n, C] and labels int64 [B] -> pixels and images."""
        return self.drawn(noise, Labels(labels))


class PromptGraph(DrawingGraph):
    """For a student of prompts."""

    def forward(self, noise: Tensor, features: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Noise [B, n, C], right-padded features [B, T, D] and how many count, int64 [B] -> pixels and images."""
        return self.drawn(noise, Captions.from_encoder(features, lengths))


class FlatGraph(DrawingGraph):
    """For torch-fidelity, which knows flat noise alone: with classes, its last column says which.

    torch-fidelity can draw labels of its own, but its version 0.4.0 asks for numpy's ``np.int``, gone since 1.24.
    """

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """z float32 [B, n C + 1], all of it N(0, 1) -> pixels and images; every class is equally likely."""
        layout = self.layout
        noise = z[:, :-1].reshape(-1, layout.length, layout.code_dim)
        uniform = (1 + torch.erf(z[:, -1] * 0.5**0.5)) / 2
        labels = (uniform * layout.classes).long().clamp(0, layout.classes - 1)
        return self.drawn(noise, Labels(labels))


class Given(NamedTuple):
    """One input of a graph: an example of it, the names of its axes of any size, and what it is."""

    example: Tensor
    axes: dict[int, str]
    meaning: str


@dataclass(frozen=True)
class Interface:
    """A graph with its inputs by name, in their order.

    ``longest`` are the positions of the longest prompt, 0 for a student of classes.
    """

    graph: DrawingGraph
    inputs: dict[str, Given]
    longest: int = 0

    @property
    def examples(self) -> tuple[Tensor, ...]:
        return tuple(given.example for given in self.inputs.values())

    def described(self) -> dict[str, dict[str, dict[str, str]]]:
        """dtype, shape and meaning of every input and output, as text: what a file says of itself."""
        side = self.graph.layout.image_size
        return {
            "inputs": {name: _described(given) for name, given in self.inputs.items()},
            "outputs": {
                "pixels": {
                    "dtype": "uint8",
                    "shape": f"[batch, 3, {side}, {side}]",
                    "meaning": "RGB, floor(clamp(255 images + 0.5, 0, 255)): the pictures that Generator draws",
                },
                "images": {
                    "dtype": "float32",
                    "shape": f"[batch, 3, {side}, {side}]",
                    "meaning": "RGB from 0 to 1, the same before rounding",
                },
            },
        }


def of_classes(student: Student, tokenizer: Tokenizer, split: int) -> Interface:
    """noise [B, n, C] and labels [B]."""
    labels = Given(torch.arange(2) % student.layout.classes, {0: "batch"}, f"from 0 to {student.layout.classes - 1}")
    return Interface(ClassGraph(student, tokenizer, split), {"noise": _noise(student, 2), "labels": labels})


def of_prompts(student: Student, tokenizer: Tokenizer, split: int, caption: tuple[int, int]) -> Interface:
    """noise [B, n, C], features [B, T, D] and lengths [B]; ``caption`` are the largest T and D."""
    longest, width = caption
    # Example sizes differ, and none is 1 that may be another: the compiler would take the one for the other.
    count, positions = 3, min(2, longest)
    axes = {0: "batch", 1: "positions"} if longest > 1 else {0: "batch"}
    features = torch.randn(count, positions, width, generator=torch.Generator().manual_seed(1))
    meaning = f"last hidden states of the text encoder, from position 0 on; 1 to {longest} positions"
    inputs = {
        "noise": _noise(student, count),
        "features": Given(features, axes, meaning),
        "lengths": Given(torch.full((count,), positions), {0: "batch"}, "how many positions of features count, from 1"),
    }
    return Interface(PromptGraph(student, tokenizer, split), inputs, longest)


def for_torch_fidelity(student: Student, tokenizer: Tokenizer, split: int) -> Interface:
    """z [B, n C + 1]."""
    layout = student.layout
    z = torch.randn(2, layout.length * layout.code_dim + 1, generator=torch.Generator().manual_seed(0))
    meaning = (
        f"noise [batch, {layout.length}, {layout.code_dim}] row by row, then a column z whose"
        f" floor({layout.classes} Phi(z)) is the label; all of it independent draws from N(0, 1)"
    )
    return Interface(FlatGraph(student, tokenizer, split), {"z": Given(z, {0: "batch"}, meaning)})


def _noise(student: Student, count: int) -> Given:
    layout = student.layout
    example = torch.randn(count, layout.length, layout.code_dim, generator=torch.Generator().manual_seed(0))
    return Given(example, {0: "batch"}, NOISE)


def _described(given: Given) -> dict[str, str]:
    sizes = [given.axes.get(axis, str(size)) for axis, size in enumerate(given.example.shape)]
    dtype = str(given.example.dtype).removeprefix("torch.")
    return {"dtype": dtype, "shape": f"[{', '.join(sizes)}]", "meaning": given.meaning}
