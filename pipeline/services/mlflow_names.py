"""What MLflow is told of a recipe, by names that it takes; knows nothing of MLflow itself."""

from __future__ import annotations

import json
import re
from typing import Any, Literal, TypeVar

from pipeline.recipe import Recipe, leaves
from pipeline.services.mlflow_store import without_credentials

Job = Literal["pairs", "distill", "evaluate", "ablate", "benchmark"]
T = TypeVar("T")
PARAMETERS: dict[Job, tuple[str, ...]] = {  # fields and sections of the recipe; the whole of it is in recipe.yaml
    "pairs": ("name", "teacher", "pairs"),
    "distill": ("name", "teacher", "pairs.count", "train"),
    "evaluate": ("name", "teacher", "evaluate"),
    "ablate": ("name", "ablate"),
    "benchmark": ("name", "teacher", "benchmark"),
}
OF_PROMPTS = ("captions", "text")  # beside these, where the recipe names prompts
# Characters that MLflow takes; the description is a version's in the model registry.
LONGEST = {"key": 250, "parameter": 6000, "tag": 5000, "experiment": 500, "description": 5000}


def flattened(tree: dict[str, Any]) -> dict[str, str]:
    """{"train": {"lr": 1e-4}} -> {"train.lr": "0.0001"}: nested settings by dotted name, free of credentials."""
    texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in leaves(tree).items()}
    return {name: without_credentials(text) for name, text in texts.items()}


def parameters(recipe: Recipe, job: Job) -> dict[str, str]:
    """The settings that matter to a job, without those that are not set, by names that MLflow takes."""
    wanted = (*PARAMETERS[job], *(OF_PROMPTS if recipe.captions.uri else ()))
    settings = leaves(recipe.resolved()).items()
    chosen = {
        name: value
        for name, value in settings
        if value is not None and any(name == one or name.startswith(f"{one}.") for one in wanted)
    }
    return fitted(flattened(chosen))


def fitted(values: dict[str, T]) -> dict[str, T]:
    """The same values by names of MLflow's alphabet, each its own: letters, digits, "_-. " and slashes between them."""
    out: dict[str, T] = {}
    for name, value in values.items():
        parts = (part for part in re.sub(r"[^/\w.\- ]+", "_", name).split("/") if part.strip("."))
        plain = "/".join(parts)[: LONGEST["key"] - 5].rstrip("/") or "_"
        number, unique = 2, plain
        while unique in out:
            number, unique = number + 1, f"{plain}_{number}"
        out[unique] = value
    return out
