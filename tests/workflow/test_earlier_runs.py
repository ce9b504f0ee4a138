"""Pair sets and students of the version before the rooms are accepted as they are: nothing of them is made again.

tests/goldens/run was made by commit edf0747: jobs/generate_pairs.py, then jobs/distill.py, on ``earlier``'s recipe. Its
teacher is the one that ``tiny`` writes; were that another one now, the fingerprints would say so.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from tiny import IMAGES, tiny, with_pairs

from pipeline.evaluation.plan import prepare
from pipeline.pairs import shards
from pipeline.recipe import Recipe
from pipeline.workflow.distill import distill
from pipeline.workflow.generate import generate

GOLDEN = Path(__file__).parents[1] / "goldens" / "run"


@pytest.fixture
def earlier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """The recipe of the golden run, whose folder holds a copy of it."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    recipe = with_pairs(tiny(tmp_path, "var", **IMAGES), count=20, shard_rows=10)
    shutil.copytree(GOLDEN, recipe.run)
    samplers = [{"name": "Autoregressive"}, {"name": "FewStep", "steps": [1]}]
    return replace(
        recipe,
        train=replace(recipe.train, batch=4),
        evaluate=replace(recipe.evaluate, samplers=samplers),
    )


def files(folder: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.is_file()}


def test_a_pair_set_is_complete(earlier: Recipe) -> None:
    before = files(earlier.pairs_uri)
    assert generate(earlier).startswith("Nothing is missing")
    assert before.items() <= files(earlier.pairs_uri).items()
    assert shards.verify(earlier.pairs_uri)["count"] == 20


def test_a_student_is_complete_and_fits_its_pairs_and_teacher(earlier: Recipe) -> None:
    before = files(earlier.student_uri)
    assert distill(earlier).startswith("Nothing is missing")
    assert before.items() <= files(earlier.student_uri).items()
    assert prepare(earlier).exported["step"] == 3
