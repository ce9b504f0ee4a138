"""What a plan says of memory, against tensors that are really there."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import Family, tiny
from tiny_text import tiny_encoder
from torch._subclasses.fake_tensor import FakeTensorMode

from pipeline.models import checkpoints
from pipeline.models.conditions import Labels
from pipeline.models.graphs import Graphs
from pipeline.numerics import footprint
from pipeline.numerics.footprint import Footprint, Meter
from pipeline.pairs import memory
from pipeline.pairs.memory import trace_replica
from pipeline.recipe import Recipe
from pipeline.settings.text import TextSettings
from pipeline.text import encoder
from pipeline.training import batches
from pipeline.training import step as training_step
from pipeline.training.memory import trace_worker
from pipeline.training.state import TrainingState

FAMILIES: list[Family] = ["var", "llamagen"]


@pytest.mark.parametrize("mode", [nullcontext, FakeTensorMode])
def test_the_meter_counts_what_is_alive(mode: Callable[[], AbstractContextManager[object]]) -> None:
    with mode(), Meter() as meter:
        x = torch.zeros(1000)
        view = x.view(10, 100)
        assert meter.live == 4000, "a view adds nothing"
        del x
        assert meter.live == 4000, "the view keeps it"
        y = view + 1
        del view
        assert (meter.live, meter.peak) == (4000, 8000)
        weight = torch.zeros(10, 100, requires_grad=True)
        out = (weight * 2).exp().sum()
        assert meter.live == 12_004, "the exponential is kept for the backward pass, the product is not"
        out.backward()
        del y, out, weight
        assert meter.live == 0


def test_attention_matrices_can_be_left_out() -> None:
    with Meter(square=7) as meter:
        kept, left = torch.zeros(2, 7, 8), torch.zeros(2, 7, 7)
    assert (meter.live, left.numel()) == (kept.numel() * 4, 98)


@pytest.mark.parametrize(("family", "recompute"), [("var", False), ("var", True), ("llamagen", False)])
def test_a_step_takes_what_the_plan_says(tmp_path: Path, family: Family, recompute: bool) -> None:
    recipe = tiny(tmp_path, family)
    recipe = replace(recipe, train=replace(recipe.train, recompute=recompute))
    planned = trace_worker(recipe)
    layout, samples = checkpoints.config(recipe.teacher).layout, 20
    with Meter() as meter:
        student, loss = training_step.build(recipe, torch.device("cpu"))
        rows = batches.made_up(layout, samples)
        batch = batches.noised(rows, 0, recipe.train, layout, loss.tokenizer.codebook)
        meter.peak = 0  # of a network as small as this, the making takes more than the training
        state = TrainingState(student, recipe.train)
        training_step.prepare(student, loss)
        for _ in range(2):
            training_step.step(student, loss, state, batch, total=2)
    expected = planned.fixed + samples * planned.sample
    assert meter.peak == pytest.approx(expected, rel=0.03)
    assert planned.fixed > 20 * sum(p.numel() for p in student.parameters())


def test_a_plan_knows_what_is_computed_again(tmp_path: Path) -> None:
    recipe = tiny(tmp_path)
    recipe = replace(recipe, train=replace(recipe.train, micro_batch=1))
    again = replace(recipe, train=replace(recipe.train, recompute=True))
    plain, less = trace_worker(recipe), trace_worker(again)
    assert less.sample < 0.7 * plain.sample
    assert less.fixed == pytest.approx(plain.fixed, rel=0.05)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_of_pairs_takes_what_the_plan_says(tmp_path: Path, family: Family) -> None:
    recipe = tiny(tmp_path, family)
    planned, samples = trace_replica(recipe), 500
    teacher = checkpoints.teacher(recipe.teacher)
    with Meter() as meter, torch.no_grad():
        teacher = copy.deepcopy(teacher)  # so that its weights count
        condition = Labels(torch.zeros(samples, dtype=torch.long))
        teacher.generate(condition, lambda step, log_p: torch.zeros(log_p.shape[:-1], dtype=torch.long))
    assert meter.peak == pytest.approx(planned.fixed + samples * planned.sample, rel=0.03)


def on_graphs(recipe: Recipe) -> Recipe:
    return replace(
        recipe,
        teacher=replace(recipe.teacher, graphs="auto"),
        cluster=replace(recipe.cluster, gpus=1),
        train=replace(recipe.train, workers=1),
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_a_recorded_batch_takes_what_the_plan_says(tmp_path: Path, family: Family) -> None:
    """Memory that a recording keeps, beside what a batch takes at most, and its graphs' own for every node."""
    recipe, samples = on_graphs(tiny(tmp_path, family)), 500
    planned, rehearsal = trace_replica(recipe), memory.Rehearsal()
    teacher = checkpoints.teacher(recipe.teacher)
    with Meter() as meter, torch.no_grad():
        teacher = copy.deepcopy(teacher)  # so that its weights count
        teacher.graphs = Graphs(lambda: rehearsal, "cpu")
        condition = Labels(torch.zeros(samples, dtype=torch.long))
        for _ in range(3):
            teacher.generate(condition, lambda step, log_p: torch.zeros(log_p.shape[:-1], dtype=torch.long))
    graphs = footprint.NODE * rehearsal.nodes
    assert meter.peak == pytest.approx(planned.fixed - graphs + samples * planned.sample, rel=0.03)
    eager = replace(recipe, teacher=replace(recipe.teacher, graphs=False))
    layout, plain = teacher.layout, trace_replica(eager)
    assert planned.fixed - plain.fixed == pytest.approx(graphs, rel=0.01)
    assert planned.sample > plain.sample + 4 * max(layout.groups) * layout.vocabulary, "what steps return has its room"
    assert rehearsal.nodes > layout.steps * 10 * len(list(teacher.network.layers))
    off = replace(recipe, cluster=replace(recipe.cluster, gpus=0))
    assert trace_replica(off) == plain, "auto is off on a CPU"


def test_nodes_are_what_writes_memory() -> None:
    with footprint.Nodes() as nodes:
        x = torch.empty(4, 4)
        x.view(16)[3:].unsqueeze(0)
        assert nodes.count == 0
        x.fill_(2.0)
        y = x.view(16) + 1
        y[8:].copy_(y[:8])
        assert nodes.count == 3


@pytest.mark.parametrize("recorded", [False, True])
def test_a_raster_sequence_is_traced_in_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recorded: bool) -> None:
    recipe = on_graphs(tiny(tmp_path, "llamagen")) if recorded else tiny(tmp_path, "llamagen")
    whole = trace_replica(recipe)
    monkeypatch.setattr(memory, "TRACED", 4)
    part = trace_replica(recipe)
    assert part.sample == pytest.approx(whole.sample, rel=0.02)
    assert part.fixed == pytest.approx(whole.fixed, rel=0.01)


def test_a_gpu_holds_no_attention_matrices(tmp_path: Path) -> None:
    recipe = with_precision(tiny(tmp_path), "bf16")  # whose backward pass keeps them on a CPU
    on_gpu = replace(recipe, cluster=replace(recipe.cluster, gpus=1), train=replace(recipe.train, workers=1))
    assert trace_worker(on_gpu).sample < trace_worker(recipe).sample


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_text_encoder_adds_its_weights(tmp_path: Path, precision: str) -> None:
    """To generation and to training, however large the batch; what counts is what is really loaded."""
    plain = tiny(tmp_path)
    settings = TextSettings(encoder=str(tiny_encoder(tmp_path / "encoder")), precision=precision, clean=False)
    weights = {weight.data_ptr(): weight.nbytes for weight in encoder.load(settings, "cpu").parameters()}
    for need in (trace_replica, trace_worker):
        before, after = need(plain), need(replace(plain, text=settings))
        assert after == replace(before, fixed=before.fixed + sum(weights.values()))


def with_precision(recipe: Recipe, precision: str) -> Recipe:
    return replace(recipe, train=replace(recipe.train, precision=precision))


def test_the_largest_batch_is_the_last_that_fits() -> None:
    cost = Footprint(fixed=6_560_000_000, sample=1_480_000_000)
    for card in footprint.CARDS:
        most = cost.largest(card)
        assert cost.bytes(most) <= card * 1e9 < cost.bytes(most + 1)
    assert Footprint(fixed=30_000_000_000, sample=1).largest(24) == 0
    alone, cards = cost.lines(None, "pairs.batch", gpu=True)
    assert alone == "memory       6.56 GB and 1,480.0 MB a sample", "a batch that the card says"
    assert cards in cost.lines(64, "pairs.batch", gpu=True)
    assert "0 on 24 GB" in Footprint(30_000_000_000, 10**9).lines(64, "train.micro_batch", gpu=True)[1]


def test_auto_takes_as_much_as_the_larger_of_its_two(tmp_path: Path) -> None:
    """Nobody knows yet which of them the workers settle on."""
    found = {}
    for precision in ("fp32", "bf16", "auto"):
        recipe = tiny(tmp_path)
        found[precision] = trace_worker(replace(recipe, train=replace(recipe.train, precision=precision)))
    assert found["auto"] == found["fp32"]
    assert found["fp32"].sample > found["bf16"].sample
