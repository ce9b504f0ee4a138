"""The whole measurement, small."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny import tiny, with_pairs

from pipeline.benchmark import scale
from pipeline.models import standin
from pipeline.pairs import manifest, shards
from pipeline.pairs.facts import PairFacts
from pipeline.pairs.replica import Replica
from pipeline.recipe import Recipe


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    return with_pairs(tiny(tmp_path), count=80, shard_rows=8, batch=4, actors=1, noise="derived")


def test_a_set_of_a_stand_in_has_the_shape_of_the_teachers(recipe: Recipe, tmp_path: Path) -> None:
    other = standin.of(recipe, str(tmp_path / "standin"))
    facts = PairFacts.of(other)
    assert facts.layout == PairFacts.of(recipe).layout
    rows = Replica(other, facts).rows(0, 8)
    assert len({row.tobytes() for row in rows.tokens}) == 3, "one sequence a class"
    assert len(np.unique(rows.tokens)) > 12, "most of the 24 codes"
    assert shards.table(facts, rows).num_rows == 8


def test_a_stand_in_takes_its_time(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(standin.time, "sleep", slept.append)
    other = standin.of(recipe, str(tmp_path / "standin"), seconds=2.5)
    Replica(other, PairFacts.of(other)).rows(0, 8)
    assert slept == [2.5, 2.5], "once a batch"


def test_the_table_says_what_was_made(ray_cluster: str, recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"ACTORS": (2,), "SHARDS": 3, "ROWS": 4, "SECONDS": 0.1}.items():
        monkeypatch.setattr(scale, name, value)
    text = scale.scale(recipe)
    rows = [re.sub(r"[|,]", "", line).split() for line in text.splitlines() if re.match(r"\| \d", line)]
    assert [row[:2] for row in rows[:3]] == [["8", "8"], ["80", "72"], ["80", "16"]]
    assert "* 10 files of" in text
    assert "With 2 shards lost" in text
    actors, _, seconds, speed, share = map(float, rows[3])
    assert actors == 2
    assert 4 / (seconds + 0.06) <= speed + 0.005, (
        "4 of the 6 shards; seconds are rounded to tenths, speed to hundredths"
    )
    assert share == pytest.approx(speed * 0.1 / 2, abs=0.01)
    with pytest.raises(ValueError, match="is not empty; delete it"):
        scale.scale(recipe)
    assert manifest.read(f"{recipe.run}/scale/pairs")["count"] == 80
    assert replace(recipe).teacher.family == "pipeline.models.var", "the recipe itself is as it was"


def test_a_set_of_prompts_holds_those_of_the_file(
    ray_cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a teacher of captions with a text encoder that is not there: the stand-in asks none."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    file = tmp_path / "prompts.txt"
    file.write_text('a zero\n\nthree, "quoted"\n')
    recipe = tiny(tmp_path, "llamagen", caption_dim=16, caption_length=8)
    recipe = with_pairs(recipe, count=20, shard_rows=8, batch=4, actors=1, noise="derived")
    text = replace(recipe.text, encoder=str(tmp_path / "nowhere"))
    recipe = replace(recipe, captions=replace(recipe.captions, uri=str(file)), text=text)
    lines = scale._full(recipe, str(tmp_path / "scale"))
    assert [line.split("|")[1].strip() for line in lines if line.startswith("| 2")] == ["2", "20", "20"]
    uri = str(tmp_path / "scale" / "pairs")
    inventory = manifest.read(uri)
    facts = PairFacts.from_json(inventory["facts"])
    rows = [shards.read_shard(uri, facts, shard["name"]) for shard in inventory["shards"]]
    prompts = np.concatenate([part.conditions for part in rows])
    assert prompts.tolist() == (["a zero", "", 'three, "quoted"'] * 7)[:20]
    tokens = np.concatenate([part.tokens for part in rows])
    assert len({row.tobytes() for row in tokens}) == 3, "one sequence a prompt"


def test_a_dry_run_plans_and_writes_nothing(recipe: Recipe) -> None:
    text = scale.scale(replace(recipe, dry_run=True))
    assert f"{recipe.run}/scale" in text
    assert re.search(r"rows +8, then 80, in shards of 8 by 1 actors", text)
    assert not Path(recipe.run).exists()
    with pytest.raises(ValueError, match=r"pairs.count is 9; give 10 or more"):
        scale.scale(with_pairs(recipe, count=9))
