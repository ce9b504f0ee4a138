"""The process of one step but the tests: ``python -m pipeline.device.measure STEP ...``, which ``check`` starts."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from pipeline.command_line import parse, with_settings
from pipeline.device import formula, memory, plan, production, speed
from pipeline.device.notes import Notes
from pipeline.generator.arguments import Parser, truth
from pipeline.host import startup
from pipeline.recipe import Recipe

RECIPES = Path(__file__).parents[2] / "jobs" / "recipes"
WEIGHTS = "weights"  # the folder, beside the sheet, that keeps what formulas have made
SHARDS = {"cuda": (512, None), "cpu": (32, 16)}  # rows of a shard, so that many are written in a minute; their batches
ROWS = 200_000  # of the set of which a part is made


def main(args: Sequence[str] | None = None) -> None:
    """What ``check`` starts. Ends with a sentence and its status as the jobs do."""
    out = Parser(__doc__)
    out.add_argument("step", help="name of a step of plan.steps")
    out.add_argument("--device", choices=sorted(plan.RECIPES), required=True)
    out.add_argument("--folder", type=Path, required=True, help="of the sheet")
    out.add_argument("--notes", type=Path, required=True, help="file for the figures")
    out.add_argument("--seconds", type=float, required=True)
    out.add_argument("--graphs", type=truth, required=True, help="what is drawn with as CUDA graphs")
    out.carry_out(carry_out, args)


def carry_out(asked: argparse.Namespace) -> None:
    """Make the weights if need be, measure, and leave the figures in the file of notes.

    Raises Refused and Unfinished, one sentence, and whatever torch raises.
    """
    notes = Notes(asked.notes, asked.seconds)
    (step,) = [one for one in plan.steps(asked.device) if one.name == asked.step]
    with tempfile.TemporaryDirectory(prefix="run-", dir=asked.folder) as folder:
        recipe = recipe_of(str(step.recipe), asked.device, asked.folder, Path(folder), asked.graphs)
        if asked.device == "cpu":
            torch.set_num_threads(max(1, int(recipe.cluster.cpus)))
        if step.kind == "benchmark":
            speed.measure(recipe, step.batch, notes)
        elif step.kind == "pairs":
            production.measure(recipe, Path(folder), notes)
        elif step.kind == "memory":
            memory.measure(recipe, notes)
        else:
            memory.train(recipe, notes)


def recipe_of(name: str, device: str, kept: Path, run: Path, graphs: bool) -> Recipe:
    """A shipped recipe on one device, with weights by formula in ``kept`` and what it makes in ``run``."""
    official = parse(None, ["--config", str(RECIPES / f"{name}.yaml")])
    place = kept / WEIGHTS / name
    place.mkdir(parents=True, exist_ok=True)
    rows, batch = SHARDS[device]
    recorded = {"graphs": graphs and device == "cuda"}
    settings: dict[str, Any] = {
        "run": str(run),
        "teacher": formula.write(official.teacher, place) | recorded,
        "pairs": {"count": ROWS, "actors": 1, "shard_rows": rows, "batch": batch or official.pairs.batch},
        "evaluate": {"actors": 1} | recorded,
        "preflight": "this",
    }
    return with_settings(official, settings)


if __name__ == "__main__":
    startup.begin()
    main()
