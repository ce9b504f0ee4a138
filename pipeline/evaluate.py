"""Draw, score and time every sampler that a recipe lists, then write the report.

A fixed pool of Ray Data actors draws fixed ranges of sample ids and returns float64 statistics; the driver merges them
in the order of the ids, so neither the number of actors nor who finishes first changes a digit. A finished sampler's
statistics stay in <report>/cache under a fingerprint of all that shaped them, and a rerun draws only what is missing.
Inception's weights travel to the actors as shared arrays, never as a module. Speed is measured afterwards, in one
process with the pool gone.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.data
import torch
from torch import Tensor

from pipeline import (
    cluster,
    comparison,
    model_registry,
    noise,
    page,
    pairs,
    plots,
    references,
    report,
    sample_files,
    sampler_list,
    scoring,
    speed,
    storage,
    summary,
    tally,
    tracking,
)
from pipeline.compilation import compiled
from pipeline.models import checkpoints
from pipeline.models.base import Student
from pipeline.plan import Draw, Plan, describe, prepare
from pipeline.precision import set_products
from pipeline.progress import Progress
from pipeline.real_images import RealImages
from pipeline.recipe import Recipe
from pipeline.references import References
from pipeline.samplers import Autoregressive, Models, OneStepStar
from pipeline.tally import Seen, Statistics, glance

RETRIES = 5  # of a part whose actor died; a node that is lost takes several before Ray has noticed

# ---- the workers


class Artist:
    """A Ray Data actor: the models and the scoring network of a plan, drawing one unit of work at a time.

    ``weights`` refers to the scoring network's arrays, which the actors of a node share; None where it ships.
    ``working``: a context around each unit, which tells others of it.
    """

    def __init__(
        self,
        plan: Plan,
        draws: list[Draw],
        frequencies: np.ndarray | None,
        weights: ray.ObjectRef[dict[str, np.ndarray]] | None = None,
        working: Callable[[str], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        torch.set_num_threads(max(1, int(plan.recipe.cluster.cpus)))
        set_products("fp32")  # of what scores; the models set their own
        self.plan, self.draws, self.working = plan, draws, working
        self.models = load(plan, frequencies)
        arrays = None if weights is None else ray.get(weights)
        self.network = scoring.features(plan.recipe.evaluate, plan.device, arrays)
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
        return {"draw": batch["draw"], "item": batch["item"], "statistics": [statistics.pack()]}

    @torch.no_grad()
    def statistics(self, draw: Draw, item: int) -> Statistics:
        """Draw and score the images of one unit of work."""
        started, settings, layout = time.perf_counter(), self.plan.recipe.evaluate, self.plan.layout
        out = Statistics.empty(self.network, layout.classes, layout.image_size, draw.count)
        places, seen, labels = np.array(draw.places(item)), [], []
        for start in range(0, len(places), settings.batch):
            images, known = self.images(draw, places[start : start + settings.batch])
            seen.append(Seen.of(images, self.network))
            labels += [] if known is None else [known]
        rows, known = Seen.joined(seen), np.concatenate(labels) if labels else None
        keep = tally.spread(places, draw.keep, draw.count)
        out.add(rows, known, self.network.names_labels, places, keep, settings.grid)
        if draw in self.samples:
            sample_files.write_part(self.samples[draw], self.plan.key(draw), item, rows.pixels)
        out.seconds = time.perf_counter() - started
        return out

    def images(self, draw: Draw, places: np.ndarray) -> tuple[Tensor, np.ndarray | None]:
        """Images [B, 3, H, W] at ``places`` of a draw, and their labels where they are known."""
        if draw.sampler is None:
            self.real = self.real or scoring.real(self.plan.recipe.evaluate, self.plan.layout.image_size)
            assert self.real is not None
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


class Shelf(Mapping[Draw, Statistics]):
    """The statistics of the finished draws of a plan, read when asked for: one may hold half a gigabyte."""

    def __init__(self, plan: Plan, draws: list[Draw]) -> None:
        self.plan, self.draws = plan, draws

    def __getitem__(self, draw: Draw) -> Statistics:
        return Statistics.unpack(storage.read_bytes(self.plan.cache(draw)))

    def __iter__(self) -> Iterator[Draw]:
        return iter(self.draws)

    def __len__(self) -> int:
        return len(self.draws)

    def glance(self, draw: Draw) -> tuple[float, np.ndarray]:
        """(seconds, images of the grid)."""
        with storage.reading(self.plan.cache(draw)) as file:
            return glance(file)


def collect(plan: Plan, frequencies: np.ndarray | None) -> Shelf:
    """The statistics of all draws: out of the cache, or drawn now and put there."""
    draws = plan.draws()
    finished = [draw for draw in draws if storage.exists(plan.cache(draw)) and _saved(plan, draw)]
    todo = [draw for draw in draws if draw not in finished]
    if not todo:
        return Shelf(plan, draws)
    total, done = (sum(draw.items for draw in some) for some in (draws, finished))
    growing: dict[Draw, Statistics] = {}
    parts = dict.fromkeys(range(len(todo)), 0)
    with Progress(total, "parts", done=done) as progress:
        for i, part in in_order(parts_of(plan, todo, frequencies)):
            draw = todo[i]
            if parts[i]:
                growing[draw].merge(part)
            else:
                growing[draw] = part
            parts[i] += 1
            if parts[i] == draw.items:
                _finish(plan, draw, growing.pop(draw))
            progress.update(note=draw.name)
    return Shelf(plan, draws)


def _finish(plan: Plan, draw: Draw, statistics: Statistics) -> None:
    """Put a whole draw away: its images, if they are wanted, and then its statistics, which say that it is done."""
    if draw in plan.samples():
        sample_files.join(plan.samples()[draw], plan.key(draw), draw.items)
    storage.write_bytes(plan.cache(draw), statistics.pack())


def _saved(plan: Plan, draw: Draw) -> bool:
    """Whether a draw's images are in their file, if the recipe wants them there."""
    wanted = plan.samples().get(draw)
    return wanted is None or sample_files.holds(wanted, plan.key(draw))


def parts_of(
    plan: Plan, todo: list[Draw], frequencies: np.ndarray | None, artist: type[Artist] = Artist, **more: Any
) -> Iterable[dict[str, Any]]:
    """The parts of all draws as the actors finish them: {draw, item, statistics}.

    ``artist`` is the actor's class, ``more`` what its constructor takes beside the usual.
    """
    weights = scoring.weights(plan.recipe.evaluate)
    units = [{"draw": i, "item": item} for i, draw in enumerate(todo) for item in range(draw.items)]
    actors, parts = min(plan.recipe.evaluate.actors, len(units)), sum(draw.items for draw in plan.draws())
    beat = cluster.Heartbeat(plan.recipe, "parts", parts, done=parts - len(units))
    with cluster.session(plan.recipe, actors, "sampling actors"), beat:
        shared = None if weights is None else ray.put(weights)  # a generator, so that it lives as long as the actors
        dataset = ray.data.from_items(units, override_num_blocks=len(units)).map_batches(
            artist,
            fn_constructor_args=(plan, todo, frequencies, shared),
            fn_constructor_kwargs={"working": beat.announcer.working, **more},
            batch_size=1,
            **cluster.pool(plan.recipe, actors, RETRIES),
        )
        yield from beat.rows(dataset)


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


def time_alone(plan: Plan, frequencies: np.ndarray | None, batches: tuple[int, ...], actors: int = 1) -> dict[str, Any]:
    """``time_samplers`` in a Ray task with the resources of so many actors, as far as one machine has them.

    For the report those of the whole pool, which is gone by then: what a user at the same machine would wait.
    A sampler runs on one GPU, so further ones would stand idle.
    """
    settings = plan.recipe.cluster
    cpus = settings.cpus
    if not settings.gpus and actors > 1:
        cpus = max(cpus, min(cpus * actors, cluster.cpus_of_a_node(plan.recipe)))
    threads = max(1, int(cpus))
    return cluster.on_worker(plan.recipe, time_samplers, plan, frequencies, batches, threads, cpus=cpus)


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
    recipe, registered = model_registry.fetched(cluster.portable(recipe))
    plan = dataclasses.replace(prepare(recipe), registered=registered)
    model_registry.check(recipe)
    others = comparison.read(plan, scoring.title(recipe.evaluate))
    if recipe.dry_run:
        return _dry_run(plan)
    earlier = _earlier(plan)
    if earlier and earlier["shown"] == summary.shown(plan, others) and all(_saved(plan, draw) for draw in plan.draws()):
        return f"{report.table(earlier)}\n\n{_nothing_missing(plan, earlier)}"
    cluster.check_address()
    with tracking.Run.start(recipe, "evaluate") as run:
        frequencies = _frequencies(plan)
        statistics = collect(plan, frequencies)
        timing = summary.recalled(plan, earlier) if earlier else _timing(plan, frequencies)
        seconds = sum(statistics.glance(draw)[0] for draw in statistics)
        results = summary.summarise(plan, statistics, timing, seconds, others)
        files = write(plan, results, statistics)
        _log(run, plan, results, files)
        said = model_registry.register(run, recipe, results) if recipe.evaluate.register else ""
    place = storage.join(recipe.report_uri, "report.html")
    return f"{report.table(results)}\n\nThe report is {place}, and report.md. {said}".rstrip()


def _timing(plan: Plan, frequencies: np.ndarray | None) -> dict[str, Any]:
    """What ``time_samplers`` finds, with the pool's cores; nothing where the recipe names no batch."""
    settings = plan.recipe.evaluate
    if not settings.timing_batches:
        return {"speeds": {}, "device": None, "threads": None}
    print("Measuring speed, call by call in turn.", file=sys.stderr, flush=True)
    return time_alone(plan, frequencies, settings.timing_batches, settings.actors)


def _dry_run(plan: Plan) -> str:
    """The plan with what is left to draw, from the seconds of one batch of every sampler."""
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


def _nothing_missing(plan: Plan, results: dict[str, Any]) -> str:
    """That the report is there; its student is registered now if it should be and is not."""
    uri = storage.join(plan.recipe.report_uri, "report.json")
    said = f"Nothing is missing: {uri} holds this report; delete it to measure speed again."
    if not plan.recipe.evaluate.register:
        return said
    if known := model_registry.registered(plan.recipe, results):
        return f"{said} {known}"
    with tracking.Run.start(plan.recipe, "evaluate") as run:
        _log(run, plan, results, {})
        return f"{said} {model_registry.register(run, plan.recipe, results)}"


def write(plan: Plan, results: dict[str, Any], statistics: Shelf) -> dict[str, bytes]:
    """The report's files by name, after writing them; report.json, which says that it is complete, comes
    last.
    """
    _write_reference(plan, statistics)
    columns = min(plan.recipe.evaluate.grid, plan.recipe.evaluate.count)
    labels = noise.labels(range(columns), plan.layout.classes)
    names = sampler_list.names(plan.samplers)
    files = {"samples.png": plots.samples(names, [statistics.glance(draw)[1] for draw in plan.table()], labels)}
    files |= plots.charts(results)
    files["report.html"] = page.html(results, files).encode()
    files["report.md"] = report.markdown(results).encode()
    files["report.json"] = (json.dumps(results, indent=2) + "\n").encode()
    for name, data in files.items():
        storage.write_bytes(storage.join(plan.recipe.report_uri, name), data)
    return files


def _write_reference(plan: Plan, statistics: Shelf) -> None:
    """Keep the statistics of real images that were made here: a recipe may name reference.npz instead of them."""
    settings = plan.recipe.evaluate
    if settings.features == "digits" or plan.facts["reference"]["statistics"] != "made here":
        return
    found, weights = summary.compared_with(plan, statistics), plan.facts["features"]["inception"]
    made = References(found.gaussian, found.spatial, settings.flavour, True, weights, plan.real)
    storage.write_bytes(storage.join(plan.recipe.report_uri, "reference.npz"), references.packed(made))


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
    run.tag("report_fingerprint", results["fingerprint"])
    for key, value in plan.facts["teacher"].items():
        run.tag(f"teacher_{key}", value)
    if plan.students:
        run.tag("student", plan.students[plan.student])
    if made_by := plan.exported.get("mlflow_run"):
        run.tag("distill_run", made_by)
    if known := plan.facts.get("pairs", {}).get("fingerprint", plan.exported.get("pairs_fingerprint")):
        run.tag("pairs_fingerprint", known)
        run.dataset("pairs", plan.recipe.pairs_uri, known, "evaluation")
