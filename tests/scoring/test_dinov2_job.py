"""A whole evaluation with FD-DINOv2 as a column, by a tiny network of Meta's layout, in this process."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

from pipeline import storage
from pipeline.evaluation import plan
from pipeline.evaluation.artist import Artist
from pipeline.evaluation.draws import Draw
from pipeline.models.convnet import to_uint8
from pipeline.recipe import Recipe
from pipeline.scoring import dinov2, real_images, tally
from pipeline.scoring.dinov2 import DinoV2, Shape
from pipeline.scoring.metrics import frechet
from pipeline.workflow import drawing, evaluate

TINY, COUNT, REAL = Shape(8, 1, 2, 37), 12, 20


def here(plan: plan.EvaluationPlan, todo: list[Draw], frequencies: Any) -> Iterator[dict[str, Any]]:
    """``drawing.parts_of`` in this process."""
    artist = Artist(plan, todo, frequencies)
    for i in range(len(todo)):
        yield {key: value[0] for key, value in artist({"draw": np.array([i]), "item": np.array([0])}).items()}


@pytest.fixture
def recipe(tmp_path: Path, blank_store: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    weights = {name: 4 * value for name, value in dinov2.formula(TINY).items()}
    monkeypatch.setattr(dinov2, "load", lambda uri: DinoV2(weights, TINY))
    monkeypatch.setattr(tally, "FEATURES", TINY.width)
    monkeypatch.setattr(real_images, "DIGITS", REAL)
    monkeypatch.setattr(drawing, "parts_of", here)
    monkeypatch.setattr(evaluate.cluster, "session", lambda *args: nullcontext())
    monkeypatch.setattr(evaluate.preflight, "check_workers", lambda *args: None)
    shutil.copytree(blank_store, tmp_path / "run")
    made = tiny.tiny(tmp_path, "var", **tiny.IMAGES)
    settings = replace(made.evaluate, samplers=[{"name": "Autoregressive"}], count=COUNT, timing_batches=(), grid=COUNT)
    return replace(made, evaluate=replace(settings, dinov2="formula"))


def test_the_report_shows_it_and_says_its_flavour_and_weights(recipe: Recipe) -> None:
    text = evaluate.evaluate(recipe)
    assert "FD of a random DINOv2 (not FD-DINOv2)" in text
    made = plan.prepare(recipe)
    shelf = drawing.Shelf(made, made.draws())
    images = np.concatenate(shelf[made.table()[0]].images)
    network = dinov2.load("formula")
    drawn = network(tally.torch.from_numpy(images)).double().numpy()
    real = network(to_uint8(real_images.Digits()[:REAL][0])).double().numpy()
    expected = frechet(*((rows.mean(0), np.cov(rows.T)) for rows in (drawn, real)))
    results = storage.read_json(storage.join(recipe.report_uri, "report.json"))
    (row,) = results["rows"][1:]
    assert row["dinov2_score"] == pytest.approx(expected, rel=1e-3)
    assert results["made"]["features SHA-256"]["dinov2"] == "formula"
    for end in ("md", "html"):
        page = storage.read_bytes(storage.join(recipe.report_uri, f"report.{end}")).decode()
        assert "resize to 224 pixels" in page
        assert "12 images for 1,024 features" in page


def test_its_weights_shape_every_draw_and_their_absence_changes_none(recipe: Recipe) -> None:
    without = plan.prepare(replace(recipe, evaluate=replace(recipe.evaluate, dinov2=None)))
    made = plan.prepare(recipe)
    assert without.fingerprint() != made.fingerprint()
    assert not {made.key(draw) for draw in made.draws()} & {without.key(draw) for draw in without.draws()}
    assert "dinov2" not in without.facts["features"]
