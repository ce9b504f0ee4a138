"""What is counted of a job that makes pairs; another script stands in for it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.device import production
from pipeline.device.notes import Notes
from pipeline.host.errors import Unfinished
from pipeline.recipe import Recipe

JOB = """
import json, os, sys, time
recipe = json.load(open(sys.argv[2]))
folder = recipe["run"] + "/pairs"
os.makedirs(folder)
for number in range({shards}):
    name = f"{{folder}}/shard-{{number:05d}}.parquet"
    open(name, "w").write("x" * 640)
    os.utime(name, (1000 + 2 * number,) * 2)
print("error: no teacher")
{end}
"""


def measured(folder: Path, monkeypatch: pytest.MonkeyPatch, shards: int, end: str, seconds: float = 30) -> Notes:
    """The notes of a job that writes so many shards, 2 s after one another by their dates."""
    script = folder / "job.py"
    script.write_text(JOB.format(shards=shards, end=end))
    monkeypatch.setattr(production, "JOB", script)
    recipe = Recipe(run=str(folder))
    notes = Notes(folder / "notes.json", seconds)
    production.measure(replace(recipe, pairs=replace(recipe.pairs, shard_rows=64)), folder, notes)
    return notes


def test_the_shards_after_the_first_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until time is over, when a job that goes on is told to stop."""
    monkeypatch.setattr(production, "STOPPING", 27.0)
    values = measured(tmp_path, monkeypatch, 5, "time.sleep(60)").content["values"]
    assert (values["pairs"], values["seconds"], values["pairs_rate"], values["row_bytes"]) == (256, 8, 32, 10)
    assert values.keys() == {"pairs", "seconds", "pairs_rate", "row_bytes", "starting"}


def test_too_few_shards_and_errors_are_no_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Unfinished, match="1 shards of 64 pairs were written; a rate needs two"):
        measured(tmp_path, monkeypatch, 1, "")
    with pytest.raises(Unfinished, match="generate_pairs ended with status 1: error: no teacher"):
        (tmp_path / "b").mkdir()
        measured(tmp_path / "b", monkeypatch, 3, "sys.exit(1)")
