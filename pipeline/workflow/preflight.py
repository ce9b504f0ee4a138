"""All that can be known before a job begins: what it and the jobs that follow it will miss, as one list.

A pair set of days is of little use when the third job then finds no Inception weights. So a job checks its own inputs
and those of the jobs after it (``preflight: this`` leaves these out), and what it finds is said together. ``check``
needs neither Ray nor a GPU. ``check_workers`` looks from where the work will be done: whether the machines there see
the folders and files that this process sees, and whether what a replica holds fits into their GPUs.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import torch

from pipeline import storage
from pipeline.evaluation import plan
from pipeline.evaluation.memory import trace_actor
from pipeline.files.local import TEMPORARY
from pipeline.host import events
from pipeline.host.errors import Missing, Outage, Refused
from pipeline.models import checkpoints
from pipeline.numerics import compilation
from pipeline.numerics.footprint import Footprint
from pipeline.numerics.precision import emulates_bf16
from pipeline.pairs import manifest
from pipeline.pairs.facts import PairFacts
from pipeline.pairs.memory import trace_replica
from pipeline.recipe import Recipe
from pipeline.services import cluster, mlflow_store, registry
from pipeline.settings.evaluate import FORMULA
from pipeline.training import perceptual
from pipeline.training import plan as training_plan
from pipeline.training.memory import trace_worker

Job = Literal["generate_pairs", "distill", "evaluate"]
JOBS: tuple[Job, ...] = get_args(Job)
TEXT = ("captions", "text")  # sections that all jobs read, where the teacher takes prompts


def check_services(recipe: Recipe) -> None:
    """Every job's first question: whether RAY_ADDRESS and the place of MLflow's store can be meant."""
    cluster.check_address()
    mlflow_store.check(recipe)


@dataclass(frozen=True)
class Finding:
    """What one job would miss."""

    job: Job
    error: Refused | Outage


def check(recipe: Recipe, job: Job) -> None:
    """Refuse a recipe whose inputs are not all there, before anything is claimed, written or started.

    Raises what the only finding is, or Refused with a numbered list of several. RAY_ADDRESS and the MLflow store are
    looked at first.
    """
    check_services(recipe)
    missing = findings(recipe, job)
    if len(missing) == 1 and missing[0].job == job:
        raise missing[0].error
    if missing:
        later = any(one.job != job for one in missing)
        advice = " Mend them, or begin all the same with --preflight this." if later else ""
        raise Refused(f"{listed(missing)}{advice}")


def findings(recipe: Recipe, job: Job) -> list[Finding]:
    """Everything that is wrong with the inputs of ``job`` and of the jobs that follow it; a sentence is said once."""
    out: dict[str, Finding] = {}
    following = JOBS[JOBS.index(job) :] if recipe.preflight == "all" else (job,)
    for stage in following:
        for one in CHECKS[stage]:
            try:
                one(recipe)
            except (Refused, Outage) as error:
                out.setdefault(str(error), Finding(stage, error))
    return list(out.values())


def listed(missing: list[Finding]) -> str:
    """The findings as one text, by job."""
    if len(missing) == 1:
        return f"{missing[0].job} would fail: {missing[0].error}"
    lines = (f"({number}) {one.job}: {one.error}" for number, one in enumerate(missing, 1))
    return f"{len(missing)} things are missing for the jobs of this recipe. {' '.join(lines)}"


# ---- what each job needs


def check_teacher(recipe: Recipe) -> None:
    """Both weight files are there and fit the networks of the recipe; no memory is taken for either."""
    recipe.check_filled("teacher")
    checkpoints.checksums(recipe.teacher)
    checkpoints.check(recipe.teacher)
    if recipe.teacher.compile:
        compilation.check("teacher.compile", recipe.cluster.runs_on)


def check_pairs(recipe: Recipe) -> None:
    """The folder is free or holds this very set."""
    recipe.check_filled("pairs", *TEXT)
    manifest.check_claim(recipe.pairs_uri, PairFacts.of(recipe))


def check_training(recipe: Recipe) -> None:
    """Everything but the pairs themselves, which may be still to come."""
    recipe.check_filled("train", *TEXT)
    training_plan.check(replace(recipe, dry_run=True))


def check_evaluation(recipe: Recipe) -> None:
    """Samplers against the layout, scoring network, reference and registry; neither student nor pairs."""
    recipe.check_filled("evaluate", *TEXT)
    plan.inputs(recipe)
    registry.check(recipe)


CHECKS: dict[Job, tuple[Callable[[Recipe], None], ...]] = {
    "generate_pairs": (check_teacher, check_pairs),
    "distill": (check_teacher, check_training),
    "evaluate": (check_teacher, check_evaluation),
}


# The sections of the recipe whose ``precision`` says how the networks of a job multiply.
NETWORKS: dict[Job, tuple[str, ...]] = {
    "generate_pairs": ("teacher",),
    "distill": ("train",),
    "evaluate": ("teacher", "evaluate"),
}


# ---- from where the work is done


@dataclass(frozen=True)
class View:
    """What a process of the cluster sees: its machine, the file that it wrote, the files that it lacks, its GPU with
    the bytes of that, 0 without one, and whether its CPU is slow at bfloat16.
    """

    node: str
    probe: str
    missing: tuple[str, ...]
    gpu: str
    memory: int
    emulates_bf16: bool


def check_workers(recipe: Recipe, job: Job, folder: str) -> None:
    """Inside ``cluster.session``: whether all machines see the same folder and files, and a replica fits into a GPU.

    Every node, and a worker with the resources of a replica where a node for it may be still to come, writes a small
    file into ``folder``, which this process must then see. Where all is on one machine, only a GPU is looked at. Raises
    Refused or Missing, one sentence.
    """
    alone = cluster.on_one_machine(recipe)
    if alone and recipe.cluster.runs_on != "cuda":
        warn_of_bf16(recipe, job, emulates_bf16())
        return
    views = cluster.on_every_node(recipe, look, folder, list(local_files(recipe, job)))
    seen = set(storage.listing(folder))
    for view in views:
        storage.remove(storage.join(folder, view.probe))
    for view in views:
        if view.probe not in seen:
            raise Refused(
                f"{folder} is not the same folder on all machines: what node {view.node} writes there, this process"
                " does not see. Set run to a folder that every node shares, or to an s3:// or gs:// URI."
            )
        if view.missing:
            raise Missing(
                f"node {view.node} does not have {', '.join(view.missing)}, which this machine has; put it on storage"
                " that every node shares, or give an s3://, gs:// or hf:// URI."
            )
        if view.memory:
            check_memory(recipe, job, view)
    warn_of_bf16(recipe, job, any(view.emulates_bf16 for view in views))


def look(folder: str, files: list[str]) -> View:
    """In a worker: write a small file into the folder, and say what else is here."""
    probe = f"{TEMPORARY}probe-{uuid.uuid4().hex}"
    storage.write_bytes(storage.join(folder, probe), b"probe")
    missing = tuple(file for file in files if not Path(file).exists())
    node = os.uname().nodename
    if not torch.cuda.is_available():
        return View(node, probe, missing, "", 0, emulates_bf16())
    gpu = torch.cuda.get_device_properties(0)
    return View(node, probe, missing, gpu.name, gpu.total_memory, emulates_bf16())


def warn_of_bf16(recipe: Recipe, job: Job, emulated: bool) -> None:
    """Say which precision of ``job`` slows it down where CPUs work that have no instructions for bfloat16."""
    if recipe.cluster.runs_on == "cuda" or not emulated:
        return
    for section in (*NETWORKS[job], *["text"] * bool(recipe.text.encoder)):
        if getattr(recipe, section).precision == "bf16":
            events.warn(
                f"warning: {section}.precision is bf16, for which the CPU has no instructions: products take several"
                f" times as long as in fp32. --{section}.precision fp32 is faster; its numbers differ in rounding."
            )


def local_files(recipe: Recipe, job: Job) -> Iterator[str]:
    """Files on this machine's disks that the workers of ``job`` will open."""
    teacher, evaluate = recipe.teacher, recipe.evaluate
    uris = [teacher.tokenizer, teacher.checkpoint]
    if job == "evaluate":
        given = [evaluate.student, *evaluate.students.values(), evaluate.reference, evaluate.images]
        given += [evaluate.captions.uri, evaluate.clip, *[evaluate.dinov2] * (evaluate.dinov2 != FORMULA)]
        uris += [uri for uri in given if uri]
    uris += [uri for uri in (recipe.captions.uri, recipe.text.encoder) if uri]
    for uri in uris:
        if not uri.startswith(("package://", "models:/")) and not storage.is_remote(uri):
            yield storage.resolve(uri)
    if job == "distill" and recipe.train.lpips and recipe.train.perceptual in perceptual.TRUNKS:
        yield str(perceptual.trunk_file(recipe.train.perceptual))


def check_memory(recipe: Recipe, job: Job, view: View) -> None:
    """Hold the traced need of one replica against its GPU: Refused where it cannot fit, a warning where it may not.

    What recordings of an evaluation keep is known less well than the rest, so where they are made it is a warning, too.
    """
    need, batch, field = _needed(recipe, job)
    room = view.memory * min(1.0, recipe.cluster.gpus)
    text = (
        f"{field} {batch} needs about {need.bytes(batch) / 1e9:,.1f} GB of a GPU, and {view.gpu} on node {view.node}"
        f" has {room / 1e9:,.1f} GB for it; at most {need.largest(room / 1e9)} fit."
    )
    recorded = job == "evaluate" and recipe.records("evaluate")
    if need.fixed + need.sample * batch > room and not recorded:
        raise Refused(text)
    if need.bytes(batch) > room:
        events.warn(f"warning: {text}" + " With evaluate.graphs false it needs less." * recorded)


def _needed(recipe: Recipe, job: Job) -> tuple[Footprint, int, str]:
    """What one replica of a job takes, for how many samples at once, and the field that says so many."""
    if job == "generate_pairs":
        batch = recipe.pairs.batch
        return trace_replica(recipe), 1 if batch == "auto" else batch, "pairs.batch"
    if job == "distill":
        return trace_worker(recipe), training_plan.at_once(recipe.train), "train.micro_batch"
    return trace_actor(recipe, plan.inputs(recipe).samplers), recipe.evaluate.batch, "evaluate.batch"
