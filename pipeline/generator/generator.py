"""Images from a student in a few lines, without its teacher, Ray or MLflow.

    from pipeline import Generator

    images = Generator.from_pretrained("runs/demo/student")([3, 7])
    images[0].save("three.png")

The image of (seed, sample id) is the one that the evaluation draws of it: bit for bit on a CPU, in the same batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from operator import itemgetter

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pipeline import noise
from pipeline.flow.matching import Solver
from pipeline.generator import folder
from pipeline.host.ahead import ahead
from pipeline.host.errors import Refused
from pipeline.models import checkpoints
from pipeline.models.base import Layout, Teacher, Tokenizer
from pipeline.models.conditions import Condition, Encode, of_column
from pipeline.models.convnet import to_uint8
from pipeline.numerics.precision import Precision
from pipeline.sampling.samplers import FewStep, Inputs, Models, Sampler
from pipeline.text import encoder

BATCH = 64  # images that are drawn at once


class Generator:
    """A student, its decoder and, for prompts, their encoder, ready to draw.

    Attributes:
        description: what the student's folder says.
        layout: of its tokens; ``layout.classes`` is 0 for a student of prompts.
        device: where it draws.
    """

    def __init__(
        self, description: folder.Description, device: torch.device | str, precision: Precision, teacher: bool = False
    ) -> None:
        self.description, self.device = description, torch.device(device)
        settings, recipe = description.settings, description.recipe
        asked = description.teacher() if teacher else None
        tokenizer = checkpoints.tokenizer(settings)
        student = checkpoints.student(settings, description.weights, tokenizer.codebook, description.options)
        self.layout: Layout = student.layout
        self._encode: Encode | None = encoder.conditioner(description.text, device) if description.text else None
        self._models = Models(
            (checkpoints.teacher(asked) if asked else _Decoder(tokenizer)).to(self.device),
            student.to(self.device),
            Solver(**recipe["pairs"]["solver"]) if recipe else Solver(),
            seed=0,
            device=self.device,
            teacher_precision=recipe["teacher"]["precision"] if recipe else "fp32",
            student_precision=precision,
        )

    @classmethod
    def from_pretrained(
        cls, uri: str, device: torch.device | str | None = None, precision: Precision = "fp32", teacher: bool = False
    ) -> Generator:
        """The student whose folder is at ``uri``: a path, hf://owner/name, s3://, gs:// or models:/NAME@best.

        The last is one of MLflow's registry, in the store that MLFLOW_TRACKING_URI names.
        ``device`` is by default a GPU where there is one. ``teacher`` loads its teacher, too, for samplers that ask it.
        Raises Missing or Refused, one sentence, for a folder that holds no student, or only a part of one.
        """
        found = "cuda" if torch.cuda.is_available() else "cpu"
        return cls(folder.read(located(uri)), device or found, precision, teacher)

    def __call__(
        self,
        wanted: Sequence[int] | Sequence[str],
        seeds: int | Sequence[int] = 0,
        steps: Sequence[int] = (1,),
        ids: Sequence[int] | None = None,
    ) -> list[Image.Image]:
        """An image for each of ``wanted``, labels or prompts; the arguments are those of ``draw``."""
        return [Image.fromarray(one) for one in self.draw(wanted, seeds, steps, ids).permute(0, 2, 3, 1).numpy()]

    def draw(
        self,
        wanted: Sequence[int] | Sequence[str],
        seeds: int | Sequence[int] = 0,
        steps: Sequence[int] = (1,),
        ids: Sequence[int] | None = None,
    ) -> Tensor:
        """uint8 images [B, 3, H, W], on the CPU, of B labels or prompts.

        Args:
            wanted: labels from 0, or prompts, as the student takes them.
            seeds: of the noise, one for all images or one for each.
            steps: the AR steps from which the student jumps, rising from 1.
            ids: sample ids, which with the seeds say which noise it is; by default 0 to B - 1, and 0 throughout where
                each image has its own seed.

        Raises Refused, one sentence, for labels and steps that the student does not have, and for prompts where it
        takes classes.
        """
        return self.draw_with(FewStep(self.description.split, tuple(steps)), wanted, seeds, ids)

    def draw_with(
        self,
        sampler: Sampler,
        wanted: Sequence[int] | Sequence[str],
        seeds: int | Sequence[int] = 0,
        ids: Sequence[int] | None = None,
    ) -> Tensor:
        """``draw`` with any sampler that asks for no token frequencies; one that asks the teacher needs it loaded."""
        parts = [*self.batches(sampler, wanted, seeds, ids)]
        side = self.layout.image_size
        return torch.cat(parts) if parts else torch.empty(0, 3, side, side, dtype=torch.uint8)

    def batches(
        self,
        sampler: Sampler,
        wanted: Sequence[int] | Sequence[str],
        seeds: int | Sequence[int] = 0,
        ids: Sequence[int] | None = None,
    ) -> Iterator[Tensor]:
        """``draw_with``, as many images at a time as go through the networks at once: ``BATCH``, and what is left."""
        for pixels in self.decoded(sampler, wanted, seeds, ids):
            yield to_uint8(pixels).cpu()

    def decoded(
        self,
        sampler: Sampler,
        wanted: Sequence[int] | Sequence[str],
        seeds: int | Sequence[int] = 0,
        ids: Sequence[int] | None = None,
    ) -> Iterator[Tensor]:
        """``batches`` as the decoder says them, float32 [B, 3, H, W] in [-1, 1] on ``device``, before rounding.

        The noise of a batch is made while the one before is drawn, so that a GPU need not wait for it.
        """
        sampler.check(self.layout)
        column = checked(self.description, self.layout, wanted)
        keys = sample_keys(len(column), seeds, ids)
        noises = (self._noise(keys[start : start + BATCH]) for start in range(0, len(keys), BATCH))
        for i, (gaussian, uniform) in enumerate(ahead(noises)):
            yield self._drawn(sampler, column[i * BATCH : (i + 1) * BATCH], gaussian, uniform)

    def _noise(self, keys: Sequence[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
        """Gaussian float16 [B, n, C] and uniform draws float64 [B, n] of B (seed, sample id)."""
        length, dim = self.layout.length, self.layout.code_dim
        runs = [(seed, [sample for _, sample in run]) for seed, run in groupby(keys, itemgetter(0))]
        gaussian = np.concatenate([noise.gaussian(seed, samples, length, dim) for seed, samples in runs])
        return gaussian, np.concatenate([noise.uniform(seed, samples, length) for seed, samples in runs])

    @torch.no_grad()
    def _drawn(self, sampler: Sampler, column: np.ndarray, gaussian: np.ndarray, uniform: np.ndarray) -> Tensor:
        """Float images [B, 3, H, W] of a batch."""
        condition: Condition = of_column(column)
        condition = self._encode(condition) if self._encode else condition.to(self.device)
        of_noise, of_choices = (torch.from_numpy(values).to(self.device) for values in (gaussian, uniform))
        embeddings = sampler.sample(self._models, Inputs(condition, of_noise.float(), of_choices))
        return self._models.decode(embeddings, sampler.student)


class _Decoder(Teacher):
    """What decodes for a student whose teacher is not there."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.tokenizer, self.layout = tokenizer, tokenizer.layout


def checked(description: folder.Description, layout: Layout, wanted: Sequence[int] | Sequence[str]) -> np.ndarray:
    """Labels int64 [B] or prompts, an object array [B]; Refused for what the student does not take."""
    prompts = description.text is not None
    for one in wanted:
        if isinstance(one, str) != prompts:
            takes = "prompts" if prompts else f"labels from 0 to {layout.classes - 1}"
            raise Refused(f"{one!r} was asked of a student that takes {takes}; give it those.")
        if not isinstance(one, str) and not (float(one).is_integer() and 0 <= one < layout.classes):
            raise Refused(f"label {one} was asked of a student of {layout.classes} classes, counted from 0.")
    return np.array(list(wanted), dtype=object if prompts else np.int64)


def located(address: str) -> str:
    """The folder of a student: the address itself, or where MLflow's registry has it; MLflow is imported for that."""
    if not str(address).startswith("models:/"):
        return str(address)
    from pipeline.services import registry

    return registry.folder_of(address)


def sample_keys(count: int, seeds: int | Sequence[int], ids: Sequence[int] | None) -> list[tuple[int, int]]:
    """(seed, sample id) of every image; Refused where there are not as many as images."""
    if isinstance(seeds, int):
        all_seeds, default = [seeds] * count, range(count)
    else:
        all_seeds, default = list(seeds), [0] * count  # type: ignore[assignment]
    samples = list(default if ids is None else ids)
    for name, values in (("seeds", all_seeds), ("ids", samples)):
        if len(values) != count:
            raise Refused(f"{len(values)} {name} were given for {count} images; give one for each.")
    return list(zip(map(int, all_seeds), map(int, samples), strict=True))
