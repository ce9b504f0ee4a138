"""Samples of many requests through the network together: each gives the same image in whatever company.

Products of other shapes are summed up in another order, so that an image changes in its last bits with the size of its
batch. Every batch is therefore filled up to one size, and on a CPU an image then has the same bits in every row of it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.generator.generator import BATCH, Generator
from pipeline.host.errors import Refused
from pipeline.sampling.samplers import FewStep, FlowMatched, Sampler
from pipeline.serving.orders import Sample


@dataclass(frozen=True)
class Drawn:
    """An image, uint8 [3, H, W], and what it took.

    Attributes:
        milliseconds: of the batch that it was drawn in, from the noise to the pixels.
        company: images of that batch that somebody wanted, this one among them; the others filled it up.
    """

    pixels: np.ndarray
    milliseconds: float
    company: int


class Painter:
    """A student, or the teacher that is loaded beside it, which draws batches of ``batch`` images, 64 at most."""

    def __init__(self, generator: Generator, batch: int, teacher: bool = False) -> None:
        if not 1 <= batch <= BATCH:
            raise Refused(f"--batch is {batch}; it must be from 1 to {BATCH}.")
        self.generator, self.batch, self.teacher = generator, batch, teacher

    def check(self, samples: Sequence[Sample]) -> None:
        """Raise Refused, one sentence, for what the student has no class or no step for, or takes no prompts for."""
        for steps, places in _by_steps(samples).items():
            self.generator.check(self._sampler(steps), [samples[i].wanted for i in places])  # type: ignore[arg-type]

    def draw(self, samples: Sequence[Sample]) -> list[Drawn]:
        """The images of at most ``batch`` samples; those of the same steps go through the network together."""
        out: dict[int, Drawn] = {}
        for steps, places in _by_steps(samples).items():
            filled = [samples[i] for i in places]
            filled += [filled[-1]] * (self.batch - len(filled))
            begin = time.perf_counter()
            pixels = self.generator.draw_with(
                self._sampler(steps),
                [one.wanted for one in filled],  # type: ignore[arg-type]  # check has seen to it that all are of a kind
                [one.seed for one in filled],
                [one.id for one in filled],
            ).numpy()
            took = 1000 * (time.perf_counter() - begin)
            # A copy: a row alone would keep the whole batch.
            out |= {i: Drawn(pixels[row].copy(), took, len(places)) for row, i in enumerate(places)}
        return [out[i] for i in range(len(samples))]

    def _sampler(self, steps: tuple[int, ...]) -> Sampler:
        return FlowMatched() if self.teacher else FewStep(self.generator.description.split, steps)


def _by_steps(samples: Sequence[Sample]) -> dict[tuple[int, ...], list[int]]:
    """steps -> places of the samples that have them."""
    out: dict[tuple[int, ...], list[int]] = {}
    for place, sample in enumerate(samples):
        out.setdefault(sample.steps, []).append(place)
    return out
