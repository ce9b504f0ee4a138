"""Who draws the images of a report and looks at them: the models and the scoring network, one unit of work at a time.

``draw_images`` and what it calls shape the images, ``look_at`` their statistics; ``equal_code`` knows them by name, and
statistics are kept only as long as neither changes.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import numpy as np
import ray
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.evaluation.draws import Draw
from pipeline.evaluation.plan import EvaluationPlan
from pipeline.host.machine import device_name
from pipeline.host.stopwatch import now, warm_up
from pipeline.models import checkpoints
from pipeline.models.base import Student
from pipeline.models.graphs import Replays
from pipeline.numerics.compilation import compiled
from pipeline.numerics.precision import set_products
from pipeline.sampling import sample_files
from pipeline.sampling.samplers import Models, Sampler
from pipeline.scoring import instruments
from pipeline.scoring.instruments import Features
from pipeline.scoring.real_images import RealImages
from pipeline.scoring.tally import Sight, Statistics
from pipeline.services import cluster
from pipeline.services.metrics import Recorder
from pipeline.text import encoder

VERSIONS = ("torch", "numpy", "scipy", "ray")
Labelled = tuple[Tensor, np.ndarray | None]  # images [B, 3, H, W] and their labels or prompts [B], where known


class Artist:
    """A Ray Data actor: the models and the scoring network of a plan, drawing one unit of work at a time.

    ``weights`` refers to the scoring network's arrays, which the actors of a node share; None where it ships.
    ``working`` is a context around each unit, which tells others of it.
    """

    def __init__(
        self,
        plan: EvaluationPlan,
        draws: list[Draw],
        frequencies: np.ndarray | None,
        weights: ray.ObjectRef[dict[str, np.ndarray]] | None = None,
        working: Callable[[str], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        torch.set_num_threads(max(1, int(plan.recipe.cluster.cpus)))
        set_products("fp32")  # of what scores; the models set their own
        self.plan, self.draws, self.working, self.record = plan, draws, working, Recorder(plan.recipe)
        self.models = load_models(plan, frequencies)
        arrays = None if weights is None else ray.get(weights)
        network = instruments.features(plan.recipe.evaluate, plan.device, arrays)
        self.network = network if plan.has_agreement else dataclasses.replace(network, satisfied=None)
        self.samples = plan.samples()
        self.real: RealImages | None = None  # opened by the actor that scores them
        self.loaded = ""  # the student in self.models

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        """{draw [1], item [1]} -> the same with packed statistics."""
        draw, item = self.draws[batch["draw"][0]], int(batch["item"][0])
        with self.working(f"part {item + 1} of {draw.name}"):
            try:
                statistics = self.statistics(draw, item)
            except Exception as error:
                if cluster.device_error(error):
                    cluster.end_process(error)
                raise
        made = {"dd_evaluation_images_total": len(draw.places(item)), "dd_evaluation_seconds_total": statistics.seconds}
        self.record(made, sampler=draw.name)
        return {"draw": batch["draw"], "item": batch["item"], "statistics": [statistics.pack()]}

    @torch.no_grad()
    def statistics(self, draw: Draw, item: int) -> Statistics:
        """Draw and score the images of one unit of work."""
        started = time.perf_counter()
        out = Statistics.empty(self.network, self.plan.layout.classes or 1, self.plan.side, draw.count)
        places = np.array(draw.places(item))
        rows = look_at(out, self.network, draw, places, self.plan.recipe.evaluate.batch, self.images)
        if draw in self.samples:
            sample_files.write_part(self.samples[draw], self.plan.key(draw), item, rows.pixels)
        out.seconds = time.perf_counter() - started
        out.machines = [machine(self.plan.device)]
        return out

    def images(self, draw: Draw, places: np.ndarray) -> Labelled:
        """Images at ``places`` of a draw, and their labels or prompts where they are known."""
        if draw.sampler is None:
            self.real = self.real or instruments.real(self.plan.recipe.evaluate, self.plan.side)
            assert self.real is not None
            first = self.plan.first_real
            images, labels = self.real[first + int(places[0]) : first + int(places[-1]) + 1]
            return images.to(self.plan.device), self.plan.prompts_of_real(places) if self.plan.prompts else labels
        if draw.student and draw.student != self.loaded:
            student = load_student(self.plan.of(draw), draw.student, self.models)
            self.models = dataclasses.replace(self.models, student=student)
            self.loaded = draw.student
        return draw_images(self.models, draw.sampler, draw.first + places, self.plan.side)


def draw_images(models: Models, sampler: Sampler, ids: np.ndarray, side: int) -> Labelled:
    """The images of the samples ``ids``, resized to ``side`` pixels as LlamaGen's authors do before they round."""
    images = models.decode(sampler.draw(models, ids), sampler.student)
    if images.shape[-1] != side:
        images = F.interpolate(images, size=(side, side), mode="bicubic")
    return images, models.column(ids)


def look_at(
    out: Statistics,
    network: Features,
    draw: Draw,
    places: np.ndarray,
    batch: int,
    images: Callable[[Draw, np.ndarray], Labelled],
) -> Sight:
    """Take the images at ``places`` of a draw into ``out``, which are made ``batch`` at a time; returns what was seen.

    A part is summed up at once, however it was batched, so that batches change no sum.
    """
    sights, labels = [], []
    for some in _batches(places, batch):
        pixels, of_these = images(draw, some)
        sights.append(Sight.of(pixels, network))
        labels += [] if of_these is None else [of_these]
    rows, of_all = Sight.joined(sights), np.concatenate(labels) if labels else None
    out.add(rows, of_all, network, places, draw.kept(places), draw.images)
    return rows


def _batches(places: np.ndarray, size: int) -> Iterator[np.ndarray]:
    for start in range(0, len(places), size):
        yield places[start : start + size]


def machine(device: str) -> dict[str, str]:
    """What a part is made on, as far as rounding may depend on it."""
    versions = {name: importlib.metadata.version(name) for name in VERSIONS}
    return {"host": socket.gethostname(), "device": device_name(device)} | versions


def load_models(plan: EvaluationPlan, frequencies: np.ndarray | None) -> Models:
    """The teacher of a plan on its device; the student is loaded when a draw needs it."""
    teacher = checkpoints.teacher(plan.recipe.teacher).to(plan.device)
    teacher.decodes = Replays() if plan.recipe.records("evaluate") else None
    shares = None if frequencies is None else torch.from_numpy(frequencies).to(plan.device)
    recipe = plan.recipe
    precisions = recipe.teacher.precision, recipe.evaluate.precision
    encode = encoder.conditioner(recipe.text, plan.device)
    models = Models(teacher, None, recipe.pairs.solver, recipe.evaluate.seed, shares, plan.device, *precisions)
    return dataclasses.replace(models, conditioning=plan.conditioning, encode=encode)


def load_student(plan: EvaluationPlan, uri: str, models: Models) -> Student:
    """A student of a plan on its device, compiled and recorded if the recipe says so."""
    student = checkpoints.student(plan.recipe.teacher, uri, models.teacher.codebook, plan.built).to(plan.device)
    if plan.recipe.evaluate.compile:
        compiled(student)
    student.jumps = Replays() if plan.recipe.records("evaluate") else None
    return student


@torch.no_grad()
def seconds_per_image(plan: EvaluationPlan, samplers: list[Sampler]) -> dict[Sampler, float]:
    """Seconds of an image of each sampler in steady state, in batches of the recipe's, decoding included.

    Samplers of token frequencies are left out: they ask no network and a pair set that may be still to come. A student
    that is not there yet is as fast as one that starts from its teacher.
    """
    recipe, batch = plan.recipe, plan.recipe.evaluate.batch
    torch.set_num_threads(max(1, int(recipe.cluster.cpus)))
    set_products("fp32")
    models, asked = load_models(plan, None), [sampler for sampler in samplers if not sampler.frequencies]
    if any(sampler.student for sampler in asked):
        student = load_student(plan, plan.student, models) if plan.students else None
        student = student or checkpoints.new_student(recipe.teacher, models.teacher, plan.built, recipe.train.seed)
        student.jumps = Replays() if recipe.records("evaluate") else None
        models = dataclasses.replace(models, student=student.eval().to(plan.device))
    seconds = {}
    for sampler in asked:
        call = partial(draw_images, models, sampler, np.arange(batch), plan.side)
        warm_up(call)
        start = now(plan.device)
        call()
        seconds[sampler] = (now(plan.device) - start) / batch
    return seconds
