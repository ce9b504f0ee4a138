"""Samples of many requests through the network together: each gives the same image in whatever company.

Products of other shapes may be summed up in another order, so that an image changes in its last bits with the size of
its batch. A batch is therefore filled up to one of a few sizes: the full one, and those that were seen to give the same
bits as it on this device. On a CPU an image then has the same bits in every row, too.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.generator.folder import Description
from pipeline.generator.generator import BATCH, Generator, checked
from pipeline.host.errors import Refused
from pipeline.models.base import Layout
from pipeline.models.convnet import to_uint8
from pipeline.sampling.samplers import FewStep, FlowMatched
from pipeline.serving.orders import Sample

PARTS = 8  # of a full batch: the sizes that are tried are its eighths


@dataclass(frozen=True)
class Drawn:
    """An image, uint8 [3, H, W], and what it took.

    Attributes:
        milliseconds: of the batch that it was drawn in, from the noise to the pixels.
        company: images of that batch that somebody wanted, this one among them; the others filled it up.
        size: of that batch, all images together.
    """

    pixels: np.ndarray
    milliseconds: float
    company: int
    size: int


class Painter:
    """A student, or the teacher that is loaded beside it, which draws batches of ``batch`` images, 64 at most.

    Attributes:
        sizes: of the batches that go through the network, rising; the last is ``batch``.
    """

    def __init__(self, generator: Generator, batch: int, teacher: bool = False) -> None:
        if not 1 <= batch <= BATCH:
            raise Refused(f"--batch is {batch}; it must be from 1 to {BATCH}.")
        self.generator, self.batch, self.teacher = generator, batch, teacher
        self.sizes = self._equal_sizes()

    def draw(self, samples: Sequence[Sample]) -> list[Drawn]:
        """The images of at most ``batch`` samples; those of the same steps go through the network together."""
        out: dict[int, Drawn] = {}
        for steps, places in _by_steps(samples).items():
            size = next(one for one in self.sizes if one >= len(places))
            filled = [samples[i] for i in places]
            filled += [filled[-1]] * (size - len(filled))
            begin = time.perf_counter()
            pixels = to_uint8(self._decoded(steps, filled)).cpu().numpy()
            took = 1000 * (time.perf_counter() - begin)
            # A copy: a row alone would keep the whole batch.
            out |= {i: Drawn(pixels[row].copy(), took, len(places), size) for row, i in enumerate(places)}
        return [out[i] for i in range(len(samples))]

    def _equal_sizes(self) -> list[int]:
        """The eighths of a full batch that give the same bits as it does, before they are rounded to pixels, and it."""
        same = {-(-self.batch * part // PARTS) for part in range(1, PARTS)} - {self.batch}
        every = self.generator.description.start_steps
        for steps in [()] if self.teacher else {every[:1], every}:
            samples = [Sample(self._any(i), i, 0, steps) for i in range(self.batch)]
            full = self._decoded(steps, samples)
            same = {size for size in same if torch.equal(self._decoded(steps, samples[-size:]), full[-size:])}
        return [*sorted(same), self.batch]

    def _any(self, i: int) -> int | str:
        return "" if self.generator.description.text else i % self.generator.layout.classes

    def _decoded(self, steps: tuple[int, ...], samples: Sequence[Sample]) -> Tensor:
        """Float images [B, 3, H, W] of samples of these steps."""
        sampler = FlowMatched() if self.teacher else FewStep(self.generator.description.split, steps)
        (out,) = self.generator.decoded(
            sampler,
            [one.wanted for one in samples],  # type: ignore[arg-type]  # ``check`` has seen to it that all are of a kind
            [one.seed for one in samples],
            [one.id for one in samples],
        )
        return out


def check(description: Description, layout: Layout, samples: Sequence[Sample]) -> None:
    """Raise Refused, one sentence, for what the student has no class or no step for, or takes no prompts for."""
    for steps, places in _by_steps(samples).items():
        if steps:  # the teacher takes all that there are
            FewStep(description.split, steps).check(layout)
        checked(description, layout, [samples[i].wanted for i in places])  # type: ignore[arg-type]


def _by_steps(samples: Sequence[Sample]) -> dict[tuple[int, ...], list[int]]:
    """steps -> places of the samples that have them."""
    out: dict[tuple[int, ...], list[int]] = {}
    for place, sample in enumerate(samples):
        out.setdefault(sample.steps, []).append(place)
    return out
