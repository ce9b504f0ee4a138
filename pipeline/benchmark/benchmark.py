"""The speed of everything, as ratios measured in one run: ``jobs/benchmark.py``.

Absolute times do not carry over to another machine, ratios mostly do. Each section measures one thing beside its
yardstick in turns, and the claims on top say which bounds hold here.
"""

from __future__ import annotations

import json
import math
import os
import platform
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from pipeline import storage
from pipeline.benchmark import actors, clock, growth, matching, networks, plan, rounding, sheet, students, training
from pipeline.benchmark.growth import Curve
from pipeline.benchmark.sheet import Section
from pipeline.host import machine
from pipeline.host.errors import Refused
from pipeline.host.machine import device_name
from pipeline.models import checkpoints
from pipeline.models.base import Teacher
from pipeline.numerics.precision import set_products
from pipeline.pairs.facts import PairFacts
from pipeline.recipe import Recipe
from pipeline.report import legend
from pipeline.services import cluster, tracking
from pipeline.services.parts import counted
from pipeline.serving.serve import check_packages
from pipeline.training.step import settled
from pipeline.workflow import preflight

ALONE = ("solvers", "precision", "matching", "teacher", "sampling", "images")  # sections that run in this process alone


def benchmark(recipe: Recipe) -> str:
    """Measure the sections of ``recipe.benchmark``, write benchmark.md, .json and growth.png; return the table.

    Raises ValueError, one sentence, for a GPU or files that are not there.
    """
    recipe = counted(cluster.portable(recipe))
    preflight.check_services(recipe)
    preflight.check_teacher(recipe)
    if recipe.dry_run:
        return plan.describe(recipe)
    if recipe.cluster.runs_on == "cuda" and not torch.cuda.is_available():
        raise Refused("cluster.gpus is above 0 but this machine has no CUDA device; set it to 0 to measure the CPU.")
    if "serving" in recipe.benchmark.sections:
        check_packages()
    storage.check_writable(recipe.benchmark_uri)
    cluster.keep_priority()  # as a server's replicas have it
    with tracking.Run.start(recipe, "benchmark") as run, tempfile.TemporaryDirectory(prefix="dd-") as folder:
        bench = Bench(recipe, folder)
        sections: list[Section] = []
        for part in recipe.benchmark.sections:
            print(f"Measuring {part}.", file=sys.stderr, flush=True)
            watch = machine.Watch(bench.device)
            found = bench.parts[part]()
            found[0].about += f" {_beside(watch.load(), part)}"
            sections += found
        files = {"benchmark.md": _markdown(bench, sections).encode(), "benchmark.json": _json(bench, sections)}
        if bench.curves:
            files["growth.png"] = growth.picture(bench.curves)
        for name, data in files.items():
            storage.write_bytes(storage.join(recipe.benchmark_uri, name), data)
            run.artifact(name, data)
        claims = [claim for section in sections for claim in section.claims]
        run.metrics({claim.key: claim.value for claim in claims})
        run.tag("device", bench.device_name)
        kept = f"{sum(claim.met for claim in claims)} of {len(claims)} claims hold"
        run.conclude(kept, f"On {bench.device_name}, {kept}; benchmark.md has the tables.")
    return files["benchmark.md"].decode()


class Bench:
    """What the sections share: the recipe, its teacher, the machine's peaks, a folder for what is made."""

    def __init__(self, recipe: Recipe, folder: str) -> None:
        self.device = torch.device(recipe.cluster.runs_on)
        recipe = replace(recipe, train=settled(recipe.train, self.device))
        self.recipe, self.folder, self.curves = recipe, folder, list[Curve]()
        if self.device.type == "cpu":
            torch.set_num_threads(min(max(1, math.ceil(recipe.cluster.cpus)), os.cpu_count() or 1))
        set_products(recipe.teacher.precision)
        settings = recipe.benchmark
        self.parts: dict[str, Callable[[], list[Section]]] = {
            "solvers": lambda: [matching.solvers(self.teacher)],
            "precision": lambda: [rounding.precisions(recipe, self.device)],
            "matching": lambda: [
                matching.overhead(self.teacher, recipe.pairs.solver, settings.batches, settings.seconds)
            ],
            "teacher": lambda: [
                networks.teachers(self.teacher, recipe.teacher, settings.batches, settings.seconds, self.peaks)
            ],
            "sampling": lambda: [networks.sampling(recipe, self.teacher, settings.batches, settings.seconds)],
            "training": self._training,
            "generation": lambda: [actors.generation(recipe, self._place("generation"))],
            "evaluation": self._evaluation,
            "images": lambda: [
                students.images(recipe, self.teacher, self._place("images"), self._student(), settings.seconds)
            ],
            "growth": self._growth,
            "serving": lambda: [students.serving(recipe, self._place("serving"))],
        }

    @cached_property
    def teacher(self) -> Teacher:
        """On the device."""
        return checkpoints.teacher(self.recipe.teacher).to(self.device)

    @cached_property
    def peaks(self) -> clock.Peaks:
        """Of this device in the teacher's precision."""
        return clock.peaks(self.device, self.recipe.teacher.precision)

    @property
    def device_name(self) -> str:
        threads = f", {torch.get_num_threads()} thread(s)" if self.device.type == "cpu" else ""
        return f"{device_name(self.device)}{threads}"

    def _place(self, name: str) -> str:
        return str(Path(self.folder, name))

    def _training(self) -> list[Section]:
        section, rate = training.parts(self.recipe, self.device)
        return [section, training.stream(self.recipe, self._place("stream"), self.device, rate)]

    def _evaluation(self) -> list[Section]:
        return [actors.evaluation(self.recipe, self._place("evaluation"), self._student())]

    def _student(self) -> str:
        """The file of a student that starts from its teacher, exported as training would."""
        recipe = self.recipe
        checksums = checkpoints.checksums(recipe.teacher)
        student = checkpoints.new_student(recipe.teacher, self.teacher, recipe.train.student_options, 0)
        place = self._place("student.safetensors")
        pairs = PairFacts.of(recipe, checksums)
        settings = {"family": recipe.teacher.family, "teacher": checksums, "pairs_fingerprint": pairs.fingerprint}
        checkpoints.save(student, place, settings | recipe.train.student_options)
        return place

    def _growth(self) -> list[Section]:
        section, self.curves = growth.growth(
            self.recipe, self.teacher, self._place("growth"), self.recipe.benchmark.seconds
        )
        return [section]


def _markdown(bench: Bench, sections: list[Section]) -> str:
    lines = [f"# Benchmark of {bench.recipe.name}", _where(bench)]
    if any(section.claims for section in sections):
        lines.append(sheet.claims(sections))
    lines += [section.markdown() for section in sections]
    if bench.curves:
        lines.append("![time and memory over what they should grow with](growth.png)")
    return "\n\n".join(lines) + "\n"


def _beside(load: machine.Load, part: str) -> str:
    """How busy others kept the machine: while a section ran, or before one whose work is that of other processes."""
    if part in ALONE:
        facts: Any = vars(load)
        return f"{legend.about_load(facts, os.cpu_count())}."
    if load.before is None:
        return "This system does not say how busy others kept it."
    return f"In the second before, others kept {load.before:.2f} of the machine's {os.cpu_count()} cores busy."


def _where(bench: Bench) -> str:
    """The machine, and what of a GPU's this table cannot say."""
    recipe, versions = bench.recipe, f"torch {torch.__version__}, Python {platform.python_version()}"
    said = f"{bench.device_name}; {versions}; teacher {recipe.teacher.precision}, compile {recipe.teacher.compile}."
    if bench.device.type == "cpu":
        said += " No GPU took part: of the kernel and the graphs for GPUs this table says nothing."
    return said


def _json(bench: Bench, sections: list[Section]) -> bytes:
    content = {
        "name": bench.recipe.name,
        "device": bench.device_name,
        "torch": torch.__version__,
        "recipe": bench.recipe.resolved(),
        "sections": sheet.plain(sections),
        "curves": [vars(curve) | {"found": curve.found} for curve in bench.curves],
    }
    return (json.dumps(content, indent=2) + "\n").encode()
