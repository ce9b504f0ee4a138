"""Weights of the released sizes, by formula, in files of the official layouts: what stands in for the downloads.

    python tests/support/fullsize.py llamagen-l FOLDER

writes the teacher of jobs/recipes/llamagen-l.yaml and FOLDER/llamagen-l-cpu.yaml. Laid over the recipe, that has the
real jobs make four pairs and train for three steps on a CPU (minutes, and less than 24 GiB):

    RECIPE="--config jobs/recipes/llamagen-l.yaml --config FOLDER/llamagen-l-cpu.yaml"
    python jobs/generate_pairs.py $RECIPE
    python jobs/generate_pairs.py $RECIPE --pairs.count 9
    python jobs/distill.py $RECIPE --pairs.count 9

Of nine pairs eight are held out. LPIPS is off: its trunk is a download too. For llamagen-t2i-xl it writes prompts and
an encoder of FLAN-T5-XL's size as well, and has the student trained by recomputation, one sample at a time.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import fill
import tiny_text
import torch
import yaml
from safetensors.torch import save_file

from pipeline.command_line import parse
from pipeline.models import checkpoints
from pipeline.recipe import Recipe
from pipeline.text import encoder_files

RECIPES = Path(__file__).parents[2] / "jobs" / "recipes"
SALTS = {"var": ("vqvae/", "var/"), "llamagen": ("vq/", "gpt/")}  # of the golden figures
FLAN_T5_XL = {"d_kv": 64, "d_ff": 5120, "num_layers": 24, "num_heads": 32, "vocab_size": 32128}
PROMPTS = ("zero at the top", "a bold seven", "", "a thin three at the left " * 40)  # of none, few and many tokens


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
        state = fill.filled(module, salt)
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
    if shape := checkpoints.caption_shape(official):
        settings |= _with_captions(folder, shape[1])
        settings["train"] |= {"recompute": True, "micro_batch": 1}
    overlay.write_text(yaml.safe_dump(settings))
    return overlay


def _with_captions(folder: Path, dim: int) -> dict[str, Any]:
    """Write prompts and an encoder of FLAN-T5-XL's size; returns the sections of the recipe that name them."""
    prompts, encoder = folder / "prompts.txt", tiny_text.tiny_encoder(folder / "encoder", dim)
    prompts.write_text("\n".join(PROMPTS * 4) + "\n")
    content = tiny_text.config(dim, **FLAN_T5_XL)
    (encoder / "config.json").write_text(json.dumps(content))
    weights = {}
    for key, wanted in encoder_files.shapes(content).items():
        scale, offset = fill.scale_and_offset(key, wanted) or (1.0, 0.0)
        values = torch.from_numpy(fill.unit(f"t5/{key}", torch.Size(wanted).numel()))
        weights[key] = (values * scale + offset).to(torch.bfloat16).view(wanted)
    save_file(weights, encoder / "model.safetensors")
    return {"captions": {"uri": str(prompts)}, "text": {"encoder": str(encoder)}}


def read(name: str, *overlays: Path) -> Recipe:
    """A shipped recipe with others over it."""
    files = [RECIPES / f"{name}.yaml", *overlays]
    return parse(None, [part for file in files for part in ("--config", str(file))])


if __name__ == "__main__":
    target = Path(sys.argv[2]).resolve()
    target.mkdir(parents=True, exist_ok=True)
    print(write(sys.argv[1], target))
