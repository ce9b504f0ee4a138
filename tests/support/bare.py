"""A family that provides what the three jobs ask for and no more: its tokenizer comes as a file or not at all.

Importable in Ray's workers, whom ``conftest`` gives this folder.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.models import base, llamagen
from pipeline.models.convnet import to_map
from pipeline.models.llamagen import Config, Student
from pipeline.settings.teacher import Filter

__all__ = ["Config", "Student", "Teacher", "Tokenizer"]


class Tokenizer(base.Tokenizer):
    """A linear layer from every code to its patch of the image."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.layout = config.layout
        self.patch = self.layout.image_size // config.side
        self.codes = nn.Embedding(config.vocabulary, config.code_dim)
        self.painted = nn.Linear(config.code_dim, 3 * self.patch**2)

    @property
    def codebook(self) -> Tensor:
        return self.codes.weight

    def decode(self, embeddings: Tensor) -> Tensor:
        return F.pixel_shuffle(to_map(self.painted(embeddings)), self.patch)


class Teacher(llamagen.Teacher):
    def __init__(self, config: Config, filter: Filter) -> None:
        super().__init__(config, filter)
        self.tokenizer = Tokenizer(config)
