"""What an ablation makes, once each, and its table; the jobs run on a tiny teacher."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
import tiny

from pipeline import storage
from pipeline.ablation import ablate as job
from pipeline.ablation import plan as ablation_plan
from pipeline.ablation import report as ablation_report
from pipeline.ablation.ablate import ablate
from pipeline.ablation.report import differing
from pipeline.command_line import DEFAULT, parse, with_settings
from pipeline.host.errors import Unfinished
from pipeline.models import checkpoints
from pipeline.pairs import manifest
from pipeline.pairs import shards as pairs
from pipeline.pairs.facts import PairFacts
from pipeline.pairs.rows import Rows
from pipeline.recipe import Recipe
from pipeline.settings.studies import AblationSettings

LISTED: list[dict[str, Any]] = [
    {"name": "Autoregressive"},
    {"name": "FewStep"},
    {"name": "FewStep", "steps": [1, 2]},
    {"name": "Skip", "n": 1},
]


def small(folder: Path) -> Recipe:
    """A teacher of three AR steps; students from steps 1 and 2 that use the logits head alone."""
    made = tiny.tiny(folder, "var", **tiny.IMAGES)
    train = replace(made.train, split=3, lpips=0.0, cross_entropy=1.0, batch=4)
    return replace(made, train=train, evaluate=replace(made.evaluate, samplers=LISTED, timing_batches=()))


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return small(tmp_path)


def with_axes(recipe: Recipe, axes: dict[str, list[Any]], *seeds: int) -> Recipe:
    return replace(recipe, ablate=AblationSettings(seeds=seeds or (3, 13), axes=axes))


def planned(recipe: Recipe, axes: dict[str, list[Any]], *seeds: int) -> ablation_plan.AblationPlan:
    return ablation_plan.build(with_axes(recipe, axes, *seeds))


# ---- the plan


def test_nothing_is_made_twice_and_everything_has_its_place(recipe: Recipe) -> None:
    axes = {
        "pairs.count": [24, 40, 60],
        "train.lr": [1e-3],
        "train": [{"lr": 1e-3}, {"lr": 2e-3, "ema": 0.9}],
        "pairs.solver": [{"name": "paper", "evaluations": 5}],
        "pairs.dtype": ["float16", "float32"],
        "evaluate.samplers.split": [3, 1],
    }
    plan = planned(recipe, axes)
    assert [variant.label for variant in plan.variants] == [
        "base",
        "pairs.count 24",
        "pairs.count 60",
        "train.lr 0.001",
        "train lr 0.002, ema 0.9",
        "pairs.solver name paper, evaluations 5",
        "pairs.dtype float32",
        "evaluate.samplers.split 1",
    ]
    assert [(axis, i) for axis, _, i in plan.rows] == [
        *(("pairs.count", i) for i in (1, 0, 2)),
        ("train.lr", 3),
        *(("train", i) for i in (3, 4)),
        ("pairs.solver", 5),
        *(("pairs.dtype", i) for i in (0, 6)),
        *(("evaluate.samplers.split", i) for i in (0, 7)),
    ]
    trials = [trial for some in plan.trials for trial in some]
    assert [trial.seed for trial in trials] == [3, 13] * 8
    assert all(trial.recipe.train.seed == trial.seed for trial in trials)

    # One growing set serves all counts, and the recipe's own folder is that set; others have theirs.
    own = PairFacts.of(recipe).fingerprint
    assert {key: (some.pairs_uri, some.pairs.count) for key, some in plan.sets.items()} == {
        own: (recipe.pairs_uri, 60),
        plan.trials[5][0].pairs: (f"{recipe.run}/ablation/pairs/{plan.trials[5][0].pairs[:12]}", 40),
        plan.trials[6][0].pairs: (f"{recipe.run}/ablation/pairs/{plan.trials[6][0].pairs[:12]}", 40),
    }
    assert [some[0].recipe.pairs.count for some in plan.trials[:3]] == [40, 24, 60]

    # A split at sampling takes the base's students, the base's first seed is the recipe's own student.
    assert len(plan.students) == 14
    assert [trial.student for trial in plan.trials[7]] == [trial.student for trial in plan.trials[0]]
    assert plan.trials[0][0].recipe.student_uri == recipe.student_uri
    assert all(
        "/ablation/students/" in trial.recipe.student_uri for trial in trials if trial.student != trials[0].student
    )
    assert plan.trials[7][1].recipe.report_uri == f"{recipe.run}/ablation/reports/evaluate.samplers.split/1/seed-13"
    assert len({trial.recipe.report_uri for trial in trials}) == 16
    assert all(trial.recipe.evaluate.student is None for trial in trials)


def test_the_last_start_steps_take_their_sampler_with_them(recipe: Recipe) -> None:
    plan = planned(recipe, {"train.start_steps": [[1, 3], [1], [1, 2, 3]]}, 3)
    assert plan.columns == ["DD 1 step", "DD at its start steps"]
    assert plan.trials[3][0].recipe.report_uri.endswith("/reports/train.start_steps/1-2-3/seed-3")
    assert [[sampler.steps for sampler in variant.samplers] for variant in plan.variants] == [
        [(1,), (1, 2)],
        [(1,), (1, 3)],
        [(1,), (1,)],
        [(1,), (1, 2, 3)],
    ]
    assert len(plan.trials[2][0].recipe.evaluate.samplers) == 1, "two columns, one sampler"
    fixed = planned(recipe, {"train.split": [3], "train": [{"split": 1, "lpips": 1.0}]}, 3)
    assert fixed.columns == ["DD 1 step", "DD 2 steps (1, 2)"]
    assert [sampler.split for sampler in fixed.variants[1].samplers] == [1, 1], "a split of training is one of sampling"


def test_an_axis_with_a_title_varies_fields_together(recipe: Recipe) -> None:
    both, alone = {"pairs.count": 24, "train.epochs": 2}, {"pairs.count": 40, "train.epochs": 1}
    plan = planned(recipe, {"pairs, equal steps": [both, alone], "equal steps": [both]}, 3)
    assert [variant.label for variant in plan.variants] == ["base", "pairs, equal steps pairs.count 24, train.epochs 2"]
    varied = plan.trials[1][0].recipe
    assert (varied.pairs.count, varied.train.epochs) == (24, 2)
    assert varied.report_uri.endswith("/reports/pairs-equal-steps/pairs.count-24-train.epochs-2/seed-3")
    rows = ablation_report.summarise(plan, {})["rows"]
    assert [(row["value"], row["base"]) for row in rows[1:]] == [
        (both, False),
        (alone, True),
        (alone, True),
        (both, False),
    ]


def test_float16_is_what_sets_without_a_dtype_have(recipe: Recipe) -> None:
    for name, expected in [("llamagen", "a40731c39e979bc2"), ("var", "9addbfd961086440")]:
        shipped = parse(None, ["--config", str(DEFAULT.with_name(f"digits-{name}.yaml"))])
        assert PairFacts.of(shipped).fingerprint[:16] == expected, "pair sets of earlier releases stay readable"
    assert PairFacts.of(with_settings(recipe, {"pairs.dtype": "float32"})).dtype == "float32"


@pytest.mark.parametrize(
    ("axes", "sentence"),
    [
        ({}, "ablate.axes is empty, so there is nothing to vary"),
        ({"train.lpisp": [1]}, "ablate.axes varies train.lpisp, and 1 is refused: a recipe has no field train.lpisp"),
        ({"train": [{"lpisp": 1}]}, "ablate.axes varies train, and lpisp 1 is refused"),
        ({"pairs.count": ["many"]}, "ablate.axes varies pairs.count, and many is refused"),
        ({"pairs.count": [9]}, "ablate.axes varies pairs.count, and 9 is refused: pairs.count 9 leaves 1 pairs to"),
        ({"train.start_steps": [[2, 3]]}, "it must rise and begin with 1"),
        ({"train.start_steps": [[1, 9]]}, "train.start_steps, and [1, 9] is refused: "),
        ({"train.split": [2]}, "train.split, and 2 is refused: train.lpips is 0, so nothing trains the embedding head"),
        (
            {"evaluate.samplers.split": ["x"]},
            "x is refused: evaluate.samplers: FewStep.split is 'x'; it must be a whole number",
        ),
        ({"train.seed": [4]}, "ablate.axes has train.seed, which cannot be varied"),
        ({"train": [{"uri": "x"}]}, "ablate.axes has train.uri, which cannot be varied"),
        ({"evaluate.count": [4]}, "ablate.axes has evaluate.count, which cannot be varied"),
        ({"run": ["x"]}, "ablate.axes has run, which cannot be varied"),
        ({"speed": [3]}, "an axis with a title of its own has values like {pairs.count: 1000, train.epochs: 8}"),
        ({"size": [{"pairs.count": 60, "evaluate.seed": 5}]}, "ablate.axes has evaluate.seed, which cannot be varied"),
        ({"size": [{"pairs.cuont": 60}]}, "pairs.cuont 60 is refused: a recipe has no field pairs.cuont"),
        ({"train.workers": [2]}, "train.workers, and 2 makes the base's students again"),
        ({"train.betas": [[0.8, 0.9], [0.8, 0.9], [0.9, 0.95]]}, ""),
        ({"train.mask": ["released", "both"]}, "ablate.axes varies train.mask, and both is refused"),
    ],
)
def test_bad_axes_are_one_sentence_before_any_work(recipe: Recipe, axes: dict[str, list[Any]], sentence: str) -> None:
    if not sentence:
        assert len(planned(recipe, axes).variants) == 2, "a value listed twice is one variant"
        return
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        ablate(with_axes(recipe, axes))
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not Path(recipe.run).exists()


def test_other_bad_ablations_are_one_sentence(recipe: Recipe) -> None:
    with pytest.raises(ValueError, match=r"ablate.axes lists no values of train.lr"):
        AblationSettings(axes={"train.lr": []})
    for seeds in ((), (3, 3)):
        with pytest.raises(ValueError, match="list one seed or more, each once"):
            AblationSettings(seeds=seeds)
    none = replace(recipe, evaluate=replace(recipe.evaluate, samplers=[{"name": "Autoregressive"}]))
    with pytest.raises(ValueError, match=r"evaluate.samplers lists no FewStep"):
        planned(none, {"train.lr": [1e-3]})
    with pytest.raises(ValueError, match=r"lists a/b and a\+b for teacher.checkpoint, which would share the folder"):
        planned(recipe, {"teacher.checkpoint": ["a/b", "a+b"]})


def test_a_dry_run_says_what_is_there(recipe: Recipe) -> None:
    text = ablate(replace(with_axes(recipe, {"pairs.count": [60]}, 3), dry_run=True))
    assert "variant   pairs.count 60; pairs" in text
    assert f"at {recipe.pairs_uri}; 0 of 60 are in a complete set" in text
    assert text.endswith("in all    1 pair sets, 2 students, 2 of them to train")
    assert not Path(recipe.run).exists()


def test_the_recipe_of_make_ablate_plans() -> None:
    files = [str(DEFAULT), str(DEFAULT.with_name("ablate-digits.yaml"))]
    plan = ablation_plan.build(parse(None, [f"--config={file}" for file in files]))
    assert (len(plan.sets), len(plan.students), plan.columns) == (6, 30, ["DD 1 step", "DD at its start steps"])


# ---- numbers


def slow_differing(ours: np.ndarray, theirs: np.ndarray, groups: tuple[int, ...]) -> tuple[float, float]:
    """Token by token: all pairs of codes, and those up to the first AR step with a difference."""
    every, alike = [], []
    for a, b in zip(ours, theirs, strict=True):
        every += [x != y for x, y in zip(a, b, strict=True)]
        at = 0
        for size in groups:
            here = [x != y for x, y in zip(a[at : at + size], b[at : at + size], strict=True)]
            alike += here
            at += size
            if any(here):
                break
    return float(np.mean(every)), float(np.mean(alike))


@pytest.mark.parametrize("groups", [(1, 4, 9), (1,) * 14])
def test_codes_that_differ_are_those_of_the_slow_oracle(groups: tuple[int, ...]) -> None:
    draw = np.random.default_rng(0)
    ours = draw.integers(0, 9, (50, 14)).astype(np.uint16)
    theirs = np.where(draw.random((50, 14)) < 0.08, draw.integers(0, 9, (50, 14)), ours)
    found = differing(ours, theirs, groups)
    assert (found["all"], found["after equal codes"]) == pytest.approx(slow_differing(ours, theirs, groups))
    assert differing(ours, ours, groups) == {"all": 0.0, "after equal codes": 0.0}


def scored(plan: ablation_plan.AblationPlan, scores: dict[str, list[float]]) -> dict[str, dict[str, Any]]:
    """Reports with the given scores by trial, one per sampler."""
    out: dict[str, dict[str, Any]] = {"teacher": {"title": "FD", "rows": [{}, {"sampler": {}, "score": 2.5}]}}
    for trial in (trial for some in plan.trials for trial in some if trial.name in scores):
        rows = [
            {"sampler": entry | {"steps": list(entry["steps"])}, "score": score}
            for entry, score in zip(trial.recipe.evaluate.samplers, scores[trial.name], strict=True)
        ]
        student = {"SHA-256": "ab" * 32, "mlflow_run": "run"}
        out[trial.name] = {"title": "FD", "rows": rows, "made": {"student": student}}
    return out


def test_the_table_holds_means_spreads_and_gaps(recipe: Recipe) -> None:
    plan = planned(recipe, {"train.start_steps": [[1], [1, 2], [1, 3]], "train.lr": [1e-3]})
    scores = {"base, seed 3": [10.0, 8.0], "base, seed 13": [12.0, 8.0], "train.start_steps [1], seed 3": [5.5]}
    scores |= {"train.lr 0.001, seed 3": [1.0, 2.0], "train.lr 0.001, seed 13": [3.0, 2.0]}
    results = ablation_report.summarise(plan, scored(plan, scores))
    by_label = {(row["axis"], str(row["value"])): row for row in results["rows"]}
    assert list(by_label) == [
        ("", "None"),
        ("train.start_steps", "[1]"),
        ("train.start_steps", "[1, 2]"),
        ("train.start_steps", "[1, 3]"),
        ("train.lr", "0.0001"),
        ("train.lr", "0.001"),
    ]
    assert by_label["", "None"]["mean"] == [11.0, 8.0]
    assert by_label["", "None"]["spread"] == [pytest.approx(2**0.5), 0.0]
    assert by_label["train.start_steps", "[1]"]["scores"] == [[5.5, None], [5.5, None]], "one sampler, two columns"
    assert by_label["train.start_steps", "[1, 3]"]["mean"] == [None, None]
    assert by_label["train.lr", "0.0001"]["base"], "the base's value stands beside the axis's"
    assert [row["teacher"] for row in results["rows"]] == [2.5] * 6

    lines = ablation_report.table(results).splitlines()
    assert len({len(line) for line in lines}) == 1, "the source lines up"
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0] == ["varied", "value", "FD, DD 1 step", "/ base", "FD, DD at its start steps", "/ base"]
    assert cells[2] == ["base", "-", "11.00 ± 1.41", "1.00", "8.00 ± 0.00", "1.00"]
    assert cells[3] == ["train.start_steps", "[1]", "5.50", "0.50", "5.50", "0.69"]
    assert cells[4][1] == "[1, 2] (base)"
    assert cells[5] == ["train.start_steps", "[1, 3]", "-", "-", "-", "-"]
    text = ablation_report.markdown(results)
    assert "standard deviation (n - 1) over the training seeds 3, 13" in text
    assert "seed 13: student not made in" in text
    assert ablation_report.scalars(results)["train.lr_0.001/DD_1_step/mean"] == 2.0
    assert ablation_report.plot(results).startswith(b"\x89PNG")


def test_every_teacher_is_scored_once(recipe: Recipe) -> None:
    listed = replace(recipe, evaluate=replace(recipe.evaluate, samplers=LISTED))
    filters = [{"teacher.filter.guidance": 3.0, "train.lr": lr} for lr in (1e-3, 2e-3)]
    plan = planned(listed, {"train.lr": [1e-3], "teacher at rates": filters, "teacher.filter.top_k": [2]}, 3)
    other = "teacher of teacher at rates teacher.filter.guidance 3.0, train.lr 0.001"
    third = "teacher of teacher.filter.top_k 2"
    assert plan.teacher_of == ["teacher", "teacher", other, other, third]
    assert [one.teacher.filter.guidance for one in plan.teachers.values()] == [
        recipe.teacher.filter.guidance,
        3.0,
        recipe.teacher.filter.guidance,
    ]
    assert len({one.report_uri for one in plan.teachers.values()}) == 3
    assert all(one.evaluate.samplers == LISTED[:1] for one in plan.teachers.values())
    scores = {trial.name: [10.0, 8.0] for some in plan.trials for trial in some}
    results = ablation_report.summarise(plan, scored(plan, scores) | {third: {"title": "FD", "rows": [{}]}})
    assert [row["teacher"] for row in results["rows"] if row["axis"] == "teacher at rates"] == [2.5, None, None]
    lines = ablation_report.table(results).splitlines()
    assert [cell.strip() for cell in lines[0].strip("|").split("|")][2] == "FD, its AR teacher"
    assert "| 2.50 |" in lines[2].replace("  ", "")
    assert ablation_report.plot(results).startswith(b"\x89PNG")
    assert planned(recipe_without_teacher(listed), {"train.lr": [1e-3]}, 3).teachers == {}


def recipe_without_teacher(recipe: Recipe) -> Recipe:
    return replace(recipe, evaluate=replace(recipe.evaluate, samplers=LISTED[1:]))


def test_power_laws_are_those_that_made_the_scores(recipe: Recipe) -> None:
    """40 pairs above, 1 epoch: 2.5 for the teacher, and 30 n^-0.5 (one step), 8 n^-0.25 (two) above it."""
    axes = {"train.epochs": [2, 4, 8], "train.lr": [1e-3], "pairs": [{"count": 24, "dtype": "float32"}]}
    plan = planned(recipe, axes)
    scores = {}
    for some in plan.trials:
        for trial, off in zip(some, (1.0, 1.1), strict=True):
            n = trial.recipe.train.epochs
            scores[trial.name] = [2.5 + 30 * n**-0.5 * off, 2.5 + 8 * n**-0.25]
    results = ablation_report.summarise(plan, scored(plan, scores))
    first, second = results["laws"]
    assert (first["axis"], first["over"], first["column"], first["points"]) == (
        "train.epochs",
        "train.epochs",
        "DD 1 step",
        8,
    )
    assert first["exponent"] == pytest.approx(-0.5)
    assert first["factor"] == pytest.approx(30 * 1.1**0.5)
    assert (first["lowest"], first["highest"]) == (pytest.approx(1), pytest.approx(8))
    residuals = np.log(1.1) / 2  # of all eight points, on both sides
    x = np.log([1, 2, 4, 8] * 2)
    assert first["error"] == pytest.approx((8 * residuals**2 / 6 / ((x - x.mean()) ** 2).sum()) ** 0.5)
    assert second["exponent"] == pytest.approx(-0.25)
    assert second["error"] == pytest.approx(0, abs=1e-9)
    text = ablation_report.markdown(results)
    line = f"* **train.epochs**, DD 1 step: train.epochs^(-0.50 ± {first['error']:.2f}), from 1 to 8, 8 students"
    assert line in text
    none = ablation_report.summarise(
        plan, {name: one for name, one in scored(plan, scores).items() if name != "teacher"}
    )
    assert none["laws"] == []
    assert "Power laws" not in ablation_report.markdown(none)


def write_set(recipe: Recipe, other: float) -> None:
    """A complete pair set whose codes are 0, but for about a share of ``other``."""
    facts = PairFacts.of(recipe)
    manifest.claim(recipe.pairs_uri, facts, recipe)
    shards = []
    for first in range(0, recipe.pairs.count, recipe.pairs.shard_rows):
        ids = np.arange(first, min(first + recipe.pairs.shard_rows, recipe.pairs.count))
        drawn = facts.noise(ids)
        tokens = (np.random.default_rng(first).random(drawn.shape[:2]) < other).astype(np.uint16)
        rows = Rows(ids, facts.labels(ids), drawn, tokens)
        shards.append(pairs.write_shard(recipe.pairs_uri, facts, pairs.table(facts, rows)))
    manifest.finish(recipe.pairs_uri, facts, shards, {"rows": 1, "seconds": 1.0, "device": "cpu"})


def test_codes_are_compared_on_the_same_noise_alone(recipe: Recipe) -> None:
    axes = {
        "pairs.solver": [{"name": "paper"}],
        "pairs.seed": [7],
        "pairs.dtype": ["float32"],
        "pairs.shard_rows": [24],
    }
    plan = planned(recipe, axes, 3)
    for share, some in zip([0.0, 0.3, 0.3, 0.1], list(plan.sets.values())[:4], strict=True):
        write_set(some, share)
    rows = ablation_report.summarise(plan, {})["rows"]
    codes = {row["axis"]: row["codes"] for row in rows if not row["base"]}
    assert codes["pairs.solver"]["rows"] == 40
    assert 0.2 < codes["pairs.solver"]["all"] < 0.4
    assert 0.05 < codes["pairs.dtype"]["all"] < 0.15, "rounded otherwise, but the same noise"
    assert codes["pairs.seed"] is None, "other noise"
    assert codes["pairs.shard_rows"] is None, "not there yet"
    assert all(row["codes"] is None for row in rows if row["base"])


# ---- the job


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, ray_cluster: None) -> Iterator[tuple[Recipe, str]]:
    """An ablation of one pair set, one student and two reports by the real jobs, and what it returned."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        recipe = small(tmp_path_factory.mktemp("ablate"))
        recipe = replace(recipe, evaluate=replace(recipe.evaluate, samplers=LISTED[1:]))  # the teacher is slow
        recipe = with_axes(recipe, {"evaluate.samplers.split": [1]}, 3)
        yield recipe, ablate(recipe)


def test_the_three_jobs_make_the_table(finished: tuple[Recipe, str]) -> None:
    recipe, said = finished
    results = storage.read_json(f"{recipe.run}/ablation/ablation.json")
    assert ablation_report.table(results) in said
    files = ["ablation.json", "ablation.md", "ablation.png", "cache", "recipe.json", "reports"]
    assert storage.listing(f"{recipe.run}/ablation") == files, "the pairs and the student are the recipe's own"
    assert len(storage.listing(f"{recipe.run}/ablation/cache")) == 5, "two samplers in two reports, real images once"
    base, _, row = results["rows"]
    assert (row["axis"], row["value"]) == ("evaluate.samplers.split", 1)
    report = storage.read_json(f"{recipe.run}/ablation/reports/evaluate.samplers.split/1/seed-3/report.json")
    assert row["mean"] == [line["score"] for line in report["rows"] if line["name"].startswith("DD")]
    assert "**speed**: was not measured" in Path(row["trials"][0]["report"], "report.md").read_text()
    assert base["trials"][0]["SHA-256"] == row["trials"][0]["SHA-256"], "one student, split in two ways"
    assert base["mean"] != row["mean"]


def test_the_runs_behind_a_table_are_linked_to_it(finished: tuple[Recipe, str]) -> None:
    recipe, _ = finished
    client = mlflow.MlflowClient(f"sqlite:///{recipe.run}/mlflow.db")
    (experiment,) = [client.get_experiment_by_name(recipe.name).experiment_id]
    (mine,) = client.search_runs([experiment], "tags.job = 'ablate'")
    linked = client.search_runs([experiment], f"tags.ablate = '{mine.info.run_id}'")
    jobs = [run.data.tags["job"] for run in linked]
    assert {one: jobs.count(one) for one in set(jobs)} == {"pairs": 1, "distill": 1, "evaluate": 2}
    assert {run.data.tags["mlflow.parentRunId"] for run in linked} == {mine.info.run_id}
    assert "base, seed 3; evaluate.samplers.split 1, seed 3" in [run.data.tags["variant"] for run in linked]
    assert mine.data.metrics["base/DD_1_step/mean"] > 0
    assert {file.path for file in client.list_artifacts(mine.info.run_id)} == {
        *("ablation.json", "ablation.md", "ablation.png", "recipe.yaml")
    }


def test_run_again_it_makes_nothing_and_says_the_same(
    finished: tuple[Recipe, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, said = finished
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert ablate(recipe) == said
    lines = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("[")]
    assert len(lines) == 4
    assert all(line.startswith("Nothing is missing") for line in lines)
    client = mlflow.MlflowClient(f"sqlite:///{recipe.run}/mlflow.db")
    experiment = client.get_experiment_by_name(recipe.name).experiment_id
    assert len(client.search_runs([experiment], "tags.job = 'ablate'")) == 1, "the same ablation goes on"


def test_a_training_that_fails_is_named_and_the_others_are_made(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Jobs that only leave their last file behind; one of three trainings diverges."""
    monkeypatch.setattr(job, "generate", lambda recipe: "pairs")
    plan = planned(recipe, {"train.lr": [1e-3, 9.0]}, 3)
    reports = scored(plan, {"base, seed 3": [4.0, 3.0], "train.lr 0.001, seed 3": [2.0, 1.0]})
    failures = [FloatingPointError("a bug"), Unfinished("the gradient of step 3 is\nnot finite")]

    def distill(recipe: Recipe) -> str:
        if recipe.train.lr == 9.0:
            raise failures.pop(0)
        return "a student"

    def evaluate(recipe: Recipe) -> str:
        name = next((t.name for some in plan.trials for t in some if t.recipe == recipe), "teacher")
        storage.write_json(storage.join(recipe.report_uri, "report.json"), reports[name] | {"fingerprint": "x"})
        return "a table\n\nThe report is there."

    monkeypatch.setattr(job, "distill", distill)
    with pytest.raises(FloatingPointError), monkeypatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        ablate(with_axes(recipe, {"train.lr": [9.0, 1e-3]}, 3))
    monkeypatch.setattr(job, "evaluate", evaluate)
    monkeypatch.setattr(manifest, "read", lambda *args: {"made": []})
    monkeypatch.setattr(checkpoints, "metadata", lambda uri: {"mlflow_run": "gone"})
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(RuntimeError, match=r"1 of 4 reports were not made \(train.lr 9.0, seed 3\)"):
        ablate(with_axes(recipe, {"train.lr": [1e-3, 9.0]}, 3))
    heard = capsys.readouterr()
    assert "student of train.lr 9.0, seed 3 failed: the gradient of step 3 is not finite\n" in heard.err
    assert "[8 of 8]" not in heard.out, "the images of a student that is not there are not drawn"
    text = Path(recipe.run, "ablation", "ablation.md").read_text()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if "train.lr" in line]
    assert ["train.lr", "0.001", "2.00", "0.50", "1.00", "0.33"] in cells
    assert ["train.lr", "9.0", "-", "-", "-", "-"] in cells
