"""The same gradients from less memory, and nothing of it in names and copies."""

from __future__ import annotations

import copy
import pickle
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from step import error, step, stirred
from tiny import Family, tiny
from torch import nn

from pipeline.models import checkpoints
from pipeline.models.conditions import Captions
from pipeline.numerics.compilation import compiled
from pipeline.numerics.footprint import Meter
from pipeline.numerics.precision import autocast
from pipeline.numerics.recomputation import recomputed
from pipeline.recipe import Recipe
from pipeline.training import batches, perceptual
from pipeline.training import step as training_step
from pipeline.training.state import TrainingState

FAMILIES: Any = pytest.mark.parametrize("family", ["var", "llamagen"])


def with_train(recipe: Recipe, **changes: Any) -> Recipe:
    return replace(recipe, train=replace(recipe.train, **changes))


@pytest.fixture(scope="module")
def drawn() -> nn.Module:
    """LPIPS with a random trunk: its weight file is not here."""
    return perceptual.Lpips("alex", pretrained=False)


@pytest.fixture
def trunk(drawn: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(perceptual, "network", lambda kind: copy.deepcopy(drawn))


def large_enough(family: Family) -> dict[str, Any]:
    """Fields of a tokenizer whose images AlexNet can look at, with all kinds of blocks."""
    fields = {"multipliers": [1, 1, 1, 1], "attention": True}
    return fields | ({"patch_nums": [1, 2, 5]} if family == "var" else {"side": 5})


@FAMILIES
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.usefixtures("trunk")
def test_gradients_are_the_same_bit_for_bit(tmp_path: Path, family: Family, precision: str) -> None:
    recipe = with_train(tiny(tmp_path, family, **large_enough(family)), precision=precision, perceptual="vgg", batch=2)
    ran: Counter[nn.Module] = Counter()
    built = training_step.build

    def watched(recipe: Recipe, device: torch.device) -> Any:
        student, loss = built(recipe, device)
        for module in training_step.recomputable(student, loss.tokenizer, loss.network):
            module.register_forward_pre_hook(lambda module, args: ran.update([module]))
        training_step.prepare(student, loss)
        return student, loss

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_step, "build", watched)
        plain, plain_runs = step(recipe), Counter(ran)
        ran.clear()
        again, again_runs = step(with_train(recipe, recompute=True)), Counter(ran)
    assert torch.equal(plain.loss, again.loss)
    assert torch.equal(plain.gradient, again.gradient)
    assert all(torch.equal(a, b) for a, b in zip(plain.prediction, again.prediction, strict=True))
    assert len(plain_runs) == len(again_runs) > 10
    once_more = {type(module) for module, count in again_runs.items() if count in (2, 3)}
    assert len(once_more) >= 4, "blocks, residual blocks, attention, stages of the trunk"
    assert sum(again_runs.values()) == sum(plain_runs.values()) + len(again_runs), "a target is not computed again"


def test_a_run_learns_the_same(tmp_path: Path) -> None:
    """Weights after two optimiser steps with micro-batches and an average, as ``train`` makes them."""

    def trained(recompute: bool) -> dict[str, torch.Tensor]:
        recipe = with_train(tiny(tmp_path), recompute=recompute, micro_batch=3)
        student, loss = training_step.build(recipe, torch.device("cpu"))
        state = TrainingState(student, recipe.train)
        training_step.prepare(student, loss)
        layout = checkpoints.config(recipe.teacher).layout
        pairs = batches.made_up(layout, 8)
        for epoch in range(2):
            batch = batches.noised(pairs, epoch, recipe.train, layout, loss.tokenizer.codebook)
            training_step.step(student, loss, state, batch, total=2)
        return state.student.state_dict() | {f"average {k}": v for k, v in state.average.state_dict().items()}

    plain, again = trained(False), trained(True)
    assert plain.keys() == again.keys()
    assert all(torch.equal(plain[name], again[name]) for name in plain)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_student_of_captions_has_the_same_gradients(tmp_path: Path, precision: str) -> None:
    settings = tiny(tmp_path, "llamagen", caption_dim=8, caption_length=16).teacher
    teacher, gradients, runs = checkpoints.teacher(settings), [], Counter[bool]()
    captions = Captions.from_encoder(torch.randn(3, 8, 8), torch.tensor([1, 8, 5]))
    x, t = torch.randn(3, teacher.layout.length, 4), torch.tensor([1, 4, 9])
    for again in (False, True):
        student = stirred(checkpoints.new_student(settings, teacher, {}, 0)).train()
        if again:
            recomputed(student.layers)
        student.layers[0].attention.register_forward_pre_hook(lambda *_, again=again: runs.update([again]))
        with autocast(precision, "cpu"):
            logits, embeddings = student(x, t, captions)
        (logits.float().logsumexp(-1).sum() + embeddings.square().sum()).backward()
        gradients.append([p.grad for p in student.parameters()])
    assert runs == {False: 1, True: 2}
    assert all(torch.equal(plain, mine) for plain, mine in zip(*gradients, strict=True))


@pytest.fixture
def forgotten() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("forgotten")
def test_compiled_blocks_are_what_runs_again(tmp_path: Path) -> None:
    recipe = tiny(tmp_path, "llamagen")

    def both(student: nn.Module) -> None:
        compiled(student, backend="aot_eager")
        recomputed(student.layers)

    plain, fast = step(recipe), step(recipe, both)
    assert error(fast.gradient, plain.gradient) < 1e-5


def test_names_copies_and_pickles_stay_plain() -> None:
    network = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    names = list(network.state_dict())
    recomputed(network)
    assert list(network.state_dict()) == names
    assert all(block._compiled_call_impl is not None for block in network)
    for made in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        assert all(block._compiled_call_impl is None for block in made)


def test_less_is_kept() -> None:
    def kept(again: bool) -> int:
        blocks = [nn.Sequential(*(nn.Tanh() for _ in range(8))) for _ in range(8)]
        if again:
            recomputed(blocks)
        with Meter() as meter:
            nn.Sequential(*blocks)(torch.zeros(1000, requires_grad=True)).sum().backward()
        return meter.peak

    assert kept(True) < 0.3 * kept(False), "the inputs of 8 blocks and the maps of one, instead of 64"


def test_without_gradients_nothing_is_kept_to_run_again() -> None:
    block = nn.Linear(2, 2)
    recomputed([block])
    with torch.no_grad():
        out = block(torch.ones(1, 2))
    assert not out.requires_grad
