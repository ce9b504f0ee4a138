"""Many images of a student, kept, beside images thrown away."""

from __future__ import annotations

import io
from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import replace
from functools import partial

import numpy as np
import torch

from pipeline import storage
from pipeline.benchmark.clock import turns
from pipeline.benchmark.sheet import Claim, Section
from pipeline.generator import spread
from pipeline.generator.folder import Description
from pipeline.generator.generator import BATCH, Generator
from pipeline.generator.request import Request
from pipeline.generator.targets import FolderTarget, NpzTarget
from pipeline.models import checkpoints
from pipeline.models.base import Teacher
from pipeline.models.convnet import to_uint8
from pipeline.pairs.facts import conditioning
from pipeline.recipe import Recipe
from pipeline.sampling.samplers import FewStep, Models
from pipeline.text import encoder

IMAGES = 8 * BATCH  # of a turn


@torch.no_grad()
def images(recipe: Recipe, teacher: Teacher, place: str, student: str, seconds: float) -> Section:
    """Many images as jobs/sample.py makes them in one process, in turns with the bare loop.

    ``student`` is the file of its weights, ``place`` a folder for what is made.
    """
    device, sampler, options = teacher.codebook.device, FewStep(recipe.train.split), recipe.train.student_options
    text = recipe.text if teacher.caption else None
    about = Description(recipe.teacher, student, options, recipe.train.split, recipe.train.start_steps, text, None)
    generator = Generator(about, device, recipe.evaluate.precision)
    network = checkpoints.student(recipe.teacher, student, teacher.codebook, options).to(device)
    precisions = recipe.teacher.precision, recipe.evaluate.precision
    models = Models(teacher, network, recipe.pairs.solver, recipe.evaluate.seed, None, device, *precisions)
    models = replace(models, conditioning=conditioning(recipe), encode=encoder.conditioner(recipe.text, device))
    wanted = models.column(range(IMAGES)).tolist()

    def bare() -> None:
        for start in range(0, IMAGES, BATCH):
            batch = np.arange(start, min(start + BATCH, IMAGES))
            to_uint8(models.decode(sampler.draw(models, batch), sampler.student)).cpu()

    def kept(name: str, kind: type[NpzTarget] | type[FolderTarget]) -> None:
        uri = storage.join(place, name)
        asked = Request("", False, (sampler,), (uri,), wanted, models.seed, 0, IMAGES, device.type)
        target = kind(asked, {}, uri)
        with redirect_stderr(io.StringIO()):  # progress, in which nobody is interested
            spread.make(asked, [target], [(0, item) for item in range(asked.parts)], generator, 0)

    calls: dict[str, Callable[[], None]] = {"thrown away": bare}
    calls["into an .npz"] = partial(kept, "images.npz", NpzTarget)
    calls["into a folder"] = partial(kept, "pictures", FolderTarget)
    times = turns(calls, device, seconds)
    section = Section(
        "Many images",
        f"{IMAGES:,} images of {sampler.name} at batch {BATCH} in this process, in turns: *thrown away* is the bare"
        " loop, networks and noise alone; the others are what `jobs/sample.py --actors 0` does once it has begun, until"
        " the last file is on the disk. Medians; starting and loading are in none of them.",
    )
    for name, taken in times.items():
        share = times["thrown away"] / taken
        section.rows.append({"images": name, "images / s": IMAGES / taken, "over thrown away": share})
        if name != "thrown away":
            section.claims.append(Claim(f"Images {name} over the bare loop, {device.type}", share, 0.95))
    return section
