"""The Hub reads the card of a student."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from shared_student import shared
from tiny import tiny, tiny_text

from pipeline import storage
from pipeline.generator import card, folder
from pipeline.report import markdown

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


@pytest.mark.parametrize(("classes", "asked"), [(10, "[3, 7]"), (7, "[3]"), (3, "[0]"), (1, "[0]")])
def test_the_example_asks_for_classes_that_the_student_has(tmp_path: Path, classes: int, asked: str) -> None:
    recipe = shared(tiny(tmp_path))
    content = storage.read_json(storage.join(recipe.student_uri, folder.CONFIG))
    text = card.card("mine", content | {"conditions": {"classes": classes}})
    assert f"images = generator({asked}, seeds=0) " in text
    assert f"better = generator({asked}, seeds=0, steps=" in text


def test_a_description_has_the_parts_that_there_is_room_for(tmp_path: Path) -> None:
    recipe = shared(tiny(tmp_path))
    content = storage.read_json(storage.join(recipe.student_uri, folder.CONFIG))
    results = json.loads((GOLDEN / "report.json").read_text())
    whole = card.description(content, results, "models:/mine/3", 10**6)
    assert whole.startswith(f"{markdown.headline(results)}. A one-step generator of ")
    assert 'from_pretrained("models:/mine/3")' in whole
    assert markdown.table(results) in whole
    assert whole.index("## How to draw") < whole.index("## Scores") < whole.index("## How it was made")
    assert not [text for text in ("---\n", "bibtex", "![") if text in whole], "nothing that a registry does not show"
    short = card.description(content, results, "models:/mine/3", len(whole) - 1)
    assert whole.startswith(short)
    assert not whole[len(short) :].strip().startswith("|"), "a part is whole or not there"
    assert "## How it was made" in short
    assert "## Limits" not in short
    assert card.description(content, results, "models:/mine/3", 10) == ""
    other = card.description(None, results, "models:/mine/3", 10**6)
    assert other.startswith(f"{markdown.headline(results)}.\n\n## Scores")


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
