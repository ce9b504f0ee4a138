"""What jobs/sample.py was asked for, once it is checked: which images, in which parts, and where they go.

A part is a fixed range of sample ids, a whole number of the generator's batches, so that nobody's share of the parts
changes a batch, and with it a bit of an image.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from pipeline import storage
from pipeline.generator import folder
from pipeline.generator.generator import BATCH
from pipeline.host import provenance
from pipeline.recipe import fingerprint
from pipeline.sampling.samplers import Sampler

PART = 8 * BATCH  # images of a unit of work, which are in memory at once on their way into files


@dataclass(frozen=True)
class Request:
    """Images of one student: those of each of ``samplers``, from the same noise, go to its own place.

    Attributes:
        student: URI of the student's folder.
        teacher: whether a sampler asks its teacher.
        samplers: one, or the teacher after it.
        places: a URI for each sampler, that of an .npz or of a folder.
        wanted: labels or prompts, which are gone through in turn.
        seed: of the noise.
        first: sample id of the first image.
        count: images of each sampler.
        device: what torch calls the device that draws, of several its kind.
        part: images of a unit of work, a multiple of the generator's ``BATCH``.
    """

    student: str
    teacher: bool
    samplers: tuple[Sampler, ...]
    places: tuple[str, ...]
    wanted: Sequence[Any]
    seed: int
    first: int
    count: int
    device: str
    part: int = PART

    @property
    def parts(self) -> int:
        """Of each sampler."""
        return math.ceil(self.count / self.part)

    def ids(self, item: int) -> range:
        """The sample ids of a part."""
        return range(self.first + item * self.part, self.first + min((item + 1) * self.part, self.count))

    def of(self, ids: Sequence[int]) -> list[Any]:
        """What the samples are drawn for."""
        return [self.wanted[i % len(self.wanted)] for i in ids]

    def facts(self, sampler: Sampler) -> dict[str, Any]:
        """All that shapes a sampler's images, as JSON: networks by SHA-256, code by its version and commit."""
        description = folder.read(self.student)
        files = {"student": description.weights, "decoder": description.settings.tokenizer}
        if self.teacher and description.recipe:
            files["teacher"] = description.recipe["teacher"]["checkpoint"]
        out: dict[str, Any] = {name: storage.sha256(uri) for name, uri in files.items()}
        out |= {"text": asdict(description.text) if description.text else None, "sampler": repr(sampler)}
        out |= {"seed": self.seed, "first": self.first, "count": self.count, "batch": BATCH, "part": self.part}
        out |= {"wanted": fingerprint({"wanted": list(self.wanted)}), "device": self.device, "torch": torch.__version__}
        return out | {"code": provenance.version()}
