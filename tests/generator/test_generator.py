"""Images from a student's folder are those of the evaluation, and need little."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from shared_student import shared
from tiny import Family, tiny, tiny_text

from pipeline import Generator
from pipeline.generator import folder
from pipeline.host.errors import Refused
from pipeline.models import checkpoints
from pipeline.models.convnet import to_uint8
from pipeline.recipe import Recipe
from pipeline.sampling.samplers import FewStep, FlowMatched, Models, Sampler
from pipeline.text import encoder
from pipeline.text.prompts import PromptList


def evaluated(recipe: Recipe, sampler: Sampler, ids: range) -> torch.Tensor:
    """uint8 images of the samples ``ids``, as the evaluation draws them."""
    teacher = checkpoints.teacher(recipe.teacher)
    student = checkpoints.student(recipe.teacher, folder.weights(recipe.student_uri), teacher.codebook)
    prompts = PromptList.open(recipe.captions.uri, "") if recipe.captions.uri else None
    encode = encoder.conditioner(recipe.text, "cpu") if prompts else None
    seed = recipe.evaluate.seed
    models = Models(teacher, student, recipe.pairs.solver, seed, conditioning=prompts, encode=encode)
    return to_uint8(models.decode(sampler.draw(models, np.array(ids)), sampler.student))


@pytest.mark.parametrize("family", ["var", "llamagen"])
@pytest.mark.parametrize("steps", [(1,), (1, 2)])
def test_images_are_those_of_the_evaluation(tmp_path: Path, family: Family, steps: tuple[int, ...]) -> None:
    recipe = shared(tiny(tmp_path, family))
    generator = Generator.from_pretrained(recipe.student_uri, "cpu")
    ids = range(5, 9)
    found = generator.draw([i % 3 for i in ids], recipe.evaluate.seed, steps, ids)
    assert torch.equal(found, evaluated(recipe, FewStep(1, steps), ids))
    pictures = generator([i % 3 for i in ids], recipe.evaluate.seed, steps, ids)
    assert np.array_equal(np.stack([np.asarray(picture) for picture in pictures]), found.permute(0, 2, 3, 1))


def test_images_of_prompts_are_those_of_the_evaluation(tmp_path: Path) -> None:
    recipe = shared(tiny_text(tmp_path))
    prompts = Path(recipe.captions.uri or "").read_text().splitlines()[:4]
    found = Generator.from_pretrained(recipe.student_uri, "cpu").draw(prompts, recipe.evaluate.seed)
    assert torch.equal(found, evaluated(recipe, FewStep(1), range(4)))


def test_the_teacher_draws_where_it_is_asked_for(tmp_path: Path) -> None:
    recipe = shared(tiny(tmp_path, "llamagen"))
    generator = Generator.from_pretrained(recipe.student_uri, "cpu", teacher=True)
    found = generator.draw_with(FlowMatched(), [0, 1, 2, 0], recipe.evaluate.seed)
    assert torch.equal(found, evaluated(recipe, FlowMatched(), range(4)))
    Path(recipe.student_uri, "recipe.json").unlink()
    with pytest.raises(Refused, match=r"no recipe\.json to say which teacher it had"):
        Generator.from_pretrained(recipe.student_uri, "cpu", teacher=True)


def test_a_seed_for_each_image_is_the_same_in_any_company(tmp_path: Path) -> None:
    generator = Generator.from_pretrained(shared(tiny(tmp_path, "llamagen")).student_uri, "cpu")
    together = generator.draw([1, 2, 1], seeds=[5, 6, 7])
    alone = torch.cat([generator.draw([label], seeds=[seed]) for label, seed in ((1, 5), (2, 6), (1, 7))])
    assert (together.int() - alone.int()).abs().max() <= 1, "rounding at most"
    assert not torch.equal(together[0], together[2])
    assert len(generator.draw([])) == 0


@pytest.mark.parametrize(
    ("wanted", "more", "sentence"),
    [
        ([3], {}, "label 3 was asked of a student of 3 classes, counted from 0"),
        ([-1], {}, "label -1 was asked of a student"),
        (["a seven"], {}, "'a seven' was asked of a student that takes labels from 0 to 2"),
        ([1, 2], {"seeds": [1]}, "1 seeds were given for 2 images"),
        ([1, 2], {"ids": [1, 2, 3]}, "3 ids were given for 2 images"),
        ([1], {"steps": (2,)}, "must rise, begin with 1"),
    ],
)
def test_what_a_student_cannot_draw_is_one_sentence(
    tmp_path: Path, wanted: list[Any], more: dict[str, Any], sentence: str
) -> None:
    generator = Generator.from_pretrained(shared(tiny(tmp_path, "llamagen")).student_uri, "cpu")
    with pytest.raises(Refused, match=sentence):
        generator(wanted, **more)


def test_neither_ray_nor_mlflow_nor_transformers_is_imported(tmp_path: Path) -> None:
    recipe = shared(tiny(tmp_path, "llamagen"))
    script = (
        f"from pipeline import Generator\nGenerator.from_pretrained({recipe.student_uri!r})([1, 2])[0].save("
        f"{str(tmp_path / 'three.png')!r})\nimport sys\nprint({{'ray', 'mlflow', 'transformers', 'matplotlib'}} &"
        " sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == "set()\n"
    assert (tmp_path / "three.png").stat().st_size > 100
