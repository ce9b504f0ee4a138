"""The times of a report: measured once under a key of their own, and kept beside it in timing.json.

They depend on more than images do: the device and its cores, threads, precision, compiling, graphs, batches and the
code that measures. Where one of these is another, speed is measured again and nothing is drawn again.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pipeline import storage
from pipeline.configuration.fields import Actors
from pipeline.evaluation import equal_code
from pipeline.evaluation.artist import load_models, load_student
from pipeline.evaluation.plan import EvaluationPlan
from pipeline.host import machine, provenance
from pipeline.numerics.precision import set_products
from pipeline.recipe import fingerprint
from pipeline.report.origin import Measurement
from pipeline.sampling import speed
from pipeline.sampling.samplers import Autoregressive, Sampler
from pipeline.sampling.speed import Speed
from pipeline.services import cluster
from pipeline.services.parts import MOST, crew_for


@dataclass(frozen=True)
class Times:
    """Every sampler's speed at each batch size, and where and when that was measured."""

    speeds: dict[Sampler, list[Speed]]
    measurement: Measurement


NOTHING = Times({}, {"key": None, "device": None, "threads": None})


def facts(plan: EvaluationPlan) -> dict[str, Any]:
    """All that shapes the times and is known before Ray is joined."""
    recipe, settings, resources = plan.recipe, plan.recipe.evaluate, plan.recipe.cluster
    out = {
        "batches": sorted({1, *settings.timing_batches}),
        "samplers": list(map(_named, plan.samplers)),
        "teacher": {key: plan.facts[key] for key in ("family", "config", "filter", "precision", "teacher")},
        "student": {"SHA-256": plan.students.get(plan.student), **plan.built, "precision": settings.precision},
        "solver": dataclasses.asdict(recipe.pairs.solver),
        "compile": [recipe.teacher.compile, settings.compile],
        "graphs": recipe.records("teacher"),
        "runs on": plan.device,
        "gpus": resources.gpus,
        "cpus": resources.cpus if resources.gpus else _cores(settings.actors, resources.cpus),
        "torch": importlib.metadata.version("torch"),
        "code": plan.facts["code"] | {equal_code.MEASURING: equal_code.of_measuring()},
    }
    if recipe.records("evaluate"):  # not named where they are off: times from before there was a choice stay
        out["student's graphs"] = True
    if plan.prompts:
        out |= {"prompts": plan.facts["prompts"], "encoder": plan.facts["encoder"]}
    return json.loads(json.dumps(out))


def _cores(actors: Actors, cpus: float) -> float | str:
    """Of so many actors together, each of which has so many."""
    return actors if actors == "auto" else cpus * actors


def recalled(plan: EvaluationPlan) -> Times | None:
    """The times of this plan on the machine that would measure them now; ``NOTHING`` where the recipe names no batch.

    None says that they must be measured. A job that joins a cluster cannot know which of its nodes will measure: there
    the resources that the recipe asks for decide.
    """
    if not plan.recipe.evaluate.timing_batches:
        return NOTHING
    wanted, here = facts(plan), _here(plan)
    for entry in reversed(_entries(plan)):
        if entry["facts"] == wanted and (here is None or here.items() <= entry["machine"].items()):
            samplers = {json.dumps(_named(sampler)): sampler for sampler in [*plan.samplers, Autoregressive()]}
            speeds = {samplers[json.dumps(name)]: [_speed(one) for one in speeds] for name, speeds in entry["speeds"]}
            return Times(speeds, entry["machine"] | {"key": entry["key"], "load": entry["load"]})
    return None


def keep(plan: EvaluationPlan, times: Times) -> Times:
    """Write down what ``time_samplers`` found, in the place of what it replaces; returns it with its key."""
    wanted, measured = facts(plan), times.measurement
    where = {"device": measured["device"], "cores": measured["cores"], "threads": measured["threads"]}
    key = fingerprint({"facts": wanted, "machine": where})
    where |= {"measured": measured["measured"], "calls": measured["calls"]}
    speeds = [[_named(sampler), [dataclasses.asdict(one) for one in of]] for sampler, of in times.speeds.items()]
    entry = {"key": key, "facts": wanted, "machine": where, "load": measured["load"], "speeds": speeds}
    storage.write_json(_place(plan), [*(other for other in _entries(plan) if other["key"] != key), entry])
    return Times(times.speeds, {**measured, "key": key})


def time_alone(
    plan: EvaluationPlan, frequencies: np.ndarray | None, batches: tuple[int, ...], actors: Actors = 1
) -> Times:
    """``time_samplers`` in a Ray task with the resources of so many actors, as far as one machine has them; of ``auto``
    that is all of it.

    For the report those of the whole pool, which is gone by then: what a user at the same machine would wait.
    A sampler runs on one GPU, so further ones would stand idle.
    """
    settings = plan.recipe.cluster
    cpus = settings.cpus
    if not settings.gpus and actors != 1:
        count = crew_for(plan.recipe, actors, MOST).most
        cpus = max(cpus, min(cpus * count, cluster.cpus_of_a_node(plan.recipe)))
    threads = max(1, int(cpus))
    return cluster.on_worker(plan.recipe, time_samplers, plan, frequencies, batches, threads, cpus=cpus)


def time_samplers(
    plan: EvaluationPlan, frequencies: np.ndarray | None, batches: tuple[int, ...], threads: int
) -> Times:
    """Speed of every sampler of the table, and of the AR teacher in any case, on so many threads or all cores; with the
    machine that it was measured on, and what others did there.
    """
    torch.set_num_threads(min(threads, os.cpu_count() or 1))
    set_products("fp32")
    watch = machine.Watch(plan.device)
    models = load_models(plan, frequencies)
    if plan.students:
        models = dataclasses.replace(models, student=load_student(plan, plan.student, models))
    listed = list(dict.fromkeys([*plan.samplers, Autoregressive()]))
    speeds = speed.measure(models, listed, batches)
    beside: Any = dataclasses.asdict(watch.load())
    measurement: Measurement = {
        **machine.described(plan.device),
        "threads": torch.get_num_threads(),
        "measured": provenance.now(),
        "calls": speed.CALLS,
        "load": beside,
    }
    return Times(speeds, measurement)


def _here(plan: EvaluationPlan) -> Mapping[str, object] | None:
    """What this machine is, where it will be the one that measures."""
    if os.environ.get("RAY_ADDRESS", "local") != "local":
        return None
    if plan.device == "cuda" and not torch.cuda.is_available():
        return {"device": "no GPU"}
    return machine.described(plan.device)


def _place(plan: EvaluationPlan) -> str:
    return storage.join(plan.recipe.report_uri, "timing.json")


def _entries(plan: EvaluationPlan) -> list[dict[str, Any]]:
    return storage.read_json(_place(plan)) if storage.exists(_place(plan)) else []


def _named(sampler: Sampler) -> list[Any]:
    return json.loads(json.dumps([type(sampler).__name__, dataclasses.asdict(sampler)]))


def _speed(found: dict[str, Any]) -> Speed:
    return Speed(**found | {"rounds": tuple(found["rounds"]), "encoder": tuple(found.get("encoder", ()))})
