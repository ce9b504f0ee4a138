"""Distillation (Alg. 2) at scale: a Ray Train loop that turns noise-token pairs into a few-step student.

The driver makes every cheap check, claims the folder, starts the MLflow run and hands over to ``train``, which runs in
each DDP worker, or in the driver's process when ``train.workers`` is 0. What a run computes is a function of its facts:
batches are arithmetic in (seed, epoch), t in (seed, epoch, sample id), so neither the number of workers nor an
interruption changes it beyond float rounding.
"""

from __future__ import annotations

import dataclasses
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import ray
import ray.train
import ray.train.torch
import torch
import torch.distributed
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.collective import broadcast_from_rank_zero
from ray.train.torch import TorchTrainer
from torch import Tensor

from pipeline import cluster, losses, manifest, noise, storage, tracking, training_state
from pipeline.losses import Loss
from pipeline.models import checkpoints
from pipeline.models.base import Condition, Layout, Student, Tokenizer
from pipeline.pairs import WINDOW, Pairs, PairStream, read_shard
from pipeline.recipe import Recipe, TrainSettings, fingerprint
from pipeline.snapshots import Observer
from pipeline.training_state import TrainingState

FAILURES = 2  # worker groups that Ray Train replaces, from the last checkpoint, before it gives up
NOT_FACTS = ("uri", "workers", "checkpoint_every", "keep", "log_every", "snapshots")  # do not change the student
RESULT = "student.safetensors"


@dataclass(frozen=True)
class Plan:
    """A recipe that passed the cheap checks, with what they found. ``recipe`` has absolute URIs."""

    recipe: Recipe
    layout: Layout
    teacher: dict[str, str]
    pairs_fingerprint: str

    @property
    def facts(self) -> dict[str, Any]:
        """All that the student depends on."""
        train = {k: v for k, v in self.recipe.resolved()["train"].items() if k not in NOT_FACTS}
        return {"pairs_fingerprint": self.pairs_fingerprint, "pairs": {"count": self.recipe.pairs.count}, "train": train}

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.facts)

    @property
    def held_out(self) -> int:
        """The last rows of the set, which no step trains on: 2 %, from 8 to 512."""
        return min(512, max(8, self.recipe.pairs.count // 50))

    @property
    def rows(self) -> int:
        return self.recipe.pairs.count - self.held_out

    @property
    def per_epoch(self) -> int:
        """Optimiser steps of an epoch; the rows of a last batch that is not full wait for the next permutation."""
        return self.rows // self.recipe.train.batch

    @property
    def total(self) -> int:
        return self.per_epoch * self.recipe.train.epochs

    @property
    def snapshot_steps(self) -> list[int]:
        wanted = self.recipe.train.snapshots
        return [round(self.total * k / wanted) for k in range(1, wanted + 1)]

    def at(self, *names: str) -> str:
        """A place in the student's folder."""
        return storage.join(self.recipe.student_uri, *names)


class Batch(NamedTuple):
    """Inputs and targets on the device: X_t [B, n, C], t [B], tokens [B, n] and the condition."""

    x_t: Tensor
    t: Tensor
    tokens: Tensor
    condition: Condition


# ---- the driver


def distill(recipe: Recipe) -> str:
    """Alg. 2: train the recipe's student, or what is left of it, and export it; returns a summary of a few lines.

    Raises ValueError or FileNotFoundError, one sentence, for a recipe, pair set, folder or weight file that does not fit,
    before anything expensive starts.
    """
    plan = check(recipe)
    if recipe.dry_run:
        return describe(plan)
    if storage.exists(plan.at(RESULT)):
        return f"Nothing is missing: {plan.at(RESULT)} is the student of this recipe."
    storage.check_writable(recipe.student_uri)
    before = claimed(plan) or {}
    with tracking.Run.start(recipe, "distill", before.get("mlflow_run")) as run:
        claim = {"fingerprint": plan.fingerprint, "facts": plan.facts, "recipe": recipe.resolved(), "mlflow_run": run.id}
        storage.write_json(plan.at("recipe.json"), claim)
        run.tag("pairs_fingerprint", plan.pairs_fingerprint)
        run.dataset("pairs", plan.recipe.pairs_uri, plan.pairs_fingerprint, "training")
        if source := run.previous("pairs", pairs_fingerprint=plan.pairs_fingerprint):
            run.tag("pairs_run", source)
        fit(plan, run)
        run.tag("student", storage.sha256(plan.at(RESULT)))
    return f"The student is {plan.at(RESULT)} after {plan.total} steps (MLflow run {run.id})."


def check(recipe: Recipe) -> Plan:
    """Every check that costs seconds; ValueError or FileNotFoundError with one sentence."""
    losses.check(recipe.train, checkpoints.config(recipe.teacher).layout)
    known = manifest.facts_of(recipe)
    manifest.check_claim(recipe.pairs_uri, known)
    plan = Plan(
        recipe=_absolute(recipe),
        layout=checkpoints.config(recipe.teacher).layout,
        teacher={name: known["teacher"][name] for name in ("tokenizer", "checkpoint")},
        pairs_fingerprint=fingerprint(known),
    )
    if plan.per_epoch < 1:
        raise ValueError(
            f"pairs.count {recipe.pairs.count} leaves {max(0, plan.rows)} pairs to train on beside the {plan.held_out} held"
            f" out, fewer than train.batch {recipe.train.batch}; generate more pairs or make the batch smaller."
        )
    if recipe.cluster.gpus and not recipe.train.workers and not torch.cuda.is_available():
        raise ValueError(
            f"cluster.gpus is {recipe.cluster.gpus:g} and train.workers 0, but this machine has no GPU; set cluster.gpus to"
            " 0, or train.workers to the number of GPUs of the cluster."
        )
    claimed(plan)
    if not recipe.dry_run:
        there = manifest.read(recipe.pairs_uri, plan.pairs_fingerprint)["count"]
        if there < recipe.pairs.count:
            raise ValueError(
                f"{recipe.pairs_uri} holds {there} pairs and pairs.count is {recipe.pairs.count}; run generate_pairs with"
                f" this recipe, or set pairs.count to {there}."
            )
    return plan


def claimed(plan: Plan) -> dict[str, Any] | None:
    """What an earlier call wrote into the student's folder, or None; ValueError if that was another recipe's."""
    place = plan.at("recipe.json")
    if not storage.exists(place):
        return None
    there = storage.read_json(place)
    if there["fingerprint"] == plan.fingerprint:
        return there
    old, new = tracking.flattened(there["facts"]), tracking.flattened(plan.facts)
    name = next(name for name in sorted(old | new) if old.get(name) != new.get(name))
    raise ValueError(
        f"{plan.at()} holds a student of other settings: {name} is {old.get(name)} there and {new.get(name)} here; set"
        " train.uri or run to another folder, or go back to the recipe that it was made with."
    )


def _absolute(recipe: Recipe) -> Recipe:
    """The recipe with every URI resolved: Ray's workers run in folders of their own."""
    teacher = dataclasses.replace(
        recipe.teacher,
        tokenizer=storage.resolve(recipe.teacher.tokenizer),
        checkpoint=storage.resolve(recipe.teacher.checkpoint),
        precision="fp32",  # whatever made the pairs, the student starts from the weights as they are
    )
    return dataclasses.replace(
        recipe,
        teacher=teacher,
        pairs=dataclasses.replace(recipe.pairs, uri=storage.resolve(recipe.pairs_uri)),
        train=dataclasses.replace(recipe.train, uri=storage.resolve(recipe.student_uri)),
    )


def fit(plan: Plan, run: tracking.Run) -> None:
    """Run ``train`` on the workers. Ray replaces a failed group; ``train`` finds the checkpoint by itself."""
    recipe = plan.recipe
    resources = {"CPU": recipe.cluster.cpus} | ({"GPU": recipe.cluster.gpus} if recipe.cluster.gpus else {})
    if recipe.train.workers:
        cluster.connect(recipe)
    TorchTrainer(
        train,
        train_loop_config={"plan": plan, "tracking": (run.uri, run.id)},
        scaling_config=ScalingConfig(
            num_workers=recipe.train.workers, use_gpu=recipe.cluster.gpus > 0, resources_per_worker=resources
        ),
        run_config=RunConfig(
            name=f"distill-{plan.fingerprint[:12]}-{uuid.uuid4().hex[:6]}",
            failure_config=FailureConfig(max_failures=FAILURES),
        ),
    ).fit()


# ---- every worker


def train(config: dict[str, Any]) -> None:
    """Alg. 2 on one worker of many, or on the only one."""
    plan: Plan = config["plan"]
    settings = plan.recipe.train

    # 1. This worker's share and device.
    rank, world = (f() for f in (ray.train.get_context().get_world_rank, ray.train.get_context().get_world_size))
    device = prepare_device(plan.recipe)

    # 2. The student starts from its teacher, of which only the tokenizer stays.
    student, tokenizer = from_teacher(plan.recipe, device)
    loss = build_loss(settings, tokenizer, device)
    state = TrainingState(student, settings)

    # 3. Or it goes on where the last checkpoint left it; rank 0's listing counts, should a folder be slow to agree.
    newest = broadcast_from_rank_zero(training_state.saved(plan.at("checkpoints"))[-1:])
    if newest:
        state.restore(plan.at("checkpoints", newest[0]))
    network = distributed(student, settings, device)

    # 4. Rank 0 also logs, looks at the held-out pairs and exports the moving average.
    stream = leading(plan)
    observer = Observer(plan, state, loss, held_out(plan, stream), *config["tracking"]) if rank == 0 else None

    # 5. Optimiser steps. Nothing waits for the device between two log lines.
    window = Window(settings, device)
    for epoch, pairs in batches(plan, stream, state.step, rank, world):
        batch = noised(pairs, epoch, settings, plan.layout, tokenizer.codebook)
        with autocast(settings, device):
            prediction = network(batch.x_t, batch.t, batch.condition)
            value, sums = loss(prediction, batch.tokens, batch.t)
        value.backward()
        window.add(sums, state.advance(plan.total))

        step, last = state.step, state.step == plan.total
        saving = step % settings.checkpoint_every == 0 or last
        looking = step in plan.snapshot_steps
        if step % settings.log_every == 0 or saving or looking:
            state.check()
            found = window.close(settings, world)
            if observer:
                observer.log(found)
                if looking:
                    observer.snapshot()
                if saving:
                    state.save(plan.at("checkpoints"))

    # 6. The result, written last: whoever finds it knows that nothing is missing.
    if observer:
        observer.export(plan.at(RESULT))
