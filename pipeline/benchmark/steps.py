"""Where the time of an optimiser step goes, for the benchmark: the very functions of ``training.step``, one by one."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from statistics import median
from types import SimpleNamespace
from typing import Any

import torch

from pipeline.host.stopwatch import WARM_UP, now
from pipeline.models import checkpoints
from pipeline.models.base import Student
from pipeline.models.conditions import Condition, Encode, Prompts
from pipeline.numerics.precision import autocast, set_products
from pipeline.recipe import Recipe
from pipeline.text import encoder
from pipeline.training import batches, step
from pipeline.training.batches import Batch
from pipeline.training.losses import Loss
from pipeline.training.plan import at_once
from pipeline.training.state import TrainingState

WHOLE = "whole step"


class Clock:
    """Seconds by name. A GPU is waited for at both ends of what is timed, which an undisturbed step does not do."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: defaultdict[str, float] = defaultdict(float)

    def time(self, name: str, call: Callable[..., Any], *args: Any) -> Any:
        """What ``call`` returns; its seconds are added to those of ``name``."""
        start = now(self.device)
        out = call(*args)
        self.seconds[name] += now(self.device) - start
        return out


def pieces(recipe: Recipe, device: torch.device, repeats: int = 5) -> dict[str, float]:
    """Seconds, medians of ``repeats``, of an optimiser step on as many samples as a worker of the recipe takes at once.

    The parts are "batch" (t and X_t, on the device), "text encoder" (of made-up prompts), "student", "cross-entropy"
    (with the log's accuracy and the mixing of codes into embeddings), "decode", "decode of the target", "perceptual",
    "backward" and "optimiser and average"; what the recipe leaves out is missing. "whole step" is timed beside them, in
    turns with them and without a wait inside, so on a GPU the parts may add up to more: the difference is what their
    waits cost. With ``train.recompute`` what is computed again is part of "backward". The student starts from the
    recipe's weights and moves a little at each repetition. Sets the process's products to ``train.precision``; the
    caller sets its threads.
    """
    set_products(recipe.train.precision)
    student, loss = step.build(recipe, device)
    state = TrainingState(student, recipe.train)
    step.prepare(student, loss)
    layout, samples = checkpoints.config(recipe.teacher).layout, at_once(recipe.train)
    pairs, encode = batches.made_up(layout, samples), encoder.conditioner(recipe.text, device)
    total = 2 * (WARM_UP + repeats)

    def batch(encode: Encode) -> Batch:
        return batches.noised(pairs, 0, recipe.train, layout, loss.tokenizer.codebook, encode)

    def whole() -> None:
        step.step(student, loss, state, batch(encode), total)

    found = defaultdict(list)
    for repeat in range(WARM_UP + repeats):
        clock = Clock(device)
        clock.time(WHOLE, whole)
        _apart(clock, batch, encode, student, loss, state, total)
        for name, seconds in clock.seconds.items() if repeat >= WARM_UP else ():
            found[name].append(seconds)
    return {name: median(seconds) for name, seconds in found.items()}


def _apart(
    clock: Clock,
    batch: Callable[[Encode], Batch],
    encode: Encode,
    student: Student,
    loss: Loss,
    state: TrainingState,
    total: int,
) -> None:
    """``training.step.step`` on one part of a batch, with the clock between the functions that it calls."""
    within = Clock(clock.device)

    def encoded(condition: Condition) -> Condition:
        asked = isinstance(condition, Prompts)
        return within.time("text encoder", encode, condition) if asked else encode(condition)

    made: Batch = clock.time("batch", batch, encoded)
    clock.seconds["batch"] -= sum(within.seconds.values())
    clock.seconds.update(within.seconds)
    within = Clock(clock.device)
    watched = _watched(loss, within)
    with autocast(state.settings.precision, clock.device):
        prediction = clock.time("student", student, made.x_t, made.t, made.condition)
        value, _ = clock.time("cross-entropy", watched, prediction, made.tokens, made.t)
    clock.seconds["cross-entropy"] -= sum(within.seconds.values())
    clock.seconds.update(within.seconds)
    clock.time("backward", value.backward)
    clock.time("optimiser and average", state.advance, total)


def _watched(loss: Loss, clock: Clock) -> Loss:
    """The same loss on the same networks, whose calls are timed."""
    tokenizer, network = loss.tokenizer, loss.network

    def decode(embeddings: torch.Tensor) -> torch.Tensor:
        name = "decode" if torch.is_grad_enabled() else "decode of the target"
        return clock.time(name, tokenizer.decode, embeddings)

    seen: Any = SimpleNamespace(decode=decode, codebook=tokenizer.codebook, layout=tokenizer.layout)
    scored: Any = network and (lambda a, b: clock.time("perceptual", network, a, b))
    return Loss(loss.settings, seen, scored)
