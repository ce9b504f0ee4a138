"""What the benchmark counts, in small; that it is fast, it says itself."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny import IMAGES, Family, tiny, with_pairs

from pipeline import storage
from pipeline.benchmark import (
    actors,
    benchmark,
    clock,
    growth,
    matching,
    networks,
    plan,
    rounding,
    sheet,
    students,
    training,
)
from pipeline.benchmark.actors import Span
from pipeline.benchmark.sheet import Claim, Section
from pipeline.flow import matching as flow
from pipeline.host import stopwatch
from pipeline.models import checkpoints
from pipeline.recipe import Recipe
from pipeline.report import plots
from pipeline.services import mlflow_store
from pipeline.settings.studies import Measured

CPU = torch.device("cpu")


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    found = with_pairs(tiny(tmp_path, "llamagen", seed=1), shard_rows=8, batch=4, actors=1)
    return replace(found, benchmark=replace(found.benchmark, seconds=0.01, batches=(1, 4)))


# ---- what it says


def test_a_claim_knows_its_side() -> None:
    assert Claim("a", 1.02, 1.03, at_most=True).met
    assert not Claim("a", 1.04, 1.03, at_most=True).met
    assert Claim("a", 0.98, 0.97).met
    assert not Claim("a", 0.96, 0.97).met
    assert not Claim("a", math.nan, 0.97).met
    assert Claim("Speed-up of DD 1 step, batch 1, cpu", 3.0).key == "speed-up_of_dd_1_step_batch_1_cpu"


def test_the_sheet_prints_numbers_and_says_what_is_not_met() -> None:
    section = Section("T", "How.", [{"what": "a", "n": 12345, "x": 0.0123456, "none": None}])
    section.claims += [Claim("fast", 2.0, 3.0), Claim("slow", 2.0, 3.0, at_most=True), Claim("as it is", 7.0)]
    text = section.markdown()
    assert "| a    | 12,345 | 0.0123 |    - |" in text
    assert [line.split("|")[-2].strip() for line in sheet.claims([section]).splitlines()[2:]] == ["**no**", "yes", ""]
    plain = json.loads(json.dumps(sheet.plain([section])))
    assert [claim["met"] for claim in plain[0]["claims"]] == [False, True, True]
    assert plain[0]["rows"] == section.rows


# ---- how it measures


def test_calls_take_turns_and_change_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock, "MOST", 3)
    called: list[str] = []
    seconds = iter([1.0, 5.0, 6.0, 2.0, 3.0, 7.0])
    monkeypatch.setattr(clock, "once", lambda call, device: (call(), next(seconds))[1])
    calls = {name: (lambda name=name: called.append(name)) for name in "ab"}
    assert clock.turns(calls, CPU, 60.0) == {"a": 2.0, "b": 6.0}, "medians of 1, 2, 3 and of 5, 6, 7"
    assert called == [*"aabb", *"ab", *"ba", *"ab"], "warmed up each, then in turns"


def test_no_ratio_sees_a_recording(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first two generations of a size, of which the second records CUDA graphs, are in no number."""
    slow = iter([(10.0, 90.0, 1.0), (10.0, 90.0, 1.0), (10.0, 2.0, 1.0)])
    monkeypatch.setattr(matching, "_drawn_twice", lambda *args: next(slow))
    section = matching.overhead(checkpoints.teacher(recipe.teacher), flow.Solver(), (2,), 0.0)
    assert section.rows[0]["Alg. 1 / AR"] == pytest.approx(12 / 11)
    monkeypatch.setattr(clock, "MOST", 1)
    calls: list[int] = []
    monkeypatch.setattr(clock, "once", lambda call, device: (call(), 500.0 if len(calls) < 3 else 0.5)[1])
    assert clock.turns({"a": lambda: calls.append(1)}, CPU, 0.0) == {"a": 0.5}


def test_sizes_are_not_mixed_where_graphs_are_those_of_one_size(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher, drawn = checkpoints.teacher(recipe.teacher), list[int]()
    monkeypatch.setattr(growth, "BATCHES", (2, 3))
    monkeypatch.setattr(teacher, "generate", lambda condition, choose: drawn.append(len(condition.labels)))
    growth._over_batch(teacher, 0.0)
    assert drawn == sorted(drawn)
    assert drawn.count(2) >= 3


def test_what_is_profiled_runs_without_graphs(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, seen = checkpoints.teacher(recipe.teacher), []
    graphs = teacher.graphs = SimpleNamespace(find=lambda kind, begin: None, on="cpu")  # type: ignore[assignment]
    monkeypatch.setattr(networks, "in_products", lambda call, device: seen.append(teacher.graphs) or 0.5)
    section = networks.teachers(teacher, recipe.teacher, (1,), 0.01, clock.Peaks(1e12, 1e12))
    assert section.rows[0]["in products, %"] == 50
    assert seen == [None]
    assert teacher.graphs is graphs


def test_a_stopwatch_adds_up(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([1.0, 3.0, 10.0, 14.0])
    monkeypatch.setattr(stopwatch.time, "perf_counter", lambda: next(times))
    watch = stopwatch.Stopwatch(CPU)
    for _ in range(2):
        with watch:
            pass
    assert watch.seconds == 6.0


def test_peaks_are_those_of_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock, "SIZE", {"cpu": 64})
    monkeypatch.setattr(clock, "READ", {"cpu": 1000})
    monkeypatch.setattr(clock, "_best", lambda call, device, seconds: (call(), 0.5)[1])
    assert clock.peaks(CPU, "fp16") == clock.Peaks(2 * 64**3 / 0.5, 4000 / 0.5)


# ---- flow matching


def test_alg_1_over_ar_is_of_one_generation(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matching, "_drawn_twice", lambda *args: (10.0, 1.0, 0.5))
    section = matching.overhead(checkpoints.teacher(recipe.teacher), flow.Solver(), (2,), 0.0)
    assert section.rows[0]["Alg. 1 / AR"] == pytest.approx(11 / 10.5)
    assert section.rows[0]["flow matching"] == pytest.approx(500)
    assert [claim.met for claim in section.claims] == [False]


def test_both_ways_are_timed_and_flow_matching_draws(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = checkpoints.teacher(recipe.teacher)
    condition, x = matching.inputs(teacher, 3)
    drawn: list[torch.Tensor] = []
    whole = teacher.generate

    def kept(*args: object) -> torch.Tensor:
        drawn.append(whole(*args))  # type: ignore[arg-type]
        return drawn[-1]

    monkeypatch.setattr(teacher, "generate", kept)
    network, matched, multinomial = matching._drawn_twice(teacher, flow.Solver(), condition, x, 0)
    assert min(network, matched, multinomial) > 0

    def choose(t: int, log_p: torch.Tensor) -> torch.Tensor:
        return flow.match(x[:, teacher.layout.span(t)], log_p, teacher.codebook)

    assert torch.equal(drawn[0], whole(condition, choose))


def test_what_is_measured_is_what_the_teacher_meets(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matching, "TOKENS", 120)
    monkeypatch.setattr(matching, "SOLVERS", (flow.Solver("adaptive"), flow.Solver("paper")))
    monkeypatch.setattr(matching, "synthetic", lambda v, c, k, unit_norm: synthetic(64, c, 9, unit_norm))
    rows = matching.solvers(checkpoints.teacher(recipe.teacher)).rows
    assert len(rows) == 6
    assert max(float(row["wrong codes, %"]) for row in rows[0::2]) <= 2.5, "120 tokens: at most three codes"
    assert {row["evaluations"] for row in rows[1::2]} == {10.0}


synthetic = matching.synthetic


def test_synthetic_p_is_truncated_and_normalised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matching, "TOKENS", 40)
    points, log_p, codebook = synthetic(64, 4, 9, unit_norm=True)
    assert points.shape == (40, 4)
    assert (log_p.isfinite().sum(-1) == 9).all()
    assert torch.allclose(log_p.exp().sum(-1), torch.ones(40))
    assert torch.allclose(codebook.norm(dim=-1), torch.ones(64))


# ---- networks


def test_work_is_that_of_the_formula(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """A LlamaGen by hand; and a sequence that is traced in part counts as one that is traced whole."""
    config = checkpoints.config(recipe.teacher)
    found = networks.LeastWork.of(recipe.teacher, batch=2)
    rows, dim = 4, config.dim  # both halves of guidance
    weights = config.layers * (4 * dim * dim + 3 * dim * config.hidden) + dim * config.vocabulary
    for t, (flops, read) in enumerate(zip(found.flops, found.read, strict=True), start=1):
        attention = config.layers * rows * dim * t  # one query each over t keys
        assert flops == pytest.approx(2 * rows * weights + 4 * attention)
        assert read == pytest.approx(4 * (weights + 2 * attention))
    monkeypatch.setattr(networks, "TRACED", 4)
    assert networks.LeastWork.of(recipe.teacher, batch=2).flops == pytest.approx(found.flops)
    assert networks.LeastWork.of(recipe.teacher, batch=2).read == pytest.approx(found.read)


def test_the_bytes_are_those_of_the_numbers_that_are_read(recipe: Recipe) -> None:
    """In fp16 weights of the blocks, keys and values take two, the output layer four."""
    config, batch = checkpoints.config(recipe.teacher), 2
    blocks = config.layers * (4 * config.dim**2 + 3 * config.dim * config.hidden)
    found = networks.LeastWork.of(replace(recipe.teacher, precision="fp16"), batch)
    for t, read in enumerate(found.read, start=1):
        keys_and_values = config.layers * 2 * (2 * batch) * config.dim * t
        assert read == pytest.approx(2 * (blocks + keys_and_values) + 4 * config.dim * config.vocabulary)


def test_the_roofline_takes_the_slower_of_the_two() -> None:
    work = networks.LeastWork([10.0, 1.0], [1.0, 20.0])
    assert work.least(clock.Peaks(flops=10.0, bytes=10.0)) == 1.0 + 2.0


def test_teachers_have_both_loops(recipe: Recipe) -> None:
    section = networks.teachers(
        checkpoints.teacher(recipe.teacher), recipe.teacher, (1, 4), 0.01, clock.Peaks(1e12, 1e12)
    )
    assert [row["batch"] for row in section.rows] == [1, 4]
    assert all(float(row["plain / ours"]) > 0 and 0 < float(row["roofline, %"]) < 100 for row in section.rows)
    assert all(0 < float(row["in products, %"]) < 100 for row in section.rows)
    assert [claim.bound for claim in section.claims] == [1.3]


def test_sampling_has_the_papers_figures(recipe: Recipe) -> None:
    few = [{"name": "FewStep", "steps": [1], "paper": {"speedup": 6.3}}, {"name": "Skip", "n": 1}]
    recipe = replace(recipe, evaluate=replace(recipe.evaluate, samplers=few))
    section = networks.sampling(recipe, checkpoints.teacher(recipe.teacher), (2,), 2.0)
    assert [row["sampler"] for row in section.rows[:4:2]] == ["teacher, AR", "teacher, FM"]
    ours = section.rows[-2:]
    assert [row["batch"] for row in section.rows] == [1, 2] * 3, "every sampler at every batch"
    assert [row["paper"] for row in ours] == [6.3, None]
    assert [row["speed-up"] for row in section.rows[:2]] == [1.0, 1.0]
    assert [claim.value for claim in section.claims] == [row["speed-up"] for row in ours]
    assert [claim.text for claim in section.claims] == [f"Speed-up of DD 1 step, batch {b}, cpu" for b in (1, 2)]


# ---- precision


@pytest.mark.parametrize("family", ["var", "llamagen"])
def test_precisions_are_compared_with_fp32(tmp_path: Path, family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same tokens, whatever a precision would draw itself; what needs a GPU is left empty."""
    monkeypatch.setattr(rounding, "TOKENS", 300)
    monkeypatch.setattr(rounding, "BATCH", 10)
    section = rounding.precisions(tiny(tmp_path, family), CPU)
    assert [row["teacher.precision"] for row in section.rows] == ["fp32", "tf32", "fp16", "bf16"]
    fp32, tf32, fp16, bf16 = ([row[name] for name in rounding.BOUNDS] for row in section.rows)
    assert fp32 == [0, 0]
    assert tf32 == [None, None]
    assert 0 < fp16[0] < bf16[0] / 4
    assert fp16[1] <= bf16[1] < 10
    assert [claim.value for claim in section.claims] == fp16
    assert all(claim.met for claim in section.claims)


def test_the_distance_is_the_total_variation_and_the_share_of_other_codes() -> None:
    p, q = (torch.tensor(x)[None].log() for x in ([[0.5, 0.5], [1.0, 0.0]], [[0.25, 0.75], [0.0, 1.0]]))
    found = rounding._distance(iter([(p, torch.tensor([[0, 1]]))]), [(q, torch.tensor([[0, 0]]))])
    assert found == pytest.approx((100 * (0.25 + 1.0) / 2, 50.0))


def test_a_teacher_beyond_float16_says_so_in_the_table(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounding, "TOKENS", 18)
    weights = load_file(recipe.teacher.checkpoint)
    weights["layers.0.feed_forward.w1.weight"] *= 60_000 / weights["layers.0.feed_forward.w1.weight"].abs().max()
    checkpoints.save(weights, recipe.teacher.checkpoint, {})
    section = rounding.precisions(recipe, CPU)
    assert [section.rows[2][name] for name in rounding.BOUNDS] == ["overflow", "overflow"]
    assert not any(claim.met for claim in section.claims)
    assert "overflow" in section.markdown()


# ---- the pools


def test_a_share_is_of_each_actors_own_time() -> None:
    spans = [
        Span(1, 0.0, 10.0, 14.0, {"teacher": 3.0}),
        Span(1, 0.0, 15.0, 18.0, {"teacher": 3.0}),
        Span(2, 0.0, 100.0, 102.0, {"teacher": 1.0}),
    ]
    assert actors._share(spans, "teacher") == pytest.approx(7 / 10)


def test_generation_runs_the_jobs_own_pool(ray_cluster: str, recipe: Recipe, tmp_path: Path) -> None:
    section = actors.generation(recipe, str(tmp_path / "bench"))
    (row,) = section.rows
    assert len(list((tmp_path / "bench" / "pairs").glob("shard-*.parquet"))) == actors.SHARDS
    assert float(row["rows / s, end to end"]) == pytest.approx(float(row["bare"]) * float(row["end to end / bare"]))
    assert 0 < float(row["end to end / bare"]) < 1
    assert row["bytes a row"] > 0


@pytest.mark.slow
def test_evaluation_runs_the_jobs_own_pool(ray_cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(actors, "PART_IMAGES", 20)
    monkeypatch.setattr("pipeline.evaluation.draws.PART_IMAGES", 20)
    monkeypatch.setattr(actors, "PARTS", 1)  # the workers know nothing of the smaller parts: one begins at 0 for both
    recipe = tiny(tmp_path, "var", **IMAGES)
    bench = benchmark.Bench(recipe, str(tmp_path))
    (section,) = bench.parts["evaluation"]()
    assert [row["sampler"] for row in section.rows] == ["teacher, AR", "DD 1 step"]
    for row in section.rows:
        device = float(row["drawing, %"]) + float(row["scoring, %"])
        assert float(row["end to end / device"]) == pytest.approx(device / 100)
        assert 0 < device < 100


def test_many_images_stand_beside_images_thrown_away(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(students, "IMAGES", 20)
    monkeypatch.setattr(clock, "MOST", 1)
    times = iter([1.0, 1.25, 2.0])
    monkeypatch.setattr(clock, "once", lambda call, device: (call(), next(times))[1])
    (section,) = benchmark.Bench(recipe, str(tmp_path)).parts["images"]()
    assert [row["images"] for row in section.rows] == ["thrown away", "into an .npz", "into a folder"]
    assert [claim.value for claim in section.claims] == [0.8, 0.5]
    assert section.rows[1]["images / s"] == 16
    with np.load(tmp_path / "images" / "images.npz") as arrays:
        found = arrays["arr_0"]
    pictures = sorted((tmp_path / "images" / "pictures").glob("*.png"))
    assert np.array_equal(found, np.stack([np.asarray(Image.open(path)) for path in pictures]))
    assert len(found) == 20
    assert not capsys.readouterr().err, "no bars"


# ---- training


def test_training_counts_its_waiting(ray_cluster: str, recipe: Recipe, tmp_path: Path) -> None:
    recipe = replace(recipe, train=replace(recipe.train, batch=4, lpips=0.0, split=9))
    section, rate = training.parts(recipe, CPU)
    assert rate > 0
    assert section.rows[-1]["share, %"] == pytest.approx(100)
    streams = training.stream(recipe, str(tmp_path / "stream"), CPU, rate)
    assert [row["noise"] for row in streams.rows] == ["stored", "derived"]
    assert all(0 <= claim.value < 1 for claim in streams.claims if claim.at_most)


# ---- growth


def test_exponents_are_those_of_power_laws() -> None:
    curve = growth.Curve("a", "x", "y", [(x, 3 * x**1.5) for x in (1.0, 2.0, 4.0, 8.0)], 1.0)
    assert curve.found == pytest.approx(1.5)


@pytest.mark.slow
def test_growth_has_a_row_and_a_panel_for_every_curve(
    ray_cluster: str, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = {"BATCHES": (1, 2), "SIDES": (2, 4), "CODES": (64, 128), "PAIRS": (1_000, 1_500), "ACTORS": (1, 2)}
    for name, value in (small | {"SHARDS": 3, "ROWS": 4, "SLEEP": 0.05}).items():
        monkeypatch.setattr(growth, name, value)
    drawn = {}
    monkeypatch.setattr(plots, "png", lambda figure: drawn.setdefault("titles", [a.get_title() for a in figure.axes]))
    section, curves = growth.growth(recipe, checkpoints.teacher(recipe.teacher), str(tmp_path / "growth"), 0.02)
    growth.picture(curves)
    assert len(section.rows) == len(curves) == 9
    assert drawn["titles"][: len(curves)] == [curve.title for curve in curves]


# ---- the job


def test_the_job_leaves_its_table_its_numbers_and_an_mlflow_run(recipe: Recipe) -> None:
    recipe = replace(recipe, benchmark=replace(recipe.benchmark, sections=("matching", "teacher")))
    text = benchmark.benchmark(recipe)
    assert text == storage.read_bytes(f"{recipe.benchmark_uri}/benchmark.md").decode()
    found = storage.read_json(f"{recipe.benchmark_uri}/benchmark.json")
    assert text.count("Meanwhile others kept") == 2, "each section says what else the machine did"
    assert [section["title"] for section in found["sections"]] == ["Flow matching beside plain sampling", "The teacher"]
    assert "No GPU took part" in text
    client = mlflow_store.loaded().MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name(recipe.name).experiment_id])
    claims = {Claim(**{k: c[k] for k in ("text", "value")}).key for s in found["sections"] for c in s["claims"]}
    assert set(run.data.metrics) == claims
    assert {file.path for file in client.list_artifacts(run.info.run_id)} == {
        *("benchmark.md", "benchmark.json", "recipe.yaml")
    }


def test_a_missing_gpu_is_one_sentence(recipe: Recipe) -> None:
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="no CUDA device"):
            benchmark.benchmark(replace(recipe, cluster=replace(recipe.cluster, gpus=1)))


def test_a_dry_run_plans_every_section_and_writes_nothing(recipe: Recipe) -> None:
    """Without a GPU for a recipe that asks for one, too."""
    settings = replace(recipe.benchmark, sections=get_args(Measured), batches=(1, 2), seconds=3.0)
    few = replace(recipe.evaluate, samplers=[{"name": "FewStep"}])
    on_gpu = replace(recipe, dry_run=True, evaluate=few, benchmark=settings, cluster=replace(recipe.cluster, gpus=1))
    text = benchmark.benchmark(on_gpu)
    assert [line.split()[0] for line in text.splitlines()[-len(get_args(Measured)) - 2 :]] == [
        *get_args(Measured),
        "needs",
        "time",
    ]
    assert "matching    2 measurements of 3 s, at batch 1, 2" in text
    assert "each with 1 CPU and 1 GPU" in text
    assert not Path(recipe.run).exists()
    assert set(plan.SECTIONS) == set(get_args(Measured))


@pytest.mark.slow
def test_a_served_student_stands_beside_its_bare_step(ray_cluster: None, recipe: Recipe, tmp_path: Path) -> None:
    settings = replace(recipe.benchmark, seconds=0.5, serving_seconds=2.0)
    section = students.serving(replace(recipe, benchmark=settings), str(tmp_path / "serving"))
    most, light, loaded, _ = section.rows
    assert [row["load"] for row in section.rows] == ["as much as it answers", *students.LOADS]
    assert int(loaded["requests"] or 0) > int(light["requests"] or 0)
    assert float(most["images / s"] or 0) > float(light["images / s"] or 0)
    images, late = section.claims
    assert (images.bound, images.at_most) == (0.8, False)
    assert (late.bound, late.at_most, late.value) == (3.0, True, loaded["p99 / bare step"])
    assert images.value == most["/ bare step's"]
    steps = re.search(r"every round \(([\d., ]+) ms\)", section.about)
    tails = re.search(r"answers was ([\d., ]+) bare steps", section.about)
    assert steps
    assert tails
    assert len(steps[1].split(", ")) == students.ROUNDS + 1
    assert len(tails[1].split(", ")) == students.ROUNDS
    assert f"{late.value:.2f}" in tails[1]
