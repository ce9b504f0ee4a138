"""A step of distillation by its parts, and the stream of pairs beside what a step consumes."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from dataclasses import replace

import torch

from pipeline import storage
from pipeline.benchmark.sheet import Claim, Row, Section
from pipeline.benchmark.steps import WHOLE, pieces
from pipeline.host.ahead import timed
from pipeline.models import standin
from pipeline.numerics.precision import set_products
from pipeline.pairs.stream import Pairs, PairStream
from pipeline.recipe import Recipe
from pipeline.text import encoder
from pipeline.training import batches as training_data
from pipeline.training import step as training_step
from pipeline.training.plan import at_once
from pipeline.training.state import TrainingState
from pipeline.workflow import generate

ROWS = 4_096  # of the sets that are streamed
STEPS = 40  # optimiser steps whose waiting is counted


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
