"""Sets of images that an evaluation draws and scores as one, and the rows of its table before anything is drawn."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from pipeline.evaluation.students import SNAPSHOT
from pipeline.sampling.samplers import Sampler
from pipeline.scoring import tally

PART_IMAGES = 1_000  # of one unit of work; divides tally.SCORE_BLOCK


@dataclass(frozen=True)
class Draw:
    """Images that are scored as one set: ``count`` samples from id ``first``, or as many real images
    (sampler None).

    ``keep`` is how many images' features are kept, of whole rounds of ``classes`` images, so that they are as balanced
    as all; ``images`` how many of the first images are, for the grid. ``owner`` is the name of the student, empty of
    the recipe's own.
    """

    sampler: Sampler | None
    count: int
    first: int = 0
    student: str = ""
    keep: int = 0
    images: int = 0
    classes: int = 1
    owner: str = ""

    @property
    def name(self) -> str:
        """What is drawn, by whom, for people."""
        if self.sampler is None:
            return "real images"
        if self.owner:
            return f"{self.sampler.name} of {self.owner}"
        step = SNAPSHOT.search(self.student)
        name = f"{self.sampler.name} at step {int(step[1])}" if step else self.sampler.name
        return f"{name} from id {self.first}" if self.first else name

    def places(self, item: int) -> range:
        """The images of one unit of work, counted from 0."""
        return range(item * PART_IMAGES, min((item + 1) * PART_IMAGES, self.count))

    def kept(self, places: np.ndarray) -> np.ndarray:
        """Of which images at ``places`` [B] the features are kept, [B]: of all, or of rounds that are evenly spread."""
        if self.keep >= self.count:
            return np.full(len(places), True)
        rounds = self.count // self.classes
        return (places < rounds * self.classes) & tally.spread(
            places // self.classes, self.keep // self.classes, rounds
        )

    def rounds(self) -> np.ndarray:
        """The round of classes that each kept image belongs to, [keep]."""
        places = np.arange(self.count)
        return places[self.kept(places)] // self.classes

    @property
    def items(self) -> int:
        return math.ceil(self.count / PART_IMAGES)


class Line(NamedTuple):
    """A row of the table before anything is drawn: its name, its images, and the paper's figures beside it."""

    name: str
    draw: Draw
    paper: dict[str, float]
