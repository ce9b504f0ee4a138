"""What a student takes in use: many images beside images thrown away, and answers over HTTP beside its bare step."""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, redirect_stderr
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from statistics import median
from typing import Any

import numpy as np
import torch

from pipeline import storage
from pipeline.benchmark.clock import turns
from pipeline.benchmark.sheet import Claim, Row, Section
from pipeline.generator import folder as student_folder
from pipeline.generator import spread
from pipeline.generator.folder import Description
from pipeline.generator.generator import BATCH, Generator
from pipeline.generator.request import Request
from pipeline.generator.targets import FolderTarget, NpzTarget
from pipeline.host import collector, signals
from pipeline.models import checkpoints
from pipeline.models.base import Teacher
from pipeline.models.convnet import to_uint8
from pipeline.pairs.facts import conditioning
from pipeline.recipe import Recipe
from pipeline.sampling.samplers import FewStep, Models
from pipeline.services import cluster
from pipeline.serving.apart import served
from pipeline.serving.load import Answers, arrivals, closed_loop, open_loop
from pipeline.serving.orders import Sample
from pipeline.serving.service import Service
from pipeline.text import encoder

IMAGES = 8 * BATCH  # of a turn
ROUNDS = 5  # through all loads: a machine that gets slower between two of them would be an overload
CLIENTS = 4  # for each image of a batch, so that the server always has a full batch ahead
LIGHT, LOADED = 0.1, 0.8  # requests a second, over the most that the server answers, or that the student draws
MOST = "as much as it answers"
SHORT = 0.25  # of the time of the others: it has no rare moments to wait for
LOADS = "10 % of that", "80 % of that", "80 % of the bare step's"
ENOUGH = 0.8  # of the images that a student draws without a server
LONGEST = 3.0  # times the student's step that 99 % of the answers may take at LOADED


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


class BareStudent:
    """A student that draws as a replica of the server does, in a process of the same kind, and does nothing else."""

    def __init__(self, service: Service) -> None:
        self.generator = Generator.from_pretrained(service.student, service.device)

    def times(self, batches: tuple[int, ...], wanted: list[Any], seconds: float) -> list[float]:
        """Seconds of ``Generator.draw`` in one step, for each of the batch sizes in turns."""
        calls = {str(size): partial(self.generator.draw, wanted[:size], range(size)) for size in batches}
        found = turns(calls, self.generator.device, seconds)
        return [found[str(size)] for size in batches]


def serving(recipe: Recipe, folder: str) -> Section:
    """A served student beside its step without a server: how many images it gives, and how long one takes."""
    service = Service(_new_student(recipe, folder), device=recipe.cluster.runs_on)
    wanted, batches = _wanted(recipe), (1, service.batch)
    bare = partial(cluster.on_actor, recipe, BareStudent, (service,), "times", batches, wanted)
    samples = [Sample(one, seed, 0, (1,)) for seed, one in enumerate(wanted)]
    steps, rounds = [bare(recipe.benchmark.seconds)], []
    for turn in range(ROUNDS):
        with cluster.session(recipe, 1), served(service) as address, _client() as client:

            def asked(how: Callable[..., Answers], *args: Any) -> Answers:
                return signals.interruptible(client.submit(how, address, samples, *args).result)

            rounds.append(_round(recipe, asked, service.batch, steps[-1][1], turn))
        steps.append(bare(recipe.benchmark.seconds))
    beside = [(one + other) / 2 for (_, one), (_, other) in itertools.pairwise(steps)]  # of each round
    found = {name: [one[name] for one in rounds] for name in rounds[0]}
    in_steps = {name: [one.over(step) for one, step in zip(found[name], beside, strict=True)] for name in found}
    section = Section("Serving", _of_serving(service, steps, in_steps[LOADS[1]]))
    section.rows = [_row(name, found[name], in_steps[name], service.batch) for name in found]
    most, loaded = (next(row for row in section.rows if row["load"] == name) for name in (MOST, LOADS[1]))
    title = f"of a served student over the bare step, {recipe.cluster.runs_on}"
    section.claims.append(Claim(f"Images a second {title}", float(most["/ bare step's"] or 0), ENOUGH))
    late = float(loaded["p99 / bare step"] or 0)
    section.claims.append(Claim(f"p99 at {LOADED:.0%} load {title}", late, LONGEST, at_most=True))
    return section


def _round(recipe: Recipe, asked: Callable[..., Answers], batch: int, step: float, turn: int) -> dict[str, Answers]:
    """A share of each load; those that are shares of what the server answers are of what it has just answered."""
    seconds = recipe.benchmark.serving_seconds / ROUNDS
    out = {MOST: asked(closed_loop, CLIENTS * batch, SHORT * seconds)}
    rates = LIGHT * out[MOST].rate, LOADED * out[MOST].rate, LOADED * batch / step
    for name, rate in zip(LOADS, rates, strict=True):
        out[name] = asked(open_loop, arrivals(rate, seconds, recipe.evaluate.seed + turn))
    return out


def _of_serving(service: Service, steps: list[list[float]], loaded: list[Answers]) -> str:
    """What the section's figures are.

    ``steps`` are the seconds of one image and of a full batch around the rounds, ``loaded`` a load of each, in steps.
    """
    (first, step), times = np.mean(steps, axis=0), ", ".join(f"{_ms(full):.1f}" for _, full in steps)
    late = ", ".join(f"{one.quantile(0.99):.2f}" for one in loaded)
    return (
        "Requests of one image, a PNG each, over HTTP on loopback to one replica (`jobs/serve.py`, its defaults: at"
        f" most {service.batch} images in a batch), in {ROUNDS} rounds. First {CLIENTS * service.batch} clients ask for"
        " one image after the other, which is as much as the server answers; then requests arrive at random moments"
        " (Poisson) whether or not those before are answered, at a share of that round's rate, or of the bare step's,"
        " and a time counts from the arrival. The"
        f" *bare step* is `Generator.draw` of {service.batch} images in one step in an actor without a server:"
        f" {_ms(step):.1f} ms; one image alone takes {_ms(first):.1f} ms there. It is measured before and after every"
        f" round ({times} ms), and the mean of the two is what that round's figures are over. The table has the medians"
        f" of the rounds, whose p99 at 80 % of what it answers was {late} bare steps. Client, server and replica are"
        " three processes of this machine."
    )


def _row(name: str, found: list[Answers], in_steps: list[Answers], batch: int) -> Row:
    """Of the table: the rounds of one load, in seconds, and in bare steps of so many images."""
    row: Row = {"load": name, "requests": sum(len(one.seconds) for one in found)}
    row |= {"images / s": median(one.rate for one in found)}
    row |= {"/ bare step's": median(one.rate / batch for one in in_steps)}
    for heading, share in (("p50, ms", 0.5), ("p99, ms", 0.99)):
        row[heading] = _ms(median(one.quantile(share) for one in found))
    row |= {"p99 / bare step": median(one.quantile(0.99) for one in in_steps)}
    return row | {"answered 503": sum(one.refused for one in found), "failed": sum(one.failed for one in found)}


@contextmanager
def _client() -> Iterator[ProcessPoolExecutor]:
    """One process beside this one, so that who asks does not share a Python with who answers; its imports are done."""
    with ProcessPoolExecutor(1, get_context("spawn")) as out:
        out.submit(open_loop, "http://127.0.0.1", [], np.empty(0)).result()
        out.submit(collector.settle).result()
        yield out


def _new_student(recipe: Recipe, folder: str) -> str:
    """The folder of a student as it starts from its teacher: its weights do not matter here."""
    recipe = replace(recipe, run=folder, train=replace(recipe.train, uri=None))
    checksums, settings = checkpoints.checksums(recipe.teacher), recipe.train
    student = checkpoints.new_student(
        recipe.teacher, checkpoints.teacher(recipe.teacher), settings.student_options, settings.seed
    )
    about = {"family": recipe.teacher.family, "config": recipe.resolved()["teacher"]["config"], "teacher": checksums}
    about |= settings.student_options | {"split": settings.split, "start_steps": list(settings.start_steps)}
    checkpoints.save(student, storage.join(recipe.student_uri, student_folder.WEIGHTS), about)
    content = student_folder.described(recipe, checksums)
    storage.write_json(storage.join(recipe.student_uri, student_folder.CONFIG), content)
    return recipe.student_uri


def _wanted(recipe: Recipe) -> list[Any]:
    """What some images are drawn for, labels or prompts of the recipe's."""
    return list(conditioning(recipe)(range(BATCH)).tolist())


def _ms(seconds: float) -> float:
    return 1000 * seconds
