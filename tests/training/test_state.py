"""What of a student is trained."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import Family, tiny

from pipeline.models.conditions import Labels
from pipeline.training import batches, step
from pipeline.training.state import TrainingState


@pytest.mark.parametrize("family", ["var", "llamagen"])
@pytest.mark.parametrize(("cross_entropy", "lpips"), [(1.0, 0.0), (0.0, 1.0), (1.0, 1.0)])
def test_all_that_is_trained_has_a_gradient_and_the_head_of_no_weight_stays(
    tmp_path: Path, family: Family, cross_entropy: float, lpips: float
) -> None:
    """DDP waits for the gradient of whatever asks for one, on every step."""
    recipe = tiny(tmp_path, family)
    weights = {"cross_entropy": cross_entropy, "lpips": lpips, "perceptual": "digits", "split": 1}
    recipe = replace(recipe, train=replace(recipe.train, weight_decay=0.5, warmup=0, **weights))
    student, loss = step.build(recipe, torch.device("cpu"))
    state = TrainingState(student, recipe.train)
    before = {name: value.clone() for name, value in student.named_parameters()}
    trained = {name for name, value in student.named_parameters() if value.requires_grad}
    given: set[str] = set()
    for name, value in student.named_parameters():
        value.register_hook(lambda gradient, name=name: given.add(name)) if value.requires_grad else None
    rows = batches.made_up(student.layout, 8)
    batch = batches.noised(rows, 0, recipe.train, student.layout, loss.tokenizer.codebook)
    step.step(student, loss, state, batch, total=1)
    assert given == trained
    logits, embeddings = ({id(p) for part in head for p in part.parameters()} for head in student.heads())
    still = {name for name, value in student.named_parameters() if torch.equal(value, before[name])}
    frozen = (logits if cross_entropy == 0 else set()) | (embeddings if lpips == 0 else set())
    assert {name for name, value in student.named_parameters() if id(value) in frozen} <= still
    assert before.keys() - trained == {name for name, value in student.named_parameters() if id(value) in frozen}


@pytest.mark.parametrize("micro_batch", [0, 2])
def test_unequal_shares_have_the_gradient_of_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, micro_batch: int
) -> None:
    """The mean over three workers, which is DDP's, of what 8 samples give in shares of 2, 3 and 3."""
    recipe = tiny(tmp_path, "llamagen")
    train = replace(recipe.train, batch=8, lpips=0.0, split=9, cross_entropy=1.0, micro_batch=micro_batch)
    recipe = replace(recipe, train=train)

    def gradients(rows: slice) -> dict[str, torch.Tensor]:
        student, loss = step.build(recipe, torch.device("cpu"))
        given: dict[str, torch.Tensor] = {}
        for name, value in student.named_parameters():
            if value.requires_grad:
                value.register_hook(lambda gradient, name=name: given.update({name: given.get(name, 0) + gradient}))
        pairs = batches.made_up(student.layout, 8)
        batch = batches.noised(pairs, 0, recipe.train, student.layout, loss.tokenizer.codebook)
        assert isinstance(batch.condition, Labels)
        labels = Labels(batch.condition.labels[rows])
        share = batches.Batch(batch.x_t[rows], batch.t[rows], batch.tokens[rows], labels)
        step.step(student, loss, TrainingState(student, recipe.train), share, total=1)
        return given

    whole = gradients(slice(0, 8))
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 3)
    shares = [gradients(rows) for rows in (slice(0, 2), slice(2, 5), slice(5, 8))]
    for name, value in whole.items():
        mean = torch.stack([share[name] for share in shares]).mean(0)
        torch.testing.assert_close(mean, value, rtol=1e-4, atol=1e-7)
