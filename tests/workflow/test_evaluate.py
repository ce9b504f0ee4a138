"""The evaluation job on a tiny teacher and student, with the real digits as the reference."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
import tiny
import torch

from pipeline import noise, storage
from pipeline.digits import networks
from pipeline.evaluation import artist, draws, plan, students, summary, timing
from pipeline.evaluation.artist import Artist
from pipeline.evaluation.draws import Draw
from pipeline.generator import card, folder
from pipeline.host import events, machine, provenance
from pipeline.models import checkpoints
from pipeline.models.convnet import to_uint8
from pipeline.pairs import manifest
from pipeline.pairs import shards as pairs
from pipeline.pairs.facts import PairFacts
from pipeline.pairs.rows import Rows
from pipeline.recipe import Recipe
from pipeline.report import legend, markdown, tables
from pipeline.sampling import sample_files, samplers, speed
from pipeline.sampling.samplers import Autoregressive, FewStep, Models
from pipeline.sampling.speed import Speed
from pipeline.scoring.metrics import frechet
from pipeline.settings.cluster import ClusterSettings
from pipeline.workflow import drawing, evaluate
from pipeline.workflow.drawing import in_order

SAMPLERS: list[dict[str, Any]] = [
    {"name": "Autoregressive"},
    {"name": "FlowMatched"},
    {"name": "FewStep", "steps": [1]},
    {"name": "FewStep", "steps": [1, 2]},
    {"name": "WithTeacher", "start": 2, "resume": 3},
    {"name": "Skip", "n": 1},
    {"name": "OneStepStar", "given_class": True},
]


def changed(recipe: Recipe, **settings: Any) -> Recipe:
    """The recipe with other ``evaluate`` settings."""
    return dataclasses.replace(recipe, evaluate=dataclasses.replace(recipe.evaluate, **settings))


def export_student(recipe: Recipe, name: str, seed: int, **settings: Any) -> None:
    teacher = checkpoints.teacher(recipe.teacher)
    student = checkpoints.family(recipe.teacher).Student.from_teacher(teacher, seed)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(seed)
        for parameter in student.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    facts = {
        "family": recipe.teacher.family,
        "teacher": checkpoints.checksums(recipe.teacher),
        "pairs_fingerprint": PairFacts.of(recipe).fingerprint,
        "mask": "released",
        "pairs_count": 40,
        "steps_per_epoch": 5,
        "mlflow_run": "a-run",
    }
    checkpoints.save(student, storage.join(recipe.student_uri, name), facts | settings)


def write_pairs(recipe: Recipe) -> None:
    facts = PairFacts.of(recipe)
    length, dim = facts.length, facts.dim
    ids = np.arange(40)
    tokens = np.random.default_rng(0).integers(0, 24, (40, length)).astype(np.uint16)
    shards = []
    manifest.claim(recipe.pairs_uri, facts, recipe)
    for start in range(0, 40, recipe.pairs.shard_rows):
        part = ids[start : start + recipe.pairs.shard_rows]
        drawn = noise.gaussian(recipe.pairs.seed, part, length, dim)
        rows = Rows(part, noise.labels(part, 10), drawn, tokens[part])
        shards.append(pairs.write_shard(recipe.pairs_uri, facts, pairs.table(facts, rows)))
    manifest.finish(recipe.pairs_uri, facts, shards, {"rows": 40, "seconds": 1.0, "device": "cpu"})


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Recipe]:
    """A recipe whose pairs, student and two earlier students are there."""
    made = tiny.tiny(tmp_path_factory.mktemp("evaluate"), "var", **tiny.IMAGES)
    made = changed(made, samplers=SAMPLERS, count=24, batch=10, curve_count=12, grid=5, timing_batches=(1, 2))
    write_pairs(made)
    for name, seed in [
        ("step-000010.safetensors", 1),
        ("step-000020.safetensors", 2),
        ("student.safetensors", 2),
    ]:
        export_student(made, name, seed)
    about = folder.described(made, checkpoints.checksums(made.teacher))
    about |= {"config": made.teacher.config, "split": 1, "start_steps": [1, 2], "step": 20}
    storage.write_json(storage.join(made.student_uri, folder.CONFIG), about)
    return made


@pytest.fixture(scope="module")
def finished(recipe: Recipe, ray_cluster: None) -> tuple[Recipe, str]:
    """The recipe after one evaluation, whose events are in the run's folder, and what the job returned."""
    with events.written(f"{recipe.run}/events.jsonl", job="evaluate"):
        return recipe, evaluate.evaluate(recipe)


def copy_report(recipe: Recipe, place: Path) -> None:
    """The report and its statistics as those of a report at a place of its own."""
    shutil.copytree(recipe.report_uri, place)
    shutil.copytree(f"{recipe.run}/cache", place / "cache")


def results_of(recipe: Recipe) -> dict[str, Any]:
    return storage.read_json(storage.join(recipe.report_uri, "report.json"))


@cache
def real_features() -> np.ndarray:
    with torch.no_grad():
        return networks.scorer()(networks.images_and_labels()[0])[0].double().numpy()


def slow_score(recipe: Recipe, sampler: samplers.Sampler, student: str, ids: range) -> float:
    """Everything at once in this process: draw, decode, save as uint8, score, two-pass covariance."""
    teacher = checkpoints.teacher(recipe.teacher)
    uri = storage.join(recipe.student_uri, student)
    made = Models(
        teacher,
        checkpoints.student(recipe.teacher, uri, teacher.codebook),
        recipe.pairs.solver,
        recipe.evaluate.seed,
    )
    with torch.no_grad():
        images = teacher.decode(sampler.draw(made, ids))
        features, _ = networks.scorer()(to_uint8(images).float() / 127.5 - 1)
    gaussians = [(x.mean(0), np.cov(x.T)) for x in (features.double().numpy(), real_features())]
    return frechet(*gaussians)


# ---- end to end


def test_the_report_is_written_and_returned(finished: tuple[Recipe, str]) -> None:
    recipe, text = finished
    results = results_of(recipe)
    assert len(storage.listing(f"{recipe.run}/cache")) == len(plan.prepare(recipe).draws())
    assert storage.listing(recipe.report_uri) == [
        "curve.png",
        "report.html",
        "report.json",
        "report.md",
        "samples.png",
        "timing.json",
        "tradeoff.png",
    ]
    assert [row["name"] for row in results["rows"]] == [
        "real images",
        "teacher, AR",
        "teacher, FM",
        "DD 1 step",
        "DD 2 steps (1, 2)",
        "DD pre-trained-2-3",
        "skip-1",
        "onestep* given the class",
    ]
    assert [row["steps"] for row in results["rows"][1:]] == [3, 3, 1, 2, 3, 2, 1]
    assert markdown.table(results) in text
    assert markdown.table(results) in storage.read_bytes(storage.join(recipe.report_uri, "report.md")).decode()
    assert [row["type"] for row in results["rows"]] == [
        "real",
        "AR",
        "AR",
        "DD",
        "DD",
        "DD + AR",
        "baseline",
        "baseline",
    ]
    counted = checkpoints.parameters(recipe.teacher, {"mask": "released"})
    of = [counted[name] for name in ("teacher", "teacher", "student", "student", "student", "teacher")]
    assert [row.get("parameters") for row in results["rows"]] == [None, *of, None]
    assert results["speed"] == {"teacher": results["rows"][1]["speeds"], "throughput_batch": 2}
    for row in results["rows"][1:]:
        assert row["count"] == 24
        assert [speed["batch"] for speed in row["speeds"]] == [1, 2]
        assert row["ms"] > 0
        assert row["speedup"] > 0
        assert row["throughput_speedup"] > 0
        assert row["kid"] > 0
        assert row["score_std"] is None, "of fewer images than twice the features"
    assert results["rows"][0]["accuracy"] > 0.97


def test_events_tell_of_each_part(finished: tuple[Recipe, str]) -> None:
    recipe, _ = finished
    told = [json.loads(line) for line in Path(recipe.run, "events.jsonl").read_text().splitlines()]
    told = [line for line in told if line["event"] != "warning"]
    begun, parts = told[0], [line for line in told if line["event"] == "part"]
    assert (begun["event"], begun["done"], begun["total"]) == ("begun", 0, len(parts))
    assert begun["fingerprint"] == results_of(recipe)["fingerprint"]
    assert [line["done"] for line in parts] == [*range(1, len(parts) + 1)]
    assert {line["draw"] for line in parts} == {draw.name for draw in plan.prepare(recipe).draws()}


def test_the_card_of_the_student_has_the_scores(finished: tuple[Recipe, str]) -> None:
    recipe, _ = finished
    text = Path(recipe.student_uri, folder.CARD).read_text()
    for row in results_of(recipe)["rows"]:
        assert row["name"] in text
    picture = Path(recipe.student_uri, card.PICTURE).read_bytes()
    assert picture == Path(recipe.report_uri, "samples.png").read_bytes()
    Path(recipe.student_uri, folder.CARD).write_text("written by distill, after the report")
    assert "Nothing is missing" in evaluate.evaluate(recipe)
    assert Path(recipe.student_uri, folder.CARD).read_text() == text


def test_scores_equal_those_of_a_single_slow_pass(finished: tuple[Recipe, str]) -> None:
    recipe, _ = finished
    rows = {row["name"]: row for row in results_of(recipe)["rows"]}
    for name, sampler in [("teacher, AR", Autoregressive()), ("DD 1 step", FewStep(recipe.train.split))]:
        expected = slow_score(recipe, sampler, "student.safetensors", range(24))
        assert rows[name]["score"] == pytest.approx(expected, rel=1e-3)


def test_the_curve_scores_every_exported_student(finished: tuple[Recipe, str]) -> None:
    recipe, _ = finished
    curve = results_of(recipe)["curve"]
    assert [(p["step"], p["name"]) for p in curve["points"]] == [
        (step, name) for step in (10, 20) for name in ("DD 1 step", "DD 2 steps (1, 2)")
    ]
    assert set(curve["teachers"]) == {"teacher, AR", "teacher, FM"}
    expected = slow_score(recipe, FewStep(recipe.train.split), "step-000010.safetensors", range(12))
    assert curve["points"][0]["score"] == pytest.approx(expected, rel=1e-3)


def test_the_agreement_compares_two_ar_draws_of_different_ids(finished: tuple[Recipe, str]) -> None:
    agreement = results_of(finished[0])["agreement"]
    assert agreement["ar_to_ar"] > 0
    assert agreement["ratio"] == pytest.approx(agreement["fm_to_ar"] / agreement["ar_to_ar"])


def test_a_finished_report_is_not_made_again(finished: tuple[Recipe, str], monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, text = finished
    monkeypatch.setattr(drawing, "collect", None)
    again = evaluate.evaluate(recipe)
    assert "Nothing is missing" in again
    assert again.split("\n\n")[0] == text.split("\n\n")[0]


def test_a_rerun_draws_nothing_that_is_in_the_cache(
    finished: tuple[Recipe, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, _ = finished
    drawn = []
    monkeypatch.setattr(drawing, "parts_of", lambda plan, todo, frequencies: drawn.extend(todo) or [])
    made = plan.prepare(recipe)
    statistics = drawing.collect(made, None)
    assert drawn == []
    assert set(statistics) == set(made.draws())
    beside = plan.prepare(changed(recipe, uri=f"{recipe.run}/beside", cache=f"{recipe.run}/cache"))
    assert set(drawing.collect(beside, None)) == set(made.draws())
    assert drawn == [], "two reports may share a cache"
    other = plan.prepare(changed(recipe, seed=99))
    drawing.collect(other, None)
    assert [draw.sampler for draw in drawn if draw.sampler is None] == []
    assert len(drawn) == len(other.draws()) - 1


def test_a_report_that_is_to_show_something_else_is_written_again_from_what_is_there(
    finished: tuple[Recipe, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, _ = finished
    before = results_of(recipe)
    copy_report(recipe, tmp_path / "report")
    other = tmp_path / "other.json"  # of a run on half as many pairs
    half = before | {"made": before["made"] | {"student": before["made"]["student"] | {"pairs_count": 20}}}
    other.write_text(json.dumps(half))
    monkeypatch.setattr(drawing, "parts_of", lambda *args: pytest.fail("it draws again"))
    monkeypatch.setattr(timing, "time_alone", lambda *args: pytest.fail("it measures speed again"))
    figures = {"fid": 9.94, "seconds": 0.021}
    listed = [entry | ({"paper": figures} if i == 2 else {}) for i, entry in enumerate(SAMPLERS)]
    again = changed(recipe, uri=str(tmp_path / "report"), samplers=listed, compare=(str(other),))
    assert "9.94" in evaluate.evaluate(again)
    after = results_of(again)
    assert [row.get("paper") for row in after["rows"]] == [None, {}, {}, figures, {}, {}, {}, {}]
    for old, new in zip(before["rows"], after["rows"], strict=True):
        assert old | {"paper": None} == new | {"paper": None}
    assert {point["pairs"] for point in after["pair_sets"]["points"]} == {20, 40}
    assert {point["x"] for point in after["pair_sets"]["curve"]["points"]} == {2.0, 4.0}
    assert "pairs.png" in storage.listing(again.report_uri)
    assert "Nothing is missing" in evaluate.evaluate(again)


@pytest.mark.faults("report: timed on another machine", "report: timing.json deleted", "report: of an older format")
def test_times_that_are_not_of_this_setting_are_measured_again_and_nothing_is_drawn(
    finished: tuple[Recipe, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More actors (so threads), another batch, another machine, times lost, a report of the commit before."""
    cache, few = f"{finished[0].run}/cache", [{"name": "Autoregressive"}, {"name": "FewStep", "steps": [1]}]
    recipe = changed(finished[0], uri=str(tmp_path / "report"), cache=cache, samplers=few, curve_count=0)
    monkeypatch.setattr(drawing, "parts_of", lambda *args: pytest.fail("it draws again"))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(evaluate.cluster, "connect", lambda recipe: None)
    asked: list[tuple[int, ...]] = []

    def timed(plan: Any, frequencies: Any, batches: tuple[int, ...], actors: int) -> dict[str, Any]:
        asked.append(batches)
        return timing.time_samplers(plan, frequencies, batches, threads=1)

    monkeypatch.setattr(timing, "time_alone", timed)
    monkeypatch.setattr(machine, "BEFORE", 0.0)
    sizes = [Speed(batch, 1.0, 2.0, (2.0, 2.0, 2.0)) for batch in (1, 2)]
    monkeypatch.setattr(speed, "measure", lambda models, listed, batches: dict.fromkeys(listed, sizes))
    place, times = tmp_path / "report" / "report.json", tmp_path / "report" / "timing.json"

    def run(recipe: Recipe, measures: bool) -> None:
        before, count = results_of(recipe), len(asked)
        assert ("Nothing is missing" in evaluate.evaluate(recipe)) is not measures
        assert len(asked) - count == measures
        after = results_of(recipe)
        assert (after["made"]["timing"]["key"] == before["made"]["timing"].get("key")) is not measures
        for old, new in zip(before["rows"], after["rows"], strict=True):
            assert old.get("score") == new.get("score")

    evaluate.evaluate(recipe)
    run(recipe, measures=False)
    run(changed(recipe, actors=recipe.evaluate.actors + 1), measures=True)
    evaluate.evaluate(recipe)
    assert len(asked) == 2, "the first times are still there, and the report is theirs again"
    run(recipe, measures=False)
    monkeypatch.setattr(machine, "device_name", lambda device: "another CPU")
    run(recipe, measures=True)
    assert results_of(recipe)["made"]["timing"]["device"] == "another CPU"
    run(recipe, measures=False)
    old = results_of(recipe)
    old["made"]["timing"] = {"device": "another CPU", "threads": 1}
    place.write_text(json.dumps(old | {"shown": "of format 2", "baseline": {"batch": 1}}))
    times.unlink()
    run(recipe, measures=True)
    run(recipe, measures=False)
    times.unlink()
    evaluate.evaluate(recipe)
    assert len(asked) == 5, "who deletes the times wants them anew"


def test_numbers_do_not_depend_on_actors_or_batch(finished: tuple[Recipe, str], tmp_path: Path) -> None:
    recipe, _ = finished
    listed = [{"name": "Autoregressive"}, {"name": "FewStep", "steps": [1]}]
    other = changed(recipe, uri=str(tmp_path), actors=2, batch=7, samplers=listed, curve_count=0)
    evaluate.evaluate(other)
    before = {row["name"]: row for row in results_of(recipe)["rows"]}
    for row in results_of(other)["rows"]:
        for key in ("score", "pixel_score", "variance", "accuracy", "precision", "recall", "inception_score"):
            expected = before[row["name"]].get(key)
            assert row.get(key) == (pytest.approx(expected, rel=1e-3) if expected is not None else None), key
        if row["name"] == "real images":  # cut and merged alike by any number of actors: the same bits
            assert row["variance"] == before["real images"]["variance"]
    assert results_of(other)["agreement"] is None
    assert results_of(other)["curve"] is None


@pytest.mark.parametrize(("actors", "threads"), [(1, 1), (3, 3), (100, 4)])
def test_speed_is_timed_with_the_cores_of_the_pool_on_one_machine(
    recipe: Recipe, ray_cluster: None, monkeypatch: pytest.MonkeyPatch, actors: int, threads: int
) -> None:
    monkeypatch.setattr(timing, "time_samplers", lambda plan, frequencies, batches, threads: threads)
    assert timing.time_alone(plan.prepare(recipe), None, (1,), actors) == threads  # the machine has 4


def test_a_dry_run_plans_and_draws_nothing(recipe: Recipe, ray_cluster: None, tmp_path: Path) -> None:
    place = tmp_path / "report"
    text = evaluate.evaluate(dataclasses.replace(changed(recipe, uri=str(place)), dry_run=True))
    assert "24 x teacher, AR from id 24" in text
    assert "12 x DD 1 step at step 10" in text
    assert "time         about" in text.partition("== report")[2]
    assert not place.exists()


def test_a_dry_run_of_a_finished_report_starts_nothing(
    finished: tuple[Recipe, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate.cluster, "connect", lambda recipe: pytest.fail("Ray is started"))
    text = evaluate.evaluate(dataclasses.replace(finished[0], dry_run=True))
    drawn = [draw for draw in plan.prepare(finished[0]).draws() if draw.sampler]
    assert text.count("in the cache") == len(drawn)
    assert "nothing is left to do" in text.partition("== report")[2]


@pytest.mark.faults("report: file of it deleted")
def test_a_report_of_which_a_file_is_gone_is_written_again(
    finished: tuple[Recipe, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the statistics and times that are there; and what killed evaluations left is swept."""
    recipe = changed(finished[0], uri=str(tmp_path / "report"))
    copy_report(finished[0], Path(recipe.report_uri))
    monkeypatch.setattr(drawing, "parts_of", lambda *args: pytest.fail("it draws again"))
    monkeypatch.setattr(timing, "time_alone", lambda *args: pytest.fail("it measures speed again"))
    before = storage.listing(recipe.report_uri)
    left = [f"cache/{'0' * 24}-{'1' * 12}.npz", f"samples/a.npz{sample_files.PART}{'0' * 24}-00001"]
    left.append(f"cache/{storage.TEMPORARY}x.npz@nowhere")
    for gone in (name for name in before if name not in ("cache", "report.json", "timing.json")):
        storage.remove(storage.join(recipe.report_uri, gone))
        for name in left:
            storage.write_bytes(storage.join(recipe.report_uri, name), b"left behind")
        assert "Nothing is missing" not in evaluate.evaluate(recipe), gone
        assert set(before) <= set(storage.listing(recipe.report_uri))
        assert not [name for name in left if storage.exists(storage.join(recipe.report_uri, name))]
    assert "Nothing is missing" in evaluate.evaluate(recipe)
    assert len(storage.listing(f"{recipe.report_uri}/cache")) == len(plan.prepare(recipe).draws())


def test_a_report_of_before_keeps_its_cache_where_it_is_or_wherever_it_is_moved_to(
    finished: tuple[Recipe, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Earlier versions had the statistics and the samplers' images inside the report's folder."""
    recipe = dataclasses.replace(finished[0], run=str(tmp_path / "run"))
    shutil.copytree(finished[0].run, recipe.run)
    report, here, there = Path(recipe.report_uri), Path(recipe.report_uri, "cache"), Path(recipe.run, "cache")
    there.rename(here)
    monkeypatch.setattr(drawing, "parts_of", lambda *args: pytest.fail("it draws again"))
    monkeypatch.setattr(timing, "time_alone", lambda *args: pytest.fail("it measures speed again"))
    for place in (here, there):
        assert plan.prepare(recipe).shelf == str(place)
        assert "Nothing is missing" in evaluate.evaluate(recipe)
        (report / "report.md").unlink()
        (place / f"{'0' * 24}-{'1' * 12}.npz").write_bytes(b"of no draw")
        assert "The report is" in evaluate.evaluate(recipe)
        assert len(storage.listing(str(place))) == len(plan.prepare(recipe).draws())
        if place == here:
            assert not there.exists()
            here.rename(there)
    assert storage.listing(recipe.report_uri) == storage.listing(finished[0].report_uri)
    named = changed(recipe, cache=str(tmp_path / "own"))
    assert plan.prepare(named).shelf == str(tmp_path / "own")
    images = plan.prepare(changed(recipe, npz=True))
    assert set(images.samples().values()) == {f"{recipe.run}/samples/{Path(p).name}" for p in images.samples().values()}
    (report / "samples").mkdir()
    (report / "samples" / "DD_1_step.npz").write_bytes(b"images")
    assert plan.prepare(changed(recipe, npz=True)).images == f"{recipe.report_uri}/samples"


def test_a_shared_cache_keeps_what_others_need(finished: tuple[Recipe, str], tmp_path: Path) -> None:
    made = plan.prepare(changed(finished[0], uri=str(tmp_path / "report"), cache=str(tmp_path / "cache")))
    for name in (f"{'0' * 24}-{'1' * 12}.npz", f"{storage.TEMPORARY}x.npz@nowhere"):
        storage.write_bytes(str(tmp_path / "cache" / name), b"")
    evaluate.sweep(made)
    assert storage.listing(str(tmp_path / "cache")) == [f"{'0' * 24}-{'1' * 12}.npz"]


def test_mlflow_holds_numbers_pictures_and_links(finished: tuple[Recipe, str]) -> None:
    recipe, _ = finished
    client = mlflow.MlflowClient(f"sqlite:///{recipe.run}/mlflow.db")
    experiment = client.get_experiment_by_name(recipe.name)
    (run,) = client.search_runs(
        [experiment.experiment_id], "tags.job = 'evaluate'", max_results=1, order_by=["start_time ASC"]
    )
    rows = {row["name"]: row for row in results_of(recipe)["rows"]}
    assert run.info.status == "FINISHED"
    assert run.data.metrics["DD_1_step/FD"] == pytest.approx(rows["DD 1 step"]["score"])
    own = [name for name in run.data.metrics if not name.startswith("system/")]  # MLflow shows those on another page
    assert len(own) <= 12, "each of them is a chart"
    result = f"FD {rows['DD 1 step']['score']:.1f} at 1 step"
    assert run.info.run_name == f"evaluate: {result}"
    note = run.data.tags["mlflow.note.content"]
    assert note.startswith(f"**{result}.** ")
    assert f"Folder: `{recipe.report_uri}`" in note
    assert f"jobs/sample.py --student {recipe.student_uri} " in note
    assert markdown.table(results_of(recipe)) in note
    contexts = {one.dataset.name: one.tags[0].value for one in run.inputs.dataset_inputs}
    assert contexts == {"pairs": "training", "reference": "evaluation"}
    assert run.data.tags["distill_run"] == "a-run"
    assert run.data.tags["pairs_fingerprint"] == PairFacts.of(recipe).fingerprint
    files = {file.path for file in client.list_artifacts(run.info.run_id)}
    pictures = {"samples.png", "curve.png", "tradeoff.png"}
    assert files == {"report.html", "report.md", "report.json", "scores.json", "recipe.yaml"} | pictures
    assert len(client.get_metric_history(run.info.run_id, "curve/DD_1_step")) == 2


# ---- the parts


def test_units_of_work_join_to_the_same_images(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draws, "PART_IMAGES", 10)
    made = plan.prepare(changed(recipe, samplers=[{"name": "FewStep"}], batch=4))
    draw = made.table()[0]
    artist = Artist(made, [draw], None)
    rows = [artist({"draw": np.array([0]), "item": np.array([item])}) for item in (2, 0, 1)]
    plain = [{"draw": 0, "item": int(row["item"][0]), "statistics": row["statistics"][0]} for row in rows]
    parts = [part for _, part in in_order(plain)]
    assert [part.moments.n for part in parts] == [10, 10, 4]
    monkeypatch.setattr(draws, "PART_IMAGES", 1_000)
    whole = artist.statistics(draw, 0)
    for part in parts[1:]:
        parts[0].merge(part)
    difference = np.concatenate(parts[0].images).astype(int) - np.concatenate(whole.images)
    assert np.abs(difference).max() <= 1
    # a pixel that falls on the other side of .5 in another batch size moves features by some 1e-4
    np.testing.assert_allclose(np.concatenate(parts[0].features), np.concatenate(whole.features), atol=5e-3)
    np.testing.assert_allclose(parts[0].moments.gaussian()[1], whole.moments.gaussian()[1], atol=1e-3)


def test_every_fact_that_shapes_a_draw_is_in_its_key(recipe: Recipe) -> None:
    base = plan.prepare(recipe)
    by_name = {draw.name: draw for draw in base.table()}
    solver = dataclasses.replace(recipe, pairs=dataclasses.replace(recipe.pairs, solver=plan_solver()))
    with pytest.MonkeyPatch.context() as patch:  # another solver is another pair set, and this student is not of it
        patch.setattr(students, "exported", lambda uri, wanted: base.exported)
        patch.setattr(manifest, "read", lambda *args: {"fingerprint": "x", "count": 1})
        other = plan.prepare(solver)
    for name, same in [("teacher, AR", True), ("DD 1 step", True), ("teacher, FM", False)]:
        assert (base.key(by_name[name]) == other.key(by_name[name])) is same
    assert base.key(base.reference()) == plan.prepare(changed(recipe, seed=7)).key(base.reference())
    assert len({base.key(draw) for draw in base.draws()}) == len(base.draws())
    assert base.teacher_again() is not None
    assert base.key(base.teacher_again()) != base.key(by_name["teacher, AR"])


@pytest.mark.faults("report: sampler changed")
def test_a_changed_sampler_is_drawn_again_and_its_reason_said(
    finished: tuple[Recipe, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What REVIEW B2 did: the student's jump halved, in the file that the actors import."""
    recipe, _ = finished
    read = provenance.source

    def changed_source(old: str, new: str) -> plan.EvaluationPlan:
        def source(name: str) -> str:
            return read(name).replace(old, new)

        monkeypatch.setattr(provenance, "source", source)
        return plan.prepare(recipe)

    base, halved = (
        plan.prepare(recipe),
        changed_source("x = models.jump(x, inputs, t", "x = 0.5 * models.jump(x, inputs, t"),
    )
    again = [draw.name for draw in base.draws() if draw not in drawing.in_cache(halved)]
    assert set(again) == {draw.name for draw in base.draws() if isinstance(draw.sampler, FewStep)}
    assert evaluate._last_report(halved) is None
    drawn: list[str] = []
    monkeypatch.setattr(drawing, "parts_of", lambda plan, todo, _: drawn.extend(draw.name for draw in todo) or [])
    drawing.collect(halved, None)
    assert drawn == again
    assert "Drawn again, because the code that shapes them has changed: DD 1 step" in capsys.readouterr().err
    decoder = changed_source("self.post_quant_conv(quantized)", "0.5 * self.post_quant_conv(quantized)")
    scoring_path = changed_source("pixels.float() / 127.5 - 1", "pixels.float() / 127 - 1")
    words = changed_source("Alg. 3: the student jumps", "Algorithm 3: it jumps")
    assert drawing.in_cache(scoring_path) == []
    assert [draw.name for draw in drawing.in_cache(decoder)] == ["real images"]
    assert words.fingerprint() == base.fingerprint()


def test_statistics_of_an_earlier_version_are_named_and_not_used(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = plan.prepare(changed(recipe, uri=str(tmp_path)))
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / f"{'0' * 24}.npz").write_bytes(b"old")
    monkeypatch.setattr(drawing, "parts_of", lambda *args: [])
    drawing.collect(made, None)
    assert "that do not say which code drew them are not used" in capsys.readouterr().err


def test_flavour_and_weights_are_in_every_key_and_the_reference_in_that_of_real_images(recipe: Recipe) -> None:
    base = plan.prepare(recipe)

    def like(**facts: Any) -> plan.EvaluationPlan:
        return dataclasses.replace(base, facts=base.facts | facts)

    network = {"inception": "a", "flavour": "torch-fidelity"}
    kinds = [base, like(features=network), like(features=network | {"flavour": "pytorch-fid"})]
    kinds += [like(features=network | {"inception": "formula"})]
    other = like(reference={"SHA-256": "b"})
    for draw in base.draws():
        assert len({made.key(draw) for made in kinds}) == 4
        assert (other.key(draw) == base.key(draw)) is (draw.sampler is not None)
    assert other.fingerprint() != base.fingerprint()


def test_features_are_kept_as_memory_allows(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    base = plan.prepare(recipe)
    assert {draw.keep for draw in base.table()} == {24}
    assert base.reference().keep == 5_000
    assert {draw.keep for draws in base.curve().values() for draw in draws} == {0}
    assert base.table()[0].kept(np.arange(24)).all()
    monkeypatch.setattr(plan, "FEATURE_BYTES", 24 * 64 * 4 - 1)
    monkeypatch.setattr(plan, "REAL_FEATURES", 1_000)
    draw = base.table()[0]
    assert draw.keep == 20, "whole rounds of ten classes"
    assert base.reference().keep == 1_000
    monkeypatch.setattr(plan, "FEATURE_BYTES", 15 * 64 * 4)
    draw = dataclasses.replace(base.table()[0], count=44)
    kept = np.concatenate([draw.kept(part) for part in np.array_split(np.arange(44), 3)])
    assert np.flatnonzero(kept).tolist() == list(range(30, 40)), "one of four whole rounds, however they are cut"
    assert draw.rounds().tolist() == [3] * 10


def test_samples_are_written_for_other_evaluators_and_made_up_for_when_missing(
    finished: tuple[Recipe, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A finished report whose images are wanted afterwards, then one of them lost."""
    copy_report(finished[0], tmp_path / "report")
    listed = [{"name": "Autoregressive"}, {"name": "FewStep", "steps": [1]}]
    recipe = changed(finished[0], uri=str(tmp_path / "report"), npz=True, samplers=listed, curve_count=0)
    monkeypatch.setattr(draws, "PART_IMAGES", 10)
    made, drawn = plan.prepare(recipe), []

    def here(plan: Any, todo: list[Draw], frequencies: Any) -> Iterator[dict[str, Any]]:
        drawn.append([draw.name for draw in todo])
        artist = Artist(plan, todo, None)
        for i, draw in enumerate(todo):
            for item in reversed(range(draw.items)):
                yield {k: v[0] for k, v in artist({"draw": np.array([i]), "item": np.array([item])}).items()}

    monkeypatch.setattr(drawing, "parts_of", here)
    shelf = drawing.collect(made, None)
    assert drawn == [["teacher, AR", "DD 1 step"]], "whose statistics were there, but no images"
    samples = tmp_path / "report" / "samples"
    assert sorted(path.name for path in samples.iterdir()) == ["DD_1_step.npz", "teacher_AR.npz"]
    with np.load(samples / "DD_1_step.npz") as file:
        images = file["arr_0"]
    assert images.shape == (24, 32, 32, 3)
    grid = np.concatenate(shelf[made.table()[1]].images)
    assert np.array_equal(images.transpose(0, 3, 1, 2), grid), "all 24, though the grid has 5 columns"
    drawing.collect(made, None)
    assert len(drawn) == 1, "nothing is missing"
    before = (samples / "DD_1_step.npz").read_bytes()
    (samples / "DD_1_step.npz").unlink()
    assert not drawing.saved(made, made.table()[1])
    drawing.collect(made, None)
    assert drawn[1] == ["DD 1 step"]
    with np.load(samples / "DD_1_step.npz") as file:
        assert np.array_equal(file["arr_0"], images)
    assert len((samples / "DD_1_step.npz").read_bytes()) == len(before)


def test_a_students_precision_is_in_its_draws_alone_and_compiling_in_none(recipe: Recipe) -> None:
    base = plan.prepare(recipe)
    low, fast = plan.prepare(changed(recipe, precision="bf16")), plan.prepare(changed(recipe, compile=True))
    for draw in base.draws():
        assert (low.key(draw) == base.key(draw)) is not bool(draw.student)
        assert fast.key(draw) == base.key(draw)
    auto = dataclasses.replace(recipe.teacher, graphs="auto")
    on = {"cluster": ClusterSettings(gpus=1)}
    recorded = plan.prepare(dataclasses.replace(recipe, teacher=auto, **on))
    jumping = plan.prepare(dataclasses.replace(changed(recipe, graphs="auto"), **on))
    eager = plan.prepare(dataclasses.replace(changed(recipe, graphs="auto"), teacher=auto))  # on a CPU
    for other in (recorded, jumping, eager):
        assert [other.key(draw) for draw in base.draws()] == [base.key(draw) for draw in base.draws()]
    made = (base, low, fast, recorded, jumping)
    assert len({each.fingerprint() for each in made}) == 5, "what is compiled or recorded is timed anew"
    assert eager.fingerprint() == base.fingerprint()
    assert timing.facts(eager) == timing.facts(base)
    assert [timing.facts(one)["graphs"] for one in (base, recorded, jumping)] == [False, True, False]
    assert {"student's graphs"} == timing.facts(jumping).keys() - timing.facts(base).keys()
    assert summary._timing(jumping, timing.NOTHING)["CUDA graphs of students and decoder"] is True
    assert summary._timing(recorded, timing.NOTHING)["CUDA graphs of the teacher"] is True


def test_what_is_drawn_with_is_recorded_where_the_recipe_says_so(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And eager otherwise; a student that is still to be trained, too. There is no GPU here, so nothing is recorded."""
    made, seen = plan.prepare(recipe), []
    monkeypatch.setattr(artist, "draw_images", lambda models, *_: seen.append(models))
    for section in ("teacher", "evaluate"):
        monkeypatch.setattr(Recipe, "records", lambda self, asked, section=section: asked == section)
        models = artist.load_models(made, None)
        students = [artist.load_student(made, made.student, models)]
        for one in (made, dataclasses.replace(made, students={})):
            artist.seconds_per_image(one, [FewStep(1)])
            students.append(seen[-1].student)
            assert (seen[-1].teacher.decodes is not None) is (section == "evaluate")
        assert (models.teacher.decodes is not None) is (section == "evaluate")
        assert [one.jumps is not None for one in students] == [section == "evaluate"] * 3
        assert len({id(one.jumps) for one in students}) == (3 if section == "evaluate" else 1)


def plan_solver() -> Any:
    from pipeline.flow.matching import Solver

    return Solver("fixed", 20)


# ---- bad inputs


def failing(recipe: Recipe, sentence: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=sentence) as caught:
        evaluate.evaluate(recipe)
    assert "\n" not in str(caught.value)


def test_bad_recipes_are_one_sentence(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate.cluster, "connect", lambda recipe: pytest.fail("sampling began"))
    elsewhere = dataclasses.replace(recipe, run=str(tmp_path))
    failing(changed(recipe, samplers=[]), "evaluate.samplers is empty")
    failing(changed(recipe, samplers=[{"name": "FewStep", "steps": [1, 9]}]), "end by 3")
    failing(elsewhere, "holds no pair set; run generate_pairs")
    failing(
        changed(elsewhere, samplers=[{"name": "FewStep"}]),
        "there is no student at .*; run jobs/distill.py first",
    )
    no_weights = dataclasses.replace(recipe.teacher, checkpoint=str(tmp_path / "none"))
    failing(dataclasses.replace(recipe, teacher=no_weights), "none could not be read: there is no such file")
    (tmp_path / "file").write_text("")
    failing(
        changed(recipe, uri=str(tmp_path / "file" / "report"), samplers=[{"name": "Skip", "n": 1}]),
        "could not be",
    )


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"teacher": {"checkpoint": "other", "tokenizer": "other"}}, "was distilled with teacher {.*other"),
        ({"pairs_fingerprint": "other"}, "was distilled with pairs_fingerprint other, but this recipe has"),
        ({"family": "pipeline.models.llamagen"}, "was distilled with family pipeline.models.llamagen"),
    ],
)
def test_a_student_of_another_recipe_is_refused(
    recipe: Recipe, tmp_path: Path, settings: dict[str, Any], sentence: str
) -> None:
    other = dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, uri=str(tmp_path)))
    export_student(other, "student.safetensors", 3, **settings)
    failing(changed(other, samplers=[{"name": "FewStep"}]), sentence)


def test_a_students_folder_stands_for_its_weights(recipe: Recipe) -> None:
    found = plan.prepare(changed(recipe, student=recipe.student_uri))
    assert found.student == plan.prepare(recipe).student == folder.weights(recipe.student_uri)


def test_teachers_alone_need_no_student(recipe: Recipe, tmp_path: Path) -> None:
    alone = dataclasses.replace(changed(recipe, samplers=[{"name": "Autoregressive"}]), run=str(tmp_path))
    made = plan.prepare(alone)
    assert made.students == {}
    assert made.curve() == {}
    assert [draw.name for draw in made.draws()] == ["real images", "teacher, AR"]


@pytest.mark.faults("report: student of another split")
def test_a_student_draws_as_it_was_trained_and_departures_are_said(
    recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its file knows split and start steps; the recipe's train section may be another run's."""
    train = dataclasses.replace(recipe.train, uri=str(tmp_path), split=1)
    listed = [{"name": "FewStep"}, {"name": "FewStep", "steps": [1, 3]}, {"name": "FewStep", "split": 2}]
    listed += [{"name": "WithTeacher", "start": 2, "resume": 3}, {"name": "WithTeacher", "start": 1, "resume": 4}]
    other = changed(dataclasses.replace(recipe, train=train), samplers=listed)
    export_student(other, "student.safetensors", 3, split=3, start_steps=[1, 2])
    made = plan.prepare(other)
    assert [sampler.split for sampler in made.samplers] == [3, 3, 2, 3, 3]  # type: ignore[attr-defined]
    assert made.notes == ("train.split is 1, but the student was trained with 3, and so it draws.",)
    assert [made.departures(sampler) for sampler in made.samplers] == [
        [],
        ["jumps from step 3, trained from 1, 2"],
        ["split 2, trained with 3"],
        ["jumps from step 3, trained from 1, 2"],
        [],
    ]
    assert evaluate.said_of(made)[1] == (
        "DD 2 steps (1, 3) asks more of its student than that was trained for: jumps from step 3, trained from 1, 2."
    )
    results = {"rows": [{"name": "DD 2 steps (1, 3)", "sampler": {"name": "FewStep"}, "departs": ["split 2"]}]}
    results |= {"notes": list(made.notes), "made": {}}  # type: ignore[dict-item]
    assert tables.marked(results["rows"][0]) == "DD 2 steps (1, 3) †"
    assert ("†", "asks more of its student than that was trained for: DD 2 steps (1, 3): split 2.") in (
        legend.about_rows(results)
    )
    assert ("note", made.notes[0]) in legend.about_rows(results)
    (tmp_path / "theirs.pth").write_bytes(Path(tmp_path, "student.safetensors").read_bytes())
    silent = plan.prepare(changed(other, student=str(tmp_path / "theirs.pth")))
    assert "does not say with which split and start steps it was trained" in silent.notes[0]
    assert not any(silent.departures(sampler) for sampler in silent.samplers)


def test_the_curve_holds_students_of_the_students_own_run(recipe: Recipe, tmp_path: Path) -> None:
    other = dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, uri=str(tmp_path)))
    own = {"recipe_fingerprint": "a", "mlflow_run": "resumed"}
    for step, facts in {10: own, 20: own | {"recipe_fingerprint": "b"}, 30: own, 40: own}.items():
        export_student(other, f"step-{step:06}.safetensors", step, step=step, **facts)
    export_student(other, "student.safetensors", 1, step=30, **(own | {"mlflow_run": "first"}))
    made = plan.prepare(other)
    assert list(made.snapshots) == [10, 30], "not of another recipe, not later than the student"
    assert "leaves out the students of step 20, 40" in made.notes[-1]
    (tmp_path / "theirs.pth").write_bytes(Path(tmp_path, "student.safetensors").read_bytes())
    assert plan.prepare(changed(other, student=str(tmp_path / "theirs.pth"))).snapshots == {}


def test_how_images_were_made_is_what_their_statistics_say() -> None:
    one: dict[str, Any] = {
        "date": "2026-01-02",
        "code": "a",
        "batch": 10,
        "machines": [{"host": "a", "device": "x"}, {"host": "b", "device": "x"}],
    }
    other = {"date": "2026-01-01", "code": "b", "batch": 50, "machines": [{"host": "a", "device": "x"}]}
    alike = summary.sampling({"real images": one, "DD 1 step": one | {"date": "2026-01-03"}})
    assert alike.pop("code") == {"real images": "a", "DD 1 step": "a"}
    assert alike == {"between": ["2026-01-02", "2026-01-03"], "batch": 10, "host": "a, b", "device": "x"}
    apart = summary.sampling({"real images": one, "DD 1 step": other, "teacher": one})
    assert apart["real images, teacher"]["batch"] == 10
    assert apart["DD 1 step"] == {"batch": 50, "host": "a", "device": "x"}


def test_inputs_are_checked_before_there_are_pairs_and_a_student(recipe: Recipe, tmp_path: Path) -> None:
    fresh = dataclasses.replace(recipe, run=str(tmp_path / "fresh"))
    assert [draw.name for draw in plan.inputs(fresh).table()][:2] == ["teacher, AR", "teacher, FM"]
    with pytest.raises(ValueError, match="end by 3"):
        plan.inputs(changed(fresh, samplers=[{"name": "FewStep", "steps": [1, 9]}]))


def test_digits_features_need_digits(tmp_path: Path) -> None:
    small = tiny.tiny(tmp_path, "llamagen")
    failing(changed(small, samplers=[{"name": "Autoregressive"}]), "scores 32x32 images of 10 classes")


def test_a_report_survives_a_copy(finished: tuple[Recipe, str], tmp_path: Path) -> None:
    """The JSON alone makes the Markdown again."""
    recipe, _ = finished
    shutil.copy(Path(recipe.report_uri, "report.json"), tmp_path)
    results = json.loads((tmp_path / "report.json").read_text())
    assert markdown.markdown(results).encode() == storage.read_bytes(storage.join(recipe.report_uri, "report.md"))
