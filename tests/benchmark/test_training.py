"""The parts of a step add up to it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny

from pipeline.benchmark import training as training_speed
from pipeline.benchmark.training import WHOLE, pieces
from pipeline.models.base import Layout
from pipeline.models.conditions import Condition, Labels, Prompts
from pipeline.pairs.stream import Pairs
from pipeline.training import batches
from pipeline.training import step as training_step
from pipeline.training.losses import Loss

LOSSES = {"decode", "decode of the target", "perceptual"}
ALWAYS = {"batch", "student", "cross-entropy", "backward", "optimiser and average"}


def test_the_parts_of_a_step_add_up(tmp_path: Path) -> None:
    recipe = tiny(tmp_path)
    recipe = replace(recipe, train=replace(recipe.train, batch=64, recompute=True))
    found = pieces(recipe, torch.device("cpu"), repeats=5)
    assert found.keys() == ALWAYS | LOSSES | {WHOLE}
    assert min(found.values()) > 0
    assert sum(found.values()) - found[WHOLE] == pytest.approx(found[WHOLE], rel=0.5)


def test_what_the_recipe_leaves_out_is_missing(tmp_path: Path) -> None:
    recipe = tiny(tmp_path, "llamagen")
    recipe = replace(recipe, train=replace(recipe.train, lpips=0.0, split=9))
    assert pieces(recipe, torch.device("cpu"), repeats=1).keys() == ALWAYS | {WHOLE}


def test_the_text_encoder_is_a_part_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock that encoding alone advances; the networks are given a class for every prompt."""
    at, read = [0.0], []
    monkeypatch.setattr(training_speed, "now", lambda device: at[0])
    made_up = batches.made_up

    def of_prompts(layout: Layout, count: int) -> Pairs:
        return made_up(layout, count)._replace(condition=Prompts(("a prompt",) * count))

    def encode(condition: Condition) -> Condition:
        at[0] += 7
        read.append(condition)
        return Labels(torch.zeros(len(condition), dtype=torch.long))

    monkeypatch.setattr(batches, "made_up", of_prompts)
    monkeypatch.setattr(training_speed.encoder, "conditioner", lambda settings, device: encode)
    found = pieces(tiny(tmp_path), torch.device("cpu"), repeats=1)
    assert found.keys() == ALWAYS | LOSSES | {WHOLE, "text encoder"}
    assert {name: seconds for name, seconds in found.items() if seconds} == {WHOLE: 7, "text encoder": 7}
    assert {type(condition) for condition in read} == {Prompts}


def test_steps_before_the_steady_state_are_in_no_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the whole step and of a dry run's, the first two take 1,000 s here and the others one."""
    at, steps, step = [0.0], [0], training_step.step

    def slow_at_first(*args: Any, **more: Any) -> Any:
        steps[0] += 1
        at[0] += 1000 if steps[0] <= 2 else 1
        return step(*args, **more)

    for module in (training_step, training_speed):
        monkeypatch.setattr(module, "now", lambda device: at[0])
    monkeypatch.setattr(training_step, "step", slow_at_first)
    assert pieces(tiny(tmp_path), torch.device("cpu"), repeats=1)[WHOLE] == 1
    steps[0] = 0
    assert training_step.seconds_per_step(tiny(tmp_path)) == 1


def test_each_second_is_counted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock that each call of a network advances by another number."""
    at = [0.0]
    monkeypatch.setattr(training_speed, "now", lambda device: at[0])

    def slow(kind: type, name: str, seconds: float) -> None:
        call = getattr(kind, name)

        def later(*args: object) -> object:
            at[0] += seconds
            return call(*args)

        monkeypatch.setattr(kind, name, later)

    from pipeline.digits.networks import Perceptual
    from pipeline.models.var.student import Student
    from pipeline.models.var.tokenizer import Tokenizer
    from pipeline.training.state import TrainingState

    slow(Student, "forward", 1)
    slow(Loss, "__call__", 10)
    slow(Tokenizer, "decode", 100)
    slow(Perceptual, "forward", 1000)
    slow(TrainingState, "advance", 10_000)
    found = pieces(tiny(tmp_path), torch.device("cpu"), repeats=1)
    assert found == {
        WHOLE: 11_211,
        "batch": 0,
        "student": 1,
        "cross-entropy": 10,
        "decode": 100,
        "decode of the target": 100,
        "perceptual": 1000,
        "backward": 0,
        "optimiser and average": 10_000,
    }
