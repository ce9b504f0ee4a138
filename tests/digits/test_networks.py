"""The embedded default's data, networks and recipes."""

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline import noise
from pipeline.command_line import parse
from pipeline.digits import networks, pretrain
from pipeline.models import checkpoints
from pipeline.models.base import Teacher
from pipeline.models.conditions import Labels
from pipeline.recipe import Recipe
from pipeline.sampling.samplers import inverse_cdf

ROOT = Path(__file__).parents[2]
FAMILIES = ["digits-var", "digits-llamagen"]


def recipe(name: str) -> Recipe:
    return parse(None, ["--config", str(ROOT / "jobs" / "recipes" / f"{name}.yaml")])


def test_the_digits_are_balanced_padded_and_scaled() -> None:
    images, labels = networks.images_and_labels()
    assert images.shape == (5000, 3, 32, 32)
    assert (images.min(), images.max()) == (-1, 1)
    assert labels[:10].tolist() == list(range(10))
    _, training = networks.training_split()
    assert torch.bincount(training).tolist() == [450] * 10


def test_every_place_is_used_that_keeps_all_ink() -> None:
    image = torch.full((1000, 3, 32, 32), -1.0)
    image[:, :, 2:16, 16] = 1.0
    shifted = networks.placed(image, torch.Generator().manual_seed(0))
    ink = shifted[:, 0] == 1
    assert (ink.sum((1, 2)) == 14).all()
    rows, columns = ink.any(2).int().argmax(1), ink.any(1).int().argmax(1)
    assert set(rows.tolist()) == set(range(0, 7)), "the top is two rows away"
    assert set(columns.tolist()) == set(range(12, 21))


def test_a_shift_ends_where_ink_would_be_lost() -> None:
    image = torch.full((3, 3, 32, 32), -1.0)
    image[:, :, 2:16, 10:20] = torch.rand(14, 10)
    shifts = torch.tensor([[3, -4], [-4, 4], [0, 0]])
    moved = networks.moved(image, shifts)
    assert torch.equal(moved[0], image[0].roll((3, -4), (1, 2)))
    assert torch.equal(moved[1], image[1].roll((-2, 4), (1, 2))), "the top is two rows away"
    assert torch.equal(moved[2], image[2])


def test_placing_the_digits_loses_no_ink() -> None:
    ink, left = (
        (images.double() + 1).sum((1, 2, 3)) for images, _ in (networks.centred(), networks.images_and_labels())
    )
    assert torch.allclose(ink, left, rtol=1e-12)


def test_perceptual_distance_is_zero_for_equals_and_grows_with_noise() -> None:
    net, images = networks.perceptual(), networks.images_and_labels()[0][:20]
    speckle = torch.from_numpy(noise.gaussian(5, range(20), 3 * 32, 32)).float().reshape(20, 3, 32, 32)
    near, far = net(images + 0.05 * speckle, images), net(images + 0.4 * speckle, images)
    assert torch.equal(net(images, images), torch.zeros(20))
    assert (near > 0).all()
    assert (far > near).all()
    wanted = images.clone().requires_grad_()
    net(wanted, images.flip(0)).sum().backward()
    assert wanted.grad is not None
    assert wanted.grad.abs().max() > 0


@torch.no_grad()
def test_the_scorer_knows_the_held_out_digits() -> None:
    images, labels = networks.images_and_labels()
    features, logits = networks.scorer()(images[-500:])
    assert features.shape == (500, 64)
    assert (logits.argmax(1) == labels[-500:]).float().mean() > 0.97


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_the_shipped_teacher_draws_the_digit_it_is_asked_for(name: str) -> None:
    settings = recipe(name).teacher
    teacher, ids = checkpoints.teacher(settings), np.arange(60)
    uniform = torch.from_numpy(noise.uniform(9, ids, teacher.layout.length))
    labels = torch.from_numpy(noise.labels(ids, 10))
    codes = teacher.generate(Labels(labels), lambda t, log_p: inverse_cdf(log_p, uniform[:, teacher.layout.span(t)]))
    _, logits = networks.scorer()(teacher.decode(teacher.codebook[codes]))
    assert (logits.argmax(1) == labels).float().mean() > 0.8


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_the_shipped_tokenizer_reconstructs(name: str) -> None:
    tokenizer = checkpoints.tokenizer(recipe(name).teacher)
    images = networks.images_and_labels()[0][-40:]
    made = tokenizer.decode(tokenizer.codebook[tokenizer.encode(images)])
    assert (made - images).square().mean() < 0.06


def test_the_assets_are_small() -> None:
    folder = ROOT / "pipeline" / "assets" / "digits"
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) <= 12e6


def test_every_shipped_recipe_parses() -> None:
    base = ROOT / "jobs" / "recipes"
    for path in base.glob("*.yaml"):
        under = "digits-llamagen" if path.stem == "demo" else path.stem.removesuffix("-released")
        assert parse(None, ["--config", str(base / f"{under}.yaml"), "--config", str(path)]).name == path.stem


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_unused_codes_move_to_where_one_is_missing(name: str) -> None:
    tokenizer = checkpoints.tokenizer(recipe(name).teacher)
    before, used = tokenizer.codebook.clone(), torch.full((64,), 9.0)
    used[[1, 5]] = 0
    seen = tokenizer.searched(networks.images_and_labels()[0][:4])
    missing = -before[:2] * 3
    pretrain._revive(tokenizer, used, torch.cat([before, missing]), torch.Generator().manual_seed(0))
    after = tokenizer.codebook
    assert torch.equal(after[used > 0], before[used > 0])
    assert {tuple(row) for row in tokenizer.quantize.embedding.weight[used == 0].tolist()} == {
        tuple(row) for row in missing.tolist()
    }, "nothing is far from the codes but these two"
    per_image = sum(g for g in tokenizer.layout.groups)
    assert seen.shape == (4 * per_image, 4)


def test_the_codes_that_a_teacher_learns_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrain, "PLACES", 1)
    images, truth = networks.training_split()
    mixed = torch.stack([(truth == label).nonzero()[:50, 0] for label in (3, 7)], dim=1).flatten()  # 3, 7, 3, 7, ...
    images, truth = images[mixed], truth[mixed]
    monkeypatch.setattr(networks, "training_split", lambda: (images, truth))
    tokenizer = checkpoints.tokenizer(recipe("digits-var").teacher)
    read, learnt, labels = pretrain.training_codes(tokenizer, 0.0, torch.Generator().manual_seed(0))
    assert torch.equal(read, learnt)
    assert labels.tolist() == sorted(truth.tolist())
    order = truth.argsort(stable=True)
    generator = torch.Generator().manual_seed(0)
    shown = torch.cat([networks.placed(images[order][i : i + 50], generator) for i in (0, 50)])
    assert torch.equal(read, tokenizer.encode(shown))
    wrong, right, _ = pretrain.training_codes(tokenizer, 0.4, torch.Generator().manual_seed(0))
    assert 0.02 < (wrong != right).float().mean() < 0.3
    for label in (3, 7):
        used, own = wrong[labels == label], right[labels == label]
        assert (used[:, None] == own[None]).any(1).all(), "a wrong code is that of an image of the class"


@pytest.mark.parametrize("name", FAMILIES)
def test_a_teacher_learns_and_its_average_follows(name: str) -> None:
    settings = recipe(name).teacher
    teacher = checkpoints.teacher(settings).requires_grad_(True)
    run = pretrain.Averaged(teacher.network, 1e-3, steps=4, ema=0.5)
    codes = torch.zeros(8, teacher.layout.length, dtype=torch.long)
    condition = Labels(torch.zeros(8, dtype=torch.long))
    losses = []
    for _ in range(4):
        with pretrain.cheap():
            logits = teacher(condition, codes)
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), codes.flatten())
        run.step(loss)
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    start = checkpoints.teacher(settings).network.state_dict()
    end, average = teacher.network.state_dict(), run.average.state_dict()
    key = next(key for key in start if key.endswith(("head.weight", "output.weight")))
    assert (average[key] - end[key]).norm() < (average[key] - start[key]).norm(), "little of the start remains"
    assert (average[key] - end[key]).norm() > 0
    assert all(torch.equal(average[key], end[key]) for key in end.keys() - dict(teacher.network.named_parameters()))


@pytest.mark.parametrize("name", [FAMILIES[0], pytest.param(FAMILIES[1], marks=pytest.mark.slow)])
def test_a_family_is_made_from_scratch(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images, truth = networks.training_split()
    monkeypatch.setattr(networks, "training_split", lambda: (images[::50], truth[::50]))
    monkeypatch.setattr(pretrain, "PLACES", 1)
    taught: list[torch.Tensor] = []

    def trained(teacher: Teacher, *others: Any) -> torch.nn.Module:
        taught.append(teacher.tokenizer.codebook.clone())
        return train_teacher(teacher, *others)

    train_teacher = pretrain.train_teacher
    monkeypatch.setattr(pretrain, "train_teacher", trained)
    checkpoints.save(networks.Perceptual(), f"{tmp_path}/perceptual.safetensors", {}, torch.float16)
    settings = recipe(name).teacher
    plan = pretrain.PretrainingPlan(
        tokenizer_steps=2, teacher_steps=2, self_correction=0.4 if name == "digits-var" else 0.0
    )
    threads = torch.get_num_threads()
    pretrain.make_family("new", settings, plan, str(tmp_path))
    torch.set_num_threads(threads)
    torch.set_flush_denormal(False)
    made = checkpoints.teacher(
        dataclasses.replace(
            settings,
            tokenizer=f"{tmp_path}/new-tokenizer.safetensors",
            checkpoint=f"{tmp_path}/new-teacher.safetensors",
        )
    )
    assert torch.equal(taught[0], made.codebook), "the teacher learns the codes of the file"
    shipped = checkpoints.teacher(settings)
    assert not torch.equal(shipped.codebook, made.codebook)
    if name == "digits-llamagen":
        pretrain.make_wide("new", pretrain.widened(settings, 64), plan, str(tmp_path))
        torch.set_num_threads(threads)
        torch.set_flush_denormal(False)
        place = f"{tmp_path}/new-teacher-64.safetensors"
        wide = dataclasses.replace(pretrain.widened(settings, 64), checkpoint=place)
        assert checkpoints.teacher(wide).network.tok_embeddings.weight.shape[1] == 64
        assert torch.equal(taught[1], shipped.codebook), "on the tokenizer of the settings"
    card = pretrain.make_card(str(tmp_path), {"new": plan})
    assert "| `new-teacher.safetensors` |" in card
    assert "teacher 2 steps of 64 sequences" in card


def test_a_width_that_a_family_cannot_have_is_one_sentence() -> None:
    done = subprocess.run(
        [sys.executable, "jobs/train_digits.py", "--widths", "64", "63"],
        cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "dim is 63 with 4 heads" in done.stderr
    assert len(done.stderr.splitlines()) == 1
