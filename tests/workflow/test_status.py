"""How a run stands, from its folders alone."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path

import pytest
from tiny import tiny, with_pairs

from pipeline import storage
from pipeline.pairs import manifest, shards
from pipeline.pairs.facts import PairFacts
from pipeline.pairs.replica import Replica
from pipeline.training import plan
from pipeline.workflow.distill import distill
from pipeline.workflow.generate import generate


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks for Ray fails."""
    monkeypatch.setattr("ray.init", lambda **settings: pytest.fail("Ray was asked for"))


def aged(folder: str, seconds: dict[str, float]) -> None:
    """Have the files of a folder be so many seconds old."""
    for name, age in seconds.items():
        os.utime(Path(folder, name), (time.time() - age,) * 2)


@pytest.mark.usefixtures("no_ray")
def test_pairs_say_what_is_missing_at_which_rate_and_since_when(tmp_path: Path) -> None:
    recipe = with_pairs(tiny(tmp_path), count=90)  # six shards, the last of 10
    asked = replace(recipe, status=True)
    assert "holds no pair set; generate_pairs has not begun one there" in generate(asked)
    assert not Path(recipe.run).exists()
    facts = PairFacts.of(recipe)
    manifest.claim(recipe.pairs_uri, facts, recipe)
    replica = Replica(recipe, facts)
    for number in (0, 1, 3):
        shards.write_shard(recipe.pairs_uri, facts, shards.table(facts, replica.rows(number, 16)))
    names = {f"shard-{number:05d}.parquet": age for number, age in ((0, 300.0), (1, 200.0), (3, 100.0))}
    aged(recipe.pairs_uri, names | {"_recipe.json": 400.0})
    text = generate(asked)
    assert "3 of 6 shards, 48 of 90 rows" in text
    assert "missing      3 shards: 2, 4-5" in text
    assert "0.16 rows/s over the last 3 pieces" in text
    assert "the last file was written 2 min ago" in text
    assert "has stopped" not in text, "a shard takes as long"
    aged(recipe.pairs_uri, {name: age + 3600 for name, age in names.items()} | {"_recipe.json": 7200.0})
    assert "the run has stopped or hangs: the same command goes on" in generate(asked)


@pytest.mark.usefixtures("no_ray")
def test_a_student_says_its_steps(tmp_path: Path) -> None:
    recipe = tiny(tmp_path)
    asked = replace(recipe, status=True)
    assert "distill has not begun one there" in distill(asked)
    folder = Path(recipe.student_uri, "checkpoints")
    folder.mkdir(parents=True)
    plan.claim(plan.check(replace(recipe, dry_run=True)), "a run")
    for step, age in ((2, 200.0), (3, 190.0)):
        (folder / f"step-{step:08d}.pt").write_bytes(b"")
        aged(str(folder), {f"step-{step:08d}.pt": age})
    text = distill(asked)
    assert "step 3 of 4 in the newest checkpoint" in text
    assert "0 of 1 students along the way" in text
    assert "0.1 steps/s over the last 2 pieces" in text


def test_modified_says_when_files_were_written(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("a")
    os.utime(tmp_path / "a", (1000.0, 1000.0))
    assert storage.modified(str(tmp_path)) == {"a": 1000.0}
    assert storage.modified(str(tmp_path / "none")) == {}
