"""Alg. 1 for one shard, without Ray."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny import Family, tiny, tiny_text, with_pairs

from pipeline import noise
from pipeline.flow import matching, oracle
from pipeline.models.conditions import Labels, Prompts
from pipeline.pairs import memory
from pipeline.pairs.facts import PairFacts
from pipeline.pairs.replica import Replica
from pipeline.recipe import Recipe
from pipeline.text import encoder


def replica(recipe: Recipe) -> Replica:
    return Replica(recipe, PairFacts.of(recipe))


@pytest.mark.parametrize("family", ["var", "llamagen"])
def test_rows_are_those_of_the_slow_oracle(tmp_path: Path, family: Family) -> None:
    """Alg. 1 one sample at a time, with flow matching in float64."""
    made = replica(tiny(tmp_path, family))
    teacher, rows = made.teacher, made.rows(1, 8)
    layout = teacher.layout
    assert rows.ids.tolist() == list(range(16, 24))
    assert len(np.unique(rows.tokens)) > 5, "the tiny teacher is no constant"
    same = []
    for i, tokens in zip(rows.ids, rows.tokens, strict=True):
        x = torch.from_numpy(noise.gaussian(1, [i], layout.length, layout.code_dim).astype(np.float64))

        def choose(step: int, log_p: torch.Tensor, x: torch.Tensor = x) -> torch.Tensor:
            return oracle.exact(x[:, layout.span(step)], log_p, teacher.codebook)

        with torch.no_grad():
            slow = teacher.generate(Labels(torch.tensor([i % layout.classes])), choose)
        same.append(np.array_equal(slow[0].numpy(), tokens))
    assert np.mean(same) >= 7 / 8, "the solver's tolerance may flip a near tie"
    assert rows.conditions.tolist() == [i % layout.classes for i in range(16, 24)]
    assert rows.noise is not None
    assert np.array_equal(rows.noise, noise.gaussian(1, range(16, 24), layout.length, layout.code_dim))


def test_prompts_are_encoded_in_the_replica_and_stored_as_they_are(tmp_path: Path) -> None:
    """Against one sample at a time, each caption with its own length."""
    recipe = tiny_text(tmp_path)
    made = replica(recipe)
    teacher, layout, rows = made.teacher, made.teacher.layout, made.rows(1, 8)
    lines = (tmp_path / "prompts.txt").read_text().splitlines()
    assert rows.conditions.tolist() == lines[16:24]
    assert len(np.unique(rows.tokens)) > 5, "the tiny teacher is no constant"
    encode, same = encoder.load(recipe.text, "cpu"), []
    for i, tokens in zip(rows.ids, rows.tokens, strict=True):
        x = torch.from_numpy(noise.gaussian(1, [i], layout.length, layout.code_dim).astype(np.float64))

        def choose(step: int, log_p: torch.Tensor, x: torch.Tensor = x) -> torch.Tensor:
            return oracle.exact(x[:, layout.span(step)], log_p, teacher.codebook)

        with torch.no_grad():
            slow = teacher.generate(encode(Prompts((lines[i],))), choose)
        same.append(np.array_equal(slow[0].numpy(), tokens))
    assert np.mean(same) >= 7 / 8, "the solver's tolerance may flip a near tie"
    assert made.agreement(rows) == 1.0
    others = rows._replace(conditions=rows.conditions[::-1].copy())
    assert made.agreement(others) < 0.95, "the prompt matters"


def test_the_teacher_sees_the_noise_that_is_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, seen = replica(with_pairs(tiny(tmp_path), dtype="float32")), []
    match = matching.Matcher.__call__
    monkeypatch.setattr(matching.Matcher, "__call__", lambda own, x, log_p: seen.append(x) or match(own, x, log_p))
    rows = made.rows(0, 6)
    assert rows.noise is not None
    assert rows.noise.dtype == np.float32
    assert torch.equal(torch.cat(seen, dim=1), torch.from_numpy(rows.noise)), "not rounded to float16 on the way"
    assert made.agreement(rows) == 1.0


def test_a_short_shard_holds_the_first_rows_of_the_whole_one(tmp_path: Path) -> None:
    made = replica(tiny(tmp_path))
    whole, short = made.rows(2, 16), made.rows(2, 8)
    for a, b in zip(whole, short, strict=True):
        assert a is not None
        assert np.array_equal(a[:8], b)


def test_batches_are_cut_at_fixed_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, asked = replica(tiny(tmp_path)), []
    make = made.make
    monkeypatch.setattr(made, "make", lambda ids, drawn: asked.append(ids.tolist()) or make(ids, drawn))
    made.rows(1, 8)
    assert asked == [list(range(16, 22)), list(range(22, 28))], "the batch that row 8 lies in is made whole"
    asked.clear()
    made.rows(1, 16)
    assert [len(ids) for ids in asked] == [6, 6, 4]


@pytest.mark.parametrize(("rows", "batch"), [(16, 16), (64, 64), (100, 50), (1000, 63)])
def test_auto_cuts_a_shard_into_equal_batches(tmp_path: Path, rows: int, batch: int) -> None:
    recipe = with_pairs(tiny(tmp_path), shard_rows=rows, batch="auto")
    assert memory.batch_size(recipe) == batch
    assert replica(recipe).batch == batch


def test_auto_is_what_a_share_of_the_card_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the same footprint as a plan's, up to a number from which more brings little."""
    recipe = with_pairs(tiny(tmp_path, "llamagen"), shard_rows=10_000, batch="auto")
    recipe = replace(recipe, cluster=replace(recipe.cluster, gpus=0.5))
    need = memory.trace_replica(recipe)
    for fit, batch in ((1, 1), (10, 10), (1000, 250)):
        card = SimpleNamespace(total_memory=2 * need.bytes(fit))
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index, card=card: card)
        assert memory.batch_size(recipe) == batch
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(total_memory=1))
    assert memory.batch_size(recipe) == 1, "which then says what it lacks"


def test_derived_noise_is_not_handed_on(tmp_path: Path) -> None:
    recipe = tiny(tmp_path)
    stored, derived = replica(recipe).rows(0, 16), replica(with_pairs(recipe, noise="derived")).rows(0, 16)
    assert derived.noise is None
    assert np.array_equal(stored.tokens, derived.tokens)


def test_agreement_tells_right_rows_from_wrong_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = replica(tiny(tmp_path))
    rows = made.rows(0, 16)
    assert made.agreement(rows) == 1.0
    assert made.agreement(rows.take(np.array([3, 11]))) == 1.0, "in any company"
    asked, generate = [], made._generate
    monkeypatch.setattr(made, "_generate", lambda labels, *rest: asked.append(len(labels)) or generate(labels, *rest))
    assert made.agreements([rows, rows.take([1])]) == [1.0, 1.0]
    assert asked == [6, 6, 4, 1], "no more at once than pairs.batch"
    swapped = rows._replace(tokens=rows.tokens[::-1].copy())
    assert made.agreement(swapped) < 0.9
    one = rows.tokens.copy()
    one[4, 0] = (one[4, 0] + 1) % 24
    assert 0.9 < made.agreement(rows._replace(tokens=one)) < 1.0, "one wrong code does not drag the later ones along"


def test_measure_takes_the_time_of_a_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, asked = replica(with_pairs(tiny(tmp_path), batch=100)), []
    monkeypatch.setattr(made, "make", lambda ids, drawn: asked.append(len(ids)))
    rows, seconds = made.measure()
    assert (rows, seconds > 0) == (16, True)
    assert asked == [16, 16, 16], "no batch is larger than a shard; the second may be recorded as graphs"
