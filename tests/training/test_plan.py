"""Settings that cannot train a student are refused before anything is read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.models.base import Layout
from pipeline.settings.train import TrainSettings
from pipeline.training import plan

LAYOUT = Layout(groups=(1, 4, 9), vocabulary=11, code_dim=3, classes=2, image_size=16)
SETTINGS = TrainSettings(start_steps=(1, 2), split=2, cross_entropy=0.1, lpips=1.0)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"start_steps": (1, 4)}, "train.start_steps holds 4, but the teacher's AR steps run from 1 to 3"),
        ({"split": 4}, "train.split is 4, but the teacher has 3 AR steps"),
        ({"split": 3}, "has no embedding to train"),
        ({"lpips": 0.0}, "nothing trains the embedding head"),
        ({"cross_entropy": 0.0}, "nothing trains the logits"),
        ({"perceptual": "vgg"}, "vgg16-397923af.pth are missing"),
    ],
)
def test_contradictions_are_one_sentence(
    change: dict[str, Any], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(ValueError, match=sentence) as caught:
        plan.check_losses(replace(SETTINGS, **change), LAYOUT)
    assert "\n" not in str(caught.value)


def test_the_digits_network_is_refused_for_larger_images() -> None:
    with pytest.raises(ValueError, match="made for images of 32 pixels, and the teacher's have 256; use vgg"):
        plan.check_losses(replace(SETTINGS, perceptual="digits"), replace(LAYOUT, image_size=256))


def test_consistent_settings_pass() -> None:
    plan.check_losses(replace(SETTINGS, lpips=0.0, split=3), LAYOUT)
    plan.check_losses(replace(SETTINGS, perceptual="digits"), replace(LAYOUT, image_size=32))
    plan.check_losses(
        replace(SETTINGS, perceptual="digits", split=0, cross_entropy=0.0), replace(LAYOUT, image_size=32)
    )


def test_a_worker_of_the_fewest_takes_the_most_at_once() -> None:
    assert plan.at_once(TrainSettings(batch=12, workers=(2, 3))) == 6
    assert plan.at_once(TrainSettings(batch=12, workers=3)) == 4
