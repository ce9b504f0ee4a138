"""What generation and training take of a card, beside what a dry run predicts; and how fast training is on one card."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace

import torch

from pipeline.device import card
from pipeline.device.notes import Notes
from pipeline.host.stopwatch import WARM_UP, now
from pipeline.models import checkpoints
from pipeline.numerics.footprint import Footprint
from pipeline.numerics.precision import set_products
from pipeline.pairs.facts import PairFacts
from pipeline.pairs.memory import batch_size, trace_replica
from pipeline.pairs.replica import Replica
from pipeline.recipe import Recipe
from pipeline.training import batches, perceptual
from pipeline.training import step as training
from pipeline.training.losses import Loss
from pipeline.training.memory import trace_worker
from pipeline.training.plan import at_once
from pipeline.training.state import TrainingState

MOST = 20  # optimiser steps that are counted


class Trainee:
    """A student, its loss and its batch on a device, of one worker that takes the whole ``train.batch``.

    LPIPS has its shape and random weights: its trunk would be a download.
    """

    def __init__(self, recipe: Recipe, samples: int) -> None:
        """``samples`` are those of the batch; ``train.micro_batch`` cuts it as in the job."""
        self.device = torch.device(recipe.cluster.runs_on)
        settings = training.settled(recipe.train, self.device)
        set_products(settings.precision)
        torch.backends.cudnn.benchmark = self.device.type == "cuda"  # as the job does
        plain = replace(recipe, train=replace(settings, lpips=0.0))
        student, loss = training.build(plain, self.device)
        network = perceptual.network(settings.perceptual, pretrained=False) if settings.lpips else None
        self.loss = Loss(settings, loss.tokenizer, network and network.to(self.device))
        self.student, self.state = student, TrainingState(student, settings)
        training.prepare(student, self.loss)
        layout = checkpoints.config(recipe.teacher).layout
        made_up = batches.made_up(layout, samples)
        self.batch = batches.noised(made_up, 0, settings, layout, loss.tokenizer.codebook)

    def step(self) -> float:
        """One optimiser step; the clock's seconds after it."""
        training.step(self.student, self.loss, self.state, self.batch, total=2 * MOST)
        return now(self.device)


def measure(recipe: Recipe, notes: Notes) -> None:
    """Note what a batch of pairs and a step of training take beside what is predicted, GB.

    Memory that torch frees stays reserved until it is told otherwise, so nvidia-smi is asked after the work. Raises
    whatever torch raises, that the memory is too small among it.
    """
    batch = batch_size(recipe)  # once: tracing takes seconds of the card's time
    recipe = replace(recipe, pairs=replace(recipe.pairs, batch=batch))
    samples = {"teacher": batch, "step": at_once(recipe.train)}
    traced = {"teacher": trace_replica(recipe), "step": trace_worker(recipe)}
    predicted = {key: _bytes(traced[key], samples[key], recipe) for key in samples}
    for key in samples:
        notes.put(**{f"{key}_samples": samples[key], f"{key}_predicted": predicted[key] / 1e9})
    facts, cuda = PairFacts.of(recipe), recipe.cluster.runs_on == "cuda"

    def generate() -> None:
        Replica(recipe, facts).measure()

    def train() -> None:
        trainee = Trainee(recipe, samples["step"])
        for _ in range(WARM_UP):  # from the second on, the optimiser has its moments
            trainee.step()

    works: dict[str, Callable[[], None]] = {"teacher": generate, "step": train}
    for key, work in works.items():
        if notes.left <= 0:
            return
        if cuda:
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        work()
        if cuda:
            _note(key, predicted[key], notes)


def _note(key: str, predicted: float, notes: Notes) -> None:
    """The card's memory at its most since it was last asked to forget, and as it is now by nvidia-smi."""
    reserved, used = torch.cuda.max_memory_reserved(), card.asked("memory.used")
    notes.put(**{f"{key}_allocated": torch.cuda.max_memory_allocated() / 1e9, f"{key}_reserved": reserved / 1e9})
    notes.put(**{f"{key}_used": float(used) * 2**20 / 1e9 if used else None, f"{key}_share": reserved / predicted})


def _bytes(traced: Footprint, samples: int, recipe: Recipe) -> float:
    """As a dry run says it: with a GPU's libraries, or a process's share alone on a CPU."""
    return traced.bytes(samples) if recipe.cluster.runs_on == "cuda" else traced.fixed + traced.sample * samples


def train(recipe: Recipe, notes: Notes) -> None:
    """Note the optimiser steps a second of one worker on the whole ``train.batch``.

    Passes are of ``train.micro_batch`` samples; where those do not fit, of half as many, and so on.
    """
    passes = recipe.train.micro_batch or recipe.train.batch
    while True:
        settings = replace(recipe.train, workers=0, micro_batch=passes)
        try:
            ends = _ends(replace(recipe, train=settings), notes)
            break
        except torch.OutOfMemoryError:
            notes.put(f"{passes} samples in one pass do not fit.")
            if passes == 1:
                raise
            passes //= 2
        gc.collect()
        torch.cuda.empty_cache()
    rate = (len(ends) - 1) / (ends[-1] - ends[0])
    notes.put(steps_rate=rate, samples_rate=rate * recipe.train.batch, batch=recipe.train.batch)
    notes.put(at_once=passes, steps=len(ends) - 1)


def _ends(recipe: Recipe, notes: Notes) -> list[float]:
    """The moments at which steps ended, those to warm up left out: two of them, and more while there is time."""
    trainee = Trainee(recipe, recipe.train.batch)
    ends = [trainee.step() for _ in range(WARM_UP)][-1:]
    while len(ends) < 2 or (len(ends) <= MOST and notes.left > 2 * (ends[-1] - ends[-2])):
        ends.append(trainee.step())
    trainee.state.check()
    return ends
