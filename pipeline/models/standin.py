"""A teacher without a network: the shapes of a real one, codes that mean nothing, and a fixed time for every batch.

With it the pipeline around a teacher is run at full size on any machine (see ``scale``). There is no student: nothing
can be learnt from it.
"""

from __future__ import annotations

import time
import zlib
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from pipeline import storage
from pipeline.models import base, checkpoints
from pipeline.models.base import Choose, Layout
from pipeline.models.conditions import Condition, Prompts, labels_of
from pipeline.recipe import Recipe
from pipeline.settings.teacher import Filter, TeacherSettings
from pipeline.settings.text import TextSettings

FACTORS = (2654435761, 40503, 1 << 12)  # of the codes' formula: Knuth's hash, another odd number, the shift


@dataclass(frozen=True)
class Config:
    """The layout of the teacher that it stands for, and the seconds that a batch takes."""

    groups: tuple[int, ...]
    vocabulary: int
    code_dim: int
    classes: int
    image_size: int
    seconds: float = 0.0

    @property
    def caption(self) -> tuple[int, int] | None:
        """Where it has no classes it takes the prompts themselves."""
        return None if self.classes else (0, 0)

    @property
    def layout(self) -> Layout:
        return Layout(self.groups, self.vocabulary, self.code_dim, self.classes, self.image_size)


class Tokenizer(base.Tokenizer):
    """A codebook of zeros."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.layout = config.layout
        self.codes = nn.Parameter(torch.zeros(config.vocabulary, config.code_dim))

    @property
    def codebook(self) -> Tensor:
        return self.codes


class Teacher(base.Teacher):
    """Sleeps, then returns codes that depend on class or prompt and position alone; it asks ``choose`` nothing."""

    def __init__(self, config: Config, filters: Filter) -> None:
        super().__init__()
        self.layout, self.filter, self.seconds = config.layout, filters, config.seconds
        self.tokenizer, self.network = Tokenizer(config), nn.Linear(1, 1)

    def generate(
        self, condition: Condition, choose: Choose, prefix: Tensor | None = None, stop: int | None = None
    ) -> Tensor:
        """Codes int64 [B, n] that compress like drawn ones, after ``seconds``."""
        time.sleep(self.seconds)
        factor, odd, shift = FACTORS
        labels = _numbers(condition)
        place = torch.arange(self.layout.length, device=labels.device)
        return ((labels[:, None] * odd + place) * factor // shift) % self.layout.vocabulary


def of(recipe: Recipe, folder: str, seconds: float = 0.0) -> Recipe:
    """The recipe with a stand-in for its teacher, whose two small files are written into ``folder``."""
    layout = checkpoints.config(recipe.teacher).layout
    shape: dict[str, Any] = asdict(layout)
    settings = TeacherSettings(
        family=__name__,
        config=shape | {"seconds": seconds},
        tokenizer=storage.join(folder, "tokenizer.safetensors"),
        checkpoint=storage.join(folder, "teacher.safetensors"),
    )
    teacher = Teacher(checkpoints.config(settings), settings.filter)
    checkpoints.save(teacher.tokenizer, settings.tokenizer, {})
    checkpoints.save(teacher.network, settings.checkpoint, {})
    return replace(recipe, teacher=settings, text=TextSettings())


def _numbers(condition: Condition) -> Tensor:
    """A number of each sample's condition, int64 [B]."""
    if isinstance(condition, Prompts):
        return torch.tensor([zlib.crc32(text.encode()) for text in condition.texts])
    return labels_of(condition)
