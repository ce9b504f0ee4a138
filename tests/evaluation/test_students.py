"""Other students beside the recipe's own: in one report under names of their own, drawn once, refused where they do
not fit.
"""

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
import torch

from pipeline import storage
from pipeline.evaluation import plan, summary, timing
from pipeline.evaluation.artist import Artist
from pipeline.evaluation.draws import Draw
from pipeline.evaluation.timing import Times
from pipeline.generator import card
from pipeline.host.errors import Missing, Refused
from pipeline.models import checkpoints
from pipeline.pairs.facts import PairFacts
from pipeline.recipe import Recipe
from pipeline.report import comparison, plots
from pipeline.sampling.samplers import Autoregressive
from pipeline.sampling.speed import Speed
from pipeline.scoring import metrics
from pipeline.services import registry
from pipeline.workflow import costs, drawing, evaluate, status

SAMPLERS: list[dict[str, Any]] = [
    {"name": "Autoregressive"},
    {"name": "FewStep", "steps": [1], "paper": {"fid": 9.94}},
    {"name": "FewStep", "steps": [1, 2]},
]
COUNT = 140  # twice the features, and 14 rounds of classes: enough for errors
ROWS = ["teacher, AR", "DD 1 step", "DD 1 step of a", "DD 1 step of b"]
ROWS += ["DD 2 steps (1, 2)", "DD 2 steps (1, 2) of a", "DD 2 steps (1, 2) of b"]


def changed(recipe: Recipe, **settings: Any) -> Recipe:
    """The recipe with other ``evaluate`` settings."""
    return replace(recipe, evaluate=replace(recipe.evaluate, **settings))


def export(recipe: Recipe, uri: str, seed: int, **facts: Any) -> str:
    """A student of the recipe's teacher with weights of its own, written to ``uri``."""
    student = checkpoints.new_student(recipe.teacher, checkpoints.teacher(recipe.teacher), {"mask": "released"}, 0)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(seed)
        for weight in student.parameters():
            weight.add_(0.02 * seed * torch.randn_like(weight))
    about = {"family": recipe.teacher.family, "config": recipe.teacher.config, "mask": "released", "split": 1}
    about |= {"start_steps": [1, 2], "teacher": checkpoints.checksums(recipe.teacher), "pairs_count": 40}
    about |= {"pairs_fingerprint": PairFacts.of(recipe).fingerprint, "mlflow_run": "a-run"}
    checkpoints.save(student, uri, about | facts)
    return uri


def here(plan: plan.EvaluationPlan, todo: list[Draw], frequencies: Any) -> Iterator[dict[str, Any]]:
    """``drawing.parts_of`` in this process."""
    artist = Artist(plan, todo, frequencies)
    for i, draw in enumerate(todo):
        for item in range(draw.items):
            yield {key: value[0] for key, value in artist({"draw": np.array([i]), "item": np.array([item])}).items()}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, blank_store: Path) -> Recipe:
    """A recipe with a student of its own and two others: "a" of 30 other pairs, "b" without facts of its training."""
    folder = tmp_path_factory.mktemp("students")
    shutil.copytree(blank_store, folder / "run")
    made = tiny.tiny(folder, "var", **tiny.IMAGES)
    others = {"a": str(folder / "a"), "b": str(folder / "b.pth")}
    made = changed(made, samplers=SAMPLERS, count=COUNT, grid=3, timing_batches=(), students=others)
    export(made, f"{made.student_uri}/model.safetensors", 1)
    export(made, f"{folder}/a/model.safetensors", 2, pairs_count=30, pairs_fingerprint="other pairs", step=7)
    export(made, f"{folder}/b.safetensors", 3)
    checkpoints.release(made.teacher, f"{folder}/b.safetensors", f"{folder}/b.pth")
    return made


def evaluated(recipe: Recipe) -> str:
    """What the job returns, which draws in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drawing, "parts_of", here)
        patch.setattr(evaluate.cluster, "session", lambda *args: nullcontext())
        patch.setattr(evaluate.preflight, "check_workers", lambda *args: None)
        return evaluate.evaluate(recipe)


@pytest.fixture(scope="module")
def finished(recipe: Recipe) -> dict[str, Any]:
    """report.json of the recipe."""
    evaluated(recipe)
    return results_of(recipe)


def results_of(recipe: Recipe) -> dict[str, Any]:
    return storage.read_json(storage.join(recipe.report_uri, "report.json"))


def test_rows_of_one_sampler_stand_together_and_name_their_students(finished: dict[str, Any], recipe: Recipe) -> None:
    rows = finished["rows"][1:]
    assert [row["name"] for row in rows] == ROWS
    assert [row.get("student") for row in rows] == [None, None, "a", "b", None, "a", "b"]
    assert len({row["score"] for row in rows}) == len(ROWS), "no two students drew the same images"
    assert [bool(row["paper"]) for row in rows] == [row["name"] == "DD 1 step" for row in rows]
    about = finished["made"]["students"]
    assert (about["a"]["pairs_count"], about["a"]["step"], list(about)) == (30, 7, ["a", "b"])
    assert finished["made"]["student"]["pairs_count"] == 40
    text, page = (
        storage.read_bytes(storage.join(recipe.report_uri, f"report.{end}")).decode() for end in ("md", "html")
    )
    for said in ("of a", "with another student", "of which teacher and tokenizer"):
        assert said in text
        assert said in page


def test_the_report_tells_the_differences_with_the_errors_of_pairs(finished: dict[str, Any], recipe: Recipe) -> None:
    """Against a slow jackknife over rounds of ten classes, which leaves the same images out of both rows."""
    made = plan.prepare(recipe)
    shelf, named = drawing.Shelf(made, made.draws()), {line.name: line.draw for line in made.lines()}
    found = {(one["first"], one["second"]): one for one in finished["differences"]}
    assert len(found) == 7
    one, other = "DD 1 step of a", "DD 1 step of b"
    reference = summary.compared_with(made, shelf).gaussian
    first, second = (np.concatenate(shelf[named[name]].features).astype(np.float64) for name in (one, other))
    groups = np.arange(COUNT) // 10 % 10
    left_out, times = [], []
    for group in range(10):
        rest = [rows[groups != group] for rows in (first, second)]
        a, b = (metrics.frechet((rows.mean(0), np.cov(rows.T)), reference) for rows in rest)
        left_out.append(a - b)
        times.append(COUNT / (groups == group).sum())
    apart, times = found[one, other]["difference"], np.array(times)
    limit = 10 * apart - ((1 - 1 / times) * left_out).sum()
    pseudo = times * apart - (times - 1) * left_out
    assert found[one, other]["std"] == pytest.approx(np.sqrt(((pseudo - limit) ** 2 / (times - 1)).mean()), rel=1e-4)
    assert found[one, other]["count"] == COUNT
    for end in ("md", "html"):
        assert "Differences between students" in storage.read_bytes(f"{recipe.report_uri}/report.{end}").decode()


def test_a_report_of_one_student_tells_no_differences(finished: dict[str, Any], recipe: Recipe) -> None:
    """So its files are those of before there were any."""
    own = changed(recipe, students={}, cache=recipe.cache_uri, uri=f"{recipe.run}/one")
    evaluated(own)
    results = results_of(own)
    assert "differences" not in results
    assert "students" not in results["made"]
    assert not any("student" in row for row in results["rows"])


def test_a_student_draws_here_what_it_draws_in_a_report_of_its_own(finished: dict[str, Any], recipe: Recipe) -> None:
    """The same images, under the same fingerprints: reports that share a cache draw them once."""
    shelf = recipe.cache_uri
    own = changed(recipe, students={}, student=recipe.evaluate.students["b"], cache=shelf, uri=f"{recipe.run}/alone")
    made = plan.prepare(own)
    assert set(drawing.in_cache(made)) == set(made.draws())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drawing, "parts_of", lambda *args: pytest.fail("it draws again"))
        rows = {row["name"]: row["score"] for row in finished["rows"] if "sampler" in row}
        assert evaluate.evaluate(own)
    assert [row["score"] for row in results_of(own)["rows"][2:]] == [
        rows["DD 1 step of b"],
        rows["DD 2 steps (1, 2) of b"],
    ]


def test_a_new_name_draws_nothing_and_writes_the_report_again(finished: dict[str, Any], recipe: Recipe) -> None:
    assert "Nothing is missing" in evaluate.evaluate(recipe)
    uri = f"{recipe.run}/renamed"
    a, b = recipe.evaluate.students.values()
    shutil.copytree(recipe.report_uri, uri)
    renamed = changed(recipe, students={"first": a, "b": b}, uri=uri, cache=recipe.cache_uri)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drawing, "parts_of", lambda *args: pytest.fail("it draws again"))
        assert "DD 1 step of first" in evaluate.evaluate(renamed)


def test_a_report_without_other_students_keeps_its_fingerprint(recipe: Recipe) -> None:
    alone, together = plan.prepare(changed(recipe, students={})), plan.prepare(recipe)
    assert alone.fingerprint() != together.fingerprint()
    assert [alone.key(draw) for draw in alone.draws()] == [together.key(draw) for draw in together.draws()][:4]
    assert summary.frame(alone, []) != summary.frame(together, [])
    assert timing.facts(alone) == timing.facts(together), "so that nothing is timed again"


def test_speed_is_that_of_the_own_student_where_the_networks_are_alike(recipe: Recipe) -> None:
    made = plan.prepare(recipe)
    speeds = {sampler: [Speed(1, 2.0, 3.0, (3.0,))] for sampler in [*made.samplers, Autoregressive()]}
    statistics: Any = dict.fromkeys(made.table(), "an image")
    times = Times(speeds, timing.NOTHING.measurement)
    assert [bool(entry.speeds) for entry in summary._entries(made, statistics, times)] == [True] * len(ROWS)
    other = replace(made.beside["a"], exported=made.beside["a"].exported | {"mask": "paper"})
    entries = summary._entries(replace(made, beside=made.beside | {"a": other}), statistics, times)
    assert [entry.name for entry in entries if not entry.speeds] == ["DD 1 step of a", "DD 2 steps (1, 2) of a"]


def test_card_registry_and_comparison_take_the_own_student_alone(finished: dict[str, Any], recipe: Recipe) -> None:
    scores = {row["name"]: row["score"] for row in finished["rows"] if "score" in row}
    assert [row["name"] for row in card._of_student(finished)] == ["DD 1 step", "DD 2 steps (1, 2)"]
    assert "Rows of a, b were drawn by other students" in card._scores(finished)
    tags = registry._tags(finished)
    assert (tags["sampler"], tags["score"]) == ("DD 1 step", f"{scores['DD 1 step']:.17g}")
    other: Any = {
        "uri": "x",
        "SHA-256": "y",
        "results": finished | {"made": finished["made"] | {"student": {"pairs_count": 9}}},
    }
    found = comparison.pair_sets(finished, [other])
    assert found
    assert [point["score"] for point in found["points"]] == 2 * [scores["DD 1 step"], scores["DD 2 steps (1, 2)"]]


def test_mlflow_status_and_dry_run_name_every_student(finished: dict[str, Any], recipe: Recipe) -> None:
    client = mlflow.MlflowClient(f"sqlite:///{recipe.run}/mlflow.db")
    experiment = client.get_experiment_by_name(recipe.name)
    run = client.search_runs([experiment.experiment_id], order_by=["start_time"])[0]
    assert {"DD_1_step/FD", "DD_1_step_of_a/FD", "DD_2_steps_1_2_of_b/FD"} <= run.data.metrics.keys()
    assert run.data.tags["student/b"] == storage.sha256(recipe.evaluate.students["b"])[:12]
    assert "DD 1 step of b" in "\n".join(costs.of_evaluation(recipe).lines)
    fresh = changed(recipe, uri=f"{recipe.run}/fresh")
    assert "140 x DD 2 steps (1, 2) of a" in status.of_evaluation(plan.prepare(fresh))
    registered = changed(fresh, students={"best": "models:/mine@best"})
    assert "140 x DD 1 step of best" in "\n".join(costs.of_evaluation(registered).lines)


def test_each_student_has_its_own_line_in_quality_against_time() -> None:
    rows = [
        {"name": f"{name} {steps}", "type": "DD", "ms": 3.0 * steps, "score": score / steps}
        | ({"student": name} if name else {})
        for name, score in (("", 9.0), ("a", 7.0))
        for steps in (1, 2)
    ]
    results: Any = {"title": "FD", "rows": rows, "made": {"count": 60}, "speed": {"throughput_batch": None}}
    seen: list[list[float]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "png", lambda figure: figure)
        axes = plots.tradeoff(results).axes[0]  # type: ignore[attr-defined]
        seen = [list(line.get_ydata()) for line in axes.lines if line.get_linestyle() == "-"]
        labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert seen == [[9.0, 4.5], [7.0, 3.5]]
    assert labels == ["DD", "DD of a"]


# ---- what is refused, before any work


def test_a_student_that_does_not_fit_is_refused_in_one_sentence(recipe: Recipe, tmp_path: Path) -> None:
    def refusal(name: str = "x", settings: Any = None, **facts: Any) -> str:
        """Why a student of other facts, or of another teacher, is refused."""
        uri = export(
            recipe if settings is None else settings,
            f"{tmp_path}/{len(list(tmp_path.iterdir()))}.safetensors",
            5,
            **facts,
        )
        with pytest.raises(Refused) as error:
            plan.inputs(changed(recipe, students={name: uri}))
        return str(error.value)

    config = recipe.teacher.config
    assert "has teacher.config.classes 5 and this recipe has 10" in refusal(config=config | {"classes": 5})
    assert "has teacher.config.depth 9 and this recipe has 2" in refusal(config=config | {"depth": 9})
    files = checkpoints.checksums(recipe.teacher)
    assert "has a tokenizer of SHA-256 abc and" in refusal(teacher=files | {"tokenizer": "abc"})
    captioned = tiny.CONFIG["llamagen"] | {"caption_dim": 16, "caption_length": 8}
    said = refusal(family="pipeline.models.llamagen", config=captioned)
    assert "has the family pipeline.models.llamagen and this recipe has pipeline.models.var" in said
    smaller = tiny.tiny(tmp_path / "smaller", "var", **(tiny.IMAGES | {"classes": 3}))
    with pytest.raises(Refused, match=r"x is no student of this recipe's teacher: .* teacher\.config\.classes to 3"):
        uri = export(smaller, f"{tmp_path}/plain.safetensors", 5)
        checkpoints.release(smaller.teacher, uri, f"{tmp_path}/plain.pth")
        plan.inputs(changed(recipe, students={"x": f"{tmp_path}/plain.pth"}))


def test_prompts_and_labels_do_not_stand_in_one_report(tmp_path: Path) -> None:
    labels = tiny.tiny(tmp_path, "llamagen", side=8, multipliers=[1, 1, 1], classes=10)
    uri = export(
        labels, f"{tmp_path}/s.safetensors", 1, config=labels.teacher.config | {"caption_dim": 16, "caption_length": 8}
    )
    with pytest.raises(Refused, match="has as its conditions prompts and this recipe has labels"):
        plan.inputs(changed(labels, samplers=SAMPLERS, students={"x": uri}))


def test_missing_students_and_clashing_names_are_refused(recipe: Recipe) -> None:
    own, a = f"{recipe.student_uri}/model.safetensors", recipe.evaluate.students["a"]
    with pytest.raises(Missing, match=r"evaluate.students: x, at nowhere/model.safetensors, is not there"):
        plan.inputs(changed(recipe, students={"x": "nowhere"}))
    with pytest.raises(Refused, match=r"x, at .* has the same weights as the recipe's own student"):
        plan.prepare(changed(recipe, students={"x": own}))
    with pytest.raises(Refused, match=r"y, at .* has the same weights as x"):
        plan.inputs(changed(recipe, students={"x": a, "y": f"{a}/model.safetensors"}))
    with pytest.raises(Refused, match=r"no sampler of evaluate.samplers draws with a student"):
        plan.inputs(changed(recipe, samplers=SAMPLERS[:1]))
    for names, why in ((["A", "a"], "A and a, which clash"), (["a_b", "a__b"], "clash"), (["../x"], "has the name")):
        with pytest.raises(Refused, match=why):
            changed(recipe, students=dict.fromkeys(names, a))


def test_another_teachers_weights_are_allowed_and_said(recipe: Recipe, tmp_path: Path) -> None:
    files = checkpoints.checksums(recipe.teacher) | {"checkpoint": "0123456789abcdef"}
    uri = export(recipe, f"{tmp_path}/other.safetensors", 6, teacher=files)
    made = plan.prepare(changed(recipe, students={"x": uri}))
    assert "The student x was distilled from another teacher's weights, SHA-256 0123456789ab...." in made.notes
