"""The Hub reads the card of a student."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from shared_student import shared
from tiny import tiny, tiny_text

from pipeline import storage
from pipeline.generator import card, folder

GOLDEN = Path(__file__).parents[1] / "goldens"


@pytest.mark.parametrize("make", [tiny, tiny_text])
def test_a_card_before_its_report(tmp_path: Path, make: type) -> None:
    """huggingface_hub's own reader takes it."""
    hub = pytest.importorskip("huggingface_hub")
    recipe = shared(make(tmp_path))
    found = hub.ModelCard.load(Path(recipe.student_uri, folder.CARD))
    assert found.data.library_name == "distilled-decoding"
    assert found.data.pipeline_tag == ("text-to-image" if recipe.captions.uri else "unconditional-image-generation")
    assert found.data.eval_results is None
    assert "80 optimiser steps on 40 noise-token pairs" in found.text
    assert "jobs/evaluate.py` completes this card" in found.text


def test_a_card_with_scores(tmp_path: Path) -> None:
    hub = pytest.importorskip("huggingface_hub")
    recipe = shared(tiny(tmp_path))
    content = storage.read_json(storage.join(recipe.student_uri, folder.CONFIG))
    results = json.loads((GOLDEN / "report.json").read_text())
    found = hub.ModelCard(card.card("mine", content, results))
    students = [row for row in results["rows"] if row["type"].startswith("DD")]
    assert [entry.metric_value for entry in found.data.eval_results] == [row["score"] for row in students]
    assert {entry.metric_name for entry in found.data.eval_results} == {results["title"]}
    assert "| DD 1 step" in found.text
    assert f"]({card.PICTURE})" in found.text
