"""Draw, score and time every sampler that a recipe lists, then write the report.

Images come from ``drawing``, which draws only what is missing. Speed is measured afterwards, in one process with the
pool gone. report.json is written last and says that the report is complete.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np

from pipeline import storage
from pipeline.evaluation import summary, timing
from pipeline.evaluation.plan import EvaluationPlan, prepare
from pipeline.evaluation.timing import Times
from pipeline.generator import card, folder
from pipeline.host import events
from pipeline.pairs import shards
from pipeline.recipe import Recipe, fingerprint
from pipeline.report import legend, markdown, page, plots
from pipeline.report.names import metric_name
from pipeline.report.results import Results
from pipeline.sampling import sample_files
from pipeline.sampling.samplers import OneStepStar
from pipeline.scoring import instruments, references
from pipeline.scoring.references import References
from pipeline.services import cluster, registry, tracking
from pipeline.workflow import costs, drawing, other_reports, preflight, status

ABOUT_FILES = "report.html is the whole report; it is among the artifacts, where scores.json has every number of it."
ENDINGS = (".html", ".md", "report.json", ".png")  # of the names of the files that MLflow gets


def evaluate(recipe: Recipe) -> str:
    """Score every sampler of a recipe, write report.html, report.md, report.json and pictures; return the table.

    Raises ValueError or FileNotFoundError, one sentence, for anything that can be found wrong before
    sampling.
    """
    recipe = cluster.portable(recipe)
    if recipe.dry_run:
        return costs.described(recipe)
    if not recipe.status:
        preflight.check(recipe, "evaluate")
    recipe, registered = registry.fetch(recipe)
    recipe, versions = registry.fetch_others(recipe)
    plan = prepare(recipe)
    named = {name: dataclasses.replace(other, registered=versions[name]) for name, other in plan.beside.items()}
    plan = dataclasses.replace(plan, registered=registered, beside=named)
    if recipe.status:
        return status.of_evaluation(plan)
    others = other_reports.read(plan, instruments.title(recipe.evaluate))
    for sentence in said_of(plan):
        events.warn(sentence)
    last, times = _last_report(plan), timing.recalled(plan)
    frame = times and {"shown": summary.frame(plan, others), "timing": times.measurement["key"]}
    if last and _frame_of(last) == frame and _complete(plan, last):
        return f"{markdown.table(last)}\n\n{_nothing_missing(plan, last)}"
    about = {"folder": recipe.report_uri, "fingerprint": plan.fingerprint()}
    finished = drawing.in_cache(plan)
    done, total = (sum(draw.items for draw in some) for some in (finished, plan.draws()))
    events.tell("begun", **about, unit="part", done=done, total=total)
    if finished != plan.draws():
        with cluster.session(recipe, recipe.evaluate.actors, "sampling actors"):
            preflight.check_workers(recipe, "evaluate", recipe.report_uri)
    with tracking.Run.start(recipe, "evaluate") as run:
        run.mark(recipe.report_uri)
        frequencies = _frequencies(plan)
        with run.watching_this_machine():  # and not while speed is measured
            statistics = drawing.collect(plan, frequencies)
        times = times or _timed(plan, frequencies)
        outlines = {draw: statistics.outline(draw) for draw in statistics}
        results = summary.summarise(plan, statistics, times, outlines, others)
        files = write(plan, results, statistics)
        _complete_card(plan, results)
        _log(run, plan, results, files)
        said = _registered(run, plan, results) if recipe.evaluate.register else ""
    sweep(plan)
    place = storage.join(recipe.report_uri, "report.html")
    images = f"Each sampler's images are in {plan.images}. " if plan.samples() else ""
    return f"{markdown.table(results)}\n\nThe report is {place}, and report.md. {images}{said}".rstrip()


def said_of(plan: EvaluationPlan) -> list[str]:
    """What the report will say of its student and its samplers that nobody should find there only."""
    reasons = {name: plan.of(draw).departures(draw.sampler) for name, draw, _ in plan.lines() if draw.sampler}
    return [
        *plan.notes,
        *(
            f"{name} asks more of its student than that was trained for: {'; '.join(why)}."
            for name, why in reasons.items()
            if why
        ),
    ]


def _timed(plan: EvaluationPlan, frequencies: np.ndarray | None) -> Times:
    """What ``time_samplers`` finds with the pool's cores, after keeping it for the next report of the same samplers."""
    settings = plan.recipe.evaluate
    print("Measuring speed, call by call in turn.", file=sys.stderr, flush=True)
    times = timing.keep(plan, timing.time_alone(plan, frequencies, settings.timing_batches, settings.actors))
    print(f"{legend.about_load(times.measurement['load'], times.measurement['cores'])}.", file=sys.stderr, flush=True)
    return times


def _last_report(plan: EvaluationPlan) -> Results | None:
    """The results of a report that is there already and was made from the same images and networks.

    What it shows may have changed since: the paper's figures, the reports it is compared with, its form, the machine
    that times. Then it is written again, from the statistics and the times that are there.
    """
    uri = storage.join(plan.recipe.report_uri, "report.json")
    results: Results | None = storage.read_json(uri) if storage.exists(uri) else None
    same = results and results.get("fingerprint") == plan.fingerprint() and "shown" in results
    return results if same else None


def _frame_of(results: Results) -> dict[str, Any]:
    """What a report shows beside its images: its form, the figures beside its own, its times."""
    return {"shown": results["shown"], "timing": results["made"]["timing"].get("key")}


def _complete(plan: EvaluationPlan, results: Results) -> bool:
    """Whether every file of a report is there: its own, and the samplers' images where they are wanted."""
    names = set(storage.listing(plan.recipe.report_uri))
    return set(results["files"]) <= names and all(drawing.saved(plan, draw) for draw in plan.draws())


def _nothing_missing(plan: EvaluationPlan, results: Results) -> str:
    """That the report is there; its student is registered now if it should be and is not."""
    uri = storage.join(plan.recipe.report_uri, "report.json")
    names = [name for name in storage.listing(plan.recipe.report_uri) if name.endswith(ENDINGS)]
    files = {name: partial(storage.read_bytes, storage.join(plan.recipe.report_uri, name)) for name in names}
    tracking.complete(plan.recipe, "evaluate", plan.recipe.report_uri, lambda run: _log(run, plan, results, files))
    _complete_card(plan, results)  # a student of before may have got its card since
    said = f"Nothing is missing: {uri} holds this report; delete timing.json beside it to measure speed again."
    if not plan.recipe.evaluate.register:
        return said
    if version := registry.version_of(plan.recipe, results):
        return f"{said} {version}"
    with tracking.Run.start(plan.recipe, "evaluate") as run:
        _log(run, plan, results, {})
        return f"{said} {_registered(run, plan, results)}"


def _registered(run: tracking.Run, plan: EvaluationPlan, results: Results) -> str:
    """Register the student with what lies beside its weights, which is all that drawing needs, and its card's words."""
    beside = folder.beside(plan.student)
    content = next((storage.read_json(uri) for uri in beside if uri.endswith(folder.CONFIG)), None)
    describe = partial(card.description, content, results)
    return registry.register(run, plan.recipe, results, beside, describe)


def write(plan: EvaluationPlan, results: Results, statistics: drawing.Shelf) -> dict[str, bytes]:
    """The report's files by name, after writing them; report.json, which says that it is complete, comes
    last.
    """
    own = _write_reference(plan, statistics)
    columns = plan.grid_columns
    grids = [images[:columns] for draw in plan.table() if (images := statistics.outline(draw).images) is not None]
    names = [line.name for line in plan.lines()]
    files = {"samples.png": plots.samples(names, grids, plan.conditioning(range(columns)))}
    files |= plots.charts(results)
    results["files"] = [*own, *files, "report.html", "report.md", "report.json"]
    files["report.html"] = page.html(results, files).encode()
    files["report.md"] = markdown.markdown(results).encode()
    files["report.json"] = (json.dumps(results, indent=2) + "\n").encode()
    for name, data in files.items():
        storage.write_bytes(storage.join(plan.recipe.report_uri, name), data)
    return files


def sweep(plan: EvaluationPlan) -> None:
    """Delete what no report needs any more, once this one is written.

    Killed writers' temporary files, everywhere; parts of images whose draw is another one; and in the report's own
    cache, which no recipe names, statistics of draws that this report does not have. A cache that reports share is left
    alone: who else uses what is in it, nobody here knows.
    """
    for place in (plan.recipe.report_uri, plan.shelf, plan.images):
        storage.sweep(place)
    for name in storage.listing(plan.images):
        if sample_files.PART in name:
            storage.remove(storage.join(plan.images, name))
    if plan.recipe.evaluate.cache is None:
        wanted = {plan.cache(draw).rpartition("/")[2] for draw in plan.draws()}
        for name in storage.listing(plan.shelf):
            if name.endswith(".npz") and name not in wanted:
                storage.remove(storage.join(plan.shelf, name))


def _write_reference(plan: EvaluationPlan, statistics: drawing.Shelf) -> list[str]:
    """Keep the statistics of real images that were made here: a recipe may name reference.npz instead of them.

    Returns the name of the file, if there is one.
    """
    settings = plan.recipe.evaluate
    if settings.features == "digits" or plan.facts["reference"]["statistics"] != "made here":
        return []
    reference, weights = summary.compared_with(plan, statistics), plan.facts["features"]["inception"]
    content = References(reference.gaussian, reference.spatial, settings.flavours[0], True, weights, plan.real)
    storage.write_bytes(storage.join(plan.recipe.report_uri, "reference.npz"), references.packed(content))
    return ["reference.npz"]


def _complete_card(plan: EvaluationPlan, results: Results) -> None:
    """Write the scores and the picture of the recipe's own student into its model card, once the report is there."""
    uri, own = plan.recipe.student_uri, plan.recipe.evaluate.student is None
    if own and plan.students and storage.exists(storage.join(uri, folder.CONFIG)):
        content = storage.read_json(storage.join(uri, folder.CONFIG))
        picture = storage.read_bytes(storage.join(plan.recipe.report_uri, "samples.png"))
        storage.write_bytes(storage.join(uri, card.PICTURE), picture)
        text = card.card(plan.recipe.name, content, results)
        storage.write_bytes(storage.join(uri, folder.CARD), text.encode())


def _frequencies(plan: EvaluationPlan) -> np.ndarray | None:
    """Token frequencies [classes or 1, n, V] of the pair set, where a sampler draws from them."""
    if not any(sampler.frequencies for sampler in plan.samplers):
        return None
    by_class = any(isinstance(sampler, OneStepStar) and sampler.given_class for sampler in plan.samplers)
    counts = shards.token_frequencies(plan.recipe.pairs_uri, by_class).astype(np.float32)
    return counts if by_class else counts[None]


def _log(
    run: tracking.Run, plan: EvaluationPlan, results: Results, files: Mapping[str, bytes | Callable[[], bytes]]
) -> None:
    """Numbers, pictures and links into MLflow."""
    run.metrics(markdown.headlines(results))
    for point in results["curve"]["points"] if results["curve"] else []:
        run.metrics({f"curve/{metric_name(point['name'])}": point["score"]}, step=point["step"])
    for name, content in files.items():
        run.artifact(name, content)
    run.table("scores.json", *markdown.scores(results))
    run.tag("report_fingerprint", results["fingerprint"])
    if prompts := results["made"].get("prompts"):
        run.tag("prompts", f"{prompts['rows']:,} rows, the first {prompts['skip']:,} left out")
        run.dataset("prompts", prompts["uri"], prompts["SHA-256"], "evaluation")
    if plan.students:
        run.tag("student", plan.students[plan.student][:12])
    for name, other in plan.beside.items():
        run.tag(f"student/{name}", other.students[other.student][:12])
    if trainer := plan.exported.get("mlflow_run"):
        run.link("distill", trainer)
    if pairs := plan.facts.get("pairs", {}).get("fingerprint", plan.exported.get("pairs_fingerprint")):
        run.tag("pairs_fingerprint", pairs)
        run.link("pairs", pairs_fingerprint=pairs)
        run.dataset("pairs", plan.recipe.pairs_uri, pairs, "training")
    reference = results["made"]["reference"]
    run.dataset("reference", str(reference["uri"]), fingerprint(dict(reference)), "evaluation")
    own = plan.students and plan.recipe.evaluate.student is None
    text = f"{markdown.table(results)}\n\n{ABOUT_FILES}"
    run.conclude(markdown.headline(results), text, storage.resolve(plan.recipe.student_uri) if own else "")
