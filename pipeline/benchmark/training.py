"""A step of distillation by its parts, and the stream of pairs beside what a step consumes.

The parts are the very functions of ``training.step``, one by one.
"""

from __future__ import annotations

import itertools
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from statistics import median
from types import SimpleNamespace
from typing import Any

import torch

from pipeline import storage
from pipeline.benchmark.sheet import Claim, Row, Section
from pipeline.host.ahead import timed
from pipeline.host.stopwatch import WARM_UP, now
from pipeline.models import checkpoints, standin
from pipeline.models.base import Student
from pipeline.models.conditions import Condition, Encode, Prompts
from pipeline.numerics.precision import autocast, set_products
from pipeline.pairs.stream import Pairs, PairStream
from pipeline.recipe import Recipe
from pipeline.text import encoder
from pipeline.training import batches as training_data
from pipeline.training import step as training_step
from pipeline.training.batches import Batch
from pipeline.training.losses import Loss
from pipeline.training.plan import at_once
from pipeline.training.state import TrainingState
from pipeline.workflow import generate

ROWS = 4_096  # of the sets that are streamed
STEPS = 40  # optimiser steps whose waiting is counted
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
    student, loss = training_step.build(recipe, device)
    state = TrainingState(student, recipe.train)
    training_step.prepare(student, loss)
    layout, samples = checkpoints.config(recipe.teacher).layout, at_once(recipe.train)
    pairs, encode = training_data.made_up(layout, samples), encoder.conditioner(recipe.text, device)
    total = 2 * (WARM_UP + repeats)

    def batch(encode: Encode) -> Batch:
        return training_data.noised(pairs, 0, recipe.train, layout, loss.tokenizer.codebook, encode)

    def whole() -> None:
        training_step.step(student, loss, state, batch(encode), total)

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


def parts(recipe: Recipe, device: torch.device) -> tuple[Section, float]:
    """Where one optimiser step goes; and its samples a second."""
    found = pieces(recipe, device)
    samples, whole = at_once(recipe.train), found[WHOLE]
    weights = f"cross-entropy {recipe.train.cross_entropy:g}, perceptual {recipe.train.lpips:g}"
    section = Section(
        "A training step",
        f"One optimiser step of {samples} samples on one worker ({weights}, {recipe.train.precision}), medians of five;"
        " its parts in turns with the whole. Targets are decoded once, without gradients.",
    )
    for name, seconds in sorted(found.items(), key=lambda part: part[0] == WHOLE):
        section.rows.append({"part": name, "ms": 1000 * seconds, "share, %": 100 * seconds / whole})
    return section, samples / whole


def stream(recipe: Recipe, folder: str, device: torch.device, rate: float) -> Section:
    """Pairs a second of the stream that training reads, beside a step's ``rate``; and what real steps wait for it."""
    section = Section(
        "The stream of pairs",
        f"{ROWS:,} pairs of this teacher's shape in Parquet, shuffled and read as training reads them, and what"
        f" {STEPS} optimiser steps waited for their batches.",
    )
    for kind in ("stored", "derived"):
        place = storage.join(folder, f"stream-{kind}")
        idle = standin.of(recipe, place)
        pairs = replace(recipe.pairs, uri=storage.join(place, "pairs"), count=ROWS, shard_rows=512, noise=kind)
        idle = replace(idle, run=place, pairs=replace(pairs, actors=1))
        generate.generate(idle)
        read = PairStream.open(idle.pairs_uri)
        speed = _rate(read, recipe.train.batch)
        waited = _waited(recipe, read, device)
        row: Row = {"noise": kind, "pairs / s": speed, "a step's": rate, "stream / step": speed / rate}
        section.rows.append(row | {"waiting in training, %": 100 * waited})
        section.claims.append(Claim(f"Stream over step, noise {kind}, {device.type}", speed / rate, 10.0))
        section.claims.append(Claim(f"Share of time waiting for data, noise {kind}, {device.type}", waited, 0.02, True))
    return section


def _rate(pairs: PairStream, batch: int) -> float:
    """Pairs a second after the first batch, nobody using them."""
    batch = min(batch, 256)
    batches = pairs.batches(0, 0, batch)
    next(batches)
    start, rows = time.perf_counter(), 0
    for one in batches:
        rows += len(one.ids)
    return rows / (time.perf_counter() - start)


def _endless(pairs: PairStream, batch: int, steps: int) -> Iterator[tuple[int, Pairs]]:
    """(epoch, batch) of so many steps."""
    epochs = (zip(itertools.repeat(epoch), pairs.batches(epoch, 0, batch)) for epoch in itertools.count())
    return itertools.islice(itertools.chain.from_iterable(epochs), steps)


def _waited(recipe: Recipe, pairs: PairStream, device: torch.device) -> float:
    """Share of the time of some real optimiser steps that went into waiting for the next batch."""
    set_products(recipe.train.precision)
    student, loss = training_step.build(recipe, device)
    state, settings = TrainingState(student, recipe.train), recipe.train
    encode = encoder.conditioner(recipe.text, device)
    training_step.prepare(student, loss)
    waiting = start = 0.0
    for step, (waited, (epoch, share)) in enumerate(timed(_endless(pairs, settings.batch, STEPS + 2))):
        if step == 2:  # the first open files and threads
            waiting, start = -waited, time.perf_counter()
        waiting += waited
        batch = training_data.noised(share, epoch, settings, pairs.layout, loss.tokenizer.codebook, encode)
        training_step.step(student, loss, state, batch, STEPS + 2)
        if device.type == "cuda":
            torch.cuda.synchronize()
    return waiting / (time.perf_counter() - start)
