"""A student's folder as ``distill`` leaves it, without training: what tests draw with."""

from __future__ import annotations

from step import stirred

from pipeline import storage
from pipeline.generator import card, folder
from pipeline.models import checkpoints
from pipeline.recipe import Recipe


def shared(recipe: Recipe) -> Recipe:
    """Write a student with stirred weights, and all that distill writes beside it, into the recipe's folder."""
    student = checkpoints.new_student(recipe.teacher, checkpoints.teacher(recipe.teacher), {"mask": "released"}, 0)
    stirred(student)
    checksums = checkpoints.checksums(recipe.teacher)
    about = {
        "family": recipe.teacher.family,
        "config": recipe.resolved()["teacher"]["config"],
        "mask": "released",
        "split": recipe.train.split,
        "start_steps": list(recipe.train.start_steps),
        "step": 80,
        "pairs_count": 40,
        "pairs_fingerprint": "0" * 64,
        "teacher": checksums,
        "mlflow_run": "a-run",
    }
    checkpoints.save(student, storage.join(recipe.student_uri, folder.WEIGHTS), about)
    content = folder.described(recipe, checksums)
    storage.write_bytes(storage.join(recipe.student_uri, folder.CARD), card.card(recipe.name, content).encode())
    storage.write_json(storage.join(recipe.student_uri, folder.CONFIG), content)
    storage.write_json(storage.join(recipe.student_uri, "recipe.json"), {"recipe": recipe.resolved()})
    return recipe
