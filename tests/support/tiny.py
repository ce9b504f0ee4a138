"""Tiny teachers with random weights, written to a folder as a recipe's files: what the other tests run on.

Same classes as the official models, a few thousand parameters in the transformer. The weights are the constructors' own
under a fixed seed, but for the output layer, which some constructors leave at zero: it is drawn large enough that p is
neither flat nor a single code.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from tiny_text import WORDS, tiny_encoder

from pipeline.models import checkpoints
from pipeline.recipe import Recipe
from pipeline.settings.evaluate import EvaluateSettings
from pipeline.settings.pairs import PairSettings
from pipeline.settings.teacher import Filter, TeacherSettings
from pipeline.settings.text import CaptionSettings, TextSettings
from pipeline.settings.train import TrainSettings

Family = Literal["var", "llamagen"]

TOKENIZER = {"channels": 32, "multipliers": [1, 1], "encoder_blocks": 1, "decoder_blocks": 1, "attention": False}
CONFIG: dict[str, dict[str, Any]] = {
    # 14 tokens in 3 AR steps; images of 6 x 6
    "var": {"depth": 2, "width": 32, "heads": 2, "patch_nums": [1, 2, 3], "vocabulary": 24, "code_dim": 4}
    | {"classes": 3}
    | TOKENIZER,
    # 9 tokens in 9 AR steps; images of 6 x 6
    "llamagen": {"layers": 2, "heads": 2, "dim": 32, "ffn_multiple": 16, "side": 3, "vocabulary": 24, "code_dim": 4}
    | {"classes": 3, "z_channels": 32}
    | TOKENIZER,
}
IMAGES = {"patch_nums": [1, 2, 4], "multipliers": [1, 1, 1, 1], "classes": 10}  # of a VAR whose images the digits score
OUTPUT = {"var": "head.weight", "llamagen": "output.weight"}
GUIDANCE = {"var": 1.0, "llamagen": 1.5}


def tiny(folder: Path, family: Family = "var", seed: int = 0, **config: Any) -> Recipe:
    """Write a tiny teacher of ``family`` below ``folder`` and return a recipe that runs with it in seconds.

    ``config`` are fields that differ from CONFIG's.
    """
    settings = TeacherSettings(
        family=f"pipeline.models.{family}",
        config=CONFIG[family] | config,
        tokenizer=str(folder / f"{family}-tokenizer.safetensors"),
        checkpoint=str(folder / f"{family}-teacher.safetensors"),
        filter=Filter(guidance=GUIDANCE[family]),
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = checkpoints.family(settings).Teacher(checkpoints.config(settings), settings.filter)
        with torch.no_grad():
            torch.nn.init.normal_(model.network.get_parameter(OUTPUT[family]), std=0.5)
    checkpoints.save(model.tokenizer, settings.tokenizer, {})
    checkpoints.save(model.network, settings.checkpoint, {})
    return Recipe(
        name=f"tiny-{family}",
        run=str(folder / "run"),
        preflight="this",  # the evaluation lists no samplers
        teacher=settings,
        pairs=PairSettings(count=40, shard_rows=16, batch=6, actors=1),
        train=TrainSettings(start_steps=(1, 2), split=1, batch=8, epochs=1, perceptual="digits", snapshots=1),
        evaluate=EvaluateSettings(count=20, batch=10, actors=1, curve_count=0, timing_batches=(1,)),
    )


PROMPTS = 60  # lines of the file of prompts


def tiny_text(folder: Path, **config: Any) -> Recipe:
    """As ``tiny``, a LlamaGen that takes captions of 8 positions, with a tiny text encoder and ``PROMPTS`` prompts."""
    recipe = tiny(folder, "llamagen", **{"caption_dim": 16, "caption_length": 8} | config)
    prompts = folder / "prompts.txt"
    prompts.write_text("".join(f"{WORDS[i % 5]} {WORDS[i // 5 % 5]} number {i}\n" for i in range(PROMPTS)))
    return replace(
        recipe,
        name="tiny-text",
        captions=CaptionSettings(uri=str(prompts)),
        text=TextSettings(encoder=str(tiny_encoder(folder / "encoder")), precision="fp32", length=8, clean=False),
    )


def with_pairs(recipe: Recipe, **changes: Any) -> Recipe:
    """The recipe with other ``pairs`` settings."""
    return replace(recipe, pairs=replace(recipe.pairs, **changes))
