"""The evaluation job of a tiny teacher that takes captions, with captioned digits as the reference."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
import tiny
import tiny_text

from pipeline import storage
from pipeline.digits import captioned, captions
from pipeline.digits.agreement import agreement
from pipeline.digits.networks import scorer
from pipeline.evaluation import plan
from pipeline.evaluation.artist import Artist
from pipeline.evaluation.draws import Draw
from pipeline.models.convnet import to_uint8
from pipeline.recipe import Recipe
from pipeline.settings.text import CaptionSettings, TextSettings, UnseenSettings
from pipeline.workflow import drawing, evaluate

COUNT, SKIP, PAIRS = 6, 3, 30
SAMPLERS = [{"name": "Autoregressive"}, {"name": "FlowMatched"}]
WORDS = sorted({word for text, _ in captions.every_caption() for word in text.split()})


def here(plan: plan.EvaluationPlan, todo: list[Draw], frequencies: Any) -> Iterator[dict[str, Any]]:
    """``drawing.parts_of`` in this process."""
    artist = Artist(plan, todo, frequencies)
    for i, draw in enumerate(todo):
        for item in range(draw.items):
            yield {key: value[0] for key, value in artist({"draw": np.array([i]), "item": np.array([item])}).items()}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, blank_store: Path) -> Recipe:
    folder = tmp_path_factory.mktemp("prompts")
    shutil.copytree(blank_store, folder / "run")
    unseen, of_pairs = captioned.unseen_captions(5, SKIP + COUNT), captioned.training_captions(5, PAIRS)
    captioned.write(unseen, str(folder / "unseen.parquet"))
    captioned.write(of_pairs, str(folder / "captions.parquet"))
    made = tiny.tiny(folder, "llamagen", caption_dim=16, caption_length=8, side=8, multipliers=[1, 1, 1])
    scored = replace(made.evaluate, samplers=SAMPLERS, count=COUNT, grid=4, timing_batches=())
    encoder = tiny_text.tiny_encoder(folder / "encoder", dim=16, vocabulary=WORDS)
    return replace(
        made,
        captions=CaptionSettings(str(folder / "captions.parquet")),
        text=TextSettings(str(encoder), precision="fp32", length=8),
        pairs=replace(made.pairs, count=PAIRS),
        evaluate=replace(scored, captions=UnseenSettings(str(folder / "unseen.parquet"), skip=SKIP)),
    )


@pytest.fixture(scope="module")
def finished(recipe: Recipe) -> tuple[Recipe, str]:
    """The recipe after its evaluation, in this process, and what the job returned."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drawing, "parts_of", here)
        patch.setattr(evaluate.cluster, "session", lambda *args: nullcontext())
        patch.setattr(evaluate.preflight, "check_workers", lambda *args: None)
        return recipe, evaluate.evaluate(recipe)


def results_of(recipe: Recipe) -> dict[str, Any]:
    return storage.read_json(storage.join(recipe.report_uri, "report.json"))


def test_the_report_says_how_far_prompts_were_met(finished: tuple[Recipe, str]) -> None:
    recipe, text = finished
    results = results_of(recipe)
    real, *drawn = results["rows"]
    assert [row["name"] for row in results["rows"]] == ["real images", "teacher, AR", "teacher, FM"]
    assert "prompt agreement" in text
    assert "class accuracy" not in text
    table = captioned.CaptionedDigits(recipe.evaluate.captions.uri or "")
    images, prompts = table[SKIP : SKIP + COUNT][0], results_prompts(recipe)
    pixels = to_uint8(images)
    logits = scorer()(pixels.float() / 127.5 - 1)[1].detach().numpy()
    for moved, key in ((0, "prompt_agreement"), (COUNT // 2, "prompt_agreement_of_others")):
        satisfied = agreement(pixels.numpy(), logits, np.roll(prompts, moved).tolist()).all_named()
        assert real[key] == satisfied.mean()
    assert real["prompt_agreement"] > 0.9
    assert real["count"] == COUNT
    for row in drawn:
        assert 0 <= row["prompt_agreement"] <= 1
        assert row["score"] > 0
        assert [row[name] for name in ("accuracy", "inception_score", "precision")] == [None] * 3


def results_prompts(recipe: Recipe) -> np.ndarray:
    """The prompts of the report, read without its code."""
    import pyarrow.parquet as pq

    rows = pq.read_table(recipe.evaluate.captions.uri).column("caption").to_pylist()
    return np.array(rows[SKIP : SKIP + COUNT], dtype=object)


def test_prompts_are_shown_and_their_origin_is_said(finished: tuple[Recipe, str]) -> None:
    recipe, _ = finished
    results, prompts = results_of(recipe), results_prompts(recipe).tolist()
    assert results["grid"] == prompts[:4]
    made = results["made"]
    assert "classes" not in made
    assert (made["prompts"]["rows"], made["prompts"]["skip"]) == (SKIP + COUNT, SKIP)
    assert made["prompts"]["also among the pairs' prompts"] == 0
    assert made["encoder"]["uri"] == recipe.text.encoder
    assert made["reference"]["images"] == COUNT
    page = storage.read_bytes(storage.join(recipe.report_uri, "report.html")).decode()
    assert all(f'<li dir="auto">{prompt}</li>' in page for prompt in prompts[:4])
    assert f"0 of {COUNT} prompts occur among those of the pairs" in page
    assert "to the real digits that the prompts describe" in page


def test_mlflow_is_told_of_the_prompts(finished: tuple[Recipe, str]) -> None:
    recipe, _ = finished
    client = mlflow.MlflowClient(f"sqlite:///{recipe.run}/mlflow.db")
    experiment = client.get_experiment_by_name(recipe.name)
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.data.params["captions.uri"] == recipe.captions.uri
    assert run.data.params["evaluate.captions.uri"] == recipe.evaluate.captions.uri
    assert run.data.params["text.encoder"] == recipe.text.encoder
    assert run.data.tags["prompts"] == f"{SKIP + COUNT} rows, the first {SKIP} left out"
    assert {one.dataset.name for one in run.inputs.dataset_inputs} == {"prompts", "reference"}


def test_a_finished_report_is_found_again_and_another_skip_is_another(
    finished: tuple[Recipe, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, _ = finished
    monkeypatch.setattr(drawing, "collect", lambda *args: pytest.fail("it draws again"))
    assert "Nothing is missing" in evaluate.evaluate(recipe)
    made = plan.prepare(recipe)
    scored = replace(recipe.evaluate, captions=replace(recipe.evaluate.captions, skip=SKIP - 1))
    other = plan.prepare(replace(recipe, evaluate=scored))
    assert drawing.in_cache(made) == made.draws()
    assert drawing.in_cache(other) == []


def test_prompts_outside_the_grammar_are_drawn_without_the_digits_measure(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a 7\n" * 5 + "a cat\n" * COUNT)
    scored = replace(recipe.evaluate, captions=UnseenSettings(str(tmp_path / "p.txt")), uri=str(tmp_path / "report"))
    made = plan.prepare(replace(recipe, evaluate=scored))
    assert not made.has_agreement
    assert made.notes == ("Prompt agreement is not measured: prompt 5 is no caption of the digits.",)
    draw = made.table()[0]
    statistics = Artist(made, [draw], None).statistics(draw, 0)
    assert statistics.agreement.sum() == statistics.labelled == 0
    assert statistics.variance.value() is not None
    assert made.real == 5_000, "the digits as they are"
