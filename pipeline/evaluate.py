"""Draw, score and time every sampler that a recipe lists, then write the report.

A fixed pool of Ray Data actors draws fixed ranges of sample ids and returns float64 statistics; the driver
merges them in the order of the ids, so neither the number of actors nor who finishes first changes a digit. A
finished sampler's statistics stay in <report>/cache under a fingerprint of all that shaped them, and a rerun
draws only what is missing. Speed is measured afterwards, in one process with the pool gone.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from ray.data import ActorPoolStrategy
from torch import Tensor

from pipeline import (
    cluster,
    comparison,
    noise,
    page,
    pairs,
    plots,
    report,
    sampler_list,
    scoring,
    speed,
    storage,
    summary,
    tracking,
)
from pipeline.compilation import compiled
from pipeline.models import checkpoints
from pipeline.models.base import Student
from pipeline.plan import Draw, Plan, describe, prepare
from pipeline.precision import set_products
from pipeline.progress import Progress
from pipeline.recipe import Recipe
from pipeline.samplers import Autoregressive, Models, OneStepStar
from pipeline.tally import Statistics

# ---- the workers


class Artist:
    """A Ray Data actor: the models and the scoring network of a plan, drawing one unit of work at a time."""

    def __init__(self, plan: Plan, draws: list[Draw], frequencies: np.ndarray | None) -> None:
        torch.set_num_threads(max(1, int(plan.recipe.cluster.cpus)))
        set_products("fp32")  # of what scores; the models set their own
        self.plan, self.draws = plan, draws
        self.models = load(plan, frequencies)
        self.network = scoring.features(plan.recipe.evaluate, plan.device)
        self.real = scoring.ReferenceImages(plan.recipe.evaluate)
        self.loaded = ""  # the student in self.models

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        """{draw [1], item [1]} -> the same with packed statistics."""
        draw, item = self.draws[batch["draw"][0]], int(batch["item"][0])
        statistics = self.statistics(draw, item)
        return {"draw": batch["draw"], "item": batch["item"], "statistics": [statistics.pack()]}

    @torch.no_grad()
    def statistics(self, draw: Draw, item: int) -> Statistics:
        """Draw and score the images of one unit of work."""
        started, settings, layout = time.perf_counter(), self.plan.recipe.evaluate, self.plan.layout
        out = Statistics.empty(self.network, layout.classes, layout.image_size, draw.count)
        places = draw.places(item)
        for start in range(places.start, places.stop, settings.batch):
            part = np.arange(start, min(start + settings.batch, places.stop))
            images, labels = self.images(draw, part)
            out.add(images, labels, self.network, part, draw.keep, settings.grid)
        out.seconds = time.perf_counter() - started
        return out

    def images(self, draw: Draw, places: np.ndarray) -> tuple[Tensor, np.ndarray | None]:
        """Images [B, 3, H, W] at ``places`` of a draw, and their labels where they are known."""
        if draw.sampler is None:
            images, labels = self.real[int(places[0]) : int(places[-1]) + 1]
            return images.to(self.plan.device), labels
        if draw.student and draw.student != self.loaded:
            self.models = dataclasses.replace(self.models, student=load_student(self.plan, draw.student, self.models))
            self.loaded = draw.student
        ids = draw.first + places
        embeddings = draw.sampler.draw(self.models, ids)
        images = self.models.decode(embeddings, draw.sampler.student)
        return images, noise.labels(ids, self.plan.layout.classes)


def load(plan: Plan, frequencies: np.ndarray | None) -> Models:
    """The teacher of a plan on its device; the student is loaded when a draw needs it."""
    teacher = checkpoints.teacher(plan.recipe.teacher).to(plan.device)
    shares = None if frequencies is None else torch.from_numpy(frequencies).to(plan.device)
    recipe = plan.recipe
    precisions = recipe.teacher.precision, recipe.evaluate.precision
    return Models(teacher, None, recipe.pairs.solver, recipe.evaluate.seed, shares, plan.device, *precisions)


def load_student(plan: Plan, uri: str, models: Models) -> Student:
    """A student of a plan on its device, compiled if the recipe says so."""
    student = checkpoints.student(plan.recipe.teacher, uri, models.teacher.codebook, plan.mask).to(plan.device)
    if plan.recipe.evaluate.compile:
        compiled(student)
    return student


def collect(plan: Plan, frequencies: np.ndarray | None) -> dict[Draw, Statistics]:
    """The statistics of all draws: out of the cache, or drawn now and put there."""
    draws = plan.draws()
    out = {draw: found for draw in draws if (found := _cached(plan, draw))}
    todo = [draw for draw in draws if draw not in out]
    if not todo:
        return out
    total, done = (sum(draw.items for draw in some) for some in (draws, out))
    parts = dict.fromkeys(range(len(todo)), 0)
    with Progress(total, "parts", done=done) as progress:
        for i, part in in_order(_rows(plan, todo, frequencies)):
            draw = todo[i]
            if parts[i]:
                out[draw].merge(part)
            else:
                out[draw] = part
            parts[i] += 1
            if parts[i] == draw.items:
                storage.write_bytes(plan.cache(draw), out[draw].pack())
            progress.update(note=draw.name)
    return out


def _rows(plan: Plan, todo: list[Draw], frequencies: np.ndarray | None) -> Iterable[dict[str, Any]]:
    """The parts of all draws as the actors finish them: {draw, item, statistics}."""
    units = [{"draw": i, "item": item} for i, draw in enumerate(todo) for item in range(draw.items)]
    settings = plan.recipe.cluster
    dataset = ray.data.from_items(units, override_num_blocks=len(units)).map_batches(
        Artist,
        fn_constructor_args=(plan, todo, frequencies),
        batch_size=1,
        compute=ActorPoolStrategy(size=min(plan.recipe.evaluate.actors, len(units))),
        num_cpus=settings.cpus,
        num_gpus=settings.gpus,
        max_task_retries=2,
    )
    return dataset.iter_rows()


def in_order(rows: Iterable[dict[str, Any]]) -> Iterator[tuple[int, Statistics]]:
    """(draw, part), the parts of each draw in the order of their ids, whoever came first."""
    waiting: dict[tuple[int, int], bytes] = {}
    following: dict[int, int] = defaultdict(int)
    for row in rows:
        i = row["draw"]
        waiting[i, row["item"]] = row["statistics"]
        while (i, following[i]) in waiting:
            yield i, Statistics.unpack(waiting.pop((i, following[i])))
            following[i] += 1


def _cached(plan: Plan, draw: Draw) -> Statistics | None:
    uri = plan.cache(draw)
    return Statistics.unpack(storage.read_bytes(uri)) if storage.exists(uri) else None


def time_alone(plan: Plan, frequencies: np.ndarray | None, batches: tuple[int, ...], actors: int = 1) -> dict[str, Any]:
    """``time_samplers`` in a Ray task with the resources of so many actors, as far as one machine has them.

    For the report those of the whole pool, which is gone by then: what a user at the same machine would wait.
    A sampler runs on one GPU, so further ones would stand idle.
    """
    settings = plan.recipe.cluster
    largest = max(node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"])
    cpus = settings.cpus if settings.gpus else min(settings.cpus * actors, largest)
    task = ray.remote(num_cpus=cpus, num_gpus=settings.gpus)(time_samplers)
    return ray.get(task.remote(plan, frequencies, batches, max(1, int(cpus))))


def time_samplers(plan: Plan, frequencies: np.ndarray | None, batches: tuple[int, ...], threads: int) -> dict[str, Any]:
    """Speed of every sampler of the table, and of the AR teacher in any case, on so many threads or all cores."""
    torch.set_num_threads(min(threads, os.cpu_count() or 1))
    set_products("fp32")
    models = load(plan, frequencies)
    if plan.students:
        models = dataclasses.replace(models, student=load_student(plan, plan.student, models))
    listed = list(dict.fromkeys([*plan.samplers, Autoregressive()]))
    return {
        "speeds": speed.measure(models, listed, batches),
        "device": speed.device_name(plan.device),
        "threads": torch.get_num_threads(),
    }


# ---- the job


def evaluate(recipe: Recipe) -> str:
    """Score every sampler of a recipe, write report.html, report.md, report.json and pictures; return the table.

    Raises ValueError or FileNotFoundError, one sentence, for anything that can be found wrong before
    sampling.
    """
    recipe = cluster.portable(recipe)
    plan = prepare(recipe)
    others = comparison.read(plan, summary.title(recipe.evaluate))
    if recipe.dry_run:
        return _dry_run(plan)
    earlier = _earlier(plan)
    if earlier and earlier["shown"] == summary.shown(plan, others):
        uri = storage.join(recipe.report_uri, "report.json")
        advice = "delete it to measure speed again"
        return f"{report.table(earlier)}\n\nNothing is missing: {uri} holds this report; {advice}."
    with tracking.Run.start(recipe, "evaluate") as run:
        cluster.connect(recipe)
        frequencies = _frequencies(plan)
        statistics = collect(plan, frequencies)
        if earlier:
            timing = summary.recalled(plan, earlier)
        else:
            print("Measuring speed, call by call in turn.", file=sys.stderr, flush=True)
            timing = time_alone(plan, frequencies, recipe.evaluate.timing_batches, recipe.evaluate.actors)
        results = summary.summarise(plan, statistics, timing, others)
        files = write(plan, results, statistics)
        _log(run, plan, results, files)
    return f"{report.table(results)}\n\nThe report is {storage.join(recipe.report_uri, 'report.html')}, and report.md."


def _dry_run(plan: Plan) -> str:
    """The plan with what is left to draw, from the seconds of one batch of every sampler."""
    cluster.connect(plan.recipe)
    timing = time_alone(plan, _frequencies(plan), (plan.recipe.evaluate.batch,))
    return describe(plan, {sampler: speeds[-1].ms / 1000 for sampler, speeds in timing["speeds"].items()})


def _earlier(plan: Plan) -> dict[str, Any] | None:
    """The results of a report that is there already and was made from the same images and networks.

    What it shows may have changed since: the paper's figures, the reports it is compared with, its form. Then it is
    written again, from the statistics and the times that are there.
    """
    uri = storage.join(plan.recipe.report_uri, "report.json")
    results = storage.read_json(uri) if storage.exists(uri) else {}
    return results if results.get("fingerprint") == plan.fingerprint() and "shown" in results else None


def write(plan: Plan, results: dict[str, Any], statistics: dict[Draw, Statistics]) -> dict[str, bytes]:
    """The report's files by name, after writing them; report.json, which says that it is complete, comes
    last.
    """
    drawn = [statistics[draw].images for draw in plan.table()]
    columns = min(plan.recipe.evaluate.grid, plan.recipe.evaluate.count)
    labels = noise.labels(range(columns), plan.layout.classes)
    names = sampler_list.names(plan.samplers)
    files = {"samples.png": plots.samples(names, [np.concatenate(parts) for parts in drawn], labels)}
    files |= plots.charts(results)
    files["report.html"] = page.html(results, files).encode()
    files["report.md"] = report.markdown(results).encode()
    files["report.json"] = (json.dumps(results, indent=2) + "\n").encode()
    for name, data in files.items():
        storage.write_bytes(storage.join(plan.recipe.report_uri, name), data)
    return files


def _frequencies(plan: Plan) -> np.ndarray | None:
    """Token frequencies [classes or 1, n, V] of the pair set, where a sampler draws from them."""
    if not any(sampler.frequencies for sampler in plan.samplers):
        return None
    by_class = any(isinstance(sampler, OneStepStar) and sampler.given_class for sampler in plan.samplers)
    counts = pairs.token_frequencies(plan.recipe.pairs_uri, by_class).astype(np.float32)
    return counts if by_class else counts[None]


def _log(run: tracking.Run, plan: Plan, results: dict[str, Any], files: dict[str, bytes]) -> None:
    """Numbers, pictures and links into MLflow."""
    run.metrics(report.scalars(results))
    for point in (results["curve"] or {"points": []})["points"]:
        run.metrics({f"curve/{report.metric_name(point['name'])}": point["score"]}, step=point["step"])
    with tempfile.TemporaryDirectory() as folder:
        for name, data in files.items():
            Path(folder, name).write_bytes(data)
            run.artifact(Path(folder, name))
    for key, value in plan.facts["teacher"].items():
        run.tag(f"teacher_{key}", value)
    if plan.students:
        run.tag("student", plan.students[plan.student])
    if made_by := plan.exported.get("mlflow_run"):
        run.tag("distill_run", made_by)
    if known := plan.facts.get("pairs", {}).get("fingerprint", plan.exported.get("pairs_fingerprint")):
        run.tag("pairs_fingerprint", known)
        run.dataset("pairs", plan.recipe.pairs_uri, known, "evaluation")
