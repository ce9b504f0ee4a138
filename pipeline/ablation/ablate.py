"""Ablations: one setting at a time around a recipe, the three jobs for every variant and seed, and one table.

The three jobs finish what is missing and make nothing twice, so does this one: run again, it goes on where it stopped.
A training or an evaluation that fails is named, the others are made, and the table says where a number is missing.
"""

from __future__ import annotations

import json
from collections.abc import Callable

from pipeline import storage
from pipeline.ablation import plan as ablation_plan
from pipeline.ablation import report
from pipeline.ablation.plan import AblationPlan, Trial
from pipeline.ablation.results import AblationResults
from pipeline.generator import folder
from pipeline.host import events
from pipeline.host.errors import Unfinished
from pipeline.models import checkpoints
from pipeline.pairs import manifest
from pipeline.recipe import Recipe
from pipeline.report.results import Results
from pipeline.services import cluster, tracking
from pipeline.workflow import preflight
from pipeline.workflow.distill import distill
from pipeline.workflow.evaluate import evaluate
from pipeline.workflow.generate import generate


def ablate(recipe: Recipe) -> str:
    """Make every variant of the recipe's ablation with every seed, write table and plot, and return the table.

    Raises ValueError or FileNotFoundError, one sentence, for anything that can be found wrong before the first job, and
    RuntimeError when some variants could not be made.
    """
    preflight.check_services(recipe)
    plan = ablation_plan.build(cluster.portable(recipe))
    if recipe.dry_run:
        return ablation_plan.describe(plan)
    storage.check_writable(plan.at())
    with tracking.Run.start(plan.recipe, "ablate", _last_run(plan)) as run:
        claim = {"recipe": plan.recipe.resolved(), "mlflow_run": run.id}
        storage.write_json(plan.at("recipe.json"), claim)
        lost = _work(plan)
        results = report.summarise(plan, _scored(plan, lost))
        results["mlflow_run"] = run.id
        _write(plan, results, run)
        _link(plan, run, lost)
    where = f"The ablation is {plan.at('ablation.md')}."
    if lost:
        raise Unfinished(
            f"{len(lost)} of {sum(map(len, plan.trials)) + len(plan.teachers)} reports were not made"
            f" ({'; '.join(lost)}), see above for why; {plan.at('ablation.md')} holds the others, and the same command"
            " makes what is missing."
        )
    return f"{report.table(results)}\n\n{where}"


def _last_run(plan: AblationPlan) -> str | None:
    """The MLflow run of the same ablation, begun before."""
    place = plan.at("recipe.json")
    claim = storage.read_json(place) if storage.exists(place) else {}
    return claim.get("mlflow_run") if claim.get("recipe") == plan.recipe.resolved() else None


def _work(plan: AblationPlan) -> list[str]:
    """Run the jobs: pair sets, then students, then reports; names of the reports that are missing."""
    trials = [trial for some in plan.trials for trial in some]
    students = plan.students
    total = len(plan.sets) + len(students) + len(trials) + len(plan.teachers)
    failed: set[str] = set()  # fingerprints
    done = 0

    def run(job: Callable[[Recipe], str], recipe: Recipe, what: str) -> bool:
        """One job; False, said aloud, where work was left."""
        nonlocal done
        done += 1
        print(f"[{done} of {total}] {what}", flush=True)
        try:
            print(job(recipe).splitlines()[-1], flush=True)
        except Unfinished as error:  # shards, steps or images that the job could not make
            events.warn(f"{what} failed: {' '.join(str(error).split())}")
            return False
        return True

    for key, recipe in plan.sets.items():
        if not run(generate, recipe, f"{recipe.pairs.count:,} pairs of {key[: ablation_plan.SHORT]}"):
            failed.add(key)
    for key, trial in students.items():
        if trial.pairs in failed or not run(distill, trial.recipe, f"student of {trial.name}"):
            failed.add(key)
    lost = []
    for name, recipe in plan.teachers.items():
        if not run(evaluate, recipe, f"images of the {name}"):
            lost.append(name)
    for trial in trials:
        if trial.student in failed or not run(evaluate, trial.recipe, f"images of {trial.name}"):
            lost.append(trial.name)
    return lost


def _scored(plan: AblationPlan, lost: list[str]) -> dict[str, Results]:
    """The report of each trial and each teacher that was not lost, by its name."""
    trials = [trial for some in plan.trials for trial in some if trial.name not in lost]
    uris = {trial.name: trial.recipe.report_uri for trial in trials}
    uris |= {name: recipe.report_uri for name, recipe in plan.teachers.items() if name not in lost}
    return {name: storage.read_json(storage.join(uri, "report.json")) for name, uri in uris.items()}


def _write(plan: AblationPlan, results: AblationResults, run: tracking.Run) -> None:
    """Table, plot and numbers into the ablation's folder and into MLflow."""
    files = {
        "ablation.png": report.plot(results),
        "ablation.md": report.markdown(results).encode(),
        "ablation.json": (json.dumps(results, indent=2) + "\n").encode(),
    }
    for name, data in files.items():
        storage.write_bytes(plan.at(name), data)
        run.artifact(name, data)
    run.metrics(report.scalars(results))
    variants = f"{len(plan.trials)} variants, {len(plan.recipe.ablate.seeds)} seeds"
    run.conclude(variants, report.table(results))


def _link(plan: AblationPlan, run: tracking.Run, lost: list[str]) -> None:
    """Tag the MLflow runs behind the table with the ablation's, whoever started them."""
    trials = [trial for some in plan.trials for trial in some if trial.name not in lost]
    for trial in {trial.pairs: trial for trial in trials}.values():
        for job in manifest.read(trial.recipe.pairs_uri)["made"]:
            run.adopt(job["mlflow_run"], variant=_names(trials, pairs=trial.pairs))
    for trial in {trial.student: trial for trial in trials}.values():
        exported = checkpoints.metadata(folder.weights(trial.recipe.student_uri))
        run.adopt(exported["mlflow_run"], variant=_names(trials, student=trial.student))
    for trial in trials:
        fingerprint = storage.read_json(storage.join(trial.recipe.report_uri, "report.json"))["fingerprint"]
        run.adopt_newest("evaluate", {"report_fingerprint": fingerprint}, variant=trial.name)


def _names(trials: list[Trial], **shared: str) -> str:
    """The trials that have the given fingerprint, as a tag says it."""
    names = [trial.name for trial in trials if all(getattr(trial, key) == value for key, value in shared.items())]
    return "; ".join(names)[:4000]
