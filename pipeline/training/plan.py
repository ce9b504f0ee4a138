"""What a distillation run will do: the cheap checks, its facts and fingerprint, the claim on the student's folder."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from pipeline import storage
from pipeline.generator import folder
from pipeline.host.errors import Refused
from pipeline.models import checkpoints
from pipeline.models.base import Layout
from pipeline.numerics import compilation
from pipeline.pairs import manifest
from pipeline.pairs.facts import PairFacts
from pipeline.recipe import Recipe, fingerprint, leaves
from pipeline.settings.train import TrainSettings
from pipeline.training.perceptual import TRUNKS, trunk_file

# Fields of TrainSettings that change where a run lies, how fast it is or how often it speaks, but not its student.
SPEED = ("workers", "micro_batch", "compile", "recompute")
NOT_FACTS = (
    *SPEED, "uri", "hang_minutes", "checkpoint_every", "keep", "log_every", "snapshots", "export", "tokenizer",
)  # fmt: skip

# Fields that came after students had been made: where they say what was done before them, facts do not name them, so
# that those students keep their fingerprints.
LATER = {"optimizer": "adamw", "start_weights": None}


@dataclass(frozen=True)
class TrainingPlan:
    """A recipe that passed the cheap checks, with what they found."""

    recipe: Recipe
    layout: Layout
    teacher: dict[str, str]
    pairs_fingerprint: str

    @property
    def facts(self) -> dict[str, Any]:
        """All that the student depends on, float rounding aside."""
        settings = self.recipe.resolved()["train"]
        train = {k: v for k, v in settings.items() if k not in NOT_FACTS and LATER.get(k, ...) != v}
        count = self.recipe.pairs.count
        return {"pairs": {"fingerprint": self.pairs_fingerprint, "count": count}, "train": train}

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.facts)

    @property
    def held_out(self) -> int:
        """Rows at the end of the set that no step trains on: 2 %, from 8 to 512."""
        return min(512, max(8, self.recipe.pairs.count // 50))

    @property
    def rows(self) -> int:
        """Rows at the beginning of the set that steps train on."""
        return self.recipe.pairs.count - self.held_out

    @property
    def per_epoch(self) -> int:
        """Optimiser steps of an epoch; a last batch that would not be full is dropped."""
        return self.rows // self.recipe.train.batch

    @property
    def total(self) -> int:
        return self.per_epoch * self.recipe.train.epochs

    @property
    def snapshot_steps(self) -> list[int]:
        wanted = self.recipe.train.snapshots
        return [round(self.total * k / wanted) for k in range(1, wanted + 1)]

    @property
    def result(self) -> str:
        return folder.weights(self.at())

    @property
    def released(self) -> str:
        """The student as the authors' scripts read it, with ``train.export`` released."""
        return self.at("student.pth")

    def at(self, *names: str) -> str:
        """A place in the student's folder."""
        return storage.join(self.recipe.student_uri, *names)

    def metadata(self, step: int, mlflow_run: str) -> dict[str, Any]:
        """What an exported student says of itself."""
        recipe = self.recipe
        return {
            "family": recipe.teacher.family,
            "config": recipe.resolved()["teacher"]["config"],
            **recipe.train.student_options,
            "split": recipe.train.split,
            "start_steps": list(recipe.train.start_steps),
            "step": step,
            "steps_per_epoch": self.per_epoch,
            "pairs_count": recipe.pairs.count,
            "pairs_fingerprint": self.pairs_fingerprint,
            "teacher": self.teacher,
            "mlflow_run": mlflow_run,
            "recipe_fingerprint": self.fingerprint,
        }


def check(recipe: Recipe, facts: PairFacts | None = None) -> TrainingPlan:
    """Every check that costs seconds; ValueError or FileNotFoundError with one sentence.

    A dry run may plan for pairs that are not there yet. ``facts`` are those of its pair set, where the caller has them.
    """
    check_losses(recipe.train, checkpoints.config(recipe.teacher).layout)
    facts = facts or manifest.facts_of(recipe)
    manifest.check_claim(recipe.pairs_uri, facts)
    plan = TrainingPlan(
        recipe=recipe,
        layout=facts.layout,
        teacher=facts.checksums,
        pairs_fingerprint=facts.fingerprint,
    )
    if recipe.train.export == "released" and not checkpoints.family(recipe.teacher).Student.released:
        raise Refused(
            f"train.export is released, but nobody released students of {recipe.teacher.family}, whose layout the file"
            " could have; use safetensors."
        )
    if recipe.cluster.runs_on == "cuda" and not recipe.train.workers and not torch.cuda.is_available():
        raise Refused(
            f"cluster.gpus is {recipe.cluster.gpus:g} and train.workers 0, but this machine has no GPU; set"
            " cluster.gpus to 0, or train.workers to the number of GPUs of the cluster."
        )
    if recipe.train.compile:
        compilation.check("train.compile", recipe.cluster.runs_on)
    claimed(plan)
    if not recipe.dry_run:  # a set may be begun small and grow
        check_batch(plan)
        count = manifest.read(recipe.pairs_uri, plan.pairs_fingerprint)["count"]
        if count < recipe.pairs.count:
            raise Refused(
                f"{recipe.pairs_uri} holds {count} pairs and pairs.count is {recipe.pairs.count}; run"
                f" generate_pairs with this recipe, or set pairs.count to {count}."
            )
    return plan


def check_losses(settings: TrainSettings, layout: Layout) -> None:
    """Raise ValueError, one sentence, for losses that cannot train a student of this layout.

    Start steps and split must lie inside the layout, a head must be trained if the split leaves it tokens to speak for
    (the embedding head only if), and the perceptual network's weights must be there.
    """
    steps, split, last = layout.steps, settings.split, settings.start_steps[-1]
    if last > steps:
        raise Refused(
            f"train.start_steps holds {last}, but the teacher's AR steps run from 1 to {steps}; leave it out."
        )
    if split > steps:
        raise Refused(f"train.split is {split}, but the teacher has {steps} AR steps; use 0 to {steps}.")
    if split == steps and settings.lpips > 0:
        raise Refused(
            f"train.split {split} gives every AR step to the logits, so train.lpips {settings.lpips} has no"
            f" embedding to train; set train.lpips to 0 or train.split below {steps}."
        )
    if split < steps and settings.lpips == 0:
        raise Refused(
            f"train.lpips is 0, so nothing trains the embedding head that train.split {split} uses after AR"
            f" step {split}; set train.lpips above 0 or train.split to {steps}."
        )
    if split > 0 and settings.cross_entropy == 0:
        raise Refused(
            f"train.cross_entropy is 0, so nothing trains the logits that train.split {split} uses up to AR"
            f" step {split}; set train.cross_entropy above 0 or train.split to 0."
        )
    if settings.lpips > 0 and settings.perceptual == "digits" and layout.image_size > 32:
        raise Refused(
            f"train.perceptual is digits, made for images of 32 pixels, and the teacher's have"
            f" {layout.image_size}; use vgg."
        )
    if settings.lpips > 0 and settings.perceptual in TRUNKS:
        trunk_file(settings.perceptual)


def check_batch(plan: TrainingPlan) -> None:
    """ValueError for a set without a single whole batch."""
    recipe = plan.recipe
    if plan.per_epoch < 1:
        raise Refused(
            f"pairs.count {recipe.pairs.count} leaves {max(0, plan.rows)} pairs to train on beside the"
            f" {plan.held_out} held out, fewer than train.batch {recipe.train.batch}; generate more pairs or"
            " make the batch smaller."
        )


def at_once(settings: TrainSettings) -> int:
    """Samples that a worker takes through the networks together, at most."""
    share = math.ceil(settings.batch / max(1, settings.fewest))
    return min(settings.micro_batch or share, share)


def claimed(plan: TrainingPlan) -> dict[str, Any] | None:
    """What an earlier call wrote into the student's folder, or None; ValueError if that was another recipe's."""
    place = plan.at("recipe.json")
    if not storage.exists(place):
        if storage.exists(plan.result):
            raise Refused(
                f"{plan.at()} holds {plan.result.rpartition('/')[2]} but no recipe.json to say whose; set train.uri (or"
                " run) to another folder."
            )
        return None
    owner = storage.read_json(place)
    if not (isinstance(owner, dict) and {"fingerprint", "facts"} <= owner.keys()):
        raise Refused(f"{place} is not what distill wrote; set train.uri (or run) to another folder, or restore it.")
    if owner["fingerprint"] == plan.fingerprint:
        return owner
    unsaid = leaves({"train": LATER})
    old, new = unsaid | leaves(owner["facts"]), unsaid | leaves(plan.facts)
    name = next(name for name in sorted(old | new) if old.get(name) != new.get(name))
    raise Refused(
        f"{plan.at()} holds a student of other settings: {name} is {old.get(name)} there and {new.get(name)}"
        " here; set train.uri or run to another folder, or go back to the recipe that it was made with."
    )


def claim(plan: TrainingPlan, mlflow_run: str) -> None:
    """Write recipe.json into the student's folder: whose it is, and which MLflow run a resumed job continues.

    What killed writers left there is swept: a checkpoint cut short can be gigabytes.
    """
    storage.sweep(plan.at())
    storage.sweep(plan.at("checkpoints"))
    content = {"fingerprint": plan.fingerprint, "facts": plan.facts, "mlflow_run": mlflow_run}
    storage.write_json(plan.at("recipe.json"), content | {"recipe": plan.recipe.resolved()})
