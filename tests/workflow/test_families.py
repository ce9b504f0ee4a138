"""The three jobs ask of a family what models/base.py says, and no more."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import CONFIG, GUIDANCE

from pipeline.digits import pretrain
from pipeline.host.errors import Refused
from pipeline.models import checkpoints, llamagen
from pipeline.models.base import TrainableTokenizer
from pipeline.recipe import Recipe
from pipeline.settings.evaluate import EvaluateSettings
from pipeline.settings.pairs import PairSettings
from pipeline.settings.teacher import Filter, TeacherSettings
from pipeline.settings.train import TrainSettings
from pipeline.workflow.distill import distill
from pipeline.workflow.evaluate import evaluate
from pipeline.workflow.generate import generate


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    """Of the family ``bare``, with images of 32 pixels, which the digits' networks look at."""
    settings = TeacherSettings(
        family="bare",
        config=CONFIG["llamagen"] | {"side": 2, "multipliers": [1] * 5, "classes": 10},
        tokenizer=str(tmp_path / "tokenizer.safetensors"),
        checkpoint=str(tmp_path / "teacher.safetensors"),
        filter=Filter(guidance=GUIDANCE["llamagen"]),
    )
    teacher = checkpoints.family(settings).Teacher(checkpoints.config(settings), settings.filter)
    checkpoints.save(teacher.tokenizer, settings.tokenizer, {})
    checkpoints.save(teacher.network, settings.checkpoint, {})
    return Recipe(
        name="bare",
        run=str(tmp_path / "run"),
        teacher=settings,
        pairs=PairSettings(count=24, shard_rows=12, batch=6, actors=1),
        train=TrainSettings(start_steps=(1, 2), split=1, batch=8, epochs=1, perceptual="digits", snapshots=1),
        evaluate=EvaluateSettings(
            samplers=[{"name": "FewStep", "steps": [1]}],
            count=10,
            batch=10,
            actors=1,
            curve_count=0,
            timing_batches=(1,),
        ),
    )


def test_a_family_whose_tokenizer_cannot_be_trained_serves_the_three_jobs(
    recipe: Recipe, ray_cluster: None, tmp_path: Path
) -> None:
    assert not issubclass(checkpoints.family(recipe.teacher).Tokenizer, TrainableTokenizer)
    generate(recipe)
    distill(recipe)
    evaluate(recipe)
    assert Path(recipe.report_uri, "report.json").exists()
    threads = torch.get_num_threads()
    with pytest.raises(Refused, match=r"^bare\.Tokenizer cannot be trained from nothing"):
        pretrain.make_family("bare", recipe.teacher, pretrain.PretrainingPlan(1, 1), str(tmp_path / "made"))
    torch.set_num_threads(threads)
    torch.set_flush_denormal(False)
    assert not (tmp_path / "made").exists()


def test_self_correction_is_for_tokens_that_mend_one_another() -> None:
    """Of a tokenizer that can be trained, and has none."""
    shape = CONFIG["llamagen"] | {"multipliers": (1, 1)}
    tokenizer = llamagen.Tokenizer(llamagen.Config(**shape))
    assert isinstance(tokenizer, TrainableTokenizer)
    with pytest.raises(Refused, match=r"^tokens of pipeline\.models\.llamagen\.tokenizer do not mend one another"):
        pretrain.training_codes(tokenizer, 0.4, torch.Generator())
