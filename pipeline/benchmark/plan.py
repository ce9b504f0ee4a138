"""What a benchmark would measure and about how long that takes, for ``--dry_run``; nothing is run or written."""

from __future__ import annotations

import json
from collections.abc import Callable

from pipeline.benchmark.actors import PARTS, SHARDS
from pipeline.benchmark.growth import ACTORS, BATCHES, CODES, PAIRS, SIDES
from pipeline.benchmark.networks import listed
from pipeline.benchmark.rounding import TOKENS
from pipeline.benchmark.students import IMAGES, LOADS, ROUNDS, SHORT
from pipeline.benchmark.training import ROWS, STEPS
from pipeline.evaluation.draws import PART_IMAGES
from pipeline.host.progress import duration
from pipeline.recipe import Recipe


def describe(recipe: Recipe) -> str:
    """The resolved recipe, the place of the table, and one line for each section of ``recipe.benchmark``."""
    lines = [json.dumps(recipe.resolved(), indent=2), f"benchmark   {recipe.benchmark_uri}"]
    budget = 0.0
    for part in recipe.benchmark.sections:
        turns, beside = SECTIONS[part](recipe)
        budget += turns * recipe.benchmark.seconds + (part == "serving") * _serving_seconds(recipe)
        timed = f"{turns} measurements of {recipe.benchmark.seconds:g} s" if turns else ""
        lines.append(f"{part:<12}{', '.join(filter(None, (timed, beside)))}")
    gpus = f" and {recipe.cluster.gpus:g} GPU" if recipe.cluster.gpus else ""
    pool = max(recipe.pairs.replicas, recipe.evaluate.replicas)
    lines.append(f"needs       the driver and up to {pool} replicas, each with {recipe.cluster.cpus:g} CPU{gpus}")
    lines.append(
        f"time        about {duration(budget)} of measuring at benchmark.seconds {recipe.benchmark.seconds:g}, and what"
        " has no such limit: every call runs at least once, however long it takes, and pairs and images are made"
    )
    return "\n".join(lines)


def _batches(recipe: Recipe) -> str:
    return f"at batch {', '.join(map(str, recipe.benchmark.batches))}"


def _generation(recipe: Recipe) -> tuple[int, str]:
    rows = SHARDS * recipe.pairs.replicas * recipe.pairs.shard_rows
    return 0, f"{rows:,} pairs by {recipe.pairs.replicas} replicas"


def _evaluation(recipe: Recipe) -> tuple[int, str]:
    images = PART_IMAGES * PARTS * recipe.evaluate.replicas
    return 0, f"{images:,} images of the teacher and as many of a student, by {recipe.evaluate.replicas} actors"


def _growth(recipe: Recipe) -> tuple[int, str]:
    turns = len(BATCHES) + 2 * len(SIDES) + len(CODES)
    return turns, f"{sum(PAIRS):,} pairs of a teacher that costs nothing, and pools of {max(ACTORS)}"


def _serving(recipe: Recipe) -> tuple[int, str]:
    return 2 * (ROUNDS + 1), f"{_serving_seconds(recipe):g} s of requests to a server under {1 + len(LOADS)} loads"


def _serving_seconds(recipe: Recipe) -> float:
    return (SHORT + len(LOADS)) * recipe.benchmark.serving_seconds


# section -> (what takes its turn for benchmark.seconds, what else is done)
SECTIONS: dict[str, Callable[[Recipe], tuple[int, str]]] = {
    "solvers": lambda recipe: (0, "every solver against the float64 oracle"),
    "precision": lambda recipe: (0, f"{TOKENS:,} tokens in each of teacher.precision's settings that the device has"),
    "matching": lambda recipe: (len(recipe.benchmark.batches), _batches(recipe)),
    "teacher": lambda recipe: (2 * len(recipe.benchmark.batches), _batches(recipe)),
    "sampling": lambda recipe: (len(listed(recipe)[0]), _batches(recipe)),
    "training": lambda recipe: (
        0,
        f"optimiser steps of {recipe.train.batch} samples, {STEPS} of them twice on {ROWS:,} pairs",
    ),
    "generation": _generation,
    "evaluation": _evaluation,
    "images": lambda recipe: (3, f"{IMAGES:,} images of a student at a time, thrown away, into an .npz, into a folder"),
    "growth": _growth,
    "serving": _serving,
}
