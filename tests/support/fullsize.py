"""Weights of the released sizes, by formula, in files of the official layouts: what stands in for the downloads.

    python tests/support/fullsize.py llamagen-l FOLDER

writes the teacher of jobs/recipes/llamagen-l.yaml and FOLDER/llamagen-l-cpu.yaml. Laid over the recipe, that has the
real jobs make four pairs and train for three steps on a CPU (minutes, and less than 24 GiB):

    RECIPE="--config jobs/recipes/llamagen-l.yaml --config FOLDER/llamagen-l-cpu.yaml"
    python jobs/generate_pairs.py $RECIPE
    python jobs/generate_pairs.py $RECIPE --pairs.count 9
    python jobs/distill.py $RECIPE --pairs.count 9

Of nine pairs eight are held out. LPIPS is off: its trunk is a download too.
"""

from __future__ import annotations

import sys
from pathlib import Path

import fill
import torch
import yaml

from pipeline.command_line import parse
from pipeline.models import checkpoints
from pipeline.recipe import Recipe

RECIPES = Path(__file__).parents[2] / "jobs" / "recipes"
SALTS = {"var": ("vqvae/", "var/"), "llamagen": ("vq/", "gpt/")}  # of the golden figures


def write(name: str, folder: Path) -> Path:
    """Write the two weight files of a full-size recipe and its overlay for a CPU; returns the overlay."""
    official = read(name).teacher
    kind = official.family.rsplit(".", 1)[1]
    with torch.device("meta"):
        teacher = checkpoints.family(official).Teacher(checkpoints.config(official), official.filter)
    files = {
        "tokenizer": folder / official.tokenizer.rsplit("/", 1)[1],
        "checkpoint": folder / official.checkpoint.rsplit("/", 1)[1],
    }
    for module, salt, file in zip((teacher.tokenizer, teacher.network), SALTS[kind], files.values(), strict=True):
        state = dict(fill.filled(module, salt))
        torch.save({"model": state} if kind == "llamagen" else state, file)
    overlay = folder / f"{name}-cpu.yaml"
    settings = {
        "run": str(folder / name),
        "teacher": {key: str(file) for key, file in files.items()} | {"precision": "fp32"},
        "pairs": {"count": 4, "shard_rows": 16, "batch": 4, "actors": 1},
        "evaluate": {"precision": "fp32"},
        "train": {"batch": 1, "micro_batch": 0, "epochs": 3, "workers": 0, "warmup": 0, "precision": "fp32"}
        | {"lpips": 0.0, "split": teacher.layout.steps, "log_every": 1, "snapshots": 1},
        "cluster": {"gpus": 0, "cpus": 2},
    }
    overlay.write_text(yaml.safe_dump(settings))
    return overlay


def read(name: str, *overlays: Path) -> Recipe:
    """A shipped recipe with others over it."""
    files = [RECIPES / f"{name}.yaml", *overlays]
    return parse(None, [part for file in files for part in ("--config", str(file))])


if __name__ == "__main__":
    target = Path(sys.argv[2]).resolve()
    target.mkdir(parents=True, exist_ok=True)
    print(write(sys.argv[1], target))
