"""What images are drawn for: classes or prompts, and the features of prompts that networks are given.

Noise, pairs, streams, samplers and statistics carry a ``Condition`` without looking inside. As a column of rows it is a
numpy array (``column``): int64 labels, or an object array of prompts. B is the batch, T the positions of a caption, D
the width of a feature.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

Conditioning = Callable[[Sequence[int] | np.ndarray], np.ndarray]
"""Sample ids [B] -> the column of their conditions [B]: a function of the id alone."""

Encode = Callable[["Condition"], "Condition"]
"""What samples are drawn for -> what a network is given, on its device: prompts become ``Captions``."""


class Condition(Protocol):
    """One thing to draw for every image of a batch."""

    def __len__(self) -> int: ...

    def to(self, device: torch.device | str) -> Condition:
        """A copy on ``device``."""
        ...

    def split(self, size: int) -> Sequence[Condition]:
        """In pieces of ``size``, the last one maybe smaller."""
        ...


@dataclass(frozen=True)
class Labels:
    """Classes: labels [B] int64."""

    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device | str) -> Labels:
        """A copy on ``device``."""
        return Labels(self.labels.to(device, non_blocking=True))

    def split(self, size: int) -> list[Labels]:
        """In pieces of ``size``, the last one maybe smaller."""
        return [Labels(labels) for labels in self.labels.split(size)]


@dataclass(frozen=True)
class Prompts:
    """Texts as their users wrote them; a text encoder turns them into ``Captions`` just before a network is called."""

    texts: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.texts)

    def to(self, device: torch.device | str) -> Prompts:
        """The prompts themselves: text lies on no device."""
        return self

    def split(self, size: int) -> list[Prompts]:
        """In pieces of ``size``, the last one maybe smaller."""
        return [Prompts(self.texts[start : start + size]) for start in range(0, len(self.texts), size)]


@dataclass(frozen=True)
class Captions:
    """Encoded prompts: features [B, T, D] float and which of the T positions they fill, bool [B, T].

    The features end at position T; before them stand zeros. T may be anything from the longest caption of the batch to
    the length that the network was made for: the answer is the same.
    """

    features: Tensor
    valid: Tensor

    @classmethod
    def from_encoder(cls, features: Tensor, lengths: Tensor) -> Captions:
        """Right-padded output of an encoder, [B, T, D], of which the first lengths [B] positions count."""
        positions = torch.arange(features.shape[1], device=features.device)
        valid = positions >= features.shape[1] - lengths[:, None]
        order = (positions + lengths[:, None]) % features.shape[1]
        shifted = features.gather(1, order[..., None].expand_as(features))
        return cls(shifted * valid[..., None], valid)

    def __len__(self) -> int:
        return len(self.features)

    def to(self, device: torch.device | str) -> Captions:
        """A copy on ``device``."""
        return Captions(self.features.to(device), self.valid.to(device))

    def split(self, size: int) -> list[Captions]:
        """In pieces of ``size``, the last one maybe smaller."""
        parts = zip(self.features.split(size), self.valid.split(size), strict=True)
        return [Captions(features, valid) for features, valid in parts]


def of_column(column: np.ndarray) -> Labels | Prompts:
    """The condition of a batch of rows: ``Labels`` of integers, ``Prompts`` of an object array of str."""
    if column.dtype == object:
        return Prompts(tuple(column))
    return Labels(torch.from_numpy(column))


def blank(count: int, caption: tuple[int, int] | None) -> Labels | Captions:
    """A condition of ``count`` samples without a meaning, for work that only looks at shapes.

    ``caption`` (T, D) are the positions and the width of the longest captions, None for a network that takes classes.
    """
    if caption is None:
        return Labels(torch.zeros(count, dtype=torch.long))
    return Captions(torch.zeros(count, *caption), torch.ones(count, caption[0], dtype=torch.bool))


def tensors_of(condition: Condition) -> tuple[Tensor, ...]:
    """The tensors that a condition is made of, so that ``type(condition)(*tensors)`` is the same; () of prompts."""
    values = tuple(getattr(condition, "__dict__", {}).values())
    return values if all(isinstance(value, Tensor) for value in values) else ()


def labels_of(condition: Condition) -> Tensor:
    """The labels [B] of a class condition; TypeError for another, which a recipe's checks keep away."""
    if not isinstance(condition, Labels):
        raise TypeError(f"this network draws classes and was given {type(condition).__name__}; give it Labels.")
    return condition.labels
