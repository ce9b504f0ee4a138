"""A teacher and its student beside plain sampling: the benchmark's own sections, in the time that there is."""

from __future__ import annotations

import torch

from pipeline.benchmark import clock, matching, networks
from pipeline.benchmark.sheet import Row
from pipeline.device.notes import Notes
from pipeline.device.plan import PLAIN
from pipeline.models import checkpoints
from pipeline.numerics.precision import set_products
from pipeline.recipe import Recipe

TURNS = 8  # things that take their turn in the three sections, at two batches
LONGEST = 5.0  # seconds of one; more scatter less, and a session is short


def measure(recipe: Recipe, batch: int, notes: Notes) -> None:
    """Note the figures of matching, sampling and the teacher at batch 1 and at ``batch``, section by section.

    A section whose time has not come before the process's is over is left out. Raises whatever torch raises.
    """
    device = torch.device(recipe.cluster.runs_on)
    set_products(recipe.teacher.precision)
    teacher = checkpoints.teacher(recipe.teacher).to(device)
    notes.put(batch=batch)
    seconds = min(LONGEST, max(0.1, notes.left / 2 / TURNS))  # a turn may take longer than it is given
    for row in matching.overhead(teacher, recipe.pairs.solver, (1, batch), seconds).rows:
        notes.put(**{f"alg1_{'batch_1' if row['batch'] == 1 else 'large'}": _of(row, "Alg. 1 / AR")})
    if notes.left > 0:
        _sampled(networks.sampling(recipe, teacher, (1, batch), seconds).rows, recipe, batch, notes)
    if notes.left > 0:
        peaks = clock.peaks(device, recipe.teacher.precision)
        (row,) = networks.teachers(teacher, recipe.teacher, (PLAIN,), seconds, peaks).rows
        notes.put(plain=_of(row, "plain / ours"), roofline=_of(row, "roofline, %"))


def _sampled(rows: list[Row], recipe: Recipe, batch: int, notes: Notes) -> None:
    """Of teacher, Alg. 1 and the first few-step sampler; a batch that did not fit into memory is None."""
    found = {(row["sampler"], row["batch"]): row for row in rows}
    teacher, matched, one_step = (sampler.name for sampler in networks.listed(recipe)[0][:3])
    for key, name in (("ar", teacher), ("fm", matched), ("one_step", one_step)):
        notes.put(**{f"{key}_ms": _of(found.get((name, 1)), "ms / image")})
        notes.put(**{f"{key}_rate": _of(found.get((name, batch)), "images / s")})
    notes.put(speed_up_batch_1=_of(found.get((one_step, 1)), "speed-up"))
    notes.put(speed_up_large=_of(found.get((one_step, batch)), "speed-up"))


def _of(row: Row | None, heading: str) -> float | None:
    """A number of a row."""
    value = row.get(heading) if row else None
    return float(value) if value is not None else None
